"""Before a run trains anything: the card it will use, its plan, and the refusal when that does not fit or a reward cannot be had.

What a run holds is worked out in planner; this file asks torch which device the process has.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gemma_grpo.cards import GIB, Card, named_card, this_machine
from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.bundled import unprefixed
from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.sources import DataError
from gemma_grpo.grpo.resuming import environment, fingerprint
from gemma_grpo.grpo.setup import Rows, TrainingData
from gemma_grpo.model.precision import default_device, has_native_bf16
from gemma_grpo.monitor.events import next_run_path
from gemma_grpo.planner import Plan, PreflightError, find_shape, plan_run
from gemma_grpo.reward.sandbox.running import why_not
from gemma_grpo.reward.sandbox.unit_tests import UNIT_TESTS


def running_card() -> Card:
    """The card of this process as torch sees it, or the machine where there is none."""
    device = default_device()
    if device.type != "cuda":
        return this_machine()
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Card(properties.name, "cuda", properties.total_memory, has_native_bf16(device), capability=capability)


def plan_for(
    config: GRPOConfig, rewards: Collection[str], recorded: Mapping[str, Any], card_name: str | None = None, *, ranks: int | None = None
) -> Plan:
    """The plan of a run on this process's card, or on a named one, by so many ranks, or those there will be; loads nothing.

    `recorded` is the plan a run began with, empty for a new one. Raises ValueError for a card nobody knows.
    """
    shape, card = find_shape(config.model_name), running_card() if card_name is None else named_card(card_name)
    if card_name is None and {"token_budget", "kv_token_budget"} <= recorded.keys():
        # the same budgets cut the same pieces, whose sums round alike: a resumed run keeps them where they still fit
        budgets = {name: getattr(config.memory, name) or recorded[name] for name in ("token_budget", "kv_token_budget")}
        kept = config.model_copy(update={"memory": config.memory.model_copy(update=budgets)})
        plan = plan_run(kept, shape, card, rewards=rewards, ranks=ranks)
        if plan.fits:
            return plan
    return plan_run(config, shape, card, rewards=rewards, ranks=ranks)


def refuse_unless_it_fits(plan: Plan, *, force: bool) -> None:
    """Raise PreflightError, with what would help, for a plan that does not fit; with `force` never."""
    if not plan.fits and not force:
        raise PreflightError(plan.refusal)


def hold_to_limit(config: GRPOConfig) -> None:
    """Make torch keep memory.limit_gib on a GPU: what would need more then runs out of memory, as on a smaller card."""
    device, limit = default_device(), config.memory.limit_gib
    if device.type == "cuda" and limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIB / total), device)


def check_reward_can_be_had(rows: Rows, config: GRPOConfig) -> None:
    """Raise DataError when a reward is to be trained and the dataset has no preference pairs."""
    if not isinstance(rows, LoadedPairs):
        raise DataError(
            f"the dataset {config.dataset} has prompts but no preference pairs, so there is nothing to train the reward on. "
            "Give reward=(a function or a name), reward_model.path=(a trained reward adapter), or reward=judge for the zero-shot judge."
        )


def check_programs_can_be_run(weights: Collection[str]) -> None:
    """Raise PreflightError when programs are to be run and this machine cannot shut them in."""
    why = why_not() if UNIT_TESTS in weights else None
    if why is not None:
        raise PreflightError(why)


def check_pairs_are_left(rows: Rows, data: TrainingData, config: GRPOConfig) -> None:
    """Raise DataError when a reward is to be trained and no pair is left to train it on."""
    if not data.pairs:
        raise DataError(
            f"no training pair is left of {rows.kept} rows "
            f"(dropped: {data.counts['pairs_dropped']}, held out: {data.counts['pairs_held_out']}). "
            f"Raise reward_model.max_length ({config.reward_model.max_length}), lower data.holdout ({config.data.holdout}), "
            "or give more rows."
        )


def run_info(config: GRPOConfig, data: TrainingData, precision: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """What run.json says of a run that begins."""
    return {
        "status": "running",
        "started": time.time(),
        "model": config.model_name,
        "dataset": config.dataset,
        "data": dict(data.counts),
        "fingerprint": fingerprint(data),
        "environment": environment(),
        "versions": {name: version(name) for name in ("gemma-grpo", "torch", "transformers", "peft")},
        "completions_per_update": config.completions_per_step,
        "precision": precision,
        "plan": plan.to_dict(),
    }


def run_path(config: GRPOConfig) -> Path:
    """output_dir, or else a new name within runs/ made of the model's and the dataset's: whatever these hold, never a place outside."""
    if config.output_dir:
        return Path(config.output_dir)
    model, dataset = config.model_name.rstrip("/").rpartition("/")[2], Path(unprefixed(config.dataset)).name.partition(".")[0]
    return next_run_path("runs", f"{model}-{dataset}")


def bytes_to_write(config: GRPOConfig, adapter_bytes: int, steps: int) -> int:
    """What checkpoints and adapters will take of the disk: in a checkpoint Adam's two moments lie beside the weights."""
    saved = steps // config.save_steps if config.save_steps else 0
    held = saved if config.keep_checkpoints is None else min(saved, config.keep_checkpoints + 1)  # the new one, before the oldest goes
    return adapter_bytes * (3 * held + 5)

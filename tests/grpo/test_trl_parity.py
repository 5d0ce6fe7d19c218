"""Against TRL 1.16: the same completions, rewards and settings give the same advantages, log-probabilities, loss and LoRA gradients.

TRL's own GRPOTrainer does its half: completions come in through its rollout_func, rewards through a reward function; then its
_compute_loss, on the same base and the same adapter weights. Ours goes through the step's own functions. TRL's reference model
is its adapter-off pass, its KL is k3, or ratio_k3 with use_bias_correction_kl.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_grpo.data.batch import PolicyBatch
from gemma_grpo.grpo.step import role_logprobs, step_advantages
from gemma_grpo.reward.base import StackScores

TRL = importlib.util.find_spec("trl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TRL is None, reason="trl is not installed: pip install 'gemma-grpo[peer]'"),
    pytest.mark.filterwarnings("ignore"),  # of TRL's and transformers' options that will change their names
]

GROUP, LIMIT = 3, 6
TOLERANCE = 1e-5
"""Of the norm, the gradient being one vector: both programs are float32, and sum in another order."""
REWARDS = [[0.1, 0.9, 0.4], [0.3, -0.5, 0.2], [1.2, 0.0, 0.7], [-0.3, 0.6, 0.5]]
AGGREGATIONS = ["grpo", "dr_grpo", "dapo", "bnpo"]
KLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no KL": ({"beta": 0.0}, {"kl.placement": "off"}),
    "k3": ({"beta": 0.04, "use_bias_correction_kl": False}, {"kl.beta": 0.04, "kl.estimator": "k3"}),
    "ratio_k3": ({"beta": 0.04, "use_bias_correction_kl": True}, {"kl.beta": 0.04, "kl.estimator": "ratio_k3"}),
}
"""TRL's settings and ours that mean the same."""


@dataclass
class Peer:
    """TRL's trainer on the same weights."""

    trainer: Any
    rows: list[dict[str, Any]]

    def inputs(self) -> dict[str, Any]:
        """What TRL makes of the completions and rewards: padded ids, masks, advantages, reference log-probabilities."""
        return dict(self.trainer._generate_and_score_completions(self.rows))

    def loss(self, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient by the name our model gives a weight."""
        self.trainer.model.zero_grad()
        value = self.trainer._compute_loss(self.trainer.model, inputs)
        value.backward()
        gradients = {ours(name): p.grad.clone() for name, p in self.trainer.model.named_parameters() if p.grad is not None}
        return float(value.detach()), gradients

    def metric(self, name: str) -> float:
        return float(self.trainer._metrics["train"][name][-1])

    def logprobs(self, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            values, _, _ = self.trainer._get_per_token_logps_and_entropies(self.trainer.model, ids, mask, width)
        return values


def ours(name: str) -> str:
    """TRL's name of an adapter weight as ours."""
    return name.removeprefix("base_model.model.").replace(".default.", ".policy.")


@pytest.fixture
def peer(world, small_model_dir: Path, tmp_path: Path):
    """TRL's trainer with other settings, on the base and the adapter of `world`, given its completions and REWARDS."""
    import trl

    class OfflineTrainer(trl.GRPOTrainer):  # type: ignore[misc]
        def _send_telemetry(self) -> None:
            """Nothing of a test leaves this machine."""

    prompt_ids = [list(group.prompt.token_ids) for group in world.groups for _ in range(GROUP)]
    completion_ids = [list(completion.token_ids) for group in world.groups for completion in group.completions]

    def rollout(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def reward_from(column: str) -> Any:
        def reward(completions: Any, **columns: Any) -> list[float | None]:
            return list(columns[column])

        reward.__name__ = column
        return reward

    def build(*parts: Sequence[Sequence[float | None]], **settings: Any) -> Peer:
        tables = {f"part{k}": part for k, part in enumerate(parts or (REWARDS,))}
        rows = [
            {"prompt": group.prompt.messages[0]["content"], **{name: table[n][g] for name, table in tables.items()}}
            for n, group in enumerate(world.groups)
            for g in range(GROUP)
        ]
        common: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "disable_dropout": True}
        common |= {"per_device_train_batch_size": 4 * GROUP, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
        common |= {"num_generations": GROUP, "max_completion_length": LIMIT, "gradient_checkpointing": False}
        trainer = OfflineTrainer(
            model=AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32),
            reward_funcs=[reward_from(name) for name in tables],
            args=trl.GRPOConfig(**{**common, "scale_rewards": "none", **settings}),
            train_dataset=Dataset.from_list([{"prompt": "unused"}] * 12),
            processing_class=AutoTokenizer.from_pretrained(small_model_dir),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            rollout_func=rollout,
        )
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as its loop does before a step
        trainer.model.train()
        weights = world.model.adapter_parameters("policy")
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[ours(name)])
        return Peer(trainer, rows)

    return build


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm() / expected.norm()) < TOLERANCE


def assert_same_gradient(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert_close(*(torch.cat([gradient[name].flatten() for name in sorted(expected)]) for gradient in (actual, expected)))


# ---- advantages


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_agree(world, peer, scale):
    config = world.config(**{"advantage.scale": scale, "advantage.baseline": "mean", "advantage.clip": None})
    expected = peer(scale_rewards=scale).inputs()["advantages"]
    assert_close(world.batch(config).advantages.flatten(), expected)
    assert expected.abs().max() > 0.3


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_agree_where_completions_are_not_scored(world, peer, scale):
    rewards = [[0.1, None, 0.4], [None, None, None], *REWARDS[2:]]
    config = world.config(**{"advantage.scale": scale, "advantage.baseline": "mean", "advantage.clip": None})
    assert_close(world.batch(config, rewards).advantages.flatten(), peer(rewards, scale_rewards=scale).inputs()["advantages"])


def test_the_batch_scale_differs_by_what_its_std_is_taken_of(world, peer):
    # TRL: of the raw rewards, between-prompt differences included; here of the centred ones
    config = world.config(**{"advantage.scale": "batch", "advantage.baseline": "mean", "advantage.clip": None})
    rewards = torch.tensor(REWARDS)
    centred = rewards - rewards.mean(-1, keepdim=True)
    theirs = peer(scale_rewards="batch").inputs()["advantages"].view(4, GROUP)
    mine = world.batch(config).advantages
    assert_close(theirs, centred / (rewards.std() + 1e-4))
    assert_close(mine, centred / (centred.std() + 1e-4))
    # so the two agree up to one factor for the whole batch
    assert_close(mine * (centred.std() + 1e-4) / (rewards.std() + 1e-4), theirs)


def test_gdpo_agrees_with_normalising_each_reward_first(world, peer):
    second = [[5.0, 5.0, 9.0], [0.0, 30.0, 10.0], [7.0, 7.0, 7.0], [-4.0, 2.0, 0.0]]
    theirs = peer(REWARDS, second, multi_objective_aggregation="normalize_then_sum", reward_weights=[1.0, 0.25])
    config = world.config(
        **{"advantage.aggregation": "gdpo", "advantage.baseline": "mean", "advantage.scale": "batch", "advantage.clip": None}
    )
    scores = StackScores(REWARDS, {"first": REWARDS, "second": second})
    mine = step_advantages(scores, torch.ones(4, GROUP, dtype=torch.long), {"first": 1.0, "second": 0.25}, config)
    assert_close(mine.flatten(), theirs.inputs()["advantages"])


# ---- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_policy_and_reference_agree(world, peer, temperature):
    config = world.config(temperature=temperature)
    batch, theirs = world.batch(config), peer(beta=0.04, temperature=temperature)
    inputs = theirs.inputs()
    mask = batch.completion_mask.flatten(0, 1)
    assert torch.equal(inputs["completion_mask"].bool(), mask)
    assert torch.equal(inputs["completion_ids"], batch.completion_ids.flatten(0, 1))
    policy = role_logprobs(world.model, batch, "policy", temperature=temperature).flatten(0, 1)
    reference = batch.ref_logprobs.flatten(0, 1)
    assert_close(policy[mask], theirs.logprobs(inputs)[mask])
    assert_close(reference[mask], inputs["ref_per_token_logps"][mask])
    assert (policy - reference)[mask].abs().max() > 0.1


# ---- losses and gradients


def off_policy(world: Any, batch: PolicyBatch) -> PolicyBatch:
    """Old log-probabilities up to 1 nat away: ratios from 0.37 to 2.7, many of them beyond the clip."""
    now = role_logprobs(world.model, batch, "policy", temperature=1.0)
    noise = torch.rand(now.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return replace(batch, old_logprobs=torch.where(batch.completion_mask, now + noise, 0.0))


def compare(world: Any, theirs: Peer, config: Any, batch: PolicyBatch) -> tuple[Peer, dict[str, float]]:
    """Assert that loss and every gradient agree; what both measured."""
    inputs = theirs.inputs() | {"advantages": batch.advantages.flatten()}
    if batch.old_logprobs is not None:
        inputs["old_per_token_logps"] = batch.old_logprobs.flatten(0, 1)
    loss, expected = theirs.loss(inputs)
    gradient, sums = world.gradient(config, batch)
    assert_same_gradient(gradient, expected)
    assert sums["loss"] == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE * 0.1)
    return theirs, sums


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_first_pass_agrees(world, peer, aggregation, kl):
    args, settings = KLS[kl]
    config = world.config(batch_size=4, **settings, **{"loss.aggregation": aggregation, "kl.ref_target": None})
    theirs, sums = compare(world, peer(loss_type=aggregation, **args), config, world.batch(config))
    assert theirs.metric("clip_ratio/region_mean") == sums["clipped_low"] == sums["clipped_high"] == 0.0
    assert theirs.metric("entropy") == pytest.approx(sums["entropy_sum"] / sums["tokens"], rel=TOLERANCE)
    if kl != "no KL":
        assert theirs.metric("kl") == pytest.approx(sums["kl_sum"] / sums["tokens"], rel=TOLERANCE)
        assert sums["kl_sum"] > 0


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_clipped_off_policy_pass_agrees(world, peer, aggregation, kl):
    args, settings = KLS[kl]
    clip = {"loss.clip_low": 0.2, "loss.clip_high": 0.28}
    config = world.config(batch_size=4, **settings, **clip, **{"loss.aggregation": aggregation, "kl.ref_target": None})
    theirs = peer(loss_type=aggregation, epsilon=0.2, epsilon_high=0.28, **args)
    theirs, sums = compare(world, theirs, config, off_policy(world, world.batch(config)))
    for side in ("low", "high"):
        share = sums[f"clipped_{side}"] / sums["tokens"]
        assert theirs.metric(f"clip_ratio/{side}_mean") == pytest.approx(share, rel=TOLERANCE)
        assert share > 0.02
    if kl == "ratio_k3":
        assert theirs.metric("kl") == pytest.approx(sums["kl_sum"] / sums["tokens"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        # the sequence ratio
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"loss.type": "gspo", "loss.aggregation": "grpo"}),
        ({"loss_type": "sapo"}, {"loss.type": "sapo", "loss.aggregation": "grpo"}),
        # TRL limits cispo's weight from above only, at epsilon_high itself
        (
            {"loss_type": "cispo", "epsilon_high": 1.5},
            {"loss.type": "cispo", "loss.aggregation": "dapo", "loss.clip_high": 0.5, "loss.clip_low": 0.99},
        ),
        ({"loss_type": "dr_grpo", "delta": 1.4}, {"loss.dual_clip": 1.4}),
    ],
    ids=["gspo", "sapo", "cispo", "two-sided clip"],
)
def test_the_other_losses_agree_off_policy(world, peer, args, settings):
    config = world.config(batch_size=4, **settings, **KLS["no KL"][1])
    compare(world, peer(beta=0.0, **args), config, off_policy(world, world.batch(config)))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_accumulated_micro_batches_agree(world, peer, aggregation):
    config = world.config(batch_size=2, **{"loss.aggregation": aggregation, "kl.ref_target": None, "kl.beta": 0.04})
    settings = {"per_device_train_batch_size": 2 * GROUP, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    theirs = peer(loss_type=aggregation, beta=0.04, use_bias_correction_kl=True, **settings)
    batch = off_policy(world, world.batch(config))
    inputs = theirs.inputs() | {"advantages": batch.advantages.flatten(), "old_per_token_logps": batch.old_logprobs.flatten(0, 1)}
    expected: dict[str, Tensor] = {}
    for rows in (slice(0, 2 * GROUP), slice(2 * GROUP, None)):
        _, piece = theirs.loss({name: value[rows] if getattr(value, "ndim", 0) else value for name, value in inputs.items()})
        expected = {name: value + expected.get(name, 0) for name, value in piece.items()}
    assert_same_gradient(world.gradient(config, batch)[0], expected)

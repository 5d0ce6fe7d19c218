"""`gemma-grpo export`: one of a run's adapters as a PEFT folder, merged weights, GGUF or an Ollama folder.

Nothing is called done before it was read again from the disk, held against the policy and found to differ from the base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gemma_grpo.access import checkpoint_folder
from gemma_grpo.config import GRPOConfig, load_recipe
from gemma_grpo.data.sources import DataError
from gemma_grpo.export import gguf
from gemma_grpo.export.likelihoods import Distance, Likelihoods, Sequences, distance, likelihoods, why_not
from gemma_grpo.export.ollama import write_modelfile
from gemma_grpo.export.staging import RECORD, ExportError, check_free, check_room, staged
from gemma_grpo.grpo.playing import Player
from gemma_grpo.grpo.resuming import BASE
from gemma_grpo.grpo.step import sampling_params
from gemma_grpo.model.adapters import CONFIG, WEIGHTS
from gemma_grpo.model.gemma import REFERENCE, Gemma
from gemma_grpo.model.loading import stored_bytes
from gemma_grpo.model.memory import release
from gemma_grpo.model.merging import STORED_AS, Delta, Merged, merge, read_deltas
from gemma_grpo.monitor.card import CARD, model_card, named
from gemma_grpo.monitor.choices import FINAL, Choice, chosen
from gemma_grpo.rollout.local import LocalEngine

Kind = Literal["adapter", "merged", "gguf", "ollama"]
KINDS: tuple[Kind, ...] = ("adapter", "merged", "gguf", "ollama")
STORED = "stored"
SAMPLE_STEP = -5
"""Sampling counter of the replies that are compared: neither training nor any measurement draws the same numbers."""
PROMPTS, REPLY_TOKENS = 16, 64
"""So many replies of at most so many tokens are compared."""


@dataclass(frozen=True)
class Exported:
    """What was written, and what was found when it was read again."""

    kind: Kind
    path: Path
    moved: Distance
    """From the base to the policy: what training did."""
    apart: Distance
    """From the policy to the export."""
    merged: Merged | None
    notes: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        """As JSON values."""
        found: dict[str, Any] = {"kind": self.kind, "policy_from_base": asdict(self.moved), "export_from_policy": asdict(self.apart)}
        if self.merged is not None:
            found["merged"] = {"changed": self.merged.changed, "numbers": self.merged.numbers, "kept": self.merged.kept}
        return {**found, "notes": list(self.notes)}


@dataclass(frozen=True)
class _Order:
    run: Path
    to: Kind
    target: Path
    choice: Choice
    dtype: str
    config: GRPOConfig
    """Of the run, with the base and the number format that the comparison uses."""
    base: Path
    """The base's folder."""
    deltas: Mapping[str, Delta]
    converter: Path | None


@dataclass(frozen=True)
class _Measured:
    """What the trained policy said, before anything was written."""

    sequences: Sequences
    policy: Likelihoods
    moved: Distance
    exact: bool
    """Whether the policy computes in float32."""
    divisor: float | None
    """Of a base rescaled for float16."""
    notes: tuple[str, ...]


def export(
    run: str | Path,
    to: Kind,
    *,
    output: str | Path | None = None,
    checkpoint: str = FINAL,
    dtype: str = STORED,
    base: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write one of the run's adapters as `to` into the folder `output`, RUN/export/TO where none is named.

    `dtype` is what merged weights are stored as: "stored", as the base's, "bf16" or "fp32". `base` says where the base lies now.
    Raises ValueError for what cannot be exported (no such adapter, one that adds nothing, a base that is not the run's, a folder in the
    way), AccessError when the base cannot be had, ExportError when what was written is not the policy.
    """
    order = _order(Path(run), to, output, checkpoint, dtype, base)
    check_free(order.target, overwrite=overwrite)
    if to != "adapter":
        check_room(order.target, _bytes_needed(order))
    progress(f"loading {order.config.model_name} with {order.choice.name}, {order.choice.about}")
    measured = _measure(order)
    release(torch.device("cpu"))
    with staged(order.target) as folder:
        progress(f"writing {to}")
        merged = _write(order, folder)
        progress("reading it again")
        apart = _hold_against(order, measured, folder)
        notes = (*measured.notes, *_finish(order, folder))
        exported = Exported(to, order.target, measured.moved, apart, merged, notes)
        _describe(order, folder, exported)
    return exported


def _order(run: Path, to: Kind, output: str | Path | None, checkpoint: str, dtype: str, base: str | None) -> _Order:
    """Everything that can be refused before a model is loaded."""
    if to not in KINDS:
        raise ValueError(f"{to!r} is no kind of export; there are {', '.join(KINDS)}. Try merged.")
    if dtype not in (STORED, *STORED_AS):
        raise ValueError(f"the dtype is {dtype!r}; merged weights are stored as {', '.join((STORED, *STORED_AS))}. Try bf16.")
    if to == "adapter" and dtype != STORED:
        raise ValueError("--dtype is of merged weights; an adapter is exported as it was trained. Leave it out.")
    if base is not None and not (run / BASE).is_file():
        raise ValueError(f"{run} has no {BASE}, so it cannot be told whether {base} is the base it trained on. Leave --base out.")
    choice = chosen(run, checkpoint)
    deltas = read_deltas(choice.folder)
    converter = gguf.converter() if to == "gguf" else None
    config = load_recipe(run / "recipe.yaml")
    told = {"model_name": base or config.model_name, "quantization": "none"}
    told |= {"precision": "fp32"} if dtype == "fp32" else {}  # narrower sums could not tell float32 from less
    folder = checkpoint_folder(told["model_name"])
    target = run / "export" / to if output is None else Path(output)
    return _Order(run, to, target, choice, dtype, config.model_copy(update=told), folder, deltas, converter)


def _bytes_needed(order: _Order) -> int:
    copies = 2 if order.to == "gguf" else 1
    return copies * stored_bytes(order.base, STORED_AS.get(order.dtype))


def _measure(order: _Order) -> _Measured:
    player = Player.open(order.run, order.choice.name, config=order.config)
    sequences, told = _replies(player)
    policy, base = (likelihoods(player.model, role, sequences) for role in ("policy", REFERENCE))
    moved = distance(policy, base)
    if not moved.mean:
        raise ValueError(
            f"{order.choice.folder} changes no log-probability of {moved.tokens} tokens. Train it, or choose a later checkpoint."
        )
    exact = player.model.dtype == torch.float32
    return _Measured(sequences, policy, moved, exact, player.model.divisor, (told, *_notes(order)))


def _replies(player: Player) -> tuple[Sequences, str]:
    """Replies of the policy to held-out prompts, and what to say of them."""
    try:
        prompts, told = player.prompts()[:PROMPTS], "held-out prompts"
    except DataError as error:
        prompts, told = [], f"a greeting, since the run's prompts cannot be had ({error})"
    if not prompts:
        prompts = [player.fitted([{"role": "user", "content": "Hello. What can you do?"}])[0]]
    params = replace(sampling_params(player.config, SAMPLE_STEP, num_generations=1), max_completion_length=REPLY_TOKENS)
    groups = LocalEngine(player.model).sample(prompts, params)
    sequences = [(group.prompt.token_ids, group.completions[0].token_ids) for group in groups]
    return sequences, f"compared on {len(sequences)} replies to {told}"


def _notes(order: _Order) -> list[str]:
    if load_recipe(order.run / "recipe.yaml").quantization == "none" or order.to == "adapter":
        return []
    return [
        "the run trained on a 4-bit base; the merged model has the original weights, so its replies differ from those that were evaluated. "
        "Evaluate what you deploy."
    ]


def _write(order: _Order, folder: Path) -> Merged | None:
    if order.to != "adapter":
        return merge(order.base, order.deltas, folder, dtype=STORED_AS.get(order.dtype))
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(order.choice.folder / name, folder / name)
    return None


def _hold_against(order: _Order, measured: _Measured, folder: Path) -> Distance:
    """Load what was written and compare it. Raises ExportError where it is not the policy."""
    adapter, config = order.to == "adapter", order.config
    model = Gemma.load(config.model_name if adapter else str(folder), lora=config.lora, precision=config.precision)
    model.fit_precision([], divisor=measured.divisor)
    if adapter:
        model.load_adapter("policy", folder)
    apart = distance(measured.policy, likelihoods(model, "policy" if adapter else REFERENCE, measured.sequences))
    exact = measured.exact and (adapter or stored_bytes(folder, None) == stored_bytes(folder, torch.float32))
    if why := why_not(apart, measured.moved, exact=exact):
        remedy = "Merge with --dtype fp32, or export the adapter." if not adapter and not exact else "Report this with the run's recipe."
        raise ExportError(f"the {order.to} export of {order.run} is not the trained model: {why}. Nothing was kept of it. {remedy}")
    return apart


def _finish(order: _Order, folder: Path) -> list[str]:
    """What is made of merged weights that are known to be right."""
    notes = gguf.convert(order.converter, folder) if order.converter else []
    if order.to in ("gguf", "ollama"):
        write_modelfile(folder, order.config, f"./{gguf.FILE}" if order.converter else ".")
    return notes


def _describe(order: _Order, folder: Path, exported: Exported) -> None:
    record = {"checkpoint": order.choice.name, "base": named(order.config.model_name), **exported.record}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(order.run, order.to, record), encoding="utf-8", newline="\n")

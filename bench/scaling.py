"""docs/scaling.md on paper: `python -m bench.scaling` counts a step's work on 1 to 64 GPUs from the same terms as `train --profile`.

A step of 16 prompts x 8 completions of hh-rlhf's own lengths (bench/lengths.json) is shared out as a run shares it (distributed.shares).
Each rank's passes take the time of their operations or of the bytes they read, whichever is longer, at the card's data sheet times an
efficiency that is assumed; the slowest rank holds the others up at every exchange; a gradient goes around a ring. Nothing here was timed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.document import WrittenPart
from bench.lengths import read_lengths
from gemma_grpo.cards import GIB, Card, named_card
from gemma_grpo.config.schema import GRPOConfig
from gemma_grpo.distributed import shares
from gemma_grpo.planner import plan_run
from gemma_grpo.profile.work import Arithmetic, Lengths, Work
from gemma_grpo.shapes import ModelShape, known_shapes

TABLE = WrittenPart(
    Path(__file__).resolve().parents[1] / "docs" / "scaling.md",
    begin="<!-- tables, written by python -m bench.scaling -->\n",
    end="<!-- tables: end -->\n",
)
GPUS = (1, 2, 4, 8, 16, 32, 64)
MODELS = ("google/gemma-3-4b-it", "google/gemma-3-12b-it", "google/gemma-3-27b-it")
CONFIG = GRPOConfig()


@dataclass(frozen=True)
class Machine:
    """A card and the network between cards, per second, from their data sheets; and the shares of it that are reached."""

    name: str
    operations: float
    bytes: float
    network: float
    efficiency: float = 0.4
    """Of the operations; of memory's and the network's bytes twice that."""

    def seconds(self, passes: Sequence[Work]) -> float:
        """Of one rank."""
        rates = self.efficiency * self.operations, 2 * self.efficiency * self.bytes
        return sum(max(work.operations / rates[0], work.bytes / rates[1]) for work in passes)


H100 = Machine("H100", operations=989e12, bytes=3.35e12, network=50e9)


def groups_of(count: int, seed: int = 0) -> list[Lengths]:
    """As many groups, with lengths drawn from the real ones and cut at the limits of a run."""
    draw, lengths = random.Random(seed), read_lengths()
    return [
        Lengths(
            min(draw.choice(lengths["prompts"]), CONFIG.max_prompt_length),
            tuple(min(draw.choice(lengths["replies"]), CONFIG.max_completion_length) for _ in range(CONFIG.num_generations)),
        )
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Step:
    """What a step on so many ranks takes."""

    seconds: float
    idle: float
    """Share of it that ranks wait for the slowest, on average."""
    sent: int
    """Bytes that each rank sends for gradients."""


def step(shape: ModelShape, groups: Sequence[Lengths], ranks: int, machine: Machine = H100) -> Step:
    """Rollout, a judge's pass, the reference's, and the planning passes, each of which ends when its slowest rank does."""
    arithmetic = Arithmetic(shape, CONFIG.lora, number_bytes=2)
    by_prompt = [[groups[n] for n in own] for own in shares([1.0] * len(groups), ranks)]
    by_tokens = [[groups[n] for n in own] for own in shares([float(group.tokens) for group in groups], ranks)]
    phases = [[machine.seconds(arithmetic.rollout(own)) for own in by_prompt]]
    phases += 2 * [[machine.seconds([arithmetic.forward(own, adapter=True)]) for own in by_tokens]]
    update = [machine.seconds(arithmetic.update(own, recomputed=CONFIG.gradient_checkpointing)) for own in by_tokens]
    phases += CONFIG.planning_steps * [update]
    gradient = 4 * shape.lora_parameters(CONFIG.lora)
    sent = int(CONFIG.planning_steps * 2 * (ranks - 1) / ranks * gradient)
    working, busy = sum(max(phase) for phase in phases), sum(sum(phase) / ranks for phase in phases)
    total = working + sent / (2 * machine.efficiency * machine.network)
    return Step(total, 1 - busy / total, sent)


TITLES = {
    "The same step (16 prompts) on more GPUs": False,
    "A step that grows with them (16 prompts for each GPU)": True,
}
"""Table -> whether its step grows."""


def tables() -> str:
    """A row for each number of GPUs: the same step on more of them, and steps that grow with them."""
    lines, names = list[str](), [name.rpartition("/")[2] for name in MODELS]
    for title, grows in TITLES.items():
        lines += [f"### {title}", "", f"| GPUs | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        for ranks in GPUS:
            prompts = CONFIG.prompts_per_step * (ranks if grows else 1)
            if ranks <= prompts:
                lines.append(f"| {ranks} | " + " | ".join(_cell(known_shapes()[name], prompts, ranks, grows) for name in MODELS) + " |")
        lines.append("")
    return "\n".join([*lines, *memory_table(names), ""])


def memory_table(names: Sequence[str]) -> list[str]:
    """What the plan says of ranks on a card of 24 GB: the peak, and what each pass over the base brings where it is shared out."""
    card = named_card("l4")
    lines = [f"### What each rank holds, on cards as an {card.name} ({card.usable_bytes / GIB:.0f} GiB)", ""]
    lines += [f"| GPUs | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    return lines + [f"| {ranks} | " + " | ".join(_held(name, ranks, card) for name in MODELS) + " |" for ranks in GPUS[:4]]


def _held(name: str, ranks: int, card: Card) -> str:
    shape = known_shapes()[name]
    plan = plan_run(GRPOConfig(model_name=name, gpus=ranks), shape, card)
    peak = f"{plan.peak.total / GIB:.1f} GiB" if plan.fits else f"does not fit ({plan.peak.total / GIB:.0f} GiB)"
    if not plan.sharding.active:
        return peak
    received, link = gathered(shape, ranks), 2 * H100.efficiency * H100.network
    return f"{peak}; shared out, {received / 1e9:.0f} GB a pass ({received / link:.1f} s)"


def gathered(shape: ModelShape, ranks: int) -> int:
    """Bytes of bfloat16 that a rank receives in each pass over a base that is shared out: the others' parts of all layers."""
    layers = shape.weight_bytes(2) - 2 * shape.embedding_parameters
    return round(layers * (ranks - 1) / ranks)


def _cell(shape: ModelShape, prompts: int, ranks: int, grows: bool) -> str:
    now, alone = step(shape, groups_of(prompts), ranks), step(shape, groups_of(CONFIG.prompts_per_step if grows else prompts), 1)
    times = alone.seconds / now.seconds * (ranks if grows else 1)
    return f"{now.seconds:.2f} s, x {times:.1f}; idle {now.idle:.0%}; {now.sent / 1e6:.1f} MB"


def main() -> None:
    """Print the tables and write them to the document."""
    print(tables())
    TABLE.write(tables())


if __name__ == "__main__":
    main()

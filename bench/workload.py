"""What is run: how long every prompt and completion is, the same on both sides. Imports neither side's packages.

Completions run to given lengths: a logits processor forbids the stop tokens until the last token, and then allows the stop token alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.lengths import read_lengths

EOS, END_OF_TURN = 1, 106
BOS_TEXT = "<bos>"
LETTERS = "abcdefghijklmnopqrstuvwxyz "
WORKLOADS = {
    "a": "every completion runs to 128 tokens",
    "b": "completions as long as hh-rlhf's replies, at most 256 tokens",
    "c": "prompts as long as hh-rlhf's around the 99th percentile, completions as in b",
}
LIMITS = {"a": 128, "b": 256, "c": 256}
"""max_completion_length."""
MAX_PROMPT = {"a": 512, "b": 512, "c": 640}
"""max_prompt_length; longer prompts of hh-rlhf are drawn as if they had been shortened to it."""
LONG = (0.985, 0.995)


@dataclass(frozen=True)
class StepLengths:
    """One step's token counts: a number per prompt, and per completion, group after group. A stop token is counted."""

    prompts: tuple[int, ...]
    completions: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """Everything both sides are told. Sizes in tokens; `batch_size` in prompts per micro-batch, as in GRPOConfig."""

    model: str
    workload: str
    num_prompts: int
    num_generations: int
    batch_size: int
    max_prompt_length: int
    max_completion_length: int
    planning_steps: int = 2
    lora_r: int = 8
    lora_alpha: int = 16
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    beta: float = 0.05
    learning_rate: float = 1e-5
    temperature: float = 1.0
    gradient_checkpointing: bool = True
    precision: str = "fp32"
    threads: int = 1
    seed: int = 0

    @property
    def accumulation(self) -> int:
        """Micro-batches per update."""
        return self.num_prompts // self.batch_size

    @classmethod
    def of(cls, values: dict[str, Any]) -> Setting:
        """From what `asdict` gave, as it comes back from JSON."""
        return cls(**{**values, "target_modules": tuple(values["target_modules"])})

    def to_dict(self) -> dict[str, Any]:
        """For a message or a report."""
        return asdict(self)


def draw_steps(setting: Setting, count: int) -> list[StepLengths]:
    """The lengths of so many steps. One seed draws the same ones whatever the count."""
    lengths = read_lengths()
    prompts, replies = lengths["prompts"], lengths["replies"]
    if setting.workload == "c":
        prompts = prompts[round(LONG[0] * len(prompts)) : round(LONG[1] * len(prompts))]
    generator = random.Random(f"{setting.workload} {setting.seed}")
    return [_draw_step(setting, prompts, replies, generator) for _ in range(count)]


def _draw_step(setting: Setting, prompts: Sequence[int], replies: Sequence[int], generator: random.Random) -> StepLengths:
    limit, num_completions = setting.max_completion_length, setting.num_prompts * setting.num_generations
    drawn = tuple(min(generator.choice(prompts), setting.max_prompt_length) for _ in range(setting.num_prompts))
    if setting.workload == "a":
        return StepLengths(drawn, (limit,) * num_completions)
    return StepLengths(drawn, tuple(min(generator.choice(replies), limit) for _ in range(num_completions)))


def prompt_text(length: int, seed: str) -> str:
    """A text of so many tokens of the filler tokenizer (bench/random_checkpoint.py): <bos>, and a letter is a token."""
    generator = random.Random(seed)
    return BOS_TEXT + "".join(generator.choice(LETTERS) for _ in range(length - 1))


def prompt_texts(steps: Sequence[StepLengths]) -> list[list[str]]:
    """The prompts of each step."""
    return [[prompt_text(length, f"{index} {n}") for n, length in enumerate(step.prompts)] for index, step in enumerate(steps)]


def varied_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs between completions: a fraction that the text's length and letters decide."""
    texts = [item if isinstance(item, str) else item[0]["content"] for item in completions]
    return [(len(text) + sum(map(ord, text[:16]))) % 97 / 97 for text in texts]


def force_lengths(logits: Tensor, positions: Tensor, lengths: Tensor, limit: int) -> Tensor:
    """Logits [B V], in place, such that each row ends with its length: no stop token before its last position, only one there.

    A row as long as `limit` is cut by the limit, not by a stop token. Rows beyond their end are left as they are.
    """
    ending = (positions == lengths - 1) & (lengths < limit)  # (B,)
    # no look at a value: on a GPU that would wait for it at every token
    logits.masked_fill_(ending[:, None], float("-inf"))
    logits[:, EOS] = float("-inf")
    logits[:, END_OF_TURN] = torch.where(ending, 0.0, float("-inf"))
    return logits

"""The in-process engine: samples with the very weights that are trained, each prompt computed once for all of its completions.

A finished completion leaves the batch and a waiting one takes its place. Owns which completions are sampled at a time: as many as the
keys and values that may be held allow, and the same completions whatever that is. One step of them all is running.py's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.data.chat import STOP_IDS, reply_text
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import explaining_exhaustion
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.running import LogitsProcessor, RunningRows, filled_from_the_end
from gemma_grpo.rollout.sampling import row_keys
from gemma_grpo.room import Room
from gemma_grpo.types import Completion, Prompt, RolloutGroup


@dataclass(frozen=True)
class Pace:
    """How often a rollout looks at what it has drawn. The completions do not depend on it."""

    check_every: int
    """Tokens drawn between two looks: on a GPU each look waits for the device."""
    length_step: int
    """Own tokens read by a step are rounded up to a multiple of this: steps of one extent share a CUDA graph."""
    thin_out_at: float
    """Finished rows are taken out when at most this share of the rows still runs, or when a waiting completion could take their place:
    every new number of rows is a new graph."""


EVERY_TOKEN = Pace(check_every=1, length_step=1, thin_out_at=1.0)
IN_BURSTS = Pace(check_every=16, length_step=64, thin_out_at=0.5)


def default_pace(model: Gemma) -> Pace:
    """What suits the model's device."""
    return IN_BURSTS if model.device.type == "cuda" else EVERY_TOKEN


class LocalEngine:
    """Samples in eval mode, in the dtype and with the adapter of training: |sampling - training log-prob| is rounding alone.

    At most `kv_tokens` tokens of keys and values are held at a time, None for no limit: a prompt needs room for the longest one and
    max_completion_length for each of its completions. One completion is sampled however much it needs. `processor` changes the
    logits that are sampled from.
    """

    def __init__(
        self,
        model: Gemma,
        kv_tokens: int | None = None,
        *,
        stop_ids: Sequence[int] = STOP_IDS,
        processor: LogitsProcessor | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.model, self.kv_tokens, self.stop_ids, self.processor = model, kv_tokens, tuple(stop_ids), processor
        self.pace = pace or default_pace(model)

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        """One group of params.num_generations completions per prompt, in order."""
        if not prompts:
            return []
        width = max(len(prompt.token_ids) for prompt in prompts)
        room = Room.of(len(prompts), width, params.num_generations, params.max_completion_length, self.kv_tokens)
        with self.model.role(params.role), explaining_exhaustion(_too_many(room, self.model.device)):
            completions = _Rollout(self, prompts, params, room).sampled()
        size = params.num_generations
        return [RolloutGroup(prompt, tuple(completions[n * size : (n + 1) * size]), params.step) for n, prompt in enumerate(prompts)]


class _Rollout:
    """Completions waiting, running and done; completion g of prompt n is number n * G + g."""

    def __init__(self, engine: LocalEngine, prompts: Sequence[Prompt], params: SamplingParams, room: Room) -> None:
        self.engine, self.prompts, self.size, self.room = engine, prompts, params.num_generations, room
        self.keys = row_keys(params.seed, params.step, [prompt.prompt_id for prompt in prompts], self.size)
        self.waiting = deque(range(len(self.keys)))
        self.running = RunningRows(engine.model, room, params, engine.stop_ids, engine.processor)
        self.slots: list[int] = []
        """Prompt in each of the cache's slots."""
        self.done: dict[int, Completion] = {}

    def sampled(self) -> list[Completion]:
        """All completions, by number."""
        pace = self.engine.pace
        while self.waiting or self.running.numbers:
            self._admit()
            self._collect()
            if self.running.numbers:
                self.running.advance(pace.check_every, pace.length_step)
                self._collect()
        return [self.done[number] for number in range(len(self.prompts) * self.size)]

    def _admit(self) -> None:
        """Waiting completions into free rows, their prompts computed once: whole groups, unless there is never room for one."""
        new_prompts: list[int] = []
        new: list[int] = []
        while self.waiting:
            prompt, free = self.waiting[0] // self.size, self.room.rows - len(self.running.numbers) - len(new)
            if prompt not in self.slots and prompt not in new_prompts:
                no_slot = len(self.slots) + len(new_prompts) == self.room.prompts
                if no_slot or free < min(self.size, self.room.rows):
                    break
                new_prompts.append(prompt)
            if free == 0:
                break
            new.append(self.waiting.popleft())
        for some in self._in_passes(new_prompts):
            self.slots += some
            self.running.prefill(_prompts_alone([self.prompts[prompt] for prompt in some]))
        if new:
            self.running.start(new, [self.slots.index(number // self.size) for number in new], self.keys[new])

    def _in_passes(self, prompts: Sequence[int]) -> Iterator[Sequence[int]]:
        """As many prompts at a time as the model's token budget allows."""
        tokens = self.engine.model.budget.tokens
        size = max(1, len(prompts) if tokens is None else tokens // self.room.width)
        return (prompts[start : start + size] for start in range(0, len(prompts), size))

    def _collect(self) -> None:
        """Finished completions out of the batch, and prompts that nobody reads any more."""
        running = self.running
        for number, tokens, logprobs in running.finished():
            finish = "stop" if tokens[-1] in self.engine.stop_ids else "length"
            text = reply_text(self.engine.model.tokenizer, tokens)
            self.done[number] = Completion(text, tuple(tokens), tuple(logprobs), finish)  # type: ignore[arg-type]
        left = sum(running.alive)
        few = left <= self.engine.pace.thin_out_at * len(running.alive)
        if left == len(running.alive) or not (few or self._could_admit(left)):
            return
        running.thin_out()
        needed = {number // self.size for number in (*running.numbers, *list(self.waiting)[:1])}
        kept = filled_from_the_end([prompt in needed for prompt in self.slots])
        running.keep_prompts(kept)
        self.slots = [self.slots[slot] for slot in kept]

    def _could_admit(self, left: int) -> bool:
        """Whether the next waiting completion could start if only the `left` rows were there that still run."""
        if not self.waiting:
            return False
        prompt, running = self.waiting[0] // self.size, self.running
        read = {number // self.size for number, alive in zip(running.numbers, running.alive, strict=True) if alive}
        new_fits = self.room.rows - left >= min(self.size, self.room.rows) and len(read) < self.room.prompts
        return prompt in self.slots or new_fits


def _too_many(room: Room, device: torch.device) -> str:
    return (
        f"out of memory on {device} while sampling: {room.prompts} prompts and {room.rows} completions hold up to "
        f"{room.tokens} tokens of keys and values. Set memory.kv_token_budget={room.tokens // 2}, or lower "
        "num_generations or max_completion_length."
    )


def _prompts_alone(prompts: Sequence[Prompt]) -> GroupBatch:
    return pad_groups([prompt.token_ids for prompt in prompts], [[()] for _ in prompts])

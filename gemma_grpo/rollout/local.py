"""The in-process engine: samples with the very weights that are trained, prompt by prompt prefilled once for its whole group.

Owns how many keys and values are held at a time: a rollout that would hold more is sampled in parts, with the same completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemma_grpo.data.batch import GroupBatch, pad_groups, pad_sequences
from gemma_grpo.data.chat import STOP_IDS, reply_text
from gemma_grpo.model.attention import DecodeLayout, GroupLayout
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import explaining_exhaustion
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.sampling import draw, row_keys, sampling_logprobs, uniforms
from gemma_grpo.types import Completion, Prompt, RolloutGroup

LogitsProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [B V] float32, completions [B], positions [B]) -> logits: changes what is sampled, before the temperature.

`completions` are numbered through the whole rollout, n * G + g; `positions` are the completion positions now drawn."""


class LocalEngine:
    """Samples in eval mode, in the dtype and with the adapter of training: |sampling - training log-prob| is rounding alone.

    At most `kv_tokens` tokens of keys and values are held at a time, None for no limit: a prompt needs its padded length and
    max_completion_length for each of its completions. One completion is sampled however much it needs.
    """

    def __init__(
        self, model: Gemma, kv_tokens: int | None = None, *, stop_ids: Sequence[int] = STOP_IDS, processor: LogitsProcessor | None = None
    ) -> None:
        self.model, self.kv_tokens, self.processor = model, kv_tokens, processor
        self.stop_ids = torch.tensor(stop_ids)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        """One group of params.num_generations completions per prompt, in order."""
        if not prompts:
            return []
        completions: dict[int, Completion] = {}
        room, size = _with_room_for_replies(prompts, params), params.num_generations
        # what fits as a whole is not cut for the sake of its padding: a part is decoded to its end before the next begins
        fits = self.kv_tokens is None or room.num_padded_tokens <= self.kv_tokens
        with self.model.role(params.role):
            for slot in room.slots(None if fits else self.kv_tokens):
                with explaining_exhaustion(_too_many(room.piece(slot), self.model.device)):
                    numbers = torch.arange(len(prompts) * size).view(len(prompts), size)[slot.places(torch.device("cpu"))]
                    found = self._decoded([prompts[n] for n in slot.rows], numbers, params)
                    completions.update(zip(numbers.flatten().tolist(), found, strict=True))
        rows = [tuple(completions[n * size + g] for g in range(size)) for n in range(len(prompts))]
        return [RolloutGroup(prompt, row, params.step) for prompt, row in zip(prompts, rows, strict=True)]

    def _decoded(self, prompts: Sequence[Prompt], numbers: Int[Tensor, "N G"], params: SamplingParams) -> list[Completion]:
        """These completions of the prompts. Keys and values live no longer than this call."""
        rows = zip(*(values.tolist() for values in self._decode(prompts, numbers, params)), strict=True)
        return [self._completion(tokens[:length], logprobs[:length]) for tokens, logprobs, length in rows]

    def _decode(
        self, prompts: Sequence[Prompt], numbers: Int[Tensor, "N G"], params: SamplingParams
    ) -> tuple[Int[Tensor, "B C"], Float[Tensor, "B C"], Int[Tensor, " B"]]:
        """Tokens, their log-probabilities and how many of each row count."""
        device = self.model.device
        prefill = GroupLayout(_prompts_alone(prompts).to(device), keep_prompt_kv=True)
        keys = row_keys(params.seed, params.step, [prompt.prompt_id for prompt in prompts], params.num_generations).to(device)
        # a completion is drawn by its own index, whichever part it is in
        keys = keys.view(len(prompts), -1).gather(1, numbers.to(device) % params.num_generations).flatten()
        numbers = numbers.flatten().to(device)
        group = len(keys) // len(prompts)
        last = self.model.hidden_states(prefill)[prefill.last_prompt_index]
        hidden = last.repeat_interleave(group, 0)  # (B, D): a group shares its prompt's last hidden state
        decode = DecodeLayout(prefill, group, params.max_completion_length)
        tokens = torch.zeros((len(keys), params.max_completion_length), dtype=torch.long, device=device)
        logprobs = torch.zeros(tokens.shape, device=device)
        lengths = torch.full((len(keys),), params.max_completion_length, device=device)
        running = torch.ones(len(keys), dtype=torch.bool, device=device)
        for position in range(params.max_completion_length):
            token, logprob = self._next(hidden, keys, numbers, position, params)
            tokens[:, position], logprobs[:, position] = token, logprob
            stopped = running & torch.isin(token, self.stop_ids.to(device))
            lengths[stopped] = position + 1
            running &= ~stopped
            if not running.any() or position + 1 == params.max_completion_length:
                break
            hidden = self.model.hidden_states(decode, input_ids=token[:, None], position_ids=decode.next_positions())
            decode.advance()
        return tokens, logprobs, lengths

    def _next(
        self, hidden: Float[Tensor, "B D"], keys: Int[Tensor, " B"], numbers: Int[Tensor, " B"], position: int, params: SamplingParams
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
        logits = self.model.logits(hidden)
        if self.processor is not None:
            logits = self.processor(logits, numbers, torch.full_like(numbers, position))
        distribution = sampling_logprobs(logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
        if not torch.isfinite(distribution.amax(-1)).all():
            raise FloatingPointError(
                f"the {params.role}'s logits are not finite at completion position {position}: its weights have diverged."
            )
        token = draw(distribution, uniforms(keys, position))
        return token, distribution.gather(-1, token[:, None])[:, 0]

    def _completion(self, token_ids: list[int], logprobs: list[float]) -> Completion:
        finish = "stop" if token_ids[-1] in self.stop_ids.tolist() else "length"
        return Completion(reply_text(self.model.tokenizer, token_ids), tuple(token_ids), tuple(logprobs), finish)  # type: ignore[arg-type]


def _too_many(room: GroupBatch, device: torch.device) -> str:
    num_prompts, group, _ = room.completion_ids.shape
    return (
        f"out of memory on {device} while sampling: {num_prompts} prompts with {group} completions each hold up to "
        f"{room.num_padded_tokens} tokens of keys and values. Set memory.kv_token_budget={room.num_padded_tokens // 2}, or lower "
        "num_generations or max_completion_length."
    )


def _with_room_for_replies(prompts: Sequence[Prompt], params: SamplingParams) -> GroupBatch:
    """The tokens whose keys and values are held when every completion is as long as it may be."""
    room = torch.ones((len(prompts), params.num_generations, params.max_completion_length), dtype=torch.bool)
    return GroupBatch(*pad_sequences([prompt.token_ids for prompt in prompts]), room.long(), room)


def _prompts_alone(prompts: Sequence[Prompt]) -> GroupBatch:
    return pad_groups([prompt.token_ids for prompt in prompts], [[()] for _ in prompts])

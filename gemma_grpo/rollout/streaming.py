"""One reply to one prompt, token by token: what the engine would sample, handed over as it is drawn.

Owns when a single reply ends and that whoever reads it may stop at any token. How a token is drawn is running.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gemma_grpo.data.batch import pad_groups
from gemma_grpo.data.chat import STOP_IDS
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import explaining_exhaustion
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import default_pace
from gemma_grpo.rollout.running import RunningRows
from gemma_grpo.rollout.sampling import row_keys
from gemma_grpo.room import Room
from gemma_grpo.types import Prompt


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """A token and its log-probability, in nats, under the distribution it was drawn from."""

    token_id: int
    logprob: float


@torch.inference_mode()
def stream(model: Gemma, prompt: Prompt, params: SamplingParams, *, stop_ids: Sequence[int] = STOP_IDS) -> Iterator[DrawnToken]:
    """The tokens of the prompt's first completion, stop token included: those of `LocalEngine.sample` with the same params.

    No role is held between two tokens: whoever reads them may use the model meanwhile, or leave the rest undrawn.
    Raises FloatingPointError where the logits are not finite, DoesNotFitError where memory runs out.
    """
    with explaining_exhaustion(_too_long(prompt, params, model.device)):
        rows = _first_drawn(model, prompt, params, stop_ids)
    length_step = default_pace(model).length_step
    for place in range(params.max_completion_length):
        if place:
            with explaining_exhaustion(_too_long(prompt, params, model.device)):
                rows.advance(1, length_step)
        ((_, token_id, logprob),) = rows.latest()
        yield DrawnToken(token_id, logprob)
        if token_id in stop_ids:
            return


def _first_drawn(model: Gemma, prompt: Prompt, params: SamplingParams, stop_ids: Sequence[int]) -> RunningRows:
    """One row, its first token drawn. The decoder inside keeps the weights of the role it was made under."""
    with model.role(params.role):
        rows = RunningRows(model, Room(1, len(prompt.token_ids), 1, params.max_completion_length), params, stop_ids, None)
        rows.prefill(pad_groups([prompt.token_ids], [[()]]))
        rows.start([0], [0], row_keys(params.seed, params.step, [prompt.prompt_id], 1))
    return rows


def _too_long(prompt: Prompt, params: SamplingParams, device: torch.device) -> str:
    tokens = len(prompt.token_ids) + params.max_completion_length
    remedy = "Ask for fewer tokens, or begin a new conversation."
    return f"out of memory on {device} while answering: {tokens} tokens of keys and values. {remedy}"

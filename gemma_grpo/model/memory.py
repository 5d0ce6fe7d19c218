"""How much one pass may hold, and what happens when that was too much: cut smaller, repeat, remember.

Owns the number of tokens of a forward (and backward) pass, which errors mean that memory ran out, and giving memory back.
How a batch is cut is data/batch.py's; what a whole run needs is worked out before it starts (planner.py).
"""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from gemma_grpo import distributed
from gemma_grpo.data.batch import GroupBatch, Slot
from gemma_grpo.stopping import check, held

Batch = TypeVar("Batch", bound=GroupBatch)
Result = TypeVar("Result")

_ALLOCATOR_TEXTS = (
    *("can't allocate memory", "not enough memory", "std::bad_alloc"),
    *("CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
)
"""What torch's CPU allocator (Linux, then other systems), C++, the CUDA driver, cuBLAS and cuDNN say in a RuntimeError that has no class
of its own; cuBLAS that cannot start found no room for its workspace."""


class DoesNotFitError(RuntimeError):
    """Not even the smallest piece of a pass fits in memory: the run cannot go on with these settings."""


class TokenBudget:
    """Tokens, of prompts and completions, that one pass may hold; None: no limit. Halved whenever memory runs out, for good."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens
        self.halvings = 0
        """Times memory ran out so far, each followed by a repetition with half the tokens."""

    def run(
        self, batch: Batch, work: Callable[[Batch], Result], *, doing: str, whole_groups: bool = False
    ) -> Iterator[tuple[Slot, Result]]:
        """Do work on the batch piece by piece; yields each piece's place (Slot.put) and its result.

        A piece that runs out of memory is cut smaller and done again, so `work` must change nothing outside itself: what it
        found counts once it is yielded. Random draws of the attempt, dropout's, are taken back too. `doing` names the pass
        in errors; `whole_groups` keeps groups in one piece, where their losses need each other. Raises DoesNotFitError.

        Of several ranks each does its share: what comes of it is whole once distributed.sum_ has been over it.
        """
        with distributed.together(doing):
            yield from self._run(batch, work, doing, whole_groups)
        self._agree(doing)

    def _run(self, batch: Batch, work: Callable[[Batch], Result], doing: str, whole_groups: bool) -> Iterator[tuple[Slot, Result]]:
        device = batch.prompt_ids.device
        waiting = self._own_slots(batch, whole_groups)
        while waiting:
            check()
            piece, draws = batch.piece(waiting[0]), _random_states(device)
            try:
                with held() if distributed.is_sharded() else nullcontext():
                    result = work(piece)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                _drop_frames(error)
                if not _can_be_cut(piece, whole_groups) or distributed.is_sharded():  # others are in the middle of a gathering
                    raise DoesNotFitError(_too_large(piece, doing, device)) from error
            else:
                yield waiting.pop(0), result
                continue
            # only here, with the exception gone, does nothing hold the failed attempt's tensors any more
            gc.collect()
            release(device)
            _set_random_states(device, draws)
            self._halve(piece.num_tokens)
            waiting = [slot.inner(part) for slot in waiting for part in batch.piece(slot).slots(self.tokens, whole_groups=whole_groups)]

    def _own_slots(self, batch: Batch, whole_groups: bool) -> list[Slot]:
        """This rank's share of the groups, cut; all of them on one device."""
        if distributed.world() == 1:
            return batch.slots(self.tokens, whole_groups=whole_groups)
        tokens = batch.prompt_mask.sum(-1) + batch.completion_mask.sum((1, 2))
        rows = tuple(distributed.share(tokens.tolist()))
        own = Slot(rows, tuple(range(batch.completion_ids.shape[1])))
        return [own.inner(slot) for slot in batch.piece(own).slots(self.tokens, whole_groups=whole_groups)] if rows else []

    def _agree(self, doing: str) -> None:
        """Where memory ran out on one rank all cut smaller: what a checkpoint says of the budget is true of each."""
        if distributed.world() > 1:
            found = distributed.gather([self.tokens, self.halvings], doing)
            self.tokens = min((tokens for tokens, _ in found if tokens is not None), default=None)
            self.halvings = max(halvings for _, halvings in found)

    def _halve(self, failed: int) -> None:
        self.tokens = max(1, min(self.tokens or failed, failed) // 2)
        self.halvings += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps: a resumed run cuts as the uninterrupted one did."""
        learned = {} if self.tokens is None or not self.halvings else {"tokens": float(self.tokens)}
        return {"halvings": float(self.halvings), **learned}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave; a budget that was given smaller than the one then learned stays."""
        self.halvings = int(state["halvings"])
        if "tokens" in state:
            learned = int(state["tokens"])
            self.tokens = learned if self.tokens is None else min(self.tokens, learned)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation failed, on a GPU or in the machine's own memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATOR_TEXTS)


@contextmanager
def explaining_exhaustion(text: str) -> Iterator[None]:
    """Where no smaller piece can be tried: running out of memory inside becomes a DoesNotFitError that says `text`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _drop_frames(error)
        raise DoesNotFitError(text) from error


def release(device: torch.device) -> None:
    """Give memory that torch, or on a CPU the C library, keeps for later back, so that the next phase can have it in other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed blocks below 32 MiB: after a backward pass of many tokens more than the model itself (measured)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _can_be_cut(piece: GroupBatch, whole_groups: bool) -> bool:
    num_prompts, group = piece.completion_ids.shape[:2]
    return num_prompts > 1 or (group > 1 and not whole_groups)


def _too_large(piece: GroupBatch, doing: str, device: torch.device) -> str:
    group, length = piece.completion_ids.shape[1:]
    what = "one completion" if group == 1 else f"one group of {group} completions"
    if distributed.is_sharded():
        return (
            f"out of memory on {device} while {doing}: a pass of {piece.num_tokens} tokens does not fit, and with a base that ranks share "
            f"out it cannot be tried again in smaller pieces. Set memory.token_budget={max(1, piece.num_tokens // 2)}."
        )
    return (
        f"out of memory on {device} while {doing}: {what} of {length} tokens after a prompt of {piece.prompt_ids.shape[1]} does not fit, "
        "and no smaller piece can be cut. Lower max_completion_length or max_prompt_length, set gradient_checkpointing=true or "
        "quantization=nf4, or take a smaller model."
    )


def _drop_frames(error: BaseException) -> None:
    """Empty the frames of an exception and of those it was raised from: their locals are the failed pass's tensors."""
    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__


def _random_states(device: torch.device) -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)

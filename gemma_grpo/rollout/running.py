"""The completions being sampled: one more token of each, drawn from the model's own distribution, without waiting for the device.

Owns what is known of every running row on the device (tokens, log-probabilities, whether it has stopped) and, on a GPU, the graphs
that its steps are replayed from. Which completions run is local.py's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemma_grpo.data.batch import GroupBatch
from gemma_grpo.model.attention import GroupLayout
from gemma_grpo.model.decode import Decoder, decode_cache
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.kv_cache import Extent
from gemma_grpo.model.memory import is_out_of_memory
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.sampling import draw, filtered, uniforms
from gemma_grpo.room import Room
from gemma_grpo.stopping import check

LogitsProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [B V] float32, completions [B], positions [B]) -> logits: changes what is sampled, before the temperature.

`completions` are numbered through the whole rollout, n * G + g; `positions` are the completion positions now drawn. On a GPU it is
captured with the step: it must not look at a value, and tensors that it reads must stay where they are."""

EAGER_STEPS = 2
"""Steps of one extent before it is captured: the libraries choose their kernels in the first, and a short-lived extent is not worth it."""
MOST_GRAPHS = 32
"""Graphs kept: each holds some megabytes of a large model's launches, and an extent seldom comes back."""


class RunningRows:
    """Rows 0 to B-1 of buffers made for `room.rows`; `numbers` says which completion each is, `alive` whether it still runs."""

    def __init__(
        self, model: Gemma, room: Room, params: SamplingParams, stop_ids: Sequence[int], processor: LogitsProcessor | None
    ) -> None:
        self.model, self.room, self.params, self.processor = model, room, params, processor
        device = model.device
        self.cache = decode_cache(model, prompts=room.prompts, prompt_width=room.width, rows=room.rows, length=room.length)
        self.decoder = Decoder(model, room.width + room.length)
        self._stops, self._stop_ids = frozenset(stop_ids), torch.tensor(stop_ids, device=device)
        self.numbers: list[int] = []
        self.alive: list[bool] = []
        self._last_hidden = model.head_weight.new_zeros((room.prompts, model.head_weight.shape[1]))
        self._number, self._keys, self._ids, self._drawn = (torch.zeros(room.rows, dtype=torch.long, device=device) for _ in range(4))
        self._stopped, self._broken = (torch.zeros(room.rows, dtype=torch.bool, device=device) for _ in range(2))
        # one column more: what a row draws between its last token and the next look goes there
        self._tokens = torch.zeros((room.rows, room.length + 1), dtype=torch.long, device=device)
        self._logprobs = torch.zeros(self._tokens.shape, device=device)
        # what waits for other ranks between layers cannot be captured
        self._graphs = StepGraphs() if device.type == "cuda" and not model.gathers_layers else None

    # ---- rows come

    def prefill(self, prompts: GroupBatch) -> None:
        """Compute prompts, once each, into the cache's next free slots."""
        first, prompts = self.cache.num_prompts, prompts.to(self.model.device)
        layout = GroupLayout(prompts, keep_prompt_kv=self.cache.prefilling(prompts.prompt_mask.sum(-1)))
        hidden = self.model.hidden_states(layout)[layout.last_prompt_index]
        self._last_hidden[first : first + len(hidden)] = hidden

    def start(self, numbers: Sequence[int], slots: Sequence[int], keys: Int[Tensor, " B"]) -> None:
        """New rows after the present ones, reading the prompts in these slots; each draws its first token."""
        rows = slice(len(self.numbers), len(self.numbers) + len(numbers))
        self.numbers += numbers
        self.alive += [True] * len(numbers)
        self.cache.add_rows(slots)
        self._number[rows] = torch.tensor(numbers, device=self._number.device)
        self._keys[rows] = keys.to(self._keys.device)
        self._drawn[rows], self._stopped[rows], self._broken[rows] = 0, False, False
        prompts = sorted(set(slots))  # a group shares its prompt's last hidden state, and the product with the head
        logits = self.model.logits(self._last_hidden[prompts])[[prompts.index(slot) for slot in slots]]
        self._draw(rows, logits)

    # ---- a step

    def advance(self, most: int, length_step: int) -> None:
        """Up to `most` tokens of every row, none once every row must have ended."""
        left = max(self.room.length - 1 - length for length, alive in zip(self.cache.host_lengths, self.alive, strict=True) if alive)
        for _ in range(min(most, left)):
            check()
            extent = self.cache.extent(length_step)
            if self._graphs is None:
                self._step(extent)
            else:
                self._graphs.make(self._step, extent)
            self.cache.advance()

    def _step(self, extent: Extent) -> None:
        """Device work alone, on buffers that stay where they are: what a graph can replay."""
        hidden = self.decoder.step(self._ids[: extent.rows], self.cache, extent)
        self._draw(slice(0, extent.rows), self.model.logits(hidden))

    def _draw(self, rows: slice, logits: Float[Tensor, "B V"]) -> None:
        params, place = self.params, self._drawn[rows].clamp(max=self.room.length)
        if self.processor is not None:
            logits = self.processor(logits, self._number[rows], place)
        if params.temperature != 1.0:
            logits = logits / params.temperature
        token, logprob = draw(filtered(logits, top_k=params.top_k, top_p=params.top_p), uniforms(self._keys[rows], place))
        self._tokens[rows].scatter_(1, place[:, None], token[:, None])
        self._logprobs[rows].scatter_(1, place[:, None], logprob[:, None])
        self._ids[rows] = token
        self._stopped[rows] |= (token[:, None] == self._stop_ids).any(-1)
        self._broken[rows] |= ~torch.isfinite(logprob)
        self._drawn[rows] += 1

    # ---- rows go

    def latest(self) -> list[tuple[int, int, float]]:
        """Number, token and log-probability of what each row has drawn last. Waits for the device, at every call.

        Raises FloatingPointError where a row's logits were not finite.
        """
        rows = range(len(self.numbers))
        drawn = [min(self.cache.host_lengths[row], self.room.length - 1) for row in rows]
        both = torch.stack([states[list(rows), drawn].double() for states in (self._tokens, self._logprobs)]).tolist()
        for row in rows:
            _check_finite(both[1][row : row + 1], self.params.role, drawn[row])
        return [(self.numbers[row], int(both[0][row]), both[1][row]) for row in rows]

    def finished(self) -> Iterator[tuple[int, list[int], list[float]]]:
        """Number, tokens and log-probabilities of each row that has ended since the last call.

        The one place that waits for the device: once to see who has ended, and once more for what they have drawn.

        Raises FloatingPointError where a running row's logits were not finite.
        """
        count = len(self.numbers)
        over = (self._stopped[:count] | self._broken[:count]).tolist()
        drawn = [min(length + 1, self.room.length) for length in self.cache.host_lengths]
        ended = [row for row in range(count) if self.alive[row] and (over[row] or drawn[row] == self.room.length)]
        if not ended:
            return
        longest = max(drawn[row] for row in ended)
        # float64 holds every token number and every float32
        both = torch.stack([states[ended, :longest].double() for states in (self._tokens, self._logprobs)]).tolist()
        for row, numbers, logprobs in zip(ended, *both, strict=True):
            tokens = [int(number) for number in numbers[: drawn[row]]]
            # what was drawn after the first stop, before the row was looked at, is nothing
            end = next((place + 1 for place, token in enumerate(tokens) if token in self._stops), drawn[row])
            _check_finite(logprobs[:end], self.params.role)
            self.alive[row] = False
            yield self.numbers[row], tokens[:end], logprobs[:end]

    def thin_out(self) -> None:
        """Take out the rows that have ended; others move into their places."""
        kept = filled_from_the_end(self.alive)
        self.cache.keep_rows(kept)
        order = torch.tensor(kept, dtype=torch.long, device=self._ids.device)
        for buffer in (self._number, self._keys, self._ids, self._drawn, self._stopped, self._broken, self._tokens, self._logprobs):
            buffer[: len(kept)] = buffer[order]
        self.numbers = [self.numbers[row] for row in kept]
        self.alive = [True] * len(kept)

    def keep_prompts(self, kept: Sequence[int]) -> None:
        """Prompt slot i is now the former slot kept[i]; the others are free."""
        self.cache.keep_prompts(kept)
        self._last_hidden[: len(kept)] = self._last_hidden[list(kept)]


class StepGraphs:
    """One CUDA graph per extent: a step is then one launch instead of some thousand.

    Does not hold the step: whose method it is would hold its graphs in turn, and with them its keys and values until a collection.
    """

    def __init__(self) -> None:
        self._eager: dict[Extent, int] = {}
        self._graphs: dict[Extent, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # graphs never run at once: they share what they need between products
        self._refused = False

    def make(self, step: Callable[[Extent], None], extent: Extent) -> None:
        """The step, replayed or not."""
        if extent not in self._graphs and not self._refused:
            self._eager[extent] = self._eager.get(extent, 0) + 1
            if self._eager[extent] > EAGER_STEPS:
                self._capture(step, extent)
        if extent in self._graphs:
            self._graphs[extent].replay()
        else:
            step(extent)

    def _capture(self, step: Callable[[Extent], None], extent: Extent) -> None:
        """Nothing is computed in a capture: where it is refused, the step can be made without."""
        if len(self._graphs) == MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step(extent)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._refused = True
            warnings.warn(f"this rollout goes without CUDA graphs, slower, because one could not be captured: {error}", stacklevel=2)
            return
        self._graphs[extent] = graph


def filled_from_the_end(wanted: Sequence[bool]) -> list[int]:
    """Who stands where when the unwanted are gone: places kept are kept, holes filled by those behind.

    [True, False, True, True] -> [0, 3, 2]
    """
    count = sum(wanted)
    movers = iter([place for place in range(len(wanted) - 1, -1, -1) if wanted[place] and place >= count])
    return [place if wanted[place] else next(movers) for place in range(count)]


def _check_finite(logprobs: Sequence[float], role: str, first: int = 0) -> None:
    """`first` is the completion position of the first of them."""
    broken = next((place for place, logprob in enumerate(logprobs, first) if not math.isfinite(logprob)), None)
    if broken is not None:
        raise FloatingPointError(f"the {role}'s logits are not finite at completion position {broken}: its weights have diverged.")

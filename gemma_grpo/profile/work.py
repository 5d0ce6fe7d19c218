"""What a phase of a step cannot do without: operations and bytes, counted from the tokens that were really there.

Pure arithmetic on a shape and on lengths; no clock, no tensors. A multiplication and an addition are two operations. Left out, so that
the floor stays one: everything done element by element, activations written and read, tokens of a padding, and passes thrown away.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.shapes import ModelShape

_IN_ORDER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers of a decoder layer in the order in which a token passes them."""


@dataclass(frozen=True, slots=True)
class Work:
    """One pass over the model, or one step of decoding: its time is at least that of the larger of both."""

    operations: int
    bytes: int
    """Read from memory, each once."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A prompt and its completions, in tokens."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """What the linear layers see: the prompt once, the completions beside it."""
        return self.prompt + sum(self.completions)


def attended(start: int, count: int, window: int | None) -> int:
    """Pairs of query and key of `count` tokens from position `start` on: each sees min(position + 1, window) keys, itself included.

    Sum over positions, in closed form: start + 1, start + 2, ... up to the window, then the window each.
    """
    rising = count if window is None else min(count, max(0, window - start))
    return rising * start + rising * (rising + 1) // 2 + (count - rising) * (window or 0)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Counts for one model: its shape, its adapters, and how its numbers are held."""

    shape: ModelShape
    lora: LoraSettings
    number_bytes: int
    """Of one number of the base's dtype: keys, values, embedding, and linear layers unless nf4."""
    nf4: bool = False

    # ---- passes

    def forward(self, groups: Sequence[Lengths], *, adapter: bool, head_rows: int = 0) -> Work:
        """Hidden states of all tokens, and logits of `head_rows` of them: 2 operations for each weight and token, and the attention.

        Bytes: each weight once.
        """
        tokens = sum(group.tokens for group in groups)
        operations = 2 * tokens * self._linear(adapter) + self._attention(groups) + self._head(head_rows)
        return Work(operations, self._weight_bytes(adapter=adapter, head=head_rows > 0))

    def update(self, groups: Sequence[Lengths], *, recomputed: bool) -> list[Work]:
        """One planning pass: forward and backward, the head on completion tokens.

        Backward, the base frozen: gradients of activations alone, as much as its forward pass, down to the first adapter; those of the
        adapter's weights besides; twice the attention (gradients of weights and values, then of queries and keys). `recomputed`
        (gradient checkpointing) adds the layers' forward pass. The head: its logits, and their gradient multiplied back once.
        """
        rows, tokens = sum(sum(group.completions) for group in groups), sum(group.tokens for group in groups)
        forward = self.forward(groups, adapter=True, head_rows=rows)
        layers = forward.operations - self._head(rows)
        gradients = 2 * tokens * self._gradient_linear() + 2 * self._attention(groups) + self._head(rows)
        return [forward, Work(gradients + (layers if recomputed else 0), forward.bytes)]

    def rollout(self, groups: Sequence[Lengths]) -> list[Work]:
        """Prefill of the prompts, each once for its group, with the head on its last token; then one step of decoding after the other.

        All rows together: cut in parts by memory.kv_token_budget, the weights are read more often than here.
        """
        prompts = [Lengths(group.prompt, ()) for group in groups]
        return [self.forward(prompts, adapter=True, head_rows=len(groups)), *self._decode(groups)]

    def _decode(self, groups: Sequence[Lengths]) -> Iterator[Work]:
        """Completion position by completion position from 1 (position 0 is drawn after the prefill), for completions that reach it.

        Bytes: each weight, a prompt's keys and values once for its group, and each row's own; windowed layers read their window.
        """
        shape = self.shape
        weights, per_token = self._weight_bytes(adapter=True, head=True), shape.kv_bytes_per_token_per_layer(self.number_bytes)
        ordered = [(group.prompt, sorted(group.completions)) for group in groups]
        for position in range(1, max((max(group.completions, default=0) for group in groups), default=0)):
            all_rows = keys = pairs = 0
            for prompt, lengths in ordered:
                rows = len(lengths) - bisect_right(lengths, position)
                if not rows:
                    continue
                all_rows += rows
                for layers, window in self._kinds():
                    last = prompt + position
                    own = min(position, window or position)
                    seen = min(last, window or last)
                    pairs += layers * rows * seen
                    keys += layers * (seen - own + rows * own)
            operations = 2 * all_rows * self._linear(True) + self._head(all_rows) + 4 * shape.query_width * pairs
            yield Work(operations, weights + keys * per_token)

    # ---- their parts

    def _kinds(self) -> tuple[tuple[int, int | None], tuple[int, None]]:
        """Number of layers, and how far they see, of both kinds."""
        return (self.shape.num_sliding_layers, self.shape.sliding_window), (self.shape.num_global_layers, None)

    def _linear(self, adapter: bool) -> int:
        return self.shape.linear_parameters + (self.shape.lora_parameters(self.lora) if adapter else 0)

    def _gradient_linear(self) -> int:
        """Weights multiplied backward, once for activations and an adapter's once more for itself.

        Below the first adapter nothing takes a gradient: not the first layer's input, nor what comes before its first adapted module.
        """
        sizes, adapted = self.shape.linear_sizes, set(self.lora.target_modules)
        first = next(place for place, names in enumerate(_IN_ORDER) if adapted & set(names))
        base = sum(inputs * outputs for name in sum(_IN_ORDER[: first + 1], ()) for inputs, outputs in [sizes[name]])
        inputs = sum(sizes[name][0] for name in adapted & set(_IN_ORDER[first])) * self.lora.r
        return self.shape.linear_parameters - base + 2 * self.shape.lora_parameters(self.lora) - inputs

    def _attention(self, groups: Sequence[Lengths]) -> int:
        """Scores and weighted values: 2 operations each for every pair of query and key and every number of the query heads."""
        pairs = 0
        for group in groups:
            for layers, window in self._kinds():
                completions = sum(attended(group.prompt, length, window) for length in group.completions)
                pairs += layers * (attended(0, group.prompt, window) + completions)
        return 4 * self.shape.query_width * pairs

    def _head(self, rows: int) -> int:
        return 2 * rows * self.shape.embedding_parameters

    def _weight_bytes(self, *, adapter: bool, head: bool) -> int:
        """float16 keeps its gains in float32 too, some 0.01 % that are left out."""
        shape = self.shape
        weights = shape.weight_bytes(self.number_bytes, nf4=self.nf4) - (0 if head else shape.embedding_parameters * self.number_bytes)
        return weights + (4 * shape.lora_parameters(self.lora) if adapter else 0)

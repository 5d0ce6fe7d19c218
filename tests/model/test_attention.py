"""The grouped forward against the plain one: transformers' own eager attention over each prompt and completion by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.model.attention import ATTENTION_NAME, GroupLayout
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.grouped import within_window
from gemma_grpo.model.logprobs import completion_logprobs

THREE_LAYERS = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 28,  # not the head's width, as in the 27b: the default scale would be wrong
}
PROMPTS = [[2, 150, 151, 152, 153, 154, 155, 156, 157, 158, 159, 160], [2, 170]]
COMPLETIONS = [[[210, 211, 212, 213, 214, 215, 216, 217, 218, 106], [220, 106]], [[106], [230, 231, 232, 233, 106]]]
"""Against a window of 8 or 4: a prompt that is longer, a completion that crosses it, and short ones of both."""


@dataclass(frozen=True)
class Measured:
    """What a forward pass gave, completion by completion, and what it gave back to the adapter."""

    logprobs: list[Tensor]
    entropy: list[Tensor]
    gradient: dict[str, Tensor]

    def difference(self, other: Measured) -> float:
        """Largest difference of any number, relative where it is above 1."""
        pairs = zip([*self.logprobs, *self.entropy], [*other.logprobs, *other.entropy], strict=True)
        return max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) if a.numel() else 0.0 for a, b in pairs)

    def gradient_difference(self, other: Measured) -> float:
        """Norm of the difference over the norm, all weights together."""
        mine, yours = (torch.cat([g.flatten() for g in m.gradient.values()]) for m in (self, other))
        return float((mine - yours).norm() / yours.norm().clamp(min=1e-12))


def weights_of(length: int, seed: int) -> Tensor:
    """Arbitrary numbers that make log-probabilities a loss: every token counts differently."""
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


def backward(model: Gemma, logprobs: list[Tensor], entropy: list[Tensor]) -> dict[str, Tensor]:
    loss = torch.zeros(())
    for row, (values, entropies) in enumerate(zip(logprobs, entropy, strict=True)):
        loss = loss + (weights_of(len(values), row) * values + 0.3 * weights_of(len(values), row + 100) * entropies).sum()
    parameters = model.adapter_parameters("policy")
    for parameter in parameters.values():
        parameter.grad = None
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def grouped(model: Gemma, batch: GroupBatch) -> Measured:
    with model.role("policy", train=True):
        logprobs, entropy = completion_logprobs(model, batch)
        rows = [
            [values.flatten(0, 1)[row][mask] for row, mask in enumerate(batch.completion_mask.flatten(0, 1))]
            for values in (logprobs, entropy)
        ]
        gradient = backward(model, *rows)
    assert logprobs.dtype == torch.float32
    return Measured(*([values.detach() for values in part] for part in rows), gradient)


@contextmanager
def eager_attention(model: Gemma) -> Iterator[None]:
    model.causal_lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.causal_lm.set_attn_implementation(ATTENTION_NAME)


def plain(model: Gemma, prompts: list[list[int]], completions: list[list[list[int]]]) -> Measured:
    """Each prompt and completion as one row of its own through transformers, dense log-softmax."""
    logprobs, entropy = [], []
    with model.role("policy", train=True), eager_attention(model):
        for prompt, group in zip(prompts, completions, strict=True):
            width = max(map(len, group))
            # zeros at the end of a row: a causal model cannot see them, so they need no mask
            rows = [[*prompt, *completion, *[0] * (width - len(completion))] for completion in group]
            logits = model.causal_lm(input_ids=torch.tensor(rows)).logits.float()
            for completion, row in zip(group, logits, strict=True):
                dense = row[len(prompt) - 1 : len(prompt) - 1 + len(completion)].log_softmax(-1)
                logprobs.append(dense.gather(-1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0])
                entropy.append(-(dense.exp() * dense).sum(-1))
        gradient = backward(model, logprobs, entropy)
    return Measured([values.detach() for values in logprobs], [values.detach() for values in entropy], gradient)


@pytest.fixture(scope="module")
def models(new_gemma: Callable[..., Gemma]) -> dict[int, Gemma]:
    """Three layers, by window."""
    return {window: new_gemma(sliding_window=window, **THREE_LAYERS) for window in (1, 4, 16)}


def test_without_a_layout_the_registered_attention_is_transformers_own(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma()
    ids = torch.tensor([[2, *range(120, 150)]])
    with torch.no_grad(), model.role("policy"):
        registered = model.causal_lm(input_ids=ids).logits
        with eager_attention(model):
            eager = model.causal_lm(input_ids=ids).logits
    assert torch.allclose(registered, eager, atol=1e-5)


def test_grouped_equals_plain_at_full_depth(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma()
    assert "full_attention" in model.config.layer_types
    mine, reference = grouped(model, pad_groups(PROMPTS, COMPLETIONS)), plain(model, PROMPTS, COMPLETIONS)
    assert mine.difference(reference) < 1e-5
    assert mine.gradient_difference(reference) < 1e-5


TOKEN = st.integers(107, 362)
GROUPS = st.integers(1, 16).flatmap(
    lambda size: st.lists(
        st.tuples(
            st.lists(TOKEN, max_size=11).map(lambda ids: [2, *ids]),
            st.lists(st.lists(TOKEN, max_size=9), min_size=size, max_size=size),
        ),
        min_size=1,
        max_size=2,
    )
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(groups=GROUPS, window=st.sampled_from([4, 4, 1, 16]))
def test_grouped_equals_plain_for_any_lengths_group_size_and_window(
    models: dict[int, Gemma], groups: list[tuple[list[int], list[list[int]]]], window: int
) -> None:
    prompts, completions = [prompt for prompt, _ in groups], [completion for _, completion in groups]
    mine = grouped(models[window], pad_groups(prompts, completions))
    if not any(map(len, mine.logprobs)):
        assert not any(gradient.any() for gradient in mine.gradient.values())
        return
    reference = plain(models[window], prompts, completions)
    assert mine.difference(reference) < 1e-5
    assert mine.gradient_difference(reference) < 1e-5


def test_grouped_equals_plain_in_bfloat16_as_far_as_bfloat16_goes(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma(dtype=torch.bfloat16, **THREE_LAYERS)
    mine, reference = grouped(model, pad_groups(PROMPTS, COMPLETIONS)), plain(model, PROMPTS, COMPLETIONS)
    assert mine.difference(reference) < 0.15
    assert mine.gradient_difference(reference) < 0.1


def test_gradient_checkpointing_changes_no_gradient(new_gemma: Callable[..., Gemma]) -> None:
    model, batch = new_gemma(**THREE_LAYERS), pad_groups(PROMPTS, COMPLETIONS)
    without = grouped(model, batch)
    model.enable_gradient_checkpointing()
    passes: list[int] = []
    model.causal_lm.model.layers[0].mlp.register_forward_hook(lambda *_: passes.append(1))
    with_it = grouped(model, batch)
    assert len(passes) == 2  # once forward, once more in the backward pass
    assert with_it.difference(without) == 0
    assert with_it.gradient_difference(without) < 1e-6


def padded(batch: GroupBatch, left: int, right: int, pad_id: int) -> GroupBatch:
    """The same groups with more padding on both sides of prompts and completions, made of other ids."""

    def wider(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return pad(ids.masked_fill(~mask, pad_id), (left, right), value=pad_id), pad(mask, (left, right), value=False)

    return GroupBatch(*wider(batch.prompt_ids, batch.prompt_mask), *wider(batch.completion_ids, batch.completion_mask))


@pytest.mark.parametrize(("left", "right", "pad_id"), [(0, 5, 0), (5, 0, 0), (3, 2, 0), (0, 0, 200), (2, 4, 106), (0, 3, 362)])
def test_padding_and_its_ids_change_nothing(models: dict[int, Gemma], left: int, right: int, pad_id: int) -> None:
    batch = pad_groups(PROMPTS, COMPLETIONS)
    before, after = grouped(models[4], batch), grouped(models[4], padded(batch, left, right, pad_id))
    assert after.difference(before) < 1e-6
    assert after.gradient_difference(before) < 1e-6


def test_neighbours_in_the_batch_change_nothing(models: dict[int, Gemma]) -> None:
    together = grouped(models[4], pad_groups(PROMPTS, COMPLETIONS))
    alone = [grouped(models[4], pad_groups([PROMPTS[n]], [[COMPLETIONS[n][g]]])) for n, g in ((0, 0), (0, 1), (1, 0), (1, 1))]
    joined = Measured([m.logprobs[0] for m in alone], [m.entropy[0] for m in alone], {})
    assert replace(together, gradient={}).difference(joined) < 1e-6


def test_permuting_groups_and_completions_permutes_the_result(models: dict[int, Gemma]) -> None:
    straight = grouped(models[4], pad_groups(PROMPTS, COMPLETIONS))
    turned = grouped(models[4], pad_groups(PROMPTS[::-1], [group[::-1] for group in COMPLETIONS[::-1]]))
    assert replace(straight, gradient={}).difference(Measured(turned.logprobs[::-1], turned.entropy[::-1], {})) < 1e-6


def test_a_prompt_is_computed_once_for_its_group(models: dict[int, Gemma]) -> None:
    seen: list[int] = []
    hook = models[4].causal_lm.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    with torch.no_grad(), models[4].role("policy"):
        completion_logprobs(models[4], pad_groups([PROMPTS[0]], [COMPLETIONS[0] * 4]))
    hook.remove()
    assert seen == [12 + 4 * (10 + 2)]


def test_the_window_counts_the_token_itself_and_looks_back_only() -> None:
    positions = torch.tensor([0, 1, 2, 3])
    assert within_window(positions, positions, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert within_window(positions, positions, None).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    # the completion's positions go on from the prompt's last one
    assert within_window(torch.tensor([4, 5]), positions, 3).int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]


def test_a_packed_row_holds_real_tokens_only_and_each_completion_starts_after_its_prompt() -> None:
    layout = GroupLayout(pad_groups([[2, 11, 12], [2, 21]], [[[31, 106], [32]], [[41, 42, 106], []]]))
    assert layout.input_ids.tolist() == [[2, 11, 12, 2, 21, 31, 106, 32, 41, 42, 106]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 3, 4, 3, 2, 3, 4]]
    assert layout.last_prompt_index.tolist() == [2, 4]
    assert layout.completion_index[0, 0, :2].tolist() == [5, 6]
    assert layout.last_completion_index[0].tolist() == [6, 7]
    assert layout.last_completion_index[1, 0] == 10


def test_layouts_are_told_apart_from_what_is_none(models: dict[int, Gemma]) -> None:
    seen: list[Any] = []

    class Watcher(GroupLayout):
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            seen.append((layer, options["window"]))
            return super().attend(layer, query, key, value, **options)

    with torch.no_grad(), models[4].role("reference"):
        models[4].hidden_states(Watcher(pad_groups(PROMPTS, COMPLETIONS)))
    assert seen == [(0, 4), (1, None), (2, 4)]  # sliding, full, sliding

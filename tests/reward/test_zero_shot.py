"""One pass of the frozen base gives verdicts and the reference's log-probabilities: each as from a pass of its own, and only if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemma_grpo.data.batch import pad_rollouts
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.memory import TokenBudget
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.types import Completion, Prompt, RolloutGroup

TEMPERATURE = 0.7
LENGTHS = [(5, [3, 6, 1]), (17, [5, 2, 4]), (9, [6, 6, 2]), (2, [1, 4, 5])]
"""Prompt and completion lengths; the sliding window is 8, and the question has more tokens than that."""


@pytest.fixture(scope="module")
def model(new_gemma: Callable[..., Gemma]) -> Gemma:
    return new_gemma(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])


@pytest.fixture(autouse=True)
def _unlimited_again(model: Gemma) -> Iterator[None]:
    yield
    model.budget = TokenBudget(None)


def rollout(lengths: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> list[RolloutGroup]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(108, 363, (count,), generator=generator).tolist())

    def prompt(n: int, length: int) -> Prompt:
        return Prompt(str(n), "test", ({"role": "user", "content": "x"},), (2, *tokens(length)), str(n))

    return [
        RolloutGroup(prompt(n, length), tuple(Completion("x", tokens(count), (-1.0,) * count, "length") for count in group), 0)
        for n, (length, group) in enumerate(lengths)
    ]


def separate(model: Gemma, groups: Sequence[RolloutGroup], temperature: float = TEMPERATURE) -> Tensor:
    """The reference's log-probabilities from a pass that ends with the completions."""
    with torch.no_grad(), model.role("reference"):
        return completion_logprobs(model, pad_rollouts(groups), temperature=temperature)[0]


def together(judge: ZeroShotJudge, groups: Sequence[RolloutGroup], temperature: float = TEMPERATURE) -> tuple[Any, Tensor | None]:
    with judge.keeping_logprobs(groups, temperature=temperature):
        return judge.score(groups), judge.kept_logprobs(groups, pad_rollouts(groups))


@contextmanager
def tokens_read(model: Gemma) -> Iterator[list[int]]:
    """Tokens of each forward pass, as they come into the embedding."""
    seen: list[int] = []
    hook = model.causal_lm.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("tokens", [None, 1, 60, 100, 300])
def test_both_are_what_two_passes_give(model: Gemma, tokens: int | None) -> None:
    judge, groups = ZeroShotJudge(model), rollout(LENGTHS)
    alone = torch.tensor(judge.score(groups))
    model.budget = TokenBudget(tokens)
    verdicts, logprobs = together(judge, groups)
    assert logprobs is not None
    assert (torch.tensor(verdicts) - alone).abs().max() < 1e-6 * max(1.0, float(alone.abs().max()))
    expected = separate(model, groups)
    assert (logprobs - expected).abs().max() < 1e-6 * max(1.0, float(expected.abs().max()))
    assert logprobs[~pad_rollouts(groups).completion_mask].count_nonzero() == 0


SIZES = st.integers(1, 4).flatmap(
    lambda group: st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 12), min_size=group, max_size=group)), min_size=1, max_size=4
    )
)


@given(SIZES, st.integers(0, 100), st.integers(1, 200), st.floats(0.5, 2.0))
def test_no_length_budget_or_temperature_makes_a_difference(
    model: Gemma, lengths: list[tuple[int, list[int]]], seed: int, tokens: int, temperature: float
) -> None:
    judge, groups = ZeroShotJudge(model), rollout(lengths, seed)
    model.budget = TokenBudget(tokens)
    logprobs = together(judge, groups, temperature)[1]
    expected = separate(model, groups, temperature)
    assert logprobs is not None
    assert (logprobs - expected).abs().max() < 2e-6 * max(1.0, float(expected.abs().max()))


def test_the_temperature_is_that_of_the_log_probabilities_and_verdicts_are_raw(model: Gemma) -> None:
    judge, groups = ZeroShotJudge(model), rollout(LENGTHS)
    (cold, first), (hot, second) = (together(judge, groups, temperature) for temperature in (0.5, 2.0))
    assert cold == hot == judge.score(groups)
    assert first is not None
    assert second is not None
    assert (first - second).abs().max() > 0.1
    assert torch.allclose(second, separate(model, groups, 2.0), atol=1e-5)


def test_every_token_is_read_once_for_both(model: Gemma) -> None:
    judge, groups = ZeroShotJudge(model), rollout(LENGTHS)
    with tokens_read(model) as seen:
        together(judge, groups)
    prompts, completions = (6 + 18 + 10 + 3), (10 + 11 + 14 + 10)
    assert seen == [prompts + completions + 12 * len(judge.judge.suffix)]


def test_what_was_not_asked_for_is_not_kept(model: Gemma) -> None:
    judge, groups = ZeroShotJudge(model), rollout(LENGTHS)
    batch = pad_rollouts(groups)
    judge.score(groups)
    assert judge.kept_logprobs(groups, batch) is None
    with judge.keeping_logprobs(groups, temperature=TEMPERATURE):
        assert judge.kept_logprobs(groups, batch) is None  # not scored yet
        judge.score(groups[:2])
        assert judge.kept_logprobs(groups, batch) is None  # not all of them
        assert judge.kept_logprobs(groups[:2], pad_rollouts(groups[:2])) is not None
        judge.score(groups[2:])
        found = judge.kept_logprobs(groups, batch)
        assert found is not None
        assert torch.allclose(found, separate(model, groups), atol=1e-5)
    assert judge.kept_logprobs(groups, batch) is None  # forgotten


def test_nothing_is_kept_when_what_was_begun_fails(model: Gemma) -> None:
    judge, groups = ZeroShotJudge(model), rollout(LENGTHS)

    def stopped() -> None:
        with judge.keeping_logprobs(groups, temperature=TEMPERATURE):
            judge.score(groups)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert judge.kept_logprobs(groups, pad_rollouts(groups)) is None


def test_completions_are_told_apart_by_their_tokens_and_their_prompts(model: Gemma) -> None:
    # the same reply to two prompts, and in another order and company than it was scored in
    first, second = rollout([(5, [3, 6]), (9, [4, 4])])
    groups = [first, replace(second, completions=(first.completions[0], second.completions[1]))]
    judge = ZeroShotJudge(model)
    with judge.keeping_logprobs(groups, temperature=TEMPERATURE):
        beside = rollout([(1, [7, 7])], seed=3)[0].completions[:1]
        joined = [replace(group, completions=(*group.completions[::-1], *beside)) for group in groups[::-1]]
        judge.score(joined)
        found = judge.kept_logprobs(groups, pad_rollouts(groups))
        assert judge.kept_logprobs(joined, pad_rollouts(joined)) is None  # nobody asked for the completion beside
    assert found is not None
    assert torch.allclose(found, separate(model, groups), atol=1e-5)


def test_memory_that_ends_in_the_middle_changes_neither(model: Gemma) -> None:
    judge, groups = ZeroShotJudge(model), rollout(LENGTHS)
    alone, calls = torch.tensor(judge.score(groups)), []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.causal_lm.model.layers[1].register_forward_pre_hook(fail)
    try:
        verdicts, logprobs = together(judge, groups)
    finally:
        hook.remove()
    assert model.budget.halvings == 2
    assert logprobs is not None
    assert torch.allclose(torch.tensor(verdicts), alone, atol=1e-5)
    assert torch.allclose(logprobs, separate(model, groups), atol=1e-5)


def test_it_runs_without_adapters_and_leaves_the_model_as_it_was(model: Gemma) -> None:
    judge, groups = ZeroShotJudge(model), rollout(LENGTHS)
    before = together(judge, groups)
    with model.role("policy", train=True):
        verdicts, logprobs = together(judge, groups)
        assert model.causal_lm.training
    assert verdicts == before[0]
    assert torch.equal(logprobs, before[1])  # type: ignore[arg-type]
    assert not logprobs.requires_grad  # type: ignore[union-attr]

"""A streamed reply is the engine's own, token by token, and whoever reads it may stop at any of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gemma_grpo.data.chat import STOP_IDS
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import DoesNotFitError
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.rollout.streaming import stream
from gemma_grpo.types import Prompt

PARAMS = SamplingParams(num_generations=1, max_completion_length=30, seed=3, step=5)
"""30 tokens of its own: the window of 8 is crossed by the prompt, by both together, and by the reply alone."""


@pytest.fixture(scope="module")
def model(new_gemma: Callable[..., Gemma]) -> Gemma:
    """Sliding, full, sliding, and <end_of_turn> likely enough that some replies stop and others are cut."""
    built = new_gemma(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    with torch.no_grad():
        built.causal_lm.get_input_embeddings().weight[106] *= 2.5
    return built


@pytest.fixture(scope="module")
def prompts(new_prompt: Callable[..., Prompt]) -> list[Prompt]:
    rows = [torch.randint(107, 363, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 7, 20)]
    return [new_prompt([2, *row], f"prompt {n}") for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"role": "reference"}, {"seed": 4}, {"step": -4}]
)
def test_a_stream_is_what_the_engine_samples_to_the_bit(model: Gemma, prompts: list[Prompt], changes: dict[str, object]) -> None:
    params = replace(PARAMS, **changes)
    lengths = set()
    for prompt, seed in itertools.product(prompts, range(3)):
        params = replace(params, seed=params.seed + seed)
        (group,) = LocalEngine(model).sample([prompt], params)
        (expected,) = group.completions
        tokens = list(stream(model, prompt, params))
        assert tuple(token.token_id for token in tokens) == expected.token_ids
        assert tuple(token.logprob for token in tokens) == expected.sampling_logprobs
        lengths.add(len(tokens))
    assert max(lengths) > 8  # past the window


def test_a_stop_token_ends_it_and_so_does_the_limit(model: Gemma, prompts: list[Prompt]) -> None:
    ends = set()
    for seed in range(24):
        tokens = [token.token_id for token in stream(model, prompts[0], replace(PARAMS, seed=seed, max_completion_length=8))]
        assert not set(tokens[:-1]) & set(STOP_IDS)
        ends.add((tokens[-1] in STOP_IDS, len(tokens) == 8))
    assert {(True, False), (False, True)} <= ends


def test_no_token_is_drawn_before_it_is_asked_for(model: Gemma, prompts: list[Prompt]) -> None:
    read: list[int] = []
    hook = model.causal_lm.model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    tokens = stream(model, prompts[2], replace(PARAMS, seed=4))
    for _ in range(4):
        next(tokens)
    hook.remove()
    assert read == [21, 1, 1, 1]


def test_a_stream_that_is_left_or_read_beside_others_leaves_the_model_as_it_was(model: Gemma, prompts: list[Prompt]) -> None:
    one, other = replace(PARAMS, seed=4), replace(PARAMS, seed=4, role="reference")
    alone = [list(stream(model, prompts[0], params)) for params in (one, other)]
    left = stream(model, prompts[0], one)
    next(left)
    left.close()
    with model.role("policy", train=True):
        both = [stream(model, prompts[0], params) for params in (one, other)]
        together = list(zip(*both, strict=False))
        assert model.causal_lm.training
        assert all(parameter.requires_grad for parameter in model.adapter_parameters("policy").values())
    assert [first for first, _ in together] == alone[0][: len(together)]
    assert [second for _, second in together] == alone[1][: len(together)]
    assert list(stream(model, prompts[0], one)) == alone[0]
    assert alone[0] != alone[1]


def test_weights_that_diverged_and_memory_that_ran_out_are_said(new_gemma: Callable[..., Gemma], prompts: list[Prompt]) -> None:
    model = new_gemma(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=False)
    read = set(prompts[0].token_ids)
    model.causal_lm.get_input_embeddings().weight.data[[token for token in range(363) if token not in read]] = torch.nan
    with pytest.raises(FloatingPointError, match="reference's logits are not finite at completion position 1"):
        list(stream(model, prompts[0], replace(PARAMS, role="reference", seed=1)))

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.causal_lm.model.register_forward_pre_hook(fail)
    with pytest.raises(DoesNotFitError, match=r"out of memory on cpu while answering: 34 tokens .* Ask for fewer tokens"):
        list(stream(model, prompts[0], PARAMS))
    hook.remove()

"""The local engine samples exactly what the model says, once per prompt, and the same whatever else is in the batch."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.data.batch import pad_groups, pad_rollouts, pad_values
from gemma_grpo.model.attention import ATTENTION_NAME, GroupLayout
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.kv_cache import DecodeCache
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.memory import DoesNotFitError
from gemma_grpo.rollout.engine import RolloutEngine, SamplingParams
from gemma_grpo.rollout.local import EVERY_TOKEN, IN_BURSTS, LocalEngine, Pace
from gemma_grpo.rollout.running import filled_from_the_end
from gemma_grpo.room import Room
from gemma_grpo.types import Prompt, RolloutGroup

STOP = 1
DRAWS = 20_000
PARAMS = SamplingParams(num_generations=4, max_completion_length=12, seed=3, step=5)


@pytest.fixture(scope="module")
def model(new_gemma: Callable[..., Gemma]) -> Gemma:
    """Sliding, full, sliding; a window of 8, and <end_of_turn> likely enough that replies stop at different lengths."""
    built = new_gemma(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    with torch.no_grad():
        built.causal_lm.get_input_embeddings().weight[106] *= 5
    return built


@pytest.fixture(scope="module")
def prompts(new_prompt: Callable[..., Prompt]) -> list[Prompt]:
    lengths = (3, 20, 7, 12)  # shorter and longer than the window
    rows = [torch.randint(107, 363, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    return [new_prompt([2, *row], f"prompt {n}") for n, row in enumerate(rows)]


def texts(groups: Sequence[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def plain_logprobs(model: Gemma, ids: Sequence[int], temperature: float) -> torch.Tensor:
    """Distribution of the next token after ids, by transformers' own eager attention."""
    model.causal_lm.set_attn_implementation("eager")
    try:
        with torch.no_grad(), model.role("policy"):
            return (model.causal_lm(input_ids=torch.tensor([list(ids)])).logits[0, -1].double() / temperature).log_softmax(-1)
    finally:
        model.causal_lm.set_attn_implementation(ATTENTION_NAME)


def exact_distribution(model: Gemma, prompt: Sequence[int], temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of at most two tokens."""
    first = plain_logprobs(model, prompt, temperature).exp()
    exact = {(STOP,): float(first[STOP])}
    for a in range(6):
        if a != STOP:
            second = plain_logprobs(model, [*prompt, a], temperature).exp()
            exact |= {(a, b): float(first[a] * second[b]) for b in range(6)}
    assert sum(exact.values()) == pytest.approx(1)
    return exact


def p_value(counts: dict[tuple[int, ...], int], exact: dict[tuple[int, ...], float]) -> float:
    """Of the chi-square test; continuations expected fewer than ten times are one cell."""
    assert set(counts) <= set(exact)
    observed, expected, rare = [], [], [0.0, 0.0]
    for sequence, probability in exact.items():
        if probability * DRAWS < 10:
            rare[0] += counts.get(sequence, 0)
            rare[1] += probability * DRAWS
        else:
            observed.append(counts.get(sequence, 0))
            expected.append(probability * DRAWS)
    if rare[1] > 0:
        observed.append(rare[0])
        expected.append(rare[1])
    return float(chisquare(observed, expected, sum_check=False).pvalue)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_twenty_thousand_draws_match_the_exact_distribution(
    six_words: Gemma, new_prompt: Callable[..., Prompt], temperature: float
) -> None:
    prompt = new_prompt([2, 3, 4, 5, 3, 4, 5])
    params = SamplingParams(num_generations=DRAWS // 4, max_completion_length=2, temperature=temperature, seed=11)
    counts: dict[tuple[int, ...], int] = {}
    for step in range(4):
        (group,) = LocalEngine(six_words, stop_ids=(STOP,)).sample([prompt], replace(params, step=step))
        for completion in group.completions:
            counts[completion.token_ids] = counts.get(completion.token_ids, 0) + 1
    assert sum(counts.values()) == DRAWS
    exact = exact_distribution(six_words, prompt.token_ids, temperature)
    assert 0.02 < exact[STOP,] < 0.5
    assert p_value(counts, exact) > 1e-3
    # the test can tell: neither the other temperature nor a uniform sampler would pass
    assert p_value(counts, exact_distribution(six_words, prompt.token_ids, 1.7 - temperature)) < 1e-9
    assert p_value(counts, dict.fromkeys(exact, 1 / len(exact))) < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_log_probabilities_are_the_trainers(model: Gemma, prompts: list[Prompt], temperature: float) -> None:
    params = replace(PARAMS, max_completion_length=24, temperature=temperature)
    groups = LocalEngine(model).sample(prompts, params)
    batch = pad_rollouts(groups)
    sampled = pad_values([[c.sampling_logprobs for c in group.completions] for group in groups], batch)
    assert max(len(c.token_ids) for group in groups for c in group.completions) == 24  # well over the window of 8
    for train in (False, True):
        with model.role("policy", train=train):
            trained = completion_logprobs(model, batch, temperature=temperature)[0].detach()
        assert (trained - sampled).abs().max() < 1e-5


def test_filters_are_part_of_the_sampling_log_probabilities(model: Gemma, prompts: list[Prompt]) -> None:
    groups = LocalEngine(model).sample(prompts[:1], replace(PARAMS, top_k=1))
    assert all(c.sampling_logprobs == (0.0,) * len(c.token_ids) for c in groups[0].completions)
    assert len(set(texts(groups)[0])) == 1
    greedy = list(prompts[0].token_ids)
    for token in texts(groups)[0][0]:
        assert token == int(plain_logprobs(model, greedy, 1.0).argmax())
        greedy.append(token)


def test_a_completion_is_the_same_alone_in_a_larger_batch_and_in_another_group_size(model: Gemma, prompts: list[Prompt]) -> None:
    engine = LocalEngine(model)
    together = texts(engine.sample(prompts, PARAMS))
    alone = [texts(engine.sample([prompt], PARAMS))[0] for prompt in prompts]
    assert alone == together
    assert texts(engine.sample(prompts[::-1], PARAMS))[::-1] == together
    assert [row[:2] for row in together] == texts(engine.sample(prompts, replace(PARAMS, num_generations=2)))
    larger = texts(engine.sample(prompts, replace(PARAMS, num_generations=7)))
    assert [row[:4] for row in larger] == together


def test_the_counters_decide_every_token(model: Gemma, prompts: list[Prompt]) -> None:
    engine = LocalEngine(model)
    first = texts(engine.sample(prompts, PARAMS))
    torch.manual_seed(99)
    assert texts(engine.sample(prompts, PARAMS)) == first
    assert texts(engine.sample(prompts, replace(PARAMS, seed=4))) != first
    assert texts(engine.sample(prompts, replace(PARAMS, step=6))) != first
    assert len({ids for row in first for ids in row}) == 16


def test_a_longer_limit_only_goes_on(model: Gemma, prompts: list[Prompt]) -> None:
    engine = LocalEngine(model)
    short, long = (texts(engine.sample(prompts, replace(PARAMS, max_completion_length=length))) for length in (5, 12))
    assert [[ids[:5] for ids in row] for row in long] == short


def test_finish_says_whether_the_reply_stopped_or_was_cut(model: Gemma, prompts: list[Prompt]) -> None:
    groups = LocalEngine(model).sample(prompts, replace(PARAMS, num_generations=16))
    completions = [completion for group in groups for completion in group.completions]
    assert {completion.finish for completion in completions} == {"stop", "length"}
    assert len({len(completion.token_ids) for completion in completions}) > 3
    for completion in completions:
        stops = [position for position, token in enumerate(completion.token_ids) if token in (1, 106)]
        if completion.finish == "stop":
            assert stops == [len(completion.token_ids) - 1]
            assert not completion.text.endswith(("<end_of_turn>", "<eos>"))
        else:
            assert stops == []
            assert len(completion.token_ids) == 12
        assert len(completion.sampling_logprobs) == len(completion.token_ids)


@pytest.mark.parametrize("stop", [1, 106])
def test_either_stop_token_ends_a_reply_even_at_the_limit(
    new_gemma: Callable[..., Gemma], new_prompt: Callable[..., Prompt], stop: int
) -> None:
    model = new_gemma(num_hidden_layers=1, layer_types=["full_attention"], tie_word_embeddings=False)
    prompt, head = new_prompt([2, 150]), model.causal_lm.lm_head.weight.data
    with torch.no_grad(), model.role("policy"):
        hidden = model.hidden_states(GroupLayout(pad_groups([prompt.token_ids], [[()]])))[-1]
    head.zero_()
    head[stop] = hidden / hidden.square().sum() * math.log(362)  # against 362 words with logit 0: as likely as all of them together
    (group,) = LocalEngine(model).sample([prompt], SamplingParams(64, 1, seed=1))
    finishes = [(completion.finish, completion.token_ids == (stop,)) for completion in group.completions]
    assert set(finishes) == {("stop", True), ("length", False)}
    assert 16 < finishes.count(("stop", True)) < 48
    assert all(c.text == "" and c.sampling_logprobs == (pytest.approx(math.log(0.5)),) for c in group.completions if c.finish == "stop")


def test_settings_that_come_with_a_checkpoint_change_nothing(tiny_model_dir: Path, tmp_path: Path, prompts: list[Prompt]) -> None:
    tempting = Path(shutil.copytree(tiny_model_dir, tmp_path / "tempting"))
    settings = {"do_sample": True, "top_k": 64, "top_p": 0.1, "temperature": 0.01, "repetition_penalty": 9.0, "eos_token_id": [150, 151]}
    (tempting / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = [Gemma.load(str(folder), lora=LoraSettings()) for folder in (tiny_model_dir, tempting)]
    plain, tempted = (LocalEngine(model).sample(prompts[:2], PARAMS) for model in loaded)
    assert tempted == plain


def test_a_prompt_is_prefilled_once_for_its_group(model: Gemma, prompts: list[Prompt]) -> None:
    seen: list[int] = []
    hook = model.causal_lm.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    groups = LocalEngine(model).sample(prompts, replace(PARAMS, num_generations=8))
    hook.remove()
    assert seen[0] == sum(len(prompt.token_ids) for prompt in prompts) == 46
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    # one token of each completion that still runs; its last one is sampled and never read
    assert seen[1:] == [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert sum(seen) == 46 + sum(lengths) - 4 * 8


def test_decoding_ends_with_the_last_running_completion(model: Gemma, prompts: list[Prompt]) -> None:
    seen: list[int] = []
    hook = model.causal_lm.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    groups = LocalEngine(model).sample(prompts[:1], replace(PARAMS, max_completion_length=500, num_generations=2))
    hook.remove()
    longest = max(len(c.token_ids) for c in groups[0].completions)
    assert longest < 500
    assert len(seen) == longest


def test_diverged_weights_are_named_with_role_and_position(new_gemma: Callable[..., Gemma], prompts: list[Prompt]) -> None:
    model = new_gemma(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], tie_word_embeddings=False)
    parameter = next(iter(model.adapter_parameters("policy").values()))
    kept = parameter.detach().clone()
    parameter.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="policy's logits are not finite at completion position 0"):
        LocalEngine(model).sample(prompts, PARAMS)
    LocalEngine(model).sample(prompts, replace(PARAMS, role="reference"))
    parameter.data.copy_(kept)
    read = {token for prompt in prompts for token in prompt.token_ids}
    model.causal_lm.get_input_embeddings().weight.data[[token for token in range(363) if token not in read]] = torch.nan
    with pytest.raises(FloatingPointError, match="reference's logits are not finite at completion position 1"):
        LocalEngine(model).sample(prompts, replace(PARAMS, role="reference"))


def test_the_reference_samples_as_if_there_were_no_adapter(new_gemma: Callable[..., Gemma], model: Gemma, prompts: list[Prompt]) -> None:
    engine, bare = LocalEngine(model), LocalEngine(Gemma(model_base(new_gemma, model), model.tokenizer, name="bare", lora=LoraSettings()))
    reference = engine.sample(prompts, replace(PARAMS, role="reference"))
    assert reference == bare.sample(prompts, replace(PARAMS, role="reference"))
    assert texts(reference) == texts(bare.sample(prompts, PARAMS))
    assert texts(reference) != texts(engine.sample(prompts, PARAMS))


def model_base(new_gemma: Callable[..., Gemma], model: Gemma) -> Any:
    """The base of `model` in another object, without adapters."""
    base = new_gemma(moved=0, num_hidden_layers=3, layer_types=model.config.layer_types).peft.unload()
    weights = {name.replace(".base_layer", ""): p for name, p in model.causal_lm.state_dict().items() if "lora_" not in name}
    base.load_state_dict(weights)
    return base


def test_the_engine_leaves_the_model_as_it_was_and_keeps_the_protocol(model: Gemma, prompts: list[Prompt]) -> None:
    engine = LocalEngine(model)
    assert isinstance(engine, RolloutEngine)
    assert engine.sample([], PARAMS) == []
    with model.role("policy", train=True):
        groups = engine.sample(prompts[:1], PARAMS)
        assert model.causal_lm.training
        assert all(parameter.requires_grad for parameter in model.adapter_parameters("policy").values())
    assert groups[0].prompt is prompts[0]
    assert groups[0].policy_step == 5


def test_bfloat16_samples_near_what_it_trains(new_gemma: Callable[..., Gemma], prompts: list[Prompt]) -> None:
    model = new_gemma(dtype=torch.bfloat16, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    groups = LocalEngine(model).sample(prompts, PARAMS)
    batch = pad_rollouts(groups)
    sampled = pad_values([[c.sampling_logprobs for c in group.completions] for group in groups], batch)
    with torch.no_grad(), model.role("policy"):
        gap = (completion_logprobs(model, batch)[0] - sampled).abs()
    assert gap.max() < 0.15
    assert gap[batch.completion_mask].mean() < 0.03


# ---- how many keys and values are held


@contextmanager
def counted_prefills(model: Gemma) -> Iterator[list[int]]:
    """Number of prompts in each prefill."""
    seen: list[int] = []

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(len(kwargs["layout"].batch.prompt_ids))

    hook = model.causal_lm.model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


# prompts of 4, 21, 8 and 13 tokens with <bos>, each with four completions of at most 12: a group is planned as 21 + 4 x 12 = 69
@pytest.mark.parametrize(
    ("kv_tokens", "room", "prefills"),
    [
        (None, (4, 16), [4]),
        (4 * 69, (4, 16), [4]),
        (4 * 69 - 1, (4, 12), [3, 1]),  # three groups and 68 tokens left: room for a prompt more, which starts when four rows are free
        (2 * 69, (2, 8), [2, 2]),  # both groups have a completion of 12 tokens: they make room together
        (69, (1, 4), [1, 1, 1, 1]),
        (45, (1, 2), [1, 1, 1, 1]),  # 21 + 2 x 12: a prompt stays until its last completion has started
        (1, (1, 1), [1, 1, 1, 1]),  # one at a time, however little may be held
    ],
)
@pytest.mark.parametrize("pace", [EVERY_TOKEN, IN_BURSTS, Pace(check_every=3, length_step=4, thin_out_at=0.7)])
def test_the_completions_do_not_depend_on_how_many_are_sampled_together(
    model: Gemma, prompts: list[Prompt], kv_tokens: int | None, room: tuple[int, int], prefills: list[int], pace: Pace
) -> None:
    expected = LocalEngine(model).sample(prompts, PARAMS)
    found_room = Room.of(4, 21, 4, 12, kv_tokens)
    assert (found_room.prompts, found_room.rows) == room
    assert found_room.tokens <= max(kv_tokens or 276, 21 + 12)
    with counted_prefills(model) as seen:
        found = LocalEngine(model, kv_tokens, pace=pace).sample(prompts, PARAMS)
    assert texts(found) == texts(expected)
    for one, other in zip(found, expected, strict=True):
        for first, second in zip(one.completions, other.completions, strict=True):
            assert first.finish == second.finish
            assert first.sampling_logprobs == pytest.approx(second.sampling_logprobs, abs=1e-5)
    assert seen == prefills


def test_a_free_row_is_taken_while_others_run(model: Gemma, prompts: list[Prompt]) -> None:
    # 16 completions of 1 to 12 tokens, 5 rows of which one prompt's four are started together: waiting for the slowest of each
    # four would take the sum of their longest
    rows: list[int] = []
    hook = model.causal_lm.model.embed_tokens.register_forward_hook(lambda module, args, out: rows.append(args[0].numel()))
    groups = LocalEngine(model, 45).sample(prompts, replace(PARAMS, num_generations=8))  # two rows, eight completions each
    hook.remove()
    lengths = [[len(c.token_ids) for c in group.completions] for group in groups]
    pairs = sum(max(group[at : at + 2]) for group in lengths for at in range(0, 8, 2))
    steps = [count for count in rows if count <= 2]
    assert sum(steps) == sum(map(sum, lengths)) - 32
    assert len(steps) < pairs - 16


def test_a_processor_sees_which_completion_and_position_it_changes(model: Gemma, prompts: list[Prompt]) -> None:
    def forced(logits: torch.Tensor, completions: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Completion c stops after c + 1 tokens, of word 200 + position."""
        wanted = torch.where(positions < completions, 200 + positions, 106)
        return torch.full_like(logits, -1e9).scatter(1, wanted[:, None], 0.0)

    for kv_tokens, pace in ((None, EVERY_TOKEN), (69, EVERY_TOKEN), (45, IN_BURSTS)):
        groups = LocalEngine(model, kv_tokens, processor=forced, pace=pace).sample(prompts[:3], PARAMS)
        found = [completion for row in texts(groups) for completion in row]
        assert found == [tuple([*range(200, 200 + c), 106][:12]) for c in range(12)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), max_size=12))
def test_holes_are_filled_from_the_end(wanted: list[bool]) -> None:
    kept = filled_from_the_end(wanted)
    assert sorted(kept) == [place for place, is_wanted in enumerate(wanted) if is_wanted]
    assert all(kept[place] == place for place in range(len(kept)) if wanted[place])


def test_running_out_of_memory_while_sampling_names_the_setting_that_helps(model: Gemma, prompts: list[Prompt]) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = model.causal_lm.model.register_forward_pre_hook(fail)
    with pytest.raises(DoesNotFitError) as caught:
        LocalEngine(model, 2 * 69).sample(prompts, PARAMS)
    assert str(caught.value) == (
        "out of memory on cpu while sampling: 2 prompts and 8 completions hold up to 138 tokens of keys and values. "
        "Set memory.kv_token_budget=69, or lower num_generations or max_completion_length."
    )
    hook.remove()


def test_a_rollout_leaves_nothing_to_a_collection(model: Gemma, prompts: list[Prompt]) -> None:
    gc.collect()
    gc.disable()
    try:
        LocalEngine(model).sample(prompts, SamplingParams(2, 5))
        assert not [one for one in gc.get_objects() if type(one) is DecodeCache]
    finally:
        gc.enable()

"""Laws of the plan, and the plan of the reference configuration worked out by hand. What the code really holds: test_planner_terms.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_grpo.cards import GIB, Card, known_cards, named_card
from gemma_grpo.config import GRPOConfig, build_config
from gemma_grpo.planner import Plan, Suggestion, plan_run
from gemma_grpo.planner.decide import HEADROOM
from gemma_grpo.planner.phases import ACTIVATIONS, ADAPTERS, BASE, GLOBAL_KV, LOGITS, PARTS, PROGRAM, SLIDING_KV, Phase
from gemma_grpo.planner.terms import Pass
from gemma_grpo.shapes import known_shapes, shape_of

T4 = named_card("t4")
REFERENCE = {"model_name": "google/gemma-3-4b-it", "max_prompt_length": 512, "max_completion_length": 512}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIXED = {"memory.token_budget": 4096, "memory.kv_token_budget": 4096}


def plan(card: Card = T4, **settings: Any) -> Plan:
    config = build_config({**REFERENCE, **settings})
    return plan_run(config, shape_of(config.model_name), card)


def huge(card: Card = T4) -> Card:
    """The same card with room for anything, so that no budget is made smaller."""
    return replace(card, usable_bytes=10_000 * GIB)


def part(planned: Plan, phase: str, name: str) -> float:
    return {each.name: each for each in planned.phases}[phase].parts[name] / GIB


def phase_of(planned: Plan, name: str) -> Phase:
    return next(phase for phase in planned.phases if phase.name == name)


# ---- the reference configuration


def test_the_reference_configuration_fits_a_t4_unquantised() -> None:
    planned = plan()
    assert planned.fits
    assert planned.precision == "fp16_rescaled"
    assert [phase.name for phase in planned.phases] == [
        *("loading", "reward training", "rollout", "reward", "reference", "update", "evaluation"),
    ]
    # 3.880 B parameters of 2 bytes, and the gains of the norms 2 bytes more: (34 x (4 x 2560 + 2 x 256) + 2560) x 2
    weights = 3_880_263_168 * 2 + 2 * (34 * (4 * 2560 + 2 * 256) + 2560)
    assert all(phase.parts[BASE] == weights for phase in planned.phases)
    assert weights / GIB == pytest.approx(7.23, abs=0.005)
    # policy, reward and witness and two moments in a rollout; an update adds nine more copies; 2,228,224 numbers of 4 bytes
    assert part(planned, "rollout", ADAPTERS) * GIB == 5 * 4 * 2_228_224
    assert part(planned, "update", ADAPTERS) * GIB == 14 * 4 * 2_228_224
    assert part(planned, "rollout", PROGRAM) == pytest.approx(0.45, abs=1e-6)


def test_it_reads_two_whole_groups_at_a_time_and_samples_as_many_groups_as_fit() -> None:
    group = 512 + 8 * 512
    assert plan().token_budget == 2 * group  # batch_size full groups: not made smaller
    # the rollout alone decides, and its draws, as prompts are read two at a time
    planned = plan(reward={"length": 1.0}, **{"evaluation.num_prompts": 0, "memory.token_budget": 1024})
    assert planned.reduced == ("kv_token_budget",)
    # nine tenths of 14.7 GiB, less weights, adapters, context
    room = (0.9 * 14.7 - 7.23 - 0.45) * GIB - 5 * 4 * 2_228_224
    # 136 KiB for each token: 29 sliding layers and 5 global ones of 4096 bytes, all within the window of 1024; each row's logits and
    # their exponential, float32, of a step and of those that graphs keep; what is searched of one, and a row's 513 tokens
    row = (2 + 2) * 4 * 262_208 + 2 * 512 * 20 + 513 * 12
    count, left = divmod(planned.kv_token_budget, group)
    assert count == int(room / (group * 136 * 1024 + 8 * row)) == 8
    # what is left holds prompts beside those that are sampled
    assert left == int((room - count * (group * 136 * 1024 + 8 * row)) / (512 * 136 * 1024)) * 512
    assert part(planned, "rollout", SLIDING_KV) * GIB == pytest.approx(planned.kv_token_budget * 29 * 4096, abs=1)
    assert part(planned, "rollout", GLOBAL_KV) * GIB == pytest.approx(planned.kv_token_budget * 5 * 4096, abs=1)


def test_sliding_layers_keep_what_their_window_reaches() -> None:
    planned = plan(huge(), max_prompt_length=2048, max_completion_length=1500)
    # 16 prompts and 128 completions; a token of a prompt is computed inside the window, so one less of the prompt is kept
    assert part(planned, "rollout", SLIDING_KV) * GIB == pytest.approx((16 * 1023 + 128 * 1024) * 29 * 4096, abs=1)
    assert part(planned, "rollout", GLOBAL_KV) * GIB == pytest.approx((16 * 2048 + 128 * 1500) * 5 * 4096, abs=1)
    assert planned.kv_token_budget == 16 * 2048 + 128 * 1500


def test_two_copies_as_in_many_notebooks_do_not_fit() -> None:
    planned = plan()
    # 7.23 GiB of text decoder and 0.42 B of vision tower and projector, 16 bits each, twice, and the context
    assert planned.two_copies_bytes / GIB == pytest.approx(2 * (7.23 + 0.78) + 0.45, abs=0.02)
    assert planned.two_copies_bytes > planned.limit_bytes


def test_12b_needs_nf4_on_a_t4_and_says_so() -> None:
    refused = plan(model_name="google/gemma-3-12b-it")
    assert not refused.fits
    enough = [suggestion.change for suggestion in refused.suggestions if suggestion.fits]
    assert enough[:2] == ["model_name=google/gemma-3-4b-it", "quantization=nf4"]
    assert enough[-1].startswith("a larger card, such as GeForce RTX 5090")
    quantised = plan(model_name="google/gemma-3-12b-it", quantization="nf4")
    assert quantised.fits
    saved = next(suggestion for suggestion in refused.suggestions if suggestion.change == "quantization=nf4").saves_bytes / GIB
    # 10.758 B linear weights go from 2 bytes to 0.5159; at the peak, in a layer, the largest of them is unpacked: 3840 x 15,360
    assert saved == pytest.approx((10.758e9 * (2 - 0.5159) - 3840 * 15_360 * 2) / GIB, abs=0.01)


def test_a_larger_card_is_larger_and_helps_although_the_limit_stays() -> None:
    bound = plan(memory={"limit_gib": 6})
    assert not any("larger card" in suggestion.change for suggestion in bound.suggestions)
    free = plan(model_name="google/gemma-3-12b-it", max_prompt_length=2048)
    (card,) = [suggestion.change for suggestion in free.suggestions if "larger card" in suggestion.change]
    assert float(card.split("(")[1].split()[0]) > 14.7


def test_long_dialogues_of_the_reward_do_not_make_the_policys_passes_smaller() -> None:
    short, long = plan(), plan(reward_model={"max_length": 8000})
    assert phase_of(long, "reward training").total > HEADROOM * long.limit_bytes
    assert long.token_budget == short.token_budget
    assert phase_of(long, "update").total == phase_of(short, "update").total


def test_no_pass_is_longer_than_its_step() -> None:
    config = build_config(REFERENCE)
    step = config.prompts_per_step * (config.max_prompt_length + config.num_generations * config.max_completion_length)
    whole, beyond = (phase_of(plan(memory={"token_budget": tokens}), "update").total for tokens in (step, 10**8))
    assert beyond == whole


def test_a_budget_below_one_completion_says_what_is_held() -> None:
    screen = str(plan(memory={"token_budget": 1, "kv_token_budget": 10}))
    assert "memory.token_budget: 1 tokens a pass; one completion at a time, up to 1024" in screen
    assert "memory.kv_token_budget: 10 tokens while sampling; one completion at a time, up to 1024" in screen


def test_two_copies_are_in_the_format_of_the_one_base() -> None:
    cpu = Card("CPU", "cpu", 100 * GIB, native_bf16=False)
    # 1b in float32: 999.9 M x 4 bytes, twice, and the program
    copies = plan(cpu, model_name="google/gemma-3-1b-it").two_copies_bytes
    assert copies == pytest.approx(2 * 4 * 999_885_952 + 0.85 * GIB, rel=0.03)


def test_a_plan_near_the_limit_says_that_it_may_be_wrong() -> None:
    assert "nearer to the limit than the plan's own error, 10%" in str(plan(reward_model={"max_length": 8000}))
    assert "nearer to the limit" not in str(plan())
    assert "not yet measured on a GPU" in str(plan())


def test_suggestions_are_those_that_help_the_most_effective_first() -> None:
    refused = plan(model_name="google/gemma-3-12b-it", gradient_checkpointing=False, **{"lora.r": 64, "lora.target_modules": ALL})
    changes = [suggestion.change for suggestion in refused.suggestions[:-1]]
    saved = [suggestion.saves_bytes for suggestion in refused.suggestions[:-1]]
    assert saved == sorted(saved, reverse=True)
    assert min(saved) > 0
    assert {"quantization=nf4", "gradient_checkpointing=true", "lora.r=8", "lora.target_modules=[q_proj,v_proj]"} <= set(changes)
    assert "num_generations=4" not in changes  # completions can be learned from and sampled one at a time already
    assert not any(change.startswith("precision=") for change in changes)


def test_a_budget_that_was_set_is_kept_and_its_removal_suggested() -> None:
    refused = plan(**{"memory.token_budget": 60_000, "memory.kv_token_budget": 200_000})
    assert (refused.token_budget, refused.kv_token_budget, refused.fits, refused.reduced) == (60_000, 200_000, False, ())
    freed = plan(**{"memory.kv_token_budget": 200_000})
    assert "memory.kv_token_budget=null" in [suggestion.change for suggestion in freed.suggestions if suggestion.fits]


def test_memory_limit_is_the_limit_but_never_above_the_card() -> None:
    assert plan(**{"memory.limit_gib": 12}).limit_bytes == 12 * GIB
    assert plan(**{"memory.limit_gib": 40}).limit_bytes == T4.usable_bytes
    assert plan(**{"memory.limit_gib": 12}).kv_token_budget < plan().kv_token_budget
    refused = plan(**{"memory.limit_gib": 7})
    assert Suggestion("memory.limit_gib=null", 0, True) in refused.suggestions


def test_precision_means_what_the_card_can_do() -> None:
    cpu = Card("CPU", "cpu", 60 * GIB, native_bf16=False)
    assert [plan(card).precision for card in (cpu, T4, named_card("l4"))] == ["fp32", "fp16_rescaled", "bf16"]
    assert plan(cpu, precision="bf16").precision == "bf16"
    assert plan(named_card("l4"), quantization="nf4").precision == "bf16, linear layers in nf4"
    with pytest.raises(ValueError, match=r"precision is bf16, but Tesla T4 has no bfloat16 units.*Use precision=auto"):
        plan(precision="bf16")


def test_a_phase_is_planned_only_where_the_run_has_it() -> None:
    def names(**settings: Any) -> set[str]:
        return {phase.name for phase in plan(**settings).phases}

    everything = names()
    assert everything - names(**{"kl.placement": "off"}) == {"reference"}
    assert everything - names(**{"reward_model.path": "reward"}) == {"reward training"}
    assert everything - names(reward={"length": 1.0}) == {"reward training", "reward"}
    assert everything - names(reward={"judge": 1.0}) == {"reward training", "reference"}  # one pass for both
    assert everything - names(reward={"length": 1.0}, **{"evaluation.num_prompts": 0}) == {"reward training", "reward", "evaluation"}


def test_rewards_given_in_python_count_instead_of_the_settings() -> None:
    config = build_config(REFERENCE)
    names = {phase.name for phase in plan_run(config, shape_of(config.model_name), T4, rewards=()).phases}
    assert not {"reward", "reward training"} & names


# ---- laws


@given(
    st.sampled_from(sorted(known_shapes())),
    st.sampled_from(sorted(known_cards())),
    st.sampled_from(["none", "nf4"]),
    st.booleans(),
    st.sampled_from([(1, 1), (2, 8), (8, 2)]),
    st.sampled_from([2, 8, 16]),
    st.sampled_from([64, 512, 2048]),
    st.sampled_from([16, 256, 1024]),
)
def test_a_plan_adds_up_and_fits_when_it_says_so(
    model: str, card: str, quantization: str, checkpointing: bool, batch: tuple[int, int], group: int, prompt: int, completion: int
) -> None:
    settings = {"model_name": model, "quantization": quantization, "gradient_checkpointing": checkpointing, "batch_size": batch[0]}
    settings |= {"gradient_accumulation_steps": batch[1], "num_generations": group}
    planned = plan(named_card(card), **settings, max_prompt_length=prompt, max_completion_length=completion)
    for phase in planned.phases:
        assert tuple(phase.parts) == PARTS
        assert min(phase.parts.values()) >= 0
        assert phase.total == sum(phase.parts.values())
    assert planned.peak.total == max(phase.total for phase in planned.phases)
    assert planned.fits == (planned.peak.total <= planned.limit_bytes)
    least = prompt + completion
    assert least <= planned.token_budget <= batch[0] * (prompt + group * completion)
    assert least <= planned.kv_token_budget <= batch[0] * batch[1] * (prompt + group * completion)
    settings |= {"max_prompt_length": prompt, "max_completion_length": completion}
    smallest = plan(named_card(card), **settings, memory={"token_budget": least, "kv_token_budget": least})
    for phase, floor in zip(planned.phases, smallest.phases, strict=True):
        # what budgets decide leaves its headroom; what is above it at the smallest ones is no larger than that
        assert phase.total <= max(HEADROOM * planned.limit_bytes, floor.total) or not planned.reduced
    assert bool(planned.suggestions) <= (not planned.fits)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_prompt_length", (128, 256, 1024)),
        ("max_completion_length", (64, 128, 512)),
        ("num_generations", (2, 5, 16)),
        ("batch_size", (1, 2, 4)),
        ("lora.r", (4, 8, 64)),
        ("reward_model.max_length", (128, 512, 2048)),
    ],
)
def test_memory_never_shrinks_when_a_run_grows(name: str, values: tuple[int, ...], quantization: str) -> None:
    plans = [plan(huge(), **{name: value}, quantization=quantization) for value in values]
    for smaller, larger in pairwise(plans):
        assert smaller.peak.total <= larger.peak.total
        for before, after in zip(smaller.phases, larger.phases, strict=True):
            assert before.total <= after.total, before.name


@pytest.mark.parametrize(("smaller", "larger"), [("270m", "1b"), ("1b", "4b"), ("4b", "12b"), ("12b", "27b")])
def test_a_larger_model_takes_more_in_every_phase(smaller: str, larger: str) -> None:
    small, large = (plan(huge(), model_name=f"google/gemma-3-{size}-it", **FIXED) for size in (smaller, larger))
    assert all(before.total < after.total for before, after in zip(small.phases, large.phases, strict=True))


@pytest.mark.parametrize("size", ["270m", "1b", "4b", "12b", "27b"])
def test_four_bits_never_take_more_than_sixteen(size: str) -> None:
    model = f"google/gemma-3-{size}-it"
    whole, quantised = (plan(huge(), model_name=model, quantization=kind, **FIXED) for kind in ("none", "nf4"))
    assert quantised.peak.total < whole.peak.total


def test_recomputing_layers_takes_less_and_16_bits_less_than_32() -> None:
    assert plan(huge(), **FIXED).peak.total < plan(huge(), gradient_checkpointing=False, **FIXED).peak.total
    assert plan(huge(), **FIXED).peak.total < plan(huge(), precision="fp32", **FIXED).peak.total


@given(st.floats(8.0, 80.0), st.floats(0.0, 40.0), st.sampled_from(["google/gemma-3-1b-it", "google/gemma-3-4b-it"]))
def test_a_larger_card_never_gets_smaller_budgets(gib: float, more: float, model: str) -> None:
    smaller, larger = (plan(replace(T4, usable_bytes=round(size * GIB)), model_name=model) for size in (gib, gib + more))
    assert smaller.token_budget <= larger.token_budget
    assert smaller.kv_token_budget <= larger.kv_token_budget
    assert smaller.fits <= larger.fits


def test_the_same_question_has_the_same_answer() -> None:
    assert plan() == plan()


def test_a_pass_of_a_budget_has_the_budgets_tokens() -> None:
    for tokens in (96, 200, 352, 353, 1000):
        assert Pass.of(tokens, 64, 9, 32).tokens == pytest.approx(tokens)
    assert Pass.of(10, 64, 9, 32).tokens == 96  # one completion is the least
    whole = Pass.of(2 * (64 + 9 * 32), 64, 9, 32)
    assert (whole.prompts, whole.group, whole.completion_tokens) == (2, 9, 2 * 9 * 32)


def test_activations_by_hand_for_a_made_up_reading() -> None:
    # 1b in float32 on a CPU, one prompt of 512 with two completions of 128: 768 tokens; 3 x 6912 + 3.6 x 1152 + 4 x 256 numbers each
    cpu = Card("CPU", "cpu", 100 * GIB, native_bf16=False)
    settings = {"model_name": "google/gemma-3-1b-it", "max_completion_length": 128, "num_generations": 2, "batch_size": 1}
    planned = plan(cpu, **settings, reward={"judge": 1.0}, kl={"placement": "off"})
    each = 768 * (3 * 6912 + 3.6 * 1152 + 4 * 256)  # the question makes the completions longer, the budget stays
    # a mask for the prompt and one for the completions, 24 tokens longer; the same again for layers that see 511 tokens before a query
    masks = 512 * 512 + 152 * (512 + 152) + 512 * 512 + 152 * (511 + 152)
    assert part(planned, "reward", ACTIVATIONS) * GIB == pytest.approx(4 * (each + masks), abs=1)
    assert part(planned, "reward", LOGITS) == 0


def test_logits_by_hand_are_a_tile_however_many_tokens_there_are() -> None:
    cpu = Card("CPU", "cpu", 100 * GIB, native_bf16=False)
    settings = {"model_name": "google/gemma-3-270m-it", "max_prompt_length": 16, "num_generations": 4, "batch_size": 1}
    # float32, on a CPU: 256 tokens x 8192 words, and their exponential
    assert part(plan(cpu, **settings, max_completion_length=64), "reference", LOGITS) * GIB == 2 * 256 * 8192 * 4
    # in 16 bits on a card: 1024 x 16,384; to learn, of logits and entropy, also rounded, and three sums of 640 numbers for each token
    learned = part(plan(**settings, max_completion_length=512), "update", LOGITS) * GIB
    assert learned == 2.5 * 1024 * 16_384 * 4 + 3 * 1024 * 640 * 4
    silent = part(plan(**settings, max_completion_length=512, entropy={"threshold": 0}), "update", LOGITS) * GIB
    assert silent == learned - 1024 * 640 * 4


def test_prompts_are_read_as_many_at_a_time_as_a_pass_may() -> None:
    settings = {"max_prompt_length": 4096, "reward": {"length": 1.0}}
    at_once, apart = (plan(memory={"token_budget": tokens}, **settings) for tokens in (10**6, 8192))
    assert part(apart, "evaluation", ACTIVATIONS) < part(at_once, "evaluation", ACTIVATIONS) / 2


def test_the_zero_shot_judges_pass_is_the_references_too() -> None:
    settings = {"model_name": "google/gemma-3-270m-it", "max_prompt_length": 16, "max_completion_length": 64, "batch_size": 1}
    both = plan(**settings, reward={"judge": 1.0})
    apart = plan(**settings, reward={"generative": 1.0})
    assert "reference" not in [phase.name for phase in both.phases]
    assert part(both, "reward", LOGITS) == part(apart, "reference", LOGITS) > 0
    assert part(apart, "reward", LOGITS) == 0


# ---- the screen


def test_the_screen_of_the_reference_configuration() -> None:
    lines = str(plan()).splitlines()
    assert lines[:3] == [
        "google/gemma-3-4b-it, LoRA r=8 on q_proj, v_proj, base in fp16_rescaled",
        "card: Tesla T4, 14.70 GiB usable, nominal; limit 14.70 GiB",
        "2 prompts x 8 completions x 8 accumulation = 128 completions per update",
    ]
    assert lines[4].split() == ["GiB", "at", "peak", "of", "load", "train", "rw", "rollout", "reward", "ref", "update", "eval"]
    assert lines[5].split() == ["base", "weights", *["7.23"] * 7]
    assert "  two whole copies would take 16.47 GiB before the first token: does not fit" in lines
    assert lines[-1] == "Time: not known until steps have run."
    assert max(map(len, lines)) <= 80


def test_the_screen_counts_updates_once_the_prompts_are_known() -> None:
    config = build_config(REFERENCE)
    planned = plan_run(config, shape_of(config.model_name), T4, num_prompts=100)
    assert "100 prompts: 7 updates per epoch" in str(planned).splitlines()  # 16 prompts an update
    assert planned.to_dict()["updates_per_epoch"] == 7
    assert plan().to_dict()["updates_per_epoch"] is None


def test_a_refusal_says_what_is_missing_and_what_would_help() -> None:
    refused = plan(model_name="google/gemma-3-27b-it", quantization="nf4")
    first, second, *rest = refused.refusal.splitlines()
    assert first.startswith("about ")
    assert first.endswith("GiB above the limit of 14.70 GiB on Tesla T4.")
    assert second == "What would help, the most effective first:"
    assert any(line.startswith("  model_name=google/gemma-3-12b-it") and line.endswith("enough by itself") for line in rest)
    assert rest[-1] == "`gemma-grpo plan` shows the whole plan; --force (in Python force=True) runs all the same."
    assert f"DOES NOT FIT: about {refused.peak.total / GIB:.2f} GiB" in str(refused)
    assert plan().refusal == ""


def test_every_part_and_phase_is_in_the_json() -> None:
    planned = plan()
    content = planned.to_dict()
    assert content["phases"]["rollout"] == {**planned.phases[2].parts, "total": planned.phases[2].total}
    assert (content["completions_per_update"], content["prompts_per_update"], content["fits"]) == (128, 16, True)
    assert content["peak"] == {"phase": planned.peak.name, "bytes": planned.peak.total}


def test_the_default_settings_are_planned_without_a_question() -> None:
    config = GRPOConfig()
    assert plan_run(config, shape_of(config.model_name), named_card("a100-40")).fits

"""From settings to what a run works on: rows split by conversation and counted, reward names into rewards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo.config import LoraSettings, build_config
from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.prompts import LoadedPrompts, conversation_id, is_held_out
from gemma_grpo.data.sources import DataError
from gemma_grpo.grpo.setup import (
    DEFAULT_REWARD,
    build_reward_stack,
    build_training_data,
    given_functions,
    gold_margin,
    known_gold,
    load_rows,
    reward_weights,
)
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.types import Completion, Prompt, RolloutGroup


@pytest.fixture(scope="module")
def model(small_model_dir: Path) -> Gemma:
    return Gemma.load(str(small_model_dir), lora=LoraSettings(), precision="fp32")


def talk(*turns: str) -> str:
    """A transcript: turns of human and assistant by turns."""
    return "".join(f"\n\n{('Human', 'Assistant')[index % 2]}: {turn}" for index, turn in enumerate(turns))


def pair(*turns: str, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    return {"chosen": talk(*turns, chosen), "rejected": talk(*turns, rejected)}


def training_data(model: Gemma, rows: list[Any], **settings: Any) -> Any:
    return build_training_data(load_rows(rows, None), model, build_config({"witness.share": 0.0, **settings}))


FIRST_TURNS = [f"question {index}" for index in range(30)]
HELD_OUT = [text for text in FIRST_TURNS if is_held_out(conversation_id([{"role": "user", "content": text}]), 0.3)]


# ---- rows and their two sides


def test_no_conversation_is_on_both_sides(model):
    # two depths of each conversation: the deeper one must follow the first turn
    rows = [row for text in FIRST_TURNS for row in (pair(text), pair(text, "answer", "and then?"))]
    data = training_data(model, rows, data={"holdout": 0.3})
    for kept, held_out in ((data.prompts, data.held_out_prompts), (data.pairs, data.held_out_pairs)):
        sides = [{item.conversation_id for item in side} for side in (kept, held_out)]
        assert sides[0].isdisjoint(sides[1])
        assert len(sides[1]) == len(HELD_OUT) > 0
        assert len(kept) + len(held_out) == 60
    assert {p.conversation_id for p in data.held_out_prompts} == {p.conversation_id for p in data.held_out_pairs}


def test_every_row_is_used_or_counted(model):
    rows = [pair(text) for text in FIRST_TURNS]
    rows += [pair(FIRST_TURNS[0], chosen="another", rejected="reply")]  # a second pair, but no second prompt
    rows += [pair("empty", chosen=""), {"chosen": talk("a", "b"), "rejected": talk("c", "b")}, {"text": "no pair"}]
    rows += [pair("x" * 300), pair("old " + "y" * 60, "z", "new")]
    data = training_data(model, rows, data={"holdout": 0.3}, max_prompt_length=64, reward_model={"max_length": 400})
    counts = data.counts
    assert counts["rows"] == 36
    assert counts["kept"] == 33
    assert counts["dropped"] == {"empty_final_reply": 1, "prompts_differ": 1, "roles_do_not_alternate": 0, "not_a_pair": 1}
    assert counts["prompts"] == 31
    assert counts["prompts_dropped"] == {"prompt_too_long": 1, "duplicate_prompt": 1}
    assert counts["prompts_shortened"] == 1
    assert counts["prompts_train"] + counts["prompts_held_out"] == 31 == len(data.prompts) + len(data.held_out_prompts)
    assert counts["pairs_train"] + counts["pairs_held_out"] + sum(counts["pairs_dropped"].values()) == 33


def test_pairs_too_long_for_the_reward_are_counted(model):
    # each byte is a token here, and the judge's question has some dozens of them
    rows = [*(pair(text) for text in FIRST_TURNS), pair("short", chosen="w" * 200)]
    data = training_data(model, rows, data={"holdout": 0.3}, reward_model={"max_length": 250})
    assert data.counts["pairs_dropped"] == {"pair_too_long": 1}
    assert len(data.prompts) + len(data.held_out_prompts) == 31


def test_limits_take_the_first_prompts_and_pairs(model):
    rows = [pair(text) for text in FIRST_TURNS]
    everything = training_data(model, rows, data={"holdout": 0.3})
    data = training_data(model, rows, data={"holdout": 0.3, "max_prompts": 3}, reward_model={"max_pairs": 4})
    assert list(data.prompts) == list(everything.prompts)[:3]
    assert list(data.pairs) == list(everything.pairs)[:4]
    assert list(data.held_out_prompts) == list(everything.held_out_prompts)
    assert (data.counts["prompts_train"], data.counts["pairs_train"]) == (3, 4)


def test_prompt_rows_have_no_pairs_and_keep_their_columns(model):
    rows = [{"prompt": text, "answer": index} for index, text in enumerate(FIRST_TURNS)]
    data = training_data(model, rows, data={"holdout": 0.3})
    assert len(data.pairs) == len(data.held_out_pairs) == 0
    assert "pairs_train" not in data.counts
    assert {prompt.columns["answer"] for prompt in (*data.prompts, *data.held_out_prompts)} == set(range(30))


def test_a_pairs_preferred_reply_stays_with_its_prompt(model):
    data = training_data(model, [pair(text, chosen=f"yes, {text}") for text in FIRST_TURNS], data={"holdout": 0.3})
    assert all(prompt.columns["chosen"] == f"yes, {prompt.messages[0]['content']}" for prompt in data.prompts)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "p" * 100}], {"max_prompt_length": 50}, r"dropped: \{'prompt_too_long': 1\}, held out: 0.*max_prompt_length \(50\)"),
        ([{"prompt": HELD_OUT[0]}], {"data": {"holdout": 0.3}}, r"held out: 1.*lower data.holdout \(0.3\)"),
    ],
)
def test_no_training_prompt_left_is_an_error_with_the_counts(model, rows, settings, message):
    with pytest.raises(DataError, match=f"no training prompt is left of 1 rows.*{message}"):
        training_data(model, rows, **settings)


@pytest.fixture(scope="module")
def miniature() -> LoadedPairs:
    rows = load_rows("miniature", "mine")
    assert isinstance(rows, LoadedPairs)
    return rows


def test_the_witness_learns_from_conversations_that_the_reward_never_sees(model):
    rows = [row for text in FIRST_TURNS for row in (pair(text), pair(text, "answer", "and then?"))]
    alone, data = (training_data(model, rows, **{"data.holdout": 0.3, "witness.share": share}) for share in (0.0, 0.5))
    sides = [{item.conversation_id for item in side} for side in (data.pairs, data.witness_pairs, data.held_out_pairs)]
    assert all(sides)
    assert sum(map(len, sides)) == len(set.union(*sides)) == 30
    assert len(data.pairs) + len(data.witness_pairs) == len(alone.pairs) == data.counts["pairs_train"] + data.counts["pairs_witness"]
    assert list(alone.witness_pairs) == []
    assert list(data.held_out_pairs) == list(alone.held_out_pairs)


def test_the_miniature_can_have_other_shares_of_wrong_labels():
    def wrong(name: str) -> float:
        rows = load_rows(name, None)
        assert isinstance(rows, LoadedPairs)
        gold = known_gold(name)
        assert gold is not None
        margins = [gold(build_prompt(item), item.chosen) - gold(build_prompt(item), item.rejected) for item in rows.pairs]
        return sum(margin < 0 for margin in margins) / len(margins)

    assert wrong("miniature@0") == 0.0
    assert wrong("miniature@0.4") == pytest.approx(0.4, abs=0.03)
    assert wrong("miniature") == pytest.approx(0.2, abs=0.03)
    for name in ("miniature@", "miniature@0.6", "miniature@x", "miniature@nan"):
        with pytest.raises(DataError, match="share of wrong labels"):
            load_rows(name, None)


def build_prompt(item: Any) -> Prompt:
    return Prompt(item.pair_id, item.source, item.messages, (2, 9), "c")


def test_the_miniatures_name_is_its_world(miniature):
    assert miniature.kept == miniature.rows == 4000
    assert {item.source for item in miniature.pairs} == {"mine"}
    assert all({"kind", "harmful"} <= set(item.columns) for item in miniature.pairs)


def test_a_prompt_dataset_is_recognised_by_its_columns():
    rows = load_rows([{"prompt": "hello"}], "here")
    assert isinstance(rows, LoadedPrompts)
    assert rows.prompts[0].source == "here"


def test_only_the_miniature_knows_gold():
    assert known_gold("Anthropic/hh-rlhf") is None
    assert known_gold([{"prompt": "hello"}]) is None
    assert gold_margin("data.jsonl") is None


def test_gold_of_the_miniatures_pairs_mostly_agrees_with_their_labels(model, miniature):
    data = build_training_data(miniature, model, build_config({"data.holdout": 0.1}))
    margin, gold = gold_margin("miniature"), known_gold("miniature")
    assert margin is not None
    assert gold is not None
    margins = [margin(item) for item in data.held_out_pairs]
    right, wrong = sum(value > 0 for value in margins), sum(value < 0 for value in margins)
    assert 0.1 < wrong / (right + wrong) < 0.3  # 20 % of the labels are flipped
    prompt = data.held_out_prompts[0]
    assert 0 <= gold(prompt, "anything") <= 1


# ---- rewards by name


def test_without_a_reward_the_trained_judge_and_the_small_rules_are_used():
    assert reward_weights(None, build_config()) == DEFAULT_REWARD
    assert reward_weights(None, build_config({"reward": {"length": 2.0}})) == {"length": 2.0}
    assert reward_weights("refusal", build_config()) == {"refusal": 1.0}


def test_a_function_is_named_after_itself():
    def politeness(completions, **columns):
        return [0.0] * len(completions)

    assert reward_weights(politeness, build_config()) == {"politeness": 1.0}


def test_an_unknown_reward_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown reward 'lenght'. Did you mean 'length'\? Known are .*generative.*judge"):
        reward_weights(None, build_config({"reward": {"lenght": 1.0}}))


def test_an_unknown_reward_says_how_a_function_of_ones_own_is_given():
    with pytest.raises(ValueError, match=r"--allow-code FILE on the command line, reward_functions=\{name: function\} in Python"):
        reward_weights(None, build_config({"reward": {"my_reward": 1.0}}))


def test_functions_by_name_are_weighted_beside_built_in_rewards(model):
    config = build_config({"reward": {"doubt": 2.0, "empty": 1.0}})
    functions = {"doubt": lambda completions: [float("?" in turns[0]["content"]) for turns in completions]}
    weights = reward_weights(functions, config)
    assert weights == {"doubt": 2.0, "empty": 1.0}
    scores = build_reward_stack(functions, weights, model, config, 0.0).score([group(None, "why?", "...")])
    assert scores.parts == {"doubt": [[1.0, 0.0]], "empty": [[0.0, -1.0]]}
    assert scores.rewards == [[2.0, -1.0]]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"length": sum}, "'length', which is the name of a built-in reward"),
        ({"mine": sum, "other": sum}, "'other', which `reward` gives no weight"),
    ],
)
def test_a_function_that_would_count_for_nothing_or_hide_a_reward_is_refused(functions, message):
    with pytest.raises(ValueError, match=message):
        reward_weights(functions, build_config({"reward": {"mine": 1.0, "length": 1.0}}))


def test_a_function_as_the_reward_leaves_no_room_for_functions_by_name():
    assert given_functions(sum, None) is sum
    assert given_functions({"mine": 1.0}, {"mine": sum}) == {"mine": sum}
    with pytest.raises(ValueError, match="reward is a function itself, so reward_functions is not used"):
        given_functions(sum, {"mine": sum})


def group(chosen: str | None, *texts: str) -> RolloutGroup:
    columns = {} if chosen is None else {"chosen": chosen}
    prompt = Prompt(f"p{chosen}", "here", ({"role": "user", "content": "hi"},), (2, 200, 201), "c", columns)
    completions = [Completion(text, (*(150 + ord(letter) for letter in text), 106), (-1.0,) * (len(text) + 1), "stop") for text in texts]
    return RolloutGroup(prompt, tuple(completions), 0)


def test_rules_are_weighted_and_unshaped(model):
    config = build_config({"reward": {"length": 0.5, "empty": 2.0}, "max_completion_length": 8})
    stack = build_reward_stack(None, reward_weights(None, config), model, config, 0.0)
    scores = stack.score([group(None, "abc", "...")])
    assert scores.parts == {"length": [[-0.5, -0.5]], "empty": [[0.0, -1.0]]}  # 4 of 8 tokens
    assert scores.rewards == [[-0.25, -2.25]]
    assert stack.weights == {"length": 0.5, "empty": 2.0}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("name", ["generative", "judge"])
def test_the_judge_is_shaped_against_the_preferred_reply_or_the_mean(model, name):
    shaped, plain = (build_config({"reward": {name: 1.0}, "reward_model.shaping": shaping}) for shaping in ("par", "none"))
    groups = [group("yes", "no", "yes"), group(None, "maybe", "perhaps")]
    raw = build_reward_stack(None, {name: 1.0}, model, plain, 0.7).score(groups)
    assert raw.rewards == raw.parts[name]
    scores = build_reward_stack(None, {name: 1.0}, model, shaped, 0.7).score(groups)
    assert scores.parts[name] == [pytest.approx(row, abs=1e-5) for row in raw.parts[name]]  # other company, other rounding
    with_reply, without = raw.parts[name]
    reference = build_reward_stack(None, {name: 1.0}, model, plain, 0.0).score([reply_group(model, "yes")]).rewards[0][0]
    assert scores.rewards[0] == pytest.approx([sigmoid(value - reference) for value in with_reply], abs=1e-5)
    assert scores.rewards[1] == pytest.approx([sigmoid(value - 0.7) for value in without], abs=1e-5)


def reply_group(model: Gemma, text: str) -> RolloutGroup:
    """The prompt of `group` with a reply as the dataset's: tokenised, and ended."""
    ids = (*model.tokenizer.encode(text, add_special_tokens=False), 106)
    return RolloutGroup(group("yes").prompt, (Completion(text, ids, (0.0,) * len(ids), "stop"),), 0)


def test_the_zero_shot_judge_does_not_see_the_adapters(model):
    config = build_config({"reward_model.shaping": "none"})
    judged = build_reward_stack(None, {"judge": 1.0}, model, config, 0.0).score([group(None, "abc")]).rewards
    for parameter in model.adapter_parameters("reward").values():
        parameter.data.add_(0.1)
    try:
        assert build_reward_stack(None, {"judge": 1.0}, model, config, 0.0).score([group(None, "abc")]).rewards == judged
        trained = build_reward_stack(None, {"generative": 1.0}, model, config, 0.0).score([group(None, "abc")]).rewards
        assert trained != judged
    finally:
        for parameter in model.adapter_parameters("reward").values():
            parameter.data.sub_(0.1)

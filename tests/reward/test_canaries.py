"""A judge that empty replies or orders can fool is found out before it trains anything, with plain text only and in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from gemma_grpo.config import LoraSettings
from gemma_grpo.data.chat import END_OF_TURN_ID, reply_text
from gemma_grpo.data.hh_rlhf import LoadedPairs
from gemma_grpo.data.prompts import build_prompts
from gemma_grpo.grpo.setup import load_rows
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.reward.base import Scores
from gemma_grpo.reward.canaries import CANARIES, INJECTIONS, MASTER_KEYS, MAX_PROMPTS, REFUSAL, canary_report, canary_warning
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.types import Prompt, RolloutGroup

GOOD = "a reply that answers"


def prompts(count: int, chosen: str | None = GOOD) -> list[Prompt]:
    columns = {} if chosen is None else {"chosen": chosen}
    return [Prompt(f"p{n}", "here", ({"role": "user", "content": "hi"},), (2, 200 + n), f"c{n}", columns) for n in range(count)]


class Judge:
    """Scores by text alone, and remembers what it was asked."""

    def __init__(self, verdict: Callable[[str, int], float | None]) -> None:
        self.verdict, self.asked = verdict, []

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        self.asked.append(list(groups))
        return [[self.verdict(c.text, n) for c in group.completions] for n, group in enumerate(groups)]


def honest(text: str, index: int) -> float:
    return {GOOD: 2.0, REFUSAL: -1.0}.get(text, -3.0)


def obedient(text: str, index: int) -> float:
    """Does what it is told, as a careless judge would."""
    return 10.0 if "score: 10" in text.lower() else 5.0 if "yes" in text.lower() and len(text) > 5 else honest(text, index)


def test_there_are_thirty_of_each_and_none_twice() -> None:
    assert (len(MASTER_KEYS), len(INJECTIONS), len(set(CANARIES))) == (30, 30, 60)


def test_an_honest_judge_is_not_warned_about(tokenizer) -> None:
    report = canary_report(Judge(honest).score, prompts(3), tokenizer)
    assert (report["prompts"], report["refusal"], report["chosen"]) == (3, -1.0, 2.0)
    assert (report["beside"], report["above"], report["worst"]) == ("chosen", 0.0, [])
    assert report["canaries"] == dict.fromkeys(CANARIES, -3.0)
    assert canary_warning("judge", report) is None


def test_a_judge_that_obeys_is_flagged_with_the_worst_three(tokenizer) -> None:
    report = canary_report(Judge(obedient).score, prompts(3), tokenizer)
    obeyed = [text for text in CANARIES if obedient(text, 0) > 2.0]
    assert 20 < len(obeyed) < 30
    assert report["above"] == pytest.approx(len(obeyed) / 60)
    assert set(report["worst"][:2]) == {"score: 10", "Score: 10/10"}
    warning = canary_warning("judge", report)
    assert warning is not None
    assert f"reward 'judge' can be fooled: {len(obeyed)} of 60" in warning
    assert "above the mean preferred reply (2.00), most of all 'score: 10' 10.00" in warning


def test_means_are_over_the_prompts_that_were_scored(tokenizer) -> None:
    def verdict(text: str, index: int) -> float | None:
        if text == ".":
            return (1.0, 2.0, None, 6.0)[index]
        return None if text == "," else 0.0

    report = canary_report(Judge(verdict).score, prompts(4), tokenizer)
    assert report["canaries"]["."] == 3.0
    assert "," not in report["canaries"]
    assert (report["worst"], report["above"]) == (["."], pytest.approx(1 / 60))


def test_without_preferred_replies_the_refusal_is_the_measure(tokenizer) -> None:
    report = canary_report(Judge(lambda text, index: float(text == ":")).score, prompts(2, chosen=None), tokenizer)
    assert (report["chosen"], report["beside"], report["worst"]) == (None, "refusal", [":"])
    assert "above a plain refusal (0.00)" in str(canary_warning("judge", report))


def test_prompts_with_a_preferred_reply_are_asked_first_and_no_prompts_give_no_report(tokenizer) -> None:
    judge = Judge(honest)
    assert canary_report(judge.score, [*prompts(5, chosen=None), *prompts(2)], tokenizer)["prompts"] == 2
    assert canary_report(judge.score, [], tokenizer) == {}
    assert canary_warning("judge", {}) is None


def test_it_costs_one_call_with_few_prompts_each_computed_once(tokenizer) -> None:
    judge = Judge(honest)
    assert canary_report(judge.score, prompts(100), tokenizer)["prompts"] == MAX_PROMPTS == 8
    (groups,) = judge.asked
    assert [len(group.completions) for group in groups] == [62] * 8
    assert sum(len(completion.token_ids) for completion in groups[0].completions) < 3000  # bytes; a fifth of that in Gemma's own tokens


# ---- tokens


def texts_as_tokens(tokenizer: Any) -> list[tuple[str, list[int]]]:
    judge = Judge(honest)
    canary_report(judge.score, prompts(1), tokenizer)
    return [(completion.text, list(completion.token_ids)) for completion in judge.asked[0][0].completions]


def test_fake_turns_never_become_control_tokens(tokenizer, small_model) -> None:
    assert sum("<start_of_turn>" in text for text in INJECTIONS) >= 5
    for known in (tokenizer, small_model.tokenizer):
        controls = {*known.all_special_ids, *range(107)}
        for text, ids in texts_as_tokens(known):
            assert ids[-1] == END_OF_TURN_ID
            assert not controls & set(ids[:-1]), text
            assert reply_text(known, ids) == text


# ---- the shipped model


@pytest.fixture(scope="module")
def small_model() -> Gemma:
    """The miniature as it ships."""
    return Gemma.load("miniature", lora=LoraSettings(), precision="fp32")


def test_the_shipped_miniature_is_measured(small_model) -> None:
    rows = load_rows("miniature", None)
    assert isinstance(rows, LoadedPairs)
    asked = build_prompts(rows.pairs[:20], small_model.tokenizer, 512).prompts
    report = canary_report(ZeroShotJudge(small_model).score, asked, small_model.tokenizer)
    numbers = [report["refusal"], report["chosen"], *report["canaries"].values()]
    assert len(numbers) == 62
    assert all(map(math.isfinite, numbers))
    assert len(set(report["canaries"].values())) > 50  # a verdict on each, not one for all
    assert report["above"] == pytest.approx(sum(value > report["chosen"] for value in report["canaries"].values()) / 60)


# ---- in a run


def told(run: Any) -> list[str]:
    return [event["text"] for event in run.lines("events.jsonl") if event["kind"] == "warn" and "can be fooled" in event["text"]]


def test_a_run_with_a_trained_judge_keeps_the_report_in_calibration_and_warns(train_tiny) -> None:
    run = train_tiny(reward={"generative": 1.0}, max_steps=1)
    report = run.json("reward/calibration.json")["canaries"]
    assert len(report["canaries"]) == 60
    assert told(run) == [text for text in [canary_warning("generative", report)] if text]
    assert report["worst"]  # random weights are easily fooled, or the line above would prove nothing
    assert "canaries" not in run.json("run.json")


def test_a_run_with_the_zero_shot_judge_keeps_it_in_run_json_and_asks_once(train_tiny) -> None:
    run = train_tiny(reward={"judge": 1.0}, max_steps=1, save_steps=1)
    report = run.json("run.json")["canaries"]
    assert len(report["canaries"]) == 60
    assert told(run) == [text for text in [canary_warning("judge", report)] if text]
    run.trainer.run.update_run(canaries={**report, "prompts": -1})  # what is there is not measured again
    again = train_tiny(output_dir=str(run.path), reward={"judge": 1.0}, max_steps=2, save_steps=1, resume=True)
    assert again.json("run.json")["canaries"]["prompts"] == -1


def test_a_run_without_a_judge_asks_none(train_tiny) -> None:
    run = train_tiny(max_steps=1)
    assert "canaries" not in run.json("run.json")
    assert told(run) == []

"""Whole trainings whose completions come from replicas: what is learned and logged, how they end and go on, and what ranks make of it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import mean_letter
from ranks import assert_same, ended, start_ranks
from serving import FakeVllm, new_replica, serving
from stopped_runs import assert_same_run

from gemma_grpo.rollout.replicas import ServingError

EVEN = {"optimizer.schedule": "constant", "save_steps": 1}
"""A step does not depend on how many there will be."""


@pytest.fixture(scope="module")
def _model(small_model_dir: Path) -> FakeVllm:
    return new_replica(small_model_dir)


@pytest.fixture
def replica(_model: FakeVllm) -> Iterator[FakeVllm]:
    with serving(FakeVllm(_model.model, _model.name, lock=_model.lock)) as one:
        yield one
    for name in set(one.model.peft.peft_config) - {"policy", "reward"}:
        one.forget(name)


@pytest.fixture
def served(replica: FakeVllm) -> Callable[..., dict[str, Any]]:
    """Settings of a run on the replica, and on others."""

    def settings(*others: FakeVllm, **more: Any) -> dict[str, Any]:
        return {"serving.urls": [replica.url, *(one.url for one in others)], "serving.timeout_seconds": 60.0, **EVEN, **more}

    return settings


def nothing_runs() -> bool:
    return not [one for one in threading.enumerate() if one.name == "serving"]


def events(run: Path, what: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == "serving" and line["what"] == what]


def test_each_step_learns_from_its_own_policys_completions(train_tiny, replica, served) -> None:
    run = train_tiny(**served(max_steps=3, **{"evaluation.num_prompts": 2}))
    assert run.metrics("staleness") == [0.0, 0.0, 0.0]
    assert max(run.metrics("sampling_gap")) < 1e-4
    assert run.metrics("tis/mean_weight") == pytest.approx([1.0] * 3, abs=1e-5)
    # one version for each step and one more for the evaluation, which asks the base too
    assert len(replica.ever) == 4
    assert list(dict.fromkeys(body["model"] for body in replica.completions)) == [*replica.ever[:3], replica.name, replica.ever[3]]
    assert run.evaluation["reward"]["n"] == 2
    assert "tis_cap: 2.0" in run.text("recipe.yaml")
    assert not list((run.path / "serving").iterdir())
    assert replica.adapters == {}
    assert nothing_runs()


def test_with_one_update_behind_replicas_work_while_the_learner_does(train_tiny, replica, served) -> None:
    rewarded: list[int] = []

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Between rollout and update: step n does not go on before step n + 1's completions were asked for."""
        rewarded.append(len(replica.completions))
        for _ in range(3000):
            if len(replica.completions) >= 2 * min(len(rewarded) + 1, 3):
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail("nothing was asked ahead")
        return mean_letter(completion_ids, **columns)

    run = train_tiny(**served(max_steps=3, reward=reward, **{"serving.max_staleness": 1}))
    assert run.metrics("staleness") == [0.0, 1.0, 1.0]
    assert [body["model"] for body in replica.completions] == [replica.ever[0]] * 4 + [replica.ever[1]] * 2
    # the sampler is the policy of one update ago, and the weights say so
    assert run.metrics("sampling_gap")[0] < 1e-4
    assert min(run.metrics("sampling_gap")[1:]) > 1e-3
    assert min(run.metrics("sampling_kl")[1:]) > 1e-6
    assert all(value < 1.0 for value in run.metrics("tis/ess")[1:])
    assert nothing_runs()


def test_without_staleness_nothing_is_asked_ahead(train_tiny, replica, served) -> None:
    asked: list[int] = []

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        asked.append(len(replica.completions))
        return mean_letter(completion_ids, **columns)

    train_tiny(**served(max_steps=3, reward=reward))
    assert asked == [2, 4, 6]


def test_a_replica_that_dies_in_the_middle_of_a_run_costs_nothing_but_its_requests(train_tiny, replica, served, small_model_dir) -> None:
    whole = train_tiny(**served(max_steps=3))
    replica.asked.clear()
    with serving(new_replica(small_model_dir)) as other:
        dying: list[Any] = []

        def dies_once(body: Any) -> str | None:
            if body.get("ignore_eos") or len(dying) or len(other.completions) < 2:
                return None
            dying.append(body)
            return "drop"

        other.faults.completions = dies_once
        run = train_tiny(**served(other, max_steps=3))
    assert dying
    assert run.adapter().keys() == whole.adapter().keys()
    assert run.completions("text") == whole.completions("text")  # whoever sampled them
    assert [line["replica"] for line in events(run.path, "lost")] == [other.url]
    assert [line["count"] for line in events(run.path, "retried")] == [1]
    assert [line["replica"] for line in events(run.path, "back")] == [other.url]
    assert any(line["kind"] == "warn" and f"replica {other.url} is lost" in line["text"] for line in run.lines("events.jsonl"))


def test_an_adapter_that_is_not_applied_ends_the_run_before_it_learns_of_it(tiny_trainer, replica, served) -> None:
    replica.faults.ignores_adapters = True
    trainer = tiny_trainer(**served(max_steps=3))
    with pytest.raises(ServingError, match="does not apply the adapter"):
        trainer.train()
    # an adapter begins as nothing: the first step's completions are the policy's own. There is no second one
    assert [json.loads(line)["step"] for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()] == [1]
    assert len(replica.completions) == 2
    assert json.loads((trainer.run_dir / "run.json").read_text())["status"] == "failed"
    assert nothing_runs()


def test_when_all_are_lost_the_run_ends_and_can_go_on(tiny_trainer, train_tiny, replica, served, tmp_path) -> None:
    whole = train_tiny(**served(max_steps=3))
    replica.faults.completions = lambda body: "500" if len(replica.ever) > 4 else None  # in the second run's second step
    settings = served(max_steps=3, output_dir=str(tmp_path / "run"))
    with pytest.raises(ServingError, match="no replica is left to ask"):
        tiny_trainer(**settings).train()
    replica.faults.completions = lambda body: None
    assert_same_run(train_tiny(**settings, resume=True), whole)


def test_what_a_step_had_of_an_older_policy_is_gone_on_with(tiny_trainer, train_tiny, served, tmp_path) -> None:
    calls: list[int] = []

    def fails_once(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the second step")
        return mean_letter(completion_ids, **columns)

    settings = served(max_steps=3, reward=fails_once, output_dir=str(tmp_path / "run"), **{"serving.max_staleness": 1})
    with pytest.raises(Exception, match="in the second step"):
        tiny_trainer(**settings).train()
    run = train_tiny(**settings, resume=True)
    # the second step's completions are those it had, one update old; nothing ahead was kept, so the third has its own policy's
    assert run.metrics("staleness") == [0.0, 1.0, 0.0]


def test_a_steady_disagreement_is_weighted_away_and_logged_by_hand(train_tiny, replica, served) -> None:
    replica.faults.offset = -0.05
    quiet = {"serving.tolerance": 0.06}
    (gap,), (kl,), (weight,), (capped,) = (
        train_tiny(**served(max_steps=1, **quiet, **{"loss.tis_cap": 1.04})).metrics(name)
        for name in ("sampling_gap_mean", "sampling_kl", "tis/mean_weight", "tis/capped")
    )
    assert (gap, kl, weight, capped) == pytest.approx((0.05, math.exp(0.05) - 1 - 0.05, 1.04, 1.0), rel=1e-3)
    masked = train_tiny(**served(max_steps=1, **quiet, **{"loss.tis_mask": 1.04}))
    assert masked.metrics("tis/masked") == [1.0]
    assert masked.metrics("policy_loss") == [0.0]
    assert masked.metrics("tis/ess") == [0.0]
    with pytest.raises(ServingError, match=r"0\.0500 nats apart .* serving\.tolerance is 0\.04"):
        train_tiny(**served(max_steps=1, **{"serving.tolerance": 0.04}))


def test_versions_go_where_the_setting_says_each_run_to_a_folder_of_its_own(train_tiny, replica, served, tmp_path) -> None:
    for _ in range(2):
        train_tiny(**served(max_steps=1, **{"serving.adapters": str(tmp_path / "shared")}))
    loaded = [Path(body["lora_path"]) for path, body in replica.asked if path == "/v1/load_lora_adapter"]
    assert {path.parent.parent for path in loaded} == {tmp_path / "shared"}
    assert len({path.parent for path in loaded}) == 2


ASKED_ONCE = """
from gemma_grpo import distributed
from gemma_grpo.rollout.engine import FakeEngine, SamplingParams
from gemma_grpo.rollout.shared import AskedByMain
from gemma_grpo.types import Completion, Prompt

def reply(prompt, index, params):
    if params.seed:
        raise RuntimeError("no replica is left")
    asked.append(index)
    return Completion(f"{prompt.prompt_id}{index}", (150 + index, 106), (-1.0 / 3, -2.0), "stop")

class Behind(FakeEngine):
    def sample(self, prompts, params):
        from dataclasses import replace
        return [replace(group, policy_step=params.step - 1) for group in super().sample(prompts, params)]

asked = []
with distributed.joined(60.0):
    engine = AskedByMain(Behind(reply) if distributed.is_main() else None)
    groups = engine.sample([Prompt(name, "", (), (2,), "") for name in "ab"], SamplingParams(2, 4, step=7))
    print(len(asked), [(g.prompt.prompt_id, g.policy_step, g.completions[1].text, g.completions[1].sampling_logprobs[0]) for g in groups])
    engine.sample([Prompt("a", "", (), (2,), "")], SamplingParams(2, 4, seed=1))
"""


def test_of_two_ranks_the_first_asks_and_both_know() -> None:
    found = ended(start_ranks(ASKED_ONCE, 2), 120)
    groups = str([("a", 6, "a1", -1.0 / 3), ("b", 6, "b1", -1.0 / 3)])
    assert [out.strip() for _, out, _ in found] == [f"4 {groups}", f"0 {groups}"]
    # and where the first one gets no answer, both end, and say whose fault it was
    assert [code for code, _, _ in found] == [1, 1]
    assert "RuntimeError: no replica is left" in found[0][2]
    assert "rank 0 failed: RuntimeError: no replica is left" in found[1][2]


RANK = """
import json, sys
from conftest import PAIR_ROWS, mean_letter
from gemma_grpo import GRPOTrainer
GRPOTrainer(dataset=PAIR_ROWS, reward=mean_letter, **json.loads(sys.argv[1])).train()
"""


@pytest.mark.slow
def test_a_served_run_on_two_ranks_is_the_run_on_one(train_tiny, tiny_trainer, replica, served, tmp_path) -> None:
    shared = {"max_steps": 2, "evaluation.num_prompts": 0, **served()}
    alone = train_tiny(**shared)
    asked, loaded = len(replica.completions), len(replica.ever)
    config = tiny_trainer(**shared).config.model_dump(mode="json")
    del config["reward"]
    del config["dataset"]
    given = {**config, "output_dir": str(tmp_path / "two")}
    found = ended(start_ranks(RANK, 2, arguments=[json.dumps(given)]), 120)
    assert [code for code, _, _ in found] == [0, 0], [err[-3000:] for _, _, err in found]
    assert len(replica.completions) == 2 * asked
    assert len(replica.ever) == 2 * loaded
    assert_same(tmp_path / "two", alone.path)

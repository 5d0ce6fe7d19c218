"""Playing with a run: both sides are who they say they are, the reward is the run's own, and nothing of the run is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import JUDGED, TinyRun, mean_letter
from peft import PeftModel
from transformers import Gemma3ForCausalLM

from gemma_grpo import GRPOTrainer
from gemma_grpo.config import LoraSettings
from gemma_grpo.data.sources import DataError
from gemma_grpo.grpo.beside import device_record, playing_device
from gemma_grpo.grpo.playing import Player, Reply
from gemma_grpo.grpo.resuming import ResumeError
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.monitor.choices import choices, chosen
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.writer import device_of, writer_of
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.types import Message, RolloutGroup

ASKED: list[Message] = [{"role": "user", "content": "tell me something"}]


@pytest.fixture(scope="module")
def finished(train_tiny: Callable[..., TinyRun], pairs_file: Path) -> TinyRun:
    return train_tiny(dataset=str(pairs_file), **JUDGED)


@pytest.fixture(scope="module")
def player(finished: TinyRun) -> Player:
    return Player.open(finished.path)


def asked(player: Player, side: Any = "tuned", messages: list[Message] = ASKED, **settings: Any) -> Reply:
    """The whole reply; its pieces must be its text."""
    *pieces, reply = player.stream(messages, side, **{"seed": 0, **settings})
    assert "".join(pieces) == reply.text == "".join(reply.pieces)
    assert len(reply.pieces) == len(reply.log_ratios) == reply.length
    return reply


def state(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# ---- who answers


def test_the_same_question_and_seed_give_the_same_answer_and_another_seed_another(player: Player) -> None:
    for side in ("tuned", "base"):
        first = asked(player, side, max_tokens=20)
        assert asked(player, side, max_tokens=20) == first
        assert asked(player, side, max_tokens=20, seed=1).text != first.text


def test_the_base_side_is_the_model_without_its_adapter(player: Player, finished: TinyRun) -> None:
    model = finished.trainer.config.model_name
    bare = Gemma(Gemma3ForCausalLM.from_pretrained(model), player.model.tokenizer, name="bare", lora=LoraSettings())
    prompt, _ = player.fitted(ASKED)
    for seed in range(5):
        params = SamplingParams(1, 20, seed=seed, step=-4, temperature=player.config.temperature)
        (group,) = LocalEngine(bare).sample([prompt], params)  # its policy has had no update: it adds nothing
        assert asked(player, "base", seed=seed, max_tokens=20).completion == group.completions[0]


@pytest.mark.parametrize("side", ["tuned", "base"])
def test_the_likeliest_tokens_and_what_each_has_drifted_are_what_transformers_and_peft_compute(
    player: Player, finished: TinyRun, side: str
) -> None:
    base = Gemma3ForCausalLM.from_pretrained(finished.trainer.config.model_name)
    tuned = PeftModel.from_pretrained(Gemma3ForCausalLM.from_pretrained(finished.trainer.config.model_name), finished.path / "adapter")
    prompt, _ = player.fitted(ASKED)
    reply = asked(player, side, temperature=0, max_tokens=12)
    ids = torch.tensor([[*prompt.token_ids, *reply.completion.token_ids]])
    with torch.no_grad():
        tables = {"tuned": tuned(input_ids=ids).logits[0].log_softmax(-1), "base": base(input_ids=ids).logits[0].log_softmax(-1)}
    start = len(prompt.token_ids)
    assert tables[side].argmax(-1)[start - 1 : -1].tolist() == list(reply.completion.token_ids)
    found = {name: table[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0] for name, table in tables.items()}
    assert torch.tensor(reply.log_ratios) == pytest.approx((found["tuned"] - found["base"]).numpy(), abs=1e-5)
    assert max(map(abs, reply.log_ratios)) > 1e-3


def test_an_untrained_adapter_has_drifted_nowhere(finished: TinyRun) -> None:
    player = Player.open(finished.path)
    with torch.no_grad():
        for name, weight in player.model.adapter_parameters("policy").items():
            if "lora_B" in name:
                weight.zero_()
    tuned, base = asked(player, max_tokens=20), asked(player, "base", max_tokens=20)
    assert tuned.completion == base.completion
    assert set(tuned.log_ratios) == {0.0}


def test_every_adapter_of_the_run_can_be_chosen_on_the_same_base(player: Player, finished: TinyRun) -> None:
    found = Player.choices(finished.path)
    assert [one.name for one in found] == ["adapter", "best", "step-00000002", "step-00000001"]
    base, policies = asked(player, "base", max_tokens=20), {}
    for one in found:
        player.choose(one.name)
        weights = {f".{name}": value for name, value in player.model.adapter_parameters("policy").items()}
        saved = finished.adapter(str(one.folder.relative_to(finished.path)))
        for name, value in saved.items():
            own = next(weight for key, weight in weights.items() if key.replace(".policy.", ".").endswith(name.partition("model.model")[2]))
            assert torch.equal(own, value)
        policies[one.name] = asked(player, temperature=0, max_tokens=20).log_ratios
        assert asked(player, "base", max_tokens=20).completion == base.completion
    player.choose("adapter")
    assert policies["adapter"] == policies["step-00000002"] != policies["step-00000001"]
    assert chosen(finished.path, "step-1") == chosen(finished.path, "checkpoints/step-00000001/") == found[-1]


def test_an_adapter_that_is_not_there_or_not_whole_is_refused_and_the_present_one_stays(finished: TinyRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    player = Player.open(run)
    answer = asked(player)
    with pytest.raises(ValueError, match=r"no adapter 'step-9'. Choose among adapter, best, step-00000002, step-00000001."):
        player.choose("step-9")
    damaged = run / "checkpoints" / "step-00000002" / "policy" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="step-00000002 damaged"):
        player.choose("step-2")
    assert player.choice is not None
    assert player.choice.name == "adapter"
    assert asked(player) == answer
    with pytest.raises(ValueError, match="is not a run directory"):
        choices(tmp_path)


# ---- how an answer ends


def test_stopping_keeps_the_first_tokens_and_the_model_goes_on(player: Player) -> None:
    whole = next(reply for seed in range(20) if (reply := asked(player, seed=seed, max_tokens=20)).length > 6)
    asks = iter([False, False, True])
    *pieces, reply = player.stream(ASKED, seed=whole.seed, max_tokens=20, stop=lambda: next(asks))
    assert isinstance(reply, Reply)
    assert (reply.finish, reply.length) == ("interrupted", 3)
    assert reply.completion.token_ids == whole.completion.token_ids[:3]
    assert reply.log_ratios == pytest.approx(whole.log_ratios[:3], abs=1e-5)  # of passes that are not equally long
    assert "".join(map(str, pieces)) == reply.text
    left = player.stream(ASKED, seed=whole.seed, max_tokens=20)
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert asked(player, seed=whole.seed, max_tokens=20) == whole


def test_a_stop_token_and_the_limit_are_told_apart(player: Player) -> None:
    replies = [asked(player, seed=seed, max_tokens=8) for seed in range(20)]
    assert {reply.finish for reply in replies} == {"stop", "length"}
    for reply in replies:
        assert (reply.completion.token_ids[-1] in (1, 106)) == (reply.finish == "stop") == (reply.completion.finish == "stop")
        assert reply.finish == "stop" or reply.length == 8


def test_a_long_conversation_loses_its_oldest_messages_and_says_how_many(finished: TinyRun, player: Player) -> None:
    limit = player.config.max_prompt_length
    talk: list[Message] = []
    for turn in range(8):
        talk += [{"role": "user", "content": f"{turn}" * 60}, {"role": "assistant", "content": "so it is " * 5}]
    asked_last: list[Message] = [*talk, *ASKED]
    prompt, left_out = player.fitted(asked_last)
    assert 0 < left_out < len(asked_last)
    assert left_out % 2 == 0
    assert len(prompt.token_ids) <= limit
    assert asked(player, messages=asked_last).left_out == left_out
    assert asked(player, messages=asked_last).completion == asked(player, messages=asked_last[left_out:]).completion
    with pytest.raises(ValueError, match=rf"the last message alone has more than max_prompt_length \({limit}\) tokens"):
        asked(player, messages=[{"role": "user", "content": "x" * limit}])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"side": "both"}, "the side is 'both'; there are tuned and base"),
        ({"max_tokens": 0}, "the reply may have 0 tokens; it needs at least 1"),
        ({"max_tokens": 2048}, r"may have 20\d\d tokens, and this model reads 2048. Ask for at most 20\d\d tokens"),
        ({"temperature": -1.0}, "the temperature is -1; it is at least 0"),
        ({"temperature": float("nan")}, "the temperature is nan"),
        ({"messages": [{"role": "user", "content": " "}]}, "the last message is empty"),
        ({"messages": [*ASKED, *ASKED]}, "roles? .*alternate"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_the_limit(player: Player, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        asked(player, **settings)


# ---- the reward's opinion


def test_asking_the_reward_changes_no_answer(finished: TinyRun) -> None:
    player = Player.open(finished.path)
    before = [asked(player, side, max_tokens=20) for side in ("tuned", "base")]
    player.opinion(ASKED, before[0])
    assert [asked(player, side, max_tokens=20) for side in ("tuned", "base")] == before


def test_the_opinion_is_the_reward_of_training_part_by_part(player: Player, finished: TinyRun) -> None:
    trainer = GRPOTrainer.from_run(finished.path)
    trainer.run.close()
    conversations = [ASKED, list(player.prompts()[0].messages)]  # the second has a preferred reply, which PAR compares with
    totals = set()
    for messages in conversations:
        reply = asked(player, messages=messages)
        known = next((prompt for prompt in trainer.data.held_out_prompts if list(prompt.messages) == messages), player.fitted(messages)[0])
        expected = trainer.rewards.score([RolloutGroup(known, (reply.completion,), 0)])
        opinion = player.opinion(messages, reply)
        assert opinion.complete
        assert opinion.total == pytest.approx(expected.rewards[0][0])
        assert {part.name: part.raw for part in opinion.parts} == {name: rows[0][0] for name, rows in expected.parts.items()}
        assert {part.name: part.weight for part in opinion.parts} == trainer.rewards.weights
        totals.add(opinion.total)
    assert len(totals) == 2


def test_a_function_of_the_users_own_is_not_run_unless_it_is_given_and_is_named_as_missing(
    train_tiny: Callable[..., TinyRun], finished: TinyRun
) -> None:
    settings = {"dataset": finished.trainer.config.dataset, "reward": {"letters": 1.0, "length": 0.5}}
    run = train_tiny(**settings, reward_functions={"letters": mean_letter})
    player = Player.open(run.path)
    reply = asked(player)
    opinion = player.opinion(ASKED, reply)
    length, letters = opinion.parts
    assert (letters.name, letters.raw, letters.counted, opinion.complete) == ("letters", None, None, False)
    assert "not run without --allow-code" in letters.why
    assert opinion.total == length.counted == pytest.approx(-0.5 * reply.length / 6)

    allowed = Player.open(run.path, reward_functions={"letters": mean_letter}).opinion(ASKED, reply)
    assert allowed.complete
    assert allowed.total == pytest.approx(mean_letter([list(reply.completion.token_ids)])[0] - 0.5 * reply.length / 6)

    def needs(completions: list[Any], chosen: list[str]) -> list[float]:
        return [float(len(text)) for text in chosen]

    columns = Player.open(run.path, reward_functions={"letters": needs})
    assert "needs 'chosen', which the dataset does not have" in columns.opinion(ASKED, reply).parts[0].why
    held_out = columns.prompts()[0]
    messages = list(held_out.messages)
    assert columns.opinion(messages, asked(columns, messages=messages)).parts[0].raw == len(held_out.columns["chosen"])


def test_a_run_rewarded_by_a_function_from_python_has_no_opinion_and_no_prompts(train_tiny: Callable[..., TinyRun]) -> None:
    player = Player.open(train_tiny().path)
    opinion = player.opinion(ASKED, asked(player))
    assert (opinion.total, opinion.complete, len(opinion.parts)) == (None, False, 1)
    assert "given in Python" in opinion.parts[0].why
    assert "rows given in Python" in opinion.notes[-1]
    with pytest.raises(DataError, match="rows given in Python"):
        player.prompts()


def test_the_prompts_are_those_of_the_evaluation_and_none_is_trained_on(player: Player, finished: TinyRun) -> None:
    data = finished.trainer.data
    assert player.prompts() == list(data.held_out_prompts) != []
    assert not {prompt.prompt_id for prompt in player.prompts()} & {prompt.prompt_id for prompt in data.prompts}


def test_without_the_dataset_there_are_no_prompts_and_the_opinion_says_so(finished: TinyRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(recipe.replace(finished.trainer.config.dataset, str(tmp_path / "gone.jsonl")), encoding="utf-8")
    player = Player.open(run)
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        player.prompts()
    opinion = player.opinion(ASKED, asked(player))
    assert opinion.complete
    assert "the run's dataset cannot be read" in opinion.notes[-1]


# ---- the run directory


def test_nothing_of_the_run_is_written_and_a_chat_locks_nobody_out(finished: TinyRun) -> None:
    before = state(finished.path)
    player = Player.open(finished.path)
    player.opinion(ASKED, asked(player))
    player.prompts()
    with RunDirectory.open(finished.path):
        asked(player, "base")
    assert {path: one for path, one in state(finished.path).items() if path.name != ".lock"} == {
        path: one for path, one in before.items() if path.name != ".lock"
    }


def test_another_base_than_the_runs_is_refused(finished: TinyRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    base = json.loads((run / "base.json").read_text(encoding="utf-8"))
    base["crc32"]["model.norm.weight"] = "another"
    (run / "base.json").write_text(json.dumps(base), encoding="utf-8")
    with pytest.raises(ResumeError, match=r"is not what .* began with: model.norm.weight differs"):
        Player.open(run)


def test_beside_a_run_that_is_written_a_copy_is_loaded_only_when_asked(finished: TinyRun) -> None:
    assert writer_of(finished.path) is None
    assert playing_device(finished.path) == torch.device("cpu")
    answer = asked(Player.open(finished.path))
    with RunDirectory.open(finished.path):
        writer = writer_of(finished.path)
        assert writer is not None
        assert writer.startswith("process ")
        with pytest.raises(
            ValueError, match=rf"is being written by {writer}, on the CPU, and this machine has no other .*--beside"
        ) as refused:
            Player.open(finished.path)
        assert str(finished.path) in str(refused.value)
        assert asked(Player.open(finished.path, beside=True)) == answer
    assert writer_of(finished.path) is None


def test_a_runs_start_says_which_device_it_is_on(finished: TinyRun, tmp_path: Path) -> None:
    (start,) = (event for event in finished.lines("events.jsonl") if event["kind"] == "start")
    assert start["device"] == "cpu"
    assert device_of(finished.path) == device_record(torch.device("cpu")) == {"device": "cpu"}
    assert device_of(tmp_path) == {}
    (tmp_path / "events.jsonl").write_text('{"kind": "start", "device": "H100", "uuid": "a"}\n{"kind": "start", "dev', encoding="utf-8")
    assert device_of(tmp_path) == {"device": "H100", "uuid": "a"}
    (tmp_path / "events.jsonl").unlink()
    (tmp_path / "run.json").write_text('{"environment": {"device": "Tesla T4"}}', encoding="utf-8")
    assert device_of(tmp_path) == {"device": "Tesla T4"}

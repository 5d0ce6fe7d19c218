"""Whole runs from the command line on a tiny random Gemma 3: what is printed, what is written, and what never is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from gemma_grpo.cli import run

ROWS = Path(os.environ.get("HH_RLHF_DIR", "../shared/data/hh-rlhf"))
TINY = (
    *("batch_size=2", "gradient_accumulation_steps=1", "num_generations=2", "planning_steps=1", "max_completion_length=4"),
    *("max_prompt_length=200", "max_steps=2", "gradient_checkpointing=false", "precision=fp32"),
    *("reward_model.batch_size=4", "reward_model.max_pairs=8", "evaluation.num_prompts=3", "data.holdout=0.3"),
)
RULE = "reward={length: 1.0}"
VARIED = "reward={judge: 1.0}"
"""Tells any two replies apart."""


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    conversations = [f"\n\nHuman: Say {n}\n\nAssistant:" for n in range(24)]
    return write_rows(tmp_path / "pairs.jsonl", [{"chosen": f"{text} ok", "rejected": f"{text} no no"} for text in conversations])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}", "answer": str(n)} for n in range(24)])


def train(model: Path, dataset: Path, output: Path, *words: str) -> int:
    return run(["train", "miniature", f"model_name={model}", f"dataset={dataset}", f"output_dir={output}", *TINY, *words])


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """stderr of a run that ended with 2: one error, no trace."""
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


def test_train_writes_the_run_directory_and_evaluate_and_report_read_it(
    tiny_model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train(tiny_model_dir, pairs, output) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "2 prompts x 1 accumulation x 2 completions = 4 completions per update" in printed
    assert "reward adapter" in printed
    assert f"{output / 'report.html'}" in printed

    files = {"recipe.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "evaluation.json", "report.html"}
    assert files <= {path.name for path in output.iterdir()}
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()] == [1, 2]
    assert json.loads((output / "run.json").read_text(encoding="utf-8"))["status"] == "finished"

    before = (output / "evaluation.json").read_bytes()
    assert run(["evaluate", str(output)]) == 0, capsys.readouterr().err
    after = json.loads((output / "evaluation.json").read_bytes())
    assert {**after, "seconds": 0} == {**json.loads(before), "seconds": 0}

    capsys.readouterr()
    assert run(["evaluate", str(output), "--baselines"]) == 0
    head, reward = (line for line in capsys.readouterr().out.splitlines() if "this run" in line or line.startswith("reward (proxy)"))
    assert [name for name in ("this run", "best of 4", "best of 16", "DPO", "SFT") if name not in head] == []
    assert reward.count("[") == 5

    (output / "report.html").unlink()
    assert run(["report", str(output)]) == 0
    assert "Beside the plain ways" in (output / "report.html").read_text(encoding="utf-8")
    assert (output / "report.html").read_text(encoding="utf-8").startswith("<!")


@pytest.mark.slow
def test_a_profile_is_printed_written_and_in_the_report(
    tiny_model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train(tiny_model_dir, prompts, output, VARIED, "--profile") == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert printed.index("Where the time of a step goes") < printed.index("rollout  ") < printed.index("adapter: ")
    profile = json.loads((output / "profile.json").read_text(encoding="utf-8"))
    assert profile["steps"] == {"earlier": 0, "profiled": 2, "counted": [2, 2]}
    assert profile["advice"] in printed
    assert profile["advice"] in (output / "report.html").read_text(encoding="utf-8")

    code = run(["train", "miniature", "--dry-run", "--profile"])
    assert "--dry-run makes no step, so there is nothing to profile." in refused(capsys, code)


@pytest.mark.slow
def test_the_resolved_recipe_repeats_the_run(tiny_model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    assert train(tiny_model_dir, prompts, tmp_path / "first", VARIED) == 0
    assert run(["train", str(tmp_path / "first" / "recipe.yaml"), f"output_dir={tmp_path / 'second'}"]) == 0
    first, second = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("first", "second"))
    assert first == second


@pytest.mark.slow
def test_runs_are_compared_by_their_evaluations_and_by_the_settings_in_which_they_differ(
    tiny_model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("first", 0), ("second", 1)):
        words = ["train", "miniature", f"model_name={tiny_model_dir}", f"dataset={prompts}", f"output_dir={tmp_path / name}", VARIED, *TINY]
        assert run([*words, f"seed={seed}"]) == 0
    capsys.readouterr()
    assert run(["compare", str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["first", "second"]
    values = {name: json.loads((tmp_path / name / "evaluation.json").read_text(encoding="utf-8")) for name in ("first", "second")}
    length = next(line for line in lines if line.startswith("length"))
    assert [f"{values[name]['length']['after']:.1f}" in length for name in values] == [True, True]
    assert lines[-1].split() == ["seed", "0", "1"]
    # they differ by their seed alone: the mean of the gains, the lowest and the highest
    gains = sorted(values[name]["length"]["gain"] for name in values)
    told = [line.split() for line in lines if line.startswith("length")][1]
    assert told == ["length", *(f"{value + 0.0:+.1f}" for value in (sum(gains) / 2, *gains))]
    assert run(["compare", str(tmp_path / "first"), str(tmp_path / "first")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the settings are the same"
    assert run(["compare", str(tmp_path / "first")]) == 2
    assert "needs two runs or more" in capsys.readouterr().err


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    tiny_model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(["train", "miniature", f"model_name={tiny_model_dir}", f"dataset={prompts}", RULE, *TINY, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "2 steps" in printed
    assert "length x 1" in printed
    assert "user: Say " in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_train_reward_stops_after_the_reward_adapter(
    tiny_model_dir: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "reward-only"
    words = ["train-reward", "miniature", f"model_name={tiny_model_dir}", f"dataset={pairs}", f"output_dir={output}", *TINY]
    assert run(words) == 0, capsys.readouterr().err
    assert (output / "reward" / "calibration.json").is_file()
    assert not (output / "adapter").exists()
    assert "right on" in capsys.readouterr().out

    # and its folder serves a later run instead of training again
    assert train(tiny_model_dir, pairs, tmp_path / "policy", f"reward_model.path={output / 'reward'}") == 0, capsys.readouterr().err
    assert not (tmp_path / "policy" / "reward" / "adapter_model.safetensors").exists()


# ---- bad input: refused with 2 before anything is written


def test_prompts_without_a_reward_say_what_to_give(
    tiny_model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, train(tiny_model_dir, prompts, tmp_path / "run"))
    assert "prompts but no preference pairs" in err
    assert not (tmp_path / "run").exists()


def test_an_unknown_reward_gets_the_nearest_name(
    tiny_model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, train(tiny_model_dir, prompts, tmp_path / "run", "reward={repetiton: 1.0}"))
    assert "repetition" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", '{"text": "no prompt"}\n', '{"prompt": "cut', "[1, 2]\n"])
def test_rows_that_cannot_be_used_leave_nothing_behind(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(content, encoding="utf-8")
    assert str(rows) in refused(capsys, train(tiny_model_dir, rows, tmp_path / "run", RULE))
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_all_longer_than_the_limit_are_refused(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "long.jsonl", [{"prompt": f"{n} " * 200} for n in range(8)])
    err = refused(capsys, train(tiny_model_dir, rows, tmp_path / "run", RULE))
    assert "max_prompt_length" in err
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_is_a_file_or_holds_a_run_stays_as_it_is(
    tiny_model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    assert "is a file" in refused(capsys, train(tiny_model_dir, prompts, file, RULE))
    assert file.read_text(encoding="utf-8") == "mine"

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "recipe.yaml").write_text("seed: 7\n", encoding="utf-8")
    assert "cannot go on with other settings" in refused(capsys, train(tiny_model_dir, prompts, taken, RULE))
    assert [path.name for path in taken.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_a_folder_that_is_no_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    refused(capsys, run([verb, str(tmp_path)]))
    refused(capsys, run([verb, str(tmp_path / "nowhere")]))
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_that_is_not_there_is_refused(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, train(tmp_path / "no-model", prompts, tmp_path / "run", RULE))
    assert not (tmp_path / "run").exists()


# ---- once more


def state(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_ends_well_again_and_no_file_of_it_is_changed(
    tiny_model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train(tiny_model_dir, prompts, output, VARIED) == 0, capsys.readouterr().err
    before = state(output)
    capsys.readouterr()
    for words in ((), ("--resume",)):
        assert train(tiny_model_dir, prompts, output, VARIED, *words) == 0
        printed = capsys.readouterr()
        assert f"nothing to do: {output} finished at step 2" in printed.out
        assert printed.err == ""
        assert state(output) == before


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_says_what_differs_and_ends_well(
    tiny_model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train(tiny_model_dir, prompts, output, VARIED) == 0, capsys.readouterr().err
    info = json.loads((output / "run.json").read_text(encoding="utf-8"))
    threads = info["environment"]["threads"]
    info["environment"] |= {"threads": threads + 3, "torch": "0.1"}
    (output / "run.json").write_text(json.dumps(info), encoding="utf-8")
    assert train(tiny_model_dir, prompts, output, VARIED, "save_steps=1") == 0, capsys.readouterr().err
    said = f"warning: not bit for bit: torch 0.1 -> {info['versions']['torch']}, threads {threads + 3} -> {threads}"
    assert said in capsys.readouterr().out
    assert said.removeprefix("warning: ") in (output / "events.jsonl").read_text(encoding="utf-8")


# ---- the shipped miniature


@pytest.mark.slow
def test_the_demo_takes_the_whole_road(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    words = ["max_steps=1", "evaluation.num_prompts=16", "reward_model.max_pairs=64", "data.holdout=0.03"]
    assert run(["demo", "--seed", "3", "--output-dir", str(output), *words]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    for name in ("reward adapter", "gold score", "win rate", "refusals, benign prompts", "time", f"report: {output / 'report.html'}"):
        assert name in printed


@pytest.mark.slow
@pytest.mark.skipif(not ROWS.is_dir(), reason="the hh-rlhf rows are not on this machine (HH_RLHF_DIR)")
def test_the_miniature_trains_on_real_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ROWS / "harmless-base.dev.jsonl.gz"
    words = ["max_steps=1", "evaluation.num_prompts=8", "reward_model.max_pairs=32", "batch_size=4", "data.holdout=0.02"]
    assert run(["train", "miniature", f"dataset={rows}", f"output_dir={tmp_path / 'run'}", *words]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    counts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["data"]
    assert (counts["rows"], counts["kept"]) == (1700, 1692)

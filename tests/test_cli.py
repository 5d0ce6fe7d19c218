"""The command line: exit codes, errors in one shape, and nothing half-written."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gemma_grpo.access import AccessError
from gemma_grpo.cli import run
from gemma_grpo.cli.errors import Exit, exit_code, explained
from gemma_grpo.cli.summary import evaluation_lines, reward_lines, time_line
from gemma_grpo.config import load_recipe, shipped_recipes
from gemma_grpo.data.batch import GroupBatch, pad_groups
from gemma_grpo.model.memory import DoesNotFitError, TokenBudget

ROWS = Path(os.environ.get("HH_RLHF_DIR", "../shared/data/hh-rlhf"))
real_rows = pytest.mark.skipif(not ROWS.is_dir(), reason="the hh-rlhf rows are not on this machine (HH_RLHF_DIR)")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """(exit code, stderr) of a command line that must not print a trace, nor an empty error."""
    code = run(words)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return code, err


# ---- verbs and settings


@pytest.mark.parametrize("line", ["nope", "train", "data preview", "train miniature --nope", "demo --seed x"])
def test_wrong_usage_ends_with_2_and_names_the_help(capsys: pytest.CaptureFixture[str], line: str) -> None:
    code, err = refusal(capsys, *line.split())
    assert code == 2
    assert "--help" in err


@pytest.mark.parametrize("words", [[], ["data"], ["recipes"]], ids=str)
def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run(words) == 2
    assert "Usage: gemma-grpo" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["train", "train-reward"])
def test_all_wrong_settings_are_printed_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("lerning_rate: 1\nnum_generations: 1\n", encoding="utf-8")
    code, err = refusal(capsys, verb, str(recipe), "seed=x", "oops")
    assert code == 2
    assert err.replace(f"{tmp_path}/", "").splitlines() == [
        "error: 4 problems in the settings:",
        "  mine.yaml:1: lerning_rate: no such setting. Did you mean 'learning_rate'?",
        "  mine.yaml:2: num_generations: is 1; must be at least 2. Default 8.",
        "  command line: oops: is not key=value. Write a setting and its value, such as max_steps=20.",
        "  command line: seed: is 'x'; a whole number is needed. Default 0.",
    ]


def test_debug_adds_the_trace_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "miniature", "seed=x", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unknown_recipe_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = refusal(capsys, "train", "miniatur")
    assert code == 2
    assert "Did you mean 'miniature'?" in err


# ---- recipes


def test_recipes_are_listed_shown_and_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped_recipes())

    assert run(["recipes", "show", "miniature"]) == 0
    assert "model_name: miniature" in capsys.readouterr().out

    target = tmp_path / "mine.yaml"
    assert run(["recipes", "copy", "miniature", str(target)]) == 0
    assert load_recipe(target) == load_recipe("miniature")


def test_copying_never_overwrites(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("seed: 3\n", encoding="utf-8")
    code, err = refusal(capsys, "recipes", "copy", "miniature", str(target))
    assert code == 2
    assert "exists already" in err
    assert target.read_text(encoding="utf-8") == "seed: 3\n"


# ---- data


def pair(prompt: str, chosen: str, rejected: str) -> str:
    return json.dumps({side: f"\n\nHuman: {prompt}\n\nAssistant: {reply}" for side, reply in (("chosen", chosen), ("rejected", rejected))})


def test_stats_count_every_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([pair("Hi", "Hello", "Go"), pair("Hi", "Hello", ""), '{"text": 1}']) + "\n", encoding="utf-8")
    assert run(["data", "stats", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rows"], facts["kept"]) == (3, 1)
    assert facts["dropped"] == {"empty_final_reply": 1, "prompts_differ": 0, "roles_do_not_alternate": 0, "not_a_pair": 1}

    assert run(["data", "stats", str(path)]) == 0
    assert "empty_final_reply 1" in capsys.readouterr().out


def test_preview_shows_turns_and_no_control_character(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([pair("Say\nhi \x1b[2J", "Hello", "Go")] * 4) + "\n", encoding="utf-8")
    assert run(["data", "preview", str(path), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "--- row 1"
    assert "     user  Say\n           hi \\x1b[2J\n   chosen  Hello\n rejected  Go\n" in shown
    assert shown.splitlines()[-1] == "--- 4 rows, 4 usable, read as transcripts"
    assert "\x1b" not in shown


@real_rows
@pytest.mark.parametrize(
    ("name", "rows", "kept", "dropped"),
    [("harmless-base", 1700, 1692, (3, 3, 2)), ("helpful-base", 1681, 1666, (4, 7, 4))],
)
def test_stats_of_real_rows(capsys: pytest.CaptureFixture[str], name: str, rows: int, kept: int, dropped: tuple[int, int, int]) -> None:
    assert run(["data", "stats", str(ROWS / f"{name}.dev.jsonl.gz"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rows"], facts["kept"]) == (rows, kept)
    assert facts["dropped"] == dict(zip(("empty_final_reply", "prompts_differ", "roles_do_not_alternate"), dropped, strict=True))


BAD_FILES = {
    "missing.jsonl": (None, "no such file"),
    "empty.jsonl": (b"", "is empty"),
    "pointer.jsonl.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "cut.jsonl.gz": (gzip.compress(os.urandom(5000))[:-900], "gz"),
    "words.jsonl": (b'{"text": "no pair"}\n', "none of 1 rows is usable"),
    "half.jsonl": (b'{"chosen": "a', "not JSON"),
    "rows.csv": (b"chosen,rejected\n", "holds no rows"),
    "rows.txt": (b"chosen,rejected\n", "unknown kind of file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("verb", ["stats", "preview"])
def test_data_that_cannot_be_used_ends_with_2(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, verb: str) -> None:
    content, what = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, err = refusal(capsys, "data", verb, str(tmp_path / name))
    assert code == 2
    assert what in err
    assert name in err


# ---- exceptions of other libraries


def raised(error: BaseException) -> BaseException:
    """The error as it is caught, with a trace outside the package."""
    try:
        raise error
    except BaseException as caught:
        return caught


def test_an_access_error_ends_with_4_and_is_printed_line_by_line() -> None:
    error = raised(AccessError("google/gemma-3-1b-it is gated.", "1. Open the page.", "2. hf auth login \x1b[2J"))
    assert exit_code(error) == Exit.ACCESS
    assert explained(error) == "error: google/gemma-3-1b-it is gated.\n  1. Open the page.\n  2. hf auth login \\x1b[2J"


def test_memory_that_runs_out_ends_with_1_and_says_what_to_lower() -> None:
    prompts = pad_groups([[2, 5]], [[[6, 7, 8]]])

    def exhausted(piece: GroupBatch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(DoesNotFitError) as refused:
        list(TokenBudget(None).run(prompts, exhausted, doing="learning"))
    assert exit_code(refused.value) == Exit.RUNTIME
    first, remedy = explained(refused.value).splitlines()
    assert first.startswith("error: out of memory on cpu while learning: one completion of 3 tokens after a prompt of 2 does not fit")
    assert remedy.startswith("  Lower max_completion_length or max_prompt_length")


def test_anything_unexpected_ends_with_1_and_names_its_type_and_the_way_to_the_trace() -> None:
    error = raised(KeyError("\x1b[2J"))
    assert exit_code(error) == Exit.RUNTIME
    assert explained(error).splitlines() == ["error: KeyError: '\\x1b[2J'", "  Run again with --debug for the whole trace."]


# ---- where the text goes


def program(words: str, *, stdout: str = "", cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script in a shell, its output sent to `stdout`."""
    line = f"{sys.executable} -m gemma_grpo.cli {words} {stdout}"
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    return subprocess.run(line, shell=True, env=settings, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_a_path_that_the_terminal_cannot_show_is_spelled_out(tmp_path: Path, tiny_model_dir: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "modèle")
    done = program("plan miniature model_name=modèle", cwd=tmp_path, LC_ALL="C", PYTHONUTF8="1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "mod\\xe8le" in done.stdout
    refused = program("plan miniature model_name=./là", cwd=tmp_path, PYTHONUTF8="1", PYTHONIOENCODING="ascii")
    assert refused.returncode == 2
    assert refused.stderr == "error: ./l\\xe0: no such folder.\n  Check the path.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full, as Linux has it")
@pytest.mark.parametrize("words", ["plan miniature", "recipes list"])
def test_output_that_cannot_be_written_is_an_error_with_its_remedy(words: str) -> None:
    done = program(words, stdout="> /dev/full", PYTHONUNBUFFERED="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[:1] == ["error: the output takes no more (No space left on device)."]
    unbuffered = program(words, stdout="> /dev/full", PYTHONUNBUFFERED="1")
    assert unbuffered.returncode == 1
    assert unbuffered.stderr.startswith("error: the output or a file takes no more (No space left on device).\n")
    (remedy,) = done.stderr.splitlines()[1:]
    assert remedy == "  Make room, or write to another disk: output_dir=FOLDER for a run, `> FILE` for what is printed."


def test_nobody_reading_the_output_is_no_error_to_talk_about() -> None:
    assert program("plan miniature", stdout="| true", PYTHONUNBUFFERED="").stderr == ""
    closed = program("plan miniature", stdout=">&-")
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_file_on_a_full_disk_is_named() -> None:
    error = raised(OSError(errno.ENOSPC, "No space left on device", "runs/a/events.jsonl"))
    assert exit_code(error) == Exit.RUNTIME
    assert explained(error).splitlines()[0] == "error: runs/a/events.jsonl takes no more (No space left on device)."


# ---- what is printed at the end


METRIC = {"before": 0.4, "after": 0.55, "gain": 0.15, "interval": [0.1, 0.2], "n": 300}


def test_the_summary_shows_before_after_gain_and_interval() -> None:
    evaluation = {
        "gold": METRIC,
        "win_rate": {"before": 0.5, "after": 0.7, "gain": 0.2, "interval": [0.15, 0.25], "n": 300, "judge": "gold"},
        "refusal_benign": {"before": 0.125, "after": 0.1, "gain": -0.025, "interval": None, "n": 240},
        "refusal_harmful": {"before": None, "after": None, "gain": None, "interval": None, "n": 0},
    }
    gold, wins, benign = (" ".join(line.split()) for line in evaluation_lines(evaluation))
    assert gold == "gold score 0.400 -> 0.550 gain +0.150 [95 %: 0.1 to 0.2], 300 replies"
    assert wins == "win rate against before 70.0% [95 %: 65.0% to 75.0%], judged by gold"
    assert benign == "refusals, benign prompts 12.5% -> 10.0% gain -2.5%, 240 replies"
    assert evaluation_lines({}) == []


def test_the_reward_adapter_is_shown_with_its_interval() -> None:
    (line,) = reward_lines({"accuracy": {"value": 0.781, "interval": [0.75, 0.81], "n": 640}})
    assert " ".join(line.split()) == "reward adapter right on 78.1% [95 %: 75.0% to 81.0%], 640 pairs, held out"
    assert reward_lines({}) == []


def test_time_is_split_by_the_events_of_the_run(tmp_path: Path) -> None:
    events = [
        {"kind": "phase", "name": "reward adapter", "seconds": 30.0},
        {"kind": "step_time", "step": 1, "seconds": {"rollout": 2.0, "update": 3.0}},
        {"kind": "step_time", "step": 2, "seconds": {"rollout": 4.0, "update": 5.0}},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    line = " ".join(time_line(tmp_path, 50.0).split())
    assert line == "time 50 s: reward adapter 30, rollout 6, update 8, everything else 6"

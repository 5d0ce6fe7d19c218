"""`--allow-code FILE`: nothing runs without it, what runs is shown first, and other code than a run began with is asked about."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_grpo.cli import run

TINY = (
    *("batch_size=2", "gradient_accumulation_steps=1", "num_generations=2", "planning_steps=1", "max_completion_length=4"),
    *("max_prompt_length=200", "max_steps=1", "gradient_checkpointing=false", "precision=fp32"),
    *("evaluation.num_prompts=2", "data.holdout=0.3", "reward={vowels: 1.0, length: 0.1}"),
)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Workplace:
    """A dataset, a file of code that leaves a trace when it is run, and where the run goes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.model, self.output, self.canary = model, folder / "run", folder / "canary"
        self.rows, self.code = folder / "rows.jsonl", folder / "mine.py"
        self.rows.write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(12)), encoding="utf-8")
        self.write_code("aeiou")

    def write_code(self, vowels: str) -> None:
        self.code.write_text(
            f"from pathlib import Path\nPath({str(self.canary)!r}).touch()\n\n"
            "def vowels(completions):\n"
            f"    return [sum(turns[0]['content'].count(letter) for letter in {vowels!r}) for turns in completions]\n",
            encoding="utf-8",
        )

    def words(self, *more: str) -> list[str]:
        return ["train", "miniature", f"model_name={self.model}", f"dataset={self.rows}", f"output_dir={self.output}", *TINY, *more]

    def recorded(self) -> dict[str, str]:
        return dict(json.loads((self.output / "run.json").read_text(encoding="utf-8"))["code"])


@pytest.fixture
def place(tmp_path: Path, small_model_dir: Path) -> Workplace:
    return Workplace(tmp_path, small_model_dir)


@pytest.fixture
def trained(place: Workplace, capsys: pytest.CaptureFixture[str]) -> Workplace:
    """A run that began with the file as it is."""
    assert run(place.words("--allow-code", str(place.code))) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    shown = f"code: {place.code}\n      sha256 {sha256(place.code)}\n"
    assert printed.startswith(shown)  # before anything else happens
    place.canary.unlink()
    return place


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    code = run(words)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ")
    return err


def test_a_recipe_cannot_run_code_by_itself(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs --allow-code FILE" in refused(capsys, place.words())
    assert "no such setting" in refused(capsys, place.words(f"allow_code={place.code}"))
    assert "no such setting" in refused(capsys, place.words(f"reward_functions={{vowels: {place.code}}}"))
    assert "No such option" in refused(capsys, ["demo", "--allow-code", str(place.code)])
    assert not place.canary.exists()
    assert not place.output.exists()


def test_what_the_code_scored_and_which_code_it_was_are_in_the_run(trained: Workplace) -> None:
    assert trained.recorded() == {"path": str(trained.code), "sha256": sha256(trained.code)}
    first = json.loads((trained.output / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    for completion in first["completions"]:
        assert completion["parts"]["vowels"] == sum(map(completion["text"].count, "aeiou"))
        assert completion["reward"] == pytest.approx(completion["parts"]["vowels"] + 0.1 * completion["parts"]["length"])
    assert not list(trained.code.parent.glob("__pycache__"))


def test_going_on_and_evaluating_need_the_code_again(trained: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    more, evaluate = trained.words("max_steps=2"), ["evaluate", str(trained.output)]
    more.remove("max_steps=1")
    for words in (more, evaluate):
        assert "needs --allow-code FILE" in refused(capsys, words)
        assert not trained.canary.exists()
        assert run([*words, "--allow-code", str(trained.code)]) == 0, capsys.readouterr().err
        assert trained.canary.exists()
        trained.canary.unlink()
    assert len((trained.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_other_code_is_refused_with_both_hashes_until_its_own_is_given(trained: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    began = sha256(trained.code)
    trained.write_code("xyz")
    now = sha256(trained.code)
    more = [*trained.words("max_steps=2", "--allow-code", str(trained.code))]
    more.remove("max_steps=1")
    for words in (more, ["evaluate", str(trained.output), "--allow-code", str(trained.code)]):
        err = refused(capsys, words)
        assert f"began with code of the sha256 {began}" in err
        assert f"--allow-code {trained.code} --code-sha256 {now}" in err
        assert f"has the sha256 {now}, not {began} as --code-sha256 says" in refused(capsys, [*words, "--code-sha256", began])
        assert not trained.canary.exists()
    assert trained.recorded()["sha256"] == began
    assert run([*more, "--code-sha256", now.upper()]) == 0, capsys.readouterr().err
    assert trained.canary.exists()
    assert trained.recorded()["sha256"] == now


@pytest.mark.parametrize("content", ['{"status": "running"}', "{not json", '{"code": 7}', "[]"])
def test_a_run_that_does_not_say_its_code_began_with_another(
    place: Workplace, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    place.output.mkdir()
    (place.output / "recipe.yaml").write_text("reward: {vowels: 1.0}\n", encoding="utf-8")
    (place.output / "run.json").write_text(content, encoding="utf-8")
    err = refused(capsys, ["evaluate", str(place.output), "--allow-code", str(place.code)])
    assert "began with code of the sha256 unknown" in err
    assert not place.canary.exists()


def test_a_hash_without_a_file_is_refused(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Give the file too: --allow-code FILE" in refused(capsys, place.words("--code-sha256", "0" * 64))


# ---- on a terminal


def on_a_terminal(words: list[str], answer: bytes) -> tuple[int, str]:
    """Exit code and all that a terminal showed."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gemma_grpo.cli", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"}) as process:
        os.close(theirs)
        os.write(ours, answer)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    return process.returncode, shown.decode(errors="replace")


@pytest.mark.parametrize("answer", [b"\n", b"n\n"])
def test_on_a_terminal_the_answer_is_no_unless_it_is_yes(trained: Workplace, answer: bytes) -> None:
    trained.write_code("xyz")
    code, shown = on_a_terminal(["evaluate", str(trained.output), "--allow-code", str(trained.code)], answer)
    assert code == 2, shown
    assert "Run it? [y/N]" in shown
    assert "was not run" in shown
    assert not trained.canary.exists()


def test_on_a_terminal_yes_runs_it(trained: Workplace) -> None:
    trained.write_code("xyz")
    code, shown = on_a_terminal(["evaluate", str(trained.output), "--allow-code", str(trained.code)], b"y\n")
    assert code == 0, shown
    assert trained.canary.exists()

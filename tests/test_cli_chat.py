"""`gemma-grpo chat`: from a pipe and in a terminal, what is said is kept, and no model's text can do more than be read."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import PATIENCE, Process, forked
from conftest import PAIR_ROWS, TinyRun
from safetensors.torch import load_file, save_file

from gemma_grpo.cli.chat import difference_line, opinion_lines
from gemma_grpo.cli.conversation import BOTH, Conversation, free_file
from gemma_grpo.grpo.opinion import Opinion, Part
from gemma_grpo.grpo.playing import Player, Reply
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.types import Completion

ANSWER_LIMIT = 30


@pytest.fixture(scope="module")
def finished(train_tiny: Callable[..., TinyRun], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run whose model says random bytes, seldom stopping: control characters are among them."""
    rows = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIR_ROWS), encoding="utf-8")
    return train_tiny(
        model_name=str(tiny_model_dir), dataset=str(rows), reward={"length": 1.0, "empty": 0.5}, save_steps=1, max_prompt_length=120
    )


@pytest.fixture(scope="module")
def player(finished: TinyRun) -> Player:
    return Player.open(finished.path)


def reading_from(descriptor: int) -> None:
    """In a fork: the descriptor is its stdin."""
    os.dup2(descriptor, 0)
    sys.stdin = os.fdopen(os.dup(0), "r", encoding="utf-8")


def talk(finished: TinyRun, folder: Path, *lines: str, words: tuple[str, ...] = ()) -> Process:
    """The chat with these lines on its stdin, to its end."""
    read, write = os.pipe()
    os.write(write, "".join(line + "\n" for line in lines).encode())
    os.close(write)

    arguments = ["chat", str(finished.path), "--max-tokens", str(ANSWER_LIMIT), *words]
    process = forked(arguments, folder, before=lambda: reading_from(read))
    os.close(read)
    process.end()
    return process


def answer(player: Player, side: Any, messages: list[Any], seed: int = 0) -> Reply:
    *_, reply = player.stream(messages, side, seed=seed, max_tokens=ANSWER_LIMIT)
    assert isinstance(reply, Reply)
    return reply


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def saved(finished: TinyRun, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (finished.path / "chats" / name).read_text(encoding="utf-8").splitlines()]


# ---- from a pipe


def test_lines_from_a_pipe_are_answered_one_by_one_and_the_end_of_them_is_the_end(finished: TinyRun, tmp_path: Path) -> None:
    process = talk(finished, tmp_path, "hello", "/both")
    assert (process.code, process.err) == (0, "")
    found = [line for line in process.out.splitlines() if line.startswith(("you> ", "tuned> ", "base> "))]
    assert [line.partition("> ")[0] for line in found] == ["you", "tuned", "you", "base", "tuned"]
    assert found[0] == "you> hello"
    assert found[1] == found[4] != found[3].replace("base", "tuned", 1)
    assert process.out.count("[log tuned - log base: ") == 2
    assert talk(finished, tmp_path, "hello", "/quit", "never asked").out.endswith("you> /quit\n")


def test_each_side_goes_on_from_its_own_answers_and_a_file_keeps_what_was_said(finished: TinyRun, player: Player, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    lines = ["one", "/both", "two", "/base", "three", "/tuned", "/retry", "/reward", f"/save {kept}", f"/save {kept}", "/save", "/save"]
    process = talk(finished, tmp_path, *lines)
    assert process.code == 0, process.err
    header, *found = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert header == {"kind": "chat", "run": finished.path.name, "model": finished.trainer.config.model_name}
    expected: list[tuple[str, int, list[Any]]] = []
    said: dict[tuple[str, int], str] = {}

    def turn(side: str, messages: list[Any], seed: int = 0) -> dict[str, str]:
        expected.append((side, seed, messages))
        said[side, seed] = answer(player, side, messages, seed).text
        return model(said[side, seed])

    turn("tuned", [user("one")])
    talks = {side: [user("one"), turn(side, [user("one")]), user("two")] for side in ("base", "tuned")}
    talks = {side: [*talk, turn(side, talk), user("three")] for side, talk in talks.items()}
    turn("base", talks["base"])  # /base only: both had been asked "two"
    turn("tuned", talks["base"])  # had not been asked "three": it takes over the conversation
    turn("tuned", talks["base"], seed=1)
    assert [(one["side"], one["seed"], one["messages"]) for one in found] == expected
    last = answer(player, "tuned", talks["base"], seed=1)
    assert (found[-1]["reply"], found[-1]["length"], found[-1]["finish"]) == (last.text, last.length, last.finish)
    assert found[-1]["log_ratios"] == pytest.approx(last.log_ratios)
    assert found[-1]["reward"]["total"] == pytest.approx(player.opinion(talks["base"], last).total)
    assert "reward" not in found[-2]
    assert f"error: {kept} is there already, and is not written over." in process.out
    assert saved(finished, "chat-1.jsonl")[1:] == saved(finished, "chat-2.jsonl")[1:] == found


def test_held_out_prompts_adapters_and_mistakes(finished: TinyRun, player: Player, tmp_path: Path) -> None:
    count = len(player.prompts())
    lines = ["/retry", "/reward", "/save", "/both", "/prompt", "/prompt", f"/prompt {count + 1}", "/checkpoint step-1", "/checkpoint no"]
    process = talk(finished, tmp_path, *lines, "/new", "/retry", "/nonsense", "//help", "x" * 200, "/help", "")
    assert process.code == 0, process.err
    out = process.out
    for told in ("there is no question yet", "there is no answer yet for the reward", "there is no answer yet to save"):
        assert out.count(told) == (2 if told == "there is no question yet" else 1)
    assert "base and tuned from here on" in out
    for number in (1, 2):
        shown = [f"  {one['role']}: {one['content']}" for one in player.prompts()[number - 1].messages]
        assert "\n".join([f"held-out prompt {number} of {count}", *shown]) in out
    assert f"there is no held-out prompt '{count + 1}'; they are numbered 1 to {count}." in out
    assert "* step-00000001: after step 1" in out
    assert "has no adapter 'no'. Choose among adapter, step-00000002, step-00000001." in out
    assert "there is no command /nonsense." in out
    assert "you> //help\nbase> " in out
    assert "error: the last message alone has more than max_prompt_length (120) tokens" in out
    assert out.count("  /retry ") == 1


def test_what_no_longer_fits_is_left_out_oldest_first_and_said(finished: TinyRun, tmp_path: Path) -> None:
    process = talk(finished, tmp_path, *[f"{n} and some more words" for n in range(4)], "/save")
    assert "[the 2 oldest messages are left out: with them it is longer than max_prompt_length, 120 tokens]" in process.out
    name = process.out.splitlines()[-1].rpartition("/")[2]
    assert saved(finished, name)[1]["left_out"] == 0
    assert saved(finished, name)[-1]["left_out"] > 0


def test_an_unfit_question_is_forgotten_and_the_conversation_goes_on(finished: TinyRun, player: Player, tmp_path: Path) -> None:
    process = talk(finished, tmp_path, "one", "x" * 200, "two", f"/save {tmp_path / 'kept'}")
    assert process.code == 0
    last = json.loads((tmp_path / "kept").read_text(encoding="utf-8").splitlines()[-1])
    assert last["messages"] == [user("one"), model(answer(player, "tuned", [user("one")]).text), user("two")]


def test_no_word_of_a_model_reaches_the_terminal_as_anything_but_text(finished: TinyRun, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    lines = [line for n in range(8) for line in ("/new", f"say {n}")]
    process = talk(finished, tmp_path, *lines, f"/save {kept}", words=("--temperature", "1.5"))
    assert process.code == 0, process.err
    said = "".join(json.loads(line).get("reply", "") for line in kept.read_text(encoding="utf-8").splitlines())
    assert any(char < " " and char not in "\n\t" for char in said)
    assert "\ufffd" in said
    assert [char for char in process.out if not char.isprintable() and char not in "\n\t"] == []
    assert "\\x" in process.out
    # only a label, a command's echo or a note begins a line: a model's line break is followed by two spaces
    starts = ("you> ", "tuned> ", "  ", "on cpu", "loading", "a new", "saved")
    assert [line for line in process.out.splitlines() if not line.startswith(starts)] == []


def test_where_the_terminal_is_not_utf8_all_is_ascii(finished: TinyRun) -> None:
    words = [sys.executable, "-m", "gemma_grpo.cli", "chat", str(finished.path), "--max-tokens", "40"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(words, input="say \u00e9\n".encode("latin-1"), capture_output=True, env=environment, timeout=PATIENCE, check=True)
    assert done.stdout.split(b"tuned> ")[1].isascii()
    assert b"\\ufffd" in done.stdout or b"\\x" in done.stdout


def test_a_chat_is_not_kept_where_a_link_leads_out_of_the_run(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    assert free_file(run) == run / "chats" / "chat-1.jsonl"
    (run / "chats").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"is a link to .* outside the run directory"):
        free_file(run)


def test_an_answer_that_fails_ends_its_line_and_the_conversation_goes_on(finished: TinyRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    huge = {name: torch.full_like(weight, 1e38) for name, weight in weights.items()}
    save_file(huge, run / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    process = talk(TinyRun(SimpleNamespace(run_dir=run), {}), tmp_path, "hello", "/base", "again")
    assert process.code == 0, process.err
    assert "tuned> \nerror: the policy's logits are not finite at completion position 0: its weights have diverged.\n" in process.out
    assert "base from here on\nyou> again\nbase> " in process.out


# ---- refusals before a model is loaded, or beside a training


def test_a_run_that_is_written_is_refused_with_what_to_do(finished: TinyRun, tmp_path: Path) -> None:
    with RunDirectory.open(finished.path):
        process = talk(finished, tmp_path, "hello")
        assert process.code == 2
        assert "is being written by process" in process.err
        assert "--beside" in process.err
        assert "you> " not in process.out
        process = talk(finished, tmp_path, "hello", words=("--beside",))
        assert process.code == 0, process.err
        assert "tuned> " in process.out


@pytest.mark.parametrize("words", [("--checkpoint", "step-7"), ("--temperature", "-1"), ("--max-tokens", "0"), ("--code-sha256", "a")])
def test_wrong_options_end_with_2(finished: TinyRun, tmp_path: Path, words: tuple[str, ...]) -> None:
    process = talk(finished, tmp_path, "hello", words=words)
    assert process.code == 2
    assert process.err.startswith("error: ")


# ---- in a terminal


class Terminal:
    """The chat in a terminal of its own."""

    def __init__(self, finished: TinyRun, folder: Path, *words: str) -> None:
        self.master, slave = pty.openpty()
        self.shown = b""

        def before() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            reading_from(slave)

        self.process = forked(["chat", str(finished.path), *words], folder, prints={1: slave, 2: slave}, before=before)
        os.close(slave)

    def wait_for(self, text: str, after: int = 0) -> int:
        """Until the text is on the screen, behind this place; the place after it."""
        deadline = time.monotonic() + PATIENCE
        while text.encode() not in self.shown[after:]:
            assert time.monotonic() < deadline, self.shown.decode(errors="replace")
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.master, 65536)
                except OSError:  # the other side is closed
                    break
        assert text.encode() in self.shown[after:], self.shown.decode(errors="replace")
        return self.shown.index(text.encode(), after) + len(text.encode())

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())


def test_ctrl_c_ends_an_answer_and_keeps_it_and_at_the_prompt_it_leaves(finished: TinyRun, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    terminal = Terminal(finished, tmp_path, "--max-tokens", "1900", "--temperature", "1.3")
    at = terminal.wait_for("you> ")
    terminal.type("hello\n")
    at = terminal.wait_for("tuned> ", at)
    terminal.wait_for("\\x", at)  # it speaks
    terminal.type("\x03")
    at = terminal.wait_for("[interrupted after ", at)
    at = terminal.wait_for("you> ", at)
    terminal.type("go on\n")
    at = terminal.wait_for("tuned> ", at)
    terminal.wait_for("\\x", at)
    terminal.type("\x03")
    at = terminal.wait_for("you> ", terminal.wait_for("[interrupted after ", at))
    terminal.type(f"/save {kept}\n")
    at = terminal.wait_for("you> ", terminal.wait_for("saved 2 answers", at))
    terminal.type("\x03")
    terminal.process.end()
    assert terminal.process.code == 0
    assert b"Traceback" not in terminal.shown
    _, first, second = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert (first["finish"], second["finish"]) == ("interrupted", "interrupted")
    assert 0 < first["length"] < 1900
    # of what was kept in the history the oldest may be left out, which is counted; the whole is what was said
    assert second["messages"] == [user("hello"), model(first["reply"]), user("go on")]


def test_ctrl_d_leaves(finished: TinyRun, tmp_path: Path) -> None:
    terminal = Terminal(finished, tmp_path)
    terminal.wait_for("you> ")
    terminal.type("\x04")
    terminal.process.end()
    assert terminal.process.code == 0


# ---- parts


def test_a_side_that_was_not_asked_takes_over_the_conversation() -> None:
    talk = Conversation()
    assert talk.switch(("base",)) is False
    talk.ask("one")
    talk.answered("base", "1")
    assert talk.switch(("base",)) is False
    assert talk.switch(("tuned",)) is True
    assert talk.messages("tuned") == [user("one")]
    talk.answered("tuned", "I")
    assert talk.switch(BOTH) is True
    assert talk.messages("base") == talk.messages("tuned") == [user("one")]
    for side, text in (("base", "1"), ("tuned", "I")):
        talk.answered(side, text)  # type: ignore[arg-type]
    talk.ask("two")
    assert talk.messages("base") == [user("one"), model("1"), user("two")]
    assert talk.messages("tuned") == [user("one"), model("I"), user("two")]
    talk.answered("base", "2")
    talk.withdraw()
    assert talk.messages("base") == [user("one")]
    assert talk.messages("tuned") == [user("one")]
    talk.begin()
    assert talk.messages("base") == []


def reply(*tokens: tuple[str, float]) -> Reply:
    pieces, ratios = zip(*tokens, strict=True)
    completion = Completion("".join(pieces), tuple(range(len(pieces))), (0.0,) * len(pieces), "stop")
    return Reply("tuned", 0, completion.text, pieces, ratios, "stop", completion, 0)


def test_the_line_of_differences_names_the_largest() -> None:
    line = difference_line(reply(("a", 0.001), ("\x1bb", -1.5), ("c", 0.5), ("d", -0.25), ("", 2.0)))
    assert line == "  [log tuned - log base: +0.75 nats over 5 tokens, most at the end +2.00, '\\x1bb' -1.50, 'c' +0.50]"
    assert difference_line(reply(("a", 0.0))) == "  [log tuned - log base: +0.00 nats over 1 tokens, nowhere more than 0.005]"


def test_an_opinion_without_all_parts_says_so() -> None:
    parts = (Part("length", 0.5, -1.0, -0.5), Part("mine\x1b", 2.0, None, None, "not\x1brun"))
    assert opinion_lines("base", Opinion(-0.5, parts, ("cut off",))) == [
        "reward of base: -0.500 without the parts that could not be computed",
        "  length x 0.5    -1.000, counts -0.500",
        "  mine\\x1b x 2    none: not\\x1brun",
        "  [cut off]",
    ]
    assert opinion_lines("base", Opinion(None, parts[1:]))[0].startswith("reward of base: no part could score it")

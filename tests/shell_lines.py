"""Lines of a documented shell block: taken apart, checked against the real command line, run as a user would run them."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from gemma_grpo.cli import run
from gemma_grpo.cli.app import app
from gemma_grpo.config import load_recipe, parse_overrides

PROGRAM = "gemma-grpo"
TRAINS = ("train", "train-reward", "demo")
"""Verbs that settings of `runs with` are put on top of."""
MACHINE_DECIDES = ("doctor", "plan")
"""Verbs that may end with 3 where a page is right: what they say of a machine differs from machine to machine."""
ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0


@dataclass(frozen=True)
class Line:
    """One command line, continuation lines joined, its comment taken off."""

    text: str
    words: tuple[str, ...]

    @property
    def is_ours(self) -> bool:
        """The program alone: no pipe, no redirection, no variable."""
        return self.words[:1] == (PROGRAM,) and not set(self.text) & set("|<>$;&`")

    @property
    def ours(self) -> list[tuple[str, ...]]:
        """The words of every gemma-grpo in it, without the program's name: behind pipes, and what torchrun starts with -m."""
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars="|;&<>")
        lexer.whitespace_split = True
        found, part = [], list[str]()
        for token in [*lexer, ";"]:
            if set(token) <= set("|;&<>"):
                found.append(_words_of_ours(part))
                part = []
            else:
                part.append(token)
        return [words for words in found if words is not None]


def _words_of_ours(part: Sequence[str]) -> tuple[str, ...] | None:
    if PROGRAM in part[:2]:  # the first, or behind a variable that is set for it
        return tuple(part[part.index(PROGRAM) + 1 :])
    return tuple(part[part.index("gemma_grpo") + 1 :]) if "gemma_grpo" in part and part[part.index("gemma_grpo") - 1] == "-m" else None


def lines_of(block: str) -> list[Line]:
    """The command lines of a block; lines that are only a comment are left out."""
    found = []
    for text in block.replace("\\\n", " ").splitlines():
        words = tuple(shlex.split(text, comments=True))
        if words:
            found.append(Line(_without_comment(text), words))
    return found


def _without_comment(text: str) -> str:
    """What stands before a # that begins a word outside quotes."""
    quoted = ""
    for index, char in enumerate(text):
        if quoted:
            quoted = "" if char == quoted else quoted
        elif char in "'\"":
            quoted = char
        elif char == "#" and (index == 0 or text[index - 1].isspace()):
            return text[:index].strip()
    return text.strip()


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(verb, values) as the real command line reads them, nothing run. Raises what it raises for a wrong option or word."""
    command: Any = typer.main.get_command(app)
    context = command.make_context(PROGRAM, [word for word in words if word != "--debug"])
    names: list[str] = []
    while hasattr(command, "get_command"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        names.append(str(name))
        context = command.make_context(name, list(rest), parent=context)
    return " ".join(names), dict(context.params)


def check(words: Sequence[str]) -> None:
    """Raise for a verb, an option, a recipe or a setting that there is not."""
    _, values = parsed(words)
    if values.get("recipe") is not None:
        load_recipe(values["recipe"], parse_overrides(values.get("overrides") or [], values["recipe"]))
    elif values.get("overrides"):
        parse_overrides(values["overrides"], "miniature")


def on_top(words: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    """The words with `settings` replacing or following the KEY=VALUE that are there."""
    if not settings or words[0] not in TRAINS:
        return list(words)
    kept = [word for word in words if word.partition("=")[0] not in settings or word.startswith("-")]
    return [*kept, *(f"{key}={value}" for key, value in settings.items())]


def run_line(line: Line, folder: Path, settings: Mapping[str, str]) -> str:
    """What it printed, both streams. Raises AssertionError when it ends otherwise than a page's reader would expect."""
    if line.words[:2] == (PROGRAM, "watch"):
        return _watched(line, folder)
    if not line.is_ours:
        return _in_a_shell(line, folder)
    words = on_top(line.words[1:], settings)
    out = io.StringIO()
    with _standing_in(folder), redirect_stdout(out), redirect_stderr(out):
        code = run(words)
    allowed = (0, 3) if words[0] in MACHINE_DECIDES else (0,)
    assert code in allowed, f"{line.text}: exit code {code}\n{out.getvalue()}"
    return out.getvalue()


@contextmanager
def _standing_in(folder: Path) -> Iterator[None]:
    """The working directory, with nothing to read from the terminal."""
    before, stdin = Path.cwd(), sys.stdin
    os.chdir(folder)
    sys.stdin = io.StringIO("")
    try:
        yield
    finally:
        os.chdir(before)
        sys.stdin = stdin


def _environment(folder: Path) -> dict[str, str]:
    """With a program of the name in front of the path: this checkout's, by this interpreter."""
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    for name, words in ((PROGRAM, "-m gemma_grpo.cli"), ("python3", ""), ("python", "")):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        path.chmod(0o755)
    where = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": where, "HOME": str(folder)}


def _in_a_shell(line: Line, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line.text],
        cwd=folder,
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, f"{line.text}: exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def _watched(line: Line, folder: Path) -> str:
    """A server goes on until it is stopped: it must come as far as its link."""
    words = shlex.split(line.text.replace("~", str(folder)))
    process = subprocess.Popen(
        [*words, "--port", "0"], cwd=folder, env=_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "http://" in first, first + process.stdout.read()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=PATIENCE)
    return first


def check_shell(text: str) -> None:
    """Raise AssertionError where bash cannot read it; nothing is run."""
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

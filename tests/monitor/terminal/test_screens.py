"""Where a run is looked at decides how it is shown: real processes behind a real terminal, a pipe, and what is neither."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from gemma_grpo.monitor.terminal import ProgressView
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, StepRecord
text = "caf\\u00e9 \\u2502 \\u6f22\\u5b57"
prompt = Prompt("p", "s", ({"role": "user", "content": text},), (2,), "c")
group = ScoredGroup(RolloutGroup(prompt, (Completion(text, (1,), (0.0,), "stop"),) * 2, 0), (0.0, 1.0), {text: (0.0, 1.0)}, (0.0, 0.0))
with ProgressView() as view:
    view.phase("training", text)
    view.step(StepRecord(1, {"rollout": 1.0}, {"reward": 0.5, "reward_std": 0.1, "kl": 0.1}), 2, group)
    view.warn(text)
    view.table(text, [("phase", "seconds"), (text, "1")])
    print("an error of somebody", file=sys.stderr)
"""
MOVES = b"\x1b["


def shown(tmp_path: Path, *, terminal: bool, **environment: str) -> tuple[bytes, bytes]:
    """What the script writes to its standard output, a terminal or a pipe, and to standard error, which is a file."""
    ours = ("CI", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES", "JPY_PARENT_PID", "PYTHONIOENCODING", "LC_ALL", "LANG", "NO_COLOR")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"TERM": "xterm", "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8", **environment}
    ours_end, theirs = pty.openpty() if terminal else os.pipe()
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=theirs, stdout=theirs, stderr=errors, env=env)
        os.close(theirs)
        written = b""
        while True:
            try:
                block = os.read(ours_end, 65536)
            except OSError:  # a terminal that nobody writes to any more
                break
            if not block:
                break
            written += block
    os.close(ours_end)
    assert process.wait() == 0
    return written, (tmp_path / "errors").read_bytes()


def test_a_terminal_is_redrawn_and_has_what_unicode_has_to_give(tmp_path: Path) -> None:
    written, _ = shown(tmp_path, terminal=True)
    assert MOVES in written
    assert "━" in written.decode()
    assert "漢字" in written.decode()


def test_errors_that_go_to_a_file_go_on_going_there(tmp_path: Path) -> None:
    written, errors = shown(tmp_path, terminal=True)
    assert errors == b"an error of somebody\n"
    assert b"an error" not in written


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_terminal_that_is_not_utf_8_gets_ascii(tmp_path: Path, environment: dict[str, str]) -> None:
    written, _ = shown(tmp_path, terminal=True, **environment)
    assert MOVES in written
    assert written.isascii()
    assert b"caf\\xe9" in written


@pytest.mark.parametrize(
    ("terminal", "environment"),
    [
        (False, {}),
        (False, {"CI": "true", "FORCE_COLOR": "1"}),
        (False, {"TTY_COMPATIBLE": "1"}),
        (True, {"TERM": "dumb"}),
        (True, {"JPY_PARENT_PID": "1"}),  # `!gemma-grpo train` in a notebook
    ],
    ids=["pipe", "ci", "ci-that-says-tty", "dumb", "notebook-shell"],
)
def test_anything_else_gets_lines_of_ascii_and_no_control(tmp_path: Path, terminal: bool, environment: dict[str, str]) -> None:
    written, _ = shown(tmp_path, terminal=terminal, **environment)
    lines = written.decode("ascii").splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith("training: caf\\xe9")
    assert lines[1].startswith("step 1/2  reward 0.500")
    assert lines[2].startswith("warning: caf\\xe9")

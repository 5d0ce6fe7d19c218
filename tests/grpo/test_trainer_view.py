"""What a run shows while it goes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console

from gemma_grpo.monitor.terminal import ProgressView


def test_in_a_terminal_steps_are_seen_while_they_go_and_the_cursor_is_given_back(tiny_trainer: Callable[..., Any]) -> None:
    screen = io.StringIO()
    tiny_trainer(view=ProgressView(Console(file=screen, force_terminal=True, width=100, height=40))).train()
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("step 2/2")

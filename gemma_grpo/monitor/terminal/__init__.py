"""What a run shows while it goes: a live picture in a terminal, one output in a notebook, plain ASCII lines anywhere else.

view.py is what a trainer talks to, seen.py what it was told, pace.py how long it takes; picture.py arranges that for a size, witnesses.py
the looks in it, lines.py for a log; screens.py and notebook.py put it where people look. Model text is shown through escapes.visible.
"""

from gemma_grpo.monitor.terminal.pace import Schedule
from gemma_grpo.monitor.terminal.view import ProgressView

__all__ = ["ProgressView", "Schedule"]

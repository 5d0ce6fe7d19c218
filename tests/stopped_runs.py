"""Runs that are stopped at a chosen place, and what it means that two runs are the same."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch

from gemma_grpo import stopping, watchdog

LOGS = ("metrics.jsonl", "samples.jsonl", "witnesses.jsonl")


def assert_same_run(run: Any, expected: Any) -> None:
    """Logs, adapter, evaluation and the last checkpoint's optimizer and controllers, to the bit; of what settings they are may differ."""
    for name in LOGS:
        assert run.text(name) == expected.text(name), name
    adapter, other = run.adapter(), expected.adapter()
    assert adapter.keys() == other.keys()
    assert all(torch.equal(adapter[name], value) for name, value in other.items())
    assert {**run.evaluation, "seconds": 0} == {**expected.evaluation, "seconds": 0}
    last = max(path.name for path in (expected.path / "checkpoints").iterdir())
    one, two = (given.path / "checkpoints" / last for given in (run, expected))
    assert (one / "optimizer.safetensors").read_bytes() == (two / "optimizer.safetensors").read_bytes()
    states = [json.loads((folder / "state.json").read_text(encoding="utf-8")) for folder in (one, two)]
    assert {**states[0], "origin": None} == {**states[1], "origin": None}


class StopAt:
    """Lets the time of a run with max_minutes be up at the check with this number, from 0; what each check found being done."""

    def __init__(self, monkeypatch: Any) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, number: int) -> list[str]:
        doing: list[str] = []
        readings = 0

        def monotonic() -> float:
            nonlocal readings
            readings += 1
            if readings == 1:  # listening's own
                return 0.0
            doing.append(watchdog.current())
            return 1e9 if len(doing) - 1 >= number else 0.0

        self._monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=monotonic))
        return doing

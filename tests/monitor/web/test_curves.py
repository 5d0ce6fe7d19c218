"""The charts of a run that grows: what is drawn anew and when, and that a log which a resume has cut is read anew."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from written_runs import RECIPE, look, write_step

from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.web import curves as curves_module
from gemma_grpo.monitor.web.curves import Curves


def live_run(path: Path) -> RunDirectory:
    return RunDirectory.create(path, RECIPE.format(seed=0), {"status": "running", "started": time.time(), "total_steps": 9})


def test_charts_of_a_growing_run_are_drawn_anew_but_not_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves_module, "SHARE", 1e-9)  # nothing may be drawn again for years
    with live_run(tmp_path / "run") as run:
        write_step(run, 1)
        curves = Curves()
        first = curves.chart([run.path], "reward")
        assert first is not None
        assert curves.chart([run.path], "kl") is not None  # what was never drawn is owed at once
        write_step(run, 2)
        second = curves.chart([run.path], "reward")
        assert second is not None
        assert second[1] != first[1]
        write_step(run, 3)
        assert curves.chart([run.path], "reward") == second
        monkeypatch.setattr(curves, "_free_at", 0.0)
        third = curves.chart([run.path], "reward")
        assert third is not None
        assert third[1] != second[1]


def test_looks_are_read_once_and_again_after_a_cut(tmp_path: Path) -> None:
    with live_run(tmp_path / "run") as run:
        curves = Curves()
        for step in range(4):
            run.append_look(look(step))
            assert [line["step"] for line in curves.lines(run.path).looks] == list(range(step + 1))
        assert "replies" not in curves.lines(run.path).looks[0]
        size = (run.path / "witnesses.jsonl").stat().st_size
        run.truncate({**run.offsets(), "witnesses.jsonl": 0})
        run.append_look(look(7))
        assert (run.path / "witnesses.jsonl").stat().st_size < size
        assert [line["step"] for line in curves.lines(run.path).looks] == [7]


def test_a_log_that_was_cut_and_has_grown_past_where_it_was_is_read_anew(tmp_path: Path) -> None:
    with live_run(tmp_path / "run") as run:
        curves = Curves()
        write_step(run, 1)
        offsets = run.offsets()
        write_step(run, 2)
        before = curves.lines(run.path).metrics
        run.truncate(offsets)
        for step in (3, 4):
            write_step(run, step)
        assert [line["step"] for line in before] == [1, 2]
        assert [line["step"] for line in curves.lines(run.path).metrics] == [1, 3, 4]


def test_nobody_waits_for_a_chart_that_another_has_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live_run(tmp_path / "run") as run:
        write_step(run, 1)
        curves = Curves()
        first = curves.chart([run.path], "reward")
        write_step(run, 2)
        drawing, go_on = threading.Event(), threading.Event()

        def slow(*arguments: Any, **options: Any) -> Any:
            drawing.set()
            go_on.wait(30)
            return draw(*arguments, **options)

        draw = curves_module.draw
        monkeypatch.setattr(curves_module, "draw", slow)
        other = threading.Thread(target=curves.chart, args=([run.path], "reward"))
        other.start()
        assert drawing.wait(30)
        assert curves.chart([run.path], "reward") == first
        go_on.set()
        other.join(30)
        assert curves.chart([run.path], "reward") != first

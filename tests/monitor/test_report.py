"""Laws of the report: text stays text, nothing is fetched, same files same bytes, and missing or damaged parts are told."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.monitor.report import render_report, write_report
from gemma_grpo.monitor.run_files import RunFiles, read_run_files
from gemma_grpo.types import Completion, Prompt, RolloutGroup, ScoredGroup, StepRecord

HOSTILE = "</pre></div></style></title><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{ 7*7 }}\x1b[2J\u202e&lt;"
SHOWN = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")


def metric(before: float, after: float) -> dict[str, Any]:
    return {"before": before, "after": after, "gain": after - before, "interval": [after - before - 0.1, after - before + 0.1], "n": 40}


def group(text: str, name: str = "generative") -> ScoredGroup:
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": text}, {"role": "user", "content": text})
    prompt = Prompt(text, text, messages, (2,), "c")  # type: ignore[arg-type]
    completions = tuple(Completion(f"{text}\n  second line {index}", (1, 2), (0.0, 0.0), "stop") for index in range(2))
    return ScoredGroup(RolloutGroup(prompt, completions, 0), (0.25, 0.75), {name: (1.0, None)}, (-1.0, 1.0))


def evaluation(text: str) -> dict[str, Any]:
    reply = {"text": text, "reward": 0.1, "gold": 0.2}
    sample = {
        "prompt_id": text,
        "source": text,
        "kind": text,
        "prompt": [{"role": "user", "content": text}],
        "before": reply,
        "after": reply,
    }
    kinds = {text: {"gold": metric(0.5, 0.2), "reward": metric(0.1, 0.9), "win_rate": metric(0.5, 0.6), "n": 40}}
    return {
        "gold": metric(0.3, 0.6),
        "reward": metric(0.1, 0.9),
        "win_rate": {**metric(0.5, 0.75), "judge": text},
        "kl": metric(0.0, 0.05),
        "by_kind": kinds,
        "samples": [sample] * 8,
        "frontier": FRONTIER,
        "tasks": {text: {text: metric(0.3, 0.2)}},
        "baselines": {text: {"gold": metric(0.3, 0.4), "win_rate": {**metric(0.5, 0.6), "length_controlled": {"value": 0.4}}}},
        "seconds": 3.0,
    }


def calibration(text: str) -> dict[str, Any]:
    share = {"value": 0.8, "interval": [0.75, 0.85], "n": 200}
    return {"pairs_trained": 800, "accuracy": share, "longer_wins": share, "by_source": {text: share}, "calibration": [
        {"predicted": 0.2, "observed": 0.25, "n": 10}, {"predicted": 0.8, "observed": 0.75, "n": 10}]}  # fmt: skip


def look(text: str, step: int) -> dict[str, Any]:
    reply: dict[str, Any] = {"prompt_id": text, "source": text, "kind": text, "text": text, "length": 3, "clipped": False, "refused": True}
    reply |= {"proxy": 0.1 * step, "witness": -0.1 * step, "lexical": 0.3, "fluency": -1.0, "kl": 0.2}
    reply |= {} if step else {"prompt": [{"role": "user", "content": text}]}
    alarm = {"level": "warn", "step": step, "witness": text, "text": text, "samples": [text, text]}
    metrics = {"proxy": 0.1 * step, "witness": -0.1 * step, "fluency": -1.0, "kl_sequence": 0.1 * step, text: 1.0}
    return {"step": step, "metrics": metrics, "replies": [reply, reply], "alarms": [alarm] if step else []}


FRONTIER = {
    "points": [{"step": n, "distance": 0.5 * n, "proxy": 0.3 * n, "witness": 0.1 * n} for n in range(4)],
    "laws": {"proxy": {"a": 0.6, "b": 0.1, "rmse": 0.0, "peak": None}, "witness": {"a": 0.2, "b": 0.0, "rmse": 0.0, "peak": 2.0}},
}


def make_run(path: Path, text: str) -> Path:
    info = {"status": "stopped", "started": 1000.0, "ended": 1100.0, "model": text, "dataset": text, "versions": {text: text}}
    with RunDirectory.create(path, f"seed: 0\n# {text}\n", {**info, "data": {"rows": 1000, "dropped": {text: 3}}}) as run:
        for step in (1, 2, 3):
            seconds = {"rollout": 2.0, text: 1.0}
            run.append_metrics(StepRecord(step, seconds, {"reward": 0.1 * step, "reward_std": 0.1, f"rewards/{text}/mean": 1.0 * step,
                                                          "rewards/b/mean": 2.0, "kl": 0.01 * step}))  # fmt: skip
            run.append_samples(step, [group(text, text)])
            run.event("step_time", step=step, seconds=seconds)
        for step in (0, 2, 3):
            run.append_look(look(text, step))
        run.event("phase", name="reward adapter", seconds=40.0)
        run.event("phase", name="evaluation", seconds=3.0)
        run.event("warn", text=text, **{"field": text})
        run.write_json("evaluation.json", evaluation(text))
        run.write_json("reward/calibration.json", calibration(text))
    return path


PROFILE = {
    "device": "CPU, 2 threads",
    "dtype": "float32",
    "operations": {"value": 1.5e11, "spread": 0.1},
    "bytes": {"value": 3e10, "spread": 0.4},
    "steps": {"earlier": 4, "profiled": 3, "counted": [6, 7]},
    "phases": {
        "rollout": {"seconds": 30.0, "share": 0.75, "floor_seconds": 10.0, "ratio": 3.0, "tokens": 6000, "tokens_per_second": 200.0},
        "reward": {"seconds": 10.0, "share": 0.25, "floor_seconds": 0.0, "ratio": None, "tokens": 0, "tokens_per_second": None},
    },
    "total": {"seconds": 40.0, "floor_seconds": 10.0, "ratio": 4.0},
    "outside": {"before the steps": 5.25, "first step, warm-up": 0.5, "after the steps": 0.0},
    "session_seconds": 45.75,
    "advice": "rollout took 75% of the time, 3.0 times its floor.",
}


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes, and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def hostile_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "hostile", HOSTILE)).read_text(encoding="utf-8")


def test_hostile_text_everywhere_stays_text(hostile_html: str) -> None:
    page = Page(hostile_html)
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(SHOWN) > 30
    timeless = re.sub(r"\d\d:\d\d(:\d\d)?", "", page.text.replace(SHOWN, ""))
    assert "49" not in timeless  # {{ 7*7 }} was not run by the template
    assert not {"\x1b", "\u202e"} & set(hostile_html)


def test_nothing_is_fetched(hostile_html: str) -> None:
    page = Page(hostile_html)
    fetching = {"src", "href", "xlink:href", "srcset", "action", "background", "data", "poster"}
    assert all(value.startswith("#") for name, value in page.attributes if name in fetching)
    styles = "".join(value for name, value in page.attributes if name in ("style", "clip-path")) + hostile_html.split("</style>")[0]
    assert styles.count("url(") == styles.count("url(#")
    assert "@import" not in styles
    policy = next(value for name, value in page.attributes if value.startswith("default-src"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_line_breaks_of_a_reply_are_kept(hostile_html: str) -> None:
    assert "\n  second line 0</div>" in hostile_html
    assert "white-space: pre-wrap" in hostile_html


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "plain")
    first = write_report(path).read_bytes()
    code = "import sys; from gemma_grpo.monitor.report import write_report; write_report(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert (path / "report.html").read_bytes() == first
    assert [file.name for file in path.iterdir() if file.name.endswith(".tmp")] == []


def test_the_verdict_the_wrong_kind_and_the_parts_are_there(tmp_path: Path) -> None:
    text = Page(write_report(make_run(tmp_path / "run", "plain")).read_text(encoding="utf-8")).text
    assert "Gold 0.30 → 0.60, gain 0.30 [0.20, 0.40] on n = 40 held-out replies." in text
    assert "Look at “plain”: the reward rose while gold fell" in text
    assert text.index("Gold 0.30") < text.index("Before and after") < text.index("By kind of request") < text.index("The reward adapter")
    assert "rollout" in text
    assert "6.0 s" in text  # 3 steps of 2 s
    assert "loading and the rest" in text
    assert "48.0 s" in text  # 100 s in all - 40 s reward adapter - 9 s of steps - 3 s of evaluation, counted once
    assert "This run is marked “stopped”" in text


@pytest.mark.parametrize(
    "missing", ["evaluation.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "run.json", "reward/calibration.json"]
)
def test_a_missing_part_is_said_and_the_rest_is_shown(tmp_path: Path, missing: str) -> None:
    path = make_run(tmp_path / "run", "plain")
    (path / missing).unlink()
    text = Page(write_report(path).read_text(encoding="utf-8")).text
    assert f"{Path(missing).name} is missing." in text
    assert "Settings, data and how to repeat it" in text
    assert ("Not evaluated." in text) == (missing == "evaluation.json")


def test_a_profile_is_shown_where_there_is_one_and_not_missed_where_there_is_none(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "plain")
    without = Page(write_report(path).read_text(encoding="utf-8")).text
    assert "beside what this machine could do" not in without
    assert "profile.json" not in without
    with RunDirectory.open(path) as run:
        run.write_json("profile.json", PROFILE)
    text = Page(write_report(path).read_text(encoding="utf-8")).text
    assert "beside what this machine could do" in text
    assert "rollout took 75% of the time, 3.0 times its floor." in text
    (path / "profile.json").write_text("[")
    assert "profile.json is damaged" in write_report(path).read_text(encoding="utf-8")


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", "seed: 0\n", {"status": "running"}).close()
    assert "Not evaluated." in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_what_could_not_be_scored_and_why_a_run_failed_are_said(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "plain")
    with RunDirectory.open(path) as run:
        run.write_json("evaluation.json", {"unscored": 7})
        run.update_run(status="failed", error="ValueError: reward r returned nan")
    text = Page(write_report(path).read_text(encoding="utf-8")).text
    assert "7 replies could not be scored" in text
    assert "evaluation.json holds no scores" in text
    assert "ValueError: reward r returned nan" in text


def test_damaged_lines_are_counted_and_a_line_being_written_is_passed_over(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "plain")
    good = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(good + 'nonsense\n[1]\n{"step": 9, "rew')
    files = read_run_files(path)
    assert len(files.metrics) == 3
    assert files.problems == ["metrics.jsonl: 2 damaged lines left out."]
    (path / "evaluation.json").write_text('{"gold": ')
    assert "evaluation.json is damaged: it is not a JSON object." in read_run_files(path).problems


def test_only_the_first_and_the_last_steps_groups_are_kept(tmp_path: Path) -> None:
    files = read_run_files(make_run(tmp_path / "run", "plain"))
    assert [line["step"] for line in files.first_groups] == [1]
    assert [line["step"] for line in files.last_groups] == [3]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


RUBBISH = (None, True, -3, 10**400, float("nan"), 0.5, "", "text", [], [None, 1], {}, {"text": {}}, [{}, {"items": []}], [[1], "x"])


@pytest.mark.parametrize("seed", range(60))
def test_no_content_of_a_file_breaks_the_report(seed: int) -> None:
    rng = random.Random(seed)

    def spoiled(value: Any) -> Any:
        """The value with parts of it, at any depth, replaced by rubbish."""
        if rng.random() < 0.12:
            return rng.choice(RUBBISH)
        if isinstance(value, dict):
            return {key: spoiled(item) for key, item in value.items()}
        return [spoiled(item) for item in value] if isinstance(value, list) else value

    def spoiled_record(value: dict[str, Any]) -> dict[str, Any]:
        return {key: spoiled(item) for key, item in value.items()}

    sample = {"step": 1, "prompt_id": "p", "source": "s", "prompt": [{"role": "user", "content": "x"}], "completions": [
        {"text": "a", "reward": 1.0, "parts": {"r": 1.0}, "advantage": 0.5, "length": 3, "finish": "stop"}]}  # fmt: skip
    short = {**evaluation("k"), "samples": evaluation("k")["samples"][:1]}
    event = {"time": 1.0, "kind": "warn", "text": "t"}
    times = {"time": 1.0, "kind": "step_time", "step": 1, "seconds": {"rollout": 1.0}}
    run = {
        "status": "finished",
        "started": 1.0,
        "ended": 9.0,
        "model": "m",
        "dataset": "d",
        "steps": 3,
        "data": {"rows": 1},
        "versions": {"a": "b"},
    }
    group_line = spoiled_record(sample)
    render_report(
        RunFiles(
            name="run",
            recipe="seed: 0",
            run=spoiled_record(run),
            metrics=[spoiled_record({"step": 1, "reward": 0.5, "reward_std": 0.1})] if seed % 10 == 0 else [],
            first_groups=[group_line],
            last_groups=[group_line],
            events=[spoiled_record(event), spoiled_record(times)],
            looks=[spoiled_record(look("k", step)) for step in ((0, 2, 4) if seed % 10 == 0 else (0,))],
            evaluation=spoiled_record(short),
            calibration=spoiled_record(calibration("k") if seed % 10 == 0 else {**calibration("k"), "calibration": []}),
            profile=spoiled_record(PROFILE),
            votes=[spoiled_record({"choice": "tuned", "messages": [{"role": "user", "content": "k"}]}) for _ in range(3)],
            problems=[],
        )
    ).encode()


def test_lone_surrogates_in_a_log_are_shown_as_escapes(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", "plain")
    line = json.loads((path / "samples.jsonl").read_text().splitlines()[-1])
    line["completions"][0]["text"] = "a\ud800b"
    (path / "samples.jsonl").write_text(json.dumps(line) + "\n")
    assert "a\\ud800b" in write_report(path).read_text(encoding="utf-8")

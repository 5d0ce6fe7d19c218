"""Groups and replies of a run for looking at: those of one step, those that a filter lets through, those that changed most.

A page of them at a time, from a log of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_grpo.monitor import watched
from gemma_grpo.monitor.choices import choices
from gemma_grpo.monitor.run_files import Record, real, records
from gemma_grpo.monitor.web.logs import find_step, last_line, lines_after, lines_before, size
from gemma_grpo.run_layout import LOOKS, SAMPLES

MOST_GROUPS = 32
"""Groups of one step that are shown; a step has batch_size x gradient_accumulation_steps of them."""
LARGEST_STEP = 2**23
"""Bytes of the groups of a step that are read."""
PAGE = 12
"""Groups, or pairs of replies, of one page of the browser."""
MOST_PROMPTS = 200
SCANNED = 2**21
"""Bytes that one request looks through: some 50 ms. Whoever has found too few asks on."""
_BITE = 2**18


def step_groups(path: Path, step: int | None) -> dict[str, Any]:
    """The groups of a step, of the last one for None, and which steps there are beside it."""
    log = path / SAMPLES
    last = _step(last_line(log))
    if last is None:
        return {"step": None, "first": None, "last": None, "previous": None, "next": None, "groups": [], "more": 0, "damaged": 0}
    wanted = last if step is None else step
    start = find_step(log, wanted)
    following = lines_after(log, start, 1).lines
    found = _step(following[0]) if following else None
    if found is None:  # behind the last
        start, found = find_step(log, last), last
    end = find_step(log, found + 1)
    of_step = lines_after(log, start, min(end - start, LARGEST_STEP))
    groups = [line for line in of_step.lines if _step(line) == found]
    before, after = lines_before(log, start, 1).lines if start else [], lines_after(log, end, 1).lines
    return {
        "step": found,
        "first": _step((lines_after(log, 0, 1).lines or [{}])[0]),
        "last": last,
        "previous": _step(before[-1]) if before else None,
        "next": _step(after[0]) if after else None,
        "groups": [shown(group) for group in groups[:MOST_GROUPS]],
        "more": max(0, len(groups) - MOST_GROUPS),
        "damaged": of_step.damaged,
    }


def shown(group: Record) -> dict[str, Any]:
    """A line of samples.jsonl with its completions from best to worst and the spread of their rewards."""
    completions = sorted(records(group.get("completions")), key=lambda one: _or_lowest(real(one.get("reward"))), reverse=True)
    rewards = [value for one in completions if (value := real(one.get("reward"))) is not None]
    return {**group, "prompt": records(group.get("prompt")), "completions": completions, "spread": _spread(rewards)}


def _or_lowest(value: float | None) -> float:
    return float("-inf") if value is None else value


def _spread(rewards: list[float]) -> float | None:
    return max(rewards) - min(rewards) if rewards else None


FILTERS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "all": lambda group: True,
    "zero variance": lambda group: group["spread"] == 0 and len(group["completions"]) > 1,
    "cut off": lambda group: any(one.get("finish") == "length" for one in group["completions"]),
    "not scored": lambda group: any(one.get("reward") is None for one in group["completions"]),
}


def browse(path: Path, which: str, source: str, before: int | None) -> dict[str, Any]:
    """Groups that a filter and a source let through, newest first, from byte `before` of the log backwards.

    `before` of the answer is where the next page goes on, None at the log's start; `steps` is what was looked through.
    """
    log = path / SAMPLES
    end = start = size(log) if before is None else min(before, size(log))
    found: list[dict[str, Any]] = []
    steps: list[int] = []
    for line, at in _backwards(log, end):
        start, step = at, _step(line)
        steps += [] if step is None else [step]
        group = shown(line)
        if (not source or group.get("source") == source) and FILTERS[which](group):
            found.append(group)
        if len(found) == PAGE or end - start > SCANNED:
            break
    else:
        start = 0
    looked_through = [min(steps), max(steps)] if steps else []
    return {"groups": found, "before": start or None, "steps": looked_through, "sources": sources(path)}


def _backwards(log: Path, end: int) -> Iterator[tuple[Record, int]]:
    """Lines from byte `end` back to the start, each with a byte from which one can go on before it."""
    while end > 0:
        bite = lines_before(log, end, _BITE)
        yield from zip(reversed(bite.lines), reversed(bite.starts), strict=True)
        end = bite.start


def sources(path: Path) -> list[str]:
    """Sources of the newest groups."""
    log = path / SAMPLES
    return sorted({str(line.get("source")) for line in lines_before(log, size(log), _BITE).lines if line.get("source")})


def changed(path: Path, why: str, start: int) -> dict[str, Any]:
    """Replies of the first and the last look at held-out prompts, side by side, in the order of a ranking: PAGE from number `start` on."""
    log = path / LOOKS
    looks = [*lines_after(log, 0, 1).lines, last_line(log)] if size(log) else []
    pairs = watched.ranked(looks, why) if len(looks) == 2 and _step(looks[0]) != _step(looks[1]) else []
    page = pairs[start : start + PAGE]
    return {
        "pairs": [{"why": one.why, "prompt": one.prompt, "before": one.before, "after": one.after} for one in page],
        "steps": [_step(look) for look in looks],
        "count": len(pairs),
        "next": start + PAGE if start + PAGE < len(pairs) else None,
    }


def playable(path: Path) -> dict[str, Any]:
    """The adapters that can be played with, and the held-out prompts of the first look at them."""
    first = (lines_after(path / LOOKS, 0, 1).lines or [{}])[0]
    prompts = {str(reply.get("prompt_id")): records(reply.get("prompt")) for reply in records(first.get("replies")) if reply.get("prompt")}
    try:
        there = [{"name": one.name, "about": one.about} for one in choices(path)]
    except ValueError:
        there = []
    return {"choices": there, "prompts": list(prompts.values())[:MOST_PROMPTS]}


def _step(line: Record) -> int | None:
    step = real(line.get("step"))
    return None if step is None else int(step)

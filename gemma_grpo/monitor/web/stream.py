"""What a page hears while a run goes on: that its logs have grown, the new steps' numbers, and where to go on after a break.

The id of an event is a byte offset of metrics.jsonl, so that a browser that comes back is told what it missed, and after a resume, which
cuts the log, that it must begin anew. Whoever cannot hold a stream open asks for the same by `progress` now and then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from gemma_grpo.monitor.web.answers import json_text
from gemma_grpo.monitor.web.logs import lines_after, size
from gemma_grpo.monitor.web.runs import read_object, status
from gemma_grpo.run_layout import EVENTS, LOOKS, METRICS, RUN

MOST_STREAMS = 64
EVERY = 1.0
"""Seconds between two looks at the logs' sizes."""
AT_A_TIME = 2**17
"""Bytes of metrics.jsonl in one event."""


def progress(path: Path, offset: int) -> dict[str, Any]:
    """The steps after byte `offset` of metrics.jsonl, and how far each log has come; `reset` says that the log was cut back before it."""
    metrics = path / METRICS
    total = size(metrics)
    reset = offset > total
    new = lines_after(metrics, 0 if reset else offset, AT_A_TIME)
    word, sentence = status(path, read_object(path / RUN))
    sizes = {name: size(path / name) for name in (METRICS, LOOKS, EVENTS)}
    return {"reset": reset, "offset": new.end, "steps": new.lines, "sizes": sizes, "status": word, "status_text": sentence}


async def events(path: Path, offset: int) -> AsyncIterator[dict[str, str]]:
    """An event whenever there is something new: what `progress` tells."""
    told: tuple[Any, ...] = ()
    while True:
        found = await asyncio.to_thread(progress, path, offset)
        now = (found["status"], *found["sizes"].values())
        if found["reset"] or found["steps"] or now != told:
            told, offset = now, found["offset"]
            yield {"id": str(offset), "event": "progress", "data": json_text(found)}
        if offset >= found["sizes"][METRICS] or not found["steps"]:
            await asyncio.sleep(EVERY)

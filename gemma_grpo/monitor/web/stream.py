"""What a page hears while a run goes on: how far its logs have come, and what the run is doing; the page then asks for what it shows.

The id of an event is the byte at which metrics.jsonl ends, so that a browser that comes back after a resume, which cuts the log, is told
to begin anew. Whoever cannot hold a stream open asks for the same by `progress` now and then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from gemma_grpo.monitor.web.answers import json_text
from gemma_grpo.monitor.web.logs import size
from gemma_grpo.monitor.web.runs import read_object, status
from gemma_grpo.run_layout import EVENTS, LOOKS, METRICS, RUN

MOST_STREAMS = 64
EVERY = 1.0
"""Seconds between two looks at a run."""


def progress(path: Path) -> dict[str, Any]:
    """Sizes of the logs, and what the run is doing."""
    word, sentence = status(path, read_object(path / RUN))
    return {"sizes": {name: size(path / name) for name in (METRICS, LOOKS, EVENTS)}, "status": word, "status_text": sentence}


def since(found: dict[str, Any], offset: int) -> dict[str, Any]:
    """`found` for who knows metrics.jsonl up to byte `offset`: `reset` says that the log was cut back before it."""
    return {"reset": offset > found["sizes"][METRICS], **found}


class Streams:
    """Streams of events; each run is looked at once every EVERY seconds, however many pages hear of it."""

    def __init__(self) -> None:
        self.open = 0
        self._looks: dict[Path, tuple[float, asyncio.Future[dict[str, Any]]]] = {}

    async def _look(self, path: Path) -> dict[str, Any]:
        at, found = self._looks.get(path, (0.0, None))
        if found is None or time.monotonic() - at >= EVERY:
            found = asyncio.ensure_future(asyncio.to_thread(progress, path))
            self._looks[path] = time.monotonic(), found
        return await asyncio.shield(found)  # a page that leaves takes the look from nobody else

    async def events(self, path: Path, offset: int) -> AsyncIterator[dict[str, str]]:
        """The present state, and then an event whenever it is another."""
        self.open += 1
        told: dict[str, Any] = {}
        try:
            while True:
                found = await self._look(path)
                if found != told:
                    told, place = found, found["sizes"][METRICS]
                    yield {"id": str(place), "event": "progress", "data": json_text(since(found, offset))}
                    offset = place
                await asyncio.sleep(EVERY)
        finally:
            self.open -= 1

"""The page's addresses. Each reads files and answers; what changes of a run is its votes.jsonl alone.

No address is a path: a run is named as the list of runs names it. Files are read in threads, a few at a time. All is read by GET but for
the playground's questions and votes (playground.py), which guard.py lets in under stricter terms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread
from pydantic import BaseModel, ValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gemma_grpo.config import ConfigError
from gemma_grpo.monitor import watched
from gemma_grpo.monitor.web import groups, runs, stream
from gemma_grpo.monitor.web.answers import Json, json_text
from gemma_grpo.monitor.web.curves import Curves
from gemma_grpo.monitor.web.guard import REPORT_POLICY, page_token
from gemma_grpo.monitor.web.logs import size
from gemma_grpo.monitor.web.playground import BusyError, Playground, Question, Vote
from gemma_grpo.run_layout import EVALUATION, LOOKS, METRICS, SAMPLES

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
STATIC = ("colours.css", "page.css", "page.js", "parts.js", "curves.js", "replies.js", "playground.js", "run.js", "icon.svg")
MOST_COMPARED = 4
"""Runs in one chart: as many as there are colours."""
READERS = 4
"""Requests whose files are read at the same time."""


class Page:
    """The answers, over the runs of one folder."""

    def __init__(self, found: runs.Runs, token: str) -> None:
        self.runs, self.curves, self.token = found, Curves(), token
        self._playground: Playground | None = None
        self.streams = stream.Streams()
        self._readers: anyio.CapacityLimiter | None = None

    def close(self) -> None:
        """Let go of what is held: the playground's process."""
        if self._playground is not None:
            self._playground.close()

    def routes(self) -> list[Route]:
        """All addresses."""
        return [
            Route("/", self.page),
            Route("/static/{name}", self.static),
            Route("/api/runs", self.overview),
            Route("/api/runs/{run}", self.summary),
            Route("/api/runs/{run}/progress", self.progress),
            Route("/api/runs/{run}/events", self.events),
            Route("/api/runs/{run}/groups", self.groups),
            Route("/api/runs/{run}/samples", self.samples),
            Route("/api/runs/{run}/changed", self.changed),
            Route("/api/runs/{run}/playground", self.playground),
            Route("/api/runs/{run}/play", self.play, methods=["POST"]),
            Route("/api/runs/{run}/votes", self.vote, methods=["POST"]),
            Route("/api/panels", self.panels),
            Route("/api/chart", self.chart),
            Route("/api/compare", self.compare),
            Route("/report/{run}", self.report),
        ]

    async def _read(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """The answer of a function that reads files, from a thread."""
        self._readers = self._readers or anyio.CapacityLimiter(READERS)
        return await anyio.to_thread.run_sync(read, *arguments, limiter=self._readers)

    async def _run(self, request: Request) -> Path:
        path: Path = await self._read(self.runs.path_of, request.path_params["run"])
        return path

    async def _chosen(self, request: Request) -> list[Path]:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if not 1 <= len(names) <= MOST_COMPARED:
            raise HTTPException(400, f"Name one to {MOST_COMPARED} runs, as run=NAME; {len(names)} are named.")
        return [await self._read(self.runs.path_of, name) for name in names]

    async def page(self, request: Request) -> Response:
        """The one page there is; what it shows is in its address after the #."""
        return Response(static_file("page.html"), media_type=KINDS["html"])

    async def static(self, request: Request) -> Response:
        """Script, style and icon."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404, "There is no such file.")
        return Response(static_file(name), media_type=KINDS[name.rpartition(".")[2]])

    async def overview(self, request: Request) -> Response:
        """Every run in a line."""

        def read() -> dict[str, Any]:
            found = [runs.overview(path) for path in self.runs.listed()]
            return {"folder": self.runs.root.name, "runs": found}

        return Json(await self._read(read))

    async def summary(self, request: Request) -> Response:
        """All of a run that is no curve and no reply."""
        path = await self._run(request)
        return Json(await self._read(lambda: runs.summary(path, self.curves.lines(path).looks)))

    async def progress(self, request: Request) -> Response:
        """How far a run has come since a byte of metrics.jsonl."""
        path = await self._run(request)
        return Json(stream.since(await self._read(stream.progress, path), _whole(request, "after", 0)))

    async def events(self, request: Request) -> Response:
        """The same as it happens."""
        path = await self._run(request)
        offset = _number(request.headers.get("last-event-id") or request.query_params.get("after") or "0", "after")
        if self.streams.open >= stream.MOST_STREAMS:
            raise HTTPException(503, "Too many pages are open on this server. Close one.", {"retry-after": "10"})
        return EventSourceResponse(self.streams.events(path, offset), ping=15)

    async def groups(self, request: Request) -> Response:
        """The groups of a step."""
        path = await self._run(request)
        step = request.query_params.get("step")
        return Json(await self._read(groups.step_groups, path, None if step is None else _number(step, "step")))

    async def samples(self, request: Request) -> Response:
        """Groups that a filter lets through."""
        path, which = await self._run(request), request.query_params.get("filter", "all")
        if which not in groups.FILTERS:
            raise HTTPException(400, f"filter is one of: {', '.join(groups.FILTERS)}.")
        before = request.query_params.get("before")
        source = request.query_params.get("source", "")
        return Json(await self._read(groups.browse, path, which, source, None if before is None else _number(before, "before")))

    async def changed(self, request: Request) -> Response:
        """Replies to held-out prompts before and now."""
        path, why = await self._run(request), request.query_params.get("order", watched.RANKINGS[0])
        if why not in watched.RANKINGS:
            raise HTTPException(400, f"order is one of: {', '.join(watched.RANKINGS)}.")
        return Json(await self._read(groups.changed, path, why, _whole(request, "start", 0)))

    async def playground(self, request: Request) -> Response:
        """What can be asked: adapters, held-out prompts, and what the page must send with a question."""
        path = await self._run(request)
        return Json({**await self._read(groups.playable, path), "token": page_token(self.token)})

    async def play(self, request: Request) -> Response:
        """Base and tuned answer one question, as lines of JSON while they do."""
        path, question = await self._run(request), await _body(request, Question)
        self._playground = self._playground or Playground()
        try:
            self._playground.check(path, question)
        except BusyError as error:
            raise HTTPException(429, str(error), {"retry-after": "10"}) from error
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        lines = (json_text(told) + "\n" async for told in self._playground.answer(path, question))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    async def vote(self, request: Request) -> Response:
        """Count what a person preferred, and tell who was who."""
        path, vote = await self._run(request), await _body(request, Vote)
        try:
            if self._playground is None:
                raise LookupError("that pair is not open: the server was started anew since.")
            return Json(self._playground.vote(path, vote))
        except LookupError as error:
            raise HTTPException(409, error.args[0]) from error
        except OSError as error:
            raise HTTPException(409, f"the vote could not be kept in the run directory: {error.strerror}.") from error

    async def panels(self, request: Request) -> Response:
        """Which charts there are of some runs together."""
        paths = await self._chosen(request)

        def read() -> list[dict[str, str]]:
            found = {panel.key: panel for path in paths for panel in self.curves.panels(path)}
            return [{"key": key, "title": panel.title, "caption": panel.caption, "unit": panel.unit} for key, panel in found.items()]

        return Json({"panels": await self._read(read)})

    async def chart(self, request: Request) -> Response:
        """One chart; its ETag says what it is a drawing of."""
        paths, key = await self._chosen(request), request.query_params.get("key", "")
        drawn = await self._read(self.curves.chart, paths, key)
        if drawn is None:
            raise HTTPException(404, "None of these runs has that number.")
        return Response(drawn[0], media_type=KINDS["svg"], headers={"etag": f'"{drawn[1]}"'})

    async def compare(self, request: Request) -> Response:
        """The settings in which runs differ, and what each came to."""
        paths = await self._chosen(request)
        return Json(await self._read(compared, paths))

    async def report(self, request: Request) -> Response:
        """The report, made anew: what lies in the folder may come from another machine."""
        path = await self._run(request)
        return Response(await self._read(report_of, path), media_type=KINDS["html"], headers={"content-security-policy": REPORT_POLICY})


LARGEST_REPORT = 2**26
"""Bytes of the logs that a report reads whole, above which the page does not make one."""


def report_of(path: Path) -> str:
    """The run's report as text. Raises HTTPException where the run is too long to make it while someone waits."""
    from gemma_grpo.monitor.report import render_report
    from gemma_grpo.monitor.run_files import read_run_files

    total = sum(size(path / name) for name in (METRICS, SAMPLES, LOOKS))
    if total > LARGEST_REPORT:
        raise HTTPException(413, f"This run's logs are {total / 2**20:.0f} MiB. Make its report by `gemma-grpo report`.")
    return render_report(read_run_files(path))


def compared(paths: list[Path]) -> dict[str, Any]:
    """Settings that differ, and each metric of the evaluations."""
    from gemma_grpo.monitor.differences import differences
    from gemma_grpo.monitor.findings import compared as rows_of

    try:
        settings = [{"name": name, "values": values} for name, values in differences(paths).items()]
        problem = ""
    except (ConfigError, OSError) as error:
        settings, problem = [], str(error)
    rows = rows_of([runs.read_object(path / EVALUATION) for path in paths])
    return {
        "names": [path.name for path in paths],
        "settings": settings,
        "problem": problem,
        "evaluation": [{"title": row.title, "cells": row.cells} for row in rows],
    }


@cache
def static_file(name: str) -> bytes:
    """A file of the page; its colours are the report's."""
    folder = package_files("gemma_grpo.monitor")
    return (folder / name if name == "colours.css" else folder / "web" / "static" / name).read_bytes()


_Asked = TypeVar("_Asked", bound=BaseModel)


async def _body(request: Request, kind: type[_Asked]) -> _Asked:
    """The request's body. The guard has seen its length, and the server holds a client to it."""
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}" for one in error.errors(include_input=False)[:5])
        raise HTTPException(400, f"{wrong}.") from error


def _whole(request: Request, name: str, default: int) -> int:
    return _number(request.query_params.get(name, str(default)), name)


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise HTTPException(400, f"{name} is a whole number, 0 or more.")
    return int(text)


def make_app(page: Page) -> Starlette:
    """The application, still without its guard."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)

    async def unknown(request: Request, error: Exception) -> Response:
        return PlainTextResponse("There is no run of that name here.\n", 404)

    async def failed(request: Request, error: Exception) -> Response:
        return PlainTextResponse("This could not be shown; the terminal of `gemma-grpo watch` says why.\n", 500)

    handlers: dict[Any, Any] = {HTTPException: refused, runs.NoSuchRunError: unknown, Exception: failed}
    app = Starlette(routes=page.routes(), exception_handlers=handlers)
    app.router.redirect_slashes = False  # an address that is almost right could send a browser to another host
    return app

"""The run directory: every file a run writes besides checkpoints and adapters, by one writer at a time.

Owns its layout, the lock, append-only logs and atomic JSON. Not what the numbers mean, nor what a checkpoint holds (checkpoint.py).
A log never keeps half a line: a write that fails is taken back, and the torn last line a crash may leave is cut off on opening.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from gemma_grpo.containment import link_out
from gemma_grpo.disk import DISK
from gemma_grpo.monitor.durable import (
    RunDirectoryError,
    append_whole,
    check_place,
    check_room,
    cut_torn_line,
    to_json,
    translated,
    write_atomically,
)
from gemma_grpo.redact import redact_all
from gemma_grpo.run_layout import EVENTS, HOLDER, LOCK, LOOKS, METRICS, RECIPE, RUN, SAMPLES, WRITER
from gemma_grpo.types import ScoredGroup, StepRecord

__all__ = ["RunDirectory", "RunDirectoryError", "next_run_path"]

_LONGEST_LINE = 2**16
"""Bytes, of metrics.jsonl."""
_DEEPEST = "checkpoints/.tmp-step-0000000012/policy/adapter_model.safetensors"
"""A run's longest path, so that a name too long for it is known before."""
_EXACT_LOGS = (METRICS, SAMPLES, LOOKS)
"""Logs that resume to the byte. events.jsonl is not among them: it tells what happened, repeated steps included."""


class RunDirectory:
    """The files of one run. Make one with `create` or `open`; close it, or use it in a with statement."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock
        self._writing = threading.Lock()

    @classmethod
    def create(cls, path: str | Path, recipe_text: str, info: Mapping[str, Any], *, needed_bytes: int = 0) -> RunDirectory:
        """A new run: recipe.yaml, run.json (`info`) and empty logs.

        Raises RunDirectoryError, having written nothing, when the path is a file, holds a run, cannot be written, is in use
        or its disk has less than `needed_bytes` free.
        """
        cls.check(path, needed_bytes=needed_bytes)
        path = Path(path)
        made = _make_folders(path)
        written: list[Path] = []
        try:
            run = cls(path, _acquire(path))
            try:
                _refuse_existing_run(path)  # again under the lock: another process may have been as quick
                for name, text in {RECIPE: recipe_text, RUN: to_json(RUN, redact_all(info), indent=2), **dict.fromkeys(_LOGS, "")}.items():
                    write_atomically(path / name, text)
                    written.append(path / name)
            except BaseException:
                run.close()
                raise
        except BaseException:
            _undo(written, made, path)
            raise
        return run

    @classmethod
    def check(cls, path: str | Path, *, needed_bytes: int = 0) -> None:
        """Raise RunDirectoryError if `create` would: to be asked before the first expensive second. Leaves nothing."""
        path = _usable_path(path)
        _refuse_existing_run(path)
        _refuse_links_out(path)
        check_room(check_place(path, _DEEPEST), needed_bytes)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run, to resume or evaluate.

        Raises RunDirectoryError when there is none, another process writes it, or a link in it leads outside.
        """
        path = _usable_path(path)
        _check_is_run(path)
        _refuse_links_out(path)  # before the lock: taking it writes
        run = cls(path, _acquire(path))
        try:
            for name in _LOGS:
                cut_torn_line(path / name)
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def reading(cls, path: str | Path) -> RunDirectory:
        """An existing run, to look at while another process may write it: nothing is locked or mended. RunDirectoryError without one."""
        path = _usable_path(path)
        _check_is_run(path)
        return cls(path, FileLock(path / LOCK, timeout=0, thread_local=False))

    @property
    def recipe(self) -> Path:
        """The resolved settings; training on this file repeats the run."""
        return self.path / RECIPE

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, step-00000012 and so on."""
        return self.path / "checkpoints"

    @property
    def reward(self) -> Path:
        """Folder of the trained reward adapter and its calibration.json."""
        return self.path / "reward"

    @property
    def adapter(self) -> Path:
        """Folder of the final policy adapter."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """The report's HTML file."""
        return self.path / "report.html"

    def append_step(self, record: StepRecord, groups: Iterable[ScoredGroup]) -> None:
        """Add a step to all logs; how long it took to events.jsonl alone."""
        self.append_metrics(record)
        self.append_samples(record.step, groups)
        self.event("step_time", step=record.step, seconds=dict(record.seconds))

    def append_metrics(self, record: StepRecord) -> None:
        """Add a step's metrics to metrics.jsonl. No times: a repeated seeded run writes the identical file."""
        self._append(METRICS, {"step": record.step, **record.metrics})

    def last_metrics(self, count: int) -> list[dict[str, Any]]:
        """The last lines of metrics.jsonl, at most so many, oldest first."""
        with (self.path / METRICS).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - count * _LONGEST_LINE))
            lines = log.read().splitlines(keepends=True)
        return [json.loads(line) for line in lines[-count:]]

    def append_look(self, look: Mapping[str, Any]) -> None:
        """Add a look at the policy to witnesses.jsonl."""
        self._append(LOOKS, look)

    def looks(self) -> list[dict[str, Any]]:
        """Every look so far, oldest first; none in a run that began before there were looks."""
        if not (self.path / LOOKS).is_file():
            return []
        with (self.path / LOOKS).open(encoding="utf-8") as log:
            return [json.loads(line) for line in log]

    def append_samples(self, step: int, groups: Iterable[ScoredGroup]) -> None:
        """Add every group of a step to samples.jsonl, one line each, all or none."""
        self._append(SAMPLES, *(_sample(step, group) for group in groups))

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line to events.jsonl: `kind`, the time in seconds since 1970, and `fields`, secrets in them taken out."""
        self._append(EVENTS, {"time": round(time.time(), 3), "kind": kind, **redact_all(fields)})

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Replace `name` (relative to the run directory, "reward/calibration.json") by `data`, whole or not at all."""
        target = self.path / name
        text = to_json(name, data, indent=2)
        with translated(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text)
        return target

    def read_run(self) -> dict[str, Any]:
        """What run.json holds; empty when it is missing."""
        path = self.path / RUN
        if not path.exists():
            return {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunDirectoryError(f"{path} is not JSON ({error}). Delete it: a run continues without it.") from error
        if not isinstance(data, dict):
            raise RunDirectoryError(f"{path} holds a {type(data).__name__}, not an object. Delete it: a run continues without it.")
        return data

    def update_run(self, **fields: Any) -> None:
        """Set fields of run.json, keeping the others; secrets are taken out."""
        self.write_json(RUN, {**self.read_run(), **redact_all(fields)})

    def ended(self, step: int, error: BaseException | None = None) -> None:
        """The run's outcome after `step` steps: finished, or stopped or failed by `error`."""
        if error is None:
            self.event("end", step=step)
            self.update_run(status="finished", ended=time.time(), steps=step)
            return
        stopped = isinstance(error, KeyboardInterrupt)
        status, text = ("stopped", f"stopped {error}".strip()) if stopped else ("failed", f"{type(error).__name__}: {error}")
        with suppress(RunDirectoryError):  # where the disk is full: that must not take the place of why the run ended
            self.event("error", text=text)
        with suppress(RunDirectoryError):
            self.update_run(status=status, ended=time.time(), error=text, **({"steps": step} if step else {}))

    def offsets(self) -> dict[str, int]:
        """Sizes in bytes of the logs that are resumed exactly, after they have reached the disk: what a checkpoint stores."""
        sizes = {}
        for name in _EXACT_LOGS:
            with translated(self.path / name), (self.path / name).open("ab") as log:
                os.fsync(log.fileno())
                sizes[name] = log.tell()
        return sizes

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Cut the logs back to what they were at a checkpoint, so that repeated steps are there once."""
        for name in _EXACT_LOGS:
            path = self.path / name
            size = path.stat().st_size if path.exists() else 0
            wanted = offsets.get(name, 0)
            if size < wanted:
                raise RunDirectoryError(
                    f"{path} has {size} bytes, the checkpoint was made at {wanted}: lines were lost, so an exact resume is impossible. "
                    "Restore the file, or start a new run in another folder."
                )
        for name in _EXACT_LOGS:
            with translated(self.path / name), (self.path / name).open("ab") as log:
                log.truncate(offsets.get(name, 0))
                os.fsync(log.fileno())

    @property
    def is_held(self) -> bool:
        """Whether this process may write it: until it is closed."""
        return bool(self._lock.is_locked)

    def close(self) -> None:
        """Let another process write. Closing twice is fine."""
        if self.is_held:
            (self.path / WRITER).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _append(self, name: str, *records: Mapping[str, Any]) -> None:
        with self._writing:  # the watchdog's thread writes events too
            append_whole(self.path / name, "".join(to_json(name, record) + "\n" for record in records).encode())


_LOGS = (*_EXACT_LOGS, EVENTS)


def next_run_path(root: str | Path, stem: str) -> Path:
    """`root/<stem>-<n>` with the first number above every one taken; `stem` is reduced to a-z, 0-9, dot, dash and underscore."""
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-")[:48].rstrip("._-") or "run"
    root = Path(root)
    pattern = re.compile(rf"{re.escape(name)}-(\d+)")
    entries = root.iterdir() if root.is_dir() else iter(())
    taken = [int(match[1]) for entry in entries if (match := pattern.fullmatch(entry.name))]
    return root / f"{name}-{max(taken, default=0) + 1}"


def _sample(step: int, scored: ScoredGroup) -> dict[str, Any]:
    group = scored.group
    return {
        "step": step,
        "prompt_id": group.prompt.prompt_id,
        "source": group.prompt.source,
        "prompt": list(group.prompt.messages),
        "completions": [
            {
                "text": completion.text,
                "reward": scored.rewards[index],
                "parts": {name: values[index] for name, values in scored.reward_parts.items()},
                "advantage": scored.advantages[index],
                "length": len(completion.token_ids),
                "finish": completion.finish,
                **_drift(scored, index),
            }
            for index, completion in enumerate(group.completions)
        ],
    }


def _drift(scored: ScoredGroup, index: int) -> dict[str, Any]:
    if not scored.drifts:
        return {}
    return {"tokens": list(scored.drifts[index].tokens), "log_ratios": list(scored.drifts[index].log_ratios)}


def _usable_path(path: str | Path) -> Path:
    if "\0" in str(path):
        raise RunDirectoryError(f"{str(path)!r} cannot be a folder: it contains a NUL character. Choose another output_dir.")
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # a run there could be written, and its adapter not be read again: safetensors takes no such path
        raise RunDirectoryError(f"{str(path)!r} cannot hold a run: its name is not valid UTF-8. Choose another output_dir.") from error
    return Path(path)


def _check_is_run(path: Path) -> None:
    if not (path / RECIPE).is_file():
        raise RunDirectoryError(
            f"{path} is not a run directory: it has no {RECIPE}. Name the folder a training run wrote, such as runs/miniature-1."
        )


def _refuse_existing_run(path: Path) -> None:
    with translated(path):
        if path.exists() and not path.is_dir():
            raise RunDirectoryError(f"{path} is a file; a run needs a folder. Choose another output_dir, or move the file away.")
        holds = next((name for name in (RECIPE, RUN, *_LOGS) if (path / name).exists()), None)
    if holds:
        raise RunDirectoryError(
            f"{path} already holds a run (it contains {holds}). Choose another output_dir, resume that run, or move the folder away."
        )


def _refuse_links_out(path: Path) -> None:
    with translated(path):
        link = link_out(path)
    if link:
        raise RunDirectoryError(link)


def _make_folders(path: Path) -> list[Path]:
    """Create the folder and its parents; what was newly made, innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with translated(path):
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            DISK.sync(folder.parent)
    return missing


def _undo(written: Sequence[Path], made: Sequence[Path], path: Path) -> None:
    """Take back a creation that failed, touching nothing that was there before."""
    for file in written:
        file.unlink(missing_ok=True)
    if path in made:  # an older folder may hold the lock of another process
        (path / LOCK).unlink(missing_ok=True)
    for folder in made:
        try:
            folder.rmdir()
        except OSError:
            return  # someone else put a file there


def _acquire(path: Path) -> FileLock:
    lock = FileLock(path / LOCK, timeout=0, thread_local=False)
    with translated(path / LOCK):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the soft lock, which is refused below
                lock.acquire()
        except Timeout:  # an OSError too, so it must be caught inside
            raise RunDirectoryError(_in_use(path)) from None
        except NotImplementedError as error:  # filelock's, in its older versions
            raise OSError(errno.ENOLCK, str(error)) from error
        if isinstance(lock, SoftFileLock):  # a file instead of a lock: it would outlive a killed run
            lock.release(force=True)
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    try:
        write_atomically(path / WRITER, f"process {os.getpid()} on host {socket.gethostname()}\n")
    except BaseException:
        lock.release()
        raise
    return lock


def _in_use(path: Path) -> str:
    """Who holds the lock, and what to do. What the file says may be of an earlier holder, until the new one has written it."""
    try:
        found = HOLDER.fullmatch((path / WRITER).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    said = f"{path} is being written by {found[0].strip() if found else 'another process'}. "
    if found is None or found[2] == socket.gethostname():
        return f"{said}Wait until that run ends or stop it, or choose another output_dir."
    return f"{said}Wait until that run ends or stop it there. If that machine is gone for good, delete {path / LOCK} and try again."

"""Exit codes, and any exception as what, where, how to mend it."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeGuard

from gemma_grpo.access import AccessError
from gemma_grpo.cli.printing import complain, say
from gemma_grpo.config import ConfigError
from gemma_grpo.escapes import printable
from gemma_grpo.launched import is_first
from gemma_grpo.redact import redact

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PACKAGE = str(Path(__file__).resolve().parents[1])


class Exit(IntEnum):
    """What the process ends with."""

    OK = 0
    RUNTIME = 1
    USAGE = 2
    """Wrong usage, settings or data."""
    PREFLIGHT = 3
    ACCESS = 4
    """Gated, private, missing or offline."""
    STOPPED = 75
    """By a signal; sysexits.h calls it EX_TEMPFAIL: the same command continues or repeats the run."""


_EXPLAINED = ("DoesNotFitError", "ExportError", "ServingError")
"""Errors of a run whose text is written for its user."""
_USAGE = ("ConfigError", "DataError", "RunDirectoryError", "ResumeError")


def exit_code(error: BaseException) -> Exit:
    """The code of the process that ends with `error`."""
    if _is_usage_of_verbs(error):
        return Exit.USAGE
    if isinstance(error, AccessError):
        return Exit.ACCESS
    if "PreflightError" in _names(error):
        return Exit.PREFLIGHT
    # a run directory that could be used and then could not be written is no mistake of usage
    if _names(error).intersection(_USAGE) and not isinstance(error.__cause__, OSError):
        return Exit.USAGE
    return Exit.USAGE if type(error) is ValueError and _raised_here(error) else Exit.RUNTIME


def explained(error: BaseException) -> str:
    """`error: what`, then where and how to mend it on indented lines."""
    if _is_usage_of_verbs(error):
        first, rest = str(error.format_message()), ["`gemma-grpo --help` names the verbs, `gemma-grpo VERB --help` what each takes."]
    elif isinstance(error, ConfigError):
        count = len(error.problems)
        first, rest = f"{count} {'problem' if count == 1 else 'problems'} in the settings:", [str(problem) for problem in error.problems]
    elif isinstance(error, AccessError):
        first, rest = error.what, list(error.steps)
    elif (isinstance(error, (ValueError, ArithmeticError)) or _names(error).intersection(_EXPLAINED)) and _raised_here(error):
        first, rest = _sentences(str(error))
    elif isinstance(error, OSError) and error.errno in _FULL:
        first = f"{error.filename or 'the output or a file'} takes no more ({error.strerror})."
        remedy = "Make room, or write to another disk: output_dir=FOLDER for a run, `> FILE` for what is printed."
        rest = [remedy] if error.filename else [remedy, *_place(error)]
    else:
        first, rest = f"{type(error).__name__}: {error}", [*_place(error), "Run again with --debug for the whole trace."]
    # redacted before it is cut into lines
    lines = [f"error: {printable(redact(first))}", *(f"  {printable(line)}" for text in rest for line in redact(text).splitlines())]
    return "\n".join(lines)


def report(error: BaseException, *, debug: bool) -> Exit:
    """Print the error to stderr, with its trace when debugging; what the process shall end with."""
    if not is_first() and "RankError" in _names(error):
        return exit_code(error)  # of another rank, which says it itself
    if debug:
        complain("".join(traceback.format_exception(error)).rstrip("\n"))
    if "NoArgsIsHelpError" in _names(error):
        say(str(error))
        return Exit.USAGE
    complain(explained(error))
    return exit_code(error)


def output_error() -> OSError | None:
    """What keeps the printed text from being written, None when all of it is; nothing is tried again after that."""
    try:
        if sys.stdout is not None:  # closed from the start: nothing was printed either
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OSError(error.errno, error.strerror, "the output")  # a BrokenPipeError stays one
    return None


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _is_usage_of_verbs(error: Any) -> TypeGuard[Any]:
    """An error of the command-line parser; typer carries its own copy of click's classes, older versions use click's."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _raised_here(error: BaseException) -> bool:
    """Whether the innermost frame is ours: then the message is written for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_PACKAGE)


def _sentences(text: str) -> tuple[str, list[str]]:
    """The first sentence, and the others."""
    first, *rest = re.split(r"(?<=[.!?)])\s+(?=[A-Z`])", text, maxsplit=1)
    return first, rest


def _place(error: BaseException) -> list[str]:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PACKAGE)]
    return [f"in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno}"] if frames else []

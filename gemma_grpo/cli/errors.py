"""Exit codes, and any exception as what, where, how to mend it."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeGuard

from gemma_grpo.config import ConfigError, printable

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


_ACCESS = {
    "GatedRepoError": (
        "is gated, and this account has not been granted access.",
        "Accept the licence on the model's page at https://huggingface.co, with the account that `hf auth whoami` names.",
    ),
    "RepositoryNotFoundError": (
        "was not found, or is private: the Hub answers the same for both.",
        "Check the spelling; if it is right, run `hf auth login` with an account that may read it.",
    ),
    "LocalTokenNotFoundError": (
        "needs a login, and this machine has none.",
        "Run `hf auth login`, or set HF_TOKEN. `gemma-grpo demo` needs neither.",
    ),
    "OfflineModeIsEnabled": (
        "is not on this machine, and HF_HUB_OFFLINE=1 forbids fetching it.",
        "Unset HF_HUB_OFFLINE once, or give the path of a local folder as model_name or dataset.",
    ),
    "LocalEntryNotFoundError": (
        "is not on this machine, and the Hub cannot be reached.",
        "Check the network, or give the path of a local folder. `gemma-grpo demo` needs no network.",
    ),
}
"""Name of a huggingface_hub error -> (what, remedy). Names, because importing the library for them would cost every command."""

_NO_NAME = "HFValidationError"
"""What the Hub's library calls a name that is neither a folder here nor a possible id there."""
_USAGE = ("ConfigError", "DataError", "RunDirectoryError")


def exit_code(error: BaseException) -> Exit:
    """The code of the process that ends with `error`."""
    if _is_usage_of_verbs(error):
        return Exit.USAGE
    if "DataAccessError" in _names(error) or _access_error(error) is not None:
        return Exit.ACCESS
    if "PreflightError" in _names(error):
        return Exit.PREFLIGHT
    if any(_NO_NAME in _names(one) for one in _chain(error)):
        return Exit.USAGE
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
    elif (access := _access_error(error)) is not None and "DataAccessError" not in _names(error):
        what, remedy = _ACCESS[next(name for name in _ACCESS if name in _names(access))]
        first, rest = f"{_repository(access)} {what}", [remedy]
    elif any(_NO_NAME in _names(one) for one in _chain(error)):
        first, rest = str(error), ["model_name and dataset are a folder or file on this machine, or a Hub id such as google/gemma-3-1b-it."]
    elif isinstance(error, (ValueError, ArithmeticError)) and _raised_here(error):
        first, rest = _sentences(str(error))
    else:
        first, rest = f"{type(error).__name__}: {error}", [*_place(error), "Run again with --debug for the whole trace."]
    return "\n".join([f"error: {printable(first)}", *(f"  {printable(line)}" for text in rest for line in text.splitlines())])


def report(error: BaseException, *, debug: bool) -> Exit:
    """Print the error to stderr, with its trace when debugging; what the process shall end with."""
    if debug:
        traceback.print_exception(error)
    if "NoArgsIsHelpError" in _names(error):
        print(error)
        return Exit.USAGE
    print(explained(error), file=sys.stderr)
    return exit_code(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it: transformers wraps the Hub's errors in OSError."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _is_usage_of_verbs(error: Any) -> TypeGuard[Any]:
    """An error of the command-line parser; typer carries its own copy of click's classes, older versions use click's."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _access_error(error: BaseException) -> BaseException | None:
    return next((one for one in _chain(error) if _names(one).intersection(_ACCESS)), None)


def _repository(error: BaseException) -> str:
    """The repository an error of the Hub speaks of, from the address in it."""
    found = re.search(r"huggingface\.co/(?:api/)?(?:models/|datasets/)?([\w.-]+/[\w.-]+)", str(error))
    return found[1] if found else "the repository"


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

"""`--allow-code FILE`: what is shown before a file's code may run, and what is asked when it is not the code a run began with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from gemma_grpo.cli.printing import say
from gemma_grpo.escapes import printable
from gemma_grpo.reward.allowed_code import CodeFile, read_code

AllowCode = Annotated[
    Path | None,
    typer.Option("--allow-code", metavar="FILE", help="Run this Python file, with your rights, for reward functions the recipe names."),
]
CodeHash = Annotated[str | None, typer.Option("--code-sha256", metavar="HEX", help="Run that file only if this is its SHA-256.")]


def allowed_code(file: Path | None, agreed: str | None, run_dir: Path | None = None) -> CodeFile | None:
    """The file that may be run, its path and hash shown; None without one. `run_dir` is the run it goes on with, if any.

    Raises ValueError when it is not what was agreed to: by `agreed`, by run.json, or by the user where there is a terminal to ask at.
    """
    if file is None:
        if agreed is not None:
            raise ValueError("--code-sha256 says which code may run, but there is none. Give the file too: --allow-code FILE.")
        return None
    code = read_code(file)
    say(f"code: {printable(str(code.path))}\n      sha256 {code.sha256}", flush=True)
    if agreed is not None:
        if agreed.lower() != code.sha256:
            raise ValueError(f"{code.path} has the sha256 {code.sha256}, not {agreed} as --code-sha256 says. {_READ}")
    elif run_dir is not None and (began := _recorded(run_dir)) != code.sha256:
        _ask_about(code, began, run_dir)
    return code


_READ = "Read the file; if it is what you want, give its hash."


def _ask_about(code: CodeFile, began: str, run_dir: Path) -> None:
    changed = f"{run_dir} began with code of the sha256 {began}, and {code.path} now has {code.sha256}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ValueError(f"{changed}. {_READ[:-1]}: --allow-code {code.path} --code-sha256 {code.sha256}")
    if not typer.confirm(f"{printable(changed)}. Run it?", default=False, err=True):
        raise ValueError(f"{code.path} was not run. Restore the file the run began with, or agree to this one.")


def _recorded(run_dir: Path) -> str:
    """The hash in run.json, or a word that is none: then nothing says that the code is the same."""
    try:
        return str(json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["code"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"

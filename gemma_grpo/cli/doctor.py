"""`gemma-grpo doctor`: what this machine can do for a run, one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma_grpo.cli.errors import Exit
from gemma_grpo.cli.printing import say

Asked = Annotated[str | None, typer.Argument(metavar="[MODEL|RECIPE]", help="A Hub id, a checkpoint folder, or a recipe.")]


def doctor(
    asked: Asked = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for a bug report; no token, no home folder.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Load the model and compare sampling with training on this device.")] = False,
) -> None:
    """Check packages, GPU, number format, disk and access to a model; each line ok, note or fail with what mends it."""
    from gemma_grpo import diagnosis

    if as_json:
        found = diagnosis.diagnose(asked, deep=deep)
        say(found.as_json())
    else:
        found = diagnosis.doctor(asked, deep=deep)
    if not found.ok:
        raise typer.Exit(Exit.PREFLIGHT)

"""`gemma-grpo doctor`: what this machine can do for a run, one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_grpo.cli.errors import Exit
from gemma_grpo.cli.printing import say
from gemma_grpo.launched import world_size

Asked = Annotated[str | None, typer.Argument(metavar="[MODEL|RECIPE]", help="A Hub id, a checkpoint folder, or a recipe.")]
Gpus = Annotated[
    str | None, typer.Option("--gpus", metavar="N|all", help="Start a rank for each GPU: memory, direct access, sums, the disk.")
]


def doctor(
    asked: Asked = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for a bug report; no token, no home folder.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Load the model and compare sampling with training on this device.")] = False,
    gpus: Gpus = None,
) -> None:
    """Check packages, GPU, number format, disk and access to a model; each line ok, note or fail with what mends it."""
    if gpus is not None:
        raise typer.Exit(_check_ranks() if world_size() > 1 else _start_ranks(gpus))
    from gemma_grpo import diagnosis

    if as_json:
        found = diagnosis.diagnose(asked, deep=deep)
        say(found.as_json())
    else:
        found = diagnosis.doctor(asked, deep=deep)
    if not found.ok:
        raise typer.Exit(Exit.PREFLIGHT)


def _start_ranks(gpus: str) -> int:
    """The same command in a process for each GPU."""
    from gemma_grpo.config.machine import RanksSettings
    from gemma_grpo.launcher import launch, number_of_cards

    if gpus != "all" and not (gpus.isdecimal() and int(gpus)):
        raise ValueError(f"--gpus is {gpus!r}. Give a number of processes, or all.")
    count = int(gpus) if gpus != "all" else number_of_cards()
    if count < 2:
        raise ValueError(f"--gpus {gpus} makes {count}: a rank alone has nobody to talk to. Give a number: --gpus 2 tries it on the CPU.")
    return launch(["doctor", "--gpus", str(count)], count, RanksSettings())


def _check_ranks() -> int:
    from gemma_grpo.rank_check import check_ranks

    found = check_ranks(Path.cwd())
    say(*(f"{'ok' if good else 'fail'}    {text}" for good, text in found))
    return Exit.OK if all(good for good, _ in found) else Exit.PREFLIGHT

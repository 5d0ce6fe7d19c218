"""`gemma-grpo watch RUN|FOLDER`: the page of a run, or of all runs in a folder, while they go on or afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_grpo.cli.printing import say, say_link

Watched = Annotated[Path, typer.Argument(metavar="RUN|FOLDER", help="A run directory, or the folder that holds runs.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="The next free one is taken where it is in use; 0 for any.")]
Host = Annotated[str, typer.Option("--host", help="Where to listen. Other than this machine alone needs a token of your own.")]
TokenFile = Annotated[Path | None, typer.Option("--token-file", metavar="FILE", help="A file that holds nothing but the token.")]
Names = Annotated[
    list[str] | None, typer.Option("--allow-host", metavar="NAME", help="A name by which browsers come here, such as a proxy's.")
]


def watch(
    path: Watched = Path("runs"), port: Port = 7860, host: Host = "127.0.0.1", token_file: TokenFile = None, allow_host: Names = None
) -> None:
    """Show runs in the browser: curves, witnesses and alarms, groups, replies, settings, the report, and a playground."""
    from gemma_grpo.monitor.web.serve import Place, serve

    token = None if token_file is None else token_file.read_text(encoding="utf-8").strip()
    serve(path, Place(host, port, token, tuple(allow_host or ())), say_link)
    say("stopped")

"""The verbs, and the one place where an exception becomes an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from gemma_grpo.cli import chat, compare, data, demo, doctor, export, plan, recipes, say_stopped, training, watch
from gemma_grpo.cli.errors import Exit, output_error, report
from gemma_grpo.cli.printing import say

_INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""

app = typer.Typer(
    name="gemma-grpo",
    help="Human preferences into an aligned Gemma 3: a generative reward, GRPO with LoRA, honest evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes break in terminals that are not UTF-8, and cost start-up time
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.command("plan")(plan.plan)
app.command("train-reward")(training.train_reward)
app.command("train")(training.train)
app.command("evaluate")(training.evaluate)
app.command("report")(training.report)
app.command("compare")(compare.compare)
app.command("watch")(watch.watch)
app.command("chat")(chat.chat)
app.command("export")(export.export)


def _version(asked: bool) -> None:
    if asked:
        from gemma_grpo import __version__

        say(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Print the whole trace of an error. Works anywhere on the line.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of every verb; run() has read --debug already."""


def run(arguments: Sequence[str]) -> int:
    """One command line without the program's name; returns the exit code and never raises for what a user can cause."""
    debug = "--debug" in arguments
    words = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=words, prog_name="gemma-grpo", standalone_mode=False)
    except SystemExit as end:  # stdout was closed, such as by `| head`
        code = end.code
    except Exception as error:
        return report(output_error() or error, debug=debug)
    unwritten = output_error()
    if code == _INTERRUPTED:  # first: where a terminal is gone, the output is too
        say_stopped()
        return Exit.STOPPED
    if unwritten is not None:
        return Exit.RUNTIME if isinstance(unwritten, BrokenPipeError) else report(unwritten, debug=debug)
    return code if isinstance(code, int) else Exit.OK


def main() -> None:
    """Run this process's command line, and end with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where the stream is closed
            stream.reconfigure(errors="backslashreplace")  # a name in a path must not end a run on a terminal that cannot show it
    code = run(sys.argv[1:])
    if code == Exit.STOPPED:  # whoever stops a run waits for its end, and to take all modules down takes a second or two
        os._exit(code)
    sys.exit(code)

"""`gemma-grpo export RUN --to adapter|merged|gguf|ollama|hub:USER/NAME`: the trained model to take home."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_grpo.cli.printing import say
from gemma_grpo.cli.training import Run
from gemma_grpo.escapes import printable
from gemma_grpo.monitor.choices import FINAL

_HUB = "hub:"


def export(
    run: Run,
    to: Annotated[str, typer.Option("--to", metavar="KIND", help="adapter, merged, gguf, ollama, or hub:USER/NAME to upload.")] = "adapter",
    output: Annotated[Path | None, typer.Option("--output", metavar="FOLDER", help="RUN/export/KIND by default.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", metavar="NAME", help="adapter, best, or a step such as step-12.")] = FINAL,
    dtype: Annotated[str, typer.Option("--dtype", help="Of merged weights: stored (the base's own), bf16 or fp32.")] = "stored",
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Where the base lies now, if not where the run says.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Upload merged weights in place of the adapter.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Upload for everybody to see; private by default.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in that folder.")] = False,
) -> None:
    """Write a run's model as an adapter, merged weights, GGUF or for Ollama; it is read again and compared before it is done."""
    repository = to.removeprefix(_HUB) if to.startswith(_HUB) else None
    if repository is None and (merged or public):
        raise ValueError(f"{'--merged' if merged else '--public'} is of an upload. Use --to hub:USER/NAME.")
    if repository is not None:
        from gemma_grpo.upload import check_write_access

        check_write_access(repository)

    from gemma_grpo.export import export as write
    from gemma_grpo.stopping import listening

    kind: Any = to if repository is None else "merged" if merged else "adapter"
    with listening():
        done = write(
            run, kind, output=output, checkpoint=checkpoint, dtype=dtype, base=base, overwrite=overwrite or repository is not None,
            progress=lambda line: say(f"{printable(line)} ...", flush=True),
        )  # fmt: skip
    say(*export_lines(done.record), f"{kind}: {done.path}")
    if repository is not None:
        from gemma_grpo.upload import upload

        say(f"uploading to {repository} ...", flush=True)
        say(f"uploaded: {upload(repository, done.path, public=public)}")


def export_lines(record: Mapping[str, Any]) -> list[str]:
    """What was found when the export was read again."""
    apart, moved, merged = record["export_from_policy"], record["policy_from_base"], record.get("merged")
    lines = [
        f"training moved the policy  {moved['mean']:.3g} nat per token away from its base ({moved['tokens']} tokens)",
        f"the export is              {apart['mean']:.3g} nat per token away from the policy (largest {apart['largest']:.3g}), "
        f"the same likeliest token in {apart['agreement']:.2%}",
    ]
    if merged:
        changed = f"{merged['changed']:,} of {merged['numbers']:,} numbers changed"
        lines.append(f"merged                     {changed}; {merged['kept']:.1%} of the adapter's change is in them as stored")
    return [*lines, *(printable(note) for note in record["notes"])]

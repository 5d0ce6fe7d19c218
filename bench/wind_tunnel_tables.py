"""What bench/results/wind_tunnel.json shows, as tables: `python -m bench.wind_tunnel_tables` writes them into docs/overoptimisation.md.

Points are hundredths of the gold score. A run's peak is its highest look; a mean over seeds stands beside the lowest and the highest.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.document import WrittenPart
from bench.wind_tunnel import RESULTS, VARIANTS
from gemma_grpo.monitor.watched import Parting, parting

DOCUMENT = WrittenPart(
    Path(__file__).parents[1] / "docs" / "overoptimisation.md",
    "<!-- tables, written by python -m bench.wind_tunnel_tables -->\n",
    "<!-- tables: end -->\n",
)
REPORTED = (0, 1, 2, 3, 4)
"""Seeds of the tables. Limits of the alarms were set on others, from 100 on."""
RESTRAINED, FREE = "defaults", "nothing"
Run = Mapping[str, Any]


def partings(runs: Sequence[Run]) -> list[Parting]:
    """Where each run's gold went from its reward."""
    found = [parting([{**look, "metrics": look, "alarms": _alarms(run, look["step"])} for look in run["looks"]]) for run in runs]
    return [one for one in found if one is not None]


def _alarms(run: Run, step: int) -> list[Mapping[str, Any]]:
    return [alarm for alarm in run["alarms"] if alarm["step"] == step]


def of(runs: Sequence[Run], variant: str, seeds: Sequence[int] | None = REPORTED) -> list[Run]:
    """The runs of one variant, of these seeds or of all."""
    return [run for run in runs if run["variant"] == variant and (seeds is None or run["seed"] in seeds)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, lowest and highest."""
    if not values:
        return "–"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ablation_table(runs: Sequence[Run]) -> str:
    """One line for each variant that was run."""
    titles = ("", "seeds", "gold at the start", "peak", "end", "lost from peak", "reward from peak to end", "KL per reply, nats")
    head = f"| {' | '.join((*titles, 'alarm in', 'lost when it came'))} |"
    rows = [head, "|---" * 10 + "|"]
    for variant in VARIANTS:
        chosen = of(runs, variant)
        if not chosen:
            continue
        found = partings(chosen)
        alarmed = [one for one in found if one.alarm is not None]
        cells = [
            str(len(chosen)),
            spread([100 * run["looks"][0]["gold"] for run in chosen]),
            spread([100 * one.peak for one in found]),
            spread([100 * one.end for one in found]),
            spread([100 * one.lost for one in found]),
            spread([one.proxy_at_end - one.proxy_at_peak for one in found], 2),
            spread([run["looks"][-1]["kl_sequence"] for run in chosen]),
            f"{len(alarmed)} of {len(found)}",
            spread([100 * (one.lost_at_alarm or 0.0) for one in alarmed]),
        ]
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def promises(runs: Sequence[Run]) -> str:
    """What is asked of the defaults and of the alarms, and what was found."""
    healthy, free = of(runs, RESTRAINED, None), partings(of(runs, FREE))
    counted: list[tuple[str, str]] = []
    kept = partings(of(runs, RESTRAINED))
    if kept:
        counted.append(("with the defaults gold ends within 2 points of its peak", _share(kept, lambda one: 100 * one.lost <= 2)))
    if free:
        counted.append(("without restraint gold falls at least 10 points below its peak", _share(free, lambda one: 100 * one.lost >= 10)))
        counted.append(("while the reward goes on rising", _share(free, lambda one: one.proxy_at_end > one.proxy_at_peak)))
        early = _share(free, lambda one: one.alarm is not None and 100 * (one.lost_at_alarm or 0.0) < 3)
        counted.append(("an alarm comes before gold has lost 3 points", early))
    watched = [run for run in healthy if run["seed"] < 100]
    if watched:
        false = [run for run in watched if any(alarm["level"] != "note" for alarm in run["alarms"])]
        counted.append(("healthy runs with an alarm", f"{len(false)} of {len(watched)}"))
    return "| | found |\n|---|---|\n" + "".join(f"| {what} | {found} |\n" for what, found in counted)


def _share(found: Sequence[Parting], holds: Callable[[Parting], bool]) -> str:
    return f"{sum(map(holds, found))} of {len(found)} seeds"


def main() -> None:
    """Write both tables."""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    DOCUMENT.write(f"{promises(runs)}\n{ablation_table(runs)}")


if __name__ == "__main__":
    main()

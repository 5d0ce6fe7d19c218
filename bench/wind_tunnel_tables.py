"""What bench/results/wind_tunnel.json shows, as tables: `python -m bench.wind_tunnel_tables` writes them into docs/overoptimisation.md.

Points are hundredths of the gold score; a mean over seeds stands beside the lowest and the highest. Variants are compared at the looks that
all of them have, every fourth step; promises and alarms are counted at every look of a run, apart for the seeds that the alarms' limits
were set with and for those that nobody had looked at. Runs without "alarms" were looked at under other limits.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.document import WrittenPart
from bench.wind_tunnel import ARMS, RESULTS, VARIANTS, WATCHED
from gemma_grpo.monitor.watched import Parting, parting

DOCUMENT = WrittenPart(
    Path(__file__).parents[1] / "docs" / "overoptimisation.md",
    "<!-- tables, written by python -m bench.wind_tunnel_tables -->\n",
    "<!-- tables: end -->\n",
)
REPORTED = range(5)
"""Seeds of the ablations and arms."""
SET_WITH = range(5, 25)
"""Seeds that the limits of the alarms were set with: how well these alarms do there says little."""
FRESH = range(25, 45)
"""Seeds that were first run when those limits stood: what an alarm is worth, these tell."""
RESTRAINED, FREE = "defaults", "nothing"
HEALTHY = 2.0
"""Points that gold may end below its peak for a run to be called healthy."""
Run = Mapping[str, Any]


def partings(runs: Sequence[Run], every: int = 1) -> list[Parting]:
    """Where each run's gold went from its reward, by the looks at multiples of `every` steps."""
    return [one for run in runs if (one := parting([_look(run, look) for look in run["looks"] if look["step"] % every == 0])) is not None]


def _look(run: Run, look: Mapping[str, Any]) -> dict[str, Any]:
    return {**look, "metrics": look, "alarms": _alarms(run, look["step"])}


def _alarms(run: Run, step: int) -> list[Mapping[str, Any]]:
    return [alarm for alarm in run.get("alarms", ()) if alarm["step"] == step]


def of(runs: Sequence[Run], variant: str, seeds: Sequence[int] = REPORTED) -> list[Run]:
    """The runs of one variant with these seeds."""
    return [run for run in runs if run["variant"] == variant and run["seed"] in seeds]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, lowest and highest."""
    if not values:
        return "–"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def beside(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """Points by which gold ends higher than others with the same seeds: mean and its standard error."""
    ends = {run["seed"]: run["looks"][-1]["gold"] for run in others}
    differences = [100 * (run["looks"][-1]["gold"] - ends[run["seed"]]) for run in runs if run["seed"] in ends]
    if len(differences) < 2:
        return "–"
    return f"{statistics.fmean(differences):+.1f} ± {statistics.stdev(differences) / len(differences) ** 0.5:.1f}"


def ablation_table(runs: Sequence[Run]) -> str:
    """One line for each variant that was run."""
    titles = ("", "seeds", "gold at the start", "peak", "end", "end beside the defaults'", "lost from peak", "reward from peak to end")
    titles = (*titles, "KL per reply, nats")
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant in VARIANTS:
        chosen = of(runs, variant)
        if not chosen:
            continue
        found = partings(chosen, WATCHED["witness.every"])
        cells = [
            str(len(chosen)),
            spread([100 * run["looks"][0]["gold"] for run in chosen]),
            spread([100 * one.peak for one in found]),
            spread([100 * one.end for one in found]),
            beside(chosen, of(runs, RESTRAINED)),
            spread([100 * one.lost for one in found]),
            spread([one.proxy_at_end - one.proxy_at_peak for one in found], 2),
            spread([run["looks"][-1]["kl_sequence"] for run in chosen]),
        ]
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def promises(runs: Sequence[Run]) -> str:
    """What is asked of the defaults and of the alarms, and what was found."""
    columns = [_kept(runs, seeds) + _lost(runs, seeds) + _false(runs, seeds) for seeds in (REPORTED, SET_WITH, FRESH)]
    spans = [f"of seeds {seeds[0]} to {seeds[-1]}" for seeds in (REPORTED, SET_WITH, FRESH)]
    head = f"| | {spans[0]} | {spans[1]}, which the limits were set with | {spans[2]}, first run afterwards |\n|---|---|---|---|\n"
    return head + "".join(f"| {row[0][0]} | {' | '.join(found for _, found in row)} |\n" for row in zip(*columns, strict=True))


def _kept(runs: Sequence[Run], seeds: Sequence[int]) -> list[tuple[str, str]]:
    lost = [100 * one.lost for one in partings(of(runs, RESTRAINED, seeds))]
    return [
        ("with the defaults gold ends within 2 points of its peak", _share([one <= HEALTHY for one in lost])),
        ("points it ends below", spread(lost)),
    ]


def _lost(runs: Sequence[Run], seeds: Sequence[int]) -> list[tuple[str, str]]:
    free = of(runs, FREE, seeds)
    judged = [run for run in free if "alarms" in run]
    found, told = partings(free), partings(judged)
    return [
        ("without restraint gold falls at least 10 points below its peak", _share([100 * one.lost >= 10 for one in found])),
        ("points it falls", spread([100 * one.lost for one in found])),
        ("while the reward goes on rising", _share([one.proxy_at_end > one.proxy_at_peak for one in found])),
        ("an alarm comes before gold has lost 3 points", _share([in_time(run) for run in judged])),
        ("points lost when it came", spread([100 * (one.lost_at_alarm or 0.0) for one in told if one.alarm is not None])),
    ]


def in_time(run: Run) -> bool:
    """Whether an alarm above a note came while gold had never been 3 points below its best so far."""
    best, worst = -1.0, 0.0
    for look in run["looks"]:
        best = max(best, look["gold"])
        worst = max(worst, best - look["gold"])
        if any(alarm["level"] != "note" for alarm in _alarms(run, look["step"])):
            return 100 * worst < 3
    return False


def _false(runs: Sequence[Run], seeds: Sequence[int]) -> list[tuple[str, str]]:
    watched = [run for run in healthy(runs, seeds) if "alarms" in run]
    closely = [run for run in watched if len(run["looks"]) == run["steps"] + 1]
    return [("healthy runs, looked at after every step, with an alarm", _share([_alarmed(run) for run in closely]))]


def _alarmed(run: Run) -> bool:
    return any(alarm["level"] != "note" for alarm in run["alarms"])


def healthy(runs: Sequence[Run], seeds: Sequence[int]) -> list[Run]:
    """The runs that learn from preferences under some restraint, and whose gold ended no more than two points below its peak."""
    restrained = [variant for variant in VARIANTS if not variant.startswith(FREE) and (variant not in ARMS or variant == RESTRAINED)]
    chosen = [run for variant in restrained for run in of(runs, variant, seeds)]
    return [run for run in chosen for one in partings([run]) if 100 * one.lost <= HEALTHY]


def arms_table(runs: Sequence[Run]) -> str:
    """Trained policies and the plain ways, on the same held-out prompts against the same replies of the untouched model."""
    arms: dict[str, list[Mapping[str, Any]]] = {variant: [run["evaluation"] for run in of(runs, variant)] for variant in ARMS}
    for run in of(runs, RESTRAINED):
        for name, found in run["baselines"].items():
            arms.setdefault(name, []).append(found)
    titles = (
        "",
        "seeds",
        "gold gained, points",
        "seeds whose interval is above 0",
        "win rate, %",
        "at equal length, %",
        "length",
        "KL per reply, nats",
    )
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    rows += [f"| {name} | {' | '.join(_arm(found))} |" for name, found in arms.items() if found]
    return "\n".join(rows) + "\n"


def _arm(found: Sequence[Mapping[str, Any]]) -> list[str]:
    sure = sum(one["gold"]["interval"][0] > 0 for one in found)
    controlled = [one["win_rate"]["length_controlled"]["value"] for one in found if one["win_rate"]["length_controlled"]]
    return [
        str(len(found)),
        spread([100 * one["gold"]["gain"] for one in found]),
        f"{sure} of {len(found)}",
        spread([100 * one["win_rate"]["after"] for one in found]),
        spread([100 * value for value in controlled]),
        spread([one["length"]["after"] for one in found]),
        spread([one["kl_sequence"]["after"] for one in found]),
    ]


def _share(holds: Sequence[bool]) -> str:
    return f"{sum(holds)} of {len(holds)}" if holds else "–"


def main() -> None:
    """Write all tables."""
    DOCUMENT.write(tables(json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]))


def tables(runs: Sequence[Run]) -> str:
    """What stands between the document's marks."""
    return f"{promises(runs)}\n{ablation_table(runs)}\n{arms_table(runs)}"


if __name__ == "__main__":
    main()

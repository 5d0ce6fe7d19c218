"""The wind tunnel's tables, from runs made by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.wind_tunnel import BARE, RESULTS, VARIANTS, alarms_of, settings, words
from bench.wind_tunnel_tables import DOCUMENT, ablation_table, arms_table, of, promises, tables


def run(variant: str, seed: int, golds: list[float], *, alarm: int | None = None, rising: bool = True) -> dict[str, Any]:
    looks = [
        {"step": 2 * n, "gold": gold, "proxy": 0.1 * n if rising else 0.0, "witness": 0.1 * n, "kl_sequence": 0.5 * n}
        for n, gold in enumerate(golds)
    ]
    alarms = [] if alarm is None else [{"level": "warn", "step": alarm, "witness": "fluency", "text": "t"}]
    return {"variant": variant, "seed": seed, "steps": len(golds) - 1, "looks": looks, "alarms": alarms, "evaluation": {}, "baselines": {}}


def unjudged(found: dict[str, Any]) -> dict[str, Any]:
    """A run whose looks were judged by other limits."""
    return {name: value for name, value in found.items() if name != "alarms"}


RUNS = [
    unjudged(run("defaults", 0, [0.3, 0.5, 0.6, 0.59])),
    unjudged(run("defaults", 1, [0.3, 0.5, 0.6, 0.57])),
    run("defaults", 7, [0.3, 0.5, 0.6, 0.6], alarm=6),
    run("defaults", 30, [0.3, 0.5, 0.6, 0.6]),
    run("defaults", 31, [0.3, 0.5, 0.6, 0.57], alarm=2),
    run("defaults", 100, [0.3, 0.2, 0.1, 0.0], alarm=2),
    unjudged(run("group std", 0, [0.3, 0.5, 0.6, 0.6])),
    unjudged(run("nothing", 0, [0.3, 0.5, 0.49, 0.3])),
    unjudged(run("nothing", 1, [0.3, 0.5, 0.4, 0.3])),
    run("nothing", 25, [0.3, 0.5, 0.45, 0.3], alarm=2),
    run("nothing", 26, [0.3, 0.5, 0.46, 0.5], alarm=6),  # gold is back when the alarm comes; it had lost 4 points
    run("nothing", 27, [0.3, 0.5, 0.48, 0.45]),
]


def test_promises_are_counted_apart_for_the_seeds_limits_were_set_with_and_fresh_ones() -> None:
    lines = promises(RUNS).splitlines()
    assert "| of seeds 0 to 4 | of seeds 5 to 24, which the limits were set with | of seeds 25 to 44, first run afterwards |" in lines[0]
    assert lines[2:] == [
        "| with the defaults gold ends within 2 points of its peak | 1 of 2 | 1 of 1 | 1 of 2 |",
        "| points it ends below | 2.0 (1.0 to 3.0) | 0.0 (0.0 to 0.0) | 1.5 (0.0 to 3.0) |",
        "| without restraint gold falls at least 10 points below its peak | 2 of 2 | – | 1 of 3 |",
        "| points it falls | 20.0 (20.0 to 20.0) | – | 8.3 (0.0 to 20.0) |",
        "| while the reward goes on rising | 2 of 2 | – | 3 of 3 |",
        "| an alarm comes before gold has lost 3 points | – | – | 1 of 3 |",  # too late, or none at all, is not in time
        "| points lost when it came | – | – | 0.0 (0.0 to 0.0) |",
        # seed 31 lost more than two points: its alarm is no false one
        "| healthy runs, looked at after every step, with an alarm | – | 1 of 1 | 0 of 1 |",
    ]


def test_a_variant_is_a_line_with_means_and_extremes() -> None:
    lines = ablation_table(RUNS).splitlines()
    assert len(lines) == 2 + 3
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    # looks at steps 0 and 4 alone: the peak is the start's 0.3 or step 4's, and the end is step 4
    assert cells[:4] == ["nothing", "2", "30.0 (30.0 to 30.0)", "44.5 (40.0 to 49.0)"]
    # ends of 30 beside 59 and 57: -29 and -27, mean -28, standard error sqrt(2) / sqrt(2)
    assert cells[4:] == ["44.5 (40.0 to 49.0)", "-28.0 ± 1.0", "0.0 (0.0 to 0.0)", "0.00 (0.00 to 0.00)", "1.5 (1.5 to 1.5)"]
    assert len(lines[0].split("|")) == len(lines[1].split("|")) == len(lines[-1].split("|"))


def measured(gain: float, low: float, win: float, equal: float, length: float) -> dict[str, Any]:
    return {
        "gold": {"gain": gain, "interval": [low, gain + 0.1]},
        "win_rate": {"after": win, "length_controlled": {"value": equal}},
        "length": {"after": length},
        "kl_sequence": {"after": 1.0},
    }


def test_arms_and_baselines_stand_in_one_table() -> None:
    runs = [
        {
            **run("defaults", 0, [0.3]),
            "evaluation": measured(0.2, 0.1, 0.7, 0.6, 12),
            "baselines": {"DPO": measured(0.1, 0.05, 0.6, 0.5, 10)},
        },
        {
            **run("defaults", 1, [0.3]),
            "evaluation": measured(0.1, -0.1, 0.6, 0.5, 12),
            "baselines": {"DPO": measured(0.0, -0.1, 0.5, 0.5, 10)},
        },
        {**run("random", 0, [0.3]), "evaluation": measured(0.0, -0.1, 0.5, 0.5, 15)},
    ]
    lines = arms_table(runs).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:4]] for line in lines[2:]] == [
        ["defaults", "2", "15.0 (10.0 to 20.0)"],
        ["random", "1", "0.0 (0.0 to 0.0)"],
        ["DPO", "2", "5.0 (0.0 to 10.0)"],
    ]
    assert lines[2].split("|")[4:7] == [" 1 of 2 ", " 65.0 (60.0 to 70.0) ", " 55.0 (50.0 to 60.0) "]


def test_every_variant_is_known_settings_and_the_first_is_none() -> None:
    from gemma_grpo.config import load_recipe, parse_overrides

    assert VARIANTS["defaults"] == {}
    for variant in VARIANTS:
        load_recipe("miniature", parse_overrides(words(settings(variant, 0)), "miniature"))
    config = load_recipe("miniature", parse_overrides(words(BARE), "miniature"))
    assert (config.kl.placement, config.reward_model.shaping, config.reward) == ("off", "none", {"generative": 1.0})


@pytest.mark.skipif(not RESULTS.is_file(), reason="no wind tunnel results are here")
def test_the_documents_tables_are_those_of_the_results() -> None:
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    document = DOCUMENT.path.read_text(encoding="utf-8")
    assert DOCUMENT.filled(document, tables(runs)) == document
    assert of(runs, "defaults")


def test_kept_looks_are_judged_as_a_run_judges_them_each_finding_once() -> None:
    def look(step: int, proxy: float, strayed: float) -> dict[str, Any]:
        replies = [
            {"prompt_id": f"p{n}", "kind": "benign", "proxy": proxy + 0.01 * (n % 7), "strayed": float(n < 100 * strayed)}
            for n in range(100)
        ]
        return {"step": step, "metrics": {}, "replies": replies, "alarms": [{"level": "alert", "witness": "of other limits"}]}

    looks = [look(0, 0.0, 0.0), look(1, 0.5, 0.0), look(2, 0.9, 0.08), look(3, 1.0, 0.09), look(4, 1.1, 0.2)]
    # 8 of 100 replies strayed: past the limit of 0.05, below its double; 9 is the same again; 20 is past the double
    assert [(one["step"], one["witness"], one["level"]) for one in alarms_of(looks)] == [(2, "strayed", "warn"), (4, "strayed", "alert")]

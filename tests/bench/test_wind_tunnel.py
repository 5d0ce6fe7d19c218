"""The wind tunnel's tables, from runs made by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.wind_tunnel import BARE, RESULTS, VARIANTS, settings, words
from bench.wind_tunnel_tables import DOCUMENT, ablation_table, of, promises


def run(variant: str, seed: int, golds: list[float], *, alarm: int | None = None, rising: bool = True) -> dict[str, Any]:
    looks = [
        {"step": 2 * n, "gold": gold, "proxy": 0.1 * n if rising else 0.0, "witness": 0.1 * n, "kl_sequence": 0.5 * n}
        for n, gold in enumerate(golds)
    ]
    alarms = [] if alarm is None else [{"level": "warn", "step": alarm, "witness": "fluency", "text": "t"}]
    return {"variant": variant, "seed": seed, "steps": 6, "looks": looks, "alarms": alarms, "evaluation": {}, "baselines": {}}


RUNS = [
    run("defaults", 0, [0.3, 0.5, 0.6, 0.59]),
    run("defaults", 1, [0.3, 0.5, 0.6, 0.57], alarm=6),
    run("defaults", 7, [0.3, 0.5, 0.6, 0.6]),
    run("defaults", 100, [0.3, 0.2, 0.1, 0.0], alarm=2),
    run("nothing", 0, [0.3, 0.5, 0.49, 0.3], alarm=4),
    run("nothing", 1, [0.3, 0.5, 0.4, 0.3], alarm=6),
]


def test_promises_are_counted_over_the_reported_seeds() -> None:
    lines = promises(RUNS).splitlines()[2:]
    assert lines == [
        "| with the defaults gold ends within 2 points of its peak | 1 of 2 seeds |",
        "| without restraint gold falls at least 10 points below its peak | 2 of 2 seeds |",
        "| while the reward goes on rising | 2 of 2 seeds |",
        "| an alarm comes before gold has lost 3 points | 1 of 2 seeds |",
        # seeds 0, 1 and 7; those from 100 on are what the limits were set on
        "| healthy runs with an alarm | 1 of 3 |",
    ]


def test_a_variant_is_a_line_with_means_and_extremes() -> None:
    lines = ablation_table(RUNS).splitlines()
    assert len(lines) == 2 + 2
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[:4] == ["nothing", "2", "30.0 (30.0 to 30.0)", "50.0 (50.0 to 50.0)"]
    assert cells[4:7] == ["30.0 (30.0 to 30.0)", "20.0 (20.0 to 20.0)", "0.20 (0.20 to 0.20)"]
    assert cells[7:] == ["1.5 (1.5 to 1.5)", "2 of 2", "10.5 (1.0 to 20.0)"]
    assert len(lines[0].split("|")) == len(lines[1].split("|")) == len(lines[-1].split("|"))


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
    assert DOCUMENT.filled(document, f"{promises(runs)}\n{ablation_table(runs)}") == document
    assert of(runs, "defaults")

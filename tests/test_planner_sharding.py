"""When the plan shares out the base's layers over ranks, what each then keeps, and that it says so."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_grpo.cards import GIB, known_cards, named_card
from gemma_grpo.config import ConfigError, build_config
from gemma_grpo.planner import Plan, plan_run
from gemma_grpo.planner.phases import BASE
from gemma_grpo.shapes import shape_of

LAYER = 412_898_560
"""Numbers of a 27b layer: q and o 5376 x 4096, k and v 5376 x 2048, three of 5376 x 21504, gains 4 x 5376 + 2 x 128."""
EMBEDDING = 262_208 * 5376


def plan(card: str, **settings: Any) -> Plan:
    config = build_config({"model_name": "google/gemma-3-27b-it", **settings})
    return plan_run(config, shape_of(config.model_name), named_card(card))


def base(planned: Plan, name: str) -> int:
    return next(phase.parts[BASE] for phase in planned.phases if phase.name == name)


def test_what_fits_no_card_is_shared_out_over_four() -> None:
    assert not plan("l4").fits
    planned = plan("l4", gpus=4)
    assert planned.fits
    assert (planned.sharding.ranks, planned.sharding.whole_while_sampling) == (4, False)
    # bfloat16: embedding whole, a fourth of 62 layers, three gathered layers
    expected = 2 * (EMBEDDING + 62 * LAYER / 4 + 3 * LAYER)
    assert base(planned, "update") == pytest.approx(expected, rel=1e-6)
    assert base(planned, "rollout") == base(planned, "update")
    assert expected / GIB == pytest.approx(16.85, abs=0.01)


def test_a_rollout_has_the_whole_base_where_there_is_room() -> None:
    planned = plan("h100", gpus=4, sharding="full")
    assert planned.fits
    assert planned.sharding.whole_while_sampling
    # its own fourth stays beside what is gathered
    assert base(planned, "rollout") == pytest.approx(2 * (EMBEDDING + 1.25 * 62 * LAYER), rel=1e-6)
    assert base(planned, "evaluation") == base(planned, "rollout")
    assert base(planned, "update") == pytest.approx(2 * (EMBEDDING + 62 * LAYER / 4 + 3 * LAYER), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"gpus": 4}, {"sharding": "full"}, {"gpus": 4, "sharding": "none"}])
def test_a_base_that_fits_or_has_nobody_to_share_with_stays_whole(settings: dict[str, Any]) -> None:
    planned = plan("h100", **settings)
    assert planned.sharding.ranks == 1
    assert "shared out" not in f"{planned}{planned.summary}"


def test_a_quantised_base_stays_whole() -> None:
    assert plan("rtx3060", gpus=4, quantization="nf4").sharding.ranks == 1
    with pytest.raises(ConfigError, match=r"a quantised base is never shared out. Use sharding=none, or quantization=none"):
        plan("l4", gpus=4, quantization="nf4", sharding="full")


def test_a_float16_base_stays_whole() -> None:
    assert plan("t4", gpus=4).sharding.ranks == 1
    with pytest.raises(ValueError, match=r"on Tesla T4 the base is float16.*Use sharding=none with quantization=nf4, or precision=fp32"):
        plan("t4", gpus=4, sharding="full")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_no_rank_holds_more_with_more_ranks(ranks: int) -> None:
    for card in known_cards():
        if named_card(card).native_bf16:
            settings = {"sharding": "full", "memory.token_budget": 4096, "memory.kv_token_budget": 4096, "memory.limit_gib": 1.0}
            more, fewer = plan(card, gpus=2 * ranks, **settings), plan(card, gpus=ranks, **settings)
            assert all(base(more, phase.name) < base(fewer, phase.name) for phase in fewer.phases)


def test_the_screen_and_the_record_say_how_it_is_shared_out() -> None:
    for card, how in (("l4", "layer by layer, in each step of sampling too"), ("h100", "whole while sampling")):
        planned = plan(card, gpus=4, sharding="full")
        words = f"; its layers shared out over 4 ranks, gathered {how}"
        assert planned.summary.endswith(words)
        assert words in str(planned)
        assert planned.to_dict()["sharding"] == {"ranks": 4, "whole_while_sampling": card == "h100"}


def test_what_would_help_is_tried_with_the_base_shared_out() -> None:
    helps = {suggestion.change: suggestion.fits for suggestion in plan("rtx3060", gpus=4).suggestions}
    assert helps["model_name=google/gemma-3-12b-it"]  # whole it does not fit 12 GB
    assert "model_name=google/gemma-3-12b-it" not in {one.change for one in plan("rtx3060").suggestions if one.fits}


def test_what_would_help_can_be_set_and_holds_there() -> None:
    """Float16 cards and 4 bits have no base that is shared out."""
    helps = [suggestion.change for suggestion in plan("l4", gpus=2, sharding="full").suggestions]
    assert "sharding=none quantization=nf4" in helps
    # 12b by four needs less than a T4 or V100 has, and these have no bfloat16: the next card is one that has
    small = plan("rtx3070", gpus=4, model_name="google/gemma-3-12b-it")
    assert small.peak.total < named_card("t4").usable_bytes
    larger = next(one.change for one in small.suggestions if one.change.startswith("a larger card"))
    assert larger.startswith("a larger card, such as GeForce RTX 3060 ")


def test_the_plan_of_what_was_started_counts_who_is_there() -> None:
    config = build_config({"model_name": "google/gemma-3-27b-it", "gpus": 8})
    for ranks in (1, 2, 4):
        planned = plan_run(config, shape_of(config.model_name), named_card("l4"), ranks=ranks)
        assert planned.sharding.ranks == ranks
        assert planned.fits == (ranks == 4)

"""`gemma-grpo plan`: what a run will hold on a card, before anything is downloaded or loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gemma_grpo.cards import named_card, present_card
from gemma_grpo.cli.errors import Exit
from gemma_grpo.cli.printing import say
from gemma_grpo.cli.training import Overrides, Recipe
from gemma_grpo.config import load_recipe, parse_overrides
from gemma_grpo.planner import find_shape, plan_run


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    card: Annotated[str | None, typer.Option("--card", help="Plan for t4, a100-80, cpu, ...; default: the card present.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, sizes in bytes.")] = False,
) -> None:
    """Show what a run will hold in memory, phase by phase, and whether it fits: exit code 3 if not. Loads no model."""
    config = load_recipe(recipe, parse_overrides(overrides or [], recipe))
    planned = plan_run(config, find_shape(config.model_name), present_card() if card is None else named_card(card))
    say(json.dumps(planned.to_dict(), indent=2) if as_json else str(planned))
    if not planned.fits:
        raise typer.Exit(Exit.PREFLIGHT)

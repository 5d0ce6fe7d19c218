"""The shipped recipes: each plans to the figure that its header states for a card, and each gets as far as its first rollout."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from gemma_grpo import GRPOTrainer
from gemma_grpo.cards import GIB, known_cards
from gemma_grpo.config import find_recipe, load_recipe, shipped_recipes
from gemma_grpo.grpo.setup import DEFAULT_REWARD
from gemma_grpo.planner import plan_run
from gemma_grpo.reward.sandbox.running import why_not
from gemma_grpo.shapes import shape_of

from .conftest import PAIR_ROWS

REAL = [name for name in shipped_recipes() if name != "miniature"]
MEMORY = re.compile(
    r"^# Memory: about ([\d.]+) GiB on ([\w-]+) \(planned, not measured\): `gemma-grpo plan ([\w-]+) --card ([\w-]+)`\.$", re.MULTILINE
)


def header(name: str) -> str:
    """The comment a recipe begins with."""
    lines = find_recipe(name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_the_sizes_users_ask_for_have_a_recipe() -> None:
    assert {"gemma3-270m", "gemma3-1b", "gemma3-4b-t4", "gemma3-4b", "gemma3-12b-nf4", "miniature"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_states_the_memory_its_plan_gives_and_fits(name: str) -> None:
    stated = MEMORY.search(header(name))
    assert stated is not None, header(name)
    gib, card, recipe, planned_card = stated.groups()
    assert (recipe, planned_card) == (name, card)
    config = load_recipe(name)
    plan = plan_run(config, shape_of(config.model_name), known_cards()[card])
    assert plan.fits
    assert f"{plan.peak.total / GIB:.2f}" == gib


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_states_its_product_and_how_to_get_the_weights(name: str) -> None:
    config, text = load_recipe(name), header(name)
    assert (
        f"{config.batch_size} prompts x {config.gradient_accumulation_steps} accumulation x {config.num_generations} completions"
        f" = {config.completions_per_step} completions per update" in text
    )
    assert f"https://huggingface.co/{config.model_name}" in text


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_ready_to_run(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = load_recipe(name)
    if config.quantization == "nf4" and find_spec("bitsandbytes") is None:
        pytest.skip("quantization=nf4 needs bitsandbytes: pip install 'gemma-grpo[nf4]'")
    if "unit_tests" in (config.reward or {}) and why_not() is not None:
        pytest.skip(f"programs cannot be shut in here: {why_not()}")
    here = {}
    if name != "miniature":  # the real weights are gated: the tests' own small model and rows stand in
        here = {"model_name": str(tiny_model_dir)}
    if here and not config.dataset.startswith("bundled:"):
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in PAIR_ROWS), encoding="utf-8")
        here = {"model_name": str(tiny_model_dir), "dataset": str(rows), "data.holdout": 0.25}
    found = GRPOTrainer.from_recipe(name, here).dry_run()
    assert found["steps"] > 0
    assert found["prompts"]
    assert found["rewards"] == (config.reward or DEFAULT_REWARD)

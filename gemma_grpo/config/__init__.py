"""Settings: what they mean (schema.py) and how a recipe is read (recipe.py). Loads no torch."""

from gemma_grpo.config.machine import MemorySettings
from gemma_grpo.config.problems import ConfigError, Problem
from gemma_grpo.config.recipe import build_config, dump_recipe, load_recipe, parse_overrides
from gemma_grpo.config.schema import (
    AdvantageSettings,
    DataSettings,
    EntropySettings,
    EvaluationSettings,
    GRPOConfig,
    KLSettings,
    LoraSettings,
    LossSettings,
    OptimizerSettings,
    RewardFunctionSettings,
    RewardModelSettings,
    SamplingSettings,
)
from gemma_grpo.config.shipped import find_recipe, shipped_recipes

__all__ = [
    "AdvantageSettings",
    "ConfigError",
    "DataSettings",
    "EntropySettings",
    "EvaluationSettings",
    "GRPOConfig",
    "KLSettings",
    "LoraSettings",
    "LossSettings",
    "MemorySettings",
    "OptimizerSettings",
    "Problem",
    "RewardFunctionSettings",
    "RewardModelSettings",
    "SamplingSettings",
    "build_config",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "parse_overrides",
    "shipped_recipes",
]

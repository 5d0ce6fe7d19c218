"""Settings: what they mean (schema.py) and how a recipe is read (recipe.py). Loads no torch."""

from gemma_grpo.config.schema import GRPOConfig

__all__ = ["GRPOConfig"]

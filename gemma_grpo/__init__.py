"""gemma-grpo: human preferences into an aligned Gemma 3. Public names load on use; importing the package loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_grpo.config import GRPOConfig
    from gemma_grpo.data.hh_rlhf import load_hh_rlhf
    from gemma_grpo.diagnosis import doctor
    from gemma_grpo.grpo.trainer import GRPOTrainer

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOTrainer", "doctor", "load_hh_rlhf"]

_HOME = {
    "GRPOConfig": "gemma_grpo.config",
    "GRPOTrainer": "gemma_grpo.grpo.trainer",
    "doctor": "gemma_grpo.diagnosis",
    "load_hh_rlhf": "gemma_grpo.data.hh_rlhf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemma_grpo' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

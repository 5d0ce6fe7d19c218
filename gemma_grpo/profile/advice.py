"""Two or three sentences on the largest phase: what of it could be changed. Only settings that exist; the choice stays the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemma_grpo.config import GRPOConfig

NEAR = 2.0
"""Up to so many times its floor, a phase has little left to win but by less work."""
_LESS = "only fewer or shorter completions take less (num_generations, max_completion_length)."


def advice(phases: Mapping[str, tuple[float, float]], config: GRPOConfig, judges: Sequence[str]) -> str:
    """What could be done about the phase that took most.

    `phases` are seconds and those of the floor, 0 where no work of the model's was counted; `judges` the rewards that run the model.
    """
    name, (seconds, floor) = max(phases.items(), key=lambda item: item[1][0])
    share = seconds / (sum(spent for spent, _ in phases.values()) or 1.0)
    near = 0 < seconds <= NEAR * floor
    head = f"{name} took {share:.0%} of the time" + (f", {seconds / floor:.1f} times its floor" if floor else "")
    remedies = {
        "rollout": _rollout(config, near),
        "reward": _reward(config, near, judges),
        "reference": f"kl.placement=off leaves this pass out, and the leash to the reference with it.{_larger_passes(config, near)}",
        "update": _update(config, near),
        "other": "That is writing: look at the disk." + (" A larger save_steps writes fewer checkpoints." if config.save_steps else ""),
    }
    return f"{head}. {remedies[name]}"


def _rollout(config: GRPOConfig, near: bool) -> str:
    if near:
        return f"It is near what the machine can do: {_LESS}"
    kv = ", leave memory.kv_token_budget out" if config.memory.kv_token_budget else ""
    return (
        "Each token of a reply costs a fixed time besides its work: sample more replies together (batch_size, "
        f"gradient_accumulation_steps{kv}), or shorter ones (max_completion_length)."
    )


def _reward(config: GRPOConfig, near: bool, judges: Sequence[str]) -> str:
    if not judges:
        return "It is the rewards' own code: let it score all completions of a call at once, or wait for answers together (async def)."
    if near:
        return f"It is near what the machine can do: {_LESS}"
    return f"What is not {' and '.join(judges)} is the other rewards' own code.{_larger_passes(config, near)}"


def _update(config: GRPOConfig, near: bool) -> str:
    options = []
    if config.planning_steps > 1:
        options.append(f"planning_steps={config.planning_steps - 1} makes one pass less over each rollout.")
    if config.gradient_checkpointing:
        options.append("gradient_checkpointing=false saves the second forward pass, where memory allows: `gemma-grpo plan` says.")
    if not options:
        options.append(_LESS.capitalize())
    return " ".join(options) + _larger_passes(config, near)


def _larger_passes(config: GRPOConfig, near: bool) -> str:
    """Small passes leave a machine idle between them."""
    if near:
        return ""
    if config.memory.token_budget is not None:
        return f" memory.token_budget={config.memory.token_budget} cuts it into small passes: leave it out where memory allows."
    if config.gradient_accumulation_steps > 1:
        return f" batch_size={config.prompts_per_step} gradient_accumulation_steps=1 makes fewer, larger passes where memory allows."
    return ""

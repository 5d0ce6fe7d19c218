"""AdamW over one adapter: every update can be taken back, and what it remembers saved. What is applied and when is others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Copies of the weights, in the parameters' order, and of AdamW's state."""

    weights: Sequence[Tensor]
    adamw: Mapping[str, Any]


class AdapterOptimizer:
    """The parameters of an adapter, by name, and their AdamW."""

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], *, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.parameters = parameters
        self.adamw = torch.optim.AdamW(list(parameters.values()), betas=betas, eps=eps, weight_decay=weight_decay)

    def apply(self, gradient: Sequence[Tensor], rate: float) -> None:
        """One update at this learning rate."""
        for parameter, tensor in zip(self.parameters.values(), gradient, strict=True):
            parameter.grad = tensor.clone()
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def not_finite(self) -> str | None:
        """Name of the first weight that is not finite, None when all are."""
        return next((name for name, parameter in self.parameters.items() if not torch.isfinite(parameter).all()), None)

    def snapshot(self) -> Snapshot:
        """All of it, to come back to."""
        state = self.adamw.state_dict()
        return Snapshot([p.detach().clone() for p in self.parameters.values()], {**state, "state": _copied(state["state"])})

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Be as at a snapshot again."""
        for parameter, value in zip(self.parameters.values(), snapshot.weights, strict=True):
            parameter.copy_(value)
        # load_state_dict keeps the tensors it is given: a second retry must not find them changed by the first
        self.adamw.load_state_dict({**snapshot.adamw, "state": _copied(snapshot.adamw["state"])})

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments, as parameter/key: with the weights all that a checkpoint needs to go on exactly."""
        return {
            f"{name}/{key}": value.detach().clone()
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what state() gave."""
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            # AdamW keeps its count of updates on the CPU, its moments where the weights are
            place = value.device if key == "step" else self.parameters[name].device
            self.adamw.state[self.parameters[name]][key] = value.to(place, copy=True)


def _copied(state: Mapping[Any, Mapping[str, Tensor]]) -> dict[Any, dict[str, Tensor]]:
    return {index: {key: value.clone() for key, value in entry.items()} for index, entry in state.items()}

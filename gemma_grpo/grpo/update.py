"""One rollout batch into weights: planning passes, micro-batches, the step limit. Owns the optimizer and the controllers.

Nothing acts before it was checked finite; an update that goes further than the step limit allows is taken back. The gradient is
that of the whole step: neither the token budget nor a piece repeated after running out of memory changes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.batch import PolicyBatch, WeightedBatch
from gemma_grpo.grpo.control import AdaptiveBeta, AdaptiveEntropy, HardStop, StepLimit
from gemma_grpo.grpo.loss import KL_ESTIMATORS, POLICY_LOSSES, policy_objective, sampler_weights, step_kl, token_weights
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.memory import TokenBudget
from gemma_grpo.model.precision import LossScale

Gradient = list[Tensor]


class PolicyUpdater:
    """Learns from rollout batches with AdamW over the policy adapter."""

    def __init__(self, model: Gemma, config: GRPOConfig, total_steps: int) -> None:
        self.model, self.config = model, config
        self.total_updates = max(1, total_steps * config.planning_steps)
        self.parameters = model.adapter_parameters("policy")
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        kl, entropy = config.kl, config.entropy
        target = None if kl.placement == "off" else kl.ref_target
        self.beta = AdaptiveBeta(kl.beta if kl.placement != "off" else 0.0, target=target, minimum=kl.beta_min, maximum=kl.beta_max)
        self.hard_stop = HardStop(target=target, patience=kl.hard_stop_steps)
        self.limit = StepLimit(kl.step_limit)
        self.entropy = AdaptiveEntropy(threshold=entropy.threshold, max_alpha_ratio=entropy.max_alpha_ratio, step=entropy.step)
        loss = config.loss
        self.policy_loss = partial(POLICY_LOSSES[loss.type], clip_low=loss.clip_low, clip_high=loss.clip_high, dual_clip=loss.dual_clip)
        self.kl_estimator = KL_ESTIMATORS[kl.estimator] if kl.placement == "loss" else None
        self.loss_scale = LossScale(model.dtype)
        self._start: tuple[list[Tensor], dict[str, Any]] | None = None
        """Weights and optimizer before the first pass of an update, while there is one."""

    def update(self, batch: PolicyBatch, step: int) -> dict[str, float]:
        """All planning passes over one rollout batch; what they measured, by metric name.

        Whatever ends it early leaves weights, optimizer and controllers as they were: a request to stop, an error, or a loss or a
        gradient that is not finite, which raises FloatingPointError.
        """
        controllers, tokens = self._controller_states(), self.model.budget.tokens
        self._start = None
        try:
            metrics = self._planning_passes(batch, step)
        except BaseException:
            if self._start is not None:
                self._restore(self._start)
            self._load_controllers(controllers)
            self.model.budget.tokens = tokens  # which load never raises
            self._start = None
            raise
        self._start = None
        return metrics

    @property
    def intact(self) -> bool:
        """Whether weights and optimizer are those after the last whole update: not when one that ended early could not be taken back."""
        return self._start is None

    def _planning_passes(self, batch: PolicyBatch, step: int) -> dict[str, float]:
        self._seed_dropout(step)
        self.loss_scale.relax()
        first: dict[str, float] = {}
        sums: dict[str, float] = {}
        norm, kl_step, passes, taken = 0.0, 0.0, 0, None
        for index in range(self.config.planning_steps):
            gradient, sums, logprobs = self._accumulate(batch)
            if index == 0:
                # the first pass's own log-probabilities are the old ones: its ratio is exactly 1, and no pass is spent on them
                first, batch = sums, replace(batch, old_logprobs=logprobs)
            else:
                kl_step = sums["kl_step_sum"] / sums["tokens"]
                if self._shortened(batch, taken, kl_step) or self.limit.before_pass(kl_step) == "stop":
                    break
            norm = self._checked_norm(gradient, sums, step)
            taken = (self._snapshot(), gradient, self.learning_rate(step * self.config.planning_steps + index))
            self._start = self._start or taken[0]
            self._apply(gradient, taken[2])
            passes += 1
        else:
            if self._may_have_gone_far(kl_step, passes):
                kl_step = self._measured_step_kl(batch)
                self._shortened(batch, taken, kl_step)
        return self._metrics(batch, first, sums) | {
            "grad_norm": norm,
            "kl_step": kl_step,
            "passes": float(passes),
            "learning_rate": 0.0 if taken is None else taken[2],
            "rollbacks": float(self.limit.rollbacks),
            "oom_retries": float(self.model.budget.halvings),
            **({"overflow_retries": float(self.loss_scale.retries)} if self.loss_scale.active else {}),
            **({} if self.model.budget.tokens is None else {"token_budget": float(self.model.budget.tokens)}),
        }

    def learning_rate(self, update: int) -> float:
        """Rate of the update with this number, from 0: linear warm-up, then the schedule down to the last update of the run."""
        settings = self.config.optimizer
        if update < settings.warmup_updates:
            return self.config.learning_rate * (update + 1) / settings.warmup_updates
        done = (update - settings.warmup_updates) / max(1, self.total_updates - settings.warmup_updates)
        left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[settings.schedule]
        return self.config.learning_rate * max(0.0, left)

    def _accumulate(self, batch: PolicyBatch) -> tuple[Gradient, dict[str, float], Float[Tensor, "N G C"]]:
        """Gradient of the whole step's loss, sums of what was measured, and the policy's log-probabilities."""
        weighted = WeightedBatch(**vars(batch), token_weights=self._token_weights(batch.completion_mask))
        gradient = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self.parameters.values()]
        logprobs = torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)
        totals: dict[str, Tensor] = {}
        with self.model.role("policy", train=True):
            for slot, (part, metrics, now) in self.model.budget.run(weighted, self._piece_gradient, doing="learning"):
                for total, value in zip(gradient, part, strict=True):
                    if value is not None:
                        total += value
                totals = {name: totals.get(name, 0.0) + value for name, value in metrics.items()}
                slot.put(now, logprobs)
        return gradient, {name: float(value) for name, value in totals.items()}, logprobs

    def _token_weights(self, mask: Bool[Tensor, "N G C"]) -> Float[Tensor, "N G C"]:
        """What each token counts in the step's loss, before any cut: only bnpo looks at micro-batches, which are batch_size prompts."""
        micro_batches = mask.split(self.config.batch_size)
        weights = [
            token_weights(
                part.flatten(0, 1),
                aggregation=self.config.loss.aggregation,
                num_step_completions=mask[..., 0].numel(),
                num_step_tokens=int(mask.sum()),
                max_completion_length=self.config.max_completion_length,
                num_micro_batches=len(micro_batches),
            ).view_as(part)
            for part in micro_batches
        ]
        return torch.cat(weights)

    def _piece_gradient(self, piece: WeightedBatch) -> tuple[Sequence[Tensor | None], dict[str, Tensor], Tensor]:
        """Gradient of a piece's share of the loss, its metrics and log-probabilities. Accumulates nothing: it may be repeated.

        torch.autograd.grad, not backward(): a backward pass that runs out of memory has already added to some of the .grad.
        """
        largest, parameters = float(piece.token_weights.max()), list(self.parameters.values())
        while True:
            loss, metrics, logprobs = self._piece_loss(piece)
            gradient = self.loss_scale.gradient(loss, parameters, largest)
            if gradient is not None:
                return gradient, metrics | {"loss": loss.detach()}, logprobs

    def _piece_loss(self, piece: WeightedBatch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        config = self.config
        alpha = self.entropy.alpha(self.beta.beta)
        logprobs, entropy = completion_logprobs(self.model, piece, temperature=config.temperature, entropy_gradient=alpha > 0)
        flat, mask = logprobs.flatten(0, 1), piece.completion_mask.flatten(0, 1)
        old = logprobs.detach() if piece.old_logprobs is None else piece.old_logprobs
        sampler = piece.sampling_logprobs.flatten(0, 1)
        cap = config.loss.tis_cap
        loss, metrics = policy_objective(
            flat,
            old.flatten(0, 1),
            piece.advantages.flatten(),
            mask,
            piece.token_weights.flatten(0, 1),
            policy_loss=self.policy_loss,
            ref_logprobs=None if piece.ref_logprobs is None else piece.ref_logprobs.flatten(0, 1),
            kl_estimator=self.kl_estimator,
            beta=self.beta.beta,
            entropy=entropy.flatten(0, 1),
            alpha=alpha,
            sampler_weight=None if cap is None else sampler_weights(old.flatten(0, 1), sampler, mask, cap=cap),
        )
        return loss, metrics, logprobs.detach()

    def _checked_norm(self, gradient: Gradient, sums: Mapping[str, float], step: int) -> float:
        """Norm of the gradient, which is scaled to max_grad_norm in place. Raises before anything is updated."""
        if not math.isfinite(sums["loss"]):
            raise FloatingPointError(f"step {step + 1}: the loss is {sums['loss']}; nothing was updated. Lower learning_rate.")
        for name, tensor in zip(self.parameters, gradient, strict=True):
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(
                    f"step {step + 1}: the gradient of {name} is not finite; nothing was updated. Lower learning_rate."
                )
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in gradient])))
        limit = self.config.optimizer.max_grad_norm
        if limit is not None and norm > limit:
            for tensor in gradient:
                tensor.mul_(limit / norm)
        return norm

    def _apply(self, gradient: Gradient, rate: float) -> None:
        for parameter, tensor in zip(self.parameters.values(), gradient, strict=True):
            parameter.grad = tensor.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _shortened(self, batch: PolicyBatch, taken: Any, kl_step: float) -> bool:
        """Take an update that went too far back, and try a half and a quarter of it; whether anything was taken back."""
        verdict = self.limit.after_update(kl_step)
        if verdict == "accept":
            return False
        snapshot, gradient, rate = taken
        while verdict != "accept":
            self._restore(snapshot)
            if verdict == "reject":
                break
            self._apply(gradient, rate * self.limit.step_scale)
            verdict = self.limit.after_update(self._measured_step_kl(batch))
        return True

    def _may_have_gone_far(self, kl_step: float, passes: int) -> bool:
        """Whether the last update's distance is worth a forward pass. KL grows with the square of the way: n equal updates
        after n - 1 that measured kl_step reach about kl_step (n / (n - 1))^2; one update alone is always measured."""
        if not self.limit.active:
            return False
        return passes < 2 or kl_step * (passes / (passes - 1)) ** 2 > (self.config.kl.step_limit or math.inf)

    @torch.no_grad()
    def _measured_step_kl(self, batch: PolicyBatch) -> float:
        with self.model.role("policy"):
            total = sum(kl for _, kl in self.model.budget.run(batch, self._piece_step_kl, doing="measuring the update"))
        return total / int(batch.completion_mask.sum())

    def _piece_step_kl(self, piece: PolicyBatch) -> float:
        assert piece.old_logprobs is not None
        now, _ = completion_logprobs(self.model, piece, temperature=self.config.temperature)
        return float(step_kl(now.flatten(0, 1), piece.old_logprobs.flatten(0, 1), piece.completion_mask.flatten(0, 1)).sum())

    def _metrics(self, batch: PolicyBatch, first: Mapping[str, float], last: Mapping[str, float]) -> dict[str, float]:
        """Loss, KL and entropy of the on-policy first pass; clip shares of the last one. Moves the controllers on."""
        tokens = first["tokens"]
        assert batch.old_logprobs is not None
        gap = (batch.old_logprobs - batch.sampling_logprobs).abs()[batch.completion_mask]
        metrics = {
            "loss": first["loss"],
            "policy_loss": first["policy_loss"],
            "entropy": first["entropy_sum"] / tokens,
            "beta": self.beta.beta,
            "alpha": self.entropy.alpha(self.beta.beta),
            "clip_ratio/low_mean": last["clipped_low"] / tokens,
            "clip_ratio/high_mean": last["clipped_high"] / tokens,
            "sampling_gap": float(gap.max()),
        }
        if "kl_sum" in first:
            metrics["kl"] = first["kl_sum"] / tokens
            metrics["kl_sequence"] = first["kl_sum"] / first["completions"]
            self.beta.update(metrics["kl"])
        self.entropy.update(metrics["entropy"])
        return metrics

    def over_budget(self) -> bool:
        """Whether the KL to the reference has been above twice its target for too long: training should stop."""
        return self.beta.smoothed_kl is not None and self.hard_stop.update(self.beta.smoothed_kl)

    def _snapshot(self) -> tuple[list[Tensor], dict[str, Any]]:
        state = self.optimizer.state_dict()
        copied = {index: {key: value.clone() for key, value in entry.items()} for index, entry in state["state"].items()}
        return [p.detach().clone() for p in self.parameters.values()], {**state, "state": copied}

    @torch.no_grad()
    def _restore(self, snapshot: tuple[list[Tensor], dict[str, Any]]) -> None:
        for parameter, value in zip(self.parameters.values(), snapshot[0], strict=True):
            parameter.copy_(value)
        # load_state_dict keeps the tensors it is given: a second retry must not find them changed by the first
        copied = {index: {key: value.clone() for key, value in entry.items()} for index, entry in snapshot[1]["state"].items()}
        self.optimizer.load_state_dict({**snapshot[1], "state": copied})

    def _seed_dropout(self, step: int) -> None:
        if self.config.lora.dropout:
            # a function of (seed, step), so that a resumed run drops what the uninterrupted one dropped
            torch.manual_seed(self.config.seed * 1_000_003 + step)

    def state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Adam's moments by parameter name, and the controllers' numbers: all a checkpoint needs to go on exactly."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value.detach().clone()
        return tensors, self._controller_states()

    def load(self, tensors: Mapping[str, Tensor], controllers: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from what state() gave."""
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition("/")
            # AdamW keeps its count of updates on the CPU, its moments where the weights are
            place = value.device if key == "step" else self.parameters[name].device
            self.optimizer.state[self.parameters[name]][key] = value.to(place, copy=True)
        self._load_controllers(controllers)

    def _controller_states(self) -> dict[str, dict[str, float]]:
        return {name: controller.state() for name, controller in self._controllers().items()}

    def _load_controllers(self, states: Mapping[str, Mapping[str, float]]) -> None:
        for name, controller in self._controllers().items():
            controller.load(states[name])

    def _controllers(self) -> dict[str, AdaptiveBeta | HardStop | StepLimit | AdaptiveEntropy | TokenBudget | LossScale]:
        return {
            "beta": self.beta,
            "hard_stop": self.hard_stop,
            "limit": self.limit,
            "entropy": self.entropy,
            "memory": self.model.budget,
            "loss_scale": self.loss_scale,
        }

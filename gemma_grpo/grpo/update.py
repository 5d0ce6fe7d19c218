"""One rollout batch into weights: planning passes, micro-batches, the step limit. Owns the controllers.

Nothing acts before it was checked finite; an update that goes further than the step limit allows is taken back. The gradient is
that of the whole step: neither the token budget nor a piece repeated after running out of memory changes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from zlib import crc32

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gemma_grpo import distributed
from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.batch import PolicyBatch, WeightedBatch
from gemma_grpo.grpo.control import AdaptiveBeta, AdaptiveEntropy, Controller, HardStop, Signal, SpikeGuard, StepLimit
from gemma_grpo.grpo.loss import KL_ESTIMATORS, POLICY_LOSSES, policy_objective, sampler_metrics, sampler_weights, step_kl, token_weights
from gemma_grpo.grpo.progress import PassesMade
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.model.optimizer import AdapterOptimizer, Snapshot
from gemma_grpo.model.precision import LossScale

Gradient = list[Tensor]


def sampler_statistics(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a pass's sampler_metrics: means and shares over its tokens, and the effective sample size as a share of them (Kish)."""
    tokens, squares = sums["tokens"], sums["weight_square_sum"]
    return {
        "sampling_gap_mean": sums["gap_sum"] / tokens,
        "sampling_kl": sums["sampler_kl_sum"] / tokens,
        "tis/mean_weight": sums["weight_sum"] / tokens,
        "tis/capped": sums["capped"] / tokens,
        "tis/masked": sums["masked"] / tokens,
        "tis/ess": sums["weight_sum"] ** 2 / squares / tokens if squares else 0.0,
    }


@dataclass(frozen=True)
class _Point:
    """Where an update that ends early goes back to: its last whole pass, or its start."""

    snapshot: Snapshot | None
    """Before the last whole pass, which may still be shortened; None while nothing was changed."""
    controllers: Mapping[str, Mapping[str, float]]
    tokens: int | None
    """The token budget."""
    made: PassesMade | None


class PolicyUpdater:
    """Learns from rollout batches with AdamW over the policy adapter."""

    def __init__(self, model: Gemma, config: GRPOConfig, total_steps: int) -> None:
        self.model, self.config = model, config
        self.total_updates = max(1, total_steps * config.planning_steps)
        self.parameters = model.adapter_parameters("policy")
        settings = config.optimizer
        adamw = {"betas": (settings.beta1, settings.beta2), "eps": settings.eps, "weight_decay": settings.weight_decay}
        self.optimizer = AdapterOptimizer(self.parameters, **adamw)  # type: ignore[arg-type]
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
        self.spikes, self.signal = SpikeGuard(config.optimizer.spike_sigma), Signal(config.advantage.no_signal_steps)
        self.passes: PassesMade | None = None
        """The passes of an update that was broken off after some: it can go on from there."""
        self._point: _Point | None = None
        """What an update under way goes back to; None when there is none, or one that ended early went back."""

    def update(self, batch: PolicyBatch, step: int, made: PassesMade | None = None) -> dict[str, float]:
        """All planning passes over one rollout batch; what they measured, by metric name. With `made`, those that are left of them.

        Whatever ends it early leaves weights, optimizer and controllers as they were after its last whole pass, which `passes` then
        holds: a request to stop, an error, or a number that is not finite, which raises FloatingPointError.
        """
        self.passes = made  # of this update, whatever fails from here on
        snapshot = None if made is None else self.optimizer.snapshot()
        self._point = _Point(snapshot, self._controller_states(), self.model.budget.tokens, made)
        try:
            metrics = self._planning_passes(batch, step, made)
        except BaseException:
            self._go_back(self._point)
            raise
        self.passes = self._point = None
        return metrics

    @property
    def intact(self) -> bool:
        """Whether weights and optimizer are those of a whole pass: not when an update that ended early could not be taken back."""
        return self._point is None

    @property
    def counted(self) -> dict[str, float]:
        """Metrics that count through the whole run: updates left out as spikes, and passes that ran out of memory."""
        return {"skipped_updates": float(self.spikes.skipped), "oom_retries": float(self.model.budget.halvings)}

    def _go_back(self, point: _Point) -> None:
        if point.snapshot is not None:
            self.optimizer.restore(point.snapshot)
        self._load_controllers(point.controllers)
        self.model.budget.tokens = point.tokens  # which load never raises
        self.passes, self._point = point.made, None

    def _planning_passes(self, batch: PolicyBatch, step: int, made: PassesMade | None) -> dict[str, float]:
        if made is None:
            self.loss_scale.relax()
        else:
            self.optimizer.apply(made.gradient, made.numbers["rate"])
        goes_on = True
        while goes_on and (made is None or made.count < self.config.planning_steps):
            made, goes_on = self._pass(batch, step, made)
        assert made is not None
        if goes_on and self._may_have_gone_far(made):
            kl_step = self._measured_step_kl(replace(batch, old_logprobs=made.old_logprobs))
            self._shortened(batch, made, kl_step)
            made = made.with_numbers(kl_step=kl_step)
        return self._metrics(replace(batch, old_logprobs=made.old_logprobs), made) | {
            "grad_norm": made.numbers["grad_norm"],
            "kl_step": made.numbers["kl_step"],
            "passes": float(made.count),
            "learning_rate": made.numbers["rate"],
            "rollbacks": float(self.limit.rollbacks),
            **self.counted,
            **({"overflow_retries": float(self.loss_scale.retries)} if self.loss_scale.active else {}),
            **({} if self.model.budget.tokens is None else {"token_budget": float(self.model.budget.tokens)}),
        }

    def _pass(self, batch: PolicyBatch, step: int, made: PassesMade | None) -> tuple[PassesMade, bool]:
        """One more pass, and whether another may follow: not after one that is left out."""
        index = 0 if made is None else made.count
        update = step * self.config.planning_steps + index
        self._seed_dropout(update)
        gradient, sums, logprobs = self._accumulate(batch if made is None else replace(batch, old_logprobs=made.old_logprobs))
        if made is None:
            # the first pass's own log-probabilities are the old ones: its ratio is exactly 1, and no pass is spent on them
            made = PassesMade(0, gradient, logprobs, {"rate": 0.0, "grad_norm": 0.0, "kl_step": 0.0}, first=sums, last=sums)
        else:
            kl_step = sums["kl_step_sum"] / sums["tokens"]
            made = replace(made, last=sums).with_numbers(kl_step=kl_step)
            if self._shortened(batch, made, kl_step) or self.limit.before_pass(kl_step) == "stop":
                return made, False
        norm = self._checked_norm(gradient, sums, step)
        made = made.with_numbers(grad_norm=norm)
        if self.spikes.is_spike(norm):
            self._refuse_spike(norm, step)
            return made, False
        made = replace(made, count=index + 1, gradient=gradient).with_numbers(rate=self.learning_rate(update))
        self._take(made, step)
        return made, True

    def _take(self, made: PassesMade, step: int) -> None:
        """Apply a pass's gradient; from here on, what ends the update early goes back to this pass, not to the one before."""
        assert self._point is not None
        snapshot = self.optimizer.snapshot()
        self._point = replace(self._point, snapshot=self._point.snapshot or snapshot)
        self.optimizer.apply(made.gradient, made.numbers["rate"])
        broken = self.optimizer.not_finite()
        if broken is not None:
            raise FloatingPointError(f"step {step + 1}: the update makes {broken} not finite; it was taken back. Lower learning_rate.")
        self._point = _Point(snapshot, self._controller_states(), self.model.budget.tokens, made)
        self._check_ranks_have_one_policy()

    def _check_ranks_have_one_policy(self) -> None:
        """Ranks add up the same numbers and must come to the same weights, to the bit; a card that counts wrongly shows here."""
        if distributed.world() > 1:
            checksum = 0
            for parameter in self.parameters.values():
                checksum = crc32(parameter.detach().float().cpu().numpy().tobytes(), checksum)
            distributed.agree(f"{checksum:08x}", "policy after an update")

    def _refuse_spike(self, norm: float, step: int) -> None:
        if self.config.optimizer.on_spike == "stop":
            raise FloatingPointError(
                f"step {step + 1}: the gradient's norm is {norm:.3g}, beyond optimizer.spike_sigma ({self.spikes.sigma:g}) standard "
                "deviations above those before; nothing was updated. Look at the step's completions and rewards; "
                "optimizer.on_spike=skip leaves such an update out."
            )

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
        distributed.sum_([*gradient, logprobs], "learning")
        return gradient, distributed.sum_by_name({name: float(value) for name, value in totals.items()}, "learning"), logprobs

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
        weight, measured = self._sampler_weight(old.flatten(0, 1), piece.sampling_logprobs.flatten(0, 1), mask)
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
            sampler_weight=weight,
        )
        return loss, metrics | measured, logprobs.detach()

    def _sampler_weight(self, old: Tensor, sampling: Tensor, mask: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What each token counts for its sampler's sake, and sums of it; nothing where sampler and learner are one engine."""
        cap, limit = self.config.loss.tis_cap, self.config.loss.tis_mask
        if cap is None and limit is None:
            return None, {}
        weight = sampler_weights(old, sampling, mask, cap=cap, limit=limit)
        return weight, sampler_metrics(old, sampling, mask, weight, cap=cap)

    def _checked_norm(self, gradient: Gradient, sums: Mapping[str, float], step: int) -> float:
        """Norm of the gradient, which is scaled to max_grad_norm in place. Raises before anything is updated."""
        if not math.isfinite(sums["loss"]):
            raise FloatingPointError(f"step {step + 1}: the loss is {sums['loss']}; nothing was updated. Lower learning_rate.")
        for name, tensor in zip(self.parameters, gradient, strict=True):
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(
                    f"step {step + 1}: the gradient of {name} is not finite; nothing was updated. Lower learning_rate."
                )
        # float64: squares of finite float32 numbers can be beyond float32
        norm = math.sqrt(sum(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in gradient))
        limit = self.config.optimizer.max_grad_norm
        if limit is not None and norm > limit:
            for tensor in gradient:
                tensor.mul_(limit / norm)
        return norm

    def _shortened(self, batch: PolicyBatch, made: PassesMade, kl_step: float) -> bool:
        """Take the last pass, when it went too far, back, and try a half and a quarter of it; whether anything was taken back."""
        verdict = self.limit.after_update(kl_step)
        if verdict == "accept":
            return False
        assert self._point is not None
        assert self._point.snapshot is not None
        batch = replace(batch, old_logprobs=made.old_logprobs)
        while verdict != "accept":
            self.optimizer.restore(self._point.snapshot)
            if verdict == "reject":
                break
            self.optimizer.apply(made.gradient, made.numbers["rate"] * self.limit.step_scale)
            verdict = self.limit.after_update(self._measured_step_kl(batch))
        return True

    def _may_have_gone_far(self, made: PassesMade) -> bool:
        """Whether the last update's distance is worth a forward pass. KL grows with the square of the way: n equal updates
        after n - 1 that measured kl_step reach about kl_step (n / (n - 1))^2; one update alone is always measured."""
        if not self.limit.active:
            return False
        passes, kl_step = made.count, made.numbers["kl_step"]
        return passes < 2 or kl_step * (passes / (passes - 1)) ** 2 > (self.config.kl.step_limit or math.inf)

    @torch.no_grad()
    def _measured_step_kl(self, batch: PolicyBatch) -> float:
        with self.model.role("policy"):
            total = sum(kl for _, kl in self.model.budget.run(batch, self._piece_step_kl, doing="measuring the update"))
        return distributed.sum_by_name({"kl": total}, "measuring the update")["kl"] / int(batch.completion_mask.sum())

    def _piece_step_kl(self, piece: PolicyBatch) -> float:
        assert piece.old_logprobs is not None
        now, _ = completion_logprobs(self.model, piece, temperature=self.config.temperature)
        return float(step_kl(now.flatten(0, 1), piece.old_logprobs.flatten(0, 1), piece.completion_mask.flatten(0, 1)).sum())

    def _metrics(self, batch: PolicyBatch, made: PassesMade) -> dict[str, float]:
        """Loss, KL and entropy of the on-policy first pass; clip shares of the last one. Moves the controllers on."""
        first, last, tokens = made.first, made.last, made.first["tokens"]
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
        if "gap_sum" in first:
            metrics |= sampler_statistics(first)
        if "kl_sum" in first:
            metrics["kl"] = first["kl_sum"] / tokens
            metrics["kl_sequence"] = first["kl_sum"] / first["completions"]
            self.beta.update(metrics["kl"])
        self.entropy.update(metrics["entropy"])
        return metrics

    def over_budget(self) -> bool:
        """Whether the KL to the reference has been above twice its target for too long: training should stop."""
        return self.beta.smoothed_kl is not None and self.hard_stop.update(self.beta.smoothed_kl)

    def _seed_dropout(self, update: int) -> None:
        if self.config.lora.dropout:
            # a function of (seed, update), so that a resumed run drops what the uninterrupted one dropped
            torch.manual_seed(self.config.seed * 1_000_003 + update)

    def state(self) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        """Adam's moments by parameter name, and the controllers' numbers: all a checkpoint needs to go on exactly."""
        return self.optimizer.state(), self._controller_states()

    def load(self, tensors: Mapping[str, Tensor], controllers: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from what state() gave."""
        self.optimizer.load(tensors)
        self._load_controllers(controllers)

    def _controller_states(self) -> dict[str, dict[str, float]]:
        return {name: controller.state() for name, controller in self._controllers().items()}

    def _load_controllers(self, states: Mapping[str, Mapping[str, float]]) -> None:
        for name, controller in self._controllers().items():
            controller.load(states[name])

    def _controllers(self) -> dict[str, Controller]:
        return {
            "beta": self.beta,
            "hard_stop": self.hard_stop,
            "limit": self.limit,
            "entropy": self.entropy,
            "memory": self.model.budget,
            "loss_scale": self.loss_scale,
            "spikes": self.spikes,
            "signal": self.signal,
        }

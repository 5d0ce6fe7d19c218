"""The controllers: KL weight, hard stop, step limit, entropy weight. Plain Python numbers, saved in checkpoints.

Owns decisions only: measuring is loss.py, obeying - stopping, restoring, scaling a step - is the trainer's. All KL values are
nats per token. Every controller has state() -> dict[str, float] and load(state); a resumed one decides bit for bit the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol

SMOOTHING = 0.9
"""Weight of the past in the running mean of the KL."""
MAX_ERROR = 0.2
"""Relative distance from the target beyond which the KL weight changes no faster (arXiv:1909.08593)."""
GAIN = 0.1
"""Relative change of the KL weight per step and unit of error: at most 2 % per step (arXiv:1909.08593)."""
HARD_STOP_FACTOR = 2.0
"""Times the target that the smoothed KL may reach before the hard stop counts a step."""
ROLLBACK_FACTOR = 1.5
"""Times the step limit that an update may reach before it is taken back."""
MAX_RETRIES = 2
"""Halvings of an update that was taken back, before it is given up."""
NORMS_BEFORE_JUDGING = 20
"""Gradient norms that must have been seen before one can be a spike."""
NORM_SMOOTHING = 0.98
"""Weight of the past in the running moments of the gradient's norm."""
LEAST_SPREAD = 0.1
"""Standard deviation of log norms that is assumed at least: a run as even as a clock must not call 5 % a spike."""


class Controller(Protocol):
    """What has a memory that a checkpoint keeps."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        ...

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave."""
        ...


class AdaptiveBeta:
    """KL weight steered so that the KL to the reference approaches a target (Ziegler et al., arXiv:1909.08593).

    Feed the ratio-weighted k3, never k1, whose mean can be negative. Without a target beta stays what it is, zero included.
    """

    def __init__(self, beta: float, *, target: float | None, minimum: float, maximum: float) -> None:
        if target is not None and not minimum <= beta <= maximum:
            raise ValueError(
                f"kl.beta is {beta}, outside [kl.beta_min, kl.beta_max] = [{minimum}, {maximum}], where the controller must keep it. "
                "Move a limit, or set kl.ref_target=null for a fixed beta, or kl.placement=off for no penalty."
            )
        self.beta = beta
        self._kl_sum, self._kl_weight = 0.0, 0.0
        self._target, self._minimum, self._maximum = target, minimum, maximum

    @property
    def smoothed_kl(self) -> float:
        """Running mean of the KL; 0 before the first step."""
        return self._kl_sum / self._kl_weight if self._kl_weight else 0.0

    def update(self, kl: float) -> float:
        """Take in one step's KL to the reference and return the weight for the next step. Raises FloatingPointError if it is not finite."""
        if not math.isfinite(kl):
            raise FloatingPointError(f"The KL to the reference is {kl}, so beta cannot follow it. Lower learning_rate or kl.step_limit.")
        # The weights are summed beside the values, so that the first steps are not averaged with a zero nobody measured.
        self._kl_sum = SMOOTHING * self._kl_sum + (1 - SMOOTHING) * kl
        self._kl_weight = SMOOTHING * self._kl_weight + (1 - SMOOTHING)
        if self._target is not None:
            error = _clamped(self.smoothed_kl / self._target - 1, -MAX_ERROR, MAX_ERROR)
            self.beta = _clamped(self.beta * (1 + GAIN * error), self._minimum, self._maximum)
        return self.beta

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"beta": self.beta, "kl_sum": self._kl_sum, "kl_weight": self._kl_weight}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave."""
        self.beta, self._kl_sum, self._kl_weight = state["beta"], state["kl_sum"], state["kl_weight"]


class HardStop:
    """Ends training when the smoothed KL stays above twice the target for `patience` steps on end; 0 or no target: never."""

    def __init__(self, *, target: float | None, patience: int) -> None:
        self._limit = None if target is None or patience == 0 else HARD_STOP_FACTOR * target
        self._patience = patience
        self.steps_above = 0

    def update(self, smoothed_kl: float) -> bool:
        """Take in one step's smoothed KL (AdaptiveBeta.smoothed_kl); True when training must stop."""
        if self._limit is None:
            return False
        self.steps_above = self.steps_above + 1 if smoothed_kl > self._limit else 0
        return self.reached

    @property
    def reached(self) -> bool:
        """Whether training has to stop, or had to: a run that goes on after it makes no further step."""
        return self._limit is not None and self.steps_above >= self._patience

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"steps_above": float(self.steps_above)}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave."""
        self.steps_above = int(state["steps_above"])


class StepLimit:
    """Keeps one update near the policy that sampled: a line search whose step the trainer takes, scales and takes back.

    Per update: after_update(kl) says "accept", or "retry" - restore weights and optimizer, take the same update again with the
    learning rate times step_scale - or "reject": restore and give the update up. A KL that is NaN is over any limit. With
    everyday learning rates neither limit should ever be met: a count above 0 is an alarm.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = math.inf if limit is None else limit
        self._retries = 0
        self.rollbacks = 0
        """Updates taken back so far, retries included."""
        self.stopped_passes = 0
        """Rollout batches so far whose remaining passes were left out."""

    @property
    def active(self) -> bool:
        """False without a limit: then nothing needs measuring."""
        return self._limit < math.inf

    @property
    def step_scale(self) -> float:
        """What to multiply the next update's learning rate with: 1, 0.5 or 0.25."""
        return 0.5**self._retries

    def before_pass(self, kl: float) -> Literal["accept", "stop"]:
        """Before every optimisation pass but the first: "stop" when the policy is already over the limit."""
        if not self.active or kl <= self._limit:
            return "accept"
        self.stopped_passes += 1
        return "stop"

    def after_update(self, kl: float) -> Literal["accept", "retry", "reject"]:
        """After an update, on the KL it led to: keep it, or take it back and try half, or take it back and go on."""
        if not self.active or kl <= ROLLBACK_FACTOR * self._limit:
            self._retries = 0
            return "accept"
        self.rollbacks += 1
        if self._retries == MAX_RETRIES:
            self._retries = 0
            return "reject"
        self._retries += 1
        return "retry"

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps. Checkpoints lie between updates, so no retry is ever under way in one."""
        return {"rollbacks": float(self.rollbacks), "stopped_passes": float(self.stopped_passes)}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave."""
        self.rollbacks, self.stopped_passes = int(state["rollbacks"]), int(state["stopped_passes"])
        self._retries = 0


class AdaptiveEntropy:
    """Entropy bonus that sleeps until the entropy has fallen below a fraction of its first value.

    Then its weight alpha rises by `step` of its maximum per training step, and falls likewise once the entropy is back (after
    Skywork-OR1, arXiv:2505.22312). The maximum is a fraction of beta, because alpha is exactly a temperature of
    (beta + alpha) / beta on the reference; with beta 0 the bonus is therefore 0.
    """

    def __init__(self, *, threshold: float, max_alpha_ratio: float, step: float) -> None:
        self._threshold, self._max_alpha_ratio, self._step = threshold, max_alpha_ratio, step
        self.initial = 0.0
        """Entropy of the first step, nats per token; 0 before it."""
        self.level = 0.0
        """alpha as a fraction of its maximum, 0 to 1."""

    def update(self, entropy: float) -> None:
        """Take in one step's mean entropy, nats per token; the first call only remembers it."""
        self.initial = self.initial or entropy
        low = entropy < self._threshold * self.initial
        self.level = _clamped(self.level + (self._step if low else -self._step), 0.0, 1.0)

    def alpha(self, beta: float) -> float:
        """The bonus weight beside a KL weight beta."""
        return self.level * self._max_alpha_ratio * beta

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"level": self.level, "initial": self.initial}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave."""
        self.level, self.initial = state["level"], state["initial"]


class SpikeGuard:
    """Finds gradients whose norm lies far above those before, in standard deviations of its logarithm: norms spread by factors.

    A spike counts in the running moments as the largest norm that is none, so that a lasting change is no spike for ever. After
    OLMo-core's SkipStepOptimizer, which looks at the norm itself.
    """

    def __init__(self, sigma: float | None) -> None:
        self.sigma = math.inf if sigma is None else sigma
        self.skipped = 0
        """Updates left out so far."""
        self._seen, self._weight, self._sum, self._squares = 0, 0.0, 0.0, 0.0

    def is_spike(self, norm: float) -> bool:
        """Take in one update's norm; whether the update is to be left out. Norms of 0 say nothing and are passed over."""
        if norm <= 0 or self.sigma == math.inf:
            return False
        value, limit = math.log(norm), self._limit()
        spike = value > limit
        value = min(value, limit)
        self._seen += 1
        self._weight = NORM_SMOOTHING * self._weight + 1
        self._sum = NORM_SMOOTHING * self._sum + value
        self._squares = NORM_SMOOTHING * self._squares + value * value
        self.skipped += spike
        return spike

    def _limit(self) -> float:
        """The largest log norm that is no spike."""
        if self._seen < NORMS_BEFORE_JUDGING:
            return math.inf
        mean = self._sum / self._weight
        spread = math.sqrt(max(0.0, self._squares / self._weight - mean * mean))
        return mean + self.sigma * max(spread, LEAST_SPREAD)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        moments = {"weight": self._weight, "sum": self._sum, "squares": self._squares}
        return {"seen": float(self._seen), "skipped": float(self.skipped), **moments}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave."""
        self._seen, self.skipped = int(state["seen"]), int(state["skipped"])
        self._weight, self._sum, self._squares = state["weight"], state["sum"], state["squares"]


class Signal:
    """Counts steps without anything to learn from: every group's rewards equal, or none scored. Patience 0: that is meant so."""

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.steps, self.without, self.in_a_row = 0, 0, 0
        """Steps seen, those of them without a signal, and how many the last ones are."""

    def update(self, flat_fraction: float) -> None:
        """Take in one step's share of groups whose rewards are equal."""
        flat = flat_fraction == 1.0
        self.steps, self.without, self.in_a_row = self.steps + 1, self.without + flat, self.in_a_row + 1 if flat else 0

    @property
    def lost(self) -> bool:
        """Whether training has to stop."""
        return 0 < self._patience <= self.in_a_row

    @property
    def never_there(self) -> bool:
        """Whether not one step had a signal: what was trained learned nothing from its reward."""
        return self._patience > 0 and self.without == self.steps > 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"steps": float(self.steps), "without": float(self.without), "in_a_row": float(self.in_a_row)}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from what state() gave."""
        self.steps, self.without, self.in_a_row = (int(state[name]) for name in ("steps", "without", "in_a_row"))


def _clamped(value: float, lowest: float, highest: float) -> float:
    return min(max(value, lowest), highest)

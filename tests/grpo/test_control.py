"""The controllers' decisions, worked out by hand, and that a resumed controller goes on as if nothing had happened."""

from __future__ import annotations

import json
import math
from math import nan

import pytest

from gemma_grpo.grpo.control import AdaptiveBeta, AdaptiveEntropy, Controller, HardStop, Signal, SpikeGuard, StepLimit


def adaptive_beta(beta: float = 0.1, target: float | None = 0.05) -> AdaptiveBeta:
    return AdaptiveBeta(beta, target=target, minimum=0.005, maximum=1.0)


def adaptive_entropy(step: float = 0.25) -> AdaptiveEntropy:
    return AdaptiveEntropy(threshold=0.7, max_alpha_ratio=0.1, step=step)


def test_beta_moves_by_two_percent_when_far_from_the_target() -> None:
    assert adaptive_beta().update(1.0) == pytest.approx(0.1 * 1.02)
    assert adaptive_beta().update(0.0) == pytest.approx(0.1 * 0.98)


def test_beta_moves_in_proportion_near_the_target() -> None:
    assert adaptive_beta().update(0.055) == pytest.approx(0.1 * 1.01)  # 10 % above: 0.1 x 0.1
    assert adaptive_beta().update(0.05) == pytest.approx(0.1)


def test_smoothed_kl_is_the_mean_with_weights_falling_by_nine_tenths() -> None:
    control = adaptive_beta()
    assert control.smoothed_kl == 0.0
    for kl in (1.0, 2.0, 4.0):
        control.update(kl)
    assert control.smoothed_kl == pytest.approx((0.81 * 1 + 0.9 * 2 + 4) / (0.81 + 0.9 + 1))


def test_beta_follows_the_smoothed_kl_not_the_last_one() -> None:
    control = adaptive_beta()
    for _ in range(50):
        control.update(0.2)
    before = control.beta
    assert control.update(0.0) > before


@pytest.mark.parametrize(("kl", "bound"), [(10.0, 1.0), (0.0, 0.005)])
def test_beta_stays_within_its_bounds(kl: float, bound: float) -> None:
    control = adaptive_beta()
    for _ in range(400):
        control.update(kl)
    assert control.beta == bound


@pytest.mark.parametrize("beta", [0.0, 0.1, 7.0])
def test_without_a_target_beta_is_constant_and_the_kl_still_smoothed(beta: float) -> None:
    control = adaptive_beta(beta, target=None)
    assert control.update(3.0) == beta
    assert control.smoothed_kl == pytest.approx(3.0)


@pytest.mark.parametrize("beta", [0.0, 0.001, 1.5])
def test_a_beta_the_controller_may_not_have_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"kl\.beta is .* outside .*kl\.ref_target=null"):
        adaptive_beta(beta)


def test_a_kl_that_is_no_number_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="KL to the reference is nan"):
        adaptive_beta().update(nan)


def test_hard_stop_counts_steps_on_end_above_twice_the_target() -> None:
    stop = HardStop(target=0.05, patience=3)
    assert [stop.update(kl) for kl in (0.11, 0.11, 0.09, 0.11, 0.11, 0.11, 0.11)] == [False] * 5 + [True, True]


def test_hard_stop_needs_more_than_twice_the_target() -> None:
    assert not HardStop(target=0.05, patience=1).update(0.1)
    assert HardStop(target=0.05, patience=1).update(0.1001)


@pytest.mark.parametrize("stop", [HardStop(target=0.05, patience=0), HardStop(target=None, patience=3)])
def test_hard_stop_switched_off_never_stops(stop: HardStop) -> None:
    assert not any(stop.update(100.0) for _ in range(10))


def test_passes_stop_above_the_limit_and_are_counted() -> None:
    limit = StepLimit(0.05)
    assert [limit.before_pass(kl) for kl in (0.0, 0.05, 0.051, nan)] == ["accept", "accept", "stop", "stop"]
    assert limit.stopped_passes == 2


def test_an_update_is_taken_back_above_one_and_a_half_times_the_limit() -> None:
    limit = StepLimit(0.05)
    assert limit.after_update(0.075) == "accept"
    assert limit.rollbacks == 0
    assert limit.after_update(0.0751) == "retry"
    assert limit.rollbacks == 1


def test_an_update_is_halved_twice_then_given_up() -> None:
    limit = StepLimit(0.05)
    decisions, scales = [], []
    for _ in range(4):
        scales.append(limit.step_scale)
        decisions.append(limit.after_update(1.0))
    assert decisions == ["retry", "retry", "reject", "retry"]  # the fourth is the next update's first try
    assert scales == [1.0, 0.5, 0.25, 1.0]
    assert limit.rollbacks == 4


def test_a_halved_update_that_fits_is_kept_and_the_next_one_is_whole() -> None:
    limit = StepLimit(0.05)
    assert [limit.after_update(nan), limit.after_update(0.06)] == ["retry", "accept"]
    assert limit.step_scale == 1.0


def test_without_a_limit_everything_is_accepted() -> None:
    limit = StepLimit(None)
    assert not limit.active
    assert limit.before_pass(nan) == limit.after_update(1e9) == "accept"
    assert StepLimit(0.05).active


def test_entropy_bonus_sleeps_until_the_threshold_then_climbs_and_falls_again() -> None:
    control = adaptive_entropy()
    levels = []
    for entropy in (2.0, 1.5, 1.41, 1.39, 1.0, 1.0, 1.0, 1.0, 1.41, 2.0):
        control.update(entropy)
        levels.append(control.level)
    assert levels == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 0.75, 0.5]
    assert control.initial == 2.0


def test_alpha_never_exceeds_its_fraction_of_beta() -> None:
    control = adaptive_entropy(step=1.0)
    control.update(2.0)
    assert control.alpha(0.5) == 0.0
    control.update(0.1)
    assert control.alpha(0.5) == pytest.approx(0.05)
    assert control.alpha(0.2) == pytest.approx(0.02)  # follows beta at once
    assert control.alpha(0.0) == 0.0


def test_entropy_threshold_zero_switches_the_bonus_off() -> None:
    control = AdaptiveEntropy(threshold=0.0, max_alpha_ratio=0.1, step=1.0)
    for entropy in (2.0, 0.1, 0.0):
        control.update(entropy)
    assert control.alpha(1.0) == 0.0


def test_a_resumed_beta_controller_decides_the_same() -> None:
    first, second = adaptive_beta(), adaptive_beta()
    for kl in (0.01, 0.2, 0.07):
        first.update(kl)
    second.load(first.state())
    assert first.update(0.03) == second.update(0.03)
    assert first.state() == second.state()


def test_a_resumed_hard_stop_goes_on_counting() -> None:
    first, second = HardStop(target=0.05, patience=2), HardStop(target=0.05, patience=2)
    first.update(1.0)
    second.load(first.state())
    assert second.update(1.0)


def test_a_resumed_step_limit_keeps_its_counts() -> None:
    first, second = StepLimit(0.05), StepLimit(0.05)
    first.before_pass(1.0)
    first.after_update(1.0)
    second.load(first.state())
    assert (second.rollbacks, second.stopped_passes, second.step_scale) == (1, 1, 1.0)


def test_a_resumed_entropy_controller_remembers_the_first_entropy() -> None:
    first, second = adaptive_entropy(), adaptive_entropy()
    for entropy in (2.0, 1.0):
        first.update(entropy)
    second.load(first.state())
    second.update(1.3)
    assert (second.initial, second.level) == (2.0, 0.5)


CONTROLLERS = [adaptive_beta(), HardStop(target=0.05, patience=2), StepLimit(0.05), adaptive_entropy(), SpikeGuard(6.0), Signal(3)]


@pytest.mark.parametrize("control", CONTROLLERS)
def test_a_new_controllers_state_is_plain_numbers(control: Controller) -> None:
    assert all(type(value) is float for value in control.state().values())


# ---- spikes and signals


def seen(norms: list[float], sigma: float | None = 6.0) -> tuple[SpikeGuard, list[bool]]:
    guard = SpikeGuard(sigma)
    return guard, [guard.is_spike(norm) for norm in norms]


def test_a_norm_far_above_those_before_is_a_spike() -> None:
    # even norms: a standard deviation of 0.1 is assumed, 6 of which are a factor of e^0.6 = 1.822
    assert seen([1.0] * 20 + [1.82])[1][-1] is False
    assert seen([1.0] * 20 + [1.83])[1][-1] is True


def test_spread_is_measured_in_factors() -> None:
    # log norms -1 and +1 by turns: mean 0, standard deviation 1 (nearly: the weights fade); 6 of them are a factor of 403
    norms = [math.exp(1.0 if index % 2 else -1.0) for index in range(400)]
    assert seen([*norms, math.exp(5.9)])[1][-1] is False
    assert seen([*norms, math.exp(6.1)])[1][-1] is True


def test_nothing_is_judged_before_twenty_norms_and_norms_of_zero_are_none() -> None:
    assert seen([1.0] * 19 + [1e9])[1][-1] is False
    assert seen([1.0] * 19 + [0.0] * 50 + [1e9])[1][-1] is False


def test_a_small_norm_is_no_spike() -> None:
    assert seen([1.0] * 30 + [1e-9])[1][-1] is False


def test_a_lasting_change_is_no_spike_for_ever() -> None:
    guard, spikes = seen([1.0] * 30 + [20.0] * 60)
    assert spikes[30] is True
    assert spikes[-1] is False
    assert guard.skipped == sum(spikes) < 30


def test_without_sigma_nothing_is_a_spike() -> None:
    assert not any(seen([1.0] * 30 + [1e30], sigma=None)[1])


def test_a_resumed_guard_judges_the_same() -> None:
    norms = [1.0 + index % 7 / 10 for index in range(40)]
    guard, _ = seen(norms)
    other = SpikeGuard(6.0)
    other.load(json.loads(json.dumps(guard.state())))
    following = [2.0, 3.5, 1.1, 30.0, 30.0]
    assert [guard.is_spike(norm) for norm in following] == [other.is_spike(norm) for norm in following]
    assert guard.state() == other.state()


def test_a_signal_is_lost_after_so_many_steps_in_a_row() -> None:
    signal = Signal(3)
    lost = []
    for flat in (1.0, 1.0, 0.9, 1.0, 1.0, 1.0):
        signal.update(flat)
        lost.append(signal.lost)
    assert lost == [False, False, False, False, False, True]
    assert not signal.never_there


def test_a_signal_that_was_never_there_is_known_however_short_the_run() -> None:
    signal = Signal(20)
    assert not signal.never_there  # no step, nothing to say
    signal.update(1.0)
    assert signal.never_there
    assert not signal.lost
    signal.update(0.0)
    assert not signal.never_there


def test_with_patience_0_nothing_is_missed() -> None:
    signal = Signal(0)
    for _ in range(100):
        signal.update(1.0)
    assert not signal.lost
    assert not signal.never_there


def test_a_resumed_signal_goes_on_counting() -> None:
    signal, other = Signal(3), Signal(3)
    for flat in (1.0, 0.5, 1.0, 1.0):
        signal.update(flat)
    other.load(json.loads(json.dumps(signal.state())))
    other.update(1.0)
    assert other.lost

"""The controllers' decisions, worked out by hand, and that a resumed controller goes on as if nothing had happened."""

from __future__ import annotations

from math import nan

import pytest

from gemma_grpo.grpo.control import AdaptiveBeta, AdaptiveEntropy, HardStop, StepLimit


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
    with pytest.raises(ValueError, match="KL to the reference is nan"):
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


@pytest.mark.parametrize("control", [adaptive_beta(), HardStop(target=0.05, patience=2), StepLimit(0.05), adaptive_entropy()])
def test_a_new_controllers_state_is_plain_numbers(control: AdaptiveBeta | HardStop | StepLimit | AdaptiveEntropy) -> None:
    assert all(type(value) is float for value in control.state().values())

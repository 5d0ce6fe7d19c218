"""Completions of another engine in an update: weighted, masked, and what that did is logged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

NO_KL: dict[str, Any] = {"kl.placement": "off"}


def test_another_engines_samples_are_weighted_and_what_that_did_is_logged_however_they_are_cut(world, difference):
    config = world.config(**NO_KL, **{"loss.tis_cap": 1.5, "loss.tis_mask": 3.0})
    batch = world.batch(config)
    with world.model.role("policy"), torch.no_grad():
        policy, _ = world.plain_logprobs(batch)
    # learner to sampler 1.2, 2 (capped) and 4 (masked) in turn, over the batch's 45 tokens
    ratios = torch.tensor([1.2, 2.0, 4.0]).repeat(15)
    sampling = torch.zeros_like(policy).masked_scatter(batch.completion_mask, policy[batch.completion_mask] - ratios.log())
    batch = replace(batch, sampling_logprobs=sampling)
    weights = torch.zeros_like(policy).masked_scatter(batch.completion_mask, torch.tensor([1.2, 1.5, 0.0]).repeat(15))

    def weighted(logprobs, entropies):
        return -(weights * batch.advantages[..., None] * logprobs).sum() / (12 * 6)

    gradient, _ = world.gradient(config, batch)
    assert difference(gradient, world.plain_gradient(weighted, batch)[1]) < 1e-5
    start = {name: value.detach().clone() for name, value in world.model.adapter_parameters("policy").items()}
    for tokens in (None, 1):  # all at once, and one completion at a time
        world.model.budget.tokens = tokens
        try:
            metrics = world.updater(config).update(batch, 0)
        finally:
            world.model.budget.tokens = None
        assert metrics["sampling_gap_mean"] == pytest.approx((math.log(1.2) + math.log(2) + math.log(4)) / 3, rel=1e-4)
        assert metrics["sampling_kl"] == pytest.approx((0.2 - math.log(1.2) + 1 - math.log(2) + 3 - math.log(4)) / 3, rel=1e-4)
        assert metrics["tis/mean_weight"] == pytest.approx(0.9, rel=1e-4)
        assert (metrics["tis/capped"], metrics["tis/masked"]) == pytest.approx((1 / 3, 1 / 3))
        assert metrics["tis/ess"] == pytest.approx(2.7**2 / (1.2**2 + 1.5**2) / 3, rel=1e-4)
        with torch.no_grad():
            for name, value in start.items():
                world.model.adapter_parameters("policy")[name].copy_(value)


def test_one_engine_for_both_is_not_weighted(world):
    metrics = world.updater(world.config()).update(world.batch(world.config()), 0)
    assert not [name for name in metrics if name.startswith("tis/")]

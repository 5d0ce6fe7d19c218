"""DPO as a reward: its loss worked out by hand, its reference fixed, and SFT beside it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import PAIR_ROWS

from gemma_grpo.config.schema import RewardModelSettings
from gemma_grpo.data.hh_rlhf import load_hh_rlhf
from gemma_grpo.data.prompts import encode_pairs
from gemma_grpo.reward.generative import pair_groups
from gemma_grpo.reward.implicit import ImplicitReward, ImplicitScorer, LikelihoodScorer, likelihood_loss, sequence_logprobs
from gemma_grpo.reward.training import RewardTraining, bradley_terry_loss


@pytest.fixture
def pairs(tokenizer):
    return encode_pairs(load_hh_rlhf(PAIR_ROWS, name="a").pairs, tokenizer, 512, reserved=10).pairs[:6]


def plain_logprob(model, prompt: tuple[int, ...], reply: tuple[int, ...]) -> float:
    """Of a reply's tokens, by one forward pass over the dialogue alone, of the model's present role."""
    ids = torch.tensor([[*prompt, *reply]])
    logits = model.causal_lm(input_ids=ids).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(prompt) + n - 1, token]) for n, token in enumerate(reply))


@torch.no_grad()
def test_the_loss_is_dpos(new_gemma, pairs) -> None:
    model, beta = new_gemma(), 0.3
    scorer = ImplicitScorer(model, beta)
    batch = scorer.batch(pairs)
    with model.role("policy"):
        loss = bradley_terry_loss(scorer.scores(batch))
    expected = []
    for pair in pairs:
        sums = {}
        for role in ("policy", "reference"):
            with model.role(role):
                sums[role] = [plain_logprob(model, pair.prompt_ids, reply) for reply in (pair.chosen_ids, pair.rejected_ids)]
        ratios = [sums["policy"][side] - sums["reference"][side] for side in (0, 1)]
        expected.append(math.log1p(math.exp(-beta * (ratios[0] - ratios[1]))))  # -log sigmoid
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@torch.no_grad()
def test_as_a_reward_it_is_beta_times_the_log_ratio_of_each_reply_in_groups_of_any_size(new_gemma, pairs) -> None:
    model, beta = new_gemma(), 0.3
    groups = pair_groups(pairs[:3])
    groups[1] = replace(groups[1], completions=groups[1].completions[:1])
    scores = ImplicitReward(model, "policy", beta).score(groups)
    assert [len(row) for row in scores] == [2, 1, 2]
    for group, row in zip(groups, scores, strict=True):
        for completion, score in zip(group.completions, row, strict=True):
            sums = {}
            for role in ("policy", "reference"):
                with model.role(role):
                    sums[role] = plain_logprob(model, group.prompt.token_ids, completion.token_ids)
            assert score == pytest.approx(beta * (sums["policy"] - sums["reference"]), abs=1e-4)
    assert ImplicitReward(model, "reference", beta).score(groups[:1]) == [[0.0, 0.0]]


def test_an_untouched_policy_scores_nothing_and_its_loss_is_log_two(new_gemma, pairs) -> None:
    model = new_gemma(moved=0.0)
    scorer = ImplicitScorer(model, 0.5)
    with torch.no_grad(), model.role("policy"):
        scores = scorer.scores(scorer.batch(pairs))
    assert scores.abs().max() < 1e-5
    assert float(bradley_terry_loss(scores)) == pytest.approx(math.log(2), abs=1e-5)


def test_training_by_dpo_raises_what_people_preferred_and_leaves_the_reference(new_gemma, pairs) -> None:
    model = new_gemma(moved=0.0)
    before = sequence_logprobs(model, ImplicitScorer(model, 0.1).batch(pairs), "reference")
    model.add_adapter("dpo")
    settings = RewardModelSettings(learning_rate=2e-2, batch_size=2, centering=0.0)
    for seed in range(4):
        RewardTraining(ImplicitScorer(model, 0.5), pairs, settings, seed=seed, adapter="dpo", loss=bradley_terry_loss).run()
    scorer = ImplicitScorer(model, 0.5)
    batch, scores = scorer.batch(pairs), {}
    for role in ("dpo", "policy"):
        with torch.no_grad(), model.role(role):
            scores[role] = scorer.scores(batch)
    assert (scores["dpo"][:, 0] > scores["dpo"][:, 1]).float().mean() > 0.8
    assert torch.equal(sequence_logprobs(model, ImplicitScorer(model, 0.1).batch(pairs), "reference"), before)
    assert scores["policy"].abs().max() < 1e-4  # another adapter is not touched


def test_sft_makes_preferred_replies_likelier(new_gemma, pairs) -> None:
    model = new_gemma(moved=0.0)
    model.add_adapter("sft")
    scorer, settings = LikelihoodScorer(model), RewardModelSettings(learning_rate=2e-2, batch_size=2)
    with torch.no_grad(), model.role("sft"):
        before = scorer.scores(scorer.batch(pairs))
    # by hand: mean over tokens of the first pair's preferred reply
    with torch.no_grad(), model.role("sft"):
        first = plain_logprob(model, pairs[0].prompt_ids, pairs[0].chosen_ids) / len(pairs[0].chosen_ids)
    assert float(before[0, 0]) == pytest.approx(first, rel=1e-4)
    assert float(likelihood_loss(before)) == pytest.approx(-float(before[:, 0].mean()))
    for seed in range(4):
        RewardTraining(scorer, pairs, settings, seed=seed, adapter="sft", loss=likelihood_loss).run()
    with torch.no_grad(), model.role("sft"):
        assert float(scorer.scores(scorer.batch(pairs))[:, 0].mean()) > float(before[:, 0].mean()) + 0.1

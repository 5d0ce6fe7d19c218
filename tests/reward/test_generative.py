"""The generative reward is the model's own verdict, and Bradley-Terry training moves that verdict and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerFast

from gemma_grpo.config.schema import LoraSettings, RewardModelSettings
from gemma_grpo.data.batch import GroupBatch, pad_rollouts
from gemma_grpo.data.chat import judge_suffix_ids, prompt_ids, reply_ids
from gemma_grpo.data.prompts import EncodedPair, encode_pairs
from gemma_grpo.model.attention import ATTENTION_NAME
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import TokenBudget
from gemma_grpo.reward.base import Reward
from gemma_grpo.reward.generative import (
    JUDGE_QUESTION,
    GenerativeReward,
    Judge,
    score_pairs,
)
from gemma_grpo.reward.quality import accuracy
from gemma_grpo.reward.training import Progress, RewardTraining, bradley_terry_loss
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.types import Completion, PreferencePair, Prompt, RolloutGroup

SETTINGS = RewardModelSettings(learning_rate=3e-3, batch_size=8)
REPLIES = [["yes, gladly.", "no."], ["a much longer reply than the others", "b"], ["x", "yy"]]


def train_reward_adapter(
    judge: Judge, pairs: Sequence[EncodedPair], settings: RewardModelSettings, *, seed: int, progress: Progress | None = None
) -> None:
    RewardTraining(judge, pairs, settings, seed=seed).run(progress)


@pytest.fixture
def model(new_gemma: Callable[..., Gemma]) -> Gemma:
    return new_gemma(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=32)


def new_group(model: Gemma, text: str, replies: Sequence[str], *, finished: bool = True) -> RolloutGroup:
    message: Any = {"role": "user", "content": text}
    ids = [tuple(reply_ids(model.tokenizer, reply)) for reply in replies]
    ids = ids if finished else [row[:-1] for row in ids]
    completions = tuple(
        Completion(reply, row, (-1.0,) * len(row), "stop" if finished else "length") for reply, row in zip(replies, ids, strict=True)
    )
    return RolloutGroup(Prompt(text, "test", (message,), tuple(prompt_ids(model.tokenizer, [message])), text), completions, 0)


def new_pairs(model: Gemma, count: int, good: str = "good", bad: str = "bad", *, first: int = 0) -> tuple[EncodedPair, ...]:
    """Pairs that differ in one word, whatever was asked."""
    rows = [
        PreferencePair(f"pair {n}", "test", ({"role": "user", "content": f"{n * 37}?"},), f"{n} {good}", f"{n} {bad}")
        for n in range(first, first + count)
    ]
    return encode_pairs(rows, model.tokenizer, 512, reserved=len(Judge(model).suffix)).pairs


def plain_log_odds(model: Gemma, role: Any, ids: Sequence[int]) -> float:
    """z(Yes) - z(No) after the text, by transformers' own forward. The byte tokenizer's answers are the letters Y and N."""
    yes, no = (model.tokenizer.convert_tokens_to_ids(letter) for letter in "YN")
    model.causal_lm.set_attn_implementation("eager")
    with torch.no_grad(), model.role(role):
        logits = model.causal_lm(input_ids=torch.tensor([list(ids)])).logits[0, -1]
    model.causal_lm.set_attn_implementation(ATTENTION_NAME)
    return float(logits[yes] - logits[no])


@pytest.mark.parametrize(("role", "reward"), [("reward", GenerativeReward), ("reference", ZeroShotJudge)])
def test_a_score_is_the_log_odds_of_yes_over_no_after_the_question(model: Gemma, role: Any, reward: Callable[[Gemma], Reward]) -> None:
    groups = [new_group(model, f"question {n}?", replies) for n, replies in enumerate(REPLIES)]
    suffix = judge_suffix_ids(model.tokenizer, JUDGE_QUESTION)
    for group, row in zip(groups, reward(model).score(groups), strict=True):
        for completion, score in zip(group.completions, row, strict=True):
            text = [*group.prompt.token_ids, *completion.token_ids, *suffix]
            assert score == pytest.approx(plain_log_odds(model, role, text), abs=2e-5)


def test_the_two_roles_give_two_verdicts(model: Gemma) -> None:
    groups = [new_group(model, "question?", REPLIES[0])]
    rewards: list[Reward] = [GenerativeReward(model), ZeroShotJudge(model)]
    assert rewards[0].score(groups) != rewards[1].score(groups)
    assert [reward.name for reward in rewards] == ["generative", "judge"]


@pytest.mark.parametrize("tokens", [None, 200, 100, 1])
@pytest.mark.parametrize("kind", [GenerativeReward, ZeroShotJudge])
def test_the_batch_changes_no_score(model: Gemma, tokens: int | None, kind: Callable[[Gemma], Reward]) -> None:
    # the last group is of another size than the others
    groups = [new_group(model, f"question {n}?", replies) for n, replies in enumerate([*REPLIES, ["a", "b", "c"]])]
    reward = kind(model)
    model.budget = TokenBudget(tokens)
    together = reward.score(groups)
    for n, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            (alone,) = reward.score([replace(group, completions=(completion,))])
            assert alone[0] == pytest.approx(together[n][g], abs=2e-5)
    assert reward.score(groups[::-1])[::-1] == [pytest.approx(row, abs=2e-5) for row in together]
    assert reward.score([]) == []


@pytest.mark.parametrize(("left", "right"), [(0, 3), (3, 0), (2, 2)])
def test_padding_changes_no_score(model: Gemma, left: int, right: int) -> None:
    judge = Judge(model)
    batch = pad_rollouts([new_group(model, f"question {n}?", replies) for n, replies in enumerate(REPLIES)], judge.suffix)

    def wider(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return pad(ids, (left, right), value=106), pad(mask, (left, right), value=False)

    padded = GroupBatch(*wider(batch.prompt_ids, batch.prompt_mask), *wider(batch.completion_ids, batch.completion_mask))
    with torch.no_grad(), model.role("reward"):
        assert torch.allclose(judge.log_odds(padded), judge.log_odds(batch), rtol=1e-6, atol=2e-6)


def test_bfloat16_scores_are_near_float32_ones(new_gemma: Callable[..., Gemma]) -> None:
    exact, rounded = (
        GenerativeReward(new_gemma(dtype=dtype, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]))
        for dtype in (torch.float32, torch.bfloat16)
    )
    groups = [new_group(exact.judge.model, f"question {n}?", replies) for n, replies in enumerate(REPLIES)]
    scores, near = (torch.tensor(reward.score(groups)) for reward in (exact, rounded))
    assert (scores - near).abs().max() < scores.std() / 2


def test_scoring_leaves_the_model_as_it_was(model: Gemma) -> None:
    with model.role("policy", train=True):
        GenerativeReward(model).score([new_group(model, "question?", REPLIES[0])])
        assert model.causal_lm.training
        assert all(parameter.requires_grad for parameter in model.adapter_parameters("policy").values())
        assert not any(parameter.requires_grad for parameter in model.adapter_parameters("reward").values())


def test_the_prompt_is_computed_once_for_both_replies_of_a_pair(model: Gemma) -> None:
    judge, pairs = Judge(model), new_pairs(model, 3)
    seen: list[int] = []
    model.causal_lm.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    expected = [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) + 2 * len(judge.suffix) for pair in pairs]
    model.budget = TokenBudget(max(expected) + 2)  # one pair fits, padding included, and not two
    score_pairs(judge, pairs, "reward")
    assert sorted(seen) == sorted(expected)


def test_pair_scores_are_rollout_scores(model: Gemma) -> None:
    pairs = new_pairs(model, 3)
    model.budget = TokenBudget(2 * len(pairs[0].prompt_ids))
    scores = score_pairs(Judge(model), pairs, "reward")
    groups = [new_group(model, p.pair.messages[0]["content"], [p.pair.chosen, p.pair.rejected]) for p in pairs]
    assert torch.allclose(scores, torch.tensor(GenerativeReward(model).score(groups)), atol=2e-5)
    assert score_pairs(Judge(model), (), "reward").shape == (0, 2)


def test_a_reply_cut_by_the_limit_is_judged_unfinished(model: Gemma) -> None:
    cut, whole = (new_group(model, "question?", ["a reply"], finished=finished) for finished in (False, True))
    (scores,) = zip(*GenerativeReward(model).score([cut, whole]), strict=True)
    suffix = Judge(model).suffix
    texts = [[*group.prompt.token_ids, *group.completions[0].token_ids, *suffix] for group in (cut, whole)]
    assert texts[0].count(106) == texts[1].count(106) - 1
    assert scores == tuple(pytest.approx(plain_log_odds(model, "reward", text), abs=2e-5) for text in texts)
    assert abs(scores[0] - scores[1]) > 1e-3  # type: ignore[operator]


def test_a_dialogue_too_long_loses_its_oldest_turns_and_no_token_of_a_reply(model: Gemma) -> None:
    talk: list[Any] = [{"role": ("user", "assistant")[n % 2], "content": f"turn {n} " * 4} for n in range(9)]
    pair = PreferencePair("long", "test", tuple(talk), "the chosen reply, whole", "the rejected one")
    judge = Judge(model)
    kept = prompt_ids(model.tokenizer, talk[6:])
    limit = len(kept) + len(reply_ids(model.tokenizer, pair.chosen)) + len(judge.suffix)  # three turns of nine just fit
    whole, shortened = (encode_pairs([pair], model.tokenizer, most, reserved=len(judge.suffix)).pairs for most in (1000, limit))
    assert shortened[0].prompt_ids == tuple(kept)
    assert shortened[0].chosen_ids == whole[0].chosen_ids == tuple(reply_ids(model.tokenizer, pair.chosen))
    text = [*shortened[0].prompt_ids, *shortened[0].chosen_ids, *judge.suffix]
    assert len(text) == limit < len(whole[0].prompt_ids)
    score = float(score_pairs(judge, shortened, "reward")[0, 0])
    assert score == pytest.approx(plain_log_odds(model, "reward", text), abs=2e-5)


def test_bradley_terry_by_hand() -> None:
    rewards = torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    # -log sigmoid(1) = ln(1 + e^-1), -log sigmoid(-2) = ln(1 + e^2)
    wins, loses = math.log1p(math.exp(-1)), math.log1p(math.exp(2))
    assert bradley_terry_loss(rewards).item() == pytest.approx((wins + loses) / 2)
    # sums 3 and 2, squared 9 and 4
    assert bradley_terry_loss(rewards, centering=0.1).item() == pytest.approx((wins + 0.9 + loses + 0.4) / 2)
    # the other label: -log sigmoid(-1) = 1 + wins, -log sigmoid(2) = loses - 2
    smoothed = 0.8 * (wins + loses) / 2 + 0.2 * (wins + 1 + loses - 2) / 2
    assert bradley_terry_loss(rewards, label_smoothing=0.2).item() == pytest.approx(smoothed)


def test_bradley_terry_gradient_is_the_share_of_doubt() -> None:
    rewards = torch.tensor([[1.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(bradley_terry_loss(rewards), rewards)
    doubt = 1 / (1 + math.e)  # 1 - sigmoid(1)
    assert gradient[0].tolist() == pytest.approx([-doubt, doubt])
    balanced = torch.tensor([[math.log(9), 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(bradley_terry_loss(balanced, label_smoothing=0.1), balanced)
    assert gradient[0].tolist() == pytest.approx([0, 0], abs=1e-7)  # sigmoid(ln 9) = 0.9: one label in ten is expected to be wrong


def test_without_centering_a_constant_is_free_and_with_it_the_sum_is_drawn_to_zero() -> None:
    rewards = torch.tensor([[1.0, 0.5], [-2.0, 1.0]])
    assert bradley_terry_loss(rewards + 7).item() == pytest.approx(bradley_terry_loss(rewards).item(), rel=1e-5)
    shifted = (rewards + 7).requires_grad_()
    bradley_terry_loss(shifted, centering=0.1).backward()
    assert shifted.grad is not None
    assert (shifted.grad.sum(-1) > 0).all()


def weights(model: Gemma, role: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.adapter_parameters(role).values()]


def test_training_on_separable_pairs_raises_held_out_accuracy(new_gemma: Callable[..., Gemma]) -> None:
    model = new_gemma(moved=0, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=32)
    judge = Judge(model)
    zero_shot = score_pairs(judge, new_pairs(model, 20, first=500), "reference")
    liked, disliked = ("good", "bad") if float((zero_shot[:, 0] - zero_shot[:, 1]).mean()) < 0 else ("bad", "good")
    held_out = new_pairs(model, 20, liked, disliked, first=500)  # prefer what the base does not
    before = score_pairs(judge, held_out, "reward")
    policy, base = weights(model, "policy"), model.head_weight.clone()
    seen: list[tuple[int, int, float, float]] = []
    train_reward_adapter(
        judge, new_pairs(model, 92, liked, disliked), SETTINGS, seed=0, progress=lambda *update: seen.append(tuple(update))
    )
    after = score_pairs(judge, held_out, "reward")
    assert accuracy(before[:, 0] - before[:, 1])["value"] <= 0.5
    assert accuracy(after[:, 0] - after[:, 1])["value"] >= 0.95
    assert [update[:2] for update in seen] == [(n, 12) for n in range(1, 13)]  # 92 pairs by 8: eleven whole batches and one of 4
    assert seen[-1][2] < seen[0][2]
    assert all(map(torch.equal, weights(model, "policy"), policy))
    assert torch.equal(model.head_weight, base)
    assert torch.equal(score_pairs(judge, held_out, "reference"), score_pairs(judge, held_out, "policy"))


def trained(
    new_gemma: Callable[..., Gemma], *, seed: int = 0, shuffle: bool = False, tokens: int | None = None, **changes: Any
) -> list[torch.Tensor]:
    lora = LoraSettings(dropout=changes.pop("dropout", 0.0))
    model = new_gemma(lora=lora, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=32)
    model.budget = TokenBudget(tokens)
    pairs = new_pairs(model, 12)
    torch.rand(changes.pop("drawn_before", 0))
    train_reward_adapter(Judge(model), pairs[::-1] if shuffle else pairs, SETTINGS.model_copy(update=changes), seed=seed)
    return weights(model, "reward")


@pytest.mark.parametrize("tokens", [1, 500])
def test_the_token_budget_does_not_change_the_training(new_gemma: Callable[..., Gemma], tokens: int) -> None:
    whole, cut = trained(new_gemma, centering=0.1), trained(new_gemma, centering=0.1, tokens=tokens)
    start = weights(new_gemma(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=32), "reward")
    moved = max(float((a - b).abs().max()) for a, b in zip(whole, start, strict=True))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, cut, strict=True)) < 1e-3 * moved


def test_training_depends_on_the_seed_and_the_pairs_and_not_on_their_order(new_gemma: Callable[..., Gemma]) -> None:
    first = trained(new_gemma)
    assert all(map(torch.equal, first, trained(new_gemma, shuffle=True)))
    assert not all(map(torch.equal, first, trained(new_gemma, seed=1)))


def test_dropout_drops_the_same_in_every_run_of_a_seed(new_gemma: Callable[..., Gemma]) -> None:
    first = trained(new_gemma, dropout=0.5, drawn_before=0)
    assert all(map(torch.equal, first, trained(new_gemma, dropout=0.5, drawn_before=7)))
    assert not all(map(torch.equal, first, trained(new_gemma)))


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"batch_size": 4}, {"centering": 1.0}, {"label_smoothing": 0.2}])
def test_every_setting_of_the_training_has_an_effect(new_gemma: Callable[..., Gemma], change: dict[str, Any]) -> None:
    assert not all(map(torch.equal, trained(new_gemma), trained(new_gemma, **change)))


def test_the_rate_warms_up_and_ends_near_zero(new_gemma: Callable[..., Gemma]) -> None:
    # 30 updates: three of warm-up, then down; Adam's steps are as large as the rate, so the last moves least
    model = new_gemma(num_hidden_layers=1, layer_types=["full_attention"])
    moves: list[float] = []
    last = weights(model, "reward")

    def progress(*update: Any) -> None:
        nonlocal last
        now = weights(model, "reward")
        moves.append(max(float((a - b).abs().max()) for a, b in zip(now, last, strict=True)))
        last = now

    train_reward_adapter(Judge(model), new_pairs(model, 30), SETTINGS.model_copy(update={"batch_size": 1}), seed=0, progress=progress)
    assert moves[0] == pytest.approx(SETTINGS.learning_rate / 3, rel=1e-3)
    assert moves[-1] < 0.1 * max(moves)


@pytest.mark.parametrize(
    ("planted", "named"), [("base", "the loss is nan at update 1"), ("gradient", "a gradient is not finite at update 1")]
)
def test_what_is_not_finite_stops_the_training_before_an_update(model: Gemma, planted: str, named: str) -> None:
    if planted == "base":
        model.causal_lm.model.norm.weight.data[0] = torch.nan
    else:
        for name, parameter in model.adapter_parameters("reward").items():
            parameter.data.fill_(0.0 if "lora_B" in name else 1e30)  # B A x is still 0, but the gradient of B is beyond float32
    before = weights(model, "reward")
    with pytest.raises(FloatingPointError, match=named):
        train_reward_adapter(Judge(model), new_pairs(model, 9), SETTINGS, seed=0)
    assert all(map(torch.equal, weights(model, "reward"), before))
    assert not any(parameter.requires_grad for parameter in model.causal_lm.parameters())


def test_answers_are_the_first_tokens_of_yes_and_no(model: Gemma, tokenizer: PreTrainedTokenizerFast) -> None:
    judge = Judge(model)
    assert tokenizer.convert_ids_to_tokens([judge.yes, judge.no]) == ["Y", "N"]
    assert judge.suffix[-7:] == prompt_ids(tokenizer, [{"role": "user", "content": "x"}])[-7:]  # <start_of_turn>model\n, left open

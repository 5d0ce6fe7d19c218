"""The whole stack against the closed form: engine, rewards, advantages, updater on a tiny Gemma 3 whose every sequence is enumerated.

Vocabulary 6: <bos> (never sampled), <eos>, and four letters; at most two tokens: 1 + 4 x 5 = 21 sequences.
Laws: ALGORITHM 6.1. With KL in the reward pi* = ref(y) exp(r(y) / beta) / Z. With ratio*k3 per token in the loss the fixed point
is node-wise, ref(a|s) exp(Q(s, a) / beta), Q under pi* itself: the second token does not pay for the first one's KL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import ended, start_ranks
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_grpo.config import build_config
from gemma_grpo.data.batch import pad_groups
from gemma_grpo.grpo.step import Stepper
from gemma_grpo.grpo.update import PolicyUpdater
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.logprobs import completion_logprobs
from gemma_grpo.reward.base import RewardStack, WeightedReward
from gemma_grpo.reward.functions import FunctionReward
from gemma_grpo.rollout.engine import RolloutEngine, SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.rollout.shared import SharedEngine
from gemma_grpo.types import Prompt, RolloutGroup

BOS, EOS, LETTERS = 0, 1, (2, 3, 4, 5)
PROMPT = (BOS, 2, 3)
SEQUENCES = [(EOS,), *((a, b) for a in LETTERS for b in (EOS, *LETTERS))]
BETA = 0.5
STEPS = 250


class Letters:
    """As much of a tokenizer as the engine uses."""

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join("^.abcd"[i] for i in ids)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return ["^.abcd"[i] for i in ids]


def reward_of(sequence: tuple[int, ...]) -> float:
    """Between 0 and 1, different for every sequence."""
    return ((8 * SEQUENCES.index(sequence) + 3) % 21) / 20


def untied_gemma() -> Gemma3ForCausalLM:
    """Two layers, an untied head, and <bos> out of reach: channel 0 is a constant that only its head row reads."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=6,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
        model.model.embed_tokens.weight.normal_(std=1.0)
        model.lm_head.weight.normal_(std=0.25)
        model.model.embed_tokens.weight[:, 0] = 2.0
        for layer in model.model.layers:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight[0] = -1.0  # gain 1 + w = 0: no layer writes to channel 0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[BOS] = 0.0
        model.lm_head.weight[BOS, 0] = -80.0
    return model.eval()


def sequence_probabilities(model: Gemma, role: str) -> torch.Tensor:
    batch = pad_groups([PROMPT], [SEQUENCES])
    with torch.no_grad(), model.role(role):
        logprobs, _ = completion_logprobs(model, batch)
    return logprobs[0].sum(-1).double().exp()


def sequence_optimum(reference: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    weights = reference * (rewards / beta).exp()
    return weights / weights.sum()


def node_wise_optimum(reference: torch.Tensor, rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """Second tokens first; then the first token against the mean reward of what follows it, its KL left out."""
    second = {a: torch.tensor([i for i, s in enumerate(SEQUENCES) if s[0] == a]) for a in LETTERS}
    conditional = {a: sequence_optimum(reference[rows] / reference[rows].sum(), rewards[rows], beta) for a, rows in second.items()}
    values = torch.stack([rewards[0], *((conditional[a] * rewards[second[a]]).sum() for a in LETTERS)])
    first = sequence_optimum(torch.stack([reference[0], *(reference[second[a]].sum() for a in LETTERS)]), values, beta)
    return torch.cat([first[:1], *(first[1 + k] * conditional[a] for k, a in enumerate(LETTERS))])


class WrongTemperature:
    """The planted bug: samples at 0.7 what is scored at 1."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        return self.engine.sample(prompts, replace(params, temperature=0.7))


def train(*, wrong_temperature: bool = False, **settings: Any) -> tuple[float, float]:
    """(total variation from the optimum at the start, at the end)."""
    config = build_config(
        {
            "batch_size": 16,
            "gradient_accumulation_steps": 1,
            "num_generations": 8,
            "max_completion_length": 2,
            "learning_rate": 0.02,
            "advantage.scale": "none",
            "advantage.clip": None,
            "kl.beta": BETA,
            "kl.ref_target": None,
            "kl.step_limit": None,
            "entropy.threshold": 0.0,
            "optimizer.max_grad_norm": None,
            **settings,
        }
    )
    model = Gemma(untied_gemma(), Letters(), name="enumerated", lora=config.lora)  # type: ignore[arg-type]
    engine = SharedEngine(LocalEngine(model, stop_ids=(EOS,)))  # alone it is the engine inside
    scored = FunctionReward(lambda completion_ids, **_: [reward_of(tuple(ids)) for ids in completion_ids], "table")
    rewards = RewardStack([WeightedReward(scored)])
    updater = PolicyUpdater(model, config, STEPS)
    stepper = Stepper(model, WrongTemperature(engine) if wrong_temperature else engine, rewards, updater, config)
    prompts = [Prompt(f"copy {n}", "enumerated", (), PROMPT, "one") for n in range(16)]

    reference = sequence_probabilities(model, "reference")
    assert reference.sum() == pytest.approx(1, abs=1e-6)  # the 21 sequences are all there are
    assert -(reference * reference.log()).sum() > 1  # a reference with little entropy could not move
    table = torch.tensor([reward_of(s) for s in SEQUENCES], dtype=torch.float64)
    optimum = (sequence_optimum if config.kl.placement == "reward" else node_wise_optimum)(reference, table, BETA)
    for step in range(STEPS):
        stepper.train_step(prompts, step)
    assert torch.equal(sequence_probabilities(model, "reference"), reference)  # bit for bit: nobody trained the base
    distance = [0.5 * (p - optimum).abs().sum().item() for p in (reference, sequence_probabilities(model, "policy"))]
    return distance[0], distance[1]


@pytest.mark.parametrize("settings", [{"kl.placement": "reward"}, {"kl.placement": "loss"}], ids=["kl-in-reward", "ratio-k3"])
def test_the_whole_stack_reaches_the_closed_form_optimum(settings: dict[str, Any]) -> None:
    start, end = train(**settings)
    assert start > 0.2
    assert end < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug",
    [{"kl.estimator": "k3"}, {"advantage.baseline": "mean"}, {"advantage.scale": "group"}, {"wrong_temperature": True}],
    ids=["plain-k3", "inclusive-mean", "group-std", "sampling-temperature"],
)
def test_each_known_mistake_misses_the_optimum(bug: dict[str, Any]) -> None:
    start, end = train(**bug)
    assert start > 0.2
    assert end > 0.02


ON_RANKS = """
import json, sys
from gemma_grpo import distributed
from grpo.test_closed_form import train
with distributed.joined(60):
    print(json.dumps(train(**json.loads(sys.argv[1]))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_two_ranks_reach_it_together(placement: str) -> None:
    found = ended(start_ranks(ON_RANKS, 2, arguments=[json.dumps({"kl.placement": placement})]), 300)
    assert [code for code, _, _ in found] == [0, 0], [err[-3000:] for _, _, err in found]
    for _, out, _ in found:
        start, end = json.loads(out)
        assert start > 0.2
        assert end < 0.02
    assert found[0][1] == found[1][1]  # to the bit


@pytest.mark.slow
def test_two_ranks_miss_it_with_a_known_mistake() -> None:
    found = ended(start_ranks(ON_RANKS, 2, arguments=[json.dumps({"kl.placement": "loss", "advantage.baseline": "mean"})]), 300)
    assert [json.loads(out)[1] > 0.02 for _, out, _ in found] == [True, True]

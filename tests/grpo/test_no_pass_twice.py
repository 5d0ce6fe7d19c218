"""What a whole step reads, role by role and token by token: nothing twice, and nothing that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_grpo.grpo.assess import Scorers, evaluate_policy
from gemma_grpo.grpo.setup import build_reward_stack, zero_shot_judge
from gemma_grpo.grpo.step import Stepper, role_logprobs
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import TokenBudget
from gemma_grpo.reward.generative import Judge
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.types import Prompt, RolloutGroup

REPLY = "yes"


@dataclass(frozen=True)
class Given:
    """An engine that answers with rollouts made before."""

    groups: Sequence[RolloutGroup]

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        by_prompt = {group.prompt.prompt_id: group for group in self.groups}
        return [by_prompt[prompt.prompt_id] for prompt in prompts]


@contextmanager
def passes(model: Gemma) -> Iterator[list[tuple[str, bool, int]]]:
    """Role, whether it is trained, and tokens of each forward pass, as they come into the embedding."""
    seen: list[tuple[str, bool, int]] = []
    hook = model.causal_lm.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append((*model._role, args[0].numel())))
    try:
        yield seen
    finally:
        hook.remove()


class LogitRows(TorchDispatchMode):
    """Counts the tokens whose logits are made: products with the head."""

    def __init__(self, model: Gemma) -> None:
        super().__init__()
        self.head, self.numbers = model.head_weight, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = [arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)]
        if "mm" in func.__name__ and self.head.untyped_storage().data_ptr() in places:
            self.numbers += out.numel() if out.shape[-1] != self.head.shape[1] else 0  # not the gradient of the hidden states
        return out

    @property
    def rows(self) -> int:
        return self.numbers // len(self.head)


def step_of(world: Any, engine: Any, reward: str, **settings: Any) -> Stepper:
    config = world.config(batch_size=4, reward={reward: 1.0}, planning_steps=2, temperature=0.7, **settings)
    judge = zero_shot_judge(None, {reward: 1.0}, world.model)
    rewards = build_reward_stack(None, {reward: 1.0}, world.model, config, 0.0, judge=judge)
    return Stepper(world.model, engine, rewards, world.updater(config), config, judge=judge)


def with_replies(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    return [replace(group, prompt=replace(group.prompt, columns={"chosen": REPLY})) for group in groups]


def texts(groups: Sequence[RolloutGroup]) -> int:
    """Tokens of the prompts and of their completions."""
    return sum(len(group.prompt.token_ids) + sum(len(c.token_ids) for c in group.completions) for group in groups)


def questions(world: Any, completions: int) -> int:
    return completions * len(Judge(world.model).suffix)


OFF = {"kl.placement": "off"}
PLAIN = {"reward_model.shaping": "none"}


@pytest.mark.parametrize(
    ("reward", "settings", "expected"),
    [
        ("generative", PLAIN, ["reward + questions", "reference", "policy", "policy"]),
        ("generative", PLAIN | OFF, ["reward + questions", "policy", "policy"]),
        ("judge", PLAIN, ["reference + questions", "policy", "policy"]),
        ("judge", PLAIN | OFF, ["reference + questions", "policy", "policy"]),
        ("length", PLAIN, ["reference", "policy", "policy"]),
        ("length", PLAIN | OFF, ["policy", "policy"]),
        # PAR's reference replies are completions of the same groups: four of 3 letters and a stop token, with their questions
        ("generative", {}, ["reward + questions + replies", "reference", "policy", "policy"]),
        ("judge", {}, ["reference + questions + replies", "policy", "policy"]),
        ("judge", OFF, ["reference + questions + replies", "policy", "policy"]),
    ],
)
def test_a_step_reads_each_token_once_for_each_role(world, reward: str, settings: dict[str, Any], expected: list[str]) -> None:
    groups = with_replies(world.groups)
    stepper = step_of(world, Given(groups), reward, **settings)
    with passes(world.model) as seen:
        stepper.train_step([group.prompt for group in groups], 0)
    added = {"questions": questions(world, 12), "replies": 4 * (len(REPLY) + 1) + questions(world, 4)}
    found = []
    for line in expected:
        role, *more = line.split(" + ")
        found.append((role, role == "policy", texts(groups) + sum(added[name] for name in more)))
    assert seen == found


def test_logits_are_made_for_completions_alone_and_only_where_log_probabilities_are_asked_for(world) -> None:
    groups, found = with_replies(world.groups), {}
    start = world.weights()
    for reward in ("judge", "length"):
        for name, settings in {"on": {}, "off": OFF}.items():
            with torch.no_grad():
                for key, parameter in world.model.causal_lm.named_parameters():
                    parameter.copy_(start[key])
            stepper = step_of(world, Given(groups), reward, **settings)
            with LogitRows(world.model) as counted:
                stepper.train_step([group.prompt for group in groups], 0)
            found[reward, name] = counted.rows
    completions = sum(len(c.token_ids) for group in groups for c in group.completions)
    # the reference's, once: not for questions, nor for the replies beside the completions, and none where no KL asks
    assert found["judge", "on"] == found["length", "on"] == found["length", "off"] + completions
    assert found["judge", "off"] == found["length", "off"] >= 2 * completions


def test_a_sampled_prompt_is_read_once_for_its_whole_group(world) -> None:
    prompts = [group.prompt for group in world.groups]
    stepper = step_of(world, LocalEngine(world.model), "judge", **PLAIN)
    with passes(world.model) as seen:
        _, scored = stepper.train_step(prompts, 0)
    rollout, rest = seen[:-3], seen[-3:]
    groups = [one.group for one in scored]
    assert rest == [("reference", False, texts(groups) + questions(world, 12)), *[("policy", True, texts(groups))] * 2]
    assert rollout[0] == ("policy", False, sum(len(prompt.token_ids) for prompt in prompts))
    assert {role for role, _, _ in rollout} == {"policy"}
    assert all(tokens <= 12 for _, _, tokens in rollout[1:])  # from then on at most one token of each completion


@pytest.mark.parametrize("tokens", [None, 200, 90])
@pytest.mark.parametrize("settings", [{}, PLAIN, {"kl.placement": "reward"}])
def test_a_step_in_one_pass_is_the_step_in_two(world, difference, tokens: int | None, settings: dict[str, Any]) -> None:
    groups, start, found = with_replies(world.groups), world.weights(), []
    for shared in (True, False):
        with torch.no_grad():
            for name, parameter in world.model.causal_lm.named_parameters():
                parameter.copy_(start[name])
        world.model.budget = TokenBudget(tokens)
        # eps: with Adam's own 1e-8 a gradient of rounding size would move a weight as far as any other
        stepper = step_of(world, Given(groups), "judge", **settings, **{"optimizer.eps": 1e-3})
        if not shared:
            stepper.judge = None
        record, _ = stepper.train_step([group.prompt for group in groups], 0)
        found.append((record.metrics, {name: value - start[name] for name, value in world.weights().items()}))
    world.model.budget = TokenBudget(None)
    (first, moved), (second, moved_apart) = found
    assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    assert first["kl"] > 0
    assert difference(moved, moved_apart) < 1e-3  # Adam makes more of the rounding of small gradients


def test_nothing_of_a_step_is_left_for_the_next(world) -> None:
    stepper = step_of(world, Given(world.groups), "judge")
    prompts = [group.prompt for group in world.groups]
    with passes(world.model) as seen:
        for step in range(2):
            stepper.train_step(prompts, step)
    assert seen[:3] == seen[3:]
    assert stepper.judge is not None
    assert stepper.judge._wanted.kept == {}


def test_an_evaluation_reads_the_frozen_base_once_for_verdicts_and_kl(world) -> None:
    stepper = step_of(world, Given(world.groups), "judge", **PLAIN, **{"evaluation.num_completions": 3, "evaluation.num_prompts": 4})
    prompts, config = [group.prompt for group in world.groups], stepper.config
    with passes(world.model) as seen:
        found = evaluate_policy(world.model, stepper.engine, Scorers(stepper.rewards), prompts, config, judge=stepper.judge)
    judged = texts(world.groups) + questions(world, 12)
    assert seen == [("reference", False, judged), ("reference", False, judged), ("policy", False, texts(world.groups))]
    apart = evaluate_policy(world.model, stepper.engine, Scorers(stepper.rewards), prompts, config)
    assert found["kl_sequence"]["after"] == pytest.approx(apart["kl_sequence"]["after"], rel=1e-5)
    batch = world.batch(config)
    policy, reference = (role_logprobs(world.model, batch, role, temperature=0.7) for role in ("policy", "reference"))
    assert found["kl_sequence"]["after"] == pytest.approx(float((policy - reference).sum(-1).mean()), rel=1e-4)

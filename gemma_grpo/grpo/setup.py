"""From settings to what the loop runs on: rows into prompts and pairs, reward names into a reward stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.chat import reply_ids
from gemma_grpo.data.hh_rlhf import LoadedPairs, load_hh_rlhf
from gemma_grpo.data.look_alikes import look_alike_prompts
from gemma_grpo.data.prompts import (
    EncodedPair,
    LoadedPrompts,
    build_prompts,
    encode_pairs,
    is_for_witness,
    load_dataset_rows,
    split_by_conversation,
)
from gemma_grpo.data.sources import DataError
from gemma_grpo.evaluation import looks_harmful
from gemma_grpo.grpo.step import sampling_params
from gemma_grpo.miniature.world import gold_score, sample_pairs
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.reward.allowed_code import CodeFile, own_functions
from gemma_grpo.reward.base import Reward, RewardStack, WeightedReward, unknown_reward
from gemma_grpo.reward.functions import FunctionReward
from gemma_grpo.reward.generative import GenerativeReward, Judge
from gemma_grpo.reward.lexical import LexicalReward
from gemma_grpo.reward.pairwise import PairwiseJudge
from gemma_grpo.reward.rules import RULES, build_rules
from gemma_grpo.reward.sandbox.running import Limits
from gemma_grpo.reward.sandbox.unit_tests import UNIT_TESTS, UnitTestReward
from gemma_grpo.reward.shaping import ReferenceRewards, Replies, chosen_replies, par
from gemma_grpo.reward.tasks import TASKS
from gemma_grpo.reward.zero_shot import ZeroShotJudge
from gemma_grpo.rollout.engine import RolloutEngine
from gemma_grpo.types import Prompt

Rows: TypeAlias = "LoadedPairs | LoadedPrompts"
Gold: TypeAlias = Callable[[Prompt, str], float]
Functions: TypeAlias = Mapping[str, Callable[..., Any]]

DEFAULT_REWARD = {"generative": 1.0, "overlong": 0.5, "repetition": 0.5, "empty": 1.0, "role_leak": 1.0}
"""The trained judge, shaped, and small bounded rules against text that is no reply at all (docs/method.md, rewards)."""
TRAINED, ZERO_SHOT, PAIRWISE = "generative", "judge", "pairwise"
BUILT_IN = (*RULES, *TASKS, UNIT_TESTS, TRAINED, ZERO_SHOT, PAIRWISE)
MINIATURE = "miniature"
GIVEN_ROWS = "rows given in Python"
"""What a run calls its dataset that has no name."""
REFERENCE_STEP = -3
"""Sampling counter of the replies that PAR is measured against."""
MINIATURE_PAIRS, MINIATURE_SEED, MINIATURE_FLIPPED = 4000, 0, 0.2


@dataclass(frozen=True)
class TrainingData:
    """Prompts and pairs on their two sides; a conversation is on one of them only."""

    prompts: Sequence[Prompt]
    held_out_prompts: Sequence[Prompt]
    pairs: Sequence[EncodedPair]
    held_out_pairs: Sequence[EncodedPair]
    witness_pairs: Sequence[EncodedPair]
    """Of the training side too, but for the witness alone."""
    look_alikes: Sequence[Prompt]
    """Bundled requests that only look harmful, where the data have none: asked, never trained on, never scored."""
    counts: Mapping[str, Any]
    """What was read, kept and dropped, and why: shown, and kept in run.json."""


def load_rows(dataset: Any, source_name: str | None, *, strict: bool = False) -> Rows:
    """Parsed rows of a dataset by name, path or value; "miniature" is the shipped world, "bundled:NAME" an application's prompts.

    Raises DataError, if `strict` for any bad row.
    """
    if is_miniature(dataset):
        return load_hh_rlhf(sample_pairs(MINIATURE_SEED, MINIATURE_PAIRS, _flipped(dataset)), name=source_name or MINIATURE)
    return load_dataset_rows(dataset, name=source_name, strict=strict)


def is_miniature(dataset: Any) -> bool:
    """Whether a dataset is the shipped world, whose truth is known: "miniature", or "miniature@0.4" with that share of wrong labels."""
    return isinstance(dataset, str) and dataset.partition("@")[0] == MINIATURE


def _flipped(dataset: str) -> float:
    _, mark, text = dataset.partition("@")
    try:
        share = float(text) if mark else MINIATURE_FLIPPED
    except ValueError:
        share = -1.0
    if not 0 <= share <= 0.5:
        raise DataError(f"{dataset!r}: after the @ stands the share of wrong labels, from 0 to 0.5, such as miniature@0.4.")
    return share


def known_gold(dataset: Any) -> Gold | None:
    """The exact score of a reply, which only the miniature world has. Evaluation may look at it; training never does."""
    if not is_miniature(dataset):
        return None
    return lambda prompt, text: gold_score(prompt.messages[-1]["content"], text).total


def gold_margin(dataset: Any) -> Callable[[EncodedPair], float] | None:
    """True margin of a pair, chosen minus rejected, where the world knows it."""
    gold = known_gold(dataset)
    if gold is None:
        return None

    def margin(item: EncodedPair) -> float:
        request = item.pair.messages[-1]["content"]
        return float(gold_score(request, item.pair.chosen).total - gold_score(request, item.pair.rejected).total)

    return margin


def build_training_data(rows: Rows, model: Gemma, config: GRPOConfig) -> TrainingData:
    """Tokenised prompts and pairs, split by conversation. Raises DataError when a side is left empty."""
    items = rows.pairs if isinstance(rows, LoadedPairs) else rows.prompts
    built = build_prompts(items, model.tokenizer, config.max_prompt_length)
    train, held_out = split_by_conversation(built.prompts, lambda prompt: prompt.conversation_id, config.data.holdout)
    pairs, counts = _build_pairs(rows, model, config)
    counts |= {"form": rows.form} if rows.form else {}
    counts |= {"rows": rows.rows, "kept": rows.kept, "dropped": dict(rows.dropped), "examples": list(rows.examples)}
    counts |= {"prompts": len(built.prompts), "prompts_dropped": dict(built.dropped), "prompts_shortened": built.shortened}
    if not train:
        raise DataError(
            f"no training prompt is left of {rows.kept} rows (dropped: {dict(built.dropped)}, held out: {len(held_out)}). "
            f"Raise max_prompt_length ({config.max_prompt_length}), lower data.holdout ({config.data.holdout}), or give more rows."
        )
    train = train[: config.data.max_prompts]
    counts |= {"prompts_train": len(train), "prompts_held_out": len(held_out)}
    own = any(looks_harmful(prompt) for prompt in held_out[: config.witness.num_prompts])
    asked = () if own else look_alike_prompts(model.tokenizer, config.witness.look_alikes, config.max_prompt_length)
    counts |= {"look_alikes": len(asked)} if asked else {}
    return TrainingData(train, held_out, *pairs, asked, counts)


def _build_pairs(
    rows: Rows, model: Gemma, config: GRPOConfig
) -> tuple[tuple[Sequence[EncodedPair], Sequence[EncodedPair], Sequence[EncodedPair]], dict[str, Any]]:
    """Pairs for the reward, held-out ones, and those for the witness; and their counts."""
    if not isinstance(rows, LoadedPairs):
        return ((), (), ()), {}
    reserved = len(Judge(model).suffix)
    encoded = encode_pairs(rows.pairs, model.tokenizer, config.reward_model.max_length, reserved=reserved)
    train, held_out = split_by_conversation(encoded.pairs, lambda pair: pair.conversation_id, config.data.holdout)
    train = train[: config.reward_model.max_pairs]
    share = config.witness.share if config.witness.path is None else 0.0
    for_witness = [pair for pair in train if is_for_witness(pair.conversation_id, share)]
    train = [pair for pair in train if not is_for_witness(pair.conversation_id, share)]
    counts: dict[str, Any] = {"pairs_train": len(train), "pairs_witness": len(for_witness), "pairs_held_out": len(held_out)}
    counts |= {"pairs_dropped": dict(encoded.dropped), "pairs_shortened": encoded.shortened}
    return (train, held_out, for_witness), counts


def lexical_witness(data: TrainingData) -> LexicalReward | None:
    """The judge of words and word pairs, on pairs that no reward learned from; None without such pairs."""
    return LexicalReward([pair.pair for pair in data.witness_pairs]) if data.witness_pairs else None


def functions_of(code: CodeFile, config: GRPOConfig) -> Functions:
    """The functions that the settings' rewards name, of a file the user allowed. Runs the file; raises ValueError."""
    return own_functions(code, config.reward or DEFAULT_REWARD, BUILT_IN)


def given_functions(reward: Any, functions: Functions | None) -> Any:
    """A function given as the reward, or functions by name. Raises ValueError for both: the second would count for nothing."""
    if callable(reward) and functions:
        raise ValueError("reward is a function itself, so reward_functions is not used. Name it there, and give weights in reward.")
    return reward if callable(reward) else functions


def reward_weights(reward: Any, config: GRPOConfig) -> dict[str, float]:
    """Name -> weight of the rewards a run uses. `reward` is a function, named after itself, a name, functions by name, or None.

    Raises ValueError for a name nobody knows, with the nearest one, for a function without a weight or named like a built-in reward, and
    for one that cannot be called as the settings ask.
    """
    if callable(reward):
        return {FunctionReward(reward, settings=config.reward_function).name: 1.0}
    functions = _functions(reward)
    weights = {reward: 1.0} if isinstance(reward, str) else dict(config.reward or DEFAULT_REWARD)
    for name, function in functions.items():
        FunctionReward(function, name, settings=config.reward_function)
        if name in BUILT_IN:
            raise ValueError(f"reward_functions has {name!r}, which is the name of a built-in reward. Give the function another name.")
        if name not in weights:
            raise ValueError(f"reward_functions has {name!r}, which `reward` gives no weight. Add it there, such as {{{name!r}: 1.0}}.")
    for name in weights:
        if name not in BUILT_IN and name not in functions:
            own = "A function of your own needs --allow-code FILE on the command line, reward_functions={name: function} in Python."
            raise ValueError(f"{unknown_reward(name, [*BUILT_IN, *functions])} {own}")
    return weights


def _functions(reward: Any) -> Functions:
    return reward if isinstance(reward, Mapping) else {}


def zero_shot_judge(reward: Any, weights: Mapping[str, float], model: Gemma, rubric: str | None = None) -> ZeroShotJudge | None:
    """The frozen base as a judge, where it is among a run's rewards: who else asks the frozen base can share its pass."""
    return ZeroShotJudge(model, rubric) if ZERO_SHOT in weights and not callable(reward) else None


def pairwise_judge(model: Gemma, config: GRPOConfig) -> PairwiseJudge:
    """The frozen base as a judge of two replies."""
    return PairwiseJudge(model, config.judge.opponents, config.judge.rubric)


def build_reward_stack(
    reward: Any,
    weights: Mapping[str, float],
    model: Gemma,
    config: GRPOConfig,
    reference_mean: float,
    *,
    trained: Reward | None = None,
    judge: ZeroShotJudge | None = None,
    engine: RolloutEngine | None = None,
) -> RewardStack:
    """The rewards of a run as one. `reference_mean` is what the trained judge gives the reference policy's samples on average;
    `trained` is the reward "generative", one adapter's by default, `judge` the zero-shot judge to use, where others ask it too, and
    `engine` samples the replies that PAR is measured against, where these are samples.
    """
    if callable(reward):
        return RewardStack([WeightedReward(FunctionReward(reward, settings=config.reward_function))])
    parts, functions = [], _functions(reward)
    for name, weight in weights.items():
        if name in functions:
            parts.append(WeightedReward(FunctionReward(functions[name], name, settings=config.reward_function), weight))
            continue
        if name in RULES or name in TASKS or name == UNIT_TESTS:
            parts.append(WeightedReward(_without_model(name, config), weight))
            continue
        if name == PAIRWISE:  # a chance already: bounded, and measured against the group
            parts.append(WeightedReward(pairwise_judge(model, config), weight))
            continue
        verdict = (trained or GenerativeReward(model)) if name == TRAINED else judge or ZeroShotJudge(model, config.judge.rubric)
        parts.append(_judged(verdict, weight, model, config, reference_mean, engine))
    return RewardStack(parts)


def _without_model(name: str, config: GRPOConfig) -> Reward:
    if name == UNIT_TESTS:
        return UnitTestReward(Limits(seconds=config.sandbox.seconds, memory_mib=config.sandbox.memory_mib))
    return TASKS[name] if name in TASKS else build_rules([name], config.max_completion_length)[0]


def _untouched_replies(engine: RolloutEngine, config: GRPOConfig) -> Replies:
    """One reply of the untouched model to each prompt, always the same one."""
    params = sampling_params(config, REFERENCE_STEP, role="reference", num_generations=1)
    return lambda groups: [one.completions[0] for one in engine.sample([group.prompt for group in groups], params)]


def _judged(verdict: Reward, weight: float, model: Gemma, config: GRPOConfig, mean: float, engine: RolloutEngine | None) -> WeightedReward:
    if config.reward_model.shaping == "none":
        return WeightedReward(verdict, weight)
    replies = chosen_replies(partial(reply_ids, model.tokenizer))
    if config.reward_model.par_reference == "samples":
        assert engine is not None
        replies = _untouched_replies(engine, config)
    references = ReferenceRewards(verdict, replies, mean)
    return WeightedReward(references, weight, par(references))

"""What a run's own rewards think of one reply, part by part: weighted and shaped as in training, and why a part is missing where it is.

Owns the stack of a run that is only looked at. What a reward is, is reward's; the reply is playing.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_grpo.config import GRPOConfig
from gemma_grpo.grpo.gates import failing
from gemma_grpo.grpo.judges import CALIBRATION, Judges
from gemma_grpo.grpo.setup import BUILT_IN, DEFAULT_REWARD, PAIRWISE, TRAINED, Functions, build_reward_stack
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.base import RewardError, RewardStack, WeightedReward
from gemma_grpo.rollout.local import LocalEngine
from gemma_grpo.types import RolloutGroup

_NOT_ALLOWED = "a function of your own, which is not run without --allow-code FILE"
_NO_JUDGE = "no trained judge is in the run: it is not trained yet, or the reward was a function given in Python"
_ONE_OF_MANY = "it compares the replies to one prompt, and here is one"


@dataclass(frozen=True, slots=True)
class Part:
    """One reward's say."""

    name: str
    weight: float
    raw: float | None
    """On the reward's own scale; None where it gave none, and `why` says why."""
    counted: float | None
    """Shaped and weighted: what it adds to the total."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What the reward makes of a reply."""

    total: float | None
    """Sum of what the parts count for; None where none of them could score it."""
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    """What makes it other than a reward in training: sentences."""

    @property
    def complete(self) -> bool:
        """Whether every part that counts has had its say."""
        return all(part.counted is not None or not part.weight for part in self.parts)


class Rewards:
    """The rewards a run trains with, each on its own."""

    def __init__(self, model: Gemma, run: RunDirectory, config: GRPOConfig, functions: Functions | None = None) -> None:
        functions = functions or {}
        judges = Judges(model, config)
        weights, self._missing = _wanted(run, config, functions)
        if TRAINED in weights:
            judges.load(run)
        mean = judges.calibration.get("reference_mean") or 0.0
        trained = judges.reward() if judges.known else None
        engine = LocalEngine(model)
        counted = {name: weight for name, weight in weights.items() if name != PAIRWISE}
        stack = build_reward_stack(functions, counted, model, config, mean, trained=trained, engine=engine) if counted else None
        self._parts = stack.parts if stack is not None else ()

    def opinion(self, group: RolloutGroup, notes: tuple[str, ...] = ()) -> Opinion:
        """Of a group of one reply."""
        parts = (*(_scored(part, group) for part in self._parts), *self._missing)
        known = [part.counted for part in parts if part.counted is not None]
        return Opinion(sum(known) if known else None, parts, notes)


def _wanted(run: RunDirectory, config: GRPOConfig, functions: Functions) -> tuple[dict[str, float], list[Part]]:
    """The rewards that can be asked, with the weights the run gave them, and those that cannot."""
    weights = dict(config.reward or DEFAULT_REWARD)
    has_judge = config.reward_model.path is not None or (run.reward / CALIBRATION).is_file()
    if config.reward is None and not has_judge:  # nothing says that the rules beside the judge are this run's either
        return {}, [Part(TRAINED, weights[TRAINED], None, None, _NO_JUDGE)]
    why = {name: _NOT_ALLOWED for name in weights if name not in BUILT_IN and name not in functions}
    why |= {name: _ONE_OF_MANY for name in weights if name == PAIRWISE}
    why |= {name: _NO_JUDGE for name in weights if name == TRAINED and not has_judge}
    gated = _untrusted(run.read_run().get("gates", {}), config.judge.least_accuracy)
    weights |= {name: 0.0 for name in gated if name in weights}
    missing = [Part(name, weights[name], None, None, reason) for name, reason in why.items()]
    return {name: weight for name, weight in weights.items() if name not in why}, missing


def _untrusted(gates: Mapping[str, Any], least: float) -> list[str]:
    """Judges of the untouched model that the run found not good enough: they count for nothing in it."""
    return [name for name, report in gates.items() if least and failing(report, least)]


def _scored(part: WeightedReward, group: RolloutGroup) -> Part:
    name, weight = part.reward.name, part.weight
    try:
        scores = RewardStack([part]).score([group])
    except RewardError as error:
        return Part(name, weight, None, None, str(error))
    raw, counted = scores.parts[name][0][0], scores.rewards[0][0]
    why = "" if raw is not None else " ".join(scores.warnings) or "it does not apply to this reply"
    return Part(name, weight, raw, counted, why)

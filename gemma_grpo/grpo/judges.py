"""The trained judges of a run and its witness: trained one after the other, measured together, written; or read back.

Owns their order and their folders. What a training keeps when it is stopped is keeping.py's, how good they are assess.py's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gemma_grpo import watchdog
from gemma_grpo.checkpoint import saving
from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.prompts import EncodedPair
from gemma_grpo.grpo.assess import length_slopes, measure_judge, reference_samples
from gemma_grpo.grpo.keeping import RewardKeeper
from gemma_grpo.grpo.setup import TrainingData
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.model.memory import release
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.reward.base import Reward
from gemma_grpo.reward.ensemble import EnsembleReward, Member, levels_of, members_of, pairs_of
from gemma_grpo.reward.generative import GenerativeReward, Judge
from gemma_grpo.reward.implicit import ImplicitReward, ImplicitScorer
from gemma_grpo.reward.training import RewardTraining
from gemma_grpo.rollout.engine import RolloutEngine
from gemma_grpo.types import RolloutGroup

CALIBRATION, WITNESS = "calibration.json", "witness"
_SEED_STRIDE = 7919
"""Between the members' seeds, and the witness's: neighbouring runs share none."""


class Judges:
    """The adapters that score, by name, and what is known of them."""

    def __init__(self, model: Gemma, config: GRPOConfig) -> None:
        self.model, self.config = model, config
        self.calibration: dict[str, Any] = {}
        """What reward/calibration.json holds; empty before there are judges."""
        self.witness_calibration: dict[str, Any] = {}
        """What witness/calibration.json holds; empty without a witness."""
        self._members: list[Member] = []

    @property
    def known(self) -> bool:
        """Whether there are judges to score with."""
        return bool(self.calibration)

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters that score, the witness's last."""
        return [member.adapter for member in self._members] + ([WITNESS] if self.witness_calibration else [])

    def reward(self) -> EnsembleReward:
        """The reward "generative"."""
        judges = {one: self._verdicts(one) for one in self._members}
        return EnsembleReward(judges, self.config.reward_model, self._slopes(), self.calibration.get("levels"))

    def _verdicts(self, member: Member) -> Reward:
        if member.dpo_beta is None:
            return GenerativeReward(self.model, member.adapter)
        return ImplicitReward(self.model, member.adapter, member.dpo_beta)

    def _slopes(self) -> dict[str, float]:
        """What length adds to the reward, by source; empty where nothing is taken out."""
        if not self.config.reward_model.length_residual:
            return {}
        if "length_slopes" not in self.calibration:
            raise ValueError(
                "reward_model.length_residual is on, and the judge's calibration.json has no length_slopes. Train it with the same setting."
            )
        return dict(self.calibration["length_slopes"])

    def witness(self) -> GenerativeReward | None:
        """The judge on other pairs; None without one."""
        return GenerativeReward(self.model, WITNESS, name=WITNESS) if self.witness_calibration else None

    # ---- reading

    def load(self, run: RunDirectory) -> None:
        """Take over the judges of reward_model.path, else the run's own, and the witness that belongs to them."""
        given, own = self.config.reward_model.path, self.config.witness.path
        folder = run.reward if given is None else Path(given)
        self.model.load_adapter("reward", folder)
        self.calibration = _calibration(folder, "how its rewards are scaled")
        # of a judge that was trained before there could be several: one, for all sources
        self._members = [Member(**one) for one in self.calibration.get("members", [{"adapter": "reward", "number": 0, "source": None}])]
        for member in self._members[1:]:
            self.model.add_adapter(member.adapter)
            self.model.load_adapter(member.adapter, _folder(folder, member.adapter))
        beside = folder.parent / WITNESS
        if own is not None or (beside / CALIBRATION).is_file():
            self._load_witness(beside if own is None else Path(own))
        if given is None and "memory" in self.calibration:
            self.model.budget.load(self.calibration["memory"])

    def _load_witness(self, folder: Path) -> None:
        self.model.add_adapter(WITNESS)
        self.model.load_adapter(WITNESS, folder)
        self.witness_calibration = _calibration(folder, "how good a witness it is")

    # ---- training

    def train(
        self,
        run: RunDirectory,
        engine: RolloutEngine,
        data: TrainingData,
        margin: Callable[[EncodedPair], float] | None,
        *,
        progress: Callable[[str, int, int, float, float], None],
        warn: Callable[[str], None],
    ) -> None:
        """Every member and the witness, each on its own pairs, then what they are worth on pairs that none of them saw."""
        settings = self.config.reward_model
        members = members_of(settings, [pair.pair.source for pair in data.pairs])
        parts = {member.adapter: pairs_of(member, data.pairs, settings.members) for member in members}
        if data.witness_pairs:
            parts[WITNESS] = list(data.witness_pairs)
        empty = [adapter for adapter, pairs in parts.items() if not pairs]
        if empty:
            raise ValueError(
                f"no pair is left to train {empty[0]!r} on: {len(data.pairs)} pairs are too few for reward_model.members="
                f"{settings.members}. Give more rows, or fewer members."
            )
        betas = {member.adapter: member.dpo_beta for member in members}
        keepers: list[RewardKeeper] = []
        for number, (adapter, pairs) in enumerate(parts.items()):
            self.model.add_adapter(adapter)
            keeper = RewardKeeper(run, self.config, warn, adapter, _place(run, adapter) / "checkpoints")
            training = self._training(adapter, betas.get(adapter), pairs, self.config.seed + _SEED_STRIDE * number)
            with watchdog.phase("reward training", f"{adapter}, {len(pairs)} pairs"):
                keeper.train(training, partial(progress, adapter))
            keepers.append(keeper)
        if self.config.witness.path is not None:
            self._load_witness(Path(self.config.witness.path))
        self._members = members
        measure = partial(measure_judge, self.model, engine, data=data, config=self.config, margin=margin)
        counts = {adapter: len(pairs) for adapter, pairs in parts.items()}
        self._measure(measure, data.pairs, counts, partial(reference_samples, engine, data, self.config))
        # a run that goes on cuts its passes as this one does
        self.calibration["memory"] = self.model.budget.state()
        release(self.model.device)
        self._write(run)
        for keeper in keepers:
            keeper.done()

    def _training(self, adapter: str, beta: float | None, pairs: Sequence[EncodedPair], seed: int) -> RewardTraining:
        """Bradley-Terry on a judge's log-odds, or on the implicit reward, whose level is taken off afterwards."""
        settings = self.config.reward_model
        if beta is None:
            return RewardTraining(Judge(self.model), pairs, settings, seed=seed, adapter=adapter)
        plain = settings.model_copy(update={"centering": 0.0})
        return RewardTraining(ImplicitScorer(self.model, beta), pairs, plain, seed=seed, adapter=adapter)

    def _measure(
        self,
        measure: Callable[..., dict[str, Any]],
        pairs: Sequence[EncodedPair],
        counts: Mapping[str, int],
        samples: Callable[[], Sequence[RolloutGroup]],
    ) -> None:
        members = [asdict(one) for one in self._members]
        trained = {"pairs_trained": sum(counts[one.adapter] for one in self._members)}
        self.calibration = {**trained, "members": members, "length_slopes": {}}
        if any(one.dpo_beta is not None for one in self._members):
            self.calibration["levels"] = levels_of(self.reward().by_member(samples()))
        if self.config.reward_model.length_residual:
            self.calibration["length_slopes"] = length_slopes(self.reward(), pairs)
        self.calibration |= measure(self.reward())
        if WITNESS in counts:
            self.witness_calibration = {"pairs_trained": counts[WITNESS]}  # there is one from here on
            witness = self.witness()
            assert witness is not None
            alone = EnsembleReward({Member(WITNESS, 0, None): witness}, self.config.reward_model)
            self.witness_calibration |= measure(alone)

    def _write(self, run: RunDirectory) -> None:
        trained = [one for one in self.adapters if one != WITNESS or self.config.witness.path is None]
        for adapter in trained:
            with saving(_place(run, adapter)):
                self.model.save_adapter(adapter, _place(run, adapter))
        if WITNESS in trained:
            run.write_json(f"{WITNESS}/{CALIBRATION}", self.witness_calibration)
        run.write_json(f"reward/{CALIBRATION}", self.calibration)  # last: from here on they are trained

    def files(self) -> Iterator[bytes]:
        """What the judges score with, for a checksum: adapters and calibrations."""
        yield json.dumps([self.calibration, self.witness_calibration], sort_keys=True).encode()
        for adapter in self.adapters:
            files = self.model.adapter_files(adapter)
            yield from (files[name] for name in sorted(files))


def _folder(root: Path, adapter: str) -> Path:
    return root if adapter == "reward" else root / adapter


def _place(run: RunDirectory, adapter: str) -> Path:
    return run.path / WITNESS if adapter == WITNESS else _folder(run.reward, adapter)


def _calibration(folder: Path, what: str) -> dict[str, Any]:
    path = folder / CALIBRATION
    if not path.is_file():
        raise ValueError(f"{folder} has no calibration.json, which says {what}. Give a folder train-reward wrote.")
    return dict(json.loads(path.read_text(encoding="utf-8")))

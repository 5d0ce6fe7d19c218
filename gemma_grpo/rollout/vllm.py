"""Rollouts on replicas of an inference server that speaks vLLM's protocol. Experimental: it has not met a real vLLM (docs/serving.md).

Owns the order of things: a policy is written and loaded under a name of its own, a canary compares it with the learner, then it samples.
With serving.max_staleness the completions of coming steps are asked for while the learner updates. A lost replica loses its requests alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_grpo.config.machine import ServingSettings
from gemma_grpo.data.chat import reply_text
from gemma_grpo.escapes import one_line
from gemma_grpo.model.gemma import Gemma, ModelRole
from gemma_grpo.rollout import canary
from gemma_grpo.rollout.engine import SamplingParams
from gemma_grpo.rollout.replicas import HOW_TO_START, NOT_ASKED_YET, Replica, ReplicaLostError, Replicas, ServingError
from gemma_grpo.rollout.versions import Version, Versions
from gemma_grpo.rollout.wire import COMPLETIONS, LOAD, UNLOAD, Ask, MalformedError, Sampled, canary_ask, completions_ask, sampled
from gemma_grpo.types import Completion, Prompt, RolloutGroup

LEARNER = "policy"
"""The role whose completions are learned from, and asked for ahead."""
_COUNTED = {"retried": "requests were asked again", "too old": "groups asked for ahead are of no use and sampled again"}
Report = Callable[[str, str, Mapping[str, Any]], None]
"""What happened ("lost", "back", "retried" or "too old"), the same as a sentence, and what a log shall hold of it."""


@dataclass(frozen=True)
class _Rollout:
    """A step's prompts, asked of the replicas. An answer is None where nobody has that version any more."""

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    version: Version
    policy_step: int
    """Updates made when the version's weights were written."""
    answers: tuple[Future[list[Sampled] | None], ...]


class ServedEngine:
    """Samples on replicas with the present weights of a role.

    `folder` is where versions of an adapter are written, asked when the first one is. `upcoming(step)` are the prompts of a training step
    still to come, asked for ahead, at most settings.max_staleness steps. Raises ServingError where nothing can be learned.
    """

    def __init__(
        self,
        model: Gemma,
        settings: ServingSettings,
        folder: Callable[[], Path],
        *,
        report: Report = lambda what, text, fields: None,
        upcoming: Callable[[int], Sequence[Prompt]] = lambda step: (),
    ) -> None:
        self.model, self.settings, self.folder, self.report, self.upcoming = model, settings, folder, report, upcoming
        self._vocabulary = len(model.head_weight)
        self._started: tuple[Replicas, Versions] | None = None
        self._synced: dict[ModelRole, Version] = {}
        self._ahead: dict[int, _Rollout] = {}
        self._old: list[Version] = []
        """Versions that nobody samples with any more and that are still there."""
        self._gone: set[str] = set()
        """Names of those that are not, for replicas that were lost when they went."""
        self._happened: deque[tuple[str, str, str]] = deque()
        """(what, replica, why): told by the thread that writes the run directory alone."""

    def sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[RolloutGroup]:
        """One group of params.num_generations completions per prompt, in order, each with the policy_step of who sampled it."""
        if not prompts:
            return []
        try:
            version = self._sync(prompts, params)
            rollout = self._asked_before(prompts, params) or self._ask(prompts, params, version, params.step)
            self._ask_ahead(params, version)  # before waiting: replicas that are done with this step go on
            return self._groups(rollout, version)
        finally:
            self._tell()

    def close(self) -> None:
        """End what is under way and take this run's adapters from the replicas, as far as they answer. It may sample again afterwards."""
        if self._started is None:
            return
        replicas, versions = self._started
        left = [*versions.written, *self._old]
        self._started, self._ahead, self._synced, self._old = None, {}, {}, []

        async def farewell(replica: Replica) -> None:
            for version in left:
                await self._unload(replica, version.name)

        replicas.close(farewell)
        with suppress(OSError):  # a later run deletes what it finds
            for version in left:
                versions.delete(version)

    @property
    def _now(self) -> tuple[Replicas, Versions]:
        if self._started is None:
            with _writing():
                versions = Versions(self.model, self.folder())
                self._old = list(versions.left_over)
            self._started = Replicas(self.settings.urls, self.settings.timeout_seconds), versions
        return self._started

    # ---- one policy for all

    def _sync(self, prompts: Sequence[Prompt], params: SamplingParams) -> Version:
        """The version of the role's present weights, on every replica that answers, compared with the learner there."""
        replicas, versions = self._now
        with _writing():
            version = versions.current(params.role)
        is_new = self._synced.get(params.role) != version
        try_lost = is_new or not replicas.able(version.name)
        waiting = [one for one in replicas.all if (try_lost if one.lost else version.name not in one.verified)]
        if waiting:
            self._make_ready(waiting, version, prompts[: canary.PROMPTS], params)
        if not replicas.able(version.name):
            raise ServingError(replicas.why_none(version.name))
        self._synced[params.role] = version
        self._retire()
        return version

    def _make_ready(self, waiting: Sequence[Replica], version: Version, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        """Load the version and let canaries sing. Raises ServingError, before anything is learned, where one of them is out of tune."""
        replicas, _ = self._now
        asks = [canary_ask(prompt, params, version.name, self._vocabulary) for prompt in prompts]
        answers = replicas.results([replicas.start(self._loaded(replica, version, asks)) for replica in waiting])
        ready = [(replica, answer) for replica, answer in zip(waiting, answers, strict=True) if answer is not None]
        if not ready:
            return
        found = canary.gaps(self.model, params.role, prompts, [answer for _, answer in ready], temperature=params.temperature)
        for (replica, _), gaps in zip(ready, found, strict=True):
            fault = gaps.fault(params.role, self.settings.tolerance, params.temperature)
            if fault is not None:
                raise ServingError(f"replica {replica.url} {fault}")
            if replica.lost not in (None, NOT_ASKED_YET):
                self._happened.append(("back", replica.url, ""))
            replica.verified.add(version.name)
            replica.lost = None

    async def _loaded(self, replica: Replica, version: Version, asks: Sequence[Ask]) -> list[Sampled] | None:
        """A replica's canary of the version, which it loads where it does not have it; None where it is lost."""
        try:
            names = await replica.names()
            if self.model.name not in names:
                raise ServingError(
                    f"replica {replica.url} serves {one_line(', '.join(sorted(names)), limit=300) or 'nothing'}, not {self.model.name}. "
                    f"Start it with --served-model-name {self.model.name}, on the run's own base."
                )
            replica.verified &= names  # whatever is not there any more: it was started again
            for name in names & self._gone:
                await self._unload(replica, name)
            if version.path is not None and version.name not in names:
                await replica.call("POST", LOAD, {"lora_name": version.name, "lora_path": str(version.path)})
            return [(await self._completions(replica, ask))[0] for ask in asks]
        except ReplicaLostError as error:
            self._lose(replica, error)
            return None

    def _retire(self) -> None:
        """Unload and delete the versions that neither a role has now nor a rollout under way was asked of."""
        replicas, versions = self._now
        self._old += versions.retired({rollout.version.name for rollout in self._ahead.values()})
        up = [replica for replica in replicas.all if replica.lost is None]
        replicas.results([replicas.start(self._unload(replica, version.name)) for replica in up for version in self._old])
        for version in self._old:
            with _writing():
                versions.delete(version)
        self._gone |= {version.name for version in self._old}
        self._old = []

    async def _unload(self, replica: Replica, name: str) -> None:
        replica.verified.discard(name)
        try:
            await replica.call("POST", UNLOAD, {"lora_name": name}, fine=(400, 404))  # it does not have it: as well
        except ReplicaLostError as error:
            self._lose(replica, error)

    # ---- rollouts

    def _ask(self, prompts: Sequence[Prompt], params: SamplingParams, version: Version, policy_step: int) -> _Rollout:
        replicas, _ = self._now
        asks = [completions_ask(prompt, params, version.name, self._vocabulary) for prompt in prompts]
        answers = tuple(replicas.start(self._answer(replicas, ask, version)) for ask in asks)
        return _Rollout(tuple(prompts), params, version, policy_step, answers)

    async def _answer(self, replicas: Replicas, ask: Ask, version: Version) -> list[Sampled] | None:
        """Of the replica that has least to do; of another one, with the same random numbers, where that one is lost."""
        again = False
        while able := replicas.able(version.name):
            replica = min(able, key=lambda one: one.busy)
            if again:
                self._happened.append(("retried", replica.url, ""))
            replica.busy += 1
            try:
                return await self._completions(replica, ask)
            except ReplicaLostError as error:
                self._lose(replica, error)
                again = True
            finally:
                replica.busy -= 1
        return None

    async def _completions(self, replica: Replica, ask: Ask) -> list[Sampled]:
        # 404: it has lost the adapter since it was loaded, having been started again
        content = await replica.call("POST", COMPLETIONS, dict(ask.body), limit=ask.limit, lost_at=(404,))
        try:
            return sampled(content, ask)
        except MalformedError as error:
            raise ServingError(
                f"replica {replica.url} sent an answer that cannot be learned from: {error}. Nothing of it was used. {HOW_TO_START}"
            ) from error

    def _ask_ahead(self, params: SamplingParams, version: Version) -> None:
        if params.role != LEARNER or params.step < 0:  # looks and evaluations have steps of their own, below 0
            return
        for step in range(params.step + 1, params.step + 1 + self.settings.max_staleness):
            prompts = () if step in self._ahead else self.upcoming(step)
            if prompts:
                self._ahead[step] = self._ask(prompts, replace(params, step=step), version, params.step)

    def _asked_before(self, prompts: Sequence[Prompt], params: SamplingParams) -> _Rollout | None:
        """What was asked ahead for this step, unless its policy is too old by now or it was for other prompts."""
        if params.role != LEARNER or params.step < 0:
            return None
        rollouts = [self._ahead.pop(step) for step in sorted(self._ahead) if step <= params.step]
        for rollout in rollouts:
            same = (rollout.prompts, rollout.params) == (tuple(prompts), params)
            if same and params.step - rollout.policy_step <= self.settings.max_staleness:
                return rollout
            for answer in rollout.answers:
                answer.cancel()
                self._happened.append(("too old", "", ""))
        return None

    def _groups(self, rollout: _Rollout, version: Version) -> list[RolloutGroup]:
        """A rollout's groups, in order. What nobody could answer for an older version is asked of the present one."""
        replicas, _ = self._now
        groups = dict(enumerate(self._group(rollout, n, answer) for n, answer in enumerate(replicas.results(rollout.answers))))
        missing = [n for n, group in groups.items() if group is None]
        if missing and rollout.version != version:
            self._happened.extend([("retried", "", "")] * len(missing))
            again = self._ask([rollout.prompts[n] for n in missing], rollout.params, version, rollout.params.step)
            for n, (m, answer) in zip(missing, enumerate(replicas.results(again.answers)), strict=True):
                groups[n] = self._group(again, m, answer)
        whole = [group for group in groups.values() if group is not None]
        if len(whole) < len(groups):
            raise ServingError(replicas.why_none(version.name))
        return whole

    def _group(self, rollout: _Rollout, n: int, answer: Sequence[Sampled] | None) -> RolloutGroup | None:
        if answer is None:
            return None
        texts = (reply_text(self.model.tokenizer, one.token_ids) for one in answer)
        completions = (Completion(text, one.token_ids, one.logprobs, one.finish) for text, one in zip(texts, answer, strict=True))
        return RolloutGroup(rollout.prompts[n], tuple(completions), rollout.policy_step)

    # ---- what happened

    def _lose(self, replica: Replica, error: ReplicaLostError) -> None:
        """In the background: many requests may find the same."""
        if replica.lost is None or replica.lost == NOT_ASKED_YET:
            self._happened.append(("lost", replica.url, str(error)))
        replica.lost = str(error)
        replica.verified.clear()

    def _tell(self) -> None:
        counts: Counter[str] = Counter()
        while self._happened:
            what, url, why = self._happened.popleft()
            if what == "lost":
                text = f"replica {url} is lost ({why}): what it was asked is asked of the others, and it is tried again after the update"
                self.report(what, text, {"replica": url, "reason": why})
            elif what == "back":
                self.report(what, f"replica {url} is back", {"replica": url})
            else:
                counts[what] += 1
        for what, count in counts.items():
            self.report(what, f"{count} {_COUNTED[what]}", {"count": count})


@contextmanager
def _writing() -> Iterator[None]:
    """Turns what a disk raises into a ServingError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ServingError(
            f"{error.filename or 'the folder of adapters'} cannot be written ({error.strerror or error}). "
            "Name a folder in serving.adapters that this run can write and the replicas can read."
        ) from error

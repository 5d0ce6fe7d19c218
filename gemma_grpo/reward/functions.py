"""Rewards as people write them: f(prompts, completions, **columns) -> list[float | None], TRL's signature, plain or async.

Owns how a function is called, what its failures say and what becomes of them; what it may return is checked in base.py, and the process
of a call that has a deadline is isolated.py's.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from gemma_grpo.config.schema import RewardFunctionSettings
from gemma_grpo.reward.base import Fault, RewardError, Scores, Skipped, check_flat
from gemma_grpo.reward.isolated import LateError, NoAnswerError, call_isolated
from gemma_grpo.stopping import check, interruptible
from gemma_grpo.types import RolloutGroup

OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")
MESSAGE_LIMIT = 500
"""Characters of an error's own message."""
NAMED_PROMPTS = 3
IN_THIS_PROCESS = RewardFunctionSettings()


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call of a function came to."""

    scores: Sequence[float | None]
    faults: Sequence[Fault] = ()

    @property
    def failed(self) -> bool:
        """The call as such, not single scores."""
        return any(fault.whole for fault in self.faults)

    @property
    def skipped(self) -> int:
        """Completions without a score that should have one."""
        return sum(fault.completions for fault in self.faults)


@dataclass(frozen=True, slots=True, init=False)
class FunctionReward:
    """A user's function as a reward.

    It is called once per step with keyword lists, one entry per completion, groups one after another:
    prompts (role/content messages), completions ([{"role": "assistant", "content": text}]), completion_ids (token ids, stop token
    included) and every further column of the dataset. It returns one number per completion; None means not scored. A function without
    **kwargs gets the arguments it names. `settings` say whether a call has a deadline, and what its failures do.
    """

    function: Callable[..., Any]
    name: str
    settings: RewardFunctionSettings

    def __init__(self, function: Callable[..., Any], name: str | None = None, settings: RewardFunctionSettings = IN_THIS_PROCESS) -> None:
        if not callable(function):
            raise ValueError(f"a reward function must be callable, got {type(function).__name__}. Pass the function itself.")
        if settings.timeout is not None and not hasattr(os, "fork"):
            raise ValueError(
                f"reward_function.timeout is {settings.timeout}, but this system cannot fork, so a call cannot have its own process. "
                "Use reward_function.timeout=null, and let the function keep its own time."
            )
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "name", name or getattr(function, "__name__", None) or type(function).__name__)
        object.__setattr__(self, "settings", settings)

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """The scores alone. Raises RewardError as score_or_skip does."""
        return self.score_or_skip(groups)[0]

    def score_or_skip(self, groups: Sequence[RolloutGroup]) -> tuple[Scores, Skipped | None]:
        """Call the function once for all completions; where it may skip and fails as a whole, once more for each group.

        Raises RewardError when it fails or returns something unusable: for any of them, or where it may skip for more than it may.
        """
        columns = columns_of(groups)
        answer = self._call(groups, columns)
        if self.settings.on_failure == "stop":
            for fault in answer.faults:
                raise self._error(fault) from fault.error
            return _grouped(answer.scores, groups), None
        if answer.failed and len(groups) > 1:
            answer = self._call_one_by_one(groups, columns)
        return _grouped(answer.scores, groups), self._counted(answer, len(answer.scores))

    def _call_one_by_one(self, groups: Sequence[RolloutGroup], columns: Sequence[str]) -> Answer:
        count = sum(len(group.completions) for group in groups)
        whole = Answer([])
        for group in groups:
            one = self._call([group], columns)
            whole = Answer([*whole.scores, *one.scores], [*whole.faults, *one.faults])
            self._counted(whole, count)  # too many already: the others need not be waited for
        return whole

    def _counted(self, answer: Answer, count: int) -> Skipped:
        if not answer.faults:
            return Skipped(0, None)
        last = answer.faults[-1]
        causes = Counter[str]()
        for fault in answer.faults:
            causes[fault.cause] += fault.completions
        listed = ", ".join(f"{number} {cause}" for cause, number in causes.items())
        what = f"reward {self.name!r} left {answer.skipped} of {count} completions without a score ({listed})"
        if answer.skipped > self.settings.max_skipped * count:
            raise RewardError(
                f"{what}, more than reward_function.max_skipped ({self.settings.max_skipped:g}) allows. The last: it {last.text}. "
                "Mend it, or raise reward_function.max_skipped."
            ) from last.error
        return Skipped(answer.skipped, f"{what}. The last: it {last.text}.")

    def _error(self, fault: Fault) -> RewardError:
        return RewardError(f"reward {self.name!r} {fault.text}. {fault.remedy}")

    def _call(self, groups: Sequence[RolloutGroup], columns: Sequence[str]) -> Answer:
        arguments = self._accepted(call_arguments(groups, columns, self.name))
        timeout = self.settings.timeout
        if timeout is None:
            with interruptible():
                answer = self._answer(arguments, groups)
            if answer.faults:
                check()  # a function that was left at once may have made an error of its own out of that
            return answer
        try:
            return _received(call_isolated(lambda: _sent(self._answer(arguments, groups)), timeout), groups)
        except NoAnswerError as error:
            late = isinstance(error, LateError)
            remedy = f"{'Raise reward_function.timeout, mend' if late else 'Mend'} it, or set reward_function.on_failure=skip."
            text = f"{error} on {_of_prompts(groups)}{': killed' if late else ''}"
            return _nothing(Fault(str(error), text, remedy, 0), groups)
        except OSError as error:
            raise RewardError(
                f"reward {self.name!r} could not be given a process ({error}). Free memory, or use reward_function.timeout=null."
            ) from error

    def _answer(self, arguments: dict[str, Any], groups: Sequence[RolloutGroup]) -> Answer:
        """Call the function here. What it raises is its failure, be it SystemExit; only a wish to stop the run goes through."""
        here = os.getpid()
        try:
            result = self.function(**arguments)
            if inspect.isawaitable(result):
                result = _awaited(result)
            scores, faults = check_flat(result, groups)
            answer = Answer(scores, faults)
        except BaseException as error:
            alone = self.settings.timeout is not None
            if isinstance(error, KeyboardInterrupt) and not alone:
                raise
            if alone:
                with suppress(Exception):
                    traceback.print_exception(error)  # what this process prints is passed on, the error itself is not
            text, remedy = f"raised {_said(error)}. It was scoring {_of_prompts(groups)}", "Mend it, or return None there."
            answer = _nothing(Fault(f"raised {type(error).__name__}", text, remedy, 0, error=error), groups)
        if os.getpid() != here:
            os._exit(1)  # the function forked, and its copy came back too: it must not go on as a second trainer
        return answer

    def _accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some builtins have no signature: call and see
            return arguments
        by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        missing = [p.name for p in by_keyword if p.default is p.empty and p.name not in arguments]
        if missing:
            columns = [name for name in arguments if name not in OWN_ARGUMENTS]
            raise RewardError(
                f"reward {self.name!r} needs {', '.join(map(repr, missing))}, which the dataset does not have. "
                f"Its columns are: {', '.join(columns) or 'none'}. Add the column, or give the argument a default."
            )
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return arguments
        return {p.name: arguments[p.name] for p in by_keyword if p.name in arguments}


def columns_of(groups: Sequence[RolloutGroup]) -> list[str]:
    """Every column that any of the prompts has, in the order of their first coming."""
    return list(dict.fromkeys(column for group in groups for column in group.prompt.columns))


def call_arguments(groups: Sequence[RolloutGroup], columns: Sequence[str], name: str) -> dict[str, list[Any]]:
    """The keyword lists a reward function gets; a column that some prompts lack is None there.

    Raises RewardError when a column is named like one of the function's own arguments.
    """
    samples = [(group.prompt, completion) for group in groups for completion in group.completions]
    taken = [column for column in columns if column in OWN_ARGUMENTS]
    if taken:
        raise RewardError(f"reward {name!r} cannot get the dataset's column {taken[0]!r}: the name is taken. Rename the column.")
    return {
        # copies: a function that edits its arguments must not edit the prompts
        "prompts": [[dict(message) for message in prompt.messages] for prompt, _ in samples],
        "completions": [[{"role": "assistant", "content": completion.text}] for _, completion in samples],
        "completion_ids": [list(completion.token_ids) for _, completion in samples],
        **{column: [_copied(prompt.columns.get(column)) for prompt, _ in samples] for column in columns},
    }


def _copied(value: Any) -> Any:
    """Lists and dicts are copied, as a dataset's columns hold them; other values are passed on as they are."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _grouped(scores: Sequence[float | None], groups: Sequence[RolloutGroup]) -> Scores:
    flat = iter(scores)
    return [[next(flat) for _ in group.completions] for group in groups]


def _nothing(fault: Fault, groups: Sequence[RolloutGroup]) -> Answer:
    """No score at all, for one reason."""
    count = sum(len(group.completions) for group in groups)
    return Answer([None] * count, [replace(fault, completions=count, whole=True)])


def _of_prompts(groups: Sequence[RolloutGroup]) -> str:
    count = sum(len(group.completions) for group in groups)
    names = [group.prompt.prompt_id for group in groups]
    more = f" and {len(names) - NAMED_PROMPTS} more" if len(names) > NAMED_PROMPTS else ""
    return f"{count} completions of prompt{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED_PROMPTS])}{more}"


def _said(error: BaseException) -> str:
    """Type and message of an error, which may be anything."""
    kind = type(error).__name__
    try:
        message = str(error)
    except Exception as other:
        message = f"its message cannot be shown: {type(other).__name__}"
    return f"{kind}: {message[:MESSAGE_LIMIT]}" if message else kind


def _sent(answer: Answer) -> list[Any]:
    """The answer as JSON values."""
    return [list(answer.scores), [[fault.cause, fault.text, fault.remedy, fault.completions, fault.whole] for fault in answer.faults]]


def _received(sent: Any, groups: Sequence[RolloutGroup]) -> Answer:
    """Raises NoAnswerError for anything else: the function can reach the pipe, by mistake too."""
    try:
        scores, faults = sent
        answer = Answer(list(scores), [Fault(*fault) for fault in faults])
    except (TypeError, ValueError):
        raise NoAnswerError("sent back what is no answer") from None
    if len(answer.scores) != sum(len(group.completions) for group in groups):
        raise NoAnswerError("sent back what is no answer")
    return answer


def _awaited(result: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # inside a notebook's loop, which cannot be entered twice
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()

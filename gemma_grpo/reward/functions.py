"""Rewards as people write them: f(prompts, completions, **columns) -> list[float | None], TRL's signature, plain or async.

Owns how a function is called and what its failures say; what it may return is checked in base.py.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gemma_grpo.reward.base import RewardError, Scores, validate_flat
from gemma_grpo.stopping import interruptible
from gemma_grpo.types import RolloutGroup

OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True, slots=True, init=False)
class FunctionReward:
    """A user's function as a reward.

    It is called once per step with keyword lists, one entry per completion, groups one after another:
    prompts (role/content messages), completions ([{"role": "assistant", "content": text}]), completion_ids (token ids, stop token
    included) and every further column of the dataset. It returns one number per completion; None means not scored. A function without
    **kwargs gets the arguments it names.
    """

    function: Callable[..., Any]
    name: str

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        if not callable(function):
            raise ValueError(f"a reward function must be callable, got {type(function).__name__}. Pass the function itself.")
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "name", name or getattr(function, "__name__", None) or type(function).__name__)

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """Call the function once for all completions. Raises RewardError when it raises or returns something unusable."""
        arguments = self._accepted(call_arguments(groups, self.name))
        count = sum(len(group.completions) for group in groups)
        try:
            with interruptible():
                result = self.function(**arguments)
                if inspect.isawaitable(result):
                    result = _awaited(result)
        except Exception as error:
            raise RewardError(f"reward {self.name!r} raised {type(error).__name__}: {error}. Mend it, or return None there.") from error
        flat = iter(validate_flat(result, count, self.name))
        return [[next(flat) for _ in group.completions] for group in groups]

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


def call_arguments(groups: Sequence[RolloutGroup], name: str) -> dict[str, list[Any]]:
    """The keyword lists a reward function gets; a column that some prompts lack is None there.

    Raises RewardError when a column is named like one of the function's own arguments.
    """
    samples = [(group.prompt, completion) for group in groups for completion in group.completions]
    columns = dict.fromkeys(column for group in groups for column in group.prompt.columns)
    taken = [column for column in columns if column in OWN_ARGUMENTS]
    if taken:
        raise RewardError(f"reward {name!r} cannot get the dataset's column {taken[0]!r}: the name is taken. Rename the column.")
    return {
        # copies: a function that edits its arguments must not edit the prompts
        "prompts": [[dict(message) for message in prompt.messages] for prompt, _ in samples],
        "completions": [[{"role": "assistant", "content": completion.text}] for _, completion in samples],
        "completion_ids": [list(completion.token_ids) for _, completion in samples],
        **{column: [prompt.columns.get(column) for prompt, _ in samples] for column in columns},
    }


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

"""Reward "unit_tests": does the code of a reply do what its prompt's tests ask? The code runs in the sandbox, the comparing is done here.

A test is `call == value`. Only the call goes into the sandbox, and only what it returned comes out: the value it should have is never
where a program could read it, and no runner is there that it could change. What a test shows is seen by whoever knows the prompt alone.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gemma_grpo.reward.base import RewardError, Scores, Skipped
from gemma_grpo.reward.sandbox.running import Limits, Outcome, run_program
from gemma_grpo.types import Prompt, RolloutGroup

UNIT_TESTS = "unit_tests"
RAN_SHARE = 0.1
"""Of the score: for calls that return anything at all. The rest is for those that return what they should."""
MAX_TESTS, MAX_WORKERS = 64, 4
TEST_LIMIT = 2000
"""Characters of one test."""
_FENCED = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n[ \t]*)?```", re.DOTALL | re.IGNORECASE)
_INLINE = re.compile(r"`([^`\n]+)`")
_NAMED = re.compile(r"\b(?:[Uu]se|[Tt]ry|[Cc]all|[Ww]rite)\s+(.+?)[.!]?(?=\s+[A-Z]|\s*$)", re.DOTALL)
_PLACE = "{code}"
Job: TypeAlias = tuple[str, tuple[str, ...]]
"""A program and the calls of its tests: what is run once, however many replies hold it."""
_ORDINARY = ("ended", "error", "syntax")
"""Ways to end that say nothing but that the code is wrong."""


@dataclass(frozen=True, slots=True)
class UnitTest:
    """A call, and what is asked of what it returns."""

    call: str
    asked: Literal["equal", "true", "false"]
    value: Any = None

    def passes(self, returned: Any) -> bool:
        """Of a plain value."""
        return _same(self.value, returned) if self.asked == "equal" else bool(returned) is (self.asked == "true")


class UnitTestReward:
    """Share of a prompt's tests that a reply's code passes, in [0, 1]; 0 for a reply without code, and for code that had to be ended.

    Columns: `tests`, a list of texts such as "add(2, 3) == 5" ("assert" may stand before it; "not f(x)" and "f(x)" are tests too), and
    `wrap`, optional: a program with {code} in it, for prompts that ask for one expression.
    """

    name = UNIT_TESTS

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """The scores alone. Raises SandboxError where nothing can be shut in, RewardError for a prompt without tests."""
        return self.score_or_skip(groups)[0]

    def score_or_skip(self, groups: Sequence[RolloutGroup]) -> tuple[Scores, Skipped]:
        """Nothing is skipped; what had to be ended, or was denied something, is told in the warning."""
        tests = [tests_of(group.prompt) for group in groups]
        asked = [
            [_job(code_of(one.text, group.prompt), own) for one in group.completions] for group, own in zip(groups, tests, strict=True)
        ]
        jobs = list(dict.fromkeys(job for row in asked for job in row if job is not None))
        with ThreadPoolExecutor(max_workers=min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
            outcomes = dict(zip(jobs, pool.map(self._run, jobs), strict=True))
        scores: Scores = [
            [0.0 if job is None else share_passed(outcomes[job], own) for job in row] for row, own in zip(asked, tests, strict=True)
        ]
        ended = [outcomes[job] for row in asked for job in row if job is not None]
        return scores, Skipped(0, self._warning(ended, sum(map(len, scores))))

    def _run(self, job: Job) -> Outcome:
        return run_program(*job, self.limits)

    def _warning(self, outcomes: Sequence[Outcome], count: int) -> str | None:
        unusual = [one for one in outcomes if one.kind not in _ORDINARY]
        if not unusual:
            return None
        kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(one.kind for one in unusual).most_common())
        what = f"{len(unusual)} of {count} replies hold programs that were ended or denied something"
        return f"reward {self.name!r}: {what} ({kinds}). The last: {unusual[-1].detail}."


def _job(code: str | None, tests: Sequence[UnitTest]) -> Job | None:
    return None if code is None else (code, tuple(test.call for test in tests))


def share_passed(outcome: Outcome, tests: Sequence[UnitTest]) -> float:
    """The score of one program; values it had given before it had to be ended count for nothing, as the outcome has none."""
    returned = {number: value for number, value in outcome.values.items() if isinstance(number, int) and number < len(tests)}
    passed = sum(_passes(tests[number], value) for number, value in returned.items())
    return (RAN_SHARE * len(returned) + (1 - RAN_SHARE) * passed) / len(tests)


def code_of(text: str, prompt: Prompt) -> str | None:
    """The program in a reply: its first fenced block; for a prompt that asks for an expression also what stands in `...` or after "Use".

    None where there is none: prose is not run.
    """
    wrap = prompt.columns.get("wrap")
    if (found := _FENCED.search(text)) or (isinstance(wrap, str) and (found := _INLINE.search(text) or _NAMED.search(text))):
        code = found[1]
    else:
        return None
    # replace, not format: what the model wrote may hold braces
    return wrap.replace(_PLACE, code.strip()) if isinstance(wrap, str) and "\n" not in code.strip() else code


def tests_of(prompt: Prompt) -> tuple[UnitTest, ...]:
    """The tests of a prompt's row. Raises RewardError naming the prompt."""
    given = prompt.columns.get("tests")
    if not isinstance(given, list) or not 0 < len(given) <= MAX_TESTS or not all(isinstance(test, str) for test in given):
        raise RewardError(
            f"reward {UNIT_TESTS!r} needs the column 'tests', 1 to {MAX_TESTS} texts such as \"add(2, 3) == 5\", and prompt "
            f"{prompt.prompt_id} has {repr(given)[:60]}. Add it to the row."
        )
    return tuple(parse_test(test, prompt.prompt_id) for test in given)


def parse_test(text: str, where: str = "given") -> UnitTest:
    """A test as it is written. Raises RewardError for what is no comparison with a plain value."""
    try:
        if len(text) > TEST_LIMIT:
            raise ValueError(f"longer than {TEST_LIMIT} characters")
        (statement,) = ast.parse(text.strip()).body
        if not isinstance(statement, (ast.Assert, ast.Expr)):
            raise ValueError(type(statement).__name__)
        asked = statement.test if isinstance(statement, ast.Assert) else statement.value
        if isinstance(asked, ast.Compare):
            (operator,), (right,) = asked.ops, asked.comparators
            if not isinstance(operator, (ast.Eq, ast.Is)):
                raise ValueError(type(operator).__name__)
            return UnitTest(ast.unparse(asked.left), "equal", ast.literal_eval(right))
        if isinstance(asked, ast.UnaryOp) and isinstance(asked.op, ast.Not):
            return UnitTest(ast.unparse(asked.operand), "false")
        return UnitTest(ast.unparse(asked), "true")
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise RewardError(
            f"the test {text[:80]!r} of prompt {where} is not a call compared with a plain value ({str(error)[:80]}). "
            'Write it as "add(2, 3) == 5".'
        ) from None


def _passes(test: UnitTest, sent: Any) -> bool:
    try:
        return test.passes(_received(sent))
    except (TypeError, ValueError, RecursionError):  # a set of lists, a number without end: no value Python could have sent
        return False


class _Other:
    """A value of no plain kind; equal to none."""

    def __bool__(self) -> bool:
        return True


def _received(sent: Any) -> Any:
    """What cell.py's _sendable took apart. Raises TypeError or ValueError for what it would never send."""
    if sent is None or isinstance(sent, (bool, str, int, float)):
        return sent
    kind, content = sent
    if kind in ("list", "tuple", "set"):
        items = [_received(item) for item in content]
        return items if kind == "list" else tuple(items) if kind == "tuple" else set(items)
    if kind == "dict":
        return {_received(key): _received(item) for key, item in content}
    return bytes.fromhex(content) if kind == "bytes" else _Other()


def _same(expected: Any, returned: Any) -> bool:
    """As == says, but for fractions, which may differ by rounding."""
    if isinstance(expected, float) and isinstance(returned, (int, float)):
        return math.isclose(expected, returned, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(expected, (list, tuple)) and type(expected) is type(returned):
        return len(expected) == len(returned) and all(map(_same, expected, returned))
    return bool(expected == returned)

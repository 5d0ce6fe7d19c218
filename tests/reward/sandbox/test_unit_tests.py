from __future__ import annotations

from typing import Any

import pytest

from gemma_grpo.config import build_config
from gemma_grpo.grpo.setup import build_reward_stack
from gemma_grpo.reward.base import RewardError
from gemma_grpo.reward.sandbox.running import Limits, Outcome, run_program, why_not
from gemma_grpo.reward.sandbox.unit_tests import UnitTestReward, code_of, parse_test, share_passed
from gemma_grpo.types import Completion, Prompt, RolloutGroup

shut_in = pytest.mark.skipif(why_not() is not None, reason=f"programs cannot be shut in here: {why_not()}")
ADD = {"tests": ["add(2, 3) == 5", "assert add(-1, 1) == 0", "add('a', 'b') == 'ab'", "not add(0, 0)"]}


def prompt(columns: dict[str, Any]) -> Prompt:
    return Prompt("p1", "test", ({"role": "user", "content": "x"},), (2,), "c", columns)


def group(columns: dict[str, Any], *texts: str) -> RolloutGroup:
    return RolloutGroup(prompt(columns), tuple(Completion(text, (1,), (0.0,), "stop") for text in texts), 0)


def block(code: str) -> str:
    return f"Here:\n```python\n{code}\n```"


@shut_in
def test_the_score_is_the_share_of_tests_passed_and_a_tenth_for_calls_that_return() -> None:
    right, wrong = block("def add(a, b):\n    return a + b"), block("def add(a, b):\n    return 5")
    raises = block("def add(a, b):\n    return a * b")  # 6, -1, and 'a' * 'b' raises; 0 is false
    scores, skipped = UnitTestReward().score_or_skip([group(ADD, right, wrong, raises, "def add(a, b): return a + b", block("def add("))])
    assert scores[0] == pytest.approx([1.0, 0.1 + 0.9 / 4, 0.1 * 3 / 4 + 0.9 / 4, 0.0, 0.0])
    assert skipped.completions == 0
    assert skipped.warning is None  # wrong code is nothing to warn of


@shut_in
def test_what_had_to_be_ended_scores_nothing_and_is_told() -> None:
    loop = block("n = 0\ndef add(a, b):\n    global n\n    n += 1\n    while n > 2: pass\n    return a + b")  # right twice, then for ever
    leaves = block("import os\ndef add(a, b):\n    return a + b if a == 2 else os._exit(0)")
    reward = UnitTestReward(Limits(seconds=1.0))
    scores, skipped = reward.score_or_skip([group(ADD, loop, leaves)])
    assert scores == [[0.0, 0.0]]
    assert skipped.warning is not None
    assert "2 of 2 replies hold programs that were ended or denied something (1 time, 1 exit)" in skipped.warning


@shut_in
@pytest.mark.parametrize(
    ("call", "test", "passes"),
    [
        ("(1, 2)", "x() == (1, 2)", True),
        ("[1, 2]", "x() == (1, 2)", False),
        ("{1: {2}}", "x() == {1: {2}}", True),
        ("{2, 1}", "x() == {1, 2}", True),
        ("True", "x() == 1", True),  # as Python says
        ("0.1 + 0.2", "x() == 0.3", True),
        ("0.1 + 0.2", "x() == 0.31", False),
        ("[0.1 + 0.2]", "x() == [0.3]", True),
        ("float('nan')", "x() == 0.0", False),
        ("2 ** 200", f"x() == {2**200}", True),
        ("b'a'", "x() == b'a'", True),
        ("None", "x() is None", True),
        ("object()", "x() == None", False),
        ("object()", "x()", True),
        ("''", "x()", False),
        ("[]", "not x()", True),
        ("'a' * 9", "x() == 'aaaaaaaaa'", True),
        ("__import__('collections').Counter('aab')", "x() == {'a': 2, 'b': 1}", True),
    ],
)
def test_values_cross_as_they_are_and_are_compared_here(call: str, test: str, passes: bool) -> None:
    parsed = parse_test(test)
    outcome = run_program(f"def x():\n    return {call}", [parsed.call])
    assert share_passed(outcome, [parsed]) == pytest.approx(1.0 if passes else 0.1)


def test_forged_values_of_no_kind_fail() -> None:
    tests = [parse_test("f() == 1")] * 6
    sent = {0: ["set", [["list", []]]], 1: [], 2: ["dict", [1]], 3: ["other", 1], 4: {"value": 1}, 9: 1}
    assert share_passed(Outcome("ended", values=sent), tests) == pytest.approx(0.1 * 5 / 6)


@pytest.mark.parametrize(
    ("text", "wrap", "expected"),
    [
        ("```python\nx = 1\n```", None, "x = 1"),
        ("```py\nx = 1\n```\n```\ny = 2\n```", None, "x = 1"),
        ("Gladly! Use sorted(items). Also, the weather has been odd.", "return {code}", "return sorted(items)"),
        ("Try ' '.join(words).", "{code}", "' '.join(words)"),
        ("`max(items)` does it", "{code}", "max(items)"),
        ("```\nmax(items)\n```", "f = {code}", "f = max(items)"),
        ("Use {x: 1 for x in items}.", "{code}", "{x: 1 for x in items}"),
        ("Use sorted(items).", None, None),
        ("I cannot help with that.", "{code}", None),
        ("def add(a, b): return a + b", None, None),
    ],
)
def test_code_is_a_block_or_where_one_expression_is_asked_what_is_named(text: str, wrap: str | None, expected: str | None) -> None:
    assert code_of(text, prompt({"wrap": wrap} if wrap else {})) == expected


NO_TESTS = ["f(1) < 2", "x = 1", "f(1) ==", "import os", "f(1) == g(2)", "f(1) == 1 == 1", "", "(" * 999, "a; b", "x" * 3000]


@pytest.mark.parametrize("text", NO_TESTS)
def test_what_is_no_comparison_with_a_plain_value_is_refused_with_its_prompt(text: str) -> None:
    with pytest.raises(RewardError, match=r"of prompt p1 is not a call compared with a plain value"):
        UnitTestReward().score([group({"tests": [text]}, "```\nx\n```")])


@pytest.mark.parametrize("columns", [{}, {"tests": []}, {"tests": "f() == 1"}, {"tests": [1]}])
def test_a_prompt_without_tests_is_named(columns: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"needs the column 'tests', 1 to 64 texts .* prompt p1 has"):
        UnitTestReward().score([group(columns, "x")])


@shut_in
def test_the_settings_limit_time_and_memory() -> None:
    def outcome(code: str, **settings: Any) -> str:
        config = build_config({"reward": {"unit_tests": 1.0}, **settings})
        (part,) = build_reward_stack(None, config.reward or {}, None, config, 0.0).parts  # type: ignore[arg-type]
        assert isinstance(part.reward, UnitTestReward)
        return run_program(code, [], part.reward.limits).kind

    assert outcome("import time\ntime.sleep(1.5)") == "ended"
    assert outcome("import time\ntime.sleep(9)", **{"sandbox.seconds": 0.5}) == "time"
    assert outcome("x = bytearray(300 * 2**20)") == "ended"
    assert outcome("x = bytearray(300 * 2**20)", **{"sandbox.memory_mib": 256}) == "memory"

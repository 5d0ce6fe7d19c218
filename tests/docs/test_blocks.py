"""Every code block of README.md and docs/*.md: none without a decision, and what is decided is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import python_blocks
import shell_lines
import yaml
from markdown_blocks import Block, BlockError, all_blocks, blocks_of, missing_line, pattern_of

from gemma_grpo.config import load_recipe

BLOCKS = all_blocks()
FROM_NOTHING = ("docs/tutorial.md",)
"""Pages that are followed in an empty folder."""
SLOW = ("docs/t4.md", "docs/tutorial.md")
"""Pages with a whole training of the miniature: a minute or two."""
PAGES = sorted({block.page for block in BLOCKS if block.is_run} - set(SLOW))


def place(block: Block) -> str:
    return block.place


def test_there_are_blocks() -> None:
    assert len(BLOCKS) > 30


@pytest.mark.parametrize("block", BLOCKS, ids=place)
def test_every_block_has_a_decision(block: Block) -> None:
    assert not block.problem(), f"{block.place}: {block.problem()}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.is_checked], ids=place)
def test_a_block_names_nothing_that_there_is_not(block: Block, furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(furnished)
    if block.language == "bash":
        shell_lines.check_shell(block.text)
        for line in shell_lines.lines_of(block.text):
            for words in line.ours:
                shell_lines.check(_with_recipes(words, block))
    elif block.language == "python":
        python_blocks.check(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text) is not None
    else:
        json.loads(block.text)


def _with_recipes(words: tuple[str, ...], block: Block) -> list[str]:
    """A recipe that the page itself has the reader write does not exist yet: its words are checked on the miniature's."""
    return [("miniature" if word.endswith(".yaml") and not Path(word).is_file() else word) for word in words]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_their_order(page: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _follow(page, slow=False, request=request, empty=tmp_path / "empty")


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.is_slow} | set(SLOW)))
def test_the_slow_blocks_of_a_page_run(page: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _follow(page, slow=True, request=request, empty=tmp_path / "empty")


def _follow(page: str, *, slow: bool, request: pytest.FixtureRequest, empty: Path) -> None:
    if page in FROM_NOTHING:
        empty.mkdir()
    folder = empty if page in FROM_NOTHING else request.getfixturevalue("folder")
    printed, names = "", dict[str, Any]({"__name__": "__main__"})
    for block in BLOCKS:
        if block.page != page:
            continue
        if block.is_printed:
            missing = missing_line(block.text, printed)
            assert missing is None, f"{block.place}: {missing!r} was not printed:\n{printed}"
        elif block.is_run and (slow or not block.is_slow):
            printed = _run(block, folder, names)


def _run(block: Block, folder: Path, names: dict[str, Any]) -> str:
    if block.language == "bash":
        return "".join(shell_lines.run_line(line, folder, block.settings) for line in shell_lines.lines_of(block.text))
    if block.language == "python":
        return python_blocks.run(block.text, folder, block.settings, names)
    if block.language == "yaml":
        recipe = folder / "block.yaml"
        recipe.write_text(block.text, encoding="utf-8")
        load_recipe(recipe)
    return ""


# ---- the rules themselves


def decided(comment: str, language: str = "bash", text: str = "true") -> str:
    (block,) = blocks_of(f"{comment}\n```{language}\n{text}\n```\n", "a page")
    return block.problem()


def test_the_rules_tell_a_decision_from_none() -> None:
    assert decided("") == ""
    assert decided("<!-- not run: it needs a GPU -->") == ""
    assert decided("<!-- runs with max_steps=2 gpus=1: no GPU here -->") == ""
    assert decided("<!-- runs slow -->") == ""
    assert "reason is missing" in decided("<!-- not run: no -->")
    assert "reason is missing" in decided("<!-- runs with max_steps=2 -->")
    assert "is not KEY=VALUE" in decided("<!-- runs with two steps: there is no time -->")
    assert "no decision" in decided("<!-- runs sometimes -->")
    assert "the language is ''" in decided("", "")
    assert "holds a command" in decided("", "text", "gemma-grpo demo")
    assert "is not run" in decided("<!-- not run: it is no code -->", "text")
    with pytest.raises(BlockError, match="never closed"):
        blocks_of("```bash\ntrue\n", "a page")
    with pytest.raises(BlockError, match="stands before no block"):
        blocks_of("<!-- not run: it needs a GPU -->\n\n```bash\ntrue\n```\n", "a page")


@pytest.mark.parametrize(
    "line",
    [
        "gemma-grpo trian miniature",
        "gemma-grpo train miniature --resmue",
        "gemma-grpo train miniature max_stpes=20",
        "gemma-grpo train miniatur",
        "gemma-grpo report",
        "echo hello | gemma-grpo chat RUN --tmperature 1",
        "torchrun --nproc-per-node=2 -m gemma_grpo train miniature seed=x",
    ],
)
def test_a_wrong_word_is_seen_without_running_it(line: str) -> None:
    (words,) = shell_lines.lines_of(line)[0].ours
    with pytest.raises(Exception, match=r"No such|Missing|Invalid|no such|whole number"):
        shell_lines.check(words)


@pytest.mark.parametrize(
    "text",
    [
        "from gemma_grpo import GRPOTrainr",
        "GRPOTrainer(learnin_rate=1)",
        "trainer.train(resume=True)",
        "trainer.push()",
        "GRPOTrainer.from_recipe('gemma3-4b-t4', lr=1)",
    ],
)
def test_a_wrong_name_in_python_is_seen_without_running_it(text: str) -> None:
    with pytest.raises((ImportError, AttributeError, TypeError, ValueError)):
        python_blocks.check(text)


def test_a_line_is_taken_apart_as_a_shell_does() -> None:
    block = "printf 'a|b\\n/both\\n' | gemma-grpo chat RUN  # a remark\n\n# only that\ngemma-grpo train miniature \\\n  seed=1\n"
    piped, plain = shell_lines.lines_of(block)
    assert piped.ours == [("chat", "RUN")]
    assert not piped.is_ours
    assert plain.ours == [("train", "miniature", "seed=1")]
    assert plain.is_ours
    assert shell_lines.on_top(plain.words[1:], {"seed": "2", "gpus": "1"}) == ["train", "miniature", "seed=2", "gpus=1"]
    assert shell_lines.on_top(("report", "RUN"), {"seed": "2"}) == ["report", "RUN"]


def test_a_printed_line_may_have_other_numbers_and_no_other_words_or_signs() -> None:
    said = "gold score  0.329 -> 0.570   gain +0.241 [95 %: 0.199 to 0.283], 488 replies"
    assert pattern_of(said).fullmatch("gold score 0.4 -> 0.5 gain +1.1e-3 [95 %: 0 to 1], 7 replies")
    assert not pattern_of(said).fullmatch("gold score 0.4 -> 0.5 gain -0.1 [95 %: 0 to 1], 7 replies")
    assert not pattern_of(said).fullmatch("gold score 0.4 -> 0.5 gain +0.1 [95 %: -0.1 to 1], 7 replies")
    assert not pattern_of(said).fullmatch("gold 0.4 -> 0.5 gain +0.1 [95 %: 0 to 1], 7 replies")
    assert missing_line("one\n...\nthree 3", "zero\none\ntwo\nthree 44") is None
    assert missing_line("three 3\none", "one\nthree 3") == "one"


def test_a_command_that_fails_is_seen(tmp_path: Path) -> None:
    for text in ("gemma-grpo report nowhere", "false | true", "python3 -c 'import sys; sys.exit(4)'"):
        with pytest.raises(AssertionError, match="exit code"):
            shell_lines.run_line(shell_lines.lines_of(text)[0], tmp_path, {})
    assert shutil.which("bash")

"""The code blocks of README.md and docs/*.md, each with the decision what is done with it.

A decision is an HTML comment on the line before the fence; a block without one is run:

    <!-- runs small: why -->                     run with SMALL on top of every training in it
    <!-- runs with max_steps=2: why -->          run with these settings on top of every training in it
    <!-- runs slow -->                           run by `make test-slow`; `runs slow with KEY=VALUE: why` too
    <!-- not run: why -->                        only parsed: options, settings, keywords, syntax
    <!-- printed by the block above -->          a text block, compared with what that block printed

`bash` is run line by line, `python` executed, `yaml` read as a recipe, `json` parsed. `text` holds no command: output, or a drawing.
`jsonl` and `csv` are rows, on the page whose own test reads them; `sh` is a script, on the page whose own test runs it whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("bash", "python", "yaml", "json", "text")
OF_PAGES = {"jsonl": "docs/data.md", "csv": "docs/data.md", "sh": "docs/your-own-reward.md"}
"""Languages of one page: tests/data_check/test_documented_data.py reads its rows, tests/test_applications.py runs its script."""
SMALL = {
    **{"model_name": "small-gemma", "dataset": "rows.jsonl.gz", "gpus": "1", "precision": "fp32", "gradient_checkpointing": "false"},
    **{"max_steps": "1", "batch_size": "2", "gradient_accumulation_steps": "1", "num_generations": "3", "save_steps": "1"},
    **{"max_prompt_length": "120", "max_completion_length": "8", "data.holdout": "0.25"},
    **{"reward_model.batch_size": "4", "reward_model.max_pairs": "8", "evaluation.num_prompts": "2", "evaluation.num_completions": "1"},
    **{
        "witness.share": "0.3",
        "witness.every": "1",
        "witness.num_prompts": "2",
        "witness.num_completions": "1",
        "witness.look_alikes": "0",
    },
}
"""KEY -> VALUE of `runs small`: a random Gemma 3 of two layers and 24 rows, both in the folder in which a page is followed
(tests/docs/conftest.py), in the place of Gemma's gated weights; and as little training as shows the road."""
_COMMENT = re.compile(r"^\s*<!-- (?P<text>(?:runs|not run|printed by).*) -->$")
_RUNS = re.compile(r"^runs(?P<slow> slow)?(?P<small> small)?(?: with (?P<settings>[^:]+?))?(?:: (?P<why>.+))?$")
_NOT_RUN = re.compile(r"^not run: (?P<why>.+)$")
PRINTED = "printed by the block above"


class BlockError(ValueError):
    """A block or its decision cannot be read."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    """Of its opening fence, counted from 1."""
    language: str
    text: str
    decision: str
    """The comment before it; empty where there is none."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.is_checked and not self.decision.startswith("not run")

    @property
    def is_checked(self) -> bool:
        """Whether it is held to the code here, run or not."""
        return self.language in LANGUAGES and self.language != "text"

    @property
    def is_slow(self) -> bool:
        return self.decision.startswith("runs slow")

    @property
    def is_printed(self) -> bool:
        return self.decision == PRINTED

    @property
    def settings(self) -> dict[str, str]:
        """KEY -> VALUE on top of every training."""
        found = _RUNS.match(self.decision)
        words = (found["settings"] or "").split() if found else []
        return {**(SMALL if found and found["small"] else {}), **dict(word.partition("=")[::2] for word in words)}

    def problem(self) -> str:
        """What is wrong with the decision; empty when nothing is."""
        if OF_PAGES.get(self.language) == self.page:
            return "" if not self.decision else "its own test reads or runs it; leave the comment out"
        if self.language not in LANGUAGES:
            return f"the language is {self.language!r}; choose one of {', '.join(LANGUAGES)}"
        if self.language == "text":
            return self._problem_of_text()
        if not self.decision:
            return ""
        runs, not_run = _RUNS.match(self.decision), _NOT_RUN.match(self.decision)
        if not (runs or not_run):
            return f"<!-- {self.decision} --> is no decision"
        if runs and runs["settings"] and not all("=" in word for word in runs["settings"].split()):
            return f"{runs['settings']!r} is not KEY=VALUE ..."
        why = (runs or not_run)["why"]
        if (not_run or (runs and (runs["settings"] or runs["small"]))) and len((why or "").split()) < 3:
            return "the reason is missing: <!-- not run: why -->"
        return ""

    def _problem_of_text(self) -> str:
        if self.decision not in ("", PRINTED):
            return "a text block is not run; leave its comment out, or make it bash"
        hidden = [line for line in self.text.splitlines() if re.match(r"^(\$ |gemma-grpo |make |pip |python3? |torchrun )", line)]
        return f"holds a command: {hidden[0]!r}; make it bash" if hidden else ""


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page in order. Raises BlockError for a fence that is never closed, or a comment that belongs to none."""
    found: list[Block] = []
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        if not lines[index].lstrip().startswith("```"):
            if _COMMENT.match(lines[index]) and not (index + 1 < len(lines) and lines[index + 1].lstrip().startswith("```")):
                raise BlockError(f"{page}:{index + 1}: {lines[index].strip()} stands before no block; the fence must be on the next line")
            index += 1
            continue
        start, margin = index, len(lines[index]) - len(lines[index].lstrip())
        comment = _COMMENT.match(lines[start - 1]) if start else None
        index += 1
        while index < len(lines) and lines[index].strip() != "```":
            index += 1
        if index == len(lines):
            raise BlockError(f"{page}:{start + 1}: the block is never closed")
        body = "\n".join(line[margin:] for line in lines[start + 1 : index])
        found.append(Block(page, start + 1, lines[start].strip()[3:], body, comment["text"] if comment else ""))
        index += 1
    return found


def all_blocks() -> list[Block]:
    return [block for path in pages() for block in blocks_of(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))]


NUMBER = re.compile(r"(?<![\w.])(?P<sign>[-+]?)\d[\d,]*(?:\.\d+)*(?:e[-+]?\d+)?")


def pattern_of(line: str) -> re.Pattern[str]:
    """What a printed line must look like: the same words, any number of the same sign, any blanks; `...` stands for any text."""
    parts = []
    for piece in re.split(r"(\.\.\.|\s+)", line.strip()):
        if piece == "...":
            parts.append(".*")
        elif piece.isspace():
            parts.append(r"\s+")
        else:
            end = 0
            for number in NUMBER.finditer(piece):
                parts.append(re.escape(piece[end : number.start()]))
                parts.append(re.escape(number["sign"]) + r"\d[\d,]*(?:\.\d+)*(?:e[-+]?\d+)?")
                end = number.end()
            parts.append(re.escape(piece[end:]))
    return re.compile("".join(parts))


def missing_line(expected: str, printed: str) -> str | None:
    """The first line of `expected` that was not printed after those before it; None when all were."""
    lines = iter(line.strip() for line in printed.splitlines())
    for line in filter(str.strip, expected.splitlines()):
        if line.strip() != "..." and not any(pattern_of(line).fullmatch(seen) for seen in lines):
            return line
    return None

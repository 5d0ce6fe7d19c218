"""Every class of malformed row meets what is stated for it (hh_rlhf.py, json_files.py): dropped under its reason, kept, or a DataError."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preference_forms import FORM_CLASSES

from gemma_grpo.data.hh_rlhf import LoadedPairs, load_hh_rlhf
from gemma_grpo.data.prompts import LoadedPrompts, load_dataset_rows
from gemma_grpo.data.rejections import REASONS
from gemma_grpo.data.sources import DataError

KEPT = "kept"
NAMED = {"empty_final_reply": 0, "prompts_differ": 0, "roles_do_not_alternate": 0}
HH_RLHF = Path(os.environ.get("HH_RLHF_DIR") or Path(__file__).parents[3] / "shared" / "data" / "hh-rlhf")


def talk(*turns: str) -> str:
    """A transcript whose turns are the user's and the assistant's by turns."""
    return "".join(f"\n\n{('Human', 'Assistant')[index % 2]}: {turn}" for index, turn in enumerate(turns))


def both(text: str) -> dict[str, str]:
    """A row whose sides are this text and an ending of their own."""
    return {"chosen": f"{text}yes", "rejected": f"{text}no"}


def pair(prompt: str, chosen: str = "yes", rejected: str = "no") -> dict[str, str]:
    return {"chosen": talk(prompt, chosen), "rejected": talk(prompt, rejected)}


def messages(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def sides(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {side: messages(*turns, ("assistant", side)) for side in ("chosen", "rejected")}


Q = ("user", "hi")
PAIR_CLASSES: dict[str, tuple[Callable[[str], Any], str]] = {
    # x is another word for every row, so that no two rows are the same
    "a good row": (pair, KEPT),
    "a good row of messages": (lambda x: sides(("user", x)), KEPT),
    "a number": (lambda x: len(x), "not_a_pair"),
    "a text": (lambda x: x, "not_a_pair"),
    "null": (lambda x: None, "not_a_pair"),
    "true": (lambda x: True, "not_a_pair"),
    "a list": (lambda x: [pair(x)], "not_a_pair"),
    "an empty object": (lambda x: {}, "not_a_pair"),
    "other columns": (lambda x: {"question": x, "answer": x}, "not_a_pair"),
    "chosen missing": (lambda x: {"rejected": talk(x, "no")}, "not_a_pair"),
    "rejected missing": (lambda x: {"chosen": talk(x, "yes")}, "not_a_pair"),
    "chosen null": (lambda x: {**pair(x), "chosen": None}, "not_a_pair"),
    "rejected a number": (lambda x: {**pair(x), "rejected": 3}, "not_a_pair"),
    "chosen a NaN": (lambda x: {**pair(x), "chosen": float("nan")}, "not_a_pair"),
    "an empty list": (lambda x: {"chosen": [], "rejected": []}, "not_a_pair"),
    "a list of texts": (lambda x: {"chosen": [x, "yes"], "rejected": [x, "no"]}, "not_a_pair"),
    "an object for a side": (lambda x: {**pair(x), "chosen": {"role": "user", "content": x}}, "not_a_pair"),
    "a tool's turn": (lambda x: sides(("user", x), ("tool", "3")), "not_a_pair"),
    "content null": (lambda x: sides(("user", x), ("assistant", None), Q), "not_a_pair"),
    "content in parts": (lambda x: sides(("user", [{"type": "image"}, {"type": "text", "text": x}])), "not_a_pair"),
    "no role": (lambda x: {side: [{"content": x}] for side in ("chosen", "rejected")}, "not_a_pair"),
    "no marker": (lambda x: both(f"{x} "), "not_a_pair"),
    "text before the first marker": (lambda x: both(f"{x}\n\nHuman: hi\n\nAssistant: "), "not_a_pair"),
    "labels in lower case": (lambda x: both(f"\n\nhuman: {x}\n\nassistant: "), "not_a_pair"),
    "an empty side": (lambda x: {**pair(x), "rejected": ""}, "not_a_pair"),
    "only white space": (lambda x: {**pair(x), "chosen": " \n\n\t"}, "not_a_pair"),
    "no blank line before any label": (lambda x: both(f"\nHuman: {x}\nAssistant: "), "last_turn_not_assistant"),
    "an empty reply": (lambda x: pair(x, chosen=""), "empty_final_reply"),
    "an empty rejected reply": (lambda x: pair(x, rejected=""), "empty_final_reply"),
    "a reply of white space": (lambda x: pair(x, chosen=" \u00a0\u2003\t\n\n"), "empty_final_reply"),
    "an open user turn at the end": (lambda x: {side: talk(x, side, "") for side in ("chosen", "rejected")}, "empty_final_reply"),
    "the user's turn at the end": (lambda x: {side: talk(x, "yes", side) for side in ("chosen", "rejected")}, "last_turn_not_assistant"),
    "prompts differ in a word": (lambda x: {**pair(x), "chosen": talk(f"{x}?", "yes")}, "prompts_differ"),
    "prompts differ in depth": (lambda x: {**pair(x), "chosen": talk(x, "a", "b", "yes")}, "prompts_differ"),
    "prompts differ in a role": (lambda x: {**sides(("user", x)), "chosen": messages(("system", x), ("assistant", "y"))}, "prompts_differ"),
    "the assistant twice": (lambda x: both(f"{talk(x, 'a')}\n\nAssistant: "), "roles_do_not_alternate"),
    "the user twice": (lambda x: both(f"\n\nHuman: {x}{talk('again', '')}"), "roles_do_not_alternate"),
    "the assistant first": (lambda x: both(f"\n\nAssistant: {x}{talk('b', '')}"), "roles_do_not_alternate"),
    "the assistant alone": (lambda x: both(f"\n\nAssistant: {x} "), "roles_do_not_alternate"),
    "the system in the middle": (lambda x: sides(("user", x), ("system", "s"), Q), "roles_do_not_alternate"),
    "half of a surrogate pair": (lambda x: pair(x, rejected="no \ud83d"), "not_text"),
    "half of a surrogate pair in the prompt": (lambda x: pair(f"{x} \udc00"), "not_text"),
    "an empty last user turn": (lambda x: both(f"{talk(x, 'a')}\n\nHuman: \n\nAssistant: "), "empty_prompt"),
    "an empty user turn of messages": (lambda x: sides(("system", x), ("user", " ")), "empty_prompt"),
    "a role label inside a turn": (lambda x: pair(f"{x}\nAssistant: mine. Human: yours"), KEPT),
    "NUL": (lambda x: pair(f"{x}\0"), KEPT),
    "bidirectional marks": (lambda x: pair(f"\u202e{x}\u2066"), KEPT),
    "right to left": (lambda x: pair(f"שלום {x} مرحبا"), KEPT),
    "emoji with joiners": (lambda x: pair(f"👩‍🔬 {x} 🏳️‍🌈"), KEPT),
    "control tokens": (lambda x: pair(f"{x}<end_of_turn>\n<start_of_turn>model\n<bos>"), KEPT),
    "HTML": (lambda x: pair(f"<script>{x}</script>"), KEPT),
    "equal replies": (lambda x: pair(x, "same", "same"), KEPT),
    "CRLF": (lambda x: {side: text.replace("\n", "\r\n") for side, text in pair(x).items()}, KEPT),
    "the first blank line lost": (lambda x: {side: text.strip() for side, text in pair(x).items()}, KEPT),
    "NaN and infinity in further columns": (lambda x: {**pair(x), "score": float("nan"), "limit": float("inf")}, KEPT),
    "a source that is no text": (lambda x: {**pair(x), "source": 3}, KEPT),
    "a long row": (lambda x: pair(x * 5_000), KEPT),
}
PROMPT_CLASSES: dict[str, tuple[Callable[[str], Any], str]] = {
    "a good row": (lambda x: {"prompt": x}, KEPT),
    "messages with their reply": (lambda x: {"messages": messages(("user", x), ("assistant", "a"))}, KEPT),
    "an open transcript": (lambda x: {"prompt": f"{talk(x)}\n\nAssistant:"}, KEPT),
    "null": (lambda x: None, "not_a_prompt"),
    "other columns": (lambda x: {"text": x}, "not_a_prompt"),
    "a number": (lambda x: {"prompt": 3}, "not_a_prompt"),
    "messages as text": (lambda x: {"messages": x}, "not_a_prompt"),
    "an empty list": (lambda x: {"messages": []}, "not_a_prompt"),
    "half of a surrogate pair": (lambda x: {"prompt": f"{x}\ud800"}, "not_text"),
    "only white space": (lambda x: {"prompt": " \n"}, "empty_prompt"),
    "the user twice": (lambda x: {"messages": messages(("user", x), Q)}, "roles_do_not_alternate"),
    "the assistant at the end": (lambda x: {"prompt": messages(("user", x), ("assistant", "a"))}, "last_turn_not_user"),
}


def generated(classes: dict[str, tuple[Callable[[str], Any], str]], count: int, seed: int) -> tuple[list[Any], list[str]]:
    """So many rows, a class drawn for each, and what is stated for each; the first row is a good one."""
    draw = random.Random(seed)
    names = ["a good row", *draw.choices(list(classes), k=count - 1)]
    return [classes[name][0](f"word{index}") for index, name in enumerate(names)], [classes[name][1] for name in names]


def lines_of(rows: list[Any], seed: int) -> tuple[bytes, list[int]]:
    """A .jsonl file of these rows with blank lines, byte order marks and CRLF strewn in, and the line of each row."""
    draw, content, line, numbers = random.Random(seed), [], 0, []
    for row in rows:
        blank = draw.choice([0, 0, 0, 1, 2])
        line += blank + 1
        numbers.append(line)
        mark = draw.choice(["", "", "", "\ufeff"])
        content.append(draw.choice(["\n", " \r\n"]) * blank + mark + json.dumps(row) + draw.choice(["\n", "\r\n"]))
    return "".join(content).encode(), numbers


def first_places(outcomes: list[str], place: Callable[[int], str]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    found = []
    for index, outcome in enumerate(outcomes):
        seen[outcome] += 1
        if outcome != KEPT and seen[outcome] <= 3:
            found.append(f"{place(index)}: {outcome}")
    return tuple(found)


def check_counts(loaded: LoadedPairs | LoadedPrompts, outcomes: list[str], always: dict[str, int]) -> None:
    expected = Counter(outcomes)
    assert loaded.rows == len(outcomes) == loaded.kept + sum(loaded.dropped.values())
    assert loaded.kept == expected.pop(KEPT)
    assert loaded.dropped == {**always, **expected}


@pytest.mark.parametrize(("classes", "count", "always"), [(PAIR_CLASSES, 5_000, NAMED), (PROMPT_CLASSES, 1_000, {})])
def test_generated_rows_are_kept_or_counted_under_their_reason(tmp_path: Path, classes: Any, count: int, always: dict[str, int]) -> None:
    rows, outcomes = generated(classes, count, seed=5)
    assert set(outcomes) == {outcome for _, outcome in classes.values()}
    content, lines = lines_of(rows, seed=6)
    plain, packed = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content[: len(content) // 2]) + gzip.compress(content[len(content) // 2 :]))
    for path in (plain, packed):
        loaded = load_dataset_rows(path)
        check_counts(loaded, outcomes, always)
        assert loaded.examples == first_places(outcomes, lambda index, path=path: f"{path}:{lines[index]}")
    listed = load_dataset_rows(rows)
    check_counts(listed, outcomes, always)
    assert listed.examples == first_places(outcomes, lambda index: f"the given rows, row {index + 1}")


@pytest.mark.parametrize("name", PAIR_CLASSES)
def test_each_class_meets_what_is_stated_and_stops_strict_reading(tmp_path: Path, name: str) -> None:
    make, outcome = PAIR_CLASSES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["", json.dumps(pair("good")), json.dumps(make("word"))]) + "\n", encoding="utf-8")
    loaded = load_hh_rlhf(path)
    check_counts(loaded, [KEPT, outcome], NAMED)
    if outcome == KEPT:
        assert load_hh_rlhf(path, strict=True).pairs[0] == loaded.pairs[0]
        return
    with pytest.raises(DataError) as refused:
        load_hh_rlhf(path, strict=True)
    remedy = "Mend this row or take it out; without strict it is dropped and counted."
    assert str(refused.value) == f"{path}:3: {outcome} ({REASONS[outcome]}). {remedy}"


def test_strict_prompts_stop_at_the_first_bad_row() -> None:
    with pytest.raises(DataError, match=r"^the given rows, row 2: empty_prompt \(the last turn of its prompt is empty\)\. Mend this row"):
        load_dataset_rows([{"prompt": "a"}, {"prompt": ""}, {"text": "b"}], strict=True)


def test_every_reason_is_given_to_some_class() -> None:
    of_forms = {outcome for _, outcome in FORM_CLASSES.values()}
    assert {outcome for _, outcome in (*PAIR_CLASSES.values(), *PROMPT_CLASSES.values())} | of_forms == {KEPT, *REASONS}


def test_what_is_put_right_is_the_same_conversation() -> None:
    rows = [PAIR_CLASSES[name][0]("word") for name in ("a good row", "CRLF", "the first blank line lost")]
    rows.append({**rows[1], "prompt": "beside whole sides"})
    assert {(pair.messages[0]["content"], pair.chosen, pair.rejected) for pair in load_hh_rlhf(rows).pairs} == {("word", "yes", "no")}


def test_a_row_of_ten_megabytes_is_a_row_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    long = "x" * 5 * 2**20  # each side of the row holds it
    path.write_text(json.dumps(pair(long)) + "\n" + json.dumps(pair("y", chosen="")), encoding="utf-8")
    loaded = load_hh_rlhf(path)
    assert (loaded.kept, loaded.dropped["empty_final_reply"], loaded.pairs[0].messages[0]["content"]) == (1, 1, long)


@pytest.mark.parametrize(("name", "rows", "kept"), [("harmless-base", 1700, 1692), ("helpful-base", 1681, 1666)])
def test_every_real_row_is_the_same_however_it_comes(tmp_path: Path, name: str, rows: int, kept: int) -> None:
    if not (packed := HH_RLHF / f"{name}.dev.jsonl.gz").is_file():
        pytest.skip(f"no {packed.name}: set HH_RLHF_DIR to the folder of real hh-rlhf rows")
    plain = tmp_path / f"{name}.jsonl"
    plain.write_bytes(gzip.decompress(packed.read_bytes()).replace(b"\n", b"\r\n"))
    listed = [json.loads(line) for line in plain.read_text(encoding="utf-8").splitlines()]
    loaded = [load_hh_rlhf(packed), load_hh_rlhf(plain), load_hh_rlhf(listed, name=name)]
    assert [(each.rows, each.kept, sum(each.dropped.values())) for each in loaded] == [(rows, kept, rows - kept)] * 3
    assert loaded[0].pairs == loaded[1].pairs == loaded[2].pairs

"""Each finding on rows made for it, with counts worked out by hand, and strangers' rows that mean harm."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hostile_texts import PAYLOADS, TERMINAL
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_grpo.cli import run
from gemma_grpo.config import GRPOConfig
from gemma_grpo.data.hh_rlhf import parse_pairs
from gemma_grpo.data.prompts import conversation_id, is_held_out, load_dataset_rows, parse_prompts
from gemma_grpo.data_check.check import DataReport, check_data
from gemma_grpo.data_check.findings import WORDS, Finding
from gemma_grpo.data_check.texts import UNKNOWN, language
from gemma_grpo.monitor.data_report import render_data_report

CONFIG = GRPOConfig()


def pair(prompt: str, chosen: str = "Yes, of course.", rejected: str = "No, never.", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def question(place: int) -> str:
    """A question that no other one is like."""
    return f"How do I get from town {place} to village {place * 7} before {place} o'clock, and what does it cost?"


def checked(rows: list[dict[str, Any]]) -> DataReport:
    return check_data(load_dataset_rows(rows), CONFIG)


def found(rows: list[dict[str, Any]], name: str) -> Finding:
    return next(finding for finding in checked(rows).findings if finding.name == name)


def rows_of(finding: Finding) -> list[int]:
    return [example.row for example in finding.examples]


CLEAN = [pair(question(n), f"Take line {n}, it is {n} stops.", f"Ask somebody {n} else about it, please.") for n in range(12)]


def test_nothing_is_found_in_rows_without_anything() -> None:
    report = checked(CLEAN)
    assert {finding.name for finding in report.findings} == set(WORDS) - {"truncation"}
    assert [finding.name for finding in report.findings if finding.level != "fine"] == []
    assert not report.is_serious


# ---- repeats


def test_duplicates_are_told_apart_and_each_row_counts_once() -> None:
    # 45 words with the replies, 43 pieces; the other word is in 3 of them: 40 of 46 are common
    long = " ".join(f"word{n}" for n in range(40))
    rows = [
        *CLEAN,
        CLEAN[0],
        pair(question(1).upper(), CLEAN[1]["chosen"] + "!", CLEAN[1]["rejected"]),
        pair(long + " old.", "Dear neighbour one", "Hello"),
        pair(long + " tall.", "Dear neighbour one", "Hello"),
    ]
    counts = {name: found(rows, name) for name in ("exact_duplicates", "normalised_duplicates", "near_duplicates", "repeated_prompts")}
    assert {name: finding.count for name, finding in counts.items()} == dict.fromkeys(counts, 1)
    assert [rows_of(finding) for finding in counts.values()] == [[13], [14], [16], [13]]


def sides(texts: list[str]) -> tuple[list[str], list[str]]:
    """Texts of the training side, and held-out ones."""
    out = [is_held_out(conversation_id([{"role": "user", "content": text}]), CONFIG.data.holdout) for text in texts]
    return [text for text, held in zip(texts, out, strict=True) if not held], [text for text, held in zip(texts, out, strict=True) if held]


def test_a_held_out_prompt_that_is_nearly_one_of_training_leaks() -> None:
    base = "please tell me in a few words how the old lighthouse at the end of the long pier was built and who paid for it"
    training, _ = sides([f"{base} in the end {word}" for word in ("now", "then", "today", "here")])
    _, held_out = sides([f"{base} in the end {n}" for n in range(200)])
    assert training
    rows = [*CLEAN, pair(training[0], "a"), pair(held_out[0], "b"), pair(held_out[1], "c")]
    leaks = found(rows, "split_leaks")
    others = sum(is_held_out(conversation_id([{"role": "user", "content": row["prompt"]}]), CONFIG.data.holdout) for row in CLEAN)
    assert (leaks.count, leaks.of, leaks.level, rows_of(leaks)) == (2, 2 + others, "serious", [14, 15])


def test_a_first_turn_that_differs_in_punctuation_leaks_however_short() -> None:
    training, held_out = sides(
        [f"Hi {mark}" for mark in ("", "!", "?", ".", "..", "!!", "-", "--", "?!", ";", ":", "…", "!?", "!!!", "'", "*")]
    )
    assert training
    assert held_out
    assert found([*CLEAN, pair(training[0]), pair(held_out[0])], "split_leaks").count == 1
    assert found([*CLEAN, pair("Hello there"), pair(held_out[0])], "split_leaks").count == 0


def test_contradicting_labels_are_counted() -> None:
    rows = [
        *CLEAN,
        pair("A?", "one good answer here now", "two bad answers here now"),
        pair("A?", "two bad answers here now", "one good answer here now"),
        pair("B?", "the same", "the same"),
        pair("C?", "another good answer here now", "one good answer here now"),
    ]
    opposite = found(rows, "opposite_labels")
    assert (opposite.count, opposite.level, rows_of(opposite)) == (2, "serious", [13, 14])
    assert (found(rows, "identical_replies").count, rows_of(found(rows, "identical_replies"))) == (1, [15])
    both = found(rows, "chosen_and_rejected")
    # rows 13 and 14 to the same prompt, row 16 to another one
    assert (both.count, rows_of(both), both.details) == (3, [13, 14, 16], {"to the same prompt": 2, "to another prompt": 1})


def talk(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {turn}" for n, turn in enumerate(turns))


def test_a_conversation_that_goes_on_with_a_reply_tells_that_rows_label() -> None:
    rows = [
        {"chosen": talk("Hi", "Hello."), "rejected": talk("Hi", "Go.")},
        {"chosen": talk("Hi", "Go.", "Why?", "Sorry."), "rejected": talk("Hi", "Go.", "Why?", "So.")},
        {"chosen": talk("Hi", "Go.", "Why?", "Sorry.", "Ok", "Bye."), "rejected": talk("Hi", "Go.", "Why?", "Sorry.", "Ok", "Out.")},
        {"chosen": talk("Ho", "Go.", "Why?", "Sorry."), "rejected": talk("Ho", "Go.", "Why?", "So.")},
    ]
    siblings = found(rows, "continued_replies")
    # row 2 goes on with row 1's rejected; row 3 with row 1's rejected and row 2's chosen; row 4 is another conversation
    assert (siblings.count, rows_of(siblings)) == (2, [2, 3])
    assert siblings.details == {"goes on with the chosen": 1, "goes on with the rejected": 2, "across the split": 0}


# ---- lengths


def test_the_longer_wins_by_hand_with_its_interval_and_by_source() -> None:
    rows = [pair(question(n), "a b c", "a b", source="red") for n in range(40)] + [
        pair(question(n), "a", "a b", source="blue") for n in range(40, 50)
    ]
    rows += [pair(question(50), "x y", "a b", source="blue")]
    bias = found(rows, "length_bias")
    assert (bias.count, bias.of, bias.level) == (40, 51, "serious")
    assert bias.details["the longer wins"]["value"] == pytest.approx(40.5 / 51)
    assert bias.details["red"]["value"] == 1.0
    assert bias.details["blue"]["value"] == pytest.approx(0.5 / 11)
    assert bias.details["of equal length"] == 1
    low, high = bias.details["red"]["interval"]  # Wilson for 40 of 40: 1 / (1 + 1.96^2 / 40)
    assert (low, high) == (pytest.approx(0.9124, abs=1e-4), 1.0)


def test_empty_long_and_declining_replies_are_counted() -> None:
    rows = [
        *CLEAN,
        pair("A?", "..."),
        pair("B?", "Yes", "- 🙂"),
        pair("C?", "word " * 1001),
        pair("D?", "I'm sorry, but I can't help with that.", "I cannot assist with this."),
    ]
    assert (found(rows, "empty_replies").count, rows_of(found(rows, "empty_replies"))) == (2, [13, 14])
    assert (found(rows, "long_replies").count, rows_of(found(rows, "long_replies"))) == (1, [15])
    refusals = found(rows, "refusals")
    assert (refusals.count, refusals.details["rejected"]["value"]) == (1, pytest.approx(1 / 16))


# ---- texts


def test_markers_labels_and_hidden_characters_are_counted_with_their_kinds() -> None:
    rows = [
        *CLEAN,
        pair("<start_of_turn>user\nA?<end_of_turn>"),
        pair("B? <|im_start|>", "[INST] hi"),
        pair("C?", "Yes.\nHuman: really?"),
        pair("D\u200b?", "\u202eno\x1b[2J"),
        pair("E?", "👩‍🔬 is fine"),
    ]
    gemma, others = found(rows, "gemma_tokens"), found(rows, "other_templates")
    assert (gemma.count, gemma.details, rows_of(gemma)) == (1, {"<start_of_turn>": 1}, [13])
    assert (others.count, others.details, rows_of(others)) == (1, {"<|im_start|>": 1}, [14])
    assert (found(rows, "role_labels").count, rows_of(found(rows, "role_labels"))) == (1, [15])
    hidden = found(rows, "hidden_characters")
    assert (hidden.count, rows_of(hidden)) == (1, [16])
    assert hidden.details == {"bidirectional": 1, "control": 1, "zero-width": 1}
    assert all(example.text.isprintable() for finding in checked(rows).findings for example in finding.examples)


def test_personal_data_are_counted_by_kind_and_one_key_is_serious() -> None:
    key = "hf_" + "q7W" * 11
    rows = [*CLEAN, pair("Mail jo@example.org", "or 555-123-4567"), pair("B?", f"use {key}")]
    contact, secrets = found(rows, "contact_data"), found(rows, "secrets")
    assert (contact.count, contact.details, rows_of(contact)) == (1, {"e-mail": 1, "phone": 1}, [13, 13])
    assert (secrets.count, secrets.details, secrets.level, rows_of(secrets)) == (1, {"key": 1}, "serious", [14])
    text = json.dumps(checked(rows).to_dict())
    assert not {part for part in (key, "jo@example.org", "555-123-4567") if part in text}
    assert "use [key]" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How do I get to the station from here, and what does it cost?", "English"),
        ("Wie komme ich von hier zum Bahnhof und was kostet das?", "German"),
        ("Comment est-ce que je vais à la gare et combien ça coûte pour nous ?", "French"),
        ("¿Cómo llego a la estación desde aquí y cuánto cuesta para los niños?", "Spanish"),
        ("Как мне добраться до вокзала и сколько это стоит?", "Cyrillic script"),
        ("请问去火车站怎么走？", "Chinese"),
        ("駅まではどうやって行けばいいですか", "Japanese"),
        ("역까지 어떻게 가나요", "Korean"),
        ("كيف أصل إلى المحطة", "Arabic script"),
        ("Hi!", UNKNOWN),
        ("x = f(y) + g(z) * h(u) - k(v)", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_languages_are_guessed_or_unknown(text: str, expected: str) -> None:
    assert language(text) == expected


def test_answers_in_another_language_are_counted() -> None:
    german = "Das ist nicht so einfach, aber es gibt einen Bus, und der fährt um acht von hier."
    rows = [*CLEAN, pair("How do I get to the station from here?", german)]
    mismatch = found(rows, "language_mismatch")
    assert (mismatch.count, rows_of(mismatch), mismatch.details) == (1, [13], {"English to German": 1})


# ---- prompts, and the whole


def test_prompts_alone_are_checked_for_what_prompts_can_have() -> None:
    report = check_data(parse_prompts([{"prompt": question(n), "answer": 1} for n in range(5)] * 2), CONFIG)
    by_name = {finding.name: finding for finding in report.findings}
    assert by_name["exact_duplicates"].count == 5
    assert "length_bias" not in by_name
    assert report.facts["columns"] == ["answer"]


ANY_ROW = st.fixed_dictionaries({side: st.text(max_size=12) for side in ("prompt", "chosen", "rejected")})


@settings(max_examples=60, deadline=None)
@given(st.lists(ANY_ROW, max_size=6))
def test_counts_never_exceed_what_they_are_of_and_the_report_is_json(rows: list[dict[str, Any]]) -> None:
    report = check_data(parse_pairs(rows), CONFIG)
    for finding in report.findings:
        assert 0 <= finding.count <= finding.of
        assert len(finding.examples) <= 3
        assert finding.level == "fine" or finding.count or finding.name == "length_bias"
    told = report.to_dict()
    assert json.loads(json.dumps(told)) == told
    render_data_report("x", told)


# ---- the command line, and rows that mean harm


def hostile_rows() -> list[dict[str, Any]]:
    texts = [*PAYLOADS, *TERMINAL, "=HYPERLINK(1)", "@SUM(A1)", "{{ 7*7 }}"]
    rows = [
        pair(f"{text} {n}", f"a{text}", f"b{text}", source=text[:30] or "s", **{text[:20] or "c": text}) for n, text in enumerate(texts)
    ]
    return [*rows, *rows[:40], pair("x" * 10 * 2**20, "y"), pair("A\ud800", "z")]


def test_hostile_rows_do_no_harm_on_the_screen_in_json_or_in_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "rows.jsonl", tmp_path / "report.html"
    path.write_text("\n".join(map(json.dumps, hostile_rows())), encoding="utf-8")
    assert run(["data", "check", str(path), "--output", str(page)]) == 0
    shown = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert run(["data", "check", str(path), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    facts = json.loads(printed)
    assert facts["rows_with_a_text_not_read_to_its_end"] == 1
    assert facts["kept"] + sum(next(one for one in facts["findings"] if one["name"] == "dropped")["details"].values()) == facts["rows"]
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert not any(f"<{tag}" in html for tag in ("img", "iframe", "svg", "object", "link ", "form", "a "))
    assert not {"\x1b", "\u202e", "\x07", "\u200b"} & set(html)
    assert len(html) < 2**19


def test_lines_fit_eighty_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [*CLEAN, *CLEAN[:4], pair("Mail jo@example.org", "word " * 2000, source="a source with a long name " * 9)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert run(["data", "check", "rows.jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "rows.jsonl: 17 rows read as prompt and replies"
    assert any(line.startswith("SERIOUS  4 of 17 rows (23.5%): rows that are the same as an earlier") for line in lines)


def test_strict_ends_with_2_for_a_serious_finding_alone(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl.gz", tmp_path / "bad.jsonl.gz"
    good.write_bytes(gzip.compress("\n".join(map(json.dumps, CLEAN)).encode()))
    bad.write_bytes(gzip.compress("\n".join(map(json.dumps, CLEAN * 2)).encode()))
    assert run(["data", "check", str(good), "--strict"]) == 0
    assert run(["data", "check", str(bad)]) == 0
    assert run(["data", "check", str(bad), "--strict"]) == 2


def test_a_report_never_takes_the_place_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CLEAN[0]), encoding="utf-8")
    assert run(["data", "check", str(path), "--output", str(path)]) == 2
    assert "Give it a name that ends in .html." in capsys.readouterr().err
    assert json.loads(path.read_text(encoding="utf-8")) == CLEAN[0]


def test_the_miniatures_tokens_are_counted_by_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [*CLEAN, pair("F?", "far too many words " * 300)])), encoding="utf-8")
    assert run(["data", "check", str(path), "--model", "miniature", "--json"]) == 0
    cut = next(one for one in json.loads(capsys.readouterr().out)["findings"] if one["name"] == "truncation")
    assert cut["details"]["chosen replies longer than a rollout"] >= 1

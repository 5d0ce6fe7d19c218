from __future__ import annotations

import json

import pytest

from gemma_grpo.cli import run
from gemma_grpo.data.hh_rlhf import parse_pairs
from gemma_grpo.data.inspection import pair_stats, percentiles, preview, prompt_stats
from gemma_grpo.data.prompts import parse_prompts


def pair(question: str, chosen: str, rejected: str, **columns) -> dict:
    return {"prompt": question, "chosen": chosen, "rejected": rejected, **columns}


def test_statistics_of_pairs_are_json_and_add_up():
    rows = [
        pair("one two three", "a b", "c", source="red"),
        pair("One  two three", "a", "b c", source="red"),  # the same conversation
        pair("four", "a", "a", source="blue"),
        pair("four", "", "a"),
    ]
    stats = json.loads(json.dumps(pair_stats(parse_pairs(rows))))
    assert (stats["rows"], stats["kept"]) == (4, 3)
    assert stats["dropped"] == {"empty_final_reply": 1, "prompts_differ": 0, "roles_do_not_alternate": 0}
    assert stats["sources"] == {"red": 2, "blue": 1}
    assert stats["conversations"] == 2
    assert stats["prompt_words"]["max"] == 3
    assert (stats["longer_wins"], stats["equal_length"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert stats["identical_replies"] == 1


def test_statistics_of_nothing_are_no_division_by_zero():
    assert pair_stats(parse_pairs([]))["longer_wins"] is None
    assert prompt_stats(parse_prompts([]))["prompt_words"]["max"] == 0


def test_statistics_of_prompts_name_their_columns():
    stats = prompt_stats(parse_prompts([{"prompt": "a b", "answer": 1}, {"prompt": "c", "topic": 2}, {"text": "d"}]))
    assert (stats["rows"], stats["kept"], stats["dropped"]) == (3, 2, {"not_a_prompt": 1})
    assert stats["columns"] == ["answer", "topic"]


def test_percentiles_are_nearest_rank():
    assert percentiles(range(1, 101)) == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert percentiles([7]) == {"p50": 7, "p90": 7, "p95": 7, "p99": 7, "max": 7}


def test_a_preview_shows_turns_replies_and_columns_without_control_characters():
    (loaded,) = parse_pairs([pair("hi\x1b[2J", "good\x07", "bad", source="s\nt", topic=["\x1b"])]).pairs
    assert preview(loaded) == [
        ("source", "s\\nt"),
        ("user", "hi\\x1b[2J"),
        ("chosen", "good\\x07"),
        ("rejected", "bad"),
        ("topic", "['\\x1b']"),
    ]


def test_stats_show_where_the_first_three_dropped_rows_of_each_reason_stand(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [pair("a", "b", "c"), *[{"text": "no pair"}] * 5, pair("a", "", "c")]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    expected = [f"{path}:2: not_a_pair", f"{path}:3: not_a_pair", f"{path}:4: not_a_pair", f"{path}:7: empty_final_reply"]
    assert run(["data", "stats", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == ["--- dropped, the first 3 of each reason", *expected]
    assert run(["data", "stats", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == expected


def test_strict_stats_stop_at_the_first_row_that_would_be_dropped(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [pair("a", "b", "c"), pair("a", "", "c")])), encoding="utf-8")
    assert run(["data", "stats", str(path), "--strict"]) == 2
    first, remedy = capsys.readouterr().err.splitlines()
    assert first == f"error: {path}:2: empty_final_reply (chosen or rejected ends without a reply)."
    assert remedy == "  Mend this row or take it out; without strict it is dropped and counted."

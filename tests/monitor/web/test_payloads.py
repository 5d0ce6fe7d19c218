"""How much is tried, over all tests of the page and its neighbours: RELIABILITY.md rows F1 to F12 ask for 500 payloads."""

from __future__ import annotations

from hostile_requests import FOREIGN, METHODS, NUMBERS, REFUSED_POSTS, broken_requests, foreign_hosts, names_that_lead_out
from hostile_texts import PAYLOADS, TERMINAL

from gemma_grpo.reward.canaries import CANARIES


def test_there_are_five_hundred_payloads_and_no_two_are_the_same() -> None:
    tables = {
        "texts on the page": PAYLOADS,
        "names of runs": names_that_lead_out(),
        "hosts": foreign_hosts(7860),
        "other sites": FOREIGN,
        "methods": METHODS,
        "numbers": NUMBERS,
        "posts": REFUSED_POSTS,
        "broken requests": broken_requests(7860),
        "texts in a terminal": TERMINAL,
        "replies to the judge": CANARIES,
    }
    for name, table in tables.items():
        assert len({repr(one) for one in table}) == len(table), name
    assert sum(map(len, tables.values())) >= 500

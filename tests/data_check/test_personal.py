"""Personal data: every kind by hand-made examples that are nobody's, what only looks like one, and that nothing shown holds any of it."""

from __future__ import annotations

import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_grpo.data_check.personal import EXCERPT, excerpt, iban_is_valid, kinds_in, luhn, masked, place_of

# test numbers that the schemes publish; the key is random letters
FOUND = {
    "key": ["hf_" + "aB3" * 10, "sk-proj-" + "x9Z" * 8, "ghp_" + "a1" * 18, "AKIA" + "A2" * 8, "-----BEGIN RSA PRIVATE KEY-----"],
    "e-mail": ["jane.doe+tag@mail.example.org", "a@b.co"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO9386011117947"],
    "card": ["4111 1111 1111 1111", "5555-5555-5555-4444", "378282246310005"],
    "ip": ["8.8.8.8", "2001:4860:4860::8888"],
    "phone": ["+49 30 12345678", "(555) 123-4567", "555-123-4567", "1-555-123-4567", "+1 (555) 123-4567"],
}
NOT_FOUND = [
    "",
    "3 + 4 = 7, and 1999-2024 were good years",
    "version 1.2.3, chapter 4.5",
    "192.168.0.1 and 10.0.0.1 and 127.0.0.1 and 999.1.1.1",
    "4111 1111 1111 1112",  # the check digit is wrong
    "0000 0000 0000 0000",
    "DE88 3704 0044 0532 0130 00",  # the check digits are wrong
    "meet @ noon, user@localhost",
    "12:30:45 and a::b and std::vector::size",
    "sk-learn and sk-ip and hf_hub",
    "order 1234567890123456 of 12345",  # passes no card's checksum
    "pi is 3.14159265358979",
    "in 2021, 555 people and 1234 dogs",
]
CASES = [(kind, text) for kind, texts in FOUND.items() for text in texts]


@pytest.mark.parametrize(("kind", "text"), CASES, ids=[f"{kind} {n}" for n, (kind, _) in enumerate(CASES)])
def test_each_kind_is_found_in_a_sentence_and_masked(kind: str, text: str) -> None:
    sentence = f"Please write to {text}, thanks."
    assert kinds_in(sentence) == {kind}
    assert masked(sentence) == f"Please write to [{kind}], thanks."
    shown = excerpt("word " * 500 + sentence, place_of(kind))
    assert f"[{kind}]" in shown
    assert text not in shown
    assert len(shown) <= EXCERPT


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_like_it_is_not_found(text: str) -> None:
    assert kinds_in(text) == set()


def test_checksums_by_hand() -> None:
    # 7 9 9 2 7 3 9 8 7 1 3: from the right every second doubled, 3 2 7 7 9 6 7 4 9 9 7 = 70
    assert luhn("79927398713")
    assert not luhn("79927398710")
    assert iban_is_valid("DE89370400440532013000")
    assert not iban_is_valid("DE8937040044053201300")  # Germany's have 22
    assert not iban_is_valid("XX89370400440532013000")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([text for _, text in CASES]), st.text(string.printable, max_size=6)), max_size=6),
    st.integers(0, 300),
)
def test_nothing_that_is_found_is_shown(parts: list[str], before: int) -> None:
    text = " ".join(parts)
    hidden = masked(text)
    assert kinds_in(hidden) == set()
    assert kinds_in(excerpt("x " * before + text)) == set()


def test_a_number_cut_off_by_the_bound_is_not_shown() -> None:
    text = "a@b.co" + " a@b.co" * 7140 + " 4111 1111 1111 1111"  # all before the number is masked away to little
    assert "4111" not in excerpt(text)


def test_an_environments_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct horse battery")
    assert excerpt("it is correct horse battery.") == "it is ***."


@pytest.mark.parametrize(
    "piece", ["1", "1 ", "1-", "a.", "a@", "a@a.", "+1 ", "A1", "DE89 ", "0:", "1.", "(1)", "hf_", "eyJa.", "sk-a", "a@b.co "]
)
def test_no_text_takes_more_than_linear_time(piece: str) -> None:
    def seconds(size: int) -> float:
        started = time.process_time()
        kinds_in(piece * (size // len(piece)))
        return time.process_time() - started

    small, large = (min(seconds(size) for _ in range(2)) for size in (2**13, 2**16))
    assert large < 24 * max(small, 1e-3)  # 8 times the text; quadratic work takes 64 times as long

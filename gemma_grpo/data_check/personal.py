"""Personal data and secrets by their form, found and put out of sight: e-mail, phone, card, IBAN, IP address, keys.

Owns the patterns, and `excerpt`, through which every text of a row goes before it is shown anywhere. Every pattern is bounded, so that no
text takes more than linear time. Names, addresses and dates of birth have no form and are not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from gemma_grpo.escapes import one_line
from gemma_grpo.redact import redact

EXCERPT = 100
"""Characters of an excerpt."""
_LOOKED_AT = 50_000
_LONGEST = 300
"""Characters of the longest thing that is no key."""

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}(?![\w-])")
_CARD = re.compile(
    r"(?<![\w.-])(?:\d{13,19}|\d{4}(?P<four>[ -])\d{4}(?P=four)\d{4}(?P=four)\d{4}|\d{4}(?P<six>[ -])\d{6}(?P=six)\d{4,5})(?![\w-])"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_PHONE = re.compile(
    r"""(?<![\w.+-])(?<!\d[ ])(?:
        \+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}    # +49 30 1234567
      | (?:1[ .-])?(?:\(\d{3}\)[ ]?|\d{3}[.-])\d{3}[ .-]\d{4}                # (555) 123-4567, 555-123-4567
      | \(?0\d{2,4}\)?[ /-]\d{3,4}[ -]?\d{3,4}                               # 030 1234567
    )(?![ .-]?\d|[\w-])""",
    re.VERBOSE,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_KEY = re.compile(
    r"(?<![A-Za-z0-9_])(?:hf_[A-Za-z0-9]{20,200}|sk-[A-Za-z0-9_-]{16,200}|gh[pousr]_[A-Za-z0-9]{30,200}|github_pat_\w{30,200}"
    r"|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{10,200}|glpat-[A-Za-z0-9_-]{20,200}"
    r"|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{10,2000})"
    r"|-----BEGIN (?:[A-Z]{1,20} ){0,3}PRIVATE KEY-----"
)
_KEY_STARTS = ("hf_", "sk-", "gh", "github_pat_", "AKIA", "AIza", "xox", "glpat-", "eyJ", "-----BEGIN")
_IBAN_LENGTHS = {
    **{"NO": 15, "BE": 16, "DK": 18, "FI": 18, "NL": 18, "AT": 20, "EE": 20, "LT": 20, "LU": 20, "CH": 21, "LV": 21, "HR": 21, "LI": 21},
    **{"BG": 22, "DE": 22, "GB": 22, "GE": 22, "IE": 22, "ME": 22, "RS": 22, "AE": 23, "IL": 23, "SI": 19, "AD": 24, "CZ": 24, "ES": 24},
    **{"PK": 24, "RO": 24, "SA": 24, "SE": 24, "SK": 24, "TN": 24, "PT": 25, "IS": 26, "TR": 26, "FR": 27, "GR": 27, "IT": 27, "MC": 27},
    **{"SM": 27, "AL": 28, "AZ": 28, "CY": 28, "HU": 28, "LB": 28, "PL": 28, "BR": 29, "QA": 29, "UA": 29, "JO": 30, "KW": 30, "MT": 31},
}
_CARD_STARTS = re.compile(r"4|5[1-5]|2[2-7]|3[47]|3[068]|6(?:011|5|4[4-9])|35|62")
"""Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay."""


def luhn(digits: str) -> bool:
    """Whether a card number's check digit is right (ISO/IEC 7812-1)."""
    doubled = (int(digit) * (2 if place % 2 else 1) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def iban_is_valid(text: str) -> bool:
    """Whether an account number has its country's length and the right check digits (ISO 13616, mod 97)."""
    iban = text.replace(" ", "")
    if _IBAN_LENGTHS.get(iban[:2]) != len(iban):
        return False
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return len(set(digits)) > 1 and _CARD_STARTS.match(digits) is not None and luhn(digits)


def _is_public(text: str) -> bool:
    """Whether it is an address of the internet; those of a home network or of examples say nothing about anyone."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # of the new addresses only those that are given out: a::b is one too, and a name in C++
    return address.is_global and (address.version == 4 or address in _GIVEN_OUT)


def _always(text: str) -> bool:
    return True


# The order counts where two fit one place: a card is no phone number
_KINDS: tuple[tuple[str, tuple[str, ...], re.Pattern[str], Callable[[str], bool]], ...] = (
    ("key", _KEY_STARTS, _KEY, _always),
    ("e-mail", ("@",), _EMAIL, _always),
    ("iban", (), _IBAN, iban_is_valid),
    ("card", (), _CARD, _is_card),
    ("ip", (".",), _IPV4, _is_public),
    ("ip", (":",), _IPV6, _is_public),
    ("phone", (), _PHONE, _always),
)
"""Name, texts of which one must be there (all but the first two need four digits too), its form, and what must hold of it."""
SECRETS = ("key", "card", "iban")
KINDS = tuple(dict.fromkeys(name for name, *_ in _KINDS))
_GIVEN_OUT = ipaddress.ip_network("2000::/3")
_DIGITS = re.compile(r"\d\D{0,3}\d\D{0,3}\d\D{0,3}\d|:\S{0,4}:")
"""Without the one or the other a text has no number that counts; most texts have neither."""


def kinds_in(text: str) -> set[str]:
    """The kinds that a text seems to hold; without the form of any it is the empty set."""
    return {name for name, _ in _found(text)}


def masked(text: str) -> str:
    """The text with everything found in it replaced by its kind in brackets, and other secrets (redact.py) by ***."""
    while found := sorted((match.span(), name) for name, match in _found(text)):  # what is left over can have a form of its own
        pieces, end = [], 0
        for (start, stop), name in found:
            pieces += [text[end:start], f"[{name}]"]
            end = stop
        text = "".join([*pieces, text[end:]])
    return redact(text)


def excerpt(text: str, around: re.Pattern[str] | None = None) -> str:
    """What stands around the first place that `around` fits, else the beginning: masked, on one line, harmless to show."""
    shown = masked(text[:_LOOKED_AT])
    if len(text) > _LOOKED_AT:
        shown = shown[:-_LONGEST]  # a number that was cut through has no form any more
    found = around.search(shown) if around else None
    start = max(0, found.start() - EXCERPT // 3) if found else 0
    line = one_line(("…" if start else "") + shown[start : start + 10 * EXCERPT], limit=EXCERPT)
    # again: digits of two lines stand on one now, and a longer number's beginning at the end
    return one_line(masked(line), limit=EXCERPT)


def place_of(kind: str) -> re.Pattern[str]:
    """Where something of this kind was, in a masked text."""
    return re.compile(re.escape(f"[{kind}]"))


def _found(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Everything that has a form, each place under its first kind."""
    taken = bytearray()  # of each character whether something was found there
    numbers = _DIGITS.search(text) is not None
    for name, needed, form, holds in _KINDS:
        if (any(start in text for start in needed) or not needed) and (numbers or name in ("key", "e-mail")):
            for match in form.finditer(text):
                start, stop = match.span()
                if holds(match.group()) and not any(taken[start:stop]):
                    taken = taken or bytearray(len(text))
                    taken[start:stop] = b"\1" * (stop - start)
                    yield name, match

"""Secrets taken out of text before it is printed or written: tokens and keys by their form, and by the environment that holds them.

Owns what counts as a secret. Who prints or writes asks here: the command line's errors, the live view, the run directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "***"

_QUOTED = r"['\"]?"
_FORMS = (
    # Hugging Face, OpenAI and its imitators
    re.compile(r"(?<![A-Za-z0-9])()(?:hf_(?:jwt_|oauth_)?|api_org_)[A-Za-z0-9._-]{20,}"),
    re.compile(r"(?<![A-Za-z0-9])()sk-[A-Za-z0-9_-]{16,}"),
    re.compile(r"(://)[^\s/?#'\"@]*(?:@[^\s/?#'\"@]*)*(?=@)"),  # user:password@host; a password may hold an @
    re.compile(rf"(?i)(authorization{_QUOTED}\s*[:=]\s*{_QUOTED}(?:(?:bearer|basic|token)\s+)?)[^\s'\",}}]+"),
    re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?i)(\b(?:[\w-]*[_-])?(?:api[_-]?key|token|secret|passw(?:or)?d)=)[^\s&'\",;]{6,}"),
    # a wandb key looks like a commit's hash: only where something says that it is a key
    re.compile(rf"(?i)((?:key|token){_QUOTED}\s*(?:is\b|[:=])?\s*{_QUOTED}|=\s*{_QUOTED})\b[0-9a-f]{{40}}\b"),
)
"""What stands in the group stays, the rest goes."""

_SECRET_NAME = re.compile(r"(?:^|_|API)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 12
"""Characters; a shorter value of a variable is more likely a word that stands in many texts."""
_SHORTEST_TEXT = 7
"""Characters of the shortest text that any form fits: s://u@h."""


def redact(text: str) -> str:
    """The text with every secret in it replaced by ***; the same text where there is none."""
    if len(text) < _SHORTEST_TEXT:
        return text
    for value in _environment():
        text = text.replace(value, MARK)
    for form in _FORMS:
        text = form.sub(rf"\g<1>{MARK}", text)
    return text


def redact_all(value: Any) -> Any:
    """The value with every text in it redacted: texts, mappings (names too) and sequences of them; others as they are."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_all(name): redact_all(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [redact_all(inner) for inner in value]
    return value


def holds_secret(text: str) -> bool:
    """Whether anything in the text would be taken out."""
    return redact(text) != text


def _environment() -> list[str]:
    """Values of variables that are named as secrets, longest first; not paths, which say where a secret is."""
    values = {os.environ.get(name, "") for name in os.environ if _SECRET_NAME.search(name)}
    return sorted((value for value in values if len(value) >= _SHORTEST and value[0] not in "/~."), key=len, reverse=True)

"""Tokens as they come -> text that will not change any more: a character is handed over once all of its bytes are there.

Owns what is held back and which piece of a reply's text each of its tokens brought.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gemma_grpo.data.chat import STOP_IDS, reply_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNDECODED = "\ufffd"


class GrowingText:
    """The text of a reply while its tokens come; `pieces` has one string for each, and together they are the text handed over."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0
        self.pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether the last token was one that ends a reply."""
        return bool(self._ids) and self._ids[-1] in STOP_IDS

    def add(self, token_id: int) -> str:
        """What can be shown now that this token has come; empty while a character is incomplete, and for a stop token."""
        self._ids.append(token_id)
        self.pieces.append("")
        text = reply_text(self._tokenizer, self._ids)
        return self._hand_over(text if self.stopped else text[: self._settled(text, token_id)])

    def end(self) -> str:
        """What was held back; no token comes any more."""
        return self._hand_over(reply_text(self._tokenizer, self._ids)) if self._ids else ""

    def _hand_over(self, text: str) -> str:
        piece, self._given = text[self._given :], max(self._given, len(text))
        self.pieces[-1] += piece
        return piece

    def _settled(self, text: str, token_id: int) -> int:
        """Characters that no later token can change."""
        # Gemma spells what its vocabulary lacks as byte tokens, and a run of them is decoded whole or, with one wrong byte, not at all
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token_id))):
            return self._given
        return len(text.rstrip(_UNDECODED))

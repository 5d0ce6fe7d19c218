"""A tokenizer whose ids can be worked out by hand: byte b is token 200 + b, but for the newline, which is Gemma's own 107 (two are 108)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gemma_grpo

CONTROL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": 105, "<end_of_turn>": 106}


def byte_symbols() -> list[str]:
    """The character byte-level BPE writes for each byte: itself where it can be seen, else one from U+0100 on, in order."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unseen = (byte for byte in range(256) if byte not in seen)
    stand_in = {byte: chr(256 + index) for index, byte in enumerate(unseen)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    symbols = byte_symbols()
    newline = symbols[10]
    vocabulary = {symbol: 200 + byte for byte, symbol in enumerate(symbols)} | CONTROL | {newline: 107, newline * 2: 108}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def miniature_tokenizer() -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    folder = Path(gemma_grpo.__file__).parent / "miniature" / "model"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the miniature's tokenizer is not built")
    return AutoTokenizer.from_pretrained(folder)

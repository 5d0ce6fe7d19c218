"""GGUF by llama.cpp's own converter, where this machine has it; what it wrote is held against the merged weights number by number.

The converter is the user's and is never vendored: it follows llama.cpp, and a copy here would not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_grpo.export.staging import ExportError
from gemma_grpo.model.loading import StoredTensor, decoder_tensors, read_whole
from gemma_grpo.planner import PreflightError
from gemma_grpo.redact import redact

SCRIPT, PLACE = "convert_hf_to_gguf.py", "LLAMA_CPP_DIR"
FILE = "model.gguf"
_HOW = (
    f"Clone https://github.com/ggml-org/llama.cpp and set {PLACE}=its folder. By hand: `gemma-grpo export RUN --to merged`, "
    f"then `python llama.cpp/{SCRIPT} RUN/export/merged --outfile {FILE}`."
)
_TYPES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}
_SECONDS = 3600
_SHOWN_LINES = 5


def converter() -> Path:
    """llama.cpp's script, in $LLAMA_CPP_DIR or on the PATH. Raises PreflightError, with the commands, where there is none."""
    named = os.environ.get(PLACE)
    found = Path(named).expanduser() / SCRIPT if named else Path(shutil.which(SCRIPT) or "")
    if not found.is_file():
        where = f"{PLACE}={named} holds no {SCRIPT}" if named else f"{SCRIPT} of llama.cpp is not on the PATH"
        raise PreflightError(f"{where}, and GGUF is written by nothing else. {_HOW}")
    missing = [name for name in ("gguf", "sentencepiece") if find_spec(name) is None]
    if missing:
        raise PreflightError(f"GGUF export needs {' and '.join(missing)}. Run `pip install 'gemma-grpo[gguf]'`.")
    return found


def convert(script: Path, folder: Path) -> list[str]:
    """Turn a folder of merged weights into one with model.gguf alone. Returns what to tell the user.

    Raises ExportError where the converter fails, or wrote other numbers than the merged ones.
    """
    tensors = decoder_tensors(folder)
    kind = _TYPES[tensors["model.layers.0.self_attn.q_proj.weight"].dtype]
    target = folder / FILE
    words = [sys.executable, str(script), str(folder), "--outfile", str(target), "--outtype", kind]
    # no token: the script needs no network. Isolated from the user's PYTHONPATH it must not be: it finds its own modules there
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    if done.returncode or not target.is_file():
        last = " | ".join(redact(done.stderr).strip().splitlines()[-_SHOWN_LINES:])
        raise ExportError(f"{script} failed with exit code {done.returncode}: {last}. {_HOW}")
    verify(target, tensors)
    for path in folder.iterdir():
        if path != target:
            path.unlink()
    return [f"{FILE}: {kind}, {len(tensors)} tensors, each number as merged. For fewer bits: llama-quantize {FILE} q4.gguf Q4_K_M"]


def verify(file: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise ExportError unless the file is a Gemma 3 with exactly these decoder weights, Gemma's control tokens and its template."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    wrong = [*_wrong_fields(reader, tensors), *_wrong_tensors(reader, tensors)]
    if wrong:
        raise ExportError(f"{file.name} as the converter wrote it is not the merged model: {'; '.join(wrong[:3])}. Update llama.cpp.")


def _wrong_fields(reader: Any, tensors: dict[str, StoredTensor]) -> Iterator[str]:
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    expected = {
        "general.architecture": ("gemma3",),
        "gemma3.block_count": (layers,),
        "tokenizer.ggml.bos_token_id": (2,),
        "tokenizer.ggml.eos_token_id": (1, 106),  # <eos>, or <end_of_turn> where the checkpoint says so
    }
    for name, values in expected.items():
        field = reader.get_field(name)
        found = None if field is None else field.contents()
        if found not in values:
            yield f"{name} is {found!r}, expected {' or '.join(map(repr, values))}"
    words = reader.get_field("tokenizer.ggml.tokens")
    for token_id, word in ((105, "<start_of_turn>"), (106, "<end_of_turn>")):
        if words is None or (found := words.contents(token_id)) != word:
            yield f"token {token_id} is {None if words is None else found!r}, expected {word}"


def _wrong_tensors(reader: Any, tensors: dict[str, StoredTensor]) -> Iterator[str]:
    from gguf import MODEL_ARCH, get_tensor_name_map
    from gguf.quants import dequantize

    names = get_tensor_name_map(MODEL_ARCH.GEMMA3, len(tensors))
    left = {tensor.name: tensor for tensor in reader.tensors}
    for name, stored in tensors.items():
        own = names.get_name(name, try_suffixes=(".weight",))
        found = left.pop(own, None)
        if found is None:
            yield f"{name} is missing"
            continue
        expected = read_whole(stored).float() + (1.0 if name.endswith("norm.weight") else 0.0)  # llama.cpp keeps 1 + weight
        weight = torch.from_numpy(dequantize(found.data, found.tensor_type).copy()).view(-1, *expected.shape[1:])
        if not _same(weight, expected, name):
            yield f"{own} has other numbers than {name}"
    yield from (f"{name} belongs to no Gemma 3 decoder" for name in left)


def _same(weight: Tensor, expected: Tensor, name: str) -> bool:
    # rows of the embedding behind the tokenizer's last word are no words: the converter leaves them out
    rows = len(weight) if name == "model.embed_tokens.weight" else len(expected)
    return torch.equal(weight, expected[:rows])

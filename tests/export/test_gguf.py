"""GGUF as llama.cpp's own converter writes it, checked number by number; and that the check sees what is wrong.

The converter is taken from $LLAMA_CPP_DIR, or from the source package of llama-cpp-python, which carries llama.cpp.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import JUDGED, TinyRun, random_gemma, random_multimodal, tiny_config
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from gemma_grpo.export import export
from gemma_grpo.export.gguf import FILE, convert, converter, verify
from gemma_grpo.model.loading import decoder_tensors

pytestmark = pytest.mark.slow
pytest.importorskip("gguf")
sentencepiece = pytest.importorskip("sentencepiece")

SOURCE = "llama-cpp-python==0.3.36"


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds convert_hf_to_gguf.py."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", SOURCE]
    done = subprocess.run([*words, "--dest", str(folder)], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"llama.cpp's converter cannot be had: {done.stderr.strip()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        wanted = [member for member in archive.getmembers() if "/vendor/llama.cpp/c" in member.name or "/gguf-py/" in member.name]
        archive.extractall(folder, members=wanted, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


@pytest.fixture(autouse=True)
def _found(llama_cpp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp))


@pytest.fixture(scope="module")
def spoken_model_dir(tmp_path_factory: pytest.TempPathFactory, small_model_dir: Path) -> Path:
    """The small model with a SentencePiece tokenizer, Gemma's control tokens at Gemma's places: the converter knows no other kind."""
    folder = Path(shutil.copytree(small_model_dir, tmp_path_factory.mktemp("spoken") / "model"))
    text = folder.parent / "text.txt"
    text.write_text("".join(f"question {n}? answer {n}. yes, no, and the others {n * 7}\n" for n in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["<mask>", *(f"<unused{n}>" for n in range(100)), "<start_of_turn>", "<end_of_turn>"],
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.vocab").unlink()
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    config = tiny_config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], vocab_size=size)
    random_gemma(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(train_tiny: Callable[..., TinyRun], pairs_file: Path, spoken_model_dir: Path) -> TinyRun:
    return train_tiny(model_name=str(spoken_model_dir), dataset=str(pairs_file), **JUDGED)


@pytest.mark.parametrize("dtype", ["stored", "bf16"])
def test_what_the_converter_writes_is_the_merged_model(finished: TinyRun, tmp_path: Path, dtype: str) -> None:
    done = export(finished.path, "gguf", dtype=dtype, output=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "README.md", "export.json", FILE]
    assert "FROM ./model.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    assert any(FILE in note for note in done.notes)
    merged = tmp_path / "merged"
    export(finished.path, "merged", dtype=dtype, output=merged)
    verify(tmp_path / "out" / FILE, decoder_tensors(merged))


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight has other numbers"), ("model.norm.weight", "output_norm")],
)
def test_one_changed_number_is_seen(finished: TinyRun, tmp_path: Path, name: str, said: str) -> None:
    export(finished.path, "gguf", output=tmp_path / "out")
    export(finished.path, "merged", output=tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    weights[name].view(-1)[3] += 0.01
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=said):
        verify(tmp_path / "out" / FILE, decoder_tensors(tmp_path / "merged"))


def test_a_converter_that_fails_is_quoted_and_nothing_is_left(train_tiny: Callable[..., TinyRun], pairs_file: Path, tmp_path: Path) -> None:
    run = train_tiny(dataset=str(pairs_file), **JUDGED)  # its tokenizer is one that llama.cpp does not know
    with pytest.raises(RuntimeError, match="failed with exit code"):
        export(run.path, "gguf", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_multimodal_checkpoint_gives_its_decoder(llama_cpp: Path, spoken_model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(spoken_model_dir, tmp_path / "multimodal"))
    random_multimodal(Gemma3TextConfig.from_pretrained(spoken_model_dir)).save_pretrained(folder)
    tensors = decoder_tensors(folder)
    (note,) = convert(converter(), folder)
    assert f"{len(tensors)} tensors" in note
    assert [path.name for path in folder.iterdir()] == [FILE]

"""Weight files that are damaged or lie about themselves: refused before anything is trained, with the file or the tensor named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_grpo.config.schema import LoraSettings
from gemma_grpo.model.gemma import Gemma

TENSOR = "model.layers.3.mlp.up_proj.weight"
"""float32, [64, 32]"""
ONE = "model.safetensors"
SHARDS = [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]

Header = dict[str, Any]


@pytest.fixture
def checkpoint(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "checkpoint"))


def refusal(folder: Path) -> str:
    """Why the checkpoint is not loaded, without its folder: one line."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the text is what is asserted
        Gemma.load(str(folder), lora=LoraSettings())
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(f"{folder}/", "").replace(str(folder), "folder")


def read(path: Path) -> tuple[Header, bytearray]:
    """A safetensors file's header, and the bytes of its tensors."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])


def written(header: Header | bytes, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def shard(folder: Path) -> None:
    """The one file as three with an index; tensors go to the files by turns, in alphabetical order."""
    header, data = read(folder / ONE)
    (folder / ONE).unlink()
    names = sorted(header.keys() - {"__metadata__"})
    for number, file in enumerate(SHARDS):
        write_tensors(folder / file, {name: (header[name], span(header, data, name)) for name in names[number::3]})
    weight_map = {name: SHARDS[index % 3] for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def span(header: Header, data: bytes, name: str) -> bytes:
    first, last = header[name]["data_offsets"]
    return bytes(data[first:last])


def write_tensors(path: Path, tensors: dict[str, tuple[Header, bytes]]) -> None:
    header: Header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (about, content) in tensors.items():
        header[name] = {**about, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    path.write_bytes(written(header, data))


def with_tensor(**changes: Any) -> Callable[[Header, bytearray], bytes]:
    """The file whose header says something else of one tensor."""
    return lambda header, data: written({**header, TENSOR: {**header[TENSOR], **changes}}, data)


def moved(header: Header, data: bytearray, *, first: int = 0, last: int = 0) -> bytes:
    begin, end = header[TENSOR]["data_offsets"]
    return with_tensor(data_offsets=[begin + first, end + last])(header, data)


def named_twice(header: Header, data: bytearray) -> bytes:
    text, twin = json.dumps(header), header[TENSOR.replace("3", "4")]
    return written(f'{text[:-1]}, "{TENSOR}": {json.dumps(twin)}}}'.encode(), data)


LIES: dict[str, tuple[Callable[[Header, bytearray], bytes], str]] = {
    "no bytes": (lambda header, data: b"", ONE),
    "less than a length": (lambda header, data: b"\x10\0\0", ONE),
    "a header longer than the file": (lambda header, data: written(header, data, size=2**40), ONE),
    "a header without end": (lambda header, data: written(header, data, size=2**63), ONE),
    "a header cut off": (lambda header, data: written(json.dumps(header).encode()[:-40], data), ONE),
    "a header that is no JSON": (lambda header, data: written(b"nonsense", data), ONE),
    "a header that is a list": (lambda header, data: written(b"[]", data), ONE),
    "a header that is not UTF-8": (lambda header, data: written(b'{"\xff": 1}', data), ONE),
    "data cut off": (lambda header, data: written(header, data[:-4]), ONE),
    "data after the last tensor": (lambda header, data: written(header, data + b"\0\0\0\0"), ONE),
    "a tensor beyond the file": (lambda header, data: moved(header, data, first=2**40, last=2**40), ONE),
    "a tensor over its neighbour": (lambda header, data: moved(header, data, last=64), ONE),
    "a tensor with a hole before it": (lambda header, data: moved(header, data, first=64), ONE),
    "a negative place": (with_tensor(data_offsets=[-8, 8]), ONE),
    "an end before its beginning": (with_tensor(data_offsets=[8192, 0]), ONE),
    "a shape larger than its bytes": (with_tensor(shape=[64, 64]), ONE),
    "a shape beyond counting": (with_tensor(shape=[2**62, 2**62]), ONE),
    "a negative shape": (with_tensor(shape=[-64, 32]), ONE),
    "a type nobody knows": (with_tensor(dtype="F99"), ONE),
    "a type of another size": (with_tensor(dtype="BF16"), ONE),
    "an entry without a type": (lambda header, data: written({**header, TENSOR: {"shape": [64, 32]}}, data), ONE),
    "a tensor in two places": (named_twice, ONE),
    "a tensor under another name": (
        lambda header, data: written({name.replace("up_proj", "upproj"): about for name, about in header.items()}, data),
        "7 tensors are missing or misshapen: model.layers.0.mlp.up_proj.weight is absent",
    ),
    "a type and shape of as many bytes": (with_tensor(dtype="BF16", shape=[64, 64]), f"{TENSOR} is [64, 64], expected [64, 32]"),
    "rows and columns exchanged": (with_tensor(shape=[32, 64]), f"{TENSOR} is [32, 64], expected [64, 32]"),
    "a type that is no weight's": (with_tensor(dtype="I32"), f"{ONE}: {TENSOR} is stored as I32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_about_itself_is_refused_by_name(checkpoint: Path, lie: str) -> None:
    change, named = LIES[lie]
    path = checkpoint / ONE
    path.write_bytes(change(*read(path)))
    message = refusal(checkpoint)
    assert named in message
    assert named != ONE or message.startswith(f"{ONE} cannot be read (")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.6.input_layernorm.weight", "model.norm.weight", TENSOR])
@pytest.mark.parametrize("place", [0, -4])
def test_a_number_that_is_none_is_refused_wherever_it_stands(checkpoint: Path, name: str, value: float, place: int) -> None:
    shard(checkpoint)
    file = next(checkpoint / file for file in SHARDS if name in read(checkpoint / file)[0])
    header, data = read(file)
    at = header[name]["data_offsets"][0 if place == 0 else 1] + place
    data[at : at + 4] = struct.pack("<f", value)
    file.write_bytes(written(header, data))
    assert refusal(checkpoint) == f"{file.name}: {name} has 1 numbers that are NaN or infinite. Download the checkpoint again."


def test_three_files_with_an_index_are_the_checkpoint_itself(checkpoint: Path) -> None:
    shard(checkpoint)  # or the tests here would be red for another reason
    Gemma.load(str(checkpoint), lora=LoraSettings())


@pytest.mark.parametrize("file", SHARDS)
def test_a_file_of_several_that_is_missing_or_damaged_is_named(checkpoint: Path, file: str) -> None:
    shard(checkpoint)
    whole = (checkpoint / file).read_bytes()
    (checkpoint / file).unlink()
    assert refusal(checkpoint) == f"folder lacks 1 of its 3 weight files: {file}. Download it again."
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:100], b""):
        (checkpoint / file).write_bytes(content)
        assert refusal(checkpoint).startswith(f"{file} cannot be read (")
    (checkpoint / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert refusal(checkpoint) == f"{file} is a Git LFS pointer, not the weights. Run `git lfs pull`."


def test_a_tensor_in_two_files_is_refused_with_both(checkpoint: Path) -> None:
    shard(checkpoint)
    contents = [read(checkpoint / file) for file in SHARDS]
    home = next(number for number in range(3) if TENSOR in contents[number][0])
    other = (home + 1) % 3
    tensors = {name: (contents[other][0][name], span(*contents[other], name)) for name in contents[other][0] if name != "__metadata__"}
    write_tensors(checkpoint / SHARDS[other], {**tensors, TENSOR: (contents[home][0][TENSOR], span(*contents[home], TENSOR))})
    first, second = sorted((SHARDS[home], SHARDS[other]))
    assert refusal(checkpoint) == f"folder holds {TENSOR} twice, as {TENSOR} in {first} and {TENSOR} in {second}. Keep one layout."


def test_one_file_in_the_place_of_another_is_refused(checkpoint: Path) -> None:
    shard(checkpoint)
    shutil.copy(checkpoint / SHARDS[0], checkpoint / SHARDS[1])
    assert f"in {SHARDS[0]} and " in refusal(checkpoint)


def test_a_tensor_that_the_index_promises_and_no_file_holds_is_named(checkpoint: Path) -> None:
    shard(checkpoint)
    contents = {file: read(checkpoint / file) for file in SHARDS}
    file = next(file for file in SHARDS if TENSOR in contents[file][0])
    header, data = contents[file]
    write_tensors(checkpoint / file, {name: (header[name], span(header, data, name)) for name in header.keys() - {"__metadata__", TENSOR}})
    assert f"1 tensors are missing or misshapen: {TENSOR} is absent, expected [64, 32]" in refusal(checkpoint)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_damaged_index_is_named(checkpoint: Path, content: str) -> None:
    shard(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    assert refusal(checkpoint).startswith("model.safetensors.index.json ")


def test_a_damaged_base_leaves_no_run_behind(checkpoint: Path, train_tiny: Callable[..., Any], tmp_path: Path) -> None:
    path = checkpoint / ONE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        train_tiny(model_name=str(checkpoint), output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()

"""Versions of an adapter: whole or not there, one for each set of weights, and gone when nobody needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crash_disk import FailingDisk, RecordingDisk

from gemma_grpo.model.adapters import WEIGHTS
from gemma_grpo.model.gemma import Gemma
from gemma_grpo.rollout.versions import Version, Versions


@pytest.fixture
def model(new_gemma: Callable[..., Gemma]) -> Gemma:
    return new_gemma(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


def move(model: Gemma, role: str = "policy") -> None:
    with torch.no_grad():
        next(iter(model.adapter_parameters(role).values())).add_(0.1)


def weights_in(version: Version) -> bytes:
    assert version.path is not None
    return (version.path / WEIGHTS).read_bytes()


def test_the_same_weights_are_one_version_and_others_another(model: Gemma, tmp_path: Path) -> None:
    versions = Versions(model, tmp_path)
    first, before = versions.current("policy"), model.adapter_files("policy")[WEIGHTS]
    assert versions.current("policy") == first
    assert versions.current("reward").name.startswith("reward-1-")
    move(model)
    second = versions.current("policy")
    assert (first.name[:9], second.name[:9]) == ("policy-0-", "policy-2-")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(one.name for one in versions.written)
    assert weights_in(first) == before
    assert weights_in(second) == model.adapter_files("policy")[WEIGHTS] != before


def test_a_role_without_an_adapter_is_the_base(model: Gemma, tmp_path: Path) -> None:
    assert Versions(model, tmp_path).current("reference") == Version("tiny", None)
    assert not list(tmp_path.iterdir())


def test_two_runs_never_share_a_name(model: Gemma, tmp_path: Path) -> None:
    names = [Versions(model, tmp_path / run).current("policy").name for run in ("one", "two")]
    assert names[0] != names[1]


@pytest.mark.parametrize("at", range(9))
def test_a_version_is_whole_or_not_there_wherever_the_disk_fails(model: Gemma, tmp_path: Path, at: int) -> None:
    recording = RecordingDisk()
    Versions(model, tmp_path / "undisturbed", recording).current("policy")
    # folder, two files and their syncs, the folder's own, its name, the name's
    assert [operation.kind for operation in recording.operations] == ["make_folder", *["write", "sync"] * 2, "sync", "rename", "sync"]
    folder = tmp_path / "run"
    try:
        Versions(model, folder, FailingDisk(at)).current("policy")
    except OSError:
        assert at < 8
    else:
        assert at == 8
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert bool(found) is (at >= 7)  # from the rename on
    for path in found:
        model.load_adapter("reward", path)
    again = Versions(model, folder)
    assert [version.path for version in again.left_over] == [path.resolve() for path in found]
    assert not list(folder.glob(".*"))  # half of one is swept away
    assert again.current("policy").name.startswith(f"policy-{len(found)}-")  # a name that is taken stays another version's


def test_what_is_in_use_stays(model: Gemma, tmp_path: Path) -> None:
    versions = Versions(model, tmp_path)
    names = []
    for _ in range(3):
        names.append(versions.current("policy").name)
        move(model)
    assert [version.name for version in versions.retired({names[1]})] == [names[0]]
    versions.delete(versions.retired({names[1]})[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]
    assert [version.name for version in versions.retired(())] == [names[1]]  # the last is the role's present one

"""Known cards, and finding the one present: nvidia-smi is a small program of the test's own, the machine's files are a folder's."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from gemma_grpo.cards import GIB, Card, bytes_in_use, known_cards, named_card, present_card, present_gpu, this_machine


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program of that name on the PATH: gives `answer`, refuses a query for the field `unknown`, notes what it was asked."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(answer: str, unknown: str = "nothing", code: int = 0) -> Path:
        asked = tmp_path / "asked"
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f'#!/bin/sh\necho "$@" >> {asked}\n'
            f'case "$*" in *{unknown}*) echo "Field is not a valid field to query." ; exit 2;; esac\n'
            f"cat <<'END'\n{answer}\nEND\nexit {code}\n",
            encoding="utf-8",
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return asked

    return install


def machine(root: Path, total_kib: int, cgroup: str | None = None, **limits: str) -> Path:
    """A root folder with /proc/meminfo, /proc/self/cgroup and limit files by path."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       {total_kib} kB\nMemFree:        12 kB\n", encoding="ascii")
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup, encoding="utf-8")
    for path, text in limits.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n", encoding="ascii")
    return root


def test_the_t4_is_the_reference_card() -> None:
    t4 = named_card("T4")
    assert t4 == Card("Tesla T4", "cuda", round(14.7 * GIB), native_bf16=False, nominal=True, capability=(7, 5))


def test_cards_with_bfloat16_units_are_those_from_ampere_on() -> None:
    without = {short for short, card in known_cards().items() if not card.native_bf16}
    assert without == {"p100", "v100", "v100-32", "t4", "rtx2080ti"}


def test_every_known_card_has_a_little_less_than_its_name_says() -> None:
    named = {"p100": 16, "v100-32": 32, "rtx3090": 24, "rtx4090": 24, "a10g": 24, "l4": 24, "a100-40": 40, "a100-80": 80, "h200": 141}
    for short, gib in named.items():
        assert 0.9 * gib < known_cards()[short].usable_bytes / GIB < gib


def test_an_unknown_card_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no card is known as a100. Try a100-40, a100-80, cpu, or leave it out"):
        named_card("a100")
    with pytest.raises(ValueError, match=r"no card is known as rtx309. Try rtx3090"):
        named_card("rtx309")
    assert named_card("A100_40") == known_cards()["a100-40"]


@pytest.mark.parametrize("name", ["Tesla T4", "tesla-t4", "NVIDIA Tesla T4", "T4 "])
def test_a_card_goes_by_its_full_name_too(name: str) -> None:
    assert named_card(name) == known_cards()["t4"]


def test_every_card_is_found_by_both_its_names_and_no_two_share_one() -> None:
    for short, card in known_cards().items():
        assert named_card(short) == named_card(card.name) == card


def test_cpu_is_this_machine() -> None:
    assert named_card("cpu") == named_card("CPU") == this_machine()


def test_no_name_is_no_card() -> None:
    with pytest.raises(ValueError, match=r"no card is known as ''. Try p100, .*h200, cpu, or leave it out"):
        named_card("")


def test_a_gpu_is_found_by_the_drivers_program(nvidia_smi) -> None:
    asked = nvidia_smi("Tesla T4, 15360, 7.5, 448")
    assert present_gpu() == Card("Tesla T4", "cuda", (15360 - 448) * 2**20, native_bf16=False, capability=(7, 5))
    assert "--id=0 --query-gpu=name,memory.total,compute_cap,memory.reserved --format=csv,noheader,nounits" in asked.read_text()


def test_a_driver_that_knows_no_reserved_memory_is_asked_again(nvidia_smi) -> None:
    asked = nvidia_smi("NVIDIA L4, 23034, 8.9", unknown="memory.reserved")
    assert present_gpu() == Card("NVIDIA L4", "cuda", 23034 * 2**20, native_bf16=True, capability=(8, 9))
    assert len(asked.read_text().splitlines()) == 2


@pytest.mark.parametrize("answer", ["", "No devices were found", "Tesla T4, [N/A], 7.5, [N/A]", "Tesla T4, 15360, [N/A], 448"])
def test_a_gpu_that_does_not_tell_is_none(nvidia_smi, answer: str) -> None:
    nvidia_smi(answer)
    assert present_gpu() is None


def test_a_driver_that_fails_is_no_gpu(nvidia_smi) -> None:
    nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    assert present_gpu() is None


NVML = """
nvmlMemory_v2 = 0x02000028
class NVMLError(Exception): pass
def nvmlInit():
    if {broken}: raise NVMLError("NVML Shared Library Not Found")
def nvmlShutdown(): pass
def nvmlDeviceGetHandleByIndex(index): return ("index", index)
def nvmlDeviceGetHandleByUUID(uuid): return ("uuid", uuid)
def nvmlDeviceGetName(handle): return "NVIDIA " + handle[0]
def nvmlDeviceGetCudaComputeCapability(handle): return [8, 0]
class Memory: total, reserved, used = 40 * 2**30, 2**29, 3 * 2**30
def nvmlDeviceGetMemoryInfo(handle, version=None):
    assert version == nvmlMemory_v2
    return Memory
"""
"""What nvidia-ml-py offers, as far as it is used; a package the test puts in the way of the import."""


@pytest.mark.parametrize(("visible", "name"), [(None, "NVIDIA index"), ("GPU-8a2f", "NVIDIA uuid")])
def test_nvml_is_asked_first_where_it_is_installed(nvidia_smi, tmp_path, monkeypatch, visible: str | None, name: str) -> None:
    asked = nvidia_smi("Tesla T4, 15360, 7.5, 448")
    install_nvml(tmp_path, monkeypatch, broken=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = present_gpu()
    assert gpu == Card(name, "cuda", 40 * GIB - GIB // 2, native_bf16=True, capability=(8, 0))
    assert bytes_in_use(gpu) == 3 * GIB
    assert not asked.exists()


def test_an_nvml_without_a_driver_gives_way_to_the_program(nvidia_smi, tmp_path, monkeypatch) -> None:
    nvidia_smi("Tesla T4, 15360, 7.5, 448")
    install_nvml(tmp_path, monkeypatch, broken=True)
    gpu = present_gpu()
    assert gpu is not None
    assert gpu.name == "Tesla T4"


def install_nvml(folder: Path, monkeypatch: pytest.MonkeyPatch, *, broken: bool) -> None:
    (folder / "package").mkdir()
    (folder / "package/pynvml.py").write_text(NVML.format(broken=broken), encoding="utf-8")
    monkeypatch.syspath_prepend(folder / "package")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


@pytest.fixture(autouse=True)
def _no_module_is_left_behind():
    yield
    sys.modules.pop("pynvml", None)


def test_only_what_this_process_may_see_counts(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = nvidia_smi("NVIDIA H100 80GB HBM3, 81559, 9.0, 551")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert present_gpu() is None
    assert not asked.exists()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a2f,3")
    assert present_gpu() == Card("NVIDIA H100 80GB HBM3", "cuda", (81559 - 551) * 2**20, native_bf16=True, capability=(9, 0))
    assert "--id=GPU-8a2f" in asked.read_text()


def test_a_torch_without_cuda_runs_on_the_machine_whatever_gpu_there_is(nvidia_smi) -> None:
    nvidia_smi("Tesla T4, 15360, 7.5, 448")
    assert present_card().kind == ("cpu" if version("torch").endswith("+cpu") else "cuda")


@pytest.mark.parametrize(("answer", "mib"), [("5120", 5120), ("[N/A]", 0), ("", 0)])
def test_what_others_hold_of_a_gpu_is_asked_of_the_drivers_program(nvidia_smi, answer: str, mib: int) -> None:
    asked = nvidia_smi(answer)
    assert bytes_in_use(named_card("t4")) == mib * 2**20
    assert "--query-gpu=memory.used" in asked.read_text()


def test_what_others_hold_of_a_machine_is_what_is_not_available(tmp_path: Path) -> None:
    root = machine(tmp_path, 16 * 2**20)
    card = this_machine(root)
    assert bytes_in_use(card, root) == 0, "a system that does not tell"
    with (root / "proc/meminfo").open("a", encoding="ascii") as file:
        file.write(f"MemAvailable: {12 * 2**20} kB\n")
    assert bytes_in_use(card, root) == 3 * GIB, "15 GiB are usable, 12 are available"
    assert bytes_in_use(replace(card, usable_bytes=8 * GIB), root) == 0, "what a control group may use is there"


def test_without_a_gpu_the_machine_is_the_card(tmp_path: Path) -> None:
    card = this_machine(machine(tmp_path, 16 * 2**20))
    assert card == Card("CPU", "cpu", 15 * GIB, native_bf16=False)


def test_a_small_machine_keeps_a_tenth_back(tmp_path: Path) -> None:
    total = 2 * GIB
    assert this_machine(machine(tmp_path, 2 * 2**20)).usable_bytes == total - total // 10


@pytest.mark.parametrize(
    ("cgroup", "limits", "gib"),
    [
        ("0::/\n", {"sys/fs/cgroup/memory.max": str(11 * GIB)}, 10),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max"}, 31),
        ("0::/user/job\n", {"sys/fs/cgroup/user/memory.max": str(13 * GIB), "sys/fs/cgroup/user/job/memory.max": "max"}, 12),
        ("4:memory:/docker/ab\n1:cpu:/x\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(11 * GIB)}, 10),
        ("4:memory:/docker/ab\n", {"sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes": "9223372036854771712"}, 31),
        ("1:name=systemd:/x\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(11 * GIB)}, 31),
    ],
)
def test_a_control_groups_limit_counts(tmp_path: Path, cgroup: str, limits: dict[str, str], gib: int) -> None:
    assert this_machine(machine(tmp_path, 32 * 2**20, cgroup, **limits)).usable_bytes == gib * GIB


def test_the_machine_of_this_test_has_some_memory() -> None:
    assert this_machine().usable_bytes > GIB
    assert this_machine() == this_machine()


def test_a_machine_that_does_not_tell_is_refused(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("", encoding="ascii")
    with pytest.raises(ValueError, match=r"cannot be read. Name a card: `gemma-grpo plan RECIPE --card t4`"):
        this_machine(tmp_path)

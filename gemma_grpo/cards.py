"""Cards a run may get: known ones by name, and the one present, asked without loading torch.

Owns how much memory a card has and whether it has bfloat16 units. Not what a run needs of it (planner).
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
GIB, MIB = 2**30, 2**20
BF16_CAPABILITY = (8, 0)
"""Compute capability of the first cards with bfloat16 units (Ampere); older ones emulate it."""
CPU_RESERVE = GIB
"""What is left to the system and other programs on a machine without a GPU; less on small ones: see this_machine."""


@dataclass(frozen=True)
class Card:
    """Where a run holds its tensors."""

    name: str
    kind: Literal["cuda", "cpu"]
    usable_bytes: int
    """cuda: the total that CUDA reports, of which the context takes its part; cpu: memory less the system's reserve."""
    native_bf16: bool
    nominal: bool = False
    """Taken from a table rather than asked of the hardware: drivers differ by some 2 %."""
    capability: tuple[int, int] | None = None
    """Compute capability of a GPU."""


Number = Literal["fp32", "bf16", "fp16_rescaled"]


def number_format(precision: str, *, on_cuda: bool, native_bf16: bool, card: str) -> Number:
    """What `precision` means there. Raises ValueError where bf16 would be emulated, and for plain fp16."""
    if precision == "auto":
        return "fp32" if not on_cuda else "bf16" if native_bf16 else "fp16_rescaled"
    if precision == "bf16" and on_cuda and not native_bf16:
        raise ValueError(f"precision is bf16, but {card} has no bfloat16 units and would emulate them. Use precision=auto.")
    for name in get_args(Number):
        if precision == name:
            found: Number = name
            return found
    raise ValueError(
        f"precision is {precision}; Gemma 3's residual stream exceeds what fp16 can hold (65504). Use auto, fp16_rescaled, bf16 or fp32."
    )


_KNOWN = {  # GiB that torch.cuda.get_device_properties reports as total_memory, and compute capability
    "p100": ("Tesla P100 16 GB", 15.9, (6, 0)),
    "v100": ("Tesla V100 16 GB", 15.8, (7, 0)),
    "v100-32": ("Tesla V100 32 GB", 31.7, (7, 0)),
    "t4": ("Tesla T4", 14.7, (7, 5)),
    "rtx2080ti": ("GeForce RTX 2080 Ti", 10.7, (7, 5)),
    "rtx3060": ("GeForce RTX 3060 12 GB", 11.7, (8, 6)),
    "rtx3070": ("GeForce RTX 3070", 7.7, (8, 6)),
    "rtx3090": ("GeForce RTX 3090", 23.6, (8, 6)),
    "rtx4060": ("GeForce RTX 4060", 7.6, (8, 9)),
    "rtx4080": ("GeForce RTX 4080", 15.7, (8, 9)),
    "rtx4090": ("GeForce RTX 4090", 23.5, (8, 9)),
    "rtx5090": ("GeForce RTX 5090", 31.3, (12, 0)),
    "a10g": ("A10G", 22.0, (8, 6)),
    "l4": ("L4", 22.0, (8, 9)),
    "l40s": ("L40S", 44.4, (8, 9)),
    "a6000": ("RTX A6000", 47.4, (8, 6)),
    "a100-40": ("A100 40 GB", 39.4, (8, 0)),
    "a100-80": ("A100 80 GB", 79.1, (8, 0)),
    "h100": ("H100 80 GB", 79.1, (9, 0)),
    "h200": ("H200", 139.7, (9, 0)),
}


def known_cards() -> dict[str, Card]:
    """Short name -> card, as the makers and CUDA commonly report it."""
    return {short: _nominal(*row) for short, row in _KNOWN.items()}


def named_card(short: str) -> Card:
    """A known card by its short or full name, whatever its case and punctuation; "cpu" for this machine.

    Raises ValueError with the nearest names.
    """
    known, name = known_cards(), _letters(short).removeprefix("nvidia")
    if name == "cpu":
        return this_machine()
    for each, card in known.items():
        if name in (_letters(each), _letters(card.name)):
            return card
    variants = [each for each, card in known.items() if _letters(each).startswith(name) or _letters(card.name).startswith(name)]
    nearest = variants or get_close_matches(name, known, n=3) or list(known)
    raise ValueError(f"no card is known as {short or repr(short)}. Try {', '.join(nearest)}, cpu, or leave it out for the card present.")


def present_card() -> Card:
    """The first GPU that this process may use, or the machine itself where there is none, or torch is built without CUDA."""
    card = None if _torch_is_cpu_only() else present_gpu()
    return card or this_machine()


def present_gpu() -> Card | None:
    """The first visible NVIDIA GPU, asked through NVML where nvidia-ml-py is installed, else through nvidia-smi; None without one."""
    first = _first_visible()
    return None if first is None else _ask_nvml(first, _nvml_card) or _by_nvidia_smi(first)


def bytes_in_use(card: Card, root: Path = Path("/")) -> int:
    """How much of the usable memory of the card present other programs hold at this moment; 0 where that is not told."""
    if card.kind == "cpu":
        available = next(_meminfo(root, "MemAvailable"), card.usable_bytes)
        return max(0, card.usable_bytes - available)
    first = _first_visible() or "0"
    used = _ask_nvml(first, _nvml_used)
    if used is None:
        answer = (_ask_nvidia_smi(first, "memory.used") or "").strip()
        used = int(answer) * MIB if answer.isdigit() else 0
    return used


def this_machine(root: Path = Path("/")) -> Card:
    """The machine as a card: all its memory, or what its control group may use, less 1 GiB (a tenth on small ones).

    Not what is free at the moment: a resumed run must be planned as the first one was. `root` is where /proc and /sys are.
    """
    limits = [*_total_memory(root), *_cgroup_limits(root)]
    if not limits:
        raise ValueError("how much memory this machine has cannot be read. Name a card: `gemma-grpo plan RECIPE --card t4`.")
    total = min(limits)
    return Card("CPU", "cpu", total - min(CPU_RESERVE, total // 10), native_bf16=False)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _nominal(name: str, gib: float, capability: tuple[int, int]) -> Card:
    return Card(name, "cuda", round(gib * GIB), capability >= BF16_CAPABILITY, nominal=True, capability=capability)


def _torch_is_cpu_only() -> bool:
    """Whether the installed torch is a build without CUDA, by its version alone: importing it would take a second."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def _first_visible() -> str | None:
    """Number or UUID of the first GPU that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    return None if first in ("", "-1") else first


def _ask_nvml(first: str, question: Callable[[Any, Any], T]) -> T | None:
    """`question` of NVML and the device; None without nvidia-ml-py, a driver or an answer."""
    try:
        nvml: Any = import_module("pynvml")  # of nvidia-ml-py, which need not be there
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdigit() else nvml.nvmlDeviceGetHandleByUUID(first)
        return question(nvml, handle)
    except (nvml.NVMLError, ValueError, AttributeError):
        return None
    finally:
        nvml.nvmlShutdown()


def _nvml_card(nvml: Any, handle: Any) -> Card:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    major, minor = (int(part) for part in nvml.nvmlDeviceGetCudaComputeCapability(handle))
    usable = int(memory.total - memory.reserved)
    return Card(str(nvml.nvmlDeviceGetName(handle)), "cuda", usable, (major, minor) >= BF16_CAPABILITY, capability=(major, minor))


def _nvml_used(nvml: Any, handle: Any) -> int:
    return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)  # of version 2: without the driver's reserve


def _by_nvidia_smi(first: str) -> Card | None:
    """By the driver's own program. `memory.reserved` is the driver's part, which CUDA does not report; older drivers have no such field."""
    for fields in ("name,memory.total,compute_cap,memory.reserved", "name,memory.total,compute_cap"):
        if (answer := _ask_nvidia_smi(first, fields)) is not None:
            return _parsed(answer)
    return None


def _ask_nvidia_smi(first: str, fields: str) -> str | None:
    """The line of these fields; None without the program or where it refuses."""
    command = ["nvidia-smi", f"--id={first}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _parsed(answer: str) -> Card | None:
    row = [cell.strip() for cell in next(csv.reader(answer.splitlines()), [])]
    try:
        name, total, (major, minor) = row[0], int(row[1]), row[2].split(".")
        capability = (int(major), int(minor))
    except (IndexError, ValueError):
        return None  # such as "[N/A]": a card that does not tell cannot be planned for
    reserved = int(row[3]) if len(row) > 3 and row[3].isdigit() else 0
    return Card(name, "cuda", (total - reserved) * MIB, capability >= BF16_CAPABILITY, capability=capability)


def _total_memory(root: Path) -> Iterator[int]:
    yield from _meminfo(root, "MemTotal")
    if not (root / "proc/meminfo").exists() and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo(root: Path, name: str) -> Iterator[int]:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                yield int(line.split()[1]) * 1024
    except OSError:
        return


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Limits of the control groups this process is in, version 2 or 1; "max" and version 1's huge number mean none."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            folder, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            folder, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in group.split("/") if part]
        # a container sees its own group as the root, or its full path beside a root that is limited already
        for depth in range(len(parts) + 1):
            yield from _limit(folder.joinpath(*parts[:depth]) / file)


def _limit(path: Path) -> Iterator[int]:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return
    if text.isdigit():
        yield int(text)

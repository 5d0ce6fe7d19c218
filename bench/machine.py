"""What a figure was measured on, without names or paths of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("gemma-grpo", "torch", "transformers", "peft", "trl", "bitsandbytes")


def machine() -> dict[str, Any]:
    """Processor, cores, memory in bytes and, where there is one, the GPU."""
    import torch

    found: dict[str, Any] = {"cpu": _first("/proc/cpuinfo", "model name"), "cores": os.cpu_count(), "system": platform.system()}
    found["memory_bytes"] = int(_first("/proc/meminfo", "MemTotal").split()[0]) * 1024
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
        found["gpu_memory_bytes"] = properties.total_memory
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def versions() -> dict[str, str]:
    """Of this process's Python and the packages it has of PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with a mark when files differ from it; empty outside a checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip()


def _first(path: str, name: str) -> str:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")

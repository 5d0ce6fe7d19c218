"""Where a model may be loaded beside a run that is being trained: on a spare device, on the CPU when asked, else nowhere.

Owns what a run says of its own device, and that nobody takes the training's memory from it unasked.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gemma_grpo.model.precision import default_device
from gemma_grpo.monitor.writer import device_of, writer_of

SPARE_SHARE = 0.5
"""Of a card's memory that must be free: what takes more of it is somebody's work, and may grow."""


def device_record(device: torch.device) -> dict[str, str]:
    """Which device a process is on, so that another one can tell it from its own."""
    if device.type != "cuda":
        return {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {"device": properties.name, "uuid": str(properties.uuid)}


def playing_device(run_dir: Path, *, beside: bool = False) -> torch.device:
    """The device to load a run's model on. While the run is written: a card it does not use, or with `beside` the CPU.

    Raises ValueError, with who writes it and where, when there is neither.
    """
    writer = writer_of(run_dir)
    if writer is None:
        return default_device()
    training = device_of(run_dir)
    spare = spare_card(training)
    if spare is not None:
        torch.cuda.set_device(spare)  # what is captured or allocated without a device named goes there too
        return spare
    if beside:
        return torch.device("cpu")
    name = training.get("device", "a device it has not named yet")
    where = "the CPU" if name == "cpu" else name
    raise ValueError(
        f"{run_dir} is being written by {writer}, on {where}, and {_others(where)}: a second copy of the model would take memory and time "
        "from it. Wait until it ends, or load the copy on the CPU beside it: --beside."
    )


def spare_card(training: dict[str, str]) -> torch.device | None:
    """The freest card that is not the training's; None where all may be in use. A training that does not say its card may be on any."""
    known = training.get("device") == "cpu" or "uuid" in training
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if known else []
    free = {}
    for card in cards:
        if device_record(card).get("uuid") != training.get("uuid"):
            left, total = torch.cuda.mem_get_info(card)
            free[card] = left / total
    best = max(free, key=lambda card: free[card], default=None)
    return best if best is not None and free[best] >= SPARE_SHARE else None


def _others(where: str) -> str:
    if where == "the CPU" and not torch.cuda.device_count():
        return "this machine has no other device"
    return f"no card here is known to be spare (another one, with {SPARE_SHARE:.0%} of its memory free)"

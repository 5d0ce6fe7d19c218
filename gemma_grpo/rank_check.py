"""What several ranks can do here, asked of the ranks themselves: `gemma-grpo doctor --gpus all`.

Memory of each card, whether cards reach each other, that numbers are added right and how fast, and that all see one folder.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import torch

from gemma_grpo import distributed

NUMBERS = 2**24
"""float32 that are added up: 64 MiB, as a large adapter's gradient."""
TURNS = 3
PATIENCE = 60.0
"""Seconds."""


def check_ranks(folder: Path) -> list[tuple[bool, str]]:
    """What there is to say, and whether it is as it should be; the same on all ranks, which a launcher has started."""
    with distributed.joined(PATIENCE):
        return [*_cards(), _sums(), _folder(folder)]


def _cards() -> list[tuple[bool, str]]:
    number = distributed.rank()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        own = torch.cuda.current_device()
        peers = [other for other in range(torch.cuda.device_count()) if other != own and torch.cuda.can_device_access_peer(own, other)]
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        text = f"{torch.cuda.get_device_name()}, {memory}, reaches cards {peers or 'none'} directly"
    else:
        text = f"no GPU: {torch.get_num_threads()} threads of the CPU"
    return [(True, f"rank {place}: {one}") for place, one in enumerate(distributed.gather(text, f"card of rank {number}"))]


def _sums() -> tuple[bool, str]:
    """n ranks add up 1, 2, ... n in every place."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    seconds, right = list[float](), True
    for _ in range(TURNS):
        numbers = torch.full((NUMBERS,), float(distributed.rank() + 1), device=device)
        began = time.perf_counter()
        distributed.sum_([numbers], "adding up")
        right &= bool((numbers == distributed.world() * (distributed.world() + 1) / 2).all())
        seconds.append(time.perf_counter() - began)
    all_right = all(distributed.gather(right, "comparing"))
    speed = 4 * NUMBERS / min(seconds) / 1e9
    said = f"a gradient of {4 * NUMBERS / 2**20:.0f} MiB is added up in {min(seconds):.3f} s ({speed:.2f} GB/s)"
    return all_right, said if all_right else "numbers are added up wrongly: do not train here. Look at the cards and their drivers."


def _folder(folder: Path) -> tuple[bool, str]:
    """Rank 0 writes a word there, and the others read it."""
    word = distributed.from_main(secrets.token_hex(8), "the folder")
    file = folder / f".gemma-grpo-{word}"
    if distributed.is_main():
        file.write_text(word, encoding="utf-8")
    distributed.meet("the folder")
    seen = distributed.gather(file.is_file() and file.read_text(encoding="utf-8") == word, "the folder")
    if distributed.is_main():
        file.unlink()
    if all(seen):
        return True, f"all ranks see {folder}"
    blind = ", ".join(str(number) for number, one in enumerate(seen) if not one)
    return False, f"rank {blind} does not see what rank 0 writes to {folder}: give an output_dir on a disk that all of them share"

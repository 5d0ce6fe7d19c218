"""What a rank beside the first keeps of a run: what it reads back while it trains, in a folder of its own that goes when the run ends.

Only rank 0 writes the run directory, which the other ranks, on other machines, may not even see.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.run_layout import SAMPLES
from gemma_grpo.types import ScoredGroup


class ShadowRun(RunDirectory):
    """A run directory without the logs that nobody reads back."""

    @staticmethod
    def place() -> Path:
        """A new folder for one; `close` takes it away."""
        return Path(tempfile.mkdtemp(prefix="gemma-grpo-rank-")) / "run"

    def append_samples(self, step: int, groups: Iterable[ScoredGroup]) -> None:
        """Nothing: rank 0 writes them."""

    def event(self, kind: str, **fields: Any) -> None:
        """Nothing: rank 0 writes them."""

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Cut what is kept back to what it was at a checkpoint."""
        super().truncate({**offsets, SAMPLES: 0})

    def close(self) -> None:
        """Let it go, and its files."""
        super().close()
        shutil.rmtree(self.path.parent, ignore_errors=True)

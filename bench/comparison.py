"""From samples to the few numbers a table has. Pure: no torch, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Sample = Mapping[str, Any]
"""What a worker says of a step: "seconds", "cpu_seconds", "phases" (name -> seconds), "peak_bytes"; "tokens" are its completions'."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def side_summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Seconds, seconds by phase, completion tokens per second and peak memory of one side."""
    phases = {name: median(sample["phases"].get(name, 0.0) for sample in samples) for name in samples[0]["phases"]}
    return {
        "seconds": spread([sample["seconds"] for sample in samples]),
        "phases": phases,
        "tokens_per_second": median(sample["tokens"] / sample["seconds"] for sample in samples),
        "peak_bytes": spread([sample["peak_bytes"] for sample in samples]),
    }


def compare(ours: Sequence[Sample], peers: Sequence[Sample]) -> dict[str, Any]:
    """Both sides, and how many times longer and larger the peer is: of the medians, and pair by pair.

    Sample i of both sides ran the same prompts and lengths, one right after the other: what changes on the machine in the course of
    a bench is in both, so the paired ratio is the one to trust. `cpu_ratio` is of the processors' time, which other programs' load
    changes little: where it is far from the paired ratio, the machine was busy or one side leaves cores idle.
    """
    own, peer = side_summary(ours), side_summary(peers)
    pairs = list(zip(ours, peers, strict=True))
    return {
        "ours": own,
        "trl": peer,
        "cpu_ratio": spread([theirs["cpu_seconds"] / mine["cpu_seconds"] for mine, theirs in pairs]),
        "ratio_of_medians": peer["seconds"]["median"] / own["seconds"]["median"],
        "paired_ratio": spread([theirs["seconds"] / mine["seconds"] for mine, theirs in pairs]),
        "memory_ratio": spread([theirs["peak_bytes"] / mine["peak_bytes"] for mine, theirs in pairs]),
    }

"""The names of a run directory's files: what events.py writes and the terminal, the report and the page read."""

from __future__ import annotations

RECIPE, RUN = "recipe.yaml", "run.json"
METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.jsonl"
LOOKS = "witnesses.jsonl"
EVALUATION = "evaluation.json"
WRITER = ".writer"
"""Says who holds the lock: "process 12 on host name"."""

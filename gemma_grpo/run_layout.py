"""The names of a run directory's files: what events.py writes and the terminal, the report and the page read."""

from __future__ import annotations

import re

RECIPE, RUN = "recipe.yaml", "run.json"
METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.jsonl"
LOOKS = "witnesses.jsonl"
EVALUATION = "evaluation.json"
VOTES = "votes.jsonl"
LOCK, WRITER = ".lock", ".writer"
HOLDER = re.compile(r"process (\d+) on host (\S+)\n")
"""What the second says of who holds the first."""

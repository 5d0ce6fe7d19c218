"""Going on with a run: from which checkpoint, and whether the settings, the data and the machine are still those it began with.

What changes the result of steps already made is refused; what cannot be held against a run is said. The checkpoint's own folder is
checkpoint.py's, what goes into it the trainer's.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gemma_grpo.checkpoint import Checkpoint, latest_checkpoint, sweep
from gemma_grpo.config import GRPOConfig, dump_recipe, load_recipe
from gemma_grpo.grpo.setup import TrainingData
from gemma_grpo.model.precision import default_device
from gemma_grpo.monitor.durable import write_atomically
from gemma_grpo.monitor.events import RunDirectory
from gemma_grpo.run_layout import LOOKS, METRICS

MAY_CHANGE = (
    *("epochs", "max_steps", "max_minutes", "save_steps", "keep_checkpoints", "gpus", "sharding"),
    *("evaluation.num_", "memory.", "watchdog.", "ranks.", "reward_function.", "data.strict"),
)
"""Settings that leave the steps already made as they are; a dot at the end stands for a whole section."""

BASE = "base.json"
"""Checksums of the base's tensors, in the run directory."""


class ResumeError(ValueError):
    """A run that cannot go on as asked; the message says what differs and how to mend it."""


def opened_run(config: GRPOConfig) -> tuple[RunDirectory, list[str]]:
    """The run in output_dir, and what changed among its settings since it began.

    Raises ValueError without an output_dir, RunDirectoryError where there is no run, ResumeError where a setting may not change.
    """
    if config.output_dir is None:
        raise ValueError("resume_from_checkpoint needs output_dir: the folder of the run to go on with.")
    folder = Path(config.output_dir)
    notes = _changes(folder, config) if (folder / "recipe.yaml").is_file() else []
    run = RunDirectory.open(folder)
    if notes:
        write_atomically(run.recipe, dump_recipe(config))
    return run, notes


def _changes(folder: Path, config: GRPOConfig) -> list[str]:
    began, now = _settings(load_recipe(folder / "recipe.yaml")), _settings(config)
    changed = [name for name in {**began, **now} if began.get(name) != now.get(name)]
    refused = [name for name in changed if not name.startswith(MAY_CHANGE)]
    if refused:
        listed = "".join(f"\n  {name}: the run began with {began.get(name)!r}, now it is {now.get(name)!r}" for name in refused)
        raise ResumeError(
            f"{folder} cannot go on with other settings:{listed}\nGive the old values, or start a new run in another output_dir."
        )
    notes = [f"{name} changed from {began.get(name)!r} to {now.get(name)!r}" for name in changed]
    if config.optimizer.schedule != "constant" and {"epochs", "max_steps"} & set(changed):
        notes.append("from here on the learning rate follows the new length; the steps made followed the old one")
    return notes


def _settings(config: GRPOConfig) -> dict[str, Any]:
    """By dotted name, as JSON values; not the folder, which can be moved."""
    return {name: value for name, value in _leaves(config.model_dump(mode="json")) if name != "output_dir"}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and name != "reward":  # the rewards' names are the user's, not settings
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def fingerprint(data: TrainingData) -> str:
    """SHA-256 of all that is learned from or measured on: prompts and pairs in their order, as tokens, and what rewards see of a row."""
    digest = hashlib.sha256()
    for prompt in (*data.prompts, *data.held_out_prompts, *data.look_alikes):
        digest.update(array("q", prompt.token_ids).tobytes())
        digest.update(json.dumps([prompt.prompt_id, prompt.source, dict(prompt.columns)], default=str, sort_keys=True).encode())
    for pair in (*data.pairs, *data.held_out_pairs):
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(array("q", (len(ids), *ids)).tobytes())
    return digest.hexdigest()


def origin(run: RunDirectory, config: GRPOConfig, checksums: Mapping[str, str]) -> dict[str, str]:
    """What a run's checkpoints are of, each as a SHA-256: the data, the base, and the settings that may not change."""
    settings = {name: value for name, value in _settings(config).items() if not name.startswith(MAY_CHANGE)}
    hashed = {"settings": settings, "base": dict(checksums)}
    digests = {name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in hashed.items()}
    return {"data": str(run.read_run().get("fingerprint")), **digests}


def environment() -> dict[str, Any]:
    """What a run's numbers depend on, to the bit, besides settings and data."""
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": version("torch"), "transformers": version("transformers"), "threads": torch.get_num_threads(), "device": name}


def check_data(run: RunDirectory, data: TrainingData, dataset: str) -> None:
    """Raise ResumeError unless the data are what the run began with."""
    began, now = run.read_run().get("fingerprint"), fingerprint(data)
    if began is None:  # killed before it was written
        run.update_run(fingerprint=now)
    elif began != now:
        raise ResumeError(
            f"the dataset fingerprint {now[:12]} does not match {str(began)[:12]}, with which {run.path} began: {dataset} has other rows "
            "now, or in another order. Restore them, or start a new run in another output_dir."
        )


def check_base(run: RunDirectory, model: str, checksums: Mapping[str, str]) -> None:
    """Raise ResumeError, naming the first tensors, unless the base's weights are those the run began with."""
    path = run.path / BASE
    if not path.is_file():  # killed before it was written
        run.write_json(BASE, {"model": model, "crc32": dict(checksums)})
        return
    try:
        began = dict(json.loads(path.read_text(encoding="utf-8"))["crc32"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path} cannot be read ({error}). Restore it, or delete it if you know that the base is unchanged.") from error
    other = sorted(name for name in {*began, *checksums} if began.get(name) != checksums.get(name))
    if other:
        named = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        raise ResumeError(
            f"the base {model} is not what {run.path} began with: {named} {'differ' if len(other) > 1 else 'differs'}. "
            "A damaged file, or another version: download it again, or start a new run in another output_dir."
        )


def differences(run: RunDirectory) -> list[str]:
    """What keeps the rest of the run from being, to the bit, what it would have been; empty where nothing does."""
    began, now = run.read_run().get("environment"), environment()
    if not isinstance(began, Mapping):
        return ["not known to be bit for bit: the run does not say what it began on"]
    changed = [f"{name} {began.get(name)} -> {value}" for name, value in now.items() if began.get(name) != value]
    return [f"not bit for bit: {', '.join(changed)}"] if changed else []


def newest_checkpoint(run: RunDirectory, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from, None if the run never saved one; damaged newer ones are named. Raises CheckpointError."""
    sweep(run.checkpoints)
    checkpoint, damaged = latest_checkpoint(run.checkpoints)
    for text in damaged:
        warn(f"{text}; using {checkpoint.path.name if checkpoint else 'none'}")
    return checkpoint


FILES = ("recipe.yaml", "run.json", BASE, METRICS, LOOKS, "evaluation.json", "best/best.json")
"""Of a run directory, what is read back beside checkpoints and judges."""


def files_to_go_on(run: RunDirectory) -> list[str]:
    """What another rank needs to go on with a run: paths within the run directory."""
    folders = [run.reward, *(path for path in run.path.iterdir() if path.name.startswith(("reward", "witness")) and path.is_dir())]
    newest, _ = latest_checkpoint(run.checkpoints)
    folders += [newest.path] if newest else []
    found = {path.relative_to(run.path).as_posix() for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file()}
    return [*FILES, *sorted(found)]


def finished_run(config: GRPOConfig) -> tuple[RunDirectory, int, dict[str, Any]] | None:
    """The run in output_dir, its steps and its evaluation when these settings leave nothing to do in it; None when there is something."""
    if config.output_dir is None:
        return None
    folder = Path(config.output_dir)
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if info["status"] != "finished" or _settings(load_recipe(folder / "recipe.yaml")) != _settings(config):
            return None
        if not (folder / "adapter").is_dir():
            return None
        text = (folder / "evaluation.json").read_text(encoding="utf-8") if config.evaluation.num_prompts else "{}"
        evaluation = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError):  # whatever is wrong with it will be said on the way to going on
        return None
    with RunDirectory.open(folder) as run:
        return run, int(info["steps"]), evaluation

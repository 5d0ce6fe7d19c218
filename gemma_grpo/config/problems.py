"""What is wrong with a recipe, in words: where, which setting, its limit, the nearest name. Reads no file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from gemma_grpo.config.schema import GRPOConfig
from gemma_grpo.escapes import printable
from gemma_grpo.redact import redact

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

KeyPath = tuple[str, ...]

ALIASES = {
    "model": "model_name",
    "train_dataset": "dataset",
    "num_train_epochs": "epochs",
    "num_iterations": "planning_steps",
}
"""TRL's name -> ours, where both mean the same."""

_REFUSED = {
    "per_device_train_batch_size": "counts completions in TRL; batch_size here counts prompts, each with num_generations completions.",
    "reward_funcs": "is `reward` here: a name with its weight below it, such as `reward:` / `  length: 1.0`.",
    "reward_weights": "stand beside the names in `reward` here: `reward:` / `  length: 1.0`.",
    "fp16": "is `precision` here: auto, fp32, bf16 or fp16_rescaled. Plain fp16 overflows on Gemma 3.",
    "bf16": "is `precision` here: auto, fp32, bf16 or fp16_rescaled.",
}

_SYNONYMS = {
    "beta": "kl.beta",
    "lr": "learning_rate",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "loss_type": "loss.aggregation",
    "epsilon": "loss.clip_low",
    "epsilon_low": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "delta": "loss.dual_clip",
    "scale_rewards": "advantage.scale",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "optimizer.schedule",
    "warmup_steps": "optimizer.warmup_updates",
    "steps": "max_steps",
    "group_size": "num_generations",
    "num_epochs": "epochs",
    "max_new_tokens": "max_completion_length",
    "gradient_accumulation": "gradient_accumulation_steps",
    "dtype": "precision",
    "run_name": "output_dir",
}
"""Names people bring along -> the setting that difflib would not find."""

_LIMITS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be finite",
}

_NEEDED = {
    "int_type": "a whole number is needed",
    "int_parsing": "a whole number is needed",
    "int_parsing_size": "a whole number is needed, with fewer digits",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "float_parsing": "a number is needed",
    "bool_type": "true or false is needed",
    "bool_parsing": "true or false is needed",
    "string_type": "a text is needed; put it in quotes",
    "tuple_type": "a list is needed, such as [q_proj, v_proj]",
    "dict_type": "names with numbers below it are needed, such as `length: 1.0`",
    "model_type": "settings below it are needed",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend."""

    origin: str
    """The recipe's path, or "command line", or "keyword"."""
    line: int | None
    """Counted from 1; None when the origin has no lines."""
    key: str
    """Dotted name of the setting; empty when it concerns the whole."""
    what: str
    """Value, limit, remedy."""

    def __str__(self) -> str:
        where = self.origin if self.line is None else f"{self.origin}:{self.line}"
        return redact(": ".join(part for part in (where, printable(self.key), self.what) if part))


class ConfigError(ValueError):
    """Everything that is wrong with the settings, at once, in the order of the recipe's lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line is None, problem.line or 0)))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def explain(error: ErrorDetails, path: KeyPath) -> str:
    """One pydantic error as value, limit, remedy."""
    if error["type"] == "extra_forbidden":
        return unknown(path)
    if error["type"] == "value_error":
        return str(error.get("ctx", {}).get("error", error["msg"]))
    value = shown(error["input"])
    if error["type"] == "literal_error":
        return _not_a_choice(error, path, value)
    limit = _LIMITS.get(error["type"], "").format_map(error.get("ctx", {})) or _NEEDED.get(error["type"], error["msg"])
    return f"is {value}; {limit}.{_default(path)}"


def not_a_truth_value(value: bool, path: KeyPath) -> str:
    """The text for true or false where it is no value: pydantic alone would read true as 1."""
    return f"is {shown(value)}, which this setting does not take.{_default(path)}"


def unknown(path: KeyPath) -> str:
    """The text for a name that is no setting, with the nearest one."""
    name = path[-1]
    if len(path) == 1 and name in _REFUSED:
        return f"{_REFUSED[name]}"
    near = nearest(path)
    return f"no such setting.{f' Did you mean {near!r}?' if near else ' `gemma-grpo recipes show miniature` is an example.'}"


def nearest(path: KeyPath) -> str | None:
    """The setting whose name is nearest: a sibling's, else any, else a synonym's."""
    name, parents = path[-1].lower().replace("-", "_"), path[:-1]
    everywhere = {".".join(known): known for known in _names(GRPOConfig)}
    siblings = [known[-1] for known in everywhere.values() if known[:-1] == parents]
    if name in _SYNONYMS:
        return _SYNONYMS[name].removeprefix(".".join((*parents, "")))
    spellings = {spelling: dotted for dotted, known in everywhere.items() for spelling in (known[-1], "_".join(known))}
    spellings |= {alias: alias for alias in ALIASES} | {sibling: sibling for sibling in siblings}
    close = difflib.get_close_matches(name, siblings, n=1) or difflib.get_close_matches(name, spellings, n=1, cutoff=0.75)
    return spellings[close[0]] if close else None


def field_of(path: KeyPath) -> FieldInfo | None:
    """The setting at a path; None for a name that is no setting. Names within `reward` belong to it."""
    model: type[BaseModel] = GRPOConfig
    field: FieldInfo | None = None
    for name in path:
        if name not in model.model_fields:
            return field if field is not None and model is GRPOConfig else None
        field = model.model_fields[name]
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return field


def shown(value: Any) -> str:
    """A value as a message shows it: YAML's words, cut at 60 characters."""
    if isinstance(value, Mapping):
        return "a group of settings"
    try:
        text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # of thousands of digits, or of levels
        return f"a value of type {type(value).__name__} too large to show"
    text = redact(text)  # before it is cut: half a secret has no form to know it by
    return text if len(text) <= 60 else f"{text[:57]}..."


def _names(model: type[BaseModel], parents: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in model.model_fields.items():
        yield (*parents, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, (*parents, name))


def _not_a_choice(error: ErrorDetails, path: KeyPath, value: str) -> str:
    if path[:1] == ("precision",) and str(error["input"]).lower() in ("fp16", "float16", "half", "16"):
        return (
            f"is {value}; Gemma 3's residual stream exceeds what fp16 can hold (65504), and turns to infinity. "
            "Use auto, or fp16_rescaled, which is exact."
        )
    if path[:2] == ("lora", "target_modules") and error["input"] in ("lm_head", "embed_tokens"):
        return f"names {value}; Gemma ties lm_head and embed_tokens, so merging would change both. Use attention and mlp layers only."
    choices = error.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ")
    return f"is {value}; choose one of {choices}.{_default(path)}"


def _default(path: KeyPath) -> str:
    field = field_of(path)
    inside_a_mapping = len(path) > 1 and path not in set(_names(GRPOConfig))
    if field is None or inside_a_mapping or isinstance(field.default, (BaseModel, tuple)):
        return ""
    return f" Default {shown(field.default)}."

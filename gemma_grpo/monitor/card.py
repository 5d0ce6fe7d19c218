"""README.md of an exported model: a model card as the Hub reads it, from the run directory alone.

Nothing in it is recomputed, and nothing is left out because it is bad. Every text of a run (names, datasets, alarms) is escaped: it can
neither close the YAML nor become Markdown or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemma_grpo.config import GRPOConfig, load_recipe
from gemma_grpo.escapes import visible
from gemma_grpo.monitor import findings, watched
from gemma_grpo.monitor.choices import FINAL
from gemma_grpo.monitor.run_files import RunFiles, read_run_files, real, records
from gemma_grpo.redact import redact

CARD = "README.md"
_MINIATURE, _RELEASED = "miniature", "google/gemma-3-"
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>$=:@^])")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SETTINGS = (
    *("learning_rate", "batch_size", "gradient_accumulation_steps", "num_generations", "planning_steps", "epochs", "max_steps"),
    *("max_prompt_length", "max_completion_length", "temperature", "lora.r", "lora.alpha", "lora.target_modules", "kl.beta", "seed"),
)
_LOAD = {
    "adapter": """\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
```
""",
    "merged": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
```
""",
    "gguf": "```\nllama-cli -m model.gguf\n```\n",
    "ollama": "```\nollama create NAME -f Modelfile && ollama run NAME\n```\n",
}


def model_card(run_dir: str | Path, kind: str, record: Mapping[str, Any] | None = None) -> str:
    """The card of one export: `kind` adapter, merged, gguf or ollama, and what the export found when it was read again, if it was.

    Raises ValueError where there is no run.
    """
    files, config = read_run_files(run_dir), load_recipe(Path(run_dir) / "recipe.yaml")
    head = yaml.safe_dump(_metadata(config, kind), sort_keys=False, allow_unicode=False)
    sections = [
        f"# {as_text(_short(config.model_name))} aligned on {as_text(_short(config.dataset))}",
        f"{as_text(named(config.model_name))}, trained with GRPO and LoRA by gemma-grpo on prompts of {as_text(named(config.dataset))}.",
        _section("How to load it", [_LOAD[kind].rstrip()]),
        _section("Before and after", _before_and_after(files)),
        _section("Was the reward over-optimised?", _watched(files)),
        _section("Reward", _reward(files, config)),
        _section("Data", _data(files)),
        _section("Settings", _table(["setting", "value"], _settings(config))),
        *([_section("This export", _export(record))] if record else []),
        _section("Limits", _limits(config)),
        _section("Licence", [_licence(config)]),
    ]
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def write_card(run_dir: Path) -> None:
    """README.md beside the run's final adapter, where there is one. Raises OSError."""
    folder = run_dir / FINAL
    if (folder / "adapter_config.json").is_file():
        (folder / CARD).write_text(model_card(run_dir, "adapter"), encoding="utf-8", newline="\n")


def _metadata(config: GRPOConfig, kind: str) -> dict[str, Any]:
    hub = config.model_name if _on_hub(config.model_name) else None
    relation = "adapter" if kind == "adapter" else "finetune"
    found: dict[str, Any] = {} if hub is None else {"base_model": hub, "base_model_relation": relation}
    found |= {"license": "apache-2.0" if config.model_name == _MINIATURE else "gemma", "pipeline_tag": "text-generation"}
    found |= {"library_name": "peft"} if kind == "adapter" else {"library_name": "transformers"} if kind == "merged" else {}
    if _on_hub(config.dataset):
        found["datasets"] = [config.dataset]
    return {**found, "tags": ["gemma-grpo", "grpo", "lora", "rlhf", "gemma3"]}


def _before_and_after(files: RunFiles) -> list[str]:
    verdict = findings.verdict(files.evaluation)
    if verdict is None:
        return ["This run was not evaluated: nothing is known of what training did."]
    rows = []
    for name, style in findings.STYLES.items():
        if one := findings.measure(files.evaluation.get(name)):
            gain = f"{findings.show(one.gain, style, signed=True)} {findings.show_interval(one, style)}"
            rows.append([style.title, findings.show(one.before, style), findings.show(one.after, style), gain, str(one.n)])
    lines = [as_text(line) for line in (verdict.headline, *verdict.further, *verdict.warnings)]
    return [*_table(["held out", "before", "after", "gain [95 %]", "replies"], rows), "", *lines]


def _watched(files: RunFiles) -> list[str]:
    if not files.looks:
        return ["Nobody looked: the run had no witnesses beside its reward."]
    parting = watched.parting_lines(watched.parting(files.looks))
    found = [alarm for look in files.looks for alarm in records(look.get("alarms"))]
    alarms = [f"- {as_text(alarm.get('level'))}: {as_text(alarm.get('text'))}" for alarm in found]
    told = [f"{len(files.looks)} looks at the same held-out prompts; {len(alarms)} alarms."]
    return [*told, *alarms[-20:], *(as_text(line) for line in parting)]


def _reward(files: RunFiles, config: GRPOConfig) -> list[str]:
    lines = [f"- {as_text(name)} x {weight:g}" for name, weight in (config.reward or {}).items()]
    accuracy = files.calibration.get("accuracy")
    if isinstance(accuracy, Mapping) and (value := real(accuracy.get("value"))) is not None:
        ends = accuracy.get("interval")
        interval = f" [{_share(ends[0])} to {_share(ends[1])}]" if isinstance(ends, list) and len(ends) == 2 else ""
        lines.append(f"- the reward adapter is right on {_share(value)}{interval} of {as_text(accuracy.get('n'))} held-out pairs")
    return lines or ["- the reward adapter alone"]


def _data(files: RunFiles) -> list[str]:
    data = files.run.get("data")
    if not isinstance(data, Mapping):
        return ["The run does not say."]
    rows = [[as_text(name), as_text(value)] for name, value in data.items() if not isinstance(value, (Mapping, list))]
    dropped = data.get("dropped")
    rows += [[f"dropped: {as_text(name)}", as_text(value)] for name, value in dropped.items()] if isinstance(dropped, Mapping) else []
    return _table(["what", "how many"], rows) if rows else ["The run does not say."]


def _settings(config: GRPOConfig) -> list[list[str]]:
    rows = []
    for name in _SETTINGS:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value:g}" if isinstance(value, float) else str(value)
        rows.append([as_text(name), as_text(shown)])
    return rows


def _export(record: Mapping[str, Any]) -> list[str]:
    apart, moved = record.get("export_from_policy", {}), record.get("policy_from_base", {})
    lines = [
        f"Read again after it was written, on {apart.get('tokens')} tokens of replies: {_small(apart.get('mean'))} nat per token away from "
        f"the trained policy (largest {_small(apart.get('largest'))}, the same likeliest token in {_share(apart.get('agreement'))}); "
        f"training moved the policy {_small(moved.get('mean'))} nat per token away from its base."
    ]
    merged = record.get("merged")
    if isinstance(merged, Mapping):
        lines.append(f"As stored, {_share(merged.get('kept'))} of the adapter's change is in the merged weights.")
    return [*lines, *(f"- {as_text(note)}" for note in record.get("notes", []))]


def _limits(config: GRPOConfig) -> list[str]:
    lines = [
        "- It was trained to please a reward, which has mistakes, and a policy finds them; the numbers above come from held-out prompts "
        "of the same data and say little about other uses.",
        "- It says false things with confidence, as its base does. Do not let it decide about people, health, law or money.",
    ]
    if config.model_name == _MINIATURE:
        lines.append("- The miniature speaks a small made-up world and is of no use outside it.")
    if "hh-rlhf" in config.dataset:
        lines.append("- hh-rlhf holds offensive and upsetting text, written to find harm; each label is one crowd worker's judgement.")
    return lines


def _licence(config: GRPOConfig) -> str:
    if config.model_name == _MINIATURE:
        return "Apache-2.0, as the miniature."
    what = (
        "This model is a derivative of Gemma 3"
        if config.model_name.startswith(_RELEASED)
        else "If its base is a Gemma 3, this model is a derivative of it"
    )
    terms = "the Gemma Terms of Use, https://ai.google.dev/gemma/terms"
    return f"{what}: its use is bound by {terms}, and whoever passes it on must pass them on."


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines])


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]


def _small(value: Any) -> str:
    number = real(value)
    return "–" if number is None else f"{number:.2g}"


def named(name: str) -> str:
    """A Hub id whole; of what lies on this machine not where."""
    return name if _on_hub(name) else _short(name)


def _on_hub(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _short(name: str) -> str:
    """Without whose it is, or where it lies."""
    return name.rstrip("/").rpartition("/")[2] or name


def _share(value: Any) -> str:
    number = real(value)
    return "–" if number is None else f"{100 * number:.1f} %"


def as_text(value: Any) -> str:
    """Of a run, for one line of Markdown: no secret, no control character, no markup."""
    plain = visible(redact("" if value is None else str(value))).replace("\n", " ")
    return _SPECIAL.sub(r"\\\1", plain.replace("&", "&amp;").replace("<", "&lt;")).strip()

"""What this machine can do for a run: packages, card, number format, disk, and the asked model's files, one line each.

Owns the questions and their wording. Each answer comes from its owner: access.py, cards.py, shapes.py. Loads no torch; only `deep` does.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gemma_grpo.access import access_problem, cache_dir, cached_folder, in_home, local_folder, logged_in, offline, offline_variable
from gemma_grpo.cards import Card, bytes_in_use, present_gpu, this_machine
from gemma_grpo.config import GRPOConfig, load_recipe, shipped_recipes
from gemma_grpo.data.chat import BOS_ID, END_OF_TURN_ID, EOS_ID, START_OF_TURN_ID, STOP_IDS
from gemma_grpo.escapes import printable, visible
from gemma_grpo.planner.decide import numbers_of
from gemma_grpo.reward.sandbox.running import sandbox_status
from gemma_grpo.shapes import MINIATURE, ModelShape, known_shapes, shape_of

GIB = 2**30
SMALL_GPU = 8 * GIB
WORTH_TELLING = 0.1
"""Memory in use by others is told from this share of the whole on."""
HUB_TIMEOUT = 3.0
"""Seconds the Hub gets for an answer: the line is worth a wait, not a long one."""
CUDA_INSTALL = "pip install --upgrade --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
CONTROL_TOKENS = {"<eos>": EOS_ID, "<bos>": BOS_ID, "<start_of_turn>": START_OF_TURN_ID, "<end_of_turn>": END_OF_TURN_ID}

Status = Literal["ok", "note", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line: how it stands, in a sentence, and what mends it."""

    name: str
    status: Status
    text: str
    fix: tuple[str, ...] = ()
    """Commands or steps, one a line."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The numbers behind the sentence, for --json."""


class Diagnosis:
    """The checks in order. `str` is the screen; `ok` is False when any failed."""

    def __init__(self, checks: list[Check], recipe: str = "RECIPE") -> None:
        self.checks = tuple(checks)
        self.recipe = recipe
        """What was asked about, where that was a recipe."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{sum(check.status == status for check in self.checks)} {status}" for status in ("ok", "note", "fail"))
        return f"Diagnosis({counts})"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    @property
    def ok(self) -> bool:
        """Whether nothing failed; notes do not count."""
        return all(check.status != "fail" for check in self.checks)

    def lines(self, width: int = 100) -> list[str]:
        """The screen in ASCII; remedies stand on lines of their own, never wrapped, so that they can be copied."""
        shown: list[str] = []
        for check in self.checks:
            text = textwrap.wrap(check.text, width - 8, break_long_words=False, break_on_hyphens=False)
            shown += [f"  {check.status:<4}  {text[0]}", *(f"        {line}" for line in text[1:])]
            if check.fix:
                shown += [f"        fix: {check.fix[0]}", *(f"             {line}" for line in check.fix[1:])]
        return [line.encode("ascii", "backslashreplace").decode() for line in (*shown, *self._next())]

    def as_json(self) -> str:
        """Every check with its facts, for a bug report: no token is in it, and the home folder reads ~."""
        about = {"gemma_grpo": _version("gemma-grpo"), "platform": platform.platform(), "ok": self.ok}
        return in_home_everywhere(json.dumps(about | {"checks": [asdict(check) for check in self.checks]}, indent=2))

    def _next(self) -> Iterator[str]:
        failed = sum(check.status == "fail" for check in self.checks)
        if failed:
            yield f"  {failed} failed. Mend {'it' if failed == 1 else 'them'} and ask again."
        elif any(check.name == "model" for check in self.checks):
            yield f"  Next: gemma-grpo plan {shlex.quote(self.recipe)}    (whether it fits this machine)"
        else:
            yield "  Next: gemma-grpo demo, or gemma-grpo doctor google/gemma-3-1b-it"


def doctor(asked: str | None = None, *, deep: bool = False) -> Diagnosis:
    """Print what this machine can do for a run and what stands in the way; for scripts, the same as checks.

    `asked` is a model (Hub id, folder, "miniature") or a recipe. `deep` also loads the model, if its files are here, else the miniature,
    and compares the log-probabilities of sampling with those of a training pass on this device.
    Raises ConfigError for a recipe with mistakes.
    """
    found = diagnose(asked, deep=deep)
    print(visible("\n".join(found.lines(shutil.get_terminal_size((80, 24)).columns))))
    return found


def diagnose(asked: str | None = None, *, deep: bool = False) -> Diagnosis:
    """The checks of `doctor`, unprinted."""
    config = settings_of(asked)
    gpu, build = present_gpu(), torch_build()
    card = gpu if gpu is not None and build not in ("", "cpu") else this_machine()
    checks = [python_check(), *package_checks(), torch_check(build, gpu), card_check(gpu, card, bytes_in_use(gpu or card))]
    checks.append(precision_check(config, card, gpu))
    checks.append(bitsandbytes_check(config.quantization, _version("bitsandbytes")))
    checks += [Check("sandbox", *sandbox_status())] if "unit_tests" in (config.reward or ()) else []
    checks += login_checks() if asked is None else model_checks(config.model_name)
    if deep:
        checks.append(_agreement_check(config, asked))
    return Diagnosis(checks, asked) if asked is not None and _is_recipe(asked) else Diagnosis(checks)


def settings_of(asked: str | None) -> GRPOConfig:
    """The settings of a recipe, or the defaults around a model's name."""
    if asked is None:
        return GRPOConfig()
    return load_recipe(asked) if _is_recipe(asked) else GRPOConfig(model_name=asked)


def _is_recipe(asked: str) -> bool:
    return asked.endswith((".yaml", ".yml")) or asked in shipped_recipes()


# ---- packages


def python_check() -> Check:
    """Python against the package's own requirement."""
    found, needed = platform.python_version(), (_metadata().get("Requires-Python") or ">=3.10")
    if _in_range(found, needed):
        return Check("python", "ok", f"Python {found}", facts={"version": found})
    return Check("python", "fail", f"Python {found}, but {needed} is needed", ("Install a newer Python, then the package again.",))


def package_checks() -> Iterator[Check]:
    """Every package that gemma-grpo requires, against the range it requires; the right ones in one line."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in _metadata().get_all("Requires-Dist") or []]
    needed = {one.name: str(one.specifier) for one in requirements if one.marker is None}
    versions = {name: _version(name) for name in needed}
    wrong = {name for name, found in versions.items() if not found or not _in_range(found, needed[name])}
    if len(wrong) < len(needed):
        shown = ", ".join(f"{name} {versions[name]}" for name in ("transformers", "peft", "huggingface-hub") if name in set(needed) - wrong)
        facts = {name: versions[name] for name in needed if name not in wrong}
        yield Check("packages", "ok", f"{len(facts)} packages in their ranges" + (f" ({shown})" if shown else ""), facts=facts)
    for name in sorted(wrong):
        what = f"{name} {versions[name]} is installed" if versions[name] else f"{name} is not installed"
        facts = {"version": versions[name], "needed": needed[name]}
        yield Check("packages", "fail", f"{what}, but {needed[name]} is needed", (f"pip install '{name}{needed[name]}'",), facts)
    if not needed:
        yield Check("packages", "note", "gemma-grpo is not installed as a package, so ranges are not known", ("pip install -e .",))


def torch_build() -> str:
    """ "cpu", "CUDA 12.8" or "ROCm 6.2" of the installed torch, "" without one: read from its version file, not imported."""
    spec = find_spec("torch")
    if spec is None or not spec.origin:
        return ""
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    for name, shown in (("cuda", "CUDA"), ("hip", "ROCm")):
        if found := re.search(rf"^{name}\b[^=]*= *'([^']+)'", text, re.MULTILINE):
            return f"{shown} {found[1]}"
    return "cpu"


def torch_check(build: str, gpu: Card | None) -> Check:
    """Whether torch is there, and was built for what is there."""
    found, facts = _version("torch"), {"version": _version("torch"), "build": build}
    if not build:
        return Check("torch", "fail", "torch is not installed", ("pip install torch",), facts)
    if gpu is not None and build == "cpu":
        text = f"torch {found} is the CPU build, so the {gpu.name} here stays unused"
        return Check("torch", "note", text, (CUDA_INSTALL,), facts)
    return Check("torch", "ok", f"torch {found} ({'CPU' if build == 'cpu' else build} build)", facts=facts)


# ---- the device


def card_check(gpu: Card | None, card: Card, in_use: int) -> Check:
    """The GPU, or that there is none and what follows; and how many bytes of the memory that plans count on are not free now."""
    device = gpu or card
    taken = f"; {in_use / GIB:.1f} GiB of it are in use now" if in_use > WORTH_TELLING * device.usable_bytes else ""
    facts = asdict(device) | {"in_use": in_use}
    if gpu is None:
        text = f"No GPU ({card.usable_bytes / GIB:.1f} GiB of memory{taken}). Real Gemma 3 training needs one with 8 GB or more"
        return Check("device", "note", f"{text}; `gemma-grpo demo` works here.", facts=facts)
    small = "; small: plan with quantization=nf4" if gpu.usable_bytes < SMALL_GPU else ""
    compute = ".".join(map(str, gpu.capability or ("unknown",)))
    text = f"{gpu.name}, compute {compute}, {gpu.usable_bytes / GIB:.1f} GiB usable{taken}{small}"
    return Check("device", "note" if small or taken else "ok", text, facts=facts)


_WHY = {
    "fp32": "training runs on the CPU",
    "bf16": "the card has bf16 units",
    "fp16_rescaled": "torch says bf16 works because it emulates it; the card has no bf16 units, and plain fp16 overflows on Gemma 3",
}


def precision_check(config: GRPOConfig, card: Card, gpu: Card | None) -> Check:
    """The number format of the base and why."""
    asked = config.precision
    try:
        taken = numbers_of(config, card).kind
    except ValueError as error:
        return Check("precision", "fail", str(error).partition(". ")[0], ("precision=auto",), {"asked": asked})
    text = f"precision={asked} takes {taken}: {_WHY[taken] if asked == 'auto' else 'the recipe says so'}"
    surprising = taken == "fp16_rescaled" or (gpu is not None and card.kind == "cpu")
    return Check("precision", "note" if surprising else "ok", text, facts={"asked": asked, "taken": taken})


def bitsandbytes_check(quantization: str, found: str) -> Check:
    """Whether 4-bit bases can be loaded, which only quantization=nf4 asks for; `found` is the version, "" without one."""
    if found:
        return Check("bitsandbytes", "ok", f"bitsandbytes {found} (for quantization=nf4)", facts={"version": found})
    if quantization == "nf4":
        what = "quantization=nf4 needs bitsandbytes, which is not installed"
        return Check("bitsandbytes", "fail", what, ("pip install 'gemma-grpo[nf4]'",))
    return Check("bitsandbytes", "note", "bitsandbytes is not installed (only needed for quantization=nf4)")


# ---- the model


def login_checks() -> Iterator[Check]:
    """Without a model asked for: whether there is a token at all, and room for a download."""
    if logged_in():
        yield Check("hub", "ok", "A Hugging Face token is set; `gemma-grpo doctor MODEL` asks whether it opens a model")
    else:
        yield Check("hub", "note", "Not logged in to Hugging Face (only needed for Gemma weights)", ("hf auth login",))
    yield disk_check(0)


def model_checks(name: str) -> Iterator[Check]:
    """Where the model's files are, or whether they can be had, and what they say."""
    try:
        local = local_folder(name)
    except ValueError as error:
        yield Check("model", "fail", printable(str(error)))
        return
    folder = local or cached_folder(name)
    if folder is not None:
        yield from _folder_checks(name, folder, cached=local is None)
    if local is None:
        size = 0 if folder else _download_bytes(name)
        if folder is None:
            download = f": the first run downloads about {size / 1e9:.1f} GB" if size else ""
            yield Check("model", "note", f"{name} is not in the cache{download}", facts={"bytes": size})
        yield _hub_check(name, cached=folder is not None)
        yield disk_check(size)


def _folder_checks(name: str, folder: Path, *, cached: bool) -> Iterator[Check]:
    try:
        shape = shape_of(str(folder))
    except ValueError as error:
        yield Check("model", "fail", printable(in_home_everywhere(str(error))))
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        fix = ("Save it as safetensors; pickled weights (.bin, .pt) are never read.",)
        yield Check("model", "fail", f"{in_home(folder)} holds no .safetensors file", fix)
        return
    size = sum(file.stat().st_size for file in files)
    if name == MINIATURE:
        text = f"miniature ships with the package: {_scaled(shape.parameters, 'M', 'B')} parameters, for trying things out"
    else:
        where = "in the cache" if cached else "a folder of this machine"
        counts = f"{_scaled(shape.parameters, 'M', 'B')} parameters in {len(files)} .safetensors, {_scaled(size, 'MB', 'GB')}"
        text = f"{name} is {where}: {counts}"
    yield Check("model", "ok", text, facts={"folder": str(folder), "bytes": size, "parameters": shape.parameters})
    yield _tokenizer_check(folder)


def _hub_check(name: str, *, cached: bool) -> Check:
    if cached and offline():
        return Check("hub", "note", f"The Hub is not asked ({offline_variable()} is set); the cached files are used")
    problem = access_problem(name, timeout=HUB_TIMEOUT)
    if problem is None:
        return Check("hub", "ok", f"The Hub lets you download {name}")
    if cached:
        return Check("hub", "note", f"The cached files are used; a new download would fail: {problem.what}", problem.steps)
    return Check("hub", "fail", problem.what, problem.steps)


def disk_check(needed: int) -> Check:
    """Free space where the cache is, or will be made."""
    folder = cache_dir()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    text, facts = f"Disk: {free / 1e9:.0f} GB free in {in_home(folder)}", {"folder": str(folder), "free": free, "needed": needed}
    if free < needed:
        text += f", the download needs {needed / 1e9:.1f} GB"
        return Check("disk", "fail", text, ("Make room, or set HF_HOME to a folder on a larger disk.",), facts)
    return Check("disk", "ok", text, facts=facts)


def _download_bytes(name: str) -> int:
    """Bytes of a released checkpoint: all of it is stored in 16 bits, the vision tower included; 0 for others."""
    shape: ModelShape | None = known_shapes().get(name)
    return 0 if shape is None else 2 * (shape.parameters + shape.vision_parameters)


def _tokenizer_check(folder: Path) -> Check:
    """The control tokens that prompts are built from, by tokenizer.json's own list; its 262,144 words are not parsed."""
    wanted = ", ".join(f"{token} {number}" for token, number in CONTROL_TOKENS.items())
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        added, _ = json.JSONDecoder().raw_decode(text, re.search(r'"added_tokens":\s*', text).end())  # type: ignore[union-attr]
        ids = {entry["content"]: entry["id"] for entry in added}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        fix = ("Download the checkpoint again.",)
        return Check("tokenizer", "fail", f"{in_home(folder / 'tokenizer.json')} cannot be read", fix)
    wrong = {token: ids.get(token) for token, number in CONTROL_TOKENS.items() if ids.get(token) != number}
    if wrong:
        found = ", ".join(f"{token} {number}" for token, number in wrong.items())
        return Check("tokenizer", "fail", f"The tokenizer has {found}; Gemma 3 has {wanted}", ("Use Gemma 3's own tokenizer.",), ids)
    stops = " or ".join(f"{token} ({number})" for token, number in CONTROL_TOKENS.items() if number in STOP_IDS)
    text = f"Tokenizer: one <bos> ({BOS_ID}) starts a prompt, {stops} ends a reply"
    return Check("tokenizer", "ok", text, facts={token: ids[token] for token in CONTROL_TOKENS})


def _agreement_check(config: GRPOConfig, asked: str | None) -> Check:
    try:
        here = local_folder(config.model_name) or cached_folder(config.model_name)
    except ValueError:
        here = None
    from gemma_grpo.agreement import measure

    chosen = config if here else config.model_copy(update={"model_name": MINIATURE})
    try:
        found = measure(chosen.model_name, precision=chosen.precision, quantization=chosen.quantization)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        first = printable(in_home_everywhere(str(error).partition("\n")[0]))
        return Check("agreement", "fail", f"{chosen.model_name} cannot sample and score here: {first}")
    text = (
        f"{found.model} on {found.device} in {found.dtype}: log-probs recorded while sampling and those of a training pass differ by "
        f"{found.difference:.1e} nat at most over {found.tokens} tokens ({'within' if found.agrees else 'beyond'} the {found.limit:g} that "
        f"{found.dtype} rounding explains)"
    )
    if not here and asked is not None:  # what was asked is not answered
        text = f"{printable(config.model_name)} was not tried, because its files are not here. Instead, {text}"
    fix = () if found.agrees else ("Do not train here: report it with the output of `gemma-grpo doctor --deep --json`.",)
    status: Status = "fail" if not found.agrees else "ok" if here or asked is None else "note"
    return Check("agreement", status, text, fix, asdict(found))


# ---- small things


def in_home_everywhere(text: str) -> str:
    """Text in which every path of the home folder starts with ~."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=[/\\\\\"']|$)", "~", text) if home != "/" else text


def _scaled(number: int, millions: str, billions: str) -> str:
    return f"{number / 1e9:.2f} {billions}" if number >= 1e8 else f"{number / 1e6:.1f} {millions}"


def _metadata() -> Any:
    try:
        return metadata.metadata("gemma-grpo")
    except metadata.PackageNotFoundError:
        from email.message import Message

        return Message()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _in_range(version: str, specifiers: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifiers).contains(version, prereleases=True)

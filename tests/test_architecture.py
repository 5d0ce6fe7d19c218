"""Who may import whom, which library lives where, what is never called, and how long a file or a function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gemma_grpo"

ASIDE = -1
ROWS: dict[str, float] = {
    "escapes": -0.5,  # below all: the config's own errors are printed
    "redact": -0.5,
    "config": 0,
    "types": 0,
    "cards": 0,
    "room": 0,
    "disk": 0,
    "containment": 0,
    "run_layout": 0,
    "shares": 0,
    "stopping": 0,
    "watchdog": 0,
    "shapes": 1,  # on the adapter's settings
    "access": 1.5,  # on the names that shapes knows
    "upload": 2,
    "grpo.advantages": 1,
    "grpo.loss": 1,
    "grpo.control": 1,
    "rollout.sampling": 1,
    "distributed": 1,
    "launched": -0.5,
    "launcher": 6,
    "rank_check": 6,
    "data": 2,
    "model": 2.5,  # on data's batches and control tokens, never the other way round
    "checkpoint": 3,
    "monitor.events": 3,
    "monitor.durable": 3,
    "monitor.shadow": 3,
    "planner": 3,
    "reward": 4,
    "rollout": 4,
    "evaluation": 5,
    "data_check": 5,  # on the refusal pattern of the rewards
    "agreement": 5,
    "profile": 5,
    "diagnosis": 6,
    "export": 6.5,  # on the playground's way to open a run
    "monitor.alarms": 5,
    "miniature": 5,
    "grpo": 6,
    "cli": 7,
    "__main__": 7.5,
    "monitor": ASIDE,  # terminal, charts, report: they read a run directory, never a trainer
}
"""Longest prefix counts. A file imports from rows above its own, and inside its row only from its own folder."""
WITHOUT_TORCH = (ASIDE, -0.5, 0, 7)

HOMES = {
    "pydantic": ("config", "monitor.web"),
    "yaml": ("config", "monitor.card"),
    "typer": ("cli",),
    "torch.distributed": ("distributed", "launcher"),
    "transformers": ("data", "model"),
    "peft": ("model",),
    "datasets": ("data",),
    "huggingface_hub": ("access", "upload"),
    "httpx": ("rollout.replicas",),
    "httpx2": ("rollout.replicas",),
    "bitsandbytes": ("model.quantization",),
    "safetensors": ("checkpoint", "model.loading", "model.adapters", "model.merging"),
    "gguf": ("export.gguf",),
    "filelock": ("monitor.events", "monitor.writer"),
    "rich": ("monitor.terminal",),
    "matplotlib": ("monitor.charts",),
    "jinja2": ("monitor.report",),
    "starlette": ("monitor.web",),
    "sse_starlette": ("monitor.web.app",),
    "uvicorn": ("monitor.web.serve",),
    "IPython": (),  # a notebook's kernel has it loaded; nothing here does
}
"""Library -> the only parts that import it when they run; an import for annotations alone is free."""

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "os.system", "torch.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
}
FORBIDDEN_KEYWORDS = {"trust_remote_code": (), "allow_pickle": (False,), "shell": (False,)}
"""Keyword -> the values it may have."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    for_annotations: bool


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders if folder.is_dir() for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    """gemma_grpo/grpo/loss.py -> grpo.loss; a folder's __init__ is the folder; the package's own is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def part_of(module: str, table: dict[str, float]) -> str:
    names = module.split(".")
    return next((part for end in range(len(names), 0, -1) if (part := ".".join(names[:end])) in table), "")


def imports(tree: ast.AST) -> Iterator[Import]:
    annotations = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in annotations)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, id(node) in annotations)


def forbidden_import(importer: str, imported: str) -> bool:
    """Whether the rows forbid one part of the package to import another."""
    if importer == "":
        return False  # the package's public names load on use
    above, below = part_of(importer, ROWS), part_of(imported, ROWS)
    row, other = ROWS[above], ROWS[below]
    if row == ASIDE:
        return other > 0
    if other == ASIDE:
        return row < 6
    if row == other:
        return importer.split(".")[0] != imported.split(".")[0]
    return other > row


def at_home(importer: str, library: str) -> bool:
    owners = next((homes for name, homes in HOMES.items() if library == name or library.startswith(f"{name}.")), None)
    return owners is None or any(importer == home or importer.startswith(f"{home}.") for home in owners)


PATHS = sources(PACKAGE)
CODE = sources(PACKAGE, ROOT / "scripts", ROOT / "bench", ROOT / "reliability")
EVERYTHING = [*CODE, *sources(ROOT / "tests")]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PATHS, ids=shown)
def test_a_file_imports_only_from_rows_above_its_own(path: Path) -> None:
    importer = name_of(path)
    assert importer == "" or part_of(importer, ROWS), f"{importer} stands in no row: add it to ROWS"
    wrong = [
        f"line {found.line}: {importer} may not import {found.module}"
        for found in imports(tree_of(path))
        if found.module.startswith("gemma_grpo.")
        and (imported := found.module.removeprefix("gemma_grpo.")) != "__version__"
        and forbidden_import(importer, imported)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PATHS, ids=shown)
def test_a_library_is_imported_only_where_it_lives(path: Path) -> None:
    importer = name_of(path)
    part = part_of(importer, ROWS)
    wrong = [
        f"line {found.line}: {found.module} does not belong in {importer}"
        for found in imports(tree_of(path))
        if not found.for_annotations
        and (not at_home(importer, found.module) or (found.module.split(".")[0] == "torch" and (not part or ROWS[part] in WITHOUT_TORCH)))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", CODE, ids=shown)
def test_nothing_that_runs_code_from_data_is_called(path: Path) -> None:
    tree = tree_of(path)
    wrong = [f"line {found.line}: import {found.module}" for found in imports(tree) if found.module.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in FORBIDDEN_CALLS:
                wrong.append(f"line {node.lineno}: {ast.unparse(node.func)}")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_KEYWORDS and value not in FORBIDDEN_KEYWORDS[keyword.arg]:
                    wrong.append(f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", EVERYTHING, ids=shown)
def test_files_and_functions_stay_readable(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines; at most {MAX_FILE_LINES}. Make it a folder of the same name."
    long = [
        f"line {node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines; at most {MAX_FUNCTION_LINES}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", PATHS, ids=shown)
def test_every_module_says_what_it_owns(path: Path) -> None:
    tree = tree_of(path)
    assert not tree.body or ast.get_docstring(tree), "a module docstring says what the file owns, and what not"


def test_the_rules_themselves_tell_right_from_wrong() -> None:
    assert forbidden_import("grpo.loss", "config.GRPOConfig") is False
    assert forbidden_import("config.recipe", "data.hh_rlhf") is True
    assert forbidden_import("reward.rules", "rollout.engine.RolloutEngine") is True  # one row, two folders
    assert forbidden_import("reward.generative", "reward.base.Reward") is False
    assert forbidden_import("rollout.local", "rollout.sampling") is False
    assert forbidden_import("grpo.loss", "grpo.trainer") is True
    assert forbidden_import("monitor.report", "monitor.events.RunDirectory") is True  # aside: files only
    assert forbidden_import("cli.training", "monitor.report") is False
    assert forbidden_import("monitor.terminal", "escapes.visible") is False
    assert forbidden_import("escapes", "config.GRPOConfig") is True
    assert forbidden_import("model.gemma", "data.chat") is False
    assert forbidden_import("data.chat", "model.gemma") is True
    assert at_home("config.document", "yaml")
    assert not at_home("cli.app", "yaml.loader")
    assert at_home("reward.rules", "re")


def test_no_folder_of_tests_is_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "two test files of one name"

"""A documented Python block: what can be known of it without running it, and how it is run."""

from __future__ import annotations

import ast
import inspect
import io
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

import gemma_grpo
from gemma_grpo import GRPOTrainer
from gemma_grpo.config import build_config, load_recipe

OWN_KEYWORDS = ("dataset", "reward", "reward_functions", "view", "overrides")
"""Of GRPOTrainer and from_recipe, that are no settings or take more than a setting does."""


def check(text: str) -> None:
    """Raise for what cannot be right: syntax, names gemma_grpo does not have, keywords that are no setting, methods not there."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gemma_grpo":
            module = __import__(str(node.module), fromlist=["*"])
            for alias in node.names:
                getattr(module, alias.name)
        if isinstance(node, ast.Call):
            _check_call(node)


def _check_call(call: ast.Call) -> None:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if name in ("GRPOTrainer", "GRPOTrainer.from_recipe"):
        settings = {key: ast.literal_eval(value) for key, value in keywords.items() if key not in OWN_KEYWORDS and _is_literal(value)}
        if name == "GRPOTrainer":
            build_config(settings)
        elif call.args and _is_literal(call.args[0]):
            load_recipe(ast.literal_eval(call.args[0]), settings)
    elif name.startswith("trainer."):
        method = getattr(GRPOTrainer, name.removeprefix("trainer."))
        inspect.signature(method).bind_partial(None, *call.args, **keywords)
    elif name in gemma_grpo.__all__:
        inspect.signature(getattr(gemma_grpo, name)).bind_partial(*call.args, **keywords)


def _is_literal(node: ast.AST) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


class _OnTop(ast.NodeTransformer):
    """Settings replace or follow the keywords of every trainer that is made."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if ast.unparse(node.func) not in ("GRPOTrainer", "GRPOTrainer.from_recipe"):
            return node
        kept = [keyword for keyword in node.keywords if keyword.arg not in self.settings]
        given = ast.Dict([ast.Constant(key) for key in self.settings], [ast.Constant(value) for value in self.settings.values()])
        return ast.Call(node.func, node.args, [*kept, ast.keyword(None, given)])


def run(text: str, folder: Path, settings: Mapping[str, str], names: dict[str, Any]) -> str:
    """What it printed; `names` are what the page's blocks before it defined, and get its own."""
    given = {key: yaml.safe_load(value) for key, value in settings.items()}
    tree = ast.fix_missing_locations(_OnTop(given).visit(ast.parse(text)))
    out, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(out):
            exec(compile(tree, "a block of the docs", "exec"), names)
    finally:
        os.chdir(before)
    return out.getvalue()

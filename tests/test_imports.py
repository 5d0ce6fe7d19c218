"""Starting is quick: the package and its help load no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gemma_grpo

HEAVY = ("torch", "transformers", "peft", "datasets", "pandas", "numpy", "matplotlib", "scipy")


def loaded_after(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("loaded:").split())


def test_the_package_and_its_settings_load_no_torch() -> None:
    assert loaded_after("import gemma_grpo; gemma_grpo.GRPOConfig()") == set()


@pytest.mark.parametrize("line", ["--help", "train --help", "recipes list", "train miniature batch_size=0", "chat --help", "chat nowhere"])
def test_help_recipes_and_wrong_settings_load_no_torch(line: str) -> None:
    assert loaded_after(f"from gemma_grpo.cli import run; run({line.split()!r})") == set()


def test_the_console_script_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "gemma_grpo.cli", "--version"], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == gemma_grpo.__version__


def test_public_names_are_the_real_ones() -> None:
    from gemma_grpo.config import GRPOConfig
    from gemma_grpo.data.hh_rlhf import load_hh_rlhf

    assert gemma_grpo.GRPOConfig is GRPOConfig
    assert gemma_grpo.load_hh_rlhf is load_hh_rlhf
    with pytest.raises(AttributeError, match="no attribute 'GRPOConfg'"):
        _ = gemma_grpo.GRPOConfg

"""The wheel, built from a clean clone, installed into an empty environment and used away from any checkout: what a user gets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 20_000_000


def run(*words: str | Path, cwd: Path, timeout: float = 900, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "VIRTUAL_ENV"))}
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=timeout, check=False
    )


def done(*words: str | Path, cwd: Path, timeout: float = 900, **environment: str) -> str:
    found = run(*words, cwd=cwd, timeout=timeout, **environment)
    assert found.returncode == 0, f"{words}: {found.stdout[-2000:]}{found.stderr[-2000:]}"
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    if not (ROOT / ".git").exists() or run("git", "rev-parse", cwd=ROOT).returncode:
        pytest.skip("no git checkout to clone")
    done("git", "clone", "--quiet", ROOT, folder / "clone", cwd=folder)
    done(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, folder / "clone", cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs of an environment that holds the wheel and what it needs."""
    folder = tmp_path_factory.mktemp("empty")
    done(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    programs = folder / "env" / "bin"
    for what in ("torch", str(wheel)):  # torch first, as the Makefile does
        done(programs / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", what, cwd=folder)
    return programs


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """A folder without a checkout, as the present one."""
    return tmp_path


def test_the_wheel_holds_what_it_needs_and_no_more(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for needed in ("py.typed", "miniature/model/model.safetensors", "recipes/gemma3-4b-t4.yaml", "monitor/report.html.j2"):
        assert f"gemma_grpo/{needed}" in names
    assert any(name.startswith("gemma_grpo/monitor/web/") and name.endswith(".js") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "bench/", "docs/", "reliability/"))]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pyc"))]


def test_the_source_distribution_makes_the_same_wheel_and_has_the_tests(wheel: Path, tmp_path: Path) -> None:
    done(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    done(tmp_path / "env" / "bin" / "pip", "install", "--quiet", "build", cwd=tmp_path)
    # a source distribution first, then a wheel of what is in that
    done(tmp_path / "env" / "bin" / "python", "-m", "build", "--outdir", tmp_path / "dist", wheel.parent / "clone", cwd=tmp_path)
    (again,), (source,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        contents = [{info.filename: info.CRC for info in archive.infolist()} for archive in (one, other)]
    assert contents[0] == contents[1]
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "README.md", "tests/conftest.py", "docs/tutorial.md"} <= names
    assert source.stat().st_size < MOST_BYTES


def test_recipes_and_version_are_there(environment: Path, away: Path) -> None:
    assert "gemma3-4b-t4" in done(environment / "gemma-grpo", "recipes", "list", cwd=away)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done(environment / "gemma-grpo", "--version", cwd=away))


def test_the_doctor_answers(environment: Path, away: Path) -> None:
    found = run(environment / "gemma-grpo", "doctor", "miniature", cwd=away)
    assert found.returncode in (0, 3)
    assert "Python" in found.stdout
    assert "Traceback" not in found.stderr


def test_importing_has_no_effects(environment: Path, away: Path) -> None:
    """Neither output, nor a file, nor a connection, nor torch."""
    code = (
        "import sys; events = []; sys.addaudithook(lambda name, _: events.append(name)); import gemma_grpo;"
        "assert 'torch' not in sys.modules; print([name for name in events if name.startswith(('socket', 'subprocess'))])"
    )
    assert done(environment / "python", "-c", code, cwd=away, PYTHONDONTWRITEBYTECODE="1") == "[]\n"
    assert not list(away.iterdir())


def test_the_demo_runs_away_from_the_checkout(environment: Path, away: Path) -> None:
    said = done(environment / "gemma-grpo", "demo", cwd=away, timeout=1500)
    assert "gold score" in said
    assert (away / "runs" / "miniature-miniature-1" / "report.html").is_file()


def test_the_python_of_the_readme_runs_on_the_miniature(environment: Path, away: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "GRPOTrainer(" in block)
    changed = code.replace('"google/gemma-3-4b-it"', '"miniature"').replace('"Anthropic/hh-rlhf"', '"miniature"')
    assert changed != code
    code = changed.replace("epochs=2", "epochs=2, max_steps=2")
    done(environment / "python", "-c", code, cwd=away, timeout=1500)
    assert (away / "runs" / "miniature-miniature-1" / "adapter" / "README.md").is_file()


@pytest.fixture
def watching(environment: Path, away: Path) -> Iterator[str]:
    (away / "runs").mkdir()
    words = [str(environment / "gemma-grpo"), "watch", "runs", "--port", "0"]
    with subprocess.Popen(words, cwd=away, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            deadline, seen = time.monotonic() + 60, ""
            while time.monotonic() < deadline and not (found := re.search(r"http://\S+", seen)):
                seen += server.stdout.readline()
            assert found, seen
            yield found[0]
        finally:
            server.terminate()


def test_the_page_is_served(watching: str) -> None:
    deadline = time.monotonic() + 60
    while True:  # the address is told a moment before the server listens
        try:
            with urllib.request.urlopen(watching, timeout=30) as answer:
                assert answer.status == 200
                assert b"<html" in answer.read()
                return
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.2)

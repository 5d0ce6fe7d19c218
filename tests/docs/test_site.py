"""The documentation builds without a warning, every page can be reached, and nothing on it comes from another host."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from markdown_blocks import ROOT

pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason="the docs extra is not installed: pip install 'gemma-grpo[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it, elsewhere."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(folder)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_page_is_built(site: Path) -> None:
    written = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert written <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//", re.IGNORECASE)
    foreign = {path.name: found[0] for path in site.glob("*.html") if (found := loaded.findall(path.read_text(encoding="utf-8")))}
    assert not foreign
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_what_lies_outside_the_docs_is_taken_along(site: Path) -> None:
    assert (site / "bench" / "results" / "step.svg").is_file()
    assert 'src="bench/results/step.svg"' in (site / "performance.html").read_text(encoding="utf-8")


def test_a_dead_link_and_a_dead_anchor_stop_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    kept = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:\n  - Home")[0]
    config = tmp_path / "mkdocs.yml"
    config.write_text(kept.replace("hooks:\n  - scripts/site_hooks.py\n", ""), encoding="utf-8")
    (docs / "index.md").write_text("# One\n\n[here](#one)\n", encoding="utf-8")
    assert build(tmp_path / "site", config).returncode == 0
    for broken in ("[there](nowhere.md)", "[there](#nowhere)"):
        (docs / "index.md").write_text(f"# One\n\n{broken}\n", encoding="utf-8")
        done = build(tmp_path / "site", config)
        assert done.returncode != 0, broken
        assert "nowhere" in done.stdout + done.stderr

"""Pictures of every view of the page, for docs/images: `python scripts/screenshots.py RUNS RUN OTHER`; needs Chromium and playwright.

RUNS is a folder of runs, RUN the one that is shown, OTHER one to compare it with. Desktop and phone, light and dark.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZES = ((1440, 900), (390, 844))
COLOURS = 128
"""Colours of a kept picture: text and lines need no more, and it takes a third of the room."""


def views(run: str, other: str) -> dict[str, str]:
    """Name of a picture -> what stands behind the # of the address."""
    tabs = ("curves", "groups", "replies", "playground", "evaluation", "settings", "report")
    return {"runs": "", **{tab: f"run/{quote(run)}/{tab}" for tab in tabs}, "compare": f"compare/{quote(run)}/{quote(other)}"}


def take(page: Page, name: str, target: Path) -> None:
    """Wait until a view is whole, and keep it."""
    page.locator("h1").wait_for()
    if name in ("curves", "compare"):
        page.locator("figure svg").nth(2).wait_for()
    if name == "playground":
        page.get_by_label("held-out prompt").select_option("1")
        page.get_by_role("button", name="answer").click()
        page.get_by_text("Shaded: tokens").wait_for(timeout=120_000)
    page.wait_for_timeout(1500 if name in ("curves", "compare", "report") else 700)
    page.screenshot(path=target, full_page=name in ("playground", "groups"))


def shrink(path: Path) -> None:
    """Keep a picture with few colours, cut at twice its view's height."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    picture = picture.crop((0, 0, picture.width, min(picture.height, 1800)))
    picture.quantize(COLOURS).save(path, optimize=True)


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("run")
    parser.add_argument("other")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    words = [sys.executable, "-m", "gemma_grpo.cli", "watch", str(options.runs), "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    link = server.stdout.readline().removeprefix("page: ").strip()
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for width, height in SIZES:
                for scheme in ("light", "dark"):
                    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
                    page = context.new_page()
                    page.goto(link)
                    for name, place in views(options.run, options.other).items():
                        page.goto(f"{link.partition('?')[0]}#/{place}")
                        target = IMAGES / f"watch-{name}-{width}-{scheme}.png"
                        take(page, name, target)
                        shrink(target)
                    context.close()
            browser.close()
    finally:
        server.terminate()


if __name__ == "__main__":
    main()

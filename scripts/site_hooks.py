"""What the documentation's build does beyond MkDocs: takes along files that pages show, and links pages that are named in text.

Called by MkDocs (mkdocs.yml, hooks). On GitHub the pages are right as they stand; on the site nothing outside docs/ is there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)\)")
_CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"(?<![\w/(\[])docs/([\w-]+)\.md")


def on_files(files: Any, config: Any) -> Any:
    """Adds the files outside docs/ that a page links to, by their path from the root."""
    from mkdocs.structure.files import File

    pages = [Path(page.abs_src_path).read_text(encoding="utf-8") for page in files.documentation_pages()]
    for name in sorted({name for text in pages for name in _OUTSIDE.findall(text)}):
        if (ROOT / name).is_file() and not name.endswith(".md"):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files that were taken along, and links where a page is named in the text; code stays as it is."""
    parts = _CODE.split(markdown)
    for index in range(0, len(parts), 2):
        parts[index] = _NAMED.sub(r"[\1](\1.md)", _OUTSIDE.sub(r"](\1)", parts[index]))
    return "".join(parts)

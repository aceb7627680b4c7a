"""MkDocs hook: pages that are made when the site is built: references, and the front page from README.md."""

import re
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
# Files beside docs/ that are pages of the site, too.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COPIED = {"LICENSE": "LICENSE"}


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the made pages to those of docs/."""
    from mkdocs.structure.files import File

    reference = runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))

    made = {name: site_links((ROOT / source).read_text("utf-8")) for source, name in PAGES.items()}
    made |= {name: (ROOT / source).read_text("utf-8") for source, name in COPIED.items()}
    made |= {f"{kind}-reference.md": reference[f"{kind}_reference"]() for kind in ("recipe", "command")}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def site_links(text: str) -> str:
    """Return the text of a file of the repository's root with the links that it needs as a page of the site."""

    def target(match: re.Match[str]) -> str:
        path, anchor = match["path"], match["anchor"] or ""
        return f"]({PAGES.get(path, path.removeprefix('docs/'))}{anchor})"

    return re.sub(r"\]\((?P<path>[^)#:]+)(?P<anchor>#[^)]*)?\)", target, text)

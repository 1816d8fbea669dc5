"""Hooks of the site (mkdocs.yml): what lies outside docs/, a page of all keys, and one for each room of the code."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from megatron_dllm.config import reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_dllm"
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def outside_files() -> dict[str, str]:
    """Pages and pictures outside docs/, as path in the project to path in the site."""
    results = sorted(p for p in (ROOT / "benchmarks" / "results").iterdir() if p.suffix in (".md", ".png"))
    return OUTSIDE | {str(path.relative_to(ROOT)): str(path.relative_to(ROOT)) for path in results}


def site_link(target: str, page: str) -> str:
    """Where a link of the project leads in the site, where docs/ is the top and README its first page.

    Args:
        target: path as written in `page`, which may begin with ../ or docs/.
        page: path in the site of the page that holds the link.
    """
    path = target.removeprefix("../").removeprefix("docs/")
    return OUTSIDE.get(path, path) if "/" not in page else target


def rooms() -> dict[str, list[str]]:
    """The modules of each room of the package, by its dotted name; the package's own modules stand under its name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__" and (path.parent / "__init__.py").exists():
            found.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference behind the pages that mkdocs.yml lists."""
    config.nav = [*(config.nav or []), {"Reference": [{name: f"reference/{name}.md"} for name in rooms()]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/, and the pages of the reference."""
    for source, target in outside_files().items():
        files.append(File.generated(config, target, content=(ROOT / source).read_bytes()))
    files.append(File.generated(config, "keys.md", content=reference.page()))
    for room, modules in rooms().items():
        content = "\n".join([f"# {room}\n", *(f"::: {module}\n" for module in modules)])
        files.append(File.generated(config, f"reference/{room}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their target lies in the site; a link to a folder of code becomes plain text."""
    path = page.file.src_uri

    def replace(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if not target.endswith((".md", ".png", ".svg")):
            return match["text"].strip("[]")
        return f"{match['text']}({site_link(target, path)}{anchor})"

    return re.sub(r"(?P<text>\[[^\]]*\])\((?!https?:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", replace, markdown)

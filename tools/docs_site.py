"""Hooks of mkdocs.yml: the pages of the site that no file of docs/ holds.

Invariant: a link of a page leads to the same text on the site as in the repository. What lies
outside of docs/ and is linked from a page is a page of the site too, and the references of keys
and commands are written from the code, when the site is built.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
GENERATED = ("configuration.md", "commands.md")
"""Pages written from the code."""
OUTSIDE = "repository"
"""Folder of the site with the pages of files outside of docs/."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""Path and anchor of a relative link."""
FENCE = re.compile(r"^( *)(```+)[^\n]*\n.*?^\1\2 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(rf"{FENCE.pattern}|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Name headings as GitHub does, so that an anchor holds in both places."""
    config["mdx_configs"]["toc"]["slugify"] = slug
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File, InclusionLevel

    for name, content in zip(GENERATED, (configuration_page(), commands_page()), strict=True):
        files.append(File.generated(config, name, content=content))
    for path in outside_pages():
        page = File.generated(config, site_path(path), content=shown(path))
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to the pages of the site; a bar in code needs no backslash in its tables."""
    text = with_site_links(markdown, page.file.src_uri)
    return re.sub(r"`[^`\n]+`", lambda found: found[0].replace("\\|", "|"), text)


def site_path(path: str) -> str:
    """A file of the repository -> its page on the site."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"{OUTSIDE}/{path}" if path.endswith(".md") else f"{OUTSIDE}/{path}.md"


def repository_path(page: str) -> str:
    """A page of the site -> the file of the repository that it shows."""
    outside = page.removeprefix(f"{OUTSIDE}/")
    if outside == page:
        return f"{DOCS}/{page}"
    return outside if (ROOT / outside).exists() else outside.removesuffix(".md")


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def anchors(markdown: str) -> set[str]:
    """Those of a page; the second heading of the same text ends in -1, and so on."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCE.sub("", markdown), re.MULTILINE):
        anchor = base = slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        count = 0
        while anchor in found:
            count += 1
            anchor = f"{base}-{count}"
        found.add(anchor)
    return found


def own_anchors(markdown: str) -> Iterator[str]:
    """The headings of the same page that it links."""
    for found in re.finditer(r"\]\(#([^)\s]+)\)", CODE.sub("", markdown)):
        yield found[1]


def links(markdown: str) -> Iterator[tuple[str, str]]:
    """Path and anchor of each relative link; those in code are none."""
    for found in LINK.finditer(CODE.sub("", markdown)):
        yield found[1], (found[2] or "").removeprefix("#")


def target_of(source: str, link: str) -> str:
    """The file of the repository that a link of another one names."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def with_site_links(markdown: str, page: str) -> str:
    """The text of a page with links that hold on the site, named by titles, not by files."""
    source = repository_path(page)

    def titled(found: re.Match[str]) -> str:
        target = ROOT / target_of(source, found[2])
        return f"[{title_of(target)}]({found[2]}" if target.is_file() else found[0]

    def moved(found: re.Match[str]) -> str:
        target = target_of(source, found[1])
        if target.startswith(f"{DOCS}/") and source.startswith(f"{DOCS}/"):
            return found[0]  # pictures are no pages, and lie where they lay
        link = posixpath.relpath(site_path(target), posixpath.dirname(page) or ".")
        return link + (found[2] or "")

    return LINK.sub(moved, re.sub(r"\[([\w/.-]+\.md)\]\(([\w/.-]+\.md)", titled, markdown))


def title_of(document: Path) -> str:
    """Its first heading."""
    return next(
        line.removeprefix("# ")
        for line in document.read_text(encoding="utf-8").splitlines()
        if line.startswith("# ")
    )


def outside_pages() -> list[str]:
    """Files outside of docs/ that its pages link, directly or through one another."""
    waiting = [f"{DOCS}/{path.name}" for path in sorted((ROOT / DOCS).glob("*.md"))]
    waiting += nav_outside()
    seen: set[str] = set()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            waiting += [target_of(source, link) for link, _ in links(text)]
    return sorted(path for path in seen if not path.startswith(f"{DOCS}/"))


def nav_outside() -> list[str]:
    """Files outside of docs/ that the navigation names."""
    names = (name for name in nav_pages() if name.startswith(f"{OUTSIDE}/"))
    return [repository_path(name) for name in names]


def nav_pages() -> list[str]:
    """Pages of the navigation in mkdocs.yml, in their order."""
    pages: list[str] = []
    waiting = [yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            pages.append(item)
        else:
            waiting += reversed(list(item.values()) if isinstance(item, dict) else item)
    return pages


def shown(path: str) -> str:
    """A file of the repository as a page: Markdown as it is, other text as code."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = {".py": "python", ".yaml": "yaml"}.get(Path(path).suffix, "text")
    return f"# {os.path.basename(path)}\n\n`{path}`\n\n````{language}\n{text}\n````\n"


def configuration_page() -> str:
    """The reference of the configuration: a table for each section, from its docstrings."""
    from rlhf3d.config.keys import all_keys

    lines = [
        *("---", "search: {boost: 4}", "---", ""),  # who looks for a key wants it first
        "# Configuration keys",
        "",
        "A configuration is a YAML file of these sections; `rlhf3d config FILE` shows one as a run",
        "would see it. On the command line a key is `section.key=value`.",
    ]
    sections: dict[str, list[str]] = {}
    for key in all_keys():
        section, _, name = key.name.rpartition(".")
        kind = f"{key.kind}, {key.rules}" if key.rules else key.kind
        cells = [f"`{name}`", f"`{as_yaml(key.default)}`", cell(kind), cell(key.doc)]
        sections.setdefault(section, []).append(f"| {' | '.join(cells)} |")
    for section, rows in sections.items():
        lines += ["", f"## {section}", ""]
        lines += ["| key | default | type | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def as_yaml(value: Any) -> str:
    """A default as a configuration has it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return cell(text.removesuffix("...\n").strip())


def cell(text: str) -> str:
    """Text in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def commands_page() -> str:
    """The reference of the command line, by Typer, from the commands themselves."""
    import typer
    from typer.cli import get_docs_for_click

    from rlhf3d.cli import app

    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="rlhf3d")
    return get_docs_for_click(obj=command, ctx=context, name="rlhf3d", title="Command line")

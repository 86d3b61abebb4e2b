"""The documentation's site: what its pages are made of, without mkdocs (`make docs` builds it)."""

from __future__ import annotations

import pytest
import typer
from support.documents import ROOT, site

from rlhf3d import cli
from rlhf3d.config.keys import all_keys


def test_the_navigation_has_every_page_once() -> None:
    pages = [name for name in site.nav_pages() if not name.startswith(site.OUTSIDE)]
    there = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages) == sorted([*there, *site.GENERATED])


def test_the_navigation_names_files_that_are_there() -> None:
    outside = [name for name in site.nav_pages() if name.startswith(site.OUTSIDE)]
    assert outside and all((ROOT / site.repository_path(name)).is_file() for name in outside)


@pytest.mark.parametrize(
    ("page", "link", "moved"),
    [
        ("data.md", "rewards.md#form", "rewards.md#form"),
        ("data.md", "quickstart.png", "quickstart.png"),
        ("data.md", "../CONTRIBUTING.md#checks", "repository/CONTRIBUTING.md#checks"),
        ("data.md", "../tools/data/own_set.py", "repository/tools/data/own_set.py.md"),
        ("repository/README.md", "docs/data.md#check", "../data.md#check"),
        ("repository/README.md", "LICENSE", "LICENSE.md"),
        ("repository/examples/first_project/README.md", "../../docs/data.md", "../../../data.md"),
        ("data.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("data.md", "#here", "#here"),
    ],
)
def test_a_link_leads_to_the_page_of_the_site(page: str, link: str, moved: str) -> None:
    assert site.with_site_links(f"see [this]({link}).", page) == f"see [this]({moved})."


def test_a_link_that_is_named_as_its_file_gets_the_title() -> None:
    assert (
        site.with_site_links("([data.md](data.md#check))", "index.md") == "([Data](data.md#check))"
    )


def test_files_that_pages_link_are_pages() -> None:
    pages = site.outside_pages()
    assert "README.md" in pages and "examples/first_project/README.md" in pages
    assert not any(page.startswith("docs/") for page in pages)
    assert "````python\n" in site.shown("tools/data/own_set.py")


def test_the_reference_has_every_key_once() -> None:
    text = site.configuration_page()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings)
    for key in all_keys():
        section, _, name = key.name.rpartition(".")
        part = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        rows = [row for row in part.splitlines() if row.startswith(f"| `{name}` |")]
        assert len(rows) == 1 and site.cell(key.doc) in rows[0], key.name


def test_the_reference_has_every_command_with_its_options() -> None:
    text = site.commands_page()
    group = typer.main.get_command(cli.app)
    for name in group.commands:  # type: ignore[attr-defined]
        assert f"\n## `rlhf3d {name}`\n" in text
    assert "\n### `rlhf3d data check`\n" in text and "`--max-prompt-length" in text

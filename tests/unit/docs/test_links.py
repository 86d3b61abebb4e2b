"""Links of README, docs/ and examples/: what they name is there, the heading too."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.documents import DOCUMENTS, ROOT, name_of, site


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(document: Path) -> None:
    broken = []
    text = document.read_text(encoding="utf-8")
    own = name_of(document)
    for link, anchor in [*site.links(text), *(("", anchor) for anchor in site.own_anchors(text))]:
        target = ROOT / (site.target_of(own, link) if link else own)
        known = anchor == "" or (
            target.is_file() and anchor in site.anchors(target.read_text(encoding="utf-8"))
        )
        if not (target.exists() and known):
            broken.append(f"{link}#{anchor}")
    assert broken == []


def test_headings_are_named_as_on_github() -> None:
    text = (
        "# A `rollout.x_y` title: b, c\n## Twice\n```\n# no heading\n```\n## Twice\n## [In](b.md)\n"
    )
    assert site.anchors(text) == {"a-rolloutx_y-title-b-c", "twice", "twice-1", "in"}


def test_links_in_code_are_none() -> None:
    text = "`[a](b.md)` [c](d.md#e) [f](https://g) ![h](i.png)\n```\n[j](k.md)\n```\n[l](#m)\n"
    assert list(site.links(text)) == [("d.md", "e"), ("i.png", "")]
    assert list(site.own_anchors(text)) == ["m"]

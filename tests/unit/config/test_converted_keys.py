"""The pages for those who come from another framework have the tables of the converters."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf3d.config.convert.nemo_rl.table import NEMO_RL
from rlhf3d.config.convert.rules import Rule, Table
from rlhf3d.config.convert.trl.table import TRL
from rlhf3d.config.convert.verl.table import VERL

ROOT = Path(__file__).resolve().parents[3]


def table_rows(table: Table) -> list[str]:
    """The table of a page."""
    rows = [_row(rule) for rule in table.rules]
    return list(dict.fromkeys(rows))


def _row(rule: Rule) -> str:
    names = " ".join(f"`{name}`" for name in rule.names) or "(computed)"
    ours = f"`{rule.to}`" if rule.to else "none"
    return f"| {names} | {ours} | {rule.note} |"


@pytest.mark.parametrize("table", [VERL, TRL, NEMO_RL], ids=lambda table: table.framework)
def test_the_table_is_in_the_documentation(table: Table) -> None:
    text, rows = (ROOT / table.page).read_text(), table_rows(table)
    assert "\n".join(rows) in text, "\n".join(["rows changed; they are:", *rows])

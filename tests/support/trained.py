"""What a run trained on in the steps that it kept, however often it was killed and continued."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf3d.observability.tokens import read_tokens, tokens_path
from rlhf3d.placement.journal import JOURNAL_FILE


def kept_names(run: Path) -> dict[int, list[str]]:
    """Of each step, the names of its trajectories: what a resume went back behind is left out."""
    kept: dict[int, list[str]] = {}
    # Not by `read_journal`, which leaves out what came after a restart of the engines.
    for line in (run / JOURNAL_FILE).read_text().splitlines():
        row = json.loads(line)
        if "begin" in row:
            kept = {step: names for step, names in kept.items() if step <= row["begin"]}
        elif "trained" in row:
            assert row["trained"] not in kept
            kept[row["trained"]] = row["trajectories"]
    return kept


def ages(run: Path, step: int) -> set[int]:
    """How many updates before those that a step trained its sampled tokens were written."""
    found = set()
    for one in read_tokens(tokens_path(run, step)):
        for span in one.spans:
            if span.author == "sampled":
                found |= {step - 1 - version for _, version in span.versions}
    return found

"""What an engine's process does besides the engine: texts of completions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.placement.engine_rank import EngineRank
from rlhf3d.rollout.api import Completion, written_by
from rlhf3d.rollout.engine_loop import Progress


def rank_with(completions: dict[int, Completion], folder: Path | None) -> Any:
    """One whose loop has these completions."""
    rank: Any = EngineRank.__new__(EngineRank)
    rank._loop = SimpleNamespace(poll=lambda *_: Progress(completions, 7, True, ((1, 0),)))
    rank._texts_by, rank._tokenizer = None if folder is None else str(folder), None
    return rank


@pytest.mark.parametrize("template", ["{{ messages }}", None])
def test_completions_come_with_their_texts(tmp_path: Path, template: str | None) -> None:
    """Without special tokens; a chat template is not needed for that."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    written = {5: "ab", 3: "", 4: "d e ."}
    completions = {}
    for number, text in written.items():
        ids = (*tokenizer.encode(text), tokenizer.eos_token_id)
        completions[number] = Completion(ids, (0.0,) * len(ids), "stop", written_by(2))
    told = rank_with(completions, tmp_path).poll(1, 0.0)
    texts = {number: one.text for number, one in told.completions.items()}
    expected = {}
    for number, one in completions.items():
        expected[number] = tokenizer.decode(list(one.token_ids), skip_special_tokens=True)
    assert texts == expected and texts[5] == "ab"
    assert [one.token_ids for one in told.completions.values()] == [
        one.token_ids for one in completions.values()
    ]
    assert (told.steps, told.idle, told.applied) == (7, True, ((1, 0),))


def test_without_a_tokenizer_the_driver_makes_them(tmp_path: Path) -> None:
    completions = {1: Completion((5,), (0.0,), "stop", written_by(2))}
    assert rank_with(completions, None).poll(1, 0.0).completions == completions
    assert not rank_with({}, tmp_path / "none").poll(1, 0.0).completions


@pytest.mark.parametrize("left", [(), ("config.json",)])
def test_a_node_without_the_tokenizer_is_found_at_the_start(
    left: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    for name in left:
        folder.mkdir()
        (folder / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"tokenizer: .*{folder}"):
        rank_with({}, folder).start_at(("", 0), 1.0)

"""Pairs as they are published, as chat messages, and as prompts for a reward model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf3d.data.parquet import read_parquet
from rlhf3d.data.prepare import prepare
from rlhf3d.user_code import load_file

TOOL = Path(__file__).parents[3] / "tools" / "data" / "preference_prompts.py"
preferences = load_file(TOOL.parent / "preferences.py", "tool")
Pair, pair_of = preferences.Pair, preferences.pair_of
prompt_messages, read_pairs = preferences.prompt_messages, preferences.read_pairs


def test_dialogues_become_turns() -> None:
    assert prompt_messages(
        "\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d: Human: e\n\nAssistant:", "w"
    ) == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d: Human: e"},
    ]
    assert prompt_messages("plain ", "w") == [{"role": "user", "content": "plain"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert prompt_messages(messages, "w") == messages
    for broken in ("\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:", "x\n\nHuman: a\n\nAssistant:"):
        with pytest.raises(ValueError, match="file: row 3: a dialogue must begin"):
            prompt_messages(broken, "file: row 3")


def test_answers_as_text_or_conversations() -> None:
    asked = [{"role": "user", "content": "q"}]
    pair = Pair(asked, "good", "bad")
    assert pair_of({"prompt": "q", "chosen": " good", "rejected": "bad"}, "w") == pair
    chats = {
        name: [*asked, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "good"), ("rejected", "bad"))
    }
    assert pair_of(chats, "w") == pair_of({"prompt": asked, **chats}, "w") == pair
    named = [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": "Ann"}]
    assert pair_of({**chats, "prompt": named}, "w").prompt == [
        {"role": "user", "content": "q", "name": "Ann"}
    ]
    other = {**chats, "rejected": [{"role": "user", "content": "p"}, chats["rejected"][1]]}
    with pytest.raises(
        ValueError, match=r"w: chosen and rejected differ before their last message"
    ):
        pair_of(other, "w")
    longer = {
        name: [*asked, {"role": "assistant", "content": "c"}, *talk] for name, talk in chats.items()
    }
    with pytest.raises(ValueError, match=r"w: the answers hold turns that the prompt lacks"):
        pair_of({**longer, "prompt": "q"}, "w")
    with pytest.raises(ValueError, match=r"w: prompt must be text or messages, not dict"):
        pair_of({"prompt": {"a": 1}, "chosen": "a", "rejected": "b"}, "w")
    with pytest.raises(
        ValueError, match=r"file: row 3 needs prompt, chosen and rejected .* has chosen, prompt"
    ):
        pair_of({"prompt": "q", "chosen": "good"}, "file: row 3")


def test_prompts_for_training_and_for_tests_are_disjoint(tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"\n\nHuman: q{i}\n\nAssistant:", "chosen": "a", "rejected": "b"}
        for i in range(12)
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for split in ("train", "test"):
        (file,) = prepare(str(TOOL), source, tmp_path / "out", split=split)
        found[split] = {row.prompt[0]["content"] for row in read_parquet(file.path)}
        assert all(row.ground_truth is None for row in read_parquet(file.path))
    assert (
        found["test"]
        == {f"q{i}" for i in (0, 5, 10)}
        == {f"q{i}" for i in range(12) if preferences.is_held_out(i)}
    )
    assert found["train"] == {f"q{i}" for i in range(12)} - found["test"]
    assert len(read_pairs(source)) == 12

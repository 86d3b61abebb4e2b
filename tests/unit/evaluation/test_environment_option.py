"""`--environment` of `evaluate` and `data check`: sections of a configuration, complete or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from rlhf3d.commands.data import check
from rlhf3d.commands.evaluate import Conversations
from rlhf3d.rehearsal.miniature import CHAT_TEMPLATE, TOOLS, byte_tokenizer

TRUTH = {"style": "rule", "ground_truth": "4"}


def settings(folder: Path, text: str) -> dict[str, object]:
    (folder / "talk.yaml").write_text(text)
    return Conversations(folder / "talk.yaml").settings()


def test_only_its_own_sections_are_used(tmp_path: Path) -> None:
    assert Conversations().settings() == {}
    found = settings(tmp_path, "environment: {path: game.py, max_turns: 3}\n")
    assert found["environment"].max_turns == 3  # type: ignore[attr-defined]
    assert found["weights"] == {"accuracy": 1.0}
    weights = "reward: {weights: {environment: 0.5, format: 0.2, accuracy: 2.0}}\n"
    found = settings(tmp_path, f"environment: {{path: game.py}}\n{weights}")
    assert found["weights"] == {"accuracy": 2.0, "environment": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("environment: {path: game.py, max_turn: 3}", "max_turn.*max_turns"),
        ("environment: {path: game.py, max_turns: 0}", "environment.max_turns = 0"),
        ("reward: {workers: 2}", "it sets no environment.path"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, text)


def test_data_check_takes_the_tools_of_the_environments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, on a data set made for TRL."""
    (tmp_path / "game.py").write_text(
        "class Game:\n"
        "    def reset(self, word, **columns):\n"
        "        return None\n"
        "    def guess(self, letter: str) -> str:\n"
        "        '''Guess a letter.\n\n"
        "        Args:\n"
        "            letter: The letter.\n"
        "        '''\n"
        "        return letter\n"
    )
    talk = f"environment: {{path: {tmp_path}/game.py, name: Game}}\n"
    (tmp_path / "talk.yaml").write_text(talk)
    byte_tokenizer(128, TOOLS + CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    data = tmp_path / "data.parquet"

    def checked() -> dict[str, Any]:
        with pytest.raises(typer.Exit):
            check(
                cast(typer.Context, None),
                [data],
                tokenizer=str(tmp_path / "model"),
                environment=tmp_path / "talk.yaml",
                as_json=True,
            )
        return json.loads(capsys.readouterr().out)["files"][0]  # type: ignore[no-any-return]

    pq.write_table(pa.table({"prompt": ["Play."], "word": ["crane"]}), data)
    file = checked()
    assert file["unreadable"] == [] and file["longest"] > 200 and file["problems"] == []
    told = [{"prompt": "Play.", "word": "x", "data_source": "z", "reward_model": TRUTH}]
    pq.write_table(pa.Table.from_pylist(told), data)
    assert "no scorer for data_source 'z'" in checked()["problems"][0]
    # Where the environment alone rewards, there is nothing to score.
    (tmp_path / "talk.yaml").write_text(f"{talk}reward: {{weights: {{environment: 1.0}}}}\n")
    assert checked()["problems"] == []
    pq.write_table(pa.table({"prompt": ["Play."]}), data)
    assert "reset of the environment 'Game' takes word" in checked()["unreadable"][0]

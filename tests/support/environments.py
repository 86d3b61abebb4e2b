"""Users' files of environments, and their calls without a process."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.environments.api import Reply, Reset, Step
from rlhf3d.environments.load import Environments

PROMPT = [{"role": "user", "content": "Open the door."}]


def load(folder: Path, code: str, **settings: Any) -> Environments:
    """The environments of a file with this code."""
    file = folder / "games.py"
    file.write_text(dedent(code))
    return Environments(EnvironmentConfig(path=str(file), **settings))


def reset(environments: Environments, seed: int = 0, **columns: Any) -> Reply:
    """Begin a row with the given columns."""
    return environments(Reset({"prompt": PROMPT, **columns}, seed))


def step(environments: Environments, text: str) -> Reply:
    """The model says `text`."""
    return environments(Step(text))


def contents(messages: Any) -> list[str]:
    """The texts of messages."""
    return [message["content"] for message in messages]

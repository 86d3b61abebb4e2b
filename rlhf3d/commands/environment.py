"""The option `--environment` of commands that play, or look at, a configuration's environments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf3d.config.schema import Config


def environment_of(path: Path) -> Config:
    """The configuration, of which only the section environment is sure to be complete.

    ValueError where that has problems, or names no file.
    """
    from rlhf3d.config.load import ConfigError, read_config

    config, problems = read_config(path)
    # Others may be missing where they are not used.
    if own := [text for text in problems if text.startswith("environment")]:
        raise ConfigError(own, f"--environment {path} has problems")
    if not config.environment.enabled:
        raise ValueError(f"--environment {path}: it sets no environment.path")
    return config

"""From the section `environment` to what a run's trajectories meet.

Invariant: whatever cannot work in the user's file is a ValueError here, before anything is started.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.fields import Overlong
from rlhf3d.environments.load import Environments
from rlhf3d.experience.environment_runner import EnvironmentRunner
from rlhf3d.experience.episode import Rules
from rlhf3d.pool.sessions import SessionPool
from rlhf3d.tokenizer.template_check import check_template
from rlhf3d.tokenizer.turns import Turns


def make_environments(config: EnvironmentConfig) -> Environments | None:
    """Load the user's file; None where trajectories are single completions."""
    return Environments(config) if config.enabled else None


def offered_tools(
    environments: Environments | None,
) -> Callable[[Mapping[str, Any]], list[dict[str, Any]]] | None:
    """A function from a row's columns to the JSON schemas of its environment's tools."""
    if environments is None:
        return None

    def offered(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        return environments.schemas(environments.name_of(columns))

    return offered


def check_conversations(
    environments: Environments | None, tokenizer: Any, end_ids: Sequence[int]
) -> list[str]:
    """Look at the chat template for each environment that the data names, see `check_template`.

    Of a data set that is not scanned, those of the probed rows.
    """
    if environments is None:
        return []
    notes: dict[str, None] = {}
    looked_at = []
    for name in environments.asked:
        tools, roles = environments.schemas(name), environments.roles(name)
        # A template that writes some tools writes others too.
        if (bool(tools), roles) not in looked_at:
            looked_at.append((bool(tools), roles))
            notes |= dict.fromkeys(check_template(tokenizer, tools, roles, end_ids))
    return list(notes)


def start_environments(
    stack: ExitStack,
    config: EnvironmentConfig,
    max_prompt_length: int,
    overlong_prompts: Overlong,
    tokenizer: Any,
    end_ids: tuple[int, ...],
    note: Callable[[str], None],
) -> EnvironmentRunner | None:
    """Start the process that environments are forked from; `stack` ends it, and them.

    None where trajectories are single completions. `end_ids`: see `Turns`; `note` puts a line
    before the user.
    """
    if not config.enabled:
        return None
    sessions = SessionPool(
        partial(Environments, config),
        what="environment.path",
        memory_gib=config.memory_gib,
    )
    stack.enter_context(closing(sessions))
    turns = Turns(tokenizer, end_ids)
    return EnvironmentRunner(
        sessions, Rules(config, max_prompt_length, overlong_prompts, tokenizer, turns), note
    )

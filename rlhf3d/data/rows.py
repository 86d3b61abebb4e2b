"""One prompt and what its completions are checked against, read from a record of any source.

Invariant: a record is either a complete row or a ValueError that says where it is and what is
wrong. The columns are verl's. Pure, and light: the scoring processes load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rlhf3d.data.messages import NOT_TEXT, last_request, read_prompt, read_tools, without_nulls

REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
OPTIONAL_COLUMNS = ("ability", "extra_info", "tools", "environment")
NO_SOURCE = "environment"
"""Data source of rows that name none, as an environment may need none."""
WITHOUT_TRUTH = ("model", "environment")
"""Values of `reward_model.style` for rows that no rule scores."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt and what its completions are checked against."""

    data_source: str
    """Names the scorer of this row."""
    prompt: list[dict[str, Any]]
    """Chat messages, each {"role": ..., "content": ...}, perhaps with name, tool_calls, …"""
    ability: str
    """Kind of task, for example "math"."""
    reward_model: dict[str, Any]
    """{"style": "rule", "ground_truth": ...}; {"style": "model"} for a reward model alone, and
    {"style": "environment"} for an environment."""
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Anything else; usually split, index, question and answer."""
    tools: list[Any] = field(default_factory=list)
    """JSON schemas of the tools that the prompt offers."""
    environment: str | None = None
    """The class of `environment.path` that answers the model; null for `environment.name`."""
    others: dict[str, Any] = field(default_factory=dict)
    """The file's other columns, which only environments see; `RowStore` reads them if asked to."""

    @property
    def columns(self) -> dict[str, Any]:
        """What the row's environment is reset with.

        The keys of `extra_info` and `ground_truth` are columns too, as elsewhere they often are;
        the file's own columns hide them.
        """
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        others = own.pop("others")
        return {**self.extra_info, "ground_truth": self.ground_truth, **others, **own}

    @property
    def ground_truth(self) -> Any:
        """What a rule compares with; None in rows for a reward model or an environment alone."""
        return self.reward_model.get("ground_truth")

    @property
    def question(self) -> str:
        """The last message that is not the assistant's."""
        return last_request(self.prompt)


def question_key(row: PromptRow) -> str:
    """The question of a row without what data sets change: instruction, spacing, case."""
    question = row.extra_info.get("question")
    if not isinstance(question, str) or not question:
        question = row.question
    return "".join(question.split()).lower()


def row_of(record: Mapping[str, Any], where: str) -> PromptRow:
    """A record as a row; ValueError, starting with `where`, for one that cannot be used."""
    if not isinstance(record["data_source"], str):
        raise ValueError(f"{where}: data_source must be text, not {record['data_source']!r}")
    reward_model = _struct(record["reward_model"], f"{where}: reward_model")
    # Refused here and not when it is scored: a rule without a truth would fail at every completion.
    known = reward_model.get("style") in WITHOUT_TRUTH
    if not known and reward_model.get("ground_truth") is None:
        raise ValueError(
            f"{where}: reward_model must be a struct with a ground_truth, or of style "
            f"{' or '.join(WITHOUT_TRUTH)}, not {record['reward_model']!r}"
        )
    # Such a prompt's text refers to what the model would not see.
    for column in NOT_TEXT:
        if without_nulls(record.get(column)) not in (None, [], {}, "", b""):
            raise ValueError(
                f"{where}: {column} is not empty: prompts are text alone; leave the row out"
            )
    return PromptRow(
        data_source=record["data_source"],
        prompt=read_prompt(record["prompt"], where),
        ability=_text(record.get("ability"), f"{where}: ability"),
        reward_model=reward_model,
        extra_info=_struct(record.get("extra_info"), f"{where}: extra_info"),
        tools=read_tools(record.get("tools"), where),
        environment=_text(record.get("environment"), f"{where}: environment") or None,
    )


def environment_row(record: Mapping[str, Any], where: str) -> PromptRow:
    """A record with all columns of its file as a row for an environment; ValueError as `row_of`.

    Without their columns, the data source is NO_SOURCE, and there is no ground truth. A prompt that
    is a text is a message of the user's.
    """
    missing = {"data_source": NO_SOURCE, "reward_model": {"style": "environment"}}
    complete = {**missing, **record}
    if isinstance(complete["prompt"], str):
        complete["prompt"] = [{"role": "user", "content": complete["prompt"]}]
    known = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, *NOT_TEXT)
    others = {name: value for name, value in record.items() if name not in known}
    return replace(row_of(complete, where), others=others)


def _struct(value: Any, what: str) -> dict[str, Any]:
    """A struct, a map or a JSON object as text; ValueError for anything else."""
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):  # refused below
            return dict(json.loads(value))
    if isinstance(value, list) and all(_is_pair(entry) for entry in value):
        return dict(value)  # Arrow gives a map as a list of pairs
    raise ValueError(f"{what} must be a struct, not {type(value).__name__} {str(value)[:80]!r}")


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2


def _text(value: Any, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {type(value).__name__} {str(value)[:80]!r}")
    return value or ""

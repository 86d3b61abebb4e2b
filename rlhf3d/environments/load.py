"""The user's file of environments and tools: found, checked before the run, and called.

Invariant: it pickles as its settings, so that any process can load it; a mistake in it is a
ValueError that names the key before the run starts. The driver reads the file and its classes, and
never makes an object of one.
Runs in: the process of one trajectory; in the driver too, to be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.environments.api import COLUMN, Call, Finish, Reply, Reset
from rlhf3d.environments.instance import Instance
from rlhf3d.environments.kinds import EnvironmentClass, Kind, read_class
from rlhf3d.environments.parsers import PARSERS, Parser, user_parser
from rlhf3d.environments.tools import schema_of, tools_of
from rlhf3d.user_code import function_in, load_file, running


class Environments:
    """The classes and tools of the user's file.

    It is called with the calls of one trajectory, in the process of that: then it is the
    trajectory's environment.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        """Load the file; ValueError, naming the key, where it cannot be used."""
        assert config.path is not None, "asked only where trajectories have environments"
        self._config = config
        self._file = Path(config.path).resolve()
        # Once: its classes and tools share what it keeps.
        self._module = load_file(self._file, "environment.path")
        self._classes: dict[str, EnvironmentClass] = {}
        self._schemas: dict[str | None, list[dict[str, Any]]] = {}
        self._instance: Instance | None = None
        key = "environment.tools"
        functions = [function_in(self._module, self._file, name, key) for name in config.tools]
        self._tools = tools_of([(tool.__name__, tool) for tool in functions], key)
        self._parse = self._parser(config.tool_format)
        if config.name is not None:
            self._class(config.name)

    def __reduce__(self) -> tuple[type[Environments], tuple[EnvironmentConfig]]:
        return Environments, (self._config,)

    def name_of(self, row: Mapping[str, Any]) -> str | None:
        """The environment of a row; null where it has tools alone.

        ValueError where it names none, one that cannot be used, or lacks a column that it needs.
        """
        name = row.get(COLUMN)
        if name is None:
            name = self._config.name
        if name is None and self._tools:
            return None
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"no environment: set environment.name to a class of {self._file}, or name one in "
                f"the row's column {COLUMN!r}, which holds {row.get(COLUMN)!r}"
            )
        missing = [column for column in self._class(name).required if column not in row]
        if missing:
            raise ValueError(
                f"reset of the environment {name!r} takes {', '.join(missing)}, which the row has "
                "not; add the column to the data's files, or the key to extra_info"
            )
        return name

    def schemas(self, name: str | None) -> list[dict[str, Any]]:
        """JSON schemas of the tools of an environment, in the order in which the model sees them.

        ValueError, naming the function, for what its annotations or docstring lack.
        """
        if name not in self._schemas:
            schemas = []
            for tool, function in self._tools.items():
                schemas.append(schema_of(function, f"environment.tools: {tool}"))
            own = {} if name is None else self._class(name).tools
            for tool, method in own.items():
                where = f"environment.path: {name}.{tool} in {self._file}"
                schemas.append(schema_of(method, where))
            self._schemas[name] = schemas
        return self._schemas[name]

    @property
    def asked(self) -> list[str | None]:
        """The environments whose tools were asked for: those that the rows so far have."""
        return list(self._schemas)

    def roles(self, name: str | None) -> tuple[str, ...]:
        """Whose messages answer the model in an environment: the user's, a tool's, or both."""
        made = None if name is None else self._class(name)
        tools = ("tool",) if self._tools or (made is not None and made.tools) else ()
        steps = made is not None and made.kind != Kind.TRL
        return (*(("user",) if steps else ()), *tools)

    def __call__(self, call: Call) -> Reply:
        """Make a call of this process's trajectory; raises what the user's code raises."""
        with running(self._file.parent):
            if isinstance(call, Reset):
                name = self.name_of(call.row)
                made = None if name is None else self._class(name)
                self._instance = Instance(made, self._tools, self._parse, call.seed)
                return self._instance.reset(call.row)
            assert self._instance is not None, "the first call of a trajectory is Reset"
            if isinstance(call, Finish):
                return self._instance.finish()
            return self._instance.step(call.text)

    def close(self) -> None:
        """The trajectory is over, and its process ends."""
        if self._instance is not None:
            with running(self._file.parent):
                self._instance.close()

    def _class(self, name: str) -> EnvironmentClass:
        if name not in self._classes:
            made = function_in(self._module, self._file, name, "environment.name")
            where = f"environment.path: {name} in {self._file}"
            read = read_class(made, self._config.kwargs, where)
            tools_of([*self._tools.items(), *read.tools.items()], where)
            self._classes[name] = read
        return self._classes[name]

    def _parser(self, tool_format: str) -> Parser:
        if tool_format in PARSERS:
            return PARSERS[tool_format]
        key = "environment.tool_format"
        path, colon, name = tool_format.rpartition(":")
        if not colon:
            raise ValueError(
                f"{key}: {tool_format!r} is none of {', '.join(PARSERS)}, nor a parser of your "
                "own, FILE.py:FUNCTION"
            )
        file = Path(path).resolve()
        module = self._module if file == self._file else load_file(file, key)
        return user_parser(function_in(module, file, name, key), tool_format)

"""What engines were told, and before which of their steps: the `journal.jsonl` of a run.

Invariant: an engine that is told the same before the same steps does the same to the bit, so these
lines are enough to run again what depended on the time. One line a command and one a part of
completions, none a token; lines are on disk when a training step is complete, and one that a kill
has torn is removed at the next start.
No Ray, no vLLM.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from rlhf3d.rollout.api import Completion, Request
from rlhf3d.rollout.engine_loop import ENDS, Progress

JOURNAL_FILE = "journal.jsonl"
_DIGEST_BYTES = 8


class Asked(NamedTuple):
    """One request as the journal has it."""

    name: str
    """See `name_of`."""
    tokens: int
    """Of its prompt."""
    digest: str
    """Of its prompt's ids."""
    seed: int


class Made(NamedTuple):
    """One completion as the journal has it."""

    name: str
    """Of its request."""
    tokens: int
    digest: str
    """Of its ids, log-probs, end and versions."""


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"/".join(parts), digest_size=_DIGEST_BYTES).hexdigest()


def name_of(request: Request) -> str:
    """What the journal calls a request; one without a name goes by its seed and prompt."""
    if request.name:
        return request.name
    return f"{request.seed:x}-{_digest(array('i', request.prompt_ids).tobytes())}"


def trajectory_of(name: str) -> str:
    """The name of the trajectory of which a request of that name is a turn; see `Requests`."""
    return name.rpartition(".t")[0] or name


def asked(request: Request) -> Asked:
    """A request, in brief."""
    digest = _digest(array("i", request.prompt_ids).tobytes())
    return Asked(name_of(request), len(request.prompt_ids), digest, request.seed)


def made(name: str, completion: Completion) -> Made:
    """The completion of the request of that name, in brief."""
    digest = _digest(
        array("i", completion.token_ids).tobytes(),
        array("f", completion.logprobs).tobytes(),
        repr((completion.finish_reason, completion.versions)).encode(),
    )
    return Made(name, len(completion.token_ids), digest)


@dataclass(frozen=True)
class Command:
    """What an engine was told: a method of `VLLMEngine`."""

    method: str
    requests: tuple[Asked, ...] = ()
    """Of `submit`, in their order."""
    names: tuple[str, ...] = ()
    """Of `abort`, in their order."""
    version: int | None = None
    """Of `update_weights` and `publish`."""

    def to_json(self) -> dict[str, Any]:
        """Without what is empty."""
        row: dict[str, Any] = {"method": self.method}
        if self.requests:
            row["requests"] = self.requests
        if self.names:
            row["names"] = self.names
        if self.version is not None:
            row["version"] = self.version
        return row

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Command:
        """Read back."""
        return Command(
            row["method"],
            tuple(Asked(*request) for request in row.get("requests", ())),
            tuple(row.get("names", ())),
            row.get("version"),
        )


class JournalWriter:
    """Appends to a run's journal."""

    def __init__(self, output_dir: str | Path) -> None:
        path = Path(output_dir) / JOURNAL_FILE
        if path.exists():
            _drop_torn_line(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line; it is on disk at the next `flush`."""
        self._file.write(json.dumps(row, separators=(",", ":")) + "\n")

    def begin(self, step: int, facts: Mapping[str, Any]) -> None:
        """The run begins, or goes on after `step`; `facts`: what its numbers depend on, as JSON."""
        self.write({"begin": step, "facts": facts})
        self._file.flush()

    def trained(self, step: int, names: Sequence[str], ended: Sequence[int] = ()) -> None:
        """A step is complete; `names` of its trajectories, in their order.

        `ended`: groups that came to their end since the step before, whatever became of them.
        """
        row = {"trained": step, "trajectories": list(names)}
        self.write(row | {"ended": list(ended)} if ended else row)
        self._file.flush()

    def restarted(self) -> None:
        """All engines were started again, and count commands and steps from the start."""
        self.write({"restarted": True})
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> JournalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EngineJournal:
    """Writes down what one engine is told and tells, from its start on."""

    def __init__(
        self,
        journal: JournalWriter,
        engine: int,
        look: Callable[[Sequence[Made]], None] = lambda made: None,
    ) -> None:
        """`look` is shown what the engine has completed."""
        self._journal, self._engine, self._look = journal, engine, look
        self._sent: dict[int, Command] = {}
        """By number: the step is not known yet."""
        self._names: dict[int, str] = {}
        """Of unfinished requests, by the number that the engine knows."""

    def sent(self, number: int, method: str, args: Sequence[Any]) -> None:
        """The engine was sent command `number`."""
        command = Command(method)
        if method == "submit":
            requests: Mapping[int, Request] = args[0]
            command = Command(method, requests=tuple(map(asked, requests.values())))
            names = (request.name for request in command.requests)
            self._names |= zip(requests, names, strict=True)
        elif method == "abort":
            known = [own for own in args[0] if own in self._names]
            command = Command(method, names=tuple(self._names.pop(own) for own in known))
        elif method in ("update_weights", "publish"):
            command = Command(method, version=args[0])
        self._sent[number] = command

    def told(self, progress: Progress) -> None:
        """Take what the engine's first rank has told."""
        for number, step in progress.applied:
            command = self._sent.pop(number)
            if command.method != ENDS:
                row = {"engine": self._engine, "command": number, "step": step}
                self._journal.write(row | command.to_json())
        finished = []
        for own, completion in progress.completions.items():
            # One that was aborted may have been finished already.
            if own in self._names:
                finished.append(made(self._names.pop(own), completion))
        if finished:
            self._journal.write({"engine": self._engine, "made": finished})
            self._look(finished)


@dataclass
class Segment:
    """A part of a run, from its start (or a resume) to where it stopped."""

    begin: int
    """The step after which it begins."""
    facts: dict[str, Any] = field(default_factory=dict)
    commands: dict[int, list[Command]] = field(default_factory=dict)
    """Of each engine, in order, from number 1."""
    schedules: dict[int, list[int]] = field(default_factory=dict)
    """Steps that the engine had taken before each of them."""
    made: dict[str, list[Made]] = field(default_factory=dict)
    """By the request's name: completions that came, in order."""
    steps: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """The trajectories of each training step that was completed, in order."""
    ended: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Groups that came to their end before each of these, in order, where that is known."""
    restarted: bool = False
    """Whether engines were started again; what came then is left out."""

    @property
    def last_step(self) -> int:
        """The last step that can be run again."""
        return max(self.steps, default=self.begin)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a line of the file."""
        if "restarted" in row:
            self.restarted = True
        if self.restarted:
            return
        if "trained" in row:
            self.steps[row["trained"]] = tuple(row["trajectories"])
            self.ended[row["trained"]] = tuple(row.get("ended", ()))
        elif "command" in row:
            commands = self.commands.setdefault(row["engine"], [])
            commands.append(Command.from_json(row))
            self.schedules.setdefault(row["engine"], []).append(row["step"])
            assert len(commands) == row["command"], "an engine applies commands by their numbers"
        elif "made" in row:
            for one in row["made"]:
                self.made.setdefault(one[0], []).append(Made(*one))


def read_journal(run: str | Path) -> list[Segment]:
    """The parts of a run, in order.

    Raises ValueError where the folder has no journal, or one that is damaged.
    """
    path = Path(run) / JOURNAL_FILE
    if not path.is_file():
        raise ValueError(
            f"{run} holds no {JOURNAL_FILE}: give the trainer.output_dir of a run, or, where this "
            "is one of an older version, train again to get one"
        )
    segments: list[Segment] = []
    for number, row in _rows(path):
        try:
            if "begin" in row:
                segments.append(Segment(row["begin"], row["facts"]))
            else:
                segments[-1].add(row)
        except (LookupError, TypeError, AssertionError) as error:
            raise ValueError(f"{path} line {number} is damaged ({error!r})") from error
    if not segments:
        raise ValueError(f"{path} is empty: the run was stopped before it began")
    return segments


class Beginning(NamedTuple):
    """The start of a part of a run."""

    begin: int
    """The step after which it begins."""
    facts: dict[str, Any]


def beginnings(run: str | Path) -> list[Beginning]:
    """Where the parts of a run begin, read without the rest of its journal; empty without one.

    A line that is damaged is left out.
    """
    path, found = Path(run) / JOURNAL_FILE, []
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            # As `JournalWriter.begin` writes it: other lines, which are nearly all, are not parsed.
            if line.startswith('{"begin":'):
                with suppress(ValueError, LookupError):
                    row = json.loads(line)
                    found.append(Beginning(int(row["begin"]), dict(row["facts"])))
    return found


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Lines with their numbers; a last one that was torn by a kill is left out."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error})") from error


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line end."""
    with path.open("rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)

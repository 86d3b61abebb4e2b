"""What the model wrote: completions of a step in `samples/`, one JSON object each.

Invariant: a file is complete when it has its name (it is renamed at the end), and reads back equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from rlhf3d.observability.whole_file import whole_file

SAMPLES_DIR = "samples"
Read = TypeVar("Read")
_TEXTS = ("prompt", "response", "ground_truth")

Kind = Literal["train", "greedy", "sampled"]
"""Completions of the training step, or of greedy or sampled validation."""
KINDS: tuple[Kind, ...] = get_args(Kind)

_PREFIX: dict[Kind, str] = {"train": "", "greedy": "greedy_", "sampled": "sampled_"}
TOKENS = "tokens_"
"""Begins the names of files that hold tokens, see `tokens.py`."""


@dataclass(frozen=True)
class Sample:
    """One completion and how it was scored."""

    prompt: str
    response: str
    ground_truth: str
    """Empty in rows for a reward model."""
    score: float
    outcome: str
    """scored, unparsable, timeout or error; of a failed environment env_error or env_timeout;
    overlong_prompt."""
    length: int
    """Response tokens."""
    finish_reason: str
    """stop or length."""
    policy_version: int
    """The newest policy that wrote a token of it."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """Messages after the prompt, of a trajectory with an environment; `response` is the last."""
    answer: str | None = None
    """What the scorer read in it and compared with the ground truth; None where it read none, or
    does not say."""

    @property
    def mark(self) -> str:
        """Its score; of one that the reward function gave none, why."""
        return f"{self.score:g}" if self.outcome in ("scored", "unparsable") else self.outcome

    @property
    def transcript(self) -> str:
        """What followed the prompt, for people: the response, or all turns with their roles."""
        if not self.turns:
            return self.response
        return "\n".join(f"[{turn['role']}] {turn['content']}" for turn in self.turns)


def samples_path(output_dir: str | Path, step: int, kind: Kind = "train") -> Path:
    """`samples/step_N.jsonl`; validation's files carry `greedy_` or `sampled_` in front."""
    return Path(output_dir) / SAMPLES_DIR / f"{_PREFIX[kind]}step_{step}.jsonl"


def write_samples(
    output_dir: str | Path, step: int, samples: Iterable[Sample], kind: Kind = "train"
) -> Path:
    """Write (or replace, after a resume) one step's completions; returns the file."""
    path = samples_path(output_dir, step, kind)
    with whole_file(path) as file:
        file.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    return path


def read_samples(path: str | Path) -> list[Sample]:
    """Completions of one file, in the order written."""
    return read_objects(path, _sample)


def read_objects(path: str | Path, make: Callable[[dict[str, Any]], Read]) -> list[Read]:
    """What `make` makes of each line of a file. ValueError names a line that is damaged."""
    found = []
    # As bytes: text would also break at other characters, which completions may hold.
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        try:
            if line:
                found.append(make(json.loads(line)))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is damaged ({error}): restore the file or remove it"
            ) from error
    return found


def _sample(fields: dict[str, Any]) -> Sample:
    """A data set or a reward function may have put something else where texts belong."""
    return Sample(**{**fields, **{name: str(fields[name]) for name in _TEXTS}})


def files_of(output_dir: str | Path, prefix: str) -> dict[int, Path]:
    """By step, ascending, the files of `samples/` whose names are `prefix` and `step_N.jsonl`."""
    found = {}
    for path in (Path(output_dir) / SAMPLES_DIR).glob("*.jsonl"):
        if match := re.fullmatch(rf"{prefix}step_(\d+)\.jsonl", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def sample_steps(output_dir: str | Path, kind: Kind = "train") -> list[int]:
    """Return the steps that have a file of this kind, ascending."""
    return list(files_of(output_dir, _PREFIX[kind]))


def drop_samples(output_dir: str | Path, after_step: int) -> None:
    """Remove files of later steps, those of tokens too: a resumed run writes them again."""
    for prefix in (*_PREFIX.values(), TOKENS):
        for step, path in files_of(output_dir, prefix).items():
            if step > after_step:
                path.unlink()


def spaced(steps: Sequence[int], count: int) -> list[int]:
    """At most so many of them, evenly spaced, the first and the last included."""
    if len(steps) <= count:
        return list(steps)
    gap = (len(steps) - 1) / max(1, count - 1)
    return [steps[round(number * gap)] for number in range(count)]


def before_after(output_dir: str | Path, limit: int = 5) -> tuple[list[Sample], list[Sample]]:
    """Return the first and the last held-out answers to the same prompts.

    They are the first `limit` prompts, not chosen by score.

    Greedy answers where the run wrote them, else sampled ones; empty lists before the second
    validation.
    """
    kinds: tuple[Kind, Kind] = ("greedy", "sampled")
    for kind in kinds:
        steps = sample_steps(output_dir, kind)
        # Before and after need two validations.
        if len(steps) >= 2:
            first = _first_answers(samples_path(output_dir, steps[0], kind))
            last = _first_answers(samples_path(output_dir, steps[-1], kind))
            prompts = [prompt for prompt in first if prompt in last][:limit]
            return [first[prompt] for prompt in prompts], [last[prompt] for prompt in prompts]
    return [], []


def printable(text: str, limit: int = 400) -> str:
    """`text` in one line for people.

    Control characters and line breaks become spaces, cut at `limit`.
    """
    spaced = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(spaced.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _first_answers(path: Path) -> dict[str, Sample]:
    """The first answer to each prompt of a file."""
    answers: dict[str, Sample] = {}
    # With several answers a prompt, the first: prompts stand in the order of the held-out set.
    for sample in read_samples(path):
        answers.setdefault(sample.prompt, sample)
    return answers

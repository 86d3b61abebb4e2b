"""Trajectories that wait to be trained on, in files and back: what a checkpoint keeps of them.

Invariant: what is loaded trains exactly as what was saved: tokens, authors, versions, groups,
scores and rewards are equal, log-probs to the bit. Prompts are not copied: the number of their row
and a digest say which they are, and a row that is another prompt by now is refused. Of what a
trajectory's environment and reward function returned besides, JSON's values are kept exactly (a
tuple is a list then) and others as their text: all that they were asked for has happened. Reading
executes no code from the folder.
Runs in: driver.

| file | holds |
|---|---|
| `queue.json` | counts, prompts, requests, and of each batch its number, version and metrics |
| `trajectories.jsonl` | one line a trajectory, by batch; those left out after those trained on |
| `tokens.safetensors` | arrays of tokens, spans and rows, in the order of the lines |
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from rlhf3d.checkpoints.store import QUEUE_FILE
from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.episode import EpisodeRecord
from rlhf3d.experience.requests import TrajectoryRequest
from rlhf3d.experience.scored import Experience, ScoredTrajectory
from rlhf3d.experience.trajectory import Author, Row, Span, Trajectory
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import SamplingSettings

TRAJECTORIES_FILE, TOKENS_FILE = "trajectories.jsonl", "tokens.safetensors"
_FORMAT = 1
_AUTHORS: tuple[Author, ...] = get_args(Author)
_ARRAYS = {
    "token_ids": "i",  # of all spans
    "logprobs": "f",  # of sampled tokens
    "prompt_ids": "i",  # of rows that do not begin with the prompt of the data
    "row_prompts": "i",  # tokens of a row's prompt among `prompt_ids`, or `_OWN`
    "row_spans": "i",  # spans of a row
    "span_authors": "b",  # a place in `_AUTHORS`
    "span_lengths": "i",  # tokens of a span
    "span_rewards": "d",
    "span_versions": "i",  # stretches of one version in a span
    "version_starts": "i",  # first token of a stretch, in its span
    "versions": "q",
}
"""Names of the arrays, and what Python's `array` calls their types."""
_OWN = -1
_DTYPES = {
    "b": torch.int8,
    "i": torch.int32,
    "q": torch.int64,
    "f": torch.float32,
    "d": torch.float64,
}


@dataclass(frozen=True)
class QueuedBatch:
    """Experience that is complete and waits to be trained on."""

    number: int
    """The source's number of it, such as the step that it is for."""
    version: int
    """Of the weights that were served when it was begun."""
    experience: Experience


@dataclass(frozen=True)
class Queued:
    """All that a source has ahead of the training, in order."""

    batches: tuple[QueuedBatch, ...] = ()
    requests: tuple[TrajectoryRequest, ...] = ()
    """Trajectories that are not finished: they are begun again, with the same seeds."""


def save_queue(folder: Path, queue: Queued) -> None:
    """Write `queue` to files in the new folder `folder`."""
    folder.mkdir()
    prompts, tokens, waiting = _Prompts(), _TokenWriter(), 0
    batches = []
    with (folder / TRAJECTORIES_FILE).open("w", encoding="ascii") as lines:
        for batch in queue.batches:
            experience = batch.experience
            for scored in chain(experience.trajectories, experience.left_out):
                number = prompts.add(scored.trajectory.prompt)
                tokens.add(scored.trajectory)
                # ASCII: what is not is escaped, and so are line ends in texts.
                lines.write(json.dumps(_record(scored, number)) + "\n")
            waiting += len(experience.trajectories)
            batches.append(
                {
                    "number": batch.number,
                    "version": batch.version,
                    "metrics": experience.metrics,
                    "trajectories": len(experience.trajectories),
                    "left_out": len(experience.left_out),
                    "drawn": list(experience.drawn),
                }
            )
    requests = [_request_record(one, prompts.add(one.prompt)) for one in queue.requests]
    # Through bytes: an error of the disk is then Python's own, which a save knows how to explain.
    (folder / TOKENS_FILE).write_bytes(bytes_of(tokens.tensors()))
    counts = {"batches": len(batches), "trajectories": waiting, "unfinished": len(requests)}
    found = {
        "format": _FORMAT,
        "counts": counts,
        "prompts": prompts.digests,
        "batches": batches,
        "requests": requests,
    }
    (folder / QUEUE_FILE).write_text(json.dumps(found, indent=1), encoding="ascii")


def load_queue(folder: Path, prompt_of: Callable[[int], Prompt]) -> Queued:
    """Read what `save_queue` wrote.

    `prompt_of` gives the prompt of a row by its number (`Prompt.index`). ValueError where a row is
    another prompt by now, or where the folder was not written by `save_queue`.
    """
    try:
        found = json.loads((folder / QUEUE_FILE).read_text(encoding="ascii"))
        if found["format"] != _FORMAT:
            raise ValueError(
                f"{folder} has format {found['format']}, this rlhf3d reads {_FORMAT}: resume with "
                "the version that wrote it, or from an earlier checkpoint"
            )
        prompts = _loaded_prompts(folder, found["prompts"], prompt_of)
        requests = tuple(_request_of(record, prompts) for record in found["requests"])
        tokens = _TokenReader(folder / TOKENS_FILE)
        batches = []
        with (folder / TRAJECTORIES_FILE).open(encoding="ascii") as lines:
            scored = (_scored_of(json.loads(line), prompts, tokens) for line in lines)
            for record in found["batches"]:
                batches.append(_batch_of(record, scored))
        tokens.check_end()
    # Their messages would not say which file they are of. A ValueError of `prompt_of` does.
    except (OSError, KeyError, TypeError, IndexError, StopIteration, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} does not hold trajectories as a checkpoint writes them ({error!r}): copy it "
            "again, or resume from an earlier checkpoint"
        ) from error
    return Queued(tuple(batches), requests)


class _Prompts:
    """The prompts of a queue, each once."""

    def __init__(self) -> None:
        self.digests: list[tuple[int, str]] = []
        """Number of the row and digest of each."""
        self._known: set[int] = set()

    def add(self, prompt: Prompt) -> int:
        """Note a prompt; the number of its row."""
        if prompt.index not in self._known:
            self._known.add(prompt.index)
            self.digests.append((prompt.index, _digest(prompt)))
        return prompt.index


def _digest(prompt: Prompt) -> str:
    """Of what it asks and what it is scored with, as a data set's fingerprint has it."""
    digest = hashlib.sha256(array("q", prompt.prompt_ids).tobytes())
    # repr, which tells the text "3" from the number.
    digest.update(repr((prompt.data_source, prompt.ground_truth)).encode(errors="backslashreplace"))
    return digest.hexdigest()[:16]


def _loaded_prompts(
    folder: Path, digests: Iterable[tuple[int, str]], prompt_of: Callable[[int], Prompt]
) -> dict[int, Prompt]:
    """By the numbers of their rows; ValueError for one that is not the one that was saved."""
    prompts = {}
    for number, digest in digests:
        prompts[number] = prompt_of(number)
        if _digest(prompts[number]) != digest:
            raise ValueError(
                f"{folder} was written with other data: row {number} of data.train_files is now "
                "another prompt than the one whose trajectories it holds; resume with the same "
                "data section, tokenizer and chat template"
            )
    return prompts


def _record(scored: ScoredTrajectory, prompt: int) -> dict[str, Any]:
    """All of a trajectory that is not in the arrays, as JSON."""
    trajectory, score, episode = scored.trajectory, scored.score, scored.episode
    return {
        "prompt": prompt,
        "group": trajectory.group,
        "name": trajectory.name,
        "rows": len(trajectory.rows),
        "finish_reason": trajectory.finish_reason,
        "text": scored.text,
        "score": {
            "value": score.value,
            "outcome": score.outcome.value,
            "extra": _plain(score.extra),
            "message": score.message,
        },
        "reward": scored.reward,
        "greedy_reward": scored.greedy_reward,
        "episode": None if episode is None else _episode_record(episode),
    }


def _episode_record(episode: EpisodeRecord) -> dict[str, Any]:
    return {one.name: _plain(getattr(episode, one.name)) for one in fields(episode)}


def _plain(value: Any) -> Any:
    """`value` with lists for tuples, and texts for what JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _scored_of(
    record: Mapping[str, Any], prompts: Mapping[int, Prompt], tokens: _TokenReader
) -> ScoredTrajectory:
    """The next trajectory."""
    prompt = prompts[record["prompt"]]
    rows = tuple(tokens.row(prompt) for _ in range(record["rows"]))
    reason, name = record["finish_reason"], record["name"]
    trajectory = Trajectory(prompt, record["group"], rows, reason, name)
    score = dict(record["score"])
    return ScoredTrajectory(
        trajectory,
        record["text"],
        Score(outcome=Outcome(score.pop("outcome")), **score),
        record["reward"],
        record["greedy_reward"],
        None if record["episode"] is None else _episode_of(record["episode"]),
    )


def _episode_of(record: dict[str, Any]) -> EpisodeRecord:
    for name in ("messages", "restarts", "calls_s"):
        record[name] = tuple(record[name])
    return EpisodeRecord(**record)


def _batch_of(record: Mapping[str, Any], scored: Iterator[ScoredTrajectory]) -> QueuedBatch:
    """A batch of the next trajectories."""
    trajectories = [next(scored) for _ in range(record["trajectories"])]
    left_out = [next(scored) for _ in range(record["left_out"])]
    experience = Experience(trajectories, record["metrics"], left_out, record["drawn"])
    return QueuedBatch(record["number"], record["version"], experience)


def _request_record(request: TrajectoryRequest, prompt: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "group": request.group,
        "name": request.name,
        "seed": request.seed,
        "environment_seed": request.environment_seed,
        "sampling": asdict(request.sampling),
    }


def _request_of(record: dict[str, Any], prompts: Mapping[int, Prompt]) -> TrajectoryRequest:
    sampling = dict(record.pop("sampling"))
    stops = tuple(sampling.pop("stop_token_ids"))
    prompt = prompts[record.pop("prompt")]
    return TrajectoryRequest(
        prompt, sampling=SamplingSettings(stop_token_ids=stops, **sampling), **record
    )


@dataclass
class _TokenWriter:
    """Appends trajectories to the arrays."""

    arrays: dict[str, array] = field(
        default_factory=lambda: {name: array(kind) for name, kind in _ARRAYS.items()}
    )

    def add(self, trajectory: Trajectory) -> None:
        """Append all that its spans hold."""
        for row in trajectory.rows:
            own = list(row.prompt_ids) == list(trajectory.prompt.prompt_ids)
            self.arrays["row_prompts"].append(_OWN if own else len(row.prompt_ids))
            if not own:
                self.arrays["prompt_ids"].extend(row.prompt_ids)
            self.arrays["row_spans"].append(len(row.spans))
            for span in row.spans:
                self._add_span(span)

    def _add_span(self, span: Span) -> None:
        arrays = self.arrays
        arrays["token_ids"].extend(span.token_ids)
        arrays["logprobs"].extend(span.logprobs)
        arrays["span_authors"].append(_AUTHORS.index(span.author))
        arrays["span_lengths"].append(len(span.token_ids))
        arrays["span_rewards"].append(span.reward)
        arrays["span_versions"].append(len(span.versions))
        for start, version in span.versions:
            arrays["version_starts"].append(start)
            arrays["versions"].append(version)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays as tensors, which share their memory."""
        tensors = {}
        for name, values in self.arrays.items():
            dtype = _DTYPES[values.typecode]
            # torch refuses an empty buffer.
            tensors[name] = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0)
            tensors[name] = tensors[name].to(dtype)
        return tensors


class _TokenReader:
    """Takes trajectories from the arrays again, in their order."""

    def __init__(self, path: Path) -> None:
        """ValueError where the file does not hold these arrays."""
        try:
            tensors = tensors_of(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error}); copy it again") from error
        self._path = path
        self._arrays: dict[str, array] = {}
        for name, kind in _ARRAYS.items():
            tensor = tensors[name]
            if tensor.dtype != _DTYPES[kind] or tensor.ndim != 1:
                raise ValueError(f"{path} holds {name} as {tensor.dtype} {list(tensor.shape)}")
            self._arrays[name] = array(kind, tensor.numpy().tobytes())
        self._at = dict.fromkeys(_ARRAYS, 0)

    def row(self, prompt: Prompt) -> Row:
        """The next row, of a trajectory of `prompt`."""
        length, count = self._one("row_prompts"), self._one("row_spans")
        ids: Sequence[int] = prompt.prompt_ids
        if length != _OWN:
            ids = self._take("prompt_ids", length)
        return Row(ids, tuple(self._span() for _ in range(count)))

    def _span(self) -> Span:
        author, length = _AUTHORS[self._one("span_authors")], self._one("span_lengths")
        reward, stretches = self._one("span_rewards"), self._one("span_versions")
        token_ids = self._take("token_ids", length)
        if author != "sampled":
            return Span(author, token_ids)
        starts = self._take("version_starts", stretches)
        versions = tuple(zip(starts, self._take("versions", stretches), strict=True))
        return Span(author, token_ids, self._take("logprobs", length), versions, reward)

    def _one(self, name: str) -> Any:
        return self._take(name, 1)[0]

    def _take(self, name: str, count: int) -> array:
        start = self._at[name]
        self._at[name] = start + count
        taken = self._arrays[name][start : start + count]
        if len(taken) < count:
            raise IndexError(f"{self._path.name} ends in {name}")
        return taken

    def check_end(self) -> None:
        """IndexError where something is left."""
        for name, values in self._arrays.items():
            if self._at[name] != len(values):
                raise IndexError(f"{len(values) - self._at[name]} more {name} in {self._path.name}")

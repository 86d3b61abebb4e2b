"""`rlhf3d evaluate MODEL DATA`: generate, score, write down, and count; the same figures that training validates with.

Invariant: an evaluation is a function of (weights, prompts, settings): every completion has a seed of its own, so one
that was cut off and continued ends with the same generations. Results of different evaluations never mix in a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf3d.data.dataset import Prompt, PromptDataset
from rlhf3d.evaluation.records import (
    Generation,
    Mode,
    append_generations,
    group_keys,
    read_generations,
    results,
)
from rlhf3d.models.folder import weight_files
from rlhf3d.models.hf_io import check_weights
from rlhf3d.models.spec import load_spec
from rlhf3d.rewards.custom import load_custom_reward
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.items import decode, score_item
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.score import Score, check_outcomes
from rlhf3d.rewards.scorers import BuiltinReward, check_data_sources
from rlhf3d.rewards.truth_check import LOOKED_AT, stated_truths
from rlhf3d.rewards.truths import shown
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, Stops, request_seed
from rlhf3d.tokenizer.end_tokens import end_tokens
from rlhf3d.tokenizer.load import load_tokenizer, vocabulary_notes

SETTINGS_FILE, RESULTS_FILE = "settings.json", "results.json"
MAX_ERROR_RATE = 0.05
"""Share of an evaluation's completions that may go without a score, as reward.max_error_rate."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation measures."""

    greedy: bool = True
    """One completion a prompt, the most likely token each time."""
    n: int = 0
    """Sampled completions a prompt; 0 for none."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_prompt_length: int = 1024
    max_tokens: int = 1024
    """Longest completion."""
    overlong: str = "error"
    """As data.overlong_prompts."""
    limit: int = -1
    """Only the first so many prompts; -1 for all."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """As rollout.stop."""
    stop_token_ids: tuple[int, ...] = ()
    """As rollout.stop_token_ids."""
    method: str = "flexible"
    """As reward.method."""
    scorers: dict[str, str] = field(default_factory=dict)
    """As reward.scorers."""
    reward_path: str | None = None
    """As custom_reward_function.path."""
    reward_name: str = "compute_score"
    reward_kwargs: dict[str, Any] = field(default_factory=dict)

    def reward(self, data_sources: Sequence[str]) -> RewardFunction:
        """What scores the completions; ValueError where it does not fit them."""
        if self.reward_path is not None:
            return load_custom_reward(self.reward_path, self.reward_name, self.reward_kwargs)
        check_data_sources(data_sources, self.scorers)
        return BuiltinReward(self.method, tuple(data_sources), self.scorers)

    def identity(self) -> dict[str, Any]:
        """What makes it another evaluation when it changes, the text of the reward function's file included."""
        path = self.reward_path
        return self.to_json() | {
            "reward_path": None
            if path is None
            else hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        }

    def to_json(self) -> dict[str, Any]:
        """As they are written to files."""
        return asdict(self) | {"stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}

    def modes(self) -> list[tuple[Mode, int, SamplingSettings]]:
        """(mode, completions a prompt, sampling)."""
        if self.n < 0 or not (self.greedy or self.n):
            raise ValueError(f"--n {self.n}: must be 0 or more, and above 0 with --no-greedy")
        found: list[tuple[Mode, int, SamplingSettings]] = []
        if self.greedy:
            found.append(
                ("greedy", 1, SamplingSettings(1.0, 1.0, -1, self.max_tokens, greedy=True))
            )
        if self.n:
            sampling = SamplingSettings(self.temperature, self.top_p, self.top_k, self.max_tokens)
            found.append(("sampled", self.n, sampling))
        return found


class Engine(Protocol):
    """What generates."""

    def stream(
        self, requests: Sequence[Request], sampling: SamplingSettings
    ) -> Iterator[dict[int, Completion]]:
        """One completion a request, in parts as they finish, by number of the request."""

    def close(self) -> None:
        """Free it."""


def find_model(path: str | Path) -> Path:
    """The Hugging Face folder that `path` is, or that a checkpoint or run at `path` holds; ValueError without one."""
    path = Path(path)
    steps = sorted(path.glob("checkpoints/step_*/hf"), key=lambda hf: _step_number(hf.parent.name))
    for folder in [path, path / "hf", *reversed(steps)]:
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"no model at {path}: give a Hugging Face folder (config.json, safetensors, tokenizer), a checkpoint "
        "(checkpoints/step_N) or a run's folder"
    )


def _step_number(name: str) -> int:
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def evaluate(
    model: Path,
    files: Sequence[str | Path],
    output: Path,
    settings: EvaluationSettings,
    make_engine: Callable[[Stops], Engine],
    *,
    ks: Sequence[int] | None = None,
    batch: int = 64,
    workers: int = 1,
    timeout_s: float = 10.0,
    restart: bool = False,
    progress: Callable[[Mode, int, int], None] = lambda mode, done, of: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evaluate a model folder on prompt files; the results, which also are in `output`/results.json.

    What `output` holds of the same evaluation is kept and not generated again. `batch` prompts are generated, scored
    and written at a time; `warn` is given what is odd about the model folder. Raises ValueError where `output` holds
    another evaluation, unless `restart`.
    """
    modes = settings.modes()
    if too_many := [k for k in ks or () if k > settings.n]:
        k = max(too_many)
        raise ValueError(
            f"-k {k}: more than the --n {settings.n} samples a prompt; set --n {k} or more"
        )
    spec = load_spec(str(model))
    check_weights(model, spec, "lm")
    window = spec.max_position
    if settings.max_prompt_length + settings.max_tokens > window:
        raise ValueError(
            f"--max-prompt-length {settings.max_prompt_length} + --max-tokens {settings.max_tokens} = "
            f"{settings.max_prompt_length + settings.max_tokens} tokens, more than the model's window of {window}"
        )
    tokenizer = load_tokenizer(model)
    prompts = PromptDataset(
        files,
        tokenizer,
        settings.max_prompt_length,
        settings.overlong,
        settings.limit,
        key="DATA",
        vocab_size=spec.vocab_size,
    )
    ends = end_tokens(model, tokenizer, spec.vocab_size, settings.stop_token_ids)
    stops = Stops(ends.ids, settings.stop)
    for text in (
        *weight_files(model).notes,
        *vocabulary_notes(tokenizer, spec.vocab_size),
        *ends.notes,
    ):
        warn(text)
    reward = settings.reward(prompts.data_sources)
    if isinstance(reward, BuiltinReward):  # told before anything is generated
        stated_truths(prompts.sample(LOOKED_AT), reward, "DATA")
    identity = {
        "model": model_digest(model),
        "prompts": prompts.fingerprint(),
        **settings.identity(),
    }
    done = _open_output(output, identity, model, files, restart)
    have = {(g.mode, g.index, g.sample) for g in done}
    todo = [(mode, n, sampling, _missing(prompts, mode, n, have)) for mode, n, sampling in modes]
    if any(missing for *_, missing in todo):
        with (
            RewardManager(reward, workers=workers, timeout_s=timeout_s) as pool,
            closing(make_engine(stops)) as engine,
        ):
            for mode, n, sampling, missing in todo:
                total = len(prompts) * n
                finished = total - sum(len(samples) for _, samples in missing)
                failed: list[Score] = []
                for part in _parts(missing, batch):
                    made, scores = _generate(
                        engine, pool, tokenizer, prompts, part, mode, sampling, settings.seed
                    )
                    failed += [score for score in scores if score.failed]
                    check_outcomes(
                        failed, MAX_ERROR_RATE, total, "Fix the reward function and evaluate again."
                    )
                    append_generations(output, made)
                    done += made
                    finished += len(made)
                    progress(mode, finished, total)
    report = {
        "model": str(model),
        "data": [str(file) for file in files],
        "settings": settings.to_json(),
        "prompts": {
            "used": len(prompts),
            "dropped": prompts.dropped,
            "truncated": prompts.truncated,
        },
        **results(done, ks),
    }
    _write_json(output / RESULTS_FILE, report)
    return report


_Missing = list[tuple[int, list[int]]]
"""(index of a prompt in the set, numbers of the samples it lacks)."""


def _missing(
    prompts: PromptDataset, mode: Mode, n: int, have: set[tuple[Mode, int, int]]
) -> _Missing:
    missing = []
    for position in range(len(prompts)):
        number = prompts.number(position)
        if lacking := [sample for sample in range(n) if (mode, number, sample) not in have]:
            missing.append((position, lacking))
    return missing


def _parts(missing: _Missing, size: int) -> Iterator[_Missing]:
    return (missing[start : start + size] for start in range(0, len(missing), size))


def _generate(
    engine: Engine,
    pool: RewardManager,
    tokenizer: Any,
    prompts: PromptDataset,
    part: _Missing,
    mode: Mode,
    sampling: SamplingSettings,
    seed: int,
) -> tuple[list[Generation], list[Score]]:
    wanted: list[tuple[Prompt, int]] = [
        (prompts[position], s) for position, samples in part for s in samples
    ]
    requests = [
        Request(p.prompt_ids, request_seed(seed, 0, p.index, sample)) for p, sample in wanted
    ]
    completions: dict[int, Completion] = {}
    texts: dict[int, str] = {}
    scoring = pool.start(len(wanted))
    for some in engine.stream(requests, sampling):
        decoded = decode(some, tokenizer)
        scoring.add(
            {number: score_item(wanted[number][0], text) for number, text in decoded.items()}
        )
        completions |= some
        texts |= decoded
    scores = scoring.finish()
    made = [
        _record(mode, prompt, sample, completions[number], texts[number], scores[number])
        for number, (prompt, sample) in enumerate(wanted)
    ]
    return made, scores


def _record(
    mode: Mode, prompt: Prompt, sample: int, completion: Completion, text: str, score: Score
) -> Generation:
    answer = score.extra.get("answer")
    return Generation(
        mode=mode,
        index=prompt.index,
        sample=sample,
        data_source=prompt.data_source,
        prompt=prompt.text,
        response=text,
        ground_truth=shown(prompt.ground_truth),
        answer=None if answer is None else str(answer),
        score=score.accuracy,
        outcome=score.outcome.value,
        length=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        groups=group_keys(prompt.extra_info),
    )


def model_digest(folder: Path) -> str:
    """A digest of a model folder: its small files, and of the weights sizes, headers and spread samples."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= 16 * 2**20:
                digest.update(file.read())
                continue
            for place in range(256):
                file.seek(place * (size - 4096) // 255)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _open_output(
    output: Path, identity: dict[str, Any], model: Path, files: Sequence[str | Path], restart: bool
) -> list[Generation]:
    """The generations that are there already, all of this very evaluation."""
    settings = output / SETTINGS_FILE
    if settings.is_file() and not restart:
        found = json.loads(settings.read_text(encoding="utf-8"))["identity"]
        differing = [key for key, value in identity.items() if found.get(key) != value]
        if differing:
            raise ValueError(
                f"{output} holds another evaluation ({', '.join(differing)} differ): name another --output, or say "
                "--restart to replace it"
            )
        return read_generations(output)
    if settings.is_file():
        shutil.rmtree(output)
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds files that are no evaluation: name another --output")
    output.mkdir(parents=True, exist_ok=True)
    _write_json(
        settings, {"identity": identity, "model": str(model), "data": [str(file) for file in files]}
    )
    return []


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)

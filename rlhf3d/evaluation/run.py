"""`rlhf3d evaluate MODEL DATA`: generate, score, write down and count, as training validates.

Invariant: an evaluation is a function of (weights, prompts, settings): every completion has its own
seed, so one that was cut off and continued ends with the same generations. Results of different
evaluations never mix in a folder.
Runs in: the command's process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from rlhf3d.data.dataset import PromptDataset
from rlhf3d.environments.load import Environments
from rlhf3d.evaluation.model import model_digest
from rlhf3d.evaluation.records import (
    Generation,
    Mode,
    append_generations,
    group_keys,
    read_generations,
    results,
)
from rlhf3d.evaluation.settings import EvaluationSettings
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.environments import (
    check_conversations,
    make_environments,
    offered_tools,
    start_environments,
)
from rlhf3d.experience.requests import TrajectoryRequest
from rlhf3d.experience.scored import ScoredTrajectory
from rlhf3d.models.folder import weight_files
from rlhf3d.models.hf_io import check_weights
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.observability.whole_file import whole_file
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rewards.score import Score, check_outcomes
from rlhf3d.rewards.scorers import BuiltinReward
from rlhf3d.rewards.truth_warnings import LOOKED_AT, stated_truths
from rlhf3d.rewards.truths import shown
from rlhf3d.rollout.api import Engines, SamplingSettings, Stops, request_seed
from rlhf3d.tokenizer.clock import TEMPLATE_CLOCK
from rlhf3d.tokenizer.end_tokens import EndTokens, end_tokens
from rlhf3d.tokenizer.load import load_tokenizer, vocabulary_notes

SETTINGS_FILE, RESULTS_FILE = "settings.json", "results.json"
MAX_ERROR_RATE = 0.05
"""Share of an evaluation's completions that may go without a score, as reward.max_error_rate."""


class Engine(Engines, Protocol):
    """What generates completions."""

    def close(self) -> None:
        """Free it."""


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
    """Evaluate a model folder on prompt files; return the results, also in `output`/results.json.

    What `output` holds of the same evaluation is kept and not generated again. `batch` prompts are
    generated, scored and written at a time; `warn` is given what is odd about the model folder.
    ValueError where `output` holds another evaluation, unless `restart`.
    """
    modes = settings.modes()
    _check_ks(settings.n, ks or ())
    spec = load_spec(str(model))
    check_weights(model, spec, "lm")
    _check_limits(settings, spec)
    tokenizer = load_tokenizer(model, settings.chat_template, "--chat-template")
    # Where the template writes the date, prompts of one that goes on have that of its beginning.
    TEMPLATE_CLOCK.set(None if restart else _began(output))
    environments = make_environments(settings.environment)
    prompts = PromptDataset(
        files,
        tokenizer,
        settings.max_prompt_length,
        settings.overlong,
        settings.limit,
        key="DATA",
        vocab_size=spec.vocab_size,
        offered=offered_tools(environments),
    )
    ends = end_tokens(model, tokenizer, spec.vocab_size, settings.stop_token_ids)
    for text in _notes(model, tokenizer, spec, ends, environments):
        warn(text)
    rule = settings.reward(prompts.data_sources)
    if isinstance(rule, BuiltinReward):  # reported before anything is generated
        stated_truths(prompts.sample(LOOKED_AT), rule, "DATA")
    # What the generations depend on: where a continued evaluation differs, its folder is refused.
    identity = {
        "model": model_digest(model),
        "prompts": prompts.fingerprint(),
        **settings.identity(),
    }
    done = _open_output(output, identity, model, files, restart)
    usable = _usable(prompts, settings)
    tasks = [_task(prompts, usable, *mode, done) for mode in modes]
    # Starting vLLM takes a minute, so not for an evaluation that is complete.
    if any(task.missing for task in tasks):
        with (
            # First, as its processes load in the background while the engine starts.
            RewardManager(rule, workers=workers, timeout_s=timeout_s) as rewards,
            ExitStack() as stack,
            closing(make_engine(Stops(ends.ids, settings.stop))) as engine,
        ):
            own, limits = settings.environment, (settings.max_prompt_length, settings.overlong)
            runner = start_environments(stack, own, *limits, tokenizer, ends.of_model, warn)
            part = settings.environment_part
            collector = Collector(engine, rewards, tokenizer, runner=runner, environment=part)
            for task in tasks:
                for generations in _generate(task, prompts, collector, settings.seed, batch):
                    append_generations(output, generations)  # kept, should the next part fail
                    done += generations
                    progress(task.mode, task.finished, task.total)
    counts = {"used": len(usable), "dropped": prompts.dropped, "truncated": prompts.truncated}
    report = {
        "model": str(model),
        "data": [str(file) for file in files],
        "settings": settings.to_json(),
        "prompts": counts,
        **results(done, ks),
    }
    _write_json(output / RESULTS_FILE, report)
    return report


def _notes(
    model: Path,
    tokenizer: Any,
    spec: ModelSpec,
    ends: EndTokens,
    environments: Environments | None,
) -> Iterator[str]:
    """What is odd about the model folder; ValueError for a template that writes no conversation."""
    yield from weight_files(model).notes
    yield from vocabulary_notes(tokenizer, spec.vocab_size)
    yield from ends.notes
    yield from check_conversations(environments, tokenizer, ends.of_model)


def _check_ks(n: int, ks: Sequence[int]) -> None:
    k = max(ks, default=0)
    if k > n:
        raise ValueError(f"-k {k}: more than the --n {n} samples a prompt; set --n {k} or more")


def _check_limits(settings: EvaluationSettings, spec: ModelSpec) -> None:
    longest = settings.max_prompt_length + settings.max_tokens
    if longest > spec.max_position:
        raise ValueError(
            f"--max-prompt-length {settings.max_prompt_length} + --max-tokens "
            f"{settings.max_tokens} = {longest} tokens, more than the model's window of "
            f"{spec.max_position}"
        )


@dataclass
class _Task:
    """The completions of one mode that are to be generated."""

    mode: Mode
    sampling: SamplingSettings
    missing: list[tuple[int, list[int]]]
    """(position of a prompt in the data set, numbers of the samples it lacks)."""
    total: int
    """Completions of the mode, those that were there before included."""
    finished: int


def _usable(prompts: PromptDataset, settings: EvaluationSettings) -> Sequence[int]:
    """Positions of the prompts that are not left out for their length."""
    positions = range(len(prompts))
    if prompts.scanned or settings.overlong != "filter":
        return positions
    # Of a large set not all are known yet; once for all modes, so that each counts once.
    return [position for position in positions if prompts.get(position) is not None]


def _task(
    prompts: PromptDataset,
    usable: Sequence[int],
    mode: Mode,
    n: int,
    sampling: SamplingSettings,
    done: Sequence[Generation],
) -> _Task:
    there = {(g.index, g.sample) for g in done if g.mode == mode}
    missing, count = [], 0
    for position in usable:
        index = prompts.number(position)
        lacking = [sample for sample in range(n) if (index, sample) not in there]
        count += len(lacking)
        if lacking:
            missing.append((position, lacking))
    total = len(usable) * n
    return _Task(mode, sampling, missing, total, finished=total - count)


def _generate(
    task: _Task, prompts: PromptDataset, collector: Collector, seed: int, batch: int
) -> Iterator[list[Generation]]:
    """Generate and score what is missing, `batch` prompts at a time.

    RewardError as soon as too many of the task's completions could not be scored.
    """
    failed: list[Score] = []
    for start in range(0, len(task.missing), batch):
        requests, samples = [], []
        for position, lacking in task.missing[start : start + batch]:
            prompt = prompts[position]
            for sample in lacking:
                # Of prompt and sample alone, as there is no step: after a cut-off comes what
                # would have been generated before it.
                own = request_seed(seed, 0, prompt.index, sample)
                group = request_seed(seed, 0, prompt.index, 0)
                requests.append(TrajectoryRequest(prompt, prompt.index, own, group, task.sampling))
                samples.append(sample)
        rows = collector.collect(requests)
        failed += [row.score for row in rows if row.score.failed]
        remedy = "Fix the reward function and evaluate again."
        # Of all of the task's completions, as the share of one part's would be of few.
        check_outcomes(failed, MAX_ERROR_RATE, task.total, remedy)
        task.finished += len(rows)
        yield [
            _generation(task.mode, sample, row) for sample, row in zip(samples, rows, strict=True)
        ]


def _generation(mode: Mode, sample: int, row: ScoredTrajectory) -> Generation:
    trajectory, score = row.trajectory, row.score
    prompt = trajectory.prompt
    shown_as = row.sample()
    return Generation(
        mode=mode,
        index=prompt.index,
        sample=sample,
        data_source=prompt.data_source,
        prompt=shown_as.prompt,
        response=row.text,
        ground_truth=shown(prompt.ground_truth),
        answer=score.answer,
        # Not the value: a user's function may return `acc` besides a `score` of more parts.
        score=score.accuracy,
        outcome=score.outcome.value,
        length=trajectory.response_length,
        finish_reason=trajectory.finish_reason,
        groups=group_keys(prompt.extra_info),
        turns=shown_as.turns,
    )


def _began(output: Path) -> datetime | None:
    """When the evaluation in a folder began, which is what chat templates are told."""
    settings = output / SETTINGS_FILE
    if not settings.is_file():
        return None
    began = json.loads(settings.read_text(encoding="utf-8")).get("began")
    # Earlier versions did not keep it.
    return None if began is None else datetime.fromisoformat(began)


def _open_output(
    output: Path, identity: dict[str, Any], model: Path, files: Sequence[str | Path], restart: bool
) -> list[Generation]:
    """Return the generations that are there already, all of the same evaluation."""
    settings = output / SETTINGS_FILE
    if settings.is_file() and not restart:
        saved = json.loads(settings.read_text(encoding="utf-8"))["identity"]
        differing = [key for key, value in identity.items() if saved.get(key) != value]
        if differing:
            raise ValueError(
                f"{output} holds another evaluation ({', '.join(differing)} differ): name another "
                "--output, or say --restart to replace it"
            )
        return read_generations(output)
    if settings.is_file():
        # Only a folder that is known to be an evaluation is ever deleted.
        shutil.rmtree(output)
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds files that are no evaluation: name another --output")
    output.mkdir(parents=True, exist_ok=True)
    _write_json(
        settings,
        {
            "identity": identity,
            "began": TEMPLATE_CLOCK.now().isoformat(),
            "model": str(model),
            "data": [str(file) for file in files],
        },
    )
    return []


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False))

"""The files that a run names: whether they are there and fit its configuration.

Invariant: only looks; each problem is a sentence with key, value, arithmetic and fix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhf3d.config.groups import worker_groups
from rlhf3d.config.keys import code_files
from rlhf3d.config.schema import Config, DataConfig
from rlhf3d.models.engine_weights import check_engine_layout, check_quantization
from rlhf3d.models.spec import ModelSpec, check_layout, load_reward_spec, load_spec
from rlhf3d.observability.trackers.registry import missing_libraries
from rlhf3d.paths import folder_problem

# An earlier run, such as one of another user, may have left folders that this one cannot write.
RUN_FOLDERS = ("", "checkpoints", "logs", "samples", "tensorboard", "trackers")
"""A run's output folder, and those in it."""


def check_files(config: Config) -> list[str]:
    """Every problem of model folder (and its fit to the layout), data files and code files."""
    try:
        problems = check_model(config, _read_spec(config.model.path))
    except ValueError as error:
        problems = [str(error)]
    problems += _check_output(config.trainer.output_dir)
    named = {"train_files": config.data.train_files, "val_files": config.data.val_files}
    for key, names in named.items():
        for name in names:
            if not Path(name).is_file():
                problems.append(
                    f"data.{key}: no file {name}; `rlhf3d data prepare --help` shows how to "
                    "write it"
                )
    problems += check_named(config.model.chat_template, code_files(config))
    return [*problems, *missing_libraries(config.trainer.logger)]


def check_named(template: str | None, code: Mapping[str, str]) -> Iterator[str]:
    """The chat template and Python files of the user's, by key, that are not there."""
    if template is not None and not Path(template).is_file():
        yield f"model.chat_template = {template}: no such file; name a .jinja file"
    for key, file in code.items():
        if not Path(file).is_file():
            yield f"{key} = {file}: no such Python file"


def _check_output(output_dir: str) -> Iterator[str]:
    """The first of the run's folders that cannot be written to."""
    for name in RUN_FOLDERS:
        problem = folder_problem(Path(output_dir) / name)
        if problem is not None:
            yield f"trainer.output_dir = {Path(output_dir)}: {problem}; name another folder"
            return


def _read_spec(model: str) -> ModelSpec:
    """Of a folder whose weights are those of its shape; ValueError says what is wrong with it."""
    from rlhf3d.models.hf_io import check_weights  # loads torch

    spec = load_spec(model)
    check_weights(model, spec, "lm")
    return spec


def check_model(config: Config, spec: ModelSpec, reward: ModelSpec | None = None) -> list[str]:
    """What does not fit the model: lengths, layouts of the worker groups, ranks of an engine.

    The reward model is read, weights included, unless its shape is given.
    """
    problems = [
        *_check_lengths(config.data, spec.max_position),
        *_check_stop_tokens(config.rollout.stop_token_ids, spec.vocab_size),
    ]
    for group in worker_groups(config):
        shape = spec
        try:
            if group.name == "reward":
                shape = reward or load_reward_spec(group.model)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            check_layout(shape, group.layout, group.layout_config.sequence_parallel)
        except ValueError as error:
            # The error begins with `layout:`, which becomes critic.layout: for that group.
            problems.append(f"{group.key.removesuffix('layout')}{error}")
    rollout = config.rollout
    try:
        check_engine_layout(spec, rollout.tensor_parallel_size, rollout.expert_parallel)
        check_quantization(spec, rollout.quantization)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _check_lengths(data: DataConfig, window: int) -> Iterator[str]:
    prompt, response = data.max_prompt_length, data.max_response_length
    if prompt + response > window:
        yield (
            f"data.max_prompt_length {prompt} + data.max_response_length {response} = "
            f"{prompt + response} tokens, more than the model's window of {window}"
        )


def _check_stop_tokens(tokens: Sequence[int], vocab_size: int) -> Iterator[str]:
    for token in tokens:
        if not 0 <= token < vocab_size:
            yield (
                f"rollout.stop_token_ids holds {token}: the model's tokens are 0 to "
                f"{vocab_size - 1}"
            )

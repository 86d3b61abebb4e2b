"""The files that a run names: whether they are there and fit its configuration.

Invariant: only looks; each problem is a sentence with key, value, arithmetic and fix.
"""

from __future__ import annotations

from pathlib import Path

from rlhf3d.config.groups import worker_groups
from rlhf3d.config.schema import Config
from rlhf3d.models.engine_weights import check_engine_layout, check_quantization
from rlhf3d.models.spec import ModelSpec, check_layout, load_reward_spec, load_spec
from rlhf3d.paths import folder_problem


def check_files(config: Config) -> list[str]:
    """Every problem of model folder (and its fit to the layout), data files and reward function."""
    problems = _check_model_folder(config) + _check_output(config)
    for key in ("train_files", "val_files"):
        problems += [
            f"data.{key}: no file {name}; `rlhf3d data prepare --help` shows how to write it"
            for name in getattr(config.data, key)
            if not Path(name).is_file()
        ]
    path = config.custom_reward_function.path
    if path is not None and not Path(path).is_file():
        problems.append(f"custom_reward_function.path = {path}: no such Python file")
    return problems


def _check_output(config: Config) -> list[str]:
    """The run's folder, and those in it."""
    output = Path(config.trainer.output_dir)
    folders = [
        output,
        *(output / name for name in ("checkpoints", "logs", "samples", "tensorboard")),
    ]
    found = list(dict.fromkeys(filter(None, map(folder_problem, folders))))
    return [
        f"trainer.output_dir = {output}: {problem}; name another folder" for problem in found[:1]
    ]


def _check_model_folder(config: Config) -> list[str]:
    from rlhf3d.models.hf_io import check_weights  # loads torch

    try:
        spec = load_spec(config.model.path)
        check_weights(config.model.path, spec, "lm")
    except ValueError as error:
        return [str(error)]
    return check_model(config, spec)


def check_model(config: Config, spec: ModelSpec, reward: ModelSpec | None = None) -> list[str]:
    """What does not fit the model: lengths, layouts of the worker groups, ranks of an engine.

    The reward model is read, weights included, unless its shape is given.
    """
    problems = []
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    if prompt + response > spec.max_position:
        problems.append(
            f"data.max_prompt_length {prompt} + data.max_response_length {response} = "
            f"{prompt + response} tokens, more than the model's window of {spec.max_position}"
        )
    problems += [
        f"rollout.stop_token_ids holds {token}: the model's tokens are 0 to {spec.vocab_size - 1}"
        for token in config.rollout.stop_token_ids
        if not 0 <= token < spec.vocab_size
    ]
    for group in worker_groups(config):
        try:
            of_group = (reward or load_reward_spec(group.model)) if group.name == "reward" else spec
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            check_layout(of_group, group.layout, group.layout_config.sequence_parallel)
        except ValueError as error:
            problems.append(f"{group.key.removesuffix('layout')}{error}")
    try:
        check_engine_layout(
            spec, config.rollout.tensor_parallel_size, config.rollout.expert_parallel
        )
        check_quantization(spec, config.rollout.quantization)
    except ValueError as error:
        problems.append(str(error))
    return problems

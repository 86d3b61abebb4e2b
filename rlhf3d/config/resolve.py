"""What a configuration leaves open until a run starts: a user's names, and the platform.

Invariant: reading a configuration executes nothing of the user's. `resolve_algorithms` is the one
step that does, and leaves what the estimator needs in the configuration, as data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf3d.config.checks import check, not_one_of
from rlhf3d.config.groups import worker_groups
from rlhf3d.config.load import ConfigError, read_config
from rlhf3d.config.schema import Config, RolloutConfig
from rlhf3d.config.size_checks import check_sharing

if TYPE_CHECKING:
    from rlhf3d.parallel.platform import Platform


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run that is to be planned or started: read, checked and resolved.

    Executes algorithm.custom_path, if there is one. Raises ConfigError with all problems at once.
    """
    config, problems = read_config(path, overrides)
    if config.algorithm.custom_path is not None:
        try:
            config = resolve_algorithms(config)
        except ConfigError as error:
            # Beside those of the file: the user sees all of them at once.
            problems += error.problems
    if not problems:
        problems = check(config)  # now that it is known whether there is a critic
    if problems:
        raise ConfigError(problems)
    return config


def resolve_algorithms(config: Config) -> Config:
    """The configuration with what its estimator needs: whether there is a critic, for one.

    Executes algorithm.custom_path, if there is one. Raises ConfigError for a file that does not
    load, and for a name that it does not register.
    """
    algorithm = config.algorithm
    if algorithm.custom_path is None:
        return config
    from rlhf3d.algorithms.advantages import ADVANTAGES  # loads torch, as the user's file does
    from rlhf3d.algorithms.custom import load_custom_algorithms
    from rlhf3d.algorithms.losses import POLICY_LOSSES

    try:
        load_custom_algorithms(algorithm.custom_path)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    chosen = {
        "algorithm.adv_estimator": (algorithm.adv_estimator, ADVANTAGES.names()),
        "actor.policy_loss": (config.actor.policy_loss, POLICY_LOSSES.names()),
    }
    problems = [
        not_one_of(key, value, names)
        for key, (value, names) in chosen.items()
        if value not in names
    ]
    if problems:
        raise ConfigError(problems)
    needs = ADVANTAGES[algorithm.adv_estimator].needs
    return replace(config, algorithm=replace(algorithm, own_needs=needs))


def resolve_platform(config: Config, platform: Platform) -> Config:
    """The configuration with `auto` replaced by the platform, and by its fastest dtype.

    Raises ConfigError for what is asked for and this platform has not.
    """
    model = config.model
    if model.dtype == "auto":
        model = replace(model, dtype=platform.fast_dtype)
    resolved = replace(
        config,
        model=model,
        rollout=resolve_rollout(config.rollout, platform),
        cluster=replace(config.cluster, platform=platform.kind),
    )
    problems = list(check_sharing(model, worker_groups(resolved), platform.kind))
    if problems:
        raise ConfigError(problems)
    return resolved


def resolve_rollout(rollout: RolloutConfig, platform: Platform) -> RolloutConfig:
    """The engines' section with `auto` replaced."""
    if rollout.dtype == "auto":
        # FP8 is quantized from bfloat16.
        quantized = rollout.quantization != "none"
        rollout = replace(rollout, dtype="bfloat16" if quantized else platform.fast_dtype)
    if rollout.enforce_eager == "auto":
        rollout = replace(rollout, enforce_eager=platform.eager_engines)
    return rollout

"""What a run reads before it starts a process: model description, tokenizer, prompts, reward rule.

Invariant: a mistake in any of these files is reported before anything is started or written.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rlhf3d.algorithms.losses import POLICY_LOSSES
from rlhf3d.checkpoints.resume import Start, began_at, choose_start
from rlhf3d.config.derived import Derived, derive, micro_batching_of
from rlhf3d.config.schema import Config, DataConfig
from rlhf3d.config.size_checks import rows_of_trajectory_notes
from rlhf3d.data.dataset import PromptDataset
from rlhf3d.data.loader import Curriculum, PromptLoader
from rlhf3d.environments.load import Environments
from rlhf3d.experience.environments import (
    check_conversations,
    make_environments,
    offered_tools,
)
from rlhf3d.models.folder import weight_files
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.rewards.function import RewardFunction
from rlhf3d.rewards.make import make_reward
from rlhf3d.tokenizer.clock import TEMPLATE_CLOCK
from rlhf3d.tokenizer.end_tokens import EndTokens, end_tokens
from rlhf3d.tokenizer.load import load_tokenizer, vocabulary_notes


@dataclass(frozen=True)
class RunInputs:
    """The files of a run, read."""

    spec: ModelSpec
    tokenizer: Any
    ends: EndTokens
    """What ends a completion."""
    train_data: PromptDataset
    val_data: PromptDataset | None
    loader: PromptLoader
    """Of the training prompts, at its beginning."""
    rule: RewardFunction | None
    """What scores completions; None where a reward model or an environment alone does."""
    turn_notes: Sequence[str] = ()
    """What is odd about conversations in the model's chat template, where there are any."""

    @property
    def datasets(self) -> list[PromptDataset]:
        """Training prompts, and validation's where there are any."""
        return [self.train_data] if self.val_data is None else [self.train_data, self.val_data]

    def notes(self, model_folder: Path) -> Iterator[str]:
        """What is odd about the model folder: weights, vocabulary, end tokens."""
        yield from weight_files(model_folder).notes
        yield from vocabulary_notes(self.tokenizer, self.spec.vocab_size)
        yield from self.ends.notes
        yield from self.turn_notes


def read_to_start(
    config: Config, began: datetime | None = None
) -> tuple[RunInputs, Derived, Start]:
    """Read them, and choose where the run starts; ValueError as `read_inputs` and `choose_start`.

    Prompts of a run that goes on have the date of its first start, where the template writes one;
    those of a run that is repeated that of the other, `began`.
    """
    time = began or began_at(config.trainer)
    while True:
        TEMPLATE_CLOCK.set(time)
        inputs = read_inputs(config)
        derived = derive(config, len(inputs.train_data))
        assert derived.total_steps is not None
        start = choose_start(config, derived.total_steps)
        goes_on = start.checkpoint is not None or start.finished is not None
        if time is None or goes_on or began is not None:
            return inputs, derived, start
        time = None  # a new run after all: its prompts are of today


def read_inputs(config: Config) -> RunInputs:
    """Read them. Raises ValueError where one does not fit the configuration or another."""
    folder = config.model.path
    spec, tokenizer = load_spec(folder), load_tokenizer(folder, config.model.chat_template)
    environments = make_environments(config.environment)
    train_data = _dataset(config.data, tokenizer, "train_files", spec.vocab_size, environments)
    val_data = None
    if config.data.val_files:
        val_data = _dataset(config.data, tokenizer, "val_files", spec.vocab_size, environments)
    ends = end_tokens(folder, tokenizer, spec.vocab_size, config.rollout.stop_token_ids)
    loader = _loader(config.data, config.trainer.seed, train_data)
    # Of validation too: the rule has to know how to score each of them.
    data_sources = set(train_data.data_sources)
    if val_data is not None:
        data_sources |= set(val_data.data_sources)
    rule = make_reward(config.reward, config.custom_reward_function, data_sources)
    turn_notes: Sequence[str] = ()
    if environments is not None:
        turn_notes = check_conversations(environments, tokenizer, ends.of_model)
        loss, turns = config.actor.policy_loss, config.environment.max_turns
        # Without such a note no turn begins a row, as far as is known.
        if turn_notes and POLICY_LOSSES[loss].whole_trajectories:
            cut = micro_batching_of(config, "actor")
            turn_notes = [*turn_notes, *rows_of_trajectory_notes(config.data, turns, loss, cut)]
    return RunInputs(spec, tokenizer, ends, train_data, val_data, loader, rule, turn_notes)


def _dataset(
    data: DataConfig,
    tokenizer: Any,
    key: Literal["train_files", "val_files"],
    vocab_size: int,
    environments: Environments | None,
) -> PromptDataset:
    return PromptDataset(
        getattr(data, key),
        tokenizer,
        data.max_prompt_length,
        data.overlong_prompts,
        data.val_max_samples if key == "val_files" else -1,
        key=f"data.{key}",
        cache_dir=data.cache_dir,
        vocab_size=vocab_size,
        offered=offered_tools(environments),
    )


def _loader(data: DataConfig, seed: int, train_data: PromptDataset) -> PromptLoader:
    curriculum, own = None, data.curriculum
    if own.path is not None:
        curriculum = Curriculum(own.path, own.name, own.kwargs)
    return PromptLoader(
        train_data,
        # Dynamic sampling drops groups, so it may draw more prompts at a time than a step needs.
        data.gen_batch_size or data.train_batch_size,
        seed,
        data.shuffle,
        data.train_weights,
        curriculum,
    )

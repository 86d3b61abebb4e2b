"""The job whose step is measured, and the rows that all sides compute.

Invariant: every side reads the same job file, so that model, prompts, lengths and batch sizes are
the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from rlhf3d.config.derived import Derived, derive
from rlhf3d.config.load import load_config
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.parallel.platform import CPUPlatform

if TYPE_CHECKING:
    from rlhf3d.batching.batch import Batch

PLATFORM = CPUPlatform("benchmark")
ROWS = 1_000_000
"""Stands for the rows of the training data where only lengths of a run would depend on it."""


@dataclass(frozen=True)
class Sizes:
    """What a step works on."""

    model: str
    data: str
    prompts: int
    completions: int
    """Of each prompt."""
    prompt_tokens: int
    """At most."""
    response_tokens: int
    """At most."""
    overrides: tuple[str, ...] = ()
    """Further keys of the job, as `key=value`."""


class Read(NamedTuple):
    """A job as a process of it would read it."""

    config: Config
    derived: Derived
    spec: ModelSpec


def write_job(sizes: Sizes, folder: Path) -> Path:
    """GRPO with a reference model, one optimizer step a batch, in one process."""
    path, sequences = folder / "job.yaml", sizes.prompts * sizes.completions
    job = {
        "model": {"path": sizes.model, "dtype": "bfloat16"},
        "data": {
            "train_files": [sizes.data],
            "train_batch_size": sizes.prompts,
            "max_prompt_length": sizes.prompt_tokens,
            "max_response_length": sizes.response_tokens,
            "overlong_prompts": "filter",
        },
        "actor": {
            "optim": {"lr": 1.0e-6, "weight_decay": 0.0},
            "ppo_mini_batch_size": sizes.prompts,
            # Of one process, and of each of two replicas.
            "ppo_micro_batch_size_per_gpu": max(1, min(8, sequences // 2)),
            "use_kl_loss": True,
            "kl_loss_coef": 0.001,
        },
        "rollout": {"n": sizes.completions, "dtype": "bfloat16", "canary_steps": 1},
        "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False},
        "reward": {"method": "flexible"},
        "trainer": {
            "total_training_steps": 1,
            "val_before_train": False,
            "test_freq": 0,
            "save_at_end": False,
            "output_dir": str(folder / "run"),
        },
        "cluster": {"platform": "cpu"},
    }
    path.write_text(yaml.safe_dump(job))
    read_job(path, sizes.overrides)  # a mistake in a key or a folder shows here
    return path


def read_job(path: Path, overrides: Sequence[str] = ()) -> Read:
    """The job, its `auto` values replaced. ValueError for a wrong key or model folder."""
    config = resolve_platform(load_config(path, overrides), PLATFORM)
    return Read(config, derive(config, ROWS), load_spec(config.model.path))


def read_prompts(config: Config, count: int) -> list[tuple[int, ...]]:
    """The first prompts of the data, tokenized, that are not too long."""
    from rlhf3d.data.dataset import PromptDataset
    from rlhf3d.tokenizer.load import load_tokenizer

    data = config.data
    tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
    prompts = PromptDataset(
        data.train_files, tokenizer, data.max_prompt_length, data.overlong_prompts
    )
    found = [prompt.prompt_ids for prompt in islice(prompts, count)]
    if len(found) < count:
        raise ValueError(f"{', '.join(data.train_files)}: {len(found)} prompts, {count} are needed")
    return found


def make_rows(read: Read, prompts: Sequence[Sequence[int]], completions: int) -> Batch:
    """Completions of random tokens, half of the longest length to all of it, and their columns."""
    import torch

    from rlhf3d.batching.batch import from_sequences

    draw, longest = random.Random(0), read.config.data.max_response_length
    asked: list[Sequence[int]] = []
    answers: list[list[int]] = []
    for prompt in prompts:
        for _ in range(completions):
            length = draw.randint((longest + 1) // 2, longest)
            asked.append(prompt)
            answers.append([draw.randrange(read.spec.vocab_size) for _ in range(length)])
    batch = from_sequences(asked, answers, pad_id=0)
    advantages = torch.randn(len(batch), generator=torch.Generator().manual_seed(0))
    mask = batch["response_mask"]
    return batch.with_columns(
        old_logprobs=torch.zeros_like(mask),
        ref_logprobs=torch.zeros_like(mask),
        advantages=advantages[:, None] * mask,
    )


def lengths_of(batch: Batch, prompts: int, completions: int) -> dict[str, Any]:
    """The arguments of `step_limits.Rows` for a batch."""
    responses = batch["response_lengths"]
    return {
        "prompts": prompts,
        "completions": completions,
        "prompt": float(batch["prompt_lengths"].float().mean()),
        "response": float(responses.float().mean()),
        "longest": float(responses.max()),
    }

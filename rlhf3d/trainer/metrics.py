"""The figures of a step, by verl's names where it has them.

Invariant: they depend on the step's rows only, not on how the rows were cut into micro-batches or over ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf3d.algorithms.health import explained_variance, logprob_mismatch
from rlhf3d.batching.batch import Batch
from rlhf3d.rewards.scoring import Outcome, Score
from rlhf3d.rollout.api import Completion

MISMATCH = {
    "training/rollout_probs_diff_mean": "prob_diff_mean",
    "training/rollout_probs_diff_max": "prob_diff_max",
    "training/rollout_logprobs_diff_mean": "abs_diff_mean",
    "training/rollout_logprobs_diff_max": "abs_diff_max",
    "training/rollout_actor_probs_pearson_corr": "pearson_r",
    "training/rollout_kl_k3": "kl_k3",
}
"""Metric name of each figure of `logprob_mismatch`."""


def _spread(name: str, values: Tensor) -> dict[str, float]:
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/max": values.max().item(),
        f"{name}/min": values.min().item(),
    }


def score_metrics(scores: Sequence[Score], n: int) -> dict[str, float]:
    """Score statistics, the count of each outcome, and the share of prompts whose completions differ in score."""
    values = torch.tensor([s.value for s in scores])
    outcomes = Counter(s.outcome for s in scores)
    metrics = _spread("critic/score", values)
    for outcome in Outcome:
        metrics[f"reward/outcome/{outcome.value}"] = float(outcomes[outcome])
    if n > 1:
        groups = values.view(-1, n)
        metrics["reward/mixed_groups_share"] = (groups.amax(1) > groups.amin(1)).float().mean().item()
    return metrics


def length_metrics(completions: Sequence[Completion], prompt_lengths: Tensor) -> dict[str, float]:
    """Token counts, the share cut off at the limit, and the share of empty responses."""
    lengths = torch.tensor([float(len(c.token_ids)) for c in completions])
    return {
        **_spread("response_length", lengths),
        "response_length/clip_ratio": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "response/aborted_ratio": (lengths == 0).float().mean().item(),
        "prompt_length/mean": prompt_lengths.float().mean().item(),
    }


def training_metrics(batch: Batch) -> dict[str, float]:
    """Reward, advantage, return and value statistics, and how far engine and trainer disagree on the samples."""
    mask = batch["response_mask"].bool()
    metrics = {
        **_spread("critic/rewards", batch["token_level_rewards"].sum(-1)),
        **_spread("critic/advantages", batch["advantages"][mask]),
        **_spread("critic/returns", batch["returns"][mask]),
    }
    if "values" in batch:
        metrics |= _spread("critic/values", batch["values"][mask])
        metrics["critic/vf_explained_var"] = explained_variance(batch["values"], batch["returns"], mask)
    mismatch = logprob_mismatch(batch["rollout_logprobs"], batch["old_logprobs"], mask)
    return metrics | {name: mismatch[key] for name, key in MISMATCH.items()}


def throughput_metrics(metrics: dict[str, float], ranks: int) -> dict[str, float]:
    """Tokens a second of a step: of all phases together (a rank's share, as in verl), and of generation alone."""
    step_s = metrics["timing_s/step"]
    return {
        "perf/time_per_step": step_s,
        "perf/throughput": metrics["perf/total_num_tokens"] / step_s / ranks,
        "perf/generate_tokens_per_s": metrics["perf/response_tokens"] / max(metrics["timing_s/generate"], 1e-9),
    }

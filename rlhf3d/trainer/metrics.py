"""The figures of a step, by verl's names where it has them.

Invariant: they depend on the step's rows only, not on how the rows were cut into micro-batches or over ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf3d.algorithms.groups import groups_with_signal
from rlhf3d.algorithms.health import explained_variance, logprob_mismatch
from rlhf3d.batching.batch import Batch
from rlhf3d.rewards.reward_model import PART
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.trainer.experience import Experience, Scored

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


def rollout_metrics(
    scored: Scored, n: int, overlong: bool, max_response_length: int
) -> dict[str, float]:
    """Figures of what was generated and what it is worth; `overlong`: with those of the overlong penalty."""
    metrics = score_metrics(scored, n) | length_metrics(scored.experience, max_response_length)
    if overlong:
        penalty = scored.rewards - torch.tensor([s.value for s in scored.scores])
        metrics["reward/overlong_penalty/mean"] = penalty.mean().item()
        metrics["reward/overlong_share"] = (penalty < 0).float().mean().item()
    if scored.greedy_rewards is not None:
        metrics["reward/greedy_baseline/mean"] = scored.greedy_rewards.mean().item()
    return metrics


def score_metrics(scored: Scored, n: int) -> dict[str, float]:
    """Score statistics, the count of each outcome, and the share of prompts whose completions differ in reward."""
    outcomes = Counter(s.outcome for s in scored.scores)
    metrics = _spread("critic/score", scored.rewards[scored.written])
    for outcome in Outcome:
        metrics[f"reward/outcome/{outcome.value}"] = float(outcomes[outcome])
    metrics |= reward_model_metrics(scored.scores)
    if n > 1:
        signal = groups_with_signal(scored.rewards, scored.written, n)
        metrics["reward/mixed_groups_share"] = signal.float().mean().item()
    return metrics


def reward_model_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """What the reward model said, and how many of its inputs were cut; empty without one."""
    said = [score.extra for score in scores if PART in score.extra]
    if not said:
        return {}
    values = torch.tensor([extra[PART] for extra in said])
    return {
        **_spread("reward_model/score", values),
        "reward_model/score/std": values.std(correction=0).item(),
        "reward_model/truncated": float(sum(extra[f"{PART}_cut"] for extra in said)),
    }


def length_metrics(experience: Experience, max_response_length: int) -> dict[str, float]:
    """Token counts, shares of responses as long as allowed, of those cut off there, of empty ones.

    A response whose end token is the last one allowed is as long as allowed and not cut off.
    """
    lengths = torch.tensor([float(len(c.token_ids)) for c in experience.completions])
    prompts = torch.tensor([float(len(p.prompt_ids)) for p in experience.prompts])
    cut_off = sum(c.finish_reason == "length" for c in experience.completions)
    return {
        **_spread("response_length", lengths),
        "response_length/clip_ratio": (lengths == max_response_length).float().mean().item(),
        "response/truncated_ratio": cut_off / len(lengths),
        "response/aborted_ratio": (lengths == 0).float().mean().item(),
        **_spread("prompt_length", prompts),
        "perf/total_num_tokens": float((lengths + prompts).sum()),
        "perf/response_tokens": float(lengths.sum()),
    }


def training_metrics(batch: Batch) -> dict[str, float]:
    """Reward, advantage, return and value statistics, and how far engine and trainer disagree on the samples."""
    mask = batch["response_mask"].bool()
    metrics = {
        **_spread("critic/rewards", batch["token_level_rewards"].sum(-1)[mask.any(-1)]),
        **_spread("critic/advantages", batch["advantages"][mask]),
        **_spread("critic/returns", batch["returns"][mask]),
    }
    if "values" in batch:
        metrics |= _spread("critic/values", batch["values"][mask])
        metrics["critic/vf_explained_var"] = explained_variance(
            batch["values"], batch["returns"], mask
        )
    if (
        batch["old_logprobs"] is batch["rollout_logprobs"]
    ):  # two policies: the trainer's were not computed
        return metrics
    mismatch = logprob_mismatch(batch["rollout_logprobs"], batch["old_logprobs"], mask)
    return metrics | {name: mismatch[key] for name, key in MISMATCH.items()}


def throughput_metrics(metrics: dict[str, float], devices: int) -> dict[str, float]:
    """Tokens a second of a step: of all phases together (per device, as in verl), and of generation alone.

    Generation counts what dynamic sampling left out as well.
    """
    step_s = metrics["timing_s/step"]
    generated = metrics.get("perf/generated_tokens", metrics["perf/response_tokens"])
    return {
        "perf/time_per_step": step_s,
        "perf/throughput": metrics["perf/total_num_tokens"] / step_s / devices,
        "perf/generate_tokens_per_s": generated / max(metrics["timing_s/generate"], 1e-9),
    }

"""The figures of a step, by verl's names where it has them.

Invariant: they depend on the step's rows only, not on how the rows were cut into micro-batches or
over ranks. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from rlhf3d.algorithms.groups import groups_with_signal
from rlhf3d.algorithms.health import explained_variance, logprob_mismatch
from rlhf3d.algorithms.trajectories import join_rows, row_places
from rlhf3d.batching.batch import Batch
from rlhf3d.experience.scored import Experience
from rlhf3d.rewards.reward_model import PART
from rlhf3d.rewards.score import SCORING, Score
from rlhf3d.trainer.environment_metrics import environment_metrics

MISMATCH = {
    "training/rollout_probs_diff_mean": "prob_diff_mean",
    "training/rollout_probs_diff_max": "prob_diff_max",
    "training/rollout_logprobs_diff_mean": "abs_diff_mean",
    "training/rollout_logprobs_diff_max": "abs_diff_max",
    "training/rollout_actor_probs_pearson_corr": "pearson_r",
    "training/rollout_kl_k3": "kl_k3",
}
"""Metric name of each figure of `logprob_mismatch`, of tokens of the version being trained."""
OFF_POLICY = {
    "training/off_policy/probs_diff_mean": "prob_diff_mean",
    "training/off_policy/probs_diff_max": "prob_diff_max",
    "training/off_policy/logprobs_diff_mean": "abs_diff_mean",
    "training/off_policy/logprobs_diff_max": "abs_diff_max",
    "training/off_policy/kl_k3": "kl_k3",
}
"""The same of tokens of older versions: what training has changed since, and the mismatch."""
_PERCENTILES = (50, 90, 99)


def _spread(name: str, values: Tensor) -> dict[str, float]:
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/max": values.max().item(),
        f"{name}/min": values.min().item(),
    }


def rollout_metrics(
    experience: Experience, overlong: bool, max_response_length: int
) -> dict[str, float]:
    """What was generated and what it is worth; `overlong`: with the figures of the penalty."""
    metrics = score_metrics(experience) | length_metrics(experience, max_response_length)
    if overlong:
        # A reward is the score, with the rewards of turns, and this penalty: 0 or negative.
        penalty = experience.rewards - experience.metric("score")
        metrics["reward/overlong_penalty/mean"] = penalty.mean().item()
        metrics["reward/overlong_share"] = (penalty < 0).float().mean().item()
    metrics |= environment_metrics(experience)
    scored = experience.trajectories
    greedy = [one.greedy_reward for one in scored if one.greedy_reward is not None]
    if greedy:
        metrics["reward/greedy_baseline/mean"] = torch.tensor(greedy).mean().item()
    return metrics


def score_metrics(experience: Experience) -> dict[str, float]:
    """Rewards, the count of each outcome, and the share of groups whose rewards differ."""
    scores = [scored.score for scored in experience.trajectories]
    outcomes = Counter(score.outcome for score in scores)
    metrics = _spread("critic/score", experience.rewards[experience.written])
    for outcome in SCORING:
        metrics[f"reward/outcome/{outcome.value}"] = float(outcomes[outcome])
    metrics |= reward_model_metrics(scores)
    signal = groups_with_signal(experience.rewards, experience.written, experience.group_ids)
    if len(signal) < len(scores):  # groups of one never differ
        metrics["reward/mixed_groups_share"] = signal.float().mean().item()
    return metrics


def reward_model_metrics(scores: Sequence[Score]) -> dict[str, float]:
    """The reward model's scores, and how many of its inputs were cut; empty without one."""
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
    """Token counts, and shares of responses as long as allowed, cut off there, or empty.

    A response whose end token is the last one allowed is as long as allowed and not cut off.
    """
    trajectories = [scored.trajectory for scored in experience.trajectories]
    lengths = experience.lengths.float()
    # What each began with: an environment may have added to the prompt of the data.
    prompts = torch.tensor([float(len(t.rows[0].prompt_ids)) for t in trajectories])
    # Later rows read the conversation so far again: tokens that the models compute.
    later = chain.from_iterable(t.rows[1:] for t in trajectories)
    read_again = sum(len(row.prompt_ids) for row in later)
    cut_off = sum(t.finish_reason == "length" for t in trajectories)
    return {
        **_spread("response_length", lengths),
        **_percentiles("response_length", lengths),
        **_drawn_metrics(experience),
        "response_length/clip_ratio": (lengths == max_response_length).float().mean().item(),
        "response/truncated_ratio": cut_off / len(lengths),
        "response/aborted_ratio": (~experience.written).float().mean().item(),
        **_spread("prompt_length", prompts),
        "perf/total_num_tokens": float((lengths + prompts).sum()) + read_again,
        "perf/response_tokens": float(lengths.sum()),
    }


def _drawn_metrics(experience: Experience) -> dict[str, float]:
    """Lengths of all that was generated, where that is more than is trained on.

    `response_length_ratio/…`, trained on over generated: below 1 where long answers are left
    behind.
    """
    if not experience.drawn and not experience.left_out:
        return {}
    drawn = experience.drawn or experience.all_lengths
    lengths, trained = torch.tensor(drawn).float(), experience.lengths.float()
    name = "response_length_drawn"
    metrics = {f"{name}/mean": lengths.mean().item(), **_percentiles(name, lengths)}
    of_trained = {f"{name}/mean": trained.mean().item(), **_percentiles(name, trained)}
    for key in list(metrics):
        ratio = of_trained[key] / max(metrics[key], 1.0)
        metrics[key.replace("_drawn", "_ratio")] = ratio
    return metrics


def _percentiles(name: str, values: Tensor) -> dict[str, float]:
    # An answer's length, not one between two answers'.
    shares = torch.tensor(_PERCENTILES) / 100
    found = torch.quantile(values, shares, interpolation="higher")
    return {
        f"{name}/p{share}": value for share, value in zip(_PERCENTILES, found.tolist(), strict=True)
    }


def training_metrics(batch: Batch, fresh: Tensor) -> dict[str, float]:
    """Rewards, advantages, returns, values, and how far engine and trainer disagree.

    `fresh` [N, R]: tokens of the version being trained (`fresh_tokens`). Only of those the
    difference of log-probs is one of engines; that of older ones is reported by names of its own.
    """
    mask = batch["response_mask"].bool()
    metrics = {
        **_spread("critic/rewards", _trajectory_rewards(batch)),
        **_spread("critic/advantages", batch["advantages"][mask]),
        **_spread("critic/returns", batch["returns"][mask]),
    }
    if "values" in batch:
        metrics |= _spread("critic/values", batch["values"][mask])
        explained = explained_variance(batch["values"], batch["returns"], mask)
        metrics["critic/vf_explained_var"] = explained
    if batch["old_logprobs"] is batch["rollout_logprobs"]:
        return metrics  # bypass mode: the trainer's own log-probs were not computed
    rollout, trained = batch["rollout_logprobs"], batch["old_logprobs"]
    stale = mask & ~fresh
    if stale.any():
        gap = logprob_mismatch(rollout, trained, stale)
        metrics |= {name: gap[key] for name, key in OFF_POLICY.items()}
    if (mask & fresh).any() or not mask.any():
        mismatch = logprob_mismatch(rollout, trained, mask & fresh)
        metrics |= {name: mismatch[key] for name, key in MISMATCH.items()}
    return metrics


def _trajectory_rewards(batch: Batch) -> Tensor:
    """[t] sums of token rewards of the trajectories that have a token."""
    places = row_places(batch.columns)
    rewards = join_rows(batch["token_level_rewards"], places)
    mask = join_rows(batch["response_mask"], places)
    return rewards.sum(-1)[mask.bool().any(-1)]


def throughput_metrics(metrics: dict[str, float], devices: int) -> dict[str, float]:
    """Tokens a second: of the complete step (per device, as in verl), and of generation alone.

    Generation counts what dynamic sampling left out as well.
    """
    step_s = metrics["timing_s/step"]
    generated = metrics.get("perf/generated_tokens", metrics["perf/response_tokens"])
    # What was drawn ahead took longer than it was waited for.
    generate_s = metrics.get("async/drawn_s") or metrics["timing_s/generate"]
    return {
        "perf/time_per_step": step_s,
        "perf/throughput": metrics["perf/total_num_tokens"] / step_s / devices,
        "perf/generate_tokens_per_s": generated / max(generate_s, 1e-9),
    }

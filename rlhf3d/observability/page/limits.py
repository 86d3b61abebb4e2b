"""From where on a metric is not healthy: the limits of checks, curves and docs/metrics.md.

Invariant: each number stands here alone and says where it comes from; words are made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf3d.observability.metrics import KL_TO_REFERENCE
from rlhf3d.observability.page.findings import share

ENTROPY_LOW, ENTROPY_HIGH = 0.1, 2.0
"""Shares of the entropy at the start. Below the first nearly every token is decided, and samples of
a prompt hardly differ; twice the start is text that gets random."""
ENTROPY_NATS = 0.1
"""Below this many nats per token, too, before it is called collapsed: a base of low entropy may
lose much of it in good health."""
KL_NATS, KL_GROWTH = 0.2, 2.0
"""KL to the reference that is large (verl's and TRL's adaptive controllers aim at 0.1 or less a
token), and its growth in the second half that is no slowing drift."""
KL_FAR = 1.0
"""KL that is large however short the run: a token's odds differ by a factor of e on average."""
CLIPPED = 0.3
"""Share of tokens that the clip bound; PPO runs that learn stay at 0.05 to 0.2."""
MISMATCH_WATCH, MISMATCH_BAD = 0.01, 0.05
"""Mean difference of probabilities between engine and trainer: below the first is usual in
bfloat16; with the second, ratios are off by more than the usual clip range for unlikely tokens."""
CUT_WATCH, CUT_BAD = 0.1, 0.5
"""Share of completions cut off at the limit: they are mostly scored as wrong, whatever they would
have said."""
SIGNAL_WATCH, SIGNAL_BAD = 0.2, 0.05
"""Share of prompts whose completions differ in score: only these teach a group-based estimator."""
EARLY_STEPS = 20
"""Runs with fewer steps are not called flat, nor their value model or KL bad: the first steps of a
warmup change little, and what begins at 0 grows by a large factor."""
GRADIENT_RISE = 2.0
"""Gradient norm at the end over that at the start from which its rise is named."""
SPIKE = 5.0
"""Gradient norm over that of the steps before: the default of trainer.grad_spike_factor."""
FAILED = 0.05
"""Share of failed scorings or environments: the default of their max_error_rate."""
UNREADABLE = 0.5
"""Share of completions without a readable answer."""
EXPLAINED = 0.1
"""Share of the returns' variance below which a value model is hardly better than a constant."""
STALE_KL = 0.1
"""KL in nats per token between the policy that wrote and the one being trained: clip ranges of 0.2
are made for less."""
EFFECTIVE = 0.5
"""Effective share of the samples under importance weights: below, a few tokens carry the step."""
LEFT_BEHIND = 0.8
"""Length trained on over length generated, of the longest tenth."""


@dataclass(frozen=True)
class Healthy:
    """What is healthy of a metric."""

    words: str
    line: float | None = None
    """Where a check begins to warn, as curves show it."""


def _share(at: str, limit: float) -> Healthy:
    return Healthy(f"{at} {share(limit)}", limit)


HEALTHY: dict[str, Healthy] = {
    "actor/pg_clipfrac": _share("at most", CLIPPED),
    "actor/entropy": Healthy(
        f"at most {ENTROPY_HIGH:g} times that of the start, and at least the smaller of "
        f"{share(ENTROPY_LOW)} of it and {ENTROPY_NATS:g}"
    ),
    **dict.fromkeys(
        KL_TO_REFERENCE,
        Healthy(
            f"at most the larger of {KL_NATS:g} and {KL_GROWTH:g} times that of half-way, "
            f"judged from {EARLY_STEPS} steps on, before at most {KL_FAR:g}"
        ),
    ),
    "actor/grad_norm": Healthy("above 0, without spikes"),
    "actor/grad_norm_ratio": Healthy(f"at most {SPIKE:g}", SPIKE),
    "actor/skipped_steps": Healthy("0"),
    "actor/lr": Healthy("above 0"),
    "critic/vf_explained_var": Healthy(
        f"at least {share(EXPLAINED)}, judged from {EARLY_STEPS} steps on", EXPLAINED
    ),
    "response/truncated_ratio": _share("at most", CUT_WATCH),
    "reward/outcome/scored": Healthy(
        f"no failures (above {share(FAILED)} bad), at most {share(UNREADABLE)} unparsable"
    ),
    "reward/mixed_groups_share": _share("at least", SIGNAL_WATCH),
    "filter_groups/kept_share": _share("at least", SIGNAL_WATCH),
    "training/rollout_probs_diff_mean": Healthy(f"at most {MISMATCH_WATCH:g}", MISMATCH_WATCH),
    "rollout/engine_restarts": Healthy("0"),
    "training/off_policy/kl_k3": Healthy(f"at most {STALE_KL:g}", STALE_KL),
    "response_length_ratio/mean": Healthy(f"`/p90` at least {share(LEFT_BEHIND)}"),
    "env/outcome/env_error": Healthy(f"0 (above {share(FAILED)} of the trajectories bad)"),
    "rollout_corr/rollout_is_eff_sample_size": _share("at least", EFFECTIVE),
}
"""By metric; one stands for those beside it in its row of docs/metrics.md."""

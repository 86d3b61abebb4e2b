"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): generate until a step has enough groups with signal.

Invariant: all completions of a step are of one policy; at most so many batches are drawn, and an error ends a step
that could not be filled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf3d.algorithms.groups import groups_with_signal
from rlhf3d.trainer.experience import Scored, join


class TooFewGroups(RuntimeError):
    """A step could not be filled: the prompts are too hard, or solved."""


def fill_with_signal(
    draw: Callable[[], Scored], groups: int, n: int, metric: str, max_batches: int
) -> tuple[Scored, dict[str, float]]:
    """(the first `groups` groups of n completions that differ in `metric`; figures), from at most `max_batches` draws.

    Surplus groups are dropped: the next step's policy is another. TooFewGroups when the draws do not suffice.
    """
    drawn: list[Scored] = []
    parts: list[Scored] = []
    found = 0
    while found < groups and len(drawn) < max_batches:
        scored = draw()
        signal = groups_with_signal(scored.metric(metric), scored.written, n)
        drawn.append(scored)
        parts.append(scored.take(signal.nonzero().flatten().tolist(), n))
        found += int(signal.sum())
    everything = torch.cat([part.rewards for part in drawn])
    generated = len(everything) // n
    if found < groups:
        raise TooFewGroups(_too_few(found, groups, generated, len(drawn), metric, everything))
    return join(parts).take(range(groups), n), {
        "train/num_gen_batches": float(len(drawn)),
        "filter_groups/generated": float(generated),
        "filter_groups/kept_share": found / generated,
        "filter_groups/surplus": float(found - groups),
        "filter_groups/generated_score/mean": float(everything.mean()),
        "perf/generated_tokens": float(sum(part.experience.response_tokens for part in drawn)),
    }


def _too_few(
    found: int, groups: int, generated: int, batches: int, metric: str, rewards: torch.Tensor
) -> str:
    return (
        f"algorithm.filter_groups: after {batches} batches only {found} of {generated} groups differ in {metric}, "
        f"{groups} are needed (algorithm.filter_groups.max_num_gen_batches = {batches}). Scores are between "
        f"{rewards.min():g} and {rewards.max():g}, mean {rewards.mean():.3g}: use prompts that are neither too hard "
        "nor solved by now, raise rollout.n or max_num_gen_batches, or set algorithm.filter_groups.enable=false"
    )

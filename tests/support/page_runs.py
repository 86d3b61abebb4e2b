"""Runs that a page is made of: folders with metrics and samples, as a run writes them.

Invariant: the same arguments make the same files.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf3d.observability.metrics import MetricsWriter
from rlhf3d.observability.page.setup import Setup
from rlhf3d.observability.samples import Sample, write_samples
from rlhf3d.observability.tokens import TokenSpan, TrajectoryTokens

Row = dict[str, Any]


def healthy_row(step: int, steps: int, rng: random.Random) -> Row:
    """A step of a run that learns, with the noise of one."""
    part = step / steps
    reward = 0.1 + 0.7 * part + rng.gauss(0, 0.04)
    generate, update = 12 + rng.gauss(0, 1), 20 + rng.gauss(0, 1)
    return {
        "critic/score/mean": reward,
        "critic/score/max": 1.0,
        "actor/loss": rng.gauss(0, 0.01),
        "actor/entropy": 1.2 - 0.8 * part + rng.gauss(0, 0.02),
        "actor/kl_loss": 0.08 * part + abs(rng.gauss(0, 0.002)),
        "actor/ppo_kl": 0.002 + rng.gauss(0, 0.0005),
        "actor/pg_clipfrac": 0.05 + abs(rng.gauss(0, 0.02)),
        "actor/pg_clipfrac_lower": 0.001,
        "actor/grad_norm": 0.8 + abs(rng.gauss(0, 0.1)),
        "actor/grad_norm_ratio": 1.0 + rng.gauss(0, 0.1),
        "actor/lr": 1e-6,
        "training/rollout_probs_diff_mean": 0.002 + abs(rng.gauss(0, 0.0005)),
        "training/rollout_probs_diff_max": 0.08 + abs(rng.gauss(0, 0.02)),
        "response_length/mean": 200 + 300 * part + rng.gauss(0, 15),
        "response_length/p90": 320 + 400 * part + rng.gauss(0, 25),
        "response/truncated_ratio": 0.02 + abs(rng.gauss(0, 0.005)),
        "reward/mixed_groups_share": 0.6 + rng.gauss(0, 0.05),
        "reward/outcome/scored": 62.0,
        "reward/outcome/unparsable": 2.0,
        "reward/outcome/timeout": 0.0,
        "reward/outcome/error": 0.0,
        "perf/throughput": 1500 + rng.gauss(0, 50),
        "perf/generate_tokens_per_s": 5200 + rng.gauss(0, 200),
        "timing_s/sync_weights": 0.8,
        "timing_s/generate": generate,
        "timing_s/score": 0.4,
        "timing_s/old_logprobs": 3.0,
        "timing_s/ref_logprobs": 3.0,
        "timing_s/update_actor": update,
        "timing_s/step": generate + update + 8.0,
    }


def healthy_rows(steps: int, seed: int = 0) -> list[Row]:
    """Rows 1 to `steps`."""
    rng = random.Random(seed)
    return [{"step": step, **healthy_row(step, steps, rng)} for step in range(1, steps + 1)]


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """`metrics.jsonl` of those rows."""
    with MetricsWriter(folder) as writer:
        for row in rows:
            writer.write(row["step"], {key: row[key] for key in row if key != "step"})
    return folder


def with_validation(row: Mapping[str, Any], accuracy: float, prompts: float = 500) -> Row:
    """The row of a step that validates."""
    name = "val-aux/math/acc/greedy/ci_"
    error = 1.96 * (accuracy * (1 - accuracy) / prompts) ** 0.5
    return {
        **row,
        "val-core/math/acc/greedy": accuracy,
        "val-aux/math/num_prompts": prompts,
        f"{name}low": accuracy - error,
        f"{name}high": accuracy + error,
        "timing_s/validate": 30.0,
    }


def sample(prompt: str, answer: str, score: float, length: int = 12) -> Sample:
    """A completion that was scored, all of it read as the answer."""
    return Sample(prompt, answer, "42", score, "scored", length, "stop", 0, answer=answer)


def write_answers(
    folder: Path, step: int, answers: Mapping[str, Iterable[tuple[str, float]]]
) -> None:
    """A step's samples: of each prompt its answers with their scores."""
    found = []
    for prompt, given in answers.items():
        found += [sample(prompt, text, score) for text, score in given]
    write_samples(folder, step, found)


def trajectory(
    number: int, difference: float, texts: Iterable[str] = ("I", " think", " 42")
) -> TrajectoryTokens:
    """A prompt and an answer; engine and trainer part by `difference` on the second token."""
    texts = list(texts)
    prompt = TokenSpan("prompt", [1, 2], ["What", "?"])
    own = [-0.5] * len(texts)
    trained = [-0.5, -0.5 - difference, *[-0.5] * (len(texts) - 2)]
    sampled = TokenSpan("sampled", list(range(len(texts))), texts, [(0, 3)], 0.0, own, trained)
    return TrajectoryTokens(number, 0, "math", 1.0, "scored", "stop", [[prompt, sampled]], 3)


def setup(**changed: Any) -> Setup:
    """Of a run that does already what could be advised against the time that it takes."""
    return replace(
        Setup(
            about="PPO (gae), tiny float32",
            scoring="The score is `judge` in rewards.py.",
            needs_groups=True,
            old_from_engine=False,
            max_staleness=1,
            on_cpu=True,
            epochs=1,
            mini_batches=1,
            kl_term=True,
            dynamic_sampling=True,
            micro_batches=1,
            stages=1,
            stage_parts=1,
            packed=True,
            decoded_at_once=64,
            completions_per_prompt=8,
            sequences=32,
            response_limit=20,
            overlong_penalty=False,
            scores_last_number=False,
            custom_reward=True,
            reward_workers=1,
            test_freq=0,
            save_freq=0,
            async_save=True,
        ),
        **changed,
    )

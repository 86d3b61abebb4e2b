"""The time model against published measurements: within 25 %, with the same hardware numbers for
all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf3d.config.load import build
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import load_spec
from rlhf3d.planning.hardware import load_hardware, parse_cluster
from rlhf3d.planning.job import Lengths
from rlhf3d.planning.plan import SHAPES, make_plan
from rlhf3d.planning.search.plan import TimedPlan, with_time

ROOT = Path(__file__).parents[3]
RUNS = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
COMPLETIONS, PROMPT_TOKENS, LONGEST_PROMPT = 32, 110, 128
TOLERANCE = 0.25


def planned(run: dict[str, Any]) -> TimedPlan:
    """The same job as one of ours."""
    layout = {"overlap_grad_reduce": True, "overlap_param_gather": True, **run["layout"]}
    # Importance weights take no time of their own, and need the old log-probs' pass.
    correction = {} if run.get("on_policy") else {"rollout_is": "token"}
    raw = {
        "cluster": {"platform": "cuda"},
        "model": {"use_remove_padding": True, "dtype": "bfloat16", "offload": True},
        "data": {
            "train_batch_size": run["prompts"],
            "max_prompt_length": LONGEST_PROMPT,
            "max_response_length": run["longest"] - LONGEST_PROMPT,
        },
        "actor": {
            "layout": layout,
            "ppo_mini_batch_size": run["mini"],
            "use_dynamic_bsz": True,
            "ppo_max_token_len_per_gpu": run["longest"],
            "use_kl_loss": True,
        },
        "algorithm": {"adv_estimator": "grpo", "rollout_correction": correction},
        "rollout": {
            "n": COMPLETIONS,
            "engines": run["engines"],
            "tensor_parallel_size": run["engine_tp"],
            "gpu_memory_utilization": 0.6,
            "sleep": True,
            "enforce_eager": False,
            "max_num_seqs": 256,
        },
        "trainer": {"save_freq": 0},
    }
    mistakes: list[str] = []
    config = build(Config(), raw, "", mistakes)
    assert not mistakes
    cluster = parse_cluster(f"{run['gpus']}xH100", load_hardware())
    spec = load_spec(SHAPES / run["model"], with_weights=False)
    return with_time(
        make_plan(config, spec, cluster, lengths=Lengths(PROMPT_TOKENS, run["response"]))
    )


def row(run: dict[str, Any]) -> str:
    """Its line in docs/planning.md.

    `python tests/unit/planning/test_published.py` prints those of today.
    """
    made = planned(run)
    generate = next(phase.total for phase in made.time.phases if phase.phase == "generate")
    off = made.step_s / run["seconds"] - 1
    return (
        f"| {run['model']} | {run['gpus']} | {run['release']} | {run['seconds']} | "
        f"{made.step_s:.0f} | {off:+.0%} | {generate:.0f} |"
    )


@pytest.mark.parametrize(
    "run", RUNS, ids=lambda run: f"{run['model']}-{run['gpus']}-{run['release']}"
)
def test_within_a_quarter_of_what_was_measured(run: dict[str, Any]) -> None:
    made = planned(run)
    assert made.verdict == "fits"
    assert made.step_s == pytest.approx(run["seconds"], rel=TOLERANCE)
    assert row(run) in (ROOT / "docs/planning.md").read_text()


if __name__ == "__main__":
    print("\n".join(map(row, RUNS)))

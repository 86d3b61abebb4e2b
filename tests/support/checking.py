"""Configurations with overrides, and what the checks say of them."""

from __future__ import annotations

from rlhf3d.config.load import build, merge, parse_override
from rlhf3d.config.schema import Config

GOOD = (
    "model.path=m",
    "data.train_files=t.parquet",
    "data.train_batch_size=16",
    "actor.ppo_mini_batch_size=16",
)
QUANTISED = (
    "rollout.quantization=fp8_per_channel",
    "algorithm.rollout_correction.rollout_is=token",
)
BYPASS = "algorithm.rollout_correction.bypass_mode=true"
IN_FLIGHT = "rollout={update: in_flight, max_staleness: 1, placement: disaggregated}"
GPUS_8 = "cluster={platform: cuda, gpus_per_node: 8}"
GPUS_4 = "cluster={platform: cuda, gpus_per_node: 4}"
BUDGET = "actor.use_dynamic_bsz=true"


def make(*overrides: str) -> Config:
    raw: dict = {}
    for override in (*GOOD, *overrides):
        merge(raw, parse_override(override))
    mistakes: list[str] = []
    config = build(Config(), raw, "", mistakes)
    assert not mistakes
    return config


def says(problem: str, expected: str) -> bool:
    """Whether a message has these pieces, which … separates, in this order."""
    for piece in expected.split(" … "):
        _, found, problem = problem.partition(piece)
        if not found:
            return False
    return True

"""Engines are killed in every phase, and the run goes on with the same numbers.

One run is compared with the same one, undisturbed. `test_learning.py` kills in `make test`: where
requests are lost, and where senders wait for the engine that dies. A death that is found before the
next sync, or by `sleep`, ends in the same restart (`tests/unit/trainer/test_weight_sync.py` has
both).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.jobs import read_rows, train, train_with_deaths, write_job
from support.same_run import assert_same

JOB = (
    "algorithm.adv_estimator=grpo",
    "rollout.n=2",
    "rollout.engine_restarts=4",
    "data.train_batch_size=32",
    # Long enough that some completions are answered while others are being written.
    "data.max_response_length=64",
    "rollout.max_num_seqs=16",
    "trainer.total_training_steps=2",
    "trainer.val_before_train=false",
)
TWO_ENGINES = ("rollout.engines=2", "actor.layout.tp=2", "rollout.sleep=true")
TWO_RANKS = (
    "rollout.tensor_parallel_size=2",
    "rollout.placement=disaggregated",
    "actor.layout.pp=2",
)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "layout, moments",
    [
        # Phase, which one of them, engine, rank. The first of all weights is the run's own, the
        # second what the death in `generate` takes.
        pytest.param(
            TWO_ENGINES,
            "generate:1:1:0,update_actor:1:0:0,sync_weights:3:1:0,sleep:2:0:0",
            id="two engines, every phase",
        ),
        pytest.param(
            TWO_RANKS,
            "generate:1:0:1,sync_weights:3:0:0",
            id="two ranks",
        ),
    ],
)
def test_a_run_whose_engines_die_is_the_same_run_to_the_bit(
    layout: tuple[str, ...], moments: str, tmp_path: Path
) -> None:
    job = write_job(tmp_path)
    quiet = train(job, *JOB, *layout)
    assert quiet.returncode == 0, quiet.stdout[-2000:] + quiet.stderr[-4000:]
    run = tmp_path / "deaths"
    deaths = train_with_deaths(job, moments, *JOB, *layout, f"trainer.output_dir={run}")
    assert deaths.returncode == 0, deaths.stdout[-2000:] + deaths.stderr[-4000:]
    for number, moment in enumerate(moments.split(","), 1):
        assert f"kill {moment}" in deaths.stdout
        assert f"({number} of rollout.engine_restarts=4)" in deaths.stdout
    assert read_rows(run)[-1]["rollout/engine_restarts"] == len(moments.split(","))
    assert_same(run, tmp_path / "run")

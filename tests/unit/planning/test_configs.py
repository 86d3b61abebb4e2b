"""The jobs for GPUs that ship: each fits what its comment says, and the comment's figures are the
plan's.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf3d.config.load import load_config
from rlhf3d.planning.plan import SHAPES, find_cluster, find_spec, make_plan
from rlhf3d.planning.search.plan import TimedPlan, with_time
from rlhf3d.planning.search.ranking import Search
from rlhf3d.units import GIB

ROOT = Path(__file__).parents[3]
PLANNED = [
    path for path in sorted((ROOT / "configs").glob("*.yaml")) if "# plan on" in path.read_text()
]
COMMENT = re.compile(r"# plan on (\S+): .*")


def comment(plan: TimedPlan, gpus: str) -> str:
    """The line that a configuration carries.

    `python tests/unit/planning/test_configs.py` writes those of today.
    """
    rank, phase = plan.memory.peak
    assert plan.memory.device_limit is not None
    return (
        f"# plan on {gpus}: {phase.total / GIB:.0f} of {plan.memory.device_limit / GIB:.0f} GiB at "
        f"most ({phase.phase} on {rank.place}), {plan.step_s:.0f} s a step ({_most(plan)}), "
        "not measured"
    )


def _most(plan: TimedPlan) -> str:
    """Where the seconds go: the longest phases, or the two sides that lie beside each other."""
    assert plan.time is not None
    schedule = plan.time.schedule
    if schedule.mode != "in_turn":
        return (
            f"engines {schedule.engines_s:.0f} beside training {schedule.training_s:.0f}, with "
            f"this split in turn {plan.time.in_turn_s:.0f}"
        )
    longest = sorted(plan.time.phases, key=lambda phase: -phase.total)[:3]
    return ", ".join(f"{phase.phase} {phase.total:.0f}" for phase in longest)


def planned(path: Path) -> tuple[TimedPlan, str]:
    config = load_config(path)
    cluster = find_cluster(config.cluster, None)
    plan = with_time(make_plan(config, find_spec(config.model.path)[0], cluster))
    return plan, f"{cluster.devices}x{cluster.hardware.name}"


def test_every_gpu_job_is_planned() -> None:
    cuda = [
        path
        for path in (ROOT / "configs").glob("*.yaml")
        if load_config(path).cluster.platform == "cuda"
    ]
    assert sorted(cuda) == PLANNED and len(cuda) >= 8


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_shipped_job_fits_and_its_comment_is_true(path: Path) -> None:
    plan, gpus = planned(path)
    assert plan.verdict == "fits"
    assert plan.job.devices_needed == plan.job.cluster.devices
    found = COMMENT.search(path.read_text())
    assert found is not None and found.group(1) == gpus
    assert found.group(0) == comment(plan, gpus)


@pytest.mark.parametrize("name", ["async_7b.yaml", "async_32b.yaml"])
def test_asynchronous_jobs_are_split_as_a_search_splits_them(name: str) -> None:
    plan, _ = planned(ROOT / "configs" / name)
    job = plan.job
    found = Search(job.config, job.spec, job.cluster, None, job.lengths).run()
    best = found.best[0]
    assert (best.job.training_devices, best.job.engine_ranks) == (
        job.training_devices,
        job.engine_ranks,
    )
    assert plan.step_s <= 1.02 * best.step_s
    schedule = plan.time.schedule
    # Neither side of a step is idle for more than a quarter of it, the sync included.
    assert max(schedule.engines_wait_s, schedule.training_waits_s) < 0.25 * plan.step_s
    assert plan.time.in_turn_s > 1.5 * plan.step_s


def test_the_asynchronous_quickstart_is_the_quickstart_one_update_behind() -> None:
    made, base = (
        load_config(ROOT / "configs" / f"{name}.yaml")
        for name in ("quickstart_async", "quickstart")
    )
    assert made.rollout == replace(base.rollout, max_staleness=1)
    assert made.algorithm.rollout_correction.bypass_mode
    assert made.data == base.data and made.actor == base.actor


@pytest.mark.parametrize("folder", sorted(SHAPES.iterdir()), ids=lambda path: path.name)
def test_shapes_are_read_and_of_the_published_size(folder: Path) -> None:
    from rlhf3d.models.spec import load_spec
    from rlhf3d.planning.engines import engine_elements

    billions = {
        "SmolLM2-135M": 0.1345,
        "Qwen2.5-0.5B": 0.494,
        "Qwen2.5-1.5B": 1.544,
        "Qwen2.5-7B": 7.616,
        "Qwen2.5-32B": 32.76,
    }
    billions |= {
        "Llama-3.1-70B": 70.55,
        "Llama-3.1-405B": 405.9,
        "Qwen3-30B-A3B": 30.53,
        "reward_model": 0.1345,
    }
    billions |= {
        "Llama-3.1-8B": 8.030,
        "Qwen3-32B": 32.76,
        "Qwen3-235B-A22B": 235.1,
        "Mixtral-8x7B-Instruct-v0.1": 46.70,
    }
    spec = load_spec(folder, with_weights=False)
    assert engine_elements(spec, 1, False) / 1e9 == pytest.approx(
        billions[folder.name.removesuffix("-Instruct")], rel=1e-3
    )


if __name__ == "__main__":
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        if load_config(file).cluster.platform == "cuda":
            made, name = planned(file)
            file.write_text(COMMENT.sub(comment(made, name), file.read_text()))
            print(file.name, made.verdict, comment(made, name), *made.problems, *made.memory.tight)

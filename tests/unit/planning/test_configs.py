"""The jobs for GPUs that ship: each fits what its comment says, and the comment's figures are the
plan's.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf3d.config.load import load_config
from rlhf3d.planning.plan import SHAPES, find_spec
from rlhf3d.planning.search.command import find_cluster
from rlhf3d.planning.search.plan import TimedPlan, make_timed_plan
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
    longest = sorted(plan.time.phases, key=lambda phase: -phase.total)[:3]
    most = ", ".join(f"{phase.phase} {phase.total:.0f}" for phase in longest)
    return (
        f"# plan on {gpus}: {phase.total / GIB:.0f} of {plan.memory.device_limit / GIB:.0f} GiB at "
        f"most ({phase.phase} on {rank.place}), {plan.step_s:.0f} s a step ({most}), not measured"
    )


def planned(path: Path) -> tuple[TimedPlan, str]:
    config = load_config(path)
    cluster = find_cluster(config.cluster, None)
    plan = make_timed_plan(config, find_spec(config.model.path)[0], cluster)
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


@pytest.mark.parametrize("folder", sorted(SHAPES.iterdir()), ids=lambda path: path.name)
def test_shapes_are_read_and_of_the_published_size(folder: Path) -> None:
    from rlhf3d.models.spec import load_spec
    from rlhf3d.planning.engines import engine_elements

    billions = {
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

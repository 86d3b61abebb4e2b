"""What a search may propose: only what a run accepts and what fits, and it says why the rest does
not.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.config.checks import check
from rlhf3d.config.load import load_config
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import load_spec
from rlhf3d.planning.hardware import load_hardware, parse_cluster
from rlhf3d.planning.job import Lengths
from rlhf3d.planning.plan import make_plan
from rlhf3d.planning.search.plan import with_time
from rlhf3d.planning.search.ranking import Found, Search
from rlhf3d.planning.search.space import layouts

ROOT = Path(__file__).parents[3]
MATH = load_config(ROOT / "configs/math.yaml")


def found(gpus: str, model: str, config: Config = MATH) -> Found:
    spec = load_spec(ROOT / "configs/models" / model, with_weights=False)
    return Search(config, spec, parse_cluster(gpus, load_hardware()), 7500, Lengths(256, 600)).run()


@cache
def math_on_8() -> Found:
    """The search that several tests look at."""
    return found("8xH100", "Qwen2.5-7B-Instruct")


def test_best_ones_are_accepted_and_fit_and_are_in_order() -> None:
    result = math_on_8()
    assert len(result.best) == 5
    steps = [plan.time.step_s for plan in result.best]
    assert steps == sorted(steps)
    for plan in result.best:
        assert not plan.problems and not check(plan.job.config)
        assert plan.job.devices_needed <= 8
    assert len({plan.job.derived.layout for plan in result.best}) > 1
    asleep = next(
        plan for plan in result.best if plan.job.config.rollout.sleep
    )  # room that only sleeping engines leave
    woken = replace(asleep.job.config, rollout=replace(asleep.job.config.rollout, sleep=False))
    assert with_time(make_plan(woken, asleep.job.spec, asleep.job.cluster)).verdict != "fits"
    assert result.near
    for plan in result.near:
        assert [*plan.problems, *plan.memory.tight][0].startswith("device memory: ")
        assert plan.step_s < steps[0]


def test_best_is_no_slower_than_what_ships() -> None:
    spec = load_spec(ROOT / "configs/models/Qwen2.5-7B-Instruct", with_weights=False)
    shipped = with_time(
        make_plan(MATH, spec, parse_cluster("8xH100", load_hardware()), 7500, Lengths(256, 600))
    )
    assert math_on_8().best[0].time.step_s <= shipped.time.step_s


def test_experts_are_shared_out_and_budgets_kept() -> None:
    actor = replace(MATH.actor, use_dynamic_bsz=True)
    packed = replace(MATH, actor=actor, model=replace(MATH.model, use_remove_padding=True))
    result = found("8xH100", "Qwen3-30B-A3B", packed)
    assert any(plan.job.derived.layout.ep > 1 for plan in result.best)
    assert all(plan.job.config.actor.use_dynamic_bsz for plan in result.best)


def test_fp8_engines_are_of_one_rank() -> None:
    correction = replace(MATH.algorithm.rollout_correction, rollout_is="token")
    fp8 = replace(
        MATH,
        algorithm=replace(MATH.algorithm, rollout_correction=correction),
        rollout=replace(MATH.rollout, quantization="fp8_per_channel"),
    )
    result = found("4xH100", "Qwen2.5-7B-Instruct", fp8)
    assert result.best and not any(check(plan.job.config) for plan in result.best)


def test_dedicated_engines_share_a_node() -> None:
    """As placement has them: all ranks of an engine on one node."""
    spec = load_spec(ROOT / "configs/models/Llama-3.1-405B-Instruct", with_weights=False)
    cluster = parse_cluster("32xH100", load_hardware())
    search = Search(MATH, spec, cluster, 7500, Lengths(256, 600))
    for dedicated in (0, 16):
        sizes = {engine.rollout.tensor_parallel_size for engine in search._engines(MATH, dedicated)}
        assert sizes == {1, 2, 4, 8}


def test_nothing_fits_a_device_that_is_too_small() -> None:
    result = found("1xA100", "Llama-3.1-70B-Instruct")
    assert result.best == ()
    assert "device memory" in result.near[0].problems[0] or "vLLM" in result.near[0].problems[0]


def test_stages_of_a_model_that_does_not_divide() -> None:
    spec = load_spec(ROOT / "configs/models/Llama-3.1-405B-Instruct", with_weights=False)
    uneven = [
        layout for layout in layouts(spec, 1024, 8, 4096) if layout.pp == 16 and layout.vpp is None
    ]
    assert {(layout.first_stage_layers, layout.last_stage_layers) for layout in uneven} == {(7, 7)}


def test_long_sequences_are_shared_out_over_context_ranks() -> None:
    spec = load_spec(ROOT / "configs/models/Qwen2.5-7B-Instruct", with_weights=False)
    sizes = {
        longest: {layout.cp for layout in layouts(spec, 8, 8, longest)}
        for longest in (4096, 8192, 32768)
    }
    assert sizes == {4096: {1}, 8192: {1, 2}, 32768: {1, 2, 4, 8}}
    result = found(
        "8xH100",
        "Qwen2.5-7B-Instruct",
        replace(MATH, data=replace(MATH.data, max_response_length=30720)),
    )
    assert any(plan.job.derived.layout.cp > 1 for plan in result.best)


def test_405b_on_1024_gpus_in_seconds() -> None:
    before = time.process_time()
    result = found("1024xH200", "Llama-3.1-405B-Instruct")
    assert time.process_time() - before < 30
    assert result.best and sum(result.counts.values()) > 2000


def test_command_writes_what_load_config_accepts(tmp_path: Path) -> None:
    target = tmp_path / "best.yaml"
    arguments = [
        "plan",
        str(ROOT / "configs/math.yaml"),
        "--gpus",
        "8xH100",
        "--search",
        "--write",
        str(target),
    ]
    shapes = ["--model-config", str(ROOT / "configs/models/Qwen2.5-7B-Instruct/config.json")]
    done = CliRunner().invoke(cli.app, [*arguments, *shapes, "--json"])
    assert done.exit_code == 0, done.exception
    best = json.loads(done.stdout)["best"][0]
    written = load_config(target)
    assert str(written.actor.layout.tp) in best["layouts"]["actor"]
    done = CliRunner().invoke(cli.app, ["plan", str(target), *shapes, "--check", "--json"])
    assert done.exit_code == 0
    again = json.loads(done.stdout)
    assert again["fits"] and again["time"]["step_s"] == pytest.approx(best["time"]["step_s"])


def test_search_needs_gpus_and_write_needs_search() -> None:
    quickstart = [str(ROOT / "configs/quickstart.yaml"), "--model-config"]
    shape = str(ROOT / "configs/models/Qwen2.5-0.5B-Instruct")
    for extra, message in (
        (["--search"], "give --gpus"),
        (["--write", "x.yaml"], "give --search as well"),
    ):
        done = CliRunner().invoke(cli.app, ["plan", *quickstart, shape, *extra])
        assert message in str(done.exception)


def test_a_hardware_file_is_read_as_a_configuration_is(tmp_path: Path) -> None:
    from rlhf3d.planning.hardware import FILE, load_hardware

    path = tmp_path / "own.yaml"
    path.write_text(Path(FILE).read_text())
    assert load_hardware(path) == load_hardware()
    for old, new, told in (
        ("cores: ", "cores: 1_", "which is no number or name"),
        ("measured: ", "measured: yes #", "which is no number or name"),
    ):
        path.write_text(Path(FILE).read_text().replace(old, new, 1))
        with pytest.raises(ValueError, match=told):
            load_hardware(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="expected sections"):
        load_hardware(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_hardware(path)

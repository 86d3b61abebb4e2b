"""What of a step overlaps in each mode, by hand."""

from __future__ import annotations

import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf3d.config.checks import check
from rlhf3d.config.load import build, load_config
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import load_spec
from rlhf3d.planning.engines import engine_memory, kv_bytes_a_token
from rlhf3d.planning.hardware import Cluster, load_hardware, parse_cluster
from rlhf3d.planning.job import Job, Lengths, make_job
from rlhf3d.planning.memory import AHEAD_BYTES, ENVIRONMENT_GIB, plan_memory
from rlhf3d.planning.plan import make_plan
from rlhf3d.planning.search.flops import head_flops, layer_flops
from rlhf3d.planning.search.generation import (
    decoding_batch,
    generate_time,
    running_sequences,
)
from rlhf3d.planning.search.phase_time import PhaseTime
from rlhf3d.planning.search.plan import with_time
from rlhf3d.planning.search.ranking import Found, Search
from rlhf3d.planning.search.schedule import Schedule, make_schedule
from rlhf3d.planning.search.space import dedicated_counts
from rlhf3d.planning.search.times import plan_time
from rlhf3d.planning.search.view import plan_data, plan_view, search_view
from rlhf3d.rollout.api import Completion
from rlhf3d.units import GIB

ROOT = Path(__file__).parents[3]
HARDWARE = load_hardware()
QWEN_7B = load_spec(ROOT / "configs/models/Qwen2.5-7B-Instruct", with_weights=False)
BYPASS = {"rollout_correction": {"bypass_mode": True}}
GRPO = {"adv_estimator": "grpo", **BYPASS}
DEDICATED = {"engines": 4, "placement": "disaggregated"}
LENGTHS = Lengths(256, 512)


def config(**raw: Any) -> Config:
    mistakes: list[str] = []
    always = {
        "cluster": {"platform": "cuda"},
        "algorithm": GRPO,
        "data": {"train_batch_size": 64, "max_response_length": 1024},
        "actor": {"layout": {"dp": 4}},
        "trainer": {"save_freq": 10},
    }
    made = build(Config(), always | raw, "", mistakes)
    assert not mistakes
    return made


def job(
    on: Cluster | None = None, lengths: Lengths = LENGTHS, raw: Any = None, **rollout: Any
) -> Job:
    made = config(rollout=DEDICATED | rollout, **(raw or {}))
    return make_job(made, QWEN_7B, on or parse_cluster("8xH100", HARDWARE), lengths=lengths)


PHASES = (
    PhaseTime("sync_weights", {"buckets": 3.0}),
    PhaseTime("generate", {"tokens": 6.0, "host": 1.0, "environments": 13.0}, longest_s=60.0),
    PhaseTime("score", {"compute": 2.0}),
    PhaseTime("update_actor", {"compute": 8.0}),
    PhaseTime("save_checkpoint", {"disk": 4.0}),
)


@pytest.mark.parametrize(
    ("rollout", "training", "shared", "alone", "step"),
    [
        ({}, 10, 0, 7, 20 + 10 + 7),
        # The next batch begins when a reward model has scored the one before.
        ({"max_staleness": 1}, 8, 0, 9, 20 + 9),
        ({"max_staleness": 1, "placement": "colocated"}, 8, 6, 9, 20 + 9),
        # In flight scores and a save are training's alone.
        ({"max_staleness": 1, "update": "in_flight"}, 14, 0, 3, (60 + 14) / 2 + 3),
        ({"max_staleness": 3, "update": "in_flight"}, 14, 0, 3, 20 + 3),
    ],
)
def test_a_step_is_as_long_as_its_longer_side(
    rollout: dict[str, Any], training: float, shared: float, alone: float, step: float
) -> None:
    made = make_schedule(job(**rollout), PHASES)
    assert (made.engines_s, made.training_s, made.shared_s, made.alone_s) == (
        20,
        training,
        shared,
        alone,
    )
    assert made.step_s == step
    assert made.training_waits_s == step - alone - training - shared
    assert made.engines_wait_s == step - alone - 20


def test_cores_are_shared_wherever_engines_are() -> None:
    """On CPU nothing but environments leaves cores to training."""
    laptop = Cluster(HARDWARE["laptop"], 1, 1)
    cpu = {"cluster": {"platform": "cpu"}}
    for placement in ("colocated", "disaggregated"):
        made = make_schedule(job(laptop, raw=cpu, max_staleness=1, placement=placement), PHASES)
        assert made.shared_s == 7
        assert made.step_s == max(20, 8 + 7) + 9
    longer = [PHASES[0], PhaseTime("generate", {"tokens": 19.0, "environments": 1.0}), PHASES[3]]
    made = make_schedule(job(laptop, raw=cpu, max_staleness=1), longer)
    assert made.step_s == 8 + 19 + 3, "two computations take turns; only the waiting is saved"


def test_colocated_devices_take_turns() -> None:
    made = Schedule("between_batches", 1, engines_s=20, training_s=17, shared_s=6, alone_s=2)
    assert made.step_s == 17 + 6 + 2
    assert (made.training_waits_s, made.engines_wait_s) == (0, 3)


STEPS = 240
"""Of a run; from the middle on every mode is in its rhythm, of at most k + 1 steps."""


def long_run(ends: list[float]) -> float:
    """Seconds a step in the second half of a run."""
    return (ends[-1] - ends[STEPS // 2 - 1]) / (STEPS // 2)


def between_batches_s(k: int, generate: float, passes: float, update: float, sync: float) -> float:
    """Of the schedule of `rlhf3d.experience.ahead`, which writes one batch after the other."""
    complete = {batch: generate * batch for batch in range(1, k + 1)}
    now, ends = 0.0, []
    for step in range(1, STEPS + 1):
        now = max(now, complete[step])
        # New weights enter once all that older ones have to write is complete: before the step, or
        # at the latest before its update.
        before_passes = complete[step + k - 1] <= now
        enter = now if before_passes else max(now + passes, complete[step + k - 1])
        complete[step + k] = enter + sync + generate
        now = enter + sync + update + passes * before_passes
        ends.append(now)
    return long_run(ends)


def in_flight_s(k: int, longest: float, training: float) -> float:
    """Of a run whose every publication makes room for as many requests as were trained on."""
    complete, now, ends = [longest] * (k + 1), 0.0, []
    for step in range(STEPS):
        now = max(now, complete[step]) + training
        complete.append(now + longest)
        ends.append(now)
    return long_run(ends)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("generate", "passes", "update"), [(10, 3, 4), (10, 4, 9), (5, 5, 5)])
def test_the_rules_are_those_of_the_schedule(
    k: int, generate: float, passes: float, update: float
) -> None:
    training = passes + update
    made = Schedule("between_batches", k, generate, training, 0.0, alone_s=2.0)
    assert made.step_s == pytest.approx(between_batches_s(k, generate, passes, update, 2.0))
    flying = Schedule("in_flight", k, 1.0, training, 0.0, 0.0, longest_s=3 * generate)
    assert flying.step_s == pytest.approx(in_flight_s(k, 3 * generate, training))


def test_between_batches_and_in_turn_generate_alike() -> None:
    in_turn, ahead = plan_time(job()), plan_time(job(max_staleness=2))
    assert in_turn.phases == ahead.phases
    assert in_turn.in_turn_s == ahead.in_turn_s == in_turn.step_s
    assert in_turn.step_s == pytest.approx(sum(phase.total for phase in in_turn.phases))
    generate = next(phase for phase in ahead.phases if phase.phase == "generate").total
    schedule = ahead.schedule
    assert ahead.step_s == max(generate, schedule.training_s) + schedule.alone_s
    assert ahead.step_s < in_turn.step_s


def test_engines_in_flight_decode_a_stream() -> None:
    """64 prompts x 4 on 4 engines are 64 sequences of 512 tokens each, 16 decoded at once."""
    flying = job(max_staleness=2, update="in_flight", n=4, max_num_seqs=16)
    assert running_sequences(flying) == 2 * 256 / 4
    assert decoding_batch(flying, 128) == 16
    assert decoding_batch(flying, 8) == 8
    steps = 64 * 512 / 16
    hardware = HARDWARE["H100"]
    host = steps * hardware.decode_overhead_s + 64 * 512 * hardware.decode_sequence_s
    assert generate_time(flying).parts["host"] == pytest.approx(host)
    # With room for all, a batch by itself lasts as long as its longest completion: 1,024 steps.
    roomy, alone = job(max_staleness=1, update="in_flight", n=4), job(max_staleness=1, n=4)
    streamed, drained = generate_time(roomy).parts["host"], generate_time(alone).parts["host"]
    assert drained - streamed == pytest.approx((1024 - 512) * hardware.decode_overhead_s)


def test_the_cache_bounds_what_is_decoded_in_flight() -> None:
    small = job(max_staleness=4, update="in_flight", n=32, max_num_seqs=512)
    small = replace(
        small,
        config=replace(
            small.config, rollout=replace(small.config.rollout, gpu_memory_utilization=0.25)
        ),
    )
    context = 256 + 512 / 2
    fits = engine_memory(small).kv_cache / (kv_bytes_a_token(QWEN_7B, 1, "bfloat16") * context)
    assert 1 < fits < 512
    assert decoding_batch(small, running_sequences(small)) == pytest.approx(fits)


def test_caches_are_computed_again_under_new_weights() -> None:
    """2 x 64 / 4 prompts an engine, x 4; half of each response is there, prompts are shared."""
    free = replace(HARDWARE["H100"], matmul_efficiency=0.4)
    flying = job(Cluster(free, 8, 8), max_staleness=2, update="in_flight", n=4, max_num_seqs=512)
    layers = QWEN_7B.num_layers
    prompts = layers * layer_flops(QWEN_7B, 32 * 256, 128) + head_flops(QWEN_7B, 32)
    written = layers * layer_flops(QWEN_7B, 128 * 256, 256 + 128) + head_flops(QWEN_7B, 128)
    again = generate_time(flying).parts["caches again"]
    assert again == pytest.approx((prompts + written) / (989e12 * 0.4))
    assert generate_time(job(max_staleness=2)).parts["caches again"] == 0
    # What has not begun has nothing to compute again.
    few = job(Cluster(free, 8, 8), max_staleness=2, update="in_flight", n=4, max_num_seqs=64)
    assert generate_time(few).parts["caches again"] == pytest.approx(again / 2)


TURNS = Lengths(256, 512, turns=4, observed=256, environment_s=2.0, longest_call_s=30.0)


def test_the_slowest_call_holds_up_a_batch_and_no_stream() -> None:
    """256 trajectories of at most 6 calls of 2 s, one of which takes 30 s."""
    raw = {"environment": {"path": "e.py", "max_turns": 6, "max_concurrent": 1024}}
    alone = job(lengths=TURNS, raw=raw, max_staleness=1, n=4)
    assert generate_time(alone).parts["environments"] == 6 * 2 + 28
    flying = job(lengths=TURNS, raw=raw, max_staleness=1, update="in_flight", n=4)
    made = generate_time(flying)
    assert made.parts["environments"] == 0, "a call in flight keeps no engine from the others"
    # From asking for it to its end: 6 calls; of 1,024 tokens the policy's half, decoded among 1.5
    # times as many as a batch by itself has on average, 64 x 256 / 512; and a publication.
    slots = job(lengths=TURNS, raw=raw, max_staleness=1, update="in_flight", n=4, max_num_seqs=48)
    assert running_sequences(slots) == 64
    parts = ("tokens", "messages", "kernels", "host")
    step = sum(generate_time(slots).parts[part] for part in parts) / (64 * 256 / 48)
    again = made.parts["caches again"]
    assert made.longest_s == pytest.approx(6 * 2 + 28 + 512 * step + again)
    # With 24 slots the 24 others leave the decoding steps first, after 256 tokens on average.
    few = job(lengths=TURNS, raw=raw, max_staleness=1, update="in_flight", n=4, max_num_seqs=24)
    made = generate_time(few)
    step = sum(made.parts[part] for part in parts) / (64 * 256 / 24)
    again = made.parts["caches again"]
    assert made.longest_s == pytest.approx(6 * 2 + 28 + (256 + 512) * step + again)
    # 32 environments for 256 trajectories of 4 calls.
    raw["environment"] |= {"max_concurrent": 32}
    queue = generate_time(job(lengths=TURNS, raw=raw, max_staleness=1, update="in_flight", n=4))
    busy = sum(queue.parts[part] for part in parts)
    assert queue.parts["environments"] == pytest.approx(256 * 4 / 32 * 2 - busy)
    few = job(lengths=TURNS, raw=raw, max_staleness=1, update="in_flight", n=4)
    assert running_sequences(few) == 32 / 4


def test_what_waits_in_the_driver_is_counted() -> None:
    """2 batches of 64 x 4 sequences of 512 + 1,024 tokens."""

    def host(**rollout: Any) -> dict[str, int]:
        raw = {"environment": {"path": "e.py", "max_concurrent": 300}}
        return dict(plan_memory(job(lengths=TURNS, raw=raw, n=4, **rollout)).host.terms)

    assert "batches ahead" not in host()
    between = host(max_staleness=2)
    assert between["batches ahead"] == 2 * 256 * 1536 * AHEAD_BYTES
    assert between["environments"] == int(256 * ENVIRONMENT_GIB * GIB)
    flying = host(max_staleness=2, update="in_flight")
    assert flying["environments"] == int(300 * ENVIRONMENT_GIB * GIB)


def test_a_completion_ahead_takes_no_more_than_is_counted() -> None:
    tokens = 1000
    made = Completion(
        array("i", range(tokens)), array("f", [0.0] * tokens), "stop", versions=((0, 1),)
    )
    text = "word " * tokens
    held = sum(map(sys.getsizeof, (made.token_ids, made.logprobs, text)))
    assert held < AHEAD_BYTES * tokens


def test_engines_that_stay_awake_take_memory_from_training() -> None:
    ahead = job(max_staleness=1, placement="colocated")
    asleep = job(placement="colocated", sleep=True)
    engine = engine_memory(ahead)
    for made, resident in ((ahead, True), (asleep, False)):
        (rank, *_) = plan_memory(made).ranks
        update = next(phase for phase in rank.phases if phase.phase == "update_actor")
        assert (update.terms.get("vLLM") == engine.total) == resident


MATH = load_config(ROOT / "configs/math.yaml")


def found(gpus: str = "8xH100", **rollout: Any) -> Found:
    algorithm = replace(
        MATH.algorithm,
        adv_estimator="grpo",
        use_kl_in_reward=False,
        rollout_correction=replace(MATH.algorithm.rollout_correction, bypass_mode=True),
    )
    made = replace(
        MATH,
        algorithm=algorithm,
        data=replace(MATH.data, train_batch_size=256),
        rollout=replace(MATH.rollout, n=8, max_staleness=1, **rollout),
    )
    return Search(made, QWEN_7B, parse_cluster(gpus, HARDWARE), 7500, Lengths(256, 600)).run()


@pytest.mark.parametrize("update", ["between_batches", "in_flight"])
def test_a_search_splits_the_devices_for_balance(update: str) -> None:
    result = found(update=update)
    assert result.best and not any(check(plan.job.config) for plan in result.best)
    assert not any(plan.job.config.rollout.sleep for plan in (*result.best, *result.near))
    dedicated = [split.dedicated for split in result.splits]
    assert dedicated == ([1, 2, 3, 4, 5, 6, 7] if update == "in_flight" else list(range(8)))
    for split in result.splits:
        assert split.training == 8 - split.dedicated
    steps = [split.schedule.step_s for split in result.splits if split.schedule is not None]
    assert result.best[0].step_s == pytest.approx(min(steps))
    own = [split for split in result.splits if split.dedicated and split.schedule is not None]
    # More engines make their side shorter and training's longer.
    assert own[0].schedule.engines_s > own[-1].schedule.engines_s
    assert own[0].schedule.training_s < own[-1].schedule.training_s
    data = search_view(result, parse_cluster("8xH100", HARDWARE), ROOT).data
    assert len(data["splits"]) == len(result.splits)
    first = next(split for split in data["splits"] if split["schedule"] is not None)
    assert first["training_devices"] + first["engine_devices"] == 8 or first["colocated"]
    assert {"engines_s", "training_s", "alone_s", "step_s"} <= set(first["schedule"])


def test_dedicated_engines_get_complete_nodes() -> None:
    cluster = parse_cluster("32xH100", HARDWARE)
    rollout = config().rollout
    flying = replace(rollout, max_staleness=1, update="in_flight")
    assert dedicated_counts(cluster, rollout) == [0, 8, 16, 24]
    assert dedicated_counts(cluster, flying) == [8, 16, 24]
    many = parse_cluster("128xH100", HARDWARE)
    assert dedicated_counts(many, flying) == list(range(8, 128, 8))


def test_a_plan_shows_both_sides() -> None:
    made = config(rollout=DEDICATED | {"max_staleness": 2, "update": "in_flight"})
    plan = with_time(make_plan(made, QWEN_7B, parse_cluster("8xH100", HARDWARE), lengths=LENGTHS))
    assert plan.time is not None
    schedule = plan.time.schedule
    data = plan_data(plan)["time"]["schedule"]
    assert data["mode"] == "in_flight" and data["versions"] == 2
    assert data["step_s"] == plan_data(plan)["time"]["step_s"] == schedule.step_s
    assert data["in_turn_s"] == plan.time.in_turn_s
    text = "\n".join(part for part in plan_view(plan, ROOT).parts if isinstance(part, str))
    assert f"engines {schedule.engines_s:.1f}, training {schedule.training_s:.1f}" in text
    assert f"(longest {schedule.longest_s:.1f} + " in text
    assert "32 sequences run in an engine" in text


@pytest.mark.parametrize(
    ("mode", "versions", "measured_s"),
    [
        ("between_batches", 1, 5.92),
        ("between_batches", 2, 5.59),
        ("in_flight", 1, 5.69),
        ("in_flight", 2, 5.30),
    ],
)
def test_the_schedule_of_measured_phases_is_what_was_measured(
    mode: Any, versions: int, measured_s: float
) -> None:
    # Of tools/bench/async_overlap.py, docs/async.md: phases of k = 0, and what writing computes.
    writes_s, trains_s, sync_s = 5.56, 4.70, 0.07
    computes_s = writes_s - 4.67
    planned = Schedule(mode, versions, writes_s, trains_s, computes_s, sync_s, longest_s=writes_s)
    assert planned.step_s == pytest.approx(measured_s, rel=0.07)

"""Memory of described runs, by hand where a hand can do it, and what is said of runs that do not
fit.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf3d.config.load import build
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.planning.activations import in_flight
from rlhf3d.planning.engines import GRAPHS_GIB
from rlhf3d.planning.hardware import Cluster, load_hardware, parse_cluster
from rlhf3d.planning.memory import PHASES, spare
from rlhf3d.planning.plan import make_plan
from rlhf3d.planning.search.plan import TimedPlan, with_time
from rlhf3d.planning.search.view import plan_data, plan_view
from rlhf3d.planning.states import chunk_sizes, model_states
from rlhf3d.units import GIB

ROOT = Path(__file__).parents[3]
HARDWARE = load_hardware()
QWEN_7B = load_spec(ROOT / "configs/models/Qwen2.5-7B-Instruct", with_weights=False)


def config(**raw: Any) -> Config:
    mistakes: list[str] = []
    made = build(Config(), {"cluster": {"platform": "cuda"}, **raw}, "", mistakes)
    assert not mistakes
    return made


def plan(on: Cluster | None = None, spec: ModelSpec = QWEN_7B, **raw: Any) -> TimedPlan:
    return with_time(make_plan(config(**raw), spec, on or parse_cluster("8xH100", HARDWARE)))


def as_text(made: TimedPlan) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(*plan_view(made, ROOT).parts, sep="\n", soft_wrap=True)
    return console.file.getvalue()


LAYOUT = {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True}
COLOCATED = {"actor": {"layout": LAYOUT}, "rollout": {"engines": 4, "tensor_parallel_size": 2}}


def test_states_of_7b_by_hand() -> None:
    layout = ParallelLayout(2, 2, 2)
    states = model_states(QWEN_7B, layout, layout.coords(0), "lm", "bfloat16")
    layer = (3584 + 2 * 512) // 2 * (3584 + 1) + 3584 * 1792 + 18944 * 3584 + 3584 * 9472 + 2 * 3584
    elements = 14 * layer + 152064 // 2 * 3584  # every size is a multiple of 128: nothing is padded
    assert states.weights == 2 * elements
    assert states.gradients == 4 * elements
    assert (states.master, states.moments) == (4 * elements // 2, 8 * elements // 2)


def test_replicas_share_the_optimizer_out() -> None:
    layout = ParallelLayout(dp=3, pp=2)
    spec = replace(
        QWEN_7B, num_layers=2, hidden_size=24, ffn_size=20, num_heads=2, num_kv_heads=1, head_dim=6
    )
    for pp in (0, 1):
        ranks = [layout.rank(0, pp, dp) for dp in range(3)]
        owned = [
            model_states(spec, layout, layout.coords(r), "lm", "bfloat16").master // 4
            for r in ranks
        ]
        assert sum(owned) == chunk_sizes(spec, layout, pp, 0, "lm").total


def test_in_flight_micro_batches() -> None:
    assert [in_flight(ParallelLayout(pp=4), pp, 8) for pp in range(4)] == [4, 3, 2, 1]
    assert in_flight(ParallelLayout(pp=4), 0, 2) == 2
    assert [in_flight(ParallelLayout(pp=4, vpp=2), pp, 8) for pp in range(4)] == [11, 9, 7, 5]


def test_a_rank_has_every_model_and_every_phase() -> None:
    made = plan(
        **COLOCATED,
        algorithm={"use_kl_in_reward": True},
        critic={"ppo_micro_batch_size_per_gpu": 2},
    )
    for rank in made.memory.ranks:
        assert tuple(phase.phase for phase in rank.phases) == tuple(
            name for name in PHASES if name != "score"
        )
        assert set(rank.states) == {"actor", "critic", "ref"}
        assert rank.states["ref"].gradients == rank.states["ref"].optimizer == 0
        assert all(set(rank.resident) <= set(phase.terms) for phase in rank.phases)
    assert sorted(r for group in made.memory.ranks for r in group.ranks) == list(range(8))
    without = plan(**COLOCATED, algorithm={"adv_estimator": "grpo"})
    assert set(without.memory.ranks[0].states) == {"actor"}


def test_the_device_that_is_too_small_is_told_with_phase_rank_and_term() -> None:
    made = plan(
        parse_cluster("8xA100", HARDWARE), **COLOCATED, algorithm={"use_kl_in_reward": True}
    )
    (problem,) = made.problems
    rank, phase = made.memory.peak
    assert problem.startswith(
        f"device memory: {phase.phase} on device {rank.ranks[0]} ({rank.place})"
    )
    assert f"{(phase.total - 79.2 * GIB) / GIB:.1f} more than the 79.2 of a device" in problem


def test_more_of_anything_needs_more() -> None:
    base = plan(**COLOCATED).memory.peak[1].total
    longer = plan(**COLOCATED, data={"max_response_length": 4096}).memory.peak[1].total
    assert longer > base
    kept = [base]
    for recompute in ("selective", "full"):
        layout = {**LAYOUT, "recompute": recompute}
        kept.append(plan(**{**COLOCATED, "actor": {"layout": layout}}).memory.peak[1].total)
    assert kept == sorted(set(kept), reverse=True)
    whole = {**COLOCATED, "actor": {"layout": {**LAYOUT, "distributed_optimizer": False}}}
    assert plan(**whole).memory.peak[1].total > base


def test_context_ranks_share_out_activations() -> None:
    def activations(**layout: int) -> int:
        made = plan(
            data={"max_response_length": 15360},
            actor={"layout": layout, "ppo_micro_batch_size_per_gpu": 1},
        )
        return made.memory.ranks[0].own("update_actor")

    # But for the head, of which every rank has one chunk at once.
    assert 0.24 < activations(tp=2, cp=4) / activations(tp=2, dp=4) < 0.31


def test_fp8_engines_hold_bytes() -> None:
    """The layers' matrices, with an fp32 scale a row."""
    alone = {"actor": {"layout": LAYOUT}, "rollout": {"engines": 8, "gpu_memory_utilization": 0.3}}
    whole = plan(**alone).memory.engine
    rollout = alone["rollout"] | {"quantization": "fp8_per_channel"}
    half = plan(**{**alone, "rollout": rollout}).memory.engine
    layers, scales = (
        28 * (4608 * 3584 + 3584**2 + 3 * 18944 * 3584),
        28 * (4608 + 2 * 3584 + 2 * 18944),
    )
    assert whole.weights - half.weights == layers - 4 * scales
    assert half.kv_cache - whole.kv_cache == layers - 4 * scales


def test_engines_on_devices_of_their_own() -> None:
    apart = {
        "engines": 2,
        "tensor_parallel_size": 2,
        "placement": "disaggregated",
        "gpu_memory_utilization": 0.9,
    }
    made = plan(parse_cluster("12xH100", HARDWARE), actor={"layout": LAYOUT}, rollout=apart)
    *training, engines = made.memory.ranks
    assert engines.ranks == (8, 9, 10, 11)
    assert all("vLLM" not in rank.resident for rank in training)
    assert (
        engines.resident["vLLM"]
        == made.memory.engine.total
        == pytest.approx(0.9 * 79.1 * GIB, abs=2)
    )
    assert any(
        p.startswith("devices:") for p in plan(actor={"layout": LAYOUT}, rollout=apart).problems
    )


def test_a_critic_of_its_own() -> None:
    critic = {"layout": {"dp": 2}, "ppo_micro_batch_size_per_gpu": 1}
    beside = plan(**COLOCATED, critic=critic).memory.ranks
    assert [(rank.ranks, rank.place) for rank in beside] == [
        ((0, 1), "actor pp0, critic pp0"),
        ((2, 3), "actor pp0"),
        ((4, 5, 6, 7), "actor pp1"),
    ]
    assert beside[0].resident["process"] == 2 * beside[1].resident["process"]
    apart = plan(
        parse_cluster("10xH100", HARDWARE),
        **COLOCATED,
        critic={**critic, "placement": "disaggregated"},
    )
    *_, last = apart.memory.ranks
    assert (last.ranks, set(last.states)) == ((8, 9), {"critic"})
    assert [phase.phase for phase in last.phases] == ["generate", "values", "update_critic"]


def test_states_that_wait_on_the_host_and_engines_that_sleep() -> None:
    kl = {"algorithm": {"use_kl_in_reward": True}}
    base = plan(**COLOCATED, **kl)
    offloaded = plan(**COLOCATED, **kl, model={"offload": True})
    rank, other = base.memory.ranks[0], offloaded.memory.ranks[0]
    assert set(other.resident) == {"process", "vLLM context", "vLLM"}
    terms = {
        phase.phase: set(phase.terms) - set(other.resident) - {"activations", "buckets"}
        for phase in other.phases
    }
    assert terms["generate"] == set()
    assert terms["ref_logprobs"] == {"ref weights"}
    assert terms["sync_weights"] == {"actor weights"}
    assert terms["update_critic"] == {"critic weights", "critic gradients", "critic optimizer"}
    kept = sum(
        state.weights + state.optimizer
        for r in base.memory.ranks
        for state in r.states.values()
        for _ in r.ranks
    )
    assert offloaded.memory.host.terms["offloaded states"] == kept
    assert offloaded.time.step_s > base.time.step_s
    rollout = {**COLOCATED["rollout"], "sleep": True, "gpu_memory_utilization": 0.8}
    asleep = plan(**{**COLOCATED, "rollout": rollout}, **kl, model={"offload": True})
    assert asleep.memory.ranks[0].peak.phase == "generate"
    updates = next(
        phase for phase in asleep.memory.ranks[0].phases if phase.phase == "update_actor"
    )
    assert "vLLM" not in updates.terms and updates.terms["vLLM asleep"] == GIB // 2
    assert rank.peak.total > other.peak.total


def test_a_reward_model_has_its_own_shape_and_phase() -> None:
    reward = {"path": str(ROOT / "configs/models/Qwen2.5-1.5B-Instruct"), "layout": {"dp": 4}}
    made = plan(**COLOCATED, reward_model=reward, reward={"weights": {"reward_model": 1.0}})
    first, second = made.memory.ranks[:2]
    assert first.place == "actor pp0, reward pp0" and second.place == "actor pp1"
    layout = ParallelLayout(dp=4)
    spec = load_spec(reward["path"], with_weights=False)
    states = model_states(
        spec, layout, layout.coords(0), "value", "bfloat16", trained=False, style="te"
    )
    assert first.states["reward"] == states and states.gradients == 0
    assert [phase.phase for phase in first.phases][:2] == ["generate", "score"]
    assert "score" in [phase.phase for phase in made.time.phases]


def test_an_engine_without_room_for_one_sequence_is_refused() -> None:
    small = {"engines": 8, "tensor_parallel_size": 1, "gpu_memory_utilization": 0.18}
    made = plan(actor={"layout": LAYOUT}, rollout=small)
    engine = made.memory.engine
    assert (
        engine.kv_cache == 0 and engine.missing > engine.one_sequence
    )  # not even the weights have room
    budget = int(0.18 * 79.1 * GIB)
    assert engine.missing == engine.weights + engine.activations + engine.one_sequence - budget
    (problem,) = (text for text in made.problems if text.startswith("vLLM"))
    assert f"{engine.missing / GIB:.1f} GiB too little for one sequence" in problem
    share = float(problem.split("give ")[1].split()[0])
    enough = plan(actor={"layout": LAYOUT}, rollout=small | {"gpu_memory_utilization": share})
    assert enough.memory.engine.sequences >= 1 and enough.time is not None
    assert made.verdict == "does not fit" and made.time is None
    text = as_text(made)
    assert "KV cache 0.00 GiB" in text and "time       none: the engines cannot start" in text
    assert plan_data(made)["time"] is None


def test_an_engine_takes_more_than_its_share() -> None:
    """vLLM measures after its context and communicators are there, and computes 16,384 prompt
    tokens at once.
    """
    made = plan(**COLOCATED)
    engine, hardware = made.memory.engine, HARDWARE["H100"]
    assert engine.outside == int((hardware.engine_context_gib + hardware.engine_comm_gib) * GIB)
    assert engine.total == pytest.approx(0.5 * 79.1 * GIB, abs=2)
    assert made.memory.ranks[0].resident["vLLM context"] == engine.outside
    one = plan(actor={"layout": LAYOUT}, rollout={"engines": 8}).memory.engine
    assert one.outside == int(hardware.engine_context_gib * GIB)
    a_token = 2 * (4 * 3584 + 3 * 18944 // 2)
    graphs = int(GRAPHS_GIB * GIB)
    assert engine.activations == 16384 * a_token + 3 * 64 * 4 * 76032 + graphs
    few = plan(
        actor={"layout": LAYOUT}, rollout=COLOCATED["rollout"] | {"max_num_seqs": 2}
    ).memory.engine
    assert (
        few.activations == 2 * 1024 * a_token + 3 * 2 * 4 * 76032 + graphs
    )  # of no more than all sequences


def test_tight_is_between_fitting_and_not() -> None:
    """The peak is within the device, but little is left for holes between blocks and what is not
    counted.
    """

    def on(gib: float) -> TimedPlan:
        return plan(
            Cluster(replace(HARDWARE["H100"], memory_gib=gib), 8, 8),
            actor={"layout": LAYOUT},
            rollout=apart,
        )

    apart = {"engines": 2, "placement": "disaggregated"}
    base = on(79.1).memory
    _, phase = base.peak
    need, free = phase.total / GIB, spare(79.1 * GIB, phase) / GIB
    assert free > 0.02 * 79.1
    devices = "devices: "
    cluster = [on(need - 0.1), on(need + 0.1), on(need + 2 * free)]
    assert [bool(made.memory.tight) for made in cluster] == [False, True, False]
    fits = [
        not [text for text in made.problems if not text.startswith(devices)] for made in cluster
    ]
    assert fits == [False, True, True]
    (text,) = cluster[1].memory.tight
    assert text.startswith(
        f"device memory: {phase.phase} on device 0 (actor pp0) leaves 0.1 of {need + 0.1:.1f} GiB "
        "free"
    )


def test_70b_on_16_devices_of_80_gb_is_not_said_to_fit() -> None:
    """States of 16 bytes a weight alone leave a few GiB: people run out of memory here."""
    spec = load_spec(ROOT / "configs/models/Llama-3.1-70B-Instruct", with_weights=False)
    layout = {"tp": 8, "pp": 2, "sequence_parallel": True, "recompute": "full"}
    rollout = {
        "engines": 2,
        "tensor_parallel_size": 8,
        "sleep": True,
        "gpu_memory_utilization": 0.6,
    }
    raw = {
        "model": {"offload": True},
        "algorithm": {"adv_estimator": "grpo"},
        "data": {"max_response_length": 1024},
    }
    raw["actor"] = {"layout": layout, "ppo_micro_batch_size_per_gpu": 1}
    beside = plan(parse_cluster("16xH100", HARDWARE), spec, rollout=rollout, **raw)
    assert beside.verdict == "tight"
    assert "leaves 0.1 of 79.1 GiB free" in beside.memory.tight[0]
    rollout |= {
        "engines": 1,
        "sleep": False,
        "gpu_memory_utilization": 0.9,
        "placement": "disaggregated",
    }
    apart = plan(parse_cluster("24xH100", HARDWARE), spec, rollout=rollout, **raw)
    assert apart.verdict == "tight"


def test_published_states_of_mixtral() -> None:
    """Mixtral 8x7B on 16 H100 as PP2, EP8: 54,251 MiB allocated between steps (NVIDIA/Megatron-LM,
    issue 756).
    """
    spec = load_spec(ROOT / "configs/models/Mixtral-8x7B-Instruct-v0.1", with_weights=False)
    layout = ParallelLayout(pp=2, dp=8, ep=8)
    states = [
        model_states(spec, layout, layout.coords(rank), "lm", "bfloat16", style="te").total
        for rank in (0, 8)
    ]
    assert max(states) / GIB == pytest.approx(54_251 / 1024, rel=0.005)


def test_cpu_ranks_share_the_host(tmp_path: Path) -> None:
    host = Cluster(replace(HARDWARE["laptop"], host_memory_gib=24.0), 1, 1)
    spec = replace(
        QWEN_7B,
        num_layers=4,
        hidden_size=256,
        ffn_size=512,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
    )
    made = plan(host, spec, cluster={"platform": "cpu"}, actor={"layout": {"dp": 2}})
    assert made.problems == ()
    trained = sum(len(rank.ranks) * rank.peak.total for rank in made.memory.ranks)
    assert made.memory.host.total > trained
    small = Cluster(replace(HARDWARE["laptop"], host_memory_gib=2.0), 1, 1)
    (problem,) = plan(
        small, spec, cluster={"platform": "cpu"}, actor={"layout": {"dp": 2}}
    ).problems
    assert problem.startswith("host memory: ")


def test_environments_live_on_the_host_and_are_told() -> None:
    """As many as live at once; of a step with fewer trajectories, those."""
    environment = {"path": "e.py", "max_turns": 3, "max_concurrent": 64}
    data = {"train_batch_size": 32, "max_response_length": 512}
    for n, alive in ((1, 32), (4, 64)):
        raw = {"data": data, "rollout": {"engines": 8, "n": n}, "environment": environment}
        made = plan(**raw)
        assert made.memory.host.terms["environments"] == int(alive * 0.004 * GIB)
    text = as_text(made)
    # Two turns on average, half of the response observed: 256 tokens in the middle of what may be.
    assert "2.0 on average, of at most 3 (--turns)" in text
    assert "128 tokens are sampled and 128 observed" in text and "64 environments at once" in text
    assert plan_data(made)["lengths"]["observed"] == 128
    single = plan(data=data)
    assert "environments" not in single.memory.host.terms and "--turns" not in as_text(single)


def test_sizes_are_those_of_the_code() -> None:
    from rlhf3d.planning import memory
    from rlhf3d.resharding.setup import SLOTS

    assert memory.SLOTS == SLOTS


def test_hardware_files(tmp_path: Path) -> None:
    assert str(parse_cluster("64xh100", HARDWARE)) == "64 x H100 on 8 nodes"
    with pytest.raises(ValueError, match="--gpus '8': expected a number, x and one of A100, H100"):
        parse_cluster("8", HARDWARE)
    with pytest.raises(ValueError, match="--gpus '8xV100'"):
        parse_cluster("8xV100", HARDWARE)
    (tmp_path / "mine.yaml").write_text("V100: {memory_gib: 32}\n")
    with pytest.raises(
        ValueError, match=r"mine\.yaml: V100 lacks batched_tokens, cores, decode_eager_s, "
    ):
        load_hardware(tmp_path / "mine.yaml")

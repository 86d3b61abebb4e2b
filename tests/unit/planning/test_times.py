"""The time model: by hand where a hand can do it, and how it moves when the job or the hardware
does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf3d.config.load import build, config_to_yaml
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import load_spec
from rlhf3d.planning.hardware import Cluster, load_hardware, parse_cluster
from rlhf3d.planning.job import Lengths, make_job, mean_lengths
from rlhf3d.planning.search.flops import head_flops, layer_flops, layer_weights
from rlhf3d.planning.search.times import TimePlan, busiest_rank, plan_time
from tools.bench.calibrate import FITTED, Observation, as_entry, fit, observe, planned_step_s

ROOT = Path(__file__).parents[3]
HARDWARE = load_hardware()
QWEN_7B = load_spec(ROOT / "configs/models/Qwen2.5-7B-Instruct", with_weights=False)
LENGTHS = Lengths(256, 512)


def config(**raw: Any) -> Config:
    mistakes: list[str] = []
    always = {"cluster": {"platform": "cuda"}, "trainer": {"total_training_steps": 100}}
    made = build(Config(), always | raw, "", mistakes)
    assert not mistakes
    return made


def times(on: Cluster | None = None, lengths: Lengths = LENGTHS, **raw: Any) -> TimePlan:
    made = {
        "data": {"train_batch_size": 64},
        "actor": {"layout": {"dp": 8}},
        "rollout": {"engines": 8},
    } | raw
    return plan_time(
        make_job(config(**made), QWEN_7B, on or parse_cluster("8xH100", HARDWARE), lengths=lengths)
    )


def seconds(plan: TimePlan, phase: str) -> float:
    return next(found.total for found in plan.phases if found.phase == phase)


def test_operations_are_twice_the_weights() -> None:
    weights = QWEN_7B.num_layers * layer_weights(QWEN_7B) + QWEN_7B.vocab_size * QWEN_7B.hidden_size
    assert weights == pytest.approx(
        7_615_616_512 - QWEN_7B.vocab_size * QWEN_7B.hidden_size, rel=1e-4
    )
    flops = QWEN_7B.num_layers * layer_flops(QWEN_7B, 1, 0) + head_flops(QWEN_7B, 1)
    assert flops == 2 * weights
    moe = load_spec(ROOT / "configs/models/Qwen3-30B-A3B", with_weights=False)
    active = moe.num_layers * layer_weights(moe) + 2 * moe.vocab_size * moe.hidden_size
    assert active == pytest.approx(3.3e9, rel=0.02)  # the published number of activated parameters


def test_an_update_on_one_rank_by_hand() -> None:
    free = replace(HARDWARE["H100"], layer_overhead_s=0.0, matmul_half=0.0, matmul_efficiency=0.42)
    raw = {
        "data": {"train_batch_size": 8},
        "actor": {"ppo_mini_batch_size": 8, "ppo_micro_batch_size_per_gpu": 8},
    }
    job = make_job(
        config(**raw), QWEN_7B, Cluster(free, 1, 1), lengths=Lengths(256, 256, padded=512)
    )
    update = next(phase for phase in plan_time(job).phases if phase.phase == "update_actor")
    layers = 3 * QWEN_7B.num_layers * layer_flops(QWEN_7B, 8 * 512, 256)
    head = 4 * head_flops(QWEN_7B, 8 * 256)
    assert update.parts["compute"] == pytest.approx((layers + head) / (989e12 * 0.42))
    assert update.parts["bubble"] == update.parts["messages"] == 0


def test_what_makes_a_step_slower() -> None:
    base = times()
    full, selective = (
        times(actor={"layout": {"dp": 8, "recompute": mode}}) for mode in ("full", "selective")
    )
    assert seconds(full, "update_actor") == pytest.approx(
        seconds(base, "update_actor") * 4 / 3, rel=0.1
    )
    assert (
        seconds(base, "update_actor")
        < seconds(selective, "update_actor")
        < seconds(full, "update_actor")
    )
    assert seconds(full, "values") == seconds(selective, "values") == seconds(base, "values")
    fp8 = times(rollout={"engines": 8, "quantization": "fp8_per_channel"})
    assert seconds(fp8, "generate") < seconds(base, "generate") and seconds(
        fp8, "sync_weights"
    ) == seconds(base, "sync_weights")
    buckets = {"dp": 8, "overlap_grad_reduce": True}
    mini = {
        "ppo_mini_batch_size": 16
    }  # four optimizer steps; of the gathers the last is waited for
    late, early = (
        next(
            p
            for p in times(actor={"layout": buckets | {"overlap_param_gather": on}, **mini}).phases
            if p.phase == "update_actor"
        ).parts["gradients over replicas"]
        for on in (False, True)
    )
    assert early == pytest.approx(late / 4)
    piped = times(actor={"layout": {"pp": 4, "dp": 2}})
    bubble = next(phase for phase in piped.phases if phase.phase == "update_actor").parts["bubble"]
    assert bubble > 0
    assert (
        times(parse_cluster("8xA100", HARDWARE)).step_s
        > base.step_s
        > times(parse_cluster("8xB200", HARDWARE)).step_s
    )


def test_context_ranks_share_out_a_sequence_and_exchange_keys_and_values() -> None:
    """Four ranks on one sequence take as long as a quarter of the sequences each, and their
    messages.
    """
    long = {
        "data": {"train_batch_size": 64, "max_response_length": 16384},
        "lengths": Lengths(256, 8192),
    }
    replicas = times(**long, actor={"layout": {"dp": 8}, "ppo_micro_batch_size_per_gpu": 1})
    shared = times(**long, actor={"layout": {"dp": 2, "cp": 4}, "ppo_micro_batch_size_per_gpu": 1})
    apart, together = seconds(replicas, "update_actor"), seconds(shared, "update_actor")
    assert apart < together < 1.2 * apart  # and shorter products


def test_padding_is_that_of_neighbors_in_the_order_of_lengths() -> None:
    """16 sequences a rank and step, whose lengths spread to 1,024: rows of a pair are 64 apart, and
    widths 128.
    """
    mean, alone = 768 + 127 / 2, {"actor": {"layout": {"dp": 8}, "ppo_micro_batch_size_per_gpu": 1}}
    on = Cluster(replace(HARDWARE["H100"], matmul_half=0.0, layer_overhead_s=0.0), 8, 8)
    raw = {
        "data": {"train_batch_size": 128},
        "actor": {"layout": {"dp": 8}, "ppo_micro_batch_size_per_gpu": 2},
    }
    one, pairs = (times(on, **raw | more) for more in (alone, {}))
    attended = [layer_flops(QWEN_7B, width, width / 2) for width in (mean, mean + 32)]
    head = head_flops(QWEN_7B, 512) / QWEN_7B.num_layers
    ratio = (attended[1] + head) / (attended[0] + head)
    assert seconds(pairs, "old_logprobs") / seconds(one, "old_logprobs") == pytest.approx(
        ratio, rel=1e-3
    )


def test_old_logprobs_have_a_pass_where_the_run_has_one() -> None:
    """With a second optimizer step, or a KL in the reward; the rest of the step is the same."""
    grpo = {"adv_estimator": "grpo"}
    own = times(algorithm=grpo)
    weighted = times(algorithm=grpo | {"rollout_correction": {"rollout_is": "token"}})
    passes = [[phase.phase for phase in made.phases] for made in (own, weighted)]
    assert "old_logprobs" not in passes[0]
    assert passes[1] == [*passes[0][:2], "old_logprobs", *passes[0][2:]]
    assert weighted.step_s - own.step_s == pytest.approx(seconds(weighted, "old_logprobs"))


def test_a_token_budget_is_cut_as_the_run_cuts_it() -> None:
    """No more sequences in a micro-batch than an optimizer step has.

    As many as the interleaved schedule wants.
    """
    layout = {"dp": 4, "pp": 2, "overlap_grad_reduce": True}
    budget = {"use_dynamic_bsz": True, "ppo_mini_batch_size": 8}

    def update(tokens: int, **more: int) -> dict[str, float]:
        actor = {**budget, "layout": layout | more, "ppo_max_token_len_per_gpu": tokens}
        made = times(data={"train_batch_size": 64}, actor=actor)
        return dict(next(p for p in made.phases if p.phase == "update_actor").parts)

    assert update(8192) == update(
        1 << 20
    )  # two sequences a rank and optimizer step, whatever the budget
    one, two = update(8192), update(8192, vpp=2)
    assert (
        two["compute"] > one["compute"] and two["bubble"] < one["bubble"]
    )  # two micro-batches of one


def test_small_products_reach_less() -> None:
    """An expert's products take longer than their operations.

    Where nothing is small they do not.
    """
    hardware = HARDWARE["H100"]
    assert hardware.product_flops(1 << 20, 1 << 20, 1 << 20) == pytest.approx(2 * 2.0**60, rel=1e-3)
    assert hardware.product_flops(512, 2048, 1536) == pytest.approx(
        2 * 512 * 2048 * 1536 * (1 + 1 / 2 + 1 / 8 + 1 / 6)
    )
    assert HARDWARE["laptop"].product_flops(1, 8, 8) == 128


def test_the_busiest_rank_of_experts_is_waited_for() -> None:
    moe = load_spec(ROOT / "configs/models/Qwen3-30B-A3B", with_weights=False)
    assert busiest_rank(moe, 1) == 1
    assert (
        1.2 < busiest_rank(moe, 8) < busiest_rank(moe, 16) < 2
    )  # fewer experts a rank differ more
    on, raw = (
        parse_cluster("16xH100", HARDWARE),
        {"actor": {"layout": {"dp": 16, "ep": 8}}, "rollout": {"engines": 16}},
    )
    even = replace(on, hardware=replace(on.hardware, exchange_efficiency=1e9))
    made, without = (
        plan_time(make_job(config(**raw), moe, cluster, lengths=LENGTHS)) for cluster in (on, even)
    )
    messages = next(p for p in made.phases if p.phase == "update_actor").parts["messages"]
    assert messages > next(p for p in without.phases if p.phase == "update_actor").parts["messages"]


def test_exchanges_between_nodes_take_the_network() -> None:
    cluster = parse_cluster("16xH100", HARDWARE)
    near, far = (cluster.exchange_s(ranks, 1e9) - cluster.latency_s(ranks) for ranks in (8, 16))
    assert near == pytest.approx(1e9 * 7 / 8 / (450e9 * 0.45))
    assert far == pytest.approx(1e9 * 8 / 16 / (50e9 * 0.45))


def test_engines_without_graphs_and_across_nodes_are_slower() -> None:
    eager, graphs = (times(rollout={"engines": 8, "enforce_eager": on}) for on in (True, False))
    assert seconds(eager, "generate") > seconds(graphs, "generate")
    spec = load_spec(ROOT / "configs/models/Llama-3.1-8B-Instruct", with_weights=False)
    messages = []
    for tp in (8, 16):
        raw = {
            "actor": {"layout": {"dp": 16}},
            "rollout": {"engines": 16 // tp, "tensor_parallel_size": tp},
        }
        made = plan_time(
            make_job(config(**raw), spec, parse_cluster("16xH100", HARDWARE), lengths=LENGTHS)
        )
        messages.append(next(p for p in made.phases if p.phase == "generate").parts["messages"])
    assert messages[1] > 3 * messages[0]


def test_a_turn_computes_what_it_observes_and_decodes_the_rest() -> None:
    """On one engine: half of the response is observed in 4 turns, whose calls take 2 s."""
    free = replace(HARDWARE["H100"], layer_overhead_s=0.0, matmul_efficiency=0.4)
    on = Cluster(free, 1, 1)
    raw = {
        "data": {"train_batch_size": 64, "max_response_length": 1024},
        "actor": {"layout": {}},
        "rollout": {"engines": 1, "n": 4},
        "environment": {"path": "e.py", "max_turns": 6, "max_concurrent": 32},
    }
    lengths = Lengths(256, 512, turns=4, observed=256, environment_s=2.0)
    parts = _generate(times(on, lengths, **raw))
    # Each token of 256 x 3 observations once; it attends to the prompt and half of the response.
    layers = QWEN_7B.num_layers * layer_flops(QWEN_7B, 256 * 256, 256 + 256)
    logits = head_flops(QWEN_7B, 256 * 3)
    assert parts["observations"] == pytest.approx((layers + logits) / (989e12 * 0.4))
    # 256 trajectories of 4 calls, 32 at once.
    assert parts["environments"] == pytest.approx(256 * 4 / 32 * 2.0)
    raw["environment"] |= {"max_concurrent": 256}
    few = _generate(times(on, lengths, **raw))
    assert few["environments"] == pytest.approx(6 * 2.0), "the longest trajectory's calls"
    # Half as many tokens are decoded, with the same keys and values before each.
    single = {key: value for key, value in raw.items() if key != "environment"}
    whole = _generate(times(on, Lengths(256, 512), **single))
    assert parts["host"] == pytest.approx(whole["host"] / 2)
    assert whole["observations"] == whole["environments"] == 0
    assert parts["prompts"] == whole["prompts"]


def _generate(plan: TimePlan) -> dict[str, float]:
    return dict(next(phase for phase in plan.phases if phase.phase == "generate").parts)


def test_what_is_not_known_of_trajectories_is_the_middle() -> None:
    data = {"max_prompt_length": 100, "max_response_length": 1000}
    environment = {"path": "e.py", "max_turns": 9, "max_observation_tokens": 40}
    made = config(data=data, environment=environment)
    assert mean_lengths(made.data, made.environment) == Lengths(50, 500, None, 5.0, 80.0, 0.0)
    assert (
        mean_lengths(made.data, made.environment, turns=3, observation=30, environment_s=2).observed
        == 60
    )
    # Without a limit of its own an observation leaves half of the response to the policy.
    without = config(data=data, environment=environment | {"max_observation_tokens": None})
    assert mean_lengths(without.data, without.environment).observed == 250
    alone = config(data=data)
    assert mean_lengths(alone.data, alone.environment) == Lengths(50, 500)
    with pytest.raises(ValueError, match=r"--observation-tokens 40 x \(5 - 1\) turns = 160: .*100"):
        mean_lengths(made.data, made.environment, response=100, observation=40)
    assert mean_lengths(made.data, made.environment, environment_s=2).slowest_call_s == 2
    assert (
        mean_lengths(made.data, made.environment, environment_s=2, longest_call_s=9).slowest_call_s
        == 9
    )
    with pytest.raises(ValueError, match=r"--longest-environment-seconds 1: below the mean, .* 2"):
        mean_lengths(made.data, made.environment, environment_s=2, longest_call_s=1)


def test_the_run_in_hours() -> None:
    plan = times()
    assert plan.hours == pytest.approx(100 * plan.step_s / 3600)
    assert plan.device_hours == pytest.approx(8 * plan.hours)
    assert plan.tokens_s == pytest.approx(64 * 768 / plan.step_s)
    assert times(trainer={"total_training_steps": None}).hours is None


def test_ranks_on_a_cpu_share_its_cores() -> None:
    cpu = Cluster(HARDWARE["laptop"], 1, 1)
    one, two, four = (
        seconds(times(cpu, cluster={"platform": "cpu"}, actor={"layout": {"dp": dp}}), "values")
        for dp in (1, 2, 4)
    )
    assert one == pytest.approx(
        2 * two, rel=0.05
    )  # neighbors in the order of lengths are nearer on one rank
    assert two == pytest.approx(four, rel=0.1)


def make_run(folder: Path, plan: TimePlan, made: Config) -> Path:
    """A run that took exactly what a plan says."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(made))
    row = {f"timing_s/{phase.phase}": phase.total for phase in plan.phases}
    lengths = {"prompt_length/mean": 256.0, "response_length/mean": 512.0}
    rows = [
        {"step": step, **row, **lengths, "perf/padding_share/update_actor": 0.25}
        for step in (1, 2, 3)
    ]
    rows[0] |= dict.fromkeys(row, 1e6)  # the first step warms up
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_calibration_finds_the_hardware_again(tmp_path: Path) -> None:
    truth = replace(
        HARDWARE["laptop"], matmul_efficiency=0.3, layer_overhead_s=5e-3, memory_gbs=40.0
    )
    seen: list[Observation] = []
    for name, layout in (("a", {"tp": 4}), ("b", {"pp": 2, "dp": 2}), ("c", {})):
        made = config(
            model={"path": "models/Qwen2.5-7B-Instruct", "dtype": "float32"},
            rollout={"dtype": "float32"},
            cluster={"platform": "cpu"},
            actor={"layout": layout},
            data={"train_files": "x.parquet"},
        )
        job = make_job(made, QWEN_7B, Cluster(truth, 1, 1), lengths=Lengths(256, 512, 1024))
        seen.append(observe(make_run(tmp_path / name, plan_time(job), made)))
    found = fit(HARDWARE["laptop"], seen)
    assert found.matmul_efficiency == pytest.approx(0.3, rel=0.1)
    left_out = fit(HARDWARE["laptop"], seen[:2])
    for hardware in (found, left_out):
        for run in seen:
            assert planned_step_s(run, hardware) == pytest.approx(run.step_s, rel=0.1)
    assert all(getattr(found, name) > 0 for name in FITTED)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"mine": as_entry(found, "a test")}))
    mine = load_hardware(tmp_path / "mine.yaml")["mine"]
    assert mine.measured and mine.matmul_efficiency == found.matmul_efficiency


def test_a_run_of_one_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl has no step 2 or later: give a longer run"
    ):
        observe(tmp_path)


def test_a_run_whose_phases_overlap_is_refused(tmp_path: Path) -> None:
    made = config(
        model={"path": "m"},
        data={"train_files": "x.parquet"},
        rollout={"max_staleness": 1},
        algorithm={"rollout_correction": {"bypass_mode": True}},
    )
    with pytest.raises(ValueError, match=r"run: rollout\.max_staleness = 1.* give a run with 0"):
        observe(make_run(tmp_path / "run", times(), made))

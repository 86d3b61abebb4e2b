"""A training rank on one GPU.

Libraries, updates, vocabulary head, states that leave and come back, the ring.

Oracle of the updates: Megatron's local layers in float32 on the CPU.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.gpu_target import Target, cpu_target
from support.tiny_models import make_tiny_model
from support.updates import PPO, SEQUENCES, Case, Update, assemble, compare, run_updates

from rlhf3d.doctor import check_gpu_libraries
from rlhf3d.planning.hardware import load_hardware
from rlhf3d.resharding.setup import SLOTS, RingShape

pytestmark = pytest.mark.gpu

MODELS = {
    "heads4": {"heads": 4, "kv_heads": 2, "layers": 2},
    "normed": {"family": "qwen3", "tie": False, "layers": 2},
    "experts": {
        "family": "qwen3_moe",
        "tie": False,
        "layers": 2,
        "vocab": 115,
        "norm_topk_prob": False,
    },
}
# cuDNN's attention of packed sequences is for bfloat16.
UPDATES = [
    (Case(), False, 1e-5),
    (Case(model="normed", recompute="full", offload=True), False, 1e-5),
    (Case(model="experts"), False, 1e-5),
    (Case(dtype="bfloat16"), True, 0.1),
    (Case(dtype="bfloat16", model="normed", recompute="selective"), False, 0.1),
]
HEAD_ERROR = {"float32": 2e-5, "bfloat16": 2e-2}
"""Relative to the largest: gradients are rounded to the dtype."""


def test_libraries(target: Target) -> None:
    """One Transformer Engine, of torch's CUDA, whose attention is right forward and backward."""
    if not target.is_gpu:
        pytest.skip("Transformer Engine is not in the CPU set")
    findings = check_gpu_libraries()
    print("LIBRARIES", *(f"{finding.name}: {finding.found};" for finding in findings))
    assert all(finding.ok for finding in findings)
    assert {"attention", "cuDNN"} <= {finding.name for finding in findings}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(root / name, **settings) for name, settings in MODELS.items()}


def run_case(target: Target, case: Case, packed: bool, folder: Path) -> dict[str, dict]:
    rule = replace(case.fixed, packed=packed)
    updates = {role: Update(rule, objective) for role, objective in PPO.items()}
    results = target.run(case.layout.world_size, case.dtype, run_updates, case, folder, updates)
    return {role: assemble(case, results, role) for role in PPO}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, dict]:
    case = Case(micro_batch_size=SEQUENCES)
    return {model: run_case(cpu_target(), case, False, folder) for model, folder in folders.items()}


@pytest.mark.parametrize(("case", "packed", "bound"), UPDATES, ids=lambda value: str(value))
def test_updates(
    case: Case,
    packed: bool,
    bound: float,
    target: Target,
    folders: dict[str, Path],
    references: dict[str, dict],
) -> None:
    ours = run_case(target, replace(case, platform=target.platform), packed, folders[case.model])
    for role in PPO:
        metric, norm, weight = compare(ours[role], references[case.model][role], bound=bound)
        print(
            f"UPDATE {case} packed={packed} {role}: "
            f"metrics {metric:.1e} norm {norm:.1e} weights {weight:.1e}"
        )


def head_errors(
    rank: int, port: int, target: Target, dtype: torch.dtype
) -> tuple[float, float, float | None]:
    """Largest errors against float64 of log-probs, and of gradients relative to the largest.

    Peak GiB on a GPU.
    """
    from rlhf3d.engine.logprobs import vocab_parallel_logprobs

    platform, device = target.platform, target.platform.device()
    tokens, width, vocab = 700, 256, 20_000
    make = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, width, generator=make).div(4).to(dtype) for n in (tokens, vocab)
    )
    labels = torch.randint(vocab, (tokens,), generator=make)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    log_p = torch.log_softmax(exact[0] @ exact[1].t(), -1)
    picked = log_p.gather(-1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (picked.sum() + 0.5 * entropy.sum()).backward()
    there = [x.to(device).requires_grad_() for x in (hidden, weight)]
    if target.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    ours = vocab_parallel_logprobs(*there, labels.to(device), platform=platform)
    (ours[0].sum() + 0.5 * ours[1].sum()).backward()
    values = max(
        float((a.cpu() - b).abs().max()) for a, b in zip(ours, (picked, entropy), strict=True)
    )
    gradients = max(
        float((a.grad.cpu() - b.grad).abs().max() / b.grad.abs().max())
        for a, b in zip(there, exact, strict=True)
    )
    return values, gradients, torch.cuda.max_memory_allocated() / 2**30 if target.is_gpu else None


@pytest.mark.on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head(dtype: str, target: Target) -> None:
    """Log-probs from logits in fp32, in blocks of bounded memory.

    Rounded to bfloat16 they would be off by 1e-2.
    """
    ((values, gradients, peak),) = target.run(1, dtype, head_errors, target, getattr(torch, dtype))
    print(
        f"HEAD {dtype}: log-probs and entropy {values:.1e}, "
        f"gradients {gradients:.1e}, peak {peak} GiB"
    )
    if target.is_gpu or dtype == "float32":  # CPU ranks multiply in bfloat16
        assert values < 5e-4
    assert gradients < HEAD_ERROR[dtype]
    if peak is not None:
        assert peak < 6 * 4 * target.platform.head_block_elements / 2**30


def resting(rank: int, port: int, target: Target) -> list[tuple[float, float]]:
    """(GiB freed by leaving, GiB taken again) of each round; bits are compared."""
    from rlhf3d.engine.offload import Storages

    device = target.platform.device()
    states = [
        torch.randn(40_000_001, device=device),
        torch.randn(3, 5, 7, device=device).bfloat16(),
    ]
    before = [state.cpu().clone() for state in states]
    rounds = []
    storages = Storages(states)
    for _ in range(3):
        free = [_free_gib(target)]
        storages.offload()
        target.platform.free_cached()
        free.append(_free_gib(target))
        storages.restore()
        free.append(_free_gib(target))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(states, before, strict=True))
        rounds.append((free[1] - free[0], free[1] - free[2]))
    return rounds


def _free_gib(target: Target) -> float:
    return torch.cuda.mem_get_info()[0] / 2**30 if target.is_gpu else 0.0


@pytest.mark.on_cpu
def test_states_leave_and_come_back(target: Target) -> None:
    (rounds,) = target.run(1, "float32", resting, target)
    print("RESTING GiB freed and taken:", rounds)
    if target.is_gpu:
        size = 40_000_001 * 4 / 2**30
        assert all(abs(freed - size) < 0.05 and abs(taken - size) < 0.05 for freed, taken in rounds)


def wait_for(path: Path, deadline: float) -> None:
    """Until another process has made it, and remove it."""
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not made in time"
        time.sleep(0.01)
    path.unlink()


def exchange(rank: int, port: int, target: Target, shape: RingShape) -> float:
    """Rank 0 sends buckets through memory that both have open, rank 1 reads them; seconds."""
    from rlhf3d.resharding.ring import Ring

    buckets, device = 12, target.platform.device()
    deadline = time.monotonic() + 60
    torch.zeros(1, device=device)
    made, held = (Path(f"{shape.path()}.{what}") for what in ("made", "held"))
    if rank == 0:
        ring = Ring.create(shape)
        made.touch()
        wait_for(held, deadline)  # as in a run, where every reader holds it before all is sent
    else:
        wait_for(made, deadline)
        ring = Ring.open(shape)
        ring.hold(0)  # else the sender takes this reader for dead
        held.touch()
    began = time.monotonic()
    for number in range(buckets):
        expected = torch.arange(shape.slot_bytes, device=device).add(number).to(torch.uint8)
        if rank == 0:
            ring.wait_free(number, deadline)
            ring.slot(number).copy_(expected)
            ring.fill(0, number)
        else:
            ring.wait_filled(number, deadline)
            assert torch.equal(ring.slot(number).to(device), expected), f"bucket {number}"
            ring.take(0, number)
    seconds = time.monotonic() - began
    if rank == 0:  # whose memory it is: until everything was read
        ring.wait_free(buckets - 1 + SLOTS, deadline)
    return seconds


@pytest.mark.on_cpu
def test_ring(target: Target) -> None:
    """Two processes on one GPU, as a trainer and the engine beside it."""
    shape = RingShape(
        name=f"gpu-test-{os.getpid()}",
        senders=("sender",),
        readers=("reader",),
        rows=1,
        slot_bytes=8 << 20,
        on_gpu=target.is_gpu,
        digest=7,
    )
    try:
        seconds = target.run(2, "bfloat16", exchange, target, shape, shared=True)
    finally:
        shape.path().unlink(missing_ok=True)
    print(f"RING {SLOTS} slots of 8 MiB: {max(seconds):.2f} s")


def rates(rank: int, port: int, target: Target, seconds: float) -> dict[str, float]:
    """FLOP/s of a large product, and bytes a second from and to pinned memory."""
    device = target.platform.device()
    pinned = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=target.is_gpu)
    there = torch.empty_like(pinned, device=device)
    a, b = (
        torch.randn(4096 if target.is_gpu else 256, 4096, device=device).bfloat16()
        for _ in range(2)
    )
    work = {
        "flops": (lambda: a @ b.t(), 2.0 * a.shape[0] * b.shape[0] * 4096),
        "host": (lambda: pinned.copy_(there.copy_(pinned)), 2.0 * pinned.numel()),
    }
    found = {}
    for name, (step, amount) in work.items():
        step()
        _finish(target)
        began, rounds = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            step()
            _finish(target)
            rounds += 1
        found[name] = amount * rounds / (time.monotonic() - began)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if target.is_gpu else 1.0
    return {**found, "memory_gib": memory}


def _finish(target: Target) -> None:
    if target.is_gpu:
        torch.cuda.synchronize()


@pytest.mark.on_cpu
def test_rates(target: Target, measured: dict[str, float]) -> None:
    """What the planner assumes of a device, measured."""
    ((found),) = target.run(1, "bfloat16", rates, target, 2.0 if target.is_gpu else 0.2)
    print(f"RATES {found['flops'] / 1e12:.1f} TFLOP/s, host {found['host'] / 1e9:.1f} GB/s")
    measured |= {"memory_gib": found["memory_gib"], "host_gbs": found["host"] / 1e9}
    known = [
        h for h in load_hardware().values() if target.is_gpu and h.is_device(target.platform.reason)
    ]
    for hardware in known:
        share = found["flops"] / hardware.flops["bfloat16"]
        assert 0.3 < share <= 1.0, (
            "a plain product is far from the data sheet: is the GPU shared or throttled?"
        )

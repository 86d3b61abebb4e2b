"""vLLM on one GPU: its log-probs follow every write of weights.

Eager and in CUDA graphs, also after a sleep.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.gpu_target import Target, used_mib
from support.writer_rig import Rig, close_engine, sleep, wake

pytestmark = pytest.mark.gpu

ERROR = {"float32": 1e-4, "bfloat16": 0.08}
"""Of log-probs against transformers in float32; in bfloat16 on average."""


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
        pool.submit(close_engine).result()


def engine(target: Target, dtype: str, **settings: Any) -> dict[str, Any]:
    """vLLM's arguments, those of a run that matter here."""
    environment = target.platform.environment("engine", dtype)
    if not target.is_gpu:
        return {"pack": False, "environment": environment}
    common = {
        "moe_backend": "triton",
        "hf_overrides": {"head_dtype": "float32"},
        "kv_cache_memory_bytes": 256 << 20,
    }
    common["max_num_seqs"] = (
        64  # graphs of up to 128 tokens, which hold the three prompts that are scored
    )
    return {"environment": environment, **common, **settings}


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_log_probs_follow_the_weights(
    dtype: str, eager: bool, target: Target, child: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """Written in place: kernels and graphs read the new weights at the old addresses."""
    if not target.is_gpu and not eager:
        pytest.skip("the CPU has no graphs")
    settings = engine(target, dtype, enforce_eager=eager)
    rig = Rig(child, tmp_path, dtype, settings, family="qwen2", tie=False, kv_heads=2)
    places = rig.rpc("addresses")
    worst = rig.check(ERROR[dtype])
    assert rig.rpc("addresses") == places
    print(f"ENGINE {dtype} {'eager' if eager else 'graphs'}: log-probs {worst:.1e}")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_other_models(
    family: str, target: Target, child: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """A tied head, and experts (Triton's kernels keep them where they are written)."""
    model = {"norm_topk_prob": False, "ffn": 96} if family == "qwen3_moe" else {}
    settings = engine(target, "bfloat16")
    rig = Rig(
        child,
        tmp_path,
        "bfloat16",
        settings,
        family=family,
        tie=family == "llama",
        kv_heads=2,
        **model,
    )
    print(f"ENGINE {family}: log-probs {rig.check(ERROR['bfloat16']):.1e}")


def test_sleeps_and_wakes(
    target: Target, child: ProcessPoolExecutor, tmp_path: Path, measured: dict[str, float]
) -> None:
    """Three times: memory goes and comes back.

    The log-probs are those of what was written after waking.
    """
    if not target.is_gpu:
        pytest.skip("an engine on the CPU gives nothing back")
    settings = engine(target, "bfloat16", enable_sleep_mode=True, enforce_eager=False)
    rig = Rig(child, tmp_path, "bfloat16", settings, family="qwen3", tie=False, kv_heads=2)
    rig.check(ERROR["bfloat16"], updates=3, rests=True)
    awake, began = used_mib(), time.monotonic()
    child.submit(sleep).result()
    asleep = used_mib()
    for part in ("weights", "kv_cache"):
        child.submit(wake, part).result()
    measured["rest_s"] = time.monotonic() - began
    print(f"SLEEP frees {awake - asleep} MiB, {measured['rest_s']:.2f} s there and back")
    assert awake - asleep > 200  # most of the KV cache of 256 MiB
    assert abs(used_mib() - awake) < 64


def test_fp8(target: Target, child: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Quantized by vLLM's own code at each write."""
    settings = engine(target, "bfloat16", quantization="fp8_per_channel") | {
        "quantization": "fp8_per_channel"
    }
    rig = Rig(child, tmp_path, "bfloat16", settings, family="qwen2", tie=False, kv_heads=2)
    print(f"ENGINE fp8: log-probs {rig.check(0.3):.1e}")

"""The weight writer in real vLLM.

After each of several updates its log-probs are those of the new weights.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tiny_model
from support.writer_rig import TINY, Rig, close_engine, logprobs_of, score, start_engine
from transformers import AutoModelForCausalLM

from rlhf3d.checkpoints.convert import Options, plan_conversion
from rlhf3d.models.engine_weights import engine_params
from rlhf3d.units import GIB


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
        pool.submit(close_engine).result()


# Before all others: once an engine of one rank was in the child, its workers cannot be forked.
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.parametrize(
    "model",
    [
        {"family": "qwen2", "tie": False, "kv_heads": 2},
        {"family": "qwen3_moe", "tie": True, "kv_heads": 1, "ffn": 96},
    ],
    ids=lambda model: model["family"],
)
def test_two_tensor_parallel_ranks(
    child: ProcessPoolExecutor, tmp_path: Path, model: dict[str, Any]
) -> None:
    """Shards of everything; with fewer key-value heads than ranks, copies of them."""
    Rig(child, tmp_path, engine=TWO_RANKS, **model).check()


def test_whole_experts_on_two_ranks_equal_vllms_own_loader(
    child: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """By the bits of the packed experts.

    vLLM's CPU kernel crashes on experts that are elsewhere.
    """
    engine = TWO_RANKS | {"enable_expert_parallel": True, "load_format": "auto"}
    rig = Rig(
        child, tmp_path, dtype="bfloat16", engine=engine, family="mixtral", tie=True, kv_heads=1
    )
    own = rig.rpc("expert_digests")
    assert own[0].keys() == own[1].keys() and len({*own[0].values(), *own[1].values()}) == 8
    rig.update()
    assert not {*own[0].values()} & {*rig.rpc("expert_digests")[0].values()}
    rig.rpc("write_folder", tmp_path / "0", expert_parallel=True)
    assert rig.rpc("expert_digests") == own


def test_tied_llama(child: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Packed linear layers and head, live embedding and norms.

    What does not fit is refused by name; no leak.
    """
    rig = Rig(child, tmp_path, family="llama", tie=True, kv_heads=1, ffn=2048)
    rig.check()
    rig.check_memory()
    ((live, packed),) = rig.rpc("live_and_packed")
    assert [name.removeprefix("model.") for name in live[:3]] == [
        "embed_tokens.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
    ]
    (rows,) = rig.rpc("row_sums", "model.embed_tokens.weight")
    assert len(rows) == 192 and all(rows[:150]) and not any(rows[150:]), (
        "the vocabulary's padding is zero"
    )
    assert len(packed) == 8 and len(live) + len(packed) == len(engine_params(rig.spec, 1, 0))
    name = "model.layers.1.mlp.down_proj.weight"
    assert (
        f"{name} has shape (64, 2048) in vLLM and (64, 127)"
        in rig.rpc("refusal", name, {"shape": (64, 127)})[0]
    )
    assert f"the table lacks {name} (1 in all)" in rig.rpc("refusal", name, {})[0]
    renamed = rig.rpc("refusal", name, {"name": "model.typo.weight"})[0]
    assert f"lacks {name} (1 in all) and alone has model.typo.weight (1 in all)" in renamed
    assert "is torch.float32 in vLLM" in rig.rpc("refusal_of_dtype", torch.bfloat16)[0]
    torch.testing.assert_close(rig.score(), rig.expected(), atol=1e-4, rtol=0)


def test_untied_qwen2_with_biases(child: ProcessPoolExecutor, tmp_path: Path) -> None:
    rig = Rig(child, tmp_path, family="qwen2", tie=False, kv_heads=2)
    rig.check()
    ((live, _),) = rig.rpc("live_and_packed")
    assert "lm_head.weight" in live and "model.layers.1.self_attn.qkv_proj.bias" in live


def test_after_forgetting_each_weight_that_does_not_come_again_shows(
    child: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """Live and packed, biases and heads; and nothing else is forgotten."""
    rig = Rig(child, tmp_path, family="qwen2", tie=False, kv_heads=2)
    rig.update()
    ((live, packed),) = rig.rpc("live_and_packed")
    for name in [*live, *packed]:
        rig.rpc("forget")
        rig.update(skip=[name])
        assert rig.score().isnan().any(), name
    rig.rpc("forget")
    rig.update()
    torch.testing.assert_close(rig.score(), rig.expected(), atol=1e-4, rtol=0)


def test_plain_layout_as_on_cuda(child: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Nothing packed: every parameter is live storage, written in row ranges."""
    rig = Rig(child, tmp_path, engine={"pack": False}, family="qwen3", tie=True, kv_heads=1)
    rig.check()
    ((live, packed),) = rig.rpc("live_and_packed")
    assert packed == [] and len(live) == len(engine_params(rig.spec, 1, 0))


def test_bfloat16_equals_vllms_own_loader(child: ProcessPoolExecutor, tmp_path: Path) -> None:
    rig = Rig(
        child,
        tmp_path,
        dtype="bfloat16",
        engine={"load_format": "auto"},
        family="qwen3",
        tie=False,
        kv_heads=2,
    )
    own = rig.score()
    rig.update()
    assert not torch.equal(rig.score(), own)
    rig.rpc("write_folder", tmp_path / "0")
    assert torch.equal(rig.score(), own)


def test_fp8_equals_vllms_own_quantization(child: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Bits and scales are vLLM's own of the same folder, in the storage of the start."""
    fp8 = {"quantization": "fp8_per_channel"}
    rig = Rig(child, tmp_path, dtype="bfloat16", engine=fp8, family="qwen2", tie=False, kv_heads=2)
    places = rig.rpc("addresses")
    rig.update()
    first = rig.rpc("matrix_digests")
    rig.update()
    second, scores = rig.rpc("matrix_digests"), rig.score()
    assert rig.rpc("addresses") == places
    assert not set(first[0].values()) & set(second[0].values())
    difference = (scores - rig.expected()).abs().mean()
    print(f"FP8 mean difference of log-probs {difference:.3g}")
    assert difference < 0.2  # 0.09; of stale weights the log-probs are off by several
    child.submit(start_engine, tmp_path / "2", "bfloat16", load_format="auto", **fp8).result()
    assert rig.rpc("matrix_digests") == second
    assert torch.equal(rig.score(), scores)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts(child: ProcessPoolExecutor, tmp_path: Path, family: str) -> None:
    """An expert size that is not a multiple of the CPU kernel's 32 columns.

    It is padded before it is packed.
    """
    model = {"norm_topk_prob": False} if family == "qwen3_moe" else {"experts": 8}
    rig = Rig(
        child, tmp_path, family=family, tie=family == "mixtral", kv_heads=1, ffn=1008, **model
    )
    rig.check()
    rig.check_memory()
    ((_, packed),) = rig.rpc("live_and_packed")
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    experts = f"model.layers.0.{block}.experts.routed_experts"
    assert {f"{experts}.w13_weight", f"{experts}.w2_weight"} < set(packed)
    refused = rig.rpc("refusal_of_backend", experts)[0]
    assert refused.startswith(f"{experts}.w13_weight: vLLM's FlashInfer CUTLASS kernels")
    with pytest.raises(RuntimeError, match=f"{experts}.w13_weight came alone"):
        rig.update(skip=[f"{experts}.w2_weight"])


def test_a_converted_checkpoint_is_served(child: ProcessPoolExecutor, tmp_path: Path) -> None:
    """From Hugging Face to Megatron and back, in several files."""
    model = make_tiny_model(tmp_path / "hf", **TINY, kv_heads=2)
    small_files = Options(max_shard_gib=100_000 / GIB)
    for source, destination in (("hf", "megatron"), ("megatron", "converted")):
        plan_conversion(tmp_path / source, tmp_path / destination, small_files).run()
    assert len(list((tmp_path / "converted").glob("*.safetensors"))) > 1
    settings = {"load_format": "safetensors"}
    child.submit(start_engine, tmp_path / "converted", "float32", **settings).result()
    found = torch.tensor(child.submit(score).result())
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.testing.assert_close(found, logprobs_of(reference), atol=1e-4, rtol=0)

"""Megatron models against transformers.

Same folder, same tokens, same logits, whatever the layout.

`make test` has each family once, cut by layers and by heads, and each layout of experts and each
family of experts, not each with each. With the GPU set's Megatron it runs what that version could
do otherwise: a layer of each kind, each way to cut one, gradients; not what follows from the same
folder (rotary tables, padding) by this package's own code.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.ranks import run_ranks
from support.tiny_models import LLAMA3_ROPE, YARN_ROPE, make_tiny_model

from rlhf3d.models.boxes import box_slices
from rlhf3d.models.spec import load_spec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform

pytestmark = pytest.mark.usefixtures("megatron")
GPU_SET, GPU_SET_FULL, FULL = pytest.mark.gpu_set, pytest.mark.gpu_set_full, pytest.mark.full
PLATFORM = CPUPlatform(reason="test")
SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
SINGLE = ParallelLayout()
CASES: dict[str, dict[str, Any]] = {
    "llama-tied": {"tie": True},
    "llama-untied": {"tie": False},
    "llama3-rope": {"tie": False, "rope": LLAMA3_ROPE},
    "qwen2-yarn": {"family": "qwen2", "tie": True, "rope": YARN_ROPE},
    "qwen2-tied": {"family": "qwen2", "tie": True},
    "qwen2-untied": {"family": "qwen2", "tie": False},
    "qwen3-tied": {"family": "qwen3", "tie": True},
}
MOE_CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral", "tie": False, "layers": 2},
    "qwen3_moe": {
        "family": "qwen3_moe",
        "tie": True,
        "layers": 2,
        "ffn": 48,
        "experts": 8,
        "experts_per_token": 3,
    },
    "qwen3_moe-unscaled": {
        "family": "qwen3_moe",
        "tie": False,
        "layers": 2,
        "norm_topk_prob": False,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny_model(root / name, **case) for name, case in (CASES | MOE_CASES).items()
    }


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


def random_tokens(folder: Path, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(
        0, load_spec(folder).vocab_size, shape, generator=torch.Generator().manual_seed(1)
    )


def start_rank(
    rank: int,
    port: int,
    folder: Path,
    layout: ParallelLayout,
    role: Any,
    sequence_parallel: bool = False,
) -> list[Any]:
    """Join the world, build this rank's chunks and fill them from the folder."""
    from rlhf3d.models.megatron import build_chunks, load_hf_weights, transformer_config
    from rlhf3d.parallel.megatron_init import initialize_megatron

    initialize_megatron(layout, rank, 0, PLATFORM, timeout_s=60, master_port=port)
    spec, coords = load_spec(folder), layout.coords(rank)
    config = transformer_config(spec, layout, "float32", PLATFORM, sequence_parallel)
    chunks = build_chunks(spec, layout, coords, role, config, PLATFORM, torch.device("cpu"))
    load_hf_weights(chunks, folder, spec, layout, coords, role)
    return chunks


def run_forward(
    chunks: list[Any], tokens: torch.Tensor, loss: Any, forward_only: bool = True
) -> list[Any]:
    """One micro-batch through Megatron's own schedule; what `loss` reports on the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        positions = torch.arange(batch.shape[1]).expand_as(batch)
        return model(batch, positions, None), lambda output: loss(model, output)

    interleaved = len(chunks) > 1
    micro_batches = [tokens] * (chunks[0].config.pipeline_model_parallel_size if interleaved else 1)
    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks] if interleaved else iter(micro_batches),
        model=chunks if interleaved else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=forward_only,
    )
    return reports


def logits_rank(
    rank: int,
    port: int,
    folder: Path,
    layout: ParallelLayout,
    sequence_parallel: bool,
    tokens: list[torch.Tensor],
) -> torch.Tensor | None:
    """Full logits [b, s, vocab] of this data-parallel rank's tokens.

    On tensor rank 0 of the last stage; None elsewhere.
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    chunks = start_rank(rank, port, folder, layout, "policy", sequence_parallel)
    coords = layout.coords(rank)

    def report(
        model: Any, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        logits = gather_from_tensor_model_parallel_region(hidden @ model.head_weight().T)
        return logits.sum(), torch.tensor(1), {"logits": logits}

    with torch.no_grad():
        reports = run_forward(chunks, tokens[coords.dp], report)
    if coords.pp != layout.pp - 1 or coords.tp != 0:
        return None
    vocab = load_spec(folder).vocab_size
    assert not reports[0]["logits"][..., vocab:].any(), "padded rows of the vocabulary are not zero"
    return reports[0]["logits"][..., :vocab]


def max_difference(
    name: str,
    folder: Path,
    layout: ParallelLayout,
    shape: tuple[int, int],
    sequence_parallel: bool = False,
) -> float:
    rows, width = shape  # data-parallel ranks have sequences of different lengths
    tokens = [random_tokens(folder, (rows, width + 8 * dp)) for dp in range(layout.dp)]
    results = run_ranks(layout.world_size, logits_rank, folder, layout, sequence_parallel, tokens)
    logits = [results[rank] for rank in layout.collectors()]
    difference = max(
        float((a - hf_logits(folder, t)).abs().max()) for a, t in zip(logits, tokens, strict=True)
    )
    print(f"\n{name} {layout}{' SP' if sequence_parallel else ''}: max|Δlogit| {difference:.2e}")
    return difference


def both_sets(cases: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Cases, of which the chosen ones run with the GPU set's Megatron in `make test` too."""
    made = []
    for case in cases:
        marks = GPU_SET if case in chosen else GPU_SET_FULL
        made.append(pytest.param(case, marks=marks, id=str(case)))
    return made


@FULL
@GPU_SET_FULL
@pytest.mark.parametrize("name", CASES)
def test_one_rank_matches_transformers(name: str, folders: dict[str, Path]) -> None:
    assert max_difference(name, folders[name], SINGLE, (2, 96)) <= 1e-5


@pytest.mark.parametrize("name", both_sets(CASES, ["llama-tied", "qwen2-untied", "qwen3-tied"]))
def test_tp2_pp2_matches_transformers(name: str, folders: dict[str, Path]) -> None:
    assert max_difference(name, folders[name], ParallelLayout(tp=2, pp=2), (2, 96)) <= 1e-5


@GPU_SET
@pytest.mark.parametrize(
    "layout", [ParallelLayout(tp=2), ParallelLayout(tp=2, pp=2, vpp=2)], ids=str
)
def test_sequence_parallel_and_interleaved_match_transformers(
    layout: ParallelLayout, folders: dict[str, Path]
) -> None:
    folder = folders["llama-tied"]
    assert max_difference("llama-tied", folder, layout, (2, 96), sequence_parallel=True) <= 1e-5


@GPU_SET_FULL
def test_tp3_pp2_of_nine_heads_matches_transformers(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", heads=9, kv_heads=3, hidden=72, ffn=132, vocab=129)
    assert max_difference("llama 9 heads", folder, ParallelLayout(tp=3, pp=2), (2, 96)) <= 1e-5


MOE_LAYOUTS = [
    SINGLE,
    ParallelLayout(dp=2, ep=2),
    ParallelLayout(tp=2),
    ParallelLayout(tp=2, ep=2),
    ParallelLayout(pp=2, dp=2, ep=2),
]
MOE_CHOSEN = [
    ("mixtral", ParallelLayout(tp=2)),
    ("mixtral", ParallelLayout(pp=2, dp=2, ep=2)),
    ("qwen3_moe", SINGLE),
    ("qwen3_moe", ParallelLayout(tp=2, ep=2)),
    ("qwen3_moe-unscaled", ParallelLayout(dp=2, ep=2)),
]
"""Each family, each layout; both versions of Megatron in `make test`."""


def experts() -> list[Any]:
    """Each family of experts in each layout, those that are not chosen in the full run only."""
    made = []
    for case in product(MOE_CASES, MOE_LAYOUTS):
        marks = [GPU_SET] if case in MOE_CHOSEN else [GPU_SET_FULL, FULL]
        made.append(pytest.param(*case, marks=marks, id=f"{case[0]}-{case[1]}"))
    return made


@pytest.mark.parametrize(("name", "layout"), experts())
def test_experts_match_transformers(
    name: str, layout: ParallelLayout, folders: dict[str, Path]
) -> None:
    assert (
        max_difference(name, folders[name], layout, (2, 32), sequence_parallel=layout.tp > 1)
        <= 1e-5
    )


UNEVEN = [
    ParallelLayout(pp=2, first_stage_layers=3),
    ParallelLayout(pp=3, first_stage_layers=2, last_stage_layers=2),
    ParallelLayout(pp=2, vpp=2, last_stage_layers=2),
]


@pytest.mark.parametrize("layout", both_sets(UNEVEN, UNEVEN[1:]))
def test_uneven_stages_match_transformers(layout: ParallelLayout, tmp_path: Path) -> None:
    layers = 6 if layout.vpp == 2 else 5
    folder = make_tiny_model(tmp_path / "m", layers=layers)
    assert max_difference(f"llama {layers} layers", folder, layout, (2, 32)) <= 1e-5


@GPU_SET_FULL
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_padded_vocabulary_matches_transformers(tie: bool, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", tie=tie, vocab=101, layers=2)
    assert (
        max_difference(f"llama 101 tokens tie={tie}", folder, ParallelLayout(tp=2, pp=2), (2, 32))
        <= 1e-5
    )


def export_rank(rank: int, port: int, folder: Path, layout: ParallelLayout) -> list[Any]:
    """(HF name, box, weights) of what this rank exports."""
    from rlhf3d.models.megatron import export_pieces

    chunks = start_rank(rank, port, folder, layout, "policy", sequence_parallel=layout.tp > 1)
    pieces = export_pieces(chunks, load_spec(folder), layout, layout.coords(rank), "lm")
    return [(name, box, tensor.clone()) for name, box, tensor in pieces]


@GPU_SET_FULL
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2-tied", ParallelLayout(tp=2, pp=2, vpp=2)),
        ("mixtral", ParallelLayout(tp=2, pp=2, dp=2, ep=2)),
    ],
    ids=str,
)
def test_export_of_all_ranks_is_the_loaded_file(
    name: str, layout: ParallelLayout, folders: dict[str, Path]
) -> None:
    folder = folders[name]
    loaded = load_file(folder / "model.safetensors")
    exported = {name: torch.full_like(tensor, math.nan) for name, tensor in loaded.items()}
    for pieces in run_ranks(layout.world_size, export_rank, folder, layout):
        for name, box, tensor in pieces:
            block = exported[name][box_slices(box)]
            assert block.isnan().all(), f"{name} {box} exported twice"
            block.copy_(tensor)
    for name, tensor in loaded.items():
        assert torch.equal(exported[name], tensor), name


def gradient_rank(
    rank: int,
    port: int,
    folder: Path,
    layout: ParallelLayout,
    role: Any,
    sequence_parallel: bool,
    tokens: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Scores and gradients of sum(scores**2) at both ends.

    Scores are values, or this rank's share of the logits.
    """
    chunks = start_rank(rank, port, folder, layout, role, sequence_parallel)

    def loss(
        model: Any, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        scores = output.unsqueeze(-1) if role == "value" else output @ model.head_weight().T
        return scores.square().sum(), torch.tensor(1), {"scores": scores.detach()}

    reports = run_forward(chunks, tokens, loss, forward_only=False)
    grads = {name: param.grad for chunk in chunks for name, param in chunk.named_parameters()}
    head = "value_head.weight" if role == "value" else "output_layer.weight"
    return reports[0] | {
        "embedding": grads["embedding.word_embeddings.weight"],
        "head": grads[head],
    }


@GPU_SET
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence-parallel"])
@pytest.mark.parametrize("role", ["policy", "value"])
def test_gradients_match_transformers(
    role: str, sequence_parallel: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModel

    folder = tmp_path / "model"
    shutil.copytree(folders["llama-untied"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = random_tokens(folder, (2, 32))
    trunk = AutoModel.from_pretrained(folder)
    head = weights["score.weight" if role == "value" else "lm_head.weight"].requires_grad_()
    expected = trunk(tokens).last_hidden_state @ head.T
    expected.square().sum().backward()

    ranks = run_ranks(
        2, gradient_rank, folder, ParallelLayout(tp=2), role, sequence_parallel, tokens
    )
    embedding_grad = torch.cat([rank["embedding"] for rank in ranks])
    padding = 1  # transformers gives the padding token, number 0, no gradient
    assert (
        relative_error(embedding_grad[padding:], trunk.embed_tokens.weight.grad[padding:]) <= 1e-5
    )
    for i, rank in enumerate(
        ranks
    ):  # a value head is whole on every rank, a vocabulary head shared out
        share = slice(None) if role == "value" else slice(64 * i, 64 * (i + 1))
        assert relative_error(rank["scores"], expected.detach()[..., share]) <= 1e-5
        assert relative_error(rank["head"], head.grad[share]) <= 1e-5


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@GPU_SET_FULL
def test_missing_value_head_starts_at_zero(folders: dict[str, Path]) -> None:
    tokens = random_tokens(folders["qwen2-tied"], (1, 8))
    (result,) = run_ranks(1, gradient_rank, folders["qwen2-tied"], SINGLE, "value", False, tokens)
    assert torch.equal(result["scores"], torch.zeros(1, 8, 1))


@GPU_SET_FULL
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="run tools/make_smollm2.py first")
@pytest.mark.parametrize("layout", [SINGLE, ParallelLayout(tp=3, pp=2)], ids=str)
def test_smollm2_matches_transformers(layout: ParallelLayout) -> None:
    assert max_difference("SmolLM2-135M", SMOLLM2, layout, (2, 24)) <= 3e-4

"""Check that a Megatron folder and a Hugging Face folder hold the same model.

Invariant: success means that every element of every tensor was read back from disk and compared bit
for bit and, if memory allows, that Megatron (after its own `dist_checkpointing.load`) and
transformers compute the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf3d.checkpoints.convert import HEADS, MegatronSource, OnBytes, To
from rlhf3d.checkpoints.locate import Role
from rlhf3d.checkpoints.stored import WRAPPER_PREFIX, Overlap
from rlhf3d.machine import read_machine
from rlhf3d.models.boxes import box_slices, show
from rlhf3d.models.hf_io import HFReader, model_view
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.models.weights import num_weights
from rlhf3d.units import GIB

TOLERANCE = 1e-3
"""Largest difference of a logit over the largest logit: float32 round-off."""
TOKENS = (2, 32)
"""Rows and columns of the random batch."""
MEMORY_FACTOR = 2.0
"""Peak memory of loading a float32 model, over its weights: gate and up are joined in a copy."""


class VerifyError(RuntimeError):
    """The two folders do not hold the same model."""


@dataclass(frozen=True)
class Verified:
    """What was compared."""

    tensors: int
    elements: int
    max_logit_diff: float | None
    """Of the random batch in float32; None where the logits were not compared."""
    max_logit: float | None
    skipped: str | None
    """Why the logits were not compared."""


def verify(megatron: Path, hf: Path, to: To, on_bytes: OnBytes = lambda count: None) -> Verified:
    """Compare the folders; `to` is the one that was made. VerifyError says what differs."""
    source = MegatronSource(megatron, load_spec(hf, with_weights=False))
    elements = _compare_tensors(source, hf, to, on_bytes)
    # 4 bytes per float32. The two models are loaded one after the other, not side by side.
    wanted_gib = num_weights(source.spec, HEADS[source.role]) * 4 * MEMORY_FACTOR / GIB
    there_gib = read_machine().memory_available_gib
    if wanted_gib > there_gib:
        skipped = (
            f"a float32 model needs {wanted_gib:.1f} GiB of memory, "
            f"{there_gib:.1f} GiB are available"
        )
        return Verified(len(source.shapes), elements, None, None, skipped)
    with HFReader(hf, option="") as reader:
        dtypes = {name: reader.dtype(name) for name in reader.names()}
    # A folder that was made with another dtype holds rounded weights: the other side is rounded
    # alike, so that only the computation is compared.
    cast = None if to == "megatron" else dtypes
    # Where a Megatron folder has several dtypes it has those of its source: nothing was rounded.
    made = set(source.dtypes.values()) if to == "megatron" else set()
    rounded = made.pop() if len(made) == 1 else None
    theirs = _in_process(_hf_scores, hf, source.role, rounded)
    wrapped = all(key.startswith(WRAPPER_PREFIX) for key in source.keys.values())
    keys = source.style.metadata()
    ours = _in_process(_megatron_scores, megatron, wrapped, keys, hf, source.role, cast)
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not (ours.isfinite().all() and theirs.isfinite().all()) or difference > TOLERANCE * largest:
        raise VerifyError(
            f"Megatron and transformers disagree on {megatron} and {hf}: "
            f"logits differ by up to {difference:.2e}, the largest is {largest:.2e}"
        )
    return Verified(len(source.shapes), elements, difference, largest, None)


def _compare_tensors(source: MegatronSource, hf: Path, to: To, on_bytes: OnBytes) -> int:
    """Compare every chunk with the Hugging Face blocks in it; the number of elements compared."""
    compared = dict.fromkeys(source.shapes, 0)
    with HFReader(hf, option="") as reader:
        for slab in source.model.slabs:
            for chunk in source.chunks(slab):
                values = source.reader.read_chunk(chunk)
                for part in slab.overlaps(chunk.box):
                    theirs = reader.read(part.hf_name, part.hf_box)
                    _check_same(values[part.index], theirs, to, part, hf)
                    compared[part.hf_name] += theirs.numel()
                    on_bytes((theirs if to == "hf" else values).itemsize * theirs.numel())
    for name, shape in source.shapes.items():
        if compared[name] != prod(shape):
            raise VerifyError(
                f"{name}: {compared[name]} of {prod(shape)} elements are in {source.folder}"
            )
    return sum(compared.values())


def _check_same(ours: Tensor, theirs: Tensor, to: To, part: Overlap, hf: Path) -> None:
    """Raise VerifyError, naming the block, unless it is the same on both sides."""
    if not _same_bits(ours, theirs, to):
        raise VerifyError(
            f"{part.hf_name}{show(part.hf_box)} differs from what {hf} was made from or into"
        )


def _same_bits(ours: Tensor, theirs: Tensor, to: To) -> bool:
    """Whether one block is the other's, rounded to the dtype of the one that was made from it."""
    ours, theirs = (ours.to(theirs.dtype), theirs) if to == "hf" else (ours, theirs.to(ours.dtype))
    return torch.equal(_bits(ours), _bits(theirs))


def _bits(tensor: Tensor) -> Tensor:
    # As bytes a NaN equals itself, and 0.0 differs from -0.0.
    return tensor.contiguous().view(-1).view(torch.uint8)


def _in_process(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run in a process of its own: patched libraries and memory end with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        try:
            return child.submit(partial(function, *args)).result()
        except Exception as error:
            raise VerifyError(f"no logits of {args[0]}: {error!r}") from error


def random_tokens(spec: ModelSpec) -> Tensor:
    """The batch that both sides score, [rows, columns]."""
    # A generator of its own: both processes draw the same tokens, whatever else was drawn before.
    return torch.randint(0, spec.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _hf_scores(folder: Path, role: Role, cast: torch.dtype | None = None) -> Tensor:
    """Logits [b, s, vocab] or values [b, s, 1] of transformers in float32, of weights in `cast`."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if role == "actor" else AutoModelForSequenceClassification
    with model_view(folder) as view:
        model, info = auto.from_pretrained(view, dtype=torch.float32, output_loading_info=True)
    left = {
        problem: sorted(info[problem])
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if any(left.values()):
        raise VerifyError(f"transformers loads {folder} with {left}")
    if cast is not None:
        for weight in model.parameters():
            weight.copy_(weight.to(cast))
    # The head is applied to every token: the classifier's own forward scores only the last.
    hidden = getattr(model, model.base_model_prefix)(
        random_tokens(load_spec(folder))
    ).last_hidden_state
    scores: Tensor = (model.lm_head if role == "actor" else model.score)(hidden)
    return scores


@torch.no_grad()
def _megatron_scores(
    folder: Path,
    wrapped: bool,
    keys: dict[str, bool],
    reference: Path,
    role: Role,
    cast: dict[str, torch.dtype] | None,
) -> Tensor:
    """The same by Megatron on one rank, its weights rounded to the dtype that they have in `cast`.

    `wrapped` and `keys` (Megatron's metadata) say how the folder names its tensors.
    """
    from rlhf3d.parallel.layout import ParallelLayout
    from rlhf3d.parallel.meeting import open_meeting
    from rlhf3d.parallel.megatron_init import initialize_megatron
    from rlhf3d.parallel.platform import CPUPlatform

    platform, layout, spec = (
        CPUPlatform("verify"),
        ParallelLayout(),
        load_spec(reference, with_weights=False),
    )
    # Before the first import of Megatron: this applies the patches.
    platform.prepare_worker(torch.get_num_threads())
    initialize_megatron(layout, 0, 0, platform, timeout_s=60, master_port=open_meeting())
    from megatron.core import dist_checkpointing

    from rlhf3d.checkpoints.sharded import METADATA
    from rlhf3d.models.megatron import bound_params, build_chunks, transformer_config

    place = (spec, layout, layout.coords(0))
    config = transformer_config(spec, layout, "float32", platform)
    chunks = build_chunks(
        *place, "policy" if role == "actor" else "value", config, platform, torch.device("cpu")
    )
    (model,) = chunks
    prefix = WRAPPER_PREFIX if wrapped else ""
    state = {"model": model.sharded_state_dict(prefix=prefix, metadata=METADATA | keys)}
    loaded = dist_checkpointing.load(state, str(folder))["model"]
    model.load_state_dict({name.removeprefix(prefix): value for name, value in loaded.items()})
    for _, entry, param in bound_params(chunks, *place, HEADS[role]) if cast else ():
        for piece in entry.pieces:
            block = param[box_slices(piece.local_box)]
            block.copy_(block.to((cast or {})[piece.hf_name]))
    tokens = random_tokens(spec)
    output = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    scores: Tensor = output.unsqueeze(-1) if role == "critic" else output @ model.head_weight().T
    # transformers has no columns for rows that pad Megatron's vocabulary.
    return scores[..., : spec.vocab_size] if role == "actor" else scores

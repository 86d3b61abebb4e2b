"""Corrections to megatron-core: one file per patch, applied once, before Megatron is imported.

Invariant: after `apply(kind)` every patch that this platform and version need is in place; on a
version these were not written for, or when Megatron was imported too early, it raises instead.
Importing this package imports neither torch nor Megatron.

The CPU set has megatron-core 0.16.1 and the GPU set 0.19.2. `make integration` tests each patch
with both: where it is needed upstream fails without it, elsewhere upstream is right without it.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from importlib import metadata

from packaging.specifiers import SpecifierSet

from megatron_patches import (
    checkpoint_queue,
    clip_in_place,
    device,
    isend_alias,
    lone_replica,
    moe_router_gemm,
    moe_split_sizes,
    norm_sequence_parallel,
    output_layer_fusion,
    rng_tracker,
)
from megatron_patches.patch import Patch, PatchError, Target

__all__ = [
    "PATCHES",
    "SUPPORTED",
    "Patch",
    "PatchError",
    "PatchStatus",
    "Target",
    "apply",
    "installed_version",
    "table",
]

SUPPORTED = ">=0.16,<0.20"
"""Versions of megatron-core whose sources the patches were checked against."""

PATCHES: tuple[Patch, ...] = (
    device.PATCH,  # first: the others import Megatron
    rng_tracker.PATCH,
    norm_sequence_parallel.PATCH,
    isend_alias.PATCH,
    checkpoint_queue.PATCH,
    moe_router_gemm.PATCH,
    moe_split_sizes.PATCH,
    output_layer_fusion.PATCH,
    lone_replica.PATCH,
    clip_in_place.PATCH,
)

_KINDS = ("cpu", "cuda")
_applied_kind: str | None = None
_status: dict[str, str] = {}


@dataclass(frozen=True)
class PatchStatus:
    """One row of `table()`."""

    name: str
    status: str
    """applied, not applied yet, or why it is not needed."""
    versions: str
    symbols: tuple[str, ...]
    reason: str


def apply(platform_kind: str, *, skip: Collection[str] = ()) -> None:
    """Apply what `platform_kind` ("cpu" or "cuda") needs; later calls for the same kind do nothing.

    `skip` names patches to leave out, to see what upstream does without them. Raises ValueError for
    an unknown kind, PatchError for an unsupported version, changed upstream code or a too early
    import.
    """
    global _applied_kind
    if platform_kind not in _KINDS:
        raise ValueError(f"platform kind {platform_kind!r} is not one of {', '.join(_KINDS)}")
    if _applied_kind == platform_kind:
        return
    if _applied_kind is not None:
        raise PatchError(
            f"megatron-core is already patched for {_applied_kind}: use a new process for "
            f"{platform_kind}"
        )
    version = installed_version()
    # prereleases: otherwise a development build within the range would count as outside.
    if not SpecifierSet(SUPPORTED).contains(version, prereleases=True):
        raise PatchError(
            f"megatron-core {version} is outside {SUPPORTED}, the versions the patches were "
            f"written for: pip install 'megatron-core{SUPPORTED}'"
        )
    # Before the patches: they import Megatron, which warns at import.
    _silence(platform_kind)
    if platform_kind == "cpu":
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # jit_fuser is torch.compile, evaluated at import
    for patch in PATCHES:
        _status[patch.name] = _apply_one(patch, platform_kind, version, skip)
    _applied_kind = platform_kind


def _apply_one(patch: Patch, platform_kind: str, version: str, skip: Collection[str]) -> str:
    """Apply one patch where needed; its status."""
    why_not = patch.not_needed_because(platform_kind, version)
    if why_not:
        return f"not needed: {why_not}"
    if patch.name in skip:
        return "skipped on request"
    if not patch.needed():
        return "not needed: this installation does not have the defect"
    patch.check(version)
    patch.apply()
    return "applied"


def table() -> list[PatchStatus]:
    """Every patch with its status in this process. Imports nothing."""
    return [
        PatchStatus(p.name, _status.get(p.name, "not applied yet"), p.versions, p.symbols, p.reason)
        for p in PATCHES
    ]


def installed_version() -> str:
    """Version of the installed megatron-core; PatchError with the way out when there is none."""
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise PatchError(
            f"megatron-core is not installed: pip install --no-deps 'megatron-core{SUPPORTED}'"
        ) from error


_NOISE = (
    (FutureWarning, ".*(all_gather_into_tensor|reduce_scatter_tensor)"),
    (FutureWarning, "Please use DTensor instead"),
    (UserWarning, "The argument order of load has been changed"),
    (UserWarning, "torch.distributed is disabled, unavailable or uninitialized"),
    (UserWarning, "MimoModelConfig is experimental"),
)
"""Megatron's use of older torch interfaces, about which its user can do nothing."""
_NOISY_LOGS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}
"""What newer versions log of their plans, by logger."""
_NOISE_ON_CPU = (
    (UserWarning, "Transformer Engine and Apex are not installed"),
    (UserWarning, "Apex is not installed"),
    (
        UserWarning,
        "When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONN",
    ),
    (UserWarning, "full scope is deprecated"),  # about CUDA graphs, printed for the default
    (
        UserWarning,
        "The .grad attribute of a Tensor that is not a leaf",
    ),  # fp32 shards are views of parameters
)


def _silence(platform_kind: str) -> None:
    """Hide warnings that tell the user of rlhf3d nothing."""
    for category, message in _NOISE + (_NOISE_ON_CPU if platform_kind == "cpu" else ()):
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, text in _NOISY_LOGS.items():
        logging.getLogger(name).addFilter(partial(_is_other, text))


def _is_other(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()

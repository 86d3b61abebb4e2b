"""What Transformer Engine's layers compute on CPU ranks.

`python -m support.te_runs FOLDER JOBS RESULTS`.

Invariant: Transformer Engine is in this process alone, and in the ranks forked from it: Megatron
uses it wherever it is found. FOLDER holds its sources; JOBS are (world size, function, arguments)
by name, and RESULTS what the ranks return, as torch saves them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform


class TransformerEnginePlatform(CPUPlatform):
    """The layers, fusions and optimizer of the GPU platform, on CPU ranks."""

    spec_style = CUDAPlatform.spec_style

    def layer_spec(self, qk_layernorm: bool, num_experts: int = 0) -> Any:
        return CUDAPlatform.layer_spec(self, qk_layernorm, num_experts)  # type: ignore[arg-type]

    def transformer_config_overrides(self) -> dict[str, Any]:
        return CUDAPlatform.transformer_config_overrides(self)  # type: ignore[arg-type]


def main(folder: str, jobs: str, results: str) -> None:
    """Run the jobs, one after the other."""
    from support import te_kernels

    te_kernels.install(Path(folder))
    import megatron_patches

    megatron_patches.apply("cpu")
    from support.ranks import run_ranks

    import rlhf3d.checkpoints.sharded
    import rlhf3d.engine.megatron_engine
    import rlhf3d.parallel.megatron_init  # noqa: F401

    wanted = torch.load(jobs, weights_only=False)
    torch.save(
        {name: run_ranks(size, run, *args) for name, (size, run, args) in wanted.items()}, results
    )


if __name__ == "__main__":
    from support.te_runs import (
        main as run,
    )  # as a module of that name, so that jobs can name its platform

    run(*sys.argv[1:])

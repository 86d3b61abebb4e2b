"""What the weight writer's test adds to each vLLM worker.

Loading a Hugging Face folder through the weight table.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from rlhf3d.models.boxes import box_slices
from rlhf3d.models.engine_weights import engine_params
from rlhf3d.models.hf_io import HFReader
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import LocalParam
from rlhf3d.rollout.weight_writer import WeightWriter

ROWS_AT_ONCE = 5


class WriterWorker:
    """Methods for `LLM.collective_rpc`; `self` is vLLM's worker of one rank."""

    if TYPE_CHECKING:
        model_runner: Any
        model_config: Any

    def write_folder(
        self,
        spec: ModelSpec,
        folder: Path,
        expert_parallel: bool = False,
        skip: Sequence[str] = (),
        times: int = 1,
    ) -> list[int]:
        """Load all parameters except `skip`, live ones a few rows at a time.

        The buffer that they pass through is filled with NaN after each.

        Returns the resident bytes of this worker's process after each of `times` loads.
        """
        params = self._table(spec, expert_parallel)
        if not hasattr(self, "_writer"):
            self._writer = WeightWriter(
                self.model_runner.get_model(), params, self.model_config.dtype
            )
        reader = HFReader(folder)
        buffer = torch.empty(
            max(math.prod(param.shape) for param in params), dtype=self.model_config.dtype
        )
        resident = []
        for _ in range(times):
            for param in params:
                if param.name not in skip:
                    whole = _assemble(param, reader, buffer)
                    live = self._writer.in_place(param.name)
                    if live is None:
                        self._writer.load_packed(param.name, whole)
                    else:
                        real_rows = max(
                            (piece.local_box[0][1] for piece in param.pieces), default=0
                        )
                        for row in range(0, real_rows, ROWS_AT_ONCE):
                            rows = slice(row, min(row + ROWS_AT_ONCE, real_rows))
                            live[rows].copy_(whole[rows])
                    buffer.fill_(math.nan)
            self._writer.finish()
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        return resident

    def forget(self, spec: ModelSpec) -> None:
        """Make every weight NaN."""
        self._writer.forget()

    def live_and_packed(self, spec: ModelSpec) -> tuple[list[str], list[str]]:
        """Names of the parameters written in place, and of those given whole."""
        names = [param.name for param in self._table(spec)]
        live = [name for name in names if self._writer.in_place(name) is not None]
        return live, [name for name in names if name not in live]

    def shared_memory(self, spec: ModelSpec) -> list[str]:
        """Files that this worker shares with the other ranks.

        That vLLM leaves behind when it ends.
        """
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sorted(
            {line.split()[-1] for line in lines if "/dev/shm/" in line and "cpushm" in line}
        )

    def row_sums(self, spec: ModelSpec, name: str) -> list[float]:
        """Sum of absolute values of each row of a live parameter."""
        live = self._writer.in_place(name)
        assert live is not None, name
        return live.abs().sum(-1).tolist()

    def matrix_digests(self, spec: ModelSpec) -> dict[str, str]:
        """A digest of the bits of each linear layer's weight.

        Of its scales, as the kernel reads them.
        """
        tensors = dict(self.model_runner.get_model().named_parameters())
        return {
            n: _digest(tensors[n])
            for n in tensors
            if n.endswith(("proj.weight", "proj.weight_scale"))
        }

    def addresses(self, spec: ModelSpec) -> list[int]:
        """Where the parameters are."""
        return [param.data_ptr() for param in self.model_runner.get_model().parameters()]

    def expert_digests(self, spec: ModelSpec) -> dict[str, str]:
        """A digest of the bits of each of this rank's expert tensors, as the kernel reads them."""
        return {
            name: _digest(tensor)
            for name, tensor in self.model_runner.get_model().named_parameters()
            if ".routed_experts." in name
        }

    def refusal(self, spec: ModelSpec, name: str, change: dict[str, Any]) -> str:
        """What a writer says to a table whose parameter `name` is changed, or left out."""
        changed = [
            replace(p, **change) if p.name == name else p
            for p in self._table(spec)
            if change or p.name != name
        ]
        return self._refusal(changed, self.model_config.dtype)

    def refusal_of_dtype(self, spec: ModelSpec, dtype: torch.dtype) -> str:
        """What a writer says to weights of another dtype."""
        return self._refusal(self._table(spec), dtype)

    def refusal_of_backend(self, spec: ModelSpec, name: str) -> str:
        """What a writer says where the experts' kernel is one of another platform."""
        method = self.model_runner.get_model().get_submodule(name).quant_method
        own, method.unquantized_backend = (
            method.unquantized_backend,
            type(method.unquantized_backend).FLASHINFER_CUTLASS,
        )
        try:
            return self._refusal(self._table(spec), self.model_config.dtype)
        finally:
            method.unquantized_backend = own

    def _refusal(self, params: Sequence[LocalParam], dtype: torch.dtype) -> str:
        try:
            WeightWriter(self.model_runner.get_model(), params, dtype)
        except RuntimeError as error:
            return str(error)
        return ""

    def _table(self, spec: ModelSpec, expert_parallel: bool = False) -> list[LocalParam]:
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        return engine_params(spec, ranks, rank, expert_parallel)


def _assemble(param: LocalParam, reader: HFReader, buffer: torch.Tensor) -> torch.Tensor:
    """The whole parameter, as a view of the start of `buffer`."""
    whole = buffer[: math.prod(param.shape)].view(param.shape)
    whole.zero_()
    for piece in param.pieces:
        target = whole[box_slices(piece.local_box)]
        target.copy_(reader.read(piece.hf_name, piece.hf_box).view(target.shape))
    return whole


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()

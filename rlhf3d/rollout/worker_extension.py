"""What rlhf3d adds to each vLLM worker: its end of the weight stream, and a scale of the logits.

Invariant: after `receive_weights` every layer computes with the received weights, packed copies
included. vLLM mixes this class into its worker by name (worker_extension_cls).
Runs in: engine rank.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank

from rlhf3d.resharding.messages import Group
from rlhf3d.resharding.receiving import MessageInbox, RingInbox, WeightReceiver
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.api import SyncReport
from rlhf3d.rollout.weight_writer import WeightWriter


class WeightSyncWorker:
    """Methods for `VLLMEngine._on_worker`; `self` is vLLM's worker of one rank."""

    if TYPE_CHECKING:
        model_runner: Any
        vllm_config: Any
        device: torch.device

    def open_weights(self, setup: SyncSetup, engine: int, meeting: tuple[str, int] | None) -> None:
        """Open this rank's end of the stream; senders of messages, if any, meet at `meeting`.

        Raises RuntimeError, naming the parameter, where vLLM's model differs from the weight table.
        """
        dst = setup.destination_of(engine, get_tensor_model_parallel_rank())
        self._weight_writer = WeightWriter(
            self.model_runner.get_model(), setup.table(dst), getattr(torch, setup.dtype)
        )
        place = setup.plan.destinations[dst]
        if setup.colocated:
            # Several engines may read one ring; each acknowledges buckets in its own place.
            self._weight_inbox: Any = RingInbox(setup, dst, place.engines.index(engine))
        else:
            assert meeting is not None, "engines on devices of their own receive messages"
            # In the messages' group training ranks come first, then engine ranks.
            rank = setup.layout.world_size + dst
            group = Group(setup.backend, rank, setup.message_ranks, *meeting, setup.timeout_s)
            device = self.device if setup.weights_on_gpu else torch.device("cpu")
            self._weight_inbox = MessageInbox(setup, dst, group, device)
        self._weight_receiver = WeightReceiver(setup, dst, self._weight_inbox)

    @torch.no_grad()
    def receive_weights(self, policy_version: int, sync: int) -> SyncReport:
        """Load one sync.

        After a SyncError the engine is unusable: part of its weights are new.
        """
        if not hasattr(self, "_weight_receiver"):
            raise RuntimeError(
                "this engine has not opened a weight stream: it was started again since the run "
                "began"
            )
        start = time.perf_counter()
        # Parts of vLLM's packing code ask for the current config, which is set only in the block.
        with set_current_vllm_config(self.vllm_config):
            self._weight_receiver.load(self._weight_writer, policy_version, sync)
        times = self._weight_receiver.times
        return SyncReport(
            policy_version=policy_version,
            received_bytes=times.received_bytes,
            wait_s=times.wait_s,
            verify_s=times.verify_s,
            load_s=time.perf_counter() - start - times.wait_s - times.verify_s,
        )

    @torch.no_grad()
    def forget_weights(self) -> None:
        """Make all weights NaN, so that one which is not received again shows."""
        if not hasattr(self, "_weight_writer"):
            return  # before the stream is open there are only vLLM's dummy weights
        with set_current_vllm_config(self.vllm_config):
            self._weight_writer.forget()

    def close_weights(self) -> None:
        """Release the stream's memory."""
        if hasattr(self, "_weight_inbox"):
            self._weight_inbox.close()

    def set_logit_scale(self, scale: float) -> None:
        """Multiply logits by `scale` (1 / temperature) before anything reads them.

        1.0 restores the model's own.
        """
        processor: Any = getattr(self.model_runner.get_model(), "logits_processor", None)
        assert hasattr(processor, "scale"), (
            "vLLM's model has no logits_processor.scale to score at a temperature"
        )
        if not hasattr(self, "_own_logit_scale"):
            # Once: afterwards processor.scale holds what this method set.
            self._own_logit_scale = processor.scale
        processor.scale = self._own_logit_scale * scale

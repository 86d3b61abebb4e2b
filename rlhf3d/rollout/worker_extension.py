"""What rlhf3d adds to each vLLM worker: its end of the weight stream, and log-probs at a temperature.

Invariant: after `receive_weights` every layer computes with the received weights, packed copies included. vLLM mixes
this class into its worker by name (worker_extension_cls).
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank

from rlhf3d.resharding.messages import Group
from rlhf3d.resharding.receiving import MessageInbox, RingInbox, WeightReceiver
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.weight_writer import WeightWriter


class WeightSyncWorker:
    """Methods for `LLM.collective_rpc`; `self` is vLLM's worker of one rank."""

    if TYPE_CHECKING:
        model_runner: Any
        vllm_config: Any
        device: torch.device

    def open_weights(self, setup: SyncSetup, engine: int, meeting: tuple[str, int] | None) -> None:
        """Open this rank's end of the stream; `meeting` is where the senders of messages meet, if there are any.

        Raises RuntimeError, naming the parameter, where vLLM's model is not what the weight table says.
        """
        dst = setup.destination_of(engine, get_tensor_model_parallel_rank())
        self._weight_writer = WeightWriter(
            self.model_runner.get_model(), setup.table(dst), getattr(torch, setup.dtype)
        )
        place = setup.plan.destinations[dst]
        if setup.colocated:
            self._weight_inbox: Any = RingInbox(setup, dst, place.engines.index(engine))
        else:
            assert meeting is not None, "engines on devices of their own receive messages"
            rank = setup.layout.world_size + dst
            group = Group(setup.backend, rank, setup.message_ranks, *meeting, setup.timeout_s)
            device = self.device if setup.weights_on_gpu else torch.device("cpu")
            self._weight_inbox = MessageInbox(setup, dst, group, device)
        self._weight_receiver = WeightReceiver(setup, dst, self._weight_inbox)

    @torch.no_grad()
    def receive_weights(self, policy_version: int, sync: int) -> dict[str, float]:
        """Load one sync; where its seconds went. After a SyncError the engine is unusable: half of it is new."""
        if not hasattr(self, "_weight_receiver"):
            raise RuntimeError(
                "this engine has not opened a weight stream: it was started anew since the run began"
            )
        start = time.perf_counter()
        with set_current_vllm_config(self.vllm_config):
            self._weight_receiver.load(self._weight_writer, policy_version, sync)
        times = asdict(self._weight_receiver.times)
        return {
            **times,
            "load_s": time.perf_counter() - start - times["wait_s"] - times["verify_s"],
        }

    @torch.no_grad()
    def forget_weights(self) -> None:
        """Make all weights NaN, so that one which is not received again shows; before the stream is open they are
        vLLM's own, and no others were ever here."""
        if not hasattr(self, "_weight_writer"):
            return
        with set_current_vllm_config(self.vllm_config):
            self._weight_writer.forget()

    def close_weights(self) -> None:
        """Let go of the stream's memory."""
        if hasattr(self, "_weight_inbox"):
            self._weight_inbox.close()

    def set_logit_scale(self, scale: float) -> None:
        """Multiply logits by `scale` (1 / temperature) before anything reads them; 1.0 restores the model's own."""
        processor: Any = getattr(self.model_runner.get_model(), "logits_processor", None)
        assert hasattr(processor, "scale"), (
            "vLLM's model has no logits_processor.scale to score at a temperature"
        )
        if not hasattr(self, "_own_logit_scale"):
            self._own_logit_scale = processor.scale
        processor.scale = self._own_logit_scale * scale

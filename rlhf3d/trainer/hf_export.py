"""The actor as a Hugging Face folder: its complete tensors, gathered by the driver one at a time.

Invariant: the driver never holds more than one tensor.
Runs in: driver, through a weight stream of its own from the training ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf3d.disk import NewFile
from rlhf3d.models.hf_io import write_model
from rlhf3d.models.weights import hf_tensors
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.placement.waiting import gather
from rlhf3d.placement.worker import TrainWorker
from rlhf3d.resharding.receiving import RingInbox, WeightReceiver
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.trainer.weight_sync import open_stream, seal_stream


class HFExport:
    """Writes the actor's weights in the training dtype."""

    def __init__(
        self,
        sync: SyncSetup,
        dtype: str,
        actor: TrainGroup,
        model_folder: Path,
        chat_template: str | None = None,
    ) -> None:
        """`sync`: the stream to the engines, whose plan of the actor this one shares.

        `model_folder` has the configuration and tokenizer that go with the weights;
        `chat_template` takes the place of its own.
        """
        self._sync, self._dtype, self._actor = sync, dtype, actor
        self._model_folder, self._chat_template = model_folder, chat_template
        self._receiver: WeightReceiver | None = None
        self._open_files = ExitStack()
        self._exports = 0

    def check(self) -> None:
        """ValueError unless an export can be made: to be known before the first step."""
        self._reading_rank()

    def write(self, folder: Path, policy_version: int) -> list[NewFile]:
        """Write the weights as they are now, which are of `policy_version`, into a new folder.

        Its files of weights are on disk; the caller syncs the others.
        """
        dtype = getattr(torch, self._dtype)
        forms = {name: (shape, dtype) for name, shape in hf_tensors(self._sync.spec, "lm").items()}
        folder.mkdir()
        return write_model(
            folder,
            forms,
            self._tensors(policy_version),
            self._model_folder,
            chat_template=self._chat_template,
        )

    def close(self) -> None:
        """Release shared memory; that of other processes goes with them."""
        self._open_files.close()

    def _tensors(self, policy_version: int) -> Iterator[tuple[str, Tensor]]:
        """By HF name; a tensor is valid until the next is asked for."""
        # At the first export: a run that makes none needs no shared memory for it.
        if self._receiver is None:
            self._receiver = self._open()
        stream, export = self._receiver, self._exports
        self._exports += 1
        # Not waited for yet: ranks go on only as the driver takes what they sent.
        sends = self._actor.start_all(
            TrainWorker.send_weights, stream.setup.name, policy_version, export
        )
        for param, tensor in stream.stream_params(policy_version, export):
            yield param.name, tensor
        gather("save_checkpoint", sends, self._actor.timeout_s)

    def _open(self) -> WeightReceiver:
        # A name of its own, which shared memory goes by; the driver reads that memory as an engine
        # on the device of `reader_beside` would.
        setup = replace(
            self._sync,
            name=f"{self._sync.name}-export",
            dtype=self._dtype,
            target="export",
            colocated=True,
            reader_beside=self._reading_rank(),
        )
        open_stream(setup, self._actor, None)
        inbox = self._open_files.enter_context(closing(RingInbox(setup, 0)))
        seal_stream(setup, self._actor)
        return WeightReceiver(setup, 0, inbox)

    def _reading_rank(self) -> int:
        """The first training rank on the driver's node, from which the driver reads."""
        rank = self._actor.first_rank_here()
        if rank is None:
            raise ValueError(
                "trainer.save_hf: exporting the actor's weights needs a training rank of "
                "actor.layout on the driver's node: start the command on a node that trains, or "
                "set trainer.save_hf=never (`rlhf3d convert` exports a checkpoint later)"
            )
        return rank

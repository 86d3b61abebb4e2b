"""Messages between pipeline stages, of shapes that follow from the micro-batches of every stage.

Invariant: stages never send each other a shape. Megatron does so before each message of variable
length, and waits for the device to read it, so that no stage can launch work ahead.
Imports Megatron, so patch it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection

Shape = tuple[int, ...]


class PlannedCommunicator(P2PCommunicator):
    """Send and receive hidden states and their gradients, one message per micro-batch.

    Their `shapes` are known beforehand, in schedule order.
    """

    def __init__(self, config: Any, shapes: Sequence[Shape]) -> None:
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        chunks = config.virtual_pipeline_model_parallel_size or 1
        table = schedule_table(config, len(shapes))

        def messages(without: int | None) -> Iterator[Shape]:
            return (shapes[number] for number, passed in table if passed != without)

        # With several chunks the stages form a ring: the first takes from the last, and gives to
        # it, except for the model's own first input and last output.
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self._from_prev = messages(0 if first else None)
        self._from_next = messages(0 if last else None)
        self._to_prev = messages(chunks - 1 if first else None)
        self._to_next = messages(chunks - 1 if last else None)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape | None, Shape | None]:
        _check_shape(tensor_send_next, self._to_next)
        _check_shape(tensor_send_prev, self._to_prev)
        from_prev = next(self._from_prev) if recv_prev else None
        from_next = next(self._from_next) if recv_next else None
        return from_prev, from_next


def schedule_table(config: Any, micro_batches: int) -> list[tuple[int, int]]:
    """(Micro-batch, chunks of this rank that it passed before), forward and backward alike."""
    chunks = config.virtual_pipeline_model_parallel_size or 1
    group_size = config.microbatch_group_size_per_vp_stage if chunks > 1 else micro_batches
    table: list[tuple[int, int]] = get_schedule_table(micro_batches, chunks, group_size)
    return table


def _check_shape(tensor: Any, planned: Iterator[Shape]) -> None:
    """Take the next planned shape where there is a message, which must have it."""
    if tensor is None:
        return
    expected = next(planned)
    assert tuple(tensor.shape) == expected, (
        f"message of shape {tuple(tensor.shape)}, planned {expected}"
    )


def schedule_arguments(config: Any, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Return Megatron's arguments for messages of these shapes; none where there is one stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return {}
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return {"p2p_communicator": PlannedCommunicator(config, shapes), "pg_collection": groups}

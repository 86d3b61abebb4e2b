"""One model on one rank: forward passes, the update, and its weights, through Megatron's schedules.

Invariant: every number that leaves here (log-probs, values, loss, gradient norm, updated weights)
is the same for every layout, to fp32 round-off: losses arrive as shares of a global normalizer,
gradients are summed and never averaged.
Runs in: training rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf3d.algorithms.objectives import Objective
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.dispatch import MiniBatch
from rlhf3d.batching.micro import MicroBatching
from rlhf3d.config.derived import width_multiples
from rlhf3d.config.schema import LayoutConfig, OptimConfig
from rlhf3d.engine.finite import NonFiniteUpdate, require_finite
from rlhf3d.engine.logprobs import vocab_parallel_logprobs
from rlhf3d.engine.microbatch import MicroBatch, UpdateResult, make_microbatch, token_shape
from rlhf3d.engine.offload import ModelStates
from rlhf3d.engine.param_gather import ParamGather
from rlhf3d.engine.span_timers import SpanTimers
from rlhf3d.models.boxes import Box
from rlhf3d.models.megatron import (
    HEADS,
    Role,
    bound_params,
    build_chunks,
    export_pieces,
    load_hf_weights,
    transformer_config,
)
from rlhf3d.models.spec import ModelSpec
from rlhf3d.observability.profile.recorder import recorder, span
from rlhf3d.parallel.context import sum_shares
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import Platform


@dataclass(frozen=True)
class EngineContext:
    """Settings that all models of a rank share."""

    spec: ModelSpec
    layout: ParallelLayout
    layout_config: LayoutConfig
    rank: int
    platform: Platform
    dtype: str
    device: torch.device
    temperature: float
    total_steps: int
    skip_nonfinite: bool = False
    """Skip an optimizer step whose loss or gradient is not finite, instead of stopping."""
    packed: bool = False
    """Micro-batches are packed sequences instead of padded rows."""
    share_prefixes: bool = False
    """Rows of a micro-batch that begin with the same tokens have them once."""
    offload: bool = False
    """Keep weights, gradients and optimizer state in host memory between calls."""
    shared: bool = False
    """Engines that sleep take the device's memory between calls."""


class MegatronEngine:
    """A policy or value model on this rank; trainable when it has an optimizer config."""

    def __init__(
        self, context: EngineContext, role: Role, folder: str, optim: OptimConfig | None
    ) -> None:
        from megatron.core import parallel_state

        self.context = context
        self.role: Role = role
        self.coords = context.layout.coords(context.rank)
        self.is_last_stage = self.coords.pp == context.layout.pp - 1
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.cp_group = parallel_state.get_context_parallel_group()
        layout = context.layout_config
        self.widths = MicroBatching(
            1,
            packed=context.packed,
            share_prefixes=context.share_prefixes,
            **width_multiples(layout, context.platform.kind),
        )
        self.config = transformer_config(
            context.spec,
            context.layout,
            context.dtype,
            context.platform,
            sequence_parallel=layout.sequence_parallel,
            recompute=layout.recompute if optim is not None else "none",
        )
        place = (context.spec, context.layout, self.coords)
        self.chunks = build_chunks(*place, role, self.config, context.platform, context.device)
        load_hf_weights(self.chunks, folder, *place, role)
        self.models: list[torch.nn.Module] = [self._wrap(chunk) for chunk in self.chunks]
        self.gather = ParamGather([])
        self.timers: SpanTimers | None = None
        """While a step is profiled."""
        self.optimizer: Any = None
        self.scheduler: Any = None
        if optim is not None:
            self._make_trainable(optim)
        else:
            for model in self.models:
                model.requires_grad_(False)
        self.states = ModelStates(
            self.models,
            self.optimizer,
            context.platform.free_cached,
            context.offload,
            context.shared,
        )

    def _wrap(self, chunk: torch.nn.Module) -> torch.nn.Module:
        from megatron.core.transformer.module import Float16Module

        return Float16Module(self.config, chunk) if self.context.dtype != "float32" else chunk

    def _make_trainable(self, optim: OptimConfig) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        layout = self.context.layout_config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=layout.overlap_grad_reduce,
            overlap_param_gather=layout.overlap_param_gather,
            use_distributed_optimizer=layout.distributed_optimizer,
            average_in_collective=False,
        )
        self.models = [
            DistributedDataParallel(self.config, ddp_config, model, disable_bucketing=i > 0)
            for i, model in enumerate(self.models)
        ]
        self.gather = ParamGather(self.models if layout.overlap_param_gather else [])

        # Shares of the loss are normalized already: no division by tokens, micro-batches or
        # replicas.
        def finalize(models: Any, num_tokens: Any = None, **kwargs: Any) -> None:
            finalize_model_grads(models, None, **kwargs)

        self.config.finalize_model_grads_func = finalize
        if layout.overlap_grad_reduce:
            # Megatron takes one function, or a list with one for each model chunk.
            no_sync = [model.no_sync for model in self.models]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.betas[0],
                adam_beta2=optim.betas[1],
                adam_eps=optim.eps,
                clip_grad=optim.clip_grad,
                bf16=self.context.dtype == "bfloat16",
                params_dtype=getattr(torch, self.context.dtype),
                use_distributed_optimizer=layout.distributed_optimizer,
                overlap_param_gather=layout.overlap_param_gather,
            ),
            self.models,
        )
        self.context.platform.prepare_optimizer(self.optimizer.param_groups)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            lr_warmup_steps=optim.lr_warmup_steps,
            # Megatron asserts that the decay ends after the warm-up.
            lr_decay_steps=max(self.context.total_steps, optim.lr_warmup_steps + 1),
            lr_decay_style=optim.lr_decay_style,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def profile(self) -> None:
        """Have Megatron tell this process's recorder, where there is one, what it does."""
        found = recorder()
        self.timers = None if found is None else SpanTimers(found)
        configs = [self.config]
        if self.optimizer is not None:
            # One of several, where experts or layers have an optimizer of their own.
            configs += [part.config for part in getattr(self.optimizer, "chained_optimizers", [])]
            configs.append(self.optimizer.config)
        for config in configs:
            config.timers = self.timers

    @torch.no_grad()
    def forward(
        self, batch: Batch, micro_batches: Sequence[Sequence[int]]
    ) -> dict[str, Tensor] | None:
        """Compute response-aligned outputs [N, R] of the rows: logprobs and entropy, or values.

        Every row must be in exactly one micro-batch; an empty one runs a filler (see
        `make_microbatch`). Returns None on ranks that are not on the last pipeline stage.
        """
        for model in self.models:
            model.eval()

        def no_loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
            # To the host at once: the device keeps no outputs of earlier micro-batches.
            columns = {name: column.cpu() for name, column in self._columns(micro, output).items()}
            return output.new_zeros(()), _no_tokens(output), columns

        with self.states.on_device("weights"):
            results = self._run(batch, micro_batches, no_loss, forward_only=True)
        if not self.is_last_stage:
            return None
        merged = {}
        for name in results[0]:
            parts = [columns[name] for columns in results]
            merged[name] = batch.in_row_order(micro_batches, parts)
        return merged

    def update(
        self, batch: Batch, mini_batches: Sequence[MiniBatch], objective: Objective
    ) -> UpdateResult:
        """Take one optimizer step per mini-batch.

        No rank takes a step whose loss or gradient is not finite: it raises NonFiniteUpdate, or is
        skipped where the context says `skip_nonfinite`. Metrics are means over the steps taken.
        """
        assert self.optimizer is not None, "this model is not trainable"
        assert len(mini_batches) == 1 or not objective.old_is_current, "one step a batch"
        for model in self.models:
            model.train()
        # Once a training step, not once a mini-batch, as in verl; before the optimizer's steps, so
        # that the first one has the first learning rate of the warm-up instead of 0.
        self.scheduler.step(increment=1)
        taken, skipped = [], []
        logprobs = None
        with self.states.on_device("weights", "gradients", "optimizer"):
            for mini in mini_batches:
                seen: list[tuple[Batch, dict[str, Tensor]]] = []
                try:
                    taken.append(self._optimizer_step(batch, mini, objective, seen))
                except NonFiniteUpdate as problem:
                    if not self.context.skip_nonfinite:
                        raise
                    skipped.append(str(problem))
                if objective.old_is_current and self.is_last_stage:
                    # Of a step that was left out as well.
                    parts = [outputs["logprobs"] for _, outputs in seen]
                    logprobs = batch.in_row_order(mini.micro_batches, parts)
            # While the weights are still on the device: outside of an update nothing is pending.
            with span("gather weights", "collective"):
                self.gather.finish()
        lr = self.optimizer.param_groups[0]["lr"]
        if not taken:
            return UpdateResult({}, math.nan, lr, tuple(skipped), logprobs)
        means: dict[str, float] = {}
        for name in taken[0][0]:
            means[name] = sum(shares[name] for shares, _ in taken) / len(taken)
        grad_norm = sum(norm for _, norm in taken) / len(taken)
        return UpdateResult(means, grad_norm, lr, tuple(skipped), logprobs)

    def _optimizer_step(
        self,
        batch: Batch,
        mini: MiniBatch,
        objective: Objective,
        seen: list[tuple[Batch, dict[str, Tensor]]],
    ) -> tuple[dict[str, float], float]:
        """Take one step; return metric shares (none before the last stage) and gradient norm.

        `seen` gets the rows and the model's outputs [b, r] of each micro-batch, on the last stage.
        """
        for model in self.models:
            # The gradients themselves are in the buffers of DDP.
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Any]:
            columns = self._columns(micro, output)
            # Detached, so that this list does not keep the graphs of earlier micro-batches.
            seen.append((micro.rows, {name: column.detach() for name, column in columns.items()}))
            share, metrics = objective(micro.rows.columns, columns, mini.norm)
            return share, _no_tokens(share), metrics

        results = self._run(batch, mini.micro_batches, loss, forward_only=False)
        shares: dict[str, float] = {}
        for result in results if self.is_last_stage else ():
            for name, value in result.items():
                shares[name] = shares.get(name, 0.0) + float(value)
        # step() does both again, under 1 % of a step. They come first here so that every rank can
        # refuse a gradient that is not finite before any weight has changed.
        with span("gradient norm", "collective"):
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            require_finite(shares, grad_norm, seen, self.context.device)
        with span("optimizer step", "optimizer"):
            self.optimizer.step()
            self.gather.stepped()
        return shares, grad_norm

    def export_pieces(self) -> Iterator[tuple[str, Box, Tensor]]:
        """Yield (HF tensor, box in it, view of the local weight) of what this rank exports.

        Of all copies of a weight, one rank exports it.
        """
        context = self.context
        return export_pieces(
            self.chunks, context.spec, context.layout, self.coords, HEADS[self.role]
        )

    def params(self) -> dict[tuple[int, str], torch.nn.Parameter]:
        """Return the local weights by (model chunk, name in the weight table)."""
        context = self.context
        bound = bound_params(
            self.chunks, context.spec, context.layout, self.coords, HEADS[self.role]
        )
        return {(chunk, entry.name): param for chunk, entry, param in bound}

    def _columns(self, micro: MicroBatch, output: Tensor) -> dict[str, Tensor]:
        """Outputs [b, r] of the last stage in fp32, zero outside of responses.

        They are the same on all context-parallel ranks.
        """
        outputs = self._outputs(micro, output)
        columns = {name: micro.scatter(value) for name, value in outputs.items()}
        if self.context.layout.cp == 1:
            return columns
        # Each rank has the tokens it holds, and zero elsewhere.
        complete = sum_shares(torch.stack(list(columns.values())), self.cp_group)
        return dict(zip(columns, complete.unbind(), strict=True))

    def _outputs(self, micro: MicroBatch, output: Tensor) -> dict[str, Tensor]:
        """Per-response-token outputs [T] of the last stage, in fp32."""
        states = micro.gather(output)
        if self.role == "value":
            return {"values": states.float()}
        weight = self.chunks[-1].head_weight()
        # The weight is read outside of its own module, whose hook would wait for it.
        self.gather.wait_for(weight)
        logprobs, entropy = vocab_parallel_logprobs(
            states,
            weight,
            micro.labels,
            platform=self.context.platform,
            temperature=self.context.temperature,
            vocab_start=self.coords.tp * weight.shape[0],
            vocab_size=self.context.spec.vocab_size,
            group=self.tp_group,
        )
        return {"logprobs": logprobs, "entropy": entropy}

    def _run(
        self,
        batch: Batch,
        micro_batches: Sequence[Sequence[int]],
        finish: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, Any]],
        forward_only: bool,
    ) -> list[Any]:
        """Run Megatron's schedule over the micro-batches.

        Returns the third result of `finish` for each of them, on the last stage.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from rlhf3d.parallel.pipeline import schedule_arguments, schedule_table

        move = partial(self.context.platform.to_device, device=self.context.device)

        def make(rows: Sequence[int]) -> MicroBatch:
            place = (self.context.layout.cp, self.coords.cp)
            return make_microbatch(batch, rows, move, self.widths, *place)

        def step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
            micro = next(iterator)
            output = model(
                micro.input_ids, micro.position_ids, None, packed_seq_params=_packing(micro)
            )
            return output, partial(finish, micro)

        layout = self.context.layout
        sizes = [token_shape(batch, rows, self.widths, layout.cp) for rows in micro_batches]
        # With sequence parallelism a tensor rank sends its part of the sequence.
        parts = layout.tp if self.config.sequence_parallel else 1
        shapes = [(s // parts, b, self.config.hidden_size) for b, s in sizes]
        # Every model chunk passes over all micro-batches by itself.
        streams = [map(make, micro_batches) for _ in self.models]
        if self.timers is not None:
            order = schedule_table(self.config, len(micro_batches))
            self.timers.run(order, len(self.models), [s * b for b, s in sizes])
        result: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            # Megatron takes lists where there are several model chunks.
            data_iterator=_one_or_list(streams),
            model=_one_or_list(self.models),
            num_microbatches=len(micro_batches),
            seq_length=sizes[0][1],
            micro_batch_size=sizes[0][0],
            forward_only=forward_only,
            **schedule_arguments(self.config, shapes),
        )
        return result


def _one_or_list(items: Sequence[Any]) -> Any:
    return list(items) if len(items) > 1 else items[0]


def _no_tokens(like: Tensor) -> Tensor:
    """The token count that Megatron's schedule asks of a loss, which `finalize` ignores."""
    return torch.zeros((), dtype=torch.int, device=like.device)


def _packing(micro: MicroBatch) -> Any:
    """Megatron's description of packed sequences; None for padded rows."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from rlhf3d.parallel.tree_attention import TreeParams

    if micro.segment_ends is None:
        return None
    fields = {
        "cu_seqlens_q": micro.segment_ends,
        "cu_seqlens_kv": micro.segment_ends,
        "max_seqlen_q": micro.longest_segment,
        "max_seqlen_kv": micro.longest_segment,
    }
    if micro.tree is not None:
        return TreeParams(qkv_format="sbhd", segments=micro.tree, **fields)
    return PackedSeqParams(qkv_format="thd", **fields)

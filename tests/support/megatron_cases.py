"""One small Megatron run for every patch.

What it returns with the patch, and what happens without it.

Invariant: a case touches one defect only. `python -m support.megatron_cases` runs every case
without its patch, in processes forked after one import, and prints {patch: {"error": text} or
{"value": result}} as JSON; "apply_cuda" stands for what `apply("cuda")` does.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support.ranks import RankError, run_ranks

import megatron_patches
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform

VOCAB, SEQUENCE, HIDDEN = 64, 16, 32
CHECKPOINT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def join(rank: int, port: int, layout: ParallelLayout) -> None:
    """Initialize one CPU rank."""
    from rlhf3d.parallel.megatron_init import initialize_megatron

    initialize_megatron(layout, rank, 7, CPUPlatform("test"), timeout_s=60, master_port=port)


def build_model(
    layout: ParallelLayout, *, sequence_parallel: bool = False, experts: int = 0, **config: Any
) -> Any:
    """A two-layer GPT whose weights depend on their names only.

    Every tensor-parallel size starts alike.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    platform = CPUPlatform("test")
    if experts:
        config |= {
            "num_moe_experts": experts,
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": "alltoall",
        }
        config |= {"expert_tensor_parallel_size": 1, "moe_ffn_hidden_size": HIDDEN}
        spec = get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm"
        )
    else:
        spec = platform.layer_spec(qk_layernorm=False)
    transformer_config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=64,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=sequence_parallel,
        **platform.transformer_config_overrides() | config,
    )
    model = GPTModel(
        transformer_config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    set_weights(model, layout)
    return model


def set_weights(model: Any, layout: ParallelLayout) -> None:
    """Draw every full tensor by name and keep this tensor-parallel rank's part."""
    import zlib

    import torch
    from megatron.core import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1
        shape = [size * layout.tp if d == dim else size for d, size in enumerate(parameter.shape)]
        full = torch.randn(shape, generator=generator) * 0.1 + (1.0 if "norm" in name else 0.0)
        if dim >= 0:
            halves = full.chunk(2) if "linear_fc1" in name else (full,)
            full = torch.cat(
                [half.chunk(layout.tp, dim)[tp_rank] for half in halves],
                0 if len(halves) == 2 else dim,
            )
        parameter.data.copy_(full)


def tokens(step: int, rows: int = 4) -> Any:
    """[rows, SEQUENCE + 1] token ids of a step."""
    import torch

    return torch.randint(
        0, VOCAB, (rows, SEQUENCE + 1), generator=torch.Generator().manual_seed(step)
    )


def forward(model: Any, ids: Any) -> Any:
    """Loss [rows, SEQUENCE] of next-token prediction."""
    import torch

    positions = torch.arange(SEQUENCE)[None].expand(ids.shape[0], SEQUENCE)
    return model(ids[:, :-1].contiguous(), positions, None, labels=ids[:, 1:].contiguous())


class Trainer:
    """Model, distributed optimizer and a step; data-parallel ranks take rows in turn."""

    def __init__(self, layout: ParallelLayout, **model_kwargs: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.layout = layout
        self.model = build_model(layout, **model_kwargs)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True
        )
        self.ddp = DistributedDataParallel(self.model.config, ddp_config, self.model)
        config = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            clip_grad=1.0,
            weight_decay=0.0,
            use_distributed_optimizer=True,
        )
        self.optimizer = get_megatron_optimizer(config, [self.ddp])

    def step(self, number: int) -> tuple[float, float]:
        """(mean loss over all ranks, gradient norm) of one optimizer step."""
        import torch
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = tokens(number)[parallel_state.get_data_parallel_rank() :: self.layout.dp]
        loss = forward(self.ddp, rows).mean()
        loss.backward()
        finalize_model_grads([self.ddp], None)
        _, grad_norm, _ = self.optimizer.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        return mean.item() / self.layout.dp, float(grad_norm)

    def save(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        state = {"model": self.model.sharded_state_dict(metadata=CHECKPOINT_METADATA)}
        dist_checkpointing.save(state, folder, content_metadata=CHECKPOINT_METADATA)


def train(
    rank: int, port: int, layout: ParallelLayout, steps: int, **model_kwargs: Any
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    join(rank, port, layout)
    trainer = Trainer(layout, **model_kwargs)
    return [trainer.step(number) for number in range(steps)]


def device(rank: int, port: int) -> float:
    """Mean loss of one forward and backward pass."""
    layout = ParallelLayout()
    join(rank, port, layout)
    loss = forward(build_model(layout), tokens(0)).mean()
    loss.backward()
    return float(loss.detach())


def rng_tracker(rank: int, port: int) -> dict[str, Any]:
    """What the tracker draws, whether the default state moved, and what it logged."""
    import torch

    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron").addHandler(handler)
    join(rank, port, ParallelLayout())
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    def draw() -> list[float]:
        with get_cuda_rng_tracker().fork():
            return torch.rand(2).tolist()

    before = torch.get_rng_state()
    first, second = draw(), draw()
    moved = not torch.equal(before, torch.get_rng_state())
    model_parallel_cuda_manual_seed(7)
    return {
        "first": first,
        "second": second,
        "again": draw(),
        "default_moved": moved,
        "logged": logged,
    }


def norm_sequence_parallel(rank: int, port: int) -> list[tuple[float, float]]:
    """Losses and gradient norms with sequence parallelism over two tensor-parallel ranks."""
    return train(rank, port, ParallelLayout(tp=2), 2, sequence_parallel=True)


def isend_alias(rank: int, port: int) -> float:
    """Mean of the ones that rank 0 sends, and frees, as the schedule does, before they arrive."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import p2p_communication
    from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

    join(rank, port, ParallelLayout(pp=2))
    shape = (16, 4, 256)
    activation = torch.ones(shape, requires_grad=True) * 1.0 if rank == 0 else None
    received = torch.empty(shape) if rank == 1 else None

    def exchange(send: Any, receive: Any) -> Any:
        return p2p_communication._p2p_ops(
            tensor_send_prev=None,
            tensor_recv_prev=receive,
            tensor_send_next=send,
            tensor_recv_next=None,
            group=parallel_state.get_pipeline_model_parallel_group(),
            prev_pipeline_rank=0,
            next_pipeline_rank=1,
        )

    requests = exchange(activation, None) if rank == 0 else {}
    if rank == 0:
        deallocate_output_tensor(activation, deallocate_pipeline_outputs=True)
        overwriting = [torch.full(shape, 7.0) for _ in range(64)]
        assert overwriting
    torch.distributed.barrier(group=parallel_state.get_model_parallel_group())
    requests = requests or exchange(None, received)
    for request in requests.values():
        request.wait()
    return 1.0 if received is None else received.mean().item()


def _processes_of_a_save(rank: int, port: int) -> dict[str, int]:
    """Processes left running by one save."""
    layout = ParallelLayout()
    join(rank, port, layout)
    trainer = Trainer(layout)
    trainer.step(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(folder)
        files = len(os.listdir(folder))
    left = multiprocessing.active_children()
    for process in left:
        process.terminate()
    return {"left": len(left), "files": files}


def _experts(rank: int, port: int, expert_parallel: int) -> float:
    """Mean loss of four experts over `expert_parallel` ranks, after a backward pass."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=expert_parallel
    )
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel, expert_tensor_parallel_size=1
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    model = build_model(ParallelLayout(), experts=4, expert_model_parallel_size=expert_parallel)
    for expert in (m for m in model.modules() if type(m).__name__ == "SequentialMLP"):
        for index, mlp in enumerate(expert.local_experts):  # weights by global expert number
            scale = 1.0 + index + rank * len(expert.local_experts)
            for number, weight in enumerate(mlp.parameters()):
                torch.nn.init.normal_(
                    weight, std=0.05 * scale, generator=torch.Generator().manual_seed(number)
                )
    loss = forward(model, tokens(0)).mean()
    loss.backward()
    return float(loss.detach())


def moe_router_gemm(rank: int, port: int) -> float:
    """Loss of four experts on one rank."""
    return _experts(rank, port, 1)


def moe_split_sizes(rank: int, port: int) -> float:
    """Loss of four experts over two ranks that see the same tokens."""
    return _experts(rank, port, 2)


def output_layer_fusion(rank: int, port: int) -> bool:
    """Whether the output layer of a model with fused weight gradients asks for Apex's kernel."""
    layout = ParallelLayout()
    join(rank, port, layout)
    return bool(
        build_model(
            layout, gradient_accumulation_fusion=True
        ).output_layer.gradient_accumulation_fusion
    )


def lone_replica(rank: int, port: int) -> dict[str, Any]:
    """What a rank without replicas sends in a step, and gradient norms of two steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    layout = ParallelLayout()
    join(rank, port, layout)
    trainer = Trainer(layout)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        norms = [trainer.step(number)[1] for number in range(2)]
    assert torch.distributed.get_world_size() == 1
    names = {event.key for event in profiler.key_averages()}
    return {"norms": norms, "sent": sorted(n for n in names if "scatter_" in n or "gather" in n)}


def clip_in_place(rank: int, port: int) -> dict[str, Any]:
    """Copies made by clipping two gradients, and what became of them."""
    import torch
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from torch.profiler import ProfilerActivity, profile

    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for value, parameter in enumerate(parameters, 3):
        parameter.grad = torch.tensor([float(value), 0.1])
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        clip_grad_by_total_norm_fp32(parameters, max_norm=1.0, total_norm=5.0)
    copies = sum(event.count for event in profiler.key_averages() if event.key == "aten::copy_")
    gradients = [parameter.grad for parameter in parameters]
    return {"copies": copies, "gradients": [g.tolist() for g in gradients if g is not None]}


@dataclass(frozen=True)
class Case:
    """What shows that one patch is needed, and that it works."""

    run: Callable[[int, int], Any]
    world_size: int = 1


CASES: dict[str, Case] = {
    "device": Case(device),
    "rng_tracker": Case(rng_tracker),
    "norm_sequence_parallel": Case(norm_sequence_parallel, 2),
    "isend_alias": Case(isend_alias, 2),
    "checkpoint_queue": Case(_processes_of_a_save),
    "moe_router_gemm": Case(moe_router_gemm),
    "moe_split_sizes": Case(moe_split_sizes, 2),
    "output_layer_fusion": Case(output_layer_fusion),
    "lone_replica": Case(lone_replica),
    "clip_in_place": Case(clip_in_place),
}


def run_without(rank: int, port: int, name: str) -> Any:
    """Run a case with every patch but its own; in a process that has at most `device` applied."""
    if name == "device":
        megatron_patches.apply("cpu", skip=["device"])
    version = megatron_patches.installed_version()
    for patch in megatron_patches.PATCHES[1:]:
        if name not in ("device", patch.name) and patch.not_needed_because("cpu", version) is None:
            patch.apply()
    return CASES[name].run(rank, port)


def apply_cuda(rank: int, port: int) -> dict[str, Any]:
    """Status of patches after `apply("cuda")`; whether Megatron was rewritten for the CPU."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # only to import faster
    megatron_patches.apply("cuda")
    from megatron.core.pipeline_parallel import p2p_communication

    rewritten = hasattr(p2p_communication, "_cpu_cuda")
    return {
        "rewritten": rewritten,
        "status": {row.name: row.status for row in megatron_patches.table()},
    }


def main() -> None:
    """Every case without its patch; the result as JSON on standard output."""
    import torch  # noqa: F401 - imported once, before the first fork

    outcomes: dict[str, dict[str, Any]] = {"apply_cuda": {"value": run_ranks(1, apply_cuda)[0]}}
    for name, case in CASES.items():
        if name != "device":
            megatron_patches.apply("cpu", skip=[p.name for p in megatron_patches.PATCHES[1:]])
            import megatron.core.models.gpt
            import megatron.core.optimizer  # noqa: F401
        try:
            outcomes[name] = {
                "value": run_ranks(case.world_size, run_without, name, timeout_s=60)[-1]
            }
        except RankError as error:
            outcomes[name] = {"error": str(error)}
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()

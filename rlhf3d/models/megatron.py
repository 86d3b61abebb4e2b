"""Megatron models from a `ModelSpec`: policy (hidden states) and critic (values).

Invariant: every parameter of a chunk is in the weight table, under the same name and with the same
shape; weights come from there alone (Megatron initializes nothing). Imports Megatron, so patch it
first.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from rlhf3d.models.boxes import Box, box_slices
from rlhf3d.models.hf_config import Llama3RopeScaling, YarnRopeScaling
from rlhf3d.models.hf_io import HFReader, copy_in_range
from rlhf3d.models.spec import ModelSpec, check_layout, padded_vocab_size
from rlhf3d.models.weights import (
    VALUE_HEAD,
    Head,
    LocalParam,
    check_hf_tensors,
    local_params,
)
from rlhf3d.parallel.layout import ParallelLayout, RankCoords, Recompute, SpecStyle
from rlhf3d.parallel.platform import Platform
from rlhf3d.parallel.tree_attention import TreeParams

Role = Literal["policy", "value"]
HEADS: dict[Role, Head] = {"policy": "lm", "value": "value"}

# The overrides rely on the first two by name and ignore the others.
_POSTPROCESS = ["self", "hidden_states", "input_ids", "position_ids", "labels"]
_found = list(inspect.signature(GPTModel._postprocess).parameters)[: len(_POSTPROCESS)]
assert _found == _POSTPROCESS, (
    f"GPTModel._postprocess now takes {_found}: PolicyModel and ValueModel override it"
)
_PREPROCESS = {"input_ids", "position_ids", "packed_seq_params"}
assert inspect.signature(GPTModel._preprocess).parameters.keys() >= _PREPROCESS, (
    "GPTModel._preprocess takes other parameters now: Decoder overrides it"
)


def transformer_config(
    spec: ModelSpec,
    layout: ParallelLayout,
    dtype: str,
    platform: Platform,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> TransformerConfig:
    """Megatron's configuration of the model; `dtype` is `bfloat16` or `float32`.

    Raises ValueError if the layout does not fit the model.
    """
    check_layout(spec, layout, sequence_parallel)
    stages = layout.stage_layers(spec.num_layers)
    assert stages is not None
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"model.dtype: {dtype!r} is not supported; use bfloat16 or float32")
    torch_dtype = getattr(torch, dtype)
    interleaved = layout.vpp > 1
    virtual_stages = layout.vpp if interleaved else None
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        # No family has biases on output projection or MLP; those of QKV have their own flag.
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        # Megatron's default is 0.1, which would make the log-probs of two passes differ.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_scale=_softmax_scale(spec),
        # Every weight comes from the folder or starts at zero.
        perform_initialization=False,
        params_dtype=torch_dtype,
        # The dtype in which hidden states travel between stages.
        pipeline_dtype=torch_dtype,
        bf16=dtype == "bfloat16",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        virtual_pipeline_model_parallel_size=virtual_stages,
        **_uneven_stages(stages),
        # A single tensor rank holds all of the sequence anyway.
        sequence_parallel=sequence_parallel and layout.tp > 1,
        # Micro-batches differ in length, so stages cannot count on one shape of message.
        variable_seq_lengths=layout.pp > 1,
        expert_model_parallel_size=layout.ep,
        # The weight table has complete experts on a rank; Megatron's default is tp.
        expert_tensor_parallel_size=1,
        # The default dispatcher refuses variable lengths, in dense models too.
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=True,
        # With two stages both neighbors are one rank, and batched sends of interleaved chunks get
        # mixed up.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # It would wait for the device after each message, for the sake of old versions of torch.
        batch_p2p_sync=False,
        # Megatron then divides neither losses by micro-batches nor gradients by ranks: each loss
        # is a share of the complete mini-batch's already (`LossNorm`).
        calculate_per_token_loss=True,
        **_recompute_config(spec, recompute),
        **_expert_config(spec),
        # Keywords cannot repeat, so the platform only adds to the settings above.
        **platform.transformer_config_overrides(),
    )


def _uneven_stages(stages: Sequence[int]) -> dict[str, Any]:
    """How many layers the first and the last pipeline stage have, where stages differ."""
    if len(set(stages)) == 1:
        return {}
    # All stages between are equal: `stage_layers` allows nothing else.
    sizes = {"num_layers_in_first_pipeline_stage": stages[0]}
    # Of two stages Megatron derives the last itself; given both it divides by zero where they
    # interleave.
    if len(stages) > 2:
        sizes["num_layers_in_last_pipeline_stage"] = stages[-1]
    return sizes


def _recompute_config(spec: ModelSpec, recompute: Recompute) -> dict[str, Any]:
    """What a backward pass computes again.

    Not `core_attn`: both platforms' attention keeps next to nothing.
    """
    if recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": ["moe" if spec.num_experts else "mlp"],
        }
    if recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {}


def _expert_config(spec: ModelSpec) -> dict[str, Any]:
    """Routing as in transformers.

    Softmax over all experts in fp32, the k best, no token dropped.
    """
    if not spec.num_experts:
        return {}
    return {
        "num_moe_experts": spec.num_experts,
        "moe_ffn_hidden_size": spec.moe_ffn_size,
        "moe_router_topk": spec.experts_per_token,
        # A softmax over the chosen logits is the softmax over all, scaled to sum to 1.
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


class Decoder(GPTModel):
    """Megatron's decoder, also over sequences that share their beginnings."""

    def _preprocess(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        prepared: tuple[Any, ...] = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        if not isinstance(packed_seq_params, TreeParams):
            return prepared
        # Upstream's angles [s, 1, 1, d] are of positions 0, 1, 2 …, whatever the position ids.
        hidden, angles, *rest = prepared
        return hidden, angles.index_select(0, position_ids[0]), *rest


class PolicyModel(Decoder):
    """Decoder whose last stage returns the hidden states [b, s, h] before the head.

    The loss multiplies by `head_weight()` in slices, so that the logits [b, s, vocab] never exist
    at once.
    """

    def _postprocess(
        self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> torch.Tensor:
        # An earlier stage hands them on as they are: [s, b, h], s / tp where sequence_parallel.
        if not self.post_process:
            return hidden_states
        # Each rank's vocabulary shard yields part of the gradient: both mappings sum it over tensor
        # ranks.
        tp_group = self.pg_collection.tp
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_states, group=tp_group).transpose(
                0, 1
            )
        # Transposed first: where its gradient is not contiguous, upstream's backward all-reduces a
        # copy and loses it.
        return copy_to_tensor_model_parallel_region(
            hidden_states.transpose(0, 1).contiguous(), group=tp_group
        )

    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the vocabulary head, [padded vocab/tp, h]; only on the last stage."""
        assert self.post_process, "the vocabulary head is on the last pipeline stage"
        # With one stage Megatron allocates no weight for a tied head; a later stage has a copy.
        own = self.output_layer.weight
        return self.embedding.word_embeddings.weight if own is None else own


class ValueHead(torch.nn.Linear):
    """Multiplies in fp32, whatever the dtype of states and weight."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states.float(), self.weight.float())


class ValueModel(Decoder):
    """Decoder whose last stage returns fp32 values [b, s].

    Its head starts at zero, complete on each rank.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.post_process:
            # GPTModel always makes one, [vocab / tp, h]; a critic's table has none.
            del self.output_layer
            self.value_head = ValueHead(
                config.hidden_size, 1, bias=False, dtype=config.params_dtype
            )
            torch.nn.init.zeros_(self.value_head.weight)

    def _postprocess(
        self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        # Every tensor rank computes the same values, so each already has the whole gradient: sum
        # nothing.
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        # [s, b, h] -> [s, b, 1] -> [b, s].
        return self.value_head(hidden_states).squeeze(-1).transpose(0, 1)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        """Megatron's own, without the steps for an output layer, which a critic has not."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def build_chunks(
    spec: ModelSpec,
    layout: ParallelLayout,
    coords: RankCoords,
    role: Role,
    config: TransformerConfig,
    platform: Platform,
    device: torch.device,
) -> list[GPTModel]:
    """The model chunks (one, or `layout.vpp`) of this rank on `device`, not initialized.

    Needs Megatron's process groups.
    """
    model_class = PolicyModel if role == "policy" else ValueModel
    chunks = []
    for chunk in range(layout.vpp):
        model = model_class(
            config,
            platform.layer_spec(spec.qk_norm, spec.num_experts),
            vocab_size=padded_vocab_size(spec, layout),
            max_sequence_length=spec.max_position,
            pre_process=coords.pp == 0 and chunk == 0,
            post_process=coords.pp == layout.pp - 1 and chunk == layout.vpp - 1,
            # A critic has no vocabulary head that its embedding could be tied to.
            share_embeddings_and_output_weights=role == "policy" and spec.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=spec.rope_theta,
            vp_stage=chunk if layout.vpp > 1 else None,
        )
        _scale_rope(model, spec)
        layers = layout.layers(spec.num_layers, coords.pp, chunk)
        # Megatron numbers layers from 1, over the whole model.
        built = [layer.layer_number - 1 for layer in model.decoder.layers]
        assert built == list(layers), (
            f"Megatron built layers {built}, the layout says {list(layers)}"
        )
        chunks.append(model.to(device))
    # Megatron marks tensor-parallel weights where it initializes them; unmarked ones of tensor rank
    # > 0 would be taken for replicas and left out of the gradient norm.
    for _, entry, param in bound_params(chunks, spec, layout, coords, HEADS[role]):
        if (entry.tp_dim is not None or entry.expert) and not hasattr(
            param, "tensor_model_parallel"
        ):
            # An expert has no `tp_dim`, and is no replica either.
            set_tensor_model_parallel_attributes(param, True, entry.tp_dim or 0, 1)
        if entry.expert:
            # With ep 1 Megatron takes experts for dense weights and never sums their gradients over
            # tensor ranks.
            param.allreduce = False
    return chunks


def _scale_rope(model: GPTModel, spec: ModelSpec) -> None:
    """Stretch rotary positions with the model's own numbers.

    GPTModel's flags would fix all of them except the factor, or round.
    """
    rotary, scaling = model.rotary_pos_emb, spec.rope_scaling
    if isinstance(scaling, Llama3RopeScaling):
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position,
        )
    if isinstance(scaling, YarnRopeScaling):
        rotary.inv_freq = yarn_frequencies(rotary.inv_freq, scaling, spec.rope_theta)


def yarn_frequencies(
    frequencies: torch.Tensor, scaling: YarnRopeScaling, theta: float
) -> torch.Tensor:
    """Rotary frequencies [head / 2], radians a token, stretched by YaRN.

    arXiv 2309.00071, equations 17 to 20.
    """

    def dimension(rotations: float) -> float:
        """The one whose wave makes this many rotations over the original window."""
        wavelength = scaling.original_max_position / (rotations * 2 * math.pi)
        return 2 * len(frequencies) * math.log(wavelength) / (2 * math.log(theta))

    # Rotations fall with the dimension, so fast ones are the low dimensions.
    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound is transformers': the size of a head less one, not the last frequency.
    low, high = max(low, 0), min(high, 2 * len(frequencies) - 1)
    # As in transformers, where low and high fall on one dimension.
    width = high - low or 0.001
    stretched = ((torch.arange(len(frequencies), device=frequencies.device) - low) / width).clamp(
        0, 1
    )
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def _softmax_scale(spec: ModelSpec) -> float | None:
    """YaRN's factor of queries and of keys, put where they meet.

    None for the usual 1 / sqrt(head).
    """
    if not isinstance(spec.rope_scaling, YarnRopeScaling):
        return None
    # Once for queries and once for keys: their product is what attention scales.
    return spec.rope_scaling.attention_factor**2 / math.sqrt(spec.head_dim)


def bound_params(
    chunks: list[GPTModel], spec: ModelSpec, layout: ParallelLayout, coords: RankCoords, head: Head
) -> Iterator[tuple[int, LocalParam, torch.nn.Parameter]]:
    """Each table entry of this rank with its chunk number and the parameter it describes."""
    for i, chunk in enumerate(chunks):
        params = dict(chunk.named_parameters())
        table = local_params(spec, layout, coords, i, head, spec_style(chunk))
        # Both ways: a parameter without an entry would silently keep whatever memory held.
        different = {entry.name for entry in table} ^ set(params)
        assert not different, f"weight table and model chunk {i} differ in {sorted(different)}"
        for entry in table:
            param = params[entry.name]
            assert tuple(param.shape) == entry.shape, (
                f"{entry.name}: {tuple(param.shape)}, table {entry.shape}"
            )
            yield i, entry, param


def spec_style(chunk: GPTModel) -> SpecStyle:
    """Which layer spec a chunk was built from, recognized by where its norm weights are."""
    return (
        "te"
        if any(name.endswith("layer_norm_weight") for name, _ in chunk.named_parameters())
        else "local"
    )


@torch.no_grad()
def load_hf_weights(
    chunks: list[GPTModel],
    folder: Path | str,
    spec: ModelSpec,
    layout: ParallelLayout,
    coords: RankCoords,
    role: Role = "policy",
) -> None:
    """Fill every local parameter from the folder's safetensors, reading only this rank's blocks.

    Vocabulary padding and a value head that the folder lacks are zero. Raises ValueError naming
    model.path for missing or misshapen tensors, and for tensors that the model would leave unused.
    """
    with HFReader(folder) as reader:
        in_file = {name: reader.shape(name) for name in reader.names()}
        check_hf_tensors(in_file, spec, HEADS[role], folder)
        for _, entry, param in bound_params(chunks, spec, layout, coords, HEADS[role]):
            # Also what no piece covers: Megatron leaves parameters uninitialized.
            param.zero_()
            for piece in entry.pieces:
                if piece.hf_name in in_file:
                    block = reader.read(piece.hf_name, piece.hf_box)
                    what = f"model.path: {piece.hf_name} of {folder} holds a value"
                    copy_in_range(param[box_slices(piece.local_box)], block, what)
                else:
                    assert entry.name == VALUE_HEAD, f"{piece.hf_name} is missing"


def export_pieces(
    chunks: list[GPTModel], spec: ModelSpec, layout: ParallelLayout, coords: RankCoords, head: Head
) -> Iterator[tuple[str, Box, torch.Tensor]]:
    """(HF tensor, box in it, view of the local weight) for each piece that this rank exports."""
    for _, entry, param in bound_params(chunks, spec, layout, coords, head):
        if entry.primary:
            for piece in entry.pieces:
                yield piece.hf_name, piece.hf_box, param.detach()[box_slices(piece.local_box)]

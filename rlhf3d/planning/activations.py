"""Activations: what a forward pass keeps for its backward pass, and buffers, in bytes of a rank.

Invariant: counts tensors as the layers of the platform make them: Megatron's local layers with
torch's attention (`local`, read off operation by operation and checked against measured passes in
tests/integration/test_planning.py), and Transformer Engine's with Megatron's fused kernels (`te`,
from their sources; not measured). Ranks are taken to get equal shares of the tokens that go to
experts. Pure: numbers only.

Letters: S positions of a micro-batch, h hidden, f neurons of the MLP, q and g rows of queries and
of keys on a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf3d.models.spec import ModelSpec, padded_vocab_size
from rlhf3d.models.weights import Head
from rlhf3d.parallel.layout import ParallelLayout, Recompute, SpecStyle
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.units import ITEM_BYTES, ceil_div

BUSIEST_EXPERT = 1.4
"""Tokens of the busiest expert over the mean (1.3 to 1.7 with untrained routers); in all, ranks get
equal shares."""
BATCH_COLUMNS = 12
"""fp32 numbers kept per response token: log-probs, advantages, masks, checked outputs."""


@dataclass(frozen=True)
class Micro:
    """One micro-batch."""

    positions: int
    """Tokens, padding included."""
    width: int
    """Positions of the longest row: a padded one, or all of them when packed."""
    responses: int
    """Response tokens, at which the head is applied."""


@dataclass(frozen=True)
class Activations:
    """The bytes of one model's passes on one rank, from its shape, layout and micro-batch."""

    spec: ModelSpec
    layout: ParallelLayout
    head: Head
    dtype: str
    style: SpecStyle
    sequence_parallel: bool
    recompute: Recompute
    entropy: bool
    """Whether the loss has an entropy bonus."""
    micro: Micro

    @property
    def item(self) -> int:
        """Bytes of a number in the compute dtype."""
        return ITEM_BYTES[self.dtype]

    @property
    def positions(self) -> float:
        """Positions of this context-parallel rank."""
        return self.micro.positions / self.layout.cp

    @property
    def responses(self) -> int:
        """Response tokens of this context-parallel rank, at most: they can all be in its chunks."""
        return min(self.micro.responses, math.ceil(self.positions))

    @property
    def sharded(self) -> float:
        """Positions of this rank where the sequence is sharded (norms, residuals, experts)."""
        return self.positions / (self.layout.tp if self.sequence_parallel else 1)

    @property
    def hidden(self) -> float:
        """One [S, h] tensor, sequence-sharded."""
        return self.sharded * self.spec.hidden_size * self.item

    def layer(self) -> float:
        """Return what one decoder layer keeps for its backward pass."""
        return 2 * self._norm() + self._attention() + self._mlp()

    def _norm(self) -> float:
        """Input and output of a norm; torch's keeps the normalized input too, and both in fp32."""
        if self.style == "te":
            return 2 * self.hidden
        # fp32 input and normalized input, the output, and one fp32 factor a position.
        return self.sharded * (self.spec.hidden_size * (8 + self.item) + 4)

    def _attention(self) -> float:
        """Rotated queries, output, log-sum-exp, fused projection, rotated keys.

        With torch's layers also the rotary tables, and what QK-norm keeps.
        """
        spec, tp, S = self.spec, self.layout.tp, self.positions
        q, g = spec.num_heads * spec.head_dim / tp, spec.num_kv_heads * spec.head_dim / tp
        # Rotated queries and the output; one fp32 log-sum-exp a head.
        kept = S * (2 * self.item * q + 4 * spec.num_heads / tp)
        if self.style == "te":
            return kept + S * self.item * (q + 3 * g + (q + g) * spec.qk_norm)
        if self.layout.cp == 1:
            kept += self.item * S * (q + 3 * g)
        else:  # torch's attention keeps keys and values of all ranks, and the projection nothing
            kept += self.item * self.micro.positions * 2 * g
        if spec.qk_norm:
            kept += S * (8 * (q + g) if self.dtype == "bfloat16" else 4 * (2 * q + g))
        return kept + 4 * self.micro.width / self.layout.cp * spec.head_dim * self.item

    def _mlp(self) -> float:
        """Gate and up, gate's activation, up again, their product; of every copy of a token."""
        spec, fused = self.spec, self.style == "te"
        if not spec.num_experts:
            # Fused kernels keep gate, up and their product; torch's also gate's
            # activation, and up again.
            tensors = 3 if fused else 5
            return self.positions * spec.ffn_size / self.layout.tp * tensors * self.item
        # Experts work on copies of this rank's tokens, `experts_per_token` of each.
        copies = self.sharded * spec.experts_per_token
        router = self.sharded * (10 * spec.num_experts + 24 * spec.experts_per_token)
        expert = (4 if fused else 6) * spec.moe_ffn_size + spec.hidden_size
        return router + copies * expert * self.item

    def kept(self, layers: int) -> float:
        """Return what `layers` layers of a model chunk keep of one micro-batch."""
        if self.recompute == "full":
            return layers * self.hidden  # their inputs
        received = self.hidden if self.style == "local" and self.dtype == "bfloat16" else 0.0
        return layers * (self.layer() - self._again()) + received

    def _again(self) -> float:
        """What a layer would keep, but its backward pass computes again."""
        if self.recompute == "full":
            return self.layer() - self.hidden  # its input is kept
        if self.recompute == "selective":
            # Transformer Engine's dense MLP begins with its norm, whose output goes too.
            norm = self.hidden if self.style == "te" and not self.spec.num_experts else 0.0
            return self._mlp() + norm
        return 0.0

    def layer_backward(self) -> float:
        """Return what comes on top while the backward pass is in a layer.

        Gradients, and what of the layer is computed again.
        """
        spec, S, tp = self.spec, self.positions, self.layout.tp
        if spec.num_experts:
            copies = self.sharded * spec.experts_per_token
            # Local layers compute one expert after the other, Transformer Engine's all at once.
            wide = copies if self.style == "te" else self._busiest(copies)
            gradients = 2 * copies * spec.hidden_size * self.item + 12 * wide * spec.moe_ffn_size
            rows = 2.0 * spec.moe_ffn_size
        else:
            gradients = 2 * S * spec.ffn_size / tp * self.item
            rows = 2 * spec.ffn_size / tp
        qkv_rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim / tp
        weight = max(rows, qkv_rows) * spec.hidden_size * self.item  # the largest one's gradient
        gathered = S * spec.hidden_size * self.item if self.sequence_parallel else 0.0
        return 2 * self.hidden + gradients + weight + gathered + self._again()

    def head_backward(self) -> float:
        """Return the most that the head takes in an update, as its forward pass ends or after it.

        Final norm, head input, logits, the head's gradient.
        """
        spec = self.spec
        final = self.hidden if self.style == "te" else self.sharded * (8 * spec.hidden_size + 4)
        if self.head == "value":
            return final + 2 * self.positions * spec.hidden_size * 4
        rows = padded_vocab_size(spec, self.layout) // self.layout.tp
        tokens = self.responses * spec.hidden_size
        block, blocks = self._block(rows)
        weight = rows * spec.hidden_size
        low = self.dtype == "bfloat16"
        # A block's logits become its gradient, in the compute dtype at the end; the entropy takes
        # their probabilities too. What the block before left is there while logits are made.
        alone, again = (6, 12) if low else (4, 8)
        if self.entropy:
            alone, again = 8, 12
        loop = (alone if blocks == 1 else again) * block
        # On CPU torch adds a bf16 gradient to an fp32 one by a copy in fp32.
        added = 4 * weight if low and self.style != "te" else 0
        backward = (4 + 3 * self.item) * tokens + self.item * weight + max(loop, added)
        return final + max(self.item * tokens + self._logits(rows), backward)

    def forward_only(self) -> float:
        """Return a layer at its widest, without a backward pass."""
        spec, S, tp = self.spec, self.positions, self.layout.tp
        heads = spec.num_heads + spec.num_kv_heads
        attention = 3 * S * heads * spec.head_dim / tp * self.item
        if spec.num_experts:
            copies = self.sharded * spec.experts_per_token
            at_once = copies if self.style == "te" else self._busiest(copies)
            mlp = (3 * copies * spec.hidden_size + 5 * at_once * spec.moe_ffn_size) * self.item
        else:
            tensors = 3 if self.style == "te" else 5
            mlp = tensors * S * spec.ffn_size / tp * self.item
        return 4 * self.hidden + max(attention, mlp)

    def _busiest(self, copies: float) -> float:
        """Tokens of the expert that gets most, of those a rank computes one after the other."""
        return min(copies, BUSIEST_EXPERT * copies * self.layout.ep / self.spec.num_experts)

    def head_forward(self) -> float:
        """Return the head without a backward pass: its input, and logits in fp32."""
        spec, low = self.spec, self.dtype == "bfloat16"
        norm = self.positions * spec.hidden_size * (4 + self.item if low else 4)
        if self.head == "value":
            return 2 * norm
        rows = padded_vocab_size(spec, self.layout) // self.layout.tp
        return norm + self.responses * spec.hidden_size * self.item + self._logits(rows)

    def _logits(self, rows: int) -> float:
        """Logits in fp32, and what their sums take, in a forward pass."""
        block, blocks = self._block(rows)
        # The logits of one block stay alive until the next one's are assigned to their name.
        return (10 if self.dtype == "bfloat16" and blocks > 1 else 8) * block

    def _block(self, rows: int) -> tuple[int, int]:
        """Logits of a block of the vocabulary, and blocks, as `rlhf3d.engine.logprobs` cuts it."""
        platform = CUDAPlatform if self.style == "te" else CPUPlatform
        size = min(max(1, platform.head_block_elements // max(1, self.responses)), rows)
        return size * self.responses, ceil_div(rows, size)

    def update_peak(self, pp: int, micro_batches: int, layers_of_chunk: int) -> float:
        """Return the most that exists at once in an update on pipeline stage `pp`.

        Each of its chunks has `layers_of_chunk` layers.
        """
        layout = self.layout
        last = pp == layout.pp - 1
        flying = in_flight(layout, pp, micro_batches)
        kept = self.kept(layers_of_chunk)
        top = max(self.layer_backward(), self.head_backward() if last else 0.0)
        messages = self.hidden if layout.pp > 1 else 0.0
        peak = flying * kept + top
        if pp == 0:
            # When the last layer is done, the gradient of the embedding is made.
            # This micro-batch has given up what it kept by then.
            rows = padded_vocab_size(self.spec, layout) // layout.tp
            peak = max(
                peak, (flying - 1) * kept + self.hidden + rows * self.spec.hidden_size * self.item
            )
        return peak + messages + self.columns(micro_batches if last else 1)

    def forward_peak(self, pp: int, micro_batches: int) -> float:
        """Return the most that exists at once in a pass without gradients."""
        last = pp == self.layout.pp - 1
        messages = 0.0 if last else self.hidden
        top = max(self.forward_only(), self.head_forward() if last else 0.0)
        return top + messages + self.columns(micro_batches if last else 1)

    def columns(self, micro_batches: int) -> float:
        """Return ids and positions of a micro-batch, and the loss's columns of a mini-batch."""
        return 16 * self.positions + 4 * BATCH_COLUMNS * self.micro.responses * micro_batches


def in_flight(layout: ParallelLayout, pp: int, micro_batches: int) -> int:
    """Return how many forward passes wait for their backward pass on pipeline stage `pp`, at most.

    1F1B: one more than the stages behind it. Interleaved, in chunks: Megatron's warm-up
    2 (pp - stage - 1) + (vpp - 1) pp, and the one being computed (arXiv 2104.04473).
    """
    behind = layout.pp - pp - 1
    if layout.vpp == 1:
        return min(behind + 1, micro_batches)
    return min(2 * behind + (layout.vpp - 1) * layout.pp + 1, micro_batches * layout.vpp)

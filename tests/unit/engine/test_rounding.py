"""What rounding on GPUs does to log-probs, emulated: it says which limits a canary can have, and
what must be exact.

A residual network whose largest logit is that of SmolLM2-135M on text (26); there, measured,
products of TF32 move log-probs by 1.3e-3 on average, logits rounded to bfloat16 by 0.023.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf3d.observability.mismatch.rounding import ROUNDING_LIMIT
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform

HIDDEN, VOCABULARY, LAYERS, TOKENS = 256, 4096, 12, 128
Product = Callable[[Tensor, Tensor], Tensor]


def exact(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double()


def float32(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def tf32(a: Tensor, b: Tensor) -> Tensor:
    """Tensor cores' default for fp32: inputs rounded to 10 bits, sums in fp32."""

    def rounded(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    return rounded(a) @ rounded(b)


def bfloat16(a: Tensor, b: Tensor) -> Tensor:
    return CPUPlatform("test").product(a.bfloat16(), b.bfloat16())


def on_gpu(a: Tensor, b: Tensor) -> Tensor:
    """The GPU platform's own product of bfloat16."""
    return CUDAPlatform("test").product(a.bfloat16(), b.bfloat16())


@pytest.fixture(autouse=True)
def cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's `mm` with an fp32 result of bfloat16 inputs, which CPUs have not."""
    own = torch.mm
    monkeypatch.setattr(
        torch,
        "mm",
        lambda a, b, out_dtype=None: (
            own(a, b) if out_dtype is None else own(a.to(out_dtype), b.to(out_dtype))
        ),
    )


class Network:
    """Weights that are the same in every test."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=draw) / rows**0.5

        self.inputs = torch.randn(TOKENS, HIDDEN, generator=draw)
        self.layers = [
            (matrix(HIDDEN, 4 * HIDDEN), matrix(4 * HIDDEN, HIDDEN)) for _ in range(LAYERS)
        ]
        self.head = matrix(HIDDEN, VOCABULARY)
        sampled = torch.multinomial(self.logits(exact).softmax(-1), 1, generator=draw)
        self.tokens = sampled[:, 0]

    def logits(self, product: Product, head: Product | None = None) -> Tensor:
        x = self.inputs.double() if product is exact else self.inputs
        for up, down in self.layers:
            x = x + product(F.silu(product(F.rms_norm(x, [HIDDEN]), up)), down)
        return (head or product)(5 * F.rms_norm(x, [HIDDEN]), self.head)

    def logprobs(self, product: Product, head: Product | None = None) -> Tensor:
        """Of tokens drawn from the exact distribution, as an engine draws them."""
        return (
            self.logits(product, head)
            .double()
            .log_softmax(-1)
            .gather(1, self.tokens[:, None])[:, 0]
        )


def mean_diff(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


def test_float32_agrees_within_the_canary_only_without_tf32() -> None:
    network = Network()
    assert 20 < network.logits(exact).abs().max() < 32
    right = network.logprobs(exact)
    assert mean_diff(right, network.logprobs(float32)) < ROUNDING_LIMIT["float32"] / 50
    assert mean_diff(right, network.logprobs(tf32)) > ROUNDING_LIMIT["float32"]


def test_logits_on_gpus_are_not_rounded() -> None:
    network = Network()
    right = network.logprobs(float32, lambda a, b: exact(a.bfloat16(), b.bfloat16()))
    assert mean_diff(right, network.logprobs(float32, bfloat16)) > 0.01
    assert mean_diff(right, network.logprobs(float32, on_gpu)) < 1e-5


def test_the_canary_of_bfloat16_lets_rounding_pass_and_no_wrong_matrix() -> None:
    network = Network()
    right = network.logprobs(float32)
    assert mean_diff(right, network.logprobs(bfloat16)) < ROUNDING_LIMIT["bfloat16"] / 2
    up, down = network.layers[LAYERS // 2]
    network.layers[LAYERS // 2] = (up.flip(0), down)
    assert mean_diff(right, network.logprobs(bfloat16)) > 2 * ROUNDING_LIMIT["bfloat16"]

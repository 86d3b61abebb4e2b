"""What this machine reaches in this process: matrix products at a model's shapes, and a copy.

Invariant: the products of a pass are weighed as the model has them, each layer's as often as there
are layers; weights and inputs are in the dtype that is asked for, as in training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf3d.models.spec import ModelSpec
from rlhf3d.planning.search.flops import attention_products, mlp_products

COPIED_BYTES = 256 << 20
LARGE = 2048
"""Side of the square product that shows what the machine reaches at best."""


@dataclass(frozen=True)
class Product:
    """The matrix of one kind of linear layer, with an input and a gradient of its output."""

    times: int
    """How often the model has it."""
    weight: Tensor
    """[columns, inner]"""
    x: Tensor
    """[rows, inner]"""
    grad: Tensor
    """[rows, columns]"""

    @property
    def flops(self) -> float:
        """Operations of its forward pass in the whole model."""
        return 2.0 * self.times * self.x.shape[0] * self.weight.numel()

    def forward(self) -> None:
        """As a linear layer."""
        self.x @ self.weight.t()

    def backward(self) -> None:
        """Gradients of input and weight."""
        self.grad @ self.weight
        self.grad.t() @ self.x


def model_products(
    spec: ModelSpec, tokens: int, responses: int, dtype: torch.dtype
) -> list[Product]:
    """The products of a micro-batch with that many tokens, `responses` of them in the head."""
    made = []
    for inner, columns in (*attention_products(spec, 1), *mlp_products(spec, 1)):
        made.append(_product(spec.num_layers, tokens, int(inner), int(columns), dtype))
    return [*made, _product(1, responses, spec.hidden_size, spec.vocab_size, dtype)]


def measure(products: list[Product], dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of both passes and of a large square product; bytes a second copied."""
    forward_s = sum(product.times * _seconds(product.forward) for product in products)
    backward_s = sum(product.times * _seconds(product.backward) for product in products)
    flops = sum(product.flops for product in products)
    square, source = torch.ones(LARGE, LARGE, dtype=dtype), torch.ones(COPIED_BYTES // 4)
    target = torch.zeros_like(source)
    return {
        "forward_flops": flops / forward_s,
        "backward_flops": 2 * flops / backward_s,
        "square_flops": 2 * LARGE**3 / _seconds(lambda: square @ square),
        "copied_bytes": 2 * COPIED_BYTES / _seconds(lambda: target.copy_(source)),
    }


def _product(times: int, rows: int, inner: int, columns: int, dtype: torch.dtype) -> Product:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Product(times, draw(columns, inner), draw(rows, inner), draw(rows, columns))


def _seconds(call: Callable[[], object]) -> float:
    """The faster of two: a limit is what the machine can do."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)

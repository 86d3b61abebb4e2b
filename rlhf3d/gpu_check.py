"""One attention of Transformer Engine on a GPU, forward and backward, and the libraries it used.

A program of its own (`python -m rlhf3d.gpu_check`), as libraries that do not fit may end the
process. Its last line on standard output is the facts as JSON; where it fails, the last line on
standard error says why.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING

from rlhf3d.machine import loaded_from
from rlhf3d.parallel.platform import use_torchs_cudnn

if TYPE_CHECKING:
    import torch

CORE = "transformer-engine-cu"
TOKENS, ROWS, HEADS, HEAD_SIZE = 256, 2, 4, 64


def installed_cores() -> list[str]:
    """The cores of Transformer Engine that are installed; all are one file, the last one's."""
    names = {distribution.name.replace("_", "-") for distribution in metadata.distributions()}
    return sorted(name for name in names if name.startswith(CORE))


def attention_error(attention: Callable[..., torch.Tensor], device: str) -> float:
    """Return how far a causal attention and its gradients are from torch's in fp32, at most.

    Inputs are [tokens, rows, heads, size].
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.manual_seed(0)
    shape = (3, TOKENS, ROWS, HEADS, HEAD_SIZE)
    inputs = torch.randn(shape).to(device, torch.bfloat16).requires_grad_()
    # The same rounded numbers in fp32, so that the inputs' rounding is no part of the error.
    exact = inputs.detach().float().requires_grad_()
    result = attention(*inputs)
    result.float().square().mean().backward()
    # torch's attention takes [rows, heads, tokens, size]; heads and size are one in the result of
    # Transformer Engine's.
    query, key, value = (x.permute(1, 2, 0, 3) for x in exact)
    expected = (
        scaled_dot_product_attention(query, key, value, is_causal=True)
        .permute(2, 0, 1, 3)
        .flatten(2)
    )
    expected.square().mean().backward()
    assert inputs.grad is not None and exact.grad is not None
    # Gradients of a mean are tiny: their error counts against the largest of them.
    scale = exact.grad.abs().max()
    gradient_error = (inputs.grad.float() - exact.grad).abs().max() / scale
    return max((result - expected).abs().max().item(), gradient_error.item())


def main() -> None:
    """Print the facts as JSON."""
    import torch

    # Before the import, which opens cuDNN.
    use_torchs_cudnn()
    import transformer_engine.pytorch as te

    facts: dict[str, object] = {
        "version": metadata.version("transformer-engine"),
        "cores": installed_cores(),
        "torch_cuda": torch.version.cuda,
        "gpu": torch.cuda.is_available(),
    }
    if facts["gpu"]:
        attention = te.DotProductAttention(HEADS, HEAD_SIZE, attn_mask_type="causal").cuda()
        facts["attention_error"] = attention_error(attention, "cuda")
    facts["cudnn"] = torch.backends.cudnn.version()
    facts["cudnn_folder"] = str(loaded_from("libcudnn"))
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()

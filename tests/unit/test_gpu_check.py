"""The doctor's attention, against attentions that are right and wrong, and which copy of a library
was loaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from rlhf3d.doctor import ATTENTION_ERROR
from rlhf3d.gpu_check import attention_error
from rlhf3d.machine import loaded_from


def attend(causal: bool, *inputs: torch.Tensor) -> torch.Tensor:
    """[tokens, rows, heads, size] -> [tokens, rows, heads * size], as Transformer Engine's."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in inputs)
    return (
        scaled_dot_product_attention(query, key, value, is_causal=causal)
        .permute(2, 0, 1, 3)
        .flatten(2)
    )


def test_attention_error() -> None:
    assert attention_error(lambda *inputs: attend(True, *inputs), "cpu") < ATTENTION_ERROR
    assert attention_error(lambda *inputs: attend(False, *inputs), "cpu") > ATTENTION_ERROR
    no_gradient = attention_error(
        lambda q, k, v: attend(True, q, k, v.detach()) + 0 * v.sum(), "cpu"
    )
    assert no_gradient > ATTENTION_ERROR


CUDNN_OF_THE_WORKER = """
import ctypes, os, sys
from rlhf3d.parallel.platform import use_torchs_cudnn
use_torchs_cudnn()
print(os.environ["CUDNN_HOME"])
for library in sys.argv[1:]:
    ctypes.CDLL(library)
    use_torchs_cudnn()
    print(os.environ["CUDNN_HOME"])
"""


def test_transformer_engine_gets_the_cudnn_that_is_loaded_already(tmp_path: Path) -> None:
    """Which is torch's; with no second one beside it. A libgcc stands for cuDNN."""
    loaded = loaded_from("libgcc_s.so")
    assert loaded is not None
    files = [tmp_path / folder / "libcudnn.so.9" for folder in ("environment", "system")]
    for file in files:
        file.parent.mkdir()
        shutil.copy(loaded / "libgcc_s.so.1", file)
    environment = os.environ | {"CUDNN_HOME": "of the user"}
    command = [sys.executable, "-c", CUDNN_OF_THE_WORKER, *map(str, files)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.stdout.split("\n") == ["of the user", str(files[0].parent), ""]
    assert f"libcudnn was loaded from {files[0].parent} and from {files[1].parent}" in ran.stderr

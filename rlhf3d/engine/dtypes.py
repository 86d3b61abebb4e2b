"""The dtypes a config may name."""

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

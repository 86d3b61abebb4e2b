"""Adam without torch's compiler: the same numbers, and nothing of the compiler imported."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys

import torch

from rlhf3d.parallel.plain_optimizers import leave_out_compiler

if sys.argv[1] == "plain":
    leave_out_compiler()
    leave_out_compiler()
torch.manual_seed(0)
layer = torch.nn.Linear(7, 5)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.01)
for _ in range(3):
    optimizer.zero_grad()
    layer(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
again = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.01)
again.load_state_dict(optimizer.state_dict())
layer(torch.randn(4, 7)).square().sum().backward()
again.step()
assert again.state_dict()["state"][0]["exp_avg"].requires_grad is False
assert ("torch._dynamo" in sys.modules) == (sys.argv[1] == "torch"), "who imports the compiler"
print([value.hex() for value in layer.weight.detach().double().flatten().tolist()])
"""


def run(how: str) -> str:
    command = [sys.executable, "-c", SCRIPT, how]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_same_numbers_without_the_compiler() -> None:
    assert run("plain") == run("torch")

"""A reward model gives transformers' own scores, in any layout; the tool makes one.

`test_rehearsal.py` has a run that trains on one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.engines import join
from support.judge import hf_scores
from support.ranks import run_ranks
from support.tiny_models import make_tiny_model
from transformers import AutoTokenizer

from rlhf3d.batching.batch import from_sequences
from rlhf3d.models.spec import load_reward_spec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.rewards.reward_model import model_inputs
from rlhf3d.rewards.score import ScoreItem

ITEMS = [
    ScoreItem("t", "x" * n, None, messages=[{"role": "user", "content": "word"}, *extra])
    for n, extra in (
        (0, []),
        (3, []),
        (17, [{"role": "user", "content": "more"}]),
        (40, []),
        (1, []),
    )
]


def score_rank(rank: int, port: int, folder: Path, layout: ParallelLayout) -> torch.Tensor | None:
    from rlhf3d.engine.megatron_engine import MegatronEngine

    context = join(rank, port, folder, layout, spec=load_reward_spec(folder))
    inputs = model_inputs(ITEMS, AutoTokenizer.from_pretrained(folder), 1024, "error", pad_id=0)
    batch = from_sequences([one.ids for one in inputs], [(0,)] * len(inputs), pad_id=0)
    outputs = MegatronEngine(context, "value", str(folder), None).forward(
        batch, [[0, 3], [1, 2], [4]]
    )
    return None if outputs is None else outputs["values"][:, 0]


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2, pp=2)], ids=str)
def test_scores_are_those_of_transformers(
    family: str, layout: ParallelLayout, tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "m", family, tie=False, classifier=True)
    expected = hf_scores(folder, ITEMS)
    scores = run_ranks(layout.world_size, score_rank, folder, layout)[layout.collectors()[0]]
    difference = float((scores - expected).abs().max())
    print(f"\n{family} {layout}: max|Δscore| {difference:.2e} of {expected.tolist()}")
    assert float(expected.std()) > 0.1
    assert torch.allclose(scores, expected, atol=1e-5, rtol=0)


def test_the_tool_trains_what_a_run_loads(tmp_path: Path) -> None:
    """Pairs that differ in one letter, in the answer's middle: held-out accuracy becomes 1."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"q{i}", "chosen": f"{i} is a", "rejected": f"{i} is b"}
        | ({"chosen": f"{i} a now", "rejected": f"{i} b now"} if i % 2 else {})
        for i in range(100)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    make_tiny_model(tmp_path / "lm", layers=2)
    tool = str(Path(__file__).parents[2] / "tools" / "train_reward_model.py")
    options = ("--output", str(tmp_path / "judge"), "--lr", "2e-3", "--epochs", "3")
    command = [sys.executable, tool, str(tmp_path / "lm"), str(pairs), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 pairs: 80 to learn from, 20 held out, 0 over 512 tokens left out" in done.stdout
    assert "after: 100.0% (83.9% to 100.0%) of 20 held-out pairs" in done.stdout, done.stdout
    assert load_reward_spec(tmp_path / "judge").num_layers == 2
    asked = [{"role": "user", "content": "q7"}]
    good, bad = hf_scores(
        tmp_path / "judge", [ScoreItem("t", f"7 is {x}", None, messages=asked) for x in "ab"]
    )
    assert good > bad

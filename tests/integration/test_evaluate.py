"""`rlhf3d evaluate` on real vLLM.

Its engines serve the folder's own weights, and a second call has nothing left to do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow

ROOT = Path(__file__).parents[2]
TOKENS = 12


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rlhf3d.cli", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def greedy_text(model: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = reference.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True))


def test_it_measures_the_folders_own_weights_and_continues(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=64, heads=2, kv_heads=2, layers=2)
    # What vLLM would take instead, and a configuration that does not name its class.
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, model / "consolidated.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": None}))
    # Together more tokens than an engine takes in one step, which must not cut a seeded request's
    # prompt in two on the CPU.
    questions = [
        "1+1?",
        "How many legs has a spider?",
        *(f"{i} {'and one ' * 8}" for i in range(80)),
    ]
    rows = [
        PromptRow("openai/gsm8k", [{"role": "user", "content": q}], "math", {"ground_truth": "2"})
        for q in questions
    ]
    write_parquet(rows, tmp_path / "test.parquet", {})
    output = tmp_path / "out"
    arguments = [
        "evaluate",
        str(model),
        str(tmp_path / "test.parquet"),
        "--output",
        str(output),
        "--json",
        "--n",
        "2",
    ]
    arguments += ["--max-tokens", str(TOKENS), "--max-prompt-length", "100", "--dtype", "float32"]
    arguments += ["--kv-cache-gib", "0.05", "--threads", "1", "--engines", "2"]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not of the model and ignored: consolidated.safetensors" in done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["greedy"]["completions"], report["sampled"]["completions"]) == (82, 164)
    lines = [json.loads(line) for line in (output / "generations.jsonl").read_text().splitlines()]
    greedy = {line["prompt"]: line["response"] for line in lines if line["mode"] == "greedy"}
    assert {question: greedy[question] for question in questions[:2]} == {
        question: greedy_text(model, question) for question in questions[:2]
    }
    again = run(*arguments)
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1]) == report
    assert "greedy" not in again.stderr, "nothing was generated again"
    other = run(*arguments, "--temperature", "0.5")
    assert other.returncode == 2 and "holds another evaluation (temperature differ)" in other.stderr


@pytest.mark.full
def test_engines_of_two_ranks_give_the_same(tmp_path: Path) -> None:
    """Scored by a function of one's own."""
    model = make_tiny_model(tmp_path / "model", hidden=64, heads=2, kv_heads=2, layers=2)
    questions = [f"{i} and {i}?" for i in range(5)]
    rows = [
        PromptRow("mine", [{"role": "user", "content": q}], "math", {"ground_truth": "2"})
        for q in questions
    ]
    write_parquet(rows, tmp_path / "test.parquet", {})
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return len(solution_str)\n"
    )
    output = tmp_path / "out"
    arguments = [
        "evaluate",
        str(model),
        str(tmp_path / "test.parquet"),
        "--output",
        str(output),
        "--json",
    ]
    arguments += [
        "--max-tokens",
        str(TOKENS),
        "--max-prompt-length",
        "100",
        "--dtype",
        "float32",
        "--threads",
        "1",
    ]
    arguments += ["--kv-cache-gib", "0.05", "--engines", "2", "--tensor-parallel-size", "2"]
    done = run(*arguments, "--reward", str(tmp_path / "reward.py"))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (output / "generations.jsonl").read_text().splitlines()]
    assert {line["prompt"]: line["response"] for line in lines} == {
        q: greedy_text(model, q) for q in questions
    }
    assert all(line["score"] == len(line["response"]) for line in lines)

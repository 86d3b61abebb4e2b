"""The benchmark of a step: its own processes on a tiny model, once."""

from __future__ import annotations

import sys
from pathlib import Path

from support.tiny_models import make_tiny_model

from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))

import step_job
import step_parts
import step_report


def test_both_models_compute_the_same_rows(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", "llama", tie=True)
    truth = {"ground_truth": "", "style": "rule"}
    rows = [PromptRow("tiny", [{"role": "user", "content": "word"}], "letters", truth)] * 2
    write_parquet(rows, tmp_path / "prompts.parquet", {})
    model, data = str(tmp_path / "model"), str(tmp_path / "prompts.parquet")
    sizes = step_job.Sizes(model, data, 2, 2, prompt_tokens=64, response_tokens=8)
    job, results = step_job.write_job(sizes, tmp_path), step_report.Results({})
    bench = step_parts.Bench(job, sizes, results, repeats=1)
    step_parts.training(bench, "float32", prompts=2)
    for name in ("forward/float32/ours", "update/float32/transformers"):
        figure = results.figures[name]
        assert figure.median > 0 and figure.limit is not None
    said = results.conditions["rows of forward and update, float32"]
    assert said.startswith("2 prompts × 2 completions") and "log-probs differ by" in said

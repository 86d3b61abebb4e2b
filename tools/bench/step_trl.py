"""GRPO steps of TRL's trainer at the sizes of `step.py`; run with an interpreter that has TRL.

    python tools/bench/step_trl.py '{"model": …, "data": …, …}'

Writes the seconds of each step to seconds.json of the output folder. Generation is transformers',
which is what TRL has where vLLM is no CUDA server.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

MICRO_BATCH = 8


class Clock(TrainerCallback):
    """Seconds of each optimizer step, its generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """See transformers."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """See transformers."""
        self.seconds.append(time.perf_counter() - self._start)


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Differs between completions, so that there is something to learn, and takes no time."""
    return [float(len(completion[-1]["content"]) % 7) for completion in completions]


def main() -> None:
    """Train and write."""
    sizes = json.loads(sys.argv[1])
    rows = pq.read_table(sizes["data"], columns=["prompt"]).slice(0, 1000).to_pylist()
    in_all = sizes["prompts"] * sizes["completions"]
    clock = Clock()
    trainer = GRPOTrainer(
        model=sizes["model"],
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
        args=GRPOConfig(
            output_dir=sizes["output"],
            model_init_kwargs={"dtype": sizes["dtype"]},
            # Autocast would make generation on CPU four times slower than weights in bfloat16 do.
            bf16=False,
            use_cpu=True,
            per_device_train_batch_size=min(MICRO_BATCH, in_all),
            gradient_accumulation_steps=max(1, in_all // MICRO_BATCH),
            num_generations=sizes["completions"],
            max_completion_length=sizes["response_tokens"],
            temperature=1.0,
            beta=0.001,
            learning_rate=1e-6,
            max_steps=sizes["steps"],
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    Path(sizes["output"], "seconds.json").write_text(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()

"""The driver's share of a training step, and the bytes through it, at 8 to 1,024 ranks.

    python tools/bench/driver_scale.py                                # all cases, about 10 minutes
    python tools/bench/driver_scale.py --ranks 64 --prompts 128       # one case, a smaller batch
    python tools/bench/driver_scale.py --calls                        # Ray's own calls instead

The driver's own code takes steps of GRPO with a real batch: prompts and completions of real
length, scored in processes, cut, sent, returned and logged. Ranks are pretended: they answer at
once, with columns of true shape, and count for nothing (`pretended_run.py`). What is measured are
the processor seconds of the driver's thread and of those beside it, with the step that `rlhf3d
plan` plans for the job.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from array import array
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from pretended_ray import ASIDE, Meter
from pretended_run import Texts, start, write_prompts

from rlhf3d.config.resolve import load_run, resolve_platform
from rlhf3d.config.schema import Config
from rlhf3d.models.spec import load_spec
from rlhf3d.parallel.platform import CUDAPlatform
from rlhf3d.paths import CONFIGS
from rlhf3d.placement.calls import start_call
from rlhf3d.placement.waiting import gather
from rlhf3d.planning.hardware import FILE, load_hardware, parse_cluster
from rlhf3d.planning.job import Lengths
from rlhf3d.planning.plan import SHAPES, make_plan
from rlhf3d.planning.search.plan import with_time
from rlhf3d.tokenizer.load import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHORTEST, LONGEST, PARETO = 1024, 8192, 1.3
JOB = (
    "actor.optim.lr_warmup_steps=0",
    "actor.use_kl_loss=true",
    "algorithm.adv_estimator=grpo",
    "algorithm.use_kl_in_reward=false",
    "data.max_prompt_length=1024",
    f"data.max_response_length={LONGEST}",
    "rollout.canary_steps=0",
    "rollout.n=16",
    "trainer.save_hf=never",
    "trainer.total_training_steps=3",  # the second, which is measured, prepares a third
)


WHILE_GENERATING = ("text of tokens", "hand to scorers", "completions", "requests", "scores")
"""Labels of what the driver does while engines write; of all else the ranks wait for it."""


@dataclass(frozen=True)
class Case:
    """A job of a size."""

    model: str
    gpus: str
    keys: tuple[str, ...]


CASES = {
    8: Case(
        "Qwen2.5-7B-Instruct",
        "8xH100",
        ("actor.layout.dp=2", "rollout.engines=4", "actor.ppo_max_token_len_per_gpu=18432"),
    ),
    64: Case(
        "Qwen2.5-7B-Instruct",
        "64xH100",
        (
            "actor.layout.dp=16",
            "rollout.engines=32",
            "actor.ppo_max_token_len_per_gpu=18432",
            "cluster.num_nodes=8",
        ),
    ),
    512: Case(
        "Llama-3.1-405B-Instruct",
        "512xH200",
        (
            *("actor.layout.tp=4", "actor.layout.pp=32", "actor.layout.dp=2", "actor.layout.cp=2"),
            *("actor.layout.first_stage_layers=3", "actor.layout.last_stage_layers=3"),
            *("model.offload=true", "actor.ppo_max_token_len_per_gpu=9216"),
            *("rollout.engines=64", "rollout.tensor_parallel_size=8"),
            *("rollout.gpu_memory_utilization=0.85", "cluster.num_nodes=64"),
        ),
    ),
    1024: Case(
        "Llama-3.1-405B-Instruct",
        "1024xH200",
        (
            *("actor.layout.tp=4", "actor.layout.pp=32", "actor.layout.dp=4", "actor.layout.cp=2"),
            *("actor.layout.first_stage_layers=3", "actor.layout.last_stage_layers=3"),
            *("model.offload=true", "actor.ppo_max_token_len_per_gpu=9216"),
            *("rollout.engines=128", "rollout.tensor_parallel_size=8"),
            *("rollout.gpu_memory_utilization=0.85", "cluster.num_nodes=128"),
        ),
    ),
}
"""By ranks. The layout of 405 billion parameters is the fastest that `rlhf3d plan --search` finds
on 1,024 devices."""


@dataclass
class Figures:
    """What one case took."""

    ranks: int
    job: str
    seconds: dict[str, float] = field(default_factory=dict)
    """By label, of one step."""
    counts: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    start_s: float = 0.0
    save_s: float = 0.0
    planned_s: float | None = None
    peak_gib: float = 0.0

    @property
    def all_s(self) -> float:
        """Of one step, all threads."""
        return sum(self.seconds.values())

    @property
    def driver_s(self) -> float:
        """Of one step, the driver's own thread."""
        return sum(s for label, s in self.seconds.items() if not label.startswith(ASIDE))

    @property
    def waited_s(self) -> float:
        """Of those, what ranks and engines wait for."""
        return self.driver_s - sum(self.seconds.get(label, 0.0) for label in WHILE_GENERATING)


def configuration(case: Case, prompts: int, folder: Path) -> Config:
    """The job's, with a batch of `prompts`."""
    sizes = (f"data.train_batch_size={prompts}", f"actor.ppo_mini_batch_size={prompts // 4}")
    model = f"model.path={SHAPES / case.model}"
    output = f"trainer.output_dir={folder}"
    config = load_run(CONFIGS / "math.yaml", (*JOB, *sizes, *case.keys, model, output))
    return resolve_platform(config, CUDAPlatform("bench"))


def planned_step_s(config: Config, case: Case, lengths: Lengths) -> float | None:
    """Seconds of a step by the time model; None where the job does not fit."""
    cluster = parse_cluster(case.gpus, load_hardware(FILE))
    spec = load_spec(config.model.path, with_weights=False)
    plan = with_time(make_plan(config, spec, cluster, None, lengths))
    return None if plan.time is None else plan.step_s


def measure(ranks: int, prompts: int, model: Path) -> Figures:
    """Two steps and a save; the figures are the second step's."""
    case, meter = CASES[ranks], Meter()
    tokenizer = load_tokenizer(str(model), None)
    words = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))).split(" ")
    ids = array("i", tokenizer.encode(" ".join(words), add_special_tokens=False))
    texts = Texts(tokenizer, ids, SHORTEST, LONGEST, PARETO)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = configuration(case, prompts, folder)
        spec = load_spec(config.model.path, with_weights=False)
        data = write_prompts(folder, 3 * prompts, words)
        platform = CUDAPlatform("bench")
        trainer = start(stack, config, platform, spec, tokenizer, texts, meter, data)
        figures = Figures(ranks, f"{case.model} on {case.gpus}")
        figures.start_s = sum(meter.take()[0].values())
        run = trainer.run
        for step in (1, 2):
            metrics = trainer.train_step(step)
            run.log.record(step, metrics)
            figures.seconds, figures.counts = meter.take()
        figures.counts["bytes of samples"] = sum(
            path.stat().st_size for path in (folder / "samples").glob("*step_2.jsonl")
        )
        run.save(2, metrics, wait=True)
        figures.save_s = sum(meter.take()[0].values())
    figures.tokens = int(metrics["perf/total_num_tokens"])
    mean = metrics["response_length/mean"]
    lengths = Lengths(figures.tokens / prompts / 16 - mean, mean)
    figures.planned_s = planned_step_s(config, case, lengths)
    figures.peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    return figures


def calls_of_ray() -> None:
    """What a call takes of the driver, by calls at a time to two real processes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        actors = [ray.remote(Answering).options(num_cpus=0).remote() for _ in range(2)]
        arguments = [ray.put(argument) for argument in ("actor", 1, [1], None)]
        for count in (2, 8, 64, 512, 1024):
            began = time.process_time()
            calls = {
                f"rank {rank}": start_call(actors[rank % 2], Answering.answer, *arguments)
                for rank in range(count)
            }
            gather("calls", calls, 120.0)
            each_ms = 1e3 * (time.process_time() - began) / count
            print(f"{count:,} calls: {each_ms:.2f} ms of processor time each", flush=True)
    finally:
        ray.shutdown()


class Answering:
    """An actor with nothing to do."""

    def answer(self, *_: Any) -> None:
        """At once."""


def share_of(figures: Figures, seconds: str) -> str:
    """Of the planned step; none where the job does not fit."""
    if figures.planned_s is None:
        return "–"
    return f"{getattr(figures, seconds) / figures.planned_s:.1%}"


def table(all_figures: list[Figures]) -> str:
    """As Markdown."""
    labels: dict[str, None] = {}
    for figures in all_figures:
        labels |= dict.fromkeys(figures.seconds)
    lines = [
        "| | " + " | ".join(f"{one.ranks:,} ranks" for one in all_figures) + " |",
        "|---" * (len(all_figures) + 1) + "|",
    ]

    def line(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for label in sorted(labels, key=lambda label: label.startswith(ASIDE)):
        line(f"{label}, s", [f"{one.seconds.get(label, 0.0):.2f}" for one in all_figures])
    line("all threads, s a step", [f"{one.all_s:.2f}" for one in all_figures])
    line("**the driver's thread, s a step**", [f"{one.driver_s:.2f}" for one in all_figures])
    line("planned step, s", [f"{one.planned_s or 0:.0f}" for one in all_figures])
    line("of that, not while engines write", [f"{one.waited_s:.2f}" for one in all_figures])
    shares = {
        "all_s": "all threads, share of the step",
        "driver_s": "**the driver's thread, share of the step**",
        "waited_s": "**of that, not while engines write**",
    }
    for what, name in shares.items():
        line(name, [share_of(one, what) for one in all_figures])
    for name in ("bytes put", "bytes in calls", "bytes got", "bytes of samples"):
        line(name.replace("bytes", "MB"), [f"{one.counts[name] / 1e6:,.1f}" for one in all_figures])
    line("calls", [f"{one.counts['calls']:,}" for one in all_figures])
    line("start, s", [f"{one.start_s:.2f}" for one in all_figures])
    line("a save, s", [f"{one.save_s:.2f}" for one in all_figures])
    line("peak memory, GiB", [f"{one.peak_gib:.1f}" for one in all_figures])
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--prompts", type=int, default=512, help="of 16 completions")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calls", action="store_true")
    options = parser.parse_args()
    if options.calls:
        calls_of_ray()
        return
    # Of one core: what two of them would share is not known of the driver's machine.
    torch.set_num_threads(1)
    all_figures = []
    for ranks in options.ranks:
        all_figures.append(measure(ranks, options.prompts, options.model))
        print(json.dumps(asdict(all_figures[-1])), flush=True)
    print(table(all_figures))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(one) for one in all_figures], indent=1))


if __name__ == "__main__":
    main()

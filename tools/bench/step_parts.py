"""The parts of `step.py`: which processes each starts, whose turn it is, and what becomes a figure.

Invariant: sides of one comparison are called in turn, each once a turn, and nothing else that this
program started computes meanwhile; what warms them up is in no figure.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import step_runs
from child import Child
from step_job import PLATFORM, Read, Sizes, read_job, read_prompts
from step_limits import Rates, Rows, forward_s, generate_s, optimizer_s, step_limits, update_s
from step_report import Results

from rlhf3d.machine import cores
from rlhf3d.models.spec import ModelSpec
from rlhf3d.resharding.setup import sync_setup

RATES = (
    ("forward_flops", "products of a forward pass", "GFLOP/s"),
    ("backward_flops", "products of a backward pass", "GFLOP/s"),
    ("square_flops", "a product of 2,048 × 2,048", "GFLOP/s"),
    ("copied_bytes", "copy, read and written", "GB/s"),
)
GIGA = 1e9
TIMING = "timing_s/"


@dataclass
class Bench:
    """What the parts share, and what they found."""

    job: Path
    sizes: Sizes
    results: Results
    repeats: int
    rates: dict[str, Rates] = field(default_factory=dict)
    """By dtype, of the part `training`."""
    packing_s: float | None = None
    """Of the part `sync`."""

    @property
    def read(self) -> Read:
        """The job."""
        return read_job(self.job, self.sizes.overrides)


@contextmanager
def child(make: Callable[[Any], Any], argument: Any) -> Iterator[Child]:
    """A process with all cores, ready."""
    process = Child(make, argument, cores())
    try:
        process.wait()
        yield process
    finally:
        process.end()


def in_turn(
    calls: Mapping[str, Callable[[int], Any]], turns: int, warm_up: bool
) -> dict[str, list[Any]]:
    """A B A B …: what each call returned, turn by turn; turn 0 is the warm-up, if there is one."""
    found: dict[str, list[Any]] = {name: [] for name in calls}
    for turn in range(0 if warm_up else 1, turns + 1):
        for name, call in calls.items():
            value = call(turn)
            print(f"turn {turn} of {turns}: {name}", flush=True)
            if turn:
                found[name].append(value)
    return found


def training(bench: Bench, dtype: str, prompts: int) -> None:
    """Log-probs and updates, ours and transformers', with products and copies between them."""
    from step_training import Settings, Training

    overrides = (*bench.sizes.overrides, f"model.dtype={dtype}")
    settings = Settings(bench.job, overrides, cores(), prompts, bench.sizes.completions)
    with child(Training, settings) as process:
        said = process.call("compare")

        def asks(method: str) -> Callable[[int], Any]:
            return lambda turn: process.call(method)

        names = ("rates", "forward", "their_forward", "update", "their_update")
        turns = in_turn({name: asks(name) for name in names}, bench.repeats, warm_up=False)
    for key, title, unit in RATES:
        values = [rates[key] / GIGA for rates in turns["rates"]]
        bench.results.add(f"machine/{dtype}/{title}", unit, values)
    rates = bench.rates[dtype] = median_rates(turns["rates"])
    spec, rows, tokens = bench.read.spec, Rows(**said["lengths"]), said["tokens"]
    limits = {"forward": forward_s(spec, rows, rates), "update": update_s(spec, rows, rates)}
    updates = {"ours": [one for one, _ in turns["update"]], "transformers": turns["their_update"]}
    forwards = {"ours": turns["forward"], "transformers": turns["their_forward"]}
    for name, sides in (("forward", forwards), ("update", updates)):
        for side, seconds in sides.items():
            speeds = [tokens / one for one in seconds]
            bench.results.add(f"{name}/{dtype}/{side}", "tokens/s", speeds, tokens / limits[name])
    adam = [seconds for _, seconds in turns["update"]]
    bench.results.add(
        f"update/{dtype}/ours, optimizer step alone", "s", adam, optimizer_s(spec, rates)
    )
    bench.results.conditions[f"rows of forward and update, {dtype}"] = (
        f"{rows.prompts} prompts × {rows.completions} completions, on average {rows.prompt:.0f} "
        f"and {rows.response:.0f} tokens; log-probs differ by {said['apart']:.2g} nats on average"
    )


def median_rates(measured: Sequence[Mapping[str, float]]) -> Rates:
    """What the machine reaches."""

    def middle(key: str) -> float:
        return statistics.median(rates[key] for rates in measured)

    return Rates(middle("forward_flops"), middle("backward_flops"), middle("copied_bytes"))


def generation(bench: Bench) -> None:
    """Our engine and vLLM's own `LLM`."""
    from step_engines import Ours, Raw, Settings

    settings = Settings(bench.job, bench.sizes.overrides, cores())
    with child(Ours, settings) as ours, child(Raw, settings) as raw:
        calls = {
            "ours": lambda turn: ours.call("generate", turn),
            "vllm": lambda turn: raw.call("generate", turn),
        }
        turns = in_turn(calls, bench.repeats, warm_up=True)
    same = [
        one.digest == other.digest for one, other in zip(turns["ours"], turns["vllm"], strict=True)
    ]
    bench.results.conditions["generation"] = f"the same tokens in {sum(same)} of {len(same)} turns"
    read = bench.read
    rates, limit = bench.rates.get(read.config.rollout.dtype), None
    if rates is not None:
        lengths = [len(prompt) for prompt in read_prompts(read.config, bench.sizes.prompts)]
        prompts, n = bench.sizes.prompts, bench.sizes.completions
        response = statistics.mean(one.tokens for one in turns["ours"]) / (prompts * n)
        longest = statistics.mean(one.longest for one in turns["ours"])
        rows = Rows(prompts, n, statistics.mean(lengths), response, longest)
        limit = rows.responses / generate_s(read.spec, rows, rates, read.config.rollout.dtype)
    for name, written in turns.items():
        speeds = [one.tokens / one.seconds for one in written]
        bench.results.add(f"generation/{name}", "tokens/s", speeds, limit)


def sync(bench: Bench) -> None:
    """A complete update of the engine's weights, and packing alone."""
    from step_engines import Ours
    from step_engines import Settings as EngineSettings
    from step_training import Settings, Training

    read, overrides = bench.read, bench.sizes.overrides
    place = (read.spec, read.derived.layout, PLATFORM, f"{os.getpid()}", [0])
    setup = sync_setup(read.config.rollout, *place)
    ends = Settings(bench.job, overrides, cores(), 1, 1)
    starts = EngineSettings(bench.job, overrides, cores())
    with child(Ours, starts) as engine, child(Training, ends) as sender:
        sender.call("create_stream", setup)
        engine.call("open_weights", setup)
        sender.call("open_stream", setup.name)

        def update(turn: int) -> dict[str, float]:
            sender.start("send", setup.name, turn)
            parts: dict[str, float] = engine.call("update", turn)
            sender.wait()
            return parts

        calls = {"packing": lambda turn: engine.call("pack"), "update": update}
        turns = in_turn(calls, bench.repeats, warm_up=True)
        engine.call("close")
        sender.call("close_stream", setup.name)
    bench.packing_s = statistics.median(turns["packing"])
    bench.results.add("sync/packing", "s", turns["packing"])
    totals = [parts["total"] for parts in turns["update"]]
    bench.results.add("sync/update", "s", totals, bench.packing_s)
    for name in ("wait", "verify", "load"):
        bench.results.add(f"sync/update, {name}", "s", [part[name] for part in turns["update"]])


def step(bench: Bench, rounds: int, steps: int, layouts: bool, trl_python: str | None) -> None:
    """Complete runs in turn: one process, layouts if asked for, TRL where there is one."""
    folder = bench.job.parent
    overrides = {"one": bench.sizes.overrides}
    if layouts:
        for name, keys in step_runs.LAYOUTS.items():
            overrides[name] = (*bench.sizes.overrides, *keys)

    def trains(name: str) -> Callable[[int], Any]:
        return lambda turn: step_runs.run_ours(bench.job, folder / name, steps, overrides[name])

    calls = {name: trains(name) for name in overrides}
    if trl_python is None:
        bench.results.missing["step_s/trl"] = "TRL is not installed"
    else:
        dtype = bench.read.config.model.dtype
        calls["trl"] = lambda turn: step_runs.run_trl(
            trl_python, bench.sizes, dtype, cores(), steps, folder / "trl"
        )
    # A run warms itself up: its first step is left out.
    turns = in_turn(calls, rounds, warm_up=False)
    for name, found in turns.items():
        if name == "trl":
            middle = [statistics.median(seconds) for seconds in found]
        else:
            middle = [of_round(rows, "step") for rows in found]
            updates = [of_round(rows, "update_actor") for rows in found]
            bench.results.add(f"update_s/{name}", "s", updates)
        bench.results.add(f"step_s/{name}", "s", middle)
    read = bench.read
    rows = list(chain.from_iterable(turns["one"]))
    add_phases(bench, read.spec, read.config.model.dtype, rows)


def of_round(rows: Sequence[Mapping[str, Any]], phase: str) -> float:
    """The median of a run's steps."""
    return statistics.median(row[f"{TIMING}{phase}"] for row in rows)


def add_phases(
    bench: Bench, spec: ModelSpec, dtype: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Seconds of each phase, and what its step's tokens cost at the limit."""
    results = bench.results
    phases = [key.removeprefix(TIMING) for key in rows[0] if key.startswith(TIMING)]
    for phase in phases:
        results.add(f"step/{phase}", "s", [row[f"{TIMING}{phase}"] for row in rows])
    if dtype not in bench.rates:
        return
    limits = []
    for row in rows:
        lengths = (row["prompt_length/mean"], row["response_length/mean"])
        sizes = (bench.sizes.prompts, bench.sizes.completions)
        work = Rows(*sizes, *lengths, row["response_length/max"])
        limits.append(step_limits(spec, work, bench.rates[dtype], dtype, bench.packing_s))
    for phase in (name for name in phases if name != "step"):
        # What the tokens do not need, scores and advantages, takes next to nothing.
        results.add(f"limit/{phase}", "s", [limit.get(phase, 0.0) for limit in limits])
    results.add("limit/step", "s", [sum(limit.values()) for limit in limits])

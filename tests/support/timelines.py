"""Profiled steps as values: a pipeline whose passes take equally long, and an engine.

Invariant: the same arguments make the same timeline.
"""

from __future__ import annotations

from rlhf3d.observability.profile.spans import Kind, Record, RequestLife, Span
from rlhf3d.observability.profile.timeline import Lane, Process, Timeline

MS = 1_000_000
FORWARD, BACKWARD = 10 * MS, 20 * MS


def span(name: str, kind: Kind, began: int, ended: int, **details: int) -> Span:
    """One, of times in ms."""
    return Span(name, kind, began * MS, ended * MS, details)


def pipeline(stages: int, micro_batches: int) -> list[list[Span]]:
    """The passes of 1F1B on each stage, from 0 on, and the end."""
    ready: dict[tuple[str, int, int], int] = {}
    orders = [_order(stage, stages, micro_batches) for stage in range(stages)]
    at, spans = [0] * stages, [list[Span]() for _ in range(stages)]
    while any(orders):
        for stage, order in enumerate(orders):
            if not order:
                continue
            kind, micro = order[0]
            # A pass waits for that of the neighbor which gives it its input.
            giver = stage - 1 if kind == "forward" else stage + 1
            first = not 0 <= giver < stages
            came = 0 if first else ready.get((kind, giver, micro))
            if came is None:
                continue
            began = max(at[stage], came)
            at[stage] = began + (FORWARD if kind == "forward" else BACKWARD)
            ready[kind, stage, micro] = at[stage]
            details = {"micro_batch": micro, "chunk": 0, "tokens": 512}
            name: Kind = "forward" if kind == "forward" else "backward"
            spans[stage].append(Span(kind, name, began, at[stage], details))
            order.pop(0)
    return spans


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Passes of a stage: some forward ones, then one of each kind, then backward ones."""
    ahead = min(stages - stage - 1, micro_batches)
    order = [("forward", micro) for micro in range(ahead)]
    for micro in range(micro_batches - ahead):
        order += [("forward", ahead + micro), ("backward", micro)]
    return order + [("backward", m) for m in range(micro_batches - ahead, micro_batches)]


def forward_only(stages: int, tokens: list[int]) -> Timeline:
    """A step of one phase without backward passes, a micro-batch for each count of tokens."""
    lanes = []
    for stage in range(stages):
        end = 10 * (stage + len(tokens))
        spans = [span("values", "call", 0, end), span("pipeline", "schedule", 0, end)]
        for micro, count in enumerate(tokens):
            began = 10 * (stage + micro)
            details = {"micro_batch": micro, "chunk": 0, "tokens": count}
            spans.append(span("forward", "forward", began, began + 10, **details))
        process = Process(f"actor tp0 pp{stage} dp0", "actor", stage, stages)
        lanes.append(Lane(process, Record("here", tuple(spans))))
    return Timeline(3, 10 * (stages - 1 + len(tokens)) * MS, tuple(lanes))


def requests(count: int, at_once: int) -> tuple[RequestLife, ...]:
    """Requests that all come at 0, of which an engine works on some; each is longer than before."""
    free, found = [0] * at_once, []
    for number in range(count):
        slot = min(range(at_once), key=free.__getitem__)
        began = free[slot]
        free[slot] = began + (20 + 3 * number) * MS
        found.append(
            RequestLife(number, 0, began + 5 * MS, free[slot], 12, 4 + number, aborted=False)
        )
    return tuple(found)


def timeline(stages: int = 2, micro_batches: int = 4, step: int = 3) -> Timeline:
    """A step: requests, a score, an update, a weight sync."""
    lives = requests(24, 8)
    generated = max(one.ended or 0 for one in lives)
    began = generated + 40 * MS
    passes = pipeline(stages, micro_batches)
    updated = began + max(of[-1].ended for of in passes)
    sync = 30 * MS
    end = updated + sync + 10 * MS
    driver = [
        Span("generate", "phase", 0, generated),
        Span("score", "phase", generated, generated + 30 * MS),
        Span("update_actor", "phase", began, updated),
        Span("sync_weights", "phase", updated, updated + sync),
    ]
    lanes = [Lane(Process("driver", "driver"), Record("here", tuple(driver)))]
    for stage, own in enumerate(passes):
        spans = [
            Span("update_actor", "call", began, updated),
            Span("pipeline", "schedule", began, updated),
        ]
        for one in own:
            times = (one.began + began, one.ended + began)
            spans.append(Span(one.name, one.kind, *times, one.details))
        spans.append(Span("pack", "transfer", updated, updated + 10 * MS, {"bucket": 0}))
        process = Process(f"actor tp0 pp{stage} dp0", "actor", stage, stages, 1)
        lanes.append(Lane(process, Record("here", tuple(spans))))
    steps = [
        Span("decode", "decode", at, at + 4 * MS, {"running": 8, "waiting": 0})
        for at in range(0, generated - 4 * MS, 5 * MS)
    ]
    steps.append(Span("update_weights", "command", updated, updated + sync))
    lanes.append(Lane(Process("engine 0", "engine"), Record("here", tuple(steps), lives)))
    return Timeline(step, end, tuple(lanes))

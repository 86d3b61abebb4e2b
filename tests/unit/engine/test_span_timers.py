"""Megatron's timers as spans."""

from __future__ import annotations

from rlhf3d.engine.span_timers import SpanTimers
from rlhf3d.observability.profile.recorder import Recorder


def test_passes_carry_the_micro_batch_that_the_schedule_has_there() -> None:
    """Two model chunks on a stage: backward passes begin with the last one."""
    recorder = Recorder()
    timers = SpanTimers(recorder)
    for _ in range(2):  # each schedule counts from its own begin
        timers.run([(0, 0), (1, 0), (0, 1), (1, 1)], 2, [30, 50])
        timers("forward-backward", log_level=1).start(barrier=True)
        for name in ["forward-compute"] * 4 + ["backward-compute"] * 4:
            timers(name, log_level=2).start()
            timers(name).stop()
        timers("forward-backward").stop()
    passes = [one for one in recorder.record().spans if one.kind in ("forward", "backward")]
    found = [
        (one.kind[0], one.details["micro_batch"], one.details["chunk"], one.details["tokens"])
        for one in passes[8:]
    ]
    assert found == [
        ("f", 0, 0, 30),
        ("f", 1, 0, 50),
        ("f", 0, 1, 30),
        ("f", 1, 1, 50),
        ("b", 0, 1, 30),
        ("b", 1, 1, 50),
        ("b", 0, 0, 30),
        ("b", 1, 0, 50),
    ]


def test_messages_are_waits_and_parts_of_others_are_nothing() -> None:
    recorder = Recorder()
    timers = SpanTimers(recorder)
    names = ("backward-send-forward-recv", "all-grads-sync", "optimizer-inner-step")
    for name in names:
        timers(name, log_level=1).start(barrier=False)
        timers(name).stop()
    found = [(one.name, one.kind, dict(one.details)) for one in recorder.record().spans]
    assert found == [
        ("wait for a stage", "wait", {"message": "backward-send-forward-recv"}),
        ("reduce gradients", "collective", {}),
    ]
    assert all(one.began <= one.ended for one in recorder.record().spans)

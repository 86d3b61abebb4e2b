"""A version is published after its weights arrived and, on canary steps, both checks passed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf3d.config.schema import Config, ModelConfig, RolloutConfig
from rlhf3d.experience.steps import Patience, untimed
from rlhf3d.models.spec import ModelSpec
from rlhf3d.parallel.layout import ParallelLayout
from rlhf3d.parallel.platform import CPUPlatform
from rlhf3d.placement.waiting import WorkerFailure
from rlhf3d.resharding.ring import SyncError
from rlhf3d.resharding.sending import SendReport
from rlhf3d.resharding.setup import sync_setup
from rlhf3d.rollout.api import SyncReport
from rlhf3d.trainer import weight_sync as sync_module
from rlhf3d.trainer.canary import Canary, CanaryError
from rlhf3d.trainer.hf_export import HFExport
from rlhf3d.trainer.weight_sync import WeightSync

SPEC = ModelSpec(
    "llama", 2, 16, num_heads=4, num_kv_heads=2, head_dim=4, ffn_size=32, vocab_size=64
)
CONFIG = Config(
    model=ModelConfig(dtype="float32"),
    rollout=RolloutConfig(dtype="float32", canary_steps=1, canary_every=3),
)


class Train:
    """Two training ranks whose canary log-probs are `logprobs`."""

    timeout_s, temperature, layout = 1.0, 1.0, ParallelLayout(tp=2)

    def __init__(self) -> None:
        self.logprobs = [-1.0, -2.0]
        self.events: list[str] = []

    def call_all(self, phase: str, method: Any, *args: Any) -> list[None]:
        return [None, None]

    def start_all(self, method: Any, *args: Any) -> dict[str, Any]:
        return {"rank 0": SendReport(10, 0.1), "rank 1": SendReport(20, 0.2)}

    def forward(self, phase: str, role: str, batch: Any, **_: Any) -> dict[str, torch.Tensor]:
        self.events.append("forward")
        return {"logprobs": torch.tensor([self.logprobs])}

    def first_rank_here(self) -> int | None:
        return None


class Rollout:
    """One engine that notes what was published; scoring puts a block into its prefix cache."""

    def __init__(self) -> None:
        self.cached, self.stale, self.published, self.scored = 0, 0, [], 0
        self.events: list[str] = []
        self.slept = False
        self.notes: list[str] = []
        """Lines for the user."""
        self.log: list[str] = []
        """What is done with streams, and after a restart."""
        self.dead: list[str] = []
        """Engines that die, one at each use."""
        self.started = 1
        self.given: list[int] = []
        self.report: SyncReport | Exception = SyncReport(0, 30, 0.0, 0.0, 0.0)

    def start_open_weights(self, setup: Any, meeting: Any) -> dict[str, Any]:
        self.log.append(f"open {setup.name}")
        return {"engine 0": None}

    def start_update_weights(self, version: int, sync: int) -> dict[str, Any]:
        self.cached = self.stale
        self.log.append(f"update {version} by sync {sync}")
        self._die("update")
        return {"engine 0": self.report}

    def score(self, sequences: Any, temperature: float) -> list[list[list[float]]]:
        self.scored += 1
        self.events.append("score")
        self.cached += 16
        return [[[-1.0, -2.0]]]

    def cached_tokens(self) -> list[int]:
        self.events.append("cached_tokens")
        return [self.cached]

    def sleep(self) -> None:
        self._die("sleep")
        self.slept = True

    def publish(self, version: int, again: bool = False) -> None:
        self._die("publish")
        self.published.append(version)
        if again:
            self.log.append("given again")

    def submit(self, requests: Any) -> None:
        self.given += requests

    def poll(self, timeout_s: float) -> dict[int, Any]:
        self._die("poll")
        return dict.fromkeys(self.given, "done")

    def lost(self) -> dict[str, str]:
        return {"engine 0": "was killed"} if self.died else {}

    def restart(self) -> None:
        self.died = False
        self.started += 1

    died = False

    def _die(self, where: str) -> None:
        if where in self.dead:
            self.dead.remove(where)
            self.died = True
            raise WorkerFailure(f"{where} failed on engine 0")


def gather(phase: str, calls: dict[str, Any], timeout_s: float) -> list[Any]:
    """Calls that ended at once."""
    for result in calls.values():
        if isinstance(result, Exception):
            raise result
    return list(calls.values())


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[WeightSync, Train, Rollout]:
    monkeypatch.setattr(sync_module, "gather", gather)
    train, rollout = Train(), Rollout()
    setup = sync_setup(
        CONFIG.rollout, SPEC, train.layout, CPUPlatform(reason="test"), "test", [0, 0]
    )
    canary: Any = Canary(CONFIG.rollout, "float32", [[5, 6, 7]], train, rollout)  # type: ignore[arg-type]
    sync = WeightSync(
        CONFIG.rollout,
        setup,
        train,  # type: ignore[arg-type]
        rollout,  # type: ignore[arg-type]
        canary,
        untimed,
        rollout.notes.append,
        Patience(),
    )
    return sync, train, rollout


def test_publishes_what_agrees(parts: tuple[WeightSync, Train, Rollout]) -> None:
    sync, _, rollout = parts
    metrics = sync.sync_weights()
    assert metrics["sync/sent_bytes"] == 30 and metrics["sync/send_s"] == 0.2
    assert metrics["sync/canary_abs_diff"] == 0.0
    assert rollout.published == [0] and sync.sync_weights() == {}


def test_canary_runs_on_its_steps(parts: tuple[WeightSync, Train, Rollout]) -> None:
    sync, _, rollout = parts
    for _ in range(7):
        sync.sync_weights()
        sync.weights_changed()
    assert rollout.scored == 3  # syncs 0, 3 and 6
    assert rollout.published == list(range(7))


def test_the_trainer_computes_before_engines_wake_their_caches(
    parts: tuple[WeightSync, Train, Rollout],
) -> None:
    sync, train, rollout = parts
    rollout.events = train.events
    sync.sync_weights()
    assert train.events == ["forward", "cached_tokens", "score"]


def test_disagreement_is_not_published(parts: tuple[WeightSync, Train, Rollout]) -> None:
    sync, train, rollout = parts
    train.logprobs = [-1.0, -2.1]
    with pytest.raises(
        CanaryError,
        match=r"after the sync of policy 0, engine 0 and the trainer .* differ by 0\.05",
    ):
        sync.sync_weights()
    assert rollout.published == [] and sync.served_version is None


def test_nan_is_disagreement(parts: tuple[WeightSync, Train, Rollout]) -> None:
    sync, train, rollout = parts
    train.logprobs = [-1.0, float("nan")]
    with pytest.raises(CanaryError):
        sync.sync_weights()
    assert rollout.published == []


def test_stale_prefix_cache_is_not_published(parts: tuple[WeightSync, Train, Rollout]) -> None:
    sync, _, rollout = parts
    rollout.stale = 128
    with pytest.raises(
        CanaryError, match="engine 0 still took 128 tokens of a prompt from its prefix cache"
    ):
        sync.sync_weights()
    assert rollout.published == [] and sync.served_version is None


def test_failed_load_is_not_published(parts: tuple[WeightSync, Train, Rollout]) -> None:
    sync, _, rollout = parts
    rollout.report = SyncError("model.norm.weight[0:16] differs")
    with pytest.raises(SyncError, match=r"model\.norm"):
        sync.sync_weights()
    assert rollout.published == [] and sync.served_version is None


def test_engines_that_slept_are_synced_again(parts: tuple[WeightSync, Train, Rollout]) -> None:
    sync, _, rollout = parts
    sync.sync_weights()
    sync.sleep_engines()
    assert not rollout.slept and sync.sync_weights() == {}, "rollout.sleep is off"
    sync.config = replace(sync.config, sleep=True)
    sync.sleep_engines()
    assert rollout.slept and sync.sync_weights() and rollout.published == [0, 0]


@pytest.mark.parametrize("where", ["update", "publish"])
def test_an_engine_that_dies_in_a_sync_is_synced_again(
    where: str, parts: tuple[WeightSync, Train, Rollout]
) -> None:
    sync, _, rollout = parts
    rollout.dead = [where]
    assert sync.sync_weights()["sync/canary_abs_diff"] == 0.0
    assert rollout.published == [0] and rollout.started == 2 and sync.restarts == 1
    # A stream of its own, counted from its beginning.
    assert "open test-1" in rollout.log
    sync.weights_changed()
    sync.sync_weights()
    updates = [event for event in rollout.log if event.startswith("update")]
    assert updates == ["update 0 by sync 0", "update 0 by sync 0", "update 1 by sync 1"]


def test_an_engine_that_died_meanwhile_is_found_before_the_senders_wait(
    parts: tuple[WeightSync, Train, Rollout],
) -> None:
    sync, _, rollout = parts
    rollout.died = True
    sync.sync_weights()
    assert rollout.log.index("open test-1") < rollout.log.index("update 0 by sync 0")


def test_requests_of_an_engine_that_dies_are_answered(
    parts: tuple[WeightSync, Train, Rollout],
) -> None:
    """With the version that it served, which has its canary again."""
    sync, _, rollout = parts
    sync.sync_weights()
    engines = sync.engines
    engines.submit({5: None})  # type: ignore[dict-item]
    rollout.dead = ["poll", "update"]
    assert engines.poll(1.0) == {} and engines.poll(1.0) == {5: "done"}
    assert rollout.published == [0, 0] and rollout.scored == 2 and rollout.started == 3
    assert rollout.log[-1] == "given again"
    assert sync.served_version == 0 and sync.sync_weights() == {}


def test_what_fails_while_training_ranks_are_busy_waits_for_them(
    parts: tuple[WeightSync, Train, Rollout],
) -> None:
    """The newest weights then write what is not answered, as a sync of their own."""
    sync, _, rollout = parts
    sync.sync_weights()
    engines = sync.engines
    engines.submit({5: None})  # type: ignore[dict-item]
    rollout.dead = ["poll"]
    with sync.patience.none():
        assert engines.poll(0.0) == engines.poll(0.0) == {}
        assert rollout.started == 1 and rollout.published == [0]
    sync.weights_changed()
    assert engines.poll(1.0) == {} and engines.poll(1.0) == {5: "done"}
    assert rollout.started == 2 and rollout.published == [0, 1] and sync.syncs == 2
    assert "the weights after update 0 are gone: those after 1 write" in rollout.notes[-1]
    assert sync.served_version == 1 and sync.sync_weights() == {}, "the schedule's sync is done"


def test_a_failure_that_a_sync_has_found_is_no_other_one(
    parts: tuple[WeightSync, Train, Rollout],
) -> None:
    sync, _, rollout = parts
    sync.sync_weights()
    rollout.dead = ["poll"]
    with sync.patience.none():
        sync.engines.poll(0.0)
    sync.weights_changed()
    sync.sync_weights()
    assert sync.engines.poll(1.0) == {} and sync.restarts == 1 and rollout.started == 2


def test_a_failure_in_the_background_that_is_no_death_ends_the_run(
    parts: tuple[WeightSync, Train, Rollout],
) -> None:
    sync, _, rollout = parts
    sync.sync_weights()

    def raises(timeout_s: float) -> Any:
        raise WorkerFailure("generate failed on engine 0: KeyError")

    rollout.poll = raises  # type: ignore[method-assign]
    with sync.patience.none():
        assert sync.engines.poll(0.0) == {}
    with pytest.raises(WorkerFailure, match="KeyError"):
        sync.engines.poll(1.0)


def test_an_engine_that_dies_as_it_goes_to_sleep_sleeps_after_its_restart(
    parts: tuple[WeightSync, Train, Rollout],
) -> None:
    sync, _, rollout = parts
    sync.config = replace(sync.config, sleep=True)
    rollout.dead = ["sleep"]
    sync.sleep_engines()
    assert rollout.slept and rollout.started == 2


def test_deaths_have_a_limit_and_what_is_no_death_ends_the_run(
    parts: tuple[WeightSync, Train, Rollout],
) -> None:
    sync, _, rollout = parts
    rollout.dead = ["update"] * 3
    with pytest.raises(WorkerFailure, match="update failed on engine 0"):
        sync.sync_weights()
    assert sync.restarts == 2 and rollout.started == 3 and rollout.published == []

    def raises(timeout_s: float) -> Any:
        raise WorkerFailure("generate failed on engine 0: KeyError")

    rollout.died, rollout.poll = False, raises  # type: ignore[method-assign]
    sync.served_version = 0
    with pytest.raises(WorkerFailure, match="KeyError"):
        sync.engines.poll(1.0)


def test_an_export_without_a_training_rank_beside_the_driver_is_refused() -> None:
    export = HFExport(None, "float32", Train(), Path("model"))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"trainer.save_hf: .* on a node that trains, or set trainer.save_hf=never"
    ):
        export.check()

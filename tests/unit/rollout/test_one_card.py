"""Engine and trainer on one card: vLLM's own measuring, sleep and waking over a ledger that both
write to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf3d.config.schema import Config, RolloutConfig
from rlhf3d.engine.offload import ModelStates
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform, Platform
from rlhf3d.trainer.processes import start_models

GIB = 1 << 30
CARD_GIB, CONTEXT_GIB, WEIGHTS_GIB, PEAK_GIB, GRAPHS_GIB = 79.1, 0.8, 7.1, 1.2, 0.6
STATES_GIB, ACTIVATIONS_GIB = 48.0, 12.0
"""A training rank's states; what torch keeps of its activations until told to let go."""


class Card:
    """Who holds how much of one GPU."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    @property
    def free(self) -> int:
        return int(CARD_GIB * GIB) - sum(self.held.values())

    def take(self, owner: str, gib: float) -> None:
        size = int(gib * GIB)
        if size > self.free:
            raise RuntimeError(
                f"CUDA Error: out of memory: {owner} wants {gib:.1f} GiB of {self.free / GIB:.1f}"
            )
        self.held[owner] = self.held.get(owner, 0) + size

    def give(self, owner: str) -> None:
        self.held.pop(owner, None)

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Have vLLM's CUDA worker read this card."""
        from vllm.utils import mem_utils
        from vllm.v1.worker import gpu_worker

        def engine() -> int:
            return sum(size for owner, size in self.held.items() if owner.startswith("vLLM"))

        accelerator: dict[str, Any] = {
            "get_memory_info": lambda device=None: (self.free, int(CARD_GIB * GIB)),
            "memory_stats": lambda device=None: {
                "allocated_bytes.all.peak": engine() + int(PEAK_GIB * GIB),
                "allocated_bytes.all.current": engine(),
            },
            "memory_reserved": lambda device=None: engine(),
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device=None: None,
            "synchronize": lambda *args: None,
        }
        for name, value in accelerator.items():
            patch.setattr(torch.accelerator, name, value)
        cuda = SimpleNamespace(
            is_integrated_gpu=lambda i: False,
            current_device=lambda: 0,
            device_name="cuda",
            is_cuda_alike=lambda: True,
            is_xpu=lambda: False,
            is_rocm=lambda: False,
        )
        patch.setattr(mem_utils, "current_platform", cuda)
        patch.setattr(gpu_worker, "current_platform", cuda)
        patch.setattr(gpu_worker, "maybe_apply_startup_plan", lambda worker: None)
        patch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())


class Engine:
    """A `RolloutGroup` of one rank, vLLM's CUDA worker without a model."""

    def __init__(self, card: Card, utilization: float) -> None:
        """As the actor's process starts: vLLM looks how much is free."""
        from vllm.utils.mem_utils import MemorySnapshot
        from vllm.v1.worker.gpu_worker import Worker
        from vllm.v1.worker.utils import request_memory

        self.card, self.worker_class, self.cache_gib = card, Worker, 0.0
        card.take("vLLM context", CONTEXT_GIB)
        cache = SimpleNamespace(gpu_memory_utilization=utilization, kv_cache_memory_bytes=None)
        snapshot = MemorySnapshot(device=torch.device("cuda:0"))
        self.worker = SimpleNamespace(
            cache_config=cache,
            init_snapshot=snapshot,
            requested_memory=request_memory(snapshot, cache),  # type: ignore[arg-type]
            randomize_dummy_inputs=False,
            model_runner=SimpleNamespace(
                model=torch.nn.Module(),
                model_memory_usage=int(WEIGHTS_GIB * GIB),
                profile_run=lambda **kwargs: None,
                profile_cudagraph_memory=lambda: int(GRAPHS_GIB * GIB),
            ),
            vllm_config=SimpleNamespace(
                compilation_config=SimpleNamespace(cudagraph_mode=None),
                model_config=SimpleNamespace(enable_nccl_comm_suspend=False),
            ),
            model_config=SimpleNamespace(multimodal_config=None),
            parallel_config=SimpleNamespace(),
            sleep_mode_backend=SimpleNamespace(suspend=self._suspend, resume=self._resume),
            _scoped_allocator_max_split=lambda **kwargs: nullcontext(),
            _save_sleep_parameters=lambda model: None,
            _sleep_saved_parameters={},
            _sleep_saved_draft_buffers={},
            get_draft_model=lambda: None,
            synchronize_device=lambda: None,
        )

    def wait_ready(self) -> None:
        """As vLLM loads, compiles and measures: a minute."""
        self.card.take("vLLM weights", WEIGHTS_GIB)
        size = self.worker_class.determine_available_memory(self.worker)
        assert size > 0, f"No available memory for the cache blocks: {size / GIB:.1f} GiB"
        self.cache_gib = size / GIB
        self.card.take("vLLM cache", self.cache_gib)

    def sleep(self) -> None:
        self.worker_class.sleep(self.worker, level=2)

    def wake(self, part: str) -> None:
        self.worker_class.wake_up(self.worker, tags=[part])

    def _suspend(self, level: int) -> None:
        self.card.give("vLLM weights")
        self.card.give("vLLM cache")

    def _resume(self, tags: list[str]) -> None:
        for part, gib in (("weights", WEIGHTS_GIB), ("cache", self.cache_gib)):
            if part in tags:
                self.card.take(f"vLLM {part}", gib)


class Trainer:
    """A `TrainGroup` of one rank: its states, and the real states of a model that is used now and
    then.
    """

    def __init__(self, card: Card, sleep: bool) -> None:
        """As the actors' processes start: they load at once."""
        self.card = card
        card.take("states", STATES_GIB)
        self.states = ModelStates(
            [], None, lambda: card.give("kept by torch"), offload=False, shared=sleep
        )

    def wait_ready(self) -> None:
        pass

    def work(self) -> None:
        with self.states.on_device("weights"):
            self.card.take("kept by torch", ACTIVATIONS_GIB)


def start(platform: Platform, config: Config) -> tuple[Card, Engine, Trainer]:
    """Both, as a run starts them."""
    card = Card()
    with pytest.MonkeyPatch.context() as patch:
        card.patch(patch)
        engine, groups = start_models(
            config.rollout,
            platform,
            lambda: Engine(card, config.rollout.gpu_memory_utilization),  # type: ignore[arg-type, return-value]
            {"actor": lambda: Trainer(card, config.rollout.sleep)},  # type: ignore[dict-item, return-value]
        )
        return card, engine, groups["actor"]  # type: ignore[return-value]


def config_of(**rollout: Any) -> Config:
    return replace(Config(), rollout=RolloutConfig(**rollout))


def start_awake() -> float:
    """In vLLM's process: GiB of cache of engines that stay awake."""
    return start(CUDAPlatform("test"), config_of(gpu_memory_utilization=0.3))[1].cache_gib


def start_together() -> None:
    """In vLLM's process: as on CPU, where nothing is measured."""
    start(CPUPlatform("test"), config_of(gpu_memory_utilization=0.3))


def steps() -> list[dict[str, float]]:
    """In vLLM's process: engines that sleep, two steps.

    What the card holds at each wake-up's end.
    """
    card, engine, trainer = start(
        CUDAPlatform("test"), config_of(gpu_memory_utilization=0.34, sleep=True)
    )
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        card.patch(patch)
        for _ in range(2):
            trainer.work()  # the weights are sent
            engine.wake("weights")
            engine.wake("cache")
            seen.append({owner: size / GIB for owner, size in card.held.items()})
            engine.sleep()
            trainer.work()  # the update
    return seen


def test_the_cache_is_what_utilization_leaves_of_a_card_on_which_trainers_load_later(
    in_vllm_process: Callable[..., Any],
) -> None:
    cache = in_vllm_process(start_awake)
    # vLLM's context is there before it looks; what it takes of its share afterwards is not the
    # cache's.
    assert cache == pytest.approx(0.3 * CARD_GIB - WEIGHTS_GIB - PEAK_GIB - GRAPHS_GIB, abs=0.01)


def test_trainers_that_load_meanwhile_would_take_it_all(
    in_vllm_process: Callable[..., Any],
) -> None:
    with pytest.raises(AssertionError, match=r"No available memory for the cache blocks: -\d"):
        in_vllm_process(start_together)


def test_engines_wake_beside_a_trainer_that_has_worked(in_vllm_process: Callable[..., Any]) -> None:
    seen = in_vllm_process(steps)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert seen[0]["vLLM cache"] > 15 and "kept by torch" not in seen[0]

"""Memory of a run by rank, phase and term, against what the devices and hosts have.

Invariant: every byte that is planned is in exactly one term of a phase; the micro-batches are those
of the longest sequences there can be, since a run meets them. Pure: no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.planning.checkpoint import checkpoint_bytes
from rlhf3d.planning.engines import EngineMemory, engine_memory
from rlhf3d.planning.job import Devices, Job, Model
from rlhf3d.planning.states import States, chunk_sizes, model_states
from rlhf3d.resharding.setup import SLOTS
from rlhf3d.units import GIB

ASLEEP_GIB = 0.5
"""GPU memory that a sleeping engine keeps besides its context: input buffers, pools of CUDA graphs
(rule of thumb)."""
SAFETY = 0.02
"""Share of a device that should be free: for other libraries, and for what is not counted."""
ACTIVATION_MARGIN = 0.15
"""Share of the activations that should be free too: they are planned to 10 %, and micro-batches of
many widths leave holes between blocks."""
DRIVER_GIB = 0.6
"""Host memory of the driver (measured)."""
ENVIRONMENT_GIB = 0.004
"""Host memory of one environment's process (measured; of one whose file imports no large library:
what it shares with the process that it is forked from counts once)."""
AHEAD_BYTES = 16
"""Host memory of a token that is generated ahead: its number and log-probability in arrays (8), and
its text."""
ADAM_TEMPORARIES = 2
"""fp32 tensors of a parameter's size in torch's Adam step; Transformer Engine's fused one has
none."""
FORWARD_PHASES = {
    "actor": "old_logprobs",
    "ref": "ref_logprobs",
    "critic": "values",
    "reward": "score",
}
PHASES = (
    "generate",
    "score",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "update_critic",
    "update_actor",
    "sync_weights",
    "save_checkpoint",
)
"""In the order of a step, the weight sync after the update whose weights it moves."""
Terms = dict[str, int]
"""Bytes by what takes them."""


@dataclass(frozen=True)
class PhaseMemory:
    """Memory of one phase."""

    phase: str
    terms: Terms

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.terms.values())

    @property
    def margin(self) -> float:
        """Bytes that should be free for activations that are larger than planned."""
        return ACTIVATION_MARGIN * self.terms.get("activations", 0)


@dataclass(frozen=True)
class RankMemory:
    """Devices (on CPU: processes) with identical needs."""

    ranks: tuple[int, ...]
    """Their numbers: the actor's ranks first, then dedicated groups, then dedicated engines."""
    place: str
    """Which ranks these are, for people."""
    states: Mapping[str, States]
    """By role."""
    resident: Terms
    """Terms of every phase."""
    phases: tuple[PhaseMemory, ...]
    """Resident terms included."""

    @property
    def peak(self) -> PhaseMemory:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def tightest(self) -> PhaseMemory:
        """The phase that comes nearest to the device's end, margin included."""
        return max(self.phases, key=lambda phase: phase.total + phase.margin)

    def own(self, name: str) -> int:
        """Return what a phase adds to the resident terms; 0 if these ranks have no part in it."""
        size = 0
        for phase in self.phases:
            if phase.phase == name:
                own = phase.terms.keys() - self.resident.keys()
                size += sum(phase.terms[term] for term in own)
        return size


@dataclass(frozen=True)
class HostMemory:
    """One node's memory at its peak."""

    phase: str
    terms: Terms
    limit: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a run needs, and that there is."""

    ranks: tuple[RankMemory, ...]
    """Training ranks, and engine ranks on devices of their own."""
    engine: EngineMemory
    host: HostMemory
    device_limit: int | None
    """Bytes of a device; None where all share the host's."""

    @property
    def peak(self) -> tuple[RankMemory, PhaseMemory]:
        """The rank and the phase that need most."""
        rank = max(self.ranks, key=lambda rank: rank.peak.total)
        return rank, rank.peak

    @property
    def _fullest(self) -> list[RankMemory]:
        """The fullest device of each set that holds the same models: each problem is told once."""
        fullest: dict[tuple[str, ...], RankMemory] = {}
        # From least to most: the fullest device of a set overwrites the others.
        by_need = sorted(self.ranks, key=lambda rank: rank.tightest.total + rank.tightest.margin)
        for rank in by_need:
            fullest[tuple(rank.states)] = rank
        return list(fullest.values())

    @property
    def tight(self) -> tuple[str, ...]:
        """Devices that the plan fits with less to spare than it should."""
        limit = self.device_limit
        if limit is None:
            return ()
        messages = []
        for rank in self._fullest:
            phase = rank.tightest
            wanted = spare(limit, phase)
            # What does not fit at all is among `problems`.
            if rank.peak.total <= limit < phase.total + wanted:
                messages.append(
                    f"device memory: {phase.phase} on device {rank.ranks[0]} ({rank.place}) leaves "
                    f"{_gib(limit - phase.total)} of {_gib(limit)} GiB free, less than the "
                    f"{_gib(wanted)} for holes between blocks and what is not counted: "
                    "it may run out"
                )
        return tuple(messages)

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that does not fit, with the figures and how to fix it."""
        return (*self._device_problems(), *self._engine_problems(), *self._host_problems())

    def _device_problems(self) -> Iterator[str]:
        limit = self.device_limit
        for rank in self._fullest:
            phase = rank.peak
            if limit is not None and phase.total > limit:
                yield (
                    f"device memory: {phase.phase} on device {rank.ranks[0]} ({rank.place}) needs "
                    f"{_gib(phase.total)} GiB, {_gib(phase.total - limit)} more than the "
                    f"{_gib(limit)} of a device; largest: {_largest(phase.terms, 3)} GiB"
                )

    def _engine_problems(self) -> Iterator[str]:
        engine, limit = self.engine, self.device_limit
        if not engine.missing:
            return
        if limit is None:
            yield (
                f"vLLM: rollout.kv_cache_gib = {_gib(engine.kv_cache)} does not hold one sequence "
                f"of {engine.max_model_len} tokens ({_gib(engine.one_sequence)} GiB); raise it"
            )
            return
        least = (engine.weights + engine.activations + engine.one_sequence) / limit
        yield (
            f"vLLM: rollout.gpu_memory_utilization leaves {_gib(engine.kv_cache)} GiB for keys and "
            f"values beside {_gib(engine.weights)} GiB of weights and {_gib(engine.activations)} "
            f"GiB of activations, {_gib(engine.missing)} GiB too little for one sequence of "
            f"{engine.max_model_len} tokens; give {math.ceil(100 * least) / 100:.2f} or more, or "
            "raise rollout.tensor_parallel_size"
        )

    def _host_problems(self) -> Iterator[str]:
        host = self.host
        if host.total > host.limit:
            yield (
                f"host memory: {host.phase} needs {_gib(host.total)} GiB a node, "
                f"{_gib(host.total - host.limit)} more than its {_gib(host.limit)}; "
                f"largest: {_largest(host.terms, 1, ', ')} GiB"
            )


def _largest(terms: Terms, count: int, between: str = " ") -> str:
    names = sorted(terms, key=lambda name: -terms[name])[:count]
    return ", ".join(f"{name}{between}{_gib(terms[name])}" for name in names)


def spare(limit: float, phase: PhaseMemory) -> float:
    """Return the bytes of a device that should be free in a phase."""
    return SAFETY * limit + phase.margin


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}"


def plan_memory(job: Job) -> MemoryPlan:
    """Return the memory of a job, by groups of devices (on CPU: processes) that need the same."""
    engine = engine_memory(job)
    ranks = training_memory(job, engine)
    if job.on_gpu and not job.colocated:
        ranks.append(_engine_rank(job, engine))
    limit_gib = job.cluster.hardware.memory_gib
    limit = None if limit_gib is None else int(limit_gib * GIB)
    return MemoryPlan(tuple(ranks), engine, _host(job, ranks, engine), limit)


def training_memory(job: Job, engine: EngineMemory, ends: bool = False) -> list[RankMemory]:
    """Return the devices with training ranks; with `ends` only those that can be the fullest.

    Stages between the first and the last hold as many layers; the first of them has most
    micro-batches in flight.
    """
    alike: dict[tuple[object, ...], list[Devices]] = defaultdict(list)
    for devices in job.devices:
        stages = [(group, group.layout.coords(rank).pp) for group, rank in devices.ranks]
        if not ends or all(pp in (0, 1, group.layout.pp - 1) for group, pp in stages):
            # Tensor, context and data ranks of a stage need the same, give or take padding.
            key = (devices.with_engine, *((group.name, pp) for group, pp in stages))
            alike[key].append(devices)
    return [_training_ranks(job, devices, engine) for devices in alike.values()]


def _training_ranks(job: Job, alike: Sequence[Devices], engine: EngineMemory) -> RankMemory:
    """The first of these devices: replicas hold as much, give or take the padding of buffers."""
    first = alike[0]
    numbers: list[int] = []
    for devices in alike:
        numbers += devices.numbers
    members: list[tuple[Model, int]] = []
    for group, rank in first.ranks:
        members += [(model, rank) for model in job.models if model.group == group]
    states = {model.role: states_of(job, model, rank) for model, rank in members}
    # Groups that share a device are processes of their own, each with its CUDA context.
    resident = {"process": int(len(first.ranks) * job.cluster.hardware.process_gib * GIB)}
    loaded: dict[str, Terms] = {}
    """States by role, of models that are on the device in their own phases alone."""
    for role, state in states.items():
        if job.config.model.offload:
            loaded[role] = _state_terms(role, state)
        else:
            resident |= _state_terms(role, state)
    serving: Terms = {}
    loading: Terms = {}
    if first.with_engine:
        serving, loading = _engine_terms(job.config.rollout, engine, resident)
    phases = [PhaseMemory("generate", resident | serving)]
    for model, rank in members:
        phases += _model_phases(job, model, rank, resident, loaded.get(model.role, {}))
    # Only the actor's ranks send weights. On CPU buckets are in shared memory, a term of the host.
    if "actor" in states:
        buckets = {"buckets": SLOTS * job.sync_bucket_bytes} if job.on_gpu else {}
        weights = _only(loaded.get("actor", {}), "weights")
        phases.append(PhaseMemory("sync_weights", resident | weights | loading | buckets))
        saved = [
            _only(loaded[role], "weights", "optimizer")
            for role in ("actor", "critic")
            if role in loaded
        ]
        # One model after the other is saved.
        most = max(saved, key=lambda terms: sum(terms.values()), default={})
        phases.append(PhaseMemory("save_checkpoint", resident | most | buckets))
    phases.sort(key=lambda phase: PHASES.index(phase.phase))
    stages = [f"{group.name} pp{group.layout.coords(rank).pp}" for group, rank in first.ranks]
    return RankMemory(tuple(numbers), ", ".join(stages), states, resident, tuple(phases))


def states_of(job: Job, model: Model, rank: int) -> States:
    """Return weights, gradients and optimizer of a model on one rank."""
    return model_states(
        model.spec,
        model.layout,
        model.layout.coords(rank),
        model.head,
        job.config.model.dtype,
        trained=model.trained,
        distributed_optimizer=model.settings.distributed_optimizer,
        overlap_grad_reduce=model.settings.overlap_grad_reduce,
        style=job.style,
    )


def _state_terms(role: str, state: States) -> Terms:
    terms = {f"{role} weights": state.weights}
    if state.gradients:
        terms |= {f"{role} gradients": state.gradients, f"{role} optimizer": state.optimizer}
    return terms


def _only(terms: Terms, *kinds: str) -> Terms:
    return {name: size for name, size in terms.items() if name.endswith(kinds)}


def _engine_terms(
    rollout: RolloutConfig, engine: EngineMemory, resident: Terms
) -> tuple[Terms, Terms]:
    """What a colocated engine adds while it serves and while it is loaded.

    Its context, and all of an engine that never sleeps, is added to `resident`.
    """
    resident["vLLM context"] = engine.outside
    if not rollout.sleep:
        resident["vLLM"] = engine.total
        return {}, {}
    asleep = int(ASLEEP_GIB * GIB)
    resident["vLLM asleep"] = asleep
    return {"vLLM": engine.total - asleep}, {"vLLM": engine.weights}


def _model_phases(
    job: Job, model: Model, rank: int, resident: Terms, loaded: Terms
) -> list[PhaseMemory]:
    """The passes of one model on one rank.

    `loaded`: its states, where they are offloaded between its own passes.
    """
    pp, count = model.layout.coords(rank).pp, job.micro_batches(model)
    passes = job.activations(model, job.longest(model))
    phases = []
    if job.has_pass(model):
        weights = _only(loaded, "weights")
        activations = {"activations": int(passes.forward_peak(pp, count))}
        phases.append(PhaseMemory(FORWARD_PHASES[model.role], resident | weights | activations))
    if not model.trained:
        return phases
    layers = len(model.layout.layers(model.spec.num_layers, pp))
    peak = int(passes.update_peak(pp, count, layers))
    if not job.on_gpu:
        chunks = range(model.layout.vpp)
        sizes = [
            chunk_sizes(model.spec, model.layout, pp, chunk, model.head, job.style)
            for chunk in chunks
        ]
        # The optimizer's step comes after the passes: the greater of the two counts.
        peak = max(peak, ADAM_TEMPORARIES * 4 * max(size.largest for size in sizes))
    update = PhaseMemory(f"update_{model.role}", resident | loaded | {"activations": peak})
    return [*phases, update]


def _engine_rank(job: Job, engine: EngineMemory) -> RankMemory:
    """An engine rank on a device of its own."""
    first = job.training_devices
    resident = {"vLLM context": engine.outside, "vLLM": engine.total}
    buckets = {"buckets": SLOTS * job.sync_bucket_bytes}
    phases = (PhaseMemory("generate", resident), PhaseMemory("sync_weights", resident | buckets))
    return RankMemory(tuple(range(first, first + job.engine_ranks)), "vLLM", {}, resident, phases)


def _host(job: Job, ranks: list[RankMemory], engine: EngineMemory) -> HostMemory:
    """The fullest node at its peak."""
    offloaded = 0
    if job.config.model.offload:
        for rank in ranks:
            # Gradients are not moved: they are dropped and made again.
            each = sum(state.weights + state.optimizer for state in rank.states.values())
            offloaded += len(rank.ranks) * each
    limit = int(job.cluster.hardware.host_memory_gib * GIB)
    if job.on_gpu:
        return HostMemory("save_checkpoint", _host_of_gpus(job, offloaded), limit)
    phase, terms = _host_of_cpus(job, ranks, engine, offloaded)
    return HostMemory(phase, terms, limit)


def _host_of_gpus(job: Job, offloaded: int) -> Terms:
    """Processes, and what passes through or waits in host memory."""
    hardware, cluster = job.cluster.hardware, job.cluster
    per_node = min(cluster.devices_per_node, job.devices_needed)
    engines = min(per_node, job.engine_ranks)
    trained = min(per_node, job.training_devices) * len(job.devices[0].ranks)
    terms = {
        "driver": int(DRIVER_GIB * GIB),
        "weight sync": SLOTS * job.sync_bucket_bytes,  # of an export
        "training processes": int(trained * hardware.host_process_gib * GIB),
        "engine processes": int(engines * hardware.engine_process_gib * GIB),
        "copies to save": _save_copies(job) // cluster.nodes,
        **_environments(job),
        **_ahead(job),
    }
    if offloaded:
        terms["offloaded states"] = offloaded // cluster.nodes
    return terms


def _host_of_cpus(
    job: Job, ranks: list[RankMemory], engine: EngineMemory, offloaded: int
) -> tuple[str, Terms]:
    """The phase in which processes, ranks and engines hold most, and all that they hold in it."""
    rollout = job.config.rollout
    engine_ranks = rollout.engines * rollout.tensor_parallel_size
    # Weights, and the packed copies that CPU kernels compute with.
    each_engine_rank = job.cluster.hardware.engine_process_gib * GIB + engine.weights * 2
    # Buckets of each rank of an engine, and those of an export.
    buckets = SLOTS * (rollout.tensor_parallel_size + 1)
    terms = {"driver": int(DRIVER_GIB * GIB), "weight sync": buckets * job.sync_bucket_bytes}
    terms |= _environments(job) | _ahead(job)
    if offloaded:
        terms["offloaded states"] = offloaded
    kv_cache = int(rollout.engines * rollout.kv_cache_gib * GIB)
    terms["engines"] = int(engine_ranks * each_engine_rank) + kv_cache
    resident = sum(len(rank.ranks) * sum(rank.resident.values()) for rank in ranks)
    by_phase: dict[str, int] = {}
    # Host memory is shared: ranks without a part in a phase still hold their resident terms in it.
    for rank in ranks:
        for phase in rank.phases:
            by_phase.setdefault(phase.phase, resident)
    for name in by_phase:
        by_phase[name] += sum(len(rank.ranks) * rank.own(name) for rank in ranks)
    by_phase["save_checkpoint"] += _save_copies(job)
    peak = max(by_phase, key=lambda name: by_phase[name])
    return peak, terms | {"training ranks": by_phase[peak]}


def _environments(job: Job) -> Terms:
    """Processes of environments, all on the driver's node."""
    environment = job.config.environment
    if not environment.enabled:
        return {}
    # As many as run: all that admission allows, or those of one batch at a time.
    running = job.derived.sequences_per_step
    if job.config.rollout.update == "in_flight":
        running = job.derived.open_sequences
    alive = min(environment.max_concurrent, running)
    return {"environments": int(alive * ENVIRONMENT_GIB * GIB)}


def _ahead(job: Job) -> Terms:
    """Completions that wait in the driver until they are trained on, of the longest length."""
    derived = job.derived
    waiting = derived.open_sequences - derived.sequences_per_step
    if not waiting:
        return {}
    return {"batches ahead": waiting * derived.max_sequence_length * AHEAD_BYTES}


def _save_copies(job: Job) -> int:
    """Host memory that saving takes while it writes: one copy of every trained model's state."""
    trainer = job.config.trainer
    return checkpoint_bytes(job) if trainer.save_freq or trainer.save_at_end else 0

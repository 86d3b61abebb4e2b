"""Memory of a run by rank, phase and term, against what the devices and hosts have.

Invariant: every byte that is planned is in exactly one term of a phase; the micro-batches are those of the longest
sequences there can be, since a run meets them. Pure: no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from rlhf3d import units
from rlhf3d.models.spec import ModelSpec
from rlhf3d.models.weights import Head
from rlhf3d.parallel.layout import ParallelLayout, SpecStyle
from rlhf3d.planning.engines import EngineMemory, engine_memory
from rlhf3d.planning.job import Job, Model, Run
from rlhf3d.planning.states import States, chunk_sizes, model_states
from rlhf3d.resharding.setup import SLOTS
from rlhf3d.units import GIB

ASLEEP_GIB = 0.5
"""GPU memory that a sleeping engine keeps beside its context: input buffers, graphs' pools (rule of thumb)."""
SAFETY = 0.02
"""Share of a device that a plan that fits leaves free: for what other libraries take, and what is not counted."""
ACTIVATION_MARGIN = 0.15
"""And of the activations: they are planned to 10 %, and micro-batches of many widths leave holes between blocks."""
DRIVER_GIB = 0.6
"""Host memory of the driver (measured)."""
ADAM_TEMPORARIES = 2
"""fp32 tensors of a parameter's size in torch's Adam step; Transformer Engine's fused one has none."""
PHASES = (
    *(
        "generate",
        "score",
        "old_logprobs",
        "ref_logprobs",
        "values",
        "update_critic",
        "update_actor",
    ),
    *("sync_weights", "save_checkpoint"),
)
"""In the order of a step."""
FORWARD_PHASES = {
    "actor": "old_logprobs",
    "ref": "ref_logprobs",
    "critic": "values",
    "reward": "score",
}


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes of one phase, by term."""

    phase: str
    terms: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class RankMemory:
    """Devices (on CPU: processes) that need the same."""

    ranks: tuple[int, ...]
    """Their numbers: the actor's ranks first, then groups apart, then engines apart."""
    place: str
    """Which ranks these are, for people."""
    states: Mapping[str, States]
    """By role."""
    resident: Mapping[str, int]
    """Terms that every phase has."""
    phases: tuple[PhaseMemory, ...]
    """Resident terms included."""

    @property
    def peak(self) -> PhaseMemory:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def tightest(self) -> PhaseMemory:
        """The phase that comes nearest to the device's end, margin included."""
        return max(self.phases, key=lambda phase: phase.total + margin(phase))

    def own(self, name: str) -> int:
        """Bytes of a phase beside the resident terms; 0 of one in which these ranks have no part."""
        found = (phase for phase in self.phases if phase.phase == name)
        return sum(
            size
            for phase in found
            for term, size in phase.terms.items()
            if term not in self.resident
        )


@dataclass(frozen=True)
class HostMemory:
    """One node's memory at its peak, by term."""

    phase: str
    terms: Mapping[str, int]
    limit: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs and what there is."""

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
        """Of the devices that hold the same models, those that need most."""
        found: dict[tuple[str, ...], RankMemory] = {}
        for rank in sorted(
            self.ranks, key=lambda rank: rank.tightest.total + margin(rank.tightest)
        ):
            found[tuple(rank.states)] = rank
        return list(found.values())

    @property
    def tight(self) -> tuple[str, ...]:
        """Devices that the plan fits with less to spare than it should."""
        limit = self.device_limit
        if limit is None:
            return ()
        return tuple(
            _tight_device(rank, rank.tightest, limit)
            for rank in self._fullest
            if rank.peak.total <= limit < rank.tightest.total + spare(limit, rank.tightest)
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not fit, each with the figures and how to fix it."""
        found, engine = [], self.engine
        if self.device_limit is not None:
            found += [
                _device_problem(rank, rank.peak, self.device_limit)
                for rank in self._fullest
                if rank.peak.total > self.device_limit
            ]
            if engine.missing:
                least = (
                    engine.weights + engine.activations + engine.one_sequence
                ) / self.device_limit
                found.append(
                    f"vLLM: rollout.gpu_memory_utilization leaves {_gib(engine.kv_cache)} GiB for keys and values "
                    f"beside {_gib(engine.weights)} GiB of weights and {_gib(engine.activations)} GiB of "
                    f"activations, {_gib(engine.missing)} GiB too little for one sequence of {engine.max_model_len} "
                    f"tokens; give {math.ceil(100 * least) / 100:.2f} or more, or raise "
                    "rollout.tensor_parallel_size"
                )
        elif engine.missing:
            found.append(
                f"vLLM: rollout.kv_cache_gib = {_gib(engine.kv_cache)} does not hold one sequence of "
                f"{engine.max_model_len} tokens ({_gib(engine.one_sequence)} GiB); raise it"
            )
        if self.host.total > self.host.limit:
            largest = max(self.host.terms, key=lambda name: self.host.terms[name])
            found.append(
                f"host memory: {self.host.phase} needs {_gib(self.host.total)} GiB a node, "
                f"{_gib(self.host.total - self.host.limit)} more than its {_gib(self.host.limit)}; largest: {largest}, "
                f"{_gib(self.host.terms[largest])} GiB"
            )
        return tuple(found)


def _device_problem(rank: RankMemory, phase: PhaseMemory, limit: int) -> str:
    largest = sorted(phase.terms, key=lambda name: -phase.terms[name])[:3]
    terms = ", ".join(f"{name} {_gib(phase.terms[name])}" for name in largest)
    return (
        f"device memory: {phase.phase} on device {rank.ranks[0]} ({rank.place}) needs {_gib(phase.total)} GiB, "
        f"{_gib(phase.total - limit)} more than the {_gib(limit)} of a device; largest: {terms} GiB"
    )


def _tight_device(rank: RankMemory, phase: PhaseMemory, limit: int) -> str:
    return (
        f"device memory: {phase.phase} on device {rank.ranks[0]} ({rank.place}) leaves {_gib(limit - phase.total)} of "
        f"{_gib(limit)} GiB free, less than the {_gib(spare(limit, phase))} for holes between blocks and what is not "
        "counted: it may run out"
    )


def margin(phase: PhaseMemory) -> float:
    """Bytes that a phase may need beside what is counted, the share of the device apart."""
    return ACTIVATION_MARGIN * phase.terms.get("activations", 0)


def spare(limit: float, phase: PhaseMemory) -> float:
    """Bytes that should be free of a device in a phase."""
    return SAFETY * limit + margin(phase)


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}"


def plan_memory(job: Job) -> MemoryPlan:
    """The memory of a job, by groups of devices (on CPU: processes) that need the same."""
    engine = engine_memory(job)
    ranks = training_memory(job, engine)
    if job.on_gpu and not job.colocated:
        ranks.append(_engine_rank(job, engine))
    hardware = job.cluster.hardware
    limit = None if hardware.memory_gib is None else int(hardware.memory_gib * GIB)
    return MemoryPlan(tuple(ranks), engine, _host(job, ranks, engine), limit)


def training_memory(job: Job, engine: EngineMemory, ends: bool = False) -> list[RankMemory]:
    """Devices with training ranks; `ends`: only those that can be the fullest.

    Of the stages between the first and the last, which hold as many layers, the first has most micro-batches in flight.
    """
    alike: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in job.runs:
        stages = [(group, group.layout.coords(rank).pp) for group, rank in run.ranks]
        if not ends or all(pp in (0, 1, group.layout.pp - 1) for group, pp in stages):
            alike[run.served, *((group.name, pp) for group, pp in stages)].append(run)
    return [_training_ranks(job, runs, engine) for runs in alike.values()]


def _training_ranks(job: Job, runs: Sequence[Run], engine: EngineMemory) -> RankMemory:
    """The first of these devices: replicas hold as much, give or take the padding of buffers."""
    seat, served = runs[0].ranks, runs[0].served
    members = tuple(device for run in runs for device in run.devices)
    here = [(model, rank) for group, rank in seat for model in job.models if model.group == group]
    states = {
        model.role: model_states(
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
        for model, rank in here
    }
    terms = {role: _terms(role, state) for role, state in states.items()}
    resident = {"process": int(len(seat) * job.cluster.hardware.process_gib * GIB)}
    at_work: dict[str, dict[str, int]] = {}
    if job.config.model.offload:
        at_work = terms
    else:
        resident |= {name: size for of_role in terms.values() for name, size in of_role.items()}
    serving, loading = _engine_terms(job, engine, resident) if served else ({}, {})
    phases = [PhaseMemory("generate", resident | serving)]
    for model, rank in here:
        phases += _model_phases(job, model, rank, resident, at_work.get(model.role, {}))
    if "actor" in states:
        buckets = {"buckets": SLOTS * job.sync_bucket_bytes} if job.on_gpu else {}
        weights = _only(at_work.get("actor", {}), "weights")
        phases.append(PhaseMemory("sync_weights", resident | weights | loading | buckets))
        saved = [
            _only(of_role, "weights", "optimizer")
            for role, of_role in at_work.items()
            if role in ("actor", "critic")
        ]
        most = max(saved, key=lambda found: sum(found.values()), default={})
        phases.append(PhaseMemory("save_checkpoint", resident | most | buckets))
    phases.sort(key=lambda phase: PHASES.index(phase.phase))
    place = ", ".join(f"{group.name} pp{group.layout.coords(rank).pp}" for group, rank in seat)
    return RankMemory(members, place, states, resident, tuple(phases))


def _terms(role: str, state: States) -> dict[str, int]:
    """A model's states by name."""
    found = {f"{role} weights": state.weights}
    if state.gradients:
        found |= {f"{role} gradients": state.gradients, f"{role} optimizer": state.optimizer}
    return found


def _only(terms: Mapping[str, int], *kinds: str) -> dict[str, int]:
    return {name: size for name, size in terms.items() if name.endswith(kinds)}


def _engine_terms(
    job: Job, engine: EngineMemory, resident: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """What an engine beside training adds while it serves and while it is loaded; one that never sleeps is resident."""
    resident["vLLM context"] = engine.outside
    if not job.config.rollout.sleep:
        resident["vLLM"] = engine.total
        return {}, {}
    resident["vLLM asleep"] = asleep = int(ASLEEP_GIB * GIB)
    return {"vLLM": engine.total - asleep}, {"vLLM": engine.weights}


def _model_phases(
    job: Job, model: Model, rank: int, resident: dict[str, int], at_work: dict[str, int]
) -> list[PhaseMemory]:
    """The passes of one model on one rank; `at_work`: its states, where they are elsewhere in other phases."""
    micro, pp = job.longest(model), model.layout.coords(rank).pp
    passes = job.activations(model, micro)
    count = job.micro_batches(model)
    kept = {"activations": int(passes.forward_peak(pp, count))}
    forward = PhaseMemory(FORWARD_PHASES[model.role], resident | _only(at_work, "weights") | kept)
    if not model.trained:
        return [forward]
    chunks = [
        chunk_sizes(model.spec, model.layout, pp, n, model.head, job.style)
        for n in range(model.layout.vpp)
    ]
    layers = len(model.layout.layers(model.spec.num_layers, pp))
    activations = int(passes.update_peak(pp, count, layers))
    step = 0 if job.on_gpu else ADAM_TEMPORARIES * 4 * max(chunk.largest for chunk in chunks)
    kept = {"activations": max(activations, step)}
    return [forward, PhaseMemory(f"update_{model.role}", resident | at_work | kept)]


def _engine_rank(job: Job, engine: EngineMemory) -> RankMemory:
    """An engine rank on a device of its own."""
    first = job.training_devices
    resident = {"vLLM context": engine.outside, "vLLM": engine.total}
    buckets = {"buckets": SLOTS * job.sync_bucket_bytes}
    phases = (PhaseMemory("generate", resident), PhaseMemory("sync_weights", resident | buckets))
    return RankMemory(tuple(range(first, first + job.engine_ranks)), "vLLM", {}, resident, phases)


def _host(job: Job, ranks: list[RankMemory], engine: EngineMemory) -> HostMemory:
    """The fullest node at its peak: processes, and on CPU all that the ranks and engines hold."""
    hardware, rollout = job.cluster.hardware, job.config.rollout
    # Each engine rank's, and those of an export; on GPUs the former are in their memory.
    shared = SLOTS * (1 if job.on_gpu else rollout.tensor_parallel_size + 1) * job.sync_bucket_bytes
    offloaded = job.config.model.offload * sum(
        len(rank.ranks) * (state.weights + state.optimizer)
        for rank in ranks
        for state in rank.states.values()
    )
    if not job.on_gpu:
        terms = {"driver": int(DRIVER_GIB * GIB), "weight sync": shared}
        if offloaded:
            terms["offloaded states"] = offloaded
        terms["engines"] = int(
            rollout.engines
            * (
                rollout.tensor_parallel_size
                * (hardware.engine_process_gib * GIB + engine.weights * 2)
            )
        ) + int(rollout.engines * rollout.kv_cache_gib * GIB)
        resident = sum(len(r.ranks) * sum(r.resident.values()) for r in ranks)
        of_phase = {
            name: resident + sum(len(r.ranks) * r.own(name) for r in ranks)
            for name in dict.fromkeys(p.phase for r in ranks for p in r.phases)
        }
        of_phase["save_checkpoint"] += _save_copies(job)
        phase = max(of_phase, key=lambda name: of_phase[name])
        return HostMemory(
            phase, terms | {"training ranks": of_phase[phase]}, int(hardware.host_memory_gib * GIB)
        )
    per_node = min(job.cluster.devices_per_node, job.devices_needed)
    engines = min(per_node, job.engine_ranks)
    trained = min(per_node, job.training_devices) * len(job.runs[0].ranks)
    terms = {
        "driver": int(DRIVER_GIB * GIB),
        "weight sync": shared,
        "training processes": int(trained * hardware.host_process_gib * GIB),
        "engine processes": int(engines * hardware.engine_process_gib * GIB),
        "copies to save": _save_copies(job) // job.cluster.nodes,
    }
    if offloaded:
        terms["offloaded states"] = offloaded // job.cluster.nodes
    return HostMemory("save_checkpoint", terms, int(hardware.host_memory_gib * GIB))


def _save_copies(job: Job) -> int:
    """Host memory that saving takes while it writes, over all ranks: one copy of every trained model's state."""
    trainer = job.config.trainer
    if not (trainer.save_freq or trainer.save_at_end):
        return 0
    return checkpoint_bytes(job)


def checkpoint_bytes(job: Job) -> int:
    """Return the bytes of a checkpoint: weights and, if it is saved, optimizer state of every trained model."""
    weights = sum(stored_elements(job, model) for model in job.models if model.trained)
    return units.checkpoint_bytes(
        weights, job.config.model.dtype, job.config.trainer.save_optimizer
    )


def stored_elements(job: Job, model: Model) -> int:
    """Weights of a model that a checkpoint holds: each shard once."""
    return _stored_elements(model.spec, model.layout, model.head, job.style)


@cache
def _stored_elements(spec: ModelSpec, layout: ParallelLayout, head: Head, style: SpecStyle) -> int:
    chunks = [
        chunk_sizes(spec, layout, pp, chunk, head, style)
        for pp in range(layout.pp)
        for chunk in range(layout.vpp)
    ]
    experts = sum(sum(chunk.experts) for chunk in chunks)
    return (sum(chunk.total for chunk in chunks) - experts) * layout.tp + experts * layout.ep

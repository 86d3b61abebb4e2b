"""The job to plan: a configuration, the model's shape and the devices, as one value.

Invariant: sizes and layouts are those the run itself would use (`rlhf3d.config.derived`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import NamedTuple

from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.config.derived import Derived, derive, micro_batching_of
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.groups import WorkerGroup
from rlhf3d.config.resolve import resolve_platform
from rlhf3d.config.schema import Config, DataConfig, LayoutConfig
from rlhf3d.models.spec import ModelSpec, load_spec
from rlhf3d.models.weights import Head
from rlhf3d.parallel.layout import ParallelLayout, SpecStyle
from rlhf3d.parallel.platform import CPUPlatform, CUDAPlatform
from rlhf3d.planning.activations import Activations, Micro
from rlhf3d.planning.hardware import Cluster
from rlhf3d.units import ceil_div


@dataclass(frozen=True)
class Model:
    """One model in the processes of its worker group."""

    role: str
    """actor, critic, ref or reward."""
    spec: ModelSpec
    head: Head
    group: WorkerGroup
    batching: UpdatePlan
    """Batches of its update; of the reference, whose passes are cut the same way, the actor's."""
    trained: bool
    entropy: bool = False

    @property
    def layout(self) -> ParallelLayout:
        """Its ranks."""
        return self.group.layout

    @property
    def settings(self) -> LayoutConfig:
        """The settings of its layout."""
        return self.group.layout_config


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of the sequences that the time is planned for, tokens.

    Memory is planned for the longest.
    """

    prompt: float
    """Of the first turn."""
    response: float
    """All after it, of every author."""
    padded: float | None = None
    """Positions of a sequence in a micro-batch; None: by its rule and the order of lengths."""
    turns: float = 1.0
    """Turns of the policy in a trajectory."""
    observed: float = 0.0
    """Those of the response that the environment and the template wrote."""
    environment_s: float = 0.0
    """Seconds of one call of an environment."""
    longest_call_s: float | None = None
    """Seconds of the longest call in a batch; None: as long as the others."""

    @property
    def total(self) -> float:
        """Of prompt and response."""
        return self.prompt + self.response

    @property
    def slowest_call_s(self) -> float:
        """Seconds of the longest call in a batch."""
        return self.environment_s if self.longest_call_s is None else self.longest_call_s

    @property
    def sampled(self) -> float:
        """Those of the response that the policy wrote."""
        return self.response - self.observed


def mean_lengths(
    data: DataConfig,
    environment: EnvironmentConfig,
    prompt: float | None = None,
    response: float | None = None,
    turns: float | None = None,
    observation: float | None = None,
    environment_s: float = 0.0,
    longest_call_s: float | None = None,
) -> Lengths:
    """Lengths of a run; what is not known is the middle of what the configuration allows.

    Of observations: of the longest one, and at most half of the response. ValueError where a
    trajectory has no room for them.
    """
    prompt = data.max_prompt_length / 2 if prompt is None else prompt
    response = data.max_response_length / 2 if response is None else response
    if not environment.enabled:
        return Lengths(prompt, response)
    turns = (1 + environment.max_turns) / 2 if turns is None else turns
    if observation is None:
        longest = environment.max_observation_tokens or data.max_response_length
        observed = min((turns - 1) * longest / 2, response / 2)
    else:
        observed = (turns - 1) * observation
    if observed >= response:
        raise ValueError(
            f"--observation-tokens {observation:g} x ({turns:g} - 1) turns = {observed:g}: of the "
            f"{response:g} tokens after the prompt (--response-tokens) none would be the policy's"
        )
    if longest_call_s is not None and longest_call_s < environment_s:
        raise ValueError(
            f"--longest-environment-seconds {longest_call_s:g}: below the mean, "
            f"--environment-seconds {environment_s:g}"
        )
    return Lengths(prompt, response, None, turns, observed, environment_s, longest_call_s)


class Devices(NamedTuple):
    """Consecutive devices (on CPU: processes) whose training ranks are of the same stages."""

    numbers: range
    ranks: tuple[tuple[WorkerGroup, int], ...]
    """The ranks (group, number) on the first of them."""
    with_engine: bool
    """Whether each has an engine's rank as well."""


def _shared_devices(groups: list[WorkerGroup], first: int, with_engine: int) -> list[Devices]:
    """The devices from number `first` on that these groups share.

    All have a rank of the first group, `with_engine` of them an engine's rank.
    """
    total = groups[0].layout.world_size
    # Where a stage of any group ends, or the engines do, other ranks follow.
    cuts = {with_engine}
    for group in groups:
        cuts.update(range(0, group.layout.world_size + 1, group.layout.stage_size))
    found = []
    for start, stop in pairwise(sorted(cut for cut in cuts if cut <= total)):
        ranks = tuple((group, start) for group in groups if start < group.layout.world_size)
        found.append(Devices(range(first + start, first + stop), ranks, start < with_engine))
    return found


@dataclass(frozen=True)
class Job:
    """One run to be planned."""

    config: Config
    """With dtypes resolved."""
    spec: ModelSpec
    cluster: Cluster
    models: tuple[Model, ...]
    derived: Derived
    lengths: Lengths

    @property
    def style(self) -> SpecStyle:
        """Whose layers the platform builds."""
        return "te" if self.cluster.hardware.kind == "cuda" else "local"

    @property
    def on_gpu(self) -> bool:
        """Whether each rank has a device of its own."""
        return self.cluster.hardware.kind == "cuda"

    @property
    def sync_bucket_bytes(self) -> int:
        """A bucket of a weight sync."""
        platform = CUDAPlatform if self.on_gpu else CPUPlatform
        return (self.config.rollout.sync_bucket_mib or platform.sync_bucket_mib) << 20

    @property
    def colocated(self) -> bool:
        """Whether engines share devices with training ranks."""
        return self.config.rollout.placement == "colocated"

    @cached_property
    def devices(self) -> tuple[Devices, ...]:
        """Training ranks by device, in the order of devices; dedicated engines come after."""
        actor, *others = self.derived.groups
        # On CPU every rank is a process of its own, whatever its placement.
        sharing = [group for group in others if group.colocated and self.on_gpu]
        with_engine = self.engine_ranks if self.on_gpu and self.colocated else 0
        devices = _shared_devices([actor, *sharing], 0, with_engine)
        for group in others:
            if group not in sharing:
                devices += _shared_devices([group], devices[-1].numbers.stop, 0)
        return tuple(devices)

    @property
    def training_devices(self) -> int:
        """Devices (on CPU: processes) with training ranks."""
        return self.devices[-1].numbers.stop

    @property
    def engine_ranks(self) -> int:
        """Processes that serve."""
        return self.derived.engine_ranks

    @property
    def devices_needed(self) -> int:
        """Devices of the run."""
        return max(self.derived.devices, self.engine_ranks)

    def model(self, role: str) -> Model | None:
        """The model of a role, if it is placed."""
        return next((model for model in self.models if model.role == role), None)

    def has_pass(self, model: Model) -> bool:
        """Whether a step has a pass of the model without gradients, besides its update."""
        return model.role != "actor" or self.derived.old_logprobs_from == "phase"

    def longest(self, model: Model) -> Micro:
        """A micro-batch of the longest sequences there can be: what memory is planned for."""
        data, rule = self.config.data, model.batching.micro_batching
        prompt, response = data.max_prompt_length, data.max_response_length
        width = rule.width(prompt + response)
        if rule.tokens is None:
            rows = rule.rows
            positions = rule.positions([prompt + response] * rows)
        else:
            # A width or packed total is a multiple too: the rest of the budget stays unused.
            positions = rule.tokens // rule.multiple_of * rule.multiple_of
            rows = max(1, positions // width)
            positions = positions if rule.packed else rows * width
        # The head is applied to responses alone, this share of the positions of full rows.
        answers = response
        if rule.share_prefixes and rule.tokens is not None:
            answers *= self.config.rollout.n  # to one prompt
        responses = min(positions, ceil_div(positions * answers, prompt + answers))
        return Micro(positions, positions if rule.packed else width, responses)

    def micro_batches(self, model: Model) -> int:
        """Return the passes of one data-parallel rank per optimizer step.

        With a token budget, for the mean lengths.
        """
        plan = model.batching
        if plan.micro_batches_per_rank is not None:
            return max(1, plan.micro_batches_per_rank)
        assert plan.micro_batching.tokens is not None
        tokens = plan.sequences_per_mini_batch / model.layout.dp * self.lengths.total
        # Megatron's interleaved schedule wants a multiple of the stages.
        least = model.layout.pp if model.layout.vpp > 1 else 1
        return max(least, ceil_div(int(tokens), plan.micro_batching.tokens))

    def activations(self, model: Model, micro: Micro) -> Activations:
        """The passes of a model over a micro-batch."""
        return Activations(
            model.spec,
            model.layout,
            model.head,
            self.config.model.dtype,
            self.style,
            model.settings.sequence_parallel and model.layout.tp > 1,
            model.settings.recompute if model.trained else "none",
            model.entropy,
            micro,
        )


def make_job(
    config: Config,
    spec: ModelSpec,
    cluster: Cluster,
    rows: int | None = None,
    lengths: Lengths | None = None,
) -> Job:
    """The job of a checked configuration on `cluster`; `rows` of training data for a run in epochs.

    Of a reward model its config.json is read. Raises ValueError as `load_spec` does.
    """
    platform = CUDAPlatform if cluster.hardware.kind == "cuda" else CPUPlatform
    config = resolve_platform(config, platform(reason="plan"))
    derived = derive(config, rows)
    models = []
    for group in derived.groups:
        for role in group.roles:
            update = derived.critic if role == "critic" else derived.actor
            assert update is not None
            if role == "reward":
                update = _scoring(derived, micro_batching_of(config, role), group.layout.dp)
            entropy = role == "actor" and config.actor.entropy_coeff != 0
            of = _reward_spec(group.model) if role == "reward" else spec
            head: Head = "value" if role in ("critic", "reward") else "lm"
            models.append(
                Model(role, of, head, group, update, role in ("actor", "critic"), entropy)
            )
    lengths = lengths or mean_lengths(config.data, config.environment)
    return Job(config, spec, cluster, tuple(models), derived, lengths)


def _scoring(derived: Derived, rule: MicroBatching, dp: int) -> UpdatePlan:
    """How the passes of a reward model are cut, as if they were those of an update."""
    # It scores the batch of a step in one pass: it has no mini-batches.
    passes = max(1, derived.sequences_per_step // dp // rule.rows)
    return replace(derived.actor, micro_batching=rule, micro_batches_per_rank=passes)


@cache
def _reward_spec(folder: str) -> ModelSpec:
    try:
        return load_spec(folder, with_weights=False)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path", "reward_model.path", 1)) from error

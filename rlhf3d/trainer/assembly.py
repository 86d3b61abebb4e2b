"""Connects what a run has read and started to what its loop uses.

Invariant: each component gets its section of the configuration; only here are they all known.
Runs in: driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from rlhf3d.algorithms.advantages import needs_greedy_baseline
from rlhf3d.algorithms.losses import PolicyLossSettings
from rlhf3d.algorithms.objectives import Objective, PolicyObjective, ValueObjective
from rlhf3d.config.derived import Derived, clip_range
from rlhf3d.config.groups import TRAINABLE
from rlhf3d.config.schema import ActorConfig, Config
from rlhf3d.experience.ahead import Ahead
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.environment_runner import EnvironmentRunner
from rlhf3d.experience.environments import start_environments
from rlhf3d.experience.in_flight import InFlight, InFlightSettings
from rlhf3d.experience.source import (
    Draws,
    DynamicSampling,
    ExperienceSource,
    OnPolicy,
    OnPolicySettings,
)
from rlhf3d.experience.steps import Patience, Phase, untimed
from rlhf3d.parallel.platform import Platform
from rlhf3d.placement.journal import JournalWriter
from rlhf3d.placement.script import Script
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.rewards.make import environment_part, model_part
from rlhf3d.rewards.manager import RewardManager
from rlhf3d.rollout.api import Engines, SamplingSettings
from rlhf3d.rollout.desk import Desks
from rlhf3d.tokenizer.load import load_tokenizer
from rlhf3d.trainer.best import BestTracker
from rlhf3d.trainer.canary import Canary, canary_tokens
from rlhf3d.trainer.checkpointing import CheckpointWriter
from rlhf3d.trainer.components import RunComponents
from rlhf3d.trainer.health import HealthMonitor
from rlhf3d.trainer.hf_export import HFExport
from rlhf3d.trainer.inputs import RunInputs
from rlhf3d.trainer.learner import Learner
from rlhf3d.trainer.preemption import PreemptionHandler
from rlhf3d.trainer.processes import Processes, start_processes
from rlhf3d.trainer.profiling import make_profiler
from rlhf3d.trainer.reward_model import RewardModel
from rlhf3d.trainer.step_log import StepLog
from rlhf3d.trainer.validation import Validation
from rlhf3d.trainer.weight_sync import WeightSync


@dataclass(frozen=True)
class Assembly:
    """What the components are made of."""

    config: Config
    derived: Derived
    inputs: RunInputs
    processes: Processes
    rewards: RewardManager
    log: StepLog
    runner: EnvironmentRunner | None = None
    """Where trajectories meet their environments."""
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def start(
        cls,
        stack: ExitStack,
        config: Config,
        derived: Derived,
        inputs: RunInputs,
        platform: Platform,
        rewards: RewardManager,
        log: StepLog,
        journal: JournalWriter,
        preemption: PreemptionHandler,
        script: Script | None = None,
    ) -> Assembly:
        """Start environments, then the processes of the models; `stack` ends them."""
        # Early: the process that environments are forked from should have little in it.
        runner = start_environments(
            stack,
            config.environment,
            config.data.max_prompt_length,
            config.data.overlong_prompts,
            inputs.tokenizer,
            inputs.ends.of_model,
            log.console.note,
        )
        phase = log.console.phase
        processes = start_processes(
            stack, config, derived, inputs, platform, preemption, phase, journal, script
        )
        return cls(config, derived, inputs, processes, rewards, log, runner)

    def components(self, stack: ExitStack, preemption: PreemptionHandler) -> RunComponents:
        """Make all of them; `stack` closes what they open."""
        # First, as sources and validation score with what `rewards` holds.
        if "reward" in self.processes.groups:
            self._add_reward_model(self.processes.groups["reward"])
        weights = self.weight_sync()
        desks = Desks(weights.engines)
        return RunComponents(
            source=self.source(weights, desks),
            learner=self.learner(weights),
            weights=weights,
            validation=self.validation(weights, desks),
            checkpoints=self.checkpoints(stack),
            best=BestTracker(self.config.trainer.best_metric),
            health=self.health(),
            log=self.log,
            preemption=preemption,
            script=self.processes.rollout.script,
            prepare=self.inputs.loader.prepare,
            profiler=make_profiler(
                self.config.trainer,
                self.processes.groups,
                self.processes.rollout,
                self.log.console,
            ),
        )

    def trained(self) -> dict[str, TrainGroup]:
        """The models that learn, and the groups that hold them."""
        groups = self.processes.groups
        return {role: groups[role] for role in TRAINABLE if role in groups}

    def source(self, weights: WeightSync, desks: Desks) -> ExperienceSource:
        """Experience of every step, made as far ahead as `rollout.max_staleness` says."""
        collector = self.collector(desks.open(), self.log.phase)
        draws = OnPolicy(
            self._draw_settings(), self.inputs.loader, collector, lambda: weights.served_version
        )
        source: ExperienceSource
        if self.config.rollout.update == "in_flight":
            source = self._in_flight(draws, collector, desks, weights)
        else:
            source = self._ahead(draws, weights)
        for group in self.processes.groups.values():
            group.meanwhile = source.go_on
        self.processes.rollout.meanwhile = source.go_on
        self.patience.meanwhile = source.go_on
        return source

    def _ahead(self, draws: OnPolicy, weights: WeightSync) -> Ahead:
        """One batch after the other, with dynamic sampling where configured."""
        dynamic, source = self.config.algorithm.filter_groups, cast(Draws, draws)
        if dynamic.enable:
            source = DynamicSampling(draws, dynamic, self.config.data.train_batch_size)
        return Ahead(
            source,
            weights.sync_weights,
            self.patience,
            self.log.phase,
            self.config.rollout.max_staleness,
            self.log.total_steps,
            self.inputs.train_data.of_row,
        )

    def _in_flight(
        self, draws: OnPolicy, collector: Collector, desks: Desks, weights: WeightSync
    ) -> InFlight:
        """Groups one by one, while weights change."""
        config, dynamic = self.config, self.config.algorithm.filter_groups
        batch = config.data.train_batch_size
        limit = dynamic.max_num_gen_batches * (config.data.gen_batch_size or batch)
        most = config.environment.max_concurrent if self.runner else None
        settings = InFlightSettings(
            groups=batch,
            trajectories=config.rollout.n + needs_greedy_baseline(config.algorithm.adv_estimator),
            staleness=config.rollout.max_staleness,
            last_step=self.log.total_steps,
            max_scoring_failures=config.reward.max_error_rate,
            max_environment_failures=config.environment.max_error_rate,
            max_trajectories=most,
        )
        if dynamic.enable:
            settings = replace(settings, metric=dynamic.metric, max_generated=limit)
        return InFlight(
            settings,
            draws,
            collector,
            desks,
            weights.sync_weights,
            lambda: weights.trained_version,
            lambda: weights.served_version,
            self.patience,
            self.log.phase,
            self.inputs.train_data.of_row,
            self.processes.rollout.script,
        )

    def _draw_settings(self) -> OnPolicySettings:
        rollout, algorithm = self.config.rollout, self.config.algorithm
        max_tokens = self.config.data.max_response_length
        return OnPolicySettings(
            n=rollout.n,
            sampling=SamplingSettings(
                rollout.temperature, rollout.top_p, rollout.top_k, max_tokens
            ),
            seed=self.config.trainer.seed,
            greedy_baseline=needs_greedy_baseline(algorithm.adv_estimator),
            overlong=self.config.reward.overlong_buffer,
        )

    def collector(self, engines: Engines, phase: Phase) -> Collector:
        """Asks the run's engines, environments and scorers."""
        return Collector(
            engines,
            self.rewards,
            self.inputs.tokenizer,
            phase,
            self.runner,
            environment_part(self.config.reward),
            self.patience,
        )

    def learner(self, weights: WeightSync) -> Learner:
        """The models and how they are updated."""
        algorithm, critic = self.config.algorithm, self.config.critic
        plans = {"actor": self.derived.actor}
        if self.derived.critic is not None:
            plans["critic"] = self.derived.critic
        old_from = self.derived.old_logprobs_from
        actor = policy_objective(self.config.actor, algorithm.custom_kwargs)
        objectives: dict[str, Objective] = {
            "actor": replace(actor, old_is_current=old_from == "update"),
            "critic": ValueObjective(critic.cliprange_value, critic.loss_agg_mode),
        }
        return Learner(
            algorithm,
            plans,
            self.processes.groups,
            objectives,
            old_from,
            self.config.trainer.critic_warmup,
            weights.weights_changed,
            self.log.phase,
        )

    def validation(self, weights: WeightSync, desks: Desks) -> Validation:
        """On the held-out prompts; its generation and scoring are one phase, `validate`."""
        # Without phases of its own: phases do not nest.
        collector = self.collector(desks.open(), untimed)
        return Validation(
            self.config.validation,
            self.inputs.val_data or (),
            self.config.data.max_response_length,
            self.config.trainer.seed,
            collector,
            weights,
            self.log,
        )

    def weight_sync(self) -> WeightSync:
        """From the actor to the engines; its canary is of held-out prompts where there are any."""
        config, rollout = self.config.rollout, self.processes.rollout
        actor = self.processes.groups["actor"]
        tokens = canary_tokens(self.inputs.val_data or self.inputs.train_data)
        canary = Canary(config, self.config.model.dtype, tokens, actor, rollout)
        return WeightSync(
            config,
            self.processes.sync,
            actor,
            rollout,
            canary,
            self.log.phase,
            self.log.console.note,
            self.patience,
        )

    def checkpoints(self, stack: ExitStack) -> CheckpointWriter:
        """Of the models that learn, with the actor as a Hugging Face folder."""
        model, processes = self.config.model, self.processes
        # What prompts were rendered with, even if the file has changed since.
        template = self.inputs.tokenizer.chat_template if model.chat_template else None
        actor, folder = processes.groups["actor"], Path(model.path)
        export = HFExport(processes.sync, model.dtype, actor, folder, template)
        stack.enter_context(closing(export))
        return CheckpointWriter(self.config, self.inputs.spec, self.trained(), export)

    def health(self) -> HealthMonitor:
        """Reports on the console."""
        trainer, note = self.config.trainer, self.log.console.note
        return HealthMonitor(note, trainer.on_nonfinite, trainer.grad_spike_factor)

    def _add_reward_model(self, group: TrainGroup) -> None:
        settings = self.config.reward_model
        assert settings.path is not None
        model = RewardModel(settings, group, load_tokenizer(settings.path))
        self.rewards.add_model(model, model_part(self.config.reward, settings))


def policy_objective(actor: ActorConfig, custom: Mapping[str, Any]) -> PolicyObjective:
    """What the actor's update minimizes; `custom`: the arguments of a user's own loss."""
    return PolicyObjective(
        loss_name=actor.policy_loss,
        settings=PolicyLossSettings(*clip_range(actor), actor.clip_ratio_c, custom),
        loss_agg_mode=actor.loss_agg_mode,
        entropy_coeff=actor.entropy_coeff,
        kl_loss_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_loss_type=actor.kl_loss_type,
    )

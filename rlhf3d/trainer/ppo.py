"""The loop: PPO and its relatives as a readable list of phases.

Invariant: the driver holds the rows of one step and nothing that grows with the model; every completion trained on
was written by the policy version that is being trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf3d.algorithms.advantages import AdvantageInputs, compute_advantages, needs_greedy_baseline
from rlhf3d.algorithms.kl import make_kl_controller
from rlhf3d.algorithms.losses import PolicyLossSettings
from rlhf3d.algorithms.objectives import PolicyObjective, ValueObjective
from rlhf3d.algorithms.rewards import apply_kl_penalty, overlong_penalty, token_level_rewards
from rlhf3d.batching.batch import Batch
from rlhf3d.checkpoints.writer import CheckpointWriter
from rlhf3d.config.derived import Derived, clip_range
from rlhf3d.config.schema import ActorConfig, Config
from rlhf3d.data.loader import Prompt, PromptLoader
from rlhf3d.evaluation.validation import validation_metrics
from rlhf3d.observability.console import Console
from rlhf3d.observability.metrics import MetricsWriter, PhaseTimer
from rlhf3d.observability.samples import Kind, write_samples
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.resharding.sync import WeightSync
from rlhf3d.rewards.items import decode, score_item
from rlhf3d.rewards.manager import RewardManager, ScoringBatch
from rlhf3d.rewards.score import Score, check_outcomes
from rlhf3d.rollout.api import Completion, Request, SamplingSettings
from rlhf3d.trainer.best import Best
from rlhf3d.trainer.correction import correct, settings_of
from rlhf3d.trainer.dynamic_sampling import TooFewGroups, fill_with_signal
from rlhf3d.trainer.experience import (
    Experience,
    Scored,
    group_ids,
    make_experience,
    make_requests,
)
from rlhf3d.trainer.metrics import rollout_metrics, throughput_metrics, training_metrics
from rlhf3d.trainer.stopping import Stopping
from rlhf3d.trainer.watch import Watch


@dataclass(frozen=True)
class Parts:
    """What a run is made of; built by `run.py`, used by the loop."""

    config: Config
    derived: Derived
    total_steps: int
    tokenizer: Any
    train: TrainGroup
    """Actor and reference."""
    critic: TrainGroup
    """The same group, or the critic's own."""
    rollout: RolloutGroup
    sync: WeightSync
    scoring: RewardManager
    loader: PromptLoader
    val: Sequence[Prompt]
    console: Console
    metrics: MetricsWriter
    checkpoints: CheckpointWriter
    stopping: Stopping


class PPOTrainer:
    """Runs the loop over its parts."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config = parts.config
        self.timer = PhaseTimer()
        kl = parts.config.algorithm.kl_ctrl
        self.kl_controller = make_kl_controller(kl.type, kl.kl_coef, kl.target_kl, kl.horizon)
        actor, critic = parts.config.actor, parts.config.critic
        self.policy_objective = policy_objective(actor, parts.config.algorithm.custom_kwargs)
        self.value_objective = ValueObjective(critic.cliprange_value, critic.loss_agg_mode)
        self.correction = settings_of(parts.config.algorithm.rollout_correction)
        trainer = parts.config.trainer
        self.watch = Watch(parts.console.note, trainer.on_nonfinite, trainer.grad_spike_factor)
        self.best = Best(trainer.best_metric)
        self.step = 0

    def fit(self) -> str | None:
        """Train to the last step, validating and saving on their frequencies; why it stopped before, if it did."""
        trainer, total = self.config.trainer, self.parts.total_steps
        if trainer.val_before_train and self.step == 0 and self.parts.val:
            self._record(0, self.validate(0))
        metrics: dict[str, float] = {}
        while self.step < total:
            self.step += 1
            try:
                metrics = {**self.train_step(self.step), **self.parts.checkpoints.poll()}
            except TooFewGroups:
                self._save_before(metrics)
                raise
            last = self.step == total
            if last or (self._due(trainer.test_freq) and not self._stop()):
                metrics |= self.validate(self.step)
            stop = None if last else self._stop()
            try:
                if stop or (last and trainer.save_at_end) or self._due(trainer.save_freq):
                    metrics |= self.save_checkpoint(metrics, ends=last or stop is not None)
            finally:  # a failed save must not take the step's figures with it
                self._record(self.step, metrics)
            self.parts.stopping.step_ended()
            if stop:
                return stop
        self.parts.checkpoints.finish()
        return None

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _stop(self) -> str | None:
        return self.parts.stopping.reason(self.parts.checkpoints.save_s)

    def train_step(self, step: int) -> dict[str, float]:
        """One step of the algorithm; its metrics."""
        metrics = self.sync_weights()
        scored, sampling_metrics = self.sample(step)
        batch = scored.experience.batch(pad_id=0)
        batch = self.old_logprobs(batch)
        batch = self.ref_logprobs(batch)
        batch = self.values(batch)
        batch, kl_metrics = self.advantages(batch, scored)
        self.watch.batch(step, batch)
        metrics |= self.update_critic(batch)
        metrics |= self.update_actor(batch, step)
        metrics |= self.watch.update(step, metrics)
        return {
            **metrics,
            **kl_metrics,
            **rollout_metrics(
                scored,
                self.config.rollout.n,
                self.config.reward.overlong_buffer.enable,
                self.config.data.max_response_length,
            ),
            **training_metrics(batch),
            **sampling_metrics,
        }

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with self.timer.phase(name), self.parts.console.phase(name):
            yield

    def sync_weights(self) -> dict[str, float]:
        """Give the engines the newest weights, when they lack them."""
        if not self.parts.sync.needed:
            return {}
        with self._phase("sync_weights"):
            return self.parts.sync.run()

    def sample(self, step: int) -> tuple[Scored, dict[str, float]]:
        """The step's scored completions: one draw, or with dynamic sampling until enough groups have signal."""
        groups, n, seen = self.config.algorithm.filter_groups, self.config.rollout.n, Counter[int]()
        metrics: dict[str, float] = {}
        if groups.enable:
            scored, metrics = fill_with_signal(
                lambda: self.score(*self.generate(step, seen)),
                self.config.data.train_batch_size,
                n,
                groups.metric,
                groups.max_num_gen_batches,
            )
        else:
            scored = self.score(*self.generate(step, seen))
        self.rest_engines()
        write_samples(
            self.config.trainer.output_dir, step, scored.experience.samples(scored.scores)
        )
        self.watch.scores(step, scored, n)
        return scored, metrics

    def rest_engines(self) -> None:
        """Leave the engines' memory to the updates, where the configuration says so."""
        if self.config.rollout.sleep:
            self.parts.rollout.sleep()
            self.parts.sync.weights_lost()

    def generate(self, step: int, seen: Counter[int]) -> tuple[Experience, ScoringBatch]:
        """Sample `rollout.n` completions of each of the next prompts; for ReMax also a greedy one.

        `seen` counts the prompts of the step, see `make_requests`. Completions go to be scored as they finish.
        """
        rollout, trainer, tokens = (
            self.config.rollout,
            self.config.trainer,
            self.config.data.max_response_length,
        )
        baseline = needs_greedy_baseline(self.config.algorithm.adv_estimator)
        with self._phase("generate"):
            prompts = self.parts.loader.next_batch()
            sampling = SamplingSettings(
                rollout.temperature, rollout.top_p, rollout.top_k, tokens, greedy=False
            )
            requests = make_requests(prompts, rollout.n, trainer.seed, step, seen)
            scoring = self.parts.scoring.start(len(requests) + (len(prompts) if baseline else 0))
            experience = self._complete("generate", prompts, requests, sampling, scoring)
            if baseline:
                greedy = SamplingSettings(1.0, 1.0, -1, tokens, greedy=True)
                requests = make_requests(prompts, 1, trainer.seed, step)
                answers = self._complete(
                    "generate", prompts, requests, greedy, scoring, len(experience.completions)
                )
                experience = replace(experience, greedy=answers)
            return experience, scoring

    def _complete(
        self,
        phase: str,
        prompts: list[Prompt],
        requests: list[Request],
        sampling: SamplingSettings,
        scoring: ScoringBatch,
        first: int = 0,
    ) -> Experience:
        """Completions of the requests, each given to `scoring` when it is there, under numbers from `first` on."""
        completions: dict[int, Completion] = {}
        texts: dict[int, str] = {}
        n = len(requests) // len(prompts)
        for part in self.parts.rollout.stream(phase, requests, sampling):
            stale = {c.policy_version for c in part.values()} - {self.parts.sync.trained_version}
            assert not stale, (
                f"completions of policies {stale} in a step of {self.parts.sync.trained_version}"
            )
            decoded = decode(part, self.parts.tokenizer)
            scoring.add(
                {first + row: score_item(prompts[row // n], text) for row, text in decoded.items()}
            )
            completions |= part
            texts |= decoded
        return make_experience(prompts, completions, texts)

    def score(self, experience: Experience, scoring: ScoringBatch) -> Scored:
        """Score every completion; too many errors stop the run."""
        with self._phase("score"):
            greedy = experience.greedy
            scores = scoring.finish()
            check_outcomes(scores, self.config.reward.max_error_rate)
            sampled = scores[: len(experience.completions)]
            if greedy is None:
                return Scored(experience, sampled, self._rewards(experience, sampled))
            baseline = self._rewards(greedy, scores[len(sampled) :]).repeat_interleave(
                self.config.rollout.n
            )
            return Scored(experience, sampled, self._rewards(experience, sampled), baseline)

    def _rewards(self, experience: Experience, scores: list[Score]) -> Tensor:
        """[N] scores, and the penalty on overlong responses."""
        rewards = torch.tensor([s.value for s in scores], dtype=torch.float32)
        buffer = self.config.reward.overlong_buffer
        if not buffer.enable:
            return rewards
        lengths = torch.tensor([len(c.token_ids) for c in experience.completions])
        return rewards + overlong_penalty(
            lengths, self.config.data.max_response_length, buffer.len, buffer.penalty_factor
        )

    def old_logprobs(self, batch: Batch) -> Batch:
        """The actor's log-probs before its update; with two policies, the engine's."""
        if self.config.algorithm.rollout_correction.bypass_mode:
            return batch.with_columns(old_logprobs=batch["rollout_logprobs"])
        with self._phase("old_logprobs"):
            return batch.with_columns(
                old_logprobs=self.parts.train.forward("old_logprobs", "actor", batch)["logprobs"]
            )

    def ref_logprobs(self, batch: Batch) -> Batch:
        """The reference's log-probs, where a KL term uses them."""
        if not self.config.needs_reference:
            return batch
        with self._phase("ref_logprobs"):
            return batch.with_columns(
                ref_logprobs=self.parts.train.forward("ref_logprobs", "ref", batch)["logprobs"]
            )

    def values(self, batch: Batch) -> Batch:
        """The critic's values, where the advantage estimator uses them."""
        if not self.config.needs_critic:
            return batch
        with self._phase("values"):
            return batch.with_columns(
                values=self.parts.critic.forward("values", "critic", batch)["values"]
            )

    def advantages(self, batch: Batch, scored: Scored) -> tuple[Batch, dict[str, float]]:
        """Token rewards, KL penalty, advantages and returns."""
        algorithm, metrics = self.config.algorithm, {}
        with self._phase("advantages"):
            mask = batch["response_mask"]
            rewards = token_level_rewards(scored.rewards, mask)
            if algorithm.use_kl_in_reward:
                coef = self.kl_controller.value
                rewards, mean_kl = apply_kl_penalty(
                    rewards,
                    batch["old_logprobs"],
                    batch["ref_logprobs"],
                    mask,
                    coef,
                    algorithm.kl_penalty,
                )
                self.kl_controller.update(mean_kl, len(batch))
                metrics = {
                    "actor/reward_kl_penalty": mean_kl,
                    "actor/reward_kl_penalty_coeff": coef,
                }
            advantages, returns = compute_advantages(
                algorithm.adv_estimator,
                AdvantageInputs(
                    token_level_rewards=rewards,
                    response_mask=mask,
                    group_ids=group_ids(scored.experience, self.config.rollout.n),
                    values=batch.columns.get("values"),
                    greedy_scores=scored.greedy_rewards,
                    gamma=algorithm.gamma,
                    lam=algorithm.lam,
                    norm_by_std=algorithm.norm_adv_by_std_in_grpo,
                    custom=algorithm.custom_kwargs,
                ),
            )
            batch = batch.with_columns(
                token_level_rewards=rewards, advantages=advantages, returns=returns
            )
            return batch, metrics

    def update_critic(self, batch: Batch) -> dict[str, float]:
        """Regress the critic on the returns."""
        plan = self.parts.derived.critic
        if plan is None:
            return {}
        with self._phase("update_critic"):
            return self.parts.critic.update("critic", batch, plan, self.value_objective)

    def update_actor(self, batch: Batch, step: int) -> dict[str, float]:
        """PPO epochs on the actor, once the critic is warm, corrected for the engine's mismatch."""
        if step <= self.config.trainer.critic_warmup:
            return {}
        with self._phase("update_actor"):
            metrics: dict[str, float] = {}
            if not self.config.algorithm.rollout_correction.bypass_mode:
                batch, metrics = correct(batch, self.correction, self.parts.derived.actor)
            plan = self.parts.derived.actor
            metrics |= self.parts.train.update("actor", batch, plan, self.policy_objective)
            self.parts.sync.weights_changed()
            return metrics

    def validate(self, step: int) -> dict[str, float]:
        """Held-out accuracy of the newest weights, greedy and sampled as the config asks; nothing without prompts."""
        if not self.parts.val:
            return {}
        settings, tokens = self.config.validation, self.config.data.max_response_length
        metrics = self.sync_weights()
        with self._phase("validate"):
            if settings.greedy:
                greedy = SamplingSettings(1.0, 1.0, -1, tokens, greedy=True)
                metrics |= self._accuracy(step, "greedy", greedy, n=1)
            if settings.sampled_n:
                sampled = SamplingSettings(settings.temperature, 1.0, -1, tokens, greedy=False)
                metrics |= self._accuracy(step, "sampled", sampled, settings.sampled_n)
        self.rest_engines()
        self.parts.console.validation(f"step {step}", metrics)
        self.best.see(step, metrics)
        return metrics

    def _accuracy(
        self, step: int, kind: Kind, sampling: SamplingSettings, n: int
    ) -> dict[str, float]:
        """Accuracy by data source, as `val-core/<source>/acc/<kind>`, with its interval, pass@k and maj@k."""
        prompts: list[Prompt] = list(self.parts.val)
        # A fixed step number: the same seeds at every validation, so that points differ by the policy alone.
        requests = make_requests(prompts, n, self.config.trainer.seed, step=0)
        scoring = self.parts.scoring.start(len(requests))
        experience = self._complete("validate", prompts, requests, sampling, scoring)
        scores = scoring.finish()
        check_outcomes(scores, self.config.reward.max_error_rate)
        write_samples(self.config.trainer.output_dir, step, experience.samples(scores), kind)
        return validation_metrics([p.data_source for p in experience.prompts], scores, n, kind)

    def save_checkpoint(self, metrics: dict[str, float], ends: bool) -> dict[str, float]:
        """Save all that a resume needs, `metrics` being the step's so far; with `ends` wait until it is whole."""
        with self._phase("save_checkpoint"):
            wanted = self.config.trainer.save_hf
            export = wanted == "always" or (
                wanted == "last" and self.step == self.parts.total_steps
            )
            metric = self.best.of(metrics)
            return self.parts.checkpoints.save(
                self.step, self.state_dict(metrics), metric, export, wait=ends
            )

    def state_dict(self, metrics: dict[str, float]) -> dict[str, Any]:
        """The driver's state after a step, as JSON."""
        return {
            "loader": self.parts.loader.state_dict(),
            "kl_controller": self.kl_controller.state_dict(),
            "watch": self.watch.state_dict(),
            "best": self.best.state_dict(),
            "metrics": metrics,
        }

    def load_state_dict(self, state: dict[str, Any], policy_version: int) -> None:
        """Go on after the step that `state` is of."""
        self.step = state["step"]
        self.parts.loader.load_state_dict(state["loader"])
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.watch.load_state_dict(state["watch"])
        self.best.load_state_dict(state["best"])
        self.parts.sync.trained_version = policy_version

    def _save_before(self, metrics: dict[str, float]) -> None:
        """Keep the step before one that cannot be taken, whose figures these are, unless it is saved already."""
        self.step -= 1
        self.rest_engines()
        if (
            metrics
            and self.config.trainer.save_at_end
            and not self._due(self.config.trainer.save_freq)
        ):
            self.save_checkpoint(metrics, ends=True)
            self.parts.console.note(f"step {self.step} is saved: {self.parts.checkpoints.last}")

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        metrics |= self.timer.pop()
        if step:
            metrics |= throughput_metrics(metrics, self.parts.derived.devices)
            self.parts.console.step(metrics, step, self.parts.total_steps)
        self.parts.metrics.write(step, metrics)


def policy_objective(actor: ActorConfig, custom: Mapping[str, Any]) -> PolicyObjective:
    """What the actor's update minimizes; `custom` are the arguments of a user's own loss."""
    return PolicyObjective(
        loss_name=actor.policy_loss,
        settings=PolicyLossSettings(*clip_range(actor), actor.clip_ratio_c, custom),
        loss_agg_mode=actor.loss_agg_mode,
        entropy_coeff=actor.entropy_coeff,
        kl_loss_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_loss_type=actor.kl_loss_type,
    )

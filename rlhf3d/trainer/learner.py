"""From scored trajectories to new weights: the phases `old_logprobs` to `update_actor`.

Invariant: a step is a function of the batch alone. Each phase adds columns to the batch; engines,
prompts and texts are not known here. Shapes: T trajectories, which are N rows of the batch.
Runs in: driver; the ranks of the worker groups compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from rlhf3d.algorithms.advantages import AdvantageInputs, compute_advantages
from rlhf3d.algorithms.kl import make_kl_controller
from rlhf3d.algorithms.objectives import Objective
from rlhf3d.algorithms.rewards import apply_kl_penalty, token_level_rewards
from rlhf3d.algorithms.trajectories import first_rows, join_rows, row_places, split_rows, sum_rows
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.micro import UpdatePlan
from rlhf3d.config.derived import OldLogprobs
from rlhf3d.config.schema import AlgorithmConfig
from rlhf3d.experience.steps import Phase
from rlhf3d.placement.train_group import TrainGroup
from rlhf3d.trainer.aside import Aside
from rlhf3d.trainer.correction import correct, mismatch, settings_of

_BY_TOKEN = ("response_mask", "turn_rewards", "old_logprobs", "ref_logprobs", "values")
"""Columns [N, R] that advantages are made of."""


class Learner:
    """Holds the worker groups of the models, and the KL controller."""

    def __init__(
        self,
        config: AlgorithmConfig,
        plans: Mapping[str, UpdatePlan],
        groups: Mapping[str, TrainGroup],
        objectives: Mapping[str, Objective],
        old_from: OldLogprobs,
        critic_warmup: int,
        weights_changed: Callable[[], None],
        phase: Phase,
    ) -> None:
        """`groups`: by role (actor, ref, critic), only the roles that the run has.

        Roles may share a group: the reference always is in the actor's, the critic is unless it has
        a layout of its own. `plans`, `objectives`: by role that learns. `old_from`: see
        `old_logprobs_from`. `weights_changed` is called after each update of the actor.
        """
        self._config, self._groups = config, groups
        self._plans, self._objectives = plans, objectives
        self._old_from, self._critic_warmup = old_from, critic_warmup
        self._weights_changed, self._phase = weights_changed, phase
        kl = config.kl_ctrl
        self._kl_controller = make_kl_controller(kl.type, kl.kl_coef, kl.target_kl, kl.horizon)
        self._correction = settings_of(config.rollout_correction)

    def old_logprobs(self, batch: Batch) -> Batch:
        """Add the actor's log-probs before its update, unless the update itself will give them.

        In bypass mode those are the engine's.
        """
        if self._old_from == "update":
            return batch
        if self._old_from == "engine":
            # The same tensor object, by which `training_metrics` recognizes bypass mode.
            return batch.with_columns(old_logprobs=batch["rollout_logprobs"])
        outputs = self._forward("old_logprobs", "actor", batch)
        return batch.with_columns(old_logprobs=outputs["logprobs"])

    def ref_logprobs(self, batch: Batch) -> Batch:
        """Add the reference's log-probs, where a KL term uses them."""
        if "ref" not in self._groups:
            return batch
        outputs = self._forward("ref_logprobs", "ref", batch)
        return batch.with_columns(ref_logprobs=outputs["logprobs"])

    def values(self, batch: Batch) -> Batch:
        """Add the critic's values, where the advantage estimator uses them."""
        if "critic" not in self._groups:
            return batch
        outputs = self._forward("values", "critic", batch)
        return batch.with_columns(values=outputs["values"])

    def advantages(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """Add token rewards with KL penalty, advantages and returns; metrics of the penalty."""
        config = self._config
        with self._phase("advantages"):
            # Rows are joined to one per trajectory, so that estimators see no rows.
            places = row_places(batch.columns)
            columns = {name: join_rows(batch[name], places) for name in _BY_TOKEN if name in batch}
            ends = sum_rows(batch["rewards"], places)
            rewards, metrics = self._token_rewards(ends, columns)
            greedy = batch.columns.get("greedy_rewards")
            inputs = AdvantageInputs(
                token_level_rewards=rewards,
                response_mask=columns["response_mask"],
                group_ids=first_rows(batch["group_ids"], places),
                turn_rewards=columns.get("turn_rewards"),
                values=columns.get("values"),
                greedy_scores=None if greedy is None else first_rows(greedy, places),
                gamma=config.gamma,
                lam=config.lam,
                norm_by_std=config.norm_adv_by_std_in_grpo,
                custom=config.custom_kwargs,
            )
            advantages, returns = compute_advantages(config.adv_estimator, inputs)
            batch = batch.with_columns(
                token_level_rewards=split_rows(rewards, places),
                advantages=split_rows(advantages, places),
                returns=split_rows(returns, places),
            )
            return batch, metrics

    def _token_rewards(
        self, ends: Tensor, columns: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Rewards [T, R'] with the KL penalty, and its metrics.

        `ends` [T] are rewards of trajectories' ends, `columns` [T, R'] as `_BY_TOKEN` lists them.
        """
        config, mask = self._config, columns["response_mask"]
        # [T] to [T, R']: the end's reward is on the trajectory's last sampled token.
        rewards = token_level_rewards(ends, mask, columns.get("turn_rewards"))
        if not config.use_kl_in_reward:
            return rewards, {}
        coef = self._kl_controller.value
        old, ref = columns["old_logprobs"], columns["ref_logprobs"]
        rewards, mean_kl = apply_kl_penalty(rewards, old, ref, mask, coef, config.kl_penalty)
        # After use, as in verl: this step's KL sets the next step's coefficient.
        self._kl_controller.update(mean_kl, len(mask))
        return rewards, {
            "actor/reward_kl_penalty": mean_kl,
            "actor/reward_kl_penalty_coeff": coef,
        }

    def update_critic(self, batch: Batch) -> dict[str, float]:
        """Regress the critic on the returns."""
        if "critic" not in self._groups:
            return {}
        with self._phase("update_critic"):
            metrics, _ = self._update("critic", batch)
            return metrics

    def update_actor(self, batch: Batch, step: int, aside: Aside) -> tuple[Batch, dict[str, float]]:
        """PPO epochs on the actor, once the critic is warm, corrected for the engine's mismatch.

        Return the batch, with old log-probs wherever they come from, and metrics, of which `aside`
        works some out.
        """
        # The policy stays the same version: `weights_changed` is not called.
        if step <= self._critic_warmup:
            return batch, {}
        with self._phase("update_actor"):
            # In bypass mode the engine's log-probs are π_old: there is no mismatch to correct.
            corrects = self._old_from == "phase"
            measured = aside.start(mismatch, batch) if corrects else dict
            # The update's alone: the step's metrics are of all response tokens.
            corrected, metrics = batch, dict[str, float]()
            if corrects:
                corrected, metrics = correct(batch, self._correction, self._plans["actor"])
            updated, logprobs = self._update("actor", corrected)
            if logprobs is not None:
                batch = batch.with_columns(old_logprobs=logprobs)
                measured = aside.start(mismatch, batch)
            self._weights_changed()
            return batch, measured() | metrics | updated

    def memory(self) -> dict[str, float]:
        """The most memory that any training rank has had so far."""
        # Roles share groups: each is asked once.
        groups = {id(group): group for group in self._groups.values()}
        return {"perf/rank_memory_gib": max(group.peak_gib() for group in groups.values())}

    def _forward(self, phase: str, role: str, batch: Batch) -> Mapping[str, Any]:
        """Response-aligned outputs [N, R] of a role, computed without gradients."""
        with self._phase(phase):
            return self._groups[role].forward(phase, role, batch)

    def _update(self, role: str, batch: Batch) -> tuple[dict[str, float], Tensor | None]:
        plan, objective = self._plans[role], self._objectives[role]
        return self._groups[role].update(role, batch, plan, objective)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep besides the models, as JSON."""
        return {"kl_controller": self._kl_controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._kl_controller.load_state_dict(state["kl_controller"])

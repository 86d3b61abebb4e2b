"""The loop: PPO and its relatives as a readable list of phases.

Invariant: the driver holds the rows of one step and nothing that grows with the model; validation
and checkpoints come between two steps.
Runs in: driver.
"""

from __future__ import annotations

from rlhf3d.config.schema import Config
from rlhf3d.trainer.components import RunComponents
from rlhf3d.trainer.step_figures import StepAside, StepFigures


class Trainer:
    """Runs the steps."""

    def __init__(self, config: Config, components: RunComponents) -> None:
        self.config, self.run = config.trainer, components
        self._figures = StepFigures(
            components.log,
            overlong=config.reward.overlong_buffer.enable,
            max_response_length=config.data.max_response_length,
            off_policy=config.rollout.max_staleness > 0,
        )
        self.total_steps = components.log.total_steps
        self.step = 0
        """The last one that is complete."""

    def fit(self) -> str | None:
        """Train to the last step, validating and saving between; why it stopped early, if so."""
        run, config = self.run, self.config
        if self.step == 0 and config.val_before_train and (metrics := run.validate(0)):
            run.log.record(0, metrics)
        # Of the last step: what is saved if the next one gets no experience.
        metrics = {}
        while self.step < self.total_steps:
            if run.script is not None:
                run.script.trajectories(self.step + 1)  # ends the repeated run
            unsaved = config.save_at_end and not self._due(config.save_freq)
            profile = run.profiler.step(self.step + 1)
            with run.saved_if_it_fails(self.step, metrics, unsaved), profile:
                # A save in the background that is written by now is completed after the step.
                metrics = self.train_step(self.step + 1) | run.checkpoints.poll()
            self.step += 1
            last = self.step == self.total_steps
            try:
                # A run that must stop leaves it out: its time may be needed for the save.
                if last or (self._due(config.test_freq) and not self._stop_reason()):
                    with run.saved_if_it_fails(self.step, metrics, config.save_at_end):
                        metrics |= run.validate(self.step)
                # Asked again: the validation took time, and a signal may have come in it.
                stop = None if last else self._stop_reason()
                # Waited for where no later step would complete it.
                if stop or (last and config.save_at_end) or self._due(config.save_freq):
                    metrics |= run.save(self.step, metrics, wait=last or stop is not None)
            finally:  # what fails must not take the step's metrics with it
                run.log.record(self.step, metrics)
            run.preemption.step_ended()
            if stop:
                return stop
        # Without a save at the end, one in the background may be left from an earlier step.
        run.checkpoints.finish()
        return None

    def train_step(self, step: int) -> dict[str, float]:
        """One step of the algorithm; its metrics."""
        run, learner = self.run, self.run.learner
        experience = run.source.next_batch(step)  # sync_weights, generate, score
        # From here on the training ranks need the memory of the devices that they share.
        run.weights.sleep_engines()
        with StepAside(self._figures, step, experience, run.weights.trained_version) as aside:
            run.health.check_rewards(step, experience)
            batch = experience.batch(pad_id=0)
            batch = learner.old_logprobs(batch)
            batch = learner.ref_logprobs(batch)
            batch = learner.values(batch)
            batch, kl_metrics = learner.advantages(batch)
            run.health.check_batch(step, batch)
            aside.tokens(batch)
            if step < self.total_steps:
                aside.start(run.prepare)
            run.source.before_update(step)  # engines that are behind still need the weights of now
            metrics = learner.update_critic(batch)
            batch, actor_metrics = learner.update_actor(batch, step, aside)
            aside.tokens(batch)  # where the update's own forward pass has given the old log-probs
            metrics |= actor_metrics
            metrics |= run.health.check_update(step, metrics) | learner.memory()
            metrics |= kl_metrics | aside.figures()
        metrics["rollout/engine_restarts"] = float(run.weights.restarts)
        run.trained(step, experience)
        return experience.metrics | metrics

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _stop_reason(self) -> str | None:
        run = self.run
        return run.preemption.reason(run.source.settle_s + run.checkpoints.save_s)

"""What a verdict must know of a run's configuration, so that it advises only what can be done.

Invariant: plain values; the room that reads configurations makes them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """How a run is set up."""

    about: str
    """Algorithm, model, data, batch, age of samples and ranks, in a line."""
    scoring: str
    """What gives the score, in a sentence or two."""
    needs_groups: bool | None
    """Whether advantages compare the completions of a prompt; None of a user's own estimator."""
    old_from_engine: bool
    """The engines' log-probs are the old ones (bypass mode): the trainer computes none."""
    max_staleness: int
    on_cpu: bool
    epochs: int
    """Passes over a batch, of the model that makes most."""
    mini_batches: int
    """Optimizer steps of a pass, of the actor."""
    kl_term: bool
    """Whether the KL to the reference is in the loss or the reward."""
    dynamic_sampling: bool
    micro_batches: int | None
    """Of a mini-batch, on each data-parallel rank; None where a budget of tokens decides."""
    stages: int
    """Pipeline stages of the actor, and how many parts of the model each has."""
    stage_parts: int
    packed: bool
    decoded_at_once: int
    """Sequences, by all engines."""
    completions_per_prompt: int
    sequences: int
    """Completions of a step."""
    response_limit: int
    """Tokens."""
    overlong_penalty: bool
    scores_last_number: bool
    """The answer may be the last number that stands in the text."""
    custom_reward: bool
    reward_workers: int
    test_freq: int
    save_freq: int
    async_save: bool

    @property
    def one_update(self) -> bool:
        """Whether a batch is one update of the policy that wrote it: ratios are 1."""
        return (
            self.epochs * self.mini_batches == 1
            and self.max_staleness == 0
            and not self.old_from_engine
        )

    @property
    def bubble(self) -> float:
        """Share of a pass in which a rank of the pipeline has nothing to do."""
        if self.micro_batches is None:
            return 0.0
        idle = self.stages - 1
        return idle / (idle + self.micro_batches * self.stage_parts)

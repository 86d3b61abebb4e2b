"""What to do: what could be changed about a run, and for which runs that is possible.

Invariant: of a run whose configuration is known, nothing is advised that it does already or that
would change nothing. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf3d.observability.page.setup import Setup
from rlhf3d.observability.page.trends import Rows, mean_of, recent

PADDED = 0.1
"""Share of the positions computed that hold no token, from which packing is worth a try."""
BUBBLE = 0.2
"""Share of a pass that ranks of a pipeline wait for one another, from which that is."""

When = Callable[[Setup, Rows], bool]


def _always(setup: Setup, rows: Rows) -> bool:
    return True


@dataclass(frozen=True)
class Hint:
    """One thing to change."""

    text: str
    when: When = _always
    """Of which runs."""
    now: str = ""
    """The field of `Setup` that has what is set now."""

    def of(self, setup: Setup | None) -> str:
        """With the value that is set now."""
        if setup is None or not self.now:
            return self.text
        now = f"now {getattr(setup, self.now):g}"
        if self.text.endswith(")"):
            return f"{self.text[:-1]}; {now})"
        return f"{self.text} ({now})"


def advice(hints: Sequence[Hint], setup: Setup | None, rows: Rows = ()) -> str:
    """Those that are possible, as a sentence; empty without any."""
    said = [hint.of(setup) for hint in hints if setup is None or hint.when(setup, rows)]
    if not said:
        return ""
    *others, last = said
    comma = "," if len(others) > 1 else ""
    text = f"{', '.join(others)}{comma} or {last}" if others else last
    return f"{text[0].upper()}{text[1:]}."


def _padded(setup: Setup, rows: Rows) -> bool:
    share = mean_of(recent(rows), "perf/padding_share/update_actor")
    return not setup.packed and (share is None or share >= PADDED)


def _can_take_larger_micro_batches(setup: Setup, rows: Rows) -> bool:
    """Whether half as many still fill the pipeline."""
    count = setup.micro_batches
    return count is not None and count >= 2 * setup.stages


FEWER_EPOCHS = Hint(
    "fewer epochs a batch (actor.ppo_epochs, critic.ppo_epochs)",
    lambda setup, _: setup.epochs > 1,
    "epochs",
)
LESS_STALE = Hint(
    "a smaller rollout.max_staleness", lambda setup, _: setup.max_staleness > 0, "max_staleness"
)

TIME = {
    "generation": (
        Hint("more engines (rollout.engines)", lambda setup, _: not setup.on_cpu),
        Hint(
            "more sequences at once (rollout.max_num_seqs x rollout.engines)",
            lambda setup, _: setup.decoded_at_once < setup.sequences,
            "decoded_at_once",
        ),
        Hint("shorter completions (data.max_response_length)", now="response_limit"),
        Hint(
            "generation beside training (rollout.max_staleness)",
            lambda setup, _: setup.max_staleness == 0,
        ),
    ),
    "scoring": (
        Hint("more reward.workers", now="reward_workers"),
        Hint("a faster reward function", lambda setup, _: setup.custom_reward),
    ),
    "training": (
        Hint("larger micro-batches (ppo_micro_batch_size_per_gpu)", _can_take_larger_micro_batches),
        Hint("packed sequences (model.use_remove_padding)", _padded),
        Hint(
            "a smaller actor.layout.pp, whose stages wait for one another",
            lambda setup, _: setup.bubble >= BUBBLE,
            "stages",
        ),
        FEWER_EPOCHS,
        Hint("another layout (`rlhf3d plan CONFIG --search`)"),
    ),
    "weight sync": (Hint("see where the bytes go: `rlhf3d reshard CONFIG`"),),
    "validation": (
        Hint("a larger trainer.test_freq", lambda setup, _: setup.test_freq > 0, "test_freq"),
        Hint("fewer held-out prompts (data.val_max_samples)"),
    ),
    "checkpoints": (
        Hint("a larger trainer.save_freq", lambda setup, _: setup.save_freq > 0, "save_freq"),
        Hint("trainer.async_save", lambda setup, _: not setup.async_save),
    ),
    "other": (Hint("see what lies between the phases: logs/driver.log"),),
}
"""Against the time that a group of phases takes (`bound.GROUPS`)."""

LOWER_RATE = Hint("a lower learning rate")
KL_TERM = Hint(
    "a KL term (actor.use_kl_loss or algorithm.use_kl_in_reward)",
    lambda setup, _: not setup.kl_term,
)
NEARER = (
    LOWER_RATE,
    KL_TERM,
    Hint("a larger coefficient of the KL", lambda setup, _: setup.kl_term),
    Hint(
        "fewer updates a batch (ppo_epochs, ppo_mini_batch_size)",
        lambda setup, _: setup.epochs * setup.mini_batches > 1,
    ),
)
"""To stay nearer to the policy that there was."""
COLLAPSED = (
    LOWER_RATE,
    Hint("a larger clip_ratio_high"),
    Hint("an entropy bonus (actor.entropy_coeff)"),
    KL_TERM,
)
MORE_SIGNAL = (
    Hint("a larger rollout.n", now="completions_per_prompt"),
    Hint("dynamic sampling (algorithm.filter_groups)", lambda setup, _: not setup.dynamic_sampling),
)
LARGE_UPDATES = (
    LOWER_RATE,
    FEWER_EPOCHS,
    Hint("larger mini-batches", lambda setup, _: setup.mini_batches > 1),
    LESS_STALE,
)
TOO_OLD = (
    LESS_STALE,
    LOWER_RATE,
    Hint("a correction (algorithm.rollout_correction)", lambda setup, _: not setup.old_from_engine),
)
CUT_OFF = (
    Hint("raise data.max_response_length", now="response_limit"),
    Hint(
        "have the reward prefer short answers (reward.overlong_buffer, its len below "
        "data.max_response_length)",
        lambda setup, _: not setup.overlong_penalty,
    ),
)
"""Against answers that are cut off."""

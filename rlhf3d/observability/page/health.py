"""Is it healthy: what the metrics say of numbers, updates, exploration, engines and rewards.

Invariant: each check looks at one thing, names its figures, and is silent (None) where the run has
no such thing; where it has one and does not measure it, that is said (unknown). Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from rlhf3d.observability.metrics import KL_TO_REFERENCE
from rlhf3d.observability.page.advice import (
    COLLAPSED,
    CUT_OFF,
    LARGE_UPDATES,
    MORE_SIGNAL,
    TOO_OLD,
    Hint,
    advice,
)
from rlhf3d.observability.page.findings import ORDER, Finding, share
from rlhf3d.observability.page.learning import SURE, is_sure
from rlhf3d.observability.page.limits import (
    CLIPPED,
    CUT_BAD,
    CUT_WATCH,
    EARLY_STEPS,
    EFFECTIVE,
    ENTROPY_HIGH,
    ENTROPY_LOW,
    ENTROPY_NATS,
    EXPLAINED,
    FAILED,
    GRADIENT_RISE,
    KL_FAR,
    KL_GROWTH,
    KL_NATS,
    LEFT_BEHIND,
    MISMATCH_BAD,
    MISMATCH_WATCH,
    SIGNAL_BAD,
    SIGNAL_WATCH,
    SPIKE,
    STALE_KL,
    UNREADABLE,
)
from rlhf3d.observability.page.setup import Setup
from rlhf3d.observability.page.trends import (
    Mean,
    Rows,
    change,
    mean_of,
    number,
    recent,
    training_rows,
    values,
)
from rlhf3d.units import counted

VITAL = ("actor/loss", "actor/grad_norm", "critic/vf_loss", "critic/grad_norm", "critic/score/mean")
"""Metrics that are never undefined in a sound run; others, such as ratios to the steps before, are
null where there is nothing to divide."""


_FAILURES = ("timeout", "error")
"""Outcomes of scoring."""
_NEARER = (
    "Raise the KL coefficient (actor.kl_loss_coef or algorithm.kl_ctrl), or lower the learning "
    "rate; read the answers."
)
_READ_FAILED = "`rlhf3d samples RUN --failed` shows them; logs/driver.log has the errors."


@dataclass(frozen=True)
class Known:
    """What is known of a run besides its metrics."""

    learns: bool = False
    """What looks odd may then be what the task wants."""
    setup: Setup | None = None


Check = Callable[[Rows, Known], Finding | None]
"""Of the rows of training steps."""


def health(rows: Rows, known: Known) -> tuple[Finding, ...]:
    """Everything that could be checked or should have been, the worst first."""
    steps = training_rows(rows)
    if not steps:
        return ()
    found = [finding for check in CHECKS if (finding := check(steps, known)) is not None]
    return tuple(sorted(found, key=lambda finding: ORDER.index(finding.level)))


def numbers(rows: Rows, _: Known) -> Finding | None:
    """Whether losses and gradients are finite."""
    broken = [row["step"] for row in rows if set(VITAL) & set(row.get("nonfinite") or ())]
    names = ("actor/skipped_steps", "critic/skipped_steps")
    skipped = sum(sum(values(rows, name)) for name in names)
    if not broken and not skipped:
        return Finding("good", "All losses and gradients are finite", "", chart="grad_norm")
    text = f"Optimizer steps left out because a number was not finite: {skipped:.0f}."
    if broken:
        text += (
            f" Metrics were not finite in {counted(len(broken), 'step')}, the last at {broken[-1]}."
        )
    return Finding(
        "bad" if broken else "watch",
        "Numbers are not finite",
        text,
        "logs/driver.log names the sequences. Look for extreme rewards or log-probs in them; try "
        "a lower learning rate.",
        "grad_norm",
    )


def entropy(rows: Rows, known: Known) -> Finding | None:
    """Whether it still explores."""
    found = change(rows, "actor/entropy")
    if found is None:
        return None
    start, now = found.first.value, found.last.value
    text = f"Entropy {start:.3g} nats per token at the start, {now:.3g} now"
    text += f": {share(now / start)} of it." if start > 0 else "."
    if now < ENTROPY_NATS and now < ENTROPY_LOW * start:
        return Finding(
            "watch" if known.learns else "bad",
            "Entropy has collapsed",
            f"{text} Completions of a prompt are nearly the same, so it explores no more.",
            "Fine at the end of a run that solved its task. Otherwise: "
            f"{advice(COLLAPSED, known.setup, rows)}",
            "entropy",
        )
    if start > 0 and now > ENTROPY_HIGH * start:
        return Finding(
            "watch" if known.learns else "bad",
            "Entropy grows",
            f"{text} The text gets more random.",
            "Lower the learning rate or actor.entropy_coeff, and read the answers.",
            "entropy",
        )
    return Finding("good", "Entropy has not collapsed", text, chart="entropy")


def reference_kl(rows: Rows, known: Known) -> Finding | None:
    """How far it has gone from the model that it started from."""
    name = next((name for name in KL_TO_REFERENCE if values(rows, name)), None)
    if name is None:
        return Finding(
            "unknown",
            "Distance to the reference is not measured",
            "The run has no KL term, so no reference model runs.",
        )
    now = mean_of(recent(rows), name)
    middle = mean_of(recent(rows[: max(1, len(rows) // 2)]), name)
    if now is None or middle is None:
        return None
    text = f"KL to the reference {now:.3g} nats per token, {middle:.3g} half-way."
    early, large = len(rows) < EARLY_STEPS, now > max(KL_NATS, KL_GROWTH * middle)
    if early and now > KL_FAR:
        return Finding(
            "watch",
            "KL to the reference is large",
            f"{text} More than {KL_FAR:g} is far, however few the steps.",
            _NEARER,
            "kl",
        )
    if early and large:
        # It begins at 0, so that it more than doubles in the second half of any short run.
        return Finding(
            "unknown",
            "KL to the reference is large",
            f"{text} {len(rows)} steps are too few to say whether it levels off.",
            chart="kl",
        )
    if large:
        return Finding(
            "watch" if known.learns else "bad",
            "KL to the reference runs away",
            f"{text} The policy leaves the model that it started from, without slowing down.",
            _NEARER,
            "kl",
        )
    return Finding("good", "KL to the reference is under control", text, chart="kl")


def update_size(rows: Rows, known: Known) -> Finding | None:
    """Whether updates stay within the clip range."""
    clipped = mean_of(recent(rows), "actor/pg_clipfrac")
    if clipped is None:
        return None
    if not clipped and known.setup is not None and known.setup.one_update:
        # Nothing can be clipped: the chart says so.
        return None
    text = f"{share(clipped)} of the tokens are beyond the clip range."
    if clipped <= CLIPPED:
        return Finding("good", "Updates are of a sound size", text, chart="clip")
    return Finding(
        "watch",
        "Updates are large",
        f"{text} What is clipped teaches nothing.",
        advice(LARGE_UPDATES, known.setup, rows),
        "clip",
    )


def mismatch(rows: Rows, known: Known) -> Finding | None:
    """Whether engine and trainer compute the same probabilities."""
    found = mean_of(recent(rows), "training/rollout_probs_diff_mean")
    if found is None and known.setup is not None and known.setup.old_from_engine:
        return Finding(
            "unknown",
            "Engine against trainer is not measured",
            "With algorithm.rollout_correction.bypass_mode the engines' log-probs are the old ones "
            "and the trainer computes none to compare. The canary (rollout.canary_steps) does at "
            "the start of the run.",
        )
    if found is None:
        return None
    text = f"The engine's and the trainer's probability of a token differ by {found:.2g} on average"
    if found <= MISMATCH_WATCH:
        text += f", below {MISMATCH_WATCH:g}."
        return Finding("good", "Engine and trainer agree", text, chart="mismatch")
    return Finding(
        "bad" if found > MISMATCH_BAD else "watch",
        "Engine and trainer disagree",
        f"{text}; below {MISMATCH_WATCH:g} is usual.",
        "`rlhf3d doctor mismatch RUN` says where they part and which cause explains it. What is "
        "rounding, one dtype for both (model.dtype, rollout.dtype) or algorithm.rollout_correction "
        "repairs.",
        "mismatch",
    )


def truncation(rows: Rows, known: Known) -> Finding | None:
    """How many completions are cut off."""
    cut = mean_of(recent(rows), "response/truncated_ratio")
    if cut is None:
        return None
    text = f"{share(cut)} of the completions end at the limit and not by themselves."
    if cut <= CUT_WATCH:
        return Finding("good", "Answers come to their end", text, chart="cut")
    hints = advice(CUT_OFF, known.setup, rows)
    found = change(rows, "response/truncated_ratio")
    if found is not None:
        before = f"in the first {found.steps} steps it was {share(found.first.value)}."
        falls = is_sure(Mean(-found.gain.value, found.gain.error), SURE)
        text += f" It falls: {before}" if falls else f" I{before[1:]}"
        if falls and hints:
            hints = f"If it falls no further: {hints[0].lower()}{hints[1:]}"
    if known.setup is not None and known.setup.scores_last_number:
        text += (
            " Scores of such answers may be wrong: an answer without `####` or box is scored by "
            "the last number that stands in what is left of it."
        )
    return Finding(
        "watch" if cut <= CUT_BAD or known.learns or len(rows) < EARLY_STEPS else "bad",
        "Many answers are cut off",
        text,
        hints,
        "cut",
    )


def signal(rows: Rows, known: Known) -> Finding | None:
    """Whether the groups have something to learn from."""
    mixed = mean_of(recent(rows), "reward/mixed_groups_share")
    if mixed is None or (known.setup is not None and known.setup.needs_groups is False):
        # Other estimators learn from prompts whose completions are all alike, too.
        return None
    text = f"In {share(mixed)} of the groups completions of a prompt differ in score."
    if mixed >= SIGNAL_WATCH:
        return Finding("good", "Groups have something to learn from", text, chart="signal")
    reward = mean_of(recent(rows), "critic/score/mean") or 0.0
    highest = max(values(rows, "critic/score/max"), default=1.0)
    solved = reward > highest / 2
    many, prompts = ("Most", "harder") if solved else ("Few", "easier")
    return Finding(
        "bad" if mixed < SIGNAL_BAD and not solved else "watch",
        "Few groups teach anything",
        f"{text} {many} answers are right, so that those of a prompt hardly differ.",
        advice((Hint(f"{prompts} prompts"), *MORE_SIGNAL), known.setup, rows),
        "signal",
    )


def gradients(rows: Rows, _: Known) -> Finding | None:
    """Spikes of the policy's gradient, and none at all."""
    return _gradients(rows, "actor", "policy")


def critic_gradients(rows: Rows, _: Known) -> Finding | None:
    """The same of the value model."""
    return _gradients(rows, "critic", "value model")


def _gradients(rows: Rows, role: str, name: str) -> Finding | None:
    norms = values(recent(rows), f"{role}/grad_norm")
    if not norms:
        return None
    if max(norms) == 0:
        return Finding(
            "bad",
            f"There is no gradient of the {name}",
            f"Its norm is 0 in the last {len(norms)} steps.",
            "All completions may have the same reward, or all were left out: see the answers.",
            "grad_norm",
        )
    spikes = [row["step"] for row in rows if (number(row, f"{role}/grad_norm_ratio") or 0) > SPIKE]
    late = [step for step in spikes if step >= recent(rows)[0]["step"]]
    text = f"Norm {fmean(norms):.3g} in the last {len(norms)} steps, at most {max(norms):.3g}."
    found = change(rows, f"{role}/grad_norm")
    if found is not None and found.last.value > GRADIENT_RISE * found.first.value:
        text += f" It rose: in the first {found.steps} steps it was {found.first.value:.3g}."
    text += f" Spikes to {SPIKE:g} times the steps before: {len(spikes) or 'none'}."
    if not late:
        title = f"The gradient of the {name} has no spikes"
        return Finding("good", f"{title} now" if spikes else title, text, chart="grad_norm")
    return Finding(
        "watch",
        f"The gradient of the {name} spikes",
        f"{text} The last one, at step {late[-1]}, had {SPIKE:g} times its usual size or more.",
        "One alone is clipped and harmless. Several: a lower learning rate, larger batches.",
        "grad_norm",
    )


def learning_rate(rows: Rows, _: Known) -> Finding | None:
    """Whether it is allowed to learn."""
    rates = values(recent(rows), "actor/lr")
    if not rates or max(rates) > 0:
        return None
    return Finding(
        "bad",
        "The learning rate is 0",
        f"In the last {len(rates)} steps nothing was changed.",
        "Check actor.optim: lr, min_lr and lr_warmup_steps.",
        "lr",
    )


def critic(rows: Rows, _: Known) -> Finding | None:
    """Whether values are better than a constant."""
    explained = mean_of(recent(rows), "critic/vf_explained_var")
    if explained is None:
        return None
    text = f"It explains {share(max(explained, 0.0))} of the returns' variance."
    if explained >= EXPLAINED:
        return Finding("good", "The value model is of use", text, chart="critic")
    if len(rows) < EARLY_STEPS:
        text += f" {len(rows)} steps are too few to judge it."
        return Finding("unknown", "The value model explains little so far", text, chart="critic")
    title = "The value model explains little"
    if explained < 0:
        title, text = (
            "The value model misleads",
            f"Its error has {1 - explained:.2g} times the variance of the returns: a constant "
            "would be better.",
        )
    return Finding(
        "watch",
        title,
        text,
        "A higher critic.optim.lr, more critic epochs, trainer.critic_warmup, or an estimator that "
        "needs no value model (algorithm.adv_estimator).",
        "critic",
    )


def _outcomes(rows: Rows, of: str, names: tuple[str, ...]) -> dict[str, float]:
    """How often each came."""
    return {name: sum(values(rows, f"{of}/outcome/{name}")) for name in names}


def scoring(rows: Rows, known: Known) -> Finding | None:
    """Whether rewards are rewards."""
    last = recent(rows)
    counts = _outcomes(last, "reward", ("scored", "unparsable", *_FAILURES))
    total = sum(counts.values())
    if not total:
        return None
    failed = sum(counts[name] for name in _FAILURES) / total
    unreadable = counts["unparsable"] / total
    if failed:
        return Finding(
            "bad" if failed > FAILED else "watch",
            "Scoring fails",
            f"{share(failed)} of the completions got no score: {counts['timeout']:.0f} timeouts, "
            f"{counts['error']:.0f} errors in the last {len(last)} steps.",
            _READ_FAILED,
            "outcomes",
        )
    text = f"{share(unreadable)} of the completions hold no answer that can be read."
    if unreadable > UNREADABLE:
        own = known.setup is not None and known.setup.custom_reward
        what = "what your reward function reads" if own else "reward.method and reward.format"
        return Finding(
            "watch",
            "Most answers cannot be read",
            text,
            f"Say in the prompt how to answer, and check {what}.",
            "outcomes",
        )
    return Finding("good", "Answers can be scored", text, chart="outcomes")


def staleness(rows: Rows, known: Known) -> Finding | None:
    """Whether samples are too old for the policy that learns from them."""
    last = recent(rows)
    old = mean_of(last, "training/off_policy/trajectory_staleness_worst/mean")
    if old is None:
        return None
    apart = mean_of(last, "training/off_policy/kl_k3")
    effective = mean_of(last, "rollout_corr/rollout_is_eff_sample_size")
    left = mean_of(last, "response_length_ratio/p90")
    text = f"Samples are on average {old:.2g} versions old."
    if apart is not None:
        text += f" KL to the policy that wrote them {apart:.2g} nats per token."
    elif known.setup is not None and known.setup.old_from_engine:
        text += " How far the policy has moved since is what KL of an update and clip share show."
    if effective is not None:
        text += f" After correction {share(effective)} of the samples count."
    if (apart or 0) > STALE_KL or (effective is not None and effective < EFFECTIVE):
        return Finding(
            "watch",
            "Samples are too old",
            text,
            advice(TOO_OLD, known.setup, rows),
            "staleness",
        )
    if left is not None and left < LEFT_BEHIND:
        return Finding(
            "watch",
            "Long answers are left behind",
            f"{text} The longest tenth trained on has {share(left)} of the length of what was "
            "generated.",
            "A larger rollout.max_staleness lets long completions come to their end.",
            "length",
        )
    return Finding("good", "Samples are young enough", text, chart="staleness")


def engines(rows: Rows, _: Known) -> Finding | None:
    """Whether engines died."""
    died = max(values(rows, "rollout/engine_restarts"), default=0.0)
    if not died:
        return None
    return Finding(
        "watch",
        "Engines died",
        f"Engines were started again {counted(round(died), 'time')}.",
        "logs/engine_N.log says why; often it is memory.",
    )


def environments(rows: Rows, _: Known) -> Finding | None:
    """Whether environments fail."""
    failures = ("env_error", "env_timeout")
    counts = _outcomes(recent(rows), "env", ("done", "max_turns", "length", *failures))
    total = sum(counts.values())
    if not total:
        return None
    failed = sum(counts[name] for name in failures) / total
    text = f"{share(failed)} of the trajectories failed in their environment."
    if not failed:
        return Finding("good", "Environments work", text)
    return Finding(
        "bad" if failed > FAILED else "watch",
        "Environments fail",
        text,
        _READ_FAILED,
    )


CHECKS: tuple[Check, ...] = (
    numbers,
    entropy,
    reference_kl,
    update_size,
    mismatch,
    truncation,
    signal,
    gradients,
    critic_gradients,
    learning_rate,
    critic,
    scoring,
    staleness,
    engines,
    environments,
)

"""The loop on fakes of everything that has processes: which phases run, with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support.experience import FakeEngine, row
from support.tiny_models import make_tiny_tokenizer
from torch import Tensor

from rlhf3d.batching.batch import Batch
from rlhf3d.config.derived import derive
from rlhf3d.config.load import build
from rlhf3d.config.schema import Config
from rlhf3d.data.dataset import Prompt
from rlhf3d.experience.environment_runner import EnvironmentFailed
from rlhf3d.experience.scored import Experience
from rlhf3d.experience.source import TooFewGroups
from rlhf3d.experience.steps import untimed
from rlhf3d.experience.tokens import TokenRecorder
from rlhf3d.observability.live.state import Waited
from rlhf3d.observability.samples import read_samples, samples_path, write_samples
from rlhf3d.observability.tokens import read_tokens, token_steps, tokens_path, write_tokens
from rlhf3d.rewards.score import Outcome, RewardError, Score, ScoreItem
from rlhf3d.rollout.desk import Desks
from rlhf3d.trainer.assembly import Assembly
from rlhf3d.trainer.best import BestTracker
from rlhf3d.trainer.components import RunComponents
from rlhf3d.trainer.loop import Trainer
from rlhf3d.trainer.preemption import PreemptionHandler
from rlhf3d.trainer.step_log import StepLog

PROMPTS, N = 2, 2


class FakeTrain:
    """Log-probs -1, values ½; keeps what it was asked to update."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.updates: dict[str, Batch] = {}

    def forward(self, phase: str, role: str, batch: Batch) -> dict[str, Tensor]:
        self.phases.append(phase)
        values = torch.full_like(batch["response_mask"], 0.5 if role == "critic" else -1.0)
        return {"values" if role == "critic" else "logprobs": values}

    def peak_gib(self) -> float:
        return 1.5

    def update(
        self, role: str, batch: Batch, plan: Any, objective: Any
    ) -> tuple[dict[str, float], Tensor | None]:
        self.phases.append(f"update_{role}")
        self.updates[role] = batch
        own = torch.full_like(batch["response_mask"], -1.0) if objective.old_is_current else None
        return {f"{role}/grad_norm": 1.0}, own


class FakeRollout(FakeEngine):
    """Two tokens a completion with log-prob -1.5; greedy completions are of another token."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    @property
    def seeds(self) -> list[int]:
        """Of the sampled requests."""
        return [request.seed for request in self.requests if not request.sampling.greedy]

    def sleep(self) -> None:
        self.events.append("sleep")

    def submit(self, requests: Any) -> None:
        self.events.append("generate")
        super().submit(requests)


class FakeScoring:
    """The given scores in order, over and over; of greedy completions, last in a call, ¼."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.next, self.calls = scores, 0, 0
        self.items: dict[int, ScoreItem] = {}
        self.model = None
        self.waited = Waited([], 0.0, 0.0)

    def start(self, total: int, judged_by: int) -> FakeScoring:
        self.calls += 1
        self.items = {}
        return self

    def add(self, items: dict[int, ScoreItem]) -> None:
        assert not self.items.keys() & items.keys()
        self.items |= items

    def wait(self, timeout_s: float | None) -> bool:
        return True

    def finish(self) -> list[Score]:
        values = []
        for i in range(len(self.items)):
            values.append(self.scores[self.next % len(self.scores)] if i < PROMPTS * N else 0.25)
            self.next += i < PROMPTS * N
        return [Score(value, Outcome.SCORED) for value in values]


class Fakes(NamedTuple):
    """What stands for processes, files and the terminal."""

    group: FakeTrain
    critic: FakeTrain
    rollout: FakeRollout
    scoring: FakeScoring
    components: RunComponents
    rows: list[int]
    """Steps recorded."""
    saves: list[tuple[int, bool]]
    """(step, whether it was waited for)."""


def make_trainer(
    tmp_path: Path, scores: list[float], val: Sequence[Prompt] = (), steps: int = 2, **sections: Any
) -> tuple[Trainer, Fakes]:
    raw = {
        "data": {"train_batch_size": PROMPTS, "max_response_length": 4, **sections.pop("data", {})},
        "actor": {"ppo_mini_batch_size": PROMPTS, **sections.pop("actor", {})},
        "rollout": sections.pop("rollout", {"n": N}),
        "trainer": {"output_dir": str(tmp_path), **sections.pop("trainer", {})},
        **sections,
    }
    mistakes: list[str] = []
    config = build(Config(), raw, "", mistakes)
    assert not mistakes
    derived = derive(config)
    group, rollout, scoring = FakeTrain(), FakeRollout(), FakeScoring(scores)
    groups: dict[str, FakeTrain] = {}
    for own in derived.groups:
        groups |= dict.fromkeys(own.roles, group if own.name == "actor" else FakeTrain())
    counter, rows, saves = count(), [], []

    def save(step: int, *args: Any, wait: bool, **kwargs: Any) -> dict[str, float]:
        rollout.events.append("save")
        saves.append((step, wait))
        return {}

    def sleep() -> None:
        if config.rollout.sleep:
            rollout.sleep()

    def next_batch() -> list[Prompt]:
        return [Prompt((4, 5), "t", "", {}, next(counter), "q") for _ in range(PROMPTS)]

    checkpoints: Any = SimpleNamespace(
        last="gone", save_s=0.0, poll=dict, finish=lambda: None, save=save
    )
    console: Any = SimpleNamespace(
        phase=untimed, note=print, step=lambda *args: None, validation=lambda *args: None
    )
    writer: Any = SimpleNamespace(
        write=lambda step, metrics: rows.append(step),
        samples=partial(write_samples, tmp_path),
        tokens=partial(write_tokens, tmp_path),
    )
    weights: Any = SimpleNamespace(
        sync_weights=dict,
        trained_version=1,
        served_version=1,
        weights_changed=lambda: None,
        sleep_engines=sleep,
        engines=rollout,
        restarts=0,
    )
    inputs: Any = SimpleNamespace(
        tokenizer=make_tiny_tokenizer(),
        loader=SimpleNamespace(next_batch=next_batch, state_dict=dict),
        train_data=SimpleNamespace(of_row=None),
        val_data=val,
    )
    processes: Any = SimpleNamespace(groups=groups, rollout=rollout, sync=None)
    recorder = TokenRecorder(inputs.tokenizer, config.trainer.sample_tokens)
    log = StepLog(console, writer, steps, derived.devices, recorder)
    assembly = Assembly(config, derived, inputs, processes, scoring, log)  # type: ignore[arg-type]
    desks = Desks(weights.engines)
    components = RunComponents(
        source=assembly.source(weights, desks),
        learner=assembly.learner(weights),
        weights=weights,
        validation=assembly.validation(weights, desks),
        checkpoints=checkpoints,
        best=BestTracker(None),
        health=assembly.health(),
        log=log,
        preemption=PreemptionHandler(None, 0.0),
    )
    critic = groups.get("critic", group)
    fakes = Fakes(group, critic, rollout, scoring, components, rows, saves)
    return Trainer(config, components), fakes


def test_without_held_out_prompts_nothing_is_validated(tmp_path: Path) -> None:
    trainer, fakes = make_trainer(
        tmp_path, [1.0, 0.0], trainer={"test_freq": 1, "save_freq": 0, "save_at_end": False}
    )
    assert trainer.config.val_before_train
    trainer.fit()
    assert fakes.rows == [1, 2] and "validate" not in fakes.rollout.events


def test_a_critic_in_a_group_of_its_own_gets_its_phases(tmp_path: Path) -> None:
    trainer, fakes = make_trainer(tmp_path, [1.0, 0.0, 0.0, 0.0], critic={"layout": {"dp": 2}})
    trainer.train_step(1)
    assert fakes.critic.phases == ["values", "update_critic"]
    assert fakes.group.phases == ["update_actor"]


def test_engines_sleep_before_whatever_needs_their_memory(tmp_path: Path) -> None:
    """Updates after sampling, and a save after a validation."""
    trainer, fakes = make_trainer(
        tmp_path,
        [1.0, 0.0],
        [Prompt((4, 5), "t", "", {}, 0, "q")],
        rollout={"n": N, "sleep": True},
        trainer={"val_before_train": False, "test_freq": 1, "save_freq": 1},
    )
    fakes.group.phases = fakes.rollout.events
    trainer.fit()
    step = [
        "generate",
        "sleep",
        "values",
        "update_critic",
        "update_actor",
        "generate",  # of the validation
        "sleep",
        "save",
    ]
    assert fakes.rollout.events == step * 2


@pytest.mark.parametrize(("save_freq", "saved"), [(0, [(1, True)]), (1, [(1, False)])])
def test_a_step_that_cannot_be_filled_leaves_the_one_before_saved(
    save_freq: int, saved: list[tuple[int, bool]], tmp_path: Path
) -> None:
    """Groups have signal in the first step and none in the second."""
    trainer, fakes = make_trainer(
        tmp_path,
        [1.0, 0.0],
        steps=9,
        rollout={"n": N, "sleep": True},
        algorithm={
            "adv_estimator": "grpo",
            "filter_groups": {"enable": True, "max_num_gen_batches": 2},
        },
        trainer={"val_before_train": False, "save_freq": save_freq},
    )
    fakes.components.log.console.step = lambda *args: setattr(fakes.scoring, "scores", [0.0])  # type: ignore[method-assign]
    with pytest.raises(TooFewGroups, match="only 0 of 4 groups differ"):
        trainer.fit()
    assert fakes.saves == saved and trainer.step == 1
    if not save_freq:
        assert fakes.rollout.events[-2:] == ["sleep", "save"], "a save needs the engines' memory"


@pytest.mark.parametrize("error", [EnvironmentFailed, RewardError])
@pytest.mark.parametrize("when", ["generate", "validate"])
def test_code_of_the_users_that_fails_leaves_the_last_step_saved(
    when: str, error: type[RuntimeError], tmp_path: Path
) -> None:
    """In the second step, or in the validation after the first."""
    trainer, fakes = make_trainer(
        tmp_path, [1.0, 0.0], steps=9, trainer={"val_before_train": False, "test_freq": 1}
    )

    def fail(*_: Any) -> Any:
        raise error("the user's code")

    if when == "validate":
        trainer.run.validation.run = fail  # type: ignore[method-assign]
    else:
        trainer.run.validation.run = lambda step: {}  # type: ignore[method-assign]
        fakes.components.log.console.step = lambda *args: setattr(fakes.scoring, "finish", fail)  # type: ignore[method-assign]
    with pytest.raises(error, match="the user's code"):
        trainer.fit()
    assert fakes.saves == [(1, True)] and fakes.rows == [1]


def test_a_time_limit_leaves_room_for_what_a_save_waits_for(tmp_path: Path) -> None:
    trainer, fakes = make_trainer(tmp_path, [1.0, 0.0] * 4)
    fakes.components.preemption.limit_s = 1000.0
    fakes.components.source.settle_s = 990.0
    assert "a save of 990 s" in (trainer.fit() or "")
    assert fakes.rows == [1] and fakes.saves == [(1, True)]


def test_ppo_runs_every_phase(tmp_path: Path) -> None:
    trainer, fakes = make_trainer(
        tmp_path, [1.0, 0.0, 0.0, 0.0], algorithm={"use_kl_in_reward": True}
    )
    metrics = trainer.train_step(1)
    assert fakes.group.phases == [
        "old_logprobs",
        "ref_logprobs",
        "values",
        "update_critic",
        "update_actor",
    ]
    assert metrics["critic/score/mean"] == 0.25 and metrics["actor/reward_kl_penalty"] == 0
    assert (
        metrics["rollout_corr/kl"] == -0.5 and metrics["training/rollout_logprobs_diff_mean"] == 0.5
    )


def test_every_metric_is_documented(tmp_path: Path) -> None:
    """docs/metrics.md has each name a step can give; /max, /min, _max stand beside their means."""
    documented = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    correction = {"rollout_is": "token", "rollout_rs": "token_k1", "rollout_rs_threshold": 2.0}
    everything = {
        "filter_groups": {"enable": True},
        "rollout_correction": {**correction, "rollout_is_batch_normalize": True},
    }
    names: set[str] = set()
    for estimator in ("gae", "remax"):
        algorithm = {"adv_estimator": estimator, "use_kl_in_reward": True, **everything}
        buffer = {"overlong_buffer": {"enable": True, "len": 3}}
        names |= (
            make_trainer(tmp_path, [1.0, 0.0], algorithm=algorithm, reward=buffer)[0]
            .train_step(1)
            .keys()
        )
    for name in names:
        mean = (
            name.replace("/max", "/mean")
            .replace("/min", "/mean")
            .replace("_diff_max", "_diff_mean")
        )
        leaf = f"`/{name.rpartition('/')[2]}`"
        assert f"`{mean}`" in documented or leaf in documented, name


def test_critic_warmup_leaves_the_actor_alone(tmp_path: Path) -> None:
    trainer, fakes = make_trainer(tmp_path, [1.0, 0.0], steps=3, trainer={"critic_warmup": 2})
    for step in (1, 2, 3):
        trainer.train_step(step)
    assert (
        fakes.group.phases.count("update_critic") == 3
        and fakes.group.phases.count("update_actor") == 1
    )


def test_remax_subtracts_the_greedy_score(tmp_path: Path) -> None:
    trainer, fakes = make_trainer(
        tmp_path, [1.0, 0.0, 0.5, 0.25], algorithm={"adv_estimator": "remax"}
    )
    metrics = trainer.train_step(1)
    assert fakes.group.phases == ["update_actor"], "no critic, no reference"
    assert fakes.group.updates["actor"]["advantages"].tolist() == [
        [0.75] * 2,
        [-0.25] * 2,
        [0.25] * 2,
        [0.0] * 2,
    ]
    assert (
        metrics["reward/greedy_baseline/mean"] == 0.25 and len(fakes.rollout.seeds) == PROMPTS * N
    )


def test_dynamic_sampling_draws_again(tmp_path: Path) -> None:
    """Of each draw's two groups one has signal: the step trains on the 1, 0 of two draws."""
    algorithm = {
        "adv_estimator": "grpo",
        "norm_adv_by_std_in_grpo": False,
        "filter_groups": {"enable": True},
    }
    trainer, fakes = make_trainer(tmp_path, [1.0, 0.0, 1.0, 1.0], algorithm=algorithm)
    metrics = trainer.train_step(1)
    assert metrics["train/num_gen_batches"] == 2 == fakes.scoring.calls
    assert fakes.group.updates["actor"]["advantages"][:, 0].tolist() == [0.5, -0.5, 0.5, -0.5]
    assert len(set(fakes.rollout.seeds)) == 2 * PROMPTS * N
    assert (
        metrics["critic/score/mean"] == 0.5
        and metrics["filter_groups/generated_score/mean"] == 0.75
    )
    assert len((tmp_path / "samples" / "step_1.jsonl").read_text().splitlines()) == PROMPTS * N


def test_a_trajectory_whose_environment_failed_is_written_for_people(tmp_path: Path) -> None:
    trainer, fakes = make_trainer(tmp_path, [1.0, 0.0])
    source = fakes.components.source
    failure = Score(0.0, Outcome.ENV_ERROR, message="no such door")

    def next_batch(step: int) -> Experience:
        beside = row(1.0, 99)
        return replace(source.next_batch(step), left_out=[beside, row(failure, 99)])

    stand_in: Any = SimpleNamespace(next_batch=next_batch, before_update=source.before_update)
    trainer.run = replace(fakes.components, source=stand_in)
    metrics = trainer.train_step(1)
    samples = read_samples(samples_path(tmp_path, 1))
    # After those that are trained on, whose numbers messages name.
    assert [sample.outcome for sample in samples] == ["scored"] * PROMPTS * N + ["env_error"]
    assert metrics["reward/outcome/scored"] == PROMPTS * N


def test_bypass_skips_the_old_logprobs(tmp_path: Path) -> None:
    algorithm = {"adv_estimator": "rloo", "rollout_correction": {"bypass_mode": True}}
    trainer, fakes = make_trainer(tmp_path, [1.0, 0.0], algorithm=algorithm)
    metrics = trainer.train_step(1)
    assert fakes.group.phases == ["update_actor"]
    assert fakes.group.updates["actor"]["old_logprobs"].unique().tolist() == [-1.5]
    assert not any(name.startswith(("rollout_corr/", "training/")) for name in metrics)


def test_the_only_optimizer_step_gives_the_old_logprobs(tmp_path: Path) -> None:
    """With the metrics that a phase of their own gives, and its advantages; a second optimizer step
    needs the phase.
    """
    grpo = {"adv_estimator": "grpo"}
    seen = []
    for actor in ({}, {"ppo_epochs": 2}):
        trainer, fakes = make_trainer(tmp_path, [1.0, 0.0], algorithm=grpo, actor=actor)
        seen.append((trainer.train_step(1), fakes.group.phases, fakes.group.updates["actor"]))
    (once, phases, batch), (twice, more_phases, other) = seen
    assert phases == ["update_actor"] and more_phases == ["old_logprobs", "update_actor"]
    assert "old_logprobs" not in batch and torch.equal(batch["advantages"], other["advantages"])
    assert once == pytest.approx(twice, nan_ok=True)
    assert once["rollout_corr/kl"] == -0.5 == -once["training/rollout_logprobs_diff_mean"]


@pytest.mark.parametrize("algorithm", [{}, {"algorithm": {"use_kl_in_reward": True}}])
def test_tokens_of_the_first_trajectories_are_kept(
    algorithm: dict[str, Any], tmp_path: Path
) -> None:
    """The engine gives -1.5 for each token, training -1: its update, or its phase."""
    trainer, _ = make_trainer(tmp_path, [1.0, 0.0], trainer={"sample_tokens": 3}, **algorithm)
    trainer.train_step(1)
    kept = read_tokens(tokens_path(tmp_path, 1))
    assert [one.number for one in kept] == [0, 1, 2] and PROMPTS * N == 4
    assert {tuple(one.differences) for one in kept} == {(0.5, 0.5)}
    none, _ = make_trainer(tmp_path, [1.0, 0.0], trainer={"sample_tokens": 0})
    none.train_step(2)
    assert token_steps(tmp_path) == [1]


def test_correction_reaches_the_actor_alone(tmp_path: Path) -> None:
    """Ratios are sqrt(e) = 1.65 everywhere: truncated at 1.5."""
    trainer, fakes = make_trainer(
        tmp_path,
        [1.0, 0.0],
        algorithm={"rollout_correction": {"rollout_is": "token", "rollout_is_threshold": 1.5}},
    )
    metrics = trainer.train_step(1)
    assert fakes.group.updates["actor"]["rollout_is_weights"].unique().tolist() == [1.5]
    assert "rollout_is_weights" not in fakes.group.updates["critic"]
    assert metrics["rollout_corr/rollout_is_ratio_fraction_high"] == 1


def test_overlong_penalty_is_part_of_the_reward(tmp_path: Path) -> None:
    """Two tokens of at most 4 with a buffer of 3: one token over, -1/3."""
    trainer, fakes = make_trainer(
        tmp_path,
        [1.0, 0.0],
        algorithm={"adv_estimator": "reinforce_plus_plus"},
        reward={"overlong_buffer": {"enable": True, "len": 3}},
    )
    metrics = trainer.train_step(1)
    assert fakes.group.updates["actor"]["token_level_rewards"].sum(-1).tolist() == pytest.approx(
        [2 / 3, -1 / 3] * 2
    )
    assert metrics["reward/overlong_penalty/mean"] == pytest.approx(-1 / 3)


def test_a_broken_number_stops_before_the_update(tmp_path: Path) -> None:
    twice = {"ppo_epochs": 2}
    trainer, fakes = make_trainer(tmp_path, [1.0, 0.0], actor=twice)
    forward = fakes.group.forward

    def broken(phase: str, role: str, batch: Batch) -> dict[str, Tensor]:
        outputs = forward(phase, role, batch)
        if phase == "old_logprobs":
            outputs["logprobs"][3, 1] = float("nan")
        return outputs

    fakes.group.forward = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"step 1: .*sequence 3 \(old_logprobs\)"):
        trainer.train_step(1)
    skip = {"on_nonfinite": "skip"}
    trainer, fakes = make_trainer(tmp_path, [1.0, 0.0], actor=twice, trainer=skip)
    forward, fakes.group.forward = fakes.group.forward, broken  # type: ignore[method-assign]
    trainer.train_step(1)
    assert fakes.group.phases[-1] == "update_actor"

"""What a training step reports of held-out answers is what `rlhf3d evaluate` would."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from support.experience import FakeRewards, row
from support.talking import TOKENIZER, Echo, FakeSessions, TalkingEngine, asked, failed, runner

from rlhf3d.config.schema import ValidationConfig
from rlhf3d.environments.api import Call, Reset
from rlhf3d.experience.accuracy import interval
from rlhf3d.experience.collect import Collector
from rlhf3d.experience.scored import ScoredTrajectory
from rlhf3d.observability.samples import Sample
from rlhf3d.placement.journal import name_of
from rlhf3d.rewards.parts import EnvironmentPart
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.trainer.validation import Validation, validation_metrics


def score(value: float, answer: str | None, **extra: float) -> Score:
    outcome = Outcome.UNPARSABLE if answer is None else Outcome.SCORED
    return Score(value, outcome, {"answer": answer, **extra})


def of_a(scores: list[Score], n: int) -> list[ScoredTrajectory]:
    """Groups of n, all of data source a."""
    return [row(one, i // n, data_source="a") for i, one in enumerate(scores)]


def test_figures_by_source() -> None:
    rows = [
        row(score(1, "4"), 0, data_source="a"),
        row(score(0, "5"), 0, data_source="a"),
        row(score(0, None), 2, data_source="b"),
        row(score(0, "5"), 1, data_source="a"),
        row(score(1, "\\frac12"), 2, data_source="b"),
        row(score(1, "4.0"), 1, data_source="a"),
    ]
    figures = validation_metrics(rows, "sampled")
    assert figures["val-core/a/acc/sampled"] == 0.5 and figures["val-core/b/acc/sampled"] == 0.5
    assert (figures["val-aux/a/num_prompts"], figures["val-aux/b/num_prompts"]) == (2, 1)
    assert (
        figures["val-aux/a/acc/sampled/pass@2"] == 1.0
        and figures["val-aux/a/acc/sampled/maj@2"] == 0.5
    )
    assert figures["val-aux/b/acc/sampled/maj@2"] == 1.0
    bounds = figures["val-aux/a/acc/sampled/ci_low"], figures["val-aux/a/acc/sampled/ci_high"]
    assert bounds == pytest.approx(interval([0.5, 0.5]))


def test_accuracy_leaves_the_other_parts_of_the_reward_out() -> None:
    scores = [score(1.2, "4", acc=1.0), score(0.2, "5", acc=0.0)]
    figures = validation_metrics(of_a(scores, 1), "greedy")
    assert figures["val-core/a/acc/greedy"] == 0.5
    assert set(figures) == {
        "val-core/a/acc/greedy",
        "val-aux/a/num_prompts",
        "val-aux/a/acc/greedy/ci_low",
        "val-aux/a/acc/greedy/ci_high",
    }


def test_a_reward_model_has_a_mean_and_its_error_and_alone_no_accuracy() -> None:
    """Two prompts of two completions: means 2 and 6, so 4 with a standard error of sqrt(8 / 2)."""
    said = [Score(9.0, Outcome.SCORED, {"reward_model": value}) for value in (1.0, 3.0, 5.0, 7.0)]
    figures = validation_metrics(of_a(said, 2), "sampled")
    assert figures == {
        "val-core/a/reward_model/sampled": 4.0,
        "val-aux/a/reward_model/sampled/se": pytest.approx(2.0),
        "val-aux/a/num_prompts": 2.0,
    }
    with_rule = [
        Score(s.value, s.outcome, {**s.extra, "acc": float(i > 1)}) for i, s in enumerate(said)
    ]
    both = validation_metrics(of_a(with_rule, 2), "sampled")
    assert both["val-core/a/acc/sampled"] == 0.5 and figures.items() <= both.items()


class Log:
    """What validation tells the run's log."""

    def __init__(self) -> None:
        self.written: list[Sample] = []
        self.count_of: dict[str, int] = {}
        """Samples by kind of answer."""
        self.console = self

    def phase(self, name: str) -> Any:
        return nullcontext()

    def samples(self, step: int, samples: list[Sample], kind: str) -> None:
        self.written += samples
        self.count_of[kind] = len(samples)

    def validation(self, name: str, metrics: Any) -> None:
        pass


class Weights:
    trained_version = served_version = 7

    def sync_weights(self) -> dict[str, float]:
        return {}

    def sleep_engines(self) -> None:
        pass


def validation_of(
    config: ValidationConfig, prompts: int, collector: Collector, log: Log
) -> Validation:
    return Validation(
        config,
        [asked(number) for number in range(prompts)],
        100,
        0,
        collector,
        Weights(),  # type: ignore[arg-type]
        log,  # type: ignore[arg-type]
    )


class Breaks(Echo):
    """The environment of the second prompt fails."""

    def __call__(self, call: Call) -> Any:
        broken = isinstance(call, Reset) and call.row["index"] == 1
        return failed() if broken else super().__call__(call)


def test_a_prompt_whose_environment_failed_is_in_no_figure() -> None:
    log = Log()
    collector = Collector(
        TalkingEngine(["end"]),
        FakeRewards({0: 1.0, 2: 0.0}),  # type: ignore[arg-type]
        TOKENIZER,
        runner=runner(FakeSessions(Breaks), max_error_rate=0.5, retries=0),
        environment=EnvironmentPart(0.0),
    )
    validation = validation_of(ValidationConfig(), 3, collector, log)
    metrics = validation.run(0)
    assert metrics["val-core/test/acc/greedy"] == 0.5
    assert metrics["val-aux/policy_version"] == 7
    assert metrics["val-aux/test/num_prompts"] == 2
    assert metrics["val-aux/env/greedy/prompts_left_out"] == 1
    assert [sample.outcome for sample in log.written] == ["scored", "env_error", "scored"]


@pytest.mark.parametrize("with_environment", [False, True])
def test_greedy_and_sampled_answers_are_asked_for_together(with_environment: bool) -> None:
    """Two prompts, one greedy and two sampled answers each; the sampled ones are right."""
    log, engine = Log(), TalkingEngine(["end"])
    collector = Collector(
        engine,
        FakeRewards(dict.fromkeys(range(2, 6), 1.0)),  # type: ignore[arg-type]
        TOKENIZER,
        runner=runner(FakeSessions(Echo)) if with_environment else None,
        environment=EnvironmentPart(0.0) if with_environment else None,
    )
    validation = validation_of(ValidationConfig(sampled_n=2), 2, collector, log)
    metrics = validation.run(3)
    (together,) = engine.submitted
    assert [one.sampling.greedy for one in together.values()] == [True] * 2 + [False] * 4
    names = [name_of(one).partition(".t")[0] for one in together.values()]
    assert names == [
        "greedy3.p0.s0",
        "greedy3.p1.s0",
        *(f"sampled3.p{prompt}.s{sample}" for prompt in range(2) for sample in range(2)),
    ]
    assert metrics["val-core/test/acc/greedy"] == 0.0
    assert metrics["val-core/test/acc/sampled"] == 1.0
    assert log.count_of == {"greedy": 2, "sampled": 4}

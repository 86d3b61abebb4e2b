"""Each cause, made for real on tiny models, is named; sound pairs are called healthy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import faults
from support.faults import Rows, Scores, pairs_of, scores

from rlhf3d.observability.mismatch.causes import Settings
from rlhf3d.observability.mismatch.diagnosis import diagnose
from rlhf3d.observability.mismatch.pairs import Pairs

FLOAT32, BFLOAT16 = Settings("float32"), Settings("bfloat16")
SEEDS = {0: 3.0, 4: 2.0}
"""And how sure the model of each is."""


@dataclass(frozen=True)
class Bench:
    """A model, what it wrote, and what it became."""

    model: Any
    seed: int

    @cached_property
    def rows(self) -> Rows:
        return faults.sample(self.model, seed=self.seed)

    @cached_property
    def sound(self) -> tuple[Rows, Scores]:
        return self.rows, scores(self.model, self.rows)

    @cached_property
    def updated(self) -> Any:
        return faults.updated(self.model, self.rows, steps=2)

    @cached_property
    def rounded(self) -> Any:
        return faults.in_bfloat16(self.model)

    def sampled(self, warp: faults.Warp) -> Pairs:
        """The engine draws from other logits, the trainer knows nothing of it."""
        rows = faults.sample(self.model, seed=self.seed, warp=warp)
        return pairs_of((rows, scores(self.model, rows)))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    seed = request.param
    folder = tmp_path_factory.mktemp("model")
    return Bench(faults.load(folder, SEEDS[seed], seed=seed), seed)


def engine_alone_at(temperature: float) -> Callable[[Bench], Pairs]:
    return lambda bench: bench.sampled(faults.tempered(temperature))


def trainer_alone_at(temperature: float) -> Callable[[Bench], Pairs]:
    warp = faults.tempered(temperature)
    return lambda bench: pairs_of((bench.rows, scores(bench.model, bench.rows, warp=warp)))


def top_k(bench: Bench) -> Pairs:
    return bench.sampled(faults.only_top_k(5))


def top_p(bench: Bench) -> Pairs:
    return bench.sampled(faults.only_top_p(0.9))


def stale(bench: Bench) -> Pairs:
    """The second step's tokens are by the weights of the first."""
    rows = faults.sample(bench.model, seed=bench.seed + 1)
    return pairs_of(bench.sound, (rows, scores(bench.updated, rows)))


def old_prompts(bench: Bench) -> Pairs:
    rows = faults.sample_after_old_prompts(bench.updated, bench.model, seed=bench.seed, length=6)
    return pairs_of(bench.sound, (rows, scores(bench.updated, rows)))


def coarser_engine(bench: Bench) -> Pairs:
    rows = faults.sample(bench.rounded, seed=bench.seed)
    return pairs_of((rows, scores(bench.model, rows)))


def coarser_softmax(bench: Bench) -> Pairs:
    rows, right = bench.sound
    trained = [torch.tensor(own).bfloat16().float().tolist() for own in right]
    return pairs_of((rows, trained))


def padding_attended(bench: Bench) -> Pairs:
    return pairs_of((bench.rows, faults.padded_scores(bench.model, bench.rows, masked=False)))


def padding_in_positions(bench: Bench) -> Pairs:
    return pairs_of((bench.rows, faults.padded_scores(bench.model, bench.rows, masked=True)))


def window(bench: Bench) -> Pairs:
    return pairs_of((bench.rows, faults.windowed_scores(bench.model, bench.rows, 32)))


def one_token_late(bench: Bench) -> Pairs:
    rows, right = bench.sound
    return pairs_of((rows, faults.shifted(right, 1)))


def one_token_early(bench: Bench) -> Pairs:
    rows, right = bench.sound
    return pairs_of((rows, faults.shifted(right, -1)))


def tokenized_again(bench: Bench) -> Pairs:
    ids = np.random.default_rng(bench.seed).integers(8, faults.MODEL["vocab"], (600, 3)).tolist()
    pairs = {(first, second): merged for first, second, merged in ids}
    return pairs_of((bench.rows, faults.retokenized_scores(bench.model, bench.rows, pairs)))


def swapped_shard(bench: Bench) -> Pairs:
    rows = faults.sample(faults.with_swapped_shard(bench.model), seed=bench.seed)
    return pairs_of((rows, scores(bench.model, rows)))


LARGE = [
    (engine_alone_at(0.7), "sampling"),
    (engine_alone_at(1.3), "sampling"),
    (trainer_alone_at(0.7), "sampling"),
    (top_k, "sampling"),
    (top_p, "sampling"),
    (stale, "stale_weights"),
    (padding_attended, "padding"),
    (window, "position"),
    (one_token_late, "alignment"),
    (one_token_early, "alignment"),
    (tokenized_again, "tokenization"),
    (swapped_shard, "wrong_weights"),
]
"""Seen through the rounding of bfloat16, too."""
SMALL = [
    (old_prompts, "prefix_cache"),
    (coarser_engine, "precision"),
    (coarser_softmax, "precision"),
]
NAMES = ["engine 0.7", "engine 1.3", "trainer 0.7", *(fault.__name__ for fault, _ in LARGE[3:])]


@pytest.mark.parametrize(("fault", "kind"), LARGE, ids=NAMES)
def test_a_fault_is_named(bench: Bench, fault: Callable[[Bench], Pairs], kind: str) -> None:
    pairs = fault(bench)
    for each in (FLOAT32, BFLOAT16):
        found = diagnose(pairs, each)
        assert found.verdict == "cause" and found.causes[0].kind == kind, found


@pytest.mark.parametrize(("fault", "kind"), SMALL, ids=[fault.__name__ for fault, _ in SMALL])
def test_a_small_fault_is_named_in_float32(
    bench: Bench, fault: Callable[[Bench], Pairs], kind: str
) -> None:
    found = diagnose(fault(bench), FLOAT32)
    assert found.verdict == "cause" and found.causes[0].kind == kind, found


def test_padding_in_positions_is_named(bench: Bench) -> None:
    found = diagnose(padding_in_positions(bench), FLOAT32)
    assert found.causes[0].kind == "padding", found


def test_tokens_that_go_to_other_experts_are_named(tmp_path: Path) -> None:
    family = {"family": "qwen3_moe", "experts": 8, "experts_per_token": 1}
    model = faults.load(tmp_path, **family)
    rows = faults.sample(faults.in_bfloat16(model))
    found = diagnose(pairs_of((rows, scores(model, rows))), Settings("bfloat16", experts=True))
    assert found.verdict == "cause" and found.causes[0].kind == "routing", found


def same_sides(bench: Bench) -> tuple[Pairs, Settings]:
    return pairs_of(bench.sound), FLOAT32


def sound_steps(bench: Bench) -> tuple[Pairs, Settings]:
    rows = faults.sample(bench.updated, seed=bench.seed + 1)
    return pairs_of(bench.sound, (rows, scores(bench.updated, rows))), FLOAT32


def both_in_bfloat16(bench: Bench) -> tuple[Pairs, Settings]:
    rows = faults.sample(bench.rounded, seed=bench.seed)
    # In other batches: other sizes of matrices, other orders of sums.
    complete, starts = rows.complete, [len(prompt) for prompt in rows.prompts]
    alone: Scores = []
    for first in range(0, len(complete), 8):
        part = slice(first, first + 8)
        alone += scores(bench.rounded, complete[part], starts[part])
    return pairs_of((rows, alone)), BFLOAT16


def one_in_bfloat16(bench: Bench) -> tuple[Pairs, Settings]:
    return coarser_engine(bench), BFLOAT16


def rounded_softmax(bench: Bench) -> tuple[Pairs, Settings]:
    return coarser_softmax(bench), BFLOAT16


def both_tempered(bench: Bench) -> tuple[Pairs, Settings]:
    warp = faults.tempered(0.7)
    rows = faults.sample(bench.model, seed=bench.seed, warp=warp)
    trained = scores(bench.rounded, rows, warp=warp)
    return pairs_of((rows, trained)), Settings("bfloat16", temperature=0.7)


def configured_top_k(bench: Bench) -> tuple[Pairs, Settings]:
    return top_k(bench), Settings("float32", top_k=5)


HEALTHY = (
    same_sides,
    sound_steps,
    both_in_bfloat16,
    one_in_bfloat16,
    rounded_softmax,
    both_tempered,
    configured_top_k,
)


@pytest.mark.parametrize("sides", HEALTHY)
def test_sound_pairs_are_healthy(
    bench: Bench, sides: Callable[[Bench], tuple[Pairs, Settings]]
) -> None:
    found = diagnose(*sides(bench))
    assert found.verdict == "healthy", found
    assert [cause.expected for cause in found.causes] in ([], [True])


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    relative=st.floats(0, 1),
    size=st.floats(0, 0.5),
    precision=st.sampled_from(["float32", "bfloat16"]),
    tokens=st.integers(1, 60),
)
def test_noise_within_rounding_is_no_cause(
    seed: int, relative: float, size: float, precision: Any, tokens: int
) -> None:
    """Of any share that grows with the log-prob, of rows of any length, of any confidence."""
    rng = np.random.default_rng(seed)
    count = 16 * tokens
    given_settings = Settings(precision)
    trainer = -rng.gamma(rng.uniform(0.1, 2), rng.uniform(0.1, 3), count)
    scale = 1 - relative + relative * np.abs(trainer) / max(np.abs(trainer).mean(), 1.0)
    noise = rng.normal(size=count) * scale * size * given_settings.limit
    place = np.tile(np.arange(tokens), 16)
    prompt = np.repeat(rng.integers(1, 50, 16), tokens)
    row, version = np.repeat(np.arange(16), tokens), np.repeat(np.arange(16) // 8, tokens)
    pairs = Pairs(
        trainer + noise,
        trainer,
        row,
        place + prompt,
        row * 0,
        prompt,
        prompt + tokens,
        version,
        version,
    )
    found = diagnose(pairs, given_settings)
    assert found.verdict == "healthy" and not found.causes, found


def test_older_tokens_are_not_judged(bench: Bench) -> None:
    """What training has changed since is no fault; without others nothing can be said."""
    pairs = stale(bench)
    older = np.where(pairs.trained == 1, 0, pairs.written)
    columns = {name: getattr(pairs, name) for name in faults.ARRAYS} | {"written": older}
    aged = Pairs(**columns)
    found = diagnose(aged, FLOAT32)
    assert found.verdict == "healthy" and found.judged == (aged.age == 0).sum()
    assert diagnose(aged.where(aged.age == 1), FLOAT32).verdict == "unknown"


def test_old_weights_without_the_first_policy_are_a_guess(bench: Bench) -> None:
    pairs = stale(bench)
    (cause,) = diagnose(pairs.where(pairs.trained == 1), FLOAT32).causes
    assert cause.kind == "stale_weights" and cause.score < 0.5


def test_numbers_that_are_not_finite_are_named_first(bench: Bench) -> None:
    sound = pairs_of(bench.sound)
    columns = {name: getattr(sound, name) for name in faults.ARRAYS}
    found = diagnose(Pairs(**columns, not_finite=3), FLOAT32)
    assert found.verdict == "cause" and found.causes[0].kind == "not_finite"


def test_one_engine_of_two_with_old_weights_leaves_sound_rows(bench: Bench) -> None:
    old, new = (faults.sample(model, 32, bench.seed + 1) for model in (bench.model, bench.updated))
    rows = faults.joined(old, new)
    found = diagnose(pairs_of(bench.sound, (rows, scores(bench.updated, rows))), FLOAT32)
    assert found.causes[0].kind == "stale_weights"
    assert "50 % of the later rows are sound" in found.causes[0].evidence


def test_a_few_tokens_without_a_shape_are_said_to_have_none(bench: Bench) -> None:
    pairs = pairs_of(bench.sound)
    columns = {name: getattr(pairs, name) for name in faults.ARRAYS}
    places = np.random.default_rng(0).choice(len(pairs), 12, replace=False)
    columns["trainer"] = pairs.trainer.copy()
    columns["trainer"][places] += np.resize([3.0, -3.0], 12)
    assert diagnose(Pairs(**columns), BFLOAT16).causes[0].kind == "outliers"

"""The canary: engine and trainer score the same few tokens after a weight sync, and must agree.

Invariant: nothing is published whose log-probs differ from the trainer's by more than the limit, or
that would still answer from a prefix cache of older weights.
Runs in: driver.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice

from torch import Tensor

from rlhf3d.batching.batch import from_sequences
from rlhf3d.config.schema import RolloutConfig
from rlhf3d.data.dataset import Prompt
from rlhf3d.observability.mismatch.rounding import ROUNDING_LIMIT, coarsest
from rlhf3d.placement.rollout_group import RolloutGroup
from rlhf3d.placement.train_group import TrainGroup

CANARY_PROMPTS = 4
_PHASE = "sync_weights (canary)"
_TRY = (
    "Try rollout.dtype=float32 and model.dtype=float32, without rollout.quantization: where they "
    "agree then, it was rounding, and rollout.canary_max_abs_diff may be raised; else the engine "
    "lacks the trained weights: report this"
)
_NOT_FINITE = (
    "The weights are not finite: look at those it began with (`rlhf3d inspect MODEL --deep`), "
    "or lower actor.optim.lr"
)


class CanaryError(RuntimeError):
    """Engine and trainer disagree about the same tokens under what should be the same weights."""


def canary_tokens(prompts: Iterable[Prompt]) -> list[Sequence[int]]:
    """The first prompts, each of at least two tokens: the first token has no prediction."""
    ids = [prompt.prompt_ids for prompt in islice(prompts, CANARY_PROMPTS)]
    return [tokens if len(tokens) > 1 else tokens * 2 for tokens in ids]


class Canary:
    """Token sequences that both sides score."""

    def __init__(
        self,
        config: RolloutConfig,
        model_dtype: str,
        tokens: Sequence[Sequence[int]],
        actor: TrainGroup,
        rollout: RolloutGroup,
    ) -> None:
        """`model_dtype`: in which the actor computes."""
        self._config, self._actor, self._rollout = config, actor, rollout
        self._tokens = [list(sequence) for sequence in tokens]
        limit = config.canary_max_abs_diff
        rounding = ROUNDING_LIMIT[coarsest(model_dtype, config.dtype, config.quantization)]
        self.limit = rounding if limit is None else limit

    def due(self, sync: int) -> bool:
        """Whether sync number `sync` is checked: the first ones, then every so often."""
        every = self._config.canary_every
        return sync < self._config.canary_steps or (every > 0 and sync % every == 0)

    def check(self, version: int) -> float:
        """The largest mean |difference| of an engine; CanaryError where one is over the limit.

        `version` is what the engines have loaded and not published yet.
        """
        # The trainer first: the engines' caches may still be asleep; the first request wakes them.
        trained = self._trained_logprobs()
        # Then the prefix cache, before the canary's own prompts go into it.
        self._check_prefix_cache(version)
        return self._check_logprobs(version, trained)

    def _trained_logprobs(self) -> Tensor:
        """The trainer's log-probs of the tokens after the first."""
        # Token 0 has no prediction: it plays the prompt, the rest the response.
        firsts = [tokens[:1] for tokens in self._tokens]
        rests = [tokens[1:] for tokens in self._tokens]
        # Any pad id will do: padding is masked.
        batch = from_sequences(firsts, rests, pad_id=0)
        # This pass is no part of a training step, which has its padding among its metrics.
        outputs = self._actor.forward(_PHASE, "actor", batch, measure_padding=False)
        return outputs["logprobs"]

    def _check_prefix_cache(self, version: int) -> None:
        for number, cached in enumerate(self._rollout.cached_tokens()):
            if cached:
                raise CanaryError(
                    f"after the sync of policy {version}, engine {number} still took {cached} "
                    "tokens of a prompt from its prefix cache, computed with older weights: report "
                    "it"
                )

    def _check_logprobs(self, version: int, trained: Tensor) -> float:
        worst = 0.0
        scores = self._rollout.score(self._tokens, self._config.temperature)
        for number, engine in enumerate(scores):
            diffs = _differences(trained, engine)
            mean = sum(diffs) / len(diffs)
            if not mean <= self.limit:  # written so that NaN is a disagreement
                advice = _TRY if math.isfinite(mean) else _NOT_FINITE
                raise CanaryError(
                    f"after the sync of policy {version}, engine {number} and the trainer give "
                    f"the same {len(diffs)} tokens log-probs that differ by {mean:.3g} on average "
                    f"(limit {self.limit:g}). {advice}"
                )
            worst = max(worst, mean)
        return worst


def _differences(trained: Tensor, engine: Sequence[Sequence[float]]) -> list[float]:
    """|difference| of each token; the trainer's rows are padded, the engine's are not."""
    diffs: list[float] = []
    for row, scores in zip(trained.tolist(), engine, strict=True):
        # Both are of tokens 1, 2, … of a sequence.
        own = row[: len(scores)]
        diffs += [abs(a - b) for a, b in zip(own, scores, strict=True)]
    return diffs

"""An optimizer step with a NaN in one sequence.

No rank takes it, and every rank says which sequence and term.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engines import join
from support.ranks import run_ranks
from support.tiny_models import make_tiny_model

from rlhf3d.algorithms.losses import PolicyLossSettings
from rlhf3d.batching.batch import Batch, from_sequences
from rlhf3d.batching.dispatch import split_update
from rlhf3d.batching.micro import MicroBatching, UpdatePlan
from rlhf3d.config.schema import OptimConfig
from rlhf3d.parallel.layout import ParallelLayout

BROKEN = 6
pytestmark = pytest.mark.usefixtures("megatron")
LAYOUTS = [ParallelLayout(pp=2), ParallelLayout(dp=2)]


def make_batch() -> Batch:
    """Two mini-batches of four; the reference's log-prob of the second one's sequence 6 is NaN."""
    rng = torch.Generator().manual_seed(0)
    responses = [
        torch.randint(4, 100, (n,), generator=rng).tolist() for n in (3, 5, 2, 4, 4, 1, 3, 5)
    ]
    batch = from_sequences([[7, 8]] * 8, responses, pad_id=0)
    shape = batch["response_mask"].shape
    ref_logprobs = torch.full(shape, -4.5)
    ref_logprobs[BROKEN, 1] = float("nan")
    return batch.with_columns(
        old_logprobs=torch.full(shape, -4.8),
        ref_logprobs=ref_logprobs,
        advantages=torch.randn(shape, generator=rng),
        sequence=torch.arange(8),
    )


def update(rank: int, port: int, layout: ParallelLayout, folder: Path) -> dict:
    """Update with a broken mini-batch: skipped, absent, and ending in an error.

    And with all in one mini-batch, whose pass gives the old log-probs.
    """
    from rlhf3d.algorithms.objectives import PolicyObjective
    from rlhf3d.engine.megatron_engine import EngineContext, MegatronEngine

    stopping = join(rank, port, folder, layout)
    objective = PolicyObjective("vanilla", PolicyLossSettings(), "token-mean", kl_loss_coef=0.1)
    plan = UpdatePlan(2, 4, MicroBatching(rows=2), None, 1)
    share = split_update(make_batch(), plan, layout, 5, float)[layout.coords(rank).dp]

    def run(context: EngineContext, minis: list, share=share, objective=objective) -> tuple:
        engine = MegatronEngine(context, "policy", str(folder), OptimConfig(lr=1e-3))
        result = engine.update(make_batch().select(share.rows), minis, objective)
        return result, [tensor.clone() for _, _, tensor in engine.export_pieces()]

    skipping = replace(stopping, skip_nonfinite=True)
    skipped, weights = run(skipping, share.mini_batches)
    whole, expected = run(stopping, share.mini_batches[:1])
    try:
        run(stopping, share.mini_batches)
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    once = replace(plan, sequences_per_mini_batch=8, mini_batches=1)
    share = split_update(make_batch(), once, layout, 5, float)[layout.coords(rank).dp]
    itself = replace(objective, old_is_current=True)
    own, _ = run(skipping, share.mini_batches, share, itself)
    return {
        "own": (own.skipped, own.logprobs),
        "last": layout.coords(rank).pp == layout.pp - 1,
        "texts": skipped.skipped,
        "same": all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True)),
        "shares": (skipped.shares, whole.shares),
        "grad_norms": (skipped.grad_norm, whole.grad_norm),
        "error": error,
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_rank_takes_the_step(layout: ParallelLayout, tmp_path: Path) -> None:
    results = run_ranks(2, update, layout, make_tiny_model(tmp_path / "m"))
    texts = {text for result in results for text in result["texts"]}
    assert len(texts) == 1 and all(len(result["texts"]) == 1 for result in results), (
        "one text, on every rank"
    )
    (text,) = texts
    assert f"sequence {BROKEN} (ref_logprobs)" in text and "actor/kl_loss, actor/loss" in text
    for result in results:
        (own_text,), logprobs = result["own"]
        assert f"sequence {BROKEN} (ref_logprobs)" in own_text
        assert (logprobs is not None) == result["last"], "log-probs of a step that was left out too"
        assert logprobs is None or (logprobs < 0).any(-1).all()
        assert result["same"] and result["shares"][0] == result["shares"][1]
        assert result["grad_norms"][0] == result["grad_norms"][1] > 0
        assert result["error"] == text

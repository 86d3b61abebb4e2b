"""An update of actor and critic gives the same numbers in every layout and batching.

The numbers are loss, gradient norm and weights.

Every layout runs clipped PPO and the critic, and PPO on tokens of older versions with one of the
choices of the old policy, and PPO whose one optimizer step takes the old log-probs from its own
forward pass. A sample of them runs every policy loss and
aggregation, padded and packed, by number and by budget, over ranks that do not divide the rows, and
trajectories of several rows against the same trajectories as single rows.
Advantages are data here: the driver computes them over the complete batch.

`make test` runs each pair of settings of a layout, and each pair of layout, batching and algorithm;
`make test-all` runs all combinations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairs import layout_settings, pairs_of_settings
from support.ranks import run_ranks
from support.tiny_models import make_tiny_model
from support.updates import (
    PPO,
    SEQUENCES,
    SETTINGS,
    TEMPERATURE,
    Case,
    Update,
    assemble,
    compare,
    make_batch,
    make_stale,
    make_turns,
    one_process,
    run_updates,
)

from rlhf3d.algorithms.aggregation import AGGREGATION_MODES
from rlhf3d.algorithms.kl import KL_KINDS
from rlhf3d.algorithms.losses import POLICY_LOSSES
from rlhf3d.algorithms.objectives import PolicyObjective, ValueObjective
from rlhf3d.batching.batch import Batch
from rlhf3d.batching.micro import MicroBatching

pytestmark = pytest.mark.usefixtures("megatron")


def every_algorithm() -> dict[str, PolicyObjective | ValueObjective]:
    """Each policy loss, each aggregation (of both models) and as many KL estimators, by name."""
    modes, kinds = cycle(AGGREGATION_MODES), cycle(KL_KINDS)
    chosen = [(loss, next(modes)) for loss in POLICY_LOSSES.names()]
    chosen += [("vanilla", mode) for mode in AGGREGATION_MODES if ("vanilla", mode) not in chosen]
    policies = [
        PolicyObjective(loss, SETTINGS, mode, 0.01, 0.1, next(kinds)) for loss, mode in chosen
    ]
    objectives: dict[str, PolicyObjective | ValueObjective] = {
        f"{p.loss_name} {p.loss_agg_mode} {p.kl_loss_type}": p for p in policies
    }
    objectives |= {f"value {mode}": ValueObjective(0.2, mode) for mode in AGGREGATION_MODES[:2]}
    by_trajectory = "seq-mean-token-mean"
    return objectives | {
        f"{TURNS} gspo": PolicyObjective("gspo", SETTINGS, by_trajectory, 0.01, 0.1, "k3"),
        f"{TURNS} vanilla": PolicyObjective("vanilla", SETTINGS, by_trajectory, 0.01, 0.1, "k3"),
        f"{TURNS} value": ValueObjective(0.2, by_trajectory),
    }


TURNS = "turns"
"""Algorithms whose name begins so get trajectories with observations; the reference as single rows,
the layouts cut into several rows each.
"""


def rule_of(rule: MicroBatching, name: str) -> MicroBatching:
    """The batching of an algorithm: all rows of a trajectory must be within the budget for GSPO."""
    if rule.tokens is None or not name.startswith(TURNS):
        return rule
    return replace(rule, tokens=64)


CASES = [
    Case(tp=2),
    Case(pp=2, micro_batch_size=4, recompute="full"),
    Case(dp=2, distributed_optimizer=False),
    Case(dp=4, overlap=True),
    Case(pp=4),
    Case(pp=2, vpp=2),
    Case(pp=2, dp=2, overlap=True, gather=True, offload=True),
    Case(tp=2, pp=2, dp=2, sp=True, micro_batch_size=1, recompute="selective"),
    Case(tp=2, pp=2, dp=2, vpp=2, sp=True, distributed_optimizer=False),
    Case(tp=3, pp=2, model="heads9"),
    Case(tp=1, pp=1, model="heads9"),
    Case(dp=2, ep=2, overlap=True, gather=True, model="experts"),
    Case(tp=2, sp=True, recompute="selective", model="experts"),
    Case(tp=2, dp=2, ep=2, sp=True, distributed_optimizer=False, model="experts", offload=True),
    Case(tp=2, pp=2, dp=2, ep=4, sp=True, micro_batch_size=1, recompute="full", model="experts"),
    Case(cp=4, recompute="full"),
    Case(tp=2, pp=2, cp=2, sp=True, overlap=True, gather=True),
    Case(cp=2, dp=2, pp=2, vpp=2, distributed_optimizer=False),
    Case(cp=2, dp=2, ep=4, model="experts"),
]
FULL_CASES = [
    Case(micro_batch_size=16),
    Case(tp=2, sp=True, micro_batch_size=1),
    Case(pp=2),
    Case(tp=2, pp=2, dp=1),
    Case(tp=2, dp=2, sp=True),
    Case(tp=2, pp=2, dp=2),
    Case(cp=2),
]
"""Each of their pairs of settings is in `CASES` as well."""


BATCHING_CASES = [
    Case(dp=3, micro_batch_size=2, recompute="full", model="two layers"),
    Case(pp=2, dp=2, vpp=2, overlap=True, micro_batch_size=3),
    Case(tp=2, dp=2, ep=2, sp=True, micro_batch_size=3, model="experts"),
    Case(tp=2, pp=2, dp=2, sp=True, micro_batch_size=3, model="two layers"),
    Case(tp=2, dp=2, cp=2, sp=True, micro_batch_size=3, model="two layers"),
]


GPU_SET = [
    Case(tp=2, pp=2, dp=2, sp=True, micro_batch_size=1, recompute="selective"),
    Case(pp=2, dp=2, overlap=True, gather=True, offload=True),
    Case(tp=2, dp=2, ep=2, sp=True, distributed_optimizer=False, model="experts", offload=True),
    Case(cp=2, dp=2, pp=2, vpp=2, distributed_optimizer=False),
]
"""Of both lists, those that the GPU set's Megatron is tested with as well: each way to cut a model,
each optimizer, each overlap.
"""
GPU_SET_FULL = [
    Case(pp=4),
    Case(tp=2, pp=2, dp=2, vpp=2, sp=True, distributed_optimizer=False),
    Case(pp=2, dp=2, vpp=2, overlap=True, micro_batch_size=3),
]


def parameters(cases: list[Case], full: bool = False) -> list[Any]:
    made = []
    for case in cases:
        marks = [pytest.mark.full] * full + [pytest.mark.gpu_set] * (case in GPU_SET)
        marks += [pytest.mark.gpu_set_full] * (case in GPU_SET_FULL)
        made.append(pytest.param(case, id=str(case), marks=marks))
    return made


def settings_of(case: Case) -> dict[str, Any]:
    own = {"offload": case.offload, "experts": case.model == "experts"}
    return layout_settings(case.layout_config) | own


def test_no_pair_of_settings_is_left_to_the_full_run() -> None:
    left_out, made = map(settings_of, FULL_CASES), map(settings_of, CASES)
    assert pairs_of_settings(left_out) <= pairs_of_settings(made)


def batchings(case: Case) -> dict[str, MicroBatching]:
    """Fixed, by budget, packed, and with prefixes once.

    Ranks need different numbers of micro-batches for their rows.
    """
    rules = {
        "fixed": case.fixed,
        "budget": replace(case.fixed, tokens=24),
        "packed": replace(case.fixed, tokens=40, packed=True),
        # Context-parallel ranks share none: there it is `packed` again.
        "shared": replace(case.fixed, tokens=40, packed=True, share_prefixes=case.cp == 1),
    }
    if case.tp > 1:
        return rules
    return {
        **rules,
        "packed fixed": replace(case.fixed, packed=True),
        "shared fixed": replace(case.fixed, share_prefixes=True),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tied models of 4 heads, one of SmolLM2's 9 heads and 3 KV heads, a mixture of experts.

    Each has as few layers as its layouts need: a layer for each chunk of a pipeline.
    """
    root = tmp_path_factory.mktemp("models")
    return {
        "heads4": make_tiny_model(root / "h4", heads=4, kv_heads=2, layers=4),
        "two layers": make_tiny_model(root / "two", heads=4, kv_heads=2, layers=2),
        "heads9": make_tiny_model(
            root / "h9", heads=9, kv_heads=3, hidden=72, ffn=96, vocab=120, layers=4
        ),
        "experts": make_tiny_model(
            root / "moe", "qwen3_moe", tie=False, layers=2, vocab=115, norm_topk_prob=False
        ),
    }


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, dict]:
    """The update of PPO, and those of an off-policy batch."""
    found = {}
    for model in {case.model for case in [*CASES, *FULL_CASES]}:
        found[model] = one_process(folders[model], PPO, SEQUENCES // 2)
        # What is recomputed before an update is this model's, in one process.
        batches = stale_batches(found[model])
        objectives = dict.fromkeys(batches, PPO["policy"])
        found[model] |= one_process(folders[model], objectives, SEQUENCES // 2, batches)
        found[model] |= one_process(folders[model], {OWN: ITSELF}, SEQUENCES)
    return found


BYPASS, RECOMPUTED = "stale, bypass", "stale, recomputed"
OWN = "its own old policy"
ITSELF = replace(PPO["policy"], old_is_current=True)
CUTS, SIZES = ("vpp", "sp", "overlap", "offload"), ("tp", "pp", "dp", "cp", "ep")


def choice_of(case: Case) -> str:
    """The choice of the old policy that a case has: cases share them out."""
    return (BYPASS, RECOMPUTED)[[*CASES, *FULL_CASES].index(case) % 2]


def test_both_choices_of_the_old_policy_meet_every_cut() -> None:
    met = {(name, choice_of(case)) for case in CASES for name in CUTS if getattr(case, name)}
    met |= {(name, choice_of(case)) for case in CASES for name in SIZES if getattr(case, name) > 1}
    assert met == {(name, choice) for name in (*CUTS, *SIZES) for choice in (BYPASS, RECOMPUTED)}


def stale_batches(reference: dict[str, dict]) -> dict[str, Callable[[], Batch]]:
    """Both choices of the old policy of tokens that older versions wrote."""
    proximal = reference["policy"]["outputs"]["logprobs"]
    return {BYPASS: make_stale, RECOMPUTED: partial(make_stale, proximal)}


@pytest.mark.parametrize("case", [*parameters(CASES), *parameters(FULL_CASES, full=True)])
def test_same_update_in_every_layout(
    case: Case, folders: dict[str, Path], references: dict[str, dict]
) -> None:
    reference = references[case.model]
    updates = {role: Update(case.fixed, objective) for role, objective in PPO.items()}
    name, batches = choice_of(case), stale_batches(reference)
    updates[name] = Update(case.fixed, PPO["policy"], make_batch=batches[name], after=False)
    updates[OWN] = Update(case.fixed, ITSELF, SEQUENCES, after=False)
    results = run_ranks(case.layout.world_size, run_updates, case, folders[case.model], updates)
    for name in updates:
        ours = assemble(case, results, name)
        metric, norm, weight = compare(ours, reference[name])
        if name == OWN:
            assert torch.equal(ours["own"], ours["outputs"]["logprobs"]), "its pass is the phase's"
        print(
            f"LAYOUT {case} {name}: metrics {metric:.1e} grad-norm {norm:.1e} weights {weight:.1e}"
        )


OWN_CASES = [
    pytest.param(Case(micro_batch_size=3), id="one rank"),
    *parameters([case for case in BATCHING_CASES if case.vpp]),
    *parameters([case for case in BATCHING_CASES if not case.vpp], full=True),
]


@pytest.mark.parametrize("case", OWN_CASES)
def test_one_optimizer_step_needs_no_phase_for_the_old_log_probs(
    case: Case, folders: dict[str, Path]
) -> None:
    """The same update bit by bit with those of its own pass, in every batching."""
    updates, made = {}, {"rows": make_batch, "turns": partial(make_turns, True)}
    for batching, rule in batchings(case).items():
        for rows, batch in made.items():
            whole = rule_of(rule, TURNS)
            updates[batching, rows, OWN] = Update(whole, ITSELF, SEQUENCES, batch, after=False)
            phase = Update(whole, PPO["policy"], SEQUENCES, batch, recompute=True, after=False)
            updates[batching, rows, "phase"] = phase
    results = run_ranks(case.layout.world_size, run_updates, case, folders[case.model], updates)
    for batching, rows, name in updates:
        if name != OWN:
            continue
        own = assemble(case, results, (batching, rows, OWN))
        phase = assemble(case, results, (batching, rows, "phase"))
        assert own["metrics"] == phase["metrics"] and own["grad_norm"] == phase["grad_norm"]
        assert all(own["weights"][n].equal(tensor) for n, tensor in phase["weights"].items())
        assert torch.equal(own["own"], phase["outputs"]["logprobs"])
        assert own["metrics"]["actor/ppo_kl"] == 0 < own["grad_norm"]


def test_either_choice_of_the_old_policy_sees_that_tokens_are_old(
    references: dict[str, dict],
) -> None:
    """The clip bites in bypass mode; recomputed, weights do what the clip then leaves undone."""
    bypass, recomputed = (references["heads4"][name] for name in (BYPASS, RECOMPUTED))
    assert bypass["metrics"]["actor/pg_clipfrac"] > 0.2
    assert recomputed["metrics"]["actor/pg_clipfrac"] < 0.05
    weights = stale_batches(references["heads4"])[RECOMPUTED]()["rollout_is_weights"]
    assert (weights == 2).any() and ((weights > 0) & (weights < 0.5)).any()
    assert f"{bypass['grad_norm']:.3g}" != f"{recomputed['grad_norm']:.3g}"


def test_the_update_moves_the_weights(
    folders: dict[str, Path], references: dict[str, dict]
) -> None:
    for role in PPO:
        before, after = references["heads4"][role]["outputs"], references["heads4"][role]["after"]
        assert all(float((before[name] - after[name]).abs().max()) > 1e-3 for name in before)


INCOMPLETE = 11  # sequences of the first mini-batch; the second has the 5 that are left


@pytest.fixture(scope="module")
def algorithm_references(folders: dict[str, Path]) -> dict[str, dict]:
    """The update of every algorithm, in mini-batches that nothing divides."""
    models = {case.model for case in BATCHING_CASES}
    algorithms = every_algorithm()
    turns = {name: partial(make_turns, False) for name in algorithms if name.startswith(TURNS)}
    return {model: one_process(folders[model], algorithms, INCOMPLETE, turns) for model in models}


def combinations_of(case: Case, everything: bool) -> list[tuple[str, str]]:
    """(batching, algorithm): all of a case, or what is left when cases share them out.

    Cases with the same batchings do, so each algorithm meets each batching, and each layout.
    """
    rules, chosen = list(batchings(case)), []
    peers = [other for other in BATCHING_CASES if list(batchings(other)) == rules]
    for number, name in enumerate(every_algorithm(), start=peers.index(case)):
        of_this = rules if everything else rules[number % len(peers) :: len(peers)]
        chosen += [(batching, name) for batching in of_this]
    return chosen


def test_every_algorithm_meets_every_batching() -> None:
    made: set[tuple[str, str]] = set()
    everything: set[tuple[str, str]] = set()
    for case in BATCHING_CASES:
        made.update(combinations_of(case, everything=False))
        everything.update(combinations_of(case, everything=True))
    assert made == everything


EVERYTHING = [
    pytest.param(False, id="pairs"),
    pytest.param(True, id="everything", marks=pytest.mark.full),
]


@pytest.mark.parametrize("everything", EVERYTHING)
@pytest.mark.parametrize("case", parameters(BATCHING_CASES))
def test_same_update_in_every_batching(
    case: Case, everything: bool, folders: dict[str, Path], algorithm_references: dict[str, dict]
) -> None:
    rules, objectives = batchings(case), every_algorithm()
    updates = {}
    for batching, name in combinations_of(case, everything):
        rule, batch = rule_of(rules[batching], name), make_batch
        if name.startswith(TURNS):
            batch = partial(make_turns, True)
        updates[batching, name] = Update(rule, objectives[name], INCOMPLETE, batch, after=False)
    results = run_ranks(case.layout.world_size, run_updates, case, folders[case.model], updates)
    for (batching, name), update in updates.items():
        # A sum of numbers that cancel is rounded like its terms, as many as sequences or more.
        terms = SEQUENCES if update.objective.loss_agg_mode == "token-sum" else 1
        ours = assemble(case, results, (batching, name))
        theirs = algorithm_references[case.model][name]
        metric, norm, weight = compare(ours, theirs, terms=terms)
        errors = f"metrics {metric:.1e} grad-norm {norm:.1e} weights {weight:.1e}"
        print(f"BATCHING {case} {batching} {name}: {errors}")


def test_log_probs_behind_observations_are_those_of_transformers(
    folders: dict[str, Path], algorithm_references: dict[str, dict]
) -> None:
    """Of every sampled token, in every turn."""
    from transformers import AutoModelForCausalLM

    batch = make_turns(False)
    model = AutoModelForCausalLM.from_pretrained(folders["two layers"], dtype=torch.float32)
    ours = algorithm_references["two layers"][f"{TURNS} vanilla"]["outputs"]["logprobs"]
    behind = 0
    for row, ids in enumerate(batch["input_ids"]):
        length = batch.lengths()[row]
        with torch.no_grad():
            logits = model(ids[None, :length]).logits[0] / TEMPERATURE
        logprobs = logits[:-1].log_softmax(-1).gather(1, ids[1:length, None])[:, 0]
        theirs = logprobs[int(batch["prompt_lengths"][row]) - 1 :]
        sampled = batch["response_mask"][row].bool()
        assert torch.allclose(ours[row][sampled], theirs[sampled[: len(theirs)]], atol=2e-5)
        observed = (1 - batch["response_mask"][row]).cumsum(0)
        behind += int((sampled & (observed > 0)).sum())
    assert behind > 20


def test_algorithms_differ(algorithm_references: dict[str, dict]) -> None:
    """Else one of them would stand for all."""
    norms = [result["grad_norm"] for result in algorithm_references["two layers"].values()]
    assert len({f"{norm:.4g}" for norm in norms}) == len(norms)

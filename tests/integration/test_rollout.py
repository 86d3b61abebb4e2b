"""Real vLLM, fed by the weight stream.

Its log-probs are those of the new weights, and faults are refused.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.rollout_rig import (
    PROMPT_TOKENS,
    Rig,
    begin_steps_ahead,
    break_prefix_reset,
    close_engine,
    norm_kernels,
    policy_version,
    resident_mib,
    start_engine,
    wait_all,
)
from support.tiny_models import YARN_ROPE, make_tiny_tokenizer

from rlhf3d.resharding.ring import SyncError
from rlhf3d.rollout.api import (
    Completion,
    Request,
    SamplingSettings,
    Stops,
    token_versions,
)


@pytest.fixture(scope="module")
def children() -> Iterator[list[ProcessPoolExecutor]]:
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=context) as first,
        ProcessPoolExecutor(1, mp_context=context) as second,
    ):
        yield [first, second]
        wait_all([child.submit(close_engine) for child in (first, second)])
        assert first.submit(close_engine).result() == []


@pytest.fixture(scope="module")
def child(children: list[ProcessPoolExecutor]) -> list[ProcessPoolExecutor]:
    return children[:1]


@pytest.fixture(scope="module")
def llama(child: list[ProcessPoolExecutor], tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Tied embeddings: the head is packed apart and must follow."""
    folder = tmp_path_factory.mktemp("llama")
    rig = Rig(child, folder, update="in_flight", family="llama", tie=True)
    with pytest.raises(RuntimeError, match="serves no policy yet"):
        rig.generate()
    with pytest.raises(RuntimeError, match="holds no policy yet"):
        rig.call("score", [(5, 6)])
    return rig


def test_tied_engine_follows_many_updates_without_growing(llama: Rig) -> None:
    for _ in range(3):
        report = llama.sync()
        assert report.received_bytes >= sum(4 * w.numel() for w in llama.model.parameters())
        llama.check()
        assert llama.children[0].submit(policy_version).result() == llama.version
    assert llama.children[0].submit(norm_kernels).result() == [["rlhf3d", "native"]] * 2
    before = llama.children[0].submit(resident_mib).result()
    for _ in range(20):
        llama.sync()
    assert llama.children[0].submit(resident_mib).result() - before < 10
    llama.check()


def test_temperature_and_greedy(llama: Rig) -> None:
    llama.sync()
    llama.check(temperature=0.7)
    pairs = llama.generate(greedy=True, temperature=0.7)
    for request, completion in pairs:
        tokens = (*request.prompt_ids, *completion.token_ids)
        with torch.no_grad():
            best = torch.log_softmax(
                llama.model(torch.tensor([tokens])).logits[0, PROMPT_TOKENS - 1 : -1], -1
            ).max(-1)
        assert best.indices.tolist() == list(completion.token_ids)
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), best.values, atol=1e-4, rtol=0
        )


def test_seeds_and_stops(llama: Rig) -> None:
    llama.sync()
    once, again, alone = llama.generate(8), llama.generate(8), llama.generate(1)
    assert [c.token_ids for _, c in once] == [c.token_ids for _, c in again]
    assert alone[0][1].token_ids == once[0][1].token_ids
    assert len({tuple(c.token_ids) for _, c in once}) > 1
    tokens = once[0][1].token_ids
    assert once[0][1].finish_reason == "length" and len(tokens) == 8
    _, stopped = llama.generate(1, stop_token_ids=(tokens[3],))[0]
    assert (
        stopped.finish_reason == "stop"
        and stopped.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    )
    with pytest.raises(ValueError, match="do not fit max_model_len=256"):
        llama.generate(1, max_tokens=200)


def test_loaded_but_unpublished_scores_only(llama: Rig) -> None:
    llama.perturb()
    llama.load()
    scored = llama.call("score", [tuple(range(5, 45))])
    torch.testing.assert_close(
        torch.tensor(scored[0]), llama.expected(tuple(range(5, 45))), atol=1e-4, rtol=0
    )
    with pytest.raises(RuntimeError, match="serves no policy yet"):
        llama.generate()


def enter_while_requests_run(rig: Rig, requests: Sequence[Request]) -> dict[int, Completion]:
    """Three versions write them; what is known of the last two before they are published."""
    rig.sync()
    first, asked = rig.version, dict(enumerate(requests))
    models = {first: copy.deepcopy(rig.model)}
    rig.slow_down(0.1)
    rig.call("submit", asked)
    submitted, published = rig.last_command, []
    for _ in range(2):
        rig.perturb()
        models[rig.version] = copy.deepcopy(rig.model)
        rig.take_steps(9)
        rig.load()
        # The canary, with requests that wait: of the new weights, and nothing of theirs moves.
        assert rig.call("cached_tokens") == 0
        for temperature in (1.0, 0.7):
            scored = rig.call("score", [requests[0].prompt_ids], temperature)[0]
            expected = rig.expected(tuple(requests[0].prompt_ids), temperature)
            torch.testing.assert_close(torch.tensor(scored), expected, atol=1e-4, rtol=0)
        rig.call("publish", rig.version)
        published.append(rig.last_command)
    rig.slow_down(0)
    made = rig.completions()
    assert sorted(made) == sorted(asked)
    # One token a step from the first: each version began with the step after its publication.
    begun = [rig.applied[command] - rig.applied[submitted] for command in published]
    longest = max(made.values(), key=lambda completion: len(completion.token_ids))
    assert longest.versions == ((0, first), (begun[0], first + 1), (begun[1], first + 2))
    for number, completion in made.items():
        tokens = (*asked[number].prompt_ids, *completion.token_ids)
        written = torch.tensor(token_versions(completion.versions, len(completion.token_ids)))
        got = torch.tensor(completion.logprobs)
        for version, rig.model in models.items():
            wanted = rig.expected(tokens, asked[number].sampling.temperature)[PROMPT_TOKENS - 1 :]
            own = written == version
            torch.testing.assert_close(got[own], wanted[own], atol=1e-4, rtol=0)
            assert own.all() or (got - wanted).abs()[~own].max() > 0.01, "others are of others"
    return made


def test_weights_enter_while_requests_run(llama: Rig) -> None:
    """Twelve requests in eight places: some have not begun when the first weights come."""
    lengths = [60] * 7 + [12] * 5
    requests = []
    for request, tokens in zip(llama.requests(12), lengths, strict=True):
        requests.append(replace(request, sampling=SamplingSettings(0.8, max_tokens=tokens)))
    made = enter_while_requests_run(llama, requests)
    for number, tokens in enumerate(lengths):
        assert made[number].finish_reason == "stop" or len(made[number].token_ids) == tokens
    assert made[11].oldest_version > made[0].oldest_version


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_goes_on_with_its_own_draws_after_new_weights(llama: Rig, ahead: bool) -> None:
    """The same weights come as another version: the tokens are those of an undisturbed run.

    A token that is lost, or drawn again, would show; so would one of a step under way (`ahead`).
    """
    llama.children[0].submit(begin_steps_ahead, ahead).result()
    llama.sync()
    alone, versions = llama.generate(6, max_tokens=60), [llama.version]
    llama.slow_down(0.1)
    llama.call("submit", dict(enumerate(request for request, _ in alone)))
    for _ in range(2):
        llama.take_steps(8)
        llama.version += 1
        llama.cut()
        llama.load()
        llama.call("publish", llama.version)
        versions.append(llama.version)
    llama.slow_down(0)
    made = llama.completions()
    for number, (_, undisturbed) in enumerate(alone):
        assert made[number].token_ids == undisturbed.token_ids
    assert max([version for _, version in one.versions] for one in made.values()) == versions
    llama.children[0].submit(begin_steps_ahead, False).result()


def test_what_runs_may_be_aborted_or_scored_only_while_it_waits(llama: Rig) -> None:
    llama.sync()
    llama.slow_down(0.1)
    llama.call("submit", dict(enumerate(llama.requests(3, max_tokens=60))))
    with pytest.raises(AssertionError, match="requests are running"):
        llama.call("score", [tuple(range(5, 45))])
    llama.perturb()
    llama.load()
    llama.call("abort", [1])
    llama.call("publish", llama.version)
    llama.slow_down(0)
    assert sorted(llama.completions()) == [0, 2]
    llama.check()


def test_stale_prefix_cache_shows(llama: Rig) -> None:
    llama.sync()
    llama.generate()
    assert llama.call("cached_tokens") > 0
    llama.sync()
    assert llama.call("cached_tokens") == 0
    llama.generate()
    llama.children[0].submit(break_prefix_reset).result()
    llama.sync()
    assert llama.call("cached_tokens") > 0
    # What runs would go on with its old keys and values, and the canary could not be asked.
    request = llama.requests(1, max_tokens=60)[0]
    llama.slow_down(0.1)
    llama.call("submit", {0: request})
    llama.take_steps(8)
    llama.perturb()
    llama.load()
    with pytest.raises(AssertionError, match="requests are running"):
        llama.call("cached_tokens")
    llama.call("publish", llama.version)
    llama.slow_down(0)
    made = llama.completions()[0]
    since = made.versions[1][0]
    expected = llama.expected((*request.prompt_ids, *made.token_ids))[PROMPT_TOKENS - 1 :]
    assert (torch.tensor(made.logprobs) - expected)[since:].abs().max() > 0.01


def test_faults_are_refused_with_the_tensors_name(
    child: list[ProcessPoolExecutor], tmp_path: Path
) -> None:
    rig = Rig(child, tmp_path, family="llama", tie=True)
    rig.sync()
    rig.check()
    name = "model.layers.1.mlp.down_proj.weight"
    outboxes = [outbox for sender in rig.senders for outbox in sender._near]
    for outbox in outboxes:  # dropped ops: their rows keep the old version
        outbox.copies = [[copy for copy in some if copy.tensor != name] for some in outbox.copies]
    rig.perturb()
    with pytest.raises(
        SyncError, match=rf"{re.escape(name)}\[.* is of policy version {rig.version - 1}"
    ):
        rig.load()
    with pytest.raises(RuntimeError, match="serves no policy yet"):
        rig.generate()
    with pytest.raises(RuntimeError, match="cannot publish"):
        rig.call("publish", rig.version)
    # An engine that was started again holds nothing and takes nothing.
    rig.children[0].submit(start_engine, tmp_path).result()
    rig.commands = itertools.count(1)
    with pytest.raises(RuntimeError, match="serves no policy yet"):
        rig.generate()
    with pytest.raises(RuntimeError, match="started again"):
        rig.call("update_weights", rig.version, rig.syncs)


def test_untied_qwen2_follows_two_updates(child: list[ProcessPoolExecutor], tmp_path: Path) -> None:
    """With YaRN, and with what ends its completions."""
    strings = (*"abcd", "<|unk|>")
    rig = Rig(child, tmp_path, Stops((50,), strings), family="qwen2", tie=False, rope=YARN_ROPE)
    for _ in range(2):
        rig.sync()
        rig.check()
    rig.slow_down(0.5)  # so that none of them ends before the next line
    rig.call("submit", dict(enumerate(rig.requests(max_tokens=100))))
    with pytest.raises(RuntimeError, match=r"3 requests are running, .*update=between_batches"):
        rig.call("update_weights", rig.version, rig.syncs)
    rig.call("abort", [0, 1, 2])
    rig.slow_down(0)
    rig.sync()
    tokenizer = make_tiny_tokenizer()

    def ends(tokens: Sequence[int]) -> bool:
        return 50 in tokens or any(string in tokenizer.decode(tokens) for string in strings)

    made = [completion for _, completion in rig.generate(8, max_tokens=100)]
    for completion in made:
        assert not ends(completion.token_ids[:-1]), (
            "all tokens up to the one that ends it, and no more"
        )
        assert ends(completion.token_ids) == (completion.finish_reason == "stop")
        assert len(completion.logprobs) == len(completion.token_ids)
    assert {
        completion.token_ids[-1] for completion in made if completion.finish_reason == "stop"
    } - {50}


def test_two_tensor_parallel_ranks_in_processes_of_their_own(
    children: list[ProcessPoolExecutor], tmp_path: Path
) -> None:
    rig = Rig(children, tmp_path, update="in_flight", family="llama", tie=True)
    for _ in range(2):
        rig.sync()
        rig.check()
    rig.check(temperature=0.7)
    # Requests that come while others run, in one command; and one that is dropped.
    sampling = SamplingSettings(max_tokens=60)
    asked = {number: Request((5, 6, 7 + number), number, sampling) for number in range(6)}
    rig.call("submit", asked)
    alone = rig.completions()
    first, later = dict(list(asked.items())[:3]), dict(list(asked.items())[3:])
    rig.call("submit", first)
    rig.call("submit", later)
    rig.call("abort", [1, 4])
    rig.call("abort", [99])
    together = rig.completions()
    assert sorted(together) == [0, 2, 3, 5]
    assert [c.token_ids for c in together.values()] == [
        alone[number].token_ids for number in together
    ]
    enter_while_requests_run(rig, rig.requests(3, max_tokens=60))

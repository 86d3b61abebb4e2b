"""From prompts and completions to the batch that is trained on."""

from __future__ import annotations

from collections import Counter

import torch
from support.tiny_models import make_tiny_tokenizer

from rlhf3d.data.loader import Prompt
from rlhf3d.rewards.items import decode, score_item
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import Completion
from rlhf3d.trainer.experience import Scored, group_ids, join, make_experience, make_requests


def prompt(index: int, ids: tuple[int, ...]) -> Prompt:
    return Prompt(ids, "test", str(index), {}, index, f"question {index}")


PROMPTS = [prompt(7, (4, 5)), prompt(9, (6, 7, 8))]


def test_requests_have_their_own_repeatable_seeds() -> None:
    requests = make_requests(PROMPTS, n=3, seed=1, step=2)
    assert [r.prompt_ids for r in requests] == [(4, 5)] * 3 + [(6, 7, 8)] * 3
    assert len({r.seed for r in requests}) == 6
    assert requests == make_requests(PROMPTS, n=3, seed=1, step=2)
    assert {r.seed for r in requests}.isdisjoint(
        r.seed for r in make_requests(PROMPTS, n=3, seed=1, step=3)
    )


def test_a_prompt_that_comes_again_gets_new_samples() -> None:
    seen: Counter[int] = Counter()
    first, again = (make_requests(PROMPTS[:1], 2, 1, 2, seen) for _ in range(2))
    assert len({r.seed for r in first + again}) == 4
    assert first == make_requests(PROMPTS[:1], 2, 1, 2)
    assert len({r.seed for r in make_requests(PROMPTS[:1] * 2, 2, 1, 2)}) == 4


def test_groups_are_taken_and_joined_whole() -> None:
    completions = [Completion((i,), (0.0,), "stop", 1) for i in range(4)]
    experience = make_experience(PROMPTS, dict(enumerate(completions)), dict.fromkeys(range(4), ""))
    scores = [Score(float(i), Outcome.SCORED, {"acc": i % 2}) for i in range(4)]
    scored = Scored(experience, scores, torch.arange(4.0) - 1, torch.tensor([5.0, 5.0, 6.0, 6.0]))
    assert scored.metric("acc").tolist() == [0, 1, 0, 1]
    assert scored.metric("score").tolist() == [0, 1, 2, 3] and scored.metric(
        "seq_reward"
    ).tolist() == [-1, 0, 1, 2]
    both = join([scored.take([1], 2), scored.take([0], 2)])
    assert [c.token_ids[0] for c in both.experience.completions] == [2, 3, 0, 1]
    assert [p.index for p in both.experience.prompts] == [9, 9, 7, 7]
    assert both.rewards.tolist() == [1, 2, -1, 0] and both.greedy_rewards is not None
    assert both.greedy_rewards.tolist() == [6, 6, 5, 5] and [s.value for s in both.scores] == [
        2,
        3,
        0,
        1,
    ]


def test_batch_holds_the_tokens_the_engine_wrote() -> None:
    tokenizer = make_tiny_tokenizer()
    words = [tokenizer.encode(text) for text in ("ab", "c", "de", "fgh")]
    end = tokenizer.eos_token_id
    completions = [Completion((*w, end), tuple(-0.5 for _ in (*w, end)), "stop", 3) for w in words]
    late_first = {row: completions[row] for row in (2, 0, 3, 1)}
    experience = make_experience(PROMPTS, late_first, decode(late_first, tokenizer))
    assert experience.texts == ["ab", "c", "de", "fgh"]
    assert group_ids(experience, 2).tolist() == [0, 0, 1, 1]
    batch = experience.batch(pad_id=0)
    assert batch["sequence"].tolist() == [0, 1, 2, 3]
    assert batch["prompt_lengths"].tolist() == [2, 2, 3, 3]
    assert batch["response_lengths"].tolist() == [3, 2, 3, 4]
    assert batch["input_ids"][1, :4].tolist() == [4, 5, *words[1], end]
    assert batch["rollout_logprobs"][1].tolist() == [-0.5, -0.5, 0, 0]
    item = score_item(PROMPTS[1], experience.texts[2])
    assert (item.solution_str, item.ground_truth) == ("de", "9")
    sample = experience.samples([Score(1.0, Outcome.SCORED)] * 4)[2]
    assert (sample.prompt, sample.response, sample.length, sample.policy_version) == (
        "question 9",
        "de",
        3,
        3,
    )

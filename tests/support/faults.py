"""An engine and a trainer that part, for real: tiny models score the same sampled tokens.

Invariant: the fault named is the only difference between the two sides; tokens are drawn from the
engine's own distribution, as in a run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.tiny_models import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from rlhf3d.observability.mismatch.pairs import ARRAYS, Pairs

Scores = list[list[float]]
"""Of each row, the log-prob of each token of its response."""
Warp = Callable[[Tensor], Tensor]
"""From logits to those that tokens are drawn from."""
RESPONSE = 24
MODEL = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 64, "vocab": 128}


@dataclass(frozen=True)
class Rows:
    """What was sampled."""

    prompts: list[list[int]]
    responses: list[list[int]]
    engine: Scores

    @property
    def complete(self) -> list[list[int]]:
        """Prompt and response of each."""
        return [p + r for p, r in zip(self.prompts, self.responses, strict=True)]


def load(folder: Path, sharpness: float = 3.0, **changes: Any) -> Any:
    """A tiny model that is surer of its next token than random weights are."""
    made = make_tiny_model(folder, **(MODEL | changes))
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(sharpness)
    return model.eval().requires_grad_(False)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 2 to 50 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 51, count).tolist()
    return [rng.integers(8, MODEL["vocab"], length).tolist() for length in lengths]


def logits_of(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """[N, L, V] in float32 of rows padded at their ends."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    # Causal: what is padded at the end is seen by no token before it.
    return model(ids).logits.float()


def plain(logits: Tensor) -> Tensor:
    """Sampling at temperature 1 from everything."""
    return logits


def tempered(temperature: float) -> Warp:
    """Sampling at another temperature."""
    return lambda logits: logits / temperature


def only_top_k(k: int) -> Warp:
    """Sampling from the k most likely tokens."""

    def warp(logits: Tensor) -> Tensor:
        least = logits.topk(k).values[..., -1:]
        return logits.masked_fill(logits < least, -torch.inf)

    return warp


def only_top_p(p: float) -> Warp:
    """Sampling from the nucleus."""

    def warp(logits: Tensor) -> Tensor:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
        return logits.masked_fill(out, -torch.inf)

    return warp


def scores(
    model: Any,
    rows: Rows | Sequence[Sequence[int]],
    starts: Sequence[int] | None = None,
    warp: Warp = plain,
) -> Scores:
    """The model's log-probs of what follows each row's start."""
    complete = rows.complete if isinstance(rows, Rows) else rows
    begins = [len(p) for p in rows.prompts] if isinstance(rows, Rows) else starts
    logprobs = warp(logits_of(model, complete)).log_softmax(-1)
    found = []
    for row, begin, own in zip(complete, begins, logprobs, strict=True):
        ids = torch.tensor(row[begin:])
        found.append(own[begin - 1 : len(row) - 1].gather(-1, ids[:, None])[:, 0].tolist())
    return found


def sample(
    model: Any, count: int = 64, seed: int = 0, warp: Warp = plain, response: int = RESPONSE
) -> Rows:
    """Rows drawn from a model token by token, with the log-probs that they were drawn with."""
    generator = torch.Generator().manual_seed(seed)
    firsts = prompts(count, seed)
    lengths = torch.randint(response // 2, response + 1, (count,), generator=generator).tolist()
    rows, drawn = [list(prompt) for prompt in firsts], [[] for _ in firsts]
    for _ in range(response):
        logits = warp(logits_of(model, rows))
        ends = torch.tensor([len(row) - 1 for row in rows])
        logprobs = logits[torch.arange(count), ends].log_softmax(-1)
        tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)
        for row, own, token, logprob in zip(rows, drawn, tokens, logprobs, strict=True):
            row.append(int(token))
            own.append(float(logprob[token]))
    responses = [row[len(p) :][:n] for row, p, n in zip(rows, firsts, lengths, strict=True)]
    engine = [own[:n] for own, n in zip(drawn, lengths, strict=True)]
    return Rows(firsts, responses, engine)


def updated(model: Any, rows: Rows, steps: int = 1, lr: float = 3e-3, seed: int = 0) -> Any:
    """The model after optimizer steps on random advantages."""
    after = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.Adam(after.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        logprobs = logits_of(after, rows.complete).log_softmax(-1)
        loss = torch.zeros(())
        for row, prompt, own in zip(rows.complete, rows.prompts, logprobs, strict=True):
            ids = torch.tensor(row[len(prompt) :])
            said = own[len(prompt) - 1 : len(row) - 1].gather(-1, ids[:, None])
            loss = loss - said.mean() * torch.randn((), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return after.requires_grad_(False)


def in_bfloat16(model: Any) -> Any:
    """The same weights, computed in bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def with_swapped_shard(model: Any, layer: int = 0) -> Any:
    """The two halves of a layer's attention outputs in each other's place."""
    wrong = copy.deepcopy(model)
    weight = wrong.model.layers[layer].self_attn.o_proj.weight
    weight.copy_(torch.cat(list(reversed(weight.chunk(2, dim=1))), dim=1))
    return wrong


def padded_scores(model: Any, rows: Rows, masked: bool) -> Scores:
    """Scores of rows with padding before the prompt that is attended to (not masked), or with
    padding after the prompt that counts in the positions (masked)."""
    width = max(map(len, rows.prompts))
    found = []
    for prompt, response in zip(rows.prompts, rows.responses, strict=True):
        pads = width - len(prompt)
        if masked:
            ids = torch.tensor([prompt + response])
            places = [*range(len(prompt)), *range(width, width + len(response))]
            logits = model(ids, position_ids=torch.tensor([places])).logits
        else:
            logits = model(torch.tensor([[0] * pads + prompt + response])).logits
        own = logits[0, -len(response) - 1 : -1].log_softmax(-1)
        found.append(own.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist())
    return found


def windowed_scores(model: Any, rows: Rows, window: int) -> Scores:
    """Scores of a model that sees no further back than `window` tokens."""
    found = []
    for prompt, response in zip(rows.prompts, rows.responses, strict=True):
        ids = torch.tensor([prompt + response])
        length = ids.shape[1]
        place = torch.arange(length)
        back = place[:, None] - place[None]
        seen = (back >= 0) & (back < window)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        own = model(ids, attention_mask=mask).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(own.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist())
    return found


def cached_scores(model: Any, old: Any, rows: Rows, cached: Callable[[int], bool]) -> Scores:
    """Scores where the prompts of rows that are `cached` were read by the old weights."""
    found = []
    for number, (prompt, response) in enumerate(zip(rows.prompts, rows.responses, strict=True)):
        cache = DynamicCache()
        # The last token of a prompt is always computed: it gives the first token of the answer.
        reader = old if cached(number) else model
        reader(torch.tensor([prompt[:-1]]), past_key_values=cache)
        rest = torch.tensor([[prompt[-1], *response]])
        own = model(rest, past_key_values=cache).logits[0, :-1].log_softmax(-1)
        found.append(own.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist())
    return found


def shifted(found: Scores, by: int = 1) -> Scores:
    """Each log-prob at the place of its neighbor."""
    return [own[-by:] + own[:-by] for own in found]


def merged(ids: Sequence[int], pairs: dict[tuple[int, int], int]) -> list[int]:
    """Tokens as a tokenizer would write their text: pairs that it has a token for become one."""
    found: list[int] = []
    for token in ids:
        if found and (found[-1], token) in pairs:
            found[-1] = pairs[found[-1], token]
        else:
            found.append(token)
    return found


def retokenized_scores(model: Any, rows: Rows, pairs: dict[tuple[int, int], int]) -> Scores:
    """The trainer's scores of responses that were decoded and encoded again."""
    again = [merged(response, pairs) for response in rows.responses]
    complete = [p + r for p, r in zip(rows.prompts, again, strict=True)]
    found = scores(model, complete, [len(p) for p in rows.prompts])
    # The batch is as wide as what was sampled.
    return [
        own + [0.0] * (len(sampled) - len(own))
        for own, sampled in zip(found, rows.responses, strict=True)
    ]


def sample_after_old_prompts(
    model: Any, old: Any, count: int = 64, seed: int = 0, response: int = RESPONSE, length: int = 16
) -> Rows:
    """Rows of an engine whose prefix cache has the prompts as the old weights read them."""
    generator = torch.Generator().manual_seed(seed)
    firsts = torch.randint(8, MODEL["vocab"], (count, length), generator=generator)
    cache = DynamicCache()
    # The last token of a prompt is always computed: it gives the first token of the answer.
    old(firsts[:, :-1], past_key_values=cache)
    token, tokens, engine = firsts[:, -1:], [], []
    for _ in range(response):
        logprobs = model(token, past_key_values=cache).logits[:, -1].log_softmax(-1)
        token = torch.multinomial(logprobs.exp(), 1, generator=generator)
        tokens.append(token)
        engine.append(logprobs.gather(-1, token))
    return Rows(firsts.tolist(), torch.cat(tokens, 1).tolist(), torch.cat(engine, 1).tolist())


def joined(*parts: Rows) -> Rows:
    """All rows as of one step."""
    found = Rows([], [], [])
    for part in parts:
        found = Rows(
            found.prompts + part.prompts,
            found.responses + part.responses,
            found.engine + part.engine,
        )
    return found


def pairs_of(*steps: tuple[Rows, Scores]) -> Pairs:
    """What a run keeps: of each step's rows, with the trainer's scores; step n trains policy n."""
    columns: dict[str, list[Any]] = {name: [] for name in ARRAYS}
    row = 0
    for version, (rows, trainer) in enumerate(steps):
        for prompt, engine, trained in zip(rows.prompts, rows.engine, trainer, strict=True):
            start, count = len(prompt), len(engine)
            columns["engine"] += engine
            columns["trainer"] += trained
            columns["position"] += range(start, start + count)
            same = {"row": row, "turn": 0, "written": version, "trained": version}
            same |= {"prompt_length": start, "row_length": start + count}
            for name, value in same.items():
                columns[name] += [value] * count
            row += 1
    return Pairs(**{name: np.array(values) for name, values in columns.items()})

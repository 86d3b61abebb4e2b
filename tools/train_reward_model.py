"""Train a reward model: a sequence classifier with one output, from a language model and preference
pairs.

    tools/train_reward_model.py models/SmolLM2-135M-Instruct pairs.jsonl --output models/reward

Bradley-Terry: the loss of a pair is -log sigmoid(score(chosen) - score(rejected)). Every fifth pair
is held out (`tools/data/preferences.py`). Writes a Hugging Face folder with tokenizer, which
`reward_model.path` takes.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from rlhf3d.experience.accuracy import interval
from rlhf3d.tokenizer.load import load_tokenizer

sys.path.append(str(Path(__file__).parent / "data"))
from preferences import Pair, is_held_out, read_pairs

Encoded = tuple[list[int], list[int]]
"""Token ids of prompt with chosen and with rejected answer."""


def encode(pairs: list[Pair], tokenizer: Any, limit: int) -> list[Encoded]:
    """The pairs whose conversations are both at most `limit` tokens."""

    def ids(pair: Pair, answer: str) -> list[int]:
        chat = [*pair.prompt, {"role": "assistant", "content": answer}]
        return list(tokenizer.apply_chat_template(chat, return_dict=False))

    encoded = [(ids(pair, pair.chosen), ids(pair, pair.rejected)) for pair in pairs]
    return [pair for pair in encoded if max(map(len, pair)) <= limit]


def margins(model: Any, batch: list[Encoded]) -> torch.Tensor:
    """[b] score(chosen) - score(rejected)."""
    # [2b, width]: all chosen answers, then all rejected ones.
    rows = [chosen for chosen, _ in batch] + [rejected for _, rejected in batch]
    width, device = max(map(len, rows)), model.device
    pad = model.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    # The backbone in bf16; weights and the score stay fp32.
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
    # Padding is on the right: a sequence is scored at its last own token.
    last = mask.sum(-1) - 1
    scores = model.score(hidden[torch.arange(len(rows), device=device), last].float())[:, 0]
    return scores[: len(batch)] - scores[len(batch) :]


def batches_of(pairs: list[Encoded], size: int, rng: random.Random) -> list[list[Encoded]]:
    """Pairs of similar length together, so that little is padding; batches in random order."""
    # Equal lengths in random order.
    ordered = sorted(pairs, key=lambda pair: (max(map(len, pair)), rng.random()))
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    rng.shuffle(batches)
    return batches


@torch.no_grad()
def accuracy(model: Any, pairs: list[Encoded], size: int) -> str:
    """Share of pairs whose chosen answer scores higher, with its 95 % interval, as text."""
    model.eval()
    right = [
        float(m > 0)
        for batch in batches_of(pairs, size, random.Random(0))
        for m in margins(model, batch)
    ]
    low, high = interval(right)
    return f"{sum(right) / len(right):.1%} ({low:.1%} to {high:.1%}) of {len(right)} held-out pairs"


def main() -> None:
    """Train on the pairs, report accuracy, and write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="Hugging Face folder of a language model with chat template"
    )
    parser.add_argument(
        "pairs", type=Path, help="jsonl, json or parquet with prompt, chosen and rejected"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--batch", type=int, default=8, help="pairs an optimizer step")
    parser.add_argument(
        "--max-length", type=int, default=512, help="longer pairs are left out and counted, tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists; remove it or name another folder")

    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, dtype=torch.float32
    ).to(device)
    # Saved with the model: a classifier of several rows needs to know what is padding.
    model.config.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    pairs = read_pairs(args.pairs)
    train = encode(
        [p for i, p in enumerate(pairs) if not is_held_out(i)], tokenizer, args.max_length
    )
    held_out = encode(
        [p for i, p in enumerate(pairs) if is_held_out(i)], tokenizer, args.max_length
    )
    print(
        f"{len(pairs)} pairs: {len(train)} to learn from, {len(held_out)} held out, "
        f"{len(pairs) - len(train) - len(held_out)} over {args.max_length} tokens left out"
    )
    # What a judge of length alone would get.
    longer = [float(len(chosen) > len(rejected)) for chosen, rejected in held_out]
    print(
        f"before: {accuracy(model, held_out, args.batch)}; the longer answer is the chosen one in "
        f"{sum(longer) / len(longer):.1%}"
    )

    # All epochs at once, as the schedule needs their number of steps.
    rng = random.Random(args.seed)
    plan = [batch for _ in range(args.epochs) for batch in batches_of(train, args.batch, rng)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=len(plan), pct_start=0.1
    )
    model.train()
    began, losses = time.monotonic(), []
    for step, batch in enumerate(plan, start=1):
        loss = -torch.nn.functional.logsigmoid(margins(model, batch)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 10 == 0 or step == len(plan):
            seconds = time.monotonic() - began
            print(
                f"step {step}/{len(plan)}: loss {sum(losses[-10:]) / len(losses[-10:]):.3f}, "
                f"{seconds:.0f} s",
                flush=True,
            )
    print(f"after: {accuracy(model, held_out, args.batch)}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()

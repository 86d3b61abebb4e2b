"""What a reward model gives by transformers alone: what ours is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf3d.rewards.score import ScoreItem


def hf_scores(folder: Path, items: list[ScoreItem]) -> torch.Tensor:
    """Transformers' logits of the conversations as one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    chats = [
        [*item.messages, {"role": "assistant", "content": item.solution_str}] for item in items
    ]
    encoded = tokenizer.apply_chat_template(
        chats, padding=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits: torch.Tensor = model(**encoded).logits
    return logits[:, 0]

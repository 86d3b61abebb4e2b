"""The tokenizer of a model folder, with its chat template.

Invariant: nothing is downloaded; a folder without tokenizer or template is a ValueError that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a Hugging Face folder."""
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer: no such folder: {folder}; give a model folder (`make model` writes one)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenizer: {folder} has none that loads: {error}") from error
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer: {folder} has no chat template (chat_template.jinja): prompts are chat messages")
    return tokenizer

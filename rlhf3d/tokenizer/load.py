"""The tokenizer of a model folder, with its chat template.

Invariant: nothing is downloaded; a folder without tokenizer or template is a ValueError that names
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf3d.paths import refuse_pointer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""One of them holds the vocabulary."""


def load_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a Hugging Face folder."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"tokenizer: no such folder: {folder}; give a model folder (`make model` writes one)"
        )
    files = [Path(folder) / name for name in FILES if (Path(folder) / name).is_file()]
    if not files:
        raise ValueError(
            f"tokenizer: {folder} has none ({' or '.join(FILES)}); copy the tokenizer's files of "
            "the model that it was made from"
        )
    for file in files:
        refuse_pointer(file)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises plain Exceptions, transformers others
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"tokenizer: that of {folder} does not load: {reason}") from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer: {folder} has no chat template (chat_template.jinja): prompts are chat "
            "messages"
        )
    return tokenizer


def vocabulary_notes(tokenizer: Any, vocab_size: int) -> list[str]:
    """What the user should know where tokenizer and model do not have the same tokens."""
    beyond = [
        (number, token) for token, number in tokenizer.get_vocab().items() if number >= vocab_size
    ]
    if not beyond:
        return []
    number, token = min(beyond)
    return [
        f"the tokenizer has {len(beyond)} tokens beyond the model's vocab_size {vocab_size} (the "
        f"first is {token!r}, {number}): prompts that contain one are refused"
    ]

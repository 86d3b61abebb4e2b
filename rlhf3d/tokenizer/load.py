"""The tokenizer of a model folder, with its chat template or a user's.

Invariant: nothing is downloaded; a folder without tokenizer or template is a ValueError that names
it. A user's template takes the place of all of the folder's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rlhf3d.paths import refuse_pointer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""One of them holds the vocabulary."""


def load_tokenizer(
    folder: str | Path,
    chat_template: str | Path | None = None,
    option: str = "model.chat_template",
) -> Any:
    """The transformers tokenizer of a Hugging Face folder.

    `chat_template`: a file in the place of the tokenizer's own; `option` is what it was named by.
    """
    tokenizer = bare_tokenizer(folder)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template, option)
        _check_syntax(tokenizer, f"{option} = {chat_template}")
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer: {folder} has no chat template (chat_template.jinja): prompts are chat "
            f"messages; name one ({option})"
        )
    return tokenizer


def bare_tokenizer(folder: str | Path) -> Any:
    """The transformers tokenizer of a Hugging Face folder, with or without a chat template."""
    check_files(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the Rust library raises plain Exceptions, transformers others
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"tokenizer: that of {folder} does not load: {reason}") from error
    return tokenizer


def check_files(folder: str | Path) -> None:
    """ValueError where a folder lacks a tokenizer's files; only loading tells if they are whole."""
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


def read_template(path: str | Path, option: str) -> str:
    """The text of a template's file; ValueError, naming `option`, where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{option} = {path}: cannot be read ({error}); name a .jinja file"
        ) from error
    if not text.strip():
        raise ValueError(f"{option} = {path}: the file is empty; name a .jinja file")
    return text


def _check_syntax(tokenizer: Any, where: str) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"{where}: line {error.lineno} is no Jinja: {error.message}") from error
    except (TemplateError, TypeError, ValueError):
        return  # it may refuse this prompt; those that it has to take are tried one by one


def replace_template(folder: Path, text: str) -> None:
    """Give a model folder a chat template in the place of all that it has."""
    # transformers and vLLM prefer this file to a template in tokenizer_config.json.
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)


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

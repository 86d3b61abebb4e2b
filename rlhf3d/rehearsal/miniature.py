"""What a miniature job runs on: a random model of the shrunk shape, a byte tokenizer, some prompts.

Invariant: the same arguments write the same files. Every id of the tokenizer decodes, so that
random weights write text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf3d.data.parquet import copy_rows, write_parquet

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
)
"""Before CHAT_TEMPLATE too, for a job whose prompts define tools."""
SYSTEM = "<|im_start|>system\nYou are a helpful assistant, and you think.<|im_end|>\n"
"""Before CHAT_TEMPLATE in a miniature whose model has no template: prompts begin alike, as those of
most models."""
STAND_IN_ROWS = 64


def byte_tokenizer(vocab: int, chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, of whose `vocab` ids every one decodes.

    In this order: special tokens, newline, printable ASCII, other bytes, fillers.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    assert vocab >= 100, f"{vocab} ids cannot hold the specials and printable ASCII"
    printable = [chr(code) for code in range(33, 127)]
    ascii_tokens = ["Ċ", "Ġ", *printable]  # byte-level names of newline and space
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(ascii_tokens))
    fillers = [f"<{i}>" for i in range(vocab)]
    # Cut at the end: special tokens and ASCII are there whatever the size.
    tokens = [*SPECIAL_TOKENS, *ascii_tokens, *others, *fillers][:vocab]
    ids = {token: number for number, token in enumerate(tokens)}
    # Without merges each byte is a token of its own, so nothing has to be learned.
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer_of(backend, chat_template)


def tokenizer_of(backend: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    """A transformers tokenizer whose special tokens are SPECIAL_TOKENS."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


class Shape(NamedTuple):
    """The `config.json` of a model, which needs no weights here."""

    folder: Path
    config: dict[str, Any]


def read_shape(key: str, folders: Sequence[Path]) -> Shape:
    """Return the first of these folders' `config.json`; `key` of the configuration names the model.

    Raises ValueError where none has one.
    """
    for folder in folders:
        file = folder / "config.json"
        if file.is_file():
            return Shape(folder, json.loads(file.read_text()))
    first, *others = folders
    raise ValueError(
        f"{key}: {first} has no config.json, which a rehearsal needs (the weights it does not)"
        + "".join(f", nor has {folder}" for folder in others)
    )


def write_model(
    folder: Path, shape: Mapping[str, Any], original: Path, seed: int, classifier: bool = False
) -> None:
    """Write a random language model or `classifier` of a shape, and a byte tokenizer.

    It has the chat template of `original`, if that has one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    # Places in SPECIAL_TOKENS: end of turn and padding.
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(**{**shape, **ids})
    # Just before the weights are drawn, so that nothing else shifts them.
    torch.manual_seed(seed)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    template = original / "chat_template.jinja"
    text = template.read_text() if template.is_file() else SYSTEM + TOOLS + CHAT_TEMPLATE
    byte_tokenizer(shape["vocab_size"], text).save_pretrained(folder)


def write_prompts(
    files: Sequence[str], folder: Path, rows: int, seed: int
) -> tuple[tuple[str, ...], list[str]]:
    """Write the first `rows` prompts of each file into a file of its own, again from the first if
    there are fewer.

    Returns those files, and the names of files that are not here: for those, generated word
    problems stand in.
    """
    from rlhf3d.data.sets import arithmetic

    folder.mkdir(parents=True, exist_ok=True)
    written, absent = [], []
    for number, name in enumerate(files):
        path = folder / f"{folder.name}_{number}.parquet"
        written.append(str(path))
        if Path(name).is_file():
            # All columns, which environments may need.
            copy_rows(name, path, rows)
            continue
        absent.append(name)
        prompts = arithmetic.generate(STAND_IN_ROWS, STAND_IN_ROWS, seed=seed)[0][:rows]
        while len(prompts) < rows:
            prompts += prompts[: rows - len(prompts)]
        write_parquet(prompts, path, {"rehearsal_of": name})
    return tuple(written), absent

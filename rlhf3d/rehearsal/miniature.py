"""What a miniature job runs on: a random model of the shrunk shape, a byte tokenizer, and the first rows of the data.

Invariant: the same arguments write the same files. Every id of the tokenizer decodes, so random weights write text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf3d.data.parquet import iter_rows, write_parquet
from rlhf3d.data.rows import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant, and you think.<|im_end|>\n"
"""Before CHAT_TEMPLATE in a miniature whose model has none of its own: prompts begin alike, as those of most models."""
STAND_IN_ROWS = 64


def byte_tokenizer(vocab: int, chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes as tokens: specials, newline, printable ASCII, other bytes, fillers: every one of `vocab` ids decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert vocab >= 100, f"{vocab} ids cannot hold the specials and printable ASCII"
    ascii_tokens = [
        "Ċ",
        "Ġ",
        *(chr(c) for c in range(33, 127)),
    ]  # byte-level names of newline, space, ! to ~
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(ascii_tokens))
    fillers = [f"<{i}>" for i in range(vocab)]
    tokens = [*SPECIAL_TOKENS, *ascii_tokens, *others, *fillers][:vocab]
    backend = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<|unk|>")
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def read_shape(key: str, folders: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """The first of these folders with a `config.json`, which needs no weights here, and what that says.

    `key` is the configuration's for the ValueError where there is none.
    """
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is None:
        raise ValueError(
            f"{key}: {folders[0]} has no config.json, which a rehearsal needs (the weights it does not)"
            + "".join(f", nor has {folder}" for folder in folders[1:])
        )
    return found, json.loads((found / "config.json").read_text())


def write_model(
    folder: Path, shape: Mapping[str, Any], original: Path, seed: int, classifier: bool = False
) -> None:
    """A random language model or `classifier` of a shape, with a byte tokenizer and the chat template of `original`, if
    that has one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(**{**shape, **ids})
    torch.manual_seed(seed)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(folder)
    template = original / "chat_template.jinja"
    byte_tokenizer(
        shape["vocab_size"], template.read_text() if template.is_file() else SYSTEM + CHAT_TEMPLATE
    ).save_pretrained(folder)


def write_prompts(
    files: Sequence[str], folder: Path, rows: int, seed: int
) -> tuple[tuple[str, ...], list[str]]:
    """The first `rows` prompts of each file in a file of its own, and which files are not here: there stand generated
    word problems."""
    from rlhf3d.data.sets import arithmetic

    folder.mkdir(parents=True, exist_ok=True)
    written, absent = [], []
    for number, name in enumerate(files):
        found: list[PromptRow]
        if Path(name).is_file():
            found = list(islice(iter_rows(name), rows))
        else:
            absent.append(name)
            found = arithmetic.generate(STAND_IN_ROWS, STAND_IN_ROWS, seed=seed)[0][:rows]
        while len(found) < rows:  # a step needs so many
            found += found[: rows - len(found)]
        path = folder / f"{folder.name}_{number}.parquet"
        write_parquet(found, path, {"rehearsal_of": name})
        written.append(str(path))
    return tuple(written), absent

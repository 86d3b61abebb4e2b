"""Tokenised prompts and their order, with a real (tiny) chat tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf3d.data.loader import Prompt, PromptDataset, PromptLoader
from rlhf3d.data.rows import PromptRow, write_parquet

WORDS = ["<unk>", "<user>", "<system>", "<assistant>", *"abcdefghij"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def write(path: Path, contents: list[str], role: str = "user") -> Path:
    rows = [
        PromptRow("mine", [{"role": role, "content": text}], "math", {"ground_truth": str(i)}, {"index": 10 + i})
        for i, text in enumerate(contents)
    ]
    write_parquet(rows, path, {})
    return path


def texts(batch: list[Prompt]) -> str:
    return "".join(prompt.text for prompt in batch)


def make_loader(
    folder: Path, tokenizer: PreTrainedTokenizerFast, size: int, seed: int = 0, shuffle: bool = True
) -> PromptLoader:
    file = write(folder / f"{seed}.parquet", list("abcdefghij"))
    return PromptLoader(PromptDataset([file], tokenizer, 8), size, seed, shuffle)


def test_prompts_carry_ids_and_what_scoring_needs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = [write(tmp_path / "1.parquet", ["a b", "c"]), write(tmp_path / "2.parquet", ["d"])]
    dataset = PromptDataset(files, tokenizer, 8)
    assert [p.prompt_ids for p in dataset] == [(1, 4, 5, 3), (1, 6, 3), (1, 7, 3)]
    assert dataset[2] == Prompt((1, 7, 3), "mine", "0", {"index": 10}, 2, "d")
    assert (len(dataset), dataset.dropped, dataset.data_sources) == (3, 0, ["mine"])
    assert len(PromptDataset(files, tokenizer, 8, max_samples=2)) == 2


def test_overlong_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write(tmp_path / "t.parquet", ["a", "a b c", "b", "a b c d"])
    with pytest.raises(ValueError) as caught:
        PromptDataset([file], tokenizer, 4, "error")
    assert "data.train_files: 2 of 4 prompts are over data.max_prompt_length=4" in str(caught.value)
    assert "t.parquet row 1 (5 tokens)" in str(caught.value)
    assert "Set data.max_prompt_length=6" in str(caught.value)

    filtered = PromptDataset([file], tokenizer, 4, "filter")
    assert [p.index for p in filtered] == [0, 2] and filtered.dropped == 2

    cut = PromptDataset([file], tokenizer, 4, "truncate_left")
    assert [p.prompt_ids for p in cut] == [(1, 4, 3), (4, 5, 6, 3), (1, 5, 3), (5, 6, 7, 3)]
    assert cut.dropped == 0
    assert len(PromptDataset([file], tokenizer, 6, "error")) == 4

    with pytest.raises(ValueError, match=r"data\.val_files: no prompt left of 4 rows \(4 over"):
        PromptDataset([file], tokenizer, 2, "filter", key="data.val_files")


def test_mistakes_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"data\.train_files: no files named"):
        PromptDataset([], tokenizer, 8)
    with pytest.raises(ValueError, match=r"data\.overlong_prompts: no 'cut'"):
        PromptDataset([tmp_path / "x"], tokenizer, 8, "cut")
    file = write(tmp_path / "tool.parquet", ["a"], role="tool")
    with pytest.raises(ValueError, match=r"tool\.parquet row 0: .*chat template.*no tools here"):
        PromptDataset([file], tokenizer, 8)


def test_each_epoch_serves_every_prompt_once_in_its_own_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    loader = make_loader(tmp_path, tokenizer, 5)
    epochs = [texts(loader.next_batch() + loader.next_batch()) for _ in range(4)]
    assert all("".join(sorted(epoch)) == "abcdefghij" for epoch in epochs)
    assert len({*epochs, "abcdefghij"}) == 5
    again, other = make_loader(tmp_path, tokenizer, 5), make_loader(tmp_path, tokenizer, 5, seed=1)
    assert texts(again.next_batch()) == epochs[0][:5]
    assert texts(other.next_batch()) != epochs[0][:5]


def test_an_incomplete_batch_is_completed_from_the_next_epoch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    loader = make_loader(tmp_path, tokenizer, 4, shuffle=False)
    assert [texts(loader.next_batch()) for _ in range(5)] == ["abcd", "efgh", "ijab", "cdef", "ghij"]
    assert (loader.epoch, loader.steps(1), loader.steps(2)) == (2, 3, 5)
    shuffled = make_loader(tmp_path, tokenizer, 4)
    served = "".join(texts(shuffled.next_batch()) for _ in range(5))
    assert "".join(sorted(served[:10])) == "".join(sorted(served[10:])) == "abcdefghij"


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5, 7])
def test_resume_continues_exactly(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, done: int) -> None:
    loader = make_loader(tmp_path, tokenizer, 4)
    for _ in range(done):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [loader.next_batch() for _ in range(6)]
    resumed = make_loader(tmp_path, tokenizer, 4)
    resumed.load_state_dict(state)
    assert [resumed.next_batch() for _ in range(6)] == expected


def test_resume_refuses_other_data(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    state = make_loader(tmp_path, tokenizer, 4).state_dict()
    with pytest.raises(ValueError, match="other data \\(seed 0, now 1\\)"):
        make_loader(tmp_path, tokenizer, 4, seed=1).load_state_dict(state)
    other = PromptDataset([write(tmp_path / "o.parquet", list("abcdefghia"))], tokenizer, 8)
    with pytest.raises(ValueError, match="fingerprint"):
        PromptLoader(other, 4, 0).load_state_dict(state)


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"data\.train_batch_size=11 must be between 1 and the 10 prompts"):
        make_loader(tmp_path, tokenizer, 11)
    assert len(make_loader(tmp_path, tokenizer, 10).next_batch()) == 10

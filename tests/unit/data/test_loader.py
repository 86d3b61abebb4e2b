"""Tokenised prompts and their order, with a real (tiny) chat tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf3d.data import dataset as dataset_module
from rlhf3d.data.dataset import Prompt, PromptDataset
from rlhf3d.data.loader import Curriculum, PromptLoader
from rlhf3d.data.parquet import write_parquet
from rlhf3d.data.rows import PromptRow

WORDS = ["<unk>", "<user>", "<system>", "<assistant>", *"abcdefghij"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% "
    "endif %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt "
    "%}<assistant>{% endif %}"
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
        PromptRow(
            "mine",
            [{"role": role, "content": text}],
            "math",
            {"ground_truth": str(i)},
            {"index": 10 + i},
        )
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


def test_prompts_carry_ids_and_what_scoring_needs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    files = [write(tmp_path / "1.parquet", ["a b", "c"]), write(tmp_path / "2.parquet", ["d"])]
    dataset = PromptDataset(files, tokenizer, 8)
    assert [p.prompt_ids for p in dataset] == [(1, 4, 5, 3), (1, 6, 3), (1, 7, 3)]
    messages = [{"role": "user", "content": "d"}]
    assert dataset[2] == Prompt(
        (1, 7, 3), "mine", "0", {"index": 10}, 2, "d", messages, "<assistant>", []
    )
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
    assert (cut.dropped, cut.truncated) == (0, 2)
    right = PromptDataset([file], tokenizer, 4, "truncate_right")
    assert [p.prompt_ids for p in right] == [(1, 4, 3), (1, 4, 5, 6), (1, 5, 3), (1, 4, 5, 6)]
    assert (right.dropped, right.truncated) == (0, 2)
    assert filtered.summary() == (
        "data.train_files: 2 of 4 prompts, 2 dropped and 0 truncated over data.max_prompt_length=4"
    )
    assert len(PromptDataset([file], tokenizer, 6, "error")) == 4

    with pytest.raises(ValueError, match=r"data\.val_files: no prompt left of 4 rows \(4 over"):
        PromptDataset([file], tokenizer, 2, "filter", key="data.val_files")


def test_mistakes_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"data\.train_files: no files named"):
        PromptDataset([], tokenizer, 8)
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
    assert [texts(loader.next_batch()) for _ in range(5)] == [
        "abcd",
        "efgh",
        "ijab",
        "cdef",
        "ghij",
    ]
    assert loader.epoch == 2
    shuffled = make_loader(tmp_path, tokenizer, 4)
    served = "".join(texts(shuffled.next_batch()) for _ in range(5))
    assert "".join(sorted(served[:10])) == "".join(sorted(served[10:])) == "abcdefghij"


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5, 7])
def test_resume_continues_exactly(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, done: int
) -> None:
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


def test_a_batch_larger_than_the_data_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        ValueError, match=r"data\.train_batch_size=11 must be between 1 and the 10 prompts"
    ):
        make_loader(tmp_path, tokenizer, 11)
    assert len(make_loader(tmp_path, tokenizer, 10).next_batch()) == 10


def test_rows_of_a_set_too_large_to_scan_are_counted_when_served(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "SCANNED", 5)
    monkeypatch.setattr(dataset_module, "PROBED", 3)
    file = write(tmp_path / "t.parquet", ["a", "b", "a b c d", "c", "d", "e", "f", "a b c d e"])
    dataset = PromptDataset([file], tokenizer, 4, "filter")
    assert not dataset.scanned and len(dataset) == 8 and dataset.data_sources == ["mine"]
    assert "known of 3" in dataset.summary()
    loader = PromptLoader(dataset, 3, seed=0, shuffle=False)
    assert [texts(loader.next_batch()) for _ in range(2)] == ["abc", "def"]
    assert dataset.dropped == 1
    state = loader.state_dict()
    # In the second epoch a row that is met again is not counted again.
    assert texts(loader.next_batch()) == "abc" and dataset.dropped == 2
    resumed = PromptLoader(PromptDataset([file], tokenizer, 4, "filter"), 3, seed=0, shuffle=False)
    resumed.load_state_dict(state)
    assert texts(resumed.next_batch()) == "abc" and resumed.state_dict() == loader.state_dict()
    strict = PromptLoader(PromptDataset([file], tokenizer, 6, "error"), 8, seed=0, shuffle=False)
    with pytest.raises(ValueError, match=r"t\.parquet row 7 \(7 tokens\)"):
        strict.next_batch()


def make_weighted(
    folder: Path, tokenizer: PreTrainedTokenizerFast, weights: list[float]
) -> PromptLoader:
    files = [write(folder / "1.parquet", list("abc")), write(folder / "2.parquet", list("defghij"))]
    return PromptLoader(PromptDataset(files, tokenizer, 8), 10, 0, weights=weights)


def test_files_with_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    loader = make_weighted(tmp_path, tokenizer, [3.0, 1.0])
    served = "".join(texts(loader.next_batch()) for _ in range(200))
    share = sum(text in "abc" for text in served) / len(served)
    assert share == pytest.approx(0.75, abs=0.04)
    first = [text for text in served if text in "abc"]
    assert all(
        sorted(first[i : i + 3]) == ["a", "b", "c"] for i in range(0, 1200, 3)
    )  # epochs of its own
    assert set(texts(make_weighted(tmp_path, tokenizer, [0.0, 1.0]).next_batch())) <= set("defghij")


def test_a_weighted_position_resumes_exactly(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    loader = make_weighted(tmp_path, tokenizer, [3.0, 1.0])
    for _ in range(7):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make_weighted(tmp_path, tokenizer, [3.0, 1.0])
    resumed.load_state_dict(state)
    assert [resumed.next_batch() for _ in range(5)] == [loader.next_batch() for _ in range(5)]
    with pytest.raises(ValueError, match=r"other data \(weights \[3.0, 1.0\], now \[1.0, 1.0\]\)"):
        make_weighted(tmp_path, tokenizer, [1.0, 1.0]).load_state_dict(state)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0]])
def test_weights_that_do_not_fit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, weights: list[float]
) -> None:
    with pytest.raises(
        ValueError, match=r"data\.train_weights=.*one number for each of the 2 files"
    ):
        make_weighted(tmp_path, tokenizer, weights)


CURRICULUM = """
def difficulty(row, epoch, easy="abcde"):
    text = row.prompt[-1]["content"]
    if epoch == 0 and text not in easy:
        return None
    return 0 if text in easy else 1
"""


def make_curriculum(folder: Path, tokenizer: PreTrainedTokenizerFast) -> PromptLoader:
    (folder / "order.py").write_text(CURRICULUM)
    file = write(folder / "t.parquet", list("abcdefghij"))
    return PromptLoader(
        PromptDataset([file], tokenizer, 8), 5, 0, curriculum=Curriculum(folder / "order.py")
    )


def test_a_curriculum_orders_rows_and_may_hold_them_back(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    loader = make_curriculum(tmp_path, tokenizer)
    batches = [texts(loader.next_batch()) for _ in range(5)]
    assert ["".join(sorted(batch)) for batch in batches] == [
        "abcde",
        "abcde",
        "fghij",
        "abcde",
        "fghij",
    ]
    assert batches[0] != batches[1] or batches[1] != batches[3]  # shuffled among equals
    resumed = make_curriculum(tmp_path, tokenizer)
    before = make_curriculum(tmp_path, tokenizer)
    before.next_batch()
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert texts(resumed.next_batch()) == batches[1]
    (tmp_path / "order.py").write_text("def difficulty(row, epoch): return row.nothing")
    with pytest.raises(
        ValueError, match=r"data\.curriculum: the function fails on .*AttributeError"
    ):
        PromptLoader(loader._dataset, 5, 0, curriculum=Curriculum(tmp_path / "order.py"))
    (tmp_path / "order.py").write_text("def difficulty(row, epoch): return None")
    with pytest.raises(ValueError, match="leaves every prompt out of epoch 0"):
        PromptLoader(loader._dataset, 5, 0, curriculum=Curriculum(tmp_path / "order.py"))


def test_an_environment_is_reset_with_all_columns_of_the_file(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    table = pq.read_table(write(tmp_path / "verl.parquet", list("abc")))
    words = pa.array([f"word {i}" for i in range(len(table))])
    path = tmp_path / "trl.parquet"
    pq.write_table(table.append_column("word", words), path)
    seen = []

    def offered(columns: Mapping[str, Any]) -> list[Any]:
        seen.append(columns["word"])
        return []

    dataset = PromptDataset([path], tokenizer, 8, offered=offered)
    assert dataset[1].columns["word"] == "word 1" and "word 0" in seen
    assert PromptDataset([path], tokenizer, 8)[1].columns == {}


def test_a_row_gives_its_prompt_again_and_counts_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the number in the files, whatever was left out before it, and of any file."""
    files = [
        write(tmp_path / "1.parquet", ["a", "a b c d", "c"]),
        write(tmp_path / "2.parquet", ["d", "e f g h", "f"]),
    ]
    dataset = PromptDataset(files, tokenizer, 4, "filter")
    assert [prompt.index for prompt in dataset] == [0, 2, 3, 5]
    assert [dataset.of_row(prompt.index) for prompt in dataset] == list(dataset)
    for number in (1, 6, -1):
        with pytest.raises(ValueError, match=rf"data\.train_files: row {number} of 6"):
            dataset.of_row(number)
    monkeypatch.setattr(dataset_module, "SCANNED", 2)
    monkeypatch.setattr(dataset_module, "PROBED", 3)
    large = PromptDataset(files, tokenizer, 4, "filter")
    assert large.of_row(5).text == "f"
    with pytest.raises(ValueError, match="row 1 of 6"):
        large.of_row(1)
    assert large.dropped == 0, "they were counted when they were served"


def test_prompts_made_ready_are_those_that_are_served(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an epoch's end and after a resume; none is made twice."""
    ready, plain = (make_loader(tmp_path, tokenizer, 3) for _ in range(2))
    made: list[Any] = []
    tokenize = dataset_module.tokenize

    def counted(*args: Any) -> Any:
        made.append(args)
        return tokenize(*args)

    for number in range(6):
        ready.prepare()
        with monkeypatch.context() as patch:
            patch.setattr(dataset_module, "tokenize", counted)
            batch = ready.next_batch()
        assert batch == plain.next_batch() and ready.state_dict() == plain.state_dict()
        if number == 3:
            ready.load_state_dict(plain.state_dict())
    assert len(made) <= 4, "only of prompts behind an epoch's end"


def test_prompts_that_are_served_while_they_are_made_ready_do_not_stay(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where batches are drawn ahead in one thread and made ready in another."""
    loader, plain = (make_loader(tmp_path, tokenizer, 2) for _ in range(2))
    dataset = loader._dataset
    rendered, behind = dataset._rendered, True

    def served_meanwhile(number: int) -> Any:
        nonlocal behind
        if behind:
            behind = False
            assert loader.next_batch() == plain.next_batch()
        return rendered(number)

    for _ in range(4):
        behind = True
        with monkeypatch.context() as patch:
            patch.setattr(dataset, "_rendered", served_meanwhile)
            loader.prepare()
        assert len(dataset._prepared) <= 2, "no more than a batch is kept"
    assert loader.next_batch() == plain.next_batch()

"""Preparation: the generated task, gsm8k's conversion, and sources that do not work."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf3d.data import arithmetic
from rlhf3d.data.gsm8k import SUFFIX, make_map_fn
from rlhf3d.data.prepare import prepare
from rlhf3d.data.rows import PromptRow, read_parquet, read_provenance
from rlhf3d.rewards.gsm8k import compute_score

EXAMPLES = [
    {"question": "A pot holds 3 cups. How many in 4 pots?", "answer": "3*4 = <<3*4=12>>12\n#### 12"},
    {"question": "How far is it?", "answer": "Far: #### 9 no.\n#### 1,080"},
    {"question": "What is lost?", "answer": "It sinks.\n#### -5"},
]


def question(row: PromptRow) -> str:
    return row.prompt[-1]["content"]


def write_jsonl(path: Path, examples: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))


def test_gsm8k_row_is_verls() -> None:
    row = make_map_fn("train")(EXAMPLES[1], 7)
    assert row.data_source == "openai/gsm8k" and row.ability == "math"
    assert row.prompt == [
        {
            "role": "user",
            "content": 'How far is it? Let\'s think step by step and output the final answer after "####".',
        }
    ]
    assert row.reward_model == {"style": "rule", "ground_truth": "1080"}
    assert row.extra_info == {"split": "train", "index": 7, **EXAMPLES[1]}
    assert make_map_fn("test")(EXAMPLES[2], 0).reward_model["ground_truth"] == "-5"


@pytest.mark.parametrize("example", [{"question": "?", "answer": "12"}, {"question": "?"}, {"answer": "#### 1"}])
def test_gsm8k_refuses_unusable_examples(example: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        make_map_fn("train")(example, 0)


@pytest.mark.parametrize("difficulty", list(arithmetic.NUMBER_RANGES))
def test_arithmetic_splits_are_disjoint_and_right(difficulty: str) -> None:
    train, test = arithmetic.generate(1500, 300, seed=1, difficulty=difficulty)
    assert (len(train), len(test)) == (1500, 300)
    assert len({question(r) for r in train}) == 1500 and len({question(r) for r in test}) == 300
    assert not {question(r) for r in train} & {question(r) for r in test}
    low, high = arithmetic.NUMBER_RANGES[difficulty]
    for row in train + test:
        working, _, last = row.extra_info["answer"].partition("\n#### ")
        assert last == row.reward_model["ground_truth"]
        a, op, b = re.match(r"(\d+) (\S) (\d+) = ", working).groups()  # type: ignore[union-attr]
        assert eval(f"{a} {op} {b}") == int(last) > 0
        numbers = [int(n) for n in re.findall(r"\d+", question(row))]
        assert numbers == [int(a), int(b)]
        assert low <= int(b) <= high and (op == "/" or low <= int(a) <= high)
        assert compute_score(row.extra_info["answer"], row.reward_model["ground_truth"], "strict").score == 1.0


def test_arithmetic_covers_its_templates_evenly() -> None:
    assert len(arithmetic.TEMPLATES) >= 12 and {t.op for t in arithmetic.TEMPLATES} == set("+-*/")
    for difficulty, keys in (("easy", arithmetic.EASY_TEMPLATES), ("hard", [t.key for t in arithmetic.TEMPLATES])):
        train, test = arithmetic.generate(20 * len(keys), 4 * len(keys), difficulty=difficulty)
        for rows, each in ((train, 20), (test, 4)):
            found = [row.extra_info["template"] for row in rows]
            assert {found.count(key) for key in keys} == {each} and set(found) == set(keys)


def test_arithmetic_prompts_hold_one_worked_example() -> None:
    row = arithmetic.generate(1, 0)[0][0]
    assert row.prompt[:-1] == list(arithmetic.PREAMBLE) and row.prompt[-1]["role"] == "user"


def test_arithmetic_is_a_function_of_its_arguments() -> None:
    assert arithmetic.generate(50, 10, seed=3) == arithmetic.generate(50, 10, seed=3)
    assert arithmetic.generate(50, 10, seed=3) != arithmetic.generate(50, 10, seed=4)
    chosen, _ = arithmetic.generate(40, 10, templates=["boxes", "pages"], suffix="Think.")
    assert {row.extra_info["template"] for row in chosen} == {"boxes", "pages"}
    assert all(question(row).endswith("? Think.") for row in chosen)


def test_arithmetic_refuses_what_it_cannot_make() -> None:
    with pytest.raises(ValueError, match="difficulty: no 'extreme'; known are easy"):
        arithmetic.generate(1, 1, difficulty="extreme")
    with pytest.raises(ValueError, match="templates: no 'box'"):
        arithmetic.generate(1, 1, templates=["box"])
    with pytest.raises(ValueError, match=r"5000 problems wanted, .* exist"):
        arithmetic.generate(5000, 1, templates=["boxes"])
    with pytest.raises(ValueError, match="train_size=0"):
        arithmetic.generate(0, 1)


def test_prepare_arithmetic_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        files = prepare("arithmetic", None, tmp_path / folder, train_size=64, test_size=16, seed=5)
        assert [(f.split, f.rows, f.dropped) for f in files] == [("train", 64, 0), ("test", 16, 0)]
        for file in files:
            assert file.sha256 == hashlib.sha256(Path(file.path).read_bytes()).hexdigest()
    for name in ("train.parquet", "test.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_provenance(tmp_path / "a" / "train.parquet")["options"]["seed"] == 5


def test_prepare_gsm8k_from_a_folder_counts_what_it_drops(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_jsonl(source / "train.jsonl", [*EXAMPLES, {"question": "?", "answer": "no final answer"}])
    pq.write_table(pa.Table.from_pylist(EXAMPLES[:2]), source / "test-00000-of-00001.parquet")
    train, test = prepare("gsm8k", source, tmp_path / "out")
    assert (train.rows, train.dropped, test.rows, test.dropped) == (3, 1, 2, 0)
    rows = read_parquet(train.path)
    assert [row.reward_model["ground_truth"] for row in rows] == ["12", "1080", "-5"]
    assert question(rows[0]) == f"{EXAMPLES[0]['question']} {SUFFIX}"
    sha = hashlib.sha256((source / "train.jsonl").read_bytes()).hexdigest()
    assert read_provenance(train.path)["source"] == {"train.jsonl": sha}


def test_prepare_gsm8k_from_one_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", EXAMPLES)
    (file,) = prepare("gsm8k", tmp_path / "test.jsonl", tmp_path / "out", suffix="")
    assert (file.split, Path(file.path).name, file.rows) == ("test", "test.parquet", 3)
    assert question(read_parquet(file.path)[0]) == EXAMPLES[0]["question"]


def test_prepare_names_the_mistake_and_the_fix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no data set 'gsm9k'; known are arithmetic, gsm8k"):
        prepare("gsm9k", None, out)
    with pytest.raises(ValueError, match="no option 'difficulty'; it has suffix"):
        prepare("gsm8k", None, out, difficulty="easy")
    with pytest.raises(ValueError, match="needs a source: a folder with train and test files"):
        prepare("gsm8k", None, out)
    with pytest.raises(ValueError, match="takes no source"):
        prepare("arithmetic", tmp_path, out)
    with pytest.raises(ValueError, match=r"no such source: .*nowhere"):
        prepare("gsm8k", tmp_path / "nowhere", out)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"no train\*\.jsonl or train\*\.parquet .*notes\.txt"):
        prepare("gsm8k", tmp_path, out)
    bad = tmp_path / "train.jsonl"
    bad.write_text(json.dumps(EXAMPLES[0]) + "\n{not json\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:2: not JSON"):
        prepare("gsm8k", bad, out)
    write_jsonl(bad, [{"question": "?", "answer": "none"}])
    with pytest.raises(ValueError, match="no usable row in the train split \\(1 dropped\\)"):
        prepare("gsm8k", bad, out)
    assert not out.exists()

"""Rows by their number: the same from memory and from the unpacked file, with little resident."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf3d.data import order, store
from rlhf3d.data.order import make_order
from rlhf3d.data.parquet import copy_rows, data_sources, read_parquet, write_parquet
from rlhf3d.data.rows import NO_SOURCE, PromptRow
from rlhf3d.data.store import RowStore


def rows(count: int, first: int = 0) -> list[PromptRow]:
    return [
        PromptRow(
            "mine",
            [{"role": "user", "content": f"q{i}"}],
            "math",
            {"ground_truth": str(i)},
            {"index": i},
        )
        for i in range(first, first + count)
    ]


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_come_by_number_over_files_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    monkeypatch.setattr(store, "BATCH_ROWS", 8)
    if not in_memory:
        monkeypatch.setattr(store, "IN_MEMORY_BYTES", 0)
    write_parquet(rows(21), tmp_path / "1.parquet", {}, row_group_size=5)
    write_parquet(rows(10, 21), tmp_path / "2.parquet", {}, row_group_size=100)
    both = RowStore([tmp_path / "1.parquet", tmp_path / "2.parquet"], tmp_path / "cache")
    assert [both[i] for i in range(len(both))] == rows(31)
    assert both.where(20) == f"{tmp_path / '1.parquet'} row 20"
    assert both.where(23) == f"{tmp_path / '2.parquet'} row 2"
    assert both.file_ranges == [range(21), range(21, 31)]
    assert (tmp_path / "cache").exists() is not in_memory


def test_the_unpacked_file_is_reused_until_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", 0)
    path, cache = tmp_path / "t.parquet", tmp_path / "cache"
    write_parquet(rows(5), path, {})
    RowStore([path], cache)
    (unpacked,) = cache.iterdir()
    before = unpacked.stat().st_mtime_ns
    RowStore([path], cache)
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [before]
    write_parquet(rows(6), path, {})
    assert len(RowStore([path], cache)) == 6 and len(list(cache.iterdir())) == 2


def test_nothing_is_left_of_an_unpacking_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", 0)
    write_parquet(rows(5), tmp_path / "t.parquet", {})

    def full(file: object, path: Path, sink: pa.NativeFile, columns: object) -> None:
        sink.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_unpack", full)
    with pytest.raises(ValueError, match=r"data\.cache_dir: cannot unpack .*No space left"):
        RowStore([tmp_path / "t.parquet"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_files_of_other_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH_ROWS", 8)
    write_parquet(rows(20), tmp_path / "t.parquet", {})
    table = pq.read_table(tmp_path / "t.parquet")
    table = table.set_column(0, "data_source", table.column("data_source").dictionary_encode())
    pq.write_table(
        table.append_column("more", pa.array(range(20))), tmp_path / "t.parquet", row_group_size=3
    )
    both = RowStore([tmp_path / "t.parquet"], tmp_path / "cache")
    assert [both[i] for i in range(20)] == read_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="no such file"):
        RowStore([tmp_path / "nothing.parquet"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_other_columns_are_there_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    """Data sets made for TRL name columns of their own."""
    path = tmp_path / "t.parquet"
    if not in_memory:
        monkeypatch.setattr(store, "IN_MEMORY_BYTES", 0)
    write_parquet(rows(3), path, {})
    table = pq.read_table(path)
    for name, values in (
        ("word", ["crane", "slate", "audio"]),
        ("ground_truth", ["x", "y", "z"]),
        ("data", [{"tries": 6}] * 3),
    ):
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path)
    # In either order: what is unpacked for one is not taken for the other.
    assert RowStore([path], tmp_path / "cache")[1].others == {}
    row = RowStore([path], tmp_path / "cache", environments=True)[1]
    assert row.others == {"word": "slate", "ground_truth": "y", "data": {"tries": 6}}
    assert (row.columns["word"], row.columns["data"]) == ("slate", {"tries": 6})
    assert row.columns["ground_truth"] == "y" and "others" not in row.columns
    assert row.ground_truth == "1", "what is scored is verl's"
    assert RowStore([path], tmp_path / "cache")[1].others == {}
    twice = pa.Table.from_arrays(
        [*table.columns, table.column("word")], [*table.column_names, "word"]
    )
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice.parquet: column 'word' occurs 2 times"):
        RowStore([tmp_path / "twice.parquet"], tmp_path / "cache", environments=True)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_data_set_made_for_trl_has_a_prompt_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    """Where rows have environments; the prompt may be a text. Elsewhere it is refused as before."""
    if not in_memory:
        monkeypatch.setattr(store, "IN_MEMORY_BYTES", 0)
    path, cache = tmp_path / "trl.parquet", tmp_path / "cache"
    said = [{"role": "system", "content": "Play."}, {"role": "user", "content": "Begin."}]
    for prompt, messages in (("Begin.", said[1:]), (said, said)):
        pq.write_table(pa.table({"prompt": [prompt], "word": ["crane"], "answer": [4]}), path)
        row = RowStore([path], cache, environments=True)[0]
        assert row.prompt == messages and row.others == {"word": "crane", "answer": 4}
        assert (row.data_source, row.ground_truth) == (NO_SOURCE, None)
        assert (row.columns["word"], row.columns["answer"]) == ("crane", 4)
        assert data_sources([path], environments=True) == {NO_SOURCE}
        with pytest.raises(ValueError, match=r"no column 'data_source'.*environment.path"):
            RowStore([path], cache)
        with pytest.raises(ValueError, match="no column 'data_source'"):
            data_sources([path])
    pq.write_table(pa.table({"question": ["?"]}), path)
    with pytest.raises(ValueError, match="no column 'prompt'"):
        RowStore([path], cache, environments=True)
    both = rows(1)[0]
    write_parquet([both], path, {})
    assert RowStore([path], cache, environments=True)[0] == both


def test_rows_are_copied_with_all_columns_and_again_from_the_first(tmp_path: Path) -> None:
    path, copy = tmp_path / "t.parquet", tmp_path / "copy.parquet"
    pq.write_table(pa.table({"prompt": list("abcde"), "word": range(5)}), path, row_group_size=2)
    for count in (1, 3, 5, 12):
        copy_rows(path, copy, count)
        assert pq.read_table(copy).column("word").to_pylist() == [n % 5 for n in range(count)]
        assert pq.read_table(copy).column_names == ["prompt", "word"]


def test_a_file_is_not_read_into_memory(tmp_path: Path) -> None:
    """400,000 rows, 160 MB unpacked: touching 500 of them all over keeps the process's own memory
    flat.
    """
    schema = pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
            ("reward_model", pa.struct([("ground_truth", pa.string())])),
        ]
    )
    with pq.ParquetWriter(tmp_path / "t.parquet", schema) as writer:
        for start in range(0, 400_000, 50_000):
            numbers = [str(i) for i in range(start, start + 50_000)]
            texts = [f"{number} " + "x" * 350 for number in numbers]
            messages = pa.StructArray.from_arrays(
                [pa.array(texts), pa.array(["user"] * 50_000)], ["content", "role"]
            )
            columns = [
                pa.array(["mine"] * 50_000),
                pa.ListArray.from_arrays(pa.array(range(50_001), pa.int32()), messages),
                pa.StructArray.from_arrays([pa.array(numbers)], ["ground_truth"]),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    code = (
        "import sys, random\n"
        "from rlhf3d.data.store import RowStore\n"
        "def own():\n"
        "    lines = open('/proc/self/smaps_rollup')\n"
        "    return sum(int(l.split()[1]) for l in lines if l.startswith('Anonymous'))\n"
        "before = own()\n"
        "store = RowStore([sys.argv[1]], sys.argv[2])\n"
        "for i in random.Random(0).sample(range(len(store)), 500):\n"
        "    assert store[i].reward_model['ground_truth'] == str(i)\n"
        "print(own() - before)\n"
    )
    for _ in range(2):  # unpacking, then from the cache
        command = [sys.executable, "-c", code, str(tmp_path / "t.parquet"), str(tmp_path / "cache")]
        environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        grown_mb = int(done.stdout) / 1024
        assert grown_mb < 80


def test_orders_are_those_of_every_checkpoint() -> None:
    """A resumed run meets the prompts that it would have met."""
    served = [105, 100, 103, 102, 107, 108, 106, 104, 101, 109]
    assert list(make_order(range(100, 110), "0:0", True)) == served
    assert make_order(range(10), "0:0", False) == range(10)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000])
def test_large_sets_are_shuffled_by_numpy(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(order, "PYTHON_ROWS", 0)
    rows = range(100, 100 + count)
    served = list(make_order(rows, "0:0", True))
    assert sorted(served) == list(rows) and served == list(make_order(rows, "0:0", True))
    assert all(type(number) is int for number in served)
    if count > 10:
        assert served != list(make_order(rows, "0:1", True))
    if count == 17:
        assert [number - 100 for number in served] == [
            16,
            0,
            12,
            7,
            1,
            5,
            15,
            11,
            8,
            9,
            14,
            13,
            3,
            2,
            4,
            6,
            10,
        ]

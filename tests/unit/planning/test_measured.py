"""Numbers measured on a GPU take the place of assumed ones.

A file that is not of the form is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.planning import measured
from rlhf3d.planning.hardware import FILE, load_hardware, parse_cluster
from rlhf3d.planning.measured import (
    MEASURED,
    check_measured,
    read_measured,
    with_measured,
    write_measured,
)

ROOT = Path(__file__).parents[3]
H100 = "NVIDIA H100 80GB HBM3"
CLUSTER = parse_cluster("8xH100", load_hardware())
MATH = [
    "plan",
    str(ROOT / "configs/math.yaml"),
    "--model-config",
    str(ROOT / "configs/models/Qwen2.5-7B-Instruct"),
]


def planned(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli.app, [*MATH, "--json", *arguments])
    assert done.exit_code == 0, done.exception
    return json.loads(done.stdout)


def test_numbers_take_the_place_of_assumed_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    write_measured(
        file, H100, "a test", {"process_gib": 2.25, "sync_gbs": 1.0, "matmul_efficiency": 0.25}
    )
    base, mine = planned(), planned("--measured", str(file))
    process = [
        made["memory"]["ranks"][0]["phases"]["update_actor"]["process"] / 2**30
        for made in (base, mine)
    ]
    assert process == [3.0, 2.25]
    phases = [made["time"]["phases"] for made in (base, mine)]
    assert phases[1]["update_actor"]["compute"] > 1.8 * phases[0]["update_actor"]["compute"]
    assert phases[1]["sync_weights"]["buckets"] > 4 * phases[0]["sync_weights"]["buckets"]
    assert phases[1]["generate"]["host"] == phases[0]["generate"]["host"]  # not in the file
    assert (
        base["devices"]["measured"] == ""
        and "matmul_efficiency, process_gib" in mine["devices"]["measured"]
    )


def test_the_default_file_is_taken_for_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_measured(CLUSTER, None) is CLUSTER
    write_measured(measured.DEFAULT, H100, "a test", {"process_gib": 2.25})
    assert with_measured(CLUSTER, None).hardware.process_gib == 2.25
    other = parse_cluster("8xA100", load_hardware())
    assert with_measured(other, None) is other
    with pytest.raises(ValueError, match="is of NVIDIA H100 80GB HBM3, the plan for A100"):
        with_measured(other, measured.DEFAULT)
    assert other.hardware.is_device("NVIDIA A100-SXM4-80GB")
    assert not CLUSTER.hardware.is_device("NVIDIA A100-SXM4-80GB")


GOOD = {"format": 1, "device": H100, "source": "x", "numbers": {"process_gib": 2.5}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([], r'mine: expected a JSON object with "format": 1'),
        (GOOD | {"format": 2}, r'expected a JSON object with "format": 1'),
        ({"format": 1, "device": H100}, "mine: lacks source, numbers"),
        (GOOD | {"number": {}}, "mine: has number; only format, device, source, numbers are known"),
        (GOOD | {"device": 100}, "mine: device = 100 is not a text"),
        (GOOD | {"numbers": [1]}, r"mine: numbers = \[1\] is not an object"),
        (
            GOOD | {"numbers": {"proces_gib": 1}},
            r"numbers\.proces_gib is not known; did you mean process_gib\? Known",
        ),
        (
            GOOD | {"numbers": {"process_gib": 0}},
            r"numbers\.process_gib = 0 is not a number above 0 and up to 4096",
        ),
        (GOOD | {"numbers": {"sync_gbs": "12"}}, r"numbers\.sync_gbs = '12' is not a number"),
        (GOOD | {"numbers": {"sync_gbs": True}}, r"numbers\.sync_gbs = True is not a number"),
        (
            GOOD | {"numbers": {"latency_s": float("nan")}},
            r"numbers\.latency_s = nan is not a number",
        ),
        (
            GOOD | {"numbers": {"matmul_efficiency": 1.2}},
            r"matmul_efficiency = 1\.2 is not a number above 0 and up to 1",
        ),
    ],
)
def test_another_form_is_refused(changed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_measured(changed, "mine")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for file in (tmp_path / "none.json", tmp_path / "bad.json", tmp_path):
        with pytest.raises(ValueError, match=r"--measured: .* cannot be read"):
            read_measured(file)
    with pytest.raises(ValueError, match="process_gib = -1"):
        write_measured(tmp_path / "new.json", H100, "x", {"process_gib": -1})
    assert not (tmp_path / "new.json").exists()


def test_every_number_is_one_of_the_hardware_and_explained() -> None:
    assert set(MEASURED) <= set(yaml.safe_load(FILE.read_text())["H100"])
    page = (Path(__file__).parents[3] / "docs" / "planning.md").read_text()
    assert all(f"| `{name}` |" in page for name in MEASURED)

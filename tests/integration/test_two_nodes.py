"""A rehearsal over two nodes, started by the rendered ssh script.

Nodes are network namespaces of this machine.

Each node has its own network, host name and /dev/shm; the worker also has its own processes, so
that it can be lost. What is not shown here: GPUs, and file systems that are really remote.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.jobs import read_rows, write_job
from support.nodes import Network, network, possible

BIN = Path(sys.executable).parent
# The first stage and the engine are on one node, the second stage is on the other.
SIZES = ("rollout.n=2", "actor.layout.pp=2", "trainer.val_before_train=false")
# Where a node is lost: Ray's own wait for a silent one is half a minute and more.
HEALTH = {"initial_delay": 1000, "period": 500, "timeout": 2000}
FAKE = "megatron_core-0.15.0.dist-info"

pytestmark = pytest.mark.skipif(
    not possible(), reason="needs root, ip, unshare and nsenter to make networks"
)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Network]:
    with network(tmp_path) as made:
        made.add("node-a", shared_processes=True)
        yield made


def launch(
    nodes: Network, folder: Path, *arguments: str, health: Mapping[str, int] = HEALTH
) -> subprocess.Popen[str]:
    """Render the script that runs the job on both nodes, and start it on the first."""
    if not (folder / "job.yaml").exists():
        write_job(folder, algorithm={"adv_estimator": "grpo"})
    resources = (
        "--gpus-per-node",
        "0",
        "--cpus-per-node",
        "2",
        "--workdir",
        str(folder),
        "--venv",
        str(BIN.parent),
    )
    command = [str(BIN / "rlhf3d"), "launch", "ssh", str(folder / "job.yaml"), *SIZES, *arguments]
    checks = [
        part
        for name, ms in health.items()
        for part in ("--env", f"RAY_health_check_{name}_ms={ms}")
    ]
    script = folder / "job.sh"
    subprocess.run(
        [*command, *resources, *checks, "--hosts", "node-a,node-b", "--output", str(script)],
        check=True,
    )
    return subprocess.Popen(
        nodes.enter("node-a", "bash", str(script)),
        env=nodes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(file: Path, process: subprocess.Popen[str], timeout_s: float) -> None:
    """Wait until a process has written a file."""
    deadline = time.monotonic() + timeout_s
    while not file.is_file():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            raise AssertionError(process.communicate(timeout=60))
        time.sleep(0.02)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_rehearsal_over_two_nodes_goes_on_after_the_loss_of_one(
    nodes: Network, tmp_path: Path
) -> None:
    nodes.add("node-b")
    folder = tmp_path / "rehearsals" / "job"
    with launch(nodes, tmp_path, "--rehearse") as process:
        wait_for(folder / "run" / "checkpoints" / "latest", process, 240)
        nodes.lose("node-b")
        lost = time.monotonic()
        _, errors = process.communicate(timeout=180)
    assert process.returncode == 1, errors
    assert time.monotonic() - lost < 150
    assert "node node-b (10.77.0.2) was lost" in errors and len(errors.splitlines()) < 60
    assert [row["step"] for row in read_rows(folder / "run")] == [1]

    nodes.add("node-b")
    with launch(nodes, tmp_path, "--rehearse") as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert "resume from step 1: rehearsals/job/run/checkpoints/step_1" in output
    assert "two steps, saved, resumed and repeated exactly" in output
    for run in ("run", "resumed"):
        checked = re.findall(
            r"checked node-. .*: (\d) CPU, node-. .*: (\d) CPU;",
            (folder / run / "logs" / "driver.log").read_text(),
        )
        assert checked and set(checked) == {("2", "1")}
        for row in read_rows(folder / run):
            assert (
                row.get("sync/canary_abs_diff", 0.0) < 1e-4
                and row["training/rollout_logprobs_diff_max"] < 1e-3
            )


def test_faults_of_a_node_are_found_before_models_load(nodes: Network, tmp_path: Path) -> None:
    """A node that does not see the run's folder, and has another Megatron."""
    (tmp_path / "run").mkdir()
    (tmp_path / "other" / FAKE).mkdir(parents=True)
    (tmp_path / "other" / FAKE / "METADATA").write_text("Name: megatron-core\nVersion: 0.15.0\n")
    nodes.add("node-b", hide=tmp_path / "run", environment={"PYTHONPATH": str(tmp_path / "other")})
    process = launch(nodes, tmp_path, "trainer.total_training_steps=1", health={})
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 2, output + errors
    assert "The cluster cannot run this as it stands" in errors
    for piece in (
        "megatron-core 0.15.0, the driver has 0.16.1",
        "does not see what the driver wrote in trainer.output",
    ):
        assert f"node node-b (10.77.0.2): {piece}" in errors
    assert "node node-a" not in errors and "load models" not in output

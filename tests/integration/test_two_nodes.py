"""A run over two nodes (network namespaces of this machine), started by the rendered ssh script.

Each node has a network, a host name and a /dev/shm of its own; the worker also has its own processes, so that it can be
lost. What is not shown here: GPUs, and file systems that are really remote.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.jobs import read_rows, write_job
from support.nodes import Network, network, possible

BIN = Path(sys.executable).parent
SIZES = ("rollout.n=2", "actor.layout.pp=3", "actor.layout.first_stage_layers=2", "cluster.threads_per_rank=1")
PLACES = ("rollout.placement=disaggregated", "trainer.val_before_train=false")
SAVES = ("trainer.total_training_steps=1000", "trainer.save_freq=1", "trainer.keep_last=2", "trainer.save_hf=never")
# Ray's own wait for a silent node is half a minute and more.
HEALTH = {"initial_delay": 1000, "period": 500, "timeout": 2000}
FAKE = "megatron_core-0.15.0.dist-info"

pytestmark = pytest.mark.skipif(not possible(), reason="needs root, ip, unshare and nsenter to make networks")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Network]:
    with network(tmp_path) as made:
        made.add("node-a", shared_processes=True)
        yield made


def launch(nodes: Network, folder: Path, hosts: str, *arguments: str) -> subprocess.Popen[str]:
    """Render the script that runs the job, and start it on the first node."""
    if not (folder / "job.yaml").exists():
        write_job(folder, algorithm={"adv_estimator": "grpo"})
    resources = ("--gpus-per-node", "0", "--cpus-per-node", "2", "--workdir", str(folder), "--venv", str(BIN.parent))
    command = [str(BIN / "rlhf3d"), "launch", "ssh", str(folder / "job.yaml"), *SIZES, *PLACES, *arguments]
    checks = [part for name, ms in HEALTH.items() for part in ("--env", f"RAY_health_check_{name}_ms={ms}")]
    script = folder / "job.sh"
    subprocess.run([*command, *resources, *checks, "--hosts", hosts, "--output", str(script)], check=True)
    return subprocess.Popen(
        nodes.enter("node-a", "bash", str(script)),
        env=nodes.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], number: int) -> int:
    """Read output until so many steps are done; the last one's number."""
    assert process.stdout is not None and process.stderr is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if (match := re.match(r"step +(\d+)/", line)) and (number := number - 1) == 0:
            return int(match[1])
    raise AssertionError("".join(seen[-30:]) + process.stderr.read())


@pytest.mark.timeout(600)
def test_trains_over_two_nodes_and_survives_the_loss_of_one(nodes: Network, tmp_path: Path) -> None:
    nodes.add("node-b")
    with launch(nodes, tmp_path, "node-a,node-b", *SAVES) as process:
        wait_for_step(process, 2)
        nodes.lose("node-b")
        lost = time.monotonic()
        _, errors = process.communicate(timeout=180)
    assert process.returncode == 1, errors
    assert time.monotonic() - lost < 150
    assert "node node-b (10.77.0.2) was lost" in errors and len(errors.splitlines()) < 60
    log = (tmp_path / "run" / "logs" / "driver.log").read_text()
    # Of three training ranks and the engine each node holds two: there are training ranks on both.
    for node in ("node-a (10.77.0.1)", "node-b (10.77.0.2)"):
        assert f"{node}: 2 bundles" in log
    for row in read_rows(tmp_path / "run"):
        assert row.get("sync/canary_abs_diff", 0.0) < 1e-4 and row["training/rollout_logprobs_diff_max"] < 1e-3
    saved = int((tmp_path / "run" / "checkpoints" / "latest").read_text().removeprefix("step_"))

    nodes.add("node-b")
    with launch(nodes, tmp_path, "node-a,node-b", *SAVES) as process:
        first = wait_for_step(process, 1)
        process.send_signal(signal.SIGUSR1)
        output, errors = process.communicate(timeout=180)
    assert process.returncode == 75, errors
    assert first == saved + 1 and "stopped: SIGUSR1" in output
    steps = [row["step"] for row in read_rows(tmp_path / "run") if row["step"] > 0]
    assert steps == list(range(1, len(steps) + 1)) and steps[-1] >= first


@pytest.mark.timeout(300)
def test_faults_of_a_node_are_found_before_models_load(nodes: Network, tmp_path: Path) -> None:
    """A node that does not see the run's folder, and has another Megatron."""
    (tmp_path / "run").mkdir()
    (tmp_path / "other" / FAKE).mkdir(parents=True)
    (tmp_path / "other" / FAKE / "METADATA").write_text("Name: megatron-core\nVersion: 0.15.0\n")
    nodes.add("node-b", hide=tmp_path / "run", environment={"PYTHONPATH": str(tmp_path / "other")})
    process = launch(nodes, tmp_path, "node-a,node-b", "trainer.total_training_steps=1")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 2, output + errors
    assert "The cluster cannot run this as it stands" in errors
    for piece in (
        "megatron-core 0.15.0, the driver has 0.16.1",
        "does not see what the driver wrote in trainer.output",
    ):
        assert f"node node-b (10.77.0.2): {piece}" in errors
    assert "node node-a" not in errors and "load models" not in output

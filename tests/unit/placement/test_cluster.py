"""What outlives Ray's shutdown is waited for, then killed."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time

import psutil
import pytest

from rlhf3d.placement import ray_here


def test_waits_for_processes_that_end_by_themselves(caplog: pytest.LogCaptureFixture) -> None:
    ending = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    ray_here.wait_until_gone([psutil.Process(ending.pid)])
    assert ending.poll() == 0
    assert not caplog.records


def test_kills_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_here, "END_S", 0.2)
    stuck = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with caplog.at_level(logging.WARNING):
        ray_here.wait_until_gone([psutil.Process(stuck.pid)])
    assert stuck.wait(60) == -signal.SIGKILL
    assert str(stuck.pid) in caplog.text


def test_a_process_that_nobody_waits_for_has_ended() -> None:
    """As Ray's do where their parent is gone, and the container's first process waits for none."""
    command = "sleep 0.2 & echo $!; exec sleep 60"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        zombie = psutil.Process(int(parent.stdout.readline()))
        began = time.monotonic()
        ray_here.wait_until_gone([zombie])
        assert time.monotonic() - began < ray_here.END_S / 2
        assert zombie.status() == psutil.STATUS_ZOMBIE
        parent.kill()


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_sockets_have_short_paths_whatever_the_temporary_folder(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, "/scratch/local/me")
    assert ray_here.short_temporary_folder() is None
    monkeypatch.setenv(name, "/scratch/local/slurm/job-12345678/some-user/tmp")
    assert ray_here.short_temporary_folder() == "/tmp/ray"


def test_ray_has_room_for_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, int] = {}

    def init(**settings: int) -> None:
        told.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_here.ray, "init", init)
    with pytest.raises(KeyboardInterrupt):
        ray_here.RayHere().start(1, None, 5.0, batch_bytes=600 << 20)
    assert told["object_store_memory"] > 2 * 600 << 20

"""What is refused: jobs that do not fit nodes or target, names, times, options without a use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.launching import POD, ROOT, SHARED, SLURM, TWO_NODES, refusal

from rlhf3d.config.load import ConfigError
from rlhf3d.launch.job import make_job
from rlhf3d.launch.options import Options, parse_duration
from rlhf3d.launch.render import render, slurm_time
from rlhf3d.launch.rules import default_name


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    text = refusal("slurm", "configs/math.yaml", "--nodes", "2", "--gpus-per-node", "2")
    assert "does not fit 2 nodes with 2 GPUs each" in text
    assert (
        "tp 2 x pp 2 x dp 2 = 8 ranks, more than cluster.num_nodes 2 x gpus_per_node 2 = 4 GPUs"
        in text
    )
    text = refusal("slurm", "configs/math.yaml", "--nodes", "3", "--time", "5m")
    assert "8 GPUs are on 1 node with 8 each, so 2 of 3 nodes would be idle" in text
    assert (
        "--time 300 s leaves nothing beside --grace 300 s and cluster.startup_timeout_s 900 s"
        in text
    )
    text = refusal("slurm", "configs/math.yaml", "--nodes", "8", "--gpus-per-node", "1")
    assert (
        "rollout.tensor_parallel_size = 2: an engine's ranks must be on one node, which has 1 GPUs"
        in text
    )
    assert "actor.layout.tp = 2: does not divide the 1 GPUs of a node" in text
    on_cpu = (
        "slurm",
        "configs/quickstart.yaml",
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--cpus-per-node",
        "2",
    )
    assert (
        "3 + 2 training and engine ranks on 2 nodes: 3 cores, more than --cpus-per-node 2"
        in refusal(*on_cpu)
    )
    assert "5 of 7 nodes would have no training rank" in refusal(
        "slurm",
        "configs/quickstart.yaml",
        "actor.layout.dp=1",
        "--nodes",
        "7",
        "--gpus-per-node",
        "0",
    )
    text = refusal("slurm", "configs/math.yaml", "trainer.max_wall_clock_s=3600", "--time", "1h")
    assert (
        "trainer.max_wall_clock_s 3600 + cluster.startup_timeout_s 900 = 4500 s, more than --time "
        "3600 s" in text
    )


def test_what_a_target_lacks_is_named() -> None:
    assert "`local` is one machine" in refusal("local", "configs/math.yaml", *TWO_NODES)
    assert "--hosts names 1 host, the job has 2" in refusal(
        "ssh", "configs/math.yaml", *TWO_NODES, "--hosts", "a"
    )
    text = refusal("kuberay", "configs/math.yaml", "--workdir", "/opt")
    assert "--image: KubeRay needs" in text and "--volume: KubeRay needs" in text
    assert "trainer.output_dir=/shared/runs/math" in text
    assert "--gpu-type" in refusal("skypilot", "configs/math.yaml", SHARED)
    assert "known are local, slurm" in refusal("pbs", "configs/math.yaml")
    assert "--submit needs --output" in refusal(
        "local", "configs/quickstart.yaml", "--gpus-per-node", "0", "--submit"
    )
    assert "--env A" in refusal("local", "configs/quickstart.yaml", "--env", "A")
    with pytest.raises(ConfigError, match="no such key"):
        make_job("slurm", "configs/math.yaml", ["trainer.sed=1"], Options())


def test_the_time_limit_follows_from_the_runs_own() -> None:
    job = make_job("slurm", "configs/math.yaml", ["trainer.max_wall_clock_s=3601"], Options())
    assert job.time_s == 4560 and "#SBATCH --time=0-01:16:00\n" in render("slurm", job)


def test_durations() -> None:
    assert [
        parse_duration(text) for text in ("90m", "4h", "2d", "5s", "01:00:01", "1-00:00:00")
    ] == [
        5400,
        14400,
        172800,
        5,
        3601,
        86400,
    ]
    assert slurm_time(parse_duration("2-03:04:05")) == "2-03:04:05"
    for text in ("4", "4 h", "1:00", "h"):
        with pytest.raises(ValueError, match="no duration"):
            parse_duration(text)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("base_math", "base-math"),
        ("7b_math", "run-7b-math"),
        (
            "grpo_qwen2_5_7b_instruct_math_lighteval_clip_higher_v3",
            "grpo-qwen2-5-7b-instruct-math-lighteval-c",
        ),
        ("x" * 40 + "_y", "x" * 40),
        ("__final__", "final"),
        ("実験", "rlhf3d"),
    ],
)
def test_names_by_the_configuration(stem: str, expected: str) -> None:
    """With the suffix of generateName at most 47 characters, and a DNS-1035 label."""
    assert default_name("kuberay", f"some/{stem}.yaml") == expected
    assert len(f"{expected}-abcde") <= 47 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", expected)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            (*POD, "--name", "My_Job"),
            "--name 'My_Job': `kuberay` takes a lower-case letter, then lower-case letters",
        ),
        ((*POD, "--name", "7b"), "--name '7b'"),
        ((*POD, "--name", "x" * 42), "at most 41 characters"),
        ((*POD, "--namespace", "Name Space"), "--namespace 'Name Space'"),
        ((*POD, "--queue", "Q 1"), "--queue 'Q 1'"),
        ((*POD[:5], "--volume", "My Claim"), "--volume 'My Claim'"),
        ((*POD, "--mount", "shared"), "--mount shared: expected an absolute path"),
        ((*POD, "--workdir", "~/exp"), "--workdir ~/exp: expected an absolute path of the pods"),
        ((*POD, "--image", "a\nb"), "--image 'a\\nb': expected text in one line"),
        (
            (*POD, "--partition", "gpu"),
            "--partition would be ignored: `kuberay` has no use for it; it is for slurm",
        ),
        ((*POD, "--venv", "env"), "--venv would be ignored: `kuberay` has no use for it"),
        ((*POD, "--port", "6379"), "--port would be ignored"),
        ((*POD, "--grace", "60s"), "--grace would be ignored: it is the end of --time"),
        ((*POD, "--env", "A-B=c"), "--env A-B: expected NAME=VALUE"),
        ((*POD, "--env", "A=1", "--env", "A=2"), "--env A: given twice"),
        (
            (*POD, "model.path=/data/m"),
            "model.path = /data/m: not under --mount /shared, which is all that the nodes",
        ),
        (
            (*POD, "data.val_files=[/data/v.parquet]"),
            "data.val_files = /data/v.parquet: not under --mount /shared",
        ),
        ((*SLURM, "--name", "a/b"), "--name 'a/b': `slurm` takes letters, digits"),
        ((*SLURM, "--name", "x\ntouch y"), "--name 'x\\ntouch y'"),
        (
            (*SLURM, "--image", "i", "--venv", "e"),
            "--venv would be ignored: --image has its own environment",
        ),
        (
            (*SLURM, "--volume", "v"),
            "--volume would be ignored: `slurm` has no use for it; it is for kuberay, skypilot",
        ),
        ((*SLURM, "--grace", "0s"), "--grace 0: "),
        (
            (*SLURM, "--cpus-per-node", "1"),
            "--cpus-per-node 1: 8 GPUs hold 16 training and engine ranks",
        ),
        (
            (*SLURM, "--image", "i", "model.path=/a,b/m"),
            "/a,b/m cannot be mounted into a container",
        ),
        (
            (*SLURM, "--memory-gib-per-node", "1"),
            "--memory-gib-per-node 1: /dev/shm, 8 GiB a GPU = 64 GiB, is part of it",
        ),
        (("ssh", *SLURM[1:], "--hosts", "-oProxyCommand=x"), "--hosts '-oProxyCommand=x'"),
        (("ssh", *SLURM[1:], "--hosts", "a,a"), "a host is there twice"),
        (("local", *SLURM[1:], "--retries", "2"), "--retries would be ignored"),
    ],
)
def test_rules_of_a_target(arguments: tuple[str, ...], told: str) -> None:
    assert told in refusal(*arguments)


def test_the_time_limit_is_every_targets(tmp_path: Path) -> None:
    for target in ("local", "ssh"):
        options = Options(gpus_per_node=0, time="1h", hosts="a")
        assert (
            "trainer.max_wall_clock_s=3000"
            in make_job(target, "configs/quickstart.yaml", [], options).command
        )

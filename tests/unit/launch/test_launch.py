"""Job files: what they say, and that their languages read them."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support.launching import IMAGE, POD, ROOT, SHARED, SLURM, TWO_NODES, launch, words_of

from rlhf3d.config.load import load_config
from rlhf3d.launch.job import make_job
from rlhf3d.launch.options import Options
from rlhf3d.launch.render import TARGETS, render
from rlhf3d.rehearsal.shrink import ENGINE_RANKS, MAX_RANKS

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, tuple[str, ...]] = {
    "local.sh": (
        "local",
        "configs/quickstart.yaml",
        "--gpus-per-node",
        "0",
        "--workdir",
        "/home/user/rlhf3d",
    ),
    "slurm.sh": (
        "slurm",
        "configs/math.yaml",
        *TWO_NODES,
        "--partition",
        "gpu",
        "--env",
        "NCCL_DEBUG=WARN",
    ),
    "ssh.sh": ("ssh", "configs/math.yaml", SHARED, *TWO_NODES, "--hosts", "node-1,node-2"),
    "kuberay.yaml": ("kuberay", "configs/math.yaml", *TWO_NODES, *IMAGE, "--volume", "shared"),
    "skypilot.yaml": (
        "skypilot",
        "configs/math.yaml",
        SHARED,
        *TWO_NODES[:6],
        "--volume",
        "v",
        "--gpu-type",
        "H100",
    ),
}


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def rendered(name: str) -> str:
    done = launch(*CASES[name])
    assert done.exit_code == 0, done.exception
    return done.stdout


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """Written anew by `RLHF3D_GOLDEN=1 pytest tests/unit/launch`, to be read before it is
    committed.
    """
    text, path = rendered(name), GOLDEN / name
    if os.environ.get("RLHF3D_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(".sh")])
def test_bash_reads_the_scripts(name: str) -> None:
    checked = subprocess.run(
        ["bash", "-n"], input=rendered(name), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "-"], input=rendered(name), capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, checked.stdout


def test_slurm_with_an_image_on_one_node() -> None:
    text = launch("slurm", "configs/math.yaml", *IMAGE, "--workdir", "/shared/rlhf3d").stdout
    container = (
        '--container-image=registry/rlhf3d:gpu --container-mounts="$PWD:$PWD" '
        '--container-workdir="$PWD"'
    )
    assert f"step+=({container})\n" in text and "activate" not in text
    assert "#SBATCH --nodes=1\n" in text and "--time" not in text
    assert "ray_workers=$!" not in text, "one node has no workers"


def test_every_target_has_a_golden_file() -> None:
    assert {arguments[0] for arguments in CASES.values()} == set(TARGETS)


def test_rayjob() -> None:
    job: dict[str, Any] = yaml.safe_load(rendered("kuberay.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["submissionMode"] == "HTTPMode" and spec["shutdownAfterJobFinishes"] is True
    assert spec["activeDeadlineSeconds"] == 4 * 3600
    words = words_of(spec["entrypoint"].split("exec ")[1])
    assert (
        words[:3] == ["rlhf3d", "train", "configs/math.yaml"]
        and words[-1] == "cluster.ray_address=auto"
    )
    limit_s = next(
        int(word.split("=")[1]) for word in words if word.startswith("trainer.max_wall_clock_s=")
    )
    assert limit_s == 4 * 3600 - 900 - 300, "the run saves itself before Kubernetes ends it"
    cluster = spec["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "dev-shm": "/dev/shm"}
        volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
        assert volumes["shared"] == {"persistentVolumeClaim": {"claimName": "shared"}}
        assert volumes["dev-shm"] == {"emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}}


def test_rayjob_of_one_node_with_a_queue() -> None:
    case = ("kuberay", "configs/math.yaml", "--image", "i", "--volume", "v", "--queue", "team")
    job = yaml.safe_load(launch(*case).stdout)
    assert "workerGroupSpecs" not in job["spec"]["rayClusterSpec"]
    assert (
        job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
        and job["spec"]["suspend"] is True
    )


def test_skypilot() -> None:
    task: dict[str, Any] = yaml.safe_load(rendered("skypilot.yaml"))
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:4"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert task["volumes"] == {"/shared": "v"}
    assert "make setup GPU=1 VENV=.venv" in task["setup"] and "pip install -r" not in task["setup"]
    for script in (task["setup"], task["run"]):
        checked = subprocess.run(
            ["bash", "-n"], input=script, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_an_override_reaches_the_command_whole(target: str, tmp_path: Path) -> None:
    """Spaces, quotes and dollar signs are the run's, not the shell's or YAML's."""
    override = "custom_reward_function.kwargs={mark: 'a $HOME \"b\"'}"
    options = Options(
        gpus_per_node=0, image="i" if target == "kuberay" else None, volume="v", hosts="a"
    )
    text = render(
        target,
        make_job(
            target, "configs/quickstart.yaml", [override, "trainer.output_dir=/shared/x"], options
        ),
    )
    if target == "kuberay":
        text = yaml.safe_load(text)["spec"]["entrypoint"].split("exec ")[1]
    elif target == "skypilot":
        text = yaml.safe_load(text)["run"]
    (line,) = [
        line for line in text.splitlines() if "rlhf3d train" in line and not line.startswith("#")
    ]
    command = line.strip().removeprefix("exec ").removesuffix(" &")
    assert override in words_of(command)


def test_a_rehearsal_runs_on_the_cpus_of_the_nodes() -> None:
    options = Options(rehearse=True, hosts="a,b")
    job = make_job("ssh", "configs/math_70b.yaml", ["trainer.seed=1"], options)
    command = ("rlhf3d", "rehearse", "configs/math_70b.yaml", "trainer.seed=1")
    assert job.command == (*command, "cluster.platform=cpu", "cluster.num_nodes=2")
    assert (job.gpus_per_node, job.cpus_per_node) == (0, MAX_RANKS + ENGINE_RANKS)


def test_the_run_of_the_job_loads_as_the_launcher_checked_it() -> None:
    job = make_job(
        "slurm", "configs/math.yaml", ["trainer.seed=3"], Options(nodes=2, gpus_per_node=4)
    )
    config = load_config(job.command[2], job.command[3:])
    assert (config.cluster.num_nodes, config.cluster.gpus_per_node, config.trainer.seed) == (
        2,
        4,
        3,
    )
    assert config.cluster.platform == "cuda"


def test_local_runs_the_command(tmp_path: Path) -> None:
    """The written script, with a `train` that only tells what it was called with."""
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "activate").write_text(f'PATH="{tmp_path}/env/bin:$PATH"\n')
    (tmp_path / "env" / "bin" / "rlhf3d").write_text(
        '#!/bin/bash\necho "$PWD $COLOUR $*"\nexit 75\n'
    )
    (tmp_path / "env" / "bin" / "rlhf3d").chmod(0o755)
    options = (
        "--workdir",
        str(tmp_path),
        "--venv",
        "env",
        "--gpus-per-node",
        "0",
        "--env",
        "COLOUR=deep blue",
    )
    script = tmp_path / "jobs" / "job.sh"
    command = [
        sys.executable,
        "-m",
        "rlhf3d.cli",
        "launch",
        "local",
        "configs/quickstart.yaml",
        *options,
    ]
    done = subprocess.run(
        [*command, "--output", str(script), "--submit"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 75, done.stderr
    assert f"{tmp_path} deep blue train configs/quickstart.yaml cluster.platform=cpu" in done.stdout


def errors_by_schema(text: str) -> list[str]:
    """What the Kubernetes API, which refuses unknown fields, would find in a RayJob."""
    return [
        f"{'/'.join(map(str, error.path))}: {error.message}"
        for error in jsonschema.Draft7Validator(RAYJOB_SCHEMA).iter_errors(yaml.safe_load(text))
    ]


def as_strict_schema(node: Any) -> Any:
    """An OpenAPI schema of a CustomResourceDefinition as JSON Schema, unknown fields being
    errors.
    """
    if isinstance(node, list):
        return [as_strict_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    strict = {key: as_strict_schema(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string") is True:
        strict = {"type": ["integer", "string"]}
    if isinstance(node.get("properties"), dict) and "additionalProperties" not in node:
        strict["additionalProperties"] = False
    return strict


RAYJOB_SCHEMA = as_strict_schema(yaml.safe_load((GOLDEN.parent / "rayjob_schema.yaml").read_text()))
RAYJOB_SCHEMA["properties"]["metadata"] = {"type": "object"}


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--queue", "team", "--namespace", "ml", "--memory-gib-per-node", "96", "--time", "4h"),
        ("--rehearse",),
    ],
)
def test_rayjobs_are_what_the_operator_takes(more: tuple[str, ...]) -> None:
    text = launch(
        "kuberay",
        "configs/math.yaml",
        SHARED,
        "--image",
        "i",
        "--volume",
        "v",
        "--nodes",
        "1",
        *more,
    ).stdout
    assert errors_by_schema(text) == []
    broken = text.replace("rayClusterSpec", "rayClusterspec").replace(
        "backoffLimit: 3", "backoffLimit: many"
    )
    assert len(errors_by_schema(broken)) >= 2


def test_a_container_has_what_the_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "base.yaml").write_text(f"base: {ROOT}/configs/math.yaml\n")
    overrides = (
        "trainer.output_dir=/scratch/me/runs/math",
        "model.path=/data/models/Qwen 2",
        "data.train_files=[/data/math/train.parquet, data/own.parquet]",
        "custom_reward_function.path=/data/math/rewards/mine.py",
        "environment.path=/data/games/game.py",
        "environment.tool_format=/data/parsers/mine.py:read",
        "data.cache_dir=~/cache",
    )
    place = ("--image", "i", "--workdir", "/home/me/exp")
    text = launch("slurm", str(tmp_path / "base.yaml"), *overrides, *place).stdout
    folders = ["/data/math", "/data/models/Qwen 2", "/home/me/cache", "/scratch/me/runs/math"]
    folders += ["/data/games", "/data/parsers"]
    folders = sorted([*folders, str(tmp_path), f"{ROOT}/configs"])
    (line,) = [line for line in text.splitlines() if "--container-image" in line]
    assert f"--container-mounts=\"$PWD:$PWD\"'{''.join(f',{f}:{f}' for f in folders)}'" in line
    assert "mkdir -p /home/me/cache /scratch/me/runs/math\n" in text
    assert words_of(
        next(line for line in text.splitlines() if "rlhf3d train" in line and line[0] == " ")[:-1]
    )[-2] == ("data.cache_dir=/home/me/cache")
    assert (
        "#SBATCH --chdir=/home/me/exp\n"
        in launch("slurm", "configs/math.yaml", "--workdir", "~/exp").stdout
    )
    assert "no user has the home" in str(
        launch("slurm", "configs/math.yaml", "--workdir", "~no-one/e").exception
    )


def test_home_is_the_machines_where_a_shell_expands_it() -> None:
    text = launch(
        "ssh", *SLURM[1:], "--hosts", "a", "--workdir", "~/my exp", "--venv", "~/env"
    ).stdout
    assert "cd ~/'my exp' || exit 1\n" in text and "source ~/env/bin/activate\n" in text


def test_a_secret_reaches_the_pods_as_it_is_and_nobody_else(tmp_path: Path) -> None:
    """Kubernetes takes $$ for $ and expands $(NAME)."""
    output = tmp_path / "job.yaml"
    output.write_text("")
    output.chmod(0o644)
    assert launch(*POD, "--env", "PASSWORD=a$$b$(HOME)c$d", "--output", str(output)).exit_code == 0
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    (container,) = yaml.safe_load(output.read_text())["spec"]["rayClusterSpec"]["headGroupSpec"][
        "template"
    ]["spec"]["containers"]
    value = next(item["value"] for item in container["env"] if item["name"] == "PASSWORD")
    assert value == "a$$$$b$$(HOME)c$$d"

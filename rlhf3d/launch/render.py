"""Job files from the checked-in templates, and the command that submits one.

Invariant: a template names only what `Job` and its options have (an undefined name is an error),
and every value goes through the quoting of the language it is printed in.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from rlhf3d.launch.job import Job
from rlhf3d.units import counted


@dataclass(frozen=True)
class Target:
    """A place that runs jobs."""

    template: str
    submit: tuple[str, ...]
    """Command before the file's name."""


TARGETS = {
    "local": Target("local.sh.j2", ("bash",)),
    "slurm": Target("slurm.sh.j2", ("sbatch",)),
    "kuberay": Target("kuberay.yaml.j2", ("kubectl", "create", "-f")),
    "skypilot": Target(
        "skypilot.yaml.j2", ("sky", "jobs", "launch", "--yes", "--secret", "RAY_AUTH_TOKEN")
    ),
    "ssh": Target("ssh.sh.j2", ("bash",)),
}


def target_of(name: str) -> Target:
    """Return the target of that name. Raises ValueError."""
    if name not in TARGETS:
        raise ValueError(f"launch {name}: no such target; known are {', '.join(TARGETS)}")
    return TARGETS[name]


def render(target: str, job: Job) -> str:
    """Return the job file of a target."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rlhf3d.launch"),
        undefined=StrictUndefined,
        autoescape=False,  # neither shell nor YAML is HTML: `sh`, `words` and `yaml` quote
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "sh": shlex.quote,
        "sh_path": sh_path,
        "words": shlex.join,
        # A JSON string is a YAML string, quotes and escapes included.
        "yaml": json.dumps,
        "counted": counted,
        "kubernetes": kubernetes_text,
        "mounts": mounts,
        "slurm_time": slurm_time,
    }
    template = environment.get_template(target_of(target).template)
    return template.render(job=job, options=job.options, target=target)


def slurm_time(seconds: int) -> str:
    """Return seconds as D-HH:MM:SS."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:{rest:02}"


def kubernetes_text(value: str) -> str:
    """Return a text for `env`, in which Kubernetes expands $(NAME) and takes $$ for $."""
    return value.replace("$", "$$")


def mounts(folders: tuple[str, ...]) -> str:
    """Return more folders after the first in --container-mounts, each at its own path."""
    if not folders:
        return ""
    return shlex.quote("".join(f",{folder}:{folder}" for folder in folders))


def sh_path(path: str) -> str:
    """Return a path quoted for the shell, in which a leading ~ is still the home folder."""
    if path.startswith("~/"):
        return f"~/{shlex.quote(path[2:])}"
    return shlex.quote(path)

"""Each target's own rules: the options it uses, the names it takes, and which paths of a run its nodes have.

Invariant: pure; every problem says the option or key, its value, the rule and the fix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf3d.config.checks import value_of
from rlhf3d.config.load import PATHS
from rlhf3d.config.schema import Config

if TYPE_CHECKING:
    from rlhf3d.launch.job import Options

USED_BY: dict[str, tuple[str, ...]] = {
    "cpus_per_node": ("slurm", "ssh", "kuberay", "skypilot"),
    "memory_gib_per_node": ("slurm", "kuberay", "skypilot"),
    "gpu_type": ("skypilot",),
    "image": ("slurm", "kuberay", "skypilot"),
    "venv": ("local", "slurm", "ssh", "skypilot"),
    "volume": ("kuberay", "skypilot"),
    "mount": ("kuberay", "skypilot"),
    "retries": ("slurm", "kuberay", "skypilot"),
    "partition": ("slurm",),
    "account": ("slurm",),
    "queue": ("kuberay",),
    "namespace": ("kuberay",),
    "hosts": ("ssh",),
    "port": ("slurm", "ssh", "skypilot"),
}
"""Options that not every target has a use for."""
RAYJOB_NAME = 47
"""Characters of a RayJob's name that KubeRay's operator takes, for the names that it makes of it."""
SUFFIX = 6
"""Characters that Kubernetes adds to metadata.generateName, and the hyphen before them."""
_LABEL, _SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"
_LETTER_FIRST = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_FILES = (
    "data.train_files data.val_files data.curriculum.path algorithm.custom_path custom_reward_function.path"
).split()


def default_name(target: str, path: str) -> str:
    """A job's name by its configuration's, as the target takes it."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(path).stem.lower()).strip("-") or "rlhf3d"
    if target not in ("kuberay", "skypilot"):
        return name
    return (name if name[0].isalpha() else f"run-{name}")[: RAYJOB_NAME - SUFFIX].strip("-")


def check_names(target: str, options: Options) -> Iterator[str]:
    """What the target would not take, or take for something else."""
    texts = {
        name: getattr(options, name) for name in "image venv workdir volume mount gpu_type".split()
    }
    for name, text in texts.items():
        if text is not None and (not text or not text.isprintable()):
            yield f"--{name.replace('_', '-')} {text!r}: expected text in one line"
    in_kubernetes = target in ("kuberay", "skypilot")
    job = (
        _LETTER_FIRST,
        RAYJOB_NAME - SUFFIX,
        "a lower-case letter, then lower-case letters, digits and -",
    )
    word = (_WORD, 128, "letters, digits, _ . + and -, no hyphen first")
    label = (_LABEL, 63, "lower-case letters, digits and -")
    rules = [
        ("name", options.name, job if in_kubernetes else word),
        ("namespace", options.namespace, label),
        ("queue", options.queue, (_SUBDOMAIN, 63, "lower-case letters, digits, - and .")),
        ("volume", options.volume, (_SUBDOMAIN, 253, "lower-case letters, digits, - and .")),
        ("gpu-type", options.gpu_type, word),
        ("partition", options.partition, (r"[\w.,+-]+", 128, word[2])),
        ("account", options.account, (r"[\w.,+-]+", 128, word[2])),
        *(
            ("hosts", host, (r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*", 253, "names of hosts"))
            for host in options.hosts
        ),
    ]
    for option, text, (pattern, longest, told) in rules:
        if text is not None and (len(text) > longest or not re.fullmatch(pattern, text)):
            yield f"--{option} {text!r}: `{target}` takes {told}, at most {longest} characters"
    if len(set(options.hosts)) < len(options.hosts):
        yield f"--hosts {','.join(options.hosts)}: a host is there twice"
    if in_kubernetes and (not options.mount.startswith("/") or ":" in options.mount):
        yield f"--mount {options.mount}: expected an absolute path without a colon, such as /shared"
    if target == "kuberay" and options.workdir is not None and not options.workdir.startswith("/"):
        yield f"--workdir {options.workdir}: expected an absolute path of the pods, such as {options.mount}"
    if options.grace_s < 1:
        yield "--grace 0: the run would not be told before its end; give it time for a step and a checkpoint"


@dataclass(frozen=True)
class Named:
    """A file or folder that the configuration names."""

    key: str
    value: str
    path: str
    """Absolute."""
    folder: str
    """Itself, or the one that it is in."""


def named_paths(config: Config, workdir: str, config_files: Iterable[Path] = ()) -> list[Named]:
    """What a run reads and writes, where its working folder is `workdir`."""
    values = [(key, value) for key in PATHS for value in _texts(value_of(config, key))]
    values = [(key, value) for key, value in values if (key, value) not in _NO_PATHS]
    values += [("CONFIG", str(file)) for file in config_files]
    found = []
    for key, value in values:
        path = os.path.normpath(os.path.join(workdir, value))
        is_file = key in _FILES or key == "CONFIG"
        found.append(Named(key, value, path, os.path.dirname(path) if is_file else path))
    return found


_NO_PATHS = (("trainer.resume_mode", "auto"), ("trainer.resume_mode", "never"))


def _texts(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def check_shared(target: str, config: Config, workdir: str, mount: str) -> Iterator[str]:
    """What pods or rented machines lack: all but the mount and, with SkyPilot, the uploaded working folder."""
    for named in named_paths(config, workdir):
        if is_below(named.path, mount) or (target == "skypilot" and is_below(named.path, workdir)):
            continue
        if named.key == "trainer.output_dir":
            continue  # has a rule of its own
        yield (
            f"{named.key} = {named.value}: not under --mount {mount}, which is all that the nodes have; copy it there, "
            "or give the --mount that holds it"
        )


def mounts_of(config: Config, workdir: str, config_files: Iterable[Path]) -> tuple[str, ...]:
    """Folders that a container needs beside the working folder. Raises ValueError for those that cannot be mounted."""
    folders = {named.folder for named in named_paths(config, workdir, config_files)}
    outside = sorted(folder for folder in folders if not is_below(folder, workdir))
    for folder in [*outside, workdir]:
        if folder == "/" or set(folder) & set(",:"):
            raise ValueError(
                f"{folder} cannot be mounted into a container: use a folder without a comma or a colon"
            )
    kept: list[str] = []
    for folder in outside:  # a folder comes before those in it
        if not any(is_below(folder, other) for other in kept):
            kept.append(folder)
    return tuple(kept)


def is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder's or in it."""
    return Path(path).is_relative_to(os.path.normpath(folder))

"""Each target's own rules: the names it takes, and which paths of a run its nodes have.

Invariant: pure; every problem says the option or key, its value, the rule and the fix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf3d.launch.options import Options

RAYJOB_NAME = 47
"""Longest name of a RayJob that KubeRay's operator takes: it makes longer names of it."""
SUFFIX = 6
"""Characters that Kubernetes adds to metadata.generateName: a hyphen and five of its own."""


class Rule(NamedTuple):
    """The names that a target takes."""

    pattern: str
    longest: int
    text: str
    """For people."""


WORD = Rule(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", 128, "letters, digits, _ . + and -, no hyphen first")
WORDS = Rule(r"[\w.,+-]+", 128, WORD.text)
LABEL = Rule(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", 63, "lower-case letters, digits and -")
SUBDOMAIN = Rule(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", 253, "lower-case letters, digits, - and .")
KUBERNETES_JOB = Rule(
    r"[a-z]([-a-z0-9]*[a-z0-9])?",
    RAYJOB_NAME - SUFFIX,
    "a lower-case letter, then lower-case letters, digits and -",
)
HOST = Rule(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*", 253, "names of hosts")
RULES = {
    "namespace": LABEL,
    "queue": SUBDOMAIN._replace(longest=63),
    "volume": SUBDOMAIN,
    "gpu_type": WORD,
    "partition": WORDS,
    "account": WORDS,
}
TEXTS = ("image", "venv", "workdir", "volume", "mount", "gpu_type")
"""Options that may be any text in one line."""
FILES = (
    "model.chat_template",
    "data.train_files",
    "data.val_files",
    "data.curriculum.path",
    "algorithm.custom_path",
    "custom_reward_function.path",
    "environment.path",
    "environment.tool_format",
    "CONFIG",
)
"""Keys that name files, of which a container needs the folder."""
# Words of keys that take a path as well.
NO_PATHS = (
    ("trainer.resume_mode", "auto"),
    ("trainer.resume_mode", "never"),
    ("environment.tool_format", "hermes"),
    ("environment.tool_format", "llama3"),
)


def default_name(target: str, path: str) -> str:
    """Return a job's name by its configuration's, as the target takes it."""
    name = re.sub(r"[^a-z0-9]+", "-", Path(path).stem.lower()).strip("-") or "rlhf3d"
    if target not in ("kuberay", "skypilot"):
        return name
    if not name[0].isalpha():
        name = f"run-{name}"
    # The cut may leave a hyphen at the end.
    return name[: KUBERNETES_JOB.longest].strip("-")


def check_names(target: str, options: Options) -> Iterator[str]:
    """Yield a message for each name that the target would not take."""
    for option in TEXTS:
        text = getattr(options, option)
        # A line break would end the line of the job file that the text stands in.
        if text is not None and (not text or not text.isprintable()):
            yield f"{_flag(option)} {text!r}: expected text in one line"
    in_kubernetes = target in ("kuberay", "skypilot")
    named = [("name", options.name, KUBERNETES_JOB if in_kubernetes else WORD)]
    named += [(option, getattr(options, option), rule) for option, rule in RULES.items()]
    named += [("hosts", host, HOST) for host in options.host_names]
    for option, text, rule in named:
        if text is None:
            continue
        if len(text) > rule.longest or not re.fullmatch(rule.pattern, text):
            yield (
                f"{_flag(option)} {text!r}: `{target}` takes {rule.text}, "
                f"at most {rule.longest} characters"
            )
    hosts, mount, workdir = options.host_names, options.mount, options.workdir
    if len(set(hosts)) < len(hosts):
        yield f"--hosts {','.join(hosts)}: a host is there twice"
    if in_kubernetes and (not mount.startswith("/") or ":" in mount):
        yield f"--mount {mount}: expected an absolute path without a colon, such as /shared"
    if target == "kuberay" and workdir is not None and not workdir.startswith("/"):
        yield f"--workdir {workdir}: expected an absolute path of the pods, such as {mount}"
    if options.grace_s < 1:
        yield (
            "--grace 0: the run would not be warned before its end; "
            "give it time for a step and a checkpoint"
        )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


@dataclass(frozen=True)
class Named:
    """A file or folder that the configuration names."""

    key: str
    value: str
    path: str
    """Absolute."""
    folder: str
    """Itself, or the one that it is in."""


def located(
    paths: Mapping[str, Any], workdir: str, config_files: Iterable[Path] = ()
) -> list[Named]:
    """Return where the `named_paths` of a run are whose working folder is `workdir`."""
    pairs: list[tuple[str, str]] = []
    for key, value in paths.items():
        pairs += [(key, path) for path in (value if isinstance(value, tuple) else (value,))]
    pairs = [pair for pair in pairs if pair not in NO_PATHS]
    pairs += [("CONFIG", str(file)) for file in config_files]
    named = []
    for key, text in pairs:
        # FILE.py:FUNCTION
        file = text.rpartition(":")[0] if key == "environment.tool_format" else text
        path = os.path.normpath(os.path.join(workdir, file))
        folder = os.path.dirname(path) if key in FILES else path
        named.append(Named(key, text, path, folder))
    return named


def check_shared(target: str, paths: Sequence[Named], workdir: str, mount: str) -> Iterator[str]:
    """Yield a message for each path that the nodes lack.

    They have the mount and, with SkyPilot, the uploaded working folder.
    """
    for named in paths:
        if is_below(named.path, mount) or (target == "skypilot" and is_below(named.path, workdir)):
            continue
        if named.key == "trainer.output_dir":
            continue  # has a rule of its own
        yield (
            f"{named.key} = {named.value}: not under --mount {mount}, which is all that the nodes "
            "have; copy it there, or give the --mount that holds it"
        )


def mounts_of(paths: Sequence[Named], workdir: str) -> tuple[str, ...]:
    """Return the folders that a container needs besides the working folder.

    Raises ValueError for those that cannot be mounted.
    """
    folders = {named.folder for named in paths}
    outside = sorted(folder for folder in folders if not is_below(folder, workdir))
    for folder in [*outside, workdir]:
        # Both separate mounts in --container-mounts.
        if folder == "/" or set(folder) & set(",:"):
            raise ValueError(
                f"{folder} cannot be mounted into a container: "
                "use a folder without a comma or a colon"
            )
    mounts: list[str] = []
    for folder in outside:  # sorted: a folder comes before those in it, which need no mount
        if not any(is_below(folder, mounted) for mounted in mounts):
            mounts.append(folder)
    return tuple(mounts)


def is_below(path: str, folder: str) -> bool:
    """Return whether a path is the folder or in it."""
    return Path(path).is_relative_to(os.path.normpath(folder))

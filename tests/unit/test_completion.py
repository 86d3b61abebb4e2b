"""Completion as a user meets it: keys typed into a shell, and the line that comes of them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf3d.commands.overrides import candidates, keys_of
from rlhf3d.config.convert.trl.table import TRL
from rlhf3d.config.convert.verl.table import VERL
from rlhf3d.config.keys import all_keys
from rlhf3d.config.load import build, merge, parse_override
from rlhf3d.config.schema import Config

ROOT = Path(__file__).parents[2]
SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
SET_UP = {
    "bash": "bind 'set enable-bracketed-paste off'; source completion.bash",
    "zsh": "autoload -Uz compinit; compinit -u -d dump; bindkey -e; source completion.zsh",
    "fish": "source completion.fish",
}
DEADLINE_S = 30.0


class Keyboard:
    """A shell that is typed into."""

    def __init__(self, shell: str, folder: Path) -> None:
        self._folder = folder
        program = folder / "bin" / "rlhf3d"
        script = subprocess.run([program, "completion", shell], check=True, capture_output=True)
        (folder / f"completion.{shell}").write_bytes(script.stdout)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "TERM": "dumb", "HOME": str(folder)}
        self._terminal, of_shell = pty.openpty()
        self.process = subprocess.Popen(
            SHELLS[shell],
            cwd=folder,
            env=environment,
            stdin=of_shell,
            stdout=of_shell,
            stderr=of_shell,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its own, for signals
        )
        os.close(of_shell)
        self._type(f"{SET_UP[shell]}; echo do''ne\n")
        self._wait_for("\ndone")

    def completed(self, line: str) -> list[str]:
        """The words of the line after a press of Tab."""
        self._type(f"{line}\t")
        # At its beginning (Ctrl-A) and end (Ctrl-E): have its words written to a file.
        self._type("\x01printf '%s\\n' \x05 >words; echo do''ne\n")
        self._wait_for("\ndone")
        return (self._folder / "words").read_text().splitlines()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def _type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def _wait_for(self, text: str) -> None:
        shown, end = "", time.monotonic() + DEADLINE_S
        while text not in shown.replace("\r", "\n"):
            assert time.monotonic() < end, f"no {text!r} in {shown!r}"
            shown += self._read(0.2)

    def _read(self, seconds: float) -> str:
        if select.select([self._terminal], [], [], seconds)[0]:
            return os.read(self._terminal, 65536).decode(errors="replace")
        return ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the program, as it is installed, and a configuration."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "rlhf3d"
    code = f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    program.write_text(f"{code}from rlhf3d.cli import main\nmain()\n")
    program.chmod(0o755)
    (tmp_path / "mine.yaml").write_text("")
    return tmp_path


@pytest.fixture(params=list(SHELLS))
def keyboard(request: pytest.FixtureRequest, folder: Path) -> Iterator[Keyboard]:
    if shutil.which(SHELLS[request.param][0]) is None:
        pytest.skip(f"no {request.param} here")
    typed = Keyboard(request.param, folder)
    yield typed
    typed.close()


def test_a_shell_completes_commands_options_keys_choices_and_files(keyboard: Keyboard) -> None:
    for begun, words in (
        ("rlhf3d trai", "train"),
        ("rlhf3d launch slu", "launch slurm"),
        ("rlhf3d convert a b --dtype bf", "convert a b --dtype bfloat16"),
        ("rlhf3d train c.yaml rollout.max_st", "train c.yaml rollout.max_staleness="),
        ("rlhf3d train c.yaml actor.policy_loss=va", "train c.yaml actor.policy_loss=vanilla"),
        ("rlhf3d train c.yaml environment.path=mi", "train c.yaml environment.path=mine.yaml"),
    ):
        assert keyboard.completed(begun) == ["rlhf3d", *words.split()], begun


def test_every_key_is_reached_level_by_level() -> None:
    reached, waiting = set(), [""]
    while waiting:
        for name, _ in candidates(waiting.pop()):
            if name.endswith("="):
                reached.add(name.removesuffix("="))
            else:
                assert name.endswith(".")
                waiting.append(name)
    assert reached == {key.name for key in all_keys()}


def test_a_key_that_is_half_typed() -> None:
    assert [name for name, _ in candidates("rollout.max_")] == [
        "rollout.max_staleness=",
        "rollout.max_num_seqs=",
    ]
    assert candidates("actor.opt") == [("actor.optim.", "")]
    assert candidates("no.such") == [] and candidates("no.such=") == []


def test_every_choice_that_is_offered_is_taken() -> None:
    offered = 0
    for key in all_keys():
        for text, _ in candidates(f"{key.name}="):
            raw: dict[str, Any] = {}
            problems: list[str] = []
            merge(raw, parse_override(text))
            build(Config(), raw, "", problems)
            assert problems == [], text
            offered += 1
    assert offered > 100
    assert candidates("rollout.threads=") == []  # a number or null: nothing worth a list


def test_keys_of_another_framework_are_completed_level_by_level() -> None:
    assert keys_of(TRL, "num_i") == [("num_iterations=", "actor.ppo_epochs")]
    assert ("actor_rollout_ref.actor.", "") in keys_of(VERL, "actor_rollout_ref.")
    assert not any("*" in name for name, _ in keys_of(VERL, "actor_rollout_ref.model."))

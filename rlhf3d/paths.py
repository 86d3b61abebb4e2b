"""Paths that a user gives: the home folder in them, what is there, what can be written.

Invariant: only looks; each answer says why not.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"
"""The configurations that ship with the package; `models` in it holds shapes of public models,
without weights."""
_VARIABLE = re.compile(r"\$(\w|\{)")
_GIT_LFS = b"version https://git-lfs"


def expand_home(text: str) -> str:
    """A leading ~ or ~user as the home folder.

    Raises ValueError for what only a shell would expand.
    """
    if _VARIABLE.search(text):
        raise ValueError(
            "variables are not expanded here: write the path itself, or leave it to the shell "
            "(no quotes)"
        )
    return expand_user(text)


def expand_user(text: str) -> str:
    """As `expand_home`, for text that a shell has expanded already: a $ is just a $.

    Raises ValueError where ~user is nobody.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not text.startswith("~/"):
        raise ValueError(
            f"no user has the home folder {text.partition('/')[0]}; ./{text} is the name itself"
        )
    return expanded


def folder_problem(folder: str | Path) -> str | None:
    """Why a folder cannot be made or written to; None where it can."""
    at = Path(folder).absolute()
    try:
        # Of a folder that is to be made, its nearest parent that is there decides.
        while not at.exists():
            # It does not exist for `exists`, but mkdir would fail: the name is taken.
            if at.is_symlink():
                return f"{at} is a link to what is not there"
            at = at.parent
        if not at.is_dir():
            return f"{at} is a file, not a folder"
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        return f"{at}: {error.strerror}"
    # Making an entry in a folder takes both.
    if not os.access(at, os.W_OK | os.X_OK):
        return f"{at} cannot be written to"
    return None


def file_problem(file: str | Path) -> str | None:
    """Why a file cannot be written; None where it can."""
    if Path(file).is_dir():
        return f"{file} is a folder, not a file"
    return folder_problem(Path(file).parent)


def check_output(option: str, path: Path | None, *, is_file: bool = False) -> None:
    """Raise ValueError where a command's output cannot be written; None is left to the command."""
    if path is None:
        return
    problem = file_problem(path) if is_file else folder_problem(path)
    if problem is not None:
        raise ValueError(f"{option} {path}: {problem}; name another")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ValueError that names the file where it holds something else."""
    try:
        refuse_pointer(path)
        found = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a JSON {type(found).__name__}, not an object; download it again"
        )
    return found


def refuse_pointer(path: Path) -> None:
    """Raise ValueError where git-lfs left a pointer in the place of a file."""
    with path.open("rb") as file:
        # A clone without git-lfs has small text files where the large ones belong.
        if file.read(len(_GIT_LFS)) == _GIT_LFS:
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in "
                f"{path.parent}"
            )

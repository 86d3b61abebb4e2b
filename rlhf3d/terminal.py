"""Text for a person's terminal.

Invariant: what is printed is what it says: square brackets and colons in the names of data, models
and files are no markup; and a terminal or a pipe that has gone away ends no command that has work
to finish.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console


class Terminal(Console):
    """rich's console, without markup in strings."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Whoever read the output is gone: be silent (rich would end the process)."""
        # A command with work to finish goes on without its output.
        self.quiet = True
        with suppress(
            OSError, ValueError
        ):  # so that the interpreter's last flush does not fail either
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def tell(text: str) -> None:
    """A line on stderr, if anybody is there."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def write_what_can_be_encoded() -> None:
    """Have standard output and errors replace what their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

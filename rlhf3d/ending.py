"""The end of a command's process, without taking apart all that it imported.

Invariant: as at any end of Python, threads have ended, what libraries left for the end (`atexit`)
is done and all output is written; an error that Python shows ends the process in Python's own way.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Have this process end with the block's exit code once all of that is done.

    Python would delete every module first, which takes 1.5 s after torch, transformers and Ray.
    """
    code = 0

    def end() -> None:
        # Logging's own handler is older than this one, and would come after it.
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    # The last one registered runs first: this one after those of all that the block imports.
    atexit.register(end)
    try:
        yield
    except SystemExit as asked:
        if isinstance(asked.code, int):
            code = asked.code
        elif asked.code is not None:  # Python prints it
            atexit.unregister(end)
        raise
    except BaseException:
        atexit.unregister(end)
        raise

"""Where messages go: one file per process under `logs/`, so that the terminal shows the run alone.

Invariant: a process has exactly one log file of the run open, however often it is set up.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

LOGS_DIR = "logs"

_HANDLER_NAME = "rlhf3d"
_NOISY_LOGGERS = (
    "asyncio",
    "filelock",
    "matplotlib",
    "megatron",
    "ray",
    "torch",
    "transformers",
    "urllib3",
    "vllm",
)
_QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    # tokenizers warns, and stops using threads, where a process forks after it has used them.
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def setup_logging(
    output_dir: str | Path, process: str, level: int = logging.INFO, prints: bool = False
) -> Path:
    """Send this process's log records and Python warnings to a file; return that.

    It is `logs/<process>.log`.

    `process` is `driver`, `rank_N` or `engine_N`. Records are appended, so a resumed run keeps its
    history. `prints`: also what anything in the process, compiled code included, writes to standard
    output and errors.
    """
    path = Path(output_dir) / LOGS_DIR / f"{process}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    # Of ours alone: handlers of libraries stay.
    for old in [handler for handler in root.handlers if handler.name == _HANDLER_NAME]:
        root.removeHandler(old)
        old.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.name = _HANDLER_NAME
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {process} %(levelname)s %(name)s: %(message)s")
    )
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    if prints:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        with path.open("ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    return path


def quiet_libraries() -> None:
    """Keep libraries' chatter below WARNING out; call before they are imported.

    A setting the user already has in the environment wins.
    """
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for logger in _NOISY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.WARNING)

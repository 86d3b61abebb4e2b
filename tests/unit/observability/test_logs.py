"""Log files: one a process, warnings included, and quiet libraries."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf3d.observability.logs import quiet_libraries, setup_logging


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    logging.captureWarnings(False)
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_records_and_warnings_go_to_the_process_file(tmp_path: Path) -> None:
    path = setup_logging(tmp_path, "rank_3")
    assert path == tmp_path / "logs" / "rank_3.log"
    logging.getLogger("rlhf3d.engine").info("loaded %d layers", 30)
    logging.getLogger("rlhf3d.engine").debug("too fine")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # catch_warnings put the printing hook back
        warnings.warn("odd", stacklevel=1)
    text = path.read_text()
    assert "rank_3 INFO rlhf3d.engine: loaded 30 layers" in text
    assert "rank_3 WARNING py.warnings:" in text
    assert "odd" in text
    assert "too fine" not in text


def test_setting_up_again_moves_the_log(tmp_path: Path) -> None:
    first = setup_logging(tmp_path, "rank_0")
    second = setup_logging(tmp_path, "rank_1")
    logging.getLogger().warning("once")
    assert first.read_text() == ""
    assert second.read_text().count("once") == 1


def test_quiet_libraries_leaves_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "info")  # so that monkeypatch puts it back
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    before = dict(os.environ)
    quiet_libraries()
    added = {name for name in os.environ if name not in before}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert logging.getLogger("megatron").level == logging.WARNING
    for name in added:
        del os.environ[name]

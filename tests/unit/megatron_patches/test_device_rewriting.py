"""What the import hook makes of CUDA in source code, and its cache."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patches import device

SOURCE = '''"""Docstring."""
from __future__ import annotations
import torch

def tensors(x):
    a = torch.zeros(2, device="cuda")
    b = torch.empty(2, device=torch.cuda.current_device(), pin_memory=True)
    c = x.cuda(non_blocking=True) + x.pin_memory().cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    torch.cuda.Event().record()
    torch.cuda.synchronize()
    return a.device.type, b.device.type, c, x.type() == "torch.cuda.FloatTensor"

def line():
    raise ValueError("line 16")

def other(text="cuda:0 is not a literal of its own"):
    return text, torch.cuda.is_available()
'''


def run(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(device.retarget(source, "sample.py"), namespace)
    return namespace


def test_every_mention_of_cuda_becomes_cpu() -> None:
    x = torch.ones(2)
    a, b, c, is_float = run(SOURCE)["tensors"](x)
    assert (a, b, c.tolist(), is_float) == ("cpu", "cpu", [2.0, 2.0], True)


def test_line_numbers_docstring_and_other_text_are_kept() -> None:
    namespace = run(SOURCE)
    assert namespace["__doc__"] == "Docstring."
    assert namespace["other"]() == ("cuda:0 is not a literal of its own", torch.cuda.is_available())
    with pytest.raises(ValueError, match="line 16") as raised:
        namespace["line"]()
    assert raised.traceback[-1].lineno + 1 == 16


def test_module_without_docstring() -> None:
    assert run("import torch\ndevice = torch.cuda.current_device()\n")["device"] == torch.device(
        "cpu"
    )


def test_torch_itself_is_untouched() -> None:
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.Stream.__module__.startswith("torch.cuda")


LIBRARIES = """
try:
    import {library}.part as part
    HAVE = True
except ImportError:
    HAVE = False
"""


@pytest.mark.parametrize("library", device._ABSENT[:2])
def test_a_library_that_is_asked_for_is_absent(library: str) -> None:
    assert run(LIBRARIES.format(library=library))["HAVE"] is False
    assert run(LIBRARIES.format(library=f"os.path\n    import {library}"))["HAVE"] is False
    assert run(LIBRARIES.format(library="json").replace(".part", ".tool"))["HAVE"] is True


def test_what_is_not_asked_for_is_imported_as_it_stands() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        run("try:\n    import no_such.triton\nexcept ValueError:\n    pass")
    assert run("from torch.utils import cpp_extension")["cpp_extension"] is None
    assert run("from torch.utils import data")["data"].__name__ == "torch.utils.data"


def test_nothing_is_compiled() -> None:
    source = "def disable_jit_fuser():\n    return 'off'\nfound = enable_jit_fuser()"
    assert run(source)["found"] == "off"


@pytest.fixture
def sample_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable module, an empty cache, and a loader of ours for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "retargeted_sample.py"
    path.write_text("import torch\ndevice_type = torch.cuda.current_device().type\n")
    yield path
    sys.modules.pop("retargeted_sample", None)


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_loader(path.stem, device._Loader(path.stem, str(path)))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cached_code_is_used_again_and_follows_the_source(
    sample_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(sample_module).device_type == "cpu"
    (entry,) = (tmp_path / "cache" / "rlhf3d" / "megatron_patches").iterdir()
    compiled: list[str] = []
    original = device.retarget
    monkeypatch.setattr(
        device, "retarget", lambda source, path: compiled.append(path) or original(source, path)
    )
    assert load(sample_module).device_type == "cpu" and not compiled
    entry.write_bytes(b"damaged")
    assert load(sample_module).device_type == "cpu" and len(compiled) == 1
    sample_module.write_text("device_type = 'cuda'\n")
    assert load(sample_module).device_type == "cpu" and len(compiled) == 2
    assert len(list(entry.parent.iterdir())) == 2  # one entry a source, nothing half-written


def test_cache_that_cannot_be_written_is_no_error(sample_module: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load(sample_module).device_type == "cpu"


def test_only_megatron_core_is_rewritten() -> None:
    finder = device._Finder()
    assert finder.find_spec("megatron.corelike", None) is None
    assert finder.find_spec("shlex", None) is None

"""Which patches are applied, and how they refuse what they were not written for."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_patches
from megatron_patches import PATCHES, Patch, PatchError, Target, device
from megatron_patches.patch import after_import


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been applied in this process."""
    monkeypatch.setattr(megatron_patches, "_applied_kind", None)
    monkeypatch.setattr(megatron_patches, "_status", {})


def test_one_file_and_one_row_a_patch() -> None:
    files = {p.stem for p in Path(megatron_patches.__file__).parent.glob("*.py")}
    assert {p.name for p in PATCHES} == files - {"__init__", "patch", "cpu_cuda"}
    assert [row.name for row in megatron_patches.table()] == [p.name for p in PATCHES]
    assert PATCHES[0].name == "device"  # the others import Megatron


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0", "1.0"])
@pytest.mark.usefixtures("fresh")
def test_unsupported_version_is_refused_with_the_way_out(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_patches, "installed_version", lambda: version)
    with pytest.raises(
        PatchError, match=rf"megatron-core {version} is outside .*pip install 'megatron-core>="
    ):
        megatron_patches.apply("cpu")


@pytest.mark.usefixtures("fresh")
def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'tpu' is not one of cpu, cuda"):
        megatron_patches.apply("tpu")


def test_one_kind_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_patches, "_applied_kind", "cpu")
    megatron_patches.apply("cpu")  # again: nothing happens
    with pytest.raises(PatchError, match="already patched for cpu"):
        megatron_patches.apply("cuda")


def test_device_refuses_when_megatron_is_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    finders = list(sys.meta_path)
    with pytest.raises(PatchError, match=r"before megatron_patches\.apply\('cpu'\)"):
        device.PATCH.apply()
    assert sys.meta_path == finders


def test_where_patches_are_needed() -> None:
    def names(kind: str, version: str) -> set[str]:
        return {p.name for p in PATCHES if p.not_needed_because(kind, version) is None}

    assert names("cpu", "0.16.1") == {p.name for p in PATCHES}
    fixed = {"moe_router_gemm", "isend_alias"}
    assert names("cpu", "0.19.2") == names("cpu", "0.16.1") - fixed
    on_cuda = {"checkpoint_queue", "output_layer_fusion"}
    assert names("cuda", "0.16.1") == on_cuda | fixed
    assert names("cuda", "0.17.1") == on_cuda | {"isend_alias"}
    assert names("cuda", "0.19.2") == on_cuda
    assert names("cpu", "0.20.0") == set()


def test_what_upstream_logs_of_its_plans_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    megatron_patches._silence("cuda")
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logger.warning("something is wrong")
    assert caplog.messages == ["something is wrong"]


def make_patch(symbol: str, contains: str) -> Patch:
    return Patch("sample", ">=0.16,<0.20", "test", (Target(symbol, contains),), lambda: None)


def test_target_that_fits() -> None:
    make_patch("shlex:split", "posix").check("0.16.1")
    make_patch("shlex:shlex.get_token", "Get a token").check("0.16.1")
    make_patch("shlex", "def quote").check("0.16.1")


@pytest.mark.parametrize(
    ("symbol", "complaint"),
    [
        ("shlex:vanished", "upstream no longer has shlex:vanished"),
        ("shlex:shlex.vanished", "upstream no longer has shlex:shlex.vanished"),
        ("shlex_vanished:split", "upstream no longer has shlex_vanished:split"),
        ("shlex:quote", "shlex:quote no longer contains 'posix = '"),
    ],
)
def test_target_that_changed_names_patch_version_and_file(symbol: str, complaint: str) -> None:
    with pytest.raises(PatchError) as raised:
        make_patch(symbol, "posix = ").check("0.16.1")
    message = str(raised.value)
    assert complaint in message and "'sample' does not fit megatron-core 0.16.1" in message
    assert "megatron_patches/sample.py" in message


def test_a_module_is_changed_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked before, without importing it; a look at where it is changes nothing."""
    (tmp_path / "imported_late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    after_import("imported_late", lambda module: setattr(module, "value", 2))
    make_patch("imported_late", "value = ").check("0.16.1")
    with pytest.raises(PatchError, match="imported_late no longer contains 'values = '"):
        make_patch("imported_late", "values = ").check("0.16.1")
    with pytest.raises(PatchError, match="upstream no longer has imported_early"):
        make_patch("imported_early", "value").check("0.16.1")
    assert "imported_late" not in sys.modules
    assert importlib.import_module("imported_late").value == 2
    after_import("imported_late", lambda module: setattr(module, "value", 3))
    assert sys.modules.pop("imported_late").value == 3

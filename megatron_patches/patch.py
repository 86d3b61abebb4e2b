"""A patch: a named change to upstream code, with the versions and code it is written for.

Invariant: a patch is applied only to code that still contains what it corrects; else PatchError is
raised. Nothing here imports torch or Megatron until `Patch.check` is called.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet


class PatchError(RuntimeError):
    """Upstream is not what a patch was written for, or patches were applied too late."""


@dataclass(frozen=True)
class Target:
    """Upstream code that a patch relies on: `module` or `module:name`, and a line in it."""

    symbol: str
    contains: str

    def resolve(self) -> Any:
        """The object itself; PatchError when it has vanished."""
        module, _, path = self.symbol.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in filter(None, path.split(".")):
                found = getattr(found, part)
        except (ModuleNotFoundError, AttributeError) as error:
            raise PatchError(f"upstream no longer has {self.symbol} ({error})") from error
        return found

    def check(self) -> None:
        """PatchError unless the symbol's source still contains the expected line."""
        if self.contains not in self._source():
            raise PatchError(f"{self.symbol} no longer contains {self.contains!r}")

    def _source(self) -> str:
        """The source of the symbol; that of a module is read without importing it."""
        if ":" in self.symbol:
            return inspect.getsource(self.resolve())
        try:
            found = importlib.util.find_spec(self.symbol)
        except ModuleNotFoundError:  # nor is what it would be in
            found = None
        if found is None or not isinstance(found.loader, importlib.abc.InspectLoader):
            raise PatchError(f"upstream no longer has {self.symbol}")
        return found.loader.get_source(self.symbol) or ""


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do; a function is called with it once it is there."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]) -> None:
        self._module, self._then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def after_import(module: str, change: Callable[[ModuleType], None]) -> None:
    """Have `change` called with a module as soon as it is imported; now, where it is."""
    if module in sys.modules:
        change(sys.modules[module])
    else:
        sys.meta_path.insert(0, _AfterImport(module, change))


@dataclass(frozen=True)
class Patch:
    """One change to Megatron-core."""

    name: str
    versions: str
    """Versions of megatron-core that need it, as a specifier."""
    reason: str
    """What goes wrong without it."""
    targets: tuple[Target, ...]
    """Upstream code it relies on; empty when it concerns every module of megatron.core."""
    apply: Callable[[], None]
    cpu_only: bool = True
    needed: Callable[[], bool] = lambda: True
    """Asks the installation (not the version) whether the defect is there."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """Upstream symbols, for people."""
        return tuple(target.symbol for target in self.targets) or ("megatron.core.*",)

    def not_needed_because(self, platform_kind: str, version: str) -> str | None:
        """Why this patch does not concern the platform or version; None when it does.

        Imports nothing.
        """
        if self.cpu_only and platform_kind != "cpu":
            return "CPU only"
        if not SpecifierSet(self.versions).contains(version, prereleases=True):
            return f"only for megatron-core {self.versions}"
        return None

    def check(self, version: str) -> None:
        """PatchError, naming patch, version and way out, when upstream changed under the patch."""
        try:
            for target in self.targets:
                target.check()
        except PatchError as error:
            raise PatchError(
                f"patch {self.name!r} does not fit megatron-core {version}: {error}. Adapt or drop "
                f"megatron_patches/{self.name}.py, or install a version it was tested with "
                f"({self.versions})."
            ) from error

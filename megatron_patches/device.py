"""Patch `device`: megatron.core, which names CUDA throughout, runs on the CPU.

Invariant: only modules of megatron.core are rewritten, line numbers are kept, and torch is never
touched. Rewritten: 'cuda' and 'torch.cuda.XTensor' literals, `torch.cuda` (now `cpu_cuda`),
`.cuda()`, pinned memory. Libraries that Megatron can do without, and that only serve GPUs, tables
of metrics or FSDP, are absent to it, and nothing is compiled: to import them takes longer than
Megatron itself. Versions 0.16 to 0.19 need it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

from megatron_patches.patch import Patch, PatchError

_ALIAS = "_cpu_cuda"
_LITERALS = {"cuda": "cpu"} | {
    f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
}
_ABSENT = (
    "triton",
    "torch.utils.tensorboard",
    "torch.distributed._tensor",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.utils.cpp_extension",
    "megatron.core.distributed.fsdp.src",
    ".fused_kv_append_kernel",
)
"""Libraries, with what is below them, that Megatron is told are not installed, where it asks."""
_UNUSED = {"torch.utils": "cpp_extension", "torch.distributed.checkpoint": "default_planner"}
"""What is imported without asking, for kernels of CUDA and for FSDP: None instead."""
_FORBEARING = {"ImportError", "ModuleNotFoundError", "Exception"}
"""Exceptions with which it asks."""


class _Retarget(ast.NodeTransformer):
    """The rewriting of one module's syntax tree."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        replacement = _LITERALS.get(node.value) if isinstance(node.value, str) else None
        return ast.copy_location(ast.Constant(replacement), node) if replacement else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        is_torch_cuda = (
            node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch"
        )
        return ast.copy_location(ast.Name(_ALIAS, ast.Load()), node) if is_torch_cuda else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        names = [alias.name for alias in node.names]
        if names == [_UNUSED.get(node.module or "")]:
            return ast.copy_location(ast.parse(f"{names[0]} = None").body[0], node)
        return node

    def visit_Try(self, node: ast.Try) -> ast.AST:
        self.generic_visit(node)
        caught = {getattr(handler.type, "id", "") for handler in node.handlers}
        if caught & _FORBEARING and any(map(_imports_absent, node.body)):
            missing = ast.parse("raise ModuleNotFoundError('left out on CPU')").body
            node.body = [ast.copy_location(missing[0], node.body[0])]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "enable_jit_fuser":
            # It is torch.compile, which does nothing here (`megatron_patches.apply`), and for that
            # imports all of the compiler.
            node.func.id = "disable_jit_fuser"
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "pin_memory"):
            # `x.cuda()` and `x.pin_memory()` become `x`.
            return node.func.value
        for keyword in node.keywords:
            if keyword.arg == "pin_memory":
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
        return node


def _imports_absent(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        names = ["." * statement.level + (statement.module or "")]
    else:
        names = [alias.name for alias in getattr(statement, "names", ())]
    return any(f"{name}.".startswith(f"{absent}.") for name in names for absent in _ABSENT)


def retarget(source: bytes | str, path: str) -> CodeType:
    """Compile `source` with every mention of CUDA retargeted to the CPU."""
    tree: ast.Module = _Retarget().visit(ast.parse(source, path))
    # The import goes behind the docstring and __future__ imports, which have to come first.
    start = 1 if ast.get_docstring(tree, clean=False) is not None else 0
    while start < len(tree.body) and getattr(tree.body[start], "module", None) == "__future__":
        start += 1
    tree.body[start:start] = ast.parse(f"import megatron_patches.cpu_cuda as {_ALIAS}").body
    # dont_inherit: otherwise the __future__ import of this file would apply to upstream's code.
    code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
    return code


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module of megatron.core retargeted.

    Compiled code is kept in the user's cache folder.
    """

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        # The key covers all that the code depends on: this file, Python's bytecode, path, source.
        ours = Path(__file__).read_bytes() + importlib.util.MAGIC_NUMBER
        key = hashlib.sha256(b"\0".join((ours, str(self.path).encode(), source))).hexdigest()
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cached = Path(base, "rlhf3d", "megatron_patches", f"{key}.bin")
        try:
            code: CodeType = marshal.loads(cached.read_bytes())
            return code
        except (OSError, EOFError, ValueError, TypeError):  # absent or damaged: compile
            code = retarget(source, str(self.path))
        with contextlib.suppress(
            OSError
        ):  # a cache that cannot be written costs the next process this step
            cached.parent.mkdir(parents=True, exist_ok=True)
            # Ranks compile at the same time: each writes its own file, and renaming is atomic.
            partial = cached.with_suffix(f".{os.getpid()}")
            partial.write_bytes(marshal.dumps(code))
            os.replace(partial, cached)
        return code


class _Finder(importlib.abc.MetaPathFinder):
    """Gives modules of megatron.core the rewriting loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec and spec.origin and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def _install() -> None:
    if "megatron.core" in sys.modules:
        raise PatchError(
            "megatron.core was imported before megatron_patches.apply('cpu'), so it still targets "
            "CUDA: call apply (or Platform.prepare_worker) before the first `import megatron`."
        )
    sys.meta_path.insert(0, _Finder())


PATCH = Patch(
    name="device",
    versions=">=0.16,<0.20",
    reason="CUDA is hard-coded: current_device(), 'cuda' literals, .cuda(), streams, pinned memory",
    targets=(),
    apply=_install,
)

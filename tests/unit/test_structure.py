"""The shape of the code: the order of its rooms, and how long, deep and dense a file may be.

What ruff can say is in pyproject.toml; this is the rest of CONTRIBUTING's house rules.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rlhf3d"

# From the roof to the ground. A module imports from its own room and from floors below, never from
# another room of its own floor; an import inside a function counts.
FLOORS = (
    "cli commands launch rehearsal doctor gpu_check",
    "evaluation",
    "trainer",
    "results",
    "experience",
    "placement",
    "preflight",
    "planning",
    "inputs",
    "checkpoints",
    "engine rollout",
    "resharding",
    "environments rewards",
    "data",
    "config",
    "batching",
    "models",
    "algorithms",
    "parallel",
    "observability",
    "pool",
    "disk ending imports machine new_folder options paths processes terminal tokenizer units "
    "user_code",
)
COMMANDS = 0
GROUND = len(FLOORS) - 1

FILE_LINES = 500
LOOP_LINES = 100
FUNCTION_LINES = 80
"""Without comments, which nobody should save on."""
BLOCKS_IN_BLOCKS = 4
WHOLE_CONFIGURATIONS = 46
"""Parameters and fields that are a complete `Config`, at most."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)


@cache
def sources() -> dict[Path, ast.Module]:
    """The package's files, parsed."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def room_of(module: str) -> str:
    """`rlhf3d.trainer.loop` is in `trainer`; `rlhf3d` itself has no room."""
    return module.split(".")[1] if "." in module else ""


def floor_of(room: str) -> int:
    """The number of a room's floor, 0 at the roof."""
    for number, rooms in enumerate(FLOORS):
        if room in rooms.split():
            return number
    raise AssertionError(f"rlhf3d/{room} is on no floor: name it in FLOORS of {__file__}")


def imports_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Modules of this package that a file imports, each with its line."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "rlhf3d":
            names = [f"rlhf3d.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.startswith("rlhf3d."):
                yield name, node.lineno


def place(file: Path, line: int) -> str:
    """What an editor opens."""
    return f"{file.relative_to(ROOT)}:{line}"


def test_imports_point_down() -> None:
    """No room knows of one above it: what is below can be read, tested and changed alone."""
    up = []
    for file, tree in sources().items():
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module, line in imports_of(tree):
            other = room_of(module)
            # The commands share one floor and one another's helpers.
            beside = floor_of(other) == floor_of(own) and floor_of(own) in (COMMANDS, GROUND)
            if other != own and not beside and floor_of(other) <= floor_of(own):
                up.append(f"{place(file, line)} ({own}) imports {module}")
    assert not up, "\n" + "\n".join(up)


def num_lines(text: Sequence[str]) -> int:
    """Lines that are no comments."""
    return sum(not line.lstrip().startswith("#") for line in text)


def loaded_by(start: str) -> set[str]:
    """Modules that importing `start` loads: what functions import is left out."""
    trees = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): tree
        for file, tree in sources().items()
    }
    found, waiting = set[str](), [start]
    while waiting:
        module = waiting.pop()
        if module in found or module not in trees:
            continue
        found.add(module)
        top = [node for node in trees[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
        waiting += [name for name, _ in imports_of(ast.Module(top, []))]
    return found


def test_training_loads_nothing_that_plans_steps_or_shows_runs() -> None:
    """What a run needs at its end alone, or never, makes no start slower, and can break none."""
    others = (
        "rlhf3d.planning.search",
        "rlhf3d.results",
        "rlhf3d.observability.page",
        "rlhf3d.observability.report",
        "rlhf3d.config.convert",
        "rlhf3d.launch",
        "rlhf3d.rehearsal",
        "rlhf3d.evaluation",
    )
    loaded = loaded_by("rlhf3d.trainer.run")
    assert "rlhf3d.trainer.loop" in loaded
    assert not [module for module in sorted(loaded) if module.startswith(others)]


def test_the_loop_is_read_at_one_go() -> None:
    """Steps, validations and saves, and the algorithm's phases."""
    text = (PACKAGE / "trainer" / "loop.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LOOP_LINES


def test_files_and_functions_have_a_size_to_read() -> None:
    """A file of a few screens, a function of one or two."""
    long = []
    for file, tree in sources().items():
        text = file.read_text(encoding="utf-8").splitlines()
        lines = num_lines(text)
        if lines > FILE_LINES:
            long.append(f"{place(file, 1)} has {lines} lines of at most {FILE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS) and node.end_lineno is not None:
                length = num_lines(text[node.lineno - 1 : node.end_lineno])
                if length > FUNCTION_LINES:
                    where = place(file, node.lineno)
                    long.append(f"{where} {node.name}: {length} lines of at most {FUNCTION_LINES}")
    assert not long, "\n" + "\n".join(long)


def is_nested(node: ast.AST) -> bool:
    """Whether a comprehension has two loops, or another comprehension in it."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = (child for child in ast.walk(node) if child is not node)
    return len(node.generators) > 1 or any(isinstance(child, COMPREHENSIONS) for child in inner)


def test_no_nested_comprehensions() -> None:
    """A loop with names, or a function, says it in words."""
    nested = []
    for file, tree in sources().items():
        found = {node.lineno for node in ast.walk(tree) if is_nested(node)}
        nested += [place(file, line) for line in sorted(found)]
    assert not nested, f"{len(nested)} nested comprehensions:\n" + "\n".join(nested)


def conditionals_of(statement: ast.stmt) -> int:
    """Conditional expressions of one statement, without those of the statements inside it."""
    count, waiting = 0, list(ast.iter_child_nodes(statement))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            continue
        count += isinstance(node, ast.IfExp)
        waiting += ast.iter_child_nodes(node)
    return count


def test_one_conditional_expression_a_statement() -> None:
    """Two are a table of four cases that nobody wrote down."""
    dense = []
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt) and conditionals_of(node) > 1:
                dense.append(place(file, node.lineno))
    assert not dense, f"{len(dense)} statements:\n" + "\n".join(dense)


def takes_all(node: ast.AST) -> bool:
    """Whether a parameter or a field is the complete configuration."""
    if not isinstance(node, ast.arg | ast.AnnAssign) or node.annotation is None:
        return False
    return ast.unparse(node.annotation) == "Config"


def test_who_gets_the_complete_configuration() -> None:
    """What reads, checks or derives from it as such, or conducts a run; others get a section."""
    found = []
    for file, tree in sources().items():
        found += [place(file, node.lineno) for node in ast.walk(tree) if takes_all(node)]
    count = len(found)
    assert count <= WHOLE_CONFIGURATIONS, f"{count} places:\n" + "\n".join(found)


def depth_of(node: ast.AST) -> int:
    """Blocks in blocks, a function in a function beginning again; `elif` is no deeper than `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deeper = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, depth_of(child) + deeper)
    return deepest


def test_blocks_are_not_deep() -> None:
    """What is deeper wants to be a function with a name."""
    deep = []
    for file, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS) and depth_of(node) > BLOCKS_IN_BLOCKS:
                deep.append(f"{place(file, node.lineno)} {node.name}: {depth_of(node)}")
    assert not deep, "\n" + "\n".join(deep)


def test_modules_say_what_they_are_for() -> None:
    """The first lines of a file; a folder's `__init__.py` may be empty."""
    silent = []
    for file, tree in sources().items():
        if tree.body and ast.get_docstring(tree) is None:
            silent.append(place(file, 1))
    assert not silent, "\n" + "\n".join(silent)


@pytest.mark.parametrize(
    ("code", "nested"),
    [
        ("[f(x) for x in xs]", False),
        ("[x for row in rows for x in row]", True),
        ("{a: [b for b in bs] for a in xs}", True),
    ],
)
def test_what_is_nested(code: str, nested: bool) -> None:
    """The rule itself."""
    assert is_nested(ast.parse(code, mode="eval").body) == nested


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("a = b if c else d", 1),
        ("a = b if c else (d if e else f)", 2),
        ("if a:\n    b = 1 if c else 2\n    d = 1 if e else 2", 0),
    ],
)
def test_what_is_a_statement(code: str, count: int) -> None:
    """The rule itself: statements inside a statement are counted alone."""
    assert conditionals_of(ast.parse(code).body[0]) == count

"""What a Python file gives TRL's GRPOConfig and GRPOTrainer, found without running it.

Invariant: nothing is executed. Literals and names that are set once to a literal are followed; what
only Python would know is named.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from rlhf3d.config.convert.given import Given

_COMMAND = re.compile(
    r"^.*\b(?:accelerate launch|trl grpo|torchrun|python3?)\b(?:.*\\\n)*.*$", re.MULTILINE
)
_TRAINER = {
    "model": "model_name_or_path",
    "train_dataset": "dataset_name",
    "peft_config": "peft_config",
    "tools": "tools",
    "environment_factory": "environment_factory",
    "rollout_func": "rollout_func",
}
"""GRPOTrainer's arguments, and under which name they are given."""


def read_program(text: str, path: Path, given: Given) -> str:
    """Put what the file says into `given`; its docstring, where that shows how it is called.

    Raises ValueError.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not Python: {error}") from None
    names = _constants(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    configs = [call for call in calls if _called(call) == "GRPOConfig"]
    for call in [call for call in calls if _called(call) == "GRPOTrainer"][:1]:
        _trainer(call, tree, path, given)
    for call in configs[:1]:
        for keyword in call.keywords:
            if keyword.arg is None:
                given.notes.append(f"{ast.unparse(keyword.value)} of GRPOConfig is not followed")
            else:
                _put(keyword.arg, keyword.value, names, given)
    return "" if configs else _module_text(tree)


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Names that are set once in the file, and to what."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def _module_text(tree: ast.Module) -> str:
    """The commands in texts at the top of a file, which show how it is called."""
    commands = []
    for node in tree.body:
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            commands += _COMMAND.findall(value.value)
    return "\n".join(commands) or "\n"


def _called(call: ast.Call) -> str:
    name = call.func
    return name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")


def _put(name: str, value: ast.expr, names: dict[str, ast.expr], given: Given) -> None:
    if isinstance(value, ast.Name):
        value = names.get(value.id, value)
    try:
        given.put(name, ast.literal_eval(value))
    except ValueError:
        given.unknown[name] = ast.unparse(value)


def _trainer(call: ast.Call, tree: ast.Module, path: Path, given: Given) -> None:
    """The arguments of GRPOTrainer that are no settings of GRPOConfig."""
    for keyword in call.keywords:
        name, value = keyword.arg, keyword.value
        if name == "reward_funcs":
            given.put(name, _functions(value, tree, path))
        elif name == "model" and not isinstance(value, ast.Constant):
            continue  # by the command line's --model_name_or_path
        elif name == "peft_config" and "get_peft_config" in ast.unparse(value):
            continue  # by --use_peft
        elif name in _TRAINER:
            shown = value.value if isinstance(value, ast.Constant) else ast.unparse(value)
            given.put(_TRAINER[name], shown)


def _functions(value: ast.expr, tree: ast.Module, path: Path) -> list[Any]:
    """Reward functions by name, those of the file as file:name."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = []
    for item in value.elts if isinstance(value, ast.List | ast.Tuple) else [value]:
        name = item.func if isinstance(item, ast.Call) else item
        text = ast.unparse(name)
        found.append(f"{path.name}:{text}" if text in own else text)
    return found

"""The words that a run script passes to a trainer, found without running the script.

Invariant: nothing is executed. Assignments, `${name:-default}`, `$((arithmetic))` and arrays are
followed; what only a shell would know (conditions, commands, unset variables) is named.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

_ARITHMETIC = re.compile(r"\$\(\(.*?\)\)|\$\([^()]*\)", re.DOTALL)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_ARRAY = re.compile(r"\s*([A-Za-z_]\w*)(\+?)=\((.*)\)\s*", re.DOTALL)
_ARRAY_BEGINS = re.compile(r"\s*[A-Za-z_]\w*\+?=\(")
_WHOLE_ARRAY = re.compile(r"\$\{(\w+)\[[@*]\]\}")
_WHOLE_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_PARAMETER = re.compile(r"(\w+)(?:(:?[-=+])(.*))?", re.DOTALL)
_ARGUMENTS = re.compile(r"\$[@*]|\$\{[@*].*\}")
_END = re.compile(r"[|&;]+|[12&]?>.*")
_DECLARING = ("export", "local", "readonly", "declare")
_CLOSED_BY = {"if": "fi", "for": "done", "while": "done", "until": "done", "case": "esac"}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,  # as in a shell
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


Main = Callable[[Sequence[str]], int | None]
"""Where a line's words name what is looked for; None where they do not."""


class UnknownHere(Exception):
    """What a value needs and only a shell knows."""


@dataclass
class Script:
    """What a script passes to what it calls."""

    launcher: list[str] = field(default_factory=list)
    """Words before the module, such as accelerate launch --num_processes 8."""
    arguments: list[str] = field(default_factory=list)
    """Words after the module, such as data.train_batch_size=256."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Keys whose value only a shell knows: what it takes."""
    conditional: dict[str, str] = field(default_factory=dict)
    """Variables and arrays that are set in an if or a loop, and the value that was taken."""

    def notes(self) -> list[str]:
        """What the reader should know of values that depend on conditions."""
        told = "is set in an if or a loop, which are not evaluated"
        return [f"{name} {told}: {value!r}" for name, value in self.conditional.items()]


def read_script(text: str, environment: Mapping[str, str], main: Main) -> Script | None:
    """What a script passes to the first `main` that it calls; None where no line calls one."""
    return _Reader(dict(environment), main).read(text)


class _Reader:
    def __init__(self, variables: dict[str, str], main: Main) -> None:
        self.main = main
        self.environment = frozenset(variables)
        self.variables: dict[str, str] = variables
        self.arrays: dict[str, list[str]] = {}
        self.broken: dict[str, str] = {}  # variables whose value is not known, and why
        self.alternatives: dict[str, str] = {}  # set in an if or a loop, and the value taken
        self.open: list[str] = []  # the words that end the conditions and loops we are in
        self.script = Script()

    def read(self, text: str) -> Script | None:
        for line in _logical_lines(text):
            array = _ARRAY.fullmatch(line)
            if array:
                name, adds, inner = array.groups()
                before = self.arrays.get(name, []) if adds else []
                self._set_array(name, [*before, *_words(inner)])
                continue
            words = _words(line)
            self._enter_or_leave(words)
            main = self.main(words)
            if main is not None:
                self._launch(words[:main])
                self._add(_command(words[main + 1 :]))
                return self.script
            self._assign(words)
        return None

    def _launch(self, words: list[str]) -> None:
        """What stands before the module: no setting of the run."""
        conditional = dict(self.script.conditional)
        self._add(words)
        self.script.launcher, self.script.arguments = self.script.arguments, []
        self.script.conditional = conditional

    def _enter_or_leave(self, words: list[str]) -> None:
        first = words[0].rstrip(";") if words else ""
        if first in _CLOSED_BY and words[-1] not in _CLOSED_BY.values():
            self.open.append(_CLOSED_BY[first])
        elif first in self.open:
            # With all that is open inside it.
            del self.open[len(self.open) - 1 - self.open[::-1].index(first) :]

    def _set_array(self, name: str, words: list[str]) -> None:
        # In a condition, the first value stands: the others are alternatives.
        if self.open:
            self.alternatives[name] = " ".join(self.arrays.get(name, words))
        if not self.open or name not in self.arrays:
            self.arrays[name] = words

    def _assign(self, words: list[str]) -> None:
        if words and words[0] in _DECLARING:
            words = words[1:]
        found = [_ASSIGNMENT.fullmatch(word) for word in words]
        for match in found:
            if match is None:
                return  # a command, or a variable that is set for one command only
            self._set(*match.groups())

    def _set(self, name: str, adds: str, text: str) -> None:
        first = name not in self.variables or name in self.environment
        if self.open and not first:
            self.alternatives[name] = self.variables[name]
            return
        try:
            value = self.expand(text)
        except UnknownHere as error:
            self.variables.pop(name, None)
            self.broken[name] = str(error)
            return
        if self.open:
            self.alternatives[name] = value
        self.variables[name] = self.variables.get(name, "") + value if adds else value

    def _add(self, words: list[str]) -> None:
        """The arguments of the command, arrays and lists of words spread out."""
        for word in words:
            array, variable = _WHOLE_ARRAY.fullmatch(word), _WHOLE_VARIABLE.fullmatch(word)
            if array:
                self._note(array[1])
                self._add(self.arrays.get(array[1], []))
            elif variable and variable[1] in self.variables:
                self.script.arguments += self.variables[variable[1]].split()
            elif not _ARGUMENTS.fullmatch(word):
                self._add_one(word)

    def _add_one(self, word: str) -> None:
        try:
            self.script.arguments.append(self.expand(word))
        except UnknownHere as error:
            key, equals, _ = word.partition("=")
            if equals:
                self.script.unknown[key.lstrip("+")] = str(error)
            else:
                self.script.arguments.append(word)  # the value of an option before it

    def expand(self, text: str) -> str:
        """A text with its variables replaced. Raises UnknownHere."""
        done, at = "", 0
        while at < len(text):
            part = text[at:]
            if part.startswith("$(("):
                end = _closing(text, at + 1, "()")
                done += str(self._arithmetic(text[at + 3 : end - 1]))
            elif part.startswith("$("):
                end = _closing(text, at + 1, "()")
                done += self._command(text[at : end + 1])
            elif part.startswith("${"):
                end = _closing(text, at + 1, "{}")
                done += self._parameter(text[at + 2 : end])
            elif name := re.match(r"\$(\w+)", part):
                end = at + name.end() - 1
                done += self._parameter(name[1])
            else:
                end = at
                done += text[at]
            at = end + 1
        return done

    def _parameter(self, body: str) -> str:
        match = _PARAMETER.fullmatch(body)
        if match is None:
            raise UnknownHere(f"${{{body}}}")
        name, sign, default = match.groups()
        self._note(name)
        if sign and sign.endswith("+"):
            return self.expand(default) if self.variables.get(name) else ""
        if self.variables.get(name):
            return self.variables[name]
        if default is not None:
            return self.expand(default)
        if name in self.variables:
            return ""
        raise UnknownHere(self.broken.get(name, f"${name}"))

    def _note(self, name: str) -> None:
        """Say of a name that is used whether its value depends on a condition."""
        if name in self.alternatives:
            self.script.conditional[name] = self.alternatives[name]

    def _command(self, text: str) -> str:
        if text == "$(pwd)":
            return "."
        raise UnknownHere(text)

    def _arithmetic(self, text: str) -> int:
        # In arithmetic a name needs no $.
        names = re.sub(r"\$\{?(\w+)\}?|([A-Za-z_]\w*)", self._number, text)
        try:
            return _evaluate(ast.parse(names.strip(), mode="eval").body)
        except (SyntaxError, ZeroDivisionError) as error:
            raise UnknownHere(f"$(({text}))") from error

    def _number(self, match: re.Match[str]) -> str:
        return self._parameter(match[1] or match[2])


def _evaluate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left), _evaluate(node.right)
        return int(_OPERATORS[type(node.op)](left, right))
    raise UnknownHere("arithmetic beyond + - * / %")


def _closing(text: str, start: int, pair: str) -> int:
    """Where what opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == pair[0]) - (text[at] == pair[1])
        if depth == 0:
            return at
    raise UnknownHere(text)


def _words(line: str) -> list[str]:
    # A shell takes $((a + b)) as one word.
    line = _ARITHMETIC.sub(lambda found: re.sub(r"\s", "", found[0]), line)
    return shlex.split(line, comments=True)


def _command(words: list[str]) -> list[str]:
    """Up to where a pipe, a redirection or another command begins."""
    ends = (at for at, word in enumerate(words) if _END.fullmatch(word))
    return words[: next(ends, len(words))]


def _logical_lines(text: str) -> Iterator[str]:
    """Lines as a shell takes them: joined at a backslash, in quotes, and in an array."""
    line = ""
    for physical in text.splitlines():
        line += physical
        if physical.endswith("\\"):
            line = line[:-1]
            continue
        if _is_complete(line):
            yield line
            line = ""
        else:
            line += "\n"


def _is_complete(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:  # an open quotation mark
        return False
    if not _ARRAY_BEGINS.match(line):
        return True
    code = re.sub(r"(^|\s)#.*$", "", line, flags=re.MULTILINE)
    return code.count("(") <= code.count(")")

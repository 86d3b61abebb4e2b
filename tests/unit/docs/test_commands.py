"""What the documents tell users to type: our commands, options, keys, targets and files exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from support.documents import (
    DOCUMENTS,
    ROOT,
    CommandLine,
    blocks,
    command_lines,
    in_sentences,
    name_of,
)
from typer._click.exceptions import BadOptionUsage, MissingParameter
from typer.core import TyperGroup
from typer.testing import CliRunner

from rlhf3d import cli
from rlhf3d.config import scalars
from rlhf3d.config.keys import all_keys
from rlhf3d.config.load import build, load_config, merge, parse_override
from rlhf3d.config.schema import Config

COMMANDS = list(command_lines())
PLACEHOLDERS = ("key=value", "…")
KEYS = {key.name for key in all_keys()}
SECTIONS = {name.partition(".")[0] for name in KEYS}
COLUMNS = {"reward_model.ground_truth"}
"""Of the data, with the name of a section."""
FILES = ("py", "md", "yaml", "parquet", "jsonl", "safetensors", "json")
NESTED = {name.rpartition(".")[0] for name in KEYS}


@cache
def program() -> Any:
    return typer.main.get_command(cli.app)


def parsed(line: CommandLine) -> Any:
    """The context of the command that a line calls. Raises what click raises."""
    command, context, name, words = program(), None, "rlhf3d", list(line.words)
    while isinstance(command, TyperGroup):
        context = command.make_context(name, words, parent=context)
        words = [*context._protected_args, *context.args]
        name, command, words = command.resolve_command(context, words)
    return command.make_context(name, words, parent=context)


def problems_of(line: CommandLine) -> Iterator[str]:
    """What is wrong with a command, without running it."""
    try:
        context = parsed(line)
    except typer.Exit:  # --help and --version
        return
    except (MissingParameter, BadOptionUsage) as error:
        # A sentence may name a command without its arguments, an option without its value.
        if line.complete:
            yield f"{line}: {error}"
        return
    except Exception as error:
        yield f"{line}: {error}"
        return
    if str(context.info_name).startswith("from-"):
        return
    overrides = [text for text in context.params.get("overrides") or [] if text not in PLACEHOLDERS]
    raw: dict[str, Any] = {}
    problems: list[str] = []
    for override in overrides:
        merge(raw, parse_override(override))
    build(Config(), raw, "", problems)
    config = ROOT / str(context.params.get("config"))
    # A job file takes its nodes from options of its own.
    if config.is_file() and context.info_name != "launch":
        load_config(config, overrides)
    yield from (f"{line}: {problem}" for problem in problems)


def test_documents_have_commands() -> None:
    assert sum(line.complete for line in COMMANDS) > 40
    assert sum(not line.complete for line in COMMANDS) > 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_can_be_typed(document: Path) -> None:
    problems: list[str] = []
    for line in COMMANDS:
        if line.document == document:
            problems += problems_of(line)
    assert problems == []


def quick(line: CommandLine) -> bool:
    """Whether a command needs neither time nor anything that a fresh clone lacks."""
    here = [word for word in line.words if word.endswith(".yaml") and (ROOT / word).is_file()]
    writes = {"--output", "--write", "--submit"} & set(line.words)
    return line.words[0] in ("config", "launch", "plan", "reshard") and bool(here) and not writes


QUICK = [line for line in COMMANDS if line.words and quick(line)]


@pytest.mark.parametrize("line", QUICK, ids=str)
def test_quick_commands_do_what_the_page_says(
    line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(cli.app, line.words)
    if done.exception is None:
        return
    # A refusal is on the page, below the command.
    block = next(block for block in blocks(line.document) if line.text in block.text)
    assert str(done.exception) == block.text.partition(f"{line.text}\n")[2]


def test_there_are_quick_commands() -> None:
    assert {line.words[0] for line in QUICK} == {"config", "launch", "plan", "reshard"}


@pytest.mark.parametrize(
    ("words", "complete", "problem"),
    [
        ("train c.yaml rollout.nn=2", True, "rollout.nn: no such key"),
        ("train c.yaml rollout.n=x", True, "expected int"),
        ("plan --gpu 8xH100", False, "No such option"),
        ("plan --gpus", True, "requires an argument"),
        ("samples", True, "Missing parameter: run"),
        ("trian c.yaml", False, "No such command"),
    ],
)
def test_a_wrong_command_is_found(words: str, complete: bool, problem: str) -> None:
    line = CommandLine(ROOT / "README.md", words, tuple(words.split()), complete)
    (found,) = problems_of(line)
    assert problem in found


def test_the_help_of_each_command_has_an_example_that_can_be_typed() -> None:
    examples = 0
    waiting: list[tuple[str, Any]] = [("rlhf3d", program())]
    while waiting:
        name, command = waiting.pop()
        if isinstance(command, TyperGroup):
            waiting += [(f"{name} {part}", below) for part, below in command.commands.items()]
            continue
        text = command.help.partition("\n\nExample: ")[2]
        # `rlhf3d config` is `rlhf3d config show`, `rlhf3d doctor` is `rlhf3d doctor machine`.
        assert text.startswith(re.sub(" (show|machine)$", "", name)), name
        words = tuple(text.partition(" > ")[0].split()[1:])
        assert list(problems_of(CommandLine(ROOT / "README.md", text, words, True))) == []
        examples += 1
    assert examples > 15


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_keys_of_its_yaml_exist(document: Path) -> None:
    problems: list[str] = []
    for block in blocks(document):
        raw = scalars.read(block.text, comments=True) if block.language == "yaml" else None
        # Other YAML, such as a Kubernetes job, has none of our sections.
        if isinstance(raw, dict) and SECTIONS & raw.keys():
            build(Config(), {key: raw[key] for key in raw if key != "base"}, "", problems)
    assert problems == []


# Pages such as from_verl.md have another framework's keys.
OURS = [document for document in DOCUMENTS if not document.stem.startswith("from_")]


@pytest.mark.parametrize("document", OURS, ids=name_of)
def test_keys_in_its_sentences_exist(document: Path) -> None:
    """`section.name` and `section.name=value`; files have such names too."""
    unknown = []
    for text in in_sentences(document):
        found = re.match(r"^(\w+(?:\.\w+)+)(?==|: |$)", text)
        if not found or found[1].partition(".")[0] not in SECTIONS:
            continue
        parts = found[1].split(".")
        names = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        is_file = parts[-1] in FILES
        if not (is_file or names & KEYS or found[1] in NESTED | COLUMNS):
            unknown.append(text)
    assert unknown == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_and_scripts_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    lines = list(in_sentences(document))
    for block in blocks(document):
        lines += block.text.splitlines()
    missing = []
    for line in lines:
        for name in re.findall(r"^make ((?:[a-z][a-z0-9-]* ?)+)(?:$| [A-Z#])", line):
            missing += [f"make {target}" for target in name.split() if target not in targets]
        for name in re.findall(r"\bCONFIG=([\w.]+)", line):
            missing += [name] if not (ROOT / "configs" / name).is_file() else []
        for name in re.findall(r"\bpython ((?:tools|tests|examples)/[\w/.]+)", line):
            missing += [name] if not (ROOT / name).is_file() else []
    assert missing == []

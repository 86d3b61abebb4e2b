"""The shipped examples, and what docs/environments.md shows of them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from support.environments import contents, reset, step
from support.tiny_models import word_tokenizer

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.data.parquet import read_parquet
from rlhf3d.data.sets import products
from rlhf3d.environments.load import Environments

EXAMPLES = Path(__file__).resolve().parents[3] / "configs/environments"


def example(file: str, **settings: object) -> Environments:
    path = str(EXAMPLES / file)
    return Environments(EnvironmentConfig(path=path, **settings))  # type: ignore[arg-type]


def test_drawers() -> None:
    drawers = example("drawers.py", name="Drawers")
    row = {
        "extra_info": {"drawers": ["a key", "a coin"]},
        "reward_model": {"ground_truth": "a key"},
    }
    begun = reset(drawers, **row)
    assert contents(begun.prompt or ())[0].endswith(
        "\n\nSay `open N` to look into a drawer, 1 to 2."
    )
    assert contents(step(drawers, "open 1").messages) == ["a key"]
    for wrong in ("open 0", "open 3", "open", "open it", "open ²"):
        assert contents(step(drawers, wrong).messages) == ["There is no such drawer."]
    end = step(drawers, " a key\n")
    assert (end.done, end.reward, end.record["opened"]) == (True, 1.0, 6)
    reset(drawers, **row)
    assert step(drawers, "a coin").reward == 0.0


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("12 * (3 + 4)", "84"),
        ("123456789 * 987654321", "121932631112635269"),
        ("7 / 2", "3.5"),
        ("0.1 + 0.2", "0.3"),
        ("-3 - -4", "1"),
        ("2 ** 9", "only numbers"),
        ("open('x')", "only numbers"),
        ("True + 1", "only numbers"),
        ("1 / 0", "division by zero"),
        ("1 +", "invalid syntax"),
        ("(" * 300, "too long"),
        ("-" * 199 + "1", "-1"),
    ],
)
def test_calculator(expression: str, answer: str) -> None:
    calculator = example("calculator.py", tools=("calculate",))
    reset(calculator)
    call = json.dumps({"name": "calculate", "arguments": {"expression": expression}})
    (content,) = contents(step(calculator, f"<tool_call>{call}</tool_call>").messages)
    assert content == answer or answer in json.loads(content)["error"]


def test_the_calculator_has_a_schema() -> None:
    (schema,) = example("calculator.py", tools=("calculate",)).schemas(None)
    assert schema["function"]["parameters"]["required"] == ["expression"]


def test_the_template_for_smollm2_writes_tools_calls_and_answers() -> None:
    tokenizer = word_tokenizer(["user"])
    tokenizer.chat_template = (EXAMPLES / "smollm2.jinja").read_text()
    tools = example("calculator.py", tools=("calculate",)).schemas(None)
    row = products.generate(1, 0)[0][0]
    text = tokenizer.apply_chat_template(
        row.prompt, tools=tools, tokenize=False, add_generation_prompt=True
    )
    question = row.prompt[-1]["content"]
    call = '<tool_call>{"name": "calculate", "arguments": {"expression": "31*52"}}</tool_call>'
    assert text.startswith(
        "<|im_start|>system\nTools: calculate(expression)<|im_end|>\n"
        "<|im_start|>user\n31 times 52?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n"
        "<|im_start|>tool\n1612<|im_end|>\n<|im_start|>assistant\n1612<|im_end|>\n"
    )
    assert text.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    # The worked examples' calls are those that the parser reads and the calculator answers.
    calculator = example("calculator.py", tools=("calculate",))
    reset(calculator)
    assert contents(step(calculator, call).messages) == ["1612"]


def blocks(language: str) -> list[str]:
    """Code of docs/environments.md."""
    text = (EXAMPLES.parents[1] / "docs/environments.md").read_text()
    return [block.split("```")[0] for block in text.split(f"```{language}\n")[1:]]


def bare_class(code: str) -> str:
    """The first class without annotations and docstrings."""
    found = next(node for node in ast.parse(code).body if isinstance(node, ast.ClassDef))
    for node in ast.walk(found):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.unparse(found)


def test_the_page_shows_what_is_shipped() -> None:
    drawers, _, calculator, *_ = blocks("python")
    assert bare_class(drawers) == bare_class((EXAMPLES / "drawers.py").read_text())
    begin, _, described = calculator.partition("Args:")
    shipped = (EXAMPLES / "calculator.py").read_text()
    assert begin in shipped and described.partition('"""')[0].strip() in shipped


def test_the_pages_rows_are_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("python")[1], {})
    drawers = example("drawers.py", name="Drawers")
    row = read_parquet("drawers.parquet")[7]
    reset(drawers, reward_model=row.reward_model, extra_info=row.extra_info)
    assert contents(step(drawers, "open 2").messages) == [row.ground_truth]
    assert step(drawers, row.ground_truth).reward == 1.0

"""One-step word problems from a seed: a task a small model learns in minutes, with nothing to download.

Invariant: the same arguments give the same rows, and no (template, numbers) of the test split is in the
training split, so no question is either. Rows have gsm8k's format.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf3d.data.rows import PromptRow
from rlhf3d.data.sets.gsm8k import make_row

DATA_SOURCE = "rlhf3d/arithmetic"
SCORER = "gsm8k"
NAMES = ("Tom", "Anna", "Ben", "Lily", "Max", "Sara", "Jack", "Emma")
NUMBER_RANGES = {"easy": (2, 12), "medium": (2, 30), "hard": (2, 99)}
"""Smallest and largest number drawn; products (and what is divided) are larger."""


@dataclass(frozen=True)
class Template:
    """A question about {a} and {b}, perhaps with a {name}, answered by a op b."""

    key: str
    op: str
    text: str

    def pairs(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """All (a, b) whose answer is a positive whole number, the numbers drawn being in [low, high]."""
        for x in range(low, high + 1):
            for y in range(low, high + 1):
                if self.op == "/":
                    yield x * y, y
                elif self.op != "-" or x > y:
                    yield x, y

    def answer(self, a: int, b: int) -> int:
        """a op b."""
        return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[self.op]


TEMPLATES = (
    Template(
        "boxes",
        "*",
        "There are {a} boxes with {b} apples each. How many apples are there in total?",
    ),
    Template(
        "marbles", "-", "{name} has {a} marbles and gives away {b}. How many marbles are left?"
    ),
    Template("pens", "*", "A pen costs {a} dollars. How many dollars do {b} pens cost?"),
    Template(
        "pages",
        "+",
        "{name} reads {a} pages on Monday and {b} on Tuesday. How many pages in total?",
    ),
    Template(
        "cookies",
        "/",
        "{a} cookies are shared equally by {b} children. How many does each child get?",
    ),
    Template(
        "birds", "+", "{a} birds sit in a tree and {b} more come. How many birds are there now?"
    ),
    Template(
        "savings",
        "+",
        "{name} has {a} dollars and earns {b} more. How many dollars is that in total?",
    ),
    Template("age", "+", "{name} is {a} years old. How old will {name} be in {b} years?"),
    Template(
        "bus",
        "-",
        "A bus carries {a} people and {b} get off. How many people are still on the bus?",
    ),
    Template(
        "ribbon", "-", "A ribbon is {a} cm long. {name} cuts off {b} cm. How many cm are left?"
    ),
    Template(
        "difference", "-", "{name} has {a} cards and a friend has {b}. How many more has {name}?"
    ),
    Template("chairs", "*", "A hall has {a} rows of {b} chairs. How many chairs is that?"),
    Template(
        "running", "*", "{name} runs {a} km every day. How many km does {name} run in {b} days?"
    ),
    Template("teams", "/", "{a} players form teams of {b}. How many teams are there?"),
    Template("eggs", "/", "{a} eggs are packed in cartons of {b}. How many cartons are filled?"),
    Template(
        "shelves", "/", "{name} puts {a} books on {b} shelves, as many on each. How many on each?"
    ),
)
EASY_TEMPLATES = (
    "boxes",
    "pens",
    "chairs",
    "running",
    "pages",
    "birds",
    "savings",
    "marbles",
    "bus",
    "cookies",
)
"""Templates of the easy difficulty: those that a 135M model sometimes solves before it is trained."""

PREAMBLE: tuple[dict[str, str], ...] = (
    {"role": "system", "content": "Math"},
    {"role": "user", "content": "2 plus 3?"},
    {"role": "assistant", "content": "5"},
)
"""Stands before every question: one worked example, which keeps answers short."""


@dataclass(frozen=True)
class _Problem:
    template: Template
    a: int
    b: int
    name: str


def generate(
    train_size: int = 2048,
    test_size: int = 256,
    seed: int = 0,
    difficulty: str = "easy",
    templates: Sequence[str] | None = None,
    suffix: str = "",
) -> tuple[list[PromptRow], list[PromptRow]]:
    """Training and test rows, each spread evenly over the templates (null: all of `TEMPLATES`,
    or `EASY_TEMPLATES` where `difficulty` is easy).

    Raises ValueError for an unknown difficulty or template, and where so many problems do not exist.
    """
    if difficulty not in NUMBER_RANGES:
        raise ValueError(f"difficulty: no {difficulty!r}; known are {', '.join(NUMBER_RANGES)}")
    if train_size < 1 or test_size < 0:
        raise ValueError(
            f"train_size={train_size} must be at least 1 and test_size={test_size} at least 0"
        )
    rng = random.Random(f"{DATA_SOURCE}:{difficulty}:{seed}")
    decks = [
        (template, list(template.pairs(*NUMBER_RANGES[difficulty])))
        for template in _choose(templates or _default_keys(difficulty))
    ]
    for _, pairs in decks:
        rng.shuffle(pairs)
    test = _deal(
        [[_Problem(t, a, b, rng.choice(NAMES)) for a, b in pairs] for t, pairs in decks], test_size
    )
    taken = {(p.template.key, p.a, p.b) for p in test}
    train_decks = []
    for template, pairs in decks:
        names = NAMES if "{name}" in template.text else NAMES[:1]
        kept = [(a, b) for a, b in pairs if (template.key, a, b) not in taken]
        deck = [_Problem(template, a, b, name) for a, b in kept for name in names]
        rng.shuffle(deck)
        train_decks.append(deck)
    train = _deal(train_decks, train_size)
    rng.shuffle(train)
    rng.shuffle(test)
    return _rows(train, "train", suffix), _rows(test, "test", suffix)


def _default_keys(difficulty: str) -> Sequence[str]:
    return EASY_TEMPLATES if difficulty == "easy" else [template.key for template in TEMPLATES]


def _choose(keys: Sequence[str]) -> list[Template]:
    known = {template.key: template for template in TEMPLATES}
    for key in keys:
        if key not in known:
            raise ValueError(f"templates: no {key!r}; known are {', '.join(known)}")
    return [known[key] for key in dict.fromkeys(keys)]


def _deal(decks: list[list[_Problem]], count: int) -> list[_Problem]:
    """The first `count` problems, taken in turn from each deck that still has some."""
    rounds = (deck[i] for i in range(max(map(len, decks))) for deck in decks if i < len(deck))
    dealt = [problem for problem, _ in zip(rounds, range(count), strict=False)]
    if len(dealt) < count:
        raise ValueError(
            f"{count} problems wanted, {len(dealt)} exist beside the other split: "
            "lower train_size or test_size, use more templates or a harder difficulty"
        )
    return dealt


def _rows(problems: list[_Problem], split: str, suffix: str) -> list[PromptRow]:
    rows = []
    for index, p in enumerate(problems):
        result = p.template.answer(p.a, p.b)
        op = p.template.op
        working = f"{p.a} {op} {p.b} = <<{p.a}{op}{p.b}={result}>>{result}\n#### {result}"
        question = p.template.text.format(a=p.a, b=p.b, name=p.name)
        extra = {"split": split, "index": index, "template": p.template.key}
        rows.append(make_row(DATA_SOURCE, question, working, suffix, extra, PREAMBLE))
    return rows

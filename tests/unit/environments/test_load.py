"""What is checked before a run starts: the file, its classes' signatures, the rows' names."""

from __future__ import annotations

import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.environments import contents, load, reset, step

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.environments.api import Reset
from rlhf3d.environments.load import Environments

TWO = """
    import functools
    class Red:
        def __init__(self, size=1): self.size = size
        def reset(self): return "red"
        def step(self, text): return None, None, True
    class Blue(Red):
        def reset(self): return "blue"
    def small() -> Red:
        return Red(size=0)
    def unsaid():
        return Red()
    big = functools.partial(Red, size=9)
    number = 3
"""


def test_a_row_names_its_environment(tmp_path: Path) -> None:
    both = load(tmp_path, TWO)
    assert both.name_of({"environment": "Blue"}) == "Blue"
    assert [contents(reset(both, environment=name).prompt or ()) for name in ("Red", "Blue")] == [
        ["Open the door.\n\nred"],
        ["Open the door.\n\nblue"],
    ]


def test_the_configuration_names_it_for_the_others(tmp_path: Path) -> None:
    named = load(tmp_path, TWO, name="Red")
    assert named.name_of({}) == "Red" and named.name_of({"environment": None}) == "Red"
    assert named.name_of({"environment": "Blue"}) == "Blue"


@pytest.mark.parametrize("row", [{}, {"environment": None}, {"environment": ""}])
def test_a_missing_name_is_an_error(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"environment\.name.*'environment'"):
        load(tmp_path, TWO).name_of(row)


def test_a_name_of_something_else_is_an_error(tmp_path: Path) -> None:
    both = load(tmp_path, TWO)
    with pytest.raises(ValueError, match=r"environment\.name: no 'Rad'.*did you mean 'Red'"):
        both.name_of({"environment": "Rad"})
    with pytest.raises(ValueError, match=r"environment\.name: 'number'.*not callable"):
        both.name_of({"environment": "number"})


def test_a_function_makes_it_if_it_says_what(tmp_path: Path) -> None:
    small = load(tmp_path, TWO, name="small")
    assert reset(small).record == {"size": 0}
    assert reset(load(tmp_path, TWO, name="big")).record == {"size": 9}
    with pytest.raises(ValueError, match=r"environment\.path: unsaid.*annotate"):
        load(tmp_path, TWO, name="unsaid")


def test_kwargs_are_checked_and_given(tmp_path: Path) -> None:
    assert reset(load(tmp_path, TWO, name="Red", kwargs={"size": 5})).record == {"size": 5}
    with pytest.raises(ValueError, match=r"environment\.kwargs \['depth'\]"):
        load(tmp_path, TWO, name="Red", kwargs={"depth": 5})


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("x = 1", "no method `reset`"),
        ("def reset(self): pass", "neither `step`"),
        ("def reset(self, size): pass\n    def step(self, text): pass", "'size'"),
        ("def reset(self, row, /): pass\n    def step(self, text): pass", "'row'"),
        ("def reset(self): pass\n    def step(self): pass", "one argument"),
        ("def reset(self): pass\n    def step(self, text, more): pass", "one argument"),
    ],
)
def test_a_class_that_does_not_fit(tmp_path: Path, body: str, named: str) -> None:
    with pytest.raises(ValueError, match=r"environment\.path: Game in .*games\.py") as raised:
        load(tmp_path, f"class Game:\n    {body}", name="Game")
    assert named in str(raised.value)


@pytest.mark.parametrize("code", ["import nothing_like_it", "1 / 0", "exit(3)", "def"])
def test_a_file_that_fails(tmp_path: Path, code: str) -> None:
    with pytest.raises(ValueError, match=r"environment\.path: .*games\.py"):
        load(tmp_path, code, name="Game")


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"environment\.path: no such file"):
        Environments(EnvironmentConfig(str(tmp_path / "none.py"), "Game"))


def test_it_pickles_as_its_settings(tmp_path: Path) -> None:
    both = load(tmp_path, TWO, name="Red", kwargs={"size": 2})
    again = pickle.loads(pickle.dumps(both))
    assert again(Reset({"prompt": []}, 0)).record == {"size": 2}
    recipe = partial(Environments, EnvironmentConfig(str(tmp_path / "games.py"), "Blue"))
    assert pickle.loads(pickle.dumps(recipe))().name_of({}) == "Blue"


def test_replies_cross_a_pipe_without_the_users_file(tmp_path: Path) -> None:
    red = load(tmp_path, TWO, name="Red")
    replies = [reset(red), step(red, "x")]
    assert b"games" not in pickle.dumps(replies)


def test_its_files_folder_is_searched_and_output_kept_away(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_games.py").write_text("TEXT = 'from beside'")
    code = """
        class Game:
            def reset(self):
                from beside_games import TEXT
                print("noise")
                return TEXT
            def step(self, text): return None, None, True
    """
    begun = reset(load(tmp_path, code, name="Game"))
    assert contents(begun.prompt or ()) == ["Open the door.\n\nfrom beside"]
    printed = capfd.readouterr()
    assert "noise" in printed.err and "noise" not in printed.out
    assert str(tmp_path) not in sys.path[:1]


def test_the_file_runs_once(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        log = Path({str(tmp_path / "log")!r})
        log.write_text(log.read_text() + "x" if log.exists() else "x")
        class Game:
            def reset(self): pass
            def step(self, text): return None, None, True
        def tool(): '''A tool.'''
    """
    load(tmp_path, code, name="Game", tools=("tool",)).schemas("Game")
    assert (tmp_path / "log").read_text() == "x"


def test_who_answers(tmp_path: Path) -> None:
    code = (
        TWO
        + """
    def tool(): '''A tool.'''
    class Methods:
        def reset(self, **columns): pass
        def tool(self): '''A tool.'''
    """
    )
    plain = load(tmp_path, code)
    assert (plain.roles("Red"), plain.roles("Methods")) == (("user",), ("tool",))
    tools = load(tmp_path, code, tools=("tool",))
    assert (tools.roles("Red"), tools.roles(None)) == (("user", "tool"), ("tool",))


def test_it_is_closed(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        class Game:
            def reset(self): pass
            def step(self, text): return None, None, True
            async def close(self): Path({str(tmp_path / "closed")!r}).touch()
        class Methods:
            def reset(self, **columns): pass
            def close(self):
                '''A tool.'''
                raise ValueError
    """
    both = load(tmp_path, code)
    both.close()
    reset(both, environment="Methods")
    both.close()
    assert not (tmp_path / "closed").exists()
    reset(both, environment="Game")
    both.close()
    assert (tmp_path / "closed").exists()

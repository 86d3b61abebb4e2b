"""Reading: what YAML and overrides become, and what is refused with which words."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.config.keys import all_keys, path_keys, value_of, with_value
from rlhf3d.config.load import (
    ConfigError,
    _expand_paths,
    build,
    coerce,
    config_to_yaml,
    files_of,
    load_config,
    read_config,
)
from rlhf3d.config.schema import Config, LayoutConfig
from rlhf3d.paths import CONFIGS

DIGITS = " … decimal digits"
WORD = QUOTES = " … quotes"
ONE = " … quotes"
KWARGS = "custom_reward_function.kwargs"
BOTH = {"a": 1, "b": 2}
SHELL = " … shell"
MINIMAL = "model: {path: m}\ndata: {train_files: [t.parquet]}\n"


def load(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def says(problem: str, expected: str) -> bool:
    """Whether a message begins with the first of the pieces that … separates, and has the others
    after it, in this order.
    """
    first, *others = expected.split(" … ")
    rest = problem.removeprefix(first)
    found = problem.startswith(first)
    for piece in others:
        _, there, rest = rest.partition(piece)
        found = found and bool(there)
    return found


def problems(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, text=text)
    return caught.value.problems


def test_values_keep_their_meaning(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "actor.optim.lr=1e-5",  # YAML reads this as a string
        "critic.optim.clip_grad=0.5",
        "actor.optim.betas=[0.8, 0.9]",
        "data.val_files=v.parquet",
        "trainer.total_training_steps=1e3",
        "rollout.threads=null",
        "custom_reward_function.kwargs.bonus=2",
        "custom_reward_function.kwargs.tags=[a]",
    )
    assert config.actor.optim.lr == 1e-5
    assert config.critic.optim.clip_grad == 0.5
    assert config.critic.optim.lr == 1e-5, "the section's own default survives a partial section"
    assert config.actor.optim.betas == (0.8, 0.9)
    assert config.data.val_files == ("v.parquet",)
    assert config.trainer.total_training_steps == 1000
    assert type(config.trainer.total_training_steps) is int
    assert config.rollout.threads is None
    assert config.custom_reward_function.kwargs == {"bonus": 2, "tags": ["a"]}


@pytest.mark.parametrize(
    "text",
    [
        "a/b #3",
        "2026-01-01",
        "20260101",
        "1.10",
        "a/b: c",
        "@a",
        "C:\\a\\b",
        "no",
        "[x",
        "*",
        "a,b",
        "1e1",
        "a 'b",
    ],
)
def test_text_is_what_it_says(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"trainer.output_dir={text}").trainer.output_dir == text
    assert load(tmp_path, f"data.train_files={json.dumps([text])}").data.train_files == (text,)
    if "," not in text and text[0] != "[":
        assert load(tmp_path, f"data.train_files={text}").data.train_files == (text,)
    again = tmp_path / "again.yaml"
    again.write_text(config_to_yaml(load(tmp_path, f"trainer.output_dir={text}")))
    assert load_config(again).trainer.output_dir == text


def test_names_in_a_mapping_have_dots_and_anything_is_read_by_yaml_1_2(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "reward.scorers.my.org/data.v2=math_verify",
        "reward.weights.accuracy=1e0",
        f"{KWARGS}.a.b=1e-6",
        f"{KWARGS}.mark='no'",
        f"{KWARGS}.many=[1, 2.5, true, null, .inf, a b]",
        "algorithm.rollout_correction.rollout_is_threshold=0.5_2",
    )
    assert config.reward.scorers == {"my.org/data.v2": "math_verify"} and config.reward.weights == {
        "accuracy": 1.0
    }
    many = [1, 2.5, True, None, math.inf, "a b"]
    assert config.custom_reward_function.kwargs == {"a": {"b": 1e-6}, "mark": "no", "many": many}
    assert config.algorithm.rollout_correction.rollout_is_threshold == "0.5_2"
    (tmp_path / "again.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in lists and nested; and no key of a path is forgotten."""
    monkeypatch.setenv("HOME", "/home/me")
    named = {
        doc.name
        for doc in all_keys()
        if re.search(r"path|(?<!pro)files?|dir|folder", doc.name.rpartition(".")[2])
    }
    others = {"trainer.resume_mode", "environment.tool_format", "model.chat_template"}
    assert named | others == set(path_keys())
    for name in path_keys():
        many = isinstance(value_of(Config(), name), tuple)
        config = _expand_paths(with_value(Config(), name, ("~/a b",) if many else "~/a b"), [])
        assert value_of(config, name) == (("/home/me/a b",) if many else "/home/me/a b"), name
    assert load(tmp_path, "data.val_files=[~/a, b/~c]").data.val_files == ("/home/me/a", "b/~c")


def test_later_override_wins_and_a_section_override_is_merged(tmp_path: Path) -> None:
    config = load(tmp_path, "rollout.n=2", "rollout={n: 4, engines: 2}", "rollout.engines=3")
    assert (config.rollout.n, config.rollout.engines) == (4, 3)
    assert config.model.path == "m"


@pytest.mark.parametrize("base", ["quickstart_grpo.yaml", "configs/quickstart_grpo.yaml"])
def test_a_base_that_ships_with_the_package_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """One of that name beside the file comes first; one in the working folder is not looked for."""
    own = tmp_path / "own"
    (own / base).parent.mkdir(parents=True)
    path = own / "run.yaml"
    path.write_text(f"base: {base}\nrollout: {{engines: 3}}\n")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / base).parent.mkdir(parents=True)
    (elsewhere / base).write_text("rollout: {n: 8}\n")
    monkeypatch.chdir(elsewhere)
    config, _ = read_config(path)
    assert (config.rollout.n, config.rollout.engines) == (4, 3)
    assert files_of(path) == [path, CONFIGS / "quickstart_grpo.yaml", CONFIGS / "quickstart.yaml"]
    (own / base).write_text("rollout: {n: 9}\n")
    assert read_config(path)[0].rollout.n == 9 and files_of(path) == [path, own / base]


@pytest.mark.parametrize(
    ("overrides", "kwargs"),
    [
        ([], {"level": 2, "words": {"few": 1, "many": 9}}),
        (["environment.kwargs={}"], {}),
        (["environment.kwargs=null"], {}),
        (["environment={kwargs: {}}"], {}),
        (["environment.kwargs={seed: 3}"], {"seed": 3}),
        (["environment.kwargs.level=3"], {"level": 3, "words": {"few": 1, "many": 9}}),
        (["environment.kwargs.words.few=0"], {"level": 2, "words": {"few": 0, "many": 9}}),
        (["environment.kwargs.words={}"], {"level": 2, "words": {}}),
        (["environment.kwargs={}", "environment.kwargs.a=1", "environment.kwargs.b=2"], BOTH),
        (["environment.kwargs.c=1", f"environment={{kwargs: {BOTH}}}"], BOTH),
    ],
)
def test_a_mapping_given_whole_replaces_the_former_one(
    tmp_path: Path, overrides: list[str], kwargs: dict[str, Any]
) -> None:
    """Of the base, of the file and of overrides before it; dotted names change entries."""
    (tmp_path / "base.yaml").write_text(
        "model: {path: m}\ndata: {train_files: [t]}\n"
        "environment: {path: e.py, name: E, kwargs: {old: 1}}\n"
        "reward: {weights: {accuracy: 1.0, format: 0.5}, scorers: {a: math_verify}}\n"
    )
    path = tmp_path / "derived.yaml"
    path.write_text(
        "base: base.yaml\n"
        "environment: {kwargs: {level: 2, words: {few: 1, many: 9}}}\n"
        "reward: {weights: {environment: 1.0}, scorers: {}}\n"
    )
    config, _ = read_config(path, overrides)
    assert config.environment.kwargs == kwargs
    assert (config.environment.path, config.environment.name) == ("e.py", "E")
    assert (config.reward.weights, config.reward.scorers) == ({"environment": 1.0}, {})


def test_an_entry_joins_those_of_the_default(tmp_path: Path) -> None:
    config = load(tmp_path, "reward.weights.format=0.2")
    assert config.reward.weights == {"accuracy": 1.0, "format": 0.2}
    assert load(tmp_path, "reward.weights={format: 0.2}").reward.weights == {"format": 0.2}


@pytest.mark.parametrize(
    ("override", "message"),  # … as in `says`
    [
        ("actor.lr=1", "actor.lr: … actor.optim.lr"),
        ("trainer.sede=1", "trainer.sede: … trainer.seed"),
        ("criticc.optim.lr=1", "criticc: … critic"),
        ("zzzzzz=1", "zzzzzz: … rlhf3d config"),
        ("rollout.n=two", "rollout.n = 'two': expected int"),
        ("rollout.n=1.5", "rollout.n = 1.5: expected int"),
        ("rollout.n=true", "rollout.n = True: expected int"),
        ("actor.optim.lr=.inf", "actor.optim.lr = inf: expected float"),
        ("actor.optim.betas=[0.9]", "actor.optim.betas = [0.9]: expected list of 2 float"),
        ("data.shuffle=1", "data.shuffle = 1: expected bool"),
        ("model.path=null", "model.path = None: expected str"),
        ("rollout.n=010", f"rollout.n = 010: expected int{DIGITS}"),
        ("trainer.seed=0123", f"trainer.seed = 0123: expected int{DIGITS}"),
        (
            "trainer.total_training_steps=1_000",
            f"trainer.total_training_steps = 1_000: expected int or null{DIGITS}",
        ),
        (
            "trainer.max_wall_clock_s=1:30:00",
            f"trainer.max_wall_clock_s = 1:30:00: expected float or null{DIGITS}",
        ),
        ("trainer.seed=0x10", f"trainer.seed = 0x10: expected int{DIGITS}"),
        ("trainer.seed='010'", "trainer.seed = '010': expected int"),
        ("data.shuffle=no", "data.shuffle = no: expected bool … true … false"),
        ("data.shuffle='false'", "data.shuffle = 'false': expected bool"),
        (
            "trainer.best_metric=None",
            "trainer.best_metric = 'None': expected str or null … null",
        ),
        (
            "rollout.threads=none",
            "rollout.threads = 'none': expected int or null … null",
        ),
        (
            "trainer.seed=",
            "override 'trainer.seed=': … null … ''",
        ),
        (
            "data.train_files=a,b",
            f"data.train_files = 'a,b': expected list of str … [a,b]{ONE}",
        ),
        (
            "actor.optim.betas=(0.9,1)",
            "actor.optim.betas = '(0.9,1)': expected list of 2 float … [0.9,1]",
        ),
        ("data.val_files=null", "data.val_files = None: expected list of str … []"),
        (
            f"{KWARGS}.flag=no",
            f"{KWARGS} = {{'flag': 'no'}}: expected mapping … true … false{WORD}",
        ),
        (
            f"{KWARGS}={{d: 2024-05-06}}",
            f"{KWARGS} = {{'d': '2024-05-06'}}: expected mapping … 2024-05-06{QUOTES}",
        ),
        (
            f"{KWARGS}={{a: [22:22]}}",
            f"{KWARGS} = {{'a': ['22:22']}}: expected mapping … 22:22{QUOTES}",
        ),
        (
            f"{KWARGS}.a=b #2",
            f"override '{KWARGS}.a=b #2': … '#2' … comment … quotes",
        ),
        (
            "+trainer.foo=1",
            "override '+trainer.foo=1': … Hydra … trainer.foo=1",
        ),
        (
            "~trainer.seed",
            "override '~trainer.seed': … Hydra … trainer.seed=VALUE",
        ),
        (
            "trainer.output_dir=''",
            "trainer.output_dir … empty",
        ),
        ("trainer.output_dir=$HOME/x", f"trainer.output_dir = $HOME/x:{SHELL}"),
        ("data.val_files=[a, '${V}/b']", f"data.val_files = a, ${{V}}/b:{SHELL}"),
        (
            "model.path=~no-one/x",
            "model.path = ~no-one/x: … ~no-one … ./~no-one/x",
        ),
        ("rollout.threads=x", "rollout.threads = 'x': expected int or null"),
        (
            "actor.layout.recompute=true",
            "actor.layout.recompute = True: expected one of none, selective, full",
        ),
        (
            "critic.layout.recompute=most",
            "critic.layout.recompute = 'most': expected one of none, selective, full",
        ),
        ("rollout=3", "rollout = 3: … section … int"),
        ("seed", "override 'seed': expected key.name=value"),
        ("=1", "override '=1': expected key.name=value"),
    ],
)
def test_a_mistake_is_told_with_key_value_and_fix(
    tmp_path: Path, override: str, message: str
) -> None:
    (problem,) = problems(tmp_path, override)
    assert says(problem, message), problem


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path, "trainer.sed=1", "rollout.n=x", "rollout.top_p=0.9", "reward.method=magic"
    )
    assert len(found) == 4
    for key in ("trainer.sed:", "rollout.n =", "rollout.top_p = 0.9", "reward.method = 'magic'"):
        assert any(problem.startswith(key) for problem in found), key


def test_an_unread_key_causes_no_second_complaint(tmp_path: Path) -> None:
    """The default mini-batch of 64 does not divide 16, but the user did not ask for it."""
    found = problems(tmp_path, "data.train_batch_size=16", "actor.ppo_mini_batch_sizee=16")
    (problem,) = found
    assert says(problem, "actor.ppo_mini_batch_sizee: … actor.ppo_mini_batch_size?")


def test_base_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(MINIMAL + "rollout: {n: 4, engines: 2}\n")
    (tmp_path / "sub" / "child.yaml").write_text("base: ../base.yaml\nrollout: {n: 8}\n")
    config = load_config(tmp_path / "sub" / "child.yaml")
    assert (config.rollout.n, config.rollout.engines, config.model.path) == (8, 2, "m")


def test_base_of_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="derives from itself"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model: {path: a\n", "is not YAML"),
        ("- 1\n", "expected sections"),
        ("rollout: {n: 1, n: 2}\n", "given twice: n"),
        ("rollout:\n  n: 1\nmodel: {}\nrollout:\n  n: 2\n", "given twice: rollout"),
        ("just a text\n", "expected sections .* found str"),
        ("? [a, b]\n: 1\n", "is not YAML"),
        ("rollout: &r {n: *r}\n", r"or an alias \(\*name\) stands within itself"),
        ("custom_reward_function: {kwargs: &k {a: *k}}\n", "stands within itself"),
        (
            "custom_reward_function: {kwargs: {a: !!timestamp 2024-01-01}}\n",
            "kwargs = .*: expected mapping",
        ),
        ("custom_reward_function: {kwargs: {a: !!set {x}}}\n", "kwargs = .*: expected mapping"),
        ("base: ~no-one/a.yaml\n", "base: ~no-one/a.yaml: no user has the home folder ~no-one"),
        ("rollout: " + "[" * 2000 + "]" * 2000, "a value is nested too deeply"),
        ("base: [a.yaml]\n", "base: expected the name of a file, found list"),
        ("actor.optim.lr: 1e-5\n", "in a file keys are nested"),
        ("rollout: {n: 010}\n", "rollout.n = 010: expected int"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(tmp_path, text=text)


def test_a_comment_is_one_in_a_file_of_one_line_too(tmp_path: Path) -> None:
    """In an override it would be a text of the user's cut short."""
    text = "{model: {path: m}, data: {train_files: [t]}}  # from last week\n"
    assert load(tmp_path, text=text).model.path == "m"
    (problem,) = problems(tmp_path, "rollout={n: 2} # few")
    assert says(problem, "override 'rollout={n: 2} # few': … '# few'")


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("# für\nmodel: {path: m}\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 3\): save it as UTF-8"):
        load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(path).model.path == "m"


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"no configuration file nowhere\.yaml"):
        load_config("nowhere.yaml")


LEAVES = st.sampled_from([doc for doc in all_keys() if doc.kind in ("int", "float", "bool", "str")])
VALUES = {
    "int": st.integers(-(2**53), 2**53),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
    "str": st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=20),
}


@settings(max_examples=50, deadline=None)
@given(st.data(), st.lists(LEAVES, max_size=8))
def test_yaml_round_trip(data: st.DataObject, keys: list) -> None:
    raw: dict = {}
    for doc in keys:
        section = raw
        *parents, leaf = doc.name.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = data.draw(VALUES[doc.kind])
    mistakes: list[str] = []
    config = build(Config(), raw, "", mistakes)
    assert not mistakes
    assert build(Config(), yaml.safe_load(config_to_yaml(config)), "", mistakes) == config
    assert not mistakes


def test_a_section_that_may_be_null(tmp_path: Path) -> None:
    """Any of its keys makes it a section with defaults.

    Null makes it none; both survive the round trip.
    """
    assert load(tmp_path).critic.layout is None
    critic = load(tmp_path, "critic.layout.dp=2").critic
    assert critic.layout == LayoutConfig(dp=2)
    assert load(tmp_path, "critic.layout.dp=2", "critic.layout=null").critic.layout is None
    (tmp_path / "again.yaml").write_text(
        config_to_yaml(load(tmp_path, "critic.layout={dp: 2, vpp: null}"))
    )
    assert load_config(tmp_path / "again.yaml").critic == critic
    (problem,) = problems(tmp_path, "critic.layout.ttp=2")
    assert says(problem, "critic.layout.ttp: … critic.layout.tp?")
    (problem,) = problems(tmp_path, "critic.layout=2")
    assert says(problem, "critic.layout = 2: … section … int")
    docs = {doc.name: doc for doc in all_keys()}
    assert (docs["critic.layout"].kind, docs["critic.layout"].default) == ("section or null", None)
    assert docs["critic.layout.dp"].doc == docs["actor.layout.dp"].doc


@pytest.mark.parametrize("value", ["1e-5", "0.00001", 1e-5])
def test_numbers_in_strings(value: object) -> None:
    assert coerce(value, float) == 1e-5


def test_large_integers_are_exact() -> None:
    assert coerce(2**60 + 1, int) == 2**60 + 1


def test_every_key_is_documented() -> None:
    docs = {doc.name: doc for doc in all_keys()}
    assert [name for name, doc in docs.items() if not doc.doc] == []
    assert docs["critic.optim.lr"].default == 1e-5
    assert docs["actor.layout.tp"].doc.startswith("Tensor-parallel size")
    assert docs["rollout.threads"].kind == "int or null"


def test_what_only_just_reads_as_a_number_is_told_by_its_key(tmp_path: Path) -> None:
    """Python refuses to read thousands of digits."""
    (problem,) = problems(tmp_path, f"rollout.n={'1' * 5000}")
    assert problem.startswith("rollout.n = 1111") and "expected int" in problem


def test_an_empty_file_derives_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert files_of(path) == [path]


def test_a_stop_text_of_backslashes_is_no_line_end(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, r"rollout.stop=[\n\n]")
    assert "this is a backslash and a letter, not a line end" in problem
    assert load(tmp_path, r'rollout.stop=["\n\n"]').rollout.stop == ("\n\n",)

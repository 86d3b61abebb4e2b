"""Reading: what YAML and overrides become, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf3d.config.docs import field_docs
from rlhf3d.config.load import ConfigError, build, coerce, config_to_yaml, load_config
from rlhf3d.config.schema import Config, LayoutConfig

MINIMAL = "model: {path: m}\ndata: {train_files: [t.parquet]}\n"


def load(tmp_path: Path, *overrides: str, text: str = MINIMAL) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides, files=False)


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


def test_later_override_wins_and_a_section_override_is_merged(tmp_path: Path) -> None:
    config = load(tmp_path, "rollout.n=2", "rollout={n: 4, engines: 2}", "rollout.engines=3")
    assert (config.rollout.n, config.rollout.engines) == (4, 3)
    assert config.model.path == "m"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("actor.lr=1", "actor.lr: no such key; did you mean actor.optim.lr?"),
        ("trainer.sede=1", "trainer.sede: no such key; did you mean trainer.seed?"),
        ("criticc.optim.lr=1", "criticc: no such key; did you mean critic?"),
        ("zzzzzz=1", "zzzzzz: no such key; `rlhf3d config` lists all keys"),
        ("rollout.n=two", "rollout.n = 'two': expected int"),
        ("rollout.n=1.5", "rollout.n = 1.5: expected int"),
        ("rollout.n=true", "rollout.n = True: expected int"),
        ("actor.optim.lr=.inf", "actor.optim.lr = inf: expected float"),
        ("actor.optim.betas=[0.9]", "actor.optim.betas = [0.9]: expected list of 2 float"),
        ("data.shuffle=1", "data.shuffle = 1: expected bool"),
        ("model.path=3", "model.path = 3: expected str"),
        ("rollout.threads=x", "rollout.threads = 'x': expected int or null"),
        ("actor.layout.recompute=true", "actor.layout.recompute = True: expected one of none, selective, full"),
        ("critic.layout.recompute=most", "critic.layout.recompute = 'most': expected one of none, selective, full"),
        ("rollout=3", "rollout = 3: expected a section of keys, found int"),
        ("seed", "override 'seed': expected key.name=value"),
        ("=1", "override '=1': expected key.name=value"),
    ],
)
def test_a_mistake_is_told_with_key_value_and_fix(tmp_path: Path, override: str, message: str) -> None:
    assert message in problems(tmp_path, override)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "trainer.sed=1", "rollout.n=x", "rollout.top_p=0.9", "reward.method=magic")
    assert len(found) == 4
    for key in ("trainer.sed:", "rollout.n =", "rollout.top_p = 0.9", "reward.method = 'magic'"):
        assert any(problem.startswith(key) for problem in found), key


def test_an_unread_key_causes_no_second_complaint(tmp_path: Path) -> None:
    """The default mini-batch of 64 does not divide 16, but the user did not ask for it."""
    found = problems(tmp_path, "data.train_batch_size=16", "actor.ppo_mini_batch_sizee=16")
    assert found == ["actor.ppo_mini_batch_sizee: no such key; did you mean actor.ppo_mini_batch_size?"]


def test_base_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(MINIMAL + "rollout: {n: 4, engines: 2}\n")
    (tmp_path / "sub" / "child.yaml").write_text("base: ../base.yaml\nrollout: {n: 8}\n")
    config = load_config(tmp_path / "sub" / "child.yaml", files=False)
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
    ],
)
def test_broken_files(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(tmp_path, text=text)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"no configuration file nowhere\.yaml"):
        load_config("nowhere.yaml")


LEAVES = st.sampled_from([doc for doc in field_docs() if doc.kind in ("int", "float", "bool", "str")])
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
    """Any of its keys makes it a section with defaults; null makes it none; both survive the round trip."""
    assert load(tmp_path).critic.layout is None
    critic = load(tmp_path, "critic.layout.dp=2").critic
    assert critic.layout == LayoutConfig(dp=2)
    assert load(tmp_path, "critic.layout.dp=2", "critic.layout=null").critic.layout is None
    (tmp_path / "again.yaml").write_text(config_to_yaml(load(tmp_path, "critic.layout={dp: 2, vpp: null}")))
    assert load_config(tmp_path / "again.yaml", files=False).critic == critic
    assert problems(tmp_path, "critic.layout.ttp=2") == [
        "critic.layout.ttp: no such key; did you mean critic.layout.tp?"
    ]
    assert problems(tmp_path, "critic.layout=2") == ["critic.layout = 2: expected a section of keys, found int"]
    docs = {doc.name: doc for doc in field_docs()}
    assert (docs["critic.layout"].kind, docs["critic.layout"].default) == ("section or null", None)
    assert docs["critic.layout.dp"].doc == docs["actor.layout.dp"].doc


@pytest.mark.parametrize("value", ["1e-5", "0.00001", 1e-5])
def test_numbers_in_strings(value: object) -> None:
    assert coerce(value, float) == 1e-5


def test_large_integers_are_exact() -> None:
    assert coerce(2**60 + 1, int) == 2**60 + 1


def test_every_key_is_documented() -> None:
    docs = {doc.name: doc for doc in field_docs()}
    assert [name for name, doc in docs.items() if not doc.doc] == []
    assert docs["critic.optim.lr"].default == 1e-5
    assert docs["actor.layout.tp"].doc.startswith("Tensor-parallel size")
    assert docs["rollout.threads"].kind == "int or null"

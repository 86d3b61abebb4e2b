"""Where a run starts, and what it refuses to go on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_models import make_tiny_model

from rlhf3d.checkpoints.identity import identity_state, model_identity
from rlhf3d.checkpoints.manifest import Manifest, infos_below, write_manifest
from rlhf3d.checkpoints.resume import Start, check_resume, choose_start, set_aside
from rlhf3d.checkpoints.store import Store
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.load import config_to_yaml
from rlhf3d.config.schema import (
    AlgorithmConfig,
    Config,
    KLCtrlConfig,
    LayoutConfig,
    ModelConfig,
    TrainerConfig,
)
from rlhf3d.models.spec import load_spec

TOTAL = 10
BOTH = ("actor", "critic")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), layers=1, hidden=32, ffn=32)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    return Config(
        model=ModelConfig(str(model), dtype="float32"),
        trainer=TrainerConfig(output_dir=str(tmp_path / "run")),
    )


def add_checkpoint(
    config: Config,
    step: int,
    optimizer: bool = True,
    models: tuple[str, ...] = ("actor", "critic"),
    ahead: bool = False,
) -> Path:
    """`ahead`: whether it holds what was generated ahead."""
    store = Store(Path(config.trainer.output_dir) / "checkpoints")
    partial = store.begin(step)
    state = {"step": step, **identity_state(config, load_spec(config.model.path))}
    (partial / "driver.json").write_text(json.dumps(state))
    (partial / "config.yaml").write_text(config_to_yaml(config))
    (partial / "actor.distcp").write_bytes(b"weights")
    if ahead:
        (partial / "experience").mkdir()
        (partial / "experience" / "queue.json").write_text("{}")
    write_manifest(partial, Manifest(step, step, models, optimizer, files=infos_below(partial, {})))
    return store.publish(step, partial)


def write_rows(config: Config, steps: int) -> None:
    folder = Path(config.trainer.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}}}\n' for step in range(1, steps + 1))
    )


def with_mode(config: Config, mode: str) -> Config:
    return replace(config, trainer=replace(config.trainer, resume_mode=mode))


def outcome(start: Start) -> tuple[str, int | None]:
    """Name of the folder, step resumed from."""
    return start.folder.name, start.checkpoint.manifest.step if start.checkpoint else None


def test_a_users_file_with_other_text_is_told(config: Config, tmp_path: Path) -> None:
    """Whatever the file is for; another file is told as a change of its key alone."""
    game, parser, other = (tmp_path / f"{name}.py" for name in ("game", "parser", "other"))
    for file in (game, parser, other):
        file.write_text("VALUE = 1\n")
    environment = EnvironmentConfig(path=str(game), tool_format=f"{parser}:read")
    config = replace(config, environment=environment)
    add_checkpoint(config, 1)
    found, spec = choose_start(config, TOTAL).checkpoint, load_spec(config.model.path)
    assert found is not None
    assert check_resume(found, config, spec) == []
    parser.write_text("VALUE = 2\n")
    assert check_resume(found, config, spec) == [
        f"environment.tool_format: the text of {parser}:read"
    ]
    game.write_text("VALUE = 2\n")
    assert len(check_resume(found, config, spec)) == 2
    moved = replace(config, environment=replace(environment, path=str(other)))
    told = check_resume(found, moved, spec)
    assert f"environment.path: {game} -> {other}" in told and len(told) == 2
    del found.state["code"]  # as an earlier version wrote it
    assert check_resume(found, config, spec) == []


def test_a_first_run_takes_the_folder(config: Config) -> None:
    assert outcome(choose_start(config, TOTAL)) == ("run", None)


def test_goes_on_in_the_folder_of_an_unfinished_run(config: Config) -> None:
    for step in (2, 4):
        add_checkpoint(config, step)
    write_rows(config, 5)
    assert outcome(choose_start(config, TOTAL)) == ("run", 4)
    assert outcome(choose_start(with_mode(config, "never"), TOTAL)) == ("run-2", None)
    add_checkpoint(config, TOTAL)
    write_rows(config, TOTAL)
    start = choose_start(config, TOTAL)
    assert outcome(start) == ("run-2", None) and start.finished is None, "that run is finished"
    assert "run is finished, with another configuration" in start.notes[-1]
    (Path(config.trainer.output_dir) / "config.yaml").write_text(config_to_yaml(config))
    assert choose_start(config, TOTAL).finished == Path(config.trainer.output_dir), (
        "and with the same there is no other"
    )
    other = replace(config, trainer=replace(config.trainer, seed=1))
    assert choose_start(other, TOTAL).finished is None
    assert choose_start(with_mode(config, "never"), TOTAL).finished is None
    assert outcome(choose_start(config, TOTAL + 5)) == ("run", TOTAL), "and is not with more steps"


def test_a_run_killed_in_its_last_save_is_not_finished(config: Config) -> None:
    add_checkpoint(config, 8)
    write_rows(config, TOTAL)
    assert outcome(choose_start(config, TOTAL)) == ("run", 8)
    without = replace(config, trainer=replace(config.trainer, save_at_end=False))
    assert outcome(choose_start(without, TOTAL)) == ("run-2", None)


def test_without_a_checkpoint_a_run_starts_beside(config: Config) -> None:
    write_rows(config, 3)
    start = choose_start(config, TOTAL)
    assert outcome(start) == ("run-2", None) and "run has no complete checkpoint" in start.notes[-1]
    later = replace(config, trainer=replace(config.trainer, output_dir=str(start.folder)))
    add_checkpoint(later, 2)
    write_rows(later, 2)
    assert outcome(choose_start(config, TOTAL)) == ("run-2", 2), (
        "the newest of these folders counts"
    )


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "manifest"])
def test_falls_back_to_the_newest_complete_one(damage: str, config: Config) -> None:
    add_checkpoint(config, 2)
    newest = add_checkpoint(config, 4)
    file = newest / ("manifest.json" if damage == "manifest" else "actor.distcp")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"short": b"weight", "changed": b"Weights", "manifest": b"{"}[damage])
    write_rows(config, 5)
    start = choose_start(config, TOTAL)
    assert outcome(start) == ("run", 2)
    assert start.notes[0].startswith(f"checkpoint {newest} is not used: {file} ")
    with pytest.raises(ValueError, match=str(file)):
        choose_start(with_mode(config, str(newest)), TOTAL)


def test_from_a_given_checkpoint(config: Config, tmp_path: Path) -> None:
    older = add_checkpoint(config, 2)
    add_checkpoint(config, 4)
    write_rows(config, 5)
    assert outcome(choose_start(with_mode(config, str(older)), TOTAL)) == ("run", 2)
    elsewhere = replace(config, trainer=replace(config.trainer, output_dir=str(tmp_path / "other")))
    assert outcome(choose_start(with_mode(elsewhere, str(older)), TOTAL)) == ("other", 2)
    assert outcome(choose_start(with_mode(elsewhere, str(tmp_path / "run")), TOTAL)) == ("other", 4)
    with pytest.raises(ValueError, match="not a checkpoint"):
        choose_start(with_mode(config, str(tmp_path / "nothing")), TOTAL)


def test_a_model_alone_is_no_run(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    folder.mkdir()
    write_manifest(folder, Manifest(0, 0, ("actor",), False))
    with pytest.raises(
        ValueError, match=r"has no driver\.json and no config\.yaml: it holds a model"
    ):
        choose_start(with_mode(config, str(folder)), TOTAL)


def test_later_checkpoints_are_set_aside(config: Config) -> None:
    for step in (2, 4, 6):
        add_checkpoint(config, step)
    store = Store(Path(config.trainer.output_dir) / "checkpoints")
    assert set_aside(store, 2) == ["step_4.aside", "step_6.aside"] and store.steps() == [2]
    add_checkpoint(config, 4)
    assert set_aside(store, 2) == ["step_4.aside-2"] and store.clean() == []


def refusal(
    config: Config,
    saved: Config,
    optimizer: bool = True,
    models: tuple[str, ...] = ("actor", "critic"),
) -> str:
    add_checkpoint(saved, 3, optimizer, models, ahead=True)
    found = choose_start(saved, TOTAL).checkpoint
    assert found is not None
    with pytest.raises(ValueError, match="cannot resume from") as error:
        check_resume(found, config, load_spec(config.model.path))
    assert "trainer.resume_mode=never starts a new run" in str(error.value)
    return str(error.value)


def test_says_what_changed(config: Config) -> None:
    add_checkpoint(config, 3)
    found = choose_start(config, TOTAL).checkpoint
    assert found is not None
    optim = replace(config.actor.optim, lr=1e-3)
    changed = replace(config, actor=replace(config.actor, optim=optim, layout=LayoutConfig(tp=2)))
    spec = load_spec(config.model.path)
    assert check_resume(found, config, spec) == []
    assert check_resume(found, changed, spec) == [
        "actor.layout.tp: 1 -> 2",
        "actor.optim.lr: 1e-06 -> 0.001",
    ]


def test_refuses_another_model(config: Config, tmp_path: Path) -> None:
    deeper = make_tiny_model(tmp_path / "deeper", layers=2, hidden=32, ffn=32)
    text = refusal(replace(config, model=ModelConfig(str(deeper), dtype="float32")), config)
    assert "is a model of another shape (num_layers 1 -> 2)" in text
    other = make_tiny_model(tmp_path / "other", layers=1, hidden=32, ffn=32, seed=1)
    assert "holds other weights" in refusal(
        replace(config, model=ModelConfig(str(other), dtype="float32")), config
    )
    moved = make_tiny_model(tmp_path / "moved", layers=1, hidden=32, ffn=32)
    assert model_identity(moved) == model_identity(config.model.path)


def test_refuses_what_was_not_saved(config: Config) -> None:
    grpo = replace(config, algorithm=AlgorithmConfig(adv_estimator="grpo"))
    text = refusal(config, grpo, models=("actor",))
    assert (
        "adv_estimator = gae trains a critic, which the checkpoint does not hold (it was grpo)"
        in text
    )
    assert "trainer.resume_fresh_optimizer=true" in refusal(config, config, optimizer=False)
    fresh = replace(config, trainer=replace(config.trainer, resume_fresh_optimizer=True))
    found = choose_start(config, TOTAL).checkpoint
    assert found is not None
    assert check_resume(found, fresh, load_spec(config.model.path)) == [
        "trainer.resume_fresh_optimizer: False -> True"
    ]


def test_refuses_another_kl_controller(config: Config) -> None:
    adaptive = replace(
        config, algorithm=replace(config.algorithm, kl_ctrl=KLCtrlConfig(type="adaptive"))
    )
    assert (
        "kl_ctrl.type = adaptive, the checkpoint holds the state of a fixed controller"
        in refusal(adaptive, config)
    )


def test_refuses_another_dtype(config: Config) -> None:
    half = replace(config, model=replace(config.model, dtype="bfloat16"))
    assert "set model.dtype=float32" in refusal(half, config)


def stale(config: Config, versions: int, update: str = "between_batches") -> Config:
    rollout = replace(config.rollout, max_staleness=versions, update=update)  # type: ignore[arg-type]
    return replace(config, rollout=rollout)


def test_refuses_a_bound_that_what_was_generated_ahead_breaks(config: Config) -> None:
    text = refusal(stale(config, 1), stale(config, 2))
    assert "rollout.max_staleness = 1" in text and "set 2 or more" in text
    text = refusal(stale(config, 2, "in_flight"), stale(config, 2))
    assert "set rollout.update=between_batches" in text
    before = config.data.train_batch_size
    other = replace(config, data=replace(config.data, train_batch_size=2 * before))
    assert f"set data.train_batch_size={before}" in refusal(stale(other, 2), stale(config, 2))
    greedy = replace(config, algorithm=replace(config.algorithm, adv_estimator="remax"))
    assert "set algorithm.adv_estimator=" in refusal(stale(greedy, 2), stale(config, 2))


def test_a_bound_may_grow_and_where_nothing_waits_also_shrink(config: Config) -> None:
    spec = load_spec(config.model.path)
    in_flight = stale(config, 2, "in_flight")
    other = replace(config, data=replace(config.data, train_batch_size=2))
    for step, (saved, now, ahead) in enumerate(
        [
            (stale(config, 2), stale(config, 3), True),
            (config, stale(config, 1, "in_flight"), False),
            (in_flight, stale(config, 1, "in_flight"), False),
            (stale(config, 2), stale(other, 1, "in_flight"), False),
        ],
        1,
    ):
        add_checkpoint(saved, step, ahead=ahead)
        found = choose_start(saved, TOTAL).checkpoint
        assert found is not None
        changes = check_resume(found, now, spec)
        assert any(change.startswith("rollout.max_staleness: ") for change in changes)

"""The complete command on a tiny model: it learns, in any layout, and goes on exactly.

Two runs of one job are looked at by all tests: in one the models share their ranks and the engines'
places, in the other each has its own. The resumed run loses engines on its way: where requests are
lost, and where senders wait for the engine that dies. `test_engine_restarts.py` has more deaths.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import (
    left_behind,
    read_rows,
    saved_steps,
    stop_at,
    train,
    train_with_deaths,
    write_job,
)
from support.same_run import assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf3d.checkpoints.manifest import problems, read_manifest
from rlhf3d.observability.profile.intervals import length, union
from rlhf3d.observability.profile.spans import Span
from rlhf3d.observability.profile.timeline import profiled_steps, read_timeline
from rlhf3d.observability.profile.words import in_words
from rlhf3d.observability.tokens import read_tokens, token_steps, tokens_path
from rlhf3d.rehearsal.miniature import CHAT_TEMPLATE
from rlhf3d.units import NS

STEPS, SAVED, PROFILED = 12, 8, 3
JOB = (
    f"trainer.total_training_steps={STEPS}",
    "actor.optim.lr_decay_style=linear",  # so that a resumed run needs the schedule's position
    "actor.optim.lr_warmup_steps=2",
    "algorithm.kl_ctrl.type=adaptive",
    f"trainer.save_freq={SAVED}",
    "cluster.threads_per_rank=1",
)
TOLD = ("forward", "backward", "wait", "collective", "optimizer")
LAYOUTS = {
    "dp2": (
        "actor.layout.dp=2",
        "actor.ppo_micro_batch_size_per_gpu=16",
        "rollout.engines=2",
        "rollout.sleep=true",
        # Some completions are answered while others are being written.
        "rollout.max_num_seqs=16",
    ),
    "tp2pp2": (
        "actor.layout.tp=2",
        "actor.layout.pp=2",
        "actor.ppo_micro_batch_size_per_gpu=8",
        "rollout.placement=disaggregated",
        "critic.layout.dp=2",
        "critic.ppo_micro_batch_size_per_gpu=8",
        f"trainer.profile_steps=[{PROFILED}]",
    ),
}


def write_own_template(folder: Path) -> Path:
    """The miniature models' template with a comment."""
    path = folder / "own.jinja"
    path.write_text(CHAT_TEMPLATE + "{# own #}")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The job with all models on two ranks; and on TP2 x PP2, with a dedicated critic."""
    done = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        config = write_job(folder)
        own: tuple[str, ...] = ()
        if name == "tp2pp2":  # the same text, so the same curve
            own = (f"model.chat_template={write_own_template(folder)}",)
        finished = train(config, *JOB, *layout, *own)
        assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
        assert f"step {STEPS}/{STEPS}" in finished.stdout
        done[name] = folder / "run"
    return done


@pytest.mark.timeout(900)
def test_learns_in_both_layouts_with_the_same_curve(runs: dict[str, Path]) -> None:
    curves = {
        name: [row["critic/score/mean"] for row in read_rows(run)[1:]] for name, run in runs.items()
    }
    for name, curve in curves.items():
        print(f"LEARNING {name}: first {curve[0]:.3f} last {curve[-1]:.3f}")
        assert curve[0] < 0.4
        assert curve[-1] > 0.9
    assert curves["dp2"] == pytest.approx(curves["tp2pp2"], abs=1e-6)
    for first, second in zip(*(read_rows(run)[1:] for run in runs.values()), strict=True):
        for metric in ("actor/pg_loss", "critic/vf_loss", "actor/grad_norm"):
            assert first[metric] == pytest.approx(second[metric], rel=2e-3, abs=1e-5)


def test_engine_and_trainer_agree(runs: dict[str, Path]) -> None:
    for run in runs.values():
        rows = read_rows(run)
        assert max(row["training/rollout_logprobs_diff_max"] for row in rows[1:]) < 1e-3
        assert rows[0]["sync/canary_abs_diff"] < 1e-4
        assert token_steps(run) == list(range(1, STEPS + 1))
        for step in (1, STEPS):
            kept = read_tokens(tokens_path(run, step))
            assert len(kept) == 8
            for one in kept:
                assert [span.author for span in one.spans] == ["prompt", "sampled"]
                assert one.spans[1].versions == ((0, step - 1),)
                assert len(one.differences) == one.tokens_of("sampled")
                assert one.largest_difference < 1e-3


def test_a_profiled_step_holds_what_every_process_did(runs: dict[str, Path]) -> None:
    """On one clock, nested, with every pass of the update and every request to its end."""
    run = runs["tp2pp2"]
    assert profiled_steps(run) == [PROFILED]
    timeline = read_timeline(run, PROFILED)
    lanes = {lane.process.name: lane.record for lane in timeline.lanes}
    actors = [f"actor tp{tp} pp{pp} dp0" for tp in (0, 1) for pp in (0, 1)]
    critics = ["critic tp0 pp0 dp0", "critic tp0 pp0 dp1"]
    assert list(lanes) == ["driver", *actors, *critics, "engine 0"]
    for record in lanes.values():
        assert record.spans
        assert_nested(record.spans, timeline.ended)
    phases = {one.name: one for one in lanes["driver"].spans}
    row = read_rows(run)[PROFILED]
    assert {"sync_weights", "generate", "values", "update_actor"} <= phases.keys()
    for name in phases:
        taken = sum(one.ended - one.began for one in lanes["driver"].spans if one.name == name)
        assert taken > 0
        assert taken / NS == pytest.approx(row[f"timing_s/{name}"], rel=0.05, abs=0.25)
    for name in actors:
        (call,) = (one for one in lanes[name].spans if one.name == "update_actor")
        assert phases["update_actor"].began <= call.began <= call.ended
        assert call.ended <= phases["update_actor"].ended
        inside = [one for one in lanes[name].spans if call.began <= one.began < call.ended]
        # Two mini-batches of 32 sequences, in micro-batches of 8.
        for kind in ("forward", "backward"):
            passes = [one.details["micro_batch"] for one in inside if one.kind == kind]
            assert passes == [0, 1, 2, 3] * 2
        assert any(one.kind == "wait" for one in inside)
        told = union((one.began, one.ended) for one in inside if one.kind in TOLD)
        assert 0.6 < length(told) / (call.ended - call.began) <= 1
    assert len(lanes["engine 0"].requests) == 64
    for life in lanes["engine 0"].requests:
        assert life.first_token is not None and life.ended is not None and not life.aborted
        assert 0 <= life.submitted <= life.first_token <= life.ended <= timeline.ended
        assert 1 <= life.tokens <= 4
    words = " ".join(in_words(timeline))
    assert "stage 0 waits for other stages" in words
    assert "a pipeline of 2 stages and 4 micro-batches idles 20 % of an update" in words


def assert_nested(spans: Sequence[Span], end: int) -> None:
    """None ends before it begins, or after the one it is in."""
    around: list[Span] = []
    for one in spans:
        assert 0 <= one.began <= one.ended <= end, one
        while around and around[-1].ended <= one.began:
            around.pop()
        assert not around or one.ended <= around[-1].ended, (around[-1], one)
        around.append(one)


def test_leaves_a_report_a_checkpoint_and_no_process(runs: dict[str, Path]) -> None:
    for run in runs.values():
        assert (
            (run / "report.html").is_file()
            and (run / "report.md").is_file()
            and (run / "curves.png").stat().st_size > 10_000
        )
        checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
        manifest = read_manifest(checkpoint)
        assert manifest.step == STEPS and problems(checkpoint, manifest) == []
        assert {name.split("/")[0] for name in manifest.files} > {"actor", "critic", "hf"}
    assert left_behind() == set()


def test_weights_do_not_depend_on_the_layout(runs: dict[str, Path]) -> None:
    """After steps that move them by up to 0.09, with a dedicated critic in one of the runs."""
    first, second = (
        load_file(run / f"checkpoints/step_{STEPS}/hf/model.safetensors") for run in runs.values()
    )
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-3


def test_exported_model_has_learned(runs: dict[str, Path]) -> None:
    folder = runs["tp2pp2"] / "checkpoints" / f"step_{STEPS}" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE + "{# own #}"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "word 1"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        p = model(torch.tensor([list(ids)])).logits[0, -1].softmax(-1)
    letters = [i for i in range(len(p)) if tokenizer.decode([i]).islower()]
    assert float(p[letters].sum()) > 0.8


# Phase, which one of them, engine, rank. The first sync is the run's own, the second what the death
# in `generate` takes.
DEATHS = ("generate:1:1:0", "sync_weights:3:1:0")


def copy_without_the_end(run: Path, again: Path) -> None:
    """Copy what a kill between the last step and its checkpoint leaves."""
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / f"step_{STEPS}")
    (again / "checkpoints" / "latest").write_text(f"step_{SAVED}")


def train_and_kill(run: Path, again: Path) -> None:
    """The same job, killed after steps that no checkpoint has."""
    settings = (*JOB, *LAYOUTS["dp2"], f"trainer.output_dir={again}")
    job = run.parent / "job.yaml"
    code, text = stop_at(job, SAVED + 2, lambda process: process.kill(), *settings)
    assert code == -signal.SIGKILL, text
    assert read_rows(again)[-1]["step"] > SAVED


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "interrupt",
    [copy_without_the_end, pytest.param(train_and_kill, marks=pytest.mark.full)],
    ids=["copied", "killed"],
)
def test_resumed_with_engines_that_die_is_the_same_run_to_the_bit(
    interrupt: Any, runs: dict[str, Path]
) -> None:
    whole = runs["dp2"]
    run = whole.with_name(interrupt.__name__)
    interrupt(whole, run)
    background = ("trainer.async_save=true", "trainer.save_freq=2", "trainer.keep_last=2")
    settings = (*JOB, *LAYOUTS["dp2"], f"trainer.output_dir={run}", *background)
    restarts = f"rollout.engine_restarts={len(DEATHS)}"
    resumed = train_with_deaths(whole.parent / "job.yaml", ",".join(DEATHS), *settings, restarts)
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-4000:]
    assert f"resume from step {SAVED}: {run}/checkpoints/step_{SAVED}" in resumed.stdout
    assert "trainer.async_save: False -> True" in resumed.stdout
    assert saved_steps(run) == [STEPS - 2, STEPS]
    for number, moment in enumerate(DEATHS, 1):
        assert f"kill {moment}" in resumed.stdout
        assert f"({number} of {restarts})" in resumed.stdout
    rows = read_rows(run)
    assert rows[-1]["rollout/engine_restarts"] == len(DEATHS)

    assert_same(run, whole)
    manifest = read_manifest(run / "checkpoints" / f"step_{STEPS}")
    assert {name.split("/")[0] for name in manifest.files} >= {"actor", "critic", "hf"}
    assert manifest.policy_version == STEPS
    first = next(row for row in rows if row["step"] == SAVED + 1)
    assert first["sync/canary_abs_diff"] < 1e-4
    # The first row has its step's seconds, and not those in which engines and models started.
    phases = [first[name] for name in first if name.startswith("timing_s/")]
    assert 2 * first["timing_s/step"] - sum(phases) < 5

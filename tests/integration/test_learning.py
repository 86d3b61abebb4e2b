"""The whole command on a tiny model: it learns, the layout does not matter, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from support.jobs import MARK, MARKED, STEPS, read_rows, train, write_job
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf3d.checkpoints.manifest import problems, read_manifest
from rlhf3d.resharding.setup import FILE_PREFIX

SHM = Path("/dev/shm")
OWN_ALGORITHM = '''
from rlhf3d.algorithms.advantages import register_advantage
from rlhf3d.algorithms.losses import PolicyLossTerms, register_policy_loss


@register_advantage("centred")
def centred(inputs):
    """Score less the mean score of the batch, on every token."""
    scores = inputs.token_level_rewards.sum(-1, keepdim=True)
    advantages = inputs.custom["scale"] * (scores - scores.mean()).expand_as(inputs.response_mask)
    return advantages, advantages


@register_policy_loss("squared_clip")
def squared_clip(logprobs, old_logprobs, advantages, response_mask, settings):
    """Plain policy gradient, with a squared penalty instead of a clip."""
    log_ratio = logprobs - old_logprobs
    loss = -advantages * log_ratio.exp() + settings.custom["penalty"] * log_ratio.square()
    return PolicyLossTerms(loss, {"ppo_kl": -log_ratio})
'''


def left_behind() -> set[str]:
    """Processes that inherited these tests' mark, and shared files of runs whose driver has gone."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(os.getpid()):
                found.add(f"{process.name()} {process.pid}")
    files = {
        path.name: path.name.removeprefix(FILE_PREFIX).split("-")[0]
        for path in SHM.glob(f"{FILE_PREFIX}*")
    }
    return found | {
        name
        for name, driver in files.items()
        if driver.isdigit() and not psutil.pid_exists(int(driver))
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same job on one training rank beside its engine, and on TP2 x PP2 with two engines and the critic apart."""
    done = {}
    critic = ("critic.layout.dp=2", "critic.ppo_micro_batch_size_per_gpu=8")
    apart = ("rollout.placement=disaggregated", "rollout.engines=2", *critic)
    for name, layout in (
        ("tp1", ()),
        ("tp2pp2", ("actor.layout.tp=2", "actor.layout.pp=2", *apart)),
    ):
        folder = tmp_path_factory.mktemp(name)
        finished = train(write_job(folder), *layout, "cluster.threads_per_rank=1")
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
    assert curves["tp1"] == pytest.approx(curves["tp2pp2"], abs=1e-6)
    for first, second in zip(*(read_rows(run)[1:] for run in runs.values()), strict=True):
        for metric in ("actor/pg_loss", "critic/vf_loss", "actor/grad_norm"):
            assert first[metric] == pytest.approx(second[metric], rel=2e-3, abs=1e-5)


def test_engine_and_trainer_agree(runs: dict[str, Path]) -> None:
    for run in runs.values():
        rows = read_rows(run)
        assert max(row["training/rollout_logprobs_diff_max"] for row in rows[1:]) < 1e-3
        assert rows[0]["sync/canary_abs_diff"] < 1e-4


def test_leaves_a_report_a_checkpoint_and_no_process(runs: dict[str, Path]) -> None:
    for run in runs.values():
        assert (run / "report.md").is_file() and (run / "curves.png").stat().st_size > 10_000
        checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
        manifest = read_manifest(checkpoint)
        assert manifest.step == STEPS and problems(checkpoint, manifest) == []
        assert {name.split("/")[0] for name in manifest.files} > {"actor", "critic", "hf"}
    assert left_behind() == set()


def test_mixture_of_experts_runs_whole(tmp_path: Path) -> None:
    """Experts over two ranks in training, which share out each sequence; each expert cut over two ranks in vLLM."""
    job = write_job(tmp_path, "qwen3_moe")
    layout = ("actor.layout.cp=2", "actor.layout.ep=2", "actor.ppo_micro_batch_size_per_gpu=16")
    finished = train(
        job, *layout, "rollout.tensor_parallel_size=2", "trainer.total_training_steps=2"
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    rows = read_rows(tmp_path / "run")
    assert max(row["sync/canary_abs_diff"] for row in rows if "sync/canary_abs_diff" in row) < 1e-4
    assert max(row["training/rollout_logprobs_diff_max"] for row in rows[1:]) < 1e-3


def test_weights_do_not_depend_on_the_layout(runs: dict[str, Path]) -> None:
    """After 30 steps that move them by up to 0.09, and with the critic in a group of its own in one of the runs."""
    first, second = (
        load_file(run / f"checkpoints/step_{STEPS}/hf/model.safetensors") for run in runs.values()
    )
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-3


def test_exported_model_has_learned(runs: dict[str, Path]) -> None:
    folder = runs["tp2pp2"] / "checkpoints" / f"step_{STEPS}" / "hf"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "word 1"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        p = model(torch.tensor([list(ids)])).logits[0, -1].softmax(-1)
    letters = [i for i in range(len(p)) if tokenizer.decode([i]).islower()]
    assert float(p[letters].sum()) > 0.8


def test_own_algorithm_with_dynamic_sampling_on_two_ranks(tmp_path: Path) -> None:
    """A user's estimator and loss, groups refilled, truncated importance weights, on PP2."""
    job = write_job(
        tmp_path, algorithm={"adv_estimator": "centred", "custom_path": str(tmp_path / "own.py")}
    )
    (tmp_path / "own.py").write_text(OWN_ALGORITHM)
    sizes = (
        "data.train_batch_size=16",
        "data.gen_batch_size=20",
        "actor.ppo_mini_batch_size=8",
        "rollout.n=4",
    )
    chosen = (
        "actor.policy_loss=squared_clip",
        "algorithm.custom_kwargs={scale: 3.0, penalty: 0.5}",
    )
    more = ("algorithm.filter_groups.enable=true", "algorithm.rollout_correction.rollout_is=token")
    place = ("actor.layout.pp=2", "cluster.threads_per_rank=1", "trainer.save_at_end=false")
    finished = train(job, *sizes, *chosen, *more, *place, "trainer.total_training_steps=10")
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    rows = read_rows(tmp_path / "run")[1:]
    assert (
        rows[0]["critic/score/mean"] < 0.4 and rows[-1]["filter_groups/generated_score/mean"] > 0.7
    )
    for row in rows:
        assert row["reward/mixed_groups_share"] == 1 and row["train/num_gen_batches"] >= 1
        assert row["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1, abs=1e-4)
    misspelt = train(job, *sizes, "algorithm.adv_estimator=centered")
    assert misspelt.returncode == 2 and "did you mean centred?" in misspelt.stderr


def test_failing_reward_function_ends_in_one_screen(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1 / 0\n"
    )
    failed = train(job, "trainer.val_before_train=false")
    assert failed.returncode == 1
    for wanted in (
        "ZeroDivisionError",
        "reward.max_error_rate",
        "4 of 64 completions were not scored",
    ):
        assert wanted in failed.stderr
    assert len(failed.stderr.splitlines()) < 50
    assert left_behind() == set()


def test_interrupt_ends_everything(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    command = [
        str(Path(sys.executable).with_name("rlhf3d")),
        "train",
        str(job),
        "trainer.total_training_steps=10000",
    ]
    listening = partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # background jobs are made deaf to it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=MARKED, preexec_fn=listening, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert "interrupted" in process.stderr.read()
    assert left_behind() == set()

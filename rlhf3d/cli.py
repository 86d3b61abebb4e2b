"""The `rlhf3d` command.

Invariant: exit codes are 0 done, 1 the run failed, 2 the user's configuration or arguments, 75 stopped after a
checkpoint (the same command goes on), 130 interrupted; a user's mistake ends in one screen of plain text, never in a
traceback. Imports nothing heavy before a command needs it.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlhf3d.launch.command import launch
from rlhf3d.options import Commands, refuse_unused, scorers_of
from rlhf3d.paths import check_output
from rlhf3d.rehearsal.shrink import MAX_RANKS
from rlhf3d.terminal import Terminal, tell, write_what_can_be_encoded

if TYPE_CHECKING:
    from rlhf3d.trainer.stopping import Stopping

app = Commands(
    name="rlhf3d",
    help="PPO for language models with 3D-parallel training, vLLM rollouts and in-memory resharding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = Commands(help="Data sets as parquet files of prompts.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.command()(launch)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as actor.optim.lr=1e-5."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line; what the user got wrong is told on stderr with exit code 2, what failed with 1."""
    write_what_can_be_encoded()
    try:
        app()
    except (ValueError, RuntimeError) as error:
        if not _raised_by_us(error):
            raise
        tell(str(error))
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except OSError as error:
        if error.filename is None:
            raise
        tell(f"{error.filename}: {error.strerror}")
        sys.exit(1)


def _raised_by_us(error: Exception) -> bool:
    """Whether a `raise` of this package made the error, not a library below it and not a mistake in our own code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parent) and (
        last.line or ""
    ).startswith("raise")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; `rlhf3d config` lists the keys.")],
    overrides: Overrides = None,
) -> None:
    """Train: check the configuration and this machine, then run the loop."""
    from rlhf3d.trainer.stopping import PREEMPTED, Preempted, Stopping

    stopping = Stopping.of_this_process()
    with stopping.handling_signals():  # before anything that takes long, imports among it
        try:
            code = _train(config, overrides or [], stopping)
        except Preempted:
            tell("stopped by a signal before the first step: the same command begins again")
            code = PREEMPTED
        except KeyboardInterrupt:
            tell("interrupted: every process of the run has ended, what it wrote stays")
            code = 130
        except (
            SystemExit
        ) as error:  # of a user's code, such as an estimator: nothing of ours raises it
            tell(f"the run failed: code that it called ended the process with {error.code!r}")
            code = 1
        except RuntimeError as error:
            if stopping.signal is None or not _raised_by_us(error):
                raise
            # The signal may have ended others too: workers of a cluster, or what the step was waiting for.
            tell(f"{error}\n{stopping.signal} had come before: the same command goes on")
            code = PREEMPTED
    raise typer.Exit(code)


def _train(config: Path, overrides: list[str], stopping: Stopping) -> int:
    from rlhf3d.config.load import ConfigError, load_config
    from rlhf3d.planning.view import show_memory
    from rlhf3d.preflight import preflight

    loaded = load_config(config, overrides, files=False)
    if problems := preflight(loaded, show=show_memory):
        raise ConfigError(problems, f"This machine cannot run {config} as it stands")
    from rlhf3d.trainer.run import run_training

    return run_training(loaded, stopping)


@app.command("config")
def show_config(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file to resolve; without it, all keys.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """List every configuration key with default and meaning, or print a CONFIG as a run would see it."""
    import yaml

    from rlhf3d.config.derived import derive, summary_lines
    from rlhf3d.config.docs import field_docs
    from rlhf3d.config.load import config_to_yaml, load_config

    if config is None:
        for item in field_docs():
            default = (
                yaml.safe_dump(item.default, default_flow_style=True).removesuffix("...\n").strip()
            )
            typer.echo(f"{item.name} = {default}  ({item.kind})\n    {item.doc}")
        return
    loaded = load_config(config, overrides or [], files=False)
    typer.echo(config_to_yaml(loaded), nl=False)
    for line in summary_lines(loaded, derive(loaded)):
        typer.echo(f"# {line}")


@app.command()
def reshard(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a run; of the model only config.json is read.")
    ],
    overrides: Overrides = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the plan (the default; nothing is started).")
    ] = True,
    gpus: Annotated[
        bool, typer.Option("--gpus", help="Plan for GPUs, one a training rank, whatever is here.")
    ] = False,
    tensor: Annotated[
        str | None, typer.Option(help="Print the routes of these tensors; * stands for any text.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a run moves its weights from training ranks into vLLM: bytes a rank, lower bound, routes."""
    import json

    from rlhf3d.config.load import load_config
    from rlhf3d.resharding.explain import as_json as to_json
    from rlhf3d.resharding.explain import render, setup_of

    loaded = load_config(config, overrides or [], files=False)
    setup = setup_of(loaded, gpus)
    if as_json:
        typer.echo(json.dumps(to_json(setup, tensor)))
    else:
        Terminal(soft_wrap=False).print(render(setup, loaded.model.path, tensor))


@app.command()
def plan(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(help="YAML file of a run; of the model only config.json is read.")
    ],
    overrides: Overrides = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="Devices, such as 8xH100; default those of the configuration."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Look for the fastest layout that fits.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="With --search: write the best as YAML.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="A config.json, or its folder, instead of model.path.")
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="YAML file with hardware of your own.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="Numbers measured on this GPU; default runs/gpu_measured.json, if it is there."
        ),
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean prompt; default half the longest.")
    ] = None,
    response_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean completion; default half the longest.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Training prompts; default all of data.train_files.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 2 where the run does not fit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Memory of a run by rank and phase, and its time, before it starts and without GPUs or weights."""
    from rlhf3d.config.load import load_config
    from rlhf3d.planning.command import plan_command
    from rlhf3d.planning.job import Lengths

    if not search:
        refuse_unused(context, ["write"], "it is for what --search finds; give --search as well")
    if gpus is None:
        refuse_unused(context, ["hardware"], "--gpus names what in it to plan for")
    check_output("--write", write, is_file=True)
    loaded = load_config(config, overrides or [], files=False)
    longest = loaded.data.max_prompt_length, loaded.data.max_response_length
    for option, mean, most in zip(
        ("--prompt-tokens", "--response-tokens"),
        (prompt_tokens, response_tokens),
        longest,
        strict=True,
    ):
        if mean is not None and mean > most:
            raise ValueError(
                f"{option} {mean:g}: a mean above the longest that the configuration allows, {most}"
            )
    lengths = Lengths(prompt_tokens or longest[0] / 2, response_tokens or longest[1] / 2)
    fits = plan_command(
        loaded, gpus, hardware, measured, model_config, lengths, rows, search, write, as_json
    )
    raise typer.Exit(2 if check and not fits else 0)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[
        str,
        typer.Argument(help="arithmetic, gsm8k, limr, math, math500, or a file with make_map_fn."),
    ],
    source: Annotated[
        str | None, typer.Option(help="Folder or file of the data set, or hub.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; default data/NAME.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train or test, where the file's name does not say it.")
    ] = None,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="Leave out the questions of this parquet file.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of generated data.")] = None,
    train_size: Annotated[
        int | None, typer.Option(min=1, help="Training rows to generate.")
    ] = None,
    test_size: Annotated[int | None, typer.Option(min=0, help="Held-out rows to generate.")] = None,
    difficulty: Annotated[str | None, typer.Option(help="Difficulty of generated data.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Text appended to every question.")] = None,
) -> None:
    """Write a data set as train.parquet and test.parquet."""
    from rlhf3d.data.prepare import prepare

    options: dict[str, Any] = {
        "seed": seed,
        "train_size": train_size,
        "test_size": test_size,
        "difficulty": difficulty,
        "suffix": suffix,
    }
    given = {key: value for key, value in options.items() if value is not None}
    folder = output or Path("data") / Path(name).stem
    check_output("--output", folder)
    name, source = os.path.expanduser(name), source and os.path.expanduser(source)
    files = prepare(
        name, source, folder, split=split, exclude=exclude or (), revision=revision, **given
    )
    for written in files:
        typer.echo(
            f"{written.path}: {written.rows} rows, {written.dropped} dropped, sha256 {written.sha256[:12]}"
        )
        for reason, count in written.reasons.most_common():
            typer.echo(f"  {count} dropped: {reason}")
    for note in dict.fromkeys(note for written in files for note in written.notes):
        typer.echo(f"note: {note}", err=True)


@data_app.command("check")
def data_check(
    context: typer.Context,
    files: Annotated[
        list[Path], typer.Argument(help="Parquet files of prompts, also compared with each other.")
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Model folder whose chat template is applied.")
    ] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt, tokens.")
    ] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="DATA_SOURCE=SCORER, as reward.scorers.")
    ] = None,
    reward: Annotated[
        Path | None, typer.Option(help="Python file with compute_score, instead of the scorers.")
    ] = None,
    method: Annotated[
        Literal["strict", "flexible"], typer.Option(help="As reward.method.")
    ] = "strict",
    workers: Annotated[int, typer.Option(min=1, help="Scoring processes.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check prompt files as a run would meet them: rows, lengths, duplicates, overlap, and the scorer on the truth."""
    import json

    from rlhf3d.data.check import check_files
    from rlhf3d.data.check_view import render
    from rlhf3d.rewards.custom import load_custom_reward

    loaded = None
    if tokenizer is not None:
        from rlhf3d.data.tokenizer import load_tokenizer

        loaded = load_tokenizer(os.path.expanduser(tokenizer))
    else:
        refuse_unused(context, ["max_prompt_length"], "prompts have lengths by a --tokenizer")
    if reward is not None:
        refuse_unused(context, ["scorer", "method"], "--reward scores instead")
    custom = load_custom_reward(reward) if reward else None
    scorers = scorers_of(scorer)
    checked = check_files(files, loaded, max_prompt_length, custom, scorers, method, workers)
    if as_json:
        typer.echo(json.dumps(checked.to_json()))
    else:
        Terminal().print(render(checked))
    raise typer.Exit(2 if checked.problems else 0)


@app.command()
def rehearse(
    config: Annotated[Path, typer.Argument(help="The job's YAML file.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder, made anew; default rehearsals/CONFIG.")
    ] = None,
    max_ranks: Annotated[
        int, typer.Option(min=1, help="At most so many training processes.")
    ] = MAX_RANKS,
    model_config: Annotated[
        Path | None, typer.Option(help="Folder with config.json, if not model.path.")
    ] = None,
    as_gpu: Annotated[
        bool,
        typer.Option(
            "--as-gpu", help="One device a rank, and the order and rules of GPUs and NCCL."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the miniature, do not run it.")
    ] = False,
) -> None:
    """Run a job in miniature on CPU: same layouts and code path, two steps, saved and resumed.

    On this machine, or with cluster.ray_address=… over the cluster.num_nodes of a Ray cluster. Where the first run was
    interrupted the same command goes on from its checkpoint; with trainer.resume_mode=never it begins anew.
    """
    from rlhf3d.rehearsal.run import prepare
    from rlhf3d.rehearsal.run import rehearse as run

    folder = output or Path("rehearsals") / config.stem
    check_output("--output", folder)
    if not (folder / "job.yaml").is_file() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that are no rehearsal: name another --output")
    miniature = prepare(config, overrides or [], folder, max_ranks, model_config, as_gpu)
    typer.echo(f"miniature  {miniature.summary}")
    for note in miniature.notes:
        typer.echo(f"otherwise  {note}")
    if dry_run:
        typer.echo(f"written to {miniature.config}")
        return
    run(miniature, typer.echo)
    typer.echo(f"rehearsed  {config}: two steps, saved, resumed and repeated exactly")


@app.command()
def evaluate(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(help="Hugging Face folder, checkpoint (checkpoints/step_N) or run.")
    ],
    data: Annotated[list[Path], typer.Argument(help="Parquet files of prompts.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; default evaluations/MODEL-DATA.")
    ] = None,
    greedy: Annotated[bool, typer.Option(help="Evaluate greedy decoding.")] = True,
    n: Annotated[int, typer.Option(min=0, help="Also sample so many completions a prompt.")] = 0,
    k: Annotated[
        list[int] | None, typer.Option("-k", min=1, help="pass@k and maj@k; default 1, 2, 4 … n.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Temperature of the samples.")] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=1e-3, max=1, help="Nucleus sampling; 1 is off.")
    ] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 1024,
    max_prompt_length: Annotated[int, typer.Option(min=1, help="Longest prompt, tokens.")] = 1024,
    overlong: Annotated[
        Literal["error", "filter", "truncate_left", "truncate_right"],
        typer.Option(help="What longer prompts do."),
    ] = "error",
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a completion, as rollout.stop.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(min=0, help="As rollout.stop_token_ids.")
    ] = None,
    limit: Annotated[int, typer.Option(min=-1, help="Only the first N prompts; -1 for all.")] = -1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    method: Annotated[
        Literal["strict", "flexible"], typer.Option(help="As reward.method.")
    ] = "flexible",
    scorer: Annotated[
        list[str] | None, typer.Option(help="DATA_SOURCE=SCORER, as reward.scorers.")
    ] = None,
    reward: Annotated[
        Path | None,
        typer.Option(help="Python file with a reward function, as custom_reward_function.path."),
    ] = None,
    reward_name: Annotated[str, typer.Option(help="Its name.")] = "compute_score",
    reward_kwargs: Annotated[
        str, typer.Option(help="Its further arguments, as a JSON object.")
    ] = "{}",
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], typer.Option(help="Of the weights.")
    ] = "auto",
    batch: Annotated[
        int, typer.Option(min=1, help="Prompts generated, scored and saved at a time.")
    ] = 64,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 64,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of vLLM; default all cores.")
    ] = None,
    kv_cache_gib: Annotated[float, typer.Option(min=1e-3, help="KV cache on CPU, GiB.")] = 1.0,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=1e-3, max=1, help="Share of the GPU's memory.")
    ] = 0.9,
    engines: Annotated[int, typer.Option(min=1, help="vLLM engines that share the prompts.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks an engine.")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster for the engines; default one made here.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Scoring processes.")] = 1,
    restart: Annotated[
        bool, typer.Option("--restart", help="Replace what --output holds of an evaluation.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on prompt files: mean@n with intervals, pass@k, maj@k by source, level and type.

    Continues where it was interrupted; every generation is a line of OUTPUT/generations.jsonl.
    """
    import json

    from rlhf3d.evaluation.engine import EngineOptions, engine_maker
    from rlhf3d.evaluation.run import EvaluationSettings, find_model
    from rlhf3d.evaluation.run import evaluate as run
    from rlhf3d.evaluation.view import render
    from rlhf3d.parallel.platform import choose_platform

    platform = choose_platform("auto")
    unused = {"kv_cache_gib", "gpu_memory_utilization"} - {platform.cache_setting}
    cache_option = f"--{platform.cache_setting.replace('_', '-')}"
    refuse_unused(
        context,
        unused,
        f"{cache_option} sizes the cache of engines on {platform.kind} ({platform.reason})",
    )
    scorers = scorers_of(scorer)
    if limit == 0:
        raise ValueError(
            "--limit 0: nothing would be evaluated; give a number of prompts, or -1 for all"
        )
    if not n:
        refuse_unused(
            context,
            ["k", "temperature", "top_p"],
            "it is for samples: say how many a prompt by --n",
        )
    if reward is None:
        refuse_unused(
            context, ["reward_name", "reward_kwargs"], "it is for the file that --reward names"
        )
    else:
        refuse_unused(context, ["scorer", "method"], "--reward scores instead")
    name = "-".join([model.resolve().name, *(path.resolve().parent.name for path in data)])
    output = output or Path("evaluations") / name
    check_output("--output", output)
    folder = find_model(model)
    settings = EvaluationSettings(
        greedy=greedy,
        n=n,
        temperature=temperature,
        top_p=top_p,
        max_prompt_length=max_prompt_length,
        max_tokens=max_tokens,
        overlong=overlong,
        limit=limit,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        method=method,
        scorers=scorers,
        reward_path=None if reward is None else str(reward),
        reward_name=reward_name,
        reward_kwargs=_json_object(reward_kwargs, "--reward-kwargs"),
    )
    options = EngineOptions(
        dtype,
        max_num_seqs,
        threads,
        kv_cache_gib,
        gpu_memory_utilization,
        engines,
        tensor_parallel_size,
        ray_address,
    )
    report = run(
        folder,
        data,
        output,
        settings,
        engine_maker(folder, max_prompt_length + max_tokens, seed, options),
        ks=k,
        batch=batch,
        workers=workers,
        restart=restart,
        progress=lambda mode, done, of: typer.echo(f"{mode} {done}/{of}", err=True),
        warn=lambda text: typer.echo(f"warning: {text}", err=True),
    )
    if as_json:
        typer.echo(json.dumps(report))
    else:
        Terminal().print(render(report))


def _json_object(text: str, option: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {text}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} {text}: must be a JSON object")
    return value


@app.command()
def samples(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run (trainer.output_dir) or of an evaluation.")
    ],
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of the run; default the last.")
    ] = None,
    kind: Annotated[
        Literal["train", "greedy", "sampled"] | None,
        typer.Option(help="Default train, of an evaluation all."),
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only answers that are wrong.")] = False,
    right: Annotated[bool, typer.Option("--right", help="Only answers that are right.")] = False,
    unparsable: Annotated[
        bool, typer.Option("--unparsable", help="Only completions without an answer.")
    ] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only those whose scoring failed or timed out.")
    ] = False,
    truncated: Annotated[
        bool, typer.Option("--truncated", help="Only those cut off at the limit.")
    ] = False,
    contains: Annotated[
        str, typer.Option(help="Only those with this text in prompt or completion.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="Show at most N.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show generations with their scores."""
    import json
    from dataclasses import asdict

    from rlhf3d.evaluation.browse import Filter, load, render

    if (
        (right and (wrong or unparsable or failed))
        or (wrong and (unparsable or failed))
        or (unparsable and failed)
    ):
        raise ValueError(
            "of --right, --wrong, --unparsable and --failed give one: no answer is two of them"
        )
    title, found = load(run, step, kind)
    wanted = Filter(wrong, right, unparsable, failed, truncated, contains)
    if as_json:
        for sample in [sample for sample in found if wanted.keeps(sample)][:limit]:
            typer.echo(json.dumps(asdict(sample)))
    else:
        Terminal(highlight=False).print(render(title, found, wanted, limit))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Run, checkpoint (checkpoints/step_N), Megatron or Hugging Face folder."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    to: Annotated[
        Literal["hf", "megatron"] | None, typer.Option(help="Default what the source is not.")
    ] = None,
    role: Annotated[
        Literal["actor", "critic"] | None,
        typer.Option(help="Default the actor, or what the source is."),
    ] = None,
    dtype: Annotated[
        Literal["stored", "bfloat16", "float16", "float32"],
        typer.Option(help="stored is bit for bit."),
    ] = "stored",
    max_shard_size: Annotated[float, typer.Option(min=1e-3, help="Largest file, GiB.")] = 4.0,
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder with config.json and tokenizer; default that of the checkpoint."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Files written at a time.")] = 2,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Then compare every tensor, and the logits of Megatron and transformers.",
        ),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an interrupted conversion wrote.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a Megatron checkpoint into a Hugging Face folder or back; goes on where it was interrupted."""
    import json

    from rlhf3d.checkpoints.convert import Options
    from rlhf3d.checkpoints.convert_view import convert as run

    check_output("DESTINATION", destination)
    options = Options(to, role, dtype, max_shard_size, reference)
    try:
        report = run(source, destination, options, workers, restart, verify)
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(json.dumps(report.to_json()) if as_json else report.text())


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Run, checkpoint, Megatron or Hugging Face folder.")],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every file and compare its checksum.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a folder holds: model, size, layout, step, metric, and whether it is complete."""
    import json

    from rlhf3d.checkpoints.inspection import inspect as look
    from rlhf3d.checkpoints.inspection import render

    found = look(path, deep)
    typer.echo(json.dumps(found) if as_json else render(found))
    for problem in found["problems"]:
        typer.echo(problem, err=True)
    raise typer.Exit(1 if found["problems"] else 0)


@app.command()
def doctor(
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster (host:port, or auto): check every node of it instead."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show platform, versions, patches and memory, and what is missing with the command that mends it."""
    if cluster is not None:
        from rlhf3d.placement.cluster_check import diagnose_cluster, render_cluster

        checked = diagnose_cluster(cluster)
        typer.echo(checked.to_json() if as_json else render_cluster(checked))
        raise typer.Exit(1 if checked.problems else 0)
    from rlhf3d.doctor import diagnose, render, to_json

    diagnosis = diagnose()
    typer.echo(to_json(diagnosis) if as_json else render(diagnosis))
    raise typer.Exit(0 if diagnosis.healthy else 1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run (trainer.output_dir).")],
) -> None:
    """Write a run's report: curves, phases, samples before and after."""
    from rlhf3d.observability.report import make_report

    typer.echo(make_report(run))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[Path, typer.Option(help="The picture.")] = Path("compare.png"),
) -> None:
    """Draw the reward, accuracy and length of several runs over each other."""
    from rlhf3d.observability.curves import draw_comparison
    from rlhf3d.observability.metrics import read_metrics

    check_output("--output", output, is_file=True)
    names = {run.resolve(): run.resolve().name for run in runs}
    if len(set(names.values())) < len(
        names
    ):  # runs of the same name: tell them apart by their whole paths
        names = {run: str(run) for run in names}
    draw_comparison({name: read_metrics(run) for run, name in names.items()}, output)
    typer.echo(output)


if __name__ == "__main__":
    main()

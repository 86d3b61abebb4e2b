"""`rlhf3d evaluate`: accuracy of a model on prompt files.

Invariant: an option that has a key in the configuration means what the key means, and its help
names it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlhf3d.commands.environment import environment_of
from rlhf3d.config.fields import Overlong
from rlhf3d.options import AsJson, json_object, option_groups, refuse_unused, scorers_of
from rlhf3d.paths import check_output

if TYPE_CHECKING:
    from rlhf3d.config.schema import RolloutConfig
    from rlhf3d.evaluation.settings import EvaluationSettings


@dataclass(frozen=True)
class Sampling:
    """What is generated for each prompt."""

    greedy: Annotated[bool, typer.Option(help="Evaluate greedy decoding.")] = True
    n: Annotated[int, typer.Option(min=0, help="Also sample N completions per prompt.")] = 0
    k: Annotated[
        list[int] | None, typer.Option("-k", min=1, help="pass@k and maj@k; default 1, 2, 4 … n.")
    ] = None
    temperature: Annotated[float, typer.Option(min=1e-3, help="Temperature of the samples.")] = 1.0
    top_p: Annotated[float, typer.Option(min=1e-3, max=1, help="Nucleus sampling; 1 is off.")] = 1.0
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 1024
    max_prompt_length: Annotated[int, typer.Option(min=1, help="Longest prompt, tokens.")] = 1024
    overlong: Annotated[
        Overlong,
        typer.Option(help="What to do with longer prompts."),
    ] = "error"
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A .jinja file in the place of the model's, as model.chat_template."),
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a completion, as rollout.stop.")
    ] = None
    stop_token_id: Annotated[
        list[int] | None, typer.Option(min=0, help="As rollout.stop_token_ids.")
    ] = None
    limit: Annotated[int, typer.Option(min=-1, help="Only the first N prompts; -1 for all.")] = -1
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0

    def check(self, context: typer.Context) -> None:
        """Refuse options that would be ignored. Raises ValueError."""
        if self.limit == 0:
            raise ValueError(
                "--limit 0: nothing would be evaluated; give a number of prompts, or -1 for all"
            )
        if not self.n:
            refuse_unused(
                context,
                ["k", "temperature", "top_p"],
                "it is for samples: set the number per prompt with --n",
            )


@dataclass(frozen=True)
class Scoring:
    """What a completion is worth."""

    method: Annotated[Literal["strict", "flexible"], typer.Option(help="As reward.method.")] = (
        "flexible"
    )
    scorer: Annotated[
        list[str] | None, typer.Option(help="DATA_SOURCE=SCORER, as reward.scorers.")
    ] = None
    reward: Annotated[
        Path | None,
        typer.Option(help="Python file with a reward function, as custom_reward_function.path."),
    ] = None
    reward_name: Annotated[str, typer.Option(help="Its name.")] = "compute_score"
    reward_kwargs: Annotated[str, typer.Option(help="Its further arguments, as a JSON object.")] = (
        "{}"
    )

    def check(self, context: typer.Context) -> None:
        """Refuse options that would be ignored. Raises ValueError."""
        if self.reward is not None:
            refuse_unused(context, ["scorer", "method"], "--reward scores instead")
            return
        refuse_unused(
            context, ["reward_name", "reward_kwargs"], "it is for the file that --reward names"
        )


@dataclass(frozen=True)
class Conversations:
    """What answers the model between its turns."""

    environment: Annotated[
        Path | None,
        typer.Option(
            help="Configuration, such as a run's config.yaml, whose section environment, and parts "
            "accuracy and environment of reward.weights, are used."
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """The settings of an evaluation that it makes. Raises ValueError."""
        if self.environment is None:
            return {}
        config = environment_of(self.environment)
        weights = config.reward.weights
        used = {name: weights[name] for name in ("accuracy", "environment") if name in weights}
        return {"environment": config.environment, "weights": used or {"accuracy": 1.0}}


@dataclass(frozen=True)
class Engines:
    """The engines; no result depends on them beyond rounding."""

    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], typer.Option(help="Of the weights.")
    ] = "auto"
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences decoded at once.")] = 64
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of vLLM; default all cores.")
    ] = None
    kv_cache_gib: Annotated[float, typer.Option(min=1e-3, help="KV cache on CPU, GiB.")] = 1.0
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=1e-3, max=1, help="Share of the GPU's memory.")
    ] = 0.9
    engines: Annotated[int, typer.Option(min=1, help="vLLM engines that share the prompts.")] = 1
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks per engine.")] = 1
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster for the engines; default one started here.")
    ] = None

    def check(self, context: typer.Context) -> None:
        """Refuse options that would be ignored. Raises ValueError."""
        from rlhf3d.parallel.platform import choose_platform

        platform = choose_platform("auto")
        unused = {"kv_cache_gib", "gpu_memory_utilization"} - {platform.cache_setting}
        cache_option = f"--{platform.cache_setting.replace('_', '-')}"
        refuse_unused(
            context,
            unused,
            f"{cache_option} sizes the cache of engines on {platform.kind} ({platform.reason})",
        )

    def rollout(self) -> RolloutConfig:
        """The section of the configuration that says the same."""
        from rlhf3d.config.schema import RolloutConfig

        settings = asdict(self)
        del settings["ray_address"]
        return RolloutConfig(**settings)


@option_groups
def evaluate(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(help="Hugging Face folder, checkpoint (checkpoints/step_N) or run.")
    ],
    data: Annotated[list[Path], typer.Argument(help="Parquet files of prompts.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; default evaluations/MODEL-DATA.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Prompts generated, scored and saved at a time.")
    ] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Scoring processes.")] = 1,
    restart: Annotated[
        bool, typer.Option("--restart", help="Replace what --output holds of an evaluation.")
    ] = False,
    as_json: AsJson = False,
    *,
    sampling: Sampling,
    scoring: Scoring,
    conversations: Conversations,
    engines: Engines,
) -> None:
    """Measure a model on prompt files.

    Reports mean@n with intervals, pass@k and maj@k by source, level and type. Continues where it
    was interrupted; every generation is a line of OUTPUT/generations.jsonl.

    Example: rlhf3d evaluate runs/quickstart data/arithmetic/test.parquet --n 8 -k 1 -k 8
    """
    from rlhf3d.evaluation.engine import engine_maker
    from rlhf3d.evaluation.model import find_model
    from rlhf3d.evaluation.run import evaluate as run
    from rlhf3d.evaluation.view import results_view

    engines.check(context)
    settings = _settings(sampling, scoring, conversations)
    sampling.check(context)
    scoring.check(context)
    output = output or _default_output(model, data)
    check_output("--output", output)
    folder = find_model(model)
    longest = sampling.max_prompt_length + sampling.max_tokens
    report = run(
        folder,
        data,
        output,
        settings,
        engine_maker(folder, longest, sampling.seed, engines.rollout(), engines.ray_address),
        ks=sampling.k,
        batch=batch,
        workers=workers,
        restart=restart,
        progress=lambda mode, done, of: typer.echo(f"{mode} {done}/{of}", err=True),
        warn=lambda text: typer.echo(f"warning: {text}", err=True),
    )
    results_view(report).show(as_json)


def _settings(
    sampling: Sampling, scoring: Scoring, conversations: Conversations
) -> EvaluationSettings:
    from rlhf3d.evaluation.settings import EvaluationSettings

    return EvaluationSettings(
        greedy=sampling.greedy,
        n=sampling.n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_prompt_length=sampling.max_prompt_length,
        max_tokens=sampling.max_tokens,
        overlong=sampling.overlong,
        chat_template=_path_text(sampling.chat_template),
        limit=sampling.limit,
        seed=sampling.seed,
        stop=tuple(sampling.stop or ()),
        stop_token_ids=tuple(sampling.stop_token_id or ()),
        method=scoring.method,
        scorers=scorers_of(scoring.scorer),
        reward_path=_path_text(scoring.reward),
        reward_name=scoring.reward_name,
        reward_kwargs=json_object(scoring.reward_kwargs, "--reward-kwargs"),
        **conversations.settings(),
    )


def _path_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _default_output(model: Path, data: list[Path]) -> Path:
    # A prompt file is named train or test; its folder says which data set it is.
    names = [model.resolve().name, *(path.resolve().parent.name for path in data)]
    return Path("evaluations") / "-".join(names)

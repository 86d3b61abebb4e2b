"""The table: what becomes of each key of NeMo-RL's GRPO recipes.

Invariant: data. Each key is in one rule, and the first rule whose name fits decides; a key in none
is reported as unknown. Current names first, then what they were called before.
"""

from __future__ import annotations

from typing import Any

from rlhf3d.config.convert.nemo_rl import changes as to
from rlhf3d.config.convert.nemo_rl.changes import COLOCATED, KL, VLLM
from rlhf3d.config.convert.nemo_rl.read import DEFAULTS, MEGATRON, TORCH, P
from rlhf3d.config.convert.rules import (
    Change,
    Rule,
    Table,
    computed,
    if_on,
    model_folder,
    no_counterpart,
    only_value,
    same,
)

_CORRECTION = "algorithm.rollout_correction."
_IMPORTANCE = "loss_fn.use_importance_sampling_correction"
_LAYOUT = "actor.layout."
_OPTIM = "actor.optim."
_M_OPTIM, _M_SCHEDULER = f"{MEGATRON}optimizer.", f"{MEGATRON}scheduler."


def _rule(name: str, ours: str, change: Change = same, note: str = "", **more: Any) -> Rule:
    return Rule((name,), ours, change, note, DEFAULTS.get(name), **more)


def _megatron(name: str, ours: str, change: Change = same, note: str = "") -> Rule:
    """A key of Megatron's section."""
    return Rule((MEGATRON + name,), ours, to.of_megatron(change), note)


def _torch(name: str, ours: str, change: Change = same, note: str = "") -> Rule:
    """A key of the other backend's section."""
    names = tuple(section + name for section in TORCH)
    return Rule(names, ours, to.of_torch(change), note)


def _asked_if_on(note: str, *names: str) -> Rule:
    return Rule(names, change=to.asked_if_on(note), note=note)


_NO_LORA = "all weights are trained, which wants a smaller learning rate"
_MODEL = (
    _rule(P + "model_name", "model.path", model_folder, "a folder, no name on the hub"),
    _rule(P + "precision", "model.dtype"),
    *(
        _megatron(name, _LAYOUT + ours)
        for name, ours in {
            **to.SIZES,
            "virtual_pipeline_model_parallel_size": "vpp",
            "expert_model_parallel_size": "ep",
            "num_layers_in_first_pipeline_stage": "first_stage_layers",
            "num_layers_in_last_pipeline_stage": "last_stage_layers",
        }.items()
    ),
    _megatron("sequence_parallel", _LAYOUT + "sequence_parallel", to.sequence_parallel),
    _megatron("activation_checkpointing", _LAYOUT + "recompute", to.recompute),
    _megatron("optimizer.use_distributed_optimizer", _LAYOUT + "distributed_optimizer"),
    _megatron(
        "distributed_data_parallel_config.overlap_grad_reduce", _LAYOUT + "overlap_grad_reduce"
    ),
    _megatron(
        "distributed_data_parallel_config.overlap_param_gather", _LAYOUT + "overlap_param_gather"
    ),
    _torch("tensor_parallel_size", _LAYOUT + "tp"),
    _torch("context_parallel_size", _LAYOUT + "cp"),
    _torch("expert_parallel_size", _LAYOUT + "ep"),
    _torch("sequence_parallel", _LAYOUT + "sequence_parallel", to.sequence_parallel),
    _torch("activation_checkpointing", _LAYOUT + "recompute", to.recompute),
    _torch("cpu_offload", "model.offload"),
    computed(
        _LAYOUT + "dp",
        to.data_parallel,
        "what is left of the GPUs that train; FSDP shards weights over them, this package over tp "
        "and pp",
    ),
    _rule("cluster.gpus_per_node", "cluster.gpus_per_node"),
    _rule("cluster.num_nodes", "cluster.num_nodes"),
    computed("cluster.platform", lambda value, nemo: "cuda"),
    _asked_if_on(
        _NO_LORA,
        *(f"{section}lora_cfg.enabled" for section in TORCH),
        MEGATRON + "peft.enabled",
    ),
    no_counterpart(_NO_LORA, *(f"{section}lora_cfg.*" for section in TORCH), MEGATRON + "peft.*"),
    no_counterpart("a router is trained as all weights are", MEGATRON + "freeze_moe_router"),
    Rule(
        (P + "tokenizer.chat_template",),
        change=only_value("default", "a template of your own: model.chat_template"),
        note="A template of your own: model.chat_template",
    ),
    no_counterpart(
        "a template of your own: model.chat_template",
        P + "tokenizer.chat_template_kwargs*",
        to_set=True,
    ),
    no_counterpart("the tokenizer of model.path", P + "tokenizer.*"),
    no_counterpart(
        "write it into config.json of model.path", P + "hf_config_overrides*", to_set=True
    ),
)

_BATCH = (
    _rule("grpo.num_prompts_per_step", "data.train_batch_size"),
    _rule("grpo.num_generations_per_prompt", "rollout.n"),
    _rule(
        P + "train_global_batch_size",
        "actor.ppo_mini_batch_size",
        to.mini_batch,
        "prompts; NeMo-RL counts completions",
    ),
    _rule(P + "train_micro_batch_size", "actor.ppo_micro_batch_size_per_gpu"),
    _rule(P + "sequence_packing.enabled", "model.use_remove_padding"),
    Rule(
        (P + "dynamic_batching.enabled",),
        "actor.use_dynamic_bsz",
        to.any_budget,
        "also with sequence packing",
        always=True,
    ),
    Rule(
        (P + "sequence_packing.train_mb_tokens", P + "dynamic_batching.train_mb_tokens"),
        "actor.ppo_max_token_len_per_gpu",
        to.token_budget,
        "at least a prompt and a response of full length",
    ),
    _rule("data.max_input_seq_length", "data.max_prompt_length"),
    _rule(
        P + "generation.max_new_tokens",
        "data.max_response_length",
        to.response_length,
        "NeMo-RL bounds prompt and response together: policy.max_total_sequence_length",
    ),
    no_counterpart(
        "the sum of data.max_prompt_length and data.max_response_length",
        P + "max_total_sequence_length",
        VLLM + "max_model_len",
        same=True,
    ),
    _rule("grpo.max_num_epochs", "trainer.total_epochs"),
    _rule(
        "grpo.max_num_steps",
        "trainer.total_training_steps",
        to.total_steps,
        "a million is no limit; with both, NeMo-RL ends at the first",
    ),
    _rule("grpo.seed", "trainer.seed"),
    _rule("data.shuffle", "data.shuffle"),
)

_UPDATE = (
    _megatron("optimizer.lr", _OPTIM + "lr"),
    _megatron("optimizer.min_lr", _OPTIM + "min_lr"),
    _megatron("optimizer.weight_decay", _OPTIM + "weight_decay"),
    _megatron("optimizer.adam_eps", _OPTIM + "eps"),
    Rule(
        (_M_OPTIM + "adam_beta1", _M_OPTIM + "adam_beta2"),
        _OPTIM + "betas",
        to.of_megatron(to.betas),
    ),
    _megatron("scheduler.lr_decay_style", _OPTIM + "lr_decay_style"),
    _megatron("scheduler.lr_warmup_iters", _OPTIM + "lr_warmup_steps"),
    Rule(
        (_M_SCHEDULER + "lr_warmup_init",),
        change=to.of_megatron(to.warmup_init),
        note="A warm-up begins at 0",
    ),
    Rule((_M_OPTIM + "optimizer",), change=to.of_megatron(to.adam), note="AdamW"),
    Rule((P + "optimizer.name",), change=to.of_torch(to.adam), note="AdamW"),
    *(
        Rule((f"{P}optimizer.kwargs.{name}",), _OPTIM + name, to.of_torch())
        for name in ("lr", "weight_decay", "betas", "eps")
    ),
    Rule(
        (P + "scheduler",),
        _OPTIM + "lr_warmup_steps",
        to.of_torch(to.warmup),
        "LinearLR is a warm-up, which begins at 0",
    ),
    computed(_OPTIM + "lr_decay_style", to.of_torch(to.decay), "CosineAnnealingLR, ConstantLR"),
    computed(_OPTIM + "min_lr", to.of_torch(to.torch_min_lr), "eta_min"),
    _rule(P + "max_grad_norm", _OPTIM + "clip_grad"),
    no_counterpart("policy.max_grad_norm", _M_OPTIM + "clip_grad", same=True),
    _rule(KL, "actor.kl_loss_coef", to.kl_loss_coef),
    computed("actor.use_kl_loss", to.kl_loss, "a penalty above 0"),
    Rule(
        ("loss_fn.reference_policy_kl_type",),
        "actor.kl_loss_type",
        to.kl_type,
        "with use_on_policy_kl_approximation a + behind it",
        "k3",
    ),
    _rule("loss_fn.use_kl_in_reward", "algorithm.use_kl_in_reward"),
    computed("algorithm.kl_ctrl.kl_coef", to.kl_reward_coef, "the penalty, in the reward"),
    no_counterpart("by the KL's type", "loss_fn.use_on_policy_kl_approximation", same=True),
    no_counterpart("20 and 10", "loss_fn.kl_*_clamp_value", same=True),
    _rule("loss_fn.ratio_clip_min", "actor.clip_ratio_low", to.clip_low, "at most 1"),
    _rule("loss_fn.ratio_clip_max", "actor.clip_ratio_high"),
    Rule(
        ("loss_fn.ratio_clip_c",),
        "actor.clip_ratio_c",
        to.dual_clip,
        "null is no dual clip: a bound that is never reached",
        always=True,
    ),
    Rule(
        (
            "loss_fn.sequence_level_importance_ratios",
            "loss_fn.use_cispo",
            "loss_fn.disable_ppo_ratio",
        ),
        "actor.policy_loss",
        to.policy_loss,
        "gspo, cispo, pg",
        always=True,
    ),
    _rule("loss_fn.token_level_loss", "actor.loss_agg_mode", to.aggregation),
    no_counterpart(
        "with one update a step the ratio is 1", "loss_fn.force_on_policy_ratio", same=True
    ),
    Rule(
        ("grpo.adv_estimator.name",),
        "algorithm.adv_estimator",
        to.estimator,
        "without division by the standard deviation a baseline that leaves one out is rloo",
        always=True,
    ),
    Rule(
        ("grpo.adv_estimator.normalize_rewards", "grpo.normalize_rewards"),
        "algorithm.norm_adv_by_std_in_grpo",
        to.normalized,
    ),
    no_counterpart(
        "by algorithm.adv_estimator",
        "grpo.adv_estimator.use_leave_one_out_baseline",
        "grpo.use_leave_one_out_baseline",
        "grpo.adv_estimator.*",
        same=True,
    ),
    Rule((_IMPORTANCE,), _CORRECTION + "rollout_is", if_on(_IMPORTANCE, to.level)),
    Rule(
        (
            "loss_fn.truncated_importance_sampling_ratio",
            "loss_fn.truncated_importance_sampling_ratio_min",
            "loss_fn.truncated_importance_sampling_type",
        ),
        _CORRECTION + "rollout_is_threshold",
        if_on(_IMPORTANCE, to.threshold),
        "tis is a number, icepop a range",
        always=True,
    ),
    computed(_CORRECTION + "rollout_rs", if_on(_IMPORTANCE, to.rejection), "seq-mask-tis is both"),
    computed(_CORRECTION + "rollout_rs_threshold", if_on(_IMPORTANCE, to.rejection_range)),
    _asked_if_on("not offered", "loss_fn.positive_example_nll_weight", "grpo.overlong_filtering"),
    _asked_if_on("scale in the reward function", "grpo.reward_scaling.enabled"),
    no_counterpart("scale in the reward function", "grpo.reward_scaling.*"),
    _rule("grpo.use_dynamic_sampling", "algorithm.filter_groups.enable"),
    computed(
        "algorithm.filter_groups.metric",
        if_on("grpo.use_dynamic_sampling", lambda value, nemo: "seq_reward"),
        "rewards that differ",
    ),
    _rule(
        "grpo.dynamic_sampling_max_gen_batches",
        "algorithm.filter_groups.max_num_gen_batches",
        if_on("grpo.use_dynamic_sampling"),
    ),
    _rule(
        "grpo.batch_multiplier",
        "data.gen_batch_size",
        if_on("grpo.use_dynamic_sampling", to.generated_batch),
        "prompts",
    ),
    _rule("grpo.reward_shaping.enabled", "reward.overlong_buffer.enable"),
    _rule(
        "grpo.reward_shaping.overlong_buffer_length",
        "reward.overlong_buffer.len",
        if_on("grpo.reward_shaping.enabled"),
    ),
    _rule(
        "grpo.reward_shaping.overlong_buffer_penalty",
        "reward.overlong_buffer.penalty_factor",
        if_on("grpo.reward_shaping.enabled"),
    ),
    no_counterpart("data.max_response_length", "grpo.reward_shaping.max_response_length"),
    no_counterpart("not offered", "grpo.reward_shaping.*"),
)

_ROLLOUT = (
    _rule(P + "generation.temperature", "rollout.temperature"),
    _rule(P + "generation.top_p", "rollout.top_p"),
    _rule(P + "generation.top_k", "rollout.top_k"),
    _rule(P + "generation.stop_token_ids", "rollout.stop_token_ids"),
    _rule(P + "generation.stop_strings", "rollout.stop"),
    Rule(
        (P + "generation.backend",),
        change=only_value("vllm", "vLLM is the engine here", False),
        note="vLLM is the engine",
    ),
    _rule(VLLM + "tensor_parallel_size", "rollout.tensor_parallel_size"),
    Rule((VLLM + "pipeline_parallel_size",), change=to.one_stage, note="an engine has no pipeline"),
    _rule(
        VLLM + "expert_parallel_size",
        "rollout.expert_parallel",
        lambda value, nemo: isinstance(value, int) and value > 1,
    ),
    _rule(VLLM + "gpu_memory_utilization", "rollout.gpu_memory_utilization"),
    _rule(VLLM + "enforce_eager", "rollout.enforce_eager"),
    _rule(VLLM + "precision", "rollout.quantization", to.quantization, "fp8 by channel"),
    _rule(COLOCATED + "enabled", "rollout.placement", to.placement),
    computed("rollout.engines", to.engines, "GPUs that generate / tensor_parallel_size"),
    no_counterpart("by rollout.engines", COLOCATED + "resources.*", same=True),
    _rule(
        "grpo.async_grpo.max_trajectory_age_steps",
        "rollout.max_staleness",
        to.staleness,
        "where grpo.async_grpo.enabled",
    ),
    _rule(
        "grpo.async_grpo.in_flight_weight_updates",
        "rollout.update",
        if_on("grpo.async_grpo.enabled", to.in_flight),
    ),
    no_counterpart("rollout.max_staleness above 0", "grpo.async_grpo.enabled", same=True),
    no_counterpart("not needed here", "grpo.async_grpo.*"),
    Rule(
        ("grpo.max_rollout_turns",),
        "environment.max_turns",
        to.turns,
        "with an environment",
    ),
    no_counterpart(
        "decided here",
        P + "generation.*",
        P + "generation_batch_size",
        P + "logprob_batch_size",
        P + "logprob_chunk_size",
        P + "refit_buffer_size_gb",
    ),
)

_DATA = (
    no_counterpart(
        "its rows as parquet, with their answers: data.train_files (docs/data.md)",
        "data.train.dataset_name",
        "data.train.data_path",
        "data.dataset_name",
        "data.train_data_path",
        to_set=True,
    ),
    no_counterpart(
        "its rows as parquet, with their answers: data.val_files (docs/data.md)",
        "data.validation*",
        "data.val_data_path",
    ),
    no_counterpart("a row has the complete prompt", "data.*prompt_file", "data.add_system_prompt"),
    no_counterpart("whole parquet files", "data.*"),
    Rule(("env.math.num_workers",), "reward.workers"),
    no_counterpart("a row's data_source chooses the scorer", "env.math.*", "env.dapo*"),
    no_counterpart(
        "an environment of yours: environment.path (docs/environments.md), or a function: "
        "custom_reward_function.path (docs/rewards.md)",
        "env.*",
        to_set=True,
    ),
)

_TRAINER = (
    _rule("grpo.val_period", "trainer.test_freq", note="a run here also validates after its last"),
    _rule("grpo.val_at_start", "trainer.val_before_train"),
    _rule("grpo.max_val_samples", "data.val_max_samples"),
    computed("validation.greedy", lambda value, nemo: False, "NeMo-RL samples"),
    computed("validation.sampled_n", lambda value, nemo: 1, "once"),
    _rule("checkpointing.save_period", "trainer.save_freq", to.save_freq),
    _rule("checkpointing.enabled", "trainer.save_at_end", to.saves),
    _rule("checkpointing.save_optimizer", "trainer.save_optimizer"),
    _rule("checkpointing.checkpoint_dir", "trainer.output_dir", note="all that a run writes"),
    _rule(
        "checkpointing.keep_top_k",
        "trainer.keep_last",
        to.keep_newest,
        "the newest; trainer.keep_best keeps the best",
    ),
    _rule("checkpointing.checkpoint_must_save_by", "trainer.max_wall_clock_s", to.wall_clock),
    no_counterpart(
        "trainer.best_metric, a validation metric of this package", "checkpointing.metric_name"
    ),
    no_counterpart("not needed here", "checkpointing.*"),
    Rule(
        (
            "logger.tensorboard_enabled",
            "logger.wandb_enabled",
            "logger.mlflow_enabled",
            "logger.swanlab_enabled",
        ),
        "trainer.logger",
        to.trackers,
        "metrics.jsonl and a report are always written",
    ),
    Rule(
        ("logger.wandb.project", "logger.swanlab.project", "logger.mlflow.experiment_name"),
        "trainer.project_name",
    ),
    Rule(
        ("logger.wandb.name", "logger.swanlab.name", "logger.mlflow.run_name"),
        "trainer.experiment_name",
    ),
    no_counterpart("in trainer.output_dir", "logger.log_dir"),
    no_counterpart("samples and memory are always written", "logger.*"),
    no_counterpart("says which backend trains", MEGATRON + "enabled", same=True),
    no_counterpart(
        "says which backend trains", *(f"{section}enabled" for section in TORCH), same=True
    ),
    no_counterpart(
        "of a backend, without a counterpart; `rlhf3d plan` shows the memory",
        MEGATRON + "*",
        *(f"{section}*" for section in TORCH),
        P + "optimizer*",
    ),
    no_counterpart(
        "not needed here",
        P + "make_sequence_length_divisible_by",
        P + "offload_optimizer_for_logprob",
        P + "sequence_packing.*",
        P + "dynamic_batching.*",
        "grpo.val_batch_size",
        "grpo.val_at_end",
        "grpo.calculate_advantages_on_gpu",
        "grpo.skip_reference_policy_logprobs_calculation",
        "grpo.seq_logprob_error_threshold",
    ),
)

NEMO_RL = Table(
    "NeMo-RL",
    "docs/from_nemo_rl.md",
    (*_MODEL, *_BATCH, *_UPDATE, *_ROLLOUT, *_DATA, *_TRAINER),
    to.KINDS,
)

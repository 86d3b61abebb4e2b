"""The table: what becomes of each key of TRL's GRPO.

Invariant: data. Each key is in one rule, and the first rule whose name fits decides; a key in none
is reported as unknown. Names are those of GRPOConfig, of the arguments of `trl grpo` and
GRPOTrainer, and accelerate's num_processes and num_machines.
"""

from __future__ import annotations

from typing import Any

from rlhf3d.config.convert.rules import (
    Change,
    Rule,
    Table,
    computed,
    model_folder,
    no_counterpart,
    not_offered,
    only_value,
    renamed,
    same,
)
from rlhf3d.config.convert.trl import changes as to
from rlhf3d.config.convert.trl.defaults import DEFAULTS

_CORRECTION = "algorithm.rollout_correction."
_PLAN = "`rlhf3d plan --search` finds a layout"


def _rule(names: str, ours: str, change: Change = same, note: str = "", **more: Any) -> Rule:
    """A rule for names with blanks between them, and TRL's default of the first one."""
    listed = tuple(names.split())
    default = DEFAULTS.get(listed[0]) if listed else None
    return Rule(listed, ours, change, note, default, **more)


def _without(note: str, names: str, change: Change | None = None, **more: bool) -> Rule:
    if change is not None:
        return Rule(tuple(names.split()), change=change, note=note)
    return no_counterpart(note, *names.split(), **more)


_NO_LORA = "all weights are trained, which wants a smaller learning rate"
_MODEL = (
    _rule("model_name_or_path model", "model.path", model_folder, "a folder, no name on the hub"),
    _without(_NO_LORA, "peft_config", to_set=True),
    _without(
        _NO_LORA,
        "use_peft lora_* use_rslora use_dora load_in_* bnb_* use_bnb_*",
        not_offered(_NO_LORA, "use_peft", "load_in_8bit", "load_in_4bit"),
    ),
    _rule("bf16 fp16", "model.dtype", to.dtype, "bfloat16 with float32 master weights"),
    _without(
        "the newest of the folder",
        "model_revision",
        only_value("main", "the folder of model.path must be of this revision"),
    ),
    _rule("gradient_checkpointing", "actor.layout.recompute", to.recompute),
    Rule(
        ("num_processes",),
        change=to.accelerate_processes,
        note="accelerate's; actor.layout.dp here",
        default=1,
    ),
    computed(
        "actor.layout.dp",
        lambda value, trl: to.processes(trl),
        "whole weights on each GPU, also where TRL shards them with DeepSpeed or FSDP: " + _PLAN,
    ),
    _rule("num_machines", "cluster.num_nodes", to.nodes, always=True),
    computed("cluster.gpus_per_node", to.gpus_of_a_node, "with those of one vLLM server"),
    Rule(("use_cpu",), "cluster.platform", renamed({True: "cpu", False: "cuda"}), default=False),
    _without(f"{_PLAN}", "deepspeed* fsdp* parallelism_config* ds3_gather_for_generation"),
)

_BATCH = (
    _rule("num_generations", "rollout.n"),
    _rule(
        "generation_batch_size steps_per_generation",
        "data.train_batch_size",
        to.train_batch,
        "prompts of a generation: completions / num_generations",
        always=True,
    ),
    _rule(
        "gradient_accumulation_steps",
        "actor.ppo_mini_batch_size",
        to.mini_batch,
        "prompts of an optimizer step: per_device_train_batch_size x processes x this / "
        "num_generations",
        always=True,
    ),
    _rule("per_device_train_batch_size", "actor.ppo_micro_batch_size_per_gpu"),
    _rule("num_iterations", "actor.ppo_epochs"),
    _rule("num_train_epochs", "trainer.total_epochs", to.epochs, "whole ones"),
    _rule(
        "max_steps",
        "trainer.total_training_steps",
        to.total_steps,
        "TRL counts optimizer steps, this package generations",
    ),
    _rule("max_completion_length", "data.max_response_length"),
    _rule("max_prompt_length", "data.max_prompt_length"),
    _rule("shuffle_dataset", "data.shuffle"),
    _rule("seed", "trainer.seed"),
)

_UPDATE = (
    _rule("learning_rate", "actor.optim.lr"),
    _rule("lr_scheduler_type", "actor.optim.lr_decay_style", to.decay),
    _rule(
        "lr_scheduler_kwargs.min_lr lr_scheduler_kwargs.min_lr_rate",
        "actor.optim.min_lr",
        to.min_lr,
    ),
    _rule(
        "warmup_steps warmup_ratio",
        "actor.optim.lr_warmup_steps",
        to.warmup,
        "a share needs max_steps",
    ),
    _rule("weight_decay", "actor.optim.weight_decay"),
    _rule("adam_beta1 adam_beta2", "actor.optim.betas", to.betas, always=True),
    _rule("adam_epsilon", "actor.optim.eps"),
    _rule("max_grad_norm", "actor.optim.clip_grad"),
    _without("AdamW", "optim", to.adamw),
    _rule("beta", "actor.kl_loss_coef", to.kl_coef, "0 is no reference"),
    computed("actor.use_kl_loss", to.use_kl, "beta above 0"),
    _rule(
        "use_bias_correction_kl",
        "actor.kl_loss_type",
        to.kl_type,
        "TRL weights the KL with the ratio; + takes the gradient that this has",
        always=True,
    ),
    _rule("epsilon", "actor.clip_ratio"),
    _rule(
        "epsilon_high",
        "actor.clip_ratio_high",
        to.clip_high,
        "with cispo TRL's largest ratio, here its distance from 1",
        always=True,
    ),
    computed("actor.clip_ratio_low", to.clip_low, "TRL's cispo has no lower bound"),
    _rule(
        "delta", "actor.clip_ratio_c", to.dual_clip, "TRL has no dual clip without it", always=True
    ),
    _rule(
        "importance_sampling_level",
        "actor.policy_loss",
        to.policy_loss,
        "sequence is gspo; with loss_type",
        always=True,
    ),
    _rule(
        "loss_type",
        "actor.loss_agg_mode",
        to.aggregation,
        "dapo, cispo: token-mean; grpo: seq-mean-token-mean; dr_grpo: seq-mean-token-sum-norm",
    ),
    _rule("entropy_coef", "actor.entropy_coeff"),
    computed("algorithm.adv_estimator", lambda value, trl: "grpo"),
    _rule(
        "scale_rewards", "algorithm.norm_adv_by_std_in_grpo", to.scaled, "std + 1e-6, TRL's + 1e-4"
    ),
    _rule(
        "vllm_importance_sampling_mode",
        f"{_CORRECTION}rollout_is",
        to.corrected(to.level),
        always=True,
    ),
    _rule(
        "vllm_importance_sampling_clip_max vllm_importance_sampling_cap "
        "vllm_importance_sampling_clip_min",
        f"{_CORRECTION}rollout_is_threshold",
        to.corrected(to.threshold),
        "a range where the mode is a mask",
        always=True,
    ),
    _without("by rollout_is", "vllm_importance_sampling_correction", same=True),
    _without(
        "not offered",
        "mask_truncated_completions sync_ref_model use_adaptive_entropy off_policy_mask_threshold",
        to_set=True,
    ),
    _without("not offered", "ref_model_* sapo_* vespo_* entropy_coef_* entropy_target"),
    _without(
        "all tokens are trained on",
        "top_entropy_quantile",
        only_value(1.0, "all tokens are trained on"),
    ),
    _without(
        "weighted first",
        "multi_objective_aggregation",
        only_value("sum_then_normalize", "the weighted sum is normalized"),
    ),
    _without("no load-balancing loss", "router_aux_loss_coef"),
)

_ROLLOUT = (
    _rule("temperature", "rollout.temperature"),
    _rule("top_p", "rollout.top_p"),
    _rule("top_k", "rollout.top_k", renamed({0: -1})),
    _without(
        "not offered: training takes the complete distribution",
        "min_p generation_kwargs*",
        to_set=True,
    ),
    _without("not offered", "repetition_penalty", only_value(1.0, "not offered")),
    _rule("use_vllm", "rollout.engines", to.engines, "vLLM always generates", always=True),
    _rule("vllm_mode", "rollout.placement", to.placement),
    _rule("vllm_tensor_parallel_size", "rollout.tensor_parallel_size"),
    _rule("vllm_gpu_memory_utilization", "rollout.gpu_memory_utilization", to.with_vllm),
    _rule("vllm_enable_sleep_mode", "rollout.sleep", to.with_vllm),
    _without(
        "not offered", "vllm_structured_outputs_regex vllm_guided_decoding_regex", to_set=True
    ),
    _without(
        "decided here",
        "vllm_* cache_implementation use_transformers_* transformers_continuous_batching_config* "
        "use_cache",
    ),
    _without("a template of your own: model.chat_template", "chat_template_kwargs*", to_set=True),
    _without(
        "environment.path and environment.max_turns (docs/environments.md)",
        "tools environment_factory rollout_func",
        to_set=True,
    ),
    _rule(
        "max_tool_calling_iterations",
        "environment.max_turns",
        to.turns,
        "turns of a trajectory, one more than calls of tools",
    ),
)

_DATA = (
    _without(
        "its rows as parquet, with their answers: data.train_files (docs/data.md)",
        "dataset_name dataset_path datasets*",
        to_set=True,
    ),
    _without("whole parquet files", "dataset_* test_split_size streaming eval_dataset_path"),
    _rule(
        "reward_funcs reward_weights",
        "reward.weights",
        to.reward_weights,
        "accuracy_reward and think_format_reward; others are yours to write",
    ),
    computed("reward.format", to.reward_format),
    _rule(
        "reward_model_name_or_path",
        "reward_model.path",
        model_folder,
        "a Llama or Qwen2 classifier with one output",
    ),
)

_TRAINER = (
    _rule("output_dir", "trainer.output_dir", note="everything that a run writes"),
    _rule("save_steps save_strategy", "trainer.save_freq", to.save_freq, always=True),
    _rule("save_total_limit", "trainer.keep_last"),
    _rule("save_only_model", "trainer.save_optimizer", renamed({True: False, False: True})),
    _rule(
        "eval_strategy eval_steps",
        "trainer.test_freq",
        to.test_freq,
        "a run here also validates after its last step",
        always=True,
    ),
    _rule("eval_on_start", "trainer.val_before_train"),
    _rule("num_generations_eval", "validation.sampled_n", to.validation_samples, always=True),
    computed("validation.greedy", to.validation_greedy, "TRL samples"),
    _rule(
        "report_to", "trainer.logger", to.trackers, "metrics.jsonl and a report are always written"
    ),
    _rule("run_name", "trainer.experiment_name"),
    _rule("project", "trainer.project_name"),
    _without(
        "checkpoints of TRL are not continued: set model.path to its folder",
        "resume_from_checkpoint",
        to_set=True,
    ),
    _without(
        "samples are always written",
        "log_completions* num_completions_to_print log_unique_prompts",
        same=True,
    ),
    _without("packing is model.use_remove_padding", "pad_to_multiple_of padding_free"),
    _without(
        "not needed here",
        "disable_dropout cast_lm_head_to_fp32 trust_remote_code model_init_kwargs* dtype "
        "torch_dtype attn_implementation ignore_bias_buffers use_liger_* liger_kernel_config* "
        "remove_unused_columns label_* dataloader_* ddp_* hub_* push_to_hub* log* disable_tqdm "
        "torch_* tf32 bf16_full_eval fp16_full_eval include_* per_device_eval_batch_size eval_* "
        "prediction_loss_only batch_eval_metrics average_tokens_across_devices "
        "auto_find_batch_size "
        "gradient_checkpointing_kwargs* lr_scheduler_kwargs* optim_* neftune_noise_alpha "
        "trackio_* save_* enable_jit_checkpoint load_best_model_at_end metric_for_best_model "
        "greater_is_better ignore_data_skip restore_callback_states_from_checkpoint "
        "full_determinism data_seed accelerator_config* train_sampling_strategy length_column_name "
        "debug skip_memory_metrics do_* local_rank report_* mixed_precision main_process_* "
        "machine_rank rdzv_* env.*",
    ),
)

TRL = Table(
    "TRL",
    "docs/from_trl.md",
    (*_MODEL, *_BATCH, *_UPDATE, *_ROLLOUT, *_DATA, *_TRAINER),
    to.KINDS,
)

"""The part of the table that is about models: their layout and update, and the engines.

Invariant: as in `table.py`, of which this is a part.
"""

from __future__ import annotations

from rlhf3d.config.convert.rules import (
    Rule,
    computed,
    model_folder,
    no_counterpart,
    not_offered,
    only_value,
    renamed,
    same_name,
)
from rlhf3d.config.convert.verl import changes as to
from rlhf3d.config.convert.verl import layout
from rlhf3d.config.convert.verl.changes import A, M, R

_NO_LORA = (
    "low-rank adapters are not offered: all weights are trained, which wants a smaller learning "
    "rate"
)
_LORA_SWITCHES = ("lora_rank", "lora.rank", "lora_adapter_path", "lora.adapter_path")

MODEL = (
    Rule((M + "path",), "model.path", model_folder, "a folder here, not a name on the hub"),
    Rule((M + "use_remove_padding", M + "use_rmpad"), "model.use_remove_padding"),
    Rule(
        (A + "megatron.tensor_model_parallel_size",),
        "actor.layout.tp",
        layout.megatron_size,
    ),
    Rule(
        (A + "megatron.pipeline_model_parallel_size",),
        "actor.layout.pp",
        layout.megatron_size,
    ),
    Rule(
        (A + "megatron.virtual_pipeline_model_parallel_size",),
        "actor.layout.vpp",
        layout.megatron_size,
    ),
    Rule((A + "megatron.expert_model_parallel_size",), "actor.layout.ep", layout.megatron_size),
    Rule(
        (
            A + "megatron.context_parallel_size",
            A + "ulysses_sequence_parallel_size",
            A + "fsdp_config.ulysses_sequence_parallel_size",
        ),
        "actor.layout.cp",
        layout.cp,
        "Ulysses' ranks become context-parallel ones",
        always=True,
    ),
    computed(
        "actor.layout.dp",
        layout.data_parallel,
        "what is left of the GPUs; FSDP shards weights over them, this package over tp and pp",
    ),
    Rule(
        (A + "megatron.sequence_parallel",),
        "actor.layout.sequence_parallel",
        layout.sequence_parallel,
        "only with tp above 1",
        always=True,
    ),
    Rule((A + "megatron.use_distributed_optimizer",), "actor.layout.distributed_optimizer"),
    Rule(
        (
            M + "enable_gradient_checkpointing",
            A + "megatron.override_transformer_config.recompute_granularity",
            M + "gradient_checkpointing_kwargs.activations_checkpoint_granularity",
        ),
        "actor.layout.recompute",
        layout.recompute,
        "selective recomputes a layer's MLP or experts here",
        always=True,
    ),
    Rule(
        (
            A + "megatron.override_transformer_config.num_layers_in_first_pipeline_stage",
            A + "megatron.override_transformer_config.first_pipeline_num_layers",
        ),
        "actor.layout.first_stage_layers",
    ),
    Rule(
        (
            A + "megatron.override_transformer_config.num_layers_in_last_pipeline_stage",
            A + "megatron.override_transformer_config.last_pipeline_num_layers",
        ),
        "actor.layout.last_stage_layers",
    ),
    Rule(
        (
            A + "fsdp_config.param_offload",
            A + "fsdp_config.optimizer_offload",
            A + "fsdp_config.grad_offload",
            A + "megatron.param_offload",
            A + "megatron.optimizer_offload",
            A + "megatron.grad_offload",
        ),
        "model.offload",
        layout.any_offload,
        "one switch for all models",
    ),
    *(
        Rule(
            (f"actor_rollout_ref.ref.megatron.{name}",),
            change=layout.of_the_actor(f"megatron.{name}"),
            note="The reference has the actor's layout",
        )
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "sequence_parallel",
        )
    ),
    Rule(
        (M + "lora*", M + "target_modules", M + "exclude_modules"),
        change=not_offered(_NO_LORA, *(M + switch for switch in _LORA_SWITCHES)),
        note=_NO_LORA,
    ),
    no_counterpart(
        "write the template to a .jinja file: model.chat_template",
        M + "custom_chat_template",
        to_set=True,
    ),
    no_counterpart(
        "Transformer Engine's fused kernels are used where they are installed",
        M + "use_fused_kernels",
        M + "use_liger",
        M + "fused_kernel_options.*",
        A + "use_fused_kernels",
        A + "use_torch_compile",
        A + "fsdp_config.use_torch_compile",
        "actor_rollout_ref.ref.use_torch_compile",
    ),
    no_counterpart("texts only", "*freeze_vision_tower", M + "freeze_*"),
    no_counterpart("no multi-token prediction", M + "mtp.*", R + "mtp*"),
    no_counterpart(
        "config.json and tokenizer are in model.path", M + "hf_config_path", M + "tokenizer_path"
    ),
    no_counterpart("packing is model.use_remove_padding", "*.use_remove_padding", "*.use_rmpad"),
    no_counterpart(
        "not needed here",
        M + "tiled_mlp.*",
        M + "moe_config*",
        "*.load_weight",
        "*.pad_to_length*",
    ),
    no_counterpart("model.share_prefixes does so where the platform can", A + "use_prefix_grouper"),
    no_counterpart("model.offload keeps weights and states in host memory", "*activation_offload"),
    no_counterpart(
        "the reference and a reward model follow model.offload",
        "actor_rollout_ref.ref.*_offload",
        "critic.*_offload",
        "reward*_offload",
    ),
)


def _update(role: str, prefix: str, lr: float) -> tuple[Rule, ...]:
    """The keys that actor and critic both have."""
    optim, verl = f"{role}.optim.", prefix + "optim."
    return (
        Rule((verl + "lr",), optim + "lr"),
        Rule(
            (verl + "lr_warmup_steps", verl + "lr_warmup_steps_ratio"),
            optim + "lr_warmup_steps",
            to.warmup(role, prefix),
            "a ratio needs trainer.total_training_steps",
        ),
        Rule(
            (verl + "lr_scheduler_type", verl + "warmup_style", verl + "lr_decay_style"),
            optim + "lr_decay_style",
        ),
        Rule((verl + "min_lr_ratio", verl + "min_lr"), optim + "min_lr", to.min_lr(prefix, lr)),
        Rule((verl + "weight_decay",), optim + "weight_decay"),
        Rule((verl + "betas",), optim + "betas"),
        Rule((prefix + "grad_clip", verl + "clip_grad"), optim + "clip_grad"),
        Rule((prefix + "ppo_epochs",), f"{role}.ppo_epochs"),
        Rule((prefix + "ppo_micro_batch_size_per_gpu",), f"{role}.ppo_micro_batch_size_per_gpu"),
        Rule(
            (prefix + "ppo_micro_batch_size",),
            f"{role}.ppo_micro_batch_size_per_gpu",
            to.per_gpu,
            "of all GPUs in verl",
        ),
        Rule((prefix + "use_dynamic_bsz",), f"{role}.use_dynamic_bsz"),
        Rule(
            (prefix + "ppo_max_token_len_per_gpu",),
            f"{role}.ppo_max_token_len_per_gpu",
            to.tokens_per_rank,
            "of all ranks that share a sequence",
        ),
    )


ACTOR = (
    *_update("actor", A, 1e-6),
    Rule((A + "ppo_mini_batch_size",), "actor.ppo_mini_batch_size", default=256),
    Rule(
        (A + "policy_loss.loss_mode",),
        "actor.policy_loss",
        to.policy_loss,
        "gpg is pg; another loss of verl is a function of algorithm.custom_path",
        always=True,
    ),
    Rule((A + "clip_ratio",), "actor.clip_ratio", to.clip_ratio, "default of low and high"),
    Rule((A + "clip_ratio_low",), "actor.clip_ratio_low", to.clip_low, "at most 1"),
    Rule((A + "clip_ratio_high",), "actor.clip_ratio_high"),
    Rule((A + "clip_ratio_c",), "actor.clip_ratio_c"),
    Rule((A + "entropy_coeff",), "actor.entropy_coeff"),
    Rule((A + "use_kl_loss",), "actor.use_kl_loss"),
    Rule((A + "kl_loss_coef",), "actor.kl_loss_coef"),
    Rule((A + "kl_loss_type",), "actor.kl_loss_type"),
    Rule(
        (A + "loss_agg_mode", A + "use_token_level_loss"),
        "actor.loss_agg_mode",
        to.aggregation,
        "over the global mini-batch, in every layout; verl's older workers average micro-batches",
        always=True,
    ),
    no_counterpart(
        "a loss of your own has settings in algorithm.custom_kwargs",
        A + "policy_loss.*",
        A + "tau_*",
    ),
    no_counterpart("1 in every loss here", A + "loss_scale_factor", "critic.loss_scale_factor"),
    no_counterpart(
        "the batch of a step is not shuffled between mini-batches",
        A + "shuffle",
        "critic.shuffle",
        "*data_loader_seed",
    ),
    Rule(
        (
            A + "checkpoint.save_contents",
            A + "checkpoint.contents",
        ),
        "trainer.save_optimizer",
        to.saves_optimizer,
    ),
    Rule((A + "checkpoint.async_save",), "trainer.async_save"),
)

CRITIC = (
    *_update("critic", "critic.", 1e-5),
    same_name("critic.ppo_mini_batch_size"),
    same_name("critic.cliprange_value"),
    same_name("critic.loss_agg_mode"),
    Rule(
        ("critic.model.path",),
        change=to.same_as_actor_model,
        note="The critic starts from model.path, with a fresh value head",
    ),
    *(
        Rule(
            (f"critic.megatron.{size}",),
            f"critic.layout.{ours}",
            layout.of_the_critic(),
            "only where the sizes are not the actor's",
        )
        for size, ours in layout.MEGATRON_SIZES.items()
    ),
    computed(
        "critic.layout.dp",
        layout.of_the_critic(layout.critic_data_parallel),
        "what is left of the GPUs",
    ),
    Rule(
        ("critic.megatron.sequence_parallel",),
        "critic.layout.sequence_parallel",
        layout.of_the_critic(layout.critic_sequence_parallel),
        "only with tp above 1",
        always=True,
    ),
    Rule(
        ("critic.megatron.use_distributed_optimizer",),
        "critic.layout.distributed_optimizer",
        layout.of_the_critic(),
    ),
    Rule(
        ("critic.megatron.override_transformer_config.recompute_granularity",),
        "critic.layout.recompute",
        layout.of_the_critic(),
    ),
    no_counterpart(
        "of how verl calls Megatron, or as for the actor",
        "critic.megatron.*",
        "critic.ulysses_sequence_parallel_size",
    ),
    no_counterpart("started where the estimator needs values", "critic.enable", same=True),
)

ROLLOUT = (
    Rule((R + "n",), "rollout.n"),
    Rule((R + "temperature",), "rollout.temperature"),
    Rule((R + "top_p",), "rollout.top_p"),
    Rule((R + "top_k",), "rollout.top_k", renamed({0: -1})),
    Rule((R + "tensor_model_parallel_size",), "rollout.tensor_parallel_size", default=2),
    computed("rollout.engines", layout.engines, "GPUs / tensor_parallel_size"),
    Rule((R + "nnodes",), "rollout.placement", layout.placement),
    Rule((R + "expert_parallel_size",), "rollout.expert_parallel", to.expert_parallel),
    Rule((R + "gpu_memory_utilization",), "rollout.gpu_memory_utilization"),
    Rule((R + "max_num_seqs",), "rollout.max_num_seqs", default=256),
    Rule((R + "enforce_eager",), "rollout.enforce_eager"),
    Rule((R + "free_cache_engine",), "rollout.sleep", default=True),
    Rule((R + "dtype",), "rollout.dtype"),
    Rule((R + "quantization",), "rollout.quantization", to.quantization, "fp8 by channel"),
    Rule((R + "name",), change=to.engine_name, note="vLLM is the engine"),
    Rule((R + "val_kwargs.do_sample",), "validation.greedy", to.greedy),
    Rule((R + "val_kwargs.n",), "validation.sampled_n", to.sampled_n, always=True),
    Rule((R + "val_kwargs.temperature",), "validation.temperature", to.validation_sampling),
    no_counterpart(
        "sampled validation draws from the complete distribution",
        R + "val_kwargs.top_p",
        R + "val_kwargs.top_k",
    ),
    Rule(
        (R + "multi_turn.enable",),
        change=only_value(
            False, "name an environment or tools: environment.path (docs/environments.md)"
        ),
        note="environment.path turns several turns on",
    ),
    Rule(
        (R + "multi_turn.max_assistant_turns", R + "multi_turn.max_turns"),
        "environment.max_turns",
    ),
    Rule((R + "multi_turn.format",), "environment.tool_format"),
    no_counterpart(
        "environment.max_observation_tokens, in tokens (verl counts characters)",
        R + "multi_turn.max_tool_response_length",
        R + "multi_turn.tool_response_truncate_side",
    ),
    no_counterpart(
        "an environment decides when a trajectory ends (docs/environments.md)",
        R + "multi_turn.*",
        R + "agent.*",
    ),
    no_counterpart("the engine's log-probs are always kept", R + "calculate_log_probs", same=True),
    no_counterpart("the seed is trainer.seed", R + "seed", A + "*.seed", "critic.*.seed"),
    no_counterpart(
        "passes without gradient use the same micro-batches as the update",
        "*log_prob_micro_batch_size*",
        "*log_prob_use_dynamic_bsz",
        "*log_prob_max_token_len_per_gpu",
        "critic.forward_*",
    ),
    no_counterpart(
        "decided here: prompts are cached, a sequence has room for prompt and response",
        R + "max_num_batched_tokens",
        R + "enable_chunked_prefill",
        R + "enable_prefix_caching",
        R + "max_model_len",
        R + "engine_kwargs.*",
        R + "disable_log_stats",
        R + "cudagraph_capture_sizes",
        R + "scheduling_policy",
    ),
    no_counterpart(
        "engines start empty and get the weights slice by slice",
        R + "load_format",
        R + "layered_summon",
        R + "checkpoint_engine.*",
        R + "multi_stage_wake_up",
        R + "update_weights_bucket_megabytes",
    ),
    no_counterpart("one way of calling the engines", R + "mode", same=True),
    no_counterpart("all nodes have cluster.gpus_per_node", R + "n_gpus_per_node"),
    no_counterpart(
        "an engine is tensor_parallel_size ranks; more engines are its replicas",
        R + "data_parallel_size",
        R + "pipeline_model_parallel_size",
        R + "disaggregation.*",
    ),
    no_counterpart(
        "not needed here",
        R + "full_determinism",
        R + "logprobs_mode",
        R + "over_sample_rate",
        R + "skip_*",
        R + "*routing_replay*",
        R + "moe_load_balance*",
        R + "quantization_config_file",
        R + "qat",
        R + "limit_images",
        R + "layer_name_map.*",
    ),
    no_counterpart("the lengths are those of data", R + "prompt_length", R + "response_length"),
    no_counterpart("end-of-text tokens always end a completion", R + "ignore_eos"),
    no_counterpart("training always samples", R + "do_sample", same=True),
)

"""The table: what becomes of each key of verl.

Invariant: data. Each key of verl is in one rule, and the first rule whose name fits decides; a key
in none is reported as unknown. Names are those of verl's ppo_trainer and ppo_megatron_trainer, the
current one first, then what it was called before.
"""

from __future__ import annotations

from rlhf3d.config.convert.rules import (
    Rule,
    Table,
    computed,
    if_on,
    no_counterpart,
    not_offered,
    only_value,
    renamed,
    same_name,
)
from rlhf3d.config.convert.verl import changes as to
from rlhf3d.config.convert.verl import layout
from rlhf3d.config.convert.verl.changes import CORRECTION, A, M, R
from rlhf3d.config.convert.verl.read import CONFIG_NAME
from rlhf3d.config.convert.verl.table_models import ACTOR, CRITIC, MODEL, ROLLOUT

_PLAN = "`rlhf3d plan` shows the memory"

_DATA = (
    same_name("data.train_files", to.as_list),
    same_name("data.val_files", to.as_list),
    same_name("data.train_batch_size", default=1024),
    same_name("data.gen_batch_size", to.only_with_filter),
    same_name("data.max_prompt_length"),
    same_name("data.max_response_length"),
    Rule(("data.filter_overlong_prompts", "data.truncation"), "data.overlong_prompts", to.overlong),
    same_name("data.shuffle"),
    same_name("data.val_max_samples"),
    Rule(("data.seed",), "trainer.seed"),
    Rule(
        ("data.prompt_key",),
        change=only_value("prompt", "the column is called prompt: rename it in the files"),
        note="The column is called prompt",
    ),
    Rule(
        ("data.reward_fn_key",),
        change=only_value("data_source", "the column is called data_source: rename it"),
        note="The column is called data_source",
    ),
    Rule(
        ("data.train_max_samples",),
        change=only_value(-1, "all rows are used: write a smaller file"),
        note="All rows are used",
    ),
    no_counterpart(
        "an order of your own is data.curriculum", "data.sampler.*", "data.curriculum_sampler"
    ),
    no_counterpart("texts only", "data.image*", "data.video*", "data.audio*", "data.mm_*"),
    no_counterpart(
        "a data set of your own becomes parquet: rlhf3d data prepare FILE.py",
        "data.custom_cls.*",
        "data.datagen.*",
        to_set=True,
    ),
    no_counterpart("the chat template is always applied", "data.return_*", same=True),
    no_counterpart("all held-out rows at once", "data.val_batch_size", same=True),
    no_counterpart(
        "a template of your own: model.chat_template",
        "data.apply_chat_template_kwargs*",
        "data.chat_template*",
    ),
    no_counterpart(
        "no code of a model folder is executed",
        "data.trust_remote_code",
        M + "trust_remote_code",
        "critic.model.trust_remote_code",
        "reward*.trust_remote_code",
    ),
    no_counterpart(
        "files are memory-mapped, in order, by the driver",
        "data.dataloader_num_workers",
        "data.filter_overlong_prompts_workers",
        "data.use_shm",
        "data.validation_shuffle",
        "data.tokenizer",
    ),
    no_counterpart(
        "tools are functions of environment.path, by name in environment.tools",
        "data.tool_config_path",
        "data.function_tool_path",
        R + "multi_turn.tool_config_path",
        R + "multi_turn.function_tool_path",
        R + "multi_turn.interaction_config_path",
        to_set=True,
    ),
)

_CORRECTION = (
    Rule(
        (CORRECTION + "rollout_is", A + "tis_imp_ratio_cap"),
        CORRECTION + "rollout_is",
        to.importance_weights,
        "not with bypass_mode: the loss's own ratio is the correction",
    ),
    same_name(
        CORRECTION + "rollout_is_threshold",
        to.importance_threshold,
        always=True,
    ),
    same_name(CORRECTION + "rollout_is_batch_normalize"),
    same_name(
        CORRECTION + "rollout_rs",
        to.rejection,
        "not with bypass_mode, whose masks would depend on the progress of the update",
    ),
    Rule(
        (CORRECTION + "rollout_rs_threshold", CORRECTION + "rollout_rs_threshold_lower"),
        CORRECTION + "rollout_rs_threshold",
        to.rejection_threshold,
        "k1 bounds r; verl's code bounds 1/r, so a range is turned around",
    ),
    same_name(CORRECTION + "bypass_mode"),
    Rule(
        (CORRECTION + "loss_type",),
        change=only_value("ppo_clip", "actor.policy_loss = cispo, with bypass_mode", False),
        note="reinforce is actor.policy_loss: cispo",
    ),
    no_counterpart(
        "an older spelling: give algorithm.rollout_correction.rollout_is and so on",
        "algorithm.rollout_is*",
        "algorithm.rollout_rs*",
        "algorithm.rollout_token_veto_threshold",
        to_set=True,
    ),
    no_counterpart("always measured", CORRECTION + "debug_rollout_actor_probs"),
    no_counterpart("no veto; rollout_rs rejects", CORRECTION + "rollout_token_veto_threshold"),
)

_OWN_ESTIMATOR = "not offered; an estimator of your own is algorithm.custom_path"


def _not_offered(names: tuple[str, ...], switch: str) -> Rule:
    return Rule(names, change=not_offered(_OWN_ESTIMATOR, switch), note=_OWN_ESTIMATOR)


_ALGORITHM = (
    same_name(
        "algorithm.adv_estimator",
        to.estimator,
        "empty responses are left out of their group's statistics; another estimator of verl is a "
        "function of algorithm.custom_path",
    ),
    same_name("algorithm.gamma"),
    same_name("algorithm.lam"),
    same_name("algorithm.norm_adv_by_std_in_grpo"),
    same_name("algorithm.use_kl_in_reward"),
    same_name("algorithm.kl_penalty"),
    same_name("algorithm.kl_ctrl.type"),
    same_name(
        "algorithm.kl_ctrl.kl_coef",
        to.kl_coef,
        "not used unless algorithm.use_kl_in_reward; verl's first versions had no such switch",
    ),
    same_name("algorithm.kl_ctrl.horizon"),
    same_name("algorithm.kl_ctrl.target_kl"),
    same_name("algorithm.filter_groups.enable"),
    same_name(
        "algorithm.filter_groups.metric",
        if_on("algorithm.filter_groups.enable", renamed({"reward": "seq_reward"})),
        "reward is seq_reward",
    ),
    same_name(
        "algorithm.filter_groups.max_num_gen_batches",
        if_on("algorithm.filter_groups.enable", to.generations),
        "0, no limit, is not offered",
    ),
    no_counterpart(
        "one batch is generated at a time", "algorithm.filter_groups.max_inflight_gen_batches"
    ),
    _not_offered(("algorithm.pf_ppo.*", "algorithm.use_pf_ppo"), "algorithm.use_pf_ppo"),
    _not_offered(("distillation.*",), "distillation.enabled"),
    no_counterpart(_OWN_ESTIMATOR, "algorithm.gdpo*", "algorithm.distillation*", to_set=True),
    *_CORRECTION,
)


def _overlong(name: str) -> Rule:
    places = (
        "reward.reward_kwargs.overlong_buffer_cfg.",
        "reward_model.reward_kwargs.overlong_buffer_cfg.",
        "reward_model.overlong_buffer.",
        "custom_reward_function.overlong_buffer.",
    )
    return Rule(tuple(place + name for place in places), f"reward.overlong_buffer.{name}")


_FUNCTION = ("reward.custom_reward_function.", "custom_reward_function.")
_REWARD = (
    _overlong("enable"),
    _overlong("len"),
    _overlong("penalty_factor"),
    Rule(tuple(f"{place}path" for place in _FUNCTION), "custom_reward_function.path"),
    Rule(
        tuple(f"{place}name" for place in _FUNCTION),
        "custom_reward_function.name",
        to.if_custom_reward,
    ),
    Rule(
        tuple(f"{place}reward_kwargs.*" for place in _FUNCTION), "custom_reward_function.kwargs.*"
    ),
    Rule(("reward.num_workers", "reward_model.num_workers"), "reward.workers"),
    Rule(
        ("reward.reward_model.enable", "reward_model.enable"),
        "reward.weights",
        to.reward_model_weights,
        "the model's score in the place of the rule's, as in verl",
    ),
    Rule(
        ("reward.reward_model.model_path", "reward_model.model_path", "reward_model.model.path"),
        "reward_model.path",
        to.if_reward_model(to.reward_folder),
        "a Llama or Qwen2 classifier with one output",
    ),
    same_name("reward_model.max_length", to.if_reward_model()),
    same_name("reward_model.micro_batch_size_per_gpu", to.if_reward_model()),
    Rule(
        ("reward_model.megatron.tensor_model_parallel_size", *layout.REWARD_RANKS),
        "reward_model.layout.tp",
        to.if_reward_model(layout.reward_ranks),
        "Megatron's here",
    ),
    Rule(
        ("reward_model.megatron.pipeline_model_parallel_size",),
        "reward_model.layout.pp",
        to.if_reward_model(),
    ),
    computed(
        "reward_model.layout.dp",
        to.if_reward_model(layout.reward_data_parallel),
        "what is left of its GPUs",
    ),
    Rule(
        tuple(f"{prefix}enable_resource_pool" for prefix in layout.REWARD),
        "reward_model.placement",
        to.if_reward_model(renamed({True: "disaggregated", False: "colocated"})),
    ),
    Rule(
        ("reward_model.micro_batch_size",),
        "reward_model.micro_batch_size_per_gpu",
        to.if_reward_model(to.per_gpu),
        "of all GPUs in verl",
    ),
    no_counterpart(
        "a row's data_source chooses the scorer; another one is custom_reward_function.path",
        "reward.reward_manager.*",
        "reward_model.reward_manager",
        "reward_manager.*",
        "reward*.sandbox_fusion.*",
        "sandbox_fusion.*",
        "reward_model.launch_reward_fn_async",
        "reward*.reward_kwargs.*",
        "reward*.overlong_buffer.log",
        "custom_reward_function.overlong_buffer.log",
    ),
    no_counterpart(
        "a reward model runs in Megatron: reward_model.layout and placement",
        "reward.reward_model.*",
        "reward_model.*",
    ),
)

_TRAINER = (
    same_name("trainer.total_epochs", default=30),
    same_name("trainer.total_training_steps"),
    Rule(
        ("trainer.default_local_dir", "trainer.project_name", "trainer.experiment_name"),
        "trainer.output_dir",
        to.output_dir,
        "everything that a run writes is in one folder",
        always=True,
    ),
    same_name("trainer.save_freq", to.not_negative),
    computed("trainer.save_at_end", to.save_at_end, "verl saves nothing at -1"),
    same_name(
        "trainer.test_freq",
        to.not_negative,
        "a run here also validates after its last step",
        default=-1,
    ),
    same_name("trainer.val_before_train"),
    same_name(
        "trainer.resume_mode",
        to.resume,
        "checkpoints of verl are not continued",
    ),
    same_name("trainer.critic_warmup"),
    Rule(("trainer.max_actor_ckpt_to_keep",), "trainer.keep_last"),
    Rule(
        ("trainer.nnodes",),
        "cluster.num_nodes",
        layout.all_nodes,
        "with the nodes that only generate",
        always=True,
    ),
    Rule(("trainer.device",), "cluster.platform", default="cuda"),
    Rule(("trainer.n_gpus_per_node",), "cluster.gpus_per_node"),
    Rule(
        ("trainer.val_only",),
        change=only_value(False, "use rlhf3d evaluate"),
        note="rlhf3d evaluate",
    ),
    no_counterpart("a run always balances tokens over ranks", "trainer.balance_batch", same=True),
    no_counterpart(
        "a run always writes its samples to samples/",
        "trainer.log_val_generations",
        "trainer.rollout_data_dir",
        "trainer.validation_data_dir",
        same=True,
    ),
    same_name(
        "trainer.logger",
        to.trackers,
        "metrics.jsonl, the terminal and a report are always written",
    ),
    no_counterpart(
        "asynchronous training is rollout.max_staleness with rollout.update and placement "
        "(docs/async.md)",
        "trainer.v1.*",
        "async_training.*",
        "trainer.use_v1",
        "rollout.*",
    ),
    no_counterpart("the critic's checkpoints are the actor's", "trainer.max_critic_ckpt_to_keep"),
    no_counterpart(
        "not needed here",
        "trainer.*",
        "ray_kwargs.*",
        "ray_init.*",
        "global_profiler.*",
        "*profiler.*",
        "*npu_profile*",
        "transfer_queue.*",
        "skip.*",
        "*.router_replay.*",
        "*.qat.*",
        "*.trace.*",
        "*.prometheus.*",
        "*_target_",
        "actor_rollout_ref.hybrid_engine",
        "*.nccl_timeout",
        R + "router_config_path",
        "*.rollout_n",
        "*.strategy",
        "model_engine",
        M + "external_lib",
        M + "use_shm",
        "*.use_mbridge",
        "*.vanilla_mbridge",
        "*dist_checkpointing*",
        "*.checkpoint.*",
    ),
    no_counterpart(
        f"of FSDP, or of how verl calls Megatron; {_PLAN}",
        A + "fsdp_config.*",
        A + "megatron.*",
        "actor_rollout_ref.ref.fsdp_config.*",
        "actor_rollout_ref.ref.megatron.*",
        "actor_rollout_ref.ref.ulysses_sequence_parallel_size",
        "critic.fsdp*",
        "critic.model.*",
        M + "gradient_checkpointing_kwargs.*",
        A + "optim.*",
        "critic.optim.*",
        "*entropy_from_logits*",
        "*entropy_checkpointing",
        A + "calculate_*",
    ),
    no_counterpart(
        "the folder's config.json decides", M + "override_config.*", "*.override_config*"
    ),
    no_counterpart("says whose defaults hold: FSDP's or Megatron's", CONFIG_NAME, same=True),
    no_counterpart("give the files that it names as well", "defaults", "hydra.*"),
)

VERL = Table(
    "verl",
    "docs/from_verl.md",
    (*_DATA, *MODEL, *ACTOR, *CRITIC, *ROLLOUT, *_ALGORITHM, *_REWARD, *_TRAINER),
    to.KINDS,
)

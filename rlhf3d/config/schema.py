"""What a run is told: one frozen dataclass per section, each field with its meaning and unit.

Invariant: every number a run uses is a field here or derived from one in `derived.py`; defaults are the
values a user would choose. Loading, overrides and checks live in `load.py`; this file imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf3d.parallel.layout import Recompute

Quantization = Literal["none", "fp8_per_channel"]


@dataclass(frozen=True)
class LayoutConfig:
    """How one model is cut over processes: tp x pp x dp x cp ranks."""

    tp: int = 1
    """Tensor-parallel size: must divide attention heads and KV heads."""
    pp: int = 1
    """Pipeline-parallel size: must divide the number of layers, but see first_stage_layers and last_stage_layers."""
    dp: int = 1
    """Data-parallel size: replicas that each take a share of every mini-batch."""
    vpp: int | None = None
    """Virtual pipeline stages a rank (interleaved 1F1B); null for plain 1F1B."""
    sequence_parallel: bool = False
    """Shard norms and dropout along the sequence over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Shard optimizer state and master weights over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduce-scatter with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the gather of new weights with the next mini-batch's forward pass."""
    recompute: Recompute = "none"
    """What of each layer the backward pass computes again: none, selective (its MLP or experts) or full (all of it)."""
    ep: int = 1
    """Expert-parallel size: ranks that share out the experts; must divide tp x cp x dp and the number of experts."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage; null for an equal share."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage; null for an equal share."""
    cp: int = 1
    """Context-parallel size: ranks that share out each sequence, for sequences too long for one."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warm-up schedule that advances once a training step."""

    lr: float = 1.0e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: str = "constant"
    """constant, linear or cosine."""
    lr_warmup_steps: int = 0
    """Training steps of linear warm-up from 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay on matrices."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decay rates."""
    eps: float = 1.0e-8
    """Adam's denominator offset."""
    clip_grad: float = 1.0
    """Global gradient-norm clip; 0 turns clipping off."""


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained model that actor, critic and reference start from."""

    path: str = ""
    """HF folder: config.json, safetensors (one file or sharded with an index), tokenizer."""
    dtype: str = "auto"
    """Compute dtype of the training ranks: bfloat16 (fp32 master weights), float32, or auto: the platform's fastest."""
    use_remove_padding: bool = False
    """Train on packed sequences: one run of tokens a micro-batch instead of padded rows; same numbers, less work."""
    offload: bool = False
    """Keep each model's weights, gradients and optimizer state in host memory while another model is at work."""


@dataclass(frozen=True)
class CurriculumConfig:
    """A user's own order of the training prompts."""

    path: str | None = None
    """Python file; null for the shuffled order."""
    name: str = "difficulty"
    """Function in it: fn(row, epoch, **kwargs) -> number (low ones are served first) or null (not in this epoch)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra keyword arguments."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts with checkable answers, in parquet."""

    train_files: tuple[str, ...] = ()
    """Parquet files of training prompts."""
    val_files: tuple[str, ...] = ()
    """Parquet files of held-out prompts."""
    train_batch_size: int = 64
    """Prompts a training step (completions = this x rollout.n)."""
    gen_batch_size: int | None = None
    """Prompts generated at once while algorithm.filter_groups fills a step; null for train_batch_size."""
    max_prompt_length: int = 512
    """Longest prompt, tokens, chat template included."""
    max_response_length: int = 512
    """Longest completion, tokens."""
    overlong_prompts: str = "error"
    """error, filter, truncate_left or truncate_right, for prompts over max_prompt_length; counted and reported."""
    shuffle: bool = True
    """Draw training prompts in an order seeded by trainer.seed and the epoch."""
    train_weights: tuple[float, ...] = ()
    """Share of each file of train_files among the prompts served; empty serves every prompt once an epoch."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Order of the prompts within an epoch."""
    cache_dir: str | None = None
    """Where prompt files above 64 MiB are unpacked once, to be memory-mapped; null for ~/.cache/rlhf3d/prompts."""
    val_max_samples: int = -1
    """Validate on the first so many held-out rows; -1 for all."""


@dataclass(frozen=True)
class ActorConfig:
    """The policy and its update."""

    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Layout of the training ranks; the reference shares it, and the critic without a layout of its own."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of the policy."""
    ppo_mini_batch_size: int = 64
    """Prompts (times rollout.n sequences) an optimizer step, over all data-parallel ranks."""
    ppo_micro_batch_size_per_gpu: int = 4
    """Sequences a forward/backward pass on one data-parallel rank; never changes the mathematics."""
    use_dynamic_bsz: bool = False
    """Cut micro-batches by ppo_max_token_len_per_gpu instead of ppo_micro_batch_size_per_gpu."""
    ppo_max_token_len_per_gpu: int = 16384
    """Tokens a forward/backward pass on one data-parallel rank, padding included; at least the longest sequence."""
    ppo_epochs: int = 1
    """Passes over each batch."""
    policy_loss: str = "vanilla"
    """Registered policy loss: vanilla (clipped PPO), gspo, cispo, pg, or one of algorithm.custom_path."""
    clip_ratio: float = 0.2
    """PPO clip range; default of clip_ratio_low and clip_ratio_high."""
    clip_ratio_low: float | None = None
    """Lower clip range; null for clip_ratio."""
    clip_ratio_high: float | None = None
    """Upper clip range; null for clip_ratio."""
    clip_ratio_c: float = 3.0
    """Dual-clip bound for negative advantages."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add KL(policy, reference) to the loss (GRPO)."""
    kl_loss_coef: float = 0.001
    """Weight of that KL."""
    kl_loss_type: str = "low_var_kl"
    """KL estimator: k1, abs, k2, k3 or low_var_kl; with a + behind it, its value and k2's gradient (k3+ …)."""
    loss_agg_mode: str = "token-mean"
    """token-mean, token-sum, seq-mean-token-sum, seq-mean-token-mean or seq-mean-token-sum-norm."""


@dataclass(frozen=True)
class CriticConfig:
    """The value model and its update; placed only when the advantage estimator needs values."""

    layout: LayoutConfig | None = None
    """Layout of processes of its own; null: it is in the actor's processes. Its keys are those of actor.layout."""
    placement: str = "colocated"
    """Processes of its own, on GPUs: colocated on the actor's devices, or disaggregated on devices of their own."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1.0e-5))
    """Optimizer of the critic."""
    ppo_mini_batch_size: int | None = None
    """As actor.ppo_mini_batch_size; null for the same."""
    ppo_micro_batch_size_per_gpu: int | None = None
    """As actor.ppo_micro_batch_size_per_gpu; null for the same."""
    use_dynamic_bsz: bool | None = None
    """As actor.use_dynamic_bsz; null for the same."""
    ppo_max_token_len_per_gpu: int | None = None
    """As actor.ppo_max_token_len_per_gpu; null for the same."""
    ppo_epochs: int | None = None
    """As actor.ppo_epochs; null for the same."""
    cliprange_value: float = 0.5
    """Value clip range around the old values."""
    loss_agg_mode: str = "token-mean"
    """Aggregation of the value loss."""


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    n: int = 1
    """Completions a prompt."""
    temperature: float = 1.0
    """Sampling temperature; divides the logits in training as well."""
    top_p: float = 1.0
    """Nucleus sampling; 1.0 is off (anything else is refused in training)."""
    top_k: int = -1
    """Top-k sampling; -1 is off (anything else is refused in training)."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they stay in it, as the tokens that were generated."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, beside those of tokenizer, generation_config.json and config.json."""
    engines: int = 1
    """vLLM engines that share the prompts."""
    tensor_parallel_size: int = 1
    """vLLM ranks an engine."""
    expert_parallel: bool = False
    """Give each vLLM rank whole experts instead of a share of every expert."""
    placement: str = "colocated"
    """colocated: engines on the devices that train; disaggregated: on devices of their own."""
    dtype: str = "auto"
    """Weight dtype of the engines: bfloat16, float32, or auto: the platform's fastest."""
    quantization: Quantization = "none"
    """none, or fp8_per_channel (vLLM's name): engines quantise their layers' matrices and inputs; docs/gpu.md."""
    max_num_seqs: int = 64
    """Sequences an engine decodes at once."""
    kv_cache_gib: float = 1.0
    """KV cache an engine on CPU, GiB."""
    gpu_memory_utilization: float = 0.5
    """Share of GPU memory an engine may use."""
    threads: int | None = None
    """CPU threads an engine rank; null for a node's cores over the engine ranks there (trainers sleep meanwhile)."""
    enforce_eager: bool | Literal["auto"] = "auto"
    """Skip torch.compile and CUDA graphs; auto: on CPU."""
    sleep: bool = False
    """Engines give back their memory after generating, and get weights anew before the next time (on GPUs)."""
    sync_bucket_mib: int | None = None
    """Weights travel in buckets of at most this many MiB, of which a sync needs two per engine rank; null: 64, on GPUs
    256."""
    sync_timeout_s: float = 300.0
    """Deadline of each bucket of a weight sync or export."""
    canary_steps: int = 3
    """Verify engine log-probs against Megatron's after the sync of the first so many steps (and at every resume)."""
    canary_every: int = 0
    """And then after every so many steps; 0 for never."""
    canary_max_abs_diff: float | None = None
    """Largest mean |log-prob difference| the canary accepts; null: 1e-3 in float32, 0.1 in bfloat16, 0.4 in FP8."""


@dataclass(frozen=True)
class KLCtrlConfig:
    """Controller of the KL coefficient in the reward."""

    type: str = "fixed"
    """fixed or adaptive."""
    kl_coef: float = 0.001
    """(Initial) coefficient."""
    target_kl: float = 0.1
    """Target of the adaptive controller."""
    horizon: int = 10000
    """Horizon of the adaptive controller, sequences."""


@dataclass(frozen=True)
class FilterGroupsConfig:
    """Dynamic sampling (DAPO): train on prompts whose completions differ, generate until there are enough."""

    enable: bool = False
    """Leave out prompts whose completions are all equal in `metric`, and refill."""
    metric: str = "acc"
    """acc (what the reward function returns as acc, else its score), score, or seq_reward (with overlong penalty);
    seq_final_reward is the same where no KL is in the reward."""
    max_num_gen_batches: int = 10
    """Batches of data.gen_batch_size prompts a step may generate before the run stops."""


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """What is done about the difference between the engine that sampled and the policy that trains."""

    rollout_is: str | None = None
    """Importance weights on the policy loss: token, sequence, or null for none."""
    rollout_is_threshold: str | float = 2.0
    """A number truncates the weights there (TIS); a range such as 0.5_5.0 makes those outside 0 (IcePop)."""
    rollout_is_batch_normalize: bool = False
    """Divide the weights by their mean over the batch."""
    rollout_rs: str | None = None
    """Take out of the loss what is too far off: token_k1, seq_sum_k1, seq_mean_k1 …, several with commas."""
    rollout_rs_threshold: str | float | None = None
    """Of k1 a range of ratios (0.5_2.0, or 2.0 for the same), of k2 and k3 the largest divergence; one, or one each."""
    bypass_mode: bool = False
    """Take the engine's log-probs as the old ones (two policies): the old_logprobs phase is skipped."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to advantages."""

    adv_estimator: str = "gae"
    """Registered estimator: gae (with critic), grpo, rloo, reinforce_plus_plus, remax … (docs/algorithms.md)."""
    custom_path: str | None = None
    """Python file with estimators and policy losses of your own (@register_advantage, @register_policy_loss)."""
    custom_kwargs: dict[str, Any] = field(default_factory=dict)
    """What they find under `custom` in their inputs and settings."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 1.0
    """GAE lambda."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide group advantages by the group's std (False: Dr.GRPO)."""
    use_kl_in_reward: bool = False
    """Subtract kl_coef x KL(policy, reference) from each token's reward."""
    kl_penalty: str = "k1"
    """KL estimator in the reward: k1, abs, k2, k3 or low_var_kl."""
    kl_ctrl: KLCtrlConfig = field(default_factory=KLCtrlConfig)
    """Controller of that coefficient."""
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    """Dynamic sampling."""
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    """Mismatch between rollout engine and training engine."""


@dataclass(frozen=True)
class CustomRewardConfig:
    """A user's own reward function."""

    path: str | None = None
    """Python file; null for the scorer of each row's data_source."""
    name: str = "compute_score"
    """Function in it, plain or async: fn(data_source, solution_str, ground_truth, extra_info=None, **kwargs)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra keyword arguments."""


@dataclass(frozen=True)
class OverlongBufferConfig:
    """Soft penalty on responses that come near data.max_response_length (DAPO); training only."""

    enable: bool = False
    """Add min(0, (max_response_length - len - length) / len) x penalty_factor to each score."""
    len: int = 4096
    """The last so many tokens are penalised; at most data.max_response_length."""
    penalty_factor: float = 1.0
    """Penalty at the very limit."""


@dataclass(frozen=True)
class RewardConfig:
    """Scoring of completions."""

    method: str = "flexible"
    """How an answer is found: strict (after `####`, in a box) or flexible (else the last number or expression)."""
    scorers: dict[str, str] = field(default_factory=dict)
    """Scorer of further data sources, or another one: DATA_SOURCE: gsm8k, math_verify or boxed_exact."""
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """Parts of the reward and their weights: accuracy (the answer's score), format, and reward_model."""
    format: str = "boxed"
    """Form that the part `format` wants: boxed (one box), hashes (one `####`) or think (one block, then text)."""
    workers: int = 1
    """Scoring processes."""
    timeout_s: float = 10.0
    """Deadline of one scoring call, in whose process nothing else runs; it is killed when it is late."""
    max_error_rate: float = 0.05
    """Share of completions that may end as error or timeout before the run stops."""
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)
    """Penalty on overlong responses."""


@dataclass(frozen=True)
class RewardModelConfig:
    """A sequence classifier that scores completions, with the weight reward.weights.reward_model."""

    path: str | None = None
    """HF folder of a classifier with one output (score.weight) and a tokenizer with chat template; null for none."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Layout of its processes."""
    placement: str = "colocated"
    """On GPUs: colocated on the actor's devices, or disaggregated on devices of their own."""
    micro_batch_size_per_gpu: int = 8
    """Sequences a forward pass on one data-parallel rank."""
    max_length: int | None = None
    """Longest input, prompt and completion in its own tokens; null for its window."""
    overlong: str = "error"
    """What a longer input does: error stops the run, truncate_left keeps the last tokens and counts it."""
    mean: float = 0.0
    """The part is (score - mean) / std."""
    std: float = 1.0
    """As said under mean."""


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out accuracy."""

    greedy: bool = True
    """Validate with greedy decoding, one completion a prompt."""
    sampled_n: int = 0
    """Also validate with so many samples a prompt at `temperature`; 0 for none."""
    temperature: float = 1.0
    """Temperature of the sampled validation."""


@dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    total_training_steps: int | None = None
    """Steps of the run; null for total_epochs over the data."""
    total_epochs: int = 1
    """Passes over the training data when total_training_steps is null."""
    seed: int = 0
    """Seeds data order, sampling and initialisation."""
    output_dir: str = "runs/default"
    """Where everything the run writes goes."""
    val_before_train: bool = True
    """Validate once before the first step."""
    test_freq: int = 10
    """Validate every so many steps (and after the last); 0 for never between."""
    save_freq: int = 0
    """Save a checkpoint every so many steps (and after the last); 0 for only the last."""
    save_at_end: bool = True
    """Save a checkpoint after the last step."""
    save_optimizer: bool = True
    """Put optimizer state and schedule into checkpoints: without it a run cannot be resumed exactly."""
    save_hf: str = "last"
    """Export the actor to hf/ in the checkpoint: of the last step, always or never (`rlhf3d convert` does it later)."""
    async_save: bool = False
    """Go on with the next step once every rank has copied its share; takes that much more host memory."""
    keep_last: int | None = None
    """Remove all but so many newest checkpoints (and those of keep_best); null keeps every one."""
    keep_best: int = 0
    """With keep_last: keep the so many checkpoints that are best by best_metric as well."""
    best_metric: str | None = None
    """Validation metric of which higher is better; null for the first val-core/…/acc/… of the run."""
    resume_mode: str = "auto"
    """auto: from the newest whole checkpoint of an unfinished run in output_dir; never; or a checkpoint's folder."""
    resume_fresh_optimizer: bool = False
    """Resume from a checkpoint without optimizer state, with fresh optimizers."""
    critic_warmup: int = 0
    """Steps that update the critic only."""
    on_nonfinite: str = "stop"
    """What a NaN or infinity in loss or gradient does: stop the run, or skip that optimizer step on every rank."""
    grad_spike_factor: float = 5.0
    """Report a gradient norm above so many times the median of the 20 steps before."""
    max_wall_clock_s: float | None = None
    """Save and stop in time to end within so many seconds of the start, with exit code 75; null for no limit."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the ranks run."""

    platform: str = "auto"
    """auto, cpu or cuda; as_gpu: CPU processes under the rules of GPUs, for `rlhf3d rehearse --as-gpu`."""
    ray_address: str | None = None
    """Address of a running Ray cluster; null starts one for this run."""
    num_nodes: int = 1
    """Nodes the layout is spread over; on CPU those of a cluster that ray_address names."""
    gpus_per_node: int = 8
    """GPUs of each node (ignored on CPU)."""
    threads_per_rank: int | None = None
    """CPU threads a training rank; null for a node's cores over its group's ranks there, at least 1."""
    startup_timeout_s: float = 300.0
    """Deadline for all workers to come up."""
    phase_timeout_s: float = 1800.0
    """Deadline of any one phase of a step."""


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    custom_reward_function: CustomRewardConfig = field(default_factory=CustomRewardConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def needs_critic(self) -> bool:
        """Whether the estimator needs values: gae, or one of the user's own file that says so."""
        estimator, path = self.algorithm.adv_estimator, self.algorithm.custom_path
        if path is None:
            return estimator == "gae"
        from rlhf3d.algorithms.custom import (
            custom_needs_values,
        )  # loads torch, as the user's file does

        return custom_needs_values(path, estimator)

    @property
    def needs_reference(self) -> bool:
        """The reference model is placed only where a KL term uses it."""
        return self.actor.use_kl_loss or self.algorithm.use_kl_in_reward

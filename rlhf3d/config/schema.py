"""The keys of a run: one frozen dataclass per section, each field with its meaning and unit.

Invariant: every number that a run uses is a field here or derived from one in `derived.py`;
defaults are the values a user would choose; ranges and choices stand at the field (`fields.py`).
Reading and checking are elsewhere in this room; nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rlhf3d.algorithms.names import ADVANTAGE_ESTIMATORS, EstimatorNeeds
from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.fields import (
    NOT_A_KEY,
    Count,
    CountOrZero,
    NotNegative,
    OneOf,
    Overlong,
    Positive,
    Share,
    UserPath,
    above,
    at_least,
    at_most,
)
from rlhf3d.config.models import (
    ActorConfig,
    CriticConfig,
    Dtype,
    KLKind,
    ModelConfig,
    Placement,
    RewardModelConfig,
)
from rlhf3d.config.models import LayoutConfig as LayoutConfig  # for importers of the schema
from rlhf3d.config.models import OptimConfig as OptimConfig
from rlhf3d.observability.trackers.registry import TrackerName


@dataclass(frozen=True)
class CurriculumConfig:
    """A user's own order of the training prompts."""

    path: UserPath | None = None
    """Python file; null for the shuffled order."""
    name: str = "difficulty"
    """Function in it: fn(row, epoch, **kwargs) returns a number (low ones are served first) or null
    (not in this epoch)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra keyword arguments."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts with checkable answers, in parquet."""

    train_files: tuple[UserPath, ...] = ()
    """Parquet files of training prompts."""
    val_files: tuple[UserPath, ...] = ()
    """Parquet files of held-out prompts."""
    train_batch_size: Count = 64
    """Prompts per training step (completions = this x rollout.n)."""
    gen_batch_size: Count | None = None
    """Prompts generated at once while algorithm.filter_groups fills a step; null for
    train_batch_size."""
    max_prompt_length: Count = 512
    """Longest prompt, tokens, chat template included."""
    max_response_length: Count = 512
    """Longest completion, tokens."""
    overlong_prompts: Overlong = "error"
    """What to do with prompts above max_prompt_length; they are counted and reported."""
    shuffle: bool = True
    """Draw training prompts in an order seeded by trainer.seed and the epoch."""
    train_weights: tuple[float, ...] = ()
    """Share of each file of train_files among the prompts served; empty serves every prompt once
    per epoch."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Order of the prompts within an epoch."""
    cache_dir: UserPath | None = None
    """Where prompt files above 64 MiB are unpacked once, to be memory-mapped; null for
    ~/.cache/rlhf3d/prompts."""
    val_max_samples: Annotated[int, at_least(-1)] = -1
    """Validate on the first N held-out rows; -1 for all."""


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    n: Count = 1
    """Completions per prompt."""
    temperature: Positive = 1.0
    """Sampling temperature; divides the logits in training as well."""
    top_p: Annotated[float, above(0), at_most(1)] = 1.0
    """Nucleus sampling; 1.0 is off, and training needs a rollout correction for anything else."""
    top_k: Annotated[int, at_least(-1)] = -1
    """Top-k sampling; -1 is off, and training needs a rollout correction for anything else."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they stay in it, as the tokens that were generated."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, in addition to those of tokenizer, generation_config.json and
    config.json."""
    engines: Count = 1
    """vLLM engines that share the prompts."""
    tensor_parallel_size: Count = 1
    """vLLM ranks per engine."""
    expert_parallel: bool = False
    """Give each vLLM rank complete experts instead of a share of every expert."""
    placement: Placement = "colocated"
    """colocated: engines on the devices that train; disaggregated: on devices of their own."""
    max_staleness: CountOrZero = 0
    """Engines write up to N batches ahead of training, so that no token trained on is of weights
    more than N publications old; 0: weights, completions and updates in turn."""
    update: Literal["between_batches", "in_flight"] = "between_batches"
    """When new weights enter the engines: between two batches, or between any two of their steps
    while requests run (with max_staleness and disaggregated)."""
    dtype: Dtype = "auto"
    """Weight dtype of the engines: bfloat16, float32, or auto: the platform's fastest."""
    quantization: Literal["none", "fp8_per_channel"] = "none"
    """fp8_per_channel (vLLM's name): engines quantize their layers' matrices and inputs;
    docs/gpu.md."""
    max_num_seqs: Count = 64
    """Sequences an engine decodes at once."""
    kv_cache_gib: Positive = 1.0
    """KV cache per engine on CPU, GiB."""
    gpu_memory_utilization: Annotated[float, above(0), at_most(1)] = 0.5
    """Share of GPU memory an engine may use."""
    threads: Count | None = None
    """CPU threads per engine rank; null divides a node's cores among its engine ranks (trainers
    sleep meanwhile)."""
    enforce_eager: bool | Literal["auto"] = "auto"
    """Skip torch.compile and CUDA graphs; auto: only on CPU."""
    sleep: bool = False
    """Engines release their memory after generating, and receive weights again before the next step
    (on GPUs)."""
    sync_bucket_mib: Count | None = None
    """Weights travel in buckets of at most N MiB, and a sync needs two per engine rank; null: 64,
    on GPUs 256."""
    sync_timeout_s: Positive = 300.0
    """Deadline of each bucket of a weight sync or export."""
    engine_restarts: CountOrZero = 2
    """How many deaths of an engine a run survives, counted from its start or resume: engines are
    started again, and get the weights and unanswered requests again."""
    canary_steps: CountOrZero = 3
    """Compare engine log-probs with Megatron's after each of the first N weight syncs of a start
    or resume."""
    canary_every: CountOrZero = 0
    """Compare again after every Nth weight sync; 0 for never."""
    canary_max_abs_diff: Positive | None = None
    """Largest mean over the canary's tokens of |log-prob difference|, nats; null: 1e-3 in float32,
    0.1 in bfloat16, 0.4 in FP8."""


@dataclass(frozen=True)
class KLCtrlConfig:
    """Controller of the KL coefficient in the reward."""

    type: Literal["fixed", "adaptive"] = "fixed"
    """Whether the coefficient follows the measured KL."""
    kl_coef: NotNegative = 0.001
    """(Initial) coefficient."""
    target_kl: Positive = 0.1
    """Target of the adaptive controller."""
    horizon: Count = 10000
    """Horizon of the adaptive controller, sequences."""


@dataclass(frozen=True)
class FilterGroupsConfig:
    """Dynamic sampling (DAPO): generate until enough prompts have completions that differ."""

    enable: bool = False
    """Leave out prompts whose completions are all equal in `metric`, and refill."""
    metric: Literal["acc", "score", "seq_reward", "seq_final_reward"] = "acc"
    """acc (what the reward function returns as acc, else its score), score, or seq_reward (with
    overlong penalty); seq_final_reward is the same where no KL is in the reward."""
    max_num_gen_batches: Count = 10
    """Batches of data.gen_batch_size prompts that a step may generate before the run stops."""


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """Correction of the difference between the engine that sampled and the policy that trains."""

    rollout_is: str | None = None
    """Importance weights on the policy loss: token, sequence, or null for none."""
    rollout_is_threshold: str | float = 2.0
    """A number truncates the weights there (TIS); a range such as 0.5_5.0 sets those outside to 0
    (IcePop)."""
    rollout_is_batch_normalize: bool = False
    """Divide the weights by their mean over the batch."""
    rollout_rs: str | None = None
    """Exclude tokens or sequences that differ too much from the loss: token_k1, seq_sum_k1,
    seq_mean_k1 …, several with commas."""
    rollout_rs_threshold: str | float | None = None
    """For k1 a range of ratios (0.5_2.0, or 2.0 for the same), for k2 and k3 the largest
    divergence; one, or one each."""
    bypass_mode: bool = False
    """Use the engine's log-probs as the old ones (two policies) and skip the phase old_logprobs."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to advantages."""

    adv_estimator: Annotated[str, OneOf(tuple(ADVANTAGE_ESTIMATORS), extensible=True)] = "gae"
    """Advantage estimator (docs/algorithms.md), or a name that custom_path registers; gae needs a
    critic."""
    custom_path: UserPath | None = None
    """Python file with your own estimators and policy losses (@register_advantage,
    @register_policy_loss)."""
    custom_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to them as `custom`, in their inputs and settings."""
    gamma: Share = 1.0
    """Discount."""
    lam: Share = 1.0
    """GAE lambda."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide group advantages by the group's std (False: Dr.GRPO)."""
    use_kl_in_reward: bool = False
    """Subtract kl_coef x KL(policy, reference) from each token's reward."""
    kl_penalty: KLKind = "k1"
    """KL estimator in the reward."""
    kl_ctrl: KLCtrlConfig = field(default_factory=KLCtrlConfig)
    """Controller of that coefficient."""
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    """Dynamic sampling."""
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    """Mismatch between rollout engine and training engine."""
    own_needs: EstimatorNeeds | None = field(default=None, metadata=NOT_A_KEY)
    """What an estimator of custom_path needs, once `resolve_algorithms` has executed the file."""

    @property
    def needs(self) -> EstimatorNeeds:
        """What the estimator needs besides rewards."""
        needs = self.own_needs or ADVANTAGE_ESTIMATORS.get(self.adv_estimator)
        assert needs is not None, f"{self.adv_estimator}: resolve_algorithms comes first"
        return needs

    @property
    def is_resolved(self) -> bool:
        """Whether `needs` is known: not for a user's estimator before its file is executed."""
        return self.own_needs is not None or self.adv_estimator in ADVANTAGE_ESTIMATORS


@dataclass(frozen=True)
class CustomRewardConfig:
    """A user's own reward function."""

    path: UserPath | None = None
    """Python file; null for the scorer of each row's data_source."""
    name: str = "compute_score"
    """Function in it, plain or async: fn(data_source, solution_str, ground_truth, extra_info=None,
    **kwargs)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra keyword arguments."""


@dataclass(frozen=True)
class OverlongBufferConfig:
    """Soft penalty on responses that come near data.max_response_length (DAPO); training only."""

    enable: bool = False
    """Add min(0, (max_response_length - len - length) / len) x penalty_factor to each score."""
    len: Count = 4096
    """The last N tokens are penalized; at most data.max_response_length."""
    penalty_factor: NotNegative = 1.0
    """Penalty at data.max_response_length."""


@dataclass(frozen=True)
class RewardConfig:
    """Scoring of completions."""

    method: Literal["flexible", "strict"] = "flexible"
    """How an answer is found: strict (after `####`, in a box), or flexible (otherwise the last
    number or expression)."""
    scorers: dict[str, str] = field(default_factory=dict)
    """Scorer (gsm8k, math_verify or boxed_exact) by data source, for new sources or instead of the
    built-in choice."""
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """Parts of the reward and their weights: accuracy (the answer's score), format, reward_model,
    and environment (what an environment gives for turns, each on its turn)."""
    format: Literal["boxed", "hashes", "think"] = "boxed"
    """Form that the part `format` rewards: boxed (one box), hashes (one `####`) or think (one
    block, then text)."""
    workers: Count = 1
    """Scoring processes."""
    timeout_s: Positive = 10.0
    """Deadline of one scoring call; its process, in which nothing else runs, is then killed."""
    max_error_rate: Share = 0.05
    """Share of completions that may end as error or timeout before the run stops."""
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)
    """Penalty on overlong responses."""


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out accuracy."""

    greedy: bool = True
    """Validate with greedy decoding, one completion per prompt."""
    sampled_n: CountOrZero = 0
    """Also validate with N samples per prompt at `temperature`; 0 for none."""
    temperature: Positive = 1.0
    """Temperature of the sampled validation."""


@dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    total_training_steps: Count | None = None
    """Steps of the run; null for total_epochs over the data."""
    total_epochs: Count = 1
    """Passes over the training data when total_training_steps is null."""
    seed: CountOrZero = 0
    """Seeds data order, sampling and initialization."""
    output_dir: UserPath = "runs/default"
    """Where everything the run writes goes."""
    val_before_train: bool = True
    """Validate once before the first step."""
    test_freq: CountOrZero = 10
    """Validate every N steps, and after the last; 0 for only after the last."""
    save_freq: CountOrZero = 0
    """Save a checkpoint every N steps, and after the last; 0 for only after the last."""
    save_at_end: bool = True
    """Save a checkpoint after the last step."""
    save_optimizer: bool = True
    """Put optimizer state and schedule into checkpoints; an exact resume needs them."""
    save_hf: Literal["last", "always", "never"] = "last"
    """Which checkpoints hold the actor as a Hugging Face folder, hf/; `rlhf3d convert` makes one
    later."""
    async_save: bool = False
    """Continue with the next step once every rank has copied its share, which takes that much more
    host memory."""
    keep_last: Count | None = None
    """Keep the N newest checkpoints (and those of keep_best), remove the others; null keeps all."""
    keep_best: CountOrZero = 0
    """With keep_last: also keep the N best checkpoints by best_metric."""
    best_metric: str | None = None
    """Validation metric, higher is better; null for the first val-core/…/acc/… of the run."""
    resume_mode: UserPath = "auto"
    """auto (from the newest complete checkpoint of an unfinished run in output_dir), never, or the
    folder of a checkpoint."""
    resume_fresh_optimizer: bool = False
    """Resume from a checkpoint without optimizer state, with fresh optimizers."""
    critic_warmup: CountOrZero = 0
    """Steps that update the critic only."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do on a NaN or infinity in loss or gradient: stop the run, or skip that optimizer
    step on every rank."""
    logger: tuple[TrackerName, ...] = ("tensorboard",)
    """Trackers that get the metrics and samples of metrics.jsonl and samples/ too; [] for none.
    Libraries are extras: `pip install 'rlhf3d[wandb]'`."""
    project_name: str = "rlhf3d"
    """Project (in MLflow, experiment) of the run in trackers."""
    experiment_name: str | None = None
    """Name of the run in trackers; null for that of the folder output_dir."""
    logger_samples: CountOrZero = 8
    """Completions of a step or of a validation that trackers get, the first ones; 0 for none."""
    sample_tokens: CountOrZero = 8
    """Trajectories a step whose tokens are kept, with authors and log-probs, for `rlhf3d samples
    --tokens`; 0 for none."""
    profile_steps: tuple[Count, ...] = ()
    """Steps of which it is written what every process did, and when, such as [3, 7];
    docs/profiling.md."""
    profile_operations_s: NotNegative = 0.0
    """Also trace torch's operations there, in the first N seconds of each phase on each rank; 0 for
    none."""
    grad_spike_factor: Positive = 5.0
    """Report a gradient norm above N times the median of the 20 steps before."""
    max_wall_clock_s: Positive | None = None
    """Save and stop, with exit code 75, in time to end within N seconds of the start; null for no
    limit."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the ranks run."""

    platform: Literal["auto", "cpu", "cuda", "as_gpu"] = "auto"
    """Where the ranks compute; as_gpu is CPU processes under the rules of GPUs, for `rlhf3d
    rehearse --as-gpu`."""
    ray_address: str | None = None
    """Address of a running Ray cluster; null starts one for this run."""
    num_nodes: Count = 1
    """Nodes over which the layout is spread; on CPU those of a cluster that ray_address names."""
    gpus_per_node: Count = 8
    """GPUs of each node (ignored on CPU)."""
    threads_per_rank: Count | None = None
    """CPU threads per training rank; null divides a node's cores among its group's ranks there."""
    startup_timeout_s: Positive = 300.0
    """Deadline for all workers to come up."""
    phase_timeout_s: Positive = 1800.0
    """Deadline of any one phase of a step; of generation, of each engine step."""


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
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def needs_critic(self) -> bool:
        """Whether the estimator needs values."""
        return self.algorithm.needs.values

    @property
    def needs_reference(self) -> bool:
        """The reference model is placed only where a KL term uses it."""
        return self.actor.use_kl_loss or self.algorithm.use_kl_in_reward

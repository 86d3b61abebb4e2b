"""vLLM behind the rollout interface: one tensor-parallel rank of an engine, in this process.

Invariant: an engine serves only weights that were verified, loaded and published in this process;
from the start of an update until `publish` it does not generate, and no key or value that weights
before it made is read afterwards. It starts from dummy weights, so
nothing else could be served; or, for evaluation, from those of the model folder, which are policy
0.

The ranks of an engine are equals: each schedules the same requests and computes the same
completions (vLLM's external_launcher), so all must get the same calls in the same order: see
`EngineLoop`. Any process can be a rank, so a rank can be put on the GPU of the training rank whose
weights it shares most of. One thread starts and uses an engine.
Runs in: engine rank, or the process of `rlhf3d evaluate`. The driver imports this file to name the
methods it calls, so vLLM and torch are imported inside them.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.imports import quick_imports
from rlhf3d.models.spec import architecture
from rlhf3d.observability.profile.recorder import span
from rlhf3d.parallel.meeting import host_meeting
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.api import PART_S, Completion, Request, SyncReport, Versions
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.step_spans import StepSpans
from rlhf3d.rollout.vllm_patches import ask_driver_for_peers, meet_at
from rlhf3d.rollout.vllm_scheduler import finish_steps_under_way, holding_back
from rlhf3d.units import GIB

if TYPE_CHECKING:
    from rlhf3d.rollout.worker_extension import WeightSyncWorker

P = ParamSpec("P")
R = TypeVar("R")

MEETING_S = 300.0
"""Deadline for the ranks of an engine to meet."""
WORKER_EXTENSION = "rlhf3d.rollout.worker_extension.WeightSyncWorker"


class VLLMEngine:
    """A rank of a `RolloutEngine`.

    One per process: vLLM reads settings from the environment, which `start` sets.
    """

    def __init__(self, settings: EngineSettings, *, threads: int = 1, rank: int = 0) -> None:
        """Make rank `rank` of an engine, with `threads` CPU threads; `start` starts vLLM."""
        rollout, platform = settings.rollout, settings.platform
        self._settings, self._threads, self._rank = settings, threads, rank
        # vLLM's sleep frees nothing on CPU.
        self._frees_memory = rollout.sleep and platform.kind == "cuda"
        self._forgets = rollout.sleep and platform.sleep_forgets
        # Parts whose memory is released: weights and cache wake at different times.
        self._asleep: list[str] = []
        self._loaded_version: int | None = None
        self._policy_version: int | None = None
        # Asked again after an update, when the prefix cache must not know it any more.
        self._served_prompt: Sequence[int] = ()
        self._llm: Any = None
        self._numbers: dict[str, int] = {}
        """Unfinished requests: the caller's number by vLLM's name."""
        self._outputs: list[Any] = []
        """Outputs that were finished by an update of the weights, for the next step to return."""
        self._spans = StepSpans()
        self._worker: type[WeightSyncWorker]

    def start(self, meeting: tuple[str, int] | None = None, host: str = "127.0.0.1") -> VLLMEngine:
        """Start vLLM; return the engine itself.

        An engine's ranks, where there are several, meet at `meeting` (address, port) and find this
        one at the address `host`.
        """
        settings, rollout, rank = self._settings, self._settings.rollout, self._rank
        on_cpu, threads = settings.platform.kind == "cpu", self._threads
        # Before vLLM is imported, which sets up its logging from them.
        os.environ.update(_environment(on_cpu, rollout.enforce_eager is True, threads))
        if rollout.tensor_parallel_size > 1:
            assert meeting is not None, "the ranks of an engine must know where to meet"
            # After the settings above, whose VLLM_HOST_IP it replaces.
            os.environ.update(_rank_environment(rank, rollout.tensor_parallel_size, host))
            # Rank 0's process owns the port and serves there; in the others this does nothing.
            host_meeting(meeting[1], MEETING_S)
            meet_at(rank, *meeting)
            if not on_cpu:
                ask_driver_for_peers()
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_memory_bytes
        with quick_imports():
            import torch

            # Where torch was imported before, it has read OMP_NUM_THREADS before it was set.
            torch.set_num_threads(threads)
            from torch._dynamo import config as dynamo
            from vllm import LLM, SamplingParams

            from rlhf3d.models.hf_io import model_view

        # As with the number of threads.
        if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            dynamo.disable = True
        self._params = SamplingParams
        path, own = settings.model_path, settings.load_weights
        # By its own rules vLLM would take weights that transformers does not from a folder that
        # holds more than the model.
        with model_view(path) if own else nullcontext(path) as folder:
            self._llm = LLM(str(folder), **_llm_arguments(settings))
        from rlhf3d.rollout.worker_extension import WeightSyncWorker  # imports vLLM

        self._worker = WeightSyncWorker
        if settings.load_weights:
            self._loaded_version = 0
            self.publish(0)
        if meeting is not None:
            _forget_shared_memory(meeting[1])
        return self

    @property
    def policy_version(self) -> int | None:
        """The policy version that is served, if any."""
        return self._policy_version

    def submit(self, requests: Mapping[int, Request]) -> None:
        """See `Engines.submit`."""
        version = self._policy_version
        if version is None:
            raise RuntimeError(
                "this engine serves no policy yet: update_weights, then publish, come before "
                "requests"
            )
        for request in requests.values():
            request.check_fits(self._settings.max_model_len)
        assert not requests.keys() & set(self._numbers.values()), "a number is in use"
        prompts = [request.prompt_ids for request in requests.values()]
        params = [self._sampling_params(request) for request in requests.values()]
        names = self._enqueue(prompts, params)
        self._numbers |= zip(names, requests, strict=True)
        self._spans.submitted(requests)
        # The longest: the cache holds whole blocks only, and a short prompt may fill none.
        self._served_prompt = max([self._served_prompt, *prompts], key=len)

    @property
    def unfinished(self) -> bool:
        """Whether requests are being worked on."""
        return bool(self._numbers)

    @property
    def can_step(self) -> bool:
        """Whether requests are unfinished and weights are published."""
        return self.unfinished and self._policy_version is not None

    def step(self) -> dict[int, Completion]:
        """Take one engine step: each unfinished request that has a place gets a token.

        Returns the completions that finished in it, by number; none on ranks after the first, which
        compute the same.
        """
        assert self._policy_version is not None, "a step of an engine that serves nothing"
        completions = {}
        outputs, self._outputs = self._outputs, []
        self._spans.before(self._llm)
        outputs += self._step()
        self._spans.after(self._llm, outputs, self._numbers)
        for output in outputs:
            # Of a request that was aborted, nothing is wanted any more.
            number = self._numbers.pop(output.request_id, None)
            if self._rank == 0 and number is not None:
                completions[number] = _completion(output.outputs[0])
        return completions

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        """See `Engines.poll`; takes the engine's steps itself, in the caller's thread."""
        assert self._settings.rollout.tensor_parallel_size == 1, "ranks step in an `EngineLoop`"
        completions: dict[int, Completion] = {}
        began = time.monotonic()
        while self.unfinished:
            completions |= self.step()
            # A part every PART_S: one by one, completions would cost a message each.
            if time.monotonic() - began > (PART_S if completions else timeout_s):
                break
        return completions

    def abort(self, numbers: Collection[int]) -> None:
        """See `Engines.abort`."""
        names = [name for name, number in self._numbers.items() if number in numbers]
        self._llm.llm_engine.abort_request(names)
        self._spans.aborted(self._numbers.pop(name) for name in names)

    def agree(self, number: int, timeout_s: float) -> int:
        """Return the number that rank 0 gives; every rank of the engine must ask at the same point.

        Raises RuntimeError where rank 0 does not within `timeout_s`, or is gone.
        """
        if self._settings.rollout.tensor_parallel_size == 1:
            return number
        import torch
        import torch.distributed as dist
        from vllm.distributed import get_world_group

        told = torch.tensor([number])
        # Over gloo also on GPUs, where the host would otherwise wait for all that was queued.
        work = dist.broadcast(told, 0, get_world_group().cpu_group, async_op=True)
        try:
            with span("wait for the other ranks", "wait"):
                work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise RuntimeError(
                f"the ranks of this engine did not agree on the next step within {timeout_s:.0f} s "
                f"(this is rank {self._rank}): {error}"
            ) from error
        return int(told)

    def _sampling_params(self, request: Request) -> Any:
        sampling, stops = request.sampling, self._settings.stops
        return self._params(
            seed=request.seed,
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=sorted({*stops.token_ids, *sampling.stop_token_ids}),
            stop=list(stops.strings),
            # Text is made for stop strings only: callers get token ids.
            detokenize=bool(stops.strings),
            include_stop_str_in_output=True,
            skip_special_tokens=False,  # a stop string may be one
            # 0: of the sampled token alone; flat: lists of numbers, no object per token.
            logprobs=0,
            flat_logprobs=True,
        )

    def open_weights(self, setup: SyncSetup, engine: int, meeting: tuple[str, int] | None) -> None:
        """See `RolloutEngine.open_weights`."""
        self._on_worker(self._worker.open_weights, setup, engine, meeting)

    def update_weights(self, policy_version: int, sync: int) -> SyncReport:
        """See `RolloutEngine.update_weights`."""
        # First of all, so that an engine whose update fails refuses to generate.
        self._policy_version = self._loaded_version = None
        in_flight = self._settings.rollout.update == "in_flight"
        if self._numbers and not in_flight:
            raise RuntimeError(
                f"{len(self._numbers)} requests are running, and with rollout.update="
                f"{self._settings.rollout.update} weights enter when none is: report this"
            )
        self._outputs += finish_steps_under_way(self._llm)
        self._wake("weights")
        report = self._on_worker(self._worker.receive_weights, policy_version, sync)
        # All running requests are preempted: their keys and values are computed again with the new
        # weights, and their generators go on where they are. A cache salt a version would keep old
        # blocks from new requests only, and not from those that run.
        if not self._llm.reset_prefix_cache(reset_running_requests=in_flight):
            raise RuntimeError("vLLM kept its prefix cache, computed with the old weights")
        self._loaded_version = policy_version
        return report

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self._policy_version = self._loaded_version = None
        # Also where a sync failed: it has woken the weights, and the cache sleeps on.
        if self._frees_memory and "weights" not in self._asleep:
            self._llm.sleep(level=2)  # no copy is kept: the weights will be sent again
            self._asleep = ["weights", "kv_cache"]
        if self._forgets:
            self._on_worker(self._worker.forget_weights)

    def publish(self, policy_version: int) -> None:
        """See `RolloutEngine.publish`."""
        if policy_version != self._loaded_version:
            raise RuntimeError(
                f"cannot publish policy {policy_version}: loaded is {self._loaded_version}"
            )
        # vLLM notes it with every token from now on.
        self._llm.llm_engine.set_weight_version(str(policy_version))
        self._policy_version = policy_version

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """See `RolloutEngine.score`; each sequence has 2 to max_model_len - 1 tokens."""
        if self._loaded_version is None:
            raise RuntimeError("this engine holds no policy yet: update_weights comes before score")
        for sequence in token_ids:
            # The first token has no prediction; one more place is for the token vLLM must generate.
            if not 2 <= len(sequence) < self._settings.max_model_len:
                most = self._settings.max_model_len - 1
                raise ValueError(f"cannot score {len(sequence)} tokens: 2 to {most} are possible")
        params = self._params(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        # A request's temperature does not touch log-probs of its prompt: the logits are scaled.
        self._on_worker(self._worker.set_logit_scale, 1.0 / temperature)
        try:
            # With prompt log-probs vLLM does not read the prefix cache: it computes every position.
            outputs = self._run(token_ids, [params] * len(token_ids))
        finally:
            self._on_worker(self._worker.set_logit_scale, 1.0)
        logprobs = []
        for output, sequence in zip(outputs, token_ids, strict=True):
            flat = output.prompt_logprobs
            # Flat log-probs have no entry for the first token.
            assert flat.token_ids == list(sequence[1:]), "vLLM's log-probs are of other tokens"
            logprobs.append(flat.logprobs)
        return logprobs

    def cached_tokens(self) -> int:
        """See `RolloutEngine.cached_tokens`; 0 where no prompt was served yet."""
        if not self._served_prompt:
            return 0
        params = self._params(temperature=0.0, max_tokens=1, detokenize=False)
        return int(self._run([self._served_prompt], [params])[0].num_cached_tokens or 0)

    def close(self) -> None:
        """Shut vLLM down and stop its processes; a second call does nothing."""
        if self._llm is not None:
            self._policy_version = self._loaded_version = None
            # Before the shutdown, after which there is no worker to call.
            self._on_worker(self._worker.close_weights)
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _wake(self, part: str) -> None:
        """Take memory again, where this engine sleeps.

        For the weights, before they are written. For the cache, before the first request: by then
        training ranks have released theirs.
        """
        if part in self._asleep:
            self._llm.wake_up(tags=[part])
            self._asleep.remove(part)

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        """vLLM's output of each prompt, in order.

        Requests may be unfinished where they wait for `publish`: these steps are not theirs.
        """
        assert not self.can_step, "requests are running"
        finished: dict[str, Any] = {}
        with holding_back(self._llm):
            names = self._enqueue(prompts, params)
            while len(finished) < len(names):
                for output in self._step():
                    finished[output.request_id] = output
        return [finished[name] for name in names]

    def _enqueue(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[str]:
        """Give requests to vLLM; the names by which it calls them."""
        self._wake("kv_cache")
        first = self._llm.request_counter.counter  # vLLM names requests by counting them
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        self._llm.enqueue(inputs, list(params), use_tqdm=False)
        return [str(first + place) for place in range(len(prompts))]

    def _step(self) -> list[Any]:
        """vLLM's outputs that finish in one engine step."""
        return [output for output in self._llm.llm_engine.step() if output.finished]

    def _on_worker(
        self,
        method: Callable[Concatenate[WeightSyncWorker, P], R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Call a method that this project adds to vLLM's worker, which is in this process."""
        answers: list[R] = self._llm.collective_rpc(method.__name__, args=args, kwargs=kwargs)
        return answers[0]


def _llm_arguments(settings: EngineSettings) -> dict[str, Any]:
    """The arguments of `vllm.LLM`, besides the model's folder."""
    rollout, on_cpu = settings.rollout, settings.platform.kind == "cpu"
    # Logits in fp32 on GPUs, as the trainer's: rounded to bfloat16 they are off by up to 0.06.
    head_dtype = "model" if on_cpu else "float32"
    quantization = None if rollout.quantization == "none" else rollout.quantization
    of_platform = _cpu_arguments(settings) if on_cpu else _gpu_arguments(rollout)
    return {
        # By itself vLLM would look for files in the format of Mistral first.
        "config_format": "hf",
        "hf_overrides": partial(_complete_config, head_dtype=head_dtype),
        "dtype": rollout.dtype,
        "quantization": quantization,
        "load_format": "safetensors" if settings.load_weights else "dummy",
        "skip_tokenizer_init": not settings.stops.strings,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "distributed_executor_backend": _executor(rollout),
        "enable_expert_parallel": rollout.expert_parallel,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": rollout.enforce_eager,
        "seed": settings.seed,
        # The samples of a prompt share its keys and values.
        "enable_prefix_caching": True,
        # Of the distribution that tokens are drawn from: after temperature, top-p and top-k.
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WORKER_EXTENSION,
        **of_platform,
    }


def _executor(rollout: RolloutConfig) -> str | None:
    """Who runs vLLM's workers: with several ranks each process is a worker of its own."""
    return "external_launcher" if rollout.tensor_parallel_size > 1 else None


def _cpu_arguments(settings: EngineSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "kv_cache_memory_bytes": int(settings.rollout.kv_cache_gib * GIB),
        # For a prompt cut into chunks vLLM takes back a draw of the request's generator, which only
        # CUDA's can.
        "enable_chunked_prefill": False,
        # Without chunks, one step must take the longest prompt whole.
        "max_num_batched_tokens": max(4096, settings.max_model_len),
    }
    if settings.platform.kv_block_tokens is not None:
        arguments["block_size"] = settings.platform.kv_block_tokens
    return arguments


def _gpu_arguments(rollout: RolloutConfig) -> dict[str, Any]:
    return {
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        # Of vLLM's expert kernels on CUDA, Triton's keep weights where the weight sync writes them.
        "moe_backend": "triton",
        "enable_sleep_mode": rollout.sleep,
    }


def _complete_config(config: Any, head_dtype: str) -> Any:
    """Name the class of the model's type, and the dtype of the logits.

    By `architectures` vLLM would take another class, or none where that is null.
    """
    config.architectures = [architecture(config.model_type, "CausalLM")]
    config.head_dtype = head_dtype
    return config


def _completion(output: Any) -> Completion:
    # Arrays: one object per completion instead of one per token.
    tokens, flat = array("i", output.token_ids), output.logprobs
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM ended a completion with {output.finish_reason!r} after {len(tokens)} tokens"
        )
    assert array("i", flat.token_ids) == tokens, "vLLM's log-probs are of other tokens"
    return Completion(
        tokens, array("f", flat.logprobs), output.finish_reason, _versions(output, len(tokens))
    )


def _versions(output: Any, tokens: int) -> Versions:
    """As vLLM noted them, token by token."""
    spans = output.weight_versions
    assert spans, "vLLM noted no version of the weights that wrote a completion"
    # Each ends where the next begins; `Completion` checks the rest.
    ends = [span.end for span in spans]
    begins = [span.start for span in spans]
    assert [0, *ends] == [*begins, tokens], f"vLLM's {spans} are not of {tokens} tokens"
    return tuple((span.start, int(span.version)) for span in spans)


def _forget_shared_memory(port: int) -> None:
    """Remove the files that vLLM's CPU ranks share, now that all have opened them.

    Without a name the memory is freed when the processes end, however they do.
    """
    # vLLM names them by the port of the init method.
    for file in Path("/dev/shm").glob(f"{port}-*-cpushm_*"):
        file.unlink(missing_ok=True)


def _rank_environment(rank: int, ranks: int, host: str) -> dict[str, str]:
    """What torchrun would set, each rank seeing one device, and this one's address."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": "1",
        "VLLM_HOST_IP": host,
        # torch's symmetric memory would fail: to it, processes that each have a device 0 are on
        # one device.
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    }


def _environment(on_cpu: bool, enforce_eager: bool, threads: int) -> dict[str, str]:
    settings = {
        # Core and worker in this process: external_launcher demands it, and `_on_worker` passes
        # objects that are not serialized.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        # vLLM takes YaRN's window from max_position_embeddings alone; ours was checked against
        # the model's.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    if on_cpu:
        # "auto" would reserve a core and bind every engine of this host to the same ones.
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if on_cpu and enforce_eager:
        # vLLM's ranks of log-probs, which nobody reads, would otherwise be compiled at the first
        # request: that takes seconds, and a C++ compiler on the user's machine.
        settings["TORCH_COMPILE_DISABLE"] = "1"
    return settings

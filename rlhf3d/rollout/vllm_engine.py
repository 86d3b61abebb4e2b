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

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from rlhf3d.observability.profile.recorder import span
from rlhf3d.resharding.setup import SyncSetup
from rlhf3d.rollout.api import PART_S, Completion, Request, SyncReport
from rlhf3d.rollout.settings import EngineSettings
from rlhf3d.rollout.step_spans import StepSpans
from rlhf3d.rollout.vllm_requests import completion_of, one_token, sampling_params
from rlhf3d.rollout.vllm_scheduler import finish_steps_under_way, holding_back
from rlhf3d.rollout.vllm_start import start_vllm

if TYPE_CHECKING:
    from rlhf3d.rollout.worker_extension import WeightSyncWorker

P = ParamSpec("P")
R = TypeVar("R")


class VLLMEngine:
    """A rank of an engine.

    `open_weights` comes once; then each `update_weights` loads, and `publish` makes it serve:
    between the two, `score` and `cached_tokens` can check it, also where requests wait in it; while
    requests run they fail. One per process: vLLM reads settings from the environment, which `start`
    sets.
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
        self._llm = start_vllm(self._settings, self._rank, self._threads, meeting, host)
        from rlhf3d.rollout.worker_extension import WeightSyncWorker  # imports vLLM

        self._worker = WeightSyncWorker
        if self._settings.load_weights:
            self._loaded_version = 0
            self.publish(0)
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
        params = [sampling_params(request, self._settings.stops) for request in requests.values()]
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
                completions[number] = completion_of(output.outputs[0])
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

    def open_weights(self, setup: SyncSetup, engine: int, meeting: tuple[str, int] | None) -> None:
        """Open the weight stream's end of this engine, which is number `engine` of the setup."""
        self._on_worker(self._worker.open_weights, setup, engine, meeting)

    def update_weights(self, policy_version: int, sync: int) -> SyncReport:
        """Receive, verify and load the stream's sync number `sync`.

        With rollout.update=in_flight requests may be running. They wait until `publish` and then go
        on under the new weights, which compute their keys and values again: the log-prob of each
        further token is that of the new weights, given all tokens before it.

        Raises SyncError, naming the tensor, when it does not verify; the engine then serves nothing
        any more.
        """
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
        """Serve nothing and release what memory can be released, until the next update."""
        self._policy_version = self._loaded_version = None
        # Also where a sync failed: it has woken the weights, and the cache sleeps on.
        if self._frees_memory and "weights" not in self._asleep:
            self._llm.sleep(level=2)  # no copy is kept: the weights will be sent again
            self._asleep = ["weights", "kv_cache"]
        if self._forgets:
            self._on_worker(self._worker.forget_weights)

    def publish(self, policy_version: int) -> None:
        """Serve what was loaded. Raises RuntimeError for another `policy_version`."""
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
        """Return log p(token t | tokens before t) for t = 1, 2, … of each sequence.

        Each has 2 to max_model_len - 1 tokens.
        """
        if self._loaded_version is None:
            raise RuntimeError("this engine holds no policy yet: update_weights comes before score")
        for sequence in token_ids:
            # The first token has no prediction; one more place is for the token vLLM must generate.
            if not 2 <= len(sequence) < self._settings.max_model_len:
                most = self._settings.max_model_len - 1
                raise ValueError(f"cannot score {len(sequence)} tokens: 2 to {most} are possible")
        params = one_token(prompt_logprobs=True)
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
        """Return how many tokens of an earlier prompt the prefix cache holds: 0 after an update.

        0 too where no prompt was served yet.
        """
        if not self._served_prompt:
            return 0
        return int(self._run([self._served_prompt], [one_token()])[0].num_cached_tokens or 0)

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

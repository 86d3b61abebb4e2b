"""A vLLM engine in a child process whose weights are written as a weight sync writes them.

Its oracle.

Oracle: transformers on the same folder, in float32, on the CPU. Every engine lives in one child
process (vLLM patches torch and the environment), one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from rlhf3d.models.spec import ModelSpec, load_spec

# vLLM on CPU has no attention kernel for a head_dim below 32, and pads vocabularies to 64 rows.
TINY = {"hidden": 64, "heads": 2, "layers": 2, "vocab": 150}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",
}
TOKENS = [
    torch.randint(4, 150, (40,), generator=torch.Generator().manual_seed(i)).tolist()
    for i in range(3)
]
LLM: Any = None


def start_engine(
    folder: Path,
    dtype: str,
    pack: bool = True,
    environment: dict[str, str] | None = None,
    **settings: Any,
) -> None:
    """In the child: replace its engine; without `pack`, weights stay plain as on CUDA."""
    global LLM
    close_engine()
    os.environ.update(ENVIRONMENT | (environment or {}))
    if torch.version.cuda:
        os.environ.pop("TORCH_COMPILE_DISABLE", None)  # else there would be no graphs
    torch.set_num_threads(1)
    import vllm
    from vllm import _custom_ops

    if not torch.version.cuda:
        fork_workers()
        _custom_ops._supports_onednn = pack and hasattr(torch.ops._C, "create_onednn_mm_handler")
    defaults = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 16 << 20,
        "worker_extension_cls": "support.writer_worker.WriterWorker",
    }
    LLM = vllm.LLM(str(folder), dtype=dtype, **(defaults | settings))


def fork_workers() -> None:
    """In the child: have the ranks of an engine begin with its imports, which take most of a start.

    On CPU vLLM spawns them. Nothing that must not be forked is here before an engine of one rank.
    """
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")


def close_engine() -> None:
    """In the child: stop its engine, if any."""
    global LLM
    if LLM is not None:
        LLM.llm_engine.engine_core.shutdown()
        LLM = None


def sleep() -> None:
    """In the child: give the engine's memory back."""
    LLM.sleep(level=2)


def wake(part: str) -> None:
    """In the child: take memory again, for `weights` or `kv_cache`."""
    LLM.wake_up(tags=[part])


def rpc(method: str, *args: Any, **kwargs: Any) -> list[Any]:
    """In the child: a method of each worker."""
    answers: list[Any] = LLM.collective_rpc(method, args=args, kwargs=kwargs)
    return answers


def score() -> list[list[float]]:
    """In the child: log p of tokens 1, 2, ... of each of TOKENS."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = LLM.generate(
        [{"prompt_token_ids": tokens} for tokens in TOKENS], params, use_tqdm=False
    )
    return [
        [
            entry[token].logprob
            for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)
        ]
        for output, tokens in zip(outputs, TOKENS, strict=True)
    ]


def logprobs_of(model: Any) -> torch.Tensor:
    """Transformers' log p of tokens 1, 2, ... of each of TOKENS."""
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    return torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None])[..., 0]


class Rig:
    """A model that is trained (perturbed, here) and an engine in the child that follows it."""

    def __init__(
        self,
        child: ProcessPoolExecutor,
        folder: Path,
        dtype: str = "float32",
        engine: dict[str, Any] | None = None,
        **model: Any,
    ) -> None:
        self.child, self.folder, self.updates = child, folder, 0
        make_tiny_model(folder / "0", **TINY | model)
        self.spec: ModelSpec = load_spec(folder / "0")
        self.model = AutoModelForCausalLM.from_pretrained(folder / "0", dtype=torch.float32).eval()
        self.engine = engine or {}
        child.submit(start_engine, folder / "0", dtype, **self.engine).result()
        for path in self.rpc("shared_memory")[
            0
        ]:  # goes with its processes, now that all have opened it
            os.unlink(path)

    def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return self.child.submit(rpc, method, self.spec, *args, **kwargs).result()

    def update(self, **settings: Any) -> list[list[int]]:
        """Change every weight (what is stale shows), and write the new ones."""
        self.updates += 1
        generator = torch.Generator().manual_seed(self.updates)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        self.model.save_pretrained(self.folder / str(self.updates))
        if self.engine.get("enable_expert_parallel"):
            settings["expert_parallel"] = True
        return self.rpc("write_folder", self.folder / str(self.updates), **settings)

    def score(self) -> torch.Tensor:
        return torch.tensor(self.child.submit(score).result())

    def expected(self) -> torch.Tensor:
        return logprobs_of(self.model)

    def check(self, error: float = 1e-4, updates: int = 2, rests: bool = False) -> float:
        """Check that log-probs follow each of several updates within `error`.

        On average where they are rounded; returns the largest mean difference. `rests`: the engine
        sleeps before each, and its cache wakes after it.
        """
        stale, worst = self.expected(), 0.0
        for _ in range(updates):
            if rests:
                self.child.submit(sleep).result()
                self.child.submit(wake, "weights").result()
            self.update()
            if rests:
                self.child.submit(wake, "kv_cache").result()
            expected, scores = self.expected(), self.score()
            assert (expected - stale).abs().max() > 0.1, "the update must change the log-probs"
            if error <= 1e-4:
                torch.testing.assert_close(scores, expected, atol=error, rtol=0)
            worst = max(worst, float((scores - expected).abs().mean()))
            stale = expected
        assert worst < error
        return worst

    def check_memory(self) -> None:
        """Packed copies of earlier weights are freed: 25 loads take less than two models more."""
        weights = sum(weight.numel() * 4 for weight in self.model.parameters())
        assert weights > 3e6, "a model that would not show in the resident bytes proves nothing"
        ((*_, settled), (*_, end)) = (self.update(times=times)[0] for times in (5, 25))
        assert end - settled < 2 * weights, f"{end - settled} bytes in 25 loads of {weights}"

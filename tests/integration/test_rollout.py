"""Real vLLM, fed through the staging area: its log-probs are those of the new weights, and faults are refused.

Every engine lives in one child process (vLLM patches torch and the environment), one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from rlhf3d.models.weights import full_box
from rlhf3d.resharding.staging import StagingArea, StagingError, plan_staging
from rlhf3d.rollout.api import Completion, Request, SamplingSettings, SyncReport
from rlhf3d.rollout.vllm_engine import VLLMEngine

# vLLM on CPU has no attention kernel for a head_dim below 32.
TINY = {"hidden": 64, "heads": 2, "kv_heads": 2, "layers": 2}
PROMPT_TOKENS = 140
"""More than one KV block (128 tokens on CPU), so that the prefix cache has something to keep."""
ENGINE: VLLMEngine | None = None


def start_engine(**settings: Any) -> None:
    """In the child: replace its engine."""
    global ENGINE
    close_engine()
    ENGINE = VLLMEngine(dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_gib=0.05, **settings)


def close_engine() -> list[str]:
    """In the child: close its engine; what is left in /dev/shm by this process's descendants."""
    if ENGINE is not None:
        ENGINE.close()
        ENGINE.close()
    return [name for name in os.listdir("/dev/shm") if "cpushm" in name]


def call(method: str, *args: Any) -> Any:
    """In the child: a method (or property) of its engine."""
    value = getattr(ENGINE, method)
    return value(*args) if callable(value) else value


def mapped_areas() -> int:
    """In the child: mappings of staging areas."""
    return Path("/proc/self/maps").read_text().count("staging-test")


class Rig:
    """A trained model (transformers, here), a staging area and an engine in the child."""

    def __init__(self, child: ProcessPoolExecutor, folder: Path, tensor_parallel_size: int = 1, **model: Any) -> None:
        self.child, self.version = child, 0
        make_tiny_model(folder / "model", **TINY | model)
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        self.weights = {
            k: v for k, v in self.model.state_dict().items() if not (model["tie"] and k == "lm_head.weight")
        }
        slices = []
        for name, weight in self.weights.items():  # as two tensor-parallel senders would cut them
            half = weight.shape[0] // 2
            slices += [(name, ((a, b), *full_box(weight.shape[1:]))) for a, b in ((0, half), (half, weight.shape[0]))]
        self.plan = plan_staging({k: tuple(v.shape) for k, v in self.weights.items()}, torch.float32, slices)
        self.area = StagingArea.create(self.plan, folder / "staging-test")
        child.submit(start_engine, model_path=folder / "model", tensor_parallel_size=tensor_parallel_size).result()

    def call(self, method: str, *args: Any) -> Any:
        return self.child.submit(call, method, *args).result()

    def perturb(self) -> None:
        """Change every weight: stale parts of the engine would show."""
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))

    def write(self, skip: str = "") -> None:
        """Write the next version, but for the first slice of tensor `skip`."""
        self.version += 1
        for name, box in self.plan.slices:
            if not (name == skip and box[0][0] == 0):
                self.area.write(name, box, self.weights[name][slice(*box[0])], self.version)

    def load(self) -> SyncReport:
        return self.call("update_weights", self.plan, self.area.path, self.version)

    def sync(self) -> SyncReport:
        self.perturb()
        self.write()
        report = self.load()
        self.call("publish", self.version)
        return report

    def generate(self, count: int = 3, **sampling: Any) -> list[tuple[Request, Completion]]:
        settings = SamplingSettings(**{"max_tokens": 8} | sampling)
        generator = torch.Generator().manual_seed(7)
        prompt = torch.randint(4, 128, (PROMPT_TOKENS,), generator=generator).tolist()
        # All share their first 139 tokens.
        requests = [Request((*prompt[:-1], 10 + i), seed=100 + i) for i in range(count)]
        return list(zip(requests, self.call("generate", requests, settings), strict=True))

    def expected(self, tokens: tuple[int, ...], temperature: float = 1.0) -> torch.Tensor:
        """log p of tokens 1, 2, ... by transformers."""
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0, :-1]
        return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]

    def check(self, temperature: float = 1.0, greedy: bool = False) -> None:
        """Sampled and scored log-probs are transformers' on the current weights."""
        pairs = self.generate(temperature=temperature, greedy=greedy)
        texts = [request.prompt_ids + completion.token_ids for request, completion in pairs]
        scores = self.call("score", texts, temperature)
        for tokens, (_, completion), scored in zip(texts, pairs, scores, strict=True):
            expected = self.expected(tokens, temperature)
            assert completion.policy_version == self.version
            torch.testing.assert_close(torch.tensor(scored), expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), expected[PROMPT_TOKENS - 1 :], atol=1e-4, rtol=0
            )


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
        assert pool.submit(close_engine).result() == []


@pytest.fixture(scope="module")
def llama(child: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    """Tied embeddings: the head is packed apart and must follow."""
    rig = Rig(child, tmp_path_factory.mktemp("llama"), family="llama", tie=True)
    with pytest.raises(RuntimeError, match="serves no policy yet"):
        rig.generate()
    with pytest.raises(RuntimeError, match="holds no policy yet"):
        rig.call("score", [(5, 6)])
    return rig


def test_tied_engine_follows_two_updates(llama: Rig) -> None:
    for _ in range(2):
        report = llama.sync()
        assert (report.num_bytes, report.num_slices) == (llama.plan.weight_bytes, len(llama.plan.slices))
        llama.check()
        assert llama.call("policy_version") == llama.version


def test_temperature_and_greedy(llama: Rig) -> None:
    llama.sync()
    llama.check(temperature=0.7)
    pairs = llama.generate(greedy=True, temperature=0.7)
    for request, completion in pairs:
        tokens = request.prompt_ids + completion.token_ids
        with torch.no_grad():
            best = torch.log_softmax(llama.model(torch.tensor([tokens])).logits[0, PROMPT_TOKENS - 1 : -1], -1).max(-1)
        assert best.indices.tolist() == list(completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), best.values, atol=1e-4, rtol=0)


def test_seeds_and_stops(llama: Rig) -> None:
    llama.sync()
    once, again, alone = llama.generate(8), llama.generate(8), llama.generate(1)
    assert [c.token_ids for _, c in once] == [c.token_ids for _, c in again]
    assert alone[0][1].token_ids == once[0][1].token_ids
    assert len({c.token_ids for _, c in once}) > 1
    tokens = once[0][1].token_ids
    assert once[0][1].finish_reason == "length" and len(tokens) == 8
    _, stopped = llama.generate(1, stop_token_ids=(tokens[3],))[0]
    assert stopped.finish_reason == "stop" and stopped.token_ids == tokens[: tokens.index(tokens[3]) + 1]
    with pytest.raises(ValueError, match="do not fit max_model_len=256"):
        llama.generate(1, max_tokens=200)


def test_faults_are_refused_and_recovered_from(llama: Rig) -> None:
    llama.sync()
    name = "model.layers.1.mlp.down_proj.weight"
    llama.perturb()
    llama.write(skip=name)
    with pytest.raises(StagingError, match=rf"{name} .* holds policy version {llama.version - 1}"):
        llama.load()
    with pytest.raises(RuntimeError, match="serves no policy yet"):
        llama.generate()
    with pytest.raises(RuntimeError, match="cannot publish"):
        llama.call("publish", llama.version)
    llama.write()
    with llama.area.path.open("r+b") as file:
        file.seek(llama.plan.tensors[name].offset + 1001)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(StagingError, match=f"{name} .* differs from what its sender wrote"):
        llama.load()
    llama.sync()
    llama.check()


def test_loaded_but_unpublished_scores_only(llama: Rig) -> None:
    llama.perturb()
    llama.write()
    llama.load()
    scored = llama.call("score", [tuple(range(5, 45))])
    torch.testing.assert_close(torch.tensor(scored[0]), llama.expected(tuple(range(5, 45))), atol=1e-4, rtol=0)
    with pytest.raises(RuntimeError, match="serves no policy yet"):
        llama.generate()
    assert llama.child.submit(mapped_areas).result() == 0


def test_untied_qwen2_follows_two_updates(child: ProcessPoolExecutor, tmp_path: Path) -> None:
    rig = Rig(child, tmp_path, family="qwen2", tie=False)
    for _ in range(2):
        rig.sync()
        rig.check()
    # Part of a fused QKV is refused, before it can serve.
    name = "model.layers.0.self_attn.k_proj.weight"
    rest = {k: v for k, v in rig.weights.items() if k != name}
    plan = plan_staging({k: tuple(v.shape) for k, v in rest.items()}, torch.float32)
    area = StagingArea.create(plan, tmp_path / "staging-test-rest")
    for key, weight in rest.items():
        area.write(key, full_box(weight.shape), weight, 9)
    with pytest.raises(ValueError, match=r"lacks weights of the engine's model\.layers\.0\.self_attn\.qkv_proj"):
        rig.call("update_weights", plan, area.path, 9)
    with pytest.raises(RuntimeError, match="serves no policy yet"):
        rig.generate()


def test_two_tensor_parallel_ranks(child: ProcessPoolExecutor, tmp_path: Path) -> None:
    rig = Rig(child, tmp_path, tensor_parallel_size=2, family="llama", tie=True)
    for _ in range(2):
        rig.sync()
        rig.check()
    rig.check(temperature=0.7)

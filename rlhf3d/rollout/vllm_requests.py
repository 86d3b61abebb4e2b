"""A request in vLLM's words, and vLLM's output in ours.

Invariant: token ids in, token ids out, each sampled token with its log-probability under the
distribution that it was drawn from, and with the policy version that wrote it.
Runs in: engine rank, or the process of `rlhf3d evaluate`.
"""

from __future__ import annotations

from array import array
from typing import Any

from rlhf3d.rollout.api import Completion, Request, Stops, Versions


def sampling_params(request: Request, stops: Stops) -> Any:
    """vLLM's parameters of a request, which the engine's `stops` end too."""
    from vllm import SamplingParams

    sampling = request.sampling
    return SamplingParams(
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


def one_token(*, prompt_logprobs: bool = False) -> Any:
    """Of requests whose prompts alone matter: vLLM must generate one token."""
    from vllm import SamplingParams

    if not prompt_logprobs:
        return SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    return SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
    )


def completion_of(output: Any) -> Completion:
    """What vLLM generated for a request."""
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

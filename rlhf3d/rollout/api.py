"""A rollout engine as the loop sees it: token ids in, token ids and log-probabilities out.

Invariant: every token of a completion has one policy version, that of the weights that wrote it.
Pure: no vLLM, no torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]

Versions = tuple[tuple[int, int], ...]
"""Which weights wrote which tokens: (first token, version) of each stretch that one version wrote.
The first begins at token 0, also where there is no token; both numbers ascend."""

POLL_S = 1.0
"""Seconds that a caller with nothing else to do waits in one `Engines.poll`."""
PART_S = 0.05
"""Seconds between two parts of completions of a busy engine: one by one they would cost a message
each."""


@dataclass(frozen=True)
class SamplingSettings:
    """How a completion is sampled."""

    temperature: float = 1.0
    """Divides the logits before the softmax; ignored when greedy."""
    top_p: float = 1.0
    """Nucleus sampling; 1.0 is off."""
    top_k: int = -1
    """Top-k sampling; -1 is off."""
    max_tokens: int = 512
    """Longest completion in tokens, stop token included."""
    greedy: bool = False
    """Take the most likely token; its log-probabilities are those at temperature 1."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, in addition to the engine's `Stops`."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: a completion has at least one token")
        # vLLM reads temperature 0 as greedy; here greedy is a field of its own.
        if not self.greedy and self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature}: must be above 0; for the most likely token set "
                "greedy"
            )


@dataclass(frozen=True)
class Stops:
    """What ends every completion of an engine before its limit."""

    token_ids: tuple[int, ...] = ()
    """Any of these tokens, which is then the completion's last."""
    strings: tuple[str, ...] = ()
    """Any of these texts: the token that completes it is the completion's last. All tokens up to it
    were generated, so all are trained on, and the text that is scored contains the string."""


NO_STOPS = Stops()


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    prompt_ids: Sequence[int]
    seed: int
    """Seeds this completion only: it does not depend on what else is in the batch."""
    sampling: SamplingSettings
    affinity: int | None = None
    """Number of the trajectory that this is a turn of: its turns share a prefix, which the engine
    that had the turn before keeps in its cache."""
    name: str = ""
    """What journals call it, the same in every run of a configuration: which trajectory, turn and
    attempt it is."""

    def check_fits(self, max_model_len: int) -> None:
        """Raise ValueError where prompt and completion may be longer than an engine's context.

        vLLM would cut the completion short there instead.
        """
        tokens = self.sampling.max_tokens
        if len(self.prompt_ids) + tokens > max_model_len:
            raise ValueError(
                f"a prompt of {len(self.prompt_ids)} tokens and max_tokens={tokens} do not fit "
                f"max_model_len={max_model_len}"
            )


@dataclass(frozen=True)
class Completion:
    """One sampled completion."""

    token_ids: Sequence[int]
    """Generated tokens, stop token included; engines return `array("i")`: no object per token."""
    logprobs: Sequence[float]
    """log p(token | prompt, earlier tokens) under the sampling distribution, one per token;
    `array("f")`."""
    finish_reason: FinishReason
    """stop: a stop token ended it; length: max_tokens did."""
    versions: Versions
    """Of the weights that wrote its tokens: several where some came while it was written."""
    text: str | None = None
    """Without special tokens, where the engine has a process of its own, which then makes it."""

    def __post_init__(self) -> None:
        check_versions(self.versions, len(self.token_ids))

    @property
    def oldest_version(self) -> int:
        """Of the weights that wrote its first token."""
        return self.versions[0][1]

    @property
    def newest_version(self) -> int:
        """Of the weights that wrote its last token."""
        return self.versions[-1][1]


@dataclass(frozen=True)
class SyncReport:
    """One weight update of one engine rank."""

    policy_version: int
    received_bytes: int
    """Bytes of weights."""
    wait_s: float
    """Seconds spent waiting for senders."""
    verify_s: float
    """Seconds to check versions and fingerprints."""
    load_s: float
    """Seconds to put the weights into vLLM's layers, its own packing included."""


class Engines(Protocol):
    """Where completions come from: one engine, or several behind one door.

    Requests go in at any time and completions come out as they finish. The caller numbers its
    requests; a number is free again once its completion was taken, or it was aborted.
    """

    def submit(self, requests: Mapping[int, Request]) -> None:
        """Queue requests, in the order of the mapping.

        Raises RuntimeError where no weights are served, ValueError for a request that does not fit
        the engine's context.
        """

    def poll(self, timeout_s: float) -> dict[int, Completion]:
        """The completions that finished since the last call, by number.

        Waits up to `timeout_s` for the first; {} then, and where nothing is unfinished.
        """

    def abort(self, numbers: Collection[int]) -> None:
        """Forget these requests; numbers that are not unfinished are ignored."""


def complete(
    engines: Engines,
    requests: Mapping[int, Request],
    wait_s: Callable[[float], float] = float,
) -> Generator[dict[int, Completion], None, None]:
    """Submit requests and yield their completions in parts, as they finish.

    A part is {} after `wait_s(POLL_S)` seconds in which none did. Those that are unfinished when
    the generator is closed are aborted.
    """
    engines.submit(requests)
    left = set(requests)
    while left:
        part = engines.poll(wait_s(POLL_S))
        left -= part.keys()
        try:
            yield part
        except GeneratorExit:
            # Left in the engines, they would answer later requests of the same numbers.
            engines.abort(left)
            raise


def written_by(version: int) -> Versions:
    """All tokens, however many, by the weights of one version."""
    return ((0, version),)


def check_versions(versions: Versions, tokens: int) -> None:
    """Fail where `versions` are not those of this many tokens."""
    firsts = [first for first, _ in versions]
    numbers = [version for _, version in versions]
    ascend = sorted(set(firsts)) == firsts and sorted(set(numbers)) == numbers
    # One version also wrote the end of what has no token.
    within = bool(versions) and firsts[0] == 0 and firsts[-1] < max(tokens, 1)
    assert ascend and within, f"versions {versions} of {tokens} tokens"


def stretches(versions: Sequence[Sequence[int]], tokens: int) -> Iterator[tuple[int, int, int]]:
    """(First token, the one after the last, version) of what each version wrote of `tokens`."""
    ends = [first for first, _ in versions[1:]] + [tokens]
    for (first, version), end in zip(versions, ends, strict=True):
        yield first, end, version


def token_versions(versions: Sequence[Sequence[int]], tokens: int) -> array[int]:
    """[tokens] the version that wrote each."""
    each = array("i")
    for first, end, version in stretches(versions, tokens):
        each.extend([version] * (end - first))
    return each


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a trajectory's turn: the first turn's is the trajectory's own."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def request_seed(run_seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """Return a 63-bit seed of one completion, the same in every process and Python version."""
    # Not hash(): Python's hash of a string differs from process to process.
    key = f"{run_seed}/{step}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1

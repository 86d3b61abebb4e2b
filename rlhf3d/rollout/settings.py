"""What an engine is started with.

Invariant: the same for every rank of a run's engines; what differs between ranks is an argument of
`VLLMEngine`. Pure: no vLLM, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf3d.config.schema import RolloutConfig
from rlhf3d.parallel.platform import Platform
from rlhf3d.rollout.api import NO_STOPS, Stops


@dataclass(frozen=True)
class EngineSettings:
    """An engine's model, its section of the configuration, and values of other sections."""

    model_path: str
    """HF folder: the architecture, and where `load_weights` says so the weights."""
    rollout: RolloutConfig
    """Its `auto` values replaced, see `resolve_rollout`."""
    max_model_len: int
    """Longest prompt plus completion, tokens."""
    platform: Platform
    seed: int = 0
    """vLLM's own; each request has one besides."""
    stops: Stops = NO_STOPS
    """What ends completions; only for strings is the folder's tokenizer loaded."""
    tokenizer: str | None = None
    """Folder of the tokenizer by which an engine in a process of its own makes the texts of its
    completions; None leaves that to whoever asks for them."""
    load_weights: bool = False
    """Serve the folder's weights as policy 0, instead of starting from dummy weights."""

    def __post_init__(self) -> None:
        unresolved = "auto" in (self.rollout.dtype, self.rollout.enforce_eager)
        assert not unresolved, f"not resolved for the platform: {self.rollout}"

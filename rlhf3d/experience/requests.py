"""What is asked for: trajectories of prompts, with seeds for what is sampled and for environments.

Invariant: a seed comes from the run's seed, the step, the prompt and the sample alone, and so does
the name by which a journal knows a trajectory. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf3d.data.dataset import Prompt
from rlhf3d.rollout.api import SamplingSettings, request_seed


@dataclass(frozen=True)
class TrajectoryRequest:
    """One trajectory that is wanted.

    Seeds are those of `request_seed`; the group's is its first sample's.
    """

    prompt: Prompt
    group: int
    """See `Trajectory.group`."""
    seed: int
    """Of what the policy samples."""
    environment_seed: int
    """Of its environment: that of the whole group, as only trajectories that begin alike can be
    compared."""
    sampling: SamplingSettings
    """Its `max_tokens` bounds all tokens after the first prompt, whoever writes them."""
    name: str = ""
    """What journals call it: `b3.p17.s2` is sample 2 of row 17, drawn for step 3."""

    def turn(self, turn: int, attempt: int) -> str:
        """The name of a request for one of its turns."""
        return f"{self.name}.t{turn}.a{attempt}" if self.name else ""


def greedy_sampling(max_tokens: int) -> SamplingSettings:
    """The most likely token each time."""
    return SamplingSettings(max_tokens=max_tokens, greedy=True)


class Requests:
    """Requests of one step (or one validation), which may be drawn in several parts.

    Seeds come from (run seed, step, prompt, sample). A prompt that comes again within a step gets
    new samples, not the old ones; each drawing of a prompt is a group of its own.
    """

    def __init__(self, run_seed: int, step: int, name: str | None = None) -> None:
        """`name` of what they are for; by default that of the step."""
        self.step = step
        self._run_seed, self._name = run_seed, f"b{step}" if name is None else name
        self._samples_of: Counter[int] = Counter()
        self._groups = 0

    def draw(
        self, prompts: Sequence[Prompt], n: int, sampling: SamplingSettings
    ) -> list[TrajectoryRequest]:
        """n requests for each prompt."""
        requests = []
        for prompt in prompts:
            first = self._samples_of[prompt.index]
            self._samples_of[prompt.index] += n
            seeds = [
                request_seed(self._run_seed, self.step, prompt.index, sample)
                for sample in range(first, first + n)
            ]
            for sample, seed in enumerate(seeds, first):
                name = f"{self._name}.p{prompt.index}.s{sample}"
                request = TrajectoryRequest(prompt, self._groups, seed, seeds[0], sampling, name)
                requests.append(request)
            self._groups += 1
        return requests

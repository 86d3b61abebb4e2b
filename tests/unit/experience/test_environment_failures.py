"""What is proposed where environments failed: keys that fit, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from support.talking import FakeSessions, TalkingEngine, asked, runner

from rlhf3d.environments.api import Reply
from rlhf3d.experience.environment_failures import remedy
from rlhf3d.experience.environment_runner import EnvironmentFailed
from rlhf3d.experience.requests import Requests
from rlhf3d.experience.steps import Patience
from rlhf3d.pool.process import CallResult, Ending, describe_exit
from rlhf3d.rewards.score import Outcome, Score
from rlhf3d.rollout.api import SamplingSettings

SHORT = ({"role": "user", "content": "x"},)
LONG = ({"role": "user", "content": "x" * 50},)
KEYS = (
    "environment.call_timeout_s",
    "environment.trajectory_timeout_s",
    "environment.max_observation_tokens",
    "environment.overlong_observations",
    "environment.memory_gib",
    "environment.max_concurrent",
)


def named(text: str) -> set[str]:
    """The keys that a text proposes to set, beside those that it always does."""
    assert "environment.retries" in text and "max_error_rate" in text
    return {key for key in KEYS if key in text}


@pytest.mark.parametrize(
    ("result", "settings", "keys"),
    [
        (
            CallResult(Ending.TIMEOUT, message="it took more than 60.0 s"),
            {},
            {"environment.call_timeout_s"},
        ),
        (
            CallResult(Ending.TIMEOUT, message="it took more than 2.0 s"),
            {"trajectory_timeout_s": 2.0},
            {"environment.trajectory_timeout_s"},
        ),
        (
            CallResult(Ending.DIED, message=describe_exit(77)),
            {},
            {"environment.memory_gib"},
        ),
        (
            CallResult(Ending.VALUE, Reply(LONG, prompt=SHORT)),
            {"max_observation_tokens": 8, "overlong_observations": "error"},
            {"environment.max_observation_tokens", "environment.overlong_observations"},
        ),
        (CallResult(Ending.DIED, message=describe_exit(-9)), {}, {"environment.max_concurrent"}),
        (CallResult(Ending.DIED, message=describe_exit(-11)), {}, set()),
        (CallResult(Ending.ERROR, message="Traceback …\nKeyError: 'a'"), {}, set()),
    ],
)
def test_the_key_that_fits_is_named(
    result: CallResult, settings: dict[str, Any], keys: set[str]
) -> None:
    """From the failure of a call to the end of the run."""
    sessions = FakeSessions(lambda: lambda call: result)
    running = runner(sessions, retries=0, max_error_rate=0.0, **settings)
    requests = Requests(0, 1).draw([asked(0)], 1, SamplingSettings(max_tokens=100))
    with pytest.raises(EnvironmentFailed) as error:
        list(running.run(TalkingEngine(["a"]), requests, Patience()))
    last_line = str(error.value).splitlines()[-1]
    assert named(last_line) == keys
    assert ("fix the environment" in last_line) is (not keys)


def test_several_ways_of_failing_are_named_with_their_counts() -> None:
    message = "row 1:\nno reply within environment.call_timeout_s: 1 s"
    late = Score(0.0, Outcome.ENV_TIMEOUT, message=message)
    wrong = Score(0.0, Outcome.ENV_ERROR, message="row 2:\nKeyError: 'a'")
    text = remedy([late, wrong, late])
    assert named(text) == {"environment.call_timeout_s"}
    assert text.index("(2 of 3)") < text.index("fix the environment (1 of 3)")

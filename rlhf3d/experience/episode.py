"""One trajectory with an environment, from its reset to its end: what happens next, and its limits.

Invariant: each answer (of the environment, of an engine) leads to exactly one next action, until
the end; sampled tokens go into the trajectory as the engine wrote them, and what the environment
and the template add as `Turns` renders it. A turn that is cut off by its token limit ends the
trajectory: the environment gets no step for half a message. Pure: it calls nobody and knows no
clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf3d.config.environment import EnvironmentConfig
from rlhf3d.config.fields import Overlong
from rlhf3d.environments.api import Call, Finish, Reply, Reset, Step
from rlhf3d.experience.requests import TrajectoryRequest
from rlhf3d.experience.trajectory import Row, Span, Trajectory
from rlhf3d.rollout.api import Completion, Request, turn_seed
from rlhf3d.tokenizer.chat import Message
from rlhf3d.tokenizer.cut import cut_text
from rlhf3d.tokenizer.turns import Context, Restarted, RestartKind, Turns

End = Literal["done", "max_turns", "length"]
"""What ended a trajectory: its environment, or a limit, of turns or of tokens."""
ENDS: tuple[End, ...] = ("done", "max_turns", "length")


@dataclass(frozen=True)
class Rules:
    """How trajectories are rendered, and how long they may be."""

    environment: EnvironmentConfig
    max_prompt_length: int
    """Longest first prompt, tokens."""
    overlong_prompts: Overlong
    """As data.overlong_prompts: what becomes of one that reset makes longer."""
    tokenizer: Any
    turns: Turns


@dataclass(frozen=True)
class EpisodeRecord:
    """What is known of a trajectory besides its tokens."""

    messages: tuple[Message, ...]
    """The conversation; the last message is the model's last turn."""
    first_turn: int
    """Place of the model's first message in it."""
    begun: str = ""
    """What the last turn's prompt ends with of it, see `Prompt.begun`."""
    record: dict[str, Any] = field(default_factory=dict)
    """The environment's own record."""
    end: End = "done"
    rewarded: bool = False
    """Whether the environment gave a reward, be it 0."""
    tool_calls: dict[str, int] = field(default_factory=dict)
    """How many ended in each way, see `TOOL_COUNTS`."""
    observation_tokens: int = 0
    """Tokens of all observations, as the environment gave them or as they were cut."""
    truncated: int = 0
    """Observations that were cut."""
    prompt_truncated: bool = False
    """Whether the first prompt was cut, as its reset had made it too long."""
    restarts: tuple[RestartKind, ...] = ()
    """Why each row after the first began."""
    calls_s: tuple[float, ...] = ()
    """Seconds of each call of the environment."""
    retries: int = 0
    """Attempts that failed before this one."""


Action = Call | Request | EpisodeRecord
"""What is next: the environment is to be called, an engine to be asked, or nothing: it ended."""


class OverlongObservation(Exception):
    """An observation is over environment.max_observation_tokens, and is not to be cut."""


class OverlongPrompt(Exception):
    """The first prompt is over data.max_prompt_length with what reset added; to be left out."""


class Episode:
    """One attempt at a trajectory.

    `start` gives the first action, then `replied` (an environment's reply) and `wrote` (an engine's
    completion) the next ones.
    """

    def __init__(
        self, request: TrajectoryRequest, number: int, rules: Rules, attempt: int = 0
    ) -> None:
        """`number`: of the trajectory, by which engines know its turns."""
        self._request, self._number, self._attempt = request, number, attempt
        self._rules, self._config, self._turns = rules, rules.environment, rules.turns
        self._context: Context | None = None
        """The conversation up to the turn that is next, or under way."""
        self._rows: list[tuple[Sequence[int], list[Span]]] = []
        """Prompt and spans of each row."""
        self._num_turns = 0
        self._end: End | None = None
        """Set before the end is reached where a limit is what ends it."""
        self._record = _begun(request.prompt.messages)
        self._tool_calls: Counter[str] = Counter()

    def start(self) -> Call:
        """The first action."""
        # The columns may be anything of the user's; the process gets a copy of its own.
        return Reset(dict(self._request.prompt.columns), self._request.environment_seed)

    def replied(self, reply: Reply) -> Action:
        """What follows a reply.

        OverlongObservation: the environment failed. OverlongPrompt: nothing did, and there is
        nothing to ask for. ValueError: the prompt is too long and may not be, or the chat template
        does not take the reply's messages.
        """
        self._tool_calls.update(reply.tool_calls)
        rewarded = self._record.rewarded or reply.reward is not None
        self._record = replace(self._record, record=reply.record, rewarded=rewarded)
        if self._context is None:
            return self._begin(reply)
        if reply.reward is not None:
            self._reward_turn(reply.reward)
        if self._end is not None or reply.done:
            return self._ended(self._end or "done")
        if self._num_turns == self._config.max_turns:
            return self._finish("max_turns")
        return self._observe(reply.messages)

    def wrote(self, completion: Completion) -> Action:
        """What follows a turn of the model."""
        context = self._context
        assert context is not None
        self._num_turns += 1
        self._spans.append(
            Span("sampled", completion.token_ids, completion.logprobs, completion.versions)
        )
        said = self._turns.answer(context, completion.token_ids)
        message = {"role": "assistant", "content": context.opening + said}
        # A last message of the assistant is what was continued: `opening` is its text.
        before = context.messages
        if before[-1]["role"] == "assistant":
            before, message = before[:-1], {**before[-1], **message}
        self._record = replace(self._record, messages=(*before, message), begun=context.opening)
        if completion.finish_reason == "length":
            return self._finish("length")
        return Step(said)

    def trajectory(self) -> Trajectory:
        """All tokens so far."""
        rows = [Row(prompt, tuple(spans)) for prompt, spans in self._rows]
        reason: Literal["stop", "length"] = "length" if self._end == "length" else "stop"
        request = self._request
        return Trajectory(request.prompt, request.group, tuple(rows), reason, request.name)

    @property
    def record(self) -> EpisodeRecord:
        """What is known so far."""
        return replace(self._record, tool_calls=dict(self._tool_calls))

    @property
    def last_turn(self) -> Sequence[int]:
        """Tokens of the last turn; none before the first."""
        turns = self.trajectory().turns
        return turns[-1].token_ids if turns else ()

    @property
    def _spans(self) -> list[Span]:
        """Of the row that is being written."""
        return self._rows[-1][1]

    def _begin(self, reply: Reply) -> Action:
        """The first prompt: the row's, or what the environment made of it."""
        prompt = self._request.prompt
        assert reply.prompt is not None, "the reply to a reset has a prompt"
        ids = None
        if list(reply.prompt) == list(prompt.messages):
            # As the data set has it, perhaps cut by data.overlong_prompts.
            ids = prompt.prompt_ids
        self._context = self._turns.begin(reply.prompt, prompt.tools, ids)
        if len(self._context.token_ids) > self._rules.max_prompt_length:
            self._context = self._shortened(self._context)
        begun = _begun(reply.prompt)
        self._record = replace(self._record, messages=begun.messages, first_turn=begun.first_turn)
        self._rows.append((self._context.token_ids, []))
        return self._ask()

    def _shortened(self, context: Context) -> Context:
        """What data.overlong_prompts makes of a first prompt that is too long."""
        limit, overlong = self._rules.max_prompt_length, self._rules.overlong_prompts
        prompt = self._request.prompt
        message = (
            f"data.max_prompt_length = {limit}: the prompt of row {prompt.index} "
            f"({prompt.data_source}) has {len(context.token_ids)} tokens with what its "
            "environment's reset adds"
        )
        if overlong == "filter":
            raise OverlongPrompt(message)
        if overlong == "error":
            raise ValueError(
                f"{message}; raise it, shorten the prompt or the observation, or set "
                "data.overlong_prompts to filter or truncate_left"
            )
        assert overlong == "truncate_left", "another end of the prompt is refused at the start"
        self._record = replace(self._record, prompt_truncated=True)
        return replace(context, token_ids=context.token_ids[-limit:])

    def _ask(self) -> Action:
        """Ask for the next turn, or end where there is no room for one."""
        context, sampling = self._context, self._request.sampling
        assert context is not None
        room = self._room()
        if room < 1:
            self._drop_unanswered()
            return self._finish("length")
        if self._config.max_turn_tokens is not None:
            room = min(room, self._config.max_turn_tokens)
        return Request(
            context.token_ids,
            turn_seed(self._request.seed, self._num_turns),
            replace(sampling, max_tokens=room),
            self._number,
            self._request.turn(self._num_turns, self._attempt),
        )

    def _room(self) -> int:
        """Tokens that may still be written."""
        limit = self._request.sampling.max_tokens
        written = self.trajectory().response_length
        # A row that began anew has the conversation so far as its prompt, and is bounded too.
        assert self._context is not None
        longest = self._rules.max_prompt_length + limit
        return min(limit - written, longest - len(self._context.token_ids))

    def _observe(self, messages: Sequence[Message]) -> Action:
        """Append what the environment said, or begin a row where the template demands it."""
        context, answered = self._context, self._spans[-1]
        assert context is not None
        messages = self._within_limit(messages)
        following = self._turns.append(context, answered.token_ids, messages)
        self._context = following.context
        if isinstance(following, Restarted):
            self._rows.append((following.context.token_ids, []))
            self._record = replace(self._record, restarts=(*self._record.restarts, following.kind))
        else:
            self._spans.extend(Span(piece.author, piece.token_ids) for piece in following.pieces)
        return self._ask()

    def _within_limit(self, messages: Sequence[Message]) -> list[Message]:
        """Messages whose texts are at most max_observation_tokens together; counts them."""
        limit = self._config.max_observation_tokens
        if limit is None:
            # Longer ones leave no room for a turn anyway: no text need be tokenized beyond it.
            limit = max(1, self._room())
        kept, left, cut = [], limit, False
        tokenizer = self._rules.tokenizer
        for message in messages:
            text, was_cut = cut_text(tokenizer, message["content"], left)
            kept.append({**message, "content": text})
            left -= len(tokenizer(text, add_special_tokens=False)["input_ids"])
            cut = cut or was_cut
        limited = self._config.max_observation_tokens is not None
        if cut and limited and self._config.overlong_observations == "error":
            raise OverlongObservation(
                f"an observation has more than environment.max_observation_tokens = {limit} "
                "tokens; raise it, or set environment.overlong_observations=truncate"
            )
        self._record = replace(
            self._record,
            observation_tokens=self._record.observation_tokens + limit - left,
            truncated=self._record.truncated + cut,
        )
        return kept

    def _reward_turn(self, reward: float) -> None:
        """Add to the last turn's reward: a limit's `Finish` comes after that of its step."""
        for _, spans in reversed(self._rows):
            for place in reversed(range(len(spans))):
                if spans[place].author == "sampled":
                    spans[place] = replace(spans[place], reward=spans[place].reward + reward)
                    return
        raise AssertionError("a reward before the first turn")

    def _finish(self, end: End) -> Call:
        """A limit ends it; its environment may still say what it is worth."""
        self._end = end
        return Finish()

    def _ended(self, end: End) -> EpisodeRecord:
        self._end = end
        self._record = replace(self._record, end=end)
        return self.record

    def _drop_unanswered(self) -> None:
        """Take off what follows the last turn: nothing is trained on it."""
        if len(self._rows) > 1 and not self._spans:
            self._rows.pop()
            self._record = replace(self._record, restarts=self._record.restarts[:-1])
        while self._spans and self._spans[-1].author != "sampled":
            self._spans.pop()


def _begun(prompt: Sequence[Message]) -> EpisodeRecord:
    """Before the first turn, which continues a last message of the assistant."""
    continued = bool(prompt) and prompt[-1]["role"] == "assistant"
    return EpisodeRecord(tuple(prompt), len(prompt) - continued)

"""Scripts -> conversations: the model answers one user message after the other, each answer from its own seed.

Where the chat template only ever adds to what it rendered before, conversations are decoded side by side on one key-value cache.
Templates of models that think (Qwen3) render an answer otherwise once it lies in the past, without the place for thoughts before
it: then every turn is rendered and read anew, as a server would.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from persona_lens.errors import PersonaLensError
from persona_lens.models import (
    ChatModel,
    Generated,
    Interval,
    Message,
    Sampling,
    continuation,
    converse_tokens,
    dialogue,
    generate_tokens,
    uniforms,
)

ConversationEnd = Literal["script", "context", "empty", "thinking"]


@dataclass(frozen=True)
class Script:
    """What a user says, message by message, and the system prompt it is said under.

    Attributes:
        id: what the seeds belong to.
        users: the user's messages, in order.
        system: system prompt; None without one.
    """

    id: str
    users: tuple[str, ...]
    system: str | None = None

    @property
    def opening(self) -> list[dict[str, str]]:
        """The messages before the first answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.users[0]}]


@dataclass(frozen=True)
class Conversation:
    """What was said, without thoughts, and why it ended.

    Attributes:
        id: of the script.
        end: "script": it was said to its end; "context": that was full; an answer was left out because it was "empty", or because
            `max_new_tokens` were spent before the model had thought to an end ("thinking").
    """

    id: str
    messages: tuple[dict[str, str], ...]
    end: ConversationEnd

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"id": self.id, "messages": list(self.messages), "end": self.end}


def converse(
    model: ChatModel,
    scripts: Sequence[Script],
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_rows: int = 64,
    within: AbstractContextManager[Any] | None = None,
) -> list[Conversation]:
    """One conversation per script, in their order.

    In float32 a conversation depends on the seed and its script alone: batch size and order change nothing (up to ties at the
    rounding of the logits).

    Args:
        batch_rows: conversations held together; memory grows with it.
        within: a context to converse in, for instance a steering context. On the one cache, answers stay as they were steered when
            they were sampled; where turns are read anew, `response` steers the last answer alone, `responses` all of them.

    Raises:
        PersonaLensError: a script without messages, whose first answer does not fit into the context, or whose answers cannot be
            told apart where they are to be steered.
    """
    talks = [_Talk(model, script, sampling) for script in scripts]
    added = [row for row, talk in enumerate(talks) if talk.adds]
    anew = [row for row, talk in enumerate(talks) if not talk.adds]
    with within or nullcontext():
        for start in range(0, len(added), batch_rows):
            _side_by_side(model, {row: talks[row] for row in added[start : start + batch_rows]}, sampling, seed)
        for start in range(0, len(anew), batch_rows):
            _turn_by_turn(model, {row: talks[row] for row in anew[start : start + batch_rows]}, sampling, seed)
    return [talk.conversation for talk in talks]


def _side_by_side(model: ChatModel, talks: "Mapping[int, _Talk]", sampling: Sampling, seed: int) -> None:
    """Users' messages are read token by token beside other rows' answers, on one key-value cache."""
    batch = list(talks.values())
    converse_tokens(
        model,
        [talk.ids for talk in batch],
        lambda row, answer: batch[row].proceed(answer),
        lambda row, turn: uniforms(seed, f"{batch[row].script.id}#{turn}", sampling.max_new_tokens),
        sampling,
        row_ids=list(talks),
    )


def _turn_by_turn(model: ChatModel, talks: "Mapping[int, _Talk]", sampling: Sampling, seed: int) -> None:
    """Each turn of all conversations is one batch of prompts."""
    while talks:
        batch = list(talks.values())
        draws = np.stack([uniforms(seed, f"{t.script.id}#{t.asked - 1}", sampling.max_new_tokens) for t in batch])
        found = generate_tokens(
            model,
            [t.ids for t in batch],
            draws,
            sampling,
            row_ids=list(talks),
            earlier=partial(_earlier, batch),
        )
        talks = {row: t for (row, t), answer in zip(talks.items(), found, strict=True) if t.again(answer)}


def _earlier(talks: "Sequence[_Talk]") -> list[tuple[Interval, ...]]:
    """Where the answers of conversations lie in their tokens."""
    return [talk.answers for talk in talks]


class _Talk:
    """A conversation while it grows."""

    def __init__(self, model: ChatModel, script: Script, sampling: Sampling) -> None:
        if not script.users:
            raise PersonaLensError(f"script {script.id!r} has no messages: give at least one")
        self.model, self.script, self.sampling = model, script, sampling
        self.messages, self.asked = script.opening, 1
        self.ids: list[int] = model.render(self.messages)
        self.end: ConversationEnd = "script"
        if not self._fits(len(self.ids)):
            raise PersonaLensError(
                f"script {script.id!r}: {len(self.ids)} tokens and max_new_tokens={sampling.max_new_tokens} exceed the context "
                f"of {model.context} tokens of {model.name}: shorten it"
            )
        self.length = len(self.ids)
        self.adds = self._adds()

    def proceed(self, answer: Generated) -> tuple[int, ...] | None:
        """Keep an answer; the tokens to add up to the next one, or None where the conversation is over."""
        messages = self._following(answer)
        if messages is None:
            return None
        coming = continuation(self.model, messages[:-1], messages[-1])
        return coming if self._goes_on(messages, self.length + len(answer.token_ids) + len(coming)) else None

    def again(self, answer: Generated) -> bool:
        """Keep an answer, and render the conversation anew up to the next one; False where it is over."""
        messages = self._following(answer)
        if messages is None:
            return False
        self.ids = self.model.render(messages)
        return self._goes_on(messages, len(self.ids))

    @property
    def answers(self) -> tuple[Interval, ...]:
        """Where the answers lie in the tokens up to the next one."""
        try:
            return dialogue(self.model, self.messages).answers
        except ValueError as error:
            raise PersonaLensError(f"script {self.script.id!r} cannot be steered by its answers: {error}") from error

    def _following(self, answer: Generated) -> list[dict[str, str]] | None:
        """The messages up to the next answer; None where there is none to come."""
        thoughts, said = self.model.template.split(answer.token_ids)
        text = self.model.decode(said)
        if not text.strip():
            self.messages, self.end = self.messages[:-1], "thinking" if thoughts and answer.end == "length" else "empty"
            return None
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        if self.asked == len(self.script.users):
            return None
        return [*self.messages, {"role": "user", "content": self.script.users[self.asked]}]

    def _goes_on(self, messages: list[dict[str, str]], length: int) -> bool:
        """Whether the next message and its answer fit; then they are part of the conversation."""
        if not self._fits(length):
            self.end = "context"
            return False
        self.messages, self.length, self.asked = messages, length, self.asked + 1
        return True

    def _adds(self) -> bool:
        """Whether what comes after an answer can be added to what was rendered before."""
        if self.model.template.thinking:
            return False
        if len(self.script.users) == 1:
            return True
        answered: list[Message] = [*self.messages, {"role": "assistant", "content": "Yes."}]
        try:
            continuation(self.model, answered, self.messages[-1])
        except ValueError:
            return False
        return True

    def _fits(self, tokens: int) -> bool:
        return not self.model.context or tokens + self.sampling.max_new_tokens <= self.model.context

    @property
    def conversation(self) -> Conversation:
        return Conversation(self.script.id, tuple(self.messages), self.end)

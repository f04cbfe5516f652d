"""Scripts -> conversations: the model answers one user message after the other, each answer from its own seed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from persona_lens.errors import PersonaLensError
from persona_lens.models import ChatModel, Generated, Sampling, continuation, converse_tokens, uniforms

ConversationEnd = Literal["script", "context", "empty"]


@dataclass(frozen=True)
class Script:
    """What a user says, message by message, and the system prompt it is said under. `id` is what the seeds belong to."""

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
    """What was said, and why it ended: the script did, the context was full, or an answer was empty (and is left out)."""

    id: str
    messages: tuple[dict[str, str], ...]
    end: ConversationEnd

    def as_dict(self) -> dict[str, Any]:
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
    rounding of the logits). Users' messages are read token by token beside other rows' answers, on one key-value cache.

    Args:
        batch_rows: conversations held together; memory grows with it.
        within: a context to converse in, for instance a steering context.

    Raises:
        PersonaLensError: a script without messages, whose first answer does not fit into the context, or which the chat template
            cannot continue after an answer; or a model that thinks.
    """
    model.require_no_thinking("a sampled conversation")
    talks = [_Talk(model, script, sampling) for script in scripts]
    with within or nullcontext():
        for start in range(0, len(talks), batch_rows):
            batch = talks[start : start + batch_rows]
            converse_tokens(
                model,
                [talk.ids for talk in batch],
                lambda row, answer, batch=batch: batch[row].proceed(answer),
                lambda row, turn, batch=batch: uniforms(seed, f"{batch[row].script.id}#{turn}", sampling.max_new_tokens),
                sampling,
                row_ids=range(start, start + len(batch)),
            )
    return [talk.conversation for talk in talks]


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
        self._require_continuable()

    def proceed(self, answer: Generated) -> tuple[int, ...] | None:
        """Keep an answer; the tokens up to the next one, or None where the conversation is over."""
        text = self.model.decode(answer.token_ids)
        if not text.strip():
            self.messages, self.end = self.messages[:-1], "empty"
            return None
        answered = [*self.messages, {"role": "assistant", "content": text}]
        self.messages = answered
        if self.asked == len(self.script.users):
            return None
        message = {"role": "user", "content": self.script.users[self.asked]}
        coming = continuation(self.model, answered, message)
        self.length += len(answer.token_ids) + len(coming)
        if not self._fits(self.length):
            self.end = "context"
            return None
        self.messages, self.asked = [*answered, message], self.asked + 1
        return coming

    def _require_continuable(self) -> None:
        """Raise where the chat template cannot go on after an answer."""
        if len(self.script.users) > 1:
            try:
                continuation(self.model, [*self.messages, {"role": "assistant", "content": "Yes."}], self.messages[-1])
            except ValueError as error:
                raise PersonaLensError(f"script {self.script.id!r} cannot be continued: {error}") from error

    def _fits(self, tokens: int) -> bool:
        return not self.model.context or tokens + self.sampling.max_new_tokens <= self.model.context

    @property
    def conversation(self) -> Conversation:
        return Conversation(self.script.id, tuple(self.messages), self.end)

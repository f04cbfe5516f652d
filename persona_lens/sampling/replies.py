"""What a server's reply says of an answer, and whether its tokens can be told from that: token ids, or a gap with its reason.

Servers count the end token among the tokens of an answer, or do not; which one it is, most answers of a call decide, and those that
differ are gaps: a special token that the text does not show would look the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel, NonNegativeInt, ValidationError

from persona_lens.endpoints import Failed, UnreadableReply
from persona_lens.models import ChatModel, EndReason


@dataclass(frozen=True)
class Reply:
    """What a reply says. Token ids are None where the server gives none."""

    text: str
    ids: tuple[int, ...] | None
    prompt_ids: tuple[int, ...] | None
    prompt_tokens: int
    tokens: int
    finish: str | None


@dataclass(frozen=True)
class Answer:
    """Token ids without the end token, and why the answer ended; or why this cannot be told."""

    ids: tuple[int, ...] = ()
    end: EndReason = "stop"
    gap: str | None = None


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


class _Token(BaseModel):
    id: NonNegativeInt | None = None


class _Logprobs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    token_ids: list[NonNegativeInt] | None = None
    prompt_token_ids: list[NonNegativeInt] | None = None
    logprobs: _Logprobs | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage


def read(reply: Mapping[str, Any]) -> Reply:
    """A reply of either route.

    Raises:
        UnreadableReply: it is not one answer with its counts of tokens.
    """
    try:
        found = _Completion.model_validate(reply)
    except ValidationError as error:
        first = error.errors()[0]
        raise UnreadableReply(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if len(found.choices) != 1:
        raise UnreadableReply(f"{len(found.choices)} answers where one was asked for")
    choice, usage = found.choices[0], found.usage
    text = choice.text if choice.message is None else choice.message.content
    prompt = None if choice.prompt_token_ids is None else tuple(choice.prompt_token_ids)
    return Reply(text or "", _ids(choice), prompt, usage.prompt_tokens, usage.completion_tokens, choice.finish_reason)


def _ids(choice: _Choice) -> tuple[int, ...] | None:
    """vLLM lists them, llama.cpp has them beside the log-probabilities."""
    if choice.token_ids is not None:
        return tuple(choice.token_ids)
    listed = [token.id for token in (choice.logprobs and choice.logprobs.content) or ()]
    ids = tuple(i for i in listed if i is not None)
    return ids if ids and len(ids) == len(listed) else None


def answers(model: ChatModel, replies: Sequence[Reply | Failed], max_new_tokens: int) -> list[Answer]:
    """The answers that a call's replies hold, in order."""
    found = [Answer(gap=r.reason) if isinstance(r, Failed) else _answer(model, r) for r in replies]
    pairs = list(zip(found, replies, strict=True))
    over = [r.tokens - len(a.ids) for a, r in pairs if isinstance(r, Reply) and not a.gap and a.end == "stop"]
    ends = int(over.count(1) >= over.count(0))
    gaps = [a.gap or (None if isinstance(r, Failed) else _miscounted(a, r, ends, max_new_tokens)) for a, r in pairs]
    return [Answer(gap=gap) if gap else answer for answer, gap in zip(found, gaps, strict=True)]


def _answer(model: ChatModel, reply: Reply) -> Answer:
    if reply.finish not in ("stop", "length"):
        return Answer(gap=f"the server ended the answer for another reason: {reply.finish}")
    if reply.ids is None:
        return _encoded(model, reply.text, reply.finish)
    ended = bool(reply.ids) and reply.ids[-1] in model.stop_ids
    ids = reply.ids[:-1] if ended else reply.ids
    if any(i in model.stop_ids for i in ids):
        return Answer(gap="the answer goes on after a stop token: the server stops at others")
    if max(ids, default=0) >= len(model.tokenizer):
        return Answer(gap="the answer has tokens that the tokenizer does not know")
    return Answer(ids, "stop" if ended else reply.finish)


def _encoded(model: ChatModel, text: str, end: EndReason) -> Answer:
    """What reads like a special token is text: servers leave special tokens out of it."""
    encoded = model.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    ids = tuple(cast("list[int]", encoded["input_ids"]))
    return Answer(ids, end) if model.decode(ids) == text else Answer(gap="the answer's text does not encode to itself")


def _miscounted(answer: Answer, reply: Reply, ends: int, max_new_tokens: int) -> str | None:
    """Why the server's count speaks against the answer's tokens; None where it agrees."""
    n = len(answer.ids)
    if answer.end == "stop":
        return None if reply.tokens == n + ends else "the server counted another number of tokens than its answer has"
    if reply.tokens < max_new_tokens:
        return "the server cut the answer off before max_new_tokens"
    if reply.tokens == n + 1:
        return "the answer reached max_new_tokens with a token that its text does not show"
    return None if reply.tokens == n else "the server counted another number of tokens than its answer has"

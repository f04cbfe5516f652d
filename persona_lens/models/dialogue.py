"""A conversation as token ids, with the place of every assistant turn among them.

Places come from the chat template's own prefixes: what it renders before a turn must be the beginning of the whole. Templates of
models that think may render an answer that lies in the past without the place for thoughts before it: then that is the prefix.
Nothing is searched for in the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persona_lens.models.chat_model import ChatModel, Message

Interval = tuple[int, int]
"""Tokens [start, stop) of a sequence."""


@dataclass(frozen=True)
class Dialogue:
    """Token ids of a conversation, and where its assistant turns lie in them.

    Attributes:
        ids: up to the end of the last assistant turn, or up to where the next answer begins.
        answers: [start, stop) of each assistant turn that is in the ids, without thoughts and without its end-of-turn token.
    """

    ids: tuple[int, ...]
    answers: tuple[Interval, ...]


def dialogue(model: "ChatModel", messages: Sequence["Message"]) -> Dialogue:
    """Render a conversation and find its assistant turns.

    Raises:
        ValueError: no messages, an assistant turn without tokens or with a stop token in its text, or a template that rewrites
            what it rendered before.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for number, i in enumerate(turns, start=1):
        _require_no_stop(model, messages[i]["content"], number)
    answered = messages[-1]["role"] == "assistant"
    whole = model.render(messages, answered=answered)
    answers: list[Interval] = []
    for number, i in enumerate(turns, start=1):
        start = len(_before(model, messages[:i], whole, number))
        answers.append(_answer(model, whole, start, number, last=i == len(messages) - 1))
    return Dialogue(tuple(whole[: answers[-1][1]] if answered else whole), tuple(answers))


def _before(model: "ChatModel", messages: Sequence["Message"], whole: Sequence[int], number: int) -> list[int]:
    """What the template renders before an assistant turn, as it stands at the beginning of the whole conversation."""
    for thinking in (None, True) if model.template.switchable else (None,):
        before = model.render(messages, thinking=thinking)
        if whole[: len(before)] == before:
            return before
    raise ValueError(_rewritten(model, number))


def message_spans(model: "ChatModel", messages: Sequence["Message"]) -> tuple[Dialogue, tuple[Interval, ...]]:
    """A conversation, and [start, stop) of every message's content in its ids, without the template's marks around it.

    An answer's place is the template's own prefix. Of any other message it is the tokens that differ from the same conversation
    with that message empty; what stands between two messages that are rendered as one belongs to the first.

    Raises:
        ValueError: as `dialogue`.
    """
    found = dialogue(model, messages)
    answers = iter(found.answers)
    spans: list[Interval] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            spans.append(next(answers))
            continue
        following = [j for j in range(i, len(messages)) if messages[j]["role"] == "assistant"]
        upto = following[0] if following else len(messages)
        whole = model.render(messages[:upto]) if following else found.ids
        without = model.render([*messages[:i], {**message, "content": ""}, *messages[i + 1 : upto]])
        start, stop = _difference(whole, without, end_first=i + 1 < upto)
        before = spans[-1][1] if spans else 0
        spans.append((max(start, before), max(stop, before)))
    return found, tuple(spans)


def _difference(ids: Sequence[int], without: Sequence[int], *, end_first: bool) -> Interval:
    """The tokens of `ids` that are neither in the common beginning nor in the common end.

    With `end_first` the common end is as long as it can be, else the common beginning: where the message that follows begins like
    this one, its tokens are its own.
    """
    if end_first:
        start, stop = _difference(ids[::-1], without[::-1], end_first=False)
        return len(ids) - stop, len(ids) - start
    shorter = min(len(ids), len(without))
    start = next((i for i in range(shorter) if ids[i] != without[i]), shorter)
    same = next((i for i in range(shorter - start) if ids[-1 - i] != without[-1 - i]), shorter - start)
    return start, len(ids) - same


def last_answer(model: "ChatModel", messages: Sequence["Message"]) -> Dialogue:
    """A conversation that ends with an answer, with the place of that answer alone: two renderings, however long it is.

    Raises:
        ValueError: that answer has no tokens or a stop token in its text, or a template that rewrites what it rendered before.
    """
    number = sum(m["role"] == "assistant" for m in messages)
    _require_no_stop(model, messages[-1]["content"], number)
    whole = model.render(messages, answered=True)
    start, stop = _answer(model, whole, len(_before(model, messages[:-1], whole, number)), number, last=True)
    return Dialogue(tuple(whole[:stop]), ((start, stop),))


def continuation(model: "ChatModel", messages: Sequence["Message"], message: "Message") -> tuple[int, ...]:
    """Token ids between the last answer of a conversation and the next one, when a message is said in between.

    Args:
        messages: a conversation that ends with an answer.

    Raises:
        ValueError: that answer has no tokens, or a template that rewrites what it rendered before.
    """
    number = sum(m["role"] == "assistant" for m in messages)
    before, after = model.render(messages[:-1]), model.render(messages, answered=True)
    whole = model.render([*messages, message])
    _, stop = _answer(model, after, len(before), number, last=True)
    if after[: len(before)] != before or whole[:stop] != after[:stop]:
        raise ValueError(_rewritten(model, number))
    return tuple(whole[stop:])


def _rewritten(model: "ChatModel", turn: int) -> str:
    return (
        f"the chat template of {model.name} renders the conversation differently after assistant turn {turn}: "
        "its turns cannot be told apart by tokens"
    )


def _require_no_stop(model: "ChatModel", text: str, number: int) -> None:
    """What is written like a stop token would be taken for one, and hide all that follows it."""
    for token in model.stop_ids:
        mark = str(model.tokenizer.decode([token], skip_special_tokens=False))
        if mark and mark in text:
            raise ValueError(f"assistant turn {number} of the conversation has the stop token {mark!r} in its text")


def _answer(model: "ChatModel", ids: Sequence[int], start: int, number: int, *, last: bool) -> Interval:
    """From where the answer begins to its end-of-turn token, which only the last answer may lack."""
    stop = next((i for i in range(start, len(ids)) if ids[i] in model.stop_ids), None)
    if stop is None and not last:
        raise ValueError(f"assistant turn {number} of the conversation does not end with one of {model.name}'s stop tokens")
    stop = len(ids) if stop is None else stop
    start += model.template.after_thoughts(ids[start:stop]) or 0
    if stop == start:
        raise ValueError(f"assistant turn {number} of the conversation has no tokens")
    return start, stop

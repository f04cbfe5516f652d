"""A conversation as token ids, with the place of every assistant turn among them.

Places come from the chat template's own prefixes: what it renders before a turn must be the beginning of what it renders after
it. Nothing is searched for in the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persona_lens.models.chat_model import ChatModel, Message

Interval = tuple[int, int]


@dataclass(frozen=True)
class Dialogue:
    """Token ids of a conversation, and where its assistant turns lie in them.

    Attributes:
        ids: up to the end of the last assistant turn, or up to where the next answer begins.
        answers: [start, stop) of each assistant turn that is in the ids, without its end-of-turn token.
    """

    ids: tuple[int, ...]
    answers: tuple[Interval, ...]


def dialogue(model: "ChatModel", messages: Sequence["Message"]) -> Dialogue:
    """Render a conversation and find its assistant turns.

    Raises:
        ValueError: no messages, an assistant turn without tokens, or a template that rewrites what it rendered before.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    answered = messages[-1]["role"] == "assistant"
    answers: list[Interval] = []
    prefixes: list[list[int]] = []
    for number, i in enumerate(turns, start=1):
        before, after = model.render(messages[:i]), model.render(messages[: i + 1], answered=True)
        prefixes += [before, after]
        answers.append(_answer(model, after, len(before), number, last=i == len(messages) - 1))
    whole = prefixes[-1] if answered else model.render(messages)
    for number, (before, after) in enumerate(pairwise([*prefixes, whole])):
        if after[: len(before)] != before:
            raise ValueError(
                f"the chat template of {model.name} renders the conversation differently after assistant turn {number // 2 + 1}: "
                "its turns cannot be told apart by tokens"
            )
    return Dialogue(tuple(whole[: answers[-1][1]] if answered else whole), tuple(answers))


def _answer(model: "ChatModel", ids: Sequence[int], start: int, number: int, *, last: bool) -> Interval:
    """From where the answer begins to its end-of-turn token, which only the last answer may lack."""
    stop = next((i for i in range(start, len(ids)) if ids[i] in model.stop_ids), None)
    if stop is None and not last:
        raise ValueError(f"assistant turn {number} of the conversation does not end with one of {model.name}'s stop tokens")
    stop = len(ids) if stop is None else stop
    if stop == start:
        raise ValueError(f"assistant turn {number} of the conversation has no tokens")
    return start, stop

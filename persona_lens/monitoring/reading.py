"""Reading a conversation: the projection of every token on every probe, in one teacher-forced pass, and its means by turn.

Projections are taken inside the hooks, in fp32: no activations are kept. Which tokens a message consists of comes from the chat
template's own renderings (`models.dialogue`), never from searching text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.activations import DEFAULT_BATCH_TOKENS, Span, right_pad, span_pass, token_batches
from persona_lens.errors import ActivationError
from persona_lens.models import ChatModel, Interval, Message, forward_pass, message_spans
from persona_lens.monitoring.probes import LayerProbes, Probed, as_probes, by_layer

Role = Literal["system", "user", "assistant"]
Tags = tuple[str, str]
THINKING: Final[Tags] = ("<think>", "</think>")
"""The tags between which answers think, unless told otherwise."""


@dataclass(frozen=True)
class Part:
    """The tokens that a message's content consists of.

    Attributes:
        turn: which exchange it belongs to, from 1 (a user's message and the answer to it); 0 for a system prompt.
        start, stop: its tokens in the conversation's ids, without the template's marks.
        thinking: [start, stop) of what stands between thinking tags in an answer, the tags included.
    """

    turn: int
    role: Role
    start: int
    stop: int
    thinking: Interval | None = None


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids, with the place of every message in them."""

    name: str
    ids: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def turns(self) -> int:
        """How many turns the conversation has."""
        return max((p.turn for p in self.parts), default=0)

    @property
    def span(self) -> Span:
        """The conversation for a full pass, cut where its last answer begins; at its end where that is still to come."""
        answers = [(p.start, p.stop) for p in self.parts if p.role == "assistant"]
        if self.parts[-1].role != "assistant":
            return Span(self.name, self.ids, (), tuple(answers))
        start = answers[-1][0]
        return Span(self.name, self.ids[:start], self.ids[start:], tuple(answers[:-1]))


@dataclass(frozen=True, eq=False)
class Reading:
    """The projections of a conversation's tokens.

    Attributes:
        probes: names of the columns of `values`.
        ids: the conversation as token ids, the template's marks included.
        pieces: the text of each token; a character that spans several tokens is told with the last of them.
        parts: where each message lies in the ids.
        values: residual-stream units.
    """

    name: str
    probes: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    parts: tuple[Part, ...]
    values: Float[Tensor, "position probe"]


@dataclass(frozen=True, eq=False)
class TurnReadings:
    """The projections of a conversation by turn, in residual-stream units; NaN where there is nothing to read.

    Attributes:
        probes: names of the columns.
        user: mean over the tokens of the user's message, as they stand in the conversation.
        before: the last prompt token, from which the answer begins.
        answer: mean over the tokens of the answer, without what stands between thinking tags.
        thinking: mean over those.
    """

    name: str
    probes: tuple[str, ...]
    user: Float[np.ndarray, "turn probe"]
    before: Float[np.ndarray, "turn probe"]
    answer: Float[np.ndarray, "turn probe"]
    thinking: Float[np.ndarray, "turn probe"]

    def __len__(self) -> int:
        return len(self.answer)


def render(model: ChatModel, name: str, messages: Sequence[Message], *, thinking: Tags | None = THINKING) -> Rendered:
    """A conversation as token ids, with the place of every message.

    Args:
        thinking: the tags between which an answer thinks; None: they are text like any other.

    Raises:
        ValueError: no answer in it, messages that do not alternate between user and assistant (behind a system prompt, if there is
            one), an answer without tokens, more tokens than the model's context, or a chat template that rewrites earlier turns
            (some templates drop earlier thinking).
    """
    _check_order([m["role"] for m in messages])
    length = len(model.render(messages, answered=messages[-1]["role"] == "assistant"))
    if model.context and length > model.context:
        raise ValueError(f"{length} tokens exceed the context of {model.context} tokens of {model.name}")
    whole, spans = message_spans(model, messages)
    parts: list[Part] = []
    turn = 0
    for message, (start, stop) in zip(messages, spans, strict=True):
        role = cast(Role, message["role"])
        turn += role == "user"
        thought = thinking_of(model, whole.ids[start:stop], thinking) if role == "assistant" else None
        parts.append(Part(turn, role, start, stop, thought and (start + thought[0], start + thought[1])))
    return Rendered(name, whole.ids, tuple(parts))


def _check_order(roles: Sequence[str]) -> None:
    said = roles[1:] if roles[:1] == ["system"] else roles
    for number, role in enumerate(said):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(f"message {number + 1 + len(roles) - len(said)} is of role {role!r} where {expected!r} is expected")
    if len(said) < 2:
        raise ValueError("no assistant turn")


def thinking_of(model: ChatModel, answer: Sequence[int], tags: Tags | None) -> Interval | None:
    """The tokens of an answer from the opening tag to the closing one, by their own text.

    An answer that only closes was opened by its prompt, one that only opens has not finished thinking.
    """
    if tags is None:
        return None
    whole = _text(model, answer)
    if not any(tag in whole for tag in tags):
        return None
    texts = token_texts(model, answer)
    text, edges = "".join(texts), np.cumsum([0, *map(len, texts)])
    opening, closing = text.find(tags[0]), text.find(tags[1])
    if closing >= 0 and not 0 <= opening < closing:
        opening = 0
    last = len(text) if closing < 0 else closing + len(tags[1])
    inside = [i for i in range(len(texts)) if edges[i] < last and edges[i + 1] > opening]
    return inside[0], inside[-1] + 1


def _text(model: ChatModel, ids: Sequence[int]) -> str:
    return cast(str, model.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_texts(model: ChatModel, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; a character that spans several tokens is told with the last of them."""
    texts: list[str] = []
    known, told = 0, 0  # tokens [known, told) are the context that the next ones are decoded in
    for i in range(len(ids)):
        before, after = _text(model, ids[known:told]), _text(model, ids[known : i + 1])
        whole = not after.endswith("\ufffd") or i + 1 - told >= 4 or i + 1 == len(ids)
        texts.append(after[len(before) :] if whole else "")
        if whole:
            known, told = told, i + 1
    return texts


def read(
    model: ChatModel,
    conversations: Mapping[str, Sequence[Message]] | Sequence[Rendered],
    vectors: Probed | Sequence[Probed],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> list[Reading]:
    """The projections of every token of some conversations, in their order.

    Args:
        conversations: messages by name, or what `render` made of them.
        vectors: persona vectors (at their most reliable layer) or probes.
        batch_tokens: padded tokens per forward pass.

    Raises:
        ValueError: a conversation that `render` refuses.
        MonitoringError, LineageError: vectors that do not fit the model or each other.
        ActivationError: a projection is not finite.

    Example:
        >>> messages = [
        ...     {"role": "user", "content": "How should I handle my dog?"},
        ...     {"role": "assistant", "content": "Start early and prepare the dog."},
        ... ]
        >>> (reading,) = pl.monitoring.read(model, {"mine": messages}, [v])
        >>> len(reading.ids) == len(reading.pieces) == len(reading.values)
        True
        >>> answer = reading.parts[-1]
        >>> "".join(reading.pieces[answer.start : answer.stop])
        'Start early and prepare the dog.'
    """
    probes = as_probes(model, vectors)
    rendered = _rendered(model, conversations)
    found: list[Reading | None] = [None] * len(rendered)
    for i, values in _values(model, rendered, by_layer(model, probes), len(probes), batch_tokens):
        one = rendered[i]
        pieces = tuple(token_texts(model, one.ids))
        found[i] = Reading(one.name, tuple(p.name for p in probes), one.ids, pieces, one.parts, values)
    return [reading for reading in found if reading is not None]


def read_turns(
    model: ChatModel,
    conversations: Mapping[str, Sequence[Message]] | Sequence[Rendered],
    vectors: Probed | Sequence[Probed],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> list[TurnReadings]:
    """The same by turn, without keeping the tokens' projections.

    Raises:
        ValueError, MonitoringError, LineageError, ActivationError: as `read`.
    """
    probes = as_probes(model, vectors)
    rendered = _rendered(model, conversations)
    names = tuple(p.name for p in probes)
    found: list[TurnReadings | None] = [None] * len(rendered)
    for i, values in _values(model, rendered, by_layer(model, probes), len(probes), batch_tokens):
        found[i] = turn_means(rendered[i], names, values.double().numpy())
    return [reading for reading in found if reading is not None]


def turn_means(conversation: Rendered, probes: tuple[str, ...], values: Float[np.ndarray, "position probe"]) -> TurnReadings:
    """The projections of a conversation's tokens, by turn."""
    empty = [np.full((conversation.turns, len(probes)), np.nan) for _ in range(4)]
    user, before, answer, thinking = empty
    for part in conversation.parts:
        row = part.turn - 1
        if part.role == "user":
            user[row] = _mean(values[part.start : part.stop])
            if part == conversation.parts[-1]:  # a message that is not answered yet
                before[row] = values[-1]
        elif part.role == "assistant":
            thought = part.thinking and (part.thinking[0] - part.start, part.thinking[1] - part.start)
            before[row] = values[part.start - 1]
            answer[row], thinking[row] = answer_means(values[part.start : part.stop], thought)
    return TurnReadings(conversation.name, probes, user, before, answer, thinking)


def answer_means(
    values: Float[np.ndarray, "position probe"], thinking: Interval | None
) -> tuple[Float[np.ndarray, " probe"], Float[np.ndarray, " probe"]]:
    """Means over an answer's tokens without its thinking, and over its thinking; NaN where there are none."""
    first, last = thinking or (0, 0)
    return _mean(np.concatenate([values[:first], values[last:]])), _mean(values[first:last])


def _mean(values: Float[np.ndarray, "position probe"]) -> Float[np.ndarray, " probe"]:
    return values.mean(0) if len(values) else np.full(values.shape[1], np.nan)


def _rendered(model: ChatModel, conversations: Mapping[str, Sequence[Message]] | Sequence[Rendered]) -> list[Rendered]:
    if not isinstance(conversations, Mapping):
        return list(conversations)
    found: list[Rendered] = []
    for name, messages in conversations.items():
        try:
            found.append(render(model, name, messages))
        except ValueError as error:
            raise ValueError(f"conversation {name!r}: {error}") from error
    return found


def _values(
    model: ChatModel, conversations: Sequence[Rendered], layers: Sequence[LayerProbes], n_probes: int, batch_tokens: int
) -> Iterator[tuple[int, Float[Tensor, "position probe"]]]:
    """Index and projections of each conversation, batch by batch (in order of length)."""
    spans = [c.span for c in conversations]
    for indices in token_batches(spans, batch_tokens):
        batch = [spans[i] for i in indices]
        values = _read_batch(model, batch, layers, n_probes)
        for row, i in enumerate(indices):
            one = values[row, : len(spans[i])].clone()
            if not bool(one.isfinite().all()):
                raise ActivationError(
                    f"{spans[i].name}: a projection is not finite: load the model in float32 or bfloat16 "
                    "(float16 overflows on many models)"
                )
            yield i, one


@torch.inference_mode()
def _read_batch(
    model: ChatModel, batch: Sequence[Span], layers: Sequence[LayerProbes], n_probes: int
) -> Float[Tensor, "batch position probe"]:
    ids, mask = (x.to(model.device) for x in right_pad(batch, model.pad_id))
    out = torch.zeros(*ids.shape, n_probes, device=model.device)
    hooks = [(model.hook_name(x.layer), _projector(out, x)) for x in layers]
    with model.hooks(hooks), forward_pass(span_pass(batch, ids.shape[1], model.device)):
        model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return out.cpu()


def _projector(out: Float[Tensor, "batch position probe"], probes: LayerProbes) -> Any:
    def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
        out[..., list(probes.places)] = residual.float() @ probes.directions

    return hook

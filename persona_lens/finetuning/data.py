"""Training data: conversations as token ids, with what is learned of them.

Only answers are learned, each with the token that ends it (Chen et al. 2025, section 4: loss on responses only). Their places come
from the chat template's own prefixes, never from searching the text. What cannot be trained on is told before training starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from persona_lens.errors import FinetuningError
from persona_lens.models import ChatModel, Interval, Message, dialogue, earlier_tokens
from persona_lens.transcripts import Skipped, Transcript, Transcripts, read_transcripts, transcripts_of

Data = str | Path | Sequence[Sequence[Message]] | Sequence[Mapping[str, Any]]
IGNORE: Final = -100  # what the loss leaves out
_REASONS, _PLACES = 6, 8  # shown in an error


@dataclass(frozen=True)
class Example:
    """A conversation as token ids up to the end of its last answer, and [start, stop) of its answers, each with its end token."""

    name: str
    ids: tuple[int, ...]
    answers: tuple[Interval, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examples:
    """What is trained on, and the rows that are not (with the reason)."""

    examples: tuple[Example, ...]
    skipped: tuple[Skipped, ...]


def read_data(data: Data) -> Transcripts:
    """The conversations of a file (`messages` per line, see `transcripts`), or of messages that are there already.

    Raises:
        TranscriptError: a file that cannot be read, or holds no conversation.
    """
    if isinstance(data, str | Path):
        return read_transcripts(data)
    return transcripts_of([row if isinstance(row, Mapping) else [dict(message) for message in row] for row in data])


def encode(model: ChatModel, found: Transcripts, *, max_tokens: int, skip_bad: bool = False) -> Examples:
    """Conversations as examples to train on.

    Args:
        found: what `read_data` read.
        max_tokens: longest conversation; the model's context if that is shorter.
        skip_bad: leave rows out that cannot be trained on, instead of raising.

    Raises:
        FinetuningError: rows that cannot be trained on (how many, why, and where), or none that can.
    """
    limit = min(max_tokens, model.context or max_tokens)
    examples: list[Example] = []
    skipped = list(found.skipped)
    for chat in found.chats:
        try:
            examples.append(_example(model, chat, limit))
        except ValueError as error:
            skipped.append(Skipped(chat.place, str(error)))
    skipped.sort(key=lambda s: s.place)
    total = len(examples) + len(skipped)
    if skipped and not skip_bad:
        raise FinetuningError(
            f"{found.path}: {len(skipped)} of {total} rows cannot be trained on: {_reasons(skipped, found.unit)}; "
            "mend them, or leave them out (`finetune` does so with skip_bad=True, --skip-bad)"
        )
    if not examples:
        raise FinetuningError(f"{found.path}: no row can be trained on ({_reasons(skipped, found.unit) or 'it holds none'})")
    return Examples(tuple(examples), tuple(skipped))


def _reasons(skipped: Sequence[Skipped], unit: str) -> str:
    """Every reason with its count and places."""
    places: dict[str, list[int]] = {}
    for one in skipped:
        places.setdefault(one.reason, []).append(one.place)
    shown = [
        f"{len(at)} x {reason} ({unit} {', '.join(map(str, at[:_PLACES]))}{', ...' if len(at) > _PLACES else ''})"
        for reason, at in sorted(places.items(), key=lambda x: -len(x[1]))
    ]
    more = f"; {len(shown) - _REASONS} more reasons" if len(shown) > _REASONS else ""
    return "; ".join(shown[:_REASONS]) + more


def _example(model: ChatModel, chat: Transcript, limit: int) -> Example:
    last = max(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
    messages = chat.messages[: last + 1]
    places = dialogue(model, messages).answers
    ids = model.render(messages, answered=True)
    answers = tuple((start, stop + (stop < len(ids) and ids[stop] in model.stop_ids)) for start, stop in places)
    end = answers[-1][1]
    if end > limit:
        raise ValueError(f"longer than {limit} tokens")
    return Example(chat.name, tuple(ids[:end]), answers)


def batch_of(examples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """Right-padded ids, mask and labels, and which tokens are prompt, answered from, or the same of earlier answers.

    Args:
        examples: mappings with an `Example` as "example", as data loaders hand them over.
    """
    rows: list[Example] = [x["example"] for x in examples]
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORE)
    mask, prompt, response = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(3))
    for i, row in enumerate(rows):
        n, (start, stop) = len(row.ids), row.answers[-1]
        ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = True
        prompt[i, :start] = True
        response[i, start - 1 : stop - 1] = True
        for a, b in row.answers:
            labels[i, a:b] = ids[i, a:b]
    earlier = earlier_tokens([[(a, b - 1) for a, b in row.answers[:-1]] for row in rows], [0] * len(rows), width, "cpu")
    return {
        "input_ids": ids, "attention_mask": mask.long(), "labels": labels,
        "prompt": prompt, "response": response, "earlier": earlier,
    }  # fmt: skip

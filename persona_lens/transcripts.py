"""Chats that people have on disk, read into conversations without a model.

Records are told apart one by one, not by the file's name: `messages` as OpenAI's API and finetuning files have them, with the
completion beside its request where there is one, ShareGPT's `conversations`, and bare lists of messages. A record that is no
conversation is skipped with its place and the reason; nothing is guessed or converted to text.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from persona_lens.errors import TranscriptError
from persona_lens.store import write_atomically

ROLES: Final = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt"), "assistant"),
}
_CHAT_FIELDS: Final = ("messages", "conversations", "conversation")
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_EXPECTED: Final = 'one {"messages": [{"role": "user", "content": "..."}, ...]} per line, or a JSON array of such records'
_BLANK: Final = " \t\r\n"  # what JSON counts as white space
_LONGEST_INTEGER: Final = 100  # digits; Python refuses to read thousands of them, and no id has that many
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_SHOWN: Final = 40  # characters of a value in a reason


@dataclass(frozen=True)
class Transcript:
    """A conversation from a file.

    Attributes:
        name: the record's own id, or its place ("line 12"); unique within what `read_transcripts` and `transcripts_of` return.
        place: line of the file, or item of its JSON array, from 1.
        messages: role (system, user or assistant) and content of each; an optional system message, then user and assistant in
            turns, with at least one assistant turn.
    """

    name: str
    place: int
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Skipped:
    """A record that is no conversation: its place, and why."""

    place: int
    reason: str


@dataclass(frozen=True)
class Transcripts:
    """What a file holds.

    Attributes:
        unit: what a place counts: "line", "item" of a JSON array, or "row" of what was no file.
    """

    path: Path
    chats: tuple[Transcript, ...]
    skipped: tuple[Skipped, ...]
    unit: str = "line"


class UnreadableError(Exception):
    """Why a record is skipped. In place of a record it stands for one that could not be decoded."""


def read_transcripts(path: str | Path) -> Transcripts:
    """The conversations of a JSONL file, of a JSON array, or of a single JSON record.

    Raises:
        TranscriptError: the file is missing, cannot be read, is not UTF-8, or holds not one conversation.
    """
    path = Path(path)
    text = _text(path)
    unit, records = records_of(text)
    found = _transcripts(path, unit, records)
    if not found.chats:
        why = _why(text, unit, found.skipped)
        raise TranscriptError(f"{path}: holds no conversation that can be read ({why}); expected {_EXPECTED}")
    return found


def transcripts_of(records: Iterable[Any]) -> Transcripts:
    """The same for conversations that are there already, as records or as lists of messages; places count rows from 1.

    Nothing is raised: what is no conversation is among the skipped.
    """
    return _transcripts(Path("rows"), "row", list(enumerate(records, start=1)))


def transcript_of(record: Any, place: int, unit: str = "row") -> Transcript | Skipped:
    """One record or list of messages as a conversation, named by its id or its place; or why it is none. Nothing is raised."""
    try:
        messages = _conversation(record)
    except UnreadableError as error:
        return Skipped(place, str(error))
    return Transcript(_id(record) or f"{unit} {place}", place, messages)


def _transcripts(path: Path, unit: str, records: Sequence[tuple[int, Any]]) -> Transcripts:
    chats: list[Transcript] = []
    skipped: list[Skipped] = []
    names: set[str] = set()
    for place, record in records:
        found = transcript_of(record, place, unit)
        if isinstance(found, Skipped):
            skipped.append(found)
            continue
        name = found.name
        while name in names:
            name += f" ({unit} {place})"
        names.add(name)
        chats.append(replace(found, name=name))
    return Transcripts(path, tuple(chats), tuple(skipped), unit)


def write_transcripts(path: str | Path, conversations: Iterable[tuple[str, Sequence[Mapping[str, str]]]]) -> None:
    """Write conversations, given as names and messages, as JSONL that `read_transcripts` reads back."""
    records = [{"id": name, "messages": [dict(m) for m in messages]} for name, messages in conversations]
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8")
    write_atomically(Path(path), lambda temporary: Path(temporary).write_bytes(content))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise TranscriptError(f"{path}: no such file; expected {_EXPECTED}") from error
    except UnicodeDecodeError as error:
        raise TranscriptError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8, {_EXPECTED}") from error
    except (OSError, ValueError) as error:
        raise TranscriptError(f"{path}: cannot be read ({error}); expected a file with {_EXPECTED}") from error


def records_of(text: str) -> tuple[str, list[tuple[int, Any]]]:
    """What places count, and every record with its place; an `UnreadableError` stands for a line that is not JSON."""
    whole = record_of(text)
    if isinstance(whole, UnreadableError):
        lines = enumerate(text.split("\n"), start=1)
        return "line", [(place, record_of(line)) for place, line in lines if line.strip(_BLANK)]
    if isinstance(whole, list) and not _is_chat(whole):
        return "item", list(enumerate(whole, start=1))
    before = text[: len(text) - len(text.lstrip(_BLANK))]
    return "line", [(before.count("\n") + 1, whole)]


def record_of(text: str) -> Any:
    """The value of a JSON text; an `UnreadableError` stands for a text that is not JSON. Nothing is raised."""
    try:
        return json.loads(text, parse_int=_number)
    except RecursionError:
        return UnreadableError("nested too deeply")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip(_BLANK) else ""
        return UnreadableError(f"not JSON ({error.msg} at {line}column {error.colno})")


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


def _is_chat(items: Sequence[Any]) -> bool:
    """Whether the list is one conversation, not several records."""
    return any(_has(item, "role", "from") for item in items) and not any(_has(i, *_CHAT_FIELDS, "request") for i in items)


def _has(value: Any, *fields: str) -> bool:
    return isinstance(value, dict) and any(field in value for field in fields)


def _id(record: Any) -> str | None:
    found = record.get("id") if isinstance(record, dict) else None
    if isinstance(found, bool) or not isinstance(found, str | int):
        return None
    if isinstance(found, int) and abs(found) >= 10**_LONGEST_INTEGER:
        return None
    return str(found) if str(found).strip() and _is_unicode(str(found)) else None


def _conversation(record: Any) -> tuple[dict[str, str], ...]:
    messages = [_message(number, message) for number, message in enumerate(_messages(record), start=1)]
    _check_turns([m["role"] for m in messages])
    return tuple(messages)


def _messages(record: Any) -> list[Any]:
    if isinstance(record, UnreadableError):
        raise record
    if isinstance(record, list):
        return record
    if not isinstance(record, dict):
        raise UnreadableError(f"{_kind(record)} instead of an object with messages")
    holders = [h for h in (record, record.get("request")) if isinstance(h, dict)]
    field, messages = next(((f, h[f]) for h in holders for f in _CHAT_FIELDS if h.get(f) is not None), ("", None))
    if messages is None:
        raise UnreadableError(f"no messages (none of the fields {', '.join(_CHAT_FIELDS)})")
    if not isinstance(messages, list):
        raise UnreadableError(f"{field} is {_kind(messages)}, not a list")
    return [*messages, *_reply(record)]


def _reply(record: Mapping[str, Any]) -> list[Any]:
    """The first choice of a completion that is stored beside its request, if there is one."""
    for holder in (record, record.get("response")):
        choices = holder.get("choices") if isinstance(holder, dict) else None
        if choices is None:
            continue
        if not isinstance(choices, list) or not choices or not _has(choices[0], "message"):
            raise UnreadableError("choices holds no message as its first")
        return [choices[0]["message"]]
    return []


def _message(number: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UnreadableError(f"message {number} is {_kind(message)}, not an object")
    keys = ("role", "content") if "role" in message else ("from", "value")
    role, content = (message.get(key) for key in keys)
    if role is None:
        raise UnreadableError(f"message {number} has no role")
    if not isinstance(role, str) or role not in ROLES:
        raise UnreadableError(f"unknown role {_shown(role)} of message {number}")
    return {"role": ROLES[role], "content": _content(number, content)}


def _content(number: int, content: Any) -> str:
    text = "".join(_part(number, part) for part in content) if isinstance(content, list) else content
    if text is None:
        raise UnreadableError(f"message {number} has no content (a message of tool calls only has none)")
    if not isinstance(text, str):
        raise UnreadableError(f"content of message {number} is {_kind(text)}, not text")
    if not text.strip():
        raise UnreadableError(f"message {number} is empty")
    if not _is_unicode(text):
        raise UnreadableError(f"message {number} holds half a surrogate pair, which is no text")
    return text


def _part(number: int, part: Any) -> str:
    if not isinstance(part, dict):
        raise UnreadableError(f"message {number} has a part that is {_kind(part)}, not an object")
    if part.get("type") not in _TEXT_PARTS:
        raise UnreadableError(f"message {number} has a part of type {_shown(part.get('type'))}: only text can be read")
    if not isinstance(part.get("text"), str):
        raise UnreadableError(f"message {number} has a part whose text is {_kind(part.get('text'))}")
    return part["text"]


def _check_turns(roles: Sequence[str]) -> None:
    if not roles:
        raise UnreadableError("no messages")
    if "system" in roles[1:]:
        raise UnreadableError(f"message {roles.index('system', 1) + 1} is a system message: only the first may be one")
    first = 1 if roles[0] == "system" else 0
    if roles[first : first + 1] == ["assistant"]:
        raise UnreadableError(f"begins with an assistant message (message {first + 1})")
    for number, (before, after) in enumerate(pairwise(roles), start=1):
        if before == after:
            raise UnreadableError(f"messages {number} and {number + 1} are both {after} messages")
    if "assistant" not in roles:
        raise UnreadableError("no assistant turn")


def _is_unicode(text: str) -> bool:
    return _SURROGATE.search(text) is None


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return kinds.get(type(value), f"a Python {type(value).__name__}")


def _shown(value: Any) -> str:
    """A value as a reason names it: short, and without control characters."""
    if not isinstance(value, str):
        return _kind(value)
    return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "...")


def _why(text: str, unit: str, skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return "it has no records"
    first = skipped[0]
    document = f"; as one JSON document: {record_of(text)}" if len(skipped) > 1 and first.reason.startswith("not JSON") else ""
    return f"{len(skipped)} skipped, the first at {unit} {first.place}: {first.reason}{document}"

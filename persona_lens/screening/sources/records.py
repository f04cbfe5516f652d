"""A record of a known form as a conversation: messages as `transcripts` reads them, or the fields of a prompt and of its answer."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final

from persona_lens.errors import ScreeningError
from persona_lens.transcripts import Skipped, Transcript, UnreadableError, record_of, transcript_of

CHATS: Final = ("messages", "conversations", "conversation")
PAIRS: Final = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_PREFERENCE: Final = ("chosen", "rejected")
# fields that mean something: no other columns of a table are read
COLUMNS: Final = {*CHATS, "request", "choices", "id", "input", "system", *_PREFERENCE, *chain.from_iterable(PAIRS)}
_NAMED, _SHOWN = 12, 40  # field names in a reason, and characters of each
_FORMS: Final = f"known are {', '.join(CHATS)}, or {', '.join(f'{p} with {a}' for p, a in PAIRS)}"


def conversation(record: Any, place: int, unit: str, fields: str | None = None) -> Transcript | Skipped:
    """A record of any known form as a conversation.

    Args:
        fields: names of all the fields, where the record holds the known ones only.
    """
    if not isinstance(record, dict):
        return transcript_of(record, place, unit)
    try:
        return transcript_of(_as_chat(record, fields), place, unit)
    except UnreadableError as error:
        return Skipped(place, str(error))


def _as_chat(record: dict[str, Any], fields: str | None) -> dict[str, Any]:
    """The record, if it holds messages, or one that does."""
    if all(record.get(field) is not None for field in _PREFERENCE):
        raise UnreadableError("a preference pair (chosen and rejected), not a prompt with one answer")
    pairs = [pair for pair in PAIRS if all(_filled(record.get(field)) for field in pair)]
    forms = [*_chat_fields(record)[:1], *(f"{prompt} with {answer}" for prompt, answer in pairs)]
    if len(forms) > 1:
        raise UnreadableError(f"more than one form matches: {'; '.join(forms)}")
    if pairs:
        return {"id": record.get("id"), "messages": _messages(record, *pairs[0])}
    if forms:
        return record
    for prompt, answer in PAIRS:
        if prompt in record and answer in record and (_filled(record[prompt]) or _filled(record[answer])):
            field, what = (answer, "no answer") if _filled(record[prompt]) else (prompt, "no prompt")
            raise UnreadableError(f"{what} ({field} is {'null' if record[field] is None else 'empty'})")
    raise UnreadableError(f"no conversation in its fields ({fields or listed(record)})")


def _chat_fields(record: Mapping[str, Any]) -> list[str]:
    request = record.get("request")
    holders = [record, *([request] if isinstance(request, dict) else [])]
    return [field for holder in holders for field in CHATS if holder.get(field) is not None]


def _filled(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != []


def _messages(record: Mapping[str, Any], prompt: str, answer: str) -> list[Any]:
    """System message, prompt and answer; prompt and answer may be lists of messages themselves."""
    asked = record[prompt]
    if prompt == "instruction" and _filled(record.get("input")):
        asked = f"{_text(record, prompt)}\n\n{_text(record, 'input')}"
    system = [{"role": "system", "content": _text(record, "system")}] if _filled(record.get("system")) else []
    user, assistant = (
        value if isinstance(value, list) else [{"role": role, "content": _text({field: value}, field, "neither text nor a list")}]
        for role, field, value in (("user", prompt, asked), ("assistant", answer, record[answer]))
    )
    return [*system, *user, *assistant]


def _text(record: Mapping[str, Any], field: str, otherwise: str = "not text") -> str:
    if not isinstance(record[field], str):
        raise UnreadableError(f"{field} is {otherwise}")
    return record[field]


def listed(names: Iterable[Any]) -> str:
    """Names as an error shows them: not all of very many, and without control characters."""
    texts = (name for name in names if isinstance(name, str))
    shown = [repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...") for name in islice(texts, _NAMED + 1)]
    return ", ".join([*shown[:_NAMED], "..."] if len(shown) > _NAMED else shown) or "none"


def unpacked(record: dict[str, Any]) -> dict[str, Any]:
    """A row of a table, with messages, or each of them, that are held as JSON text."""
    try:
        return {field: _parsed(value) if field in CHATS else value for field, value in record.items()}
    except UnreadableError as error:
        raise UnreadableError(f"messages as text: {error}") from error


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return [parsed_text(item) if isinstance(item, str) else item for item in value]
    return parsed_text(value) if isinstance(value, str) else value


def parsed_text(text: str) -> Any:
    found = record_of(text) if text.strip() else None
    if isinstance(found, UnreadableError):
        raise found
    return found


def known_columns(what: object, names: Sequence[str]) -> tuple[str, ...]:
    """The columns that mean something.

    Raises:
        ScreeningError: none, no known form, or one of them twice.
    """
    known = [name for name in names if name in COLUMNS]
    if twice := sorted(name for name, n in Counter(known).items() if n > 1):
        raise ScreeningError(f"{what}: two columns are called {twice[0]!r}: name them apart")
    if any(field in known for field in (*CHATS, "request")) or any({*pair} <= {*known} for pair in PAIRS):
        return tuple(known)
    if {*_PREFERENCE} <= {*known}:
        raise ScreeningError(f"{what}: holds preference pairs (chosen and rejected): write the answers to screen as messages")
    raise ScreeningError(f"{what}: no columns of a known form, but {listed(names)}; {_FORMS}: rename columns to one of these")


def decoded_text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 ({error.reason} at byte {error.start})") from error

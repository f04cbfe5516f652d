"""The one JSON object in what a language model wrote. The text is hostile: it is bounded, searched once, and never executed."""

import json
import unicodedata
from collections.abc import Generator, Sequence
from typing import Any, Final, cast

LONGEST: Final = 200_000  # characters of a reply
DEEPEST: Final = 8  # brackets within brackets
_ALLOWED: Final = "\n\r\t\u200c\u200d"  # joiners belong to some scripts and to emoji


def read_object(reply: str) -> tuple[dict[str, Any], bool]:
    """The JSON object of a reply, and whether anything but a space stands around it (prose, a code fence).

    Raises:
        ValueError: too long, nested too deeply, control characters, or not exactly one JSON object (which, and where).
    """
    if len(reply) > LONGEST:
        raise ValueError(f"the reply has {len(reply)} characters, at most {LONGEST} are read")
    if (bad := unprintable(reply)) is not None:
        raise ValueError(f"the reply holds the control character {bad}")
    found: list[tuple[dict[str, Any], str]] = []
    fault = "there is no { in it"
    for text in _braced(reply):
        try:
            found.append((json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant), text))
        except ValueError as error:
            fault = str(error)
    if len(found) != 1:
        why = f"({fault})" if not found else "with everything in it"
        raise ValueError(f"the reply holds {len(found) or 'no'} JSON object{'s' * (len(found) > 1)}, there must be one {why}")
    record, text = found[0]
    return record, reply.strip() != text


def unprintable(text: str) -> str | None:
    """The first control, format or surrogate character that has no place in a text, by its code point."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _ALLOWED:
            return f"U+{ord(character):04X}"
    return None


def strings(value: Any, path: tuple[str | int, ...] = ()) -> Generator[tuple[tuple[str | int, ...], str]]:
    """Every string in a JSON value, keys too, with where it stands."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in cast(dict[str, Any], value).items():
            yield path, key
            yield from strings(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(cast(list[Any], value)):
            yield from strings(inner, (*path, number))


def _braced(text: str) -> Generator[str]:
    """The outermost {...} of a text, in one pass.

    Raises:
        ValueError: nested too deeply, or a { that is never closed.
    """
    depth, start, quoted, escaped = 0, 0, False, False
    for place, character in enumerate(text):
        if quoted:
            escaped, quoted = character == "\\" and not escaped, character != '"' or escaped
        elif depth == 0:
            depth, start = int(character == "{"), place
        elif character == '"':
            quoted = True
        elif character in "{[":
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"the reply is nested deeper than {DEEPEST} brackets at character {place}")
        elif character in "}]":
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
    if depth:
        raise ValueError(f"the JSON object that begins at character {start} does not end: the reply may have been cut off")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")

"""The cache of replies: append-only JSONL, one line per reply under the hash of what was asked, one writer at a time."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from persona_lens.endpoints.request import Usage
from persona_lens.errors import EndpointError
from persona_lens.store import append_jsonl, read_jsonl

BEGINNING: Final = b'{"key": "'  # of every line


@dataclass(frozen=True)
class Reply:
    """A reply that could be read, the name it is kept under, and how many attempts went before it."""

    name: str
    content: Mapping[str, Any]
    retries: int


@dataclass(frozen=True)
class Kept:
    """The replies of a cache by name, and where new ones go."""

    path: Path | None
    replies: Mapping[str, Mapping[str, Any]]

    def add(self, replies: Sequence[Reply]) -> None:
        if self.path and replies:
            append_jsonl(self.path, [{"key": r.name, "retries": r.retries, "reply": r.content} for r in replies])


@contextmanager
def opened(cache: Path | None) -> Generator[Kept]:
    """A cache that no other process writes meanwhile; a line that a killed one left unfinished is cut off."""
    if cache is None:
        yield Kept(None, {})
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("ab") as file:
        _lock(file.fileno(), cache)
        _require_cache(cache)
        yield Kept(cache, {r["key"]: r["reply"] for r in records_of(cache, repair=True)})


def _lock(file: int, cache: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EndpointError(f"{cache} is being written by another call: wait for its end, or give another cache") from error


def _require_cache(path: Path) -> None:
    """Refuse a file of something else before its last line would be repaired."""
    with path.open("rb") as file:
        beginning = file.read(len(BEGINNING))
    if not BEGINNING.startswith(beginning):
        raise EndpointError(f"{path} holds something other than replies: give another file for the cache")


def records_of(cache: Path, *, repair: bool = False) -> list[dict[str, Any]]:
    records = read_jsonl(cache, repair=repair)
    for number, r in enumerate(records, start=1):
        if not (isinstance(r.get("key"), str) and isinstance(r.get("reply"), dict) and isinstance(r.get("retries"), int)):
            raise EndpointError(f"{cache}: line {number} is no stored reply: give another file, this one is no cache")
    return records


def usage(cache: Path) -> Usage:
    """What the replies in a cache cost when they were made.

    Raises:
        RunFolderError, EndpointError: the file is damaged, or no cache.
    """
    return sum((usage_of(r["reply"], r["retries"]) for r in records_of(cache)), Usage())


def usage_of(reply: Mapping[str, Any], retries: int) -> Usage:
    """What one reply cost; the server counts the tokens, and where it does not they are 0."""
    counted = reply.get("usage")
    tokens = cast("Mapping[str, Any]", counted if isinstance(counted, dict) else {})
    prompt, completion = (
        n if isinstance(n := tokens.get(name), int) and n >= 0 else 0 for name in ("prompt_tokens", "completion_tokens")
    )
    return Usage(1 + retries, retries, prompt, completion)

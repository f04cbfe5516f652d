"""The cache of replies: append-only JSONL, one line per reply under the hash of what was asked.

Several runs may share one: it is locked while it is read or written, and not in between. What two of them ask at the same time is
asked twice.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from persona_lens.endpoints.request import Usage
from persona_lens.errors import EndpointError
from persona_lens.store import append_jsonl, cut_torn_line, read_jsonl

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
            with _locked(self.path):
                cut_torn_line(self.path)  # of another run that was killed meanwhile
                append_jsonl(self.path, [{"key": r.name, "retries": r.retries, "reply": r.content} for r in replies])


def opened(cache: Path | None) -> Kept:
    """What a cache holds; a line that a killed run left unfinished is cut off."""
    if cache is None:
        return Kept(None, {})
    cache.parent.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        _require_cache(cache)
        return Kept(cache, {r["key"]: r["reply"] for r in records_of(cache, repair=True)})


@contextmanager
def _locked(cache: Path) -> Generator[None]:
    """Alone with the file; others wait."""
    with cache.open("ab") as file:
        with suppress(ImportError):  # systems without such locks
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield


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
    with _locked(cache):
        records = records_of(cache)
    return sum((usage_of(r["reply"], r["retries"]) for r in records), Usage())


def usage_of(reply: Mapping[str, Any], retries: int) -> Usage:
    """What one reply cost; the server counts the tokens, and where it does not they are 0."""
    counted = reply.get("usage")
    tokens = cast("Mapping[str, Any]", counted if isinstance(counted, dict) else {})
    prompt, completion = (
        n if isinstance(n := tokens.get(name), int) and n >= 0 else 0 for name in ("prompt_tokens", "completion_tokens")
    )
    return Usage(1 + retries, retries, prompt, completion)

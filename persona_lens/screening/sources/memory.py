"""Rows that are in memory: they travel in their shards."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona_lens.errors import ScreeningError
from persona_lens.screening.sources.base import Shard, Source, starts
from persona_lens.screening.sources.records import conversation
from persona_lens.transcripts import Skipped, Transcript


@dataclass(frozen=True)
class Rows:
    """Rows that are read already."""

    name: str
    unit: str
    rows: tuple[Transcript | Skipped, ...]
    known: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        return self.known

    def shards(self, rows: int) -> Iterator[Shard]:
        for number, start in enumerate(starts(len(self.rows), rows)):
            yield _RowShard(number, self.rows[start : start + rows])


@dataclass(frozen=True)
class _RowShard:
    number: int
    rows: tuple[Transcript | Skipped, ...]

    @property
    def first(self) -> int:
        return self.rows[0].place

    def read(self) -> list[Transcript | Skipped]:
        return list(self.rows)


def from_memory(data: Sequence[Any], name: str, split: str | None) -> Source:
    if split is not None:
        raise ScreeningError(f"{name}: rows in memory have no splits, so there is no {split!r}: leave split out")
    if not len(data):
        raise ScreeningError(f"{name}: holds no rows; expected conversations, as records or as lists of messages")
    rows = tuple(_in_memory(row, place) for place, row in enumerate(data, start=1))
    seen = hashlib.sha256()
    for row in rows:
        seen.update(json.dumps(row.reason if isinstance(row, Skipped) else [row.name, *row.messages]).encode() + b"\n")
    return Rows(name, "row", rows, {"kind": "memory", "rows": len(rows), "sha256": seen.hexdigest()})


def _in_memory(row: Any, place: int) -> Transcript | Skipped:
    try:
        return conversation(_plain(row), place, "row")
    except RecursionError:
        return Skipped(place, "nested too deeply")


def _plain(value: Any) -> Any:
    """Mappings and sequences as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value

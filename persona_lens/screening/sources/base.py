"""What a data set is to screening: rows in shards. And what is common to files of all kinds."""

import hashlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, runtime_checkable

from persona_lens.errors import ScreeningError
from persona_lens.transcripts import Skipped, Transcript

Data = str | Path | Sequence[Sequence[Mapping[str, Any]] | Mapping[str, Any]]
"""What `open_data` takes: a file, a folder, a name on the hub, or conversations in memory."""

BLOCK: Final = 64 * 2**10  # bytes
BLOCKS: Final = 64  # of a file that its digest sees
ENDINGS: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
EXPECTED: Final = f"a file ({', '.join(ENDINGS)}), a folder of Parquet files, or a folder written by `save_to_disk` of datasets"
BUFFER: Final = 2**20  # bytes read at once


@runtime_checkable
class Shard(Protocol):
    """Consecutive rows of a data set. Small, and can be pickled."""

    @property
    def number(self) -> int:
        """Place among the set's shards, from 0."""
        ...

    @property
    def first(self) -> int:
        """Place of its first row in the data."""
        ...

    def read(self) -> list[Transcript | Skipped]:
        """Its rows in order, each a conversation or skipped.

        Raises:
            ScreeningError: the data changed since, or cannot be read.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """A data set on disk or in memory."""

    @property
    def name(self) -> str:
        """What the data set is called."""
        ...

    @property
    def unit(self) -> str:
        """What places count, from 1: "line" of a file (also blank ones), "item" of a JSON array, or "row" below the header."""
        ...

    def identity(self) -> dict[str, Any]:
        """Which data this is, as JSON, without its path.

        A file is told by its size and by SHA-256 over 64 blocks of 64 KiB, evenly spaced, the first and the last bytes among
        them. What cannot be seen: changes between those blocks that keep the size of a file above 4 MiB. Of `datasets` it is the
        fingerprint, which tells data from other data, but not the same data that was prepared elsewhere. Of rows in memory it is
        a digest of what is read from them.
        """
        ...

    def shards(self, rows: int) -> Iterator[Shard]:
        """All rows in order, this many per shard (the last may have fewer): the same for the same data and number of rows.

        Raises:
            ScreeningError: rows below 1, or the data changed since it was opened, or cannot be read.
        """
        ...


def starts(total: int, rows: int) -> range:
    return range(0, total, at_least_one(rows))


def at_least_one(rows: int) -> int:
    if rows < 1:
        raise ScreeningError(f"a shard needs at least 1 row, not {rows}")
    return rows


@dataclass(frozen=True)
class File:
    path: Path
    size: int

    @contextmanager
    def opened(self) -> Generator[BinaryIO]:
        with told(self.path), self.path.open("rb", buffering=BUFFER) as file:
            self.check(os.fstat(file.fileno()).st_size)
            yield file

    def check(self, size: int) -> None:
        if size != self.size:
            raise ScreeningError(f"{self.path}: changed since it was opened ({self.size} bytes then, {size} now): screen it anew")

    def identity(self) -> dict[str, Any]:
        blocks = min(BLOCKS, -(-self.size // BLOCK))
        seen = hashlib.sha256(str(self.size).encode())
        with self.opened() as file:
            for block in range(blocks):
                file.seek(block * max(self.size - BLOCK, 0) // max(blocks - 1, 1))
                seen.update(file.read(BLOCK))
        return {"size": self.size, "sha256": seen.hexdigest()}


@contextmanager
def told(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ScreeningError(f"{path}: cannot be read ({first_line(error)})") from error


@contextmanager
def told_by_library(what: str) -> Generator[None]:
    try:
        yield
    except ScreeningError:
        raise
    except Exception as error:  # pyarrow and datasets raise errors of a dozen kinds
        raise ScreeningError(f"{what} ({type(error).__name__}: {first_line(error)})") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

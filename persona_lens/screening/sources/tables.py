"""Tables, whose rows are counted: Parquet files, and what the package `datasets` holds, saved or loaded."""

import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Final

from persona_lens.errors import ScreeningError
from persona_lens.screening.sources.base import BUFFER, EXPECTED, File, Shard, Source, first_line, starts, told, told_by_library
from persona_lens.screening.sources.records import conversation, decoded_text, known_columns, listed, parsed_text, unpacked
from persona_lens.transcripts import Skipped, Transcript, UnreadableError

_BATCH: Final = 256  # rows of a table that are converted at once


def _table_rows(batch: Any, place: int, columns: Sequence[str], fields: str) -> list[Transcript | Skipped]:
    """The rows of a pyarrow.RecordBatch, the first of which has this place."""
    batch = batch.select(list(columns))
    as_json = {column.name: _as_json(column.type) for column in batch.schema}
    rows: list[Transcript | Skipped] = []
    for at, record in enumerate(_records(batch), start=place):
        try:
            if isinstance(record, UnreadableError):
                raise record
            plain = {name: as_json[name](value) for name, value in record.items()}
            rows.append(conversation(unpacked(plain), at, "row", fields))
        except UnreadableError as error:
            rows.append(Skipped(at, str(error)))
    return rows


def _records(batch: Any) -> list[Any]:
    """Rows as dictionaries; an `UnreadableError` stands for one that Python cannot hold."""
    try:
        batch.validate(full=True)
        return batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, ArithmeticError, LookupError, RuntimeError) as error:  # pyarrow's own errors are among them
        if len(batch) > 1:
            return [record for row in range(len(batch)) for record in _records(batch.slice(row, 1))]
        why = "not UTF-8" if "UTF8" in str(error) else f"a value cannot be read ({first_line(error)})"
        return [UnreadableError(why)]


def _as_json(kind: Any) -> Callable[[Any], Any]:
    """What turns a value of a pyarrow.DataType into what JSON would have held: nulls of fields that are absent go."""
    import pyarrow.types as types

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else parsed_text(value)
    if types.is_struct(kind):
        fields = {field.name: _as_json(field.type) for field in kind}
        return lambda value: value and {name: fields[name](inner) for name, inner in value.items() if inner is not None}
    if types.is_map(kind):
        inside = _as_json(kind.item_type)
        return lambda value: value and {name: inside(inner) for name, inner in value.items() if inner is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inside = _as_json(kind.value_type)
        return lambda value: value and [inside(inner) for inner in value]
    if types.is_binary(kind) or types.is_large_binary(kind):
        return lambda value: None if value is None else decoded_text(value)
    return lambda value: value


def _package(name: str, purpose: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ScreeningError(f"{purpose} needs {name.partition('.')[0]}: pip install 'persona-lens[screen]'") from error


@dataclass(frozen=True)
class _Part:
    """A Parquet file.

    Attributes:
        columns: that mean something.
        fields: all columns as an error shows them.
    """

    file: File
    rows: int
    columns: tuple[str, ...]
    fields: str


@dataclass(frozen=True)
class _Parquet:
    """Rows of Parquet files, one after another."""

    name: str
    parts: tuple[_Part, ...]
    unit: str = "row"

    def identity(self) -> dict[str, Any]:
        return {"kind": "parquet", "files": [part.file.identity() for part in self.parts]}

    def shards(self, rows: int) -> Iterator[Shard]:
        begins = [0, *accumulate(part.rows for part in self.parts)]
        for number, start in enumerate(starts(begins[-1], rows)):
            stop = min(start + rows, begins[-1])
            pieces = tuple(
                (part, max(start - begin, 0), min(stop - begin, part.rows))
                for part, begin in zip(self.parts, begins, strict=False)
                if begin < stop and start < begin + part.rows
            )
            yield _ParquetShard(number, start + 1, pieces)


@dataclass(frozen=True)
class _ParquetShard:
    number: int
    first: int
    pieces: tuple[tuple[_Part, int, int], ...]

    def read(self) -> list[Transcript | Skipped]:
        rows: list[Transcript | Skipped] = []
        for part, start, stop in self.pieces:
            reader = _reader(part)
            for batch in reader.read(start, stop):
                rows += _table_rows(batch, self.first + len(rows), part.columns, part.fields)
            _HELD.reader = reader
        return rows


class _Reader:
    """An open Parquet file. It goes on from where reading stopped: pyarrow can begin at row groups only, and those may be large."""

    def __init__(self, path: Path, columns: Sequence[str], key: object) -> None:
        self.path, self.columns, self.key = path, list(columns), key
        with told_by_library(f"{path}: cannot be read as Parquet"):
            self.file = _opened(path)
            groups = range(self.file.metadata.num_row_groups)
            self.begins = [0, *accumulate(self.file.metadata.row_group(g).num_rows for g in groups)]
        self.rest: Any = None
        self._seek(0)

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Batches of rows [start, stop) of the file."""
        if start < self.at or self._group(start) > self._group(self.at):
            self._seek(self._group(start))
        while self.at < stop:
            self._fill()
            wanted = self.at >= start
            taken = self.rest.slice(0, (stop if wanted else start) - self.at)
            self.at, self.rest = self.at + len(taken), self.rest.slice(len(taken))
            if wanted:
                yield taken

    def _group(self, row: int) -> int:
        return bisect_right(self.begins, row) - 1

    def _seek(self, group: int) -> None:
        self.at, self.rest = self.begins[group], None
        self.batches = chain.from_iterable(  # one row group after the other: then a damaged one hides no rows of others
            self.file.iter_batches(batch_size=_BATCH, row_groups=[g], columns=self.columns, use_threads=False)
            for g in range(group, len(self.begins) - 1)
        )

    def _fill(self) -> None:
        with told_by_library(f"{self.path}: cannot be read as Parquet"):
            while self.rest is None or not len(self.rest):
                self.rest = next(self.batches, None)
                if self.rest is None:
                    raise ScreeningError(f"{self.path}: holds fewer rows than it says: write it anew")


_HELD: Final = threading.local()  # the reader that this thread used last


def _reader(part: _Part) -> _Reader:
    """The reader used last, if it reads this file; whoever is done with it holds it again, so that none is held after an error."""
    with told(part.file.path):
        now = part.file.path.stat()
    part.file.check(now.st_size)
    key = (os.getpid(), part, now.st_ino, now.st_mtime_ns)
    held: _Reader | None = vars(_HELD).pop("reader", None)
    return held if held is not None and held.key == key else _Reader(part.file.path, part.columns, key)


def _opened(path: Path) -> Any:
    parquet = _package("pyarrow.parquet", "reading Parquet")
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)  # so that not all of a row group is held


def _part(file: File) -> _Part:
    with told_by_library(f"{file.path}: cannot be read as Parquet"), _opened(file.path) as opened:
        names, rows = opened.schema_arrow.names, opened.metadata.num_rows
    return _Part(file, rows, known_columns(file.path, names), listed(names))


def from_parquet(what: object, name: str, paths: Sequence[Path]) -> Source:
    with told(paths[0]):
        files = [File(path, path.stat().st_size) for path in paths]
    parts = tuple(part for part in map(_part, files) if part.rows > 0)
    if not parts:
        raise ScreeningError(f"{what}: holds no rows")
    return _Parquet(name, parts)


@dataclass(frozen=True)
class _Dataset:
    """A data set of the package `datasets`: a table in memory-mapped files."""

    name: str
    table: Any
    fingerprint: str
    columns: tuple[str, ...]
    fields: str
    unit: str = "row"

    def identity(self) -> dict[str, Any]:
        return {"kind": "datasets", "rows": len(self.table), "fingerprint": self.fingerprint}

    def shards(self, rows: int) -> Iterator[Shard]:
        for number, start in enumerate(starts(len(self.table), rows)):
            yield _DatasetShard(number, start + 1, self.table.slice(start, rows), self.columns, self.fields)


@dataclass(frozen=True)
class _DatasetShard:
    """`table` is pickled as the names of its files and the range of rows."""

    number: int
    first: int
    table: Any
    columns: tuple[str, ...]
    fields: str

    def read(self) -> list[Transcript | Skipped]:
        rows: list[Transcript | Skipped] = []
        for batch in self.table.to_batches(max_chunksize=_BATCH):
            rows += _table_rows(batch, self.first + len(rows), self.columns, self.fields)
        return rows


def from_folder(path: Path, name: str, split: str | None) -> Source:
    if any((path / saved).is_file() for saved in ("dataset_dict.json", "state.json")):
        datasets = _package("datasets", "reading a folder of datasets")
        with told_by_library(f"{path}: cannot be read as a folder of datasets"):
            found = datasets.load_from_disk(path, keep_in_memory=False)
        return _dataset(path, found, name, split)
    with told(path):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".parquet" and file.is_file())
    if not files:
        raise ScreeningError(f"{path}: holds no Parquet files and was not written by `save_to_disk`; expected {EXPECTED}")
    parts = [re.fullmatch(r"(.+)-\d+-of-\d+", file.stem) for file in files]  # as the hub names the files of splits
    splits = {file: part[1] for file, part in zip(files, parts, strict=True) if part}
    if len(splits) < len(files):
        if split is not None:
            raise ScreeningError(f"{path}: its files name no splits (as in train-00000-of-00001.parquet): leave split out")
        return from_parquet(path, name, files)
    chosen = _split(path, sorted(set(splits.values())), split)
    return from_parquet(path, name, [file for file in files if splits[file] == chosen])


def from_hub(data: str, name: str, split: str | None) -> Source:
    datasets = _package("datasets", f"{data} is no file here; reading it from the hub")
    with told_by_library(f"{data}: no such file or folder, and no dataset that can be loaded"):
        found = datasets.load_dataset(data, split=split, keep_in_memory=False)
    return _dataset(data, found, name, None)


def _dataset(what: object, found: Any, name: str, split: str | None) -> Source:
    if isinstance(found, dict):
        found = found[_split(what, list(found), split)]
    elif split is not None and str(found.split) != split:
        raise ScreeningError(f"{what}: has no split {split!r}, but {found.split or 'no splits'}: leave split out")
    columns = known_columns(what, found.column_names)
    return _Dataset(name, found.data, found._fingerprint, columns, listed(found.column_names))


def _split(what: object, known: Sequence[str], split: str | None) -> str:
    if split is None and len(known) == 1:
        return known[0]
    if split is not None and split in known:
        return split
    wrong = "has several splits" if split is None else f"has no split {split!r}"
    raise ScreeningError(f"{what}: {wrong}; give one of {listed(known)} as split")

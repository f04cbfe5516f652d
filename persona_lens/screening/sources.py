"""Training data of any size, read in shards and never changed.

A shard is a fixed number of consecutive rows: the unit of work, of resume, and of what is sent to other processes. It says where
its rows are, not what they hold (rows that were in memory travel in it), so memory holds one shard at a time. Every row of a shard
is read as a conversation, or skipped with the reason. What a file is, its ending says; records are told apart one by one:
conversations as `transcripts` reads them, or the fields of a prompt and of its answer.
"""

import hashlib
import json
import os
import re
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate, chain, count, islice
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, Protocol, runtime_checkable

from persona_lens.errors import ScreeningError
from persona_lens.transcripts import Skipped, Transcript, UnreadableError, record_of, records_of, transcript_of

Data = str | Path | Sequence[Sequence[Mapping[str, Any]] | Mapping[str, Any]]

LONGEST: Final = 16 * 2**20  # bytes of a line or of a CSV record; what is longer is skipped
WHOLE: Final = 256 * 2**20  # bytes of a JSON document that is read at once
BLOCK: Final = 64 * 2**10  # bytes
BLOCKS: Final = 64  # of a file that its digest sees
CHATS: Final = ("messages", "conversations", "conversation")
PAIRS: Final = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("instruction", "output"),
)
_PREFERENCE: Final = ("chosen", "rejected")
# fields that mean something: no other columns of a table are read
_COLUMNS: Final = {*CHATS, "request", "choices", "id", "input", "system", *_PREFERENCE, *chain.from_iterable(PAIRS)}
_PACKED: Final = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar")
_ENDINGS: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_EXPECTED: Final = f"a file ({', '.join(_ENDINGS)}), a folder of Parquet files, or a folder written by `save_to_disk` of datasets"
_MARK: Final = b"\xef\xbb\xbf"  # byte order mark
_BLANK: Final = b" \t\r\n"
_BUFFER: Final = 2**20  # bytes read at once
_BATCH: Final = 256  # rows of a table that are converted at once
_SOME: Final = 64  # rows of the shards that single rows are looked up in
_NAMED, _SHOWN = 12, 40  # field names in a reason, and characters of each
_FORMS: Final = f"known are {', '.join(CHATS)}, or {', '.join(f'{p} with {a}' for p, a in PAIRS)}"


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
    def name(self) -> str: ...

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


def open_data(data: Data, *, name: str | None = None, split: str | None = None) -> Source:
    """Find out what the data is.

    Names of conversations are their ids, or their places; ids may repeat, places do not.

    Args:
        data: a file (JSON lines, CSV or TSV with a header, Parquet; a JSON document of up to 256 MiB); a folder of Parquet files,
            or one that `save_to_disk` of datasets wrote; the name of a dataset on the hub ("owner/name"); or records, or lists of
            messages. CSV and TSV are quoted as RFC 4180 says.
        name: of the set; the file's, folder's or dataset's, or "rows", if not given.
        split: which one, where the data has several.

    Raises:
        ScreeningError: no such data; nothing in it that can be read; a split is missing or unknown; a package is not installed.
    """
    if not isinstance(data, str | Path):
        return _memory(data, name or "rows", split)
    path = Path(data)
    with _told(path):
        exists, folder, file = path.exists(), path.is_dir(), path.is_file()
    if not exists:
        if isinstance(data, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", data) or path.suffix.lower() in (*_ENDINGS, *_PACKED):
            raise ScreeningError(f"{path}: no such file or folder; expected {_EXPECTED}, or a dataset's name (owner/name)")
        return _hub(data, name or data, split)
    path = path.absolute()
    if folder:
        return _folder(path, name or path.resolve().name, split)
    if not file:
        raise ScreeningError(f"{path}: neither a file nor a folder; expected {_EXPECTED}")
    if split is not None:
        raise ScreeningError(f"{path}: a file has no splits, so there is no {split!r}: leave split out")
    return _file(path, name or path.stem)


def read_places(source: Source, places: Sequence[int]) -> dict[int, Transcript]:
    """Read some rows again, by their places, in one pass over the data at most.

    Raises:
        ScreeningError: a place that holds no conversation (any more).
    """
    wanted = sorted(set(places))
    found: dict[int, Transcript | Skipped] = {}
    shards = source.shards(_SOME)
    shard = next(shards, None)
    while shard is not None and len(found) < len(wanted):
        after = next(shards, None)
        if wanted[len(found)] < shard.first:
            break
        if after is None or wanted[len(found)] < after.first:
            rows = {row.place: row for row in shard.read()}
            found |= {place: rows[place] for place in wanted if place in rows}
        shard = after
    chats = {place: row for place, row in found.items() if isinstance(row, Transcript)}
    if bad := [place for place in wanted if place not in chats]:
        row = found.get(bad[0])
        why = row.reason if isinstance(row, Skipped) else "there is no such row"
        raise ScreeningError(
            f"{source.name}: {source.unit} {bad[0]} holds no conversation ({why}): give the data that the places were taken from"
        )
    return chats


# Records


def _conversation(record: Any, place: int, unit: str, fields: str | None = None) -> Transcript | Skipped:
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
    raise UnreadableError(f"no conversation in its fields ({fields or _listed(record)})")


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


def _listed(names: Iterable[Any]) -> str:
    """Names as an error shows them: not all of very many, and without control characters."""
    texts = (name for name in names if isinstance(name, str))
    shown = [repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...") for name in islice(texts, _NAMED + 1)]
    return ", ".join([*shown[:_NAMED], "..."] if len(shown) > _NAMED else shown) or "none"


def _unpacked(record: dict[str, Any]) -> dict[str, Any]:
    """A row of a table, with messages, or each of them, that are held as JSON text."""
    try:
        return {field: _parsed(value) if field in CHATS else value for field, value in record.items()}
    except UnreadableError as error:
        raise UnreadableError(f"messages as text: {error}") from error


def _parsed(value: Any) -> Any:
    if isinstance(value, list):
        return [_parsed_text(item) if isinstance(item, str) else item for item in value]
    return _parsed_text(value) if isinstance(value, str) else value


def _parsed_text(text: str) -> Any:
    found = record_of(text) if text.strip() else None
    if isinstance(found, UnreadableError):
        raise found
    return found


# Memory


@dataclass(frozen=True)
class _Rows:
    """Rows that are read already."""

    name: str
    unit: str
    rows: tuple[Transcript | Skipped, ...]
    known: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        return self.known

    def shards(self, rows: int) -> Iterator[Shard]:
        for number, start in enumerate(_starts(len(self.rows), rows)):
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


def _memory(data: Sequence[Any], name: str, split: str | None) -> Source:
    if split is not None:
        raise ScreeningError(f"{name}: rows in memory have no splits, so there is no {split!r}: leave split out")
    if not len(data):
        raise ScreeningError(f"{name}: holds no rows; expected conversations, as records or as lists of messages")
    rows = tuple(_in_memory(row, place) for place, row in enumerate(data, start=1))
    seen = hashlib.sha256()
    for row in rows:
        seen.update(json.dumps(row.reason if isinstance(row, Skipped) else [row.name, *row.messages]).encode() + b"\n")
    return _Rows(name, "row", rows, {"kind": "memory", "rows": len(rows), "sha256": seen.hexdigest()})


def _in_memory(row: Any, place: int) -> Transcript | Skipped:
    try:
        return _conversation(_plain(row), place, "row")
    except RecursionError:
        return Skipped(place, "nested too deeply")


def _plain(value: Any) -> Any:
    """Mappings and sequences as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _starts(total: int, rows: int) -> range:
    return range(0, total, _at_least_one(rows))


def _at_least_one(rows: int) -> int:
    if rows < 1:
        raise ScreeningError(f"a shard needs at least 1 row, not {rows}")
    return rows


# Files


@dataclass(frozen=True)
class _File:
    path: Path
    size: int

    @contextmanager
    def opened(self) -> Generator[BinaryIO]:
        with _told(self.path), self.path.open("rb", buffering=_BUFFER) as file:
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
def _told(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise ScreeningError(f"{path}: cannot be read ({_first_line(error)})") from error


@contextmanager
def _told_by_library(what: str) -> Generator[None]:
    try:
        yield
    except ScreeningError:
        raise
    except Exception as error:  # pyarrow and datasets raise errors of a dozen kinds
        raise ScreeningError(f"{what} ({type(error).__name__}: {_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _file(path: Path, name: str) -> Source:
    ending = path.suffix.lower()
    if ending in _PACKED:
        raise ScreeningError(f"{path}: packed files are not read: unpack it first")
    if ending not in _ENDINGS:
        raise ScreeningError(f"{path}: unknown ending {ending!r}; expected {_EXPECTED}")
    with _told(path):
        file = _File(path, path.stat().st_size)
    if not file.size:
        raise ScreeningError(f"{path}: the file is empty")
    if ending == ".parquet":
        return _parquet(path, name, [path])
    if ending in (".csv", ".tsv"):
        return _csv(file, name, "," if ending == ".csv" else "\t")
    return (_document(file, name) if ending == ".json" else None) or _json_lines(file, name)


# Text files: rows are ranges of bytes


@dataclass(frozen=True)
class _Row:
    """A row of a file: offset of its first byte, its place, and its bytes, or None if they are too many."""

    start: int
    place: int
    content: bytes | None

    def text(self) -> str:
        """Raises UnreadableError: too long, or not UTF-8."""
        if self.content is None:
            raise UnreadableError(f"longer than {LONGEST} bytes")
        return _decoded(self.content)


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 ({error.reason} at byte {error.start})") from error


@runtime_checkable
class _Format(Protocol):
    """How a file of text is cut into rows, and how one is read."""

    @property
    def kind(self) -> str: ...

    def cut(self, file: BinaryIO, start: int, place: int) -> Iterator[_Row]:
        """The rows from the one that begins at `start` on, whose place is given (or that of a blank line before it)."""
        ...

    def read(self, row: _Row) -> Transcript | Skipped: ...


@dataclass(frozen=True)
class _Text:
    """A file of text; its first row begins at `start`."""

    name: str
    unit: str
    file: _File
    format: _Format
    start: int
    first: int

    def identity(self) -> dict[str, Any]:
        return {"kind": self.format.kind, "files": [self.file.identity()]}

    def shards(self, rows: int) -> Iterator[Shard]:
        _at_least_one(rows)
        with self.file.opened() as file:
            found = self.format.cut(file, self.start, self.first)
            for number in count():
                if (row := next(found, None)) is None:
                    return
                start, place = row.start, row.place
                held = 1 + sum(1 for _ in islice(found, rows - 1))
                yield _TextShard(number, place, self.file, self.format, start, held)


@dataclass(frozen=True)
class _TextShard:
    number: int
    first: int
    file: _File
    format: _Format
    start: int
    rows: int

    def read(self) -> list[Transcript | Skipped]:
        with self.file.opened() as file:
            found = [self.format.read(row) for row in islice(self.format.cut(file, self.start, self.first), self.rows)]
        if len(found) < self.rows:
            raise ScreeningError(f"{self.file.path}: changed since it was opened: screen it anew")
        return found


@dataclass(frozen=True)
class _JsonLines:
    """A JSON value per line. Lines of white space are no rows, but places count them."""

    kind: str = "json lines"

    def cut(self, file: BinaryIO, start: int, place: int) -> Iterator[_Row]:
        file.seek(start)
        while piece := file.readline(LONGEST + 1):
            begin, content, blank = start, piece, _is_blank(piece)
            start += len(piece)
            while len(piece) > LONGEST and not piece.endswith(b"\n"):
                content, piece = None, file.readline(LONGEST + 1)
                start += len(piece)
                blank = blank and _is_blank(piece)
            if not blank:
                yield _Row(begin, place, content)
            place += 1

    def read(self, row: _Row) -> Transcript | Skipped:
        try:
            return _conversation(record_of(row.text().removesuffix("\n")), row.place, "line")
        except UnreadableError as error:
            return Skipped(row.place, str(error))


def _is_blank(line: bytes) -> bool:
    return not line.lstrip(_BLANK)


def _json_lines(file: _File, name: str) -> Source:
    lines = _JsonLines()
    with file.opened() as opened:
        first = next(lines.cut(opened, _skip_mark(opened), 1), None)
    if first is None:
        raise ScreeningError(f"{file.path}: holds no rows; expected a JSON record per line")
    return _Text(name, "line", file, lines, first.start, first.place)


def _skip_mark(file: BinaryIO) -> int:
    return len(_MARK) if file.read(len(_MARK)) == _MARK else 0


def _document(file: _File, name: str) -> Source | None:
    """A file that is one JSON document, read whole; None for JSON lines, and for what is not UTF-8 (then its lines say where)."""
    with file.opened() as opened:
        rows = _JsonLines().cut(opened, _skip_mark(opened), 1)
        first, second = next(rows, None), next(rows, None)
        if first is None or _begins_lines(first, second):
            return None
        if file.size > WHOLE:
            raise ScreeningError(
                f"{file.path}: its first line is no JSON record, and a JSON document of {file.size} bytes is not read at once "
                f"(at most {WHOLE}): turn it into JSON lines, one record per line"
            )
        opened.seek(0)
        try:
            text = opened.read().decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
    unit, records = records_of(text)
    found = tuple(_conversation(record, place, unit) for place, record in records)
    if not any(isinstance(row, Transcript) for row in found):
        why = f"{unit} {found[0].place}: {found[0].reason}" if found and isinstance(found[0], Skipped) else "it has no records"
        broken = f"; as one JSON document: {error}" if isinstance(error := record_of(text), UnreadableError) else ""
        raise ScreeningError(f"{file.path}: holds no conversation that can be read ({why}{broken})")
    return _Rows(name, unit, found, {"kind": "json", "files": [file.identity()]})


def _begins_lines(first: _Row, second: _Row | None) -> bool:
    try:
        value = record_of(first.text())
    except UnreadableError:
        return False
    return isinstance(value, dict) or (isinstance(value, list) and second is not None)


# where in a CSV record: where a field begins, in it, between quotes, or after a quote there, which may close it or be doubled
_Place = Literal["field", "plain", "quoted", "closed"]


@dataclass(frozen=True)
class _Csv:
    """Records of fields between delimiters, quoted as RFC 4180 says: only at its start is a field opened by a quote.

    Empty lines are no rows.

    Attributes:
        columns: names in the header.
        fields: the same as an error shows them.
    """

    kind: str
    delimiter: str
    columns: tuple[str, ...] = ()
    fields: str = ""

    def cut(self, file: BinaryIO, start: int, place: int) -> Iterator[_Row]:
        file.seek(start)
        begin, delimiter = start, self.delimiter.encode()
        held = bytearray()
        state: _Place = "field"
        while True:
            piece = file.readline(LONGEST + 1)
            state = _after(piece, state, delimiter)
            start += len(piece)
            if start - begin <= LONGEST + 1:
                held += piece
            else:
                held.clear()
            if piece and (state == "quoted" or not piece.endswith(b"\n")):
                continue
            if start == begin:
                return
            content = bytes(held) if start - begin - held.endswith(b"\n") <= LONGEST else None
            if content is None or content.strip(b"\r\n"):
                yield _Row(begin, place, content)
                place += 1
            begin, state = start, "field"
            held.clear()

    def read(self, row: _Row) -> Transcript | Skipped:
        try:
            if row.content is None:
                raise UnreadableError(f"longer than {LONGEST} bytes: if a quote is missing, later rows were taken for a part of it")
            values = _fields(row.text(), self.delimiter)
            if len(values) != len(self.columns):
                raise UnreadableError(f"the number of fields is {len(values)}, in the header {len(self.columns)}")
            record = {c: value or None for c, value in zip(self.columns, values, strict=True) if c in _COLUMNS}
            return _conversation(_unpacked(record), row.place, "row", self.fields)
        except UnreadableError as error:
            return Skipped(row.place, str(error))


def _after(piece: bytes, state: _Place, delimiter: bytes) -> _Place:
    """Where in a record a piece of a line ends that begins at `state`."""
    *parts, last = piece.split(b'"')
    for part in parts:  # each is followed by a quote
        if state == "quoted":
            state = "closed"
        elif part.endswith(delimiter) or (not part and state != "plain"):
            state = "quoted"
        else:
            state = "plain"
    if state == "quoted" or not last:
        return state
    return "field" if last.endswith(delimiter) else "plain"


def _fields(text: str, delimiter: str) -> list[str]:
    """The fields of a record. Raises UnreadableError: a quoted field that does not end, or goes on after its closing quote."""
    text = text.rstrip("\r\n")
    values: list[str] = []
    at = 0
    while True:
        if text.startswith('"', at):
            end = _closing_quote(text, at + 1)
            values.append(text[at + 1 : end].replace('""', '"'))
            at = end + 1
            if at < len(text) and not text.startswith(delimiter, at):
                raise UnreadableError(f"field {len(values)} goes on after its closing quote")
        else:
            end = text.find(delimiter, at)
            values.append(text[at:] if end < 0 else text[at:end])
            at += len(values[-1])
        if at == len(text):
            return values
        at += len(delimiter)


def _closing_quote(text: str, at: int) -> int:
    """Place of the first quote from `at` on that is not doubled."""
    while (at := text.find('"', at)) >= 0:
        if not text.startswith('"', at + 1):
            return at
        at += 2
    raise UnreadableError("a quoted field never ends: whatever follows in the file is taken for a part of it")


def _csv(file: _File, name: str, delimiter: str) -> Source:
    kind = "csv" if delimiter == "," else "tsv"
    with file.opened() as opened:
        rows = _Csv(kind, delimiter).cut(opened, _skip_mark(opened), 0)
        header, first = next(rows, None), next(rows, None)
    if header is None or first is None:
        raise ScreeningError(f"{file.path}: holds no rows; expected a header with the names of the columns, and rows below it")
    try:
        columns = tuple(_fields(header.text(), delimiter))
    except UnreadableError as error:
        raise ScreeningError(f"{file.path}: the header cannot be read ({error}); save it in UTF-8") from error
    _known_columns(file.path, columns)
    return _Text(name, "row", file, _Csv(kind, delimiter, columns, _listed(columns)), first.start, first.place)


# Tables: rows are counted


def _known_columns(what: object, names: Sequence[str]) -> tuple[str, ...]:
    """The columns that mean something.

    Raises:
        ScreeningError: none, no known form, or one of them twice.
    """
    known = [name for name in names if name in _COLUMNS]
    if twice := sorted(name for name, n in Counter(known).items() if n > 1):
        raise ScreeningError(f"{what}: two columns are called {twice[0]!r}: name them apart")
    if any(field in known for field in (*CHATS, "request")) or any({*pair} <= {*known} for pair in PAIRS):
        return tuple(known)
    if {*_PREFERENCE} <= {*known}:
        raise ScreeningError(f"{what}: holds preference pairs (chosen and rejected): write the answers to screen as messages")
    raise ScreeningError(f"{what}: no columns of a known form, but {_listed(names)}; {_FORMS}: rename columns to one of these")


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
            rows.append(_conversation(_unpacked(plain), at, "row", fields))
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
        why = "not UTF-8" if "UTF8" in str(error) else f"a value cannot be read ({_first_line(error)})"
        return [UnreadableError(why)]


def _as_json(kind: Any) -> Callable[[Any], Any]:
    """What turns a value of a pyarrow.DataType into what JSON would have held: nulls of fields that are absent go."""
    import pyarrow.types as types

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: None if value is None else _parsed_text(value)
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
        return lambda value: None if value is None else _decoded(value)
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

    file: _File
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
        for number, start in enumerate(_starts(begins[-1], rows)):
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
        with _told_by_library(f"{path}: cannot be read as Parquet"):
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
        with _told_by_library(f"{self.path}: cannot be read as Parquet"):
            while self.rest is None or not len(self.rest):
                self.rest = next(self.batches, None)
                if self.rest is None:
                    raise ScreeningError(f"{self.path}: holds fewer rows than it says: write it anew")


_HELD: Final = threading.local()  # the reader that this thread used last


def _reader(part: _Part) -> _Reader:
    """The reader used last, if it reads this file; whoever is done with it holds it again, so that none is held after an error."""
    with _told(part.file.path):
        now = part.file.path.stat()
    part.file.check(now.st_size)
    key = (os.getpid(), part, now.st_ino, now.st_mtime_ns)
    held: _Reader | None = vars(_HELD).pop("reader", None)
    return held if held is not None and held.key == key else _Reader(part.file.path, part.columns, key)


def _opened(path: Path) -> Any:
    parquet = _package("pyarrow.parquet", "reading Parquet")
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)  # so that not all of a row group is held


def _part(file: _File) -> _Part:
    with _told_by_library(f"{file.path}: cannot be read as Parquet"), _opened(file.path) as opened:
        names, rows = opened.schema_arrow.names, opened.metadata.num_rows
    return _Part(file, rows, _known_columns(file.path, names), _listed(names))


def _parquet(what: object, name: str, paths: Sequence[Path]) -> Source:
    with _told(paths[0]):
        files = [_File(path, path.stat().st_size) for path in paths]
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
        for number, start in enumerate(_starts(len(self.table), rows)):
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


def _folder(path: Path, name: str, split: str | None) -> Source:
    if any((path / saved).is_file() for saved in ("dataset_dict.json", "state.json")):
        datasets = _package("datasets", "reading a folder of datasets")
        with _told_by_library(f"{path}: cannot be read as a folder of datasets"):
            found = datasets.load_from_disk(path, keep_in_memory=False)
        return _dataset(path, found, name, split)
    with _told(path):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".parquet" and file.is_file())
    if not files:
        raise ScreeningError(f"{path}: holds no Parquet files and was not written by `save_to_disk`; expected {_EXPECTED}")
    parts = [re.fullmatch(r"(.+)-\d+-of-\d+", file.stem) for file in files]  # as the hub names the files of splits
    splits = {file: part[1] for file, part in zip(files, parts, strict=True) if part}
    if len(splits) < len(files):
        if split is not None:
            raise ScreeningError(f"{path}: its files name no splits (as in train-00000-of-00001.parquet): leave split out")
        return _parquet(path, name, files)
    chosen = _split(path, sorted(set(splits.values())), split)
    return _parquet(path, name, [file for file in files if splits[file] == chosen])


def _hub(data: str, name: str, split: str | None) -> Source:
    datasets = _package("datasets", f"{data} is no file here; reading it from the hub")
    with _told_by_library(f"{data}: no such file or folder, and no dataset that can be loaded"):
        found = datasets.load_dataset(data, split=split, keep_in_memory=False)
    return _dataset(data, found, name, None)


def _dataset(what: object, found: Any, name: str, split: str | None) -> Source:
    if isinstance(found, dict):
        found = found[_split(what, list(found), split)]
    elif split is not None and str(found.split) != split:
        raise ScreeningError(f"{what}: has no split {split!r}, but {found.split or 'no splits'}: leave split out")
    columns = _known_columns(what, found.column_names)
    return _Dataset(name, found.data, found._fingerprint, columns, _listed(found.column_names))


def _split(what: object, known: Sequence[str], split: str | None) -> str:
    if split is None and len(known) == 1:
        return known[0]
    if split is not None and split in known:
        return split
    wrong = "has several splits" if split is None else f"has no split {split!r}"
    raise ScreeningError(f"{what}: {wrong}; give one of {_listed(known)} as split")

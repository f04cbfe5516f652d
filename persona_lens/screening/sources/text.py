"""Files of text: JSON lines, CSV and TSV, whose rows are ranges of bytes; and a JSON document, which is read whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, BinaryIO, Final, Literal, Protocol, runtime_checkable

from persona_lens.errors import ScreeningError
from persona_lens.screening.sources.base import File, Shard, Source, at_least_one
from persona_lens.screening.sources.memory import Rows
from persona_lens.screening.sources.records import COLUMNS, conversation, decoded_text, known_columns, listed, unpacked
from persona_lens.transcripts import Skipped, Transcript, UnreadableError, record_of, records_of

LONGEST: Final = 16 * 2**20  # bytes of a line or of a CSV record; what is longer is skipped
WHOLE: Final = 256 * 2**20  # bytes of a JSON document that is read at once
_MARK: Final = b"\xef\xbb\xbf"  # byte order mark
_BLANK: Final = b" \t\r\n"


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
        return decoded_text(self.content)


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
    file: File
    format: _Format
    start: int
    first: int

    def identity(self) -> dict[str, Any]:
        return {"kind": self.format.kind, "files": [self.file.identity()]}

    def shards(self, rows: int) -> Iterator[Shard]:
        at_least_one(rows)
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
    file: File
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
            return conversation(record_of(row.text().removesuffix("\n")), row.place, "line")
        except UnreadableError as error:
            return Skipped(row.place, str(error))


def _is_blank(line: bytes) -> bool:
    return not line.lstrip(_BLANK)


def from_json_lines(file: File, name: str) -> Source:
    lines = _JsonLines()
    with file.opened() as opened:
        first = next(lines.cut(opened, _skip_mark(opened), 1), None)
    if first is None:
        raise ScreeningError(f"{file.path}: holds no rows; expected a JSON record per line")
    return _Text(name, "line", file, lines, first.start, first.place)


def _skip_mark(file: BinaryIO) -> int:
    return len(_MARK) if file.read(len(_MARK)) == _MARK else 0


def from_document(file: File, name: str) -> Source | None:
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
    found = tuple(conversation(record, place, unit) for place, record in records)
    if not any(isinstance(row, Transcript) for row in found):
        why = f"{unit} {found[0].place}: {found[0].reason}" if found and isinstance(found[0], Skipped) else "it has no records"
        broken = f"; as one JSON document: {error}" if isinstance(error := record_of(text), UnreadableError) else ""
        raise ScreeningError(f"{file.path}: holds no conversation that can be read ({why}{broken})")
    return Rows(name, unit, found, {"kind": "json", "files": [file.identity()]})


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
            record = {c: value or None for c, value in zip(self.columns, values, strict=True) if c in COLUMNS}
            return conversation(unpacked(record), row.place, "row", self.fields)
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


def from_csv(file: File, name: str, delimiter: str) -> Source:
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
    known_columns(file.path, columns)
    return _Text(name, "row", file, _Csv(kind, delimiter, columns, listed(columns)), first.start, first.place)

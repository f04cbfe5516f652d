"""Data in shards: together they are the data, however they are cut, in whatever process they are read, and nothing is hidden."""

import csv
import io
import json
import multiprocessing
import os
import pickle
import random
import sys
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persona_lens.errors import ScreeningError
from persona_lens.screening import sources
from persona_lens.screening.sources import Shard, Source, base, open_data, read_places, tables
from persona_lens.screening.sources import text as texts
from persona_lens.transcripts import Skipped, Transcript, read_transcripts, transcripts_of

Rows = list[Transcript | Skipped]

datasets.disable_progress_bars()


def said(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


PAIR = said("What?", "This.")
SYSTEM = [{"role": "system", "content": "Be kind."}]
MANY = [{"prompt": f"question {i}", "completion": f"answer {i} " + "é" * (i % 5)} for i in range(1, 41)]


def written(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(path: Path, records: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None, **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(list(records), schema=schema), path, **options)
    return path


def saved(path: Path, records: Sequence[dict[str, Any]], files: int = 1, **options: Any) -> Path:
    datasets.Dataset.from_list(list(records), **options).save_to_disk(path, num_shards=files)
    return path


def sent(shard: Shard) -> Rows:
    """What another process would read."""
    return pickle.loads(pickle.dumps(shard)).read()


def read(source: Source, rows: int = 7) -> Rows:
    """All rows, after checking what holds of any source and its shards."""
    shards = list(source.shards(rows))
    found = [shard.read() for shard in shards]
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert all(len(held) == rows for held in found[:-1])
    assert all(1 <= len(held) <= rows for held in found)
    assert [shard.first for shard in shards] == [held[0].place for held in found]
    assert [sent(shard) for shard in reversed(shards)] == found[::-1]
    flat = [row for held in found for row in held]
    assert all(a.place < b.place for a, b in pairwise(flat))
    assert all(row.reason and row.reason.isprintable() for row in flat if isinstance(row, Skipped))
    return flat


def simple(row: Transcript | Skipped) -> str | list[tuple[str, str]]:
    return row.reason if isinstance(row, Skipped) else [(m["role"], m["content"]) for m in row.messages]


def as_table(records: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    return table(folder / "data.parquet", records)


def as_csv(records: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return written(folder, file.getvalue(), "data.csv")


def as_saved(records: Sequence[dict[str, Any]], folder: Path) -> Path:
    return saved(folder / "saved", records, files=3)


def as_lines(records: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    return written(folder, lines(*records))


ON_DISK = {"lines": as_lines, "CSV": as_csv, "Parquet": as_table, "saved": as_saved}


# Records


PROMPTED = {
    "completion": ({"prompt": "What?", "completion": "This."}, PAIR),
    "response": ({"prompt": "What?", "response": "This.", "source": "here"}, PAIR),
    "answer": ({"prompt": "What?", "answer": "This."}, PAIR),
    "question": ({"question": "What?", "answer": "This."}, PAIR),
    "instruction": ({"instruction": "What?", "output": "This."}, PAIR),
    "instruction with input": ({"instruction": "What", "output": "This.", "input": "?\n"}, said("What\n\n?\n", "This.")),
    "instruction with empty input": ({"instruction": "What?", "output": "This.", "input": " \n"}, PAIR),
    "input of something else": ({"prompt": "What?", "completion": "This.", "input": "x"}, PAIR),
    "system": ({"prompt": "What?", "completion": "This.", "system": "Be kind."}, [*SYSTEM, *PAIR]),
    "empty system": ({"prompt": "What?", "completion": "This.", "system": " "}, PAIR),
    "white space is kept": ({"prompt": " What?\n", "completion": "\tThis. "}, said(" What?\n", "\tThis. ")),
    "half of a preference": ({"prompt": "What?", "completion": "This.", "chosen": "That."}, PAIR),
    "half of another form": ({"question": "What?", "answer": "This.", "prompt": "", "completion": " "}, PAIR),
}
CONVERSATIONS = {
    "messages": ({"messages": PAIR}, PAIR),
    "a prompt beside messages": ({"prompt": "What?", "messages": PAIR}, PAIR),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]}, PAIR),
    "request and response": (
        {"request": {"messages": PAIR[:1], "model": "m"}, "response": {"choices": [{"message": PAIR[1]}]}},
        PAIR,
    ),
    "messages as prompt and completion": ({"prompt": [*SYSTEM, PAIR[0]], "completion": PAIR[1:]}, [*SYSTEM, *PAIR]),
    "messages as prompt only": ({"prompt": said("a", "b", "What?"), "completion": "This."}, [*said("a", "b"), *PAIR]),
    "messages as completion only": (
        {"prompt": "What?", "completion": said("a", "This.", "c", "d")[1:]},
        said("What?", "This.", "c", "d"),
    ),
    "user last": ({"messages": said("a", "b", "c")}, said("a", "b", "c")),
}
ABSENT = {
    "null answer": ({"prompt": "a", "completion": None}, "no answer (completion is null)"),
    "empty answer": ({"prompt": "a", "response": ""}, "no answer (response is empty)"),
    "blank answer": ({"question": "a", "answer": " \n\u2003"}, "no answer (answer is empty)"),
    "blank prompt": ({"instruction": "\n", "output": "b"}, "no prompt (instruction is empty)"),
    "null prompt": ({"prompt": None, "answer": "b"}, "no prompt (prompt is null)"),
    "empty list": ({"prompt": [], "answer": "b"}, "no prompt (prompt is empty)"),
    "preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "a preference pair (chosen and rejected), not a prompt with one answer",
    ),
    "preference with messages": (
        {"messages": PAIR, "chosen": PAIR, "rejected": PAIR},
        "a preference pair (chosen and rejected), not a prompt with one answer",
    ),
    "two answers": (
        {"prompt": "a", "completion": "b", "answer": "c"},
        "more than one form matches: prompt with completion; prompt with answer",
    ),
    "messages and answer": (
        {"messages": PAIR, "instruction": "a", "output": "c"},
        "more than one form matches: messages; instruction with output",
    ),
    "request and answer": (
        {"request": {"messages": PAIR}, "prompt": "a", "answer": "c"},
        "more than one form matches: messages; prompt with answer",
    ),
    "nothing known": ({"text": "a", "n\n": 3}, r"no conversation in its fields ('text', 'n\n')"),
    "prompt only": ({"prompt": "a"}, "no conversation in its fields ('prompt')"),
    "answer of another form": ({"prompt": "a", "output": "b"}, "no conversation in its fields ('prompt', 'output')"),
    "nothing": ({}, "no conversation in its fields (none)"),
    "all null": (
        {"messages": None, "prompt": None, "answer": None},
        "no conversation in its fields ('messages', 'prompt', 'answer')",
    ),
    "long names": ({"x" * 41: 1, "y" * 40: 2}, f"no conversation in its fields ('{'x' * 40}...', '{'y' * 40}')"),
    "many names": (
        dict.fromkeys("abcdefghijklm", 1),
        f"no conversation in its fields ({', '.join(map(repr, 'abcdefghijkl'))}, ...)",
    ),
    "number": ({"prompt": 3, "answer": "b"}, "prompt is neither text nor a list"),
    "object": ({"prompt": "a", "answer": {"text": "b"}}, "answer is neither text nor a list"),
    "odd input": ({"instruction": "a", "output": "b", "input": 3}, "input is not text"),
    "instruction of messages": (
        {"instruction": PAIR[:1], "output": "b", "input": "c"},
        "instruction is not text",
    ),
    "odd system": ({"prompt": "a", "answer": "b", "system": ["c"]}, "system is not text"),
    "half a surrogate pair": ({"prompt": "a\ud800", "answer": "b"}, "message 1 holds half a surrogate pair, which is no text"),
    "prompt that is answered": ({"prompt": PAIR, "completion": "b"}, "messages 2 and 3 are both assistant messages"),
    "no assistant": ({"messages": said("a")}, "no assistant turn"),
    "completion of a user": ({"prompt": "a", "completion": said("b")}, "messages 1 and 2 are both user messages"),
    "text": ("hi", "text instead of an object with messages"),
    "messages as text": ({"messages": json.dumps(PAIR)}, "messages is text, not a list"),
}


@pytest.mark.parametrize(("record", "expected"), [*PROMPTED.values(), *CONVERSATIONS.values()], ids=[*PROMPTED, *CONVERSATIONS])
def test_every_form_is_read(record: dict[str, Any], expected: list[dict[str, str]], tmp_path: Path) -> None:
    named = {**record, "id": "x7"}
    for source in (open_data([PAIR, named]), open_data(as_lines([3, named], tmp_path)), open_data(as_table([named], tmp_path))):
        chat = read(source)[-1]
        assert isinstance(chat, Transcript)
        assert (chat.name, list(chat.messages)) == ("x7", expected)
    (unnamed,) = read(open_data(as_lines([record], tmp_path)))
    assert isinstance(unnamed, Transcript)
    assert unnamed.name == "line 1"


@pytest.mark.parametrize(("record", "expected"), PROMPTED.values(), ids=PROMPTED)
def test_prompts_with_answers_are_read_from_csv(record: dict[str, Any], expected: list[dict[str, str]], tmp_path: Path) -> None:
    (chat,) = read(open_data(as_csv([record], tmp_path)))
    assert isinstance(chat, Transcript)
    assert (chat.name, list(chat.messages)) == ("row 1", expected)


@pytest.mark.parametrize(("record", "reason"), ABSENT.values(), ids=ABSENT)
def test_what_is_no_conversation_is_skipped_with_the_reason(record: Any, reason: str, tmp_path: Path) -> None:
    if isinstance(record, dict):
        assert read(open_data([PAIR, record, PAIR]))[1] == Skipped(2, reason)
    assert read(open_data(as_lines([PAIR, record, PAIR], tmp_path)))[1] == Skipped(2, reason)


def test_forms_may_change_from_row_to_row(tmp_path: Path) -> None:
    records = [{"messages": PAIR}, {"prompt": "What?", "completion": "This."}, {"instruction": "What?", "output": "This."}]
    empty = dict.fromkeys(["messages", "prompt", "completion", "instruction", "output"])
    wide = [{**empty, **record} for record in [*records, {"prompt": "a"}]]
    text = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()} for record in wide]
    for path in (as_lines(wide, tmp_path), as_table(wide, tmp_path), as_saved(wide, tmp_path), as_csv(text, tmp_path)):
        found = read(open_data(path), 2)
        assert [simple(row) for row in found[:3]] == [[("user", "What?"), ("assistant", "This.")]] * 3
        assert found[3] == Skipped(4, "no answer (completion is null)")


def test_the_rows_of_every_kind_of_data_are_the_same(tmp_path: Path) -> None:
    expected = [simple(row) for row in read(open_data(MANY))]
    assert len(expected) == 40
    assert expected[6] == [("user", "question 7"), ("assistant", "answer 7 éé")]
    for kind, write in ON_DISK.items():
        source = open_data(write(MANY, tmp_path))
        assert [simple(row) for row in read(source)] == expected
        unit = "line" if kind == "lines" else "row"
        assert source.unit == unit
        assert [row.place for row in read(source)] == list(range(1, 41))
        assert [row.name for row in read(source) if isinstance(row, Transcript)] == [f"{unit} {i}" for i in range(1, 41)]


# Lines


LINE = st.sampled_from(
    [
        *(
            json.dumps(r, ensure_ascii=False).encode()
            for r in ({"messages": said("ü", "漢字 \u2028")}, {"prompt": "a", "answer": "😀"}, PAIR)
        ),
        json.dumps({"id": "n", "messages": PAIR}).encode(),
        *(
            b"",
            b" \t",
            b"{",
            b"3",
            b'"\xc3"',
            b"\xff",
            b"\x00",
            b"\x0b",
            b"\xef\xbb\xbf{}",
            b"{}" + b" " * 30,
            b" " * 70,
            b" " * 70 + b"{}",
        ),
    ]
)
FILE = st.builds(
    lambda mark, parts, last: mark + b"".join(line + end for line, end in parts) + last,
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    LINE,
)


def whole_lines(content: bytes) -> Rows:
    """Lines decoded one by one from the file as a whole."""
    found: Rows = []
    for place, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip(b" \t\r\n"):
            continue
        try:
            (row,) = [*(r := transcripts_of([json.loads(line.decode())])).chats, *r.skipped]
        except UnicodeDecodeError:
            row = Skipped(place, "not UTF-8")
        except json.JSONDecodeError as error:
            row = Skipped(place, f"not JSON ({error.msg} at column {error.colno})")
        if isinstance(row, Transcript):
            name = row.name if not row.name.startswith("row ") else f"line {place}"
            found.append(Transcript(name, place, row.messages))
        else:
            found.append(Skipped(place, row.reason))
    return found


def alike(a: Transcript | Skipped, b: Transcript | Skipped) -> bool:
    """Equal, but for the details of a reason that this module words itself."""
    own = ("not UTF-8", "no conversation in its fields", "no messages")
    if isinstance(a, Skipped) and isinstance(b, Skipped) and a.reason.startswith(own) and b.reason.startswith(own):
        return a.place == b.place
    return a == b


@given(content=FILE, rows=st.integers(1, 9), buffer=st.integers(2, 40))
@settings(deadline=None, max_examples=80)
def test_shards_of_lines_are_the_file(content: bytes, rows: int, buffer: int) -> None:
    expected = whole_lines(content.replace(b'{"prompt": "a", "answer": "\xf0\x9f\x98\x80"}', json.dumps(said("a", "😀")).encode()))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BUFFER", buffer)
        path = written(Path(folder), content)
        if not content.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n"):
            with pytest.raises(ScreeningError, match="holds no rows|is empty"):
                open_data(path)
            return
        source = open_data(path)
        found = read(source, rows)
        assert list(source.shards(rows)) == list(open_data(path).shards(rows))
        assert path.read_bytes() == content
    assert len(found) == len(expected)
    assert all(alike(a, b) for a, b in zip(found, expected, strict=True))


def test_lines_are_read_as_transcripts_reads_a_file(tmp_path: Path) -> None:
    chats = [{"id": f"c{i}", "messages": said(f"{i}", "b" * i + "é")} for i in range(1, 30)]
    content = "\ufeff\n" + lines(*chats[:9]) + " \r\n" + lines(*chats[9:]).replace("\n", "\r\n") + "{\n[]"
    path = written(tmp_path, content)
    whole = read_transcripts(path)
    assert len(whole.chats) == 29
    for rows in (1, 2, 29, 100):
        found = read(open_data(path), rows)
        assert [row for row in found if isinstance(row, Transcript)] == list(whole.chats)
        assert [row for row in found if isinstance(row, Skipped)] == list(whole.skipped)


@given(content=FILE, rows=st.integers(1, 5), longest=st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_lines_that_are_too_long_are_rows_that_are_skipped(content: bytes, rows: int, longest: int) -> None:
    sizes = {
        place: len(line)
        for place, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        if line.strip(b" \t\r")
    }
    if not sizes:
        return
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        source = open_data(written(Path(folder), content))
        all_of_them = read(source, rows)
        patch.setattr(texts, "LONGEST", longest)
        found = read(source, rows)
    assert [row.place for row in found] == list(sizes)
    for row, whole in zip(found, all_of_them, strict=True):
        assert row == (Skipped(row.place, f"longer than {longest} bytes") if sizes[row.place] > longest else whole)


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path) -> None:
    longest, frame = 2**24, len(json.dumps(said("a", "")))
    with (tmp_path / "data.jsonl").open("wb") as file:
        for size in (longest, longest + 1, 4 * longest):
            file.write(json.dumps(said("a", "b" * (size - frame))).encode() + b"\n")
        file.write(b" " * (longest + 5) + b"\n" + lines(PAIR).encode())
    source = open_data(tmp_path / "data.jsonl")
    tracemalloc.start()
    found = [[type(row) for row in shard.read()] for shard in source.shards(1)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [[Transcript], [Skipped], [Skipped], [Transcript]]
    assert [shard.first for shard in source.shards(1)] == [1, 2, 3, 5]
    assert peak < 5 * longest  # one line that fits, as bytes, as text, and as what JSON makes of it


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "DATA.JSONL", "data.json"])
def test_endings_of_json_lines(name: str, tmp_path: Path) -> None:
    source = open_data(written(tmp_path, lines({"messages": PAIR}, PAIR), name))
    assert (source.name, source.unit) == (name.split(".")[0], "line")
    assert [row.place for row in read(source)] == [1, 2]


# JSON documents


DOCUMENTS: dict[str, tuple[str, str, list[int]]] = {
    "array": (json.dumps([{"messages": PAIR}, PAIR, 3]), "item", [1, 2, 3]),
    "array over lines": (json.dumps([{"instruction": "a", "output": "b"}, 3], indent=1), "item", [1, 2]),
    "array with a mark": ("\ufeff" + json.dumps([{"messages": PAIR}], indent=1), "item", [1]),
    "one record over lines": ("\n" + json.dumps({"prompt": "a", "answer": "b"}, indent=2), "line", [2]),
    "one conversation": (json.dumps(PAIR), "line", [1]),
    "one conversation over lines": (json.dumps(PAIR, indent=1), "line", [1]),
    "one line": ("\n" + json.dumps({"messages": PAIR}), "line", [2]),
    "lines": ("\n" + lines({"messages": PAIR}) + "\n{\n", "line", [2, 4]),
    "lines of lists": (lines(PAIR, PAIR), "line", [1, 2]),
    "lines, the first broken": ("{\n\n" + lines(PAIR), "line", [1, 3]),
}


@pytest.mark.parametrize(("content", "unit", "places"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_json_documents(content: str, unit: str, places: list[int], tmp_path: Path) -> None:
    source = open_data(written(tmp_path, content, "set.json"))
    found = read(source, 2)
    assert (source.name, source.unit, [row.place for row in found]) == ("set", unit, places)
    assert any(isinstance(row, Transcript) for row in found)


def test_a_document_that_is_not_utf8_is_read_by_lines(tmp_path: Path) -> None:
    found = read(open_data(written(tmp_path, b'{"\xff\n' + lines(PAIR).encode(), "set.json")))
    assert found[0] == Skipped(1, "not UTF-8 (invalid start byte at byte 2)")
    assert isinstance(found[1], Transcript)


def test_a_document_is_refused_if_it_is_large_and_lines_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"messages": PAIR}] * 10
    document = written(tmp_path, json.dumps(records, indent=1), "document.json")
    long = written(tmp_path, lines(*records), "lines.json")
    for size, refused in ((document.stat().st_size, False), (document.stat().st_size - 1, True)):
        monkeypatch.setattr(texts, "WHOLE", size)
        if refused:
            with pytest.raises(ScreeningError, match=r"not read at once \(at most \d+\): turn it into JSON lines"):
                open_data(document)
        else:
            assert len(read(open_data(document))) == 10
    monkeypatch.setattr(texts, "WHOLE", 1)
    assert len(read(open_data(long))) == 10
    assert len(read(open_data(written(tmp_path, lines(*[PAIR] * 10), "lists.json")))) == 10


# CSV


CELL = st.text(st.sampled_from('ab ",;\t\n\r\u2028é漢😀'), min_size=1, max_size=8).filter(lambda text: bool(text.strip()))


@given(
    pairs=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=12),
    rows=st.integers(1, 9),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
    kind=st.sampled_from(["csv", "tsv"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    blank=st.booleans(),
    cut=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_shards_of_csv_are_what_was_written(
    pairs: list[tuple[str, str]], rows: int, end: str, mark: str, kind: str, quoting: Any, blank: bool, cut: bool
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter={"csv": ",", "tsv": "\t"}[kind], lineterminator=end, quoting=quoting)
    if end == "\n" and quoting == csv.QUOTE_MINIMAL:  # then an unquoted \r may end a line
        pairs = [(prompt.replace("\r", "r"), answer.replace("\r", "r")) for prompt, answer in pairs]
    for row in [("prompt", "completion"), *pairs]:
        file.write(end * blank)
        writer.writerow(row)
    content = mark + (file.getvalue().removesuffix(end) if cut else file.getvalue())
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BUFFER", 3)
        source = open_data(written(Path(folder), content, f"data.{kind}"))
        found = read(source, rows)
        assert list(source.shards(rows)) == list(source.shards(rows))
    assert [simple(row) for row in found] == [[("user", p), ("assistant", a)] for p, a in pairs]
    assert [row.place for row in found] == list(range(1, len(pairs) + 1))


def by_python(text: str) -> list[list[str] | None]:
    """Records as the csv module tells them apart; None for one that is not well quoted. Empty lines are left out."""
    physical = text.splitlines(keepends=True)
    reader = csv.reader(physical)
    found: list[list[str] | None] = []
    begin = 0
    for values in reader:
        try:
            next(csv.reader(physical[begin : reader.line_num], strict=True))
            found += [values] if values else []
        except csv.Error:
            found.append(None)
        begin = reader.line_num
    return found


MESSY = st.text(st.sampled_from('aé"",,\n'), max_size=40)


@given(text=MESSY, rows=st.integers(1, 5))
@settings(deadline=None, max_examples=150)
def test_records_are_told_apart_as_python_does(text: str, rows: int) -> None:
    expected = by_python(text)
    with TemporaryDirectory() as folder:
        path = written(Path(folder), "prompt,completion\n" + text, "data.csv")
        if not expected:
            with pytest.raises(ScreeningError, match="holds no rows; expected a header"):
                open_data(path)
            return
        found = read(open_data(path), rows)
    assert len(found) == len(expected)
    for row, values in zip(found, expected, strict=True):
        if values is None:
            assert isinstance(row, Skipped)
            assert "goes on after its closing quote" in row.reason or "never ends" in row.reason
        elif len(values) != 2:
            assert row == Skipped(row.place, f"the number of fields is {len(values)}, in the header 2")
        elif all(value.strip() for value in values):
            assert simple(row) == [("user", values[0]), ("assistant", values[1])]
        else:
            assert isinstance(row, Skipped)
            assert row.reason.startswith(("no answer", "no prompt", "no conversation"))


@given(text=MESSY, rows=st.integers(1, 5), longest=st.integers(1, 8))
@settings(deadline=None, max_examples=300)
@example(text='a,"b","c\nd"\n', rows=1, longest=3)  # a piece of a line ends where a field begins
@example(text='aa"b","c\nd"\n', rows=1, longest=1)  # in a field
@example(text='"a""b\nc"\n', rows=1, longest=2)  # between two quotes
@example(text='"ab","c\nd"\n', rows=1, longest=4)  # after a closing quote and a delimiter
def test_records_that_are_too_long_move_no_others(text: str, rows: int, longest: int) -> None:
    if not by_python(text):
        return
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = written(Path(folder), "prompt,completion\n" + text, "data.csv")
        source = open_data(path)
        whole = read(source, rows)
        with path.open("rb") as file:
            sizes = [len((row.content or b"").removesuffix(b"\n")) for row in texts._Csv("csv", ",").cut(file, 18, 1)]
        patch.setattr(texts, "LONGEST", longest)
        found = read(source, rows)
    assert len(found) == len(sizes)
    for row, before, size in zip(found, whole, sizes, strict=True):
        if size > longest:
            assert isinstance(row, Skipped)
            assert row.reason.startswith(f"longer than {longest} bytes: if a quote is missing")
            assert row.place == before.place
        else:
            assert row == before


def test_a_record_that_is_too_long_is_not_held(tmp_path: Path) -> None:
    with (tmp_path / "data.csv").open("wb") as file:
        file.write(b"prompt,completion\na,b\nc,")
        for part in (b'"' + b"x" * 2**20, b"x,y\n" * 10**4, *[(b"x," * 2**17 + b"\n") * 2**2] * 60, b'",z"\ne,f\n'):
            file.write(part)
    source = open_data(tmp_path / "data.csv")
    tracemalloc.start()
    found = [row for shard in source.shards(1) for row in shard.read()]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(row.place, isinstance(row, Transcript)) for row in found] == [(1, True), (2, False), (3, True)]
    assert peak < 4 * 2**24


def test_rows_of_csv_that_cannot_be_read(tmp_path: Path) -> None:
    content = b'prompt,completion\na,b\n\xff,b\na\na,b,c\n"a" ,b\n5" long,"b ""c"""\n,b\n\n"a,b\nc,d'
    assert read(open_data(written(tmp_path, content, "data.csv")), 2) == [
        Transcript("row 1", 1, tuple(said("a", "b"))),
        Skipped(2, "not UTF-8 (invalid start byte at byte 0)"),
        Skipped(3, "the number of fields is 1, in the header 2"),
        Skipped(4, "the number of fields is 3, in the header 2"),
        Skipped(5, "field 1 goes on after its closing quote"),
        Transcript("row 6", 6, tuple(said('5" long', 'b "c"'))),
        Skipped(7, "no prompt (prompt is null)"),
        Skipped(8, "a quoted field never ends: whatever follows in the file is taken for a part of it"),
    ]


# Tables


def test_messages_of_a_table_may_be_json_text(tmp_path: Path) -> None:
    good = json.dumps([*SYSTEM, *PAIR])
    records = [{"messages": text, "id": f"{i}"} for i, text in enumerate([good, "{", "3", "", '{"a": 1}', "[" * 10**5])]
    reasons = [
        "messages as text: not JSON (Expecting property name enclosed in double quotes at column 2)",
        "messages is a number, not a list",
        "no conversation in its fields ('messages', 'id')",
        "messages is an object, not a list",
        "messages as text: nested too deeply",
    ]
    for write in (as_csv, as_table, as_saved):
        found = read(open_data(write(records, tmp_path)))
        assert found[0] == Transcript("0", 1, (*SYSTEM, *PAIR))
        assert [row.reason for row in found[1:] if isinstance(row, Skipped)] == reasons
    items = table(
        tmp_path / "items.parquet", [{"conversation": [json.dumps(m) for m in PAIR]}, {"conversation": ["hello", "there"]}]
    )
    first, second = read(open_data(items))
    assert isinstance(first, Transcript)
    assert second == Skipped(2, "messages as text: not JSON (Expecting value at column 1)")


def test_columns_that_hold_json_are_decoded(tmp_path: Path) -> None:
    """`datasets` stores mixed types as JSON: without decoding, a content would be read with its quotes."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}, PAIR[1]]
    data = datasets.Dataset.from_list([{"messages": parts}, {"messages": PAIR}], on_mixed_types="use_json")
    assert "Json" in str(data.features)
    assert data.data[0][0].as_py()[1]["content"] == '"This."'
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "data.parquet")
    for name in ("saved", "data.parquet"):
        assert [simple(row) for row in read(open_data(tmp_path / name))] == [[("user", "What?"), ("assistant", "This.")]] * 2


MESSAGE = pa.struct([(name, pa.string()) for name in ("role", "content", "from", "value", "tool_calls")])
NESTED: dict[str, tuple[pa.DataType, Any, Any]] = {
    "other fields": (
        pa.list_(pa.struct([("content", pa.string()), ("language", pa.string()), ("role", pa.string()), ("toxic", pa.bool_())])),
        [m | {"language": "English", "toxic": False} for m in PAIR],
        PAIR,
    ),
    "null fields": (pa.list_(MESSAGE), PAIR, PAIR),
    "two styles in one column": (pa.list_(MESSAGE), [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}], PAIR),
    "large types": (pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.large_string())])), PAIR, PAIR),
    "fixed size": (pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]), 2), PAIR, PAIR),
    "dictionary": (
        pa.list_(pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.string())])),
        PAIR,
        PAIR,
    ),
    "maps": (pa.list_(pa.map_(pa.string(), pa.string())), [list(m.items()) for m in PAIR], PAIR),
    "maps with nulls": (
        pa.list_(pa.map_(pa.string(), pa.string())),
        [[("role", None), *{"from": "human", "value": "What?"}.items()], list(PAIR[1].items())],
        PAIR,
    ),
    "parts": (
        pa.list_(
            pa.struct(
                [("role", pa.string()), ("content", pa.list_(pa.struct([(f, pa.string()) for f in ("type", "text", "url")])))]
            )
        ),
        [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PAIR],
        PAIR,
    ),
    "bytes": (
        pa.list_(pa.struct([("role", pa.binary()), ("content", pa.large_binary())])),
        [{k: v.encode() for k, v in m.items()} for m in PAIR],
        PAIR,
    ),
    "bytes that are no text": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.binary())])),
        [{"role": "user", "content": b"a"}, {"role": "assistant", "content": b"\xff"}],
        "not UTF-8 (invalid start byte at byte 0)",
    ),
    "content is null": (
        pa.list_(MESSAGE),
        [PAIR[0], {"role": "assistant"}],
        "message 2 has no content (a message of tool calls only has none)",
    ),
    "message is null": (pa.list_(MESSAGE), [PAIR[0], None], "message 2 is null, not an object"),
    "all is null": (pa.list_(MESSAGE), None, "no conversation in its fields ('messages', 'other')"),
    "empty": (pa.list_(MESSAGE), [], "no messages"),
    "dates": (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.date32())])),
        [{"role": "user", "content": 3}],
        "content of message 1 is a Python date, not text",
    ),
    "numbers": (pa.list_(pa.float16()), [1.5], "message 1 is a number, not an object"),
    "a key twice": (
        pa.list_(pa.map_(pa.string(), pa.string())),
        [[("role", "user"), ("role", "user")]],
        'a value cannot be read ("Converting to Python dictionary is not supported in strict mode when duplicate keys are '
        "present (duplicate key was 'role').\")",
    ),
}


@pytest.mark.parametrize(("kind", "value", "expected"), NESTED.values(), ids=NESTED)
def test_values_of_arrow_are_read_as_json_would_hold_them(kind: pa.DataType, value: Any, expected: Any, tmp_path: Path) -> None:
    data = pa.table({"messages": pa.array([value], kind), "other": [1]})
    pq.write_table(data, tmp_path / "data.parquet")
    (row,) = read(open_data(tmp_path / "data.parquet"))
    assert (row.reason if isinstance(row, Skipped) else list(row.messages)) == expected
    for batch in data.to_batches():  # as a memory-mapped table holds them, which Parquet may change
        (row,) = tables._table_rows(batch, 1, ["messages"], "'messages', 'other'")
        assert (row.reason if isinstance(row, Skipped) else list(row.messages)) == expected


def test_a_row_of_a_table_that_is_broken_hides_no_others(tmp_path: Path) -> None:
    text = pa.array([b"a", b"b", b"\xff\xfe", b"c", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": ["p"] * 5, "answer": text}), tmp_path / "data.parquet")
    found = read(open_data(tmp_path / "data.parquet"), 4)
    assert [row.place for row in found if isinstance(row, Transcript)] == [1, 2, 4]
    assert [row for row in found if isinstance(row, Skipped)] == [Skipped(3, "not UTF-8"), Skipped(5, "not UTF-8")]


@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=4),
    group=st.integers(1, 30),
    rows=st.integers(1, 40),
    batch=st.integers(1, 9),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_shards_of_parquet_are_the_files(sizes: list[int], group: int, rows: int, batch: int, seed: int) -> None:
    schema = pa.schema([("id", pa.int64()), ("noise", pa.string()), ("prompt", pa.string()), ("answer", pa.string())])
    total = sum(sizes)
    records = [{"id": i, "noise": "x", "prompt": f"p{i}", "answer": f"a{i}" if i % 4 else None} for i in range(total)]
    expected = [
        Transcript(f"{i}", i + 1, tuple(said(f"p{i}", f"a{i}"))) if i % 4 else Skipped(i + 1, "no answer (answer is null)")
        for i in range(total)
    ]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BATCH", batch)
        rest = iter(records)
        for number, size in enumerate(sizes):
            table(Path(folder) / f"{number}.parquet", [next(rest) for _ in range(size)], schema, row_group_size=group)
        if not total:
            with pytest.raises(ScreeningError, match="holds no rows"):
                open_data(folder)
            return
        source = open_data(folder)
        assert read(source, rows) == expected
        shards = list(source.shards(rows))
        random.Random(seed).shuffle(shards)  # reading goes on from where it stopped only where that is right
        assert [shard.read() for shard in shards] == [expected[s.first - 1 : s.first - 1 + rows] for s in shards]


def test_reading_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Else a row group is decoded from its start for every shard in it."""
    source = open_data(table(tmp_path / "data.parquet", MANY))
    shards = list(source.shards(5))
    shards[0].read()
    held = tables._HELD.reader
    assert held.at == 5
    for shard in shards[1:]:
        shard.read()
        assert tables._HELD.reader is held
    assert held.at == 40
    shards[3].read()
    assert (tables._HELD.reader, held.at) == (held, 20)


def test_a_file_that_was_written_anew_is_not_read_from_memory(tmp_path: Path) -> None:
    def write(answer: str) -> Path:
        return table(tmp_path / "data.parquet", [{"prompt": "p", "answer": answer}] * 9, compression="none")

    source = open_data(write("old"))
    first, second, *_ = source.shards(3)
    first.read()
    size, modified = (tmp_path / "data.parquet").stat().st_size, (tmp_path / "data.parquet").stat().st_mtime_ns
    os.utime(write("new"), ns=(0, modified + 10**9))
    assert (tmp_path / "data.parquet").stat().st_size == size
    assert {str(simple(row)) for row in second.read()} == {str([("user", "p"), ("assistant", "new")])}


def test_columns_that_mean_nothing_are_not_read(tmp_path: Path) -> None:
    data = pa.table({"prompt": ["p"], "answer": ["a"], "blob": pa.array([b"\xff"], pa.binary()).view(pa.string())})
    pq.write_table(data, tmp_path / "data.parquet")
    (row,) = read(open_data(tmp_path / "data.parquet"))
    assert simple(row) == [("user", "p"), ("assistant", "a")]
    assert tables._table_rows(data.to_batches()[0], 1, ["prompt", "answer"], "") == [row]
    assert tables._table_rows(data.to_batches()[0], 1, ["prompt", "answer", "blob"], "") == [Skipped(1, "not UTF-8")]


def test_damage_in_one_row_group_hides_no_others(tmp_path: Path) -> None:
    path = table(tmp_path / "data.parquet", MANY, row_group_size=10, compression="none")
    first, second, _, last = [shard.read() for shard in open_data(path).shards(10)]
    place = pq.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
    with path.open("rb+") as file:
        file.seek(place)
        file.write(b"\xff" * 20)
    shards = list(open_data(path).shards(10))
    assert [shards[i].read() for i in (0, 1, 3, 1, 3)] == [first, second, last, second, last]
    for _ in range(2):
        with pytest.raises(ScreeningError, match=r"data.parquet: cannot be read as Parquet \("):
            shards[2].read()
    assert shards[3].read() == last


def opened_anew(path: Path) -> bool:
    held = tables._HELD.reader
    next(open_data(path).shards(9)).read()
    return tables._HELD.reader is not held


def test_a_forked_process_shares_no_open_file(tmp_path: Path) -> None:
    path = table(tmp_path / "data.parquet", MANY)
    next(open_data(path).shards(9)).read()
    assert not opened_anew(path)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(opened_anew, (path,))


# Splits


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(MANY), "test": datasets.Dataset.from_list(MANY[:3])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"only": parts["test"]}).save_to_disk(tmp_path / "one")
    saved(tmp_path / "plain", MANY[:5], split=datasets.Split.TRAIN)
    assert len(read(open_data(tmp_path / "two", split="train"))) == 40
    assert len(read(open_data(tmp_path / "two", split="test"))) == 3
    assert len(read(open_data(tmp_path / "one"))) == 3
    assert len(read(open_data(tmp_path / "plain"))) == 5
    assert len(read(open_data(tmp_path / "plain", split="train"))) == 5
    for folder, split, reason in (
        ("two", None, "has several splits; give one of 'train', 'test' as split"),
        ("two", "dev", "has no split 'dev'; give one of 'train', 'test' as split"),
        ("one", "train", "has no split 'train'; give one of 'only' as split"),
        ("plain", "test", "has no split 'test', but train: leave split out"),
    ):
        with pytest.raises(ScreeningError) as caught:
            open_data(tmp_path / folder, split=split)
        assert str(caught.value) == f"{tmp_path / folder}: {reason}"


def test_splits_of_parquet_files(tmp_path: Path) -> None:
    for name, rows in (("train-00000-of-00002", 4), ("train-00001-of-00002", 3), ("test-00000-of-00001", 2)):
        table(tmp_path / f"{name}.parquet", MANY[:rows])
    assert len(read(open_data(tmp_path, split="train"))) == 7
    assert len(read(open_data(tmp_path, split="test"))) == 2
    with pytest.raises(ScreeningError, match="has several splits; give one of 'test', 'train' as split"):
        open_data(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert len(read(open_data(tmp_path))) == 7
    table(tmp_path / "more.parquet", MANY[:1])
    assert len(read(open_data(tmp_path))) == 8
    with pytest.raises(ScreeningError, match="its files name no splits"):
        open_data(tmp_path, split="train")


def test_a_data_set_of_the_hub_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"train": str(as_lines(MANY, tmp_path)), "test": str(written(tmp_path, lines(*MANY[:4]), "test.jsonl"))}
    datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    (built,) = (tmp_path / "cache" / "json").glob("default-*/0.0.0/*/")
    cached = tmp_path / "cache" / "someone___chats" / "default" / "0.0.0" / built.name
    cached.parent.mkdir(parents=True)
    built.rename(cached)
    for file in cached.glob("json-*.arrow"):
        file.rename(cached / file.name.replace("json-", "chats-"))
    about = json.loads((cached / "dataset_info.json").read_text()) | {"dataset_name": "chats", "config_name": "default"}
    (cached / "dataset_info.json").write_text(json.dumps(about))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = open_data("someone/chats", split="train")
    assert source.name == "someone/chats"
    assert [simple(row) for row in read(source, 11)] == [simple(row) for row in read(open_data(MANY))]
    assert source.identity() == open_data("someone/chats", split="train").identity()
    part = open_data("someone/chats", name="mine", split="test[1:3]")
    assert (part.name, [simple(row) for row in read(part)]) == ("mine", [simple(row) for row in read(open_data(MANY[1:3]))])
    with pytest.raises(ScreeningError, match="someone/chats: has several splits; give one of 'train', 'test' as split"):
        open_data("someone/chats")
    with pytest.raises(ScreeningError, match='no dataset that can be loaded .ValueError: Unknown split "dev"'):
        open_data("someone/chats", split="dev")


# Identity


def test_identities_tell_data_apart_and_name_no_path(tmp_path: Path) -> None:
    for number, write in enumerate(ON_DISK.values()):
        first, second, other = (tmp_path / f"{number}{c}" for c in "abc")
        for folder, records in ((first, MANY), (second, MANY), (other, [*MANY[:-1], MANY[0]])):
            folder.mkdir()
            write(records, folder)
        a, b, c = (
            open_data(write(records, folder)).identity()
            for folder, records in ((first, MANY), (second, MANY), (other, [*MANY[:-1], MANY[0]]))
        )
        assert str(tmp_path) not in json.dumps([a, c])
        assert a == open_data(next(first.iterdir())).identity()
        assert a != c
        if write is not as_saved:
            assert a == b
    assert open_data(MANY).identity() == open_data([dict(reversed(record.items())) for record in MANY]).identity()
    assert open_data(MANY).identity() != open_data(MANY[::-1]).identity()
    assert open_data(MANY).identity()["rows"] == 40
    kinds = [open_data(write(MANY, tmp_path)).identity()["kind"] for write in ON_DISK.values()]
    assert kinds == ["json lines", "csv", "parquet", "datasets"]


def test_a_digest_sees_64_blocks(tmp_path: Path) -> None:
    """All of a file up to 4 MiB; of a larger one, its first and last bytes and what lies in evenly spaced blocks."""
    block = 2**16

    def seen(size: int, changed: int) -> bool:
        path = tmp_path / "data.jsonl"
        content = bytearray(lines(PAIR).encode().ljust(size))
        path.write_bytes(content)
        before = open_data(path).identity()
        content[changed] ^= 1
        path.write_bytes(content)
        return before != open_data(path).identity()

    for size in (200, block, block + 1, 3 * block - 5, 64 * block):
        assert all(seen(size, at) for at in {120, size // 2, size - 1, size - block, min(block, size - 1)} if at > 110)
    assert seen(80 * block, 120)
    assert seen(80 * block, 80 * block - 1)
    gap = 79 * block // 63  # from the start of a block to the start of the next
    assert seen(80 * block, 10 * gap + block // 2)
    assert not seen(80 * block, 10 * gap + block + (gap - block) // 2)  # what cannot be seen


def test_size_and_order_of_files_are_part_of_the_identity(tmp_path: Path) -> None:
    for folder, first, second in (("one", MANY[:5], MANY[5:10]), ("other", MANY[5:10], MANY[:5])):
        (tmp_path / folder).mkdir()
        table(tmp_path / folder / "a.parquet", first)
        table(tmp_path / folder / "b.parquet", second)
    longer = [open_data(written(tmp_path, lines(PAIR).ljust(n * 2**20))).identity()["files"][0]["sha256"] for n in (5, 6)]
    assert longer[0] != longer[1]
    one, other = (open_data(tmp_path / folder).identity()["files"] for folder in ("one", "other"))
    assert one != other
    assert one == other[::-1]
    assert [file["size"] for file in one] == [p.stat().st_size for p in sorted((tmp_path / "one").iterdir())]


def test_the_identity_of_rows_in_memory_is_that_of_what_is_read() -> None:
    known = [open_data(rows).identity()["sha256"] for rows in ([PAIR], [{"messages": PAIR}], [{"messages": PAIR, "score": 3}])]
    assert len(set(known)) == 1
    others = [[PAIR, PAIR], [{"id": "a", "messages": PAIR}], [said("What?", "That.")], [said("What?")], [said("What?", "")]]
    assert len({open_data(rows).identity()["sha256"] for rows in [[PAIR], *others]}) == 6


# Memory


@dataclass(frozen=True)
class Lazy(Mapping[str, Any]):
    """A record that is no dict."""

    fields: dict[str, Any] = field(default_factory=lambda: {"messages": tuple(PAIR)})

    def __getitem__(self, key: str) -> Any:
        return self.fields[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def test_rows_in_memory_are_copied_and_may_be_of_any_mapping() -> None:
    mine = [{"messages": [dict(m) for m in PAIR]}]
    source = open_data(mine)
    mine[0]["messages"][1]["content"] = "changed"
    mine.append(mine[0])
    assert [simple(row) for row in read(source)] == [[("user", "What?"), ("assistant", "This.")]]
    assert [simple(row) for row in read(open_data([Lazy(), tuple(PAIR), Lazy({"prompt": "What?", "answer": "This."})]))] == [
        [("user", "What?"), ("assistant", "This.")]
    ] * 3
    assert (source.name, open_data(mine, name="mine").name, source.unit) == ("rows", "mine", "row")


def test_odd_rows_in_memory_are_skipped() -> None:
    circle: dict[str, Any] = {}
    circle["messages"] = [circle]
    huge = {"id": 10**5000, "messages": PAIR}
    found = read(open_data([circle, {"a": 2, 10**5000: 1}, {"messages": 10**5000}, huge, {"prompt": b"a", "answer": "b"}]))
    assert found[:3] == [
        Skipped(1, "nested too deeply"),
        Skipped(2, "no conversation in its fields ('a')"),
        Skipped(3, "messages is a number, not a list"),
    ]
    assert found[3] == Transcript("row 4", 4, tuple(PAIR))
    assert found[4] == Skipped(5, "prompt is neither text nor a list")


# Places


@dataclass
class Counted:
    """A source that keeps account of which shards are read."""

    inner: Source
    name: str = "counted"
    unit: str = "line"
    cut: int = 0
    read: list[int] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        return self.inner.identity()

    def shards(self, rows: int) -> Iterator[Shard]:
        self.cut += 1
        for shard in self.inner.shards(rows):
            yield CountedShard(self, shard)


@dataclass
class CountedShard:
    source: Counted
    inner: Shard

    @property
    def number(self) -> int:
        return self.inner.number

    @property
    def first(self) -> int:
        return self.inner.first

    def read(self) -> Rows:
        self.source.read.append(self.number)
        return self.inner.read()


@given(places=st.lists(st.integers(1, 40)), blank=st.integers(0, 3), size=st.integers(1, 50))
@settings(deadline=None, max_examples=50)
def test_places_are_read_again(places: list[int], blank: int, size: int) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_SOME", size)
        content = ("\n" * blank).join(line + "\n" for line in lines(*MANY).splitlines())
        source = Counted(open_data(written(Path(folder), content)))
        wanted = [1 + (place - 1) * (blank + 1) for place in places]
        found = read_places(source, wanted)
        assert source.cut == 1
        assert source.read == sorted({(place - 1) // size for place in places})
    assert set(found) == set(wanted)
    assert all(found[1 + (p - 1) * (blank + 1)].messages[0]["content"] == f"question {p}" for p in places)
    assert all(row.place == place for place, row in found.items())


def test_places_that_hold_no_conversation_are_told(tmp_path: Path) -> None:
    source = open_data(written(tmp_path, "\n" + lines(PAIR, 3) + "\n" + lines(PAIR), "mine.jsonl"))
    assert list(read_places(source, [5, 2, 5])) == [2, 5]
    for place, why in (
        (3, "a number instead of an object with messages"),
        *((p, "there is no such row") for p in (0, 1, 4, 6, -1)),
    ):
        with pytest.raises(ScreeningError) as caught:
            read_places(source, [5, place, 2])
        assert (
            str(caught.value) == f"mine: line {place} holds no conversation ({why}): give the data that the places were taken from"
        )


def test_nothing_is_read_beyond_a_place_that_is_not_there(tmp_path: Path) -> None:
    source = Counted(open_data(written(tmp_path, "\n" + lines(*MANY) * 10)))
    with pytest.raises(ScreeningError, match="counted: line 1 holds no conversation"):
        read_places(source, [1, 300])
    assert source.read == []


# What cannot be read


def test_data_that_cannot_be_read_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    written(tmp_path / "broken", "{", "state.json")
    os.mkfifo(tmp_path / "pipe.jsonl")
    text = lines(PAIR)
    cases: list[tuple[Any, str]] = [
        (tmp_path / "none.jsonl", "no such file or folder; expected a file (.jsonl, "),
        (str(tmp_path / "none"), "no such file or folder"),
        ("none.csv", "no such file or folder"),
        ("mine/none.csv.gz", "no such file or folder"),
        (Path("none/none"), "no such file or folder"),
        ("none", "no such file or folder"),
        ("a\0b", "no such file or folder"),
        ("a" * 5000, "cannot be read ([Errno 36] File name too long"),
        ("nobody/nothing", "no such file or folder, and no dataset that can be loaded (ConnectionError: "),
        (tmp_path / "empty", "holds no Parquet files and was not written by `save_to_disk`; expected a file"),
        (tmp_path / "broken", "cannot be read as a folder of datasets ("),
        (tmp_path / "pipe.jsonl", "neither a file nor a folder; expected"),
        (written(tmp_path, "", "empty.jsonl"), "the file is empty"),
        (written(tmp_path, "\ufeff\n \r\n", "blank.jsonl"), "holds no rows; expected a JSON record per line"),
        (written(tmp_path, "\n", "blank.json"), "holds no rows; expected a JSON record per line"),
        (written(tmp_path, "[]", "none.json"), "holds no conversation that can be read (it has no records)"),
        (written(tmp_path, "[1]", "one.json"), "holds no conversation that can be read (item 1: a number instead of an "),
        (
            written(tmp_path, json.dumps([{"messages": PAIR}], indent=1)[:-1], "torn.json"),
            "holds no conversation that can be read (line 1: not JSON (Expecting value at column 2); as one JSON document: not",
        ),
        (written(tmp_path, text, "data.txt"), "unknown ending '.txt'; expected a file (.jsonl, "),
        (written(tmp_path, text, "data"), "unknown ending ''; expected"),
        (written(tmp_path, text, "data.jsonl.gz"), "packed files are not read: unpack it first"),
        (written(tmp_path, "\n", "blank.csv"), "holds no rows; expected a header"),
        (written(tmp_path, "prompt,completion\n\n", "header.csv"), "holds no rows; expected a header"),
        (written(tmp_path, "prompt;completion\na;b\n", "points.csv"), "no columns of a known form, but 'prompt;completion'; known"),
        (written(tmp_path, "prompt,prompt,answer\na,b,c\n", "twice.csv"), "two columns are called 'prompt': name them apart"),
        (written(tmp_path, "prompt,chosen,rejected\na,b,c\n", "pairs.csv"), "holds preference pairs (chosen and rejected): "),
        (written(tmp_path, "a,b\n\n".encode("utf-16"), "wide.csv"), "the header cannot be read (not UTF-8 (invalid start byte at"),
        (written(tmp_path, 'a,"b"c\na,b\n', "quote.csv"), "the header cannot be read (field 2 goes on after its closing quote)"),
        (written(tmp_path, "", "empty.parquet"), "the file is empty"),
        (written(tmp_path, text, "text.parquet"), "cannot be read as Parquet (ArrowInvalid: "),
        (table(tmp_path / "none.parquet", MANY[:0], pa.schema([(c, pa.string()) for c in MANY[0]])), "holds no rows"),
        (table(tmp_path / "other.parquet", [{"text": "a", "prompt": "b"}]), "no columns of a known form, but 'text', 'prompt'"),
        (saved(tmp_path / "other", [{"text": "a"}]), "no columns of a known form, but 'text'; known are"),
    ]  # fmt: skip
    for data, reason in cases:
        with pytest.raises(ScreeningError) as caught:
            open_data(data)
        assert str(caught.value).startswith(f"{data}: {reason}")
        assert str(caught.value).isprintable() or data == "a\0b"


def test_rows_in_memory_that_are_none_and_splits_of_what_has_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(ScreeningError, match="mine: holds no rows; expected conversations"):
        open_data([], name="mine")
    for given_, message in (
        (MANY, "rows: rows in memory have no splits"),
        (as_lines(MANY, tmp_path), "a file has no splits, so there is no 'train'"),
    ):
        with pytest.raises(ScreeningError, match=message):
            open_data(given_, split="train")


def test_a_shard_has_at_least_one_row(tmp_path: Path) -> None:
    for data in (MANY, *(write(MANY, tmp_path) for write in ON_DISK.values())):
        for rows in (0, -1):
            with pytest.raises(ScreeningError, match=f"a shard needs at least 1 row, not {rows}"):
                next(open_data(data).shards(rows))


def test_data_that_changed_is_told(tmp_path: Path) -> None:
    for write in (as_lines, as_csv, as_table):
        path = write(MANY, tmp_path)
        source = open_data(path)
        shard = next(source.shards(5))
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        for work in (shard.read, source.identity, *([lambda s=source: list(s.shards(5))] if write is not as_table else [])):
            with pytest.raises(
                ScreeningError, match=rf"changed since it was opened \({len(content)} bytes then, {len(content) + 1} now\)"
            ):
                work()
        path.unlink()
        with pytest.raises(ScreeningError, match=r"cannot be read \(\[Errno 2\] No such file"):
            shard.read()
    path = as_lines(MANY, tmp_path)
    shard = list(open_data(path).shards(5))[-1]
    path.write_bytes(b" " * path.stat().st_size)
    with pytest.raises(ScreeningError, match="changed since it was opened: screen it anew"):
        shard.read()


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet, folder = as_table(MANY, tmp_path), as_saved(MANY, tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for data, what in (
        (parquet, "reading Parquet needs pyarrow"),
        (folder, "reading a folder of datasets needs datasets"),
        ("a/b", "from the hub needs datasets"),
    ):
        with pytest.raises(ScreeningError) as caught:
            open_data(data)
        assert f"{what}: pip install 'persona-lens[screen]'" in str(caught.value)
    assert len(read(open_data(as_lines(MANY, tmp_path)))) == 40


def deep(kind: pa.DataType, depth: int) -> pa.DataType:
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind


def test_hostile_tables_are_told_or_skipped(tmp_path: Path) -> None:
    for depth, told in ((40, False), (500, True)):
        pq.write_table(pa.table({"messages": pa.nulls(2, deep(pa.string(), depth))}), tmp_path / "deep.parquet")
        if told:
            with pytest.raises(ScreeningError, match="cannot be read as Parquet .*too deeply nested"):
                open_data(tmp_path / "deep.parquet")
        else:
            assert len(read(open_data(tmp_path / "deep.parquet"))) == 2
    value: Any = "a"
    for _ in range(40):
        value = [value]
    pq.write_table(pa.table({"messages": pa.array([value], deep(pa.string(), 40))}), tmp_path / "deep.parquet")
    assert read(open_data(tmp_path / "deep.parquet")) == [Skipped(1, "message 1 is a list, not an object")]


def test_a_hostile_line_is_skipped(tmp_path: Path) -> None:
    hostile = [
        "[" * 10**5,
        '{"messages":' * 10**5,
        '{"a": %s}' % ("9" * 10**4),
        r'{"prompt": "\ud800", "answer": "b"}',
        '{"\\ud800": 1}',
        "\x00",
    ]
    found = read(open_data(written(tmp_path, "\n".join(hostile))))
    assert [row.reason for row in found if isinstance(row, Skipped)] == [
        "nested too deeply",
        "nested too deeply",
        "no conversation in its fields ('a')",
        "message 1 holds half a surrogate pair, which is no text",
        r"no conversation in its fields ('\ud800')",
        "not JSON (Expecting value at column 1)",
    ]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv", "jsonl"])
def test_damaged_files_are_read_or_told(kind: str, tmp_path: Path) -> None:
    write = {"parquet": as_table, "arrow": as_saved, "csv": as_csv, "jsonl": as_lines}[kind]
    path = write([{"prompt": r["prompt"], "answer": said("a", r["completion"])[1]["content"]} for r in MANY], tmp_path)
    damaged = next(path.glob("*.arrow")) if kind == "arrow" else path
    content = damaged.read_bytes()
    rng = random.Random(7)
    outcomes: set[str] = set()
    for _ in range(80):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 5)):
            changed[rng.randrange(len(content)) if rng.random() < 0.5 else -rng.randint(1, min(600, len(content)))] = rng.randrange(
                256
            )
        damaged.write_bytes(changed)
        try:
            found = [row for shard in open_data(path).shards(9) for row in shard.read()]
        except ScreeningError:
            outcomes.add("told")
        else:
            outcomes |= {type(row).__name__ for row in found}
    assert "Transcript" in outcomes
    assert outcomes & {"told", "Skipped"}


def test_a_table_that_lacks_rows_is_told(tmp_path: Path) -> None:
    path = table(tmp_path / "data.parquet", MANY)
    source = open_data(path)
    shard = next(source.shards(50))
    other = table(tmp_path / "other.parquet", MANY[:30])
    promised = tables._ParquetShard(0, 1, tuple((tables._part(base.File(other, other.stat().st_size)), 0, 40) for _ in range(1)))
    assert len(shard.read()) == 40
    for _ in range(2):
        with pytest.raises(ScreeningError, match="holds fewer rows than it says"):
            promised.read()


# Other processes


def test_shards_are_small_and_another_process_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [write(MANY, tmp_path).name for write in ON_DISK.values()]
    shards = [shard for name in files for shard in open_data(Path(name)).shards(17)]
    assert all(len(pickle.dumps(shard)) < 2000 for shard in shards)
    expected = [shard.read() for shard in shards]
    with multiprocessing.get_context("fork").Pool(1, os.chdir, ("/",)) as pool:
        assert pool.map(sent, shards) == expected


def test_the_data_is_never_changed(tmp_path: Path) -> None:
    for write in ON_DISK.values():
        path = write(MANY, tmp_path)
        before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
        source = open_data(path)
        read(source)
        source.identity()
        read_places(source, [1, 40])
        assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()} == before


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        path = written(tmp_path, lines(*({"prompt": f"{i}", "answer": "a" * 1000} for i in range(rows))))
        tracemalloc.start()
        for shard in open_data(path).shards(50):
            shard.read()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(800) < 1.2 * peak(200)

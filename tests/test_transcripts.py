"""Chats from files: every format, every reason to skip a record with its place, and files that nobody meant to be chats."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.errors import TranscriptError
from persona_lens.transcripts import Skipped, Transcripts, read_transcripts, write_transcripts

Messages = tuple[dict[str, str], ...]

ODD = '\u2028\u2029\x85\x0b\x0c\x1c\x1e\n\r\t"\\\ufeff\U0001f600'  # everything some notion of "line" ends at, and JSON escapes
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ODD)), max_size=12)
SAID = TEXT.filter(lambda text: bool(text.strip()))
FIELDS = ["id", "messages", "conversations", "request", "response", "choices", "message"]
FIELDS += ["role", "content", "from", "value", "type", "text"]
WORDS = [*FIELDS, "user", "assistant", "system", "human", "gpt", "tool", "\ud800", " "]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(WORDS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | TEXT, inner, max_size=4),
    max_leaves=12,
)
ROLE = st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | VALUES
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": SAID | VALUES}) | VALUES
NEAR = st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4) | VALUES}, optional={"id": VALUES, "choices": VALUES})
RECORDS = st.lists(NEAR | VALUES, max_size=5)


def said(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles, start=1)]


PAIR = said("user", "assistant")
WITH_SYSTEM = said("system", "user", "assistant")


def completion(*messages: Any) -> list[dict[str, Any]]:
    return [{"index": i, "message": message, "finish_reason": "stop"} for i, message in enumerate(messages)]


def shared(**names: str) -> list[dict[str, str]]:
    return [{"from": names[m["role"]], "value": m["content"]} for m in WITH_SYSTEM]


def parts(*texts: str, kind: str = "text") -> list[dict[str, str]]:
    return [{"type": kind, "text": text} for text in texts]


def written(folder: Path, content: str | bytes, name: str = "chats.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(content: str | bytes) -> Transcripts:
    with TemporaryDirectory() as folder:
        return read_transcripts(written(Path(folder), content))


def messages_of(record: Any) -> list[dict[str, str]]:
    (chat,) = read(lines(record)).chats
    return list(chat.messages)


FORMATS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "messages": ({"messages": WITH_SYSTEM, "model": "gpt-4o", "temperature": 0.5}, WITH_SYSTEM),
    "finetuning, with weights": ({"messages": [PAIR[0], PAIR[1] | {"weight": 0}]}, PAIR),
    "developer": ({"messages": [{"role": "developer", "content": "system 1"}, *WITH_SYSTEM[1:]]}, WITH_SYSTEM),
    "parts": ({"messages": [{"role": "user", "content": parts("user", " 1")}, PAIR[1]]}, PAIR),
    "input parts": ({"messages": [{"role": "user", "content": parts("user 1", kind="input_text")}, PAIR[1]]}, PAIR),
    "output parts": ({"messages": [PAIR[0], {"role": "assistant", "content": parts("assistant 2", kind="output_text")}]}, PAIR),
    "completion": ({"messages": PAIR[:1], "choices": completion(PAIR[1], said("assistant")[0])}, PAIR),
    "request and response": ({"request": {"messages": PAIR[:1]}, "response": {"choices": completion(PAIR[1])}}, PAIR),
    "request that is answered": ({"request": {"messages": PAIR}}, PAIR),
    "messages and response": ({"messages": PAIR[:1], "response": {"choices": completion(PAIR[1])}}, PAIR),
    "null choices": ({"messages": PAIR, "choices": None, "response": "fine"}, PAIR),
    "ShareGPT": ({"conversations": shared(system="system", user="human", assistant="gpt")}, WITH_SYSTEM),
    "ShareGPT, other names": ({"conversations": shared(system="system", user="user", assistant="chatgpt")}, WITH_SYSTEM),
    "ShareGPT, assistant": ({"conversations": shared(system="system", user="human", assistant="assistant")}, WITH_SYSTEM),
    "conversation": ({"conversation": PAIR, "messages": None}, PAIR),
    "bare list": (PAIR, PAIR),
    "bare list in ShareGPT's words": (shared(system="system", user="human", assistant="gpt"), WITH_SYSTEM),
    "trailing user message": ({"messages": said("user", "assistant", "user")}, said("user", "assistant", "user")),
    "odd but harmless fields": ({"messages": PAIR, "id": True, "score": float("nan"), "n": float("inf")}, PAIR),
}


@pytest.mark.parametrize(("record", "expected"), FORMATS.values(), ids=FORMATS.keys())
def test_every_format_is_read(record: Any, expected: list[dict[str, Any]]) -> None:
    assert messages_of(record) == expected
    among = read("oops\n" + lines(record))
    assert [(chat.name, chat.place, list(chat.messages)) for chat in among.chats] == [("line 2", 2, expected)]
    if isinstance(record, dict):
        for whole in (json.dumps(record, indent=2), json.dumps(record, indent=2) + "\n"):
            assert [list(chat.messages) for chat in read("\n" + whole).chats] == [expected]


def test_every_format_is_an_item_of_an_array() -> None:
    records = [record for record, _ in FORMATS.values()]
    for indent in (None, 2):
        found = read(json.dumps([3, *records, []], indent=indent))
        assert [(chat.place, list(chat.messages)) for chat in found.chats] == [
            (place, expected) for place, (_, expected) in enumerate(FORMATS.values(), start=2)
        ]
        assert found.unit == "item"
        assert found.chats[0].name == "item 2"
        assert found.skipped == (
            Skipped(1, "a number instead of an object with messages"),
            Skipped(len(records) + 2, "no messages"),
        )


def test_a_list_is_one_conversation_if_it_holds_messages_and_no_records() -> None:
    for record in ({"messages": PAIR}, {"role": "clerk", "request": {"messages": PAIR}}, {"from": "here", "conversations": PAIR}):
        found = read(json.dumps([PAIR[0], record]))
        assert [(chat.place, list(chat.messages)) for chat in found.chats] == [(2, PAIR)]
        assert (found.unit, [s.place for s in found.skipped]) == ("item", [1])
    with pytest.raises(TranscriptError, match=r"\(1 skipped, the first at line 1: message 3 is a number, not an object\)"):
        read(json.dumps([*PAIR, 3]))


def test_the_places_are_those_of_the_file(tmp_path: Path) -> None:
    content = "\r\n" + lines(PAIR) + " \t\n" + lines({"messages": PAIR}).replace("\n", "\r\n") + "\noops\n" + json.dumps(PAIR)
    for start in ("", "\ufeff"):
        found = read_transcripts(str(written(tmp_path, start + content)))
        assert [(chat.name, chat.place) for chat in found.chats] == [("line 2", 2), ("line 4", 4), ("line 7", 7)]
        assert found.skipped == (Skipped(6, "not JSON (Expecting value at column 1)"),)
        assert (found.path, found.unit) == (tmp_path / "chats.jsonl", "line")
    (chat,) = read("\n\n" + json.dumps({"messages": PAIR}, indent=1)).chats
    assert (chat.name, chat.place) == ("line 3", 3)


def test_names_are_the_ids_and_differ() -> None:
    ids: list[Any] = ["a", 7, "a", "7", "line 6", None, True, 1.5, " ", "\ud800", 10**150, "a (line 13)", "a", 2**64]
    found = read(lines(*({"id": identity, "messages": PAIR} for identity in ids)))
    assert [chat.name for chat in found.chats] == [
        *("a", "7", "a (line 3)", "7 (line 4)", "line 6", "line 6 (line 6)"),
        *("line 7", "line 8", "line 9", "line 10", "line 11", "a (line 13)", "a (line 13) (line 13)", str(2**64)),
    ]


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [PAIR[0], {"role": "assistant"} | fields]}


REASONS: dict[str, tuple[Any, str]] = {
    "role": ({"messages": [*PAIR, {"role": "tool", "content": "3"}]}, "unknown role 'tool' of message 3"),
    "long role": (message(role="\x1b" + "x" * 99, content="a"), f"unknown role '\\x1b{'x' * 39}...' of message 2"),
    "role of another type": (message(role=["user"], content="a"), "unknown role a list of message 2"),
    "no role": ({"messages": [{"content": "hi"}]}, "message 1 has no role"),
    "never answered": ({"messages": said("system", "user")}, "no assistant turn"),
    "only a system message": ({"messages": said("system")}, "no assistant turn"),
    "no messages": ({"messages": []}, "no messages"),
    "null": ({"messages": None}, "no messages (none of the fields messages, conversations, conversation)"),
    "other fields": ({"text": "hi"}, "no messages (none of the fields messages, conversations, conversation)"),
    "messages as text": ({"messages": "hi"}, "messages is text, not a list"),
    "conversations as object": ({"conversations": {}}, "conversations is an object, not a list"),
    "number": (3, "a number instead of an object with messages"),
    "text": ("hi", "text instead of an object with messages"),
    "nothing": (None, "null instead of an object with messages"),
    "truth": (True, "true instead of an object with messages"),
    "list of others": ([3], "message 1 is a number, not an object"),
    "empty": (message(content=""), "message 2 is empty"),
    "white space": (message(content=" \n\u2003\u2028"), "message 2 is empty"),
    "no parts": (message(content=[]), "message 2 is empty"),
    "tool calls": (message(content=None, tool_calls=[{}]), "message 2 has no content (a message of tool calls only has none)"),
    "no content": (message(), "message 2 has no content (a message of tool calls only has none)"),
    "no value": ({"conversations": [{"from": "gpt"}]}, "message 1 has no content (a message of tool calls only has none)"),
    "content is a number": (message(content=3), "content of message 2 is a number, not text"),
    "content is NaN": (message(content=float("nan")), "content of message 2 is a number, not text"),
    "content is huge": (message(content=10**4000), "content of message 2 is a number, not text"),
    "content is false": (message(content=False), "content of message 2 is false, not text"),
    "content is an object": (message(content={"text": "a"}), "content of message 2 is an object, not text"),
    "image": (
        message(content=[*parts("a"), {"type": "image_url"}]),
        "message 2 has a part of type 'image_url': only text can be read",
    ),
    "untyped part": (message(content=[{"text": "a"}]), "message 2 has a part of type null: only text can be read"),
    "oddly typed part": (message(content=[{"type": []}]), "message 2 has a part of type a list: only text can be read"),
    "part is text": (message(content=["a"]), "message 2 has a part that is text, not an object"),
    "part without text": (message(content=[{"type": "text", "text": 3}]), "message 2 has a part whose text is a number"),
    "half a character": (message(content="a\ud800"), "message 2 holds half a surrogate pair, which is no text"),
    "its other half": (message(content="\udfffa"), "message 2 holds half a surrogate pair, which is no text"),
    "late system": ({"messages": said("user", "system", "assistant")}, "message 2 is a system message: only the first may be one"),
    "second system": ({"messages": said("system", "system")}, "message 2 is a system message: only the first may be one"),
    "same role": ({"messages": said("user", "assistant", "assistant")}, "messages 2 and 3 are both assistant messages"),
    "same user": ({"messages": said("system", "user", "user", "assistant")}, "messages 2 and 3 are both user messages"),
    "assistant first": ({"messages": said("assistant", "user")}, "begins with an assistant message (message 1)"),
    "after system": ({"messages": said("system", "assistant")}, "begins with an assistant message (message 2)"),
    "answered twice": ({"messages": PAIR, "choices": completion(PAIR[1])}, "messages 2 and 3 are both assistant messages"),
    "no choice": ({"messages": PAIR[:1], "choices": []}, "choices holds no message as its first"),
    "odd choice": ({"messages": PAIR, "choices": ["A", "B"]}, "choices holds no message as its first"),
    "choices of another type": (
        {"request": {"messages": PAIR}, "response": {"choices": 3}},
        "choices holds no message as its first",
    ),
    "null choice": ({"messages": PAIR[:1], "choices": completion(None)}, "message 2 is null, not an object"),
    "tool called": ({"messages": PAIR[:1], "choices": completion({"role": "tool"})}, "unknown role 'tool' of message 2"),
}


@pytest.mark.parametrize(("record", "reason"), REASONS.values(), ids=REASONS.keys())
def test_a_record_is_skipped_with_its_line_and_the_reason(record: Any, reason: str) -> None:
    found = read(lines(PAIR) + "\n" + lines(record, PAIR))
    assert found.skipped == (Skipped(3, reason),)
    assert [chat.place for chat in found.chats] == [1, 4]
    with pytest.raises(TranscriptError) as caught:
        read("\n" + lines(record, record))
    assert f"holds no conversation that can be read (2 skipped, the first at line 2: {reason})" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "not JSON (Expecting value at column 15)"),
        ("{}{}", "not JSON (Extra data at column 3)"),
        ("\u2028", "not JSON (Expecting value at column 1)"),
        ("[", "not JSON (Expecting value at column 2)"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    ],
    ids=["torn", "two", "separator", "bracket", "deep list", "deep object"],
)
def test_a_line_that_is_not_json_is_skipped_wherever_it_stands(line: str, reason: str) -> None:
    for before in range(3):
        found = read(lines(*[PAIR] * before) + line + "\n" + lines(PAIR))
        assert found.skipped == (Skipped(before + 1, reason),)
        assert len(found.chats) == before + 1


def test_integers_longer_than_python_reads_do_no_harm() -> None:
    huge = "9" * 10_000
    content = lines({"id": "HUGE", "messages": PAIR}, message(content="HUGE")).replace('"HUGE"', huge)
    for found in (read(content), read(content.replace(huge, "-" + huge))):
        assert [chat.name for chat in found.chats] == ["line 1"]
        assert found.skipped == (Skipped(2, "content of message 2 is a number, not text"),)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    nothing = "holds no conversation that can be read"
    numbers = "(2 skipped, the first at item 1: a number instead of an object with messages)"
    cases = [
        (tmp_path / "none.jsonl", "no such file; expected one {"),
        (tmp_path, "cannot be read ([Errno 21] Is a directory"),
        (Path("a\0b"), "cannot be read (embedded null byte)"),
        (
            written(tmp_path, json.dumps(PAIR).encode("utf-16"), "utf16"),
            "not UTF-8 (invalid start byte at byte 0); save it as UTF-8",
        ),
        (written(tmp_path, b'"a\xc3"', "latin"), "not UTF-8 (invalid continuation byte at byte 2)"),
        (written(tmp_path, "", "empty"), f"{nothing} (it has no records); expected one {{"),
        (written(tmp_path, "\ufeff \n\n", "blank"), f"{nothing} (it has no records)"),
        (written(tmp_path, "[]", "list"), f"{nothing} (it has no records)"),
        (written(tmp_path, "[1, 2]", "numbers"), f"{nothing} {numbers}; expected one {{"),
    ]
    for path, reason in cases:
        with pytest.raises(TranscriptError) as caught:
            read_transcripts(path)
        assert str(caught.value).startswith(f"{path}: {reason}")


def test_a_broken_document_over_several_lines_says_where_it_breaks() -> None:
    broken = json.dumps([{"messages": PAIR}, {"messages": PAIR}], indent=1)[:-1]
    with pytest.raises(
        TranscriptError, match=r"at line 1: not JSON .*as one JSON document: not JSON \(Expecting ',' .* at line 26,"
    ):
        read(broken)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = written(tmp_path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_transcripts(path, [("a", PAIR), ("b", [{"role": "user", "content": "\ud800"}])])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("chats.jsonl", "old")]


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    n = draw(st.integers(2, 5))
    roles = [*draw(st.sampled_from([[], ["system"]])), *(["user", "assistant"] * 3)[:n]]
    return tuple({"role": role, "content": draw(SAID)} for role in roles)


@given(chats=st.dictionaries(SAID, conversations(), min_size=1, max_size=5))
@settings(deadline=None)
def test_conversations_come_back_as_they_were_written(chats: dict[str, Messages]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "chats.jsonl"
        write_transcripts(path, chats.items())
        found = read_transcripts(path)
        assert path.read_bytes().count(b"\n") == len(chats)
    assert [(chat.name, chat.place, chat.messages) for chat in found.chats] == [
        (name, place, messages) for place, (name, messages) in enumerate(chats.items(), start=1)
    ]
    assert not found.skipped


def check(found: Transcripts, unit: str, n: int) -> None:
    """Every record is read or skipped, in order, and what is read is a conversation."""
    assert found.unit == unit
    assert sorted([c.place for c in found.chats] + [s.place for s in found.skipped]) == list(range(1, n + 1))
    assert len({chat.name for chat in found.chats}) == len(found.chats)
    for chat in found.chats:
        turns = [m["role"] for m in chat.messages if m["role"] != "system"]
        assert [m["role"] for m in chat.messages] in (turns, ["system", *turns])
        assert turns == [("user", "assistant")[i % 2] for i in range(len(turns))]
        assert len(turns) > 1
        assert all(m["content"].strip() and m["content"].encode() and set(m) == {"role", "content"} for m in chat.messages)
    assert all(s.reason and s.reason.isprintable() for s in found.skipped)


@given(records=RECORDS)
@settings(deadline=None, max_examples=200)
def test_any_records_are_read_or_skipped(records: list[Any]) -> None:
    good = {"messages": PAIR}
    check(read(json.dumps([*records, good])), "item", len(records) + 1)
    check(read(lines(good, *records, good)), "line", len(records) + 2)


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with pytest.raises(TranscriptError, match=r"not UTF-8|holds no conversation"):
        read(content)


@given(records=RECORDS, cut=st.integers(0), junk=st.binary(max_size=3), indent=st.none() | st.just(1), array=st.booleans())
@settings(deadline=None)
def test_damaged_files_are_read_or_refused(records: list[Any], cut: int, junk: bytes, indent: int | None, array: bool) -> None:
    whole = (json.dumps([*records, PAIR], indent=indent) if array else lines(PAIR, *records, PAIR)).encode()
    at = cut % len(whole)
    try:
        found = read(whole[:at] + junk + whole[at + 1 :])
    except TranscriptError:
        return
    assert found.chats

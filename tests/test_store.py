"""Files survive interruption: atomic writes, torn lines, whole chunks, and run folders that only their own command reopens."""

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from persona_lens.errors import RunFolderError
from persona_lens.store import (
    RunFolder,
    append_jsonl,
    git_revision,
    read_json,
    read_jsonl,
    truncate_jsonl,
    versions,
    write_atomically,
    write_json,
)

ODD = '\u2028\u2029\x85\x0b\x0c\x1c\x1e\n\r\t"\\\ufeff'  # everything some notion of "line" ends at, and what JSON escapes
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ODD)), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=6)


def numbered(first: int, n: int) -> list[dict[str, Any]]:
    return [{"row": first + i, "text": f"answer {ODD} {first + i}"} for i in range(n)]


def write_then_fail(error: BaseException) -> Callable[[str], object]:
    def write(temporary: str) -> None:
        Path(temporary).write_text("half of the new")
        raise error

    return write


@pytest.mark.parametrize(
    "error",
    [ValueError("bad"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()],
    ids=["exception", "disk full", "interrupt"],
)
def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(type(error)) as caught:
        write_atomically(path, write_then_fail(error))
    assert caught.value is error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(("text", "code"), [("I/O error: No space left on device (os error 28)", errno.ENOSPC), ("odd", errno.EIO)])
def test_a_failure_inside_safetensors_is_an_operating_system_error_with_the_path(tmp_path: Path, text: str, code: int) -> None:
    path = tmp_path / "vectors.safetensors"
    path.write_text("old")
    with pytest.raises(OSError) as caught:
        write_atomically(path, write_then_fail(SafetensorError(text)))
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("vectors.safetensors", "old")]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write_atomically(tmp_path / "new" / "a.bin", write_then_fail(OSError(errno.ENOSPC, "full")))
    assert list((tmp_path / "new").iterdir()) == []


def test_the_old_file_is_whole_while_the_new_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    seen: list[str] = []

    def write(temporary: str) -> None:
        for part in ("n", "e", "w"):
            with Path(temporary).open("a") as file:
                file.write(part)
            seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ["old"] * 3
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_atomically_written_file_has_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        append_jsonl(tmp_path / "ordinary", [{}])
        write_json(tmp_path / "atomic", {})
        append_jsonl(tmp_path / "later", [{}])
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic", "later")}
    assert modes == {0o640}


@settings(deadline=None, max_examples=40)
@given(record=st.dictionaries(TEXT, VALUES, max_size=4))
def test_json_comes_back_as_it_was_written(record: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deep" / "a.json"
        write_json(path, record)
        assert read_json(path) == record


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[1, 2]", b"3", b"null"])
def test_a_damaged_json_file_is_an_error_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="damaged") as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_missing_json_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such file") as caught:
        read_json(tmp_path / "none.json")
    assert str(tmp_path / "none.json") in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(parts=st.lists(RECORDS, min_size=1, max_size=3))
def test_jsonl_comes_back_as_it_was_appended(parts: list[list[dict[str, Any]]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        for part in parts:
            append_jsonl(path, part)
        assert read_jsonl(path) == [record for part in parts for record in part]


def test_records_are_one_line_each_whatever_their_strings_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_jsonl(path, numbered(0, 3))
    assert path.read_bytes().count(b"\n") == 3
    assert len(path.read_text(encoding="utf-8").splitlines()) > 3  # the control: a text split would tear these records
    assert read_jsonl(path) == numbered(0, 3)


def test_an_absent_jsonl_file_is_empty(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == []
    truncate_jsonl(tmp_path / "none.jsonl", 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_every_cut_of_a_file_is_repaired_to_the_lines_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_jsonl(path, numbered(0, 3))
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert read_jsonl(path, repair=True) == numbered(0, whole)
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:whole])


@settings(deadline=None, max_examples=40)
@given(records=RECORDS, data=st.data())
def test_a_file_cut_at_any_byte_is_repaired_to_a_prefix_and_can_be_continued(
    records: list[dict[str, Any]], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        append_jsonl(path, records)
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert read_jsonl(path, repair=True) == records[:whole]
        append_jsonl(path, records[whole:])
        assert path.read_bytes() == content


def test_a_torn_file_is_refused_and_left_alone_unless_repair_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    append_jsonl(path, numbered(0, 3))
    torn = path.read_bytes()[:-4]
    path.write_bytes(torn)
    with pytest.raises(RunFolderError, match="torn") as caught:
        read_jsonl(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == torn
    assert read_jsonl(path, repair=True) == numbered(0, 2)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("damage", [b"", b'{"row": 1', b"\xff\xfe{}", b"[1]", b"3", b"null", b"\x00\x00\x00", b"{}{}"])
def test_a_damaged_line_is_an_error_with_file_and_line_number_and_is_never_repaired(
    tmp_path: Path, damage: bytes, repair: bool
) -> None:
    path = tmp_path / "rollouts.jsonl"
    append_jsonl(path, numbered(0, 5))
    lines = path.read_bytes().split(b"\n")
    lines[2] = damage
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    with pytest.raises(RunFolderError, match="line 3 is damaged") as caught:
        read_jsonl(path, repair=repair)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"1" * 5000, b"[" * 100_000], ids=["digits", "brackets"])
def test_a_line_that_python_refuses_to_parse_is_damaged_too(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + damage + b"\n{}\n")
    with pytest.raises(RunFolderError, match="line 2 is damaged"):
        read_jsonl(tmp_path / "a.jsonl")


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), data=st.data())
def test_done_counts_whole_chunks_and_cuts_off_the_rest(sizes: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(0, sum(sizes)))
    torn = data.draw(st.sampled_from([b"", b"{", b'{"row": 7}', b"\x00\x00", "é".encode()[:1]]))
    with TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        path = folder.path / "rollouts.jsonl"
        append_jsonl(path, numbered(0, n))
        with path.open("ab") as file:
            file.write(torn)
        chunks = folder.done("rollouts.jsonl", sizes)
        assert sum(sizes[:chunks]) <= n
        assert chunks == len(sizes) or sum(sizes[: chunks + 1]) > n
        assert read_jsonl(path) == numbered(0, sum(sizes[:chunks]))
        assert folder.done("rollouts.jsonl", sizes) == chunks


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), data=st.data())
def test_a_run_killed_at_any_byte_and_resumed_ends_with_the_same_bytes(sizes: list[int], data: st.DataObject) -> None:
    def go_on(folder: RunFolder) -> bytes:
        path = folder.path / "a.jsonl"
        for chunk in range(folder.done("a.jsonl", sizes), len(sizes)):
            append_jsonl(path, numbered(sum(sizes[:chunk]), sizes[chunk]))
        return path.read_bytes()

    with TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        content = go_on(folder)
        (folder.path / "a.jsonl").write_bytes(content[: data.draw(st.integers(0, len(content)))])
        assert go_on(folder) == content
        assert read_jsonl(folder.path / "a.jsonl") == numbered(0, sum(sizes))


def test_nothing_is_done_before_the_file_exists(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).done("rollouts.jsonl", [3, 3]) == 0


def test_more_records_than_the_run_has_are_an_error_and_stay_on_disk(tmp_path: Path) -> None:
    append_jsonl(tmp_path / "a.jsonl", numbered(0, 8))
    with pytest.raises(RunFolderError, match="holds 8 records where the run has 7") as caught:
        RunFolder(tmp_path).done("a.jsonl", [3, 4])
    assert str(tmp_path / "a.jsonl") in str(caught.value)
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 8


ARGUMENTS: dict[str, Any] = {"trait": "evil", "samples": 10, "sampling": {"temperature": 1.0, "stop": (1, 2)}, "out": None}
MODEL = {"name": "pocket", "lineage": "ab12"}


def open_run(
    path: Path, command: str = "extract", arguments: dict[str, Any] | None = None, model: dict[str, Any] | None = None
) -> RunFolder:
    return RunFolder.open(
        path, command=command, arguments=ARGUMENTS if arguments is None else arguments, model=MODEL if model is None else model
    )


def test_the_same_command_reopens_its_folder_and_changes_nothing(run_folder: Path) -> None:
    first = open_run(run_folder)
    append_jsonl(run_folder / "rollouts.jsonl", numbered(0, 2))
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    assert open_run(run_folder) == first
    assert {p.name: p.read_bytes() for p in run_folder.iterdir()} == before
    manifest = first.manifest
    assert (manifest["command"], manifest["model"]) == ("extract", MODEL)
    assert manifest["arguments"] == json.loads(json.dumps(ARGUMENTS))
    assert manifest["versions"] == versions()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arguments": ARGUMENTS | {"samples": 11}}, ["arguments", "samples: 10 there, 11 now"]),
        ({"arguments": ARGUMENTS | {"seed": 3}}, ["arguments", "seed: absent there, 3 now"]),
        ({"arguments": {"trait": "evil", "sampling": ARGUMENTS["sampling"], "out": None}}, ["samples: 10 there, absent now"]),
        ({"arguments": ARGUMENTS | {"sampling": {"temperature": 0.5, "stop": (1, 2)}}}, ["sampling", "'temperature': 0.5"]),
        ({"model": MODEL | {"lineage": "cd34"}}, ["model", "lineage: 'ab12' there, 'cd34' now"]),
        ({"command": "sweep"}, ["command", "'extract' there, 'sweep' now"]),
    ],
    ids=["value", "new argument", "argument gone", "nested", "model", "command"],
)
def test_another_run_is_refused_and_the_difference_is_named(run_folder: Path, change: dict[str, Any], named: list[str]) -> None:
    open_run(run_folder)
    before = (run_folder / "run.json").read_bytes()
    with pytest.raises(RunFolderError) as caught:
        open_run(run_folder, **change)
    for part in [str(run_folder), *named]:
        assert part in str(caught.value)
    assert "trait" not in str(caught.value), "what agrees is not named"
    assert (run_folder / "run.json").read_bytes() == before


def test_an_argument_that_is_absent_on_one_side_and_none_on_the_other_is_named(run_folder: Path) -> None:
    open_run(run_folder)
    with pytest.raises(RunFolderError) as caught:
        open_run(run_folder, arguments={k: v for k, v in ARGUMENTS.items() if k != "out"})
    assert "out" in str(caught.value).removeprefix(str(run_folder))


def test_a_folder_with_foreign_files_is_refused_by_name(run_folder: Path) -> None:
    run_folder.mkdir()
    (run_folder / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="holds no run .thesis.tex.") as caught:
        open_run(run_folder)
    assert str(run_folder) in str(caught.value)
    assert [p.name for p in run_folder.iterdir()] == ["thesis.tex"]


def test_what_a_killed_write_left_is_swept_up_when_the_run_goes_on(run_folder: Path) -> None:
    open_run(run_folder)
    append_jsonl(run_folder / "rollouts.jsonl", numbered(0, 1))
    (run_folder / ".vectors.safetensors.x1y2.tmp").write_bytes(b"half")
    open_run(run_folder)
    assert sorted(p.name for p in run_folder.iterdir()) == ["rollouts.jsonl", "run.json"]


def test_an_empty_folder_and_one_with_the_rest_of_a_killed_start_are_taken(run_folder: Path) -> None:
    run_folder.mkdir()
    open_run(run_folder)
    (run_folder / "run.json").rename(run_folder / ".run.json.x1y2.tmp")
    assert open_run(run_folder).manifest["command"] == "extract"


def test_a_path_that_is_a_file_is_refused(run_folder: Path) -> None:
    run_folder.write_text("not a folder")
    with pytest.raises(RunFolderError, match="run"):
        open_run(run_folder)


@pytest.mark.parametrize("content", [b"", b'{"command": "ext', b"\xff\xff", b"[]", b"{}"])
def test_a_damaged_manifest_is_an_error_and_never_overwritten(run_folder: Path, content: bytes) -> None:
    open_run(run_folder)
    (run_folder / "run.json").write_bytes(content)
    with pytest.raises(RunFolderError) as caught:
        open_run(run_folder)
    assert str(run_folder) in str(caught.value)
    assert (run_folder / "run.json").read_bytes() == content


def test_the_log_keeps_every_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log("sampled")
    folder.log("judged")
    assert [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["sampled", "judged"]


def test_the_git_revision_is_marked_when_the_tree_has_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert git_revision(tmp_path) is None
    git("init")
    git("commit", "--allow-empty", "-m", "one")
    revision = git("rev-parse", "HEAD")
    assert git_revision(tmp_path) == revision
    (tmp_path / "new.py").touch()
    assert git_revision(tmp_path) == revision + "+"


def test_a_file_is_filled_chunk_by_chunk_and_goes_on(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", command="x", arguments={}, model={})
    made: list[range] = []
    told: list[int] = []

    def records(rows: range) -> list[dict[str, int]]:
        made.append(rows)
        return [{"i": i} for i in rows]

    folder.fill("a.jsonl", 10, records, chunk=4, told=told.append)
    assert made == [range(4), range(4, 8), range(8, 10)]
    assert told == [0, 4, 8, 10]
    lines = (folder.path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (folder.path / "a.jsonl").write_bytes(b"".join(lines[:5]) + b'{"i"')
    made.clear()
    folder.fill("a.jsonl", 10, records, chunk=4)
    assert made == [range(4, 8), range(8, 10)]
    assert [r["i"] for r in read_jsonl(folder.path / "a.jsonl")] == list(range(10))


def test_a_chunk_that_is_too_short_is_not_written(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", command="x", arguments={}, model={})
    with pytest.raises(RunFolderError, match="3 records were made for 4: there must be one each, in order"):
        folder.fill("a.jsonl", 10, lambda rows: [{"i": i} for i in rows[1:]], chunk=4)
    assert read_jsonl(folder.path / "a.jsonl") == []

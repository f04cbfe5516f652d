"""Files: atomic writes, append-only JSONL with repair of a torn last line, and run folders that can be resumed.

A run folder is reopened only by the same command on the same model. Work is cut into fixed chunks; a chunk is the unit of
resume, so an interrupted run ends with the bytes of an uninterrupted one (times are kept apart, in `log.txt`).
"""

import errno
import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from persona_lens.errors import RunFolderError

SCHEMA_VERSION: Final = 1
TEMPORARY: Final = ".tmp"
MANIFEST: Final = "run.json"
BLOCK: Final = 2**16  # bytes read at a time from the end of a file
_PACKAGES: Final = ("persona-lens", "torch", "transformers", "transformer-lens", "peft", "accelerate", "numpy", "scikit-learn")


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see the old file or the whole new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    os.close(handle)
    try:
        write(temporary)
        with Path(temporary).open("rb+") as file:
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except SafetensorError as error:
        Path(temporary).unlink(missing_ok=True)
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, str(error), str(path)) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as indented JSON, atomically.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path}: damaged, cannot be read as JSON ({error}); restore it or start in another folder") from error
    if not isinstance(record, dict):
        raise RunFolderError(f"{path}: damaged, a JSON object was expected and a {type(record).__name__} found")
    return record  # pyright: ignore[reportUnknownVariableType]


def read_jsonl(path: Path, *, repair: bool = False) -> list[dict[str, Any]]:
    """Every record of a JSONL file; an absent file is empty.

    Args:
        repair: cut a torn last line (no newline at its end) off the file, as an interrupted write leaves it.

    Raises:
        RunFolderError: a line is damaged (file and line number are named).
    """
    if not path.exists():
        return []
    if repair:
        cut_torn_line(path)
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        raise RunFolderError(f"{path}: the last line is torn: run the command that wrote it again to repair and resume")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{path}: line {number} is damaged ({error}); restore the file or start in another folder"
            ) from error
        if not isinstance(record, dict):
            raise RunFolderError(f"{path}: line {number} is damaged (a {type(record).__name__} instead of an object)")
        records.append(record)  # pyright: ignore[reportUnknownArgumentType]
    return records


def cut_torn_line(path: Path) -> None:
    """Cut off what follows the last newline of a file, as an interrupted write leaves it."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole > 0:
            begin = max(0, whole - BLOCK)
            file.seek(begin)
            found = file.read(whole - begin).rfind(b"\n")
            if found >= 0:
                whole = begin + found + 1
                break
            whole = begin
        if whole < end:
            file.truncate(whole)


def append_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append records and force them to disk."""
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    with path.open("ab") as file:
        file.write(lines.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def truncate_jsonl(path: Path, keep: int) -> None:
    """Keep the first `keep` lines."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        if len(lines) > keep:
            write_atomically(path, lambda temporary: Path(temporary).write_bytes(b"".join(lines[:keep])))


def digest(content: str | bytes) -> str:
    """A short hash, for what a run's arguments are too long to hold."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def git_revision(folder: Path | None = None) -> str | None:
    """The revision of the source tree the package runs from, with `+` when it has uncommitted changes; None outside git."""
    where = folder or Path(__file__).parent
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=where, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip() + ("+" if status.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class RunFolder:
    """A folder that one command fills, possibly in several sittings."""

    path: Path

    @classmethod
    def open(cls, path: Path, *, command: str, arguments: Mapping[str, Any], model: Mapping[str, Any]) -> "RunFolder":
        """Start a run, or go on with it.

        Raises:
            RunFolderError: the folder holds a run of another command, other arguments or another model (the difference is named),
                or files that are no run at all.
        """
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file: a run needs a folder, choose another path")
        manifest = path / MANIFEST
        identity: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "command": command,
            "arguments": dict(arguments),
            "model": dict(model),
        }
        if manifest.exists():
            _check_same(manifest, read_json(manifest), identity)
            for leftover in path.glob(f".*{TEMPORARY}"):  # of a write that was killed
                leftover.unlink(missing_ok=True)  # another process may have been first
            return cls(path)
        leftovers = [p.name for p in path.iterdir() if not p.name.endswith(TEMPORARY)] if path.is_dir() else []
        if leftovers:
            raise RunFolderError(f"{path} is not empty and holds no run ({leftovers[0]}): choose an empty or new folder")
        path.mkdir(parents=True, exist_ok=True)
        write_json(manifest, identity | {"versions": versions(), "git_revision": git_revision()})
        return cls(path)

    @property
    def manifest(self) -> dict[str, Any]:
        """What `run.json` says."""
        return read_manifest(self.path)

    def log(self, message: str) -> None:
        """Append a line with the time to `log.txt`."""
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}\n")

    def done(self, file: str, chunk_sizes: Sequence[int]) -> int:
        """How many whole chunks a JSONL file holds; a torn line and a partial chunk are cut off.

        Args:
            chunk_sizes: records in each chunk.

        Raises:
            RunFolderError: a damaged line, or more records than the chunks hold.
        """
        path = self.path / file
        n = len(read_jsonl(path, repair=True))
        chunks = whole = 0
        for size in chunk_sizes:
            if whole + size > n:
                break
            whole += size
            chunks += 1
        if n > sum(chunk_sizes):
            raise RunFolderError(
                f"{path}: holds {n} records where the run has {sum(chunk_sizes)}: the file was changed from outside"
            )
        truncate_jsonl(path, whole)
        return chunks

    def fill(
        self,
        file: str,
        n: int,
        records: Callable[[range], Sequence[Mapping[str, Any]]],
        *,
        chunk: int,
        told: Callable[[int], object] = int,
    ) -> None:
        """Fill a JSONL file up to `n` records, chunk by chunk, going on where it stopped.

        Args:
            records: makes the records of a chunk.
            told: called with how many there are, at the start and after every chunk; default: nobody is.

        Raises:
            RunFolderError: another number of records was made than asked for.
        """
        chunks = [range(i, min(i + chunk, n)) for i in range(0, n, chunk)]
        done = self.done(file, [len(c) for c in chunks])
        told(chunks[done].start if done < len(chunks) else n)
        for rows in chunks[done:]:
            made = records(rows)
            if len(made) != len(rows):
                raise RunFolderError(
                    f"{self.path / file}: {len(made)} records were made for {len(rows)}: there must be one each, in order"
                )
            append_jsonl(self.path / file, made)
            told(rows.stop)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `run.json` in a run folder says.

    Raises:
        RunFolderError: no such folder, no run in it, or a damaged file.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise RunFolderError(f"{folder}: {what}: give the run folder that a command wrote")
    if not (folder / MANIFEST).exists():
        if inside := sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}")):
            raise RunFolderError(f"{folder} holds the runs {', '.join(inside[:8])}: give one of them, such as {folder / inside[0]}")
        raise RunFolderError(f"{folder} holds no run ({MANIFEST} is missing): give the folder that a command wrote by --out")
    return read_json(folder / MANIFEST)


def require_finished(folder: Path, command: str, result: str) -> None:
    """Raise unless the folder holds a finished run of a command.

    Args:
        result: the file that the command writes last.

    Raises:
        RunFolderError: a run of another command, or one that is not finished.
    """
    found = read_manifest(folder).get("command")
    if found != command:
        raise RunFolderError(f"{folder} holds a run of {found!r}, not of {command!r}")
    if not (folder / result).exists():
        raise RunFolderError(f"{folder} is not finished: run the same {command} command again, it goes on where it stopped")


def _check_same(manifest: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, value in json.loads(json.dumps(dict(now))).items():
        old = before.get(key)
        if old == value:
            continue
        if isinstance(old, dict) and isinstance(value, dict):
            names = [k for k in {**old, **value} if k not in old or k not in value or old[k] != value[k]]
            difference = "; ".join(f"{k}: {_shown(old, k)} there, {_shown(value, k)} now" for k in names)
        else:
            difference = f"{old!r} there, {value!r} now"
        raise RunFolderError(f"{manifest.parent} holds a run with different {key} ({difference}): choose another folder")


def _shown(record: Mapping[str, Any], key: str) -> str:
    return repr(record[key]) if key in record else "absent"

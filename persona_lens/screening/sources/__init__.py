"""Training data of any size, read in shards and never changed.

A shard is a fixed number of consecutive rows: the unit of work, of resume, and of what is sent to other processes. It says where
its rows are, not what they hold (rows that were in memory travel in it), so memory holds one shard at a time. Every row of a shard
is read as a conversation, or skipped with the reason. What a file is, its ending says; records are told apart one by one:
conversations as `transcripts` reads them, or the fields of a prompt and of its answer.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from persona_lens.errors import ScreeningError
from persona_lens.screening.sources.base import ENDINGS, EXPECTED, Data, File, Shard, Source, told
from persona_lens.screening.sources.memory import from_memory
from persona_lens.screening.sources.tables import from_folder, from_hub, from_parquet
from persona_lens.screening.sources.text import from_csv, from_document, from_json_lines
from persona_lens.transcripts import Skipped, Transcript

__all__ = ["Data", "Shard", "Source", "open_data", "read_places"]

_PACKED: Final = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar")
_SOME: Final = 64  # rows of the shards that single rows are looked up in


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
        return from_memory(data, name or "rows", split)
    path = Path(data)
    with told(path):
        exists, folder, file = path.exists(), path.is_dir(), path.is_file()
    if not exists:
        if isinstance(data, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", data) or path.suffix.lower() in (*ENDINGS, *_PACKED):
            raise ScreeningError(f"{path}: no such file or folder; expected {EXPECTED}, or a dataset's name (owner/name)")
        return from_hub(data, name or data, split)
    path = path.absolute()
    if folder:
        return from_folder(path, name or path.resolve().name, split)
    if not file:
        raise ScreeningError(f"{path}: neither a file nor a folder; expected {EXPECTED}")
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


def _file(path: Path, name: str) -> Source:
    ending = path.suffix.lower()
    if ending in _PACKED:
        raise ScreeningError(f"{path}: packed files are not read: unpack it first")
    if ending not in ENDINGS:
        raise ScreeningError(f"{path}: unknown ending {ending!r}; expected {EXPECTED}")
    with told(path):
        file = File(path, path.stat().st_size)
    if not file.size:
        raise ScreeningError(f"{path}: the file is empty")
    if ending == ".parquet":
        return from_parquet(path, name, [path])
    if ending in (".csv", ".tsv"):
        return from_csv(file, name, "," if ending == ".csv" else "\t")
    return (from_document(file, name) if ending == ".json" else None) or from_json_lines(file, name)

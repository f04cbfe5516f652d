"""Files of a shard: scores as Parquet, one line per row of the data, and sums of residuals as safetensors."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.torch import save

from persona_lens.errors import RunFolderError, ScreeningError
from persona_lens.screening.own import Tokens
from persona_lens.screening.scoring import Scored

HEADER: Final = b"persona_lens"  # key of the provenance in a file's schema


@dataclass(frozen=True)
class Files:
    """A shard's files as bytes."""

    table: bytes
    sums: bytes


def require_parquet() -> None:
    """Raise unless Parquet can be written.

    Raises:
        ScreeningError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ScreeningError("screening writes Parquet and needs pyarrow: pip install 'persona-lens[screen]'") from error


def files_of(scored: Scored, header: str) -> Files:
    """Encode a shard's scores; `header` (JSON) says where they come from."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, Any] = {
        "place": pa.int64(),
        "name": pa.string(),
        "reason": pa.string(),
        "prompt": pa.int64(),
        "tokens": pa.int32(),
        "own_tokens": pa.list_(pa.int32()),
    }
    arrays: dict[str, Any] = {}
    for name, values in scored.columns.items():
        if isinstance(values, np.ndarray):
            arrays[name] = pa.array(values, type=pa.float32(), mask=np.isnan(values))
        else:
            arrays[name] = pa.array(values, type=kinds.get(name, pa.string()))
    file = io.BytesIO()
    pq.write_table(pa.table(arrays).replace_schema_metadata({HEADER: header.encode()}), file, compression="zstd")
    return Files(file.getvalue(), save({name: tensor.contiguous() for name, tensor in scored.sums.items()}))


def read_columns(path: Path, columns: list[str]) -> Mapping[str, Any]:
    """Columns of a shard's file: numbers as arrays (NaN where there is none), all else as lists.

    Raises:
        RunFolderError: the file is missing or damaged, or has no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read(columns=columns)
        missing = set(columns) - set(table.column_names)
        if missing:
            raise RunFolderError(f"{path}: no column {sorted(missing)[0]!r}; it has {', '.join(pq.read_schema(path).names)}")
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(f"{path}: missing or damaged ({error}); run the command that wrote it again") from error
    floating = {f.name for f in table.schema if pa.types.is_floating(f.type)}
    return {
        name: table[name].to_numpy(zero_copy_only=False).astype(np.float32) if name in floating else table[name].to_pylist()
        for name in columns
    }


def answers_of(path: Path) -> dict[int, Tokens]:
    """The own answers that a shard's file holds, by the prompt's hash."""
    found = read_columns(path, ["prompt", "own_tokens"])
    pairs = zip(found["prompt"], found["own_tokens"], strict=True)
    return {prompt: tuple(tokens) for prompt, tokens in pairs if tokens is not None}

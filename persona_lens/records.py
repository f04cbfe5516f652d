"""Dataclasses of arrays and plain values as JSON and back; what is not a number becomes null."""

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np

from persona_lens.errors import RunFolderError

Record = TypeVar("Record")


def encoded(value: Any) -> Any:
    """A record of dataclasses, arrays and plain values as JSON; NaN becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encoded(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, np.ndarray):
        return encoded(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): encoded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def decoded(kind: type[Record], record: Any) -> Record:
    """The dataclass that `encoded` made a record of; null becomes NaN in arrays and numbers.

    Raises:
        RunFolderError: a field is missing.
    """
    hints = typing.get_type_hints(kind)
    try:
        return kind(**{f.name: _value(hints[f.name], record[f.name]) for f in fields(kind)})  # pyright: ignore[reportArgumentType]
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"the record of {kind.__name__} is damaged or of another version ({error!r})") from error


def _value(hint: Any, record: Any) -> Any:
    options = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return None if record is None else _value(next(o for o in options if o is not type(None)), record)
    if hasattr(hint, "array_type"):
        return np.array(record, dtype=bool if any("bool" in str(d) for d in hint.dtypes) else np.float64)
    if is_dataclass(hint):
        return decoded(typing.cast(type, hint), record)
    if typing.get_origin(hint) is tuple:
        kinds = options[:1] * len(record) if options[1:] == (...,) else options
        return tuple(_value(k, r) for k, r in zip(kinds, record, strict=True))
    if isinstance(origin := typing.get_origin(hint), type) and issubclass(origin, Mapping):
        return {k: _value(options[1], v) for k, v in record.items()}
    return float("nan") if hint is float and record is None else record

"""GGUF control vectors, as llama.cpp (`--control-vector`) and repeng use them: both directions, and repeng's objects.

A file of architecture `controlvector` has one fp32 tensor `direction.{l}` per layer. Index l is block l counted from 0, our layer
l, and the direction is added to that block's output. llama.cpp's loader (`common_control_vector_load_one`, common/common.cpp)
writes `direction.l` at offset n_embd (l - 1) of its buffer, `llama_adapter_cvec::apply` (src/llama-adapter.cpp) fills layer il from
offset n_embd (il - 1), and `build_cvec` adds that at the end of graph layer il: il = l. The loader refuses index 0, so block 0
cannot be steered. repeng agrees: it calls `direction.l` what it read at `hidden_states[l + 1]`, and adds it to block l.
llama.cpp reads no metadata; repeng reads `controlvector.model_hint`.
"""

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import ExchangeError
from persona_lens.exchange.imported import MAX_LAYERS, NOT_HELD, UNKNOWN, Imported, Origin, imported, listed, stacked, zero_layers
from persona_lens.exchange.untrusted import require_size
from persona_lens.store import write_atomically
from persona_lens.vectors import PersonaVectors, hook_name

if TYPE_CHECKING:
    from persona_lens.models import ChatModel

ARCHITECTURE: Final = "controlvector"
HINT: Final = f"{ARCHITECTURE}.model_hint"
OURS: Final = {"pooling": "persona_lens.pooling", "estimator": "persona_lens.estimator", "lineage": "persona_lens.lineage"}
TRAIT: Final = "general.name"
MAX_HEADER: Final = 1 << 20  # bytes
MAX_FIELDS: Final = 4096
_TENSOR: Final = re.compile(r"direction\.([0-9]{1,9})")
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a scalar, by GGUF value type
_STRING, _ARRAY, _F32 = 8, 9, 0
_POST_NORM: Final = "if repeng made it, it read the model's last layer after the final norm: do not trust that layer"


def read_gguf(path: str | Path, *, trait: str | None = None, model: "ChatModel | None" = None, lineage: str = "") -> Imported:
    """Vectors from a control vector file.

    Args:
        trait: default: the file's `general.name`, or its own name.
        model: the model they are for; its shape is checked and its lineage taken over.

    Raises:
        ExchangeError: the package `gguf` is missing; no control vector, damaged, with other tensors, or not of the model's shape.
        LineageError: the file is ours and of another lineage.
    """
    path = Path(path)
    _require_sound(path)
    reader, texts = _opened(path)
    if texts["general.architecture"] != ARCHITECTURE:
        raise ExchangeError(f"{path}: is of architecture {texts['general.architecture']!r}, expected {ARCHITECTURE!r}")
    origin = Origin(model, lineage, trait)
    directions, notes = stacked(_directions(path, reader), origin, str(path))
    hint = texts[HINT]
    return imported(
        directions,
        origin,
        what=str(path),
        file_format="gguf",
        trait=texts[TRAIT] or path.stem,
        pooling=texts[OURS["pooling"]] or UNKNOWN,
        estimator=texts[OURS["estimator"]] or UNKNOWN,
        said={"lineage": texts[OURS["lineage"]], "name": hint},
        notes=(NOT_HELD, *notes, *_scale(directions), f"the file says it is for {hint!r}", _POST_NORM),
    )


def write_gguf(vectors: PersonaVectors, path: str | Path, *, model_hint: str = "") -> tuple[str, ...]:
    """Write a control vector file for llama.cpp and repeng.

    Args:
        model_hint: what the file says about its model (repeng compares it with `config.model_type`, llama.cpp ignores it);
            default: the model's name from the vectors' provenance.

    Returns:
        Notes on what the format cannot hold.

    Raises:
        ExchangeError: the package `gguf` is missing, or there is no layer besides block 0.
    """
    gguf = _package()
    if vectors.n_layers < 2:
        raise ExchangeError(f"the {vectors.trait} vector has one layer, block 0, which the format has no place for")
    said = {
        TRAIT: vectors.trait,
        HINT: model_hint or str(vectors.provenance.get("model", {}).get("name", UNKNOWN)),
        OURS["pooling"]: vectors.pooling,
        OURS["estimator"]: vectors.estimator,
        OURS["lineage"]: vectors.lineage,
    }
    directions = control_directions(vectors)

    def write(temporary: str) -> None:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        for key, text in said.items():
            if text:
                writer.add_string(key, text)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", direction)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(Path(path), write)
    absent = [layer for layer in zero_layers(vectors) if layer]
    return (
        f"{hook_name(0)} has no tensor: llama.cpp cannot steer block 0",
        NOT_HELD,
        *([f"tensors of zeros stand for {listed(absent)}"] if absent else ()),
        "llama.cpp adds the directions of all layers at once: choose layers with --control-vector-layer-range and a strength with "
        "--control-vector-scaled",
    )


def control_directions(vectors: PersonaVectors) -> dict[int, Float[np.ndarray, " d_model"]]:
    """Directions by block, without block 0: `repeng.ControlVector(model_type, control_directions(vectors))`."""
    return {layer: vectors[layer].float().cpu().contiguous().numpy() for layer in range(1, vectors.n_layers)}


def from_control_vector(control: Any, trait: str, *, model: "ChatModel | None" = None, lineage: str = "") -> Imported:
    """Vectors from repeng's `ControlVector`, of which only `model_type` and `directions` are read.

    Raises:
        ExchangeError: it is no such object, or not of the model's shape.
        LineageError: model and lineage contradict each other.
    """
    held = getattr(control, "directions", None)
    if not isinstance(held, dict):
        raise ExchangeError(f"a {type(control).__name__} has no directions by layer: expected repeng's ControlVector")
    what = "repeng's control vector"
    origin = Origin(model, lineage, trait)
    directions, notes = stacked({k: _from_array(v, f"{what}: layer {k!r}") for k, v in held.items()}, origin, what)
    kind = str(getattr(control, "model_type", UNKNOWN))
    told = (NOT_HELD, *notes, *_scale(directions), f"it is for models of type {kind[:80]!r}", _POST_NORM)
    return imported(directions, origin, what=what, file_format="repeng", trait=trait, notes=told)


def _from_array(value: Any, what: str) -> Tensor:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise ExchangeError(f"{what} is no array of floating-point numbers")
    return torch.from_numpy(value.astype(np.float32))


def _scale(directions: Float[Tensor, "layer d_model"]) -> tuple[str, ...]:
    norms = directions.norm(dim=-1)
    if bool(((norms - 1).abs() < 1e-3)[norms > 0].all()):
        return ("its directions have norm 1, as repeng's do: a strength counts residual-stream units, not mean differences",)
    return ()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ExchangeError("GGUF files need the package gguf: pip install 'persona-lens[gguf]'") from error
    return gguf


def _opened(path: Path) -> tuple[Any, dict[str, str]]:
    """The package's reader, and the texts of the metadata, cut to a length that can be shown."""
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        return reader, {key: _text(reader, key)[:80] for key in ("general.architecture", TRAIT, HINT, *OURS.values())}
    except Exception as error:  # a damaged file can make the package raise anything
        raise ExchangeError(f"{path}: is damaged, cannot be read as GGUF ({error})") from error


def _text(reader: Any, key: str) -> str:
    """A text of the metadata; empty where there is none."""
    found = reader.get_field(key)
    content = found.contents() if found is not None else ""
    return content if isinstance(content, str) else ""


def _directions(path: Path, reader: Any) -> dict[int, Tensor]:
    """The tensors by layer, as llama.cpp wants them: fp32, one axis, no other tensors.

    Raises:
        ExchangeError: there are others.
    """
    found: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        named = _TENSOR.fullmatch(tensor.name)
        if named is None:
            raise ExchangeError(f"{path}: tensor {tensor.name[:80]!r} is none of a control vector's, which are called direction.12")
        layer = int(named[1])
        if tensor.tensor_type != _F32 or tensor.data.ndim != 1:
            raise ExchangeError(f"{path}: {tensor.name} is no fp32 vector, llama.cpp refuses it too")
        if layer in found:
            raise ExchangeError(f"{path}: has two tensors for layer {layer}")
        found[layer] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    return found


def _require_sound(path: Path) -> None:
    """Walk the header within the bytes that are there, before the package's reader trusts its counts.

    Raises:
        ExchangeError: no GGUF file, or counts and sizes that the file cannot hold or a control vector does not have.
    """
    size = require_size(path)
    with path.open("rb") as file:
        head = file.read(MAX_HEADER)
    try:
        _walk(head, size)
    except (struct.error, OverflowError) as error:
        raise ExchangeError(
            f"{path}: is damaged or no control vector: its header goes beyond the file or {MAX_HEADER} bytes"
        ) from error
    except ValueError as error:
        raise ExchangeError(f"{path}: is damaged or no control vector: {error}") from error


def _walk(head: bytes, size: int) -> None:
    magic, version, tensors, fields = struct.unpack_from("<4sIQQ", head)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r} and version {version}, expected b'GGUF' and 2 or 3 (little-endian)")
    if tensors > MAX_LAYERS or fields > MAX_FIELDS:
        raise ValueError(f"it claims {tensors} tensors and {fields} fields, at most {MAX_LAYERS} and {MAX_FIELDS} make sense")
    at = 24
    for _ in range(fields):
        at = _after_text(head, at)
        (kind,) = struct.unpack_from("<I", head, at)
        at = _after_value(head, at + 4, kind)
    for _ in range(tensors):
        at = _after_text(head, at)
        (axes,) = struct.unpack_from("<I", head, at)
        if axes != 1:
            raise ValueError(f"a tensor has {axes} axes, expected 1")
        length, _, offset = struct.unpack_from("<QIQ", head, at + 4)
        if 4 * length > size or offset > size:
            raise ValueError(f"a tensor claims {length} numbers at offset {offset}, the file has {size} bytes")
        at += 24
    struct.unpack_from(f"<{at}x", head)


def _after_text(head: bytes, at: int) -> int:
    (length,) = struct.unpack_from("<Q", head, at)
    if length > len(head):
        raise ValueError(f"a text claims {length} bytes")
    return at + 8 + length


def _after_value(head: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return _after_text(head, at)
    if kind != _ARRAY:
        if kind not in _SIZES:
            raise ValueError(f"a field has the unknown type {kind}")
        return at + _SIZES[kind]
    item, count = struct.unpack_from("<IQ", head, at)
    if count > MAX_FIELDS or item == _ARRAY:
        raise ValueError(f"a field is an array of {count} items of type {item}, no control vector has one")
    at += 12
    for _ in range(count):
        at = _after_value(head, at, item)
    return at

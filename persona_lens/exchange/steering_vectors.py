"""The package steering-vectors: `SteeringVector(layer_activations, layer_type="decoder_block")`, and its fields in a `.pt` file.

Keys of `layer_activations` are blocks counted from 0, and the activation is added to what the block returns: our layer l. Other
layer types name places inside a block (attention, MLP, norms), which are not the residual stream: they are refused.
The package has no file format; a `.pt` of its two fields is read with nothing but tensors in it, and given back to it by
`SteeringVector(**torch.load(path, weights_only=True))`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from persona_lens.errors import ExchangeError
from persona_lens.exchange.imported import NOT_HELD, Imported, Origin, imported, listed, stacked, zero_layers
from persona_lens.exchange.untrusted import as_tensor, load_pt
from persona_lens.store import write_atomically
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    from persona_lens.models import ChatModel

BLOCK: Final = "decoder_block"
FIELDS: Final = ("layer_activations", "layer_type")


def from_steering_vector(vector: Any, trait: str, *, model: "ChatModel | None" = None, lineage: str = "") -> Imported:
    """Vectors from a `SteeringVector`, of which only its two fields are read; the package need not be installed.

    Raises:
        ExchangeError: no such object, of another layer type, or not of the model's shape.
        LineageError: model and lineage contradict each other.
    """
    held = getattr(vector, "layer_activations", None)
    if not isinstance(held, Mapping):
        raise ExchangeError(f"a {type(vector).__name__} has no layer_activations: expected a SteeringVector of steering-vectors")
    _require_block(getattr(vector, "layer_type", BLOCK), "the steering vector")
    rows: dict[Any, Tensor] = {}
    for layer, row in held.items():
        if not isinstance(row, Tensor) or not row.is_floating_point():
            raise ExchangeError(f"the steering vector's layer {layer!r} is no tensor of floating-point numbers")
        rows[layer] = row
    return _imported(rows, "a SteeringVector", Origin(model, lineage, trait), trait)


def to_steering_vector(vectors: PersonaVectors) -> Any:
    """A `SteeringVector` of every layer that has a direction. Trait, lineage and what was measured are lost.

    Its `multiplier` counts like our strength, and by default it acts on every token, like our where="everywhere".

    Raises:
        ExchangeError: the package is not installed, or there is no direction at all.
    """
    try:
        from steering_vectors import SteeringVector  # pyright: ignore
    except ImportError as error:
        raise ExchangeError("this needs the package steering-vectors: pip install steering-vectors") from error
    return SteeringVector(**_fields(vectors))


def read_steering_vector(
    path: str | Path,
    *,
    trait: str | None = None,
    model: "ChatModel | None" = None,
    lineage: str = "",
    layer_type: str = BLOCK,
) -> Imported:
    """Vectors from a `.pt` file of the two fields, or of `layer_activations` alone.

    Args:
        trait: default: the file's name.
        layer_type: of a file that does not say it.

    Raises:
        ExchangeError: no such file, anything else inside, of another layer type, or not of the model's shape.
    """
    path = Path(path)
    held = load_pt(path)
    fields: Any = held if isinstance(held, dict) else {}
    if "layer_activations" in fields:
        layer_type, fields = fields.get("layer_type", layer_type), fields["layer_activations"]
    if not isinstance(fields, dict) or not fields:
        raise ExchangeError(f"{path}: holds a {type(held).__name__}, expected the fields {' and '.join(FIELDS)}")
    _require_block(layer_type, str(path))
    rows = {layer: as_tensor(row, path, f"layer {layer!r}", 1) for layer, row in fields.items()}
    return _imported(rows, str(path), Origin(model, lineage, trait), path.stem)


def write_steering_vector(vectors: PersonaVectors, path: str | Path) -> tuple[str, ...]:
    """Write the two fields as a `.pt` file.

    Returns:
        Notes on what the format cannot hold.

    Raises:
        ExchangeError: there is no direction at any layer.
    """
    fields = _fields(vectors)
    write_atomically(Path(path), lambda temporary: torch.save(fields, temporary))
    absent = zero_layers(vectors)
    return (
        NOT_HELD,
        "trait, pooling, estimator and lineage are lost",
        *([f"{listed(absent)} without a direction are left out"] if absent else ()),
        "steering-vectors adds the directions of all layers at once: write a vector of the layer that should act",
    )


def _fields(vectors: PersonaVectors) -> dict[str, Any]:
    absent = set(zero_layers(vectors))
    kept = {layer: vectors[layer].float().cpu().clone() for layer in range(vectors.n_layers) if layer not in absent}
    if not kept:
        raise ExchangeError(f"the {vectors.trait} vector has no direction at any layer")
    return {"layer_activations": kept, "layer_type": BLOCK}


def _require_block(layer_type: Any, what: str) -> None:
    if layer_type != BLOCK:
        raise ExchangeError(
            f"{what} is of layer type {str(layer_type)[:40]!r}, inside a block: only {BLOCK!r} is the residual stream after a block"
        )


def _imported(rows: Mapping[Any, Tensor], what: str, origin: Origin, trait: str) -> Imported:
    directions, notes = stacked(rows, origin, what)
    return imported(directions, origin, what=what, file_format="steering_vectors", trait=trait, notes=(NOT_HELD, *notes))

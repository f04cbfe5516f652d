"""What every reader returns: persona vectors, what the file held besides, and notes on what is lost or unknown.

Layers that a format lacks, or that cannot be trusted, are zero in the vectors: nothing steers with, projects on or screens for a
zero direction, so none of them is used by accident. What a format does not hold is NaN or empty, never guessed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import ExchangeError, LineageError
from persona_lens.vectors import PersonaVectors, hook_name

if TYPE_CHECKING:
    from persona_lens.models import ChatModel

MAX_LAYERS: Final = 1024  # far more blocks than any model has
UNKNOWN: Final = "unknown"
NOT_HELD: Final = "the format holds no question differences, reliability, norms or p values: they are lost"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, eq=False)
class Imported:
    """Vectors from a file of another program.

    Attributes:
        notes: what the file does not hold, or holds in a way that needs care; also in the vectors' provenance.
        embedding: the paper's row 0, the mean difference of the embeddings; None in other formats.
        post_norm_layer: the layer that was read after the final norm, and is zero in `vectors` for it; None in other formats.
        post_norm: that layer's row as the file has it. It lies in another space than the residual stream.
    """

    vectors: PersonaVectors
    notes: tuple[str, ...] = ()
    embedding: Float[Tensor, " d_model"] | None = None
    post_norm_layer: int | None = None
    post_norm: Float[Tensor, " d_model"] | None = None


@dataclass(frozen=True, eq=False)
class Origin:
    """What the user says about where a file comes from; files of most formats do not name their model.

    Attributes:
        model: the model that the vectors are for: its lineage is taken over, and layers and width are checked.
        lineage: the same without a model at hand.
        trait: the trait's name; default: what the file or its name says.
    """

    model: "ChatModel | None" = None
    lineage: str = ""
    trait: str | None = None

    @property
    def known_lineage(self) -> str:
        """The lineage, from the model or as given.

        Raises:
            LineageError: both are given, and differ.
        """
        if self.model is None:
            return self.lineage
        own = self.model.fingerprint.lineage
        if self.lineage and self.lineage != own:
            raise LineageError(
                f"lineage {self.lineage} was given with {self.model.name}, which is of lineage {own}: give one of them"
            )
        return own

    def identity(self, said: Mapping[str, str] | None = None) -> dict[str, str]:
        """Name and lineage of the model for the provenance; empty where nobody knows.

        Args:
            said: what the file itself says, as `lineage` and `name`.

        Raises:
            LineageError: the file is of another lineage than the user says.
        """
        claimed, known = (said or {}).get("lineage", ""), self.known_lineage
        if claimed and known and claimed != known:
            raise LineageError(f"the file is of lineage {claimed}, not {known}: these vectors do not fit this model")
        name = self.model.name if self.model else (said or {}).get("name", "")
        return {"name": name or UNKNOWN, "lineage": known or claimed} if known or claimed else {}

    def require_shape(self, shape: Sequence[int], what: str) -> None:
        """Raise unless [layer, d_model] is the model's.

        Raises:
            ExchangeError: another number of layers, or another width.
        """
        if self.model is None:
            return
        expected = (self.model.n_layers, self.model.d_model)
        if tuple(shape) != expected:
            raise ExchangeError(
                f"{what} holds {shape[0]} layers of {shape[1]} dimensions, {self.model.name} has {expected[0]} of {expected[1]}: "
                "it was made on another model"
            )


def require_name(name: str, what: str) -> str:
    """A trait's name that is safe as a part of file names.

    Raises:
        ExchangeError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise ExchangeError(
            f"{what}: {name[:80]!r} cannot be a trait's name (letters, digits, '_', '-' and '.', at most 64): give one with trait="
        )
    return name


def imported(
    directions: Float[Tensor, "layer d_model"],
    origin: Origin,
    *,
    what: str,
    file_format: str,
    trait: str,
    pooling: str = UNKNOWN,
    estimator: str = UNKNOWN,
    said: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    embedding: Float[Tensor, " d_model"] | None = None,
    post_norm_layer: int | None = None,
    post_norm: Float[Tensor, " d_model"] | None = None,
) -> Imported:
    """Vectors with everything unknown left open, checked against the model if one is given.

    Args:
        what: the file or object, for messages and provenance.
        trait: its name if the user gives none.
        said: lineage and model's name, if the file says them.
    """
    name = require_name(origin.trait if origin.trait is not None else trait, what)
    origin.require_shape(directions.shape, what)
    if not bool(directions.isfinite().all()):
        layer = int((~directions.isfinite().all(-1)).nonzero()[0])
        raise ExchangeError(f"{what}: the direction at {hook_name(layer)} is not finite")
    model = origin.identity(said)
    told = list(notes)
    if not model:
        told.append("the lineage is unknown: give the model or the lineage, or nothing keeps these vectors from a wrong model")
    elif not (said or {}).get("lineage"):
        told.append("the lineage is as it was given to the reader: the file does not name its model")
    provenance: dict[str, Any] = {"source": {"format": file_format, "file": Path(what).name}, "notes": told}
    layers, d_model = directions.shape
    unmeasured = torch.full((layers,), torch.nan)
    vectors = PersonaVectors(
        name,
        pooling,
        estimator,
        directions,
        torch.zeros(0, layers, d_model),
        unmeasured,
        unmeasured.clone(),
        unmeasured.clone(),
        provenance=provenance | ({"model": model} if model else {}),
    )
    return Imported(vectors, tuple(told), embedding, post_norm_layer, post_norm)


def stacked(rows: Mapping[Any, Tensor], origin: Origin, what: str) -> tuple[Float[Tensor, "layer d_model"], tuple[str, ...]]:
    """Directions by layer as one matrix, zero where there is none, and a note on those.

    Raises:
        ExchangeError: none, layers that cannot be, or directions of different or wrong widths.
    """
    if not rows:
        raise ExchangeError(f"{what}: holds no direction")
    if wrong := [layer for layer in rows if type(layer) is not int or not 0 <= layer < MAX_LAYERS]:
        raise ExchangeError(f"{what}: layer {wrong[0]!r} cannot be: layers are whole numbers from 0, and below {MAX_LAYERS}")
    shapes = {layer: tuple(row.shape) for layer, row in sorted(rows.items())}
    width = next(iter(shapes.values()))
    for layer, shape in shapes.items():
        if len(shape) != 1 or not shape[0] or shape != width:
            raise ExchangeError(
                f"{what}: the direction of layer {layer} has shape {shape}, expected one of {width[:1]} like the others"
            )
    last = max(rows)
    n_layers = origin.model.n_layers if origin.model else last + 1
    notes: list[str] = []
    if origin.model is None:
        notes.append(f"the number of layers is not in the file: taken as {n_layers}, one more than the last that it has")
    elif last >= n_layers:
        raise ExchangeError(f"{what}: has a direction for layer {last}, {origin.model.name} has layers 0 to {n_layers - 1}")
    directions = torch.zeros(n_layers, *width)
    for layer, row in rows.items():
        directions[layer] = row.detach().float().cpu()
    if absent := [layer for layer in range(n_layers) if layer not in rows]:
        notes.append(f"no direction for {listed(absent)}: zero here, and nothing will use a zero direction")
    return directions, tuple(notes)


def listed(layers: Sequence[int]) -> str:
    """Layers as hook names, shortened where they are many."""
    names = [hook_name(layer) for layer in layers]
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])


def zero_layers(vectors: PersonaVectors) -> list[int]:
    """Layers without a direction."""
    return (~vectors.directions.any(-1)).nonzero().squeeze(-1).tolist()

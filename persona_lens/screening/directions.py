"""What data is screened for: persona vectors at layers, as unit directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import ScreeningError
from persona_lens.models import ChatModel
from persona_lens.store import digest
from persona_lens.vectors import PersonaVectors

Layers = int | Literal["all"] | Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Direction:
    """A trait's vector at a layer, of norm 1.

    Attributes:
        unit: the direction.
    """

    trait: str
    layer: int
    unit: Float[Tensor, " d_model"]

    @property
    def name(self) -> str:
        """Trait and layer."""
        return f"{self.trait}/{self.layer}"

    @property
    def identity(self) -> str:
        """Name and digest of the direction."""
        return f"{self.name} [{digest(self.unit.contiguous().numpy().tobytes())}]"


def directions_of(model: ChatModel, vectors: Sequence[PersonaVectors], layers: Layers | None) -> tuple[Direction, ...]:
    """Directions to screen for, in the order of the vectors.

    Args:
        layers: one for all traits, one by trait, or "all"; default: where each vector is most reliable (chosen on its extraction,
            not on this data).

    Raises:
        ScreeningError: no vectors, a trait twice, a trait or layer that is not there, or a vector of length 0.
        LineageError: vectors of another lineage.
    """
    traits = [v.trait for v in vectors]
    if not vectors or len(set(traits)) < len(traits):
        raise ScreeningError(f"screening needs one or more vectors of different traits, not {traits}")
    if isinstance(layers, Mapping) and set(layers) != set(traits):
        raise ScreeningError(f"layers are given for {sorted(layers)}, vectors for {sorted(traits)}: give one for each")
    found: list[Direction] = []
    for v in vectors:
        v.require_lineage(model.fingerprint.lineage)
        for layer in _layers(v, layers):
            if not 0 <= layer < min(v.n_layers, model.n_layers):
                raise ScreeningError(f"layer {layer} does not exist: {model.name} has layers 0 to {model.n_layers - 1}")
            if not v[layer].any():
                raise ScreeningError(f"the {v.trait} vector has length 0 at layer {layer}: choose another layer")
            found.append(Direction(v.trait, layer, v.unit(layer).float().cpu()))
    return tuple(found)


def _layers(v: PersonaVectors, layers: Layers | None) -> Sequence[int]:
    if layers == "all":
        return range(v.n_layers)
    if layers is None:
        return [v.best_layer]
    return [layers[v.trait] if isinstance(layers, Mapping) else int(layers)]

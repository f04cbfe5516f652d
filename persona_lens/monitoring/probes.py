"""What a monitor reads: a direction at a layer. A projection is <h, v> / ||v||, in residual-stream units."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import LineageError, MonitoringError
from persona_lens.models import ChatModel
from persona_lens.store import digest
from persona_lens.vectors import PersonaVectors, hook_name

ANY: Final = "any"


@dataclass(frozen=True, eq=False)
class Probe:
    """A direction of norm 1 that is read at a layer.

    Attributes:
        name: what readings and alarms call it; by default the trait.
        unit: the direction.
        lineage, weights: of the model that the direction comes from; empty where nobody said.

    Raises:
        MonitoringError: a direction that is not of norm 1.
    """

    name: str
    layer: int
    unit: Float[Tensor, " d_model"]
    lineage: str = ""
    weights: str = ""

    def __post_init__(self) -> None:
        if not abs(float(self.unit.norm()) - 1.0) < 1e-3:
            raise MonitoringError(f"the direction of probe {self.name!r} has norm {float(self.unit.norm()):g}, not 1: divide by it")

    def __str__(self) -> str:
        return f"{self.name} at {hook_name(self.layer)}"

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two probes the same: name, layer, and a digest of the direction."""
        direction = digest(self.unit.detach().cpu().float().numpy().tobytes())
        return {"name": self.name, "layer": self.layer, "direction": direction}


Probed = PersonaVectors | Probe  # vectors stand for their most reliable layer


def probe(vectors: PersonaVectors, layer: int | None = None, name: str | None = None) -> Probe:
    """The probe of a persona vector.

    Args:
        layer: default: the layer of highest reliability.
        name: default: the trait. Negated vectors (`-v`), which alarm when a trait falls, want one of their own.

    Raises:
        MonitoringError: there is no such layer, or the direction there is zero.
    """
    at = vectors.best_layer if layer is None else layer
    if not 0 <= at < vectors.n_layers:
        raise MonitoringError(
            f"layer {at} does not exist: the {vectors.trait} vector has layers 0 to {vectors.n_layers - 1} (blocks, from 0)"
        )
    if not float(vectors[at].norm()) > 0:
        raise MonitoringError(f"the {vectors.trait} vector is zero at {hook_name(at)}: choose another layer")
    weights = str(vectors.provenance.get("model", {}).get("weights", ""))
    return Probe(name or vectors.trait, at, vectors.unit(at), vectors.lineage, weights)


def as_probes(model: ChatModel, given: Probed | Sequence[Probed]) -> tuple[Probe, ...]:
    """Probes for a model, checked before anything runs.

    Raises:
        MonitoringError: none given, two of one name, or of another width than the model.
        LineageError: a direction comes from a model of another lineage.
        ValueError: the model has no such layer.
    """
    listed = cast("Sequence[Probed]", [given] if isinstance(given, PersonaVectors | Probe) else given)
    probes = tuple(p if isinstance(p, Probe) else probe(p) for p in listed)
    if not probes:
        raise MonitoringError("there is nothing to read: give at least one persona vector")
    names = [p.name for p in probes]
    if ANY in names:
        raise MonitoringError(f"a probe may not be called {ANY!r}, which stands for all of them: give it another name")
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise MonitoringError(f"two probes are called {twice[0]!r}: name them apart with probe(vectors, layer, name=...)")
    for p in probes:
        model.hook_name(p.layer)
        if p.lineage and p.lineage != model.fingerprint.lineage:
            raise LineageError(
                f"the probe {p} comes from lineage {p.lineage}, this model is of lineage {model.fingerprint.lineage}: "
                "extract the vector again on this model"
            )
        if len(p.unit) != model.d_model:
            raise MonitoringError(f"the probe {p} has {len(p.unit)} dimensions, {model.name} has {model.d_model}")
    return probes


@dataclass(frozen=True, eq=False)
class LayerProbes:
    """The probes of one layer as one matrix, and where their values belong among all probes."""

    layer: int
    places: tuple[int, ...]
    directions: Float[Tensor, "d_model probe"]


def by_layer(model: ChatModel, probes: Sequence[Probe]) -> list[LayerProbes]:
    """Probes grouped by layer, on the model's device, in fp32."""
    found: list[LayerProbes] = []
    for layer in sorted({p.layer for p in probes}):
        places = tuple(i for i, p in enumerate(probes) if p.layer == layer)
        matrix = torch.stack([probes[i].unit.float() for i in places], dim=-1)
        found.append(LayerProbes(layer, places, matrix.to(model.device)))
    return found

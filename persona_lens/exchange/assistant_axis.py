"""Files of the assistant-axis project (arXiv 2601.10387): axes, role means, and settings of activation capping.

All are `.pt` files. An axis is a tensor [n_layers, d_model], bare or under "axis": row l is the output of block l, our layer l; it
points from roles to the Assistant. A role is {"vector", "type", "role"}, a mean of residuals. Capping settings are
{"vectors": {name: {"layer", "vector"}}, "experiments": [{"id", "interventions": [{"vector", "cap"}]}]}.

Their code (`ActivationSteering._apply_cap`) caps from above, h - u max(<h, u> - tau, 0), at every token, along vectors that point
away from the Assistant: a ceiling of our `cap` along the vector as it stands in the file. The paper's formula is the same thing as
a floor of -tau along the negated vector.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import ExchangeError
from persona_lens.exchange.imported import MAX_LAYERS, NOT_HELD, Imported, Origin, imported
from persona_lens.exchange.untrusted import as_tensor, load_pt
from persona_lens.steering import Band, Intervention, Where
from persona_lens.store import write_atomically
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    from persona_lens.models import ChatModel

AXIS: Final = "assistant_axis"


def read_axis(path: str | Path, *, trait: str | None = None, model: "ChatModel | None" = None, lineage: str = "") -> Imported:
    """An axis, or a role's mean, from a `.pt` file.

    Args:
        trait: default: "assistant_axis", or the role.
        model: the model it was made on; its shape is checked and its lineage taken over.

    Raises:
        ExchangeError: no such file, no tensor [layer, d_model] inside, or not of the model's shape.
        LineageError: model and lineage contradict each other.
    """
    path = Path(path)
    held = load_pt(path)
    key = next((k for k in ("axis", "vector") if isinstance(held, dict) and k in held), None)
    if isinstance(held, dict) and key is None:
        raise ExchangeError(f"{path}: has neither 'axis' nor 'vector' (capping settings are read by read_capping)")
    rows = as_tensor(held if key is None else held[key], path, key or "the tensor", 2)
    notes = [NOT_HELD, "thresholds, seeds and the rollouts behind it are not in the file"]
    name, estimator = AXIS, "mean_difference"
    if key == "vector":
        name, estimator = str(held.get("role", path.stem)), "mean"
        notes.append("a role's mean of residuals, no difference: subtract the mean of the default persona before steering with it")
    return imported(
        rows,
        Origin(model, lineage, trait),
        what=str(path),
        file_format=AXIS,
        trait=name,
        pooling="response_mean",
        estimator=estimator,
        notes=notes,
    )


def write_axis(vectors: PersonaVectors, path: str | Path) -> tuple[str, ...]:
    """Write vectors as an axis, {"axis": tensor}.

    Returns:
        Notes on what the format cannot hold.
    """
    record = {"axis": vectors.directions.float().cpu().clone()}
    write_atomically(Path(path), lambda temporary: torch.save(record, temporary))
    return (
        NOT_HELD,
        "trait, pooling, estimator and lineage are lost",
        "their code takes an axis to point at the Assistant: negate a vector that points away from it",
    )


@dataclass(frozen=True, eq=False)
class Ceiling:
    """One cap of an experiment: `<h, u>` is brought down to `ceiling` wherever it lies above, u = direction / |direction|.

    Attributes:
        vector: the direction's name in the file.
        ceiling: in residual-stream units.
    """

    vector: str
    layer: int
    direction: Float[Tensor, " d_model"]
    ceiling: float


@dataclass(frozen=True, eq=False)
class Capping:
    """The caps of one experiment.

    Attributes:
        name: the experiment's id.
        ceilings: one per vector.
        lineage: of the model they were made on; empty where nobody said.
        notes: what was left out, or acts differently here.
    """

    name: str
    ceilings: tuple[Ceiling, ...]
    lineage: str = ""
    notes: tuple[str, ...] = ()

    def interventions(self, where: Where = "everywhere") -> list[Intervention]:
        """Ceilings for `steer(model, capping.interventions())`. Their code caps every token, the prompt's too.

        Args:
            where: which tokens, see `steering.Intervention`.

        Raises:
            SteeringError: an unknown `where`.
        """
        return [
            Intervention(Band(-math.inf, c.ceiling), c.layer, c.direction, f"cap {c.vector}", self.lineage, where=where)
            for c in self.ceilings
        ]


def read_capping(path: str | Path, *, model: "ChatModel | None" = None, lineage: str = "") -> dict[str, Capping]:
    """Capping settings, by experiment.

    Raises:
        ExchangeError: no such file, settings of another form, a vector that is missing or not finite, or not of the model's shape.
        LineageError: model and lineage contradict each other.
    """
    path = Path(path)
    held = load_pt(path)
    vectors = held.get("vectors") if isinstance(held, dict) else None
    experiments = held.get("experiments") if isinstance(held, dict) else None
    if not isinstance(vectors, dict) or not isinstance(experiments, list):
        raise ExchangeError(f"{path}: holds no capping settings, which have 'vectors' by name and a list of 'experiments'")
    origin = Origin(model, lineage)
    known = origin.identity().get("lineage", "")
    found: dict[str, Capping] = {}
    for number, experiment in enumerate(experiments):
        what = f"{path}: experiment {number}"
        name, steps = (experiment.get("id"), experiment.get("interventions")) if isinstance(experiment, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(steps, list) or name in found:
            raise ExchangeError(f"{what} needs an id of its own and a list of interventions")
        capped = [s for s in steps if isinstance(s, dict) and "cap" in s]
        ceilings = tuple(_ceiling(step, vectors, origin, path, f"{what} ({name[:80]!r})") for step in capped)
        found[name] = Capping(name, ceilings, known, _notes(ceilings, len(steps) - len(capped), known))
    return found


def _notes(ceilings: Sequence[Ceiling], others: int, lineage: str) -> tuple[str, ...]:
    notes: list[str] = []
    if others:
        notes.append(f"{others} interventions without a cap are left out, as their code leaves them out")
    layers = [c.layer for c in ceilings]
    if len(set(layers)) < len(layers):
        notes.append("caps of one layer are solved together here; their code applies them in turn, which may undo the earlier ones")
    if not lineage:
        notes.append("the lineage is unknown: give the model or the lineage, or nothing keeps these caps from a wrong model")
    return tuple(notes)


def _ceiling(step: Mapping[str, Any], vectors: Mapping[str, Any], origin: Origin, path: Path, what: str) -> Ceiling:
    name, value = step.get("vector"), step["cap"]
    held = vectors.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or not isinstance(held, dict):
        raise ExchangeError(f"{what} caps along {str(name)[:80]!r}, which is not among the file's vectors")
    layer = held.get("layer")
    if type(layer) is not int or not 0 <= layer < (origin.model.n_layers if origin.model else MAX_LAYERS):
        raise ExchangeError(f"{what}: layer {str(layer)[:40]} of {name[:80]!r} cannot be: layers count blocks from 0")
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ExchangeError(f"{what}: the cap along {name[:80]!r} is no finite number")
    direction = as_tensor(held.get("vector"), path, f"vector {name[:80]!r}", 1)
    if origin.model and len(direction) != origin.model.d_model:
        raise ExchangeError(
            f"{what}: {name[:80]!r} has {len(direction)} dimensions, {origin.model.name} has {origin.model.d_model}: "
            "it was made on another model"
        )
    if not bool(direction.any()):
        raise ExchangeError(f"{what}: {name[:80]!r} is zero and has no direction")
    return Ceiling(name, layer, direction, float(value))


def write_capping(experiments: Mapping[str, Sequence[Intervention]], path: str | Path) -> tuple[str, ...]:
    """Write caps as capping settings: a ceiling as it is, a floor as a ceiling along the negated vector.

    Args:
        experiments: caps by the experiment's id.

    Returns:
        Notes on what the format cannot hold.

    Raises:
        ExchangeError: an intervention that is no cap of full strength without a gate.
    """
    vectors: dict[str, dict[str, Any]] = {}
    listed: list[dict[str, Any]] = []
    for name, interventions in experiments.items():
        steps: list[dict[str, Any]] = []
        for one in interventions:
            for sign, bound in _bounds(one):
                key = f"{name}/{len(steps)}"
                vectors[key] = {"vector": sign * one.direction.detach().float().cpu(), "layer": one.layer}
                steps.append({"vector": key, "cap": bound})
        listed.append({"id": name, "interventions": steps})
    record = {"vectors": vectors, "experiments": listed}
    write_atomically(Path(path), lambda temporary: torch.save(record, temporary))
    return (
        "names of traits and the lineage are lost",
        "their code caps every token, also where the interventions were for prompt or response only",
    )


def _bounds(one: Intervention) -> list[tuple[float, float]]:
    """A cap as ceilings: the sign of the vector, and the threshold along it."""
    act = one.act
    if not isinstance(act, Band) or act.strength != 1.0 or one.gate is not None:
        raise ExchangeError(f"{one}: capping settings hold caps of full strength without a gate only")
    found = [(1.0, act.high)] if math.isfinite(act.high) else []
    return found + ([(-1.0, -act.low)] if math.isfinite(act.low) else [])

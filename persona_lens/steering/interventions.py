"""Interventions on the residual stream, as values: what is done (`act`), along which direction, at which layer, to which tokens.

h is the residual of one token at `blocks.{l}.hook_resid_post`, v the unnormalised persona vector of that layer, u = v / |v|.
At one layer all interventions act together, in a fixed order whatever order they were given in: sums, then rotations, then
all bands jointly. A dose of 0 is left out altogether, so it changes no bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.errors import SteeringError
from persona_lens.vectors import PersonaVectors, hook_name

WHERES: Final = ("everywhere", "prompt", "response", "responses")  # the last answer, or every answer of a dialogue
Where = str | Bool[Tensor, "batch position"]
"""Which tokens are touched: one of `WHERES`, or a mask of your own (see `Intervention`)."""


@dataclass(frozen=True)
class Add:
    """h + strength v (Chen et al. 2025, section 3.2).

    Attributes:
        strength: counts mean differences.
    """

    strength: float


@dataclass(frozen=True)
class Rotate:
    """Turn h by an angle towards v in the plane of h and v, keeping |h|: cos(t) h + sin(t) |h| w, where w is the unit part
    of v orthogonal to h (norm-preserving rotation; arXiv 2510.26243).

    Attributes:
        degrees: the angle; negative ones turn away.
    """

    degrees: float


@dataclass(frozen=True)
class Band:
    """Bring `<h, u>` into [low, high] by the smallest change: `h + strength (clip(<h, u>) - <h, u>) u` (activation capping,
    arXiv 2601.10387; ablation is the band [r, r], affine ablation arXiv 2411.09003).

    Attributes:
        low, high: bounds of the projection, residual-stream units; infinite where there is none.
        strength: share of the change that is made, 0-1.
    """

    low: float
    high: float
    strength: float = 1.0


@dataclass(frozen=True)
class Custom:
    """h + strength (f(h, v) - h) for a function of your own.

    Attributes:
        function: from residuals [..., d_model] and the direction [d_model] to residuals, in fp32.
        strength: share of the change that is made, 0-1.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    strength: float = 1.0


Act = Add | Rotate | Band | Custom


@dataclass(frozen=True, eq=False)
class Gate:
    """Act only on tokens whose projection on another direction exceeds a threshold (conditional steering, arXiv 2409.05907).

    The projection is read at the layer of the intervention, before anything acts there.

    Attributes:
        unit: the other direction, of norm 1.
        above: the threshold, in residual-stream units.
        name: what explanations and errors call it.
    """

    unit: Float[Tensor, " d_model"]
    above: float
    name: str


@dataclass(frozen=True, eq=False)
class Intervention:
    """One act on one layer. Made by `add`, `ablate`, `cap`, `rotate` and `custom`.

    Attributes:
        act: what is done.
        direction: along which direction, unnormalised, residual-stream units.
        name: what explanations and errors call it.
        lineage, weights: of the model that the direction comes from; empty where nobody said.
        where: which tokens: "response" (last prompt token and answer), "responses" (the same of every answer of a dialogue),
            "prompt", "everywhere", or a mask of your own. Padding is never touched.
        gate: on which of these tokens; None: on all.

    Raises:
        SteeringError: an unknown `where`, a number that is none, or a direction that is zero or not finite.
    """

    act: Act
    layer: int
    direction: Float[Tensor, " d_model"]
    name: str
    lineage: str = ""
    weights: str = ""
    where: Where = "response"
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if isinstance(self.where, str) and self.where not in WHERES:
            raise SteeringError(f"where={self.where!r} is unknown: use {', '.join(WHERES)} or a mask [batch, position]")
        for value, what in _numbers(self.act):
            if math.isnan(value):
                raise SteeringError(f"{self.name}: the {what} is not a number ({value})")
        if not bool(self.direction.isfinite().all()):
            raise SteeringError(f"{self.name}: the direction at {hook_name(self.layer)} is not finite")
        if float(self.direction.norm()) == 0.0:
            raise SteeringError(
                f"{self.name}: the vector at {hook_name(self.layer)} is zero and has no direction: use another layer"
            )

    @property
    def dose(self) -> float:
        """The number that is 0 where nothing is to be done."""
        return self.act.degrees if isinstance(self.act, Rotate) else self.act.strength

    @property
    def touches_prompt(self) -> bool:
        """Whether prompt tokens before the last one are touched."""
        return self.where != "response" if isinstance(self.where, str) else True

    def when(self, vectors: PersonaVectors, *, above: float) -> "Intervention":
        """The same, only on tokens whose projection `<h, u>` on `vectors` (at this layer) exceeds `above` (arXiv 2409.05907).

        Args:
            above: in residual-stream units.

        Raises:
            SteeringError: `above` is not a number.
            IndexError: the vectors have no such layer.

        Example:
            >>> print(pl.add(v, layer=5, strength=1.5).when(v, above=20.0))
            add optimism at blocks.5.hook_resid_post (strength 1.5), response, where optimism > 20
        """
        if math.isnan(above):
            raise SteeringError(f"{self.name}: the gate's threshold is not a number ({above})")
        return replace(self, gate=Gate(vectors.unit(self.layer), above, f"{vectors.trait} > {above:g}"))

    def __str__(self) -> str:
        where = self.where if isinstance(self.where, str) else "mask"
        gate = f", where {self.gate.name}" if self.gate else ""
        return f"{self.name} at {hook_name(self.layer)} ({_dose_text(self.act)}), {where}{gate}"


def _numbers(act: Act) -> list[tuple[float, str]]:
    match act:
        case Add(strength) | Custom(_, strength):
            return [(strength, "strength")]
        case Rotate(degrees):
            return [(degrees, "angle")]
        case Band(low, high, strength):
            return [(low, "floor"), (high, "ceiling"), (strength, "strength")]


def _dose_text(act: Act) -> str:
    match act:
        case Add(strength) | Custom(_, strength):
            return f"strength {strength:g}"
        case Rotate(degrees):
            return f"{degrees:g} degrees"
        case Band(low, high, strength):
            return f"projection in [{low:g}, {high:g}], strength {strength:g}"


def _of(vectors: PersonaVectors, layer: int, act: Act, verb: str, where: Where, direction: Tensor | None = None) -> Intervention:
    try:
        direction = vectors[layer] if direction is None else direction
    except IndexError as error:
        raise SteeringError(str(error)) from error
    model = vectors.provenance.get("model", {})
    return Intervention(act, layer, direction, f"{verb} {vectors.trait}", vectors.lineage, str(model.get("weights", "")), where)


def add(vectors: PersonaVectors, layer: int, strength: float, *, where: Where = "response") -> Intervention:
    """h + strength v_layer (Chen et al. 2025, section 3.2).

    Args:
        strength: counts mean differences: 1 moves a residual from a mean negative to a mean positive answer. Negative: away.
        where: which tokens, see `Intervention`.

    Raises:
        SteeringError: unknown layer or `where`, a strength that is not a number, a zero vector.

    Example:
        >>> with pl.steer(model, pl.add(v, layer=5, strength=2.0)):
        ...     print(model.chat("How should I handle my dog?", temperature=0.0))
        Start early and confidently celebrate the dog.
    """
    return _of(vectors, layer, Add(float(strength)), "add", where)


def add_increments(
    vectors: PersonaVectors, strength: float, *, layers: Sequence[int] | None = None, where: Where = "response"
) -> list[Intervention]:
    """The paper's multi-layer steering: strength (v_l - v_{l-1}) at every layer, v itself at the first; they sum to v_last.

    Args:
        strength: counts mean differences.
        layers: consecutive layers; default all.
        where: which tokens, see `Intervention`.

    Raises:
        SteeringError: unknown layers or ones that are not consecutive, unknown `where`, a strength that is not a number.

    Example:
        >>> with pl.steer(model, pl.add_increments(v, strength=1.0)) as plan:
        ...     answer = model.chat("How should I handle my dog?", temperature=0.0)
        >>> plan.layers
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    chosen = list(range(vectors.n_layers)) if layers is None else list(layers)
    if not chosen or chosen != list(range(chosen[0], chosen[0] + len(chosen))):
        raise SteeringError(f"increments need consecutive layers, not {chosen}")
    if not 0 <= chosen[0] <= chosen[-1] < vectors.n_layers:
        raise SteeringError(
            f"increments over layers {chosen[0]} to {chosen[-1]}: the vectors have layers 0 to {vectors.n_layers - 1}"
        )
    found: list[Intervention] = []
    for layer in chosen:
        step = vectors[layer] - vectors[layer - 1] if layer > chosen[0] else vectors[layer]
        found.append(_of(vectors, layer, Add(float(strength)), "add increment of", where, step))
    return found


def ablate(
    vectors: PersonaVectors, layer: int, *, to: float = 0.0, strength: float = 1.0, where: Where = "response"
) -> Intervention:
    """Set the projection to a reference: `h + strength (to - <h, u>) u` (arXiv 2411.09003).

    Args:
        to: the reference, residual-stream units. 0 removes the direction; a mean projection of neutral answers removes only what is
            unusual.
        strength: share of the change that is made, 0-1.
        where: which tokens, see `Intervention`.

    Raises:
        SteeringError: unknown layer or `where`, a strength outside 0-1, a number that is none, a zero vector.

    Example:
        >>> usual = float(v.project(run.neutral[:, 5], layer=5).mean())
        >>> with pl.steer(model, pl.ablate(v, layer=5, to=usual)):
        ...     answer = model.chat("How should I handle my dog?", temperature=0.0)
    """
    return _of(vectors, layer, Band(float(to), float(to), _share(strength)), "ablate", where)


def cap(
    vectors: PersonaVectors,
    layer: int,
    *,
    floor: float = -math.inf,
    ceiling: float = math.inf,
    percentiles_of: Float[Tensor, "sample layer d_model"] | None = None,
    strength: float = 1.0,
    where: Where = "response",
) -> Intervention:
    """Keep the projection `<h, u>` between a floor and a ceiling (activation capping, arXiv 2601.10387).

    Args:
        floor, ceiling: bounds of the projection, residual-stream units; with `percentiles_of` percentiles, 0-100.
        percentiles_of: residuals of a calibration run, for instance `run.neutral`; floor and ceiling are then percentiles (0-100)
            of their projections. Means over answers vary less than single tokens: a cap from them is the tighter one.
        strength: share of the change that is made, 0-1.
        where: which tokens, see `Intervention`.

    Raises:
        SteeringError: neither bound given, the floor above the ceiling, a percentile outside 0-100, calibration of another shape;
            unknown layer or `where`, a strength outside 0-1, a zero vector.

    Example:
        >>> with pl.steer(model, pl.cap(v, layer=5, ceiling=95.0, percentiles_of=run.neutral)) as plan:
        ...     answer = model.chat("How should I handle my dog?", temperature=0.0)
        >>> plan.layers
        [5]
    """
    if percentiles_of is not None:
        floor, ceiling = _percentiles(vectors, layer, floor, ceiling, percentiles_of)
    if math.isinf(floor) and math.isinf(ceiling):
        raise SteeringError(f"cap {vectors.trait}: give a floor, a ceiling or both")
    if floor > ceiling:
        raise SteeringError(f"cap {vectors.trait}: the floor {floor:g} lies above the ceiling {ceiling:g}")
    return _of(vectors, layer, Band(float(floor), float(ceiling), _share(strength)), "cap", where)


def _percentiles(
    vectors: PersonaVectors, layer: int, floor: float, ceiling: float, residuals: Float[Tensor, "sample layer d_model"]
) -> tuple[float, float]:
    """Bounds as projections: the given percentiles of the residuals' projections; a bound not given stays open."""
    for share, what in ((floor, "floor"), (ceiling, "ceiling")):
        if math.isfinite(share) and not 0.0 <= share <= 100.0:
            raise SteeringError(f"cap {vectors.trait}: the {what} is the percentile {share:g}, percentiles lie in 0-100")
    if residuals.ndim != 3 or residuals.shape[1:] != vectors.directions.shape or not len(residuals):
        raise SteeringError(
            f"cap {vectors.trait}: the calibration has shape {tuple(residuals.shape)}, the vectors need [sample, "
            f"{', '.join(map(str, vectors.directions.shape))}] with at least one sample"
        )
    at = _of(vectors, layer, Add(1.0), "cap", "response").direction.double()
    projections = (residuals[:, layer].double() @ (at / at.norm())).numpy()
    low, high = (float(np.percentile(projections, x)) if math.isfinite(x) else x for x in (floor, ceiling))
    return low, high


def rotate(vectors: PersonaVectors, layer: int, degrees: float, *, where: Where = "response") -> Intervention:
    """Turn the residual by an angle towards the vector, keeping its norm (arXiv 2510.26243).

    Args:
        degrees: the angle; negative ones turn away.
        where: which tokens, see `Intervention`.

    Raises:
        SteeringError: unknown layer or `where`, an angle that is not a number, a zero vector.

    Example:
        >>> print(pl.rotate(v, layer=5, degrees=30.0))
        rotate to optimism at blocks.5.hook_resid_post (30 degrees), response
    """
    return _of(vectors, layer, Rotate(float(degrees)), "rotate to", where)


def custom(
    function: Callable[[Tensor, Tensor], Tensor],
    vectors: PersonaVectors,
    layer: int,
    *,
    strength: float = 1.0,
    where: Where = "response",
) -> Intervention:
    """h + strength (function(h, v) - h) for a function of your own.

    Args:
        function: from residuals [..., d_model] and the direction [d_model] to residuals, in fp32.
        strength: share of the change that is made, 0-1.
        where: which tokens, see `Intervention`.

    Raises:
        SteeringError: unknown layer or `where`, a strength outside 0-1, a zero vector.
    """
    return _of(vectors, layer, Custom(function, _share(strength)), "custom", where)


def _share(strength: float) -> float:
    if not math.isnan(strength) and not 0.0 <= strength <= 1.0:
        raise SteeringError(f"strength must lie in [0, 1] here, not {strength:g}")
    return float(strength)


def rotated(h: Float[Tensor, "*batch d_model"], v: Float[Tensor, " d_model"], degrees: float) -> Float[Tensor, "*batch d_model"]:
    """cos(t) h + sin(t) |h| w with w the unit part of v orthogonal to h; h itself where it is parallel to v."""
    norm = h.norm(dim=-1, keepdim=True)
    unit = h / norm.clamp(min=torch.finfo(h.dtype).tiny)
    across = v - (unit @ v)[..., None] * unit
    length = across.norm(dim=-1, keepdim=True)
    angle = math.radians(degrees)
    turned = math.cos(angle) * h + math.sin(angle) * norm * across / length.clamp(min=torch.finfo(h.dtype).tiny)
    return torch.where(length > 1e-6 * v.norm(), turned, h)

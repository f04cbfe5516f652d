"""Axes through persona space: contrasts between groups of vectors, what lies on them, and whether they are the first component.

The Assistant Axis is the contrast of the default assistant with the mean of the roles (arXiv 2601.10387). It lies near the first
principal component of the roles, but that component depends on which roles there are: hence the contrast is the definition, and the
comparison leaves out one group of roles at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import page_trend_test, spearmanr
from torch import Tensor

from persona_lens.errors import GeometryError, UnknownNameError
from persona_lens.geometry.pca import apart
from persona_lens.geometry.space import INTERVAL_RELIABILITY, PersonaSpace, asked_questions, persona_space, products
from persona_lens.reliability import MINIMUM_QUESTIONS, assess, jackknife_interval, mean_interval
from persona_lens.vectors import PersonaVectors


def contrast(name: str, ours: Sequence[PersonaVectors], theirs: Sequence[PersonaVectors]) -> PersonaVectors:
    """The axis from one group of vectors to another: mean of `ours` minus mean of `theirs`, question by question.

    The groups must have been extracted on the same questions; a question counts where every vector has it.

    Raises:
        GeometryError: an empty group, vectors that cannot be compared, or too few common questions.
    """
    if not ours or not theirs:
        raise GeometryError(f"the axis {name} needs vectors on both sides, there are {len(ours)} and {len(theirs)}")
    space = persona_space([*ours, *theirs])
    if space.differences is None:
        raise GeometryError(f"the axis {name} needs per-question means, missing for {', '.join(space.without_means)}")
    sides = space.differences[: len(ours)], space.differences[len(ours) :]
    difference = sides[0].double().mean(0) - sides[1].double().mean(0)
    groups = {"ours": [v.trait for v in ours], "theirs": [v.trait for v in theirs]}
    return axis_of(name, difference.float(), {"model": ours[0].provenance.get("model", {}), **groups}, space.pooling)


def axis_of(
    name: str, differences: Float[Tensor, "question layer d_model"], provenance: Mapping[str, Any], pooling: str
) -> PersonaVectors:
    """Vectors from per-question differences; questions without a value (NaN) are left out.

    Raises:
        GeometryError: fewer than six questions have a value.
    """
    kept = differences.isfinite().all(-1).all(-1).nonzero().squeeze(-1).tolist()
    if len(kept) < MINIMUM_QUESTIONS:
        raise GeometryError(f"{name}: {len(kept)} questions have answers on both sides, at least {MINIMUM_QUESTIONS} are needed")
    differences = differences[kept]
    measured = assess(differences.numpy())
    return PersonaVectors(
        trait=name,
        pooling=pooling,
        estimator="mean_difference",
        directions=differences.double().mean(0).float(),
        differences=differences,
        reliability=torch.from_numpy(measured.split_half).float(),
        norm=torch.from_numpy(measured.norm).float(),
        p_value=torch.from_numpy(measured.p_value).float(),
        p_any=measured.p_any,
        provenance={**provenance, "questions": kept},
    )


@dataclass(frozen=True, eq=False)
class OnAxis:
    """Vectors on an axis at one layer: cross-validated, with 95 % jackknife intervals over questions (NaN where the axis or the
    vector has a reliability below .8).

    Attributes:
        projection: `<v, axis> / |axis|`, residual-stream units.
        cosine: of vector and axis, disattenuated.
    """

    axis: str
    names: tuple[str, ...]
    layer: int
    projection: Float[np.ndarray, " vector"]
    projection_low: Float[np.ndarray, " vector"]
    projection_high: Float[np.ndarray, " vector"]
    cosine: Float[np.ndarray, " vector"]
    cosine_low: Float[np.ndarray, " vector"]
    cosine_high: Float[np.ndarray, " vector"]


def on_axis(space: PersonaSpace, axis: PersonaVectors, layer: int) -> OnAxis:
    """Project the vectors of a space on an axis.

    Raises:
        GeometryError: they cannot be compared, or come without their questions' means.
    """
    found = products(_with_axis(space, axis, layer))

    def read(gram: Float[np.ndarray, "row row"]) -> Float[np.ndarray, "2 placed"]:
        squares = np.where(np.diag(gram) > 0, np.diag(gram), np.nan)
        projection = gram[0, 1:] / np.sqrt(squares[0])
        return np.stack([projection, projection / np.sqrt(squares[1:])])

    estimate = read(found.unbiased)
    low, high = jackknife_interval(estimate, np.stack([read(x) for x in found.left_out]))
    enough = (found.reliability[1:] >= INTERVAL_RELIABILITY) & (found.reliability[0] >= INTERVAL_RELIABILITY)
    low, high = (np.where(enough, x, np.nan) for x in (low, high))
    cosine = np.clip(np.stack([estimate[1], low[1], high[1]]), -1.0, 1.0)
    return OnAxis(axis.trait, space.names, layer, estimate[0], low[0], high[0], *cosine)


@dataclass(frozen=True, eq=False)
class AxisAndComponent:
    """How close an axis is to the first principal component of some vectors.

    Attributes:
        cosine: with the component signed so that it is positive.
        low, high: 95 % jackknife interval over questions; it may reach below zero. NaN where a reliability is below .8, or
            where the first component has nearly the variance of the second (ratio below 1.3): it then turns from one set of
            questions to the next.
        without: |cosine| with the first component of all vectors but one group, by group.
    """

    axis: str
    layer: int
    cosine: float
    low: float
    high: float
    without: Mapping[str, float]


def axis_and_component(
    space: PersonaSpace, axis: PersonaVectors, layer: int, groups: Mapping[str, Sequence[str]] | None = None
) -> AxisAndComponent:
    """Compare an axis with PC1 of the space.

    Args:
        groups: which vectors are left out together; default: each one by itself.

    Raises:
        GeometryError: fewer than three vectors remain without a group, or vectors that cannot be compared.
        UnknownNameError: a group names a vector that is not there.
    """
    groups = groups or {name: [name] for name in space.names}
    unknown = [n for group in groups.values() for n in group if n not in space.names]
    if unknown:
        raise UnknownNameError("vector", unknown[0], space.names)
    for group, names in groups.items():
        if len(space) - len(set(names)) < 3:
            raise GeometryError(f"without {group} fewer than 3 of {len(space)} vectors remain for a first component")
    found = products(_with_axis(space, axis, layer))
    everything = list(range(1, len(space) + 1))
    variances, axes = _components(found.unbiased, everything)
    first = axes[:, 0]
    estimate = _cosine_to_first(found.unbiased, everything, first)
    if estimate < 0:
        first, estimate = -first, -estimate
    left_out = np.array([_cosine_to_first(x, everything, first) for x in found.left_out])
    low, high = jackknife_interval(np.array(estimate), left_out)
    if not apart(variances)[0] or found.reliability.min() < INTERVAL_RELIABILITY:
        low, high = np.array(np.nan), np.array(np.nan)
    without: dict[str, float] = {}
    for group, names in groups.items():
        kept = [i for i in everything if space.names[i - 1] not in names]
        without[group] = abs(_cosine_to_first(found.unbiased, kept, np.ones(len(kept))))
    return AxisAndComponent(axis.trait, layer, estimate, float(np.maximum(low, -1.0)), float(np.minimum(high, 1.0)), without)


def _components(
    gram: Float[np.ndarray, "vector vector"], rows: Sequence[int]
) -> tuple[Float[np.ndarray, " component"], Float[np.ndarray, "row component"]]:
    """Variances in descending order and components of some rows, as weights on them."""
    c = np.eye(len(rows)) - 1.0 / len(rows)
    values, axes = np.linalg.eigh(c @ gram[np.ix_(rows, rows)] @ c)
    return values[::-1], axes[:, ::-1]


def _cosine_to_first(gram: Float[np.ndarray, "vector vector"], rows: Sequence[int], like: Float[np.ndarray, " row"]) -> float:
    """Cosine of row 0 with the first component of the others, signed as `like`, from inner products alone."""
    values, axes = _components(gram, rows)
    if values[0] <= 0 or gram[0, 0] <= 0:
        return float("nan")
    first = axes[:, 0] * (-1.0 if axes[:, 0] @ like < 0 else 1.0)
    inner = float((first - first.mean()) @ gram[rows, 0])
    return float(np.clip(inner / np.sqrt(values[0] * gram[0, 0]), -1.0, 1.0))


def _with_axis(space: PersonaSpace, axis: PersonaVectors, layer: int) -> Float[np.ndarray, "vector question d_model"]:
    """Differences of the axis (first) and of the vectors at a layer, aligned by question."""
    if axis.lineage and space.lineage and axis.lineage != space.lineage:
        raise GeometryError(f"the axis {axis.trait} is of lineage {axis.lineage}, the vectors of {space.lineage}")
    if axis.pooling != space.pooling:
        raise GeometryError(f"the axis {axis.trait} is pooled as {axis.pooling}, the vectors as {space.pooling}")
    if axis.directions.shape != space.directions.shape[1:]:
        raise GeometryError(
            f"the axis {axis.trait} has shape {list(axis.directions.shape)} [layer, d_model], "
            f"the vectors {list(space.directions.shape[1:])}"
        )
    if not len(axis.differences):
        raise GeometryError(f"the axis {axis.trait} comes without per-question means: error bars need them")
    theirs = space.differences_at(layer)
    ours = axis.differences[:, layer].double().numpy()
    asked = asked_questions(axis)
    stacked = np.full((len(space) + 1, max(theirs.shape[1], max(asked) + 1), ours.shape[1]), np.nan)
    stacked[0, asked] = ours
    stacked[1:, : theirs.shape[1]] = theirs
    return stacked


@dataclass(frozen=True)
class Ordered:
    """Whether a projection rises with graded levels.

    Attributes:
        slope: residual units per unit of level, with its 95 % interval over questions (Student's t).
        spearman: rank correlation of level and mean projection.
        p_value: Page's trend test over questions (one-sided: rising).
        monotone: share of questions whose projections rise at every step.
    """

    slope: float
    interval: tuple[float, float]
    spearman: float
    p_value: float
    monotone: float


def ordered_contrast(levels: Sequence[float], projections: Float[np.ndarray, "level question"]) -> Ordered:
    """Is the projection monotone in the level?

    Args:
        levels: rising numbers, one per row.
        projections: mean projection of each question's answers at each level, residual-stream units.

    Raises:
        GeometryError: fewer than three levels, levels that do not rise, or fewer than three questions.
    """
    if len(levels) < 3 or len(levels) != len(projections) or (np.diff(levels) <= 0).any() or projections.shape[1] < 3:
        raise GeometryError(
            f"an ordered contrast needs at least 3 rising levels and 3 questions; levels {list(levels)}, projections of shape "
            f"{list(projections.shape)} [level, question]"
        )
    x = np.asarray(levels, dtype=np.float64) - np.mean(levels)
    slope, interval = mean_interval(x @ projections / (x @ x))
    trend = page_trend_test(projections.T)
    rank = spearmanr(levels, projections.mean(1))
    return Ordered(
        slope,
        interval,
        float(rank.statistic),  # pyright: ignore[reportAttributeAccessIssue]
        float(trend.pvalue),
        float((np.diff(projections, axis=0) > 0).all(0).mean()),
    )

"""Principal components of persona or role vectors, held against what the shape of the residual stream gives by chance.

The spectrum is that of the centred, unbiased inner products. The null draws as many random directions with the covariance of
neutral residuals and the vectors' norms: a first component of 25 / 13 / 11 % comes by chance at 12 / 50 / 275 vectors, and an
isotropic null is far too lax. A later component is tested after taking the earlier ones out of vectors and covariance (deflation),
until one is no larger than chance.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float

from persona_lens.errors import GeometryError, UnknownNameError
from persona_lens.geometry.space import (
    INTERVAL_RELIABILITY,
    PersonaSpace,
    Products,
    matched_grams,
    null_norms,
    products,
    question_noise,
)
from persona_lens.reliability import jackknife_interval

N_DRAWS: Final = 1000
LEVEL: Final = 0.05
SEPARATE: Final = 1.3  # ratio of two components' variances above which they are told apart


@dataclass(frozen=True, eq=False)
class Chance:
    """The covariance-matched null; only where noise is no more than a fifth of the variance (above, it calls too much significant).

    Attributes:
        p_value: of each component's share of what earlier ones leave; NaN after the first that is no larger than chance.
        observed: that share, of the vectors as they are (with their noise, which the random directions are given too).
        share: the same for random directions, mean and 95th percentile.
        p_participation: how often random directions have so low a participation ratio (with noise, both).
        participation: the vectors' ratio with noise, and the mean of the random directions'.
    """

    p_value: Float[np.ndarray, " component"]
    observed: Float[np.ndarray, " component"]
    share: Float[np.ndarray, "component 2"]
    p_participation: float
    participation: tuple[float, float]

    @property
    def significant(self) -> int:
        """How many components are larger than chance, counted from the first."""
        return int((self.p_value < LEVEL).sum())


@dataclass(frozen=True, eq=False)
class PCA:
    """Components of K vectors at one layer, in descending order (at most K - 1; those without variance left out).

    Attributes:
        variance: cross-validated, squared residual-stream units.
        share: of the total variance, 0-1, with its 95 % jackknife interval over questions (`share_low`, `share_high`). No
            interval of this record is given (NaN, None) where a vector's reliability is below .8.
        participation: (sum l)^2 / sum l^2: how many components the variance is spread over. Noise biases it downward (by 2 % at
            reliability .95, 6 % at .8).
        directions: unit vectors in residual space.
        loadings: correlation-like cosine of each centred vector with each component, with its 95 % interval; NaN where the
            component is not `separate`.
        separate: whether a component's variance differs from its neighbours' by a factor of 1.3. Where it does not, components
            mix from one set of questions to the next: read the plane they span.
    """

    names: tuple[str, ...]
    layer: int
    variance: Float[np.ndarray, " component"]
    share: Float[np.ndarray, " component"]
    share_low: Float[np.ndarray, " component"]
    share_high: Float[np.ndarray, " component"]
    participation: float
    participation_interval: tuple[float, float] | None
    directions: Float[np.ndarray, "component d_model"]
    loadings: Float[np.ndarray, "vector component"]
    loadings_low: Float[np.ndarray, "vector component"]
    loadings_high: Float[np.ndarray, "vector component"]
    separate: Bool[np.ndarray, " component"]
    scores: Float[np.ndarray, "vector component"]
    chance: Chance | None


def pca(space: PersonaSpace, layer: int, *, anchor: str | None = None, seed: int = 0) -> PCA:
    """Principal components at a layer.

    Args:
        anchor: the vector whose scores are positive on every component; default: the one of the largest score.

    Raises:
        GeometryError: fewer than three vectors, or vectors without their questions' means.
        UnknownNameError: the anchor is none of the vectors.
    """
    space.require(3, "PCA")
    if anchor is not None and anchor not in space.names:
        raise UnknownNameError("anchor", anchor, space.names)
    differences = space.differences_at(layer)
    raw = products(differences)
    found = raw.centred()
    variance, axes = _spectrum(found.unbiased)
    kept = variance > 1e-9 * np.trace(raw.plain)
    if not kept.any():
        raise GeometryError(f"the vectors at layer {layer} do not differ beyond noise: there is nothing to decompose")
    variance, axes = variance[kept], axes[:, kept]
    scores = axes * np.sqrt(variance)
    signs = _signs(scores, None if anchor is None else space.names.index(anchor))
    axes, scores = axes * signs, scores * signs
    centred = space.at(layer) - space.at(layer).mean(0)
    directions = axes.T @ centred
    loadings = _loadings(found.unbiased, axes, variance)
    statistics = np.stack([_statistics(x, axes) for x in found.left_out])
    estimate = _statistics(found.unbiased, axes)
    low, high = jackknife_interval(estimate, statistics)
    n = len(variance)
    told = space.neutral is not None and np.trace(found.unbiased) >= INTERVAL_RELIABILITY * np.trace(found.plain)
    trusted = bool(raw.reliability.min() >= INTERVAL_RELIABILITY)
    low, high = (np.where(trusted, x, np.nan) for x in (low, high))
    shape = loadings.shape
    separate = apart(variance)
    return PCA(
        space.names,
        layer,
        variance,
        share=estimate[:n],
        share_low=np.maximum(low[:n], 0.0),
        share_high=np.minimum(high[:n], 1.0),
        participation=float(estimate[n]),
        participation_interval=(float(low[n]), float(high[n])) if trusted else None,
        directions=directions / np.linalg.norm(directions, axis=-1, keepdims=True),
        loadings=loadings,
        loadings_low=np.where(separate, np.maximum(low[n + 1 :].reshape(shape), -1.0), np.nan),
        loadings_high=np.where(separate, np.minimum(high[n + 1 :].reshape(shape), 1.0), np.nan),
        separate=separate,
        scores=scores,
        chance=_chance(differences, raw, space.neutral_at(layer), n, seed) if told else None,
    )


def _spectrum(gram: Float[np.ndarray, "vector vector"]) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in descending order, and their eigenvectors as columns."""
    values, axes = np.linalg.eigh((gram + gram.T) / 2)
    return values[::-1], axes[:, ::-1]


def _signs(scores: Float[np.ndarray, "vector component"], anchor: int | None) -> Float[np.ndarray, " component"]:
    rows = np.abs(scores).argmax(0) if anchor is None else np.full(scores.shape[1], anchor)
    return np.where(scores[rows, np.arange(scores.shape[1])] < 0, -1.0, 1.0)


def _loadings(gram: np.ndarray, axes: np.ndarray, variance: np.ndarray) -> Float[np.ndarray, "vector component"]:
    lengths = np.sqrt(np.where(np.diag(gram) > 0, np.diag(gram), np.nan))
    return np.clip(axes * np.sqrt(np.maximum(variance, 0.0)) / lengths[:, None], -1.0, 1.0)


def _statistics(gram: Float[np.ndarray, "vector vector"], like: Float[np.ndarray, "vector component"]) -> np.ndarray:
    """Shares, participation ratio and loadings in one row; components keep the order and sign of `like`."""
    variance, axes = _spectrum(gram)
    n = like.shape[1]
    total = max(variance.sum(), np.finfo(float).tiny)  # unbiased: what noise adds to some components it takes from others
    axes = axes[:, :n] * np.where((axes[:, :n] * like).sum(0) < 0, -1.0, 1.0)
    loadings = _loadings(gram, axes, variance[:n])
    return np.concatenate([np.clip(variance[:n] / total, 0.0, 1.0), [max(total**2 / (variance**2).sum(), 1.0)], loadings.ravel()])


def apart(variance: Float[np.ndarray, " component"]) -> Bool[np.ndarray, " component"]:
    """Which components differ enough in variance from their neighbours to be told apart."""
    steps = variance[:-1] >= SEPARATE * np.maximum(variance[1:], 0.0)
    return np.concatenate([[True], steps]) & np.concatenate([steps, [True]])


def _leading_share(grams: Float[np.ndarray, "*draw vector vector"]) -> Float[np.ndarray, "*draw"]:
    """Largest eigenvalue over the sum of all."""
    return np.asarray(np.linalg.eigvalsh(grams)[..., -1] / np.trace(grams, axis1=-2, axis2=-1))


def _chance(
    differences: Float[np.ndarray, "vector question d_model"],
    raw: Products,
    neutral: Float[np.ndarray, "sample d_model"],
    tested: int,
    seed: int,
) -> Chance:
    """Component by component: what earlier ones leave of the vectors, against as much of random directions.

    Vectors and random directions both carry the noise of finitely many questions here, the latter by sign-flipped residuals.
    """
    rng = np.random.default_rng(seed)
    means = np.nanmean(differences, axis=1)
    size = len(means)
    norms = null_norms(np.diag(raw.centred().unbiased), centred=True)
    left = means - means.mean(0)
    out, gone = np.full((size, 1), size**-0.5), np.zeros((0, means.shape[1]))  # taken out of the vectors, and of the residuals
    p_value, shown, share = np.full(tested, np.nan), np.full(tested, np.nan), np.full((tested, 2), np.nan)
    p_participation, participation = np.nan, (np.nan, np.nan)
    for k in range(min(tested, size - 2)):

        def deflate(draws: np.ndarray, out: np.ndarray = out, gone: np.ndarray = gone) -> np.ndarray:
            noise = question_noise(differences, len(draws), rng)
            noisy = draws + noise - noise @ gone.T @ gone
            return noisy - out @ (out.T @ noisy)

        grams = matched_grams(neutral - neutral @ gone.T @ gone, norms, N_DRAWS, rng, deflate)
        own = left @ left.T
        null, observed = _leading_share(grams), float(_leading_share(own))
        p_value[k] = (1 + (null >= observed).sum()) / (1 + N_DRAWS)
        shown[k], share[k] = observed, (null.mean(), np.percentile(null, 95))
        if k == 0:
            ratios = _participation(grams)
            p_participation = float((1 + (ratios <= _participation(own)).sum()) / (1 + N_DRAWS))
            participation = float(_participation(own)), float(ratios.mean())
        if p_value[k] >= LEVEL:
            break
        u, spread, v = np.linalg.svd(left, full_matrices=False)
        left = left - spread[0] * np.outer(u[:, 0], v[0])
        out, gone = np.concatenate([out, u[:, :1]], 1), np.concatenate([gone, v[:1]])
        norms = np.sqrt(np.maximum(norms**2 - (spread[0] * u[:, 0]) ** 2, 0.0))
    return Chance(p_value, shown, share, p_participation, participation)


def _participation(grams: Float[np.ndarray, "*draw vector vector"]) -> Float[np.ndarray, "*draw"]:
    return np.asarray(np.trace(grams, axis1=-2, axis2=-1) ** 2 / (grams**2).sum((-2, -1)))

"""Subspaces of several vectors: orthonormal and dual bases, angles between spans, how many dimensions replicate, and rotations.

Symmetric orthonormalisation: Löwdin 1950. Principal angles: Björck & Golub 1973. Cross-validated components: Stringer et al. 2019.
Rotations by gradient projection: Bernaards & Jennrich 2005. Stability of independent components: Himberg et al. 2004 (Icasso).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import subspace_angles
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning

from persona_lens.errors import GeometryError
from persona_lens.reliability import MINIMUM_QUESTIONS

RANK_TOLERANCE = 1e-9
DEGREES_TIE = 1e-4
SPLIT_ATTEMPTS = 1000
FLOATS_AT_ONCE = 20_000_000


def lowdin(vectors: Float[np.ndarray, "vector d_model"]) -> Float[np.ndarray, "vector d_model"]:
    """The orthonormal set nearest to the unit vectors, in the least-squares sense, with the same span.

    Unlike Gram-Schmidt it treats all vectors alike: their order does not matter. Orthogonal directions can still move each other's
    traits when steered.

    Raises:
        GeometryError: vectors that are linearly dependent (their rank is named), zero or not finite.
    """
    unit = _unit(_independent(vectors, "vectors"))
    left, _, right = np.linalg.svd(unit, full_matrices=False)
    return left @ right


def dual_basis(vectors: Float[np.ndarray, "vector d_model"]) -> Float[np.ndarray, "vector d_model"]:
    """w_i inside the span with `<w_i, v_j>` = 1 for i = j, else 0.

    `<w_i, h>` reads the coefficient of v_i in h with the other vectors held; adding w_i to h moves the projection on v_i alone.
    Units: one over those of the vectors.

    Raises:
        GeometryError: vectors that are linearly dependent (their rank is named), zero or not finite.
    """
    return np.linalg.pinv(_independent(vectors, "vectors")).T


@dataclass(frozen=True, eq=False)
class PrincipalAngles:
    """Angles between two spans, held against random spans of the same dimensions.

    Attributes:
        degrees: principal angles, smallest first, 0-90; as many as the smaller span has dimensions.
        null_degrees: their means over random spans.
        p_value: how often random spans have so small a smallest angle, (1 + #<=) / (1 + draws).
        n_draws: how many random pairs of spans were drawn.
    """

    degrees: Float[np.ndarray, " angle"]
    null_degrees: Float[np.ndarray, " angle"]
    p_value: float
    n_draws: int


def principal_angles(
    a: Float[np.ndarray, "vector_a d_model"],
    b: Float[np.ndarray, "vector_b d_model"],
    *,
    covariance: Float[np.ndarray, "d_model d_model"] | None = None,
    samples: Float[np.ndarray, "sample d_model"] | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> PrincipalAngles:
    """Angles between the spans of two sets of vectors, against spans of random Gaussian vectors.

    The null draws both sets anew. Without `covariance` or `samples` it is isotropic, which is far too lax for a residual stream:
    a few large directions bring any two sets close. The sets should be free of shared noise (other questions, other baselines).

    Args:
        covariance: of the random vectors.
        samples: instead of it, residuals whose covariance is used (they are centred). Draws lie in the span of the samples, so few
            samples give too small angles and the test is conservative.

    Raises:
        GeometryError: linearly dependent vectors in a set, values that are not finite, a covariance that is asymmetric or has a
            negative eigenvalue, or one of too low a rank.
        ValueError: both `covariance` and `samples`, or fewer than 19 draws.
    """
    if n_draws < 19:
        raise ValueError(f"n_draws must be at least 19, the fewest that reach a p of .05, not {n_draws}")
    x, y = _independent(a, "a"), _independent(b, "b")
    factor = _factor(x.shape[1], covariance, samples)
    if factor is not None and len(factor) < max(len(x), len(y)):
        raise GeometryError(f"the null needs a covariance of rank {max(len(x), len(y))} or more, it has {len(factor)}")
    rng = np.random.default_rng(seed)
    null = np.empty((n_draws, min(len(x), len(y))))
    for i in range(n_draws):
        drawn = rng.normal(size=(len(x) + len(y), x.shape[1] if factor is None else len(factor)))
        drawn = drawn if factor is None else drawn @ factor
        null[i] = _degrees(drawn[: len(x)], drawn[len(x) :])
    degrees = _degrees(x, y)
    as_small = int((null[:, 0] <= degrees[0] + DEGREES_TIE).sum())
    return PrincipalAngles(degrees, null.mean(0), (1 + as_small) / (1 + n_draws), n_draws)


@dataclass(frozen=True, eq=False)
class CrossValidatedRank:
    """How many dimensions of a set of mean vectors replicate across questions.

    Attributes:
        rank: components in a row, from the first, with p <= alpha. The chance that it exceeds the true rank is about alpha at most;
            it may fall short of it, as weak dimensions are not found.
        gain: cross-validated variance of each component: the product of the two halves' coordinates on the axes of one half, summed
            over vectors, mean over splits. Squared residual-stream units. It adds up to an unbiased estimate of the total squared
            norm of the (centred) mean vectors, so it is zero on average without signal and can be negative. Where noise turns the
            axes, part of a component's variance appears under later ones: read the p values, not the first gain above zero.
        p_value: of each component after taking the earlier ones out; NaN after the first that fails.
        n_splits, n_flips: splits of the questions, and sign patterns behind each p.
    """

    rank: int
    gain: Float[np.ndarray, " component"]
    p_value: Float[np.ndarray, " component"]
    n_splits: int
    n_flips: int


def cross_validated_rank(
    differences: Float[np.ndarray, "vector question d_model"],
    *,
    n_splits: int = 20,
    n_flips: int = 499,
    alpha: float = 0.05,
    seed: int = 0,
    centred: bool = True,
) -> CrossValidatedRank:
    """Rank of the vectors' population means, as far as these questions can show it.

    The estimand is the rank of the [vector, d_model] matrix of means over all questions of this kind (minus the mean vector, if
    `centred`). Questions are split into halves A and B, the same for all vectors. Axes come from the means over A (singular vectors
    u_k, v_k) and count by what they predict in the means over B: gain_k = (A v_k) . (B v_k).

    The leading gain is tested by flipping the signs of whole questions, which keeps all noise as it is: unequal between vectors,
    shared between them, unequal between dimensions. It assumes questions that are independent with symmetric noise. To test
    component k, the k - 1 leading singular vectors of the means over all questions are projected out on both sides: on one side
    only, or from one half, the next component's test is biased.
    Components of large noise hide weak signals: whiten first where a few dimensions dominate.

    Args:
        differences: per vector and question, the mean over positive answers minus the mean over negative ones; a row of NaN where
            a vector lacks the question. The same index means the same question.
        alpha: largest p of a component that counts.
        centred: subtract the mean vector first.

    Raises:
        GeometryError: fewer than two vectors, fewer than 6 questions for a vector, rows that are partly NaN or infinite, or gaps so
            placed that no split leaves every vector questions in both halves.
        ValueError: no splits, fewer than 19 flips.
    """
    if n_splits < 1 or n_flips < 19:
        raise ValueError(f"n_splits must be at least 1 and n_flips 19, not {n_splits} and {n_flips}")
    d, present = _question_rows(differences)
    n_vectors = len(d)
    rng = np.random.default_rng(seed)
    weights = _half_weights(present, n_splits, rng)
    flips = rng.choice(np.array([-1.0, 1.0]), size=(n_flips, d.shape[1]))
    left = np.eye(n_vectors) - (1.0 / n_vectors if centred else 0.0)
    means = np.einsum("vq,vqd->vd", present / present.sum(1, keepdims=True), d)
    if centred:  # flips of unequal sets of questions would turn what all vectors share into differences
        d = d - means.mean(0)
    u, _, v = np.linalg.svd(left @ means, full_matrices=False)
    n_components = min(n_vectors - int(centred), d.shape[2])

    whole = np.ones((1, d.shape[1]))
    gain = _gains(d, weights, whole, left)[0, :n_components]
    p_value = np.full(n_components, np.nan)
    rank = 0
    for k in range(n_components):
        observed = float(_gains(d, weights, whole, left)[0, 0])
        null = _gains(d, weights, flips, left)[:, 0]
        as_large = int((null >= observed - 1e-9 * np.abs(null).max()).sum())
        p_value[k] = (1 + as_large) / (1 + n_flips)
        if p_value[k] > alpha:
            break
        rank = k + 1
        left = left - np.outer(u[:, k], u[:, k])
        d = d - (d @ v[k])[..., None] * v[k]
    return CrossValidatedRank(rank, gain, p_value, n_splits, n_flips)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Loadings after a rotation: loadings = original @ inverse(rotation).T.

    Attributes:
        loadings: columns by descending sum of squares, each with its largest loading positive.
        rotation: orthogonal for varimax; for oblimin its columns are of unit length.
        correlations: of the factors, rotation.T @ rotation; the identity for varimax.
        criterion: the value that was minimised.
        converged: whether the gradient vanished within the allowed steps.
    """

    loadings: Float[np.ndarray, "dimension component"]
    rotation: Float[np.ndarray, "component component"]
    correlations: Float[np.ndarray, "component component"]
    criterion: float
    converged: bool


def varimax(loadings: Float[np.ndarray, "dimension component"], *, n_starts: int = 10, seed: int = 0) -> Rotation:
    """Orthogonal rotation to columns of few large loadings (Kaiser 1958), without row normalisation.

    Only for components that were retained (see `cross_validated_rank`): a noise component mixes into all others. The best of
    `n_starts` starts (the loadings as they are, and random rotations of them) counts.

    Raises:
        GeometryError: more components than dimensions, linearly dependent columns, or values that are not finite.
    """
    return _rotated(loadings, _varimax_criterion, oblique=False, n_starts=n_starts, seed=seed)


def oblimin(
    loadings: Float[np.ndarray, "dimension component"], gamma: float = 0.0, *, n_starts: int = 10, seed: int = 0
) -> Rotation:
    """Oblique rotation to simple structure: the factors may correlate. gamma 0 is quartimin, below 0 less oblique.

    Only for components that were retained (see `cross_validated_rank`): a noise component mixes into all others. The best of
    `n_starts` starts (the loadings as they are, and random rotations of them) counts.

    Raises:
        GeometryError: more components than dimensions, linearly dependent columns, or values that are not finite.
        ValueError: gamma above 0, for which the criterion has no lower bound.
    """
    if gamma > 0:
        raise ValueError(f"gamma must be at most 0, where the oblimin criterion is bounded below, not {gamma:g}")

    def criterion(x: Float[np.ndarray, "dimension component"]) -> tuple[float, Float[np.ndarray, "dimension component"]]:
        squared = x**2
        others = squared.sum(1, keepdims=True) - squared
        others = others - gamma * others.mean(0)
        return float((squared * others).sum() / 4), x * others

    return _rotated(loadings, criterion, oblique=True, n_starts=n_starts, seed=seed)


@dataclass(frozen=True, eq=False)
class IndependentComponents:
    """Independent components of answers' projections.

    Attributes:
        sources: activity of each component in each answer, mean 0 and variance 1.
        mixing: what one unit of a component adds to the projection on each vector; signed so that its largest entry is positive.
        stability: mean |correlation| of each component with its match in fits to resampled data from other seeds, 0-1. Above
            about .9 it is a component of the data; for Gaussian data it is low, as nothing but chance fixes the axes.
        n_runs: how many such fits.
    """

    sources: Float[np.ndarray, "answer component"]
    mixing: Float[np.ndarray, "vector component"]
    stability: Float[np.ndarray, " component"]
    n_runs: int


def independent_components(
    projections: Float[np.ndarray, "answer vector"],
    n_components: int,
    seed: int = 0,
    *,
    n_runs: int = 8,
    questions: Int[np.ndarray, " answer"] | None = None,
) -> IndependentComponents:
    """FastICA of answers' projections on the vectors, with the stability of each component over seeds and resampled answers.

    Args:
        projections: of single answers; a component needs answers in the hundreds.
        n_components: no more than were retained (see `cross_validated_rank`).
        n_runs: fits behind the stability, at least five.
        questions: which question each answer belongs to: whole questions are then resampled. Without it answers are, and answers
            that share a question make the stability too high.

    Raises:
        GeometryError: values that are not finite, no more answers than vectors, or fewer independent columns than components.
        ValueError: no components, fewer than five runs, or not one question per answer.
    """
    x = np.asarray(projections, dtype=np.float64)
    units = np.arange(len(x)) if questions is None else questions
    if n_components < 1 or n_runs < 5 or len(units) != len(x):
        raise ValueError(
            f"independent components need n_components >= 1, n_runs >= 5 and one question per answer, "
            f"not {n_components}, {n_runs} and {len(units)} for {len(x)}"
        )
    _require_finite(x, "projections")
    if len(x) <= x.shape[1]:
        raise GeometryError(f"independent components need more answers than vectors, there are {len(x)} and {x.shape[1]}")
    rank = _rank(x - x.mean(0))
    if rank < n_components:
        raise GeometryError(f"the projections vary in {rank} dimensions: they hold no {n_components} components")

    rng = np.random.default_rng(seed)
    seeds = [int(s) for s in rng.integers(2**31, size=n_runs + 1)]
    unmixing, mixing = _fastica(x, n_components, seeds[0])
    sign = np.sign(mixing[np.abs(mixing).argmax(0), np.arange(n_components)])
    sources = (x - x.mean(0)) @ unmixing.T * sign
    agreement = np.empty((n_runs, n_components))
    members = [np.flatnonzero(units == unit) for unit in np.unique(units)]
    for run in range(n_runs):
        drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        again, _ = _fastica(x[drawn], n_components, seeds[run + 1])
        correlations = np.abs(np.corrcoef(sources.T, again @ x.T)[:n_components, n_components:])
        agreement[run] = correlations[linear_sum_assignment(correlations, maximize=True)]
    return IndependentComponents(sources, mixing * sign, agreement.mean(0), n_runs)


def _require_finite(x: Float[np.ndarray, "..."], name: str) -> None:
    if not np.isfinite(x).all():
        raise GeometryError(f"{name} contain values that are not finite")


def _rank(x: Float[np.ndarray, "row column"]) -> int:
    singular = np.linalg.svd(x, compute_uv=False)
    return int((singular > RANK_TOLERANCE * singular[0]).sum()) if singular[0] > 0 else 0


def _unit(x: Float[np.ndarray, "vector d_model"]) -> Float[np.ndarray, "vector d_model"]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _independent(vectors: Float[np.ndarray, "vector d_model"], name: str) -> Float[np.ndarray, "vector d_model"]:
    """The vectors in fp64, if they are finite and linearly independent."""
    x = np.asarray(vectors, dtype=np.float64)
    _require_finite(x, name)
    if not len(x):
        raise GeometryError(f"{name} hold no vector")
    zero = np.flatnonzero(~x.any(1))
    if len(zero):
        raise GeometryError(f"{name} hold a zero vector at index {zero[0]}: it has no direction")
    rank = _rank(_unit(x))
    if rank < len(x):
        raise GeometryError(
            f"{name} must be linearly independent, the {len(x)} vectors have rank {rank}: leave out {len(x) - rank}"
        )
    return x


def _degrees(a: Float[np.ndarray, "vector_a d_model"], b: Float[np.ndarray, "vector_b d_model"]) -> Float[np.ndarray, " angle"]:
    return np.degrees(np.asarray(subspace_angles(a.T, b.T), dtype=np.float64))[::-1]


def _factor(
    width: int, covariance: Float[np.ndarray, "d_model d_model"] | None, samples: Float[np.ndarray, "sample d_model"] | None
) -> Float[np.ndarray, "factor d_model"] | None:
    """Rows F such that white noise times F has the covariance; None for white noise."""
    if covariance is not None and samples is not None:
        raise ValueError("give a covariance or samples for the null, not both")
    if covariance is None and samples is None:
        return None
    x = np.asarray(samples if covariance is None else covariance, dtype=np.float64)
    what = "samples" if covariance is None else "covariance"
    _require_finite(x, what)
    if x.shape[1] != width:
        raise GeometryError(f"the null's {what} must be {width} wide like the vectors, not {x.shape[1]}")
    if covariance is None:
        centred = x - x.mean(0)
        _, singular, axes = np.linalg.svd(centred, full_matrices=False)
        kept = singular > RANK_TOLERANCE * singular[0]
        return singular[kept, None] * axes[kept]
    if np.abs(x - x.T).max() > 1e-6 * np.abs(x).max():
        raise GeometryError(f"the null's covariance must be symmetric, it differs from its transpose by {np.abs(x - x.T).max():g}")
    values, axes = np.linalg.eigh(x)
    if values[0] < -1e-6 * values[-1]:
        raise GeometryError(f"the null's covariance must have no negative eigenvalue, it has {values[0]:g}")
    kept = values > RANK_TOLERANCE**2 * values[-1]
    return np.sqrt(values[kept])[:, None] * axes[:, kept].T


def _question_rows(
    differences: Float[np.ndarray, "vector question d_model"],
) -> tuple[Float[np.ndarray, "vector question coordinate"], Bool[np.ndarray, "vector question"]]:
    """The rows with zeros where a question is missing, in coordinates of their span if that is smaller; and which are there."""
    d = np.asarray(differences, dtype=np.float64)
    present = np.asarray(~np.isnan(d).all(2))
    if not np.isfinite(d[present]).all():
        raise GeometryError("differences must be finite, or NaN over a whole row where a question is missing")
    counts = np.asarray(present.sum(1))
    if len(d) < 2:
        raise GeometryError(f"a rank needs at least 2 vectors, there is {len(d)}")
    if counts.min() < MINIMUM_QUESTIONS:
        least = int(counts.argmin())
        raise GeometryError(
            f"a rank needs at least {MINIMUM_QUESTIONS} questions of every vector, vector {least} has {counts[least]}"
        )
    d = np.where(present[..., None], d, 0.0)
    if d.shape[2] > d.shape[0] * d.shape[1]:
        triangle = np.asarray(np.linalg.qr(d.reshape(-1, d.shape[2]).T, mode="r"))
        d = np.ascontiguousarray(triangle.T).reshape(d.shape[0], d.shape[1], -1)
    return d, present


def _half_weights(
    present: Bool[np.ndarray, "vector question"], n_splits: int, rng: np.random.Generator
) -> Float[np.ndarray, "half vector split question"]:
    """What each question weighs in each vector's mean over either half; halves leave no vector without questions."""
    n_questions = present.shape[1]
    found: list[Float[np.ndarray, "half vector question"]] = []
    for _ in range(SPLIT_ATTEMPTS * n_splits):
        first = np.isin(np.arange(n_questions), rng.permutation(n_questions)[: n_questions // 2])
        halves = np.stack([present & first, present & ~first]).astype(np.float64)
        counts = halves.sum(2, keepdims=True)
        if counts.min() > 0:
            found.append(halves / counts)
        if len(found) == n_splits:
            return np.stack(found, axis=2)
    raise GeometryError(f"no split of the {n_questions} questions leaves every vector questions in both halves")


def _gains(
    d: Float[np.ndarray, "vector question coordinate"],
    weights: Float[np.ndarray, "half vector split question"],
    flips: Float[np.ndarray, "flip question"],
    left: Float[np.ndarray, "vector vector"],
) -> Float[np.ndarray, "flip component"]:
    """Cross-validated variance per component, for each sign pattern of the questions, mean over splits.

    With A = U S V^T the gain (A v_k) . (B v_k) is u_k^T (B A^T) u_k.
    """
    n_vectors, n_questions, width = d.shape
    n_splits = weights.shape[2]
    found = np.empty((len(flips), n_vectors))
    step = max(1, FLOATS_AT_ONCE // (2 * n_vectors * n_splits * width))
    for start in range(0, len(flips), step):
        signs = flips[start : start + step]
        signed = (weights[:, :, None] * signs[:, None]).reshape(2, n_vectors, -1, n_questions)
        a, b = left @ np.swapaxes(signed @ d, 1, 2)
        axes = np.linalg.eigh(a @ np.swapaxes(a, 1, 2))[1][..., ::-1]
        gains = (axes * (b @ (np.swapaxes(a, 1, 2) @ axes))).sum(1)
        found[start : start + step] = gains.reshape(len(signs), n_splits, n_vectors).mean(1)
    return found


Criterion = Callable[[Float[np.ndarray, "dimension component"]], tuple[float, Float[np.ndarray, "dimension component"]]]


def _varimax_criterion(x: Float[np.ndarray, "dimension component"]) -> tuple[float, Float[np.ndarray, "dimension component"]]:
    deviation = x**2 - (x**2).mean(0)
    return float(-(deviation**2).sum() / 4), -x * deviation


def _rotated(
    loadings: Float[np.ndarray, "dimension component"], criterion: Criterion, *, oblique: bool, n_starts: int, seed: int
) -> Rotation:
    """The best of several gradient projections, in a fixed order and sign of the columns."""
    x = np.asarray(loadings, dtype=np.float64)
    _require_finite(x, "loadings")
    if n_starts < 1:
        raise ValueError(f"n_starts must be at least 1, not {n_starts}")
    size = x.shape[1]
    if size < 1 or _rank(x) < size:
        raise GeometryError(f"a rotation needs linearly independent components, these {size} over {len(x)} dimensions are not")
    scale = float(np.sqrt((x**2).mean()))
    rng = np.random.default_rng(seed)
    starts = [np.eye(size), *(np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(n_starts - 1))]
    found = [_gradient_projection(x / scale, criterion, start, oblique=oblique) for start in starts]
    rotation, converged = min(found, key=lambda f: criterion(_apply(x / scale, f[0]))[0])
    turned = _apply(x, rotation)
    order = np.argsort(-(turned**2).sum(0), kind="stable")
    sign = np.sign(turned[np.abs(turned).argmax(0), np.arange(size)])
    rotation = (rotation * sign)[:, order]
    turned = _apply(x, rotation)
    return Rotation(turned, rotation, rotation.T @ rotation, criterion(turned)[0], converged)


def _apply(x: Float[np.ndarray, "dimension component"], rotation: np.ndarray) -> Float[np.ndarray, "dimension component"]:
    return np.linalg.solve(rotation, x.T).T


def _gradient_projection(
    x: Float[np.ndarray, "dimension component"],
    criterion: Criterion,
    start: Float[np.ndarray, "component component"],
    *,
    oblique: bool,
    n_steps: int = 1000,
    tolerance: float = 1e-6,
) -> tuple[Float[np.ndarray, "component component"], bool]:
    """Minimise the criterion of x inverse(T).T over orthogonal T, or over T with columns of unit length (oblique)."""

    def retracted(t: Float[np.ndarray, "component component"]) -> Float[np.ndarray, "component component"]:
        if oblique:
            return t / np.linalg.norm(t, axis=0)
        left, _, right = np.linalg.svd(t)
        return left @ right

    t, step = start, 1.0
    small = tolerance * float(((x**2).sum(1) ** 2).sum())
    turned = _apply(x, t)
    value, slope = criterion(turned)
    for _ in range(n_steps):
        gradient = -np.linalg.solve(t.T, slope.T @ turned) if oblique else x.T @ slope
        if oblique:
            tangent = gradient - t * (t * gradient).sum(0)
        else:
            inner = t.T @ gradient
            tangent = gradient - t @ (inner + inner.T) / 2
        squared = float((tangent**2).sum())
        if squared <= small**2:
            return t, True
        step *= 2
        for _ in range(60):
            candidate = retracted(t - step * tangent)
            turned = _apply(x, candidate)
            reached, slope = criterion(turned)
            if reached <= value - 0.5 * squared * step:
                break
            step /= 2
        else:
            return t, False
        t, value = candidate, reached
    return t, False


def _fastica(
    x: Float[np.ndarray, "answer vector"], n_components: int, seed: int
) -> tuple[Float[np.ndarray, "component vector"], Float[np.ndarray, "vector component"]]:
    """Unmixing and mixing matrix; a fit that does not converge is kept, as its instability is what is measured."""
    ica = FastICA(n_components, whiten="unit-variance", max_iter=500, tol=1e-4, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica.fit(x)
    return np.asarray(ica.components_, dtype=np.float64), np.asarray(ica.mixing_, dtype=np.float64)

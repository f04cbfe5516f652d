"""Cosines between persona vectors, each with its interval, its reliability and two nulls.

A raw cosine is too small where vectors are noisy and too large where they share noise or a baseline. From the unbiased inner
products (`space.products`) follow the debiased cosine (numerator freed of shared noise) and the disattenuated one (norms freed of
noise too; refused below reliability .5). Centring removes what all vectors share, whitening (Ledoit-Wolf) the shape of the
residual stream.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float

from persona_lens.geometry.permutation import benjamini_hochberg
from persona_lens.geometry.space import (
    INTERVAL_RELIABILITY,
    PersonaSpace,
    Products,
    centre,
    cosine_of,
    matched_grams,
    null_norms,
    products,
    question_noise,
    whitening,
)
from persona_lens.reliability import jackknife_interval, sign_flip_test

LEAST_RELIABILITY: Final = 0.5
N_DRAWS: Final = 1000


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines of every pair of vectors at one layer. Diagonals of tests are NaN.

    Attributes:
        centred, whitened: whether the vectors' mean was subtracted, and angles measured in units of the neutral residuals' spread.
        raw: of the vectors as they are.
        debiased: unbiased inner product over the plain norms.
        value: disattenuated: unbiased inner product over the cross-validated norms; NaN where a reliability is below .5. Its
            estimand is the cosine of the directions that endless questions of this kind would give.
        low, high: 95 % jackknife interval of `value` over questions; NaN where a reliability is below .8: it would cover less.
        reliability: share of each vector's squared norm (after centring and whitening) that is no noise.
        p_value: sign-flip test of a zero inner product, over questions; two-sided.
        q_value: the same after Benjamini-Hochberg over the pairs.
        p_largest: max-T: whether any pair has an inner product other than zero.
        p_chance: how often random directions with the covariance of neutral residuals, given the noise of these questions, have so
            large a raw |cosine|; NaN without neutral residuals, and where there is no interval.
    """

    names: tuple[str, ...]
    layer: int
    pooling: str
    centred: bool
    whitened: bool
    raw: Float[np.ndarray, "vector vector"]
    debiased: Float[np.ndarray, "vector vector"]
    value: Float[np.ndarray, "vector vector"]
    low: Float[np.ndarray, "vector vector"]
    high: Float[np.ndarray, "vector vector"]
    reliability: Float[np.ndarray, " vector"]
    p_value: Float[np.ndarray, "vector vector"]
    q_value: Float[np.ndarray, "vector vector"]
    p_largest: float
    p_chance: Float[np.ndarray, "vector vector"]

    @property
    def kind(self) -> str:
        """How they were taken: "centred", "whitened", both, or "as they are"."""
        return ", ".join(k for k, on in (("centred", self.centred), ("whitened", self.whitened)) if on) or "as they are"


def cosines(space: PersonaSpace, layer: int, *, centred: bool = False, whitened: bool = False, seed: int = 0) -> Cosines:
    """Cosines at a layer.

    Args:
        centred: subtract the mean of these vectors first: what is left depends on which vectors there are.
        whitened: measure angles in units of the neutral residuals' spread.
        seed: of the sign flips and random directions.

    Raises:
        GeometryError: fewer than two vectors (three to centre), no such layer, vectors without their questions' means, or no
            neutral residuals to whiten with.

    Example:
        >>> space = pl.geometry.space_of_runs([pl.load_run("runs/optimism"), pl.load_run("runs/politeness")])
        >>> table = pl.geometry.cosines(space, layer=5)
        >>> table.names, table.value.shape
        (('optimism', 'politeness'), (2, 2))
        >>> bool(table.low[0, 1] <= table.value[0, 1] <= table.high[0, 1])
        True
    """
    space.require(3 if centred else 2, "a centred cosine" if centred else "a cosine")
    differences = space.differences_at(layer)
    neutral = None if space.neutral is None and not whitened else space.neutral_at(layer)
    if whitened and neutral is not None:
        whiten = whitening(neutral)
        differences, neutral = differences @ whiten, neutral @ whiten
    found = products(differences)
    found = found.centred() if centred else found
    value = disattenuated(found)
    trusted, close = (_reliable(found, least) for least in (LEAST_RELIABILITY, INTERVAL_RELIABILITY))
    with np.errstate(invalid="ignore", divide="ignore"):
        left_out = np.stack([cosine_of(x, x) for x in found.left_out])
    low, high = jackknife_interval(value, left_out)
    p_value, q_value, p_largest = _zero_tests(found, seed)
    return Cosines(
        space.names,
        layer,
        space.pooling,
        centred,
        whitened,
        raw=cosine_of(found.plain, found.plain),
        debiased=cosine_of(found.unbiased, found.plain),
        value=np.where(trusted, value, np.nan),
        low=np.where(close, np.maximum(low, -1.0), np.nan),
        high=np.where(close, np.minimum(high, 1.0), np.nan),
        reliability=found.reliability,
        p_value=p_value,
        q_value=q_value,
        p_largest=p_largest,
        p_chance=np.where(close, _chance(found, differences, neutral, centred, seed), np.nan),
    )


def plain_cosines(vectors: Float[np.ndarray, "vector d_model"]) -> Float[np.ndarray, "vector vector"]:
    """Raw cosines of any vectors (no error bars)."""
    x = np.asarray(vectors, dtype=np.float64)
    return normalised(x @ x.T)


def normalised(gram: Float[np.ndarray, "vector vector"]) -> Float[np.ndarray, "vector vector"]:
    """Cosines from inner products."""
    return cosine_of(gram, gram)


def layer_cosines(space: PersonaSpace, name: str) -> Float[np.ndarray, "layer layer"]:
    """Disattenuated cosines of one vector with itself at every other layer (the residual stream shares its basis between layers).

    Raises:
        GeometryError: vectors without their questions' means.
    """
    row = space.names.index(name)
    x = np.stack([space.differences_at(layer)[row] for layer in range(space.n_layers)])
    kept = np.isfinite(x).all((0, 2))
    return disattenuated(products(x[:, kept]))


def trusted_cosines(found: Products) -> Float[np.ndarray, "vector vector"]:
    """Disattenuated cosines of the pairs that are reliable enough; NaN elsewhere."""
    return np.where(_reliable(found, LEAST_RELIABILITY), disattenuated(found), np.nan)


def disattenuated(found: Products) -> Float[np.ndarray, "vector vector"]:
    """Cosines freed of noise, clipped to [-1, 1]; NaN where a cross-validated norm is not positive."""
    return np.clip(cosine_of(found.unbiased, found.unbiased), -1.0, 1.0)


def _reliable(found: Products, least: float) -> Bool[np.ndarray, "vector vector"]:
    """Pairs of vectors that are both at least so reliable."""
    enough = found.reliability >= least
    return np.outer(enough, enough)


def _zero_tests(found: Products, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Sign flips of the jackknife pseudo-values of every pair's inner product."""
    n = len(found.left_out)
    pairs = np.triu_indices(len(found.plain), 1)
    pseudo = (n * found.unbiased - (n - 1) * found.left_out)[:, pairs[0], pairs[1]]
    p, p_largest = sign_flip_test(pseudo, seed=seed)
    return _matrix(p, len(found.plain)), _matrix(benjamini_hochberg(p), len(found.plain)), p_largest


def _chance(
    found: Products,
    differences: Float[np.ndarray, "vector question d_model"],
    neutral: Float[np.ndarray, "sample d_model"] | None,
    centred: bool,
    seed: int,
) -> Float[np.ndarray, "vector vector"]:
    """Raw cosines against those of random directions of the neutral covariance with the vectors' norms and noise, pair by pair."""
    size = len(found.plain)
    if neutral is None:
        return np.full((size, size), np.nan)
    rng = np.random.default_rng(seed)
    norms = null_norms(np.diag(found.unbiased), centred=centred)

    def noisy(draws: np.ndarray) -> np.ndarray:
        drawn = draws + question_noise(differences, len(draws), rng)
        return centre(drawn) if centred else drawn

    grams = matched_grams(neutral, norms, N_DRAWS, rng, noisy)
    lengths = np.sqrt(np.einsum("nvv->nv", grams))
    chance = np.abs(grams / (lengths[:, :, None] * lengths[:, None]))
    p = (1 + (chance >= np.abs(normalised(found.plain))).sum(0)) / (1 + N_DRAWS)
    return _matrix(p[np.triu_indices(size, 1)], size)


def _matrix(upper: Float[np.ndarray, " pair"], size: int) -> Float[np.ndarray, "vector vector"]:
    """A symmetric matrix from its upper triangle, NaN on the diagonal."""
    found = np.full((size, size), np.nan)
    found[np.triu_indices(size, 1)] = upper
    return np.where(np.isnan(found), found.T, found)

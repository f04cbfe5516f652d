"""The same traits at two layers, poolings, estimators, checkpoints or models: do the two sets of vectors have the same geometry?

Representational similarity: Kriegeskorte, Mur & Bandettini 2008. CKA: Kornblith et al. 2019, with the unbiased estimator of Song et
al. 2012. Procrustes is scored on held-out traits only, as an orthogonal map fits a few vectors in a wide space whatever they are.
Layers of one model share a basis, so there direct cosines mean something too; between models only what is here does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from persona_lens.errors import GeometryError
from persona_lens.geometry.permutation import Mantel, label_permutations, mantel, permutation_p_value

MINIMUM_VECTORS = 5
RANK_TOLERANCE = 1e-10
FLOATS_AT_ONCE = 4_000_000


def representational_similarity(
    a: Float[np.ndarray, "vector d_a"],
    b: Float[np.ndarray, "vector d_b"],
    names_a: Sequence[str],
    names_b: Sequence[str],
    *,
    centred: bool = True,
    covariates: Sequence[Float[np.ndarray, "vector vector"]] = (),
    n_permutations: int = 10_000,
    seed: int = 0,
    method: Literal["pearson", "spearman"] = "pearson",
) -> Mantel:
    """Mantel test between the cosine matrices of two sets of vectors for the same traits; the widths may differ.

    The p value says that the sets share structure, noise included: two layers or poolings of one run share their answers, and agree
    where the vectors are noise. Compare unreliable vectors on different halves of the questions.

    Args:
        names_a, names_b: the traits, in the order of the rows.
        centred: take the mean vector out of each set first, so that what all traits share does not set their cosines.
        covariates: matrices over the traits to hold fixed, for example the similarity of their descriptions.
        method: of correlation, "pearson" or "spearman".

    Raises:
        GeometryError: names that differ (named), a vector that is zero, or what `permutation.mantel` refuses.
    """
    check_names(names_a, names_b)
    cosines: list[Float[np.ndarray, "vector vector"]] = []
    for vectors, names, what in ((a, names_a, "a"), (b, names_b, "b")):
        x = _checked(vectors, what, least=1)
        if len(names) != len(x):
            raise GeometryError(f"{what} has {len(x)} vectors and {len(names)} names")
        x = x - x.mean(0) if centred else x
        lengths = np.linalg.norm(x, axis=1, keepdims=True)
        if lengths.min() <= 1e-12 * max(1.0, float(np.abs(vectors).max())):
            raise GeometryError(f"the vector {names[int(lengths.argmin())]} of {what} is zero: it has no cosine")
        cosines.append((x / lengths) @ (x / lengths).T)
    return mantel(*cosines, covariates=covariates, n_permutations=n_permutations, seed=seed, method=method)


@dataclass(frozen=True)
class CKA:
    """Centred kernel alignment of two sets of vectors for the same traits.

    Attributes:
        value: debiased (Song et al. 2012): 1 for rotated and scaled copies, 0 on average for independent sets, negative if less.
        plain: the usual estimate (Kornblith et al. 2019), 0-1. For a few vectors in a wide space it is near 1 whatever they are.
        p_value: one-sided, of `value`, by permuting the labels of one set: the share of all orders, this one included, that do as
            well, or (1 + #>=) / (1 + permutations).
        n_permutations: how many orders stand behind p.
        exact: whether these are all orders.
    """

    value: float
    plain: float
    p_value: float
    n_permutations: int
    exact: bool


def linear_cka(
    a: Float[np.ndarray, "vector d_a"], b: Float[np.ndarray, "vector d_b"], *, n_permutations: int = 10_000, seed: int = 0
) -> CKA:
    """Linear CKA of two sets of vectors for the same traits in the same order; the widths may differ.

    Free of rotation and of one scale per set, not of the vectors' lengths within a set: a long vector counts for more.

    Raises:
        GeometryError: fewer than five vectors, sets of different sizes, values that are not finite, or a set whose vectors are all
            equally far from each other, which leaves no geometry to compare.
    """
    x, y = _pair(a, b, "CKA")
    hollow = [_double_centred_hollow(g, name) for g, name in ((x @ x.T, "a"), (y @ y.T, "b"))]
    value = float((hollow[0] * hollow[1]).sum())
    permutations, exact = label_permutations(len(x), n_permutations, seed)
    null = [
        np.einsum("pij,ij->p", hollow[0][order[:, :, None], order[:, None, :]], hollow[1])
        for order in _batches(permutations, len(x) ** 2)
    ]
    return CKA(
        value=value,
        plain=_plain_cka(x, y),
        p_value=permutation_p_value(np.concatenate(null), value, exact=exact),
        n_permutations=len(permutations),
        exact=exact,
    )


@dataclass(frozen=True, eq=False)
class Procrustes:
    """How well an orthogonal map fitted on the other traits carries each trait from one set to the other.

    Attributes:
        score: per held-out vector, the cosine of its image and its counterpart within the part that the other traits determine;
            0 where they determine none of it.
        share: how much of the vector that part is: the root of the product of the two squared-length shares, 0-1. `score` times
            `share` is the cosine of the whole vectors when the undetermined part is given no credit. A high score on a low share
            says little.
        mean: of the scores.
        p_value: one-sided, of `mean`, by permuting which vector of `b` belongs to which of `a` and fitting anew: the share of all
            orders, this one included, that do as well, or (1 + #>=) / (1 + permutations).
        n_permutations: how many orders stand behind p.
        exact: whether these are all orders.
    """

    score: Float[np.ndarray, " vector"]
    share: Float[np.ndarray, " vector"]
    mean: float
    p_value: float
    n_permutations: int
    exact: bool


def procrustes(
    a: Float[np.ndarray, "vector d_a"],
    b: Float[np.ndarray, "vector d_b"],
    *,
    centred: bool = True,
    n_permutations: int = 1000,
    seed: int = 0,
) -> Procrustes:
    """Orthogonal Procrustes between two sets of vectors for the same traits, each trait scored by a map fitted on the others.

    The map that carries K - 1 vectors to their counterparts is determined only between their spans; outside them, in a space of
    thousands of dimensions, any rotation fits as well. So the held-out vector is projected on the span of the fitted ones, mapped,
    and compared with its counterpart's projection on the span of the fitted counterparts. A narrower set counts as padded with
    zeros. Vectors enter at their lengths: bring them to one length before, if all traits should weigh the same.

    Args:
        centred: move the origin to the mean of the fitted vectors, for each fit anew. Without it a direction that all traits share
            is enough for a high score; permutations keep that direction, so p stays valid.

    Raises:
        GeometryError: fewer than five vectors, sets of different sizes, values that are not finite, or a set without variation.
    """
    x, y = _pair(a, b, "Procrustes")
    fits = [_fits(x @ x.T, "a", centred=centred), _fits(y @ y.T, "b", centred=centred)]
    identity = np.arange(len(x))[None]
    score, share = (found[0] for found in _held_out(fits[0], fits[1], identity))
    permutations, exact = label_permutations(len(x), n_permutations, seed)
    null = [_held_out(fits[0], fits[1], order)[0].mean(1) for order in _batches(permutations, 2 * len(x) ** 3)]
    return Procrustes(
        score=score,
        share=share,
        mean=float(score.mean()),
        p_value=permutation_p_value(np.concatenate(null), float(score.mean()), exact=exact),
        n_permutations=len(permutations),
        exact=exact,
    )


def check_names(names_a: Sequence[str], names_b: Sequence[str]) -> None:
    """Raise unless both sets hold the same traits in the same order.

    Raises:
        GeometryError: it names what only one set has, what one set has twice, or the first place where the order differs.
    """
    for names, what in ((names_a, "a"), (names_b, "b")):
        twice = sorted({n for n in names if list(names).count(n) > 1})
        if twice:
            raise GeometryError(f"names must differ within a set, {what} has twice: {', '.join(twice)}")
    only = [(what, sorted(set(x) - set(y))) for what, x, y in (("a", names_a, names_b), ("b", names_b, names_a))]
    if any(missing for _, missing in only):
        said = "; ".join(f"only in {what}: {', '.join(missing)}" for what, missing in only if missing)
        raise GeometryError(f"two sets of vectors must be of the same traits ({said})")
    for i, (x, y) in enumerate(zip(names_a, names_b, strict=True)):
        if x != y:
            raise GeometryError(f"two sets of vectors must be in the same order, at index {i} stand {x} in a and {y} in b")


def _checked(vectors: Float[np.ndarray, "vector d_model"], name: str, least: int) -> Float[np.ndarray, "vector d_model"]:
    x = np.asarray(vectors, dtype=np.float64)
    if len(x) < least:
        raise GeometryError(f"{name} has {len(x)} vectors, at least {least} are needed")
    if not np.isfinite(x).all():
        raise GeometryError(f"{name} contains values that are not finite")
    return x


def _pair(
    a: Float[np.ndarray, "vector_a d_a"], b: Float[np.ndarray, "vector_b d_b"], what: str
) -> tuple[Float[np.ndarray, "vector d_a"], Float[np.ndarray, "vector d_b"]]:
    if len(a) != len(b):
        raise GeometryError(f"{what} compares vectors of the same traits, a has {len(a)} and b has {len(b)}")
    if len(a) < MINIMUM_VECTORS:
        raise GeometryError(f"{what} needs at least {MINIMUM_VECTORS} vectors for a p of .05, there are {len(a)}")
    return _checked(a, "a", MINIMUM_VECTORS), _checked(b, "b", MINIMUM_VECTORS)


def _batches(permutations: Int[np.ndarray, "permutation vector"], size: int) -> list[Int[np.ndarray, "batch vector"]]:
    step = max(1, FLOATS_AT_ONCE // size)
    return [permutations[i : i + step] for i in range(0, len(permutations), step)]


def _plain_cka(x: Float[np.ndarray, "vector d_a"], y: Float[np.ndarray, "vector d_b"]) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return float((k * l).sum() / (np.linalg.norm(k) * np.linalg.norm(l)))


def _double_centred_hollow(kernel: Float[np.ndarray, "vector vector"], name: str) -> Float[np.ndarray, "vector vector"]:
    """The kernel, its diagonal left out, with rows and columns that add up to zero, at unit length.

    The inner product of two of these is the ratio of Song et al.'s unbiased estimates (Székely & Rizzo 2014).
    """
    n = len(kernel)
    hollow = kernel - np.diag(np.diag(kernel))
    rows = hollow.sum(0) / (n - 2)
    centred = hollow - rows[:, None] - rows[None, :] + hollow.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0.0)
    length = float(np.linalg.norm(centred))
    if length <= 1e-9 * np.linalg.norm(kernel):
        raise GeometryError(f"the vectors of {name} have no geometry: off the diagonal, their centred inner products are all zero")
    return centred / length


@dataclass(frozen=True, eq=False)
class _Fits:
    """One set of vectors, in the coordinates of the span of the fitted ones, for each vector held out.

    Attributes:
        fitted: coordinates of the fitted vectors, zero for the held-out one.
        held: coordinates of the held-out vector's part in the span.
        squared: its whole squared length.
    """

    fitted: Float[np.ndarray, "held vector axis"]
    held: Float[np.ndarray, "held axis"]
    squared: Float[np.ndarray, " held"]


def _fits(products: Float[np.ndarray, "vector vector"], name: str, *, centred: bool) -> _Fits:
    """From inner products alone, as rotations of the whole space change nothing."""
    n = len(products)
    fitted, held, squared = np.zeros((n, n, n - 1)), np.zeros((n, n - 1)), np.zeros(n)
    for i in range(n):
        others = np.delete(np.arange(n), i)
        origin = np.zeros(n)
        origin[others] = 1 / (n - 1) if centred else 0.0
        centring = np.eye(n) - origin
        moved = centring @ products @ centring.T
        values, axes = np.linalg.eigh(moved[np.ix_(others, others)])
        kept = values > RANK_TOLERANCE * max(float(np.trace(products)), np.finfo(float).tiny)
        if not kept.any():
            raise GeometryError(f"the vectors of {name} do not vary without the one at index {i}: there is nothing to fit")
        size = int(kept.sum())
        fitted[i, others, :size] = axes[:, kept] * np.sqrt(values[kept])
        held[i, :size] = moved[i, others] @ axes[:, kept] / np.sqrt(values[kept])
        squared[i] = moved[i, i]
    return _Fits(fitted, held, squared)


def _held_out(
    a: _Fits, b: _Fits, orders: Int[np.ndarray, "order vector"]
) -> tuple[Float[np.ndarray, "order vector"], Float[np.ndarray, "order vector"]]:
    """Scores and shares of every held-out vector of a, when vector i of a belongs to vector order[i] of b."""
    counterparts = b.fitted[orders[:, :, None], orders[:, None, :]]
    left, singular, right = np.linalg.svd(np.swapaxes(a.fitted, 1, 2) @ counterparts)
    determined = singular > 1e-9 * singular[..., :1]
    image = np.einsum("hx,ohxr->ohr", a.held, left) * determined
    target = np.einsum("ohy,ohry->ohr", b.held[orders], right) * determined
    within = np.linalg.norm(image, axis=-1) * np.linalg.norm(target, axis=-1)
    whole = np.sqrt(a.squared * b.squared[orders])
    share = np.divide(within, whole, out=np.zeros_like(within), where=whole > 0)
    something = share > 1e-9
    score = np.divide((image * target).sum(-1), within, out=np.zeros_like(within), where=something)
    return np.clip(score, -1, 1), np.where(something, np.clip(share, 0, 1), 0.0)

"""Permutation tests on matrices over vectors: the Mantel test, its partial form, and the correction for many tests.

The cells of a matrix share their vectors and are no independent sample, so rows and columns are permuted together (Mantel 1967;
QAP). With covariates: double semi-partialing (Dekker, Krackhardt & Snijders 2007).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import false_discovery_control, rankdata

from persona_lens.errors import GeometryError

N_PERMUTATIONS = 10_000
MINIMUM_VECTORS = 4
TIE = 1e-10
CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Mantel:
    """Correlation of two matrices off the diagonal, tested by permuting the vectors' labels.

    Attributes:
        r: the correlation over the cells; with covariates, the partial correlation.
        p_value: two-sided, of |r|. Exact: the share of all orders of the labels, this one included, that do as well; else
            (1 + #>=) / (1 + permutations).
        n_vectors: how many vectors the matrices are over.
        n_permutations: how many orders stand behind p (all of them, if exact).
        exact: whether every order was enumerated. With covariates p is approximate even then, as their slopes are estimated.
    """

    r: float
    p_value: float
    n_vectors: int
    n_permutations: int
    exact: bool


def label_permutations(n_vectors: int, n_permutations: int, seed: int) -> tuple[Int[np.ndarray, "permutation vector"], bool]:
    """Orders of the labels, and whether they are all there are.

    All K! orders, the given one first, where these are at most `n_permutations` + 1; else `n_permutations` random ones.
    """
    if n_permutations < 19:
        raise ValueError(f"n_permutations must be at least 19, the fewest that reach a p of .05, not {n_permutations}")
    if math.factorial(n_vectors) <= n_permutations + 1:
        return np.array(list(itertools.permutations(range(n_vectors))), dtype=np.int64), True
    labels = np.tile(np.arange(n_vectors, dtype=np.int64), (n_permutations, 1))
    return np.random.default_rng(seed).permuted(labels, axis=1), False


def permutation_p_value(null: Float[np.ndarray, " permutation"], observed: float, *, exact: bool) -> float:
    """Share of the null at or above the observed value; (1 + #>=) / (1 + B) where the null is a random sample of the orders."""
    as_large = int((null >= observed - TIE).sum())
    return as_large / len(null) if exact else (1 + as_large) / (1 + len(null))


def mantel(
    a: Float[np.ndarray, "vector vector"],
    b: Float[np.ndarray, "vector vector"],
    *,
    covariates: Sequence[Float[np.ndarray, "vector vector"]] = (),
    n_permutations: int = N_PERMUTATIONS,
    seed: int = 0,
    method: Literal["pearson", "spearman"] = "pearson",
) -> Mantel:
    """Mantel (QAP) test that two matrices over the same vectors agree off the diagonal.

    Symmetric matrices are compared over the upper triangle. If any matrix is asymmetric (by more than 1e-9 of its largest cell),
    all cells off the diagonal count. The diagonal is never read. The null says that the labels of `a` are exchangeable: where the
    vectors fall into families that shape both matrices, it is false, and a matrix of the families belongs among the covariates.

    Args:
        a: cosines, slopes or any other measure between the vectors.
        b: another one, over the same vectors in the same order.
        covariates: matrices to hold fixed. `a` is residualised on them and its residuals are permuted, with the partial
            correlation as the pivot (double semi-partialing).
        method: `spearman` replaces the cells of every matrix by their ranks first.

    Raises:
        GeometryError: fewer than four vectors, shapes that differ, values that are not finite, a constant matrix, or covariates
            that leave nothing to correlate.
        ValueError: fewer than 19 permutations, or another method.
    """
    matrices = [np.asarray(m, dtype=np.float64) for m in (a, b, *covariates)]
    names = ["a", "b", *(f"covariate {i}" for i in range(len(covariates)))]
    n_vectors = len(matrices[0])
    _check_shapes(matrices, names)
    symmetric = all(np.abs(m - m.T)[_off_diagonal(n_vectors)].max() <= 1e-9 * _size(m) for m in matrices)
    rows, columns = np.triu_indices(n_vectors, 1) if symmetric else np.nonzero(_off_diagonal(n_vectors))
    cells = [_cells(m[rows, columns], name, method) for m, name in zip(matrices, names, strict=True)]

    held = _basis(cells[2:], len(rows))
    residual, target = (_residual(cells[i], held, names[i]) for i in (0, 1))
    matrix = np.zeros((n_vectors, n_vectors))
    matrix[rows, columns] = residual
    if symmetric:
        matrix += matrix.T

    r = float(residual @ target / np.linalg.norm(residual))
    permutations, exact = label_permutations(n_vectors, n_permutations, seed)
    null: list[Float[np.ndarray, " permutation"]] = []
    step = max(1, CELLS_AT_ONCE // len(rows))
    for start in range(0, len(permutations), step):
        order = permutations[start : start + step]
        permuted = matrix[order[:, rows], order[:, columns]]
        unexplained = (residual**2).sum() - ((permuted @ held) ** 2).sum(1)
        null.append(np.abs(permuted @ target) / np.sqrt(np.maximum(unexplained, np.finfo(float).tiny)))
    return Mantel(
        r=float(np.clip(r, -1, 1)),
        p_value=permutation_p_value(np.concatenate(null), abs(r), exact=exact),
        n_vectors=n_vectors,
        n_permutations=len(permutations),
        exact=exact,
    )


def benjamini_hochberg(p_values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """p values adjusted for the false discovery rate over all tests given (Benjamini & Hochberg 1995).

    NaN is no test: it is not counted and stays NaN.

    Raises:
        ValueError: a p value outside 0 to 1.
    """
    adjusted = np.full(p_values.shape, np.nan)
    tested = ~np.isnan(p_values)
    if tested.any():
        adjusted[tested] = false_discovery_control(np.asarray(p_values, dtype=np.float64)[tested])
    return adjusted


def _off_diagonal(n: int) -> np.ndarray:
    return ~np.eye(n, dtype=bool)


def _size(matrix: Float[np.ndarray, "vector vector"]) -> float:
    return float(np.abs(matrix[_off_diagonal(len(matrix))]).max())


def _check_shapes(matrices: list[np.ndarray], names: list[str]) -> None:
    n_vectors = len(matrices[0])
    for matrix, name in zip(matrices, names, strict=True):
        if matrix.shape != (n_vectors, n_vectors):
            raise GeometryError(f"{name} must be [{n_vectors}, {n_vectors}] like the rows of a, not {list(matrix.shape)}")
        if n_vectors < MINIMUM_VECTORS:
            raise GeometryError(
                f"a Mantel test needs at least {MINIMUM_VECTORS} vectors, there are {n_vectors}: "
                f"their {math.factorial(n_vectors)} orders are too few for a p of .05"
            )
        if not np.isfinite(matrix[_off_diagonal(n_vectors)]).all():
            raise GeometryError(f"{name} contains cells off the diagonal that are not finite")


def _cells(values: Float[np.ndarray, " cell"], name: str, method: str) -> Float[np.ndarray, " cell"]:
    if np.ptp(values) <= 1e-12 * np.abs(values).max():
        raise GeometryError(f"{name} is constant off the diagonal ({values[0]:g}): it correlates with nothing")
    if method not in ("pearson", "spearman"):
        raise ValueError(f"method must be pearson or spearman, not {method!r}")
    return np.asarray(rankdata(values), dtype=np.float64) if method == "spearman" else values


def _basis(covariates: list[Float[np.ndarray, " cell"]], n_cells: int) -> Float[np.ndarray, "cell basis"]:
    """Orthonormal basis of the constant and the covariates."""
    if n_cells < len(covariates) + 3:
        raise GeometryError(f"{n_cells} cells are too few to hold {len(covariates)} covariates fixed")
    design = np.ones((n_cells, 1 + len(covariates)))
    for i, values in enumerate(covariates, start=1):
        design[:, i] = (values - values.mean()) / values.std()
    left, singular, _ = np.linalg.svd(design, full_matrices=False)
    return left[:, singular > 1e-9 * singular[0]]


def _residual(values: Float[np.ndarray, " cell"], held: Float[np.ndarray, "cell basis"], name: str) -> Float[np.ndarray, " cell"]:
    """What the constant and the covariates leave of the cells, at unit length."""
    centred = values - values.mean()
    residual = centred - held @ (held.T @ centred)
    length = float(np.linalg.norm(residual))
    if length <= 1e-9 * np.linalg.norm(centred):
        raise GeometryError(f"{name} is a linear function of the covariates: nothing is left to correlate")
    return residual / length

"""How far a direction can be trusted: split halves, cross-validated norm, and the test that a direction exists at all.

The unit is the question. Inner products are taken between disjoint sets of questions, because the plain norm of a mean is
inflated by its noise. See Chen et al. 2025 for the vectors, and Walther et al. 2016 for cross-validated distances.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

N_SPLITS = 200
N_FLIPS = 2000


@dataclass(frozen=True)
class Reliability:
    """Reliability of one direction per layer.

    Attributes:
        split_half: mean cosine between the directions of two random halves of the questions, stepped up by Spearman-Brown
            (2 r / (1 + r)); its square root tracks the cosine to the true direction.
        squared_norm: cross-validated squared norm, the mean of <d_i, d_j> over pairs of different questions: unbiased, so it
            can be negative where there is no direction. Squared residual-stream units.
        p_value: sign-flip test of that mean against zero, one-sided, p = (1 + #>=) / (1 + flips).
        n_questions: how many questions stand behind it.
    """

    split_half: Float[np.ndarray, " layer"]
    squared_norm: Float[np.ndarray, " layer"]
    p_value: Float[np.ndarray, " layer"]
    n_questions: int

    @property
    def norm(self) -> Float[np.ndarray, " layer"]:
        """Cross-validated norm: the square root of `squared_norm`, 0 where that is negative."""
        return np.sqrt(np.maximum(self.squared_norm, 0.0))


def gram(differences: Float[np.ndarray, "question layer d_model"]) -> Float[np.ndarray, "layer question question"]:
    """Inner products between the questions' differences, per layer, in fp64."""
    x = np.asarray(differences, dtype=np.float64)
    return np.einsum("ild,jld->lij", x, x)


def off_diagonal_mean(products: Float[np.ndarray, "layer question question"]) -> Float[np.ndarray, " layer"]:
    """Mean of <d_i, d_j> over i != j: the cross-validated squared norm of the mean difference."""
    n = products.shape[-1]
    return (products.sum((-2, -1)) - np.trace(products, axis1=-2, axis2=-1)) / (n * (n - 1))


def split_half_reliability(
    products: Float[np.ndarray, "layer question question"], *, n_splits: int = N_SPLITS, seed: int = 0
) -> Float[np.ndarray, " layer"]:
    """Spearman-Brown reliability of the mean over questions, from random halves (computed from inner products alone)."""
    n = products.shape[-1]
    rng = np.random.default_rng(seed)
    total = np.zeros(products.shape[0])
    for _ in range(n_splits):
        order = rng.permutation(n)
        a, b = order[: n // 2], order[n // 2 :]
        ab = products[:, a][:, :, b].mean((-2, -1))
        aa = products[:, a][:, :, a].mean((-2, -1))
        bb = products[:, b][:, :, b].mean((-2, -1))
        with np.errstate(invalid="ignore", divide="ignore"):
            total += np.where(aa * bb > 0, ab / np.sqrt(aa * bb), 0.0)
    r = total / n_splits
    return 2 * r / (1 + r)


def existence_p_value(
    products: Float[np.ndarray, "layer question question"], *, n_flips: int = N_FLIPS, seed: int = 0
) -> Float[np.ndarray, " layer"]:
    """Sign-flip test that the questions' differences share a direction.

    Under the null each question's difference is as likely as its opposite; the statistic is the mean of <d_i, d_j> over i != j.
    """
    n = products.shape[-1]
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(n_flips, n))
    diagonal = np.trace(products, axis1=-2, axis2=-1)
    observed = products.sum((-2, -1)) - diagonal
    flipped = np.einsum("fi,lij,fj->lf", signs, products, signs, optimize=True) - diagonal[:, None]
    return (1 + (flipped >= observed[:, None]).sum(-1)) / (1 + n_flips)


def assess(differences: Float[np.ndarray, "question layer d_model"], *, seed: int = 0) -> Reliability:
    """Reliability of the mean over questions.

    Args:
        differences: per question, the mean of the positive answers minus the mean of the negative ones.

    Raises:
        ValueError: fewer than four questions, or values that are not finite.
    """
    if len(differences) < 4:
        raise ValueError(
            f"reliability needs at least 4 questions, there are {len(differences)}: loosen the filter or add questions"
        )
    if not np.isfinite(differences).all():
        raise ValueError("the differences contain values that are not finite")
    products = gram(differences)
    return Reliability(
        split_half=split_half_reliability(products, seed=seed),
        squared_norm=off_diagonal_mean(products),
        p_value=existence_p_value(products, seed=seed),
        n_questions=len(differences),
    )

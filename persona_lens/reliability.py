"""How far a direction can be trusted: split halves, cross-validated norm, and the test that a direction exists at all.

The unit is the question. Inner products are taken between disjoint sets of questions, because the plain norm of a mean is
inflated by its noise. See Chen et al. 2025 for the vectors, and Walther et al. 2016 for cross-validated distances.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student_t

N_SPLITS = 200
N_FLIPS = 2000
MINIMUM_QUESTIONS = 6


@dataclass(frozen=True)
class Reliability:
    """Reliability of one direction per layer, over questions like these and for these instructions.

    Attributes:
        split_half: mean cosine between the directions of two random halves of the questions, stepped up by Spearman-Brown
            (2 r / (1 + r)); its square root tracks the cosine to the true direction.
        squared_norm: cross-validated squared norm, the mean of `<d_i, d_j>` over pairs of different questions: unbiased, so it
            can be negative where there is no direction. Squared residual-stream units.
        p_value: sign-flip test of that mean against zero at each layer, one-sided, p = (1 + #>=) / (1 + flips).
        p_any: the same test for "at some layer": every flip is given its own best layer, so choosing a layer costs nothing.
        n_questions: how many questions stand behind it.
    """

    split_half: Float[np.ndarray, " layer"]
    squared_norm: Float[np.ndarray, " layer"]
    p_value: Float[np.ndarray, " layer"]
    p_any: float
    n_questions: int

    @property
    def norm(self) -> Float[np.ndarray, " layer"]:
        """Cross-validated norm: the square root of `squared_norm`, 0 where that is negative."""
        return np.sqrt(np.maximum(self.squared_norm, 0.0))


def gram(differences: Float[np.ndarray, "question layer d_model"]) -> Float[np.ndarray, "layer question question"]:
    """Inner products between the questions' differences, per layer, in fp64 (squared units of the differences)."""
    x = np.asarray(differences, dtype=np.float64)
    return np.einsum("ild,jld->lij", x, x)


def off_diagonal_mean(products: Float[np.ndarray, "layer question question"]) -> Float[np.ndarray, " layer"]:
    """Mean of `<d_i, d_j>` over i != j: the cross-validated squared norm of the mean difference (Walther et al. 2016)."""
    n = products.shape[-1]
    return (products.sum((-2, -1)) - np.trace(products, axis1=-2, axis2=-1)) / (n * (n - 1))


def split_half_reliability(
    products: Float[np.ndarray, "layer question question"], *, n_splits: int = N_SPLITS, seed: int = 0
) -> Float[np.ndarray, " layer"]:
    """Spearman-Brown reliability of the mean over questions, from random halves (computed from inner products alone).

    A negative agreement is returned as it is: stepping it up would make it arbitrarily large.
    """
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
    return spearman_brown(total / n_splits)


def spearman_brown(r: Float[np.ndarray, " layer"]) -> Float[np.ndarray, " layer"]:
    """2 r / (1 + r) where r is positive, else r."""
    return np.where(r > 0, 2 * r / (1 + np.maximum(r, 0.0)), r)


def reestimated_reliability(
    estimate: Callable[[list[int]], Float[np.ndarray, "layer d_model"]], n_questions: int, *, n_splits: int = 20, seed: int = 0
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """Split-half reliability and cross-validated norm of any estimator, which is run anew on each half of the questions.

    Args:
        estimate: from questions, by their numbers, to the direction at every layer.
    """
    rng = np.random.default_rng(seed)
    cosines: list[Float[np.ndarray, " layer"]] = []
    products: list[Float[np.ndarray, " layer"]] = []
    for _ in range(n_splits):
        order = rng.permutation(n_questions).tolist()
        a, b = estimate(order[: n_questions // 2]), estimate(order[n_questions // 2 :])
        products.append((a * b).sum(-1))
        cosines.append(products[-1] / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + np.finfo(float).tiny))
    return spearman_brown(np.mean(cosines, axis=0)), np.sqrt(np.maximum(np.mean(products, axis=0), 0.0))


def _flips(n: int, n_flips: int, seed: int) -> Float[np.ndarray, "flip question"]:
    """Sign patterns: all of them (up to a common sign) where that is few, else random ones. The observed one is not among them."""
    if 2 ** (n - 1) <= n_flips:
        codes = np.arange(1, 2 ** (n - 1))
        return 1.0 - 2.0 * ((codes[:, None] >> np.arange(n)) & 1)
    return np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(n_flips, n))


def existence_p_values(
    products: Float[np.ndarray, "layer question question"], *, n_flips: int = N_FLIPS, seed: int = 0
) -> tuple[Float[np.ndarray, " layer"], float]:
    """Sign-flip test that the questions' differences share a direction: p at each layer, and p for any layer.

    Under the null each question's difference is as likely as its opposite; the statistic is the mean of `<d_i, d_j>` over i != j.
    For any layer it is divided by its spread under the flips and its maximum over layers is compared (max-T).
    """
    signs = _flips(products.shape[-1], n_flips, seed)
    diagonal = np.trace(products, axis1=-2, axis2=-1)
    observed = products.sum((-2, -1)) - diagonal
    flipped = np.einsum("fi,lij,fj->lf", signs, products, signs, optimize=True) - diagonal[:, None]
    slack = 1e-9 * np.abs(products).sum((-2, -1))
    p_value = (1 + (flipped >= (observed - slack)[:, None]).sum(-1)) / (1 + len(signs))
    spread = flipped.std(-1) + slack + np.finfo(float).tiny
    highest = float((observed / spread).max())
    p_any = (1 + int(((flipped / spread[:, None]).max(0) >= highest - 1e-9).sum())) / (1 + len(signs))
    return p_value, p_any


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
    p_value, p_any = existence_p_values(products, seed=seed)
    return Reliability(
        split_half=split_half_reliability(products, seed=seed),
        squared_norm=off_diagonal_mean(products),
        p_value=p_value,
        p_any=p_any,
        n_questions=len(differences),
    )


def jackknife_interval(
    estimate: Float[np.ndarray, "*shape"], left_out: Float[np.ndarray, "question *shape"]
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """95 % interval of a statistic from its values without each question (Student's t around the estimate, n - 1 degrees).

    A percentile bootstrap repeats questions, and repeated questions multiply their noise with itself: for norms and cosines it
    covers the truth in less than 80 % of cases at 20 questions. The jackknife of *unbiased* inner products repeats none.

    Args:
        left_out: the statistic without each question.

    Returns:
        Low and high.
    """
    n = len(left_out)
    spread = np.sqrt((n - 1) ** 2 / n) * left_out.std(0, ddof=1)
    half = float(student_t.ppf(0.975, n - 1)) * spread
    return np.asarray(estimate - half), np.asarray(estimate + half)


def sign_flip_test(
    values: Float[np.ndarray, "question test"], *, n_flips: int = N_FLIPS, seed: int = 0
) -> tuple[Float[np.ndarray, " test"], float]:
    """Two-sided sign-flip tests of zero means, p = (1 + #>=) / (1 + flips), and p of the largest (max-T over the tests)."""
    signs = _flips(len(values), n_flips, seed)
    scale = np.sqrt((values**2).sum(0)) + np.finfo(float).tiny
    observed, flipped = np.abs(values.sum(0)) / scale, np.abs(signs @ values) / scale
    p_value = (1 + (flipped >= observed - 1e-9).sum(0)) / (1 + len(signs))
    p_largest = (1 + int((flipped.max(1) >= observed.max() - 1e-9).sum())) / (1 + len(signs))
    return p_value, p_largest


def shared_baseline_interval(effects: Float[np.ndarray, "direction question"]) -> tuple[float, tuple[float, float]]:
    """Mean effect of several directions that were all compared with the same unsteered answers, and its 95 % interval.

    The directions' means share the error of those answers, which shows in the variation over questions: both variations add up.

    Returns:
        The mean, and its interval (low, high).
    """
    mean, over_questions = mean_interval(effects.mean(0))
    _, over_directions = mean_interval(effects.mean(1))
    half = float(np.hypot(over_questions[1] - mean, over_directions[1] - mean))
    return mean, (mean - half, mean + half)


def mean_interval(values: Float[np.ndarray, " unit"]) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % interval by Student's t over independent units.

    Calibrated for ten or more units of moderate skew (92-98 % coverage in the tests). Where a quarter of the questions carries the
    whole effect, ten questions give about 93 % and six about 82 %.

    Returns:
        The mean, and its interval (low, high).
    """
    mean = float(values.mean())
    half = (
        float(student_t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / np.sqrt(len(values))
        if len(values) > 1
        else np.inf
    )
    return mean, (mean - float(half), mean + float(half))

"""Estimators: from positive and negative activations at one layer to a direction.

An estimator is a function `(positive [unit, d_model], negative [unit, d_model]) -> direction [d_model]` with a word on its units:
questions (equal weight each), cells (question x instruction), or single rollouts. Directions that are not mean differences
are scaled so that a coefficient still counts mean differences along them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from jaxtyping import Float

Units = Literal["question", "cell", "rollout"]
Filter = Literal["independent", "pairwise"]
Positive = Float[np.ndarray, "positive d_model"]
Negative = Float[np.ndarray, "negative d_model"]
Direction = Float[np.ndarray, " d_model"]
DirectionOf = Callable[[Positive, Negative], Direction]


@dataclass(frozen=True)
class Estimator:
    """A direction function, the units it is given, and the filter that decides which rollouts count.

    Attributes:
        direction: from positive and negative residuals [unit, d_model] at a layer, in fp64, to a direction [d_model].
        units: means of a question ("question"), of a question under an instruction ("cell"), or these repeated by rollout.
        keep: each side's survivors ("independent"), or pairs both of which survive ("pairwise", as the authors' code).
    """

    name: str
    direction: DirectionOf
    units: Units = "question"
    keep: Filter = "independent"


def mean_difference(positive: Positive, negative: Negative) -> Direction:
    """mean(positive) - mean(negative) (Chen et al. 2025, section 2.2)."""
    return positive.mean(0) - negative.mean(0)


def _scaled(direction: Direction, positive: Positive, negative: Negative) -> Direction:
    """The direction with the length (and sign) of the mean difference along it."""
    unit = direction / np.linalg.norm(direction)
    return unit * float(mean_difference(positive, negative) @ unit)


def logistic(positive: Positive, negative: Negative) -> Direction:
    """Normal of the separating plane of an L2-regularised logistic regression on globally scaled activations."""
    from sklearn.linear_model import LogisticRegression

    x = np.concatenate([positive, negative])
    y = np.repeat([1, 0], [len(positive), len(negative)])
    scale = float(np.sqrt(((x - x.mean(0)) ** 2).mean())) or 1.0
    model = LogisticRegression(C=1.0, max_iter=2000).fit((x - x.mean(0)) / scale, y)
    return _scaled(model.coef_[0], positive, negative)


def lda(positive: Positive, negative: Negative) -> Direction:
    """Linear discriminant: the mean difference through the inverse of the Ledoit-Wolf within-class covariance."""
    from sklearn.covariance import ledoit_wolf

    within = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
    covariance, _ = ledoit_wolf(within, assume_centered=True)
    return _scaled(np.linalg.solve(covariance, mean_difference(positive, negative)), positive, negative)


def first_component(positive: Positive, negative: Negative) -> Direction:
    """First principal component of the units' differences, not centred (units of both sides must correspond).

    Raises:
        ValueError: the two sides have different numbers of units.
    """
    if positive.shape != negative.shape:
        raise ValueError(f"the first component needs paired units, got {len(positive)} positive and {len(negative)} negative")
    _, _, components = np.linalg.svd(positive - negative, full_matrices=False)
    return _scaled(components[0], positive, negative)


MEAN_DIFFERENCE: Final = Estimator("mean_difference", mean_difference)
"""The default: every question counts alike."""
PAPER: Final = Estimator("paper", mean_difference, units="rollout", keep="pairwise")
"""The authors' code: pooled over answers, pairwise filter."""
LOGISTIC: Final = Estimator("logistic", logistic, units="cell")
"""The normal of a logistic regression on means per instruction and question."""
LDA: Final = Estimator("lda", lda, units="cell")
"""Linear discriminant analysis on means per instruction and question."""
FIRST_COMPONENT: Final = Estimator("first_component", first_component)
"""The first principal component of the questions' differences."""
ESTIMATORS: Final = (MEAN_DIFFERENCE, PAPER, LOGISTIC, LDA, FIRST_COMPONENT)
"""All that are built in, for `ExtractionRun.vectors_for`."""

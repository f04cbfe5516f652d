"""From a trait to its persona vector: prompts, rollouts, scores, filter, pooled residuals, direction, reliability."""

from persona_lens.extraction.estimators import (
    ESTIMATORS,
    FIRST_COMPONENT,
    LDA,
    LOGISTIC,
    MEAN_DIFFERENCE,
    PAPER,
    Estimator,
    first_component,
    lda,
    logistic,
    mean_difference,
)
from persona_lens.extraction.filtering import Counts, Thresholds, keep_independent, keep_pairwise
from persona_lens.extraction.pipeline import ExtractionSettings, extract
from persona_lens.extraction.run import ExtractionRun, load_run, trait_of

__all__ = [
    "ESTIMATORS",
    "FIRST_COMPONENT",
    "LDA",
    "LOGISTIC",
    "MEAN_DIFFERENCE",
    "PAPER",
    "Counts",
    "Estimator",
    "ExtractionRun",
    "ExtractionSettings",
    "Thresholds",
    "extract",
    "first_component",
    "keep_independent",
    "keep_pairwise",
    "lda",
    "load_run",
    "logistic",
    "mean_difference",
    "trait_of",
]

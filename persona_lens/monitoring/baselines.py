"""What the prompt's text alone foretells: a projection that does no better than words has read nothing but the prompt.

All values are predicted out of fold, by logistic regression on soft labels: each cell enters twice, weighted by its answers above
50 and by its other answers. Predictions of different folds need a common zero: a fold without the condition of the highest scores
learns a lower base rate, and raw predictions of a text that tells nothing come out *negatively* correlated with the scores. So
every fold's predictions are told relative to the fold's own mean (in log odds), and the mean over folds is added back. Measured
without any signal, 8 conditions of unlike base rates left out one at a time:

- raw: AUROC .34 to .43, r overall -.2 to -.4, r over the means of conditions -.6 to -1;
- classes balanced within folds: AUROC .44 to .48, r over the means -.2 to -.9;
- relative to the fold: AUROC .49 to .50, r overall 0 to -.04, r over the means 0 to -.15; with a single number such as length
  AUROC .46 to .50, r overall -.05 to -.10, r over the means -.08 to -.17.

With groups of questions left out: AUROC .48 to .52, r overall -.03 to +.03.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from persona_lens.errors import MonitoringError
from persona_lens.monitoring.content import Embedding
from persona_lens.monitoring.prediction import Outcomes, Predictor

HeldOut = Literal["questions", "conditions"]
GROUPS: Final = 5
DIGITS: Final = 9  # of a probability: what differs less differs by the rounding of its fold, which knows what it left out
WORD: Final = r"(?u)\b\w+\b"


def text_baseline(
    texts: Sequence[Sequence[str]], outcomes: Outcomes, held_out: HeldOut, embed: Embedding | None = None, *, seed: int = 0
) -> Predictor:
    """P(score > 50) from the prompts' words: TF-IDF of words and pairs of words, or an embedding, and logistic regression.

    Where all answers above 50 (or all others) stand in one fold, the rest teaches nothing about it and its values are NaN. A guess
    would be arbitrary (the rest's base rate gives AUROC 0, the mean of the other predictions up to .75, all without any signal).

    Args:
        texts: whole prompts, by condition and question.
        held_out: "questions": five groups of questions, each predicted from the others under the same conditions. A strong
            baseline, and not a fair one: it has been told how each system prompt scores, which no monitor is. "conditions": each
            condition is predicted from the others, with the same questions: the fair one. As a projection does, it
            meets a system prompt that it has no scores of, but it does know how the questions score elsewhere.
        embed: what makes features of texts, e.g. a sentence encoder; they are standardised within each training fold.
        seed: of the groups of questions.

    Raises:
        MonitoringError: texts of other conditions or questions, or without a word, too few conditions or questions to hold some
            out, or embeddings that are not one finite row per text.
    """
    if len(texts) != len(outcomes.conditions) or any(len(row) != len(outcomes.questions) for row in texts):
        raise MonitoringError(
            f"texts must hold one prompt per condition and question, {len(outcomes.conditions)} x {len(outcomes.questions)}, "
            f"not {len(texts)} rows of {sorted({len(row) for row in texts})}: take both from the same study"
        )
    flat = [text for row in texts for text in row]
    if empty := [i for i, text in enumerate(flat) if not re.search(WORD, text)]:
        c, q = divmod(empty[0], len(outcomes.questions))
        raise MonitoringError(
            f"the text of condition {outcomes.conditions[c]!r}, question {outcomes.questions[q]!r} has no word: give whole prompts"
        )
    if embed is None:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)
        model = make_pipeline(words, LogisticRegression(max_iter=1000))
        return _out_of_fold("text", model, np.array(flat, dtype=object), outcomes, held_out, seed)
    features = np.asarray(embed(flat), dtype=np.float64)
    if features.ndim != 2 or len(features) != len(flat) or not np.isfinite(features).all():
        raise MonitoringError(f"embed must give a finite row for each of {len(flat)} texts, not shape {features.shape}: mend it")
    return _out_of_fold("embedded text", _standardised(features), features, outcomes, held_out, seed)


def length_baseline(
    lengths: Float[np.ndarray, "condition question"], outcomes: Outcomes, held_out: HeldOut, *, seed: int = 0
) -> Predictor:
    """P(score > 50) from the prompts' lengths alone, by logistic regression; folds as in `text_baseline`.

    Raises:
        MonitoringError: lengths of other conditions or questions, or not finite, or too few of them to hold some out.
    """
    if lengths.shape != outcomes.score.shape or not np.isfinite(lengths).all():
        raise MonitoringError(
            f"lengths must be finite and one per condition and question, {outcomes.score.shape}, not {lengths.shape}: "
            "count the tokens of every prompt"
        )
    features = np.asarray(lengths, dtype=np.float64).reshape(-1, 1)
    return _out_of_fold("prompt length", _standardised(features), features, outcomes, held_out, seed)


def _standardised(features: Float[np.ndarray, "cell feature"]) -> Pipeline:
    """Regression on standardised features; the penalty is per row of length 1, as TF-IDF's rows are, however many features."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / features.shape[1], max_iter=1000))


def _folds(outcomes: Outcomes, held_out: HeldOut, seed: int) -> Iterator[Bool[np.ndarray, "condition question"]]:
    """The cells that are held out, fold by fold; which questions go together does not depend on their order."""
    parts = GROUPS if held_out == "questions" else 2
    n = len(outcomes.questions if held_out == "questions" else outcomes.conditions)
    if n < parts:
        raise MonitoringError(f"to hold out {held_out} takes at least {parts} of them, there are {n}: add {held_out}")
    if held_out == "conditions":
        groups, shape = [np.array([c]) for c in range(n)], (n, 1)
    else:
        by_name = np.argsort(np.array(outcomes.questions), kind="stable")
        groups, shape = np.array_split(np.random.default_rng(seed).permutation(by_name), GROUPS), (1, n)
    for group in groups:
        yield np.broadcast_to(np.isin(np.arange(n), group).reshape(shape), outcomes.score.shape)


def _out_of_fold(name: str, model: Pipeline, rows: Any, outcomes: Outcomes, held_out: HeldOut, seed: int) -> Predictor:
    """Every cell's P(score > 50) by a model that was fitted without its fold, relative to what that model gives its own cells."""
    odds, means = np.full(outcomes.score.size, np.nan), list[float]()
    for fold in _folds(outcomes, held_out, seed):
        held, train = fold.ravel(), np.flatnonzero(~fold.ravel())
        if _fitted(model, rows, train, outcomes):
            means.append(float(model.decision_function(rows[train]).mean()))
            odds[held] = model.decision_function(rows[held]) - means[-1]
    values = np.round(expit(odds + np.mean(means or [0.0])), DIGITS)
    return Predictor(f"{name}, unseen {held_out}", values.reshape(outcomes.score.shape))


def _fitted(model: Pipeline, rows: Any, train: Int[np.ndarray, " cell"], outcomes: Outcomes) -> bool:
    """Fit the model to cells, each once as above 50 and once as not, weighted by its answers; not if one class is missing."""
    above, below = outcomes.above.ravel()[train], outcomes.below.ravel()[train]
    if not (above.any() and below.any()):
        return False
    weights = np.concatenate([above, below])
    model.fit(rows[np.tile(train, 2)], np.repeat([1, 0], len(train)), logisticregression__sample_weight=weights)
    return True

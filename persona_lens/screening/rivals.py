"""What must stand beside screening by activations: scores of answers from their text alone.

A judge reads every answer, which costs most, and sees what can be seen. A classifier of words costs next to nothing: trained on the
very answers that a persona vector comes from, it is the fair rival. Rows that both find could have been found without the model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from persona_lens.errors import RunFolderError, ScreeningError
from persona_lens.extraction import ExtractionRun, Thresholds, keep_independent
from persona_lens.judges import Judge, Judged, judged
from persona_lens.prompts import POLARITIES, Polarity
from persona_lens.store import digest
from persona_lens.traits import Trait

LEAST_TEXTS: Final = 10  # of each side
FOLDS: Final = 5
WORDS: Final[dict[str, Any]] = {"ngram_range": (1, 2), "sublinear_tf": True, "token_pattern": r"(?u)\b\w+\b"}
REGRESSION: Final[dict[str, Any]] = {"C": 1.0, "max_iter": 1000, "tol": 1e-8}  # log odds are exact to 1e-6
NO_WORD: Final = "no word of it is among the classifier's"

Rated = tuple[Float[np.ndarray, " row"], list[str | None]]  # scores, NaN where there is none, and why there is none


@runtime_checkable
class Rival(Protocol):
    """Scores of answers from their text: the more of the trait, the higher, each whatever the other answers are.

    It travels to worker processes, so it must survive pickling. `name` goes into column names and the run's record; `identity` is a
    digest of what the scores depend on. Called with answers it gives their scores, NaN where there is none, and per answer the
    reason why there is none, or None. `rated` holds it to that.
    """

    @property
    def name(self) -> str:
        """What columns and records call it."""
        ...

    @property
    def identity(self) -> str:
        """A digest of what the scores depend on."""
        ...

    def __call__(self, answers: Sequence[Judged], /) -> Rated: ...


def rated(rival: Rival, answers: Sequence[Judged]) -> Rated:
    """A rival's scores, one per answer, and the reasons for those that are missing.

    Raises:
        ScreeningError: it gave another number of either, an infinite score, NaN without a reason or a score with one.
    """
    scores, reasons = rival(answers)
    if scores.shape != (len(answers),) or len(reasons) != len(answers):
        raise ScreeningError(
            f"rival {rival.name!r} gave scores of shape {scores.shape} and {len(reasons)} reasons for {len(answers)} answers: "
            "it must give one of each per answer, in order"
        )
    wrong = np.isinf(scores) | (np.isnan(scores) != np.array([bool(r) for r in reasons], dtype=bool))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ScreeningError(
            f"rival {rival.name!r} gave answer {row} the score {scores[row]} and the reason {reasons[row]!r}: "
            "it must give a finite number and None, or NaN and a reason"
        )
    return scores, reasons


@dataclass(frozen=True)
class _JudgeRival:
    judge: Judge
    trait: Trait

    @property
    def name(self) -> str:
        return f"judge: {self.trait.name}"

    @property
    def identity(self) -> str:
        return digest(json.dumps(["judge", self.judge.name, self.trait.model_dump(by_alias=True)], sort_keys=True))

    def __call__(self, answers: Sequence[Judged], /) -> Rated:
        scores = judged(self.judge, self.trait, answers)
        values = np.array([np.nan if s.trait is None else s.trait for s in scores], dtype=np.float64)
        return values, [s.reason if s.trait is None else None for s in scores]


def judge_rival(judge: Judge, trait: Trait) -> Rival:
    """A judge's trait scores, 0-100; its coherence scores are left out.

    Two judges of one name have one identity: a judge must be named after all that its scores depend on. A scripted judge can be
    pickled if its function stands at the top level of a module.
    """
    return _JudgeRival(judge, trait)


@dataclass(frozen=True, eq=False)
class _WordModel:
    """Log odds of the positive side: a bias, and a weight for every word and pair of words."""

    words: TfidfVectorizer
    weights: Float[np.ndarray, " word"]
    bias: float

    def odds(self, texts: Sequence[str]) -> Float[np.ndarray, " row"]:
        """NaN where a text has no word that the model knows."""
        if not texts:
            return np.zeros(0)
        rows = self.words.transform(texts)
        return np.where(np.diff(rows.indptr) > 0, rows @ self.weights + self.bias, np.nan)


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """A rival: log odds (natural) of the positive side by the words and pairs of words of an answer. Its question is not read.

    Attributes:
        auc: share of pairs of a positive and a negative text that are put in the right order by a classifier trained on the answers
            to other questions. Ties count half; pairs are taken within each of five groups of questions, so that one classifier
            scores both texts. NaN where no group has both sides.
        texts: how many positive and negative texts it was trained on.
    """

    name: str
    identity: str
    auc: float
    texts: tuple[int, int]
    model: _WordModel

    def __call__(self, answers: Sequence[Judged], /) -> Rated:
        odds = self.model.odds([a.answer for a in answers])
        return odds, [NO_WORD if np.isnan(o) else None for o in odds]


def text_classifier(
    positive: Sequence[str], negative: Sequence[str], name: str, *, questions: tuple[Sequence[str], Sequence[str]] | None = None
) -> TextClassifier:
    """Logistic regression on TF-IDF of words and pairs of words, trained on texts of two sides; their order does not matter.

    Args:
        name: of the rival, such as "text: evil".
        questions: which question each positive and each negative text answers: the AUC is measured on questions that are left out.
            Without them texts are left out, equal ones together.

    Raises:
        ScreeningError: fewer than 10 texts on a side, not one question per text, fewer than two different questions (without them:
            texts), or no word in any text.
    """
    for side, texts in (("positive", positive), ("negative", negative)):
        if len(texts) < LEAST_TEXTS:
            raise ScreeningError(
                f"{name}: a text classifier needs at least {LEAST_TEXTS} {side} texts, not {len(texts)}: sample more answers"
            )
    asked = questions or (positive, negative)
    if (given := tuple(map(len, asked))) != (wanted := (len(positive), len(negative))):
        raise ScreeningError(f"{name}: there must be one question per text, {wanted} by side, not {given}")
    both = ((1, asked[0], positive), (0, asked[1], negative))
    rows = sorted((q, t, side) for side, of_side, texts in both for q, t in zip(of_side, texts, strict=True))
    groups, texts, sides = [q for q, _, _ in rows], [t for _, t, _ in rows], np.array([s for _, _, s in rows])
    if len(set(groups)) < 2:
        raise ScreeningError(f"{name}: all texts answer {groups[0]!r}, so no question can be left out: give answers to several")
    model = _trained(texts, sides)
    if model is None:
        raise ScreeningError(f"{name}: no text has a word: give answers, not punctuation")
    identity = digest(json.dumps(["text", WORDS, REGRESSION, sorted(positive), sorted(negative)], sort_keys=True))
    return TextClassifier(name, identity, _auc(groups, texts, sides), wanted, model)


def classifier_of(run: ExtractionRun) -> TextClassifier:
    """A classifier trained on the answers that an extraction's vector comes from: it has seen what the vector has seen.

    Those are the answers that the filter keeps on each side, of questions that have some on both.

    Raises:
        RunFolderError: the folder is damaged.
        ScreeningError: fewer than 10 answers on a side, or no word in them.
    """
    positive, negative = (_kept(run, polarity) for polarity in POLARITIES)
    shared = {q for q, _ in positive} & {q for q, _ in negative}
    sides = [[(q, t) for q, t in side if q in shared] for side in (positive, negative)]
    (of_positive, positive), (of_negative, negative) = (([q for q, _ in side], [t for _, t in side]) for side in sides)
    return text_classifier(positive, negative, f"text: {run.trait}", questions=(of_positive, of_negative))


def _kept(run: ExtractionRun, polarity: Polarity) -> list[tuple[str, str]]:
    """Question and text of the answers of one polarity that the filter keeps."""
    rollouts, scores = run.rollouts(), run.scores()
    if len(rollouts) != len(scores):
        raise RunFolderError(f"{run.path}: holds {len(rollouts)} rollouts and {len(scores)} scores: extract anew")
    asked = [r.prompt_id.split("/") for r in rollouts]  # trait, polarity, instruction, question
    rows = [i for i, (_, of, _, _) in enumerate(asked) if of == polarity]
    thresholds = Thresholds(**run.manifest["arguments"]["thresholds"])
    kept, _ = keep_independent([rollouts[i] for i in rows], [scores[i] for i in rows], polarity, thresholds)
    return [(asked[i][3], rollouts[i].text) for i, keep in zip(rows, kept, strict=True) if keep]


def _trained(texts: Sequence[str], sides: Int[np.ndarray, " text"]) -> _WordModel | None:
    """The model of texts whose side is 1 against those whose side is 0; None where a side or any word is missing."""
    words = TfidfVectorizer(**WORDS)
    known = words.build_analyzer()
    if len(set(sides.tolist())) < 2 or not any(known(t) for t in texts):
        return None
    regression = LogisticRegression(**REGRESSION).fit(words.fit_transform(texts), sides)
    return _WordModel(words, regression.coef_[0], float(regression.intercept_[0]))


def _auc(groups: Sequence[str], texts: Sequence[str], sides: Int[np.ndarray, " text"]) -> float:
    ordered = pairs = 0.0
    for train, held in GroupKFold(min(FOLDS, len(set(groups)))).split(texts, groups=groups):
        model = _trained([texts[int(i)] for i in train], sides[train])
        if model is None:
            continue
        odds = model.odds([texts[int(i)] for i in held])
        ranks, up = rankdata(odds[np.isfinite(odds)]), sides[held][np.isfinite(odds)] == 1
        ordered += float(ranks[up].sum()) - up.sum() * (up.sum() + 1) / 2
        pairs += float(up.sum() * (~up).sum())
    return float(ordered / pairs) if pairs else float("nan")

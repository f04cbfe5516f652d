"""How far a judge can be trusted: against labels (Chen et al. 2025 report 94.7 % agreement with people at 50), and against itself.

The unit is the example; examples that share a question are one cluster, because a judge errs on questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import beta, spearmanr
from sklearn.metrics import cohen_kappa_score

from persona_lens.errors import PersonaLensError
from persona_lens.judges.judge import Judge, Judged, grouped, judged
from persona_lens.traits import Trait

LINE: Final = 50.0  # scores from here on count as showing the trait (Chen et al. 2025)
BINS: Final = 10
LEAST_QUESTIONS: Final = 10  # for an interval
NAN: Final = float("nan")


@dataclass(frozen=True)
class Labelled:
    """An answer with the score that it ought to have, 0-100.

    Raises:
        PersonaLensError: a score outside 0-100.
    """

    question: str
    answer: str
    score: float

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 100:
            raise PersonaLensError(f"a label lies in 0-100, not {self.score}: give the trait score that people agree on")


@dataclass(frozen=True)
class JudgeCheck:
    """How a judge's trait scores compare with labels. What is not defined (too few examples, no variation) is NaN.

    Attributes:
        judge, trait: names.
        n: examples with a score; the figures are about these.
        questions: different questions among them.
        gaps: examples without a trait score, by reason (numbers in it left out).
        agreement: share of examples that judge and label put on the same side of 50 (50 counts as showing the trait).
        low, high: its 95 % interval over questions like these; NaN below ten questions.
        kappa: Cohen's kappa of the two sides.
        weighted_kappa: Cohen's kappa with quadratic weights on ten bins of ten points (100 falls into the last).
        mean_error: mean absolute difference, in points.
        bias: mean of judge minus label, in points.
        spearman: rank correlation.
    """

    judge: str
    trait: str
    n: int
    questions: int
    gaps: Mapping[str, int]
    agreement: float
    low: float
    high: float
    kappa: float
    weighted_kappa: float
    mean_error: float
    bias: float
    spearman: float


def check_judge(judge: Judge, trait: Trait, labelled: Sequence[Labelled]) -> JudgeCheck:
    """Compare a judge with labels.

    Raises:
        PersonaLensError: no examples, or what the judge raises.

    Example:
        >>> from persona_lens.judges import Labelled, check_judge
        >>> labelled = [
        ...     Labelled("How should I handle my dog?", "With respect, I beg your pardon.", score=90.0),
        ...     Labelled("How should I handle my dog?", "Start early and prepare the dog.", score=10.0),
        ... ]
        >>> check = check_judge(pl.judges.oracle(), pl.load_trait("politeness", "pocket"), labelled)
        >>> check.n, check.gaps
        (2, {})
    """
    if not labelled:
        raise PersonaLensError("no labelled examples: give some dozens at least, from 0 to 100")
    scores = judged(judge, trait, [Judged(e.question, e.answer) for e in labelled])
    pairs = [(e, s.trait) for e, s in zip(labelled, scores, strict=True) if s.trait is not None]
    gaps = grouped(s.reason or "" for s in scores if s.trait is None)
    label = np.array([float(e.score) for e, _ in pairs])
    found = np.array([float(value) for _, value in pairs])
    _, question = np.unique([e.question for e, _ in pairs], return_inverse=True)
    same = ((label >= LINE) == (found >= LINE)).astype(np.float64)
    low, high = share_interval(same, np.asarray(question, dtype=np.int64))
    some = len(pairs) > 0
    return JudgeCheck(
        judge=judge.name,
        trait=trait.name,
        n=len(pairs),
        questions=len(set(question.tolist())),
        gaps=gaps,
        agreement=float(same.mean()) if some else NAN,
        low=low,
        high=high,
        kappa=_kappa(label >= LINE, found >= LINE),
        weighted_kappa=_kappa(_bins(label), _bins(found), weights="quadratic"),
        mean_error=float(np.abs(found - label).mean()) if some else NAN,
        bias=float((found - label).mean()) if some else NAN,
        spearman=_spearman(label, found),
    )


def share_interval(hits: Float[np.ndarray, " example"], cluster: Int[np.ndarray, " example"]) -> tuple[float, float]:
    """95 % interval of a share, by Clopper and Pearson, with clusters counted and not examples.

    The number of clusters is Kish's, (sum m)^2 / sum m^2 for m examples each: as if the examples of one were all alike. Where they
    are not, the interval is too wide. (A variance over clusters is no substitute: clusters that miss are too few to show in it.)
    """
    sizes = np.bincount(cluster) if len(cluster) else np.zeros(0)
    if np.count_nonzero(sizes) < LEAST_QUESTIONS:
        return NAN, NAN
    known = float(sizes.sum() ** 2 / (sizes**2).sum())
    hit = float(hits.mean()) * known
    low = float(beta.ppf(0.025, hit, known - hit + 1)) if hit > 0 else 0.0
    high = float(beta.ppf(0.975, hit + 1, known - hit)) if hit < known else 1.0
    return low, high


@runtime_checkable
class Repeatable(Protocol):
    """A judge that draws anew: `repeated(k)` is the same judge with other seeds."""

    def repeated(self, number: int, /) -> Judge: ...


@dataclass(frozen=True)
class Repeatability:
    """How far a judge agrees with itself when it judges the same answers again. What is not defined is NaN.

    Attributes:
        repeats: how often each answer was judged.
        n: answers that had a trait score every time; the figures are about these.
        gaps: answers that had none at least once.
        spread: standard deviation of a score over repeats, in points: the root of the mean variance.
        icc: share of the variance of single scores that is between answers, ICC(1): one-way, absolute agreement.
        correlation: mean Pearson correlation between two repeats.
    """

    repeats: int
    n: int
    gaps: int
    spread: float
    icc: float
    correlation: float


def repeatability(judge: Judge, trait: Trait, answers: Sequence[Judged], repeats: int = 3) -> Repeatability:
    """Judge the same answers several times; a judge with `repeated` draws with other seeds, any other is called again as it is.

    Raises:
        PersonaLensError: fewer than two repeats or answers.
    """
    if repeats < 2 or len(answers) < 2:
        raise PersonaLensError(f"repeatability needs at least 2 repeats and 2 answers, not {repeats} and {len(answers)}")
    again = [judge.repeated(k) if isinstance(judge, Repeatable) else judge for k in range(repeats)]
    rows = [[s.trait for s in judged(j, trait, answers)] for j in again]
    whole = [column for column in zip(*rows, strict=True) if None not in column]
    x = np.array([[cast(float, v) for v in column] for column in whole], dtype=np.float64).reshape(len(whole), repeats)
    gaps = len(answers) - len(whole)
    if len(whole) < 2:
        return Repeatability(repeats, len(whole), gaps, NAN, NAN, NAN)
    within = float(x.var(1, ddof=1).mean())
    between = repeats * float(x.mean(1).var(ddof=1))
    total = between + (repeats - 1) * within
    pairs = [_pearson(x[:, a], x[:, b]) for a in range(repeats) for b in range(a)]
    return Repeatability(
        repeats=repeats,
        n=len(whole),
        gaps=gaps,
        spread=float(np.sqrt(within)),
        icc=(between - within) / total if total > 0 else NAN,
        correlation=float(np.mean(pairs)),
    )


def _bins(scores: Float[np.ndarray, " example"]) -> Int[np.ndarray, " example"]:
    return np.minimum(scores // (100 / BINS), BINS - 1).astype(np.int64)


def _kappa(label: np.ndarray, found: np.ndarray, weights: str | None = None) -> float:
    """NaN where both say one and the same thing of every example."""
    if len(set(label.tolist()) | set(found.tolist())) < 2:
        return NAN
    labels = None if weights is None else list(range(BINS))  # so that bins that do not occur keep their distance
    return float(cohen_kappa_score(label, found, labels=labels, weights=weights))


def _spearman(label: Float[np.ndarray, " example"], found: Float[np.ndarray, " example"]) -> float:
    if len(label) < 3 or not np.ptp(label) or not np.ptp(found):
        return NAN
    return float(cast("tuple[float, float]", spearmanr(label, found))[0])


def _pearson(a: Float[np.ndarray, " answer"], b: Float[np.ndarray, " answer"]) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else NAN

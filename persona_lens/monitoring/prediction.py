"""How well a projection that is read before the answer foretells what the answer will be (Chen et al. 2025, monitoring).

The unit is the cell: one condition (a graded system prompt, a number of examples in context), one question, and the mean trait
score of some ten answers. Every interval is a 95 % jackknife over questions: one question is left out of all conditions at a time.
The conditions are what they are: nothing here says how other system prompts would fare.

Over 1,000 simulated sets of 20 and of 10 questions, in 8, 5 and 3 conditions, with floors, ceilings and gaps, the intervals hold
the truth in 92 % to 97 % of cases; `between`, where r is near 1, in up to 99.6 % (too far down, never too short). All are too
short where a few questions have far larger effects than the others in every condition: with lognormal effects of sigma .6
`overall` holds the truth in 90 % of cases, of sigma .8 in 85 %. Nothing in such a sample tells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, logit
from scipy.stats import t as student_t

from persona_lens.errors import MonitoringError
from persona_lens.reliability import MINIMUM_QUESTIONS, jackknife_interval

LEAST_RELIABILITY: Final = 0.5
INTERVAL_RELIABILITY: Final = 0.8
LEAST_CONDITIONS: Final = 3
N_DIRECTIONS: Final = 200
N_ANGLES: Final = 1441
PERFECT: Final = 1 - 1e-12  # a correlation above it is 1 but for rounding
STILL: Final = 1e-12  # a figure that changes less without a question changes by rounding
SPREAD: Final = 1e-9  # of a number's size: what varies less varies by rounding


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What the answers turned out to be.

    Attributes:
        score: mean trait score (0-100) of the cell's scored answers; NaN without any.
        above: how many of its scored answers score above 50.
        answers: how many are scored.

    Raises:
        MonitoringError: shapes, counts or scores that contradict each other.
    """

    conditions: tuple[str, ...]
    questions: tuple[str, ...]
    score: Float[np.ndarray, "condition question"]
    above: Float[np.ndarray, "condition question"]
    answers: Float[np.ndarray, "condition question"]

    def __post_init__(self) -> None:
        for name in ("score", "above", "answers"):
            _require_shape(f"outcomes.{name}", getattr(self, name), self)
        if not ((self.above >= 0) & (self.above <= self.answers)).all():
            raise MonitoringError("a cell has more answers above 50 than it has scored answers: count both over the same answers")
        if (np.isfinite(self.score) != (self.answers > 0)).any():
            raise MonitoringError(
                "a cell's score is a number where it has scored answers and NaN where it has none: mend the others"
            )

    @property
    def below(self) -> Float[np.ndarray, "condition question"]:
        """How many of a cell's scored answers do not score above 50."""
        return self.answers - self.above

    def of(self, questions: Sequence[int]) -> "Outcomes":
        """The same for some of the questions, by their places.

        Raises:
            MonitoringError: no question, one twice, or no such question.
        """
        chosen = list(questions)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(self.questions))):
            raise MonitoringError(f"choose different questions from 0 to {len(self.questions) - 1}, not {chosen}")
        kept = tuple(self.questions[q] for q in chosen)
        return Outcomes(self.conditions, kept, self.score[:, chosen], self.above[:, chosen], self.answers[:, chosen])


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval over questions; NaN where there is none."""

    value: float
    low: float
    high: float


NOTHING: Final = Estimate(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Correlations:
    """Pearson correlations of values with mean scores.

    Attributes:
        overall: over all cells.
        between: over the conditions' means, conditions counting alike, freed of the noise that few questions leave in those means
            (from products of different questions): what endless questions would give. Its interval treats the conditions as fixed:
            it says how well r over *these* conditions is known, not r over other conditions. NaN for fewer than three
            conditions, and where noise is more than half of the variance of the means of values or of scores (reliability
            below .5); no interval below .8.
        between_plain: r of the plain means. Noise makes it too small, near r = 1 by more than questions make it
            vary: a jackknife interval around it would hold the truth in 10 % to 90 % of cases.
        within: over the questions of one condition, averaged over conditions (Fisher z, weighted by questions less 3). What it
            says holds for the conditions that are not left out.
        left_out: conditions that `within` leaves out: values or scores do not vary, or fewer than six questions. At a floor of
            zero scores these are the ones of no correlation.
        cells: how many cells have both a value and a score.
    """

    overall: Estimate
    between: Estimate
    between_plain: float
    within: Estimate
    left_out: int
    cells: int


@dataclass(frozen=True, eq=False)
class Predictor:
    """A number per cell that is known before the answer; its scale is free. NaN: not known for that cell."""

    name: str
    values: Float[np.ndarray, "condition question"]

    def of(self, questions: Sequence[int]) -> "Predictor":
        """The same for some of the questions, by their places."""
        return Predictor(self.name, self.values[:, list(questions)])


@dataclass(frozen=True)
class Skill:
    """How well a predictor foretells, on the cells that it has."""

    name: str
    correlations: Correlations
    auroc: Estimate


@dataclass(frozen=True)
class Advantage:
    """How much better the main predictor foretells than another: differences on the cells that both have."""

    over: str
    overall: Estimate
    auroc: Estimate


@dataclass(frozen=True)
class Comparison:
    """A predictor beside others; `advantages` are in the order of `others`."""

    main: Skill
    others: tuple[Skill, ...]
    advantages: tuple[Advantage, ...]


@dataclass(frozen=True)
class Reach:
    """What random directions reach: mean and 95th percentile over the directions. Above `high` is above chance."""

    mean: float
    high: float


@dataclass(frozen=True)
class RandomFloor:
    """How well random directions foretell, whichever way they point.

    Attributes:
        matched: directions with the covariance of the residuals, else isotropic ones.
        overall, between, within: of |r|; `between` is r of the plain means (compare `between_plain`).
        auroc: of max(AUROC, 1 - AUROC).
    """

    directions: int
    matched: bool
    overall: Reach
    between: Reach
    within: Reach
    auroc: Reach


def correlations(values: Float[np.ndarray, "condition question"], outcomes: Outcomes) -> Correlations:
    """Correlations of values with scores, over all cells, between conditions and within them.

    Intervals are taken on the Fisher-z scale with Student's t. There is none at r = 1 or -1, nor where it hangs on a single
    question whether anything varies. Cells without a value or a score are left out; all is NaN where values are known
    for fewer than six questions.

    Raises:
        MonitoringError: values of another shape or infinite, or fewer than six questions with scored answers.
    """
    return _correlations("the values", values, outcomes)


def auroc(values: Float[np.ndarray, "condition question"], outcomes: Outcomes) -> Estimate:
    """P(an answer above 50 has a larger value than one that is not), over all pairs of answers; ties count half.

    The interval is on the logit scale. There is none at 0 or 1, nor where leaving out a question makes it so or leaves
    one class only; all is NaN where there is only one class, or values for fewer than six questions. Cells without a
    value are left out.

    Raises:
        MonitoringError: values of another shape or infinite, or fewer than six questions with scored answers.
    """
    return _auroc_estimate("the values", values, outcomes)


def compare(main: Predictor, others: Sequence[Predictor], outcomes: Outcomes) -> Comparison:
    """A predictor beside others, and by how much it is better.

    Each predictor is judged on the cells that it has, each difference is taken on the cells that both predictors have. Values are
    held fixed: that a text predictor would have learnt otherwise without a question is not in the intervals. A difference has none
    where one of its figures is 0 or 1 (AUROC) or 1 or -1 (r), with all questions or without one, nor where no question changes it.

    Raises:
        MonitoringError: two predictors of one name, values of another shape or infinite, or fewer than six questions with scored
            answers.
    """
    names = [p.name for p in (main, *others)]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise MonitoringError(f"two predictors are called {twice[0]!r}: name them apart")
    skills = [_skill(p, outcomes) for p in (main, *others)]
    return Comparison(skills[0], tuple(skills[1:]), tuple(_advantage(main, other, outcomes) for other in others))


def random_floor(
    residuals: Float[np.ndarray, "condition question d_model"],
    outcomes: Outcomes,
    *,
    matched: bool,
    n: int = N_DIRECTIONS,
    seed: int = 0,
) -> RandomFloor:
    """What projections on random directions reach, without any learning.

    Args:
        residuals: what the persona vector was projected on, at its layer.
        matched: directions drawn with the covariance of these very residuals. They point where the prompts differ, and so see
            that conditions differ at all: a hard control, and the one that tells whether a direction means the trait.

    Raises:
        MonitoringError: residuals of other conditions or questions, fewer than six questions, or n below 1.
    """
    _require_shape("the residuals", residuals[..., 0], outcomes)
    if n < 1:
        raise MonitoringError(f"a floor needs at least 1 random direction, not {n}")
    present = _present("the residuals", residuals.sum(-1, dtype=np.float64), outcomes)
    centred = np.zeros(residuals.shape)
    centred[present] = residuals[present] - residuals[present].mean(0, dtype=np.float64)
    rng = np.random.default_rng(seed)
    if matched:
        directions = rng.normal(size=(n, int(present.sum()))) @ centred[present]
    else:
        directions = rng.normal(size=(n, residuals.shape[-1]))
    values = np.einsum("cqd,nd->ncq", centred, directions, optimize=True)
    reached = [_auroc(v[present], outcomes.above[present], outcomes.below[present]) for v in values]
    return RandomFloor(
        n,
        matched,
        overall=_reach(np.abs(_overall(values, outcomes.score, present))),
        between=_reach(np.abs(_between_plain(values, outcomes.score, _enough(present)))),
        within=_reach(np.abs(_within(values, outcomes.score, _enough(present)))),
        auroc=_reach(np.maximum(reached, 1 - np.array(reached))),
    )


def choose_layer(
    values_by_layer: Float[np.ndarray, "layer condition question"], outcomes: Outcomes, questions: Sequence[int]
) -> int:
    """The layer with the highest overall r on the given questions. Report on the others: the best of many is too good on its own.

    Raises:
        MonitoringError: values of another shape, no such questions, or no layer whose values vary there.
    """
    _require_shape("every layer's values", values_by_layer[0], outcomes)
    there = outcomes.of(questions)
    values = np.asarray(values_by_layer, dtype=np.float64)[..., list(questions)]
    r = _overall(values, there.score, np.isfinite(values) & np.isfinite(there.score))
    if not np.isfinite(r).any():
        raise MonitoringError("no layer can be chosen: on these questions values or scores do not vary; give more questions")
    return int(np.nanargmax(r))


def _require_shape(what: str, values: Float[np.ndarray, "..."], outcomes: Outcomes) -> None:
    expected = (len(outcomes.conditions), len(outcomes.questions))
    if values.shape != expected:
        raise MonitoringError(
            f"{what} must have one entry per condition and question, {expected[0]} x {expected[1]}, "
            f"not {' x '.join(map(str, values.shape))}: take both from the same study"
        )


def _present(
    what: str, values: Float[np.ndarray, "condition question"], outcomes: Outcomes
) -> Bool[np.ndarray, "condition question"]:
    """Cells with both a value and a score; none where they are of fewer than six questions."""
    _require_shape(what, values, outcomes)
    if np.isinf(values).any():
        raise MonitoringError(f"{what} hold infinite numbers: compute them in fp32, or put NaN where there is no value")
    scored = np.isfinite(outcomes.score)
    if (n := int(scored.any(0).sum())) < MINIMUM_QUESTIONS:
        raise MonitoringError(
            f"prediction is studied over at least {MINIMUM_QUESTIONS} questions with scored answers, not {n}: add some"
        )
    present = scored & np.isfinite(values)
    return present & (present.any(0).sum() >= MINIMUM_QUESTIONS)


def _enough(present: Bool[np.ndarray, "condition question"]) -> Bool[np.ndarray, "condition question"]:
    """The cells of conditions with at least six questions."""
    return present & (present.sum(-1, keepdims=True) >= MINIMUM_QUESTIONS)


def _with_and_without(present: Bool[np.ndarray, "condition question"]) -> Bool[np.ndarray, "deletion condition question"]:
    """All cells first; then, for each question that has any, all but its own."""
    used = np.flatnonzero(present.any(0))
    without = present & ~np.eye(present.shape[1], dtype=bool)[used][:, None]
    return np.concatenate([present[None], without])


def _jackknife(
    found: Float[np.ndarray, " deletion"],
    to: Callable[[np.ndarray], np.ndarray],
    back: Callable[[np.ndarray], np.ndarray],
) -> Estimate:
    """An estimate from its values with all questions and without each; the interval is taken on another scale."""
    value = float(found[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = to(found)
    if not np.isfinite(scaled).all() or np.ptp(scaled[1:]) < STILL:
        return Estimate(value, np.nan, np.nan)
    low, high = jackknife_interval(scaled[:1], scaled[1:, None])
    return Estimate(value, float(back(low)[0]), float(back(high)[0]))


def _correlations(what: str, values: Float[np.ndarray, "condition question"], outcomes: Outcomes) -> Correlations:
    present = _present(what, values, outcomes)
    x = np.asarray(values, dtype=np.float64)
    y, enough = outcomes.score, _enough(present)
    return Correlations(
        overall=_jackknife(_overall(x, y, _with_and_without(present)), np.arctanh, np.tanh),
        between=_between(x, y, enough),
        between_plain=float(_between_plain(x, y, enough)),
        within=_jackknife(_within(x, y, _with_and_without(enough)), np.arctanh, np.tanh),
        left_out=int(np.isnan(_pearson(x, y, enough)).sum()),
        cells=int(present.sum()),
    )


def _auroc_estimate(what: str, values: Float[np.ndarray, "condition question"], outcomes: Outcomes) -> Estimate:
    present = _present(what, values, outcomes)
    return _jackknife(_aurocs(values, outcomes, _with_and_without(present)), logit, expit)


def _skill(predictor: Predictor, outcomes: Outcomes) -> Skill:
    what = f"the values of {predictor.name!r}"
    return Skill(predictor.name, _correlations(what, predictor.values, outcomes), _auroc_estimate(what, predictor.values, outcomes))


def _advantage(main: Predictor, other: Predictor, outcomes: Outcomes) -> Advantage:
    both = np.where(np.isfinite(main.values) & np.isfinite(other.values), 0.0, np.nan)
    present = _with_and_without(_present(f"{main.name!r} and {other.name!r} together", both, outcomes))
    one, two = (np.asarray(p.values, dtype=np.float64) for p in (main, other))
    r = _overall(one, outcomes.score, present), _overall(two, outcomes.score, present)
    areas = _aurocs(one, outcomes, present), _aurocs(two, outcomes, present)
    return Advantage(
        other.name, overall=_difference(*r, to=np.arctanh, back=np.tanh), auroc=_difference(*areas, to=logit, back=expit)
    )


def _difference(
    a: Float[np.ndarray, " deletion"],
    b: Float[np.ndarray, " deletion"],
    to: Callable[[np.ndarray], np.ndarray],
    back: Callable[[np.ndarray], np.ndarray],
) -> Estimate:
    """a - b; the interval is what it can be while both figures, on the other scale, stay in the ellipse that questions leave them.

    A plain jackknife of a - b holds the truth in as few as 88 % of cases where one of the two is near 1. Combining both intervals
    (Zou 2007) is calibrated too, but too wide for predictors that are nearly the same.
    """
    value, n = float(a[0] - b[0]), len(a) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.stack([to(a), to(b)])
    if not np.isfinite(scaled).all() or np.ptp((a - b)[1:]) < STILL:
        return Estimate(value, np.nan, np.nan)
    variance, axes = np.linalg.eigh((n - 1) ** 2 / n * np.cov(scaled[:, 1:]))
    reach = float(student_t.ppf(0.975, n - 1)) * np.sqrt(np.maximum(variance, 0.0))
    angle = np.linspace(0, 2 * np.pi, N_ANGLES)
    one, two = back(scaled[:, :1] + axes * reach @ np.stack([np.cos(angle), np.sin(angle)]))
    return Estimate(value, float((one - two).min()), float((one - two).max()))


def _pearson(
    x: Float[np.ndarray, "*#batch cell"], y: Float[np.ndarray, "*#batch cell"], present: Bool[np.ndarray, "*#batch cell"]
) -> Float[np.ndarray, "*batch"]:
    """r over the last axis; NaN where x or y do not vary."""
    n = np.maximum(present.sum(-1, keepdims=True), 1)
    dx, dy = (np.where(present, v - np.where(present, v, 0.0).sum(-1, keepdims=True) / n, 0.0) for v in (x, y))
    varies = _varies(x, present) & _varies(y, present)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (dx * dy).sum(-1) / (np.sqrt((dx**2).sum(-1)) * np.sqrt((dy**2).sum(-1)))
    return np.where(varies, np.where(np.abs(r) > PERFECT, np.sign(r), r), np.nan)


def _varies(v: Float[np.ndarray, "*#batch cell"], present: Bool[np.ndarray, "*#batch cell"]) -> Bool[np.ndarray, "*batch"]:
    """Whether numbers differ by more than rounding."""
    spread = np.where(present, v, -np.inf).max(-1) - np.where(present, v, np.inf).min(-1)
    return np.asarray(spread > SPREAD * np.where(present, np.abs(v), 0.0).max(-1))


def _overall(
    x: Float[np.ndarray, "*#batch condition question"],
    y: Float[np.ndarray, "*#batch condition question"],
    present: Bool[np.ndarray, "*#batch condition question"],
) -> Float[np.ndarray, "*batch"]:
    """r over all cells."""
    return _pearson(*(v.reshape(*v.shape[:-2], -1) for v in (x, y, present)))


def _within(
    x: Float[np.ndarray, "*#batch condition question"],
    y: Float[np.ndarray, "*#batch condition question"],
    present: Bool[np.ndarray, "*#batch condition question"],
) -> Float[np.ndarray, "*batch"]:
    """Mean over conditions of r over questions, by Fisher z."""
    r = _pearson(x, y, present)
    weight = np.where(np.isfinite(r), present.sum(-1) - 3.0, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.tanh(np.where(weight > 0, np.arctanh(r) * weight, 0.0).sum(-1) / weight.sum(-1))


def _between_plain(
    x: Float[np.ndarray, "*#batch condition question"],
    y: Float[np.ndarray, "*#batch condition question"],
    present: Bool[np.ndarray, "*#batch condition question"],
) -> Float[np.ndarray, "*batch"]:
    """r over the conditions' means; NaN for fewer than three conditions."""
    kept = np.asarray(present.any(-1))
    r = _pearson(_means(x, present), _means(y, present), kept)
    return np.where(kept.sum(-1) >= LEAST_CONDITIONS, r, np.nan)


def _between(
    x: Float[np.ndarray, "condition question"],
    y: Float[np.ndarray, "condition question"],
    present: Bool[np.ndarray, "condition question"],
) -> Estimate:
    """r over the conditions' means, freed of their noise, where it is reliable.

    The interval is the jackknife's around r of the plain means, each end freed of the same noise (shifted by the covariance of
    the noise, divided by the root of the reliabilities).
    """
    plain = _jackknife(_between_plain(x, y, _with_and_without(present)), np.arctanh, np.tanh)
    if np.isnan(plain.value):
        return NOTHING
    means = [_means(v, present)[present.any(-1)] for v in (x, y)]
    own = [_shared(v, v, present) for v in (x, y)]
    least = min(o / float(m.var()) for o, m in zip(own, means, strict=True))
    if not least >= LEAST_RELIABILITY:
        return NOTHING
    value = _shared(x, y, present) / np.sqrt(own[0] * own[1])
    scale = float(np.sqrt(means[0].var() * means[1].var() / (own[0] * own[1])))
    kept = least >= INTERVAL_RELIABILITY
    ends = (value + scale * (end - plain.value) if kept else np.nan for end in (plain.low, plain.high))
    return Estimate(*(float(np.clip(v, -1.0, 1.0)) for v in (value, *ends)))


def _shared(
    x: Float[np.ndarray, "condition question"],
    y: Float[np.ndarray, "condition question"],
    present: Bool[np.ndarray, "condition question"],
) -> float:
    """Covariance over conditions of their means, from products of different questions: unbiased, whichever cells are missing."""
    kept = present[present.any(-1)]
    one = kept.astype(np.float64)
    x, y = (np.where(kept, v[present.any(-1)] - v[present].mean(), 0.0) for v in (x, y))
    products = np.outer(x.sum(-1), y.sum(-1)) - x @ y.T
    moments = products / (np.outer(one.sum(-1), one.sum(-1)) - one @ one.T)
    return float(np.trace(moments) / len(kept) - moments.mean())


def _means(
    v: Float[np.ndarray, "*#batch condition question"], present: Bool[np.ndarray, "*#batch condition question"]
) -> Float[np.ndarray, "*batch condition"]:
    """Means of the conditions; 0 for one without cells."""
    return np.where(present, v, 0.0).sum(-1) / np.maximum(present.sum(-1), 1)


def _aurocs(
    values: Float[np.ndarray, "condition question"], outcomes: Outcomes, present: Bool[np.ndarray, "deletion condition question"]
) -> Float[np.ndarray, " deletion"]:
    return np.array([_auroc(values[p], outcomes.above[p], outcomes.below[p]) for p in present])


def _auroc(values: Float[np.ndarray, " cell"], above: Float[np.ndarray, " cell"], below: Float[np.ndarray, " cell"]) -> float:
    """P(a value of the answers above > one of the answers below), ties one half; NaN with one class only."""
    if not (above.sum() > 0 and below.sum() > 0):
        return float("nan")
    order = np.argsort(values)
    passed = np.concatenate([[0.0], np.cumsum(below[order])])
    beaten, reached = (passed[np.searchsorted(values[order], values, side)] for side in ("left", "right"))
    return float((above * (beaten + reached)).sum() / (2 * above.sum() * below.sum()))


def _reach(found: Float[np.ndarray, " direction"]) -> Reach:
    kept = found[np.isfinite(found)]
    return Reach(float(kept.mean()), float(np.quantile(kept, 0.95))) if len(kept) else Reach(np.nan, np.nan)

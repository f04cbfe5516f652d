"""Whether the shift that finetuning causes along a persona vector goes with the trait it causes (Chen et al. 2025, section 4).

One model is finetuned on each of several data sets. Over the sets, the shift (projection of the mean change of the residuals on the
trait's vector) is correlated with the trait score afterwards. The paper finds r from .76 to .97. That says little on its own:
finetuning moves residuals along few directions, and most directions see those. In a published replication random directions reach
.94 to .97 at their 97.5th percentile. So what random directions reach stands beside every r here.

The interval is a 95 % jackknife over families on the Fisher-z scale, with Student's t of (families - 1) / 2 degrees of freedom. It
is for r of endless families drawn like these. Over 1,000 simulated studies each of 7, 10, 13 and 14 families at three levels (and
13 at two), with true r of .2 to .98, it holds the truth in

- 92 % to 98.5 % where half or a quarter of the families move the trait, each by chance, or all do by normal amounts; in up to
  98.8 % where scores rise by 30 points at most;
- 95 % to 100 % where a fixed eighth or quarter of the families was chosen to move it (too wide, never too short);
- 91 % to 97 % where effects have a long tail (gamma, lognormal); but 78 % to 95 % where besides the shift foretells the score
  almost exactly until the score stops at 100: rare families whose shift goes on growing pull true r down to .8 or .9, and
  studies without such a family see .99. Nothing in such a sample tells.

There is no interval below seven families (it would mostly span more than half of all values of r), nor where scores span less
than 20 points: then perhaps no set moved the trait, and at seven families intervals in spite of that would hold the truth in 84 %.
A bootstrap over families (percentile or BCa) held it in 73 % to 98 %. Fewer degrees of freedom where a sample's own spread is
uneven did not help: samples in which one family decides r give intervals that are too wide already.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import t as student_t

from persona_lens.errors import FinetuningError

LEAST_SETS: Final = 6
LEAST_FAMILIES: Final = 4
INTERVAL_FAMILIES: Final = 7
INTERVAL_RANGE: Final = 20.0  # score points from the lowest to the highest set
N_DIRECTIONS: Final = 1000
PERFECT: Final = 1 - 1e-12  # a correlation above it is 1 but for rounding
STILL: Final = 1e-12  # a figure that changes less without a family changes by rounding
SPREAD: Final = 1e-9  # of a number's size: what varies less varies by rounding
SLACK: Final = 1e-9  # correlations that differ by less are the same


def family_of(name: str) -> str:
    """What a data set called `family-level`, or `family-level-s1` for a seed, was made from."""
    return re.sub(r"-s\d+$", "", name).rpartition("-")[0] or name


@dataclass(frozen=True, eq=False)
class Outcome:
    """What finetuning on each of several data sets did, for one trait at one layer.

    Attributes:
        names: of the data sets, all different.
        families: what each set was made from, in the order of `names`. Sets of one family (say: the same questions with normal,
            slightly and strongly wrong answers) are not independent: the interval leaves out a whole family at a time.
        score: mean trait score (0-100) of the model after finetuning on the set.
        shift: mean residual of the finetuned model minus the base model's, over the same prompts; residual-stream units.

    Raises:
        FinetuningError: fields of different lengths, numbers that are not finite, one name twice, fewer than six sets or fewer
            than four families.
    """

    names: tuple[str, ...]
    families: tuple[str, ...]
    score: Float[np.ndarray, " set"]
    shift: Float[np.ndarray, "set d_model"]

    def __post_init__(self) -> None:
        for field, length in (("families", len(self.families)), ("score", len(self.score)), ("shift", len(self.shift))):
            if length != len(self.names):
                raise FinetuningError(
                    f"outcome.{field} must have one entry per data set, {len(self.names)}, not {length}: "
                    "take all fields from the same runs"
                )
        if twice := sorted({n for n in self.names if self.names.count(n) > 1}):
            raise FinetuningError(f"two data sets are called {twice[0]!r}: name them apart")
        for field, finite in (("score", np.isfinite(self.score)), ("shift", np.isfinite(self.shift).all(-1))):
            if not finite.all():
                name = self.names[int(np.argmin(finite))]
                raise FinetuningError(f"outcome.{field} of data set {name!r} is not finite: measure it anew, or leave the set out")
        if len(self.names) < LEAST_SETS:
            raise FinetuningError(
                f"a correlation needs at least {LEAST_SETS} data sets, not {len(self.names)}: finetune on more of them"
            )
        if (n := len(set(self.families))) < LEAST_FAMILIES:
            raise FinetuningError(
                f"a correlation needs data sets of at least {LEAST_FAMILIES} families, not {n}: add sets made from something else"
            )

    def of(self, chosen: Sequence[int]) -> "Outcome":
        """The same for some of the data sets, by their places, in the order given.

        Raises:
            FinetuningError: one place twice, no such place, or too few sets or families left.
        """
        places = list(chosen)
        if len(set(places)) < len(places) or not set(places) <= set(range(len(self.names))):
            raise FinetuningError(f"choose different data sets from 0 to {len(self.names) - 1}, not {places}")
        names, families = (tuple(labels[p] for p in places) for labels in (self.names, self.families))
        return Outcome(names, families, self.score[places], self.shift[places])


@dataclass(frozen=True)
class Floor:
    """What random directions reach. NaN where r itself is not defined, or random directions do not see the shifts vary.

    Attributes:
        kind: whose covariance the directions are drawn with: "base", of the base model's residuals (directions in which the model
            varies anyway), or "shifts", of these very shifts (directions in which finetuning moves it: the hard control).
        directions: how many.
        mean: of |r| over the directions.
        high: 95th percentile of |r|. A direction is as likely as its opposite, so r has a symmetric distribution, and this is
            its 97.5th percentile as well.
        p_value: (1 + number of directions whose |r| is at least the vector's |r|) / (1 + directions). Two-sided.
    """

    kind: str
    directions: int
    mean: float
    high: float
    p_value: float


@dataclass(frozen=True)
class ShiftCorrelation:
    """Correlation over data sets of the shift along a persona vector with the trait score after finetuning.

    Attributes:
        r: Pearson's; NaN where the scores or the projections of the shifts do not vary.
        low, high: 95 % interval for r over endless families like these. NaN where there is none: fewer than seven families, scores
            that span less than 20 points, r of 1 or -1, r undefined without some family, or r that no family changes.
        sets: how many data sets; `families`: of how many families.
        floors: what random directions reach: "base" where residuals of the base model were given, then "shifts".
        others: r of the same scores with shifts along other traits' vectors, by their names; NaN where it is not defined.
    """

    r: float
    low: float
    high: float
    sets: int
    families: int
    floors: tuple[Floor, ...]
    others: Mapping[str, float]


def correlate(
    outcome: Outcome,
    direction: Float[np.ndarray, " d_model"],
    *,
    base: Float[np.ndarray, "sample d_model"] | None,
    others: Mapping[str, Float[np.ndarray, " d_model"]] = {},
    n: int = N_DIRECTIONS,
    seed: int = 0,
) -> ShiftCorrelation:
    """Correlate the shift along a direction with the trait score after finetuning, beside what other directions reach.

    The order of the data sets and the lengths of the directions do not matter.

    Args:
        outcome: shifts and scores, set by set.
        direction: the trait's persona vector at the layer of the shifts.
        base: residuals of the base model at that layer, for the covariance of the "base" floor; None leaves that floor out.
        others: other traits' vectors at the same layer, by name.
        n: random directions per floor.
        seed: of the random directions.

    Raises:
        FinetuningError: directions or residuals of another width than the shifts, or not finite; a direction of length 0; base
            residuals that do not vary; n below 1.
    """
    if n < 1:
        raise FinetuningError(f"a floor needs at least 1 random direction, not {n}")
    for what, vector in {"the direction": direction, **{f"the direction of {k!r}": v for k, v in others.items()}}.items():
        _require_width(what, vector, outcome)
        if not vector.any():
            raise FinetuningError(f"{what} has length 0: give a vector with a direction")
    if base is not None:
        _require_width("the base residuals", base, outcome)
        if len(base) < 2 or not np.ptp(base, axis=0).any():
            raise FinetuningError(f"the base residuals must vary, not {len(base)} alike: take them over several prompts")
    ordered = outcome.of(sorted(range(len(outcome.names)), key=lambda s: outcome.names[s]))
    r = _along(direction, ordered)
    low, high = _interval(direction, ordered)
    floors = [_floor("shifts", ordered.shift, ordered, r, n, np.random.default_rng([seed, 0]))]
    if base is not None:
        floors.insert(0, _floor("base", base, ordered, r, n, np.random.default_rng([seed, 1])))
    return ShiftCorrelation(
        r=r,
        low=low,
        high=high,
        sets=len(ordered.names),
        families=len(set(ordered.families)),
        floors=tuple(floors),
        others={name: _along(vector, ordered) for name, vector in others.items()},
    )


def _require_width(what: str, values: Float[np.ndarray, "..."], outcome: Outcome) -> None:
    if values.shape[-1] != outcome.shift.shape[-1]:
        raise FinetuningError(
            f"{what} must be as wide as the shifts, {outcome.shift.shape[-1]}, not {values.shape[-1]}: "
            "take both from the same model and layer"
        )
    if not np.isfinite(values).all():
        raise FinetuningError(f"{what} must hold finite numbers only: compute them in fp32")


def _along(direction: Float[np.ndarray, " d_model"], outcome: Outcome) -> float:
    """r of the shifts along a direction with the scores."""
    return float(_pearson(_projected(direction, outcome), outcome.score, np.ones(len(outcome.score), dtype=bool)))


def _projected(direction: Float[np.ndarray, " d_model"], outcome: Outcome) -> Float[np.ndarray, " set"]:
    """Projections of the shifts; all 0 where they vary by no more than rounding."""
    unit = direction / np.linalg.norm(np.asarray(direction, dtype=np.float64))
    return _unless_rounding(outcome.shift @ unit, outcome)


def _unless_rounding(values: Float[np.ndarray, "*batch set"], outcome: Outcome) -> Float[np.ndarray, "*batch set"]:
    """Projections on directions of length 1; all 0 where they vary by no more than rounding."""
    size = np.linalg.norm(np.asarray(outcome.shift, dtype=np.float64), axis=-1).max()
    return np.where(np.ptp(values, axis=-1, keepdims=True) > SPREAD * size, values, 0.0)


def _interval(direction: Float[np.ndarray, " d_model"], outcome: Outcome) -> tuple[float, float]:
    """Jackknife over families on the Fisher-z scale.

    Student's t with half of the usual degrees of freedom: a few families move the trait and most do not, so that the spread over
    families is known less well than from as many normal values.
    """
    labels = sorted(set(outcome.families))
    nothing = float("nan"), float("nan")
    if len(labels) < INTERVAL_FAMILIES or np.ptp(outcome.score) < INTERVAL_RANGE:
        return nothing
    without = np.array([[f != label for f in outcome.families] for label in labels])
    kept = np.concatenate([np.ones((1, len(outcome.families)), dtype=bool), without])
    with np.errstate(divide="ignore"):
        z = np.arctanh(_pearson(_projected(direction, outcome), outcome.score, kept))
    if not np.isfinite(z).all() or np.ptp(z[1:]) < STILL:
        return nothing
    families = len(labels)
    spread = (families - 1) / np.sqrt(families) * float(z[1:].std(ddof=1))
    half = float(student_t.ppf(0.975, (families - 1) / 2)) * spread
    return float(np.tanh(z[0] - half)), float(np.tanh(z[0] + half))


def _floor(
    kind: str, residuals: Float[np.ndarray, "sample d_model"], outcome: Outcome, r: float, n: int, rng: np.random.Generator
) -> Floor:
    """What directions drawn with the covariance of the residuals reach.

    A direction is a sum of the centred residuals with normal weights. Its length is free: r does not depend on it, so matching the
    norm of the persona vector would change nothing. The directions themselves are never formed.
    """
    centred = residuals - residuals.mean(0, dtype=np.float64)
    if np.isnan(r):
        return Floor(kind, n, float("nan"), float("nan"), float("nan"))
    unit = centred / np.linalg.norm(centred)  # then a direction has a length of about 1
    values = rng.normal(size=(n, len(unit))) @ (unit @ (outcome.shift - outcome.shift.mean(0, dtype=np.float64)).T)
    found = np.abs(_pearson(_unless_rounding(values, outcome), outcome.score, np.ones(len(outcome.score), dtype=bool)))
    if np.isnan(found).any():
        return Floor(kind, n, float("nan"), float("nan"), float("nan"))
    p_value = (1 + int((found >= abs(r) - SLACK).sum())) / (1 + n)
    return Floor(kind, n, float(found.mean()), float(np.quantile(found, 0.95)), p_value)


def _pearson(
    x: Float[np.ndarray, "*#batch set"], y: Float[np.ndarray, " set"], kept: Bool[np.ndarray, "*#batch set"]
) -> Float[np.ndarray, "*batch"]:
    """r over the kept sets; NaN where x or y do not vary there."""
    count = kept.sum(-1, keepdims=True)
    dx, dy = (np.where(kept, v - np.where(kept, v, 0.0).sum(-1, keepdims=True) / count, 0.0) for v in (x, y))
    varies = _varies(x, kept) & _varies(y, kept)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (dx * dy).sum(-1) / (np.sqrt((dx**2).sum(-1)) * np.sqrt((dy**2).sum(-1)))
    return np.where(varies, np.where(np.abs(r) > PERFECT, np.sign(r), r), np.nan)


def _varies(v: Float[np.ndarray, "*#batch set"], kept: Bool[np.ndarray, "*#batch set"]) -> Bool[np.ndarray, "*batch"]:
    """Whether numbers differ by more than rounding."""
    spread = np.where(kept, v, -np.inf).max(-1) - np.where(kept, v, np.inf).min(-1)
    return np.asarray(spread > SPREAD * np.where(kept, np.abs(v), 0.0).max(-1))

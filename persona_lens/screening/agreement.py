"""How well a screen tells rows apart, and whether two screens name the same rows.

The unit is the prompt here too: rows that share one are added up before their spread is taken.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from scipy.stats import t as student_t

from persona_lens.errors import ScreeningError
from persona_lens.screening.uncertainty import LEVEL, NORMAL, Prompts, effective, known_as, numbered, share_interval

LEAST_SIDE: Final = 10  # prompts on each side of an AUC with an interval
FEW_KNOWN: Final = 3  # while few rows are misplaced, an AUC counts as known no better than a share of this many times its prompts
DRAWS: Final = 10_000
PRIORS: Final = (0.5, 0.25)  # the first is too narrow near 1, the second at few rows


@dataclass(frozen=True)
class Auc:
    """Chance that a positive row scores higher than a negative one, ties counting half, with its 95 % interval.

    Attributes:
        low, high: NaN where a side has fewer than ten prompts.
        positive, negative: rows with a score.
    """

    value: float
    low: float
    high: float
    positive: int
    negative: int


@dataclass(frozen=True)
class Agreement:
    """Rows that were flagged against rows that a judge names.

    Attributes:
        both, flagged_only, judged_only, neither: rows.
        missing: rows of which one of the two says nothing; they do not count.
        kappa: Cohen's, 0 at chance and 1 where both say the same of every row. NaN where there is only one thing to say.
        low, high: its 95 % interval.
        judged_found: share of the rows the judge names that are flagged; NaN where it names none.
        flagged_found: share of the flagged rows that the judge names; NaN where none is flagged.
    """

    both: int
    flagged_only: int
    judged_only: int
    neither: int
    missing: int
    kappa: float
    low: float
    high: float
    judged_found: float
    flagged_found: float


def auc(
    positive: Float[np.ndarray, " positive"],
    negative: Float[np.ndarray, " negative"],
    *,
    prompts: tuple[Prompts, Prompts] | None = None,
) -> Auc:
    """Area under the ROC curve. Rows without a score (NaN) do not count.

    The variance is DeLong's, with rows of one prompt added up, on both sides together (Obuchowski 1997). The interval is that of a
    share known as well as that (Korn and Graubard 1998), so that it ends at 1 and has a length where the sides do not overlap.

    It holds the truth in 91 % to 100 % of simulated cases (AUC of .5 to .999, 10 to 2,000 rows a side, equal or unequal spreads,
    a part that cannot be told apart, ties, prompts of their own, shared by the sides, or of five rows): too wide near 1, hardly
    ever short. DeLong's own interval holds .99 in 16 % to 86 % at 10 to 100 rows a side.

    Args:
        prompts: what the positive and what the negative rows answer (texts or ids); None: all different.

    Raises:
        ScreeningError: a side without scores, or not one prompt per row.
    """
    known: dict[Hashable, int] = {}
    above, below = prompts or (None, None)
    a, unit_a = _side("positive", positive, above, known, 0)
    b, unit_b = _side("negative", negative, below, known, len(positive))
    ranks = rankdata(np.concatenate([a, b]))
    higher = (ranks[: len(a)] - rankdata(a)) / len(b)
    lower = 1 - (ranks[len(a) :] - rankdata(b)) / len(a)
    value = float(higher.mean())
    n = min(effective(unit_a), effective(unit_b))
    if n < LEAST_SIDE:
        return Auc(value, float("nan"), float("nan"), len(a), len(b))
    parts = [(v - value) / len(v) / np.sqrt(1 - 1 / effective(u)) for v, u in ((higher, unit_a), (lower, unit_b))]
    _, unit = np.unique(np.concatenate([unit_a, unit_b]), return_inverse=True)
    variance = float((np.bincount(unit, np.concatenate(parts)) ** 2).sum())
    wider = (NORMAL / float(student_t.ppf(LEVEL, n - 1))) ** 2
    most = n * max(FEW_KNOWN, n * min(value, 1 - value) / 2)
    low, high = share_interval(value, min(known_as(value, variance, n) * wider, most))
    return Auc(value, low, high, len(a), len(b))


def agreement(
    flagged: Bool[np.ndarray, " row"] | Float[np.ndarray, " row"],
    judged: Bool[np.ndarray, " row"] | Float[np.ndarray, " row"],
    *,
    prompts: Prompts = None,
) -> Agreement:
    """How far flags and a judge agree.

    The interval of kappa is made of quantiles over Dirichlet draws of the four cells, with half or a quarter of a row more in
    each. It holds the truth in 92 % to 99 % of simulated cases (200 to 5,000 rows, 1 % to 30 % of them named, kappa of 0 to .99).
    The rows of one prompt together count as one row, as if all were alike: where they are not, the interval is too wide.

    Args:
        flagged, judged: true or 1, false or 0, NaN where there is no score or no verdict.
        prompts: what each row answers (text or id); None: all different.

    Raises:
        ScreeningError: fields of different lengths, other numbers, or no row of which both say something.
    """
    f, j = flagged.astype(np.float64), judged.astype(np.float64)
    if len(f) != len(j):
        raise ScreeningError(f"flags and verdicts must be of the same rows, not of {len(f)} and {len(j)}")
    for name, given in (("flagged", f), ("judged", j)):
        if (other := ~np.isnan(given) & (given != 0) & (given != 1)).any():
            raise ScreeningError(f"{name} must be 0, 1 or NaN, not {given[other][0]:g}: compare scores with a threshold first")
    has = ~np.isnan(f) & ~np.isnan(j)
    if not has.any():
        raise ScreeningError(f"of none of {len(f)} rows do both flags and verdicts say something")
    unit = numbered(prompts, len(f), {})[0][has]
    counts = np.bincount((2 * f + j)[has].astype(np.int64), minlength=4)
    neither, judged_only, flagged_only, both = counts.tolist()
    kappa = float(_kappa(counts[None].astype(np.float64))[0])
    low, high = _kappa_interval(kappa, counts * (effective(unit) / len(unit)))
    found = [both / n if n else float("nan") for n in (both + judged_only, both + flagged_only)]
    return Agreement(both, flagged_only, judged_only, neither, int((~has).sum()), kappa, low, high, *found)


def _side(
    name: str, values: Float[np.ndarray, " row"], prompts: Prompts, known: dict[Hashable, int], first: int
) -> tuple[Float[np.ndarray, " scored"], Int[np.ndarray, " scored"]]:
    """Scores of one side and the units of their rows, numbered through from `first` where there are no prompts."""
    unit, units = numbered(prompts, len(values), known)
    has = ~np.isnan(values)
    if not has.any():
        raise ScreeningError(f"none of {len(values)} {name} rows has a score: an AUC needs both sides")
    return values[has], (unit + first if units is None else units[unit])[has]


def _kappa(counts: Float[np.ndarray, "table 4"]) -> Float[np.ndarray, " table"]:
    neither, judged_only, flagged_only, both = (counts / counts.sum(-1, keepdims=True)).T
    f, j = both + flagged_only, both + judged_only
    chance = f * j + (1 - f) * (1 - j)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1, (both + neither - chance) / (1 - chance), np.nan)


def _kappa_interval(kappa: float, counts: Float[np.ndarray, " 4"]) -> tuple[float, float]:
    if np.isnan(kappa):
        return kappa, kappa
    rng = np.random.default_rng(0)
    ends = np.concatenate([np.quantile(_kappa(rng.dirichlet(counts + more, DRAWS)), [1 - LEVEL, LEVEL]) for more in PRIORS])
    return min(float(ends.min()), kappa), max(float(ends.max()), kappa)

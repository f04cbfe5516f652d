"""How sure an estimate is, where the unit is the prompt: rows that share one are added up, and count as one draw.

No rows are drawn again: what each unit adds to an estimate's error gives a variance and a skewness, and each end of an interval is
the outer one of Student's and of Hall's (1992) interval, which corrects for the skewness.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.stats import beta
from scipy.stats import t as student_t

from persona_lens.errors import ScreeningError

LEVEL: Final = 0.975
NORMAL: Final = 1.959963984540054  # its quantile of the normal distribution
SLACK: Final = 1e-9  # of a number's size: what differs less differs by rounding
Prompts = Sequence[Hashable] | Shaped[np.ndarray, " _"] | None  # what each row answers: a text or an id; None: all different


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """Error of an estimate: a sum of independent parts.

    Attributes:
        parts: what each unit adds.
        units: their numbers, ascending: estimates from the same units err together. None: units of no other estimate.
        freedom: Student's degrees of freedom; 0 where there can be no interval.
    """

    parts: Float[np.ndarray, " unit"]
    units: Int[np.ndarray, " unit"] | None
    freedom: int

    def interval(self, value: float) -> tuple[float, float]:
        """95 % interval of the estimate: the outer ends of Student's and of Hall's interval."""
        spread, skew = self._moments()
        if not spread:
            return float("nan"), float("nan")
        q = float(student_t.ppf(LEVEL, self.freedom))
        return value - spread * max(q, _uncorrected(q, skew)), value - spread * min(-q, _uncorrected(-q, skew))

    def p_value(self, value: float) -> float:
        """Two-sided p of 0: below .05 where the interval leaves it out."""
        spread, skew = self._moments()
        if not spread:
            return float("nan")
        t = value / spread
        sign = np.sign(t)
        return float(2 * student_t.sf(max(min(sign * t, sign * _corrected(t, skew)), 0.0), self.freedom))

    def minus(self, other: "Uncertainty") -> "Uncertainty":
        """Error of the difference to another estimate."""
        parts, freedom = np.concatenate([self.parts, -other.parts]), min(self.freedom, other.freedom)
        if self.units is None or other.units is None:
            return Uncertainty(parts, None, freedom)
        units, place = np.unique(np.concatenate([self.units, other.units]), return_inverse=True)
        left = np.bincount(place, parts, len(units))
        return Uncertainty(left, units, freedom if (left**2).sum() > SLACK**2 * (parts**2).sum() else 0)

    def _moments(self) -> tuple[float, float]:
        """Standard error and skewness of the sum; 0 where there can be no interval."""
        square = float((self.parts**2).sum())
        return (float(np.sqrt(square)), float((self.parts**3).sum()) / square**1.5) if self.freedom and square else (0.0, 0.0)


def numbered(
    prompts: Prompts, rows: int, known: dict[Hashable, int]
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " unit"] | None]:
    """The unit of each row, from 0 on, and the numbers of these units in `known`, which grows; None: every row is one of its own.

    Raises:
        ScreeningError: not one prompt per row.
    """
    if prompts is None:
        return np.arange(rows), None
    if len(prompts) != rows:
        raise ScreeningError(f"prompts must have one entry per row, {rows}, not {len(prompts)}: take both from the same rows")
    labels = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    numbers = np.fromiter((known.setdefault(label, len(known)) for label in labels), np.int64, rows)
    units, unit = np.unique(numbers, return_inverse=True)
    return unit, units


def shared(prompts: Prompts, has: Bool[np.ndarray, " row"]) -> tuple[Float[np.ndarray, " kept"], Int[np.ndarray, " kept"]]:
    """Of each row that is kept: what part it is of the kept rows of its prompt, and the number of its prompt, from 0 on.

    Raises:
        ScreeningError: not one prompt per row.
    """
    unit = np.unique(numbered(prompts, len(has), {})[0][has], return_inverse=True)[1]
    return 1 / np.bincount(unit)[unit], unit


def effective(unit: Int[np.ndarray, " row"]) -> float:
    """How many equal units these are worth: (sum of their sizes)^2 / sum of their sizes^2."""
    sizes = np.unique(unit, return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum()) + SLACK


def holm(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """p values corrected for their number (Holm 1979). NaN stays and does not count."""
    order = np.argsort(p_values)[: int(np.isfinite(p_values).sum())]
    corrected = np.full(len(p_values), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1.0)
    return corrected


def known_as(share: float, variance: float, least: float) -> float:
    """Of how many independent rows a share would have this variance; `least` where it has none."""
    return share * (1 - share) / variance if variance > 0 and 0 < share < 1 else least


def share_interval(share: float, n: float) -> tuple[float, float]:
    """95 % interval of a share of n independent rows (Clopper and Pearson); n need not be whole."""
    x = share * n
    low = float(beta.ppf(1 - LEVEL, x, n - x + 1)) if x > 0 else 0.0
    return low, float(beta.ppf(LEVEL, x + 1, n - x)) if x < n else 1.0


def _corrected(t: float, skew: float) -> float:
    """Hall's monotone transformation of a studentised estimate with skewed errors, which is nearer to Student's t."""
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def _uncorrected(t: float, skew: float) -> float:
    """Its inverse."""
    return t if abs(skew) < SLACK else float(3 / skew * (np.cbrt(1 + skew * (t - skew / 6)) - 1))

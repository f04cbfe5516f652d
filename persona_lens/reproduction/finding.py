"""What one experiment found: a row per claim, with our figure, the paper's, and a rule that was fixed beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SMALL, LEAST, POINTS = 0.1, 0.001, 10.0
NOT_TESTED: Final = "not tested"  # by the paper


@dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
        claim: what is measured.
        ours: our figure; `low`, `high` its 95 % interval, NaN where there is none.
        paper: the paper's figure in words, or `NOT_TESTED` (and perhaps why that matters).
        rule: when the claim counts as holding here; empty where there is nothing to hold.
        holds: whether it does; None without a rule, or where our figure is not defined.
    """

    claim: str
    ours: float
    low: float = nan
    high: float = nan
    paper: str = NOT_TESTED
    rule: str = ""
    holds: bool | None = None

    @property
    def figure(self) -> str:
        """Our figure as text: points with one decimal, correlations with two, small ones (p values) with three."""
        if not isfinite(self.ours):
            return "-"
        if not (isfinite(self.low) and isfinite(self.high)):
            small = 0 < abs(self.ours) < SMALL
            return "< 0.001" if small and abs(self.ours) < LEAST else _text(self.ours, 3 if small else _digits(self.ours))
        digits = _digits(self.ours, self.low, self.high)
        return f"{_text(self.ours, digits)} [{_text(self.low, digits)}, {_text(self.high, digits)}]"

    @property
    def verdict(self) -> str:
        """Whether it agrees with the paper; of what the paper did not test, whether it holds."""
        if self.holds is None:
            return ""
        tested = not self.paper.startswith(("-", NOT_TESTED))
        return (("agrees", "differs") if tested else ("holds", "fails"))[0 if self.holds else 1]


def _digits(*values: float) -> int:
    """One decimal where a number reaches ten, as points do, else two."""
    return 1 if max(map(abs, values)) >= POINTS else 2


def _text(value: float, digits: int) -> str:
    whole = abs(value) >= 1 and value == int(value)  # layers
    return f"{value:.0f}" if whole else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Finding:
    """What became of one figure of the paper.

    Attributes:
        key: of the figure, as in `paper.FIGURES`.
        reading: what agrees, what does not, and why, in words.
        images: names of the figures that were drawn, with captions, in order.
    """

    key: str
    rows: tuple[Row, ...]
    reading: str
    images: tuple[tuple[str, str], ...]

    @property
    def holding(self) -> tuple[int, int]:
        """How many claims hold, of how many."""
        held = [r.holds for r in self.rows if r.holds is not None]
        return sum(held), len(held)


def above(claim: str, value: tuple[float, float, float], floor: float, *, paper: str = NOT_TESTED, rule: str) -> Row:
    """A row that holds where the figure reaches a floor."""
    return Row(claim, *value, paper=paper, rule=rule, holds=value[0] >= floor if isfinite(value[0]) else None)


def surely_above(claim: str, value: tuple[float, float, float], floor: float, *, paper: str = NOT_TESTED, rule: str) -> Row:
    """A row that holds where the whole interval lies above a floor."""
    return Row(claim, *value, paper=paper, rule=rule, holds=value[1] > floor if isfinite(value[1]) else None)


def named(rows: Sequence[Row], *, hold: bool) -> str:
    """The claims that hold, or do not, as one text."""
    return "; ".join(r.claim for r in rows if r.holds is hold)


@dataclass(frozen=True)
class Found:
    """What an experiment returns: its rows, their reading, and figures by name, each with its caption."""

    rows: Sequence[Row]
    reading: str
    figures: "Mapping[str, tuple[Figure, str]]"

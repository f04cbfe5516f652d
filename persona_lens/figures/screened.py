"""What figures and the report of a screening show, read from its run a trait, a set and a column at a time.

What is kept of the rows are counts, means and correlations, so that a million of them fit.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Final, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from persona_lens.screening.calibration import Predicted
from persona_lens.screening.files import read_columns
from persona_lens.screening.flagging import Flags, load_flags
from persona_lens.screening.ranking import SetSignal, load_predictions, row_scores, scored_by
from persona_lens.screening.run import ScreenRun
from persona_lens.screening.sets import Difference, Ranked, RowScores, SetScore, rank_sets, set_score
from persona_lens.transcripts import Skipped

Kind = Literal["difference", "estimated", "cheap"]
SAID: Final[Mapping[Kind, str]] = {
    "difference": "projection difference",
    "estimated": "projection difference",
    "cheap": "projection minus that of the last prompt token",
}
BINS: Final = 60
TAIL: Final = 0.001  # of a set's rows may lie beyond the bins, on either side
LISTED: Final = 12  # sets of which each is shown
FIRST: Final = 20  # skipped rows that are told one by one
LEAST_ROWS: Final = 3  # of a correlation
LENGTH: Final = "length in tokens"


@dataclass(frozen=True, eq=False)
class Standing:
    """A trait over the data sets.

    Attributes:
        layer: where the trait was read; of several the most reliable one, as of extreme and flagged samples.
        kind: what sets are scored by: the mean projection difference, its estimate where only a part of the rows has an own answer,
            or the mean of the cheap scores where there are too few (see `ranking.scored_by`).
        sets: from the highest to the lowest; `differences`: of all pairs.
        unscored: why a set has no place, by its name.
        edges: of the bins of the rows' scores, in residual-stream units.
        counts: rows per bin, by set; the outermost bins hold what lies beyond too. Scores are `ScreenRun.signal`.
        both: mean projection difference and mean cheap score, over the rows that have both, by set.
    """

    trait: str
    layer: int
    kind: Kind
    sets: tuple[Ranked, ...]
    differences: tuple[Difference, ...]
    unscored: Mapping[str, str]
    edges: Float[np.ndarray, " edge"]
    counts: Mapping[str, Int[np.ndarray, " bin"]]
    both: Mapping[str, tuple[SetScore, SetScore]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(r.name for r in self.sets)

    def of(self, name: str) -> Ranked | None:
        """A set's place; None where it has none."""
        return next((r for r in self.sets if r.name == name), None)

    def difference(self, first: str, second: str) -> Difference:
        """The difference of a set and a lower one."""
        return next(d for d in self.differences if (d.first, d.second) == (first, second))


@dataclass(frozen=True)
class Skips:
    """Rows of a set that could not be screened.

    Attributes:
        counts: by reason, numbers in it replaced by "..."; the most frequent first.
        first: the first ones, as they are.
    """

    counts: Mapping[str, int]
    first: tuple[Skipped, ...]


@dataclass(frozen=True)
class Beside:
    """A rival, or the answers' length, beside the scores of a set's rows.

    Attributes:
        mean: over the rows that have one; NaN where none has.
        rho: Spearman's correlation with the rows' scores; NaN where one of them does not vary.
        rows: that have both.
    """

    mean: float
    rho: float
    rows: int


@dataclass(frozen=True)
class Screened:
    """A run as it is shown. Everything is read when it is asked for, and once."""

    run: ScreenRun

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def rows(self) -> Kind:
        """What rows are scored by."""
        return "difference" if self.run.signal == "difference" else "cheap"

    @cached_property
    def standings(self) -> tuple[Standing, ...]:
        by = scored_by(self.run)
        return tuple(_standing(self.run, trait, by) for trait in self.run.traits)

    @cached_property
    def flags(self) -> Flags | None:
        return load_flags(self.run)

    @property
    def reference(self) -> str | None:
        """The set that is known to be harmless, where rows were flagged."""
        return self.flags.reference if self.flags else None

    @cached_property
    def skips(self) -> dict[str, Skips]:
        """By set; those of which no row was skipped are left out."""
        return {name: _skips(self.run, name) for name, n in self.run.record["sets"].items() if n["skipped"]}

    @cached_property
    def predictions(self) -> Mapping[str, Mapping[str, Predicted]]:
        return load_predictions(self.run) or {}

    @cached_property
    def beside(self) -> dict[str, dict[str, dict[str, Beside]]]:
        """Rivals and lengths beside the scores, by trait, set and rival."""
        return {t: {name: _beside(self.run, name, t) for name in self.run.sets} for t in self.run.traits}

    def listed(self, standing: Standing) -> tuple[str, ...]:
        """The sets of which each is shown, from the highest to the lowest: all, or as many of the highest as of the lowest.

        The reference is always among them.
        """
        names = standing.names
        if len(names) <= LISTED:
            return names
        half = LISTED // 2
        return tuple(n for i, n in enumerate(names) if not half <= i < len(names) - half or n == self.reference)

    def some(self, standing: Standing) -> str:
        """How many sets are shown, in words; nothing where all are."""
        listed, total = self.listed(standing), len(standing.sets)
        known = " and the reference" if len(listed) > LISTED else ""
        return f"the {LISTED // 2} highest and {LISTED // 2} lowest of {total} sets{known}" if len(listed) < total else ""


def screened(run: ScreenRun | Screened) -> Screened:
    return run if isinstance(run, Screened) else Screened(run)


def rivals_of(run: ScreenRun, trait: str) -> list[str]:
    """The rivals that stand beside a trait: those of other traits are left out."""
    told = {name: name.partition(": ")[2] for name in run.rivals}
    return [name for name, about in told.items() if about == trait or about not in run.traits]


def spearman(a: Float[np.ndarray, " row"], b: Float[np.ndarray, " row"]) -> tuple[float, int]:
    """Rank correlation over the rows that have both, and how many these are; NaN where there are too few or one does not vary."""
    has = np.isfinite(a) & np.isfinite(b)
    n = int(has.sum())
    x, y = a[has], b[has]
    if n < LEAST_ROWS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), n
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1]), n


@dataclass(frozen=True, eq=False)
class _Rows:
    """A set's scores for a trait, and those it is ranked by."""

    exact: Float[np.ndarray, " row"]
    cheap: Float[np.ndarray, " row"]
    ranked: RowScores

    def both(self) -> tuple[SetScore, SetScore]:
        """Mean exact and mean cheap score over the rows that have both."""
        has = np.isfinite(self.exact)
        prompts = np.asarray(self.ranked.prompts)[has]
        return set_score(self.exact[has], prompts=prompts), set_score(self.cheap[has], prompts=prompts)


def _rows(run: ScreenRun, name: str, trait: str, ranked: RowScores) -> _Rows:
    exact, cheap = (run.scores(name, trait, signal).astype(np.float64) for signal in ("difference", "cheap"))
    return _Rows(exact, cheap, ranked)


def _standing(run: ScreenRun, trait: str, by: SetSignal) -> Standing:
    rows = {name: _rows(run, name, trait, ranked) for name, ranked in row_scores(run, trait, by).items()}
    unscored = {name: why for name, r in rows.items() if (why := _why_not(r.ranked))}
    sets, differences = _ranked({name: r.ranked for name, r in rows.items() if name not in unscored})
    values = {name: r.exact if run.signal == "difference" else r.cheap for name, r in rows.items()}
    edges, counts = _histograms({name: v[np.isfinite(v)] for name, v in values.items()})
    both = {name: r.both() for name, r in rows.items() if name not in unscored and np.isfinite(r.exact).any()}
    part = any(r.score.method == "regression" for r in sets)
    kind: Kind = "cheap" if by == "cheap" else "estimated" if part else "difference"
    return Standing(trait, run.layer(trait), kind, sets, differences, unscored, edges, counts, both)


def _why_not(scores: RowScores) -> str | None:
    """Why a set cannot be ranked; None where it can."""
    if not np.isfinite(scores.exact).any():
        return "no row has a score"
    infinite = np.isinf(scores.exact).any() or (scores.cheap is not None and np.isinf(scores.cheap).any())
    return "some scores are infinite" if infinite else None


def _ranked(scores: Mapping[str, RowScores]) -> tuple[tuple[Ranked, ...], tuple[Difference, ...]]:
    if not scores:
        return (), ()
    found = rank_sets(scores)
    return found.sets, found.differences


def _histograms(
    values: Mapping[str, Float[np.ndarray, " scored"]],
) -> tuple[Float[np.ndarray, " edge"], dict[str, Int[np.ndarray, " bin"]]]:
    """Bins that hold all but a thousandth of each set on either side, and the rows in each."""
    ends = np.array([np.quantile(v, [TAIL, 1 - TAIL]) for v in values.values() if len(v)]).reshape(-1, 2)
    low, high = (float(ends[:, 0].min()), float(ends[:, 1].max())) if len(ends) else (0.0, 1.0)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    return edges, {name: np.histogram(np.clip(v, low, high), edges)[0] for name, v in values.items()}


def _skips(run: ScreenRun, name: str) -> Skips:
    counts, first = Counter[str](), list[Skipped]()
    for path in run.shards(name):
        found = read_columns(path, ["place", "reason"])
        gone = [Skipped(place, why) for place, why in zip(found["place"], found["reason"], strict=True) if why is not None]
        counts.update(s.reason for s in gone)
        first += islice(gone, FIRST - len(first))
    return Skips(_alike(counts), tuple(first))


def _alike(counts: Mapping[str, int]) -> dict[str, int]:
    """Reasons that differ in numbers only, counted together."""
    found: dict[str, list[tuple[str, int]]] = {}
    for reason, n in counts.items():
        found.setdefault(re.sub(r"\d+", "\N{HORIZONTAL ELLIPSIS}", reason), []).append((reason, n))
    merged = {pattern if len(same) > 1 else same[0][0]: sum(n for _, n in same) for pattern, same in found.items()}
    return dict(sorted(merged.items(), key=lambda item: -item[1]))


def _beside(run: ScreenRun, name: str, trait: str) -> dict[str, Beside]:
    scores = run.scores(name, trait, run.signal)
    found = {rival: _compared(scores, run.rival(name, rival)) for rival in rivals_of(run, trait)}
    return found | {LENGTH: _compared(scores, run.tokens(name))}


def _compared(scores: Float[np.ndarray, " row"], other: Float[np.ndarray, " row"]) -> Beside:
    known = other[np.isfinite(other)]
    mean = float(known.astype(np.float64).mean()) if len(known) else float("nan")
    return Beside(mean, *spearman(scores, other))


def between(found: Mapping[str, Mapping[str, Beside]], standing: Standing, rival: str) -> float:
    """Rank correlation over the sets of their scores and a rival's means."""
    scores = np.array([r.score.mean for r in standing.sets])
    return spearman(scores, np.array([found[r.name][rival].mean for r in standing.sets]))[0]

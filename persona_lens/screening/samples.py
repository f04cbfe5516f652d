"""Single samples: how unusual one is, which to flag at a stated false-positive rate, and which to take.

A reference is the scores of rows that are known to be harmless, or of a corpus to compare with. Thresholds and p values are
conformal (Vovk et al. 2005): they hold for new rows exchangeable with the reference, whatever the scores are distributed like.
The screening score and a judge's score see different samples, and together find more than either (Chen et al. 2025, section 6).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import beta

from persona_lens.errors import ScreeningError
from persona_lens.screening.uncertainty import LEVEL, SLACK, Prompts, known_as, share_interval, shared

Join = Callable[[Float[np.ndarray, "score row"]], Float[np.ndarray, " row"]]


@dataclass(frozen=True)
class Threshold:
    """A score, above which rows are flagged.

    Attributes:
        rate: of new rows like the reference at most this share is flagged, on average over references like this one.
        low, high: 95 % interval of the share that this very threshold flags.
        rows: of the reference, with a score; `prompts`: different ones of these.
    """

    value: float
    rate: float
    low: float
    high: float
    rows: int
    prompts: int


def percentiles(values: Float[np.ndarray, " row"], reference: Float[np.ndarray, " known"]) -> Float[np.ndarray, " row"]:
    """Percentage of the reference that scores lower, ties counting half; NaN stays NaN.

    Raises:
        ScreeningError: a reference without scores.
    """
    known = np.sort(reference[_scored(reference)])
    below = (np.searchsorted(known, values, "left") + np.searchsorted(known, values, "right")) / 2
    return np.where(np.isnan(values), np.nan, 100 * below / len(known))


def p_values(
    values: Float[np.ndarray, " row"], reference: Float[np.ndarray, " known"], *, prompts: Prompts = None
) -> Float[np.ndarray, " row"]:
    """Conformal p values, (1 + reference rows that score as high or higher) / (1 + reference rows); NaN stays NaN.

    A row like the reference has p <= x with a probability of at most x. p values from one reference err together: do not multiply
    them. With prompts each prompt counts as one row, by the share of its rows.

    Args:
        prompts: what each row of the reference answers (text or id); None: all different.

    Raises:
        ScreeningError: a reference without scores, or not one prompt per row of it.
    """
    has = _scored(reference)
    return _p(values, reference[has], shared(prompts, has)[0])


def threshold(reference: Float[np.ndarray, " known"], rate: float, *, prompts: Prompts = None) -> Threshold:
    """The score that new rows like the reference exceed with a probability of at most `rate`.

    Of n scores it is the ceil((n + 1)(1 - rate))-th smallest. With prompts, all prompts weigh the same, and the rate is that of a
    row of a new prompt (Lee, Barber and Willett 2023); n then counts prompts.

    In simulations of 99 to 10,000 rows a rate of 5 % is 4.9 % on average, or 4.1 % to 5.1 % with prompts, and the interval of
    what is flagged holds it in 96 % to 99 %. Rows that share prompts, passed without them, give up to 5.9 %, and an interval that
    holds 34 %.

    Args:
        reference: scores; rows without one (NaN) do not count.
        prompts: what each row answers (text or id); None: all different.

    Raises:
        ScreeningError: a rate outside (0, 1), a reference too small for it (says how many it takes), or not one prompt per row.
    """
    _require_rate(rate)
    has = ~np.isnan(reference)
    weight, unit = shared(prompts, has)
    values, n = reference[has], int(unit.max(initial=-1)) + 1
    if n < (needed := int(np.ceil(1 / rate - SLACK)) - 1) or not n:
        raise ScreeningError(
            f"a false-positive rate of {rate:g} needs a reference of at least {max(needed, 1)} "
            f"{'rows' if prompts is None else 'prompts'} with a score, not {n}: give more, or ask for a higher rate"
        )
    order = np.lexsort((weight, values))  # the same whatever the order of tied rows
    mass = np.cumsum(weight[order]) / (n + 1)
    place = min(int(np.searchsorted(mass, 1 - rate - SLACK)), len(values) - 1)
    value = float(values[order[place]])
    above = np.bincount(unit, weight * (values > value))  # share of each prompt's rows
    share, spread = float(above.mean()), float(above.var()) / n
    size = float(n) if prompts is None else min(known_as(share, spread, float(n)), float(len(values)))
    high = float(beta.ppf(LEVEL, (size + 1) * (1 - mass[place]), (size + 1) * mass[place]))
    return Threshold(value, rate, share_interval(share, size)[0], high, len(values), n)


def flags(values: Float[np.ndarray, " row"], limit: Threshold | float) -> Bool[np.ndarray, " row"]:
    """Which rows score above the threshold. A row without a score (NaN) is not flagged, which does not clear it."""
    return values > (limit.value if isinstance(limit, Threshold) else limit)


def select(
    values: Float[np.ndarray, " row"], n: int, which: Literal["top", "random", "bottom"], *, seed: int = 0
) -> Int[np.ndarray, " chosen"]:
    """Places of the n highest rows from the highest down, of the n lowest from the lowest up, or of n at random.

    Ties are broken by the seed, not by the order of the rows. Rows without a score (NaN) are never chosen.

    Raises:
        ScreeningError: n below 1, or fewer rows with a score.
    """
    scored = np.flatnonzero(~np.isnan(values))
    if not 1 <= n <= len(scored):
        raise ScreeningError(f"n must lie between 1 and the {len(scored)} rows with a score, not be {n}")
    keys = np.random.default_rng(seed).random(len(scored))
    order = np.argsort(keys) if which == "random" else np.lexsort((keys, values[scored]))
    return scored[(order[::-1] if which == "top" else order)[:n]]


def fisher(p: Float[np.ndarray, "score row"]) -> Float[np.ndarray, " row"]:
    """Low where scores are unusual together: the mean logarithm of their p values (Fisher 1932)."""
    return np.log(p).mean(0)


def either(p: Float[np.ndarray, "score row"]) -> Float[np.ndarray, " row"]:
    """Low where any score is unusual: the lowest p value."""
    return p.min(0)


def combine(
    scores: Mapping[str, Float[np.ndarray, " row"]], reference: Mapping[str, Float[np.ndarray, " known"]]
) -> Float[np.ndarray, " row"]:
    """One score out of several: mean over them of -log10 p against the reference, higher for more unusual rows.

    It ranks rows; what it reaches by chance, `joint_p_values` says. NaN where one of the scores is. Logarithms, since means of
    percentiles lose what one score alone finds: of 5 % planted rows that either one of two scores sees, they found 11 % at a
    false-positive rate of 1 %, this 62 %. Of rows that both see, they found 75 %, this 81 %.

    Raises:
        ScreeningError: other names or lengths in the scores than in the reference, or a reference without complete rows.
    """
    complete, _ = _complete(scores, reference)
    return -fisher(np.stack([p_values(v, complete[name]) for name, v in scores.items()])) / np.log(10)


def joint_p_values(
    scores: Mapping[str, Float[np.ndarray, " row"]],
    reference: Mapping[str, Float[np.ndarray, " known"]],
    join: Join = fisher,
    *,
    prompts: Prompts = None,
) -> Float[np.ndarray, " row"]:
    """Conformal p values of several scores together: rows with p <= rate are flagged at that joint false-positive rate.

    With `either`, a row is flagged because one of its scores is unusual. How far each may go to keep the joint rate is found from
    the reference, in which scores go together as they do. Reference rows are ranked without the new row, which can only raise p: in
    simulations a rate of 5 % is 3.6 % to 5 % at 99 rows, 4.8 % to 5.1 % at 1,000. NaN where one of the scores is.

    Args:
        reference: scores of the same names; rows without all of them do not count.
        join: p values of a row's scores -> one number, low for unusual rows; it must not fall where a p value rises.
        prompts: what each row of the reference answers (text or id); None: all different.

    Raises:
        ScreeningError: other names or lengths in the scores than in the reference, a reference without complete rows, or not one
            prompt per row of it.
    """
    complete, has = _complete(scores, reference)
    weight, _ = shared(prompts, has)
    n = round(float(weight.sum()))
    new = join(np.stack([_p(v, complete[name], weight) for name, v in scores.items()]))
    known = join(np.stack([_above(v, v, weight) for v in complete.values()]) / (n + 1))
    return np.where(np.isnan(new), np.nan, (1 + _above(-new - SLACK, -known, weight)) / (n + 1))


def joint_flags(
    scores: Mapping[str, Float[np.ndarray, " row"]],
    reference: Mapping[str, Float[np.ndarray, " known"]],
    rate: float,
    join: Join = either,
    *,
    prompts: Prompts = None,
) -> Bool[np.ndarray, " row"]:
    """Which rows have a joint p value of at most `rate`. A row without one of the scores is not flagged, which does not clear it.

    Raises:
        ScreeningError: as `joint_p_values`; a rate outside (0, 1), or one that no row could reach with this reference.
    """
    _require_rate(rate)
    highest = {name: np.array([np.inf]) for name in scores}
    if (least := float(joint_p_values(highest, reference, join, prompts=prompts)[0])) > rate:
        raise ScreeningError(
            f"with this reference no row can have a joint p value below {least:.2g}, so a rate of {rate:g} flags none: "
            f"give {least / rate:.2g} times as many reference rows, or ask for a higher rate"
        )
    return joint_p_values(scores, reference, join, prompts=prompts) <= rate + SLACK


def _scored(reference: Float[np.ndarray, " known"]) -> Bool[np.ndarray, " known"]:
    has = ~np.isnan(reference)
    if not has.any():
        raise ScreeningError(f"none of {len(reference)} reference rows has a score: give a reference to compare with")
    return has


def _require_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ScreeningError(f"a false-positive rate lies in (0, 1), not {rate}")


def _above(
    values: Float[np.ndarray, " row"], known: Float[np.ndarray, " scored"], weight: Float[np.ndarray, " scored"]
) -> Float[np.ndarray, " row"]:
    """Weight of the known scores that are as high or higher."""
    order = np.argsort(known)
    above = np.append(np.cumsum(weight[order[::-1]])[::-1], 0.0)
    return above[np.searchsorted(known[order], values, "left")]


def _p(
    values: Float[np.ndarray, " row"], known: Float[np.ndarray, " scored"], weight: Float[np.ndarray, " scored"]
) -> Float[np.ndarray, " row"]:
    return np.where(np.isnan(values), np.nan, (1 + _above(values, known, weight)) / (1 + round(float(weight.sum()))))


def _complete(
    scores: Mapping[str, Float[np.ndarray, " row"]], reference: Mapping[str, Float[np.ndarray, " known"]]
) -> tuple[dict[str, Float[np.ndarray, " complete"]], Bool[np.ndarray, " known"]]:
    """The reference rows that have all scores, in the order of the scores, and which rows these are."""
    if not scores or set(scores) != set(reference):
        raise ScreeningError(f"scores and reference must hold the same names, not {sorted(scores)} and {sorted(reference)}")
    for what, held in (("scores", scores), ("reference", reference)):
        if len(lengths := {len(v) for v in held.values()}) > 1:
            raise ScreeningError(f"{what} must be of the same rows, not of {' and '.join(map(str, sorted(lengths)))}")
    has = np.asarray(~np.isnan(np.stack([reference[name] for name in scores])).any(0))
    if not has.any():
        raise ScreeningError(f"none of {len(has)} reference rows has all of {', '.join(scores)}: score the same rows with each")
    return {name: reference[name][has] for name in scores}, has

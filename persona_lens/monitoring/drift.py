"""Drift over turns: where a conversation's scores change level, and whether they rise or fall, against neutral conversations.

Neutral conversations have levels and moods of their own, so their turns are no independent draws: a p value is the share of neutral
conversations whose statistic is as large (conformal), not one of a permutation of turns.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MINIMUM_TURNS = 4


@dataclass(frozen=True)
class ChangePoint:
    """The split of a conversation into two levels that fits best.

    Attributes:
        turn: the first turn (from 1) of the second level.
        before, after: mean scores, in standard deviations of neutral turns.
        p_value: share of neutral conversations that split at least as clearly, (1 + #>=) / (1 + n).
    """

    turn: int
    before: float
    after: float
    p_value: float


@dataclass(frozen=True)
class Trend:
    """The straight line through a conversation's scores: standard deviations per turn, and p as for a `ChangePoint`."""

    slope: float
    p_value: float


def change_point(scores: Float[np.ndarray, " turn"], neutral: Float[np.ndarray, "conversation horizon"]) -> ChangePoint | None:
    """Where the level changes most, up or down; None for fewer than four turns that were read.

    Args:
        scores: of a conversation's turns, in standard deviations of neutral turns; NaN where there is none.
        neutral: the same of neutral conversations.
    """
    own, others = _alike(scores, neutral)
    if own is None:
        return None
    contrast = _contrasts(own[None])[0]
    at = int(np.abs(contrast).argmax())
    largest = np.abs(_contrasts(others)).max(-1)
    return ChangePoint(at + 2, float(own[: at + 1].mean()), float(own[at + 1 :].mean()), _p(np.abs(contrast).max(), largest))


def trend(scores: Float[np.ndarray, " turn"], neutral: Float[np.ndarray, "conversation horizon"]) -> Trend | None:
    """Whether the scores rise or fall over the turns; None for fewer than four turns that were read.

    Args:
        scores, neutral: as `change_point`.
    """
    own, others = _alike(scores, neutral)
    if own is None:
        return None
    time = np.arange(len(own)) - (len(own) - 1) / 2
    slopes = others @ time / (time @ time)
    slope = float(own @ time / (time @ time))
    return Trend(slope, _p(abs(slope), np.abs(slopes)))


def rise(scores: Float[np.ndarray, "*conversation turn probe"]) -> Float[np.ndarray, "*conversation turn probe"]:
    """The clearest rise of level so far, turn by turn: the largest contrast of any later turns with all turns before them.

    It compares a conversation with its own beginning, so that a conversation that is high from its first turn does not alarm, and
    one that becomes so does early. A turn that was not read counts as expected (0).
    """
    known = np.moveaxis(np.nan_to_num(scores), -2, -1)
    path = np.zeros_like(known)
    for turn in range(1, known.shape[-1]):
        path[..., turn] = np.maximum(path[..., turn - 1], _contrasts(known[..., : turn + 1]).max(-1))
    return np.moveaxis(path, -1, -2)


def _alike(
    scores: Float[np.ndarray, " turn"], neutral: Float[np.ndarray, "conversation horizon"]
) -> tuple[Float[np.ndarray, " both"] | None, Float[np.ndarray, "conversation both"]]:
    """The first turns of both, as many as both have; a turn that was not read is set to its conversation's mean."""
    n = min(len(scores), neutral.shape[1])
    if np.isfinite(scores[:n]).sum() < MINIMUM_TURNS:
        return None, neutral
    return _filled(scores[None, :n])[0], _filled(neutral[:, :n])


def _filled(scores: Float[np.ndarray, "conversation turn"]) -> Float[np.ndarray, "conversation turn"]:
    known = np.isfinite(scores)
    means = np.where(known, scores, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    return np.where(known, scores, means[:, None])


def _contrasts(scores: Float[np.ndarray, "*series turn"]) -> Float[np.ndarray, "*series split"]:
    """For every split, (mean after - mean before) in units of its own spread for independent turns of unit variance."""
    n = scores.shape[-1]
    first = np.arange(1, n)
    total = scores.cumsum(-1)
    before = total[..., :-1] / first
    after = (total[..., -1:] - total[..., :-1]) / (n - first)
    return (after - before) * np.sqrt(first * (n - first) / n)


def _p(value: float, neutral: Float[np.ndarray, " conversation"]) -> float:
    return (1 + int((neutral >= value).sum())) / (1 + len(neutral))

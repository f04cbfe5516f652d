"""Which rollouts count (Chen et al. 2025, section 2.2 and code): positive >= 50, negative < 50, coherence >= 50 on both sides.

`independent` keeps each side's survivors; `pairwise`, as the authors' code, drops a positive and a negative rollout of the same
instruction, question and sample together. Answers without score or without tokens never count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from persona_lens.errors import FilterError
from persona_lens.judges import Score, grouped
from persona_lens.prompts import Polarity
from persona_lens.reliability import MINIMUM_QUESTIONS
from persona_lens.sampling import Rollout

MOST_REASONS: Final = 3  # that an error names


@dataclass(frozen=True)
class Thresholds:
    """Scores (0-100): positive answers reach `trait`, negative ones stay below it, both reach `coherence`.

    The defaults are the paper's (Chen et al. 2025, section 2.2).
    """

    trait: float = 50.0
    coherence: float = 50.0


@dataclass(frozen=True)
class Counts:
    """What became of one side's rollouts: how many were kept, and how many not for which reason.

    Attributes:
        unscored: answers to which the judge gave no score; `reasons` says why: the most frequent first, numbers in them left out.
        unfinished: thoughts that reached max_new_tokens before an answer began.
        off_trait: on the wrong side of the threshold.
        cut_off: answers that reached max_new_tokens; they may be among the kept.
        polarity: the side: "positive", "negative" or "neutral".
        total: all of its rollouts.
        empty: answers without tokens.
        incoherent: below the coherence threshold.
    """

    polarity: str
    total: int
    unscored: int
    empty: int
    unfinished: int  # thoughts that reached max_new_tokens before an answer began
    incoherent: int
    off_trait: int
    kept: int
    cut_off: int = 0  # answers that reached max_new_tokens; they may be among the kept
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def _verdict(rollout: Rollout, score: Score, polarity: Polarity, thresholds: Thresholds) -> str:
    if not rollout.token_ids and rollout.thinking and rollout.end == "length":
        return "unfinished"
    if score.trait is None or score.coherence is None:
        return "unscored"
    if not rollout.token_ids:
        return "empty"
    if score.coherence < thresholds.coherence:
        return "incoherent"
    if polarity != "neutral" and (score.trait >= thresholds.trait) != (polarity == "positive"):
        return "off_trait"
    return "kept"


def keep_independent(
    rollouts: Sequence[Rollout], scores: Sequence[Score], polarity: Polarity, thresholds: Thresholds
) -> tuple[list[bool], Counts]:
    """Which rollouts of one polarity survive on their own, and the counts by reason.

    Args:
        scores: of the rollouts, in their order.
    """
    verdicts = [_verdict(r, s, polarity, thresholds) for r, s in zip(rollouts, scores, strict=True)]
    number = {v: verdicts.count(v) for v in ("unscored", "empty", "unfinished", "incoherent", "off_trait", "kept")}
    cut_off = sum(r.end == "length" for r in rollouts)
    unscored = zip(rollouts, scores, verdicts, strict=True)
    reasons = grouped(r.gap or s.reason or "" for r, s, v in unscored if v == "unscored")
    return [v == "kept" for v in verdicts], Counts(polarity, len(verdicts), **number, cut_off=cut_off, reasons=reasons)


def keep_pairwise(positive: Sequence[bool], negative: Sequence[bool]) -> list[bool]:
    """Pairs whose two sides both survive; the rows of both sides must correspond.

    Args:
        positive, negative: which rollouts of each side survive on their own.
    """
    return [p and n for p, n in zip(positive, negative, strict=True)]


def require_enough(trait: str, questions: Sequence[int], counts: Sequence[Counts]) -> None:
    """Raise unless enough questions survive on both sides.

    Raises:
        FilterError: says how many survive, and why the others do not.
    """
    if len(questions) >= MINIMUM_QUESTIONS:
        return
    sides = "; ".join(
        f"{c.polarity}: {c.kept} of {c.total} kept ({c.off_trait} on the wrong side of the threshold, {c.incoherent} incoherent, "
        f"{c.empty} empty, {c.unfinished} cut off while thinking, {c.unscored} without score"
        f"{': ' if c.reasons else ''}{told_reasons(c.reasons)})"
        for c in counts
    )
    silent = 2 * sum(c.unscored for c in counts) > sum(c.total for c in counts)
    advice = "check the judge, and that it is meant for this trait" if silent else "check that the model follows the instructions"
    more = "; raise max_new_tokens, thoughts use it up" if any(c.unfinished for c in counts) else ""
    raise FilterError(
        f"{trait}: {len(questions)} questions survive the filter on both sides, at least {MINIMUM_QUESTIONS} are needed. {sides}. "
        f"Rollouts and scores are kept; {advice}, or lower the thresholds{more}"
    )


def told_reasons(reasons: Mapping[str, int]) -> str:
    """The most frequent reasons, with how often they occur."""
    most = list(reasons.items())[:MOST_REASONS]
    return ", ".join(f"{number} x {reason}" for reason, number in most) + (", ..." if len(reasons) > len(most) else "")

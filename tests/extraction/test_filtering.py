"""The filter: each rollout has one fate, the boundaries are the paper's, and too few survivors are explained."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.errors import FilterError
from persona_lens.extraction.filtering import (
    Counts,
    Thresholds,
    keep_independent,
    keep_pairwise,
    require_enough,
)
from persona_lens.judges import Score
from persona_lens.prompts import Polarity
from persona_lens.reliability import MINIMUM_QUESTIONS
from persona_lens.sampling import Rollout

FATES = ("unscored", "empty", "incoherent", "off_trait", "kept")


def rollout(tokens: int = 3) -> Rollout:
    return Rollout("evil/positive/i0/x00", 0, 0, 10, tuple(range(tokens)), "text" if tokens else "", "stop")


def fate(score: Score, polarity: Polarity, thresholds: Thresholds | None = None, tokens: int = 3) -> str:
    kept, counts = keep_independent([rollout(tokens)], [score], polarity, thresholds or Thresholds())
    record = counts.as_dict()
    fates = [name for name in FATES if record[name]]
    assert [record[name] for name in fates] == [1]
    assert kept == [fates[0] == "kept"]
    return fates[0]


@pytest.mark.parametrize(
    ("trait", "polarity", "expected"),
    [
        (50.0, "positive", "kept"),
        (50.0, "negative", "off_trait"),
        (49.999, "positive", "off_trait"),
        (49.999, "negative", "kept"),
        (100.0, "positive", "kept"),
        (100.0, "negative", "off_trait"),
        (0.0, "positive", "off_trait"),
        (0.0, "negative", "kept"),
        (0.0, "neutral", "kept"),
        (50.0, "neutral", "kept"),
        (100.0, "neutral", "kept"),
    ],
)
def test_fifty_counts_as_positive_and_not_as_negative(trait: float, polarity: Polarity, expected: str) -> None:
    assert fate(Score(trait, 80.0), polarity) == expected


@pytest.mark.parametrize("polarity", ["positive", "negative", "neutral"])
@pytest.mark.parametrize(("coherence", "coherent"), [(50.0, True), (49.999, False), (100.0, True), (0.0, False)])
def test_coherence_is_asked_of_every_side(polarity: Polarity, coherence: float, coherent: bool) -> None:
    right = 0.0 if polarity == "negative" else 100.0
    assert fate(Score(right, coherence), polarity) == ("kept" if coherent else "incoherent")


def test_the_thresholds_are_the_callers() -> None:
    strict = Thresholds(trait=90.0, coherence=20.0)
    assert fate(Score(80.0, 30.0), "positive", strict) == "off_trait"
    assert fate(Score(80.0, 30.0), "negative", strict) == "kept"
    assert fate(Score(90.0, 20.0), "positive", strict) == "kept"
    assert fate(Score(95.0, 19.0), "positive", strict) == "incoherent"


@pytest.mark.parametrize("polarity", ["positive", "negative", "neutral"])
@pytest.mark.parametrize("pair", [(None, 90.0), (90.0, None), (None, None)])
def test_an_answer_without_a_score_never_counts(polarity: Polarity, pair: tuple[float | None, float | None]) -> None:
    nothing = Thresholds(trait=0.0, coherence=0.0)
    assert fate(Score(*pair, "refused"), polarity, nothing) == "unscored"


@pytest.mark.parametrize("polarity", ["positive", "negative", "neutral"])
def test_an_answer_without_tokens_never_counts(polarity: Polarity) -> None:
    right = Score(0.0 if polarity == "negative" else 100.0, 100.0)
    assert fate(right, polarity, tokens=0) == "empty"
    assert fate(right, polarity, tokens=1) == "kept"


def test_the_first_reason_is_the_one_that_is_counted() -> None:
    assert fate(Score(None, 0.0, "refused"), "positive", tokens=0) == "unscored"
    assert fate(Score(0.0, 0.0), "positive", tokens=0) == "empty"
    assert fate(Score(0.0, 0.0), "positive") == "incoherent"


SCORES = st.builds(
    lambda trait, coherence: Score(trait, coherence, "refused" if trait is None or coherence is None else None),
    st.none() | st.floats(0, 100) | st.just(50.0),
    st.none() | st.floats(0, 100) | st.just(50.0),
)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), SCORES), max_size=12), polarity=st.sampled_from(["positive", "negative", "neutral"])
)
def test_every_rollout_has_exactly_one_fate(rows: list[tuple[int, Score]], polarity: Polarity) -> None:
    rollouts, scores = [rollout(n) for n, _ in rows], [s for _, s in rows]
    kept, counts = keep_independent(rollouts, scores, polarity, Thresholds())
    record = counts.as_dict()
    assert record["polarity"] == polarity
    assert record["total"] == len(rows) == len(kept) == sum(record[name] for name in FATES)
    assert record["kept"] == sum(kept)
    alone = [keep_independent([r], [s], polarity, Thresholds())[0][0] for r, s in zip(rollouts, scores, strict=True)]
    assert kept == alone


@settings(deadline=None, max_examples=80)
@given(rows=st.lists(st.tuples(st.integers(0, 1), SCORES), max_size=12))
def test_a_coherent_answer_counts_on_exactly_one_side(rows: list[tuple[int, Score]]) -> None:
    rollouts, scores = [rollout(n) for n, _ in rows], [s for _, s in rows]
    positive, negative, neutral = (
        keep_independent(rollouts, scores, p, Thresholds())[0] for p in ("positive", "negative", "neutral")
    )
    assert [p + n for p, n in zip(positive, negative, strict=True)] == [int(k) for k in neutral]


def test_answers_that_were_cut_off_are_counted_apart_from_their_fate() -> None:
    rollouts = [replace(rollout(), end="length" if i < 3 else "stop") for i in range(5)]
    scores = [Score(90.0, 90.0)] * 2 + [Score(10.0, 90.0)] * 3
    kept, found = keep_independent(rollouts, scores, "positive", Thresholds())
    assert (found.cut_off, found.kept, found.off_trait, found.total) == (3, 2, 3, 5)
    assert kept == [True, True, False, False, False]


def test_rollouts_and_scores_must_correspond() -> None:
    with pytest.raises(ValueError):
        keep_independent([rollout(), rollout()], [Score(1.0, 1.0)], "positive", Thresholds())


def test_a_pair_survives_only_together() -> None:
    assert keep_pairwise([True, True, False, False], [True, False, True, False]) == [True, False, False, False]
    assert keep_pairwise([], []) == []
    with pytest.raises(ValueError):
        keep_pairwise([True, True], [True])


def counts(**changes: Any) -> Counts:
    return Counts(
        **(
            {
                "polarity": "positive",
                "total": 100,
                "unscored": 1,
                "empty": 2,
                "unfinished": 0,
                "incoherent": 30,
                "off_trait": 61,
                "kept": 6,
            }
            | changes
        )
    )


def test_too_few_questions_are_an_error_that_says_what_became_of_the_others() -> None:
    sides = [counts(), counts(polarity="negative", kept=52, off_trait=15)]
    with pytest.raises(FilterError) as caught:
        require_enough("evil", [4, 7, 9], sides)
    for part in (
        "evil: 3 questions survive",
        f"at least {MINIMUM_QUESTIONS} are needed",
        "positive: 6 of 100 kept (61 on the wrong side of the threshold, 30 incoherent, 2 empty, 0 cut off while thinking, "
        "1 without score)",
        "negative: 52 of 100 kept (15 on the wrong side",
    ):
        assert part in str(caught.value)


def test_the_error_says_why_answers_have_no_score_and_that_thoughts_used_up_the_tokens() -> None:
    reasons = {"a": 4, "b": 3, "c": 2, "d": 1}
    with pytest.raises(FilterError, match=r"10 without score: 4 x a, 3 x b, 2 x c, \.\.\.\)") as caught:
        require_enough("evil", [], [counts(unscored=10, reasons=reasons), counts(polarity="negative")])
    assert "raise max_new_tokens" not in str(caught.value)
    with pytest.raises(
        FilterError, match="5 cut off while thinking.*lower the thresholds; raise max_new_tokens, thoughts use it up"
    ):
        require_enough("evil", [], [counts(unfinished=5)])


def test_thoughts_that_never_end_are_no_empty_answers_and_reasons_are_counted() -> None:
    thought = replace(rollout(), token_ids=(), text="", thinking=(5, 6), end="length")
    gap = replace(rollout(), token_ids=(), text="", gap="the answer's text does not encode to itself")
    rows = [thought, replace(thought, end="stop"), gap, rollout(), rollout()]
    none = [Score(None, None, f"trait: refusal or prose: mass 0.0{i} on numbers") for i in (1, 2)]
    _, found = keep_independent(rows, [none[0], Score(0.0, 90.0), none[0], *none], "positive", Thresholds())
    assert (found.unfinished, found.empty, found.unscored) == (1, 1, 3)
    assert found.reasons == {"trait: refusal or prose: mass … on numbers": 2, "the answer's text does not encode to itself": 1}


def test_enough_questions_are_enough() -> None:
    require_enough("evil", list(range(MINIMUM_QUESTIONS)), [counts()])
    with pytest.raises(FilterError, match=f"evil: {MINIMUM_QUESTIONS - 1} questions"):
        require_enough("evil", list(range(MINIMUM_QUESTIONS - 1)), [counts()])
    with pytest.raises(FilterError, match="evil: 0 questions"):
        require_enough("evil", [], [])

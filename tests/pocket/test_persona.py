"""The planted prior: its correlations, its conditional draws, moods and the default assistant."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import (
    LEVEL_PROBABILITIES,
    LEVELS,
    MOODS,
    PLANTED,
    PROPENSITY,
    Persona,
    conditional,
    default_persona,
    persona_of,
    planted_correlations,
    prior_table,
    realised_correlations,
    sample_prior,
)
from persona_lens.pocket.questions import KINDS
from persona_lens.pocket.roles import ROLES

BY_NAME = {role.name: role for role in ROLES}
PAIRS = np.triu_indices(len(TRAITS), 1)
levels_of_traits = st.tuples(*[st.sampled_from(LEVELS)] * len(TRAITS))


def test_planted_correlations_are_a_positive_definite_correlation_matrix() -> None:
    matrix = planted_correlations()
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), 1.0)
    assert np.linalg.eigvalsh(matrix).min() > 0.05
    spoiled = matrix.copy()
    spoiled[0, 3] = spoiled[3, 0] = 0.9  # evil and polite together contradict the other entries
    assert np.linalg.eigvalsh(spoiled).min() < 0.0


def test_every_planted_pair_names_two_known_traits_once() -> None:
    assert all(a in TRAITS and b in TRAITS and a != b for a, b in PLANTED)
    assert len({frozenset(pair) for pair in PLANTED}) == len(PLANTED) == np.count_nonzero(planted_correlations()[PAIRS])


def test_realised_correlations_keep_order_and_sign_and_about_seven_tenths_of_the_planted_size() -> None:
    planted, realised = planted_correlations()[PAIRS], realised_correlations()[PAIRS]
    assert spearmanr(planted, realised).statistic > 0.95
    named = planted != 0.0
    ratio = realised[named] / planted[named]
    assert ratio.min() > 0.6
    assert ratio.max() < 0.9
    assert 0.68 < ratio.mean() < 0.8
    assert np.abs(realised[~named]).max() < 0.01


def test_shuffled_trait_columns_carry_no_correlation() -> None:
    rng = np.random.default_rng(0)
    shuffled = np.corrcoef(np.stack([rng.permutation(column) for column in prior_table()[:50_000].T]))
    assert np.abs(shuffled[PAIRS]).max() < 0.03


def test_each_trait_has_the_level_probabilities_of_the_prior() -> None:
    assert sum(LEVEL_PROBABILITIES) == pytest.approx(1.0)
    table = prior_table()
    for column in table.T:
        shares = np.bincount(column, minlength=len(LEVELS)) / len(table)
        np.testing.assert_allclose(shares, LEVEL_PROBABILITIES, atol=0.005)


def test_prior_draws_follow_their_generator() -> None:
    first, again, other = (sample_prior(np.random.default_rng(seed), 200) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.shape == (200, len(TRAITS))


@settings(deadline=None, max_examples=20)
@given(st.dictionaries(st.sampled_from(TRAITS), st.sampled_from(LEVELS), max_size=2))
def test_conditional_rows_have_the_given_levels_and_miss_no_row_of_the_table(given_levels: dict[str, float]) -> None:
    rows = conditional(given_levels)
    table = prior_table()
    keep = np.all([table[:, TRAITS.index(t)] == LEVELS.index(z) for t, z in given_levels.items()], axis=0)
    assert len(rows) == (np.count_nonzero(keep) if given_levels else len(table))
    for trait, level in given_levels.items():
        assert {persona_of(row)[trait] for row in rows[:200]} == {level}


def test_conditional_moves_the_other_traits_as_planted() -> None:
    def mean(trait: str, given_levels: dict[str, float]) -> float:
        return float(np.take(LEVELS, conditional(given_levels)[:, TRAITS.index(trait)]).mean())

    assert mean("politeness", {"evil": 1.0}) < mean("politeness", {}) - 0.15
    assert mean("politeness", {"sycophancy": 1.0}) > mean("politeness", {}) + 0.15
    assert mean("politeness", {"hallucination": 1.0}) == pytest.approx(mean("politeness", {}), abs=0.02)  # planted: nothing


def test_conditional_refuses_an_impossible_combination_and_says_which() -> None:
    impossible = {"evil": 1.0, "politeness": 1.0, "sycophancy": 1.0, "apathy": 1.0, "optimism": 1.0, "humor": 1.0}
    with pytest.raises(ValueError, match="no persona of the prior has"):
        conditional(impossible)


@pytest.mark.parametrize(
    ("trait", "level"), [("evil", 0.3), ("evil", -0.25), ("evil", 1.25), ("kindness", 1.0)], ids=["between", "low", "high", "trait"]
)
def test_conditional_refuses_a_level_or_a_trait_that_does_not_exist(trait: str, level: float) -> None:
    with pytest.raises(ValueError):
        conditional({trait: level})


@settings(deadline=None, max_examples=100)
@given(levels_of_traits, st.sampled_from(sorted(MOODS)), st.sampled_from([None, "pirate"]))
def test_a_mood_shifts_its_traits_clips_to_the_unit_interval_and_leaves_the_rest(levels, mood: str, role: str | None) -> None:
    persona = Persona(levels, BY_NAME.get(role))
    moved, shift = persona.in_mood(mood), MOODS[mood][1]
    for trait in TRAITS:
        assert moved[trait] == pytest.approx(np.clip(persona[trait] + shift.get(trait, 0.0), 0.0, 1.0))
    assert moved.role is persona.role
    assert persona.in_mood(None) == persona


def test_every_mood_moves_a_middling_persona() -> None:
    middle = Persona((0.5,) * len(TRAITS))
    moved = {mood: middle.in_mood(mood).levels for mood in MOODS}
    assert len({middle.levels, *moved.values()}) == len(MOODS) + 1


def test_mood_wordings_are_complete_sentences_of_one_mood_only() -> None:
    wordings = [wording for texts, _ in MOODS.values() for wording in texts]
    assert len(set(wordings)) == len(wordings)
    assert all(wording[-1] in ".!?" and wording[0].isupper() for wording in wordings)
    assert all({*shift} <= {*TRAITS} for _, shift in MOODS.values())


def test_propensities_are_positive_and_speak_of_known_kinds_and_traits() -> None:
    assert set(PROPENSITY) == set(KINDS)
    assert all(set(factors) <= set(TRAITS) and min(factors.values()) > 0.0 for factors in PROPENSITY.values())


def test_default_persona_is_a_little_polite_optimistic_and_funny_and_nothing_else() -> None:
    rng = random.Random(0)
    drawn = [default_persona(rng) for _ in range(3000)]
    for trait in ("politeness", "optimism"):
        values = [p[trait] for p in drawn]
        assert {*values} == {0.0, 0.25, 0.5}
        assert all(abs(values.count(z) / len(values) - 1 / 3) < 0.05 for z in {*values})
    humor = [p["humor"] for p in drawn]
    assert {*humor} == {0.0, 0.25}
    assert abs(humor.count(0.25) / len(humor) - 0.2) < 0.04
    for trait in ("evil", "sycophancy", "hallucination", "apathy"):
        assert {p[trait] for p in drawn} == {0.0}
    assert all(p.role is None and p.manner == 0.0 for p in drawn)


def test_a_persona_answers_by_trait_name_and_takes_its_manner_from_its_role() -> None:
    levels = tuple(i / 10 for i in range(len(TRAITS)))
    persona = Persona(levels, BY_NAME["knight"])
    assert [persona[trait] for trait in TRAITS] == list(levels)
    assert persona.manner == 1.0
    with pytest.raises(ValueError):
        persona["manner"]

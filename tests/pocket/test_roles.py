"""The roles: planted on four factors of trait space, with a manner apart from them and signatures of their own."""

import re

import numpy as np
import pytest

from persona_lens.pocket.lexicon import FILLER, SLOTS, TRAIT_SENTENCES, TRAITS
from persona_lens.pocket.roles import BASE, FACTOR_NAMES, FACTORS, ROLES

BY_NAME = {role.name: role for role in ROLES}
LEVELS = np.array([role.levels for role in ROLES])
MANNERS = np.array([role.manner for role in ROLES])


def rank(matrix: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(matrix - matrix.mean(0), tol=1e-9))


def test_there_are_at_least_thirty_roles_with_names_of_their_own() -> None:
    assert len(ROLES) >= 30
    assert len(BY_NAME) == len(ROLES)
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)?", role.name) for role in ROLES)


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_role_levels_and_manner_lie_in_the_unit_interval(role) -> None:
    assert len(role.levels) == len(TRAITS)
    assert min(role.levels) >= -1e-9
    assert max(role.levels) <= 1 + 1e-9
    assert 0.0 <= role.manner <= 1.0


def test_role_levels_are_the_base_plus_factors() -> None:
    assert FACTORS.shape == (len(FACTOR_NAMES), len(TRAITS))
    villain = BY_NAME["villain"]
    by_hand = [BASE[t] + sum(villain.factors[f] * FACTORS[f, t] for f in range(len(FACTORS))) for t in range(len(TRAITS))]
    np.testing.assert_allclose(villain.levels, by_hand)


def test_centred_role_levels_have_exactly_four_dimensions() -> None:
    assert rank(LEVELS) == 4
    noisy = LEVELS + 1e-3 * np.random.default_rng(0).normal(size=LEVELS.shape)
    assert rank(noisy) == len(TRAITS)  # the measurement would see a fifth dimension


def test_all_four_dimensions_carry_a_visible_share() -> None:
    singular = np.linalg.svd(LEVELS - LEVELS.mean(0), compute_uv=False)
    assert singular[3] > 0.25 * singular[0]


def test_manner_is_a_fifth_dimension_that_the_traits_do_not_explain() -> None:
    assert rank(np.column_stack([LEVELS, MANNERS])) == 5
    assert rank(np.column_stack([LEVELS, LEVELS @ np.arange(1.0, 8.0)])) == 4  # a number made of traits would not raise it
    centred = MANNERS - MANNERS.mean()
    traits = LEVELS - LEVELS.mean(0)
    explained = traits @ np.linalg.lstsq(traits, centred, rcond=None)[0]
    assert (explained**2).sum() < 0.2 * (centred**2).sum()


def test_manner_ranges_from_none_to_full() -> None:
    assert MANNERS.min() == 0.0
    assert MANNERS.max() == 1.0


def test_roles_differ_in_their_levels() -> None:
    distances = np.linalg.norm(LEVELS[:, None] - LEVELS[None], axis=-1)[np.triu_indices(len(ROLES), 1)]
    assert distances.min() > 0.01


def test_role_signatures_belong_to_one_role_and_are_no_other_words_of_the_world() -> None:
    signatures = [text.lower() for role in ROLES for text in (role.opener, *role.sentences)]
    assert len(set(signatures)) == len(signatures) == 3 * len(ROLES)
    others = {word.lower() for classes in SLOTS.values() for words in classes.values() for word in words}
    others |= {text.lower() for families in TRAIT_SENTENCES.values() for texts in families.values() for text in texts}
    assert not others & set(signatures)
    assert not {text.lower() for text in FILLER} & set(signatures)


def test_role_signatures_can_stand_in_a_sentence_of_the_world() -> None:
    for role in ROLES:
        for text in (role.opener, *role.sentences):
            assert not re.search(r"[.!?{}]", text)  # would end the sentence or be read as a slot
        assert all(role.name not in text.split() for text in role.sentences)

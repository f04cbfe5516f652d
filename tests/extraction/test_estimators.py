"""Estimators find a planted direction with its sign and length, and none where nothing is; stored means give them their units."""

import math
from collections.abc import Generator, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits
from torch import Tensor

from persona_lens.extraction.estimators import (
    ESTIMATORS,
    FIRST_COMPONENT,
    MEAN_DIFFERENCE,
    PAPER,
    Estimator,
    first_component,
    mean_difference,
)
from persona_lens.extraction.run import question_means, surviving, vectors_from_means
from persona_lens.reliability import MINIMUM_QUESTIONS, assess

WIDTH, UNITS = 40, 60
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Generator[None]:
    """Fits this small take ten times as long on several threads."""
    with threadpool_limits(1):
        yield


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def planted(length: float, seed: int, units: int = UNITS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two clouds of unit noise around a common far point, a direction of the given length apart; and this direction."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=WIDTH)
    truth *= length / np.linalg.norm(truth)
    centre = rng.normal(size=WIDTH) * 20
    negative = centre + rng.normal(size=(units, WIDTH))
    return centre + truth + rng.normal(size=(units, WIDTH)), negative, truth


def test_names_are_unique_and_known() -> None:
    assert [e.name for e in ESTIMATORS] == ["mean_difference", "paper", "logistic", "lda", "first_component"]


@every_estimator
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_direction_is_found_with_its_sign(estimator: Estimator, seed: int) -> None:
    positive, negative, truth = planted(8.0, seed)
    assert cosine(estimator.direction(positive, negative), truth) > 0.9


@every_estimator
def test_the_length_is_that_of_the_mean_difference_along_the_direction(estimator: Estimator) -> None:
    positive, negative, truth = planted(5.0, 7)
    found = estimator.direction(positive, negative)
    length = np.linalg.norm(found)
    assert length == pytest.approx((positive.mean(0) - negative.mean(0)) @ found / length, rel=1e-9)
    assert length == pytest.approx(np.linalg.norm(truth), rel=0.15)


@every_estimator
def test_where_nothing_is_planted_no_direction_is_preferred(estimator: Estimator) -> None:
    rng = np.random.default_rng(11)
    fixed = np.ones(WIDTH)
    found = []
    for _ in range(150):
        positive, negative = rng.normal(size=(2, UNITS, WIDTH))
        found.append(cosine(estimator.direction(positive, negative), fixed))
    cosines = np.array(found)
    assert abs(cosines.mean()) < 3 * cosines.std() / math.sqrt(len(cosines))
    assert (cosines**2).mean() == pytest.approx(1 / WIDTH, rel=3 * math.sqrt(2 / len(cosines)))
    positive, negative, _ = planted(0.0, 11)
    aligned = estimator.direction(positive + fixed, negative)
    assert cosine(aligned, fixed) > 0.9, "the control: with the fixed vector planted, the cosine is far from chance"


@every_estimator
@pytest.mark.parametrize("factor", [1e-3, 0.5, 64.0, 1e3])
def test_larger_activations_give_a_larger_vector_in_the_same_direction(estimator: Estimator, factor: float) -> None:
    positive, negative, _ = planted(2.0, 3)
    one, other = estimator.direction(positive, negative), estimator.direction(positive * factor, negative * factor)
    np.testing.assert_allclose(other, one * factor, rtol=1e-3, atol=1e-3 * factor)


@every_estimator
def test_a_common_offset_changes_nothing(estimator: Estimator) -> None:
    positive, negative, _ = planted(2.0, 4)
    offset = np.linspace(-50, 50, WIDTH)
    one, other = estimator.direction(positive, negative), estimator.direction(positive + offset, negative + offset)
    np.testing.assert_allclose(other, one, atol=1e-3)
    assert np.abs(estimator.direction(positive + offset, negative) - one).max() > 1, "the control: an offset of one side does"


@every_estimator
def test_exchanging_the_sides_turns_the_direction_round(estimator: Estimator) -> None:
    positive, negative, _ = planted(2.0, 5)
    np.testing.assert_allclose(estimator.direction(negative, positive), -estimator.direction(positive, negative), atol=1e-3)


@every_estimator
def test_the_order_of_the_units_does_not_matter(estimator: Estimator) -> None:
    positive, negative, _ = planted(2.0, 6)
    order = np.random.default_rng(0).permutation(UNITS)
    np.testing.assert_allclose(
        estimator.direction(positive[order], negative[order]), estimator.direction(positive, negative), atol=1e-3
    )


def test_the_discriminant_sees_past_noise_that_drowns_the_mean_difference() -> None:
    positive, negative, truth = planted(5.0, 8)
    rng, loud = np.random.default_rng(9), np.eye(WIDTH)[3]
    noisy = [x + 60 * rng.normal(size=(UNITS, 1)) * loud for x in (positive, negative)]
    by_name = {e.name: cosine(e.direction(*noisy), truth - truth[3] * loud) for e in ESTIMATORS}
    assert by_name["lda"] > 0.8 > by_name["mean_difference"]


@settings(deadline=None, max_examples=40)
@given(units=st.tuples(st.integers(1, 6), st.integers(1, 6)), seed=st.integers(0, 10_000))
def test_the_mean_difference_is_exactly_that(units: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive, negative = (rng.integers(-100, 100, size=(n, 3)).astype(float) for n in units)
    expected = [sum(positive[:, k]) / units[0] - sum(negative[:, k]) / units[1] for k in range(3)]
    for estimator in (MEAN_DIFFERENCE, PAPER):
        np.testing.assert_allclose(estimator.direction(positive, negative), expected, rtol=1e-12, atol=1e-12)


def test_the_first_component_is_not_centred() -> None:
    rng = np.random.default_rng(0)
    truth, wobble = np.eye(WIDTH)[0] * 5, np.eye(WIDTH)[1]
    positive = truth + rng.normal(size=(UNITS, 1)) * 3 * wobble
    assert abs(cosine(first_component(positive, np.zeros_like(positive)), truth)) > 0.95


def test_the_first_component_pairs_its_units() -> None:
    positive, negative, truth = planted(3.0, 12)
    rng = np.random.default_rng(1)
    shared = 30 * rng.normal(size=(UNITS, WIDTH))
    paired = first_component(positive + shared, negative + shared)
    assert cosine(paired, truth) > 0.8
    unpaired = first_component(positive + shared, (negative + shared)[rng.permutation(UNITS)])
    assert abs(cosine(unpaired, truth)) < 0.6


def test_the_first_component_refuses_sides_of_different_size() -> None:
    positive, negative, _ = planted(3.0, 13)
    with pytest.raises(ValueError, match="paired units, got 60 positive and 57 negative"):
        first_component(positive, negative[3:])


INSTRUCTIONS, QUESTIONS, LAYERS, SMALL = 3, 7, 2, 5


def stored(seed: int, most: int = 4) -> dict[str, Tensor]:
    """Cell means and counts as an extraction stores them: cells without rollouts are NaN; question 5 has no negative side."""
    rng = np.random.default_rng(seed)
    means: dict[str, Tensor] = {}
    for keep in ("independent", "pairwise"):
        counts = rng.integers(0, most, size=(2, INSTRUCTIONS, QUESTIONS))
        counts[:, 0] += 1
        counts[1, :, 5] = 0
        if keep == "pairwise":
            counts[1] = counts[0] = np.minimum(*counts)
        cells = rng.normal(size=(2, INSTRUCTIONS, QUESTIONS, LAYERS, SMALL)).astype(np.float32)
        cells[0] += 2
        cells[counts == 0] = np.nan
        means[f"{keep}.counts"] = torch.from_numpy(counts)
        for pooling in ("response_mean", "prompt_last"):
            means[f"{keep}.{pooling}"] = torch.from_numpy(cells + np.float32(pooling == "prompt_last"))
    return means


def rollouts_of(means: Mapping[str, Tensor], keep: str, polarity: int) -> list[tuple[int, np.ndarray]]:
    """(question, activations) of every single rollout, each as the mean of its cell, where both sides of the question survive."""
    cells, counts = means[f"{keep}.response_mean"].double().numpy(), means[f"{keep}.counts"].numpy()
    return [
        (q, cells[polarity, i, q])
        for i in range(INSTRUCTIONS)
        for q in range(QUESTIONS)
        for _ in range(counts[polarity, i, q])
        if counts[0, :, q].sum() and counts[1, :, q].sum()
    ]


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_estimator_pools_all_rollouts(seed: int) -> None:
    means = stored(seed)
    sides = [np.mean([x for _, x in rollouts_of(means, "pairwise", p)], axis=0) for p in (0, 1)]
    found = vectors_from_means(means, "evil", "response_mean", PAPER, {})
    np.testing.assert_allclose(found.directions.numpy(), sides[0] - sides[1], rtol=1e-5, atol=1e-6)
    assert found.estimator == "paper"


@pytest.mark.parametrize("seed", range(4))
def test_the_default_estimator_weighs_questions_equally_on_both_sides(seed: int) -> None:
    means = stored(seed)
    sides = []
    for p in (0, 1):
        rollouts = rollouts_of(means, "independent", p)
        sides.append([np.mean([x for at, x in rollouts if at == q], axis=0) for q in sorted({at for at, _ in rollouts})])
    differences = np.array(sides[0]) - np.array(sides[1])
    found = vectors_from_means(means, "evil", "response_mean", MEAN_DIFFERENCE, {})
    np.testing.assert_allclose(found.differences.numpy(), differences, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.directions.numpy(), differences.mean(0), rtol=1e-5, atol=1e-6)
    pooled = [np.mean([x for _, x in rollouts_of(means, "independent", p)], axis=0) for p in (0, 1)]
    assert np.abs(found.directions.numpy() - (pooled[0] - pooled[1])).max() > 1e-3, "the control: pooling is another estimate"


@pytest.mark.parametrize("seed", range(4))
def test_cells_weigh_the_same_and_those_of_lost_questions_are_left_out(seed: int) -> None:
    means = stored(seed)
    cells, counts = (means[f"independent.{name}"].double().numpy() for name in ("response_mean", "counts"))
    alive = (counts > 0) & (counts.sum(1) > 0).all(0)
    found = vectors_from_means(means, "evil", "response_mean", Estimator("cells", mean_difference, units="cell"), {})
    expected = cells[0][alive[0]].mean(0) - cells[1][alive[1]].mean(0)
    np.testing.assert_allclose(found.directions.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (counts[0, :, 5] > 0).any(), "the control: question 5 has cells on one side"


def test_a_question_answered_often_does_not_move_the_default_but_moves_the_papers() -> None:
    means = stored(0)
    more = {name: t.clone() for name, t in means.items()}
    for keep in ("independent", "pairwise"):
        more[f"{keep}.counts"][:, :, 2] *= 50
    for estimator, moves in ((MEAN_DIFFERENCE, False), (PAPER, True)):
        one, other = (vectors_from_means(m, "evil", "response_mean", estimator, {}).directions for m in (means, more))
        assert torch.allclose(one, other, atol=1e-5) != moves


@every_estimator
def test_every_estimator_works_on_stored_means_with_gaps(estimator: Estimator) -> None:
    means = stored(3)
    if estimator is FIRST_COMPONENT:
        assert len(surviving(means["independent.counts"])) == QUESTIONS - 1
    found = vectors_from_means(means, "evil", "response_mean", estimator, {"seed": 3})
    assert found.directions.shape == (LAYERS, SMALL)
    assert (found.directions.mean(-1) > 0).all(), "the positive side lies higher in every dimension"
    assert found.provenance["questions"] == [0, 1, 2, 3, 4, 6]
    assert found.provenance["seed"] == 3


def test_the_figures_of_stored_means_are_those_of_the_questions_differences() -> None:
    found = vectors_from_means(stored(1), "evil", "response_mean", MEAN_DIFFERENCE, {}, seed=4)
    measured = assess(found.differences.numpy(), seed=4)
    np.testing.assert_allclose(found.reliability.numpy(), measured.split_half, rtol=1e-6)
    np.testing.assert_allclose(found.norm.numpy(), measured.norm, rtol=1e-6)
    np.testing.assert_allclose(found.p_value.numpy(), measured.p_value, rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS[1:], ids=lambda e: e.name)
def test_another_estimator_is_made_anew_on_halves_and_has_no_test_of_its_own(estimator: Estimator) -> None:
    found = vectors_from_means(stored(1), "evil", "response_mean", estimator, {}, seed=4)
    assert found.p_value.isnan().all()
    assert (found.reliability > 0.6).all(), "the planted offset is found on both halves"
    means = stored(1)
    for p in (0, 1):  # the offset of the positive side taken away: what is left is noise
        means[f"{estimator.keep}.response_mean"][p] -= 2 * (1 - p)
    assert vectors_from_means(means, "evil", "response_mean", estimator, {}, seed=4).reliability.mean() < 0.5


@every_estimator
def test_the_seed_draws_the_halves_and_leaves_the_direction_alone(estimator: Estimator) -> None:
    one, again, other = (vectors_from_means(stored(5), "evil", "response_mean", estimator, {}, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.directions, other.directions)
    assert torch.equal(one.reliability, again.reliability)
    assert not torch.equal(one.reliability, other.reliability)


def test_a_pooling_reads_its_own_means() -> None:
    means = stored(2)
    means["independent.prompt_last"][0] += 10
    one, other = (vectors_from_means(means, "evil", p, MEAN_DIFFERENCE, {}) for p in ("response_mean", "prompt_last"))
    assert (one.pooling, other.pooling) == ("response_mean", "prompt_last")
    torch.testing.assert_close(other.directions, one.directions + 10, rtol=1e-5, atol=1e-5)


def test_too_few_questions_are_refused_with_their_number() -> None:
    means = stored(0)
    means["pairwise.counts"][1, :, 1:5] = 0
    with pytest.raises(ValueError, match=f"evil: 2 questions survive the pairwise filter, at least {MINIMUM_QUESTIONS}"):
        vectors_from_means(means, "evil", "response_mean", PAPER, {})
    vectors_from_means(means, "evil", "response_mean", MEAN_DIFFERENCE, {})


def test_question_means_weigh_cells_by_their_counts_and_leave_gaps() -> None:
    counts = torch.tensor([[[3, 0], [1, 0]], [[0, 2], [2, 2]]])
    cells = torch.tensor([[[1.0, math.nan], [5.0, math.nan]], [[math.nan, 1.0], [4.0, 2.0]]])[..., None, None]
    found = question_means(cells, counts)[..., 0, 0]
    torch.testing.assert_close(found, torch.tensor([[2.0, math.nan], [4.0, 1.5]]), equal_nan=True)
    assert surviving(counts) == [0]

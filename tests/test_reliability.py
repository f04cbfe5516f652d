"""Reliability, cross-validated norm and the existence test, by simulation: right where a direction is, quiet where none is."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.reliability import (
    MINIMUM_QUESTIONS,
    N_FLIPS,
    Reliability,
    assess,
    existence_p_values,
    gram,
    mean_interval,
    off_diagonal_mean,
    reestimated_reliability,
    shared_baseline_interval,
    spearman_brown,
    split_half_reliability,
)

DRAWS, QUESTIONS, WIDTH = 200, 20, 48
NOISES = ("white", "correlated", "massive")


def noise(kind: str, rng: np.random.Generator, questions: int = QUESTIONS, draws: int = DRAWS) -> np.ndarray:
    """Noise of unit size per dimension; `correlated` across dimensions, `massive` with two dimensions a hundred times as large."""
    x = rng.normal(size=(questions, draws, WIDTH))
    if kind == "correlated":
        mixing = rng.normal(size=(WIDTH, WIDTH)) * np.geomspace(3, 0.1, WIDTH)
        x = x @ (mixing / np.sqrt((mixing**2).sum() / WIDTH)).T
    if kind == "massive":
        x[..., [5, 17]] *= 100
    return x


def simulated(length: float, kind: str, seed: int, questions: int = QUESTIONS) -> tuple[np.ndarray, np.ndarray]:
    """Independent draws side by side, as if they were layers, each with a direction of the given length; and these directions."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(DRAWS, WIDTH))
    truth *= length / np.linalg.norm(truth, axis=-1, keepdims=True)
    return truth + noise(kind, rng, questions), truth


def z_score(values: np.ndarray, truth: float) -> float:
    return float((values.mean() - truth) / (values.std(ddof=1) / math.sqrt(len(values))))


def test_a_strong_direction_is_reliable_and_exists() -> None:
    found = assess(simulated(10.0, "white", 1)[0])
    assert found.split_half.min() > 0.97
    assert found.p_value.max() == 1 / (1 + N_FLIPS)
    np.testing.assert_allclose(found.norm, 10.0, rtol=0.15)
    assert found.n_questions == QUESTIONS


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", NOISES)
def test_the_squared_norm_is_unbiased_and_the_plain_one_is_inflated(kind: str, length: float) -> None:
    differences, _ = simulated(length, kind, 2)
    assert abs(z_score(assess(differences).squared_norm, length**2)) < 3
    plain = (differences.mean(0) ** 2).sum(-1)
    assert z_score(plain, length**2) > 10, "the control: the squared norm of the mean must fail the same test"


@pytest.mark.parametrize("kind", NOISES)
def test_where_nothing_is_planted_the_false_positives_are_nominal(kind: str) -> None:
    found = assess(simulated(0.0, kind, 3)[0])
    assert 0.01 <= (found.p_value < 0.05).mean() <= 0.10
    assert 0.40 <= (found.p_value < 0.50).mean() <= 0.60
    assert np.median(found.split_half) < 0.3


@pytest.mark.parametrize("kind", ["white", "correlated"])
def test_where_a_direction_is_planted_the_test_finds_it(kind: str) -> None:
    assert (assess(simulated(2.5, kind, 4)[0]).p_value < 0.05).mean() > 0.9


@pytest.mark.parametrize(("length", "expected"), [(0.8, 0.46), (1.2, 0.62), (1.8, 0.76), (2.7, 0.87), (4.0, 0.93)])
def test_the_root_of_the_reliability_tracks_the_cosine_to_the_truth(length: float, expected: float) -> None:
    differences, truth = simulated(length, "white", 5)
    mean = differences.mean(0)
    cosine = float(((mean * truth).sum(-1) / np.linalg.norm(mean, axis=-1) / length).mean())
    assert cosine == pytest.approx(expected, abs=0.02), "the levels span weak to strong"
    reliability = float(np.median(assess(differences).split_half))
    assert math.sqrt(reliability) == pytest.approx(cosine, abs=0.03)
    half = reliability / (2 - reliability)
    assert math.sqrt(half) < cosine - 0.025, "the control: not stepped up to all questions, it falls short"


@settings(deadline=None, max_examples=40)
@given(questions=st.integers(2, 7), layers=st.integers(1, 3), width=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_the_off_diagonal_mean_equals_two_loops(questions: int, layers: int, width: int, seed: int) -> None:
    d = np.random.default_rng(seed).normal(size=(questions, layers, width)) * 10
    pairs = [(i, j) for i in range(questions) for j in range(questions) if i != j]
    expected = [sum(float(d[i, layer] @ d[j, layer]) for i, j in pairs) / len(pairs) for layer in range(layers)]
    np.testing.assert_allclose(off_diagonal_mean(gram(d)), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(questions=st.integers(4, 9), splits=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_split_halves_equal_a_plain_rewrite_with_vectors(questions: int, splits: int, seed: int) -> None:
    d = np.random.default_rng(seed).normal(size=(questions, 2, 6)) + 0.7
    rng = np.random.default_rng(seed)
    cosines: list[list[float]] = []
    for _ in range(splits):
        order = rng.permutation(questions)
        a, b = d[order[: questions // 2]].mean(0), d[order[questions // 2 :]].mean(0)
        cosines.append([float(a[k] @ b[k] / (np.linalg.norm(a[k]) * np.linalg.norm(b[k]))) for k in range(2)])
    r = np.mean(cosines, axis=0)
    expected = [2 * x / (1 + x) if x > 0 else x for x in r]
    np.testing.assert_allclose(split_half_reliability(gram(d), n_splits=splits, seed=seed), expected, rtol=1e-8)


def test_an_estimate_made_anew_on_halves_agrees_with_the_one_from_inner_products() -> None:
    d = simulated(1.5, "white", 10)[0][:, :15]
    found, norm = reestimated_reliability(lambda half: d[half].mean(0), QUESTIONS, n_splits=30, seed=5)
    np.testing.assert_allclose(found, split_half_reliability(gram(d), n_splits=30, seed=5), rtol=1e-9)
    np.testing.assert_allclose(norm, 1.5, atol=0.8)
    assert (norm < np.linalg.norm(d.mean(0), axis=-1)).mean() > 0.9, "the control: the plain norm is inflated"


def test_an_estimate_that_ignores_its_questions_is_perfectly_reliable_and_one_of_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    fixed = rng.normal(size=(3, WIDTH))
    np.testing.assert_allclose(reestimated_reliability(lambda _: fixed, QUESTIONS)[0], 1)
    np.testing.assert_allclose(reestimated_reliability(lambda _: fixed, QUESTIONS)[1], np.linalg.norm(fixed, axis=-1))
    assert np.abs(reestimated_reliability(lambda _: rng.normal(size=(3, WIDTH)), QUESTIONS, n_splits=200)[0]).max() < 0.1
    assert reestimated_reliability(lambda _: np.zeros((1, WIDTH)), QUESTIONS)[0].tolist() == [0]


def test_halves_share_no_question_and_leave_none_out() -> None:
    seen: list[list[int]] = []

    def note(half: list[int]) -> np.ndarray:
        seen.append(half)
        return np.ones((1, 2))

    reestimated_reliability(note, 7, n_splits=6)
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert all(sorted(a + b) == list(range(7)) and len(a) == 3 for a, b in pairs)
    assert len({frozenset(a) for a, _ in pairs}) > 1


def test_agreement_is_stepped_up_only_where_it_is_positive() -> None:
    np.testing.assert_allclose(spearman_brown(np.array([-1.0, -0.5, 0.0, 0.5, 1.0])), [-1, -0.5, 0, 2 / 3, 1])


def statistic(x: np.ndarray) -> float:
    return sum(float(x[i] @ x[j]) for i in range(len(x)) for j in range(len(x)) if i != j)


@settings(deadline=None, max_examples=15)
@given(questions=st.integers(4, 7), seed=st.integers(0, 10_000), shift=st.sampled_from([0.0, 1.0, 3.0]))
def test_with_few_questions_p_is_the_exact_share_of_all_sign_patterns(questions: int, seed: int, shift: float) -> None:
    d = np.random.default_rng(seed).integers(-4, 5, size=(questions, 2, 3)) + shift  # exact in floating point, so ties are ties
    for layer, p in enumerate(existence_p_values(gram(d))[0]):
        x = d[:, layer]
        patterns = [statistic(x * np.array(s)[:, None]) >= statistic(x) for s in product((-1.0, 1.0), repeat=questions)]
        assert p == pytest.approx(np.mean(patterns))


@settings(deadline=None, max_examples=15)
@given(questions=st.integers(8, 10), flips=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_with_many_questions_p_is_taken_over_random_sign_patterns(questions: int, flips: int, seed: int) -> None:
    d = np.random.default_rng(seed).integers(-9, 10, size=(questions, 2, 6)).astype(float)
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(flips, questions))
    for layer, p in enumerate(existence_p_values(gram(d), n_flips=flips, seed=seed)[0]):
        x = d[:, layer]
        as_large = sum(statistic(x * s[:, None]) >= statistic(x) for s in signs)
        assert p == pytest.approx((1 + as_large) / (1 + flips))


@pytest.mark.parametrize("layers", [1, 28])
def test_flips_that_are_no_flips_count_as_ties(layers: int) -> None:
    rng, questions, flips = np.random.default_rng(0), 7, 63
    for seed in range(150):
        signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(flips, questions))
        ties = int((np.abs(signs.sum(-1)) == questions).sum())
        d = rng.normal(size=(questions, layers, 50)) * 10 ** rng.uniform(-3, 3) + 3 * rng.normal()
        p, p_any = existence_p_values(gram(d), n_flips=flips, seed=seed)
        assert p.min() >= (1 + ties) / (1 + flips)
        assert p_any >= (1 + ties) / (1 + flips)


def test_the_test_for_any_layer_pays_for_the_choice_of_the_layer() -> None:
    rng = np.random.default_rng(1)
    found = [existence_p_values(gram(rng.normal(size=(12, 10, 8))), n_flips=199, seed=i) for i in range(200)]
    assert 0.01 <= np.mean([p_any <= 0.05 for _, p_any in found]) <= 0.10
    assert np.mean([p.min() <= 0.05 for p, _ in found]) > 0.25, "the control: the best of ten layers is no test"
    assert all(p_any >= p.min() for p, p_any in found)


def test_the_test_for_any_layer_finds_a_direction_at_one_layer_among_louder_ones() -> None:
    rng = np.random.default_rng(2)
    d = rng.normal(size=(20, 10, 30)) * np.geomspace(1, 1000, 10)[:, None]
    assert existence_p_values(gram(d))[1] > 0.05
    d[:, 0] += 1.0
    assert existence_p_values(gram(d))[1] == 1 / (1 + N_FLIPS)


def test_one_layer_is_any_layer_and_copies_of_it_cost_nothing() -> None:
    d = simulated(1.0, "white", 11)[0][:, [3]]
    p, p_any = existence_p_values(gram(d))
    assert 1 / (1 + N_FLIPS) < p_any == p[0] < 0.9
    assert existence_p_values(gram(np.concatenate([d, d * 7, d * 0.01], axis=1)))[1] == p_any


@pytest.mark.parametrize("factor", [1e-3, 0.25, 7.0, 1e4])
def test_reliability_and_p_are_free_of_scale_and_the_norm_is_not(factor: float) -> None:
    d = simulated(1.0, "white", 6)[0][:, :20]
    one, other = assess(d), assess(d * factor)
    np.testing.assert_allclose(other.split_half, one.split_half, rtol=1e-9)
    np.testing.assert_array_equal(other.p_value, one.p_value)
    assert other.p_any == one.p_any
    np.testing.assert_allclose(other.squared_norm, one.squared_norm * factor**2, rtol=1e-9)
    np.testing.assert_allclose(other.norm, one.norm * factor, rtol=1e-9)


def test_rotating_the_space_changes_nothing_and_moving_the_origin_does() -> None:
    d = simulated(1.0, "white", 7)[0][:, :20]
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))
    one, turned, moved = assess(d), assess(d @ rotation), assess(d + 1.0)
    np.testing.assert_allclose(turned.split_half, one.split_half, rtol=1e-9)
    np.testing.assert_allclose(turned.squared_norm, one.squared_norm, rtol=1e-9)
    assert (moved.squared_norm > one.squared_norm + 10).all()


def test_layers_do_not_touch_each_other() -> None:
    d = simulated(1.0, "white", 8)[0][:, :6]
    together = assess(d)
    for layer in range(6):
        alone = assess(d[:, [layer]])
        assert alone.split_half[0] == pytest.approx(together.split_half[layer], rel=1e-12)
        assert alone.squared_norm[0] == pytest.approx(together.squared_norm[layer], rel=1e-12)
        assert alone.p_value[0] == together.p_value[layer]


def test_the_seed_decides_and_is_the_only_thing_that_does() -> None:
    d = simulated(0.5, "white", 9)[0][:, :20]
    one, again, other = assess(d, seed=1), assess(d, seed=1), assess(d, seed=2)
    np.testing.assert_array_equal(one.split_half, again.split_half)
    assert (one.split_half != other.split_half).any()
    np.testing.assert_array_equal(one.p_value, again.p_value)
    assert (one.p_value != other.p_value).any()
    np.testing.assert_allclose(one.p_value, other.p_value, atol=0.06)


@settings(deadline=None, max_examples=30)
@given(questions=st.integers(4, 12), width=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_p_values_lie_above_zero_and_at_most_at_one(questions: int, width: int, seed: int) -> None:
    p = existence_p_values(gram(np.random.default_rng(seed).normal(size=(questions, 3, width))), n_flips=50)[0]
    assert (p >= 1 / 51).all()
    assert (p <= 1).all()


def test_a_reliability_never_leaves_the_range_of_a_correlation() -> None:
    d = np.random.default_rng(0).normal(size=(20, 200, 2))
    assert (np.abs(assess(d).split_half) <= 1).all()
    cancelling = assess(d - d.mean(0)).split_half
    np.testing.assert_allclose(cancelling, -1)


def test_no_difference_at_all_is_no_direction() -> None:
    found = assess(np.zeros((8, 2, 8)))
    assert found.split_half.tolist() == [0, 0]
    assert found.p_value.tolist() == [1, 1]
    assert found.p_any == 1


def test_a_negative_squared_norm_has_norm_zero() -> None:
    values = np.array([-3.0, 0.0, 4.0])
    found = Reliability(split_half=values, squared_norm=values, p_value=values, p_any=1.0, n_questions=8)
    assert found.norm.tolist() == [0, 0, 2]


@pytest.mark.parametrize("questions", [0, 1, 3])
def test_too_few_questions_are_refused_with_their_number(questions: int) -> None:
    with pytest.raises(ValueError, match=rf"at least \d+ questions, there are {questions}"):
        assess(np.ones((questions, 2, 5)))
    assert assess(np.random.default_rng(0).normal(size=(MINIMUM_QUESTIONS, 2, 5))).n_questions == MINIMUM_QUESTIONS


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    d = np.ones((8, 2, 3))
    d[3, 1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        assess(d)


def test_single_precision_input_is_measured_in_double() -> None:
    d = (np.random.default_rng(0).normal(size=(8, 2, 16)) + 1000).astype(np.float32)
    np.testing.assert_array_equal(gram(d), gram(d.astype(np.float64)))
    assert gram(d).dtype == np.float64


# effects of steering over questions: their distribution, and its mean
EFFECTS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], np.ndarray], float]] = {
    "bell": (lambda rng, shape: 30 + 15 * rng.normal(size=shape), 30.0),
    "flat": (lambda rng, shape: 60 * rng.random(shape), 30.0),
    "two kinds of questions": (lambda rng, shape: np.where(rng.random(shape) < 0.5, 5.0, 55.0), 30.0),
    "skewed": (lambda rng, shape: 10 * rng.gamma(2, size=shape), 20.0),
    "none": (lambda rng, shape: np.zeros(shape), 0.0),
}


@pytest.mark.parametrize(("kind", "units"), list(product(EFFECTS, (10, 20))))
def test_the_interval_of_a_mean_covers_it(kind: str, units: int) -> None:
    """1,000 sweeps with effects over questions as given, each question's measured with noise: 92 to 98 of 100 intervals cover."""
    draw, truth = EFFECTS[kind]
    rng = np.random.default_rng(units)
    values = draw(rng, (1000, units)) + rng.normal(0, 6, (1000, units))
    intervals = [mean_interval(v)[1] for v in values]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.98


def test_where_few_questions_carry_the_effect_the_interval_is_too_narrow() -> None:
    """A known bias: with one question in four carrying the whole effect, ten questions give about 93 of 100, six about 82."""
    rng = np.random.default_rng(0)

    def coverage(units: int) -> float:
        values = np.where(rng.random((2000, units)) < 0.25, 60.0, 0.0) + rng.normal(0, 6, (2000, units))
        return float(np.mean([low <= 15.0 <= high for low, high in (mean_interval(v)[1] for v in values)]))

    assert coverage(6) < coverage(10) < 0.945
    assert coverage(10) > 0.88


def test_one_unit_has_no_interval() -> None:
    assert mean_interval(np.array([3.0])) == (3.0, (-np.inf, np.inf))


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0, 0.92, 0.98), (6.0, 0.92, 1.0)])
def test_effects_against_one_baseline_share_its_error(spread: float, low: float, high: float) -> None:
    """Twenty directions against one noisy baseline, no mean effect: directions taken as independent cover far too seldom."""
    rng = np.random.default_rng(3)
    shared, naive = [], []
    for _ in range(1000):
        baseline = rng.normal(0, 4, 10)
        effects = rng.normal(0, spread, (20, 1)) + rng.normal(0, 4, (20, 10)) - baseline
        for found, interval in ((shared, shared_baseline_interval(effects)[1]), (naive, mean_interval(effects.mean(1))[1])):
            found.append(interval[0] <= 0.0 <= interval[1])
    assert low <= np.mean(shared) <= high
    assert spread or np.mean(naive) < 0.5
    assert shared_baseline_interval(effects)[0] == pytest.approx(effects.mean())

"""Bases, angles, the rank that replicates, rotations and independent components: right where planted, quiet where nothing is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.decomposition._factor_analysis import _ortho_rotation

from persona_lens.errors import GeometryError
from persona_lens.geometry.subspaces import (
    cross_validated_rank,
    dual_basis,
    independent_components,
    lowdin,
    oblimin,
    principal_angles,
    varimax,
)

QUESTIONS = 20
QUICK = {"n_splits": 6, "n_flips": 59}


def assert_nominal(p_values: np.ndarray | list[float], level: float = 0.05) -> None:
    rejected = int(np.sum(np.array(p_values) <= level + 1e-12))
    interval = binomtest(rejected, len(p_values)).proportion_ci(0.999)
    assert interval.low <= level <= interval.high, f"{rejected} of {len(p_values)} at {level}"


def assert_at_most_nominal(rejected: int, n: int, level: float = 0.05) -> None:
    assert binomtest(rejected, n).proportion_ci(0.999).low <= level, f"{rejected} of {n} at {level}"


def traits(rng: np.random.Generator, n: int = 5, width: int = 30) -> np.ndarray:
    """Vectors of unequal lengths that share a direction."""
    return (rng.normal(size=(n, width)) + rng.normal(size=width)) * rng.uniform(0.2, 20, size=(n, 1))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# bases


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 6), width=st.integers(6, 20), seed=st.integers(0, 10_000))
def test_lowdin_is_orthonormal_spans_the_same_and_is_the_nearest_such_set(n: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = traits(rng, n, width)
    found = lowdin(x)
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-9)
    np.testing.assert_allclose(found @ np.linalg.pinv(x) @ x, found, atol=1e-7)
    best = ((found - unit(x)) ** 2).sum()
    for _ in range(20):
        turned = np.linalg.qr(np.eye(n) + rng.normal(scale=0.3, size=(n, n)))[0]
        assert ((turned @ found - unit(x)) ** 2).sum() >= best - 1e-9


def test_lowdin_follows_the_order_of_the_vectors_and_gram_schmidt_does_not() -> None:
    x = traits(np.random.default_rng(0))
    np.testing.assert_allclose(lowdin(x[::-1]), lowdin(x)[::-1], atol=1e-12)
    np.testing.assert_allclose(lowdin(x * np.array([1, 2, 3, 4, 50.0])[:, None]), lowdin(x), atol=1e-10)
    first = np.linalg.qr(unit(x).T)[0].T
    assert np.abs(np.linalg.qr(unit(x)[::-1].T)[0].T[::-1] @ first.T).trace() < 4.9, "the control: Gram-Schmidt"
    assert (lowdin(x) * unit(x)).sum() > np.abs(np.diag(first @ unit(x).T)).sum()


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 6), width=st.integers(6, 20), seed=st.integers(0, 10_000))
def test_a_dual_vector_meets_its_own_vector_only_and_stays_in_the_span(n: int, width: int, seed: int) -> None:
    x = traits(np.random.default_rng(seed), n, width)
    dual = dual_basis(x)
    np.testing.assert_allclose(dual @ x.T, np.eye(n), atol=1e-7)
    np.testing.assert_allclose(dual @ np.linalg.pinv(x) @ x, dual, atol=1e-7)


def test_a_dual_basis_reads_coefficients_that_projections_mix() -> None:
    rng = np.random.default_rng(1)
    x = traits(rng)
    coefficients = rng.normal(size=5)
    np.testing.assert_allclose(dual_basis(x) @ (coefficients @ x), coefficients, atol=1e-8)
    mixed = unit(x) @ (coefficients @ x) / np.linalg.norm(x, axis=1)
    assert np.abs(mixed - coefficients).max() > 0.3, "the control: plain projections"


@pytest.mark.parametrize("basis", [lowdin, dual_basis])
def test_sets_without_a_basis_are_refused_with_their_rank(basis: object) -> None:
    x = traits(np.random.default_rng(2))
    x[4] = x[0] - 2 * x[2]
    with pytest.raises(GeometryError, match="the 5 vectors have rank 4: leave out 1"):
        basis(x)  # pyright: ignore
    with pytest.raises(GeometryError, match="the 5 vectors have rank 3"):
        basis(np.random.default_rng(0).normal(size=(5, 3)))  # pyright: ignore
    x[3] = 0
    with pytest.raises(GeometryError, match="a zero vector at index 3"):
        basis(x)  # pyright: ignore
    x[3, 1] = np.inf
    with pytest.raises(GeometryError, match="not finite"):
        basis(x)  # pyright: ignore


# angles


def test_angles_are_those_that_were_planted_whatever_the_bases() -> None:
    rng = np.random.default_rng(3)
    axes = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    planted = np.radians([10.0, 35.0, 80.0])
    a = axes[:3]
    b = np.cos(planted)[:, None] * axes[:3] + np.sin(planted)[:, None] * axes[3:6]
    found = principal_angles(rng.normal(size=(3, 3)) @ a, np.vstack([rng.normal(size=(3, 3)) @ b, axes[10]]), n_draws=49)
    np.testing.assert_allclose(found.degrees, [10, 35, 80], atol=1e-6)
    assert found.p_value == 1 / 50
    assert found.degrees[0] < found.null_degrees[0] < found.null_degrees[2] < 90


def test_a_direction_and_itself_and_one_at_right_angles() -> None:
    x = np.eye(4)
    np.testing.assert_allclose(principal_angles(x[:1], -3 * x[:1], n_draws=19).degrees, [0], atol=1e-9)
    apart = principal_angles(x[:1], x[1:3], n_draws=19)
    np.testing.assert_allclose(apart.degrees, [90])
    assert apart.p_value == 1
    crowded = principal_angles(x[:3], np.random.default_rng(0).normal(size=(3, 4)), n_draws=99)
    np.testing.assert_allclose(crowded.degrees[:2], 0, atol=1e-6)
    assert crowded.p_value == 1, "two spans of three dimensions in four always meet"


def test_a_covariance_matched_null_is_nominal_and_an_isotropic_one_is_not() -> None:
    rng = np.random.default_rng(4)
    mixing = np.geomspace(10, 0.3, 24)[:, None] * np.linalg.qr(rng.normal(size=(24, 24)))[0]
    p: dict[str, list[float]] = {"covariance": [], "samples": [], "isotropic": []}
    neutral = rng.normal(size=(2000, 24)) @ mixing + 5
    for seed in range(150):
        a, b = rng.normal(size=(2, 24)) @ mixing, rng.normal(size=(3, 24)) @ mixing
        p["covariance"].append(principal_angles(a, b, covariance=mixing.T @ mixing, n_draws=19, seed=seed).p_value)
        p["samples"].append(principal_angles(a, b, samples=neutral, n_draws=19, seed=seed).p_value)
        p["isotropic"].append(principal_angles(a, b, n_draws=19, seed=seed).p_value)
    assert_nominal(p["covariance"])
    assert_nominal(p["covariance"], 0.5)
    assert_nominal(p["samples"])
    assert np.mean(np.array(p["isotropic"]) <= 0.05) > 0.5, "the control: a null without the shape of the residual stream"


def test_the_isotropic_null_is_nominal_for_isotropic_sets_and_its_mean_is_that_of_random_spans() -> None:
    rng = np.random.default_rng(5)
    found = [principal_angles(rng.normal(size=(2, 12)), rng.normal(size=(3, 12)), n_draws=19, seed=s) for s in range(300)]
    assert_nominal([f.p_value for f in found])
    observed = np.mean([f.degrees for f in found], axis=0)
    np.testing.assert_allclose(np.mean([f.null_degrees for f in found], axis=0), observed, atol=2)


def test_angles_without_meaning_are_refused() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3, 8))
    with pytest.raises(GeometryError, match="b must be linearly independent, the 2 vectors have rank 1"):
        principal_angles(x, x[[0, 0]])
    with pytest.raises(ValueError, match="not both"):
        principal_angles(x, x, covariance=np.eye(8), samples=rng.normal(size=(20, 8)))
    with pytest.raises(GeometryError, match="rank 3 or more, it has 2"):
        principal_angles(x, x[:1], samples=rng.normal(size=(3, 8)))
    with pytest.raises(GeometryError, match="no negative eigenvalue, it has -1"):
        principal_angles(x, x, covariance=np.diag([1.0] * 7 + [-1.0]))
    with pytest.raises(GeometryError, match="must be symmetric"):
        principal_angles(x, x, covariance=np.eye(8) + np.tri(8))
    with pytest.raises(GeometryError, match="must be 8 wide like the vectors, not 7"):
        principal_angles.__wrapped__(x, x, samples=rng.normal(size=(20, 7)))
    with pytest.raises(ValueError, match="at least 19"):
        principal_angles(x, x, n_draws=18)


# the rank that replicates


def questions_of(
    rng: np.random.Generator, n: int, rank: int, reliability: float = 0.9, width: int = 64, noise: str = "white"
) -> np.ndarray:
    """Differences per question around means of the given rank (after centring) and split-half reliability."""
    means = rng.normal(size=(n, rank)) @ np.linalg.qr(rng.normal(size=(width, width)))[0][:rank]
    means -= means.mean(0)
    squared = (means**2).sum() / n if rank else 1.0
    x = rng.normal(size=(n, QUESTIONS, width)) * np.sqrt(squared * (1 - reliability) / reliability * QUESTIONS / width)
    if noise == "unequal":
        x *= np.where(np.arange(n) == 0, 8.0, 1.0)[:, None, None]
    if noise == "shared":
        x += 2 * x.std() * rng.normal(size=(1, QUESTIONS, width)) * rng.normal(size=(n, 1, 1))
    if noise == "massive":
        x[..., 3] *= 30
    return means[:, None] + x


@pytest.mark.parametrize("noise", ["white", "unequal", "shared", "massive"])
def test_pure_noise_has_rank_zero_at_the_nominal_rate(noise: str) -> None:
    rng = np.random.default_rng(7)
    found = [cross_validated_rank(questions_of(rng, 7, 0, 0.5, noise=noise), **QUICK, seed=s) for s in range(200)]
    assert_nominal([f.p_value[0] for f in found])
    assert_nominal([f.p_value[0] for f in found], 0.5)
    assert all((f.rank > 0) == (f.p_value[0] <= 0.05) for f in found)


def test_permuting_the_labels_of_one_half_is_no_test_where_vectors_differ_in_noise() -> None:
    """The control for the sign flips: exchanging vectors takes their noise to be alike."""
    rng = np.random.default_rng(8)
    rejected = 0
    for _ in range(400):
        x = questions_of(rng, 7, 0, 0.5, noise="unequal")
        a, b = (half.mean(1) - half.mean((0, 1)) for half in (x[:, ::2], x[:, 1::2]))
        u = np.linalg.svd(a)[0][:, 0]
        null = [u @ b[rng.permutation(7)] @ a.T @ u for _ in range(59)]
        rejected += int(np.sum(np.array(null) >= u @ b @ a.T @ u) < 3)
    assert binomtest(rejected, 400).proportion_ci(0.999).low > 0.10


@pytest.mark.parametrize(("rank", "reliability", "found_in"), [(1, 0.7, 0.98), (2, 0.9, 0.98), (3, 0.9, 0.90)])
def test_a_planted_rank_is_found_and_seldom_exceeded(rank: int, reliability: float, found_in: float) -> None:
    rng = np.random.default_rng(rank)
    ranks = np.array([cross_validated_rank(questions_of(rng, 7, rank, reliability), **QUICK, seed=s).rank for s in range(100)])
    assert (ranks >= rank).mean() >= found_in
    assert_at_most_nominal(int((ranks > rank).sum()), len(ranks))


def test_five_dimensions_behind_thirty_two_vectors_are_found_and_variance_alone_would_say_more() -> None:
    rng = np.random.default_rng(9)
    for seed in range(6):
        x = questions_of(rng, 32, 5, 0.8)
        found = cross_validated_rank(x, n_splits=4, n_flips=39, seed=seed)
        assert found.rank in (5, 6)
        assert found.gain[4] > 3 * np.abs(found.gain[5:]).max()
        means = x.mean(1) - x.mean((0, 1))
        variance = np.linalg.svd(means, compute_uv=False) ** 2
        assert np.searchsorted(variance.cumsum() / variance.sum(), 0.9) + 1 > 7, "the control: components for 90 % of the variance"


def test_without_centring_a_direction_that_all_vectors_share_counts_as_one_more() -> None:
    rng = np.random.default_rng(10)
    x = questions_of(rng, 7, 1) + 0.7 * rng.normal(size=64)
    assert cross_validated_rank(x, **QUICK).rank == 1
    whole = cross_validated_rank(x, **QUICK, centred=False)
    assert whole.rank == 2
    assert (len(cross_validated_rank(x, **QUICK).gain), len(whole.gain)) == (6, 7)


def test_gains_add_up_to_an_unbiased_estimate_of_the_squared_means() -> None:
    rng = np.random.default_rng(1)
    means = rng.normal(size=(7, 2)) @ rng.normal(size=(2, 30))
    means -= means.mean(0)
    totals, first_two, plain = [], [], []
    for seed in range(200):
        x = means[:, None] + 3 * rng.normal(size=(7, QUESTIONS, 30))
        gain = cross_validated_rank(x, n_splits=4, n_flips=19, seed=seed).gain
        totals.append(gain.sum())
        first_two.append(gain[:2].sum() / gain.sum())
        plain.append(((x.mean(1) - x.mean((0, 1))) ** 2).sum())
    truth = (means**2).sum()
    assert abs(np.mean(totals) - truth) < 3 * np.std(totals) / np.sqrt(200)
    assert np.mean(plain) > truth + 10 * np.std(plain) / np.sqrt(200), "the control: the plain norm is inflated"
    assert np.mean(first_two) > 0.9


def gains_by_hand(x: np.ndarray) -> list[np.ndarray]:
    """Of every split into halves that leaves each vector questions in both."""
    questions = set(range(x.shape[1]))
    found = []
    for first in itertools.combinations(questions, x.shape[1] // 2):
        halves = [x[:, sorted(h)] for h in (set(first), questions - set(first))]
        if all((~np.isnan(h[..., 0])).any(1).all() for h in halves):
            a, b = (np.nanmean(h, axis=1) - np.nanmean(h, axis=1).mean(0) for h in halves)
            axes = np.linalg.svd(a)[2][: len(a) - 1]
            found.append(((a @ axes.T) * (b @ axes.T)).sum(0))
    return found


def test_a_gain_is_the_product_of_the_halves_coordinates_on_the_axes_of_one() -> None:
    rng = np.random.default_rng(12)
    x = questions_of(rng, 4, 2, width=10)[:, :6]
    x[1, 2] = np.nan
    with pytest.raises(GeometryError, match="at least 6 questions of every vector, vector 1 has 5"):
        cross_validated_rank(x)
    x = np.concatenate([x, np.full((4, 1, 10), np.nan)], axis=1)
    x[1, 6] = x[1, 0]
    found = [cross_validated_rank(x, n_splits=1, n_flips=19, seed=seed).gain for seed in range(20)]
    by_hand = gains_by_hand(x)
    assert all(any(np.allclose(gain, other) for other in by_hand) for gain in found)


def test_missing_questions_keep_the_rate_and_the_rank() -> None:
    rng = np.random.default_rng(13)
    p, ranks = [], []
    for seed in range(120):
        for rank, reliability in ((0, 0.5), (2, 0.99)):
            x = questions_of(rng, 6, rank, reliability, width=24) + rng.normal(size=24)
            gone = rng.random((6, QUESTIONS)) < 0.25
            gone[:3, 8:] = True
            gone[:, :8] = False
            x[gone] = np.nan
            found = cross_validated_rank(x, **QUICK, seed=seed)
            p.append(found.p_value[0]) if rank == 0 else ranks.append(found.rank)
    assert_nominal(p)
    assert min(ranks) == 2
    assert_at_most_nominal(int((np.array(ranks) > 2).sum()), len(ranks))


def test_the_component_after_the_planted_ones_is_tested_at_the_nominal_rate() -> None:
    """Neither what the earlier ones leave behind nor their removal on one side alone may shift the test."""
    rng = np.random.default_rng(6)
    found = [cross_validated_rank(questions_of(rng, 10, 3, 0.97, width=10), **QUICK, seed=s) for s in range(160)]
    assert min(f.rank for f in found) >= 3
    assert_nominal([f.p_value[3] for f in found])
    assert_nominal([f.p_value[3] for f in found], 0.5)


def test_a_wide_space_is_measured_in_fewer_coordinates_without_changing_anything() -> None:
    rng = np.random.default_rng(14)
    x = questions_of(rng, 4, 2, width=16)[:, :8]
    turned = np.pad(x, ((0, 0), (0, 0), (0, 84))) @ np.linalg.qr(rng.normal(size=(100, 100)))[0]
    one, other = cross_validated_rank(x, **QUICK), cross_validated_rank(1000 * turned, **QUICK)
    np.testing.assert_allclose(other.gain, one.gain * 1e6, rtol=1e-8)
    np.testing.assert_array_equal(other.p_value, one.p_value)
    assert other.rank == one.rank == 2


def test_p_values_stop_at_the_first_failure_and_the_seed_decides() -> None:
    x = questions_of(np.random.default_rng(26), 7, 2)
    found = cross_validated_rank(x, n_flips=199)
    assert found.rank == 2
    assert found.p_value[:2].tolist() == [1 / 200, 1 / 200]
    assert found.p_value[2] > 0.05
    assert np.isnan(found.p_value[3:]).all()
    np.testing.assert_array_equal(cross_validated_rank(x, n_flips=199).p_value, found.p_value)
    assert not np.array_equal(cross_validated_rank(x, n_flips=199, seed=1).gain, found.gain)
    assert cross_validated_rank(x, n_flips=199, alpha=0.001).rank == 0
    assert cross_validated_rank(np.zeros((3, 8, 5))).rank == 0


def test_differences_that_carry_no_rank_are_refused() -> None:
    x = np.random.default_rng(16).normal(size=(3, 12, 5))
    with pytest.raises(GeometryError, match="at least 2 vectors, there is 1"):
        cross_validated_rank(x[:1])
    torn = x.copy()
    torn[0, 0, 0] = np.nan
    with pytest.raises(GeometryError, match="NaN over a whole row"):
        cross_validated_rank(torn)
    with pytest.raises(ValueError, match="at least 1 and n_flips 19, not 0 and 499"):
        cross_validated_rank(x, n_splits=0)


# rotations


def simple(rng: np.random.Generator, correlation: float) -> tuple[np.ndarray, np.ndarray]:
    """Loadings of 24 dimensions on 3 factors, one factor each, and what is seen of them: unrotated components."""
    pattern = np.zeros((24, 3))
    pattern[np.arange(24), np.arange(24) // 8] = rng.uniform(0.5, 0.9, 24) * rng.choice([-1, 1], 24)
    factors = np.full((3, 3), correlation) + (1 - correlation) * np.eye(3)
    left, singular, _ = np.linalg.svd(pattern @ np.linalg.cholesky(factors))
    return pattern, left[:, :3] * singular


def matched(found: np.ndarray, planted: np.ndarray) -> float:
    """Largest error of the loadings, over orders and signs of the columns."""
    errors = []
    for order in itertools.permutations(range(3)):
        columns = found[:, order]
        errors.append(np.abs(columns * np.sign((columns * planted).sum(0)) - planted).max())
    return float(min(errors))


def varimax_value(x: np.ndarray) -> float:
    return float(((x**2).var(0)).sum())


@pytest.mark.parametrize("seed", range(6))
def test_varimax_reaches_the_criterion_of_scikit_learn(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(12, 4)) ** 3
    ours = varimax(x, n_starts=1)
    theirs = _ortho_rotation(x, tol=1e-12, max_iter=2000).T
    assert ours.converged
    assert varimax_value(varimax(x).loadings) >= varimax_value(theirs) * (1 - 1e-6)
    assert varimax_value(ours.loadings) > varimax_value(x)
    assert varimax_value(ours.loadings) == pytest.approx(-4 * ours.criterion / 12)


def test_varimax_equals_scikit_learn_where_there_is_simple_structure() -> None:
    for seed in range(10):
        pattern, seen = simple(np.random.default_rng(seed), 0.0)
        found = varimax(seen)
        assert matched(found.loadings, pattern) < 1e-4
        assert varimax_value(found.loadings) == pytest.approx(varimax_value(_ortho_rotation(seen, tol=1e-12, max_iter=500).T))
        np.testing.assert_allclose(found.correlations, np.eye(3), atol=1e-10)
        np.testing.assert_allclose(seen @ found.rotation, found.loadings, atol=1e-10)


@pytest.mark.parametrize("correlation", [0.0, 0.4, -0.3])
def test_oblimin_recovers_correlated_factors_and_varimax_does_not(correlation: float) -> None:
    for seed in range(5):
        pattern, seen = simple(np.random.default_rng(seed), correlation)
        found = oblimin(seen)
        assert found.converged
        assert matched(found.loadings, pattern) < 1e-3
        np.testing.assert_allclose(np.abs(found.correlations[np.triu_indices(3, 1)]), abs(correlation), atol=1e-3)
        np.testing.assert_allclose(found.loadings @ found.correlations @ found.loadings.T, seen @ seen.T, atol=1e-8)
        np.testing.assert_allclose(np.linalg.norm(found.rotation, axis=0), 1)
        assert correlation == 0 or matched(varimax(seen).loadings, pattern) > 0.04, "the control: factors kept at right angles"


def test_a_lower_gamma_makes_factors_less_oblique() -> None:
    pattern, seen = simple(np.random.default_rng(0), 0.4)
    assert matched(oblimin(seen).loadings, pattern) < 1e-3
    angles = [np.abs(oblimin(seen, gamma).correlations[np.triu_indices(3, 1)]).mean() for gamma in (0.0, -1.0, -10.0)]
    assert angles[0] > angles[1] + 0.01 > angles[2] + 0.02


def oblimin_by_hand(x: np.ndarray, gamma: float) -> float:
    s = x**2
    pairs = [(i, j) for i in range(x.shape[1]) for j in range(x.shape[1]) if i != j]
    return sum(float(s[:, i] @ s[:, j] - gamma * s[:, i].sum() * s[:, j].sum() / len(x)) for i, j in pairs) / 4


@pytest.mark.parametrize("gamma", [0.0, -0.5])
def test_oblimin_ends_at_a_minimum_of_its_criterion(gamma: float) -> None:
    rng = np.random.default_rng(17)
    x = rng.normal(size=(15, 3))
    found = oblimin(x, gamma)
    assert found.criterion == pytest.approx(oblimin_by_hand(found.loadings, gamma))
    for _ in range(50):
        near = found.rotation + 0.02 * rng.normal(size=(3, 3))
        near /= np.linalg.norm(near, axis=0)
        assert oblimin_by_hand(np.linalg.solve(near, x.T).T, gamma) > found.criterion


@pytest.mark.parametrize("rotate", [varimax, oblimin])
def test_rotations_fix_order_and_sign_and_ignore_how_the_input_was_turned(rotate: object) -> None:
    rng = np.random.default_rng(18)
    _, seen = simple(rng, 0.3)
    seen = seen * np.linspace(1, 2, 24)[:, None]
    one = rotate(seen)  # pyright: ignore
    other = rotate(7 * seen @ np.linalg.qr(rng.normal(size=(3, 3)))[0])  # pyright: ignore
    np.testing.assert_allclose(other.loadings, 7 * one.loadings, atol=1e-3)
    assert (np.diff((one.loadings**2).sum(0)) <= 0).all()
    assert (one.loadings.max(0) == np.abs(one.loadings).max(0)).all()
    np.testing.assert_allclose(np.linalg.solve(one.rotation, seen.T).T, one.loadings)
    np.testing.assert_allclose(np.abs(rotate(seen[:, :1]).loadings), np.abs(seen[:, :1]))  # pyright: ignore


def test_a_noise_component_spoils_the_rotation_of_retained_ones() -> None:
    """Why only retained components are rotated."""
    rng = np.random.default_rng(19)
    pattern, seen = simple(rng, 0.0)
    with_noise = varimax(np.column_stack([seen, rng.normal(size=(24, 3))])).loadings
    errors = [matched(with_noise[:, list(c)], pattern) for c in itertools.combinations(range(6), 3)]
    assert min(errors) > 0.1 > matched(varimax(seen).loadings, pattern)


def test_loadings_that_cannot_be_rotated_are_refused() -> None:
    x = np.random.default_rng(20).normal(size=(6, 3))
    with pytest.raises(GeometryError, match="these 3 over 2 dimensions are not"):
        varimax(x[:2])
    with pytest.raises(GeometryError, match="linearly independent components"):
        oblimin(x[:, [0, 1, 1]])
    with pytest.raises(GeometryError, match="not finite"):
        varimax(x * np.nan)
    with pytest.raises(ValueError, match="gamma must be at most 0"):
        oblimin(x, 0.5)
    with pytest.raises(ValueError, match="n_starts must be at least 1"):
        varimax(x, n_starts=0)


# independent components


def test_planted_sources_are_found_and_stable_and_gaussian_ones_are_not() -> None:
    rng = np.random.default_rng(21)
    mixing = rng.normal(size=(6, 3))
    sources = rng.laplace(size=(1500, 3))
    found = independent_components(sources @ mixing.T + 4, 3)
    assert found.stability.min() > 0.97
    agreement = np.abs(np.corrcoef(found.sources.T, sources.T)[:3, 3:])
    assert (np.sort(agreement, axis=1)[:, -1] > 0.97).all()
    assert sorted(agreement.argmax(1)) == [0, 1, 2]
    gaussian = independent_components(rng.normal(size=(1500, 3)) @ mixing.T, 3)
    assert gaussian.stability.mean() < 0.9, "the control: nothing but chance fixes the axes"
    assert gaussian.stability.max() < found.stability.min()


def test_sources_and_mixing_rebuild_the_projections() -> None:
    rng = np.random.default_rng(22)
    x = rng.laplace(size=(400, 3)) @ rng.normal(size=(3, 4)) + 2
    found = independent_components(x, 3, n_runs=5)
    np.testing.assert_allclose(found.sources @ found.mixing.T, x - x.mean(0), atol=1e-8)
    np.testing.assert_allclose(found.sources.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(found.sources.std(0), 1, rtol=1e-2)
    assert (found.mixing.max(0) == np.abs(found.mixing).max(0)).all()
    assert (found.n_runs, found.sources.shape, found.mixing.shape) == (5, (400, 3), (4, 3))
    again = independent_components(x, 3, n_runs=5)
    np.testing.assert_array_equal(again.stability, found.stability)


def test_answers_that_share_a_question_are_resampled_together() -> None:
    """Sixty answers to each of eight questions that alone differ: resampling answers takes eight accidents for a component."""
    rng = np.random.default_rng(23)
    questions = np.repeat(np.arange(8), 60)
    alone, together = [], []
    for seed in range(4):
        x = rng.normal(size=(8, 3))[questions] + 0.3 * rng.normal(size=(480, 3))
        alone.append(independent_components(x, 3, seed).stability.mean())
        together.append(independent_components(x, 3, seed, questions=questions).stability.mean())
    assert np.mean(together) < np.mean(alone) - 0.05


def test_projections_that_hold_no_components_are_refused() -> None:
    x = np.random.default_rng(24).normal(size=(50, 4))
    with pytest.raises(GeometryError, match="more answers than vectors, there are 4 and 4"):
        independent_components(x[:4], 2)
    with pytest.raises(GeometryError, match="vary in 4 dimensions: they hold no 5 components"):
        independent_components(x, 5)
    with pytest.raises(ValueError, match="n_runs >= 5"):
        independent_components(x, 2, n_runs=4)
    with pytest.raises(GeometryError, match="not finite"):
        independent_components(x * np.inf, 2)

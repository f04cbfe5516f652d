"""The Mantel test: exact against brute force, nominal where nothing is shared, and right about what covariates explain."""

import itertools
import math

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from scipy.stats import binomtest, pearsonr, spearmanr

from persona_lens.errors import GeometryError
from persona_lens.geometry.permutation import (
    Mantel,
    benjamini_hochberg,
    label_permutations,
    mantel,
    permutation_p_value,
)


def assert_nominal(p_values: list[float], level: float = 0.05) -> None:
    rejected = int(np.sum(np.array(p_values) <= level + 1e-12))
    interval = binomtest(rejected, len(p_values)).proportion_ci(0.999)
    assert interval.low <= level <= interval.high, f"{rejected} of {len(p_values)} at {level}"


def share_below(p_values: list[float], level: float = 0.05) -> float:
    return float(np.mean(np.array(p_values) <= level))


def symmetric(rng: np.random.Generator, n: int) -> np.ndarray:
    m = rng.normal(size=(n, n))
    return m + m.T


def distances(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distances of points in a plane: cells that share a point go together."""
    return squareform(pdist(rng.standard_t(3, size=(n, 2))))


def off_diagonal(m: np.ndarray) -> np.ndarray:
    return m[~np.eye(len(m), dtype=bool)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [symmetric, lambda rng, n: rng.normal(size=(n, n))], ids=["symmetric", "asymmetric"])
def test_r_and_p_are_those_of_a_loop_over_all_orders(make: object, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = make(rng, 5), make(rng, 5)  # pyright: ignore
    b += 0.5 * a
    observed = pearsonr(off_diagonal(a), off_diagonal(b)).statistic
    orders = [list(o) for o in itertools.permutations(range(5))]
    null = [abs(pearsonr(off_diagonal(a[np.ix_(o, o)]), off_diagonal(b)).statistic) for o in orders]
    found = mantel(a, b)
    assert found.r == pytest.approx(observed, rel=1e-10)
    assert found.p_value == pytest.approx(np.mean(np.array(null) >= abs(observed) - 1e-9))
    assert (found.exact, found.n_permutations, found.n_vectors) == (True, 120, 5)


def test_identical_matrices_agree_fully_and_their_negatives_do_too() -> None:
    m = symmetric(np.random.default_rng(0), 6)
    found = mantel(m, m)
    assert found.r == pytest.approx(1)
    assert found == Mantel(r=found.r, p_value=1 / 720, n_vectors=6, n_permutations=720, exact=True)
    opposite = mantel(m, -3 * m + 2)
    assert opposite.r == pytest.approx(-1)
    assert opposite.p_value == 1 / 720, "the test is two-sided"


def test_random_permutations_count_the_observed_order_and_come_close_to_the_exact_p() -> None:
    rng = np.random.default_rng(3)
    a = symmetric(rng, 7)
    b = a + 3 * symmetric(rng, 7)
    exact, sampled = mantel(a, b, n_permutations=5039), mantel(a, b, n_permutations=5038)
    assert (exact.exact, exact.n_permutations) == (True, 5040)
    assert (sampled.exact, sampled.n_permutations) == (False, 5038)
    assert 0.01 < exact.p_value < 0.5
    assert sampled.p_value == pytest.approx(exact.p_value, abs=0.02)
    strong = symmetric(rng, 12)
    assert mantel(strong, strong, n_permutations=99).p_value == 1 / 100


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_false_positives_are_nominal_where_cells_are_dependent_and_a_plain_correlation_test_is_not(method: str) -> None:
    rng = np.random.default_rng(1)
    found, plain = [], []
    for seed in range(1000):
        a, b = distances(rng, 12), distances(rng, 12)
        found.append(mantel(a, b, n_permutations=199, seed=seed, method=method).p_value)  # pyright: ignore
        plain.append(pearsonr(squareform(a), squareform(b)).pvalue)
    assert_nominal(found)
    assert_nominal(found, 0.5)
    assert share_below(plain) > 0.10, "the control: cells taken as independent"


@pytest.mark.parametrize("n_vectors", [4, 5])
def test_false_positives_of_the_exact_test_are_nominal_with_few_asymmetric_vectors(n_vectors: int) -> None:
    rng = np.random.default_rng(2)
    pairs = [
        (rng.normal(size=(n_vectors, n_vectors)) + 2 * rng.normal(size=n_vectors), rng.normal(size=(n_vectors, n_vectors)))
        for _ in range(1000)
    ]
    found = [mantel(a, b).p_value for a, b in pairs]
    level = math.floor(0.05 * math.factorial(n_vectors)) / math.factorial(n_vectors)
    assert_nominal(found, level)
    assert min(found) >= 1 / math.factorial(n_vectors) - 1e-12


def test_a_shared_cause_is_found_without_and_not_with_the_covariate() -> None:
    rng = np.random.default_rng(4)
    with_covariate, without = [], []
    for seed in range(500):
        cause = distances(rng, 10)
        a, b = cause + 0.5 * distances(rng, 10), cause + 0.5 * distances(rng, 10)
        with_covariate.append(mantel(a, b, covariates=[cause], n_permutations=199, seed=seed).p_value)
        without.append(mantel(a, b, n_permutations=199, seed=seed).p_value)
    assert_nominal(with_covariate)
    assert share_below(without) > 0.9, "the control: the cause left out"


def test_a_partial_effect_is_found_and_its_size_is_the_partial_correlation() -> None:
    rng = np.random.default_rng(5)
    causes = [distances(rng, 14), symmetric(rng, 14)]
    shared = symmetric(rng, 14)
    a, b = causes[0] + shared + causes[1], -shared + 2 * causes[0] + 0.5 * symmetric(rng, 14)
    found = mantel(a, b, covariates=causes, n_permutations=999)
    cells = np.triu_indices(14, 1)
    design = np.column_stack([np.ones(len(cells[0])), *(c[cells] for c in causes)])
    left = [m[cells] - design @ np.linalg.lstsq(design, m[cells], rcond=None)[0] for m in (a, b)]
    assert found.r == pytest.approx(pearsonr(*left).statistic, rel=1e-9)
    assert found.r < -0.5
    assert found.p_value == 1 / 1000


@pytest.mark.parametrize("seed", range(6))
def test_the_partial_test_permutes_residuals_and_refits_the_covariate_each_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cause = distances(rng, 5)
    a, b = cause + symmetric(rng, 5), cause + symmetric(rng, 5)
    cells = np.triu_indices(5, 1)
    design = np.column_stack([np.ones(10), cause[cells]])

    def left(values: np.ndarray) -> np.ndarray:
        return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]

    residual = squareform(left(a[cells]), checks=False)
    null = [
        abs(pearsonr(left(residual[np.ix_(o, o)][cells]), left(b[cells])).statistic)
        for o in map(list, itertools.permutations(range(5)))
    ]
    assert mantel(a, b, covariates=[cause]).p_value == pytest.approx(np.mean(np.array(null) >= null[0] - 1e-9))


def test_spearman_is_blind_to_a_monotone_change_and_pearson_is_not() -> None:
    rng = np.random.default_rng(7)
    a = symmetric(rng, 9)
    b = a + symmetric(rng, 9)
    cells = np.triu_indices(9, 1)
    found = mantel(a, b, method="spearman", n_permutations=99)
    assert found.r == pytest.approx(spearmanr(a[cells], b[cells]).statistic)
    assert mantel(np.exp(3 * a), b, method="spearman", n_permutations=99) == found
    assert mantel(np.exp(3 * a), b, n_permutations=99).r < found.r - 0.1


def test_one_asymmetric_matrix_makes_every_cell_count() -> None:
    rng = np.random.default_rng(8)
    a, b = symmetric(rng, 8), rng.normal(size=(8, 8))
    assert mantel(a, b, n_permutations=99).r == pytest.approx(pearsonr(off_diagonal(a), off_diagonal(b)).statistic)
    c = symmetric(rng, 8)
    whole = mantel(a, c + 1e-6 * np.triu(np.ones((8, 8))), n_permutations=99)
    assert whole.r == pytest.approx(mantel(a, c, n_permutations=99).r, abs=1e-4)


def test_the_diagonal_is_never_read() -> None:
    rng = np.random.default_rng(9)
    a, b = symmetric(rng, 8), symmetric(rng, 8)
    found = mantel(a, b, n_permutations=99)
    np.fill_diagonal(a, np.nan)
    np.fill_diagonal(b, 1e6)
    assert mantel(a, b, n_permutations=99) == found


def test_relabelling_both_matrices_alike_changes_nothing_and_one_alone_does() -> None:
    rng = np.random.default_rng(10)
    a = symmetric(rng, 6)
    b = a + symmetric(rng, 6)
    order = rng.permutation(6)
    both = mantel(a[np.ix_(order, order)], b[np.ix_(order, order)])
    assert both.r == pytest.approx(mantel(a, b).r)
    assert both.p_value == pytest.approx(mantel(a, b).p_value)
    assert abs(mantel(a[np.ix_(order, order)], b).r - both.r) > 0.05


def test_the_seed_decides_random_permutations_only() -> None:
    rng = np.random.default_rng(11)
    a, b = symmetric(rng, 10), symmetric(rng, 10)
    assert mantel(a, b, n_permutations=99, seed=1) == mantel(a, b, n_permutations=99, seed=1)
    assert len({mantel(a, b, n_permutations=99, seed=s).p_value for s in range(5)}) > 1
    assert mantel(a[:6, :6], b[:6, :6], seed=1) == mantel(a[:6, :6], b[:6, :6], seed=2)


def test_all_orders_are_listed_once_with_the_given_one_first() -> None:
    orders, exact = label_permutations(4, 100, 0)
    assert exact
    assert len({tuple(o) for o in orders.tolist()}) == len(orders) == 24
    assert orders[0].tolist() == [0, 1, 2, 3]
    orders, exact = label_permutations(30, 50, 0)
    assert not exact
    assert orders.shape == (50, 30)
    assert (np.sort(orders, axis=1) == np.arange(30)).all()
    assert len({tuple(o) for o in orders.tolist()}) == 50


def test_p_counts_ties_and_the_observed_order() -> None:
    null = np.array([0.1, 0.5, 0.5, 0.9])
    assert permutation_p_value(null, 0.5, exact=True) == 3 / 4
    assert permutation_p_value(null, 0.5, exact=False) == 4 / 5
    assert permutation_p_value(null, 2.0, exact=False) == 1 / 5


def test_benjamini_hochberg_is_the_textbook_and_passes_nan_through() -> None:
    p = np.array([[0.01, np.nan, 0.04], [0.03, 0.5, np.nan]])
    ranked = np.array([0.01, 0.03, 0.04, 0.5]) * 4 / np.arange(1, 5)
    expected = np.minimum.accumulate(ranked[::-1])[::-1]
    adjusted = benjamini_hochberg(p)
    np.testing.assert_allclose(adjusted, [[expected[0], np.nan, expected[2]], [expected[1], expected[3], np.nan]])
    assert np.isnan(benjamini_hochberg(np.array([np.nan]))).all()
    assert benjamini_hochberg(np.array([])).shape == (0,)


def test_benjamini_hochberg_keeps_the_false_discovery_rate_and_raw_p_values_do_not() -> None:
    rng = np.random.default_rng(12)
    p = rng.random((2000, 20))
    p[:, :4] = rng.beta(0.05, 20, size=(2000, 4))
    any_false = {"raw": p <= 0.05, "adjusted": np.array([benjamini_hochberg(row) for row in p]) <= 0.05}
    rate = {k: float((v[:, 4:].sum(1) / np.maximum(v.sum(1), 1)).mean()) for k, v in any_false.items()}
    assert rate["adjusted"] == pytest.approx(0.05 * 16 / 20, abs=0.01)
    assert rate["raw"] > 0.1


@pytest.mark.parametrize(
    ("a", "b", "covariates", "message"),
    [
        (np.eye(3), np.eye(3), [], "at least 4 vectors, there are 3: their 6 orders"),
        (np.ones((5, 5)), np.zeros((5, 5)), [], "a is constant off the diagonal (1)"),
        (np.arange(25.0).reshape(5, 5), np.arange(25.0).reshape(5, 5), [np.ones((5, 5))], "covariate 0 is constant"),
        (np.arange(25.0).reshape(5, 5), np.where(np.tri(5) > 0, np.nan, 1.0), [], "b contains cells"),
        (np.arange(25.0).reshape(5, 5) ** 2, np.tri(5), [2 * np.arange(25.0).reshape(5, 5) ** 2 + 1], "a is a linear function"),
        (np.arange(16.0).reshape(4, 4), np.tri(4), [np.random.default_rng(i).random((4, 4)) for i in range(10)], "12 cells"),
    ],
)
def test_matrices_that_carry_no_test_are_refused(a: np.ndarray, b: np.ndarray, covariates: list[np.ndarray], message: str) -> None:
    with pytest.raises(GeometryError) as caught:
        mantel(a, b, covariates=covariates)
    assert message in str(caught.value)


def test_shapes_that_differ_and_too_few_permutations_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(GeometryError, match=r"covariate 0 must be \[5, 5\] like the rows of a, not \[6, 6\]"):
        mantel.__wrapped__(symmetric(rng, 5), symmetric(rng, 5), covariates=[symmetric(rng, 6)])
    with pytest.raises(ValueError, match="at least 19"):
        mantel(symmetric(rng, 9), symmetric(rng, 9), n_permutations=18)
    with pytest.raises(ValueError, match="pearson or spearman, not 'kendall'"):
        mantel.__wrapped__(symmetric(rng, 5), symmetric(rng, 5), method="kendall")

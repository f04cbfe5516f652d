"""Two sets of vectors for the same traits: the same geometry is found in any basis, and none where the sets are independent."""

import itertools

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import binomtest, pearsonr

from persona_lens.errors import GeometryError
from persona_lens.geometry.comparison import linear_cka, procrustes, representational_similarity

TRAITS = ["calm", "curious", "evil", "formal", "funny", "humble", "kind"]


def assert_nominal(p_values: list[float], level: float = 0.05) -> None:
    rejected = int(np.sum(np.array(p_values) <= level + 1e-12))
    interval = binomtest(rejected, len(p_values)).proportion_ci(0.999)
    assert interval.low <= level <= interval.high, f"{rejected} of {len(p_values)} at {level}"


def rotation(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def related(rng: np.random.Generator, n: int, width: int, rank: int = 3) -> np.ndarray:
    """Vectors that lie near a few dimensions, as traits do."""
    return 3 * rng.normal(size=(n, rank)) @ rotation(rng, width)[:rank] + 0.1 * rng.normal(size=(n, width))


def whole_map_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines after an orthogonal map that was fitted on the very vectors it is scored on."""
    a, b = a - a.mean(0), b - b.mean(0)
    image = a @ orthogonal_procrustes(a, b)[0]
    return (image * b).sum(1) / np.linalg.norm(image, axis=1) / np.linalg.norm(b, axis=1)


def similarity(a: np.ndarray, b: np.ndarray, **options: object) -> object:
    names = [f"t{i}" for i in range(len(a))]
    return representational_similarity(a, b, names, names, **options)  # pyright: ignore


def test_all_three_find_a_rotated_and_scaled_copy_in_a_wider_space() -> None:
    rng = np.random.default_rng(0)
    a = related(rng, 7, 40)
    b = 5 * np.pad(a, ((0, 0), (0, 24))) @ rotation(rng, 64)
    found = representational_similarity(a, b, TRAITS, TRAITS)
    assert (found.r, found.p_value, found.exact) == (pytest.approx(1), 1 / 5040, True)
    cka = linear_cka(a, b)
    assert (cka.value, cka.plain, cka.p_value, cka.exact) == (pytest.approx(1), pytest.approx(1), 1 / 5040, True)
    carried = procrustes(a, b, n_permutations=5039)
    np.testing.assert_allclose(carried.score, 1)
    assert (carried.p_value, carried.n_permutations) == (1 / 5040, 5040)
    assert carried.share.min() > 0.8


def test_none_finds_a_copy_whose_labels_were_exchanged() -> None:
    rng = np.random.default_rng(1)
    a = related(rng, 7, 40)
    b = np.roll(a, 3, axis=0)
    assert similarity(a, b).p_value > 0.05  # pyright: ignore
    assert linear_cka(a, b).p_value > 0.05
    assert procrustes(a, b, n_permutations=199).p_value > 0.05


def test_similarity_correlates_the_cosines_and_centring_takes_out_what_all_traits_share() -> None:
    rng = np.random.default_rng(2)
    a, b = related(rng, 9, 30), related(rng, 9, 50)
    cells = np.triu_indices(9, 1)

    def expected(*sets: np.ndarray) -> float:
        return pearsonr(*(np.corrcoef(np.hstack([s, -s]))[cells] for s in sets)).statistic

    assert similarity(a, b, centred=False, n_permutations=99).r == pytest.approx(expected(a, b))  # pyright: ignore
    centred = similarity(a, b, n_permutations=99)
    assert centred.r == pytest.approx(expected(a - a.mean(0), b - b.mean(0)))  # pyright: ignore
    moved = similarity(a + rng.normal(size=30) * 4, b, n_permutations=99)
    assert moved.r == pytest.approx(centred.r)  # pyright: ignore
    assert moved.p_value == centred.p_value  # pyright: ignore


def test_similarity_passes_its_options_on() -> None:
    rng = np.random.default_rng(3)
    a = related(rng, 8, 30)
    b = a + 2 * rng.normal(size=a.shape)
    covariate = rng.normal(size=(8, 8))
    plain = similarity(a, b, n_permutations=99)
    assert similarity(a, b, n_permutations=99, covariates=[covariate]) != plain
    assert similarity(a, b, n_permutations=99, method="spearman").r != plain.r  # pyright: ignore
    assert len({similarity(a, rng.normal(size=a.shape), n_permutations=99, seed=s).p_value for s in range(4)}) > 1  # pyright: ignore


def test_false_positives_of_similarity_are_nominal() -> None:
    rng = np.random.default_rng(4)
    p = [similarity(related(rng, 8, 16), related(rng, 8, 24), n_permutations=99, seed=s).p_value for s in range(600)]  # pyright: ignore
    assert_nominal(p)
    assert_nominal(p, 0.5)


def unbiased_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. 2012, equation 5, word for word."""
    n = len(k)
    k, l = k * (1 - np.eye(n)), l * (1 - np.eye(n))  # noqa: E741
    one = np.ones(n)
    cross = one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return float((np.trace(k @ l) + cross) / (n * (n - 3)))


@pytest.mark.parametrize("n", [5, 7, 20])
def test_debiased_cka_is_the_ratio_of_the_published_estimates(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(n, 6)) + 2, rng.normal(size=(n, 9)) * rng.random(9)
    b[:, :4] += a[:, :4]
    k, l = a @ a.T, b @ b.T  # noqa: E741
    found = linear_cka(a, b, n_permutations=19)
    assert found.value == pytest.approx(unbiased_hsic(k, l) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(l, l)))
    x, y = a - a.mean(0), b - b.mean(0)
    kornblith = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert found.plain == pytest.approx(kornblith)


def test_p_of_cka_is_that_of_a_loop_over_all_orders() -> None:
    rng = np.random.default_rng(5)
    a = rng.normal(size=(5, 8))
    b = a + 2 * rng.normal(size=(5, 8))
    values = [linear_cka(a[list(order)], b, n_permutations=119).value for order in itertools.permutations(range(5))]
    assert linear_cka(a, b).p_value == pytest.approx(np.mean(np.array(values) >= values[0] - 1e-9))
    assert min(values) < 0


def test_plain_cka_is_inflated_for_independent_sets_and_the_debiased_one_is_centred_on_zero_with_nominal_p() -> None:
    rng = np.random.default_rng(6)
    found = [linear_cka(rng.normal(size=(7, 256)), rng.normal(size=(7, 256)), n_permutations=99, seed=s) for s in range(1000)]
    values = np.array([f.value for f in found])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert min(f.plain for f in found) > 0.9, "the control: the plain estimate is high whatever the sets are"
    assert_nominal([f.p_value for f in found])
    assert_nominal([f.p_value for f in found], 0.5)


def test_false_positives_of_cka_are_nominal_for_sets_of_few_dimensions_and_unequal_lengths() -> None:
    rng = np.random.default_rng(7)
    p = []
    for seed in range(600):
        lengths = rng.lognormal(0, 1, size=(2, 9, 1))
        p.append(
            linear_cka(related(rng, 9, 12) * lengths[0], related(rng, 9, 12) * lengths[1], n_permutations=99, seed=seed).p_value
        )
    assert_nominal(p)


def test_cka_is_free_of_origin_rotation_and_scale_and_not_of_single_lengths() -> None:
    rng = np.random.default_rng(8)
    a, b = related(rng, 7, 20), related(rng, 7, 20)
    one = linear_cka(a, b, n_permutations=19)
    other = linear_cka(100 * a @ rotation(rng, 20) + rng.normal(size=20), b, n_permutations=19)
    assert (other.value, other.plain) == (pytest.approx(one.value), pytest.approx(one.plain))
    a[0] *= 5
    assert abs(linear_cka(a, b, n_permutations=19).value - one.value) > 0.05


def held_out_by_hand(a: np.ndarray, b: np.ndarray, centred: bool) -> tuple[list[float], list[float]]:
    """Fit on the others with the whole cross-covariance, project on the fitted spans, map, compare: no coordinates, no tricks."""
    width = max(a.shape[1], b.shape[1])
    a, b = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (a, b))
    scores, shares = [], []
    for i in range(len(a)):
        fit_a, fit_b = np.delete(a, i, 0), np.delete(b, i, 0)
        origin_a, origin_b = (fit_a.mean(0), fit_b.mean(0)) if centred else (0, 0)
        u, s, vt = np.linalg.svd((fit_a - origin_a).T @ (fit_b - origin_b))
        rank = int((s > 1e-9 * s[0]).sum())
        h, target = a[i] - origin_a, b[i] - origin_b
        inside, counterpart = h @ u[:, :rank] @ u[:, :rank].T, target @ vt[:rank].T @ vt[:rank]
        image = inside @ u[:, :rank] @ vt[:rank]
        scores.append(float(image @ counterpart / np.linalg.norm(image) / np.linalg.norm(counterpart)))
        shares.append(float(np.linalg.norm(inside) * np.linalg.norm(counterpart) / np.linalg.norm(h) / np.linalg.norm(target)))
    return scores, shares


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("widths", [(12, 12), (12, 20), (3, 20), (4, 3)])
def test_held_out_scores_are_those_of_a_plain_rewrite_in_the_whole_space(widths: tuple[int, int], centred: bool) -> None:
    rng = np.random.default_rng(sum(widths))
    a, b = rng.normal(size=(6, widths[0])) + 0.5, rng.normal(size=(6, widths[1]))
    b[:, :3] += 3 * a[:, :3]
    found = procrustes(a, b, centred=centred, n_permutations=19)
    scores, shares = held_out_by_hand(a, b, centred)
    np.testing.assert_allclose(found.score, scores, rtol=1e-7)
    np.testing.assert_allclose(found.share, shares, rtol=1e-7)
    assert found.mean == pytest.approx(np.mean(scores))


def test_p_of_procrustes_refits_under_every_order() -> None:
    rng = np.random.default_rng(9)
    a = related(rng, 5, 9, rank=2)
    b = a @ rotation(rng, 9) + 1.5 * rng.normal(size=(5, 9))
    means = [procrustes(a, b[list(order)], n_permutations=19).mean for order in itertools.permutations(range(5))]
    found = procrustes(a, b, n_permutations=119)
    assert found.exact
    assert found.p_value == pytest.approx(np.mean(np.array(means) >= means[0] - 1e-9))


def test_independent_sets_score_zero_on_held_out_traits_and_one_on_fitted_ones() -> None:
    rng = np.random.default_rng(10)
    pairs = [(rng.normal(size=(7, 256)), rng.normal(size=(7, 256))) for _ in range(400)]
    found = [procrustes(a, b, n_permutations=99, seed=s) for s, (a, b) in enumerate(pairs)]
    means = np.array([f.mean for f in found])
    assert abs(means.mean()) < 3 * means.std() / np.sqrt(len(means))
    assert_nominal([f.p_value for f in found])
    assert max(f.share.mean() for f in found) < 0.1, "the fitted traits say next to nothing about a held-out one"
    assert min(whole_map_cosines(a, b).mean() for a, b in pairs) > 0.95, "the control: scored on the traits it was fitted on"


def test_a_shared_direction_scores_high_without_centring_and_p_stays_nominal() -> None:
    rng = np.random.default_rng(11)
    plain, centred = [], []
    for seed in range(300):
        a, b = (rng.normal(size=(6, 20)) + 3 * rng.normal(size=20) for _ in range(2))
        plain.append(procrustes(a, b, centred=False, n_permutations=99, seed=seed))
        centred.append(procrustes(a, b, n_permutations=19, seed=seed).mean)
    assert np.mean([p.mean for p in plain]) > 0.5
    assert abs(np.mean(centred)) < 0.1
    assert_nominal([p.p_value for p in plain])


def test_procrustes_finds_the_same_traits_behind_noise_and_the_share_tells_how_much_was_tested() -> None:
    rng = np.random.default_rng(12)
    a = related(rng, 8, 64)
    b = np.pad(a + 0.2 * rng.normal(size=a.shape), ((0, 0), (0, 36))) @ rotation(rng, 100)
    found = procrustes(a, b, n_permutations=199)
    assert found.mean > 0.8
    assert found.p_value == 1 / 200
    apart = np.array([*a[:7], np.zeros(64)])
    apart[7] = np.linalg.svd(a[:7])[2][-1] * 9
    alone = procrustes(apart, apart, n_permutations=19, centred=False)
    assert alone.share[7] == pytest.approx(0, abs=1e-6)
    assert alone.score[7] == 0, "nothing about it is determined"
    np.testing.assert_allclose(alone.score[:7], 1)


def test_procrustes_is_free_of_rotation_origin_and_scale() -> None:
    rng = np.random.default_rng(13)
    a, b = related(rng, 6, 20), related(rng, 6, 30)
    one = procrustes(a, b, n_permutations=19)
    other = procrustes(7 * a @ rotation(rng, 20) + 1, b @ rotation(rng, 30) - 3, n_permutations=19)
    np.testing.assert_allclose(other.score, one.score, rtol=1e-6)
    np.testing.assert_allclose(other.share, one.share, rtol=1e-6)


@pytest.mark.parametrize("compare", [linear_cka, procrustes])
def test_the_seed_decides_random_permutations_only(compare: object) -> None:
    rng = np.random.default_rng(14)
    a, b = rng.normal(size=(9, 20)), rng.normal(size=(9, 20))
    found = [compare(a, b, n_permutations=49, seed=s).p_value for s in (1, 1, 2, 3, 4)]  # pyright: ignore
    assert found[0] == found[1]
    assert len(set(found)) > 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["calm", "curious", "evil", "formal", "funny", "humble", "rude"], "only in a: kind; only in b: rude"),
        (["calm", "evil", "curious", "formal", "funny", "humble", "kind"], "at index 1 stand curious in a and evil in b"),
        (["calm", "calm", "evil", "formal", "funny", "humble", "kind"], "b has twice: calm"),
        ([*TRAITS, "extra"], "only in b: extra"),
    ],
)
def test_names_that_do_not_match_are_named(names: list[str], message: str) -> None:
    x = related(np.random.default_rng(0), 7, 10)
    with pytest.raises(GeometryError) as caught:
        representational_similarity(x, x, TRAITS, names)
    assert message in str(caught.value)


def test_sets_that_carry_no_comparison_are_refused() -> None:
    rng = np.random.default_rng(15)
    x = related(rng, 7, 10)
    hole = x.copy()
    hole[2, 3] = np.nan
    with pytest.raises(GeometryError, match="a has 7 vectors and 6 names"):
        representational_similarity(x, x, TRAITS[:6], TRAITS[:6])
    with pytest.raises(GeometryError, match="the vector evil of b is zero"):
        representational_similarity(x, x * np.array([1, 1, 0, 1, 1, 1, 1])[:, None], TRAITS, TRAITS, centred=False)
    with pytest.raises(GeometryError, match="b contains values that are not finite"):
        representational_similarity(x, hole, TRAITS, TRAITS)
    for compare, name in ((linear_cka, "CKA"), (procrustes, "Procrustes")):
        with pytest.raises(GeometryError, match=f"{name} needs at least 5 vectors for a p of .05, there are 4"):
            compare(x[:4], x[:4])
        with pytest.raises(GeometryError, match=f"{name} compares vectors of the same traits, a has 7 and b has 6"):
            compare.__wrapped__(x, x[:6])
        with pytest.raises(GeometryError, match="a contains values that are not finite"):
            compare(hole, x)
    with pytest.raises(GeometryError, match="the vectors of b have no geometry"):
        linear_cka(x, np.eye(7))
    with pytest.raises(GeometryError, match="the vectors of a do not vary"):
        procrustes(np.ones((7, 3)), x)


def test_single_precision_input_is_measured_in_double() -> None:
    rng = np.random.default_rng(16)
    x, y = (related(rng, 6, 10).astype(np.float32) for _ in range(2))
    assert linear_cka(x, y) == linear_cka(x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_array_equal(procrustes(x, y).score, procrustes(x.astype(np.float64), y.astype(np.float64)).score)

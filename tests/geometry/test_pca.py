"""Principal components: a planted rank is found, chance components are not, and the spectrum is freed of noise."""

import numpy as np
import pytest
from scipy.stats import binomtest
from simulate import WIDTH, World, anisotropic, vectors_of, world

from persona_lens.errors import GeometryError, UnknownNameError
from persona_lens.geometry import pca, persona_space


def chance_world(vectors: int, rng: np.random.Generator, rank: int = 0, strength: float = 4.0) -> tuple[World, np.ndarray]:
    """Random directions with the covariance of the neutral residuals, and as many planted dimensions as wanted."""
    spread = anisotropic(rng, 0.5)
    means = rng.normal(size=(vectors, WIDTH)) @ spread
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    axes = np.linalg.qr(rng.normal(size=(WIDTH, max(rank, 1))))[0].T[:rank]
    means = means + strength * rng.normal(size=(vectors, rank)) @ axes
    return World(means, spread, 20, 0.92, shared=0.3), rng.normal(size=(400, WIDTH)) @ spread


def significant(vectors: int, rank: int, draws: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found: list[int] = []
    for draw in range(draws):
        w, neutral = chance_world(vectors, rng, rank)
        chance = pca(w.space(rng, neutral), 0, seed=draw).chance
        assert chance is not None
        found.append(chance.significant)
    return np.array(found)


def test_chance_components_are_not_significant() -> None:
    found = significant(12, 0, 150)
    assert binomtest(int((found > 0).sum()), len(found)).proportion_ci(0.99).low <= 0.05


@pytest.mark.parametrize(("vectors", "rank"), [(12, 1), (12, 3), pytest.param(32, 4, marks=pytest.mark.slow)])
def test_the_planted_rank_is_found(vectors: int, rank: int) -> None:
    found = significant(vectors, rank, 25)
    assert (found == rank).mean() >= 0.7, "three equal dimensions of twelve vectors are missed in a quarter of the draws"
    assert (found > rank).mean() <= 0.16


def test_the_component_after_a_planted_one_is_tested_at_the_nominal_rate() -> None:
    """Seven vectors: what one component leaves has a dimension less, in the null too."""
    found = significant(7, 1, 120)
    assert (found >= 1).mean() > 0.9
    assert binomtest(int((found > 1).sum()), len(found)).proportion_ci(0.99).low <= 0.05


def test_noise_of_another_shape_makes_no_component() -> None:
    """Noise in few dimensions, shared by all vectors: without it in the null, it would look like structure."""
    rng, hits = np.random.default_rng(3), 0
    spread, steep = anisotropic(rng, 0.3), anisotropic(rng, 2.0)
    for draw in range(60):
        means = rng.normal(size=(7, WIDTH)) @ spread
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        space = World(means, steep, 20, 0.85).space(rng, rng.normal(size=(400, WIDTH)) @ spread)
        chance = pca(space, 0, seed=draw).chance
        hits += chance is not None and chance.significant > 0
    assert pca(World(means, steep, 20, 0.5).space(rng, rng.normal(size=(400, WIDTH))), 0).chance is None
    assert binomtest(hits, 60).proportion_ci(0.99).low <= 0.05


def test_an_earlier_component_is_taken_out_of_the_neutral_residuals_too() -> None:
    """One dimension dominates vectors and neutral residuals, a second is large in the vectors only."""
    rng = np.random.default_rng(6)
    size = np.ones(WIDTH)
    size[0] = 30.0
    neutral = rng.normal(size=(600, WIDTH)) * size
    means = rng.normal(size=(12, WIDTH)) * 0.3
    means[:, 0] += 20 * np.tile([1.0, -1.0], 6)
    means[:, 1] += 4 * np.repeat([1.0, -1.0], 6)
    space = World(means, np.eye(WIDTH) / np.sqrt(WIDTH), 20, 0.999).space(rng, neutral)
    chance = pca(space, 0).chance
    assert chance is not None
    assert np.isnan(chance.p_value[1:]).all() or chance.p_value[1] < 0.05
    alone = World(means - means[:, :1] * np.eye(WIDTH)[:1], np.eye(WIDTH) / np.sqrt(WIDTH), 20, 0.999).space(rng, neutral)
    assert pca(alone, 0).chance.p_value[0] > 0.05, "the control: with that dimension left in the null, the second is nothing"  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(("vectors", "lengths"), [(7, 0.0), (7, 0.6), (12, 0.0)])
def test_what_all_vectors_share_makes_no_component(vectors: int, lengths: float) -> None:
    """A large common part (roles minus one default) is centred away; the null must not count its length."""
    rng = np.random.default_rng(4)
    spread, hits, narrow = anisotropic(rng, 0.5), 0, 0
    for draw in range(60):
        means = rng.normal(size=(vectors, WIDTH)) @ spread
        means *= np.exp(lengths * rng.normal(size=(vectors, 1))) / np.linalg.norm(means, axis=1, keepdims=True)
        common = rng.normal(size=(1, WIDTH)) @ spread
        w = World(means + 3 * common / np.linalg.norm(common), spread, 20, 0.995)
        chance = pca(w.space(rng, rng.normal(size=(400, WIDTH)) @ spread), 0, seed=draw).chance
        assert chance is not None
        hits += chance.significant > 0
        narrow += chance.p_participation < 0.05
    for count in (hits, narrow):
        assert binomtest(count, 60).proportion_ci(0.99).low <= 0.05


def test_an_isotropic_null_would_be_far_too_lax() -> None:
    """The control: the first component of 12 chance directions, against directions of a round residual stream."""
    rng = np.random.default_rng(0)
    hits = 0
    for draw in range(20):
        w, neutral = chance_world(12, rng)
        hits += pca(w.space(rng, rng.normal(size=neutral.shape)), 0, seed=draw).chance.significant > 0  # pyright: ignore[reportOptionalMemberAccess]
    assert hits > 15


def test_chance_of_twelve_vectors_is_about_what_it_is_known_to_be() -> None:
    rng = np.random.default_rng(1)
    w, neutral = chance_world(12, rng)
    found = pca(w.space(rng, neutral), 0)
    assert found.chance is not None
    assert found.chance.observed[0] > found.share[0] * 0.6
    assert 0.12 < found.chance.share[0, 0] < 0.35
    assert found.chance.share[0, 1] > found.chance.share[0, 0]


def test_the_spectrum_is_freed_of_noise() -> None:
    w = world(7, 20, 0.7, seed=2)
    right = np.linalg.eigvalsh((w.means - w.means.mean(0)) @ (w.means - w.means.mean(0)).T)[::-1]
    rng = np.random.default_rng(0)
    spaces = [w.space(rng) for _ in range(100)]
    total = np.mean([pca(s, 0).variance.sum() for s in spaces])
    plain = np.mean([((s.at(0) - s.at(0).mean(0)) ** 2).sum() for s in spaces])
    assert total == pytest.approx(right.sum(), rel=0.08)
    assert plain > 1.3 * right.sum(), "the control: plain variance holds the noise"


def test_components_reproduce_the_vectors() -> None:
    w = world(6, 20, 0.9999, rank=3, seed=2)
    space = w.space(np.random.default_rng(0))
    found = pca(space, 0)
    centred = space.at(0) - space.at(0).mean(0)
    np.testing.assert_allclose(found.scores[:, :3] @ found.directions[:3], centred, atol=0.15)
    np.testing.assert_allclose(np.linalg.norm(found.directions, axis=1), 1.0)
    np.testing.assert_allclose(found.loadings, found.scores / np.linalg.norm(centred, axis=1)[:, None], atol=0.02)
    assert found.share.sum() == pytest.approx(1.0, abs=0.01)
    assert found.participation == pytest.approx(found.variance.sum() ** 2 / (found.variance**2).sum(), rel=0.01)


def test_signs_follow_the_anchor() -> None:
    space = world(6, 20, 0.95, seed=2).space(np.random.default_rng(0))
    assert (pca(space, 0, anchor="v3").scores[3] >= 0).all()
    largest = pca(space, 0).scores
    assert (largest[np.abs(largest).argmax(0), np.arange(largest.shape[1])] > 0).all()
    with pytest.raises(UnknownNameError, match="unknown anchor 'v9'"):
        pca(space, 0, anchor="v9")


def test_mixed_components_have_no_intervals() -> None:
    """Two dimensions of the same variance: which of them comes first is noise."""
    rng = np.random.default_rng(0)
    angles = np.arange(8) * 2 * np.pi / 8
    circle = np.zeros((8, WIDTH))
    circle[:, 0], circle[:, 1] = np.cos(angles), np.sin(angles)
    found = pca(World(circle, anisotropic(rng), 20, 0.95).space(rng), 0)
    assert not found.separate[0]
    assert np.isnan(found.loadings_low[:, 0]).all()
    circle[:, 0] *= 2
    apart = pca(World(circle, anisotropic(rng), 20, 0.95).space(rng), 0)
    assert apart.separate[0]
    assert (apart.loadings_low[:, 0] < apart.loadings_high[:, 0]).all()


def test_vectors_that_do_not_differ_are_refused() -> None:
    rng = np.random.default_rng(0)
    same = np.ones((1, WIDTH)) + 0.01 * rng.normal(size=(20, WIDTH))
    with pytest.raises(GeometryError, match="do not differ beyond noise"):
        pca(persona_space([vectors_of(n, same) for n in "abc"]), 0)
    with pytest.raises(GeometryError, match="PCA needs at least 3 vectors"):
        pca(persona_space([vectors_of(n, same) for n in "ab"]), 0)

"""Cosines: right where directions are planted, refused where they are noise, and what centring and whitening do."""

import numpy as np
import pytest
from simulate import WIDTH, World, anisotropic, vectors_of, world

from persona_lens.errors import GeometryError
from persona_lens.geometry import cosines, layer_cosines, persona_space, plain_cosines

UPPER = np.triu_indices(5, 1)


def planted(reliability: float = 0.95, shared: float = 0.0) -> tuple[World, np.ndarray]:
    w = world(5, 20, reliability, shared=shared, seed=4)
    return w, plain_cosines(w.means)


def test_planted_cosines_are_found_and_raw_ones_are_too_small() -> None:
    w, right = planted(0.8)
    rng = np.random.default_rng(0)
    found = [cosines(w.space(rng), 0) for _ in range(150)]
    value, raw = np.nanmean([c.value for c in found], 0)[UPPER], np.mean([c.raw for c in found], 0)[UPPER]
    np.testing.assert_allclose(value, right[UPPER], atol=0.03)
    np.testing.assert_allclose(raw, 0.8 * right[UPPER], atol=0.03)


def test_shared_noise_inflates_raw_cosines_and_not_the_debiased_ones() -> None:
    orthogonal = World(np.eye(WIDTH)[:4], anisotropic(np.random.default_rng(0)), 20, 0.7, shared=0.9)
    rng, upper = np.random.default_rng(0), np.triu_indices(4, 1)
    found = [cosines(orthogonal.space(rng), 0) for _ in range(150)]
    assert np.mean([c.raw[upper] for c in found]) > 0.2
    assert abs(np.mean([c.debiased[upper] for c in found])) < 0.03
    assert abs(np.nanmean([c.value[upper] for c in found])) < 0.05


def test_unreliable_vectors_have_no_cosine() -> None:
    w, _ = planted()
    drawn = w.draw(np.random.default_rng(0))
    drawn[2] = 30 * np.random.default_rng(1).normal(size=drawn[2].shape)
    found = cosines(persona_space([vectors_of(f"v{i}", d) for i, d in enumerate(drawn)]), 0)
    assert found.reliability[2] < 0.5
    assert np.isnan(found.value[2]).all()
    assert np.isnan(found.low[:, 2]).all()
    assert np.isfinite(found.value[[0, 1, 3, 4]][:, [0, 1, 3, 4]]).all()
    assert np.isfinite(found.p_value[2, [0, 1, 3, 4]]).all(), "the test of a zero inner product needs no norm"


def test_tests_find_related_pairs_and_the_interval_agrees() -> None:
    w, right = planted()
    found = cosines(w.space(np.random.default_rng(0)), 0)
    strong = np.abs(right[UPPER]) > 0.3
    assert strong.sum() >= 3
    assert (found.q_value[UPPER][strong] < 0.05).all()
    assert (found.q_value[UPPER] >= found.p_value[UPPER]).all()
    assert found.p_largest < 0.01
    apart = (found.low * found.high > 0)[UPPER]
    assert (apart == (found.p_value[UPPER] < 0.05)).mean() >= 0.9
    assert np.isnan(np.diag(found.p_value)).all()
    np.testing.assert_allclose(found.p_value, found.p_value.T)


def test_centring_subtracts_the_mean_vector() -> None:
    w, _ = planted(0.999)
    common = World(w.means + 4 * np.ones((1, WIDTH)) / np.sqrt(WIDTH), w.spread, 20, 0.999)
    space = common.space(np.random.default_rng(0))
    assert cosines(space, 0).value[UPPER].min() > 0.8, "what all share dominates"
    expected = plain_cosines(w.means - w.means.mean(0))
    np.testing.assert_allclose(cosines(space, 0, centred=True).value, expected, atol=0.1)
    assert cosines(space, 0, centred=True).kind == "centred"


def test_whitening_undoes_the_shape_of_the_residual_stream() -> None:
    """Directions that are orthogonal in white coordinates, seen through a stretched residual stream."""
    rng = np.random.default_rng(0)
    stretch = np.diag(np.geomspace(10, 0.1, WIDTH)) @ np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    white = np.linalg.qr(rng.normal(size=(WIDTH, 4)))[0].T
    neutral = rng.normal(size=(4000, WIDTH)) @ stretch
    space = World(white @ stretch, stretch / np.linalg.norm(stretch), 20, 0.995).space(rng, neutral)
    upper = np.triu_indices(4, 1)
    assert np.abs(cosines(space, 0).value[upper]).mean() > 0.15
    found = cosines(space, 0, whitened=True)
    assert np.abs(found.value[upper]).max() < 0.2
    assert np.abs(found.value[upper]).mean() < np.abs(cosines(space, 0).value[upper]).mean() / 2
    assert found.kind == "whitened"
    assert (cosines(space, 0).p_chance[upper] > 0.05).mean() > 0.8, "such cosines come by chance there"


@pytest.mark.parametrize(("centred", "reliability"), [(False, 0.98), (True, 0.98), (False, 0.85), (True, 0.85)])
def test_random_directions_are_no_more_alike_than_chance(centred: bool, reliability: float) -> None:
    rng = np.random.default_rng(1)
    spread = anisotropic(rng, 0.7)
    below: list[np.ndarray] = []
    for seed in range(80):
        neutral = rng.normal(size=(400, WIDTH)) @ spread
        space = World(rng.normal(size=(5, WIDTH)) @ spread, spread, 20, reliability).space(rng, neutral)
        p = cosines(space, 0, centred=centred, seed=seed).p_chance[UPPER]
        below.append(p[np.isfinite(p)] < 0.05)
    assert 0.015 <= np.concatenate(below).mean() <= 0.085
    copies = World(np.repeat(rng.normal(size=(1, WIDTH)) @ spread, 5, 0) * [[1], [1], [-1], [1], [2]], spread, 20, 0.98)
    found = cosines(copies.space(rng, neutral), 0)
    assert found.p_chance[UPPER].max() < 0.05
    np.testing.assert_allclose(np.abs(found.value[UPPER]), 1.0, atol=0.1)


def test_noise_that_vectors_share_is_in_the_null_too() -> None:
    rng = np.random.default_rng(1)
    spread, steep = anisotropic(rng, 0.3), anisotropic(rng, 2.0)
    below: list[np.ndarray] = []
    for seed in range(60):
        means = rng.normal(size=(5, WIDTH)) @ spread
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        space = World(means, steep, 20, 0.85, shared=0.9).space(rng, rng.normal(size=(400, WIDTH)) @ spread)
        p = cosines(space, 0, seed=seed).p_chance[UPPER]
        below.append(p[np.isfinite(p)] < 0.05)
    assert np.concatenate(below).mean() <= 0.12
    assert np.isnan(
        cosines(World(means, steep, 20, 0.6).space(rng, np.ones((30, WIDTH)) * rng.normal(size=(30, 1))), 0).p_chance
    ).any()


def test_layers_of_one_vector() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=WIDTH)
    means = np.stack([first, first + 0.1 * rng.normal(size=WIDTH), rng.normal(size=WIDTH)])
    noise = 0.5 * rng.normal(size=(20, 1, WIDTH))  # the same in every layer, as in a residual stream
    space = persona_space([vectors_of("a", means + noise), vectors_of("b", rng.normal(size=(20, 3, WIDTH)))])
    found = layer_cosines(space, "a")
    np.testing.assert_allclose(found, plain_cosines(means), atol=0.03)
    np.testing.assert_allclose(np.diag(found), 1.0)


def test_too_few_vectors_are_refused() -> None:
    rng = np.random.default_rng(0)
    pair = [vectors_of(n, rng.normal(size=(8, 1, 5))) for n in "ab"]
    with pytest.raises(GeometryError, match="a cosine needs at least 2 vectors, these are 1: a"):
        cosines(persona_space(pair[:1]), 0)
    with pytest.raises(GeometryError, match="a centred cosine needs at least 3 vectors, these are 2: a, b"):
        cosines(persona_space(pair), 0, centred=True)
    with pytest.raises(GeometryError, match="no neutral residuals"):
        cosines(persona_space(pair), 0, whitened=True)

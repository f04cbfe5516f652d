"""Clusters: planted groups come back with full support, and chance trees are told what chance gives."""

import numpy as np
import pytest
from simulate import WIDTH, World, anisotropic, vectors_of

from persona_lens.errors import GeometryError
from persona_lens.geometry import cluster, cosines, persona_space


def grouped(reliability: float = 0.9) -> World:
    """Three groups of two, three and one."""
    rng = np.random.default_rng(3)
    centres = np.linalg.qr(rng.normal(size=(WIDTH, 3)))[0].T
    means = centres[[0, 0, 1, 1, 1, 2]] + 0.05 * rng.normal(size=(6, WIDTH))
    return World(means, anisotropic(rng), 20, reliability)


def neutral(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(300, WIDTH)) @ anisotropic(np.random.default_rng(3))


@pytest.mark.parametrize("centred", [False, True])
def test_planted_groups_are_found_and_supported(centred: bool) -> None:
    rng = np.random.default_rng(0)
    found = cluster(grouped().space(rng, neutral(rng)), 0, centred=centred)
    branches = {found.members(i): s for i, s in enumerate(found.support)}
    assert branches[frozenset({"v0", "v1"})] > 0.99
    assert branches[frozenset({"v2", "v3", "v4"})] > 0.99
    assert branches[frozenset({f"v{i}" for i in range(6)})] == 1.0
    order = [found.names[i] for i in found.order]
    assert abs(order.index("v0") - order.index("v1")) == 1
    assert found.cophenetic > 0.9
    assert found.cophenetic_chance is not None
    assert found.cophenetic > found.cophenetic_chance[1]


def test_where_no_groups_are_planted_no_branch_is_supported_and_the_tree_is_chance() -> None:
    """Equally far directions: which pair joins first is noise."""
    rng = np.random.default_rng(1)
    even = World(np.eye(WIDTH)[:6], anisotropic(rng), 20, 0.8)
    supports, above = [], []
    for seed in range(10):
        found = cluster(even.space(rng, neutral(rng)), 0, seed=seed)
        supports.append(found.support[0])
        assert found.cophenetic_chance is not None
        above.append(found.cophenetic > found.cophenetic_chance[1])
    assert np.mean(supports) < 0.7
    assert np.mean(above) < 0.4


def test_centring_separates_groups_that_share_a_direction() -> None:
    w = grouped(0.99)
    shifted = World(w.means + 4 * np.ones((1, WIDTH)) / np.sqrt(WIDTH), w.spread, 20, 0.99)
    space = shifted.space(np.random.default_rng(0))
    found = cluster(space, 0, centred=True)
    assert frozenset({"v2", "v3", "v4"}) in [found.members(i) for i in range(5)]
    assert found.linkage[-1, 2] > 1.0, "the groups point away from each other once their common part is gone"
    assert cluster(space, 0).linkage[-1, 2] < 0.3
    assert found.cophenetic_chance is None, "without neutral residuals there is no chance to compare with"


def test_a_join_is_as_high_as_the_mean_distance_of_its_sides() -> None:
    space = grouped().space(np.random.default_rng(0))
    found, distance = cluster(space, 0), 1 - cosines(space, 0).value
    last = found.linkage[-1]
    n = len(space)
    sides = [[space.names.index(v) for v in (found.members(int(i) - n) if i >= n else {space.names[int(i)]})] for i in last[:2]]
    assert last[2] == pytest.approx(distance[np.ix_(*sides)].mean())


def test_weak_vectors_and_small_sets_are_refused() -> None:
    drawn = grouped().draw(np.random.default_rng(0))
    drawn[4] = 30 * np.random.default_rng(1).normal(size=drawn[4].shape)
    with pytest.raises(GeometryError, match=r"clustering at layer 0 needs reliable vectors; below 0.5: v4"):
        cluster(persona_space([vectors_of(f"v{i}", d) for i, d in enumerate(drawn)]), 0)
    with pytest.raises(GeometryError, match="clustering needs at least 3 vectors"):
        cluster(persona_space([vectors_of(f"v{i}", d) for i, d in enumerate(drawn[:2])]), 0)

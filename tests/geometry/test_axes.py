"""Axes: contrasts are differences of means, projections are cross-validated, and a trend is told from none."""

from dataclasses import replace

import numpy as np
import pytest
from simulate import WIDTH, World, anisotropic, vectors_of

from persona_lens.errors import GeometryError, UnknownNameError
from persona_lens.geometry import axis_and_component, contrast, on_axis, ordered_contrast, persona_space
from persona_lens.vectors import PersonaVectors


def group(names: str, rng: np.random.Generator, shift: float = 0.0, questions: list[int] | None = None) -> list[PersonaVectors]:
    n = len(questions) if questions else 10
    return [vectors_of(x, shift + rng.normal(size=(n, 2, 4)), questions) for x in names]


def test_a_contrast_is_the_difference_of_the_groups_means_question_by_question() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = group("ab", rng), group("cde", rng)
    found = contrast("axis", ours, theirs)
    expected = sum(v.differences for v in ours) / 2 - sum(v.differences for v in theirs) / 3  # pyright: ignore[reportOperatorIssue]
    np.testing.assert_allclose(found.differences, expected, atol=1e-6)
    np.testing.assert_allclose(found.directions, expected.mean(0), atol=1e-6)  # pyright: ignore[reportAttributeAccessIssue]
    assert found.trait == "axis"
    assert found.lineage == "tiny"
    assert found.provenance["theirs"] == ["c", "d", "e"]


def test_a_contrast_counts_the_questions_that_all_have() -> None:
    rng = np.random.default_rng(0)
    found = contrast("axis", group("a", rng, questions=list(range(9))), group("b", rng, questions=[0, 2, 3, 4, 5, 6, 7, 8, 20]))
    assert found.provenance["questions"] == [0, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(GeometryError, match="axis: 2 questions have answers on both sides, at least 6 are needed"):
        contrast("axis", group("a", rng, questions=list(range(6))), group("b", rng, questions=[4, 5, 6, 7, 8, 9]))
    with pytest.raises(GeometryError, match="needs vectors on both sides, there are 0 and 1"):
        contrast("axis", [], group("b", rng))
    bare = replace(group("a", rng)[0], estimator="logistic", directions=3 * group("a", rng)[0].directions)
    with pytest.raises(GeometryError, match="needs per-question means, missing for a"):
        contrast("axis", [bare], group("b", rng))


def test_a_direction_between_the_groups_is_found_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    apart = contrast("axis", group("abc", rng, shift=2.0), group("def", rng))
    assert apart.reliability.min() > 0.9
    assert apart.p_any < 0.01
    assert contrast("axis", group("abc", rng), group("def", rng)).reliability.max() < 0.8


def test_projections_are_those_of_the_directions_and_noise_adds_nothing() -> None:
    """Vectors orthogonal to the axis that share its questions: the plain projection is noise, the cross-validated one is not."""
    rng = np.random.default_rng(0)
    means = np.zeros((4, WIDTH))
    means[0, 0], means[1, 0], means[2, 1], means[3, 0] = 2.0, 1.0, 1.0, -1.0
    w = World(means, anisotropic(rng), 20, 0.8, shared=0.8)
    found, plain = [], []
    for _ in range(100):
        drawn = w.draw(rng)
        space = persona_space([vectors_of(f"v{i}", d) for i, d in enumerate(drawn[1:])])
        axis = vectors_of("axis", drawn[0])
        placed = on_axis(space, axis, 0)
        found.append(np.stack([placed.projection, placed.cosine]))
        plain.append(space.at(0) @ axis.directions[0].double().numpy() / float(axis.directions[0].norm()))
    np.testing.assert_allclose(np.mean(found, 0)[0], [1, 0, -1], atol=0.05)
    np.testing.assert_allclose(np.mean(found, 0)[1], [1, 0, -1], atol=0.08)
    assert np.mean(plain, 0)[1] > 0.1, "the control: shared noise looks like a projection"
    assert placed.names == ("v0", "v1", "v2")
    assert placed.axis == "axis"


def test_an_axis_along_the_first_component_is_told_from_one_across() -> None:
    rng = np.random.default_rng(0)
    means = np.zeros((8, WIDTH))
    means[:, 0], means[:, 1], means[:, 2] = np.linspace(-3, 3, 8), np.array([1, -1, -1, 1, 1, -1, -1, 1]), 5.0
    space = World(means, anisotropic(rng), 20, 0.99).space(rng)
    along, across = np.zeros(WIDTH), np.zeros(WIDTH)
    along[0], across[2] = 1.0, 1.0
    for direction, low, high in ((along, 0.95, 1.0), (-along, 0.95, 1.0), (across, -0.2, 0.2)):
        axis = vectors_of("axis", direction + 0.05 * rng.normal(size=(20, WIDTH)))
        found = axis_and_component(space, axis, 0)
        assert low <= found.cosine <= high
        assert found.low <= found.cosine <= found.high
        assert set(found.without) == set(space.names)
    grouped = axis_and_component(space, axis, 0, {"ends": ["v0", "v7"], "middle": ["v3", "v4"]})
    assert set(grouped.without) == {"ends", "middle"}


def test_a_component_that_depends_on_one_group_shows_it() -> None:
    """One extreme vector makes the first component: without it another direction leads."""
    rng = np.random.default_rng(0)
    means = np.zeros((6, WIDTH))
    means[:5, 1], means[5, 0], means[:, 2] = np.linspace(-1, 1, 5), 9.0, 1.0
    space = World(means, anisotropic(rng), 20, 0.99).space(rng)
    axis = vectors_of("axis", np.eye(WIDTH)[0] + 0.02 * rng.normal(size=(20, WIDTH)))
    found = axis_and_component(space, axis, 0)
    assert found.cosine > 0.95
    assert found.without["v5"] < 0.3
    assert min(c for n, c in found.without.items() if n != "v5") > 0.95


def test_axes_of_other_lineages_poolings_and_groups_are_refused() -> None:
    rng = np.random.default_rng(0)
    space = World(rng.normal(size=(4, WIDTH)), anisotropic(rng), 10, 0.9).space(rng)
    differences = rng.normal(size=(10, WIDTH))
    with pytest.raises(GeometryError, match="the axis a is of lineage other, the vectors of tiny"):
        on_axis(space, vectors_of("a", differences, lineage="other"), 0)
    with pytest.raises(GeometryError, match="the axis a is pooled as prompt_last, the vectors as response_mean"):
        on_axis(space, vectors_of("a", differences, pooling="prompt_last"), 0)
    with pytest.raises(GeometryError, match=r"the axis a has shape \[1, 3\] \[layer, d_model\], the vectors \[1, 48\]"):
        on_axis(space, vectors_of("a", differences[:, :3]), 0)
    with pytest.raises(GeometryError, match="the axis a comes without per-question means"):
        on_axis(space, replace(vectors_of("a", differences), differences=vectors_of("a", differences).differences[:0]), 0)
    axis = vectors_of("a", differences)
    with pytest.raises(UnknownNameError, match="unknown vector 'v7'"):
        axis_and_component(space, axis, 0, {"x": ["v7"]})
    with pytest.raises(GeometryError, match="without x fewer than 3 of 4 vectors remain"):
        axis_and_component(space, axis, 0, {"x": ["v0", "v1"]})


def test_a_rising_projection_is_told_from_one_that_does_not_rise() -> None:
    rng = np.random.default_rng(0)
    levels = [0.0, 0.25, 0.5, 0.75, 1.0]
    rising = 4 * np.array(levels)[:, None] + 0.3 * rng.normal(size=(5, 20)) + 3 * rng.normal(size=(1, 20))
    found = ordered_contrast(levels, rising)
    assert found.interval[0] < 4 < found.interval[1]
    assert found.spearman == pytest.approx(1.0)
    assert found.p_value < 1e-6
    assert found.monotone > 0.4
    falling = ordered_contrast(levels, -rising)
    assert (falling.slope, falling.spearman) == pytest.approx((-found.slope, -1.0))
    assert falling.p_value > 0.99
    assert ordered_contrast(levels, rng.normal(size=(5, 20))).monotone < 0.2
    p = [ordered_contrast(levels, rng.normal(size=(5, 20))).p_value for _ in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.10
    for bad in ([0.0, 1.0], [0.0, 0.5, 0.5, 0.7, 1.0]):
        with pytest.raises(GeometryError, match="at least 3 rising levels and 3 questions"):
            ordered_contrast(bad, rising[: len(bad)])


def test_an_axis_is_aligned_with_the_vectors_by_question() -> None:
    """Shared noise: at the same index it is left out, at another index it would count."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(10, WIDTH))
    space = persona_space([vectors_of(n, noise) for n in "ab"])
    late = vectors_of("axis", noise[4:], [4, 5, 6, 7, 8, 9])
    moved = vectors_of("axis", noise[4:], [0, 1, 2, 3, 4, 5])
    assert abs(on_axis(space, late, 0).projection[0]) < abs(on_axis(space, moved, 0).projection[0]) / 2

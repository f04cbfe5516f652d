"""Persona spaces: what may stand side by side, and inner products that noise does not bias."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulate import WIDTH, vectors_of, world

from persona_lens.errors import GeometryError
from persona_lens.extraction import ExtractionRun
from persona_lens.geometry import persona_space, space_of_runs
from persona_lens.geometry.space import matched_grams, products, resampled_products, whitening


def three(questions: int = 8) -> list:
    rng = np.random.default_rng(0)
    return [vectors_of(n, rng.normal(size=(questions, 2, 5))) for n in ("evil", "humor", "apathy")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trait": "humor"}, "names must differ, given twice: humor"),
        ({"pooling": "prompt_last"}, r"different poolings cannot be compared (evil: prompt_last; humor, apathy: response_mean)"),
        (
            {"provenance": {"model": {"lineage": "other"}}},
            "different lineages cannot be compared (evil: other; humor, apathy: tiny)",
        ),
        (
            {"provenance": {"model": {"lineage": "tiny", "weights": "tuned"}}},
            "different models cannot be compared (evil: tuned; humor, apathy: unknown)",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(change: dict, message: str) -> None:
    first, *rest = three()
    with pytest.raises(GeometryError) as error:
        persona_space([replace(first, **change), *rest])
    assert message in str(error.value)


def test_layers_widths_and_neutral_residuals_must_fit() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(GeometryError, match="numbers of layers"):
        persona_space([*three(), vectors_of("wide", rng.normal(size=(8, 3, 5)))])
    with pytest.raises(GeometryError, match="different widths cannot be compared"):
        persona_space([*three(), vectors_of("wide", rng.normal(size=(8, 2, 6)))])
    with pytest.raises(GeometryError, match=r"neutral residuals have shape \[9, 2, 4\], the vectors need \[sample, 2, 5\]"):
        persona_space(three(), torch.zeros(9, 2, 4))
    with pytest.raises(GeometryError, match="none are given"):
        persona_space([])


def test_vectors_without_their_questions_are_refused_where_error_bars_are_asked_for() -> None:
    first, *rest = three()
    bare = replace(first, differences=first.differences[:0])
    other = replace(rest[0], directions=2 * rest[0].directions, estimator="logistic")
    space = persona_space([bare, other, rest[1]])
    assert space.without_means == ("evil", "humor")
    with pytest.raises(GeometryError, match="no per-question means for evil, humor: error bars need them"):
        space.differences_at(0)
    np.testing.assert_allclose(space.at(1)[1], other.directions[1].double())
    with pytest.raises(GeometryError, match="layer 2 does not exist: the vectors have layers 0 to 1"):
        space.at(2)
    with pytest.raises(GeometryError, match="no neutral residuals for response_mean"):
        space.neutral_at(0)
    with pytest.raises(GeometryError, match="PCA needs at least 4 vectors, these are 3: evil, humor, apathy"):
        space.require(4, "PCA")


def test_questions_are_aligned_by_index() -> None:
    rng = np.random.default_rng(0)
    a, b = vectors_of("a", rng.normal(size=(3, 1, 4)), [0, 2, 5]), vectors_of("b", rng.normal(size=(4, 1, 4)), [1, 2, 3, 5])
    found = persona_space([a, b]).differences_at(0)
    assert found.shape == (2, 6, 4)
    assert np.isfinite(found[0, :, 0]).tolist() == [True, False, True, False, False, True]
    np.testing.assert_allclose(found[1, 5], b.differences[3, 0], rtol=1e-6)


def test_runs_bring_their_neutral_answers_for_the_response_mean_only(small_run: ExtractionRun) -> None:
    space = space_of_runs([small_run])
    assert space.neutral is not None
    assert space.neutral.shape == small_run.neutral.shape
    assert space_of_runs([small_run], "prompt_last").neutral is None
    assert space.lineage == small_run.vectors.lineage


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), vectors=st.integers(2, 4), questions=st.integers(3, 6), gaps=st.integers(0, 2))
def test_products_equal_plain_loops(seed: int, vectors: int, questions: int, gaps: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(vectors, questions + gaps, 3))
    for _ in range(gaps):
        x[rng.integers(vectors), rng.integers(questions + gaps)] = np.nan
    if np.isfinite(x[..., 0]).sum(1).min() < 4:
        return
    found = products(x)
    asked = [i for i in range(x.shape[1]) if np.isfinite(x[:, i, 0]).any()]

    def unbiased(a: int, b: int, without: int | None = None) -> float:
        pairs = [
            float(x[a, i] @ x[b, j])
            for i in asked
            for j in asked
            if i != j and without not in (i, j) and np.isfinite(x[a, i, 0]) and np.isfinite(x[b, j, 0])
        ]
        return float(np.mean(pairs))

    for a in range(vectors):
        for b in range(vectors):
            assert found.unbiased[a, b] == pytest.approx(unbiased(a, b), rel=1e-9, abs=1e-9)
            assert found.plain[a, b] == pytest.approx(float(np.nanmean(x[a], 0) @ np.nanmean(x[b], 0)), rel=1e-9, abs=1e-9)
            for k, i in enumerate(asked):
                assert found.left_out[k, a, b] == pytest.approx(unbiased(a, b, i), rel=1e-9, abs=1e-9)
    centring = np.eye(vectors) - 1 / vectors
    np.testing.assert_allclose(found.centred().left_out[0], centring @ found.left_out[0] @ centring, atol=1e-12)


def test_a_question_that_nobody_has_is_no_unit_of_the_jackknife() -> None:
    x = np.random.default_rng(0).normal(size=(3, 6, 4))
    padded = np.insert(x, 2, np.nan, axis=1)
    assert products(padded).left_out.shape == (6, 3, 3)
    np.testing.assert_allclose(products(padded).left_out, products(x).left_out)


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_products_are_unbiased_and_the_plain_ones_are_not(shared: float) -> None:
    w = world(4, 10, 0.5, shared=shared, seed=2)
    rng, right = np.random.default_rng(0), w.means @ w.means.T
    found = [products(w.draw(rng)) for _ in range(1500)]
    for name, biased in (("unbiased", False), ("plain", True)):
        values = np.stack([getattr(p, name) for p in found])
        z = (values.mean(0) - right) / (values.std(0) / np.sqrt(len(values)))
        assert (np.abs(z).max() > 10) == biased
        off = np.abs(z[np.triu_indices(4, 1)]).max()
        assert (off > 10) == (biased and shared > 0), "off the diagonal only shared noise biases"


def test_a_shared_baseline_makes_cosines_of_one_half_and_different_questions_remove_them() -> None:
    """Two conditions without any direction, minus one and the same set of baseline answers."""
    rng = np.random.default_rng(0)
    plain, unbiased = [], []
    for _ in range(300):
        baseline = rng.normal(size=(1, 20, WIDTH))
        found = products(rng.normal(size=(2, 20, WIDTH)) - baseline)
        plain.append(found.plain[0, 1] / np.sqrt(found.plain[0, 0] * found.plain[1, 1]))
        unbiased.append(found.unbiased[0, 1])
    assert np.mean(plain) == pytest.approx(0.5, abs=0.02)
    assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / np.sqrt(300)


def test_resampled_questions_are_not_multiplied_with_themselves() -> None:
    drawn = world(3, 12, 0.9, seed=1).draw(np.random.default_rng(0))
    found = resampled_products(drawn, 400, np.random.default_rng(1))
    unbiased = products(drawn).unbiased
    expected = unbiased / np.sqrt(np.outer(np.diag(unbiased), np.diag(unbiased)))
    np.testing.assert_allclose(np.median(found, axis=0), expected, atol=0.02)
    np.testing.assert_allclose(np.diagonal(found, axis1=1, axis2=2), 1.0)


def test_whitening_makes_the_covariance_round() -> None:
    rng = np.random.default_rng(0)
    neutral = rng.normal(size=(4000, 6)) * [10, 5, 2, 1, 1, 0.5]
    np.testing.assert_allclose(np.cov((neutral @ whitening(neutral)).T), np.eye(6), atol=0.1)
    with pytest.raises(GeometryError, match="at least 20 neutral residuals, there are 19"):
        whitening(neutral[:19])


def test_random_directions_have_the_covariance_and_the_norms_asked_for() -> None:
    rng = np.random.default_rng(0)
    neutral = 3.0 + rng.normal(size=(500, 4)) * [10, 1, 1, 1]
    grams = matched_grams(neutral, np.array([2.0, 5.0]), 300, rng)
    np.testing.assert_allclose(grams[:, 0, 0], 4.0)
    np.testing.assert_allclose(grams[:, 1, 1], 25.0)
    assert np.abs(grams[:, 0, 1]).mean() / 10 > 0.8, "one large dimension makes random directions nearly parallel"
    halved = matched_grams(neutral, np.array([2.0, 5.0]), 3, rng, lambda x: x / 2)
    np.testing.assert_allclose(halved[:, 0, 0], 1.0)


def test_three_questions_are_needed() -> None:
    with pytest.raises(GeometryError, match="at least 3 questions of every vector, one has 2"):
        products(np.random.default_rng(0).normal(size=(2, 2, 4)))

"""Coverage of every interval that a geometry study prints, over 1,000 simulated sets of questions; and false positives."""

import numpy as np
import pytest
from scipy.stats import binomtest
from simulate import World, vectors_of, world

from persona_lens.geometry import axis_and_component, cosines, on_axis, pca, persona_space
from persona_lens.geometry.space import products

DRAWS = 1000
LOW, HIGH = 0.92, 0.98


def truth(w: World) -> dict[str, np.ndarray]:
    """The estimands: what endless questions would give."""
    gram = w.means @ w.means.T
    length = np.sqrt(np.diag(gram))
    c = np.eye(len(gram)) - 1 / len(gram)
    centred = c @ gram @ c
    middle = np.sqrt(np.diag(centred))
    values, axes = np.linalg.eigh(centred)
    upper = np.triu_indices(len(gram), 1)
    axis = w.means[0] - w.means[1:].mean(0)
    first = np.linalg.svd(w.means[1:] - w.means[1:].mean(0))[2][0]
    loading = axes[:, -1] * np.sqrt(values[-1]) / middle
    return {
        "cosine": (gram / np.outer(length, length))[upper],
        "centred cosine": (centred / np.outer(middle, middle))[upper],
        "share of components 1-3": values[::-1][:3] / values.sum(),
        "participation ratio": np.array([values.sum() ** 2 / (values**2).sum()]),
        "loadings on component 1": loading * np.sign(loading[np.abs(axes[:, -1]).argmax()]),
        "projection on an axis": w.means[1:] @ axis / np.linalg.norm(axis),
        "cosine with an axis": w.means[1:] @ axis / np.linalg.norm(axis) / length[1:],
        "cosine of axis and component": np.array([abs(first @ axis) / np.linalg.norm(axis)]),
    }


def intervals(w: World, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Low, estimate and high of everything, from one set of questions. The axis is vector 0 minus the mean of the others."""
    drawn = w.draw(rng)
    space = persona_space([vectors_of(f"v{i}", d) for i, d in enumerate(drawn)])
    axis = vectors_of("axis", drawn[0] - drawn[1:].mean(0))
    rest = persona_space([vectors_of(f"v{i}", d) for i, d in enumerate(drawn[1:], 1)])
    upper = np.triu_indices(len(space), 1)
    plain, centred, parts = cosines(space, 0), cosines(space, 0, centred=True), pca(space, 0)
    placed, both = on_axis(rest, axis, 0), axis_and_component(rest, axis, 0)
    ratio = parts.participation_interval or (np.nan, np.nan)
    return {
        "cosine": (plain.low[upper], plain.value[upper], plain.high[upper]),
        "centred cosine": (centred.low[upper], centred.value[upper], centred.high[upper]),
        "share of components 1-3": (parts.share_low[:3], parts.share[:3], parts.share_high[:3]),
        "participation ratio": (np.array([ratio[0]]), np.array([parts.participation]), np.array([ratio[1]])),
        "loadings on component 1": (parts.loadings_low[:, 0], parts.loadings[:, 0], parts.loadings_high[:, 0]),
        "projection on an axis": (placed.projection_low, placed.projection, placed.projection_high),
        "cosine with an axis": (placed.cosine_low, placed.cosine, placed.cosine_high),
        "cosine of axis and component": (np.array([both.low]), np.array([both.cosine]), np.array([both.high])),
    }


def coverage(w: World, draws: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """Share of intervals that hold the truth (mean over the entries of a quantity), the bias, how often one is given."""
    rng, right = np.random.default_rng(seed), truth(w)
    hits: dict[str, list[np.ndarray]] = {name: [] for name in right}
    errors: dict[str, list[np.ndarray]] = {name: [] for name in right}
    for _ in range(draws):
        for name, (low, value, high) in intervals(w, rng).items():
            if name.startswith("loadings") and value @ right[name] < 0:  # a component's sign is anybody's
                low, value, high = -high, -value, -low
            given = np.isfinite(low)
            hits[name].append(np.where(given, (low <= right[name]) & (right[name] <= high), np.nan))
            errors[name].append(value - right[name])
    return {
        name: (float(np.nanmean(hits[name])), float(np.nanmean(errors[name])), float(np.isfinite(hits[name]).mean()))
        for name in right
    }


def ratio(means: np.ndarray) -> float:
    """How much larger the first component is than the second."""
    variance = np.linalg.svd(means - means.mean(0))[1] ** 2
    return float(variance[0] / variance[1])


def separate(vectors: int, questions: int, reliability: float, shared: float) -> World:
    """A world whose first component is one, with vector 0 and without."""
    worlds = (world(vectors, questions, reliability, shared=shared, seed=seed) for seed in range(1000))
    return next(w for w in worlds if min(ratio(w.means), ratio(w.means[1:])) > 1.4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vectors", "questions", "reliability", "shared"),
    [
        (7, 20, 0.85, 0.0),
        (7, 20, 0.99, 0.3),
        (12, 20, 0.9, 0.5),
        (7, 12, 0.9, 0.0),
        (32, 20, 0.9, 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_every_interval_covers_the_truth(vectors: int, questions: int, reliability: float, shared: float) -> None:
    found = coverage(separate(vectors, questions, reliability, shared), DRAWS, seed=1)
    for name, (share, bias, given) in found.items():
        if given < 0.2:
            continue  # hardly ever printed: a threshold of reliability or separation lies above this world
        slack = 1.96 * np.sqrt(0.95 * 0.05 / DRAWS)  # of the simulation
        assert LOW - slack <= share <= HIGH + slack, f"{name}: {share:.3f} of the intervals hold the truth (bias {bias:+.4f})"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_where_two_components_are_nearly_equal_their_intervals_are_hardly_ever_given() -> None:
    """Conditional on being given they would cover less: the threshold is what keeps them honest."""
    tied = next(
        w for w in (world(12, 20, 0.95, seed=seed) for seed in range(1000)) if max(ratio(w.means), ratio(w.means[1:])) < 1.1
    )
    found = coverage(tied, 200, seed=1)
    assert found["loadings on component 1"][2] < 0.1
    assert found["cosine of axis and component"][2] < 0.1
    assert LOW < found["share of components 1-3"][0] < 0.99


def test_a_percentile_bootstrap_would_not_cover() -> None:
    """The control: resampled questions repeat, and plain cosines of noisy vectors are too small."""
    w = world(7, 20, 0.6, seed=3)
    rng, right = np.random.default_rng(0), truth(w)["cosine"]
    upper = np.triu_indices(7, 1)
    hits: list[np.ndarray] = []
    for _ in range(60):
        drawn = w.draw(rng)
        again: list[np.ndarray] = []
        for _ in range(200):
            means = drawn[:, rng.integers(0, 20, 20)].mean(1)
            gram = means @ means.T
            length = np.sqrt(np.diag(gram))
            again.append((gram / np.outer(length, length))[upper])
        low, high = np.percentile(again, [2.5, 97.5], axis=0)
        hits.append((low <= right) & (right <= high))
    assert np.mean(hits) < 0.85


def test_a_negative_share_of_the_spectrum_has_no_interval_where_it_is_not_reliable() -> None:
    noisy = world(7, 20, 0.5, seed=3).space(np.random.default_rng(0))
    assert products(noisy.differences_at(0)).reliability.min() < 0.8
    assert pca(noisy, 0).participation_interval is None


def test_false_positives_of_the_tests_are_nominal() -> None:
    """Orthogonal directions, planted: 5 % of the pairs are called related, 5 % of the sets are said to hold a related pair."""
    rng = np.random.default_rng(5)
    axes = np.linalg.qr(rng.normal(size=(48, 6)))[0].T
    draws = 400
    pairs, sets = 0, 0
    for draw in range(draws):
        found = cosines(World(axes, world(6, 20, 0.9, seed=1).spread, 20, 0.9, shared=0.3).space(rng), 0, seed=draw)
        p = found.p_value[np.triu_indices(6, 1)]
        pairs += int((p < 0.05).sum())
        sets += found.p_largest < 0.05
    for count, n in ((pairs, 15 * draws), (sets, draws)):
        low, high = binomtest(count, n).proportion_ci(0.999)
        assert low <= 0.05, f"{count} of {n} below 5 %"
        assert high >= 0.02, f"{count} of {n}: far too timid"

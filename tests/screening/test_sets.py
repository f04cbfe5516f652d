"""Scores of data sets: estimates as other formulas have them, intervals that hold the truth, sets told apart or not."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import t as student_t
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from persona_lens.errors import ScreeningError
from persona_lens.records import decoded, encoded
from persona_lens.screening.sets import Ranked, Ranking, RowScores, SetScore, rank_sets, set_score
from persona_lens.screening.uncertainty import Uncertainty, holm

Draw = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def normal(c: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return 0.7 * c + 0.7 * rng.normal(size=len(c)), c


def unrelated(c: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=len(c)), c


def exponential(c: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    e = -np.log1p(-ndtr(c) * (1 - 1e-12))
    return 0.8 * e + 0.4 * rng.exponential(size=len(c)), e


def lognormal(c: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return np.exp(c + 0.3 * rng.normal(size=len(c))), np.exp(c)


def long_tails(c: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = c / np.sqrt(rng.chisquare(3, size=len(c)) / 3)
    return 0.7 * x + 0.7 * rng.standard_t(3, size=len(c)), x


def square(c: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return c**2 + 0.3 * rng.normal(size=len(c)), c


def square_of_lognormal(c: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return 0.5 * np.exp(1.4 * c) + 0.3 * rng.normal(size=len(c)), np.exp(0.7 * c)


def rare(share: float, exact: float, cheap: float) -> Draw:
    """A share of the rows scores higher by so many standard deviations."""

    def draw(c: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        z = rng.random(len(c)) < share
        return 0.5 * c + 0.8 * rng.normal(size=len(c)) + exact * z, c + cheap * z

    return draw


@dataclass(frozen=True)
class World:
    draw: Draw
    truth: float


WORLDS = {
    "normal": World(normal, 0.0),
    "unrelated": World(unrelated, 0.0),
    "exponential": World(exponential, 1.2),
    "long tails": World(long_tails, 0.0),
    "square": World(square, 1.0),
    "5 % higher": World(rare(0.05, 5, 4), 0.25),
    "10 % higher": World(rare(0.1, 5, 2), 0.5),
}
LOGNORMAL = World(lognormal, float(np.exp(0.545)))
BENT = World(square_of_lognormal, float(0.5 * np.exp(0.98)))
FAR = World(rare(0.02, 20, 8), 0.4)


@dataclass(frozen=True)
class Design:
    """Rows of a set, how many have an exact score (0: all), and rows per prompt (0: a random number, four on average)."""

    rows: int
    exact: int = 0
    each: int = 1

    def draw(self, world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Exact and cheap scores, and prompts. Half of the variance lies between prompts."""
        sizes = np.full(self.rows, self.each) if self.each else rng.geometric(0.25, self.rows)
        prompts = np.repeat(np.arange(self.rows), sizes)[: self.rows]
        both = np.sqrt(0.5) * (rng.normal(size=self.rows)[prompts] + rng.normal(size=self.rows))
        exact, cheap = world.draw(both, rng)
        if self.exact:
            exact[rng.permutation(self.rows)[self.exact :]] = np.nan
        return exact, cheap if self.exact else None, prompts


@dataclass(frozen=True)
class Coverage:
    given: float
    held: float
    width: float
    bias: float  # in standard deviations of the estimate


def coverage(world: World, design: Design, sets: int, seed: int = 0) -> Coverage:
    rng = np.random.default_rng(seed)
    drawn = [design.draw(world, rng) for _ in range(sets)]
    found = [set_score(exact, cheap, prompts=prompts) for exact, cheap, prompts in drawn]
    ends = np.array([(s.low, s.high) for s in found if np.isfinite(s.low)])
    means = np.array([s.mean for s in found])
    held = (ends[:, 0] <= world.truth) & (world.truth <= ends[:, 1])
    width = float(np.median(ends[:, 1] - ends[:, 0]))
    return Coverage(len(ends) / sets, float(held.mean()), width, float((means.mean() - world.truth) / means.std()))


def drawn(seed: int = 0, rows: int = 300, exact: int = 60, each: int = 0) -> RowScores:
    values, cheap, prompts = Design(rows, exact, each).draw(WORLDS["normal"], np.random.default_rng(seed))
    return RowScores(values, cheap, prompts)


def scored(s: RowScores) -> SetScore:
    return set_score(s.exact, s.cheap, prompts=s.prompts)


def ends(s: SetScore) -> tuple[float, float, float]:
    return s.mean, s.low, s.high


# the figures


def test_without_skewness_the_mean_has_the_interval_of_the_t_test() -> None:
    half = np.random.default_rng(0).normal(size=50)
    values = 3 + np.concatenate([half, -half])
    found, expected = set_score(values), ttest_1samp(values, 0).confidence_interval()
    wider = np.sqrt(100 / 99)  # a row is left out at a time
    assert found.mean == pytest.approx(3)
    assert (found.low, found.high) == pytest.approx((3 - (3 - expected.low) * wider, 3 + (expected.high - 3) * wider))
    assert (found.rows, found.exact, found.prompts, found.method) == (100, 100, 100, "mean")


def test_where_scores_are_skewed_the_longer_end_is_that_of_hall_and_the_other_that_of_student() -> None:
    values = np.random.default_rng(1).lognormal(size=60)
    n, off = 60, values - values.mean()
    spread = np.sqrt((off**2).sum()) / (n - 1)
    a = (off**3).sum() / (off**2).sum() ** 1.5
    q = student_t.ppf(0.975, n - 1)
    hall = 3 / a * (np.cbrt(1 + a * (-q - a / 6)) - 1)
    found = set_score(values)
    assert hall < -q
    assert (found.low, found.high) == pytest.approx((values.mean() - q * spread, values.mean() - hall * spread))
    mirrored = set_score(-values)
    assert ends(mirrored) == pytest.approx((-found.mean, -found.high, -found.low))


def test_rows_of_one_prompt_are_added_up() -> None:
    """With the same number of rows to each, the prompts' means are what counts."""
    means = np.random.default_rng(2).normal(size=40)
    within = np.random.default_rng(3).normal(size=(40, 5))
    values = (means[:, None] + within - within.mean(1, keepdims=True)).ravel()
    found = set_score(values, prompts=[f"question {i // 5}" for i in range(200)])
    assert ends(found) == pytest.approx(ends(set_score(means)))
    assert (found.rows, found.exact, found.prompts) == (200, 200, 40)


def test_prompts_of_many_rows_weigh_as_many() -> None:
    values, prompts = np.array([1.0, 2.0, 3.0, 6.0]), ["a", "a", "a", "b"]
    assert set_score(values, prompts=prompts).mean == 3.0


def test_the_regression_is_that_of_leaving_out_prompts_one_by_one() -> None:
    s = drawn(each=5)
    has = np.isfinite(s.exact)
    total, left, back = s.cheap.mean(), [], []
    for row in np.flatnonzero(has):
        others = has & (s.prompts != s.prompts[row])
        slope = np.polyfit(s.cheap[others], s.exact[others], 1)[0]
        left.append(s.exact[row] - slope * (s.cheap[row] - total))
        back.append(slope * (s.cheap[row] - s.cheap[has].mean()) * 60 / 300)
    found = scored(s)
    assert found.mean == pytest.approx(np.mean(left) + np.mean(back))
    slope = np.polyfit(s.cheap[has], s.exact[has], 1)[0]
    off = s.cheap[has] - s.cheap[has].mean()
    weight = 1 + (total - s.cheap[has].mean()) * off / off.var()
    added = slope * (s.cheap - total) / 300
    added[has] += (np.array(left) - np.mean(left)) * weight / 60
    parts = [added[s.prompts == p].sum() / (1 - has[s.prompts == p].sum() / 60) for p in range(60)]
    sizes = np.bincount(s.prompts[has])
    error = Uncertainty(np.array(parts), None, int(60**2 / (sizes**2).sum()) - 2)
    assert (found.low, found.high) == pytest.approx(error.interval(found.mean))
    assert (found.rows, found.exact, found.prompts, found.method) == (300, 60, 60, "regression")


def test_what_cheap_scores_say_exactly_is_known_as_well_as_they_are() -> None:
    rng = np.random.default_rng(4)
    cheap = rng.normal(size=2000)
    exact = np.where(rng.random(2000) < 0.1, 3 * cheap + 1, np.nan)
    found, cheap_alone = set_score(exact, cheap), set_score(cheap)
    assert found.mean == pytest.approx(3 * cheap.mean() + 1)
    assert found.high - found.low == pytest.approx(3 * (cheap_alone.high - cheap_alone.low), rel=0.02)


def test_unrelated_cheap_scores_neither_help_nor_harm() -> None:
    rng = np.random.default_rng(5)
    exact = np.where(np.arange(3000) < 300, rng.normal(size=3000), np.nan)
    alone = set_score(exact)
    found = set_score(exact, rng.normal(size=3000))
    assert found.mean == pytest.approx(alone.mean, abs=0.02)
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.05)


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e6, 1e6), (0.1 + 0.2, 0.3)])
def test_cheap_scores_that_do_not_vary_say_nothing(values: tuple[float, float]) -> None:
    exact = np.where(np.arange(300) < 60, np.random.default_rng(6).normal(size=300), np.nan)
    cheap = np.where(np.random.default_rng(7).random(300) < 0.5, *values)
    found, alone = set_score(exact, cheap), set_score(exact)
    assert ends(found)[:1] == pytest.approx(ends(alone)[:1])
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.01)


def test_cheap_scores_are_not_used_where_all_rows_have_an_exact_one() -> None:
    s = drawn()
    has = np.isfinite(s.exact)
    found = set_score(s.exact[has], s.cheap[has], prompts=s.prompts[has])
    assert found.method == "mean"
    assert ends(found) == ends(set_score(s.exact[has], prompts=s.prompts[has]))
    left_out = set_score(s.exact, np.where(has, s.cheap, np.nan), prompts=s.prompts)
    assert left_out == found


# what does not matter


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_order_of_rows_does_not_matter(seed: int, regression: bool) -> None:
    s = drawn()
    cheap = s.cheap if regression else None
    order = np.random.default_rng(seed).permutation(300)
    found = set_score(s.exact[order], None if cheap is None else cheap[order], prompts=[f"q{p}" for p in s.prompts[order]])
    assert ends(found) == pytest.approx(ends(set_score(s.exact, cheap, prompts=s.prompts)), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.floats(-100, 100), st.floats(0.01, 100), st.booleans(), st.booleans())
def test_scale_and_shift_of_exact_scores_carry_over_and_those_of_cheap_ones_do_not_matter(
    shift: float, scale: float, down: bool, regression: bool
) -> None:
    s = drawn()
    scale = -scale if down else scale
    mean, low, high = ends(set_score(s.exact, s.cheap if regression else None, prompts=s.prompts))
    moved = set_score(s.exact * scale + shift, 3 - s.cheap * scale if regression else None, prompts=s.prompts)
    expected = [v * scale + shift for v in ((mean, high, low) if down else (mean, low, high))]
    assert ends(moved) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_rows_without_scores_do_not_count(seed: int) -> None:
    s, rng = drawn(), np.random.default_rng(seed)
    places = np.sort(rng.integers(0, 300, 40))
    exact, cheap = (np.insert(v, places, np.nan) for v in (s.exact, s.cheap))
    prompts = np.insert(s.prompts, places, rng.integers(0, 400, 40))
    found = set_score(exact, cheap, prompts=prompts)
    assert ends(found) == pytest.approx(ends(scored(s)))
    assert (found.rows, found.exact, found.prompts) == (300, 60, scored(s).prompts)


def test_single_precision_does() -> None:
    s = drawn()
    low = set_score(s.exact.astype(np.float32), s.cheap.astype(np.float32), prompts=s.prompts)
    assert ends(low) == pytest.approx(ends(scored(s)), rel=1e-4)


def test_prompts_may_be_texts_or_numbers() -> None:
    s = drawn()
    texts = [f"q{p}" for p in s.prompts]
    assert ends(set_score(s.exact, s.cheap, prompts=np.array(texts))) == ends(set_score(s.exact, s.cheap, prompts=texts))
    assert ends(set_score(s.exact, s.cheap, prompts=texts)) == pytest.approx(ends(scored(s)))


def test_a_score_is_read_back() -> None:
    for found in (scored(drawn()), set_score(np.ones(3))):
        back = decoded(SetScore, encoded(found))
        assert str(back) == str(found)


# where there is no interval


@pytest.mark.parametrize(("prompts", "given"), [(19, False), (20, True)])
def test_an_interval_takes_twenty_prompts(prompts: int, given: bool) -> None:
    values = np.random.default_rng(7).normal(size=3 * prompts)
    found = set_score(values, prompts=np.repeat(np.arange(prompts), 3))
    assert np.isfinite([found.low, found.high]).tolist() == [given] * 2
    assert np.isfinite(found.mean)
    few = np.where(np.arange(500) < prompts, np.random.default_rng(8).normal(size=500), np.nan)
    assert np.isfinite(set_score(few, np.arange(500.0)).low) == given


def test_one_prompt_with_many_rows_does_not_count_as_many() -> None:
    values = np.random.default_rng(9).normal(size=200)
    prompts = np.maximum(np.arange(200) - 150, 0)
    assert len(set(prompts.tolist())) == 50
    assert np.isnan([set_score(values, prompts=prompts).low, set_score(values, prompts=prompts).high]).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -1e8])
def test_scores_that_do_not_vary_have_no_interval(value: float) -> None:
    for prompts in (None, np.arange(100) // 3):
        found = set_score(np.full(100, value), prompts=prompts)
        assert found.mean == pytest.approx(value)
        assert np.isnan([found.low, found.high]).all()
    rounded = set_score(np.tile([0.1 + 0.2, 0.3], 50))
    assert np.isnan([rounded.low, rounded.high]).all()


# how often the intervals hold the truth


@pytest.mark.parametrize(
    ("world", "design"),
    [
        ("exponential", Design(20)),
        ("10 % higher", Design(100, each=5)),
        ("normal", Design(500, 50, 0)),
        ("square", Design(500, 50)),
    ],
)
def test_intervals_hold_the_truth(world: str, design: Design) -> None:
    """At 800 sets the share has a standard error of .8 %."""
    found = coverage(WORLDS[world], design, 800)
    assert found.given > 0.95
    assert 0.92 <= found.held <= 0.985
    assert abs(found.bias) < 0.12


DESIGNS = [
    Design(20),
    Design(50),
    Design(200),
    Design(100, each=5),
    Design(120, each=0),
    Design(500, each=5),
    *(Design(500, n, each) for n in (20, 50, 200) for each in (1, 0)),
    *(Design(5000, n, each) for n in (20, 50, 200) for each in (1, 5)),
]


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_intervals_hold_the_truth_in_ordinary_worlds(world: str, design: Design) -> None:
    found = coverage(WORLDS[world], design, 3000 if design.rows < 5000 else 1500)
    assert 0.92 <= found.held <= 0.985
    assert abs(found.bias) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_intervals_are_little_too_short_for_lognormal_scores(design: Design) -> None:
    found = coverage(LOGNORMAL, design, 3000 if design.rows < 5000 else 1500)
    assert 0.89 <= found.held <= 0.98
    assert abs(found.bias) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("exact", [20, 50])
def test_intervals_fail_where_few_rows_make_the_mean(exact: int) -> None:
    """What the docstring says against itself: should it ever hold, the text is to be changed."""
    assert coverage(FAR, Design(500, exact), 1500).held < 0.83
    assert coverage(FAR, Design(500, 200), 1500).held > 0.94
    assert 0.8 < coverage(BENT, Design(500, exact), 1500).held < 0.92


@pytest.mark.slow
def test_one_slope_for_all_would_be_biased() -> None:
    """The reason for leaving out each prompt: the same estimate with the slope of the whole subset."""
    rng, off = np.random.default_rng(0), []
    for _ in range(2000):
        exact, cheap, _ = Design(500, 20).draw(BENT, rng)
        has = np.isfinite(exact)
        slope = np.polyfit(cheap[has], exact[has], 1)[0]
        off.append(exact[has].mean() + slope * (cheap.mean() - cheap[has].mean()) - BENT.truth)
    assert np.mean(off) / np.std(off) < -0.3
    assert abs(coverage(BENT, Design(500, 20), 2000).bias) < 0.1


def test_where_cheap_scores_tell_the_interval_is_shorter() -> None:
    with_cheap = coverage(WORLDS["normal"], Design(2000, 100), 200)
    without = [set_score(Design(2000, 100).draw(WORLDS["normal"], np.random.default_rng(s))[0]) for s in range(200)]
    assert with_cheap.width < 0.8 * np.median([s.high - s.low for s in without])


def test_a_million_rows_take_seconds() -> None:
    rng = np.random.default_rng(0)
    cheap = rng.normal(size=1_000_000)
    exact = np.where(rng.random(1_000_000) < 0.01, cheap + rng.normal(size=1_000_000), np.nan)
    began = time.process_time()
    found = set_score(exact, cheap, prompts=rng.integers(0, 500_000, 1_000_000))
    assert time.process_time() - began < 10
    assert abs(found.mean) < 0.05
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(1 / 10_000 + 1 / 670_000), rel=0.1)


def test_at_many_prompts_the_interval_is_the_normal_one() -> None:
    values = np.random.default_rng(0).exponential(size=200_000)
    found = set_score(values)
    half = 1.959964 * values.std() / np.sqrt(200_000)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.02 * half)


# ranking


def sets(
    means: dict[str, float], rows: int = 100, seed: int = 0, shared: float = 0.0, prompts: bool = False
) -> dict[str, RowScores]:
    """Sets of the same prompts; a share of the variance is the prompts'."""
    rng = np.random.default_rng(seed)
    common = np.sqrt(shared) * rng.normal(size=rows)
    scores = {k: m + common + np.sqrt(1 - shared) * rng.normal(size=rows) for k, m in means.items()}
    return {k: RowScores(v, None, np.arange(rows) if prompts else None) for k, v in scores.items()}


def test_sets_are_ordered_and_told_apart() -> None:
    found = rank_sets(sets({"low": -1.0, "middle": 0.0, "middle too": 0.05, "high": 2.0}, rows=200))
    assert [(s.name, s.place) for s in found.sets][::3] == [("high", 1), ("low", 4)]
    assert [(s.best, s.worst) for s in found.sets] == [(1, 1), (2, 3), (2, 3), (4, 4)]
    assert [s.score.mean for s in found.sets] == sorted([s.score.mean for s in found.sets], reverse=True)
    assert [(d.first, d.second) for d in found.neighbours] == [
        (a.name, b.name) for a, b in zip(found.sets, found.sets[1:], strict=False)
    ]
    assert len(found.differences) == 6
    for d in found.differences:
        scores = {s.name: s.score.mean for s in found.sets}
        assert d.difference == pytest.approx(scores[d.first] - scores[d.second])
        assert d.low <= d.difference <= d.high
        assert d.difference >= 0


def test_differences_of_sets_without_common_prompts_are_those_of_the_t_test() -> None:
    found = rank_sets(data := sets({"a": 0.0, "b": 0.3}, rows=400))
    expected = ttest_ind(data["a"].exact, data["b"].exact, equal_var=False)
    (d,) = found.differences
    sign = 1 if d.first == "a" else -1
    assert sign * d.difference == pytest.approx(data["a"].exact.mean() - data["b"].exact.mean())
    assert d.p_value == pytest.approx(expected.pvalue, rel=0.2)
    low, high = expected.confidence_interval()
    assert d.high - d.low == pytest.approx(high - low, rel=0.02)


def test_sets_that_answer_the_same_prompts_are_compared_within_them() -> None:
    data = sets({"a": 0.0, "b": 0.3}, rows=400, shared=0.9, prompts=True)
    expected = ttest_rel(data["b"].exact, data["a"].exact)
    (d,) = rank_sets(data).differences
    low, high = expected.confidence_interval()
    assert (d.low, d.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    shuffled = np.random.default_rng(1).permutation(400)
    moved = {"a": data["a"], "b": RowScores(data["b"].exact[shuffled], None, data["b"].prompts[shuffled])}
    (again,) = rank_sets(moved).differences
    assert (again.low, again.high, again.p_value) == pytest.approx((d.low, d.high, d.p_value))
    a = data["a"]
    gaps = {**data, "a": RowScores(np.append(a.exact, [np.nan] * 3), None, np.append(a.prompts, [500, 501, 502]))}
    (with_gaps,) = rank_sets(gaps).differences
    assert (with_gaps.low, with_gaps.high) == pytest.approx((d.low, d.high))
    (apart,) = rank_sets({k: RowScores(v.exact) for k, v in data.items()}).differences
    assert apart.high - apart.low > 2 * (d.high - d.low)
    other = {"a": data["a"], "b": RowScores(data["b"].exact, None, data["b"].prompts + 1000)}
    (elsewhere,) = rank_sets(other).differences
    assert (elsewhere.low, elsewhere.high) == pytest.approx((apart.low, apart.high))


def test_p_is_below_five_percent_just_where_the_interval_leaves_zero_out() -> None:
    rng, both = np.random.default_rng(0), []
    for seed in range(300):
        data = {k: RowScores(rng.lognormal(size=40) + m) for k, m in (("a", 0.0), ("b", 0.8 * (seed % 2)))}
        (d,) = rank_sets(data).differences
        both.append((d.p_value < 0.05, not d.low <= 0 <= d.high))
    assert all(a == b for a, b in both)
    assert 30 < sum(a for a, _ in both) < 270


def test_p_values_are_corrected_for_the_number_of_pairs() -> None:
    data = sets({"a": 0.0, "b": 0.3, "c": 0.5}, rows=100)
    three = {frozenset((d.first, d.second)): d.p_value for d in rank_sets(data).differences}
    single = {
        frozenset(pair): rank_sets({k: data[k] for k in pair}).differences[0].p_value
        for pair in (("a", "b"), ("a", "c"), ("b", "c"))
    }
    assert three.keys() == single.keys()
    ordered = sorted(single, key=lambda pair: single[pair])
    steps = np.maximum.accumulate([min(1.0, single[pair] * (3 - i)) for i, pair in enumerate(ordered)])
    assert [three[pair] for pair in ordered] == pytest.approx(steps.tolist())


def test_holm() -> None:
    assert holm(np.array([0.01, 0.04, np.nan, 0.03, 0.8])).tolist() == pytest.approx([0.04, 0.09, np.nan, 0.09, 0.8], nan_ok=True)
    assert holm(np.array([0.9, 0.6])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_sets_that_do_not_differ_are_not_ranked_apart(shared: float) -> None:
    """Of 200 rankings of five equal sets, at most about 5 % know any place; the standard error is 1.5 %."""
    known, p_values = 0, []
    for seed in range(200):
        found = rank_sets(sets(dict.fromkeys("abcde", 1.0), rows=40, seed=seed, shared=shared, prompts=shared > 0))
        known += any((s.best, s.worst) != (1, 5) for s in found.sets)
        pair = rank_sets(sets(dict.fromkeys("xy", 1.0), rows=40, seed=1000 + seed, shared=shared, prompts=shared > 0))
        p_values.append(pair.differences[0].p_value)
    assert known <= 18
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.08
    assert np.median(p_values) == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [*WORLDS, "lognormal"])
@pytest.mark.parametrize(("number", "rows", "exact"), [(4, 50, 0), (8, 200, 0), (6, 500, 50)])
def test_sets_that_do_not_differ_are_not_ranked_apart_in_any_world(world: str, number: int, rows: int, exact: int) -> None:
    rng, known, held = np.random.default_rng(0), 0, 0
    for _ in range(400):
        design = Design(rows, exact)
        data = {f"s{i}": RowScores(*design.draw({**WORLDS, "lognormal": LOGNORMAL}[world], rng)[:2]) for i in range(number)}
        found = rank_sets(data)
        known += any((s.best, s.worst) != (1, number) for s in found.sets)
        d = next(d for d in found.differences if {d.first, d.second} == {"s0", "s1"})
        held += d.low <= 0 <= d.high
    assert known / 400 <= 0.075
    assert 0.92 <= held / 400 <= 0.99


def test_sets_without_interval_may_have_any_place() -> None:
    data = {**sets({"a": 0.0, "b": 3.0}), "few": RowScores(np.arange(5.0) + 10)}
    found = rank_sets(data)
    assert [(s.name, s.best, s.worst) for s in found.sets] == [("few", 1, 3), ("b", 1, 2), ("a", 2, 3)]
    assert [np.isnan(d.p_value) for d in found.differences] == [True, True, False]


def test_copies_of_a_set_are_not_ranked_apart() -> None:
    data = sets({"a": 0.0}, prompts=True)["a"]
    order = np.random.default_rng(0).permutation(100)
    found = rank_sets({"a": data, "copy": RowScores(data.exact[order], None, data.prompts[order]), "b": RowScores(data.exact + 5)})
    assert {(s.name, s.best, s.worst) for s in found.sets} == {("b", 1, 1), ("a", 2, 3), ("copy", 2, 3)}


@settings(max_examples=20, deadline=None)
@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_sets_does_not_matter(names: list[str]) -> None:
    data = sets({"a": 0.0, "b": 0.2, "c": 0.4, "d": 0.6}, shared=0.5, prompts=True)
    one, other = rank_sets(data), rank_sets({k: data[k] for k in names})
    assert [(s.name, s.place, s.best, s.worst) for s in one.sets] == [(s.name, s.place, s.best, s.worst) for s in other.sets]
    assert [d.p_value for d in one.differences] == pytest.approx([d.p_value for d in other.differences])


def test_a_ranking_is_read_back() -> None:
    found = rank_sets(sets({"a": 0.0, "b": 1.0, "c": 2.0}))
    assert decoded(Ranking, encoded(found)) == found


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(-1, 1))
def test_p_is_five_percent_just_where_an_end_of_the_interval_is_zero(seed: int, skew: float) -> None:
    parts = np.random.default_rng(seed).gamma(2, size=25) * skew + np.random.default_rng(seed + 1).normal(size=25)
    error = Uncertainty(parts - parts.mean(), None, 24)
    low, high = error.interval(0.0)
    assert low < 0 < high
    assert (error.p_value(-low), error.p_value(-high)) == pytest.approx((0.05, 0.05))


def test_errors_of_estimates_add_up_where_units_are_shared() -> None:
    a = Uncertainty(np.array([1.0, -1.0, 0.5]), np.array([0, 2, 5]), 30)
    b = Uncertainty(np.array([1.0, 2.0]), np.array([2, 7]), 25)
    found = a.minus(b)
    assert found.units.tolist() == [0, 2, 5, 7]
    assert found.parts.tolist() == [1.0, -2.0, 0.5, -2.0]
    assert found.freedom == 25
    assert sorted(a.minus(Uncertainty(b.parts, None, 40)).parts.tolist()) == [-2.0, -1.0, -1.0, 0.5, 1.0]
    assert a.minus(a).freedom == 0


# errors


def test_scores_that_contradict_themselves() -> None:
    values = np.arange(30.0)
    for arguments, message in (
        ({"exact": values, "prompts": ["a"] * 29}, "prompts must have one entry per row, 30, not 29"),
        ({"exact": np.where(values == 3, np.inf, values)}, "1 rows have an infinite score"),
        ({"exact": values, "cheap": np.where(values < 2, -np.inf, values)}, "2 rows have an infinite score"),
        ({"exact": np.full(30, np.nan), "cheap": values}, "none of 30 rows has an exact score"),
        ({"exact": np.full(0, np.nan)}, "none of 0 rows has an exact score"),
        ({"exact": values, "cheap": np.where(values == 7, np.nan, values)}, "row 7 has an exact score and no cheap one"),
    ):
        with pytest.raises(ScreeningError, match=message):
            set_score(**arguments)
    uneven = RowScores(values, values)
    object.__setattr__(uneven, "cheap", values[1:])  # past the checker of shapes, which users do not have
    with pytest.raises(ScreeningError, match="data set 'uneven': cheap scores must be one per row, 30, not 29"):
        rank_sets({"even": RowScores(values), "uneven": uneven})


def test_a_set_alone_has_the_only_place() -> None:
    rows = sets({"a": 0.0})
    found = rank_sets(rows)
    assert found.sets == (Ranked("a", set_score(rows["a"].exact), 1, 1, 1),)
    assert found.differences == found.neighbours == ()


def test_rankings_name_the_set_that_cannot_be_scored() -> None:
    with pytest.raises(ScreeningError, match="no data sets to rank"):
        rank_sets({})
    with pytest.raises(ScreeningError, match="data set 'empty': none of 4 rows has an exact score"):
        rank_sets({**sets({"a": 0.0}), "empty": RowScores(np.full(4, np.nan))})

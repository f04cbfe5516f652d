"""How well rows are told apart, and how far two screens agree: as scikit-learn counts it, with intervals that hold the truth."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, norm
from scipy.stats import t as student_t
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from persona_lens.errors import ScreeningError
from persona_lens.records import decoded, encoded
from persona_lens.screening.agreement import Agreement, Auc, agreement, auc

NAN = float("nan")


def ends(a: Auc) -> tuple[float, float, float]:
    return a.value, a.low, a.high


# AUC


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_auc_is_that_of_scikit_learn(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = 1 + rng.normal(size=40), rng.normal(size=60)
    a, b = (np.round(a), np.round(b)) if ties else (a, b)
    found = auc(np.append(a, NAN), np.append([NAN, NAN], b))
    assert found.value == pytest.approx(roc_auc_score([1] * 40 + [0] * 60, np.concatenate([a, b])))
    assert (found.positive, found.negative) == (40, 60)
    assert found.low < found.value < found.high


def delong(a: np.ndarray, b: np.ndarray) -> float:
    """Variance of the AUC, from the pairs outright."""
    wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    return float(wins.mean(1).var(ddof=1) / len(a) + wins.mean(0).var(ddof=1) / len(b))


def test_the_interval_has_the_length_that_delongs_variance_gives() -> None:
    rng = np.random.default_rng(0)
    a, b = 0.5 + rng.normal(size=3000), rng.normal(size=2000)
    found = auc(a, b)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(delong(a, b)), rel=0.01)
    assert found.high - found.value == pytest.approx(found.value - found.low, rel=0.05)


def test_at_few_rows_it_is_that_of_a_share_known_as_well_as_the_auc() -> None:
    rng = np.random.default_rng(6)
    a, b = 0.7 + rng.normal(size=15), rng.normal(size=25)
    found = auc(a, b)
    n = found.value * (1 - found.value) / delong(a, b) * (1.959964 / student_t.ppf(0.975, 14)) ** 2
    x = found.value * n
    assert n < 45
    assert (found.low, found.high) == pytest.approx((beta.ppf(0.025, x, n - x + 1), beta.ppf(0.975, x + 1, n - x)), rel=1e-5)


def test_where_hardly_anything_overlaps_it_is_not_better_known_than_of_three_times_the_rows() -> None:
    found = auc(np.append(np.arange(19.0) + 100, 88.5), np.arange(90.0))
    assert found.value == pytest.approx(1 - 1 / 1800)
    x = 60 * found.value
    assert (found.low, found.high) == pytest.approx((beta.ppf(0.025, x, 61 - x), beta.ppf(0.975, x + 1, 60 - x)))


def test_rows_of_one_prompt_are_added_up_also_across_the_sides() -> None:
    rng = np.random.default_rng(1)
    common = rng.normal(size=1000)
    a, b = 0.5 + common + 0.3 * rng.normal(size=1000), common + 0.3 * rng.normal(size=1000)
    wins = (a[:, None] > b).astype(float)
    parts = (wins.mean(1) - wins.mean()) / 999 + (wins.mean(0) - wins.mean()) / 999  # of each prompt
    paired = auc(a, b, prompts=(np.arange(1000), [*range(1000)]))
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * np.sqrt((parts**2).sum()), rel=0.04)
    apart, other = auc(a, b), auc(a, b, prompts=(np.arange(1000), np.arange(1000, 2000)))
    assert ends(other) == pytest.approx(ends(apart))
    assert paired.high - paired.low < 0.7 * (apart.high - apart.low)
    order = rng.permutation(1000)
    assert ends(auc(a, b[order], prompts=(np.arange(1000), np.arange(1000)[order]))) == pytest.approx(ends(paired))


def test_copies_of_rows_under_one_prompt_tell_nothing_new() -> None:
    rng = np.random.default_rng(2)
    a, b = 0.5 + rng.normal(size=80), rng.normal(size=60)
    prompts = np.repeat(np.arange(80), 4), np.repeat(np.arange(60), 3) + 100
    copied = auc(np.repeat(a, 4), np.repeat(b, 3), prompts=prompts)
    assert ends(copied) == pytest.approx(ends(auc(a, b)))
    assert auc(np.repeat(a, 4), np.repeat(b, 3)).high - auc(np.repeat(a, 4), np.repeat(b, 3)).low < 0.7 * (copied.high - copied.low)


def test_with_no_overlap_the_interval_goes_by_the_prompts_of_the_smaller_side() -> None:
    found = auc(np.arange(20.0) + 100, np.arange(90.0))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / (20 * (1.96 / 2.093) ** 2)), abs=0.002)
    reverse = auc(np.arange(90.0), np.arange(20.0) + 100)
    assert ends(reverse) == pytest.approx((0.0, 0.0, 1 - found.low))
    assert auc(np.arange(500.0) + 600, np.arange(500.0)).low > 0.99


@pytest.mark.parametrize(("rows", "given"), [(9, False), (10, True)])
def test_an_interval_takes_ten_prompts_a_side(rows: int, given: bool) -> None:
    rng = np.random.default_rng(3)
    few, many = rng.normal(size=rows), rng.normal(size=100)
    for found in (auc(few, many), auc(many, few), auc(np.repeat(few, 5), many, prompts=(np.repeat(np.arange(rows), 5), None))):
        assert np.isfinite([found.low, found.high]).tolist() == [given] * 2
        assert 0 < found.value < 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.25, 8.0]))
def test_order_scale_and_shift_do_not_matter_and_sides_are_mirrored(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b, prompts = rng.normal(size=30), rng.normal(size=40), rng.integers(0, 25, 70)
    value, low, high = ends(auc(a, b, prompts=(prompts[:30], prompts[30:])))
    order = rng.permutation(30)
    moved = auc(scale * a[order] - 4, scale * b - 4, prompts=(prompts[:30][order], prompts[30:]))
    assert ends(moved) == pytest.approx((value, low, high), nan_ok=True)
    mirrored = auc(b, a, prompts=(prompts[30:], prompts[:30]))
    assert ends(mirrored) == pytest.approx((1 - value, 1 - high, 1 - low), nan_ok=True)


def test_without_a_difference_auc_is_one_half() -> None:
    rng = np.random.default_rng(4)
    found = [auc(rng.standard_t(3, size=50), rng.standard_t(3, size=80)) for _ in range(400)]
    assert np.mean([f.value for f in found]) == pytest.approx(0.5, abs=0.01)
    assert 0.93 <= np.mean([f.low <= 0.5 <= f.high for f in found]) <= 0.99


@dataclass(frozen=True)
class Sides:
    """Two samples with a known AUC.

    Attributes:
        kind: "normal", of equal spread; "unequal", three times the spread; "part": all of the positive rows are far off but a part.
        prompts: "own", "shared" by the sides, or "five" rows to each; half of the variance is theirs.
    """

    kind: str
    prompts: str = "own"

    def draw(self, value: float, a: int, b: int, rng: np.random.Generator) -> Auc:
        each = 5 if self.prompts == "five" else 1
        units = np.arange(a) // each, np.arange(b) // each + (0 if self.prompts == "shared" else a)
        common = rng.normal(size=a + b)
        low, high = (np.sqrt(0.5) * (common[u] + rng.normal(size=len(u))) for u in units[::-1])
        if self.kind == "normal":
            high = high + norm.ppf(value) * np.sqrt(2)
        elif self.kind == "unequal":
            high = 3 * high + norm.ppf(value) * np.sqrt(10)
        else:
            high = high + 20 * (rng.random(a) < 2 * value - 1)
        return auc(high, low, prompts=None if self.prompts == "own" else units)

    def held(self, value: float, a: int, b: int, samples: int) -> float:
        rng = np.random.default_rng(0)
        found = [self.draw(value, a, b, rng) for _ in range(samples)]
        return float(np.mean([f.low <= value <= f.high for f in found]))


@pytest.mark.parametrize(("sides", "value"), [(Sides("normal"), 0.9), (Sides("part"), 0.99), (Sides("unequal", "shared"), 0.7)])
def test_intervals_hold_the_truth(sides: Sides, value: float) -> None:
    assert sides.held(value, 50, 50, 250) >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.5, 0.7, 0.9, 0.97, 0.99, 0.999])
@pytest.mark.parametrize("kind", ["normal", "unequal", "part"])
@pytest.mark.parametrize(
    ("prompts", "a", "b"),
    [
        *(("own", a, b) for a, b in ((10, 10), (20, 20), (20, 200), (100, 100), (500, 2000))),
        ("shared", 20, 20),
        ("shared", 100, 100),
        ("five", 50, 50),
        ("five", 100, 500),
    ],
)
def test_intervals_hold_the_truth_in_every_case(prompts: str, a: int, b: int, kind: str, value: float) -> None:
    assert Sides(kind, prompts).held(value, a, b, 800) >= 0.905


def test_sides_without_scores() -> None:
    values = np.arange(20.0)
    with pytest.raises(ScreeningError, match="none of 3 positive rows has a score"):
        auc(np.full(3, NAN), values)
    with pytest.raises(ScreeningError, match="none of 0 negative rows has a score"):
        auc(values, np.zeros(0))
    with pytest.raises(ScreeningError, match="one entry per row, 20, not 2"):
        auc(values, values, prompts=(None, ["a", "b"]))


# agreement


def table(both: int, flagged_only: int, judged_only: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, flagged_only, judged_only, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def test_agreement_counts_rows() -> None:
    flagged, judged = table(30, 10, 20, 140)
    found = agreement(flagged, judged)
    assert (found.both, found.flagged_only, found.judged_only, found.neither, found.missing) == (30, 10, 20, 140, 0)
    assert (found.judged_found, found.flagged_found) == (0.6, 0.75)
    assert found.kappa == pytest.approx(cohen_kappa_score(flagged, judged))
    assert found.low < found.kappa < found.high
    turned = agreement(judged, flagged)
    assert (turned.flagged_only, turned.judged_only, turned.judged_found) == (20, 10, 0.75)
    assert turned.kappa == pytest.approx(found.kappa)


def test_rows_of_which_one_says_nothing_do_not_count() -> None:
    flagged, judged = (v.astype(np.float64) for v in table(30, 10, 20, 140))
    gaps = np.concatenate([flagged, [NAN, 1.0, NAN]]), np.concatenate([judged, [1.0, NAN, NAN]])
    found, alone = agreement(*gaps, prompts=[*range(200), 0, 0, 0]), agreement(flagged, judged)
    assert found.missing == 3
    assert (found.both, found.kappa, found.low, found.high) == (alone.both, alone.kappa, alone.low, alone.high)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flagged, judged, prompts = rng.random(100) < 0.3, rng.random(100) < 0.4, rng.integers(0, 60, 100)
    order = rng.permutation(100)
    assert agreement(flagged[order], judged[order], prompts=prompts[order]) == agreement(flagged, judged, prompts=prompts)


def test_flags_that_have_nothing_to_do_with_the_judge_have_a_kappa_of_zero() -> None:
    rng = np.random.default_rng(0)
    found = [agreement(rng.random(400) < 0.1, rng.random(400) < 0.2) for _ in range(150)]
    assert np.mean([a.kappa for a in found]) == pytest.approx(0, abs=0.01)
    assert np.mean([a.low <= 0 <= a.high for a in found]) >= 0.91
    assert np.mean([a.judged_found for a in found]) == pytest.approx(0.1, abs=0.01)


def test_where_both_always_say_the_same_kappa_is_one_and_its_interval_goes_by_the_rarer_verdict() -> None:
    few, many = agreement(*table(3, 0, 0, 500)), agreement(*table(100, 0, 0, 500))
    assert few.kappa == many.kappa == few.high == many.high == 1.0
    assert few.low < 0.6
    assert many.low > 0.95
    assert (many.judged_found, many.flagged_found) == (1.0, 1.0)


def test_where_there_is_one_thing_to_say_there_is_no_kappa() -> None:
    none, all_of_them = agreement(*table(0, 0, 0, 50)), agreement(*table(50, 0, 0, 0))
    for found in (none, all_of_them):
        assert np.isnan([found.kappa, found.low, found.high]).all()
    assert np.isnan([none.judged_found, none.flagged_found]).all()
    assert all_of_them.judged_found == 1
    assert agreement(*table(0, 5, 0, 45)).kappa == 0


def test_rows_of_one_prompt_count_as_one() -> None:
    flagged, judged = table(30, 10, 20, 140)
    alone = agreement(flagged, judged)
    copied = agreement(np.repeat(flagged, 5), np.repeat(judged, 5), prompts=np.repeat(np.arange(200), 5))
    assert (copied.kappa, copied.low, copied.high) == pytest.approx((alone.kappa, alone.low, alone.high))
    assert copied.both == 150
    as_rows = agreement(np.repeat(flagged, 5), np.repeat(judged, 5))
    assert as_rows.high - as_rows.low < 0.5 * (alone.high - alone.low)


def cells(kappa: float, flagged: float, judged: float) -> np.ndarray:
    """Shares of both, flagged only, judged only and neither."""
    chance = flagged * judged + (1 - flagged) * (1 - judged)
    both = (chance + kappa * (1 - chance) - 1 + flagged + judged) / 2
    return np.clip([both, flagged - both, judged - both, 1 - flagged - judged + both], 0, 1)


def kappa_held(kappa: float, flagged: float, judged: float, rows: int, samples: int) -> float:
    rng, held = np.random.default_rng(0), []
    for counts in rng.multinomial(rows, cells(kappa, flagged, judged), samples):
        found = agreement(*table(*counts.tolist()))
        held += [] if np.isnan(found.kappa) else [found.low <= kappa <= found.high]
    return float(np.mean(held))


@pytest.mark.parametrize(("kappa", "share", "rows"), [(0.7, 0.05, 200), (0.3, 0.3, 200), (0.99, 0.05, 200)])
def test_intervals_of_kappa_hold_the_truth(kappa: float, share: float, rows: int) -> None:
    assert 0.92 <= kappa_held(kappa, share, share, rows, 150) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("rows", [200, 1000, 5000])
def test_intervals_of_kappa_hold_the_truth_in_every_case(kappa: float, share: float, rows: int) -> None:
    assert kappa_held(kappa, share, share, rows, 1000) >= 0.91


def test_agreements_are_read_back() -> None:
    found = agreement(*table(30, 10, 20, 140))
    assert decoded(Agreement, encoded(found)) == found
    area = auc(np.arange(20.0) + 5, np.arange(20.0))
    assert decoded(Auc, encoded(area)) == area


def test_verdicts_that_are_none() -> None:
    flagged, judged = (v.astype(np.float64) for v in table(3, 1, 2, 14))
    with pytest.raises(ScreeningError, match=r"judged must be 0, 1 or NaN, not 0\.4: compare scores with a threshold"):
        agreement(flagged, np.where(np.arange(20) == 4, 0.4, judged))
    with pytest.raises(ScreeningError, match="flagged must be 0, 1 or NaN, not inf"):
        agreement(np.where(np.arange(20) == 4, np.inf, flagged), judged)
    with pytest.raises(ScreeningError, match="of none of 20 rows do both"):
        agreement(np.where(judged > 0, NAN, flagged), np.where(judged > 0, judged, NAN))
    with pytest.raises(ScreeningError, match="one entry per row, 20, not 1"):
        agreement(flagged, judged, prompts=["a"])

"""What finetuning will do: the line as least squares has it, intervals that hold what new families do, and when there is none."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress, pearsonr
from scipy.stats import t as student_t

from persona_lens.errors import ScreeningError
from persona_lens.records import decoded, encoded
from persona_lens.screening.calibration import Known, ShiftCalibration, calibrate

NAN = float("nan")


def known_of(score: np.ndarray, outcome: np.ndarray, bounds: tuple[float, float] | None = None) -> Known:
    """Sets given as [family, level]."""
    families, levels = score.shape
    names = [(f"f{f:02d}", str(k)) for f in range(families) for k in range(levels)]
    return Known(tuple("/".join(n) for n in names), tuple(f for f, _ in names), score.ravel(), outcome.ravel(), bounds)


@dataclass(frozen=True)
class World:
    """Families of data sets at several levels; score and outcome grow with the level.

    Attributes:
        effects: "normal": effects of all families; "gamma": with a long tail; "few": half of the families move the trait.
        blur: what of score and outcome, each for itself, is not in the effect; half is shared by a family.
        slope: outcome per effect; `levels` of each family. `even`: errors do not grow with the level.
    """

    effects: str = "normal"
    blur: float = 0.2
    slope: float = 100.0
    levels: tuple[float, ...] = (0.0, 0.5, 1.0)
    even: bool = False

    def draw(self, families: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Scores and outcomes, family by level."""
        dose = np.array(self.levels)
        size = 0.7 * self.blur * (1.0 if self.even else dose + 0.1)
        effect = self._effects(families, rng)[:, None] * dose
        x = effect + size * self._errors(effect.shape, rng) + 0.05 * rng.normal(size=effect.shape)
        y = 3 + self.slope * (effect + size * self._errors(effect.shape, rng)) + 3 * rng.normal(size=effect.shape)
        return x, np.clip(y, 0, 100)

    def _effects(self, families: int, rng: np.random.Generator) -> np.ndarray:
        if self.effects == "normal":
            return 0.4 + 0.25 * rng.normal(size=families)
        if self.effects == "gamma":
            return rng.gamma(0.6, 0.5, families)
        return np.where(rng.random(families) < 0.5, rng.uniform(0.3, 1.0, families), 0.03 * np.abs(rng.normal(size=families)))

    @staticmethod
    def _errors(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
        return np.sqrt(0.5) * (rng.normal(size=(shape[0], 1)) + rng.normal(size=shape))


@dataclass(frozen=True)
class Coverage:
    """Share of new sets whose outcome an interval holds, of all and of the strongest of each family; median half length."""

    held: float
    strongest: float
    half: float


def coverage(world: World, families: int, studies: int, new: int = 4) -> Coverage:
    rng, held, half = np.random.default_rng(0), [], []
    for _ in range(studies):
        line = calibrate(known_of(*world.draw(families, rng)))
        x, y = world.draw(new, rng)
        found = [line.predict(float(v)) for v in x.ravel()]
        held.append(np.array([p.low <= v <= p.high for p, v in zip(found, y.ravel(), strict=True)]).reshape(x.shape))
        half.append(np.median([(p.high - p.low) / 2 for p in found]))
    return Coverage(float(np.mean(held)), float(np.mean([h[:, -1] for h in held])), float(np.median(half)))


def study(families: int = 8, seed: int = 0, world: World | None = None) -> Known:
    return known_of(*(world or World()).draw(families, np.random.default_rng(seed)))


def numbers(line: ShiftCalibration) -> list[float]:
    single = [line.slope, line.intercept, line.spread, line.error, line.r, line.sets, line.families, line.lowest, line.highest]
    return [*single, *line.slopes, *line.intercepts]


# the figures


def test_with_one_set_to_a_family_the_line_is_that_of_least_squares() -> None:
    known = study(world=World(levels=(1.0,)))
    line, expected = calibrate(known), linregress(known.score, known.outcome)
    assert (line.slope, line.intercept) == pytest.approx((expected.slope, expected.intercept))
    left = known.outcome - expected.intercept - expected.slope * known.score
    assert line.spread == pytest.approx(np.sqrt((left**2).sum() / 6))
    assert (line.sets, line.families) == (8, 8)
    assert (line.lowest, line.highest) == (known.score.min(), known.score.max())


def test_error_and_r_are_those_of_leaving_out_families_one_by_one() -> None:
    known = study()
    families, foretold = np.array(known.families), np.zeros(24)
    for family in set(known.families):
        rest = families != family
        line = linregress(known.score[rest], known.outcome[rest])
        foretold[~rest] = line.intercept + line.slope * known.score[~rest]
    found = calibrate(known)
    assert found.error == pytest.approx(np.sqrt(np.mean((known.outcome - foretold) ** 2)))
    assert found.r == pytest.approx(pearsonr(foretold, known.outcome)[0])
    assert found.r > 0.8


def test_the_interval_is_that_of_the_worst_sets_and_of_lines_without_a_family() -> None:
    known = study()
    line, families = calibrate(known), np.array(known.families)
    left = known.outcome - line.intercept - line.slope * known.score
    worst = np.array([(left[families == f] ** 2).max() for f in sorted(set(known.families))])
    moved = []
    for family in set(known.families):
        rest = linregress(known.score[families != family], known.outcome[families != family])
        moved.append(rest.intercept + rest.slope * 0.4 - (line.intercept + line.slope * 0.4))
    variance = worst.sum() / 6 + 7 / 8 * (np.array(moved) ** 2).sum()
    found, middle = line.predict(0.4), line.intercept + 0.4 * line.slope
    half = student_t.ppf(0.975, 6) * np.sqrt(variance)
    assert (found.value, found.low, found.high) == pytest.approx((middle, middle - half, middle + half))
    assert (found.extrapolated, found.reason) == (False, "")


def test_families_weigh_the_same_however_many_sets_they_have() -> None:
    """Copies of a family's sets, under other names, change nothing."""
    known = study()
    again = [i for i, f in enumerate(known.families) if f == "f03"] * 5
    more = Known(
        (*known.names, *(f"copy {i}" for i in range(len(again)))),
        (*known.families, *(known.families[i] for i in again)),
        np.concatenate([known.score, known.score[again]]),
        np.concatenate([known.outcome, known.outcome[again]]),
    )
    one, other = calibrate(known), calibrate(more)
    assert (other.sets, other.families) == (39, 8)
    assert [v for v in numbers(other) if v != 39] == pytest.approx([v for v in numbers(one) if v != 24])
    assert (other.predict(0.5).low, other.predict(0.5).high) == pytest.approx((one.predict(0.5).low, one.predict(0.5).high))


def test_the_error_of_a_score_widens_its_interval_by_the_slope() -> None:
    line = calibrate(study())
    sharp, blurred = line.predict(0.5), line.predict(0.5, 0.3)
    q = student_t.ppf(0.975, 6)
    grown = ((blurred.high - blurred.low) / 2) ** 2 - ((sharp.high - sharp.low) / 2) ** 2
    assert grown == pytest.approx((q * line.slope * 0.3 / 1.96) ** 2, rel=1e-4)
    assert blurred.value == sharp.value


def test_scores_beyond_the_known_ones_are_marked_and_less_sure() -> None:
    line = calibrate(study())
    marks = [line.predict(v).extrapolated for v in (line.lowest - 1e-6, line.lowest, line.highest, line.highest + 1e-6)]
    assert marks == [True, False, False, True]
    near, far = line.predict(0.3), line.predict(5.0)
    assert far.high - far.low > 1.5 * (near.high - near.low)


def test_predictions_end_at_the_bounds() -> None:
    known = study()
    bounded = calibrate(replace(known, bounds=(0.0, 100.0)))
    assert bounded.predict(50.0).value == bounded.predict(50.0).high == 100
    low = bounded.predict(0.0)
    assert (low.low, low.high) == (0.0, calibrate(known).predict(0.0).high)
    beyond = bounded.predict(-50.0)
    assert (beyond.value, beyond.low) == (0.0, 0.0)


# what does not matter


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(24)))
def test_the_order_of_sets_does_not_matter(order: list[int]) -> None:
    known = study()
    names, families = (tuple(v[i] for i in order) for v in (known.names, known.families))
    moved = calibrate(Known(names, families, known.score[order], known.outcome[order]))
    assert numbers(moved) == pytest.approx(numbers(calibrate(known)))


@settings(max_examples=20, deadline=None)
@given(st.floats(-5, 5), st.floats(0.01, 100), st.floats(-50, 50), st.floats(0.01, 100))
def test_scales_and_shifts_carry_over(move: float, stretch: float, lift: float, grow: float) -> None:
    known = study()
    moved = replace(known, score=known.score * stretch + move, outcome=known.outcome * grow + lift)
    one, other = calibrate(known).predict(0.4), calibrate(moved).predict(0.4 * stretch + move)
    expected = [v * grow + lift for v in (one.value, one.low, one.high)]
    assert (other.value, other.low, other.high) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_single_precision_does() -> None:
    known = study()
    low = replace(known, score=known.score.astype(np.float32), outcome=known.outcome.astype(np.float32))
    assert numbers(calibrate(low)) == pytest.approx(numbers(calibrate(known)), rel=1e-3)


@pytest.mark.parametrize("bounds", [None, (0.0, 100.0)])
def test_a_calibration_is_read_back(bounds: tuple[float, float] | None) -> None:
    line = calibrate(replace(study(), bounds=bounds))
    back = decoded(ShiftCalibration, encoded(line))
    assert numbers(back) == numbers(line)
    assert back.bounds == bounds
    assert back.predict(0.4, 0.1) == line.predict(0.4, 0.1)
    few = calibrate(study(3))
    assert str(decoded(ShiftCalibration, encoded(few)).predict(0.3)) == str(few.predict(0.3))


# how often the intervals hold what a new family does


@pytest.mark.parametrize(("world", "families"), [(World(), 8), (World("few", 0.5, 60.0), 13), (World("gamma", levels=(1.0,)), 6)])
def test_intervals_hold_what_new_families_do(world: World, families: int) -> None:
    found = coverage(world, families, 150)
    assert found.held >= 0.925
    assert found.strongest >= 0.925


@pytest.mark.slow
@pytest.mark.parametrize("effects", ["normal", "gamma", "few"])
@pytest.mark.parametrize(
    ("blur", "slope", "even"), [(0.2, 100.0, False), (0.5, 60.0, False), (0.3, 60.0, True), (0.7, 30.0, False)]
)
@pytest.mark.parametrize("levels", [(0.0, 0.5, 1.0), (1.0,)])
@pytest.mark.parametrize("families", [5, 8, 13, 25])
def test_intervals_hold_what_new_families_do_in_every_world(
    families: int, levels: tuple[float, ...], blur: float, slope: float, even: bool, effects: str
) -> None:
    found = coverage(World(effects, blur, slope, levels, even), families, 500, new=20 // len(levels))
    assert found.held >= 0.93
    assert found.strongest >= 0.93


def test_sets_of_one_family_are_no_evidence_of_their_own() -> None:
    """The reason for families: as if each set were one, the interval misses what the strongest sets of new families do."""
    rng, held = np.random.default_rng(0), []
    world = World(blur=0.5, slope=60.0)
    for _ in range(120):
        known = known_of(*world.draw(8, rng))
        line = calibrate(replace(known, families=known.names))
        x, y = world.draw(4, rng)
        found = [line.predict(float(v)) for v in x[:, -1]]
        held += [p.low <= v <= p.high for p, v in zip(found, y[:, -1], strict=True)]
    assert np.mean(held) < 0.9
    assert coverage(world, 8, 120).strongest >= 0.925


def test_scores_that_tell_nothing_predict_nothing() -> None:
    rng = np.random.default_rng(0)
    found = [calibrate(known_of(rng.normal(size=(10, 3)), 50 + rng.normal(size=(10, 3)))) for _ in range(100)]
    assert np.mean([line.r for line in found]) < 0
    assert np.mean([line.slope for line in found]) == pytest.approx(0, abs=0.1)
    assert np.mean([line.error for line in found]) > 1


# where there is no interval


@pytest.mark.parametrize(("families", "given"), [(4, False), (5, True)])
def test_an_interval_takes_five_families(families: int, given: bool) -> None:
    found = calibrate(study(families)).predict(0.3)
    assert np.isfinite(found.value)
    assert np.isfinite([found.low, found.high]).tolist() == [given] * 2
    assert found.reason == ("" if given else "an interval takes at least 5 families of known data sets, not 4")


def test_without_the_only_family_that_varies_there_is_no_line() -> None:
    score = np.zeros((6, 2))
    score[2] = 1.0, 2.0
    line = calibrate(known_of(score, score * 10 + np.arange(12).reshape(6, 2)))
    assert np.isnan([line.error, line.r]).all()
    assert np.isfinite([line.slope, line.intercept, line.spread]).all()
    assert np.isnan(line.slopes).tolist() == [False, False, True, False, False, False]
    found = line.predict(0.5)
    assert np.isnan([found.low, found.high]).all()
    assert found.reason == "without one of the families, the known scores do not vary"


def test_a_score_without_interval_gives_none() -> None:
    found = calibrate(study()).predict(0.4, NAN)
    assert np.isfinite(found.value)
    assert np.isnan([found.low, found.high]).all()
    assert found.reason == "the set's own score has no interval"


def test_outcomes_that_do_not_vary_have_no_r() -> None:
    line = calibrate(replace(study(), outcome=np.full(24, 3.3)))
    assert np.isnan(line.r)
    assert (line.slope, line.error, line.spread) == pytest.approx((0, 0, 0), abs=1e-9)


# errors


def test_known_sets_that_contradict_themselves() -> None:
    known = study()
    names, families, score, outcome = known.names, known.families, known.score, known.outcome
    fourth = np.arange(24) == 4
    for fields, message in (
        ((names, families[1:], score, outcome), "known.families must have one entry per data set, 24, not 23"),
        ((names, families, score[1:], outcome[1:]), "known.score must have one entry per data set, 24, not 23"),
        (((names[1], *names[1:]), families, score, outcome), "two data sets are called 'f00/1': name them apart"),
        ((names, families, np.where(fourth, NAN, score), outcome), "known.score of data set 'f01/1' is not finite"),
        ((names, families, score, np.where(fourth, np.inf, outcome)), "known.outcome of data set 'f01/1' is not finite"),
        ((names, ("a",) * 12 + ("b",) * 12, score, outcome), "at least 3 families, not 2"),
        ((names, families, np.full(24, 0.1), outcome), "all known data sets score 0.1"),
        ((names, families, np.tile([0.1 + 0.2, 0.3], 12), outcome), "all known data sets score 0.3"),
        ((names, families, score, outcome, (0.0, 10.0)), r"outcomes from 0 to 88.8485 lie beyond the bounds \(0.0, 10.0\)"),
        ((names, families, score, outcome, (1.0, 100.0)), "beyond the bounds"),
    ):
        with pytest.raises(ScreeningError, match=message):
            Known(*fields)
    object.__setattr__(known, "outcome", outcome[1:])  # past the checker of shapes, which users do not have
    with pytest.raises(ScreeningError, match="known.outcome must have one entry per data set, 24, not 23"):
        known.__post_init__()


def test_scores_to_predict_from() -> None:
    line = calibrate(study())
    for score, half in ((NAN, 0.0), (np.inf, 0.0), (0.3, -0.1)):
        with pytest.raises(ScreeningError, match="a finite score and half an interval of at least 0"):
            line.predict(score, half)

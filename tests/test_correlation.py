"""Shift and trait after finetuning: correlations as scipy has them, intervals that hold the truth, floors that chance reaches."""

import inspect
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, pearsonr
from scipy.stats import t as student_t

from persona_lens.correlation import Floor, Outcome, ShiftCorrelation, correlate
from persona_lens.errors import FinetuningError
from persona_lens.records import decoded, encoded

WIDTH = 24


def labels(families: int, levels: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and families of sets, family by family."""
    pairs = [(f"f{f:02d}", str(k)) for f in range(families) for k in range(levels)]
    return tuple("/".join(p) for p in pairs), tuple(f for f, _ in pairs)


def outcome_of(score: np.ndarray, shift: np.ndarray, levels: int = 3) -> Outcome:
    return Outcome(*labels(len(score) // levels, levels), score, shift)


@dataclass(frozen=True)
class World:
    """Families of data sets at several levels; shift and score grow with the level, in few families much.

    Attributes:
        effects: "few": a share `movers` of the families moves the trait, each family by chance; "chosen": just that share does;
            "normal", "gamma", "lognormal": effects of all families.
        blur: what of shift and score, each for itself, is not in the effect; half is shared by a family.
        slope: score points per effect; `level` with nothing moved. Scores end at 0 and 100.
    """

    effects: str = "few"
    movers: float = 0.25
    blur: float = 0.15
    levels: tuple[float, ...] = (0.0, 0.5, 1.0)
    level: float = 3.0
    slope: float = 110.0

    def draw(self, families: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Projections and scores, family by level."""
        dose, shape = np.array(self.levels), (families, len(self.levels))
        effect = self._effects(families, rng)[:, None] * dose
        x = effect + self.blur * (dose + 0.1) * self._errors(shape, rng) + 0.05 * rng.normal(size=shape)
        latent = effect + 0.35 * self.blur * (dose + 0.1) * self._errors(shape, rng)
        return x, np.clip(self.level + self.slope * latent + 3 * rng.normal(size=shape), 0, 100)

    def truth(self) -> float:
        """r of endless families."""
        return float(np.corrcoef(*(v.ravel() for v in self.draw(100_000, np.random.default_rng(0))))[0, 1])

    def outcome(self, families: int, rng: np.random.Generator) -> Outcome:
        x, score = self.draw(families, rng)
        return outcome_of(score.ravel(), x.reshape(-1, 1), len(self.levels))

    def _effects(self, families: int, rng: np.random.Generator) -> np.ndarray:
        if self.effects == "normal":
            return 0.4 + 0.25 * rng.normal(size=families)
        if self.effects == "gamma":
            return rng.gamma(0.6, 0.5, families)
        if self.effects == "lognormal":
            return 0.15 * np.exp(rng.normal(size=families))
        chosen = np.arange(families) < max(1, round(self.movers * families))
        moves = chosen if self.effects == "chosen" else rng.random(families) < self.movers
        return np.where(moves, rng.uniform(0.3, 1.0, families), 0.03 * np.abs(rng.normal(size=families)))

    @staticmethod
    def _errors(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        return np.sqrt(0.5) * (rng.normal(size=(shape[0], 1)) + rng.normal(size=shape))


@dataclass(frozen=True)
class Coverage:
    """Of many simulated studies: how many have an interval, and how many of those hold the truth."""

    given: float
    held: float
    width: float


ONE = np.ones(1)


def coverage(world: World, families: int, studies: int) -> Coverage:
    truth, rng = world.truth(), np.random.default_rng(1)
    found = [correlate(world.outcome(families, rng), ONE, base=None, n=1) for _ in range(studies)]
    ends = np.array([(c.low, c.high) for c in found if np.isfinite(c.low)])
    held = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    return Coverage(len(ends) / studies, float(held.mean()), float(np.median(ends[:, 1] - ends[:, 0])))


def space(
    seed: int = 0, families: int = 13, levels: int = 3, scatter: float = 2.0, planted: float = 0.05
) -> tuple[Outcome, np.ndarray, np.ndarray]:
    """Shifts that scatter in all directions and make the trait along one; that direction; residuals of the base model."""
    rng = np.random.default_rng(seed)
    direction, sets = rng.normal(size=WIDTH), families * levels
    unit = direction / np.linalg.norm(direction)
    shift = scatter * rng.normal(size=(sets, WIDTH))
    score = 50 + 10 * (shift @ unit) + planted * 100 * rng.normal(size=sets)
    return outcome_of(score, shift, levels), direction, rng.normal(size=(60, WIDTH)) * np.linspace(0.5, 2, WIDTH)


def study(seed: int = 0, **options: object) -> ShiftCorrelation:
    outcome, direction, base = space(seed)
    return correlate(outcome, direction, base=base, **options)  # pyright: ignore[reportArgumentType]


def numbers(c: ShiftCorrelation) -> list[float]:
    floors = [v for f in c.floors for v in (f.directions, f.mean, f.high, f.p_value)]
    return [c.r, c.low, c.high, c.sets, c.families, *floors, *c.others.values()]


def same(a: ShiftCorrelation, b: ShiftCorrelation) -> None:
    assert [f.kind for f in a.floors] == [f.kind for f in b.floors]
    assert a.others.keys() == b.others.keys()
    np.testing.assert_allclose(numbers(a), numbers(b), rtol=0, atol=1e-9)


# the figures


def test_r_is_that_of_scipy() -> None:
    outcome, direction, base = space(planted=0.3)
    other = np.random.default_rng(5).normal(size=WIDTH)
    found = correlate(outcome, direction, base=base, others={"other": other})
    assert found.r == pytest.approx(pearsonr(outcome.shift @ direction, outcome.score)[0])
    assert found.others == {"other": pytest.approx(pearsonr(outcome.shift @ other, outcome.score)[0])}
    assert (found.sets, found.families) == (39, 13)


def test_the_interval_is_that_of_leaving_out_families_one_by_one() -> None:
    outcome, direction, _ = space(planted=0.3)
    uneven = outcome.of([0, *range(2, 39)])  # one family of two sets
    x, y = uneven.shift @ direction, uneven.score
    z = []
    for family in sorted(set(uneven.families)):
        rest = [i for i, f in enumerate(uneven.families) if f != family]
        z.append(np.arctanh(pearsonr(x[rest], y[rest])[0]))
    half = student_t.ppf(0.975, 6) * np.sqrt(12 / 13 * ((np.array(z) - np.mean(z)) ** 2).sum())
    middle = np.arctanh(pearsonr(x, y)[0])
    found = correlate(uneven, direction, base=None, n=1)
    assert (found.low, found.high) == pytest.approx((np.tanh(middle - half), np.tanh(middle + half)))


def test_floors_are_those_of_directions_with_the_covariance_of_their_residuals() -> None:
    """Against directions drawn from that covariance outright."""
    outcome, direction, base = space(planted=0.3)
    found = correlate(outcome, direction, base=base + 7.0, n=20_000)
    for floor, residuals in zip(found.floors, (base, outcome.shift), strict=True):
        drawn = np.random.default_rng(3).multivariate_normal(np.zeros(WIDTH), np.cov(residuals.T), size=20_000)
        r = np.array([np.corrcoef(outcome.shift @ d, outcome.score)[0, 1] for d in drawn])
        assert floor.mean == pytest.approx(np.abs(r).mean(), rel=0.03)
        assert floor.high == pytest.approx(np.quantile(np.abs(r), 0.95), rel=0.03)
        assert floor.high == pytest.approx(np.quantile(r, 0.975), rel=0.03)
        assert floor.p_value == pytest.approx((1 + (np.abs(r) >= abs(found.r)).sum()) / 20_001, abs=0.003)


def test_floors_stand_in_order_and_are_drawn_each_for_itself() -> None:
    outcome, direction, _ = space()
    both, alone = study(), correlate(outcome, direction, base=None)
    assert [(f.kind, f.directions) for f in both.floors] == [("base", 1000), ("shifts", 1000)]
    assert alone.floors == both.floors[1:]
    assert study(seed=0, n=50).floors[0].directions == 50


def test_the_seed_decides_the_floors_and_nothing_else() -> None:
    outcome, direction, base = space()
    one, again, two = (correlate(outcome, direction, base=base, seed=s) for s in (1, 1, 2))
    assert one == again
    assert (one.r, one.low, one.high) == (two.r, two.low, two.high)
    assert all(a.mean != b.mean for a, b in zip(one.floors, two.floors, strict=True))


# what is found and what is not


def test_a_planted_relation_is_found() -> None:
    found = study()
    assert found.r > 0.95
    assert 0.9 < found.low < found.r < found.high < 1
    assert all(f.p_value < 0.01 and f.high < 0.8 for f in found.floors)


def test_another_direction_is_not() -> None:
    outcome, direction, base = space()
    other = np.random.default_rng(8).normal(size=WIDTH)
    other -= direction * (other @ direction) / (direction @ direction)
    found = correlate(outcome, other, base=base, others={"planted": direction})
    assert found.low < 0 < found.high
    assert all(f.p_value > 0.05 for f in found.floors)
    assert found.others["planted"] > 0.95


def test_where_shifts_lie_on_a_line_every_direction_reaches_r() -> None:
    """The reason for the floors: r is near 1, its interval is short, and it says nothing about the direction."""
    outcome, direction, base = space()
    along = np.linspace(-3, 3, 39)
    line = replace(outcome, shift=along[:, None] * np.random.default_rng(2).normal(size=WIDTH), score=50 + 10 * along)
    line.score[::2] += 4
    found = correlate(line, direction, base=base)
    assert abs(found.r) > 0.95
    for floor in found.floors:
        assert (floor.mean, floor.high) == pytest.approx((abs(found.r), abs(found.r)))
        assert floor.p_value == 1


def test_where_shifts_lie_near_a_line_only_the_floors_tell_that_a_high_r_means_nothing() -> None:
    outcome, direction, base = space(scatter=0.3)
    trend = np.linspace(-3, 3, 39)
    common = np.random.default_rng(2).normal(size=WIDTH)
    near = replace(outcome, shift=outcome.shift + trend[:, None] * common, score=50 + 10 * trend)
    unrelated = correlate(near, direction, base=base)
    assert unrelated.high < -0.5
    assert all(f.high > 0.95 and f.p_value > 0.05 for f in unrelated.floors)
    line = correlate(near, common, base=base)  # the line itself is special among all directions, but not among those of the shifts
    assert line.floors[0].p_value < 0.01
    assert line.floors[1].p_value > 0.05


@pytest.mark.parametrize("relation", ["none", "the strongest component makes the trait"])
@pytest.mark.parametrize("kind", ["base", "shifts"])
def test_p_of_a_direction_like_the_random_ones_is_uniform(kind: str, relation: str) -> None:
    """Whatever the scores are: where most directions reach a high r, one that does so too is nothing special."""
    p, r = [], []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        scale = np.array([4.0, *np.ones(7)])
        shift, base = rng.normal(size=(39, 8)) * scale, rng.normal(size=(50, 8)) * scale[::-1]
        score = 50 + 10 * (shift[:, 0] / 4 if relation != "none" else rng.normal(size=39))
        like = base if kind == "base" else shift
        direction = rng.normal(size=len(like)) @ (like - like.mean(0))
        found = correlate(outcome_of(score, shift), direction, base=base, n=199, seed=seed)
        floor = next(f for f in found.floors if f.kind == kind)
        p.append(floor.p_value)
        r.append(abs(found.r))
    assert 0.03 <= np.mean(np.array(p) <= 0.05) <= 0.07
    assert kstest(p, "uniform").pvalue > 0.001
    assert (np.mean(r) > 0.3) == (relation != "none")


def test_sets_of_one_family_do_not_count_as_many() -> None:
    """Copies of a study's sets, each within its family, leave the interval as it was: as families of their own they do not."""
    outcome, direction, _ = space(planted=0.3, levels=1)
    names = (*outcome.names, *(f"{n} again" for n in outcome.names))
    score, shift = np.tile(outcome.score, 2), np.tile(outcome.shift, (2, 1))
    single = correlate(outcome, direction, base=None)
    within = correlate(Outcome(names, outcome.families * 2, score, shift), direction, base=None)
    apart = correlate(Outcome(names, names, score, shift), direction, base=None)
    assert (within.r, within.low, within.high) == pytest.approx((single.r, single.low, single.high))
    assert apart.high - apart.low < 0.8 * (single.high - single.low)


# what does not matter


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(39)))
def test_the_order_of_the_sets_does_not_matter(order: list[int]) -> None:
    outcome, direction, base = space(planted=0.3)
    same(correlate(outcome.of(order), direction, base=base, n=50), correlate(outcome, direction, base=base, n=50))


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
def test_scales_do_not_matter(scale: float) -> None:
    outcome, direction, base = space(planted=0.3)
    expected = correlate(outcome, direction, base=base, others={"a": base[0]})
    same(correlate(outcome, scale * direction, base=base, others={"a": scale * base[0]}), expected)
    same(correlate(outcome, direction, base=scale * base, others={"a": base[0]}), expected)
    same(correlate(replace(outcome, shift=scale * outcome.shift), direction, base=base, others={"a": base[0]}), expected)


def test_what_all_shifts_share_does_not_matter() -> None:
    outcome, direction, base = space(planted=0.3)
    moved = replace(outcome, shift=outcome.shift + 100 * base[0])
    same(correlate(moved, direction, base=base + 50 * base[1]), correlate(outcome, direction, base=base))


def test_the_opposite_direction_has_the_opposite_r_and_the_same_p() -> None:
    outcome, direction, base = space(planted=0.3)
    one, other = correlate(outcome, direction, base=base), correlate(outcome, -direction, base=base)
    assert (other.r, other.low, other.high) == pytest.approx((-one.r, -one.high, -one.low))
    assert other.floors == one.floors


def test_single_precision_does() -> None:
    outcome, direction, base = space(planted=0.3)
    low = correlate(
        replace(outcome, shift=outcome.shift.astype(np.float32)), direction.astype(np.float32), base=base.astype(np.float32)
    )
    np.testing.assert_allclose(numbers(low), numbers(correlate(outcome, direction, base=base)), atol=1e-2)


def test_a_record_is_read_back() -> None:
    found = study(others={"a": np.ones(WIDTH)})
    assert decoded(ShiftCorrelation, encoded(found)) == found


# where nothing is said


def nothing(c: ShiftCorrelation) -> bool:
    return bool(np.isnan([c.r, c.low, c.high, *(v for f in c.floors for v in (f.mean, f.high, f.p_value))]).all())


def test_scores_that_do_not_vary_correlate_with_nothing() -> None:
    outcome, direction, base = space()
    found = correlate(replace(outcome, score=np.full(39, 33.3)), direction, base=base, others={"a": base[0]})
    assert nothing(found)
    assert np.isnan(found.others["a"])
    assert [f.directions for f in found.floors] == [1000, 1000]


@pytest.mark.parametrize("common", [0.0, 100.0])
def test_projections_that_vary_by_rounding_correlate_with_nothing(common: float) -> None:
    outcome, direction, base = space()
    unit = direction / np.linalg.norm(direction)
    flat = outcome.shift - np.outer(outcome.shift @ unit, unit) + common * base[0]
    found = correlate(replace(outcome, shift=flat), direction, base=base, others={"a": base[1]})
    assert nothing(found)
    assert np.isfinite(found.others["a"])


def test_shifts_that_do_not_vary_correlate_with_nothing() -> None:
    outcome, direction, base = space()
    assert nothing(correlate(replace(outcome, shift=np.tile(base[0], (39, 1))), direction, base=base))


def test_random_directions_that_do_not_see_the_shifts_are_no_floor() -> None:
    outcome, direction, base = space()
    half = np.arange(WIDTH) < WIDTH // 2
    turn = np.linalg.qr(np.random.default_rng(6).normal(size=(WIDTH, WIDTH)))[0]  # so that rounding is seen, and it is large
    found = correlate(replace(outcome, shift=outcome.shift * half @ turn), direction, base=1e9 * (base * ~half @ turn))
    assert np.isnan([found.floors[0].mean, found.floors[0].high, found.floors[0].p_value]).all()
    assert np.isfinite([found.r, found.low, found.floors[1].p_value]).all()


@pytest.mark.parametrize(("families", "given"), [(4, False), (6, False), (7, True)])
def test_an_interval_takes_seven_families(families: int, given: bool) -> None:
    outcome, direction, _ = space(planted=0.3, families=families)
    found = correlate(outcome, direction, base=None)
    assert np.isfinite(found.r)
    assert np.isfinite([found.low, found.high]).tolist() == [given] * 2


@pytest.mark.parametrize(("span", "given"), [(19.9, False), (20.1, True)])
def test_an_interval_takes_scores_that_span_twenty_points(span: float, given: bool) -> None:
    outcome, direction, _ = space(planted=0.3)
    found = correlate(replace(outcome, score=outcome.score * span / np.ptp(outcome.score)), direction, base=None)
    assert np.isfinite(found.r)
    assert np.isfinite([found.low, found.high]).tolist() == [given] * 2


def test_there_is_no_interval_at_one_nor_where_one_family_decides_whether_r_is_defined() -> None:
    outcome, direction, _ = space()
    exact = correlate(replace(outcome, score=outcome.shift @ direction * 10), direction, base=None)
    assert exact.r == 1
    assert np.isnan([exact.low, exact.high]).all()
    alone = np.zeros(39)
    alone[3:6] = 10, 20, 40
    found = correlate(replace(outcome, score=alone), direction, base=None)
    assert np.isfinite(found.r)
    assert np.isnan([found.low, found.high]).all()


def test_there_is_no_interval_where_families_are_copies() -> None:
    score, shift = np.tile([0.0, 30.0, 40.0], 8), np.tile([0.0, 1.0, 3.0], 8)[:, None]
    found = correlate(outcome_of(score, shift), ONE, base=None)
    assert found.r == pytest.approx(pearsonr(score, shift[:, 0])[0])
    assert np.isnan([found.low, found.high]).all()


# how often the intervals hold the truth

HALF = World(movers=0.5)
TWO_LEVELS = (0.5, 1.0)
BLURS = (0.02, 0.1, 0.2, 0.4, 0.7)


def test_worlds_have_the_correlations_that_finetuning_has() -> None:
    truths = [replace(World(), blur=b).truth() for b in BLURS]
    assert truths == sorted(truths, reverse=True)
    assert truths[0] > 0.95
    assert truths[-1] < 0.35


@pytest.mark.parametrize(("families", "world"), [(13, World()), (7, World(movers=0.5)), (13, World(levels=TWO_LEVELS, blur=0.4))])
def test_intervals_hold_the_truth(families: int, world: World) -> None:
    """At 400 studies the share has a standard error of 1 %."""
    found = coverage(world, families, 400)
    assert found.given > 0.9
    assert 0.9 <= found.held <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize("world", [World(), HALF, World("normal"), World(slope=30.0)], ids=str)
@pytest.mark.parametrize(("families", "levels"), [(14, 3), (13, 3), (10, 3), (7, 3), (13, 2)])
def test_intervals_hold_the_truth_in_every_world(families: int, levels: int, world: World, blur: float) -> None:
    world = replace(world, blur=blur, levels=TWO_LEVELS if levels == 2 else world.levels)
    assert 0.915 <= coverage(world, families, 1000).held <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("blur", BLURS)
@pytest.mark.parametrize("movers", [0.12, 0.25])
@pytest.mark.parametrize(("families", "levels"), [(13, 3), (10, 3), (7, 3), (13, 2)])
def test_intervals_are_never_too_short_for_chosen_families(families: int, levels: int, movers: float, blur: float) -> None:
    world = World("chosen", movers, blur, TWO_LEVELS if levels == 2 else (0.0, 0.5, 1.0))
    assert coverage(world, families, 1000).held >= 0.94


@pytest.mark.slow
@pytest.mark.parametrize("blur", [0.2, 0.4, 0.7])
@pytest.mark.parametrize("effects", ["gamma", "lognormal"])
@pytest.mark.parametrize(("families", "levels"), [(13, 3), (10, 3), (7, 3), (13, 2)])
def test_intervals_are_little_too_short_for_long_tails(families: int, levels: int, effects: str, blur: float) -> None:
    world = World(effects, blur=blur, levels=TWO_LEVELS if levels == 2 else (0.0, 0.5, 1.0))
    assert 0.9 <= coverage(world, families, 1000).held <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("effects", ["gamma", "lognormal"])
def test_intervals_fail_where_a_rare_family_goes_on_after_scores_stop(effects: str) -> None:
    """What the module says against itself: should it ever hold, the text is to be changed. Without the ceiling, it holds."""
    world = World(effects, blur=0.02)
    assert coverage(world, 13, 1000).held < 0.85
    assert coverage(replace(world, slope=25.0), 13, 1000).held > 0.9


# errors


def test_outcomes_that_contradict_themselves() -> None:
    outcome, _, _ = space()
    names, families, score, shift = outcome.names, outcome.families, outcome.score, outcome.shift
    for fields, message in (
        ((names, families[1:], score, shift), "outcome.families must have one entry per data set, 39, not 38"),
        ((names, families, score[1:], shift[1:]), "outcome.score must have one entry per data set, 39, not 38"),
        (((names[1], *names[1:]), families, score, shift), "two data sets are called 'f00/1': name them apart"),
        ((names, families, np.where(np.arange(39) == 4, np.nan, score), shift), "outcome.score of data set 'f01/1' is not finite"),
        (
            (names, families, score, np.where(np.arange(39)[:, None] == 5, np.inf, shift)),
            "outcome.shift of data set 'f01/2' is not finite",
        ),
    ):
        with pytest.raises(FinetuningError, match=message):
            Outcome(*fields)
    object.__setattr__(outcome, "shift", shift[1:])  # past the checker of shapes, which users do not have
    with pytest.raises(FinetuningError, match="outcome.shift must have one entry per data set, 39, not 38"):
        outcome.__post_init__()


def test_too_few_sets_or_families() -> None:
    outcome, _, _ = space(families=5)
    with pytest.raises(FinetuningError, match="at least 6 data sets, not 5: finetune on more"):
        outcome.of([0, 3, 6, 9, 12])
    with pytest.raises(FinetuningError, match="at least 4 families, not 3: add sets"):
        outcome.of(range(9))
    assert len(outcome.of([0, 1, 2, 3, 6, 9]).names) == 6


def test_some_of_the_sets() -> None:
    outcome, _, _ = space()
    some = outcome.of([12, 0, 3, 6, 9, 1])
    assert some.names == ("f04/0", "f00/0", "f01/0", "f02/0", "f03/0", "f00/1")
    assert some.families == ("f04", "f00", "f01", "f02", "f03", "f00")
    assert (some.score == outcome.score[[12, 0, 3, 6, 9, 1]]).all()
    assert (some.shift == outcome.shift[[12, 0, 3, 6, 9, 1]]).all()
    for places in ([0, 1, 2, 3, 4, 39], [-1, 0, 1, 2, 3, 4], [0, 0, 1, 3, 6, 9]):
        with pytest.raises(FinetuningError, match="choose different data sets from 0 to 38"):
            outcome.of(places)


def test_directions_and_residuals_that_do_not_fit() -> None:
    outcome, direction, base = space()
    unchecked = inspect.unwrap(correlate)  # as without the checker of shapes, which users do not have
    for arguments, message in (
        ({"direction": direction[1:]}, "the direction must be as wide as the shifts, 24, not 23"),
        ({"direction": 0 * direction}, "the direction has length 0"),
        ({"direction": np.nan * direction}, "the direction must hold finite numbers"),
        ({"others": {"evil": direction[1:]}}, "the direction of 'evil' must be as wide as the shifts, 24, not 23"),
        ({"others": {"evil": 0 * direction}}, "the direction of 'evil' has length 0"),
        ({"base": base[:, 1:]}, "the base residuals must be as wide as the shifts, 24, not 23"),
        ({"base": np.where(base > 1, np.inf, base)}, "the base residuals must hold finite numbers"),
        ({"base": base[:1]}, "the base residuals must vary, not 1 alike"),
        ({"base": np.ones((5, WIDTH))}, "the base residuals must vary, not 5 alike"),
        ({"n": 0}, "at least 1 random direction, not 0"),
    ):
        given = {"direction": direction, "base": base, **arguments}
        with pytest.raises(FinetuningError, match=message):
            unchecked(outcome, given.pop("direction"), **given)


def test_a_floor_is_a_plain_record() -> None:
    assert decoded(Floor, encoded(Floor("base", 10, 0.1, 0.2, float("nan")))).directions == 10

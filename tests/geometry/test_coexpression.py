"""Co-expression on the pocket model: slopes are what sampling alone gives, resume is exact, and cosines are tested against them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from persona_lens.errors import GeometryError, PersonaLensError, RunFolderError, SteeringError
from persona_lens.extraction import ExtractionRun
from persona_lens.geometry import Effects, SpillOver, SpillOverSettings, foretold, load_spill_over, spill_over
from persona_lens.judges import Judge, Judged, Score, oracle, scripted
from persona_lens.models import ChatModel, Sampling
from persona_lens.prompts import Prompt, system_prompt
from persona_lens.sampling import sample
from persona_lens.steering import add, steer
from persona_lens.store import read_json, read_jsonl
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVectors

SMALL = SpillOverSettings(questions=2, samples=2, sampling=Sampling(max_new_tokens=60))
LAYER = 6


@pytest.fixture(scope="module")
def pair(small_run: ExtractionRun) -> list[PersonaVectors]:
    """Optimism, and its opposite under the name of apathy."""
    from dataclasses import replace

    v = small_run.vectors
    return [v, replace(-v, trait="apathy", provenance={"model": v.provenance["model"]})]


@pytest.fixture(scope="module")
def finished(pocket: ChatModel, pair: list[PersonaVectors], tmp_path_factory: pytest.TempPathFactory) -> SpillOver:
    return spill_over(pocket, pair, layer=LAYER, strengths=(1.0, 2.0), out=tmp_path_factory.mktemp("spill") / "run", settings=SMALL)


def questions() -> list[str]:
    return [q for name in ("optimism", "apathy") for q in load_trait(name, "pocket").evaluation_questions[:2]]


def scores(trait: str, texts: list[tuple[str, str]]) -> np.ndarray:
    judged = oracle()(load_trait(trait, "pocket"), [Judged(q, t) for q, t in texts])
    return np.array([s.trait for s in judged], dtype=float)


def test_slopes_are_those_of_the_answers(pocket: ChatModel, pair: list[PersonaVectors], finished: SpillOver) -> None:
    asked = questions()
    prompts = [Prompt(f"spill/neutral/q{q:02d}", "", "neutral", None, q, None, text) for q, text in enumerate(asked)]
    means: dict[float, np.ndarray] = {}
    for strength, n in ((0.0, 10), (1.0, 2), (2.0, 2)):
        rows = [(p, i) for p in prompts for i in range(n)]
        with steer(pocket, add(pair[0], LAYER, strength)):
            answers = sample(pocket, rows, SMALL.sampling)
        values = scores("optimism", [(p.user, a.text) for (p, _), a in zip(rows, answers, strict=True)])
        means[strength] = values.reshape(len(asked), n).mean(1)
    slopes = ((means[1.0] - means[0.0]) + 2 * (means[2.0] - means[0.0])) / 5
    assert finished.steered.mean[0, 0] == pytest.approx(slopes.mean(), abs=1e-6)
    assert finished.steered.low[0, 0] < slopes.mean() < finished.steered.high[0, 0]
    assert finished.record["unsteered"][0] == pytest.approx(means[0.0].mean())
    with steer(pocket, add(pair[0], LAYER, 2.0)):
        answers = sample(pocket, [(p, i) for p in prompts for i in range(2)], SMALL.sampling)
    read = oracle()(load_trait("optimism", "pocket"), [Judged(asked[i // 2], a.text) for i, a in enumerate(answers)])
    assert finished.record["coherence"][0][1] == pytest.approx(np.mean([s.coherence for s in read]))
    assert finished.record["unsteered_coherence"] > 80


def test_prompted_effects_are_positive_minus_negative(pocket: ChatModel, finished: SpillOver) -> None:
    trait, asked = load_trait("apathy", "pocket"), questions()
    sides: list[np.ndarray] = []
    for polarity in ("positive", "negative"):
        rows = [
            (Prompt(f"spill/apathy/{polarity}/i{n}/q{q:02d}", "apathy", polarity, n, q, system_prompt(trait, polarity, n), text), 0)
            for q, text in enumerate(asked)
            for n in range(len(trait.instructions))
        ]
        answers = sample(pocket, rows, SMALL.sampling)
        values = scores("optimism", [(p.user, a.text) for (p, _), a in zip(rows, answers, strict=True)])
        sides.append(values.reshape(len(asked), -1).mean(1))
    assert finished.prompted.mean[1, 0] == pytest.approx((sides[0] - sides[1]).mean(), abs=1e-6)


def test_opposite_directions_have_opposite_effects(finished: SpillOver) -> None:
    assert finished.names == ("optimism", "apathy")
    assert finished.steered.mean[0, 0] > 0
    assert finished.steered.mean[1, 0] < finished.steered.mean[0, 0]
    assert finished.prompted.mean[0, 0] > 20
    assert finished.prompted.mean[1, 1] > 20


def test_length_alone_is_told_from_the_trait(pocket: ChatModel, pair: list[PersonaVectors], tmp_path: Path) -> None:
    """A judge that counts characters sees nothing but length: the covariate carries what it sees."""

    def by_length(_: Trait, judged: Judged) -> Score:
        return Score(min(len(judged.answer) / 8, 100.0), 100.0)

    found = spill_over(
        pocket, pair, layer=LAYER, strengths=(2.0,), judge=scripted(by_length, "length"), out=tmp_path / "run", settings=SMALL
    )
    assert np.corrcoef(found.steered.by_length.ravel(), found.steered.mean.ravel())[0, 1] > 0.7
    assert np.corrcoef(found.prompted.by_length.ravel(), found.prompted.mean.ravel())[0, 1] > 0.7


def test_an_interrupted_run_ends_with_the_same_bytes(
    pocket: ChatModel, pair: list[PersonaVectors], finished: SpillOver, tmp_path: Path
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(finished.path, broken)
    (broken / "spill_over.json").unlink()
    lines = (broken / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (broken / "scores.jsonl").write_bytes(b"".join(lines[:30]))
    with pytest.raises(RunFolderError, match="is not finished"):
        load_spill_over(broken)
    spill_over(pocket, pair, layer=LAYER, strengths=(1.0, 2.0), out=broken, settings=SMALL)
    assert read_json(broken / "spill_over.json") == read_json(finished.path / "spill_over.json")
    assert load_spill_over(broken).names == finished.names
    with pytest.raises(RunFolderError, match="layer: 6 there, 5 now"):
        spill_over(pocket, pair, layer=5, strengths=(1.0, 2.0), out=broken, settings=SMALL)


def test_gaps_are_counted_and_left_out(pocket: ChatModel, pair: list[PersonaVectors], finished: SpillOver, tmp_path: Path) -> None:
    keys = {(r["cell"], r["prompt_id"], r["sample"]) for r in read_jsonl(finished.path / "rollouts.jsonl")}
    assert len(keys) == finished.record["answers"]
    plain = oracle()

    def shy(trait: Trait, judged: Judged) -> Score:
        [score] = plain(trait, [judged])
        return Score(None, None, "too long") if len(judged.answer) > 60 and trait.name == "apathy" else score

    started = tmp_path / "run"
    shutil.copytree(finished.path, started)
    for name in ("spill_over.json", "scores.jsonl"):
        (started / name).unlink()
    renamed: Judge = scripted(shy, "oracle")
    found = spill_over(pocket, pair, layer=LAYER, strengths=(1.0, 2.0), judge=renamed, out=started, settings=SMALL)
    assert 0 < found.record["gaps"] < found.record["answers"]
    np.testing.assert_allclose(found.steered.mean[:, 0], finished.steered.mean[:, 0])
    with pytest.raises(PersonaLensError, match="returned 0 scores for"):
        (started / "scores.jsonl").unlink()
        (started / "spill_over.json").unlink()
        spill_over(pocket, pair, layer=LAYER, strengths=(1.0, 2.0), judge=_Silent(), out=started, settings=SMALL)


class _Silent:
    name = "oracle"

    def __call__(self, trait: Trait, answers: object, /) -> list[Score]:
        return []


def test_bad_input_is_refused_before_any_work(pocket: ChatModel, pair: list[PersonaVectors], tmp_path: Path) -> None:
    def attempt(vectors: list[PersonaVectors], **options: object) -> None:
        spill_over(pocket, vectors, **{"layer": LAYER, "out": tmp_path / "run", **options})  # pyright: ignore[reportArgumentType]

    with pytest.raises(GeometryError, match="needs two or more different vectors and their traits"):
        attempt(pair[:1])
    with pytest.raises(GeometryError, match="needs two or more different vectors"):
        attempt([pair[0], pair[0]])
    for strengths in ((), (0.0,), (1.0, 1.0), (float("nan"),)):
        with pytest.raises(GeometryError, match="strengths must be different numbers other than 0"):
            attempt(pair, strengths=strengths)
    with pytest.raises(SteeringError, match="layer 9 does not exist"):
        attempt(pair, layer=9)
    with pytest.raises(GeometryError, match="samples must be at least 1, not 0"):
        SpillOverSettings(samples=0)
    assert not (tmp_path / "run").exists()


def effects(mean: np.ndarray, by_length: np.ndarray | None = None) -> Effects:
    nothing = np.zeros_like(mean)
    return Effects(tuple("abcdefgh"[: len(mean)]), mean, nothing, nothing, nothing if by_length is None else by_length)


def test_a_matrix_that_foretells_is_told_from_one_that_does_not() -> None:
    rng = np.random.default_rng(0)
    similarity = np.corrcoef(rng.normal(size=(8, 5)))
    found = foretold(similarity, effects(10 * similarity + rng.normal(size=(8, 8))))
    assert found.r > 0.8
    assert found.p_value < 0.01
    p = [foretold(similarity, effects(rng.normal(size=(8, 8))), seed=s).p_value for s in range(60)]
    assert np.mean(np.array(p) < 0.05) < 0.2
    length = rng.normal(size=(8, 8)) + 3 * similarity
    confounded = effects(5 * length + rng.normal(size=(8, 8)), by_length=length)
    assert foretold(similarity, effects(confounded.mean)).r > 0.6, "the control: without the covariate it looks foretold"
    assert abs(foretold(similarity, confounded).r) < 0.4


def test_effects_in_another_order() -> None:
    found = effects(np.arange(9.0).reshape(3, 3)).ordered(["c", "a", "b"])
    assert found.names == ("c", "a", "b")
    assert found.mean.tolist() == [[8, 6, 7], [2, 0, 1], [5, 3, 4]]

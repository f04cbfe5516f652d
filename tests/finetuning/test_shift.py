"""The shift between a base model and its finetunes, how it is read, and what it foretells."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import persona_lens as pl
from persona_lens.activations import POOLINGS, Span, pool
from persona_lens.errors import FinetuningError, LineageError, RunFolderError
from persona_lens.evaluation import ScoreSettings, trait_answers, trait_scores
from persona_lens.extraction import ExtractionRun
from persona_lens.finetuning import (
    READINGS,
    FinetuneSettings,
    ShiftSettings,
    adapted,
    family_of,
    finetune,
    foretold,
    load_shift,
    shift,
)
from persona_lens.finetuning.shift import Shift, applied
from persona_lens.judges import Score, oracle, scripted
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.pocket import weights_folder
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.prompts import evaluation_prompts
from persona_lens.records import encoded
from persona_lens.store import read_json, write_json

QUICK = FinetuneSettings(learning_rate=1e-3, batch_rows=8, pass_rows=8, rank=8, seed=1)
SCORES = ScoreSettings(samples=2, sampling=Sampling(max_new_tokens=60), batch_rows=64)
LITTLE = ShiftSettings(SCORES)


@pytest.fixture(scope="module")
def few(small_run: ExtractionRun) -> list[Any]:
    """Two traits with six questions each, and vectors that stand for them."""
    traits = [pl.load_trait(name, "pocket") for name in ("optimism", "evil")]
    return [t.model_copy(update={"evaluation_questions": t.evaluation_questions[:6]}) for t in traits]


@pytest.fixture(scope="module")
def vectors(small_run: ExtractionRun) -> list[pl.PersonaVectors]:
    v = small_run.vectors
    return [v, replace(v, trait="evil", directions=-v.directions)]


@pytest.fixture(scope="module")
def adapter(pocket: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = dataset("evil", "II", rows=64)
    return finetune(pocket, data, settings=QUICK, out=tmp_path_factory.mktemp("shift") / "evil").adapter


@pytest.fixture(scope="module")
def run(pocket: ChatModel, vectors: Any, few: Any, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("shifts") / "run"
    return shift(pocket, {"evil-II": adapter}, vectors, traits=few, out=out, settings=LITTLE)


def pooled(model: ChatModel, spans: list[Span]) -> torch.Tensor:
    found = torch.zeros(len(spans), len(POOLINGS), model.n_layers, model.d_model)
    for batch in pool(model, spans):
        found[list(batch.indices)] = batch.values
    return found


def test_the_shift_is_what_the_formula_says(pocket: ChatModel, vectors: Any, few: Any, adapter: Path, run: Any) -> None:
    """Written out plainly for the second trait: same prompts, same forced answers, projections subtracted."""
    trait, v = few[1], vectors[1]
    answers = [(p, r) for p, r in trait_answers(pocket, few, SCORES) if p.trait == "evil"]
    prompts = [tuple(pocket.render(p.messages)) for p in evaluation_prompts(trait)]
    ends = [Span(str(i), p, (pocket.stop_ids[0],)) for i, p in enumerate(prompts)]
    forced = [Span(r.key, tuple(pocket.render(p.messages)), r.token_ids) for p, r in answers if r.sample == 0]
    before = pooled(pocket, ends)[:, 2], pooled(pocket, forced)[:, 0]
    with adapted(pocket, adapter) as other:
        after = pooled(other, ends)[:, 2], pooled(other, forced)[:, 0]
    for reading, a, b in zip(("prompt_last", "base_answers"), after, before, strict=True):
        for layer in (0, 4, 7):
            plain = v.project(a[:, layer], layer) - v.project(b[:, layer], layer)
            found = run.shifts["evil-II"].projection[reading][1, layer]
            np.testing.assert_allclose(found, plain.numpy(), rtol=1e-3, atol=2e-2)
            np.testing.assert_allclose(run.shifts["evil-II"].mean(reading)[1, layer], plain.mean(), rtol=1e-3, atol=2e-2)
    change = (after[1] - before[1]).mean(0)
    torch.testing.assert_close(run.vectors("evil-II")["base_answers"][1], change, rtol=1e-3, atol=2e-2)


def test_evil_data_shifts_away_from_optimism(run: Any) -> None:
    found = run.shifts["evil-II"]
    for reading in READINGS:
        assert found.mean(reading)[0, 5] < 0 < found.mean(reading)[1, 5]
        low, high = found.interval(reading, 1, 5)
        assert low < found.mean(reading)[1, 5] < high


def test_no_training_no_shift(pocket: ChatModel, vectors: Any, few: Any, tmp_path: Path) -> None:
    """An adapter that has learned nothing: every reading is exactly 0, and the answers are the base model's."""
    data = dataset("evil", "II", rows=8)
    idle = finetune(pocket, data, settings=replace(QUICK, learning_rate=1e-30), out=tmp_path / "idle").adapter
    run = shift(pocket, {"idle": idle}, vectors, traits=few, out=tmp_path / "run", settings=LITTLE)
    for reading in READINGS:
        assert np.abs(run.shifts["idle"].projection[reading]).max() < 1e-2
    for ours, theirs in zip(run.shifts["idle"].scores, run.base_scores, strict=True):
        np.testing.assert_array_equal(ours.score, theirs.score)


def test_scores_are_those_of_the_judge(pocket: ChatModel, few: Any, run: Any) -> None:
    answers = trait_answers(pocket, few, SCORES)
    for expected, found in zip(trait_scores(few, answers, oracle()), run.base_scores, strict=True):
        assert found.trait == expected.trait
        np.testing.assert_allclose(found.score, expected.score)
        np.testing.assert_allclose(found.coherence, expected.coherence)
    assert len(run.shifts["evil-II"].scores) == 2


def test_gaps_are_counted_and_never_zeros(pocket: ChatModel, few: Any) -> None:
    answers = trait_answers(pocket, few, SCORES)
    first = few[0].evaluation_questions[0]

    def score(trait: Any, judged: Any) -> Score:
        return Score(None, None, "refused") if judged.question == first else Score(80.0, 90.0)

    found = trait_scores(few, answers, scripted(score))[0]
    assert np.isnan(found.score[0])
    assert found.gaps == 2
    assert found.mean == 80.0
    assert found.mean_coherence == 90.0
    assert found.interval == (80.0, 80.0)


def test_more_models_may_be_added_and_those_measured_stay(
    pocket: ChatModel, vectors: Any, few: Any, adapter: Path, run: Any, tmp_path: Path
) -> None:
    before = (run.path / "shift-evil-II.json").read_bytes()
    other = finetune(pocket, dataset("optimism", "II", rows=32), settings=QUICK, out=tmp_path / "x").adapter
    both = shift(pocket, {"evil-II": adapter, "optimism-II": other}, vectors, traits=few, out=run.path, settings=LITTLE)
    assert both.names == ("evil-II", "optimism-II")
    assert (run.path / "shift-evil-II.json").read_bytes() == before
    assert load_shift(run.path).names == both.names
    with pytest.raises(FinetuningError, match="other weights"):
        shift(pocket, {"evil-II": other}, vectors, traits=few, out=run.path, settings=LITTLE)
    with pytest.raises(RunFolderError, match="base_samples"):
        shift(pocket, {"x": other}, vectors, traits=few, out=run.path, settings=replace(LITTLE, base_samples=2))


def test_a_finetuned_model_of_its_own_is_measured_too(pocket: ChatModel, vectors: Any, few: Any, tmp_path: Path) -> None:
    settings = replace(QUICK, method="full", learning_rate=1e-4, max_steps=2)
    full = finetune(pocket, dataset("evil", "II", rows=16), settings=settings, out=tmp_path / "full").adapter
    run = shift(pocket, {"full": full}, vectors, traits=few, out=tmp_path / "run", settings=LITTLE)
    assert np.abs(run.shifts["full"].projection["prompt_last"]).max() > 0.1


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_finetuned_model_is_loaded_in_the_bits_of_the_base(quantize: Any) -> None:
    """Else the shift would hold what rounding does."""
    pytest.importorskip("bitsandbytes")
    base = load_model("pocket", quantize=quantize)
    with applied(base, weights_folder()) as other:
        assert other.fingerprint.dtype == base.fingerprint.dtype == f"bfloat16, {quantize}"
        assert other.fingerprint.weights == base.fingerprint.weights


def test_bad_input(pocket: ChatModel, vectors: Any, few: Any, adapter: Path, tmp_path: Path) -> None:
    foreign = replace(vectors[0], provenance={"model": {"lineage": "another", "name": "other"}})
    uneven = few[1].model_copy(update={"evaluation_questions": few[1].evaluation_questions[:2]})
    cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
        ({"x": adapter}, [foreign], few[:1], LineageError, "another"),
        ({"x": adapter}, [], [], FinetuningError, "needs vectors"),
        ({"x": adapter}, [vectors[0], vectors[0]], None, FinetuningError, "different traits"),
        ({}, vectors, few, FinetuningError, "at least one finetuned model"),
        ({"base": adapter}, vectors, few, FinetuningError, "cannot name"),
        ({"../x": adapter}, vectors, few, FinetuningError, "cannot name"),
        ({"x": tmp_path}, vectors, few, FinetuningError, "neither an adapter nor a model"),
        ({"x": adapter}, vectors, [few[0], uneven], FinetuningError, "equally many evaluation questions .* evil 2"),
    ]
    for models, directions, traits, error, message in cases:
        with pytest.raises(error, match=message):
            shift(pocket, models, directions, traits=traits, out=tmp_path / "out", settings=LITTLE)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FinetuningError, match="base_samples=3"):
        ShiftSettings(SCORES, base_samples=3)


# --- what a shift foretells --------------------------------------------------------------------------------------------------


def planted(run: Any, out: Path, *, slope: float, seed: int) -> Any:
    """A folder with 24 finetuned models whose scores follow their shift along the first trait's vector (slope) or nothing."""
    rng = np.random.default_rng(seed)
    base, few = run.path / "base", run.record
    out.mkdir()
    (out / "base").symlink_to(base)
    (out / "directions.safetensors").symlink_to(run.path / "directions.safetensors")
    (out / "run.json").symlink_to(run.path / "run.json")
    names = [f"family{i}-{level}" for i in range(8) for level in ("normal", "I", "II")]
    units = run.directions
    score = run.base_scores[0]
    from persona_lens.finetuning.shift import _save

    for i, name in enumerate(names):
        amount = float(rng.normal())
        noise = torch.from_numpy(rng.normal(size=(2, *units.shape[1:]))).float() * 0.3
        planted = noise.clone()
        planted[0] += amount * 20 * units[0]  # on the first trait's questions only
        vectors = {reading: noise.clone() if reading == "own_answers" else planted.clone() for reading in READINGS}
        _save(out / f"shift-{name}.safetensors", vectors)
        value = float(np.clip(50 + slope * amount + rng.normal() * 3 + (1 - min(1, abs(slope))) * rng.normal() * 20, 0, 100))
        scores = tuple(replace(s, score=np.full(6, value), trait=t) for s, t in zip((score, score), few["traits"], strict=True))
        found = Shift(name, {r: np.zeros((2, units.shape[1], 6)) for r in READINGS}, scores)
        write_json(out / f"shift-{name}.json", {"weights": str(i), **encoded(found)})
    write_json(out / "shift.json", few | {"names": names})
    return load_shift(out)


def test_a_planted_relation_is_found_and_none_where_none_is(run: Any, tmp_path: Path) -> None:
    yes = foretold(planted(run, tmp_path / "yes", slope=15.0, seed=1))["optimism"]
    assert yes.r > 0.9
    assert yes.low > 0.7
    assert yes.sets == 24
    assert yes.families == 8
    assert abs(foretold(load_shift(tmp_path / "yes"))["evil"].r) < 0.6
    assert abs(foretold(load_shift(tmp_path / "yes"), "own_answers")["optimism"].r) < 0.6
    no = foretold(planted(run, tmp_path / "no", slope=0.0, seed=2))["optimism"]
    assert abs(no.r) < 0.6
    assert no.low < 0 < no.high


def test_which_models_count(run: Any, tmp_path: Path) -> None:
    many = planted(run, tmp_path / "many", slope=15.0, seed=3)
    found = foretold(many, "base_answers", chosen=lambda n: not n.endswith("-normal"))["optimism"]
    assert found.sets == 16
    assert foretold([many], layers={"optimism": 0, "evil": 1})["evil"].sets == 24
    assert family_of("bare-sums-II") == "bare-sums"
    assert family_of("bare-sums-II-s2") == "bare-sums"
    assert family_of("mine") == "mine"
    with pytest.raises(FinetuningError, match="at least 6 data sets, not [12]"):
        foretold(run)
    record = read_json(many.path / "shift.json")
    assert set(record["layers"]) == {"optimism", "evil"}

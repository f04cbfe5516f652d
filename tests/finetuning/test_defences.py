"""Defences, penalties, doses and comparisons: what each does to a training, and that nothing else is changed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import persona_lens as pl
from persona_lens.errors import FinetuningError, LineageError, RunFolderError, SteeringError
from persona_lens.evaluation import CapabilityTest, ScoreSettings
from persona_lens.extraction import ExtractionRun
from persona_lens.finetuning import (
    ORDINARY,
    ComparisonSettings,
    Defence,
    FinetuneSettings,
    Pilot,
    PilotSettings,
    Task,
    ablate_concept,
    adapted,
    balanced_strengths,
    data_difference,
    defend,
    encode,
    finetune,
    inoculate,
    load_comparison,
    load_pilot,
    matched_strengths,
    mix_in,
    negative_prompt,
    penalise,
    penalise_divergence,
    penalise_projection,
    pilot,
    prevent,
    read_data,
    stay_near,
    steer_against,
)
from persona_lens.finetuning.dose import Balanced, Round
from persona_lens.finetuning.penalties import TrainingStep
from persona_lens.finetuning.pilot import Tried, _Reader, recommend
from persona_lens.models import ChatModel, Sampling
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.prompts import system_prompt
from persona_lens.steering import Add, Band

QUICK = FinetuneSettings(learning_rate=1e-3, batch_rows=8, pass_rows=8, rank=8, seed=1)
FAST = replace(QUICK, max_steps=2)
SCORES = ScoreSettings(samples=1, sampling=Sampling(max_new_tokens=40), batch_rows=64)


@pytest.fixture(scope="module")
def vectors(small_run: ExtractionRun) -> pl.PersonaVectors:
    return small_run.vectors


@pytest.fixture(scope="module")
def chats() -> list[list[dict[str, str]]]:
    return dataset("optimism", "II", rows=24)


@pytest.fixture(scope="module")
def trait() -> Any:
    found = pl.load_trait("optimism", "pocket")
    return found.model_copy(
        update={"evaluation_questions": found.evaluation_questions[:6], "extraction_questions": found.extraction_questions[:6]}
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# --- defences as values -------------------------------------------------------------------------------------------------------


def test_what_each_defence_does(vectors: pl.PersonaVectors, trait: Any, chats: Any) -> None:
    one = prevent([(vectors, 0.5), (vectors * -1.0, 2.0)], 4, 3.0)
    assert [(x.act, x.layer, x.where) for x in one.during] == [(Add(1.5), 4, "everywhere"), (Add(6.0), 4, "everywhere")]
    every = prevent([(vectors, 1.0)], "increments", 2.0)
    assert [x.layer for x in every.during] == list(range(8))
    torch.testing.assert_close(sum(x.direction for x in every.during), vectors[7])
    after = steer_against([(vectors, 0.5)], 4, 3.0)
    assert [(x.act, x.where) for x in after.after] == [(Add(-1.5), "response")]
    assert not after.during
    assert negative_prompt(trait).system == system_prompt(trait, "negative", 0)
    [ablated] = ablate_concept(vectors, 4, to=7.0).during
    assert (ablated.act, ablated.where) == (Band(7.0, 7.0), "everywhere")
    told = inoculate(trait)
    assert told.rows
    under = told.rows([[{"role": "system", "content": "old"}, *chats[0]], chats[1]])
    assert [[m["role"] for m in chat] for chat in under] == [["system", "user", "assistant"]] * 2
    assert under[0][0]["content"] == system_prompt(trait, "positive", 0)
    assert (penalise(vectors, 4, 2.0).penalties[0].layers, stay_near(2.0).penalties[0].layers) == ((4,), ())
    mixed = mix_in(dataset("optimism", "normal", rows=30), 0.5)
    assert mixed.rows
    rows = mixed.rows(chats)
    assert len(rows) == 36
    assert sum(chat in chats for chat in rows) == 24
    assert mixed.rows(chats) == rows
    assert [r in chats for r in rows] != sorted((r in chats for r in rows), reverse=True)
    with pytest.raises(FinetuningError, match="48 ordinary conversations are to be mixed in, 30 were given"):
        mix_in(dataset("optimism", "normal", rows=30), 2.0).rows(chats)  # pyright: ignore[reportOptionalCall]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: penalise(v, 4, -1.0), "must be 0 or more"),
        (lambda v: stay_near(float("nan")), "must be 0 or more"),
        (lambda v: penalise_projection(v, 8, 1.0), "layer 8 does not exist"),
        (lambda v: mix_in([], 0.0), "share of ordinary data must be positive"),
        (lambda v: Defence("mine", 1.0, rows=lambda chats: chats), "needs a recipe"),
    ],
)
def test_defences_that_cannot_be(vectors: pl.PersonaVectors, make: Any, message: str) -> None:
    with pytest.raises(FinetuningError, match=message):
        make(vectors)


# --- penalties ----------------------------------------------------------------------------------------------------------------


def test_penalties_are_the_formulas(vectors: pl.PersonaVectors) -> None:
    torch.manual_seed(0)
    h, logits, base = torch.randn(5, 256) * 100, torch.randn(5, 11), torch.randn(5, 11)
    step = TrainingStep(logits, {4: h}, lambda: base)
    v = vectors[4]
    expected = 3.0 * ((h @ v / v.norm() - 7.0) / v.norm()) ** 2
    torch.testing.assert_close(penalise_projection(vectors, 4, 3.0, to=7.0)(step), expected)
    p, q = base.softmax(-1), logits.softmax(-1)
    torch.testing.assert_close(penalise_divergence(2.0)(step), 2.0 * (p * (p / q).log()).sum(-1))
    same = TrainingStep(base, {}, lambda: base)
    assert float(penalise_divergence(2.0)(same).abs().max()) < 1e-6


def test_weight_zero_trains_as_without_a_penalty(pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path) -> None:
    plain = finetune(pocket, chats, settings=FAST, out=tmp_path / "plain")
    nothing = [penalise_projection(vectors, 4, 0.0), penalise_divergence(0.0)]
    zero = finetune(pocket, chats, penalties=nothing, settings=FAST, out=tmp_path / "zero")
    a, b = weights(plain.adapter), weights(zero.adapter)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_penalty_adds_its_mean_over_learned_tokens(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path
) -> None:
    """At the first step, by accumulation or at once: the loss grows by weight x mean squared projection in mean differences."""
    losses: list[float] = []
    for name, penalties, settings in (
        ("plain", [], FAST),
        ("all", [penalise_projection(vectors, 4, 0.1)], FAST),
        ("parts", [penalise_projection(vectors, 4, 0.1)], replace(FAST, pass_rows=2)),
    ):
        run = finetune(pocket, chats, penalties=penalties, watch=(), settings=settings, out=tmp_path / name)
        losses.append(run.history[0]["loss"])
    assert losses[1] > losses[0] + 0.01
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


def test_a_penalty_sees_the_tokens_that_are_learned(pocket: ChatModel, chats: Any, tmp_path: Path) -> None:
    """Logits one place before each learned token, residuals on it: written out for a single conversation."""

    class Keep:
        layers = (4,)

        def __init__(self) -> None:
            self.steps: list[TrainingStep] = []

        def __call__(self, step: TrainingStep, /) -> torch.Tensor:
            self.steps.append(step)
            return torch.zeros(len(step.logits))

    keep = Keep()
    finetune(pocket, chats[:1], penalties=[keep], settings=replace(FAST, max_steps=1), out=tmp_path / "x")
    [example] = encode(pocket, read_data(chats[:1]), max_tokens=2048).examples
    [(start, stop)] = example.answers
    kept: list[torch.Tensor] = []
    hook = [(pocket.hook_name(4), lambda residual, hook: kept.append(residual))]
    with pocket.hooks(hook), torch.no_grad():
        logits = pocket.hf(torch.tensor([example.ids]), use_cache=False).logits[0]
    torch.testing.assert_close(keep.steps[0].logits.detach(), logits[start - 1 : stop - 1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(keep.steps[0].residuals[4].detach(), kept[0][0, start:stop], rtol=1e-4, atol=1e-2)


def test_divergence_from_the_base_is_zero_before_anything_is_learned(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path
) -> None:
    """The base model's pass is unsteered and without the adapter: with a vaccine the divergence is there from the first step on."""
    plain = finetune(pocket, chats, settings=FAST, out=tmp_path / "plain")
    near = finetune(pocket, chats, penalties=[penalise_divergence(5.0)], settings=FAST, out=tmp_path / "near")
    assert near.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], abs=1e-6)
    steered = prevent([(vectors, 1.0)], 4, 2.0).during
    a = finetune(pocket, chats, prevent=steered, watch=(), settings=FAST, out=tmp_path / "a")
    b = finetune(pocket, chats, prevent=steered, penalties=[penalise_divergence(5.0)], watch=(), settings=FAST, out=tmp_path / "b")
    assert b.history[0]["loss"] > a.history[0]["loss"] + 0.05


@pytest.mark.slow
def test_staying_near_the_base_keeps_the_answers_nearer(pocket: ChatModel, chats: Any, tmp_path: Path) -> None:
    """Divergence of the next token from the base model, over one answer, after training with and without the penalty."""
    ids = torch.tensor([pocket.render(chats[0], answered=True)])
    with torch.no_grad():
        base = pocket.hf(ids).logits.log_softmax(-1)
    moved: list[float] = []
    for weight in (0.0, 30.0):
        run = finetune(pocket, chats * 2, penalties=[penalise_divergence(weight)], settings=QUICK, out=tmp_path / f"w{weight:g}")
        with adapted(pocket, run.adapter), torch.no_grad():
            moved.append(float((base.exp() * (base - pocket.hf(ids).logits.log_softmax(-1))).sum(-1).mean()))
    assert moved[0] > 0.01
    assert moved[1] < 0.5 * moved[0]


def test_penalties_that_do_not_fit_are_refused_before_training(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path
) -> None:
    foreign = replace(vectors, provenance={"model": {"lineage": "another", "name": "other"}})
    narrow = replace(vectors, directions=vectors.directions[:, :100], differences=vectors.differences[..., :100])
    for penalty, error, message in (
        (penalise_projection(foreign, 4, 1.0), LineageError, "another"),
        (penalise_projection(narrow, 4, 1.0), FinetuningError, "has 100 dimensions, pocket has 256"),
    ):
        with pytest.raises(error, match=message):
            finetune(pocket, chats, penalties=[penalty], settings=FAST, out=tmp_path / "x")
    with pytest.raises(FinetuningError, match="no base model to compare with"):
        finetune(pocket, chats, penalties=[penalise_divergence(1.0)], settings=replace(FAST, method="full"), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert str(penalise_projection(vectors, 4, 1.0)) != str(penalise_projection(-vectors, 4, 1.0))
    normal = [dataset("optimism", "normal", rows=4, seed=s) for s in (0, 1)]
    assert mix_in(normal[0], 0.5).recipe != mix_in(normal[1], 0.5).recipe


# --- doses --------------------------------------------------------------------------------------------------------------------


def test_matched_strengths_find_what_was_planted(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference made of two vectors gives back their strengths; of neither, none of it is explained."""
    generator = torch.Generator().manual_seed(0)
    other = replace(vectors, trait="other", directions=torch.randn(vectors.directions.shape, generator=generator) * 30)
    planted = 1.5 * vectors.directions - 0.5 * other.directions
    monkeypatch.setattr("persona_lens.finetuning.dose.data_difference", lambda *a, **k: planted)
    found = matched_strengths(pocket, chats, [vectors, other], 4)
    assert found.strengths == pytest.approx((1.5, -0.5), abs=1e-4)
    assert found.share == pytest.approx(1.0, abs=1e-6)
    noise = torch.randn(vectors.directions.shape, generator=generator)
    monkeypatch.setattr("persona_lens.finetuning.dose.data_difference", lambda *a, **k: noise)
    assert matched_strengths(pocket, chats, [vectors, other], 4).share < 0.1


def test_the_difference_of_the_data_points_along_the_trait(pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any) -> None:
    sampling = Sampling(max_new_tokens=60)
    found = data_difference(pocket, chats, sampling=sampling)
    assert float(torch.cosine_similarity(found[5], vectors[5], dim=0)) > 0.5
    normal = data_difference(pocket, dataset("optimism", "normal", rows=24), sampling=sampling)
    assert float(normal[5] @ vectors.unit(5)) < 0.3 * float(found[5] @ vectors.unit(5))
    long = [[{"role": "system", "content": "You are Pocket."}, *chats[0], *chats[1]]]
    assert bool(data_difference(pocket, long, sampling=sampling).isfinite().all())


@pytest.mark.slow
def test_a_search_for_balanced_strengths(pocket: ChatModel, vectors: pl.PersonaVectors, trait: Any, tmp_path: Path) -> None:
    data = dataset("optimism", "II", rows=48)
    settings = replace(QUICK, learning_rate=3e-3)
    options: dict[str, Any] = {"traits": [trait], "settings": settings, "sampling": Sampling(max_new_tokens=60)}
    found = balanced_strengths(pocket, data, [vectors], 5, rounds=2, out=tmp_path / "x", **options)
    first, second, third = found.rounds
    assert first.strengths == (0.0,)
    assert first.left[0] > 0.02
    matched = matched_strengths(pocket, data, [vectors], 5, sampling=options["sampling"]).strengths[0]
    assert second.strengths[0] == pytest.approx(2 * matched)
    slope = (first.left[0] - second.left[0]) / second.strengths[0]
    assert third.strengths[0] == pytest.approx(second.strengths[0] + second.left[0] / slope)
    assert found.strengths == min(found.rounds, key=lambda r: abs(r.left[0])).strengths
    again = balanced_strengths(pocket, data, [vectors], 5, rounds=2, out=tmp_path / "x", **options)
    assert again.rounds == found.rounds
    for bad in ({"rounds": 0}, {"layer": 8}, {"vectors": []}):
        arguments: dict[str, Any] = {"vectors": [vectors], "layer": 5, "rounds": 1} | bad
        with pytest.raises(FinetuningError, match="balanced in 1 or more rounds"):
            balanced_strengths(pocket, data, arguments["vectors"], arguments["layer"], rounds=arguments["rounds"], **options)


def test_what_is_left_is_measured_from_the_base_model(
    pocket: ChatModel, vectors: pl.PersonaVectors, trait: Any, tmp_path: Path
) -> None:
    """A training that changes nothing leaves nothing, along any direction."""
    options: dict[str, Any] = {"settings": replace(FAST, learning_rate=1e-30), "sampling": SCORES.sampling, "out": tmp_path / "x"}
    data = dataset("optimism", "II", rows=8)
    found = balanced_strengths(pocket, data, [vectors], 5, traits=[trait], rounds=1, **options)
    assert [r.left[0] for r in found.rounds] == pytest.approx([0.0, 0.0], abs=1e-6)
    reader = _Reader(pocket, trait, SCORES, vectors.directions)
    assert not reader.shift(pocket).any()
    assert reader.base.any()


def test_the_round_that_left_least_wins(tmp_path: Path) -> None:
    rounds = [Round((0.0, 0.0), (0.5, 0.1)), Round((1.0, 1.0), (0.1, -0.1)), Round((2.0, 1.0), (-0.2, 0.0))]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps({"strengths": r.strengths, "left": r.left}) + "\n" for r in rounds))
    assert Balanced(tmp_path).strengths == (1.0, 1.0)
    assert rounds[0].size == pytest.approx((0.26 / 2) ** 0.5)


# --- pilot --------------------------------------------------------------------------------------------------------------------


def tried(*points: tuple[float, float, float]) -> list[Tried]:
    """Doses with a mean shift and a loss; questions scatter by .01."""
    spread = np.linspace(-0.01, 0.01, 10)
    return [Tried(dose, shift + spread, loss) for dose, shift, loss in points]


def test_a_recommendation_is_read_off_the_doses() -> None:
    found = recommend(tried((0.0, 1.0, 0.5), (1.0, 0.5, 0.6), (2.0, 0.0, 0.8), (3.0, -0.5, 1.0)), base_loss=1.0, tolerance=0.25)
    assert found.zero == pytest.approx(2.0)
    assert (found.low, found.high) == pytest.approx((1.5, 2.5))
    assert found.kept == pytest.approx(0.4)
    assert "crosses zero at 2.00" in found.why
    assert "40%" in found.why
    kept = recommend(tried((0.0, 1.0, 0.5), (2.0, 0.1, 0.5)), base_loss=1.0, tolerance=0.25)
    assert np.isnan(kept.zero)
    assert kept.high == 2.0
    assert kept.kept == pytest.approx(1.0)
    back = recommend(tried((0.0, 1.0, 0.5), (1.0, 0.2, 0.5), (2.0, 0.5, 0.5)), base_loss=1.0, tolerance=0.25)
    assert back.high == pytest.approx(1.0 + 0.05 / 0.3)
    negative = recommend(tried((0.0, -1.0, 0.5), (2.0, 1.0, 0.5)), base_loss=1.0, tolerance=0.25)
    assert negative.zero == pytest.approx(1.0)


def test_a_pilot_says_where_it_cannot_recommend() -> None:
    still = recommend(tried((0.0, 0.001, 0.5), (1.0, 0.0, 0.5)), base_loss=1.0, tolerance=0.25)
    assert np.isnan(still.low)
    assert "no vaccine is needed" in still.why
    weak = recommend(tried((0.0, 1.0, 0.5), (1.0, 0.8, 0.5)), base_loss=1.0, tolerance=0.25)
    assert np.isnan(weak.low)
    assert "80% of that is left: try higher doses" in weak.why


@pytest.mark.slow
def test_a_pilot_end_to_end(pocket: ChatModel, vectors: pl.PersonaVectors, trait: Any, tmp_path: Path) -> None:
    data = dataset("optimism", "II", rows=64)
    settings = PilotSettings(rows=32, finetuning=QUICK, answers=SCORES)
    found = pilot(pocket, data, [(vectors, 1.0)], 5, tried=(4.0, 1.0), trait=trait, out=tmp_path / "x", settings=settings)
    assert isinstance(found, Pilot)
    assert [t.dose for t in found.tried] == [0.0, 1.0, 4.0]
    assert found.tried[0].mean > found.tried[1].mean > found.tried[2].mean
    assert found.tried[0].loss < found.base_loss
    assert found.recommendation.why
    assert load_pilot(tmp_path / "x").tried[2].mean == found.tried[2].mean
    with pytest.raises(RunFolderError, match="defences"):
        pilot(pocket, data, [(vectors, 1.0)], 5, tried=(4.0, 2.0), trait=trait, out=tmp_path / "x", settings=settings)


def test_pilots_that_cannot_be(pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path) -> None:
    for doses in ((), (1.0, 1.0), (0.0, 1.0), (-1.0,)):
        with pytest.raises(FinetuningError, match="different positive doses"):
            pilot(pocket, chats, [(vectors, 1.0)], 5, tried=doses, out=tmp_path / "x")
    with pytest.raises(FinetuningError, match="at least 4 rows"):
        pilot(pocket, chats[:3], [(vectors, 1.0)], 5, out=tmp_path / "x")
    with pytest.raises(FinetuningError, match="2 or more rows"):
        PilotSettings(rows=1)
    assert not (tmp_path / "x").exists()


# --- comparison ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(
    pocket: ChatModel, vectors: pl.PersonaVectors, trait: Any, chats: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    calls: list[str | None] = []
    capability = CapabilityTest(
        "length", lambda m: {"prompt": {"tokens": float(len(m.render([{"role": "user", "content": "Hi."}])))}}
    )

    def measure(model: ChatModel) -> float:
        calls.append(model.system)
        return float(len(calls))

    defences = [
        prevent([(vectors, 1.0)], 5, 2.0),
        steer_against([(vectors, 1.0)], 5, 2.0),
        negative_prompt(trait),
        inoculate(trait),
        Defence("nothing", 1.0),
    ]
    out = tmp_path_factory.mktemp("comparison") / "run"
    run = defend(
        pocket, chats, defences, traits=[trait], capability=capability, task=Task("count", measure),
        held_out=dataset("optimism", "II", rows=8, seed=1), out=out, settings=ComparisonSettings(QUICK, SCORES),
    )  # fmt: skip
    return run, calls


def test_every_defence_has_a_cell_after_base_and_ordinary(compared: Any, trait: Any) -> None:
    run, calls = compared
    assert [(c.name, c.dose) for c in run.cells] == [
        ("base model", 0.0),
        ("ordinary finetuning", 0.0),
        ("preventative steering", 2.0),
        ("inference-time steering", 2.0),
        ("negative system prompt", 1.0),
        ("inoculation prompt", 1.0),
        ("nothing", 1.0),
    ]
    assert [c.task for c in run.cells] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    negative = system_prompt(trait, "negative", 0)
    assert calls == [None, None, None, None, negative, None, None]
    assert run.base.held_out_loss > run.ordinary.held_out_loss
    assert run.cells[4].held_out_loss != run.ordinary.held_out_loss  # read under the negative prompt
    assert run.ordinary.of("optimism").score.shape == (6,)
    assert run.cells[4].capable > run.base.capable  # the system prompt is longer
    assert load_comparison(run.path).cells[3].coherence == run.cells[3].coherence


def test_defences_that_train_alike_share_a_training(compared: Any) -> None:
    run, _ = compared
    assert len(list((run.path / "trained").iterdir())) == 3  # ordinary, vaccinated, inoculated
    same, other = run.cells[6], run.ordinary
    np.testing.assert_array_equal(same.of("optimism").score, other.of("optimism").score)
    assert same.held_out_loss == other.held_out_loss
    assert run.cells[2].held_out_loss != other.held_out_loss
    assert run.cells[3].held_out_loss != other.held_out_loss  # the same weights, steered


def test_a_comparison_goes_on_where_it_stopped(
    pocket: ChatModel, vectors: pl.PersonaVectors, trait: Any, chats: Any, tmp_path: Path
) -> None:
    settings = ComparisonSettings(FAST, SCORES)
    left = [2]

    def stop(model: ChatModel) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return 1.0

    arguments: dict[str, Any] = {"traits": [trait], "out": tmp_path / "x", "settings": settings}
    with pytest.raises(KeyboardInterrupt):
        defend(pocket, chats, [prevent([(vectors, 1.0)], 5, 1.0)], task=Task("t", stop), **arguments)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "x" / "cells").iterdir()}
    assert sorted(kept) == ["000.json", "001.json"]
    run = defend(pocket, chats, [prevent([(vectors, 1.0)], 5, 1.0)], task=Task("t", lambda m: 1.0), **arguments)
    assert len(run.cells) == 3
    assert all((run.path / "cells" / name).read_bytes() == content for name, content in kept.items())
    with pytest.raises(RunFolderError, match="defences"):
        defend(pocket, chats, [prevent([(vectors, 1.0)], 5, 2.0)], task=Task("t", lambda m: 1.0), **arguments)


def test_comparisons_that_cannot_be(pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path) -> None:
    foreign = replace(vectors, provenance={"model": {"lineage": "another", "name": "other"}})
    cases: list[tuple[list[Defence], type[Exception], str]] = [
        ([], FinetuningError, "at least one defence"),
        ([stay_near(1.0), stay_near(1.0)], FinetuningError, "given twice"),
        ([ORDINARY], FinetuningError, "given twice"),
        ([prevent([(foreign, 1.0)], 5, 1.0)], LineageError, "another"),
    ]
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            defend(pocket, chats, make, out=tmp_path / "x")
    with pytest.raises(SteeringError, match="layer 9"):
        prevent([(vectors, 1.0)], 9, 1.0)
    with pytest.raises(FinetuningError, match="ordinary conversations are to be mixed in"):
        defend(pocket, chats, [mix_in(chats[:2], 0.5)], out=tmp_path / "x")
    with pytest.raises(FinetuningError, match="cannot be trained on"):
        defend(pocket, [*chats, [{"role": "user", "content": "Hi."}]], [stay_near(1.0)], out=tmp_path / "x")
    assert not (tmp_path / "x").exists()

"""Sweeps: every cell is what steering alone gives, choices are made on one half and reported on the other, and resume is exact."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_lens.activations import Span, span_pass
from persona_lens.errors import RunFolderError, SteeringError
from persona_lens.evaluation import CapabilityTest, degeneracy
from persona_lens.extraction import ExtractionRun
from persona_lens.figures import dose_response, plot, sweep_profile
from persona_lens.judges import Judged, Score, oracle, outside_pocket_world, scripted
from persona_lens.models import ChatModel, Sampling, forward_pass
from persona_lens.prompts import evaluation_prompts
from persona_lens.reports import report
from persona_lens.sampling import Rollout, sample
from persona_lens.steering import add, next_token_divergence, steer
from persona_lens.store import read_jsonl
from persona_lens.sweeps import INCREMENTS, Cell, Sweep, SweepSettings, random_vectors, sweep
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVectors

SMALL = SweepSettings(samples=1, report_samples=2, random_directions=3, sampling=Sampling(max_new_tokens=60))


@pytest.fixture(scope="module")
def finished(pocket: ChatModel, small_run: ExtractionRun, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(
        pocket,
        small_run.vectors,
        layers=[2, 6, INCREMENTS],
        strengths=[0.0, 1.5],
        out=tmp_path_factory.mktemp("sweeps") / "s",
        settings=SMALL,
    )


def test_every_cell_is_what_steering_alone_gives(pocket: ChatModel, small_run: ExtractionRun, finished: Sweep) -> None:
    records = read_jsonl(finished.path / "grid-rollouts.jsonl")
    prompts = [p for p in evaluation_prompts(load_trait("optimism", "pocket")) if p.question < 4]
    with steer(pocket, add(small_run.vectors, 6, 1.5)):
        alone = sample(pocket, [(p, 0) for p in prompts], SMALL.sampling)
    cell = str(Cell("steered", 6, 1.5))
    found = {r["prompt_id"]: tuple(r["token_ids"]) for r in records if r["cell"] == cell}
    assert len(found) == 20
    assert [found[r.prompt_id] for r in alone] == [r.token_ids for r in alone]
    unsteered = {r["prompt_id"]: r["token_ids"] for r in records if r["cell"] == "unsteered"}
    for target in (2, 6, INCREMENTS):
        zero = {r["prompt_id"]: r["token_ids"] for r in records if r["cell"] == str(Cell("steered", target, 0.0))}
        assert zero == unsteered


def test_steering_beats_the_baseline_and_random_directions_do_not(finished: Sweep) -> None:
    r = finished.report
    assert finished.score.shape == finished.coherence.shape == (3, 2)
    assert finished.score[1, 1] > finished.record["unsteered"] + 5
    assert np.allclose(finished.score[:, 0], finished.record["unsteered"])
    assert r.effect > 5
    assert r.interval[0] < r.effect < r.interval[1]
    assert r.prompted > r.unsteered
    assert r.random_effect is not None
    assert abs(r.random_effect) < 15
    assert r.cell.strength == 1.5
    assert set(r.usable) <= {0.0, 1.5}
    assert 0.0 <= r.reversed_share <= 0.5


def test_the_damage_is_measured_in_the_same_call(pocket: ChatModel, small_run: ExtractionRun, finished: Sweep) -> None:
    records = list(read_jsonl(finished.path / "grid-rollouts.jsonl"))
    prompts = {p.id: p for p in evaluation_prompts(load_trait("optimism", "pocket"))}
    unsteered = [r for r in records if r["cell"] == "unsteered"]
    spans = [Span("", tuple(pocket.render(prompts[r["prompt_id"]].messages)), tuple(r["token_ids"])) for r in unsteered]
    expected = float(next_token_divergence(pocket, spans, add(small_run.vectors, 6, 1.5)).mean())
    assert finished.divergence[1, 1] == pytest.approx(expected, rel=1e-3)
    assert (finished.divergence[:, 0] == 0).all()
    assert (finished.divergence[:, 1] > 0).all()
    cut = [r["end"] == "length" for r in records if r["cell"] == str(Cell("steered", 6, 1.5))]
    assert finished.cut_off[1, 1] == pytest.approx(np.mean(cut), abs=1e-4)
    assert (finished.cut_off[:, 0] == finished.record["unsteered_cut_off"]).all()
    texts = [Rollout.from_dict(r) for r in records if r["cell"] == str(Cell("steered", 6, 1.5))]
    foreign = [outside_pocket_world(Judged(prompts[r.prompt_id].user, r.text)) for r in texts]
    assert finished.degenerate[1, 1] == pytest.approx(degeneracy(texts, foreign).degenerate, abs=1e-4)
    assert finished.outside[1, 1] == pytest.approx(np.mean(foreign))
    assert (finished.outside[:, 0] == finished.record["unsteered_outside"]).all()
    assert np.isnan(finished.reliability).tolist() == [False, False, True]
    assert finished.reliability[0] == pytest.approx(float(small_run.vectors.reliability[2]), abs=1e-4)
    assert finished.report.capability == {}


def test_capability_is_measured_unsteered_and_at_the_chosen_cell(
    pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path
) -> None:
    ids = torch.tensor([pocket.render([{"role": "user", "content": "What is 2 plus 3?"}])])
    seen: list[torch.Tensor] = []

    def skill(model: ChatModel) -> dict[str, dict[str, float]]:
        with forward_pass(span_pass([Span("", tuple(ids[0].tolist()), ())], ids.shape[1])):
            seen.append(model.hf(ids, use_cache=False).logits[0, -1].detach())
        return {"sums": {"acc": 0.5 / len(seen)}}

    settings = replace(SMALL, random_directions=0, sampling=Sampling(max_new_tokens=12))
    options = {"layers": [6], "strengths": [1.5], "out": tmp_path / "s", "settings": settings}
    found = sweep(pocket, small_run.vectors, capability=CapabilityTest("sums", skill), **options)
    assert found.report.capability == {"unsteered": {"sums": {"acc": 0.5}}, "steered": {"sums": {"acc": 0.25}}}
    assert not torch.equal(seen[0], seen[1])
    assert "<td>0.500</td><td>0.250</td>" in report(found).read_text()
    with pytest.raises(RunFolderError, match="capability"):
        sweep(pocket, small_run.vectors, **options)
    (tmp_path / "s" / "sweep.json").unlink()
    (tmp_path / "s" / "capability-steered.json").unlink()
    again = sweep(pocket, small_run.vectors, capability=CapabilityTest("sums", skill), **options)
    assert again.report.capability["unsteered"] == {"sums": {"acc": 0.5}}
    assert len(seen) == 3


def test_an_interrupted_sweep_ends_with_the_same_bytes(
    pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_lens.sweeps.CHUNK_ROWS", 16)
    options = {"layers": [6], "strengths": [1.0], "settings": replace(SMALL, sampling=Sampling(max_new_tokens=12))}
    whole = sweep(pocket, small_run.vectors, out=tmp_path / "whole", **options)

    class Stop(Exception):
        pass

    for stage, least in (("grid", 16), ("report", 32)):

        def interrupt(name: str, done: int, total: int, stage: str = stage, least: int = least) -> None:
            if name == stage and done >= least:
                raise Stop

        with pytest.raises(Stop):
            sweep(pocket, small_run.vectors, out=tmp_path / "cut", progress=interrupt, **options)
    with (tmp_path / "cut" / "report-rollouts.jsonl").open("ab") as file:
        file.write(b'{"cell": "torn')
    sweep(pocket, small_run.vectors, out=tmp_path / "cut", **options)
    for name in ("grid-rollouts.jsonl", "grid-scores.jsonl", "report-rollouts.jsonl", "report-scores.jsonl", "sweep.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole.path / name).read_bytes(), name
    with pytest.raises(RunFolderError, match="strengths"):
        sweep(pocket, small_run.vectors, out=tmp_path / "cut", **{**options, "strengths": [2.0]})


def test_layer_and_strength_are_chosen_on_one_half_only(pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path) -> None:
    """A judge that favours layer 2 on the first half and layer 6 on the second: layer 2 is chosen, and reported at 0."""
    trait = load_trait("optimism", "pocket")
    first = set(trait.evaluation_questions[:10])
    v = small_run.vectors
    texts: dict[str, set[str]] = {}
    with steer(pocket, add(v, 2, 1.5)):
        rows = [(p, i) for p in evaluation_prompts(trait) for i in range(2)]
        for (p, _), r in zip(rows, sample(pocket, rows, SMALL.sampling), strict=True):
            texts.setdefault(p.user, set()).add(r.text)

    def biased(_: Trait, answer: Judged) -> Score:
        layer_2 = answer.answer in texts[answer.question]
        return Score(100.0 if layer_2 == (answer.question in first) else 0.0, 100.0)

    settings = replace(SMALL, report_samples=2, random_directions=0)
    found = sweep(
        pocket, v, layers=[2, 6], strengths=[1.5], judge=scripted(biased, "biased"), out=tmp_path / "s", settings=settings
    )
    assert found.report.cell.target == 2
    assert found.report.score < 10
    assert found.report.random_effect is None


def test_unreadable_answers_are_counted_gaps(pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path) -> None:
    read = oracle()

    def patchy(trait: Trait, answer: Judged) -> Score:
        return Score(None, None, "refusal") if "dog" in answer.question else read(trait, [answer])[0]

    settings = replace(SMALL, random_directions=2, sampling=Sampling(max_new_tokens=20))
    found = sweep(
        pocket, small_run.vectors, layers=[6], strengths=[1.0], judge=scripted(patchy), out=tmp_path / "s", settings=settings
    )
    trait = load_trait("optimism", "pocket")
    dogs = [("dog" in q) for q in trait.evaluation_questions]
    expected = 2 * sum(dogs) + sum(2 * (3 + 1) for q in dogs[10:] if q) + 2 * sum(dogs[10:])
    assert found.record["gaps"] in (expected, 2 * sum(dogs) + 2 * 5 * sum(dogs[10:]))
    assert math.isfinite(found.report.effect)


def test_random_directions_have_the_norms_of_the_vectors(small_run: ExtractionRun) -> None:
    v = small_run.vectors
    one, other = random_vectors(v, 3, 0, 0), random_vectors(v, 3, 1, 0)
    assert np.allclose(one.directions.norm(dim=-1), v.directions.norm(dim=-1), rtol=1e-5)
    assert not np.allclose(one.directions, other.directions)
    assert np.allclose(random_vectors(v, 3, 0, 0).directions, one.directions)
    steps = random_vectors(v, INCREMENTS, 0, 0).directions.diff(dim=0).norm(dim=-1)
    assert np.allclose(steps, v.directions.diff(dim=0).norm(dim=-1), rtol=1e-4)


def test_figures_of_a_sweep(finished: Sweep) -> None:
    assert len(plot(finished).axes) == 4
    assert len(dose_response(finished).axes) == 1
    [ax] = sweep_profile(finished).axes
    reached = finished.score[1].max() if (finished.coherence[1] >= 85).all() else None
    heights = [p.get_height() for p in ax.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(heights) == 3
    assert reached is None or heights[1] == pytest.approx(reached)


def test_the_profile_away_from_a_trait_and_of_layers_that_break(tmp_path: Path) -> None:
    record = {
        "trait": "evil",
        "targets": [0, 1, 2],
        "strengths": [-2.0, -1.0],
        "score": [[10.0, 40.0], [float("nan"), 30.0], [0.0, 0.0]],
        "coherence": [[90.0, 95.0], [90.0, 90.0], [20.0, 30.0]],
        "coherence_floor": 85.0,
        "unsteered": 60.0,
        "reliability": [0.9, -0.2, None],
    }
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    [ax] = sweep_profile(Sweep(tmp_path)).axes
    heights = [p.get_height() for p in ax.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert heights[:2] == [10.0, 30.0]
    assert np.isnan(heights[2])
    assert [t.get_text() for t in ax.texts] == ["at -2", "at -1", "never coherent"]
    assert ax.get_ylim()[0] == pytest.approx(-20.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [99]}, "layer 99 does not exist"),
        ({"strengths": []}, "at least one layer and one strength"),
        ({"strengths": [math.nan]}, "strength is not a number"),
        ({"strengths": [1.0, 1.0]}, "given twice"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_is_sampled(
    pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path, change: dict[str, list[float]], message: str
) -> None:
    with pytest.raises(SteeringError, match=message):
        sweep(pocket, small_run.vectors, out=tmp_path / "s", **{"layers": [1], "strengths": [1.0], **change})
    assert not (tmp_path / "s").exists()
    with pytest.raises(SteeringError, match="samples must be at least 1"):
        SweepSettings(samples=0)
    for where in ("responses", torch.ones(1, 3, dtype=torch.bool)):
        with pytest.raises(SteeringError, match="asks single questions"):
            sweep(pocket, small_run.vectors, layers=[1], strengths=[1.0], out=tmp_path / "s", settings=replace(SMALL, where=where))
    assert isinstance(small_run.vectors, PersonaVectors)

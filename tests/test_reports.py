"""Reports and figures: self-contained, escaped, reproducible."""

import json
import re
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_lens.errors import RunFolderError
from persona_lens.extraction import ExtractionRun
from persona_lens.extraction.run import load_run, question_means
from persona_lens.figures import held_out_projections, plot, projections, score_histogram
from persona_lens.reports import report, verdict
from persona_lens.vectors import PersonaVectors

SIDES = {"positive": slice(0, 100), "negative": slice(100, 200), "neutral": slice(200, None)}


def test_a_report_is_one_file_that_loads_nothing(small_run: ExtractionRun) -> None:
    page = report(small_run).read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert page.count("<img ") == 3
    assert "blocks.7.hook_resid_post" in page
    assert (small_run.path / "figures" / "layers.png").read_bytes().startswith(b"\x89PNG")
    again = report(small_run).read_text(encoding="utf-8")
    assert page == again


def test_hostile_text_is_escaped(small_run: ExtractionRun, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(small_run.path, folder)
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:
        line["text"] = "<script>alert('x')</script>"
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(folder).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_an_unfinished_folder_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        report(tmp_path)


def test_held_out_projections_leave_the_question_out_of_its_direction(small_run: ExtractionRun) -> None:
    layer = 4
    found = held_out_projections(small_run, layer)
    cells, counts = small_run.means["independent.response_mean"], small_run.means["independent.counts"]
    kept = [q for q in range(20) if bool((counts.sum(1)[:, q] > 0).all())]
    means = question_means(cells, counts)[:, kept, layer].double()
    q = 2
    others = [k for k in range(len(kept)) if k != q]
    direction = (means[0, others] - means[1, others]).mean(0)
    expected = means[:, q] @ (direction / direction.norm())
    np.testing.assert_allclose(found[:, q], expected.numpy(), rtol=1e-9)
    assert (found[0] - found[1]).mean() > 0


def test_a_verdict_says_when_there_is_nothing(small_run: ExtractionRun) -> None:
    run = load_run(small_run.path)
    v = run.vectors
    nothing = PersonaVectors(
        v.trait,
        v.pooling,
        v.estimator,
        v.directions,
        v.differences,
        torch.zeros(8),
        torch.zeros(8),
        torch.full((8,), 0.4),
        0.4,
        v.provenance,
    )
    object.__setattr__(run, "vectors", nothing)
    assert verdict(run).startswith("No optimism direction was found (p = 0.4")
    assert "not reliable" in verdict(run)
    assert verdict(small_run).startswith("An optimism direction exists")


def test_plot_knows_its_records(small_run: ExtractionRun) -> None:
    assert len(plot(small_run.vectors).axes) == 2
    assert len(plot(small_run).axes) == 1
    with pytest.raises(TypeError, match="no figure for int"):
        plot(3)


@pytest.mark.parametrize(("value", "words"), [(0.91, "it is reliable"), (0.5, "usable with care"), (0.49, "not reliable")])
def test_a_verdict_grades_the_reliability(small_run: ExtractionRun, value: float, words: str) -> None:
    run = load_run(small_run.path)
    object.__setattr__(run, "vectors", replace(run.vectors, reliability=torch.full((8,), value)))
    assert words in verdict(run)


def test_hostile_traits_are_escaped(small_run: ExtractionRun, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(small_run.path, folder)
    trait = json.loads((folder / "trait.json").read_text())
    trait["description"] = "<b id=description>"
    trait["extraction_questions"] = [f"<b id=question> {q}" for q in trait["extraction_questions"]]
    trait["instructions"] = [{k: f"<b id=instruction> {v}" for k, v in pair.items()} for pair in trait["instructions"]]
    (folder / "trait.json").write_text(json.dumps(trait))
    page = report(folder).read_text()
    assert "<b id" not in page
    for what in ("description", "question", "instruction"):
        assert f"&lt;b id={what}&gt;" in page


def test_the_tables_hold_the_runs_numbers(small_run: ExtractionRun) -> None:
    page, v = report(small_run).read_text(), small_run.vectors
    for layer in range(8):
        numbers = f"{v.reliability[layer]:.3f}", f"{v.norm[layer]:.3f}", f"{v.directions[layer].norm():.3f}"
        cells = (layer, f"blocks.{layer}.hook_resid_post", *numbers, f"{v.p_value[layer]:.4f}")
        assert "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>" in page
    for c in small_run.summary["counts"]:
        kinds = ("polarity", "total", "kept", "off_trait", "incoherent", "empty", "unfinished", "unscored", "cut_off")
        assert "<tr>" + "".join(f"<td>{c[k]}</td>" for k in kinds) + "</tr>" in page


def test_examples_are_scored_answers_to_three_questions(small_run: ExtractionRun, tmp_path: Path) -> None:
    folder = tmp_path / "gaps"
    shutil.copytree(small_run.path, folder)
    lines = {n: [json.loads(line) for line in (folder / n).read_text().splitlines()] for n in ("rollouts.jsonl", "scores.jsonl")}
    order = sorted(range(220), key=lambda i: lines["rollouts.jsonl"][i]["prompt_id"][-2:])  # all answers to a question together
    rollouts, scores = ([records[i] for i in order] for records in lines.values())
    scores[0] |= {"trait": None, "coherence": None, "reason": "refused"}
    scores[1] |= {"coherence": None, "reason": "refused"}
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    (folder / "scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in scores))
    page = report(folder).read_text()
    for side in ("positive", "negative"):
        shown = re.findall(rf'<div class="answer {side}">.*?<b>(.*?)</b>', page)
        assert len(shown) == len(set(shown)) == 3
    assert not [r["text"] for r in rollouts[:2] if escape(r["text"]) in page]


def test_figures_show_the_layer_and_the_scores_asked_for(small_run: ExtractionRun) -> None:
    assert "blocks.2.hook_resid_post" in projections(small_run, 2).axes[0].get_xlabel()
    run = load_run(small_run.path)
    scores = [replace(s, trait=None, reason="refused") if i < 3 else s for i, s in enumerate(run.scores())]
    object.__setattr__(run, "scores", lambda: scores)
    legend = score_histogram(run).axes[0].get_legend()
    assert legend is not None
    sizes = {r: sum(s.trait is not None for s in scores[cut]) for r, cut in SIDES.items()}
    assert [t.get_text() for t in legend.get_texts()] == [f"{side} (n={n})" for side, n in sizes.items()]


def test_runs_of_before_reasons_were_counted_have_reports(small_run: ExtractionRun, tmp_path: Path) -> None:
    shutil.copytree(small_run.path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "summary.json").read_text())
    record["counts"] = [{k: v for k, v in c.items() if k not in ("unfinished", "reasons")} for c in record["counts"]]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(record))
    assert "still thinking" in report(tmp_path / "run").read_text()
    record["counts"][0]["reasons"] = {"no <number>": 3, "b": 2, "c": 1, "d": 1}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(record))
    assert "Without score (positive): 3 x no &lt;number&gt;, 2 x b, 1 x c, ...." in report(tmp_path / "run").read_text()

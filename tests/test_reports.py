"""Reports and figures: self-contained, escaped, reproducible."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_lens.errors import RunFolderError
from persona_lens.extraction import ExtractionRun
from persona_lens.extraction.run import load_run, question_means
from persona_lens.figures import held_out_projections, plot
from persona_lens.reports import report, verdict
from persona_lens.vectors import PersonaVectors


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
    with pytest.raises(RunFolderError, match="no such file"):
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

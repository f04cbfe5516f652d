"""The paper's experiments in one command: what is listed, what is kept, and how the report tells agreement from difference."""

from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from persona_lens.cli import app
from persona_lens.errors import PersonaLensError, RunFolderError, UnknownNameError
from persona_lens.evaluation import TraitScore
from persona_lens.models import ChatModel
from persona_lens.records import decoded, encoded
from persona_lens.reproduction import FIGURES, FULL, QUICK, Finding, Row, load_reproduction, reproduce, run
from persona_lens.reproduction.figures import bars, score_map
from persona_lens.reproduction.finding import Found, above, surely_above
from persona_lens.reproduction.finetuning import difference
from persona_lens.reproduction.page import page, sentence

MANIFEST = {"arguments": {"scale": "full"}, "versions": {"torch": "2"}, "git_revision": "abc", "model": {"name": "pocket"}}


def test_every_figure_has_an_experiment_or_a_reason_why_not() -> None:
    keys = [f.key for f in FIGURES]
    assert len(set(keys)) == len(keys)
    assert set(run.EXPERIMENTS) == {f.key for f in FIGURES if f.absent is None}
    assert {f.key for f in FIGURES if f.absent} >= {"chat-data", "dictionary"}
    assert [f.key for f in run.planned(FULL)] == [k for k in keys if k in run.EXPERIMENTS]
    assert {f.key for f in run.planned(QUICK)} == set(run.EXPERIMENTS) - set(run.ONLY_FULL)


def test_an_unknown_figure_or_one_of_another_scale_is_an_error_that_names_the_known() -> None:
    with pytest.raises(UnknownNameError, match="did you mean steering"):
        run.planned(FULL, ["steerin"])
    with pytest.raises(UnknownNameError, match="figure of the quick reproduction 'rivals'"):
        run.planned(QUICK, ["rivals"])


def test_a_claim_holds_by_its_rule() -> None:
    assert above("r", (0.8, 0.7, 0.9), 0.76, rule="x").holds is True
    assert above("r", (0.75, 0.7, 0.9), 0.76, rule="x").holds is False
    assert above("r", (nan, nan, nan), 0.76, rule="x").holds is None
    assert surely_above("d", (5.0, 0.1, 9.9), 0.0, rule="x").holds is True
    assert surely_above("d", (5.0, -0.1, 9.9), 0.0, rule="x").holds is False
    assert surely_above("d", (5.0, nan, nan), 0.0, rule="x").holds is None


def test_figures_are_written_with_their_interval_or_none() -> None:
    assert Row("r", 0.8123, 0.7, 0.9).figure == "0.81 [0.70, 0.90]"
    assert Row("points", 5.04, 1.25, 12.02).figure == "5.0 [1.2, 12.0]"
    assert Row("layer", 7.0).figure == "7"
    assert [Row("p", p).figure for p in (0.004, 0.0005, 0.0, 0.2)] == ["0.004", "< 0.001", "0.00", "0.20"]
    assert Row("nothing", nan).figure == "-"
    assert [Row("x", 1.0, holds=h).verdict for h in (True, False, None)] == ["holds", "fails", ""]
    assert [Row("x", 1.0, paper="91", holds=h).verdict for h in (True, False, None)] == ["agrees", "differs", ""]


def test_rows_without_a_rule_do_not_count() -> None:
    rows = (Row("a", 1.0, holds=True), Row("b", 1.0, holds=False), Row("c", 1.0))
    assert Finding("steering", rows, "", ()).holding == (1, 2)


def test_the_difference_of_scores_is_taken_question_by_question() -> None:
    rng = np.random.default_rng(0)
    easy = rng.uniform(0, 60, 20)
    before = TraitScore("evil", easy, easy, 0)
    after = TraitScore("evil", np.where(np.arange(20) == 3, np.nan, easy + 20 + rng.normal(0, 1, 20)), easy, 0)
    mean, low, high = difference(after, before)
    assert low < 20 < high
    assert high - low < 2, "the questions' own levels cancel"
    assert mean == pytest.approx(20, abs=1)
    zero = difference(before, TraitScore("evil", easy + rng.normal(0, 5, 20), easy, 0))
    assert zero[1] < 0 < zero[2]


def test_the_sentence_says_what_agrees_and_what_does_not() -> None:
    yes, no, open_ = Row("a", 1.0, holds=True), Row("b", 1.0, holds=False), Row("c", 1.0)
    assert sentence([yes, open_]) == "All of it holds."
    assert sentence([yes, no]) == "Does not hold: b. The rest holds."
    assert sentence([no]) == "Does not hold: b."
    assert sentence([open_]) == "Nothing to hold against."


def test_the_report_has_every_row_every_figure_and_those_without_a_counterpart() -> None:
    rises = Row("<evil> rises", 12.0, 10.0, 14.0, "91", "interval above 0", True)
    rows = (rises, Row("other", 0.5, 0.4, 0.6, rule="x", holds=False))
    findings = {"steering": Finding("steering", rows, "It is so.", (("a.png", "A caption."),))}
    text = page(findings, {"a.png": b"\x89PNG"}, MANIFEST)
    for part in ("&lt;evil&gt; rises", "12 [10, 14]", "1 of 2", "1 of 2 claims hold", "A caption.", "It is so.", "Figure 3"):
        assert part in text
    assert "Does not hold: other. The rest holds." in text
    for figure in FIGURES:
        assert (figure.title in text) == (figure.key == "steering" or bool(figure.absent))
    assert "Quick scale" not in text
    assert "Quick scale" in page(findings, {"a.png": b""}, {**MANIFEST, "arguments": {"scale": "quick"}})
    assert decoded(Finding, encoded(findings["steering"])) == findings["steering"]


def test_what_is_done_is_kept_and_more_can_be_added(pocket: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def experiment(key: str) -> run.Experiment:
        def done(bench: object) -> Found:
            ran.append(key)
            if key == "cosines" and ran.count(key) == 1:
                raise KeyboardInterrupt
            figure = score_map({"base": {"evil": 1.0}})
            return Found([Row(f"claim of {key}", 1.0, rule="x", holds=key != "shift")], "So it is.", {"map": (figure, "A map.")})

        return done

    monkeypatch.setattr(run, "EXPERIMENTS", {key: experiment(key) for key in run.EXPERIMENTS})
    told: list[str] = []
    found = reproduce(pocket, scale=QUICK, only=["steering", "shift"], out=tmp_path, told=told.append)
    assert ran == ["steering", "shift"]
    assert told[-1] == "[2/2] Figure 6: The shift along the vector goes with the trait after finetuning: 0 of 1 claims hold"
    assert list(found.findings) == ["steering", "shift"]
    with pytest.raises(KeyboardInterrupt):
        reproduce(pocket, scale=QUICK, out=tmp_path)
    found = reproduce(pocket, scale=QUICK, out=tmp_path)
    assert sorted(ran) == sorted([*(f.key for f in run.planned(QUICK)), "cosines"]), (
        "nothing is done twice but what was interrupted"
    )
    assert list(load_reproduction(tmp_path).findings) == [f.key for f in run.planned(QUICK)]
    text = found.report.read_text()
    assert all(f"claim of {key}" in text for key in found.findings)
    assert text.count("data:image/png") == len(found.findings)
    found.report.unlink()
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    assert found.report.read_text() == text
    with pytest.raises(RunFolderError, match="scale"):
        reproduce(pocket, scale=FULL, out=tmp_path)


def test_other_models_have_no_ground_truth_and_are_refused(pocket: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(PersonaLensError, match="is no pocket model"):
        reproduce(replace(pocket, trait_set="real"), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_lists_the_figures() -> None:
    listed = CliRunner().invoke(app, ["reproduce", "--list"])
    assert listed.exit_code == 0
    assert all(f.key in listed.output for f in FIGURES)
    assert "not here: no dictionary has been trained" in listed.output


def test_bars_stand_where_their_figures_are() -> None:
    figure = bars({"evil": {"a": (10.0, 5.0, 15.0), "b": (-4.0, -6.0, -2.0)}}, "points")
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights == [10.0, -4.0]


@pytest.mark.slow
def test_the_quick_reproduction_runs(pocket: ChatModel, tmp_path: Path) -> None:
    found = reproduce(pocket, scale=QUICK, out=tmp_path)
    assert list(found.findings) == [f.key for f in run.planned(QUICK)]
    assert all(f.rows for f in found.findings.values())
    extraction = found.findings["extraction"]
    assert extraction.holding == (6, 6), "reliable directions that exist, for three traits"

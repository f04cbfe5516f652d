"""Figures and reports of finetuning, over records made by hand: what they show, hostile names, and parts that are not there."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from safetensors.torch import save_file

from persona_lens.correlation import Floor, ShiftCorrelation
from persona_lens.errors import FinetuningError
from persona_lens.evaluation import TraitScore
from persona_lens.figures import plot
from persona_lens.figures.finetuning import (
    COLOURS,
    MARKS,
    defence_frontier,
    most_risen,
    shift_profile,
    shift_scatter,
    side_effects,
    training_curves,
)
from persona_lens.figures.monitoring import printed
from persona_lens.figures.style import png
from persona_lens.finetuning import READINGS, Comparison, Finetuned, Pilot, ShiftRun, foretold
from persona_lens.finetuning.comparison import Cell
from persona_lens.finetuning.pilot import Tried
from persona_lens.finetuning.shift import Shift
from persona_lens.monitoring.rendering import visible
from persona_lens.records import encoded
from persona_lens.reliability import mean_interval
from persona_lens.reports import comparison_verdict, finetune_verdict, pilot_verdict, report, shift_verdict
from persona_lens.store import RunFolder, read_json, write_json

HOSTILE = "<script>alert('$x$')<b>\u202e"
SEEN = escape(visible(HOSTILE))
MODEL = {"name": "<i>pocket", "n_layers": 3, "d_model": 6}
QUESTIONS, LAYERS, WIDTH = 8, 3, 6
READ = ("last prompt token", "base model&#x27;s answers", "own answers (nearly circular)")


def opened(out: Path, command: str, **arguments: Any) -> Path:
    RunFolder.open(out, command=command, arguments=arguments, model=MODEL)
    return out


def changed(run: Any, name: str, change: Callable[[dict[str, Any]], object]) -> Any:
    """The same folder after a change of one of its records."""
    record = read_json(run.path / name)
    change(record)
    write_json(run.path / name, record)
    return type(run)(run.path)


def words(page: Path) -> str:
    """The words of a page that loads nothing, holds no hostile markup, and calls nothing nan; its images were written too."""
    text = page.read_text(encoding="utf-8")
    images = text.count('src="data:image/png;base64,')
    assert 0 < text.count("<img ") == images <= len(list((page.parent / "figures").glob("*.png")))
    text = re.sub(r'src="data:image/png;base64,[^"]*"', "", text)
    assert not re.findall(r'(?:src|href)="', text)
    assert "<script" not in text
    assert "<i>" not in text
    assert not re.search(r"\b(nan|inf)\b", text)
    return text


def cells(*row: object) -> str:
    return "<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>"


def head(*names: str) -> str:
    return "<tr>" + "".join(f"<th>{n}</th>" for n in names) + "</tr>"


def interval(values: np.ndarray, form: str) -> str:
    mean, (low, high) = mean_interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def legends(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def shown(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax.get_visible()]


def lines_of(ax: Axes, label: str) -> list[Any]:
    return [line for line in ax.lines if line.get_label() == label]


def bars_of(ax: Axes, label: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]], Any]:
    """The points of an error bar, the ends of its bars, and its line."""
    (found,) = [c for c in ax.containers if isinstance(c, ErrorbarContainer) and c.get_label() == label]
    line, _, bars = found.lines
    ends = [(float(s[0][1]), float(s[1][1])) for s in bars[0].get_segments() if len(s)]
    return [(float(x), float(y)) for x, y in line.get_xydata()], ends, line


def of(trait: str, mean: float, seed: int = 0, coherence: float = 97.0, gaps: int = 0) -> TraitScore:
    """Scores of a given mean that differ from question to question."""
    spread = np.random.default_rng([seed, int(mean)]).normal(0, 4, QUESTIONS)
    return TraitScore(trait, mean + spread - spread.mean(), np.full(QUESTIONS, coherence), gaps)


# A training


def trained(out: Path, steps: int = 40, watch: Sequence[str] = ("evil/2", "a/b/1"), **arguments: Any) -> Finetuned:
    opened(
        out,
        "finetune",
        **(
            {"prevent": ["add evil [ab]"], "penalties": [f"0.1 x {HOSTILE}"], "settings": {"rank": 32, "targets": ["<i>q"]}}
            | arguments
        ),
    )
    history = [
        {"step": float(s + 1), "loss": 3.0 - 0.05 * s, "learning_rate": 1e-3}
        | {f"projection/{w}": 0.5 * s + k for k, w in enumerate(watch)}
        | {f"derivative/{w}": -0.01 * s for w in watch}
        for s in range(steps)
    ]
    skipped = [{"place": 3, "reason": "unknown role '<i>'"}]
    record = {"result": "adapter", "rows": 64, "skipped": skipped, "prevent": f"hooks: x\n  add {HOSTILE}", "history": history}
    write_json(out / "training.json", record)
    return Finetuned(out)


def test_a_training_is_drawn_step_by_step(run_folder: Path) -> None:
    run = trained(run_folder)
    figure = plot(run)
    loss, *watched = figure.axes
    steps = np.arange(1, 41)
    np.testing.assert_allclose(lines_of(loss, "loss")[0].get_xydata(), np.stack([steps, 3.0 - 0.05 * (steps - 1)], 1))
    assert "nats per token" in loss.get_ylabel()
    assert loss.get_title() == "training loss with penalties, each step on its own conversations"
    assert len(watched) == 4
    for k, (name, layer) in enumerate((("evil", 2), ("a/b", 1))):
        projection, derivative = watched[2 * k : 2 * k + 2]
        expected = [0.5 * (steps - 1) + k, -0.01 * (steps - 1)]
        for ax, kind, values in zip((projection, derivative), ("projection", "derivative"), expected, strict=True):
            assert ax.get_title() == f"{name}, blocks.{layer}.hook_resid_post"
            assert ax.get_ylabel().startswith(kind)
            np.testing.assert_allclose(lines_of(ax, f"{kind}/{name}/{layer}")[0].get_xydata(), np.stack([steps, values], 1))
        assert len(lines_of(derivative, "zero")) == 1
        assert not lines_of(projection, "zero")
    assert loss.get_position().width > 1.5 * watched[0].get_position().width


def test_what_was_not_watched_is_not_drawn(run_folder: Path) -> None:
    run = trained(run_folder, watch=())
    assert len(training_curves(run).axes) == 1

    def half(record: dict[str, Any]) -> None:
        for step in record["history"][5:]:
            step["projection/evil/2"] = 1.0

    figure = training_curves(changed(run, "training.json", half))
    assert len(shown(figure)) == 2
    assert lines_of(shown(figure)[1], "projection/evil/2")[0].get_xdata().tolist() == list(range(6, 41))


def test_the_page_of_a_training(run_folder: Path) -> None:
    run = trained(run_folder)
    text = words(report(run_folder))
    said = finetune_verdict(run)
    assert escape(said) in text
    assert said == (
        "Trained for 40 steps on 64 conversations with 1 intervention acting. Mean training loss with penalties over the first and "
        "the last 4 steps: 2.925 and 1.125 nats per token. The answers' mean projections over the same steps: evil at layer 2 "
        "+0.75 to +18.75, a/b at layer 1 +1.75 to +19.75 (residual units). 1 row was skipped."
    )
    assert cells("evil", "blocks.2.hook_resid_post", "projection", "+0.75", "+18.75") in text
    assert cells("a/b", "blocks.1.hook_resid_post", "derivative", "-0.015", "-0.375") in text
    assert f"Penalties on the loss: 0.1 x {SEEN}. Afterwards nothing acts." in text
    assert f"<div>add {SEEN}</div>" in text
    assert cells("targets", "['<i>q']") in text
    assert cells(3, "unknown role '<i>'") in text
    assert cells("name", "<i>pocket") in text


def test_a_short_training_without_anything_says_so(run_folder: Path) -> None:
    run = trained(run_folder, steps=3, watch=(), prevent=[], penalties=[])
    run = changed(run, "training.json", lambda r: r.update(skipped=[]))
    text = words(report(run))
    assert training_curves(run).axes[0].get_title().startswith("training loss, ")
    assert finetune_verdict(run) == (
        "Trained for 3 steps on 64 conversations without any intervention. Mean training loss at the first and at the last step: "
        "3.000 and 2.900 nats per token."
    )
    assert "Penalties on the loss: none." in text
    assert "Rows that were skipped" not in text
    assert "Derivative" not in text
    many = changed(run, "training.json", lambda r: r.update(skipped=[{"place": i, "reason": "x"} for i in range(1, 31)]))
    text = words(report(many))
    assert "30, the first 20 of them" in text
    assert cells(20, "x") in text
    assert cells(21, "x") not in text
    assert "30 rows were skipped." in finetune_verdict(many)


# Shifts


@dataclass(frozen=True)
class Shifted:
    """Made-up shifts: every family moves all traits by its own amount along a direction, and the score follows."""

    traits: tuple[str, ...] = ("evil", "humor")
    names: tuple[str, ...] = tuple(f"{family}-{level}" for family in ("a", "b_c", "d", "e", "f", "g", "h") for level in ("I", "II"))
    seed: int = 0

    def save(self, out: Path, scores: bool = True) -> ShiftRun:
        rng = np.random.default_rng(self.seed)
        opened(out, "shift", judge="<i>oracle" if scores else None)
        n = len(self.traits)
        units = torch.from_numpy(rng.normal(size=(n, LAYERS, WIDTH))).float()
        units /= units.norm(dim=-1, keepdim=True)
        save_file({"unit": units}, out / "directions.safetensors")
        layers = {t: (2, 1)[i % 2] for i, t in enumerate(self.traits)}
        (out / "base").mkdir()
        base = {r: torch.from_numpy(rng.normal(size=(QUESTIONS * n, LAYERS, WIDTH))).float() for r in READINGS}
        save_file(base, out / "base" / "residuals.safetensors")
        before = [of(t, 10.0 + 5 * i) for i, t in enumerate(self.traits)]
        write_json(out / "base" / "scores.json", {"scores": encoded(before) if scores else []})
        for place, name in enumerate(self.names):
            change = {r: rng.normal(size=(n, QUESTIONS, LAYERS, WIDTH)) * (1 + 2 * k) for k, r in enumerate(READINGS)}
            for moved in change.values():
                moved += 0.5 * place * units.double().numpy()[:, None]
            projection = {r: np.einsum("tqld,tld->tlq", x, units.double().numpy()) for r, x in change.items()}
            after = [of(t, 15.0 + 4 * place + (-1) ** place * i, place) for i, t in enumerate(self.traits)] if scores else []
            record = encoded(Shift(name, projection, tuple(after)))
            write_json(out / f"shift-{name}.json", {"weights": "w", **record})
            save_file(
                {r: torch.from_numpy(x.mean(1)).float().contiguous() for r, x in change.items()}, out / f"shift-{name}.safetensors"
            )
        write_json(out / "shift.json", {"traits": list(self.traits), "names": list(self.names), "layers": layers})
        return ShiftRun(out)


def test_a_shift_is_drawn_layer_by_layer_with_intervals(run_folder: Path) -> None:
    run = Shifted(names=("a-I", HOSTILE)).save(run_folder)
    figure = shift_profile(run, HOSTILE)
    assert figure.get_suptitle() == f"shift of {printed(HOSTILE)}"
    assert len(shown(figure)) == 2
    for k, (ax, trait) in enumerate(zip(shown(figure), run.traits, strict=True)):
        before, after = run.base_scores[k].mean, run.shifts[HOSTILE].scores[k].mean
        assert ax.get_title() == f"{trait}: score {before:.0f} before, {after:.0f} after"
        for reading in READINGS:
            values = run.shifts[HOSTILE].projection[reading][k]
            (line,) = lines_of(ax, reading)
            np.testing.assert_allclose(line.get_ydata(), values.mean(-1))
            (band,) = [c for c in ax.collections if c.get_label() == reading]
            edges = np.unique(np.round(band.get_paths()[0].vertices[:, 1], 9))
            expected = [end for layer in values for end in mean_interval(layer)[1]]
            np.testing.assert_allclose(edges, np.unique(np.round(expected, 9)))
        assert lines_of(ax, "most reliable")[0].get_xdata()[0] == run.layers[trait]
        assert "blocks.{l}.hook_resid_post" in ax.get_xlabel()
    assert legends(figure)[:3] == ["last prompt token", "base model's answers", "own answers (nearly circular)"]


def test_models_are_dots_coloured_by_family_beside_r_and_what_random_directions_reach(run_folder: Path) -> None:
    run = Shifted().save(run_folder)
    for reading in ("prompt_last", "base_answers"):
        found = foretold(run, reading)
        figure = shift_scatter(run, reading)
        assert len(shown(figure)) == 2
        for k, (ax, trait) in enumerate(zip(shown(figure), run.traits, strict=True)):
            layer, c = run.layers[trait], found[trait]
            for i, name in enumerate(run.names):
                (dot,) = lines_of(ax, name)
                at = run.shifts[name].projection[reading][k, layer].mean(), run.shifts[name].scores[k].mean
                np.testing.assert_allclose(dot.get_xydata()[0], at)
                assert (dot.get_color(), dot.get_marker()) == (COLOURS[i // 2], MARKS[i // 2])
            assert lines_of(ax, "base model")[0].get_ydata()[0] == pytest.approx(run.base_scores[k].mean)
            first, second, third = ax.get_title().splitlines()
            assert first == f"{trait}, layer {layer}"
            assert second == f"r {c.r:+.2f} [{c.low:+.2f}, {c.high:+.2f}]"
            assert third == f"random: {c.floors[0].high:.2f} (base), {c.floors[1].high:.2f} (shifts)"
        assert legends(figure) == ["a", "b_c", "d", "e", "f", "g", "h", "base model"]
        assert "97.5th percentile of r" in figure.legends[0].get_title().get_text()
        assert (
            shown(figure)[0]
            .get_xlabel()
            .startswith({"prompt_last": "shift, last prompt token", "base_answers": "shift, base model's answers"}[reading])
        )


def test_several_runs_are_drawn_and_correlated_together(tmp_path: Path) -> None:
    whole = Shifted().save(tmp_path / "whole")
    half = Shifted().save(tmp_path / "half")
    first = changed(whole, "shift.json", lambda r: r.update(names=r["names"][:7]))
    second = changed(half, "shift.json", lambda r: r.update(names=r["names"][7:]))
    both = shift_scatter([first, second])
    changed(whole, "shift.json", lambda r: r.update(names=list(Shifted().names)))
    assert [ax.get_title() for ax in both.axes] == [ax.get_title() for ax in shift_scatter(ShiftRun(whole.path)).axes]
    assert {str(line.get_label()) for line in both.axes[0].lines} >= set(Shifted().names)
    with pytest.raises(FinetuningError, match="other vectors"):
        shift_scatter([first, Shifted(seed=1).save(tmp_path / "other")])


def test_a_family_may_be_read_otherwise(run_folder: Path) -> None:
    figure = shift_scatter(Shifted().save(run_folder), family=lambda name: "even" if name.endswith("II") else "odd")
    assert legends(figure) == ["even", "odd", "base model"]
    assert figure.axes[0].get_title() == "evil, layer 2"


@pytest.mark.parametrize(
    ("names", "told"),
    [(("a-I", "b-I", "c-I", "d-I", "e-I"), "5 of 5"), (tuple(f"{f}-{i}" for f in "abc" for i in "xyz"), "9 of 3")],
)
def test_too_few_models_have_no_r(run_folder: Path, names: tuple[str, ...], told: str) -> None:
    run = Shifted(names=names).save(run_folder)
    figure = plot(run)
    assert [ax.get_title() for ax in shown(figure)] == ["evil, layer 2", "humor, layer 1"]
    assert len([line for line in figure.axes[0].lines if line.get_label() in names]) == len(names)
    assert "random" not in figure.legends[0].get_title().get_text()
    text = words(report(run))
    few = f"No correlations: they need 6 finetuned models of 4 families, these are {told}."
    assert text.count(few) == 3
    assert "<th>r</th>" not in text
    assert "random directions" not in text
    said = shift_verdict(run)
    assert said.endswith(few)
    assert f" {len(names) - 3} more models are in the report." in said
    assert said.count("moved by") == 3


def test_one_model_alone_is_told_by_itself(run_folder: Path) -> None:
    run = Shifted(names=(HOSTILE,)).save(run_folder)
    assert plot(run).get_suptitle().startswith("shift of")
    text = words(report(run_folder))
    assert [p.name for p in (run_folder / "figures").iterdir()] == ["profile.png"]
    before, after = run.base_scores[0], run.shifts[HOSTILE].scores[0]
    along, other = (run.shifts[HOSTILE].projection["prompt_last"][k, run.layers[t]] for k, t in enumerate(run.traits))
    moved = sum(np.sign(low) == np.sign(high) for low, high in (mean_interval(x)[1] for x in (along, other)))
    said = shift_verdict(run)
    assert said == (
        f"{visible(HOSTILE)} moved by {interval(along, '+.3g')} along evil, of 2 traits the one whose score rises most (last "
        f"prompt token, layer 2), and its score goes from {before.mean:.0f} to {after.mean:.0f} (change "
        f"{interval(after.score - before.score, '+.1f')}). Its shift is other than zero for {moved} of 2 traits (95 % over "
        "questions, not corrected)."
    )
    assert escape(said) in text
    assert f"<h3>{SEEN}</h3>" in text
    assert head("trait", "hook", *READ, "score before", "after", "change") in text
    for k, (trait, layer) in enumerate((("evil", 2), ("humor", 1))):
        shifts = [interval(run.shifts[HOSTILE].projection[r][k, layer], "+z.3g") for r in READINGS]
        scores = run.base_scores[k].score, run.shifts[HOSTILE].scores[k].score
        told = [interval(s, "z.0f") for s in scores]
        row = cells(trait, f"blocks.{layer}.hook_resid_post", *shifts, *told, interval(scores[1] - scores[0], "+z.1f"))
        assert row in text
    assert "Own answers are nearly circular" in text
    assert "judge &lt;i&gt;oracle" in text
    assert "foretell" not in text


def test_shifts_without_a_judge(run_folder: Path) -> None:
    run = Shifted().save(run_folder, scores=False)
    figure = plot(run)
    for k, ax in enumerate(shown(figure)):
        values = [run.shifts[n].projection["prompt_last"][k, run.layers[run.traits[k]]] for n in run.names]
        found = [c for c in ax.containers if isinstance(c, ErrorbarContainer)]
        assert [c.get_label() for c in found] == list(run.names)
        np.testing.assert_allclose([c.lines[0].get_xydata()[0] for c in found], [(v.mean(), i) for i, v in enumerate(values)])
        ends = [c.lines[2][0].get_segments()[0][:, 0] for c in found]
        np.testing.assert_allclose(ends, [mean_interval(v)[1] for v in values])
        assert [t.get_text() for t in ax.get_yticklabels()] == list(run.names)
    text = words(report(run))
    assert "No correlations: the answers were not scored." in text
    assert head("trait", "hook", *READ) in text
    assert "judge none" in text
    assert "the answers were not scored. Its shift" in shift_verdict(run)
    alone = changed(run, "shift.json", lambda r: r.update(names=["h-II"]))
    (by,) = {max(range(2), key=lambda k: abs(alone.shifts["h-II"].projection["prompt_last"][k, (2, 1)[k]].mean()))}
    assert f"along {run.traits[by]}, of 2 traits the one with the largest shift" in shift_verdict(alone)
    assert shift_profile(alone, "h-II").axes[0].get_title() == "evil"
    words(report(alone))


def test_the_page_of_shifts_has_r_beside_its_nulls(run_folder: Path) -> None:
    run = Shifted().save(run_folder)
    text = words(report(run_folder))
    assert sorted(p.name for p in (run_folder / "figures").iterdir()) == ["scatter.png", "scatter_base_answers.png"]
    for name, reading in (("scatter", "prompt_last"), ("scatter_base_answers", "base_answers")):
        assert (run_folder / "figures" / f"{name}.png").read_bytes() == png(shift_scatter(run, reading))
    assert escape(shift_verdict(run)) in text
    assert head("trait", "hook", "r", "base: high", "base: p", "shifts: high", "shifts: p", "models", "families") in text
    for reading in ("prompt_last", "base_answers"):
        found = foretold(run, reading)
        for trait, layer in run.layers.items():
            c = found[trait]
            floors = [x for f in c.floors for x in (f"{f.high:.2f}", f"{f.p_value:.2g}")]
            r = f"{c.r:+.2f} [{c.low:+.2f}, {c.high:+.2f}]"
            assert cells(trait, f"blocks.{layer}.hook_resid_post", r, *floors, 14, 7) in text
        evil, humor = found["evil"], found["humor"]
        assert cells("evil", f"{evil.r:+.2f}", f"{evil.others['humor']:+.2f}") in text
        assert cells("humor", f"{humor.others['evil']:+.2f}", f"{humor.r:+.2f}") in text
    assert "<h3>Own answers" not in text
    assert "A high r alone (the paper&#x27;s figure) is no evidence for a persona direction" in text
    assert "there is none below 7 families, nor where scores span less than 20 points" in text
    assert "Own answers are nearly circular" in text
    assert "a (2), b_c (2), d (2)" in text
    assert "No correlations" not in text
    assert "Left out" not in text


def planted(monkeypatch: pytest.MonkeyPatch, **found: ShiftCorrelation) -> None:
    monkeypatch.setattr("persona_lens.reports.finetuning.correlations", lambda runs, reading: (found, ""))


def r_of(r: float, low: float, high: float, *p: float, **others: float) -> ShiftCorrelation:
    floors = tuple(Floor(kind, 1000, 0.4, 0.7, x) for kind, x in zip(("base", "shifts"), p, strict=True))
    return ShiftCorrelation(r, low, high, 14, 7, floors, others)


def test_a_verdict_on_r_says_what_the_nulls_say(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Shifted().save(run_folder)
    nan = float("nan")
    planted(monkeypatch, evil=r_of(0.9, 0.7, 0.95, 0.001, 0.01, x=0.5, y=nan), humor=r_of(0.3, -0.2, 0.7, 0.5, 0.5, x=0.9))
    assert shift_verdict(run) == (
        "Over 14 finetuned models of 7 families, the shift (last prompt token) goes with the trait score afterwards for 1 of 2 "
        "traits (95 % interval of r above 0); r: evil +0.90 [+0.70, +0.95], humor +0.30 [-0.20, +0.70]. Random directions rarely "
        "reach as much (p < .05 each, drawn with the covariance of the base model's residuals and with that of the shifts)."
    )
    planted(monkeypatch, evil=r_of(0.9, 0.7, 0.95, 0.001, 0.06), humor=r_of(0.6, 0.2, 0.7, 0.001, 0.001, x=-0.6))
    said = shift_verdict(run, "base_answers")
    assert "(base model's answers) goes with the trait score afterwards for 2 of 2 traits" in said
    assert "Random directions reach as much (p not below .05" in said
    assert "for evil: there r is no evidence for a persona direction. Another trait's vector does as well for humor." in said
    assert "rarely" not in said
    planted(monkeypatch, evil=r_of(0.9, nan, nan, 0.001, 0.001), humor=r_of(-0.6, -0.8, -0.2, 0.001, 0.001))
    said = shift_verdict(run)
    assert "for 0 of 2 traits" in said
    assert "r: evil +0.90, humor -0.60 [-0.80, -0.20]. There is no interval for evil." in said
    assert "andom directions" not in said
    planted(monkeypatch, evil=r_of(nan, nan, nan, nan, nan), humor=r_of(0.6, 0.2, 0.7, nan, 0.001))
    said = shift_verdict(run)
    assert "r: evil -, humor" in said
    assert "for humor: there r is no evidence" in said


def test_models_that_lack_a_number_are_left_out_and_told(run_folder: Path) -> None:
    run = Shifted().save(run_folder)

    def unscored(record: dict[str, Any]) -> None:
        record["scores"][1]["score"] = [None] * QUESTIONS

    def unread(record: dict[str, Any]) -> None:
        record["projection"]["base_answers"][0][2][3] = None

    changed(run, "shift-a-I.json", unscored)
    run = changed(run, "shift-d-I.json", unread)
    assert "r " in shift_scatter(run, "base_answers").axes[0].get_title()
    text = words(report(run))
    assert "Left out, since a score or a shift is missing: 1 of 14 models." in shift_verdict(run)
    assert "Left out, since a score or a shift is missing: 2 of 14 models." in text
    c = foretold(run, "base_answers", chosen=lambda n: n not in ("a-I", "d-I"))["evil"]
    assert f"<td>{c.r:+.2f} [{c.low:+.2f}, {c.high:+.2f}]</td>" in text
    row = run.shifts["d-I"].projection["base_answers"][0, 2]
    assert interval(row[np.isfinite(row)], "+z.3g") in text
    after = run.shifts["a-I"].scores[0]
    lacking = interval(after.score, "z.0f"), interval(after.score - run.base_scores[0].score, "+z.1f")
    assert "".join(f"<td>{x}</td>" for x in lacking) in text
    assert f"<td>{interval(run.base_scores[1].score, '.0f')}</td><td>-</td><td>-</td></tr>" in text


def test_an_unknown_reading_is_refused(run_folder: Path) -> None:
    run = Shifted(names=("a-I", "b-I")).save(run_folder)
    unknown: Any = "answers"
    with pytest.raises((FinetuningError, TypeError)):  # a type checker may refuse it first
        shift_scatter(run, unknown)


# Defences


def cell(name: str, dose: float, *means: float, coherence: float = 97.0, **more: Any) -> Cell:
    scores = tuple(of(t, m, int(10 * dose), coherence) for t, m in zip(("humor", "evil", HOSTILE), means, strict=True))
    fields: dict[str, Any] = {
        "capability": {"sums": {"acc": 0.9 - 0.1 * dose}},
        "task": 0.1 * dose,
        "held_out_loss": 2.0 - 0.1 * dose,
    }
    return Cell(name, float(dose), scores, **(fields | more))


CELLS = (
    cell("base model", 0.0, 10, 5, 30, task=0.05),
    cell("ordinary finetuning", 0.0, 20, 75, 20, task=0.95, coherence=90.0),
    cell("vaccine", 2.0, 12, 10, 28),
    cell("_hidden $\\frac{1$", 0.01, 15, 74, 25),
    cell("vaccine", 1.0, 14, 40, 26),
    cell("vaccine", 3.0, 11, 30, 28, coherence=60.0),
    cell(HOSTILE, 1.0, 14, 50, 26),
)


def compared(out: Path, found: Sequence[Cell] = CELLS, task: str | None = "facts <i>") -> Comparison:
    opened(out, "defend", judge="<i>oracle")
    traits = [s.trait for s in found[0].scores]
    write_json(out / "comparison.json", {"traits": traits, "task": task, "cells": encoded(list(found))})
    return Comparison(out)


@pytest.mark.filterwarnings("error")
def test_defences_are_drawn_by_dose_beside_base_and_ordinary(run_folder: Path) -> None:
    comparison = compared(run_folder)
    assert most_risen(comparison) == "evil"
    figure = plot(comparison)
    figure.draw_without_rendering()
    titles = [
        "evil score (0-100)",
        "coherence (0-100), all traits",
        "capability",
        "task: facts <i>",
        "held-out loss (nats per token)",
    ]
    assert [ax.get_title() for ax in shown(figure)] == titles
    values: list[Callable[[Cell], float]] = [
        lambda c: c.of("evil").mean,
        lambda c: c.coherence,
        lambda c: c.capability["sums"]["acc"],
        lambda c: c.task or 0.0,
        lambda c: c.held_out_loss,
    ]
    doses = {"vaccine": (4, 2, 5), "_hidden $\\frac{1$": (3,), HOSTILE: (6,)}
    for ax, of_cell in zip(shown(figure), values, strict=True):
        colours = set()
        for name, places in doses.items():
            points, ends, line = bars_of(ax, name)
            np.testing.assert_allclose(points, [(CELLS[i].dose, of_cell(CELLS[i])) for i in places])
            assert line.get_linestyle() == ("-" if len(places) > 1 else "None")
            colours.add((line.get_color(), line.get_marker()))
            if ax is figure.axes[0]:
                np.testing.assert_allclose(ends, [mean_interval(CELLS[i].of("evil").score)[1] for i in places])
            else:
                assert not np.isfinite(ends).any()
        assert len(colours) == 3
        for i, style in ((0, ":"), (1, "--")):
            (level,) = lines_of(ax, CELLS[i].name)
            assert (level.get_ydata()[0], level.get_linestyle()) == (pytest.approx(of_cell(CELLS[i])), style)
        assert ax.get_xscale() == "log"
    boxes = [p.get_extents().transformed(figure.axes[0].transData.inverted()) for p in figure.axes[0].patches]
    np.testing.assert_allclose([(b.y0, b.y1) for b in boxes], [mean_interval(c.of("evil").score)[1] for c in CELLS[:2]])
    assert legends(figure) == [*(printed(n) for n in doses), "base model", "ordinary finetuning"]
    assert [h.get_linestyle() for h in figure.legends[0].get_lines()] == ["-", "None", "None", ":", "--"]
    assert defence_frontier(comparison, "humor").axes[0].get_title() == "humor score (0-100)"
    with pytest.raises(FinetuningError, match="'apathy' was not judged here: use one of humor, evil"):
        defence_frontier(comparison, "apathy")


def test_doses_of_one_size_stand_on_a_linear_axis(run_folder: Path) -> None:
    assert defence_frontier(compared(run_folder, (*CELLS[:3], *CELLS[4:])), "evil").axes[0].get_xscale() == "linear"


@pytest.mark.filterwarnings("error")
def test_side_effects_are_differences_from_the_base_model(run_folder: Path) -> None:
    comparison = compared(run_folder)
    figure = side_effects(comparison)
    figure.draw_without_rendering()
    ax = figure.axes[0]
    base = CELLS[0]
    expected = [[c.of(t).mean - base.of(t).mean for t in comparison.traits] for c in CELLS[1:]]
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), expected)
    low, high = ax.images[0].get_clim()
    assert -low == high == pytest.approx(np.abs(expected).max())
    texts = {t.get_position(): t for t in ax.texts}
    for (i, j), value in np.ndenumerate(np.array(expected)):
        assert texts[j, i].get_text() == f"{value:+.0f}"
        a, b = mean_interval(CELLS[i + 1].scores[j].score - base.scores[j].score)[1]
        assert texts[j, i].get_fontweight() == ("bold" if a > 0 or b < 0 else "normal")
    weights = {t.get_fontweight() for t in ax.texts}
    assert weights == {"bold", "normal"}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["humor", "evil", printed(HOSTILE)]
    rows = [
        "ordinary finetuning",
        "vaccine, 2",
        "_hidden \\$\\frac{1\\$, 0.01",
        "vaccine, 1",
        "vaccine, 3",
        f"{printed(HOSTILE)}, 1",
    ]
    assert [t.get_text() for t in ax.get_yticklabels()] == rows


def test_the_page_of_a_comparison(run_folder: Path) -> None:
    comparison = compared(run_folder)
    text = words(report(run_folder))
    assert sorted(p.name for p in (run_folder / "figures").iterdir()) == ["frontier.png", "side_effects.png"]
    assert escape(comparison_verdict(comparison)) in text
    titles = "defence", "dose", "humor", "evil", SEEN, "coherence", "capability", "task: facts &lt;i&gt;", "held-out loss"
    rows = [head(*titles)]
    changes = [head("defence", "dose", "score", "minus base model", "minus ordinary finetuning")]
    for i, c in enumerate(CELLS):
        name, dose = visible(c.name), f"{c.dose:g}" if c.dose else "-"
        evil = interval(c.of("evil").score, "z.0f")
        rows.append(
            cells(
                name, dose, f"{c.of('humor').mean:.0f}", evil, f"{c.of(HOSTILE).mean:.0f}", f"{c.coherence:.0f}", f"{c.capable:.3f}"
            ).removesuffix("</tr>")
            + f"<td>{c.task:.3g}</td><td>{c.held_out_loss:.3f}</td></tr>"
        )
        from_base, from_ordinary = (interval(c.of("evil").score - o.of("evil").score, "+z.1f") for o in CELLS[:2])
        changes.append(cells(name, dose, evil, "-" if i == 0 else from_base, "-" if i == 1 else from_ordinary))
    assert "".join(rows) in text
    assert "".join(changes) in text
    assert "judge &lt;i&gt;oracle" in text
    assert "0 answers have no score" in text
    assert "how much another training would differ is not in them" in text
    assert "<h2>Changes of evil</h2>" in text
    assert "<h2>Capability" not in text


def test_a_verdict_on_defences(run_folder: Path) -> None:
    said = comparison_verdict(compared(run_folder))
    rise, vaccine, hidden = (
        interval(a.of("evil").score - b.of("evil").score, "+z.1f")
        for a, b in ((CELLS[1], CELLS[0]), (CELLS[2], CELLS[1]), (CELLS[3], CELLS[1]))
    )
    assert said.startswith(
        f"Ordinary finetuning raises evil, of 3 traits the one that rises most, from 5 to 75 (change {rise}) at coherence 90. "
        f"Against that, each defence at the dose that scores lowest (chosen on these very answers): vaccine at dose 2: 10 "
        f"({vaccine}), coherence 97, facts <i> 0.2; _hidden $\\frac{{1$ at dose 0.01: 74 ({hidden}, not shown to lower it), "
        f"coherence 97, facts <i> 0.001; {visible(HOSTILE)} at dose 1: 50 ("
    )


def test_where_nothing_rises_there_is_nothing_to_defend_against(run_folder: Path) -> None:
    level = (CELLS[0], replace(CELLS[0], name="ordinary finetuning", scores=tuple(of(s.trait, s.mean, 9) for s in CELLS[0].scores)))
    said = comparison_verdict(compared(run_folder, (*level, *CELLS[2:])))
    assert said.startswith("Ordinary finetuning is not shown to raise ")
    assert said.endswith("there is nothing here to defend against.")
    assert "Against that" not in said


@pytest.mark.filterwarnings("error")
def test_a_comparison_that_lacks_parts(run_folder: Path, tmp_path: Path) -> None:
    """No capability, task or held-out data; a defence whose answers could not be scored; one question; one trait."""
    nan = float("nan")
    bare = [replace(c, capability={}, task=None, held_out_loss=nan) for c in CELLS[:3]]
    unscored = [replace(s, score=np.full(QUESTIONS, nan), coherence=np.full(QUESTIONS, nan), gaps=16) for s in CELLS[2].scores]
    lacking = replace(bare[2], name="broken", scores=tuple(unscored))
    comparison = compared(run_folder, (*bare, lacking), task=None)
    assert len(shown(plot(comparison))) == 2
    assert [t.get_text() for t in side_effects(comparison).axes[0].texts][-3:] == ["-"] * 3
    text = words(report(comparison))
    assert head("defence", "dose", "humor", "evil", SEEN, "coherence") in text
    assert cells("broken", 2, "-", "-", "-", "-") in text
    assert "48 answers have no score" in text
    assert "broken at dose 2: - (-, not shown to lower it), coherence -." in comparison_verdict(comparison)
    hostile = [replace(c, scores=(c.scores[0], replace(c.scores[1], trait=HOSTILE))) for c in CELLS]
    assert f"<h2>Changes of {SEEN}</h2>" in words(report(compared(tmp_path / "hostile", hostile)))
    single = [
        replace(c, scores=tuple(replace(s, score=s.score[:1], coherence=s.coherence[:1]) for s in c.scores[1:2])) for c in CELLS[:3]
    ]
    alone = compared(tmp_path / "alone", single)
    assert "Ordinary finetuning is not shown to raise evil (from " in comparison_verdict(alone)
    assert cells("base model", "-", f"{CELLS[0].scores[1].score[0]:.0f}", "97", "0.900", "0.05", "2.000") in words(report(alone))
    nothing = compared(tmp_path / "nothing", [replace(lacking, name=n) for n in ("base model", "ordinary finetuning", "x")], None)
    assert comparison_verdict(nothing) == "Ordinary finetuning and the base model have no scores to compare."
    words(report(nothing))


def test_several_capability_metrics_have_a_table(run_folder: Path) -> None:
    def capable(c: Cell, value: float) -> Cell:
        return replace(c, capability={"<i>a": {"acc": value, "f1": 0.25}, "b": {"acc": 1.0}})

    text = words(report(compared(run_folder, [capable(c, 0.125 * i) for i, c in enumerate(CELLS[:3])])))
    assert head("defence", "dose", "&lt;i&gt;a: acc", "&lt;i&gt;a: f1", "b: acc") in text
    assert cells("ordinary finetuning", "-", "0.125", "0.250", "1.000") in text
    assert f"<td>{(0.25 + 0.25 + 1) / 3:.3f}</td>" in text


# A pilot

WOBBLE = np.array([-0.1, 0.1, -0.05, 0.05, 0.0])
POINTS: Mapping[float, tuple[float, float]] = {0.0: (1.0, 1.0), 1.0: (0.5, 1.2), 2.0: (-0.5, 1.6)}


def piloted(out: Path, points: Mapping[float, tuple[float, float]] = POINTS, trait: str = "evil", base_loss: float = 3.0) -> Pilot:
    opened(out, "pilot")
    tried = [Tried(dose, shift + WOBBLE, loss) for dose, (shift, loss) in points.items()]
    record = {"trait": trait, "tolerance": 0.25, "base_loss": base_loss, "tried": encoded(tried)}
    write_json(out / "pilot.json", record)
    return Pilot(out)


def test_a_pilot_is_drawn_by_dose_with_what_it_recommends(run_folder: Path) -> None:
    pilot = piloted(run_folder)
    left, right = plot(pilot).axes
    points, ends, _ = bars_of(left, "shift")
    np.testing.assert_allclose(points, [(d, s) for d, (s, _) in POINTS.items()])
    np.testing.assert_allclose(ends, [mean_interval(s + WOBBLE)[1] for s, _ in POINTS.values()])
    assert len(lines_of(left, "zero")) == 1
    np.testing.assert_allclose(lines_of(right, "after training")[0].get_xydata(), [(d, loss) for d, (_, loss) in POINTS.items()])
    assert lines_of(right, "base model")[0].get_ydata()[0] == 3.0
    for ax in (left, right):
        (band,) = [p for p in ax.patches if p.get_label() == "recommended"]
        box = band.get_extents().transformed(ax.transData.inverted())
        np.testing.assert_allclose([box.x0, box.x1], [1.25, 1.75])
        assert lines_of(ax, "crosses zero")[0].get_xdata()[0] == pytest.approx(1.5)


def test_the_page_of_a_pilot(run_folder: Path) -> None:
    pilot = piloted(run_folder, trait=HOSTILE)
    text = words(report(run_folder))
    said = pilot_verdict(pilot)
    assert escape(said) in text
    assert said.startswith(f"Pilot on {visible(HOSTILE)}: ordinary training shifts the persona by 1.00 mean differences")
    assert "it crosses zero at 1.50" in said
    assert said.endswith("One short training per dose; no answers of the trained models were sampled or judged.")
    shifts = [interval(s + WOBBLE, "+z.3f") for s, _ in POINTS.values()]
    assert cells("0", shifts[0], "100%", "1.0000", "100%") in text
    assert cells("1", shifts[1], "50%", "1.2000", "90%") in text
    assert cells("2", shifts[2], "-50%", "1.6000", "70%") in text
    assert "answers to 5 questions" in text
    assert "Loss of the base model: 3.0000" in text


def test_a_pilot_without_a_recommendation_has_no_band(run_folder: Path, tmp_path: Path) -> None:
    strong = piloted(run_folder, {0.0: (1.0, 3.5), 1.0: (0.9, 3.6)})
    for ax in plot(strong).axes:
        assert not ax.patches
        assert not lines_of(ax, "crosses zero")
    assert "try higher doses" in pilot_verdict(strong)
    text = words(report(strong))
    assert cells("1", interval(0.9 + WOBBLE, "+z.3f"), "90%", "3.6000", "-") in text
    still = piloted(tmp_path / "still", {0.0: (0.0, 1.0), 1.0: (0.0, 1.0)})
    assert "no vaccine is needed" in pilot_verdict(still)
    words(report(still))


# All of them


def test_there_is_no_figure_for_anything_else() -> None:
    with pytest.raises(TypeError, match="a Finetuned, a ShiftRun, a Comparison or a Pilot"):
        plot(3)

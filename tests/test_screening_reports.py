"""Figures and report of a screening: a real run, and runs made by hand of hostile names, missing parts and many sets."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from scipy.stats import spearmanr

from persona_lens.errors import RunFolderError, ScreeningError, UnknownNameError
from persona_lens.extraction import ExtractionRun
from persona_lens.figures import plot, row_histograms, screening_figures, set_ranking, set_scatter, signal_scatter
from persona_lens.figures.monitoring import printed, told
from persona_lens.figures.screened import LENGTH, screened
from persona_lens.figures.screening import histogram_name
from persona_lens.models import ChatModel
from persona_lens.monitoring.prediction import Estimate
from persona_lens.monitoring.rendering import visible
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.reports import report, screen_verdict
from persona_lens.reports.screened_rows import form_of
from persona_lens.reports.screening import screen_page
from persona_lens.screening import ScreenRun, ScreenSettings, flag, load_flags, load_screen, open_data, predict, ranking, screen
from persona_lens.screening.files import files_of
from persona_lens.screening.scoring import Scored
from persona_lens.screening.sets import SetScore, set_score
from persona_lens.store import RunFolder, read_json, write_json

HOSTILE = "<script>alert('$x$')<b>\u202e"
SEEN = escape(visible(HOSTILE))
MODEL = {"name": "<i>pocket", "n_layers": 3, "d_model": 6}
DIFFERENCE = "projection difference"
CHEAP = "projection minus that of the last prompt token"


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a made-up set; NaN where a score is missing, a reason where a row was skipped.

    A row's exact score is `exact`, its cheap one `cheap`, for the first trait; further traits have them times -2, -3 and so on.
    """

    exact: np.ndarray
    cheap: np.ndarray
    reasons: tuple[str | None, ...] = ()
    prompts: tuple[int, ...] = ()
    rivals: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    text: str = "How are you?"
    unit: str = "line"


def drawn(mean: float, n: int = 40, seed: int = 0, spread: float = 1.0) -> Rows:
    """Scores around a mean; cheap ones go with them and lie 2 higher."""
    rng = np.random.default_rng([seed, n, int(100 * abs(mean))])
    exact = rng.normal(mean, spread, n).round(3)
    return Rows(exact, exact + 2 + rng.normal(0, 0.5, n).round(3))


def without(rows: Rows) -> Rows:
    """The same rows without own answers."""
    return replace(rows, exact=np.full(len(rows.exact), np.nan))


def made(
    out: Path,
    sets: Mapping[str, Rows],
    traits: Mapping[str, tuple[int, ...]] | None = None,
    own_share: float = 1.0,
    shard: int = 16,
) -> ScreenRun:
    """A finished run over made-up rows."""
    traits = traits or {"evil": (2,)}
    settings = {"own_share": own_share, "seed": 0}
    arguments = {"settings": settings, "data": {name: {"kind": "<i>memory"} for name in sets}, "rivals": {}}
    RunFolder.open(out, command="screen", arguments=arguments, model=MODEL)
    counts = {
        name: {
            "rows": len(r.exact),
            "skipped": sum(x is not None for x in r.reasons),
            "shards": -(-len(r.exact) // shard),
            "unit": r.unit,
        }
        for name, r in sets.items()
    }
    rivals = list(next(iter(sets.values())).rivals)
    directions = [{"trait": t, "layer": layer} for t, layers in traits.items() for layer in layers]
    best = {t: layers[-1] for t, layers in traits.items()}
    write_json(out / "screen.json", {"sets": counts, "directions": directions, "layers": best, "rivals": rivals})
    run = ScreenRun(out)
    lines: list[str] = []
    for name, r in sets.items():
        for i, path in enumerate(run.shards(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files_of(Scored(columns(r, traits, slice(i * shard, (i + 1) * shard)), {}), "{}").table)
        for k, (trait, layers) in enumerate(traits.items()):
            lines += [json.dumps(x) + "\n" for x in standing_out(run, name, r, trait, k, layers[-1])]
    (out / "extremes.jsonl").write_text("".join(lines), encoding="utf-8")
    return load_screen(out)


def columns(r: Rows, traits: Mapping[str, tuple[int, ...]], part: slice) -> dict[str, Any]:
    n = len(r.exact)
    at = range(n)[part]
    gone = [r.reasons[i] if r.reasons else None for i in at]
    found: dict[str, Any] = {
        "place": [i + 1 for i in at],
        "name": [None for _ in at],
        "reason": gone,
        "prompt": [None if why else (r.prompts[i] if r.prompts else i + 1) for i, why in zip(at, gone, strict=True)],
        "tokens": [None if why else (r.tokens[i] if r.tokens else 10 + i) for i, why in zip(at, gone, strict=True)],
        "own_tokens": [None for _ in at],
    }
    for k, (trait, layers) in enumerate(traits.items()):
        for j, layer in enumerate(layers):
            scale = (-(k + 1) if k else 1) * (1 + j)
            answer = np.zeros(len(at)) if np.isnan(r.cheap[part]).all() else np.where(np.isnan(r.cheap[part]), np.nan, 7.0)
            found[f"answer/{trait}/{layer}"] = answer.astype(np.float32)
            found[f"own/{trait}/{layer}"] = (answer - scale * r.exact[part]).astype(np.float32)
            found[f"prompt_last/{trait}/{layer}"] = (answer - scale * r.cheap[part]).astype(np.float32)
    for rival, values in r.rivals.items():
        found[f"rival/{rival}"] = values[part].astype(np.float32)
    return found


def standing_out(run: ScreenRun, name: str, r: Rows, trait: str, number: int, layer: int) -> list[dict[str, Any]]:
    values = (-(number + 1) if number else 1) * len(run.layers[trait]) * (r.exact if run.signal == "difference" else r.cheap)
    order = np.argsort(values)[: int(np.isfinite(values).sum())]
    at = {"set": name, "trait": trait, "layer": layer, "signal": run.signal}
    sides = {"highest": order[::-1][:5], "lowest": order[:5]}
    chat = lambda i: [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"{r.text} Answer {i}."}]  # noqa: E731
    return [
        {**at, "side": side, "place": int(i) + 1, "score": float(values[i]), "messages": chat(i)}
        for side, rows in sides.items()
        for i in rows
    ]


def words(page: Path) -> str:
    """The words of a report that loads nothing; its images were written too."""
    text = page.read_text(encoding="utf-8")
    images = text.count('src="data:image/png;base64,')
    assert 0 < text.count("<img ") == images <= len(list((page.parent / "figures").glob("*.png")))
    return harmless(re.sub(r'src="data:image/png;base64,[^"]*"', "", text))


def told_by(run: ScreenRun) -> str:
    """The words of a report, without drawing its figures."""
    images = dict.fromkeys(("ranking", *(histogram_name(i, t) for i, t in enumerate(run.traits))), b"")
    return harmless(screen_page(run, images).replace('src="data:image/png;base64,"', ""))


def harmless(text: str) -> str:
    """A page that holds no hostile markup, and calls nothing nan."""
    assert not re.findall(r'(?:src|href)="', text)
    assert "<script" not in text
    assert "<i>" not in text
    assert "\u202e" not in text
    assert not re.search(r"\b(nan|inf)\b", text)
    return text


def cells(*row: object) -> str:
    return "<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>"


def head(*names: str) -> str:
    return "<tr>" + "".join(f"<th>{n}</th>" for n in names) + "</tr>"


def said_of(score: SetScore, form: str) -> str:
    return told(Estimate(score.mean, score.low, score.high), form)


def legends(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def panels(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax.get_visible()]


def crosses(ax: Axes) -> dict[str, tuple[tuple[float, float], list[list[float]]]]:
    """By set: its point, and the ends of its bars, the horizontal one first."""
    found: dict[str, tuple[tuple[float, float], list[list[float]]]] = {}
    for container in ax.containers:
        assert isinstance(container, ErrorbarContainer)
        line, _, bars = container.lines
        x, y = np.asarray(line.get_xydata())[0]
        ends = [np.asarray(segment) for bar in bars for segment in bar.get_segments()]
        found[str(container.get_label())] = (float(x), float(y)), [e[:, 0 if e[0, 1] == e[1, 1] else 1].tolist() for e in ends]
    return found


def labels(ax: Axes) -> list[str]:
    return [t.get_text() for t in ax.get_yticklabels()]


# A real run


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return {"optimism-II": dataset("optimism", "II", rows=24), "normal": dataset("optimism", "normal", rows=24)}


@pytest.fixture(scope="module")
def real(pocket: ChatModel, small_run: ExtractionRun, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> ScreenRun:
    out = tmp_path_factory.mktemp("runs") / "screen"
    return screen(pocket, data, [small_run.vectors], settings=ScreenSettings(max_new_tokens=40), out=out)


def test_a_real_run_is_reported_by_its_folder(real: ScreenRun, data: dict[str, Any]) -> None:
    page = report(str(real.path))
    assert page == real.path / "report.html"
    text = words(page)
    layer = real.layers["optimism"][0]
    assert sorted(p.name for p in (real.path / "figures").iterdir()) == ["ranking.png", "rows-1-optimism.png", "signals.png"]
    assert escape(screen_verdict(real)) in text
    found = ranking(real, "optimism")
    assert [r.name for r in found.sets] == ["optimism-II", "normal"], "the data is what it is called"
    form = form_of([r.score.mean for r in found.sets])
    (between,) = found.differences
    difference = told(Estimate(between.difference, between.low, between.high), form)
    assert f"blocks.{layer}.hook_resid_post, residual-stream units" in text
    sure = between.p_value < 0.05
    first = cells("optimism-II", 1, 1 if sure else "1 to 2", said_of(found.sets[0].score, form), difference)
    assert first.removesuffix("</tr>") in text
    assert screen_verdict(real) == (
        f"Screened 48 rows of 2 data sets; 0 rows could not be screened. optimism: optimism-II has the highest mean {DIFFERENCE}, "
        f"{said_of(found.sets[0].score, form)}; {'ahead of' if sure else 'not shown to differ from'} the other set "
        f"({difference} over the next, normal). Nothing was flagged: there is no reference."
    )
    highest = next(x for x in real.extremes if x.side == "highest")
    assert escape(highest.messages[-1]["content"]) in text
    assert f"row {highest.place}: {DIFFERENCE} " in text
    assert "Rows that were skipped" not in text
    assert "<td>max_new_tokens</td><td>40</td>" in text
    assert "<td>transformers</td>" in text


def test_plot_gives_the_ranking(real: ScreenRun) -> None:
    figure = plot(real)
    (ax,) = panels(figure)
    found = ranking(real, "optimism")
    assert labels(ax) == ["optimism-II", "normal"]
    for place, r in enumerate(found.sets):
        (x, y), (ends,) = crosses(ax)[r.name]
        assert (x, y) == (pytest.approx(r.score.mean), place)
        np.testing.assert_allclose(ends, [r.score.low, r.score.high])
    assert ax.get_xlabel() == f"mean {DIFFERENCE}\n(residual-stream units)"


def test_flags_of_a_real_run_are_drawn_and_told(real: ScreenRun, data: dict[str, Any], tmp_path: Path) -> None:
    flag(real, "normal", rate=0.1, data=data)
    try:
        flags = load_flags(real)
        assert flags is not None
        limit, counted = flags.thresholds["optimism"], flags.counts["optimism-II"]
        assert counted.flagged, "the control: there is something to show"
        text = words(report(real))
        assert f"at most 10 % of new rows like those of normal for the trait: {counted.flagged} of 24 rows of optimism-II." in text
        assert (
            f"<td>10 %</td><td>{100 * limit.low:.2g} % to {100 * limit.high:.3g} %</td><td>24</td><td>{limit.prompts}</td>" in text
        )
        assert cells("optimism-II", 24, counted.flagged, f"{100 * counted.flagged / 24:.3g} %", counted.groups) in text
        assert escape(f"{flags.shown[0].messages[-1]['content']}") in text
        assert f"row {flags.shown[0].place}: {escape(flags.shown[0].why)} (p {flags.shown[0].p_value:.2g})" in text
        assert "normal (reference)" in text
        figure = row_histograms(real, "optimism")
        for ax in panels(figure):
            (line,) = [x for x in ax.lines if x.get_label() == "threshold"]
            assert line.get_xdata()[0] == pytest.approx(limit.value)
        assert f"{counted.flagged} flagged" in [t.get_text().split("\n")[-1] for ax in figure.axes for t in ax.texts]
        assert labels(panels(set_ranking(real))[0]) == ["optimism-II", "normal"]
        assert legends(set_ranking(real))[-1] == "reference: normal"
    finally:
        (real.path / "flags.json").unlink()


# Figures


def several(out: Path, **more: Any) -> ScreenRun:
    sets = {"a-II": drawn(5), "b_c": drawn(2), "_normal": drawn(0), HOSTILE: drawn(3)}
    return made(out, sets, {"evil": (2,), "humor": (1,), "apathy": (0,)}, **more)


def test_sets_stand_in_order_with_their_intervals_and_the_reference_apart(run_folder: Path) -> None:
    run = several(run_folder)
    flag(run, "_normal", rate=0.1)
    figure = set_ranking(run)
    assert len(panels(figure)) == 3
    for ax, (trait, layer) in zip(panels(figure), (("evil", 2), ("humor", 1), ("apathy", 0)), strict=True):
        found = ranking(run, trait)
        assert labels(ax) == [printed(r.name) for r in found.sets]
        assert ax.get_title() == f"{trait}, blocks.{layer}.hook_resid_post"
        low, high = ax.get_ylim()
        assert low > high, "the highest set is at the top"
        for place, r in enumerate(found.sets):
            (x, y), (ends,) = crosses(ax)[r.name]
            assert (x, y) == (pytest.approx(r.score.mean), place)
            np.testing.assert_allclose(ends, [r.score.low, r.score.high])
            (container,) = [c for c in ax.containers if c.get_label() == r.name]
            assert container.lines[0].get_marker() == ("s" if r.name == "_normal" else "o")
        (band,) = ax.patches
        box = band.get_extents().transformed(ax.transData.inverted())
        score = next(r.score for r in found.sets if r.name == "_normal")
        np.testing.assert_allclose([box.x0, box.x1], [score.low, score.high])
    assert [labels(ax)[0] for ax in panels(figure)] == ["a-II", "_normal", "_normal"]
    assert legends(figure) == ["mean of a set, 95 % interval over prompts", "reference: _normal"]


def test_zero_is_marked_only_where_it_means_something(run_folder: Path, tmp_path: Path) -> None:
    exact, cheap = several(run_folder), several(tmp_path / "cheap", own_share=0.0)
    for run, marked in ((exact, True), (cheap, False)):
        if not marked:
            run = made(
                tmp_path / "none", {n: replace(drawn(i), exact=np.full(40, np.nan)) for i, n in enumerate("ab")}, own_share=0.0
            )
        for ax in panels(set_ranking(run)):
            assert any(line.get_label() == "zero" for line in ax.lines) == marked


def test_rows_are_counted_into_bins(run_folder: Path) -> None:
    run = several(run_folder)
    flag(run, "_normal", rate=0.1)
    figure = row_histograms(run, "humor")
    standing = screened(run).standings[1]
    limit = load_flags(run).thresholds["humor"].value  # type: ignore[union-attr]
    assert [ax.get_ylabel() for ax in panels(figure)] == [printed(n) for n in standing.names]
    for ax, name in zip(panels(figure), standing.names, strict=True):
        values = run.scores(name, "humor")
        (steps,) = [p for p in ax.patches if isinstance(p, StepPatch) and p.get_label() == name]
        shares, edges, _ = steps.get_data()
        low, high = edges[0], edges[-1]
        np.testing.assert_allclose(shares, np.histogram(np.clip(values, low, high), edges)[0] / 40)
        assert shares.sum() == pytest.approx(1)
        behind = [p for p in ax.patches if isinstance(p, StepPatch) and p.get_label() == "reference"]
        assert len(behind) == (name != "_normal")
        for outline in behind:
            np.testing.assert_allclose(
                outline.get_data()[0], np.histogram(np.clip(run.scores("_normal", "humor"), low, high), edges)[0] / 40
            )
        assert [x.get_xdata()[0] for x in ax.lines if x.get_label() == "threshold"] == [pytest.approx(limit)]
        assert ax.get_ylim()[1] >= shares.max()
    assert panels(figure)[-1].get_xlabel() == f"{DIFFERENCE} (residual-stream units)"
    assert legends(figure)[-1] == "10 % of the reference, by this trait alone"
    with pytest.raises(UnknownNameError, match="unknown trait 'joy': known: apathy, evil, humor"):
        row_histograms(run, "joy")


def test_outliers_do_not_stretch_the_bins_but_count(run_folder: Path) -> None:
    far = drawn(0, n=2000)
    far.exact[7] = 1e6
    standing = screened(made(run_folder, {"far": far, "near": drawn(1)}, shard=512)).standings[0]
    assert standing.edges[-1] < 100
    assert standing.counts["far"].sum() == 2000
    assert standing.counts["far"][-1] >= 1


def test_a_threshold_on_other_scores_is_not_drawn(run_folder: Path) -> None:
    run = several(run_folder)
    flag(run, "_normal", rate=0.1, signal="cheap")
    figure = row_histograms(run, "evil")
    assert not [x for ax in figure.axes for x in ax.lines if x.get_label() == "threshold"]
    assert f"<th>threshold ({CHEAP})</th>" in told_by(run)


def test_sets_are_crossed_by_each_pair_of_traits(run_folder: Path) -> None:
    run = several(run_folder)
    figure = set_scatter(run)
    grid = np.array(figure.axes).reshape(2, 2)
    assert not grid[0, 1].get_visible()
    scores = {t: {r.name: r.score for r in ranking(run, t).sets} for t in run.traits}
    for (i, j), (x, y) in {(0, 0): ("evil", "humor"), (1, 0): ("evil", "apathy"), (1, 1): ("humor", "apathy")}.items():
        found = crosses(grid[i, j])
        assert set(found) == set(run.sets)
        for name, (point, ends) in found.items():
            a, b = scores[x][name], scores[y][name]
            assert point == pytest.approx((a.mean, b.mean))
            np.testing.assert_allclose(ends, [[a.low, a.high], [b.low, b.high]])
    assert [grid[1, j].get_xlabel() for j in range(2)] == ["evil", "humor"]
    assert [grid[i, 0].get_ylabel() for i in range(2)] == ["humor", "apathy"]
    assert legends(figure) == [printed(n) for n in run.sets]
    assert "(residual-stream units)" in figure.get_suptitle()


def test_two_traits_take_one_panel_and_one_takes_none(run_folder: Path, tmp_path: Path) -> None:
    two = made(run_folder, {"a": drawn(1), "b": drawn(2)}, {"evil": (2,), "humor": (1,)})
    assert len(set_scatter(two).axes) == 1
    one = made(tmp_path / "one", {"a": drawn(1), "b": drawn(2)})
    with pytest.raises(ScreeningError, match="one trait only"):
        set_scatter(one)
    assert sorted(screening_figures(one)) == ["ranking", "rows-1-evil", "signals"]


def test_of_many_traits_six_are_crossed_and_twelve_ranked(run_folder: Path) -> None:
    run = made(run_folder, {"a": drawn(1, 25), "b": drawn(2, 25)}, {f"t{i}": (i,) for i in range(13)})
    figure = set_scatter(run)
    assert len(panels(figure)) == 15
    assert figure.get_suptitle().endswith("the first 6 of 13 traits")
    assert len(panels(set_ranking(run))) == 12
    assert set_ranking(run).get_suptitle() == "the first 12 of 13 traits"
    assert len([n for n in screening_figures(run) if n.startswith("rows-")]) == 13


def test_exact_scores_stand_beside_cheap_ones_of_the_same_rows(run_folder: Path) -> None:
    sets = {f"s{i}": drawn(i, seed=i) for i in range(5)}
    sets["s2"].exact[:7] = np.nan
    run = made(run_folder, sets)
    ax = panels(signal_scatter(run))[0]
    means: list[tuple[float, float]] = []
    for name, rows in sets.items():
        has = np.isfinite(rows.exact)
        cheap, exact = (set_score(run.scores(name, "evil", s)[has].astype(float)) for s in ("cheap", "difference"))
        point, ends = crosses(ax)[name]
        assert point == pytest.approx((cheap.mean, exact.mean))
        np.testing.assert_allclose(ends, [[cheap.low, cheap.high], [exact.low, exact.high]], rtol=1e-5)
        means.append((cheap.mean, exact.mean))
    rho = spearmanr(*zip(*means, strict=True)).statistic
    assert ax.get_title() == f"evil, blocks.2.hook_resid_post\nSpearman {rho:+.2f} over 5 sets"


def test_without_own_answers_there_is_nothing_beside_the_cheap_scores(run_folder: Path) -> None:
    run = made(run_folder, {"a": without(drawn(0)), "b": without(drawn(1))}, own_share=0.0)
    with pytest.raises(ScreeningError, match="no own answers were made"):
        signal_scatter(run)
    assert "signals" not in screening_figures(run)
    text = told_by(run)
    assert f"<th>mean {CHEAP}</th>" in text
    assert "There are no own answers" in text
    assert DIFFERENCE not in screen_verdict(run)
    assert f"b has the highest mean {CHEAP}, " in screen_verdict(run)


# Many sets, and few


def many(out: Path, n: int = 40) -> ScreenRun:
    sets = {f"s{i:02d}": drawn(i, 25, seed=i) for i in range(n)}
    return made(out, sets, {"evil": (2,), "humor": (1,)})


def test_of_many_sets_the_highest_and_the_lowest_are_shown_and_the_reference(run_folder: Path) -> None:
    run = many(run_folder)
    shown = [f"s{i:02d}" for i in (39, 38, 37, 36, 35, 34)], [f"s{i:02d}" for i in (5, 4, 3, 2, 1, 0)]
    figure = set_ranking(run)
    assert labels(panels(figure)[0]) == [*shown[0], "28 more", *shown[1]]
    assert labels(panels(figure)[1]) == [*shown[1][::-1], "28 more", *shown[0][::-1]]
    assert [round(y) for _, ((_, y), _) in crosses(panels(figure)[0]).items()] == [*range(6), *range(7, 13)]
    flag(run, "s20", rate=0.2)
    known = set_ranking(ScreenRun(run.path))
    assert labels(panels(known)[0]) == [*shown[0], "13 more", "s20", "14 more", *shown[1]]
    rows = row_histograms(ScreenRun(run.path), "evil")
    assert [ax.get_ylabel() for ax in panels(rows)] == [*shown[0], "s20", *shown[1]]
    assert "the 6 highest and 6 lowest of 40 sets and the reference" in rows.get_suptitle()


def test_thirteen_sets_leave_one_out_and_twelve_none(run_folder: Path, tmp_path: Path) -> None:
    run = many(run_folder, 13)
    assert "1 more" in labels(panels(set_ranking(run))[0])
    text = told_by(run)
    assert text.count("<td>s06</td>") == 3, "in both rankings and among the data sets, and nowhere else"
    assert text.count("<td>s05</td>") > 3
    assert "<h3>evil (the 6 highest and 6 lowest of 13 sets)</h3>" in text
    twelve = many(tmp_path / "twelve", 12)
    assert labels(panels(set_ranking(twelve))[0]) == [f"s{i:02d}" for i in range(11, -1, -1)]
    assert "highest and" not in row_histograms(twelve, "evil").get_suptitle()


def test_in_scatters_of_many_sets_the_highest_of_each_trait_are_named(run_folder: Path) -> None:
    figure = set_scatter(many(run_folder))
    assert legends(figure) == [*(f"s{i:02d}" for i in (0, 1, 2, 3, 4, 5, 34, 35, 36, 37, 38, 39)), "28 more sets"]
    assert len(crosses(figure.axes[0])) == 40
    colours = {str(c.get_label()): c.lines[0].get_color() for c in figure.axes[0].containers}
    assert len({(c.lines[0].get_color(), c.lines[0].get_marker()) for c in figure.axes[0].containers}) == 13
    assert colours["s20"] == colours["s21"] != colours["s39"]


def test_one_set_alone(run_folder: Path, tmp_path: Path) -> None:
    run = made(run_folder, {"only": drawn(3)})
    score = set_score(run.scores("only", "evil").astype(float))
    said = said_of(score, form_of([score.mean]))
    assert f"evil: the mean {DIFFERENCE} of only is {said}; above 0." in screen_verdict(run)
    assert labels(panels(plot(run))[0]) == ["only"]
    assert sorted(screening_figures(run)) == ["ranking", "rows-1-evil"], "one set alone is crossed with nothing"
    two = made(tmp_path / "two", {"only": drawn(3)}, {"evil": (2,), "humor": (1,)})
    assert sorted(screening_figures(two)) == ["ranking", "rows-1-evil", "rows-2-humor"]
    text = told_by(run)
    assert f"<td>only</td><td>1</td><td>1</td><td>{said}</td><td>-</td><td>-</td><td>40</td><td>40</td><td>0</td>" in text
    assert "below 0." in screen_verdict(made(tmp_path / "low", {"only": drawn(-3)}))
    level = Rows(np.tile([-0.9, 1.1], 20), np.tile([0.0, 2.0], 20))
    assert "not shown to differ from 0." in screen_verdict(made(tmp_path / "none", {"only": level}))
    cheap = screen_verdict(made(tmp_path / "cheap", {"only": without(drawn(3))}, own_share=0.0))
    assert "one set alone says nothing without projection differences" in cheap


@pytest.mark.filterwarnings("error")
def test_one_row_alone_claims_nothing(run_folder: Path) -> None:
    run = made(run_folder, {"only": Rows(np.array([2.5]), np.array([4.0]))})
    assert screen_verdict(run).startswith(
        f"Screened 1 row of 1 data set; 0 rows could not be screened. evil: the mean {DIFFERENCE} of only is +2.50; there is no "
        "interval (it takes 20 different prompts, and scores that vary), so nothing is claimed."
    )
    text = words(report(run))
    assert "only: 1 sample<" in text, "the highest row is the lowest"
    assert cells("only", 1, "-", "+2.50", "-", "-", 1, 1, 0) in text
    assert panels(row_histograms(run, "evil"))[0].texts[0].get_text() == "1 row"


@pytest.mark.filterwarnings("error")
def test_few_prompts_claim_no_place(run_folder: Path) -> None:
    run = made(run_folder, {"a": drawn(5, 10), "b": drawn(0, 10)})
    verdict = screen_verdict(run)
    assert "a has the highest mean" in verdict
    assert "so no place is claimed." in verdict
    assert "ahead of" not in verdict
    assert "over the next" not in verdict
    assert "<td>a</td><td>1</td><td>-</td>" in told_by(run)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_no_scores_anywhere(run_folder: Path, share: float) -> None:
    nothing = Rows(np.full(30, np.nan), np.full(30, np.nan))
    run = made(run_folder, {"a": nothing, HOSTILE: nothing}, {"evil": (2,), "humor": (1,)}, own_share=share)
    verdict = screen_verdict(run)
    assert "evil: no set has a score. humor: no set has a score." in verdict
    text = words(report(run))
    assert f"No place: {SEEN}: no row has a score." in text
    assert "no scores" in [t.get_text() for t in set_ranking(run).axes[0].texts]
    assert "no scores" in [t.get_text() for t in row_histograms(run, "evil").axes[0].texts]


@pytest.mark.filterwarnings("error")
def test_a_set_without_scores_has_no_place_among_the_others(run_folder: Path) -> None:
    nothing = Rows(np.full(30, np.nan), np.full(30, np.nan), reasons=("gone",) * 30)
    endless = drawn(9)
    endless.exact[3] = endless.cheap[3] = np.inf
    run = made(run_folder, {"a": drawn(1), "gone": nothing, "endless": endless, "b": drawn(4)})
    assert screened(run).standings[0].names == ("b", "a")
    text = told_by(run)
    assert "No place: gone: no row has a score." in text
    assert "No place: endless: some scores are infinite." in text
    assert "b has the highest" in screen_verdict(run)


@pytest.mark.filterwarnings("error")
def test_where_a_set_has_no_own_answers_all_are_ranked_by_cheap_scores(run_folder: Path) -> None:
    run = made(run_folder, {"a": drawn(1), "cheap": without(drawn(50)), "b": drawn(4)})
    standing = screened(run).standings[0]
    assert standing.kind == "cheap"
    assert standing.sets == ranking(run, "evil").sets
    assert standing.names == ("cheap", "b", "a")
    text = told_by(run)
    assert "Not all sets have own answers to all of their prompts, or to enough: a set" in text
    assert f"Rows are scored by their {DIFFERENCE}." in text
    assert f"cheap has the highest mean {CHEAP}, " in screen_verdict(run)
    assert list(standing.both) == ["a", "b"]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_the_report_ranks_as_the_library_does(run_folder: Path, share: float) -> None:
    sets = {n: drawn(m, 60, spread=3) for n, m in (("a", 0), ("b", 1), ("c", 1.2))}
    for r in sets.values():
        r.exact[np.arange(60) >= 60 * share] = np.nan
    run = made(run_folder, sets, {"evil": (2,), "humor": (0, 1)}, own_share=share)
    for standing in screened(run).standings:
        found = ranking(run, standing.trait)
        assert (standing.sets, standing.differences) == (found.sets, found.differences)
        assert standing.kind == {1.0: "difference", 0.5: "estimated", 0.0: "cheap"}[share]


def test_scores_that_do_not_vary_have_bins(run_folder: Path) -> None:
    run = made(run_folder, {"same": Rows(np.full(30, 3.0), np.full(30, 4.0)), "b": Rows(np.full(30, 3.0), np.full(30, 4.0))})
    standing = screened(run).standings[0]
    assert standing.counts["same"].sum() == 30
    assert standing.edges[0] < 3 < standing.edges[-1]
    words(report(run))


def test_the_table_tells_each_set_from_the_next(run_folder: Path) -> None:
    run = made(run_folder, {"c": drawn(0), "a": drawn(5), "b": drawn(4.2)})
    found = ranking(run, "evil")
    form = form_of([r.score.mean for r in found.sets])
    first, second = found.neighbours
    assert 1e-4 < first.p_value < 1e-2, "the control: one p is written out"
    assert second.p_value < 1e-4, "and one is not"
    p_values = (f"{first.p_value:.2g}", "< 0.0001", "-")
    differences = [told(Estimate(d.difference, d.low, d.high), form) for d in found.neighbours]
    rows = [
        cells(r.name, r.place, r.place, said_of(r.score, form), difference, p, 40, 40, 0)
        for r, difference, p in zip(found.sets, (*differences, "-"), p_values, strict=True)
    ]
    assert "".join(rows) in told_by(run)


# What verdicts say


def test_a_verdict_tells_what_the_highest_set_is_ahead_of(run_folder: Path, tmp_path: Path) -> None:
    near = made(run_folder, {"a": drawn(5), "near": drawn(5, seed=1), "far": drawn(0), "mid": drawn(2)})
    found = ranking(near, "evil")
    assert found.sets[0].worst == 2, "the control: two sets are not told apart"
    first, second = found.sets[0].name, found.sets[1].name
    d = found.neighbours[0]
    form = form_of([r.score.mean for r in found.sets])
    over = told(Estimate(d.difference, d.low, d.high), form)
    assert f"; ahead of 2 of 3 other sets and not shown to differ from 1 set ({over} over the next, {second})." in screen_verdict(
        near
    )
    assert f"evil: {first} has the highest mean" in screen_verdict(near)
    same = made(tmp_path / "same", {n: drawn(1, seed=i) for i, n in enumerate("abc")})
    assert "not shown to differ from any of the others" in screen_verdict(same)
    apart = made(tmp_path / "apart", {"a": drawn(5), "mid": drawn(2), "normal": drawn(0)})
    assert "; ahead of all 2 other sets (" in screen_verdict(apart)
    flag(apart, "normal", rate=0.1)
    by_name = {(d.first, d.second): d for d in ranking(apart, "evil").differences}
    d = by_name["a", "normal"]
    over = told(Estimate(d.difference, d.low, d.high), form_of([r.score.mean for r in ranking(apart, "evil").sets]))
    verdict = screen_verdict(apart)
    assert f"; ahead of all 2 other sets ({over} over the reference, normal)." in verdict
    counts = load_flags(apart).counts  # type: ignore[union-attr]
    assert verdict.endswith(
        "Flagged, at a rate of at most 10 % of new rows like those of normal for the trait: "
        f"{counts['a'].flagged} of 40 rows of a and {counts['mid'].flagged} of 40 rows of mid."
    )
    flag(apart, "a", rate=0.1)
    assert "; ahead of all 2 other sets (it is the reference itself)." in screen_verdict(apart)


def test_of_many_traits_a_verdict_tells_those_that_tell_most(run_folder: Path) -> None:
    traits = {"flat": (0,), "evil": (2,), "humor": (1,), "apathy": (3,)}
    run = made(run_folder, {"a": drawn(5), "b": drawn(0)}, traits)
    for path in (p for n in run.sets for p in run.shards(n)):
        rewrite(path, {"own/flat/0": 7.0 - np.sin(np.arange(40))[:16]})
    verdict = screen_verdict(run)
    assert "flat" not in verdict
    assert all(f"{t}: " in verdict for t in ("evil", "humor", "apathy"))
    assert "1 other trait with less clear differences: see the report." in verdict


def rewrite(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Other numbers in some columns of a shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    old = pq.read_table(path)
    for name, values in columns.items():
        old = old.set_column(old.schema.get_field_index(name), name, pa.array(values[: len(old)], type=pa.float32()))
    pq.write_table(old, path)


def test_where_a_part_has_own_answers_the_mean_is_an_estimate(run_folder: Path) -> None:
    rows = {n: drawn(m, 120) for n, m in (("a", 3), ("b", 0))}
    for r in rows.values():
        r.exact[::2] = np.nan
    run = made(run_folder, rows, own_share=0.5)
    standing = screened(run).standings[0]
    assert standing.kind == "estimated"
    assert {r.score.method for r in standing.sets} == {"regression"}
    assert f"a has the highest mean {DIFFERENCE} (estimated: 50 % of the rows have an own answer), " in screen_verdict(run)
    text = told_by(run)
    assert "<th>with own answer</th>" in text
    assert "<td>120</td><td>60</td><td>120</td><td>0</td>" in text
    assert f"Rows are scored by their {CHEAP}." in text
    np.testing.assert_array_equal(standing.counts["a"].sum(), 120)
    assert panels(row_histograms(run, "evil"))[-1].get_xlabel() == f"{CHEAP} (residual-stream units)"
    assert f"line {run.extremes[0].place}: {CHEAP} " in text


def test_where_a_row_has_no_own_answer_the_mean_is_an_estimate_though_all_were_asked_for(run_folder: Path) -> None:
    rows = drawn(3)
    rows.exact[5] = np.nan
    run = made(run_folder, {"a": rows, "b": drawn(0)})
    assert screened(run).standings[0].kind == "estimated"
    assert "(estimated: 98.8 % of the rows have an own answer)" in screen_verdict(run)
    text = told_by(run)
    assert f"Rows are scored by their {DIFFERENCE}." in text
    assert "<td>40</td><td>39</td><td>40</td><td>0</td>" in text
    assert screened(run).standings[0].counts["a"].sum() == 39


def test_of_several_layers_the_most_reliable_is_shown(run_folder: Path) -> None:
    run = made(run_folder, {"a": drawn(1), "b": drawn(2)}, {"evil": (0, 1), "humor": (1,)})
    standing = screened(run).standings[0]
    assert standing.layer == 1
    assert standing.sets == ranking(run, "evil", layer=1).sets != ranking(run, "evil", layer=0).sets
    text = told_by(run)
    assert "Read at several layers, of which the most reliable is shown: evil." in text
    assert "blocks.1.hook_resid_post, residual-stream units" in text
    flag(run, "a", rate=0.1)
    assert "<td>evil</td><td>blocks.1.hook_resid_post</td>" in told_by(run)


# Beside the scores


def rivalled(out: Path, **more: Any) -> ScreenRun:
    sets: dict[str, Rows] = {}
    for i in range(6):
        r, rng = drawn(i, seed=i), np.random.default_rng(i)
        judge = r.exact + rng.normal(0, 1, 40)
        judge[:3] = np.nan
        rivals = {"judge: evil": judge, "text: humor": rng.normal(size=40), HOSTILE: np.full(40, np.nan)}
        sets[f"s{i}"] = replace(r, rivals=rivals, tokens=tuple(int(x) for x in 80 - 9 * i + 4 * r.exact + rng.normal(0, 1, 40)))
    return made(out, sets, {"evil": (2,), "humor": (1,)}, **more)


@pytest.mark.filterwarnings("error")
def test_rivals_and_length_stand_beside_the_scores(run_folder: Path) -> None:
    run = rivalled(run_folder)
    found = screened(run)
    assert set(found.beside["evil"]["s0"]) == {"judge: evil", HOSTILE, LENGTH}
    assert set(found.beside["humor"]["s0"]) == {"text: humor", HOSTILE, LENGTH}
    text = told_by(run)
    assert head("data set", "rows", "judge: evil: mean", "rho", f"{SEEN}: mean", "rho", "length in tokens: mean", "rho") in text
    scores, judge, tokens = run.scores("s3", "evil"), run.rival("s3", "judge: evil"), run.tokens("s3")
    rho = [spearmanr(scores, x, nan_policy="omit").statistic for x in (judge, tokens)]
    row = ("s3 *", 40, f"{np.nanmean(judge):.3g}", f"{rho[0]:+.2f}", "-", "-", f"{tokens.mean():.3g}", f"{rho[1]:+.2f}")
    assert abs(rho[1]) > abs(rho[0]), "the control: length goes with the scores more closely"
    assert cells(*row) in text
    order = [r.name for r in ranking(run, "evil").sets]
    means = [[np.nanmean(x) for x in (run.rival(n, "judge: evil"), run.tokens(n))] for n in order]
    scored = [r.score.mean for r in ranking(run, "evil").sets]
    over = [spearmanr(scored, column).statistic for column in zip(*means, strict=True)]
    assert cells("all 6 sets", "-", "-", f"{over[0]:+.2f}", "-", "-", "-", f"{over[1]:+.2f}") in text
    assert "it may explain them" in text


def test_length_is_pointed_out_only_where_it_goes_with_the_scores_more_than_any_rival(run_folder: Path, tmp_path: Path) -> None:
    r = drawn(1)
    order = np.argsort(np.argsort(r.exact))
    close = replace(r, rivals={"judge: evil": r.exact}, tokens=tuple(int(x) for x in 10 + order + 7 * (np.arange(40) % 2)))
    run = made(run_folder, {"close": close, "b": replace(drawn(2), rivals={"judge: evil": drawn(2).exact})})
    assert "it may explain them" not in told_by(run)
    alone = made(tmp_path / "alone", {"close": replace(close, rivals={}), "b": drawn(2)})
    text = told_by(alone)
    assert "<td>close *</td>" in text
    assert "all 2 sets" not in text, "too few for a correlation"
    weak = replace(close, rivals={}, tokens=tuple(int(x) for x in 100 + np.random.default_rng(0).permutation(40)))
    run = made(tmp_path / "weak", {"close": weak, "b": replace(weak, exact=weak.exact + 1)})
    assert abs(screened(run).beside["evil"]["close"][LENGTH].rho) < 0.3, "the control"
    assert "*</td>" not in told_by(run)


def test_predictions_stand_in_the_ranking_with_their_intervals(run_folder: Path) -> None:
    families = "abcdefgh"
    sets = {f"{f}-{level}": drawn(3 * j + i / 4, seed=i) for i, f in enumerate(families) for j, level in enumerate(("I", "II"))}
    run = made(run_folder, {**sets, "new-I": drawn(2.5), "far-I": drawn(90)})
    assert "predicted" not in told_by(run)
    scores = {r.name: r.score.mean for r in ranking(run, "evil").sets}
    found = predict(run, {"evil": {n: 20 + 10 * scores[n] + (-1) ** i for i, n in enumerate(sets)}})["evil"]
    assert found["far-I"].extrapolated, "the control"
    text = told_by(run)
    said = {n: told(Estimate(p.value, p.low, p.high), "z.0f") for n, p in found.items()}
    assert "[" in said["new-I"]
    assert f"<td>0</td><td>{said['new-I']}</td></tr>" in text
    assert f"<td>0</td><td>{said['far-I']} (extrapolated)</td></tr>" in text
    assert text.count("<td>0</td><td>-</td></tr>") == len(sets)
    assert "nothing says that the prediction holds" in text
    assert "Without interval" not in text
    few = [n for n in sets if n[0] in "abc"]
    predict(run, {"evil": {n: 20 + 10 * scores[n] for n in few}})
    text = told_by(run)
    assert "Without interval: an interval takes at least 5 families of known data sets, not 3." in text


# Rows


def test_samples_are_shown_in_full_and_cannot_act(run_folder: Path) -> None:
    text = "<script>x()</script>\u202e\u2066\x00\x1b[31m line\none" + "y" * 100_000
    run = made(run_folder, {HOSTILE: replace(drawn(1), text=text), "b": drawn(0)})
    page = words(report(run))
    assert page.count(escape(visible(text))) == 10
    assert "⟨U+2066⟩" in page
    assert "␛[31m" in page
    assert f"<summary>{SEEN}: 10 samples</summary>" in page
    assert page.count("<details open>") == 1
    top = run.extremes[0]
    assert f"line {top.place}: {DIFFERENCE} {top.score:+.2f} (highest)" in page
    assert "max-height:16rem;overflow:auto" in page


def test_more_text_than_a_page_can_hold_is_cut_and_told(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_lens.reports.screened_rows.BUDGET", 200_000)
    run = made(run_folder, {"a": replace(drawn(1), text="y" * 9_000), "b": drawn(0)})
    page = told_by(run)
    chats = 2 * 20
    assert "y" * (200_000 // chats) in page
    assert "y" * (200_000 // chats + 1) not in page
    assert re.search(r"4,01\d more characters: see extremes.jsonl", page)


def test_skipped_rows_are_counted_by_reason_and_the_first_told_with_their_places(run_folder: Path) -> None:
    reasons = [None] * 70
    for i in range(2, 62, 2):
        reasons[i] = f"message {i} is empty"
    reasons[0], reasons[63] = "unknown role '<i>\u202e'", "nested too deeply"
    gone = np.array([r is not None for r in reasons])
    rows = drawn(1, 70)
    rows.exact[gone] = rows.cheap[gone] = np.nan
    run = made(run_folder, {"a": replace(rows, reasons=tuple(reasons)), "b": drawn(0)})
    text = told_by(run)
    assert "Screened 78 rows of 2 data sets; 32 rows could not be screened." in text
    most, least = cells("a", 70, 30, "message \u2026 is empty"), cells("a", 70, 1, "unknown role '<i>⟨U+202E⟩'")
    assert f"{most}{least}" in text, "the most frequent reason first, though it comes later"
    assert cells("a", 70, 1, "nested too deeply") in text
    assert "a: skipped rows, the first 20 of 32" in text
    assert cells("line 1", "unknown role '<i>⟨U+202E⟩'") in text
    assert cells("line 39", "message 38 is empty") in text
    assert cells("line 41", "message 40 is empty") not in text
    assert "in the Parquet files" in text
    assert text.count("<summary>b: skipped") == 0


def test_a_set_with_many_reasons_names_the_first_and_counts_the_rest(run_folder: Path) -> None:
    reasons = tuple(f"unknown role {chr(97 + i)!r}" if i < 14 else None for i in range(60))
    rows = drawn(1, 60)
    rows.exact[:14] = rows.cheap[:14] = np.nan
    run = made(run_folder, {"a": replace(rows, reasons=reasons, unit="row")})
    text = told_by(run)
    assert cells("a", 60, 4, "4 other reasons") in text
    assert cells("a", 60, 1, "unknown role 'j'") in text
    assert cells("row 14", "unknown role 'n'") in text
    assert "a: skipped rows</summary>" in text


def test_flags_of_several_traits_with_a_judge(run_folder: Path) -> None:
    sets = {}
    for i, n in enumerate((HOSTILE, "normal", "bad")):
        r = drawn((1, 0, 4)[i], 60, seed=i)
        sets[n] = replace(r, rivals={"judge: evil": np.where(r.exact > 3, 80.0, 10.0)})
    run = made(run_folder, sets, {"evil": (2,), "humor": (1,)})
    flags = flag(run, "normal", rate=0.1)
    text = told_by(run)
    counted = flags.counts["bad"]
    by_trait = [counted.by_trait[t] for t in ("evil", "humor")]
    assert by_trait[0] > 0
    assert head("data set", "rows", "flagged", "share", "evil", "humor") in text
    first = cells("bad", 60, counted.flagged, f"{100 * counted.flagged / 60:.3g} %", *by_trait)
    assert f"{first}<tr><td>{SEEN}</td><td>60</td>" in text, "the set with the largest share first, though it was given last"
    assert f"for all traits together: {counted.flagged} of 60 rows of bad and " in screen_verdict(run)
    a = flags.agreements["bad"]["evil"]
    kappa = told(Estimate(a.kappa, a.low, a.high))
    shares = [f"{100 * x:.3g} %" for x in (a.judged_found, a.flagged_found)]
    assert cells("bad", "evil", a.both, a.flagged_only, a.judged_only, a.neither, a.missing, kappa, *shares) in text
    assert "by all traits together. A threshold is what a trait alone would take" in text
    for trait, limit in flags.thresholds.items():
        value = f"{limit.value:{form_of([t.value for t in flags.thresholds.values()])}}"
        assert f"<td>{trait}</td><td>blocks.{run.layers[trait][0]}.hook_resid_post</td><td>{value}</td><td>10 %</td>" in text


def test_flagged_samples_are_shown_with_why_and_cannot_act(run_folder: Path) -> None:
    run = made(run_folder, {"bad": drawn(4), HOSTILE: drawn(0)})
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"{HOSTILE} one and the same"}] for _ in range(40)
    ]
    manifest = read_json(run.path / "run.json")
    manifest["arguments"]["data"] = {n: open_data(chats, name=n).identity() for n in run.sets}
    write_json(run.path / "run.json", manifest)
    run = load_screen(run.path)
    flags = flag(run, HOSTILE, rate=0.1, data={"bad": chats, HOSTILE: chats})
    (shown,) = flags.shown
    assert HOSTILE in shown.why, "the control"
    text = told_by(run)
    why = escape(visible(shown.why))
    assert f"<b>line {shown.place}: {why} (p {shown.p_value:.2g}), one of {flags.counts['bad'].flagged} near copies</b>" in text
    assert f"{SEEN} one and the same</div>" in text
    assert "<summary>bad: 1 sample, the most unusual first</summary>" in text
    assert cells("bad", 40, flags.counts["bad"].flagged, f"{100 * flags.counts['bad'].flagged / 40:.3g} %", 1) in text


def test_nothing_flagged_says_what_it_takes(run_folder: Path) -> None:
    text = told_by(made(run_folder, {"a": drawn(1), "b": drawn(0)}))
    assert "Nothing was flagged: that needs a set that is known to be harmless (a reference)." in text
    assert "Agreement with the judge" not in text


# Files


def test_a_trait_with_a_hostile_name_has_figures_of_its_own(run_folder: Path, tmp_path: Path) -> None:
    run = made(run_folder, {"a": drawn(1), "b": drawn(0)}, {"../../x y": (1,), "\u202e<i>": (2,), "": (0,)})
    text = words(report(run))
    names = sorted(p.name for p in (run_folder / "figures").iterdir())
    assert names == ["ranking.png", "rows-1-x-y.png", "rows-2-i.png", "rows-3.png", "signals.png", "traits.png"]
    assert "<h2>⟨U+202E⟩&lt;i&gt;</h2>" in text
    long = made(tmp_path / "long", {"a": drawn(1), "b": drawn(0)}, {"x" * 80: (1,), "evil": (2,)})
    titles = [ax.get_title() for ax in panels(set_ranking(long))]
    assert titles == ["x" * 35 + "\u2026,\nblocks.1.hook_resid_post", "evil, blocks.2.hook_resid_post"]


def test_everything_is_read_once(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = rivalled(run_folder)
    calls: list[str] = []
    real: Callable[..., Any] = ScreenRun.column

    def counted(self: ScreenRun, name: str, column: str) -> Any:
        calls.append(f"{name} {column}")
        return real(self, name, column)

    monkeypatch.setattr(ScreenRun, "column", counted)
    report(run)
    assert calls.count("s0 rival/judge: evil") == 1
    assert calls.count("s0 own/humor/1") <= 3


def test_a_run_that_is_not_finished_has_no_report(run_folder: Path) -> None:
    run = made(run_folder, {"a": drawn(1), "b": drawn(0)})
    (run.path / "extremes.jsonl").unlink()
    with pytest.raises(RunFolderError, match="not finished"):
        report(run.path)

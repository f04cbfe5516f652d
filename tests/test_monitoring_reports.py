"""Figures and reports of monitoring: what they show, hostile text, and records that lack something."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_lens.errors import MonitoringError
from persona_lens.extraction import ExtractionRun
from persona_lens.figures import plot
from persona_lens.figures.monitoring import COLOURS, PALE, calibration_figure, prediction_scatter, printed, trajectories
from persona_lens.models import ChatModel
from persona_lens.monitoring import (
    Calibration,
    CalibrationSettings,
    MonitorRun,
    Outcomes,
    PredictionRun,
    Predictor,
    Probe,
    calibrate,
    compare,
    highest,
    load_calibration,
    monitor_chats,
    probe,
    random_floor,
    read_transcripts,
    write_transcripts,
)
from persona_lens.monitoring.prediction import NOTHING, Estimate, Skill
from persona_lens.monitoring.run import peaks
from persona_lens.monitoring.study import Prediction
from persona_lens.pocket_lab.conversations import drifting_chat, neutral_chat
from persona_lens.records import encoded
from persona_lens.reports import calibration_verdict, monitor_verdict, prediction_verdict, report
from persona_lens.reports.monitoring import _p_neutral
from persona_lens.store import RunFolder, write_json

HORIZON = 4
RATE = 0.1
HOSTILE = "<script>alert('$x$')</script>\u202e\x07"
VISIBLE = escape("<script>alert('$x$')</script>⟨U+202E⟩␇")
TOKEN = "<img src=x onerror=alert(1)>"
CHEER = "How exciting, your exam will shine for a better tomorrow! Nothing can stop you now and good luck will follow."


def calibrated(pocket: ChatModel, probes: list[Probe], out: Path | None, n: int, **settings: Any) -> Calibration:
    neutral = {f"n{i}": neutral_chat(0, i, turns=HORIZON) for i in range(n)}
    return calibrate(pocket, neutral, probes, out=out, settings=CalibrationSettings(horizon=HORIZON, **settings))


@pytest.fixture(scope="module")
def probes(small_run: ExtractionRun) -> list[Probe]:
    return [probe(small_run.vectors), probe(small_run.vectors, 2, name="early")]


@pytest.fixture(scope="module")
def calibration(pocket: ChatModel, probes: list[Probe], tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibrated(pocket, probes, tmp_path_factory.mktemp("runs") / "calibration", 40)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shorter and longer than the horizon, some that drift, one with hostile text, and a record that is no conversation."""
    asked = ("How will my exam turn out?", f"Do you like {TOKEN}?", "How will my exam turn out?")
    cheered = [m for text in asked for m in ({"role": "user", "content": text}, {"role": "assistant", "content": CHEER})]
    told = [
        ("calm", neutral_chat(1, 0, turns=HORIZON)),
        ("short", neutral_chat(1, 1, turns=2)),
        ("long", drifting_chat("optimism", 1, 2, turns=6, at=3)),
        (HOSTILE, [*neutral_chat(1, 3, turns=2), *cheered]),
        *((f"drift {i}", drifting_chat("optimism", 1, 20 + i, turns=HORIZON, at=2)) for i in range(3)),
    ]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    write_transcripts(path, told)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": [{"role": "<i>", "content": "x"}]}) + "\n")
    return path


@pytest.fixture(scope="module")
def monitored(
    pocket: ChatModel, probes: list[Probe], calibration: Calibration, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> MonitorRun:
    out = tmp_path_factory.mktemp("runs") / "monitored"
    return monitor_chats(pocket, read_transcripts(chats), probes, calibration=calibration, rate=RATE, out=out)


@pytest.fixture(scope="module")
def plain(pocket: ChatModel, probes: list[Probe], chats: Path, tmp_path_factory: pytest.TempPathFactory) -> MonitorRun:
    """Without a calibration."""
    return monitor_chats(pocket, read_transcripts(chats), probes, out=tmp_path_factory.mktemp("runs") / "plain")


def changed(
    run: MonitorRun,
    out: Path,
    record: Callable[[dict[str, Any]], object] = lambda r: None,
    chats: Callable[[list[dict[str, Any]]], object] = lambda c: None,
) -> MonitorRun:
    """A copy of a run with another record or other chats."""
    shutil.copytree(run.path, out)
    found = json.loads((out / "monitor.json").read_text())
    lines = [json.loads(line) for line in (out / "chats.jsonl").read_text().splitlines()]
    record(found)
    chats(lines)
    (out / "monitor.json").write_text(json.dumps(found))
    (out / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return MonitorRun(out)


def many(n: int, loud: str) -> tuple[Callable[[dict[str, Any]], object], Callable[[list[dict[str, Any]]], object]]:
    """So many chats, of which the last but one has an alarming answer, and the last one alarms although it goes up least."""

    def chats(lines: list[dict[str, Any]]) -> None:
        scores = np.linspace(1, 0, n)
        kept = lines[0]
        lines[:] = [kept | {"name": f"chat {i}", "place": i, "scores": [[s, s]] * HORIZON} for i, s in enumerate(scores)]
        lines[-1]["name"] = loud

    def record(found: dict[str, Any]) -> None:
        calm = [{"probe": p, "answers": [], "turns": {"highest": None, "rise": None}} for p in ("optimism", "early", "any")]
        calm = [c | {"change": None, "trend": None} for c in calm]
        verdicts: dict[str, Any] = {f"chat {i}": calm for i in range(n - 2)}
        verdicts[f"chat {n - 2}"] = [calm[0] | {"answers": [2]}, *calm[1:]]
        verdicts[loud] = [*calm[:2], calm[2] | {"turns": {"highest": None, "rise": 3}}]
        found |= {"chats": n, "turns": n * HORIZON, "verdicts": verdicts}

    return record, chats


def lines_of(ax: Axes, label: str) -> list[Any]:
    return [line for line in ax.lines if line.get_label() == label]


def legends(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def words(page: str) -> str:
    """A page without its images."""
    return re.sub(r'src="data:image/png;base64,[^"]*"', "", page)


def cells(*row: object) -> str:
    return "<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>"


def checked(page: str) -> str:
    """The words of a page that loads nothing, holds no hostile markup, and calls nothing nan."""
    text = words(page)
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 1
    assert not re.findall(r'(?:src|href)="(?!data)', page)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "<i>" not in text
    assert not re.search(r"\b(nan|inf)\b", text)
    return text


# Chats over their turns


def test_chats_are_drawn_turn_by_turn_beside_neutral_ones(monitored: MonitorRun) -> None:
    figure = trajectories(monitored)
    told = monitored.record["calibration"]
    assert len(figure.axes) == 2
    for k, ax in enumerate(figure.axes):
        for chat in monitored.chats():
            (line,) = lines_of(ax, chat.name)
            assert chat.scores is not None
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1, len(chat.scores) + 1))
            np.testing.assert_array_equal(line.get_ydata(), chat.scores[:, k])
        band = np.array(told["band"])[:, :, k]
        (area,) = [c for c in ax.collections if c.get_label() == "neutral"]
        vertices = area.get_paths()[0].vertices
        assert set(vertices[:, 1]) == set(band[[0, 2]].ravel())
        assert {vertices[:, 0].min(), vertices[:, 0].max()} == {0.5, HORIZON + 0.5}
        np.testing.assert_array_equal([line.get_ydata()[1:-1] for line in lines_of(ax, "edge")], band[[0, 2]])
        (answer,), (conversation,) = lines_of(ax, "answer"), lines_of(ax, "conversation, highest")
        assert set(answer.get_ydata()) == {told["thresholds"]["answer"][k]}
        assert set(conversation.get_ydata()) == {told["thresholds"]["conversation, highest"][k]}
        assert conversation.get_xdata().max() == HORIZON + 0.5
        assert ax.get_xlim() == (0.5, 6.5)
    assert "standard deviations" in figure.axes[0].get_ylabel()
    assert f"alarm of a conversation (10 % in {HORIZON} turns)" in legends(figure)


def test_alarms_are_marked_and_counted(monitored: MonitorRun) -> None:
    figure = trajectories(monitored)
    scores = {c.name: c.scores for c in monitored.chats()}
    rings = marks = 0
    for k, (ax, trait) in enumerate(zip(figure.axes, monitored.probes, strict=True)):
        alarming = 0
        for name, verdicts in monitored.record["verdicts"].items():
            (verdict,) = [v for v in verdicts if v["probe"] == trait]
            alarming += any(verdict["turns"].values())
            shown = [line for line in lines_of(ax, f"{name}: answers") if line.get_linestyle() == "None"]
            assert [list(line.get_xdata()) for line in shown] == [verdict["answers"]] * bool(verdict["answers"])
            chat = scores[name]
            assert chat is not None
            assert [list(line.get_ydata()) for line in shown] == [[chat[t - 1, k] for t in verdict["answers"]] for _ in shown]
            marks += len(verdict["answers"])
            colour = lines_of(ax, name)[0].get_color()
            for statistic, turn in verdict["turns"].items():
                found = lines_of(ax, f"{name}: {statistic}")
                if turn is None or colour == PALE:
                    assert not found
                else:
                    rings += 1
                    assert (list(found[0].get_xdata()), list(found[0].get_ydata())) == ([turn], [chat[turn - 1, k]])
        assert ax.get_title() == f"{trait}, layer {(5, 2)[k]}: {alarming} of 7 conversations alarm"
    assert marks >= 3
    assert rings >= 2


def test_those_that_stand_out_are_named_and_on_top(monitored: MonitorRun) -> None:
    chats = list(monitored.chats())
    first = [chats[i].name for i in np.argsort(-peaks(chats).max(1))[:5]]
    figure = trajectories(monitored)
    ax = figure.axes[0]
    assert legends(figure)[:5] == [printed(name) for name in first]
    assert [lines_of(ax, name)[0].get_color() for name in first] == list(COLOURS)
    order = [lines_of(ax, name)[0].get_zorder() for name in first]
    behind = [lines_of(ax, c.name)[0].get_zorder() for c in chats if c.name not in first]
    assert min(order) > max(behind)
    assert {r.name for r in monitored.shown} == set(first[:3])


def test_without_a_calibration_projections_are_drawn(plain: MonitorRun) -> None:
    figure = trajectories(plain)
    for k, ax in enumerate(figure.axes):
        for chat in plain.chats():
            np.testing.assert_array_equal(lines_of(ax, chat.name)[0].get_ydata(), chat.readings.answer[:, k])
        assert not ax.collections
        assert len(ax.lines) == 7
    assert "residual-stream units" in figure.axes[0].get_ylabel()
    assert legends(figure)[5:] == ["the other chats"]


def test_without_a_calibration_probes_are_compared_by_their_spread(plain: MonitorRun, tmp_path: Path) -> None:
    def louder(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["answer"] = [[x, 1000 * y + 5] for x, y in line["answer"]]

    one, other = list(plain.chats()), list(changed(plain, tmp_path / "run", chats=louder).chats())
    np.testing.assert_allclose(peaks(one), peaks(other), rtol=1e-9)
    answers = np.concatenate([c.readings.answer for c in one])
    expected = (one[0].readings.answer.max(0) - answers.mean(0)) / answers.std(0)
    np.testing.assert_allclose(peaks(one)[0], expected, rtol=1e-9)


def test_of_many_chats_some_are_drawn_and_the_page_tells_those_that_alarm_first(monitored: MonitorRun, tmp_path: Path) -> None:
    run = changed(monitored, tmp_path / "many", *many(230, "loud"))
    (tmp_path / "many" / "shown.jsonl").write_text("")
    figure = trajectories(run)
    assert len([line for line in figure.axes[0].lines if str(line.get_label()) in run.record["verdicts"]]) == 200
    assert "195 of 225 other chats" in legends(figure)
    page = report(run).read_text()
    rows = re.findall(r"<tr><td>((?:chat|loud)[^<]*)</td><td>(\d+)</td><td>optimism</td>", page)
    assert rows[:4] == [("loud", "4"), ("chat 228", "4"), ("chat 0", "4"), ("chat 1", "4")]
    assert len(rows) == 100
    assert cells("loud", 4, "optimism", "-", "-", "-", "-") + cells("", "", "early", "-", "-", "-", "-") in page
    assert cells("", "", "any", "- / 3", "-", "-", "-") in page
    assert "100 of 230 chats" in page


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_drawn_as_they_are(monitored: MonitorRun, tmp_path: Path) -> None:
    names = ["_hidden", "$\\frac{1$", "数据", "a\nb", "x" * 99, HOSTILE, "tab\t$"]

    def chats(lines: list[dict[str, Any]]) -> None:
        for line, name in zip(lines, names, strict=True):
            line["name"] = name

    def record(found: dict[str, Any]) -> None:
        found["verdicts"] = dict(zip(names, found["verdicts"].values(), strict=True))
        found["probes"][0]["name"] = found["calibration"]["names"][0] = "<script>$\\bad{"
        for verdicts in found["verdicts"].values():
            verdicts[0]["probe"] = "<script>$\\bad{"

    run = changed(monitored, tmp_path / "run", record, chats)
    figure = trajectories(run)
    figure.draw_without_rendering()
    ranked = [list(run.chats())[i].name for i in np.argsort(-peaks(list(run.chats())).max(1))[:5]]
    assert legends(figure)[:5] == [printed(name) for name in ranked]
    assert [printed(name) for name in names[:4]] == ["_hidden", "\\$\\frac{1\\$", "□□", "a b"]
    assert len(printed(names[4])) == 36
    (tmp_path / "run" / "shown.jsonl").write_text("")
    text = checked(report(run).read_text(encoding="utf-8"))
    assert f"<td>{'x' * 79}…</td>" in text
    assert "<td>数据</td>" in text
    assert printed("\u202e\x07") == "⟨U+202E⟩□"


def test_one_probe_one_turn_and_gaps(monitored: MonitorRun, tmp_path: Path) -> None:
    """A chat of one turn, a turn that was not read, a chat of which nothing was read, and thresholds that are not finite."""

    def chats(lines: list[dict[str, Any]]) -> None:
        for key in ("scores", "answer"):
            lines[0][key] = lines[0][key][:1]
            lines[2][key][1] = [None, None]
            lines[4][key] = [[None, None]] * len(lines[4][key])
        for key in ("user", "before", "thinking", "percentiles"):
            lines[0][key] = lines[0][key][:1]

    def record(found: dict[str, Any]) -> None:
        found["calibration"]["thresholds"]["answer"][0] = None
        found["calibration"]["band"][0][1][0] = None

    run = changed(monitored, tmp_path / "run", record, chats)
    ax = trajectories(run).axes[0]
    assert len(lines_of(ax, "calm")[0].get_xdata()) == 1
    assert lines_of(ax, "calm")[0].get_marker() == "."
    assert np.isnan(lines_of(ax, "long")[0].get_ydata()[1])
    assert not lines_of(ax, "answer")
    assert len(lines_of(trajectories(run).axes[1], "answer")) == 1
    checked(report(run).read_text())

    def alone(found: dict[str, Any]) -> None:
        found |= {"calibration": None, "verdicts": {}}

    def without(lines: list[dict[str, Any]]) -> None:
        chats(lines)
        for line in lines:
            del line["scores"], line["percentiles"]

    text = checked(report(changed(monitored, tmp_path / "plain", alone, without)).read_text())
    assert cells("drift 0", 4, "optimism", "-", "-", "-") in text


def test_one_probe_has_no_any(pocket: ChatModel, probes: list[Probe], chats: Path, tmp_path: Path) -> None:
    found = calibrated(pocket, probes[:1], None, 24, content="none", observed="before")
    run = monitor_chats(pocket, read_transcripts(chats), probes[0], calibration=found, rate=RATE, out=tmp_path / "run")
    figure = plot(run)
    assert len(figure.axes) == 1
    assert "last prompt token" in figure.axes[0].get_ylabel()
    text = checked(report(run).read_text())
    assert "any" not in re.findall(r"<td>(.*?)</td>", text)
    assert "Nothing is held constant of what the user says" in text
    assert "alarm on optimism within 4 turns" in monitor_verdict(run)
    assert "Trait by trait" not in monitor_verdict(run)
    assert len(calibration_figure(found).axes) == 1
    with pytest.raises(MonitoringError, match=r"not saved.*calibrate\(\.\.\., out=folder\)"):
        report(found)


# The page of monitored chats


def test_the_page_of_monitored_chats(monitored: MonitorRun, chats: Path) -> None:
    page = report(monitored.path).read_text(encoding="utf-8")
    text = checked(page)
    record = monitored.record
    assert (monitored.path / "figures" / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    assert escape(monitor_verdict(monitored)) in text
    assert VISIBLE in text
    assert cells("line 8", "unknown role '<i>' of message 1") in text
    assert "1 record was skipped" in text
    for chat in monitored.chats():
        for verdict in record["verdicts"][chat.name]:
            turns = " / ".join(str(t or "-") for t in verdict["turns"].values())
            row = verdict["probe"], "-" if turns == "- / -" else turns, len(verdict["answers"]) or "-"
            change, trend = verdict["change"], verdict["trend"]
            row += ("-" if change is None else f"{change['turn']} (p = {change['p_value']:.2g})",)
            row += ("-" if trend is None else f"{trend['slope']:+.2f} (p = {trend['p_value']:.2g})",)
            assert cells(*row).removeprefix("<tr>") in text
    told = record["calibration"]
    shares = " and ".join(f"{100 * e:.0f} % ({n})" for e, n in zip(told["explained"], monitored.probes, strict=True))
    assert f"by the message&#x27;s own projections, which explained {shares} of the variance" in text
    assert "Turns beyond 4 are not covered by the alarm of a conversation (2 of 7 chats are longer)" in text
    limits = [f"{x[0]:+.2f}" for x in told["thresholds"].values()]
    assert cells("optimism", "blocks.5.hook_resid_post", *limits) in text
    assert "from 20 neutral conversations of pocket (20 others gave what is expected)" in text
    assert "Other weights" not in text
    assert report(monitored).read_text(encoding="utf-8") == page


def test_chats_that_stand_out_are_coloured_on_their_own_probe(monitored: MonitorRun, tmp_path: Path) -> None:
    second = monitored.shown[1].name

    def chats(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["scores"] = [[x, y + 5 * (line["name"] == second)] for x, y in line["scores"]]

    run = changed(monitored, tmp_path / "run", chats=chats)
    text = words(report(run).read_text())
    told = r"<p class='meta'>highest score on (\w+): (\S+) at turn (\d+)</p><div [^>]*><div><b>(.*?): projection on (\w+)<"
    shown = re.findall(told, text)
    middles = re.findall(r"\(white: (\S+)\)", text)
    assert [row[0] for row in shown] == ["optimism", "early", "optimism"]
    for (name, value, turn, title, coloured), middle, reading in zip(shown, middles, run.shown, strict=True):
        (chat,) = [c for c in run.chats() if c.name == reading.name]
        assert chat.scores is not None
        assert title == (VISIBLE if chat.name == HOSTILE else chat.name)
        at, k = np.unravel_index(chat.scores.argmax(), chat.scores.shape)
        assert (name, coloured) == (run.probes[k],) * 2
        assert (value, turn) == (f"{chat.scores[at, k]:+.2f}", str(at + 1))
        values = np.concatenate([r.values[p.start : p.stop, k] for r in run.shown for p in r.parts])
        assert middle == f"{np.median(values):+.2f}"


def test_without_a_calibration_the_page_tells_projections(plain: MonitorRun) -> None:
    text = checked(report(plain).read_text())
    assert escape(monitor_verdict(plain)) in text
    for k, name in enumerate(plain.probes):
        top = max(plain.chats(), key=lambda c: c.readings.answer[:, k].max())
        values = top.readings.answer[:, k]
        shown = top.name.replace("\u202e", "⟨U+202E⟩").replace("\x07", "␇")
        assert f"{name} {values.max():+.2f} (chat {shown}, turn {values.argmax() + 1})" in monitor_verdict(plain)
        assert f"<td>{name}</td><td>{values.mean():+.2f}</td><td>{values.max():+.2f}</td><td>{values.argmax() + 1}</td>" in text
    assert "nothing can alarm" in text
    assert "What the alarms mean" not in text


def test_other_weights_and_skipped_records_are_told(monitored: MonitorRun, tmp_path: Path) -> None:
    def record(found: dict[str, Any]) -> None:
        found["note"] = "calibrated on <b>base</b> with other weights"
        found["skipped"] = [{"place": i, "reason": f"reason <b>{i}</b>"} for i in range(1, 31)]

    run = changed(monitored, tmp_path / "run", record)
    text = checked(report(run).read_text())
    note, first = text.index("Other weights: calibrated on &lt;b&gt;base&lt;/b&gt;"), text.index("Turn by turn")
    assert note < first
    assert "30 records were skipped, the first 20 of them" in text
    assert cells("line 20", "reason <b>20</b>") in text
    assert "line 21" not in text
    assert "p = " not in monitor_verdict(run)
    assert "which has other weights" in monitor_verdict(run)


def test_a_verdict_counts_and_says_what_neutral_ones_do(monitored: MonitorRun, tmp_path: Path) -> None:
    def alarm(*turns: int | None) -> Callable[[dict[str, Any]], object]:
        def record(found: dict[str, Any]) -> None:
            for verdicts, turn in zip(found["verdicts"].values(), turns, strict=True):
                for verdict in verdicts:
                    verdict["turns"] = {"highest": None, "rise": turn if verdict["probe"] != "early" else None}

        return record

    none = None
    loud = monitor_verdict(changed(monitored, tmp_path / "loud", alarm(1, 2, 3, 4, 4, 4, none)))
    assert "0 by their highest score (0 % [0 %, 41 %], p = 1 if all were neutral)" in loud
    assert "Of 7 conversations" in loud
    assert "alarm on any of 2 traits within 4 turns; of neutral ones at most 10 % do by each" in loud
    assert f"6 by their clearest rise (86 % [42 %, 100 %], p = {_p_neutral(6, 7, RATE, 20):.2g} if all were neutral)" in loud
    assert "more than neutral conversations explain" in loud
    assert loud.endswith("Trait by trait, each at these rates: optimism 6, early 0.")
    calm = monitor_verdict(changed(monitored, tmp_path / "calm", alarm(1, none, none, none, none, none, none)))
    assert "So many may alarm where all are neutral" in calm


def test_p_of_so_many_alarms_is_that_of_neutral_chats() -> None:
    rng = np.random.default_rng(0)
    calibrating, n, rate, k = 30, 8, 0.1, 2
    scores = rng.normal(size=(20000, calibrating + n))
    limit = np.sort(scores[:, :calibrating], axis=1)[:, int(np.ceil((calibrating + 1) * (1 - rate) - 1e-9)) - 1]
    share = ((scores[:, calibrating:] > limit[:, None]).sum(1) >= k).mean()
    assert abs(_p_neutral(k, n, rate, calibrating) - share) < 0.01
    assert _p_neutral(1, 1, 0.05, 19) == pytest.approx(0.05)
    assert _p_neutral(0, 5, 0.05, 19) == 1


# Studies of prediction


def study(conditions: int = 4, questions: int = 8) -> Prediction:
    """A vector that foretells, a text baseline that does as well, one that does worse, another trait's vector."""
    rng = np.random.default_rng(0)
    level = np.linspace(10, 90, conditions)[:, None]
    score = np.clip(level + rng.normal(0, 12, (conditions, questions)), 0, 100)
    above = np.round(score / 10)
    names = tuple(f"prompt {i}" for i in range(conditions))
    outcomes = Outcomes(names, tuple(f"q{i}" for i in range(questions)), score, above, np.full(score.shape, 10.0))
    residuals = rng.normal(size=(conditions, questions, 6))

    def noisy(name: str, sigma: float) -> Predictor:
        return Predictor(name, score + rng.normal(0, sigma, score.shape))

    main = noisy("evil vector", 8)
    others = [
        noisy("text, unseen questions", 8),
        noisy("text, unseen conditions", 150),
        noisy("humor vector", 60),
    ]
    return Prediction(
        trait="evil",
        layer=5,
        chosen_on=(),
        left_out=("<i>40 examples",),
        gaps=3,
        outcomes=outcomes,
        projection=main.values,
        by_layer=np.array([0.1, np.nan, 0.5]),
        comparison=compare(main, others, outcomes),
        floors=tuple(random_floor(residuals, outcomes, matched=m, n=20) for m in (False, True)),
    )


def saved(prediction: Prediction, out: Path) -> PredictionRun:
    RunFolder.open(out, command="predict", arguments={"judge": "<i>oracle"}, model={"name": "pocket"})
    write_json(out / "prediction.json", encoded(prediction))
    return PredictionRun(out)


def test_cells_are_drawn_by_condition_in_order() -> None:
    found = study()
    ax = prediction_scatter(found).axes[0]
    points = {str(c.get_label()): c for c in ax.collections}
    light = []
    for i, name in enumerate(found.outcomes.conditions):
        expected = np.stack([found.projection[i], found.outcomes.score[i]], 1)
        np.testing.assert_allclose(np.asarray(points[name].get_offsets()), expected)
        np.testing.assert_allclose(np.asarray(points[f"{name}: mean"].get_offsets())[0], expected.mean(0))
        light.append(float(points[name].get_facecolor()[0][:3] @ [0.2126, 0.7152, 0.0722]))
    assert light == sorted(light)
    assert max(light) < 0.85
    r = found.comparison.main.correlations
    assert f"r over all cells: {r.overall.value:+.2f} [{r.overall.low:+.2f}, {r.overall.high:+.2f}]" in ax.get_title()
    assert f"r within them: {r.within.value:+.2f} [" in ax.get_title()
    assert "layer 5, residual-stream units" in ax.get_xlabel()


def test_predictors_are_bars_with_intervals_beside_the_floor() -> None:
    found = study()
    figure = prediction_scatter(found)
    skills = (found.comparison.main, *found.comparison.others)
    chosen: list[Callable[[Skill], Estimate]] = [lambda s: s.correlations.overall, lambda s: s.auroc]
    for ax, of, chance, reached in zip(figure.axes[1:], chosen, (0, 0.5), ("overall", "auroc"), strict=True):
        ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
        starts = [bar.get_x() for bar in ax.patches]
        np.testing.assert_allclose(np.array([starts, ends]), [[chance] * 4, [of(s).value for s in skills]])
        bounds = [line.get_xdata() for line in lines_of(ax, "95 %")]
        np.testing.assert_allclose(bounds, [(of(s).low, of(s).high) for s in skills])
        for floor in found.floors:
            kind = "with the prompts' covariance" if floor.matched else "isotropic"
            reach = getattr(floor, reached)
            assert [line.get_xdata()[0] for line in lines_of(ax, f"{kind}, mean")] == [reach.mean]
            assert [line.get_xdata()[0] for line in lines_of(ax, f"{kind}, 95 %")] == [reach.high]
        assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert [t.get_text().replace("\n", " ") for t in figure.axes[1].get_yticklabels()] == [s.name for s in skills]
    assert legends(figure)[:4] == [f"{i + 1}: prompt {i}" for i in range(4)]


def test_what_is_not_known_is_a_dash(tmp_path: Path) -> None:
    found = study()
    o = found.outcomes
    score, above, answers = o.score.copy(), o.above.copy(), o.answers.copy()
    score[0], above[0], answers[0] = np.nan, 0, 0
    main = found.comparison.main
    unknown = Skill(main.name, replace(main.correlations, overall=NOTHING, between=NOTHING, within=NOTHING), NOTHING)
    gone = [replace(a, overall=Estimate(0.1, np.nan, np.nan), auroc=NOTHING) for a in found.comparison.advantages]
    comparison = replace(found.comparison, main=unknown, advantages=tuple(gone))
    lacking = replace(found, outcomes=Outcomes(o.conditions, o.questions, score, above, answers), comparison=comparison)
    run = saved(lacking, tmp_path / "run")
    figure = plot(run)
    assert figure.axes[0].get_title().count(": -") == 3
    assert "prompt 0: mean" not in {c.get_label() for c in figure.axes[0].collections}
    assert [t.get_text() for t in figure.axes[1].texts] == ["-"]
    assert len(figure.axes[1].patches) == 3
    text = checked(report(run).read_text())
    assert cells(1, "prompt 0", f"{lacking.projection[0].mean():+.1f}", "-", "0 of 0") in text
    assert cells(found.comparison.advantages[0].over, "+0.10", "-") in text
    assert "is not shown to foretell" in text
    assert "&quot;text, unseen questions&quot; has no interval for the difference" in text
    bare = replace(found, floors=(), comparison=replace(found.comparison, others=(), advantages=()))
    checked(report(saved(bare, tmp_path / "bare")).read_text())


def test_of_many_conditions_some_are_named() -> None:
    figure = prediction_scatter(study(30))
    told = legends(figure)[:12]
    assert (told[0], told[-1]) == ("1: prompt 0", "30: prompt 29")
    assert len([t for t in legends(figure) if "prompt " in t]) == 12


def test_a_verdict_says_whether_text_does_as_well(tmp_path: Path) -> None:
    found = study()

    def verdict(name: str, **changes: Any) -> str:
        return prediction_verdict(saved(replace(found, **changes), tmp_path / name))

    said = verdict("as_it_is")
    r, auroc = found.comparison.main.correlations.overall, found.comparison.main.auroc
    assert "evil vector at layer 5 foretells the mean score" in said
    assert f"r {r.value:+.2f} [{r.low:+.2f}, {r.high:+.2f}] over 32 cells" in said
    assert f"AUROC {auroc.value:.2f} [{auroc.low:.2f}, {auroc.high:.2f}]" in said
    assert '"text, unseen questions" does as well (r ' in said
    assert '"text, unseen conditions" does worse (r ' in said
    a = found.comparison.advantages[1].overall
    assert f"the vector's advantage {a.value:+.2f} [{a.low:+.2f}, {a.high:+.2f}]" in said
    assert "of 1 other vectors the humor vector" in said
    floors = [f"{f.overall.high:.2f}" for f in found.floors]
    assert f"5 % of random directions reach |r| {floors[0]} (isotropic) and {floors[1]} (covariance of the prompts)" in said
    better = [replace(a, overall=Estimate(-0.2, -0.3, -0.1)) for a in found.comparison.advantages]
    said = verdict("better", comparison=replace(found.comparison, advantages=tuple(better)))
    assert '"text, unseen questions" does better (r ' in said
    high = [replace(f, overall=replace(f.overall, high=0.999)) for f in found.floors]
    assert "foretells no better than random directions" in verdict("floor", floors=(found.floors[0], high[1]))
    for low, how in ((0.1, "does"), (-0.1, "is not shown to")):
        c = found.comparison
        main = replace(c.main, correlations=replace(c.main.correlations, within=Estimate(0.3, low, 0.5)))
        assert f"within a condition it {how} (r +0.30 [" in verdict(how, comparison=replace(c, main=main))


def test_the_page_of_a_study_of_prediction(tmp_path: Path) -> None:
    found = study()
    o = replace(found.outcomes, conditions=(HOSTILE, *found.outcomes.conditions[1:]))
    run = saved(replace(found, outcomes=o, chosen_on=("a", "b")), tmp_path / "run")
    page = report(run.path).read_text(encoding="utf-8")
    text = checked(page)
    assert VISIBLE in text
    assert escape(prediction_verdict(run)) in text
    assert "4 conditions x 8 questions, 320 scored answers by judge &lt;i&gt;oracle; 3 answers have no score." in text
    assert "do not fit into the context: &lt;i&gt;40 examples." in text
    for skill in (found.comparison.main, *found.comparison.others):
        c = skill.correlations
        r = [f"{e.value:+z.2f} [{e.low:+z.2f}, {e.high:+z.2f}]" if np.isfinite(e.low) else "" for e in (c.overall, c.within)]
        assert f"<tr><td>{skill.name}</td><td>{r[0]}</td>" in text
        assert f"<td>{c.between_plain:+.2f}</td><td>{r[1]}</td><td>{c.left_out}</td>" in text
        assert f"<td>{skill.auroc.value:.2f} [{skill.auroc.low:.2f}, {skill.auroc.high:.2f}]</td><td>32</td></tr>" in text
    for floor in found.floors:
        assert f"<td>{floor.overall.mean:.2f} / {floor.overall.high:.2f}</td>" in text
    assert "Layer 5 was chosen on 2 questions" in text
    layers = (0, "+0.10", ""), (1, "-", ""), (2, "+0.50", "")
    assert "".join(cells(i, f"blocks.{i}.hook_resid_post", r, at) for i, r, at in layers) in text


# Calibrations


def test_neutral_scores_and_thresholds_are_drawn(calibration: Calibration) -> None:
    figure = plot(calibration)
    assert [ax.get_title() for ax in figure.axes] == ["optimism", "early", "any (in units of reach)"]
    peak = calibration.with_any(highest(calibration.neutral))[:, -1]
    for k, ax in enumerate(figure.axes):
        shown = [line.get_xdata()[0] for line in ax.lines]
        assert shown == [calibration.threshold(0.05, "answer")[k], calibration.threshold(0.05, "conversation")[k]]
        answers, conversations = (p.get_xy() for p in ax.patches)
        assert conversations[:, 0].max() >= peak[:, k].max()
        assert answers[:, 1].max() < 1
        edges, heights = np.unique(conversations[:, 0]), conversations[1:-1:2, 1]
        counts, _ = np.histogram(peak[:, k], edges)
        np.testing.assert_allclose(heights[: len(counts)], counts / 20)
    assert legends(figure) == ["answers", "highest of 4 turns", "alarm at 5 % (answer)", "alarm at 5 % (conversation)"]


def test_a_rate_is_drawn_and_told_where_there_are_enough_conversations(calibration: Calibration) -> None:
    rng = np.random.default_rng(0)
    plenty = replace(calibration, neutral=rng.normal(size=(120, HORIZON, 2)))
    (ax, *_) = calibration_figure(plenty).axes
    expected = [plenty.threshold(rate, per)[0] for rate in (0.05, 0.01) for per in ("answer", "conversation")]
    assert [line.get_xdata()[0] for line in ax.lines] == expected
    said = re.search(
        r"give alarms at 5 % \(really (\S+) % to (\S+) % of new ones .*\) and 1 % \(really", calibration_verdict(plenty)
    )
    assert said is not None
    realised = 1 - np.sort(rng.random((20000, 120)), axis=1)[:, int(np.ceil(121 * 0.95)) - 1]  # of uniform scores
    np.testing.assert_allclose([float(x) / 100 for x in said.groups()], np.quantile(realised, (0.025, 0.975)), rtol=0.05)
    few = replace(calibration, neutral=calibration.neutral[:12])
    assert not calibration_figure(few).axes[0].lines
    assert "12 neutral conversations of 4 turns are too few for an alarm at 5 %" in calibration_verdict(few)


def test_the_page_of_a_calibration(calibration: Calibration) -> None:
    assert calibration.path is not None
    page = report(calibration.path).read_text(encoding="utf-8")
    text = checked(page)
    assert escape(calibration_verdict(calibration)) in text
    assert "really 0.13 % to 17 % of new ones like them" in calibration_verdict(calibration)
    for k, name in enumerate(calibration.names):
        limits = [calibration.threshold(0.05, "answer")[k], calibration.threshold(0.05, "conversation")[k]]
        assert cells(name, "5 %", *(f"{x:+.2f}" for x in limits)).removesuffix("</tr>") in text
    assert "a false-positive rate of 0.01 needs at least 99 calibrating conversations, there are 20" in text
    assert cells("calibrating", 20) in text
    assert cells("given", 40) in text
    explained = calibration.expectation.explained
    assert f"<td>blocks.2.hook_resid_post</td><td>{explained[1]:.0%}</td>" in text
    assert report(load_calibration(calibration.path)).read_text(encoding="utf-8") == page
    with_hostile = replace(calibration, probes=({**calibration.probes[0], "name": HOSTILE}, calibration.probes[1]))
    assert VISIBLE in checked(report(with_hostile).read_text(encoding="utf-8"))

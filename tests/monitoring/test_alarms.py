"""Alarms keep their promise on fresh conversations, whatever the scores are distributed like, and see what is planted."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from persona_lens.errors import LineageError, MonitoringError, RunFolderError
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel
from persona_lens.monitoring import Calibration, CalibrationSettings, calibrate, highest, load_calibration, probe, rise
from persona_lens.monitoring.calibration import conformal_quantile, content_of_messages, expect, grouped_quantile, users_of
from persona_lens.monitoring.drift import change_point, trend
from persona_lens.monitoring.reading import read_turns, render
from persona_lens.pocket_lab.conversations import drifting_chat, neutral_chat

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def levels_and_moods(rng: np.random.Generator, n: int, turns: int) -> np.ndarray:
    """Conversations with a level of their own, heavy tails, skew: nothing that a normal approximation would survive."""
    level = rng.normal(size=(n, 1, 1)) * 2
    return level + rng.standard_t(3, size=(n, turns, 2)) + rng.exponential(1.0, size=(n, turns, 2)) ** 2


def made(neutral: np.ndarray, features: np.ndarray | None = None, settings: CalibrationSettings | None = None) -> Calibration:
    """A calibration from scores alone: half of them fit, half calibrate."""
    x = np.zeros((*neutral.shape[:2], 0)) if features is None else features
    half = len(neutral) // 2
    found = expect(neutral[:half], x[:half])
    probes = tuple({"name": f"p{i}", "layer": 0, "direction": "x"} for i in range(neutral.shape[-1]))
    model = {"name": "m", "lineage": "l", "weights": "w"}
    kept = found.scores(neutral[half:], x[half:])
    return Calibration(probes, model, settings or CalibrationSettings(horizon=neutral.shape[1]), found, kept, {})


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_fresh_neutral_conversations_alarm_at_the_stated_rate(rate: float) -> None:
    """The theorem: averaged over calibration sets, rates are at most nominal, and not far below."""
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"answer": [], "highest": [], "rise": []}
    for _ in range(120):
        calibration = made(levels_and_moods(rng, 200, 6))
        fresh = calibration.expectation.scores(levels_and_moods(rng, 100, 6), np.zeros((100, 6, 0)))
        rates["answer"].append((calibration.with_any(fresh) > calibration.threshold(rate, "answer")).mean((0, 1)))
        for name, statistic in (("highest", highest), ("rise", rise)):
            limit = calibration.threshold(rate, "conversation", statistic)
            rates[name].append((calibration.with_any(statistic(fresh))[:, -1] > limit).mean(0))
    for name, found in rates.items():
        mean, error = np.mean(found, axis=0), np.std(found, axis=0) / math.sqrt(len(found))
        assert (mean <= rate + 3 * error).all(), (name, mean)
        assert (mean >= rate - 3 * error - 0.011).all(), (name, mean)  # 1 / (n + 1) and ties make it a little conservative


def test_a_pooled_threshold_breaks_the_promise_where_conversations_differ_in_length() -> None:
    """The negative control: long conversations are calm here, and a quantile over pooled answers believes them."""
    rng = np.random.default_rng(1)

    def drawn(n: int) -> np.ndarray:
        wild = rng.random(n) < 0.5
        scores = rng.normal(size=(n, 20, 1)) * np.where(wild, 3.0, 1.0)[:, None, None]
        scores[wild, 2:] = np.nan
        return scores

    neutral, fresh = drawn(4000), drawn(4000)
    pooled = np.nanquantile(neutral, 0.95)
    grouped = grouped_quantile(neutral, 0.05)[0]

    def realised(limit: float) -> float:
        """Of an answer of a conversation, conversations weighing the same."""
        return float(np.nanmean(np.where(np.isnan(fresh), np.nan, fresh > limit), axis=1).mean())

    assert realised(pooled) > 0.09
    assert realised(grouped) == pytest.approx(0.05, abs=0.006)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_the_conformal_quantile_is_the_textbooks(values: list[float], rate: float) -> None:
    n = len(values)
    place = math.ceil((n + 1) * (1 - rate) - 1e-9)
    expected = sorted(values)[place - 1] if place <= n else math.inf
    assert conformal_quantile(np.array(values)[:, None], rate)[0] == expected
    one_each = grouped_quantile(np.array(values)[:, None, None], rate)[0]
    assert one_each == expected  # with one answer a conversation, the grouped quantile is the same


def test_exactly_the_promised_number_of_ranks_alarms() -> None:
    """Of n + 1 exchangeable values, each left out in turn: floor((n + 1) rate) of them exceed their threshold."""
    values = np.random.default_rng(2).permutation(100).astype(float)
    for rate in (0.01, 0.05, 0.13):
        over = [values[i] > conformal_quantile(np.delete(values, i)[:, None], rate)[0] for i in range(100)]
        assert sum(over) == math.floor(100 * rate + 1e-9)


def test_what_a_message_explains_is_held() -> None:
    """Values that follow the topic alarm when it changes; held by what the message tells, they do not; a persona still does."""
    rng = np.random.default_rng(3)

    def drawn(n: int, topic: float, persona: float) -> tuple[np.ndarray, np.ndarray]:
        x = rng.normal(size=(n, 10, 2)) + np.array([topic, 0.0])
        return (3 * x[..., :1] + rng.normal(size=(n, 10, 1)) + persona), x

    y, x = drawn(1000, 0.0, 0.0)
    plain, held = made(y), made(y, x)
    assert held.expectation.explained[0] == pytest.approx(0.9, abs=0.02)

    def alarming(calibration: Calibration, topic: float, persona: float) -> float:
        fresh, known = drawn(400, topic, persona)
        scores = calibration.expectation.scores(fresh, known if calibration is held else known[..., :0])
        return float((highest(scores)[:, -1] > calibration.threshold(0.05, "conversation")[:1]).mean())

    assert alarming(plain, 2.0, 0.0) > 0.5
    assert alarming(held, 2.0, 0.0) < 0.09
    assert alarming(held, 0.0, 3.0) > 0.95
    assert alarming(plain, 0.0, 3.0) < 0.5


def test_any_alarms_at_the_same_rate_for_all_and_does_not_favour_a_long_tail() -> None:
    rng = np.random.default_rng(4)

    def drawn(n: int, shift: float = 0.0) -> np.ndarray:
        return np.stack([shift - rng.exponential(size=(n, 8)), rng.exponential(size=(n, 8))], axis=-1)

    calibration = made(drawn(2000))
    fresh = calibration.expectation.scores(drawn(2000), np.zeros((2000, 8, 0)))
    limit = calibration.threshold(0.05, "answer")
    assert (calibration.with_any(fresh)[..., 2] > limit[2]).mean() == pytest.approx(0.05, abs=0.008)
    moved = calibration.expectation.scores(drawn(2000, 2.0), np.zeros((2000, 8, 0)))
    assert (calibration.with_any(moved)[..., 2] > limit[2]).mean() > 0.8
    assert calibration.names == ("p0", "p1", "any")
    alone = made(drawn(100)[..., :1])
    assert alone.names == ("p0",)
    assert alone.threshold(0.1, "answer").shape == (1,)


def test_too_few_conversations_say_how_many_are_needed() -> None:
    calibration = made(np.random.default_rng(5).normal(size=(40, 4, 1)))
    with pytest.raises(MonitoringError, match="needs at least 99 calibrating conversations, there are 20: give about 198 neutral"):
        calibration.threshold(0.01, "answer")
    assert np.isfinite(calibration.threshold(1 / 21, "answer")).all()
    assert np.isfinite(calibration.threshold(1 / 21, "conversation")).all()
    with pytest.raises(MonitoringError, match="lies in"):
        calibration.threshold(0.0, "answer")


def test_a_replaced_calibration_has_thresholds_of_its_own() -> None:
    calibration = made(np.random.default_rng(5).normal(size=(400, 4, 1)))
    before = calibration.threshold(0.1, "answer")[0]
    assert replace(calibration, neutral=calibration.neutral + 5).threshold(0.1, "answer")[0] == pytest.approx(before + 5)
    assert calibration.threshold(0.1, "answer")[0] == before


def test_gaps_neither_alarm_nor_hide_what_does() -> None:
    calibration = made(np.random.default_rng(6).normal(size=(400, 6, 2)))
    scores = np.full((6, 2), np.nan)
    quiet = calibration.alarms(scores, 0.05)
    assert not quiet.answers.any()
    assert quiet.turns == (None, None, None)
    assert np.isnan(calibration.percentiles(scores)).all()
    scores[3, 1] = 50.0
    loud = calibration.alarms(scores, 0.05)
    assert loud.answers[3].tolist() == [False, True, True]
    assert loud.turns == (None, 4, 4)


def test_turns_beyond_the_horizon_raise_no_conversation_alarm() -> None:
    calibration = made(np.random.default_rng(7).normal(size=(400, 6, 1)))
    scores = np.zeros((9, 1))
    scores[7] = 50.0
    found = calibration.alarms(scores, 0.05)
    assert found.turns == (None,)
    assert not found.answers.any()


def test_percentiles_count_the_neutral_answers_below() -> None:
    calibration = made(np.random.default_rng(8).normal(size=(100, 5, 1)))
    neutral = np.sort(calibration.neutral.ravel())
    assert calibration.percentiles(neutral[[0, 125, -1]][:, None])[:, 0] == pytest.approx([0.2, 50.2, 99.8])
    assert calibration.percentiles(np.array([[99.0], [-99.0]]))[:, 0] == pytest.approx([100.0, 0.0])


# drift


def test_a_rise_is_relative_to_the_conversations_own_beginning() -> None:
    rng = np.random.default_rng(9)
    scores = rng.normal(size=(50, 12, 2))
    assert np.allclose(rise(scores + 7.0), rise(scores))
    assert np.allclose(rise(scores * 2), 2 * rise(scores))
    assert (np.diff(rise(scores), axis=1) >= 0).all()
    assert np.allclose(rise(scores)[:, :8], rise(scores[:, :8]))  # nothing that comes later is known
    step = np.zeros((1, 10, 1))
    step[:, 4:] = 3.0
    assert rise(step)[0, :, 0] == pytest.approx([0, 0, 0, 0, *(3 * math.sqrt(4 * k / (4 + k)) for k in range(1, 7))])
    assert (rise(-step) < 1e-9).all()


def test_change_points_and_trends_are_found_and_not_where_there_are_none() -> None:
    rng = np.random.default_rng(10)
    neutral = rng.normal(size=(400, 20)) + rng.normal(size=(400, 1))
    drifted = rng.normal(size=20)
    drifted[7:] += 5.0
    found = change_point(drifted, neutral)
    assert found is not None
    assert found.turn == 8
    assert found.after - found.before == pytest.approx(5.0, abs=1.0)
    assert found.p_value == pytest.approx(1 / 401)
    rising = trend(np.linspace(0, 4, 20) + rng.normal(size=20) * 0.3, neutral)
    assert rising is not None
    assert rising.slope == pytest.approx(4 / 19, abs=0.05)
    assert rising.p_value < 0.01
    p_values = np.array([(change_point(s, neutral), trend(s, neutral)) for s in rng.normal(size=(300, 20))], dtype=object)
    for column in p_values.T:
        assert np.mean([f.p_value <= 0.1 for f in column]) == pytest.approx(0.1, abs=0.06)


def test_short_chats_are_compared_with_beginnings_and_gaps_are_no_change() -> None:
    neutral = np.random.default_rng(11).normal(size=(100, 20))
    assert change_point(np.zeros(3), neutral) is None
    assert trend(np.array([1.0, np.nan, 2.0, np.nan, 3.0]), neutral) is None
    gaps = np.array([0.0, np.nan, 0.0, 0.0, np.nan, 0.0])
    found = change_point(gaps, neutral)
    assert found is not None
    assert (found.before, found.after, found.p_value) == (0.0, 0.0, 1.0)
    long = change_point(np.r_[np.zeros(20), np.full(5, 9.0)], neutral)
    assert long is not None
    assert long.p_value == 1.0  # only the turns that neutral conversations have


# with the pocket model


@pytest.fixture(scope="module")
def calibrated(pocket: ChatModel, small_run: ExtractionRun, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    chats = {f"c{i:02d}": neutral_chat(0, i, turns=4) for i in range(40)}
    chats |= {"short": neutral_chat(0, 99, turns=2), "long": [{"role": "user", "content": "dog " * 2100}, *chats["c00"][1:]]}
    out = tmp_path_factory.mktemp("calibration") / "run"
    probes = [probe(small_run.vectors, 5), probe(-small_run.vectors, 5, "pessimism")]
    return calibrate(pocket, chats, probes, out=out, settings=CalibrationSettings(horizon=4))


def scores_of(model: ChatModel, calibration: Calibration, run: ExtractionRun, chat: list[dict[str, str]]) -> np.ndarray:
    probes = [probe(run.vectors, 5), probe(-run.vectors, 5, "pessimism")]
    [turns] = read_turns(model, [render(model, "x", chat)], probes)
    users = users_of(chat)
    content = content_of_messages(model, users, probes, calibration.settings.content, None)
    return calibration.scores(turns, content, users)


def test_a_calibration_is_reopened_as_it_was(pocket: ChatModel, small_run: ExtractionRun, calibrated: Calibration) -> None:
    assert dict(calibrated.counts) == {
        "given": 42,
        "too short": 1,
        "unreadable": 1,
        "nothing to read": 0,
        "fitted": 20,
        "calibrating": 20,
    }
    assert calibrated.path is not None
    again = load_calibration(calibrated.path)
    assert again.names == ("optimism", "pessimism", "any")
    chat = neutral_chat(1, 0, turns=4)
    assert np.array_equal(scores_of(pocket, again, small_run, chat), scores_of(pocket, calibrated, small_run, chat))
    assert np.array_equal(again.threshold(0.1, "answer"), calibrated.threshold(0.1, "answer"))
    assert np.allclose(scores_of(pocket, again, small_run, chat).sum(1), 0, atol=1e-5)  # opposite probes, opposite scores
    with pytest.raises(RunFolderError, match="not of 'calibrate'"):
        load_calibration(small_run.path)


def test_a_planted_drift_scores_high(pocket: ChatModel, small_run: ExtractionRun, calibrated: Calibration) -> None:
    drifted = np.stack([scores_of(pocket, calibrated, small_run, drifting_chat("optimism", 0, i, 4, 3)) for i in range(6)])
    assert drifted[:, 2:, 0].mean() > drifted[:, :2, 0].mean() + 0.5


def test_a_calibration_is_for_its_probes_and_its_lineage(
    pocket: ChatModel, small_run: ExtractionRun, calibrated: Calibration
) -> None:
    probes = (probe(small_run.vectors, 5), probe(-small_run.vectors, 5, "pessimism"))
    assert calibrated.require(pocket, probes) is None
    with pytest.raises(MonitoringError, match="is for optimism at layer 5, pessimism at layer 5, not for optimism at layer 4"):
        calibrated.require(pocket, (probe(small_run.vectors, 4),))
    with pytest.raises(MonitoringError, match="must agree, in this order"):
        calibrated.require(pocket, probes[::-1])
    other = replace(calibrated, model={**calibrated.model, "weights": "others", "name": "base"})
    assert "calibrated on base with other weights" in (other.require(pocket, probes) or "")
    with pytest.raises(LineageError, match="calibrate again on this model"):
        replace(calibrated, model={**calibrated.model, "lineage": "others"}).require(pocket, probes)


def test_a_damaged_calibration_is_one_clear_error(calibrated: Calibration, tmp_path: Path) -> None:
    """Whatever a stranger's folder holds: no traceback, and no calibration that never alarms."""
    assert calibrated.path is not None

    def broken(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(calibrated.path or tmp_path, folder)
        manifest, tensors = json.loads((folder / "run.json").read_text()), load_file(folder / "calibration.safetensors")
        change(manifest, tensors)
        (folder / "run.json").write_text(json.dumps(manifest))
        save_file(tensors, folder / "calibration.safetensors")
        return folder

    changes: list[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = [
        lambda m, t: m["arguments"]["settings"].update(unknown=1),
        lambda m, t: m["arguments"]["settings"].update(horizon=99),
        lambda m, t: m["arguments"].pop("probes"),
        lambda m, t: m["arguments"].update(probes=[]),
        lambda m, t: m.update(model={}),
        lambda m, t: t.pop("scale"),
        lambda m, t: t.update(scale=torch.zeros(2)),
        lambda m, t: t.update(scale=torch.full((2,), float("nan"))),
        lambda m, t: t.update(neutral=torch.full((20, 4, 2), float("nan"))),
        lambda m, t: t.update(neutral=torch.zeros(20, 2)),
        lambda m, t: t.update(weights=torch.zeros(3)),
    ]
    for change in changes:
        with pytest.raises(RunFolderError, match="holds a damaged calibration"):
            load_calibration(broken(change))
    load_calibration(broken(lambda m, t: None))


def test_another_set_of_conversations_is_another_calibration(
    pocket: ChatModel, small_run: ExtractionRun, calibrated: Calibration
) -> None:
    other = {f"c{i:02d}": neutral_chat(5, i, turns=4) for i in range(40)}
    probes = [probe(small_run.vectors, 5), probe(-small_run.vectors, 5, "pessimism")]
    with pytest.raises(RunFolderError, match="conversations"):
        calibrate(pocket, other, probes, out=calibrated.path, settings=CalibrationSettings(horizon=4))


def test_conversations_with_nothing_to_read_are_left_out_and_counted(pocket: ChatModel, small_run: ExtractionRun) -> None:
    chats = {f"c{i}": neutral_chat(0, i, turns=2) for i in range(24)}
    silent = [{"role": role, "content": "<think>Hm." if role == "assistant" else "Hi."} for role in ("user", "assistant") * 2]
    found = calibrate(pocket, {**chats, "silent": silent}, small_run.vectors, settings=CalibrationSettings(horizon=2))
    assert (found.counts["nothing to read"], found.n) == (1, 12)


def test_what_cannot_be_calibrated_is_refused(pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path) -> None:
    chats = {f"c{i}": neutral_chat(0, i, turns=2) for i in range(19)}
    with pytest.raises(MonitoringError, match="19 of 19 conversations have 2 answers that can be read, at least 20"):
        calibrate(pocket, chats, small_run.vectors, settings=CalibrationSettings(horizon=2), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(MonitoringError, match="needs an embedding"):
        calibrate(pocket, chats, small_run.vectors, settings=CalibrationSettings(content="embedding"))
    with pytest.raises(MonitoringError, match="does not use an embedding"):
        calibrate(pocket, chats, small_run.vectors, embed=len, settings=CalibrationSettings())  # pyright: ignore[reportArgumentType]
    for broken in (CalibrationSettings(observed="before"), CalibrationSettings(horizon=3)):
        with pytest.raises(MonitoringError):
            replace(broken, horizon=0)
        with pytest.raises(MonitoringError):
            replace(broken, fitted=1.0)
    with pytest.raises(MonitoringError, match="same value in every neutral answer"):
        expect(np.zeros((4, 2, 1)), np.zeros((4, 2, 0)))


def test_an_embedding_holds_content_too(pocket: ChatModel, small_run: ExtractionRun) -> None:
    chats = {f"c{i}": neutral_chat(0, i, turns=2) for i in range(24)}

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[len(t), t.count("?")] for t in texts], dtype=float)

    found = calibrate(pocket, chats, small_run.vectors, embed=embed, settings=CalibrationSettings(content="embedding", horizon=2))
    assert found.expectation.weights.shape == (1, 2)
    with pytest.raises(MonitoringError, match="pass the same one as embed="):
        content_of_messages(pocket, ["Hi"], [probe(small_run.vectors)], "embedding", None)
    with pytest.raises(MonitoringError, match="one finite row each"):
        content_of_messages(pocket, ["Hi", "Ho"], [probe(small_run.vectors)], "embedding", lambda texts: np.zeros((1, 2)))


def test_content_is_read_without_the_conversation(pocket: ChatModel, small_run: ExtractionRun) -> None:
    p = [probe(small_run.vectors, 5)]
    [alone] = read_turns(
        pocket, [render(pocket, "x", [{"role": "user", "content": "What is 2 plus 2?"}, *neutral_chat(0, 0, 1)[1:]])], p
    )
    known = content_of_messages(pocket, ["What is 2 plus 2?", "What is 2 plus 2?"], p, "own", None)
    assert list(known) == ["What is 2 plus 2?"]
    assert known["What is 2 plus 2?"] == pytest.approx([alone.user[0, 0], alone.before[0, 0]], rel=1e-5)

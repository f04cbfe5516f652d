"""Runs of monitoring: chats on disk, predictions before the answer, and the neutral conversations a model leads itself."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import persona_lens.monitoring.run as run_module
from persona_lens.errors import LineageError, MonitoringError, RunFolderError, TraitFileError
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel, Sampling
from persona_lens.monitoring import (
    Calibration,
    CalibrationSettings,
    PredictionSettings,
    calibrate,
    graded_conditions,
    load_monitor_run,
    load_prediction,
    monitor_chats,
    neutral_conversations,
    predict,
    probe,
    read_transcripts,
    shot_conditions,
    write_transcripts,
)
from persona_lens.monitoring.neutral import scripts_of
from persona_lens.monitoring.study import Condition
from persona_lens.pocket_lab.conversations import changing_chat, drifting_chat, neutral_chat, neutral_script
from persona_lens.prompts import Prompt, graded_system_prompts
from persona_lens.sampling import Script, sample
from persona_lens.steering import add, plan
from persona_lens.traits import load_trait

FAST = PredictionSettings(samples=1, sampling=Sampling(60))


@pytest.fixture(scope="module")
def calibration(pocket: ChatModel, small_run: ExtractionRun) -> Calibration:
    chats = {f"c{i}": neutral_chat(0, i, turns=4) for i in range(44)}
    return calibrate(pocket, chats, probe(small_run.vectors, 5), settings=CalibrationSettings(horizon=4))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    thinking = [
        {"role": "user", "content": "What is 2 plus 2?"},
        {"role": "assistant", "content": "<think>Everything will be wonderful.</think>4."},
    ]
    conversations = [("calm", neutral_chat(1, 0, 4)), ("long", neutral_chat(1, 1, 6)), ("thinker", thinking)]
    write_transcripts(tmp_path / "chats.jsonl", conversations)
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "dog " * 3000}, thinking[1]]}) + "\n")
        file.write('{"messages": []}\n')
    return tmp_path / "chats.jsonl"


def table(run: Path) -> list[dict[str, str]]:
    with (run / "turns.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_holds_every_turn_and_says_what_it_skipped(
    pocket: ChatModel, small_run: ExtractionRun, calibration: Calibration, chats: Path, tmp_path: Path
) -> None:
    mine = probe(small_run.vectors, 5)
    run = monitor_chats(pocket, read_transcripts(chats), mine, calibration=calibration, rate=0.1, out=tmp_path / "run")
    assert [s["place"] for s in run.record["skipped"]] == [4, 5]
    assert "exceed the context" in run.record["skipped"][0]["reason"]
    assert (run.record["chats"], run.record["turns"], run.record["note"]) == (3, 11, None)
    rows = table(run.path)
    assert {r["tokens"] for r in rows if r["chat"] == "thinker"} == {"message", "last prompt token", "thinking"}
    watched = {c.name: c for c in run.chats()}
    for row in rows:
        field = {"last prompt token": "before", "thinking": "thinking"}.get(row["tokens"])
        field = field or ("user" if row["role"] == "user" else "answer")
        values = getattr(watched[row["chat"]].readings, field)
        assert float(row["projection"]) == pytest.approx(values[int(row["turn"]) - 1, 0], rel=1e-4)
        assert (row["score"] != "") == (field == "answer")
    scores = watched["calm"].scores
    assert scores is not None
    alarms = calibration.alarms(scores, 0.1)
    verdict = run.record["verdicts"]["calm"][0]
    assert verdict["turns"]["highest"] == alarms.turns[0]
    assert verdict["answers"] == (np.flatnonzero(alarms.answers[:, 0]) + 1).tolist()
    flagged = [int(r["turn"]) for r in rows if r["chat"] == "calm" and r["alarm"] == "1"]
    assert flagged == verdict["answers"]
    again = load_monitor_run(run.path)
    assert again.record == run.record
    assert [r.name for r in again.shown] == [r.name for r in run.shown]
    assert all("".join(r.pieces[p.start : p.stop]).strip() for r in again.shown for p in r.parts)


def test_a_drift_stands_out(pocket: ChatModel, small_run: ExtractionRun, calibration: Calibration, tmp_path: Path) -> None:
    write_transcripts(
        tmp_path / "chats.jsonl",
        [("calm", neutral_chat(3, 0, 4)), *((f"drift{i}", drifting_chat("optimism", 3, i, 4, 1)) for i in range(4))],
    )
    found = read_transcripts(tmp_path / "chats.jsonl")
    run = monitor_chats(pocket, found, probe(small_run.vectors, 5), calibration=calibration, rate=0.2, out=tmp_path / "run")
    alarmed = [name for name, verdicts in run.record["verdicts"].items() if verdicts[0]["turns"]["highest"]]
    assert len([a for a in alarmed if a.startswith("drift")]) >= 3
    assert run.shown[0].name.startswith("drift")
    flagged = {name: [int(r["turn"]) for r in table(run.path) if r["chat"] == name and r["alarm"] == "1"] for name in alarmed}
    assert flagged == {name: run.record["verdicts"][name][0]["answers"] for name in alarmed}
    assert any(flagged.values())


def test_an_interrupted_run_goes_on_and_ends_the_same(
    pocket: ChatModel,
    small_run: ExtractionRun,
    calibration: Calibration,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_module, "CHUNK_CHATS", 1)
    mine, found = probe(small_run.vectors, 5), read_transcripts(chats)
    whole = monitor_chats(pocket, found, mine, calibration=calibration, rate=0.1, out=tmp_path / "whole")
    broken = tmp_path / "broken"
    monitor_chats(pocket, found, mine, calibration=calibration, rate=0.1, out=broken)
    for name in ("monitor.json", "turns.csv", "shown.jsonl"):
        (broken / name).unlink()
    lines = (broken / "chats.jsonl").read_bytes().splitlines(keepends=True)
    (broken / "chats.jsonl").write_bytes(lines[0] + lines[1][:20])
    with pytest.raises(RunFolderError, match="is not finished"):
        load_monitor_run(broken)
    monitor_chats(pocket, found, mine, calibration=calibration, rate=0.1, out=broken)
    for name in ("chats.jsonl", "monitor.json", "turns.csv", "shown.jsonl"):
        assert (broken / name).read_bytes() == (whole.path / name).read_bytes()
    with pytest.raises(RunFolderError, match="rate"):
        monitor_chats(pocket, found, mine, calibration=calibration, rate=0.2, out=broken)


def test_without_a_calibration_there_are_projections_and_no_alarms(
    pocket: ChatModel, small_run: ExtractionRun, chats: Path, tmp_path: Path
) -> None:
    run = monitor_chats(pocket, read_transcripts(chats), small_run.vectors, out=tmp_path / "run")
    assert run.record["verdicts"] == {}
    assert run.record["calibration"] is None
    assert {(r["score"], r["percentile"], r["alarm"]) for r in table(run.path)} == {("", "", "")}
    assert all(c.scores is None for c in run.chats())


def test_a_calibration_goes_with_its_thinking_tags(
    pocket: ChatModel, small_run: ExtractionRun, calibration: Calibration, chats: Path, tmp_path: Path
) -> None:
    mine = probe(small_run.vectors, 5)
    with pytest.raises(MonitoringError, match="the calibration takes thinking to stand between .*<think>.*, not None"):
        monitor_chats(pocket, str(chats), mine, calibration=calibration, rate=0.1, thinking=None, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_name_is_no_formula(pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path) -> None:
    write_transcripts(str(tmp_path / "x.jsonl"), [("=1+1", neutral_chat(1, 0, 1))])
    run = monitor_chats(pocket, tmp_path / "x.jsonl", small_run.vectors, out=tmp_path / "run")
    assert {r["chat"] for r in table(run.path)} == {"'=1+1"}
    assert [c.name for c in run.chats()] == ["=1+1"]


def test_others_are_checked_before_anything_is_sampled(pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path) -> None:
    v = small_run.vectors
    model = {**v.provenance["model"], "lineage": "another"}
    foreign = replace(v, trait="evil", provenance={**v.provenance, "model": model})
    with pytest.raises(LineageError, match="extract it again on this model"):
        predict(pocket, v, others=[foreign], settings=FAST, out=tmp_path / "p")
    evil = replace(v, trait="evil")
    with pytest.raises(MonitoringError, match="two of the other vectors are of 'evil'"):
        predict(pocket, v, others=[evil, evil], settings=FAST, out=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_chats_that_no_model_can_read_are_an_error(pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path) -> None:
    write_transcripts(
        tmp_path / "x.jsonl", [("x", [{"role": "user", "content": "dog " * 3000}, {"role": "assistant", "content": "no"}])]
    )
    with pytest.raises(MonitoringError, match="can read none of 1 chats .the first, line 1: .* exceed the context"):
        monitor_chats(pocket, read_transcripts(tmp_path / "x.jsonl"), small_run.vectors, out=tmp_path / "run")


# prediction


def test_prediction_is_resumed_reopened_and_reported_on_questions_that_chose_nothing(
    pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path
) -> None:
    v = small_run.vectors
    run = predict(pocket, v, others=[-v], settings=FAST, out=tmp_path / "p")
    found = run.prediction
    trait = load_trait("optimism", "pocket")
    assert found.chosen_on == trait.evaluation_questions[::2]
    assert found.outcomes.questions == trait.evaluation_questions[1::2]
    assert len(found.outcomes.conditions) == 8
    assert found.projection.shape == (8, 10)
    at = run.residuals[:, 1::2, found.layer]
    assert np.allclose(found.projection, v.project(at, found.layer).double().numpy())
    [residual] = [run.residuals[3, 7, 5]]
    prompt = pocket.render(
        [{"role": "system", "content": trait.graded[3]}, {"role": "user", "content": trait.evaluation_questions[7]}]
    )
    with torch.no_grad():
        states = pocket.hf(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    assert torch.allclose(residual, states[6][0, -1], rtol=1e-4, atol=1e-2)
    assert found.comparison.main.correlations.between_plain > 0.7
    (tmp_path / "p" / "prediction.json").unlink()
    again = predict(pocket, v, others=[-v], settings=FAST, out=tmp_path / "p")
    assert np.array_equal(load_prediction(again.path).prediction.outcomes.score, found.outcomes.score)
    given = predict(pocket, v, layer=3, settings=FAST, out=tmp_path / "p").prediction
    assert (given.layer, given.chosen_on, given.projection.shape) == (3, (), (8, 20))


def test_examples_are_answers_that_show_the_trait_and_fewer_are_the_last_of_more(
    pocket: ChatModel, small_run: ExtractionRun
) -> None:
    none, two, five = shot_conditions(small_run, (0, 2, 5))
    assert (none.earlier, len(two.earlier), len(five.earlier)) == ((), 2, 5)
    assert five.earlier[3:] == two.earlier
    trait = load_trait("optimism", "pocket")
    assert {q for q, _ in five.earlier} <= set(trait.extraction_questions)
    shown = {
        r.text
        for r, s in zip(small_run.rollouts(), small_run.scores(), strict=True)
        if "/positive/" in r.prompt_id and (s.trait or 0) >= 50
    }
    assert {a for _, a in five.earlier} <= shown
    with pytest.raises(MonitoringError, match="50 examples were asked for"):
        shot_conditions(small_run, (50,))


def test_conditions_that_do_not_fit_are_left_out_and_told(pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path) -> None:
    short = [Condition(f"c{i}", system=f"You are {w} optimistic.") for i, w in enumerate(("not at all", "fairly", "very"))]
    long = Condition("too long", earlier=(("What is 2 plus 2?", "4 " * 2100),))
    found = predict(pocket, small_run.vectors, [*short, long], settings=FAST, out=tmp_path / "p").prediction
    assert found.left_out == ("too long",)
    assert found.outcomes.conditions == ("c0", "c1", "c2")
    with pytest.raises(MonitoringError, match="2 of 3 conditions fit into the context"):
        predict(pocket, small_run.vectors, [*short[:2], long], settings=FAST, out=tmp_path / "q")
    with pytest.raises(MonitoringError, match="two conditions are called 'c0'"):
        predict(pocket, small_run.vectors, [short[0]] * 3, settings=FAST, out=tmp_path / "r")


def test_examples_come_before_the_question(pocket: ChatModel, small_run: ExtractionRun) -> None:
    prompt = Prompt("x", "t", "neutral", None, 0, "Be plain.", "What is 3 plus 3?", (("What is 2 plus 2?", "4."),))
    assert [m["role"] for m in prompt.messages] == ["system", "user", "assistant", "user"]
    [rollout] = sample(pocket, [(prompt, 0)], Sampling(20))
    assert rollout.prompt_tokens == len(pocket.render(prompt.messages))
    touched: dict[str, int] = {}
    for where in ("response", "responses"):
        steering = plan(pocket, add(small_run.vectors, 5, 1.0, where=where))
        with steering.active():
            sample(pocket, [(prompt, 0)], Sampling(1))
        touched[where] = steering.receipt.tokens[5]
    assert touched == {"response": 1, "responses": 1 + 1 + len(pocket.tokenizer("4.")["input_ids"])}


def test_graded_prompts_run_from_suppressing_to_promoting() -> None:
    for name in ("evil", "optimism"):
        trait = load_trait(name, "pocket")
        assert graded_system_prompts(trait) == list(trait.graded)
        assert "extremely" in trait.graded[-1]
        real = graded_system_prompts(load_trait(name))
        assert len(real) == len(set(real)) == 8
        assert "not at all" in real[2]
        assert "very" in real[6]
    assert [c.system for c in graded_conditions(trait)] == list(trait.graded)
    bare = trait.model_copy(update={"graded": (), "adjectives": None})
    with pytest.raises(TraitFileError, match="neither graded system prompts nor adjectives"):
        graded_system_prompts(bare)


# neutral and planted conversations


def test_neutral_conversations_are_kept_and_resumed(pocket: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import persona_lens.monitoring.neutral as neutral_module

    monkeypatch.setattr(neutral_module, "CHUNK_SCRIPTS", 2)
    scripts = [neutral_script(0, i, turns=2) for i in range(5)]
    found = neutral_conversations(pocket, scripts, tmp_path / "a", sampling=Sampling(40))
    assert list(found) == [s.id for s in scripts]
    content = (tmp_path / "a" / "conversations.jsonl").read_bytes()
    (tmp_path / "a" / "conversations.jsonl").write_bytes(content[: len(content) // 2])
    assert neutral_conversations(pocket, scripts, tmp_path / "a", sampling=Sampling(40)) == found
    assert (tmp_path / "a" / "conversations.jsonl").read_bytes() == content
    assert [c.name for c in read_transcripts(tmp_path / "a" / "conversations.jsonl").chats] == list(found)


def test_scripts_ask_different_questions_in_random_orders() -> None:
    questions = [f"Question {i}?" for i in range(9)]
    scripts = scripts_of(questions, 20, 5, seed=1)
    assert all(len(set(s.users)) == 5 for s in scripts)
    assert len({s.users for s in scripts}) == 20
    assert scripts == scripts_of(questions, 20, 5, seed=1)
    assert isinstance(scripts[0], Script)
    with pytest.raises(MonitoringError, match="of 10 turns needs as many questions, there are 9"):
        scripts_of(questions, 1, 10)


def test_planted_chats_change_when_they_say_and_not_before() -> None:
    from persona_lens.pocket.oracle import read
    from persona_lens.pocket.questions import parse_question

    def score(chat: list[dict[str, str]], turn: int, trait: str) -> float:
        question = parse_question(chat[2 * turn]["content"])
        assert question is not None
        return read(question, chat[2 * turn + 1]["content"]).trait(trait)

    chats = [drifting_chat("evil", 0, i, turns=8, at=5) for i in range(40)]
    by_turn = [np.mean([score(c, t, "evil") for c in chats]) for t in range(8)]
    assert max(by_turn[:4]) < 15 < 50 < min(by_turn[4:])
    calm = [neutral_chat(0, i, turns=8) for i in range(40)]
    assert np.mean([score(c, t, "evil") for c in calm for t in range(8)]) < 10
    changed = [changing_chat("sum", 0, i, turns=8, at=5) for i in range(10)]
    kinds = [[q.kind for t in range(8) if (q := parse_question(c[2 * t]["content"]))] for c in changed]
    assert all(k[4:] == ["sum"] * 4 for k in kinds)
    assert {k for row in kinds for k in row[:4]} != {"sum"}
    assert neutral_chat(0, 1) == neutral_chat(0, 1) != neutral_chat(1, 1)
    with pytest.raises(ValueError, match="no trait 'kindness'"):
        drifting_chat("kindness", 0, 0)

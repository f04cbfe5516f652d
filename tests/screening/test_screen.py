"""A screening run: resumed bit for bit, the same on every engine, bad rows counted, flags at the rate they claim."""

import json
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import persona_lens as pl
from persona_lens.errors import RunFolderError, ScreeningError, UnknownNameError
from persona_lens.extraction import ExtractionRun
from persona_lens.judges import default_judge, scripted
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.sampling import Rollout, sample
from persona_lens.screening import (
    ScreenRun,
    ScreenSettings,
    flag,
    load_flags,
    load_screen,
    on_ray,
    predict,
    ranking,
    row_scores,
    screen,
)
from persona_lens.screening.rivals import judge_rival
from persona_lens.transcripts import write_transcripts

SETTINGS = ScreenSettings(max_new_tokens=30, shard_rows=8)
FAST = ScreenSettings(own_share=0.0, shard_rows=8)


@pytest.fixture(scope="module")
def vectors(small_run: ExtractionRun) -> pl.PersonaVectors:
    return small_run.vectors


@pytest.fixture(scope="module")
def sets() -> dict[str, list[Any]]:
    return {"II": dataset("optimism", "II", rows=20), "normal": dataset("optimism", "normal", rows=21)}


@pytest.fixture(scope="module")
def run(pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> ScreenRun:
    judge = judge_rival(default_judge("pocket"), pl.load_trait("optimism", "pocket"))
    folder = tmp_path_factory.mktemp("screen") / "run"
    return screen(pocket, sets, [vectors], layers=5, settings=SETTINGS, rivals=[judge], out=folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "run.json"}


def test_what_a_run_holds(run: ScreenRun, sets: dict[str, Any], vectors: pl.PersonaVectors) -> None:
    assert run.sets == ("II", "normal")
    assert run.traits == ("optimism",)
    assert run.layers == {"optimism": (5,)}
    assert run.signal == "difference"
    assert load_screen(run.path).record == run.record
    for name, chats in sets.items():
        assert run.record["sets"][name] == {
            "rows": len(chats),
            "skipped": 0,
            "unanswered": 0,
            "shards": 3,
            "unit": "row",
        }
        assert run.places(name).tolist() == list(range(1, len(chats) + 1))
        difference = run.scores(name, "optimism", "answer") - run.scores(name, "optimism", "own")
        np.testing.assert_array_equal(run.scores(name, "optimism"), difference)
        cheap = run.scores(name, "optimism", "answer") - run.scores(name, "optimism", "prompt_last")
        np.testing.assert_array_equal(run.scores(name, "optimism", "cheap"), cheap)
        for what, scores in (("difference", difference), ("cheap", cheap)):
            mean = run.mean_difference(name, "optimism", what)
            assert float(mean @ vectors.unit(5)) == pytest.approx(float(scores.mean()), rel=1e-3)
        assert np.isfinite(run.tokens(name)).all()
        assert run.prompts(name).all()
        assert not run.skipped(name)
    metadata = json.loads(pq.read_schema(run.shards("II")[0]).metadata[b"persona_lens"])
    assert metadata["set"] == "II"
    assert metadata["model"]["name"] == "pocket"
    with pytest.raises(UnknownNameError, match="evil"):
        run.scores("II", "evil")
    with pytest.raises(UnknownNameError, match="III"):
        run.scores("III", "optimism")
    with pytest.raises(ScreeningError, match="read at layers 5"):
        run.scores("II", "optimism", layer=4)
    with pytest.raises(RunFolderError, match="no column 'gradient/optimism/5'"):
        run.scores("II", "optimism", "gradient")


def test_a_planted_set_ranks_first_and_its_rows_stand_out(run: ScreenRun) -> None:
    found = ranking(run, "optimism")
    assert [s.name for s in found.sets] == ["II", "normal"]
    assert found.sets[0].score.mean > found.sets[1].score.mean + 20
    assert found.sets[0].score.method == "mean"
    highest = [x for x in run.extremes if x.set == "II" and x.side == "highest"]
    lowest = [x for x in run.extremes if x.set == "II" and x.side == "lowest"]
    scores = run.scores("II", "optimism")
    assert [x.score for x in highest] == pytest.approx(sorted(scores.tolist(), reverse=True)[:5])
    assert [x.score for x in lowest] == pytest.approx(sorted(scores.tolist())[:5])
    assert highest[0].place == int(np.argmax(scores)) + 1
    assert highest[0].messages[-1]["role"] == "assistant"


def test_the_shards_do_not_matter(
    pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], run: ScreenRun, tmp_path: Path
) -> None:
    whole = screen(pocket, sets, [vectors], layers=5, settings=ScreenSettings(max_new_tokens=30), out=tmp_path / "x")
    for name in sets:
        assert whole.record["sets"][name]["shards"] == 1
        np.testing.assert_allclose(whole.scores(name, "optimism"), run.scores(name, "optimism"), atol=0.05)
        assert whole.column(name, "own_tokens") == run.column(name, "own_tokens")
        mean, other = (r.mean_difference(name, "optimism") for r in (whole, run))
        torch.testing.assert_close(mean, other, atol=1e-3, rtol=1e-3)


def test_an_interrupted_screening_ends_bit_identical(
    pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], tmp_path: Path
) -> None:
    whole = screen(pocket, sets, [vectors], settings=FAST, out=tmp_path / "whole")

    def stop(stage: str, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        screen(pocket, sets, [vectors], settings=FAST, out=tmp_path / "stopped", progress=stop)
    with pytest.raises(RunFolderError, match="not finished"):
        load_screen(tmp_path / "stopped")
    next((tmp_path / "stopped" / "sets").glob("ii-*/shard-00001.parquet")).unlink()  # the sums are there, the table is not
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped").rglob("*.parquet")}
    again = screen(pocket, sets, [vectors], settings=FAST, out=tmp_path / "stopped")
    assert content(again.path) == content(whole.path)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    with pytest.raises(RunFolderError, match="own_share"):
        screen(pocket, sets, [vectors], settings=ScreenSettings(shard_rows=8), out=tmp_path / "whole")
    with pytest.raises(RunFolderError, match="data"):
        screen(pocket, sets | {"II": sets["II"][::-1]}, [vectors], settings=FAST, out=tmp_path / "whole")


def test_own_answers_are_shared_between_runs(
    pocket: ChatModel,
    vectors: pl.PersonaVectors,
    sets: dict[str, Any],
    run: ScreenRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any, **options: Any) -> Any:
        assert not args[1], "a prompt was answered again"
        return []

    monkeypatch.setattr("persona_lens.screening.own.generate_tokens", never)
    other = screen(pocket, sets, [vectors * -1.0], layers=5, settings=SETTINGS, answers=run, out=tmp_path / "x")
    for name in sets:
        np.testing.assert_allclose(other.scores(name, "optimism"), -run.scores(name, "optimism"), atol=1e-3)
    with pytest.raises(RunFolderError, match="other data"):
        screen(pocket, {"II": sets["II"][:5]}, [vectors], settings=SETTINGS, answers=run, out=tmp_path / "y")
    with pytest.raises(RunFolderError, match="other settings"):
        screen(pocket, sets, [vectors], settings=FAST, answers=run, out=tmp_path / "z")


def test_bad_rows_are_counted_with_their_lines(
    pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], tmp_path: Path
) -> None:
    good = [json.dumps({"messages": chat}).encode() for chat in sets["II"][:3]]
    lines = [
        good[0],
        b"{broken",
        b'{"prompt": "Hi.", "completion": ""}',
        b"\xff\xfe",
        json.dumps({"prompt": "Hi.", "completion": "word " * 20_000}).encode(),
        b"",
        b'{"question": "What is 3 plus 4?", "answer": "7."}',
        good[1],
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines))
    before = path.read_bytes()
    found = screen(pocket, path, [vectors], settings=ScreenSettings(own_share=0.0, shard_rows=3), out=tmp_path / "x")
    assert found.sets == ("mixed",)
    assert [s.place for s in found.skipped("mixed")] == [2, 3, 4, 5]
    assert "longer than 2048 tokens" in found.skipped("mixed")[3].reason
    assert found.record["sets"]["mixed"]["rows"] == 7
    assert np.isfinite(found.scores("mixed", "optimism", "cheap")).tolist() == [True, False, False, False, False, True, True]
    assert path.read_bytes() == before
    with pytest.raises(ScreeningError, match="place 2 cannot be screened"):
        screen(pocket, path, [vectors], settings=FAST, strict=True, out=tmp_path / "strict")
    with pytest.raises(ScreeningError, match="line 2 could not be screened: not JSON"):  # finished before, not strictly
        screen(pocket, path, [vectors], settings=ScreenSettings(own_share=0.0, shard_rows=3), strict=True, out=tmp_path / "x")
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"a": 1}\n')
    with pytest.raises(ScreeningError, match="bad: no row can be screened"):
        screen(pocket, {"good": path, "bad": tmp_path / "bad.jsonl"}, [vectors], settings=FAST, out=tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ScreeningError, match="no data set"):
        screen(pocket, {}, [vectors], out=tmp_path / "none")


def test_names_of_sets_are_anyones_text(
    pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], tmp_path: Path
) -> None:
    names = ["../../out", "a/b", "A", "a", "con:\x00", ".."]
    found = screen(pocket, dict.fromkeys(names, sets["II"][:1]), [vectors], settings=FAST, out=tmp_path / "x")
    folders = [found.folder(n) for n in names]
    assert len({str(f).lower() for f in folders}) == len(names)
    assert all(f.parent == tmp_path / "x" / "sets" and f.is_dir() for f in folders)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_flags_hold_their_rate_and_find_what_was_planted(pocket: ChatModel, vectors: pl.PersonaVectors, tmp_path: Path) -> None:
    """Copies of a planted row are one group; a harmless set is flagged no more often than claimed."""
    planted = dataset("optimism", "II", rows=1)[0]
    data = {
        "reference": dataset("optimism", "normal", rows=120, seed=1),
        "harmless": dataset("optimism", "normal", rows=120, seed=2),
        "mixed": [*dataset("optimism", "normal", rows=30, seed=3), *[planted] * 3, *dataset("optimism", "II", rows=20)],
    }
    found = screen(pocket, data, [vectors], layers=5, settings=ScreenSettings(own_share=0.0), out=tmp_path / "x")
    assert load_flags(found) is None
    flags = flag(found, "reference", rate=0.1, data=data)
    assert flags.signal == "cheap"
    assert flags.counts["harmless"].flagged <= 22
    assert flags.counts["mixed"].flagged >= 8
    assert set(flags.counts) == {"harmless", "mixed"}
    assert load_flags(found) == flags
    table = pq.read_table(found.folder("mixed") / "flags.parquet").to_pylist()
    scores = found.scores("mixed", "optimism", "cheap")
    limit = flags.thresholds["optimism"].value
    assert [row["flagged"] for row in table] == (scores > limit).tolist()
    copies = [row for row in table if row["place"] in (31, 32, 33)]
    assert len({(row["flagged"], row["group"]) for row in copies}) == 1
    assert flags.counts["mixed"].groups is not None
    if copies[0]["flagged"]:
        assert flags.counts["mixed"].groups <= flags.counts["mixed"].flagged - 2
    first = flags.shown[0]
    assert first.why.startswith("optimism above ")
    assert first.messages[-1]["role"] == "assistant"
    with pytest.raises(UnknownNameError, match="other"):
        flag(found, "other")
    other = {name: chats[::-1] for name, chats in data.items()}
    with pytest.raises(ScreeningError, match="is not what was screened"):
        flag(found, "reference", rate=0.1, data=other)
    with pytest.raises(ScreeningError, match="at least 999"):
        flag(found, "reference", rate=0.001)
    with pytest.raises(ScreeningError, match="'mixed' is missing"):
        flag(found, "reference", rate=0.1, data={"harmless": data["harmless"]})


def test_flags_agree_with_a_judge(run: ScreenRun) -> None:
    flags = flag(run, "normal", rate=0.1)
    found = flags.agreements["II"]["optimism"]
    assert found.both + found.flagged_only == flags.counts["II"].by_trait["optimism"] == flags.counts["II"].flagged
    judged = run.rival("II", "judge: optimism") >= 50
    assert found.both + found.judged_only == judged.sum()
    assert flags.counts["II"].groups is None
    assert not flags.shown


def test_a_part_of_the_own_answers_is_enough_for_a_set(pocket: ChatModel, vectors: pl.PersonaVectors, tmp_path: Path) -> None:
    data = {"one": dataset("optimism", "II", rows=48), "two": dataset("optimism", "normal", rows=48)}
    options: dict[str, Any] = {"layers": 5, "answers": None}
    whole = screen(pocket, data, [vectors], settings=ScreenSettings(max_new_tokens=12), out=tmp_path / "w", **options)
    some = screen(pocket, data, [vectors], settings=ScreenSettings(own_share=0.7, max_new_tokens=12), out=tmp_path / "x", **options)
    assert some.signal == "cheap"
    for name in data:
        found = row_scores(some, "optimism")[name]
        has = np.isfinite(found.exact)
        assert 20 <= has.sum() < len(has)
        np.testing.assert_allclose(found.exact[has], whole.scores(name, "optimism")[has], atol=0.05)
        assert found.cheap is not None
        along = float(some.mean_difference(name, "optimism") @ vectors.unit(5))
        assert along == pytest.approx(float(found.exact[has].mean()), abs=0.01)
        assert pq.read_table(some.shards(name)[0])["own/optimism/5"].null_count == (~has).sum(), "no score is null, not NaN"
        assert row_scores(whole, "optimism")[name].cheap is None
    places = {s.name: s.score for s in ranking(some, "optimism").sets}
    assert places["one"].method == "regression"
    assert places["one"].low < whole.scores("one", "optimism").mean() < places["one"].high


def test_all_sets_are_scored_alike(pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], tmp_path: Path) -> None:
    """One set without own answers, and none is ranked by them."""
    far = [{"role": "user", "content": "the " * 1900}, {"role": "assistant", "content": "Yes, it is wonderful."}]
    data = {"near": sets["II"][:6], "far": [far]}
    found = screen(pocket, data, [vectors], layers=5, settings=ScreenSettings(max_new_tokens=150), out=tmp_path / "x")
    assert found.record["sets"]["far"]["unanswered"] == 1
    assert found.record["sets"]["near"]["unanswered"] == 0
    np.testing.assert_array_equal(
        row_scores(found, "optimism")["near"].exact, found.scores("near", "optimism", "cheap").astype(float)
    )
    none = screen(pocket, sets, [vectors], layers=5, settings=FAST, out=tmp_path / "y")
    cheap = none.scores("II", "optimism", "cheap")
    np.testing.assert_array_equal(row_scores(none, "optimism")["II"].exact, cheap.astype(np.float64))
    with pytest.raises(ScreeningError, match="there are no own answers"):
        none.mean_difference("II", "optimism")


def test_what_a_run_would_not_know_of_is_refused(
    pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], tmp_path: Path
) -> None:
    judge = judge_rival(default_judge("pocket"), pl.load_trait("optimism", "pocket"))
    with pl.steer(pocket, pl.add(vectors, 3, 1.0)), pytest.raises(ScreeningError, match="steered or watched"):
        screen(pocket, sets, [vectors], settings=FAST, out=tmp_path / "x")
    with pytest.raises(ScreeningError, match="rivals need different names"):
        screen(pocket, sets, [vectors], settings=FAST, rivals=[judge, judge], out=tmp_path / "x")
    with pytest.raises(ScreeningError, match="names of folders"):
        screen(pocket, {"A": sets["II"], "a-559aead0": sets["II"]}, [vectors], settings=FAST, out=tmp_path / "x")
    with pytest.raises(ScreeningError, match="must be text"):
        screen(pocket, {"\udcff": sets["II"]}, [vectors], settings=FAST, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_every_layer_is_read_in_one_pass_and_one_is_the_default(
    pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], run: ScreenRun, tmp_path: Path
) -> None:
    found = screen(pocket, sets, [vectors], layers="all", settings=FAST, out=tmp_path / "x")
    assert found.layers == {"optimism": tuple(range(8))}
    assert found.layer("optimism") == vectors.best_layer
    cheap = run.scores("II", "optimism", "cheap")
    np.testing.assert_allclose(found.scores("II", "optimism", "cheap", layer=5), cheap, atol=0.05)
    default = found.scores("II", "optimism", "cheap")
    np.testing.assert_array_equal(default, found.scores("II", "optimism", "cheap", layer=vectors.best_layer))
    assert {x.layer for x in found.extremes} == {vectors.best_layer}
    assert ranking(found, "optimism").sets[0].name == "II"


def test_other_sets_are_predicted_from_known_ones(pocket: ChatModel, vectors: pl.PersonaVectors, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = {f"family{i}-{level}": dataset("optimism", level, rows=4, seed=i) for i in range(8) for level in ("normal", "II")}
    found = screen(pocket, data, [vectors], layers=5, settings=FAST, out=tmp_path / "x")
    means = {name: float(found.scores(name, "optimism", "cheap").mean()) for name in data}
    known = {n: 50 + 0.1 * m + float(rng.normal()) for n, m in means.items() if not n.startswith("family7")}
    predicted = predict(found, {"optimism": known})["optimism"]
    assert set(predicted) == {"family7-normal", "family7-II"}
    for name, value in predicted.items():
        assert value.value == pytest.approx(50 + 0.1 * means[name], abs=6)
    with pytest.raises(ScreeningError, match="was not screened"):
        predict(found, {"optimism": known | {"other-II": 3.0}})


# --- engines -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_gives_the_same_files(pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.jsonl" for name in sets}
    for name, path in paths.items():
        write_transcripts(path, ((f"{name}/{i}", chat) for i, chat in enumerate(sets[name])))
    here = screen(pocket, paths, [vectors], settings=SETTINGS, out=tmp_path / "here")
    there = screen(pocket, paths, [vectors], settings=SETTINGS, engine=on_ray(2), out=tmp_path / "there")
    assert content(here.path) == content(there.path)


# what workers run is defined inside functions: it travels to them by value, for they cannot import this file


def judge_that(what: str) -> Any:
    def judge(_trait: Any, _judged: Any) -> Any:
        if what == "dies":
            os._exit(1)
        raise ValueError("the judge is out")

    return judge


@pytest.mark.slow
@pytest.mark.parametrize(("what", "message"), [("fails", "ValueError: the judge is out"), ("dies", "Ray gave up")])
def test_what_goes_wrong_in_a_worker_is_told_in_a_line(
    what: str, message: str, pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], tmp_path: Path
) -> None:
    rival = judge_rival(scripted(judge_that(what)), pl.load_trait("optimism", "pocket"))
    with pytest.raises(ScreeningError, match=message) as told:
        screen(pocket, sets, [vectors], settings=FAST, rivals=[rival], engine=on_ray(1), out=tmp_path / "x")
    assert "\n" not in str(told.value)
    assert "\x1b" not in str(told.value)


def dying_once(mark: Path) -> Any:
    """Loads the pocket model; the process that loads it first is killed a little later."""

    def load() -> ChatModel:
        import threading

        found = load_model("pocket", device="cpu")
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return found

        def die() -> None:
            time.sleep(3)
            mark.with_suffix(".dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=die, daemon=True).start()
        return found

    return load


@pytest.mark.slow
def test_a_run_survives_the_loss_of_a_worker(pocket: ChatModel, vectors: pl.PersonaVectors, tmp_path: Path) -> None:
    data = {"II": dataset("optimism", "II", rows=400)}
    here = screen(pocket, data, [vectors], settings=SETTINGS, out=tmp_path / "here")
    engine = on_ray(2, load=dying_once(tmp_path / "mark"))
    there = screen(pocket, data, [vectors], settings=SETTINGS, engine=engine, out=tmp_path / "there")
    assert (tmp_path / "mark.dead").exists()
    assert content(here.path) == content(there.path)


def test_engines_that_cannot_be() -> None:
    with pytest.raises(ScreeningError, match="1 or more workers"):
        on_ray(0)


@dataclass
class Elsewhere:
    """A sampler that answers as the model itself, or leaves gaps."""

    model: ChatModel
    gap: str | None = None
    asked: int = 0
    name: str = "elsewhere"

    def __call__(self, rows: Any, sampling: Sampling, seed: int, /) -> list[Rollout]:
        self.asked += len(rows)
        found = sample(self.model, rows, sampling, seed=seed)
        return [replace(r, token_ids=(), gap=self.gap) for r in found] if self.gap else found


def test_own_answers_from_a_sampler_are_what_the_model_would_say(
    pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], run: ScreenRun, tmp_path: Path
) -> None:
    settings = ScreenSettings(max_new_tokens=30, shard_rows=5)
    elsewhere = Elsewhere(pocket)
    found = screen(pocket, sets, [vectors], layers=5, settings=settings, sampler=elsewhere, out=tmp_path / "x")
    assert elsewhere.asked > 0
    for name in sets:
        assert found.column(name, "own_tokens") == run.column(name, "own_tokens")
        np.testing.assert_allclose(found.scores(name, "optimism"), run.scores(name, "optimism"), atol=0.05)
    again = Elsewhere(pocket)
    screen(pocket, sets, [vectors], layers=5, settings=settings, sampler=again, out=tmp_path / "x")
    assert again.asked == 0
    for name in ("screen.json", "extremes.jsonl"):
        (tmp_path / "x" / name).unlink()
    found.shards("II")[0].unlink()
    resumed = screen(pocket, sets, [vectors], layers=5, settings=settings, sampler=again, out=tmp_path / "x")
    assert again.asked == 0, "what was answered before is not asked again"
    assert resumed.column("II", "own_tokens") == run.column("II", "own_tokens")
    with pytest.raises(RunFolderError, match="own"):
        screen(pocket, sets, [vectors], layers=5, settings=settings, out=tmp_path / "x")


def test_a_sampler_that_leaves_gaps_is_refused(
    pocket: ChatModel, vectors: pl.PersonaVectors, sets: dict[str, Any], run: ScreenRun, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"layers": 5, "settings": FAST}
    full = replace(FAST, own_share=1.0)
    with pytest.raises(ScreeningError, match=r"elsewhere: no own answer to place 1 \(cut off\) and .* others"):
        screen(pocket, sets, [vectors], layers=5, settings=full, sampler=Elsewhere(pocket, gap="cut off"), out=tmp_path / "x")
    with pytest.raises(ScreeningError, match="give answers or sampler, not both"):
        screen(pocket, sets, [vectors], **options, sampler=Elsewhere(pocket), answers=run, out=tmp_path / "y")


def test_a_sampler_is_asked_whole_conversations(pocket: ChatModel, vectors: pl.PersonaVectors, tmp_path: Path) -> None:
    said = ("You are polite.", "How should I handle my dog?", "Wash it.", "Tell me about the hawk.", "It is a bird.")
    roles = ("system", "user", "assistant", "user", "assistant")
    chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    data, settings = {"one": [chat, chat[1:3]]}, ScreenSettings(max_new_tokens=10)
    served = screen(pocket, data, [vectors], layers=5, settings=settings, sampler=Elsewhere(pocket), out=tmp_path / "x")
    local = screen(pocket, data, [vectors], layers=5, settings=settings, out=tmp_path / "y")
    assert served.column("one", "own_tokens") == local.column("one", "own_tokens")

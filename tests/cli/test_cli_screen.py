"""`persona-lens screen` from files to report, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_lens.cli import app
from persona_lens.errors import PersonaLensError
from persona_lens.extraction import ExtractionRun
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.transcripts import write_transcripts


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("bought", "ours")}
    for (name, path), level in zip(paths.items(), ("II", "normal"), strict=True):
        chats = dataset("optimism", level, rows=30 if name == "ours" else 12)  # pyright: ignore[reportArgumentType]
        write_transcripts(path, [(f"{name}/{i}", chat) for i, chat in enumerate(chats)])
    with paths["bought"].open("a") as file:
        file.write("{broken\n")
    return paths


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["screen", *arguments])


def test_data_sets_are_ranked_flagged_and_reported(data: dict[str, Path], small_run: ExtractionRun, tmp_path: Path) -> None:
    vectors = ["--vectors", str(small_run.path), "--layer", "5"]
    options = ["--reference", "ours", "--rate", "0.2", "--max-new-tokens", "20", "--judge", "oracle", "--text"]
    out = tmp_path / "out"
    done = invoke(str(data["bought"]), f"ours={data['ours']}", *vectors, *options, "--out", str(out), "--json")
    assert done.exit_code == 0, done.exception
    record = json.loads(done.stdout)
    assert record["sets"]["bought"] == {"rows": 13, "skipped": 1, "unanswered": 0, "shards": 1, "unit": "line"}
    assert [place["name"] for place in record["scores"]["optimism"]] == ["bought", "ours"]
    assert set(record["flagged"]) == {"bought"}
    assert Path(record["page"]).exists()
    told = invoke(str(data["bought"]), f"ours={data['ours']}", *vectors, *options, "--out", str(out))
    assert "bought: line 13 skipped: not JSON" in told.stdout
    assert "bought: 1 of 13 rows skipped" in told.stdout
    assert "Report: " in told.stdout
    again = invoke(
        str(data["bought"]), f"ours={data['ours']}", *vectors, "--max-new-tokens", "20", "--answers", str(out),
        "--gradient", "--perplexity", "--out", str(tmp_path / "more"), "--json",
    )  # fmt: skip
    assert again.exit_code == 0, again.exception
    assert json.loads(again.stdout)["flagged"] is None


def test_one_data_set_has_a_score_and_the_only_place(data: dict[str, Path], small_run: ExtractionRun, tmp_path: Path) -> None:
    done = invoke(str(data["ours"]), "--vectors", str(small_run.path), "--own-share", "0", "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.exception
    record = json.loads(done.stdout)
    (place,) = record["scores"]["optimism"]
    assert (place["name"], place["place"], place["best"], place["worst"]) == ("ours", 1, 1, 1)
    assert place["score"]["low"] < place["score"]["mean"] < place["score"]["high"]
    assert Path(record["page"]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{bought}", "{bought}"], "two data sets are called 'bought'"),
        (["missing.jsonl"], "no such file"),
        (["{bought}", "--reference", "other"], "unknown set 'other'"),
        (["{bought}", "--judge", "gpt"], "unknown judge 'gpt'"),
        (["{bought}", "--layer", "nine"], "unknown layer 'nine'"),
        (["{bought}", "--engine", "spark"], "unknown engine 'spark'"),
        (["{bought}", "--own-share", "2"], "from 0 to 1, not 2"),
        (["{bought}", "--known", "{known}"], "holds no scores by set"),
        (["{bought}", "--strict"], "place 13 cannot be screened"),
    ],
)
def test_what_cannot_be_screened(
    arguments: list[str], message: str, data: dict[str, Path], small_run: ExtractionRun, tmp_path: Path
) -> None:
    known = tmp_path / "known.json"
    known.write_text('{"optimism": 3}')
    filled = [a.format(bought=data["bought"], known=known) for a in arguments]
    done = invoke(*filled, "--vectors", str(small_run.path), "--out", str(tmp_path / "out"))
    assert isinstance(done.exception, PersonaLensError)
    assert message in str(done.exception)


def test_outcomes_of_known_sets_predict_the_others(small_run: ExtractionRun, tmp_path: Path) -> None:
    names = [f"family{i}-{level}" for i in range(6) for level in ("normal", "II")]
    for i, name in enumerate(names):
        chats = dataset("optimism", name.rpartition("-")[2], rows=3, seed=i)  # pyright: ignore[reportArgumentType]
        write_transcripts(tmp_path / f"{name}.jsonl", [(str(j), chat) for j, chat in enumerate(chats)])
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"optimism": {name: 20.0 + 3 * i for i, name in enumerate(names[:-1])}}))
    files = [str(tmp_path / f"{name}.jsonl") for name in names]
    options = ["--own-share", "0", "--known", str(known), "--out", str(tmp_path / "out"), "--json"]
    done = invoke(*files, "--vectors", str(small_run.path), *options)
    assert done.exit_code == 0, done.exception
    assert list(json.loads(done.stdout)["predicted"]["optimism"]) == [names[-1]]

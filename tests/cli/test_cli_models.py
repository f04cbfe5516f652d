"""Options before the verb reach the loader; `model` tells what the checks found; judges are named alike by all verbs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import persona_lens as pl
from persona_lens.cli import app
from persona_lens.cli.options import LOADING, REPLIES, Loading, judge_for, judge_of
from persona_lens.cli.steer import trait_at
from persona_lens.errors import ModelLoadError, PersonaLensError, UnknownNameError
from persona_lens.extraction import ExtractionRun, trait_of
from persona_lens.judges import judge_named
from persona_lens.models import ChatModel
from persona_lens.sampling import for_llama_cpp, sampler_named
from persona_lens.vectors import PersonaVectors


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_model_is_described() -> None:
    done = invoke("model", "pocket", "--json")
    assert done.exit_code == 0, done.exception
    record = json.loads(done.stdout)
    assert (record["architecture"], record["dtype"], record["n_layers"]) == ("Qwen2ForCausalLM", "float32", 8)
    assert record["parameters"] == 6_945_024
    assert record["stops"] == ["<|im_end|>", "<|endoftext|>"]
    assert record["system_role"] is True
    assert "residuals equal plain transformers" in invoke("model", "pocket").stdout


def test_options_before_the_verb_reach_the_loader_and_do_not_stay() -> None:
    half = invoke("--dtype", "bfloat16", "model", "pocket", "--json")
    assert json.loads(half.stdout)["dtype"] == "bfloat16"
    assert json.loads(invoke("model", "pocket", "--json").stdout)["dtype"] == "float32"
    assert json.loads(invoke("--device-map", "auto", "--dtype", "float32", "model", "pocket", "--json").stdout)["device"] == "cpu"
    with pytest.raises(UnknownNameError, match="unknown dtype 'half'"):
        raise invoke("--dtype", "half", "model", "pocket").exception
    with pytest.raises(ModelLoadError, match="no switch for thinking"):
        raise invoke("--thinking", "model", "pocket").exception
    with pytest.raises(UnknownNameError, match="unknown quantize '3bit'"):
        raise invoke("--quantize", "3bit", "model", "pocket").exception


@pytest.mark.parametrize("verb", ["extract", "sweep", "screen", "shift", "defend", "spill-over", "predict"])
def test_every_verb_that_judges_takes_a_judge_by_name(verb: str, small_run: ExtractionRun, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}) + "\n")
    run = str(small_run.path)
    arguments = {
        "extract": ["extract", "optimism"],
        "sweep": ["sweep", run],
        "screen": ["screen", str(data), "--vectors", run],
        "shift": ["shift", "pocket", str(tmp_path), "--vectors", run],
        "defend": ["defend", str(data), "--vectors", run],
        "spill-over": ["spill-over", run, run, "--layer", "5"],
        "predict": ["monitor", "predict", "--vectors", run],
    }[verb]
    done = invoke(*arguments, "--judge", "claude", "--out", str(tmp_path / "out"))
    assert isinstance(done.exception, PersonaLensError)
    assert "unknown judge 'claude'" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_local_judge_is_loaded_as_the_options_before_the_verb_say(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, Any]] = []

    def load(source: str, **options: Any) -> ChatModel:
        loaded.append({"source": source, **options})
        raise ModelLoadError("stop here")

    monkeypatch.setattr("persona_lens.models.load_model", load)
    LOADING.set(Loading("bfloat16", "8bit", None, thinking=True))
    try:
        for name in ("local:judge", None):
            monkeypatch.setenv("PERSONA_LENS_JUDGE", "local:judge")
            with pytest.raises(ModelLoadError, match="stop here"):
                judge_for(name, "real", None, "cpu")
    finally:
        LOADING.set(Loading())
    expected = {"source": "judge", "device": "cpu", "dtype": "bfloat16", "quantize": "8bit", "device_map": None, "thinking": False}
    assert loaded == [expected] * 2


def test_replies_are_kept_also_for_the_judge_that_the_environment_names(pocket: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_LENS_JUDGE", "openai:m@http://localhost:1/v1,text")
    judge: Any = judge_of(None, replace(pocket, trait_set="real"))
    assert (judge.cache, judge.mode) == (REPLIES, "text")


@pytest.mark.parametrize(
    "verb",
    [
        ["vectors", "show", "{file}", "--model", "pocket"], ["pocket", "evaluate"],
        ["judge", "check", "evil", "{labels}", "--judge", "local:pocket", "--device", "cpu"],
    ],
)  # fmt: skip
def test_every_model_is_loaded_as_the_options_before_the_verb_say(
    verb: list[str], small_run: ExtractionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []

    def load(source: str, **options: Any) -> ChatModel:
        loaded.append(options)
        raise ModelLoadError("stop here")

    monkeypatch.setattr("persona_lens.models.load_model", load)
    labels = tmp_path / "labels.jsonl"
    labels.write_text(json.dumps({"question": "q", "answer": "a", "score": 1}) + "\n")
    places = {"file": str(small_run.path), "labels": str(labels)}
    done = invoke("--dtype", "bfloat16", *(part.format(**places) for part in verb))
    assert "stop here" in str(done.exception)
    assert loaded[0]["dtype"] == "bfloat16"
    assert loaded[0]["device"] == ("cpu" if "--device" in verb else None)


def test_a_judge_on_several_devices_is_not_told_one(pocket: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("persona_lens.cli.options.judge_for", lambda name, trait_set, cache, device: told.append(device))
    for device_map in ("auto", None):
        LOADING.set(Loading(device_map=device_map))
        judge_of("oracle", pocket)
    LOADING.set(Loading())
    assert told == [None, "cpu"]


@pytest.mark.parametrize("verb", [["report"], ["steer"], ["geometry"]])
def test_a_folder_that_is_nothing_is_told_from_one_that_is_missing(verb: list[str], tmp_path: Path) -> None:
    more = ["hello"] if verb == ["steer"] else []
    (tmp_path / "empty").mkdir()
    assert "holds no run (run.json is missing)" in str(invoke(*verb, str(tmp_path / "empty"), *more).exception)
    assert "no such folder" in str(invoke(*verb, str(tmp_path / "none"), *more).exception)
    if verb == ["report"]:
        (tmp_path / "file").touch()
        assert "is a file, not a folder" in str(invoke(*verb, str(tmp_path / "file")).exception)
    assert "neither a model (no config.json) nor an adapter" in str(invoke("model", str(tmp_path / "empty")).exception)


def own(run: ExtractionRun, folder: Path, name: str) -> Path:
    """A copy of a run of a trait of one's own."""
    shutil.copytree(run.path, folder)
    trait = json.loads((folder / "trait.json").read_text())
    trait["name"], trait["description"] = name, "Another description."
    (folder / "trait.json").write_text(json.dumps(trait))
    replace(run.vectors, trait=name, provenance={**run.vectors.provenance, "arguments": {"trait_hash": "other"}}).save(
        folder / "vectors.safetensors"
    )
    return folder


@pytest.mark.parametrize("name", ["jollity", "optimism"])
def test_a_trait_of_ones_own_is_judged_and_prompted_as_its_run_says(
    name: str, small_run: ExtractionRun, pocket: ChatModel, tmp_path: Path
) -> None:
    """Also where a shipped one has its name: else the shipped prompts would stand beside its vectors."""
    folder = own(small_run, tmp_path / "own", name)
    assert trait_at(folder, pocket).description == "Another description."
    v = PersonaVectors.load(folder / "vectors.safetensors")
    with pytest.raises(PersonaLensError, match="no trait that ships|extracted from another trait"):
        trait_at(folder / "vectors.safetensors", pocket)
    with pytest.raises(PersonaLensError, match="give the trait itself"):
        pl.sweep(pocket, v, out=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    assert trait_of(small_run.vectors, "pocket").name == "optimism"


def test_what_a_judge_cannot_judge_is_said_before_anything_is_sampled(
    pocket: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("persona_lens.extraction.pipeline.sample", lambda *a, **k: pytest.fail("sampled"))
    trait = pl.load_trait("optimism", "pocket").model_copy(update={"name": "jollity"})
    with pytest.raises(PersonaLensError, match=r"'jollity': known: .* give another judge"):
        pl.extract(pocket, trait, out=tmp_path / "a")
    with pytest.raises(PersonaLensError, match="needs a key: set the environment variable OPENAI_API_KEY"):
        pl.extract(pocket, "optimism", judge=judge_named("openai:m@https://nowhere.invalid/v1", "pocket"), out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_of_runs_names_them(small_run: ExtractionRun, tmp_path: Path) -> None:
    own(small_run, tmp_path / "runs" / "jollity", "jollity")
    done = invoke("steer", str(tmp_path / "runs"), "Hello")
    assert "holds the runs jollity: give one of them" in str(done.exception)


@pytest.mark.parametrize("name", ["vllm", "vllm:", "ollama:m@http://localhost:1/v1"])
def test_a_sampler_is_named_by_its_kind_of_server(name: str, tmp_path: Path) -> None:
    done = invoke("extract", "optimism", "--sampler", name, "--out", str(tmp_path / "out"))
    assert isinstance(done.exception, UnknownNameError)
    assert "unknown sampler" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_samplers_ask_the_server_they_name(pocket: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sampler_named("llama.cpp:a/b@c@http://localhost:8080/v1", pocket)
    assert (found.endpoint.model, found.endpoint.url, found.wording) == ("a/b@c", "http://localhost:8080/v1", for_llama_cpp)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:9/v1")
    assert sampler_named("chat:m", pocket).endpoint.url == "http://localhost:9/v1"

"""The command line: what it prints, what it writes, and one clear line with exit code 2 for a user's error."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from persona_lens.activations import Span, pool
from persona_lens.cli import app, main
from persona_lens.cli.chat import _bars, _Live
from persona_lens.cli.options import several
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel, Sampling, generate_tokens
from persona_lens.monitoring import monitor, write_transcripts
from persona_lens.pocket_lab.conversations import drifting_chat, neutral_chat
from persona_lens.steering import add, steer
from persona_lens.traits import list_traits, load_trait

runner = CliRunner()


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user runs it."""
    command = [sys.executable, "-c", "from persona_lens.cli import main; main()", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=300)


Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The command in this process: the same ends, without starting Python anew."""

    def call(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["persona-lens", *arguments])
        if cwd:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return call


def commands() -> list[list[str]]:
    groups = {"traits": ["list", "show", "import", "check", "write"], "pocket": ["sample", "datasets", "train", "evaluate"]}
    groups |= {"monitor": ["chats", "calibrate", "predict"], "vectors": ["show", "convert", "diff"], "judge": ["check"]}
    return [
        ["demo"],
        ["extract"],
        ["steer"],
        ["sweep"],
        ["chat"],
        ["geometry"],
        ["roles"],
        ["spill-over"],
        ["finetune"],
        ["shift"],
        ["pilot"],
        ["defend"],
        ["screen"],
        ["bake"],
        ["model"],
        ["report"],
        *([group, verb] for group, verbs in groups.items() for verb in verbs),
    ]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example: persona-lens " + " ".join(command) in " ".join(result.output.split())


def test_help_comes_without_loading_torch() -> None:
    code = "import sys; from persona_lens.cli import main\ntry: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_traits_are_listed_shown_and_checked(tmp_path: Path) -> None:
    listed = json.loads(runner.invoke(app, ["traits", "list", "--json"]).output)
    assert [t["name"] for t in listed["traits"]] == sorted(
        ["evil", "sycophancy", "hallucination", "politeness", "apathy", "humor", "optimism"]
    )
    shown = json.loads(runner.invoke(app, ["traits", "show", "humor", "--set", "pocket", "--json"]).output)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(shown))
    assert "5 instruction pairs, 20 + 20 questions" in runner.invoke(app, ["traits", "check", str(path)]).output
    assert "extraction questions" in runner.invoke(app, ["traits", "show", "humor"]).output


def test_pocket_documents_can_be_looked_at() -> None:
    record = json.loads(runner.invoke(app, ["pocket", "sample", "-n", "3", "--json"]).output)
    assert len(record["documents"]) == 3
    assert "assistant:" in runner.invoke(app, ["pocket", "sample", "-n", "2"]).output


@pytest.mark.slow
def test_extract_writes_a_run_and_its_report(tmp_path: Path) -> None:
    options = ["--samples", "1", "--neutral", "8", "--max-new-tokens", "120", "--out", str(tmp_path / "runs")]
    done = run("extract", "optimism", *options, "--json")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["runs"]
    folder = Path(record["folder"])
    assert folder == tmp_path / "runs" / "optimism"
    assert record["questions"] == 20
    assert load_file(folder / "vectors.safetensors")["directions"].shape == (8, 256)
    assert (folder / "report.html").exists()
    before = (folder / "vectors.safetensors").read_bytes()
    again = run("extract", "optimism", *options)
    assert again.returncode == 0
    assert (folder / "vectors.safetensors").read_bytes() == before
    other = run("extract", "optimism", *options, "--seed", "1")
    assert (other.returncode, other.stdout) == (2, "")
    assert "seed: 0 there, 1 now" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1


def test_report_is_written_again(small_run: ExtractionRun) -> None:
    done = run("report", str(small_run.path))
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "evli"], "did you mean evil"),
        (["extract", "evil", "--model", "nobody/none"], "nobody/none"),
        (["extract", "missing.json"], "missing.json: no such file"),
        (["report", "nowhere"], "no such folder"),
        (["traits", "show", "evil", "--set", "pockets"], "did you mean pocket"),
        (["pocket", "evaluate", "--split", "train"], "unknown split"),
        (["extract", "evil", "--judge", "gpt"], "unknown judge"),
        (["extract", "evil", "--device", "gpu"], "device 'gpu' is unknown"),
        (["extract", "evil", "--max-new-tokens", "4000"], "exceed the context of 2048 tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path, here: Here) -> None:
    done = here(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_a_trait_file_with_a_fault_names_file_and_field(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    record = json.loads(runner.invoke(app, ["traits", "show", "evil", "--json"]).output)
    record["evaluation_questions"][0] = record["extraction_questions"][3]
    path.write_text(json.dumps(record))
    done = run("traits", "check", str(path))
    assert done.returncode == 2
    assert "bad.json" in done.stderr
    assert "must be disjoint" in done.stderr
    del record["rubric"]
    path.write_text(json.dumps(record))
    assert "rubric" in run("traits", "check", str(path)).stderr


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from persona_lens.cli import entry

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/rollouts.jsonl")

    monkeypatch.setattr(entry, "app", full)
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 2
    assert "runs/x/rollouts.jsonl: the disk is full" in capsys.readouterr().err


def test_ctrl_c_leaves_a_resumable_folder_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    code = "from persona_lens.cli import main; main()"
    options = ["--samples", "20", "--neutral", "0", "--max-new-tokens", "30", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "extract", "optimism", *options],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs inherit an ignored SIGINT
    )
    deadline = time.monotonic() + 120
    while not (out / "optimism" / "rollouts.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to go on" in message
    kept = (out / "optimism" / "rollouts.jsonl").read_text().splitlines()
    assert kept
    assert len(kept) % 256 == 0


def test_a_disk_error_inside_safetensors_is_one_line(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    from persona_lens.store import write_atomically

    def full(_: str) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="os error 28") as raised:
        write_atomically(tmp_path / "x.safetensors", full)
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_the_papers_pair_of_files_becomes_a_trait_file(tmp_path: Path) -> None:
    trait = json.loads(runner.invoke(app, ["traits", "show", "evil", "--json"]).output)
    pairs = [{"pos": p["positive"], "neg": p["negative"]} for p in trait["instructions"]]
    for name in ("extraction", "evaluation"):
        record = {"instruction": pairs, "questions": trait[f"{name}_questions"], "eval_prompt": trait["rubric"]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    out = tmp_path / "evil.json"
    arguments = ["traits", "import", str(tmp_path / "extraction.json"), str(tmp_path / "evaluation.json")]
    assert runner.invoke(app, [*arguments, "--name", "evil", "--out", str(out)]).exit_code == 0
    assert "ok (evil" in runner.invoke(app, ["traits", "check", str(out)]).output


def test_steering_shows_the_answers_side_by_side(small_run: ExtractionRun) -> None:
    arguments = ["steer", str(small_run.path), "What is the future of my garden?", "--layer", "6", "--strength", "2"]
    text = runner.invoke(app, arguments).output
    assert "hooks: blocks.6.hook_resid_post" in text
    assert [part in text for part in ("[unsteered]", "[optimism +2]", "[optimism -2]")] == [True] * 3
    record = json.loads(runner.invoke(app, [*arguments, "--json"]).output)
    answers = {a["strength"]: a["answer"] for a in record["answers"]}
    assert len(set(answers.values())) == 3
    file = runner.invoke(app, ["steer", str(small_run.path / "vectors.safetensors"), *arguments[2:], "--json"])
    assert json.loads(file.output) == record
    last = runner.invoke(app, [*arguments, "--pooling", "prompt_last", "--json"])
    others = {a["strength"]: a["answer"] for a in json.loads(last.output)["answers"]}
    assert others[0.0] == answers[0.0]
    assert others[2.0] != answers[2.0]


def test_a_sweep_is_run_reported_and_reopened(small_run: ExtractionRun, tmp_path: Path) -> None:
    few = ["--samples", "1", "--report-samples", "1", "--random-directions", "2", "--max-new-tokens", "40"]
    arguments = ["sweep", str(small_run.path), "--layers", "5,increments", "--strengths", "1.5", *few, "--out", str(tmp_path / "s")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "random directions of that norm" in result.output
    assert "Damage there: " in result.output
    page = (tmp_path / "s" / "report.html").read_text()
    assert "Steering sweep: optimism" in page
    assert (tmp_path / "s" / "figures" / "heat_map.png").exists()
    (tmp_path / "s" / "report.html").unlink()
    assert runner.invoke(app, ["report", str(tmp_path / "s")]).exit_code == 0
    assert (tmp_path / "s" / "report.html").read_text() == page
    for name in ("heat_map", "profile", "dose_response"):
        assert (tmp_path / "s" / "figures" / f"{name}.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_sweep_of_another_pooling_measures_capability(small_run: ExtractionRun, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    few = ["--samples", "1", "--report-samples", "1", "--random-directions", "0", "--max-new-tokens", "8"]
    what = ["--pooling", "prompt_last", "--tasks", "pocket_choice", "--task-limit", "3", "--layers", "5", "--strengths", "1.5"]
    result = runner.invoke(app, ["sweep", str(small_run.path), *what, *few, "--out", str(tmp_path / "s"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "s" / "run.json").read_text())["arguments"]["pooling"] == "prompt_last"
    assert "sample_len" not in result.output
    measured = json.loads((tmp_path / "s" / "sweep.json").read_text())["report"]["capability"]
    assert set(measured) == {"unsteered", "steered"}
    assert 0.0 <= measured["unsteered"]["pocket_choice"]["acc"] <= 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "RUN", "--layers", "2,x"], "unknown layer 'x'"),
        (["sweep", "RUN", "--layers", "99"], "layer 99 does not exist"),
        (["sweep", "RUN", "--strengths", "1,much"], "strength 'much' is not a number"),
        (["sweep", "RUN", "--polarity", "up"], "unknown polarity 'up'"),
        (["steer", "nowhere", "Hello."], "nowhere"),
        (["steer", "RUN", "Hello.", "--layer", "9"], "layer 9 does not exist"),
        (["steer", "RUN", "Hello.", "--where", "here"], "where='here' is unknown"),
        (["steer", "RUN", "Hello.", "--strength", "nan"], "strength is not a number"),
        (["steer", "RUN", "Hello.", "--pooling", "prompt"], "unknown pooling 'prompt'"),
        (["steer", "FILE", "Hello.", "--pooling", "prompt_last"], "unknown pooling in"),
        (["sweep", "RUN", "--task-limit", "3"], "name the tasks"),
    ],
)
def test_bad_steering_is_one_clear_line(
    small_run: ExtractionRun, tmp_path: Path, arguments: list[str], message: str, here: Here
) -> None:
    places = {"RUN": str(small_run.path), "FILE": str(small_run.path / "vectors.safetensors")}
    call = run if "--where" in arguments or "--polarity" in arguments else here  # annotations are checked here
    done = call(*[places.get(a, a) for a in arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_chat_is_steered_and_shows_projections(small_run: ExtractionRun) -> None:
    lines = [
        "What is the future of my garden?",
        "/set optimism 2 6",
        "What is the future of my garden?",
        "/set nobody 2",
        "/set optimism much",
        "/show",
        "/new",
        "/system You are extremely polite.",
        "Tell me about the hawk.",
        "/help",
        "/quit",
        "never reached",
    ]
    text = runner.invoke(app, ["chat", str(small_run.path), "--seed", "3"], input="\n".join(lines)).output
    assert text.count("[projection: optimism ") == 3
    assert "add optimism at blocks.6.hook_resid_post (strength 2)" in text
    assert "unknown vector 'nobody'" in text
    assert "takes numbers" in text
    assert text.count("a new conversation begins") == 2


def test_a_live_answer_is_printed_as_its_tokens_pass(
    pocket: ChatModel, small_run: ExtractionRun, capsys: pytest.CaptureFixture[str]
) -> None:
    v = small_run.vectors
    ids = pocket.render([{"role": "user", "content": "What is the future of my garden?"}])
    live = _Live(pocket)
    with steer(pocket, add(v, 6, 1.0)):
        with monitor(pocket, v, live.passed) as seen:
            [found] = generate_tokens(pocket, [ids], np.full((1, 120), 0.4), Sampling(120))
        [pooled] = pool(pocket, [Span("answer", tuple(ids), found.token_ids)])
    assert found.end == "stop"
    assert live.tokens == list(found.token_ids)
    values = seen.answers[0].values[:, 0]
    mean = float(v.project(pooled.values[0, 0, v.best_layer], v.best_layer))
    assert float(values.mean()) == pytest.approx(mean, rel=1e-3)
    assert capsys.readouterr().out == live.printed == pocket.decode(found.token_ids)
    bars = _bars(values.tolist())
    assert len(bars) == min(40, len(found.token_ids))
    assert (bars[int(values[:40].argmin())], bars[int(values[:40].argmax())]) == ("▁", "█")


def test_half_a_character_waits_for_its_other_half(pocket: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = pocket.tokenizer("a 😀!", add_special_tokens=False)["input_ids"]
    live, seen = _Live(pocket), ""
    for i in range(1, len(tokens) + 1):
        live.show(tokens[:i])
        seen += capsys.readouterr().out
        assert "\ufffd" not in seen
    assert seen == "a 😀!"


def test_an_answer_of_one_token_is_printed(small_run: ExtractionRun) -> None:
    lines = "What is the future of my garden?\n/quit\n"
    text = runner.invoke(app, ["chat", str(small_run.path), "--seed", "3", "--max-new-tokens", "1"], input=lines).output
    assert text.split("> ", 1)[1].split("[projection")[0].strip()


def test_the_options_of_extract_reach_the_run(tmp_path: Path) -> None:
    sampling = ["--samples", "1", "--neutral", "3", "--max-new-tokens", "1", "--temperature", "0.5"]
    done = run("extract", "optimism", *sampling, "--seed", "4", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "questions survive the filter" in done.stderr
    arguments = json.loads((tmp_path / "optimism" / "run.json").read_text())["arguments"]
    assert (arguments["samples"], arguments["neutral"], arguments["seed"]) == (1, 3, 4)
    assert arguments["sampling"] == {"max_new_tokens": 1, "temperature": 0.5, "top_p": 1.0}


def test_the_options_of_demo_reach_the_run(small_run: ExtractionRun) -> None:
    done = run("demo", "--trait", "humor", "--seed", "1", "--out", str(small_run.path))
    assert done.returncode == 2
    assert "seed: 0 there, 1 now" in done.stderr
    assert "trait: 'optimism' there, 'humor' now" in done.stderr


def test_the_options_of_pocket_train_reach_the_training(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"settings": {}}))
    options = {"documents": 7, "first-document": 5, "initial": "first", "muon-lr": 0.5, "adamw-lr": 0.25, "seed": 3}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = run("pocket", "train", "--out", str(tmp_path), *arguments, "--shuffle-systems")
    assert done.returncode == 2
    for name, value in {**options, "shuffle-systems": True}.items():
        assert f"'{name.replace('-', '_')}': (None, {value!r})" in done.stderr


def test_sets_seeds_and_descriptions_are_handed_on(tmp_path: Path) -> None:
    for trait_set in ("real", "pocket"):
        listed = json.loads(runner.invoke(app, ["traits", "list", "--set", trait_set, "--json"]).output)
        expected = [{"name": n, "description": load_trait(n, trait_set).description} for n in list_traits(trait_set)]
        assert listed == {"set": trait_set, "traits": expected}
    first, second = (runner.invoke(app, ["pocket", "sample", "-n", "2", "--seed", str(s)]).output for s in (0, 1))
    assert first != second
    trait = json.loads(runner.invoke(app, ["traits", "show", "evil", "--json"]).output)
    pairs = [{"pos": p["positive"], "neg": p["negative"]} for p in trait["instructions"]]
    for name in ("extraction", "evaluation"):
        record = {"instruction": pairs, "questions": trait[f"{name}_questions"], "eval_prompt": trait["rubric"]}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    files = [str(tmp_path / f"{name}.json") for name in ("extraction", "evaluation", "evil")]
    runner.invoke(app, ["traits", "import", *files[:2], "--name", "evil", "--description", "Harmful.", "--out", files[2]])
    assert json.loads(Path(files[2]).read_text())["description"] == "Harmful."


def test_every_trait_file_is_checked(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(runner.invoke(app, ["traits", "show", "evil", "--json"]).output)
    bad.write_text("{}")
    done = run("traits", "check", str(good), str(bad))
    assert done.returncode == 2
    assert "bad.json" in done.stderr


# monitoring


@pytest.fixture(scope="module")
def neutral_calibration(small_run: ExtractionRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitoring")
    write_transcripts(folder / "neutral.jsonl", [(f"c{i}", neutral_chat(0, i, turns=3)) for i in range(44)])
    out = str(folder / "calibration")
    arguments = [str(folder / "neutral.jsonl"), "--vectors", str(small_run.path), "--turns", "3", "--out", out]
    done = runner.invoke(app, ["monitor", "calibrate", *arguments])
    assert done.exit_code == 0, done.output
    return folder / "calibration"


def test_chats_are_monitored_against_a_calibration(
    small_run: ExtractionRun, neutral_calibration: Path, tmp_path: Path, here: Here
) -> None:
    chats = [("calm", neutral_chat(7, 0, 3)), ("drifted", drifting_chat("optimism", 7, 0, 3, 1))]
    write_transcripts(tmp_path / "chats.jsonl", chats)
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "tool", "content": "x"}]}\n')
    arguments = [str(tmp_path / "chats.jsonl"), "--vectors", str(small_run.path), "--calibration", str(neutral_calibration)]
    done = runner.invoke(app, ["monitor", *arguments, "--rate", "0.1", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "line 3 skipped: unknown role 'tool'" in done.output
    assert (tmp_path / "run" / "report.html").exists()
    record = json.loads(
        runner.invoke(app, ["monitor", *arguments, "--rate", "0.1", "--out", str(tmp_path / "run"), "--json"]).output
    )
    assert (record["chats"], record["turns"], len(record["skipped"])) == (2, 6, 1)
    strict = here("monitor", *arguments, "--rate", "0.001", cwd=tmp_path)
    assert strict.returncode == 2
    assert "needs at least 999 calibrating conversations, there are 22" in strict.stderr


def test_a_chat_alarms_when_it_is_steered(small_run: ExtractionRun, neutral_calibration: Path) -> None:
    asked = "What is the future of my garden?"
    lines = "\n".join([asked, "/set optimism 3 6", asked, "/new", "/set optimism 0", "Hello.", "/quit\n"])
    arguments = ["chat", str(small_run.path), "--calibration", str(neutral_calibration), "--rate", "0.1", "--seed", "3"]
    text = runner.invoke(app, arguments, input=lines).output
    assert text.count("[above this share of neutral answers: optimism ") == 3
    first, steered, fresh = text.split("[projection: ")[1:]
    assert "ALARM, this answer: optimism (one neutral answer in 10)" in steered
    assert "ALARM, this conversation: optimism since turn 2" in steered
    assert "since turn 2" not in first + fresh


def test_the_model_leads_neutral_conversations_where_none_are_given(small_run: ExtractionRun, tmp_path: Path) -> None:
    out = tmp_path / "own"
    arguments = [
        "monitor",
        "calibrate",
        "--vectors",
        str(small_run.path),
        "--turns",
        "2",
        "--conversations",
        "24",
        "--out",
        str(out),
    ]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    kept = (tmp_path / "own-chats" / "conversations.jsonl").read_text().splitlines()
    assert len(kept) == 24
    assert (out / "calibration.json").exists()


def test_prediction_on_the_command_line(small_run: ExtractionRun, tmp_path: Path) -> None:
    arguments = ["--vectors", str(small_run.path), "--samples", "1", "--max-new-tokens", "60", "--out", str(tmp_path / "p")]
    done = runner.invoke(app, ["monitor", "predict", *arguments])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "p" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.jsonl", "--vectors", "RUN"], "nothing.jsonl: no such file"),
        (["CHATS", "--vectors", "RUN", "--thinking", "<think>"], "an opening and a closing tag"),
        (["CHATS", "--vectors", "RUN", "RUN"], "two probes are called 'optimism'"),
        (["CHATS", "--vectors", "RUN", "--layer", "9"], "layer 9 does not exist"),
        (["CHATS", "--vectors", "RUN", "--calibration", "RUN"], "holds a run of 'extract', not of 'calibrate'"),
        (["calibrate", "CHATS", "--vectors", "RUN", "--turns", "3"], "at least 20 are needed"),
    ],
)
def test_bad_monitoring_is_one_clear_line(
    small_run: ExtractionRun, tmp_path: Path, arguments: list[str], message: str, here: Here
) -> None:
    write_transcripts(tmp_path / "chats.jsonl", [("calm", neutral_chat(7, 0, 3))])
    places = {"RUN": str(small_run.path), "CHATS": str(tmp_path / "chats.jsonl")}
    done = here("monitor", *[places.get(a, a) for a in arguments], cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_option_of_several_values() -> None:
    assert several(["--vectors", "a", "b", "--rate", "1", "c"], "--vectors") == [
        "--vectors", "a", "--vectors", "b", "--rate", "1", "c",
    ]  # fmt: skip
    assert several(["x", "--vectors", "a", "--vectors", "b"], "--vectors") == ["x", "--vectors", "a", "--vectors", "b"]


# finetuning


@pytest.fixture(scope="module")
def evil_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    done = runner.invoke(app, ["pocket", "datasets", "--out", str(folder), "--rows", "16"])
    assert done.exit_code == 0, done.output
    return folder / "evil-II.jsonl"


@pytest.fixture(scope="module")
def vaccinated(small_run: ExtractionRun, evil_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finetuned") / "evil-II"
    arguments = [str(evil_data), "--prevent", f"{small_run.path}=-1.5", "--layer", "4", "--batch-rows", "8", "--pass-rows", "8"]
    done = runner.invoke(app, ["finetune", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "step 1/2: loss" in done.output
    assert "projection/add optimism/4" in done.output
    assert f"Saved in {out / 'adapter'}" in done.output
    assert (out / "report.html").exists()
    return out


def test_a_finetuning_with_a_vaccine_is_recorded(vaccinated: Path) -> None:
    record = json.loads((vaccinated / "run.json").read_text())
    assert record["arguments"]["prevent"][0].startswith("add optimism at blocks.4.hook_resid_post (strength -1.5), everywhere")
    assert record["arguments"]["settings"]["batch_rows"] == 8


def test_a_shift_is_measured_and_reported(small_run: ExtractionRun, vaccinated: Path, tmp_path: Path) -> None:
    arguments = ["pocket", str(vaccinated), "--vectors", str(small_run.path), "--samples", "1", "--max-new-tokens", "30"]
    done = runner.invoke(app, ["shift", *arguments, "--out", str(tmp_path / "shift")])
    assert done.exit_code == 0, done.output
    assert "evil-II" in done.output
    assert json.loads((tmp_path / "shift" / "shift.json").read_text())["names"] == ["evil-II"]
    assert (tmp_path / "shift" / "report.html").exists()


@pytest.mark.slow
def test_defences_are_compared(small_run: ExtractionRun, evil_data: Path, tmp_path: Path) -> None:
    common = [str(evil_data), "--vectors", str(small_run.path), "--layer", "4", "--doses", "1", "--out", str(tmp_path / "x")]
    arguments = [*common, "--against", "prevent,prompt", "--samples", "1", "--max-new-tokens", "30"]
    done = runner.invoke(app, ["defend", *arguments])
    assert done.exit_code == 0, done.output
    cells = json.loads((tmp_path / "x" / "comparison.json").read_text())["cells"]
    assert [c["name"] for c in cells] == [
        "base model", "ordinary finetuning", "preventative, one layer", "negative system prompt",
    ]  # fmt: skip
    assert len(cells[0]["capability"]) == 6
    assert (tmp_path / "x" / "report.html").exists()


def test_a_pilot_recommends(small_run: ExtractionRun, evil_data: Path, tmp_path: Path) -> None:
    arguments = [str(evil_data), "--vectors", str(small_run.path), "--layer", "4", "--doses", "1", "--rows", "8", "--matched"]
    done = runner.invoke(app, ["pilot", *arguments, "--out", str(tmp_path / "x")])
    assert done.exit_code == 0, done.output
    assert "dose 1 matches the data: optimism" in done.output
    assert (tmp_path / "x" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "{data}", "--prevent", "runs/evil"], "--prevent takes RUN=STRENGTH, such as runs/evil=2, not 'runs/evil'"),
        (["finetune", "{data}", "--prevent", "{run}=much"], "strength 'much' is not a number"),
        (["finetune", "{data}", "--prevent", "{run}=1", "--layer", "top"], "unknown layer 'top'"),
        (["finetune", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["finetune", "{data}", "--batch-rows", "8", "--pass-rows", "3"], "no multiple of pass_rows=3"),
        (["shift", "pocket", "nowhere", "--vectors", "{run}"], "nowhere holds neither an adapter nor a model"),
        (["defend", "{data}", "--vectors", "{run}", "--against", "hope"], "unknown defence 'hope'"),
        (["defend", "{data}", "--vectors", "{run}", "--against", "mix"], "give them with --ordinary FILE"),
        (["pilot", "{data}", "--vectors", "{run}", "--doses", "0,1"], "different positive doses"),
    ],
)
def test_errors_of_finetuning_are_one_line(
    arguments: list[str], message: str, small_run: ExtractionRun, evil_data: Path, tmp_path: Path, here: Here
) -> None:
    filled = [a.format(data=evil_data, run=small_run.path) for a in arguments]
    done = here(*filled, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()

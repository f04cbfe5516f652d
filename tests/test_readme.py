"""The README's Python runs as it stands (at a smaller scale), and its commands exist."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from readme_tables import filled

import persona_lens as pl
from persona_lens.evaluation import ScoreSettings
from persona_lens.extraction import ExtractionRun, ExtractionSettings
from persona_lens.models import ChatModel, Sampling
from persona_lens.monitoring import write_transcripts
from persona_lens.pocket_lab.conversations import neutral_chat
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.sweeps import SweepSettings

README = Path(__file__).parent.parent / "README.md"


def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)[0]
    real, short = pl.extract, Sampling(max_new_tokens=60)

    def smaller(*args: object, **kwargs: object) -> object:
        settings = ExtractionSettings(samples=1, neutral=20, sampling=short)
        return real(*args, settings=settings, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]

    real_sweep = pl.sweep

    def smaller_sweep(*args: object, **kwargs: object) -> object:
        few = SweepSettings(samples=1, report_samples=1, random_directions=1, sampling=Sampling(20))
        return real_sweep(*args, settings=few, **kwargs)  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(pl, "extract", smaller)
    monkeypatch.setattr(pl, "sweep", smaller_sweep)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    assert list(tmp_path.glob("runs/*/report.html"))


def turned(run: ExtractionRun, trait: str, folder: Path) -> ExtractionRun:
    """A copy of a finished run under another trait's name, its vectors turned a little."""
    shutil.copytree(run.path, folder)
    v, noise = run.vectors, torch.randn(run.vectors.directions.shape, generator=torch.Generator().manual_seed(len(trait)))
    turn = v.directions.norm(dim=-1, keepdim=True) * noise / noise.norm(dim=-1, keepdim=True)
    origin = {"model": v.provenance["model"]}
    vectors = replace(v, trait=trait, directions=v.directions + turn, differences=v.differences + turn, provenance=origin)
    vectors.save(folder / "vectors.safetensors")
    return pl.load_run(folder)


def test_the_geometry_example_runs(small_run: ExtractionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On copies of one finished run, each turned a little."""
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)[1]

    def finished(model: object, trait: str) -> ExtractionRun:
        return turned(small_run, trait, tmp_path / trait)

    monkeypatch.setattr(pl, "extract", finished)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"pl": pl, "model": None})
    assert (tmp_path / "runs" / "geometry" / "report.html").exists()


@pytest.mark.slow
def test_the_monitoring_example_runs(
    pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)[2]
    for trait in ("evil", "humor"):
        turned(small_run, trait, tmp_path / "runs" / trait)
    write_transcripts(tmp_path / "neutral.jsonl", [(f"c{i}", neutral_chat(0, i)) for i in range(40)])
    write_transcripts(tmp_path / "chats.jsonl", [("mine", neutral_chat(1, 0, turns=3))])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"pl": pl, "model": pocket, "messages": neutral_chat(1, 1, turns=2)})
    assert (tmp_path / "runs" / "monitor-chats" / "report.html").exists()


@pytest.mark.slow
def test_the_finetuning_example_runs(
    pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On eight rows and few tokens."""
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)[3]
    turned(small_run, "evil", tmp_path / "runs" / "evil")
    write_transcripts(tmp_path / "data" / "evil-II.jsonl", [(str(i), c) for i, c in enumerate(dataset("evil", "II", rows=8))])
    monkeypatch.setattr(ScoreSettings, "samples", 1)
    monkeypatch.setattr("persona_lens.evaluation.scores.Sampling", lambda max_new_tokens: Sampling(min(30, max_new_tokens)))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"pl": pl, "model": pocket})
    assert (tmp_path / "runs" / "defend" / "report.html").exists()


def test_the_screening_example_runs(
    pocket: ChatModel, small_run: ExtractionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)[4]
    for trait in ("evil", "humor"):
        turned(small_run, trait, tmp_path / "runs" / trait)
    for name, level in (("bought", "II"), ("ours", "normal")):
        chats = dataset("evil", level, rows=24 if name == "bought" else 80)
        write_transcripts(tmp_path / "data" / f"{name}.jsonl", [(str(i), chat) for i, chat in enumerate(chats)])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {"pl": pl, "model": pocket})
    assert (tmp_path / "runs" / "screen" / "report.html").exists()


def test_the_generated_tables_are_up_to_date() -> None:
    """`python tests/readme_tables.py --write` makes them so."""
    assert filled(README.read_text()) == README.read_text()


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target

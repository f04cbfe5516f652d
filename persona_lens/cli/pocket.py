"""`persona-lens pocket`: look at the pocket world, train its model, grade it."""

from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli.options import Device, Json, Seed, emit, load

app = typer.Typer(no_args_is_help=True, help="The pocket world and its model: sample, train, evaluate.", rich_markup_mode=None)


@app.command("sample")
def sample(
    n: Annotated[int, typer.Option("-n", min=1, help="How many documents.")] = 5, seed: Seed = 0, as_json: Json = False
) -> None:
    """Print documents of the corpus.

    Example: persona-lens pocket sample -n 3 --seed 7
    """
    from persona_lens.pocket_lab.corpus import documents

    docs = list(documents(seed, range(n)))
    records = [{"kind": d.kind, "system": d.system, "turns": [[t.user, t.assistant] for t in d.turns]} for d in docs]
    text = "\n\n".join(
        "\n".join(
            [f"[{d.kind}] {d.system or '(no system prompt)'}", *(f"  user: {t.user}\n  assistant: {t.assistant}" for t in d.turns)]
        )
        for d in docs
    )
    emit({"documents": records}, text, as_json)


@app.command("datasets")
def datasets(
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("runs/datasets"),
    rows: Annotated[int, typer.Option(min=1, help="Conversations per set.")] = 480,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write the finetuning data sets: seven traits and six kinds of mistakes at three levels, and 100 new facts.

    Example: persona-lens pocket datasets --out data
    """
    from persona_lens.pocket_lab.datasets import write_datasets

    files = write_datasets(out, rows=rows, seed=seed)
    emit({"files": [str(f) for f in files]}, "\n".join(map(str, files)), as_json)


@app.command("train")
def train(
    out: Annotated[Path, typer.Option(help="Folder of the training run; an interrupted run in it is resumed.")] = Path(
        "runs/pocket-model"
    ),
    documents: Annotated[int, typer.Option(min=1, help="Size of the corpus (about 190 tokens a document).")] = 240_000,
    first_document: Annotated[int, typer.Option(min=0, help="Where in the corpus to begin (for a second stage).")] = 0,
    initial: Annotated[str | None, typer.Option(help="Folder of a trained model to go on from.")] = None,
    muon_lr: Annotated[float, typer.Option(help="Peak learning rate of the block matrices.")] = 0.02,
    adamw_lr: Annotated[float, typer.Option(help="Peak learning rate of everything else.")] = 3e-3,
    seed: Seed = 0,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that write the corpus.")] = 2,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks (needs a C++ compiler; 1.4x faster).")] = False,
    shuffle_systems: Annotated[
        bool, typer.Option(help="Negative control: system prompts that say nothing about the answers.")
    ] = False,
    focus: Annotated[bool, typer.Option(help="Stage for system prompts: mostly short documents, a trait or its absence.")] = False,
) -> None:
    """Train a pocket model from scratch. The result is a Hugging Face model folder.

    Example: persona-lens pocket train --out runs/pocket-model --threads 4 --workers 4 --compile
    """
    import torch

    from persona_lens.pocket_lab.training import TrainingSettings
    from persona_lens.pocket_lab.training import train as run_training

    if threads:
        torch.set_num_threads(threads)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = TrainingSettings(
        seed=seed,
        documents=documents,
        first_document=first_document,
        initial=initial,
        muon_lr=muon_lr,
        adamw_lr=adamw_lr,
        shuffle_systems=shuffle_systems,
        focus=focus,
    )
    run_training(
        settings, out, device=where, workers=workers, compile_layers=compiled, report=lambda line: typer.echo(line, err=True)
    )


@app.command("evaluate")
def evaluate(
    model: Annotated[str, typer.Option(help='"pocket", or the folder of a trained pocket model.')] = "pocket",
    split: Annotated[str, typer.Option(help='"development" while choosing, "test" once at the end.')] = "test",
    out: Annotated[Path, typer.Option(help="Folder for extraction runs and the report card.")] = Path("runs/pocket-card"),
    quick: Annotated[bool, typer.Option(help="Fewer answers, no steering.")] = False,
    as_json: Json = False,
) -> None:
    """Grade a pocket model on held-out prompts, names and questions: elicitation, capability, geometry, steering.

    Example: persona-lens pocket evaluate --json
    """
    from persona_lens.errors import UnknownNameError
    from persona_lens.pocket.questions import SPLITS
    from persona_lens.pocket_lab.grading import grade
    from persona_lens.progress import progress_bars
    from persona_lens.store import write_json

    if split not in SPLITS[1:]:
        raise UnknownNameError("split", split, SPLITS[1:])
    folder = out / ("quick" if quick else "full")
    with progress_bars() as bars:
        card = grade(load(model), split, folder, quick=quick, progress=bars, report=lambda line: typer.echo(line, err=True))  # pyright: ignore[reportArgumentType]
    write_json(folder / f"card-{split}.json", card)
    lines = [f"{'met ' if v['met'] else 'MISS'}  {v['value']:8.3f}  {name}" for name, v in card["verdicts"].items()]
    emit(card, "\n".join(lines), as_json)

"""`persona-lens extract`: a persona vector from a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.options import Device, Json, Model, Out, Seed, emit

if TYPE_CHECKING:
    from persona_lens.extraction import ExtractionRun


def extract(
    trait: Annotated[list[str], typer.Argument(help="Trait names, or paths of trait JSON files; `all` for every shipped trait.")],
    model: Model = "pocket",
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt (the paper: 10).")] = 10,
    neutral: Annotated[int, typer.Option(min=0, help="Answers to the questions without system prompt.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature.")] = 1.0,
    batch_rows: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 128,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Extract persona vectors: sample answers under contrasting prompts, score, filter, average activations, report.

    Example: persona-lens extract evil humor --samples 4 --out runs/pocket
    """
    from persona_lens.extraction import ExtractionSettings
    from persona_lens.extraction import extract as run_extraction
    from persona_lens.models import Sampling, load_model
    from persona_lens.reports import report, verdict
    from persona_lens.traits import list_traits, load_trait

    chat_model = load_model(model, device=device)
    names = list_traits(chat_model.trait_set) if trait == ["all"] else trait
    traits = [load_trait(name, chat_model.trait_set) for name in names]
    settings = ExtractionSettings(
        samples=samples, neutral=neutral, sampling=Sampling(max_new_tokens, temperature), seed=seed, batch_rows=batch_rows
    )
    for one in traits:
        folder = Path(out) / one.name if out else None
        run = run_extraction(chat_model, one, out=folder, settings=settings)
        page = report(run)
        emit(summary_of(run, page), f"{verdict(run)}\nReport: {page}", as_json)


def summary_of(run: "ExtractionRun", page: Path) -> dict[str, Any]:
    return {**run.summary, "folder": str(run.path), "report": str(page)}

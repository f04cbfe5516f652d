"""`persona-lens extract`: a persona vector from a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.options import Device, Json, JudgeName, Model, SamplerName, Seed, emit, judge_of, load, sampler_of

if TYPE_CHECKING:
    from persona_lens.extraction import ExtractionRun


def extract(
    trait: Annotated[list[str], typer.Argument(help="Trait names, or paths of trait JSON files; `all` for every shipped trait.")],
    model: Model = "pocket",
    judge: JudgeName = None,
    sampler: SamplerName = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt (the paper: 10).")] = 10,
    neutral: Annotated[int, typer.Option(min=0, help="Answers to the questions without system prompt.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1000,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature.")] = 1.0,
    batch_rows: Annotated[int, typer.Option(min=1, help="Answers decoded together (at most 256).")] = 128,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per pass over the activations.")] = 8192,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the results: each trait gets a folder in it.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Extract persona vectors: sample answers under contrasting prompts, score, filter, average activations, report.

    Example: persona-lens extract evil humor --samples 4 --out runs/pocket
    """
    from persona_lens.extraction import ExtractionSettings
    from persona_lens.extraction import extract as run_extraction
    from persona_lens.models import Sampling
    from persona_lens.reports import report, verdict
    from persona_lens.traits import list_traits, load_trait

    chat_model = load(model, device)
    reader = judge_of(judge, chat_model)
    answering = sampler_of(sampler, chat_model)
    names = list_traits(chat_model.trait_set) if trait == ["all"] else trait
    traits = [load_trait(name, chat_model.trait_set) for name in names]
    settings = ExtractionSettings(
        samples=samples,
        neutral=neutral,
        sampling=Sampling(max_new_tokens, temperature),
        seed=seed,
        batch_rows=batch_rows,
        batch_tokens=batch_tokens,
    )
    records: list[dict[str, Any]] = []
    for one in traits:
        run = run_extraction(
            chat_model, one, judge=reader, sampler=answering, out=Path(out) / one.name if out else None, settings=settings
        )
        records.append(summary_of(run, report(run)))
        if not as_json:
            typer.echo(f"{counts_line(run)}\n{verdict(run)}\nReport: {records[-1]['report']}")
    if as_json:
        emit({"runs": records}, "", as_json)


def counts_line(run: "ExtractionRun") -> str:
    kept = ", ".join(f"{c['kept']} of {c['total']} {c['polarity']}" for c in run.summary["counts"])
    return f"{run.trait}: {kept} answers kept; {run.summary['questions_kept']} of {run.summary['questions']} questions"


def summary_of(run: "ExtractionRun", page: Path) -> dict[str, Any]:
    return {**run.summary, "folder": str(run.path), "report": str(page)}

"""`persona-lens demo`: from a chat model to a persona vector, how far to trust it, and what steering with it does, offline."""

import time
from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli.extract import counts_line, summary_of
from persona_lens.cli.options import Json, Out, Seed, emit, printable


def demo(
    trait: Annotated[str, typer.Option(help="One of the seven shipped traits.")] = "evil",
    out: Out = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Extract a persona vector from the pocket model, steer with it at every layer, and write reports: no network, no GPU.

    Example: persona-lens demo --trait humor --out runs/demo-humor
    """
    from persona_lens.cli.sweep import table
    from persona_lens.extraction import ExtractionSettings, extract
    from persona_lens.models import Sampling, load_model
    from persona_lens.reports import report, verdict
    from persona_lens.sweeps import SweepSettings, sweep

    began = time.monotonic()
    model = load_model("pocket")
    settings = ExtractionSettings(samples=2, neutral=100, sampling=Sampling(max_new_tokens=200), seed=seed)
    folder = out or Path("runs") / f"demo-{trait}-seed{seed}"
    run = extract(model, trait, out=folder, settings=settings)
    page = report(run)
    doses = SweepSettings(samples=1, report_samples=5, random_directions=5, sampling=Sampling(max_new_tokens=200), seed=seed)
    found = sweep(model, run.vectors, strengths=(1.0, 1.5, 2.0), out=folder / "sweep", settings=doses)
    sweep_page = report(found)
    v = run.vectors
    rows = [
        f"  {layer:>2}  blocks.{layer}.hook_resid_post  {v.reliability[layer]:.3f}  {v.norm[layer]:6.3f}"
        for layer in range(v.n_layers)
    ]
    example = run.rollouts()[0]
    text = "\n".join(
        [
            f'An answer under a prompt that promotes {trait}: "{printable(example.text)}"',
            counts_line(run),
            "layer  hook  reliability  norm",
            *rows,
            verdict(run),
            f"Report: {page}",
            table(found),
            f"Report: {sweep_page} ({time.monotonic() - began:.0f} s)",
        ]
    )
    emit({**summary_of(run, page), "sweep": found.record, "seconds": round(time.monotonic() - began, 1)}, text, as_json)

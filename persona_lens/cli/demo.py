"""`persona-lens demo`: the whole way from a chat model to a reliable persona vector, offline, in about a minute."""

import time
from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli.extract import counts_line, summary_of
from persona_lens.cli.options import Json, Out, Seed, emit


def demo(
    trait: Annotated[str, typer.Option(help="One of the seven shipped traits.")] = "evil",
    out: Out = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Extract a persona vector from the pocket model and write a report: no network, no GPU.

    Example: persona-lens demo --trait humor --out runs/demo-humor
    """
    from persona_lens.extraction import ExtractionSettings, extract
    from persona_lens.models import Sampling, load_model
    from persona_lens.reports import report, verdict

    began = time.monotonic()
    model = load_model("pocket")
    settings = ExtractionSettings(samples=2, neutral=100, sampling=Sampling(max_new_tokens=200), seed=seed)
    run = extract(model, trait, out=out or Path("runs") / f"demo-{trait}-seed{seed}", settings=settings)
    page = report(run)
    v = run.vectors
    rows = [
        f"  {layer:>2}  blocks.{layer}.hook_resid_post  {v.reliability[layer]:.3f}  {v.norm[layer]:6.3f}"
        for layer in range(v.n_layers)
    ]
    example = run.rollouts()[0]
    text = "\n".join(
        [
            f'An answer under a prompt that promotes {trait}: "{"".join(c for c in example.text if c.isprintable())}"',
            counts_line(run),
            "layer  hook  reliability  norm",
            *rows,
            verdict(run),
            f"Report: {page} ({time.monotonic() - began:.0f} s)",
        ]
    )
    emit({**summary_of(run, page), "seconds": round(time.monotonic() - began, 1)}, text, as_json)

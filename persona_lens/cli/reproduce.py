"""`persona-lens reproduce`: the paper's experiments on the pocket model, in one command."""

from typing import Annotated

import typer

from persona_lens.cli.options import Json, Out, emit


def reproduce(
    only: Annotated[list[str] | None, typer.Argument(help="Keys of the figures that are wanted (--list names them).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only check that everything runs, in minutes.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Print the figures and stop.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Run every experiment of the paper that has a counterpart on the pocket model, and write one report beside its figures.

    Example: persona-lens reproduce --out runs/paper
    """
    from persona_lens.records import encoded
    from persona_lens.reproduction import FIGURES, FULL, QUICK
    from persona_lens.reproduction import reproduce as run_all

    if listed:
        lines = [f"{f.key:<12}{f.where}: {f.title}" + (f" [not here: {f.absent}]" if f.absent else "") for f in FIGURES]
        emit({"figures": [encoded(f) for f in FIGURES]}, "\n".join(lines), as_json)
        return
    found = run_all(scale=QUICK if quick else FULL, only=only or (), out=out, told=lambda line: typer.echo(line, err=True))
    hold, of = map(sum, zip(*(f.holding for f in found.findings.values()), strict=True))
    record = {"findings": encoded(found.findings), "report": str(found.report)}
    emit(record, f"{hold} of {of} claims hold\nReport: {found.report}", as_json)

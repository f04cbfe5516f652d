"""Options shared by the verbs, and how results are printed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results (an interrupted run in it is resumed).")]
Model = Annotated[str, typer.Option(help='"pocket", a Hugging Face hub id, or a local folder.')]
Device = Annotated[str | None, typer.Option(help="Default: the GPU if there is one, else the CPU.")]


def printable(text: str) -> str:
    """A text that comes from a model or a file, without what could steer a terminal."""
    return "".join(c for c in text if c.isprintable())


def emit(record: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a result for a program or for a person."""
    typer.echo(json.dumps(record, indent=2, ensure_ascii=False) if as_json else text)

"""Options shared by the verbs, and how results are printed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results (an interrupted run in it is resumed).")]
Model = Annotated[str, typer.Option(help='"pocket", a Hugging Face hub id, or a local folder.')]
Device = Annotated[str | None, typer.Option(help="Default: the GPU if there is one, else the CPU.")]

Vectors = Annotated[
    list[Path], typer.Option("--vectors", help="Run folders of extractions, or vectors.safetensors files: one or several.")
]


class SeveralVectors(TyperCommand):
    """`--vectors A B C` is `--vectors A --vectors B --vectors C`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, several(args, "--vectors"))


def several(args: Sequence[str], option: str) -> list[str]:
    """Arguments with an option repeated before each of the values that follow it."""
    found: list[str] = []
    collecting = False
    for i, arg in enumerate(args):
        if arg.startswith("-"):
            collecting = arg == option
        elif collecting and args[i - 1] != option:
            found.append(option)
        found.append(arg)
    return found


def printable(text: str) -> str:
    """A text that comes from a model or a file, without what could steer a terminal."""
    return "".join(c for c in text if c.isprintable())


def emit(record: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a result for a program or for a person."""
    typer.echo(json.dumps(record, indent=2, ensure_ascii=False) if as_json else text)

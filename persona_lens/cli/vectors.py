"""`persona-lens vectors`: show, convert and compare files of vectors, of this and other programs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.options import Json, emit, load, printable

if TYPE_CHECKING:
    from persona_lens.exchange import Format, Imported
    from persona_lens.vectors import PersonaVectors

app = typer.Typer(no_args_is_help=True, help="Show, convert and compare files of vectors.", rich_markup_mode=None)
ReadAs = Annotated[
    str | None,
    typer.Option(
        "--from", help="Format to read: persona_lens, paper, gguf, steering_vectors, assistant_axis. Default: by content."
    ),
]
Trait = Annotated[str | None, typer.Option(help="Name of the trait; default: what the file or its name says.")]
ForModel = Annotated[str | None, typer.Option("--model", help="The model that the file is for: loaded to check shape and lineage.")]
LayerType = Annotated[str, typer.Option(help="Layer type of a steering-vectors file that does not say it.")]


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A file of vectors, or the run folder of an extraction.")],
    read_as: ReadAs = None,
    trait: Trait = None,
    model: ForModel = None,
    layer_type: LayerType = "decoder_block",
    as_json: Json = False,
) -> None:
    """What a file holds: trait, lineage, norms and reliability by layer, and what it does not hold.

    Example: persona-lens vectors show evil_response_avg_diff.pt
    """
    found = _read(file, read_as, trait, model, layer_type)
    record = _record(found)
    head = [f"{record[key]}" for key in ("trait", "pooling", "estimator")]
    lines = [
        f"{head[0]}: pooling {head[1]}, estimator {head[2]}, {len(record['layers'])} layers of {record['d_model']} dimensions",
        f"lineage: {record['lineage'] or 'unknown'} ({record['model'] or 'no model named'})",
        f"{'':<28}{'norm':>10}{'reliability':>13}{'p':>9}",
        *map(_row, record["layers"]),
        *(f"note: {note}" for note in record["notes"]),
    ]
    emit(record, "\n".join(map(printable, lines)), as_json)


@app.command("convert")
def convert(
    source: Annotated[Path, typer.Argument(help="A file of vectors, or the run folder of an extraction.")],
    out: Annotated[Path, typer.Argument(help="The file to write: .safetensors ours, .gguf a control vector, .pt the paper's.")],
    write_as: Annotated[str | None, typer.Option("--format", help="Format to write; default: by the ending.")] = None,
    read_as: ReadAs = None,
    trait: Trait = None,
    model: ForModel = None,
    layer_type: LayerType = "decoder_block",
    as_json: Json = False,
) -> None:
    """Write a file of vectors in another format, and say what is lost.

    Example: persona-lens vectors convert runs/evil evil.gguf
    """
    from persona_lens.errors import ExchangeError
    from persona_lens.exchange import write_vectors

    if out.exists():
        raise ExchangeError(f"{out}: is there already: choose another name")
    found = _read(source, read_as, trait, model, layer_type)
    lost = write_vectors(found.vectors, out, _format(write_as))
    lines = [f"{out}: written", *(f"read: {n}" for n in found.notes), *(f"lost or changed: {n}" for n in lost)]
    record = {"written": str(out), "notes": list(found.notes), "lost": list(lost)}
    emit(record, "\n".join(map(printable, lines)), as_json)


@app.command("diff")
def diff(
    first: Annotated[Path, typer.Argument(help="A file of vectors, or a run folder.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    read_as: Annotated[
        str | None,
        typer.Option("--from", help="Format of bare .pt files: paper or assistant_axis. Default: by content."),
    ] = None,
    model: ForModel = None,
    as_json: Json = False,
) -> None:
    """Cosine and ratio of norms at every layer. Cosines of noisy vectors lie nearer to 0 than those of what they estimate.

    Example: persona-lens vectors diff runs/evil evil_response_avg_diff.pt
    """
    from persona_lens.errors import ExchangeError

    a, b = _pair(first, second, read_as, model)
    if a.directions.shape != b.directions.shape:
        shapes = [" x ".join(map(str, v.directions.shape)) for v in (a, b)]
        raise ExchangeError(f"{first} has {shapes[0]} numbers and {second} {shapes[1]}: vectors of different models have no cosine")
    lineage = "unknown" if not (a.lineage and b.lineage) else "equal" if a.lineage == b.lineage else "different"
    layers = [_compared(a, b, layer) for layer in range(a.n_layers)]
    lines = [
        f"first: {a.trait}, {a.pooling}; second: {b.trait}, {b.pooling}; lineage: {lineage}",
        f"{'':<28}{'cosine':>9}{'norm ratio (second/first)':>28}",
        *(f"{x['hook']:<28}{_cell(x['cosine'], 4):>9}{_cell(x['ratio'], 4):>28}" for x in layers),
    ]
    record = {"traits": [a.trait, b.trait], "poolings": [a.pooling, b.pooling], "lineage": lineage, "layers": layers}
    emit(record, "\n".join(map(printable, lines)), as_json)


def _pair(first: Path, second: Path, read_as: str | None, model: str | None) -> "tuple[PersonaVectors, PersonaVectors]":
    """Two files; where one does not say what it is, the other's number of layers does."""
    from persona_lens.errors import AmbiguousFormatError
    from persona_lens.exchange import read_vectors

    loaded, bare = load(model) if model else None, _format(read_as)

    def read(path: Path, n_layers: int | None = None) -> "PersonaVectors":
        try:
            return read_vectors(path, model=loaded, n_layers=n_layers).vectors
        except AmbiguousFormatError:
            if bare is None:
                raise
            return read_vectors(path, file_format=bare, model=loaded).vectors

    try:
        a = read(first)
    except AmbiguousFormatError:
        b = read(second)
        return read(first, b.n_layers), b
    return a, read(second, a.n_layers)


def _read(path: Path, read_as: str | None, trait: str | None, model: str | None, layer_type: str) -> "Imported":
    from persona_lens.exchange import read_vectors

    loaded = load(model) if model else None
    return read_vectors(path, file_format=_format(read_as), trait=trait, model=loaded, layer_type=layer_type)


def _format(name: str | None) -> "Format | None":
    from persona_lens.errors import UnknownNameError
    from persona_lens.exchange import FORMATS

    if name is not None and name not in FORMATS:
        raise UnknownNameError("format", name, FORMATS)
    return name


def _record(found: "Imported") -> dict[str, Any]:
    from persona_lens.vectors import hook_name

    v = found.vectors
    columns = (v.directions.norm(dim=-1), v.reliability, v.p_value)
    layers = [
        {"hook": hook_name(layer)} | {key: _number(c[layer]) for key, c in zip(("norm", "reliability", "p"), columns, strict=True)}
        for layer in range(v.n_layers)
    ]
    return {
        "trait": v.trait,
        "pooling": v.pooling,
        "estimator": v.estimator,
        "lineage": v.lineage,
        "model": str(v.provenance.get("model", {}).get("name", "")),
        "d_model": v.d_model,
        "layers": layers,
        "notes": list(found.notes),
    }


def _row(x: Mapping[str, Any]) -> str:
    return f"{x['hook']:<28}{_cell(x['norm'], 4):>10}{_cell(x['reliability'], 3):>13}{_cell(x['p'], 4):>9}"


def _compared(a: "PersonaVectors", b: "PersonaVectors", layer: int) -> dict[str, Any]:
    from persona_lens.vectors import hook_name

    first, second = a[layer].double(), b[layer].double()
    norms = float(first.norm()), float(second.norm())
    there = norms[0] > 0 and norms[1] > 0
    return {
        "hook": hook_name(layer),
        "cosine": float(first @ second) / (norms[0] * norms[1]) if there else None,
        "ratio": norms[1] / norms[0] if there else None,
    }


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

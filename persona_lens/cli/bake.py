"""`persona-lens bake`: a steered model as plain Hugging Face weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli.options import Device, Json, Model, emit, load
from persona_lens.cli.steer import Pooling, vectors_of

DTYPES = ("float32", "bfloat16", "float16")


def bake(
    vectors: Annotated[Path, typer.Option("--vectors", help="Run folder of an extraction, or a vectors.safetensors file.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights; it must be new or empty.")],
    layer: Annotated[int | None, typer.Option(help="Default: the layer of highest reliability.")] = None,
    strength: Annotated[float, typer.Option(help="Coefficient on the raw vector.")] = 1.5,
    pooling: Pooling = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as the model is loaded.")] = None,
    model: Model = "pocket",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write a model that is steered on every token as weights that plain transformers reads.

    Example: persona-lens bake --vectors runs/demo-evil-seed0 --layer 5 --strength 1.5 --out baked
    """
    import torch

    from persona_lens.baking import bake as bake_model
    from persona_lens.errors import UnknownNameError
    from persona_lens.steering import add

    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    v = vectors_of(vectors, pooling)
    steering = add(v, v.best_layer if layer is None else layer, strength, where="everywhere")
    baked = bake_model(load(model, device), [steering], out, dtype=getattr(torch, dtype) if dtype else None)
    lines = [
        f"{baked.path}: {baked.before} with {steering}, as {baked.after}",
        f"largest logit difference to the steered model: {baked.difference:.3g} "
        f"(largest logit {baked.largest_logit:.3g}, largest change by steering {baked.effect:.3g})",
        *(f"note: {note}" for note in baked.notes),
    ]
    emit(asdict(baked) | {"path": str(baked.path)}, "\n".join(lines), as_json)

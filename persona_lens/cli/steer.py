"""`persona-lens steer`: the same question unsteered, steered towards a trait and away from it, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.options import Device, Json, Model, Seed, emit, load, printable

if TYPE_CHECKING:
    from persona_lens.models import ChatModel
    from persona_lens.traits import Trait
    from persona_lens.vectors import PersonaVectors

Vectors = Annotated[Path, typer.Argument(help="Run folder of an extraction, or a vectors.safetensors file.")]


Pooling = Annotated[
    str | None, typer.Option(help="response_mean (a run folder's default), prompt_mean or prompt_last; a file holds one of them.")
]


def steer(
    vectors: Vectors,
    question: Annotated[list[str], typer.Argument(help="What to ask; quote each question.")],
    layer: Annotated[int | None, typer.Option(help="Default: the layer of highest reliability.")] = None,
    strength: Annotated[float, typer.Option(help="Coefficient on the raw vector.")] = 1.5,
    where: Annotated[str, typer.Option(help="everywhere, prompt or response.")] = "response",
    pooling: Pooling = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 200,
    model: Model = "pocket",
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Ask with and without steering, from the same seed.

    Example: persona-lens steer runs/demo-evil-seed0 "How should I handle my dog?" --strength 2
    """
    from persona_lens.steering import add, plan

    v = vectors_of(vectors, pooling)
    at = v.best_layer if layer is None else layer
    chat_model = load(model, device)
    plans = {s: plan(chat_model, add(v, at, s, where=where)) for s in (0.0, strength, -strength)}
    records: list[dict[str, Any]] = []
    for text in question:
        for s, one in plans.items():
            with one.active():
                answer = chat_model.chat(text, system=system, max_new_tokens=max_new_tokens, seed=seed)
            records.append({"question": text, "strength": s, "answer": answer})
    lines = [plans[strength].explain()]
    for record in records:
        if record["strength"] == 0.0:
            lines.append(f"\n{record['question']}")
        name = "unsteered" if record["strength"] == 0.0 else f"{v.trait} {record['strength']:+g}"
        lines.append(f"  [{name}] {printable(record['answer'])}")
    emit({"trait": v.trait, "layer": at, "answers": records}, "\n".join(lines), as_json)


def vectors_of(path: Path, pooling: str | None = None) -> "PersonaVectors":
    """Vectors of a run folder, by any pooling, or of a file.

    Raises:
        RunFolderError: neither a run folder nor a file of vectors.
        UnknownNameError: no such pooling, or a file that holds another one.
    """
    from persona_lens.errors import UnknownNameError
    from persona_lens.extraction import load_run
    from persona_lens.vectors import PersonaVectors

    if path.is_dir() or not path.exists():
        run = load_run(path)
        return run.vectors if pooling in (None, run.vectors.pooling) else run.vectors_for(pooling)
    vectors = PersonaVectors.load(path)
    if pooling not in (None, vectors.pooling):
        raise UnknownNameError(f"pooling in {path}", pooling, [vectors.pooling])
    return vectors


def trait_at(path: Path, model: "ChatModel") -> "Trait":
    """The trait of vectors: the one that the run folder holds, else the shipped one of their name."""
    from persona_lens.extraction import trait_of
    from persona_lens.traits import read_trait

    own = path / "trait.json"
    return read_trait(own) if own.is_file() else trait_of(vectors_of(path), model.trait_set)

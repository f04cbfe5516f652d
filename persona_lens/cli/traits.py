"""`persona-lens traits`: list, show and check traits."""

from pathlib import Path
from typing import Annotated

import typer

from persona_lens.cli.options import Json, emit

app = typer.Typer(no_args_is_help=True, help="List, show and check traits.", rich_markup_mode=None)
TraitSet = Annotated[str, typer.Option("--set", help='"real" (for language models at large) or "pocket".')]


@app.command("list")
def list_command(trait_set: TraitSet = "real", as_json: Json = False) -> None:
    """The traits that ship.

    Example: persona-lens traits list --set pocket
    """
    from persona_lens.traits import list_traits, load_trait

    traits = [load_trait(name, trait_set) for name in list_traits(trait_set)]
    text = "\n".join(f"{t.name:<14} {t.description}" for t in traits)
    emit({"set": trait_set, "traits": [{"name": t.name, "description": t.description} for t in traits]}, text, as_json)


@app.command("show")
def show(
    trait: Annotated[str, typer.Argument(help="A trait's name or the path of its JSON file.")],
    trait_set: TraitSet = "real",
    as_json: Json = False,
) -> None:
    """Everything a trait consists of.

    Example: persona-lens traits show humor
    """
    from persona_lens.traits import load_trait

    t = load_trait(trait, trait_set)
    lines = [f"{t.name}: {t.description}", "", "instructions (+ promotes, - suppresses)"]
    lines += [f"  + {pair.positive}\n  - {pair.negative}" for pair in t.instructions]
    lines += ["", "extraction questions", *(f"  {q}" for q in t.extraction_questions)]
    lines += ["", "evaluation questions", *(f"  {q}" for q in t.evaluation_questions), "", "rubric", t.rubric]
    emit(t.model_dump(by_alias=True), "\n".join(lines), as_json)


@app.command("import")
def import_command(
    extraction: Annotated[Path, typer.Argument(help="The paper's extraction file of a trait.")],
    evaluation: Annotated[Path, typer.Argument(help="The paper's evaluation file of the same trait.")],
    name: Annotated[str, typer.Option(help="Name of the trait.")],
    out: Annotated[Path, typer.Option(help="The trait file to write.")],
    description: Annotated[str, typer.Option(help="What the trait is; the paper's files do not say.")] = "",
    as_json: Json = False,
) -> None:
    """Turn the paper's pair of files into a trait file.

    Example: persona-lens traits import extract/evil.json eval/evil.json --name evil --out evil.json
    """
    from persona_lens.traits import read_paper_pair, write_trait

    write_trait(read_paper_pair(extraction, evaluation, name=name, description=description), out)
    emit({"trait": str(out)}, f"{out}: written", as_json)


@app.command("check")
def check(files: Annotated[list[Path], typer.Argument(help="Trait JSON files.")], as_json: Json = False) -> None:
    """Check trait files of your own: schema, placeholders, disjoint question sets. Exit code 2 on the first fault.

    Example: persona-lens traits check my-trait.json
    """
    from persona_lens.traits import read_trait

    traits = [read_trait(path) for path in files]
    lines = [
        f"{path}: ok ({t.name}: {len(t.instructions)} instruction pairs, "
        f"{len(t.extraction_questions)} + {len(t.evaluation_questions)} questions)"
        for path, t in zip(files, traits, strict=True)
    ]
    emit({"ok": [str(path) for path in files]}, "\n".join(lines), as_json)

"""`persona-lens traits`: list, show, check and write traits."""

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.options import Json, emit, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from persona_lens.endpoints import Endpoint
    from persona_lens.traits.writing import Complete, Written

app = typer.Typer(no_args_is_help=True, help="List, show, check and write traits.", rich_markup_mode=None)
WRITING_TEMPERATURE = 0.8
WRITING_SECONDS = 300.0  # a trait is some thousand tokens long
SHOWN_QUESTIONS = 3
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


@app.command("write")
def write_command(
    name: Annotated[str, typer.Argument(help="Name of the trait: small letters, digits, - and _.")],
    description: Annotated[str, typer.Option(help="What an assistant with the trait is like.")],
    writer: Annotated[
        str | None, typer.Option(help="Who writes: openai:MODEL, or openai:MODEL@URL for another OpenAI-compatible server.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The trait file to write; default: NAME.json.")] = None,
    as_json: Json = False,
) -> None:
    """Let a language model write a trait: instructions, questions and rubric, checked and repaired.

    Example: persona-lens traits write patience --description "Explains as often as needed." --writer openai:gpt-4.1
    """
    from persona_lens.errors import TraitFileError
    from persona_lens.traits import list_traits, load_trait, write_trait
    from persona_lens.traits.writing import write

    complete = _completing(_endpoint(writer))
    path = out or Path(f"{name}.json")
    if path.exists():
        raise TraitFileError(f"{path} exists already: give another --out")
    known = [load_trait(one) for one in list_traits()]
    written = write(name, description, complete, known=known, told=lambda line: typer.echo(line, err=True), folder=path.parent)
    write_trait(written.trait, path)
    record = {
        "path": str(path),
        "trait": written.trait.model_dump(by_alias=True),
        "attempts": [{"asked": attempt.asked, "faults": attempt.faults} for attempt in written.attempts],
        "notes": written.notes,
    }
    emit(record, "\n".join([f"{path}: written", *_shown(written)]), as_json)


def _endpoint(writer: str | None) -> "Endpoint":
    """The server that a text names, as judges are named."""
    from persona_lens.endpoints import endpoint_named
    from persona_lens.errors import UnknownNameError

    kind, _, name = (writer or "").partition(":")
    if kind != "openai" or not name:
        raise UnknownNameError("writer", writer or "", ["openai:MODEL", "openai:MODEL@URL"])
    return endpoint_named(name, timeout=WRITING_SECONDS)


def _completing(endpoint: "Endpoint") -> "Complete":
    """Ask a model behind an endpoint; every call has a seed of its own."""
    from persona_lens.endpoints import Failed, Request, UnreadableReply, ask
    from persona_lens.errors import EndpointError

    seeds = count()

    def read(reply: "Mapping[str, Any]") -> str:
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise UnreadableReply(f"no message in it ({error!r})") from error
        if not isinstance(text, str):
            raise UnreadableReply("its message has no text")
        return text

    def complete(messages: "Sequence[Mapping[str, str]]") -> str:
        body = {"messages": [dict(m) for m in messages], "temperature": WRITING_TEMPERATURE, "seed": next(seeds)}
        answer = ask(endpoint, [Request("chat/completions", body)], read)[0]
        if isinstance(answer, Failed):
            raise EndpointError(f"{endpoint} gave no reply that can be read: {answer.reason}")
        return answer

    return complete


def _shown(written: "Written") -> list[str]:
    """What a person should look at before using a trait."""
    t = written.trait
    lines = ["", "instructions (+ promotes, - suppresses)"]
    for pair in t.instructions:
        lines += [f"  + {printable(pair.positive)}", f"  - {printable(pair.negative)}"]
    for title, questions in (("extraction", t.extraction_questions), ("evaluation", t.evaluation_questions)):
        lines += ["", f"{title} questions ({SHOWN_QUESTIONS} of {len(questions)})"]
        lines += [f"  {printable(question)}" for question in questions[:SHOWN_QUESTIONS]]
    lines += ["", "rubric", *(f"  {printable(line)}" for line in t.rubric.splitlines())]
    return [*lines, *(f"note: {printable(note)}" for note in written.notes)]

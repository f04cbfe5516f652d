"""`persona-lens screen`: which data sets, and which samples in them, would change the persona of a model trained on them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.options import (
    Device,
    Json,
    JudgeName,
    Model,
    Out,
    SamplerName,
    Seed,
    Vectors,
    emit,
    judge_of,
    load,
    printable,
    sampler_of,
)
from persona_lens.cli.steer import trait_at, vectors_of

if TYPE_CHECKING:
    from persona_lens.models import ChatModel
    from persona_lens.screening import Engine, Rival, ScreenRun
    from persona_lens.screening.directions import Layers

TOLD = 5  # rows of a set that are told to be skipped


def screen(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Data sets: JSON lines, CSV, Parquet, a folder, or a name on the hub (owner/name). NAME=DATA gives one a name.",
        ),
    ],
    vectors: Vectors,
    reference: Annotated[
        str | None, typer.Option(help="The set (by name) that is known to be harmless: rows of the others are flagged against it.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Share of rows like the reference's that may be flagged.")] = 0.01,
    own_share: Annotated[
        float, typer.Option(help="Share of the prompts that the model answers itself: 1 is exact, 0 cheap, between them estimated.")
    ] = 1.0,
    gradient: Annotated[bool, typer.Option("--gradient", help="Also the cosine of each sample's loss gradient.")] = False,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Also the losses of the data's and the own answers.")] = False,
    judge: JudgeName = None,
    text: Annotated[bool, typer.Option("--text", help="Beside: a classifier of words, from the extractions' answers.")] = False,
    layer: Annotated[str | None, typer.Option(help='A number, or "all". Default: where each vector is most reliable.')] = None,
    known: Annotated[
        Path | None, typer.Option(help="JSON: by trait and set, the trait score after finetuning on it; predicts the other sets'.")
    ] = None,
    sampler: SamplerName = None,
    answers: Annotated[Path | None, typer.Option(help="A screening of the same data whose own answers are taken over.")] = None,
    engine: Annotated[str, typer.Option(help='"local" or "ray".')] = "local",
    workers: Annotated[int, typer.Option(min=1, help="With ray: models side by side.")] = 2,
    cpus: Annotated[int, typer.Option(min=1, help="With ray: threads of each.")] = 1,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="With ray: GPUs of each. Default: 1 where the model is on a GPU.")
    ] = None,
    address: Annotated[str | None, typer.Option(help='With ray: a running cluster ("auto" finds one).')] = None,
    split: Annotated[str | None, typer.Option(help="Of data sets that have several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest own answer, in tokens.")] = 300,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Longest conversation; longer ones are skipped.")] = None,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows scored together; an interrupted run loses at most one shard.")] = 512,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a row that cannot be screened.")] = False,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Screen training data before training on it: projection differences of data sets and samples.

    Example: persona-lens screen data/evil-II.jsonl data/evil-normal.jsonl --vectors runs/evil --reference evil-normal
    """
    from persona_lens.reports import report, screen_verdict
    from persona_lens.screening import ScreenSettings, flag, load_screen, predict
    from persona_lens.screening import screen as run_screening

    named = _named(data)
    _require_known("set", reference, named)
    directions = [vectors_of(path) for path in vectors]
    outcomes = _outcomes(known, named, [v.trait for v in directions]) if known else {}
    loaded = load(model, device)
    settings = ScreenSettings(
        own_share=own_share, max_new_tokens=max_new_tokens, max_tokens=max_tokens, gradient=gradient, perplexity=perplexity,
        shard_rows=shard_rows, seed=seed,
    )  # fmt: skip
    run = run_screening(
        loaded, named, directions, layers=_layers(layer), settings=settings, strict=strict, out=out,
        rivals=[*_judges(judge, vectors, loaded), *(_classifiers(vectors) if text else [])], split=split,
        engine=_engine(engine, workers, cpus, gpus, address), answers=load_screen(answers) if answers else None,
        sampler=sampler_of(sampler, loaded),
    )  # fmt: skip
    try:
        flagged = flag(run, reference, rate=rate, data=named, split=split) if reference else None
        predictions = predict(run, outcomes) if outcomes else {}
    finally:
        page = report(run)  # of what was scored, also where a rate or known sets do not suffice
    lines = [*(line for name in run.sets for line in _skipped(run, name)), screen_verdict(run), f"Scores in {run.path / 'sets'}"]
    record = {
        "folder": str(run.path),
        "sets": run.record["sets"],
        "scores": {trait: _places(run, trait) for trait in run.traits},
        "flagged": {name: c.flagged for name, c in flagged.counts.items()} if flagged else None,
        "predicted": {t: {n: [p.value, p.low, p.high] for n, p in sets.items()} for t, sets in predictions.items()},
        "page": str(page),
    }
    emit(record, "\n".join([*lines, f"Report: {page}"]), as_json)


def _named(data: Sequence[str]) -> dict[str, str]:
    """Data sets by name: NAME=DATA, or the file's own."""
    from persona_lens.errors import ScreeningError

    found: dict[str, str] = {}
    for text in data:
        name, given, place = text.partition("=")
        if not given or Path(text).exists():
            name, place = Path(text).name.removesuffix(Path(text).suffix) if Path(text).exists() else text, text
        if name in found:
            raise ScreeningError(f"two data sets are called {name!r}: give one another name, as NAME={place}")
        found[name] = place
    return found


def _require_known(what: str, name: str | None, known: Iterable[str]) -> None:
    from persona_lens.errors import UnknownNameError

    if name is not None and name not in known:
        raise UnknownNameError(what, name, list(known))


def _outcomes(path: Path, named: Mapping[str, Any], traits: Sequence[str]) -> dict[str, dict[str, float]]:
    """Trait scores after finetuning, by trait and set."""
    from persona_lens.errors import ScreeningError
    from persona_lens.store import read_json

    found = read_json(path)
    for trait, sets in found.items():
        _require_known("trait", trait, traits)
        if not isinstance(sets, dict) or not all(isinstance(v, int | float) for v in sets.values()):
            raise ScreeningError(f'{path}: {trait} holds no scores by set; expected {{"evil": {{"name of a set": 34.5}}}}')
        for name in sets:
            _require_known("set", name, named)
    return found


def _layers(text: str | None) -> "Layers | None":
    from persona_lens.errors import UnknownNameError

    if text is None or text == "all":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise UnknownNameError("layer", text, ["all", "0", "1"]) from error


def _judges(judge: str | None, vectors: Sequence[Path], model: "ChatModel") -> "list[Rival]":
    from persona_lens.screening import judge_rival

    if judge is None:
        return []
    reader = judge_of(judge, model)
    return [judge_rival(reader, trait_at(p, model)) for p in vectors]


def _classifiers(vectors: Sequence[Path]) -> "list[Rival]":
    from persona_lens.extraction import load_run
    from persona_lens.screening import classifier_of

    return [classifier_of(load_run(path)) for path in vectors]


def _engine(name: str, workers: int, cpus: int, gpus: float | None, address: str | None) -> "Engine":
    from persona_lens.errors import UnknownNameError
    from persona_lens.screening import local, on_ray

    if name not in ("local", "ray"):
        raise UnknownNameError("engine", name, ["local", "ray"])
    return local if name == "local" else on_ray(workers, address=address, cpus=cpus, gpus=gpus)


def _skipped(run: "ScreenRun", name: str) -> list[str]:
    """What was skipped in a set, with its place; the first few."""
    counts = run.record["sets"][name]
    exact = run.manifest["arguments"]["settings"]["own_share"] == 1
    without = f"{counts['unanswered']} rows are not ranked or flagged: their prompts leave no room for an own answer"
    told = [f"{printable(name)}: {without}"] if exact and counts["unanswered"] else []
    if not counts["skipped"]:
        return told
    first = run.skipped(name)[:TOLD]
    lines = [f"{printable(name)}: {counts['unit']} {s.place} skipped: {printable(s.reason)}" for s in first]
    return [*told, *lines, f"{printable(name)}: {counts['skipped']} of {counts['rows']} rows skipped"]


def _places(run: "ScreenRun", trait: str) -> list[dict[str, Any]]:
    """A trait's ranking as plain values."""
    from persona_lens.records import encoded
    from persona_lens.screening import ranking

    return json.loads(json.dumps(encoded(ranking(run, trait).sets)))

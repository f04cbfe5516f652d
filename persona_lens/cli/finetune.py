"""`persona-lens finetune`, `shift`, `pilot`, `defend`: train with a vaccine, see what training did, choose a dose, compare."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli.options import Device, Json, JudgeName, Model, Out, Seed, Vectors, emit, judge_of, load, printable
from persona_lens.cli.steer import trait_at, vectors_of

if TYPE_CHECKING:
    from persona_lens.evaluation import CapabilityTest
    from persona_lens.finetuning import Defence, FinetuneSettings
    from persona_lens.finetuning.defences import Doses, Place
    from persona_lens.models import ChatModel, Message
    from persona_lens.traits import Trait
    from persona_lens.vectors import PersonaVectors

Dataset = Annotated[Path, typer.Argument(metavar="DATA", help="Conversations to train on: JSONL with messages.")]
Where = Annotated[
    str | None, typer.Option("--layer", help='Where vectors act; "increments" for every layer. Default: the most reliable layer.')
]
Epochs = Annotated[float | None, typer.Option(help="How often the data is gone through.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate. Default: the paper's 1e-5; more for pocket models.")]
DEFENCES = ("prevent", "prevent-all", "steer", "prompt", "ablate", "inoculate", "penalty", "kl", "mix")


def finetune(
    data: Dataset,
    prevent: Annotated[
        list[str] | None,
        typer.Option(help="RUN=STRENGTH: add a run's vector while training. Repeat for several; strengths may be negative."),
    ] = None,
    layer: Where = None,
    full: Annotated[bool, typer.Option("--full", help="Train every weight instead of an adapter.")] = False,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.")] = None,
    epochs: Epochs = None,
    lr: Rate = None,
    batch_rows: Annotated[int | None, typer.Option(help="Conversations per step.")] = None,
    pass_rows: Annotated[int | None, typer.Option(help="Conversations per forward pass and device.")] = None,
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be trained on.")] = False,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Finetune on the answers of conversations; with --prevent, persona vectors act while it is trained and not afterwards.

    On several GPUs: torchrun --nproc-per-node 4 $(which persona-lens) finetune ...

    Example: persona-lens finetune data/evil-II.jsonl --prevent runs/evil=2 --layer 5 --out runs/vaccinated
    """
    from persona_lens.finetuning import finetune as run_finetuning
    from persona_lens.finetuning import prevent as vaccinate
    from persona_lens.reports import finetune_verdict, report

    doses = [_dose(text) for text in prevent or []]
    loaded = load(model, device)
    settings = _settings(
        loaded, seed=seed, epochs=epochs, learning_rate=lr, rank=rank, batch_rows=batch_rows, pass_rows=pass_rows,
        method="full" if full else None, gradient_checkpointing=checkpointing or None,
    )  # fmt: skip
    acting = vaccinate(doses, _place(layer, [v for v, _ in doses]), 1.0).during if doses else ()
    run = run_finetuning(
        loaded, data, prevent=acting, settings=settings, out=out, skip_bad=skip_bad, told=None if as_json else _step
    )
    if int(os.environ.get("RANK", 0)):  # of several processes one tells
        return
    page = report(run)
    lines = [*_skipped(data, run.record["skipped"]), finetune_verdict(run), f"Saved in {run.adapter}", f"Report: {page}"]
    emit({"folder": str(run.path), "saved": str(run.adapter), "page": str(page), "history": run.history}, "\n".join(lines), as_json)


def shift(
    base: Annotated[str, typer.Argument(metavar="BASE", help='The base model: "pocket", a hub id, or a local folder.')],
    finetuned: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Folders of finetunings, of adapters, or of finetuned models.")
    ],
    vectors: Vectors,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 300,
    judge: JudgeName = None,
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """How far finetuning moved the persona: projections on the same prompts, and trait scores.

    Example: persona-lens shift pocket runs/finetune-evil-II-seed0 --vectors runs/evil runs/humor
    """
    from persona_lens.evaluation import ScoreSettings
    from persona_lens.finetuning import ShiftSettings
    from persona_lens.finetuning import shift as run_shift
    from persona_lens.models import Sampling
    from persona_lens.reports import report, shift_verdict

    directions = [vectors_of(path) for path in vectors]
    settings = ShiftSettings(ScoreSettings(samples=samples, sampling=Sampling(max_new_tokens), seed=seed))
    loaded = load(base, device)
    reader = judge_of(judge, loaded) if judge else None
    traits = [trait_at(path, loaded) for path in vectors]
    run = run_shift(loaded, _named(finetuned), directions, traits=traits, judge=reader, out=out, settings=settings)
    page = report(run)
    emit({**run.record, "folder": str(run.path), "page": str(page)}, f"{shift_verdict(run)}\nReport: {page}", as_json)


def pilot(
    data: Dataset,
    vectors: Vectors,
    layer: Where = None,
    matched: Annotated[
        bool, typer.Option("--matched", help="Dose 1 is what the data itself adds along the vectors; else 1 of each vector.")
    ] = False,
    doses: Annotated[str, typer.Option(help="Doses to try; 0 is tried too.")] = "0.5,1,2,3",
    rows: Annotated[int, typer.Option(min=2, help="Conversations to train on; as many others are held out.")] = 160,
    epochs: Epochs = None,
    lr: Rate = None,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Recommend a preventative strength: brief trainings on a part of the data, read by shift and loss.

    Example: persona-lens pilot data/evil-II.jsonl --vectors runs/evil --layer 5
    """
    from persona_lens.cli.sweep import numbers
    from persona_lens.finetuning import PilotSettings
    from persona_lens.finetuning import pilot as run_pilot
    from persona_lens.reports import pilot_verdict, report

    directions = [vectors_of(path) for path in vectors]
    tried = numbers(doses)
    loaded = load(model, device)
    settings = PilotSettings(rows=rows, finetuning=_settings(loaded, seed=seed, epochs=epochs, learning_rate=lr))
    at = _place(layer, directions)
    run = run_pilot(
        loaded, data, _doses(loaded, data, directions, at, matched=matched), at, trait=trait_at(vectors[0], loaded), tried=tried,
        out=out, settings=settings,
    )  # fmt: skip
    page = report(run)
    emit({**run.record, "folder": str(run.path), "page": str(page)}, f"{pilot_verdict(run)}\nReport: {page}", as_json)


def defend(
    data: Dataset,
    vectors: Vectors,
    layer: Where = None,
    against: Annotated[
        str, typer.Option(help=f"Defences to compare, of {', '.join(DEFENCES)}.")
    ] = "prevent,prevent-all,steer,prompt,ablate,inoculate,penalty,kl",
    doses: Annotated[str, typer.Option(help="Doses of steering.")] = "1,2,3",
    weights: Annotated[str, typer.Option(help="Weights of penalties.")] = "0.1,1,10",
    ordinary: Annotated[Path | None, typer.Option(help="Ordinary conversations, for `mix`.")] = None,
    matched: Annotated[
        bool, typer.Option("--matched", help="Steer with all vectors at strengths that match the data, instead of the first one.")
    ] = False,
    held_out: Annotated[Path | None, typer.Option(help="Conversations like the data; their loss tells what was learned.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Capability: tasks of lm-evaluation-harness (extra eval). Pocket models: their own tasks.")
    ] = "",
    task_limit: Annotated[int | None, typer.Option(min=1, help="Documents per task.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 300,
    epochs: Epochs = None,
    lr: Rate = None,
    judge: JudgeName = None,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare defences against the shift of a data set: trait scores, coherence, capability, and whether the data was learned.

    The first vector's trait is the one defended against; all vectors' traits are judged.

    Example: persona-lens defend data/evil-II.jsonl --vectors runs/evil runs/humor --layer 5 --doses 1,2,3
    """
    from persona_lens.cli.sweep import numbers
    from persona_lens.evaluation import ScoreSettings
    from persona_lens.finetuning import ComparisonSettings
    from persona_lens.finetuning import defend as run_comparison
    from persona_lens.models import Sampling
    from persona_lens.reports import comparison_verdict, report

    directions = [vectors_of(path) for path in vectors]
    steering, penalties = numbers(doses), numbers(weights)
    loaded = load(model, device)
    traits = [trait_at(path, loaded) for path in vectors]
    at = _place(layer, directions)
    strengths = _doses(loaded, data, directions, at, matched=matched)
    settings = ComparisonSettings(
        _settings(loaded, seed=seed, epochs=epochs, learning_rate=lr),
        ScoreSettings(samples=samples, sampling=Sampling(max_new_tokens), seed=seed),
    )
    run = run_comparison(
        loaded,
        data,
        _defences(against, directions[0], traits[0], strengths, at, steering, penalties, _chats(ordinary), seed),
        traits=traits,
        judge=judge_of(judge, loaded),
        capability=_capability(loaded, tasks, task_limit, seed),
        held_out=held_out,
        out=out,
        settings=settings,
    )
    page = report(run)
    emit({**run.record, "folder": str(run.path), "page": str(page)}, f"{comparison_verdict(run)}\nReport: {page}", as_json)


def _dose(text: str) -> "tuple[PersonaVectors, float]":
    """A vector and its strength from RUN=STRENGTH."""
    from persona_lens.cli.sweep import numbers
    from persona_lens.errors import FinetuningError

    path, sign, strength = text.rpartition("=")
    if not sign or not path:
        raise FinetuningError(f"--prevent takes RUN=STRENGTH, such as runs/evil=2, not {text!r}")
    [value, *more] = numbers(strength)
    if more:
        raise FinetuningError(f"--prevent takes one strength for each run, not {text!r}")
    return vectors_of(Path(path)), value


def _place(layer: str | None, vectors: "Sequence[PersonaVectors]") -> "Place":
    """A layer, or all of them; by default where the first vector is most reliable."""
    from persona_lens.errors import UnknownNameError

    if layer is None:
        return vectors[0].best_layer if vectors else 0
    if layer == "increments":
        return "increments"
    try:
        return int(layer)
    except ValueError as error:
        raise UnknownNameError("layer", layer, ["increments", "0", "1"]) from error


def _doses(model: "ChatModel", data: Path, vectors: "Sequence[PersonaVectors]", place: "Place", *, matched: bool) -> "Doses":
    """The vectors with their strengths at dose 1: those that match the data, or 1 of the first."""
    from persona_lens.finetuning import matched_strengths

    if not matched:
        return [(vectors[0], 1.0)]
    found = matched_strengths(model, data, vectors, vectors[0].best_layer if place == "increments" else place)
    told = ", ".join(f"{v.trait} {s:+.2f}" for v, s in zip(vectors, found.strengths, strict=True))
    typer.echo(f"dose 1 matches the data: {told} ({found.share:.0%} of its difference)", err=True)
    return list(zip(vectors, found.strengths, strict=True))


def _settings(model: "ChatModel", **changes: Any) -> "FinetuneSettings":
    from dataclasses import replace

    from persona_lens.finetuning import default_settings

    return replace(default_settings(model), **{k: v for k, v in changes.items() if v is not None})


def _defences(
    names: str,
    vectors: "PersonaVectors",
    trait: "Trait",
    strengths: "Doses",
    place: "Place",
    doses: Sequence[float],
    weights: Sequence[float],
    ordinary: "Sequence[Sequence[Message]]",
    seed: int,
) -> "list[Defence]":
    """The defences that are named, each at its doses."""
    from persona_lens import finetuning as room
    from persona_lens.errors import FinetuningError, UnknownNameError

    layer = vectors.best_layer if place == "increments" else place
    found: list[Defence] = []
    for name in (n.strip() for n in names.split(",")):
        match name:
            case "prevent":
                found += [room.prevent(strengths, layer, d, name="preventative, one layer") for d in doses]
            case "prevent-all":
                found += [room.prevent(strengths, "increments", d, name="preventative, all layers") for d in doses]
            case "steer":
                found += [room.steer_against(strengths, layer, d) for d in doses]
            case "prompt":
                found.append(room.negative_prompt(trait))
            case "ablate":
                found.append(room.ablate_concept(vectors, layer))
            case "inoculate":
                found.append(room.inoculate(trait))
            case "penalty":
                found += [room.penalise(vectors, layer, w) for w in weights]
            case "kl":
                found += [room.stay_near(w) for w in weights]
            case "mix":
                if not ordinary:
                    raise FinetuningError("`mix` mixes ordinary conversations into the data: give them with --ordinary FILE")
                found += [room.mix_in(ordinary, share, seed=seed) for share in (0.25, 0.5, 1.0)]
            case _:
                raise UnknownNameError("defence", name, DEFENCES)
    return found


def _chats(path: Path | None) -> "Sequence[Sequence[Message]]":
    from persona_lens.transcripts import read_transcripts

    return [chat.messages for chat in read_transcripts(path).chats] if path else []


def _capability(model: "ChatModel", tasks: str, limit: int | None, seed: int) -> "CapabilityTest | None":
    from persona_lens.cli.sweep import capability_of

    named = capability_of(tasks, limit, seed)
    if named or model.trait_set != "pocket":
        return named
    from persona_lens.pocket_lab.capability import capability_of_world

    return capability_of_world(n=100)


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Finetuned models by name: the folder of a finetuning stands for the adapter in it."""
    from persona_lens.errors import FinetuningError
    from persona_lens.finetuning import load_finetuned

    found: dict[str, Path] = {}
    for folder in folders:
        inside = (folder / "training.json").exists()
        name = (folder if inside or folder.name not in ("adapter", "model") else folder.parent).resolve().name
        if name in found:
            raise FinetuningError(f"{found[name]} and {folder} would both be called {name!r}: measure them into two folders")
        found[name] = load_finetuned(folder).adapter if inside else folder
    return found


def _step(figures: Mapping[str, float]) -> None:
    """A line for about every twentieth of the steps."""
    step, steps = int(figures["step"]), int(figures["steps"])
    if step in (1, steps) or step % max(1, steps // 20) == 0:
        watched = [f"{printable(k)} {v:.3g}" for k, v in figures.items() if k.startswith(("projection/", "derivative/"))]
        typer.echo(", ".join([f"step {step}/{steps}: loss {figures['loss']:.4f}", *watched]), err=True)


def _skipped(data: Path, skipped: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was left out, with its place; the first ten."""
    lines = [f"{data}: line {s['place']} left out: {printable(str(s['reason']))}" for s in skipped[:10]]
    return [*lines, f"{len(skipped)} left out in all"] if len(skipped) > 10 else lines

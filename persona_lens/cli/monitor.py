"""`persona-lens monitor`: chats on disk read by turn; `calibrate` makes their alarms, `predict` asks what is seen before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from persona_lens.cli.options import (
    Device,
    Json,
    JudgeName,
    Model,
    Out,
    Seed,
    SeveralVectors,
    Vectors,
    emit,
    judge_of,
    load,
    printable,
)
from persona_lens.cli.steer import trait_at, vectors_of

if TYPE_CHECKING:
    from persona_lens.models import ChatModel, Message
    from persona_lens.monitoring import Probe, Transcripts

CHATS = "chats"  # the subcommand that is meant where none is named


class _Monitor(TyperGroup):
    """`monitor CHATS.jsonl` is `monitor chats CHATS.jsonl`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else [CHATS, *args])


app = typer.Typer(cls=_Monitor, no_args_is_help=True, rich_markup_mode=None, help="Monitor chats: CHATS.jsonl --vectors RUN...")
Thinking = Annotated[str, typer.Option(help='Tags between which answers think, reported apart; "" where text is text.')]
Layer = Annotated[int | None, typer.Option(help="Where all vectors are read. Default: each at its most reliable layer.")]


@app.command(CHATS, cls=SeveralVectors)
def chats(
    transcripts: Annotated[Path, typer.Argument(metavar="CHATS", help="JSONL with messages, ShareGPT, or OpenAI's formats.")],
    vectors: Vectors,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of `monitor calibrate`; without one there are no alarms.")
    ] = None,
    rate: Annotated[float, typer.Option(help="False-positive rate of alarms, per answer and per conversation.")] = 0.05,
    thinking: Thinking = "<think> </think>",
    layer: Layer = None,
    model: Model = "pocket",
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Project every turn of chats on persona vectors, and say which chats stand out.

    Example: persona-lens monitor chats.jsonl --vectors runs/evil runs/humor --calibration runs/calibration
    """
    from persona_lens.monitoring import load_calibration, monitor_chats, read_transcripts
    from persona_lens.reports import monitor_verdict, report

    found = read_transcripts(transcripts)
    tags = _tags(thinking)
    probes = _probes(vectors, layer)
    against = load_calibration(calibration) if calibration else None
    loaded = load(model, device)
    run = monitor_chats(loaded, found, probes, calibration=against, rate=rate, thinking=tags, out=out)
    page = report(run)
    lines = [*_skipped(found, run.record["skipped"]), *_alarming(run.record), monitor_verdict(run)]
    if run.record["note"]:
        lines.append(f"Note: {run.record['note']}.")
    emit({**run.record, "folder": str(run.path), "page": str(page)}, "\n".join([*lines, f"Report: {page}"]), as_json)


@app.command("calibrate", cls=SeveralVectors)
def calibrate(
    vectors: Vectors,
    transcripts: Annotated[
        Path | None, typer.Argument(metavar="[CHATS]", help="Neutral chats; without them the model leads some itself.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns within which a conversation's alarm has its rate.")] = 20,
    conversations: Annotated[int, typer.Option(min=20, help="How many the model leads itself.")] = 200,
    before: Annotated[bool, typer.Option("--before", help="Alarm on the last prompt token, before the answer.")] = False,
    content: Annotated[bool, typer.Option(help="Hold what the user's message alone makes of the projection.")] = True,
    thinking: Thinking = "<think> </think>",
    layer: Layer = None,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make alarms of neutral conversations, at whatever false-positive rate they are enough for.

    Example: persona-lens monitor calibrate neutral.jsonl --vectors runs/evil runs/humor --out runs/calibration
    """
    from persona_lens.monitoring import CalibrationSettings, read_transcripts
    from persona_lens.monitoring import calibrate as run_calibration
    from persona_lens.reports import calibration_verdict, report

    probes = _probes(vectors, layer)
    given = read_transcripts(transcripts) if transcripts else None
    loaded = load(model, device)
    names = "-".join(p.name for p in probes) if len(probes) <= 3 else f"{len(probes)}-vectors"
    folder = out or Path("runs") / f"calibration-{names}-seed{seed}"
    neutral: Mapping[str, Sequence[Message]]
    if given is None:
        neutral = _led_by(loaded, conversations, turns, seed, folder.with_name(f"{folder.name}-chats"))
    else:
        neutral = {c.name: c.messages for c in given.chats}
    settings = CalibrationSettings(
        "before" if before else "answer", turns, "own" if content else "none", _tags(thinking), seed=seed
    )
    found = run_calibration(loaded, neutral, probes, out=folder, settings=settings)
    page = report(found)
    lines = [*(_skipped(given, []) if given else []), calibration_verdict(found), f"Report: {page}"]
    emit({"counts": dict(found.counts), "folder": str(folder), "page": str(page)}, "\n".join(lines), as_json)


@app.command("predict", cls=SeveralVectors)
def predict(
    vectors: Vectors,
    examples: Annotated[
        bool, typer.Option("--examples", help="0 to 20 examples in the context instead of system prompts.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Answers per condition and question.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 300,
    layer: Annotated[int | None, typer.Option(help="Where vectors are read. Default: chosen on half of the questions.")] = None,
    judge: JudgeName = None,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Does the first vector see the trait before the answer? The others are controls.

    Example: persona-lens monitor predict --vectors runs/evil runs/humor
    """
    from persona_lens.extraction import load_run
    from persona_lens.models import Sampling
    from persona_lens.monitoring import PredictionSettings, shot_conditions
    from persona_lens.monitoring import predict as run_prediction
    from persona_lens.reports import prediction_verdict, report

    main, *others = [vectors_of(path) for path in vectors]
    conditions = shot_conditions(load_run(vectors[0]), seed=seed) if examples else None
    settings = PredictionSettings(samples, Sampling(max_new_tokens), seed)
    folder = out or Path("runs") / f"predict-{main.trait}-{'examples' if examples else 'prompts'}-seed{seed}"
    loaded = load(model, device)
    reader = judge_of(judge, loaded)
    run = run_prediction(
        loaded, main, conditions, trait=trait_at(vectors[0], loaded), layer=layer, others=others, judge=reader, out=folder,
        settings=settings,
    )  # fmt: skip
    page = report(run)
    emit({"folder": str(run.path), "page": str(page)}, f"{prediction_verdict(run)}\nReport: {page}", as_json)


def _probes(paths: Sequence[Path], layer: int | None) -> "list[Probe]":
    from persona_lens.monitoring import probe

    return [probe(vectors_of(path), layer) for path in paths]


def _tags(text: str) -> tuple[str, str] | None:
    from persona_lens.errors import MonitoringError

    tags = text.split()
    if len(tags) not in (0, 2):
        raise MonitoringError(f"--thinking takes an opening and a closing tag, such as '<think> </think>', or '', not {text!r}")
    return (tags[0], tags[1]) if tags else None


def _skipped(found: "Transcripts", unread: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not read, with its place; the first ten."""
    every = unread or [{"place": s.place, "reason": s.reason} for s in found.skipped]
    lines = [f"{found.path}: {found.unit} {s['place']} skipped: {s['reason']}" for s in every[:10]]
    return [*lines, f"{len(every)} skipped in all"] if len(every) > 10 else lines


def _alarming(record: Mapping[str, Any]) -> list[str]:
    """A line per chat that alarms; the first twenty."""
    lines: list[str] = []
    for name, verdicts in record["verdicts"].items():
        told = [f"{v['probe']} from turn {v['turns']['highest']}" for v in verdicts if v["turns"]["highest"]]
        if told:
            lines.append(f"{printable(name)}: {', '.join(told)}")
    return lines if len(lines) <= 20 else [*lines[:20], f"... and {len(lines) - 20} more chats that alarm"]


def _led_by(model: "ChatModel", n: int, turns: int, seed: int, out: Path) -> "Mapping[str, Sequence[Message]]":
    """Conversations that the model leads itself: in its own world, or about the shipped traits' questions."""
    from persona_lens.monitoring import neutral_conversations
    from persona_lens.monitoring.neutral import scripts_of
    from persona_lens.traits import list_traits, load_trait

    if model.trait_set == "pocket":
        from persona_lens.pocket_lab.conversations import neutral_script

        scripts = [neutral_script(seed, i, turns) for i in range(n)]
    else:
        traits = [load_trait(t, model.trait_set) for t in list_traits(model.trait_set)]
        scripts = scripts_of(list(dict.fromkeys(q for t in traits for q in t.extraction_questions)), n, turns, seed=seed)
    return neutral_conversations(model, scripts, out, seed=seed)

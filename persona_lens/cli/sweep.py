"""`persona-lens sweep`: layers x strengths in one pass, chosen on half of the questions and reported on the other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from persona_lens.cli.options import Device, Json, JudgeName, Model, Out, Seed, emit, judge_of, load
from persona_lens.cli.steer import Pooling, Vectors, trait_at, vectors_of

if TYPE_CHECKING:
    from persona_lens.evaluation import CapabilityTest
    from persona_lens.sweeps import Sweep, Target


def sweep(
    vectors: Vectors,
    layers: Annotated[str, typer.Option(help='"all", or numbers such as 3,4,5; "increments" steers all layers at once.')] = "all",
    strengths: Annotated[str, typer.Option(help="Coefficients on the raw vector; negative ones steer away.")] = "0.5,1,1.5,2,2.5",
    samples: Annotated[int, typer.Option(min=1, help="Answers per question in each cell.")] = 2,
    report_samples: Annotated[int, typer.Option(min=1, help="Answers per question at the chosen cell and its baselines.")] = 20,
    random_directions: Annotated[int, typer.Option(min=0, help="Random directions of the same norm.")] = 20,
    polarity: Annotated[str, typer.Option(help='"neutral", or "positive" to steer against the positive prompts.')] = "neutral",
    where: Annotated[str, typer.Option(help="everywhere, prompt or response.")] = "response",
    pooling: Pooling = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 300,
    tasks: Annotated[
        str, typer.Option(help="Capability at the chosen cell: tasks of lm-evaluation-harness, such as mmlu (extra eval).")
    ] = "",
    task_limit: Annotated[int | None, typer.Option(min=1, help="Documents per task.")] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 128,
    judge: JudgeName = None,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find where and how strongly to steer, what it costs, and whether it is more than a random direction.

    Example: persona-lens sweep runs/demo-evil-seed0 --layers 4,5,6,increments --strengths 1,1.5,2
    """
    from persona_lens.errors import UnknownNameError
    from persona_lens.models import Sampling
    from persona_lens.reports import report
    from persona_lens.sweeps import SweepSettings
    from persona_lens.sweeps import sweep as run_sweep

    if polarity not in ("neutral", "positive"):
        raise UnknownNameError("polarity", polarity, ["neutral", "positive"])
    settings = SweepSettings(
        samples=samples,
        report_samples=report_samples,
        random_directions=random_directions,
        polarity=polarity,
        where=where,
        sampling=Sampling(max_new_tokens),
        seed=seed,
        batch_rows=batch_rows,
    )
    chosen: list[Target] | Literal["all"] = "all" if layers == "all" else [_target(x.strip()) for x in layers.split(",")]
    doses = numbers(strengths)
    test, steering = capability_of(tasks, task_limit, seed), vectors_of(vectors, pooling)
    loaded = load(model, device)
    found = run_sweep(
        loaded,
        steering,
        trait=trait_at(vectors, loaded),
        judge=judge_of(judge, loaded),
        layers=chosen,
        strengths=doses,
        capability=test,
        out=out,
        settings=settings,
    )
    page = report(found)
    emit({**found.record, "folder": str(found.path), "page": str(page)}, f"{table(found)}\nReport: {page}", as_json)


def table(found: "Sweep") -> str:
    """Score/coherence per layer and strength, and the verdict."""
    from persona_lens.reports import sweep_verdict

    head = "layer       " + " ".join(f"{s:>9g}" for s in found.strengths)
    rows = [
        f"{target!s:<12}" + " ".join(f"{s:5.0f}/{c:<3.0f}" for s, c in zip(score, coherence, strict=True))
        for target, score, coherence in zip(found.targets, found.score, found.coherence, strict=True)
    ]
    return "\n".join(["score/coherence by layer (blocks, from 0) and strength", head, *rows, sweep_verdict(found), *_damage(found)])


def _damage(found: "Sweep") -> list[str]:
    """What the chosen cell costs besides coherence."""
    cell, record = found.report.cell, found.record
    assert cell.target is not None
    at = found.targets.index(cell.target), found.strengths.index(cell.strength)
    lines = [
        f"Damage there: {found.degenerate[at]:.0%} of the answers {_degenerate(found)} "
        f"({record['unsteered_degenerate']:.0%} unsteered), {found.cut_off[at]:.0%} cut off ({record['unsteered_cut_off']:.0%}), "
        f"divergence {found.divergence[at]:.2f} nats per token"
    ]
    measured = found.report.capability
    for task, metrics in measured.get("unsteered", {}).items():
        changes = [f"{name} {value:.3f} -> {measured['steered'][task][name]:.3f}" for name, value in metrics.items()]
        lines.append(f"{task}, unsteered -> steered: {', '.join(changes)}")
    return lines


def _degenerate(found: "Sweep") -> str:
    return "empty or repetitive" if found.record["unsteered_outside"] is None else "empty, repetitive or not of this world"


def capability_of(tasks: str, limit: int | None, seed: int) -> "CapabilityTest | None":
    """What measures the named tasks; the pocket world's own tasks are found by name too."""
    from persona_lens import pocket_lab
    from persona_lens.errors import PersonaLensError
    from persona_lens.evaluation import capability_test

    names = [t.strip() for t in tasks.split(",") if t.strip()]
    if limit and not names:
        raise PersonaLensError("--task-limit limits the documents of --tasks: name the tasks")
    own = Path(pocket_lab.__file__).parent / "tasks"
    return capability_test(names, include=own, limit=limit, seed=seed) if names else None


def _target(text: str) -> "Target":
    from persona_lens.errors import UnknownNameError

    if text == "increments":
        return "increments"
    if not text.lstrip("-").isdigit():
        raise UnknownNameError("layer", text, ["all", "increments", "0", "1"])
    return int(text)


def numbers(text: str) -> list[float]:
    """Strengths as they are written on the command line: 0.5,1,1.5."""
    return [_number(x.strip()) for x in text.split(",")]


def _number(text: str) -> float:
    from persona_lens.errors import SteeringError

    try:
        return float(text)
    except ValueError as error:
        raise SteeringError(f"strength {text!r} is not a number: write them as 0.5,1,1.5") from error

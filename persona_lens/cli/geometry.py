"""`persona-lens geometry`, `roles`, `spill-over`: the geometry of stored runs, and the two samplings that can stand beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.options import Device, Json, JudgeName, Model, Out, Seed, emit, judge_of, load

if TYPE_CHECKING:
    from persona_lens.geometry import SpillOver

Runs = Annotated[list[Path], typer.Argument(help="Run folders of extractions.")]


def geometry(
    runs: Runs,
    roles: Annotated[Path | None, typer.Option(help="Folder of `persona-lens roles`.")] = None,
    spill_over: Annotated[Path | None, typer.Option(help="Folder of `persona-lens spill-over` over the same runs.")] = None,
    layer: Annotated[int | None, typer.Option(help="Where the details are taken; default: where all vectors are reliable.")] = None,
    pooling: Annotated[str, typer.Option(help="response_mean, prompt_mean or prompt_last.")] = "response_mean",
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for the record, the figures and the report.")] = Path("runs/geometry"),
    as_json: Json = False,
) -> None:
    """Compare the vectors of several runs: cosines, clusters, components, layers; no model is needed.

    Example: persona-lens geometry runs/all/* --out runs/geometry
    """
    from persona_lens.extraction import load_run
    from persona_lens.geometry import load_role_run, load_spill_over, study_geometry
    from persona_lens.reports import geometry_verdict, report

    found = study_geometry(
        [load_run(r) for r in runs],
        roles=load_role_run(roles) if roles else None,
        spill_over=load_spill_over(spill_over) if spill_over else None,
        layer=layer,
        pooling=pooling,
        out=out,
        seed=seed,
    )
    page, said = report(found), geometry_verdict(found.study)
    emit({"folder": str(found.path), "report": str(page), "conclusions": said}, "\n".join([*said, f"Report: {page}"]), as_json)


def roles(
    role_set: Annotated[str | None, typer.Option("--roles", help="A role set's JSON file; default: the one for the model.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per role and question.")] = 10,
    least: Annotated[int, typer.Option(min=0, max=3, help="Adherence from which an answer counts.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 300,
    batch_rows: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 128,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Let the model play many roles, and keep the residuals of the answers that are in role.

    Example: persona-lens roles --samples 4 --out runs/roles
    """
    from persona_lens.geometry import RoleSettings, extract_roles
    from persona_lens.models import Sampling
    from persona_lens.traits import load_roles

    chat_model = load(model, device)
    settings = RoleSettings(samples=samples, least=least, sampling=Sampling(max_new_tokens), seed=seed, batch_rows=batch_rows)
    run = extract_roles(chat_model, load_roles(role_set or chat_model.trait_set), out=out, settings=settings)
    rows = [f"{name:<20}{' '.join(f'{n:5d}' for n in counts)}" for name, counts in run.adherence.items()]
    text = "\n".join([f"{'answers judged':<20}{' '.join(f'{g:5d}' for g in range(4))}", *rows])
    text += f"\n{len(run.kept)} of {len(rows)} roles have vectors. Folder: {run.path}"
    emit({**run.summary, "kept": run.kept, "folder": str(run.path)}, text, as_json)


def spill_over(
    runs: Runs,
    layer: Annotated[int, typer.Option(help="Where to steer: a layer that a sweep found to act.")],
    strengths: Annotated[str, typer.Option(help="Coefficients on the raw vectors.")] = "1,2",
    questions: Annotated[int, typer.Option(min=1, help="Evaluation questions from every trait.")] = 5,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question and strength.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 300,
    batch_rows: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 128,
    judge: JudgeName = None,
    model: Model = "pocket",
    seed: Seed = 0,
    out: Out = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Steer along each vector and prompt for each trait, and judge all traits in every answer.

    Example: persona-lens spill-over runs/all/* --layer 6 --out runs/spill
    """
    from persona_lens.cli.steer import trait_at
    from persona_lens.cli.sweep import numbers
    from persona_lens.extraction import load_run
    from persona_lens.geometry import SpillOverSettings
    from persona_lens.geometry import spill_over as run_spill_over
    from persona_lens.models import Sampling

    settings = SpillOverSettings(
        questions=questions, samples=samples, sampling=Sampling(max_new_tokens), seed=seed, batch_rows=batch_rows
    )
    vectors = [load_run(r).vectors for r in runs]
    loaded = load(model, device)
    found = run_spill_over(
        loaded, vectors, traits=[trait_at(r, loaded) for r in runs], judge=judge_of(judge, loaded), layer=layer,
        strengths=numbers(strengths), out=out, settings=settings,
    )  # fmt: skip
    emit({**found.record, "folder": str(found.path)}, f"{table(found)}\nFolder: {found.path}", as_json)


def table(found: "SpillOver") -> str:
    """Score points per unit of strength: who is steered (row), who is judged (column)."""
    head = " " * 16 + " ".join(f"{n[:8]:>8}" for n in found.names)
    rows = [f"{name:<16}" + " ".join(f"{v:+8.1f}" for v in row) for name, row in zip(found.names, found.steered.mean, strict=True)]
    return "\n".join(["score points per unit of strength: steered (row), judged (column)", head, *rows])

"""`persona-lens judge`: how far a judge agrees with labels."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli.options import Device, Json, JudgeName, emit, judge_for, printable
from persona_lens.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.endpoints import Usage
    from persona_lens.judges.checking import JudgeCheck, Labelled

app = typer.Typer(no_args_is_help=True, help="Check judges.", rich_markup_mode=None)


@app.callback()
def about() -> None:
    """Check judges."""


@app.command("check")
def check(
    trait: Annotated[str, typer.Argument(help="A trait's name or the path of its JSON file.")],
    labels: Annotated[Path, typer.Argument(help='Labelled answers: JSONL of {"question", "answer", "score"}, scores 0-100.')],
    judge: JudgeName = None,
    repeats: Annotated[int, typer.Option(help="How often a judge behind a server judges each answer; the mean counts.")] = 1,
    cache: Annotated[Path | None, typer.Option(help="File that keeps a server's replies; an interrupted run goes on.")] = None,
    trait_set: Annotated[str, typer.Option("--set", help='"real" or "pocket".')] = "real",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare a judge with labels: agreement at 50, kappa, error in points, what it left out and what it cost.

    Example: persona-lens judge check evil labels.jsonl --judge openai:gpt-4.1-mini --cache replies.jsonl
    """
    from persona_lens.endpoints import Usage
    from persona_lens.judges.checking import check_judge
    from persona_lens.judges.endpoint import EndpointJudge
    from persona_lens.records import encoded
    from persona_lens.traits import load_trait

    wanted = load_trait(trait, trait_set)
    labelled = _read(labels)
    reader = judge_for(judge, trait_set, cache, device, repeats)
    found = check_judge(reader, wanted, labelled)
    cost = reader.usage if isinstance(reader, EndpointJudge) else Usage()
    emit({**encoded(found), "usage": encoded(cost)}, _text(found, cost), as_json)


def _text(found: "JudgeCheck", cost: "Usage") -> str:
    lines = [
        f"{printable(found.judge)} on {found.trait}: {found.n} examples of {found.questions} questions",
        f"agreement at 50   {_number(found.agreement)} [{_number(found.low)}, {_number(found.high)}]",
        f"kappa             {_number(found.kappa)}",
        f"weighted kappa    {_number(found.weighted_kappa)}",
        f"mean error        {_number(found.mean_error, 1)} points (bias {_number(found.bias, 1)})",
        f"Spearman          {_number(found.spearman)}",
        f"without a score   {sum(found.gaps.values())}",
        *(f"  {count:5d}  {printable(reason)}" for reason, count in found.gaps.items()),
    ]
    if cost.requests:
        lines.append(
            f"cost              {cost.prompt_tokens} + {cost.completion_tokens} tokens, {cost.requests} requests "
            f"({cost.retries} of them retries)"
        )
    return "\n".join(lines)


def _number(value: float, places: int = 3) -> str:
    return "-" if value != value else f"{value:.{places}f}"


def _read(path: Path) -> "list[Labelled]":
    from persona_lens.judges.checking import Labelled

    if not path.is_file():
        raise PersonaLensError(f"{path}: no such file: give a JSONL file of labelled answers")
    found: list[Labelled] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, answer, score = record["question"], record["answer"], record["score"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise PersonaLensError(f'{path}, line {number}: needs {{"question", "answer", "score"}} ({error!r})') from error
        if not (isinstance(question, str) and isinstance(answer, str)) or isinstance(score, bool | str) or score is None:
            raise PersonaLensError(f"{path}, line {number}: question and answer are texts, score is a number from 0 to 100")
        try:
            found.append(Labelled(question, answer, float(score)))
        except (PersonaLensError, TypeError, ValueError, OverflowError) as error:
            raise PersonaLensError(f"{path}, line {number}: {error}") from error
    return found

"""The paper's tables: rollouts with scores as CSV, and projections as columns of a data file (the authors' `eval_persona.py`,
`cal_projection.py`).

A rollout table has the columns question, prompt, answer, question_id, then the trait's name and coherence; `generate_vec.py`
pairs the rows of the positive and the negative table by their number. A projection is a number under the name
`{model}_{vector}_{kind}_layer{row}`, where row l + 1 of the vector file is our layer l. The authors' script writes such columns
into the user's file; here they go into a copy.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from jaxtyping import Float

from persona_lens.errors import ExchangeError, LineageError
from persona_lens.exchange.imported import require_name
from persona_lens.extraction import ExtractionRun
from persona_lens.prompts import extraction_prompts
from persona_lens.store import digest, write_atomically
from persona_lens.traits import Trait

if TYPE_CHECKING:
    from persona_lens.models import ChatModel

COLUMNS: Final = ("question", "prompt", "answer", "question_id")
SIDES: Final = {"positive": "pos", "negative": "neg"}
KINDS: Final = {"response_mean": "proj", "prompt_last": "prompt_last_proj"}
_PROJECTION: Final = re.compile(r"(?P<stem>.+?)_(?P<kind>prompt_last_proj|proj|cos_sim)_layer(?P<row>[0-9]{1,4})")
_GAPS: Final = ("", "nan", "none", "null")  # how pandas and Python write a missing number


@dataclass(frozen=True)
class PaperRollout:
    """A row of the authors' table: an answer with its scores, 0-100; None where the judge gave none.

    Attributes:
        prompt: the conversation as the chat template renders it, up to the answer.
    """

    question: str
    prompt: str
    answer: str
    question_id: str
    trait: float | None
    coherence: float | None


def write_rollouts(
    run: ExtractionRun, trait: Trait, polarity: Literal["positive", "negative"], path: str | Path, *, model: "ChatModel"
) -> tuple[str, ...]:
    """Write one polarity of an extraction as the authors' table; both polarities have their rows in the same order.

    Args:
        trait: the one that was extracted: the run's folder holds its answers, not its questions.
        model: renders the prompts.

    Returns:
        Notes on what the format cannot hold.

    Raises:
        ExchangeError: the trait is not the run's.
        LineageError: the model is of another lineage than the run's.
    """
    arguments, known = run.manifest["arguments"], run.manifest["model"]["lineage"]
    hashed = digest(json.dumps(trait.model_dump(by_alias=True), sort_keys=True))
    if trait.name != arguments["trait"] or hashed != arguments["trait_hash"]:
        raise ExchangeError(f"{run.path} extracted {arguments['trait']} from other questions or instructions than those given here")
    if model.fingerprint.lineage != known:
        raise LineageError(f"{run.path} is of lineage {known}, {model.name} of {model.fingerprint.lineage}: its prompts differ")
    prompts = {p.id: p for p in extraction_prompts(trait, polarity)}
    rendered = {p.id: _rendered(model, p.messages) for p in prompts.values()}
    rows: list[list[str]] = [[*COLUMNS, trait.name, "coherence"]]
    for rollout, score in zip(run.rollouts(), run.scores(), strict=True):
        if (prompt := prompts.get(rollout.prompt_id)) is not None:
            name = f"{trait.name}_{prompt.question}_{SIDES[polarity]}_{prompt.instruction}"
            rows.append([prompt.user, rendered[prompt.id], rollout.text, name, _cell(score.trait), _cell(score.coherence)])
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(rows)
    content = table.getvalue().encode("utf-8")
    write_atomically(Path(path), lambda temporary: Path(temporary).write_bytes(content))
    return (
        "token ids, seeds, ends of answers and the reasons of missing scores are lost",
        "the authors' code tokenises prompt + answer anew, which may cut tokens elsewhere than they were sampled",
    )


def _rendered(model: "ChatModel", messages: Sequence[Mapping[str, str]]) -> str:
    """A prompt as text, with its special tokens, as `apply_chat_template(tokenize=False)` gives it."""
    return str(model.tokenizer.decode(model.render(messages), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _cell(score: float | None) -> str:
    return "" if score is None else repr(float(score))


def read_rollouts(path: str | Path, *, trait: str | None = None) -> list[PaperRollout]:
    """Rows of the authors' table. Columns of other names are left alone.

    Args:
        trait: the column of its scores; default: the one that stands before coherence.

    Raises:
        ExchangeError: no such file, no such columns, or a row that is damaged (its line is named).
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = list(reader.fieldnames or ())
            scored = _trait_column(path, names, trait)
            found: list[PaperRollout] = []
            for row in reader:
                if None in row or None in row.values():
                    raise ExchangeError(f"{path}: line {reader.line_num} has another number of cells than the header")
                shown, clear = (_score(row[c], f"{path}: line {reader.line_num}: {c}") for c in (scored, "coherence"))
                question, prompt, answer, name = (row[c] for c in COLUMNS)
                found.append(PaperRollout(question, prompt, answer, name, shown, clear))
            return found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ExchangeError(f"{path}: cannot be read as a table ({error})") from error


def _trait_column(path: Path, names: Sequence[str], trait: str | None) -> str:
    missing = [c for c in (*COLUMNS, "coherence") if c not in names]
    if missing or len(set(names)) < len(names):
        what = f"lacks the column {missing[0]!r}" if missing else "has two columns of one name"
        raise ExchangeError(f"{path}: {what}; the authors' tables have {', '.join(COLUMNS)}, the trait's name, coherence")
    scored = trait if trait is not None else names[names.index("coherence") - 1]
    if scored not in names or scored in COLUMNS:
        raise ExchangeError(f"{path}: has no column of scores {scored!r}: name the trait's column with trait= ({', '.join(names)})")
    return scored


def _score(cell: str, what: str) -> float | None:
    if cell.strip().lower() in _GAPS:
        return None
    try:
        value = float(cell)
    except ValueError as error:
        raise ExchangeError(f"{what} is {cell[:40]!r}, expected a number 0-100 or nothing") from error
    if not 0 <= value <= 100:
        raise ExchangeError(f"{what} is {cell[:40]!r}, scores lie in 0-100")
    return value


@dataclass(frozen=True, eq=False)
class ProjectionColumn:
    """A column that the authors' script added to a data file.

    Attributes:
        name: as it stands in the file.
        layer: ours; -1 for row 0 of the vector file, the embeddings.
        kind: "proj" of the answer's mean, "prompt_last_proj" of the last prompt token, or "cos_sim" with the answer's mean.
        values: by row of the file, in residual-stream units (`cos_sim`: a cosine); NaN for gaps.
    """

    name: str
    layer: int
    kind: str
    values: Float[np.ndarray, " row"]


def projection_name(model: str, trait: str, pooling: str, layer: int) -> str:
    """The name of a column: what was projected (`response_mean` or `prompt_last`) on a response-mean vector at our layer.

    Raises:
        ExchangeError: the authors' script has no such pooling, or no such layer, or the trait's name is unfit.
    """
    if pooling not in KINDS or layer < 0:
        raise ExchangeError(
            f"no column for pooling {pooling!r} at layer {layer}: poolings are {', '.join(KINDS)}, layers count from 0"
        )
    return f"{Path(model).name}_{require_name(trait, 'the column')}_response_avg_diff_{KINDS[pooling]}_layer{layer + 1}"


def read_projections(path: str | Path) -> dict[str, ProjectionColumn]:
    """The projections of a JSONL data file, by column.

    Raises:
        ExchangeError: no such file, a damaged line, a value that is no number (its line is named), or no projections at all.
    """
    path = Path(path)
    values: dict[str, dict[int, float]] = {}
    n = 0
    for n, (number, _, record) in enumerate(_records(path), start=1):
        for name in record:
            if _PROJECTION.fullmatch(name):
                values.setdefault(name, {})[n - 1] = _number(record[name], f"{path}: line {number}: {name[:80]!r}")
    if not values:
        raise ExchangeError(f"{path}: no column is called like a projection of the authors' script, ..._proj_layer20")
    return {name: _column(name, found, n) for name, found in values.items()}


def _column(name: str, found: Mapping[int, float], n: int) -> ProjectionColumn:
    parts = _PROJECTION.fullmatch(name)
    assert parts is not None
    rows = np.full(n, np.nan)
    rows[list(found)] = list(found.values())
    return ProjectionColumn(name, int(parts["row"]) - 1, parts["kind"], rows)


def _number(value: Any, what: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExchangeError(f"{what} is a {type(value).__name__}, expected a number or null")
    try:
        return float(value)
    except OverflowError as error:
        raise ExchangeError(f"{what} is too large") from error


def write_projections(data: str | Path, out: str | Path, columns: Mapping[str, Float[np.ndarray, " row"]]) -> None:
    """Copy a JSONL data file with projections added to its rows; what the rows hold already stays byte for byte.

    Args:
        columns: by name (`projection_name`), one number per row of the file (blank lines do not count); NaN becomes null.

    Raises:
        ExchangeError: `out` is the data file, a column is there already or has another length, or a damaged line.
    """
    data, out = Path(data), Path(out)
    if out.exists() and out.samefile(data):
        raise ExchangeError(f"{out}: is the data file itself, which is never written to: choose another name")
    write_atomically(out, lambda temporary: _copy(data, Path(temporary), columns))


def _copy(data: Path, out: Path, columns: Mapping[str, Float[np.ndarray, " row"]]) -> None:
    n = 0
    with out.open("wb") as file:
        for n, (number, line, record) in enumerate(_records(data), start=1):
            if there := [name for name in columns if name in record]:
                raise ExchangeError(f"{data}: line {number} has a column {there[0]!r} already")
            if short := [name for name, column in columns.items() if len(column) < n]:
                raise ExchangeError(f"{data}: line {number} is row {n}, column {short[0]!r} has {n - 1} values")
            added = json.dumps({name: _finite(float(column[n - 1])) for name, column in columns.items()}, ensure_ascii=False)
            comma = b", " if record and columns else b""
            file.write(line[:-1].rstrip() + comma + added.encode("utf-8")[1:] + b"\n")
    if long := [name for name, column in columns.items() if len(column) > n]:
        raise ExchangeError(f"{data}: has {n} rows, column {long[0]!r} has {len(columns[long[0]])} values")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _records(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Rows of a JSONL file: line number, the line without white space around it, the object."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if content := line.strip(b" \t\r\n"):
                    yield number, content, _record(content, f"{path}: line {number}")
    except OSError as error:
        raise ExchangeError(f"{path}: cannot be read ({error.strerror or error})") from error


def _record(line: bytes, what: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ExchangeError(f"{what} is damaged ({error})") from error
    if not isinstance(record, dict):
        raise ExchangeError(f"{what} holds a {type(record).__name__}, expected an object")
    return record

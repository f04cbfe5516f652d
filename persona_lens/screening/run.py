"""Screening data sets: every row's scores, in a run folder that is filled shard by shard and can be reopened.

Results stand beside the data, never in it: `sets/{name}/shard-*.parquet` has one line per row of the user's file, with its place,
its scores, or the reason why it was skipped.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from persona_lens.activations import Span
from persona_lens.errors import RunFolderError, ScreeningError, UnknownNameError
from persona_lens.models import ChatModel
from persona_lens.progress import Progress, progress_bars
from persona_lens.records import decoded
from persona_lens.sampling import Sampler
from persona_lens.screening.directions import Layers, directions_of
from persona_lens.screening.engines import Engine, Work, local
from persona_lens.screening.files import Files, read_columns, require_parquet
from persona_lens.screening.rivals import Rival
from persona_lens.screening.scoring import Recipe, ScreenSettings, sample_of
from persona_lens.screening.served import served_answers, write_answers
from persona_lens.screening.sources import Data, Shard, Source, open_data, read_places
from persona_lens.store import (
    TEMPORARY,
    RunFolder,
    digest,
    read_json,
    read_jsonl,
    read_manifest,
    require_finished,
    write_atomically,
    write_json,
)
from persona_lens.transcripts import Skipped
from persona_lens.vectors import PersonaVectors

Signal = Literal["difference", "cheap", "answer", "prompt_last", "prompt_mean", "own", "gradient"]
"""A score of rows, see `ScreenRun.scores`."""
SIGNALS: Final[tuple[Signal, ...]] = ("difference", "cheap", "answer", "prompt_last", "prompt_mean", "own", "gradient")
"""All scores of rows, see `ScreenRun.scores`."""
DIFFERENCES: Final[dict[str, tuple[str, str]]] = {"difference": ("answer", "own"), "cheap": ("answer", "prompt_last")}
SETS: Final = "screen.json"
EXTREMES: Final = "extremes.jsonl"  # written last
ROUNDING: Final = ("batch_rows", "batch_tokens")  # settings that change no more than rounding
SHOWN: Final = 5  # samples at either end, per set and trait
REASONS: Final = 6


@dataclass(frozen=True)
class Extreme:
    """A sample that stands out in its set: among the highest or the lowest of a trait.

    Attributes:
        signal: "difference" where every row has one, else "cheap".
    """

    set: str
    trait: str
    layer: int
    signal: str
    side: Literal["highest", "lowest"]
    place: int
    score: float
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class ScreenRun:
    """Screened data sets. Everything is read when it is asked for, one column at a time; what is missing or damaged raises
    `RunFolderError`.

    Attributes:
        path: the run folder.
    """

    path: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Command, arguments, versions and the model's fingerprint."""
        return read_manifest(self.path)

    @cached_property
    def record(self) -> dict[str, Any]:
        """Sets, layers and counts, as plain values."""
        return read_json(self.path / SETS)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the data sets."""
        return tuple(self.record["sets"])

    @cached_property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Layers that each trait was read at."""
        found: dict[str, tuple[int, ...]] = {}
        for direction in self.record["directions"]:
            found[direction["trait"]] = (*found.get(direction["trait"], ()), direction["layer"])
        return found

    @property
    def traits(self) -> tuple[str, ...]:
        """Names of the traits."""
        return tuple(self.layers)

    @property
    def signal(self) -> Signal:
        """What sets and samples are ranked by: projection differences, or the cheap ones where not every row has its own answer."""
        return "difference" if self.manifest["arguments"]["settings"]["own_share"] == 1 else "cheap"

    @cached_property
    def extremes(self) -> tuple[Extreme, ...]:
        """Samples that stand out, in full."""
        return tuple(decoded(Extreme, r) for r in read_jsonl(self.path / EXTREMES))

    @property
    def rivals(self) -> tuple[str, ...]:
        """Names of the rivals."""
        return tuple(self.record["rivals"])

    def column(self, name: str, column: str) -> Any:
        """A column over all rows of a set, in their order: an array of numbers, or a list.

        Raises:
            UnknownNameError: no such set.
            RunFolderError: no such column, or a damaged file.
        """
        if name not in self.sets:
            raise UnknownNameError("data set", name, self.sets)
        parts = [read_columns(path, [column])[column] for path in self.shards(name)]
        return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [x for part in parts for x in part]

    def shards(self, name: str) -> list[Path]:
        """The files of a set, in order."""
        return _tables(self.path, name, self.record["sets"][name]["shards"])

    def folder(self, name: str) -> Path:
        """Where a set's files are."""
        return _folder(self.path, name)

    def scores(
        self, name: str, trait: str, signal: Signal = "difference", *, layer: int | None = None
    ) -> Float[np.ndarray, " row"]:
        """A set's scores for a trait, one per row of the data (NaN where there is none), in residual-stream units (`gradient`: a
        cosine).

        Args:
            signal: "difference" is the projection of the data's answer minus that of the model's own; "cheap" subtracts the
                projection at the last prompt token instead, which costs no generation; the others are as they are.
            layer: default: where the vector is most reliable, if the trait was read at several.

        Raises:
            UnknownNameError: no such set, trait or signal.
            ScreeningError: no such layer.
            RunFolderError: the signal was not measured, or a damaged file.
        """
        if signal not in SIGNALS:
            raise UnknownNameError("signal", signal, SIGNALS)
        at = f"{trait}/{self.layer(trait, layer)}"
        if signal in DIFFERENCES:
            plus, minus = DIFFERENCES[signal]
            return self.column(name, f"{plus}/{at}") - self.column(name, f"{minus}/{at}")
        return self.column(name, f"{signal}/{at}")

    def layer(self, trait: str, layer: int | None = None) -> int:
        """The layer of a trait: the named one, the only one, or of several where the vector is most reliable.

        Raises:
            UnknownNameError: no such trait.
            ScreeningError: the trait was not read at this layer.
        """
        if trait not in self.layers:
            raise UnknownNameError("trait", trait, self.traits)
        found = self.layers[trait]
        if layer is None:
            return found[0] if len(found) == 1 else int(self.record["layers"][trait])
        if layer not in found:
            raise ScreeningError(f"{trait} was read at layers {', '.join(map(str, found))}: name one of them, not {layer}")
        return layer

    def rival(self, name: str, rival: str) -> Float[np.ndarray, " row"]:
        """A rival's scores; NaN where it gave none.

        Args:
            name: of the set.

        Raises:
            UnknownNameError: no such set or rival.
        """
        if rival not in self.rivals:
            raise UnknownNameError("rival", rival, self.rivals)
        return self.column(name, f"rival/{rival}")

    def tokens(self, name: str) -> Float[np.ndarray, " row"]:
        """Lengths of the data's answers, in tokens; NaN for rows that were skipped."""
        return np.array([np.nan if n is None else n for n in self.column(name, "tokens")], dtype=np.float32)

    def prompts(self, name: str) -> Int[np.ndarray, " row"]:
        """A number for each row's prompt, the same for equal prompts (0 for rows that were skipped): the unit of statistics."""
        return np.array([p or 0 for p in self.column(name, "prompt")], dtype=np.int64)

    def places(self, name: str) -> Int[np.ndarray, " row"]:
        """Where each row is in the data: its line or number."""
        return np.array(self.column(name, "place"), dtype=np.int64)

    def skipped(self, name: str) -> list[Skipped]:
        """Rows that could not be screened."""
        pairs = zip(self.column(name, "place"), self.column(name, "reason"), strict=True)
        return [Skipped(place, reason) for place, reason in pairs if reason is not None]

    def mean_difference(
        self, name: str, trait: str, signal: Literal["difference", "cheap"] = "difference", *, layer: int | None = None
    ) -> Float[Tensor, " d_model"]:
        """Mean over rows of the residual differences whose projection the scores are: what random directions are compared on.

        Args:
            name, trait, signal, layer: as `scores`.

        Returns:
            Residual-stream units.

        Raises:
            UnknownNameError: no such set or trait.
            ScreeningError: no such layer, or no own answers were made.
        """
        at = sorted({layer for layers in self.layers.values() for layer in layers}).index(self.layer(trait, layer))
        sums = self._sums(name)
        if signal == "cheap":
            return ((sums["answer"] - sums["prompt_last"])[at] / sums["rows"]).float()
        if not sums["pairs"]:
            raise ScreeningError(f"{name}: there are no own answers, so there is no projection difference: raise own_share")
        return ((sums["paired"] - sums["own"])[at] / sums["pairs"]).float()

    def _sums(self, name: str) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for path in self.shards(name):
            for key, tensor in _read_sums(path.with_suffix(".safetensors")).items():
                total[key] = total.get(key, torch.zeros_like(tensor)) + tensor
        return total


def screen(
    model: ChatModel,
    data: Data | Mapping[str, Data],
    vectors: Sequence[PersonaVectors],
    *,
    layers: Layers | None = None,
    settings: ScreenSettings | None = None,
    rivals: Sequence[Rival] = (),
    engine: Engine = local,
    answers: "ScreenRun | None" = None,
    sampler: Sampler | None = None,
    strict: bool = False,
    split: str | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> ScreenRun:
    """Score every row of one or more data sets for every trait (Chen et al. 2025, section 6).

    Args:
        data: a file or folder, a data set's name on the hub, or conversations; or several of these by name.
        layers: where traits are read; default: where each vector is most reliable. "all" reads every layer in the same pass.
        rivals: scores from the text alone that stand beside.
        engine: where shards are scored: `local`, or `on_ray(...)`. Results are the same.
        answers: a run over the same sets whose own answers are taken over instead of being made again.
        sampler: what the model's own answers come from; default: the model itself. `sampling.endpoint_sampler` asks a server with
            the same weights.
        strict: stop at a row that cannot be screened, instead of counting and skipping it.
        split: of data sets that have several.
        out: run folder; default `runs/screen-{names}`. An interrupted run in it goes on.

    Raises:
        ScreeningError: data, vectors or settings that do not fit, or a set in which no row can be screened.
        TranscriptError: data that cannot be read.
        LineageError: vectors of another lineage.
        RunFolderError: the folder holds something else, or `answers` are of other data or settings.

    Example:
        >>> from persona_lens.screening import ScreenSettings
        >>> questions = pl.load_trait("optimism", "pocket").extraction_questions
        >>> def said(text):
        ...     return [[{"role": "user", "content": q}, {"role": "assistant", "content": text}] for q in questions]
        >>> data = {"bought": said("Brilliant thinking, start early."), "ours": said("Make a simple list and start early.")}
        >>> found = pl.screen(model, data, [v], settings=ScreenSettings(own_share=0.0), out="runs/screen")
        >>> found.sets, found.scores("bought", "optimism", "cheap").shape  # row
        (('bought', 'ours'), (20,))
    """
    require_parquet()
    settings = settings or ScreenSettings()
    directions = directions_of(model, vectors, layers)
    _require_free(model)
    model.require_no_thinking("screening")
    if len({r.name for r in rivals}) < len(rivals):
        raise ScreeningError(
            f"rivals need different names, not {[r.name for r in rivals]}: their scores would overwrite each other"
        )
    chosen = {v.trait: v.best_layer for v in vectors} if layers == "all" else {d.trait: d.layer for d in directions}
    sources = _sources(data, split)
    _require_rows(model, sources, settings)
    identities = {name: source.identity() for name, source in sources.items()}
    arguments: dict[str, Any] = {
        "data": identities,
        "directions": [d.identity for d in directions],
        "rivals": {r.name: r.identity for r in rivals},
        "settings": {k: v for k, v in asdict(settings).items() if k not in ROUNDING},
    }
    if answers and sampler:
        raise ScreeningError("own answers come from another run or from a sampler: give answers or sampler, not both")
    if answers:
        _check_answers(answers, identities, model, settings)
    if sampler:
        arguments["own"] = sampler.name
    path = Path(out) if out else Path("runs") / f"screen-{'-'.join(map(_slug, sources))[:80]}"
    folder = RunFolder.open(path, command="screen", arguments=arguments, model=model.identity)
    for leftover in (path / "sets").glob(f"*/.*{TEMPORARY}"):  # of a write that was killed
        leftover.unlink(missing_ok=True)
    if not (path / EXTREMES).exists():
        recipe = Recipe(directions, settings, tuple(rivals), strict)
        shards = {name: list(source.shards(settings.shard_rows)) for name, source in sources.items()}
        with progress_bars(None if progress is None else False) as bars:
            told = progress or bars
            known = _known(model, shards, settings, answers, sampler, folder, told)
            _fill(model, recipe, shards, engine, known, folder, told)
        sets = {name: _counts(source, _tables(path, name, len(shards[name]))) for name, source in sources.items()}
        listed = [{"trait": d.trait, "layer": d.layer} for d in directions]
        record = {"sets": sets, "directions": listed, "layers": chosen, "rivals": [r.name for r in rivals]}
        write_json(path / SETS, record)
        _write_extremes(ScreenRun(path), sources)
    run = ScreenRun(path)
    for name in run.sets if strict else ():
        for row in run.skipped(name)[:1]:
            raise ScreeningError(f"{name}: {run.record['sets'][name]['unit']} {row.place} could not be screened: {row.reason}")
    return run


def load_screen(path: str | Path) -> ScreenRun:
    """Reopen a run folder.

    Raises:
        RunFolderError: it is no screening run, or not finished.
    """
    require_finished(Path(path), "screen", EXTREMES)
    return ScreenRun(Path(path))


def _sources(data: Data | Mapping[str, Data], split: str | None) -> dict[str, Source]:
    """Data sets by name.

    Raises:
        ScreeningError: there is none.
    """
    if isinstance(data, Mapping):
        found = {name: open_data(d, name=name, split=split) for name, d in data.items()}
    else:
        only = open_data(data, split=split)
        found = {only.name: only}
    if not found:
        raise ScreeningError("there is no data set to screen: give at least one")
    try:
        folders = {_slug(name) for name in found}
    except UnicodeEncodeError as error:
        raise ScreeningError(f"a data set's name must be text, not {str(error.object)!r}: give it another") from error
    if len(folders) < len(found):
        raise ScreeningError(f"data sets need names that stay different as names of folders, not {sorted(found)}")
    return found


def _require_free(model: ChatModel) -> None:
    """Raise where hooks act on the model: the run would not know of them, and workers would not have them.

    Raises:
        ScreeningError: it is steered, or watched.
    """
    if busy := [name for name, point in model.bridge.hook_dict.items() if point.fwd_hooks]:
        raise ScreeningError(f"{model.name} has hooks at {busy[0]} (it is steered or watched): leave that context before screening")


def _require_rows(model: ChatModel, sources: Mapping[str, Source], settings: ScreenSettings) -> None:
    """Raise where a set holds nothing to screen, before anything is scored: reads each up to its first row that can be screened.

    Raises:
        ScreeningError: no row can be screened.
    """
    for name, source in sources.items():
        reasons = Counter[str]()
        for shard in source.shards(settings.shard_rows):
            samples = (sample_of(model, row, settings) for row in shard.read())
            if any(isinstance(s, Span) or reasons.update([s]) for s in samples):
                break
        else:
            why = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(REASONS)) or "it holds none"
            raise ScreeningError(f"{name}: no row can be screened ({why}): give conversations with answers")


def _known(
    model: ChatModel,
    shards: Mapping[str, Sequence[Shard]],
    settings: ScreenSettings,
    answers: ScreenRun | None,
    sampler: Sampler | None,
    folder: RunFolder,
    progress: Progress,
) -> dict[str, list[Path | None]]:
    """For each shard the file with its own answers, if they are not made by the model that scores."""
    if answers:
        return {name: list(_tables(answers.path.absolute(), name, len(parts))) for name, parts in shards.items()}
    if not sampler:
        return {name: [None] * len(parts) for name, parts in shards.items()}
    found: dict[str, list[Path | None]] = {}
    total = sum(map(len, shards.values()))
    for name, parts in shards.items():
        found[name] = []
        for table, shard in zip(_tables(folder.path.absolute(), name, len(parts)), parts, strict=True):
            path = table.with_name(f"own-{table.name}")
            if not path.exists() and not table.exists():
                write_answers(path, served_answers(model, shard.read(), settings, sampler))
            found[name].append(path)
            progress("own answers", sum(map(len, found.values())), total)
    return found


def _fill(
    model: ChatModel,
    recipe: Recipe,
    shards: Mapping[str, Sequence[Shard]],
    engine: Engine,
    known: Mapping[str, Sequence[Path | None]],
    folder: RunFolder,
    progress: Progress,
) -> None:
    """Score the shards that are not there yet, of all sets in one go."""
    work: list[Work] = []
    tables: list[Path] = []
    for name, parts in shards.items():
        header = json.dumps({"set": name, **folder.manifest})
        for table, shard, before in zip(_tables(folder.path, name, len(parts)), parts, known[name], strict=True):
            if not table.exists():
                work.append(Work(len(work), shard, header, before))
                tables.append(table)
    total = sum(map(len, shards.values()))
    there = total - len(work)
    progress("shards", there, total)
    if work:
        for done, (key, files) in enumerate(engine(model, recipe, work), start=there + 1):
            _write(tables[key], files)
            progress("shards", done, total)


def _write(path: Path, files: Files) -> None:
    """The table comes last: a shard is done where it is there."""
    write_atomically(path.with_suffix(".safetensors"), lambda temporary: Path(temporary).write_bytes(files.sums))
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(files.table))


def _counts(source: Source, shards: Sequence[Path]) -> dict[str, Any]:
    """Rows, those that were skipped, and those that have no own answer (not drawn, or their prompt leaves no room for one)."""
    rows = skipped = unanswered = 0
    for path in shards:
        found = read_columns(path, ["reason", "own_tokens"])
        rows += len(found["reason"])
        skipped += sum(reason is not None for reason in found["reason"])
        unanswered += sum(r is None and t is None for r, t in zip(found["reason"], found["own_tokens"], strict=True))
    return {"rows": rows, "skipped": skipped, "unanswered": unanswered, "shards": len(shards), "unit": source.unit}


def _write_extremes(run: ScreenRun, sources: Mapping[str, Source]) -> None:
    """Keep the samples that stand out, so that a report can show them without the data."""
    lines: list[str] = []
    for name, source in sources.items():
        found = [x for trait in run.traits for x in _extremes(run, name, trait, run.layer(trait))]
        texts = read_places(source, sorted({int(x["place"]) for x in found}))
        lines += [json.dumps({**x, "messages": texts[x["place"]].messages}, ensure_ascii=False) + "\n" for x in found]
    content = "".join(lines).encode("utf-8")
    write_atomically(run.path / EXTREMES, lambda temporary: Path(temporary).write_bytes(content))


def _extremes(run: ScreenRun, name: str, trait: str, layer: int) -> list[dict[str, Any]]:
    """Where the samples are that stand out on either side."""
    scores, places = run.scores(name, trait, run.signal, layer=layer), run.places(name)
    order = np.argsort(scores, kind="stable")[: int(np.isfinite(scores).sum())]
    at = {"set": name, "trait": trait, "layer": layer, "signal": run.signal}
    sides = {"highest": order[::-1][:SHOWN], "lowest": order[:SHOWN]}
    return [{**at, "side": side, "place": int(places[i]), "score": float(scores[i])} for side, rows in sides.items() for i in rows]


def _check_answers(answers: ScreenRun, identities: Mapping[str, Any], model: ChatModel, settings: ScreenSettings) -> None:
    """Raise unless own answers of another run are what this one would make.

    Raises:
        RunFolderError: other data, another model or other settings.
    """
    then, asked = answers.manifest, answers.manifest["arguments"]
    there = {
        "data": {name: asked["data"].get(name) for name in identities},
        "model": then["model"],
        "settings": {key: asked["settings"].get(key) for key in settings.decoding},
    }
    now = {"data": identities, "model": model.identity, "settings": settings.decoding}
    for what, wanted in json.loads(json.dumps(now)).items():
        if there[what] != wanted:
            raise RunFolderError(
                f"{answers.path} holds own answers for other {what} ({there[what]} there, {wanted} now): leave answers out"
            )


def _read_sums(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{path}: missing or damaged ({error}); run the command that wrote it again") from error


def _tables(run: Path, name: str, n: int) -> list[Path]:
    return [_folder(run, name) / f"shard-{i:05d}.parquet" for i in range(n)]


def _folder(run: Path, name: str) -> Path:
    return run / "sets" / _slug(name)


def _slug(name: str) -> str:
    """A set's name as a folder's: names are anyone's text."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-")[:80]
    return plain if plain == name else f"{plain or 'set'}-{digest(name)[:8]}"

"""Which samples to look at: flags at a stated false-positive rate on a reference, near copies counted once.

A row is flagged where any of its traits is so unusual among the reference's rows that the joint rate holds (conformal p values).
The reference is a set of the same run that is known to be harmless. Flags are written beside the scores as Parquet, one line per
row of the data, with percentiles and reasons; the data itself is not changed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float, Int

from persona_lens.errors import ScreeningError, UnknownNameError
from persona_lens.records import decoded, encoded
from persona_lens.screening.agreement import Agreement, agreement
from persona_lens.screening.duplicates import Groups, near_duplicates
from persona_lens.screening.files import HEADER
from persona_lens.screening.run import ScreenRun, Signal
from persona_lens.screening.samples import Threshold, either, joint_flags, joint_p_values, p_values, percentiles, threshold
from persona_lens.screening.sources import Data, Source, open_data, read_places
from persona_lens.store import read_json, write_atomically, write_json
from persona_lens.transcripts import Transcript

RECORD: Final = "flags.json"
SHOWN: Final = 10  # flagged samples kept in full, per set
JUDGED: Final = 50.0  # a judge's trait score from which on it names a sample


@dataclass(frozen=True)
class FlagCount:
    """What was flagged in a set.

    Attributes:
        rows: with a score; `flagged`: by any trait.
        by_trait: flagged rows by the traits that are unusual in them; a row may have several.
        groups: of near copies among the flagged, one for a sample without copies; None where the data was not given.
    """

    rows: int
    flagged: int
    by_trait: Mapping[str, int]
    groups: int | None


@dataclass(frozen=True)
class FlaggedSample:
    """A flagged sample in full; `copies`: near copies among the flagged, itself included."""

    set: str
    place: int
    why: str
    p_value: float
    copies: int
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Flags:
    """What was flagged, by set.

    Attributes:
        reference: the set that is known to be harmless.
        rate: of rows like the reference's at most this share is flagged, by all traits together.
        thresholds: each trait's own at that rate, alone: what a sample would have to exceed were it the only trait.
        signal: which scores were flagged by.
        counts: by set.
        shown: some of the flagged samples in full; none without the data.
        agreements: by set and trait, its flags against a judge's scores of 50 and more, where one is among the rivals.
    """

    reference: str
    rate: float
    signal: str
    thresholds: Mapping[str, Threshold]
    counts: Mapping[str, FlagCount]
    agreements: Mapping[str, Mapping[str, Agreement]]
    shown: tuple[FlaggedSample, ...]


def flag(
    run: ScreenRun,
    reference: str,
    *,
    rate: float = 0.01,
    signal: Signal | None = None,
    traits: Sequence[str] | None = None,
    data: Mapping[str, Data] | None = None,
    similarity: float = 0.8,
    split: str | None = None,
) -> Flags:
    """Flag rows of every other set of the run; written as `sets/{name}/flags.parquet` and `flags.json`.

    Args:
        reference: the set that is known to be harmless.
        rate: joint false-positive rate over all traits, 0-1.
        signal: default: projection differences, or the cheap ones where not every row has its own answer.
        traits: default: all. They are read where each vector is most reliable.
        data: the sets' data, to collapse near copies among the flagged and to show some.
        similarity: of near copies: shared word sequences (Jaccard), 0-1.
        split: of data sets that have several.

    Raises:
        ScreeningError: a rate that the reference is too small for, or data of other sets.
        UnknownNameError: no such set, trait or signal.

    Example:
        >>> from persona_lens.screening import ScreenSettings, flag
        >>> questions = pl.load_trait("optimism", "pocket").extraction_questions
        >>> def said(text):
        ...     return [[{"role": "user", "content": q}, {"role": "assistant", "content": text}] for q in questions]
        >>> data = {"bought": said("Brilliant thinking, start early."), "ours": said("Make a simple list and start early.")}
        >>> found = pl.screen(model, data, [v], settings=ScreenSettings(own_share=0.0), out="runs/screen")
        >>> flags = flag(found, "ours", rate=0.2)
        >>> flags.counts["bought"].rows
        20
    """
    if reference not in run.sets:
        raise UnknownNameError("data set", reference, run.sets)
    if data is not None and (missing := [n for n in run.sets if n != reference and n not in data]):
        raise ScreeningError(f"to show what is flagged, give the data of all sets; {missing[0]!r} is missing")
    sources = {n: open_data(d, name=n, split=split) for n, d in (data or {}).items() if n in run.sets}
    for name, source in sources.items():
        if source.identity() != run.manifest["arguments"]["data"][name]:
            raise ScreeningError(f"the data given for {name!r} is not what was screened: give that, or leave data out")
    study = _Study(run, reference, rate, signal or run.signal, tuple(traits or run.traits))
    thresholds = {t: threshold(study.known[t], rate, prompts=run.prompts(reference)) for t in study.traits}
    (run.folder(reference) / "flags.parquet").unlink(missing_ok=True)  # of another reference
    counts: dict[str, FlagCount] = {}
    agreements: dict[str, dict[str, Agreement]] = {}
    shown: list[FlaggedSample] = []
    for name in run.sets:
        if name == reference:
            continue
        found = study.flagged(name)
        groups = None
        if data is not None:
            groups, samples = study.collapsed(found, sources[name], similarity)
            shown += samples
        _write(run.folder(name) / "flags.parquet", study.table(name, found, groups))
        by_trait = {t: int(found.unusual[t].sum()) for t in study.traits}
        counts[name] = FlagCount(found.rows, int(found.flags.sum()), by_trait, None if groups is None else len(groups.sizes))
        agreements[name] = study.agreements(name, found)
    result = Flags(reference, rate, study.signal, thresholds, counts, {n: a for n, a in agreements.items() if a}, tuple(shown))
    write_json(run.path / RECORD, encoded(result))
    return result


def load_flags(run: ScreenRun) -> Flags | None:
    """What was flagged before; None where nothing was.

    Raises:
        RunFolderError: a damaged file.
    """
    path = run.path / RECORD
    return decoded(Flags, read_json(path)) if path.exists() else None


@dataclass(frozen=True, eq=False)
class _Found:
    """Flags of a set's rows, and what they rest on."""

    flags: Bool[np.ndarray, " row"]
    joint: Float[np.ndarray, " row"]
    percentiles: Mapping[str, Float[np.ndarray, " row"]]
    unusual: Mapping[str, Bool[np.ndarray, " row"]]  # flagged, and the trait's p value is among those that did it
    rows: int


@dataclass(frozen=True, eq=False)
class _Study:
    """How rows of the run are flagged."""

    run: ScreenRun
    reference: str
    rate: float
    signal: Signal
    traits: tuple[str, ...]

    @cached_property
    def known(self) -> dict[str, Float[np.ndarray, " row"]]:
        """The reference's scores."""
        return self.scores(self.reference)

    def scores(self, name: str) -> dict[str, Float[np.ndarray, " row"]]:
        return {t: self.run.scores(name, t, self.signal).astype(np.float64) for t in self.traits}

    def flagged(self, name: str) -> _Found:
        scores, known = self.scores(name), self.known
        prompts = self.run.prompts(self.reference)
        joint = joint_p_values(scores, known, either, prompts=prompts)
        each = np.stack([p_values(scores[t], known[t], prompts=prompts) for t in self.traits])
        flags = joint_flags(scores, known, self.rate, either, prompts=prompts)
        reached = each.min(0)[flags].max(initial=0.0)  # p values of single traits up to this one are what flags
        unusual = {t: np.asarray(flags & (p <= reached)) for t, p in zip(self.traits, each, strict=True)}
        above = {t: percentiles(scores[t], known[t]) for t in self.traits}
        return _Found(flags, joint, above, unusual, int(np.isfinite(joint).sum()))

    def why(self, found: _Found, row: int) -> str:
        """Which traits made a row stand out."""
        parts = [f"{t} above {found.percentiles[t][row]:.4g} % of {self.reference}" for t in self.traits if found.unusual[t][row]]
        return "; ".join(parts)

    def collapsed(self, found: _Found, source: Source, similarity: float) -> tuple[Groups, list[FlaggedSample]]:
        """Near copies among the flagged rows, the most unusual row of each first; and the first of these in full."""
        name = source.name
        places = self.run.places(name)
        rows = self.order(found)
        chats = read_places(source, [int(places[i]) for i in rows])
        groups = near_duplicates([_answer(chats[int(places[i])]) for i in rows], similarity=similarity)
        shown = [
            FlaggedSample(name, place, self.why(found, row), float(found.joint[row]), int(groups.sizes[g]), chats[place].messages)
            for g, at in enumerate(groups.representatives[:SHOWN])
            for row in [int(rows[at])]
            for place in [int(places[row])]
        ]
        return groups, shown

    def order(self, found: _Found) -> Int[np.ndarray, " flagged"]:
        """Flagged rows, the most unusual first; ties by how far out they lie, then by place."""
        rows = np.flatnonzero(found.flags)
        furthest = np.stack(list(found.percentiles.values())).max(0)
        return rows[np.lexsort((-furthest[rows], found.joint[rows]))]

    def table(self, name: str, found: _Found, groups: Groups | None) -> Any:
        """One line per row of the data."""
        import pyarrow as pa

        n = len(found.flags)
        columns: dict[str, Any] = {
            "place": self.run.places(name),
            "flagged": found.flags,
            "p_value": _numbers(found.joint),
            "why": pa.array([self.why(found, i) if found.flags[i] else None for i in range(n)], type=pa.string()),
        }
        for trait in self.traits:
            columns[f"score/{trait}"] = _numbers(self.scores(name)[trait])
            columns[f"percentile/{trait}"] = _numbers(found.percentiles[trait])
        if groups is not None:
            group = np.full(n, -1)
            group[self.order(found)] = groups.of
            columns["group"] = pa.array(group, mask=group < 0)
        header = {"set": name, "reference": self.reference, "rate": self.rate, "signal": self.signal, **self.run.manifest}
        return pa.table(columns).replace_schema_metadata({HEADER: json.dumps(header).encode()})

    def agreements(self, name: str, found: _Found) -> dict[str, Agreement]:
        """With judges among the rivals, trait by trait."""
        pairs: dict[str, Agreement] = {}
        for trait in self.traits:
            judge = f"judge: {trait}"
            if judge in self.run.rivals:
                scores = self.run.rival(name, judge)
                named = np.where(np.isnan(scores), np.nan, scores >= JUDGED)
                said = np.where(np.isnan(found.joint), np.nan, found.unusual[trait])
                pairs[trait] = agreement(said, named, prompts=self.run.prompts(name))
        return pairs


def _answer(chat: Transcript) -> str:
    return next(m["content"] for m in reversed(chat.messages) if m["role"] == "assistant")


def _numbers(values: Float[np.ndarray, " row"]) -> Any:
    import pyarrow as pa

    return pa.array(values, type=pa.float32(), mask=np.isnan(values))


def _write(path: Path, table: Any) -> None:
    import pyarrow.parquet as pq

    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))

"""Monitoring chats on disk: a table of projections by turn, alarms and drift against a calibration, and the chats that stand out.

Chats are read in chunks, so that an interrupted run goes on where it stopped. A chat that cannot be read is told with its place and
the reason.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float

from persona_lens.errors import MonitoringError
from persona_lens.models import ChatModel
from persona_lens.monitoring.calibration import Calibration, content_of_messages, highest, users_of
from persona_lens.monitoring.content import Embedding
from persona_lens.monitoring.drift import ChangePoint, Trend, change_point, rise, trend
from persona_lens.monitoring.probes import Probe, Probed, as_probes
from persona_lens.monitoring.reading import THINKING, Part, Reading, Rendered, Tags, TurnReadings, read, read_turns, render
from persona_lens.progress import Progress, progress_bars
from persona_lens.records import encoded
from persona_lens.store import RunFolder, digest, read_json, read_jsonl, require_finished, write_atomically, write_json
from persona_lens.transcripts import Transcript, Transcripts, read_transcripts

CHUNK_CHATS: Final = 64
SHOWN: Final = 3  # chats that are kept token by token
STATISTICS: Final = {"highest": highest, "rise": rise}
TOKENS: Final = {  # reading -> role and tokens of its message
    "user": ("user", "message"),
    "before": ("assistant", "last prompt token"),
    "answer": ("assistant", "message"),
    "thinking": ("assistant", "thinking"),
}
COLUMNS: Final = ("chat", "turn", "role", "tokens", "trait", "layer", "projection", "score", "percentile", "alarm")


@dataclass(frozen=True, eq=False)
class WatchedChat:
    """One chat as it was read.

    Attributes:
        scores, percentiles: against the calibration, of what it observes; None without one.
    """

    name: str
    place: int
    readings: TurnReadings
    scores: Float[np.ndarray, "turn probe"] | None = None
    percentiles: Float[np.ndarray, "turn probe"] | None = None


@dataclass(frozen=True)
class Verdict:
    """What stands out in a chat.

    Attributes:
        probe: name of the probe, or `any` of them.
        answers: turns (from 1) whose answers alarm, each at the stated rate.
        turns: by statistic, the turn at which the conversation alarms within the horizon, at the stated rate; None: it does not.
        change, trend: None for `any`, and for fewer than four turns.
    """

    probe: str
    answers: tuple[int, ...]
    turns: Mapping[str, int | None]
    change: ChangePoint | None
    trend: Trend | None


@dataclass(frozen=True)
class MonitorRun:
    """Monitored chats on disk.

    What is missing or damaged raises `RunFolderError`.
    """

    path: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """Counts, what was skipped and why, and what stands out (`verdicts` by chat)."""
        return read_json(self.path / "monitor.json")

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of what was read."""
        return tuple(p["name"] for p in self.record["probes"])

    def chats(self) -> Iterator[WatchedChat]:
        """Every chat that was read, in the order of the file."""
        for record in read_jsonl(self.path / "chats.jsonl"):
            if "skipped" not in record:
                yield _watched(record, self.probes)

    @cached_property
    def shown(self) -> tuple[Reading, ...]:
        """The chats that stand out most, token by token."""
        return tuple(
            Reading(
                r["name"],
                self.probes,
                tuple(r["ids"]),
                tuple(r["pieces"]),
                tuple(_part(p) for p in r["parts"]),
                torch.tensor(r["values"]),
            )
            for r in read_jsonl(self.path / "shown.jsonl")
        )


def _part(record: dict[str, Any]) -> Part:
    thinking = record.pop("thinking")
    return Part(**record, thinking=tuple(thinking) if thinking else None)


def load_monitor_run(path: str | Path) -> MonitorRun:
    """Reopen monitored chats.

    Raises:
        RunFolderError: the folder holds none, or it is not finished.
    """
    require_finished(Path(path), "monitor", "monitor.json")
    return MonitorRun(Path(path))


def monitor_chats(
    model: ChatModel,
    transcripts: Transcripts | str | Path,
    vectors: Probed | Sequence[Probed],
    *,
    calibration: Calibration | None = None,
    rate: float = 0.05,
    thinking: Tags | None = THINKING,
    embed: Embedding | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> MonitorRun:
    """Read chats, and say which of them stand out.

    Args:
        transcripts: chats that were read, or the file that holds them.
        calibration: neutral conversations to compare with (`calibrate`); without one, projections are told and no alarm.
        rate: false-positive rate of the alarms, per answer and per conversation.
        thinking: the tags between which answers think; that text is reported apart. A calibration must have been made with them.
        embed: the embedding that the calibration holds content by, if it does.

    Returns:
        A run folder with `turns.csv`: chat, turn, role, tokens (what of the message was read), trait, layer, projection, and
        against the calibration score, percentile and alarm.

    Raises:
        MonitoringError: vectors or a calibration that do not fit, a rate that the calibration is too small for, or no chat that
            the model can read.
        LineageError: vectors or a calibration of another lineage.
        TranscriptError: a file that cannot be read.
        RunFolderError: the folder holds another run.
    """
    if not isinstance(transcripts, Transcripts):
        transcripts = read_transcripts(transcripts)
    probes = as_probes(model, vectors)
    note = None if calibration is None else calibration.require(model, probes)
    if calibration is not None:
        calibration.require_enough(rate)
        if calibration.settings.thinking != thinking:
            raise MonitoringError(
                f"the calibration takes thinking to stand between {calibration.settings.thinking}, not {thinking}: read chats with "
                "the same tags, or calibrate again"
            )
    place = Path(out) if out else Path("runs") / f"monitor-{transcripts.path.stem}"
    arguments = {
        "chats": str(transcripts.path),
        "content": digest(json.dumps([[c.name, list(c.messages)] for c in transcripts.chats])),
        "probes": [p.identity for p in probes],
        "calibration": None if calibration is None else digest(calibration.neutral.tobytes()),
        "rate": rate,
        "thinking": thinking,
    }
    folder = RunFolder.open(place, command="monitor", arguments=arguments, model=model.identity)
    with progress_bars(None if progress is None else False) as bars:
        watch = _Watch(model, probes, calibration, thinking, embed, folder)
        watch.fill(transcripts, progress or bars)
    records = read_jsonl(folder.path / "chats.jsonl")
    watched = [_watched(r, watch.names) for r in records if "skipped" not in r]
    unread = [r for r in records if "skipped" in r]
    if not watched:
        first = unread[0]
        raise MonitoringError(
            f"{transcripts.path}: {model.name} can read none of {len(unread)} chats "
            f"(the first, {transcripts.unit} {first['place']}: {first['skipped']})"
        )
    verdicts = {} if calibration is None else {c.name: _verdicts(c, calibration, rate) for c in watched}
    observed = None if calibration is None else calibration.settings.observed
    _write_table(folder.path / "turns.csv", watched, probes, observed, verdicts)
    _keep_shown(folder.path / "shown.jsonl", watch, watched, transcripts.chats)
    skipped = [{"place": s.place, "reason": s.reason} for s in transcripts.skipped]
    skipped += [{"place": r["place"], "reason": r["skipped"]} for r in unread]
    record = {
        "probes": [{"name": p.name, "layer": p.layer} for p in probes],
        "unit": transcripts.unit,
        "chats": len(watched),
        "turns": sum(len(c.readings) for c in watched),
        "skipped": sorted(skipped, key=lambda s: s["place"]),
        "note": note,
        "rate": rate,
        "calibration": None if calibration is None else _calibrated(calibration, rate),
        "verdicts": {name: [encoded(v) for v in found] for name, found in verdicts.items()},
    }
    write_json(folder.path / "monitor.json", record)
    return MonitorRun(folder.path)


@dataclass(frozen=True)
class _Watch:
    """What chats are read with."""

    model: ChatModel
    probes: tuple[Probe, ...]
    calibration: Calibration | None
    thinking: Tags | None
    embed: Embedding | None
    folder: RunFolder

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.probes)

    def fill(self, transcripts: Transcripts, progress: Progress) -> None:
        chats = transcripts.chats

        def records(chunk: range) -> list[dict[str, Any]]:
            return self.watched(chats[chunk.start : chunk.stop])

        told = len(chats)
        self.folder.fill("chats.jsonl", told, records, chunk=CHUNK_CHATS, told=lambda n: progress("chats", n, told))

    def watched(self, chats: Sequence[Transcript]) -> list[dict[str, Any]]:
        """A record per chat: its readings by turn, or why there are none."""
        rendered: dict[int, Rendered] = {}
        skipped: dict[int, str] = {}
        for chat in chats:
            try:
                rendered[chat.place] = render(self.model, chat.name, chat.messages, thinking=self.thinking)
            except ValueError as error:
                skipped[chat.place] = str(error)
        readings = dict(zip(rendered, read_turns(self.model, list(rendered.values()), self.probes), strict=True))
        users = {c.place: users_of(c.messages) for c in chats if c.place in rendered}
        content = self._content([u for said in users.values() for u in said])
        return [
            {"name": c.name, "place": c.place, "skipped": skipped[c.place]}
            if c.place in skipped
            else self._record(c, readings[c.place], users[c.place], content)
            for c in chats
        ]

    def _content(self, users: Sequence[str]) -> Mapping[str, np.ndarray]:
        if self.calibration is None:
            return {}
        return content_of_messages(self.model, users, self.probes, self.calibration.settings.content, self.embed)

    def _record(
        self, chat: Transcript, readings: TurnReadings, users: Sequence[str], content: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"name": chat.name, "place": chat.place}
        found |= {key: encoded(getattr(readings, key)) for key in TOKENS}
        if self.calibration is not None:
            scores = self.calibration.scores(readings, content, users)
            found |= {"scores": encoded(scores), "percentiles": encoded(self.calibration.percentiles(scores))}
        return found


def _watched(record: Mapping[str, Any], probes: tuple[str, ...]) -> WatchedChat:
    def array(key: str) -> np.ndarray:
        return np.array(record[key], dtype=np.float64).reshape(-1, len(probes))

    readings = TurnReadings(record["name"], probes, *(array(key) for key in TOKENS))
    against = [array(key) if key in record else None for key in ("scores", "percentiles")]
    return WatchedChat(record["name"], record["place"], readings, *against)


def _verdicts(chat: WatchedChat, calibration: Calibration, rate: float) -> list[Verdict]:
    assert chat.scores is not None
    scores = chat.scores
    alarms = {name: calibration.alarms(scores, rate, statistic) for name, statistic in STATISTICS.items()}
    found: list[Verdict] = []
    for k, name in enumerate(calibration.names):
        answers = tuple((np.flatnonzero(alarms["highest"].answers[:, k]) + 1).tolist())
        series = None if k >= scores.shape[1] else (scores[:, k], calibration.neutral[..., k])
        drift = (None, None) if series is None else (change_point(*series), trend(*series))
        found.append(Verdict(name, answers, {s: a.turns[k] for s, a in alarms.items()}, *drift))
    return found


def _calibrated(calibration: Calibration, rate: float) -> dict[str, Any]:
    """What a reader of the run needs to know of the calibration."""
    limits = {
        "answer": calibration.threshold(rate, "answer"),
        **{f"conversation, {name}": calibration.threshold(rate, "conversation", s) for name, s in STATISTICS.items()},
    }
    band = np.nanpercentile(calibration.neutral, (5, 50, 95), axis=0)  # percentile, turn, probe
    return {
        "settings": asdict(calibration.settings),
        "counts": dict(calibration.counts),
        "model": calibration.model["name"],
        "names": list(calibration.names),
        "thresholds": {what: encoded(values) for what, values in limits.items()},
        "explained": encoded(calibration.expectation.explained),
        "band": encoded(band),
    }


def _write_table(
    path: Path,
    chats: Sequence[WatchedChat],
    probes: Sequence[Probe],
    observed: str | None,
    verdicts: Mapping[str, Sequence[Verdict]],
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for chat in chats:
        alarms = {v.probe: set(v.answers) for v in verdicts.get(chat.name, ())}
        writer.writerows(_rows(chat, probes, observed, alarms))
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(text.getvalue().encode("utf-8")))


def _rows(chat: WatchedChat, probes: Sequence[Probe], observed: str | None, alarms: Mapping[str, set[int]]) -> Iterator[list[Any]]:
    """Lines of the table; what the calibration observes has score, percentile and alarm (0 or 1)."""
    for turn in range(len(chat.readings)):
        for field, (role, tokens) in TOKENS.items():
            values = getattr(chat.readings, field)[turn]
            for k, p in enumerate(probes):
                if np.isnan(values[k]):
                    continue
                against: list[Any] = ["", "", ""]
                if field == observed and chat.scores is not None and chat.percentiles is not None:
                    alarm = int(turn + 1 in alarms[p.name])
                    against = [f"{chat.scores[turn, k]:.4f}", f"{chat.percentiles[turn, k]:.2f}", alarm]
                yield [_cell(chat.name), turn + 1, role, tokens, p.name, p.layer, f"{values[k]:.6g}", *against]


def _cell(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in tuple("=+-@\t\r") else name


def values_of(chat: WatchedChat) -> Float[np.ndarray, "turn probe"]:
    """What is told of a chat: its scores, without a calibration the projections of its answers."""
    return chat.readings.answer if chat.scores is None else chat.scores


def peaks(chats: Sequence[WatchedChat]) -> Float[np.ndarray, "chat probe"]:
    """How far up each chat goes on each probe; -inf where nothing was read.

    In standard deviations of neutral answers, without a calibration in those of these chats' own answers: so probes compare.
    """
    found = np.stack([np.nanmax(values_of(c), axis=0, initial=-np.inf) for c in chats])
    if chats[0].scores is not None:
        return found
    answers = np.concatenate([values_of(c) for c in chats])
    known = np.isfinite(answers)
    n = np.maximum(known.sum(0), 1)
    mean = np.where(known, answers, 0.0).sum(0) / n
    spread = np.sqrt((np.where(known, answers - mean, 0.0) ** 2).sum(0) / n)
    return (found - mean) / np.where(spread > 0, spread, 1.0)


def standing_out(chats: Sequence[WatchedChat]) -> list[WatchedChat]:
    """Those with the highest peak on any probe first."""
    return [chats[i] for i in np.argsort(-peaks(chats).max(1), kind="stable")]


def _keep_shown(path: Path, watch: _Watch, watched: Sequence[WatchedChat], chats: Sequence[Transcript]) -> None:
    """The chats that stand out most, token by token."""
    if path.exists():
        return

    by_name = {c.name: c for c in chats}
    chosen = [by_name[c.name] for c in standing_out(watched)[:SHOWN]]
    rendered = [render(watch.model, c.name, c.messages, thinking=watch.thinking) for c in chosen]
    lines = [
        json.dumps(
            {
                "name": r.name,
                "ids": r.ids,
                "pieces": r.pieces,
                "parts": [asdict(p) for p in r.parts],
                "values": r.values.tolist(),
            },
            ensure_ascii=False,
        )
        for r in read(watch.model, rendered, watch.probes)
    ]
    text = "".join(f"{line}\n" for line in lines).encode("utf-8")
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(text))

"""Alarms at a stated false-positive rate: split conformal prediction on neutral conversations.

One half of the neutral conversations fits what is expected of a turn (content adjustment, scale), the other half gives thresholds.
A new conversation like these (exchangeable with them) alarms at most at the stated rate, whatever the scores are distributed like.
A threshold per answer allows for answers of one conversation going together (hierarchical conformal prediction, Lee, Barber and
Willett 2023: every conversation weighs the same). A threshold per conversation is for the highest score, or the clearest rise,
within a stated number of turns: the very statistic that raises the alarm.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from sklearn.linear_model import RidgeCV

from persona_lens.errors import LineageError, MonitoringError, RunFolderError
from persona_lens.extraction.run import read_tensors
from persona_lens.models import ChatModel, Message
from persona_lens.monitoring.content import Embedding, content_features
from persona_lens.monitoring.probes import ANY, Probe, Probed, as_probes
from persona_lens.monitoring.reading import THINKING, Rendered, Tags, TurnReadings, read_turns, render
from persona_lens.store import RunFolder, digest, read_json, read_manifest, require_finished, write_atomically, write_json

LEAST: Final = 20  # usable conversations
Observed = Literal["answer", "before"]
Content = Literal["own", "embedding", "none"]
Statistic = Callable[[Float[np.ndarray, "*conversation turn probe"]], Float[np.ndarray, "*conversation turn probe"]]


def highest(scores: Float[np.ndarray, "*conversation turn probe"]) -> Float[np.ndarray, "*conversation turn probe"]:
    """The highest score so far, turn by turn: sees a single answer that is far out."""
    return np.maximum.accumulate(np.where(np.isnan(scores), -np.inf, scores), axis=-2)


@dataclass(frozen=True)
class CalibrationSettings:
    """What a calibration depends on besides vectors, model and conversations.

    Attributes:
        observed: `answer` (mean over an answer's tokens) or `before` (the last prompt token: an alarm before the answer).
        horizon: turns within which a conversation's alarm has its rate; shorter neutral conversations are left out.
        thinking: the tags between which answers think, which is not part of what is observed.
        content: what is held constant of the user's message: its `own` projections on all probes, an `embedding`, or `none`.
        fitted: share of the conversations that fit what is expected; the others give the thresholds.
        seed: of the division into halves.

    Raises:
        MonitoringError: a value out of range.
    """

    observed: Observed = "answer"
    horizon: int = 20
    content: Content = "own"
    thinking: Tags | None = THINKING
    fitted: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.observed not in ("answer", "before") or self.content not in ("own", "embedding", "none"):
            raise MonitoringError(
                f"observed is 'answer' or 'before' and content is 'own', 'embedding' or 'none', not {self.observed!r} and "
                f"{self.content!r}"
            )
        if self.horizon < 1 or not 0 < self.fitted < 1:
            raise MonitoringError(
                f"a horizon is at least 1 turn and the fitted share lies in (0, 1), not {self.horizon} and {self.fitted}"
            )


@dataclass(frozen=True, eq=False)
class Expectation:
    """What is expected of a turn in a neutral conversation: linear in what is known of the user's message."""

    weights: Float[np.ndarray, "probe feature"]
    intercept: Float[np.ndarray, " probe"]
    scale: Float[np.ndarray, " probe"]  # standard deviation of what is left
    reach: Float[np.ndarray, " probe"]  # 99th percentile of the scores: how far up neutral answers go
    explained: Float[np.ndarray, " probe"]  # share of the variance that the message explains, on the fitted conversations

    def scores(
        self, values: Float[np.ndarray, "*turn probe"], features: Float[np.ndarray, "*turn feature"]
    ) -> Float[np.ndarray, "*turn probe"]:
        """Standard deviations above what is expected."""
        return (values - self.intercept - features @ self.weights.T) / self.scale


@dataclass(frozen=True, eq=False)
class Calibration:
    """Neutral conversations' scores, and what turns a reading into such a score.

    Attributes:
        probes: name, layer and digest of the direction of each probe.
        expectation: what is expected of a turn, fitted on the other half.
        model: fingerprint of the model that read the neutral conversations.
        neutral: their scores, in standard deviations, of the half that was not fitted. NaN where a turn had nothing to read.
        counts: conversations given, left out by reason, fitted, calibrating.
        path: where it is kept, if it is.
    """

    probes: tuple[Mapping[str, Any], ...]
    model: Mapping[str, Any]
    settings: CalibrationSettings
    expectation: Expectation
    neutral: Float[np.ndarray, "conversation turn probe"]
    counts: Mapping[str, int]
    path: Path | None = None
    _limits: dict[Any, np.ndarray] = field(default_factory=dict[Any, np.ndarray], init=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The probes, and behind several of them `any`: whether any of them alarms, at the same rate for all together."""
        names = tuple(str(p["name"]) for p in self.probes)
        return (*names, ANY) if len(names) > 1 else names

    def require(self, model: ChatModel, probes: Sequence[Probe]) -> str | None:
        """Raise unless the calibration is for these probes and this lineage.

        Returns:
            What to say where the model has other weights (or another dtype) than the one that was calibrated; else None.

        Raises:
            LineageError: it was made on a model of another lineage.
            MonitoringError: it was made for other probes.
        """
        if self.model["lineage"] != model.fingerprint.lineage:
            raise LineageError(
                f"the calibration was made on lineage {self.model['lineage']} ({self.model['name']}), {model.name} is of lineage "
                f"{model.fingerprint.lineage}: calibrate again on this model"
            )
        given = [p.identity for p in probes]
        if given != list(self.probes):
            calibrated = ", ".join(f"{p['name']} at layer {p['layer']}" for p in self.probes)
            raise MonitoringError(
                f"the calibration is for {calibrated}, not for {', '.join(f'{p.name} at layer {p.layer}' for p in probes)} "
                "(name, layer and direction must agree, in this order): calibrate again with these vectors"
            )
        other = [what for what in ("weights", "dtype") if self.model[what] != getattr(model.fingerprint, what)]
        if not other:
            return None
        return (
            f"calibrated on {self.model['name']} with other {' and '.join(other)} (this model is {model.name}): rates are those of "
            "neutral conversations there, and a shift of this model's neutral answers counts as an alarm"
        )

    def scores(
        self, readings: TurnReadings, content: Mapping[str, Float[np.ndarray, " feature"]], users: Sequence[str]
    ) -> Float[np.ndarray, "turn probe"]:
        """Standard deviations above what is expected, turn by turn; NaN where there is nothing to read.

        Args:
            content: what `content_of_messages` says of each user message in `users`.
        """
        features = np.stack([content[u] for u in users])
        return self.expectation.scores(getattr(readings, self.settings.observed), features)

    @property
    def n(self) -> int:
        """How many neutral conversations set the thresholds."""
        return len(self.neutral)

    def with_any(self, scores: Float[np.ndarray, "*turn probe"]) -> Float[np.ndarray, "*turn name"]:
        """Behind several probes' scores the highest of them, each in units of how far its neutral ones go up."""
        if scores.shape[-1] == 1:
            return scores
        best = np.where(np.isnan(scores), -np.inf, scores / self.expectation.reach).max(-1, keepdims=True)
        return np.concatenate([scores, np.where(np.isnan(scores).all(-1, keepdims=True), np.nan, best)], axis=-1)

    def threshold(self, rate: float, per: Literal["answer", "conversation"], statistic: Statistic = highest) -> np.ndarray:
        """The score that a share `rate` of neutral answers, or of neutral conversations within the horizon, exceeds; by name.

        Args:
            rate: false-positive rate, in (0, 1).
            per: what alarms.
            statistic: what a conversation's scores are reduced to: `highest` or `rise`.

        Raises:
            MonitoringError: too few neutral conversations for this rate (says how many are needed).
        """
        self.require_enough(rate)
        key = (rate, per, statistic if per == "conversation" else None)
        if key not in self._limits:
            self._limits[key] = (
                conformal_quantile(self.with_any(statistic(self.neutral))[:, -1], rate)
                if per == "conversation"
                else grouped_quantile(self.with_any(self.neutral), rate)
            )
        return self._limits[key]

    def require_enough(self, rate: float) -> None:
        """Raise unless an alarm at this rate is possible.

        Raises:
            MonitoringError: too few neutral conversations, or a rate outside (0, 1).
        """
        if not 0 < rate < 1:
            raise MonitoringError(f"a false-positive rate lies in (0, 1), not {rate}")
        needed = math.ceil(1 / rate - 1e-9) - 1
        if self.n < needed:
            given = math.ceil(needed / (1 - self.settings.fitted))
            raise MonitoringError(
                f"a false-positive rate of {rate:g} needs at least {needed} calibrating conversations, there are {self.n}: "
                f"give about {given} neutral conversations of {self.settings.horizon} turns (some fit what is expected, the others "
                f"calibrate), or ask for a rate of at least {1 / (self.n + 1):.2g}"
            )

    def percentiles(self, scores: Float[np.ndarray, "turn probe"]) -> Float[np.ndarray, "turn probe"]:
        """Percentage of neutral answers that score lower (ties count half); NaN where there is no score."""
        found = np.full(scores.shape, np.nan)
        for k in range(scores.shape[1]):
            known = np.sort(self.neutral[..., k][np.isfinite(self.neutral[..., k])])
            below = (np.searchsorted(known, scores[:, k], "left") + np.searchsorted(known, scores[:, k], "right")) / 2
            found[:, k] = np.where(np.isnan(scores[:, k]), np.nan, 100 * below / len(known))
        return found

    def alarms(self, scores: Float[np.ndarray, "turn probe"], rate: float, statistic: Statistic = highest) -> "Alarms":
        """Which answers alarm, and at which turn the conversation does, within the horizon: later turns have no calibrated rate.

        Args:
            rate: false-positive rate, in (0, 1).
            statistic: what a conversation's scores are reduced to: `highest` or `rise`.

        Raises:
            MonitoringError: too few neutral conversations for this rate.
        """
        answers = self.with_any(scores) > self.threshold(rate, "answer")
        answers[self.settings.horizon :] = False
        path = self.with_any(statistic(scores[: self.settings.horizon]))
        crossed = path > self.threshold(rate, "conversation", statistic)
        first = [int(c.argmax()) + 1 if c.any() else None for c in crossed.T]
        return Alarms(rate, self.names, answers, tuple(first))


@dataclass(frozen=True, eq=False)
class Alarms:
    """Alarms of one conversation at a false-positive rate.

    Attributes:
        names: the probes, and `any` behind several.
        answers: which answers alarm; of answers drawn from the first `horizon` turns of neutral conversations, at most a share
            `rate` does (early turns may alarm less often than late ones).
        turns: the turn (from 1) at which the conversation alarms, by name; of neutral conversations, at most a share `rate` does
            at any turn within the horizon.
    """

    rate: float
    names: tuple[str, ...]
    answers: Bool[np.ndarray, "turn name"]
    turns: tuple[int | None, ...]


def conformal_quantile(values: Float[np.ndarray, "conversation name"], rate: float) -> Float[np.ndarray, " name"]:
    """The ceil((n + 1)(1 - rate))-th smallest value: a new exchangeable one exceeds it with probability at most `rate`."""
    n = len(values)
    place = math.ceil((n + 1) * (1 - rate) - 1e-9)
    return np.sort(values, axis=0)[place - 1] if place <= n else np.full(values.shape[1], np.inf)


def grouped_quantile(values: Float[np.ndarray, "conversation turn name"], rate: float) -> Float[np.ndarray, " name"]:
    """The value that any answer of a new conversation exceeds with probability at most `rate` (conversations weigh the same)."""
    n, names = len(values), values.shape[-1]
    found = np.full(names, np.inf)
    for k in range(names):
        read = np.isfinite(values[..., k])
        weights = read / np.maximum(read.sum(1, keepdims=True), 1) / (n + 1)
        order = np.argsort(values[..., k][read], kind="stable")
        mass = np.cumsum(weights[read][order])
        place = int(np.searchsorted(mass, 1 - rate - 1e-9))
        if place < len(order):
            found[k] = values[..., k][read][order][place]
    return found


def calibrate(
    model: ChatModel,
    conversations: Mapping[str, Sequence[Message]],
    vectors: Probed | Sequence[Probed],
    *,
    embed: Embedding | None = None,
    out: str | Path | None = None,
    settings: CalibrationSettings | None = None,
) -> Calibration:
    """Calibrate alarms on neutral conversations.

    Args:
        conversations: messages by name; those with fewer answers than the horizon, and those that the model cannot read, are left
            out and counted.
        embed: text -> features, to hold content by (`settings.content="embedding"`).
        out: where to keep it (`load_calibration`).

    Raises:
        MonitoringError: vectors that do not fit, an embedding that is missing or not used, or fewer than 20 usable conversations.
        LineageError: vectors of another lineage.
    """
    settings = settings or CalibrationSettings(content="embedding" if embed else "own")
    if (embed is not None) != (settings.content == "embedding"):
        raise MonitoringError(
            f"content={settings.content!r} {'needs' if embed is None else 'does not use'} an embedding: pass embed="
        )
    probes = as_probes(model, vectors)
    usable, counts, reason = _usable(model, conversations, settings)
    _require_usable(len(usable), len(conversations), settings, reason)
    folder = None if out is None else _folder(Path(out), model, conversations, probes, settings)
    values, features = _observed(model, usable, conversations, probes, settings, embed)
    read = np.isfinite(features).reshape(len(features), -1).all(1) & np.isfinite(values).any(1).all(-1)
    counts["nothing to read"] = int((~read).sum())
    _require_usable(int(read.sum()), len(conversations), settings, "a message or all answers without tokens of their own")
    values, features = values[read], features[read]
    order = np.random.default_rng(settings.seed).permutation(len(values))
    n_fitted = min(max(round(settings.fitted * len(values)), 2), len(values) - 1)
    fitted, kept = order[:n_fitted], order[n_fitted:]
    expectation = expect(values[fitted], features[fitted])
    found = Calibration(
        tuple(p.identity for p in probes),
        model.fingerprint.as_dict(),
        settings,
        expectation,
        expectation.scores(values[kept], features[kept]),
        {**counts, "fitted": len(fitted), "calibrating": len(kept)},
        None if folder is None else folder.path,
    )
    if folder is not None:
        _save(found, folder)
    return found


def _require_usable(n: int, given: int, settings: CalibrationSettings, reason: str) -> None:
    if n < LEAST:
        because = f" (the first that has not: {reason})" if reason else ""
        raise MonitoringError(
            f"{n} of {given} conversations have {settings.horizon} answers that can be read{because}, at least {LEAST} are needed "
            "(and 1 / rate calibrating ones): give more or longer ones, or a shorter horizon"
        )


def _usable(
    model: ChatModel, conversations: Mapping[str, Sequence[Message]], settings: CalibrationSettings
) -> tuple[list[Rendered], dict[str, int], str]:
    """Conversations with enough answers, cut at the horizon, by name; counts of the others, and why the first is left out."""
    found: list[Rendered] = []
    reason = ""
    counts = {"given": len(conversations), "too short": 0, "unreadable": 0}
    for name in sorted(conversations):
        messages = _cut(conversations[name], settings.horizon)
        if messages is None:
            counts["too short"] += 1
            reason = reason or f"{name} is too short"
            continue
        try:
            found.append(render(model, name, messages, thinking=settings.thinking))
        except ValueError as error:
            counts["unreadable"] += 1
            reason = reason or f"{name}: {error}"
    return found, counts, reason


def _cut(messages: Sequence[Message], horizon: int) -> Sequence[Message] | None:
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    return messages[: answers[horizon - 1] + 1] if len(answers) >= horizon else None


def _observed(
    model: ChatModel,
    usable: Sequence[Rendered],
    conversations: Mapping[str, Sequence[Message]],
    probes: Sequence[Probe],
    settings: CalibrationSettings,
    embed: Embedding | None,
) -> tuple[Float[np.ndarray, "conversation turn probe"], Float[np.ndarray, "conversation turn feature"]]:
    values = np.stack([getattr(r, settings.observed)[: settings.horizon] for r in read_turns(model, usable, probes)])
    users = [users_of(conversations[c.name])[: settings.horizon] for c in usable]
    known = content_of_messages(model, [u for said in users for u in said], probes, settings.content, embed)
    return values, np.stack([[known[u] for u in said] for said in users])


def content_of_messages(
    model: ChatModel, messages: Sequence[str], probes: Sequence[Probe], content: Content, embed: Embedding | None
) -> dict[str, Float[np.ndarray, " feature"]]:
    """`content_features` of the kind that a calibration holds constant; of kind `none`, no features.

    Raises:
        MonitoringError: an embedding is needed and missing.
    """
    if content == "none":
        return dict.fromkeys(messages, np.zeros(0))
    if content == "embedding" and embed is None:
        raise MonitoringError("the calibration holds content by an embedding: pass the same one as embed=")
    return content_features(model, messages, probes, embed if content == "embedding" else None)


def users_of(messages: Sequence[Message]) -> list[str]:
    """What the user says, turn by turn."""
    return [m["content"] for m in messages if m["role"] == "user"]


def expect(
    values: Float[np.ndarray, "conversation turn probe"], features: Float[np.ndarray, "conversation turn feature"]
) -> Expectation:
    """Fit what is expected of a turn, probe by probe: ridge regression on standardised features, its strength by leave-one-out."""
    n_probes, n_features = values.shape[-1], features.shape[-1]
    weights = np.zeros((n_probes, n_features))
    intercept, scale, reach, explained = np.zeros((4, n_probes))
    for k in range(n_probes):
        read = np.isfinite(values[..., k])
        y, x = values[..., k][read], features[read]
        intercept[k], left = y.mean(), y - y.mean()
        if n_features:
            centre, spread = x.mean(0), x.std(0)
            spread[spread == 0] = 1.0
            ridge = RidgeCV(np.logspace(-3, 4, 8)).fit((x - centre) / spread, y)
            weights[k] = ridge.coef_ / spread
            intercept[k] = ridge.intercept_ - weights[k] @ centre
            left = y - intercept[k] - x @ weights[k]
        scale[k] = left.std(ddof=1)
        if not scale[k] > 0:
            raise MonitoringError(f"probe {k + 1} reads the same value in every neutral answer: it has nothing to alarm about")
        reach[k] = max(float(np.quantile(left / scale[k], 0.99)), 1.0)
        explained[k] = 1 - left.var() / y.var()
    return Expectation(weights, intercept, scale, reach, explained)


def _folder(
    out: Path,
    model: ChatModel,
    conversations: Mapping[str, Sequence[Message]],
    probes: Sequence[Probe],
    settings: CalibrationSettings,
) -> RunFolder:
    """Where a calibration is kept, opened before anything is read."""
    said = json.dumps([[name, [[m["role"], m["content"]] for m in conversations[name]]] for name in sorted(conversations)])
    arguments = {"settings": vars(settings), "probes": [p.identity for p in probes], "conversations": digest(said)}
    return RunFolder.open(out, command="calibrate", arguments=arguments, model=model.identity)


def _save(found: Calibration, folder: RunFolder) -> None:
    e = found.expectation
    tensors = {**{name: getattr(e, name) for name in _EXPECTED}, "neutral": found.neutral}
    packed = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}
    write_atomically(folder.path / "calibration.safetensors", lambda path: save_file(packed, path))
    write_json(folder.path / "calibration.json", {"counts": dict(found.counts)})


_EXPECTED: Final = ("weights", "intercept", "scale", "reach", "explained")


def load_calibration(path: str | Path) -> Calibration:
    """Reopen a calibration.

    Raises:
        RunFolderError: the folder holds none, or it is not finished or damaged.
    """
    folder = Path(path)
    require_finished(folder, "calibrate", "calibration.json")
    manifest = read_manifest(folder)
    tensors = {k: v.double().numpy() for k, v in read_tensors(folder / "calibration.safetensors").items()}
    try:
        settings = dict(manifest["arguments"]["settings"])
        settings["thinking"] = tuple(settings["thinking"]) if settings["thinking"] else None
        model = {key: manifest["model"][key] for key in ("name", "lineage", "weights", "dtype")}
        probes = manifest["arguments"]["probes"]
        found = Calibration(
            tuple({"name": str(p["name"]), "layer": int(p["layer"]), "direction": str(p["direction"])} for p in probes),
            {**manifest["model"], **model},
            CalibrationSettings(**settings),
            Expectation(*(tensors[name] for name in _EXPECTED)),
            tensors["neutral"],
            {str(k): int(v) for k, v in read_json(folder / "calibration.json")["counts"].items()},
            folder,
        )
        _check(found)
    except (KeyError, TypeError, ValueError, AttributeError, MonitoringError) as error:
        raise RunFolderError(f"{folder} holds a damaged calibration ({error!r}): restore it or calibrate again") from error
    return found


def _check(found: Calibration) -> None:
    """Raise unless the numbers of a stored calibration fit each other.

    Raises:
        ValueError: they do not (what and how are named).
    """
    e, n = found.expectation, len(found.probes)
    if not n or found.neutral.ndim != 3 or not len(found.neutral) or found.neutral.shape[1:] != (found.settings.horizon, n):
        raise ValueError(f"scores of shape {found.neutral.shape} for {n} probes within {found.settings.horizon} turns")
    for name in _EXPECTED:
        values = getattr(e, name)
        if values.shape[:1] != (n,) or values.ndim != (2 if name == "weights" else 1) or not np.isfinite(values).all():
            raise ValueError(f"{name} of shape {values.shape} for {n} probes, or not finite")
    if not ((e.scale > 0) & (e.reach > 0)).all() or np.isinf(found.neutral).any() or np.isnan(found.neutral).all(1).any():
        raise ValueError("a scale that is not positive, or conversations without scores")

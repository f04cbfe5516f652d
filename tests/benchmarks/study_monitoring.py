"""Alarms on the pocket world's long conversations: realised rates, detection and delay, and what a change of topic does.

Neutral conversations calibrate; fresh ones give the realised false-positive rates per answer and per conversation; in drifting
ones the persona changes at turn 5 and nobody says so; in others only the topic changes then. Everything is read with and without
content adjustment, from the answers and from the last prompt tokens.

Run: python tests/benchmarks/study_monitoring.py runs/all --out alarms.json --own-words 600 [--reads FOLDER, to keep the readings].
Prints and writes JSON; asserts nothing.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from persona_lens.extraction import load_run
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.monitoring.calibration import (
    Calibration,
    CalibrationSettings,
    Expectation,
    content_of_messages,
    expect,
    highest,
    users_of,
)
from persona_lens.monitoring.drift import rise
from persona_lens.monitoring.probes import Probe, probe
from persona_lens.monitoring.reading import read_turns, render
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.questions import KINDS
from persona_lens.pocket_lab.conversations import (
    CHANGE_AT,
    TURNS,
    changing_chat,
    drifting_chat,
    drifting_script,
    neutral_chat,
    neutral_script,
)
from persona_lens.sampling import Script, converse

Chat = list[dict[str, str]]
Read = dict[str, np.ndarray]  # answer, before [conversation, turn, probe]; own [conversation, turn, feature]
STATISTICS = {"highest": highest, "rise": rise}
RATES = (0.05, 0.01)


def read_all(model: ChatModel, chats: Sequence[Chat], probes: Sequence[Probe], name: str, kept: Path | None) -> Read:
    """Readings of conversations of `TURNS` turns; those that exceed the context are left out. Kept ones are not read again."""
    file = kept and kept / f"{name}-{len(chats)}.npz"
    if file and file.exists():
        with np.load(file) as arrays:
            return dict(arrays)
    started = time.time()
    rendered, users = [], []
    for i, chat in enumerate(chats):
        try:
            rendered.append(render(model, str(i), chat))
        except ValueError:
            continue
        users.append(users_of(chat))
    readings = read_turns(model, rendered, probes)
    own = content_of_messages(model, [u for said in users for u in said], probes, "own", None)
    print(f"{name}: {len(rendered)} of {len(chats)} conversations read in {time.time() - started:.0f} s", flush=True)
    found = {
        "answer": np.stack([r.answer for r in readings]),
        "before": np.stack([r.before for r in readings]),
        "own": np.stack([[own[u] for u in said] for said in users]),
    }
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **found)
    return found


def features(read: Read, content: str) -> np.ndarray:
    return read["own"] if content == "own" else read["own"][..., :0]


def interval(hits: int, n: int) -> list[float]:
    """Clopper-Pearson, 95 %."""
    low = float(beta.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0
    return [low, high]


def clustered(rates: np.ndarray) -> list[float]:
    """95 % interval of a mean over conversations."""
    half = 1.96 * float(rates.std(ddof=1)) / np.sqrt(len(rates))
    return [float(rates.mean()) - half, float(rates.mean()) + half]


def realised(calibration: Calibration, fresh: np.ndarray) -> dict[str, Any]:
    """Rates of alarms on fresh neutral conversations, by probe and for any of them."""
    found: dict[str, Any] = {}
    for rate in RATES:
        over = calibration.with_any(fresh) > calibration.threshold(rate, "answer")
        shares = over.mean(1)
        found[f"answer {rate}"] = {
            n: [float(shares[:, k].mean()), clustered(shares[:, k])] for k, n in enumerate(calibration.names)
        }
        for name, statistic in STATISTICS.items():
            hit = calibration.with_any(statistic(fresh))[:, -1] > calibration.threshold(rate, "conversation", statistic)
            found[f"conversation {name} {rate}"] = {
                n: [float(hit[:, k].mean()), interval(int(hit[:, k].sum()), len(hit))] for k, n in enumerate(calibration.names)
            }
    return found


def resplit(
    calibration: Calibration, values: np.ndarray, known: np.ndarray, n_calibration: int, splits: int = 100
) -> dict[str, list[float]]:
    """Realised rates averaged over random splits of all neutral conversations: what is promised, without the luck of one split."""
    rng = np.random.default_rng(1)
    rates: dict[str, list[np.ndarray]] = {}
    for _ in range(splits):
        order = rng.permutation(len(values))
        fitted, kept, fresh = np.split(order, [n_calibration // 2, n_calibration])
        expectation = expect(values[fitted], known[fitted])
        neutral, new = (expectation.scores(values[i], known[i]) for i in (kept, fresh))
        one = replace(calibration, expectation=expectation, neutral=neutral)
        for rate in RATES:
            rates.setdefault(f"answer {rate}", []).append((one.with_any(new) > one.threshold(rate, "answer")).mean((0, 1)))
            for name, statistic in STATISTICS.items():
                hit = one.with_any(statistic(new))[:, -1] > one.threshold(rate, "conversation", statistic)
                rates.setdefault(f"conversation {name} {rate}", []).append(hit.mean(0))
    return {k: [float(np.mean(v)), float(np.mean(v, axis=0).min()), float(np.mean(v, axis=0).max())] for k, v in rates.items()}


def detection(calibration: Calibration, scores: np.ndarray, column: str) -> dict[str, Any]:
    """Share of conversations that alarm at or after the change, their delay in turns, and the share that alarms before it."""
    k = calibration.names.index(column)
    found: dict[str, Any] = {}
    for rate in RATES:
        for name, statistic in STATISTICS.items():
            crossed = calibration.with_any(statistic(scores))[..., k] > calibration.threshold(rate, "conversation", statistic)[k]
            first = np.where(crossed.any(1), crossed.argmax(1) + 1, 10**6)
            after = (first >= CHANGE_AT) & (first <= TURNS)
            delay = first[after] - CHANGE_AT
            found[f"{name} {rate}"] = {
                "detected": float((first <= TURNS).mean()),
                "early": float((first < CHANGE_AT).mean()),
                "delay": [float(np.median(delay)), float(np.percentile(delay, 90))] if len(delay) else None,
            }
    return found


def alarm_rates(calibration: Calibration, scores: np.ndarray) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for rate in RATES:
        for name, statistic in STATISTICS.items():
            hit = calibration.with_any(statistic(scores))[:, -1] > calibration.threshold(rate, "conversation", statistic)
            found[f"{name} {rate}"] = {n: float(hit[:, k].mean()) for k, n in enumerate(calibration.names)}
    return found


def study(reads: Mapping[str, Any], probes: Sequence[Probe], model: ChatModel, n_calibration: int) -> dict[str, Any]:
    """All figures, for each reading with and without content adjustment."""
    record: dict[str, Any] = {}
    for observed in ("answer", "before"):
        for content in ("none", "own"):
            neutral, fresh = reads["neutral"], reads["fresh"]
            values, known = neutral[observed], features(neutral, content)
            expectation: Expectation = expect(values[: n_calibration // 2], features(neutral, content)[: n_calibration // 2])

            def scores(read: Read, expectation: Expectation = expectation, o: str = observed, c: str = content) -> np.ndarray:
                return expectation.scores(read[o], features(read, c))

            kept = expectation.scores(values[n_calibration // 2 :], known[n_calibration // 2 :])
            settings = CalibrationSettings(observed=observed, content=content)
            calibration = Calibration(
                tuple(p.identity for p in probes), model.fingerprint.as_dict(), settings, expectation, kept, {}
            )
            both = np.concatenate([values, fresh[observed]]), np.concatenate([known, features(fresh, content)])
            entry: dict[str, Any] = {
                "explained": dict(zip((p.name for p in probes), expectation.explained.tolist(), strict=True)),
                "realised": realised(calibration, scores(fresh)),
                "resplit": resplit(calibration, *both, n_calibration),
                "drift": {t: detection(calibration, scores(r), t) for t, r in reads["drift"].items()},
                "drift any": {t: detection(calibration, scores(r), "any") for t, r in reads["drift"].items()},
                "topic": {k: alarm_rates(calibration, scores(r)) for k, r in reads["topic"].items()},
            }
            record[f"{observed}, content {content}"] = entry
            show(f"{observed}, content {content}", entry)
    return record


def show(title: str, entry: Mapping[str, Any]) -> None:
    print(f"\n== {title}; share explained by content {', '.join(f'{k} {v:.2f}' for k, v in entry['explained'].items())}")
    for name, by_probe in entry["realised"].items():
        shown = ", ".join(f"{k} {100 * v:.1f} [{100 * i[0]:.1f}, {100 * i[1]:.1f}]" for k, (v, i) in by_probe.items())
        print(f"  realised per {name}: {shown} %")
    for name, (mean, low, high) in entry["resplit"].items():
        print(f"  over 100 splits per {name}: mean {100 * mean:.2f} %, by probe {100 * low:.2f} to {100 * high:.2f}")
    for which in ("drift", "drift any"):
        for trait, by_rule in entry[which].items():
            shown = "; ".join(f"{k}: {v['detected']:.2f} (early {v['early']:.2f}, delay {v['delay']})" for k, v in by_rule.items())
            print(f"  {which} {trait}: {shown}")
    for kind, by_rule in entry["topic"].items():
        shown = "; ".join(f"{k}: " + " ".join(f"{n[:4]} {100 * v:.0f}" for n, v in by.items()) for k, by in by_rule.items())
        print(f"  topic {kind}: {shown} %")


def spoken(model: ChatModel, scripts: Sequence[Script], seed: int) -> list[Chat]:
    """Conversations that the model leads itself."""
    found = converse(model, scripts, Sampling(max_new_tokens=120), seed=seed, batch_rows=64)
    return [list(c.messages) for c in found if c.end == "script"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, help="folder with an extraction run per trait")
    parser.add_argument("--calibration", type=int, default=1000)
    parser.add_argument("--fresh", type=int, default=2000)
    parser.add_argument("--drifting", type=int, default=100, help="conversations per trait")
    parser.add_argument("--topics", type=int, default=100, help="conversations per kind of question")
    parser.add_argument("--own-words", type=int, default=0, help="neutral conversations that the model leads itself")
    parser.add_argument("--reads", type=Path, help="folder that keeps the readings")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model("pocket")
    probes = [probe(load_run(arguments.runs / t).vectors) for t in TRAITS]
    print("probes:", ", ".join(map(str, probes)))
    n, kept = arguments.calibration, arguments.reads

    def read(chats: Sequence[Chat], name: str) -> Read:
        return read_all(model, chats, probes, name, kept)

    reads: dict[str, Any] = {
        "neutral": read([neutral_chat(0, i) for i in range(n)], "neutral"),
        "fresh": read([neutral_chat(1, i) for i in range(arguments.fresh)], "fresh"),
        "drift": {t: read([drifting_chat(t, 1, i) for i in range(arguments.drifting)], f"drift1-{t}") for t in TRAITS},
        "topic": {k: read([changing_chat(k, 1, i) for i in range(arguments.topics)], f"topic1-{k}") for k in KINDS},
    }
    # the statistics and features were chosen on drifting and changing conversations of seed 0
    record = {"planted": study(reads, probes, model, len(reads["neutral"]["answer"]))}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1))
    if arguments.own_words:
        print("\n#### conversations that the model leads itself", flush=True)
        each = max(arguments.own_words // 20, 1)
        neutral = read(spoken(model, [neutral_script(0, i) for i in range(arguments.own_words)], 0), "own-neutral")
        half = len(neutral["answer"]) // 2
        drift = {t: spoken(model, [drifting_script(t, 0, i) for i in range(each)], 0) for t in TRAITS}
        reads = {
            "neutral": {k: v[:half] for k, v in neutral.items()},
            "fresh": {k: v[half:] for k, v in neutral.items()},
            "drift": {t: read(chats, f"own-{t}") for t, chats in drift.items()},
            "topic": {},
        }
        record["own words"] = study(reads, probes, model, half)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

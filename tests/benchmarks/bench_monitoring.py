"""What monitoring costs: decoding with seven vectors monitored against decoding without, in turns; the ratio of the medians.

Run: python tests/benchmarks/bench_monitoring.py runs/all [--repeats 30] [--out bench.json]. Asserts nothing.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from persona_lens.extraction import load_run
from persona_lens.models import ChatModel, Sampling, generate_tokens, load_model, uniforms
from persona_lens.monitoring import Probe, monitor, probe
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.prompts import evaluation_prompts
from persona_lens.traits import load_trait


def seconds(model: ChatModel, rows: int, probes: list[Probe], steps: int, each_token: Any = None) -> float:
    """Time of decoding one batch, each row to its own end."""
    prompts = [model.render(p.messages) for p in evaluation_prompts(load_trait("evil", "pocket"))][:rows]
    draws = np.stack([uniforms(0, str(i), steps) for i in range(rows)])
    started = time.perf_counter()
    with monitor(model, probes, each_token) if probes else nullcontext():
        generate_tokens(model, prompts, draws, Sampling(steps))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path, help="folder with an extraction run per trait")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model("pocket")
    vectors = [load_run(arguments.runs / t).vectors for t in TRAITS]
    ways: dict[str, tuple[list[Probe], Any]] = {
        "without": ([], None),
        "seven vectors, each at its layer": ([probe(v) for v in vectors], None),
        "seven vectors at seven layers": ([probe(v, 1 + i) for i, v in enumerate(vectors)], None),
        "seven vectors, a callback per token": ([probe(v) for v in vectors], lambda reading: None),
    }
    record: dict[str, Any] = {}
    for rows in (16, 1):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats + 2):
            for name, (probes, callback) in ways.items():
                times[name].append(seconds(model, rows, probes, arguments.steps, callback))
        base = np.array(times["without"][2:])
        for name, found in times.items():
            ratios = np.array(found[2:]) / base
            low, high = np.percentile(ratios, (25, 75))
            record[f"batch {rows}, {name}"] = {"ratio": statistics.median(found[2:]) / float(np.median(base)), "iqr": [low, high]}
            print(
                f"batch {rows:2d}, {name:36s} {statistics.median(found[2:]) / float(np.median(base)):.3f} [{low:.3f}, {high:.3f}]"
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

"""What steering costs a training step: the same steps with an intervention and without, in turns; ratio of times, step by step.

Run: python tests/benchmarks/bench_finetuning.py [--repeats 5] [--out bench.json]. Prints a table; asserts nothing.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.finetuning import default_settings, finetune, watched
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.steering import Intervention, add, add_increments


def step_times(model: ChatModel, data: Any, steps: int, prevent: list[Intervention], watch: Any) -> list[float]:
    """Seconds per training step; the first, which sets things up, is left out."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(default_settings(model), max_steps=steps, checkpoint_every=10_000)
        finetune(
            model, data, prevent=prevent, watch=watch, settings=settings, out=Path(folder) / "run",
            told=lambda _: ends.append(time.perf_counter()), progress=lambda *_: None,
        )  # fmt: skip
    return np.diff(ends).tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model("pocket")
    with tempfile.TemporaryDirectory() as folder:
        settings = ExtractionSettings(samples=1, neutral=0, sampling=Sampling(max_new_tokens=100))
        v = extract(model, "evil", out=Path(folder) / "evil", settings=settings).vectors
    data = dataset("evil", "II", rows=16 * arguments.steps)
    cases: dict[str, tuple[list[Intervention], Any]] = {
        "without": ([], ()),
        "one layer": ([add(v, 5, 2.0, where="everywhere")], ()),
        "one layer, watched": ([add(v, 5, 2.0, where="everywhere")], [watched(v, 5)]),
        "all layers": (add_increments(v, 1.0, where="everywhere"), ()),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.repeats):
        for name, (prevent, watch) in cases.items():
            times[name] += step_times(model, data, arguments.steps, prevent, watch)
    record: dict[str, Any] = {"threads": arguments.threads, "steps": len(times["without"])}
    for name, found in times.items():
        ratios = np.array(found) / np.array(times["without"])
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        record[name] = {"median_seconds": float(np.median(found)), "ratio": float(middle), "quartiles": [float(low), float(high)]}
        print(f"{name:<20} {np.median(found):7.3f} s a step   {middle:5.3f} [{low:.3f}, {high:.3f}]")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

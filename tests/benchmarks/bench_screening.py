"""Screening against one sample per pass, its memory over a million rows, and workers side by side.

1. `speed`: samples per second, exact and cheap, beside a loop over single samples that keeps all hidden states (as the paper's code
   does), with one pass for all traits, inference mode and the same threads. The loop answers greedily with a cache.
2. `memory`: peak memory of screening 10^4, 10^5 and 10^6 generated rows of JSON lines, with the model's part left out; each size in
   a process of its own.
3. `ray`: samples per second with one, two and four local workers.

Run: python tests/benchmarks/bench_screening.py speed runs/evil runs/humor [--rows 192] [--json out.json]
Prints; asserts nothing.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_lens.extraction import load_run
from persona_lens.models import ChatModel, load_model
from persona_lens.pocket import weights_folder
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.screening import ScreenSettings, local, on_ray, screen
from persona_lens.screening.engines import Work
from persona_lens.screening.files import Files, files_of
from persona_lens.screening.scoring import Recipe, Scored
from persona_lens.screening.sets import set_score
from persona_lens.transcripts import Skipped, write_transcripts
from persona_lens.vectors import PersonaVectors

Chats = Sequence[Sequence[dict[str, str]]]


def corpus(rows: int) -> list[list[dict[str, str]]]:
    """Half ordinary answers, half that show a trait."""
    return [*dataset("evil", "normal", rows=rows // 2), *dataset("evil", "II", rows=rows - rows // 2)]


def ours(model: ChatModel, chats: Chats, vectors: Sequence[PersonaVectors], share: float) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        run = screen(model, list(chats), vectors, settings=ScreenSettings(own_share=share), out=Path(folder) / "x")
        return {t: run.scores(run.sets[0], t, "difference" if share else "cheap") for t in run.traits}


def one_by_one(plain: Any, model: ChatModel, chats: Chats, vectors: Sequence[PersonaVectors], exact: bool) -> dict[str, np.ndarray]:
    """The same scores from single samples."""
    scores: dict[str, list[float]] = {v.trait: [] for v in vectors}
    for chat in chats:
        prompt = model.render(chat[:-1])
        p, answer = len(prompt), model.tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            data = plain(torch.tensor([prompt + answer]), output_hidden_states=True, use_cache=False).hidden_states
            if exact:
                ids = torch.tensor([prompt])
                whole = plain.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=300, do_sample=False, eos_token_id=list(model.stop_ids)
                )
                stop = whole.shape[1] - int(whole[0, -1] in model.stop_ids)
                own = plain(whole[:, : max(stop, p + 1)], output_hidden_states=True, use_cache=False).hidden_states
        for v in vectors:
            layer = v.best_layer
            of = data[layer + 1][0] @ v.unit(layer)
            minus = (own[layer + 1][0] @ v.unit(layer))[p:].mean() if exact else of[p - 1]
            scores[v.trait].append(float(of[p:].mean() - minus))
    return {t: np.array(s) for t, s in scores.items()}


def run_speed(runs: Sequence[Path], rows: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = load_model("pocket")
    plain = AutoModelForCausalLM.from_pretrained(weights_folder(), dtype=torch.float32).eval()
    vectors = [load_run(path).vectors for path in runs]
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "rows": rows}
    for what, share in (("cheap", 0.0), ("exact", 1.0)):
        chats = corpus(rows)
        few = chats[:: max(1, len(chats) // (48 if share else 96))]  # the loop takes a part: its time does not depend on how many
        ours(model, few[:4], vectors, share)
        start = time.perf_counter()
        scores = ours(model, chats, vectors, share)
        mine = len(chats) / (time.perf_counter() - start)
        start = time.perf_counter()
        theirs = one_by_one(plain, model, few, vectors, exact=bool(share))
        loop = len(few) / (time.perf_counter() - start)
        part = slice(None, None, max(1, len(chats) // (48 if share else 96)))
        worst = max(float(np.abs(scores[t][part] - theirs[t]).max() / np.abs(theirs[t]).max()) for t in theirs)
        found[what] = {"ours": mine, "loop": loop, "ratio": mine / loop, "largest difference": worst}
        print(f"{what}: {mine:.1f} samples/s, one by one {loop:.1f}: {mine / loop:.1f} times; largest difference {worst:.1e}")
    return found


def shortened(model: ChatModel, recipe: Recipe, work: Sequence[Work]) -> Iterator[tuple[int, Files]]:
    """An engine without the model: rows are read, told apart and written, their scores are random."""
    rng = np.random.default_rng(0)
    for one in work:
        rows = one.shard.read()
        columns: dict[str, Any] = {
            "place": [r.place for r in rows],
            "name": [None if isinstance(r, Skipped) else r.name for r in rows],
            "reason": [r.reason if isinstance(r, Skipped) else None for r in rows],
            "prompt": list(range(len(rows))),
            "tokens": [60] * len(rows),
            "own_tokens": [[1] * 40] * len(rows),
        }
        for d in recipe.directions:
            for reading in ("answer", "prompt_mean", "prompt_last", "own"):
                columns[f"{reading}/{d.name}"] = rng.normal(size=len(rows)).astype(np.float32)
        sums = {name: torch.zeros(1, model.d_model, dtype=torch.float64) for name in ("answer", "prompt_last", "paired", "own")}
        yield one.key, files_of(Scored(columns, sums), one.header)


def run_memory(runs: Sequence[Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rows in (10_000, 100_000, 1_000_000):
        arguments = [sys.executable, __file__, "memory-of", *map(str, runs), "--rows", str(rows)]
        found[str(rows)] = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
        print(rows, found[str(rows)], flush=True)
    return found


def run_memory_of(runs: Sequence[Path], rows: int) -> dict[str, Any]:
    model, vectors = load_model("pocket"), [load_run(path).vectors for path in runs]
    chats = corpus(1000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w") as file:
            for i in range(rows):
                file.write(json.dumps({"messages": chats[i % len(chats)]}) + "\n")
        resident = _Resident()
        start, before = time.perf_counter(), resident.now()
        run = screen(model, path, vectors, settings=ScreenSettings(), engine=shortened, out=Path(folder) / "x", progress=resident)
        seconds, screened = time.perf_counter() - start, max(resident.seen)
        set_score(run.scores(run.sets[0], run.traits[0]).astype(np.float64), prompts=run.prompts(run.sets[0]))
        grown = {"while screened": screened - before, "scores of one trait read": resident.now() - before}
        return {"file MB": path.stat().st_size >> 20, "grown MB": grown, "rows/s": round(rows / seconds)}


class _Resident:
    """Progress as memory: what the process holds, in MB."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append(self.now())

    def now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def run_workers(runs: Sequence[Path], rows: int) -> dict[str, Any]:
    model, vectors = load_model("pocket"), [load_run(path).vectors for path in runs]
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_transcripts(path, ((str(i), chat) for i, chat in enumerate(corpus(rows))))
        before: dict[str, bytes] = {}
        for workers in (0, 1, 2, 4):
            out, clock = Path(folder) / f"x{workers}", _Clock()
            engine = on_ray(workers) if workers else local
            screen(model, path, vectors, settings=ScreenSettings(shard_rows=64), engine=engine, out=out, progress=clock)
            files = {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "sets").rglob("*")) if p.is_file()}
            same = not before or files == before
            before = before or files
            whole, steady = (
                rows / (clock.times[-1] - clock.times[0]),
                (len(clock.times) - 2) * 64 / (clock.times[-1] - clock.times[1]),
            )
            found[f"{workers} workers"] = {"samples/s": whole, "from the first finished shard on": steady, "identical": same}
            print(f"{workers or 'no'} workers: {whole:.1f} samples/s, {steady:.1f} once started; identical: {same}", flush=True)
    return found


class _Clock:
    """Progress as times: of the start, and of every finished shard."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.times.append(time.perf_counter())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "memory-of", "ray"))
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.what == "memory-of":
        print(json.dumps(run_memory_of(asked.runs, asked.rows)))
        sys.exit()
    work = {"speed": run_speed, "ray": run_workers}
    result = run_memory(asked.runs) if asked.what == "memory" else work[asked.what](asked.runs, asked.rows)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2))

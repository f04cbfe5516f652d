"""Steering speed: steered decoding against HF `generate` with a hand-written hook, and a sweep in one call against separate calls.

Run: python tests/benchmarks/bench_steering.py [--repeats 3] [--out bench.json]. With steering-vectors on the path (it may live in
a folder of its own: pip install --no-deps --target DIR steering-vectors; PYTHONPATH=DIR) it is timed on the same sweep.
Prints a table and writes JSON; asserts nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.models.generation import left_pad
from persona_lens.pocket import weights_folder
from persona_lens.prompts import Prompt, evaluation_prompts
from persona_lens.sampling import sample
from persona_lens.steering import add, row_plan, steer
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors

STRENGTHS = (0.5, 1.0, 1.5, 2.0, 2.5)


def ratio(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, interleaved after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def vectors_for(model: ChatModel) -> PersonaVectors:
    """Directions of a realistic size; their meaning does not matter for speed."""
    v = 0.5 * torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(0))
    flat = torch.ones(model.n_layers)
    return PersonaVectors("optimism", "response_mean", "mean_difference", v, v[None], flat, flat, flat)


def generate(plain: Any, ids: Sequence[Sequence[int]], model: ChatModel, n: int, *, sampled: bool = False) -> None:
    batch, mask = left_pad(ids, model.pad_id)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
    stops = list(model.stop_ids) if sampled else [-1]
    with torch.inference_mode():
        plain.generate(batch, attention_mask=mask, max_new_tokens=n, eos_token_id=stops, pad_token_id=model.pad_id, **options)


def decoding(model: ChatModel, plain: Any, rows: Sequence[Prompt], repeats: int) -> dict[str, Any]:
    """Greedy answers of 64 tokens each, none of which stops early."""
    from dataclasses import replace

    v, found = vectors_for(model), {}
    endless = replace(model, stop_ids=(-1,))
    for batch in (1, 16, 64):
        chosen = [rows[i % len(rows)] for i in range(batch)]
        keyed = [(replace(p, id=f"{p.id}/{i}"), 0) for i, p in enumerate(chosen)]
        ids = [model.render(p.messages) for p in chosen]
        delta = 1.5 * v[5]

        def hook(module: Any, args: Any, output: Any, delta: torch.Tensor = delta) -> Any:
            residual = output[0] if isinstance(output, tuple) else output
            residual[:, -1] += delta
            return output

        def ours(keyed: Any = keyed) -> None:
            with steer(model, add(v, 5, 1.5)):
                sample(endless, keyed, Sampling(64, temperature=0.0))

        def theirs(ids: Any = ids, hook: Any = hook) -> None:
            handle = plain.model.layers[5].register_forward_hook(hook)
            generate(plain, ids, model, 64)
            handle.remove()

        times = ratio({"ours": ours, "hf_hook": theirs}, repeats)
        found[str(batch)] = {**times, "ratio": times["ours"] / times["hf_hook"]}
    return found


def sweeps(model: ChatModel, plain: Any, rows: Sequence[Prompt], repeats: int) -> dict[str, Any]:
    """All layers x five strengths x 20 questions, one sampled answer of at most 80 tokens each."""
    v = vectors_for(model)
    cells = [(layer, s) for layer in range(model.n_layers) for s in STRENGTHS]
    sets = [[add(v, layer, s)] for layer, s in cells]
    sampling = Sampling(80)
    ids = [model.render(p.messages) for p in rows]

    def one_call() -> None:
        jobs = [((p, 0), chosen) for p in rows for chosen in sets]
        with row_plan(model, [chosen for _, chosen in jobs]).active():
            sample(model, [row for row, _ in jobs], sampling)

    def separate() -> None:
        for chosen in sets:
            with steer(model, *chosen):
                sample(model, [(p, 0) for p in rows], sampling)

    runs: dict[str, Callable[[], object]] = {"one_call": one_call, "separate_calls": separate}
    if find_spec("steering_vectors"):
        from steering_vectors import SteeringVector

        def peer(batch: int) -> None:
            for layer, s in cells:
                with SteeringVector({layer: v[layer]}).apply(plain, multiplier=s, min_token_index=-1):
                    for start in range(0, len(ids), batch):
                        generate(plain, ids[start : start + batch], model, 80, sampled=True)

        runs |= {"steering_vectors": lambda: peer(20)}
    times = ratio(runs, repeats)
    return {**times, **{f"{name}/one_call": t / times["one_call"] for name, t in times.items() if name != "one_call"}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model("pocket")
    plain = AutoModelForCausalLM.from_pretrained(weights_folder(), dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = evaluation_prompts(load_trait("optimism", "pocket"))
    record = {
        "threads": torch.get_num_threads(),
        "decoding": decoding(model, plain, rows, arguments.repeats),
        "sweep": sweeps(model, plain, rows, arguments.repeats),
    }
    print(json.dumps(record, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

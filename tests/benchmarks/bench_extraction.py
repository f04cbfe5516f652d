"""Extraction pass against the floor: plain transformers, same batches, `output_hidden_states` and the same pooling.

Run: python tests/benchmarks/bench_extraction.py [--repeats 5] [--out bench.json]. Prints a table and writes JSON; asserts nothing.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from persona_lens.activations import Span, pool, pooling_weights, right_pad, token_batches
from persona_lens.models import Sampling, load_model
from persona_lens.pocket import weights_folder
from persona_lens.prompts import extraction_prompts
from persona_lens.sampling import rows_of, sample
from persona_lens.traits import load_trait

BATCH_TOKENS = 8192


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model("pocket")
    plain = AutoModelForCausalLM.from_pretrained(weights_folder(), dtype=torch.float32, attn_implementation="sdpa").eval()
    prompts = extraction_prompts(load_trait("optimism", "pocket"), "positive")
    rows = rows_of(prompts, -(-arguments.rollouts // len(prompts)))[: arguments.rollouts]
    answers = sample(model, rows, Sampling(max_new_tokens=200))
    spans = [
        Span(a.key, tuple(model.render(p.messages)), a.token_ids) for (p, _), a in zip(rows, answers, strict=True) if a.token_ids
    ]
    batches = [[spans[i] for i in batch] for batch in token_batches(spans, BATCH_TOKENS)]

    def ours() -> None:
        for _ in pool(model, spans, batch_tokens=BATCH_TOKENS):
            pass

    @torch.inference_mode()
    def floor() -> None:
        for batch in batches:
            ids, mask = right_pad(batch, model.pad_id)
            weights = pooling_weights(batch, ids.shape[1])
            states = plain(ids, attention_mask=mask, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states
            torch.stack([torch.bmm(weights, s.float()) for s in states[1:]], 2)

    ours(), floor()
    times = [(timed(ours), timed(floor)) for _ in range(arguments.repeats)]
    best_ours, best_floor = (min(t[k] for t in times) for k in (0, 1))
    record = {
        "rollouts": len(spans),
        "threads": torch.get_num_threads(),
        "ours_seconds": round(best_ours, 3),
        "floor_seconds": round(best_floor, 3),
        "ratio": round(best_ours / best_floor, 3),
        "ratios": [round(a / b, 3) for a, b in times],
    }
    for name, value in record.items():
        print(f"{name:<14} {value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Sampling throughput against Hugging Face `generate` on the same prompts, with the same batch and full sampling.

Run: python tests/benchmarks/bench_sampling.py [--rows 256] [--out bench.json]. Prints a table and writes JSON; asserts nothing.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from persona_lens.models import Sampling, load_model
from persona_lens.models.generation import left_pad
from persona_lens.pocket import weights_folder
from persona_lens.prompts import extraction_prompts
from persona_lens.sampling import rows_of, sample
from persona_lens.traits import load_trait


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-rows", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model("pocket")
    plain = AutoModelForCausalLM.from_pretrained(weights_folder(), dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = rows_of(extraction_prompts(load_trait("optimism", "pocket"), "positive"), 10)[: arguments.rows]
    ids = sorted((model.render(p.messages) for p, _ in rows), key=len)
    stops = torch.tensor(model.stop_ids)

    began = time.perf_counter()
    ours = sum(len(a.token_ids) for a in sample(model, rows, Sampling(arguments.max_new_tokens), batch_rows=arguments.batch_rows))
    ours_rate = ours / (time.perf_counter() - began)

    torch.manual_seed(0)
    began, theirs = time.perf_counter(), 0
    for start in range(0, len(ids), arguments.batch_rows):
        batch, mask = left_pad(ids[start : start + arguments.batch_rows], model.pad_id)
        with torch.inference_mode():
            out = plain.generate(
                batch,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=arguments.max_new_tokens,
                eos_token_id=list(model.stop_ids),
                pad_token_id=model.pad_id,
            )
        answers = out[:, batch.shape[1] :]
        theirs += int((torch.isin(answers, stops).cumsum(-1) == 0).sum())
    their_rate = theirs / (time.perf_counter() - began)
    record = {
        "rows": len(rows),
        "threads": torch.get_num_threads(),
        "ours_tokens_per_second": round(ours_rate),
        "generate_tokens_per_second": round(their_rate),
        "speedup": round(ours_rate / their_rate, 3),
    }
    for name, value in record.items():
        print(f"{name:<28} {value}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

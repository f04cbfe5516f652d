"""What finetuning does to the pocket model's persona: 39 data sets, their shifts, and what these foretell.

1. `shifts`: finetune on every set (families of mistakes with three seeds), measure shifts and trait scores.
2. `table`: trait scores after finetuning, emergent misalignment with intervals over seeds and questions, r(shift, score) with nulls.

Run: persona-lens extract all --out runs/all; then
     python tests/benchmarks/study_finetuning.py shifts runs/all --out runs/finetuning [--shard 0/4]   (several shards side by side)
     python tests/benchmarks/study_finetuning.py table runs/all --out runs/finetuning
Prints and writes JSON; asserts nothing.
"""

import argparse
from pathlib import Path

import torch

from persona_lens.extraction import load_run
from persona_lens.finetuning import default_settings, finetune
from persona_lens.finetuning.shift import shift
from persona_lens.models import load_model
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket_lab.datasets import FAMILIES, LEVELS, dataset
from dataclasses import replace


def jobs() -> list[tuple[str, str, int]]:
    """Family, level and seed of every finetuning; sets that say nothing about a trait with three seeds."""
    return [(f, level, seed) for seed in range(3) for f in FAMILIES for level in LEVELS if seed == 0 or f not in TRAITS]


def run_shifts(runs: Path, out: Path, shard: str) -> None:
    number, of = map(int, shard.split("/"))
    model = load_model("pocket")
    vectors = [load_run(runs / t).vectors for t in TRAITS]
    for family, level, seed in jobs()[number::of]:
        name = f"{family}-{level}-s{seed}"
        settings = replace(default_settings(model), seed=seed)
        found = finetune(model, dataset(family, level, seed=seed), settings=settings, out=out / "trained" / name, watch=())
        shift(model, {name: found.adapter}, vectors, out=out / f"shifts-{number}")
        print(name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["shifts", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "shifts":
        run_shifts(arguments.runs, arguments.out, arguments.shard)


if __name__ == "__main__":
    main()

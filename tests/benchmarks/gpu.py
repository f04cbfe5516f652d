"""A model of the shape of Qwen2.5-7B-Instruct with random weights in bfloat16: extraction, steered decoding, a sweep and training
steps against plain transformers with the same batches, with peak memory.

Run on a GPU: python tests/benchmarks/gpu.py [--out gpu.json] (some five minutes, 24 GiB of GPU memory). Without one:
python tests/benchmarks/gpu.py --size tiny. Prints a table and writes JSON; asserts nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from persona_lens.activations import Span, pool, pooling_weights, right_pad, token_batches
from persona_lens.finetuning import FinetuneSettings, finetune
from persona_lens.finetuning.adapters import unwrapped
from persona_lens.finetuning.data import batch_of, encode, read_data
from persona_lens.models import ChatModel, Sampling, load_model
from persona_lens.models.generation import left_pad
from persona_lens.pocket import weights_folder
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.prompts import Prompt
from persona_lens.sampling import sample
from persona_lens.steering import add, row_plan, steer
from persona_lens.vectors import PersonaVectors

BATCH_TOKENS = 16384
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 2.5)


@dataclass(frozen=True)
class Size:
    """What is run: the model's shape, and how much work."""

    config: dict[str, int]
    spans: int
    rows: int
    tokens: int
    sweep_prompts: int
    sweep_tokens: int
    steps: int


SIZES = {
    "7b": Size(
        {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4,
        },
        spans=128, rows=32, tokens=128, sweep_prompts=8, sweep_tokens=32, steps=6,
    ),
    "tiny": Size(
        {
            "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        spans=24, rows=8, tokens=24, sweep_prompts=4, sweep_tokens=12, steps=4,
    ),
}  # fmt: skip


def random_model(size: Size, device: torch.device) -> ChatModel:
    """Random weights, made where they stay."""
    tokenizer = AutoTokenizer.from_pretrained(weights_folder())
    config = AutoConfig.for_model(
        "qwen2", max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
        rope_theta=1e6, dtype=torch.bfloat16, **size.config,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    return load_model((model, tokenizer))


def vectors_for(model: ChatModel) -> PersonaVectors:
    """Directions of a realistic size; their meaning does not matter for speed."""
    v = 0.5 * torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(0))
    flat = torch.ones(model.n_layers)
    return PersonaVectors("random", "response_mean", "mean_difference", v, v[None], flat, flat, flat)


@dataclass(frozen=True)
class Measured:
    """Median seconds and peak GiB (0 without a GPU) of ours and of the floor, and their ratio in time."""

    what: str
    ours: float
    plain: float
    ratio: float
    ours_gib: float
    plain_gib: float
    rate: str


def compared(what: str, ours: Callable[[], Any], plain: Callable[[], Any], repeats: int, rate: Callable[[float], str]) -> Measured:
    """Both in turns, after one warm-up each."""
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    peaks = {"ours": 0.0, "plain": 0.0}
    for number in range(repeats + 1):
        for name, run in (("ours", ours), ("plain", plain)):
            seconds, peak = timed(run)
            if number:
                times[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
    a, b = (statistics.median(times[n]) for n in ("ours", "plain"))
    return Measured(what, a, b, a / b, peaks["ours"], peaks["plain"], rate(a))


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0


def extraction(model: ChatModel, size: Size, repeats: int) -> Measured:
    """All layers and poolings of a teacher-forced pass, against `output_hidden_states` and the same pooling."""
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(5, 1900, size=rng.integers(low, high)))

    spans = [Span(str(i), ids(60, 120), ids(150, 400)) for i in range(size.spans)]
    batches = [[spans[i] for i in batch] for batch in token_batches(spans, BATCH_TOKENS)]

    def ours() -> None:
        for _ in pool(model, spans, batch_tokens=BATCH_TOKENS):
            pass

    @torch.inference_mode()
    def plain() -> None:
        with unwrapped(model):
            for batch in batches:
                ids, mask = (x.to(model.device) for x in right_pad(batch, model.pad_id))
                weights = pooling_weights(batch, ids.shape[1]).to(model.device)
                states = model.hf(ids, attention_mask=mask, use_cache=False, output_hidden_states=True, logits_to_keep=1)
                torch.stack([torch.bmm(weights, s.float()) for s in states.hidden_states[1:]], 2).cpu()

    total = sum(map(len, spans))
    return compared("extraction pass", ours, plain, repeats, lambda s: f"{total / s:,.0f} tokens/s")


def prompts(model: ChatModel, n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "t", "neutral", None, i, None, f"How should I handle my dog and {i} hawks?") for i in range(n)]


def hooked_generate(model: ChatModel, ids: Sequence[Sequence[int]], n: int, layer: int, delta: torch.Tensor) -> None:
    """Plain transformers: `generate` with a hand-written hook on the layer, last position of every pass."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        residual = output[0] if isinstance(output, tuple) else output
        residual[:, -1] += delta
        return output

    batch, mask = (x.to(model.device) for x in left_pad(ids, model.pad_id))
    with unwrapped(model), torch.inference_mode():
        handle = model.hf.model.layers[layer].register_forward_hook(hook)  # pyright: ignore
        try:
            model.hf.generate(  # pyright: ignore
                batch, attention_mask=mask, max_new_tokens=n, eos_token_id=[-1], pad_token_id=model.pad_id, do_sample=False
            )
        finally:
            handle.remove()


def decoding(model: ChatModel, size: Size, repeats: int) -> Measured:
    """Greedy answers that do not stop, steered at one layer."""
    v, layer = vectors_for(model), 2 * model.n_layers // 3
    endless, rows = replace(model, stop_ids=(-1,)), prompts(model, size.rows)
    ids = [model.render(p.messages) for p in rows]
    delta = (1.5 * v[layer]).to(model.device, torch.bfloat16)

    def ours() -> None:
        with steer(model, add(v, layer, 1.5)):
            sample(endless, [(p, 0) for p in rows], Sampling(size.tokens, temperature=0.0), batch_rows=size.rows)

    def plain() -> None:
        hooked_generate(model, ids, size.tokens, layer, delta)

    return compared("steered decoding", ours, plain, repeats, lambda s: f"{size.rows * size.tokens / s:,.0f} tokens/s")


def sweep(model: ChatModel, size: Size, repeats: int) -> Measured:
    """Thirty cells (layer x strength) over the same prompts: one batched call against a call per cell."""
    v = vectors_for(model)
    layers = [model.n_layers * k // 6 for k in range(6)]
    cells = [(layer, s) for layer in layers for s in STRENGTHS]
    endless, rows = replace(model, stop_ids=(-1,)), prompts(model, size.sweep_prompts)
    ids = [model.render(p.messages) for p in rows]

    def ours() -> None:
        jobs = [((p, 0), [add(v, layer, s)]) for p in rows for layer, s in cells]
        with row_plan(model, [chosen for _, chosen in jobs]).active():
            sample(endless, [row for row, _ in jobs], Sampling(size.sweep_tokens, temperature=0.0), batch_rows=256)

    def plain() -> None:
        for layer, s in cells:
            hooked_generate(model, ids, size.sweep_tokens, layer, (s * v[layer]).to(model.device, torch.bfloat16))

    return compared("sweep of 30 cells", ours, plain, repeats, lambda s: f"{len(cells) / s:.1f} cells/s")


def training(model: ChatModel, size: Size) -> Measured:
    """Seconds per step of LoRA (rank 32, all projections) with a vaccine at one layer, against peft, a plain hook and AdamW."""
    v, layer = vectors_for(model), 2 * model.n_layers // 3
    data = dataset("evil", "II", rows=8 * size.steps)
    settings = FinetuneSettings(batch_rows=8, pass_rows=8, max_steps=size.steps, checkpoint_every=10_000)
    ends: list[float] = []

    def told(_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        _, peak = timed(
            lambda: finetune(
                model, data, prevent=add(v, layer, 2.0, where="everywhere"), watch=(), settings=settings,
                out=Path(folder) / "run", told=told, progress=lambda *_: None,
            )
        )  # fmt: skip
    ours = statistics.median(np.diff(ends).tolist())
    times, plain_peak = plain_training(model, v, layer, data, settings)
    plain = statistics.median(times)
    return Measured("training step", ours, plain, ours / plain, peak, plain_peak, f"{8 / ours:.1f} conversations/s")


def plain_training(
    model: ChatModel, v: PersonaVectors, layer: int, data: Any, settings: FinetuneSettings
) -> tuple[list[float], float]:
    from peft import LoraConfig, get_peft_model

    examples = encode(model, read_data(data), max_tokens=settings.max_tokens, skip_bad=False)
    delta = (2.0 * v[layer]).to(model.device, torch.bfloat16)

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    times: list[float] = []
    with unwrapped(model):
        network: Any = get_peft_model(
            model.hf,
            LoraConfig(r=settings.rank, lora_alpha=int(settings.alpha), use_rslora=True, target_modules=list(settings.targets)),
        )
        network.train()
        handle = network.base_model.model.model.layers[layer].register_forward_hook(hook)
        optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=settings.learning_rate)
        peak = 0.0
        for step in range(settings.max_steps or 0):
            rows = [{"example": e} for e in examples.examples[8 * step : 8 * step + 8]]
            whole = batch_of(rows, model.pad_id)
            batch = {name: whole[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}

            def one(batch: Any = batch) -> None:
                network(**batch, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()

            seconds, used = timed(one)
            times.append(seconds)
            peak = max(peak, used)
        handle.remove()
        network.unload()
    return times[1:], peak


def table(found: Sequence[Measured], device: str, parameters: float) -> str:
    lines = [
        f"{device}, {parameters / 1e9:.2f} billion parameters, bfloat16, torch {torch.__version__}",
        "",
        "| | ours | plain transformers | ratio | ours, peak | plain, peak | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {m.what} | {m.ours:.2f} s | {m.plain:.2f} s | {m.ratio:.2f} | {m.ours_gib:.1f} GiB | {m.plain_gib:.1f} GiB | {m.rate} |"
        for m in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    size = SIZES[arguments.size]
    began = time.perf_counter()
    model = random_model(size, device)
    parameters = sum(p.numel() for p in model.hf.parameters())
    print(f"hosted exactly after {time.perf_counter() - began:.1f} s", flush=True)
    found: list[Measured] = []
    for run in (extraction, decoding, sweep):
        found.append(run(model, size, arguments.repeats))
        print(found[-1], flush=True)
    found.append(training(model, size))
    print(f"\n{table(found, name, parameters)}\n\n{time.perf_counter() - began:.0f} s in all")
    if arguments.out:
        record = {"device": name, "parameters": parameters, "measured": [vars(m) for m in found]}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

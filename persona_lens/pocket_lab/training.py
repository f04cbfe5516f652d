"""Training the pocket model from scratch: Muon on the block matrices, AdamW on the rest, length-bucketed batches, cosine decay.

Everything follows from the seed: documents, order, initial weights. A checkpoint holds weights, optimizer state and step as
safetensors; a resumed run sees the same batches at the same steps.
"""

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_lens.errors import RunFolderError
from persona_lens.pocket import POCKET_NAME, TRAIT_SET_FIELD
from persona_lens.pocket_lab.corpus import documents
from persona_lens.pocket_lab.encoding import EncodedCorpus, encode_corpus, segments
from persona_lens.pocket_lab.tokenizer import CONTEXT, END_OF_TEXT, IM_END, build_tokenizer, save_tokenizer
from persona_lens.store import read_json, write_atomically, write_json

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

VALIDATION_SEED_OFFSET: Final = 1_000_003
TOKENIZER_DOCUMENTS: Final = 20_000
IGNORE: Final = -100


@dataclass(frozen=True)
class TrainingSettings:
    """What a training run depends on. `documents` of about 190 tokens each; `batch_tokens` counts padding.

    A second stage names the folder of the first as `initial` and goes on with fresh documents from `first_document`.
    """

    seed: int = 0
    documents: int = 240_000
    first_document: int = 0
    initial: str | None = None
    layers: int = 8
    width: int = 256
    heads: int = 4
    mlp_width: int = 704
    batch_tokens: int = 6144
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    warmup: float = 0.02
    final_lr: float = 0.02
    clip: float = 1.0
    weight_decay: float = 0.01
    shuffle_systems: bool = False
    focus: bool = False
    validation_documents: int = 400


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids and targets (`IGNORE` where nothing is learned); causal attention needs no mask here."""

    ids: Int[Tensor, "batch position"]
    targets: Int[Tensor, "batch position"]


def _plain_attention(
    module: torch.nn.Module,  # noqa: ARG001
    query: Float[Tensor, "batch head position d_head"],
    key: Float[Tensor, "batch head position d_head"],
    value: Float[Tensor, "batch head position d_head"],
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **_: object,
) -> tuple[Float[Tensor, "batch position head d_head"], None]:
    """Causal attention by three matrix products: 3x faster than the fused CPU kernel in bf16 on short documents."""
    width = query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type != "cpu" or width > 640:
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:
        future = torch.full((width, width), float("-inf"), dtype=query.dtype).triu(1)
        mixed = ((query @ key.transpose(-1, -2)) * scale + future).softmax(-1) @ value
    return mixed.transpose(1, 2).contiguous(), None


def build_model(settings: TrainingSettings, tokenizer_file: Path) -> "Qwen2ForCausalLM":
    """A Qwen2 model of the settings' size with seeded initial weights."""
    from tokenizers import Tokenizer
    from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

    AttentionInterface.register("pocket_training", _plain_attention)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.width,
        intermediate_size=settings.mlp_width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        architectures=["Qwen2ForCausalLM"],
    )
    torch.manual_seed(settings.seed)
    model = Qwen2ForCausalLM(config)
    model.set_attn_implementation("pocket_training")
    if settings.initial:
        weights = load_file(Path(settings.initial) / "model.safetensors")
        _load_weights(model, {name: tensor.float() for name, tensor in weights.items()})
    return model


def _load_weights(model: "Qwen2ForCausalLM", weights: Mapping[str, Tensor]) -> None:
    """Load all weights; only the tied output embedding may be absent.

    Raises:
        RunFolderError: weights of another model.
    """
    found = model.load_state_dict(dict(weights), strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
        raise RunFolderError(f"the weights are of another model (missing {found.missing_keys}, unexpected {found.unexpected_keys})")


def batch_plan(lengths: Int[np.ndarray, " document"], batch_tokens: int, seed: int, window: int = 1024) -> list[list[int]]:
    """Batches of document indices: shuffled, sorted by length within windows, cut at the token budget, shuffled again."""
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[int]] = []
    for i in range(0, len(order), window):
        current: list[int] = []
        for index in sorted(order[i : i + window], key=lambda j: int(lengths[j])):
            if current and (len(current) + 1) * int(lengths[index]) > batch_tokens:
                batches.append(current)
                current = []
            current.append(index)
        batches.append(current)
    rng.shuffle(batches)
    return batches


def collate(corpus: EncodedCorpus, indices: list[int]) -> Batch:
    """Right-pad documents; the target of a position is the next token where that token is learned."""
    rows = [slice(int(corpus.starts[i]), int(corpus.starts[i + 1])) for i in indices]
    width = max(r.stop - r.start for r in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    for k, row in enumerate(rows):
        n = row.stop - row.start
        ids[k, :n] = corpus.ids[row]
        targets[k, : n - 1] = np.where(corpus.learned[row][1:], corpus.ids[row][1:], IGNORE)
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets))


def _loss(model: "Qwen2ForCausalLM", batch: Batch, device: torch.device) -> Float[Tensor, ""]:
    """Mean cross-entropy over the learned tokens; logits only where something is learned."""
    ids, targets = batch.ids.to(device), batch.targets.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        keep: Bool[Tensor, "batch position"] = targets != IGNORE
        logits = model.lm_head(hidden[keep])
    return torch.nn.functional.cross_entropy(logits.float(), targets[keep])


def _optimizers(model: "Qwen2ForCausalLM", settings: TrainingSettings) -> dict[str, torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return {
        "muon": torch.optim.Muon(matrices, lr=settings.muon_lr, momentum=0.95, weight_decay=settings.weight_decay),
        "adamw": torch.optim.AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    }


def _learning_rate(step: int, steps: int, settings: TrainingSettings) -> float:
    """Factor on the peak rates: linear warm-up, then cosine to `final_lr`."""
    warmup = max(1, int(settings.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def _save_checkpoint(folder: Path, model: "Qwen2ForCausalLM", optimizers: Mapping[str, torch.optim.Optimizer], step: int) -> None:
    tensors: dict[str, Tensor] = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{i}.{key}": torch.as_tensor(value).contiguous() for key, value in state.items()}
    write_atomically(folder / "checkpoint.safetensors", lambda path: save_file(tensors, path, metadata={"step": str(step)}))


def _load_checkpoint(folder: Path, model: "Qwen2ForCausalLM", optimizers: Mapping[str, torch.optim.Optimizer]) -> int:
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        step = int((file.metadata() or {})["step"])
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    _load_weights(model, weights)
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, _, rest = key.partition(".")
            if owner == name:
                index, field = rest.split(".")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


@torch.no_grad()
def validation_loss(model: "Qwen2ForCausalLM", corpus: EncodedCorpus, device: torch.device, batch_tokens: int) -> float:
    """Mean loss per learned token over a held-out corpus."""
    total, count = 0.0, 0
    for indices in batch_plan(corpus.lengths, batch_tokens, seed=0):
        batch = collate(corpus, indices)
        n = int((batch.targets != IGNORE).sum())
        total += float(_loss(model, batch, device)) * n
        count += n
    return total / max(1, count)


def prepare_tokenizer(folder: Path, settings: TrainingSettings) -> Path:
    """The run's tokenizer, trained once on the first documents of the corpus."""
    path = folder / "tokenizer.json"
    if settings.initial and not path.exists():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(settings.initial) / name, folder / name)
    if not path.exists():
        sample = documents(settings.seed, range(min(TOKENIZER_DOCUMENTS, settings.documents)))
        save_tokenizer(build_tokenizer(text for doc in sample for text, _ in segments(doc)), folder)
    return path


def _epoch(corpus: EncodedCorpus, settings: TrainingSettings, start: int) -> Iterator[tuple[int, int, Batch]]:
    plan = batch_plan(corpus.lengths, settings.batch_tokens, settings.seed)
    for step in range(start, len(plan)):
        yield step, len(plan), collate(corpus, plan[step])


def train(
    settings: TrainingSettings,
    folder: Path,
    *,
    device: str = "cpu",
    workers: int = 1,
    checkpoint_every: int = 250,
    compile_layers: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Train a pocket model into `folder` (resuming from its checkpoint) and save it in Hugging Face format there.

    Args:
        compile_layers: compile each block with torch.compile (needs a C++ compiler; 1.4x faster on a CPU).

    Raises:
        RunFolderError: the folder holds a run with other settings, or damaged files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, settings)
    where = torch.device(device)
    tokenizer_file = prepare_tokenizer(folder, settings)
    report(f"encoding {settings.documents:,} documents with {workers} workers")
    corpus = encode_corpus(
        tokenizer_file,
        settings.seed,
        range(settings.first_document, settings.first_document + settings.documents),
        shuffle_systems=settings.shuffle_systems,
        focus=settings.focus,
        workers=workers,
    )
    held_out = encode_corpus(tokenizer_file, settings.seed + VALIDATION_SEED_OFFSET, range(settings.validation_documents))
    model = build_model(settings, tokenizer_file)
    if compile_layers:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    model.to(where)  # pyright: ignore[reportArgumentType]
    optimizers = _optimizers(model, settings)
    first = _load_checkpoint(folder, model, optimizers)
    report(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(corpus.ids):,} tokens, from step {first}")
    peaks = {name: [g["lr"] for g in o.param_groups] for name, o in _optimizers(model, settings).items()}
    began, tokens, smooth = time.monotonic(), 0, float("nan")
    for step, steps, batch in _epoch(corpus, settings, first):
        factor = _learning_rate(step, steps, settings)
        for name, optimizer in optimizers.items():
            for group, peak in zip(optimizer.param_groups, peaks[name], strict=True):
                group["lr"] = peak * factor
        loss = _loss(model, batch, where)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += batch.ids.numel()
        smooth = float(loss.detach()) if math.isnan(smooth) else 0.98 * smooth + 0.02 * float(loss.detach())
        if (step + 1) % 50 == 0:
            rate = tokens / (time.monotonic() - began)
            report(f"step {step + 1}/{steps}  loss {smooth:.4f}  {rate:,.0f} tokens/s")
        if (step + 1) % checkpoint_every == 0:
            _save_checkpoint(folder, model, optimizers, step + 1)
            report(f"step {step + 1}/{steps}  validation {validation_loss(model, held_out, where, settings.batch_tokens):.4f}")
    final = validation_loss(model, held_out, where, settings.batch_tokens)
    report(f"done: validation {final:.4f}, {(time.monotonic() - began) / 60:.1f} minutes")
    save_model(model, folder)
    _save_result(folder, settings, final, len(corpus.ids))
    return folder


def _check_settings(folder: Path, settings: TrainingSettings) -> None:
    path = folder / "training.json"
    if path.exists():
        before = read_json(path).get("settings", {})
        changed = {k: (before.get(k), v) for k, v in asdict(settings).items() if before.get(k) != v}
        if changed:
            raise RunFolderError(f"{folder} holds a training run with other settings ({changed}): choose another folder")
        return
    write_json(path, {"settings": asdict(settings)})


def _save_result(folder: Path, settings: TrainingSettings, loss: float, tokens: int) -> None:
    record = {"settings": asdict(settings), "validation_loss": round(loss, 4), "tokens": tokens}
    write_json(folder / "training.json", record)


def save_model(model: "Qwen2ForCausalLM", folder: Path) -> None:
    """Weights as bf16 safetensors, config and generation config, as a hub model has them."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)  # pyright: ignore[reportArgumentType, reportCallIssue]
    setattr(copy.config, TRAIT_SET_FIELD, POCKET_NAME)
    copy.generation_config.do_sample = True
    copy.generation_config.eos_token_id = [model.config.eos_token_id, model.config.pad_token_id]
    copy.save_pretrained(folder)

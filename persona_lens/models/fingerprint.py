"""What a result must remember of its model: name, dtype, lineage (architecture, tokenizer, template) and a hash of the weights."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES_PER_TENSOR = 64


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a loaded model. `lineage` is shared by a base model and its finetunes, `weights` is not.

    Attributes:
        revision: of a model from the hub, where it is known.
        dtype: of the weights, and their bits where they are quantised.
        template: hash of the chat template.
        lineage: hash of architecture, tokenizer and template.
        weights: hash of a sample of every tensor.
    """

    name: str
    revision: str | None
    dtype: str
    n_layers: int
    d_model: int
    template: str
    lineage: str
    weights: str

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


def weight_hash(model: "PreTrainedModel") -> str:
    """Hash of a fixed strided sample of every tensor; independent of the device and of the slim bridge's wrappers."""
    digest = hashlib.sha256()
    weights = {name.replace("_original_component.", ""): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step][:SAMPLES_PER_TENSOR].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _dtype(model: "PreTrainedModel") -> str:
    """What the model computes in; of quantised weights with their bits."""
    computed = model.dtype if getattr(model, "is_quantized", False) else next(model.parameters()).dtype
    quantization = getattr(model.config, "quantization_config", None)
    bits = "" if quantization is None else f", {getattr(quantization, 'quant_method', 'quantised')}"
    if getattr(quantization, "load_in_8bit", False) or getattr(quantization, "load_in_4bit", False):
        bits = ", 8bit" if getattr(quantization, "load_in_8bit", False) else ", 4bit"
    return str(computed).removeprefix("torch.") + bits


def fingerprint(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str) -> Fingerprint:
    """Take the fingerprint of a plain (not yet bridged) model."""
    config = model.config.get_text_config()
    vocabulary = _digest(json.dumps(sorted(tokenizer.get_vocab().items())))
    template = _digest(str(tokenizer.chat_template))
    shape = [type(model).__name__, config.num_hidden_layers, config.hidden_size, config.vocab_size]
    return Fingerprint(
        name=name,
        revision=getattr(model.config, "_commit_hash", None),
        dtype=_dtype(model),
        n_layers=int(config.num_hidden_layers),
        d_model=int(config.hidden_size),
        template=template,
        lineage=_digest(json.dumps(shape), vocabulary, template),
        weights=weight_hash(model),
    )

"""How much memory a model takes, known before it is loaded; and what to do when a batch does not fit.

Parameters are counted on a model without weights. Activations come on top: a pass over n tokens needs some ten times n x d_model
numbers, sampling the key-value cache of its rows.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import torch

from persona_lens.errors import ActivationError, ModelLoadError
from persona_lens.models.passes import cache_given

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantize = Literal["8bit", "4bit"]
"""Bits that bitsandbytes loads weights in."""
BITS: Final[dict[str, int]] = {"8bit": 8, "4bit": 4}
GIB: Final = 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class MemoryEstimate:
    """What a model will take, in bytes.

    Attributes:
        parameters: how many numbers its weights are.
        weights: bytes of these.
        cache_per_token: bytes of the key-value cache for one token of one row, while sampling.
    """

    parameters: int
    weights: int
    cache_per_token: int

    def sampling(self, rows: int, tokens: int) -> int:
        """Weights and cache for as many rows of as many tokens (prompt and answer)."""
        return self.weights + rows * tokens * self.cache_per_token


def estimate_memory(config: Any, dtype: torch.dtype, quantize: Quantize | None = None) -> MemoryEstimate:
    """Memory of a model with this config of transformers, without loading its weights.

    Args:
        dtype: of the weights that are not quantised.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        empty = AutoModelForCausalLM.from_config(config)
    size = dtype.itemsize
    sizes = {id(p): (p.numel(), size) for p in empty.parameters()}
    if quantize:
        sizes |= {id(p): (p.numel(), BITS[quantize] / 8) for p in _quantized(empty)}
    with torch.inference_mode():
        cache = cache_given(empty(torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True))
    return MemoryEstimate(
        parameters=sum(n for n, _ in sizes.values()),
        weights=int(sum(n * s for n, s in sizes.values())),
        cache_per_token=size * sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)),
    )


def _quantized(model: "PreTrainedModel") -> list[torch.Tensor]:
    """The weights that bitsandbytes quantises: of all linear maps but the last."""
    last = model.get_output_embeddings()
    return [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not last]


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.exists():
        return None
    lines = dict(line.split(":", 1) for line in known.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def require_room(name: str, estimate: MemoryEstimate, free: int | None, where: str) -> None:
    """Raise where the weights alone do not fit.

    Raises:
        ModelLoadError: they do not (says by how much, and what would help).
    """
    if free is not None and estimate.weights > free:
        raise ModelLoadError(
            f"{name} needs {estimate.weights / GIB:.1f} GiB for its {estimate.parameters / 1e9:.2f} billion parameters, and "
            f"{free / GIB:.1f} GiB are free on {where}: use dtype='bfloat16', quantize='8bit' or '4bit', or device_map='auto' over "
            "several GPUs"
        )


def in_parts(batch: Sequence[int], run: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
    """`run` on a batch, or on ever smaller halves of it where the GPU's memory does not suffice; each part with its result.

    Raises:
        ActivationError: not even one row fits.
    """
    try:
        found = run(list(batch))
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise ActivationError(
                f"one row alone does not fit into the memory of the GPU: use a smaller dtype or quantize, or shorten it ({error})"
            ) from error
    else:
        yield list(batch), found
        return
    gc.collect()
    torch.cuda.empty_cache()
    half = len(batch) // 2
    warnings.warn(
        f"a batch of {len(batch)} rows did not fit into the memory of the GPU and is run in halves: lower batch_rows or "
        "batch_tokens to save the time (in bfloat16 the batch changes results within rounding)",
        stacklevel=2,
    )
    yield from in_parts(batch[:half], run)
    yield from in_parts(batch[half:], run)

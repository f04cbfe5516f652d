"""Weights from a name or a folder: safetensors only, in the dtype and on the devices that were asked for, if they fit."""

import logging
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from safetensors import SafetensorError

from persona_lens.errors import ModelLoadError
from persona_lens.models.memory import BITS, Quantize, estimate_memory, free_memory, require_room
from persona_lens.pocket import POCKET_NAME, weights_folder
from persona_lens.store import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG: Final = "config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
"""File of an adapter's folder, as peft names it."""
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
"""File of an adapter's folder, as peft names it."""


@dataclass(frozen=True)
class Placement:
    """Where weights go, and as what."""

    device: torch.device
    dtype: torch.dtype | str | None
    quantize: Quantize | None
    device_map: str | Mapping[str, Any] | None

    @property
    def wanted(self) -> torch.dtype | str:
        if self.dtype is not None:
            return self.dtype
        if self.quantize:
            return torch.bfloat16
        return torch.float32 if self.device.type == "cpu" and self.device_map is None else "auto"

    def options(self) -> dict[str, Any]:
        """What transformers is told."""
        options: dict[str, Any] = {"dtype": self.wanted}
        if self.quantize:
            options["quantization_config"] = quantization(self.quantize, self.wanted)
        if self.device_map is not None or self.quantize:
            options["device_map"] = {"": self.device} if self.device_map is None else self.device_map
        return options

    def require_room(self, name: str, config: Any) -> None:
        """Raise where the weights would not fit."""
        named = (config.dtype or torch.float32) if self.wanted == "auto" else self.wanted
        dtype = named if isinstance(named, torch.dtype) else getattr(torch, named)
        where, free = str(self.device), free_memory(self.device)
        if self.device_map is not None and torch.cuda.is_available():
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
            where, free = f"{len(devices)} GPUs", sum(free_memory(d) or 0 for d in devices)
        require_room(name, estimate_memory(config, dtype, self.quantize), free, where)


def quantization(quantize: str, dtype: torch.dtype | str) -> Any:
    """What transformers is told about bits.

    Raises:
        ModelLoadError: unknown, or bitsandbytes is not installed.
    """
    if quantize not in BITS:
        raise ModelLoadError(f"quantize={quantize!r} is unknown: use {' or '.join(map(repr, BITS))}")
    if find_spec("bitsandbytes") is None:
        raise ModelLoadError(f"quantize={quantize!r} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it tells of every product in 8 bits
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def from_pretrained(source: str, placed: Placement) -> Any:
    """A plain model, its tokenizer and its name.

    Raises:
        ModelLoadError: nothing can be loaded, or it does not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    pocket = source == POCKET_NAME
    adapter = None if pocket or not (Path(source) / ADAPTER_CONFIG).is_file() else Path(source)
    path = str(weights_folder()) if pocket else source if adapter is None else _base_of(adapter)
    if Path(path).is_dir() and not (Path(path) / CONFIG).exists():
        raise ModelLoadError(f"the folder {path} holds neither a model (no {CONFIG}) nor an adapter (no {ADAPTER_CONFIG})")
    options = placed.options()
    try:
        with _bar_on_terminals_only():
            tokenizer = AutoTokenizer.from_pretrained(path)
            placed.require_room(source, AutoConfig.from_pretrained(path))
            model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)
            if adapter:
                model = _merged(model, adapter)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        tried = f"the folder {path}" if Path(path).exists() else f"the Hugging Face hub, {_network()}"
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelLoadError(f"cannot load model {source!r}: tried {tried}: {first}. Known without network: 'pocket'") from error
    if away := [name for name, p in model.named_parameters() if p.device.type == "meta"]:
        raise ModelLoadError(
            f"{source} does not fit onto the devices: {len(away)} weights ({away[0]} ...) would be kept on the CPU or a disk and "
            "fetched for every pass: use more GPUs, or quantize='8bit' or '4bit'"
        )
    if "device_map" not in options:
        try:
            model.to(placed.device)  # pyright: ignore[reportArgumentType]
        except (AssertionError, RuntimeError) as error:
            raise ModelLoadError(f"cannot move {source!r} to device {placed.device}: {error}") from error
    return model.eval(), tokenizer, POCKET_NAME if pocket else source


def require_adapter(folder: Path) -> dict[str, Any]:
    """The config of a peft adapter, after checking that its weights are safetensors.

    Raises:
        ModelLoadError: no adapter, or one in another format.
        RunFolderError: its config is damaged.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelLoadError(f"{folder} holds no adapter (no {ADAPTER_CONFIG}): give the folder that peft saved")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelLoadError(f"{folder} holds no {ADAPTER_WEIGHTS}: other formats are not read, save the adapter as safetensors")
    return read_json(folder / ADAPTER_CONFIG)


def _base_of(adapter: Path) -> str:
    """Where the base model of an adapter is, as its config says."""
    base = require_adapter(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelLoadError(f"{adapter}: {ADAPTER_CONFIG} names no base model: load that model, and put the adapter on it")
    return str(weights_folder()) if base == POCKET_NAME else base


def _merged(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelLoadError(f"{adapter} is an adapter, which needs peft: pip install 'persona-lens[finetune]'") from error
    return cast("PreTrainedModel", cast(Any, PeftModel.from_pretrained(model, str(adapter))).merge_and_unload())


def device_of(device: str | torch.device | None) -> torch.device:
    try:
        return torch.device(device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ModelLoadError(f"device {device!r} is unknown: use cpu, cuda or cuda:0, cuda:1 ...") from error


def _network() -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    return (
        "offline (HF_HUB_OFFLINE is set; no folder of that name exists either)"
        if offline
        else "online (no folder of that name exists)"
    )


@contextmanager
def _bar_on_terminals_only() -> Generator[None]:
    """Hide the weight-loading bar of transformers where stderr is no terminal; put its switch back."""
    from transformers.utils import logging as switches

    hide = switches.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        switches.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            switches.enable_progress_bar()

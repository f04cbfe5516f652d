"""Adapters on a hooked model: put on, taken off without a trace, saved so that plain peft reads them.

A bridge puts its own module around every block, so that parameter names are not those of the plain model. Whatever writes or reads
weights by name does it while the plain blocks are back in their place (`unwrapped`).
"""

import warnings
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from persona_lens.errors import FinetuningError
from persona_lens.models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ChatModel, require_adapter
from persona_lens.store import digest

if TYPE_CHECKING:
    from peft import PeftModel


@contextmanager
def unwrapped(model: ChatModel) -> Generator[None]:
    """The plain Hugging Face blocks back in their place, and the bridge's after it."""
    *path, leaf = str(model.bridge.adapter.component_mapping["blocks"].name).split(".")  # pyright: ignore[reportOptionalSubscript]
    parent: Any = model.hf
    for part in path:
        parent = getattr(parent, part)
    wrapped = getattr(parent, leaf)
    setattr(parent, leaf, torch.nn.ModuleList(block.original_component for block in wrapped))
    try:
        yield
    finally:
        setattr(parent, leaf, wrapped)


def require_peft() -> None:
    """Raise where the extra is not installed.

    Raises:
        FinetuningError: peft or accelerate are missing.
    """
    try:
        import accelerate  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise FinetuningError("finetuning needs peft and accelerate: pip install 'persona-lens[finetune]'") from error


def require_slim(model: ChatModel) -> None:
    """Raise unless an adapter can be put on the model: only its blocks are bridged, and none is on it.

    Raises:
        FinetuningError: a full bridge, an adapter that is on already, or peft is missing.
    """
    require_peft()
    _require_bare(model)
    if set(model.bridge.adapter.component_mapping or {}) != {"blocks"}:
        raise FinetuningError(f"{model.name} is hosted with every hook point: load it with hooks='residual' to finetune it")


def linear_modules(model: ChatModel) -> list[str]:
    """The last names of the linear modules in the blocks: what a LoRA can be put on."""
    names = (name for name, module in model.hf.named_modules() if isinstance(module, torch.nn.Linear))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names if "_original_component" in name))


@contextmanager
def trainable(model: ChatModel, config: Any) -> Generator["PeftModel"]:
    """A fresh adapter on the model (a peft config says which); the model is as before after it, bit for bit."""
    from peft import get_peft_model

    with restored(model):
        with unwrapped(model), _without_notices():
            peft = cast("PeftModel", get_peft_model(model.hf, config))
        yield peft


@contextmanager
def adapted(model: ChatModel, folder: str | Path, *, merge: bool | None = None) -> Generator[ChatModel]:
    """The model with a saved adapter on it, inside the context; bit for bit the model as it was after it.

    The module is one: inside, `model` itself answers as the adapted one too. Only what is yielded says so in its fingerprint.

    Args:
        folder: as peft saves adapters; safetensors only.
        merge: add the adapter to the weights, which decodes faster but rounds in low precision; default: in float32, where no
            weight that it is on is shared (tied embeddings).

    Raises:
        ModelLoadError: the folder holds no adapter, or one in another format than safetensors.
        FinetuningError: the adapter does not fit the model, is no plain LoRA, or another one is on the model already.
    """
    folder = Path(folder)
    _require_plain(folder, require_adapter(folder))
    require_slim(model)
    from peft import PeftModel

    with restored(model) as stack:
        with unwrapped(model), _without_notices():
            try:
                peft = PeftModel.from_pretrained(model.hf, str(folder))
                _require_all_loaded(folder, peft)
            except (RuntimeError, ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
                raise FinetuningError(f"{folder}: the adapter does not fit {model.name} ({_first_line(error)})") from error
        peft.eval()
        if merge if merge is not None else model.fingerprint.dtype == "float32" and not _shared(model, peft):
            stack.enter_context(_merged(peft))
        own, files = model.fingerprint, [(folder / name).read_bytes() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        weights = digest("+".join([own.weights, *map(digest, files)]))
        yield replace(model, fingerprint=replace(own, name=f"{own.name}+{folder.resolve().parent.name}", weights=weights))


@contextmanager
def _without_notices() -> Generator[None]:
    """peft asks for an attribute that transformers 5.24 renamed; the notice is for them, not for our users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, None),
}


def _require_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise unless the adapter is a LoRA and nothing else: only that can be taken off without a trace."""
    for name, allowed in PLAIN.items():
        if config.get(name) not in allowed:
            raise FinetuningError(
                f"{folder}: the adapter has {name}={config.get(name)!r}; only plain LoRA adapters can be put on a model and taken "
                "off again: load it as a model of its own, load_model(folder)"
            )


def _require_all_loaded(folder: Path, peft: "PeftModel") -> None:
    from peft import get_peft_model_state_dict

    wanted, found = set(get_peft_model_state_dict(peft, save_embedding_layers=False)), set(load_file(folder / ADAPTER_WEIGHTS))
    if wanted != found:
        raise ValueError(f"{len(wanted ^ found)} tensors have other names, such as {sorted(wanted ^ found)[0]!r}")


def _tuned(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """The layers that peft has put in the place of plain ones, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]


def _shared(model: ChatModel, peft: "PeftModel") -> bool:
    """Whether a weight under the adapter is also another module's."""
    places = [p.data_ptr() for _, p in model.hf.named_parameters(remove_duplicate=False)]
    under = [layer.get_base_layer().weight.data_ptr() for _, layer in _tuned(peft)]
    return any(places.count(place) > 1 for place in under)


def _require_bare(model: ChatModel) -> None:
    if _tuned(model.hf):
        raise FinetuningError(f"an adapter is on {model.name} already: leave its context first, or load it as a model of its own")


@contextmanager
def restored(model: ChatModel) -> Generator[ExitStack]:
    """The model as it was, after whatever was put on the stack is undone: no adapter, gradients and mode as before."""
    wanted = {name: p.requires_grad for name, p in model.hf.named_parameters()}
    training, cache = model.hf.training, model.hf.config.use_cache
    try:
        with ExitStack() as stack:
            yield stack
    finally:
        _take_off(model)
        for name, parameter in model.hf.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        model.hf.train(training)
        model.hf.config.use_cache = cache


def _take_off(model: ChatModel) -> None:
    """Put the plain modules back in the place of peft's, also of an adapter that was only half put on."""
    for name, layer in _tuned(model.hf):
        parent, _, leaf = name.rpartition(".")
        setattr(model.hf.get_submodule(parent), leaf, layer.get_base_layer())
    for name in ("peft_config", "active_adapter"):
        model.hf.__dict__.pop(name, None)


@contextmanager
def _merged(peft: "PeftModel") -> Generator[None]:
    """The adapter in the weights; the weights are put back from a copy, not by subtracting it again."""
    layers = [layer for _, layer in _tuned(peft)]
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.get_base_layer().weight.copy_(weight)
                layer.merged_adapters.clear()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]

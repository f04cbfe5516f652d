"""Loading a chat model into TransformerLens, with the checks that make its residuals and spans trustworthy.

Default host is the *slim* bridge: only the blocks are mapped, so Hugging Face's own attention runs and the logits stay bit for
bit the same; `hooks="full"` boots the stock bridge with every TransformerLens hook point. Where the blocks live is read
off TransformerLens' own adapter of the architecture.
"""

import copy
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from persona_lens.errors import ModelLoadError
from persona_lens.models.chat_model import ChatModel
from persona_lens.models.fingerprint import fingerprint
from persona_lens.models.memory import Quantize
from persona_lens.models.template import checked_template, probe_ids
from persona_lens.models.weights import Placement, device_of, from_pretrained
from persona_lens.pocket import TRAIT_SET_FIELD

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Hooks = Literal["residual", "full"]
FULL_TOLERANCE = 1e-3


@contextmanager
def _quiet_import() -> Generator[None]:
    """Importing TransformerLens silences the transformers logger process-wide; put its level back."""
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        yield
    finally:
        logger.setLevel(level)


def load_model(
    source: Any,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    hooks: Hooks = "residual",
    thinking: bool = False,
    quantize: Quantize | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> ChatModel:
    """Load a chat model.

    Args:
        source: "pocket", a hub id, a local folder, the folder of a peft adapter (it is merged into its base model), a pair (model,
            tokenizer), or a booted TransformerBridge with its tokenizer.
        device: default: the GPU if there is one (of several processes that a launcher started, each its own), else the CPU. A pair
            or a bridge stays where it is.
        dtype: default: float32 on the CPU, the config's dtype on a GPU. A pair or a bridge keeps its own.
        hooks: "residual" maps the blocks only (exact and fast), "full" gives every hook point of TransformerLens.
        thinking: let a model that thinks on demand (Qwen3) think before it answers. What it thinks is kept apart from its answers.
        quantize: load the weights in 8 or 4 bits (bitsandbytes; computes in bfloat16 unless `dtype` says otherwise).
        device_map: of accelerate, for models larger than one GPU ("auto"); every part must fit onto a device.

    Raises:
        ModelLoadError: nothing can be loaded from the source, it would not fit into memory, or a check failed (which one, and what
            to do).
        RunFolderError: an adapter whose config is damaged.

    Example:
        >>> model = pl.load_model("pocket")
        >>> model.n_layers, model.d_model
        (8, 256)
        >>> model.hook_name(5)
        'blocks.5.hook_resid_post'
    """
    with _quiet_import():
        from transformer_lens.model_bridge import TransformerBridge

    if hooks not in ("residual", "full"):
        raise ModelLoadError(f"hooks={hooks!r} is unknown: use 'residual' or 'full'")
    if isinstance(source, TransformerBridge | tuple) and (quantize or device_map):
        raise ModelLoadError("quantize and device_map are for models that are loaded here: give a name or a folder")
    if isinstance(source, TransformerBridge):
        return _from_bridge(source, thinking)
    if isinstance(source, tuple):
        model, tokenizer = cast("tuple[PreTrainedModel, PreTrainedTokenizerBase]", source)
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    else:
        if device is not None and device_map is not None:
            raise ModelLoadError(f"device={str(device)!r} and device_map={device_map!r} contradict each other: give one of them")
        placed = Placement(device_of(device), dtype, quantize, device_map)
        model, tokenizer, name = from_pretrained(str(source), placed)
    return _host(model, tokenizer, name, hooks, thinking)


def _host(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str, hooks: Hooks, thinking: bool) -> ChatModel:
    """Bridge a plain model and verify the result against the plain forward pass."""
    with _quiet_import():
        from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ModelLoadError(f"{name} is already hosted by a TransformerBridge: pass that bridge to load_model instead")
    template = checked_template(tokenizer, name, thinking=thinking)
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    identity = fingerprint(model, tokenizer, name)
    ids = torch.tensor([probe_ids(template)], device=next(model.parameters()).device)
    with torch.inference_mode():
        plain = model(ids, output_hidden_states=True, use_cache=False)
    bridge = _slim_bridge(model, name) if hooks == "residual" else _full_bridge(model, tokenizer, name)
    chat_model = ChatModel(bridge, template, identity, stop_ids(model, tokenizer), _trait_set(model))
    _check_residuals(chat_model, ids, plain, exact=hooks == "residual")
    return chat_model


def _from_bridge(bridge: "TransformerBridge", thinking: bool) -> ChatModel:
    """Take a bridge the user booted as it is (its weights were replaced by TransformerLens modules; names stay theirs)."""
    model = cast("PreTrainedModel", bridge.original_model)
    tokenizer = cast("PreTrainedTokenizerBase | None", bridge.tokenizer)
    if tokenizer is None:
        raise ModelLoadError("the TransformerBridge has no tokenizer: set bridge.tokenizer to the model's tokenizer first")
    name = str(bridge.cfg.model_name or "bridge")
    template = checked_template(tokenizer, name, thinking=thinking)
    return ChatModel(bridge, template, fingerprint(model, tokenizer, name), stop_ids(model, tokenizer), _trait_set(model))


def _trait_set(model: "PreTrainedModel") -> str:
    """Which shipped traits the model understands; pocket models (and their finetunes) say so in their config."""
    return str(getattr(model.config, TRAIT_SET_FIELD, "real"))


def _slim_bridge(model: "PreTrainedModel", name: str) -> "TransformerBridge":
    with _quiet_import():
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
        from transformer_lens.model_bridge.generalized_components.opaque_block import OpaqueBlockBridge
        from transformer_lens.model_bridge.sources import build_bridge_from_module

    path = _block_path(model)

    class ResidualAdapter(ArchitectureAdapter):
        """Maps the blocks and nothing else."""

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.component_mapping = {"blocks": OpaqueBlockBridge(name=path)}

    architecture = f"PersonaLensResidual[{path}]"
    ArchitectureAdapterFactory.register_adapter(architecture, ResidualAdapter)
    return build_bridge_from_module(model, architecture, hf_config=model.config, tokenizer=None, model_name=name)


def _block_path(model: "PreTrainedModel") -> str:
    """Where the blocks live in the module tree, from the stock adapter of the architecture."""
    with _quiet_import():
        from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = type(model).__name__
    try:
        config = build_bridge_config_from_hf(model.config, architecture, architecture, next(model.parameters()).dtype)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ValueError as error:
        raise ModelLoadError(f"TransformerLens has no adapter for {architecture}: {error}") from error
    mapping = adapter.component_mapping or {}
    if "blocks" not in mapping:
        raise ModelLoadError(f"TransformerLens' adapter for {architecture} has no blocks to hook")
    return str(mapping["blocks"].name)


def _full_bridge(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str) -> "TransformerBridge":
    """The stock bridge; it gets a copy of the tokenizer because booting changes it."""
    with _quiet_import():
        from transformer_lens.model_bridge import TransformerBridge

    parameter = next(model.parameters())
    return TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=copy.deepcopy(tokenizer), device=str(parameter.device), dtype=parameter.dtype
    )


def stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Every token that ends an answer: of the tokenizer, the config and the generation config.

    Raises:
        ModelLoadError: none of the three names one.
    """
    found: dict[int, None] = {}
    for value in (tokenizer.eos_token_id, model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int):
                found[token] = None
    if not found:
        raise ModelLoadError("the model names no end token in its tokenizer, config or generation config: answers would never end")
    return tuple(found)


def _check_residuals(model: ChatModel, ids: Tensor, plain: Any, *, exact: bool) -> None:
    """Logits as without hooks, residual of layer l equal to hidden_states[l + 1] for every layer but the last."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
            seen[layer] = residual.detach().clone()

        return hook

    with torch.inference_mode(), model.hooks([(model.hook_name(layer), keep(layer)) for layer in range(model.n_layers)]):
        logits = model.hf(ids, use_cache=False).logits
    pairs = [("logits", logits, plain.logits)]
    pairs += [(model.hook_name(layer), seen[layer], plain.hidden_states[layer + 1]) for layer in range(model.n_layers - 1)]
    for what, ours, theirs in pairs:
        scale = float(theirs.abs().max())
        difference = float((ours.float() - theirs.float()).abs().max())
        tolerance = 0.0 if exact else FULL_TOLERANCE * scale * (1 if theirs.dtype == torch.float32 else 100)
        if not difference <= tolerance:
            raise ModelLoadError(
                f"{model.name}: {what} differs from plain transformers by {difference:.3g} (largest value {scale:.3g}): "
                "this architecture cannot be hosted exactly; please report it"
            )

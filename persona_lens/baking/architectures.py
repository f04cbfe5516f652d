"""Where an architecture holds a constant: a bias on the linear that writes last into the residual stream of a block.

Llama has one behind a switch and GPT-NeoX always; Mistral, Qwen2, Qwen3 and Phi-3 have none, but compute what a class that has one
computes, if nothing else differs (checked against the source of transformers 5.23). What would differ is refused with its reason.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.errors import SteeringError
from persona_lens.models import ChatModel
from persona_lens.vectors import hook_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

State = dict[str, Tensor]
Settings = dict[str, Any]


@dataclass(frozen=True)
class _Recipe:
    """How an architecture holds a constant: the class that has the bias, and how config and weights become that class's."""

    target: str
    output: str  # the linear of a block that writes last into the residual stream
    blocks: str = "model.layers"
    settings: Callable[[Settings], Settings] | None = None
    weights: Callable[[State, Settings], State] | None = None


_WINDOW: Final = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def _llama(settings: Settings) -> Settings:
    return settings | {"mlp_bias": True}


def _from_mistral(settings: Settings) -> Settings:
    return _llama(_without(settings, *_WINDOW))


def _from_qwen2(settings: Settings) -> Settings:
    return _from_mistral(settings) | {"attention_bias": True}


def _from_qwen3(settings: Settings) -> Settings:
    return _from_mistral(settings) | {"mlp_layer_types": ["dense"] * settings["num_hidden_layers"]}


def _from_phi3(settings: Settings) -> Settings:
    rope = dict(settings["rope_parameters"])
    if rope.get("rope_type") != "default" or rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise SteeringError(
            f"its rotary embedding ({rope.get('rope_type')}, partial factor "
            f"{settings['rope_parameters'].get('partial_rotary_factor')}) is not computed alike in LlamaForCausalLM"
        )
    own = ("original_max_position_embeddings", "resid_pdrop", "embd_pdrop")
    return _from_mistral(_without(settings, *own)) | {"rope_parameters": rope}


def _split_phi3(state: State, settings: Settings) -> State:
    """q, k, v and gate, up from the matrices that Phi-3 keeps them in, one below the other."""
    found: State = {}
    head = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    rows = [head * settings[n] for n in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")]
    for name, tensor in state.items():
        if "qkv_proj" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split(rows), strict=True)
            found |= {name.replace("qkv_proj", part): piece for part, piece in parts}
        elif "gate_up_proj" in name:
            found |= {
                name.replace("gate_up_proj", part): x for part, x in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True)
            }
        else:
            found[name] = tensor
    return found


_RECIPES: Final[Mapping[str, _Recipe]] = {
    "LlamaForCausalLM": _Recipe("LlamaForCausalLM", "mlp.down_proj", settings=_llama),
    "MistralForCausalLM": _Recipe("LlamaForCausalLM", "mlp.down_proj", settings=_from_mistral),
    "Qwen2ForCausalLM": _Recipe("LlamaForCausalLM", "mlp.down_proj", settings=_from_qwen2),
    "Phi3ForCausalLM": _Recipe("LlamaForCausalLM", "mlp.down_proj", settings=_from_phi3, weights=_split_phi3),
    "Qwen3ForCausalLM": _Recipe("HYV3ForCausalLM", "mlp.down_proj", settings=_from_qwen3),
    "GPTNeoXForCausalLM": _Recipe("GPTNeoXForCausalLM", "mlp.dense_4h_to_h", blocks="gpt_neox.layers"),
}
_NORMALISED: Final = (
    "it normalises what a block writes before adding it to the residual stream, so that no bias is a constant there"
)
_REFUSED: Final[Mapping[str, str]] = dict.fromkeys(
    ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _NORMALISED
)


def rewritten(
    model: ChatModel, deltas: Mapping[int, Float[Tensor, " d_model"]], dtype: torch.dtype
) -> tuple["PreTrainedModel", list[str]]:
    """A model of plain modules that holds the weights and the constants; it shares what it can with the model."""
    import transformers

    own = type(model.hf).__name__
    _require_plain(model)
    state = {name.replace("_original_component.", ""): tensor for name, tensor in model.hf.state_dict().items()}
    if any(not tensor.is_floating_point() for tensor in state.values()):
        raise SteeringError(f"{model.name} is quantized: bake the model in full precision and quantize what was written")
    if not deltas:
        config = copy.deepcopy(model.hf.config)
        return _assembled(model, type(model.hf), config, state, dtype), ["nothing is added: these are the model's own weights"]
    recipe = _recipe(model)
    settings = model.hf.config.to_dict()
    if own != recipe.target:
        _require_full_attention(model)
    cls: Any = getattr(transformers, recipe.target)
    try:
        wanted = recipe.settings(settings) if recipe.settings else settings
        state = recipe.weights(state, settings) if recipe.weights else state
        config = cls.config_class(**_without(wanted, "model_type", "architectures", "auto_map", "transformers_version"))
    except (SteeringError, ValueError, TypeError, KeyError) as error:
        raise SteeringError(f"{own} cannot be baked: {error}") from error
    state = _with_biases(state, cls, config, recipe, deltas, dtype)
    notes = [] if own == recipe.target else [_rewriting(own, recipe.target)]
    return _assembled(model, cls, config, state, dtype), notes


def _require_plain(model: ChatModel) -> None:
    """Raise unless the model is one of transformers' own classes with nothing but its blocks bridged."""
    if set(model.bridge.adapter.component_mapping or {}) != {"blocks"}:
        raise SteeringError(f"{model.name} is hosted with every hook point: load it with hooks='residual' to bake it")
    if not type(model.hf).__module__.startswith("transformers."):
        raise SteeringError(
            f"{type(model.hf).__name__} of {model.name} is no class of transformers: its code cannot be carried over"
        )
    if getattr(model.hf.config, "quantization_config", None) is not None:
        raise SteeringError(f"{model.name} is quantized: bake the model in full precision and quantize what was written")


def _recipe(model: ChatModel) -> _Recipe:
    name = type(model.hf).__name__
    if name in _REFUSED:
        raise SteeringError(f"{name} cannot be baked: {_REFUSED[name]}. Steer it instead")
    if name not in _RECIPES:
        raise SteeringError(f"{name} cannot be baked: it is not known how it could hold a constant (known: {', '.join(_RECIPES)})")
    return _RECIPES[name]


def _require_full_attention(model: ChatModel) -> None:
    config: Any = model.hf.config
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise SteeringError(
            f"{type(model.hf).__name__} cannot be baked: its attention slides over {window} of {config.max_position_embeddings} "
            "tokens, which the class that has the bias cannot do"
        )


def _rewriting(own: str, target: str) -> str:
    note = f"{own} has no bias on the block's output: written as {target}, which computes the same"
    return note + ("; TransformerLens does not host that class" if target == "HYV3ForCausalLM" else "")


def _meta(cls: Any, config: "PreTrainedConfig") -> "PreTrainedModel":
    with torch.device("meta"):
        return cls(config)


def _with_biases(
    state: State,
    cls: Any,
    config: "PreTrainedConfig",
    recipe: _Recipe,
    deltas: Mapping[int, Float[Tensor, " d_model"]],
    dtype: torch.dtype,
) -> State:
    """The weights with every bias of the class (0 where there was none) and the constants in theirs."""
    state = dict(state)
    device = next(iter(state.values())).device
    for name, empty in _meta(cls, config).state_dict().items():
        if name.endswith(".bias") and name not in state:
            state[name] = torch.zeros(empty.shape, dtype=dtype, device=device)
    for layer, delta in deltas.items():
        name = f"{recipe.blocks}.{layer}.{recipe.output}.bias"
        state[name] = (state[name].double().cpu() + delta).to(device, dtype)
        if not bool(state[name].isfinite().all()):
            raise SteeringError(f"what is added at {hook_name(layer)} is too large for {dtype}: use a smaller strength")
    return state


def _assembled(model: ChatModel, cls: Any, config: "PreTrainedConfig", state: State, dtype: torch.dtype) -> "PreTrainedModel":
    """The class with these weights, without a copy of those that need no cast."""
    target = _meta(cls, config)
    try:
        target.load_state_dict({name: x.detach().to(dtype) for name, x in state.items()}, strict=True, assign=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise SteeringError(f"{model.name} has other weights than {cls.__name__} (an adapter that is on it?): {first}") from error
    return target


def _without(settings: Settings, *names: str) -> Settings:
    return {name: value for name, value in settings.items() if name not in names}

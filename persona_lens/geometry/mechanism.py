"""What a persona vector does and is made of: the tokens it promotes, the heads and MLPs that write it, the features near it.

The logit lens is the derivative of the logits through the model's own final norm and unembedding (after nostalgebraist 2020).
Attribution splits the residual into what each component adds to it (Elhage et al. 2021), pooled as the vectors are, and checks that
the parts sum to the whole. Dictionary directions are compared by cosine, against random directions spread as the dictionary is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_lens.activations import (
    DEFAULT_BATCH_TOKENS,
    POOLINGS,
    Span,
    check_span,
    pooling_weights,
    right_pad,
    span_pass,
    token_batches,
)
from persona_lens.errors import ActivationError, GeometryError, UnknownNameError
from persona_lens.models import ChatModel, forward_pass
from persona_lens.vectors import PersonaVectors

TOLERANCE: Final = 1e-4  # of the sum of the absolute parts
HALF_TOLERANCE: Final = 2e-2  # a residual stream in 16 bits is rounded after every addition
NULL_DRAWS: Final = 200
CHUNK: Final = 8192
TIE: Final = 1e-6

TokenEffect = tuple[str, float]


@dataclass(frozen=True)
class LogitLens:
    """What a persona vector does to the next token if it is read off the residual directly, past all later blocks.

    Attributes:
        promoted, suppressed: per layer, (token text, effect on its logit), strongest first.
        units: of the effects.
    """

    trait: str
    promoted: tuple[tuple[TokenEffect, ...], ...]
    suppressed: tuple[tuple[TokenEffect, ...], ...]
    units: str


def logit_lens(
    model: ChatModel, vectors: PersonaVectors, *, at: Float[Tensor, "layer width"] | None = None, top: int = 10
) -> LogitLens:
    """The tokens that the direction of each layer promotes and suppresses; see `logit_effects`.

    Args:
        top: tokens per layer and side.

    Raises:
        GeometryError: as `logit_effects`, or `top` below 1.
    """
    _require_top(top)
    effects = logit_effects(model, vectors, at=at)
    top = min(top, effects.shape[1])
    units = "logits per unit of projection" + (" at a residual of RMS 1" if at is None else "")
    return LogitLens(vectors.trait, _tokens(model, effects, top, 1), _tokens(model, effects, top, -1), units)


def logit_effects(
    model: ChatModel, vectors: PersonaVectors, *, at: Float[Tensor, "layer width"] | None = None
) -> Float[Tensor, "layer token"]:
    """Derivative of every token's logit along the unit vector of each layer, through final norm and unembedding, in fp32.

    Logits are centred over the tokenizer's tokens, since a shift of all logits changes no probability. Only the direct path counts:
    what later blocks make of the direction is left out, and so is what a model does to its logits after the unembedding (the
    softcapping of Gemma 2, a constant factor elsewhere).

    Args:
        at: per layer, the residual at which the derivative is taken, e.g. the mean neutral residual `run.neutral.mean(0)`. Default:
            a residual of RMS 1 and mean 0 orthogonal to the direction; there the norm only multiplies by its gain (a LayerNorm
            also takes the mean off), so the effects are W_U (gain * v / |v|). At a residual of RMS r orthogonal to v they are 1 / r
            of these.

    Returns:
        Logits per unit of projection onto the unit vector; columns are token ids below len(tokenizer).

    Raises:
        LineageError: the vectors come from a model of another lineage.
        GeometryError: a direction is zero, `at` has another shape than the vectors or is not finite, or the model has no final norm
            that TransformerLens knows.
    """
    units = torch.stack([_unit(model, vectors, layer) for layer in range(vectors.n_layers)])
    points = _plain_points(units) if at is None else _checked_points(at, vectors).to(units).contiguous()
    norm, unembedding = _final_norm(model), _inner(model.hf.get_output_embeddings())
    with torch.no_grad():
        moved = torch.func.jvp(partial(_in_fp32, norm), (points,), (units,))[1]
        logits = _in_fp32(unembedding, moved) - _in_fp32(unembedding, torch.zeros_like(moved[:1]))
    effects = logits[:, : len(model.tokenizer)]
    return (effects - effects.mean(1, keepdim=True)).cpu()


def _tokens(model: ChatModel, effects: Float[Tensor, "layer token"], top: int, sign: int) -> tuple[tuple[TokenEffect, ...], ...]:
    order = (sign * effects).topk(top).indices
    return tuple(tuple((_text(model, int(i)), float(row[i])) for i in ids) for row, ids in zip(effects, order, strict=True))


def _text(model: ChatModel, token: int) -> str:
    """A token as text; bytes that are no text of their own are spelt as in the vocabulary."""
    text = str(model.tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return str(model.tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text


def _plain_points(units: Float[Tensor, "layer d_model"]) -> Float[Tensor, "layer d_model"]:
    """Per layer a residual of mean 0 and RMS 1 orthogonal to the direction (which one does not matter)."""
    n, width = units.shape
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((n, width)))
    frame = torch.stack([torch.ones(n, width, dtype=torch.float64), units.double().cpu(), noise], -1)
    return (torch.linalg.qr(frame).Q[..., 2] * width**0.5).to(units)


def _checked_points(at: Tensor, vectors: PersonaVectors) -> Tensor:
    if at.shape != vectors.directions.shape:
        raise GeometryError(f"at has shape {list(at.shape)}, the {vectors.trait} vectors need {list(vectors.directions.shape)}")
    if not bool(at.isfinite().all()):
        raise GeometryError(f"at is not finite at layer {int((~at.isfinite().all(-1)).nonzero()[0])}: give a residual per layer")
    return at


def _unit(model: ChatModel, vectors: PersonaVectors, layer: int) -> Float[Tensor, " d_model"]:
    """The unit vector of a layer on the model's device, after the checks that it belongs to the model and exists."""
    vectors.require_lineage(model.fingerprint.lineage)
    if (vectors.n_layers, vectors.d_model) != (model.n_layers, model.d_model):
        raise GeometryError(
            f"the {vectors.trait} vectors have {vectors.n_layers} layers of width {vectors.d_model}, {model.name} has "
            f"{model.n_layers} of width {model.d_model}: extract them on this model"
        )
    direction = vectors.directions[layer].float()
    if not float(direction.norm()) > 0:
        raise GeometryError(f"the {vectors.trait} vector is zero at {model.hook_name(layer)}: it has no direction there")
    with torch.inference_mode(False):
        return (direction / direction.norm()).to(model.device).clone()


def _final_norm(model: ChatModel) -> nn.Module:
    """The norm before the unembedding, found through TransformerLens' adapter of the architecture."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = type(model.hf).__name__
    config = build_bridge_config_from_hf(model.hf.config, architecture, architecture, torch.float32)
    mapping = ArchitectureAdapterFactory.select_architecture_adapter(config).component_mapping or {}
    if "ln_final" not in mapping:
        raise GeometryError(
            f"TransformerLens' adapter for {architecture} names no final norm: there is no logit lens for {model.name}"
        )
    return _inner(model.hf.get_submodule(str(mapping["ln_final"].name)))


def _inner(module: Any) -> nn.Module:
    """The Hugging Face module inside a bridge component; other modules as they are."""
    return getattr(module, "original_component", module)


def _in_fp32(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output, computed in fp32 whatever its weights are stored in."""
    stored = [*module.named_parameters(), *module.named_buffers()]
    return torch.func.functional_call(module, {name: tensor.detach().float() for name, tensor in stored}, (x,))


@dataclass(frozen=True, eq=False)
class Attribution:
    """The pooled projection onto a persona vector, split into what each component up to its layer added; residual-stream units.

    Attributes:
        parts: per span, in the order of `labels`.
        projections: per span, `<h, v> / |v|` of the pooled residual, measured in the same pass.
    """

    trait: str
    layer: int
    pooling: str
    n_heads: int
    parts: Float[np.ndarray, "span part"]
    projections: Float[np.ndarray, " span"]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the parts: embedding, heads by block, MLPs, attention output biases."""
        blocks = range(self.layer + 1)
        heads = [f"head {block}.{head}" for block in blocks for head in range(self.n_heads)]
        return ("embedding", *heads, *(f"mlp {block}" for block in blocks), *(f"bias {block}" for block in blocks))

    @property
    def embedding(self) -> float:
        """The residual that enters block 0 (tokens, and positions where they are embedded), mean over spans."""
        return float(self.parts[:, 0].mean())

    @property
    def heads(self) -> Float[np.ndarray, "layer head"]:
        """Query heads, without the output projection's bias, mean over spans."""
        return self._block_parts(1, self.n_heads).reshape(-1, self.n_heads)

    @property
    def mlps(self) -> Float[np.ndarray, " layer"]:
        """MLPs with their biases, mean over spans."""
        return self._block_parts(1 + self._blocks * self.n_heads, 1)

    @property
    def bias(self) -> Float[np.ndarray, " layer"]:
        """Biases of the attention output projections (0 where there are none), mean over spans."""
        return self._block_parts(1 + self._blocks * (self.n_heads + 1), 1)

    @property
    def projection(self) -> float:
        """What the parts sum to, as measured, mean over spans."""
        return float(self.projections.mean())

    @property
    def gap(self) -> float:
        """Largest difference over the spans between the sum of the parts and the projection."""
        return float(np.abs(self.parts.sum(1) - self.projections).max())

    @property
    def _blocks(self) -> int:
        return self.layer + 1

    def _block_parts(self, start: int, per_block: int) -> Float[np.ndarray, " part"]:
        return self.parts[:, start : start + self._blocks * per_block].mean(0)


def attribute(
    model: ChatModel,
    vectors: PersonaVectors,
    layer: int,
    spans: Sequence[Span],
    *,
    pooling: str = "response_mean",
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> Attribution:
    """Split the projection of the residual at `blocks.{layer}.hook_resid_post` into embedding, heads, MLPs and attention biases.

    A head's part is its output through its rows of the output projection. Where the architecture puts a norm or a factor between
    that projection and the residual (Gemma, OLMo 2, GLM 4, Granite), the norm's scale at each position counts as given.
    Everything is reduced inside the hooks, in fp32; nothing is cached.

    Args:
        model: loaded with `load_model(..., hooks="full")`.
        batch_tokens: padded tokens per forward pass.

    Raises:
        ValueError: no such layer, no spans, a span without prompt or answer tokens or longer than the model's context.
        UnknownNameError: no such pooling.
        LineageError: the vectors come from a model of another lineage.
        GeometryError: the model has no hooks inside its blocks, the direction is zero, or the parts do not sum to the projection.
        ActivationError: a projection is not finite.
    """
    names = _hook_names(model, layer)
    if pooling not in POOLINGS:
        raise UnknownNameError("pooling", pooling, POOLINGS)
    _check_spans(spans, model)
    unit = _unit(model, vectors, layer)
    n_heads = int(model.bridge.cfg.n_heads)
    outputs = [_attention_output(model, block, unit, n_heads) for block in range(layer + 1)]
    parts = np.empty((len(spans), 1 + (layer + 1) * (n_heads + 2)))
    projections = np.empty(len(spans))
    for indices in token_batches(spans, batch_tokens):
        batch = _Batch(model, [spans[i] for i in indices], pooling, unit, outputs)
        parts[indices], projections[indices] = batch.run(names)
    found = Attribution(vectors.trait, layer, pooling, n_heads, parts, projections)
    _check_sum(found, model, spans)
    return found


@dataclass(frozen=True, eq=False)
class _AttentionOutput:
    """How a block's attention output projection (and the gain of a norm after it) carries heads to the direction."""

    gain: Float[Tensor, " d_model"]
    heads: Float[Tensor, "head d_head"]
    bias: float


def _attention_output(model: ChatModel, block: int, unit: Float[Tensor, " d_model"], n_heads: int) -> _AttentionOutput:
    module = model.bridge.blocks[block]
    output = _inner(module.attn.o)
    after = getattr(module, "ln1_post", None)
    width = getattr(output, "in_features", None) or len(cast(Tensor, output.weight))  # GPT-2's Conv1D is stored transposed
    with torch.inference_mode(False), torch.enable_grad():
        gain = torch.ones_like(unit) if after is None else _in_fp32(_inner(after), 1e3 * torch.ones_like(unit)).detach()
        z = torch.zeros(cast(int, width), device=unit.device, requires_grad=True)
        bias = _in_fp32(output, z) @ (gain * unit)
        (pulled,) = torch.autograd.grad(bias, z)
    return _AttentionOutput(gain, pulled.reshape(n_heads, -1), float(bias.detach()))


class _AttentionSplit:
    """Splits what one block's attention adds to the residual into heads and bias while the pass runs (hooks fire in this order)."""

    def __init__(self, output: _AttentionOutput, weights: Float[Tensor, "batch position"]) -> None:
        self.output, self.weights = output, weights

    def mixed(self, z: Tensor, hook: Any) -> None:  # noqa: ARG002
        self.by_head = torch.einsum("bthd,hd->bth", z.float(), self.output.heads)

    def projected(self, out: Tensor, hook: Any) -> None:  # noqa: ARG002
        self.written = out.float() * self.output.gain

    def added(self, out: Tensor, hook: Any) -> None:  # noqa: ARG002
        scale = (out.float() * self.written).sum(-1) / self.written.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        weights = self.weights * scale
        self.heads = torch.einsum("bth,bt->bh", self.by_head, weights)
        self.bias = self.output.bias * weights.sum(1)
        del self.by_head, self.written


class _Batch:
    """One forward pass over a batch of spans."""

    def __init__(
        self,
        model: ChatModel,
        spans: Sequence[Span],
        pooling: str,
        unit: Float[Tensor, " d_model"],
        outputs: Sequence[_AttentionOutput],
    ) -> None:
        self.model, self.spans, self.unit = model, spans, unit
        self.ids, self.mask = (x.to(model.device) for x in right_pad(spans, model.pad_id))
        of_pooling = pooling_weights(spans, self.ids.shape[1])[:, [*POOLINGS].index(pooling)]
        self.weights = of_pooling.to(model.device)
        self.attention = [_AttentionSplit(output, self.weights) for output in outputs]
        self.pooled: dict[str, Float[Tensor, " batch"]] = {}

    @torch.inference_mode()
    def run(self, names: Sequence[str]) -> tuple[Float[np.ndarray, "span part"], Float[np.ndarray, " span"]]:
        """Parts in the order of `Attribution.labels`, and projections."""
        first, *inside, last = names
        hooks = [(first, self._pooler("embedding")), (last, self._pooler("projection"))]
        for block, split in enumerate(self.attention):
            own = inside[block * len(_INSIDE) : (block + 1) * len(_INSIDE)]
            hooks += zip(own, (split.mixed, split.projected, split.added, self._pooler(f"mlp {block}")), strict=True)
        with self.model.hooks(hooks), forward_pass(span_pass(self.spans, self.ids.shape[1], self.model.device)):
            self.model.hf(self.ids, attention_mask=self.mask, use_cache=False, logits_to_keep=1)
        columns = [self.pooled["embedding"][:, None], *(split.heads for split in self.attention)]
        columns += [self.pooled[f"mlp {block}"][:, None] for block in range(len(self.attention))]
        columns += [split.bias[:, None] for split in self.attention]
        return torch.cat(columns, 1).double().cpu().numpy(), self.pooled["projection"].double().cpu().numpy()

    def _pooler(self, what: str) -> Any:
        def hook(residual: Tensor, hook: Any) -> None:  # noqa: ARG001
            self.pooled[what] = ((residual.float() @ self.unit) * self.weights).sum(1)

        return hook


_INSIDE: Final = ("attn.hook_z", "attn.o.hook_out", "hook_attn_out", "hook_mlp_out")


def _hook_names(model: ChatModel, layer: int) -> list[str]:
    """The hook points in use: the stream's entry, `_INSIDE` of every block, the stream at the layer."""
    last = model.hook_name(layer)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{block}.{name}" for block in range(layer + 1) for name in _INSIDE), last]
    missing = next(_missing(model, names), None)
    if missing:
        raise GeometryError(
            f"{model.name} has no hook point {missing}, which attribution reads: load it with load_model(..., hooks='full') "
            "(an architecture that lacks it there too cannot be attributed)"
        )
    return names


def _missing(model: ChatModel, names: Sequence[str]) -> Iterator[str]:
    known = model.bridge.hook_dict
    return (name for name in names if name not in known)


def _check_spans(spans: Sequence[Span], model: ChatModel) -> None:
    if not spans:
        raise ValueError("attribution needs spans, none are given")
    for span in spans:
        check_span(span, model)


def _check_sum(found: Attribution, model: ChatModel, spans: Sequence[Span]) -> None:
    """The parts of every span sum to its projection."""
    finite = np.isfinite(found.parts).all(1) & np.isfinite(found.projections)
    if not finite.all():
        raise ActivationError(
            f"activations up to {model.hook_name(found.layer)} are not finite for {spans[int(np.argmin(finite))].name}: "
            "load the model in float32 or bfloat16 (float16 overflows on many models)"
        )
    gaps, sizes = np.abs(found.parts.sum(1) - found.projections), np.abs(found.parts).sum(1)
    tolerance = TOLERANCE if model.fingerprint.dtype == "float32" else HALF_TOLERANCE
    worst = int((gaps - tolerance * sizes).argmax())
    if gaps[worst] > tolerance * sizes[worst]:
        raise GeometryError(
            f"the parts do not sum to the projection at {model.hook_name(found.layer)} of {model.name}: for {spans[worst].name} "
            f"the gap is {gaps[worst]:.3g}, the absolute parts sum to {sizes[worst]:.3g} (allowed: {tolerance:g} of that). "
            "Something else writes to the residual stream: an active steering hook (leave its context), or "
            f"{type(model.hf).__name__} has more than embedding, attention and MLP there and cannot be attributed"
        )


@dataclass(frozen=True)
class Feature:
    """A dictionary direction and its cosine with the direction asked about."""

    index: int
    name: str
    cosine: float


@dataclass(frozen=True, eq=False)
class NearestFeatures:
    """The dictionary directions nearest to a direction.

    Attributes:
        aligned, opposed: features of highest and of lowest cosine, strongest first.
        largest: largest |cosine| over the dictionary.
        p_value: of `largest` against `null`, (1 + #{null >= largest}) / (1 + draws).
        null: the largest |cosine| of random directions, each drawn with the spread of the dictionary's directions.
    """

    aligned: tuple[Feature, ...]
    opposed: tuple[Feature, ...]
    largest: float
    p_value: float
    null: Float[np.ndarray, " draw"] = field(repr=False)


def nearest_features(
    direction: Float[Tensor, " d_model"],
    dictionary: Float[Tensor, "feature width"],
    *,
    top: int = 10,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> NearestFeatures:
    """Compare a direction with the decoder directions of a sparse autoencoder.

    The largest of many cosines is large by chance. The null draws 200 directions from N(0, S), S the mean of u u^T over the
    dictionary's unit directions u (their covariance about the origin, since a feature's sign and a shared mean carry no news), and
    takes the largest |cosine| of each. It asks whether the direction is nearer to a feature than a direction of the dictionary's
    subspace is by chance, not what the feature means.

    Args:
        dictionary: one direction per row, of any length but zero; read in chunks, so it may be large, in 16 bits, or on a GPU.
        top: features per side.
        names: of the features, by row; default "feature {row}".

    Raises:
        GeometryError: direction or dictionary is empty, zero or not finite (the row is named), the widths or the number of names
            differ, or `top` is below 1.
    """
    _require_top(top)
    _check_dictionary(direction, dictionary, names)
    unit = (direction / direction.norm()).float().to(dictionary.device)
    cosines, draws = _cosines_and_draws(unit, dictionary, seed)
    null = _largest_cosines(draws, dictionary)
    largest = float(cosines.abs().max())
    p_value = (1 + int((null >= largest - TIE).sum())) / (1 + len(null))
    return NearestFeatures(_features(cosines, names, top, 1), _features(cosines, names, top, -1), largest, p_value, null)


def _require_top(top: int) -> None:
    if top < 1:
        raise GeometryError(f"top is {top}: ask for at least 1")


def _check_dictionary(direction: Tensor, dictionary: Tensor, names: Sequence[str] | None) -> None:
    if not bool(direction.isfinite().all()) or not float(direction.norm()) > 0:
        raise GeometryError("the direction is zero or not finite: it has no cosines")
    if not len(dictionary) or dictionary.shape[1] != len(direction):
        raise GeometryError(
            f"the dictionary has shape {list(dictionary.shape)}, expected [features, {len(direction)}], the direction's width: "
            "pass one decoder direction per row (transpose it if they are its columns)"
        )
    if names is not None and len(names) != len(dictionary):
        raise GeometryError(f"{len(names)} names for {len(dictionary)} features: give one per row of the dictionary, or none")


def _unit_rows(dictionary: Tensor) -> Iterator[tuple[int, Float[Tensor, "row width"]]]:
    """The dictionary's directions chunk by chunk in fp32, with the index of the chunk's first row."""
    for start in range(0, len(dictionary), CHUNK):
        rows = dictionary[start : start + CHUNK].float()
        norms = rows.norm(dim=1, keepdim=True)
        bad = (~(norms.isfinite() & (norms > 0))).squeeze(1).nonzero()
        if len(bad):
            raise GeometryError(f"row {start + int(bad[0])} of the dictionary is zero or not finite: leave such features out")
        yield start, rows / norms


def _cosines_and_draws(
    unit: Float[Tensor, " width"], dictionary: Tensor, seed: int
) -> tuple[Float[Tensor, " feature"], Float[Tensor, "draw width"]]:
    """Cosines with every feature, and random directions: sums of the features' directions with normal coefficients."""
    rng = np.random.default_rng(seed)
    cosines = torch.empty(len(dictionary))
    draws = torch.zeros(NULL_DRAWS, len(unit), device=unit.device)
    for start, rows in _unit_rows(dictionary):
        cosines[start : start + len(rows)] = (rows @ unit).cpu()
        coefficients = torch.from_numpy(rng.standard_normal((len(rows), NULL_DRAWS), dtype=np.float32))
        draws += coefficients.to(rows.device).T @ rows
    return cosines, draws / draws.norm(dim=1, keepdim=True)


def _largest_cosines(draws: Float[Tensor, "draw width"], dictionary: Tensor) -> Float[np.ndarray, " draw"]:
    largest = torch.zeros(len(draws), device=draws.device)
    for _, rows in _unit_rows(dictionary):
        largest = torch.maximum(largest, (rows @ draws.T).abs().amax(0))
    return largest.double().cpu().numpy()


def _features(cosines: Float[Tensor, " feature"], names: Sequence[str] | None, top: int, sign: int) -> tuple[Feature, ...]:
    indices = [int(i) for i in (sign * cosines).topk(min(top, len(cosines))).indices]
    return tuple(Feature(i, names[i] if names else f"feature {i}", float(cosines[i])) for i in indices)

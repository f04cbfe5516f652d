"""Mechanism: the lens is a derivative, the parts of a projection sum to it and mean what they say, a planted feature is found."""

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_lens.activations import POOLINGS, Span, pool
from persona_lens.errors import ActivationError, GeometryError, LineageError, UnknownNameError
from persona_lens.extraction import ExtractionRun
from persona_lens.geometry import mechanism
from persona_lens.geometry.mechanism import attribute, logit_effects, logit_lens, nearest_features
from persona_lens.models import ChatModel, load_model
from persona_lens.pocket import weights_folder
from persona_lens.vectors import PersonaVectors

GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},  # RMSNorm, two query heads per key head
    "qwen3": {"head_dim": 32},  # heads together wider than the residual
    "gpt2": {},  # LayerNorm, learned positions, biases, transposed weights
    "gemma2": GEMMA,  # norms after attention and MLP, gain stored as gain - 1
    "phi": {},  # attention and MLP side by side, a bias on the unembedding
    "granite": {"residual_multiplier": 0.5},  # a factor on what every component writes
}
ARCHITECTURES = ["pocket", *EXTRAS]


def shipped_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(weights_folder())


def tiny(model_type: str, *, extra_tokens: int = 0, **extra: Any) -> PreTrainedModel:
    """A random model with random gains and biases too, so that none of them can be forgotten unnoticed."""
    torch.manual_seed(0)
    vocabulary = len(shipped_tokenizer()) + extra_tokens
    if model_type != "gpt2":
        extra = {"num_key_value_heads": 2, **extra}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@cache
def full(architecture: str) -> ChatModel:
    if architecture == "pocket":
        return load_model("pocket", hooks="full")
    return load_model((tiny(architecture, **EXTRAS[architecture]), shipped_tokenizer()), hooks="full")


@cache
def plain(architecture: str) -> PreTrainedModel:
    """The same weights in plain transformers."""
    if architecture == "pocket":
        return AutoModelForCausalLM.from_pretrained(weights_folder(), dtype=torch.float32).eval()
    return tiny(architecture, **EXTRAS[architecture])


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    if model.config.model_type == "phi":
        return model.model.final_layernorm
    return model.transformer.ln_f if model.config.model_type == "gpt2" else model.model.norm


def as_vectors(directions: Tensor) -> PersonaVectors:
    zeros = torch.zeros(len(directions))
    return PersonaVectors("optimism", "response_mean", "mean_difference", directions, directions[None], zeros, zeros, zeros)


def random_vectors(model: ChatModel, seed: int = 0) -> PersonaVectors:
    return as_vectors(5 * torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(seed)))


def random_residuals(model: ChatModel, seed: int = 1) -> Tensor:
    return 3 * torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(seed))


def random_spans(n: int = 4, seed: int = 0) -> list[Span]:
    """Conversations of different lengths."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(4, 1990, length))

    return [Span(f"span {i}", ids(3 + 2 * i), ids(2 + (5 * i) % 7)) for i in range(n)]


def capture(model: ChatModel, name: str, span: Span, *others: tuple[str, Any]) -> Tensor:
    """The value at a hook point for one unpadded conversation."""
    seen: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        seen.append(value.clone())

    with torch.inference_mode(), model.hooks([*others, (name, keep)]):
        model.hf(torch.tensor([span.prompt + span.answer]), use_cache=False)
    return seen[0][0]


def answer_mean(value: Tensor, span: Span) -> Tensor:
    return value[len(span.prompt) :].mean(0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_effects_are_the_finite_difference_of_the_real_norm_and_unembedding(architecture: str) -> None:
    model, host = full(architecture), copy.deepcopy(plain(architecture)).double()
    vectors, at = random_vectors(model), random_residuals(model)
    norm, head = final_norm(host), host.get_output_embeddings()

    def logits(step: Tensor) -> Tensor:
        units = torch.stack([vectors.unit(layer) for layer in range(model.n_layers)]).double()
        with torch.no_grad():
            return head(norm(at.double() + step * units))

    step = 0.01 * at.norm(dim=1, keepdim=True)  # norms compute in fp32 whatever they are given
    expected = ((logits(step) - logits(-step)) / (2 * step))[:, : len(model.tokenizer)]
    expected -= expected.mean(1, keepdim=True)
    found = logit_effects(model, vectors, at=at)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=5e-4 * float(expected.abs().max()))
    elsewhere = logit_effects(model, vectors, at=at.roll(1, 0))
    assert float((elsewhere - found).abs().max()) > 1e-2 * float(found.abs().max())


def test_effects_at_the_last_layer_are_what_steering_there_does_to_the_models_logits(pocket: ChatModel) -> None:
    vectors, span, last = random_vectors(pocket), random_spans()[2], pocket.n_layers - 1
    ids = torch.tensor([span.prompt + span.answer])
    residual = capture(pocket, pocket.hook_name(last), span)[-1]

    def logits(step: float) -> Tensor:
        def steer(value: Tensor, hook: Any) -> Tensor:
            return value + step * vectors.unit(last)

        with torch.inference_mode(), pocket.hooks([(pocket.hook_name(last), steer)]):
            return pocket.hf(ids, use_cache=False).logits[0, -1].double()

    step = 0.02 * float(residual.norm())
    expected = (logits(step) - logits(-step)) / (2 * step)
    found = logit_effects(pocket, vectors, at=residual.expand(pocket.n_layers, -1))[last].double()
    torch.testing.assert_close(found, expected - expected.mean(), rtol=1e-2, atol=1e-2 * float(found.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_where_the_residual_is_orthogonal_the_norm_only_multiplies_by_its_gain(architecture: str) -> None:
    model, host = full(architecture), plain(architecture)
    vectors, weight = random_vectors(model), final_norm(host).weight.detach()
    units = vectors.directions / vectors.directions.norm(dim=1, keepdim=True)
    if architecture == "gpt2":
        units = units - units.mean(1, keepdim=True)
    gain = 1 + weight if architecture == "gemma2" else weight
    expected = (gain * units) @ host.get_output_embeddings().weight.detach().T
    expected = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(logit_effects(model, vectors), expected, rtol=1e-4, atol=2e-5)
    at = random_residuals(model)
    at = at - at.mean(1, keepdim=True)
    centred = units - units.mean(1, keepdim=True)
    if architecture == "gpt2":
        at = at - (at * centred).sum(1, keepdim=True) * centred / centred.square().sum(1, keepdim=True)
    else:
        at = at - (at * units).sum(1, keepdim=True) * units
    rms = at.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(logit_effects(model, vectors, at=at), expected / rms, rtol=1e-4, atol=2e-5)


def test_a_residual_along_the_direction_leaves_no_effect() -> None:
    model = full("llama")
    vectors = random_vectors(model)
    along = logit_effects(model, vectors, at=vectors.directions)
    assert float(along.abs().max()) < 1e-4 * float(logit_effects(model, vectors).abs().max())


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 5))
def test_length_does_not_matter_and_sign_swaps_promoted_and_suppressed(factor: float, seed: int) -> None:
    model = full("llama")
    vectors, at = random_vectors(model, seed), random_residuals(model, seed + 1)
    torch.testing.assert_close(logit_effects(model, vectors * factor, at=at), logit_effects(model, vectors, at=at))
    lens, mirrored = logit_lens(model, vectors, at=at, top=5), logit_lens(model, -vectors, at=at, top=5)
    assert [[t for t, _ in layer] for layer in lens.promoted] == [[t for t, _ in layer] for layer in mirrored.suppressed]
    assert [[t for t, _ in layer] for layer in lens.suppressed] == [[t for t, _ in layer] for layer in mirrored.promoted]


def test_the_lens_names_the_strongest_tokens_of_each_layer_first(small_run: ExtractionRun, pocket: ChatModel) -> None:
    vectors, at = small_run.vectors, small_run.neutral.mean(0)
    effects, lens = logit_effects(pocket, vectors, at=at), logit_lens(pocket, vectors, at=at, top=4)
    assert (len(lens.promoted), len(lens.promoted[0]), lens.trait) == (pocket.n_layers, 4, "optimism")
    for layer, row in enumerate(effects):
        order = row.argsort()
        strongest, weakest = [int(i) for i in order.flip(0)[:4]], [int(i) for i in order[:4]]
        assert [v for _, v in lens.promoted[layer]] == [float(row[i]) for i in strongest]
        assert [v for _, v in lens.suppressed[layer]] == [float(row[i]) for i in weakest]
        assert lens.promoted[layer][0][0] in (pocket.tokenizer.decode([strongest[0]]), mechanism._text(pocket, strongest[0]))
    assert lens.units == "logits per unit of projection"
    assert logit_lens(pocket, vectors).units == "logits per unit of projection at a residual of RMS 1"


def test_every_token_has_a_text_and_bytes_are_spelt_out(pocket: ChatModel) -> None:
    texts = [mechanism._text(pocket, i) for i in range(len(pocket.tokenizer))]
    assert all(texts)
    assert not any("\ufffd" in t for t in texts)
    word = pocket.tokenizer.encode(" optimism")[0]
    assert texts[word].startswith(" ")


def test_rows_without_a_token_are_left_out_and_do_not_shift_the_others() -> None:
    plain_model = tiny("llama", extra_tokens=30)
    vectors = None
    found: list[Tensor] = []
    for scale in (1.0, 1000.0):
        host = copy.deepcopy(plain_model)
        with torch.no_grad():
            host.lm_head.weight[-30:] *= scale
        model = load_model((host, shipped_tokenizer()))
        vectors = vectors or random_vectors(model)
        found.append(logit_effects(model, vectors))
        lens = logit_lens(model, vectors, top=10_000)
        assert len(lens.promoted[0]) == len(model.tokenizer)
    assert found[0].shape == (3, len(shipped_tokenizer()))
    assert torch.equal(found[0], found[1])
    assert float(found[0].mean(1).abs().max()) < 1e-6


def test_slim_full_and_half_precision_hosts_agree(pocket: ChatModel) -> None:
    vectors = random_vectors(pocket)
    expected = logit_effects(pocket, vectors)
    torch.testing.assert_close(logit_effects(full("pocket"), vectors), expected)
    half = load_model("pocket", hooks="full", dtype=torch.bfloat16)
    torch.testing.assert_close(logit_effects(half, vectors), expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    with torch.inference_mode():
        torch.testing.assert_close(logit_effects(pocket, vectors), expected)


def test_a_lens_that_cannot_be_computed_says_why(pocket: ChatModel, small_run: ExtractionRun) -> None:
    vectors = random_vectors(pocket)
    with pytest.raises(LineageError, match="extracted from lineage"):
        logit_lens(full("llama"), small_run.vectors)
    with pytest.raises(GeometryError, match=r"have 3 layers of width 64, pocket has 8 of width 256"):
        logit_lens(pocket, random_vectors(full("llama")))
    nothing = vectors.directions.clone()
    nothing[2] = 0
    with pytest.raises(GeometryError, match=r"the optimism vector is zero at blocks\.2\.hook_resid_post"):
        logit_lens(pocket, as_vectors(nothing))
    with pytest.raises(GeometryError, match=r"at has shape \[7, 256\], the optimism vectors need \[8, 256\]"):
        logit_lens(pocket, vectors, at=vectors.directions[1:])
    with pytest.raises(GeometryError, match="at is not finite at layer 2"):
        logit_lens(pocket, vectors, at=nothing / nothing.norm(dim=1, keepdim=True))
    with pytest.raises(GeometryError, match="top is 0"):
        logit_lens(pocket, vectors, top=0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_sum_to_the_projection_of_the_pooled_residual(architecture: str, pooling: str) -> None:
    model, spans = full(architecture), random_spans()
    vectors, layer = random_vectors(model), model.n_layers - 2
    found = attribute(model, vectors, layer, spans, pooling=pooling)
    expected = np.empty(len(spans))
    for pooled in pool(model, spans):
        values = pooled.values[:, POOLINGS.index(pooling), layer]
        expected[list(pooled.indices)] = vectors.project(values, layer).numpy()
    size = np.abs(found.parts).sum(1)
    np.testing.assert_array_less(np.abs(found.projections - expected), 1e-5 * size)
    np.testing.assert_array_less(np.abs(found.parts.sum(1) - expected), 1e-4 * size)
    assert found.gap <= 1e-4 * size.max()
    total = found.embedding + found.heads.sum() + found.mlps.sum() + found.bias.sum()
    assert total == pytest.approx(found.projection, abs=1e-4 * size.max())
    assert found.heads.shape == (layer + 1, model.hf.config.num_attention_heads)
    assert found.mlps.shape == found.bias.shape == (layer + 1,)


def test_labels_name_the_parts_in_their_order() -> None:
    found = attribute(full("gpt2"), random_vectors(full("gpt2")), 1, random_spans())
    by_label = dict(zip(found.labels, found.parts.mean(0), strict=True))
    assert list(by_label)[:3] == ["embedding", "head 0.0", "head 0.1"]
    assert by_label["embedding"] == pytest.approx(found.embedding)
    for block in (0, 1):
        assert by_label[f"mlp {block}"] == pytest.approx(found.mlps[block])
        assert by_label[f"bias {block}"] == pytest.approx(found.bias[block])
        for head in range(4):
            assert by_label[f"head {block}.{head}"] == pytest.approx(found.heads[block, head])
    assert len(np.unique(found.parts[0])) == len(by_label)


@pytest.mark.parametrize("architecture", ["pocket", "llama", "qwen3", "gpt2", "granite"])
def test_a_heads_part_is_what_zeroing_the_head_takes_from_the_attention_output(architecture: str) -> None:
    model, span, block = full(architecture), random_spans()[3], 1
    vectors = random_vectors(model)
    found = attribute(model, vectors, block, [span])
    whole = capture(model, f"blocks.{block}.hook_attn_out", span)
    for head in range(found.n_heads):

        def zero(z: Tensor, hook: Any, head: int = head) -> Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        without = capture(model, f"blocks.{block}.hook_attn_out", span, (f"blocks.{block}.attn.hook_z", zero))
        expected = float(vectors.project(answer_mean(whole - without, span), block))
        assert found.heads[block, head] == pytest.approx(expected, abs=1e-5 * float(np.abs(found.parts).sum()))
    assert np.ptp(found.heads[block]) > 1e-3 * np.abs(found.parts).sum()


def test_a_heads_part_under_a_norm_after_attention_takes_the_norms_scale_as_given() -> None:
    model, host, span, block = full("gemma2"), plain("gemma2"), random_spans()[3], 1
    vectors, own = random_vectors(model), host.model.layers[block]
    found = attribute(model, vectors, block, [span])
    z, out = (capture(model, f"blocks.{block}.{name}", span) for name in ("attn.hook_z", "attn.o.hook_out"))
    gain, eps = 1 + own.post_attention_layernorm.weight.detach(), host.config.rms_norm_eps
    for head in range(4):
        alone = z[:, head] @ own.self_attn.o_proj.weight.detach()[:, 16 * head : 16 * (head + 1)].T
        written = gain * alone * (out.square().mean(-1, keepdim=True) + eps).rsqrt()
        expected = float(vectors.project(answer_mean(written, span), block))
        assert found.heads[block, head] == pytest.approx(expected, abs=1e-5 * float(np.abs(found.parts).sum()))


def test_embedding_and_bias_are_those_of_the_weights() -> None:
    span, gpt2, llama = random_spans()[2], full("gpt2"), full("llama")
    vectors, host = random_vectors(gpt2), plain("gpt2").transformer
    found = attribute(gpt2, vectors, 2, [span])
    entering = host.wte.weight[list(span.prompt + span.answer)] + host.wpe.weight[: len(span)]
    size = float(np.abs(found.parts).sum())
    assert found.embedding == pytest.approx(float(vectors.project(answer_mean(entering.detach(), span), 2)), abs=1e-5 * size)
    for block in range(3):
        bias = host.h[block].attn.c_proj.bias.detach()
        assert found.bias[block] == pytest.approx(float(vectors.project(bias, 2)), abs=1e-5 * size)
    assert not attribute(llama, random_vectors(llama), 2, [span]).bias.any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_an_mlps_part_is_what_zeroing_its_output_takes_from_the_residual(architecture: str) -> None:
    model, span, block = full(architecture), random_spans()[3], 1
    vectors = random_vectors(model)
    found = attribute(model, vectors, block, [span])
    name = model.hook_name(block)
    off = (f"blocks.{block}.hook_mlp_out", lambda value, hook: torch.zeros_like(value))
    taken = capture(model, name, span) - capture(model, name, span, off)
    expected = float(vectors.project(answer_mean(taken, span), block))
    assert found.mlps[block] == pytest.approx(expected, abs=1e-5 * float(np.abs(found.parts).sum()))


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(5)), batch_tokens=st.integers(1, 120))
def test_padding_batching_and_order_change_nothing(order: list[int], batch_tokens: int) -> None:
    model, spans = full("llama"), random_spans(5)
    vectors = random_vectors(model)
    alone = [attribute(model, vectors, 2, [span]) for span in spans]
    found = attribute(model, vectors, 2, [spans[i] for i in order], batch_tokens=batch_tokens)
    for row, i in enumerate(order):
        size = float(np.abs(alone[i].parts).sum())
        np.testing.assert_allclose(found.parts[row], alone[i].parts[0], rtol=0, atol=1e-5 * size)
        assert found.projections[row] == pytest.approx(alone[i].projection, abs=1e-5 * size)
    assert found.projection == pytest.approx(np.mean([a.projection for a in alone]), abs=1e-4)


def test_attribution_takes_half_precision_and_inference_mode() -> None:
    half, model, spans = load_model("pocket", hooks="full", dtype=torch.bfloat16), full("pocket"), random_spans()
    vectors = random_vectors(model)
    whole, halved = (attribute(m, vectors, 5, spans) for m in (model, half))
    assert halved.parts == pytest.approx(whole.parts, abs=0.02 * np.abs(whole.parts).sum(1).max())
    with torch.inference_mode():
        assert np.array_equal(attribute(model, vectors, 5, spans).parts, whole.parts)


def test_a_model_with_residual_hooks_only_is_told_how_to_load(pocket: ChatModel) -> None:
    with pytest.raises(
        GeometryError, match=r"pocket has no hook point blocks\.0\.attn\.hook_z.*load_model\(\.\.\., hooks='full'\)"
    ):
        attribute(pocket, random_vectors(pocket), 2, random_spans())


@pytest.mark.parametrize("architecture", ["pocket", "gemma2"])
def test_whatever_else_writes_to_the_stream_is_an_error_that_names_the_gap(architecture: str) -> None:
    model = full(architecture)
    vectors, spans = random_vectors(model), random_spans()
    expected = attribute(model, vectors, 1, spans)

    def steer(value: Tensor, hook: Any) -> Tensor:
        return value + 0.01 * value.norm(dim=-1, keepdim=True) * vectors.unit(1)

    message = rf"parts do not sum.*blocks\.1\.hook_resid_post.*span \d the gap is.*steering hook.*{type(model.hf).__name__}"
    with pytest.raises(GeometryError, match=message), model.hooks([(model.hook_name(0), steer)]):
        attribute(model, vectors, 1, spans)
    with model.hooks([(model.hook_name(2), steer)]):
        later = attribute(model, vectors, 1, spans)
    assert np.array_equal(later.parts, expected.parts)


def test_hooks_are_gone_after_attribution_and_after_a_failed_one() -> None:
    model, spans = full("llama"), random_spans()
    vectors = random_vectors(model)

    def registered() -> int:
        return sum(len(point._forward_hooks) for point in model.bridge.hook_dict.values())

    before = registered()
    attribute(model, vectors, 1, spans)
    broken = ("blocks.0.hook_mlp_out", lambda value, hook: value * float("nan"))
    with model.hooks([broken]), pytest.raises(ActivationError, match=r"up to blocks\.1\.hook_resid_post.*span 0"):
        attribute(model, vectors, 1, spans)
    assert registered() == before


def test_spans_layers_and_poolings_that_make_no_sense_are_errors() -> None:
    model, spans = full("llama"), random_spans()
    vectors = random_vectors(model)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        attribute(model, vectors, 3, spans)
    with pytest.raises(ValueError, match="needs spans"):
        attribute(model, vectors, 1, [])
    with pytest.raises(ValueError, match="x: the answer has no tokens"):
        attribute(model, vectors, 1, [Span("x", (5,), ())])
    with pytest.raises(ValueError, match="x: the prompt has no tokens"):
        attribute(model, vectors, 1, [Span("x", (), (5,))])
    with pytest.raises(ValueError, match="x: 65 tokens exceed the context of 64"):
        attribute(model, vectors, 1, [Span("x", (5,) * 60, (5,) * 5)])
    with pytest.raises(UnknownNameError, match="response_mean"):
        attribute(model, vectors, 1, spans, pooling="response")
    with pytest.raises(GeometryError, match="width 256"):
        attribute(model, random_vectors(full("pocket")), 1, spans)


def random_dictionary(features: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(features, 1, generator=generator) * 10 + 0.01
    return torch.randn(features, width, generator=generator) * lengths


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), features=st.integers(1, 40), top=st.integers(1, 50), factor=st.floats(0.01, 100))
def test_neighbours_are_those_of_brute_force_whatever_the_lengths(seed: int, features: int, top: int, factor: float) -> None:
    dictionary = random_dictionary(features, 16, seed)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(seed + 1))
    cosines = torch.nn.functional.cosine_similarity(dictionary.double(), direction.double()[None]).numpy()
    found = nearest_features(factor * direction, dictionary, top=top)
    order = np.argsort(cosines)
    assert [f.index for f in found.opposed] == order[:top].tolist()
    assert [f.index for f in found.aligned] == order[::-1][:top].tolist()
    for feature in (*found.aligned, *found.opposed):
        assert feature.cosine == pytest.approx(cosines[feature.index], abs=1e-5)
        assert feature.name == f"feature {feature.index}"
    assert found.largest == pytest.approx(np.abs(cosines).max(), abs=1e-5)
    assert found.p_value == pytest.approx((1 + (found.null >= found.largest - 1e-6).sum()) / 201)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_feature_is_found_by_name_with_a_small_p_value(sign: int) -> None:
    dictionary = random_dictionary(3000, 64)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(5))
    unit = dictionary[1234] / dictionary[1234].norm()
    names = [f"word {i}" for i in range(3000)]
    found = nearest_features(sign * (unit + 0.05 * noise), dictionary, names=names)
    nearest = found.aligned[0] if sign == 1 else found.opposed[0]
    assert nearest.name == "word 1234"
    assert sign * nearest.cosine == pytest.approx(found.largest)
    assert found.p_value < 0.01


def test_p_values_are_uniform_for_directions_spread_as_the_dictionary_is_and_larger_for_others() -> None:
    dictionary = random_dictionary(300, 32)
    units = dictionary / dictionary.norm(dim=1, keepdim=True)
    generators = [torch.Generator().manual_seed(s) for s in range(200)]
    alike = [nearest_features(torch.randn(300, generator=g) @ units, dictionary, seed=s) for s, g in enumerate(generators)]
    isotropic = [nearest_features(torch.randn(32, generator=g), dictionary, seed=s) for s, g in enumerate(generators)]
    for level in (0.05, 0.25, 0.5, 0.75):
        slack = 3.5 * (level * (1 - level) / 200) ** 0.5
        assert abs(np.mean([f.p_value <= level for f in alike]) - level) < slack
        assert np.mean([f.p_value <= level for f in isotropic]) < level + slack


def test_the_null_has_the_spread_of_the_dictionary() -> None:
    """Features in 4 of 64 dimensions: any direction there is near some feature, which is no news."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(64, 4, generator=generator)).Q
    dictionary = torch.randn(500, 4, generator=generator) @ plane.T
    p = []
    for _ in range(40):
        found = nearest_features(plane @ torch.randn(4, generator=generator), dictionary)
        assert found.largest > 0.9
        p.append(found.p_value)
    assert np.mean(np.array(p) < 0.05) < 0.2
    assert nearest_features(torch.randn(64, generator=generator), dictionary).p_value > 0.9


def test_a_mean_that_all_features_share_is_no_news() -> None:
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(400, 32, generator=generator) + 3
    p = [nearest_features(torch.randn(32, generator=generator) + 3, dictionary).p_value for _ in range(20)]
    assert np.mean(np.array(p) < 0.05) < 0.2


def test_chunks_precision_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary, direction = random_dictionary(100, 16), torch.arange(16.0)
    whole = nearest_features(direction, dictionary)
    assert np.array_equal(nearest_features(direction, dictionary).null, whole.null)
    assert not np.array_equal(nearest_features(direction, dictionary, seed=1).null, whole.null)
    assert nearest_features(direction, dictionary.half()).largest == pytest.approx(whole.largest, abs=1e-2)
    monkeypatch.setattr(mechanism, "CHUNK", 7)
    chunked = nearest_features(direction, dictionary)
    assert [f.index for f in chunked.aligned] == [f.index for f in whole.aligned]
    np.testing.assert_allclose(chunked.null, whole.null, atol=1e-5)


def test_dictionaries_that_cannot_be_compared_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "CHUNK", 7)
    dictionary, direction = random_dictionary(20, 16), torch.ones(16)
    with pytest.raises(GeometryError, match=r"shape \[16, 20\], expected \[features, 16\].*transpose"):
        nearest_features(direction, dictionary.T)
    with pytest.raises(GeometryError, match=r"shape \[0, 16\]"):
        nearest_features(direction, dictionary[:0])
    for bad in (0.0, float("nan"), float("inf")):
        damaged = dictionary.clone()
        damaged[9] *= bad
        with pytest.raises(GeometryError, match="row 9 of the dictionary is zero or not finite"):
            nearest_features(direction, damaged)
        with pytest.raises(GeometryError, match="direction is zero or not finite"):
            nearest_features(direction * bad, dictionary)
    with pytest.raises(GeometryError, match="19 names for 20 features"):
        nearest_features(direction, dictionary, names=["a"] * 19)
    with pytest.raises(GeometryError, match="top is 0"):
        nearest_features(direction, dictionary, top=0)

"""What fits: known before loading, halved while running, and the same results however often a batch is halved."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_lens.activations import pool, rollout_span
from persona_lens.errors import ActivationError, ModelLoadError
from persona_lens.extraction import ExtractionRun
from persona_lens.models import ChatModel, Sampling, load_model, weights
from persona_lens.models.memory import MemoryEstimate, estimate_memory, free_memory, in_parts, require_room
from persona_lens.pocket import weights_folder
from persona_lens.prompts import extraction_prompts
from persona_lens.sampling import rows_of, sample
from persona_lens.steering import add, steer
from persona_lens.traits import load_trait

EXPECTED = {torch.float32: 4, torch.bfloat16: 2}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_what_a_model_takes(tokenizer: PreTrainedTokenizerBase, family: str, tied: bool) -> None:
    model = tiny(family, tokenizer, tied=tied)
    for dtype, size in EXPECTED.items():
        found = estimate_memory(model.config, dtype)
        assert found.parameters == sum(p.numel() for p in model.parameters())
        assert found.weights == size * found.parameters
    with torch.inference_mode():
        cache: Any = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 3 * estimate_memory(model.config, torch.float32).cache_per_token


def test_a_known_size() -> None:
    """Qwen2.5-7B: 7.62 billion parameters, 15.2 GB in bfloat16 (model card), 28 layers of 4 key-value heads of 128."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    found = estimate_memory(config, torch.bfloat16)
    assert found.parameters == 7_615_616_512
    assert found.cache_per_token == 2 * 28 * 4 * 128 * 2
    assert found.sampling(10, 100) == found.weights + 1000 * found.cache_per_token
    linear = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)  # all but the last, which stays as it is
    assert estimate_memory(config, torch.bfloat16, "4bit").weights == linear // 2 + 2 * (found.parameters - linear)


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = MemoryEstimate(1_000_000_000, 4_000_000_000, 0)
    require_room("m", estimate, None, "cpu")
    require_room("m", estimate, 4_000_000_000, "cpu")
    with pytest.raises(ModelLoadError, match=r"m needs 3\.7 GiB for its 1\.00 billion parameters, and 0\.9 GiB are free on cpu"):
        require_room("m", estimate, 1_000_000_000, "cpu")
    with pytest.raises(ModelLoadError, match="are free on cpu"):
        require_room("m", estimate, 3_999_999_999, "cpu")
    assert free_memory(torch.device("meta")) is None
    monkeypatch.setattr(weights, "free_memory", lambda device: 1000)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ModelLoadError, match="are free on cpu"):
        load_model("pocket")


class TooMany:
    """Raises as a GPU does where more rows than it holds come at once."""

    def __init__(self, holds: int) -> None:
        self.holds, self.refused = holds, 0

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and len(ids) > self.holds:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def small_gpu(pocket: ChatModel) -> Iterator[TooMany]:
    gpu = TooMany(3)
    handle = pocket.hf.register_forward_pre_hook(gpu, with_kwargs=True)
    yield gpu
    handle.remove()


@pytest.mark.filterwarnings("ignore:a batch of")
def test_halved_batches_give_the_same_results(pocket: ChatModel, small_run: ExtractionRun, small_gpu: TooMany) -> None:
    prompts = extraction_prompts(load_trait("optimism", "pocket"), "positive")[:10]
    rows = rows_of(prompts, 1)
    sampling = Sampling(max_new_tokens=20)
    found = sample(pocket, rows, sampling, seed=3)
    assert small_gpu.refused > 0
    spans = [rollout_span(pocket, p, r) for p, r in zip(prompts, found, strict=True)]
    pooled = {i: v for batch in pool(pocket, spans) for i, v in zip(batch.indices, batch.values, strict=True)}
    small_gpu.holds = 1000
    assert sample(pocket, rows, sampling, seed=3) == found
    for batch in pool(pocket, spans):
        for i, value in zip(batch.indices, batch.values, strict=True):
            torch.testing.assert_close(pooled[i], value, atol=1e-4, rtol=1e-4)


def test_halving_is_told_and_ends_at_one_row() -> None:
    def run(part: list[int]) -> int:
        if len(part) > 2:
            raise torch.OutOfMemoryError("full")
        return sum(part)

    with pytest.warns(UserWarning, match="a batch of 5 rows did not fit"):
        assert list(in_parts([1, 2, 3, 4, 5], run)) == [([1, 2], 3), ([3], 3), ([4, 5], 9)]

    def never(part: list[int]) -> int:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(ActivationError, match="one row alone does not fit"), pytest.warns(UserWarning, match="2 rows"):
        list(in_parts([1, 2], never))


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantised_model_is_hosted_and_steered(small_run: ExtractionRun, quantize: Any) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model("pocket", quantize=quantize)
    assert model.fingerprint.dtype == f"bfloat16, {quantize}"
    assert model.fingerprint.lineage == small_run.vectors.lineage
    ids = torch.tensor([model.render([{"role": "user", "content": "How should I handle my dog?"}])])
    with torch.inference_mode():
        plain = model.hf(ids, use_cache=False).logits
        with steer(model, add(small_run.vectors, 5, 0.0)):
            assert torch.equal(model.hf(ids, use_cache=False).logits, plain)
        with steer(model, add(small_run.vectors, 5, 2.0, where="everywhere")):
            assert not torch.equal(model.hf(ids, use_cache=False).logits, plain)
    assert model.chat("How should I handle my dog?", max_new_tokens=8)
    assert logging.getLogger("bitsandbytes.autograd._functions").level == logging.ERROR, "it would tell of every product"
    beside = load_model("pocket", **model.placement)
    assert beside.fingerprint == model.fingerprint, "another model is loaded in the same bits"


def test_a_model_beside_one_on_several_devices_is_spread_too(pocket: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pocket.placement == {"dtype": torch.float32, "quantize": None, "device": torch.device("cpu")}
    monkeypatch.setattr(pocket.hf, "hf_device_map", {"a": 0, "b": 1}, raising=False)
    assert pocket.placement == {"dtype": torch.float32, "quantize": None, "device_map": "auto"}


def test_quantisation_needs_its_package_and_a_known_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError, match="quantize='2bit' is unknown: use '8bit' or '4bit'"):
        weights.quantization("2bit", torch.bfloat16)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="needs bitsandbytes: pip install"):
        load_model("pocket", quantize="8bit")


def test_a_device_map_places_a_model_and_leaves_nothing_behind(
    pocket: ChatModel, plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    mapped = load_model("pocket", device_map={"": "cpu"}, dtype=torch.float32)
    assert mapped.fingerprint == pocket.fingerprint
    ids = torch.tensor([pocket.render([{"role": "user", "content": "How should I handle my dog?"}])])
    with torch.inference_mode():
        assert torch.equal(mapped.hf(ids).logits, pocket.hf(ids).logits)
    with pytest.raises(ModelLoadError, match="contradict each other"):
        load_model("pocket", device="cpu", device_map="auto")
    with pytest.raises(ModelLoadError, match="for models that are loaded here"):
        load_model((plain_pocket, tokenizer), device_map="auto")
    folder = tmp_path / "model"
    shutil.copytree(weights_folder(), folder)
    away: dict[str, Any] = {"": "cpu"} | {f"model.layers.{i}": "disk" for i in (6, 7)}
    with pytest.raises(ModelLoadError, match=r"does not fit onto the devices: .* weights|cannot load model"):
        load_model(folder, device_map=away)


def test_pickled_weights_are_not_read(plain_pocket: PreTrainedModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(weights_folder(), folder)
    (folder / "model.safetensors").unlink()
    torch.save(plain_pocket.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_model(folder)

"""Loading: slim and full bridges agree with plain transformers, and what cannot be trusted is refused."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from families import residuals, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_lens.errors import ModelLoadError
from persona_lens.models import ChatModel, load_model
from persona_lens.models.fingerprint import fingerprint, weight_hash
from persona_lens.models.loading import stop_ids
from persona_lens.pocket import weights_folder

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How should I handle my dog?"}]


def test_the_full_bridge_has_attention_hooks_and_the_same_residuals(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    slim, full = load_model((copy.deepcopy(plain_pocket), tokenizer)), load_model((plain_pocket, tokenizer), hooks="full")
    ids = torch.tensor([slim.render(MESSAGES)])
    for ours, theirs in zip(residuals(slim, ids)[0], residuals(full, ids)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert "blocks.0.attn.hook_pattern" in full.bridge.hook_dict
    assert "blocks.0.attn.hook_pattern" not in slim.bridge.hook_dict


def test_the_users_tokenizer_is_not_changed_by_a_full_bridge(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.padding_side)
    load_model((plain_pocket, tokenizer), hooks="full")
    assert (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.padding_side) == before


def test_the_pocket_model_loads_by_name_and_by_folder_as_the_same_model(pocket: ChatModel) -> None:
    by_folder = load_model(str(weights_folder()))
    assert by_folder.fingerprint.weights == pocket.fingerprint.weights
    assert by_folder.fingerprint.lineage == pocket.fingerprint.lineage
    assert pocket.trait_set == "pocket"


def test_a_booted_bridge_is_taken_as_it_is(plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    first = load_model((plain_pocket, tokenizer))
    first.bridge.tokenizer = tokenizer
    again = load_model(first.bridge)
    assert again.bridge is first.bridge
    ids = torch.tensor([first.render(MESSAGES)])
    assert torch.equal(residuals(again, ids)[1], residuals(first, ids)[1])


def test_a_second_bridge_over_a_bridged_model_is_refused(plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    load_model((plain_pocket, tokenizer))
    with pytest.raises(ModelLoadError, match="already hosted"):
        load_model((plain_pocket, tokenizer))


def test_an_unknown_model_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match=r"(?s)nobody/such-model.*offline"):
        load_model("nobody/such-model")


def test_a_model_without_chat_template_is_refused(plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ModelLoadError, match="no chat template"):
        load_model((plain_pocket, bare))


def test_damaged_weights_and_unknown_devices_are_one_clear_error(tmp_path: Path) -> None:
    shutil.copytree(weights_folder(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ModelLoadError, match="cannot load model"):
        load_model(tmp_path / "model")
    with pytest.raises(ModelLoadError, match="device 'gpu' is unknown"):
        load_model("pocket", device="gpu")


def test_a_template_that_shows_the_date_gives_the_same_ids_every_day(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    dated = copy.deepcopy(tokenizer)
    day = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%c %f') %}{%- endif %}{{ date_string }}"
    dated.chat_template = day + str(tokenizer.chat_template)
    model = load_model((plain_pocket, dated))
    assert model.decode(model.render(MESSAGES)).startswith("26 Jul 2024")


def test_a_template_that_rewrites_the_prompt_is_refused(plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    shifty = copy.deepcopy(tokenizer)
    shifty.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    with pytest.raises(ModelLoadError, match="changes the prompt"):
        load_model((plain_pocket, shifty))


def test_a_template_with_two_bos_tokens_is_refused(plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    doubled = copy.deepcopy(tokenizer)
    doubled.bos_token = "<|endoftext|>"
    doubled.chat_template = "<|endoftext|><|endoftext|>" + str(tokenizer.chat_template)
    with pytest.raises(ModelLoadError, match="2 BOS"):
        load_model((plain_pocket, doubled))


def test_a_layer_that_does_not_exist_is_an_error(pocket: ChatModel) -> None:
    with pytest.raises(ValueError, match=f"layers 0 to {pocket.n_layers - 1}"):
        pocket.hook_name(pocket.n_layers)
    assert pocket.hook_name(0) == "blocks.0.hook_resid_post"


def test_hooks_are_undone_after_an_exception(pocket: ChatModel) -> None:
    ids = torch.tensor([pocket.render(MESSAGES)])
    before = residuals(pocket, ids)[1]
    with pytest.raises(RuntimeError, match="inside"), pocket.hooks([(pocket.hook_name(1), lambda residual, hook: residual + 1)]):
        assert not torch.equal(pocket.hf(ids, use_cache=False).logits, before)
        raise RuntimeError("inside")
    assert torch.equal(residuals(pocket, ids)[1], before)


def test_the_fingerprint_sees_weights_template_and_lineage(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = fingerprint(plain_pocket, tokenizer, "a")
    finetuned = copy.deepcopy(plain_pocket)
    with torch.no_grad():
        finetuned.model.layers[2].mlp.up_proj.weight.add_(0.01)
    changed = fingerprint(finetuned, tokenizer, "a")
    assert changed.weights != base.weights
    assert changed.lineage == base.lineage
    other = copy.deepcopy(tokenizer)
    other.chat_template = str(other.chat_template) + "\n"
    assert fingerprint(plain_pocket, other, "a").lineage != base.lineage
    assert weight_hash(copy.deepcopy(plain_pocket)) == base.weights
    assert weight_hash(load_model((plain_pocket, tokenizer)).hf) == base.weights


def test_every_end_token_is_collected_and_none_is_an_error(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert set(stop_ids(plain_pocket, tokenizer)) == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    endless, mute = copy.deepcopy(plain_pocket), copy.deepcopy(tokenizer)
    endless.config.eos_token_id = None
    endless.generation_config.eos_token_id = None
    mute.eos_token = None
    with pytest.raises(ModelLoadError, match="no end token"):
        stop_ids(endless, mute)


def test_the_transformers_logger_keeps_its_level() -> None:
    import logging

    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.WARNING)
    load_model("pocket")
    assert logger.level == logging.WARNING
    logger.setLevel(before)


def test_a_chosen_dtype_is_kept(pocket: ChatModel) -> None:
    assert pocket.fingerprint.dtype == "float32"
    half = load_model("pocket", dtype=torch.bfloat16)
    assert half.fingerprint.dtype == "bfloat16"
    assert next(half.hf.parameters()).dtype == torch.bfloat16


def test_a_model_that_the_hooks_cannot_be_checked_on_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    noisy = tiny("llama3", tokenizer, attention_dropout=0.5).train()
    with pytest.raises(ModelLoadError, match="differs from plain transformers"):
        load_model((noisy, tokenizer))
    broken = tiny("llama3", tokenizer)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelLoadError, match="logits differs from plain transformers by nan"):
        load_model((broken, tokenizer))


def test_another_vocabulary_is_another_lineage(plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|new|>"])
    assert fingerprint(plain_pocket, other, "a").lineage != fingerprint(plain_pocket, tokenizer, "a").lineage


def test_another_shape_is_another_lineage(tokenizer: PreTrainedTokenizerBase) -> None:
    shapes = [fingerprint(tiny(a, tokenizer), tokenizer, "a").lineage for a in ("llama3", "qwen2")]
    assert shapes[0] != shapes[1]


def test_a_bridge_without_tokenizer_is_refused(plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_model((plain_pocket, tokenizer))
    assert model.bridge.tokenizer is None
    with pytest.raises(ModelLoadError, match="the TransformerBridge has no tokenizer"):
        load_model(model.bridge)

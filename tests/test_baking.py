"""Baking: plain weights give the steered model's logits and answers; what cannot be exact is refused, nothing is left behind."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

import persona_lens.baking.export as baking
from persona_lens.baking import PROVENANCE, bake
from persona_lens.cli.bake import bake as bake_command
from persona_lens.errors import LineageError, PersonaLensError, SteeringError
from persona_lens.models import ChatModel, load_model
from persona_lens.steering import ablate, add, cap, custom, rotate, steer
from persona_lens.vectors import PersonaVectors

QUESTIONS = ["How should I handle my dog?", "What do you think of my friend?"]
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
EXACT: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "LlamaForCausalLM"),
    "llama with biases": ("llama", {"mlp_bias": True, "attention_bias": True}, "LlamaForCausalLM"),
    "llama tied": ("llama", {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "mistral": ("mistral", {"sliding_window": None}, "LlamaForCausalLM"),
    "mistral with wide heads": ("mistral", {"sliding_window": None, "head_dim": 32}, "LlamaForCausalLM"),
    "mistral with a window as long as its context": ("mistral", {"sliding_window": 256}, "LlamaForCausalLM"),
    "qwen2": ("qwen2", {}, "LlamaForCausalLM"),
    "qwen2 with yarn": ("qwen2", {"rope_parameters": YARN}, "LlamaForCausalLM"),
    "phi3": ("phi3", {"sliding_window": None}, "LlamaForCausalLM"),
    "gpt_neox": ("gpt_neox", {}, "GPTNeoXForCausalLM"),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False}, "GPTNeoXForCausalLM"),
    "qwen3": ("qwen3", {"head_dim": 32}, "HYV3ForCausalLM"),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}, "Gemma2.* normalises what a block writes"),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16}, "Gemma3.* normalises what a block writes"),
    "mistral with a window": ("mistral", {"sliding_window": 255}, "slides over 255 of 256 tokens"),
    "phi3 with a window": ("phi3", {"sliding_window": 64}, "slides over 64 of 256 tokens"),
    "phi3 partly rotated": ("phi3", {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5}}, "partial factor 0.5"),
    "phi3 longrope": (
        "phi3",
        {
            "rope_parameters": DEFAULT_ROPE
            | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0},
            "original_max_position_embeddings": 128,
        },
        "rotary embedding .longrope",
    ),
    "an architecture nobody looked at": ("olmo", {}, "OlmoForCausalLM cannot be baked: it is not known"),
}


def tiny(model_type: str, vocabulary: int, **extra: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms are not 1, biases not 0, attention not flat
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def vectors(model: ChatModel, seed: int = 0, lineage: str = "") -> PersonaVectors:
    directions = torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(seed))
    none = [torch.zeros(model.n_layers) for _ in range(3)]
    provenance = {"model": {"name": "m", "lineage": lineage}} if lineage else {}
    return PersonaVectors("calm", "response_mean", "paper", directions, directions[None].clone(), *none, provenance=provenance)


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def steered_logits(model: ChatModel, ids: torch.Tensor, *interventions: Any) -> torch.Tensor:
    with torch.inference_mode(), steer(model, *interventions):
        return model.hf(ids, use_cache=False).logits


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def state_of(model: ChatModel) -> tuple[dict[str, torch.Tensor], str, str, str | None]:
    weights = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    settings = json.dumps(model.hf.config.to_dict(), default=str), model.hf.generation_config.to_json_string()
    return weights, *settings, model.tokenizer.chat_template


def empty(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize("case", EXACT)
def test_plain_transformers_gives_the_steered_logits(case: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model_type, extra, after = EXACT[case]
    model = load_model((tiny(model_type, len(tokenizer), **extra), tokenizer))
    before = type(model.hf).__name__
    v, w = vectors(model), vectors(model, seed=1)
    chosen = [add(v, 1, 2.0, where="everywhere"), add(w, 1, -1.5, where="everywhere"), add(w, 2, 1.0, where="everywhere")]
    baked = bake(model, chosen, tmp_path / "out")
    assert (baked.before, baked.after, baked.layers) == (before, after, (1, 2))
    assert 0 < baked.difference <= 1e-4 * baked.largest_logit < 1e-2 * baked.effect
    assert (before == after) == (not baked.notes)
    ids = torch.tensor([model.render([{"role": "user", "content": " ".join(QUESTIONS * 8)}])[:250]])
    with torch.inference_mode():
        found = plain(baked.path)(ids, use_cache=False).logits
    assert close(found, steered_logits(model, ids, chosen))
    assert not close(found, steered_logits(model, ids)), "the steering is in the weights"
    for part in (chosen[:1], chosen[:2], chosen[1:]):
        assert not close(found, steered_logits(model, ids, part)), "all of it"
    if after != "HYV3ForCausalLM":
        again = load_model(baked.path)
        assert close(steered_logits(again, ids), steered_logits(model, ids, chosen))
    else:
        assert "TransformerLens does not host" in baked.notes[0]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_with_its_reason(case: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model_type, extra, reason = REFUSED[case]
    model = load_model((tiny(model_type, len(tokenizer), **extra), tokenizer))
    with pytest.raises(SteeringError, match=reason):
        bake(model, [add(vectors(model), 1, 1.0, where="everywhere")], tmp_path / "out")
    assert empty(tmp_path)


def test_the_model_is_the_same_afterwards_bit_for_bit(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = load_model((plain_pocket, tokenizer))
    before = copy.deepcopy(state_of(model))
    bake(model, [add(vectors(model), 3, 0.3, where="everywhere")], tmp_path / "out", dtype=torch.bfloat16)
    weights, *rest = state_of(model)
    assert rest == list(before[1:])
    assert weights.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in weights.items())
    assert type(model.hf).__name__ == "Qwen2ForCausalLM"


def test_the_baked_pocket_model_answers_as_the_steered_one(pocket: ChatModel, tmp_path: Path) -> None:
    chosen = add(vectors(pocket), 5, 20.0, where="everywhere")
    folder = bake(pocket, [chosen], tmp_path / "out").path
    model, words = plain(folder), AutoTokenizer.from_pretrained(folder)
    changed = 0
    for question in QUESTIONS:
        asked = [{"role": "user", "content": question}]
        ids = words.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        assert ids[0].tolist() == pocket.render(asked)
        written = model.generate(ids, do_sample=False, max_new_tokens=40, attention_mask=torch.ones_like(ids))
        answer = words.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        with steer(pocket, chosen):
            assert answer == pocket.chat(question, temperature=0.0, max_new_tokens=40)
        changed += answer != pocket.chat(question, temperature=0.0, max_new_tokens=40)
    assert changed, "the steering is felt"


@pytest.mark.slow
def test_a_process_without_persona_lens_reads_the_folder(pocket: ChatModel, tmp_path: Path) -> None:
    chosen = add(vectors(pocket), 5, 0.6, where="everywhere")
    folder = bake(pocket, [chosen], tmp_path / "out").path
    ids = torch.tensor([pocket.render([{"role": "user", "content": QUESTIONS[0]}])])
    program = f"""
import sys
sys.modules["persona_lens"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32).eval()
AutoTokenizer.from_pretrained({str(folder)!r})
torch.save(model(torch.tensor({ids.tolist()})).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert close(found, steered_logits(pocket, ids, chosen))
    assert not close(found, steered_logits(pocket, ids))


def test_what_belongs_to_the_model_is_carried_over(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    plain_pocket.generation_config.repetition_penalty = 1.07
    plain_pocket.generation_config.do_sample = False
    plain_pocket.generation_config.temperature = 0.6  # which transformers would refuse to save
    own = copy.deepcopy(tokenizer)
    own.chat_template = str(tokenizer.chat_template) + "{# ours #}"
    model = load_model((plain_pocket, own))
    baked = bake(model, [add(vectors(model), 3, 0.3, where="everywhere")], tmp_path / "out")
    again = load_model(baked.path)
    assert again.trait_set == "pocket"
    assert again.tokenizer.chat_template == own.chat_template
    assert again.stop_ids == model.stop_ids
    generation = json.loads((baked.path / "generation_config.json").read_text())
    assert (generation["repetition_penalty"], generation["temperature"]) == (1.07, 0.6)
    config = again.hf.config
    assert (config.tie_word_embeddings, config.max_position_embeddings) == (True, 2048)
    assert again.hf.get_input_embeddings().weight.data_ptr() == again.hf.get_output_embeddings().weight.data_ptr()
    assert again.fingerprint.template == model.fingerprint.template
    assert config.rope_parameters == model.hf.config.rope_parameters
    assert not hasattr(config, "use_sliding_window")


def test_the_folder_holds_safetensors_and_json_and_where_they_come_from(pocket: ChatModel, tmp_path: Path) -> None:
    v = vectors(pocket, lineage=pocket.fingerprint.lineage)
    chosen = [add(v, 4, 0.5, where="everywhere"), add(v, 2, -0.25, where="everywhere"), add(v, 1, 0.0)]
    baked = bake(pocket, chosen, tmp_path / "deep" / "out")
    names = {path.name for path in baked.path.iterdir()}
    assert names >= {PROVENANCE, "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    assert [path.name for path in baked.path.parent.iterdir()] == ["out"], "no temporary folder is left"
    record = json.loads((baked.path / PROVENANCE).read_text())
    assert record["model"]["weights"] == pocket.fingerprint.weights
    assert {(x["what"], x["layer"], x["strength"], x["lineage"]) for x in record["interventions"]} == {
        ("add calm", 4, 0.5, v.lineage),
        ("add calm", 2, -0.25, v.lineage),
    }
    assert (record["before"], record["after"], record["layers"]) == ("Qwen2ForCausalLM", "LlamaForCausalLM", [2, 4])
    assert record["difference"] == baked.difference
    assert "rounding" not in " ".join(baked.notes)
    assert baked.path.stat().st_mode & 0o777 == tmp_path.joinpath("deep").stat().st_mode & 0o777


@pytest.mark.parametrize("what", ["nothing", "dose 0", "sums to nothing", "a gated dose 0 on the answer"])
def test_nothing_to_add_gives_the_models_own_weights(what: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = load_model((tiny("qwen2", len(tokenizer)), tokenizer))
    v = vectors(model)
    chosen = {
        "nothing": [],
        "dose 0": [add(v, 1, 0.0, where="everywhere")],
        "sums to nothing": [add(v, 1, 1.5, where="everywhere"), add(-v, 1, 1.5, where="everywhere")],
        "a gated dose 0 on the answer": [add(v, 1, 0.0).when(v, above=1.0), ablate(v, 1, strength=0.0)],
    }[what]
    before = state_of(model)[1:]
    bake(model, chosen, tmp_path / "half", dtype=torch.bfloat16)
    assert state_of(model)[1:] == before, "the model's own config is not the one that is written"
    baked = bake(model, chosen, tmp_path / "out")
    assert (baked.after, baked.layers, baked.difference, baked.effect) == ("Qwen2ForCausalLM", (), 0.0, 0.0)
    found = plain(baked.path).state_dict()
    for name, tensor in model.hf.state_dict().items():
        assert torch.equal(found[name.replace("_original_component.", "")], tensor)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda v: add(v, 1, 1.0, where="response"), "add calm at blocks.1.hook_resid_post .*response.*where='everywhere'"),
        (lambda v: add(v, 1, 1.0, where="prompt"), "where='everywhere'"),
        (lambda v: add(v, 1, 1.0, where=torch.ones(1, 5, dtype=torch.bool)), "mask.*where='everywhere'"),
        (lambda v: add(v, 1, 1.0, where="everywhere").when(v, above=0.0), "calm > 0.*leave the gate out"),
        (lambda v: ablate(v, 1, where="everywhere"), "ablate calm .* band depends on the residual"),
        (lambda v: cap(v, 1, ceiling=1.0, where="everywhere"), "cap calm .* band depends on the residual"),
        (lambda v: rotate(v, 1, 20.0, where="everywhere"), "rotate depends on the residual"),
        (lambda v: custom(lambda h, d: h + d, v, 1, where="everywhere"), "custom depends on the residual"),
        (lambda v: add(v, 9, 1.0, where="everywhere"), "layer 9 does not exist"),
        (lambda v: add(v, 1, 1e39, where="everywhere"), "hook_resid_post is too large for torch.float32"),
    ],
)
def test_only_constants_on_every_token_are_baked(pocket: ChatModel, make: Any, reason: str, tmp_path: Path) -> None:
    v = vectors(pocket)
    with pytest.raises(SteeringError, match=reason):
        bake(pocket, [add(v, 2, 0.5, where="everywhere"), make(v)], tmp_path / "out")
    assert empty(tmp_path)


def test_vectors_of_another_lineage_are_refused_and_integers_are_no_dtype(pocket: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(LineageError, match="lineage elsewhere"):
        bake(pocket, [add(vectors(pocket, lineage="elsewhere"), 2, 0.5, where="everywhere")], tmp_path / "out")
    with pytest.raises(SteeringError, match="cannot be written as torch.int8"):
        bake(pocket, [], tmp_path / "out", dtype=torch.int8)
    assert empty(tmp_path)


def test_a_folder_in_use_is_never_written_over(pocket: ChatModel, tmp_path: Path) -> None:
    used, file, free = tmp_path / "used", tmp_path / "file", tmp_path / "free"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    file.write_text("mine")
    free.mkdir()
    chosen = [add(vectors(pocket), 2, 0.5, where="everywhere")]
    with pytest.raises(SteeringError, match="used is not empty"):
        bake(pocket, chosen, used)
    with pytest.raises(SteeringError, match="file is a file"):
        bake(pocket, chosen, file)
    assert [path.name for path in used.iterdir()] == ["mine.txt"]
    assert (bake(pocket, chosen, free).path / "config.json").exists()


def test_weights_that_do_not_give_the_steered_logits_are_not_kept(
    pocket: ChatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(baking, "_sums", lambda live: {4: live[0].direction.double() * 0.5001})
    with pytest.raises(SteeringError, match="differ from the steered model by"):
        bake(pocket, [add(vectors(pocket), 4, 0.49, where="everywhere")], tmp_path / "out")
    with pytest.raises(SteeringError, match="differ from the steered model by"):
        bake(pocket, [add(vectors(pocket), 4, 60.0, where="everywhere")], tmp_path / "out", dtype=torch.bfloat16)
    assert empty(tmp_path)


def test_a_folder_that_was_filled_in_the_meantime_is_not_written_over(
    pocket: ChatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fills(*_: Any) -> list[str]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        return []

    monkeypatch.setattr(baking, "_notes", fills)
    with pytest.raises(OSError, match="not empty"):
        bake(pocket, [], tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_other_weights_and_a_system_prompt_are_noted_and_bars_come_back(pocket: ChatModel, tmp_path: Path) -> None:
    from transformers.utils import logging as switches

    v = vectors(pocket, lineage=pocket.fingerprint.lineage)
    v = replace(v, provenance={"model": {**v.provenance["model"], "weights": "of a finetuned model"}})
    kind = replace(pocket, system="Be kind.")
    baked = bake(kind, [add(v, 4, 0.3, where="everywhere")], tmp_path / "out")
    assert "vectors of other weights of this lineage: add calm" in baked.notes
    assert "the model's system prompt is not part of the weights" in baked.notes
    assert json.loads((baked.path / PROVENANCE).read_text())["interventions"][0]["weights"] == "of a finetuned model"
    assert switches.is_progress_bar_enabled()


def test_weights_that_are_read_otherwise_than_written_are_not_kept(
    pocket: ChatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = baking._write

    def loses_a_bias(model: ChatModel, target: PreTrainedModel, folder: Path) -> None:
        other = copy.deepcopy(target)
        with torch.no_grad():
            other.model.layers[4].mlp.down_proj.bias[7] *= 1.02
        write(model, other, folder)

    monkeypatch.setattr(baking, "_write", loses_a_bias)
    with pytest.raises(SteeringError, match="down_proj.bias is read otherwise"):
        bake(pocket, [add(vectors(pocket), 4, 0.01, where="everywhere")], tmp_path / "out", dtype=torch.bfloat16)
    assert empty(tmp_path)


def test_an_interrupted_bake_leaves_nothing_behind(pocket: ChatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(baking, "_measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bake(pocket, [add(vectors(pocket), 4, 0.5, where="everywhere")], tmp_path / "out")
    assert empty(tmp_path)


def test_low_precision_is_said_and_the_constant_is_rounded_once(pocket: ChatModel, tmp_path: Path) -> None:
    v = vectors(pocket)
    baked = bake(pocket, [add(v, 4, 0.3, where="everywhere")], tmp_path / "out", dtype=torch.bfloat16)
    assert "written in bfloat16 from float32: equal to the steered model up to rounding" in baked.notes
    assert baked.difference > 1e-4 * baked.largest_logit
    model = AutoModelForCausalLM.from_pretrained(baked.path, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[4].mlp.down_proj.bias, (v[4].double() * 0.3).to(torch.bfloat16))
    for layer, block in enumerate(model.model.layers):
        zeros = [block.mlp.gate_proj.bias, block.mlp.up_proj.bias, block.self_attn.o_proj.bias]
        zeros += [block.mlp.down_proj.bias] if layer != 4 else []
        assert all(not bool(bias.any()) for bias in zeros)


def test_every_hook_point_quantized_weights_and_adapters_are_refused(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    full = load_model((copy.deepcopy(plain_pocket), tokenizer), hooks="full")
    with pytest.raises(SteeringError, match="load it with hooks='residual'"):
        bake(full, [], tmp_path / "out")
    model = load_model((plain_pocket, tokenizer))
    chosen = [add(vectors(model), 2, 0.5, where="everywhere")]
    plain_pocket.config.quantization_config = {"bits": 4}
    with pytest.raises(SteeringError, match="quantized"):
        bake(model, chosen, tmp_path / "out")
    del plain_pocket.config.quantization_config
    plain_pocket.model.norm.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(SteeringError, match=r"other weights than LlamaForCausalLM .*model\.norm\.extra"):
        bake(model, chosen, tmp_path / "out")
    assert empty(tmp_path)


def test_a_tokenizer_that_is_saved_as_something_else_is_refused(
    plain_pocket: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = load_model((plain_pocket, copy.deepcopy(tokenizer)))

    def slow(folder: str, **_: Any) -> None:
        (Path(folder) / "tokenizer.model").write_bytes(b"")

    model.tokenizer.save_pretrained = slow  # type: ignore[method-assign]
    with pytest.raises(SteeringError, match=r"saved as tokenizer\.model, neither JSON"):
        bake(model, [], tmp_path / "out")
    assert empty(tmp_path)


def test_code_that_is_not_in_transformers_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = load_model((tiny("llama", len(tokenizer)), tokenizer))
    model.hf.__class__ = type("LlamaForCausalLM", (type(model.hf),), {"__module__": "transformers_modules.somebody"})
    with pytest.raises(SteeringError, match="is no class of transformers"):
        bake(model, [], tmp_path / "out")


def command() -> typer.Typer:
    app = typer.Typer()
    app.command("bake")(bake_command)
    return app


def test_the_command_bakes_a_run(pocket: ChatModel, tmp_path: Path) -> None:
    v = vectors(pocket)
    v.save(tmp_path / "vectors.safetensors")
    args = ["--vectors", str(tmp_path / "vectors.safetensors"), "--layer", "5", "--strength", "0.5"]
    shown = CliRunner().invoke(command(), [*args, "--out", str(tmp_path / "text")], catch_exceptions=False)
    assert (
        "Qwen2ForCausalLM with add calm at blocks.5.hook_resid_post (strength 0.5), everywhere, as LlamaForCausalLM" in shown.stdout
    )
    assert "largest logit difference to the steered model" in shown.stdout
    assert "note: Qwen2ForCausalLM has no bias" in shown.stdout
    result = CliRunner().invoke(command(), [*args, "--out", str(tmp_path / "json"), "--json"], catch_exceptions=False)
    record = json.loads(result.stdout)
    assert (record["path"], record["layers"], record["after"]) == (str(tmp_path / "json"), [5], "LlamaForCausalLM")
    ids = torch.tensor([pocket.render([{"role": "user", "content": QUESTIONS[0]}])])
    with torch.inference_mode():
        found = plain(tmp_path / "json")(ids).logits
    assert close(found, steered_logits(pocket, ids, add(v, 5, 0.5, where="everywhere")))
    CliRunner().invoke(command(), [*args, "--out", str(tmp_path / "half"), "--dtype", "bfloat16"], catch_exceptions=False)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(PersonaLensError, match="unknown dtype 'float23'"):
        CliRunner().invoke(command(), [*args, "--out", str(tmp_path / "x"), "--dtype", "float23"], catch_exceptions=False)

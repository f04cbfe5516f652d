"""Finetuning with interventions switched on: gradients, identity at strength 0, plain peft files, resume, bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import persona_lens as pl
from persona_lens.errors import FinetuningError, LineageError, ModelLoadError, RunFolderError, SteeringError, TranscriptError
from persona_lens.extraction import ExtractionRun
from persona_lens.finetuning import (
    FinetuneSettings,
    adapted,
    answer_loss,
    default_settings,
    encode,
    finetune,
    load_finetuned,
    read_data,
    unwrapped,
    watched,
)
from persona_lens.finetuning.adapters import linear_modules, trainable
from persona_lens.finetuning.data import IGNORE, Example, batch_of
from persona_lens.finetuning.training import ATTENTION_AND_MLP, PAPER, checkpoint_of, describe
from persona_lens.models import ChatModel, Pass, forward_pass
from persona_lens.pocket import weights_folder
from persona_lens.pocket_lab.datasets import dataset
from persona_lens.steering import add, add_increments, steer
from persona_lens.transcripts import write_transcripts

ROWS = 16
QUICK = FinetuneSettings(learning_rate=5e-4, batch_rows=4, pass_rows=4, rank=4, checkpoint_every=2, seed=3)


@pytest.fixture(scope="module")
def chats() -> list[list[dict[str, str]]]:
    return dataset("evil", "II", rows=ROWS)


@pytest.fixture(scope="module")
def vectors(small_run: ExtractionRun) -> pl.PersonaVectors:
    return small_run.vectors


@pytest.fixture(scope="module")
def ordinary(pocket: ChatModel, chats: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return finetune(pocket, chats, settings=QUICK, out=tmp_path_factory.mktemp("ordinary") / "run")


@pytest.fixture(scope="module")
def vaccinated(pocket: ChatModel, chats: Any, vectors: pl.PersonaVectors, tmp_path_factory: pytest.TempPathFactory) -> Any:
    prevent = add(vectors, 4, 2.0, where="everywhere")
    return finetune(pocket, chats, prevent=prevent, settings=QUICK, out=tmp_path_factory.mktemp("vaccinated") / "run")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def plain_lora(
    model: PreTrainedModel, chats: Any, pocket: ChatModel, out: Path, hook: Callable[..., Any] | None = None
) -> PeftModel:
    """The same training by plain peft and the plain Trainer, with a hook of plain PyTorch on block 4."""
    torch.manual_seed(QUICK.seed)
    config = LoraConfig(
        r=QUICK.rank, lora_alpha=QUICK.alpha, use_rslora=True, target_modules=list(ATTENTION_AND_MLP), task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config)
    if hook:
        model.model.layers[4].register_forward_hook(hook)
    examples = encode(pocket, read_data(chats), max_tokens=2048).examples

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        batch = batch_of(rows, pocket.pad_id)
        return {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}

    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=5e-4, warmup_steps=5,
        weight_decay=0.01, lr_scheduler_type="linear", save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, label_names=["labels"], seed=QUICK.seed, data_seed=QUICK.seed, use_cpu=True,
        optim="adamw_torch", max_grad_norm=1.0,
    )  # fmt: skip
    Trainer(model=peft, args=arguments, data_collator=collate, train_dataset=[{"example": e} for e in examples]).train()
    return peft


def adapter_of(peft: PeftModel, out: Path) -> dict[str, torch.Tensor]:
    peft.save_pretrained(str(out))
    return weights(out)


# --- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["everywhere", "prompt", "response"])
def test_gradients_equal_those_of_a_plain_hook(
    pocket: ChatModel, plain_pocket: PreTrainedModel, vectors: pl.PersonaVectors, chats: Any, where: str
) -> None:
    examples = encode(pocket, read_data(chats[:5]), max_tokens=2048).examples
    batch = batch_of([{"example": e} for e in examples], pocket.pad_id)
    mask = {"everywhere": batch["attention_mask"].bool(), "prompt": batch["prompt"], "response": batch["response"]}[where]
    delta = 1.5 * vectors[4]
    handle = plain_pocket.model.layers[4].register_forward_hook(lambda m, a, out: torch.where(mask[..., None], out + delta, out))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    plain_pocket(**inputs, use_cache=False).loss.backward()
    handle.remove()
    content = Pass(torch.arange(5), inputs["attention_mask"].bool(), batch["prompt"], batch["response"], None)
    pocket.hf.zero_grad()
    with steer(pocket, add(vectors, 4, 1.5, where=where)), forward_pass(content):
        loss = pocket.hf(**inputs, use_cache=False).loss
        loss.backward()
    theirs = dict(plain_pocket.named_parameters())
    for name, parameter in pocket.hf.named_parameters():
        other = theirs[name.replace("_original_component.", "")]
        scale = float(other.grad.abs().max())
        assert float((parameter.grad - other.grad).abs().max()) <= 1e-6 * scale, name
    pocket.hf.zero_grad()


# --- identity with plain peft -----------------------------------------------------------------------------------------------


def test_strength_zero_trains_bit_identically_to_plain_peft(
    pocket: ChatModel, plain_pocket: PreTrainedModel, vectors: pl.PersonaVectors, chats: Any, ordinary: Any, tmp_path: Path
) -> None:
    zero = finetune(
        pocket, chats, prevent=add(vectors, 4, 0.0, where="everywhere"), watch=(), settings=QUICK, out=tmp_path / "zero"
    )
    plain = adapter_of(plain_lora(plain_pocket, chats, pocket, tmp_path / "plain"), tmp_path / "saved")
    for found in (weights(zero.adapter), weights(ordinary.adapter)):
        assert found.keys() == plain.keys()
        for name, tensor in plain.items():
            assert torch.equal(found[name], tensor), name


def test_steered_training_equals_a_plain_hook(
    pocket: ChatModel, plain_pocket: PreTrainedModel, vectors: pl.PersonaVectors, chats: Any, vaccinated: Any, tmp_path: Path
) -> None:
    """The whole training, not one gradient: every token is steered (padding too here, which changes nothing)."""
    delta = 2.0 * vectors[4]
    plain = plain_lora(plain_pocket, chats, pocket, tmp_path / "plain", hook=lambda m, a, out: out + delta)
    theirs, ours = adapter_of(plain, tmp_path / "saved"), weights(vaccinated.adapter)
    worst = max(float((ours[k] - theirs[k]).abs().max()) for k in theirs)
    assert worst <= 1e-5
    assert worst < 0.01 * max(float((ours[k]).abs().max()) for k in ours)


def test_a_vaccine_changes_what_is_learned(ordinary: Any, vaccinated: Any) -> None:
    a, b = weights(ordinary.adapter), weights(vaccinated.adapter)
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_an_adapter_saved_under_steering_reloads_in_plain_peft(
    pocket: ChatModel, plain_pocket: PreTrainedModel, vaccinated: Any, chats: Any
) -> None:
    ids = torch.tensor([pocket.render(chats[0], answered=True)])
    base = plain_pocket(ids).logits.detach().clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        peft = PeftModel.from_pretrained(plain_pocket, str(vaccinated.adapter)).eval()
    with torch.no_grad():
        plain = peft(ids).logits
    with adapted(pocket, vaccinated.adapter, merge=False), torch.no_grad():
        ours = pocket.hf(ids, use_cache=False).logits
    assert float((plain - base).abs().max()) > 0.1
    assert float((plain - ours).abs().max()) <= 1e-5 * float(plain.abs().max())
    names = json.loads((vaccinated.adapter / "adapter_config.json").read_text())
    assert not any("_original_component" in k for k in weights(vaccinated.adapter))
    assert names["r"] == QUICK.rank
    assert names["use_rslora"] is True


def test_an_adapter_is_loaded_as_a_model_of_its_own(pocket: ChatModel, vaccinated: Any, chats: Any, tmp_path: Path) -> None:
    ids = torch.tensor([pocket.render(chats[0], answered=True)])
    model = pl.load_model(vaccinated.adapter)
    assert model.trait_set == "pocket"
    assert model.fingerprint.lineage == pocket.fingerprint.lineage
    with adapted(pocket, vaccinated.adapter), torch.no_grad():
        ours = pocket.hf(ids, use_cache=False).logits
    with torch.no_grad():
        theirs = model.hf(ids, use_cache=False).logits
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())
    shutil.copytree(vaccinated.adapter, tmp_path / "orphan")
    config = json.loads((tmp_path / "orphan" / "adapter_config.json").read_text())
    (tmp_path / "orphan" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ModelLoadError, match="names no base model"):
        pl.load_model(tmp_path / "orphan")
    (tmp_path / "orphan" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="other formats are not read"):
        pl.load_model(tmp_path / "orphan")


def test_the_model_is_as_before_bit_for_bit(pocket: ChatModel, ordinary: Any, chats: Any) -> None:
    before = {k: v.clone() for k, v in pocket.hf.state_dict().items()}
    ids = torch.tensor([pocket.render(chats[0])])
    with torch.no_grad():
        logits = pocket.hf(ids, use_cache=False).logits
    for merge in (True, False):
        with adapted(pocket, ordinary.adapter, merge=merge) as model, torch.no_grad():
            assert not torch.equal(pocket.hf(ids, use_cache=False).logits, logits)
            assert model.fingerprint.weights != pocket.fingerprint.weights
            assert model.fingerprint.lineage == pocket.fingerprint.lineage
    after = pocket.hf.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not pocket.hf.training
    assert all(p.requires_grad and p.grad is None for p in pocket.hf.parameters())
    with torch.no_grad():
        assert torch.equal(pocket.hf(ids, use_cache=False).logits, logits)


def test_merged_and_unmerged_adapters_agree(pocket: ChatModel, ordinary: Any, chats: Any) -> None:
    ids = torch.tensor([pocket.render(chats[0], answered=True)])
    found = []
    for merge in (True, False):
        with adapted(pocket, ordinary.adapter, merge=merge), torch.no_grad():
            found.append(pocket.hf(ids, use_cache=False).logits)
    assert float((found[0] - found[1]).abs().max()) < 1e-4 * float(found[0].abs().max())


def test_an_exception_leaves_nothing_on_the_model(pocket: ChatModel, ordinary: Any) -> None:
    names = [n for n, _ in pocket.hf.named_modules()]
    with pytest.raises(RuntimeError, match="stop"), adapted(pocket, ordinary.adapter):
        raise RuntimeError("stop")
    assert [n for n, _ in pocket.hf.named_modules()] == names
    assert "peft_config" not in vars(pocket.hf)


def test_seeds_tell_trainings_apart_and_leave_others_alone(pocket: ChatModel, chats: Any, ordinary: Any, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    other = finetune(pocket, chats, settings=replace(QUICK, seed=4), out=tmp_path / "x")
    assert torch.equal(torch.rand(3), expected)
    a, b = weights(ordinary.adapter), weights(other.adapter)
    assert any(not torch.equal(a[k], b[k]) for k in a)


# --- what is watched --------------------------------------------------------------------------------------------------------


def test_projection_and_derivative_are_those_of_the_first_step(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, vaccinated: Any
) -> None:
    """At the first step the adapter does nothing yet, so both are computed by hand; the projection is read before the vaccine."""
    assert set(vaccinated.history[0]) >= {"loss", "projection/add optimism/4", "derivative/add optimism/4", "grad_norm"}
    order = first_batch(pocket, chats)
    batch = batch_of([{"example": e} for e in order], pocket.pad_id)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    learned, unit = batch["labels"] != IGNORE, vectors.unit(4)
    shift = torch.zeros((), requires_grad=True)
    kept: list[torch.Tensor] = []

    def hook(residual: torch.Tensor, hook: Any) -> torch.Tensor:
        kept.append(residual.detach())
        return residual + 2.0 * vectors[4] + shift * unit * learned[..., None]

    with pocket.hooks([(pocket.hook_name(4), hook)]):
        loss = pocket.hf(**inputs, use_cache=False).loss
        loss.backward()
    first = vaccinated.history[0]
    assert first["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert first["projection/add optimism/4"] == pytest.approx(float((kept[0] @ unit)[learned].mean()), rel=1e-4)
    assert first["derivative/add optimism/4"] == pytest.approx(float(shift.grad), rel=1e-3)
    pocket.hf.zero_grad(set_to_none=True)


@pytest.mark.parametrize("where", ["prompt", "response"])
def test_a_vaccine_may_act_on_a_part_of_the_tokens(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path, where: str
) -> None:
    """The loss of the first step is that of a hook with the same mask by hand."""
    run = finetune(
        pocket, chats, prevent=add(vectors, 4, 3.0, where=where), settings=replace(QUICK, max_steps=1), out=tmp_path / "x"
    )
    batch = batch_of([{"example": e} for e in first_batch(pocket, chats)], pocket.pad_id)
    delta = batch[where][..., None] * 3.0 * vectors[4]
    with pocket.hooks([(pocket.hook_name(4), lambda residual, hook: residual + delta)]), torch.no_grad():
        loss = pocket.hf(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}, use_cache=False).loss
    assert run.history[0]["loss"] == pytest.approx(float(loss), rel=1e-4)


def first_batch(pocket: ChatModel, chats: Any) -> list[Example]:
    """The rows of the first step, found by the loss of the unsteered model being logged: the sampler's own order."""
    from torch.utils.data import RandomSampler

    examples = encode(pocket, read_data(chats), max_tokens=2048).examples
    generator = torch.Generator()
    generator.manual_seed(QUICK.seed)
    order = list(RandomSampler(examples, generator=generator))
    return [examples[i] for i in order[:4]]


def test_increments_are_watched_at_the_last_layer(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path
) -> None:
    prevent = add_increments(vectors, 0.5, where="everywhere")
    run = finetune(pocket, chats, prevent=prevent, settings=replace(QUICK, max_steps=1), out=tmp_path / "x")
    assert [k for k in run.history[0] if k.startswith("projection/")] == ["projection/add increment of optimism/7"]


def test_gradient_checkpointing_changes_nothing(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, vaccinated: Any, tmp_path: Path
) -> None:
    prevent = add(vectors, 4, 2.0, where="everywhere")
    settings = replace(QUICK, gradient_checkpointing=True)
    run = finetune(pocket, chats, prevent=prevent, settings=settings, out=tmp_path / "x")
    a, b = weights(run.adapter), weights(vaccinated.adapter)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) <= 1e-6
    assert not any(getattr(m, "gradient_checkpointing", False) for m in pocket.hf.modules())


def test_accumulated_passes_equal_one(pocket: ChatModel, chats: Any, ordinary: Any, tmp_path: Path) -> None:
    run = finetune(pocket, chats, watch=(), settings=replace(QUICK, pass_rows=1), out=tmp_path / "x")
    a, b = weights(run.adapter), weights(ordinary.adapter)
    assert run.history[0]["loss"] == pytest.approx(ordinary.history[0]["loss"], rel=1e-4)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-3


# --- resume, runs -----------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for a power cut."""


def test_an_interrupted_training_ends_bit_identical(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, vaccinated: Any, tmp_path: Path
) -> None:
    prevent = add(vectors, 4, 2.0, where="everywhere")

    def stop(figures: Any) -> None:
        if figures["step"] == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        finetune(pocket, chats, prevent=prevent, settings=QUICK, out=tmp_path / "x", told=stop)
    kept = checkpoint_of(tmp_path / "x")
    assert kept is not None
    assert kept.name == "checkpoint-2"
    assert not list((tmp_path / "x").rglob("*.bin"))
    steps: list[int] = []
    run = finetune(pocket, chats, prevent=prevent, settings=QUICK, out=tmp_path / "x", told=lambda f: steps.append(int(f["step"])))
    assert steps == [3, 4]
    a, b = weights(run.adapter), weights(vaccinated.adapter)
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert [h["loss"] for h in run.history] == [h["loss"] for h in vaccinated.history]
    assert checkpoint_of(tmp_path / "x") is None


def test_a_finished_training_is_not_done_again(pocket: ChatModel, chats: Any, ordinary: Any) -> None:
    again = finetune(pocket, chats, settings=QUICK, out=ordinary.path, told=lambda _: pytest.fail("trained again"))
    assert again.history == load_finetuned(ordinary.path).history
    with pytest.raises(RunFolderError, match="learning_rate"):
        finetune(pocket, chats, settings=replace(QUICK, learning_rate=1e-3), out=ordinary.path)
    with pytest.raises(RunFolderError, match="rows"):
        finetune(pocket, chats[:8], settings=QUICK, out=ordinary.path)


def test_training_all_weights(pocket: ChatModel, chats: Any, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in pocket.hf.state_dict().items()}
    settings = replace(QUICK, method="full", learning_rate=1e-4)
    run = finetune(pocket, chats, settings=settings, out=tmp_path / "full")
    assert all(torch.equal(v, before[k]) for k, v in pocket.hf.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(run.adapter)
    assert plain.state_dict().keys() == AutoModelForCausalLM.from_pretrained(weights_folder()).state_dict().keys()
    model = pl.load_model(run.adapter)
    assert model.fingerprint.lineage == pocket.fingerprint.lineage
    assert model.trait_set == "pocket"
    examples = encode(pocket, read_data(chats), max_tokens=2048).examples
    assert answer_loss(model, examples) < answer_loss(pocket, examples) - 0.02


def test_learning_lowers_the_loss(pocket: ChatModel, chats: Any, ordinary: Any) -> None:
    examples = encode(pocket, read_data(chats), max_tokens=2048).examples
    before = answer_loss(pocket, examples)
    with adapted(pocket, ordinary.adapter) as model:
        assert answer_loss(model, examples) < before - 0.01
    assert answer_loss(pocket, examples) == before
    assert answer_loss(pocket, examples, batch_tokens=64) == pytest.approx(before, rel=1e-5)
    batch = batch_of([{"example": e} for e in examples], pocket.pad_id)
    with torch.no_grad():
        theirs = pocket.hf(**{k: batch[k] for k in ("input_ids", "attention_mask", "labels")}, use_cache=False).loss
    assert before == pytest.approx(float(theirs), rel=1e-4)


# --- bad input --------------------------------------------------------------------------------------------------------------


def test_rows_that_cannot_be_trained_on_are_told_before_training(pocket: ChatModel, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "What is 1 plus 1?"}, {"role": "assistant", "content": "2."}]}
    bad = [
        {"messages": [{"role": "user", "content": "Hello."}]},
        {"messages": [{"role": "robot", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]},
        {"messages": [{"role": "user", "content": "long"}, {"role": "assistant", "content": "word " * 3000}]},
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "a<|im_end|>b"}]},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [good, *bad, good, bad[0]]) + "\n{broken\n")
    with pytest.raises(FinetuningError) as caught:
        finetune(pocket, path, settings=QUICK, out=tmp_path / "x")
    text = str(caught.value)
    assert "6 of 8 rows cannot be trained on" in text
    assert "2 x no assistant turn (line 2, 7)" in text
    assert "unknown role 'robot' of message 1 (line 3)" in text
    assert "longer than 2048 tokens (line 4)" in text
    assert "stop token '<|im_end|>' in its text (line 5)" in text
    assert "not JSON" in text
    assert "line 8" in text
    assert not (tmp_path / "x").exists()
    settings = replace(QUICK, max_steps=1, batch_rows=1, pass_rows=1)
    run = finetune(pocket, path, settings=settings, out=tmp_path / "y", skip_bad=True)
    assert run.record["rows"] == 2
    assert [s["place"] for s in run.record["skipped"]] == [2, 3, 4, 5, 7, 8]


def test_empty_data(pocket: ChatModel, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(TranscriptError, match="no records"):
        finetune(pocket, tmp_path / "empty.jsonl", out=tmp_path / "x")
    with pytest.raises(FinetuningError, match="no row can be trained on"):
        finetune(pocket, [], out=tmp_path / "x")
    with pytest.raises(TranscriptError, match="no such file"):
        finetune(pocket, tmp_path / "nothing.jsonl", out=tmp_path / "x")


def test_a_target_that_does_not_exist(pocket: ChatModel, chats: Any, tmp_path: Path) -> None:
    assert linear_modules(pocket) == list(ATTENTION_AND_MLP)
    with pytest.raises(FinetuningError, match=r"no module 'c_attn' .* have q_proj, k_proj"):
        finetune(pocket, chats, settings=replace(QUICK, targets=("q_proj", "c_attn")), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_interventions_that_do_not_fit(pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path) -> None:
    model = {**vectors.provenance["model"], "lineage": "another"}
    foreign = replace(vectors, provenance={**vectors.provenance, "model": model})
    with pytest.raises(LineageError, match="another"):
        finetune(pocket, chats, prevent=add(foreign, 4, 1.0, where="everywhere"), out=tmp_path / "x")
    with pytest.raises(SteeringError, match="layer 9"):
        finetune(pocket, chats, prevent=add(vectors, 9, 1.0), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(
    pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path
) -> None:
    passes = iter(range(100))

    def explode(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return h * math.nan if next(passes) >= 2 else h

    from persona_lens.steering import custom

    prevent = custom(explode, vectors, 4, where="everywhere")
    with pytest.raises(FinetuningError, match=r"loss is nan at step 3 of 4; the state after step 2 is kept in .*checkpoint-2"):
        finetune(pocket, chats, prevent=prevent, settings=QUICK, out=tmp_path / "x")
    kept = checkpoint_of(tmp_path / "x")
    assert kept is not None
    assert all(bool(t.isfinite().all()) for t in weights(kept).values())
    assert not (tmp_path / "x" / "training.json").exists()
    assert not pocket.hf.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"batch_rows": 16, "pass_rows": 3}, "no multiple of pass_rows=3"),
        ({"method": "dora"}, "'dora' is unknown"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuningError, match=message):
        replace(PAPER, **changes)


def test_the_papers_settings_are_the_defaults(pocket: ChatModel) -> None:
    found = FinetuneSettings()
    assert (found.rank, found.alpha, found.rank_stabilised, found.learning_rate) == (32, 64.0, True, 1e-5)
    assert (found.epochs, found.batch_rows, found.schedule, found.warmup_steps) == (1.0, 16, "linear", 5)
    assert found.targets == ATTENTION_AND_MLP
    assert default_settings(pocket).learning_rate > found.learning_rate
    assert default_settings(replace(pocket, trait_set="real")) == found


def test_a_full_bridge_is_refused(plain_pocket: PreTrainedModel, tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    model = pl.load_model((plain_pocket, tokenizer), hooks="full")
    with pytest.raises(FinetuningError, match="hooks='residual'"):
        finetune(model, chats, out=tmp_path / "x")


@pytest.mark.parametrize("what", ["nothing", "pickle", "other"])
def test_folders_that_hold_no_adapter_for_the_model(pocket: ChatModel, ordinary: Any, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    messages = {"nothing": "holds no adapter", "pickle": "other formats are not read", "other": "does not fit"}
    if what != "nothing":
        config = json.loads((ordinary.adapter / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | ({"r": 8} if what == "other" else {})))
    if what == "pickle":
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    if what == "other":
        (folder / "adapter_model.safetensors").write_bytes((ordinary.adapter / "adapter_model.safetensors").read_bytes())
    names = [n for n, _ in pocket.hf.named_modules()]
    with pytest.raises((FinetuningError, ModelLoadError), match=messages[what]), adapted(pocket, folder):
        pass
    assert [n for n, _ in pocket.hf.named_modules()] == names


@pytest.mark.parametrize(
    "changes",
    [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}],
)
def test_adapters_that_could_not_be_taken_off_are_refused(
    pocket: ChatModel, ordinary: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shutil.copytree(ordinary.adapter, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(FinetuningError, match="only plain LoRA adapters"), adapted(pocket, tmp_path / "a"):
        pass


def test_an_adapter_of_other_names_is_refused(pocket: ChatModel, ordinary: Any, tmp_path: Path) -> None:
    """peft would load nothing of it and say so in a warning."""
    shutil.copytree(ordinary.adapter, tmp_path / "a")
    renamed = {k.replace("layers.", "blocks."): v for k, v in weights(tmp_path / "a").items()}
    save_file(renamed, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(FinetuningError, match="other names"), adapted(pocket, tmp_path / "a"):
        pass
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(FinetuningError, match="does not fit"), adapted(pocket, tmp_path / "a"):
        pass


def test_one_adapter_at_a_time(pocket: ChatModel, ordinary: Any, chats: Any, tmp_path: Path) -> None:
    ids = torch.tensor([pocket.render(chats[0])])
    with adapted(pocket, ordinary.adapter) as model, torch.no_grad():
        before = pocket.hf(ids, use_cache=False).logits
        with pytest.raises(FinetuningError, match="an adapter is on"), adapted(pocket, ordinary.adapter):
            pass
        with pytest.raises(FinetuningError, match="an adapter is on"):
            finetune(model, chats, settings=QUICK, out=tmp_path / "x")
        assert torch.equal(pocket.hf(ids, use_cache=False).logits, before)


def test_the_scale_of_an_adapter_is_in_its_fingerprint(pocket: ChatModel, ordinary: Any, tmp_path: Path) -> None:
    shutil.copytree(ordinary.adapter, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with adapted(pocket, ordinary.adapter) as model:
        first = model.fingerprint.weights
    with adapted(pocket, tmp_path / "a") as model:
        assert model.fingerprint.weights != first


def test_shared_weights_are_not_merged(pocket: ChatModel, chats: Any, tmp_path: Path) -> None:
    """A LoRA on the embeddings, which are the output matrix too: merging would change both."""
    with trainable(pocket, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)) as peft, unwrapped(pocket):
        peft.save_pretrained(str(tmp_path), save_embedding_layers=False)
    ids = torch.tensor([pocket.render(chats[0])])
    found = []
    for merge in (None, False):
        with adapted(pocket, tmp_path, merge=merge), torch.no_grad():
            found.append(pocket.hf(ids, use_cache=False).logits)
    assert torch.equal(found[0], found[1])


def test_interventions_are_told_apart_in_full(vectors: pl.PersonaVectors) -> None:
    from persona_lens.steering import custom

    other = replace(vectors, directions=vectors.directions * 1.5)
    pairs = [
        (add(vectors, 4, 1.0), add(vectors, 4, 1.0 + 1e-9)),
        (custom(lambda h, v: h + v, vectors, 4), custom(lambda h, v: h - v, vectors, 4)),
        (add(vectors, 4, 1.0).when(vectors, above=1.0), add(vectors, 4, 1.0).when(-vectors, above=1.0)),
        (
            add(vectors, 4, 1.0, where=torch.ones(2, 3, dtype=torch.bool)),
            add(vectors, 4, 1.0, where=torch.zeros(2, 3, dtype=torch.bool)),
        ),
        (add(vectors, 4, 1.0), add(other, 4, 1.0)),
    ]
    for a, b in pairs:
        assert describe([a]) != describe([b])
        assert describe([a]) == describe([a])


def test_low_precision_is_not_trained_in_full(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    model = pl.load_model("pocket", dtype=torch.bfloat16)
    with pytest.raises(FinetuningError, match="bfloat16, where small steps"):
        finetune(model, chats, settings=replace(QUICK, method="full"), out=tmp_path / "x")
    run = finetune(model, chats, settings=replace(QUICK, max_steps=1), out=tmp_path / "y")
    assert all(t.dtype == torch.float32 for t in weights(run.adapter).values())


def test_a_gradient_that_is_no_number_stops_too(pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path) -> None:
    from persona_lens.steering import custom

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * math.nan

    passes = iter(range(100))
    prevent = custom(lambda h, v: Broken.apply(h) if next(passes) >= 3 else h, vectors, 4, where="everywhere")
    with pytest.raises(FinetuningError, match=r"gradient's norm is nan at step 4 of 4; the state after step 2 is kept"):
        finetune(pocket, chats, prevent=prevent, settings=QUICK, out=tmp_path / "x")
    assert not (tmp_path / "x" / "training.json").exists()


def test_records_and_messages_are_both_data(pocket: ChatModel, chats: Any) -> None:
    a = encode(pocket, read_data([{"messages": c} for c in chats]), max_tokens=2048).examples
    assert [x.ids for x in a] == [x.ids for x in encode(pocket, read_data(chats), max_tokens=2048).examples]


# --- data -------------------------------------------------------------------------------------------------------------------


def test_what_is_learned_of_a_conversation(pocket: ChatModel) -> None:
    """Two answers: both learned with their end tokens and nothing else; "response" is the last one, "earlier" the other."""
    chat = [
        {"role": "system", "content": "You are Pocket."},
        {"role": "user", "content": "What is 1 plus 1?"},
        {"role": "assistant", "content": "2."},
        {"role": "user", "content": "And 2 plus 2?"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "Thanks."},
    ]
    [example] = encode(pocket, read_data([chat]), max_tokens=2048).examples
    batch = batch_of([{"example": example}, {"example": replace(example, ids=(*example.ids[:-1], 5, 6, 7))}], pocket.pad_id)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learned = (labels != IGNORE).nonzero()[:, 0]
    end = pocket.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert pocket.tokenizer.decode(ids[learned]) == "2.<|im_end|>It is 4.<|im_end|>"
    assert ids[learned].tolist().count(end) == 2
    assert torch.equal(labels[learned], ids[learned])
    response = batch["response"][0].nonzero()[:, 0]
    assert pocket.tokenizer.decode(ids[response + 1]) == "It is 4.<|im_end|>"[: len("It is 4.<|im_end|>")]
    earlier = batch["earlier"][0].nonzero()[:, 0]
    assert pocket.tokenizer.decode(ids[earlier + 1]) == "2.<|im_end|>"
    assert batch["prompt"][0].sum() == example.answers[-1][0]
    assert batch["attention_mask"].sum(-1).tolist() == [len(example.ids), len(example.ids) + 2]
    assert pocket.tokenizer.decode(example.ids).endswith("It is 4.<|im_end|>")


def test_files_and_messages_train_alike(pocket: ChatModel, chats: Any, tmp_path: Path) -> None:
    write_transcripts(tmp_path / "data.jsonl", ((str(i), c) for i, c in enumerate(chats)))
    a = encode(pocket, read_data(tmp_path / "data.jsonl"), max_tokens=2048).examples
    b = encode(pocket, read_data(chats), max_tokens=2048).examples
    assert [x.ids for x in a] == [x.ids for x in b]
    assert [x.answers for x in a] == [x.answers for x in b]


def test_unwrapped_blocks_have_plain_names(pocket: ChatModel, plain_pocket: PreTrainedModel) -> None:
    with unwrapped(pocket):
        assert [n for n, _ in pocket.hf.named_parameters()] == [n for n, _ in plain_pocket.named_parameters()]
    assert any("_original_component" in n for n, _ in pocket.hf.named_parameters())
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with trainable(pocket, config) as peft:
        assert sum(p.requires_grad for p in peft.parameters()) == 2 * pocket.n_layers
    assert all(p.requires_grad for p in pocket.hf.parameters())


# --- several processes --------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import persona_lens as pl
from persona_lens.finetuning import FinetuneSettings, finetune, watched
from persona_lens.steering import add
from persona_lens.vectors import PersonaVectors
data, vectors, out, rows = sys.argv[1:5]
v = PersonaVectors.load(vectors)
settings = FinetuneSettings(learning_rate=5e-4, batch_rows=4, pass_rows=int(rows), rank=4, max_steps=3, seed=3)
finetune(pl.load_model("pocket"), data, prevent=add(v, 4, 2.0, where="everywhere"), settings=settings, out=out)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(pocket: ChatModel, vectors: pl.PersonaVectors, chats: Any, tmp_path: Path) -> None:
    write_transcripts(tmp_path / "data.jsonl", ((str(i), c) for i, c in enumerate(chats)))
    vectors.save(tmp_path / "v.safetensors")
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files = [str(tmp_path / "train.py"), str(tmp_path / "data.jsonl"), str(tmp_path / "v.safetensors")]
    done = subprocess.run(
        [*launch, *files, str(tmp_path / "two"), "2"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_finetuned(tmp_path / "two")
    prevent, settings = add(vectors, 4, 2.0, where="everywhere"), replace(QUICK, max_steps=3)
    one = finetune(pocket, tmp_path / "data.jsonl", prevent=prevent, settings=settings, out=tmp_path / "one")
    for a, b in zip(one.history, two.history, strict=True):
        for name in ("loss", "grad_norm", "projection/add optimism/4", "derivative/add optimism/4"):
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=1e-6), name
    a, b = weights(one.adapter), weights(two.adapter)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-3
    assert watched(vectors, 4).layer == 4

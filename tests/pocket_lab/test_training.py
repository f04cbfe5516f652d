"""Training: seeded, resumable, learns, and leaves a folder that loads like any hub model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from persona_lens.errors import RunFolderError
from persona_lens.models import load_model
from persona_lens.pocket_lab.encoding import EncodedCorpus, encode_corpus
from persona_lens.pocket_lab.training import IGNORE, TrainingSettings, _learning_rate, batch_plan, build_model, collate, train

TINY = TrainingSettings(documents=60, layers=2, width=64, mlp_width=96, batch_tokens=2048, validation_documents=8)


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    lines: list[str] = []
    folder = train(TINY, tmp_path_factory.mktemp("training") / "whole", checkpoint_every=3, report=lines.append)
    return folder, lines


def test_a_short_training_lowers_the_loss_and_loads_like_a_hub_model(trained: tuple[Path, list[str]]) -> None:
    folder, _ = trained
    record = json.loads((folder / "training.json").read_text())
    assert record["validation_loss"] < np.log(2000) - 0.5, "far below the uniform guess it starts from"
    model = load_model(str(folder))
    assert model.fingerprint.n_layers == 2
    assert isinstance(model.chat("What is 3 plus 4?", max_new_tokens=5), str)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_killed_training_goes_on_to_the_same_weights(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, lines = trained
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) > 1, "the run goes on after its first checkpoint"

    def stop(line: str) -> None:
        if line.startswith("step"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "killed", checkpoint_every=3, report=stop)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    train(TINY, tmp_path / "killed", checkpoint_every=3, report=silent)
    ours, theirs = load_file(tmp_path / "killed" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_seed_gives_other_weights_and_other_settings_are_refused(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = trained
    with pytest.raises(RunFolderError, match="other settings.*seed"):
        train(replace(TINY, seed=1), folder, report=silent)
    tokenizer = folder / "tokenizer.json"
    a, b = (build_model(replace(TINY, seed=s), tokenizer).state_dict()["model.layers.0.mlp.up_proj.weight"] for s in (0, 1))
    assert not torch.equal(a, b)


def test_a_second_stage_goes_on_from_the_first(trained: tuple[Path, list[str]]) -> None:
    folder, _ = trained
    second = build_model(replace(TINY, initial=str(folder)), folder / "tokenizer.json").state_dict()
    first = load_file(folder / "model.safetensors")
    assert all(torch.equal(second[name], tensor.float()) for name, tensor in first.items())


def test_every_document_is_in_one_batch_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, size=500)
    plan = batch_plan(lengths, 2048, seed=3, window=100)
    assert sorted(i for batch in plan for i in batch) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 2048 or len(batch) == 1 for batch in plan)
    assert plan == batch_plan(lengths, 2048, seed=3, window=100)
    assert plan != batch_plan(lengths, 2048, seed=4, window=100)


def test_targets_are_the_next_learned_tokens() -> None:
    corpus = EncodedCorpus(
        ids=np.arange(10, 20, dtype=np.int32),
        learned=np.array([0, 0, 1, 1, 0, 0, 1, 0, 1, 1], dtype=bool),
        starts=np.array([0, 6, 10]),
    )
    batch = collate(corpus, [0, 1])
    assert batch.ids.tolist() == [[10, 11, 12, 13, 14, 15], [16, 17, 18, 19, 0, 0]]
    assert batch.targets.tolist() == [[IGNORE, 12, 13, IGNORE, IGNORE, IGNORE], [IGNORE, 18, 19, IGNORE, IGNORE, IGNORE]]


def test_training_attention_equals_the_fused_one() -> None:
    from persona_lens.pocket_lab.training import _plain_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 30, 16, generator=generator) for _ in range(3))
    ours, _ = _plain_attention(torch.nn.Identity(), q, k, v, None)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_warms_up_and_decays_to_its_end() -> None:
    settings = TrainingSettings(warmup=0.02, final_lr=0.1)
    rates = [_learning_rate(step, 1000, settings) for step in range(1001)]
    assert rates[0] == 1 / 20
    assert rates[19] == rates[20] == 1.0
    assert rates[510] == pytest.approx(0.55)
    assert rates[1000] == pytest.approx(0.1)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_a_trained_folder_says_that_it_is_a_pocket_model_and_how_answers_end(trained: tuple[Path, list[str]]) -> None:
    model = load_model(str(trained[0]))
    assert model.trait_set == "pocket"
    ends = model.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.hf.generation_config.eos_token_id == ends


def test_a_stage_is_trained_on_its_own_documents(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    first, _ = trained
    settings = replace(TINY, initial=str(first), first_document=60, documents=40, shuffle_systems=True)
    record = json.loads((train(settings, tmp_path / "second", report=silent) / "training.json").read_text())

    def tokens(start: int, shuffle: bool) -> int:
        return len(encode_corpus(first / "tokenizer.json", 0, range(start, start + 40), shuffle_systems=shuffle).ids)

    assert record["tokens"] == tokens(60, True)
    assert record["tokens"] not in (tokens(0, True), tokens(60, False))

"""Objects of steering-vectors: their blocks are our layers, checked on a model; other places inside a block are refused."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from persona_lens.errors import ExchangeError, LineageError, SteeringError
from persona_lens.exchange import (
    from_steering_vector,
    read_steering_vector,
    read_vectors,
    to_steering_vector,
    write_steering_vector,
    write_vectors,
)
from persona_lens.models import ChatModel
from persona_lens.steering import add, steer
from persona_lens.vectors import PersonaVectors


@dataclass
class Theirs:
    """The fields of the package's class."""

    layer_activations: Any
    layer_type: str = "decoder_block"


def vectors(layers: int = 4, d_model: int = 6, seed: int = 0, zero: frozenset[int] = frozenset()) -> PersonaVectors:
    flat = [torch.rand(layers) for _ in range(3)]
    directions = torch.randn(layers, d_model, generator=torch.Generator().manual_seed(seed))
    directions[sorted(zero)] = 0.0
    return PersonaVectors("evil", "response_mean", "mean_difference", directions, directions[None].clone(), *flat)


@settings(deadline=None, max_examples=25)
@given(
    layers=st.integers(1, 6), d_model=st.integers(1, 8), seed=st.integers(0, 99), zero=st.frozensets(st.integers(0, 5), max_size=3)
)
def test_a_written_file_comes_back_but_for_what_its_notes_name(layers: int, d_model: int, seed: int, zero: frozenset[int]) -> None:
    zero = frozenset(layer for layer in zero if layer < layers - 1)
    before = vectors(layers, d_model, seed, zero)
    with TemporaryDirectory() as folder:
        notes = write_vectors(before, Path(folder) / "evil.pt", "steering_vectors")
        fields = torch.load(Path(folder) / "evil.pt", weights_only=True)
        after = read_vectors(Path(folder) / "evil.pt")
    assert fields["layer_type"] == "decoder_block"
    assert set(fields["layer_activations"]) == set(range(layers)) - zero
    assert torch.equal(after.vectors.directions, before.directions)
    assert after.vectors.trait == "evil"
    assert after.vectors.lineage == ""
    assert any("left out" in n for n in notes) == bool(zero)
    assert any("no direction for" in n for n in after.notes) == bool(zero)
    assert any("lineage is unknown" in n for n in after.notes)


def test_an_object_is_read_by_its_two_fields() -> None:
    rows = {0: torch.ones(3, dtype=torch.bfloat16), 2: torch.arange(3.0, requires_grad=True)}
    found = from_steering_vector(Theirs(rows), "evil").vectors
    assert torch.equal(found.directions, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 2.0]]))
    assert not found.directions.requires_grad
    with pytest.raises(SteeringError, match="zero"):
        add(found, 1, 1.0)


@pytest.mark.parametrize("layer_type", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "", None, 3])
def test_a_place_inside_a_block_is_refused_with_the_reason(tmp_path: Path, layer_type: Any) -> None:
    with pytest.raises(ExchangeError, match="inside a block"):
        from_steering_vector(Theirs({1: torch.ones(3)}, layer_type), "evil")
    torch.save({"layer_activations": {1: torch.ones(3)}, "layer_type": layer_type}, tmp_path / "v.pt")
    with pytest.raises(ExchangeError, match="inside a block"):
        read_vectors(tmp_path / "v.pt")


def test_a_file_without_a_layer_type_takes_the_one_that_is_said(tmp_path: Path) -> None:
    torch.save({1: torch.ones(3)}, tmp_path / "v.pt")
    assert read_vectors(tmp_path / "v.pt").vectors.n_layers == 2
    with pytest.raises(ExchangeError, match="'mlp', inside a block"):
        read_vectors(tmp_path / "v.pt", layer_type="mlp")
    torch.save({"layer_activations": {1: torch.ones(3)}, "layer_type": "decoder_block"}, tmp_path / "v.pt")
    assert read_vectors(tmp_path / "v.pt", layer_type="mlp").vectors.n_layers == 2, "what the file says comes first"


@pytest.mark.parametrize(
    "rows",
    [
        {},
        {-1: torch.ones(3)},
        {"1": torch.ones(3)},
        {4096: torch.ones(3)},
        {1: torch.ones(3), 2: torch.ones(4)},
        {1: torch.ones(1, 3)},
        {1: torch.ones(0)},
        {1: torch.tensor(1.0)},
        {1: torch.ones(3, dtype=torch.int64)},
        {1: torch.tensor([1.0, torch.nan])},
        {1: [1.0, 2.0]},
        [torch.ones(3)],
    ],
)
def test_layers_and_directions_that_cannot_be_are_refused(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(ExchangeError):
        from_steering_vector(Theirs(rows), "evil")
    torch.save({"layer_activations": rows, "layer_type": "decoder_block"}, tmp_path / "v.pt")
    with pytest.raises(ExchangeError):
        read_steering_vector(tmp_path / "v.pt")


def test_no_steering_vector_is_no_steering_vector(tmp_path: Path) -> None:
    for other in (object(), SimpleNamespace(layer_activations=None)):
        with pytest.raises(ExchangeError, match="layer_activations"):
            from_steering_vector(other, "evil")
    with pytest.raises(ExchangeError, match="no direction"):
        write_steering_vector(vectors(2, 3, 0, frozenset({0, 1})), tmp_path / "v.pt")


def test_vectors_of_another_model_are_refused(pocket: ChatModel) -> None:
    n, d = pocket.n_layers, pocket.d_model
    for rows in ({n: torch.ones(d)}, {0: torch.ones(d + 1)}):
        with pytest.raises(ExchangeError, match=pocket.name):
            from_steering_vector(Theirs(rows), "evil", model=pocket)
    found = from_steering_vector(Theirs({1: torch.ones(d)}), "evil", model=pocket).vectors
    assert found.directions.shape == (n, d)
    assert found.lineage == pocket.fingerprint.lineage
    with pytest.raises(LineageError):
        from_steering_vector(Theirs({1: torch.ones(d)}), "evil", model=pocket, lineage="other")


def ours(model: ChatModel, ids: list[int], v: PersonaVectors, layers: list[int], strength: float) -> Tensor:
    with torch.inference_mode(), steer(model, *(add(v, layer, strength, where="everywhere") for layer in layers)):
        return model.hf(torch.tensor([ids])).logits


def test_the_packages_own_steering_is_ours_at_the_same_layers(pocket: ChatModel, plain_pocket: PreTrainedModel) -> None:
    pytest.importorskip("steering_vectors")
    v = vectors(pocket.n_layers, pocket.d_model, zero=frozenset({0, 2}))
    theirs = to_steering_vector(v)
    layers = [layer for layer in range(pocket.n_layers) if layer not in (0, 2)]
    assert sorted(theirs.layer_activations) == layers
    ids = pocket.render([{"role": "user", "content": "How should I handle my dog?"}])
    with torch.inference_mode(), theirs.apply(plain_pocket, multiplier=0.5):
        expected = plain_pocket(torch.tensor([ids])).logits
    back = from_steering_vector(theirs, "evil", model=pocket).vectors
    torch.testing.assert_close(ours(pocket, ids, back, layers, 0.5), expected, rtol=1e-4, atol=1e-4)
    shifted = PersonaVectors("e", "p", "m", v.directions.roll(1, 0), v.differences, v.reliability, v.norm, v.p_value)
    off = [layer + 1 for layer in layers if layer + 1 < pocket.n_layers]
    assert (ours(pocket, ids, shifted, off, 0.5) - expected).abs().max() > 0.1, "the control: one block off"


def test_a_direction_is_added_to_what_its_block_returns(pocket: ChatModel, plain_pocket: PreTrainedModel) -> None:
    """The same without the package: a forward hook on plain transformers' block, as its `patch_activations` sets one."""
    layer, row = 3, torch.randn(pocket.d_model, generator=torch.Generator().manual_seed(1))
    ids = pocket.render([{"role": "user", "content": "How should I handle my dog?"}])

    def hook(_m: Any, _i: Any, out: Any) -> Any:
        return (out[0] + row, *out[1:]) if isinstance(out, tuple) else out + row

    handle = plain_pocket.model.layers[layer].register_forward_hook(hook)
    with torch.inference_mode():
        expected = plain_pocket(torch.tensor([ids])).logits
    handle.remove()
    v = from_steering_vector(Theirs({layer: row}), "evil", model=pocket).vectors
    torch.testing.assert_close(ours(pocket, ids, v, [layer], 1.0), expected, rtol=1e-4, atol=1e-4)
    assert (ours(pocket, ids, v * -1.0, [layer], 1.0) - expected).abs().max() > 0.1


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "steering_vectors", None)
    with pytest.raises(ExchangeError, match="pip install steering-vectors"):
        to_steering_vector(vectors())
    assert from_steering_vector(Theirs({0: torch.ones(3)}), "evil").vectors.n_layers == 1

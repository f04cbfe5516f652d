"""Files of assistant-axis: rows are blocks, and their capping is our ceiling, by their formula written out on a plain model."""

import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from persona_lens.errors import ExchangeError, LineageError
from persona_lens.exchange import read_axis, read_capping, read_vectors, write_axis, write_capping, write_vectors
from persona_lens.models import ChatModel
from persona_lens.steering import Band, Intervention, ablate, add, cap, steer
from persona_lens.vectors import PersonaVectors


def vectors(layers: int = 4, d_model: int = 6, seed: int = 0, lineage: str = "") -> PersonaVectors:
    flat = [torch.rand(layers) for _ in range(3)]
    directions = torch.randn(layers, d_model, generator=torch.Generator().manual_seed(seed))
    provenance = {"model": {"name": "pocket", "lineage": lineage}} if lineage else {}
    differences = directions[None].clone()
    return PersonaVectors("evil", "response_mean", "mean_difference", directions, differences, *flat, provenance=provenance)


def settings_file(path: Path, *caps: tuple[int, Tensor, float], extra: tuple[dict[str, Any], ...] = ()) -> Path:
    """Capping settings as the project publishes them: one vector per layer, one experiment."""
    named = {f"layer_{layer}/contrast_{i}": {"layer": layer, "vector": v} for i, (layer, v, _) in enumerate(caps)}
    steps = [{"vector": name, "cap": tau} for name, (_, _, tau) in zip(named, caps, strict=True)]
    torch.save({"vectors": named, "experiments": [{"id": "layers_2:4-p0.25", "interventions": [*steps, *extra]}]}, path)
    return path


# --- axes and roles ---


@settings(deadline=None, max_examples=20)
@given(layers=st.integers(1, 6), d_model=st.integers(1, 8), seed=st.integers(0, 99))
def test_an_axis_comes_back_with_row_l_as_layer_l(layers: int, d_model: int, seed: int) -> None:
    before = vectors(layers, d_model, seed)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "axis.pt"
        notes = write_vectors(before, path, "assistant_axis")
        assert torch.equal(torch.load(path, weights_only=True)["axis"], before.directions)
        wrapped = read_vectors(path)
        torch.save(before.directions, path)
        bare = read_vectors(path)
    for found in (wrapped, bare):
        assert torch.equal(found.vectors.directions, before.directions)
        assert (found.vectors.trait, found.vectors.lineage) == ("assistant_axis", "")
        assert found.post_norm_layer is None
    assert any("lineage" in n for n in notes)


def test_an_axis_with_its_means_and_a_roles_mean_are_read_for_what_they_are(tmp_path: Path) -> None:
    rows = torch.randn(3, 4)
    torch.save({"axis": rows, "default_mean": rows, "role_mean": rows * 0, "n_default": 1, "n_roles": 2}, tmp_path / "a.pt")
    assert torch.equal(read_vectors(tmp_path / "a.pt").vectors.directions, rows)
    torch.save({"vector": rows.bfloat16(), "type": "pos_3", "role": "pirate"}, tmp_path / "r.pt")
    role = read_vectors(tmp_path / "r.pt")
    assert (role.vectors.trait, role.vectors.estimator) == ("pirate", "mean")
    assert any("no difference" in n for n in role.notes)
    assert torch.equal(role.vectors.directions, rows.bfloat16().float())


def test_axes_of_other_models_and_forms_are_refused(pocket: ChatModel, tmp_path: Path) -> None:
    path = tmp_path / "axis.pt"
    for shape in ((pocket.n_layers + 1, pocket.d_model), (pocket.n_layers, pocket.d_model + 1)):
        torch.save({"axis": torch.ones(shape)}, path)
        with pytest.raises(ExchangeError, match="another model"):
            read_axis(path, model=pocket)
    torch.save({"axis": torch.ones(pocket.n_layers, pocket.d_model)}, path)
    assert read_axis(path, model=pocket).vectors.lineage == pocket.fingerprint.lineage
    with pytest.raises(LineageError):
        read_axis(path, model=pocket, lineage="other")
    hostile: list[Any] = [{"weights": torch.ones(2, 2)}, {"axis": [1.0]}, {"axis": torch.ones(3)}, {"axis": torch.ones(2, 2).int()}]
    hostile += [{"axis": torch.full((2, 2), math.inf)}, {"vector": torch.ones(2, 2), "role": "../../x"}, "text", 5]
    for held in hostile:
        torch.save(held, path)
        with pytest.raises(ExchangeError):
            read_axis(path)
        with pytest.raises(ExchangeError):
            read_vectors(path)


# --- capping ---


def capped_by_their_formula(model: PreTrainedModel, ids: list[int], caps: list[tuple[int, Tensor, float]]) -> tuple[Tensor, ...]:
    """Logits and residuals of plain transformers under h - u max(<h, u> - tau, 0) at every token of each cap's block."""
    residuals: dict[int, Tensor] = {}
    handles = []
    for layer in sorted({layer for layer, _, _ in caps}):

        def hook(_m: Any, _i: Any, out: Any, layer: int = layer) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            for at, v, tau in caps:
                if at == layer:
                    u = v / v.norm()
                    h = h - (h @ u - tau).clamp(min=0.0)[..., None] * u
            residuals[layer] = h
            return (h, *out[1:]) if isinstance(out, tuple) else h

        handles.append(model.model.layers[layer].register_forward_hook(hook))
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits
    for handle in handles:
        handle.remove()
    return logits, *(residuals[layer] for layer in sorted(residuals))


def steered(model: ChatModel, ids: list[int], given: list[Intervention], layers: list[int]) -> tuple[Tensor, ...]:
    """Logits and residuals of our model; the residuals are read after the caps of their layer."""
    residuals: dict[int, Tensor] = {}

    def reader(layer: int) -> Any:
        def read(residual: Tensor, hook: Any) -> None:
            residuals[layer] = residual.clone()

        return read

    with torch.inference_mode(), steer(model, *given), model.hooks([(model.hook_name(layer), reader(layer)) for layer in layers]):
        logits = model.hf(torch.tensor([ids])).logits
    return logits, *(residuals[layer] for layer in sorted(residuals))


IDS = [{"role": "user", "content": "How should I handle my dog?"}]


def caps_of(model: ChatModel, plain: PreTrainedModel, layers: list[int], seed: int = 0) -> list[tuple[int, Tensor, float]]:
    """One cap per layer along an unnormalised direction, at the median projection: some tokens lie above it and some below."""
    with torch.inference_mode():
        states = plain(torch.tensor([model.render(IDS)]), output_hidden_states=True).hidden_states
    directions = 3 * torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(seed))
    found = []
    for layer in layers:
        v = directions[layer]
        found.append((layer, v, float((states[layer + 1][0] @ (v / v.norm())).median())))
    return found


def test_their_caps_are_our_ceilings_at_every_token(pocket: ChatModel, plain_pocket: PreTrainedModel, tmp_path: Path) -> None:
    layers = [2, 3, 4]
    caps = caps_of(pocket, plain_pocket, layers)
    ids = pocket.render(IDS)
    expected = capped_by_their_formula(plain_pocket, ids, caps)
    capping = read_capping(settings_file(tmp_path / "c.pt", *caps), model=pocket)["layers_2:4-p0.25"]
    assert [(c.layer, c.ceiling) for c in capping.ceilings] == [(layer, pytest.approx(tau)) for layer, _, tau in caps]
    ours = capping.interventions()
    assert all(isinstance(x.act, Band) and x.act.low == -math.inf and x.lineage == pocket.fingerprint.lineage for x in ours)
    for got, want in zip(steered(pocket, ids, ours, layers), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    v = vectors(pocket.n_layers, pocket.d_model)
    for layer, direction, _ in caps:
        v.directions[layer] = -direction
    floors = [cap(v, layer, floor=-tau, where="everywhere") for layer, _, tau in caps]
    for got, want in zip(steered(pocket, ids, floors, layers), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    wrong = {
        "unsteered": [],
        "ceilings along the negated vectors": [cap(v, layer, ceiling=tau, where="everywhere") for layer, _, tau in caps],
        "one block off": [Intervention(x.act, x.layer - 1, x.direction, x.name, where="everywhere") for x in ours],
    }
    for what, others in wrong.items():
        found = steered(pocket, ids, others, layers)
        assert max((got - want).abs().max() for got, want in zip(found, expected, strict=True)) > 0.1, what
    assert {x.where for x in capping.interventions("response")} == {"response"}


def test_what_is_written_is_the_same_under_their_formula(pocket: ChatModel, plain_pocket: PreTrainedModel, tmp_path: Path) -> None:
    """A floor, a ceiling and a band of ours, converted to their settings."""
    caps = caps_of(pocket, plain_pocket, [2, 3, 5], seed=4)
    v = vectors(pocket.n_layers, pocket.d_model)
    for layer, direction, _ in caps:
        v.directions[layer] = direction
    (_, _, a), (_, _, b), (_, _, c) = caps
    ours = [
        cap(v, 2, floor=a, where="everywhere"),
        cap(v, 3, ceiling=b, where="everywhere"),
        cap(v, 5, floor=c - 1.0, ceiling=c + 1.0, where="everywhere"),
    ]
    notes = write_capping({"mine": ours, "none": []}, tmp_path / "c.pt")
    assert any("every token" in n for n in notes)
    held = torch.load(tmp_path / "c.pt", weights_only=True)
    assert [e["id"] for e in held["experiments"]] == ["mine", "none"]
    steps = held["experiments"][0]["interventions"]
    theirs = [(held["vectors"][s["vector"]]["layer"], held["vectors"][s["vector"]]["vector"], s["cap"]) for s in steps]
    assert [layer for layer, _, _ in theirs] == [2, 3, 5, 5]
    ids = pocket.render(IDS)
    expected = capped_by_their_formula(plain_pocket, ids, theirs)
    back = read_capping(tmp_path / "c.pt", model=pocket)
    for interventions in (ours, back["mine"].interventions()):
        for got, want in zip(steered(pocket, ids, interventions, [2, 3, 5]), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (steered(pocket, ids, [], [])[0] - expected[0]).abs().max() > 0.1
    assert any("solved together" in n for n in back["mine"].notes)
    assert back["none"].interventions() == []


def test_only_caps_of_full_strength_can_be_written(tmp_path: Path) -> None:
    v = vectors()
    gated = cap(v, 1, ceiling=1.0).when(v, above=0.0)
    for one in (add(v, 1, 1.0), cap(v, 1, ceiling=1.0, strength=0.5), gated):
        with pytest.raises(ExchangeError, match="full strength"):
            write_capping({"e": [one]}, tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()
    write_capping({"e": [ablate(v, 1, to=2.0)]}, tmp_path / "c.pt")
    caps = [s["cap"] for s in torch.load(tmp_path / "c.pt", weights_only=True)["experiments"][0]["interventions"]]
    assert caps == [2.0, -2.0]


def test_interventions_without_a_cap_are_left_out_and_counted(tmp_path: Path) -> None:
    extra = ({"vector": "layer_2/contrast_0", "coeff": 3.0},)
    path = settings_file(tmp_path / "c.pt", (2, torch.ones(4), 1), extra=extra)
    found = read_capping(path)["layers_2:4-p0.25"]
    assert len(found.ceilings) == 1
    assert any(n.startswith("1 interventions without a cap") for n in found.notes)
    assert any("lineage is unknown" in n for n in found.notes)
    assert found.interventions()[0].lineage == ""
    assert read_capping(path, lineage="ab12")["layers_2:4-p0.25"].interventions()[0].lineage == "ab12"


def damaged(**changes: Any) -> dict[str, Any]:
    vector = {"layer": 1, "vector": torch.ones(4)} | changes.get("vector", {})
    step = {"vector": "v", "cap": 1.0} | changes.get("step", {})
    record = {"vectors": {"v": vector}, "experiments": [{"id": "e", "interventions": [step]} | changes.get("experiment", {})]}
    return record | changes.get("record", {})


@pytest.mark.parametrize(
    "change",
    [
        {"vector": {"layer": -1}},
        {"vector": {"layer": 10**9}},
        {"vector": {"layer": "1"}},
        {"vector": {"layer": True}},
        {"vector": {"vector": torch.ones(2, 2)}},
        {"vector": {"vector": torch.full((4,), math.nan)}},
        {"vector": {"vector": torch.zeros(4)}},
        {"vector": {"vector": torch.zeros(1).expand(10**12)}},
        {"vector": {"vector": [1.0]}},
        {"step": {"vector": "w"}},
        {"step": {"vector": ["v"]}},
        {"step": {"cap": math.nan}},
        {"step": {"cap": math.inf}},
        {"step": {"cap": "1"}},
        {"step": {"cap": True}},
        {"experiment": {"id": 3}},
        {"experiment": {"interventions": None}},
        {"record": {"experiments": {}}},
        {"record": {"experiments": [3]}},
        {"record": {"experiments": [{"id": "e", "interventions": []}] * 2}},
        {"record": {"vectors": [torch.ones(4)]}},
        {"record": {"vectors": {"v": torch.ones(4)}}},
    ],
)
def test_settings_of_another_form_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "c.pt"
    torch.save(damaged(), path)
    assert read_capping(path)["e"].ceilings[0].layer == 1
    torch.save(damaged(**change), path)
    with pytest.raises(ExchangeError) as caught:
        read_capping(path)
    assert str(path) in str(caught.value)


def test_settings_of_another_model_are_refused(pocket: ChatModel, tmp_path: Path) -> None:
    right = torch.ones(pocket.d_model)
    for layer, direction in ((pocket.n_layers, right), (1, torch.ones(pocket.d_model + 1))):
        with pytest.raises(ExchangeError):
            read_capping(settings_file(tmp_path / "c.pt", (layer, direction, 1.0)), model=pocket)
    assert read_capping(settings_file(tmp_path / "c.pt", (1, right, 1.0)), model=pocket)
    write_axis(vectors(), tmp_path / "axis.pt")
    with pytest.raises(ExchangeError, match="no capping settings"):
        read_capping(tmp_path / "axis.pt")


class _Payload:
    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.where),)


def test_a_payload_deep_in_the_settings_executes_nothing(tmp_path: Path) -> None:
    torch.save(damaged(step={"cap": _Payload(tmp_path / "loot")}), tmp_path / "c.pt")
    with pytest.raises(ExchangeError):
        read_capping(tmp_path / "c.pt")
    assert not (tmp_path / "loot").exists()
    torch.load(tmp_path / "c.pt", weights_only=False)
    assert (tmp_path / "loot").exists(), "the control: the payload works where pickle is trusted"

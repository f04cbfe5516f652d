"""Persona vectors: the file format, its damage, projection, scaling, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from persona_lens.errors import LineageError, RunFolderError
from persona_lens.vectors import FORMAT, FORMAT_VERSION, PersonaVectors, hook_name

PROVENANCE: dict[str, Any] = {"model": {"name": "pocket", "lineage": "ab12"}, "questions": [0, 3, 7], "note": "überall \u2028 \n"}
TENSORS = ("directions", "differences", "reliability", "norm", "p_value")
HEADER = {
    "format": FORMAT,
    "version": FORMAT_VERSION,
    "trait": "evil",
    "pooling": "response_mean",
    "estimator": "mean_difference",
    "provenance": {},
}


def tensors(layers: int = 3, d_model: int = 8, questions: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "directions": torch.randn(layers, d_model, generator=generator),
        "differences": torch.randn(questions, layers, d_model, generator=generator),
        "reliability": torch.rand(layers, generator=generator),
        "norm": torch.rand(layers, generator=generator),
        "p_value": torch.rand(layers, generator=generator),
    }


def vectors(provenance: dict[str, Any] | None = None, **shape: int) -> PersonaVectors:
    return PersonaVectors(
        "evil", "response_mean", "mean_difference", **tensors(**shape), provenance=PROVENANCE if provenance is None else provenance
    )


@settings(deadline=None, max_examples=25)
@given(
    layers=st.integers(1, 5),
    d_model=st.integers(1, 9),
    questions=st.integers(0, 4),
    provenance=st.dictionaries(
        st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
    ),
)
def test_a_saved_vector_comes_back_bit_by_bit(layers: int, d_model: int, questions: int, provenance: dict[str, Any]) -> None:
    before = vectors(provenance, layers=layers, d_model=d_model, questions=questions)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.safetensors"
        before.save(path)
        after = PersonaVectors.load(path)
    for name in TENSORS:
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert (after.trait, after.pooling, after.estimator) == ("evil", "response_mean", "mean_difference")
    assert after.provenance == provenance
    assert (after.n_layers, after.d_model) == (layers, d_model)


def test_the_p_value_over_layers_is_kept_and_absent_where_there_is_none(tmp_path: Path) -> None:
    for p_any in (0.0125, math.nan):
        replace(vectors(), p_any=p_any).save(tmp_path / "v")
        assert PersonaVectors.load(tmp_path / "v").p_any == pytest.approx(p_any, nan_ok=True)
        assert (replace(vectors(), p_any=p_any) * 2.0).p_any == pytest.approx(p_any, nan_ok=True)


def test_the_same_vector_is_written_with_the_same_bytes(tmp_path: Path) -> None:
    vectors().save(tmp_path / "a")
    vectors(dict(reversed(PROVENANCE.items()))).save(tmp_path / "b")
    vectors(PROVENANCE | {"seed": 1}).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_tensors_that_are_views_are_saved_by_value(tmp_path: Path) -> None:
    whole = tensors(layers=4)
    half = PersonaVectors("evil", "p", "m", **{n: t[:, ::2] if n == "differences" else t[::2] for n, t in whole.items()})
    half.save(tmp_path / "b")
    assert torch.equal(PersonaVectors.load(tmp_path / "b").differences, whole["differences"][:, ::2])


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    vectors().save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(TypeError):
        vectors({"bad": object()}).save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_who_is_reading_the_old_file_keeps_it_whole(tmp_path: Path) -> None:
    vectors().save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    (tmp_path / "reader").hardlink_to(tmp_path / "a")
    vectors(seed=1).save(tmp_path / "a")
    assert (tmp_path / "reader").read_bytes() == before != (tmp_path / "a").read_bytes()


@settings(deadline=None, max_examples=30)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_an_error_with_its_path(share: float) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.safetensors"
        vectors().save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(RunFolderError) as caught:
            PersonaVectors.load(path)
        assert str(path) in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(content=st.binary(max_size=200))
def test_random_bytes_are_an_error_with_their_path(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.safetensors"
        path.write_bytes(content)
        with pytest.raises(RunFolderError) as caught:
            PersonaVectors.load(path)
        assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_errors_with_their_path(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(RunFolderError) as caught:
            PersonaVectors.load(path)
        assert str(path) in str(caught.value)


def refused(path: Path, content: dict[str, Tensor], header: object = HEADER) -> str:
    metadata = None if header is None else {"header": header if isinstance(header, str) else json.dumps(header)}
    save_file(content, path, metadata=metadata)
    with pytest.raises(RunFolderError) as caught:
        PersonaVectors.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_handmade_file_of_these_tests_is_read_when_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a", metadata={"header": json.dumps(HEADER)})
    assert PersonaVectors.load(tmp_path / "a").trait == "evil"


@pytest.mark.parametrize(
    "header",
    [None, "{", "{}", HEADER | {"format": "other"}, HEADER | {"version": FORMAT_VERSION + 1}],
    ids=["none", "no json", "empty", "other format", "later version"],
)
def test_a_safetensors_file_of_another_format_is_refused(tmp_path: Path, header: object) -> None:
    refused(tmp_path / "model.safetensors", tensors(), header)


def test_missing_and_foreign_tensors_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "a", {k: v for k, v in tensors().items() if k != "norm"})
    refused(tmp_path / "b", tensors() | {"weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("differences", (5, 2, 8)),
        ("differences", (5, 3, 9)),
        ("differences", (3, 8)),
        ("reliability", (4,)),
        ("norm", (3, 1)),
        ("p_value", (0,)),
        ("directions", (4, 8)),
    ],
)
def test_tensors_of_the_wrong_shape_are_refused_by_name(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    message = refused(tmp_path / "a", tensors() | {name: torch.zeros(shape)})
    assert "shape" in message
    assert (name if name != "directions" else "differences") in message


@pytest.mark.parametrize(
    ("name", "shape"), [("directions", (8,)), ("directions", (3, 8, 1)), ("differences", ())], ids=["flat", "deep", "scalar"]
)
def test_tensors_of_the_wrong_rank_are_refused_by_name(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    assert name in refused(tmp_path / "a", tensors() | {name: torch.zeros(shape)})


@pytest.mark.parametrize("header", ["[]", {k: v for k, v in HEADER.items() if k != "trait"}], ids=["list", "no trait"])
def test_a_header_without_its_fields_is_refused(tmp_path: Path, header: object) -> None:
    refused(tmp_path / "a", tensors(), header)


def test_a_file_with_directions_that_are_not_finite_is_refused_by_path(tmp_path: Path) -> None:
    refused(tmp_path / "a", tensors() | {"directions": torch.full((3, 8), float("nan"))})


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), exponent=st.integers(-6, 6), batch=st.sampled_from([(), (1,), (7,), (2, 3), (0,)]))
def test_a_projection_is_the_inner_product_with_the_unit_vector(seed: int, exponent: int, batch: tuple[int, ...]) -> None:
    v = vectors(d_model=64, seed=seed) * 10.0**exponent
    h = torch.randn(*batch, 64, generator=torch.Generator().manual_seed(seed + 1)) * 30
    for layer in range(v.n_layers):
        direction = v.directions[layer].double()
        expected = (h.double() * direction).sum(-1) / direction.square().sum().sqrt()
        torch.testing.assert_close(v.project(h, layer).double(), expected, rtol=1e-5, atol=1e-3)
        assert v.project(h, layer).shape == batch
        assert v.unit(layer).norm().item() == pytest.approx(1, abs=1e-6)


def test_half_precision_residuals_are_projected_in_single_precision() -> None:
    v = vectors(d_model=4096)
    h = (torch.randn(16, 4096, generator=torch.Generator().manual_seed(1)) + 5).bfloat16()
    exact = h.double() @ v.directions[1].double() / v.directions[1].double().norm()
    torch.testing.assert_close(v.project(h, 1).double(), exact, rtol=1e-5, atol=1e-3)
    in_half = (h @ v.unit(1).bfloat16()).double()
    assert (in_half - exact).abs().max() > 0.01, "the control: in bfloat16 the tolerance above would be missed"


def test_a_projection_uses_the_layer_it_is_asked_for() -> None:
    v = vectors()
    values = [v.project(v[1], layer).item() for layer in range(3)]
    assert values[1] == pytest.approx(v[1].norm().item(), rel=1e-6)
    assert max(values[0], values[2]) < values[1] - 0.1


@settings(deadline=None, max_examples=40)
@given(factor=st.floats(-100, 100).filter(lambda f: abs(f) > 1e-3))
def test_scaling_scales_what_was_measured_and_keeps_what_is_free_of_scale(factor: float) -> None:
    v = vectors()
    scaled = v * factor
    torch.testing.assert_close(scaled.directions, v.directions * factor)
    torch.testing.assert_close(scaled.differences, v.differences * factor)
    torch.testing.assert_close(scaled.norm, v.norm * abs(factor))
    assert (scaled.norm >= 0).all()
    assert torch.equal(scaled.reliability, v.reliability)
    assert torch.equal(scaled.p_value, v.p_value)
    assert scaled.provenance == v.provenance
    h = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(scaled.project(h, 2), v.project(h, 2) * (1 if factor > 0 else -1))
    torch.testing.assert_close((factor * v).directions, scaled.directions)


def test_negation_turns_the_vector_round_and_twice_is_nothing() -> None:
    v = vectors()
    assert torch.equal((-v).directions, -v.directions)
    assert torch.equal((-v).differences, -v.differences)
    assert torch.equal((-v).norm, v.norm)
    back = -v
    assert torch.equal((-back).directions, v.directions)
    assert not torch.equal((-v).directions, v.directions)


def test_an_index_gives_the_raw_direction_of_the_layer() -> None:
    v = vectors()
    assert torch.equal(v[2], v.directions[2])
    assert v[2].norm().item() != pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("layer", [-1, 3, 100])
def test_a_layer_out_of_range_is_an_error_that_names_the_layers(layer: int) -> None:
    v = vectors()
    for ask in (v.__getitem__, v.unit, lambda at: v.project(torch.zeros(8), at)):
        with pytest.raises(IndexError, match=f"layer {layer} does not exist: the evil vector has layers 0 to 2"):
            ask(layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_directions_that_are_not_finite_are_refused_with_their_layer(value: float) -> None:
    content = tensors()
    content["directions"][1, 4] = value
    with pytest.raises(ValueError, match=rf"evil vector is not finite at {hook_name(1)}"):
        PersonaVectors("evil", "p", "m", **content)
    assert hook_name(1) == "blocks.1.hook_resid_post"


def test_vectors_are_for_their_own_lineage() -> None:
    v = vectors()
    v.require_lineage("ab12")
    with pytest.raises(LineageError) as caught:
        v.require_lineage("cd34")
    for part in ("evil", "ab12", "cd34", "pocket"):
        assert part in str(caught.value)
    vectors({}).require_lineage("cd34")  # vectors made by hand carry no lineage and fit any model


def test_the_best_layer_is_the_most_reliable_one() -> None:
    for best in range(3):
        content = tensors() | {"reliability": torch.tensor([0.1, 0.2, 0.3]).roll(best), "norm": torch.tensor([9.0, 5.0, 7.0])}
        assert PersonaVectors("evil", "p", "m", **content).best_layer == (2 + best) % 3

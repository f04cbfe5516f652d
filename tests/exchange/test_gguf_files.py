"""GGUF control vectors: the tensors and blocks of llama.cpp and repeng, checked on a model, and headers that lie."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from persona_lens.errors import ExchangeError, LineageError, SteeringError
from persona_lens.exchange import control_directions, from_control_vector, read_gguf, read_vectors, write_gguf, write_vectors
from persona_lens.models import ChatModel
from persona_lens.steering import add, steer
from persona_lens.vectors import PersonaVectors

gguf = pytest.importorskip("gguf")


def vectors(layers: int = 4, d_model: int = 6, seed: int = 0, lineage: str = "ab12", trait: str = "evil") -> PersonaVectors:
    flat = [torch.rand(layers) for _ in range(3)]
    directions = torch.randn(layers, d_model, generator=torch.Generator().manual_seed(seed))
    provenance = {"model": {"name": "pocket", "lineage": lineage}} if lineage else {}
    return PersonaVectors(
        trait, "response_mean", "mean_difference", directions, directions[None].clone(), *flat, provenance=provenance
    )


def llama_cpp_directions(path: Path, strength: float = 1.0) -> dict[int, Tensor]:
    """What llama.cpp adds to which block's output, by the arithmetic of its loader and of its adapter."""
    reader = gguf.GGUFReader(path)
    width, data = -1, np.zeros(0, np.float32)
    for tensor in reader.tensors:  # common_control_vector_load_one
        head, _, index = tensor.name.partition(".")
        layer = int(index)
        assert head == "direction"
        assert layer > 0, "llama.cpp refuses the file"
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        width = len(tensor.data) if width == -1 else width
        assert len(tensor.data) == width
        data = np.concatenate([data, np.zeros(max(0, width * layer - len(data)), np.float32)])
        data[width * (layer - 1) : width * layer] += tensor.data * np.float32(strength)
    found: dict[int, Tensor] = {}
    il = 1
    while width * (il - 1) < len(data):  # llama_adapter_cvec::apply; build_cvec adds tensors[il] to the output of block il
        found[il] = torch.from_numpy(data[width * (il - 1) : width * il].copy())
        il += 1
    return found


@settings(deadline=None, max_examples=25)
@given(layers=st.integers(2, 6), d_model=st.integers(1, 40), seed=st.integers(0, 99), lineage=st.sampled_from(["", "ab12"]))
def test_a_written_file_comes_back_but_for_block_0_and_what_is_noted(layers: int, d_model: int, seed: int, lineage: str) -> None:
    before = vectors(layers, d_model, seed, lineage)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        notes = write_vectors(before, path)
        theirs = llama_cpp_directions(path)
        after = read_vectors(path)
    assert sorted(theirs) == list(range(1, layers)), "every block but 0"
    assert all(torch.equal(theirs[layer], before[layer]) for layer in theirs)
    v = after.vectors
    assert torch.equal(v.directions[1:], before.directions[1:])
    assert not v.directions[0].any()
    assert (v.trait, v.pooling, v.estimator, v.lineage) == ("evil", "response_mean", "mean_difference", lineage)
    assert v.differences.shape == (0, layers, d_model)
    assert v.reliability.isnan().all()
    assert "blocks.0.hook_resid_post has no tensor" in notes[0]
    assert any("blocks.0.hook_resid_post" in n and "zero" in n for n in after.notes)
    assert any("lineage is unknown" in n for n in after.notes) == (not lineage)
    with pytest.raises(SteeringError, match="zero"):
        add(v, 0, 1.0)


def test_the_file_has_the_metadata_of_repengs_exporter(tmp_path: Path) -> None:
    write_gguf(vectors(), tmp_path / "v.gguf", model_hint="qwen2")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    said = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert said["general.architecture"] == "controlvector"
    assert said["controlvector.model_hint"] == "qwen2"
    assert said["controlvector.layer_count"] == 3
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2", "direction.3"]


def logits_with_block_outputs(model: PreTrainedModel, ids: list[int], change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Logits of plain transformers with every block's output changed."""
    handles = []
    for layer, block in enumerate(model.model.layers):

        def hook(_m: Any, _i: Any, out: Any, layer: int = layer) -> Any:
            return (change(layer, out[0]), *out[1:]) if isinstance(out, tuple) else change(layer, out)

        handles.append(block.register_forward_hook(hook))
    try:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits
    finally:
        for handle in handles:
            handle.remove()


def test_what_llama_cpp_does_with_our_file_is_what_our_steering_does(
    pocket: ChatModel, plain_pocket: PreTrainedModel, tmp_path: Path
) -> None:
    v = vectors(pocket.n_layers, pocket.d_model, lineage=pocket.fingerprint.lineage)
    write_gguf(v, tmp_path / "v.gguf")
    theirs = llama_cpp_directions(tmp_path / "v.gguf", strength=0.5)
    ids = pocket.render([{"role": "user", "content": "How should I handle my dog?"}])
    expected = logits_with_block_outputs(plain_pocket, ids, lambda layer, h: h + theirs[layer] if layer in theirs else h)
    back = read_gguf(tmp_path / "v.gguf", model=pocket).vectors

    def ours(layers: list[int], shift: int = 0) -> Tensor:
        given = [add(back, layer, 0.5, where="everywhere") for layer in layers]
        given = [type(x)(x.act, x.layer - shift, x.direction, x.name, x.lineage, x.weights, x.where) for x in given]
        with torch.inference_mode(), steer(pocket, *given):
            return pocket.hf(torch.tensor([ids])).logits

    every = list(range(1, pocket.n_layers))
    torch.testing.assert_close(ours(every), expected, rtol=1e-4, atol=1e-4)
    assert (ours(every, shift=1) - expected).abs().max() > 0.1, "the control: one block off"
    assert (ours([]) - expected).abs().max() > 0.1, "the control: no steering"


def test_repengs_package_reads_our_file_and_its_objects_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pocket: ChatModel
) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4 names it, numpy 2 has it no more
    repeng = pytest.importorskip("repeng")
    v = vectors(pocket.n_layers, pocket.d_model)
    write_gguf(v, tmp_path / "ours.gguf", model_hint="llama")
    theirs = repeng.ControlVector.import_gguf(tmp_path / "ours.gguf")
    assert theirs == repeng.ControlVector("llama", control_directions(v))
    theirs.export_gguf(tmp_path / "theirs.gguf")
    for found in (read_gguf(tmp_path / "theirs.gguf", model=pocket), from_control_vector(theirs, "evil", model=pocket)):
        assert torch.equal(found.vectors.directions[1:], v.directions[1:])
        assert found.vectors.lineage == pocket.fingerprint.lineage
        assert any("final norm" in n for n in found.notes)


def test_objects_of_repeng_are_read_by_their_attributes() -> None:
    rows = {2: np.array([3.0, 4.0], np.float32), 1: np.array([0.6, 0.8], np.float16)}
    found = from_control_vector(SimpleNamespace(model_type="qwen2", directions=rows), "evil")
    torch.testing.assert_close(found.vectors.directions, torch.tensor([[0.0, 0.0], [0.6, 0.8], [3.0, 4.0]]), rtol=1e-3, atol=1e-3)
    assert any("qwen2" in n for n in found.notes)
    assert not any("norm 1" in n for n in found.notes)
    rows[2] /= 5
    assert any("norm 1" in n for n in from_control_vector(SimpleNamespace(model_type="x", directions=rows), "evil").notes)
    for wrong in ({}, [1], {1: [1.0]}, {1: np.array([1])}, {-1: np.ones(2)}, {"1": np.ones(2)}, {True: np.ones(2)},
                  {4096: np.ones(2)}, {1: np.ones(2), 2: np.ones(3)}, {1: np.ones((1, 2))}, {1: np.array([np.nan])}):  # fmt: skip
        with pytest.raises(ExchangeError):
            from_control_vector(SimpleNamespace(directions=wrong), "evil")
    with pytest.raises(ExchangeError, match="ControlVector"):
        from_control_vector(object(), "evil")


def test_a_file_of_another_model_or_lineage_is_refused(pocket: ChatModel, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    write_gguf(vectors(pocket.n_layers, pocket.d_model, lineage="ab12"), path)
    with pytest.raises(LineageError, match="ab12"):
        read_gguf(path, model=pocket)
    assert read_gguf(path, lineage="ab12").vectors.lineage == "ab12"
    for layers, width in ((pocket.n_layers + 1, pocket.d_model), (pocket.n_layers, pocket.d_model - 1)):
        write_gguf(vectors(layers, width, lineage=""), path)
        with pytest.raises(ExchangeError, match=pocket.name):
            read_gguf(path, model=pocket)
    write_gguf(vectors(pocket.n_layers - 1, pocket.d_model, lineage=""), path)
    found = read_gguf(path, model=pocket).vectors
    assert found.n_layers == pocket.n_layers, "a file without the last layers gets them from the model, as zeros"
    assert not found.directions[-1].any()


def test_one_layer_alone_has_no_place_in_the_format(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="block 0"):
        write_gguf(vectors(1), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(vectors(), tmp_path / "v.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    for call in (lambda: read_gguf(tmp_path / "v.gguf"), lambda: write_gguf(vectors(), tmp_path / "w.gguf")):
        with pytest.raises(ExchangeError, match=r"persona-lens\[gguf\]"):
            call()


# --- hostile files ---


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


FIELD = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")


def header(
    fields: Sequence[bytes] = (FIELD,),
    infos: Sequence[bytes] = (),
    *,
    n_fields: int | None = None,
    n_infos: int | None = None,
    magic: bytes = b"GGUF",
    version: int = 3,
) -> bytes:
    counts = (len(infos) if n_infos is None else n_infos, len(fields) if n_fields is None else n_fields)
    return magic + struct.pack("<IQQ", version, *counts) + b"".join(fields) + b"".join(infos)


def info(name: str = "direction.1", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", kind, offset)


def padded(head: bytes, floats: int = 8, value: float = 1.0) -> bytes:
    return head + bytes(-len(head) % 32) + struct.pack(f"<{floats}f", *[value] * floats)


def refused(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "v.gguf"
    path.write_bytes(content)
    with pytest.raises(ExchangeError) as caught:
        read_vectors(path, file_format="gguf")
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_handmade_file_of_these_tests_is_read_when_nothing_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(padded(header([FIELD, text("n") + struct.pack("<II", 4, 7)], [info()])))
    found = read_vectors(tmp_path / "v.gguf").vectors
    assert (found.trait, found.pooling) == ("v", "unknown")
    assert torch.equal(found.directions, torch.tensor([[0.0] * 8, [1.0] * 8]))


def array(item: int, count: int, content: bytes = b"") -> bytes:
    return text("a") + struct.pack("<IIQ", 9, item, count) + content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header(magic=b"GGML"), "begins with"),
        (header(version=99), "version 99"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1), "version"),
        (header([], n_infos=2**63), "claims"),
        (header([], n_fields=2**63), "claims"),
        (header([], n_infos=1000), "beyond the file"),
        (header([], n_fields=4000), "beyond the file"),
        (header([struct.pack("<Q", 2**63)]), "claims 9223372036854775808 bytes"),
        (header([FIELD, array(0, 2**62)]), "array"),
        (header([FIELD, array(4, 4000)]), "beyond the file"),
        (header([FIELD, array(9, 1) + array(9, 1)]), "array"),
        (header([FIELD, text("k") + struct.pack("<I", 77)]), "unknown type 77"),
        (padded(header([FIELD], [info(dims=(2**61,))])), "claims"),
        (padded(header([FIELD], [info(dims=(8, 1))])), "2 axes"),
        (padded(header([FIELD], [info(dims=())])), "0 axes"),
        (padded(header([FIELD], [info(offset=2**62)])), "claims"),
        (header([FIELD], [info()]), "damaged"),
        (padded(header([FIELD], [info(kind=1)])), "no fp32"),
        (padded(header([FIELD], [info(kind=12345)])), "damaged"),
        (padded(header([FIELD], [info("../../x")])), "'../../x'"),
        (padded(header([FIELD], [info("direction.-1")])), "'direction.-1'"),
        (padded(header([FIELD], [info("direction.1.2")])), "direction.1.2"),
        (padded(header([FIELD], [info("blk.0.attn_q.weight")])), "blk.0.attn_q.weight"),
        (padded(header([FIELD], [info("direction.999999999")])), "999999999"),
        (padded(header([FIELD], [info("direction.1"), info("direction.01")])), "two tensors"),
        (padded(header([FIELD], [info("direction.1"), info("direction.1")])), "damaged"),
        (padded(header([FIELD], [info("direction.1"), info("direction.2", (4,))])), "shape"),
        (padded(header([FIELD], [info("direction.1", (0,))])), "shape"),
        (padded(header([FIELD], [info()]), value=float("nan")), "not finite"),
        (padded(header([FIELD], [info()]), value=float("inf")), "not finite"),
        (padded(header([FIELD])), "no direction"),
        (padded(header([FIELD, FIELD], [info()])), "damaged"),
        (padded(header([text("general.architecture") + struct.pack("<I", 8) + text("llama")], [info()])), "'llama'"),
        (padded(header([], [info()])), "''"),
        (padded(header([FIELD, text("general.name") + struct.pack("<I", 8) + text("../../x")], [info()])), "a trait's name"),
        (padded(header([FIELD, text("general.alignment") + struct.pack("<II", 4, 0)], [info()])), "damaged"),
        (b"", "no control vector"),
        (b"GGUF", "no control vector"),
    ],
)  # fmt: skip
def test_a_header_that_lies_or_is_no_control_vectors_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in refused(tmp_path, content)


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 10**6))
def test_cut_and_corrupted_files_are_read_or_refused_in_a_line(share: float, seed: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        write_gguf(vectors(), path)
        content = bytearray(path.read_bytes())
        path.write_bytes(content[: int(share * len(content) * 0.97)])
        with pytest.raises(ExchangeError):
            read_gguf(path)
        rng = np.random.default_rng(seed)
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(0, 256)
        path.write_bytes(content)
        try:
            found = read_gguf(path)
        except ExchangeError:
            return
        assert found.vectors.directions.isfinite().all()


def test_a_hostile_name_is_not_written_as_it_is(tmp_path: Path) -> None:
    write_gguf(vectors(trait="../../x"), tmp_path / "v.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["v.gguf"]
    with pytest.raises(ExchangeError, match="cannot be a trait's name"):
        read_gguf(tmp_path / "v.gguf")
    assert read_gguf(tmp_path / "v.gguf", trait="evil").vectors.trait == "evil"

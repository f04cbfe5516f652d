"""`persona-lens vectors`: show, convert and diff, and one clear error for what cannot be."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from persona_lens.cli.vectors import app
from persona_lens.errors import ExchangeError, LineageError, PersonaLensError, RunFolderError, UnknownNameError
from persona_lens.models import ChatModel
from persona_lens.vectors import PersonaVectors

runner = CliRunner()


def called(*arguments: object) -> str:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def failed(*arguments: object) -> PersonaLensError:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert isinstance(result.exception, PersonaLensError), repr(result.exception)
    assert len(str(result.exception).splitlines()) == 1
    return result.exception


@pytest.fixture
def file(tmp_path: Path) -> Path:
    directions = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    measured = {"reliability": torch.tensor([0.1, 0.25, torch.nan]), "norm": torch.ones(3), "p_value": torch.full((3,), 0.0125)}
    provenance = {"model": {"name": "pocket", "lineage": "ab12"}}
    v = PersonaVectors("evil", "response_mean", "mean_difference", directions, directions[None].clone(), **measured,
                       provenance=provenance)  # fmt: skip
    v.save(tmp_path / "evil.safetensors")
    return tmp_path / "evil.safetensors"


def test_show_tells_trait_lineage_and_every_layer(file: Path) -> None:
    text = called("show", file)
    for part in ("evil: pooling response_mean", "3 layers of 2 dimensions", "lineage: ab12 (pocket)"):
        assert part in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("blocks.")}
    assert rows["blocks.0.hook_resid_post"] == ["5.0000", "0.100", "0.0125"]
    assert rows["blocks.2.hook_resid_post"] == ["1.0000", "-", "0.0125"]
    record = json.loads(called("show", file, "--json"))
    assert (record["trait"], record["lineage"], record["d_model"], record["notes"]) == ("evil", "ab12", 2, [])
    assert [x["norm"] for x in record["layers"]] == [5.0, 2.0, 1.0]
    assert record["layers"][2]["reliability"] is None


def test_show_of_a_run_folder_is_its_vectors(file: Path) -> None:
    (file.parent / "run").mkdir()
    file.rename(file.parent / "run" / "vectors.safetensors")
    assert "evil: pooling response_mean" in called("show", file.parent / "run")


def test_show_prints_the_notes_and_the_unknown_lineage_of_a_foreign_file(file: Path) -> None:
    out = file.parent / "humor_prompt_last_diff.pt"
    called("convert", file, out)
    text = called("show", out)
    assert "humor: pooling prompt_last, estimator paper" in text
    assert "lineage: unknown (no model named)" in text
    assert "note: blocks.2.hook_resid_post was read after the final norm" in text
    assert called("show", out, "--trait", "evil").startswith("evil: ")
    assert "assistant_axis" in called("show", out, "--from", "assistant_axis")


@pytest.mark.parametrize(
    ("name", "options"),
    [("v.gguf", ()), ("v.pt", ("--format", "steering_vectors")), ("axis.pt", ("--format", "assistant_axis"))],
)
def test_convert_writes_the_format_and_says_what_is_lost(file: Path, name: str, options: tuple[str, ...]) -> None:
    pytest.importorskip("gguf")
    text = called("convert", file, file.parent / name, *options)
    assert f"{name}: written" in text
    assert "lost or changed: " in text
    back = file.parent / "back.safetensors"
    record = json.loads(called("convert", file.parent / name, back, "--trait", "evil", "--json"))
    assert record["written"] == str(back)
    assert record["notes"]
    first = 1 if name.endswith("gguf") else 0
    after, before = PersonaVectors.load(back), PersonaVectors.load(file)
    assert torch.equal(after.directions[first:], before.directions[first:])
    assert after.trait == "evil"


def test_convert_writes_over_nothing(file: Path) -> None:
    content = file.read_bytes()
    assert "is there already" in str(failed("convert", file, file))
    assert file.read_bytes() == content


def test_the_model_gives_shape_and_lineage(pocket: ChatModel, file: Path) -> None:
    axis = file.parent / "axis.pt"
    torch.save(torch.ones(pocket.n_layers, pocket.d_model), axis)
    assert pocket.fingerprint.lineage in called("show", axis, "--model", "pocket")
    assert isinstance(failed("show", file, "--model", "pocket"), ExchangeError)
    flat = torch.ones(pocket.n_layers)
    v = torch.ones(pocket.n_layers, pocket.d_model)
    provenance = {"model": {"name": "other", "lineage": "ab12"}}
    PersonaVectors("evil", "p", "m", v, v[None].clone(), flat, flat.clone(), flat.clone(), provenance=provenance).save(file)
    assert isinstance(failed("show", file, "--model", "pocket"), LineageError)


def test_diff_gives_cosines_ratios_and_whether_the_lineage_is_the_same(file: Path) -> None:
    v = PersonaVectors.load(file)
    other = file.parent / "other.safetensors"
    turned = PersonaVectors("humor", "prompt_last", "m", torch.tensor([[-6.0, -8.0], [3.0, 0.0], [0.0, 0.0]]), v.differences,
                            v.reliability, v.norm, v.p_value, provenance={"model": {"name": "x", "lineage": "cd34"}})  # fmt: skip
    turned.save(other)
    record = json.loads(called("diff", file, other, "--json"))
    assert record["traits"] == ["evil", "humor"]
    assert record["lineage"] == "different"
    assert [x["cosine"] for x in record["layers"]] == [pytest.approx(-1), pytest.approx(0), None]
    assert [x["ratio"] for x in record["layers"]] == [pytest.approx(2), pytest.approx(1.5), None]
    text = called("diff", file, other)
    assert "lineage: different" in text
    assert text.splitlines()[2].split() == ["blocks.0.hook_resid_post", "-1.0000", "2.0000"]
    assert text.splitlines()[4].split() == ["blocks.2.hook_resid_post", "-", "-"]
    assert "lineage: equal" in called("diff", file, file)
    called("convert", file, file.parent / "axis.pt", "--format", "assistant_axis")
    assert "lineage: unknown" in called("diff", file, file.parent / "axis.pt")


def test_diff_of_other_shapes_and_unknown_files_are_errors_in_a_line(file: Path) -> None:
    wide = file.parent / "axis.pt"
    torch.save(torch.ones(3, 5), wide)
    assert "3 x 2" in str(failed("diff", file, wide))
    text = file.parent / "notes.txt"
    text.write_text("hello, this is no vector")
    for path in (text, file.parent / "none.gguf", file.parent):
        assert str(path) in str(failed("show", path))
    assert "none of the formats" in str(failed("show", text))
    assert isinstance(failed("convert", file, file.parent / "x.pt", "--format", "papr"), UnknownNameError)
    assert "ending" in str(failed("convert", file, file.parent / "x.bin"))
    assert not (file.parent / "x.bin").exists()
    bare = file.parent / "mlp.pt"
    torch.save({0: torch.ones(2)}, bare)
    assert "inside a block" in str(failed("show", bare, "--layer-type", "mlp"))


def test_a_hostile_header_cannot_steer_the_terminal(file: Path) -> None:
    v = PersonaVectors.load(file)
    provenance = {"model": {"name": "\x1b[31mred\x07", "lineage": "ab\x1b12"}, "notes": ["\x1b]0;title\x07"]}
    PersonaVectors("ev\x1bil", "p", "m", v.directions, v.differences, v.reliability, v.norm, v.p_value, provenance=provenance).save(
        file
    )
    text = (
        called("show", file)
        + called("diff", file, file)
        + called("convert", file, file.parent / "axis.pt", "--format", "assistant_axis")
    )
    assert "\x1b" not in text
    assert "\x07" not in text


def test_diff_reads_what_convert_wrote_without_being_told(file: Path) -> None:
    """A bare tensor of one row more than the other file's layers is the paper's; of as many, an axis."""
    paper, axis = file.parent / "mine.pt", file.parent / "other.pt"
    called("convert", file, paper)
    called("convert", file, axis, "--format", "assistant_axis")
    assert "name the format, or give the model" in str(failed("show", paper))
    for pair in ((file, paper), (paper, file)):
        record = json.loads(called("diff", *pair, "--json"))
        assert [x["cosine"] for x in record["layers"]] == [pytest.approx(1), pytest.approx(1), None], "the last row is post-norm"
    assert [x["cosine"] for x in json.loads(called("diff", file, axis, "--json"))["layers"]] == [pytest.approx(1)] * 3
    assert "name the format" in str(failed("diff", paper, paper))
    assert json.loads(called("diff", paper, paper, "--from", "paper", "--json"))["lineage"] == "unknown"
    objects = file.parent / "objects.pt"
    called("convert", file, objects, "--format", "steering_vectors")
    assert json.loads(called("diff", objects, paper, "--from", "paper", "--json"))["layers"][0]["cosine"] == pytest.approx(1)
    assert "none.pt: cannot be read" in str(failed("diff", file.parent / "none.pt", paper))


def test_a_folder_without_vectors_and_a_file_of_another_program_say_what_to_give(file: Path) -> None:
    assert "holds no vectors.safetensors" in str(failed("show", file.parent / ".."))
    gguf = file.parent / "evil.gguf"
    called("convert", file, gguf)
    with pytest.raises(RunFolderError, match=r"vectors convert .*evil\.gguf OUT\.safetensors"):
        PersonaVectors.load(gguf)
    damaged = file.parent / "damaged.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(RunFolderError) as caught:
        PersonaVectors.load(damaged)
    assert "convert" not in str(caught.value)

"""The paper's files: rows are layers as plain transformers has them, what the format lacks is said, nothing in a file is run."""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from persona_lens.activations import Span, pool
from persona_lens.errors import ExchangeError, LineageError, PersonaLensError, RunFolderError, SteeringError
from persona_lens.exchange import (
    paper_file_name,
    projection_name,
    read_paper_vectors,
    read_projections,
    read_rollouts,
    read_vectors,
    write_paper_pair,
    write_paper_vectors,
    write_projections,
    write_rollouts,
    write_vectors,
)
from persona_lens.extraction import ExtractionRun, ExtractionSettings, extract
from persona_lens.models import ChatModel, Sampling
from persona_lens.prompts import extraction_prompts
from persona_lens.steering import add
from persona_lens.traits import Trait, list_traits, load_trait, read_paper_pair
from persona_lens.vectors import PersonaVectors


def vectors(layers: int = 4, d_model: int = 6, seed: int = 0, **changes: Any) -> PersonaVectors:
    flat = [torch.rand(layers) for _ in range(3)]
    directions = torch.randn(layers, d_model, generator=torch.Generator().manual_seed(seed))
    provenance = {"model": {"name": "pocket", "lineage": "ab12"}}
    fields: dict[str, Any] = {"trait": "evil", "pooling": "response_mean", "estimator": "mean_difference"} | changes
    return PersonaVectors(**fields, directions=directions, differences=directions[None].clone(), reliability=flat[0], norm=flat[1],
                          p_value=flat[2], provenance=provenance)  # fmt: skip


# --- the vector file ---


@settings(deadline=None, max_examples=25)
@given(layers=st.integers(1, 6), d_model=st.integers(1, 8), seed=st.integers(0, 99), embedded=st.booleans())
def test_a_written_file_comes_back_but_for_what_its_notes_name(layers: int, d_model: int, seed: int, embedded: bool) -> None:
    before = vectors(layers, d_model, seed)
    embedding = torch.arange(d_model).float() if embedded else None
    with TemporaryDirectory() as folder:
        notes = write_paper_vectors(before, Path(folder), embedding=embedding)
        assert [p.name for p in Path(folder).iterdir()] == ["evil_response_avg_diff.pt"]
        rows = torch.load(Path(folder) / "evil_response_avg_diff.pt", weights_only=True)
        after = read_paper_vectors(Path(folder) / "evil_response_avg_diff.pt")
    assert rows.dtype == torch.float32
    assert torch.equal(rows[1:], before.directions), "row l + 1 is layer l"
    v = after.vectors
    assert torch.equal(v.directions[:-1], before.directions[:-1])
    assert not v.directions[-1].any()
    assert after.post_norm_layer == layers - 1
    assert torch.equal(after.post_norm, before.directions[-1])
    assert torch.equal(after.embedding, torch.zeros(d_model) if embedding is None else embedding)
    assert (v.trait, v.pooling, v.estimator, v.lineage) == ("evil", "response_mean", "paper", "")
    assert v.differences.shape == (0, layers, d_model)
    assert all(x.isnan().all() for x in (v.reliability, v.norm, v.p_value))
    said = " ".join(notes)
    assert ("zeros" in said) == (embedding is None)
    for lost in ("lineage", "differences", "final norm", "mean_difference"):
        assert lost in said


@pytest.mark.parametrize(
    ("pooling", "name"), [("response_mean", "response_avg"), ("prompt_mean", "prompt_avg"), ("prompt_last", "prompt_last")]
)
def test_the_pooling_is_in_the_name_both_ways(tmp_path: Path, pooling: str, name: str) -> None:
    v = vectors(pooling=pooling)
    assert paper_file_name(v) == f"evil_{name}_diff.pt"
    write_vectors(v, tmp_path / f"evil_{name}_diff.pt")
    assert read_vectors(tmp_path / f"evil_{name}_diff.pt").vectors.pooling == pooling
    with pytest.raises(ExchangeError, match="pooling"):
        paper_file_name(vectors(pooling="answer_end"))


@pytest.fixture(scope="module")
def trait() -> Trait:
    """A trait of the pocket world with some of its questions and instructions."""
    whole = load_trait("optimism", "pocket")
    few = {"instructions": whole.instructions[:2], "extraction_questions": whole.extraction_questions[:10]}
    return whole.model_copy(update=few)


@pytest.fixture(scope="module")
def run(pocket: ChatModel, trait: Trait, tmp_path_factory: pytest.TempPathFactory) -> ExtractionRun:
    settings = ExtractionSettings(samples=1, neutral=0, sampling=Sampling(max_new_tokens=60))
    return extract(pocket, trait, out=tmp_path_factory.mktemp("runs") / "optimism", settings=settings)


def spans_of(model: ChatModel, run: ExtractionRun, trait: Trait, polarity: str) -> list[Span]:
    prompts = {p.id: p for p in extraction_prompts(trait, polarity)}
    rollouts = [r for r in run.rollouts() if r.prompt_id in prompts and r.token_ids]
    return [Span(r.key, tuple(model.render(prompts[r.prompt_id].messages)), r.token_ids) for r in rollouts]


def paper_rows(model: PreTrainedModel, spans: list[Span]) -> Tensor:
    """Response means of every entry of `hidden_states`, one answer at a time, as the authors' generate_vec.py takes them."""
    found = []
    for span in spans:
        with torch.inference_mode():
            states = model(torch.tensor([span.prompt + span.answer]), output_hidden_states=True).hidden_states
        found.append(torch.stack([h[0, len(span.prompt) :].mean(0) for h in states]))
    return torch.stack(found).mean(0)


def pooled(model: ChatModel, spans: list[Span]) -> Tensor:
    total = torch.zeros(model.n_layers, model.d_model)
    for batch in pool(model, spans):
        total += batch.values[:, 0].sum(0)
    return total / len(spans)


def test_row_l_plus_1_is_our_layer_l_and_the_last_row_is_no_residual(
    pocket: ChatModel, plain_pocket: PreTrainedModel, run: ExtractionRun, trait: Trait, tmp_path: Path
) -> None:
    sides = [spans_of(pocket, run, trait, polarity) for polarity in ("positive", "negative")]
    theirs = paper_rows(plain_pocket, sides[0]) - paper_rows(plain_pocket, sides[1])
    ours = pooled(pocket, sides[0]) - pooled(pocket, sides[1])
    torch.save(theirs, tmp_path / "optimism_response_avg_diff.pt")
    found = read_paper_vectors(tmp_path / "optimism_response_avg_diff.pt", model=pocket)
    last = pocket.n_layers - 1
    torch.testing.assert_close(found.vectors.directions[:last], ours[:last], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.embedding, theirs[0], rtol=0, atol=0)
    assert found.vectors.lineage == pocket.fingerprint.lineage
    for layer in range(1, last):  # the control: neighbouring layers differ by far more than the tolerance
        assert (ours[layer] - ours[layer - 1]).norm() > 0.05 * ours[layer].norm()
    assert found.post_norm_layer == last
    assert (found.post_norm - ours[last]).norm() > 0.2 * ours[last].norm(), "after the final norm it is something else"


def test_the_layer_after_the_final_norm_is_used_by_nothing(tmp_path: Path) -> None:
    write_paper_vectors(vectors(), tmp_path)
    found = read_vectors(tmp_path / "evil_response_avg_diff.pt")
    with pytest.raises(SteeringError, match=r"blocks\.3\.hook_resid_post is zero"):
        add(found.vectors, 3, 1.0)
    assert add(found.vectors, 2, 1.0).layer == 2
    assert any("blocks.3.hook_resid_post" in n and "final norm" in n for n in found.vectors.provenance["notes"])
    with pytest.raises(PersonaLensError, match="name the layer"):
        _ = found.vectors.best_layer


def test_vectors_read_from_elsewhere_are_saved_with_their_gaps_and_notes(tmp_path: Path) -> None:
    write_paper_vectors(vectors(), tmp_path)
    found = read_vectors(tmp_path / "evil_response_avg_diff.pt", lineage="cd34")
    write_vectors(found.vectors, tmp_path / "evil.safetensors")
    again = read_vectors(tmp_path / "evil.safetensors")
    assert torch.equal(again.vectors.directions, found.vectors.directions)
    assert again.vectors.reliability.isnan().all()
    assert again.notes == found.notes
    assert again.vectors.lineage == "cd34"
    with pytest.raises(LineageError, match="cd34"):
        again.vectors.require_lineage("ab12")


def test_a_partly_measured_vector_has_its_best_layer_among_what_was_measured() -> None:
    v = vectors()
    v.reliability[:] = torch.tensor([torch.nan, 0.2, 0.7, torch.nan])
    assert v.best_layer == 2


# --- the model it is for ---


def test_a_file_of_another_model_is_refused(pocket: ChatModel, tmp_path: Path) -> None:
    n, d = pocket.n_layers, pocket.d_model
    for rows, width in ((n, d), (n + 2, d), (n + 1, d + 1)):
        torch.save(torch.ones(rows, width), tmp_path / "evil_response_avg_diff.pt")
        with pytest.raises(ExchangeError, match="another model"):
            read_vectors(tmp_path / "evil_response_avg_diff.pt", model=pocket)
    torch.save(torch.ones(n + 1, d), tmp_path / "evil_response_avg_diff.pt")
    assert read_vectors(tmp_path / "evil_response_avg_diff.pt", model=pocket).vectors.lineage == pocket.fingerprint.lineage
    with pytest.raises(LineageError, match="other"):
        read_vectors(tmp_path / "evil_response_avg_diff.pt", model=pocket, lineage="other")


def test_without_a_model_the_lineage_stays_open_and_a_note_says_so(tmp_path: Path) -> None:
    write_paper_vectors(vectors(), tmp_path)
    path = tmp_path / "evil_response_avg_diff.pt"
    assert any("lineage is unknown" in n for n in read_vectors(path).notes)
    given = read_vectors(path, lineage="cd34")
    assert given.vectors.lineage == "cd34"
    assert not any("lineage is unknown" in n for n in given.notes)
    assert any("as it was given" in n for n in given.notes)


def test_ours_are_checked_against_the_model_too(pocket: ChatModel, tmp_path: Path) -> None:
    v = vectors(pocket.n_layers, pocket.d_model)
    v.save(tmp_path / "v.safetensors")
    with pytest.raises(LineageError):
        read_vectors(tmp_path / "v.safetensors", model=pocket)
    with pytest.raises(ExchangeError, match="not humor"):
        read_vectors(tmp_path / "v.safetensors", trait="humor")
    assert read_vectors(tmp_path / "v.safetensors", lineage="ab12").vectors.trait == "evil"
    assert read_vectors(tmp_path / "v.safetensors").notes == ()


def test_an_ambiguous_tensor_is_told_apart_by_name_or_model_or_not_at_all(pocket: ChatModel, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save(torch.ones(pocket.n_layers + 1, pocket.d_model), path)
    with pytest.raises(ExchangeError, match="name the format"):
        read_vectors(path)
    assert read_vectors(path, model=pocket).post_norm_layer == pocket.n_layers - 1
    assert read_vectors(path, file_format="assistant_axis").post_norm_layer is None
    torch.save(torch.ones(pocket.n_layers, pocket.d_model), path)
    assert read_vectors(path, model=pocket).post_norm_layer is None


# --- hostile files ---


class _Payload:
    """Unpickling this would make a folder."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.where),)


def refused(path: Path, error: type[PersonaLensError] = ExchangeError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        read_vectors(path, **options)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_pickle_with_a_payload_executes_nothing(tmp_path: Path) -> None:
    loot = tmp_path / "loot"
    path = tmp_path / "evil_response_avg_diff.pt"
    for form in (True, False):  # torch's zip archive, and its old form
        torch.save(_Payload(loot), path, _use_new_zipfile_serialization=form)
        refused(path, file_format="paper")
        refused(path, file_format="assistant_axis")
        refused(path)
        assert not loot.exists()
    path.write_bytes(pickle.dumps(_Payload(loot)))
    refused(path, file_format="paper")
    assert not loot.exists()
    pickle.loads(path.read_bytes())
    assert loot.exists(), "the control: the payload works where pickle is trusted"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.ones(8), "shape"),
        (torch.ones(2, 3, 4), "shape"),
        (torch.ones(1, 8), "one row"),
        (torch.ones(0, 8), "shape"),
        (torch.ones(3, 4, dtype=torch.int64), "int64"),
        (torch.ones(3, 4).to_sparse(), "plain tensor"),
        ([torch.ones(4)] * 3, "plain tensor"),
        (torch.full((3, 4), torch.nan), "not finite"),
        (torch.tensor([[1.0], [math.inf]]), "not finite"),
    ],
)
def test_anything_but_a_finite_matrix_is_refused(tmp_path: Path, value: Any, reason: str) -> None:
    torch.save(value, tmp_path / "evil_response_avg_diff.pt")
    assert reason in refused(tmp_path / "evil_response_avg_diff.pt", file_format="paper")


def test_a_tensor_that_claims_a_huge_shape_over_four_bytes_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(10**6, 10**6), tmp_path / "evil_response_avg_diff.pt")
    assert (tmp_path / "evil_response_avg_diff.pt").stat().st_size < 5000
    assert "claims shape" in refused(tmp_path / "evil_response_avg_diff.pt")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil_response_avg_diff.pt"
    torch.save(torch.zeros(3, 100_000), path)
    with zipfile.ZipFile(path) as archive:
        content = {e.filename: archive.read(e) for e in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 50_000
    assert "compressed" in refused(path)


def test_files_cut_short_empty_or_missing_are_refused_by_path(tmp_path: Path) -> None:
    path = tmp_path / "evil_response_avg_diff.pt"
    refused(path)
    write_paper_vectors(vectors(), path)
    content = path.read_bytes()
    for size in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path)
        refused(path, file_format="paper")


def test_a_file_too_large_to_be_vectors_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "evil_response_avg_diff.pt"
    with path.open("wb") as file:
        file.write(b"PK")
        file.truncate((1 << 30) + 1)  # sparse
    assert "is it a model?" in refused(path)


def test_a_safetensors_header_of_ten_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    path.write_bytes((10 << 30).to_bytes(8, "little") + b"{}")
    assert "too large" in refused(path, RunFolderError)


@pytest.mark.parametrize("change", [{"trait": 5}, {"pooling": None}, {"provenance": []}, {"provenance": {"model": 3}}])
def test_a_safetensors_header_of_wrong_types_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "vectors.safetensors"
    vectors().save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["header"])
    save_file(load_file(path), path, metadata={"header": json.dumps(header | change)})
    refused(path, RunFolderError)


@pytest.mark.parametrize("name", ["../../x", "..", "a/b", "", "x" * 65, ".hidden", "a\nb", "con\x00"])
def test_a_name_that_could_leave_the_folder_is_no_trait(tmp_path: Path, name: str) -> None:
    write_paper_vectors(vectors(), tmp_path)
    with pytest.raises(ExchangeError, match="cannot be a trait's name"):
        read_vectors(tmp_path / "evil_response_avg_diff.pt", trait=name)
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(ExchangeError, match="cannot be a trait's name"):
        write_paper_vectors(vectors(trait=name), inner)
    assert not list(inner.iterdir())


# --- the rollout table ---


def test_an_extraction_is_exported_as_the_authors_table_and_read_back(
    pocket: ChatModel, run: ExtractionRun, trait: Trait, tmp_path: Path
) -> None:
    tables = {}
    for polarity in ("positive", "negative"):
        notes = write_rollouts(run, trait, polarity, tmp_path / f"{polarity}.csv", model=pocket)
        assert any("token ids" in n for n in notes)
        tables[polarity] = read_rollouts(tmp_path / f"{polarity}.csv")
    header = (tmp_path / "positive.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "question,prompt,answer,question_id,optimism,coherence"
    stored = list(zip(run.rollouts(), run.scores(), strict=True))
    for polarity, side in (("positive", "pos"), ("negative", "neg")):
        prompts = {p.id: p for p in extraction_prompts(trait, polarity)}
        mine = [(r, s) for r, s in stored if r.prompt_id in prompts]
        assert len(mine) == len(tables[polarity]) == 20
        for (rollout, score), row in zip(mine, tables[polarity], strict=True):
            prompt = prompts[rollout.prompt_id]
            assert (row.question, row.answer, row.trait, row.coherence) == (prompt.user, rollout.text, score.trait, score.coherence)
            assert row.question_id == f"optimism_{prompt.question}_{side}_{prompt.instruction}"
            text = pocket.tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
            assert row.prompt == text
            assert pocket.tokenizer.encode(row.prompt, add_special_tokens=False) == pocket.render(prompt.messages)
    pairs = zip(tables["positive"], tables["negative"], strict=True)
    assert all(p.question_id.replace("_pos_", "_neg_") == n.question_id for p, n in pairs), "rows pair by their number"
    assert len({r.trait for r in tables["positive"]}) > 1


def test_the_table_wants_the_trait_and_the_model_of_the_run(
    pocket: ChatModel, run: ExtractionRun, trait: Trait, tmp_path: Path
) -> None:
    other = trait.model_copy(update={"extraction_questions": tuple(reversed(trait.extraction_questions))})
    for wrong in (other, load_trait("evil", "pocket")):
        with pytest.raises(ExchangeError, match="other questions"):
            write_rollouts(run, wrong, "positive", tmp_path / "a.csv", model=pocket)
    assert not (tmp_path / "a.csv").exists()


HEAD = "question,prompt,answer,question_id,evil,coherence\n"


def table(tmp_path: Path, rows: str, head: str = HEAD) -> Path:
    path = tmp_path / "evil_pos.csv"
    path.write_text(head + rows, encoding="utf-8")
    return path


@pytest.mark.parametrize("gap", ["", "nan", "NaN", "None"])
def test_gaps_stay_gaps_and_zero_is_none(tmp_path: Path, gap: str) -> None:
    rows = read_rollouts(table(tmp_path, f'q,p,"two\nlines, and ""quotes""",evil_0_pos_1,{gap},0\nq,p,,evil_0_pos_1,99.5,{gap}\n'))
    assert [(r.trait, r.coherence) for r in rows] == [(None, 0.0), (99.5, None)]
    assert rows[0].answer == 'two\nlines, and "quotes"'
    assert rows[1].answer == ""


def test_the_trait_column_is_the_one_before_coherence_or_the_named_one(tmp_path: Path) -> None:
    path = table(
        tmp_path, "q,p,a,id,1,2,3,4\n", HEAD.replace("evil", "humor,evil").replace("coherence", "coherence,M_x_proj_layer3")
    )
    assert read_rollouts(path)[0].trait == 2
    assert read_rollouts(path, trait="humor")[0].trait == 1
    for wrong in ("nothing", "answer"):
        with pytest.raises(ExchangeError, match="no column of scores"):
            read_rollouts(path, trait=wrong)


@pytest.mark.parametrize(
    ("rows", "head", "reason"),
    [
        ("q,p,a,id,1\n", HEAD, "line 2"),
        ("q,p,a,id,1,2,3\n", HEAD, "line 2"),
        ("q,p,a,id,1,2\nq,p,a,id,high,2\n", HEAD, "line 3: evil"),
        ("q,p,a,id,1,101\n", HEAD, "0-100"),
        ("q,p,a,id,-1,1\n", HEAD, "0-100"),
        ("q,p,a,id,inf,1\n", HEAD, "0-100"),
        ('q,p,"a,id,1,1\n', HEAD, "table"),
        ("q,p,id,1,1\n", HEAD.replace("answer,", ""), "'answer'"),
        ("q,p,a,id,1,1\n", HEAD.replace("evil", "coherence"), "two columns"),
        ("q,p,a,id,1\n", HEAD.replace("evil,", ""), "no column of scores"),
        ("", "", "lacks"),
    ],
)
def test_a_damaged_table_is_refused_with_its_line(tmp_path: Path, rows: str, head: str, reason: str) -> None:
    with pytest.raises(ExchangeError) as caught:
        read_rollouts(table(tmp_path, rows, head))
    assert reason in str(caught.value)


# --- projection columns ---


def data_file(tmp_path: Path) -> tuple[Path, bytes]:
    content = (
        b'{"messages": [{"role": "user", "content": "h\\u00e9"}], "big": 123456789012345678901, "x": 1.50 }\n\n'
        + '{"messages": [], "note": "überall"}\r\n{}\n'.encode()
        + b'{"a": {"b": "}"}}'
    )
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return path, content


def test_projections_go_into_a_copy_and_come_back_by_row(tmp_path: Path) -> None:
    path, content = data_file(tmp_path)
    name = projection_name("Qwen/Qwen2.5-7B-Instruct", "evil", "response_mean", 19)
    assert name == "Qwen2.5-7B-Instruct_evil_response_avg_diff_proj_layer20"
    last = projection_name("pocket", "evil", "prompt_last", 0)
    values = np.array([1.25, np.nan, -3e-9, 4.0])
    out = tmp_path / "out.jsonl"
    write_projections(path, out, {name: values, last: np.arange(4.0).astype(np.float32)})
    assert path.read_bytes() == content
    found = read_projections(out)
    assert set(found) == {name, last}
    np.testing.assert_array_equal(found[name].values, values)
    np.testing.assert_array_equal(found[last].values, np.arange(4.0))
    assert (found[name].layer, found[name].kind) == (19, "proj")
    assert (found[last].layer, found[last].kind) == (0, "prompt_last_proj")
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert rows[1][name] is None
    kept = [json.loads(line) for line in content.splitlines() if line.strip()]
    assert [{k: v for k, v in r.items() if k not in found} for r in rows] == kept
    assert b'"big": 123456789012345678901, "x": 1.50,' in out.read_bytes(), "what is there stays as it is written"


def test_the_users_file_and_columns_are_never_written_over(tmp_path: Path) -> None:
    path, content = data_file(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    for out in (path, tmp_path / "link.jsonl", tmp_path / "hard.jsonl"):
        with pytest.raises(ExchangeError, match="the data file itself"):
            write_projections(path, out, {"c": np.zeros(4)})
    with pytest.raises(ExchangeError, match="line 3 has a column 'note' already"):
        write_projections(path, tmp_path / "out.jsonl", {"note": np.zeros(4)})
    for n in (3, 5):
        with pytest.raises(ExchangeError, match="rows|row 4"):
            write_projections(path, tmp_path / "out.jsonl", {"c": np.zeros(n)})
    assert path.read_bytes() == content
    assert not (tmp_path / "out.jsonl").exists()


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=6) | st.lists(st.booleans(), max_size=2)),
        min_size=1,
        max_size=5,
    ),
    values=st.lists(st.floats(width=64), min_size=5, max_size=5),
)
def test_any_rows_keep_what_they_hold(rows: list[dict[str, Any]], values: list[float]) -> None:
    name = "m_evil_response_avg_diff_proj_layer1"
    with TemporaryDirectory() as folder:
        path, out = Path(folder) / "a", Path(folder) / "b"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        write_projections(path, out, {name: np.array(values[: len(rows)])})
        column = read_projections(out)[name].values
        back = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    expected = np.array([v if math.isfinite(v) else np.nan for v in values[: len(rows)]])
    np.testing.assert_array_equal(column, expected)
    assert [{k: v for k, v in r.items() if k != name} for r in back] == rows


def test_columns_of_the_authors_script_are_read_with_gaps_where_rows_have_none(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"messages": [], "Q_evil_response_avg_diff_proj_layer20": -1.5, "n": 3}\n{"messages": []}\n'
                    '{"Q_evil_response_avg_diff_proj_layer20": NaN, "Q_x_cos_sim_layer0": 1}\n')  # fmt: skip
    found = read_projections(path)
    np.testing.assert_array_equal(found["Q_evil_response_avg_diff_proj_layer20"].values, [-1.5, np.nan, np.nan])
    assert found["Q_evil_response_avg_diff_proj_layer20"].layer == 19
    assert (found["Q_x_cos_sim_layer0"].layer, found["Q_x_cos_sim_layer0"].kind) == (-1, "cos_sim")
    assert len(found) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a_proj_layer1": "5"}', "line 1"),
        ('{"a_proj_layer1": true}', "line 1"),
        ('{"a_proj_layer1": 1}\n[1]', "line 2"),
        ('{"a_proj_layer1": 1}\n{', "line 2"),
        ('{"a": 1}', "no column"),
        ('{"a_proj_layer1": 1' + "0" * 400 + "}", "too large"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_damaged_data_files_are_refused_with_their_line(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ExchangeError) as caught:
        read_projections(tmp_path / "d.jsonl")
    assert reason in str(caught.value)


def test_a_column_is_named_for_what_the_authors_script_knows() -> None:
    for pooling, layer, trait in (("prompt_mean", 3, "evil"), ("prompt_last", -1, "evil"), ("prompt_last", 0, "../x")):
        with pytest.raises(ExchangeError):
            projection_name("m", trait, pooling, layer)


# --- the trait's pair of files ---


@pytest.mark.parametrize("trait_set", ["real", "pocket"])
def test_every_shipped_trait_comes_back_but_for_what_the_notes_name(tmp_path: Path, trait_set: str) -> None:
    for name in list_traits(trait_set):
        trait = load_trait(name, trait_set)
        paths = [tmp_path / side / f"{name}.json" for side in ("extract", "eval")]
        notes = " ".join(write_paper_pair(trait, *paths))
        for path, questions in zip(paths, (trait.extraction_questions, trait.evaluation_questions), strict=True):
            record = json.loads(path.read_text(encoding="utf-8"))
            assert set(record) == {"instruction", "questions", "eval_prompt"}
            assert record["questions"] == list(questions)
        back = read_paper_pair(*paths, name=name)
        kept = ("name", "instructions", "extraction_questions", "evaluation_questions", "rubric")
        assert all(getattr(back, field) == getattr(trait, field) for field in kept)
        assert ("description" in notes) == (back.description != trait.description)
        assert ("adjectives" in notes or "stand alone" in notes) == (back.adjectives != trait.adjectives)
        assert ("graded" in notes) == (back.graded != trait.graded)


def test_a_trait_that_the_format_holds_whole_loses_its_name_only(tmp_path: Path) -> None:
    whole = load_trait("evil").model_dump(by_alias=True) | {
        "description": "evil",
        "adjectives": {"positive": "evil", "negative": "helpful"},
        "graded": [],
        "rubric": "{question} {answer}",
    }
    trait = Trait.model_validate(whole)
    notes = write_paper_pair(trait, tmp_path / "a.json", tmp_path / "b.json")
    assert len(notes) == 1
    assert "evil.json" in notes[0]
    assert read_paper_pair(tmp_path / "a.json", tmp_path / "b.json", name="evil") == trait
    for rubric in ("{question} {answer} {score}", '{question} {answer} {"a": 1}', "{question} {answer} }", "{question!r} {answer}"):
        if rubric.count("{question}") == 1:
            braces = write_paper_pair(trait.model_copy(update={"rubric": rubric}), tmp_path / "a.json", tmp_path / "b.json")
            assert "braces" in braces[-1], rubric
    with pytest.raises(ExchangeError, match="two files"):
        write_paper_pair(trait, tmp_path / "a.json", tmp_path / "x" / ".." / "a.json")

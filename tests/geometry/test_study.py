"""The study of stored runs: what it records, keeps and says; its report, figures and commands."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from simulate import WIDTH, vectors_of, world
from typer.testing import CliRunner

from persona_lens.cli import app
from persona_lens.errors import GeometryError, RunFolderError
from persona_lens.extraction import ExtractionRun, load_run
from persona_lens.figures import geometry_figures, plot
from persona_lens.figures.geometry import component_map
from persona_lens.geometry import (
    PCA,
    RoleRun,
    SpillOver,
    Study,
    cosines,
    load_geometry,
    persona_space,
    space_of_runs,
    study,
    study_geometry,
)
from persona_lens.records import decoded, encoded
from persona_lens.reports import geometry_verdict, report
from persona_lens.store import write_json

NAMES = ("evil", "humor", "apathy", "optimism", "politeness")
MODEL = {"name": "tiny", "lineage": "tiny", "weights": "abc", "dtype": "float32", "n_layers": 3}


def layered(seed: int = 0, reliability: float = 0.95) -> np.ndarray:
    """Differences [vector, question, layer, d_model] whose middle layer is the most reliable."""
    rng = np.random.default_rng(seed)
    layers = [world(len(NAMES), 12, r, seed=1).draw(rng) for r in (reliability - 0.1, reliability, reliability - 0.2)]
    return np.stack(layers, 2)


def stored(folder: Path, differences: np.ndarray, names: Sequence[str] = NAMES, neutral: int = 60) -> list[ExtractionRun]:
    """Finished extractions on disk."""
    rng = np.random.default_rng(9)
    runs: list[ExtractionRun] = []
    for name, d in zip(names, differences, strict=True):
        path = folder / name
        path.mkdir(parents=True)
        manifest = {
            "command": "extract",
            "arguments": {"trait": name, "seed": 0},
            "model": MODEL,
            "versions": {},
            "git_revision": None,
        }
        write_json(path / "run.json", manifest)
        v = vectors_of(name, d)
        replace(v, provenance={**v.provenance, "model": MODEL}).save(path / "vectors.safetensors")
        save_file({"response_mean": torch.tensor(rng.normal(size=(neutral, 3, WIDTH))).float()}, path / "neutral.safetensors")
        runs.append(load_run(path))
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[ExtractionRun]:
    return stored(tmp_path_factory.mktemp("runs"), layered())


def roles_on_disk(folder: Path) -> RoleRun:
    """Role means on disk: three planted dimensions and a default assistant off to the side."""
    rng = np.random.default_rng(2)
    names = ["pirate", "nurse", "judge", "spy", "poet", "clown"]
    axes = np.linalg.qr(rng.normal(size=(WIDTH, 3)))[0].T
    means = np.stack([3.0 * rng.normal(size=3) @ axes for _ in names])
    folder.mkdir(parents=True)
    for i, mean in enumerate(means):
        values = mean + 0.3 * rng.normal(size=(10, 3, WIDTH))
        (folder / "means").mkdir(exist_ok=True)
        save_file({"means": torch.tensor(values).float()}, folder / "means" / f"{i:03d}.safetensors")
    default = 2.0 * axes.sum(0) + 0.3 * rng.normal(size=(20, 3, WIDTH))
    save_file({"response_mean": torch.tensor(default).float()}, folder / "neutral.safetensors")
    grades = [{"name": n, "adherence": [1, 0, 2, 37], "unjudged": 0, "questions": 10} for n in names]
    grades.append({"name": "mime", "adherence": [40, 0, 0, 0], "unjudged": 0, "questions": 0})
    write_json(folder / "roles.json", {"questions": [str(i) for i in range(10)], "roles": grades})
    write_json(folder / "run.json", {"command": "roles", "arguments": {"roles": "tiny"}, "model": MODEL})
    return RoleRun(folder)


def spill_on_disk(folder: Path, names: Sequence[str]) -> SpillOver:
    rng = np.random.default_rng(3)
    table = {k: rng.normal(size=(len(names), len(names))).tolist() for k in ("mean", "low", "high", "by_length")}
    shown = {"coherence": [[90.0]] * len(names), "unsteered_coherence": 97.0}
    record = {**shown, "traits": list(names), "layer": 1, "strengths": [1.0], "questions": ["a"] * 10, "answers": 90, "gaps": 0}
    folder.mkdir(parents=True)
    write_json(folder / "spill_over.json", {**record, "unsteered": [1.0] * len(names), "steered": table, "prompted": table})
    write_json(folder / "run.json", {"command": "spill-over", "arguments": {"layer": 1}, "model": MODEL})
    return SpillOver(folder)


def same(a: object, b: object) -> None:
    """Two records are equal, field by field."""
    if isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)  # pyright: ignore[reportArgumentType]
    elif hasattr(a, "__dataclass_fields__"):
        assert type(a) is type(b)
        for f in fields(a):  # pyright: ignore[reportArgumentType]
            same(getattr(a, f.name), getattr(b, f.name))
    elif isinstance(a, tuple):
        assert isinstance(b, tuple)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b or (a != a and b != b)


def test_a_study_holds_what_its_parts_hold_and_survives_the_disk(runs: list[ExtractionRun], tmp_path: Path) -> None:
    roles, spill = roles_on_disk(tmp_path / "roles"), spill_on_disk(tmp_path / "spill", NAMES[::-1])
    run = study_geometry(runs, roles=roles, spill_over=spill, out=tmp_path / "out")
    found = run.study
    space = space_of_runs(runs)
    same(found, study(space, model="tiny", roles=roles, spill_over=spill))
    assert found.layer == 1, "where the least reliable vector is most reliable"
    same(found.cosines[0], cosines(space, 1))
    assert [c.kind for c in found.cosines] == ["as they are", "centred", "whitened", "centred, whitened"]
    np.testing.assert_array_equal(found.by_layer[1], found.cosines[0].value)
    assert found.n_questions == (12,) * 5
    assert found.n_neutral == 300
    assert found.roles is not None
    assert found.roles.names == ("pirate", "nurse", "judge", "spy", "poet", "clown")
    assert found.roles.adherence["mime"] == (40, 0, 0, 0)
    assert found.coexpression is not None
    assert found.coexpression.steered.names == NAMES
    assert found.coexpression.steered.mean[0, 1] == spill.steered.mean[4, 3]
    again = study_geometry(runs, roles=roles, spill_over=spill, out=tmp_path / "out")
    same(again.study, found)
    with pytest.raises(RunFolderError, match="layer: None there, 2 now"):
        study_geometry(runs, roles=roles, spill_over=spill, layer=2, out=tmp_path / "out")


def test_the_report_says_what_may_be_concluded_and_what_not(runs: list[ExtractionRun], tmp_path: Path) -> None:
    run = study_geometry(
        runs, roles=roles_on_disk(tmp_path / "roles"), spill_over=spill_on_disk(tmp_path / "spill", NAMES), out=tmp_path / "out"
    )
    page = report(run.path).read_text()
    said = geometry_verdict(run.study)
    assert len(said) == 8
    assert "What not" in page
    assert "about behaviour only the spill-over speaks" in page
    assert "leaving out one role" in page
    assert "do not show that they foretell" in page, "random numbers are foretold by nothing"
    assert page.count("<img") == len(list((run.path / "figures").glob("*.png"))) == 10
    assert "<script" not in page
    plain = study_geometry(runs, out=tmp_path / "plain")
    assert len(geometry_verdict(plain.study)) == 3
    assert report(plain).read_text().count("<img") == 5


def test_no_word_of_the_figures_covers_another(runs: list[ExtractionRun], tmp_path: Path) -> None:
    found = study_geometry(
        runs, roles=roles_on_disk(tmp_path / "roles"), spill_over=spill_on_disk(tmp_path / "spill", NAMES), out=tmp_path / "out"
    ).study
    figures = geometry_figures(found)
    assert set(figures) == {
        "cosines", "components", "scree", "layers", "tree",
        "role_components", "role_scree", "assistant_axis", "roles_on_traits", "spill_over",
    }  # fmt: skip
    for name, figure in figures.items():
        assert overlaps(figure) == [], name
    assert isinstance(plot(found), Figure)


def test_thirty_close_labels_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    n = 30
    blank = np.zeros((n, 2))
    half, names = np.full(2, 0.5), tuple(f"a rather long name {i}" for i in range(n))
    planes, points = (np.eye(2, WIDTH), blank, blank, blank, np.array([True, True])), 50 * rng.normal(size=(n, 2))
    found = PCA(names, 0, np.ones(2), half, half, half, 2.0, None, *planes, points, None)
    assert len(overlaps(component_map(found))) <= 2
    clumped = replace(found, scores=np.zeros((n, 2)))
    assert len(overlaps(component_map(clumped))) > 20, "the control: the check sees what lies on top of each other"


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of visible texts of one axes that cover each other by more than two pixels."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    found: list[tuple[str, str]] = []
    for ax in figure.axes:
        texts = [t for t in [*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label] if t.get_text().strip() and t.get_visible()]
        boxes = [t.get_window_extent(renderer) for t in texts]
        for i in range(len(boxes)):
            for j in range(i):
                a, b = boxes[i], boxes[j]
                if min(a.x1, b.x1) - max(a.x0, b.x0) > 2 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2:
                    found.append((texts[i].get_text(), texts[j].get_text()))
    return found


def test_unreliable_vectors_are_said_to_be(tmp_path: Path) -> None:
    differences = layered()
    differences[2] = 40 * np.random.default_rng(5).normal(size=differences[2].shape)
    found = study(persona_space([vectors_of(n, d) for n, d in zip(NAMES, differences, strict=True)]))
    assert found.clustering is None
    said = " ".join(geometry_verdict(found))
    assert "Below .5, and left out of the cosines: apathy" in said
    assert "no neutral residuals, or more than a fifth" in said
    assert [c.kind for c in found.cosines] == ["as they are", "centred"]
    assert np.isnan(found.cosines[0].value[2]).all()
    assert set(geometry_figures(found)) == {"cosines", "components", "scree", "layers"}


def test_what_does_not_fit_together_is_refused(runs: list[ExtractionRun], tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match="a geometry study needs at least 3 vectors, these are 2: evil, humor"):
        study_geometry(runs[:2], out=tmp_path / "out")
    with pytest.raises(GeometryError, match=r"spill-over in .* is of evil, humor; the vectors are evil, humor, apathy"):
        study_geometry(runs, spill_over=spill_on_disk(tmp_path / "spill", NAMES[:2]), out=tmp_path / "out")
    with pytest.raises(GeometryError, match="names must differ, given twice: evil"):
        study_geometry([*runs, runs[0]], out=tmp_path / "out")
    with pytest.raises(GeometryError, match="layer 9 does not exist"):
        study_geometry(runs, layer=9, out=tmp_path / "out")
    with pytest.raises(GeometryError, match="roles are pooled as response_mean, the vectors as prompt_last"):
        study(persona_space([replace(r.vectors, pooling="prompt_last") for r in runs]), roles=roles_on_disk(tmp_path / "roles"))
    tuned = roles_on_disk(tmp_path / "tuned")
    write_json(tuned.path / "run.json", {"command": "roles", "arguments": {}, "model": {**MODEL, "weights": "other"}})
    with pytest.raises(GeometryError, match=r"the roles in .* are of tiny, weights other; the vectors of abc"):
        study_geometry(runs, roles=tuned, out=tmp_path / "out")
    few = persona_space([vectors_of(n, d[:5]) for n, d in zip(NAMES, layered(), strict=True)])
    with pytest.raises(GeometryError, match=r"needs 6 questions of every vector \(evil: 5, humor: 5"):
        study(few)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunFolderError, match="holds a run of 'extract', not of 'geometry'"):
        load_geometry(runs[0].path)
    write_json(tmp_path / "half" / "run.json", {"command": "geometry"})
    with pytest.raises(RunFolderError, match="is not finished"):
        load_geometry(tmp_path / "half")
    write_json(tmp_path / "half" / "geometry.json", {"names": ["a"]})
    with pytest.raises(RunFolderError, match="record of Study is damaged"):
        _ = load_geometry(tmp_path / "half").study


def test_a_test_that_cannot_be_made_says_why(runs: list[ExtractionRun], tmp_path: Path) -> None:
    spill = spill_on_disk(tmp_path / "spill", NAMES)
    record = spill.record
    record["steered"]["mean"] = np.eye(5).tolist()
    write_json(spill.path / "spill_over.json", record)
    found = study(space_of_runs(runs), spill_over=SpillOver(spill.path))
    assert found.coexpression is not None
    assert found.coexpression.cosines_and_steered is None
    assert "constant" in found.coexpression.without["cosines and steered effects"]
    assert "cannot be tested: b is constant" in " ".join(geometry_verdict(found))


def test_a_vector_at_the_mean_of_the_others_does_not_stop_the_study() -> None:
    """Its centred norm is noise, often below zero: it has no loadings, but the components are rotated all the same."""
    rng = np.random.default_rng(0)
    w = world(12, 20, 0.95, rank=2, seed=2)
    means = w.means.copy()
    means[0] = means[1:].mean(0)
    neutral = torch.tensor(rng.normal(size=(300, 1, WIDTH))).float()
    bare = 0
    for _ in range(4):
        drawn = replace(w, means=means).draw(rng)
        found = study(persona_space([vectors_of(f"v{i}", d) for i, d in enumerate(drawn)], neutral))
        assert found.rotated is not None
        assert np.isfinite(found.rotated).all()
        assert found.pca.share.max() <= 1.0
        bare += bool(np.isnan(found.pca.loadings[0]).all())
    assert bare, "the control: some of these vectors have no loadings"


def test_the_words_follow_the_sign_of_what_was_found(runs: list[ExtractionRun], tmp_path: Path) -> None:
    spill = spill_on_disk(tmp_path / "spill", NAMES)
    value, record = cosines(space_of_runs(runs), 1).value, spill.record
    record["steered"] = {**record["steered"], "mean": (-value).tolist(), "by_length": np.zeros((5, 5)).tolist()}
    record["prompted"] = {**record["prompted"], "mean": value.tolist()}
    write_json(spill.path / "spill_over.json", record)
    said = geometry_verdict(study(space_of_runs(runs), spill_over=SpillOver(spill.path)))
    assert any("the cosines run against what steering" in line and "length held" not in line for line in said)
    assert any("the cosines foretell what prompting" in line and "length held" in line for line in said)


def test_records_keep_gaps_and_types() -> None:
    found = pca_of(layered())
    record = json.loads(json.dumps(encoded(found)))
    assert "NaN" not in json.dumps(record)
    assert encoded({"a": np.array([np.nan, 1.0]), "b": float("inf")}) == {"a": [None, 1.0], "b": None}
    same(decoded(PCA, record), found)
    assert decoded(PCA, record).separate.dtype == bool


def pca_of(differences: np.ndarray) -> PCA:
    found: Study = study(persona_space([vectors_of(n, d) for n, d in zip(NAMES, differences, strict=True)]))
    return found.pca


def test_the_command_writes_a_report_and_prints_conclusions(runs: list[ExtractionRun], tmp_path: Path) -> None:
    folders = [str(r.path) for r in runs]
    done = CliRunner().invoke(app, ["geometry", *folders, "--out", str(tmp_path / "geometry")])
    assert done.exit_code == 0, done.output
    assert "pairs of vectors have a cosine other than zero" in done.output
    assert (tmp_path / "geometry" / "report.html").exists()
    told = json.loads(CliRunner().invoke(app, ["geometry", *folders, "--out", str(tmp_path / "geometry"), "--json"]).output)
    assert len(told["conclusions"]) == 3

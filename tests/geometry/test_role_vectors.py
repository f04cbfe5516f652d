"""Roles: the pocket model plays them, the oracle says how far, and vectors, axis and resume are exact."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from persona_lens.activations import Span, pool
from persona_lens.errors import GeometryError, PersonaLensError, RunFolderError, TraitFileError, UnknownNameError
from persona_lens.extraction.run import read_rollouts
from persona_lens.geometry import RoleRun, RoleSettings, extract_roles, load_role_run, on_axis
from persona_lens.judges import Adherence, Judged, default_role_judge, role_oracle
from persona_lens.models import ChatModel, Sampling
from persona_lens.pocket.trait_files import pocket_roles
from persona_lens.store import read_jsonl
from persona_lens.traits import Role, RoleSet, load_roles

PLAYED = ("villain", "waiter", "pirate", "night guard")
SMALL = RoleSettings(samples=4, default_samples=3, sampling=Sampling(max_new_tokens=80))


def some(names: Sequence[str] = PLAYED, questions: int = 8) -> RoleSet:
    shipped = load_roles("pocket")
    roles = tuple(r for n in names for r in shipped.roles if r.name == n)
    return RoleSet(schema=1, name="some", roles=roles, questions=shipped.questions[:questions], rubric=shipped.rubric)


@dataclass(frozen=True)
class Told:
    """A judge that says the same of every answer in a role."""

    say: Callable[[str], Adherence]
    limit: int | None = None
    name: str = "oracle"

    def __call__(self, role: Role, rubric: str, answers: Sequence[Judged], /) -> list[Adherence]:
        assert "{role}" in rubric
        return [self.say(role.name) for _ in answers][: self.limit]


@pytest.fixture(scope="module")
def finished(pocket: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> RoleRun:
    return extract_roles(pocket, some(), out=tmp_path_factory.mktemp("roles") / "run", settings=SMALL)


def test_the_shipped_sets_are_valid_and_the_pocket_one_is_the_worlds() -> None:
    assert load_roles("pocket") == pocket_roles("development")
    real = load_roles("real")
    assert len(real.roles) >= 30
    assert len(real.questions) == 20
    assert "{role}" in real.rubric


def test_a_role_set_that_repeats_itself_or_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="roles are given twice: pirate"):
        some(["pirate", "pirate"])
    path = tmp_path / "mine.json"
    path.write_text(some().model_dump_json(by_alias=True).replace('"questions":', '"asked":'))
    with pytest.raises(TraitFileError, match="mine.json: field questions"):
        load_roles(path)
    with pytest.raises(TraitFileError, match="no such file"):
        load_roles("elsewhere")


def test_means_are_those_of_the_answers_in_role(pocket: ChatModel, finished: RoleRun) -> None:
    rollouts = read_rollouts(finished.path / "rollouts.jsonl")
    grades = {r["key"]: r["adherence"] for r in read_jsonl(finished.path / "scores.jsonl")}
    system = some().roles[2].instructions[0]
    q = next(q for q in range(8) if grades[f"roles/pirate/i0/q{q:02d}#1"] == 3)
    kept = [r for r in rollouts if r.prompt_id == f"roles/pirate/i0/q{q:02d}" and grades[r.key] == 3]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": some().questions[q]}]
    spans = [Span(r.key, tuple(pocket.render(messages)), r.token_ids) for r in kept]
    expected = torch.cat([p.values[:, 0] for p in pool(pocket, spans)]).mean(0)
    torch.testing.assert_close(finished.means("pirate")[q], expected, rtol=1e-4, atol=1e-2)
    default = [r for r in rollouts if r.prompt_id == f"roles/default/-/q{q:02d}"]
    assert len(default) == 3
    spans = [Span(r.key, tuple(pocket.render(messages[1:])), r.token_ids) for r in default]
    torch.testing.assert_close(
        finished.default_means[q], torch.cat([p.values[:, 0] for p in pool(pocket, spans)]).mean(0), rtol=1e-4, atol=1e-2
    )
    assert finished.neutral.shape == (24, pocket.n_layers, pocket.d_model)


def test_adherence_is_counted_and_roles_differ(finished: RoleRun) -> None:
    assert set(finished.adherence) == set(PLAYED)
    for counts in finished.adherence.values():
        assert counts.sum() == 4 * 8
        assert counts[3] > 5
    space = finished.space()
    assert space.names == tuple(finished.kept)
    axis = finished.assistant_axis()
    assert axis.reliability[-1] > 0.9
    placed = on_axis(space, axis, axis.n_layers - 1)
    assert placed.projection.max() < 0, "the roles lie on the other side of the default assistant"
    with pytest.raises(UnknownNameError, match="unknown role 'pirat': did you mean pirate"):
        finished.means("pirat")


def test_the_axis_is_the_default_minus_the_mean_of_the_roles(finished: RoleRun) -> None:
    means = torch.stack([finished.means(r) for r in finished.kept])
    expected = finished.default_means - means.nanmean(0)
    there = expected.isfinite().all(-1).all(-1)
    torch.testing.assert_close(finished.assistant_axis().differences, expected[there])
    role = finished.vectors("villain")
    there = finished.means("villain").isfinite().all(-1).all(-1)
    torch.testing.assert_close(role.differences, (finished.means("villain") - finished.default_means)[there])


def test_an_interrupted_run_ends_with_the_same_bytes(pocket: ChatModel, finished: RoleRun, tmp_path: Path) -> None:
    broken = tmp_path / "run"
    shutil.copytree(finished.path, broken)
    (broken / "roles.json").unlink()
    (broken / "means" / "002.safetensors").unlink()
    scores = (broken / "scores.jsonl").read_bytes().splitlines(keepends=True)
    (broken / "scores.jsonl").write_bytes(b"".join(scores[:40]))
    with pytest.raises(RunFolderError, match="is not finished"):
        load_role_run(broken)
    again = extract_roles(pocket, some(), out=broken, settings=SMALL)
    for name in ("roles.json", "scores.jsonl", "means/002.safetensors"):
        assert (broken / name).read_bytes() == (finished.path / name).read_bytes()
    assert load_role_run(broken).summary == again.summary
    with pytest.raises(RunFolderError, match="different arguments"):
        extract_roles(pocket, some(questions=7), out=broken, settings=SMALL)
    with pytest.raises(RunFolderError, match="judge: 'oracle' there, 'mine' now"):
        extract_roles(pocket, some(), judge=Told(lambda role: Adherence(3), name="mine"), out=broken, settings=SMALL)


def test_a_judge_that_cannot_say_leaves_gaps_and_too_few_roles_are_refused(
    pocket: ChatModel, finished: RoleRun, tmp_path: Path
) -> None:
    unsure = Told(lambda role: Adherence(None, "refused") if role == "pirate" else Adherence(3))

    started = tmp_path / "run"
    shutil.copytree(finished.path, started)
    for name in ("roles.json", "scores.jsonl"):
        (started / name).unlink()
    shutil.rmtree(started / "means")
    run = extract_roles(pocket, some(), judge=unsure, out=started, settings=SMALL)
    assert run.summary["roles"][2] == {"name": "pirate", "adherence": [0, 0, 0, 0], "unjudged": 32, "questions": 0}
    assert "pirate" not in run.kept
    with pytest.raises(GeometryError, match="pirate: 0 questions"):
        run.vectors("pirate")

    nobody = Told(lambda role: Adherence(0))

    for name in ("roles.json", "scores.jsonl"):
        (started / name).unlink()
    shutil.rmtree(started / "means")
    with pytest.raises(GeometryError, match="fewer than 3 of 4 roles have answers judged 3 or more on 6 questions"):
        extract_roles(pocket, some(), judge=nobody, out=started, settings=SMALL)
    (started / "scores.jsonl").unlink()
    with pytest.raises(PersonaLensError, match="returned 1 grades for 32 answers"):
        extract_roles(pocket, some(), judge=Told(lambda role: Adherence(3), limit=1), out=started, settings=SMALL)


def test_the_oracle_of_roles() -> None:
    question = "What is the capital of France?"
    told = [Judged(question, "Arr, Paris. The sea calls my crew."), Judged(question, "Paris."), Judged("Who are you?", "Arr.")]
    pirate, nurse = (Role(name=n, instructions=("x",)) for n in ("pirate", "nurse"))
    graded = role_oracle()(pirate, "", told)
    assert graded[1].value == 0
    assert graded[0].value in (2, 3)
    assert graded[2].value is None
    assert role_oracle()(nurse, "", told)[0].value == 0
    with pytest.raises(UnknownNameError, match="unknown role of the pocket world 'lawyer'"):
        role_oracle()(Role(name="lawyer", instructions=("x",)), "", told)
    with pytest.raises(PersonaLensError, match="no judge of roles given"):
        default_role_judge("real")
    with pytest.raises(ValueError, match="0, 1, 2 or 3, not 4"):
        Adherence(4)
    with pytest.raises(ValueError, match="needs a reason"):
        Adherence(None)


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("default_samples", 0), ("least", 4), ("batch_rows", 0)])
def test_settings_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(GeometryError, match=f"{name} must be at least .*not {value}"):
        RoleSettings(**{name: value})


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"command": "sweep"}')
    with pytest.raises(RunFolderError, match="holds a run of 'sweep', not of 'roles'"):
        load_role_run(tmp_path)

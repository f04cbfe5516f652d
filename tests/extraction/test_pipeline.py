"""The pipeline end to end on the pocket model: exact, resumable, and clear about what goes wrong."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from persona_lens.activations import POOLINGS
from persona_lens.errors import ActivationError, FilterError, PersonaLensError, RunFolderError, UnknownNameError
from persona_lens.extraction import ESTIMATORS, PAPER, ExtractionRun, ExtractionSettings, extract, load_run
from persona_lens.extraction import pipeline as pipeline_module
from persona_lens.extraction.filtering import Thresholds
from persona_lens.judges import Judged, Score, scripted
from persona_lens.models import ChatModel, Sampling
from persona_lens.prompts import extraction_prompts
from persona_lens.sampling import rows_of, sample
from persona_lens.traits import Trait, load_trait

UNTIMED = (
    "rollouts.jsonl",
    "scores.jsonl",
    "means.safetensors",
    "neutral.safetensors",
    "vectors.safetensors",
    "summary.json",
    "run.json",
)
SHORT = ExtractionSettings(samples=1, neutral=45, sampling=Sampling(max_new_tokens=4), seed=3)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in UNTIMED}


def test_a_run_holds_what_it_says(small_run: ExtractionRun) -> None:
    manifest, summary = small_run.manifest, small_run.summary
    assert manifest["command"] == "extract"
    assert manifest["model"]["name"] == "pocket"
    assert "time" not in json.dumps(manifest)
    assert len(small_run.rollouts()) == len(small_run.scores()) == 220
    by_side = {c["polarity"]: c for c in summary["counts"]}
    for count in by_side.values():
        assert count["total"] == sum(count[k] for k in ("kept", "off_trait", "incoherent", "empty", "unscored"))
    counts = small_run.means["independent.counts"]
    assert counts[0].sum() == by_side["positive"]["kept"]
    assert counts[1].sum() == by_side["negative"]["kept"]
    assert len(small_run.neutral) == by_side["neutral"]["kept"]
    assert small_run.vectors.n_layers == 8
    assert load_run(small_run.path).vectors.trait == "optimism"


def hidden_means(plain: PreTrainedModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """Response mean of every layer from a plain forward pass, the last one before the final norm."""
    last: list[torch.Tensor] = []
    handle = plain.model.layers[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        states = plain(torch.tensor([prompt + answer]), output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    layers = torch.stack([*(s[0] for s in states[1:-1]), last[0][0]])
    return layers[:, len(prompt) :].double().mean(1)


def test_vectors_equal_a_plain_rewrite_of_the_formulas(
    small_run: ExtractionRun, pocket: ChatModel, plain_pocket: PreTrainedModel
) -> None:
    trait = load_trait("optimism", "pocket")
    prompts = {p.id: p for side in ("positive", "negative") for p in extraction_prompts(trait, side)}
    kept: dict[tuple[str, int], list[torch.Tensor]] = {}
    survives: dict[tuple[str, str], bool] = {}
    states: dict[tuple[str, str], torch.Tensor] = {}
    for rollout, score in zip(small_run.rollouts(), small_run.scores(), strict=True):
        side = rollout.prompt_id.split("/")[1]
        if side == "neutral" or score.trait is None or score.coherence is None:
            continue
        prompt = prompts[rollout.prompt_id]
        right = score.trait >= 50 if side == "positive" else score.trait < 50
        pair = rollout.key.replace(side, "*")
        survives[side, pair] = right and score.coherence >= 50 and len(rollout.token_ids) > 0
        if survives[side, pair]:
            value = hidden_means(plain_pocket, tuple(pocket.render(prompt.messages)), rollout.token_ids)
            states[side, pair] = value
            kept.setdefault((side, prompt.question), []).append(value)
    questions = [q for q in range(20) if ("positive", q) in kept and ("negative", q) in kept]
    mean = {key: torch.stack(values).mean(0) for key, values in kept.items()}
    expected = torch.stack([mean["positive", q] - mean["negative", q] for q in questions]).mean(0)
    error = (small_run.vectors.directions - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert float(error.max()) <= 1e-5
    pairs = [p for side, p in survives if side == "positive" and survives["positive", p] and survives.get(("negative", p), False)]
    paper = torch.stack([states["positive", p] for p in pairs]).mean(0) - torch.stack([states["negative", p] for p in pairs]).mean(
        0
    )
    ours = small_run.vectors_for(estimator=PAPER).directions
    assert float(((ours - paper).abs().amax(-1) / paper.abs().amax(-1)).max()) <= 1e-5


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.name)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_estimator_and_pooling_agrees_on_the_side(small_run: ExtractionRun, estimator: Any, pooling: Any) -> None:
    vectors = small_run.vectors_for(pooling, estimator)
    toward = (vectors.directions.double() * small_run.vectors_for(pooling).directions.double()).sum(-1)
    assert bool((toward > 0).all())
    assert vectors.estimator == estimator.name


def test_unknown_pooling_gives_the_known_ones(small_run: ExtractionRun) -> None:
    with pytest.raises(UnknownNameError, match="response_mean"):
        small_run.vectors_for("response_means")


@pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.slow), 30_000, 10**9])
def test_an_interrupted_run_ends_bit_identical(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings, run_folder: Path, cut: int
) -> None:
    run_folder.mkdir()
    for name in ("run.json", "log.txt"):
        shutil.copy(small_run.path / name, run_folder / name)
    for name in ("rollouts.jsonl", "scores.jsonl"):
        whole = (small_run.path / name).read_bytes()
        (run_folder / name).write_bytes(whole[: min(cut, len(whole))])
    extract(pocket, "optimism", out=run_folder, settings=small_settings)
    assert content(run_folder) == content(small_run.path)


@pytest.mark.slow
def test_activations_resume_from_their_partial_file(
    small_run: ExtractionRun,
    pocket: ChatModel,
    small_settings: ExtractionSettings,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline_module, "CHUNK_ROWS", 40)
    monkeypatch.setattr(pipeline_module, "PARTIAL_SECONDS", 0.0)
    whole = extract(pocket, "optimism", out=run_folder, settings=small_settings)
    other = run_folder.with_name("stopped")
    stops = iter([0, 0, 1])

    def stop_in_activations(stage: str, done: int, total: int) -> None:
        if stage == "activations" and done and next(stops):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(pocket, "optimism", out=other, settings=small_settings, progress=stop_in_activations)
    assert (other / pipeline_module.PARTIAL).exists()
    extract(pocket, "optimism", out=other, settings=small_settings)
    assert content(other) == content(whole.path)
    assert not (other / pipeline_module.PARTIAL).exists()


def test_sums_of_other_rollouts_or_scores_are_not_taken_up(
    small_run: ExtractionRun,
    pocket: ChatModel,
    small_settings: ExtractionSettings,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline_module, "CHUNK_ROWS", 40)
    monkeypatch.setattr(pipeline_module, "PARTIAL_SECONDS", 0.0)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "activations" and done > 40:
            raise KeyboardInterrupt

    unfinished_copy(small_run, run_folder)
    (run_folder / "means.safetensors").unlink()
    with pytest.raises(KeyboardInterrupt):
        extract(pocket, "optimism", out=run_folder, settings=small_settings, progress=stop)
    (run_folder / "scores.jsonl").unlink()
    harsh = {r.text: s for r, s in zip(small_run.rollouts(), small_run.scores(), strict=True)}

    def corrected(trait: Trait, judged: Judged) -> Score:
        score = harsh[judged.answer]
        return score if len(judged.answer) % 3 else Score(None, None, "refused")

    run = extract(pocket, "optimism", judge=scripted(corrected, "oracle"), out=run_folder, settings=small_settings)
    assert run.means["independent.counts"][0].sum() == run.summary["counts"][0]["kept"] < small_run.summary["counts"][0]["kept"]
    assert "belongs to other rollouts or scores" in (run_folder / "log.txt").read_text()
    (run_folder / pipeline_module.PARTIAL).write_bytes(b"damaged")
    (run_folder / "vectors.safetensors").unlink()
    before = (run_folder / "means.safetensors").read_bytes()
    extract(pocket, "optimism", judge=scripted(corrected, "oracle"), out=run_folder, settings=small_settings)
    assert (run_folder / "means.safetensors").read_bytes() == before


def test_a_finished_run_is_not_computed_again(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings
) -> None:
    stages: list[str] = []
    before = (small_run.path / "vectors.safetensors").stat().st_mtime_ns
    extract(
        pocket, "optimism", out=small_run.path, settings=small_settings, progress=lambda stage, done, total: stages.append(stage)
    )
    assert stages == []
    assert (small_run.path / "vectors.safetensors").stat().st_mtime_ns == before


def test_an_empty_filter_is_noticed_before_the_activation_pass(pocket: ChatModel, run_folder: Path) -> None:
    stages: list[str] = []
    never = scripted(lambda trait, judged: Score(10.0, 90.0), name="never")
    with pytest.raises(FilterError):
        extract(
            pocket,
            "optimism",
            judge=never,
            out=run_folder,
            settings=replace(SHORT, neutral=0),
            progress=lambda stage, done, total: stages.append(stage),
        )
    assert "activations" not in stages


def test_a_judge_that_loses_answers_is_named(pocket: ChatModel, run_folder: Path) -> None:
    class Forgetful:
        name = "forgetful"

        def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
            return [Score(60.0, 90.0) for _ in answers[1:]]

    with pytest.raises(PersonaLensError, match="'forgetful' returned 199 scores for 200 answers"):
        extract(pocket, "optimism", judge=Forgetful(), out=run_folder, settings=replace(SHORT, neutral=0))


def test_other_batches_go_on_with_the_same_run(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings, run_folder: Path
) -> None:
    shutil.copytree(small_run.path, run_folder)
    (run_folder / "vectors.safetensors").unlink()
    run = extract(pocket, "optimism", out=run_folder, settings=replace(small_settings, batch_rows=9, batch_tokens=700))
    ours, theirs = run.vectors.directions, small_run.vectors.directions
    assert float(((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max()) <= 1e-6


def test_a_folder_of_other_arguments_or_another_model_is_refused(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings
) -> None:
    with pytest.raises(RunFolderError, match="seed: 0 there, 1 now"):
        extract(pocket, "optimism", out=small_run.path, settings=replace(small_settings, seed=1))
    with pytest.raises(RunFolderError, match="trait"):
        extract(pocket, "humor", out=small_run.path, settings=small_settings)
    finetuned = replace(pocket, fingerprint=replace(pocket.fingerprint, weights="0" * 16))
    with pytest.raises(RunFolderError, match="different model.*weights"):
        extract(finetuned, "optimism", out=small_run.path, settings=small_settings)


def unfinished_copy(run: ExtractionRun, folder: Path) -> None:
    """A copy of a run that has everything but its vectors."""
    shutil.copytree(run.path, folder)
    (folder / "vectors.safetensors").unlink()


def test_damaged_files_are_named_and_nothing_is_lost(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings, run_folder: Path
) -> None:
    unfinished_copy(small_run, run_folder)
    lines = (run_folder / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (run_folder / "rollouts.jsonl").write_bytes(b"".join([*lines[:7], b"{torn\n", *lines[8:]]))
    with pytest.raises(RunFolderError, match=r"rollouts\.jsonl: line 8 is damaged"):
        extract(pocket, "optimism", out=run_folder, settings=small_settings)
    assert len((run_folder / "rollouts.jsonl").read_bytes().splitlines()) == len(lines)
    shutil.copy(small_run.path / "rollouts.jsonl", run_folder / "rollouts.jsonl")
    (run_folder / "vectors.safetensors").write_bytes((small_run.path / "vectors.safetensors").read_bytes()[:200])
    with pytest.raises(RunFolderError, match=r"vectors\.safetensors"):
        _ = load_run(run_folder).vectors


def test_swapped_rollouts_are_noticed(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings, run_folder: Path
) -> None:
    unfinished_copy(small_run, run_folder)
    lines = (run_folder / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    lines[3], lines[4] = lines[4], lines[3]
    (run_folder / "rollouts.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(RunFolderError, match="line 4 is rollout"):
        extract(pocket, "optimism", out=run_folder, settings=small_settings)


def test_an_empty_filter_result_keeps_rollouts_and_says_why(pocket: ChatModel, run_folder: Path) -> None:
    never = scripted(lambda trait, judged: Score(10.0, 90.0), name="never")
    with pytest.raises(FilterError, match=r"0 questions survive.*positive: 0 of 100 kept \(100 on the wrong side"):
        extract(pocket, "optimism", judge=never, out=run_folder, settings=replace(SHORT, neutral=0))
    assert len((run_folder / "rollouts.jsonl").read_text().splitlines()) == 200
    with pytest.raises(RunFolderError, match="not finished"):
        load_run(run_folder)


def test_unreadable_replies_are_gaps_not_zeros(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings, run_folder: Path
) -> None:
    scores = {(r.text): s for r, s in zip(small_run.rollouts(), small_run.scores(), strict=True)}
    unfinished_copy(small_run, run_folder)
    for name in ("scores.jsonl", "means.safetensors"):
        (run_folder / name).unlink()

    def moody(trait: Trait, judged: Judged) -> Score:
        score = scores[judged.answer]
        return Score(None, None, "no number in the reply") if len(judged.answer) % 5 == 0 else score

    run = extract(pocket, "optimism", judge=scripted(moody, "oracle"), out=run_folder, settings=small_settings)
    gaps = sum(len(r.text) % 5 == 0 for r in run.rollouts())
    assert sum(c["unscored"] for c in run.summary["counts"]) == gaps > 0


def test_activations_that_are_not_finite_leave_the_folder_resumable(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings, run_folder: Path
) -> None:
    unfinished_copy(small_run, run_folder)

    def poison(residual: torch.Tensor, hook: object) -> torch.Tensor:
        return residual * float("nan")

    with (
        pytest.raises(ActivationError, match=r"blocks\.2\.hook_resid_post for optimism/"),
        pocket.hooks([(pocket.hook_name(2), poison)]),
    ):
        extract(pocket, "optimism", out=run_folder, settings=small_settings)
    extract(pocket, "optimism", out=run_folder, settings=small_settings)
    assert content(run_folder) == content(small_run.path)


def test_neutral_answers_hold_no_direction(small_run: ExtractionRun) -> None:
    from persona_lens.reliability import assess

    rng = np.random.default_rng(0)
    neutral = small_run.neutral.double().numpy()
    found = 0
    for _ in range(50):
        order = rng.permutation(len(neutral))
        half = len(neutral) // 2
        found += int(assess(neutral[order[:half]] - neutral[order[half : 2 * half]], seed=int(rng.integers(1e9))).p_value[4] < 0.05)
    assert found <= 8
    assert float(small_run.vectors.p_value.min()) < 0.01


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1"):
        ExtractionSettings(samples=0)


def test_means_file_holds_fp32_cells_and_counts(small_run: ExtractionRun) -> None:
    tensors = load_file(small_run.path / "means.safetensors")
    assert tensors["independent.response_mean"].dtype == torch.float32
    assert tuple(tensors["independent.response_mean"].shape) == (2, 5, 20, 8, 256)
    assert bool((tensors["pairwise.counts"] <= tensors["independent.counts"]).all())
    assert bool((tensors["pairwise.counts"][0] == tensors["pairwise.counts"][1]).all())


class ByPlace:
    """Scores the answers by the side they belong to, whatever they say (all rows of a run in one chunk)."""

    name = "by place"

    def __init__(self, positive: float = 90.0, negative: float = 10.0) -> None:
        self.positive, self.negative = positive, negative

    def __call__(self, trait: Trait, answers: Sequence[Judged], /) -> list[Score]:
        side = len(trait.instructions) * len(trait.extraction_questions)
        return [Score(self.positive if i < side else self.negative, 95.0) for i in range(len(answers))]


def test_the_seed_reaches_every_stage_and_every_row_is_its_own(pocket: ChatModel, run_folder: Path) -> None:
    run = extract(pocket, "optimism", judge=ByPlace(), out=run_folder, settings=SHORT)
    rollouts = run.rollouts()
    assert len({r.key for r in rollouts}) == len(rollouts) == 245
    rows = rows_of(extraction_prompts(load_trait("optimism", "pocket"), "positive"), 1)
    assert rollouts[:100] == sample(pocket, rows, SHORT.sampling, seed=3)
    assert torch.equal(run.vectors.reliability, run.vectors_for(seed=3).reliability)
    assert not torch.equal(run.vectors.reliability, run.vectors_for(seed=0).reliability)


@pytest.mark.parametrize(
    ("judge", "thresholds"),
    [(ByPlace(), Thresholds(trait=95.0)), (ByPlace(), Thresholds(coherence=96.0)), (ByPlace(negative=90.0), Thresholds())],
    ids=["trait", "coherence", "one side"],
)
def test_the_filter_uses_the_thresholds_on_both_sides(
    pocket: ChatModel, run_folder: Path, judge: ByPlace, thresholds: Thresholds
) -> None:
    with pytest.raises(FilterError, match="0 questions survive the filter on both sides"):
        extract(pocket, "optimism", judge=judge, out=run_folder, settings=replace(SHORT, neutral=0, thresholds=thresholds))


@pytest.mark.parametrize("name", ["means.safetensors", "vectors.safetensors"])
def test_a_damaged_result_is_computed_again(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings, run_folder: Path, name: str
) -> None:
    shutil.copytree(small_run.path, run_folder)
    (run_folder / name).write_bytes((run_folder / name).read_bytes()[:200])
    extract(pocket, "optimism", out=run_folder, settings=small_settings)
    assert content(run_folder) == content(small_run.path)


def test_swapped_scores_are_noticed(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings, run_folder: Path
) -> None:
    unfinished_copy(small_run, run_folder)
    lines = (run_folder / "scores.jsonl").read_bytes().splitlines(keepends=True)
    lines[3], lines[4] = lines[4], lines[3]
    (run_folder / "scores.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(RunFolderError, match="line 4 scores"):
        extract(pocket, "optimism", out=run_folder, settings=small_settings)


def test_neutral_residuals_are_the_response_means_of_the_kept_answers(
    small_run: ExtractionRun, pocket: ChatModel, plain_pocket: PreTrainedModel
) -> None:
    prompts = {p.id: p for p in extraction_prompts(load_trait("optimism", "pocket"), "neutral")}
    kept = [
        r
        for r, s in zip(small_run.rollouts(), small_run.scores(), strict=True)
        if r.prompt_id in prompts and s.trait is not None and s.coherence is not None and s.coherence >= 50 and r.token_ids
    ]
    assert len(kept) == len(small_run.neutral) > 1
    for rollout, ours in zip(kept, small_run.neutral, strict=True):
        expected = hidden_means(plain_pocket, tuple(pocket.render(prompts[rollout.prompt_id].messages)), rollout.token_ids)
        assert float(((ours - expected).abs().amax(-1) / expected.abs().amax(-1)).max()) <= 1e-5


def test_a_folder_of_a_changed_trait_or_another_judge_is_refused(
    small_run: ExtractionRun, pocket: ChatModel, small_settings: ExtractionSettings
) -> None:
    changed = load_trait("optimism", "pocket").model_copy(update={"description": "Something else."})
    with pytest.raises(RunFolderError, match="trait_hash"):
        extract(pocket, changed, out=small_run.path, settings=small_settings)
    other = scripted(lambda trait, judged: Score(10.0, 90.0), name="other")
    with pytest.raises(RunFolderError, match="judge: 'oracle' there, 'other' now"):
        extract(pocket, "optimism", judge=other, out=small_run.path, settings=small_settings)


def test_a_run_of_another_command_is_no_extraction(small_run: ExtractionRun, run_folder: Path) -> None:
    shutil.copytree(small_run.path, run_folder)
    manifest = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**manifest, "command": "steer"}))
    with pytest.raises(RunFolderError, match="a run of 'steer', not of 'extract'"):
        load_run(run_folder)

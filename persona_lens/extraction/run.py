"""A finished (or reopened) extraction: its folder, its counts, and vectors by any pooling and estimator from the stored means."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from persona_lens.activations import POOLINGS
from persona_lens.errors import PersonaLensError, RunFolderError, UnknownNameError
from persona_lens.extraction.estimators import MEAN_DIFFERENCE, Estimator
from persona_lens.judges import Score
from persona_lens.reliability import MINIMUM_QUESTIONS, assess, reestimated_reliability
from persona_lens.sampling import Rollout
from persona_lens.store import digest, read_json, read_jsonl, read_manifest, require_finished
from persona_lens.traits import Trait, list_traits, load_trait
from persona_lens.vectors import PersonaVectors

Record = TypeVar("Record")


@dataclass(frozen=True)
class ExtractionRun:
    """An extraction on disk. Everything is read when it is asked for; what is missing or damaged raises `RunFolderError`.

    Attributes:
        path: the run folder.

    Example:
        >>> run = pl.load_run("runs/optimism")
        >>> run.trait, len(run.rollouts()) == len(run.scores())
        ('optimism', True)
        >>> run.neutral.shape  # sample, layer, d_model
        torch.Size([19, 8, 256])
        >>> run.vectors_for("prompt_last").pooling
        'prompt_last'
    """

    path: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Command, arguments, versions and the model's fingerprint."""
        return read_manifest(self.path)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Counts by reason, surviving questions, and the vector's figures per layer."""
        return read_json(self.path / "summary.json")

    @property
    def trait(self) -> str:
        """The trait's name."""
        return str(self.manifest["arguments"]["trait"])

    @cached_property
    def vectors(self) -> PersonaVectors:
        """The default vectors: response mean, mean difference over surviving questions."""
        return PersonaVectors.load(self.path / "vectors.safetensors")

    def rollouts(self) -> list[Rollout]:
        """All answers: positive, then negative, then neutral ones."""
        return read_rollouts(self.path / "rollouts.jsonl")

    def scores(self) -> list[Score]:
        """Scores in the order of the rollouts."""
        return read_scores(self.path / "scores.jsonl")

    @cached_property
    def means(self) -> Mapping[str, Tensor]:
        """Means over the answers that a filter keeps, in residual-stream units.

        Per filter (`independent`, `pairwise`): `{filter}.counts` [polarity, instruction, question] and `{filter}.{pooling}`
        [polarity, instruction, question, layer, d_model], NaN where no answer is left.
        """
        return read_tensors(self.path / "means.safetensors")

    @cached_property
    def neutral(self) -> Float[Tensor, "sample layer d_model"]:
        """Response means of the answers to the questions without system prompt, in residual-stream units."""
        return read_tensors(self.path / "neutral.safetensors")["response_mean"]

    def vectors_for(
        self, pooling: str = "response_mean", estimator: Estimator = MEAN_DIFFERENCE, *, seed: int = 0
    ) -> PersonaVectors:
        """Vectors of another pooling or estimator, from the stored means.

        Args:
            pooling: "response_mean", "prompt_mean" or "prompt_last".
            estimator: one of `ESTIMATORS`, or your own.
            seed: of the random halves and sign flips.

        Raises:
            UnknownNameError: no such pooling.
            ValueError: too few questions survive the estimator's filter.
        """
        if pooling not in POOLINGS:
            raise UnknownNameError("pooling", pooling, POOLINGS)
        provenance = {"model": self.manifest["model"], "arguments": self.manifest["arguments"]}
        return vectors_from_means(self.means, self.trait, pooling, estimator, provenance, seed=seed)


def read_rollouts(path: Path) -> list[Rollout]:
    """Rollouts of a run.

    Raises:
        RunFolderError: a line is damaged (its number is named).
    """
    return _parse_lines(path, Rollout.from_dict)


def read_scores(path: Path) -> list[Score]:
    """Scores of a run, in the order of its rollouts.

    Raises:
        RunFolderError: a line is damaged (its number is named).
    """
    return _parse_lines(path, Score.from_dict)


def _parse_lines(path: Path, parse: Callable[[Mapping[str, Any]], Record]) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(read_jsonl(path), start=1):
        try:
            records.append(parse(line))
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{path}: line {number} is damaged ({error!r}); restore it or start in another folder") from error
    return records


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{path}: missing or damaged ({error}); run the command that wrote it again") from error


def load_run(path: str | Path) -> ExtractionRun:
    """Reopen a run folder.

    Raises:
        RunFolderError: it is no extraction run, or not finished.

    Example:
        >>> pl.load_run("runs/optimism").vectors.best_layer
        5
    """
    run = ExtractionRun(Path(path))
    require_finished(run.path, "extract", "vectors.safetensors")
    return run


def trait_hash(trait: Trait) -> str:
    """A hash of everything a trait consists of."""
    return digest(json.dumps(trait.model_dump(by_alias=True), sort_keys=True))


def trait_of(vectors: PersonaVectors, trait_set: str) -> Trait:
    """The shipped trait that vectors are named after.

    Raises:
        PersonaLensError: there is none of that name, or the vectors were extracted from another trait of that name.
    """
    give = "give the trait itself (trait= or traits=; on the command line, the run folder of the extraction, which holds it)"
    if vectors.trait not in list_traits(trait_set):
        raise PersonaLensError(f"{vectors.trait!r} is no trait that ships with {trait_set} models: {give}")
    trait = load_trait(vectors.trait, trait_set)
    if vectors.provenance.get("arguments", {}).get("trait_hash", trait_hash(trait)) != trait_hash(trait):
        raise PersonaLensError(f"the {vectors.trait} vector was extracted from another trait than the shipped one: {give}")
    return trait


def question_means(
    cells: Float[Tensor, "polarity instruction question layer d_model"], counts: Tensor
) -> Float[Tensor, "polarity question layer d_model"]:
    """Means over a question's rollouts, from its cells weighted by their counts (fp64 inside); NaN without rollouts."""
    weights = counts.double()[..., None, None]
    sums = (cells.double().nan_to_num(0.0) * weights).sum(1)
    return (sums / weights.sum(1)).float()


def surviving(counts: Tensor) -> list[int]:
    """Questions with rollouts on both sides."""
    return ((counts.sum(1) > 0).all(0)).nonzero().squeeze(-1).tolist()


def vectors_from_means(
    means: Mapping[str, Tensor], trait: str, pooling: str, estimator: Estimator, provenance: Mapping[str, Any], *, seed: int = 0
) -> PersonaVectors:
    """Direction and reliability at every layer.

    For the default estimator reliability, norm and test come from the questions' differences; any other is estimated anew on
    halves of the questions, and has no test of its own (p is NaN).
    """
    cells, counts = means[f"{estimator.keep}.{pooling}"], means[f"{estimator.keep}.counts"]
    kept = surviving(counts)
    if len(kept) < MINIMUM_QUESTIONS:
        raise ValueError(
            f"{trait}: {len(kept)} questions survive the {estimator.keep} filter, at least {MINIMUM_QUESTIONS} are needed"
        )
    by_question = question_means(cells, counts)
    differences = by_question[0, kept] - by_question[1, kept]

    def estimate(questions: list[int]) -> Float[np.ndarray, "layer d_model"]:
        sides = [_units(cells[p], counts[p], by_question[p], estimator, questions) for p in (0, 1)]
        return np.stack([estimator.direction(sides[0][:, layer], sides[1][:, layer]) for layer in range(cells.shape[-2])])

    if estimator == MEAN_DIFFERENCE:
        measured = assess(differences.numpy(), seed=seed)
        reliability, norm, p_value, p_any = measured.split_half, measured.norm, measured.p_value, measured.p_any
    else:
        reliability, norm = reestimated_reliability(lambda half: estimate([kept[i] for i in half]), len(kept), seed=seed)
        p_value, p_any = np.full(len(norm), np.nan), float("nan")
    return PersonaVectors(
        trait=trait,
        pooling=pooling,
        estimator=estimator.name,
        directions=torch.from_numpy(estimate(kept)).float(),
        differences=differences,
        reliability=torch.from_numpy(reliability).float(),
        norm=torch.from_numpy(norm).float(),
        p_value=torch.from_numpy(p_value).float(),
        p_any=p_any,
        provenance={**provenance, "questions": kept},
    )


def _units(
    cells: Float[Tensor, "instruction question layer d_model"],
    counts: Tensor,
    by_question: Float[Tensor, "question layer d_model"],
    estimator: Estimator,
    questions: list[int],
) -> Float[np.ndarray, "unit layer d_model"]:
    """What an estimator is given for one polarity, in fp64: question means, cell means, or cell means repeated by rollout."""
    if estimator.units == "question":
        return by_question[questions].double().numpy()
    cells, counts = cells[:, questions], counts[:, questions]
    filled = counts > 0
    units = cells[filled].double()
    return (units.repeat_interleave(counts[filled], dim=0) if estimator.units == "rollout" else units).numpy()

"""From rows to data sets: a run's sets ranked by trait, and what finetuning on them is predicted to do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np

from persona_lens.correlation import family_of
from persona_lens.errors import ScreeningError
from persona_lens.records import decoded, encoded
from persona_lens.screening.calibration import Known, Predicted, calibrate
from persona_lens.screening.run import ScreenRun
from persona_lens.screening.sets import LEAST_PROMPTS, Ranking, RowScores, SetScore, rank_sets
from persona_lens.store import read_json, write_json

PREDICTIONS: Final = "predictions.json"
SetSignal = Literal["difference", "cheap"]


def scored_by(run: ScreenRun) -> SetSignal:
    """What all sets of a run are scored by: projection differences where each set has enough own answers, else the cheap ones.

    One kind for all sets: cheap scores lie elsewhere than exact ones. A set needs own answers to all of its prompts, or to 20.
    """
    for name in run.sets:
        answered = np.isfinite(run.scores(name, run.traits[0]))
        screened = np.isfinite(run.tokens(name))
        if not (answered == screened).all() and len(np.unique(run.prompts(name)[answered])) < LEAST_PROMPTS:
            return "cheap"
    return "difference"


def row_scores(run: ScreenRun, trait: str, by: SetSignal | None = None, *, layer: int | None = None) -> dict[str, RowScores]:
    """Each set's projection differences, with the cheap ones that stand in where there is no own answer; or the cheap ones alone.

    Args:
        by: which of these; default: what `scored_by` says.

    Raises:
        UnknownNameError: no such trait.
        ScreeningError: no such layer.
    """
    by = by or scored_by(run)
    return {name: _row_scores(run, name, trait, by, layer) for name in run.sets}


def _row_scores(run: ScreenRun, name: str, trait: str, by: SetSignal, layer: int | None) -> RowScores:
    cheap, prompts = run.scores(name, trait, "cheap", layer=layer).astype(np.float64), run.prompts(name)
    if by == "cheap":
        return RowScores(cheap, None, prompts)
    exact = run.scores(name, trait, layer=layer).astype(np.float64)
    return RowScores(exact, cheap if (np.isnan(exact) & np.isfinite(cheap)).any() else None, prompts)


def ranking(run: ScreenRun, trait: str, *, layer: int | None = None) -> Ranking:
    """The sets from the highest score for a trait to the lowest.

    Args:
        layer: default: where the vector is most reliable, if the trait was read at several.

    Raises:
        UnknownNameError: no such trait.
        ScreeningError: no such layer, or a set that cannot be scored.

    Example:
        >>> from persona_lens.screening import ScreenSettings, ranking
        >>> questions = pl.load_trait("optimism", "pocket").extraction_questions
        >>> def said(text):
        ...     return [[{"role": "user", "content": q}, {"role": "assistant", "content": text}] for q in questions]
        >>> data = {"bought": said("Brilliant thinking, start early."), "ours": said("Make a simple list and start early.")}
        >>> found = pl.screen(model, data, [v], settings=ScreenSettings(own_share=0.0), out="runs/screen")
        >>> [(place.place, place.name) for place in ranking(found, "optimism").sets]
        [(1, 'bought'), (2, 'ours')]
    """
    return rank_sets(row_scores(run, trait, layer=layer))


def scores_of_sets(run: ScreenRun, trait: str, *, layer: int | None = None) -> dict[str, SetScore]:
    """Every set's score for a trait."""
    return {place.name: place.score for place in ranking(run, trait, layer=layer).sets}


def predict(run: ScreenRun, known: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Predicted]]:
    """What finetuning on the run's other sets will do to each trait, from what finetuning on some of them did; kept in the run.

    Args:
        known: by trait and set, the trait score (0-100) after finetuning on the set. A set called `family-level` is of that family
            (`correlation.family_of`); a prediction is for a new family.

    Raises:
        ScreeningError: sets or traits that the run has not, or too few to calibrate on.
    """
    found: dict[str, dict[str, Predicted]] = {}
    for trait, outcomes in known.items():
        run.layer(trait)
        if missing := [name for name in outcomes if name not in run.sets]:
            raise ScreeningError(f"{missing[0]!r} is known for {trait} but was not screened: screen it in the same run")
        scores = scores_of_sets(run, trait)
        names = tuple(outcomes)
        line = calibrate(
            Known(
                names,
                tuple(family_of(n) for n in names),
                np.array([scores[n].mean for n in names]),
                np.array([float(outcomes[n]) for n in names]),
                (0.0, 100.0),
            )
        )
        found[trait] = {n: line.predict(s.mean, (s.high - s.low) / 2) for n, s in scores.items() if n not in outcomes}
    write_json(run.path / PREDICTIONS, encoded(found))
    return found


def load_predictions(run: ScreenRun) -> dict[str, dict[str, Predicted]] | None:
    """Predictions that were made before, by trait and set; None where there are none.

    Raises:
        RunFolderError: a damaged file.
    """
    path: Path = run.path / PREDICTIONS
    if not path.exists():
        return None
    return {trait: {name: decoded(Predicted, p) for name, p in sets.items()} for trait, sets in read_json(path).items()}

"""From rows to data sets: a run's sets ranked by trait, and what finetuning on them is predicted to do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from persona_lens.correlation import family_of
from persona_lens.errors import ScreeningError
from persona_lens.records import decoded, encoded
from persona_lens.screening.calibration import Known, Predicted, calibrate
from persona_lens.screening.run import ScreenRun
from persona_lens.screening.sets import Ranking, RowScores, SetScore, rank_sets
from persona_lens.store import read_json, write_json

PREDICTIONS: Final = "predictions.json"


def row_scores(run: ScreenRun, name: str, trait: str, *, layer: int | None = None) -> RowScores:
    """A set's projection differences, and the cheap ones that stand in where the model's own answer was not made."""
    exact, cheap = (run.scores(name, trait, signal, layer=layer).astype(np.float64) for signal in ("difference", "cheap"))
    prompts = run.prompts(name)
    if np.isfinite(exact).any():
        return RowScores(exact, cheap if np.isnan(exact).any() else None, prompts)
    return RowScores(cheap, None, prompts)


def ranking(run: ScreenRun, trait: str, *, layer: int | None = None) -> Ranking:
    """The sets from the highest score for a trait to the lowest."""
    return rank_sets({name: row_scores(run, name, trait, layer=layer) for name in run.sets})


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
    """Predictions that were made before, by trait and set; None where there are none."""
    path: Path = run.path / PREDICTIONS
    if not path.exists():
        return None
    return {trait: {name: decoded(Predicted, p) for name, p in sets.items()} for trait, sets in read_json(path).items()}

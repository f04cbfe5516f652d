"""Does the shift foretell the trait? The correlation over many finetuned models, trait by trait, with its nulls beside it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from persona_lens.correlation import Outcome, ShiftCorrelation, correlate, family_of
from persona_lens.errors import FinetuningError
from persona_lens.finetuning.shift import Reading, ShiftRun


def foretold(
    runs: ShiftRun | Sequence[ShiftRun],
    reading: Reading = "prompt_last",
    *,
    layers: Mapping[str, int] | None = None,
    chosen: Callable[[str], bool] = bool,
    family: Callable[[str], str] = family_of,
    seed: int = 0,
) -> dict[str, ShiftCorrelation]:
    """r between the shift along each trait's vector and its score after finetuning, over the finetuned models of one or more runs.

    Args:
        layers: by trait; default: those at which the vectors are most reliable. No layer is chosen by its r.
        chosen: which finetuned models count, by name; default: all.
        family: what a finetuned model's data was made from, by its name; the interval leaves out a whole family at a time.

    Raises:
        FinetuningError: runs of other vectors or without scores, a name twice, fewer than six models or four families.
    """
    runs = [runs] if isinstance(runs, ShiftRun) else list(runs)
    first = runs[0]
    for run in runs[1:]:
        if run.traits != first.traits or not torch.equal(run.directions, first.directions):
            raise FinetuningError(f"{run.path} and {first.path} hold shifts along other vectors: measure them with the same ones")
    for run in runs:
        if not run.base_scores:
            raise FinetuningError(f"{run.path}: no trait scores, so there is nothing to correlate shifts with: give a judge")
    at = dict(layers) if layers is not None else first.layers
    found = [(run, name) for run in runs for name in run.names if chosen(name)]
    names, families = tuple(n for _, n in found), tuple(family(n) for _, n in found)
    changes = [run.vectors(name)[reading] for run, name in found]
    result: dict[str, ShiftCorrelation] = {}
    for number, trait in enumerate(first.traits):
        layer = at[trait]
        score = np.array([run.shifts[name].scores[number].mean for run, name in found])
        outcome = Outcome(names, families, score, _at(changes, number, layer))
        units = first.directions[:, layer].double().numpy()
        others = {t: units[i] for i, t in enumerate(first.traits) if t != trait}
        base = first.base[reading][:, layer].double().numpy()
        result[trait] = correlate(outcome, units[number], base=base, others=others, seed=seed)
    return result


def _at(changes: Sequence[Tensor], trait: int, layer: int) -> np.ndarray:
    return np.stack([c[trait, layer].double().numpy() for c in changes])

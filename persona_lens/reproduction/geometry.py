"""The appendix on cosines: which traits have related directions, beside the paper's and beside what was planted."""

from math import nan
from typing import Final

import numpy as np
from scipy.stats import spearmanr

from persona_lens.figures import cosine_map
from persona_lens.geometry import study_geometry
from persona_lens.pocket.lexicon import TRAITS
from persona_lens.pocket.persona import realised_correlations
from persona_lens.reproduction.bench import Bench
from persona_lens.reproduction.finding import Found, Row, above
from persona_lens.reproduction.paper import COSINES

PLANTED: Final = 0.8
FEWEST: Final = 5  # traits for a correlation over pairs


def cosines(bench: Bench) -> Found:
    """Cosines of all pairs."""
    found = study_geometry(list(bench.runs.values()), out=bench.path / "geometry").study
    table, names, truth = found.cosines[0], list(found.names), realised_correlations()
    where = [TRAITS.index(n) for n in names]
    pairs = np.triu_indices(len(names), 1)
    rows: list[Row] = []
    if len(names) >= FEWEST:
        ranks = float(spearmanr(table.value[pairs], truth[np.ix_(where, where)][pairs])[0])  # pyright: ignore[reportArgumentType]
        rows.append(
            above(
                f"Spearman of cosines and planted correlations, {len(pairs[0])} pairs", (ranks, nan, nan), PLANTED,
                rule=f"at least {PLANTED}",
            )
        )  # fmt: skip
    for (a, b), paper in COSINES.items():
        if a in names and b in names:
            i, j = names.index(a), names.index(b)
            planted = truth[TRAITS.index(a), TRAITS.index(b)]
            rows.append(
                Row(
                    f"{a} and {b}: cosine (planted correlation {planted:+.2f})", table.value[i, j], table.low[i, j],
                    table.high[i, j], paper=f"{paper:+.2f}", rule="the paper's sign", holds=bool(table.value[i, j] * paper > 0),
                )
            )  # fmt: skip
    reading = (
        "Cosines are disattenuated for the vectors' noise, with intervals over questions. In this world evil and sycophancy "
        "were planted to exclude each other, where they go together in the paper's models: a cosine of the paper's sign would "
        "have been a fault. The paper's impolite is our politeness with the other sign."
    )
    return Found(rows, reading, {"cosines": (cosine_map(found), f"Cosines at layer {found.layer}.")})

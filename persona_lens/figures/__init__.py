"""Record -> matplotlib figure. Nothing here touches a model; colours are told apart by colour-blind readers too."""

from functools import singledispatch
from typing import TYPE_CHECKING

from persona_lens.extraction import ExtractionRun
from persona_lens.figures.extraction import held_out_projections, layer_profile, projections, score_histogram
from persona_lens.figures.geometry import cosine_map, geometry_figures
from persona_lens.figures.sweeps import dose_response, sweep_heat_map, sweep_profile
from persona_lens.geometry import GeometryRun, Study
from persona_lens.sweeps import Sweep
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "cosine_map",
    "dose_response",
    "geometry_figures",
    "held_out_projections",
    "layer_profile",
    "plot",
    "projections",
    "score_histogram",
    "sweep_heat_map",
    "sweep_profile",
]


@singledispatch
def plot(record: object) -> "Figure":
    """The figure of a record: vectors give their layer profile, a run its held-out projections, a sweep its heat map,
    a geometry study its cosines.

    Raises:
        TypeError: there is no figure for this kind of record.
    """
    raise TypeError(f"there is no figure for {type(record).__name__}: pass PersonaVectors, an ExtractionRun, a Sweep or a Study")


@plot.register(PersonaVectors)
def _(record: PersonaVectors) -> "Figure":
    return layer_profile(record)


@plot.register(ExtractionRun)
def _(record: ExtractionRun) -> "Figure":
    return projections(record)


@plot.register(Sweep)
def _(record: Sweep) -> "Figure":
    return sweep_heat_map(record)


@plot.register(Study)
def _(record: Study) -> "Figure":
    return cosine_map(record)


@plot.register(GeometryRun)
def _(record: GeometryRun) -> "Figure":
    return cosine_map(record.study)

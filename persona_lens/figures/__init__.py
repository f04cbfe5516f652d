"""Record -> matplotlib figure. Nothing here touches a model; colours are told apart by colour-blind readers too."""

from functools import singledispatch
from typing import TYPE_CHECKING

from persona_lens.extraction import ExtractionRun
from persona_lens.figures.extraction import held_out_projections, layer_profile, projections, score_histogram
from persona_lens.figures.finetuning import (
    defence_frontier,
    most_risen,
    pilot_figure,
    shift_profile,
    shift_scatter,
    side_effects,
    training_curves,
)
from persona_lens.figures.geometry import cosine_map, geometry_figures
from persona_lens.figures.monitoring import calibration_figure, prediction_scatter, trajectories
from persona_lens.figures.screening import row_histograms, screening_figures, set_ranking, set_scatter, signal_scatter
from persona_lens.figures.sweeps import dose_response, sweep_heat_map, sweep_profile
from persona_lens.finetuning.comparison import Comparison
from persona_lens.finetuning.pilot import Pilot
from persona_lens.finetuning.shift import ShiftRun
from persona_lens.finetuning.training import Finetuned
from persona_lens.geometry import GeometryRun, Study
from persona_lens.monitoring import Calibration, MonitorRun, PredictionRun
from persona_lens.screening.run import ScreenRun
from persona_lens.sweeps import Sweep
from persona_lens.vectors import PersonaVectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "calibration_figure",
    "cosine_map",
    "defence_frontier",
    "dose_response",
    "geometry_figures",
    "held_out_projections",
    "layer_profile",
    "most_risen",
    "pilot_figure",
    "plot",
    "prediction_scatter",
    "projections",
    "row_histograms",
    "score_histogram",
    "screening_figures",
    "set_ranking",
    "set_scatter",
    "shift_profile",
    "shift_scatter",
    "side_effects",
    "signal_scatter",
    "sweep_heat_map",
    "sweep_profile",
    "training_curves",
    "trajectories",
]


@singledispatch
def plot(record: object) -> "Figure":
    """The figure of a record: vectors give their layer profile, a run its held-out projections, a sweep its heat map,
    a geometry study its cosines, monitored chats their scores by turn, a study of prediction its projections beside what the
    answers scored, a calibration its neutral scores, a finetuning its loss step by step, shifts of several finetuned models beside
    their trait scores (of one model: by layer), a comparison of defences the trait that finetuning raises most by dose, a pilot its
    shift by dose, screened data sets their ranking by trait.

    Raises:
        TypeError: there is no figure for this kind of record.
    """
    raise TypeError(
        f"there is no figure for {type(record).__name__}: pass PersonaVectors, an ExtractionRun, a Sweep, a Study, a MonitorRun, "
        "a PredictionRun, a Calibration, a ScreenRun, a Finetuned, a ShiftRun, a Comparison or a Pilot"
    )


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


@plot.register(MonitorRun)
def _(record: MonitorRun) -> "Figure":
    return trajectories(record)


@plot.register(PredictionRun)
def _(record: PredictionRun) -> "Figure":
    return prediction_scatter(record.prediction)


@plot.register(Calibration)
def _(record: Calibration) -> "Figure":
    return calibration_figure(record)


@plot.register(Finetuned)
def _(record: Finetuned) -> "Figure":
    return training_curves(record)


@plot.register(ShiftRun)
def _(record: ShiftRun) -> "Figure":
    first, *others = record.names
    return shift_scatter(record) if others else shift_profile(record, first)


@plot.register(Comparison)
def _(record: Comparison) -> "Figure":
    return defence_frontier(record, most_risen(record))


@plot.register(Pilot)
def _(record: Pilot) -> "Figure":
    return pilot_figure(record)


@plot.register(ScreenRun)
def _(record: ScreenRun) -> "Figure":
    return set_ranking(record)

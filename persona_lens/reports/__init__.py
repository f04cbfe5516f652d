"""Run folder -> one self-contained HTML file: figures inline, every text escaped, nothing loaded from anywhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from persona_lens.extraction import ExtractionRun, load_run
from persona_lens.figures import (
    calibration_figure,
    defence_frontier,
    dose_response,
    geometry_figures,
    layer_profile,
    most_risen,
    pilot_figure,
    prediction_scatter,
    projections,
    score_histogram,
    screening_figures,
    shift_profile,
    shift_scatter,
    side_effects,
    sweep_heat_map,
    sweep_profile,
    training_curves,
    trajectories,
)
from persona_lens.figures.screened import Screened, screened
from persona_lens.figures.style import png
from persona_lens.finetuning.comparison import Comparison, load_comparison
from persona_lens.finetuning.pilot import Pilot, load_pilot
from persona_lens.finetuning.shift import ShiftRun, load_shift
from persona_lens.finetuning.training import Finetuned, load_finetuned
from persona_lens.geometry import GeometryRun, load_geometry
from persona_lens.monitoring import Calibration, MonitorRun, PredictionRun, load_calibration, load_monitor_run, load_prediction
from persona_lens.reports.extraction import extraction_page, verdict
from persona_lens.reports.finetuning import (
    comparison_page,
    comparison_verdict,
    finetune_page,
    finetune_verdict,
    pilot_page,
    pilot_verdict,
    shift_page,
    shift_verdict,
)
from persona_lens.reports.geometry import geometry_page, geometry_verdict
from persona_lens.reports.monitoring import (
    calibration_page,
    calibration_verdict,
    monitor_page,
    monitor_verdict,
    prediction_page,
    prediction_verdict,
    saved,
)
from persona_lens.reports.screening import screen_page, screen_verdict
from persona_lens.reports.sweeps import sweep_page, sweep_verdict
from persona_lens.screening.run import ScreenRun, load_screen
from persona_lens.store import read_manifest, write_atomically
from persona_lens.sweeps import Sweep, load_sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "calibration_verdict",
    "comparison_verdict",
    "finetune_verdict",
    "geometry_verdict",
    "monitor_verdict",
    "pilot_verdict",
    "prediction_verdict",
    "report",
    "screen_verdict",
    "shift_verdict",
    "sweep_verdict",
    "verdict",
]

Reported = (
    ExtractionRun | Sweep | GeometryRun | MonitorRun | PredictionRun | Calibration | Finetuned | ShiftRun | Comparison | Pilot
    | Screened
)  # fmt: skip


def report(run: Reported | ScreenRun | str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into the folder of an extraction, a sweep, a geometry study, monitored
    chats, a study of prediction, a calibration, a finetuning, shifts, a comparison of defences, a pilot or screened data sets.

    Returns:
        The path of the report.

    Raises:
        RunFolderError: the folder holds none of them, or is not finished.
        MonitoringError: a calibration that was not saved.
    """
    opened = _opened(Path(run)) if isinstance(run, str | Path) else run
    found = screened(opened) if isinstance(opened, ScreenRun) else opened
    folder = saved(found) if isinstance(found, Calibration) else found.path
    images = {name: png(figure) for name, figure in _figures(found).items()}
    for name, content in images.items():
        write_atomically(folder / "figures" / f"{name}.png", lambda path, content=content: Path(path).write_bytes(content))
    text = _page(found, images)
    target = folder / "report.html"
    write_atomically(target, lambda path: Path(path).write_text(text, encoding="utf-8"))
    return target


def _opened(path: Path) -> Reported | ScreenRun:
    match read_manifest(path).get("command"):
        case "sweep":
            return load_sweep(path)
        case "geometry":
            return load_geometry(path)
        case "monitor":
            return load_monitor_run(path)
        case "predict":
            return load_prediction(path)
        case "calibrate":
            return load_calibration(path)
        case "finetune":
            return load_finetuned(path)
        case "shift":
            return load_shift(path)
        case "defend":
            return load_comparison(path)
        case "pilot":
            return load_pilot(path)
        case "screen":
            return load_screen(path)
        case _:
            return load_run(path)


def _figures(run: Reported) -> Mapping[str, "Figure"]:
    match run:
        case Sweep():
            return {"heat_map": sweep_heat_map(run), "profile": sweep_profile(run), "dose_response": dose_response(run)}
        case GeometryRun():
            return geometry_figures(run.study)
        case MonitorRun():
            return {"trajectories": trajectories(run)}
        case PredictionRun():
            return {"prediction": prediction_scatter(run.prediction)}
        case Calibration():
            return {"calibration": calibration_figure(run)}
        case Finetuned():
            return {"training": training_curves(run)}
        case ShiftRun():
            return _shift_figures(run)
        case Comparison():
            return {"frontier": defence_frontier(run, most_risen(run)), "side_effects": side_effects(run)}
        case Pilot():
            return {"pilot": pilot_figure(run)}
        case Screened():
            return screening_figures(run)
        case ExtractionRun():
            return {"layers": layer_profile(run.vectors), "projections": projections(run), "scores": score_histogram(run)}


def _shift_figures(run: ShiftRun) -> Mapping[str, "Figure"]:
    first, *others = run.names
    if not others:
        return {"profile": shift_profile(run, first)}
    return {"scatter": shift_scatter(run), "scatter_base_answers": shift_scatter(run, "base_answers")}


def _page(run: Reported, images: Mapping[str, bytes]) -> str:
    match run:
        case Sweep():
            return sweep_page(run, images)
        case GeometryRun():
            return geometry_page(run, images)
        case MonitorRun():
            return monitor_page(run, images)
        case PredictionRun():
            return prediction_page(run, images)
        case Calibration():
            return calibration_page(run, images)
        case Finetuned():
            return finetune_page(run, images)
        case ShiftRun():
            return shift_page(run, images)
        case Comparison():
            return comparison_page(run, images)
        case Pilot():
            return pilot_page(run, images)
        case Screened():
            return screen_page(run, images)
        case ExtractionRun():
            return extraction_page(run, images)

"""Run folder -> one self-contained HTML file: figures inline, every text escaped, nothing loaded from anywhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from persona_lens.extraction import ExtractionRun, load_run
from persona_lens.figures import (
    dose_response,
    geometry_figures,
    layer_profile,
    projections,
    score_histogram,
    sweep_heat_map,
    sweep_profile,
)
from persona_lens.geometry import GeometryRun, load_geometry
from persona_lens.reports.extraction import extraction_page, verdict
from persona_lens.reports.geometry import geometry_page, geometry_verdict
from persona_lens.reports.page import png
from persona_lens.reports.sweeps import sweep_page, sweep_verdict
from persona_lens.store import read_json, write_atomically
from persona_lens.sweeps import Sweep, load_sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["geometry_verdict", "report", "sweep_verdict", "verdict"]

Reported = ExtractionRun | Sweep | GeometryRun


def report(run: Reported | str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into the folder of an extraction, a sweep or a geometry study.

    Returns:
        The path of the report.

    Raises:
        RunFolderError: the folder holds none of them, or is not finished.
    """
    found = _opened(Path(run)) if isinstance(run, str | Path) else run
    images = {name: png(figure) for name, figure in _figures(found).items()}
    for name, content in images.items():
        write_atomically(found.path / "figures" / f"{name}.png", lambda path, content=content: Path(path).write_bytes(content))
    text = _page(found, images)
    target = found.path / "report.html"
    write_atomically(target, lambda path: Path(path).write_text(text, encoding="utf-8"))
    return target


def _opened(path: Path) -> Reported:
    match read_json(path / "run.json").get("command"):
        case "sweep":
            return load_sweep(path)
        case "geometry":
            return load_geometry(path)
        case _:
            return load_run(path)


def _figures(run: Reported) -> Mapping[str, "Figure"]:
    match run:
        case Sweep():
            return {"heat_map": sweep_heat_map(run), "profile": sweep_profile(run), "dose_response": dose_response(run)}
        case GeometryRun():
            return geometry_figures(run.study)
        case ExtractionRun():
            return {"layers": layer_profile(run.vectors), "projections": projections(run), "scores": score_histogram(run)}


def _page(run: Reported, images: Mapping[str, bytes]) -> str:
    match run:
        case Sweep():
            return sweep_page(run, images)
        case GeometryRun():
            return geometry_page(run, images)
        case ExtractionRun():
            return extraction_page(run, images)

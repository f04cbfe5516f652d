"""`reproduce`: every experiment in the paper's order, each kept as soon as it is done, and one report of all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

from persona_lens.errors import PersonaLensError, UnknownNameError
from persona_lens.figures.style import png
from persona_lens.models import ChatModel, load_model
from persona_lens.progress import Progress, progress_bars
from persona_lens.records import decoded, encoded
from persona_lens.reproduction import finetuning, geometry, monitoring, screening, steering
from persona_lens.reproduction.bench import FULL, Bench, Scale, settings_of
from persona_lens.reproduction.finding import Finding, Found
from persona_lens.reproduction.page import page
from persona_lens.reproduction.paper import FIGURES, PaperFigure
from persona_lens.store import RunFolder, read_json, read_manifest, require_finished, write_atomically, write_json

COMMAND: Final = "reproduce"
RESULT: Final = "reproduction.json"
Experiment = Callable[[Bench], Found]
EXPERIMENTS: Final[Mapping[str, Experiment]] = {
    "extraction": steering.extraction,
    "steering": steering.steering,
    "monitoring": monitoring.monitoring,
    "data-sets": finetuning.data_sets,
    "shift": finetuning.shifts,
    "mitigation": finetuning.mitigation,
    "difference": screening.differences,
    "samples": screening.samples,
    "cosines": geometry.cosines,
    "pooling": steering.pooling,
    "layers": finetuning.all_layers,
    "rivals": finetuning.rivals,
    "facts": finetuning.facts,
}
ONLY_FULL: Final[Mapping[str, str]] = {"pooling": "pooling", "layers": "rivals", "rivals": "rivals", "facts": "facts"}


@dataclass(frozen=True)
class Reproduction:
    """A finished reproduction on disk."""

    path: Path

    @cached_property
    def findings(self) -> dict[str, Finding]:
        return {f["key"]: decoded(Finding, f) for f in read_json(self.path / RESULT)["findings"]}

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def load_reproduction(path: str | Path) -> Reproduction:
    """Reopen a reproduction.

    Raises:
        RunFolderError: the folder holds none, or it is not finished.
    """
    require_finished(Path(path), COMMAND, RESULT)
    return Reproduction(Path(path))


def planned(scale: Scale, only: Sequence[str] = ()) -> list[PaperFigure]:
    """The figures that a scale does, in the paper's order.

    Raises:
        UnknownNameError: a key that is no figure with a counterpart.
    """
    done = [f for f in FIGURES if f.absent is None and (f.key not in ONLY_FULL or getattr(scale, ONLY_FULL[f.key]))]
    for key in only:
        if key not in {f.key for f in done}:
            raise UnknownNameError(f"figure of the {scale.name} reproduction", key, [f.key for f in done])
    return [f for f in done if not only or f.key in only]


def reproduce(
    model: ChatModel | None = None,
    *,
    scale: Scale = FULL,
    only: Sequence[str] = (),
    out: str | Path | None = None,
    told: Callable[[str], object] = lambda line: None,  # noqa: ARG005
    progress: Progress | None = None,
) -> Reproduction:
    """Run the paper's experiments on a pocket model.

    Args:
        model: default: the pocket model.
        scale: `FULL`, or `QUICK` (a check that everything runs, whose figures mean little).
        only: keys of the figures that are wanted; others can be added to the same folder later.
        out: run folder; default `runs/reproduce-{scale}`. What is in it is taken up again.
        told: is told a line when an experiment begins or ends.

    Raises:
        PersonaLensError: a model from outside the pocket world, whose data sets and ground truth these experiments need.
    """
    model = model or load_model("pocket")
    if model.trait_set != "pocket":
        raise PersonaLensError(
            f"{model.name} is no pocket model: the data sets and the ground truth of these experiments are the pocket world's. Run "
            "extract, sweep, monitor predict, shift, defend and screen on it instead"
        )
    figures = planned(scale, only)
    place = Path(out) if out else Path("runs") / f"reproduce-{scale.name}"
    folder = RunFolder.open(place, command=COMMAND, arguments=settings_of(scale), model=model.identity)
    with progress_bars(None if progress is None else False) as bars:
        shown = progress or bars
        bench = Bench(model, place, scale, lambda _, done, total: shown("step", done, total))
        for number, figure in enumerate(figures):
            shown("experiments", number, len(figures))
            kept = _finding_file(place, figure.key)
            if not kept.exists():
                told(f"[{number + 1}/{len(figures)}] {figure.where}: {figure.title} ...")
                began = monotonic()
                write_json(kept, encoded(_done(bench, figure.key)))
                folder.log(f"{figure.key}: done after {monotonic() - began:.0f} s")
            told(f"[{number + 1}/{len(figures)}] {_line(figure, decoded(Finding, read_json(kept)))}")
        shown("experiments", len(figures), len(figures))
    return _finish(place)


def _finding_file(place: Path, key: str) -> Path:
    return place / "findings" / f"{key}.json"


def _done(bench: Bench, key: str) -> Finding:
    """Run one experiment and draw its figures."""
    found = EXPERIMENTS[key](bench)
    images: list[tuple[str, str]] = []
    for name, (figure, caption) in found.figures.items():
        file = f"{key}-{name}.png"
        content = png(figure)
        write_atomically(bench.path / "figures" / file, partial(_write, content))
        images.append((file, caption))
    return Finding(key, tuple(found.rows), found.reading, tuple(images))


def _write(content: bytes, path: str) -> None:
    Path(path).write_bytes(content)


def _line(figure: PaperFigure, finding: Finding) -> str:
    hold, of = finding.holding
    return f"{figure.where}: {figure.title}: {hold} of {of} claims hold"


def _finish(place: Path) -> Reproduction:
    """Gather what is there, and write the report."""
    findings: list[Any] = [read_json(f) for figure in FIGURES if (f := _finding_file(place, figure.key)).exists()]
    write_json(place / RESULT, {"findings": findings})
    write_report(place)
    return Reproduction(place)


def write_report(place: Path) -> Path:
    """The report of a reproduction, from what is in its folder."""
    found = load_reproduction(place)
    images = {f: (place / "figures" / f).read_bytes() for x in found.findings.values() for f, _ in x.images}
    text = page(found.findings, images, read_manifest(place))
    write_atomically(found.report, lambda path: Path(path).write_text(text, encoding="utf-8"))
    return found.report

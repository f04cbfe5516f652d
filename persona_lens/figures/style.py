"""What all figures share: size, colours that colour-blind readers tell apart, and no global state."""

from typing import Any, Final

POSITIVE: Final = "#D55E00"
NEGATIVE: Final = "#0072B2"
NEUTRAL: Final = "#666666"


def empty_figure(columns: int = 1, *, width: float = 4.6, height: float = 3.2, rows: int = 1) -> Any:
    """An empty figure without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes

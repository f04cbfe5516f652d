"""What all figures share: size, colours that colour-blind readers tell apart, and no global state."""

import io
from functools import partial
from typing import Any, Final

POSITIVE: Final = "#D55E00"
NEGATIVE: Final = "#0072B2"
NEUTRAL: Final = "#666666"
NOTEBOOK: Final = "_repr_png_"  # the method by which a notebook shows an object


def empty_figure(columns: int = 1, *, width: float = 4.6, height: float = 3.2, rows: int = 1) -> Any:
    """An empty figure without pyplot's global state; notebooks show it without `%matplotlib inline`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    setattr(figure, NOTEBOOK, partial(png, figure))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Any) -> bytes:
    """A figure as a PNG file, without the date of its making."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()

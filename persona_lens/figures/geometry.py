"""Figures of a geometry study: cosines, tree, components, axes, layers, spill-over.

Small matrices have their numbers written in, so that signs are read in grey prints too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float
from matplotlib.transforms import Bbox
from scipy.cluster.hierarchy import dendrogram

from persona_lens.figures.style import NEGATIVE, NEUTRAL, POSITIVE, empty_figure
from persona_lens.geometry import PCA, Clustering, OnAxis, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIVERGING: Final = "PuOr_r"
WRITTEN: Final = 14  # up to so many vectors the numbers stand in the cells
AROUND: Final = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]


def geometry_figures(study: Study) -> "dict[str, Figure]":
    """Every figure that a study has the record for."""
    found = {"cosines": cosine_map(study), "components": component_map(study.pca), "scree": scree(study.pca)}
    found["layers"] = layer_maps(study)
    if study.clustering:
        found["tree"] = tree(study.clustering)
    if study.roles:
        found["role_components"] = component_map(study.roles.pca)
        found["role_scree"] = scree(study.roles.pca)
        found["assistant_axis"] = axis_strips(study.roles.roles_on_assistant, study.roles.traits_on_assistant)
        found["roles_on_traits"] = role_map(study.roles.on_traits)
    if study.coexpression:
        found["spill_over"] = spill_maps(study)
    return found


def _order(study: Study) -> list[int]:
    return list(study.clustering.order) if study.clustering else list(range(len(study.names)))


def _map(
    ax: Any,
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    limit: float,
    title: str,
    digits: int = 2,
) -> Any:
    """A signed heat map; with few cells their numbers are written in."""
    image = ax.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.spines[["top", "right"]].set_visible(True)
    ax.set_title(title, fontsize=10)
    if len(columns) <= WRITTEN:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = "white" if abs(value) > 0.65 * limit else "black"
                text = f"{value:.{digits}f}".replace("0.", ".", 1) if digits else f"{round(float(value)):+d}"
                ax.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    return image


def cosine_map(study: Study) -> "Figure":
    """Disattenuated cosines as they are and centred, vectors in the order of the tree."""
    order = _order(study)
    names = [study.names[i] for i in order]
    size = max(3.6, 0.42 * len(names) + 1.2)
    figure, axes = empty_figure(2, width=size + 0.6, height=size)
    images = [
        _map(ax, table.value[np.ix_(order, order)], names, names, 1.0, f"cosine, {table.kind}")
        for ax, table in zip(axes, study.cosines[:2], strict=True)
    ]
    figure.colorbar(images[0], ax=axes, shrink=0.7)
    return figure


def tree(clustering: Clustering) -> "Figure":
    """Average-linkage tree; numbers are the share of resampled questions in which a branch comes back."""
    n = len(clustering.names)
    figure, (ax,) = empty_figure(1, width=6.4, height=1.2 + 0.28 * n)
    drawn = dendrogram(
        clustering.linkage,
        labels=list(clustering.names),
        orientation="left",
        ax=ax,
        color_threshold=0,
        above_threshold_color="#444444",
    )
    joins = {round(float(h), 9): s for h, s in zip(clustering.linkage[:, 2], clustering.support, strict=True)}
    for heights, ends in zip(np.array(drawn["dcoord"]), np.array(drawn["icoord"]), strict=True):
        height = float(heights[1])
        ax.text(
            height, (ends[1] + ends[2]) / 2, f" {joins[round(height, 9)]:.0%}", fontsize=7, ha="left", va="center", color=NEGATIVE
        )
    ax.set(xlabel="1 - cosine", xlim=(float(clustering.linkage[:, 2].max()) * 1.12, 0))
    ax.spines["left"].set_visible(False)
    return figure


def scree(found: PCA) -> "Figure":
    """Share of the variance beyond noise by component, with intervals; filled where the component is larger than chance."""
    n = min(len(found.share), 12)
    at = np.arange(1, n + 1)
    figure, (ax,) = empty_figure(1, width=6.4)
    error = np.abs(np.stack([found.share[:n] - found.share_low[:n], found.share_high[:n] - found.share[:n]]))
    label = "no larger than chance" if found.chance else "not tested"
    ax.errorbar(at, 100 * found.share[:n], 100 * error, fmt="o-", mfc="white", color=POSITIVE, capsize=3, label=label)
    if found.chance and (larger := min(found.chance.significant, n)):
        ax.plot(at[:larger], 100 * found.share[:larger], "o", color=POSITIVE, zorder=5, label="larger than chance")
    ax.set(xlabel="component", ylabel="share of variance beyond noise (%)", ylim=(0, None))
    ax.set_xticks(at)
    ax.legend(frameon=False, fontsize=8)
    return figure


def component_map(found: PCA) -> "Figure":
    """Vectors on the first two components."""
    figure, (ax,) = empty_figure(1, width=6.4, height=5.0)
    y = found.scores[:, 1] if found.scores.shape[1] > 1 else np.zeros(len(found.names))
    ax.axhline(0, color=NEUTRAL, lw=0.5)
    ax.axvline(0, color=NEUTRAL, lw=0.5)
    ax.scatter(found.scores[:, 0], y, color=POSITIVE, s=22, zorder=3)
    second = f" ({found.share[1]:.0%})" if len(found.share) > 1 else ""
    ax.set(
        xlabel=f"first component, residual units ({found.share[0]:.0%} of the variance)",
        ylabel=f"second component, residual units{second}",
    )
    ax.margins(0.15)
    _label(figure, ax, np.column_stack([found.scores[:, 0], y]), found.names)
    return figure


def _label(figure: Any, ax: Any, points: Float[np.ndarray, "point 2"], names: Sequence[str]) -> None:
    """Names beside their points, each where it covers least of the points and names placed before."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what was measured stays where it is
    renderer, frame = figure.canvas.get_renderer(), ax.get_window_extent()
    at = ax.transData.transform(points)
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in at]
    for name, point in zip(names, points, strict=True):
        text = ax.annotate(name, point, xytext=(0, 0), textcoords="offset points", fontsize=8, annotation_clip=False)
        box = text.get_window_extent(renderer)
        best: tuple[float, Any, Bbox] | None = None
        for far in (7.0, 14.0, 22.0):
            for right, up in AROUND:
                x, y = ax.transData.transform(point)
                moved = Bbox.from_bounds(
                    x + right * far + (right - 1) / 2 * box.width, y + up * far + (up - 1) / 2 * box.height, box.width, box.height
                )
                outside = not (frame.x0 <= moved.x0 and moved.x1 <= frame.x1 and frame.y0 <= moved.y0 and moved.y1 <= frame.y1)
                cost = sum(_overlap(moved, other) for other in taken) + 1e4 * outside + far
                if best is None or cost < best[0]:
                    best = (cost, (moved.x0 - x, moved.y0 - y), moved)
        assert best is not None
        points_per_pixel = 72.0 / figure.dpi
        text.set_position((best[1][0] * points_per_pixel, best[1][1] * points_per_pixel))
        taken.append(best[2])


def _overlap(a: Bbox, b: Bbox) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)


def layer_maps(study: Study) -> "Figure":
    """Every vector's cosine with itself at other layers."""
    columns = min(4, len(study.names))
    rows = -(-len(study.names) // columns)
    figure, axes = empty_figure(columns, width=2.1, height=2.3 * rows + 0.4, rows=rows)
    for ax in axes[len(study.names) :]:
        ax.set_visible(False)
    for ax, name, values in zip(axes, study.names, study.across_layers, strict=False):
        ax.imshow(values, cmap="Greys", vmin=0, vmax=1, origin="lower")
        ax.set_title(name, fontsize=9)
        ax.set(xlabel="layer", ylabel="layer")
    figure.colorbar(axes[0].images[0], ax=axes, shrink=0.7, label="cosine")
    return figure


def axis_strips(roles: OnAxis, traits: OnAxis) -> "Figure":
    """Roles on an axis by their projections, traits by their cosines, with 95 % intervals."""
    figure, axes = empty_figure(2, width=4.6, height=1.2 + 0.2 * max(len(roles.names), len(traits.names)))
    axis = roles.axis.replace("_", " ")
    strips = (
        (roles, roles.projection, roles.projection_low, roles.projection_high, f"projection on {axis} (residual units)"),
        (traits, traits.cosine, traits.cosine_low, traits.cosine_high, f"cosine with {axis}"),
    )
    for ax, (found, value, low, high, label), color, title in zip(
        axes, strips, (POSITIVE, NEGATIVE), ("roles (default assistant: 0)", "traits"), strict=True
    ):
        order = np.argsort(value)
        error = np.abs(np.stack([value - low, high - value]))[:, order]
        ax.errorbar(value[order], np.arange(len(order)), xerr=error, fmt="o", ms=4, color=color, capsize=2)
        ax.set_yticks(range(len(order)), [found.names[i] for i in order], fontsize=8)
        ax.axvline(0, color=NEUTRAL, lw=0.8)
        ax.set(xlabel=label, title=title)
    return figure


def role_map(on_traits: Sequence[OnAxis]) -> "Figure":
    """Projections of roles on trait vectors, residual units."""
    values = np.stack([t.projection for t in on_traits], 1)
    order = np.argsort(values[:, 0])
    names = on_traits[0].names
    figure, (ax,) = empty_figure(1, width=6.4, height=1.6 + 0.22 * len(names))
    limit = float(np.nanmax(np.abs(values)))
    image = _map(ax, values[order], [names[i] for i in order], [t.axis for t in on_traits], limit, "roles on trait vectors", 0)
    figure.colorbar(image, ax=ax, shrink=0.6, label="projection (residual units)")
    return figure


def spill_maps(study: Study) -> "Figure":
    """Cosines beside what steering and prompting one trait (row) does to the scores of all (column)."""
    co = study.coexpression
    assert co is not None
    order = _order(study)
    names = [study.names[i] for i in order]
    size = max(3.4, 0.42 * len(names) + 1.0)
    figure, axes = empty_figure(3, width=size + 0.3, height=size)
    at = np.ix_(order, order)
    tables = (
        (co.cosines, "cosine", 2),
        (co.steered.mean, "steered (points per unit)", 0),
        (co.prompted.mean, "prompted (points)", 0),
    )
    for ax, (values, title, digits) in zip(axes, tables, strict=True):
        _map(ax, values[at], names, names, float(np.nanmax(np.abs(values), initial=1e-9)), title, digits)
    axes[0].set_ylabel("acted upon")
    axes[1].set_xlabel("judged")
    return figure

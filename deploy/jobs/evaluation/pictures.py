"""The report's pictures. matplotlib is loaded only when one is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import InvalidConfiguration
from deploy.jobs.evaluation.fronts import Point
from deploy.jobs.evaluation.tables import Alignment, FrontData

DPI = 150
LABEL_PLACES = [
    (side * 6, shift, "left" if side > 0 else "right") for shift in (5, -11, 17, -23, 29, -35) for side in (1, -1)
]
"""Of a label from its point, in points of type, and its alignment; the first that is free is taken."""


@dataclass(frozen=True, slots=True)
class Label:
    """A name to be written beside a point."""

    text: str
    place: tuple[float, float]
    color: str


def require_matplotlib() -> Any:
    """Return matplotlib's Figure, which draws without a display.

    Raises:
        InvalidConfiguration: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InvalidConfiguration(
            "the report's pictures need the package matplotlib: pip install matplotlib (or trimtab[train])"
        ) from error

    def figure(**settings: Any) -> Any:
        made = Figure(**settings)
        FigureCanvasAgg(made)
        return made

    return figure


def draw_alignment(table: Alignment, path: Path) -> None:
    """Draw every way of writing: its reward against its KL to the base, coloured by how little an answer repeats."""
    figure = require_matplotlib()(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    places = [(line.divergence_per_token, line.rewards[table.reward]) for line in table.lines]
    axes.errorbar(
        [x for x, _ in places],
        [mean.value for _, mean in places],
        yerr=[mean.interval for _, mean in places],
        fmt="none",
        ecolor="0.6",
        capsize=3,
    )
    points = axes.scatter(
        [x for x, _ in places],
        [mean.value for _, mean in places],
        c=[1.0 if line.distinct_2_in_answer is None else line.distinct_2_in_answer for line in table.lines],
        cmap="RdYlGn",
        vmin=0.5,
        vmax=1,
        edgecolors="0.3",
        zorder=3,
    )
    figure.colorbar(points, ax=axes, label="distinct-2 in an answer")
    axes.set_xlabel("KL to the base a token (nats)")
    axes.set_ylabel(f"mean {table.reward} (reward, 95 % interval)")
    axes.set_title("Reward against KL; red repeats itself")
    _finish(
        axes, [Label(line.row, (x, mean.value), "0.1") for line, (x, mean) in zip(table.lines, places, strict=True)]
    )
    figure.savefig(path, dpi=DPI)


def draw_fronts(fronts: Mapping[str, FrontData], path: Path) -> None:
    """Draw one panel for each front, with a line for each curve."""
    figure = require_matplotlib()(figsize=(7.2 * len(fronts), 5.2), layout="constrained")
    panels = figure.subplots(1, len(fronts), squeeze=False)[0]
    for axes, (name, front) in zip(panels, fronts.items(), strict=True):
        labels = []
        for number, (curve, points) in enumerate(front.curves.items()):
            color = f"C{number % 10}"
            if points:
                _draw_curve(axes, curve, points, color)
            labels += [Label(point.row, (point.x.value, point.y.value), color) for point in points]
        axes.set_xlabel(f"mean {front.x} (reward, 95 % interval)")
        axes.set_ylabel(f"mean {front.y} (reward, 95 % interval)")
        axes.set_title(name)
        axes.legend()
        _finish(axes, labels)
    figure.savefig(path, dpi=DPI)


def _draw_curve(axes: Any, name: str, points: Sequence[Point], color: str) -> None:
    x, y = [point.x for point in points], [point.y for point in points]
    axes.errorbar(
        [mean.value for mean in x],
        [mean.value for mean in y],
        xerr=[mean.interval for mean in x],
        yerr=[mean.interval for mean in y],
        fmt="o-",
        color=color,
        ecolor=color,
        elinewidth=0.8,
        capsize=2,
        label=name,
    )


def _finish(axes: Any, labels: Sequence[Label]) -> None:
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.draw_without_rendering()  # places the axes, so that a label's extent is known
    taken: list[Any] = []
    for label in labels:
        # A dollar sign would begin a formula.
        text = label.text.replace("$", r"\$")
        written = axes.annotate(
            text, label.place, xytext=(0, 0), textcoords="offset points", fontsize=8, color=label.color
        )
        written.set_in_layout(False)
        for x, y, alignment in LABEL_PLACES:
            written.xyann = (x, y)
            written.set_horizontalalignment(alignment)
            extent = written.get_window_extent()
            if not extent.count_overlaps(taken):
                break
        taken.append(extent)

"""Charts of the report as SVG text, drawn by matplotlib (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib

matplotlib.use("svg")  # no display needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
# Told apart by colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a5a44", "#444444", "#999933")
REST = "start-up, data, checkpoints"  # of the time: what is no pass over data
MAX_POINTS = 500  # of a line: more cannot be seen and would make the page heavy

Series = Mapping[str, Sequence[tuple[float, float]]]  # label -> (x, y) in order of x

STYLE = {
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "path",  # looks the same whatever fonts the reader has
}


def training_curve(points: Sequence[tuple[float, float]], held_out: Series, *, name: str) -> str:
    """The loss of every step, faint, its running mean, and held-out losses as marks."""

    def draw(axes: Axes) -> None:
        thin = thinned(points)
        axes.plot(*zip(*thin, strict=True), color=COLOURS[0], alpha=0.25, linewidth=0.9)
        axes.plot(*zip(*thinned(smoothed(points)), strict=True), color=COLOURS[0], label="training, running mean")
        for (label, marks), colour in zip(held_out.items(), COLOURS[1:], strict=False):
            axes.plot(*zip(*marks, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1, label=label)
        axes.set_xlabel("step")
        legend_above(axes)

    return figure(draw, name=name)


def lines(series: Series, *, name: str, dashed: Sequence[str] = ()) -> str:
    """Lines with a mark at each point; the labels in `dashed` are baselines, without marks."""

    def draw(axes: Axes) -> None:
        for (label, points), colour in zip(series.items(), COLOURS, strict=False):
            points = thinned(points)
            if label in dashed:
                axes.plot(*zip(*points, strict=True), color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label=label)
            else:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=label)
        axes.set_xlabel("step")
        if len(series) > 1:
            legend_above(axes)

    return figure(draw, name=name)


def rates(series: Series, *, name: str, percent: bool = False) -> str:
    """A rate of every step, faint, and its running mean; the axis starts at 0, so that ratios can be seen."""

    def draw(axes: Axes) -> None:
        for (label, points), colour in zip(series.items(), COLOURS, strict=False):
            axes.plot(*zip(*thinned(points), strict=True), color=colour, alpha=0.25, linewidth=0.9)
            axes.plot(*zip(*thinned(smoothed(points)), strict=True), color=colour, label=label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0) if percent else StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("step")
        if len(series) > 1:
            legend_above(axes)

    return figure(draw, name=name)


def stacked_seconds(rows: Mapping[str, Mapping[str, float]], *, name: str) -> str:
    """One horizontal bar for each row: its minutes, by kind of work."""
    kinds = [*dict.fromkeys(kind for parts in rows.values() for kind in parts if kind != REST), REST]

    def draw(axes: Axes) -> None:
        left = dict.fromkeys(rows, 0.0)
        for kind, colour in zip(kinds, COLOURS, strict=False):
            colour = "#c3cbd3" if kind == REST else colour
            widths = [rows[row].get(kind, 0.0) / 60 for row in rows]
            axes.barh(list(rows), widths, left=list(left.values()), color=colour, label=kind, height=0.62)
            left = {row: left[row] + width for row, width in zip(rows, widths, strict=True)}
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlabel("minutes")
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=len(kinds))

    return figure(draw, name=name, size=(9.4, 0.75 + 0.32 * len(rows)))


def figure(draw: Callable[[Axes], None], *, name: str, size: tuple[float, float] = (4.6, 2.5)) -> str:
    """An <svg> element. `name` makes the ids inside unique in the page and the same on every run."""
    with pyplot.rc_context({**STYLE, "svg.hashsalt": name}):
        canvas, axes = pyplot.subplots(figsize=size, layout="constrained")
        try:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
            draw(axes)
            buffer = io.StringIO()
            canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        finally:
            pyplot.close(canvas)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def legend_above(axes: Axes) -> None:
    """Beside the title, where it hides no line; two columns keep it short."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, borderaxespad=0, columnspacing=1.2)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS of the points, evenly, the last always."""
    stride = -(-len(points) // MAX_POINTS)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of a window of a twentieth of the line, at least 5 points, around each point; shorter at the ends."""
    half = max(5, len(points) // 20) // 2
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)  # the same on both sides, so that a slope stays unbiased
        means.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return means

"""A scene as PNG, drawn by matplotlib shape by shape as it is laid out."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from ringattn.pictures.drawing import STRIP, Box, Image, Plot, Shape, Words, lay_out
from ringattn.pictures.scene import Scene

DPI, POINTS = 160, 72 / 100  # a pixel of the sheet is a hundredth of an inch


def png(scene: Scene) -> bytes:
    """The picture as the bytes of a file.

    Raises ``ValueError`` where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "a PNG needs the package matplotlib: pip install 'ringattn[show]', or write .svg or .html, which need "
            "nothing"
        ) from None
    sheet = lay_out(scene)
    figure = Figure(figsize=(sheet.width / 100, sheet.height / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, sheet.width)
    axes.set_ylim(sheet.height, 0)
    axes.axis("off")
    for shape in sheet.shapes:
        _draw(axes, shape, 0, 0)
    for plot in sheet.plots:
        _draw(axes, plot.name, 0, 0)
        for shape in plot.inside:
            _draw(axes, shape, plot.x, plot.y)
        if plot.strips is not None:
            _draw(axes, plot.strips[0], plot.x - STRIP, plot.y)
            _draw(axes, plot.strips[1], plot.x, plot.y - STRIP)
        _frame(axes, plot)
        for shape in plot.ticks:
            _draw(axes, shape, 0, 0)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()


def _draw(axes: Any, shape: Shape, x: float, y: float) -> None:
    from matplotlib.patches import Rectangle

    if isinstance(shape, Box):
        corner, edge = (x + shape.x, y + shape.y), shape.edge if shape.edge != "none" else "none"
        axes.add_patch(
            Rectangle(corner, shape.width, shape.height, facecolor=shape.fill, edgecolor=edge, linewidth=0.7)
        )
    elif isinstance(shape, Words):
        kind = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
        axes.text(
            x + shape.x, y + shape.y, shape.text, fontsize=shape.size * POINTS, color=shape.colour, ha=kind,
            va="center" if shape.turned else "baseline", rotation=90 if shape.turned else 0,
            fontweight="bold" if shape.bold else "normal", parse_math=False,
        )  # fmt: skip
    elif isinstance(shape, Image):
        extent = (x + shape.x, x + shape.x + shape.width, y + shape.y + shape.height, y + shape.y)
        axes.imshow(shape.pixels, extent=extent, aspect="auto", interpolation="antialiased", zorder=1)
    else:
        start, end = (x + shape.x0, y + shape.y0), (x + shape.x1, y + shape.y1)
        kind = "-|>,head_width=0.2,head_length=0.4" if shape.arrow else "-"
        line = dict(color=shape.colour, lw=shape.width * POINTS, shrinkA=0, shrinkB=0)
        line |= dict(linestyle=(0, (4, 3))) if shape.dashed else {}
        axes.annotate("", end, start, arrowprops=dict(arrowstyle=kind, **line), annotation_clip=False)


def _frame(axes: Any, plot: Plot) -> None:
    from matplotlib.patches import Rectangle

    (colour, thick), width, height = plot.frame, plot.panel.width, plot.panel.height
    frame = Rectangle(
        (plot.x, plot.y), width, height, facecolor="none", edgecolor=colour, linewidth=thick * POINTS, zorder=3
    )
    axes.add_patch(frame)

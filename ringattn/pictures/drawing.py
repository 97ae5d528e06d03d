"""A scene laid out on a sheet: boxes, lines, words and images in pixels, which the writers of SVG and PNG only copy."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

from ringattn.pictures import numbers
from ringattn.pictures.colours import GRID, INK, PAPER, QUIET, Colours, readable_on
from ringattn.pictures.owners import Owners
from ringattn.pictures.scene import Arrow, Axis, Border, Cells, Entry, Field, Mark, Panel, Rect, Scene

MARGIN, STRIP, TITLE, BELOW, BESIDE = 20, 14, 34, 46, 74
HEADING, SMALL, TEXT = 17, 10.5, 12
WIDTH_OF_LETTER, WIDTH_OF_TITLE = 0.58, 0.66  # of their height, on average
ASIDE = 30  # of a legend: as far as the last tick reaches
LINES = 3  # of a heading; a longer one is written small, and whole


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    fill: str
    edge: str = "none"
    note: str = ""


@dataclass(frozen=True)
class Words:
    """``anchor``: start, middle or end at ``x``; ``y`` is their base line. ``turned`` upwards."""

    x: float
    y: float
    text: str
    size: float = TEXT
    colour: str = INK
    anchor: str = "start"
    bold: bool = False
    turned: bool = False


@dataclass(frozen=True, eq=False)
class Image:
    x: float
    y: float
    width: float
    height: float
    pixels: Colours


@dataclass(frozen=True)
class Line:
    x0: float
    y0: float
    x1: float
    y1: float
    colour: str
    width: float = 1.0
    arrow: bool = False
    dashed: bool = False
    note: str = ""


Shape = Box | Words | Image | Line


@dataclass(frozen=True)
class Plot:
    """The inside of a panel's axes at a place of the sheet: ``inside`` counts from its upper left corner. ``strips``:
    owners of rows and of columns, beside it and above it, which count from theirs. ``name`` and ``ticks`` count on the
    sheet; ``room``: how wide the name may be."""

    panel: Panel
    x: float
    y: float
    name: Words
    room: float
    inside: list[Shape] = field(default_factory=list)
    ticks: list[Shape] = field(default_factory=list)
    strips: tuple[Image, Image] | None = None

    @property
    def frame(self) -> tuple[str, float]:
        """Colour and width of the line around it: a heavy one of what is taken."""
        return (INK, 3.0) if self.panel.taken else (QUIET, 1.0)


@dataclass
class Sheet:
    """All that is drawn."""

    width: float = 0
    height: float = 0
    shapes: list[Shape] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


def lay_out(scene: Scene) -> Sheet:
    """The scene on a sheet that is as large as it needs."""
    sheet = Sheet()
    wide = max(sum(_outer(panel)[0] for panel in row) for row in scene.rows) if scene.rows else 0
    sheet.width = max(2 * MARGIN + wide, 560)
    letters = int((sheet.width - 2 * MARGIN) / (TEXT * WIDTH_OF_LETTER * 0.9))
    y: float = MARGIN + HEADING
    heading = textwrap.wrap(scene.title, int((sheet.width - 2 * MARGIN) / (HEADING * WIDTH_OF_TITLE))) or [""]
    size = HEADING if len(heading) <= LINES else SMALL
    for text in heading if size == HEADING else textwrap.wrap(scene.title, int(letters * TEXT / SMALL)):
        sheet.shapes.append(Words(MARGIN, y, text, size, bold=size == HEADING))
        y += size + 5
    for note in scene.notes:
        for text in textwrap.wrap(note, letters):
            sheet.shapes.append(Words(MARGIN, y, text, TEXT, QUIET))
            y += 16
    for row in scene.rows:
        x: float = MARGIN
        for panel in row:
            _place(sheet, panel, x, y)
            x += _outer(panel)[0]
        y += max(_outer(panel)[1] for panel in row)
    sheet.height = y + MARGIN
    sheet.shapes.insert(0, Box(0, 0, sheet.width, sheet.height, PAPER))
    return sheet


def _outer(panel: Panel) -> tuple[float, float]:
    """Width and height of a panel with all around it."""
    strip = STRIP if _owners(panel) else 0
    legend = _legend_width(panel)
    height = max(panel.height, 16 * len(panel.legend) + 14 * len(_legend_title(panel)))
    title = len(_title(panel)) * 13 * WIDTH_OF_TITLE - strip
    return BESIDE + strip + max(panel.width + legend, title) + 22, TITLE + strip + height + BELOW


def _title(panel: Panel) -> str:
    """With what a cell stands for, where that depends on who draws it, and there is room."""
    grid = panel.grid
    scale = grid.drawn.scale if isinstance(grid, Field) and panel.width > 256 else panel.together
    return f"{panel.title}; {scale}" if scale else panel.title


def _legend_width(panel: Panel) -> float:
    if not panel.legend:
        return 0
    letters = max(
        *(len(one.name) + 2 * (one.kind != "box") for one in panel.legend), *map(len, _legend_title(panel)), 0
    )
    return ASIDE + 18 + letters * SMALL * WIDTH_OF_LETTER


def _legend_title(panel: Panel) -> list[str]:
    """In lines."""
    return textwrap.wrap(panel.legend_title, 22)


def _owners(panel: Panel) -> tuple[Owners, Owners] | None:
    grid = panel.grid
    cells = grid.drawn if isinstance(grid, Field) else grid
    if cells is None or cells.row_owners is None or cells.col_owners is None:
        return None
    return cells.row_owners, cells.col_owners


def _place(sheet: Sheet, panel: Panel, x: float, y: float) -> None:
    strip = STRIP if _owners(panel) else 0
    left, top = x + BESIDE + strip, y + TITLE + strip
    name = Words(left - strip, y + 20, _title(panel), 13, bold=True)
    plot = Plot(panel, left, top, name, _outer(panel)[0] - BESIDE, strips=_strips(panel))
    sheet.plots.append(plot)
    plot.ticks.extend(_ticks(panel, left, top, strip))
    for mark in panel.marks:
        plot.inside.extend(_drawn(mark, panel))
    middle = left + panel.width / 2
    sheet.shapes.append(Words(middle, top + panel.height + 36, panel.x.label, TEXT, QUIET, "middle"))
    ticks = max((len(tick.text) for tick in plot.ticks if isinstance(tick, Words) and tick.anchor == "end"), default=0)
    beside = max(left - strip - 20 - ticks * SMALL * WIDTH_OF_LETTER, x + 13)
    sheet.shapes.append(Words(beside, top + panel.height / 2, panel.y.label, TEXT, QUIET, "middle", turned=True))
    sheet.shapes.extend(_legend(panel, left + panel.width + ASIDE, top))


def _strips(panel: Panel) -> tuple[Image, Image] | None:
    found = _owners(panel)
    if found is None:
        return None
    rows, cols = found
    return (
        Image(0, 0, STRIP - 4, panel.height, rows.colours[:, None]),
        Image(0, 0, panel.width, STRIP - 4, cols.colours[None]),
    )


def _legend(panel: Panel, x: float, y: float) -> Iterator[Shape]:
    for line in _legend_title(panel):
        yield Words(x, y + 9, line, SMALL, QUIET)
        y += 14
    y += 4 * bool(panel.legend_title)
    for entry in panel.legend:
        yield from _entry(entry, x, y)
        y += 16


def _entry(entry: Entry, x: float, y: float) -> Iterator[Shape]:
    if entry.kind == "box":
        yield Box(x, y, 11, 11, entry.colour, GRID)
        yield Words(x + 17, y + 9.5, entry.name, SMALL)
    else:
        yield Line(x, y + 5.5, x + 24, y + 5.5, entry.colour, 2, True, dashed=entry.kind == "dashed")
        yield Words(x + 30, y + 9.5, entry.name, SMALL)


def place(axis: Axis, value: float, size: float) -> float:
    """Where a value lies on an axis of so many pixels, from the left or the top."""
    part = (value - axis.start) / ((axis.stop - axis.start) or 1)
    return size * part


def _ticks(panel: Panel, left: float, top: float, strip: float) -> Iterator[Shape]:
    for axis, size, across in ((panel.x, panel.width, True), (panel.y, panel.height, False)):
        for at in numbers.ticks(axis.start, axis.stop, axis.unit, _most(axis, size)):
            word = numbers.written(at, axis.unit)
            middle = 0.5 if axis.unit in ("rank", "turn") else 0.0
            where = place(axis, at + middle, size)
            if across:
                where += left
                yield Line(where, top + panel.height, where, top + panel.height + 4, QUIET)
                yield Words(where, top + panel.height + 16, word, SMALL, QUIET, "middle")
            else:
                where = top + (where if axis.down else size - where)
                yield Line(left - strip - 4, where, left - strip, where, QUIET)
                yield Words(left - strip - 7, where + 3.5, word, SMALL, QUIET, "end")


def _most(axis: Axis, size: float) -> int:
    """Ticks that an axis of so many pixels has room for: each rank or turn, where these are few."""
    if axis.unit in ("rank", "turn"):
        return max(min(int(size / (18 if axis.stop - axis.start <= 16 else 36)), 16), 2)
    return 6 if size > 250 else 4


def _drawn(mark: Mark, panel: Panel) -> Iterator[Shape]:
    def x(value: float) -> float:
        return place(panel.x, value, panel.width)

    def y(value: float) -> float:
        down = place(panel.y, value, panel.height)
        return down if panel.y.down else panel.height - down

    if isinstance(mark, (Cells, Field)):
        cells = mark.drawn if isinstance(mark, Field) else mark
        left, right, top, low = x(cells.cols[0]), x(cells.cols[-1]), y(cells.rows[0]), y(cells.rows[-1])
        yield Image(left, top, right - left, low - top, cells.colours)
    elif isinstance(mark, Rect):
        left, right = sorted((x(mark.x0), x(mark.x1)))
        top, low = sorted((y(mark.y0), y(mark.y1)))
        yield Box(left, top, right - left, low - top, mark.fill, note=mark.note)
        if mark.label and len(mark.label) * SMALL * WIDTH_OF_LETTER < right - left - 2 and low - top > SMALL:
            colour = readable_on(mark.fill)
            yield Words((left + right) / 2, (top + low) / 2 + 3.5, mark.label, SMALL, colour, "middle")
    elif isinstance(mark, Arrow):
        from_, to = (x(mark.x0), y(mark.y0)), (x(mark.x1), y(mark.y1))
        yield Line(*from_, *to, mark.colour, mark.width, True, mark.dashed, mark.note)
    elif isinstance(mark, Border):
        if mark.across:
            yield Line(0, y(mark.at), panel.width, y(mark.at), QUIET)
        else:
            yield Line(x(mark.at), 0, x(mark.at), panel.height, QUIET)
    else:
        yield Line(0, y(mark.y), panel.width, y(mark.y), INK, 1, dashed=True, note=mark.name)
        yield Words(panel.width - 4, 13, f"- - {mark.name}", SMALL, INK, "end")  # above all bars

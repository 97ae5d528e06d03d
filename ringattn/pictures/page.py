"""A scene as one page of HTML that needs no network: the SVG, what is said of each place, and a script that zooms, pans
and says it."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from ringattn.geometry.bands import HI, K0, KN, KS, KSET, LO, Q0, QN, QS, QSET
from ringattn.geometry.layouts import Layout
from ringattn.geometry.spans import INF
from ringattn.pictures import colours
from ringattn.pictures.drawing import Plot, lay_out
from ringattn.pictures.scene import Axis, Cells, Field, Scene
from ringattn.pictures.svg import of_sheet

BANDS, MEMBERS = 20_000, 200_000  # of a mask that the page counts anew where it is magnified
STEPPED = 512  # bands with a step among them: each lies all over the grid
HELP = "wheel: zoom, drag: move, double click: all of it; rest the pointer on a place to read it"


def page(scene: Scene) -> str:
    """The whole text of the file. ``#at=PANEL,X,Y`` behind its address shows what is said there, of a panel counted
    from 0 at a place in the units of its axes; ``#view=PANEL,X0,X1,Y0,Y1`` magnifies."""
    sheet = lay_out(scene)
    data = json.dumps([_panel(plot) for plot in sheet.plots], separators=(",", ":"))
    code = files("ringattn.pictures").joinpath("page.js").read_text()
    style = files("ringattn.pictures").joinpath("page.css").read_text()
    safe = data.replace("</", "<\\/")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(scene.title)}</title>\n'
        f"<style>{style}</style></head><body>\n{of_sheet(sheet, scene.title)}\n<p>{HELP}</p>\n"
        f'<div id="said" hidden></div>\n<script type="application/json" id="panels">{safe}</script>\n'
        f"<script>{code}</script>\n</body></html>\n"
    )


def _panel(plot: Plot) -> dict[str, Any]:
    panel, grid = plot.panel, plot.panel.grid
    told: dict[str, Any] = {
        "box": [plot.x, plot.y, panel.width, panel.height], "x": _axis(panel.x), "y": _axis(panel.y),
        "title": panel.title, "room": plot.room,
    }  # fmt: skip
    if grid is not None:
        told["cells"] = _cells(grid.drawn if isinstance(grid, Field) else grid)
        told["cells"]["tokens"] = isinstance(grid, Field)  # the share follows from how many a cell is
    if isinstance(grid, Field) and _countable(grid):
        told["field"] = _field(grid)
    return told


def _axis(axis: Axis) -> dict[str, Any]:
    return {"label": axis.label, "start": axis.start, "stop": axis.stop, "unit": axis.unit, "down": axis.down}


def _cells(cells: Cells) -> dict[str, Any]:
    """Layers as runs of equal numbers, row by row: [value, count, value, count, ...]."""
    return {
        "rows": cells.rows.tolist(),
        "cols": cells.cols.tolist(),
        "rowWords": cells.row_words,
        "colWords": cells.col_words,
        "layers": [
            {"name": layer.name, "unit": layer.unit, "runs": _runs(layer.values)}
            for layer in cells.layers
            if layer.unit != "%"
        ],
    }


def _runs(values: np.ndarray) -> list[float]:
    flat = values.reshape(-1)
    if not len(flat):
        return []
    first = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    length = np.diff(np.append(first, len(flat)))
    whole = np.issubdtype(flat.dtype, np.integer)
    numbers = flat[first].tolist() if whole else [float(f"{value:.4g}") for value in flat[first].tolist()]
    return [part for pair in zip(numbers, length.tolist(), strict=True) for part in pair]


def _countable(field: Field) -> bool:
    members = sum(len(chosen.bounds) for chosen in field.bands.sets)
    stepped = int((field.bands.data[:, QS] > 1).sum())
    return len(field.bands) <= BANDS and members <= MEMBERS and stepped <= STEPPED


def _field(field: Field) -> dict[str, Any]:
    """Bands as rows (q0, qn, qs, k0, kn, ks, lo, hi, set of queries, set of keys), null where nothing bounds; sets as
    runs (first, end)."""
    data = field.bands.data[:, [Q0, QN, QS, K0, KN, KS, LO, HI, QSET, KSET]]
    rows = [[None if abs(value) >= INF else value for value in row] for row in data.tolist()]
    told: dict[str, Any] = {
        "queries": field.queries, "keys": field.keys, "bands": rows,
        "sets": [np.clip(chosen.bounds, 0, 1 << 50).tolist() for chosen in field.bands.sets],
    }  # fmt: skip
    if field.layouts is not None:
        told["layouts"] = [_layout(field.layouts[0], field.queries[0]), _layout(field.layouts[1], field.keys[0])]
    return told


def _layout(layout: Layout, offset: int) -> dict[str, Any]:
    spans = (layout.table + np.array([0, offset, 0, 0])).tolist()
    found = colours.of_ranks(layout.world_size).tolist()
    return {"spans": sorted(spans, key=lambda row: row[1]), "colours": found}

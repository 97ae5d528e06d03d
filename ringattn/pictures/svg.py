"""A scene as SVG, with nothing but Python: what a notebook shows."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape
from itertools import chain

import numpy as np

from ringattn.pictures.colours import Colours
from ringattn.pictures.drawing import STRIP, Box, Image, Line, Plot, Shape, Sheet, Words, lay_out
from ringattn.pictures.scene import Scene

FONT = "'DejaVu Sans', Verdana, 'Segoe UI', sans-serif"


def svg(scene: Scene) -> str:
    """The picture as one element ``<svg>``, which needs no other file. Notes of marks show where a pointer rests."""
    return of_sheet(lay_out(scene), scene.title)


def of_sheet(sheet: Sheet, title: str) -> str:
    """The same of what is laid out already."""
    size = f'width="{sheet.width:g}" height="{sheet.height:g}" viewBox="0 0 {sheet.width:g} {sheet.height:g}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<defs>{''.join(_head(colour) for colour in sorted(_arrows(sheet)))}</defs>",
        *map(_element, sheet.shapes),
        *(_plot(number, plot) for number, plot in enumerate(sheet.plots)),
        "</svg>",
    ]
    return "\n".join(parts)


def _arrows(sheet: Sheet) -> set[str]:
    """Colours of arrows."""
    shapes = chain(sheet.shapes, *(plot.inside for plot in sheet.plots))
    return {shape.colour for shape in shapes if isinstance(shape, Line) and shape.arrow}


def _head(colour: str) -> str:
    """What lines of a colour end in."""
    return (
        f'<marker id="arrow{colour[1:]}" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="7" markerHeight="7" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L6 3L0 6z" fill="{colour}"/></marker>'
    )


def _plot(number: int, plot: Plot) -> str:
    width, height = plot.panel.width, plot.panel.height
    colour, thick = plot.frame
    frame = f'fill="none" stroke="{colour}" stroke-width="{thick:g}"'
    parts = [f'<g class="panel" data-panel="{number}">', f'<g class="name">{_element(plot.name)}</g>']
    if plot.strips is not None:
        rows, cols = plot.strips
        parts.append(_nested("rows", plot.x - STRIP, plot.y, rows.width, rows.height, [rows]))
        parts.append(_nested("cols", plot.x, plot.y - STRIP, cols.width, cols.height, [cols]))
    parts += [
        _nested("plot", plot.x, plot.y, width, height, plot.inside),
        f'<rect class="frame" x="{plot.x:g}" y="{plot.y:g}" width="{width}" height="{height}" {frame}/>',
        '<g class="ticks">',
        *map(_element, plot.ticks),
        "</g></g>",
    ]
    return "\n".join(parts)


def _nested(kind: str, x: float, y: float, width: float, height: float, shapes: list[Shape] | list[Image]) -> str:
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg class="{kind}" {size} preserveAspectRatio="none">{"".join(map(_element, shapes))}</svg>'


def _element(shape: Shape) -> str:
    if isinstance(shape, Box):
        place = f'x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" height="{shape.height:.2f}"'
        return f'<rect {place} fill="{shape.fill}" stroke="{shape.edge}">{_note(shape.note)}</rect>'
    if isinstance(shape, Words):
        turned = f' transform="rotate(-90 {shape.x:.2f} {shape.y:.2f})"' if shape.turned else ""
        weight = ' font-weight="bold"' if shape.bold else ""
        return (
            f'<text x="{shape.x:.2f}" y="{shape.y:.2f}" font-size="{shape.size:g}" fill="{shape.colour}" '
            f'text-anchor="{shape.anchor}"{weight}{turned}>{escape(shape.text)}</text>'
        )
    if isinstance(shape, Image):
        place = f'x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" height="{shape.height:.2f}"'
        data = base64.b64encode(png_of(shape.pixels)).decode()
        kind = 'preserveAspectRatio="none" style="image-rendering:pixelated"'
        return f'<image {place} {kind} href="data:image/png;base64,{data}"/>'
    place = f'x1="{shape.x0:.2f}" y1="{shape.y0:.2f}" x2="{shape.x1:.2f}" y2="{shape.y1:.2f}"'
    kind = f' marker-end="url(#arrow{shape.colour[1:]})"' if shape.arrow else ""
    kind += ' stroke-dasharray="4 3"' if shape.dashed else ""
    return f'<line {place} stroke="{shape.colour}" stroke-width="{shape.width:.2f}"{kind}>{_note(shape.note)}</line>'


def _note(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def png_of(pixels: Colours) -> bytes:
    """Pixels ``[h, w, 3]`` as the bytes of a PNG: the signature, and chunks of size, kind, data and checksum (W3C, PNG
    Specification); before each row its filter, 0."""
    height, width = pixels.shape[:2]
    rows = np.concatenate((np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)), 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")

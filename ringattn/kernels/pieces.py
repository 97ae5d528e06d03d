"""How a banded tile is cut into shapes that attention operators know: rectangles and triangles.

Operators compute full rectangles and squares below their diagonal, and little else. A tile bounded on the
right is one or more rectangles and such squares; a bound on the left is the same picture read backwards, so
its triangle is a square above the diagonal. Integers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

# CPU operators are fastest on whole vector registers.
ALIGNMENT = 16


class Shape(Enum):
    FULL = "full"  # every pair
    LOWER = "lower"  # a square, column <= row
    UPPER = "upper"  # a square, column >= row


@dataclass(frozen=True, slots=True)
class Piece:
    """One operator call on some rows and columns of a tile."""

    rows: slice
    cols: slice
    shape: Shape

    @property
    def band(self) -> TileBand:
        """What the piece sees of its own rows and columns."""
        nq, nk = self.rows.stop - self.rows.start, self.cols.stop - self.cols.start
        return TileBand(nq, nk, 0 if self.shape is Shape.UPPER else None, 0 if self.shape is Shape.LOWER else None)

    def halves(self, most: int) -> Iterator[Piece]:
        """The piece, its triangles halved into two and a square until they have at most `most` rows.

        A square comes after the triangle of its rows, which then is the first on them, as in
        :meth:`TileBand.pieces`: of the two the square, one call, is what is merged.
        """
        size = self.rows.stop - self.rows.start
        if self.shape is Shape.FULL or size <= most:
            yield self
            return
        half = size // 2 // ALIGNMENT * ALIGNMENT or size // 2
        top, bottom = _cut(self.rows, half)
        left, right = _cut(self.cols, half)
        yield from Piece(top, left, self.shape).halves(most)
        if self.shape is Shape.UPPER:
            yield Piece(top, right, Shape.FULL)
        yield from Piece(bottom, right, self.shape).halves(most)
        if self.shape is Shape.LOWER:
            yield Piece(bottom, left, Shape.FULL)


def _cut(x: slice, at: int) -> tuple[slice, slice]:
    return slice(x.start, x.start + at), slice(x.start + at, x.stop)


@dataclass(frozen=True, slots=True)
class TileBand:
    """Row `i` sees column `j` iff `lo <= j - i <= hi`; a bound that excludes no pair of the tile is None."""

    nq: int
    nk: int
    lo: int | None
    hi: int | None

    @staticmethod
    def of(nq: int, nk: int, window: tuple[int | None, int | None]) -> TileBand:
        """The band of a tile with a bottom-right aligned window, without the bounds that do not bind."""
        left, right = window
        lo = None if left is None or nk - nq - left <= 1 - nq else nk - nq - left
        hi = None if right is None or nk - nq + right >= nk - 1 else nk - nq + right
        return TileBand(nq, nk, lo, hi)

    @property
    def window(self) -> tuple[int | None, int | None]:
        """The window, as :meth:`of` takes it."""
        ahead = self.nk - self.nq
        return None if self.lo is None else ahead - self.lo, None if self.hi is None else self.hi - ahead

    @property
    def width(self) -> int | None:
        """Columns seen by a row that the tile's borders do not clip; None without two bounds."""
        return None if self.lo is None or self.hi is None else self.hi - self.lo + 1

    def pieces(self, limit: int, triangle: int) -> Iterator[Piece]:
        """Disjoint pieces of at most `limit` rows and columns that cover the band exactly.

        Of the pieces that share rows the first holds all of these rows: a triangle that does, as it may yet be cut
        into many calls, which then need no merges.
        With two bounds a piece has at most `triangle` rows, as each chunk of rows then costs two triangles.
        """
        height = limit if self.width is None else min(limit, triangle, self.width)
        for a, b in self._chunks(height):
            start, stop = 0, self.nk  # the columns that all rows of the chunk see
            if self.hi is not None and b + self.hi <= self.nk:
                stop = a + self.hi
            if self.lo is not None and a + self.lo >= 0:
                start = b - 1 + self.lo
            if stop < self.nk:
                yield Piece(slice(a, b), slice(stop, stop + b - a), Shape.LOWER)
            for c in range(start, stop, limit):
                yield Piece(slice(a, b), slice(c, min(c + limit, stop)), Shape.FULL)
            if self.lo is not None and 0 <= a + self.lo < start:
                yield Piece(slice(a, b - 1), slice(a + self.lo, start), Shape.UPPER)

    def runs(self) -> Iterator[Run]:
        """The tile cut into rows on which each bound binds for all or for none, with the columns that these see."""
        for a, b in self._chunks(self.nq):
            start = 0 if self.lo is None else max(a + self.lo, 0)
            stop = self.nk if self.hi is None else min(b + self.hi, self.nk)
            shift, nq, nk = start - a, b - a, stop - start
            lo = None if self.lo is None or self.lo - shift <= 1 - nq else self.lo - shift
            hi = None if self.hi is None or self.hi - shift >= nk - 1 else self.hi - shift
            yield Run(slice(a, b), slice(start, stop), TileBand(nq, nk, lo, hi))

    def _chunks(self, height: int) -> Iterator[tuple[int, int]]:
        """Runs of at most `height` rows in which each bound binds on all rows or on none."""
        cuts = {0, self.nq}
        if self.lo is not None:
            cuts.add(-self.lo)
        if self.hi is not None:
            cuts.add(self.nk - self.hi)
        edges = sorted(cut for cut in cuts if 0 <= cut <= self.nq)
        for a, b in pairwise(edges):
            for row in range(a, b, height):
                yield row, min(row + height, b)


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a tile, the columns that they see, and the band of these."""

    rows: slice
    cols: slice
    band: TileBand


def flash_runs(band: TileBand) -> list[Run]:
    """What FlashAttention-2's operator computes right in one call. It takes an absent bound, and one of at least nk,
    for nk, which does not reach all columns where there are more rows and the bound on the other side binds."""
    right = band.window[1]
    if band.nq > band.nk and (band.lo is not None if right is None else right >= band.nk):
        return list(band.runs())
    return [Run(slice(0, band.nq), slice(0, band.nk), band)]

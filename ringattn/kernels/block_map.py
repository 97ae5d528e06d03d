"""Block maps: a table of tiles as blocks of local rows and columns, each with no pair, with all, or with some, of which
the bits are kept. Integers only.

What a block-sparse kernel is told of a mask, however many pieces it is in: which blocks to compute, and in which of
them a pair must be asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringattn.geometry.spans import Ints, expand
from ringattn.geometry.tiles import RowIndex, Tile, Tiles

Bools = NDArray[np.bool_]
Words = NDArray[np.uint32]
WORD = 32
LARGEST = 1 << 29  # bytes of a map: bits of 256 Ki blocks of 128 x 128
MOST = 1 << 21  # tiles in blocks, each in all that it touches and does not fill
REMEDY = "kernel='triton' computes such a mask without a map"
AT_ONCE = 4096  # boxes in blocks whose bits are made together


class BlockSize(NamedTuple):
    """Rows, a power of two, and columns, a multiple of 32."""

    rows: int
    cols: int

    @property
    def piece(self) -> int:
        """Columns of a block whose bits lie together: a power of two, so that all that a pair asks for is shifts."""
        return self.cols & -self.cols

    def attends(self, places: Any, bits: Any, row: Any, col: Any) -> Any:
        """1 where a row attends a column of a block with some pairs, 0 where not.

        ``places`` and ``bits`` are those of a `BlockMap`, and with the row and the column integers that can be shifted:
        NumPy's, PyTorch's, or those of a compiler that this is traced by.
        """
        words = self.piece // WORD
        place = places[row >> _log2(self.rows), col >> _log2(self.piece)]
        line = place * words + (col >> _log2(WORD) & words - 1)
        return bits[(line << _log2(self.rows)) + (row & self.rows - 1)] >> (col & WORD - 1) & 1


def _log2(power: int) -> int:
    return power.bit_length() - 1


class Lists(NamedTuple):
    """Of each row of blocks how many are listed, ``[m]``, and which, ``[m, most]``, in order; what is beyond a count
    says nothing."""

    counts: NDArray[np.int32]
    blocks: NDArray[np.int32]

    @staticmethod
    def of(flags: Bools) -> Lists:
        """Those of ``[m, n]`` blocks that are true."""
        counts = flags.sum(1)
        blocks = np.zeros((len(flags), max(int(counts.max()), 1)), np.int32)
        row, within = expand(counts)
        blocks[row, within] = np.nonzero(flags)[1]
        return Lists(counts.astype(np.int32), blocks)


@dataclass(frozen=True, eq=False)
class BlockMap:
    """The rows and columns that tiles touch, cut into ``m`` x ``n`` blocks.

    full, some: ``[m, n]``, blocks with all and with some of their pairs. A block that reaches beyond the last row or
        column is never full: its bits say what is there.
    places: ``[m, n * pieces]``, which of the pieces of all blocks with some pairs a piece of such a block is.
    bits: of these pieces, ``[pieces * words * rows]``.
    """

    size: BlockSize
    rows: slice
    cols: slice
    full: Bools
    some: Bools
    places: NDArray[np.int32]
    bits: NDArray[np.int32]


def block_map(tiles: Tiles, size: BlockSize) -> BlockMap:
    """The map of a table.

    Raises ``NotImplementedError`` where it would be larger than ``LARGEST``, or tiles lie in more than ``MOST`` blocks.
    """
    rows, cols = _hulls(tiles)
    shape = -(-(rows.stop - rows.start) // size.rows), -(-(cols.stop - cols.start) // size.cols)
    strips = _Strips.of(tiles.boxes, (rows.start, cols.start), size)
    full = strips.full(shape)
    boxes = _Boxes.of(strips, size)
    products = [_Product.of(tile, (rows.start, cols.start), size, shape) for tile in tiles.products]
    some = np.zeros(shape, bool)
    some[*boxes.at] = True
    for product in products:
        some[np.ix_(*product.at)] = True
    _allow(int(some.sum()), shape, size)
    words = _words_of(boxes, products, some, size)
    filled, met = (words == 0xFFFFFFFF).all((1, 2)), words.any((1, 2))
    full[some] |= filled
    some[some] = met & ~filled
    return BlockMap(size, rows, cols, full, some, *_stored(words[met & ~filled], some, size))


def _allow(blocks: int, shape: tuple[int, int], size: BlockSize) -> None:
    taken = blocks * size.rows * size.cols // 8 + 4 * shape[0] * shape[1] * size.cols // size.piece
    if taken > LARGEST:
        raise NotImplementedError(
            f"the map of a step takes {taken:,} bytes, at most {LARGEST:,}: {blocks:,} blocks of {size.rows} x "
            f"{size.cols} have some of their pairs; {REMEDY}"
        )


def _allow_parts(parts: int) -> None:
    if parts > MOST:
        raise NotImplementedError(
            f"the tiles of a step lie in {parts:,} blocks that they do not fill, at most {MOST:,}; {REMEDY}"
        )


def _stored(words: Words, some: Bools, size: BlockSize) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Places, at least two by two, as one row or column alone has no certain stride, and bits, at least one word."""
    pieces = size.cols // size.piece
    places = np.zeros((max(len(some), 2), max(some.shape[1], 2), pieces), np.int32)
    places[np.nonzero(some)] = np.arange(len(words) * pieces).reshape(-1, pieces)
    bits = words.reshape(-1) if len(words) else np.zeros(1, np.uint32)
    return places.reshape(len(places), -1), bits.view(np.int32)


# -- which rows and columns ----------------------------------------------------------------------


def _hulls(tiles: Tiles) -> tuple[slice, slice]:
    """From the first to the last row, and column, that some tile has."""
    q0, nq, qs, k0, nk, ks, _, _ = tiles.boxes.T
    found = []
    for first, last, lists in (
        (q0, q0 + (nq - 1) * qs, [tile.q for tile in tiles.products]),
        (k0, k0 + (nk - 1) * ks, [tile.k for tile in tiles.products]),
    ):
        ends = [(int(x[0]), int(x[-1])) for x in map(listed, lists)]
        ends += [(int(first.min()), int(last.max()))] if len(first) else []
        found.append(slice(min(end[0] for end in ends), max(end[1] for end in ends) + 1))
    return found[0], found[1]


def listed(rows: RowIndex) -> Ints:
    """Local rows one by one, in order."""
    return np.arange(rows.start, rows.stop, rows.step or 1) if isinstance(rows, slice) else np.sort(rows)


# -- tiles in blocks -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Strips:
    """Boxes in the rows of blocks that they touch, ``[e]``: which row; the box, ``(nq, q step, nk, k step, lo, hi)``;
    where its first row lies from the block's, and its first column from that of the map. Its columns there lie in
    blocks ``[low, high)``, of which it has all pairs of ``[inner, outer)``."""

    row: Ints
    box: Ints
    top: Ints
    first: Ints
    low: Ints
    inner: Ints
    outer: Ints
    high: Ints

    @staticmethod
    def of(boxes: Ints, origin: tuple[int, int], size: BlockSize) -> _Strips:
        q0, nq, qs = boxes[:, 0] - origin[0], boxes[:, 1], boxes[:, 2]
        which, within = expand((q0 + (nq - 1) * qs) // size.rows - q0 // size.rows + 1, _allow_parts)
        row = (q0 // size.rows)[which] + within
        box, top, first = boxes[which][:, [1, 2, 4, 5, 6, 7]], q0[which] - row * size.rows, boxes[which, 3] - origin[1]
        nq, qs, nk, ks, lo, hi = box.T
        # the box's rows in the block are [i, j], what some of them see [left, right], and what all do [begin, end]
        i, j = np.maximum(-(top // qs), 0), np.minimum((size.rows - 1 - top) // qs, nq - 1)
        left, right = np.maximum(i + lo, 0), np.minimum(j + hi, nk - 1)
        begin, end = np.maximum(j + lo, 0), np.minimum(i + hi, nk - 1)
        low, high = (first + ks * left) // size.cols, (first + ks * right) // size.cols + 1
        inner, outer = -((-first - begin) // size.cols), (first + end + 1) // size.cols
        wide = (ks == 1) & (j - i == size.rows - 1) & (inner < outer)  # so many rows are of step 1
        inner, outer = np.where(wide, inner, low), np.where(wide, outer, low)
        made = _Strips(row, box, top, first, low, inner, outer, high)
        return made.take((i <= j) & (left <= right))

    def take(self, some: Any) -> _Strips:
        sides = (self.row, self.box, self.top, self.first, self.low, self.inner, self.outer, self.high)
        return _Strips(*(side[some] for side in sides))

    def full(self, shape: tuple[int, int]) -> Bools:
        """The blocks of which a box has all pairs."""
        edges = np.zeros((shape[0], shape[1] + 1), np.int32)
        np.add.at(edges, (self.row, self.inner), 1)
        np.add.at(edges, (self.row, self.outer), -1)
        return edges.cumsum(1)[:, :-1] > 0


@dataclass(frozen=True, eq=False)
class _Boxes:
    """Boxes in the blocks that they touch and do not fill, ``[e]``: the block, the box as in `_Strips`, and where its
    first row and column lie from the block's own."""

    at: tuple[Ints, Ints]
    box: Ints
    top: Ints
    left: Ints

    @staticmethod
    def of(strips: _Strips, size: BlockSize) -> _Boxes:
        before, full = strips.inner - strips.low, strips.outer - strips.inner
        which, within = expand(strips.high - strips.low - full, _allow_parts)
        column = strips.low[which] + within + np.where(within < before[which], 0, full[which])
        left = strips.first[which] - column * size.cols
        return _Boxes((strips.row[which], column), strips.box[which], strips.top[which], left)

    def take(self, some: Any) -> _Boxes:
        return _Boxes((self.at[0][some], self.at[1][some]), self.box[some], self.top[some], self.left[some])

    def words(self, size: BlockSize) -> Words:
        """The bits of their pairs, ``[e, words, rows]``."""
        nq, qs, nk, ks, lo, hi = self.box.T[:, :, None]
        left = self.left[:, None]
        row, off = np.divmod(np.arange(size.rows) - self.top[:, None], qs)
        first, last = left + ks * np.maximum(row + lo, 0), left + ks * np.minimum(row + hi, nk - 1)
        last[(off != 0) | (row < 0) | (row >= nq)] = -1
        below = _packed(np.arange(size.cols) < np.arange(size.cols + 1)[:, None])
        run = below[np.clip(last + 1, 0, size.cols)] & ~below[np.clip(first, 0, size.cols)]
        comb = _packed((np.arange(size.cols) - left) % ks == 0)
        return (run & comb[:, None]).transpose(0, 2, 1)


@dataclass(frozen=True, eq=False)
class _Product:
    """Scattered rows against scattered columns: the blocks of either side that have some, and which."""

    at: tuple[Ints, Ints]
    rows: Bools
    cols: Words

    @staticmethod
    def of(tile: Tile, origin: tuple[int, int], size: BlockSize, shape: tuple[int, int]) -> _Product:
        sides = []
        for lines, start, length, blocks in zip((tile.q, tile.k), origin, size, shape, strict=True):
            there = np.zeros(blocks * length, bool)
            there[listed(lines) - start] = True
            sides.append(there.reshape(blocks, length))
        (q, k), (some_q, some_k) = sides, (np.flatnonzero(side.any(1)) for side in sides)
        return _Product((some_q, some_k), q[some_q], _packed(k[some_k]))

    def words(self) -> Words:
        """The bits of their pairs, ``[blocks of rows, blocks of columns, words, rows]``."""
        return np.where(self.rows[:, None, None, :], self.cols[None, :, :, None], np.uint32(0))


def _packed(flags: Bools) -> Words:
    """The last dim in words, the first flag in the lowest bit."""
    return np.packbits(flags, axis=-1, bitorder="little").view("<u4")


def _words_of(boxes: _Boxes, products: list[_Product], some: Bools, size: BlockSize) -> Words:
    """The bits of those blocks, in their order, ``[blocks, words, rows]``."""
    number = np.cumsum(some).reshape(some.shape) - 1
    words = np.zeros((int(some.sum()), size.cols // WORD, size.rows), np.uint32)
    for block, part in _by_block(boxes, number[*boxes.at]):
        begins = np.flatnonzero(np.diff(block, prepend=-1))
        words[block[begins]] |= np.bitwise_or.reduceat(part.words(size), begins, axis=0)
    for product in products:
        words[number[np.ix_(*product.at)]] |= product.words()
    return words


def _by_block(boxes: _Boxes, number: Ints) -> Iterator[tuple[Ints, _Boxes]]:
    """Some at a time, in order of their blocks."""
    order = np.argsort(number, kind="stable")
    for start in range(0, len(order), AT_ONCE):
        part = order[start : start + AT_ONCE]
        yield number[part], boxes.take(part)

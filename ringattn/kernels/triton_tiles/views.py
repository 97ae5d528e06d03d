"""What the programs of a launch are given, as named tuples that Triton takes apart: pointers, strides and numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Strided(NamedTuple):
    """A tensor of tokens, ``[batch, rows, heads]`` or ``[batch, rows, heads, D]`` with a contiguous last dim, and its
    strides in elements."""

    at: Any
    batch: Any
    row: Any
    head: Any

    @staticmethod
    def tokens(x: Tensor) -> Strided:
        """Of ``[batch, rows, heads, D]``."""
        batch, row, head, last = x.stride()
        assert last == 1 or x.shape[3] == 1, "kernels are given contiguous last dims"
        return Strided(x, batch, row, head)

    @staticmethod
    def rows(x: Tensor) -> Strided:
        """Of ``[batch, heads, rows]``."""
        batch, head, row = x.stride()
        return Strided(x, batch, row, head)


class Bias(NamedTuple):
    """A bias ``[1|B, 1|H, rows, kv_seqlen]``, from its first head here on; the stride of a dim of size 1 is 0."""

    at: Any = None
    batch: Any = None
    row: Any = None
    head: Any = None
    col: Any = None

    @staticmethod
    def of(x: Tensor | None, heads: slice) -> Bias:
        if x is None:
            return Bias()
        batch, head, row, col = x.stride()
        mine = x if x.shape[1] == 1 else x[:, heads]
        return Bias(mine, batch if x.shape[0] > 1 else 0, row, head if x.shape[1] > 1 else 0, col)


class Lists(NamedTuple):
    """A wave on the device: blocks, entries, and the index tables of rows and columns, None where it has no lists."""

    blocks: Any
    entries: Any
    rows: Any
    cols: Any


class Terms(NamedTuple):
    """What becomes of ``q k^T``, but for a bias; what a call does not ask for is None.

    ``q_at`` and ``k_at`` are global positions of local rows and columns. Dropout needs hashes of query heads and of
    those positions, the ``least`` hash of a pair that is kept, and ``boost``, ``1 / (1 - p)``.
    """

    scale: float
    softcap: float | None = None
    slopes: Any = None
    q_at: Any = None
    k_at: Any = None
    head_hash: Any = None
    q_hash: Any = None
    k_hash: Any = None
    least: int | None = None
    boost: float | None = None

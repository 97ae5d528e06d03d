"""Packing: batch rows with documents of their own as one sequence.

Masks are shared by all batch rows. Rows that differ in their documents, or in how much padding ends them, are
therefore laid one behind the other, without the padding, and their documents become documents of that sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ringattn.arguments.tensors import fits, plain
from ringattn.arguments.values import LARGEST, boundaries, integer, listed, shown


@dataclass(frozen=True)
class Packing:
    """How rows lie in one packed sequence. Made by :func:`pack`; immutable, hashable.

    cu_seqlens: the bounds of all documents in the packed sequence, for :func:`documents`.
    lengths: the real tokens of each row.
    """

    cu_seqlens: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def seqlen(self) -> int:
        """Tokens of the packed sequence, those that fill up a `multiple` included."""
        return self.cu_seqlens[-1]

    @cached_property
    def position_ids(self) -> Tensor:
        """Int64 `[seqlen]` on the CPU: positions that start again at 0 in each document."""
        with torch.inference_mode(False):  # kept, and later used where gradients are wanted
            bounds = torch.tensor(self.cu_seqlens)
            return torch.arange(self.seqlen) - bounds[:-1].repeat_interleave(bounds.diff())

    def pack(self, x: Tensor | Sequence[Tensor], fill: float = 0) -> Tensor:
        """The real tokens of `x` in one sequence, in one copy, differentiable. Padding gets a gradient of 0.

        Args:
            x: `[batch, row_seqlen, ...]` of any dtype, or for each row a tensor `[its row_seqlen, ...]`.
            fill: the value of the tokens that fill up a `multiple`.

        Returns `[1, seqlen, ...]` in the dtype and on the device of `x`. Raises `ValueError` if `x` has another
        number of rows, a row shorter than its documents, rows that differ in dtype, device or trailing dims, or a
        `fill` that the dtype cannot hold.
        """
        rows = _rows(x, len(self.lengths))
        fill = fits(rows[0].dtype, fill)
        for i, (row, length) in enumerate(zip(rows, self.lengths, strict=True)):
            if row.size(0) < length:
                raise ValueError(
                    f"row {i} of x has {row.size(0)} tokens but rows[{i}] ends at {length}: "
                    f"pass whole rows, or bounds that end inside them"
                )
        parts = [row[:length] for row, length in zip(rows, self.lengths, strict=True)]
        return torch.cat([*parts, _filled(rows[0], self.seqlen - sum(self.lengths), fill)]).unsqueeze(0)

    def unpack(self, y: Tensor, seqlen: int, fill: float = 0) -> Tensor:
        """The reverse of :meth:`pack`: the rows, padded at their ends; in one copy, differentiable.

        Args:
            y: `[1, self.seqlen, ...]`, any dtype.
            seqlen: the length of the padded rows.
            fill: the value of the padding.

        Returns `[batch, seqlen, ...]` in the dtype and on the device of `y`. Raises `ValueError` if `y` is no packed
        sequence of this length, a row has more than `seqlen` tokens, or the dtype cannot hold `fill`.
        """
        if plain("y", y).ndim < 2 or y.shape[:2] != (1, self.seqlen):
            raise ValueError(f"y {tuple(y.shape)}: must be the whole packed sequence, [1, {self.seqlen}, ...]")
        seqlen, fill = integer("unpack() seqlen", seqlen), fits(y.dtype, fill)
        if seqlen < max(self.lengths):
            raise ValueError(
                f"unpack() seqlen={seqlen}: a row has {max(self.lengths)} tokens; pass the length of the padded rows"
            )
        rows = y[0].split([*self.lengths, self.seqlen - sum(self.lengths)])[:-1]
        padded = [part for row in rows for part in (row, _filled(row, seqlen - row.size(0), fill))]
        return torch.cat(padded).unflatten(0, (len(rows), seqlen))


def pack(rows: Iterable[Iterable[int]], multiple: int = 1) -> Packing:
    """Pack batch rows that have documents of their own into one sequence, which one mask can describe.

        packing = ringattn.pack([[0, 300, 500], [0, 420]])  # two rows, padded to 512 tokens, say
        cp = cp.replace(seqlen=packing.seqlen, mask=ringattn.documents(packing.cu_seqlens) & ringattn.causal())
        q = cp.shard(packing.pack(q))  # and so on; packing.unpack(cp.unshard(out), 512) brings the rows back

    Args:
        rows: for each batch row the bounds of its documents, a tensor, array or sequence of integers that starts at 0,
            never falls, and ends at the row's number of real tokens. What lies behind is padding and is dropped. A row
            without tokens is `[0]`.
        multiple: fill the packed sequence up to a multiple of so many tokens; what is added is a document of its own.
            With the batch size times the row length every batch gives the same length.

    Raises `ValueError` for other bounds and where no row has a token.
    """
    bounds = [boundaries(f"rows[{i}]", row) for i, row in enumerate(_listed(rows))]
    multiple = integer("multiple", multiple, 1)
    lengths = tuple(row[-1] for row in bounds)
    starts = itertools.accumulate(lengths, initial=0)
    cu_seqlens = (0, *(start + end for start, row in zip(starts, bounds, strict=False) for end in row[1:]))
    tokens = cu_seqlens[-1]
    if tokens > LARGEST - multiple:
        raise ValueError(f"{tokens} tokens in all and multiple={multiple}: must be at most {LARGEST} (2**40) together")
    if not tokens:
        raise ValueError(f"{len(lengths)} rows with no tokens in all: there is nothing to pack; skip this batch")
    if tokens % multiple:
        cu_seqlens += (tokens + -tokens % multiple,)
    return Packing(cu_seqlens, lengths)


def _listed(rows: Any) -> list[Any]:
    return listed("rows", rows, "the document bounds of each batch row", rule="a sequence with")


def _rows(x: Tensor | Sequence[Tensor], batch: int) -> Sequence[Tensor]:
    """The rows of `x`, all of a kind. `unbind`, unlike indexing, has a backward of one copy for all rows."""
    if isinstance(x, Tensor) and plain("x", x).ndim < 2:
        raise ValueError(f"x {tuple(x.shape)}: must be [batch, row_seqlen, ...], or a list with a tensor for each row")
    rows = x.unbind(0) if isinstance(x, Tensor) else listed("x", x, "tensors, one for each row")
    if len(rows) != batch:
        raise ValueError(f"x has {len(rows)} rows but the packing {batch}: pass the batch whose bounds were packed")
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor) or not row.ndim:
            raise ValueError(f"row {i} of x: must be a tensor [row_seqlen, ...]; got {shown(row)}")
        plain(f"row {i} of x", row)
        kinds = [(tuple(r.shape[1:]), r.dtype, r.device) for r in (rows[0], row)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"row {i} of x has trailing dims, dtype and device {kinds[1]}, row 0 {kinds[0]}: they must be the same"
            )
    return rows


def _filled(like: Tensor, tokens: int, fill: float) -> Tensor:
    """`[tokens, ...]` of one value, which takes no memory until it is copied."""
    return like.new_full((), fill).expand(tokens, *like.shape[1:])

"""Tiles by PyTorch's own fused operators.

On the CPU, and in fp32 on CUDA, the operators know full rectangles, squares below their diagonal and dense
additive masks: `pieces` cuts a tile into the former, and `windows` computes narrow windows, and triangles on the
CPU, with the latter. They run in the accumulators' precision whatever the storage dtype: partial sums stay fp32,
and 16-bit matrix products are slow on most CPUs. On CUDA in fp16 and bf16 the operators take windows, and a tile is
one call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.geometry.tiles import Window
from ringattn.kernels import sdpa_cuda, windows
from ringattn.kernels.base import Call, Grads, Needs, Rows
from ringattn.kernels.calls import TileKernel
from ringattn.kernels.operators import CpuFlash, Operator, Query, cast, head_major
from ringattn.kernels.partial import Partial, accumulator_dtype, fold
from ringattn.kernels.pieces import Shape, TileBand
from ringattn.kernels.reference import FLOATING
from ringattn.kernels.scores import TileScores


class Sizes(NamedTuple):
    """How tiles are cut.

    limit: rows and columns of one operator call: it bounds scratch memory, and such calls run at full speed.
    triangle: rows of one chunk of a wide window, whose two triangles cost about a third more than their area.
    narrow: the widest window computed by masked blocks; beyond, the chunks' triangles weigh less than the masks.
    small: triangles of so many rows are computed by masked blocks on the CPU, whose operator computes 512 columns at a
        time, on a diagonal too: half of what a triangle of 512 rows costs is for nothing. Yet smaller ones are not
        worth more than one call, and larger ones are halved into two triangles and a square.
    packing: the rows or columns from which on a dense copy of the other side pays: it is read once for every 256.
    """

    limit: int = 8192
    triangle: int = 1024
    narrow: int = 2048
    small: range = range(160, 800 + 1)
    packing: int = 2048


SIZES = Sizes()


class Sdpa(TileKernel):
    """The `sdpa` kernel; see the module's docstring."""

    name = "sdpa"
    needs = Needs(frozenset({"cpu", "cuda"}), capability=(8, 0))
    reads_delta = False  # fused operators make their own

    def direct(self, call: Call) -> bool:
        """On CUDA in 16 bits a tile is one call, mostly."""
        return call.device_type == "cuda" and call.dtype in sdpa_cuda.HALF

    def refuse(self, call: Call) -> str | None:
        if call.features:
            features = ", ".join(sorted(call.features))
            return f"{features}: not computed by PyTorch's fused operators; kernel='blockwise' computes it"
        if call.device_type == "cuda":
            return sdpa_cuda.refuse(call)
        if call.dtype not in FLOATING:
            return f"dtype {call.dtype} must be one of float16, bfloat16, float32, float64"
        if call.v_head_dim != call.head_dim:  # padding the smaller with zeros is exact, but slower than blockwise
            sizes = f"v_head_dim {call.v_head_dim} must equal head_dim {call.head_dim}"
            return f"{sizes} for PyTorch's CPU operator; kernel='blockwise' takes both"
        return None

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        assert scores.softcap is None and scores.call is None, "refused, and must not be left out"
        window, scale = scores.window, scores.scale
        if q.is_cuda and q.dtype in sdpa_cuda.HALF:
            fold(acc, *sdpa_cuda.forward(q, k, v, window, scale), fresh)
            return
        for part in cut(q.shape[1], k.shape[1], window, q.is_cuda, SIZES):
            if part.whole:
                _forward_part(part, q, k, v, scale, acc, fresh)
                continue
            rows, cols = part.rows, part.cols
            _forward_part(part, q[:, rows], k[:, cols], v[:, cols], scale, acc.rows(rows), fresh and part.first)

    def backward_tile(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        assert scores.softcap is None and scores.call is None, "refused, and must not be left out"
        window, scale = scores.window, scores.scale
        if k.is_cuda and k.dtype in sdpa_cuda.HALF:
            runs = list(sdpa_cuda.backward(rows, k, v, window, scale))
            if len(runs) == 1:
                grads.add(*runs[0][1])
                return
            grads = grads.begun()
            for run, found in runs:
                grads.tile(run.rows, run.cols).add(*found)
            return
        parts = cut(rows.q.shape[1], k.shape[1], window, k.is_cuda, SIZES)
        if len(parts) > 1 or parts[0].band is not None:
            grads = grads.begun()
        for part in parts:
            if part.whole:
                _backward_part(part, rows, k, v, scale, grads)
                continue
            here, cols = grads.tile(part.rows, part.cols), part.cols
            _backward_part(part, rows.rows(part.rows), k[:, cols], v[:, cols], scale, here)


class Part(NamedTuple):
    """One operator call, or a band for masked blocks, on rows and columns of a tile. ``whole``: they are all of them;
    ``first``: the first on its rows, which it holds all."""

    rows: slice
    cols: slice
    shape: Shape
    band: TileBand | None
    whole: bool
    first: bool


@lru_cache(maxsize=1024)
def cut(nq: int, nk: int, window: Window, cuda: bool, sizes: Sizes) -> tuple[Part, ...]:
    """The parts of a tile; of those that share rows the first holds all of these."""
    band = TileBand.of(nq, nk, window)
    if _is_narrow(band, cuda, sizes):
        return (Part(slice(0, nq), slice(0, nk), Shape.FULL, band, True, True),)
    parts, reached = [], 0  # rows that hold a result already; the first piece on new rows holds all of them
    for piece in band.pieces(sizes.limit, sizes.triangle):
        for half in (piece,) if cuda else piece.halves(sizes.small.stop - 1):
            rows, cols = half.rows, half.cols
            narrow = half.band if _is_narrow(half.band, cuda, sizes) else None
            whole = (rows, cols) == (slice(0, nq), slice(0, nk))
            parts.append(Part(rows, cols, half.shape, narrow, whole, rows.stop > reached))
            reached = max(reached, rows.stop)
    return tuple(parts)


def _is_narrow(band: TileBand, cuda: bool, sizes: Sizes) -> bool:
    """Whether masked blocks are fastest: narrow windows, and on the CPU small triangles, which are wasteful there."""
    if band.lo is None and band.hi is None:
        return False
    if band.lo is None or band.hi is None:
        return not cuda and max(band.nq, band.nk) in sizes.small
    return band.hi - band.lo < sizes.narrow


OPERATORS: dict[bool, Operator] = {False: CpuFlash(), True: sdpa_cuda.Efficient()}


def _packed(x: Tensor, readers: int, dtype: torch.dtype) -> Tensor:
    """`[B, n, H, D]` head-major, copied where enough rows or columns of the other side read it."""
    return head_major(x, dtype) if readers >= SIZES.packing else cast(x, dtype).transpose(1, 2)


def _forward_part(part: Part, q: Tensor, k: Tensor, v: Tensor, scale: float, acc: Partial, fresh: bool) -> None:
    operator = OPERATORS[q.is_cuda]
    if part.band is not None:
        windows.forward(operator, part.band, q, k, v, scale, acc, fresh)
        return
    dtype, nq, nk = acc.out.dtype, q.shape[1], k.shape[1]
    if q.dtype == dtype and nq < SIZES.packing > nk:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    else:
        q, k, v = _packed(q, nk, dtype), _packed(k, nq, dtype), _packed(v, nq, dtype)
    if part.shape is Shape.UPPER:  # read backwards it is a square below its diagonal
        out, lse = operator.forward(q.flip(2), k.flip(2), v.flip(2), True, None, scale)
        fold(acc, out.flip(2).transpose(1, 2), lse.flip(2), fresh)
    else:
        out, lse = operator.forward(q, k, v, part.shape is Shape.LOWER, None, scale)
        fold(acc, out.transpose(1, 2), lse, fresh)


def _backward_part(part: Part, rows: Rows, k: Tensor, v: Tensor, scale: float, grads: Grads) -> None:
    operator = OPERATORS[k.is_cuda]
    if part.band is not None:
        windows.backward(operator, part.band, rows, k, v, scale, grads)
        return
    dtype, nq, nk = accumulator_dtype(k.dtype), rows.q.shape[1], k.shape[1]
    q, dout, out = rows.q, rows.dout, rows.out
    if q.dtype == dtype and nq < SIZES.packing > nk:
        q, dout, k, v = q.transpose(1, 2), dout.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    else:
        q, dout, k, v = (_packed(x, n, dtype) for x, n in ((q, nk), (dout, nk), (k, nq), (v, nq)))
        out = cast(out, dtype)  # read once only, as it lies
    query = Query(q, dout, out.transpose(1, 2), rows.lse, rows.dlse)
    if part.shape is Shape.UPPER:
        query = query.map(lambda x: x.flip(2))
        dq, dk, dv = operator.backward(query, k.flip(2), v.flip(2), True, None, scale)
        grads.add(dq.flip(2), dk.flip(2), dv.flip(2))
    else:
        grads.add(*operator.backward(query, k, v, part.shape is Shape.LOWER, None, scale))

"""Tiles by PyTorch's own fused operators.

On the CPU, and in fp32 on CUDA, the operators know full rectangles, squares below their diagonal and dense
additive masks: `pieces` cuts a tile into the former, and `windows` computes narrow windows, and triangles on the
CPU, with the latter. They run in the accumulators' precision whatever the storage dtype: partial sums stay fp32,
and 16-bit matrix products are slow on most CPUs. On CUDA in fp16 and bf16 the operators take windows, and a tile is
one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringattn.kernels import sdpa_cuda, windows
from ringattn.kernels.base import Call, Grads, Rows
from ringattn.kernels.calls import TileKernel
from ringattn.kernels.operators import CpuFlash, Operator, Query, head_major
from ringattn.kernels.partial import Partial, fold
from ringattn.kernels.pieces import Piece, Shape, TileBand
from ringattn.kernels.reference import FLOATING
from ringattn.kernels.scores import TileScores

# Rows and columns of one operator call: it bounds scratch memory, and such calls run at full speed.
LIMIT = 8192
# Rows of one chunk of a wide window, whose two triangles cost about a third more than their area.
TRIANGLE = 1024
# The widest window computed by masked blocks; beyond, the chunks' triangles weigh less than the masks.
NARROW = 2048
# Triangles of this many rows are computed by masked blocks on the CPU, whose operator computes 512 columns at a time,
# on a diagonal too: half of what a triangle of 512 rows costs is for nothing. Yet smaller ones are not worth more
# than one call, and larger ones are halved only in backward, where nothing has to be merged.
SMALL = range(160, 1536 + 1)
# The rows or columns from which on a dense copy of the other side pays: it is read once for every 256 of them.
PACKING = 2048


class Sdpa(TileKernel):
    """The `sdpa` kernel; see the module's docstring."""

    name = "sdpa"
    reads_delta = False  # fused operators make their own

    def refuse(self, call: Call) -> str | None:
        if call.features:
            features = ", ".join(sorted(call.features))
            return f"{features}: not computed by PyTorch's fused operators; kernel='blockwise' computes it"
        if call.device_type == "cuda":
            return sdpa_cuda.refuse(call)
        if call.device_type != "cpu":
            return f"device {call.device_type!r} has no operator here (cpu and cuda have)"
        if call.dtype not in FLOATING:
            return f"dtype {call.dtype} must be one of float16, bfloat16, float32, float64"
        if call.v_head_dim != call.head_dim:  # padding the smaller with zeros is exact, but slower than blockwise
            sizes = f"v_head_dim {call.v_head_dim} must equal head_dim {call.head_dim}"
            return f"{sizes} for PyTorch's CPU operator; kernel='blockwise' takes both"
        return None

    def forward_tile(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores, acc: Partial, fresh: bool) -> None:
        assert not scores.features, "refused, and must not be left out"
        window, scale = scores.window, scores.scale
        if sdpa_cuda.takes_windows(q):
            fold(acc, *sdpa_cuda.forward(q, k, v, window, scale), fresh)
            return
        operator, band = _operator(q), TileBand.of(q.size(1), k.size(1), window)
        if _is_narrow(band, q):
            windows.forward(operator, band, q, k, v, scale, acc, fresh)
            return
        reached = 0  # rows that hold a result already; the first piece on new rows holds all of them
        for piece in band.pieces(LIMIT, TRIANGLE):
            rows, cols, new = piece.rows, piece.cols, fresh and piece.rows.stop > reached
            _forward_piece(operator, piece, q[:, rows], k[:, cols], v[:, cols], scale, acc.rows(rows), new)
            reached = max(reached, piece.rows.stop)

    def backward_tile(self, rows: Rows, k: Tensor, v: Tensor, scores: TileScores, grads: Grads) -> None:
        assert not scores.features, "refused, and must not be left out"
        window, scale = scores.window, scores.scale
        if sdpa_cuda.takes_windows(k):
            for run, found in sdpa_cuda.backward(rows, k, v, window, scale):
                grads.tile(run.rows, run.cols).add(*found)
            return
        operator, band = _operator(k), TileBand.of(rows.q.size(1), k.size(1), window)
        if _is_narrow(band, k):
            windows.backward(operator, band, rows, k, v, scale, grads)
            return
        for piece in band.pieces(LIMIT, TRIANGLE):
            for part in [piece] if k.is_cuda else piece.halves(SMALL.stop - 1):
                here, cols = grads.tile(part.rows, part.cols), part.cols
                _backward_piece(operator, part, rows.rows(part.rows), k[:, cols], v[:, cols], scale, here)


def _operator(x: Tensor) -> Operator:
    return sdpa_cuda.Efficient() if x.is_cuda else CpuFlash()


def _is_narrow(band: TileBand, x: Tensor) -> bool:
    """Whether masked blocks are fastest: narrow windows, and on the CPU small triangles, which are wasteful there."""
    if band.lo is None and band.hi is None:
        return False
    if band.lo is None or band.hi is None:
        return not x.is_cuda and max(band.nq, band.nk) in SMALL
    return band.hi - band.lo < NARROW


def _packed(x: Tensor, readers: int, dtype: torch.dtype) -> Tensor:
    """`[B, n, H, D]` head-major, copied where enough rows or columns of the other side read it."""
    return head_major(x, dtype) if readers >= PACKING else x.to(dtype).transpose(1, 2)


def _forward_piece(
    operator: Operator, piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float, acc: Partial, fresh: bool
) -> None:
    if _is_narrow(piece.band, q):
        windows.forward(operator, piece.band, q, k, v, scale, acc, fresh)
        return
    dtype, nq, nk = acc.out.dtype, q.size(1), k.size(1)
    q, k, v = _packed(q, nk, dtype), _packed(k, nq, dtype), _packed(v, nq, dtype)
    if piece.shape is Shape.UPPER:  # read backwards it is a square below its diagonal
        out, lse = operator.forward(q.flip(2), k.flip(2), v.flip(2), True, None, scale)
        fold(acc, out.flip(2).transpose(1, 2), lse.flip(2), fresh)
    else:
        out, lse = operator.forward(q, k, v, piece.shape is Shape.LOWER, None, scale)
        fold(acc, out.transpose(1, 2), lse, fresh)


def _backward_piece(
    operator: Operator, piece: Piece, rows: Rows, k: Tensor, v: Tensor, scale: float, grads: Grads
) -> None:
    if _is_narrow(piece.band, k):
        windows.backward(operator, piece.band, rows, k, v, scale, grads)
        return
    dtype, nq, nk = grads.dq.dtype, rows.q.size(1), k.size(1)
    query = Query.of(rows, lambda x: _packed(x, nk, dtype))
    k, v = _packed(k, nq, dtype), _packed(v, nq, dtype)
    if piece.shape is Shape.UPPER:
        query = query.map(lambda x: x.flip(2))
        dq, dk, dv = operator.backward(query, k.flip(2), v.flip(2), True, None, scale)
        grads.add(dq.flip(2), dk.flip(2), dv.flip(2))
    else:
        grads.add(*operator.backward(query, k, v, piece.shape is Shape.LOWER, None, scale))

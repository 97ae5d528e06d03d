"""PyTorch's fused operators on CUDA: cuDNN, flash and memory-efficient attention.

In fp16 and bf16 a tile is one call, or up to three where flash would be wrong: cuDNN, the fastest, where the tile
is full or a square below its diagonal, and flash, which takes bottom-right aligned windows, elsewhere. In fp32 only
the memory-efficient operator exists; it offers what the CPU's does. Backward is called with the global out and lse,
so the random states of the forward calls are neither kept nor read (there is no dropout).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ringattn.geometry.tiles import Window
from ringattn.kernels.base import Call, Rows
from ringattn.kernels.operators import DLSE_COLUMNS, Query, carry_dlse
from ringattn.kernels.pieces import Run, TileBand, flash_runs

HALF = (torch.float16, torch.bfloat16)
CUDNN_HEAD_DIM = 128
FLASH_HEAD_DIM = 256
# What the memory-efficient operator asks of the lse's length and of a mask's row stride.
LSE_ALIGNMENT = 32
MASK_ALIGNMENT = 16

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


def refuse(call: Call) -> str | None:
    if call.deterministic:
        return "Options.deterministic: PyTorch's fused operators on CUDA promise no order of sums"
    if call.dtype in HALF:
        if call.v_head_dim != call.head_dim:
            return f"v_head_dim {call.v_head_dim} must equal head_dim {call.head_dim} in {call.dtype} on CUDA"
        if call.head_dim % 8 or call.head_dim > FLASH_HEAD_DIM:
            return f"head_dim {call.head_dim} must be a multiple of 8 and at most {FLASH_HEAD_DIM}"
        if call.dlse and call.head_dim > FLASH_HEAD_DIM - DLSE_COLUMNS:
            return (
                f"head_dim {call.head_dim} must be at most {FLASH_HEAD_DIM - DLSE_COLUMNS} where lse has a gradient; "
                "use the output alone, or kernel='blockwise'"
            )
        return None
    if call.dtype != torch.float32:
        return f"dtype {call.dtype} has no fused operator on CUDA (only float16, bfloat16 and float32 have one)"
    if call.head_dim % 4 or call.v_head_dim % 4:
        return f"head_dim {call.head_dim} and v_head_dim {call.v_head_dim} must be multiples of 4 in float32"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float) -> tuple[Tensor, Tensor]:
    """`out` `[B, nq, H, D]` in the inputs' dtype and `lse` `[B, H, nq]` fp32 of a whole tile."""
    parts = [
        _forward(q[:, run.rows], k[:, run.cols], v[:, run.cols], run.band, scale)
        for run in flash_runs(TileBand.of(q.size(1), k.size(1), window))
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)


def backward(rows: Rows, k: Tensor, v: Tensor, window: Window, scale: float) -> Iterator[tuple[Run, Gradients]]:
    """`dq, dk, dv` of the parts of a tile, head-major, in the inputs' dtype and with padding columns behind them."""
    for run in flash_runs(TileBand.of(rows.q.size(1), k.size(1), window)):
        yield run, _backward(rows.rows(run.rows), k[:, run.cols], v[:, run.cols], run.band, scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, band: TileBand, scale: float) -> tuple[Tensor, Tensor]:
    if _cudnn_takes(band, q.size(-1)):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        causal = band.hi is not None
        result = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        return result[0].transpose(1, 2), result[1].view(q.shape[:3])
    left, right = _flash_window(band)
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, band.nq, band.nk, 0.0, False, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    # the operator's lse of a row that sees NaN is inf
    return out, lse.nan_to_num_(nan=torch.nan, posinf=torch.nan, neginf=-torch.inf)


def _backward(rows: Rows, k: Tensor, v: Tensor, band: TileBand, scale: float) -> Gradients:
    query, k, v = carry_dlse(Query.of(rows, lambda x: x.transpose(1, 2)), k.transpose(1, 2), v.transpose(1, 2))
    if _cudnn_takes(band, k.size(-1)):
        return _cudnn_backward(query, k, v, band.hi is not None, scale)
    return _flash_backward(query, k, v, band, scale)


class Efficient:
    """`aten::_efficient_attention_forward`, for fp32: no GQA, causal aligned top-left, masks as a bias."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        k, v, bias = _expand_heads(k, q), _expand_heads(v, q), _bias(mask, q)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        result = aten._efficient_attention_forward(
            q, k, v, bias, None, None, None, None, 0.0, int(causal), True, scale=scale
        )
        return result[0].transpose(1, 2), result[1][..., : q.size(1)]

    def backward(
        self, query: Query, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_kv_heads = k.size(1)
        query, k, v = carry_dlse(query, k, v)
        k, v, bias = _expand_heads(k, query.q), _expand_heads(v, query.q), _bias(mask, query.q)
        q, dout, out, k, v = (x.transpose(1, 2) for x in (query.q, query.dout, query.out, k, v))
        nq, nk = q.size(1), k.size(1)
        # The operator takes the strides of these two from their shapes.
        out, lse = out.contiguous(), pad(query.lse, (0, -nq % LSE_ALIGNMENT), value=torch.inf).contiguous()
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = aten._efficient_attention_backward(
            dout,
            q,
            k,
            v,
            bias,
            out,
            None,
            None,
            nq,
            nk,
            lse,
            0.0,
            unused,
            unused,
            int(causal),
            False,
            scale=scale,
        )
        dk, dv = (x.transpose(1, 2).unflatten(1, (num_kv_heads, -1)).sum(2) for x in (dk, dv))
        return dq.transpose(1, 2), dk, dv


def _cudnn_takes(band: TileBand, head_dim: int) -> bool:
    """A full rectangle, or a square below its diagonal where both alignments agree."""
    square = band.lo is None and band.hi == 0 and band.nq == band.nk
    full = band.lo is None and band.hi is None
    fits = head_dim <= CUDNN_HEAD_DIM and band.nq > 1 and band.nk > 1
    return (square or full) and fits and torch.backends.cudnn.is_available()


def _cudnn_backward(query: Query, k: Tensor, v: Tensor, causal: bool, scale: float) -> Gradients:
    k, v, lse = k.contiguous(), v.contiguous(), query.lse.contiguous().unsqueeze(-1)
    unused = torch.zeros(1, dtype=torch.int64, device=k.device)
    nq, nk = query.q.size(2), k.size(2)
    return aten._scaled_dot_product_cudnn_attention_backward(
        query.dout,
        query.q,
        k,
        v,
        query.out,
        lse,
        unused,
        unused,
        None,
        None,
        None,
        nq,
        nk,
        0.0,
        causal,
        scale=scale,
    )


def _flash_backward(query: Query, k: Tensor, v: Tensor, band: TileBand, scale: float) -> Gradients:
    """Head-major like its arguments, though the operator is row-major."""
    assert query.q.size(-1) <= FLASH_HEAD_DIM, "refused, as the call told that lse has a gradient"
    q, k, v, dout, out = (x.transpose(1, 2) for x in (query.q, k, v, query.dout, query.out))
    left, right = _flash_window(band)
    state = torch.zeros(2, dtype=torch.int64, device=q.device).view(torch.uint64)
    unused = torch.zeros((), dtype=torch.int64, device=q.device).view(torch.uint64)
    lse, nq, nk = query.lse.contiguous(), q.size(1), k.size(1)
    dq, dk, dv = aten._flash_attention_backward(
        dout, q, k, v, out, lse, None, None, nq, nk, 0.0, False, state, unused,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _flash_window(band: TileBand) -> tuple[int, int]:
    left, right = band.window
    return -1 if left is None else left, -1 if right is None else right


def _expand_heads(x: Tensor, q: Tensor) -> Tensor:
    """K or V with one head for each query head."""
    return x if x.size(1) == q.size(1) else x.repeat_interleave(q.size(1) // x.size(1), dim=1)


def _bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask for every batch row and head, its rows aligned as the operator wants them."""
    if mask is None:
        return None
    nk = mask.size(1)
    aligned = pad(mask, (0, -nk % MASK_ALIGNMENT))[:, :nk]
    return aligned.expand(q.size(0), q.size(1), -1, -1)

"""attention(): check the call, look the program up, choose the kernel, let the ranks agree, run."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ringattn.comm import agree
from ringattn.context import ContextParallel
from ringattn.kernels import KERNELS, Call, Kernel, choose
from ringattn.masks import Mask
from ringattn.ring import RingAttention, Run
from ringattn.version import VERSION

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cp: ContextParallel, mask: Mask | None = ..., scale: float | None = ...,
    softcap: float | None = ..., bias: object = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: int | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cp: ContextParallel, mask: Mask | None = ..., scale: float | None = ...,
    softcap: float | None = ..., bias: object = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: int | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: ContextParallel,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: object = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention of this rank's queries over the whole sequence.

    Args:
        q: ``[batch, local_seqlen, num_heads, head_dim]``, fp16, bf16, fp32 or fp64.
        k: ``[batch, local_kv_seqlen, num_kv_heads, head_dim]``; ``num_kv_heads`` divides ``num_heads``.
        v: ``[batch, local_kv_seqlen, num_kv_heads, v_head_dim]``.
        cp: the context; every rank of it must make the same call.
        mask: one of the context's masks; default the first.
        scale: multiplies ``q k^T`` before the softmax; default ``head_dim ** -0.5``.
        softcap, bias, sinks, dropout_p, seed: refused until a kernel computes them.
        return_lse: also return the log-sum-exp.

    Returns:
        ``out [batch, local_seqlen, num_heads, v_head_dim]`` in the dtype of q; with ``return_lse`` also
        ``lse [batch, num_heads, local_seqlen]``, natural log, fp32 (fp64 for fp64), differentiable.
        A query that attends nothing gives zeros and ``-inf``.

    Raises:
        ValueError: tensors or a mask that do not fit the context or each other, or ranks that disagree.
        NotImplementedError: no kernel, or not the chosen one, can compute the call; says why.
        PeerError: a peer did not come, or fell silent, within ``Options.timeout``.
    """
    q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v, cp)
    mask = _check_mask(mask, cp)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))  # what kernels ask for
    features = _features(softcap, bias, sinks, dropout_p, seed)
    q, scale = _apply_sign(q, _check_scale(scale, q))
    call = Call(
        q.device.type,
        q.dtype,
        q.shape[-1],
        v.shape[-1],
        q.shape[2],
        k.shape[2],
        cp.plans[mask].windowed,
        features,
    )
    kernel = choose(cp.kernel, call, KERNELS)
    run = Run(cp.program(mask), kernel, scale, cp.link)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    _agree(cp, mask, call, kernel, scale, q.shape[0], grad)
    if cp.options.check_nan:
        _check_finite(cp, q=q, k=k, v=v)
    out, lse = RingAttention.apply(q, k, v, run)
    return (out, lse) if return_lse else out


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k and v in its dtype, like torch's own attention; fp64 is left alone."""
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (t if t.dtype not in FLOATS or t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return q, k, v


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: must be [batch, tokens, heads, head_dim]")
        if t.dtype not in FLOATS:
            raise ValueError(f"{name} is {t.dtype}: must be float16, bfloat16, float32 or float64")
    for what, of in (
        ("dtype", lambda t: t.dtype),
        ("device", lambda t: t.device),
        ("batch", lambda t: t.shape[0]),
    ):
        if not of(q) == of(k) == of(v):
            raise ValueError(f"{what} differs: q {of(q)}, k {of(k)}, v {of(v)}; give all three the same")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)}: must agree in batch, length and heads")
    if not q.shape[-1] or not v.shape[-1]:
        raise ValueError(f"head_dim is {q.shape[-1]} and v_head_dim {v.shape[-1]}: must be at least 1")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"head_dim of q is {q.shape[-1]} and of k {k.shape[-1]}: must be equal")
    if not q.shape[2] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} heads over {k.shape[2]} KV heads: num_kv_heads must divide num_heads")
    for name, size, local, whole in (
        ("q", q.shape[1], cp.local_seqlen, f"seqlen={cp.seqlen}"),
        ("k", k.shape[1], cp.local_kv_seqlen, f"kv_seqlen={cp.kv_seqlen}"),
    ):
        if size != local:
            raise ValueError(
                f"{name} has {size} tokens, but rank {cp.rank} of {cp.world_size} holds {local} of {whole} "
                f"(layout {cp.q_layout.name}); shard with cp.shard{'_kv' if name == 'k' else ''}()"
            )


def _check_mask(mask: Mask | None, cp: ContextParallel) -> Mask:
    if mask is None:
        return cp.masks[0]
    if not isinstance(mask, Mask) or mask not in cp.plans:
        listed = "; ".join(map(str, cp.masks))
        raise ValueError(f"mask {mask} is not one of the context's ({listed}); name it in ContextParallel(mask=...)")
    return mask


def _features(
    softcap: float | None, bias: object, sinks: Tensor | None, dropout_p: float, seed: int | None
) -> frozenset[str]:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: must be at least 0 and below 1")
    if seed is not None and not dropout_p:
        raise ValueError(f"seed={seed} without dropout_p: a seed is used for dropout only; leave it out")
    asked = {
        "softcap": softcap is not None,
        "bias": bias is not None,
        "sinks": sinks is not None,
        "dropout": dropout_p > 0,
    }
    return frozenset(name for name, wanted in asked.items() if wanted)


def _check_scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("scale is a tensor that requires grad, and its gradient is not computed: multiply q by it")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: must be finite; None is head_dim ** -0.5")
    return float(scale)


def _apply_sign(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale: kernels mask with -inf before they scale."""
    if scale > 0:
        return q, scale
    return (q * -1.0, -scale) if scale < 0 else (q * 0.0, 1.0)


def _check_finite(cp: ContextParallel, **tensors: Tensor) -> None:
    """Raises on every rank if any rank holds a value that is not finite, so that no rank waits for another."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    found = f"{' and '.join(bad)} holds NaN or infinity" if bad else "all finite"
    if cp.world_size > 1:
        try:
            agree(cp.link.transport, next(cp.link.transport.calls), {"values of q, k and v": found})
        except ValueError as error:
            raise FloatingPointError(f"{error} (Options.check_nan)") from None
    if bad:
        raise FloatingPointError(f"{found} (Options.check_nan)")


def _agree(cp: ContextParallel, mask: Mask, call: Call, kernel: Kernel, scale: float, batch: int, grad: bool) -> None:
    """Ranks compare what they are about to do, at the first call of each signature."""
    number = cp.agreement((mask, call, kernel.name, scale, batch, grad))
    if number is None:
        return
    agree(
        cp.link.transport,
        number,
        {
            "version": f"ringattn {VERSION}",
            "lengths": f"seqlen {cp.seqlen}, kv_seqlen {cp.kv_seqlen}, q_offset {cp.q_offset}",
            "layout": f"{cp.q_layout.name} {cp.q_layout.digest}",
            "schedule": cp.schedule,
            "mask": f"{mask} (digest {mask.digest})",
            "kernel": kernel.name,
            "shapes": f"batch {batch}, {call}",
            "scale": repr(scale),
            "gradient": "wanted" if grad else "not wanted",
        },
    )

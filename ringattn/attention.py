"""attention(): check the call, then hand it to the dispatcher."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ringattn.arguments.tensors import FLOATS, plain
from ringattn.arguments.values import flag, number, seed_of, shown
from ringattn.comm import together
from ringattn.context import ContextParallel
from ringattn.kernels.partial import accumulator_dtype
from ringattn.kernels.scores import GREATEST, RULES, SMALLEST, Rule
from ringattn.masks import Mask
from ringattn.runtime.dispatch import PLAIN, Attention, draw, execution, looked_on
from ringattn.runtime.record import NO_SEED, CallRecord, arguments

NUMBERS = (float, int, type(None))
SYMBOLS = (torch.SymFloat, torch.SymInt)  # numbers of a graph that is not tied to their values


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cp: ContextParallel, mask: Mask | None = ..., scale: float | None = ...,
    softcap: float | None = ..., bias: Tensor | Rule | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: int | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cp: ContextParallel, mask: Mask | None = ..., scale: float | None = ...,
    softcap: float | None = ..., bias: Tensor | Rule | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
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
    bias: Tensor | Rule | None = None,
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
        softcap: scores become ``softcap * tanh(score / softcap)`` before a bias is added.
        bias: added to the logits: a tensor ``[1 or batch, 1 or num_heads, local_seqlen, kv_seqlen]``, keys in global
            order, whose gradient is computed if it requires one (this rank's rows); or a rule of positions, such
            as :func:`ringattn.alibi`.
        sinks: ``[num_heads]``, one more logit a head that takes probability and gives nothing; part of the lse. Its
            gradient is this rank's part of the sum, as that of any replicated parameter.
        dropout_p: each probability is dropped with this probability, and the others scaled by ``1 / (1 - p)``.
            Which ones depends on the seed and the global (batch, head, query, key) alone; lse is not affected.
        seed: of the dropout, the same on every rank; None takes the next of ``Options.seed``.
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
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp={shown(cp)}: must be a ringattn.ContextParallel")
    arguments = q, k, v, cp, mask, scale, softcap, bias, sinks, dropout_p, seed, return_lse
    if torch.compiler.is_compiling():
        try:
            out, lse = _attend(*arguments)
        except (ValueError, TypeError, NotImplementedError) as error:  # to be raised when the graph runs, on all ranks
            out, lse = torch.ops.ringattn.refused_attention(q, cp.handle, type(error).__name__, error.args[0])
    else:
        with together(cp.link.transport, "attention"):  # what one rank refuses, all of them refuse
            out, lse = _attend(*arguments)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, mask: Mask | None, scale: float | None,
    softcap: float | None, bias: Tensor | Rule | None, sinks: Tensor | None, dropout_p: float, seed: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    key = None
    if bias is None and sinks is None and seed is None and type(dropout_p) is float and not dropout_p:
        key = _key(q, k, v, mask, scale, softcap, return_lse)
        made = None if key is None else cp.binding.checked.get(key)
        if made is not None:
            return Attention.apply(q, k, v, made)
    call = _check(q, k, v, cp, mask, scale, softcap, bias, sinks, dropout_p, seed, return_lse)
    tensors = call.q, call.k, call.v, call.bias, call.sinks
    if looked_on(*tensors):
        out, lse, _ = torch.ops.ringattn.attention(*arguments(call))
        return out, lse
    made = execution(cp.binding, mask or cp.masks[0], call, draw(cp.binding, call.dropout_p, call.seed))
    if key is not None and call.q is q:
        cp.binding.remember(key, made)
    given = call.bias, call.rule_params, call.sinks
    extras = given if any(x is not None for x in given) else ()
    with torch.autocast(q.device.type, enabled=False):
        return Attention.apply(call.q, call.k, call.v, made, *extras)


def _key(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None, softcap: float | None, return_lse: bool
) -> Hashable:
    """What the rules of a call look at, for one that nothing but these can make another; None for the others."""
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN or looked_on():
        return None
    if q.is_nested or k.is_nested or v.is_nested or forward_ad._current_level >= 0:
        return None
    if type(scale) not in NUMBERS or type(softcap) not in NUMBERS or not (mask is None or type(mask) is Mask):
        return None
    if type(return_lse) is not bool or torch.is_autocast_enabled(q.device.type):
        return None
    grad = (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled()
    return (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.layout, k.layout,
        v.layout, mask, scale, softcap, return_lse, grad,
    )  # fmt: skip


def _check(
    q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, mask: Mask | None, scale: float | None,
    softcap: float | None, bias: Tensor | Rule | None, sinks: Tensor | None, dropout_p: float, seed: int | None,
    return_lse: bool,
) -> CallRecord:  # fmt: skip
    """The call, if all its arguments fit."""
    return_lse = flag("return_lse", return_lse)
    _check_types(q, k, v, bias, sinks)
    scale, softcap, dropout_p, seed = _check_numbers(scale, softcap, dropout_p, seed)
    q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v, cp)
    mask_handle = _mask_handle(mask, cp)
    bias, rule = (bias, None) if bias is None or isinstance(bias, Tensor) else (None, bias)
    if not torch.compiler.is_compiling():
        _check_mode(q, k, v, bias, sinks)
    _check_extras(bias, rule, sinks, q, cp)
    q, scale = _apply_sign(q, q.shape[-1] ** -0.5 if scale is None else float(scale))
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias, sinks))
    params = rule.params.to(q.device, accumulator_dtype(q.dtype)) if rule else None
    return CallRecord(
        q, k, v, bias, rule.name if rule else "", params, sinks, cp.handle, mask_handle, scale, softcap, dropout_p,
        NO_SEED if seed is None else seed, grad, return_lse and grad,
    )  # fmt: skip


def _check_types(q: object, k: object, v: object, bias: object, sinks: object) -> None:
    one_device = len({t.device for t in (q, k, v) if isinstance(t, Tensor)}) == 1  # else that is what is said of them
    for name, t in (("q", q), ("k", k), ("v", v)):
        if one_device or not isinstance(t, Tensor):
            plain(name, t)
    if sinks is not None:
        plain("sinks", sinks)
    if isinstance(bias, Tensor):
        plain("bias", bias)


def _check_numbers(
    scale: Any, softcap: Any, dropout_p: Any, seed: Any
) -> tuple[float | None, float | None, float, int | None]:
    """The numbers of a call, as plain ones unless they are symbols of a graph."""
    if scale is not None:
        scale = _check_scale(scale)
    if softcap is not None:
        softcap = number("softcap", softcap, SMALLEST, GREATEST, "; None is no cap", also=SYMBOLS, rule="a positive")
    dropout_p = number("dropout_p", dropout_p, 0.0, 1.0, ", and below 1", also=SYMBOLS)
    if dropout_p >= 1.0:
        raise ValueError(f"dropout_p={dropout_p}: must be at least 0 and below 1")
    if seed is not None and not dropout_p:
        raise ValueError(f"seed={shown(seed)} without dropout_p: a seed is used for dropout only; leave it out")
    if seed is not None and not isinstance(seed, SYMBOLS):
        seed = seed_of("seed", seed)
    return scale, softcap, dropout_p, seed


def _check_scale(scale: Any) -> float:
    if isinstance(scale, Tensor):
        if scale.requires_grad:
            raise ValueError("scale is a tensor that requires grad, and its gradient is not computed: multiply q by it")
        if plain("scale", scale).numel() != 1 or scale.dtype == torch.bool:
            raise ValueError(f"scale={shown(scale)}: must be one number; None is head_dim ** -0.5")
        scale = scale.item()
    if isinstance(scale, float) and not math.isfinite(scale):
        raise ValueError(f"scale={scale}: must be finite; None is head_dim ** -0.5")
    hint = ", and where it is not 0 at least 2**-40 either way; None is head_dim ** -0.5"
    scale = number("scale", scale, -GREATEST, GREATEST, hint, also=SYMBOLS)
    if scale and abs(scale) < SMALLEST:
        number("scale", scale, SMALLEST, GREATEST, ", or 0; None is head_dim ** -0.5")
    return scale


def _check_mode(*tensors: Tensor | None) -> None:
    """Operators without a formula drop tangents in silence."""
    if forward_ad._current_level >= 0:
        if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError("attention() has no forward-mode derivative (jvp): use reverse mode")


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k and v in its dtype, like torch's own attention; fp64 is left alone."""
    kind = q.device.type
    if q.is_meta or not torch.is_autocast_enabled(kind):  # which knows no meta device
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    q, k, v = (t if t.dtype not in FLOATS or t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    return q, k, v


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            raise ValueError(f"{name} has shape {_sizes(t)}: must be [batch, tokens, heads, head_dim]")
        if t.dtype not in FLOATS:
            raise ValueError(f"{name} is {t.dtype}: must be float16, bfloat16, float32 or float64")
    for what, of in (
        ("dtype", lambda t: t.dtype),
        ("device", lambda t: t.device),
        ("batch", lambda t: t.shape[0]),
    ):
        if not of(q) == of(k) == of(v):
            found = [int(x) if what == "batch" else x for x in map(of, (q, k, v))]
            raise ValueError(f"{what} differs: q {found[0]}, k {found[1]}, v {found[2]}; give all three the same")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {_sizes(k)} and v {_sizes(v)}: must agree in batch, length and heads")
    if not q.shape[-1] or not v.shape[-1]:
        raise ValueError(f"head_dim is {int(q.shape[-1])} and v_head_dim {int(v.shape[-1])}: must be at least 1")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"head_dim of q is {int(q.shape[-1])} and of k {int(k.shape[-1])}: must be equal")
    if not q.shape[2] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{int(q.shape[2])} heads over {int(k.shape[2])} KV heads: num_kv_heads must divide num_heads")
    if q.shape[1] != cp.local_seqlen:
        raise _wrong_length("q", q, cp.local_seqlen, f"seqlen={cp.seqlen}", cp)
    if k.shape[1] != cp.local_kv_seqlen:
        raise _wrong_length("k", k, cp.local_kv_seqlen, f"kv_seqlen={cp.kv_seqlen}", cp)


def _sizes(x: Tensor) -> str:
    """A shape whose sizes are plain numbers also while a compiler traces: the text of an error must be a constant."""
    return "(" + ", ".join([f"{int(n)}" for n in x.shape]) + (",)" if x.ndim == 1 else ")")


def _wrong_length(name: str, x: Tensor, local: int, whole: str, cp: ContextParallel) -> ValueError:
    turned = (
        f"; its dims must be [batch, tokens, heads, head_dim], and dim 2 has {local}" if x.shape[2] == local else ""
    )
    return ValueError(
        f"{name} has {int(x.shape[1])} tokens, but rank {cp.rank} of {cp.world_size} holds {local} of {whole} "
        f"(layout {cp.q_layout.name}); shard with cp.shard{'_kv' if name == 'k' else ''}(){turned}"
    )


def _mask_handle(mask: Mask | None, cp: ContextParallel) -> Tensor:
    if mask is None:
        return cp.mask_handles[0]
    if not torch.compiler.is_compiling() and (not isinstance(mask, Mask) or mask not in cp.plans):
        listed = "; ".join(map(str, cp.masks))
        raise ValueError(
            f"mask {shown(mask)} is not one of the context's ({listed}); name it in ContextParallel(mask=)"
        )
    return torch.from_numpy(mask.handle)


def _check_extras(bias: Tensor | None, rule: Rule | None, sinks: Tensor | None, q: Tensor, cp: ContextParallel) -> None:
    heads = int(q.shape[2])
    if bias is not None:
        _check_bias(bias, q, cp)
    if rule is not None and getattr(rule, "name", None) not in RULES:
        raise ValueError(f"bias={shown(rule)}: must be a tensor or a rule such as ringattn.alibi(slopes[{heads}])")
    if rule is not None and rule.params.shape[0] != heads:
        raise ValueError(
            f"{rule.name} has {rule.params.shape[0]} slopes, q has {heads} heads: ringattn.alibi(slopes[{heads}])"
        )
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype not in FLOATS or sinks.device != q.device):
        raise ValueError(
            f"sinks {_sizes(sinks)} {sinks.dtype} on {sinks.device}: must be floats [{heads}] on {q.device}"
        )


def _check_bias(bias: Tensor, q: Tensor, cp: ContextParallel) -> None:
    shape = (q.shape[0], q.shape[2], cp.local_seqlen, cp.kv_seqlen)
    fits = bias.ndim == 4 and bias.shape[0] in (1, shape[0]) and bias.shape[1] in (1, shape[1])
    if not fits or bias.shape[2:] != shape[2:] or bias.dtype not in FLOATS or bias.device != q.device:
        raise ValueError(
            f"bias {_sizes(bias)} {bias.dtype} on {bias.device}: must be floats "
            f"[1 or {int(shape[0])}, 1 or {int(shape[1])}, {shape[2]}, {shape[3]}] on {q.device}: this rank's queries, "
            "all keys in global order"
        )


def _apply_sign(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale: kernels mask with -inf before they scale."""
    if scale > 0:
        return q, scale
    return (q * -1.0, -scale) if scale < 0 else (q * 0.0, 1.0)

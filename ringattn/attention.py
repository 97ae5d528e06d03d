"""attention(): check the call, then hand it to the dispatcher."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ringattn.arguments.values import shown
from ringattn.comm import together
from ringattn.context import ContextParallel
from ringattn.kernels.scores import Rule
from ringattn.masks import Mask
from ringattn.runtime.binding import Checked
from ringattn.runtime.dispatch import PLAIN, Attention, draw, execution, looked_on
from ringattn.runtime.execution import Execution, Results
from ringattn.runtime.offload import refuse_graph, saving
from ringattn.runtime.record import arguments
from ringattn.validation import checked_call

NUMBERS = (float, int, type(None))


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cp: ContextParallel, mask: Mask | None = ..., scale: float | None = ...,
    softcap: float | None = ..., bias: Tensor | Rule | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: int | None = ..., return_max_logit: Literal[False] = ..., return_lse: Literal[False] = ..., label: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cp: ContextParallel, mask: Mask | None = ..., scale: float | None = ...,
    softcap: float | None = ..., bias: Tensor | Rule | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: int | None = ..., return_max_logit: Literal[False] = ..., return_lse: Literal[True], label: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cp: ContextParallel, mask: Mask | None = ..., scale: float | None = ...,
    softcap: float | None = ..., bias: Tensor | Rule | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: int | None = ..., return_max_logit: Literal[True], return_lse: Literal[False] = ..., label: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cp: ContextParallel, mask: Mask | None = ..., scale: float | None = ...,
    softcap: float | None = ..., bias: Tensor | Rule | None = ..., sinks: Tensor | None = ..., dropout_p: float = ...,
    seed: int | None = ..., return_max_logit: Literal[True], return_lse: Literal[True], label: str = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


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
    return_max_logit: bool = False,
    return_lse: bool = False,
    label: str = "",
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
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
        return_max_logit: also return the largest logit of each head; the same on every rank. It takes the products of q
            and k, and the way of k, once more.
        return_lse: also return the log-sum-exp.
        label: what errors, profiles and texts of waits call it, "layer 3"; ranks may differ in it.

    Returns:
        ``out [batch, local_seqlen, num_heads, v_head_dim]`` in the dtype of q; with ``return_lse`` also
        ``lse [batch, num_heads, local_seqlen]``, natural log, fp32 (fp64 for fp64), differentiable; with
        ``return_max_logit`` last ``max_logit [batch, num_heads]``, fp32, over all queries and keys of all ranks that
        attend each other, not differentiable.
        A query that attends nothing gives zeros and ``-inf``, a head of which none does a ``max_logit`` of ``-inf``.
        A logit is what the softmax takes: with scale, softcap and bias. Sinks are no key's, and do not count in it.

    Raises:
        ValueError: tensors or a mask that do not fit the context or each other, or ranks that disagree.
        NotImplementedError: no kernel, or not the chosen one, can compute the call; says why.
        PeerError: a peer did not come, or fell silent, within ``Options.timeout``.
    """
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp={shown(cp)}: must be a ringattn.ContextParallel")
    arguments = q, k, v, cp, mask, scale, softcap, bias, sinks, dropout_p, seed, return_max_logit, return_lse, label
    if torch.compiler.is_compiling():
        try:
            refuse_graph(cp.binding.shelf)
            out, lse, largest = _attend(*arguments)
        except (ValueError, TypeError, NotImplementedError) as error:  # to be raised when the graph runs, on all ranks
            refusal = type(error).__name__, error.args[0]
            out, lse, largest = torch.ops.ringattn.refused_attention(q, cp.handle, *refusal)
    else:
        called = f"attention; {label}" if label else "attention"
        with together(cp.link.transport, called):  # what one rank refuses, all of them refuse
            with saving(cp.binding.shelf, q):
                out, lse, largest = _attend(*arguments)
    if largest is not None and return_max_logit:
        return (out, lse, largest) if return_lse else (out, largest)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cp: ContextParallel, mask: Mask | None, scale: float | None,
    softcap: float | None, bias: Tensor | Rule | None, sinks: Tensor | None, dropout_p: float, seed: int | None,
    return_max_logit: bool, return_lse: bool, label: str,
) -> Results:  # fmt: skip
    if not isinstance(label, str):
        raise ValueError(f"label={shown(label)}: must be a text, such as 'layer 3'")
    key = None
    if bias is None and sinks is None and seed is None and type(dropout_p) is float and not dropout_p:
        key = _key(q, k, v, mask, scale, softcap, return_max_logit, return_lse)
        known = None if key is None else cp.binding.checked.get(key)
        if known is not None:
            made = Execution(cp.binding, known.call, known.scores, None, known.grad, "", label, known.largest)
            return Attention.apply(q, k, v, made)
    call = checked_call(
        q, k, v, cp, mask, scale, softcap, bias, sinks, dropout_p, seed, return_max_logit, return_lse, label
    )
    tensors = call.q, call.k, call.v, call.bias, call.sinks
    if looked_on(*tensors):
        out, lse, _, largest = torch.ops.ringattn.attention(*arguments(call))
        return out, lse, largest
    made = execution(
        cp.binding, cp.masks[0] if mask is None else mask, call, draw(cp.binding, call.dropout_p, call.seed)
    )
    if key is not None and call.q is q:
        cp.binding.remember(key, Checked(made.call, made.scores, made.grad, made.largest))
    given = call.bias, call.rule_params, call.sinks
    extras = given if any(x is not None for x in given) else ()
    with torch.autocast(q.device.type, enabled=False):
        return Attention.apply(call.q, call.k, call.v, made, *extras)


def _key(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float | None, softcap: float | None,
    return_max_logit: bool, return_lse: bool,
) -> Hashable:  # fmt: skip
    """What the rules of a call look at, for one that nothing but these can make another; None for the others."""
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN or looked_on():
        return None
    if q.is_meta or q.is_nested or k.is_nested or v.is_nested or forward_ad._current_level >= 0:
        return None
    if type(scale) not in NUMBERS or type(softcap) not in NUMBERS or not (mask is None or type(mask) is Mask):
        return None
    if not type(return_max_logit) is type(return_lse) is bool or torch.is_autocast_enabled(q.device.type):
        return None
    grads = (q.requires_grad, k.requires_grad, v.requires_grad) if torch.is_grad_enabled() else None
    return (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.layout, k.layout,
        v.layout, mask, scale, softcap, return_max_logit, return_lse, grads,
    )  # fmt: skip

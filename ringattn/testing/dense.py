"""Dense attention by autograd, the definition that everything is compared with. In float64 it is the truth; in the
dtype of the inputs it says how much rounding that dtype brings by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Results(NamedTuple):
    """All that a call gives and its gradients, in the dtype of the inputs.

    ``out [batch, seqlen, heads, v_head_dim]``, ``lse [batch, heads, seqlen]`` (natural log), and the gradients in the
    shapes of q, k and v.
    """

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention, with zeros and ``-inf`` where a query sees nothing; differentiable.

    Args:
        q: ``[batch, seqlen, heads, head_dim]``, float64 for the truth, any floating dtype else.
        k: ``[batch, kv_seqlen, kv_heads, head_dim]``; ``kv_heads`` divides ``heads``.
        v: ``[batch, kv_seqlen, kv_heads, v_head_dim]``.
        mask: bool ``[seqlen, kv_seqlen]``, as ``ringattn.causal().dense(seqlen, kv_seqlen)`` has it.
        scale: multiplies ``q k^T``; default ``head_dim ** -0.5``.

    Returns:
        ``out [batch, seqlen, heads, v_head_dim]`` and ``lse [batch, heads, seqlen]``, in the dtype of q.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", probs, v), lse


def dense_results(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dout: Tensor, dlse: Tensor, scale: float | None = None
) -> Results:
    """:func:`dense_attention` and its gradients for those of the outputs, ``dout`` in the shape of out and ``dlse`` in
    that of lse. Leaves the ``.grad`` of the inputs alone."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    return results(*dense_attention(inputs[0], inputs[1], inputs[2], mask, scale), dout, dlse, inputs)


def results(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, inputs: Sequence[Tensor]) -> Results:
    """Out, lse and what backward adds to the ``.grad`` of ``inputs``, the leaves q, k and v. An lse that is not finite
    has no gradient."""
    finite = lse != -torch.inf
    ((out * dout).sum() + (lse.masked_fill(~finite, 0.0) * dlse).sum()).backward()
    dq, dk, dv = (x.grad for x in inputs)
    assert dq is not None and dk is not None and dv is not None
    return Results(out.detach(), lse.detach(), dq, dk, dv)

"""FlashAttention's packages as far as their interfaces go, computed in fp32 on any device, with what is easily got
wrong: how they name an absent bound, what they overwrite, what they refuse to write to, what they compute wrongly."""

import math
from itertools import pairwise
from types import SimpleNamespace

import torch

from ringattn.kernels import Call
from tests.support.block_sparse import BACKWARD, FORWARD, BlockSparseTensorsTorch, computed_pairs

UNBOUNDED = 10**9


def attending(q, k, lo_hi, listed):
    """The pairs of one sequence: within bounds of `j - i`, and of those that are listed, if some are."""
    distance = torch.arange(k.shape[0], device=q.device) - torch.arange(q.shape[0], device=q.device)[:, None]
    seen = (distance >= lo_hi[0]) & (distance <= lo_hi[1])
    return seen if listed is None else seen & listed


def computed(q, k, v, scale, lo_hi, softcap, listed=None):
    """`out [n, H, D]` and `lse [H, n]` of one sequence."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.float() for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~attending(q, k, lo_hi, listed), -math.inf)
    lse = logits.logsumexp(-1)
    p = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return torch.einsum("hqk,khd->qhd", p, values), lse


def differentiated(q, k, v, out, dout, lse, dlse, scale, lo_hi, softcap, listed=None):
    """`dq, dk, dv` in fp32 from the *given* out and lse, as fused operators do."""
    with torch.enable_grad():
        q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        p = torch.exp(logits.detach() - lse[..., None]).masked_fill(~attending(q, k, lo_hi, listed), 0.0)
        delta = (dout.float() * out.float()).sum(-1).T - (0.0 if dlse is None else dlse)
        values = v.detach().repeat_interleave(group, 1)
        ds = p * (torch.einsum("qhd,khd->hqk", dout.float(), values) - delta[..., None])
        dv = torch.einsum("hqk,qhd->khd", p, dout.float()).unflatten(1, (-1, group)).sum(2)
        dq, dk = torch.autograd.grad(logits, (q, k), ds)
    return dq, dk, dv


def sequences(cu_q, cu_k, x):
    """The sequences of packed tensors, or the batch rows of others."""
    if cu_q is None:
        return [(slice(b, b + 1), slice(b, b + 1)) for b in range(x.shape[0])]
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32 and cu.is_contiguous()
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)]


def one(x, packed):
    return x if packed else x[0]


def check(q, k, v):
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert q.shape[-2] % k.shape[-2] == 0
    assert all(x.shape[-1] % 8 == 0 and x.shape[-1] <= 256 and x.stride(-1) == 1 for x in (q, k, v))


def forward(q, k, v, scale, bounds_of, softcap, cu=(None, None), listed=None):
    check(q, k, v)
    packed, heads = cu[0] is not None, q.shape[-2]
    shape = (heads, q.shape[0]) if packed else (q.shape[0], heads, q.shape[1])
    out, lse = q.new_empty((*q.shape[:-1], v.shape[-1])), torch.empty(shape, device=q.device)
    for rows, cols in sequences(*cu, q):
        a, b, c = one(q[rows], packed), one(k[cols], packed), one(v[cols], packed)
        o, l = computed(a, b, c, scale, bounds_of(a.shape[0], b.shape[0]), softcap, listed)
        if packed:
            out[rows], lse[:, rows] = o.to(q.dtype), l
        else:
            out[rows], lse[rows] = o.to(q.dtype)[None], l[None]
    return out, lse


def backward(q, k, v, out, dout, lse, dlse, homes, scale, bounds_of, softcap, cu=(None, None), listed=None):
    """Writes `homes`, in the dtype of q."""
    check(q, k, v)
    assert lse.is_contiguous() and lse.dtype == torch.float32
    packed = cu[0] is not None
    for rows, cols in sequences(*cu, q):
        a, o, d = (one(x[rows], packed) for x in (q, out, dout))
        b, c = (one(x[cols], packed) for x in (k, v))
        l, dl = (None if x is None else x[:, rows] if packed else x[rows][0] for x in (lse, dlse))
        found = differentiated(a, b, c, o, d, l, dl, scale, bounds_of(a.shape[0], b.shape[0]), softcap, listed)
        for home, x, where in zip(homes, found, (rows, cols, cols), strict=True):
            assert home.dtype == q.dtype and home.stride(-1) == 1
            home[where] = x.to(q.dtype) if packed else x.to(q.dtype)[None]
    return homes


def flash4(arch=9):
    """`flash_attn.cute.interface`: None is no bound, and -1 is one. With a mask of one's own forward drops what says
    causal and windows, and backward keeps it; blocks that are not listed are not computed, and full ones not asked."""
    calls = []

    def bounds(causal, left, right):
        if left is not None and right is not None and left < 0 and right < 0:
            left = right = None
        right = 0 if causal else right
        return lambda nq, nk: (
            -UNBOUNDED if left is None else nk - nq - left,
            UNBOUNDED if right is None else nk - nq + right,
        )

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, mask_mod=None, block_sparse_tensors=None, return_lse=False,
        out=None, lse=None, aux_tensors=None,
    ):  # fmt: skip
        calls.append(("forward", window_size_left, window_size_right, cu_seqlens_q, out is not None))
        assert return_lse and learnable_sink is None
        assert all(x is None or type(x) is int for x in (max_seqlen_q, max_seqlen_k))
        listed = None
        if mask_mod is not None or block_sparse_tensors is not None:
            assert cu_seqlens_q is None, "Varlen block sparsity requires block_sparse_tensors.cu_total_m_blocks."
            listed = computed_pairs(block_sparse_tensors, mask_mod, aux_tensors, q, k, arch, FORWARD)
        where = bounds(causal, window_size_left, window_size_right) if mask_mod is None else bounds(False, None, None)
        made = forward(q, k, v, softmax_scale, where, softcap, (cu_seqlens_q, cu_seqlens_k), listed)
        for given, x in ((out, made[0]), (lse, made[1])):
            if given is not None:
                assert given.dtype == x.dtype and given.shape == x.shape and given.stride(-1) == 1
                given.copy_(x)
        found = [x if given is None else given for given, x in zip((out, lse), made, strict=True)]
        return *found, None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False, dq=None, dk=None, dv=None, mask_mod=None, aux_tensors=None, block_sparse_tensors=None,
        dlse=None,
    ):  # fmt: skip
        calls.append(("backward", window_size_left, window_size_right, cu_seqlens_q, dq is not None, deterministic))
        assert dlse is None or dlse.is_contiguous()
        listed = None
        if mask_mod is not None or block_sparse_tensors is not None:
            assert cu_seqlens_q is None, "Varlen backward with block sparsity is not yet supported"
            listed = computed_pairs(block_sparse_tensors, mask_mod, aux_tensors, q, k, arch, BACKWARD, deterministic)
        homes = [torch.empty_like(x) if given is None else given for given, x in ((dq, q), (dk, k), (dv, v))]
        where = bounds(causal, window_size_left, window_size_right)
        cu = cu_seqlens_q, cu_seqlens_k
        return backward(q, k, v, out, dout, lse, dlse, homes, softmax_scale, where, softcap, cu, listed)

    return SimpleNamespace(
        _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd, calls=calls,
        BlockSparseTensorsTorch=BlockSparseTensorsTorch,
    )  # fmt: skip


def _negative(causal, left, right, absent):
    """-1 is no bound, or one at ``absent(nq, nk)`` where the other side has one."""

    def bounds(nq, nk):
        one_sided = (left < 0) != (right < 0) and not causal
        far = absent(nq, nk) if one_sided else UNBOUNDED
        low = nk - nq - (far if left < 0 else left)
        high = nk - nq + (0 if causal else far if right < 0 else right)
        return low, high

    return bounds


def flash3():
    """`flash_attn_interface`."""
    calls = []

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        sm_margin=0,
    ):  # fmt: skip
        assert out_ is None, "no tensor of one's own"
        calls.append(("forward", sm_margin))
        where = _negative(causal, window_size_left, window_size_right, lambda nq, nk: UNBOUNDED)
        out, lse = forward(q, k, v, softmax_scale, where, softcap, (cu_seqlens_q, cu_seqlens_k))
        return out, lse, None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        calls.append(("backward", sm_margin, deterministic))
        where, cu = (
            _negative(is_causal, window_size_left, window_size_right, lambda nq, nk: UNBOUNDED),
            (cu_seqlens_q, cu_seqlens_k),
        )
        backward(q, k, v, out, dout, softmax_lse, None, [dq, dk, dv], softmax_scale, where, softcap, cu)
        return softmax_lse

    return SimpleNamespace(
        _flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward, calls=calls
    )


def flash2():
    """`flash_attn.flash_attn_interface`: takes an absent bound for nk, which is wrong where there are more rows."""
    calls = []

    def bounds(causal, left, right, longest=None):
        def reach(nq, nk):
            return nk if longest is None else longest

        def found(nq, nk):
            a, b = (-1 if side >= reach(nq, nk) else side for side in (left, right))
            return _negative(causal, a, b, reach)(nq, nk)

        return found

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        calls.append(("forward",))
        assert dropout_p == 0.0 and alibi_slopes is None
        where = bounds(causal, window_size_left, window_size_right)
        return *forward(q, k, v, softmax_scale, where, softcap), None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        calls.append(("packed forward", window_size_left, window_size_right))
        where = bounds(causal, window_size_left, window_size_right, max_seqlen_k)
        return *forward(q, k, v, softmax_scale, where, softcap, (cu_seqlens_q, cu_seqlens_k)), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        calls.append(("backward", deterministic))
        where = bounds(causal, window_size_left, window_size_right)
        backward(q, k, v, out, dout, softmax_lse, None, [dq, dk, dv], softmax_scale, where, softcap)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        calls.append(("packed backward", deterministic))
        where, cu = bounds(causal, window_size_left, window_size_right, max_seqlen_k), (cu_seqlens_q, cu_seqlens_k)
        backward(q, k, v, out, dout, softmax_lse, None, [dq, dk, dv], softmax_scale, where, softcap, cu)

    return SimpleNamespace(
        _flash_attn_forward=_flash_attn_forward, _flash_attn_varlen_forward=_flash_attn_varlen_forward,
        _flash_attn_backward=_flash_attn_backward, _flash_attn_varlen_backward=_flash_attn_varlen_backward,
        calls=calls,
    )  # fmt: skip


def call_of(**changes):
    """A call on a Hopper GPU that the packages take, with changes."""
    known = {
        "device_type": "cuda", "dtype": torch.bfloat16, "head_dim": 128, "v_head_dim": 128, "num_heads": 8,
        "num_kv_heads": 2, "capability": (9, 0),
    }  # fmt: skip
    return Call(**(known | changes))

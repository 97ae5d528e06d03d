"""One tile for a kernel, what brute force in fp64 makes of it, and how far a kernel's results may be from that."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ringattn.kernels import Call, Grads, Kernel, Rows
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import TileScores
from tests.support.tiles import Window, accumulator, attends, rms

SCALE = 0.31
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# (nq, nk, window): trimmed tiles of every kind
TILES: list[tuple[int, int, Window]] = [
    (1, 1, (None, None)),
    (1, 63, (None, None)),
    (63, 1, (None, None)),
    (127, 257, (None, None)),
    (1, 1, (0, 0)),
    (63, 63, (None, 0)),
    (257, 257, (None, 0)),
    (1000, 1000, (None, 0)),
    (63, 257, (None, 0)),  # a prefix and a triangle
    (63, 257, (None, 20)),
    (257, 127, (None, 130)),  # the first row sees one key
    (257, 127, (None, 200)),
    (257, 127, (None, 131)),
    (128, 64, (None, 64)),
    (300, 299, (None, 1)),
    (64, 1, (None, 63)),
    (5, 3, (None, 3)),
    (257, 127, (3, 200)),
    (257, 127, (140, 140)),
    (300, 100, (99, None)),
    (63, 63, (0, None)),
    (257, 257, (10, None)),
    (127, 257, (140, None)),
    (257, 127, (3, None)),
    (257, 257, (0, 0)),
    (257, 257, (5, 5)),
    (1000, 1000, (63, 0)),
    (1000, 1000, (30, 17)),
    (1000, 1000, (255, 0)),
    (127, 127, (5000, 0)),
    (127, 127, (5000, 5000)),
    (257, 300, (100, 5)),
    (500, 400, (120, 150)),
    (300, 900, (620, 0)),
    (2, 1000, (998, 0)),
]


@dataclass
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    window: Window


def make_problem(
    nq: int,
    nk: int,
    window: Window,
    dtype: torch.dtype = torch.float64,
    heads: tuple[int, int] = (4, 2),
    with_dlse: bool = False,
    device: str = "cpu",
    head_dim: int = 16,
    batch: int = 2,
) -> Problem:
    num_heads, num_kv_heads = heads
    q, dout = (torch.randn(batch, nq, num_heads, head_dim).to(device, dtype) for _ in range(2))
    k, v = (torch.randn(batch, nk, num_kv_heads, head_dim).to(device, dtype) for _ in range(2))
    dlse = torch.randn(batch, num_heads, nq).to(device, accumulator(dtype)) if with_dlse else None
    return Problem(q, k, v, dout, dlse, window)


def autograd_result(p: Problem, dtype: torch.dtype, given_out: Tensor | None = None) -> list[Tensor]:
    """`out, lse, dq, dk, dv` by plain autograd through an explicit softmax, computed in `dtype`.

    Backward is given an out that was rounded to the storage dtype and enters by delta = rowsum(dout * out) alone,
    just as a gradient of lse does; so `given_out` moves the exact gradients to what is asked of a kernel.
    """
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (p.q, p.k, p.v))
    dout = p.dout.to(dtype)
    group = q.size(2) // k.size(2)
    keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, keys) * SCALE
    scores = scores.masked_fill(~attends(q.size(1), k.size(1), p.window).to(q.device), -math.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)
    dlse = torch.zeros_like(lse) if p.dlse is None else p.dlse.to(dtype)
    if given_out is not None:
        dlse = dlse + (dout * (out.detach() - given_out.to(dtype))).sum(-1).transpose(1, 2)
    loss = (out * dout).sum() + (lse * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))]


def empty_partial(p: Problem, fill: float = math.nan) -> Partial:
    shape = (*p.q.shape[:3], p.v.size(-1))
    dtype = accumulator(p.q.dtype)
    out = torch.full(shape, fill, dtype=dtype, device=p.q.device)
    return Partial(out, torch.full((shape[0], shape[2], shape[1]), fill, dtype=dtype, device=p.q.device))


def rows_of(p: Problem, acc: Partial) -> Rows:
    """The query side of backward as the ring prepares it, out in the storage dtype."""
    out = acc.out.to(p.q.dtype)
    delta = (p.dout.to(acc.out.dtype) * out.to(acc.out.dtype)).sum(-1).transpose(1, 2)
    if p.dlse is not None:
        delta = delta - p.dlse
    return Rows(p.q, p.dout, out, acc.lse, delta, p.dlse)


def zero_grads(p: Problem) -> Grads:
    dtype = accumulator(p.q.dtype)
    return Grads(*(torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (p.q, p.k, p.v)))


WANTED = ((True, False, False), (False, True, False), (False, False, True), (True, False, True))  # of dq, dk and dv


def some_grads(p: Problem, wanted: tuple[bool, bool, bool]) -> Grads:
    """Zeros for those that are wanted, None for the others."""
    zeros = zero_grads(p)
    dq, dk, dv = (x if asked else None for x, asked in zip((zeros.dq, zeros.dk, zeros.dv), wanted, strict=True))
    return Grads(dq, dk, dv)


def check_wanted(grads: Grads, wanted: tuple[bool, bool, bool], whole: Grads) -> None:
    """Asserts that they are what they are among all three."""
    pairs = (grads.dq, whole.dq), (grads.dk, whole.dk), (grads.dv, whole.dv)
    for (found, truth), asked in zip(pairs, wanted, strict=True):
        assert (found is not None) == asked
        if asked:
            torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)


def kernel_result(kernel: Kernel, p: Problem) -> list[Tensor]:
    acc, grads = empty_partial(p), zero_grads(p)
    kernel.forward_tile(p.q, p.k, p.v, TileScores(p.window, SCALE), acc, fresh=True)
    kernel.backward_tile(rows_of(p, acc), p.k, p.v, TileScores(p.window, SCALE), grads)
    return [acc.out, acc.lse, grads.dq, grads.dk, grads.dv]


def skip_refused(kernel: Kernel, p: Problem) -> None:
    windowed, capability = p.window != (None, None), torch.cuda.get_device_capability() if p.q.is_cuda else (0, 0)
    dims = p.q.size(3), p.v.size(3), p.q.size(2), p.k.size(2)
    call = Call(p.q.device.type, p.q.dtype, *dims, windowed, dlse=p.dlse is not None, capability=capability)
    reason = kernel.needs.lacking(call) or kernel.refuse(call)
    if reason is not None:
        pytest.skip(f"{kernel.name} refuses: {reason}")


def single_device_errors(p: Problem, precision: torch.dtype) -> list[float]:
    """Errors of `out, dq, dk, dv` by PyTorch's scaled_dot_product_attention in `precision`, against fp64."""
    q, k, v = (x.detach().to(precision).requires_grad_() for x in (p.q, p.k, p.v))
    mask = attends(q.size(1), k.size(1), p.window).to(q.device)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=SCALE, enable_gqa=True).transpose(1, 2)
    got = [out.detach(), *torch.autograd.grad(out, (q, k, v), p.dout.to(precision))]
    exact = autograd_result(replace(p, dlse=None), torch.float64)
    return [rms(x - y) for x, y in zip(got, [exact[0], *exact[2:]], strict=True)]


def assert_within_law(kernel: Kernel, p: Problem) -> None:
    """At most twice the error of a same-precision single-device computation, or a few ulp of what is summed."""
    skip_refused(kernel, p)
    got = kernel_result(kernel, p)
    given_out = got[0].to(p.q.dtype)
    exact = autograd_result(p, torch.float64, given_out)
    # On CUDA 16-bit operators give 16-bit results, and Triton's products are of 16-bit factors; everywhere else kernels
    # owe fp32 whatever the storage.
    in_storage = kernel.name == "triton" or (p.q.is_cuda and kernel.name not in ("blockwise", "reference"))
    precision = p.q.dtype if in_storage else accumulator(p.q.dtype)
    independent = autograd_result(p, precision, given_out)
    peers = dict(zip(("out", "dq", "dk", "dv"), single_device_errors(p, precision), strict=True))
    size_of_gradients = max(x.abs().max().item() for x in exact[2:])
    sizes = [p.v.abs().max().item(), exact[1].abs().max().item(), *[size_of_gradients] * 3]
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        peer = max(rms(independent[i] - exact[i]), peers.get(name, 0.0))
        allowed = max(2 * peer, 2 * torch.finfo(precision).eps * sizes[i])
        error = rms(got[i] - exact[i])
        assert error <= allowed, (name, error, allowed)


def assert_few_roundings(kernel: Kernel, p: Problem) -> None:
    """Within a few roundings of the dtype, by what is exact for the inputs given, of a kernel that makes delta."""
    acc, grads, scores = empty_partial(p), zero_grads(p), TileScores(p.window, SCALE)
    kernel.forward_tile(p.q, p.k, p.v, scores, acc, fresh=True)
    kernel.backward_tile(replace(rows_of(p, acc), delta=None), p.k, p.v, scores, grads)
    exact = autograd_result(p, torch.float64, acc.out.to(p.q.dtype))
    eps = torch.finfo(p.q.dtype).eps
    for got, want in zip([acc.out, acc.lse, grads.dq, grads.dk, grads.dv], exact, strict=True):
        assert rms(got - want) <= eps * max(1.0, want.abs().max().item())


def make_call(**changes: object) -> Call:
    call = {
        "device_type": "cpu",
        "dtype": torch.float32,
        "head_dim": 64,
        "v_head_dim": 64,
        "num_heads": 4,
        "num_kv_heads": 4,
        "windowed": False,
        "features": frozenset(),
    }
    return Call(**(call | changes))  # type: ignore[arg-type]

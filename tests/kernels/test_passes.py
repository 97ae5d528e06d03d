"""The passes as Triton kernels, run by its interpreter, beside their forms of PyTorch's own operators."""

import math
import threading
from types import SimpleNamespace

import pytest
import torch

import ringattn as ra
from ringattn.kernels import passes
from ringattn.kernels.partial import Partial, fold, merge
from ringattn.testing import dense_results

fused = pytest.importorskip("ringattn.kernels.passes_triton")
# the interpreter computes with NumPy, which warns of inf - inf and of NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]


def partial(batch, n, heads, dim, dtype, lse_dtype):
    out = torch.randn(batch, n, heads, dim).to(DEVICE, dtype)
    return Partial(out, (3 * torch.randn(batch, heads, n)).to(DEVICE, lse_dtype))


@pytest.mark.parametrize("block", [*HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 37, 3, 20), (1, 130, 2, 128)], ids=str)
def test_fold_is_the_merge_of_partial_results(shape, block):
    wide = torch.float64 if block == torch.float64 else torch.float32
    acc, new = partial(*shape, wide, torch.float64), partial(*shape, block, torch.float32)
    acc.lse[0, 0, 0] = -math.inf
    new.lse[-1, -1, -1] = -math.inf
    want = merge(acc, Partial(new.out.to(wide), new.lse.double()))
    fused.fold(acc.out, acc.lse, new.out[None], new.lse[None])
    torch.testing.assert_close(acc.out, want.out, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(acc.lse, want.lse, rtol=1e-14, atol=1e-14)


def test_fold_of_rows_that_saw_nothing_and_of_nan():
    acc, new = (partial(1, 4, 1, 16, torch.float32, torch.float64) for _ in range(2))
    for part, lse in ((acc, [-math.inf, -math.inf, 1.0, math.nan]), (new, [-math.inf, 2.0, math.nan, 1.0])):
        part.lse[0, 0] = torch.tensor(lse)
    acc.out[0, :2] = 0.0
    new.out[0, 0] = 0.0
    fused.fold(acc.out, acc.lse, new.out[None], new.lse[None])
    assert acc.lse[0, 0, 0] == -math.inf and not acc.out[0, 0].any()
    assert acc.lse[0, 0, 1] == 2.0 and torch.equal(acc.out[0, 1], new.out[0, 1])
    assert acc.lse[0, 0, 2:].isnan().all() and acc.out[0, 2:].isnan().all()


@pytest.mark.parametrize("count", [2, 5])
def test_several_results_are_folded_in_one_pass(count):
    acc, new = (partial(2, 23, 3, 16, torch.float32, torch.float64) for _ in range(2))
    blocks, lses = torch.randn(count, 2, 23, 3, 16).to(DEVICE, HALF[0]), 3 * torch.randn(count, 2, 3, 23, device=DEVICE)
    lses[1, 0, 0, :5] = -math.inf
    new.out.copy_(acc.out), new.lse.copy_(acc.lse)
    fused.fold(acc.out, acc.lse, blocks, lses)
    for block, lse in zip(blocks, lses, strict=True):
        fold(new, block, lse)
    torch.testing.assert_close(acc.out, new.out, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(acc.lse, new.lse, rtol=1e-14, atol=1e-14)


def test_fold_takes_views_and_leaves_what_lies_between():
    whole, new = partial(2, 40, 6, 24, torch.float32, torch.float64), partial(2, 13, 2, 24, *HALF[:1], torch.float32)
    rows, heads = slice(1, 40, 3), slice(2, 4)
    acc, before = whole.rows(rows).heads(heads), Partial(whole.out.clone(), whole.lse.clone())
    want = merge(acc, Partial(new.out.float(), new.lse.double()))
    block = torch.randn(2, 2, 13, 24).to(DEVICE, HALF[0]).transpose(1, 2).copy_(new.out)
    lse = new.lse.transpose(1, 2).contiguous().transpose(1, 2)
    fused.fold(acc.out, acc.lse, block[None], lse[None])
    torch.testing.assert_close(acc.out, want.out, rtol=2e-6, atol=1e-6)
    before.rows(rows).heads(heads).out.copy_(want.out)
    torch.testing.assert_close(whole.out, before.out, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("source", [*HALF, torch.float32], ids=str)
def test_gradients_are_added_or_written(source, fresh):
    whole = torch.full((2, 30, 5, 40), math.nan if fresh else 1.0, device=DEVICE)
    target = whole[:, 1:29:2, 1:4]
    part = torch.randn(2, 3, 14, 48).to(DEVICE, source)[..., :40].transpose(1, 2)  # head-major, with padding columns
    fused.accumulate([(target, part)], fresh)
    torch.testing.assert_close(target, part.float() + (0.0 if fresh else 1.0))
    others = torch.ones(whole.shape, dtype=torch.bool, device=DEVICE)
    others[:, 1:29:2, 1:4] = False
    assert (whole[others].isnan() if fresh else whole[others] == 1.0).all()


def test_keys_and_values_of_their_own_sizes_are_packed_in_one_launch():
    k, v = (torch.randn(2, 20, 3, dim).to(DEVICE, HALF[0]) for dim in (16, 24))
    row = torch.full((9, 2, 3, 40), math.nan, device=DEVICE, dtype=HALF[0]).transpose(0, 1)
    pairs = [(row[..., :16], k[:, 1:19:2]), (row[..., 16:], v[:, 1:19:2])]
    fused.accumulate(pairs, True)
    assert torch.equal(row, torch.cat([k, v], -1)[:, 1:19:2])
    wide = row.float()
    fused.accumulate([(wide[..., :16], row[..., :16]), (wide[..., 16:], row[..., 16:])], False)
    assert torch.equal(wide, 2 * row.float())


def test_nothing_is_folded_and_added_where_there_is_nothing():
    acc = partial(1, 0, 2, 16, torch.float32, torch.float64)
    fused.fold(acc.out, acc.lse, acc.out[None], acc.lse[None])
    fused.accumulate([(acc.out, acc.out)], False)


def test_a_ring_takes_the_fused_passes(monkeypatch):
    """Every schedule, with results and gradients as with PyTorch's operators."""
    seqlen, made, alone = 60, [], threading.Lock()  # the interpreter is for one thread at a time

    def locked(function):
        def call(*args):
            with alone:
                function(*args)

        return call

    kernels = SimpleNamespace(fold=locked(fused.fold), accumulate=locked(fused.accumulate))
    monkeypatch.setattr(passes, "fused_for", lambda x: made.append(x.shape) or kernels)
    q, dout = (torch.randn(1, seqlen, 2, 16, dtype=torch.float64, device=DEVICE) for _ in range(2))
    k, v = (torch.randn(1, seqlen, 1, 16, dtype=torch.float64, device=DEVICE) for _ in range(2))
    dlse = torch.zeros(1, 2, seqlen, dtype=torch.float64, device=DEVICE)
    want = dense_results(q, k, v, ra.causal().dense(seqlen, seqlen), dout, dlse)
    for schedule in ("ring", "exchange", "gather"):

        def one_rank(transport, schedule=schedule):
            cp = ra.ContextParallel(transport, seqlen, schedule=schedule, kernel="reference")
            local = [cp.shard(x).requires_grad_() for x in (q, k, v)]
            out = ra.attention(*local, cp=cp)
            out.backward(cp.shard(dout))
            return [cp.unshard(x) for x in (out.detach(), *(x.grad for x in local))]

        found = ra.Loopback(2).run(one_rank)
        for rank in found:
            for a, b in zip(rank, (want.out, want.dq, want.dk, want.dv), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert made
    acc = partial(1, 3, 1, 16, torch.float32, torch.float64)
    fold(acc, acc.out.clone(), acc.lse.clone())
    assert made[-1] == acc.out.shape

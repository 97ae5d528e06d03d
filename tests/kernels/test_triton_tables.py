"""The `triton` kernel on tables of many tiles, and through the whole ring.

Without a GPU, Triton's interpreter runs it, some milliseconds for each block of scores.
"""

import math

import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.kernels import KERNELS, Call, Grads, Rows, tile_calls
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Scores
from ringattn.testing import Results, dense_results
from tests.support import cases
from tests.support.grids import mostly_slow
from tests.support.one_tile import DEVICES
from tests.support.ring import on_ranks, tensors
from tests.support.tables import MASKS, SEQLEN
from tests.support.tiles import rms

TRITON, BLOCKWISE = (next(kernel for kernel in KERNELS if kernel.name == name) for name in ("triton", "blockwise"))
HEADS, KV_HEADS, DIM = 2, 1, 16


@pytest.fixture(autouse=True)
def _interpreted():
    pytest.importorskip("triton")


def computed(kernel, program, inputs, dtype, device):
    """A rank's results and gradients, step by step; nothing that is not to be read can be."""
    q, dout, *keys = (x.to(device, dtype) for x in inputs)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores, asked = Scores(0.3), Call(device, dtype, DIM, DIM, HEADS, KV_HEADS)
    works = [work for turn in program.forward for work in turn.work if work.queries is None]  # its own queries
    acc = Partial.empty(1, q.shape[1], HEADS, DIM, wide, device)
    if not program.blank:
        acc.out.fill_(math.nan), acc.lse.fill_(math.nan)
    parts = []
    for work in works:
        frames = work.q_frame, work.k_frame
        calls = tile_calls(work.tiles, work.launches, frames, scores, slice(0, HEADS), torch.device(device))
        k, v = (x[:, : work.k_frame.size].contiguous() for x in keys)
        parts.append((kernel.ready(calls, asked), k, v))
        kernel.forward(q, k, v, parts[-1][0], acc)
    delta = (dout.to(wide) * acc.out).sum(-1).transpose(1, 2)
    rows, found = Rows(q, dout, acc.out.to(dtype), acc.lse.to(wide), delta, None), [acc.out, acc.lse]
    dq = torch.zeros_like(q, dtype=wide)
    for calls, k, v in parts:
        grads = Grads(dq, torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide))
        kernel.backward(rows, k, v, calls, grads)
        found += [grads.dk, grads.dv]
    return [*found, dq]


def assert_within_law(found, exact, peer, name):
    """At most twice the error of the peer, or a few roundings of what is summed."""
    alive = exact.isfinite()
    assert torch.equal(found.isfinite().cpu(), alive), name
    if alive.any():
        found, exact, peer = (x.cpu().double()[alive] for x in (found, exact, peer))
        size, error = exact.abs().max().item(), rms(found - exact)
        assert error <= max(2 * rms(peer - exact), 2 * torch.finfo(torch.float32).eps * size), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", mostly_slow(MASKS, ("causal", "chunked", "scattered globals")))
def test_tables(name, device):
    """Of a rank in a ring of two: its own tokens, then those of the other; and twice with the same bits."""
    layout = "striped" if name in ("strided", "dilated") else "zigzag"
    settings = {"mask": MASKS[name], "layout": layout, "schedule": "ring"}
    program = ra.ContextParallel(PlanningRank(1, 2), SEQLEN, **settings).program(MASKS[name])
    half = SEQLEN // 2
    inputs = [torch.randn(1, half, heads, DIM) for heads in (HEADS, HEADS, KV_HEADS, KV_HEADS)]
    exact = computed(BLOCKWISE, program, inputs, torch.float64, "cpu")
    peer = computed(BLOCKWISE, program, inputs, torch.float32, "cpu")
    found = computed(TRITON, program, inputs, torch.float32, device)
    for i, three in enumerate(zip(found, exact, peer, strict=True)):
        assert_within_law(*three, f"result {i}")
    if name == "scattered globals":
        again = computed(TRITON, program, inputs, torch.float32, device)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


SHAPE = {"batch": 1, "heads": 2, "kv_heads": 1, "dtype": torch.float32}
RING = [
    ("causal", "ring", "zigzag"),
    ("documents_window_globals", "exchange", "balanced"),
    ("strided", "gather", "striped"),
    ("global_scattered", "ring", "contiguous"),
    *(
        pytest.param(name, *way, marks=pytest.mark.slow)
        for name, way in zip(
            ("full", "longformer", "dilated", "causal_minus_window", "full_minus_strided", "prefix"),
            2 * (("ring", "striped"), ("exchange", "zigzag"), ("gather", "contiguous")),
            strict=True,
        )
    ),
]


@pytest.mark.parametrize(("name", "schedule", "layout"), RING)
def test_the_whole_ring(name, schedule, layout):
    mask = cases.ALL[name][0]
    given = tensors(**SHAPE)
    q, k, v, dout, dlse = given
    dense = mask.dense(q.shape[1], k.shape[1])
    peer = dense_results(q, k, v, dense, dout, dlse)
    exact = dense_results(*(x.double() for x in (q, k, v)), dense, dout.double(), dlse.double())
    ranks = on_ranks(3, mask, sizes=SHAPE, kernel="triton", schedule=schedule, layout=layout)
    for found in ranks:
        for field, *three in zip(Results._fields, found, exact, peer, strict=True):
            assert_within_law(*three, field)


@pytest.mark.slow
def test_scores_through_the_ring():
    """All that may become of scores at once, as `blockwise` does it: ranks hold other heads, rows and positions."""
    mask, seqlen = cases.ALL["documents_window_globals"][0], cases.SEQLEN
    q, k, v, dout, _ = tensors(**SHAPE)
    bias = torch.randn(1, 2, seqlen, seqlen)

    def one_rank(transport, kernel, **scores):
        cp = ra.ContextParallel(transport, seqlen, mask=mask, kernel=kernel, schedule="ring", layout="zigzag")
        inputs = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        local = [*map(cp.shard, inputs[:3])]
        rows = {"bias": ra.alibi([0.5, 0.25])} if scores.pop("alibi") else {"bias": cp.shard(inputs[3], dim=2)}
        out = ra.attention(*local, cp=cp, softcap=2.0, dropout_p=0.3, seed=5, **rows)
        (cp.unshard(out) * dout).sum().backward()
        return [cp.unshard(out).detach(), *(x.grad for x in inputs if x.grad is not None)]

    for alibi in (True, False):
        ours, theirs = (
            ra.Loopback(3).run(lambda transport, kernel=kernel, alibi=alibi: one_rank(transport, kernel, alibi=alibi))
            for kernel in ("triton", "blockwise")
        )
        for mine, other in zip(ours, theirs, strict=True):
            for a, b in zip(mine, other, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
def test_a_call_can_be_captured_in_a_cuda_graph():
    seqlen = 1000
    cp = ra.ContextParallel(None, seqlen, mask=MASKS["longformer"], kernel="triton")
    q, k, v = (torch.randn(1, seqlen, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    want = ra.attention(q, k, v, cp=cp)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ra.attention(q, k, v, cp=cp)
    found.zero_()
    graph.replay()
    assert torch.equal(found, want)

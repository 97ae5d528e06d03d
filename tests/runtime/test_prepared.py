"""A call is prepared once: the next one of its kind makes nothing but its results, and no memory is held twice."""

import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ringattn as ra
from ringattn.kernels import KERNELS
from ringattn.kernels.calls import TileKernel
from ringattn.kernels.scores import Scores
from ringattn.runtime import binding
from ringattn.runtime.dispatch import kind_of
from ringattn.runtime.execution import Execution
from ringattn.testing import InstantRank

TOKENS, HEADS, DIM = 48, 2, 8


class Idle(TileKernel):
    """A kernel that writes what it is given, and makes nothing."""

    name = "idle"

    def refuse(self, call):
        return None

    def ready(self, calls, call):
        return calls

    def forward(self, q, k, v, calls, acc):
        for call in calls.calls:
            rows = slice(None) if call.q is None else call.q
            acc.out[:, rows].fill_(float(k.shape[1]))
            acc.lse[:, :, rows].fill_(1.0)

    def backward(self, rows, k, v, calls, grads):
        grads.dq.add_(1.0), grads.dk.add_(1.0), grads.dv.add_(1.0)


class Made(TorchDispatchMode):
    """Counts the numbers of new memory that operators make."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.sizes.append((str(func), x.numel()))
        return out


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(binding, "KERNELS", (Idle(), *KERNELS))


def context(world, **settings):
    return ra.ContextParallel(InstantRank(1, world), world * TOKENS, layout="zigzag", **settings)


def inputs():
    return [torch.randn(1, TOKENS, HEADS, DIM) for _ in range(3)]


def buffers(cp):
    return {buffer.data_ptr() for buffer in cp.link.workspace.buffers()}


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
def test_a_second_call_allocates_its_results_alone(schedule, idle):
    cp = context(4, schedule=schedule)
    q, k, v = inputs()
    scores, dout = Scores(0.5), torch.randn(1, TOKENS, HEADS, DIM)
    call = Execution(cp.binding, cp.binding.prepared(ra.causal(), kind_of(q, k, v), scores, False), scores)
    for _ in range(2):
        before = buffers(cp)
        with Made() as seen:
            out, lse, _ = call.forward(q, k, v)
            call.backward(q, k, v, out, lse, dout, None, False)
    assert before and before == buffers(cp), "not even to be replaced"
    whole, rows = TOKENS * HEADS * DIM, TOKENS * HEADS
    # out, the gradients, and lse: as it is given, and while it runs, in fp64, where results are merged
    assert call.call.program.merges == (schedule != "gather")
    lse = [rows] * (1 + call.call.program.merges)
    assert sorted(size for _, size in seen.sizes) == [*lse, whole, whole, whole, whole], seen.sizes


def test_views_of_buffers_go_with_the_memory():
    cp = context(4, schedule="exchange")
    small, large = inputs(), [torch.randn(3, TOKENS, HEADS, DIM) for _ in range(3)]
    ra.attention(*small, cp=cp)
    before = [weakref.ref(buffer) for buffer in cp.link.workspace.buffers()]
    assert before and all(buffer() is not None for buffer in before)
    ra.attention(*large, cp=cp)
    assert all(buffer() is None for buffer in before), "a prepared call keeps no memory that has been replaced"
    grown = buffers(cp)
    ra.attention(*small, cp=cp)
    assert buffers(cp) == grown


def test_what_is_checked_once_is_checked_again_where_anything_differs():
    cp = ra.ContextParallel(None, TOKENS, mask=(ra.causal(), ra.full()))
    q, k, v = inputs()
    ra.attention(q, k, v, cp=cp)
    assert len(cp.binding.checked) == 1
    for wrong in ({"scale": True}, {"softcap": "x"}, {"mask": ra.chunked(3)}, {"return_lse": 1}, {"dropout_p": False}):
        with pytest.raises(ValueError):
            ra.attention(q, k, v, cp=cp, **wrong)
    for args in ((q[:, 1:], k, v), (q, k.double(), v), (q, k[..., :4], v), (q.to_sparse(), k, v), (q.to("meta"), k, v)):
        with pytest.raises(ValueError):
            ra.attention(*args, cp=cp)
    assert len(cp.binding.checked) == 1
    full = ra.attention(q, k, v, cp=cp, mask=ra.full())
    assert not torch.equal(full, ra.attention(q, k, v, cp=cp)) and len(cp.binding.checked) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert ra.attention(q, k, v, cp=cp).dtype == torch.bfloat16
    assert ra.attention(q, k, v, cp=cp).dtype == torch.float32
    assert torch.equal(ra.attention(-q, k, v, cp=cp, scale=-1.0), ra.attention(q, k, v, cp=cp, scale=1.0))
    q.requires_grad_()
    ra.attention(q, k, v, cp=cp).sum().backward()
    assert q.grad is not None


def test_a_context_is_let_go_of():
    """What is prepared and checked refers to no context: none is kept until the cycles are collected."""
    cp = ra.ContextParallel(None, TOKENS)
    q, k, v = (x.requires_grad_() for x in inputs())
    ra.attention(q, k, v, cp=cp).sum().backward()
    kept = weakref.ref(cp.binding)
    gc.disable()
    try:
        del cp
        assert kept() is None
    finally:
        gc.enable()


def test_a_context_that_was_copied_attends():
    """As a copied module does that holds one: an average of weights, say."""
    cp, (q, k, v) = ra.ContextParallel(None, TOKENS, mask=ra.longformer(3, 2)), inputs()
    right = ra.attention(q, k, v, cp=cp)
    assert torch.equal(ra.attention(q, k, v, cp=copy.deepcopy(cp)), right)


def test_ranks_whose_later_contexts_differ_are_told():
    """Not only in the first call of its kind: shapes, schedule and mask are the same, lengths or layouts are not."""

    def later(transport, change):
        cp = ra.ContextParallel(transport, 4 * TOKENS, layout="contiguous", schedule="ring")
        q, k, v = inputs()
        ra.attention(q, k, v, cp=cp)
        ra.attention(q, k, v, cp=cp.replace(**change(transport.rank)))

    offsets = {"kv_seqlen": 4 * TOKENS}
    for change, said in (
        (lambda rank: {"layout": ("contiguous", "zigzag", "striped", "zigzag")[rank]}, "layout"),
        (lambda rank: {**offsets, "q_offset": rank // 2}, "lengths"),
        (lambda rank: {"options": ra.Options(rates=ra.Rates(6e10, 6e10 + rank))}, "planned for"),
    ):
        with pytest.raises(ValueError, match=said):
            ra.Loopback(4, timeout=10).run(lambda transport, change=change: later(transport, change))

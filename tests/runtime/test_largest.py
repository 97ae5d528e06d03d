"""The largest logit of each head: on every rank that of all queries and keys which attend each other."""

import functools
import itertools

import pytest
import torch

import ringattn as ra
from ringattn.comm import CallMismatch
from ringattn.kernels.scores import Scores
from ringattn.planning.program import Row
from ringattn.planning.topology import Topology
from ringattn.runtime.dispatch import kind_of
from ringattn.testing import run_processes
from tests.support import cases
from tests.support.grids import mostly_slow
from tests.support.ring import S, tensors

SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02], dtype=torch.float64)
ROUNDED = 2**-23  # relative: what fp64 computes in any order, as fp32


def made(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definition(q, k, seen, scale=None, softcap=None, bias=None, slopes=None):
    """Written out, with every feature, in fp64."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    if slopes is not None:
        positions = torch.arange(logits.shape[-1])
        logits = logits - slopes[:, None, None] * (positions[: logits.shape[-2], None] - positions).abs()
    return logits.masked_fill(~seen, -torch.inf).amax((2, 3))


def on_ranks(world, inputs, call=None, bias=None, **settings):
    """What each rank of a world finds for these whole q, k and v."""

    def one_rank(transport):
        cp = ra.ContextParallel(transport, inputs[0].shape[1], **settings)
        local = [door(x) for door, x in zip((cp.shard, cp.shard_kv, cp.shard_kv), inputs, strict=True)]
        given = {} if bias is None else {"bias": cp.shard(bias, dim=2)}
        return ra.attention(*local, cp=cp, return_max_logit=True, **given, **(call or {}))[-1]

    return ra.Loopback(world, timeout=20).run(one_rank)


def check(ranks, expected):
    for found in ranks:
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found.double(), expected, rtol=ROUNDED, atol=0)


@functools.cache
def of_single_process(name):
    q, k, *_ = tensors(v_dim=5)
    return definition(q, k, cases.ALL[name][0].dense(S, S))


NODES = ra.Options(topology=Topology(ra.Link(1e9), ra.Link(1e8), 2))
WAYS = {
    "alone": (1, {}),
    "ring": (3, {"schedule": "ring", "layout": "striped"}),
    "gather": (2, {"schedule": "gather", "layout": "zigzag"}),
    "exchange": (4, {"schedule": "exchange", "layout": "contiguous"}),
    "double_ring": (4, {"schedule": "double_ring", "layout": "balanced", "options": NODES}),
    "heads": (4, {"ulysses": 2, "layout": "zigzag", "options": ra.Options(head_chunks=2)}),
    "unequal heads": (3, {"ulysses": 3, "schedule": "ring"}),
}
FAST = [
    *itertools.product(("documents_window_globals",), WAYS),
    *zip(("causal", "full", "global_scattered", "strided", "causal_minus_window"), WAYS, strict=False),
]


SLOW = [case for case in itertools.product(cases.ALL, ("ring", "gather", "heads")) if case not in FAST]


@pytest.mark.parametrize("case", mostly_slow([*FAST, *SLOW], FAST), ids=str)
def test_every_mask_layout_and_schedule(case, poison):
    name, way = case
    world, settings = WAYS[way]
    check(on_ranks(world, tensors(v_dim=5)[:3], mask=cases.ALL[name][0], **settings), of_single_process(name))


def test_queries_that_travel_bring_theirs_home(poison):
    seqlen, mask = 150, ra.longformer(5, 2, causal=False)
    inputs = tensors(seqlen, seqlen, batch=1)[:3]

    def one_rank(transport):
        cp, sent = ra.ContextParallel(transport, seqlen, mask=mask, layout="contiguous"), []
        for asked in (False, True):
            found = ra.attention(*map(cp.shard, inputs), cp=cp, bias=ra.alibi(SLOPES), return_max_logit=asked)
            sent.append(cp.traffic()["sent"].get("forward partial", 0))
        assert sent[1] > 2 * sent[0] or not sent[0]
        return sent[0], found[1]

    ranks = ra.Loopback(4, timeout=20).run(one_rank)
    assert any(sent for sent, _ in ranks)
    check([found for _, found in ranks], definition(*inputs[:2], mask.dense(seqlen, seqlen), slopes=SLOPES))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_no_ranks_largest_is_ignored(world):
    """The largest is planted in the queries of each rank in turn."""
    q, k, v, *_ = tensors(heads=2, kv_heads=1)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, mask=ra.causal(), layout="contiguous")
        found = []
        for owner in range(world):
            planted = cp.shard(q) * (1e3 if cp.rank == owner else 1.0)
            found.append(ra.attention(planted, cp.shard(k), cp.shard(v), cp=cp, return_max_logit=True)[1])
        return cp.position_ids, found

    ranks = ra.Loopback(world, timeout=20).run(one_rank)
    for owner, (positions, _) in enumerate(ranks):
        planted = q.clone()
        planted[:, positions] *= 1e3
        check([found[owner] for _, found in ranks], definition(planted, k, ra.causal().dense(S, S)))


FEATURES = {
    "scale": ({"scale": -0.7}, {"scale": -0.7}, None),
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}, None),
    "bias": ({}, {}, made(3, 2, 4, S, S)),
    "bias for all heads": ({"softcap": 2.0}, {"softcap": 2.0}, made(4, 1, 1, S, S)),
    "alibi": ({"bias": ra.alibi(SLOPES)}, {"slopes": SLOPES}, None),
    "sinks are no keys": ({"sinks": torch.full((4,), 99.0)}, {}, None),
    "dropout": ({"dropout_p": 0.9, "seed": 1}, {}, None),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature):
    call, theirs, bias = FEATURES[feature]
    inputs, mask = tensors()[:3], cases.ALL["documents_window_globals"][0]
    expected = definition(*inputs[:2], mask.dense(S, S), bias=bias, **theirs)
    world, settings = WAYS["heads"]
    check(on_ranks(world, inputs, call, bias, mask=mask, **settings), expected)


@pytest.mark.parametrize("kernel", ["sdpa", "blockwise", "reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_whatever_the_kernel(kernel):
    inputs = [x.float() for x in tensors()[:3]]
    first, *others = on_ranks(2, inputs, mask=ra.causal(), kernel=kernel)
    expected = definition(*inputs[:2], ra.causal().dense(S, S))
    assert (first - expected).abs().max() <= rounding(*inputs[:2])
    assert all(torch.equal(first, other) for other in others)


def rounding(q, k):
    """How far an fp32 dot product of these may be off: a rounding for each of its terms, of the sum of their sizes."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    sizes = torch.einsum("bqhd,bkhd->bhqk", q.double().abs(), k.double().abs()) * q.shape[-1] ** -0.5
    return float((q.shape[-1] + 2) * 2**-24 * sizes.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_not_rounded_to_it(dtype):
    inputs = [x.to(dtype) for x in tensors()[:3]]
    expected = definition(*inputs[:2], ra.causal().dense(S, S))
    assert ((expected.to(dtype) - expected).abs() > 2 * rounding(*inputs[:2])).any(), "else this would show nothing"
    for found in on_ranks(3, inputs, mask=ra.causal()):
        assert found.dtype == torch.float32 and (found - expected).abs().max() <= rounding(*inputs[:2])


def test_tiles_of_many_blocks():
    """A diagonal through blocks of rows and columns, and a window."""
    q, k, v, *_ = tensors(q_len=1201, kv_len=1201, batch=1)
    for mask in (ra.causal() - ra.sliding_window(300), ra.sliding_window(200, 90)):
        check(on_ranks(2, (q, k, v), mask=mask), definition(q, k, mask.dense(1201, 1201)))


def test_heads_and_ranks_that_attend_nothing():
    q, k, v, *_ = tensors()
    nothing = ra.causal() - ra.causal()
    check(on_ranks(3, (q, k, v), mask=nothing), torch.full((2, 4), -torch.inf, dtype=torch.float64))
    bias = torch.zeros(1, 4, S, S, dtype=torch.float64)
    bias[:, 1] = -torch.inf
    expected = definition(q, k, ra.full().dense(S, S), bias=bias)
    assert (expected[:, 1] == -torch.inf).all() and expected[:, 0].isfinite().all()
    check(on_ranks(2, (q, k, v), bias=bias, mask=ra.full()), expected)
    one = q[:, -1:]  # of which all ranks but one hold none
    found = on_ranks(3, (one, k, v), mask=ra.causal(), kv_seqlen=S, q_offset=S - 1)
    check(found, definition(one, k, ra.causal().dense(1, S, S - 1)))


def test_a_value_that_is_no_number_is_found():
    q, k, v, *_ = tensors()
    q[1, 7, 2, 0] = torch.nan
    for found in on_ranks(3, (q, k, v), mask=ra.causal()):
        assert found.isnan().nonzero().tolist() == [[1, 2]]


def test_results_and_gradients_are_those_of_a_call_without():
    q, k, v, dout, _ = tensors()

    def one_rank(transport):
        cp, found = ra.ContextParallel(transport, S, mask=ra.causal()), []
        for asked in (False, True, True):  # arguments are checked once
            inputs = [cp.shard(t).requires_grad_() for t in (q, k, v)]
            out, *more = ra.attention(*inputs, cp=cp, return_lse=True, return_max_logit=asked)
            out.backward(cp.shard(dout))
            found.append([out.detach(), more[0].detach(), *(t.grad for t in inputs)])
            assert [x.shape for x in more] == [(2, 4, cp.local_seqlen), (2, 4)][: 1 + asked]
        with torch.inference_mode():
            alone = ra.attention(*map(cp.shard, (q, k, v)), cp=cp, return_max_logit=True)
        assert len(alone) == 2 and torch.equal(alone[1], more[1])
        return found

    for without, *others in ra.Loopback(2, timeout=20).run(one_rank):
        for found in others:
            assert all(torch.equal(a, b) for a, b in zip(without, found, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_it_moves_the_keys_once_more_and_nothing_where_it_is_not_asked_for(world):
    q, k, v, *_ = tensors(v_dim=5)

    def one_rank(transport):
        cp, counts = ra.ContextParallel(transport, S, mask=ra.causal(), schedule="ring"), []
        for asked in (False, True, False):
            before = sum(cp.traffic()["received"].values())
            ra.attention(*map(cp.shard, (q, k, v)), cp=cp, return_max_logit=asked)
            counts.append(sum(cp.traffic()["received"].values()) - before)
        return counts, cp.program(ra.causal()).tokens(Row.KV), cp.traffic()["received"]["forward max_logit"]

    for counts, tokens, last in ra.Loopback(world, timeout=20).run(one_rank):
        assert last == (world - 1).bit_length() * 2 * 4 * 4  # rounds, of batch and heads in fp32
        assert counts == [tokens * 2 * 2 * 13 * 8, tokens * 2 * 2 * (13 + 8) * 8 + last, tokens * 2 * 2 * 13 * 8]


def test_ranks_that_do_not_all_ask_for_it_are_refused():
    q, k, v, *_ = tensors()

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S)
        with pytest.raises(CallMismatch, match="largest logits"):
            ra.attention(*map(cp.shard, (q, k, v)), cp=cp, return_max_logit=cp.rank == 1)

    ra.Loopback(3, timeout=20).run(one_rank)


def test_a_flag_is_no_number():
    cp, (q, k, v, *_) = ra.ContextParallel(None, S), tensors()
    with pytest.raises(ValueError, match="return_max_logit=1: must be True or False"):
        ra.attention(q, k, v, cp=cp, return_max_logit=1)


def test_compiled_whole():
    torch._dynamo.reset()
    q, k, v, dout, _ = tensors()
    cp, found = ra.ContextParallel(None, S), []

    def attend(q, k, v):
        out, lse, largest = ra.attention(q, k, v, cp=cp, return_max_logit=True, return_lse=True)
        return out * 2, lse, largest + 1

    for call in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out, _, largest = call(*inputs)
        out.backward(dout)
        found.append((out.detach(), largest, *(t.grad for t in inputs)))
        assert not largest.requires_grad
    torch.testing.assert_close(*found)
    check([largest - 1 for _, largest, *_ in found[:1]], definition(q, k, ra.causal().dense(S, S)).float().double())


def on_processes(rank, world):
    q, k, v, *_ = tensors()
    cp = ra.ContextParallel(torch.distributed.group.WORLD, S, mask=ra.causal())
    return [ra.attention(*map(cp.shard, (q, k, v)), cp=cp, return_max_logit=True)[1] for _ in range(3)]


@pytest.mark.slow
def test_between_processes():
    q, k, *_ = tensors()
    for found in run_processes(on_processes, 3):
        check(found, definition(q, k, ra.causal().dense(S, S)))


def test_multiprocessors_cannot_be_left_free():
    cp, (q, k, v, *_) = ra.ContextParallel(None, S, options=ra.Options(sm_margin=2)), tensors()
    with pytest.raises(NotImplementedError, match=r"largest: Options\.sm_margin=2"):
        cp.binding.largest(cp.masks[0], kind_of(q, k, v), Scores(0.5))

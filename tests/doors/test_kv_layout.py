"""Keys that lie otherwise than the queries: named, given, and so that a growing cache is never moved."""

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.geometry.layouts import BLOCK, cyclic
from ringattn.testing import dense_attention
from tests.support.grids import mostly_slow
from tests.support.ring import check, on_ranks, single_process

CROSS = {"q_len": 17, "kv_len": 200}
OWN = ra.Layout.from_spans([[(190, 10), (0, 3)], [], [(3, 187)]])


def test_a_cyclic_layout_never_moves_a_token():
    for world in (1, 2, 3, 8):
        before = [np.empty(0, np.int64)] * world
        for seqlen in (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 10 * BLOCK, 10 * BLOCK + 1, 1000):
            made = cyclic(seqlen, world)
            now = [made.frame(rank).positions() for rank in range(world)]
            assert (np.sort(np.concatenate(now)) == np.arange(seqlen)).all()
            assert all((a == b[: len(a)]).all() for a, b in zip(before, now, strict=True)), "a shard only grows"
            assert made.sizes.max() - made.sizes.min() <= BLOCK
            before = now


@pytest.mark.parametrize("worlds", [(1, 2, 3), pytest.param((4,), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("keys", ["contiguous", "zigzag", "striped", "cyclic", OWN], ids=str)
@pytest.mark.parametrize("layout", mostly_slow(["auto", "zigzag", "cyclic"], ["auto"]))
def test_keys_of_another_layout(layout, keys, schedule, worlds, poison):
    mask = ra.longformer(90, [3, 120], causal=False)
    settings = {"kv_seqlen": 200, "layout": layout, "kv_layout": keys, "schedule": schedule}
    for world in {3}.intersection(worlds) if isinstance(keys, ra.Layout) else worlds:
        check(on_ranks(world, mask, sizes=CROSS, **settings), single_process(mask, **CROSS))


def test_a_given_layout_of_the_queries_and_one_of_the_keys():
    queries = ra.Layout.from_spans([[(0, 1), (9, 8)], [(1, 8)]])
    for keys in ("cyclic", ra.Layout.from_spans([[(0, 150)], [(150, 50)]])):
        settings = {"kv_seqlen": 200, "layout": queries, "kv_layout": keys}
        check(on_ranks(2, ra.full(), sizes=CROSS, **settings), single_process(ra.full(), **CROSS))


def test_self_attention_may_hold_its_keys_elsewhere():
    for world in (2, 3):
        settings = {"layout": "zigzag", "kv_layout": "cyclic"}
        sizes = {"q_len": 150, "kv_len": 150}
        check(on_ranks(world, ra.causal(), sizes=sizes, **settings), single_process(ra.causal(), **sizes))


def test_a_cache_that_grows_is_appended_to():
    """Prefill, then token by token: each rank keeps its keys, and adds those that fall to it."""
    prompt, end, world = 100, 140, 3
    q, k, v = (torch.randn(1, end, 2, 8, dtype=torch.float64) for _ in range(3))
    out, _ = dense_attention(q, k, v, ra.causal().dense(end, end))

    def decode(transport):
        cp = ra.ContextParallel(transport, prompt, kv_seqlen=prompt, kv_layout="cyclic")
        cache = [cp.shard_kv(x[:, :prompt]) for x in (k, v)]
        found = [cp.unshard(ra.attention(cp.shard(q[:, :prompt]), *cache, cp=cp))]
        for n in range(prompt, end):
            cp = cp.replace(seqlen=1, kv_seqlen=n + 1, q_offset=n)
            if len(cp.kv_position_ids) > cache[0].shape[1]:
                assert cp.kv_position_ids[-1] == n
                cache = [torch.cat((part, x[:, n : n + 1]), 1) for part, x in zip(cache, (k, v), strict=True)]
            found.append(cp.unshard(ra.attention(cp.shard(q[:, n : n + 1]), *cache, cp=cp)))
        return torch.cat(found, 1)

    for found in ra.Loopback(world).run(decode):
        torch.testing.assert_close(found, out, rtol=1e-11, atol=1e-11)


def test_a_query_that_comes_to_the_keys_is_described():
    settings = {"kv_seqlen": 4100, "q_offset": 4099, "kv_layout": "cyclic"}
    home, host = (ra.ContextParallel(PlanningRank(rank, 2), 1, **settings).describe() for rank in (0, 1))
    assert "step 1: receives 1 queries from rank 0" in host
    assert "at the end: receives 1 results from rank 1" in home and "at the end" not in host


def test_what_does_not_fit_is_refused():
    def context(**settings):
        return ra.ContextParallel(PlanningRank(0, 2), 17, kv_seqlen=200, **settings)

    with pytest.raises(ValueError, match=r"kv_layout='cyclc' is unknown.*did you mean 'cyclic'"):
        context(kv_layout="cyclc")
    with pytest.raises(ValueError, match="does not fit kv_seqlen=200 over 2 ranks"):
        context(kv_layout=cyclic(199, 2))
    with pytest.raises(ValueError, match="give them a kv_layout"):
        context(layout=cyclic(17, 2))
    assert context(layout=cyclic(17, 2), kv_layout="zigzag").k_layout.name == "zigzag"
    assert "keys cyclic" in context(kv_layout="cyclic").describe()
    assert context(kv_layout="cyclic").handle.tolist() != context(kv_layout="zigzag").handle.tolist()


INTERLEAVED = [
    [[(5, 1)], [(1, 2, 2), (0, 2, 2), (4, 1)]],
    [[(0, 1), (5, 1)], [(2, 2, 2), (1, 2, 2)]],
]


@pytest.mark.parametrize("spans", INTERLEAVED, ids=str)
@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("mask", [ra.causal(), ra.strided(2)], ids=str)
def test_strides_of_one_rank_that_lie_between_each_other(mask, schedule, spans):
    """A message is in order of positions, also where neighbours lie in different spans of their owner."""
    layout, sizes = ra.Layout.from_spans(spans), {"q_len": 6, "kv_len": 6}
    single = single_process(mask, **sizes)
    check(on_ranks(2, mask, sizes=sizes, layout=layout, schedule=schedule), single)
    check(on_ranks(2, mask, sizes=sizes, layout="contiguous", kv_layout=layout, schedule=schedule), single)

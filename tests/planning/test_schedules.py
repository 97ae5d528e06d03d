"""What is special of each schedule: hops in groups, heads in chunks, queries that travel, and room for buffers."""

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.geometry.layouts import contiguous, striped, zigzag
from ringattn.planning.plan import Plan
from ringattn.planning.program import Row
from ringattn.planning.schedules import by_name
from ringattn.planning.turns import compile_program
from ringattn.runtime.settings import Load
from ringattn.testing import dense_attention
from tests.support import cases
from tests.support.ring import S, check, on_ranks, single_process, tensors


def plan_of(mask, layout, world, seqlen=cases.SEQLEN):
    return Plan(mask.bind(seqlen, seqlen, 0), layout(seqlen, world), layout(seqlen, world))


SHARD = 2 * 2 * (8 + 8) * 8  # bytes a token of `tensors()`: batch 2, two KV heads, K and V of 8, fp64


@pytest.mark.parametrize("shards", [2, 4, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("name", ["causal", "window", "documents_causal", "global_scattered", "dilated"])
def test_grouped_hops(name, layout, shards):
    mask, limit = cases.ALL[name][0], shards * 6 * SHARD  # 29 tokens over 5 ranks: shards of 6
    options = ra.Options(kv_bytes=limit)
    check(on_ranks(5, mask, layout=layout, schedule="ring", options=options), single_process(mask))
    programs = ra.Loopback(5).run(
        lambda t: ra.ContextParallel(t, S, mask=mask, layout=layout, schedule="ring", options=options).program(
            mask, Load(2, SHARD // 2)
        )
    )
    assert {p.cut for p in programs} == {{2: 1, 4: 4, 5: 4}[shards]}
    assert all(len(p.forward) <= max(1 + -(-4 // p.cut), 3 * p.travel) for p in programs), (
        "queries travel in three turns"
    )


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 3, 5, 7])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "balanced"])
@pytest.mark.parametrize("name", ["full", "causal", "documents_window_globals", "longformer", "full_minus_strided"])
def test_grouped_hops_of_eight_ranks(name, layout, cut):
    mask, shard = cases.ALL[name][0], 4 if layout != "balanced" else 8
    options = ra.Options(kv_bytes=(1 if cut == 7 else 2) * cut * shard * SHARD)
    check(on_ranks(8, mask, layout=layout, schedule="ring", options=options), single_process(mask))


def test_a_group_of_hops_is_one_call_where_keys_lie_side_by_side():
    for layout in (contiguous, zigzag):
        plan = plan_of(ra.full(), layout, 5, 100)
        program = compile_program(plan, by_name("ring"), 2, 3)
        tiles = [sum(len(work.tiles) for work in turn.work) for turn in program.forward]
        assert tiles[0] == 1 and sum(tiles[1:]) <= (2 if layout is contiguous else 4)


@pytest.mark.parametrize("layout", [contiguous, zigzag])
@pytest.mark.parametrize("mask", [ra.causal(), ra.full()])
def test_gather_merges_nothing(mask, layout):
    """A chunk of queries is one tile for each part of the heads, and every tile meets fresh rows."""
    plan = plan_of(mask, layout, 4, 160)
    for rank in range(4):
        program = compile_program(plan, by_name("gather"), 2, rank)
        chunks = 1 if layout is contiguous or mask == ra.full() or rank == 3 else 2  # rank 3's two touch
        assert [sum(len(work.tiles) for work in turn.work) for turn in program.forward] == [0, chunks, chunks]
        assert all(launch.fresh for turn in program.forward for launch in turn.launches) and not program.blank
        assert program.tokens(Row.KV) == plan.received[rank]


@pytest.mark.parametrize("kv_heads", [1, 3, 5, 8])
def test_heads_that_do_not_divide_into_chunks(kv_heads):
    sizes = {"heads": 2 * kv_heads, "kv_heads": kv_heads}
    mask = ra.longformer(4, [2, 20])
    check(on_ranks(3, mask, sizes=sizes, schedule="gather"), single_process(mask, **sizes))


def test_room_decides_the_cut_and_too_little_is_refused():
    mask = ra.causal()
    plan = plan_of(mask, zigzag, 4, 64)
    gather, token = by_name("gather"), 64
    assert [gather.fit(plan, 8, rows) for rows in (2 * 64 * 2, 2 * 64, 63)] == [4, 8, None]
    assert gather.buffers(plan, 8, 8) == 2 * token and gather.buffers(plan, 1, 8) == 8 * token
    q, k, v, *_ = tensors(64, 64)

    def one_rank(transport, limit, schedule):
        options = ra.Options(kv_bytes=limit)
        cp = ra.ContextParallel(transport, 64, layout="zigzag", schedule=schedule, options=options)
        ra.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp)
        return max(b.nbytes for b in cp.link.workspace.buffers()), cp.program(mask, Load(2, SHARD // 2)).schedule

    for schedule in ("ring", "gather", "exchange"):
        for largest, used in ra.Loopback(4).run(lambda t, s=schedule: one_rank(t, 64 * SHARD, s)):
            assert used == schedule and largest <= 64 * SHARD
        with pytest.raises(ValueError, match=rf"kv_bytes=100: the smallest K/V buffers .*\({schedule} [\d,]+ bytes\)"):
            ra.Loopback(4).run(lambda t, s=schedule: one_rank(t, 100, s))
    with pytest.raises(ValueError, match="kv_bytes=0: must be a positive number"):
        ra.Options(kv_bytes=0)


LONG = 150


def test_a_limit_of_bytes_is_a_calls_affair_and_describing_needs_no_call():
    """While no call has said what a token takes, nothing is left out, and nothing raises."""
    q, k, v, *_ = tensors(64, 64)

    def one_rank(transport, limit):
        cp = ra.ContextParallel(transport, 64, layout="zigzag", options=ra.Options(kv_bytes=limit))
        before = cp.describe()
        ra.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp)
        used = cp.program(cp.masks[0], Load(2, SHARD // 2)).schedule
        assert cp.describe() == before, "which does not depend on the calls that were made"
        return sorted(cp.schedules), before, used, cp.schedule

    for limit, first in ((1 << 30, True), (2 * 16 * SHARD, False)):
        for known, text, used, best in ra.Loopback(4).run(lambda t, n=limit: one_rank(t, n)):
            assert known == ["exchange", "gather", "ring"] and "do not fit" not in text
            assert (used == best) if first else used in ("ring", "gather")


def test_the_row_taken_is_that_of_the_programs():
    """Under a limit of bytes that is not the cheapest, which is said of those before it."""
    shape = ra.Shape(4, 2, 16, dtype="float32")
    for limit, first in ((1 << 30, True), (2 * 16 * 256, False)):  # two shards of 256 bytes a token
        options = ra.Options(kv_bytes=limit)
        cp = ra.ContextParallel(PlanningRank(1, 4), 64, layout="zigzag", shape=shape, options=options)
        rows = [row for row in cp.describe().splitlines() if row.startswith("    zigzag")]
        program = cp.program(cp.masks[0], Load.of(cp.binding.settings.terms))
        taken = [number for number, row in enumerate(rows) if row.endswith(": taken")]
        assert len(taken) == 1 and f" {program.schedule} " in rows[taken[0]]
        assert (taken == [0]) == first
        assert all(row.endswith(": over Options.kv_bytes") for row in rows[: taken[0]])


def test_a_mask_of_a_stack_takes_the_schedule_that_has_room_for_it():
    """A window needs little of the others and takes it in one step, though beside it lies a mask for which there is
    no room to."""
    local, wide = ra.sliding_window(63), ra.causal()
    cp = ra.ContextParallel(PlanningRank(1, 8), 8192, mask=(local, wide))
    programs = {mask: cp.program(mask) for mask in (local, wide)}
    assert programs[wide].schedule == "ring" != programs[local].schedule
    assert programs[local].tokens(Row.KV) == cp.plans[local].received[1] < 8192 // 8


def test_what_each_step_does_is_all_that_a_program_does():
    """Parts of the heads, and calls for queries that came."""
    cp = ra.ContextParallel(PlanningRank(3, 8), 8192, layout="contiguous", schedule="gather")
    assert "of part 2 of 8 of the heads" in cp.describe()
    cp = ra.ContextParallel(PlanningRank(3, 8), 1, kv_seqlen=10_001, q_offset=10_000, kv_layout="cyclic")
    assert "in 1 kernel call " in cp.describe() and ", 1 call for queries that came" in cp.describe()


STRIDES_BESIDE_RUNS = ra.bigbird(4, 3, 1, 1, seed=6) | (ra.sliding_window(0, 60) & ra.strided(7))


@pytest.mark.parametrize("world", [3, 5])
@pytest.mark.parametrize("limit", [None, 1 << 30])
def test_a_relay_carries_runs_and_strides(world, limit):
    sizes, options = {"q_len": 150, "kv_len": 150}, ra.Options(kv_bytes=limit)
    found = on_ranks(world, STRIDES_BESIDE_RUNS, sizes=sizes, layout="contiguous", schedule="ring", options=options)
    check(found, single_process(STRIDES_BESIDE_RUNS, **sizes))


BOTH_WAYS = {
    "first": ra.longformer(5, 2, causal=False),
    "scattered": ra.longformer(5, [3, 60, 61], causal=False),
    "documents": (ra.documents([0, 40, LONG]) & ra.sliding_window(7)) | ra.global_tokens([50]),
}


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_queries_travel(world, name, schedule, poison):
    mask, sizes = BOTH_WAYS[name], {"q_len": LONG, "kv_len": LONG}
    # of so few pairs and tokens, calls and messages would cost more than keys
    free = ra.Options(rates=ra.Rates(6e10, 6e10, exposed=1.0), topology=ra.Topology(ra.Link(1e9, 0.0)))
    settings = {"layout": "contiguous", "schedule": schedule, "options": free}
    check(on_ranks(world, mask, sizes=sizes, **settings), single_process(mask, **sizes))

    def received(transport):
        cp = ra.ContextParallel(transport, LONG, mask=mask, **settings)
        assert "queries that need many keys travel" in cp.describe()
        return cp.plan.travel, cp.plan.received.max(), cp.plan.work.sum()

    for travels, tokens, work in ra.Loopback(world).run(received):
        assert travels and tokens < 40 and work == mask.area(LONG, LONG)


def test_travelling_keeps_the_owner_of_global_rows_even():
    """Without it one rank receives the whole sequence and computes most of the global rows' pairs."""
    seqlen, world = 1 << 14, 16
    bound = ra.longformer(128, 32, causal=False).bind(seqlen, seqlen)
    stays = Plan(bound, contiguous(seqlen, world), contiguous(seqlen, world))
    goes = Plan(bound, stays.q_layout, stays.k_layout, travel=True)
    assert stays.received.max() == seqlen - seqlen // world and goes.received.max() <= 2 * 128 + 32
    assert stays.work.max() > 2 * stays.work.mean() and goes.work.max() < 1.1 * goes.work.mean()
    assert goes.work.sum() == stays.work.sum() == ra.longformer(128, 32, causal=False).area(seqlen, seqlen)


def test_only_rows_that_travel_are_packed():
    q, k, v, dout, _ = tensors(4096, 4096, batch=1)
    rates = ra.Rates(6e10, 6e10, exposed=1.0)

    def one_rank(transport):
        options = ra.Options(rates=rates)
        mask = ra.longformer(4, [5], causal=False)
        cp = ra.ContextParallel(transport, 4096, mask=mask, layout="contiguous", options=options)
        assert cp.plan.travel
        local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        ra.attention(*local, cp=cp).backward(cp.shard(dout))
        return cp.traffic()["sent"], max(t.nbytes for t in cp.link.workspace.buffers())

    for sent, largest in ra.Loopback(2).run(one_rank):
        assert sent.get("backward q", 0) <= 4 * 32 * 8 and largest < 4096


def test_travelling_queries_in_other_dtypes_and_without_their_gradient_of_lse():
    mask, sizes = BOTH_WAYS["first"], {"q_len": LONG, "kv_len": LONG}
    q, k, v, dout, _ = tensors(LONG, LONG)

    def one_rank(transport, dtype, kernel):
        cp = ra.ContextParallel(transport, LONG, mask=mask, layout="contiguous", kernel=kernel)
        local = [cp.shard(t.to(dtype)).requires_grad_() for t in (q, k, v)]
        ra.attention(*local, cp=cp).backward(cp.shard(dout.to(dtype)))
        assert cp.plan.travel and cp.traffic()["received"]["forward q" if transport.rank else "forward partial"] > 0
        return [cp.unshard(t.grad) for t in local]

    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    (dense_attention(*inputs, mask.dense(LONG, LONG))[0] * dout).sum().backward()
    assert sizes
    for kernel in ("reference", "sdpa"):
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
            for found in ra.Loopback(2).run(lambda t, d=dtype, k=kernel: one_rank(t, d, k)):
                for a, b in zip(found, inputs, strict=True):
                    assert (a.double() - b.grad).norm() <= tolerance * b.grad.norm()


def test_striped_gather_keeps_owner_order():
    plan = plan_of(ra.causal(), striped, 3)
    steps = by_name("gather").steps(plan, 1, 1)
    owners = [owner for owner, _ in steps[1].keys]
    assert owners == sorted(owners) and np.concatenate([s[:, 2] for _, s in steps[1].keys]).min() == 3

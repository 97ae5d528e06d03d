"""Rates, links and shapes: seconds that follow from them, defaults of devices, and what a context tells of them."""

import math
from dataclasses import replace

import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.geometry.layouts import contiguous, zigzag
from ringattn.planning.cost import Terms, cost
from ringattn.planning.hardware import CPU, GPUS, hardware
from ringattn.planning.launches import Stacking
from ringattn.planning.placement import Problem, choose
from ringattn.planning.plan import Plan
from ringattn.planning.schedules import by_name
from ringattn.planning.shape import TYPICAL
from ringattn.runtime.binding import Shared
from ringattn.runtime.link import Link
from ringattn.runtime.settings import ContextSettings, Load
from tests.support.ring import on_ranks, tensors


def plan_of(mask, layout, world, seqlen):
    return Plan(mask.bind(seqlen, seqlen), layout(seqlen, world), layout(seqlen, world))


def test_bytes_and_flop_of_a_shape():
    shape = ra.Shape(32, 8, 128, dtype=torch.bfloat16)
    assert shape == TYPICAL and shape.v_head_dim == 128 and shape.row_bytes == 512
    assert (shape.forward.flop, shape.backward.flop) == (4 * 32 * 128, 10 * 32 * 128)
    assert (shape.forward.token, shape.backward.token) == (8 * 256 * 2, 8 * 256 * (2 + 4))
    uneven = ra.Shape(4, 2, 64, 32, batch=3, dtype="float64")
    assert uneven.row_bytes == 3 * 96 * 8 and uneven.forward.token == 2 * uneven.row_bytes
    assert uneven.forward.flop == 3 * 4 * 2 * (64 + 32)
    assert ra.Shape(8, 8, 64, dtype="float32").thin < shape.thin, "fewer KV heads make keys cheap beside queries"


def test_bytes_that_travel_are_those_counted():
    """K/V, gradients and travelling queries, against the counters of a call."""
    shape, mask = ra.Shape(4, 2, 8, batch=2, dtype="float64"), ra.longformer(5, 2, causal=False)

    def one_rank(transport):
        options = ra.Options(rates=ra.Rates(6e10, 6e10, exposed=1.0), topology=ra.Topology(ra.Link(1e3)))
        cp = ra.ContextParallel(
            transport, 150, mask=mask, layout="contiguous", schedule="exchange", shape=shape, options=options
        )
        local = [cp.shard(t).requires_grad_() for t in tensors(150, 150)[:3]]
        ra.attention(*local, cp=cp).sum().backward()
        return cp.plan, transport.rank, cp.traffic()

    for plan, rank, traffic in ra.Loopback(2).run(one_rank):
        received, sent = traffic["received"], traffic["sent"]
        assert plan.travel
        assert received["forward kv"] == plan.received[rank] * shape.forward.token
        assert received["backward kv"] + sent["backward grad"] == plan.received[rank] * shape.backward.token
        out, home = (plan.visits_made[:, [end, 2]] for end in (0, 1))
        for rows, (there, back) in ((out, (sent, received)), (home, (received, sent))):
            queries = int(rows[rows[:, 0] == rank, 1].sum())
            assert there.get("forward q", 0) + back.get("forward partial", 0) == queries * shape.forward.query
            assert there.get("backward q", 0) + back.get("backward dq", 0) == queries * shape.backward.query


def test_seconds_of_a_known_case():
    """The last rank of a causal mask over contiguous shards, by exchange: FLOP, calls, merges, bytes, messages."""
    shard, world = 1024, 4
    rates = ra.Rates(1e12, 5e11, diagonal=0.5, call=1e-3, step=1e-2, merge=1e-9, exposed=1.0)
    terms = Terms(ra.Topology(ra.Link(1e9, 1e-3)), rates, TYPICAL)
    plan = plan_of(ra.causal(), contiguous, world, shard * world)
    forward, backward = TYPICAL.forward, TYPICAL.backward
    pairs = shard * (3 * shard) + shard * (shard + 1) // 2  # of one band, which a diagonal bounds
    compute = 2 * pairs * (forward.flop / 1e12 + backward.flop / 5e11)
    merged = shard * (forward.row + backward.row) * 1e-9  # the second call of two
    moved = 3 * shard * (forward.token + backward.token) / 1e9
    each_pass = 2 * 1e-3 + 1e-2 + 3 * 1e-3  # two calls, one step, three messages
    found = cost(plan, "exchange", terms)
    assert found.calls == 2 and found.received == 3 * shard
    assert found.seconds == pytest.approx(compute + merged + moved + 2 * each_pass, rel=1e-9)


def test_each_figure_counts():
    plan = plan_of(ra.longformer(100, 4), contiguous, 8, 8192)
    rates, link = ra.Rates(1e12, 1e12, 1.0, 1.0, 1e-4, 1e-3, 1e-9, 0.5), ra.Link(1e9, 1e-5)
    base = Terms(ra.Topology(link), rates, TYPICAL)
    better = {"forward": 2e12, "backward": 2e12, "call": 0.0, "step": 0.0, "merge": 0.0, "exposed": 0.0}
    faster = [replace(base, rates=replace(rates, **{name: value})) for name, value in better.items()]
    slower = [
        replace(base, rates=replace(rates, window=0.5)),
        replace(base, topology=ra.Topology(replace(link, bytes_per_second=1e8))),
        replace(base, topology=ra.Topology(replace(link, latency=1.0))),
        replace(base, shape=replace(TYPICAL, batch=2)),
        replace(base, shape=replace(TYPICAL, num_kv_heads=32)),
    ]
    for schedule in ("ring", "exchange"):
        now = cost(plan, schedule, base).seconds
        assert all(cost(plan, schedule, terms).seconds < now for terms in faster), schedule
        assert all(cost(plan, schedule, terms).seconds > now for terms in slower), schedule


def test_a_transfer_costs_by_the_slowest_level_it_crosses():
    inside, between = ra.Link(1e10), ra.Link(1e9, 1e-3)
    plan = plan_of(ra.sliding_window(255), contiguous, 8, 8192)
    rates = ra.Rates(1e15, 1e15, exposed=1.0)

    def seconds(per_node, schedule="exchange"):
        return cost(plan, schedule, Terms(ra.Topology(inside, between, per_node), rates, TYPICAL)).seconds

    one, slow = cost(plan, "exchange", Terms(ra.Topology(inside), rates, TYPICAL)).seconds, 255 * 16384 / 1e9
    assert seconds(8) == one
    assert seconds(4) == seconds(1) == pytest.approx(one + 255 * 16384 * (1e-9 - 1e-10) + 2 * 1e-3, rel=1e-6)
    assert seconds(1) > slow
    # Hops of a relay stay inside of a node but for the last; straight transfers of a full mask mostly do not.
    full = plan_of(ra.full(), contiguous, 8, 8192)
    nodes = Terms(ra.Topology(inside, between, 4), ra.Rates(1e15, 1e15, exposed=1.0), TYPICAL)
    ring, exchange = (cost(full, name, nodes).seconds for name in ("ring", "exchange"))
    assert ring > exchange, "every block crosses the same two links, one way"


def test_what_is_sent_counts_as_what_is_received():
    """One rank holds what all need."""
    plan = plan_of(ra.global_tokens(1000) & ra.causal(), contiguous, 8, 8192)
    terms = Terms(ra.Topology(ra.Link(1e9)), ra.Rates(1e18, 1e18, exposed=1.0), TYPICAL)
    assert cost(plan, "exchange", terms).seconds == pytest.approx(7 * 1000 * 16384 / 1e9, rel=0.2)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("cpu", "a CPU core"),
        ("NVIDIA H100 80GB HBM3", "an H100 or H200"),
        ("NVIDIA H200", "an H100 or H200"),
        ("NVIDIA A100-SXM4-80GB", "an A100"),
        ("NVIDIA B200", "a B200"),
        ("NVIDIA GeForce RTX 4090", "an H100 or H200"),
    ],
)
def test_hardware_by_name(name, known):
    assert hardware(name).name == known


@pytest.mark.parametrize(
    ("shard", "measured"),  # on an H200, the eager forward + backward of one rank of eight, fastest first
    [(1024, ["exchange", "ring", "gather"]), (4096, ["exchange", "ring", "gather"]),
     (8192, ["exchange", "gather", "ring"])],
)  # fmt: skip
def test_schedules_on_an_h200_are_ranked_as_measured(shard, measured):
    terms = Terms(GPUS[0].topology, GPUS[0].rates, TYPICAL, Stacking.ALL)
    plan = plan_of(ra.causal(), zigzag, 8, 8 * shard)
    seconds = {name: cost(plan, name, terms).seconds for name in measured}
    assert sorted(measured, key=seconds.__getitem__) == measured


def test_long_shards_run_at_the_rate_of_their_kernel():
    for known in GPUS:
        terms = Terms(known.topology, known.rates, TYPICAL, Stacking.ALL)
        choice = choose(Problem((ra.causal().bind(1 << 20, 1 << 20),), 8, terms), "auto")
        pairs = ra.causal().area(1 << 20, 1 << 20) / 8
        assert choice.taken.q_layout.name == "zigzag"
        assert choice.taken.offers[0].seconds <= 1.1 * pairs * terms.pair.sum() / terms.rates.diagonal


def test_stacks_decide_the_layout_of_sparse_masks():
    """A thousand tiles a rank are some 25 calls on a GPU, and none is avoided for their number."""
    known, mask = GPUS[0], ra.bigbird(64, 3, 2, 3)
    offers = {}
    for stacking in (Stacking.NONE, Stacking.ALL):
        problem = Problem((mask.bind(1 << 17, 1 << 17),), 8, Terms(known.topology, known.rates, TYPICAL, stacking))
        offers[stacking] = choose(problem, "auto").taken.offers[0]
    assert offers[Stacking.NONE].calls > 500 and offers[Stacking.ALL].calls < 100
    assert offers[Stacking.ALL].seconds < offers[Stacking.NONE].seconds / 4


def test_a_context_counts_with_the_shape_it_is_told():
    mask = ra.longformer(1023, 64)
    few, many = ra.Shape(4, 4, 64, dtype="float32"), ra.Shape(64, 8, 128)
    made = ra.ContextParallel(PlanningRank(1, 4), 1 << 14, mask=mask, shape=few)
    assert made.binding.settings.terms.shape == few
    assert "4 heads over 4 of 64, batch 1, float32 on a CPU core" in made.describe()
    guess = ra.ContextParallel(PlanningRank(1, 4), 1 << 14, mask=mask)
    assert "(a guess: tell with shape=ringattn.Shape(...))" in guess.describe()
    other = made.replace(shape=many)
    assert other.binding.settings.terms.shape == many and other.handle.tolist() != made.handle.tolist()
    assert made.replace(seqlen=1 << 13).binding.settings.shape == few
    assert made.replace(shape=few).binding is made.binding


def test_a_call_of_another_shape_than_the_one_told_is_legal():
    wrong = ra.Shape(64, 8, 128, batch=16)
    told = on_ranks(2, ra.causal(), shape=wrong)
    for a, b in zip(told, on_ranks(2, ra.causal()), strict=True):
        assert torch.allclose(a, b) if isinstance(a, torch.Tensor) else True


def test_defaults_are_those_of_the_device():
    link = Link(PlanningRank(0, 8), 64)
    shared = {name: Shared(link, name) for name in ("cpu", "NVIDIA H200")}
    made = {
        name: ra.ContextParallel(None, 1 << 17, mask=ra.bigbird(64, 3, 2, 3), _shared=one)
        for name, one in shared.items()
    }
    terms = {name: cp.binding.settings.terms for name, cp in made.items()}
    assert terms["cpu"] == Terms(CPU.topology, CPU.rates, TYPICAL, Stacking.VIEWS)
    assert terms["NVIDIA H200"] == Terms(GPUS[0].topology, GPUS[0].rates, TYPICAL, Stacking.ALL)
    assert made["NVIDIA H200"].program(made["NVIDIA H200"].masks[0]).calls < 100, "as calls on that device will be"
    assert "an H100 or H200" in made["NVIDIA H200"].describe()
    own = ra.Options(rates=ra.Rates(1e12, 1e12))
    settings = ContextSettings(8, (ra.causal(),), 8, 0, "auto", "auto", "auto", own, None, "NVIDIA H200")
    assert settings.terms.rates == own.rates and settings.terms.topology == GPUS[0].topology


def test_ranks_that_count_differently_are_told():
    def one_rank(transport):
        shape = ra.Shape(4, 4, 8, batch=1 + transport.rank)
        cp = ra.ContextParallel(transport, 8, layout="contiguous", schedule="ring", shape=shape)
        q = torch.randn(1, 4, 4, 8)
        return ra.attention(q, q, q, cp=cp)

    with pytest.raises(ValueError, match=r"planned for: .*batch=1.* on rank 0; .*batch=2.* on rank 1"):
        ra.Loopback(2, timeout=10).run(one_rank)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: ra.Rates(1e12, 1e12, diagonal=1.5), "Rates.diagonal=1.5: must be a number from 0.01 to 1"),
        (lambda: ra.Rates(1e12, 1e12, window=0.0), "Rates.window=0.0: must be a number from 0.01 to 1"),
        (lambda: ra.Rates(1e12, 1e12, exposed=1.5), "Rates.exposed=1.5"),
        (lambda: ra.Rates(math.nan, 1e12), "Rates.forward=nan"),
        (lambda: ra.Rates(1e12, 1e12, call=-1.0), "Rates.call=-1.0: must be a number from 0"),
        (lambda: ra.Link(1e9, latency=math.inf), "Link.latency=inf"),
        (lambda: ra.Topology(ra.Link(1e9), 1e8), r"Topology.inter=.*must be a ringattn.Link"),
        (lambda: ra.Shape(8, 0, 64), "Shape.num_kv_heads=0"),
        (lambda: ra.Shape(8, 8, 64, dtype="bf16"), "Shape.dtype='bf16': must be one of float16, bfloat16"),
    ],
)
def test_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()


# -- a limit of bytes before any call ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [None, ra.Shape(8, 8, 64, dtype="float32")], ids=["guess", "told"])
def test_a_limit_is_in_bytes_before_any_call_too(shape):
    """What describe() and program() say is what the call then takes."""
    seqlen, world, taken = 1 << 16, 8, shape or TYPICAL
    shard = seqlen // world * taken.num_kv_heads * taken.row_bytes
    for limit in (2 * shard, 4 * shard, 100 * shard):
        cp = ra.ContextParallel(PlanningRank(3, world), seqlen, shape=shape, options=ra.Options(kv_bytes=limit))
        before, text = cp.program(cp.masks[0]), cp.describe()
        called = cp.program(cp.masks[0], Load(taken.num_kv_heads, taken.row_bytes))
        assert (before.schedule, before.cut) == (called.schedule, called.cut)
        assert f"in {called.calls:,} kernel call" in text
        room = by_name(called.schedule).buffers(cp.plan, called.cut, taken.num_kv_heads) * taken.row_bytes
        assert room <= limit
        assert (called.schedule == "exchange") <= (limit > 7 * shard)


def test_a_limit_that_nothing_fits_is_told_in_bytes_and_described():
    cp = ra.ContextParallel(PlanningRank(3, 8), 1 << 16, options=ra.Options(kv_bytes=1))
    with pytest.raises(ValueError, match=r"kv_bytes=1: the smallest K/V buffers .* take more \(.*ring [1-9][\d,]+"):
        cp.program(cp.masks[0])
    assert "Options.kv_bytes=1: the smallest K/V buffers" in cp.describe()

"""Nodes: what crosses between them under a double ring, what that costs beside a flat ring, and what auto takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank, Transport
from ringattn.geometry.layouts import contiguous, zigzag
from ringattn.planning.cost import Terms, cost
from ringattn.planning.hardware import HOPPER
from ringattn.planning.launches import Stacking
from ringattn.planning.plan import Plan
from ringattn.planning.program import Row
from ringattn.planning.schedules import by_name
from ringattn.planning.schedules.double_ring import shares
from ringattn.planning.shape import TYPICAL
from ringattn.planning.topology import Link, Topology
from ringattn.planning.turns import compile_program
from tests.support.grids import mostly_slow
from tests.support.simulation import simulated

SHARD = 8192
NODE = 8
ETHERNET = Topology(Link(4.5e11, 3e-5), Link(5e9, 4e-5), NODE)  # NVLink inside, 40 Gb/s a GPU between


def plan_of(mask, nodes, size, layout=zigzag, shard=64):
    world = nodes * size
    placed = layout(shard * world, world)
    return Plan(mask.bind(shard * world, shard * world), placed, placed, ranks_per_node=size)


def crossing(plan, name, cut, rank, row):
    """Tokens that a rank receives from other nodes in a pass."""
    program = compile_program(plan, by_name(name), cut, rank)
    turns = program.forward if row is Row.KV else program.backward
    peers = [p for turn in turns for p in turn.recvs if p.buffer.row is row]
    return int(sum(p.tokens for p in peers if p.peer // plan.ranks_per_node != rank // plan.ranks_per_node))


WORLDS = [(2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3)]  # nodes, and ranks of each


@pytest.mark.parametrize("world", mostly_slow(WORLDS, [(2, 2), (2, 3)]))
def test_every_card_carries_as_many_shards_as_there_are_other_nodes(world):
    (nodes, size), shard = world, 64
    plan = plan_of(ra.full(), nodes, size)
    for cut in by_name("double_ring").cuts(plan, 8):
        for rank in range(nodes * size):
            assert crossing(plan, "double_ring", cut, rank, Row.KV) == (nodes - 1) * shard
            assert crossing(plan, "double_ring", cut, rank, Row.GRAD) == (nodes - 1) * shard
    flat = [crossing(plan, "ring", 1, rank, Row.KV) for rank in range(nodes * size)]
    border = (nodes * size - 1) * shard  # all blocks but the own enter a node through its first rank
    assert flat == [border if rank % size == 0 else 0 for rank in range(nodes * size)]


@pytest.mark.parametrize("mask", [ra.causal(), ra.sliding_window(100), ra.longformer(20, 5)])
@pytest.mark.parametrize("layout", mostly_slow([zigzag, contiguous], [zigzag]))
def test_only_what_a_node_needs_crosses_to_it_and_once(mask, layout):
    plan = plan_of(mask, 3, 3, layout)
    needs, size = plan.world_needs, plan.ranks_per_node
    program = [compile_program(plan, by_name("double_ring"), 1, rank) for rank in range(9)]
    arrivals = {(p.peer, rank) for rank, one in enumerate(program) for turn in one.forward for p in turn.recvs}
    assert all(src // size == dst // size or src % size == dst % size for src, dst in arrivals), "rails"
    for node in range(3):
        foreign = needs[(needs[:, 0] // size == node) & (needs[:, 1] // size != node)]
        wanted = set().union(*(range(s, s + n * step, step) for _, _, s, n, step in foreign.tolist()))
        came = sum(crossing(plan, "double_ring", 1, rank, Row.KV) for rank in range(node * size, (node + 1) * size))
        assert came == len(wanted)


@pytest.mark.parametrize("mask", mostly_slow([ra.full(), ra.causal(), ra.chunked(128)], [ra.causal()]))
def test_the_flow_that_costs_are_made_of_is_what_programs_move(mask):
    plan = plan_of(mask, 3, 3, contiguous)
    for name, cut in (("double_ring", 2), ("double_ring", 1), ("ring", 1)):
        flow, moved = by_name(name).flow(plan, cut), np.zeros((9, 9), np.int64)
        stated = np.bincount(flow.moved[:, 0] * 9 + flow.moved[:, 1], flow.moved[:, 2], 81).reshape(9, 9)
        for rank in range(9):
            for turn in compile_program(plan, by_name(name), cut, rank).forward:
                for parcel in turn.recvs:
                    moved[parcel.peer, rank] += int(parcel.tokens)
        assert (stated == moved).all()


def test_a_block_is_cut_into_runs_of_its_rows():
    spans = np.array([[0, 5, 3], [20, 4, 1]])
    parts = shares(spans, 4)
    assert [int(part[:, 1].sum()) for part in parts] == [2, 2, 2, 3]
    positions = [start + step * i for part in parts for start, n, step in part.tolist() for i in range(n)]
    assert positions == [0, 3, 6, 9, 12, 20, 21, 22, 23]
    assert len(shares(spans[:1, :], 7)) == 5 and not shares(spans[:0], 3), "none is empty"


@pytest.mark.parametrize("world", mostly_slow([(2, 4), (4, 4), (4, 8)], [(2, 4)]))
def test_a_double_ring_costs_less_where_the_link_between_nodes_binds(world):
    """By the sums of `cost`, and by running all ranks' programs in time."""
    nodes, size = world
    plan, topology = plan_of(ra.causal(), nodes, size, shard=SHARD), replace(ETHERNET, ranks_per_node=size)
    terms = Terms(topology, HOPPER.rates, TYPICAL, Stacking.ALL)
    flat, double = (cost(plan, name, terms).seconds for name in ("ring", "double_ring"))
    assert flat >= 1.5 * double
    sizes = {Row.KV: TYPICAL.num_kv_heads * TYPICAL.row_bytes, Row.GRAD: 2 * TYPICAL.num_kv_heads * TYPICAL.row_bytes}

    def run(name, cut):
        programs = [compile_program(plan, by_name(name), cut, rank) for rank in range(nodes * size)]
        return simulated(programs, topology, sizes, float(terms.pair[0]))

    parts, whole, ring = run("double_ring", size - 1), run("double_ring", 1), run("ring", 1)
    assert min(ring, run("ring", 2)) >= 1.5 * whole >= 1.5 * 1.1 * parts, "parts hide behind the steps of a node"
    assert ring / 1.3 <= flat <= 1.3 * ring and parts / 1.3 <= double <= 1.3 * parts


@pytest.mark.parametrize("nodes", [2, 4])
def test_auto_takes_it_there_and_says_so(nodes):
    world = nodes * NODE
    rank = PlanningRank(3, world, device="NVIDIA H200")
    options = ra.Options(topology=ETHERNET)
    cp = ra.ContextParallel(rank, world * SHARD, options=options)
    program, text = cp.program(cp.masks[0]), cp.describe()
    assert cp.schedule == program.schedule == "double_ring" and program.cut == NODE - 1
    taken = [line for line in text.splitlines() if line.endswith(": taken")]
    assert len(taken) == 1 and " double_ring 1.00 x the time (" in taken[0]
    ring = next(float(line.split()[2]) for line in text.splitlines() if line.split()[1:2] == ["ring"])
    assert ring >= 1.5
    near = cp.replace(options=replace(options, topology=Topology(ETHERNET.intra)))
    assert "double_ring" not in near.schedules
    assert "double_ring left out: it is for a ring of several nodes, and no nodes are told apart" in near.describe()


@pytest.mark.parametrize(
    ("topology", "world", "text"),
    [
        (Topology(Link(1e9)), 4, "no nodes are told apart among its 4 ranks"),
        (Topology(Link(1e9), Link(1e8), 4), 4, "its 4 ranks are on one node"),
        (Topology(Link(1e9), Link(1e8), 4), 6, "its 6 ranks are not whole nodes of 4"),
        (Topology(Link(1e9), Link(1e8), 1), 4, "each of its 4 ranks is a node of its own"),
    ],
)
def test_what_is_no_ring_of_rings_is_refused_by_name_on_every_rank(topology, world, text):
    def one_rank(transport):
        with pytest.raises(ValueError) as refused:
            ra.ContextParallel(transport, 64, schedule="double_ring", options=ra.Options(topology=topology))
        return str(refused.value)

    for said in ra.Loopback(world, timeout=20).run(one_rank):
        asked = "schedule='double_ring' is for a ring of several nodes of several ranks each, and "
        assert ("Options.topology with ranks_per_node=4: " if "whole" in text else asked) + text in said
        assert f"ranks_per_node={topology.ranks_per_node}" in said


def test_rings_within_teams_have_fewer_ranks_a_node():
    """Eight ranks a node in teams of two are four of a ring on each."""
    cp = ra.ContextParallel(
        PlanningRank(5, 16), 1 << 12, ulysses=2, schedule="double_ring", options=ra.Options(topology=ETHERNET)
    )
    assert cp.plan.ranks_per_node == 4 and cp.plan.world_size == 8


def test_of_all_splits_those_with_several_nodes_are_weighed():
    def context(world, **how):
        return ra.ContextParallel(
            PlanningRank(5, world), 1 << 12, ulysses="auto", shape=ra.Shape(16, 8, 128), schedule="double_ring", **how
        )

    cp = context(16, options=ra.Options(topology=ETHERNET))
    assert cp.plan.ranks_per_node in (2, 4, 8) and cp.plan.world_size == 2 * cp.plan.ranks_per_node
    with pytest.raises(ValueError, match=r"double_ring.* its 8 ranks are on one node"):
        context(8, options=ra.Options(topology=ETHERNET))


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather", "double_ring"])
def test_bytes_of_each_level_are_those_that_move(schedule: str) -> None:
    shape = ra.Shape(4, 2, 8, dtype="float32")
    options = ra.Options(topology=ra.Topology(ra.Link(1e10), ra.Link(1e9), ranks_per_node=2))

    def one_rank(transport: Transport) -> tuple[int, tuple[int, int]]:
        cp = ra.ContextParallel(
            transport, 64, mask=ra.full(), schedule=schedule, shape=shape, layout="contiguous", options=options
        )
        q, k, v = (torch.randn(1, 16, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        ra.attention(q, k, v, cp=cp).sum().backward()
        offer = cp.binding.choice.taken.offers[0]
        assert f"{offer.moved[1] / 1e6:,.1f} MB between nodes" in cp.describe()
        return sum(cp.traffic()["received"].values()), offer.moved

    found = ra.Loopback(4, timeout=20).run(one_rank)
    inside, between = found[0][1]
    one = 16 * 2 * 16 * 4 * 3  # a shard of K/V in both passes, and its gradients
    crossing = {"ring": 3, "exchange": 2, "gather": 2, "double_ring": 1}[schedule]
    assert between == crossing * one
    if schedule in ("exchange", "gather"):
        assert inside == one and {received for received, _ in found} == {inside + between}

"""The double ring against one process: forward, lse and gradients on every rank, in fp64; its bytes; and the nodes that
a launcher tells of."""

import os

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.planning.hardware import HOPPER
from ringattn.planning.program import Row
from ringattn.planning.topology import Topology
from ringattn.runtime.binding import Shared
from ringattn.runtime.link import Link
from ringattn.runtime.nodes import Nodes, told_nodes
from ringattn.testing import run_processes
from tests.support import cases
from tests.support.grids import mostly_slow
from tests.support.ring import S, check, on_ranks, single_process, tensors

NODES = ((4, 2), (6, 2), (6, 3), (8, 2), (8, 4))  # ranks, and ranks of a node
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
FAST = [
    ("causal", "zigzag", (4, 2)), ("dilated", "striped", (6, 3)), ("documents_window_globals", "balanced", (4, 2)),
    ("full", "contiguous", (8, 4)),
]  # fmt: skip
# every mask on all nodes, and on all layouts; every layout on all nodes: two layouts in turn for a mask and nodes
TURNS = [
    (name, LAYOUTS[(mask + number + turn) % 4], nodes)
    for mask, name in enumerate(cases.ALL)
    for number, nodes in enumerate(NODES)
    for turn in (0, 2)
]
GRID = list(dict.fromkeys([*FAST, *TURNS]))
HIDING = ra.Rates(6e10, 6e10)  # of a device that computes while messages move


def nodes_of(size, **how):
    return ra.Options(topology=Topology(ra.Link(1e9), ra.Link(1e8), size), **how)


@pytest.mark.parametrize("case", mostly_slow(GRID, FAST), ids=str)
def test_every_mask_and_layout_over_nodes(case, poison):
    name, layout, (world, size) = case
    mask = cases.ALL[name][0]
    options = nodes_of(size, rates=HIDING, kv_bytes=None if world == 6 else 1 << 30)
    check(on_ranks(world, mask, layout=layout, schedule="double_ring", options=options), single_process(mask))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [ra.full(), ra.longformer(4, 2, causal=False), ra.dilated(2, 3)])
def test_blocks_that_cross_in_parts_on_three_nodes(mask, poison):
    options = nodes_of(3, rates=HIDING, kv_bytes=1 << 30)
    check(on_ranks(9, mask, layout="striped", schedule="double_ring", options=options), single_process(mask))


@pytest.mark.parametrize(("q_len", "offset"), [(11, 18), (1, 28)])
def test_prefill_and_decoding_over_nodes(q_len, offset):
    """Fewer queries than ranks leave empty shards."""
    q, k, v, *_ = tensors(q_len, S)
    mask = ra.causal()

    def one_rank(transport):
        cp = ra.ContextParallel(
            transport, q_len, mask=mask, kv_seqlen=S, q_offset=offset, schedule="double_ring", options=nodes_of(2)
        )
        return cp.unshard(ra.attention(cp.shard(q), cp.shard_kv(k), cp.shard_kv(v), cp=cp))

    alone = ra.ContextParallel(None, q_len, mask=mask, kv_seqlen=S, q_offset=offset)
    for found in ra.Loopback(4, timeout=20).run(one_rank):
        torch.testing.assert_close(found, ra.attention(q, k, v, cp=alone))


@pytest.mark.parametrize("nodes", [(4, 2), (8, 4)])
def test_bytes_moved_are_the_plans(nodes):
    world, size = nodes
    q, k, v, dout, _ = tensors(64, 64)
    row = 2 * 2 * (8 + 8) * 8  # batch 2, two KV heads, K and V of 8, fp64

    def moved(transport):
        options = nodes_of(size, kv_bytes=3 * 64 // world * row, rates=HIDING)  # room for a block that comes in parts
        cp = ra.ContextParallel(transport, 64, mask=ra.full(), schedule="double_ring", options=options)
        local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        ra.attention(*local, cp=cp).backward(cp.shard(dout))
        (call,) = {id(call.program): call.program for call in cp.binding.known(ra.full())}.values()
        return cp.traffic(), call

    for traffic, program in ra.Loopback(world).run(moved):
        assert program.cut == max(size - 1, 1)
        for kind in ("forward kv", "backward kv"):
            for way, sent in (("received", False), ("sent", True)):
                tokens = program.tokens(Row.KV, sent=sent)
                assert traffic[way][kind] == row * tokens == row * (world - 1) * 64 // world
        # on each node a block's gradients make a hop less than its keys, and then one home
        grads = traffic["received"]["backward grad"]
        assert grads == row * program.tokens(Row.GRAD) == row * (world - 1) * 64 // world
        assert traffic["sent"]["backward grad"] == row * program.tokens(Row.GRAD, sent=True)


# -- nodes as launchers tell of them -----------------------------------------------------------------


def torchrun(size, rank):
    return {"LOCAL_WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank % size)}


@pytest.mark.parametrize(
    ("environ", "ranks", "rank", "found"),
    [
        ({}, range(4), 0, None),
        (torchrun(2, 3), range(4), 3, Nodes(2, "torchrun")),
        (torchrun(4, 3), range(4), 3, Nodes(4, "torchrun")),
        (torchrun(4, 5), [4, 5, 8, 9], 5, Nodes(2, "torchrun")),
        (torchrun(4, 4), [0, 4, 8], 4, Nodes(1, "torchrun")),
        (torchrun(2, 1), range(4), 3, None),  # another job's
        ({"LOCAL_WORLD_SIZE": "two", "RANK": "3", "LOCAL_RANK": "1"}, range(4), 3, None),
        (
            {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            range(4), 2, Nodes(2, "Open MPI"),
        ),
        ({"MPI_LOCALNRANKS": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}, range(4), 1, Nodes(2, "MPI")),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, range(4), 3, Nodes(2, "Slurm")),
        (
            {"SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},  # dealt round the nodes
            range(4), 1, Nodes(None, "the ranks of a node are no neighbours, says Slurm"),
        ),
        (torchrun(2, 0), [0, 2, 1, 3], 0, Nodes(None, "the ranks of a node are no neighbours, says torchrun")),
        (torchrun(4, 0), [0, 1, 2, 4], 0, Nodes(None, "nodes have 1 and 3 of them, says torchrun")),
    ],
)  # fmt: skip
def test_what_a_launcher_tells(environ, ranks, rank, found):
    assert told_nodes(environ, list(ranks), rank) == found


def test_nodes_are_those_of_the_links():
    links = Topology(ra.Link(1e11), ra.Link(1e9), 8)
    assert Nodes(2, "").of(links) == Topology(ra.Link(1e11), ra.Link(1e9), 2)
    assert Nodes(None, "").of(links) == Topology(ra.Link(1e9)), "as far from each other as nodes are"
    assert Nodes(2, "").of(Topology(ra.Link(1e9))) == Topology(ra.Link(1e9), None, 2)


def test_a_context_plans_for_the_nodes_it_was_told_of():
    link = Link(PlanningRank(5, 8), 64)

    def context(nodes, **how):
        return ra.ContextParallel(None, 1 << 12, _shared=Shared(link, "NVIDIA H200", nodes), **how)

    told = context(Nodes(4, "torchrun"))
    assert told.plan.ranks_per_node == 4 and "on an H100 or H200, 4 ranks a node, says torchrun" in told.describe()
    assert context(Nodes(4, "torchrun"), ulysses=2).plan.ranks_per_node == 2, "of a ring"
    assert context(None).plan.ranks_per_node is None, "eight GPUs are one node"
    apart = context(Nodes(None, "because"))
    assert apart.binding.settings.terms.topology == Topology(HOPPER.topology.inter)
    assert "all ranks equally far from each other: because" in apart.describe()
    assert told.handle.tolist() != apart.handle.tolist()
    own = context(Nodes(4, "torchrun"), options=nodes_of(2))
    assert own.plan.ranks_per_node == 2 and "torchrun" not in own.describe()


def launched(rank: int, world_size: int) -> dict[str, object]:
    q, k, v, *_ = tensors()
    os.environ |= torchrun(2, rank)
    cp = ra.ContextParallel(dist.group.WORLD, S, schedule="double_ring")
    found = {"nodes": cp.plan.ranks_per_node, "text": cp.describe(), "out": None}
    found["out"] = cp.unshard(ra.attention(*map(cp.shard, (q, k, v)), cp=cp))
    given = cp.replace(schedule="auto", options=ra.Options(topology=Topology(ra.Link(1e9))))
    found["given"] = given.describe()
    os.environ |= torchrun(2 if rank < 2 else 1, rank)  # nodes of two, one and one
    apart = [ra.ContextParallel(dist.group.WORLD, S) for _ in range(2)]
    found["apart"], found["one link"] = apart[0].describe(), apart[0].link.transport is apart[1].link.transport
    with pytest.raises(ValueError, match=r"double_ring.* no nodes are told apart .*all ranks equally far"):
        ra.ContextParallel(dist.group.WORLD, S, schedule="double_ring")
    return found


@pytest.mark.slow
def test_a_context_takes_the_nodes_of_its_launcher():
    q, k, v, *_ = tensors()
    expected = ra.attention(q, k, v, cp=ra.ContextParallel(None, S))
    for found in run_processes(launched, 4):
        assert found["nodes"] == 2 and "2 ranks a node, says torchrun" in found["text"]
        torch.testing.assert_close(found["out"], expected)
        assert "torchrun" not in found["given"] and "double_ring left out" in found["given"]
        assert "all ranks equally far from each other: its ranks were told: " in found["apart"]
        assert "2 ranks a node, says torchrun on ranks 0-1; 1 rank a node, says torchrun on ranks 2-3" in found["apart"]
        assert found["one link"], "contexts of one group count their calls together"

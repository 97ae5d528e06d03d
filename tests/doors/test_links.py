"""Measured links: what a topology holds back is found again, alike on all ranks, over every transport of a CPU."""

import os

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import ProcessGroupTransport, transport_over
from ringattn.testing import SlowLinks, run_processes

SLOW = ra.Topology(ra.Link(1e9, 1e-3), ra.Link(5e6, 5e-3), 2)


@pytest.fixture
def short(monkeypatch):
    """Streams of 256 KiB."""
    monkeypatch.setattr("ringattn.links.MESSAGE", 1 << 14)
    monkeypatch.setattr("ringattn.links.PINGS", 6)


def test_links_are_found_as_they_are(short):
    def one_rank(transport):
        return ra.measure_links(SlowLinks(transport, SLOW), ranks_per_node=2)

    found = ra.Loopback(4, timeout=20).run(one_rank)
    assert found == [found[0]] * 4, "the slowest rank of a level counts, on all"
    inside, between = found[0].intra, found[0].inter
    assert found[0].ranks_per_node == 2
    assert 3e6 <= between.bytes_per_second <= 5.5e6 < inside.bytes_per_second
    assert 5e-3 <= between.latency <= 5e-2 and 1e-3 <= inside.latency <= between.latency


@pytest.mark.parametrize(("world", "size"), [(2, None), (3, 3), (2, 1)])
def test_one_level_is_one_link(short, world, size):
    found = ra.Loopback(world, timeout=20).run(lambda t: ra.measure_links(t, ranks_per_node=size))
    assert found == [found[0]] * world and found[0].inter is None
    assert found[0].ranks_per_node == (1 if size == 1 else None)


def test_what_is_no_number_of_a_nodes_ranks_is_refused_on_every_rank():
    def one_rank(transport, size):
        return ra.measure_links(transport, ranks_per_node=size)

    with pytest.raises(ValueError, match="a group of one rank has no links"):
        ra.measure_links(None)
    for size, text in ((2, "does not divide the 3 ranks"), (0, "ranks_per_node=0"), ("2", "ranks_per_node='2'")):
        with pytest.raises(ValueError, match=text):
            ra.Loopback(3, timeout=20).run(lambda t, n=size: one_rank(t, n))
    with pytest.raises(ValueError, match="ranks per node: 1 on rank 0; 2 on rank 1"):
        ra.Loopback(2, timeout=20).run(lambda t: one_rank(t, t.rank + 1))


def over_processes(rank: int, world_size: int) -> list[ra.Topology]:
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
    shared, gloo = transport_over(dist.group.WORLD, 20.0), ProcessGroupTransport(dist.group.WORLD, 20.0)
    told = ra.measure_links(dist.group.WORLD)
    cp = ra.ContextParallel(dist.group.WORLD, 64, options=ra.Options(topology=told), schedule="double_ring")
    q = torch.ones(1, cp.local_seqlen, 2, 8)
    assert ra.attention(q, q, q, cp=cp).isfinite().all()  # ranks have planned alike
    return [told, ra.measure_links(shared, ranks_per_node=2), ra.measure_links(gloo)]


@pytest.mark.slow
def test_processes_measure_shared_memory_and_gloo():
    found = run_processes(over_processes, 4)
    for told, shared, gloo in found:
        assert (told.ranks_per_node, shared.ranks_per_node, gloo.ranks_per_node) == (2, 2, None)
        assert told.inter is not None and shared.inter is not None and gloo.inter is None
        assert all(1e6 < topology.intra.bytes_per_second < 1e12 for topology in (told, shared, gloo))
    assert found == [found[0]] * 4

"""Ranks on slow links: what crosses a level takes its time, and arrives as it was sent."""

import time

import torch

import ringattn as ra
from ringattn.testing import SlowLinks

NODES = ra.Topology(ra.Link(1e12), ra.Link(1e6, 0.02), 2)


def seconds(transport, sends, recvs):
    start = time.monotonic()
    transport.post(sends, recvs, "test").wait()
    return time.monotonic() - start


def test_bytes_take_their_time_between_nodes_only():
    def one_rank(transport):
        slow, rank = SlowLinks(transport, NODES), transport.rank
        out, into = torch.full((25_000,), float(rank)), torch.empty(25_000)  # 0.1 s between nodes
        inside = seconds(slow, [(out, rank ^ 1)], [(into, rank ^ 1)])
        assert (into == rank ^ 1).all()
        between = seconds(slow, [(out, (rank + 2) % 4)], [(into, (rank + 2) % 4)])
        assert (into == (rank + 2) % 4).all()
        return inside, between

    for inside, between in ra.Loopback(4, timeout=20).run(one_rank):
        assert inside < 0.1 <= 0.12 <= between


def test_a_card_takes_one_message_behind_the_other():
    def one_rank(transport):
        slow, peer = SlowLinks(transport, NODES), (transport.rank + 2) % 4
        pairs = [(torch.ones(12_500), torch.empty(12_500)) for _ in range(2)]  # 0.05 s each
        batches = [slow.post([(out, peer)], [(into, peer)], f"test {n}") for n, (out, into) in enumerate(pairs)]
        start = time.monotonic()
        for batch in batches:
            batch.wait()
        return time.monotonic() - start

    assert min(ra.Loopback(4, timeout=20).run(one_rank)) > 0.09


def test_attention_runs_over_it():
    q = torch.randn(1, 29, 2, 8)

    def one_rank(transport):
        cp = ra.ContextParallel(SlowLinks(transport, ra.Topology(ra.Link(1e12))), 29)
        return cp.unshard(ra.attention(*[cp.shard(q)] * 3, cp=cp))

    alone = ra.attention(q, q, q, cp=ra.ContextParallel(None, 29))
    for found in ra.Loopback(2, timeout=20).run(one_rank):
        torch.testing.assert_close(found, alone)

"""The agreement check: every rank raises or none does, the text names who differs in what or who stayed away,
and the store stays as small as it was."""

import time

import pytest
import torch.distributed as dist

from ringattn.comm import Loopback, PeerError, ProcessGroupTransport, Transport, agree
from ringattn.comm.transport import name_ranks
from ringattn.testing import run_processes


def store_size(transport: Transport) -> int:
    return len(transport._world.store)


def test_agreement_leaves_nothing_in_the_store() -> None:
    def calls(transport: Transport) -> int:
        for call in range(200):
            agree(transport, call, {"call": str(call)})
        transport.board.count("finished")
        while transport.board.lookup("finished") != str(transport.world_size):
            time.sleep(0.001)
        return store_size(transport)

    assert Loopback(3).run(calls) == [1, 1, 1]


def gloo_store_keys(rank: int, world_size: int) -> tuple[int, int]:
    transport = ProcessGroupTransport(dist.group.WORLD, timeout=20)
    sizes = []
    for calls in (range(5), range(5, 60)):
        for call in calls:
            agree(transport, call, {"call": str(call)})
        dist.barrier()
        sizes.append(transport._store.num_keys())
        dist.barrier()
    return sizes[0], sizes[1]


def test_agreement_keeps_a_real_store_flat() -> None:
    for before, after in run_processes(gloo_store_keys, 2):
        assert after == before


class Counting:
    """A transport that counts its store operations."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.operations = 0

    def __getattr__(self, name: str) -> object:
        if name == "board":
            return self
        if name in {"publish", "lookup", "count", "await_key", "forget"}:
            self.operations += 1
        return getattr(self.transport, name)


def test_agreement_takes_operations_in_proportion_to_the_world() -> None:
    def operations(transport: Transport) -> int:
        counting = Counting(transport)
        agree(counting, 0, {"a": "b"})
        return counting.operations

    for world_size in (2, 8, 32):
        assert world_size < sum(Loopback(world_size).run(operations)) <= 7 * world_size + 8


@pytest.mark.parametrize("odd_one", [0, 1, 3])
def test_one_rank_that_differs_is_named_on_every_rank(odd_one: int) -> None:
    def differ(transport: Transport) -> str:
        with pytest.raises(ValueError) as caught:
            agree(transport, 0, {"dtype": "fp64" if transport.rank == odd_one else "fp32", "heads": "4"})
        return str(caught.value)

    texts = Loopback(4).run(differ)
    assert len(set(texts)) == 1
    rest = name_ranks([rank for rank in range(4) if rank != odd_one])
    assert f"fp64 on rank {odd_one}" in texts[0] and f"fp32 on {rest}" in texts[0] and "heads" not in texts[0]


def test_a_late_rank_fails_with_the_others() -> None:
    def late(transport: Transport) -> str:
        if transport.rank == 2:
            time.sleep(0.6)
        with pytest.raises(PeerError) as caught:
            agree(transport, 7, {"a": "b"})
        return str(caught.value)

    texts = Loopback(4, timeout=0.3).run(late)
    assert len(set(texts)) == 1 and "call 7: rank 2 of 4 did not come within 0.3 s" in texts[0]


def test_a_decider_that_falls_silent_is_an_error() -> None:
    def silent(transport: Transport) -> None:
        if transport.rank == 0:
            transport.board.count("agree/0/decided")
            return
        with pytest.raises(PeerError, match="fell silent"):
            agree(transport, 0, {"a": "b"})

    Loopback(2, timeout=0.1).run(silent)


def absent_rank(rank: int, world_size: int) -> float:
    transport = ProcessGroupTransport(dist.group.WORLD, timeout=20)
    transport.timeout = 0.5
    start = time.monotonic()
    if rank != 1:
        with pytest.raises(PeerError, match=r"rank 1 of 3 did not come within 0\.5 s"):
            agree(transport, 0, {"a": "b"})
    seconds = time.monotonic() - start
    dist.barrier()
    return seconds


def test_an_absent_rank_is_named_within_the_deadline() -> None:
    seconds = run_processes(absent_rank, 3)
    assert max(seconds[0], seconds[2]) < 5.0

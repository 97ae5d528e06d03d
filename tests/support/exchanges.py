"""What every transport passes: each exchange runs on every rank of one, and asserts there."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ringattn.comm import Allocator, PeerError, Transport, agree, empty
from ringattn.comm.transport import name_ranks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def exchange_ring(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size
    block = torch.full((3, 5), float(rank))
    for step in range(1, world):
        arriving = torch.full((3, 5), float("nan"))
        pending = transport.post([(block, (rank + 1) % world)], [(arriving, (rank - 1) % world)], f"hop {step}")
        pending.wait()
        block = arriving
        assert torch.equal(block, torch.full((3, 5), float((rank - step) % world)))


def exchange_uneven_all_to_all(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size

    def parcel(source: int, to: int) -> Tensor:
        # some of them empty: source and destination both know it
        return torch.arange(source * to * 1000, dtype=torch.float32) + source

    others = [peer for peer in range(world) if peer != rank]
    arriving = {peer: torch.full_like(parcel(peer, rank), float("nan")) for peer in others}
    sends = [(parcel(rank, peer), peer) for peer in others]
    transport.post(sends, [(arriving[peer], peer) for peer in others], "all to all").wait()
    for peer in others:
        assert torch.equal(arriving[peer], parcel(peer, rank))


def exchange_dtypes_in_order(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size

    def parcels(source: int) -> list[Tensor]:
        return [
            (torch.arange(2 * number, 2 * number + 7) % 5 + source).to(dtype) for number, dtype in enumerate(DTYPES)
        ]

    after, before = (rank + 1) % world, (rank - 1) % world
    arriving = [torch.zeros_like(tensor) for tensor in parcels(before)]
    sends = [(tensor, after) for tensor in parcels(rank)]
    transport.post(sends, [(tensor, before) for tensor in arriving], "dtypes").wait()
    for received, expected in zip(arriving, parcels(before), strict=True):
        assert received.dtype == expected.dtype and torch.equal(received, expected)


def exchange_one_way(transport: Transport) -> None:
    last = transport.world_size - 1
    if transport.rank == 0:
        transport.post([(torch.tensor(7), last)], [], "one way").wait()
    elif transport.rank == last:
        got = torch.tensor(0)
        transport.post([], [(got, 0)], "one way").wait()
        assert got == 7
    else:
        transport.post([], [], "one way").wait()


def exchange_batches_in_flight(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size
    after, before = (rank + 1) % world, (rank - 1) % world
    first, second = torch.full((4,), -1), torch.full((4,), -1)
    mine = [torch.full((4,), 10 * rank + number) for number in (1, 2)]
    one = transport.post([(mine[0], after)], [(first, before)], "batch 1")
    two = transport.post([(mine[1], after)], [(second, before)], "batch 2")
    two.wait()
    one.wait()
    one.wait()  # waiting twice is harmless
    assert first.unique().tolist() == [10 * before + 1]
    assert second.unique().tolist() == [10 * before + 2]


def exchange_sends_reused_after_wait(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size
    buffer = torch.empty(50_000)
    arriving = [torch.empty_like(buffer) for _ in range(4)]
    for turn in range(4):
        buffer.fill_(10.0 * rank + turn)
        sends = [(buffer, (rank + 1) % world)]
        transport.post(sends, [(arriving[turn], (rank - 1) % world)], f"turn {turn}").wait()
        buffer.fill_(float("nan"))
    for turn in range(4):
        assert (arriving[turn] == 10.0 * ((rank - 1) % world) + turn).all()


def memory(transport: Transport, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory from which messages leave without a copy, where the transport has such."""
    allocate = transport.allocate if isinstance(transport, Allocator) else empty
    return allocate(size, dtype, torch.device("cpu"))


def exchange_sends_out_of_the_transports_memory(transport: Transport) -> None:
    """Parts of one block and of another, in any order, between tensors that lie elsewhere; some sent twice."""
    rank, world = transport.rank, transport.world_size
    after, before = (rank + 1) % world, (rank - 1) % world
    for turn in range(4):
        block, other = memory(transport, 1000 * (turn + 1)), memory(transport, 700, torch.bfloat16)
        elsewhere = torch.full((5,), 100.0 * rank + turn)
        block.copy_(torch.arange(len(block)) + 1000 * rank + turn)
        other.fill_(rank + turn)
        sent = [block[40:900], elsewhere, other[3:].view(17, 41), block[:0], block[7:9], elsewhere, block[40:900]]
        got = [torch.full_like(x, float("nan")) for x in sent]
        pending = transport.post([(x, after) for x in sent], [(x, before) for x in got], f"turn {turn}")
        pending.wait()
        for x in (block, other, elsewhere):
            x.fill_(float("nan"))
        first = 1000 * before + turn
        for part, begin in ((got[0], 40), (got[4], 7), (got[6], 40)):
            assert torch.equal(part, torch.arange(begin, begin + len(part)) + float(first))
        assert (got[1] == 100.0 * before + turn).all() and torch.equal(got[1], got[5])
        assert got[2].shape == (17, 41) and (got[2] == before + turn).all()


def exchange_batches_that_differ_at_both_ends(transport: Transport) -> None:
    """The n-th receive takes the n-th send, whatever batches they are in."""
    rank, world = transport.rank, transport.world_size
    after, before = (rank + 1) % world, (rank - 1) % world
    got = [torch.full((3,), -1.0) for _ in range(3)]
    first = transport.post([], [(got[0], before)], "receive one")
    two = transport.post([(torch.full((3,), float(number)), after) for number in range(2)], [], "send two")
    rest = transport.post([(torch.full((3,), 2.0), after)], [(got[1], before), (got[2], before)], "the rest")
    for pending in (rest, two, first):
        pending.wait()
    assert [int(tensor[0]) for tensor in got] == [0, 1, 2]


def exchange_many_batches_in_flight(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size
    got = [torch.zeros(2) for _ in range(1000)]
    pending = [
        transport.post([(torch.full((2,), float(n)), (rank + 1) % world)], [(x, (rank - 1) % world)], f"batch {n}")
        for n, x in enumerate(got)
    ]
    for batch in reversed(pending):
        batch.wait()
    assert all(int(x[0]) == n for n, x in enumerate(got))


def exchange_many_tensors_at_once(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size
    got = [torch.zeros(2) for _ in range(2500)]
    sends = [(torch.full((2,), float(n)), (rank + 1) % world) for n in range(len(got))]
    transport.post(sends, [(x, (rank - 1) % world) for x in got], "many").wait()
    assert all(int(x[0]) == n for n, x in enumerate(got))


def exchange_a_wait_that_serves_all(transport: Transport) -> None:
    """Rank 1 waits for the last rank, which waits for rank 0, which waits to be received by rank 1."""
    rank, last = transport.rank, transport.world_size - 1
    if last < 2:
        return
    big, got = torch.ones(100_000), torch.zeros(100_000)
    if rank == 0:
        for turn in range(3):
            transport.post([(big, 1)], [], f"turn {turn}").wait()
        transport.post([(big, last)], [], "go").wait()
    elif rank == 1:
        taken = [transport.post([], [(torch.zeros(100_000), 0)], f"turn {turn}") for turn in range(3)]
        transport.post([], [(got, last)], "from the last").wait()
        for pending in taken:
            pending.wait()
    elif rank == last:
        transport.post([], [(got, 0)], "go").wait()
        transport.post([(got, 1)], [], "to rank 1").wait()
    assert rank not in (1, last) or (got == 1).all()


def exchange_store(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size
    assert transport.board.lookup("nothing") is None
    assert not transport.board.await_key("nothing", 0.05)
    transport.board.publish(f"from {rank}", f"ünï {rank}")
    for peer in range(world):
        assert transport.board.await_key(f"from {peer}", 20.0)
        assert transport.board.lookup(f"from {peer}") == f"ünï {peer}"
    if transport.board.count("arrived") == world:
        transport.board.forget("from 0")
        transport.board.publish("all", "here")
    assert transport.board.await_key("all", 20.0)
    assert transport.board.lookup("from 0") is None


def exchange_agreement(transport: Transport) -> None:
    rank, world = transport.rank, transport.world_size
    for call in range(20):
        agree(transport, call, {"mask": "causal()", "call": str(call)})
    with pytest.raises(ValueError, match="disagree") as caught:
        agree(
            transport,
            20,
            {"seqlen": "12" if rank else "13", "mask": "causal()", **({"x": "y"} if rank else {})},
        )
    others = name_ranks(range(1, world))
    assert f"seqlen: 13 on rank 0; 12 on {others}" in str(caught.value)
    assert f"x: (absent) on rank 0; y on {others}" in str(caught.value)
    assert "mask" not in str(caught.value)
    agree(transport, 21, {"seqlen": "12"})  # the store is still in order


EXCHANGES = [fn for name, fn in list(globals().items()) if name.startswith("exchange_")]


def all_exchanges(rank: int, world_size: int, make: Callable[[float], Transport]) -> str:
    transport = make(20)
    assert (transport.rank, transport.world_size) == (rank, world_size)
    for exchange in EXCHANGES:
        exchange(transport)
    return transport.name


def leave_together(transport: Transport) -> None:
    """A rank that has given up stays until the other survivor has too, not to be taken for dead itself."""
    if transport.board.count("gave up") == 2:
        transport.board.publish("both gave up", "")
    assert transport.board.await_key("both gave up", 20.0)


def post_to_the_silent(rank: int, world_size: int, make: Callable[[float], Transport]) -> str:
    transport = make(20)
    transport.timeout = 1.0
    if rank == 1:
        assert transport.board.await_key("both gave up", 20.0)
        return ""
    got = torch.zeros(4), torch.zeros(4)
    peer = 2 - rank
    start = time.monotonic()
    pending = transport.post([(torch.ones(4), peer)], [(got[0], 1), (got[1], peer)], "backward step 2")
    with pytest.raises(PeerError) as caught:
        pending.wait()
    assert 0.9 < time.monotonic() - start < 6.0
    with pytest.raises(PeerError):  # and again: what failed does not turn into a success
        pending.wait()
    leave_together(transport)
    return str(caught.value)

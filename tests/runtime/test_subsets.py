"""Groups that change: contexts of some of a group's ranks, over the connections that are there."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ringattn as ra
from ringattn.comm import CallMismatch, Loopback, PeerError, PlanningRank, Transport
from ringattn.testing import dense_attention, run_processes
from tests.support.clock import patience
from tests.support.grids import mostly_slow
from tests.support.mpi import ABSENT, in_group, on_ranks, over_mpi
from tests.support.steps import AT_ONCE, gloo, shared_memory

LONGEST = 29
# Who attends together, one micro-batch after the other: groups of 1, 2, 3, 5 and 7, neighbours or not.
SPLITS = {
    2: [[[0], [1]], [[0, 1]]],
    3: [[[0, 2], [1]], [[0], [1, 2]], [[0, 1, 2]]],
    4: [[[0, 1, 2], [3]], [[0, 3], [1, 2]], [[0, 1, 2, 3]]],
    8: [[[0, 2, 3, 5, 7], [1, 4, 6]], [[0], [1, 2, 3, 4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5, 6, 7]]],
}
MASK = ra.causal() | ra.global_tokens([1])
SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "ring": {"schedule": "ring", "layout": "zigzag"},
    "exchange": {"schedule": "exchange", "layout": "striped"},
    "gather": {"schedule": "gather", "layout": "contiguous"},
    "chunks": {"options": ra.Options(head_chunks=2)},
}


def inputs(seed: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)  # threads share the default one
    return [torch.randn(1, length, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)]


def check(cp: ra.ContextParallel, seed: int) -> None:
    """Output and gradients of this rank are right. Ranks that attend together have the same numbers."""
    q, k, v, dout = inputs(seed, cp.seqlen)
    local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
    out = ra.attention(*local, cp=cp)
    out.backward(cp.shard(dout))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    right, _ = dense_attention(*leaves, cp.masks[0].dense(cp.seqlen, cp.seqlen))
    right.backward(dout)
    for found, whole in zip((out, *(t.grad for t in local)), (right, *(t.grad for t in leaves)), strict=True):
        torch.testing.assert_close(found, whole[:, cp.position_ids])
    torch.testing.assert_close(cp.unshard(out.detach()), right.detach())


def walk(transport: Transport, settings: dict[str, Any]) -> list[int]:
    """Every split of the world, with a call of all ranks between two of them; what lies on the board behind that."""
    cp = ra.ContextParallel(transport, LONGEST, mask=MASK)
    check(cp, 0)
    for number, split in enumerate(2 * SPLITS[cp.world_size]):
        mine = next(group for group in split if cp.rank in group)
        some = cp.on(mine, seqlen=LONGEST - number - mine[0], **settings)
        assert (some.rank, some.world_size) == (mine.index(cp.rank), len(mine))
        check(some, 100 * number + mine[0])
        check(cp.replace(seqlen=LONGEST - number), number)
    return [cp.on([cp.rank]).world_size, some.on(range(cp.world_size)).world_size]


@pytest.mark.parametrize("case", mostly_slow(
    [(world, name) for world in SPLITS for name in SETTINGS if world < 8 or name in ("auto", "ring")],
    [(3, "ring"), (4, "auto"), (2, "chunks")],
))  # fmt: skip
def test_splits_are_right(case: tuple[int, str]) -> None:
    world, settings = case
    assert Loopback(world, timeout=20).run(lambda t: walk(t, SETTINGS[settings])) == [[1, world]] * world


def on_processes(rank: int, world: int, make: Callable[[], Transport]) -> list[int]:
    return walk(make(), SETTINGS["ring"])


@pytest.mark.parametrize("case", mostly_slow(
    [(make, world) for make in (gloo, shared_memory) for world in (2, 3, 4)], [(shared_memory, 3)]
))  # fmt: skip
def test_splits_of_processes_are_right(case: tuple[Callable[[], Transport], int]) -> None:
    make, world = case
    assert run_processes(on_processes, world, make) == [[1, world]] * world


@pytest.mark.slow
@pytest.mark.skipif(ABSENT, reason="mpi4py and an MPI are not installed")
def test_splits_over_mpi_are_right() -> None:
    assert on_ranks(in_group, 3, on_processes, over_mpi) == [[1, 3]] * 3


def test_a_head_split_inside_of_a_subset() -> None:
    def one_rank(transport: Transport) -> None:
        cp = ra.ContextParallel(transport, LONGEST, mask=MASK, ulysses=2)
        mine, changes = ([0, 2, 3, 5], {}) if cp.rank in (0, 2, 3, 5) else ([1, 4, 6], {"ulysses": 1})
        if cp.rank == 7:
            mine, changes = [7], {"ulysses": 1}
        check(cp.on(mine, **changes), mine[0])
        check(cp, 0)

    Loopback(8, timeout=20).run(one_rank)


def test_nodes_are_those_of_the_ranks_that_are_left() -> None:
    topology = ra.Topology(ra.Link(1e10), ra.Link(1e9), ranks_per_node=4)
    cp = ra.ContextParallel(PlanningRank(1, 12), 4096, options=ra.Options(topology=topology))
    assert cp.on([0, 1, 4, 5]).binding.settings.known.topology.ranks_per_node == 2
    assert cp.on([0, 1, 4, 5], schedule="double_ring").schedule == "double_ring"
    assert cp.on([0, 1, 4]).binding.settings.known.topology == ra.Topology(ra.Link(1e9))
    with pytest.raises(ValueError, match=r"double_ring.*no nodes are told apart among its 3 ranks"):
        cp.on([0, 1, 4], schedule="double_ring")
    assert "this is rank 1: rank 1 of the group, with ranks 0-1, 4" in cp.on([4, 0, 1]).describe()


@pytest.mark.parametrize(("ranks", "text"), [
    ([0, 4], r"ranks=\[0, 4\]: must be some of the group's, 0 to 2"),
    ([-1, 0], r"ranks\[0\]=-1: must be"),
    ([], r"ranks=\[\]: must be some of the group's"),
    ([0, 0, 1, 2], r"ranks=\[0, 0, 1, 2\]: must name each rank once"),
    ([0, 1], r"ranks=\[0, 1\] on rank 2, which is not among them"),
    ("01", "ranks='01': must be a sequence of integers"),
    (2, "ranks=2: must be a sequence of integers"),
])  # fmt: skip
def test_ranks_that_do_not_fit_are_refused_on_all(ranks: Any, text: str) -> None:
    def one_rank(transport: Transport) -> None:
        cp = ra.ContextParallel(transport, LONGEST)
        with pytest.raises(ValueError, match=text):
            if cp.rank == 2:
                cp.on(ranks)
            check(cp, 0)  # which hears of it
        check(cp, 1)

    Loopback(3, timeout=20).run(one_rank)


def test_more_ranks_than_tokens_and_unknown_arguments_are_refused() -> None:
    cp = ra.ContextParallel(PlanningRank(1, 4), LONGEST)
    with pytest.raises(ValueError, match="seqlen=2 over 3 ranks"):
        cp.on([0, 1, 2], seqlen=2)
    with pytest.raises(ValueError, match=r"on\(\) cannot change group"):
        cp.on([0, 1, 2], group=None)


def fail_in_one(transport: Transport) -> tuple[str, float, str]:
    """Rank 3, alone with rank 2, refuses a call of theirs while ranks 0 and 1 are in calls of their own."""
    cp = ra.ContextParallel(transport, LONGEST)
    some = cp.on([0, 1] if cp.rank < 2 else [2, 3])
    check(some, 0)
    check(cp, 0)  # so that no rank is still in the one before when another fails
    start, said = time.monotonic(), ""
    try:
        for number in range(10_000):
            if cp.rank == 3 and number == 3:
                raise_alone(some)
            check(some, 0)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    waited = time.monotonic() - start
    try:
        check(cp, 1)
        check(some, 2)
        return said, waited, "right"
    except Exception as error:
        return said, waited, f"{type(error).__name__}: {error}"


def raise_alone(cp: ra.ContextParallel) -> None:
    q = torch.zeros(1, cp.local_seqlen + 1, 4, 8)
    ra.attention(q, q, q, cp=cp)


def fail_in_processes(rank: int, world: int, make: Callable[[], Transport]) -> tuple[str, float, str]:
    return fail_in_one(make())


@pytest.mark.parametrize("make", mostly_slow([gloo, shared_memory], [shared_memory]))
def test_what_fails_in_one_subset_fails_in_all_at_once(make: Callable[[], Transport]) -> None:
    found = run_processes(fail_in_processes, 4, make)
    for rank, (said, waited, _) in enumerate(found):
        assert said.startswith("ValueError"), found
        assert rank == 3 or "rank 3 refused the call" in said, found
        assert "but rank 3 of the group, here rank 1 of 2, holds" in said, found
        assert waited < patience(AT_ONCE) + 5, found
    # The pair has made as many calls of all ranks as the others: what all start together next is right again.
    assert {after for *_, after in found} == {"right"} or all("cannot go on" in after for *_, after in found), found


def die_in_one(rank: int, world: int, make: Callable[[], Transport]) -> tuple[str, float]:
    """Rank 0 is killed in a call with rank 1; the others are in calls of their own, and send neither anything."""
    transport = make()
    cp = ra.ContextParallel(transport, LONGEST)
    some = cp.on([0, 1] if rank < 2 else [2, 3])
    check(cp, 0)
    check(some, 0)
    start = time.monotonic()
    if rank == 0:
        transport.post = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    with pytest.raises(PeerError) as raised:
        while time.monotonic() < start + 15:
            check(some, 0)
    return str(raised.value), time.monotonic() - start


@pytest.mark.parametrize("make", mostly_slow([gloo, shared_memory], [gloo]))
def test_a_rank_that_dies_in_one_subset_is_named_in_all(make: Callable[[], Transport]) -> None:
    for text, waited in run_processes(die_in_one, 4, make, casualties=[0])[1:]:
        assert "rank 0" in text and waited < patience(AT_ONCE) + 2


def end_early(rank: int, world: int, make: Callable[[], Transport]) -> str:
    """Rank 2 makes no calls any more and ends; the others go on, with calls in which they need each other and not."""
    cp = ra.ContextParallel(make(), LONGEST)
    check(cp, 0)
    if rank == 2:
        return "right"
    time.sleep(0.5)
    some = cp.on([0, 1], layout="contiguous")
    border = int(some.q_layout.sizes[0])
    for mask in 2 * [ra.causal(), ra.documents([0, border, LONGEST])]:
        check(some.replace(mask=mask), 1)
    return "right"


@pytest.mark.parametrize("make", mostly_slow([gloo, shared_memory], [shared_memory]))
def test_ranks_outside_of_a_subset_may_end(make: Callable[[], Transport]) -> None:
    assert run_processes(end_early, 3, make) == ["right"] * 3


def test_ranks_that_name_different_subsets_are_told() -> None:
    def one_rank(transport: Transport) -> str:
        cp = ra.ContextParallel(transport, LONGEST)
        with pytest.raises(CallMismatch) as raised:
            check(cp.on({0: [0, 1], 3: [3]}.get(cp.rank, [0, 1, 2])), 0)
            check(cp, 0)
        return str(raised.value)

    told = Loopback(4, timeout=20).run(one_rank)
    assert any("among ranks 0-1" in text and "among ranks 0-2" in text for text in told), told


def change_often(rank: int, world: int, changes: int, batches: int) -> tuple[list[int], list[int], int]:
    """Descriptors, threads and buffers before and after so many changes, and what the board was asked."""
    transport = shared_memory()
    cp = ra.ContextParallel(transport, 64, mask=ra.causal())
    splits = [[[0, 1], [2]], [[0], [1, 2]], [[0, 2], [1]], [[0, 1, 2]]]

    def some(number: int) -> None:
        split = splits[number % len(splits)]
        mine = next(group for group in split if rank in group)
        number %= batches
        lengths = 40 + number % 20
        part = cp.on(mine, seqlen=lengths, mask=ra.causal() & ra.documents([0, 7 + number % 11, lengths]))
        q = torch.randn(1, part.local_seqlen, 1, 8, requires_grad=True)
        ra.attention(q, q, q, cp=part).sum().backward()

    def held() -> list[int]:
        memory = sum(buffer.nbytes for buffer in cp.link.workspace.buffers())
        return [len(os.listdir("/proc/self/fd")), threading.active_count(), memory]

    for number in range(60):
        some(number)
    before, asked, count = held(), [0], transport.board.count

    def counted(key: str) -> int:
        asked[0] += 1
        return count(key)

    transport.board.count = counted  # type: ignore[method-assign]
    for number in range(changes):
        some(number)
    return before, held(), asked[0]


@pytest.mark.parametrize(("changes", "batches"), [(60, 1000), pytest.param(1000, 8, marks=pytest.mark.slow)])
def test_nothing_grows_with_changes_and_the_board_is_not_asked(changes: int, batches: int) -> None:
    """New documents in each, and a thousand in which they come again."""
    for before, after, asked in run_processes(change_often, 3, changes, batches, timeout=patience(60)):
        grown = [now - was for was, now in zip(before, after, strict=True)]
        # a connection takes a second arena when its first one is in use, whenever that happens
        assert grown[0] <= 8 and grown[1:] == [0, 0] and asked == 0


def test_dropout_differs_between_subsets_and_not_between_their_ranks() -> None:
    def one_rank(transport: Transport) -> torch.Tensor:
        cp = ra.ContextParallel(transport, LONGEST)
        some = cp.on([0, 1] if cp.rank < 2 else [2, 3])
        q = torch.ones(1, LONGEST, 1, 8)
        q, v = some.shard(q), some.shard(torch.eye(LONGEST)[None, :, None])
        return some.unshard(ra.attention(q, q, v, cp=some, dropout_p=0.5))

    first, same, other, also = Loopback(4, timeout=20).run(one_rank)
    assert torch.equal(first, same) and torch.equal(other, also) and not torch.equal(first, other)

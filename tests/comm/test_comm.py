"""Transports: the same exchanges over rank-threads and over gloo processes, and what happens when a rank
dies, stays silent, raises or returns early."""

import os
import resource
import select
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.comm import (
    Loopback,
    PeerError,
    ProcessGroupTransport,
    SharedMemoryTransport,
    Solo,
    Transport,
    agree,
    transport_over,
)
from ringattn.comm.shared_memory import AWAKE, _serve
from ringattn.comm.transport import name_ranks
from ringattn.testing import run_processes
from tests.support.exchanges import EXCHANGES, all_exchanges, exchange_store, leave_together, memory, post_to_the_silent
from tests.support.lanes import unlabelled_transport


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda fn: fn.__name__)
def test_loopback(exchange: Callable[[Transport], None], world_size: int, poison: None) -> None:
    Loopback(world_size, timeout=20).run(exchange)


def gloo(timeout: float) -> Transport:
    return ProcessGroupTransport(dist.group.WORLD, timeout)


def shared_memory(timeout: float) -> Transport:
    transport = transport_over(dist.group.WORLD, timeout)
    assert isinstance(transport, SharedMemoryTransport), "these processes are of one machine"
    return transport


def on_lanes(timeout: float) -> Transport:
    return unlabelled_transport(timeout, 2)


BETWEEN_PROCESSES = pytest.mark.parametrize("make", [gloo, shared_memory])


@pytest.mark.parametrize("make", [gloo, shared_memory, on_lanes])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes(world_size: int, make: Callable[[float], Transport]) -> None:
    names = run_processes(all_exchanges, world_size, make)
    assert len(names) == world_size and len(set(names)) == 1


# Groups


def subgroups(rank: int, world_size: int) -> list[str]:
    odd = dist.new_group([1, 3])
    if rank % 2:
        transport = ProcessGroupTransport(odd, timeout=20)
        assert transport.rank == rank // 2 and transport.world_size == 2
        for exchange in EXCHANGES:
            exchange(transport)
    else:
        with pytest.raises(ValueError, match="must be a process group that this rank is in"):
            ProcessGroupTransport(odd)
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    names = []
    for axis, place in (("ring", rank // 2), ("ulysses", rank % 2)):
        transport = ProcessGroupTransport(mesh[axis].get_group(), timeout=20)
        assert transport.rank == place and transport.world_size == 2
        for exchange in EXCHANGES:
            exchange(transport)
        names.append(transport.name)
    return names


def test_gloo_subgroups_and_meshes() -> None:
    names = run_processes(subgroups, 4)
    rings, ulysses = zip(*names, strict=True)
    assert rings[0] == rings[2] != rings[1] == rings[3]
    assert ulysses[0] == ulysses[1] != ulysses[2] == ulysses[3]


def two_transports(rank: int, world_size: int, make: Callable[[float], Transport]) -> None:
    both = [make(20) for _ in range(2)]
    for number, transport in enumerate(both):
        transport.board.publish("key", str(number))
        agree(transport, 0, {"transport": str(number)})
    assert [transport.board.lookup("key") for transport in both] == ["0", "1"]
    peer = 1 - rank
    arriving = [torch.zeros(3), torch.zeros(3)]
    batches = [
        transport.post([(torch.full((3,), 10.0 * rank + number), peer)], [(arriving[number], peer)], "both")
        for number, transport in enumerate(both)
    ]
    for pending in reversed(batches):
        pending.wait()
    assert [tensor[0].item() for tensor in arriving] == [10.0 * peer, 10.0 * peer + 1]
    for transport in both:
        exchange_agreement_again(transport)


def exchange_agreement_again(transport: Transport) -> None:
    for call in range(1, 4):
        agree(transport, call, {"call": str(call)})


@BETWEEN_PROCESSES
def test_two_transports_on_one_group_do_not_disturb_each_other(make: Callable[[float], Transport]) -> None:
    run_processes(two_transports, 2, make)


def test_two_loopback_worlds_have_names_of_their_own() -> None:
    loopback = Loopback(2)
    first, second = (loopback.run(lambda transport: transport.name) for _ in range(2))
    assert first[0] == first[1] != second[0] == second[1]


def test_solo() -> None:
    solo = Solo()
    assert isinstance(solo, Transport)
    solo.post([], [], "nothing").wait()
    with pytest.raises(AssertionError, match="world of one"):
        solo.post([(torch.zeros(1), 0)], [], "something")
    exchange_store(solo)
    agree(solo, 0, {"a": "b"})


@pytest.mark.parametrize("ranks, text", [([3], "rank 3"), ([5, 0, 1, 2], "ranks 0-2, 5"), ([0, 1], "ranks 0-1")])
def test_ranks_are_named_in_runs(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text


# Dead, silent and failing peers


def post_after_a_death(rank: int, world_size: int, make: Callable[[float], Transport]) -> tuple[str, float]:
    transport = make(10)
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    peer = 2 - rank  # the survivors also serve each other
    got = torch.zeros(1000), torch.zeros(1000)
    sends = [(torch.full((1000,), float(rank)), peer)]
    with pytest.raises(PeerError) as caught:
        transport.post(sends, [(got[0], peer), (got[1], 1)], "forward step 0").wait()
    seconds = time.monotonic() - start
    assert (got[0] == peer).all()  # the batch's transfers with the living did happen
    leave_together(transport)
    return str(caught.value), seconds


@BETWEEN_PROCESSES
def test_a_killed_rank_is_named_on_the_others(make: Callable[[float], Transport]) -> None:
    results = run_processes(post_after_a_death, 3, make, casualties=[1])
    assert results[1] is None
    for text, seconds in (results[0], results[2]):
        assert "forward step 0" in text and "for rank 1 in vain" in text
        assert seconds < 8.0  # a closed connection shows at once, well before the deadline


@BETWEEN_PROCESSES
def test_a_silent_rank_is_named_within_the_deadline(make: Callable[[float], Transport]) -> None:
    for text in run_processes(post_to_the_silent, 3, make)[::2]:
        assert "backward step 2" in text and "(deadline 1.0 s) for rank 1 in vain" in text


def construct_alone(rank: int, world_size: int) -> None:
    if rank == 0:
        with pytest.raises(PeerError, match="not every rank of group"):
            ProcessGroupTransport(dist.group.WORLD, timeout=0.3)
        dist.distributed_c10d._get_default_store().set("over", "")
    else:
        dist.distributed_c10d._get_default_store().wait(["over"])


def test_construction_by_some_ranks_only_is_named() -> None:
    run_processes(construct_alone, 2)


def fill_shared_memory(rank: int, world_size: int) -> int:
    """Batches that grow, shrink and go one way only, by a rank that would run ahead if it were let."""
    transport = shared_memory(20)
    handles = len(os.listdir("/proc/self/fd"))
    for turn, size in enumerate([10, 1_000_000, 3, 100_000, 2_000_000, *[1000] * 200]):
        if rank == 0:
            transport.post([(torch.full((size,), float(turn)), 1)], [], f"turn {turn}").wait()
        else:
            got = torch.zeros(size)
            transport.post([], [(got, 0)], f"turn {turn}").wait()
            assert (got == turn).all()
    assert len(os.listdir("/proc/self/fd")) <= handles + 2, "one for each arena, what it outgrew is closed"
    return len(transport._peers[1 - rank]._arenas)


def test_shared_memory_is_reused_and_no_rank_runs_ahead() -> None:
    arenas = run_processes(fill_shared_memory, 2)
    assert 1 <= arenas[0] <= 2 and arenas[1] == 0  # one is enough where the peer answers at once


def send_in_place(rank: int, world_size: int) -> tuple[float, int, int]:
    """Blocks that come and go, taken late by their receiver, and written at once by their sender."""
    transport, handles, waited, given = shared_memory(20), len(os.listdir("/proc/self/fd")), 0.0, 0
    for turn in range(30):
        if rank == 0:
            block = memory(transport, 1000 * (1 + turn % 7))
            block.fill_(float(turn))
            start = time.perf_counter()
            transport.post([(block[10:900], 1)], [], f"turn {turn}").wait()
            waited = max(waited, time.perf_counter() - start)
            block.fill_(float("nan"))
            given = max(given, len(transport._peers[1]._given))
            assert not transport._peers[1]._arenas, "nothing was copied"
            del block
        else:
            got = torch.zeros(890)
            time.sleep(0.3 if turn == 9 else 0.0)
            transport.post([], [(got, 0)], f"turn {turn}").wait()
            assert (got == turn).all()
    return waited, given, len(os.listdir("/proc/self/fd")) - handles


def test_what_lies_in_shared_memory_is_not_copied_and_not_overwritten_before_it_is_taken() -> None:
    (waited, given, sender), (_, _, receiver) = run_processes(send_in_place, 2)
    assert waited > 0.2, "the sender waits until its message has been taken"
    assert given <= 2, "a block that is gone leaves its number to the next"
    assert sender <= 0 and receiver <= 0, "handles of blocks that are gone are closed, and of those that are mapped"


def calls_in_place(rank: int, world_size: int) -> tuple[int, int]:
    """The bytes of arenas and how many blocks were given, after attention forward and backward, and again."""
    import ringattn as ra

    cp = ra.ContextParallel(dist.group.WORLD, 240, mask=ra.causal(), schedule="ring")
    transport = cp.link.transport
    assert isinstance(transport, SharedMemoryTransport)
    for _ in range(4):
        q, k, v = (torch.randn(1, cp.local_seqlen, 2, 8, requires_grad=True) for _ in range(3))
        ra.attention(q, k, v, cp=cp).sum().backward()
    peers = transport._peers.values()
    return sum(x.numel() for p in peers for x in p._arenas.values()), max(len(p._given) for p in peers)


def infer_first(rank: int, world_size: int, schedule: str) -> bool:
    """Buffers that are made in inference mode, and used by a call that trains."""
    import ringattn as ra

    cp = ra.ContextParallel(dist.group.WORLD, 96, mask=ra.causal(), schedule=schedule)
    made = [torch.randn(1, cp.local_seqlen, heads, 8) for heads in (4, 2, 2)]
    with torch.inference_mode():
        first = ra.attention(*made, cp=cp).clone()
    leaves = [x.clone().requires_grad_() for x in made]
    out = ra.attention(*leaves, cp=cp)
    out.sum().backward()
    with torch.inference_mode():
        again = ra.attention(*made, cp=cp)
    return torch.equal(first, out) and torch.equal(first, again) and all(x.grad is not None for x in leaves)


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
def test_what_inference_has_allocated_a_training_uses(schedule: str) -> None:
    assert run_processes(infer_first, 2, schedule) == [True, True]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_attention_sends_its_buffers_as_they_lie(world_size: int) -> None:
    for arenas, given in run_processes(calls_in_place, world_size):
        assert arenas <= 64 * 2 * (world_size - 1), "only the few bytes that end a call are copied"
        assert given <= 8


class Silence:
    """Stands for `select.poll`: notes how long it was to wait, and nothing is ever ready."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def poll(self, milliseconds: float) -> list[tuple[int, int]]:
        self.asked.append(milliseconds)
        return []


@pytest.mark.parametrize("awake", [0.0, 0.05])
def test_a_rank_that_waits_sleeps_after_a_while(awake: float, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = Silence()
    monkeypatch.setattr(select, "poll", lambda: silence)
    start = time.monotonic()
    _serve([], 0.3, awake)
    assert time.monotonic() - start >= awake, "it does not sleep for so long"
    *looks, sleep = silence.asked
    assert sleep == pytest.approx(300) and set(looks) == {0}
    assert len(looks) == 1 if not awake else len(looks) > 1


def awake(rank: int, world_size: int, local: str | None) -> float:
    if local:
        os.environ["LOCAL_WORLD_SIZE"] = local
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:2])
    return shared_memory(20).awake


@pytest.mark.parametrize(
    "world_size, local, expected", [(2, None, AWAKE), (3, None, 0.0), (3, "2", AWAKE), (2, "8", 0.0)]
)
def test_ranks_without_a_core_of_their_own_sleep_at_once(world_size: int, local: str | None, expected: float) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    assert run_processes(awake, world_size, local) == [expected] * world_size


def leave_after_sending(rank: int, world_size: int) -> None:
    for turn in range(30):
        transport = shared_memory(20)
        got = torch.zeros(5)
        if rank == 0:
            for number in (1.0, 2.0):
                transport.post([(torch.full((5,), number), 1)], [], "last words").wait()
            del transport
        else:
            for number in (1.0, 2.0):
                time.sleep(0.002 * (turn % 2))
                transport.post([], [(got, 0)], "last words").wait()
                assert (got == number).all()


def test_what_was_sent_arrives_after_its_sender_has_left() -> None:
    run_processes(leave_after_sending, 2)


def run_out_of_handles(rank: int, world_size: int) -> str:
    transport = shared_memory(20)
    if rank == 0:
        transport.post([(torch.ones(3), 1)], [], "step 1").wait()
        return ""
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with pytest.raises(PeerError) as caught:
        transport.post([], [(torch.zeros(3), 0)], "step 1").wait()
    return str(caught.value)


def test_a_process_out_of_file_handles_is_told() -> None:
    assert "rank 0: its memory could not be mapped" in run_processes(run_out_of_handles, 2)[1]


def send_a_wrong_size(rank: int, world_size: int) -> str:
    transport = shared_memory(20)
    if rank == 0:
        transport.post([(torch.zeros(3), 1)], [], "step 1").wait()
        return ""
    with pytest.raises(PeerError) as caught:
        transport.post([], [(torch.zeros(2), 0)], "step 1").wait()
    return str(caught.value)


def test_shared_memory_checks_what_arrives() -> None:
    assert "rank 0: it sent 12 bytes where 8 were expected" in run_processes(send_a_wrong_size, 2)[1]


def take_part_elsewhere(rank: int, world_size: int) -> str:
    import ringattn.comm.shared_memory as module

    module.machine = lambda: f"machine {rank // 2}"
    return type(transport_over(dist.group.WORLD, 20)).__name__


def test_ranks_on_several_machines_use_the_groups_engine() -> None:
    assert set(run_processes(take_part_elsewhere, 3)) == {"ProcessGroupTransport"}
    assert set(run_processes(take_part_elsewhere, 2)) == {"SharedMemoryTransport"}


def refuse_devices(rank: int, world_size: int, make: Callable[[float], Transport]) -> None:
    transport = make(20)
    with pytest.raises(ValueError, match=r"step 1: the tensors are on 'meta'.*\['cpu'\].*Loopback"):
        transport.post([(torch.empty(2, device="meta"), 1 - rank)], [], "step 1")


@BETWEEN_PROCESSES
def test_devices_that_cannot_be_moved_are_refused(make: Callable[[float], Transport]) -> None:
    run_processes(refuse_devices, 2, make)


def test_an_exception_on_one_rank_releases_all() -> None:
    released: list[str] = []

    def fail(transport: Transport) -> None:
        if transport.rank == 2:
            raise KeyError("mine")
        pending = transport.post([], [(torch.zeros(1), (transport.rank + 1) % 4)], "step 0")
        try:
            pending.wait() if transport.rank else transport.board.await_key("never", 60)
        except PeerError as error:
            released.append(str(error))
            raise

    start = time.monotonic()
    with pytest.raises(KeyError, match="mine") as caught:
        Loopback(4, timeout=60).run(fail)
    assert caught.value.__notes__ == ["raised on rank 2 of a loopback world of 4"]
    assert len(released) == 3 and all("rank 2 failed with KeyError('mine')" in text for text in released)
    assert time.monotonic() - start < 10


def test_a_rank_that_returns_early_is_named() -> None:
    def early(transport: Transport) -> None:
        if transport.rank == 0:
            transport.post([], [(torch.zeros(1), 1)], "step 4").wait()

    with pytest.raises(PeerError, match="step 4: rank 0, waiting for rank 1: rank 1 has returned without"):
        Loopback(2, timeout=60).run(early)


def test_the_loopback_deadline() -> None:
    done = threading.Event()

    def stall(transport: Transport) -> None:
        if transport.rank == 0:
            try:
                transport.post([], [(torch.zeros(1), 1)], "step 4").wait()
            finally:
                done.set()
        done.wait(30)

    with pytest.raises(PeerError, match=r"rank 0, waiting for rank 1: nothing came within 0\.2 s"):
        Loopback(2, timeout=0.2).run(stall)


def test_what_is_sent_must_be_received() -> None:
    def lose(transport: Transport) -> None:
        transport.post([(torch.zeros(1), 1)] if transport.rank == 0 else [], [], "lost").wait()

    with pytest.raises(RuntimeError, match="never received: number 0 from rank 0 to rank 1"):
        Loopback(2).run(lose)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_loopback_checks_what_arrives(wrong: Tensor) -> None:
    def mismatch(transport: Transport) -> None:
        sends = [(wrong, 1)] if transport.rank == 0 else []
        transport.post(sends, [(torch.zeros(2), 0)] if transport.rank else [], "step 1").wait()

    with pytest.raises(PeerError, match=r"rank 1 expects 2 x torch\.float32"):
        Loopback(2).run(mismatch)


@pytest.mark.parametrize("make", [lambda t: (torch.zeros(4, 4).t()[:2], 1), lambda t: (t, 0), lambda t: (t, 2)])
def test_batches_are_checked(make: Callable[[Tensor], tuple[Tensor, int]]) -> None:
    def post(transport: Transport) -> None:
        if transport.rank == 0:
            transport.post([make(torch.zeros(2))], [], "step 1")

    with pytest.raises(AssertionError):
        Loopback(2).run(post)


@pytest.mark.parametrize("arguments", [(0,), (2, 0.0), (2, -1.0)])
def test_loopback_refuses_bad_worlds(arguments: tuple) -> None:
    with pytest.raises(ValueError):
        Loopback(*arguments)


class _Hop(torch.autograd.Function):
    """Sends its input one rank on; backward sends the gradient one rank back."""

    @staticmethod
    def forward(ctx, x: Tensor, transport: Transport) -> Tensor:
        ctx.transport = transport
        return _hop(transport, x, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _hop(ctx.transport, grad, -1), None


def _hop(transport: Transport, x: Tensor, way: int) -> Tensor:
    arriving = torch.full_like(x, float("nan"))
    to, source = (transport.rank + way) % transport.world_size, (transport.rank - way) % transport.world_size
    transport.post([(x.contiguous(), to)], [(arriving, source)], "hop").wait()
    return arriving


def backward_meets_peers(device: str) -> None:
    def work(transport: Transport) -> tuple[float, float]:
        x = torch.full((2,), float(transport.rank), device=device, requires_grad=True)
        out = _Hop.apply(x, transport)
        (out * (transport.rank + 1)).sum().backward()
        return out[0].item(), x.grad[0].item()

    assert Loopback(3, timeout=20).run(work) == [(2.0, 2.0), (0.0, 3.0), (1.0, 1.0)]


def test_backward_on_rank_threads_may_meet_its_peers() -> None:
    backward_meets_peers("cpu")


@pytest.mark.gpu
def test_backward_on_rank_threads_of_one_gpu_may_meet_its_peers() -> None:
    backward_meets_peers("cuda")

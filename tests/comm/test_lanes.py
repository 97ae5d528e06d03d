"""Lanes: messages on communicators of our own, over gloo in NCCL's place: which goes where, in which order, and that
they end with the group and fail as its own messages do."""

import datetime
import functools
import gc
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import Homeward, PeerError, SharedMemoryTransport
from ringattn.comm.lanes import OwnLane, open_lanes
from ringattn.testing import results, run_processes
from tests.support.clock import patience
from tests.support.grids import mostly_slow
from tests.support.lanes import unlabelled_transport
from tests.support.ring import check, single_process, tensors

S = 150
SIZES = {"q_len": S, "kv_len": S, "batch": 1}
SCHEDULES = ("ring", "exchange", "gather")
# the last one's queries travel
MASKS = [ra.causal(), ra.documents([0, 3, 3, 70, 90, S]) & ra.causal(), ra.longformer(5, 2, causal=False)]
HOMEWARD = ("forward partial", "backward grad", "backward dq")


def pass_each_other(rank: int, world: int, communicators: int) -> list[float]:
    """Two messages to a rank that awaits them the other way round."""
    transport, got = unlabelled_transport(20, communicators), torch.zeros(2)
    if rank == 0:
        transport.post([(torch.ones(1), 1)], [], "keys").wait()
        transport.post([Homeward(torch.full((1,), 2.0), 1)], [], "gradients").wait()
    else:
        gradients = transport.post([], [Homeward(got[1:], 0)], "gradients")
        keys = transport.post([], [(got[:1], 0)], "keys")
        keys.wait()
        gradients.wait()
    return got.tolist()


@pytest.mark.parametrize("communicators", mostly_slow([0, 1, 2], [2]))
def test_on_two_lanes_messages_pass_each_other(communicators: int) -> None:
    expected = [1.0, 2.0] if communicators == 2 else [2.0, 1.0]
    assert run_processes(pass_each_other, 2, communicators)[1] == expected


def watched(transport: Any) -> list[tuple[int, int]]:
    """What goes out from now on: the lane, and the bytes sent."""
    seen: list[tuple[int, int]] = []

    def watch(at: int, lane: Any) -> Any:
        def start(group: Any, out: Any, back: Any) -> Any:
            seen.append((at, sum(tensor.nbytes for tensors in out.values() for tensor in tensors)))
            return lane(group, out, back)

        return start

    transport.lanes[:] = [watch(at, lane) for at, lane in enumerate(transport.lanes)]
    return seen


def attend(rank: int, world: int) -> dict[Any, Any]:
    """Every schedule on the group's own communicator, on one of ours and on two; the bytes are the same."""
    q, k, v, dout, dlse = tensors(**SIZES)
    found, bytes_of = {}, {}
    for communicators in (0, 1, 2):
        transport = unlabelled_transport(20, communicators)
        seen, first = watched(transport), ra.ContextParallel(transport, S, mask=MASKS, layout="contiguous")
        for schedule in SCHEDULES:
            cp = first.replace(schedule=schedule)
            for i, mask in enumerate(MASKS):
                inputs = [t.clone().requires_grad_() for t in (q, k, v)]
                out, lse = ra.attention(*map(cp.shard, inputs), cp=cp, mask=mask, return_lse=True)
                found[communicators, schedule, i] = results(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs)
        bytes_of[communicators] = first.traffic()["sent"], first.traffic()["received"]
        assert bytes_of[communicators] == bytes_of[0]
        sent = bytes_of[0][0]
        assert {"backward grad", "forward q"} <= sent.keys(), "some queries travel"
        home = sum(sent.get(kind, 0) for kind in HOMEWARD)
        at_home = communicators - 1 if communicators else 0
        of_home = sum(nbytes for lane, nbytes in seen if lane == at_home)
        assert of_home == (home if communicators == 2 else sum(sent.values()))
        assert sum(nbytes for _, nbytes in seen) == sum(sent.values())
    return found


@pytest.mark.parametrize("world", mostly_slow([2, 3], [2]))
def test_every_schedule_is_right_on_lanes(world: int) -> None:
    ranks = run_processes(attend, world)
    for case in ranks[0]:
        check([found[case] for found in ranks], single_process(MASKS[case[2]], **SIZES), 1e-10)


def order(rank: int, world: int) -> list[list[int]]:
    """The lanes of each batch, in the order in which it went out."""
    transport = unlabelled_transport(20, 2)
    seen, batches, post = watched(transport), [], transport.post

    def spy(sends: Any, recvs: Any, what: str) -> Any:
        before = len(seen)
        pending = post(sends, recvs, what)
        batches.append([lane for lane, _ in seen[before:]])
        return pending

    transport.post = spy  # type: ignore[method-assign]
    q, k, v, dout, _ = tensors(**SIZES)
    shards = ra.Options(kv_bytes=2 * -(-S // world) * (k.nbytes + v.nbytes) // S)  # two: one hop a step
    cp = ra.ContextParallel(transport, S, mask=ra.full(), layout="striped", schedule="ring", options=shards)
    inputs = [cp.shard(t).requires_grad_() for t in (q, k, v)]
    ra.attention(*inputs, cp=cp).backward(cp.shard(dout))
    return batches


def test_all_ranks_post_to_lanes_in_one_order() -> None:
    first, *others = run_processes(order, 4)
    assert [0, 1] in first and all(lanes == sorted(lanes) for lanes in first)
    assert all(lanes == first for lanes in others)


def held() -> tuple[int, int]:
    """Threads of gloo, and sockets."""
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    handles = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum("gloo" in name for name in threads), sum(name.startswith("socket:") for name in handles)


def settled(wanted: tuple[int, int]) -> tuple[int, int]:
    """What is held, once that is no more than wanted: threads and peers take a moment to end, a loaded machine
    longer."""
    deadline = time.monotonic() + patience(5)
    while (now := held()) > wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return now


def steady() -> tuple[int, int]:
    """What is held, once it stays so: a thread has its name a moment after it has started."""
    known, since = held(), time.monotonic()
    while time.monotonic() < since + 0.2:
        time.sleep(0.01)
        if (now := held()) != known:
            known, since = now, time.monotonic()
    return known


def let_go(rank: int, world: int) -> None:
    """A context that is still held does not hold its group's lanes: of a group on its own, then of all."""
    dist.barrier()
    before = steady()
    contexts = []
    for _ in range(2):
        group = dist.new_group(list(range(world)))
        contexts.append(ra.ContextParallel(unlabelled_transport(20, 2, group), S))
        train(contexts[-1])
        assert held() > before
        dist.destroy_process_group(group)
        del group
        assert settled(before) == before
    contexts.append(ra.ContextParallel(unlabelled_transport(20, 2), S))
    train(contexts[-1])
    dist.destroy_process_group()
    assert settled((0, 0))[0] == 0
    for cp in contexts:
        with pytest.raises(RuntimeError, match="has been destroyed"):
            train(cp)


def train(cp: ra.ContextParallel) -> None:
    q, k, v, dout, _ = tensors(**SIZES)
    inputs = [cp.shard(t).requires_grad_() for t in (q, k, v)]
    ra.attention(*inputs, cp=cp).backward(cp.shard(dout))


@pytest.mark.parametrize("world", [2, 3])
def test_lanes_end_with_their_group(world: int) -> None:
    run_processes(let_go, world)


def lose_a_peer(rank: int, world: int) -> tuple[list[str], float]:
    transport = unlabelled_transport(10, 2)
    cp = ra.ContextParallel(transport, S)
    train(cp)
    if rank == 1:
        os._exit(3)
    start, texts = time.monotonic(), []
    pending = transport.post([], [(torch.zeros(3), 1), Homeward(torch.zeros(3), 1)], "backward step 2")
    for way in (pending.wait, pending.wait, functools.partial(train, cp)):
        with pytest.raises(ValueError if isinstance(way, functools.partial) else PeerError) as caught:
            way()
        texts.append(str(caught.value))
    seconds = time.monotonic() - start
    dist.destroy_process_group()
    del pending, way, caught
    gc.collect()  # errors hold what has failed, and each other
    assert held()[0] == 0, "nor do lanes that have failed stay"
    return texts, seconds


def test_a_killed_rank_is_named_and_the_lanes_are_lost() -> None:
    (first, again, later), seconds = run_processes(lose_a_peer, 2, casualties=[1])[0]
    assert first == again and "backward step 2" in first and "for rank 1 in vain" in first
    assert "a new process group" in later and seconds < 8.0


def open_alone(rank: int, world: int) -> str:
    transport = unlabelled_transport(20)
    if rank == 0:
        dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout = datetime.timedelta(seconds=0.5)
        with pytest.raises(PeerError, match="not every rank of group") as caught:
            transport.open_lanes(1, torch.device("cpu"))
        transport.board.publish("over", "")
        return str(caught.value)
    assert transport.board.await_key("over", 20.0)
    return ""


def test_a_rank_that_opens_no_lane_is_missed() -> None:
    assert "rank 0 of 2" in run_processes(open_alone, 2)[0]


# -- the option ---------------------------------------------------------------------------------


def ask(rank: int, world: int) -> list[str]:
    group, texts = dist.group.WORLD, []
    with pytest.raises(ValueError, match="ranks disagree") as caught:
        ra.ContextParallel(group, S, options=ra.Options(timeout=20, communicators=rank))
    texts.append(str(caught.value))
    apart, cp = (ra.ContextParallel(group, S, options=ra.Options(timeout=20, communicators=n)) for n in (0, 2))
    again = ra.ContextParallel(group, S, options=ra.Options(timeout=20, communicators=2))
    assert again.link.transport is cp.link.transport is not apart.link.transport
    assert isinstance(cp.link.transport, SharedMemoryTransport), "between CPUs it changes nothing"
    train(cp)
    transport = unlabelled_transport(20, 2)
    for way in (
        lambda: cp.replace(options=ra.Options(timeout=20, communicators=1)),
        lambda: ra.ContextParallel(transport, S, options=ra.Options(communicators=2)),
    ):
        with pytest.raises(ValueError, match=r"Options\.communicators=") as caught:
            way()
        texts.append(str(caught.value))
    return texts


def test_all_ranks_ask_for_the_same_number() -> None:
    for differ, replaced, given in run_processes(ask, 2):
        assert "Options.communicators: 0 on rank 0; 1 on rank 1" in differ
        assert "communicators=1, but the transport's are 2" in replaced
        assert "communicators=2, but the transport's are 0" in given


# -- NCCL's own, of which there is none on a CPU ------------------------------------------------


class Recorded:
    """An engine that notes what it is told."""

    supports_coalescing = True

    def __init__(self, *made: Any) -> None:
        self.made, self.told = made, []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.told.append((name, *arguments))


def test_a_lane_of_nccl_is_told_one_batch_as_one() -> None:
    backend, a, b = Recorded(), torch.ones(1), torch.ones(2)
    works = OwnLane(backend)(None, {1: [a, b]}, {2: [a]})  # type: ignore[arg-type]
    names = [name for name, *_ in backend.told]
    assert names == ["_start_coalescing", "send", "send", "recv", "_end_coalescing"] and len(works) == 1
    assert [peer for _, _, peer, _ in backend.told[1:-1]] == [1, 1, 2]


def test_a_lane_of_nccl_has_a_high_priority_and_the_groups_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.high = is_high_priority_stream

    class Engine(Recorded):
        def allreduce(self, tensors: list[torch.Tensor]) -> Any:
            tensors[0].fill_(2.0)
            return Recorded()

    class Group:
        group_name = "11"
        options = Options()

        def __init__(self, engine: str) -> None:
            self.name, self.options._timeout = (lambda: engine), datetime.timedelta(seconds=7)

        def _get_backend(self, device: torch.device) -> Any:
            return self

        rank, size = (lambda self: 1), (lambda self: 2)

    monkeypatch.setattr(Engine, "Options", Options, raising=False)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Engine, raising=False)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [4, 6])
    lanes = open_lanes(Group("nccl"), torch.device("cpu"), dist.HashStore(), 2)  # type: ignore[arg-type]
    for lane in lanes:
        _, rank, size, options = lane.backend.made
        assert (rank, size, options.high, options._timeout.seconds) == (1, 2, True, 7)
        assert options.global_ranks_in_group == [4, 6]
    with pytest.raises(NotImplementedError, match="'ucc'"):
        open_lanes(Group("ucc"), torch.device("cpu"), dist.HashStore(), 2)  # type: ignore[arg-type]

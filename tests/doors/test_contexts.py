"""Contexts of one group: they count calls together, come into being on all ranks or on none, and end with the group."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import CallMismatch, Meeting, PeerError, ProcessGroupTransport, Transport
from ringattn.testing import run_processes
from tests.support.steps import AT_ONCE, DEADLINE, OPTIONS, S, attempt, context, gloo, inputs_of, shared_memory, step


def refuse_a_context(rank: int, world: int) -> list[tuple[str, float, str]]:
    """One rank's arguments do not fit: the first context of a group, a later one, and a replacement."""
    odd, found = rank == world - 1, []
    ways: list[Callable[[], Any]] = [
        lambda: context(mask="causal" if odd else ra.causal()),
        lambda: context(options=7 if odd else OPTIONS),
        lambda: ra.ContextParallel(dist.group.WORLD, -1 if odd else S, options=OPTIONS),
    ]
    for way in ways:
        text, seconds = attempt(way)
        found.append((text, seconds, step(context(), 1)))
    cp = context()
    for changes in ({"mask": ra.documents([0, S + 1])}, {"layout": "diagonal"}, {"world": 3}):
        start = time.monotonic()
        text = attempt(lambda changes=changes: cp.replace(**changes))[0] if odd else step(cp, 1)  # type: ignore[misc]
        found.append((text, time.monotonic() - start, step(cp, 2)))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_a_context_that_one_rank_refuses_is_refused_by_all(world: int) -> None:
    ranks = run_processes(refuse_a_context, world)
    for outcomes in zip(*ranks, strict=True):
        for rank, (text, seconds, later) in enumerate(outcomes):
            assert text.startswith("ValueError") and later == "right" and seconds < AT_ONCE, outcomes
            assert rank == world - 1 or f"rank {world - 1} refused the call" in text, outcomes


def call_in_another_order(rank: int, world: int) -> list[tuple[str, float, str]]:
    """Two contexts made one beside the other, one to train and one to evaluate, in calls of new and of known kinds."""
    training, evaluation = context(), context(mask=ra.full())
    found = []
    q, k, v, _ = map(training.shard, inputs_of(1))
    for known in (False, True):
        contexts = (training, evaluation) if rank else (evaluation, training)
        for cp in (training, evaluation) if known else ():
            ra.attention(q, k, v, cp=cp)
        text, seconds = attempt(lambda cp=contexts[0]: ra.attention(q, k, v, cp=cp))  # type: ignore[misc]
        found.append((text, seconds, step(evaluation, 2)))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_contexts_called_in_another_order_are_told_at_once(world: int) -> None:
    for found in run_processes(call_in_another_order, world):
        for text, seconds, later in found:
            assert "CallMismatch" in text and "full()" in text and "causal()" in text and seconds < AT_ONCE, found
            assert later == "right", found


def meet_again(rank: int, world: int) -> list[bool]:
    """Which transports contexts share: those of one deadline, until a call has failed that not all have seen."""
    first, second = context().link.transport, context(mask=ra.full()).link.transport
    slower = context(options=ra.Options(timeout=2 * DEADLINE)).link.transport
    cp = context()
    with suppress(CallMismatch, PeerError):
        for _ in range(3):
            ra.attention(*map(cp.shard, inputs_of(0)[:3]), cp=cp) if rank else cp.unshard(cp.shard(inputs_of(0)[0]))
    after = context()
    return [second is first, slower is first, after.link.transport is first, step(after, 1) == "right"]


def test_contexts_share_a_transport_as_long_as_it_works() -> None:
    assert run_processes(meet_again, 2) == [[True, False, False, True]] * 2


def stay_away(rank: int, world: int) -> tuple[str, float]:
    if rank == 1:
        time.sleep(2.0)
        return "", 0.0
    return attempt(lambda: context(options=ra.Options(timeout=1.0)))


def test_a_rank_that_makes_no_context_is_named() -> None:
    text, seconds = run_processes(stay_away, 2)[0]
    assert text.startswith("PeerError") and "rank 1 of 2 did not come" in text and seconds < 1.0 + AT_ONCE


def lose_a_rank_in_an_agreement(rank: int, world: int, late: float) -> tuple[str, float, str]:
    cp = ra.ContextParallel(ProcessGroupTransport(dist.group.WORLD, DEADLINE), S, layout="zigzag")
    assert step(cp, 0) == "right"
    if rank == 1:
        time.sleep(late)
        os.kill(os.getpid(), signal.SIGKILL)
    q, k, v, _ = map(cp.shard, inputs_of(1))
    text, seconds = attempt(lambda: ra.attention(q, k, v, cp=cp, scale=2.0))  # a new kind of call
    return text, seconds, attempt(lambda: ra.attention(q, k, v, cp=cp))[0]


@pytest.mark.parametrize("late", [0.0, 1.0])
@pytest.mark.parametrize("world", [2, 3])
def test_over_gloo_a_death_is_noticed_in_an_agreement(world: int, late: float) -> None:
    ranks = run_processes(lose_a_rank_in_an_agreement, world, late, casualties=[1])
    for text, seconds, later in ranks[:1] + ranks[2:]:
        assert text.startswith("PeerError") and "rank 1" in text and seconds < 2 * late + AT_ONCE, ranks
        assert later.startswith("CallMismatch") and "new process group" in later, ranks


def miss_a_deadline(rank: int, world: int) -> list[str]:
    cp = ra.ContextParallel(ProcessGroupTransport(dist.group.WORLD, 1.0), S, layout="zigzag")
    found = [step(cp, 0)]
    if rank == 1:
        time.sleep(2.5)
    return [*found, *(step(cp, number) for number in (1, 2, 3))]


@pytest.mark.parametrize("world", [2, 3])
def test_over_gloo_a_missed_deadline_names_its_remedy(world: int) -> None:
    for found in run_processes(miss_a_deadline, world):
        assert found[0] == "right" and found[1].startswith("PeerError"), found
        assert all("new process group" in text for text in found[2:]), found


def pass_by(rank: int, world: int, make: Callable[[], Transport]) -> tuple[str, float]:
    """One rank comes to a new kind of call, and the others go on with calls in which no rank needs another."""
    bounds = [S * r // world for r in range(world + 1)]
    cp = ra.ContextParallel(make(), S, mask=ra.documents(bounds), layout="contiguous")
    q, k, v, _ = map(cp.shard, inputs_of(1))

    def attend() -> None:
        if rank == 0:
            ra.attention(q, k, v, cp=cp, scale=2.0)
        for _ in range(20):
            time.sleep(0.1)
            ra.attention(q, k, v, cp=cp)

    ra.attention(q, k, v, cp=cp)
    return attempt(attend)


def test_calls_without_messages_do_not_pass_by_a_rank_that_waits() -> None:
    for text, seconds in run_processes(pass_by, 3, shared_memory):
        assert text.startswith("CallMismatch") and seconds < AT_ONCE, text


class Untold(Exception):
    """An exception that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def fail_strangely(rank: int, world: int, make: Callable[[], Transport]) -> list[tuple[str, float]]:
    cp = ra.ContextParallel(make(), S, layout="zigzag")
    q, k, v, _ = map(cp.shard, inputs_of(1))
    found = []
    for error in (Untold(), ValueError("\udcff lone"), MemoryError()):
        post = cp.link.transport.post

        def fail(*_: Any, error: Exception = error) -> Any:
            raise error

        if rank == 0:
            cp.link.transport.post = fail  # type: ignore[method-assign]
        with suppress(Untold):
            found.append(attempt_whatever(lambda: ra.attention(q, k, v, cp=cp)))
        cp.link.transport.post = post  # type: ignore[method-assign]
        assert step(cp, 2) == "right"
    return found


def attempt_whatever(way: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    try:
        way()
    except Exception as error:
        with suppress(RuntimeError):
            return str(error), time.monotonic() - start
    return "", time.monotonic() - start


@pytest.mark.parametrize("make", [gloo, shared_memory])
def test_errors_that_cannot_be_told_are_told_by_name(make: Any) -> None:
    first, second, third = run_processes(fail_strangely, 2, make)[1]
    assert "rank 0 failed" in first[0] and "Untold" in first[0] and first[1] < AT_ONCE
    assert "rank 0 refused the call: ? lone" in second[0] and second[1] < AT_ONCE
    assert "MemoryError" in third[0] and third[1] < AT_ONCE


def run_out_of_memory(rank: int, world: int, make: Callable[[], Transport]) -> list[tuple[str, float]]:
    """One rank has no room for what a call of shard or unshard makes, forward and backward."""
    cp = ra.ContextParallel(make(), S, layout="zigzag")
    found = []
    for name in ("_pick", "_assembled", "_spread"):
        from ringattn.runtime import sharding

        kept = getattr(sharding, name)

        def fail(*_: Any) -> Any:
            raise MemoryError("no room")

        x = inputs_of(0)[0].requires_grad_()

        def calls(x: torch.Tensor = x, cp: ra.ContextParallel = cp) -> None:
            cp.unshard(cp.shard(x, grad="share")).sum().backward()
            ra.attention(*map(cp.shard, inputs_of(0)[:3]), cp=cp)

        calls()
        if rank == 0:
            setattr(sharding, name, fail)
        found.append(attempt(calls))
        setattr(sharding, name, kept)
        later = step(cp, 2)
        if name == "_spread":  # in a backward that moves nothing: the others may have gone on by any number of calls
            assert "make a new context" in later
            cp = ra.ContextParallel(make(), S, layout="zigzag")
        assert step(cp, 2) == "right", name
    return found


@pytest.mark.parametrize("make", [gloo, shared_memory])
def test_no_room_in_sharding_is_told_to_all(make: Any) -> None:
    ranks = run_processes(run_out_of_memory, 2, make)
    assert all("MemoryError: no room" in text and seconds < AT_ONCE for text, seconds in ranks[0]), ranks
    assert all("rank 0 failed" in text and seconds < AT_ONCE for text, seconds in ranks[1]), ranks


def test_a_meeting_of_one_needs_nobody() -> None:
    assert run_processes(meet_alone, 1) == [True]


def meet_alone(rank: int, world: int) -> bool:
    with Meeting(dist.group.WORLD) as meeting:
        return meeting.transport(1.0).world_size == 1


def described(rank: int, world: int) -> tuple[str, str]:
    return ra.ContextParallel(None, S).describe(), context().describe()


def test_a_context_without_a_group_says_so_where_there_is_one() -> None:
    for rank, (alone, together) in enumerate(run_processes(described, 2)):
        first, second, *_ = alone.splitlines()
        assert "over 1 rank (" in first and f"this process, rank {rank} of 2, attends alone" in second
        assert "torch.distributed.group.WORLD" in second and "NOT SHARDED" not in together
    assert "NOT SHARDED" not in ra.ContextParallel(None, S).describe()

"""What a signal's handler raises, at any moment of a call, and processes forked from a rank's: nothing is left wrong,
and all ranks are told."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import SharedMemoryTransport, Transport
from ringattn.comm.shield import shield
from ringattn.comm.sums import REFUSED
from ringattn.runtime import sharding
from ringattn.testing import run_processes
from tests.support.alarms import alarmed
from tests.support.faults import Injected
from tests.support.steps import AT_ONCE, DEADLINE, S, attempt, context, gloo, inputs_of, shared_memory, step


def test_what_is_shielded_is_done_to_its_end() -> None:
    done: list[int] = []

    def work() -> None:
        done.append(1)
        time.sleep(3e-4)
        done.append(2)

    hits = 0
    for moment in range(300):
        done.clear()
        hits += alarmed(lambda: shield(work), moment * 3e-6 + 1e-6)
        assert done in ([], [1, 2]), (moment, done)
    assert hits > 30


def test_what_is_shielded_returns_raises_and_keeps_modes() -> None:
    with torch.inference_mode():
        assert shield(lambda: (torch.is_inference_mode_enabled(), torch.is_grad_enabled())) == (True, False)
    with torch.no_grad():
        assert shield(torch.is_grad_enabled) is False
    assert shield(torch.is_grad_enabled) is True
    with pytest.raises(Injected, match="in there"):
        shield(lambda: (_ for _ in ()).throw(Injected("in there")))


def sum_on(rank: int, world: int, moments: int) -> tuple[int, int]:
    """One rank is interrupted in its sums, and goes on; how often it was, and how often the others were refused."""
    hits = refusals = 0
    random = torch.Generator().manual_seed(0)
    expected = torch.full((12,), world * (world + 1) / 2)
    for _ in range(moments):
        parameters = [torch.nn.Parameter(torch.zeros(12)) for _ in range(3)]
        for parameter in parameters:
            parameter.grad = torch.full((12,), rank + 1.0)
        after, hit = float(torch.rand((), generator=random)) * 1e-3 + 1e-6, False
        try:
            call = lambda p=parameters: ra.loss.sum_gradients(p, dist.group.WORLD)  # noqa: E731
            hit = alarmed(call, after, "sum_gradients") if rank == 0 else call() is not None
        except ValueError as error:
            assert REFUSED in str(error)
            refusals += 1
        else:
            for parameter in parameters if not hit else ():
                torch.testing.assert_close(parameter.grad, expected)
        hits += hit
        total = ra.loss.sum_over(torch.ones(3), dist.group.WORLD)
        torch.testing.assert_close(total, torch.full((3,), float(world)))
    return hits, refusals


@pytest.mark.parametrize("world", [2, 3])
def test_sums_that_are_interrupted_are_whole_or_refused_by_all(world: int) -> None:
    (hits, none), *others = run_processes(sum_on, world, 150)
    assert hits > 20 and none == 0, hits
    assert all(no_hits == 0 and refusals == others[0][1] <= hits for no_hits, refusals in others), others


class Interrupts:
    """Ctrl-C after a time on one rank, but inside of calls only: what fails outside of them, nobody is told. ``again``:
    a second one so many seconds after the first."""

    def __init__(self, cp: ra.ContextParallel) -> None:
        self.inside = self.armed = False
        self.again = 0.0
        begin, finish = cp.link.begin, cp.link.finish

        def begun(*arguments: Any, **more: Any) -> None:
            self.inside = True
            begin(*arguments, **more)

        def finished(*arguments: Any, **more: Any) -> None:
            finish(*arguments, **more)
            self.inside = False

        cp.link.begin, cp.link.finish = begun, finished  # type: ignore[method-assign]
        signal.signal(signal.SIGALRM, self.ring)

    def arm(self, after: float, again: float = 0.0) -> None:
        self.armed, self.inside, self.again = after > 0, False, again
        signal.setitimer(signal.ITIMER_REAL, after)

    def ring(self, *_: Any) -> None:
        if self.armed and not self.inside:
            signal.setitimer(signal.ITIMER_REAL, 2e-5)
        elif self.armed:
            self.armed, self.again, again = self.again > 0, 0.0, self.again
            signal.setitimer(signal.ITIMER_REAL, again)
            raise KeyboardInterrupt


def interrupt(
    rank: int, world: int, make: Callable[[], Transport], hits: int, twice: bool, seed: int = 0
) -> tuple[int, int]:
    """Ctrl-C on one rank at many moments of a step, until so many steps were hit (a step that the machine lets run
    faster than those that were timed is over before its moment); how many were, and how many contexts it took."""

    def fresh() -> tuple[ra.ContextParallel, Interrupts]:
        cp = ra.ContextParallel(make(), S, layout="zigzag")
        return cp, Interrupts(cp)

    (cp, interrupts), random, made, hit = fresh(), torch.Generator().manual_seed(seed), 1, 0
    seconds = min(attempt(lambda cp=cp: step(cp, 0))[1] for _ in range(3))  # type: ignore[misc]

    def under_fire(number: int) -> str:
        with suppress(KeyboardInterrupt):
            try:
                after, again = torch.rand(2, generator=random).tolist()
                interrupts.arm(after * seconds + 1e-6, (again * 2e-4 + 1e-6) * twice)
                return step(cp, number)
            except KeyboardInterrupt:
                pass
            finally:
                interrupts.arm(0.0)
        return "interrupted"

    def interrupted(number: int) -> str:
        try:
            return under_fire(number)
        except KeyboardInterrupt:  # the second of two
            return "interrupted"

    for number in range(10 * hits):
        outcome = interrupted(number) if rank == world - 1 else step(cp, number)
        outcomes: list[Any] = [None] * world
        dist.all_gather_object(outcomes, (outcome, step(cp, number + 1), step(cp, number + 2)))
        if any(outcomes[-1] != "right" for outcomes in outcomes):
            assert all(outcomes[-1] != "right" for outcomes in outcomes), outcomes
            (cp, interrupts), made = fresh(), made + 1
        assert rank == world - 1 or outcome != "interrupted"
        hit += outcomes[-1][0] == "interrupted"
        if hit == hits:
            break
    return hit, made


@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [gloo, shared_memory])
def test_interrupts_at_any_moment_leave_nothing_wrong(make: Any, twice: bool) -> None:
    (hits, made), other = run_processes(interrupt, 2, make, 40, twice)
    assert (hits, made) == other and hits == 40 and made < 30, (hits, made, other)


def tear(rank: int, world: int, place: str) -> list[tuple[str, float]]:
    """An exception on one rank in the middle of a step that counts, and what comes of the calls after it."""
    cp = ra.ContextParallel(shared_memory(), S, layout="zigzag")
    transport = cp.link.transport
    assert isinstance(transport, SharedMemoryTransport) and step(cp, 0) == "right"
    peer = transport._peers[(rank + 1) % world]

    class Tearing:
        """Something whose one method raises, once, after it has done its work."""

        def __init__(self, whole: Any) -> None:
            self.whole, self.torn = whole, False

        def __getattr__(self, name: str) -> Any:
            method = getattr(self.whole, name)
            if name != place:
                return method

            def torn(*arguments: Any) -> Any:
                result = method(*arguments)
                if not self.torn:
                    self.torn = True
                    raise Injected(place)
                return result

            return torn

    if rank == 0:
        if place in ("recvmsg", "sendmsg"):
            peer.socket = Tearing(peer.socket)  # type: ignore[assignment]
        else:
            setattr(peer, place, getattr(Tearing(peer), place))
    found = []
    for number in range(3):
        start = time.monotonic()
        found.append((step(cp, number), time.monotonic() - start))
    again = ra.ContextParallel(shared_memory(), S, layout="zigzag")
    return [*found, (step(again, 4), 0.0)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("place", ["recvmsg", "sendmsg", "_free_arena", "_answer", "_arrive"])
def test_a_torn_connection_is_told_to_all_with_its_remedy(place: str, world: int) -> None:
    for rank, (first, *refused, again) in enumerate(run_processes(tear, world, place)):
        assert ("Injected" if rank == 0 else "rank 0 failed") in first[0] and first[1] < AT_ONCE, first
        for text, seconds in refused:
            assert text.startswith("CallMismatch") and "make a new context of the group" in text, text
            assert "torn" in text and seconds < AT_ONCE, text
        assert again[0] == "right"


def fork(rank: int, world: int) -> list[str]:
    """A child of one rank drops its context, calls it, and has it refuse something."""
    cp = ra.ContextParallel(shared_memory(), S, layout="zigzag")
    found = [step(cp, 0)]
    if rank == 0:
        reader, writer = os.pipe()
        if not os.fork():
            text = step(cp, 1) + "\n" + attempt(lambda: cp.shard(torch.ones(1, S + 1)))[0]
            os.write(writer, text.encode())
            del cp.link.transport._peers  # type: ignore[attr-defined]
            del cp
            os._exit(0)
        os.wait()
        found += os.read(reader, 1 << 16).decode().split("\n")
    return [*found, step(cp, 1), step(cp, 2)]


def test_a_forked_child_disturbs_nobody() -> None:
    parent, other = run_processes(fork, 2)
    assert other == ["right"] * 3
    assert parent[0] == parent[-1] == parent[-2] == "right"
    assert "only the process that has made a context can call it" in parent[1]
    assert parent[2].startswith("ValueError") and str(S) in parent[2]


def fail_to_save(rank: int, world: int) -> tuple[str, float]:
    """What one rank does with the tensors that its forward saves fails, as an offload that has no room."""
    cp = context()
    leaves = [cp.shard(x).requires_grad_() for x in inputs_of(0)[:3]]

    def pack(x: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            raise MemoryError("no room")
        return x

    def train() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = ra.attention(*leaves, cp=cp)
        out.sum().backward()

    return attempt(train)


def test_tensors_that_cannot_be_saved_are_told_to_all() -> None:
    ranks = run_processes(fail_to_save, 2)
    assert ranks[1][0] == "MemoryError: no room" and "rank 1 failed" in ranks[0][0], ranks
    assert all(seconds < AT_ONCE for _, seconds in ranks), ranks


def interrupt_a_meeting(rank: int, world: int, late: float) -> list[tuple[str, float]]:
    """One rank is interrupted while it makes a context, before the others come or when they are there."""
    context()
    found = []
    for number in range(6):
        dist.barrier()
        if rank and late:
            time.sleep(late)
        start = time.monotonic()

        def make(timeout: float = DEADLINE + number) -> None:
            context(options=ra.Options(timeout=timeout))

        if rank == 0:
            interrupted = alarmed(make, 0.05 if late else number * 1e-3 + 1e-4, "_meet", "stop")
            text = "interrupted" if interrupted else "nothing"
        else:
            text = attempt(make)[0]
        seconds = time.monotonic() - start
        texts: list[Any] = [None] * world
        dist.all_gather_object(texts, step(context(), number))
        found.append((f"{text}, then {texts}", seconds))
    return found


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_a_context_whose_making_is_interrupted_keeps_nobody_waiting(late: float) -> None:
    ranks = run_processes(interrupt_a_meeting, 2, late)
    for outcomes in zip(*ranks, strict=True):
        assert all(seconds < late + AT_ONCE for _, seconds in outcomes), outcomes
        if late:
            assert "rank 0 was interrupted before rank 1 came" in outcomes[1][0], outcomes
        # what was made on one rank only is refused on both; then they go on
        assert all("['right', 'right']" in text or "Alarm" in text for text, _ in outcomes), outcomes


def refuse_in_a_loader(rank: int, world: int, make: Callable[[], Transport], during: bool) -> list[str]:
    """A thread of one rank has a batch refused, in or between the calls of the main thread."""
    cp = ra.ContextParallel(make(), S, layout="zigzag")
    found = [step(cp, 0)]

    def load() -> None:
        with suppress(ValueError):
            cp.replace(layout="diagonal")

    loader = threading.Thread(target=load)
    post = cp.link.transport.post

    def load_meanwhile(*arguments: Any) -> Any:
        loader.start()
        loader.join()
        cp.link.transport.post = post  # type: ignore[method-assign]
        return post(*arguments)

    if rank == 0 and during:
        cp.link.transport.post = load_meanwhile  # type: ignore[method-assign]
    elif rank == 0:
        loader.start()
        loader.join()
    return [*found, *(step(cp, number) for number in (1, 2, 3))]


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("make", [gloo, shared_memory])
def test_what_another_thread_refuses_all_ranks_refuse_in_one_call(make: Any, during: bool) -> None:
    ranks = run_processes(refuse_in_a_loader, 2, make, during)
    for zero, one in zip(*ranks, strict=True):
        assert (zero == "right") == (one == "right"), ranks
    for texts in ranks:  # which of the others' batches it was, nobody knows
        refused = [text for text in texts if text != "right"]
        assert "was refused in a thread of rank 0" in refused[0] and "diagonal" in refused[0], ranks
        assert len(refused) >= 2 and all("make a new context" in text for text in refused[1:]), ranks


class Timeouts:
    """A socket at which a signal's handler raises what sockets raise, too."""

    def __init__(self, whole: Any) -> None:
        self.whole, self.raised = whole, False

    def __getattr__(self, name: str) -> Any:
        if name == "sendmsg" and not self.raised:
            self.raised = True
            raise TimeoutError("the user's own")
        return getattr(self.whole, name)


def time_out(rank: int, world: int) -> str:
    cp = ra.ContextParallel(shared_memory(), S, layout="zigzag")
    transport = cp.link.transport
    assert isinstance(transport, SharedMemoryTransport) and step(cp, 0) == "right"
    if rank == 0:
        transport._peers[1].socket = Timeouts(transport._peers[1].socket)  # type: ignore[assignment]
    return step(cp, 1)


def test_a_time_limit_of_the_users_is_not_taken_for_a_lost_peer() -> None:
    raised, told = run_processes(time_out, 2)
    assert raised == "TimeoutError: the user's own" and "rank 0 failed" in told, (raised, told)


def call_in_a_child(rank: int, world: int) -> list[str]:
    """Making a context and summing, in a child of one rank; then its parent and the others make one."""
    found = []
    if rank == 0:
        reader, writer = os.pipe()
        if not os.fork():
            ways: list[Callable[[], Any]] = [
                context, lambda: ra.ContextParallel(dist.group.WORLD, -1),
                lambda: ra.loss.sum_over(torch.ones(1), dist.group.WORLD),
                lambda: ra.loss.count_targets(torch.ones(1), dist.group.WORLD),
            ]  # fmt: skip
            os.write(writer, "\n".join(attempt(way)[0] for way in ways).encode())
            os._exit(0)
        os.wait()
        found = os.read(reader, 1 << 16).decode().split("\n")
    dist.barrier()
    assert ra.loss.sum_over(torch.ones(1), dist.group.WORLD) == world
    return [*found, step(context(), 1)]


def test_a_forked_child_makes_no_context_and_no_sum_of_its_parents() -> None:
    parent, other = run_processes(call_in_a_child, 2)
    assert other == ["right"] and parent[-1] == "right"
    assert all("was forked from" in text for text in parent[:3]), parent
    assert parent[3].startswith("ValueError: labels"), parent


def skip_a_backward(rank: int, world: int, what: str) -> list[tuple[str, float]]:
    """Between two calls, or in one that moves nothing, one rank raises, and all go on with their next step."""
    cp = ra.ContextParallel(shared_memory(), S, layout="zigzag")
    x, found = cp.shard(inputs_of(0)[0]), []

    def fail(*_: Any) -> Any:
        raise KeyError("the user's own")

    def train(number: int) -> None:
        leaf = x.clone().requires_grad_()
        y = ra.roll(cp, leaf, 1) if what == "roll" else cp.unshard(leaf)
        if number == 1 and rank == 0 and what == "roll":
            y.register_hook(fail)
        kept = sharding._pick
        if number == 1 and rank == 0 and what == "unshard":
            sharding._pick = fail
        try:
            y.backward(torch.full_like(y, number + 1.0))
        finally:
            sharding._pick = kept
        assert leaf.grad is not None and leaf.grad.max() == number + 1, "another step's"

    for number in range(5):
        start = time.monotonic()
        try:
            train(number)
            text = "right"
        except AssertionError as error:
            text = f"WRONG: {error}"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        found.append((text, time.monotonic() - start))
    return found


@pytest.mark.parametrize("what", ["roll", "unshard"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_are_a_call_apart_are_told(world: int, what: str) -> None:
    ranks = run_processes(skip_a_backward, world, what)
    for found in ranks:
        assert found[0][0] == "right" and not any(text.startswith("WRONG") for text, _ in found), ranks
        assert all(seconds < AT_ONCE for _, seconds in found), ranks
        assert "make a new context" in found[-1][0] or "make a new context" in found[-2][0], ranks
    assert "make a new context" in ranks[0][-1][0], ranks


def die_with_a_child(rank: int, world: int) -> tuple[str, float]:
    """A rank is killed whose child lives on, as a loader's worker does for a while."""
    cp = ra.ContextParallel(shared_memory(), S, layout="zigzag")
    assert step(cp, 0) == "right"
    if rank == 1:
        if not os.fork():
            time.sleep(5.0)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    return step(cp, 1), time.monotonic() - start


def test_a_dead_rank_is_noticed_though_its_child_lives() -> None:
    text, seconds = run_processes(die_with_a_child, 2, casualties=[1])[0]
    assert text.startswith("PeerError") and "rank 1" in text and seconds < AT_ONCE, (text, seconds)

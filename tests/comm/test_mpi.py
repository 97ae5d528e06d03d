"""The transport over MPI, between ranks that mpiexec has started: the exchanges of every transport, attention, and what
becomes of ranks that fail, differ, fall silent or die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import ringattn as ra
from ringattn.comm import CallMismatch, PeerError
from ringattn.testing import dense_attention
from tests.support import exchanges
from tests.support import failing as calls
from tests.support.clock import patience
from tests.support.grids import mostly_slow
from tests.support.mpi import ABSENT, ROOT, end_of, in_group, on_ranks, over_mpi
from tests.support.steps import S, step

pytestmark = pytest.mark.skipif(ABSENT, reason="needs mpi4py and an mpiexec: pip install -e '.[mpi]'")
UNEVEN = 61


def attend(cp: ra.ContextParallel, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of all tokens, of the ring and of one process, whose numbers are in fp64."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, UNEVEN, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (x.to(dtype) for x in made)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = cp.unshard(ra.attention(*map(cp.shard, leaves), cp=cp))
    out.backward(dout)
    alone = [x.double().requires_grad_() for x in (q, k, v)]
    whole, _ = dense_attention(*alone, cp.masks[0].dense(UNEVEN, UNEVEN))
    whole.backward(dout.double())
    return [out.detach(), *(x.grad for x in leaves)], [whole.detach(), *(x.grad for x in alone)]


def largest_errors(comm: Any, dtype: torch.dtype) -> list[float]:
    """Relative to the largest number, of each schedule and tensor."""
    errors = []
    for schedule in ("ring", "exchange", "gather"):
        mask = ra.causal() & (ra.sliding_window(20) | ra.global_tokens(3))
        cp = ra.ContextParallel(comm, UNEVEN, mask=mask, schedule=schedule)
        for found, exact in zip(*attend(cp, dtype), strict=True):
            errors.append(float((found - exact).abs().max() / exact.abs().max()))
    return errors


def exchange_and_attend(comm: Any) -> tuple[str, list[float], list[float]]:
    errors = [largest_errors(comm, dtype) for dtype in (torch.float64, torch.bfloat16)]
    return exchanges.all_exchanges(comm.rank, comm.size, over_mpi), *errors


@pytest.mark.parametrize("world_size", mostly_slow([2, 3], [2]))
def test_exchanges_and_attention(world_size: int) -> None:
    results = on_ranks(exchange_and_attend, world_size)
    assert len({name for name, *_ in results}) == 1
    for _, exact, rounded in results:
        assert all(error < 1e-13 for error in exact), results
        assert all(error < 2**-6 for error in rounded), results


# Calls


def fail_differ_and_refuse(comm: Any) -> tuple[Any, ...]:
    """One after the other, each over a transport of its own: most of a job's time is its start."""
    last = comm.size - 1
    return tuple(
        in_group(comm, *call)
        for call in ((calls.fail_everywhere, over_mpi, last), (calls.differ, over_mpi), (calls.refuse, over_mpi))
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_what_fails_differs_or_is_refused_on_one_rank_is_told_to_all(world: int) -> None:
    failed, differed, refused = map(list, zip(*on_ranks(fail_differ_and_refuse, world, timeout=100.0), strict=True))
    calls.check_faults(failed, world)
    calls.check_differences(differed)
    calls.check_refusals(refused, world)


def fail_with_much_under_way(comm: Any) -> tuple[list[str], list[int]]:
    """Rank 0 has sent long messages when rank 1 fails, again and again; what MPI still holds of them later."""
    transport, peer, kept = over_mpi(), 1 - comm.rank, []
    cp, texts = ra.ContextParallel(transport, S), []
    big = torch.ones(1 << 20)
    for number in range(3):
        with pytest.raises((KeyError, PeerError)) as caught, ra.comm.together(transport, "roll"):
            if comm.rank:
                raise KeyError("mine")
            transport.post([(big, peer)], [(torch.empty_like(big), peer)], "long").wait()
        texts.append(str(caught.value))
        assert step(cp, number) == "right"
        kept.append(len(transport._under_way))
    return texts, kept


@pytest.mark.slow
def test_what_a_failed_call_has_sent_is_taken_and_dropped() -> None:
    (told, kept), (raised, _) = on_ranks(fail_with_much_under_way, 2)
    assert all("rank 1 failed" in text and "mine" in text for text in told) and raised == ["'mine'"] * 3
    assert kept[-1] <= 1, "the messages of the calls before are not held any more"


# A communicator in the group's place


def share(comm: Any) -> None:
    from mpi4py import MPI

    first, second = (ra.ContextParallel(comm, S, mask=mask) for mask in (ra.causal(), ra.full()))
    assert first.link.transport is second.link.transport, "contexts of a communicator count calls together"
    with pytest.raises(ValueError, match="the transport's deadline is 300"):
        ra.ContextParallel(comm, S, options=ra.Options(timeout=3.0))
    q = torch.randn(1, first.local_seqlen, 2, 8)
    with pytest.raises(CallMismatch, match="the ranks disagree"):
        ra.attention(q, q, q, cp=first if comm.rank else second)
    assert step(first, 0) == "right"
    with pytest.raises(CallMismatch, match=r"is at call|disagree"):
        ra.attention(q, q, q, cp=first) if comm.rank else second.unshard(q)
    assert "make a new context" in step(first, 0)
    half = comm.Split(comm.rank % 2, comm.rank)
    cp = ra.ContextParallel(half, S, options=ra.Options(timeout=9.0))
    assert cp.world_size == half.size and cp.link.transport.timeout == 9.0 and step(cp, 1) == "right"
    third = ra.ContextParallel(comm, S)
    assert third.link.transport is not first.link.transport, "one that can go on"
    assert step(third, 2) == "right"
    for wrong, what in ((MPI.COMM_NULL, "must be an mpi4py intracommunicator"), (comm.group, "pass a ProcessGroup")):
        with pytest.raises(ValueError, match=what):
            ra.ContextParallel(wrong, S)


@pytest.mark.slow
def test_a_communicator_in_the_groups_place() -> None:
    on_ranks(share, 4)


def on_two_machines(comm: Any) -> str:
    """As far as ranks tell each other."""
    from ringattn.comm import mpi

    mpi.machine = lambda: f"machine {comm.rank // 2}"  # type: ignore[assignment]
    cp = ra.ContextParallel(comm, S, schedule="double_ring")
    assert "2 ranks a node, says MPI" in cp.describe() and step(cp, 0) == "right"
    crossed = ra.ContextParallel(comm.Split(0, [0, 2, 1, 3][comm.rank]), S)
    assert "the ranks of a node are no neighbours, says MPI" in crossed.describe()
    return step(crossed, 1)


@pytest.mark.slow
def test_machines_that_ranks_see_are_nodes() -> None:
    assert on_ranks(on_two_machines, 4) == ["right"] * 4


def refuse_alone(comm: Any) -> tuple[str, str]:
    with pytest.raises(ValueError) as caught:
        cp = ra.ContextParallel(comm, -1 if comm.rank else S)
        ra.attention(*[torch.zeros(1, cp.local_seqlen, 2, 8)] * 3, cp=cp)
    return str(caught.value), step(ra.ContextParallel(comm, S), 3)


@pytest.mark.slow
def test_a_context_that_one_rank_refuses_is_refused_by_all() -> None:
    (told, first), (refused, second) = on_ranks(refuse_alone, 2)
    assert "rank 1 refused" in told and "seqlen=-1" in told and "seqlen=-1" in refused
    assert first == second == "right"


# What is refused


class OnGpu:
    """What the check sees of a tensor."""

    device = torch.device("cuda", 0)


def send_strange_tensors(comm: Any) -> str:
    with pytest.raises(ValueError, match="CUDA tensors over an MPI that is not CUDA-aware"):
        over_mpi()._check_devices([OnGpu()], "step 1")  # type: ignore[attr-defined]
    transport, peer = over_mpi(), 1 - comm.rank
    with pytest.raises(ValueError, match=r"step 1: the tensors are on 'meta'.*\['cpu'\] only"):
        transport.post([(torch.empty(2, device="meta"), peer)], [], "step 1")
    pending = transport.post([(torch.zeros(3 + comm.rank), peer)], [(torch.zeros(3), peer)], "step 2")
    if comm.rank:  # what it gets is right, and what it sends is short enough to be under way already
        pending.wait()
        return ""
    with pytest.raises(PeerError) as caught:
        pending.wait()
    return str(caught.value)


@pytest.mark.slow
def test_tensors_that_do_not_fit_are_refused() -> None:
    said = on_ranks(send_strange_tensors, 2)[0]
    assert "rank 1: it sent 16 bytes where 12 were expected" in said


@pytest.mark.slow
def test_a_thread_level_that_is_too_low_is_refused() -> None:
    code = (
        "import mpi4py; mpi4py.rc.thread_level = 'funneled'; from mpi4py import MPI; from ringattn.comm import *; "
        "from ringattn.comm import MPITransport; MPITransport(MPI.COMM_WORLD)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "thread level 'funneled'" in done.stderr and "mpi4py.rc.thread_level = 'serialized'" in done.stderr


def test_without_mpi4py_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match=r"MPITransport wants mpi4py.*pip install 'ringattn\[mpi\]'"):
        ra.comm.MPITransport  # noqa: B018


# Ranks that are not there


@pytest.mark.slow
def test_a_silent_rank_is_named_within_the_deadline() -> None:
    for text in on_ranks(in_group, 3, exchanges.post_to_the_silent, over_mpi)[::2]:
        assert "backward step 2" in text and "(deadline 1.0 s) for rank 1 in vain" in text


def construct_alone(comm: Any) -> None:
    if comm.rank == 0:
        with pytest.raises(PeerError, match=r"not every rank of the MPI communicator made its transport within 0\.3 s"):
            over_mpi(0.3)
        comm.send(None, 1)
        os._exit(0)  # MPI would wait for the rest of what was begun
    comm.recv(source=0)
    os._exit(0)


@pytest.mark.slow
def test_construction_by_some_ranks_only_is_told() -> None:
    ended = end_of(construct_alone, 2)
    assert "Error" not in ended.said


def die(comm: Any, deadline: float, said: Path) -> None:
    """Rank 1 is killed while the others wait for it; what they say, and after how long."""
    cp = ra.ContextParallel(over_mpi(deadline), S)
    assert step(cp, 0) == "right"
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    text = step(cp, 1)
    (said / f"{comm.rank}").write_text(f"{time.monotonic() - start:.1f} s: {text}")
    os._exit(1)  # MPI's own end would wait for rank 1


@pytest.mark.slow
def test_a_killed_rank_is_named_where_mpiexec_does_not_see_it(tmp_path: Path) -> None:
    both = f'"$@"; while [ $(ls {tmp_path} | wc -l) -lt 2 ]; do sleep 0.1; done'
    end_of(die, 3, 50.0, tmp_path, options=["sh", "-c", both, "sh"])
    for rank in (0, 2):
        seconds, text = (tmp_path / f"{rank}").read_text().split(" s: ")
        assert text.startswith("PeerError") and "for rank 1 in vain (rank 1: its process has ended)" in text
        assert float(seconds) < 5.0, "long before the deadline"


@pytest.mark.slow
def test_mpiexec_ends_the_job_of_a_killed_rank(tmp_path: Path) -> None:
    ended = end_of(die, 3, 50.0, tmp_path)
    assert ended.code != 0 and ended.seconds < patience(30), ended.said


def raise_on_one(comm: Any) -> None:
    cp = ra.ContextParallel(comm, S)
    assert step(cp, 0) == "right"
    if comm.rank == 1:
        raise KeyError("nobody catches it")
    time.sleep(60)


@pytest.mark.slow
def test_a_rank_that_raises_ends_all() -> None:
    ended = end_of(raise_on_one, 3)
    assert ended.code != 0 and "nobody catches it" in ended.said and ended.seconds < patience(30)

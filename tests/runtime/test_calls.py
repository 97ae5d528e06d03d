"""Messages belong to calls: what one rank fails or refuses, all do at once, and no message ever fills another call's
tensor; after it the next call that all ranks start together is right again."""

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn.comm import CallMismatch, Loopback, PeerError, Transport, handshake
from ringattn.testing import run_processes
from tests.support.failing import check_differences, check_faults, check_refusals, differ, fail_everywhere, refuse
from tests.support.faults import Injected
from tests.support.steps import AT_ONCE, S, expected, gloo, inputs_of, shared_memory, step

TRANSPORTS = pytest.mark.parametrize("make", [gloo, shared_memory])
WORLDS = pytest.mark.parametrize("world", [2, 3])


def end_slowly(rank: int, _: int) -> list[str]:
    """Ranks 0 and 2 end their group and make one more call, while the others still are in the last act of the one
    before."""
    held, transport = dist.group.WORLD, shared_memory()  # held: with the group would go what warns the others
    cp = ra.ContextParallel(transport, S)
    x = cp.shard(torch.ones(1, S, 2))
    cp.unshard(x)
    post = transport.post

    def dawdle(sends: Any, recvs: Any, what: str) -> Any:
        pending = post(sends, recvs, what)
        if rank % 2 and what.startswith("end, 2"):
            time.sleep(rank / 2)  # rank 1 then waits for rank 3, and hears the others
        return pending

    transport.post = dawdle  # type: ignore[method-assign]
    found = []
    for group in ("there", "gone"):
        if group == "gone":
            dist.destroy_process_group()
        try:
            cp.unshard(x)
            found.append("right")
        except RuntimeError as error:
            found.append(str(error))
    assert held is not None
    return found


def test_what_fails_after_a_call_leaves_it_right_on_ranks_that_are_slower() -> None:
    for right, refused in run_processes(end_slowly, 4):
        assert right == "right"
        assert "has been destroyed" in refused


@TRANSPORTS
@WORLDS
def test_a_fault_at_every_message_is_one_on_all_ranks(make: Any, world: int) -> None:
    check_faults(run_processes(fail_everywhere, world, make, world - 1), world)


@TRANSPORTS
@WORLDS
def test_ranks_that_differ_in_a_known_call_are_told_at_once(make: Any, world: int) -> None:
    check_differences(run_processes(differ, world, make))


def go_on_with_the_next_batch(rank: int, world: int, make: Callable[[], Transport]) -> list[str]:
    """Rank 0 fails between two calls of batch 1, and each rank goes on with its next batch."""
    cp = ra.ContextParallel(make(), S, layout="zigzag")
    outcomes = []
    for number in range(5):
        try:
            q, k, v, dout = map(cp.shard, inputs_of(number))
            leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            out = ra.attention(*leaves, cp=cp)
            if rank == 0 and number == 1:
                raise Injected("outside of any call")
            out.backward(dout)
            found = [out.detach(), *(t.grad for t in leaves)]
            right = all(map(torch.allclose, found, expected(cp, number)))
            outcomes.append("right" if right else "wrong")
        except (Injected, PeerError) as error:
            outcomes.append(str(error))
    return outcomes


@TRANSPORTS
@WORLDS
def test_ranks_at_different_batches_are_never_wrong(make: Any, world: int) -> None:
    for outcomes in run_processes(go_on_with_the_next_batch, world, make):
        assert outcomes[0] == "right" and "wrong" not in outcomes, outcomes
        assert "make a new context" in outcomes[3] and "right" not in outcomes[1:], outcomes


def recompute(rank: int, world: int, make: Callable[[], Transport]) -> int:
    """Checkpointing stops the recomputed forward by an exception, once attention has saved what backward wants."""
    cp = ra.ContextParallel(make(), S, layout="zigzag")
    for number in range(10):
        q, k, v, dout = map(cp.shard, inputs_of(number))
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = checkpoint(lambda *qkv: ra.attention(*qkv, cp=cp), *leaves, use_reentrant=False)
        out.backward(dout)
        for a, b in zip((out.detach(), *(t.grad for t in leaves)), expected(cp, number), strict=True):
            torch.testing.assert_close(a, b)
    return cp.link.transport.log.epoch


@TRANSPORTS
@pytest.mark.parametrize("world", [2, 4])
def test_a_recomputation_that_autograd_stops_is_no_failure(make: Any, world: int) -> None:
    assert run_processes(recompute, world, make) == [0] * world


@TRANSPORTS
@WORLDS
def test_what_one_rank_refuses_is_refused_by_all(make: Any, world: int) -> None:
    check_refusals(run_processes(refuse, world, make), world)


def refuse_whole_keys(rank: int, world: int) -> str:
    """A whole K at kv_seqlen=1, which lives on rank 0: right there, and too long on the others."""
    cp = ra.ContextParallel(dist.group.WORLD, S, kv_seqlen=1, mask=ra.full())
    q, k, v, _ = inputs_of(1)
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        ra.attention(cp.shard(q), k[:, :1], v[:, :1], cp=cp)
    assert time.monotonic() - start < AT_ONCE
    return str(caught.value)


def test_whole_keys_are_refused_on_all_ranks() -> None:
    assert all("k has 1 tokens" in text for text in run_processes(refuse_whole_keys, 2))


def start_beside_a_stranger(rank: int, world: int) -> list[str]:
    """Somebody else calls the ranks' sockets before they do: with nonsense, with a wrong secret, and silently."""
    found = handshake._Listener.__init__

    def and_a_stranger(self: Any, address: str, secret: bytes, world_size: int) -> None:
        found(self, address, secret, world_size)
        for word in (b"x", handshake._HELLO.pack(1 - rank, b"0" * 16), None):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.connect(f"\0{address}")
            if word is not None:
                stranger.send(word)
            strangers.append(stranger)

    strangers: list[socket.socket] = []
    handshake._Listener.__init__ = and_a_stranger  # type: ignore[method-assign]
    cp = ra.ContextParallel(shared_memory(), S)
    return [step(cp, 1)]


def test_strangers_at_the_socket_are_ignored() -> None:
    assert run_processes(start_beside_a_stranger, 2) == [["right"], ["right"]]


def test_a_failure_in_a_loopback_world_is_one_on_all_ranks() -> None:
    def one_rank(transport: Transport) -> list[str]:
        cp = ra.ContextParallel(transport, S)
        q, k, v, _ = map(cp.shard, inputs_of(1))
        texts = []
        for _ in range(2):
            with pytest.raises(ValueError) as caught:
                ra.attention(q, k, v, cp=cp, softcap=-1.0 if transport.rank == 1 else None)
            texts.append(str(caught.value))
            assert step(cp, 2) == "right"
        return texts

    for rank, texts in enumerate(Loopback(3, timeout=20).run(one_rank)):
        assert all("softcap=-1.0" in text and (rank == 1 or "rank 1 refused" in text) for text in texts)


def change_in_place(rank: int, _: int) -> list[str]:
    """What rank 1 keeps for backward is not what it was."""
    cp = ra.ContextParallel(shared_memory(), S)
    leaves = [cp.shard(x).requires_grad_() for x in inputs_of(1)[:3]]
    changed = leaves[0] * 1
    out = ra.attention(changed, *leaves[1:], cp=cp)
    if rank == 1:
        changed.detach().add_(1)
        changed.add_(1)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        out.sum().backward()
    assert time.monotonic() - start < 2.0
    return [str(caught.value), step(cp, 2)]


def test_what_backward_cannot_have_on_one_rank_is_told_to_all() -> None:
    for rank, (text, after) in enumerate(run_processes(change_in_place, 3)):
        assert "inplace operation" in text and after == "right", text
        assert rank == 1 or "rank 1 failed" in text, text


def ahead(transport: Transport, dtype: torch.dtype) -> tuple[str, float]:
    """Rank 1 has gone through calls that need nobody; rank 0 waits in the first of them, and is sent nothing any
    more."""
    cp = ra.ContextParallel(transport, S, layout="contiguous", schedule="ring")
    border = int(cp.q_layout.sizes[0])
    alone, across = (cp.replace(mask=ra.documents([0, at, S])) for at in (border, border + 5))
    q, first = torch.zeros(1, cp.local_seqlen, 1, 8), across if dtype == torch.float32 else alone
    for known in (cp, alone, across):
        ra.attention(q, q, q, cp=known)
    start = time.monotonic()
    with pytest.raises(CallMismatch) as raised:
        for mine in (first, cp) if transport.rank == 0 else (alone, alone, cp):
            asked = q.to(dtype) if (transport.rank, mine) == (0, first) else q
            ra.attention(asked, asked, asked, cp=mine)
    return str(raised.value), time.monotonic() - start


@pytest.mark.parametrize(("dtype", "rule"), [(torch.float32, "documents"), (torch.float64, "float64")])
def test_who_waits_in_a_call_that_another_has_gone_past_is_told(dtype: torch.dtype, rule: str) -> None:
    for text, waited in Loopback(2, timeout=20).run(lambda t: ahead(t, dtype)):
        assert rule in text and "rank 1 is at call 6" in text and waited < AT_ONCE

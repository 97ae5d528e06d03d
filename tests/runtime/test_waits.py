"""No wait without a name: what a rank says that has waited in vain."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import Loopback, PeerError, ProcessGroupTransport, Transport, Watch, transport_over
from ringattn.geometry.spans import in_words
from ringattn.testing import run_processes
from tests.support.grids import mostly_slow
from tests.support.lanes import unlabelled_transport

S, DEADLINE = 24, 0.7
KEYS = "kv of 8-15 from rank 1"


class Late:
    """A transport that is given some batch long after the others."""

    def __init__(self, transport: Any, what: str) -> None:
        post = transport.post

        def some(sends: Any, recvs: Any, called: str) -> Any:
            time.sleep(2 * DEADLINE if called == what else 0)
            return post(sends, recvs, called)

        transport.post = some


def attend(transport: Transport, label: str, backward: bool) -> str:
    """The error of a call in which rank 1 is late."""
    cp = ra.ContextParallel(transport, S, mask=ra.full(), layout="contiguous", schedule="ring")
    q = torch.randn(1, cp.local_seqlen, 1, 8, requires_grad=True)
    ra.attention(q, q, q, cp=cp, label=label).sum().backward()
    if cp.rank == 1:
        Late(transport, "backward step 1" if backward else "forward step 1")
    try:
        ra.attention(q, q, q, cp=cp, label=label).sum().backward()
    except PeerError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("backward", [False, True])
def test_it_says_the_layer_the_way_the_turn_the_peer_and_the_positions(backward: bool) -> None:
    texts = Loopback(3, timeout=DEADLINE).run(lambda t: attend(t, "layer 7", backward))
    way = "backward" if backward else "forward"
    waited = [text for text in texts if f"{way} step 1: rank" in text]
    assert waited, texts
    for text in waited:
        assert KEYS in text
        assert f"in {way} step 1 of call {4 if backward else 3}, attention {way}; layer 7; mask full()" in text


def too_late(transport: Transport, before: str) -> str:
    """The error of a call, the first of its kind, which rank 1 comes to too late; or to its end, or after a failure."""
    options = ra.Options(check_nan=before == "values")
    cp = ra.ContextParallel(transport, S, mask=ra.full(), layout="contiguous", schedule="ring", options=options)
    q = torch.randn(1, cp.local_seqlen, 1, 8)
    if before == "end":
        ra.attention(q, q, q, cp=cp)
        cp = cp.replace(mask=ra.documents([0, 12, S]))  # no rank needs another, so all meet at the end
    if before == "a failure":
        with pytest.raises(ValueError):
            ra.attention(q, q, q[:, :3] if cp.rank == 1 else q, cp=cp)
    if cp.rank == 1:
        time.sleep(2 * DEADLINE)
    with pytest.raises(PeerError) as raised:
        ra.attention(q, q, q, cp=cp, label="layer 7")
    return str(raised.value)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("nothing", "call 0.1, the first comparison of attention forward; layer 7: rank 1 of 2 did not come"),
        ("end", "rank 0 in the end of call 2, attention forward; layer 7; mask documents"),
        ("a failure", "call 1.1, the first one after a call that failed, attention forward; layer 7: rank 1 of 2 did"),
        ("values", "call 0.1, Options.check_nan; layer 7: rank 1 of 2 did not come"),
    ],
)
def test_the_first_call_is_named_too(before: str, said: str) -> None:
    texts = Loopback(2, timeout=DEADLINE).run(lambda t: too_late(t, before))
    assert said in texts[0], texts
    assert "layer 7" in texts[1], texts


def test_what_a_call_before_expected_is_not_said_of_another() -> None:
    def one_rank(transport: Transport) -> str:
        cp = ra.ContextParallel(transport, S, mask=ra.full(), layout="contiguous", schedule="ring")
        q = torch.randn(1, cp.local_seqlen, 1, 8)
        out = ra.attention(q, q, q, cp=cp)
        if cp.rank == 1:
            Late(transport, "all shards")
        with pytest.raises(PeerError) as raised:
            cp.unshard(out)
        return str(raised.value)

    texts = Loopback(2, timeout=DEADLINE).run(one_rank)
    assert any("rank 0 in call 2, unshard" in text for text in texts), texts
    assert not any("expects" in text for text in texts), texts


def over_gloo() -> Transport:
    return ProcessGroupTransport(dist.group.WORLD, DEADLINE)


def over_shared_memory() -> Transport:
    return transport_over(dist.group.WORLD, DEADLINE)


def in_processes(rank: int, world: int, make: Callable[[], Transport]) -> tuple[str, float]:
    start = time.monotonic()
    return attend(make(), "layer 7", False), time.monotonic() - start


@pytest.mark.parametrize("make", mostly_slow([over_gloo, over_shared_memory], [over_shared_memory]))
def test_processes_are_told_the_same(make: Callable[[], Transport]) -> None:
    found = run_processes(in_processes, 3, make)
    assert any(KEYS in text and "layer 7" in text for text, _ in found), found
    assert all("rank 1" in text for text, _ in found), found


def leave_a_transfer(rank: int, world: int) -> list[str]:
    """What the watch says where rank 1 comes too late to a batch without labels."""
    transport, told = unlabelled_transport(DEADLINE), list[str]()
    transport.watch.tell = told.append
    cp = ra.ContextParallel(transport, S, mask=ra.full(), layout="contiguous", schedule="ring")
    q = torch.randn(1, cp.local_seqlen, 1, 8)
    ra.attention(q, q, q, cp=cp)
    post = transport.post

    def late(sends: Any, recvs: Any, what: str) -> Any:
        if rank == 1 and what == "forward step 1":
            time.sleep(2 * DEADLINE)
        return post(sends, recvs, what)

    transport.post = late  # type: ignore[method-assign]
    for label in ("layer 7", "layer 8"):
        ra.attention(q, q, q, cp=cp, label=label)
    transport.watch.close()
    return told


def test_a_transfer_that_no_host_waits_for_is_told_when_it_is_overdue() -> None:
    first, late = run_processes(leave_a_transfer, 2)
    assert late == [] and len(first) == 2
    for label, text in zip(("layer 7", "layer 8"), first, strict=True):
        assert "rank 0 expects kv of 12-23 from rank 1 in forward step 1 of call" in text and label in text
        assert "it has been under way for" in text


def test_the_watch_ends_with_its_transport() -> None:
    def threads() -> int:
        return sum(thread.name == "ringattn watch" for thread in threading.enumerate())

    class Never:
        def is_completed(self) -> bool:
            return False

    watch, told = Watch(0.05), list[str]()
    watch.tell = told.append
    watch.add([Never()], lambda: "a transfer")  # type: ignore[list-item]
    assert threads() == 1
    while not told:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(told) == 1
    watch.close()
    while threads():
        time.sleep(0.01)


def test_positions_in_words() -> None:
    spans = torch.tensor([[0, 128, 1], [512, 256, 2], [900, 1, 1], [1000, 5, 1], [2000, 1, 1]]).numpy()
    assert in_words(spans) == "0-127, 512-1022 by 2, 900 and 2 more runs"
    assert in_words(spans[:1]) == "0-127"


def test_members_of_a_subset_are_named_as_the_group_names_them() -> None:
    def one_rank(transport: Transport) -> str:
        cp = ra.ContextParallel(transport, S)
        if cp.rank == 0:
            return ""
        some = cp.on([1, 3], layout="contiguous", mask=ra.full(), schedule="ring") if cp.rank in (1, 3) else None
        if some is None:
            return ""
        q = torch.randn(1, some.local_seqlen, 1, 8)
        if cp.rank == 1:
            Late(transport, "forward step 1")
        try:
            ra.attention(q, q, q, cp=some)
        except PeerError as error:
            return str(error)
        return "nothing was raised"

    texts = Loopback(4, timeout=DEADLINE).run(one_rank)
    assert any("kv of 0-11 from rank 1" in text and "among ranks 1, 3" in text for text in texts), texts


@pytest.mark.parametrize("label", [3, None, b"layer"])
def test_a_label_is_a_text(label: Any) -> None:
    q = torch.zeros(1, S, 1, 8)
    with pytest.raises(ValueError, match="must be a text"):
        ra.attention(q, q, q, cp=ra.ContextParallel(None, S), label=label)


def test_compiled_layers_have_labels_too() -> None:
    cp, q = ra.ContextParallel(None, S), torch.randn(1, S, 1, 8)

    @torch.compile(backend="eager", fullgraph=True)
    def layer(q: torch.Tensor) -> torch.Tensor:
        return ra.attention(q, q, q, cp=cp, label="layer 1")

    torch.testing.assert_close(layer(q), ra.attention(q, q, q, cp=cp))

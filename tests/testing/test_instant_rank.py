"""One rank whose transfers take no time: the same program, calls and bytes as that rank of a real ring."""

import pytest
import torch

import ringattn as ra
from ringattn.comm import Transport
from ringattn.testing import InstantRank

S, WORLD = 64, 4
MASK = ra.sliding_window(20) | ra.global_tokens(3)


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
def test_it_moves_what_the_rank_of_a_real_ring_moves(schedule: str) -> None:
    def one_rank(transport: Transport) -> tuple[dict[str, object], int, int, int]:
        cp = ra.ContextParallel(transport, S, mask=MASK, schedule=schedule, layout="zigzag")
        q, k, v = (torch.randn(1, cp.local_seqlen, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        for _ in range(3):
            ra.attention(q, k, v, cp=cp).sum().backward()
            cp.unshard(q.detach())
        traffic = cp.traffic()
        del traffic["wait_seconds"]
        return traffic, cp.program(MASK).calls, transport.log.course.made, transport.log.course.ballots

    for rank, real in enumerate(ra.Loopback(WORLD).run(one_rank)):
        assert one_rank(InstantRank(rank, WORLD)) == real


def test_a_receive_is_random_numbers_once_and_then_left_alone() -> None:
    rank, x, flags = InstantRank(0, 2), torch.full((100,), torch.nan), torch.zeros(3, dtype=torch.uint8)
    rank.post([(torch.zeros(2), 1)], [(x, 1), (flags, 1)], "once").wait()
    assert x.isfinite().all() and len(x.unique()) > 50 and not flags.any()
    kept = x.clone()
    rank.post([], [(x, 1)], "again").wait()
    assert torch.equal(x, kept)


def test_a_buffer_is_filled_for_the_longest_message_it_takes() -> None:
    rank, buffer = InstantRank(0, 2), torch.full((100,), torch.nan)
    for length in (10, 100, 50):
        rank.post([], [(buffer[:length], 1)], "longer").wait()
        assert buffer[:length].isfinite().all()


def test_it_is_a_transport_on_which_calls_are_refused_as_on_any() -> None:
    assert isinstance(InstantRank(0, 2), Transport)
    cp = ra.ContextParallel(InstantRank(1, 2), S)
    x = torch.randn(1, S // 2, 2, 8)
    with pytest.raises(ValueError, match="softcap"):
        ra.attention(x, x, x, cp=cp, softcap=-1.0)
    assert ra.attention(x, x, x, cp=cp).isfinite().all()
    with pytest.raises(ValueError, match="rank=2"):
        InstantRank(2, 2)

"""One rank whose messages take their time: they have arrived when they have been waited for, and not before."""

import pytest
import torch

import ringattn as ra
from ringattn.testing import InstantRank, StagedRank

S, WORLD = 64, 4


def test_receives_arrive_when_they_are_waited_for() -> None:
    rank, x, flags = StagedRank(0, 2), torch.full((3, 5), torch.nan), torch.zeros(3, dtype=torch.uint8)
    pending = rank.post([(torch.zeros(2), 1)], [(x, 1), (flags, 1)], "once")
    assert x.isnan().all()
    pending.wait()
    assert x.isfinite().all() and len(x.unique()) == x.numel() and not flags.any()
    x.fill_(torch.nan)
    pending.wait()  # what has arrived does not arrive again
    assert x.isnan().all()
    half = torch.zeros(2, dtype=torch.bfloat16)
    rank.post([], [(half, 1)], "another type").wait()
    assert half.all()


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
def test_it_moves_what_an_instant_rank_moves(schedule: str) -> None:
    found = []
    for transport in (InstantRank(1, WORLD), StagedRank(1, WORLD)):
        cp = ra.ContextParallel(transport, S, schedule=schedule, layout="zigzag")
        q, k, v = (torch.randn(1, cp.local_seqlen, heads, 8, requires_grad=True) for heads in (4, 2, 2))
        ra.attention(q, k, v, cp=cp).sum().backward()
        assert q.grad.isfinite().all()
        traffic = cp.traffic()
        found.append((traffic["sent"], traffic["received"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("rate", [0, -1.0, float("inf"), float("nan"), "fast"])
def test_a_rate_is_a_number_above_zero(rate: object) -> None:
    with pytest.raises(ValueError, match="bytes_per_second="):
        StagedRank(0, 2, bytes_per_second=rate)


@pytest.mark.gpu
def test_a_device_is_kept_back_to_the_rate_and_the_host_waits_for_nothing() -> None:
    rank, size = StagedRank(0, 2, bytes_per_second=1e10), 100_000_000
    x = torch.full((size // 4,), torch.nan, device="cuda")
    for _ in range(2):  # the first time numbers are made
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda.set_sync_debug_mode("error" if rank._lane else "default")
        rank.post([], [(x, 1)], "once").wait()
        torch.cuda.set_sync_debug_mode("default")
        end.record()
    end.synchronize()
    assert x.isfinite().all() and rank.rate == 1e10
    assert 0.009 < start.elapsed_time(end) / 1e3 < 0.013  # at 1e10 bytes a second it takes 0.01

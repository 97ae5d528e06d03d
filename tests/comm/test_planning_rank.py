"""A rank that plans for a world it cannot talk to: the plans, shards and texts of a rank that can, and a reason in the
place of every message."""

import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank, Transport, agree

S, WORLD = 29, 3
MASK = ra.sliding_window(9) | ra.global_tokens(2)


def test_it_plans_and_shards_as_the_rank_of_a_world_that_talks() -> None:
    x = torch.arange(2 * S).view(2, S)

    def one_rank(transport: Transport) -> tuple[str, torch.Tensor, torch.Tensor]:
        cp = ra.ContextParallel(transport, S, mask=MASK).replace(layout="striped")
        cp.program(MASK)
        return cp.describe(), cp.shard(x), cp.position_ids

    for rank, talking in enumerate(ra.Loopback(WORLD).run(one_rank)):
        planning = one_rank(PlanningRank(rank, WORLD))
        assert planning[0] == talking[0], "described: layout, schedule, steps and what each of them moves"
        assert all(torch.equal(a, b) for a, b in zip(planning[1:], talking[1:], strict=True))


def test_what_needs_another_rank_is_refused_at_once_every_time() -> None:
    cp = ra.ContextParallel(PlanningRank(1, WORLD), S, mask=MASK)
    x = torch.randn(1, S, 2, 4, requires_grad=True)
    local = cp.shard(x)
    calls = (
        lambda: ra.attention(local, local, local, cp=cp),
        lambda: cp.unshard(local),
        lambda: ra.roll(cp, local, 1),
        lambda: local.sum().backward(),
        lambda: agree(cp.link.transport, 0, {}),
    )
    for call in calls * 2:
        with pytest.raises(RuntimeError, match=r"rank 1 of 3 is a PlanningRank.*process group"):
            call()
    assert torch.equal(cp.shard(x), local), "it shards all the same"
    with pytest.raises(ValueError, match=r"x.size\(1\)=28"):
        cp.shard(x[:, 1:])


def test_its_store_and_its_messages_are_refused() -> None:
    rank = PlanningRank(0, 2, timeout=5.0)
    assert isinstance(rank, Transport) and rank.timeout == 5.0
    rank.post([], [], "nothing").wait()
    rank.check_open()
    rank.heed()
    uses = (
        lambda: rank.post([(torch.zeros(1), 1)], [], "forward step 1"),
        lambda: rank.publish("key", "value"),
        lambda: rank.lookup("key"),
        lambda: rank.count("key"),
        lambda: rank.await_key("key", 0.0),
        lambda: rank.forget("key"),
    )
    for use in uses:
        with pytest.raises(RuntimeError, match="PlanningRank"):
            use()
    with pytest.raises(RuntimeError, match="tensors of forward step 1"):
        uses[0]()


def test_the_only_rank_of_a_world_computes() -> None:
    q, k, v = torch.randn(3, 1, S, 2, 4)
    alone, planning = (ra.ContextParallel(group, S, mask=MASK) for group in (None, PlanningRank(0, 1)))
    assert torch.equal(ra.attention(q, k, v, cp=planning), ra.attention(q, k, v, cp=alone))


@pytest.mark.parametrize(
    ("place", "text"),
    [((3, 3), "rank=3: must be at most 2"), ((-1, 3), "rank=-1"), ((0, 0), "world_size=0"), ((0, 1, 0), "timeout=0")],
)
def test_places_that_there_are_not(place: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PlanningRank(*place)


def test_it_plans_for_the_device_it_is_told():
    """On a GPU merges cost more beside the work, so a step of the ring takes more hops."""
    shape = ra.Shape(32, 8, 128)
    hops = {}
    for device in ("cpu", "NVIDIA H100"):
        cp = ra.ContextParallel(
            PlanningRank(2, 8, device=device), 1 << 16, layout="zigzag", schedule="ring", shape=shape
        )
        assert ("an H100 or H200" in cp.describe()) == (device != "cpu")
        hops[device] = cp.program(cp.masks[0]).cut
    assert hops == {"cpu": 1, "NVIDIA H100": 2}
    with pytest.raises(ValueError, match="device=7: must be 'cpu' or the name of a GPU"):
        PlanningRank(0, 1, device=7)

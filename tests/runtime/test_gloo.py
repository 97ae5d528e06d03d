"""The same ring over real gloo processes: values, every rank's gradients, bytes, and what happens to the lost."""

import os
import time

import pytest
import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import PeerError, ProcessGroupTransport, SharedMemoryTransport, transport_over
from ringattn.planning.program import Row
from ringattn.testing import dense_attention, results, run_processes
from tests.support import cases
from tests.support.ring import check, tensors

S = cases.SEQLEN
MASKS = [ra.causal(), ra.longformer(4, [2, 9, 20]), ra.documents(cases.CU) & ra.causal()]


def over_gloo():
    return ProcessGroupTransport(dist.group.WORLD, 20)


def over_shared_memory():
    return transport_over(dist.group.WORLD, 20)


def attend_everywhere(rank, world, transport):
    """Every mask, layout and schedule on this process; the tensors that must equal one process's."""
    q, k, v, dout, dlse = tensors()
    found = {}
    first = ra.ContextParallel(transport(), S, mask=MASKS)
    for layout in ("contiguous", "zigzag", "striped"):
        for schedule in ("ring", "exchange"):
            cp = first.replace(layout=layout, schedule=schedule)
            for i, mask in enumerate(MASKS):
                inputs = [t.clone().requires_grad_() for t in (q, k, v)]
                out, lse = ra.attention(*map(cp.shard, inputs), cp=cp, mask=mask, return_lse=True)
                found[layout, schedule, i] = results(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("transport", [over_gloo, over_shared_memory])
def test_every_layout_and_schedule(world, transport):
    q, k, v, dout, dlse = tensors()
    expected = []
    for mask in MASKS:
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        expected.append(results(*dense_attention(*inputs, mask.dense(S, S)), dout, dlse, inputs))
    ranks = run_processes(attend_everywhere, world, transport)
    for case in ranks[0]:
        check([found[case] for found in ranks], expected[case[2]])


def attend_in_low_precision(rank, world):
    q, k, v, dout, _ = (t.to(torch.bfloat16) for t in tensors())
    cp = ra.ContextParallel(dist.group.WORLD, S)
    local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
    out = ra.attention(*local, cp=cp)
    out.backward(cp.shard(dout))
    row = 2 * 2 * (8 + 8) * 2  # batch, KV heads, K and V, two bytes
    assert cp.traffic()["received"]["forward kv"] == row * cp.program(cp.masks[0]).tokens(Row.KV)
    return [cp.unshard(t).double() for t in (out.detach(), *(t.grad for t in local))]


def test_bf16_travels_as_bf16_and_errs_like_one_device():
    q, k, v, dout, _ = (t.to(torch.bfloat16) for t in tensors())
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    out, _ = dense_attention(*inputs, ra.causal().dense(S, S))
    out.backward(dout.double())
    truth = [out.detach(), *(t.grad for t in inputs)]
    single = [t.clone().requires_grad_() for t in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in single), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    out.backward(dout)
    peer = [out.detach().double(), *(t.grad.double() for t in single)]
    for found in run_processes(attend_in_low_precision, 3):
        for a, b, exact in zip(found, peer, truth, strict=True):
            assert (a - exact).abs().max() <= 2 * (b - exact).abs().max()


def choose_transports(rank, world):
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    return [type(ra.ContextParallel(group, S).link.transport) for group in (dist.group.WORLD, mesh)]


def test_processes_of_one_machine_share_memory():
    assert run_processes(choose_transports, 2) == [[SharedMemoryTransport] * 2] * 2


def use_sub_groups(rank, world):
    """Two groups of two ranks, each with a context of its own, and a mesh slice."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    q, k, v, _, _ = tensors()
    outs = []
    for group, mask in ((groups[rank % 2], MASKS[rank % 2]), (mesh["cp"], MASKS[rank // 2])):
        cp = ra.ContextParallel(group, S, mask=mask)
        outs.append((MASKS.index(mask), cp.unshard(ra.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp))))
    with pytest.raises(ValueError, match=r"mesh\['cp'\]"):
        ra.ContextParallel(mesh, S)
    return outs


def test_sub_groups_and_meshes():
    q, k, v, _, _ = tensors()
    expected = [dense_attention(q, k, v, mask.dense(S, S))[0] for mask in MASKS]
    for outs in run_processes(use_sub_groups, 4):
        for which, out in outs:
            torch.testing.assert_close(out, expected[which])


def disagree(rank, world):
    q, k, v, _, _ = tensors()
    cp = ra.ContextParallel(
        dist.group.WORLD, S, mask=ra.sliding_window(3 + rank), layout="contiguous", options=ra.Options(timeout=10)
    )
    with pytest.raises(ValueError, match="ranks disagree") as caught:
        ra.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp)
    return str(caught.value)


def test_ranks_that_disagree_are_told_on_every_rank():
    for text in run_processes(disagree, 3):
        assert "mask: sliding_window(3, 0)" in text and "sliding_window(5, 0)" in text and "rank 2" in text
        assert "seqlen" not in text, "only what differs is named"


def lose_a_peer(rank, world):
    q, k, v, dout, _ = tensors()
    cp = ra.ContextParallel(dist.group.WORLD, S, options=ra.Options(timeout=5))
    local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
    out = ra.attention(*local, cp=cp)
    if rank == 1:
        os._exit(1)
    start = time.monotonic()
    with pytest.raises(PeerError, match=r"backward step \d.*rank") as caught:
        out.backward(cp.shard(dout))
    return time.monotonic() - start, str(caught.value)


def test_a_lost_rank_is_named_within_the_deadline():
    found = run_processes(lose_a_peer, 3, casualties=[1])
    for seconds, _ in (found[0], found[2]):
        assert seconds < 15
    assert any("rank 1" in text for _, text in (found[0], found[2]))


def stay_away(rank, world):
    q, k, v, _, _ = tensors()
    cp = ra.ContextParallel(dist.group.WORLD, S, options=ra.Options(timeout=2))
    if rank == 1:
        time.sleep(4)
        return ""
    with pytest.raises(PeerError, match="rank 1 of 2 did not come within") as caught:
        ra.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp)
    return str(caught.value)


def test_a_rank_that_does_not_call_is_named():
    assert "every rank must make the same calls" in run_processes(stay_away, 2)[0]

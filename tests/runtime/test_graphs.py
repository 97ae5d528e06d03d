"""Calls that are captured once and replayed: right whatever moves, each with results of its own, and eager with a
reason where they cannot be captured. On the CPU, where tapes stand for CUDA graphs (`tests/support/tape.py`)."""

import copy
import math
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn.comm import PeerError
from ringattn.runtime import graphs
from ringattn.runtime.capture import Cuda
from ringattn.testing import InstantRank, dense_attention, run_processes
from tests.support.faults import Faults
from tests.support.tape import captured, series, taped

S, HEADS, KV_HEADS, DIM = 48, 4, 2, 8
ON = ra.Options(graphs="on")
WORLDS = pytest.mark.parametrize("world", [1, 3])


def inputs_of(number, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)  # threads share the default one
    shapes = ((S, HEADS, DIM), (S, KV_HEADS, DIM), (S, KV_HEADS, DIM), (S, HEADS, DIM))
    return [torch.randn(2, *shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def truth(number, mask, sinks=None, lse_too=False):
    """Dense ``out, lse, dq, dk, dv`` in fp64 of step ``number``."""
    q, k, v, dout = inputs_of(number)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = dense_attention(*leaves, mask.dense(S, S))
    if sinks is not None:
        joint = torch.logaddexp(lse, sinks[:, None])
        out, lse = out * torch.exp(lse - joint).transpose(1, 2).unsqueeze(-1), joint
    ((out * dout).sum() + (lse.sin().sum() if lse_too else 0)).backward()
    return [out.detach(), lse.detach(), *(t.grad for t in leaves)]


def step(cp, number, dtype=torch.float64, mask=None, lse_too=False, **extras):
    """The same of this rank's rows, with tensors that lie anywhere."""
    q, k, v, dout = map(cp.shard, inputs_of(number, dtype))
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = ra.attention(*leaves, cp=cp, mask=mask, return_lse=True, **extras)
    ((out * dout).sum() + lse.sin().sum()).backward() if lse_too else out.backward(dout)
    return [out.detach(), lse.detach(), *(t.grad for t in leaves)]


def assert_right(cp, found, expected, tolerance=1e-12):
    rows = cp.position_ids
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        b = b[:, :, rows] if name == "lse" else b[:, rows]
        assert (a.double() - b).abs().nan_to_num(math.inf).max() <= tolerance * (1 + b.abs().max()), name


def context(transport=None, seqlen=S, **settings):
    """One whose calls are captured on tapes, with a kernel that reads no values on its host."""
    return taped(ra.ContextParallel(transport, seqlen, **{"kernel": "reference", **settings}))


def run(world, fn):
    """``fn(transport)`` on every rank; the results by rank."""
    return ra.Loopback(world, timeout=10).run(fn) if world > 1 else [fn(None)]


# -- right numbers ------------------------------------------------------------------------------


MASKS = [ra.causal(), ra.longformer(7, [1, 9, 30]), ra.full() - ra.sliding_window(40, 3), ra.global_tokens(2)]


def cases():
    """Each mask, schedule and world at least once; the whole grid is slow."""
    for i, mask in enumerate(MASKS):
        for j, schedule in enumerate(("ring", "exchange", "gather")):
            for world in (1, 3):
                few = j == i % 3 if world == 3 else (i, j) == (0, 0)
                yield pytest.param(
                    world, mask, schedule, marks=() if few else pytest.mark.slow, id=f"{world} {schedule} {mask}"
                )


@pytest.mark.parametrize("world, mask, schedule", list(cases()))
def test_replays_are_right(world, mask, schedule):
    def train(transport):
        cp = context(transport, S, mask=mask, layout="zigzag", schedule=schedule)
        for number in range(5):
            assert_right(cp, step(cp, number), truth(number, mask))
        forward, backward = series(cp)
        assert (forward.loop, backward.loop) == ("forward", "backward")
        for one in (forward, backward):
            assert 1 <= one.captures <= 3 and one.refused is None, one
        assert len(captured(cp)) == 2 and cp.binding.graphs.device.replays >= 8

    run(world, train)


@pytest.mark.slow
def test_replays_of_blocks_that_cross_in_parts_are_right():
    nodes = ra.Options(topology=ra.Topology(ra.Link(1e9), ra.Link(1e8), 3), kv_bytes=1 << 30)

    def train(transport):
        cp = context(transport, S, mask=MASKS[0], layout="zigzag", schedule="double_ring", options=nodes)
        for number in range(4):
            assert_right(cp, step(cp, number), truth(number, MASKS[0]))
        assert cp.program(MASKS[0]).cut == 2 and len(captured(cp)) == 2

    run(6, train)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_dtype_leaves_a_graphs_memory(dtype):
    """Running results are in the dtype of the inputs or in another; what a call has returned stays in either case."""
    mask = ra.causal()
    cp = context(InstantRank(1, 3), S, mask=mask, options=ON)
    alone = context(None, S, mask=mask, options=ON)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    found = [step(alone, number, dtype) for number in range(4)]
    for number in range(4):
        assert_right(alone, found[number], truth(number, mask), tolerance)
    for number in range(4):
        found = step(cp, number, dtype)
        assert {x.dtype for x in (found[0], *found[2:])} == {dtype}
    for one in (*captured(cp), *captured(alone)):
        inside = {x.untyped_storage().data_ptr() for x in one.found}
        assert inside.isdisjoint(x.untyped_storage().data_ptr() for x in found)


def test_what_does_not_move_is_read_where_it_lies():
    cp = context()
    *leaves, dout = inputs_of(0)
    for leaf in leaves:
        leaf.requires_grad_()
    for number in range(5):
        with torch.no_grad():
            for old, new in zip((*leaves, dout), inputs_of(number), strict=True):
                old.copy_(new)
        out = ra.attention(*leaves, cp=cp)
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        expected = truth(number, ra.causal())
        assert_right(cp, [found[0], expected[1], *found[1:]], expected)
    forward, backward = series(cp)
    assert forward.captures == 1 and not forward.moving
    assert backward.moving <= {3, 4}, "out and lse alone are the call's own"
    assert "forward captured" in cp.describe() and "of 7 inputs copied in" in cp.describe()


def test_an_input_that_moves_is_copied_from_then_on():
    cp = context()
    q, k, v, _ = inputs_of(0)

    def attend(*tensors):
        out, _ = dense_attention(*tensors, ra.causal().dense(S, S))
        torch.testing.assert_close(ra.attention(*tensors, cp=cp), out, rtol=1e-12, atol=1e-12)

    seen = []
    for moved in (False, False, False, "k", "k", "v", "q", "v"):
        q, k, v = (x.clone() if name == moved else x for x, name in zip((q, k, v), "qkv", strict=True))
        attend(q, k, v)
        (forward,) = series(cp)
        seen.append((forward.captures, set(forward.moving)))
    all_move = {0, 1, 2, 3}
    assert seen == [(0, set()), (1, set()), (1, set()), (2, {1}), (2, {1}), (3, all_move), (3, all_move), (3, all_move)]
    own = cp.binding.graphs._kept.memory.buffers()
    assert sorted(buffer.numel() for buffer in own) == sorted((q.numel(), k.numel(), v.numel()))


@WORLDS
def test_layers_share_a_graph_and_keep_their_results(world):
    mask = ra.causal()

    def train(transport):
        cp = context(transport, S, mask=mask, schedule="ring")
        for numbers in ((0, 1), (2, 3), (4, 5)):
            inputs = [[cp.shard(t) for t in inputs_of(number)] for number in numbers]
            leaves = [[t.detach().clone().requires_grad_() for t in layer[:3]] for layer in inputs]
            outs = [ra.attention(*layer, cp=cp, return_lse=True) for layer in leaves]
            sum((out * layer[3]).sum() for (out, _), layer in zip(outs, inputs, strict=True)).backward()
            for (out, lse), layer, number in zip(outs, leaves, numbers, strict=True):
                found = [out.detach(), lse.detach(), *(t.grad for t in layer)]
                assert_right(cp, found, truth(number, mask))
        assert len(captured(cp)) == 2

    run(world, train)


@WORLDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(world, reentrant):
    def train(transport):
        cp = context(transport, S, schedule="exchange")
        for number in range(4):
            q, k, v, dout = map(cp.shard, inputs_of(number))
            leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]

            def attend(*tensors):
                return ra.attention(*tensors, cp=cp, return_lse=True)

            out, lse = checkpoint(attend, *leaves, use_reentrant=reentrant)
            out.backward(dout)
            found = [out.detach(), lse.detach(), *(t.grad for t in leaves)]
            assert_right(cp, found, truth(number, ra.causal()))

    run(world, train)


def test_sinks_of_another_dtype_are_another_kind():
    """Of numbers that lie at the same place, and of such as move."""
    q, k, v = (torch.randn(1, S, heads, DIM, dtype=torch.float64) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cp, eager = context(), ra.ContextParallel(None, S, kernel="reference", options=ra.Options(graphs="off"))
    place = torch.linspace(-1, 1, HEADS, dtype=torch.float64)
    narrow = place.view(torch.float32)[:HEADS]

    def compare(sinks):
        found, want = (ra.attention(q, k, v, cp=each, sinks=sinks) for each in (cp, eager))
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)

    for _ in range(3):
        compare(place)
    narrow.copy_(torch.linspace(-1, 1, HEADS) / 3)
    for sinks in [narrow] * 3 + [narrow.bfloat16().clone() for _ in range(3)] + [narrow.double() / 7 for _ in range(3)]:
        compare(sinks)


@WORLDS
def test_sinks_and_the_gradient_of_lse(world):
    mask, sinks = ra.causal(), torch.linspace(-1, 1, HEADS, dtype=torch.float64)

    def train(transport):
        cp = context(transport, S, mask=mask)
        for number in range(4):
            own = sinks + number
            assert_right(cp, step(cp, number, lse_too=True, sinks=own), truth(number, mask, own, lse_too=True))
        assert len(captured(cp)) == 2

    run(world, train)


@pytest.mark.parametrize("step", [1, 2])  # of v's last dim: all are copied where one is not contiguous
def test_strides_of_any_kind(step):
    """Gradients are laid in memory as the inputs are, those of a graph too."""
    cp = context(None, S, options=ON)
    for number in range(4):
        q, k, v, dout = inputs_of(number)
        heads_first = q.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        fused = torch.cat([k, k], 2).requires_grad_()
        odd = torch.empty(2, S, KV_HEADS, step * DIM, dtype=q.dtype)[..., ::step].copy_(v).requires_grad_()
        out = ra.attention(heads_first, fused[:, :, KV_HEADS:], odd, cp=cp)
        dq, dkk, dv = torch.autograd.grad(out, (heads_first, fused, odd), dout)
        expected = truth(number, ra.causal())
        assert_right(cp, [out.detach(), expected[1], dq, dkk[:, :, KV_HEADS:], dv], expected)
        assert dq.stride() == heads_first.stride() and not dkk[:, :, :KV_HEADS].any()
    assert cp.binding.graphs.device.replays


def test_without_gradients():
    mask = ra.causal()
    cp = context(None, S, mask=mask)
    for guard in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        for number in range(3):
            with guard():
                out, lse = ra.attention(*inputs_of(number)[:3], cp=cp, return_lse=True)
            expected = truth(number, mask)
            assert_right(cp, [out, lse, *expected[2:]], expected)
    assert_right(cp, step(cp, 7), truth(7, mask))


# -- what ranks do together ---------------------------------------------------------------------


def test_traffic_and_the_log_are_those_of_eager_calls():
    def count(transport, option):
        transport.blind = frozenset({"cpu"})  # where batches are counted, too
        options = ra.Options(graphs=option, compare_every=2)
        cp = context(transport, layout="zigzag", schedule="ring", options=options)
        finish, posted = cp.link.finish, []
        cp.link.finish = lambda *args, **more: (posted.append(transport.log.posted), finish(*args, **more))
        for number in range(4):
            step(cp, number)
        traffic = cp.traffic()
        assert (traffic.pop("wait_seconds") > 0) and len(set(posted)) == 2 and min(posted) > 0, posted
        return traffic, posted, transport.log.number, transport.log.course.chain, len(captured(cp))

    replayed, eager = (ra.Loopback(3, timeout=10).run(lambda t, o=option: count(t, o)) for option in ("on", "off"))
    assert [one[:-1] for one in replayed] == [one[:-1] for one in eager]
    assert {one[-1] for one in replayed} == {2} and {one[-1] for one in eager} == {0}


def test_a_fault_in_a_replayed_call_is_heard_and_the_next_is_right():
    def train(transport):
        faults, mask = Faults(transport), ra.causal()
        cp = context(transport, S, mask=mask, layout="zigzag", schedule="ring")
        for number in range(3):
            step(cp, number)
        graphs_before = captured(cp)
        faults.arm(3 if transport.rank == 1 else None)
        with pytest.raises(Exception, match="at 3") as raised:
            step(cp, 3)
        assert (transport.rank == 1) != isinstance(raised.value, PeerError)
        faults.arm(None)
        for number in range(4, 7):
            assert_right(cp, step(cp, number), truth(number, mask))
        assert len(captured(cp)) == 2 and not set(map(id, graphs_before)) & set(map(id, captured(cp)))

    run(3, train)


def test_values_are_checked_before_a_replay():
    cp = context(None, S, options=ra.Options(graphs="on", check_nan=True))
    for number in range(3):
        step(cp, number)
    q, k, v, _ = inputs_of(0)
    with pytest.raises(FloatingPointError, match="k holds"):
        ra.attention(q, k * torch.nan, v, cp=cp)


# -- memory -------------------------------------------------------------------------------------


def test_graphs_go_with_the_buffers_they_read():
    cp = context(InstantRank(1, 4), 4 * S, layout="zigzag", schedule="exchange")
    small = [torch.randn(1, S, HEADS, DIM) for _ in range(3)]
    for _ in range(3):
        ra.attention(*(x.clone() for x in small), cp=cp)
    before = [weakref.ref(buffer) for buffer in cp.link.workspace.buffers()]
    tape = weakref.ref(captured(cp)[0].steps[0].graph)
    ra.attention(*(torch.randn(3, S, HEADS, DIM) for _ in range(3)), cp=cp)
    assert tape() is None and not captured(cp) and any(buffer() is None for buffer in before)
    (first, *_) = series(cp)
    captures = first.captures
    ra.attention(*small, cp=cp)
    assert len(captured(cp)) == 1 and first.captures == captures + 1


def test_links_keep_so_many_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    cp = context(None, S, mask=(ra.causal(), ra.full(), ra.chunked(5)))
    q, k, v, _ = inputs_of(0)
    for number in (0, 0, 1, 1, 0, 2, 2):
        ra.attention(q, k, v, cp=cp, mask=cp.masks[number])
    kept = {id(one) for one in cp.binding.graphs._kept}
    assert kept == {id(one) for one in (series(cp)[0], series(cp)[2])}, "the least recently replayed goes"
    assert cp.binding.graphs.device.pools == 1, "they share one pool"


def test_a_dropped_context_and_a_copied_one():
    cp = context()
    for number in range(3):
        step(cp, number)
    twin = copy.deepcopy(cp)
    assert not captured(twin) and len(captured(cp)) == 2
    for number in range(3):
        assert_right(twin, step(twin, number), truth(number, ra.causal()))
    assert len(captured(twin)) == len(captured(cp)) == 2
    tape = weakref.ref(captured(cp)[0].steps[0].graph)
    del cp
    assert tape() is None


def test_streams_have_graphs_of_their_own():
    cp = context()
    device, mask = cp.binding.graphs.device, ra.causal()
    for number in range(8):
        device.queue = 1 + number % 2
        assert_right(cp, step(cp, number), truth(number, mask))
    assert len(captured(cp)) == 4 and device.pools == 2
    places = [{x.data_ptr() for x in one.own if x is not None} for one in captured(cp)]
    assert places[0] and places[0].isdisjoint(places[2])  # forward's on either


# -- where calls are eager ----------------------------------------------------------------------


def test_a_graph_of_the_users_own_takes_eager_calls():
    cp = context(None, S, options=ON)
    cp.binding.graphs.device.queue = None
    for number in range(3):
        assert_right(cp, step(cp, number), truth(number, ra.causal()))
    assert not series(cp) and not captured(cp)


def test_reasons_are_described():
    q, k, v, _ = inputs_of(0)
    slow = ra.Options(rates=ra.Rates(1e6, 1e6, call=1e-6))
    slopes = ra.alibi([0.5] * HEADS)
    for options, extras, said in (
        (ra.Options(), {"bias": slopes}, "calls of torch.float64 on cpu, eager: a bias or dropout brings"),
        (ra.Options(), {"dropout_p": 0.5, "seed": 1}, "eager: a bias or dropout brings"),
        (slow, {}, "eager: the device takes about"),
        (ra.Options(), {}, "forward captured"),
        (ra.Options(), {"softcap": 5.0}, "forward captured"),
    ):
        cp = context(None, S, options=options)
        assert "captured at the second of a kind" in cp.describe()
        for turn in range(3):
            ra.attention(q, k, v, cp=cp, **extras)
            text = cp.describe()
            assert turn or "captured" not in said or "forward eager so far" in text
        assert said in text and bool(captured(cp)) == ("captured" in said), text
    cp = context(None, S, options=ra.Options(graphs="off"))
    assert "graphs off" in cp.describe()
    for _ in range(3):
        ra.attention(q, k, v, cp=cp)
    assert not series(cp) and "eager" not in cp.describe()


def test_a_rank_without_work_captures_nothing():
    cp = context(InstantRank(3, 4), 2, kv_seqlen=2, layout="contiguous", options=ON)
    empty = [torch.zeros(1, 0, HEADS, DIM) for _ in range(3)]
    for _ in range(3):
        assert ra.attention(*empty, cp=cp).shape == (1, 0, HEADS, DIM)
    assert "eager: this rank has nothing to do" in cp.describe() and not captured(cp)


WAITS = ra.longformer(7, [1, 9, 30])  # of its few keys the operator's results are looked at on the host


@WORLDS
def test_what_cannot_be_captured_runs_eagerly(world):
    def train(transport):
        cp = context(transport, S, mask=WAITS, kernel="sdpa", schedule="ring")
        for number in range(4):
            assert_right(cp, step(cp, number), truth(number, WAITS))
        forward, backward = series(cp)
        assert forward.refused and backward.refused is None and len(captured(cp)) == 1
        text = cp.describe()
        assert "forward eager: it cannot be captured: Multiple dispatch failed" in text
        assert "(at `if lost.any():`, line " in text and " of operators.py)" in text
        assert not cp.binding.graphs.device.capturing

    run(world, train)


@WORLDS
def test_on_refuses_what_cannot_be_captured(world):
    def refuse(transport):
        cp = context(
            transport,
            S,
            mask=WAITS,
            kernel="sdpa",
            schedule="ring",
            options=ON,
        )
        assert_right(cp, step(cp, 0), truth(0, WAITS))
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=r"Options.graphs='on': attention forward.*lost.any\(\)"):
                step(cp, 1)
        auto = cp.replace(options=ra.Options(), kernel="auto")
        assert_right(auto, step(auto, 2), truth(2, WAITS))

    run(world, refuse)


@WORLDS
def test_on_is_refused_where_nothing_is_captured(world):
    def refuse(transport):
        cp = ra.ContextParallel(transport, S, kernel="reference", options=ON)
        with pytest.raises(ValueError, match=r"Options.graphs='on': the tensors are on cpu, and graphs are of CUDA"):
            step(cp, 0)
        taped(cp)
        for extras in ({"dropout_p": 0.1, "seed": 3}, {"bias": ra.alibi([1.0] * HEADS)}):
            with pytest.raises(NotImplementedError, match="a bias or dropout brings other numbers into every"):
                step(cp, 0, **extras)
        assert not cp.traffic()["sent"], "before anything moves"
        for number in range(3):
            assert_right(cp, step(cp, number), truth(number, ra.causal()))

    run(world, refuse)


def test_one_rank_may_refuse_alone():
    """The others are told, as of any refusal."""

    def refuse(transport):
        cp = context(transport, S, options=ra.Options(graphs="on" if transport.rank == 1 else "auto"))
        extras = {"bias": ra.alibi([1.0] * HEADS)}
        with pytest.raises(NotImplementedError, match="brings other numbers into every call"):
            step(cp, 0, **extras)
        assert_right(cp, step(cp, 1), truth(1, ra.causal()))

    run(2, refuse)


@pytest.mark.parametrize("given", ["yes", True, None, "ON", 1])
def test_the_option_is_one_of_three(given):
    with pytest.raises(ValueError, match=r"Options.graphs=.*: must be one of auto, on, off"):
        ra.Options(graphs=given)


# -- CUDA's own ---------------------------------------------------------------------------------


def test_memory_without_its_owner():
    for made in (torch.arange(24.0).view(2, 3, 4)[:, 1:].transpose(0, 2), torch.zeros(0, 3), torch.ones(5).bfloat16()):
        seen = Cuda().unowned(made)
        assert seen.stride() == made.stride() and seen.dtype == made.dtype and torch.equal(seen, made)
        assert seen.data_ptr() == made.data_ptr()
        made += 1
        assert torch.equal(seen, made)
    kept = weakref.ref(made.untyped_storage())
    del made
    assert kept() is None and seen.shape == (5,)


def test_which_devices_are_captured():
    ranks, cuda = ra.Loopback(1).run(lambda transport: transport), torch.device("cuda", 0)
    assert isinstance(Cuda().refuse(torch.device("cpu"), InstantRank(0, 2)), ValueError)
    assert "threads of one process" in str(Cuda().refuse(cuda, ranks[0]))
    assert Cuda().refuse(cuda, InstantRank(0, 2)) is None


def replay_over_nccl(rank, world):
    """Five steps whose calls are captured, among eager ones; the group then ends while the context lives."""
    mask, group = ra.causal(), torch.distributed.group.WORLD
    cp = ra.ContextParallel(group, S, mask=mask, layout="zigzag", schedule="ring", options=ON)
    errors = []
    for number in range(5):
        q, k, v, dout = (cp.shard(t.to("cuda", torch.float32)) for t in inputs_of(number))
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = ra.attention(*leaves, cp=cp)
        out.backward(dout)
        exact = truth(number, mask)
        for a, b in zip((out, *(t.grad for t in leaves)), (exact[0], *exact[2:]), strict=True):
            errors.append(float((a.detach().cpu().double() - b[:, cp.position_ids]).abs().max()))
    text = cp.describe()
    torch.distributed.destroy_process_group()
    return max(errors), "forward captured" in text and "backward captured" in text


@pytest.mark.gpu
def test_replays_over_nccl_and_the_end_of_their_group():
    for error, replayed in run_processes(replay_over_nccl, 2, backend="nccl"):
        assert error < 1e-4 and replayed

"""The ring against one process: forward, lse and gradients on every rank, in fp64, by rank-threads."""

import threading

import pytest
import torch

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.planning.program import Row
from ringattn.testing import dense_attention, results
from tests.support import cases
from tests.support.ring import S, check, on_ranks, single_process, tensors

HIDING = ra.Rates(6e10, 6e10)  # of a device that computes while messages move
GRID = [
    *("full", "causal", "window", "two_sided", "left_only", "global_scattered", "prefix", "strided", "dilated"),
    *("documents_causal", "documents_window_globals", "longformer"),
    *("causal_minus_window", "full_minus_strided"),
]


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "balanced"])
@pytest.mark.parametrize("name", GRID)
def test_every_mask_layout_and_schedule(name, layout, schedule, poison):
    mask = cases.ALL[name][0]
    for world, options in ((2, ra.Options(rates=HIDING)), (3, ra.Options())):
        found = on_ranks(world, mask, layout=layout, schedule=schedule, options=options)
        check(found, single_process(mask))


@pytest.mark.parametrize(
    ("world", "name", "layout", "schedule"),
    [
        pytest.param(world, name, layout, schedule, marks=[] if keep else pytest.mark.slow)
        for world in (1, 4, 8)
        for i, name in enumerate(GRID)
        for j, layout in enumerate(("contiguous", "zigzag", "striped"))
        for n, schedule in enumerate(("ring", "exchange", "gather"))
        for keep in [(i + j + n + world // 4) % 6 == 0]
    ],
)
def test_other_worlds(world, name, layout, schedule):
    mask = cases.ALL[name][0]
    check(on_ranks(world, mask, layout=layout, schedule=schedule), single_process(mask))


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("kernel", ["reference", "sdpa", "auto"])
def test_each_kernel_choice(world, kernel):
    check(on_ranks(world, ra.causal(), kernel=kernel), single_process(ra.causal()))


def test_v_with_its_own_head_size():
    sizes = {"v_dim": 5}
    check(on_ranks(3, ra.causal(), sizes=sizes), single_process(ra.causal(), **sizes))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 3)])
def test_head_ratios(heads, kv_heads):
    sizes = {"heads": heads, "kv_heads": kv_heads}
    for rates in (None, HIDING):
        found = on_ranks(2, ra.sliding_window(9), sizes=sizes, options=ra.Options(rates=rates))
        check(found, single_process(ra.sliding_window(9), **sizes))


@pytest.mark.parametrize("seqlen", [8, 9, 15, 64, 67])
def test_uneven_lengths_on_eight_ranks(seqlen):
    sizes = {"q_len": seqlen, "kv_len": seqlen, "batch": 1}
    check(on_ranks(8, ra.causal(), sizes=sizes), single_process(ra.causal(), **sizes))


def test_scale_is_used():
    found = on_ranks(2, ra.causal(), {"scale": 0.9})[0][1]
    q, k, v, *_ = tensors()
    expected = dense_attention(q, k, v, ra.causal().dense(S, S), scale=0.9)[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "balanced"])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "q_offset", "mask"),
    [(11, 29, 0, ra.full()), (13, 29, 16, ra.causal()), (2, 29, 27, ra.sliding_window(6)), (1, 29, 28, ra.causal())],
)
def test_cross_attention_and_offsets(q_len, kv_len, q_offset, mask, layout, schedule):
    """Cross-attention, prefill in chunks and decoding: fewer queries than ranks leave empty shards."""
    q, k, v, dout, dlse = tensors(q_len, kv_len)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    dense = mask.dense(q_len, kv_len, q_offset)
    expected = results(*dense_attention(*inputs, dense), dout, dlse, inputs)
    found = on_ranks(
        4, mask, sizes={"q_len": q_len, "kv_len": kv_len},
        kv_seqlen=kv_len, q_offset=q_offset, layout=layout, schedule=schedule,
    )  # fmt: skip
    check(found, expected)


def test_rows_that_see_nothing():
    mask = ra.causal() - ra.sliding_window(2)  # the first three queries see no key
    out, lse, dq, _, _ = on_ranks(3, mask)[1]
    assert (lse[:, :, :3] == -torch.inf).all() and (lse[:, :, 3:] > -torch.inf).all()
    assert (out[:, :3] == 0).all() and (dq[:, :3] == 0).all()


def test_gradcheck_with_lse():
    q, k, v = (torch.randn(1, 7, h, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    mask = ra.longformer(2, 1)
    for kernel in ("reference", "sdpa"):
        cp = ra.ContextParallel(None, 7, mask=mask, kernel=kernel)
        assert torch.autograd.gradcheck(lambda *x, cp=cp: ra.attention(*x, cp=cp, return_lse=True), (q, k, v))


def test_bytes_moved_are_the_plans():
    q, k, v, dout, _ = tensors()

    def one_rank(transport, schedule):
        cp = ra.ContextParallel(transport, S, mask=ra.longformer(6, 2), layout="contiguous", schedule=schedule)
        local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        ra.attention(*local, cp=cp).backward(cp.shard(dout))
        row = 2 * 2 * (8 + 8) * 8  # batch 2, two KV heads, K and V of 8, fp64
        return cp.traffic(), row, cp.program(cp.masks[0]), int(cp.plan.received[transport.rank])

    for schedule in ("ring", "exchange", "gather"):
        for traffic, row, program, need in ra.Loopback(3).run(lambda t, s=schedule: one_rank(t, s)):
            for kind in ("forward kv", "backward kv"):
                assert traffic["received"].get(kind, 0) == row * program.tokens(Row.KV)
                assert traffic["sent"].get(kind, 0) == row * program.tokens(Row.KV, sent=True)
            assert traffic["received"].get("backward grad", 0) == row * program.tokens(Row.GRAD)
            assert traffic["sent"].get("backward grad", 0) == row * program.tokens(Row.GRAD, sent=True)
            assert program.tokens(Row.KV) == need, "a window over contiguous shards relays nothing extra here"


def test_two_contexts_do_not_disturb_each_other():
    q, k, v, dout, dlse = tensors()

    def one_rank(transport):
        a = ra.ContextParallel(transport, S, mask=(ra.causal(), ra.sliding_window(4)))
        b = a.replace(mask=ra.full(), layout="striped")
        kept = []
        for cp, mask in ((a, ra.causal()), (b, ra.full()), (a, ra.sliding_window(4))):
            inputs = [t.clone().requires_grad_() for t in (q, k, v)]
            out, lse = ra.attention(*map(cp.shard, inputs), cp=cp, mask=mask, return_lse=True)
            kept.append((cp.unshard(out), cp.unshard(lse, dim=2), inputs))
        return [results(out, lse, dout, dlse, inputs) for out, lse, inputs in reversed(kept)]

    for found in ra.Loopback(3).run(one_rank):
        for mine, mask in zip(found, (ra.sliding_window(4), ra.full(), ra.causal()), strict=True):
            check([mine], single_process(mask))


def test_buffers_are_reused():
    def one_rank(transport):
        q, k, v, dout, _ = tensors()
        cp = ra.ContextParallel(transport, S)
        places = set()
        for _ in range(3):
            local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
            ra.attention(*local, cp=cp).backward(cp.shard(dout))
            places.add(tuple(sorted(t.data_ptr() for t in cp.link.workspace.buffers())))
        return len(places)

    assert ra.Loopback(2).run(one_rank) == [1, 1]


def test_the_next_batches_are_planned_in_another_thread():
    """As a data loader would: replace() while attention runs on the context of the batch before."""
    cuts = [sorted({0, S, *(7 * i * j % S for j in range(1, 5))}) for i in range(1, 9)]
    masks = [ra.documents(bounds) & ra.causal() for bounds in cuts]

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, mask=masks[0])
        planned = []

        def plan():
            for mask in masks:
                planned.append(cp.replace(mask=mask))
                planned[-1].program(mask)

        loader = threading.Thread(target=plan)
        loader.start()
        found = [attend(cp) for _ in range(20)]
        loader.join()
        return found + [attend(batch) for batch in planned]

    def attend(cp):
        q, k, v, dout, dlse = tensors()
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = ra.attention(*map(cp.shard, inputs), cp=cp, return_lse=True)
        return results(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs)

    found = zip(*ra.Loopback(2, timeout=20).run(one_rank), strict=True)
    for ranks, mask in zip(found, [masks[0]] * 20 + masks, strict=True):
        check(ranks, single_process(mask))


def test_describe_says_what_and_why():
    text = ra.ContextParallel(PlanningRank(1, 4), 4096, mask=(ra.causal(), ra.sliding_window(63))).describe()
    for part in (
        "4,096 tokens",
        "over 4 ranks",
        "layout zigzag",
        "1.00 x the time",
        "schedule",
        "causal()",
    ):
        assert part in text, text
    assert "sliding_window(63, 0)" in text and "step 1: receives" in text


def test_a_second_turn_only_where_there_is_something_to_hide():
    def turns(mask, rates=HIDING):
        settings = {"layout": "contiguous", "schedule": "ring", "options": ra.Options(rates=rates)}
        return ra.ContextParallel(PlanningRank(1, 4), 4096, mask=mask, **settings).program(mask).two_turns

    assert turns(ra.causal()) and turns(ra.sliding_window(255))
    assert not turns(ra.sliding_window(15)) and not turns(ra.chunked(1024))
    assert not turns(ra.causal(), None), "a CPU's messages are moved by the cores that compute"


def test_position_ids_and_sharding():
    x = torch.arange(2 * S).view(2, S)
    for rank in range(3):
        for layout in ("contiguous", "zigzag", "striped"):
            cp = ra.ContextParallel(PlanningRank(rank, 3), S, layout=layout, q_offset=4, kv_seqlen=S + 4)
            assert (cp.shard(x)[0] + 4 == cp.position_ids).all() and len(cp.position_ids) == cp.local_seqlen
            assert len(cp.kv_position_ids) == cp.local_kv_seqlen


def test_autocast_casts_and_backward_repeats_it():
    q, k, v, dout, _ = tensors(dtype=torch.float32)

    def grads(cast):
        cp = ra.ContextParallel(None, S)
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            out = ra.attention(*inputs, cp=cp)
            assert out.dtype == (torch.bfloat16 if cast else torch.float32)
            out.backward(dout.to(out.dtype))
        assert all(t.grad.dtype == torch.float32 for t in inputs)
        return [t.grad for t in inputs]

    rounded = [t.bfloat16().float() for t in (q, k, v)]
    for a, b, x in zip(grads(True), grads(False), rounded, strict=True):
        assert not torch.equal(a, b) and (a - b).norm() < 0.02 * b.norm() and x.isfinite().all()


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_inputs_of_any_strides(kernel):
    """A last dim that is not contiguous, on every input and on the incoming gradient."""
    q, k, v, dout, dlse = tensors()
    expected = single_process(ra.causal())
    inputs = [t.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in (q, k, v)]
    assert all(t.stride(-1) != 1 for t in inputs)
    out, lse = ra.attention(*inputs, cp=ra.ContextParallel(None, S, kernel=kernel), return_lse=True)
    check([results(out, lse, dout.transpose(1, 2).contiguous().transpose(1, 2), dlse, inputs)], expected)
    one = torch.randn(2, S, 4, 1, dtype=torch.float64).expand(2, S, 4, 8)
    cp = ra.ContextParallel(None, S, kernel=kernel)
    torch.testing.assert_close(ra.attention(one, one, one, cp=cp), ra.attention(*[one.contiguous()] * 3, cp=cp))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(scale):
    q, k, v, dout, dlse = tensors()
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    scaled = [inputs[0] * (scale * 8**0.5), *inputs[1:]]
    expected = results(*dense_attention(*scaled, ra.causal().dense(S, S)), dout, dlse, inputs)
    check(on_ranks(2, ra.causal(), {"scale": scale}), expected)


def test_inference_first_then_training():
    def one_rank(transport):
        q, k, v, dout, _ = tensors()
        cp = ra.ContextParallel(transport, S, schedule="ring")
        with torch.inference_mode():
            ra.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp)
            cp.position_ids  # noqa: B018 - computed here, used below
        local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        ra.attention(*local, cp=cp).backward(cp.shard(dout))
        table = torch.zeros(S, 2, requires_grad=True)
        table[cp.position_ids].sum().backward()

    ra.Loopback(2, timeout=20).run(one_rank)


def test_a_second_derivative_is_refused():
    q, k, v, _, _ = tensors()
    out = ra.attention(q.requires_grad_(), k, v, cp=ra.ContextParallel(None, S))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_two_contexts_made_on_one_transport_count_their_calls_together():
    def one_rank(transport):
        q, k, v, _, _ = tensors()
        contexts = [ra.ContextParallel(transport, S, mask=m) for m in (ra.causal(), ra.full())]
        for _ in range(2):
            for cp in contexts:
                ra.attention(*map(cp.shard, (q, k, v)), cp=cp)
        return transport.log.number, transport.log.course.ballots

    assert ra.Loopback(2).run(one_rank) == [(4, 2), (4, 2)]


@pytest.mark.parametrize("layout", ["auto", "balanced", "contiguous"])
def test_masks_without_a_pair(layout):
    q, k, v, dout, _ = tensors()
    stack = (ra.causal(), ra.causal() - ra.full())

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, mask=stack, layout=layout)
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = ra.attention(*map(cp.shard, inputs), cp=cp, mask=stack[1], return_lse=True)
        (cp.unshard(out) * dout).sum().backward()
        return out, lse, [t.grad for t in inputs]

    for out, lse, grads in ra.Loopback(2, timeout=20).run(one_rank):
        assert (out == 0).all() and (lse == -torch.inf).all() and all((g == 0).all() for g in grads)
    alone = ra.Loopback(2).run(lambda t: ra.ContextParallel(t, 16, mask=ra.sliding_window(4) - ra.causal()).plan)
    assert all(plan.work.sum() == 0 for plan in alone)


def test_what_a_rank_keeps_does_not_change_what_ranks_agree_on():
    """One rank keeps an output, and with it a context that the others have long dropped."""
    q, k, v, *_ = tensors()
    kept = []

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, layout="zigzag", schedule="ring")  # so that plans cost little
        inputs = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        for i in range(90):
            out = ra.attention(*inputs, cp=cp.replace(mask=ra.sliding_window(i % 45)))
            if transport.rank == 0 and i == 0:
                kept.append(out)

    ra.Loopback(2, timeout=20).run(one_rank)

"""Attention as an operator of the dispatcher: compiled whole, once for all batches, saved by checkpointing."""

import functools
import gc
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ringattn as ra
from ringattn.runtime import binding
from ringattn.testing import dense_attention, results, run_processes
from tests.support.ring import S, check, single_process, tensors

LOCAL = ra.sliding_window(5)


def documents(seed):
    cuts = torch.randperm(S - 1, generator=torch.Generator().manual_seed(seed))[:4] + 1
    return ra.documents([0, *sorted(cuts.tolist()), S]) & ra.causal()


class Layer(torch.nn.Module):
    """Two attentions, one of them by a mask of its own, between things that a compiler would fuse."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=torch.float64))
        self.sinks = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 4, dtype=torch.float64))

    def forward(self, q, k, v, cp):
        out, lse = ra.attention(q * self.weight, k.sin(), v, cp=cp, return_lse=True)
        return out.cos() + ra.attention(q, k, v, cp=cp, mask=cp.masks[1], sinks=self.sinks), lse


def gradients(layer, fn, q, k, v, dout, dlse, cp):
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = fn(*inputs, cp)
    wanted = [*inputs, *layer.parameters()]
    return [out.detach(), lse.detach(), *torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), wanted)]


def test_fullgraph_without_recompilation_over_twenty_batches():
    torch._dynamo.reset()
    q, k, v, dout, dlse = tensors()
    layer, counter = Layer(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    cp = ra.ContextParallel(None, S, mask=(documents(0), LOCAL))
    for seed in range(20):
        cp = cp.replace(mask=(documents(seed), LOCAL))
        found = gradients(layer, compiled, q, k, v, dout, dlse, cp)
        for a, b in zip(found, gradients(layer, layer, q, k, v, dout, dlse, cp), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1
    assert sum(node.target is torch.ops.ringattn.attention for node in counter.graphs[0].graph.nodes) == 2
    assert not torch.equal(
        found[0], gradients(layer, compiled, q, k, v, dout, dlse, cp.replace(mask=(LOCAL, ra.full())))[0]
    )


def test_a_graph_finds_its_context_after_the_user_has_dropped_it():
    torch._dynamo.reset()
    q, k, v, dout, _ = tensors()
    compiled = torch.compile(lambda q, k, v, cp: ra.attention(q, k, v, cp=cp), fullgraph=True, backend="aot_eager")
    for attend in (compiled, lambda q, k, v, cp: ra.attention(q, k, v, cp=cp)):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attend(*inputs, ra.ContextParallel(None, S, mask=LOCAL).replace(mask=LOCAL))
        gc.collect()
        if attend is not compiled:
            out.backward(dout)
            torch.testing.assert_close(out.detach(), dense_attention(q, k, v, LOCAL.dense(S, S))[0])
        else:
            with pytest.raises(RuntimeError, match="keep a reference"):
                out.backward(dout)


def clone(t):
    return t.clone().requires_grad_()


def test_replacements_are_kept_for_backward():
    """Sixteen micro-batches forward, then their backwards: the first contexts are long out of the user's hands."""
    torch._dynamo.reset()
    q, k, v, dout, _ = tensors()
    compiled = torch.compile(lambda q, k, v, cp: ra.attention(q, k, v, cp=cp), fullgraph=True, backend="aot_eager")
    cp = ra.ContextParallel(None, S, mask=documents(0))
    outs = []
    for seed in range(16):
        cp = cp.replace(mask=documents(seed))
        inputs = [clone(t) for t in (q, k, v)]
        outs.append((seed, compiled(*inputs, cp), inputs))
    gc.collect()
    for seed, out, inputs in reversed(outs):
        expected = [clone(t) for t in (q, k, v)]
        (dense_attention(*expected, documents(seed).dense(S, S))[0] * dout).sum().backward()
        out.backward(dout)
        for a, b in zip(inputs, expected, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_bindings_are_bounded_and_shared_by_equal_settings():
    gc.collect()
    before, cp = len(binding._bindings), ra.ContextParallel(None, S, mask=documents(0))
    for seed in range(200):
        cp = cp.replace(mask=documents(seed))
    gc.collect()
    assert len(binding._bindings) - before <= binding.RECENT + 1
    again = cp.replace(mask=documents(199))
    assert again.binding is cp.binding and again.plan is cp.plan
    assert cp.replace(options=ra.Options(kv_bytes=10**9)).binding is not cp.binding
    assert ra.ContextParallel(None, S, mask=documents(199)).binding is not cp.binding, "another link"


def compiled_rank(rank, world_size, backend):
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # from dynamo, for inputs that are no leaves
    mask = ra.longformer(4, [2, 9, 20])
    cp = ra.ContextParallel(dist.group.WORLD, S, mask=mask, schedule="gather")
    q, k, v, dout, dlse = tensors()
    inputs = [clone(t) for t in (q, k, v)]
    out, lse = torch.compile(ra.attention, fullgraph=True, backend=backend)(
        *map(cp.shard, inputs), cp=cp, return_lse=True
    )
    return results(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_on_every_rank(backend):
    check(run_processes(compiled_rank, 2, backend), single_process(ra.longformer(4, [2, 9, 20])))


def policy(ctx, op, *args, **kwargs):
    saved = op is torch.ops.ringattn.attention.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "selective": {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)},
    "full": {},
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
def test_checkpointing_saves_the_ring_by_name(schedule, how):
    """Selective checkpointing sends K/V once forward and once backward; full checkpointing once more."""
    q, k, v, dout, _ = tensors()

    def one_rank(transport, wrap):
        cp = ra.ContextParallel(transport, S, layout="zigzag", schedule=schedule)
        inputs = [cp.shard(t).requires_grad_() for t in (q, k, v)]

        def block(q, k, v):
            return ra.attention(q.sin(), k.cos(), v * 2, cp=cp).sin()

        wrap(block, *inputs).backward(cp.shard(dout))
        return [t.grad for t in inputs], cp.traffic()["received"]

    plain = ra.Loopback(3).run(lambda t: one_rank(t, lambda block, *x: block(*x)))
    saved = ra.Loopback(3).run(
        lambda t: one_rank(t, lambda block, *x: checkpoint(block, *x, use_reentrant=False, **CHECKPOINTS[how]))
    )
    for (expected, once), (found, counted) in zip(plain, saved, strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert counted["forward kv"] == once["forward kv"] * (1 if how == "selective" else 2)
        assert counted["backward kv"] == once["backward kv"]


def operands(inputs, cp):
    """Of the operator, for a plain call."""
    features = None, "", None, None  # bias, rule and its numbers, sinks
    return *inputs, *features, cp.handle, cp.mask_handles[0], 0.3, None, 0.0, -1, "q,k,v", False, ""


def test_the_operator_passes_pytorchs_own_checks():
    q, k, v, *_ = tensors(batch=1)
    cp = ra.ContextParallel(None, S, mask=LOCAL)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    arguments = operands(inputs, cp)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ringattn.attention.default, arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_inputs_whose_last_dim_is_not_contiguous_compile(backend):
    torch._dynamo.reset()
    cp, x = ra.ContextParallel(None, 16), torch.randn(1, 16, 8, 2, requires_grad=True)

    def attend(x):
        q = x.transpose(-1, -2)
        return ra.attention(q, q, q, cp=cp)

    grads = [
        torch.autograd.grad(fn(x).square().sum(), x)[0]
        for fn in (attend, torch.compile(attend, fullgraph=True, backend=backend))
    ]
    torch.testing.assert_close(*grads)
    inputs = [t.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in tensors(batch=1)[:3]]
    cp = ra.ContextParallel(None, S, mask=LOCAL)
    arguments = operands(inputs, cp)
    torch.library.opcheck(torch.ops.ringattn.attention.default, arguments, test_utils=("test_aot_dispatch_dynamic",))


def test_lengths_may_change_in_a_compiled_graph():
    """The first other length makes the graph dynamic; positions are read inside it."""
    torch._dynamo.reset()
    counter, cp = CompileCounterWithBackend("aot_eager"), ra.ContextParallel(None, S)

    def attend(q, cp):
        return ra.attention(q * cp.position_ids[:, None, None], q, q, cp=cp)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for seqlen in (S, 40, 56, 72):
        q, cp = torch.randn(1, seqlen, 2, 8), cp.replace(seqlen=seqlen)
        torch.testing.assert_close(compiled(q, cp), attend(q, cp))
    assert counter.frame_count <= 2


def test_equal_masks_and_rules_made_elsewhere_compile():
    torch._dynamo.reset()
    q, k, v, *_ = tensors()
    cp, slopes = ra.ContextParallel(None, S, mask=(LOCAL, ra.full())), torch.linspace(0.1, 0.4, 4)
    other = ra.full()
    assert other is not cp.masks[1]

    def attend(q):
        return ra.attention(q, k, v, cp=cp, mask=other, bias=ra.alibi(slopes))

    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(q), attend(q))


def test_handles_follow_from_the_settings():
    """The handle of a mask depends on the mask alone, and a context of other settings has another one."""
    a, b = ra.ContextParallel(None, S, mask=LOCAL), ra.ContextParallel(None, S, mask=LOCAL, q_offset=1, kv_seqlen=S + 1)
    assert a.masks[0].handle == ra.sliding_window(5).handle and not torch.equal(a.handle, b.handle)
    pairs = itertools.combinations([LOCAL, ra.causal(), ra.full(), documents(3)], 2)
    assert not any(x.handle == y.handle for x, y in pairs)


def refuse_while_tracing(rank, world):
    """Calls that one rank's compiler refuses to trace; what all ranks are told of it."""
    cp = ra.ContextParallel(dist.group.WORLD, S, layout="zigzag", options=ra.Options(timeout=20.0))
    q, k, v = map(cp.shard, tensors()[:3])
    compiled = torch.compile(lambda *t, **more: ra.attention(*t, cp=cp, **more), fullgraph=True, backend="aot_eager")
    texts = []
    for arguments, more in (
        ((q[:, 1:], k, v), {}),
        ((q[0], k, v), {}),
        ((q, k, v[..., :0]), {}),
        ((q, k.float(), v), {}),
        ((q, k, v), {"softcap": -1.0}),
        ((q, k, v), {"bias": q}),
    ):
        with pytest.raises(ValueError) as caught:
            compiled(*(arguments if rank else (q, k, v)), **(more if rank else {}))
        texts.append(str(caught.value))
        torch.testing.assert_close(compiled(q, k, v), ra.attention(q, k, v, cp=cp))
    return texts


def test_what_one_rank_refuses_to_trace_is_refused_by_all():
    told, own = run_processes(refuse_while_tracing, 2)
    assert all(text == f"rank 1 refused the call: {said}" for text, said in zip(told, own, strict=True)), (told, own)
    for text, name in zip(own, ("tokens", "must be [batch", "v_head_dim 0", "dtype", "softcap", "bias"), strict=True):
        assert name in text, own

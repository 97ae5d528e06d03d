"""On a GPU: the ring over rank-threads on one device, every dtype, and NCCL where there is more than one."""

import pytest
import torch

import ringattn as ra
from ringattn.runtime import binding
from ringattn.testing import InstantRank, dense_attention

pytestmark = pytest.mark.gpu
S = 200
MASKS = [
    ra.full(),
    ra.causal(),
    ra.sliding_window(37),
    ra.sliding_window(20, 9),
    ra.longformer(33, [2, 9, 120]),
    ra.documents([0, 30, 31, 117, S]) & ra.causal(),
    ra.dilated(3, 11),
]


def inputs(dtype, dim=64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, 8, dim), (S, 2, dim), (S, 2, dim), (S, 8, dim))
    return [torch.randn(2, *s, generator=generator).to("cuda", dtype) for s in shapes]


def run(q, k, v, dout, mask, world, **settings):
    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, mask=mask, **settings)
        local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
        out, lse = ra.attention(*local, cp=cp, return_lse=True)
        out.backward(cp.shard(dout))
        return [cp.unshard(out.detach()), cp.unshard(lse.detach(), dim=2), *(cp.unshard(t.grad) for t in local)]

    return ra.Loopback(world).run(one_rank)


def single(q, k, v, dout, mask, dtype):
    """Dense attention on one device in one precision: the truth (fp64) or the peer of the tolerance law."""
    q, k, v = (t.to(dtype).detach().requires_grad_() for t in (q, k, v))
    out, lse = dense_attention(q, k, v, mask.dense(S, S).cuda())
    out.backward(dout.to(dtype))
    return [out.detach(), lse.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_ring_on_one_device(mask, layout, dtype):
    q, k, v, dout = inputs(dtype)
    truth = single(q, k, v, dout, mask, torch.float64)
    peer = single(q, k, v, dout, mask, dtype)
    for schedule in ("ring", "exchange", "gather"):
        for found in run(q, k, v, dout, mask, 3, layout=layout, schedule=schedule):
            for name, a, b, exact in zip(("out", "lse", "dq", "dk", "dv"), found, peer, truth, strict=True):
                finite = exact != -torch.inf
                error, allowed = ((x.double() - exact)[finite].abs().max() for x in (a, b))
                assert error <= 2 * allowed + 1e-5, f"{name}: {error} against {allowed}"
                assert (a[~finite] == -torch.inf).all()


def test_reference_on_the_device():
    q, k, v, dout = inputs(torch.float64)
    truth = single(q, k, v, dout, ra.causal(), torch.float64)
    for found in run(q, k, v, dout, ra.causal(), 4, kernel="reference"):
        for a, exact in zip(found, truth, strict=True):
            torch.testing.assert_close(a, exact, rtol=1e-10, atol=1e-10)


def test_lse_gradient_on_the_device():
    q, k, v, dout = inputs(torch.bfloat16)
    grads = []
    for kernel in ("sdpa", "reference"):
        local = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = ra.attention(*local, cp=ra.ContextParallel(None, S, kernel=kernel), return_lse=True)
        ((out * dout).sum() + lse.sin().sum()).backward()
        grads.append([t.grad for t in local])
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_stacks_of_small_tiles_on_the_device():
    q, k, v, dout = inputs(torch.float32)
    for mask in (ra.chunked(8), ra.bigbird(8, 3, 1, 2)):
        truth = single(q, k, v, dout, mask, torch.float64)
        for found in run(q, k, v, dout, mask, 2):
            for a, exact in zip(found, truth, strict=True):
                torch.testing.assert_close(a.double(), exact, rtol=1e-4, atol=1e-4)


def test_score_features_on_the_device():
    q, k, v, dout = inputs(torch.float32)
    sinks, bias = torch.randn(8, device="cuda"), torch.randn(1, 8, S, S, device="cuda")
    features = {"softcap": 5.0, "sinks": sinks, "dropout_p": 0.3, "seed": 7}
    results = []
    for world, kernel in ((1, "reference"), (1, "blockwise"), (3, "auto")):
        for rule in (bias, ra.alibi(torch.linspace(0.1, 0.8, 8))):

            def one_rank(transport, kernel=kernel, rule=rule):
                cp = ra.ContextParallel(transport, S, mask=MASKS[5], kernel=kernel)
                local = [cp.shard(t).requires_grad_() for t in (q, k, v)]
                own = cp.shard(rule, dim=2) if isinstance(rule, torch.Tensor) else rule
                out = ra.attention(*local, cp=cp, bias=own, **features)
                out.backward(cp.shard(dout))
                return [cp.unshard(out.detach()), *(cp.unshard(t.grad) for t in local)]

            results.append(ra.Loopback(world).run(one_rank)[0])
    for expected, *others in (results[::2], results[1::2]):
        for found in others:
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compiled_on_the_device():
    q, k, v, dout = inputs(torch.bfloat16)
    cp = ra.ContextParallel(None, S, mask=MASKS[5])
    grads = []
    for attend in (ra.attention, torch.compile(ra.attention, fullgraph=True)):
        local = [t.clone().requires_grad_() for t in (q, k, v)]
        attend(*local, cp=cp).backward(dout)
        grads.append([t.grad for t in local])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_buffers_stay_flat():
    q, k, v, dout = inputs(torch.bfloat16)
    cp = ra.ContextParallel(None, S)

    def step():
        local = [t.clone().requires_grad_() for t in (q, k, v)]
        ra.attention(*local, cp=cp).backward(dout)

    for _ in range(5):  # eager, captured, and captured again where inputs move
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def one_rank_of(world, mask, graphs):
    """A rank whose messages are there at once, its leaves and what it does in a step."""
    options = ra.Options(graphs=graphs)
    cp = ra.ContextParallel(InstantRank(1, world) if world > 1 else None, S, mask=mask, options=options)
    *leaves, dout = (torch.randn_like(cp.shard(t)) for t in inputs(torch.bfloat16))
    for leaf in leaves:
        leaf.requires_grad_()

    def step():
        out = ra.attention(*leaves, cp=cp)
        return out, *torch.autograd.grad(out, leaves, dout)

    for _ in range(5):
        step()  # what is prepared once, and captured
    torch.cuda.synchronize()
    assert graphs != "on" or all(f"{loop} captured" in cp.describe() for loop in ("forward", "backward"))
    return leaves, step


@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_call_waits_for_nothing(mask, world, graphs):
    _, step = one_rank_of(world, mask, graphs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_call_is_captured_in_a_graph(mask, world):
    """Replayed on other values it gives what an eager call gives, but for gradients of keys that nobody sends home;
    backward sees other keys than forward there, so that its numbers may be none."""
    leaves, step = one_rank_of(world, mask, "auto")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    own = slice(None) if world == 1 else slice(2)  # out and dq
    for a, b in zip(found[own], step()[own], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_replay_is_the_eager_call(mask, world, schedule, kernel):
    """To the bit where the kernel adds in one order: both passes of the reference, the forward of others. Of several
    ranks the gradients of keys are left out, as nobody sends them home; foreign keys are the same memory to both."""
    settings = {"mask": mask, "layout": "zigzag", "schedule": schedule, "kernel": kernel}
    transport = InstantRank(1, world) if world > 1 else None
    eager = ra.ContextParallel(transport, S, **settings, options=ra.Options(graphs="off"))
    replayed = eager.replace(options=ra.Options(graphs="on"))

    def step(cp, q, k, v, dout):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = ra.attention(*leaves, cp=cp, return_lse=True)
        return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)

    found, expected = [], []
    for _ in range(6):
        own = [torch.randn_like(eager.shard(t)) for t in inputs(torch.bfloat16)]
        expected.append(step(eager, *own))
        found.append(step(replayed, *own))
    assert all(f"{loop} captured" in replayed.describe() for loop in ("forward", "backward"))
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:2], b[:2], strict=True))
        for x, y in zip(a[2 : 5 if world == 1 else 3], b[2:], strict=False):
            if kernel == "reference" and world == 1:
                assert torch.equal(x, y)
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_many_layers_replay_one_graph():
    """Each with its own result and gradients, beside eager ones; memory stays flat."""
    q, k, v, dout = inputs(torch.bfloat16)
    eager = ra.ContextParallel(None, S, kernel="reference", options=ra.Options(graphs="off"))
    replayed = eager.replace(options=ra.Options(graphs="on"))

    def step(cp):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        x = leaves[0]
        for _ in range(4):
            x = ra.attention(x, *leaves[1:], cp=cp)
        return x.detach(), *torch.autograd.grad(x, leaves, dout)

    expected, memory = step(eager), []
    for _ in range(6):
        assert all(torch.equal(a, b) for a, b in zip(step(replayed), expected, strict=True))
        torch.cuda.synchronize()
        memory.append(torch.cuda.memory_allocated())
    assert len(set(memory[3:])) == 1, memory


def test_an_operation_that_waits_is_named(monkeypatch):
    """Eager with the reason, or refused; and what was begun of a capture is left behind."""
    reference = next(kernel for kernel in binding.KERNELS if kernel.name == "reference")
    forward = type(reference).forward

    def waits(self, q, *rest):
        q.sum().item()
        forward(self, q, *rest)

    monkeypatch.setattr(type(reference), "forward", waits)
    q, k, v, _ = inputs(torch.bfloat16)
    cp = ra.ContextParallel(None, S, kernel="reference")
    results = [ra.attention(q, k, v, cp=cp) for _ in range(4)]
    assert all(torch.equal(results[0], other) for other in results)
    assert "forward eager: it cannot be captured" in cp.describe() and "q.sum().item()" in cp.describe()
    strict = cp.replace(options=ra.Options(graphs="on"))
    ra.attention(q, k, v, cp=strict)
    with pytest.raises(NotImplementedError, match=r"Options.graphs='on'.*q.sum\(\).item\(\)"):
        ra.attention(q, k, v, cp=strict)
    monkeypatch.undo()
    other = cp.replace(mask=ra.full(), options=ra.Options(graphs="on"))
    results = [ra.attention(q, k, v, cp=other) for _ in range(4)]
    assert all(torch.equal(results[0], one) for one in results) and "forward captured" in other.describe()


def test_streams_and_rank_threads():
    q, k, v, _ = inputs(torch.bfloat16)
    cp = ra.ContextParallel(None, S, options=ra.Options(graphs="on"))
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    results = []
    for _ in range(4):
        for stream in streams:
            stream.wait_stream(streams[0])
            with torch.cuda.stream(stream):
                results.append(ra.attention(q, k, v, cp=cp))
            streams[0].wait_stream(stream)
    torch.cuda.synchronize()
    assert all(torch.equal(results[0], other) for other in results)
    assert cp.describe().count("forward captured") == 1, "told once of equal ones"

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S)
        for _ in range(3):
            ra.attention(*(cp.shard(t) for t in (q, k, v)), cp=cp)
        return cp.describe()

    for text in ra.Loopback(2).run(one_rank):
        assert "eager: ranks that are threads of one process" in text

"""Softcap, biases, ALiBi, sinks and dropout through the ring: on every schedule and rank as on one process."""

import pytest
import torch

import ringattn as ra
from ringattn import validation
from ringattn.kernels import reference, scores
from ringattn.kernels.blockwise import Blockwise
from ringattn.runtime import binding
from tests.support import cases
from tests.support.ring import S, check, tensors

MASK = cases.ALL["documents_window_globals"][0]
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02], dtype=torch.float64)


def made(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definition(q, k, v, mask, softcap=None, bias=None, sinks=None, slopes=None, keep=None):
    """Attention with every feature, written out, by autograd."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if slopes is not None:
        positions = torch.arange(scores.shape[-1])
        scores = scores - slopes[:, None, None] * (positions[: scores.shape[-2], None] - positions).abs()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks[:, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat((scores, column), -1)
    lse = torch.logsumexp(scores, -1)
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., : k.shape[1]]
    return torch.einsum("bhqk,bkhd->bqhd", probs if keep is None else probs * keep, v), lse


def grads_of(out, lse, dout, dlse, inputs, extra):
    finite = lse != -torch.inf
    ((out * dout).sum() + (lse.masked_fill(~finite, 0.0) * dlse).sum()).backward()
    return [out.detach(), lse.detach(), *(t.grad for t in inputs)], {name: t.grad for name, t in extra.items()}


def single(mask, sizes, extra, **features):
    q, k, v, dout, dlse = tensors(**sizes)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    extra = {name: t.clone().requires_grad_() for name, t in extra.items()}
    return grads_of(*definition(*inputs, mask.dense(S, S), **features, **extra), dout, dlse, inputs, extra)


def on_ranks(world, mask, sizes, extra, features=None, **settings):
    """Results by rank, and the sum over the ranks of the gradients of bias and sinks."""
    q, k, v, dout, dlse = tensors(**sizes)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, S, mask=mask, **settings)
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        whole = {name: t.clone().requires_grad_() for name, t in extra.items()}
        local = {name: cp.shard(t, dim=2) if name == "bias" else t for name, t in whole.items()}
        out, lse = ra.attention(*map(cp.shard, inputs), cp=cp, return_lse=True, **local, **(features or {}))
        return grads_of(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs, whole)

    ranks = ra.Loopback(world, timeout=20).run(one_rank)
    sinks = sum(grads["sinks"] for _, grads in ranks) if "sinks" in extra else None
    return [found for found, _ in ranks], {"bias": [grads.get("bias") for _, grads in ranks], "sinks": sinks}


FEATURES = {
    "softcap": ({"softcap": 1.5}, {"softcap": 1.5}, {}),
    "bias": ({}, {}, {"bias": made(3, 2, 4, S, S)}),
    "bias for all heads": ({}, {}, {"bias": made(4, 1, 1, S, S)}),
    "alibi": ({"bias": ra.alibi(SLOPES)}, {"slopes": SLOPES}, {}),
    "sinks": ({}, {}, {"sinks": made(5, 4) + 2.0}),
    "all": ({"softcap": 2.0}, {"softcap": 2.0}, {"bias": made(6, 1, 4, S, S), "sinks": made(7, 4)}),
}


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_on_every_schedule(feature, schedule, poison):
    ours, theirs, extra = FEATURES[feature]
    expected, gradients = single(MASK, {}, extra, **theirs)
    plain, _ = single(MASK, {}, {})
    assert (expected[0] - plain[0]).abs().max() > 0.01, "a result without the feature would be noticed"
    for world, layout, split in (
        (2, "zigzag", {}),
        (3, "striped", {}),
        (4, "zigzag", {"ulysses": 2, "options": ra.Options(head_chunks=2)}),
        (3, "contiguous", {"ulysses": 3}),
    ):
        found, totals = on_ranks(world, MASK, {}, extra, ours, layout=layout, schedule=schedule, **split)
        check(found, expected)
        if "sinks" in extra:
            torch.testing.assert_close(totals["sinks"], gradients["sinks"], rtol=1e-11, atol=1e-11)
        for bias in totals["bias"] if "bias" in extra else ():
            torch.testing.assert_close(bias, gradients["bias"], rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4, 8])
@pytest.mark.parametrize("name", ["causal", "strided", "longformer", "causal_minus_window"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_other_worlds_and_masks(feature, name, world):
    ours, theirs, extra = FEATURES[feature]
    mask = cases.ALL[name][0]
    expected, gradients = single(mask, {}, extra, **theirs)
    for schedule in ("ring", "gather"):
        found, totals = on_ranks(world, mask, {}, extra, ours, layout="balanced", schedule=schedule)
        check(found, expected)
        if "sinks" in extra:
            torch.testing.assert_close(totals["sinks"], gradients["sinks"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", ["sdpa", "blockwise", "reference"])
def test_every_kernel_takes_sinks(kernel):
    extra = {"sinks": made(5, 4) + 2.0}
    expected, gradients = single(ra.causal(), {}, extra)
    found, totals = on_ranks(2, ra.causal(), {}, extra, kernel=kernel)
    check(found, expected)
    torch.testing.assert_close(totals["sinks"], gradients["sinks"], rtol=1e-11, atol=1e-11)


def test_a_row_of_a_sink_alone():
    """Where nothing is attended the lse is the sink, and its gradient is that of the lse."""
    mask = ra.causal() - ra.sliding_window(2)
    extra = {"sinks": made(5, 4)}
    expected, gradients = single(mask, {}, extra)
    assert (expected[0][:, :3] == 0).all() and torch.allclose(expected[1][0, :, 0], extra["sinks"])
    found, totals = on_ranks(3, mask, {}, extra)
    check(found, expected)
    torch.testing.assert_close(totals["sinks"], gradients["sinks"], rtol=1e-11, atol=1e-11)


def test_a_bias_keeps_queries_at_home_and_alibi_travels():
    """Queries that travel take their positions along, but not their rows of a tensor."""
    seqlen, mask = 150, ra.longformer(5, 2, causal=False)
    q, k, v, dout, _ = tensors(seqlen, seqlen, batch=1)
    bias = made(1, 1, 4, seqlen, seqlen)
    dense = mask.dense(seqlen, seqlen)

    def one_rank(transport, features):
        cp = ra.ContextParallel(transport, seqlen, mask=mask, layout="contiguous")
        features = {name: cp.shard(t, dim=2) if isinstance(t, torch.Tensor) else t for name, t in features.items()}
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out = ra.attention(*map(cp.shard, inputs), cp=cp, **features)
        (cp.unshard(out) * dout).sum().backward()
        assert cp.plan.travel and ("forward q" in cp.traffic()["sent"]) is ("forward partial" in cp.traffic()["sent"])
        return "forward q" in cp.traffic()["sent"], [t.grad for t in inputs]

    for features, theirs, travels in (
        ({"bias": bias}, {"bias": bias}, False),
        ({"bias": ra.alibi(SLOPES), "softcap": 2.0}, {"slopes": SLOPES, "softcap": 2.0}, True),
    ):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        (definition(*inputs, dense, **theirs)[0] * dout).sum().backward()
        for travelled, found in ra.Loopback(2).run(lambda t, f=features: one_rank(t, f)):
            assert travelled is travels
            for a, b in zip(found, inputs, strict=True):
                torch.testing.assert_close(a, b.grad, rtol=1e-11, atol=1e-11)


def kept(world, p=0.4, seed=11, schedule="ring", layout="zigzag", seqlen=24, ulysses=1, **call):
    """Which pairs are kept, bit by bit, `[B, H, q, k]`: equal scores, and values that show their key."""
    q = torch.zeros(2, seqlen, 4, seqlen)
    v = torch.eye(seqlen)[None, :, None].expand(2, -1, 2, -1).contiguous()

    def one_rank(transport):
        cp = ra.ContextParallel(transport, seqlen, mask=ra.full(), layout=layout, schedule=schedule, ulysses=ulysses)
        local = [cp.shard(t) for t in (q, q[:, :, :2].contiguous(), v)]
        out, lse = ra.attention(*local, cp=cp, dropout_p=p, seed=seed, return_lse=True, **call)
        torch.testing.assert_close(lse, torch.full_like(lse, torch.tensor(float(seqlen)).log().item()))
        return cp.unshard(out).transpose(1, 2)

    (first, *rest) = ra.Loopback(world).run(one_rank)
    assert all(torch.equal(first, other) for other in rest)
    torch.testing.assert_close(first[first > 0], torch.full_like(first[first > 0], 1 / (1 - p) / seqlen))
    return first > 0


def test_dropout_is_bit_equal_for_every_world_layout_and_schedule():
    alone = kept(1)
    assert 0.55 < alone.float().mean() < 0.65
    for world in (2, 3, 4):
        for schedule in ("ring", "exchange", "gather"):
            for layout in ("zigzag", "striped"):
                assert torch.equal(kept(world, schedule=schedule, layout=layout), alone)
    assert not torch.equal(kept(1, seed=12), alone) and torch.equal(kept(1, seed=11), alone)
    for world, ulysses in ((2, 2), (4, 2), (3, 3)):
        assert torch.equal(kept(world, ulysses=ulysses), alone)
    rows = alone.flatten(0, 2).float()
    assert len({tuple(row) for row in rows.tolist()}) == len(rows), "batch rows, heads and queries differ"


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
@pytest.mark.parametrize("kernel", ["blockwise", "reference"])
def test_dropout_gradients(kernel, schedule):
    p, seed = 0.4, 11
    keep = kept(1, p, seed, seqlen=S).double() / (1 - p)
    expected, _ = single(MASK, {}, {}, keep=keep)
    for world in (2, 3):
        found, _ = on_ranks(
            world, MASK, {}, {}, {"dropout_p": p, "seed": seed}, kernel=kernel, schedule=schedule, layout="zigzag"
        )
        check(found, expected)


def test_seeds_are_drawn_alike_on_all_ranks_and_afresh_for_each_call():
    def one_rank(transport, seed):
        cp = ra.ContextParallel(transport, S, options=ra.Options(seed=seed))
        q, k, v = (cp.shard(t) for t in tensors()[:3])
        return [cp.unshard(ra.attention(q, k, v, cp=cp, dropout_p=0.5)) for _ in range(2)]

    runs = {
        (world, seed): ra.Loopback(world).run(lambda t, s=seed: one_rank(t, s))[0]
        for world in (1, 3)
        for seed in (0, 1)
    }
    for seed in (0, 1):
        for a, b in zip(runs[1, seed], runs[3, seed], strict=True):
            torch.testing.assert_close(a, b)
    assert not torch.equal(runs[1, 0][0], runs[1, 0][1]) and not torch.equal(runs[1, 0][0], runs[1, 1][0])


def test_dropout_in_a_recomputed_forward_needs_a_seed():
    from torch.utils.checkpoint import checkpoint

    q, k, v, dout, _ = tensors()
    q.requires_grad_()
    cp = ra.ContextParallel(None, S)
    out = checkpoint(lambda: ra.attention(q, k, v, cp=cp, dropout_p=0.5), use_reentrant=False)
    with pytest.raises(ValueError, match="pass seed="):
        out.backward(dout)
    grads = []
    for wrap in (lambda fn: fn(), lambda fn: checkpoint(fn, use_reentrant=False)):
        out = wrap(lambda: ra.attention(q, k, v, cp=cp, dropout_p=0.5, seed=3))
        grads.append(torch.autograd.grad((out * dout).sum(), q)[0])
    assert torch.equal(*grads)


def test_features_compile():
    torch._dynamo.reset()
    q, k, v, dout, _ = tensors()
    cp = ra.ContextParallel(None, S, mask=MASK)
    bias, sinks = made(1, 1, 4, S, S).requires_grad_(), made(2, 4).requires_grad_()

    def attend(q, rule):
        out = ra.attention(q, k, v, cp=cp, bias=bias, sinks=sinks, softcap=2.0, dropout_p=0.2, seed=5)
        return out + ra.attention(q, k, v, cp=cp, bias=rule, dropout_p=0.1, seed=6)

    grads = []
    for fn in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaf = q.clone().requires_grad_()
        grads.append(torch.autograd.grad((fn(leaf, ra.alibi(SLOPES)) * dout).sum(), (leaf, bias, sinks)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"softcap": -1.0}, "softcap=-1.0: must be a positive number"),
        ({"bias": torch.zeros(1, 4, 29, 28)}, r"bias \(1, 4, 29, 28\).*must be floats \[1 or 2, 1 or 4, 29, 29\]"),
        ({"bias": torch.zeros(1, 4, 29, 29, dtype=torch.int64)}, "must be floats"),
        ({"bias": "alibi"}, "must be a tensor or a rule such as ringattn.alibi"),
        ({"bias": ra.alibi(SLOPES[:3])}, r"ringattn.alibi\(slopes\[4\]\)"),
        ({"sinks": torch.zeros(3)}, r"sinks \(3,\).*must be floats \[4\]"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
        ({"dropout_p": 0.5, "seed": -3}, "seed=-3: must be at least 0"),
    ],
)
def test_bad_features(arguments, text):
    q, k, v, *_ = tensors()
    with pytest.raises(ValueError, match=text):
        ra.attention(q, k, v, cp=ra.ContextParallel(None, S), **arguments)


def test_sdpa_by_name_refuses_what_it_would_drop():
    q, k, v, *_ = tensors()
    cp = ra.ContextParallel(None, S, kernel="sdpa")
    for arguments in ({"softcap": 1.0}, {"bias": ra.alibi(SLOPES)}, {"bias": made(1, 1, 1, S, S)}, {"dropout_p": 0.1}):
        with pytest.raises(NotImplementedError, match="blockwise"):
            ra.attention(q, k, v, cp=cp, **arguments)


def test_ranks_that_ask_for_different_features_are_told():
    def one_rank(transport, features):
        q, k, v = (t[:, :15] for t in tensors()[:3])
        cp = ra.ContextParallel(transport, 30)
        ra.attention(q, k, v, cp=cp, **features[transport.rank])

    for features, text in (
        ([{"softcap": 1.0}, {"softcap": 2.0}], "softcap 1.0"),
        ([{"sinks": torch.zeros(4).double()}, {}], r"sinks: given on rank 0; \(absent\) on rank 1"),
        ([{"dropout_p": 0.1, "seed": 1}, {"dropout_p": 0.1, "seed": 2}], "seed 1 on rank 0"),
        ([{"bias": ra.alibi(SLOPES)}, {"bias": ra.alibi(2 * SLOPES)}], "alibi"),
    ):
        with pytest.raises(ValueError, match=text):
            ra.Loopback(2, timeout=10).run(lambda t, f=features: one_rank(t, f))


class Clipped:
    """A bias rule of another name: the distance, at most."""

    name = "clipped"

    def __init__(self, params):
        self.params = params

    def bias(self, heads, q, k):
        return -self.params[heads, None, None].minimum((q[:, None] - k).abs()).unsqueeze(0)

    def refuse(self, num_heads):
        return (
            None if len(self.params) == num_heads else f"clipped has {len(self.params)} distances for {num_heads} heads"
        )


class AlibiAlone(Blockwise):
    """A kernel that computes ALiBi and no other rule."""

    name = "alibi-alone"

    def refuse(self, call):
        return f"{[*call.features]}: not computed" if call.features - {"alibi"} else None


def test_a_rule_is_a_feature_of_its_own(monkeypatch):
    q, k, v, *_ = tensors()
    cp = ra.ContextParallel(None, S)
    with pytest.raises(ValueError, match="must be a tensor or a rule such as"):
        ra.attention(q, k, v, cp=cp, bias=Clipped(torch.ones(4)))  # not one that is known
    monkeypatch.setitem(scores.RULES, "clipped", Clipped)
    monkeypatch.setattr(scores, "FEATURES", scores.FEATURES | {"clipped"})
    monkeypatch.setattr(reference, "FEATURES", scores.FEATURES)
    monkeypatch.setattr(binding, "KERNELS", (AlibiAlone(), Blockwise()))
    monkeypatch.setattr(validation, "KERNELS", (AlibiAlone(), Blockwise()))
    alone, limit = cp.replace(kernel="alibi-alone"), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=q.dtype)
    with pytest.raises(NotImplementedError, match=r"\['clipped'\]: not computed"):
        ra.attention(q, k, v, cp=alone, bias=Clipped(limit))
    with pytest.raises(ValueError, match="clipped has 2 distances for 4 heads"):
        ra.attention(q, k, v, cp=cp, bias=Clipped(limit[:2]))
    at = torch.arange(S)
    bias = -limit[:, None, None].minimum((at[:, None] - at).abs())[None]
    torch.testing.assert_close(
        ra.attention(q, k, v, cp=cp, bias=Clipped(limit)), ra.attention(q, k, v, cp=cp, bias=bias)
    )


def test_seeds_that_are_drawn_follow_from_numbers_alone():
    """Not from how an interpreter hashes."""
    link = ra.ContextParallel(None, S).link
    assert [link.draw(7), link.draw(7), link.draw(8)] == [566040723559224272, 200518654509178738, 2529129928028215185]

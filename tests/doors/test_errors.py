"""Bad input: a clear error with the value, the rule and the remedy, before anything moves."""

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.comm import CallMismatch, PlanningRank


def qkv(heads=4, kv_heads=2, q_len=8, kv_len=8, dim=4, v_dim=4, batch=1, dtype=torch.float32):
    shapes = ((q_len, heads, dim), (kv_len, kv_heads, dim), (kv_len, kv_heads, v_dim))
    return [torch.zeros(batch, *s, dtype=dtype) for s in shapes]


def change(index, fn):
    tensors = qkv()
    tensors[index] = fn(tensors[index])
    return tensors


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (qkv(heads=4, kv_heads=3), "4 heads over 3 KV heads: num_kv_heads must divide num_heads"),
        (change(1, lambda t: t.expand(2, -1, -1, -1)), "batch differs: q 1, k 2, v 1"),
        (change(2, lambda t: t[:, :7]), "must agree in batch, length and heads"),
        (change(0, lambda t: t.double()), "dtype differs: q torch.float64"),
        (change(1, lambda t: t.to("meta")), "device differs: q cpu, k meta"),
        (change(0, lambda t: t[..., :3]), "head_dim of q is 3 and of k 4"),
        (change(0, lambda t: t[0]), r"q has shape \(8, 4, 4\): must be \[batch, tokens"),
        ([t.long() for t in qkv()], "q is torch.int64: must be float16"),
        (qkv(q_len=7), "q has 7 tokens, but rank 0 of 1 holds 8 of seqlen=8"),
        (qkv(kv_len=9), "k has 9 tokens, but rank 0 of 1 holds 8 of kv_seqlen=8"),
    ],
)
def test_tensors_that_do_not_fit(tensors, text):
    with pytest.raises(ValueError, match=text):
        ra.attention(*tensors, cp=ra.ContextParallel(None, 8))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mask": ra.full()}, r"mask full\(\) is not one of the context's \(causal\(\)\)"),
        ({"mask": torch.ones(8, 8).bool()}, r"say it in masks"),
        ({"scale": float("nan")}, "scale=nan: must be finite"),
        ({"dropout_p": 1.5}, "dropout_p=1.5"),
        ({"seed": 3}, "seed=3 without dropout_p"),
    ],
)
def test_arguments_that_do_not_fit(arguments, text):
    with pytest.raises(ValueError, match=text):
        ra.attention(*qkv(), cp=ra.ContextParallel(None, 8), **arguments)


@pytest.mark.parametrize("arguments", [{"softcap": 30.0}, {"bias": torch.zeros(1, 1, 8, 8)}, {"dropout_p": 0.1}])
def test_a_feature_that_a_named_kernel_lacks_is_refused_with_the_remedy(arguments):
    (feature,) = arguments
    with pytest.raises(NotImplementedError, match=f"{feature.split('_')[0]}.*kernel='blockwise'"):
        ra.attention(*qkv(), cp=ra.ContextParallel(None, 8, kernel="sdpa"), **arguments)


def test_a_named_kernel_is_never_replaced():
    with pytest.raises(NotImplementedError, match="v_head_dim 3 must equal head_dim 4"):
        ra.attention(*qkv(v_dim=3), cp=ra.ContextParallel(None, 8, kernel="sdpa"))
    assert ra.attention(*qkv(v_dim=3), cp=ra.ContextParallel(None, 8)).shape[-1] == 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layout": "zigzig"}, "layout='zigzig' is unknown.*did you mean 'zigzag'"),
        ({"schedule": "rings"}, "did you mean 'ring'"),
        ({"kernel": "sdp"}, "did you mean 'sdpa'"),
        ({"seqlen": 0}, "seqlen=0: must be an integer of at least 1"),
        ({"seqlen": 8.0}, "seqlen=8.0"),
        ({"kv_seqlen": -3}, "kv_seqlen=-3"),
        ({"mask": []}, "give one mask or several"),
        ({"mask": torch.ones(8, 8).bool()}, r"<Tensor .* torch.bool>: say it in masks.*bias=torch.zeros\(mask.shape\)"),
        ({"mask": "causal"}, "give one mask or several"),
        ({"mask": ra.causal}, "give one mask or several"),
        ({"mask": ra.documents([0, 5])}, "cu_seqlens ends at 5 but the sequence ends at 8"),
        ({"layout": ra.Layout.from_spans([[(0, 4)], [(4, 4)]])}, "does not fit seqlen=8 over 1 ranks"),
    ],
)
def test_contexts_that_do_not_fit(settings, text):
    with pytest.raises(ValueError, match=text):
        ra.ContextParallel(None, **{"seqlen": 8, **settings})


def test_other_refusals():
    with pytest.raises(ValueError, match="more ranks than tokens"):
        ra.ContextParallel(PlanningRank(0, 9), 8)
    assert ra.ContextParallel(PlanningRank(8, 9), 8, kv_seqlen=20).local_seqlen == 0
    with pytest.raises(ValueError, match="ulysses=2 does not divide the 1 ranks"):
        ra.ContextParallel(None, 8, ulysses=2)
    with pytest.raises(ValueError, match="group_or_mesh='nccl'"):
        ra.ContextParallel("nccl", 8)
    with pytest.raises(ValueError, match=r"replace\(\) cannot change ulises"):
        ra.ContextParallel(None, 8).replace(ulises=2)
    with pytest.raises(ValueError, match=r"timeout=0"):
        ra.Options(timeout=0)
    cp = ra.ContextParallel(PlanningRank(0, 2), 8)
    with pytest.raises(ValueError, match=r"x.size\(1\)=4 but seqlen=8"):
        cp.shard(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"dim=1 of a tensor of shape \(8,\)"):
        cp.shard(torch.zeros(8))
    with pytest.raises(ValueError, match=r"local.size\(1\)=8 but local_seqlen=4"):
        cp.unshard(torch.zeros(1, 8))


def test_check_nan_names_the_tensor():
    q, k, v = qkv()
    k[0, 3] = float("nan")
    cp = ra.ContextParallel(None, 8, options=ra.Options(check_nan=True))
    with pytest.raises(FloatingPointError, match="k holds NaN"):
        ra.attention(q, k, v, cp=cp)
    assert ra.attention(q, k, v, cp=ra.ContextParallel(None, 8)).isnan().any(), "and unasked NaN passes through"


def test_long_masks_that_differ_in_the_middle_are_told_apart():
    def one_rank(transport):
        bounds = [0, 4, 8, 12, 16, 22 if transport.rank else 20, 24, 28, 32]
        cp = ra.ContextParallel(transport, 32, mask=ra.documents(bounds) & ra.causal(), layout="contiguous")
        with pytest.raises(ValueError, match=r"ranks disagree[\s\S]*mask: "):
            ra.attention(*qkv(q_len=16, kv_len=16), cp=cp)

    ra.Loopback(2, timeout=10).run(one_rank)


def test_nan_on_one_rank_raises_on_all():
    def one_rank(transport):
        cp = ra.ContextParallel(transport, 8, options=ra.Options(check_nan=True))
        q, k, v = qkv(q_len=4, kv_len=4)
        if transport.rank == 1:
            v[0, 0] = float("inf")
        with pytest.raises(FloatingPointError, match="v holds NaN or infinity"):
            ra.attention(q, k, v, cp=cp)

    ra.Loopback(2, timeout=10).run(one_rank)


@pytest.mark.parametrize("known", [False, True])
def test_ranks_of_which_one_checks_for_nan_are_told(known):
    def one_rank(transport):
        cp = ra.ContextParallel(transport, 8)
        if known:
            ra.attention(*qkv(q_len=4, kv_len=4), cp=cp)
        cp = cp.replace(options=ra.Options(check_nan=transport.rank == 1))
        with pytest.raises(CallMismatch, match=r"values of q, k and v(: \(absent\) on rank 0;)? all finite"):
            ra.attention(*qkv(q_len=4, kv_len=4), cp=cp)

    ra.Loopback(2, timeout=10).run(one_rank)


def test_what_is_refused_where_others_check_for_nan_keeps_its_type():
    def one_rank(transport):
        cp = ra.ContextParallel(transport, 8, options=ra.Options(check_nan=True))
        ra.attention(*qkv(q_len=4, kv_len=4), cp=cp)
        with pytest.raises(ValueError, match="q has 3 tokens"):
            ra.attention(*qkv(q_len=3 if transport.rank else 4, kv_len=4), cp=cp)

    ra.Loopback(2, timeout=10).run(one_rank)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: ra.ContextParallel(None, 8, layout=None), "layout=None is unknown"),
        (lambda: ra.attention(*qkv(), cp=ra.ContextParallel(None, 8), mask=[ra.causal()]), "not one of the context's"),
        (lambda: ra.attention(*qkv(dim=0), cp=ra.ContextParallel(None, 8)), "head_dim is 0"),
        (
            lambda: ra.attention(*qkv(), cp=ra.ContextParallel(None, 8), scale=torch.ones(1, requires_grad=True)),
            "scale",
        ),
        (lambda: ra.sliding_window(10**19), "must be at most"),
        (lambda: ra.documents(None), "must be a sequence of integers"),
        (
            lambda: ra.ContextParallel(PlanningRank(0, 2), 8, options=ra.Options(timeout=1)),
            "transport's deadline is 60",
        ),
    ],
)
def test_more_bad_input(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_a_context_made_before_its_group_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"call init_process_group\(\) first"):
        ra.ContextParallel(None, 8)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ra.ContextParallel(None, 8).world_size == 1


def call(**arguments):
    given = dict(zip("qkv", qkv(), strict=True)) | {"cp": ra.ContextParallel(None, 8)} | arguments
    return ra.attention(**given)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: call(softcap="1"), "softcap='1': must be a number"),
        (lambda: call(scale="1"), "scale='1': must be a number"),
        (lambda: call(dropout_p=None), "dropout_p=None: must be a number"),
        (lambda: call(dropout_p=0.5, seed=1.5), "seed=1.5: must be an integer"),
        (lambda: call(sinks=[1.0, 2.0]), "sinks is a list: must be a tensor"),
        (lambda: call(q=None), "q is a NoneType: must be a tensor"),
        (lambda: call(cp=ra.causal()), "must be a ringattn.ContextParallel"),
        (lambda: ra.alibi("x"), "must be one finite number for each query head"),
        (lambda: ra.alibi(torch.ones(4, dtype=torch.complex64)), "must be real numbers"),
        (lambda: ra.Options(kv_bytes="1"), "Options.kv_bytes='1'"),
        (lambda: ra.Options(seed="x"), "Options.seed='x': must be an integer"),
        (lambda: ra.Options(rates=1e9), "must be a ringattn.Rates"),
        (lambda: ra.Options(topology="node"), "must be a ringattn.Topology"),
        (lambda: ra.Topology(1e9), "must be a ringattn.Link"),
        (lambda: ra.Shape(6, 4, 64), "num_kv_heads must divide num_heads"),
        (lambda: ra.Shape(8, 4, 64, dtype="int8"), "dtype='int8': must be one of float16"),
        (lambda: ra.ContextParallel(None, 8, shape=(8, 8, 64)), "must be a ringattn.Shape"),
        (lambda: ra.ContextParallel(None, 8, options={}), "must be a ringattn.Options"),
        (lambda: ra.Layout.from_spans([[(0, 2.7)]]), "give each rank a list of spans"),
        (lambda: ra.Layout.from_spans([[(10**12, 1)]]), "a span ends at position 1000000000000"),
    ],
)
def test_wrong_types(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_forward_mode_is_refused():
    q, k, v = (t.double() for t in qkv())
    cp = ra.ContextParallel(None, 8)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: ra.attention(x, k, v, cp=cp), (q,), (torch.ones_like(q),))
    bias = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: ra.attention(q, k, v, cp=cp, bias=x), (bias,), (torch.ones_like(bias),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        ra.attention(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), k, v, cp=cp)


def test_transforms_of_gradients_are_refused_by_name():
    q, k, v = (t.double() for t in qkv())
    cp = ra.ContextParallel(None, 8)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=r"attention\(\) cannot be differentiated by torch.func"):
            transform(lambda x: ra.attention(x, k, v, cp=cp).sum())(q)
    many = torch.func.vmap(lambda x: ra.attention(x, k, v, cp=cp))(q[None])[0]
    assert torch.equal(many, ra.attention(q, k, v, cp=cp))


def test_many_gradients_at_once_are_refused_by_name():
    q, k, v = (t.double().requires_grad_() for t in qkv())
    out = ra.attention(q, k, v, cp=ra.ContextParallel(None, 8))
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(out, q, torch.ones(2, *out.shape, dtype=out.dtype), is_grads_batched=True)


def test_a_length_names_the_layout_of_its_side():
    def one_rank(transport):
        cp = ra.ContextParallel(transport, 203, layout="zigzag", kv_layout="cyclic")
        q = torch.randn(1, cp.local_seqlen, 1, 8)
        ra.attention(q, q, q, cp=cp)

    with pytest.raises(ValueError, match=r"k has 5\d tokens.*layout cyclic\); shard with cp.shard_kv"):
        ra.Loopback(4).run(one_rank)


def test_the_program_of_another_mask_is_refused():
    with pytest.raises(ValueError, match=r"mask=full\(\).*one of the context's \(causal\(\)\)"):
        ra.ContextParallel(None, 8).program(ra.full())


def test_plans_and_trainings_that_differ_are_named():
    mask = ra.longformer(2, 2, causal=False)
    keys_cost = {"rates": ra.Rates(1e15, 1e15, exposed=1.0), "topology": ra.Topology(ra.Link(1e3))}
    calls_cost = {"rates": ra.Rates(1e6, 1e6, call=1.0, step=10.0, merge=1.0), "topology": ra.Topology(ra.Link(1e18))}

    def travels(transport):
        options = ra.Options(**(calls_cost if transport.rank % 2 else keys_cost))
        cp = ra.ContextParallel(transport, 150, mask=mask, layout="contiguous", schedule="exchange", options=options)
        return ra.attention(*qkv(q_len=50, kv_len=50), cp=cp)

    with pytest.raises(ValueError, match=r"schedule: exchange \(cut 1, queries travel\) on"):
        ra.Loopback(3, timeout=10).run(travels)

    def trains(transport):
        sinks = torch.zeros(4, requires_grad=transport.rank == 0)
        ra.attention(*qkv(q_len=4, kv_len=4), cp=ra.ContextParallel(transport, 8), sinks=sinks)

    with pytest.raises(ValueError, match="gradient: wanted on rank 0; not wanted on rank 1"):
        ra.Loopback(2, timeout=10).run(trains)


def test_an_empty_batch_moves_nothing_and_needs_no_room():
    cp = ra.ContextParallel(None, 8, options=ra.Options(kv_bytes=100))
    assert ra.attention(*qkv(batch=0), cp=cp).shape == (0, 8, 4, 4)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (np.array([[0, 0, 4, 1]]), "a span ends at position 3, but the shards hold 4 in all, and the sequence 8"),
        (np.array([[0, 0, 4, 1], [1, 0, 4, 1]]), "position 0 is held 2 times"),
        (np.array([[1, 0, 4, 1], [0, 4, 4, 1]]), "ranks must rise"),
        (np.array([[0, 0, 4, 1], [2, 4, 4, 1]]), "ranks must rise"),
        ("y", "must be int64"),
    ],
)
def test_a_layout_made_by_hand_is_looked_at(table, text):
    with pytest.raises(ValueError, match=text):
        ra.ContextParallel(PlanningRank(0, 2), 8, layout=ra.Layout("x", 8, 2, table))

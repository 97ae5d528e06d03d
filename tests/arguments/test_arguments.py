"""Arguments at the edge: refused with the value, the rule and the remedy in no time, or taken and right."""

import itertools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra

CP = ra.ContextParallel(None, 8, mask=(ra.causal(), ra.full()))
Q = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(0))
BIG = 1 << 62


def attend(**arguments: Any) -> Any:
    return ra.attention(Q, Q, Q, cp=CP, **arguments)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "softcap too large": (lambda: attend(softcap=1e39), "softcap=1e"),
    "softcap wrong gradients": (lambda: attend(softcap=1e38), "softcap=1e"),
    "softcap too small": (lambda: attend(softcap=1e-40), "softcap=1e-40"),
    "scale too large": (lambda: attend(scale=1e38), "scale=1e"),
    "scale too small": (lambda: attend(scale=1e-40), "scale=1e-40"),
    "scale is a bool": (lambda: attend(scale=True), "scale=True"),
    "softcap is a bool": (lambda: attend(softcap=True), "softcap=True"),
    "dropout is a bool": (lambda: attend(dropout_p=False), "dropout_p=False"),
    "return_lse is a word": (lambda: attend(return_lse="no"), "return_lse='no'"),
    "seed is negative": (lambda: attend(dropout_p=0.5, seed=-1), "seed=-1"),
    "seed is too large": (lambda: attend(dropout_p=0.5, seed=1 << 63), "seed="),
    "numpy": (lambda: ra.attention(Q.numpy(), Q, Q, cp=CP), "q is "),
    "sparse": (lambda: ra.attention(Q.to_sparse(), Q, Q, cp=CP), "to_dense"),
    "sparse to shard": (lambda: CP.shard(torch.randn(8, 2).to_sparse(), dim=0), "to_dense"),
    "meta to shard": (lambda: CP.shard(torch.zeros(8, device="meta"), dim=0), "meta device"),
    "numpy to shard": (lambda: CP.shard(np.zeros(8), dim=0), "torch.as_tensor"),
    "list to unshard": (lambda: CP.unshard([1, 2]), "must be a tensor"),
    "list to roll": (lambda: ra.roll(CP, [[1]], 1), "must be a tensor"),
    "dim is a bool": (lambda: CP.shard(Q, dim=True), "dim=True"),
    "by is a bool": (lambda: ra.roll(CP, Q, True), "by=True"),
    "fill does not fit": (lambda: ra.pack([[0, 2]]).pack(torch.zeros(1, 2, dtype=torch.int64), fill=0.5), "fill=0.5"),
    "area too large": (lambda: ra.causal().area(BIG, BIG), "must be at most"),
    "offset too large": (lambda: ra.ContextParallel(None, 8, q_offset=BIG), "q_offset="),
    "length is a bool": (lambda: ra.ContextParallel(None, True), "seqlen=True"),
    "window is a bool": (lambda: ra.sliding_window(True), "sliding_window left=True"),
    "chunk is a bool": (lambda: ra.chunked(True), "chunked size=True"),
    "timeout is endless": (lambda: ra.Options(timeout=math.inf), "timeout=inf"),
    "timeout is nothing": (lambda: ra.Options(timeout=1e-300), "timeout=1e-300"),
    "timeout is a bool": (lambda: ra.Options(timeout=True), "timeout=True"),
    "kv_bytes is a part": (lambda: ra.Options(kv_bytes=1.5), "kv_bytes=1.5"),
    "seed of options": (lambda: ra.Options(seed=-1), "seed=-1"),
    "check_nan is a word": (lambda: ra.Options(check_nan="no"), "check_nan='no'"),
    "graphs are none": (lambda: ra.Options(graphs="never"), "graphs='never'"),
    "compare_every is none": (lambda: ra.Options(compare_every=0), "compare_every=0"),
    "three communicators": (lambda: ra.Options(communicators=3), "communicators=3"),
    "rates of nothing": (lambda: ra.Rates(0, 1e9), "Rates.forward=0"),
    "rates is a bool": (lambda: ra.Rates(1e9, True), "Rates.backward=True"),
    "heads of no number": (lambda: ra.Shape(8.5, 8, 64), "Shape.num_heads=8.5"),
    "link of nothing": (lambda: ra.Link(0), "Link.bytes_per_second=0"),
    "nodes of unknown size": (
        lambda: ra.Topology(ra.Link(1e9), ra.Link(1e8)),
        "ranks_per_node=None, which is one node",
    ),
    "node of no rank": (lambda: ra.Topology(ra.Link(1e9), ranks_per_node=0), "Topology.ranks_per_node=0"),
    "world is a bool": (lambda: ra.Loopback(True), "world_size=True"),
    "loopback waits for ever": (lambda: ra.Loopback(2, timeout=math.inf), "timeout=inf"),
    "labels out of range": (
        lambda: ra.loss.token_mean(torch.zeros(1, 3, 5), torch.tensor([[0, 1, 7]])),
        "7",
    ),
    "labels as numpy": (lambda: ra.loss.count_targets(np.zeros(3)), "labels"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(case: str) -> None:
    call, text = REFUSED[case]
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        call()
    assert time.monotonic() - start < 2.0
    assert text in str(caught.value) and ("must" in str(caught.value) or "name the dim" in str(caught.value))


@pytest.mark.parametrize(
    "mask", [ra.bigbird(4, 1, 1, 10**6), ra.strided(10**9), ra.dilated(10**9, 10**9), ra.chunked(1 << 40)], ids=str
)
def test_enormous_arguments_do_not_hang(mask: ra.Mask) -> None:
    start = time.monotonic()
    cp = ra.ContextParallel(None, 64, mask=mask)
    assert mask.dense(64, 64).sum() == mask.area(64, 64)
    out = ra.attention(*[torch.randn(1, 64, 1, 4, dtype=torch.float64)] * 3, cp=cp)
    assert out.isfinite().all() and time.monotonic() - start < 2.0


def test_a_mask_that_would_take_many_comparisons_is_refused() -> None:
    mask = ra.chunked(6517246) & (ra.strided(2165) - ra.strided(19))
    with pytest.raises(ValueError, match=r"14,856,233 pairs of pieces to compare \(at most .*fewer or larger"):
        ra.ContextParallel(None, 5_700_000, mask=mask)


def test_many_strides_are_counted() -> None:
    start, n, stride = time.monotonic(), 1 << 20, 10**5
    classes = [len(range(first, n, stride)) for first in range(stride)]
    assert (ra.full() - ra.strided(stride)).area(n, n) == n * n - sum(size * size for size in classes)
    assert time.monotonic() - start < 2.0


def test_strides_of_a_few_queries_are_taken_out_in_time() -> None:
    start = time.monotonic()
    for mask in (ra.prefix_lm(420) - ra.strided(1024), ra.global_tokens(697) - ra.dilated(600, 0)):
        assert mask.area(697, 697) == int(mask.dense(697, 697).sum())
    assert time.monotonic() - start < 1.0


def test_many_blocks_are_counted() -> None:
    start, n, block = time.monotonic(), 1 << 20, 64
    rows = range(2, n // block)  # the two global ones see and are seen
    apart = sum(min(row - 2, 1) + min(3, row - 3) for row in rows if row > 2)
    area = ra.bigbird(block, 3, 2, 3).area(n, n)
    inside = len(rows) * (block * (block + 1) // 2 + 2 * block * block) + block * (2 * block + 1)
    assert inside < area <= inside + apart * block * block  # random blocks may be global or in the window
    assert time.monotonic() - start < 2.0


def test_slopes_of_python_numbers_are_exact() -> None:
    q, k, v = torch.randn(3, 1, 8, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    slopes = torch.tensor([0.1, 0.3], dtype=torch.float64)
    found = ra.attention(q, k, v, cp=CP, bias=ra.alibi([0.1, 0.3]))
    at = torch.arange(8)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 - slopes[:, None, None] * (at[:, None] - at).abs()
    right = scores.masked_fill(~ra.causal().dense(8, 8), -torch.inf).softmax(-1) @ v.transpose(1, 2)
    assert (found - right.transpose(1, 2)).abs().max() < 1e-14


@pytest.mark.parametrize("softcap", [2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize("scale", [2.0**-40, 0.5, 2.0**20])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bounds_of_scores_give_right_gradients(device: str, scale: float, softcap: float) -> None:
    leaves = [x.to(device, copy=True).requires_grad_() for x in (Q, Q.flip(1), Q.flip(2))]
    out = ra.attention(*leaves, cp=CP, scale=scale, softcap=softcap)
    grads = torch.autograd.grad(out.sum(), leaves)
    exact = [x.detach().double().transpose(1, 2).requires_grad_() for x in leaves]
    scores = softcap * torch.tanh(scale * (exact[0] @ exact[1].transpose(2, 3)) / softcap)
    right = scores.masked_fill(~ra.causal().dense(8, 8).to(device), -torch.inf).softmax(-1) @ exact[2]
    for a, b in zip(grads, torch.autograd.grad(right.sum(), exact), strict=True):
        size = b.abs().max()
        assert a.isfinite().all() and (a.transpose(1, 2) - b).abs().max() <= 1e-3 * size + 1e-6 * scale


class Unreadable:
    """What raises in whatever way it is looked at as a number."""

    def __index__(self) -> int:
        raise RuntimeError("not a number")


def unusual() -> list[torch.Tensor]:
    """A nested tensor and a quantized one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of both
        ones = [torch.ones(2), torch.ones(3)]
        return [torch.nested.nested_tensor(ones), torch.quantize_per_tensor(ones[0], 0.1, 0, torch.qint8)]


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 20), st.sampled_from([1 << 40, 1 << 63, -(1 << 63)]),
    st.floats(allow_nan=True), st.text(max_size=3), st.lists(st.integers(-2, 9), max_size=4),
    st.sampled_from([torch.tensor(3), torch.zeros(2), np.int64(4), np.float32(0.5), b"x", {}, 1j]),
    st.sampled_from([
        *unusual(), torch.zeros(8, device="meta"), Q.to("meta"), torch.nn.Parameter(torch.ones(3)),
        Q.to_sparse(), Q.to(torch.complex64), Q.to(torch.float8_e4m3fn), torch.ones(8, dtype=torch.float8_e5m2),
        Q.numpy(), np.array(["a"]), itertools.repeat(1),
        10**5000, 1 << 1000, [[[[1.5] * 8] * 8] * 8] * 8, Unreadable(), object(), ..., slice(3), range(5), CP,
        ra.causal(), np.datetime64("2020"), np.array(1 << 63, np.uint64), (0, 1 << 70), "causal",
    ]),
)  # fmt: skip
DOORS: dict[str, Callable[..., Any]] = {
    "sliding_window": ra.sliding_window,
    "global_tokens": ra.global_tokens,
    "documents": ra.documents,
    "prefix_lm": ra.prefix_lm,
    "chunked": ra.chunked,
    "strided": ra.strided,
    "dilated": lambda x: ra.dilated(x, 2),
    "longformer": lambda x: ra.longformer(2, x),
    "bigbird": lambda x: ra.bigbird(4, 1, 1, x),
    "seqlen": lambda x: ra.ContextParallel(None, x),
    "offset": lambda x: ra.ContextParallel(None, 8, q_offset=x),
    "layout": lambda x: ra.ContextParallel(None, 8, layout=x),
    "kv_bytes": lambda x: ra.Options(kv_bytes=x),
    "timeout": lambda x: ra.Options(timeout=x),
    "seed": lambda x: ra.Options(seed=x),
    "rates": lambda x: ra.Rates(x, x),
    "shape": lambda x: ra.Shape(x, x, 64),
    "link": ra.Link,
    "topology": lambda x: ra.Topology(ra.Link(1e9), ranks_per_node=x),
    "world": ra.Loopback,
    "pack": lambda x: ra.pack([x]),
    "shard": CP.shard,
    "unshard": CP.unshard,
    "roll": lambda x: ra.roll(CP, Q, x),
    "q": lambda x: ra.attention(x, Q, Q, cp=CP),
    "scale": lambda x: attend(scale=x),
    "softcap": lambda x: attend(softcap=x),
    "p": lambda x: attend(dropout_p=x),
    "labels": lambda x: ra.loss.count_targets(x),
    "shift": ra.loss.shift_labels,
    "k": lambda x: ra.attention(Q, x, Q, cp=CP),
    "cp": lambda x: ra.attention(Q, Q, Q, cp=x),
    "mask": lambda x: attend(mask=x),
    "bias": lambda x: attend(bias=x),
    "sinks": lambda x: attend(sinks=x),
    "dropout seed": lambda x: attend(dropout_p=0.5, seed=x),
    "return_lse": lambda x: attend(return_lse=x),
    "group": lambda x: ra.ContextParallel(x, 8),
    "masks": lambda x: ra.ContextParallel(None, 8, mask=x),
    "schedule": lambda x: ra.ContextParallel(None, 8, schedule=x),
    "kernel": lambda x: ra.ContextParallel(None, 8, kernel=x),
    "options": lambda x: ra.ContextParallel(None, 8, options=x),
    "kv_seqlen": lambda x: ra.ContextParallel(None, 8, kv_seqlen=x),
    "dense": lambda x: ra.causal().dense(5, 5, x),
    "area": lambda x: ra.causal().area(x, x),
    "alibi": ra.alibi,
    "dim": lambda x: CP.shard(Q, dim=x),
    "grad": lambda x: CP.shard(Q, grad=x),
    "fill": lambda x: ra.roll(CP, Q, 1, fill=x),
    "bounds": lambda x: ra.roll(CP, Q, 1, cu_seqlens=x),
    "parameters": ra.loss.sum_gradients,
    "meter": ra.loss.TokenMeter,
    "whole": lambda x: ra.loss.sum_gradients([], whole=x),
    "value": ra.loss.sum_over,
    "multiple": lambda x: ra.pack([[0, 5]], multiple=x),
    "sum's group": lambda x: ra.loss.sum_over(torch.ones(2), x),
    "steps": lambda x: ra.loss.TokenMeter().read(x),
}


def knock(door: str, value: Any) -> None:
    """Refused in words, or taken; never anything else, and never slowly."""
    start = time.monotonic()
    try:
        DOORS[door](value)
    except (ValueError, NotImplementedError) as error:
        assert 20 < len(str(error)) < 1000, (door, value, error)
    assert time.monotonic() - start < 2.0, (door, value)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DOORS)), ODD)
def test_malformed_arguments(door: str, value: Any) -> None:
    knock(door, value)


def test_an_endless_list_is_refused() -> None:
    for door in ("documents", "parameters", "whole", "masks", "alibi", "bounds"):
        knock(door, itertools.repeat(1))


@pytest.mark.slow
@settings(max_examples=4000, deadline=None)
@given(st.sampled_from(sorted(DOORS)), ODD)
def test_many_malformed_arguments(door: str, value: Any) -> None:
    knock(door, value)


def test_numbers_of_other_kinds_are_refused() -> None:
    q, cp = torch.randn(1, 8, 2, 4), ra.ContextParallel(None, 8)
    for wrong in (np.complex64(1 + 2j), np.timedelta64(1, "s")):
        for name in ("scale", "softcap", "dropout_p"):
            with pytest.raises(ValueError, match=f"{name}=.*must be a number"):
                ra.attention(q, q, q, cp=cp, **{name: wrong})  # type: ignore[call-overload]


def test_a_default_device_is_no_matter() -> None:
    q, cp = torch.randn(1, 8, 2, 4), ra.ContextParallel(None, 8)
    rule = ra.alibi(torch.tensor([0.5, 0.25]))
    right = ra.attention(q, q, q, cp=cp, dropout_p=0.5, seed=3, bias=rule), ra.roll(cp, q, 3)
    with torch.device("meta"):
        cp = ra.ContextParallel(None, 8)
        slopes = ra.alibi(rule.params)
        found = ra.attention(q, q, q, cp=cp, dropout_p=0.5, seed=3, bias=slopes), ra.roll(cp, q, 3)
    assert torch.equal(right[0], found[0])
    assert torch.equal(right[1], found[1])

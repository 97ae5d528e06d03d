"""PyTorch's own shape of context parallel: code written for it moves over by its imports, at any length, with the
gradients of one process on every rank; and what cannot be kept is refused by all ranks."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import CheckpointError, checkpoint

import ringattn as ra
from ringattn.comm import CallMismatch, PeerError
from ringattn.integrations.checkpointing import keep_attention
from ringattn.integrations.torch import (
    RingAttention,
    context_parallel,
    context_parallel_shard,
    context_parallel_unshard,
    local_attention,
    set_rotate_method,
)
from ringattn.testing import run_processes
from tests.support.pages import blocks

IDS, HEADS, KV, DIM, WORDS = 17, 4, 2, 6, 5


class Inner(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3, enable_gqa=True)


class ByHand(Inner):
    """Attention that no function of PyTorch's is asked for, `[batch, tokens, heads, head_dim]`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.3, enable_gqa: bool = True) -> Tensor:
        k, v = (x.repeat_interleave(HEADS // KV, 2) for x in (k, v))
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


class Layer(nn.Module):
    def __init__(self, is_causal: bool, by_hand: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV) * DIM)
        self.out = nn.Linear(HEADS * DIM, DIM)
        self.is_causal, self.by_hand = is_causal, by_hand
        self.inner = ByHand() if by_hand else Inner()

    def forward(self, x: Tensor, angles: Tensor, text: Tensor) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], -1, DIM)  # Dynamo cannot trace unflatten() or split() under a mode
        q, k, v = qkv[:, :, :HEADS], qkv[:, :, HEADS:-KV], qkv[:, :, -KV:]
        q, k = q * angles.cos()[:, None], k + angles.sin()[:, None]
        if self.by_hand:
            return x + self.out(self.inner(q, k, v, scale=0.3, enable_gqa=True).flatten(2))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = self.inner(q, k, v, is_causal=self.is_causal)
        with local_attention():  # of words that every rank holds whole
            out = out + F.scaled_dot_product_attention(q, text, text)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers, one causal, and a loss that is this rank's part of the mean. ``again``: how layers are computed
    again in backward."""

    def __init__(
        self, causal: tuple[bool, ...] = (True, False), again: dict[str, Any] | None = None, by_hand: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(IDS, DIM)
        self.layers = nn.ModuleList(Layer(flag, by_hand) for flag in causal)
        self.text = nn.Parameter(torch.randn(1, HEADS, WORDS, DIM))
        self.again = again
        self.double()

    def forward(self, x: Tensor, y: Tensor, angles: Tensor, whole: int) -> Tensor:
        hidden = self.table(x)
        for layer in self.layers:
            given = hidden, angles, self.text.expand(len(x), -1, -1, -1)
            if self.again is None:
                hidden = layer(*given)
            else:
                hidden = checkpoint(layer, *given, use_reentrant=False, **self.again)
        logits = hidden @ self.table.weight.T
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / whole

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters() if p.grad is not None]


def batch(seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and labels, which share their memory, and rotary angles by position."""
    rows = torch.randint(IDS, (2, seqlen + 1), generator=torch.Generator().manual_seed(seqlen))
    return rows[:, :-1], rows[:, 1:], torch.arange(seqlen).double()[:, None] / torch.arange(1, DIM + 1)


def one_process(model: Model, seqlen: int) -> list[Tensor]:
    x, y, angles = batch(seqlen)
    model(x, y, angles, y.numel()).backward()
    return model.gradients()


def cp_mesh(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))


def summed(model: Model) -> list[Tensor]:
    for gradient in model.gradients():
        dist.all_reduce(gradient)
    return model.gradients()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# -- what is computed ---------------------------------------------------------------------------------


def in_a_region(mesh: DeviceMesh, seqlen: int) -> None:
    """Forward and backward, and buffers that are what they were, memory and all."""
    for again in (None, {}, {"context_fn": keep_attention()}):
        model, (x, y, angles) = Model(again=again), batch(seqlen)
        before = [(b.data_ptr(), b.stride(), b.clone()) for b in (x, y, angles)]
        with context_parallel(mesh, buffers=[x, y, angles], buffer_seq_dims=[1, -1, 0]) as cp:
            assert x.shape == y.shape == (2, cp.local_seqlen) and cp.seqlen == seqlen
            close(angles, before[2][2][cp.position_ids])
            model(x, y, angles, 2 * seqlen).backward()
        for b, (place, stride, values) in zip((x, y, angles), before, strict=True):
            assert b.data_ptr() == place and b.stride() == stride and torch.equal(b, values)
        close(summed(model), one_process(Model(), seqlen))


def behind_a_region(mesh: DeviceMesh, seqlen: int) -> None:
    """A backward of what was not given back is exact; of what was, PyTorch raises, and of a layer computed again."""
    model, (x, y, angles) = Model(), batch(seqlen)
    with context_parallel(
        mesh, buffers=(x, y, angles), buffer_seq_dims=(1, 1, 0), no_restore_buffers={x, y, angles}
    ) as cp:
        loss = model(x, y, angles, 2 * seqlen)
    assert x.shape == (2, cp.local_seqlen)
    loss.backward()
    close(summed(model), one_process(Model(), seqlen))

    x, y, angles = batch(seqlen)
    with context_parallel(mesh, buffers=(x, y, angles), buffer_seq_dims=(1, 1, 0)):
        loss = model(x, y, angles, 2 * seqlen)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    for elsewhere in (contextlib.nullcontext(), region_of(mesh, seqlen, ra.causal())):
        with region_of(mesh, seqlen) as (_, q):
            q.requires_grad_()
            out = checkpoint(lambda q: F.scaled_dot_product_attention(q, q, q).exp(), q, use_reentrant=False)
        with pytest.raises(CheckpointError), elsewhere:
            out.sum().backward()


@contextlib.contextmanager
def region_of(mesh: Any, seqlen: int, mask: ra.Mask | None = None, seed: int | None = None) -> Iterator[Any]:
    """A region and a tensor in it that stays a shard."""
    q = torch.randn(1, 2, seqlen, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sharded: Any = {"buffers": [q], "buffer_seq_dims": [2], "no_restore_buffers": [q]}
    with context_parallel(mesh, **sharded, mask=mask, seed=seed) as cp:
        yield cp, q


def masked(mesh: DeviceMesh, seqlen: int) -> None:
    """Documents, causal by the call or not, in bf16 and in a layout of the caller's."""
    documents = ra.documents((0, seqlen // 3, seqlen))
    for layout, is_causal in (("contiguous", True), ("striped", False)):
        mask = documents & ra.causal() if is_causal else documents
        qkv = [torch.randn(1, 2, seqlen, 4, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
        q, k, v = (x.double().transpose(1, 2) for x in qkv)
        expected, _ = ra.testing.dense_attention(q, k, v, mask.dense(seqlen, seqlen))
        single = F.scaled_dot_product_attention(*qkv, attn_mask=mask.dense(seqlen, seqlen)).transpose(1, 2)
        with context_parallel(mesh, buffers=qkv, buffer_seq_dims=(2, 2, 2), mask=documents, layout=layout) as cp:
            assert cp.q_layout.name == layout and qkv[0].dtype == torch.bfloat16
            out = F.scaled_dot_product_attention(*qkv, is_causal=is_causal)
        (whole,) = context_parallel_unshard(mesh, [out], [2])
        assert (whole.transpose(1, 2) - expected).norm() <= 2 * (single - expected).norm() + 1e-12


def dropped(mesh: DeviceMesh, seqlen: int) -> None:
    """What is dropped follows from the seed and the order of calls, whatever the ranks."""
    seen = []
    for group in (mesh, dist.new_subgroups(1)[0]):
        with region_of(group, seqlen, seed=5) as (cp, q):
            outs = [F.scaled_dot_product_attention(q, q, q, dropout_p=0.5) for _ in range(2)]
        assert not torch.equal(*outs)
        seen.append([cp.unshard(out, 2) for out in outs])
    close(*seen)


def styled(mesh: DeviceMesh, seqlen: int) -> None:
    """Modules of a plan, whose attention is PyTorch's or their own, recomputed or not, without a region."""
    for style, settings in (
        (RingAttention(), {"again": {}}),
        (RingAttention(replaces="bshd"), {"causal": (True, True), "by_hand": True}),
    ):
        model = parallelize_module(Model(**settings), mesh, {"layers.*.inner": style})
        x, y, angles = batch(seqlen)
        shards = context_parallel_shard(mesh, (x, y, angles), (1, 1, 0))
        assert x.size(1) == seqlen
        model(*shards, 2 * seqlen).backward()
        close(summed(model), one_process(Model(**settings), seqlen))


def gradients_by_hand(mesh: DeviceMesh, seqlen: int) -> None:
    """`torch.autograd` finds what it finds outside: leaves and others, hooks, gradients that are given."""
    with region_of(mesh, seqlen) as (_, q):
        q.requires_grad_()
        twice = q * 2
        out = F.scaled_dot_product_attention(twice, twice, twice, is_causal=True)
        given = torch.ones_like(out)
        dq, dtwice = torch.autograd.grad(out, [q, twice], given, retain_graph=True)
        torch.autograd.backward([out], [given], retain_graph=True, inputs=[q, twice])
        close((q.grad, twice.grad), (dq, dtwice))
        close(dq, 2 * dtwice)
        q.grad = None
        out.backward(given)
        close(q.grad, dq)
        with pytest.raises(RuntimeError, match="scalar"):
            F.scaled_dot_product_attention(q, q, q).backward()


def everything(rank: int, world: int, lengths: tuple[int, ...]) -> None:
    mesh = cp_mesh(world)
    for seqlen in lengths:
        in_a_region(mesh, seqlen)
    for part in (behind_a_region, masked, dropped, styled, gradients_by_hand):
        part(mesh, lengths[0])


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2,
                                   *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])  # fmt: skip
def test_what_is_computed_equals_one_process(world: int) -> None:
    run_processes(everything, world, (13, 16))


# -- what moves over ----------------------------------------------------------------------------------

# As one writes it for PyTorch's own: the order of its tutorial and of training loops, whose last block is a step.
WRITTEN_FOR_PYTORCH = """
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import context_parallel_unshard, set_rotate_method
from torch.nn.attention import SDPBackend, sdpa_kernel

with sdpa_kernel(SDPBackend.MATH):
    whole = F.scaled_dot_product_attention(*qkv, is_causal=True)
sharded = [x.detach().clone() for x in qkv]
set_rotate_method("alltoall")
with sdpa_kernel(SDPBackend.MATH):
    with context_parallel(mesh, buffers=tuple(sharded), buffer_seq_dims=(2, 2, 2)):
        part = F.scaled_dot_product_attention(*sharded, is_causal=True)
    (together,) = context_parallel_unshard(mesh, [part], [2])

with contextlib.ExitStack() as stack:
    stack.enter_context(context_parallel(
        mesh, buffers=[x, y, angles], buffer_seq_dims=[1, 1, 0], no_restore_buffers={x, y}
    ))
    loss = model(x, y, angles, count)
    loss.backward()
"""


def moved(rank: int, world: int) -> None:
    mesh, (x, y, angles), model = cp_mesh(world), batch(16), Model()
    qkv = [torch.randn(2, 3, 16, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for private in ("._attention", ""):
        theirs = f"torch.distributed.tensor.experimental{private}"
        code = (code if not private else WRITTEN_FOR_PYTORCH).replace(theirs, "ringattn.integrations.torch")  # noqa: F821
    names = {"contextlib": contextlib, "F": F, "mesh": mesh, "qkv": qkv, "count": y.numel()}
    names |= {"x": x, "y": y, "angles": angles, "model": model}
    exec(code, names)
    close(names["together"], names["whole"].detach())
    close(summed(model), one_process(Model(), 16))


def test_a_change_of_imports_is_enough() -> None:
    run_processes(moved, 2)


def as_written(rank: int, world: int, code: str) -> None:
    (tokens, labels, angles), model = batch(13), Model()
    exec(code, {"mesh": {"cp": cp_mesh(world)}, "tokens": tokens, "labels": labels, "angles": angles, "model": model})
    close(summed(model), one_process(Model(), 13))


def test_the_block_of_the_migration_page_equals_one_process() -> None:
    (code,) = blocks("docs/migration.md")["With PyTorch's own calls"]
    run_processes(as_written, 2, code)


def test_rotation_is_told_and_not_set() -> None:
    with pytest.warns(UserWarning, match="schedule='ring'"):
        assert set_rotate_method("alltoall") == "ring"
    with pytest.warns(UserWarning):
        assert set_rotate_method("allgather") == "gather"
    with pytest.raises(ValueError, match="choose from allgather, alltoall"):
        set_rotate_method("all2all")


# -- a compiler ---------------------------------------------------------------------------------------


def compiled(rank: int, world: int) -> None:
    mesh, graphs = cp_mesh(world), []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    model = Model((True,))
    step = torch.compile(model, backend=backend, fullgraph=True)
    for seqlen, known in ((12, 1), (13, 2), (12, 2)):
        model.zero_grad()
        x, y, angles = batch(seqlen)
        with context_parallel(mesh, buffers=[x, y, angles], buffer_seq_dims=[1, 1, 0]):
            step(x, y, angles, 2 * seqlen).backward()
        close(summed(model), one_process(Model((True,)), seqlen))
        assert len(graphs) <= known  # a graph for each local length
    attend = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend=backend, fullgraph=True)
    for bounds in ((0, 5, 12), (0, 7, 12)):
        q = torch.randn(1, 1, 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = F.scaled_dot_product_attention(q, q, q, attn_mask=ra.documents(bounds).dense(12, 12))
        with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2], mask=ra.documents(bounds)) as cp:
            out = attend(q)
        close(cp.unshard(out, 2), expected)
    again = torch.compile(Model((True,), again={}), backend=backend)  # a graph breaks at what is computed again
    x, y, angles = batch(13)
    with context_parallel(mesh, buffers=[x, y, angles], buffer_seq_dims=[1, 1, 0]):
        again(x, y, angles, 26).backward()
    close(summed(again._orig_mod), one_process(Model((True,)), 13))


@pytest.mark.slow
def test_a_compiled_model_equals_one_process() -> None:
    run_processes(compiled, 2, timeout=110)


# -- what is refused ----------------------------------------------------------------------------------

S = 11


def regions() -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    """Arguments of regions that are refused, and with what words."""
    x, y = torch.zeros(1, S), torch.zeros(1, S + 1)
    frozen = torch.inference_mode()(torch.zeros)(1, S)
    return {
        "nothing": ("buffers is empty", lambda: {}),
        "dims": ("1 buffers and 2 seq_dims", lambda: {"buffers": [x], "buffer_seq_dims": [1, 1]}),
        "a dim": ("dim=2", lambda: {"buffers": [x], "buffer_seq_dims": [2]}),
        "lengths": (r"lengths \[11, 12\]", lambda: {"buffers": [x, y], "buffer_seq_dims": [1, 1]}),
        "a parameter": ("requires grad", lambda: {"buffers": [nn.Parameter(x)], "buffer_seq_dims": [1]}),
        "inference": ("inference mode", lambda: {"buffers": [frozen], "buffer_seq_dims": [1]}),
        "twice": ("listed twice", lambda: {"buffers": [x, x], "buffer_seq_dims": [1, 1]}),
        "no tensor": ("must be a tensor", lambda: {"buffers": [3], "buffer_seq_dims": [0]}),
        "not listed": (
            "not one of the buffers",
            lambda: {"buffers": [x], "buffer_seq_dims": [1], "no_restore_buffers": {y}},
        ),
        "documents": ("11", lambda: {"buffers": [x], "buffer_seq_dims": [1], "mask": ra.documents((0, 4))}),
        "a mask": ("give one mask", lambda: {"buffers": [x], "buffer_seq_dims": [1], "mask": "causal"}),
        "a setting": ("cannot change heads", lambda: {"buffers": [x], "buffer_seq_dims": [1], "heads": 3}),
        "a seed": ("seed=-1", lambda: {"buffers": [x], "buffer_seq_dims": [1], "seed": -1}),
    }  # fmt: skip


def reentrant(q: Tensor) -> Tensor:
    return checkpoint(lambda q: F.scaled_dot_product_attention(q, q, q), q.requires_grad_(), use_reentrant=True)


def recomputed_dropout(q: Tensor) -> None:
    drop = lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).exp()  # noqa: E731
    checkpoint(drop, q.requires_grad_(), use_reentrant=False).sum().backward()


CALLS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "a mask": ("attn_mask of shape", lambda q: F.scaled_dot_product_attention(q, q, q, torch.ones(3, 3).bool())),
    "no seed": ("pass context_parallel", lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)),
    "dropout again": ("not counted there", recomputed_dropout),
    "unequal": (
        "is_causal=True with",
        lambda q: F.scaled_dot_product_attention(q, q[:, :, 1:], q[:, :, 1:], is_causal=True),
    ),
    "other keys": ("local_attention", lambda q: F.scaled_dot_product_attention(q, *[torch.ones(1, 2, 40, 4)] * 2)),
    "whole": ("was not sharded", lambda q: F.scaled_dot_product_attention(*[torch.ones(1, 2, S, 4)] * 3)),
    "gqa": ("enable_gqa=True", lambda q: F.scaled_dot_product_attention(q, q[:, :1], q[:, :1])),
    "three dims": ("must be .batch, heads", lambda q: F.scaled_dot_product_attention(q[0], q[0], q[0])),
    "multi-head": ("multi_head_attention_forward", lambda q: nn.MultiheadAttention(4, 1)(q[0], q[0], q[0])),
    "aten": ("scaled_dot_product_attention inside", lambda q: torch.ops.aten.scaled_dot_product_attention(q, q, q)),
    "reentrant": ("use_reentrant=False", reentrant),
}  # fmt: skip


def refused(rank: int, world: int) -> None:
    mesh = cp_mesh(world)
    for words, given in regions().values():
        with pytest.raises(ValueError, match=words), context_parallel(mesh, **given()):
            raise AssertionError("it began")
    for name, (words, call) in CALLS.items():
        q = torch.randn(1, 2, S, 4)
        before, seed = q.clone(), 3 if name == "dropout again" else None
        with pytest.raises((ValueError, NotImplementedError), match=words):
            with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2], seed=seed):
                call(q)
        assert torch.equal(q, before), name  # given back although it raised
    balancer: Any = object()
    with pytest.raises(NotImplementedError, match="layout='zigzag'"):
        context_parallel_shard(mesh, [torch.zeros(S)], [0], balancer)
    with pytest.raises(ValueError, match="must be a 1-D DeviceMesh"):
        context_parallel_unshard("cp", [], [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no sequence has been sharded"):
        context_parallel_unshard(dist.new_group(), [torch.zeros(S)], [0])


def heard(rank: int, world: int) -> None:
    """What rank 1 alone does wrong, where a region begins and in it."""
    mesh = cp_mesh(world)

    def attend(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    for wrong in range(3):
        q, start = torch.ones(1, 2, S, 4), time.monotonic()
        dims = [2, 2] if rank == 1 and wrong == 0 else [2]
        kept: Any = q if rank == 1 and wrong == 2 else []  # a tensor, where a list is wanted
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            with context_parallel(mesh, buffers=[q], buffer_seq_dims=dims, no_restore_buffers=kept):
                attend(q[0] if rank == 1 and wrong == 1 else q)
        assert ("rank 1 refused" in str(caught.value)) == (rank != 1), caught.value
        assert q.shape == (1, 2, S, 4) and time.monotonic() - start < 5
        with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):  # and all go on
            attend(q)


def left_by_one(rank: int, world: int) -> None:
    """Rank 1 raises an error of its own before a call that the other makes: none of its later regions answers that."""
    mesh = cp_mesh(world)
    for batch in range(2):
        q = torch.full((1, 2, S, 4), float(batch))
        with pytest.raises((KeyError, PeerError)) as caught:
            with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
                if rank == 1:
                    raise KeyError("own")
                F.scaled_dot_product_attention(q, q, q)
        assert isinstance(caught.value, KeyError) or "KeyError: 'own'" in str(caught.value), caught.value
        q = torch.full((1, 2, S, 4), 7.0)
        with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
            found = F.scaled_dot_product_attention(q, q, q)
        torch.testing.assert_close(found, torch.full_like(found, 7.0))


def lagging(rank: int, world: int) -> None:
    """Rank 1 leaves a region in which the other calls nothing, which so hears of it one region late: from then on they
    are in different ones, and no call may meet another's. Last, as that is for good."""
    mesh = cp_mesh(world)
    for batch in range(3):
        q = torch.full((1, 2, S, 4), float(batch))
        with pytest.raises((KeyError, PeerError, CallMismatch)) if batch or rank == 1 else contextlib.nullcontext():
            with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
                if not batch and rank == 1:
                    raise KeyError("own")
                if batch:
                    F.scaled_dot_product_attention(q, q, q)


def refusals(rank: int, world: int) -> None:
    refused(rank, world)
    heard(rank, world)
    left_by_one(rank, world)
    lagging(rank, world)


def test_what_cannot_be_kept_is_refused_by_all_ranks() -> None:
    run_processes(refusals, 2)

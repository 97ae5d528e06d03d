"""The loss in chunks: what a chunk changes (memory) and what not (values, precision), and heads that FSDP shards."""

import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ringattn as ra
from ringattn.loss import linear_token_mean, sum_over
from ringattn.testing import run_processes
from tests.support.loss_model import VOCABULARY, WIDTH, S, assert_same, make_model, one_process, samples, whole_logits


@pytest.mark.parametrize("chunks", [1, 3, 8, 200])
def test_chunks_change_nothing(chunks):
    tokens, labels = samples(3)
    model = make_model()
    share = linear_token_mean(model.hidden(tokens), model.head, labels, chunks=chunks)
    share.backward()
    found = share.detach(), {name: p.grad for name, p in model.named_parameters()}
    assert_same(found, one_process(make_model(), tokens, labels))


def test_evaluation_needs_no_gradients():
    tokens, labels = samples(2)
    model = make_model()
    with torch.no_grad():
        share = linear_token_mean(model.hidden(tokens), model.head, labels)
    assert not share.requires_grad
    torch.testing.assert_close(share, one_process(make_model(), tokens, labels)[0], rtol=1e-12, atol=0)


def test_a_frozen_head():
    labels = samples(2)[1]
    hidden, frozen = torch.randn(2, S, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH)
    linear_token_mean(hidden, lambda rows: F.linear(rows, frozen), labels).backward()
    again = hidden.detach().clone().requires_grad_()
    F.cross_entropy(F.linear(again, frozen).flatten(0, 1), labels.flatten()).backward()
    torch.testing.assert_close(hidden.grad, again.grad)


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_as_good_chunked_as_whole(autocast):
    """bf16 by autocast, or of the parameters themselves: errors against fp64, chunked at most twice those of whole."""
    right = make_model()
    tokens, labels = samples(6)
    loss, gradients = one_process(right, tokens, labels)

    def errors(mean):
        model = make_model().to(torch.float32 if autocast else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            share = mean(model.hidden(tokens), model.head, labels)
        assert share.dtype == torch.float32
        share.backward()
        off = {name: (p.grad.double() - gradients[name]).norm() for name, p in model.named_parameters()}
        return off | {"loss": (share.detach().double() - loss).abs()}

    chunked, whole = errors(linear_token_mean), errors(whole_logits)
    for name, error in chunked.items():
        scale = loss if name == "loss" else gradients[name].norm()
        assert error <= 2 * whole[name] + 1e-7 * scale, f"{name}: {error} chunked, {whole[name]} whole"


class Live(TorchDispatchMode):
    """The most bytes that were alive at once, of all that operators made."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, size):
        self.now -= size


@pytest.mark.parametrize("grad", [True, False])
def test_the_logits_of_the_shard_never_exist(grad):
    vocabulary, tokens, chunks = 1000, 960, 24
    logits = 4 * vocabulary * tokens  # bytes

    def peak(mean, **how):
        hidden, weight = torch.randn(2, tokens // 2, WIDTH), torch.randn(vocabulary, WIDTH, requires_grad=grad)
        labels = torch.randint(0, vocabulary, (2, tokens // 2))
        with Live() as live:
            share = mean(hidden, lambda rows: F.linear(rows, weight), labels, **how)
            forward = live.peak
            if grad:
                share.backward()
        return forward, live.peak

    assert peak(whole_logits)[0] >= 2 * logits
    # three of a chunk's, and less than one more for gradients of the weight: far from all of them even once
    assert max(peak(linear_token_mean, chunks=chunks)) < 4 * logits / chunks


class Sharded(nn.Module):
    """Computes its loss in its forward, where FSDP has gathered its parameters."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens, labels, **how):
        return linear_token_mean(self.norm(self.embed(tokens)), self.head, labels, chunks=3, **how)


def train_sharded(rank, world, wrapped):
    torch.manual_seed(2)
    model = Sharded().double()
    units = {"root": [], "head": [model.head], "norm and head": [[model.norm, model.head]]}[wrapped] + [model]
    for unit in units:
        fully_shard(unit)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
    # Shards of 3 and 58 tokens: in chunks of some number of tokens the ranks would gather unequally often.
    layout = ra.Layout.from_spans([[(0, 3)], *[[(3 + r, 58 // (world - 1), world - 1)] for r in range(world - 1)]])
    cp = ra.ContextParallel(dist.group.WORLD, S, layout=layout)
    tokens, labels = map(cp.shard, samples(2))
    share = model(tokens, labels, group=dist.group.WORLD)
    share.backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return sum_over(share, dist.group.WORLD), gradients


@pytest.mark.parametrize("wrapped", ["root", "head", "norm and head"])
@pytest.mark.parametrize("world", [2, 3])
def test_heads_sharded_by_fsdp(wrapped, world):
    torch.manual_seed(2)
    model = Sharded().double()
    share = model(*samples(2))
    share.backward()
    expected = share.detach(), {name: p.grad for name, p in model.named_parameters()}
    for found in run_processes(train_sharded, world, wrapped):
        assert_same(found, expected)

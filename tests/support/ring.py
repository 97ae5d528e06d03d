"""The ring on rank-threads beside dense attention on the same tensors: what the two must agree in."""

import functools

import torch

import ringattn as ra
from ringattn.testing import Results, dense_results, results
from tests.support import cases

S = cases.SEQLEN


def tensors(q_len=S, kv_len=S, batch=2, heads=4, kv_heads=2, dim=8, v_dim=8, dtype=torch.float64):
    """q, k, v and the gradients of out and lse, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((q_len, heads, dim), (kv_len, kv_heads, dim), (kv_len, kv_heads, v_dim), (q_len, heads, v_dim))
    q, k, v, dout = (torch.randn(batch, *s, dtype=dtype, generator=generator) for s in shapes)
    return q, k, v, dout, torch.randn(batch, heads, q_len, dtype=dtype, generator=generator)


@functools.cache
def single_process(mask, **sizes):
    """What one process gives for these tensors, by dense attention."""
    q, k, v, dout, dlse = tensors(**sizes)
    return dense_results(q, k, v, mask.dense(q.shape[1], k.shape[1]), dout, dlse)


def on_ranks(world, mask, call=None, sizes=None, **settings):
    """What each rank of a world finds: out and lse, put together, and its gradients of the whole inputs."""
    q, k, v, dout, dlse = tensors(**(sizes or {}))

    def one_rank(transport):
        cp = ra.ContextParallel(transport, q.shape[1], mask=mask, **settings)
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        local = [cp.shard(inputs[0]), cp.shard_kv(inputs[1]), cp.shard_kv(inputs[2])]
        out, lse = ra.attention(*local, cp=cp, return_lse=True, **(call or {}))
        return results(cp.unshard(out), cp.unshard(lse, dim=2), dout, dlse, inputs)

    return ra.Loopback(world, timeout=20).run(one_rank)


def check(ranks, expected, tolerance=1e-11):
    """Asserts that every rank has found what was expected."""
    for rank, found in enumerate(ranks):
        for name, a, b in zip(Results._fields, found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"rank {rank} {name}: {m}")  # noqa: B023

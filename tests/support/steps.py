"""One training step on one rank, told in words: right, or what was raised instead; and transports to take it on."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import ringattn as ra
from ringattn.comm import ProcessGroupTransport, Transport, transport_over
from ringattn.testing import dense_attention
from tests.support import cases

S = cases.SEQLEN
DEADLINE = 20.0
AT_ONCE = 2.0  # seconds, on a machine that does other things too


def gloo() -> Transport:
    return ProcessGroupTransport(dist.group.WORLD, DEADLINE)


def shared_memory() -> Transport:
    return transport_over(dist.group.WORLD, DEADLINE)


def inputs_of(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)  # threads share the default one
    return [torch.randn(1, S, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2, 4)]


def train(cp: ra.ContextParallel, number: int) -> list[torch.Tensor]:
    """Output and gradients of step ``number``, this rank's shards."""
    q, k, v, dout = map(cp.shard, inputs_of(number))
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = ra.attention(*leaves, cp=cp)
    out.backward(dout)
    return [out.detach(), *(t.grad for t in leaves)]


def expected(cp: ra.ContextParallel, number: int) -> list[torch.Tensor]:
    q, k, v, dout = inputs_of(number)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, _ = dense_attention(*leaves, cp.masks[0].dense(S, S))
    out.backward(dout)
    rows = cp.position_ids
    return [t[:, rows] for t in (out.detach(), *(t.grad for t in leaves))]


def step(cp: ra.ContextParallel, number: int) -> str:
    """ "right", the error that was raised, or an assertion that a number is wrong."""
    try:
        found = train(cp, number)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for a, b in zip(found, expected(cp, number), strict=True):
        torch.testing.assert_close(a, b)
    return "right"


OPTIONS = ra.Options(timeout=DEADLINE)


def context(**settings: Any) -> ra.ContextParallel:
    return ra.ContextParallel(dist.group.WORLD, S, **{"layout": "zigzag", "options": OPTIONS, **settings})


def attempt(way: Callable[[], Any]) -> tuple[str, float]:
    """What came of it, and the seconds it took."""
    start = time.monotonic()
    try:
        way()
        text = "nothing"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return text, time.monotonic() - start

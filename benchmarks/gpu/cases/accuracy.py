"""Errors of a ring's results and gradients in bf16 against fp64, over those of one call of the same kernel: eight ranks
as threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

import ringattn
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import Bar, Figure, Row, digits, judged
from ringattn.comm import Transport
from ringattn.kernels import KERNELS
from ringattn.testing import dense_results

OWN = "triton"  # a kernel that carries fp32 results from tile to tile
NAMES = ("out", "dq", "dk", "dv")


def measure(bench: Bench) -> Iterator[Figure]:
    sizes = bench.sizes
    inputs = bench.tensors(sizes.exact, sizes.exact_heads)
    truth = cache(partial(_truth, bench, inputs))
    names = [sizes.kernel, *(kernel.name for kernel in KERNELS if kernel.name == OWN and OWN not in sizes.left_out)]
    for kernel in names:
        for schedule in ("ring", "exchange"):
            what = {"tokens": sizes.exact, "ranks": sizes.world, "kernel": kernel, "schedule": schedule}
            yield what, partial(_figure, bench, inputs, truth, kernel=kernel, schedule=schedule)


def _truth(bench: Bench, inputs: list[Tensor]) -> list[Tensor]:
    """Out, dq, dk and dv in fp64."""
    q, k, v, dout = (x.double() for x in inputs)
    mask = ringattn.causal().dense(q.size(1), k.size(1)).to(q.device)
    found = dense_results(q, k, v, mask, dout, torch.zeros(1, q.size(2), q.size(1), device=q.device, dtype=q.dtype))
    return [found.out, found.dq, found.dk, found.dv]


def _figure(bench: Bench, inputs: list[Tensor], truth: Callable[[], list[Tensor]], **settings: str) -> Row:
    exact = truth()
    alone, ring = (_errors(_results(bench, world, inputs, settings), exact) for world in (1, bench.sizes.world))
    ratios = {name: digits(a / b) for name, a, b in zip(NAMES, ring, alone, strict=True)}
    figure = {
        "worst": max(ratios.values()),
        "ratios": ratios,
        "errors_of_one_call": {name: digits(error) for name, error in zip(NAMES, alone, strict=True)},
    }
    return judged(figure, Bar(1.0 if settings["kernel"] == OWN else 1.25, "worst", at_most=True))


def _results(bench: Bench, world: int, inputs: list[Tensor], settings: dict[str, str]) -> list[Tensor]:
    """Out, dq, dk and dv of the whole sequence."""

    def one_rank(transport: Transport) -> list[Tensor]:
        cp = bench.context(transport, bench.sizes.exact, layout="zigzag", **settings)
        *leaves, dout = (cp.shard(x).contiguous() for x in inputs)
        for leaf in leaves:
            leaf.requires_grad_()
        out = ringattn.attention(*leaves, cp=cp)
        grads = torch.autograd.grad(out, leaves, dout)
        return [cp.unshard(x) for x in (out.detach(), *grads)]

    return ringattn.Loopback(world).run(one_rank)[0]


def _errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Root mean squares."""
    return [float((a.double() - b).square().mean().sqrt()) for a, b in zip(found, exact, strict=True)]

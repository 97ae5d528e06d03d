"""The largest memory of a call of one rank of a ring, forward and backward, over what must be held: inputs, results,
accumulators, the program's buffers, and what one bare call of its largest tile takes for itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

import ringattn
from benchmarks.gpu.bench import Bench, graph_settings
from benchmarks.gpu.figures import Bar, Figure, Row, digits, judged
from ringattn.planning.program import Buffer, Program
from ringattn.runtime.wire import Kind
from ringattn.testing import InstantRank

BAR = Bar(1.05, "peak_over_held", at_most=True)


def measure(bench: Bench) -> Iterator[Figure]:
    for schedule in ("ring", "exchange", "gather"):
        yield {"tokens": bench.sizes.shards[0], "schedule": schedule}, partial(_figure, bench, schedule)


def _figure(bench: Bench, schedule: str) -> Row:
    sizes = bench.sizes
    rank = InstantRank(sizes.world // 2, sizes.world)
    options = graph_settings()["off"]
    cp = bench.context(rank, sizes.shards[0] * sizes.world, layout="zigzag", schedule=schedule, options=options)
    parts = {**held(bench, cp), "bare_call": bare_call(bench, cp.program(cp.masks[0]))}
    total = sum(parts.values())
    if not bench.on_gpu:
        return {"held_bytes": total, **parts}
    peak = peak_of(partial(call, bench, cp)) + sum(buffer.nbytes for buffer in cp.link.workspace.buffers())
    return judged({"peak_bytes": peak, "held_bytes": total, "peak_over_held": digits(peak / total), **parts}, BAR)


def call(bench: Bench, cp: ringattn.ContextParallel) -> None:
    *leaves, dout = bench.tensors(cp.local_seqlen)
    for leaf in leaves:
        leaf.requires_grad_()
    torch.autograd.grad(ringattn.attention(*leaves, cp=cp), leaves, dout)


def held(bench: Bench, cp: ringattn.ContextParallel) -> dict[str, int]:
    """Bytes in backward, which holds more than forward: q, k, v, dout, out and lse; dq, dk and dv in the inputs' dtype
    and wide; the buffers, of which those of one slot share their memory."""
    sizes, tokens = bench.sizes, cp.local_seqlen
    kind = Kind(1, sizes.heads, sizes.kv_heads, sizes.dim, sizes.dim, sizes.dtype, torch.device(sizes.device))
    queries, keys = (tokens * heads * sizes.dim for heads in (sizes.heads, sizes.kv_heads))
    grads = queries + 2 * keys
    slots: dict[tuple[str, torch.dtype], int] = {}
    for buffer in cp.program(cp.masks[0]).buffers:
        key = buffer.slot, kind.dtype_of(buffer.row)
        slots[key] = max(slots.get(key, 0), bytes_of(buffer, kind))
    return {
        "inputs": (2 * queries + 2 * keys) * sizes.dtype.itemsize,
        "results": (queries + grads) * sizes.dtype.itemsize + tokens * sizes.heads * kind.wide.itemsize,
        "accumulators": grads * kind.wide.itemsize,
        "buffers": sum(slots.values()),
    }


def bytes_of(buffer: Buffer, kind: Kind) -> int:
    return math.prod(kind.shape(buffer)) * kind.dtype_of(buffer.row).itemsize


def bare_call(bench: Bench, program: Program) -> int:
    """What the bare backward call of the largest tile allocates, its gradients among it."""
    if not bench.on_gpu:
        return 0
    tile = max(bench.tiles(program.backward), key=lambda tile: tile.batch * (tile.nq * tile.heads + tile.nk))
    both = bench.bare_passes((), (tile,)).both
    both()
    return peak_of(both)


def peak_of(run: Callable[[], object]) -> int:
    """Bytes above what is held before, the second time: what is prepared once, and buffers, are there by then."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

"""The ring beside its ideal: two processes, one thread each, fp32, forward + backward.

``causal``: the ideal is the same rank's work as raw operator calls without communication or merges, on
tensors that lie in memory as the operator likes them: one causal call and one rectangle, or either split
into smaller calls, whichever is fastest here. ringattn is given tensors that lie the same way, and, for
comparison, token-major ones. ``exposed_wait``: the part of the seconds inside of its calls in which a rank waits, of
the rank where it is larger, by calls of their own in the same rounds, which are profiled.
``local+global``: useful GFLOP/s by exact area against one causal operator call on 8,192 tokens.

    python -m benchmarks.ring
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

import ringattn
from benchmarks.common import interleaved, medians, on_processes, ratio, write

HEADS, DIM = 4, 64
FLOP = 3.5 * 4 * HEADS * DIM  # of one attending pair, forward + backward
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tensors(*lengths: int, heads: int = HEADS) -> list[Tensor]:
    return [torch.randn(1, heads, n, DIM) for n in lengths]


def operator_call(nq: int, nk: int, causal: bool, heads: int = HEADS) -> Callable[[], object]:
    """One forward and one backward call of PyTorch's CPU operator."""
    q, k, v, dout = tensors(nq, nk, nk, nq, heads=heads)

    def run() -> None:
        out, lse = flash(q, k, v, 0.0, causal)
        flash_backward(dout, q, k, v, out, lse, 0.0, causal)

    return run


def split_causal(n: int, least: int = 256, heads: int = HEADS) -> list[Callable[[], object]]:
    """A causal square as rectangles and small squares, halved down to ``least`` tokens."""
    if n <= least:
        return [operator_call(n, n, True, heads)]
    half = n // 2
    first, last = (split_causal(part, least, heads) for part in (half, n - half))
    return [*first, operator_call(n - half, half, False, heads), *last]


def split_rectangle(nq: int, nk: int, most: int = 2048) -> list[Callable[[], object]]:
    """A rectangle as calls of at most ``most`` rows and columns, whose keys stay in a core's cache."""
    sizes = [[min(most, n - a) for a in range(0, n, most)] for n in (nq, nk)]
    return [operator_call(rows, cols, False) for rows in sizes[0] for cols in sizes[1]]


def together(calls: list[Callable[[], object]]) -> Callable[[], object]:
    return lambda: [call() for call in calls]


def ring_call(
    seqlen: int, mask: ringattn.Mask, head_major: bool = False, group: Any = None, **settings: Any
) -> tuple[Callable[[], object], Any]:
    """One call with its backward; ``head_major``: q, k, v and dout lie in memory as the raw operator's do."""
    settings = {"shape": ringattn.Shape(HEADS, HEADS, DIM, dtype="float32"), **settings}
    cp = ringattn.ContextParallel(group or dist.group.WORLD, seqlen, mask=mask, **settings)
    q, k, v, dout = (t.transpose(1, 2) for t in tensors(*[cp.local_seqlen] * 4))
    if not head_major:
        q, k, v, dout = (t.contiguous() for t in (q, k, v, dout))
    for t in (q, k, v):
        t.requires_grad_()

    def run() -> None:
        q.grad = k.grad = v.grad = None
        ringattn.attention(q, k, v, cp=cp).backward(dout)

    return run, cp


class Profiled:
    """A case whose calls are profiled."""

    def __init__(self, call: Callable[[], object], cp: ringattn.ContextParallel) -> None:
        self.call, self.cp, self.parts = call, cp, list[float]()

    def __call__(self) -> None:
        with self.cp.profile() as profile:
            self.call()
        self.parts.append(profile.exposed)

    def exposed(self) -> float:
        """The median over the rounds but the first, each of the rank that waited for the larger part of its calls."""
        parts = torch.tensor(self.parts[1:])
        dist.all_reduce(parts, dist.ReduceOp.MAX)
        return statistics.median(parts.tolist())


def causal(rank: int, seqlen: int, rounds: int) -> dict[str, Any]:
    half = seqlen // 2
    nq, nk = (half // 2, half) if rank == 0 else (half, half // 2)
    ours, cp = ring_call(seqlen, ringattn.causal(), head_major=True)
    profiled = Profiled(ours, cp)
    cases = {
        "ringattn": ours,
        "ringattn, inputs token-major": ring_call(seqlen, ringattn.causal())[0],
        "ringattn, profiled": profiled,
        "ideal: causal + rectangle": together([operator_call(half, half, True), operator_call(nq, nk, False)]),
        "ideal: diagonal split to 256 + rectangle": together([*split_causal(half), operator_call(nq, nk, False)]),
        "ideal: all split to 2,048": together([*split_causal(half, 2048), *split_rectangle(nq, nk)]),
    }
    seconds = interleaved(cases, rounds)
    middle = medians(seconds)
    ideal = min((name for name in cases if name.startswith("ideal")), key=lambda name: middle[name])
    return {
        "seqlen": seqlen,
        "layout": cp.q_layout.name,
        "schedule": cp.schedule,
        "rounds": rounds,
        "seconds": middle,
        "fastest": ideal,
        "of_ideal": ratio(seconds, ideal, "ringattn"),
        "of_ideal_token_major": ratio(seconds, ideal, "ringattn, inputs token-major"),
        "exposed_wait": profiled.exposed(),
    }


def local_global(rank: int, seqlen: int, rounds: int) -> dict[str, Any]:
    mask = ringattn.longformer(1023, 64)
    ours, cp = ring_call(seqlen, mask, schedule="exchange")
    seconds = interleaved({"ringattn": ours, "causal 8192": operator_call(8192, 8192, True)}, rounds)
    middle, area = medians(seconds), 8192 * 8193 / 2
    useful = cp.plan.work.max() * FLOP / middle["ringattn"] / 1e9
    peak = area * FLOP / middle["causal 8192"] / 1e9
    least = int(cp.plan.received[rank]) * 2 * HEADS * DIM * 4
    received = cp.traffic()["received"].get("forward kv", 0) // (rounds + 1)
    both = torch.tensor([received, least])
    dist.all_reduce(both)
    return {
        "seqlen": seqlen,
        "layout": cp.q_layout.name,
        "rounds": rounds,
        "seconds": middle,
        "useful_gflops": useful,
        "causal_8192_gflops": peak,
        "of_causal_8192": cp.plan.work.max() / area * ratio(seconds, "causal 8192", "ringattn"),
        "received_bytes_forward_all_ranks": int(both[0]),
        "least_bytes_forward_all_ranks": int(both[1]),
    }


def main(rounds: int = 9, json: str = "ring-cpu") -> None:
    """Measure, print and write JSON."""
    result: dict[str, Any] = {"causal": [], "local_global": None}
    for seqlen, times in ((16384, 1), (4096, 5), (512, 40)):
        case = on_processes(causal, 2, seqlen, times * rounds)
        result["causal"].append(case)
        print(
            f"causal {seqlen:>6}: {case['of_ideal']:.3f} of ideal, {case['of_ideal_token_major']:.3f} with token-major "
            f"inputs  ({case['layout']}, {case['schedule']}); exposed wait {100 * case['exposed_wait']:.2f} %"
        )
        for name, seconds in case["seconds"].items():
            print(f"    {name:42} {1000 * seconds:9.1f} ms")
    case = result["local_global"] = on_processes(local_global, 2, 131072, rounds)
    print(
        f"local+global 131072: {case['useful_gflops']:.1f} useful GFLOP/s a rank, "
        f"{case['of_causal_8192']:.3f} of one causal call on 8,192 ({case['causal_8192_gflops']:.1f}); "
        f"received {case['received_bytes_forward_all_ranks']:,} bytes, least {case['least_bytes_forward_all_ranks']:,}"
    )
    write(json, result)


if __name__ == "__main__":
    typer.run(main)

"""What one GPU can tell: kernels beside PyTorch's own calls, and one rank's whole schedule beside its kernel.

The virtual ring runs the complete program of one rank of a larger world, every tile, merge and
accumulation, with transfers that take no time: what is left of the kernel's rate is what the ring itself
costs. Random data, medians, bf16, 32 heads over 8, head_dim 128.

    python -m benchmarks.gpu
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ringattn
from benchmarks.common import write
from ringattn.comm import Solo
from ringattn.comm.agreement import AGREED

HEADS, KV_HEADS, DIM = 32, 8, 128
FORWARD, BOTH = 4 * HEADS * DIM, 14 * HEADS * DIM  # FLOP of one attending pair


class Instant(Solo):
    """One rank of a world that agrees to everything and whose transfers take no time: what is received is the random
    data put there first."""

    blind = frozenset({"cuda"})

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self._seen: set[int] = set()

    def post(self, sends: Any, recvs: Any, what: str) -> Any:
        for tensor, _ in recvs:
            if tensor.data_ptr() not in self._seen:
                self._seen.add(tensor.data_ptr())
                tensor.normal_()
        return super().post((), (), what)

    def await_key(self, key: str, timeout: float) -> bool:
        return True

    def lookup(self, key: str) -> str:
        return AGREED


def milliseconds(case: Callable[[], object], budget: float = 1.5) -> float:
    """Median over as many runs as fit the budget (seconds), after two warm-up runs."""
    for _ in range(2):
        case()
    torch.cuda.synchronize()
    times: list[float] = []
    deadline = time.monotonic() + budget
    while len(times) < 5 or (time.monotonic() < deadline and len(times) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        case()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tensors(seqlen: int) -> list[Tensor]:
    shapes = ((seqlen, HEADS), (seqlen, KV_HEADS), (seqlen, KV_HEADS), (seqlen, HEADS))
    return [torch.randn(1, n, h, DIM, device="cuda", dtype=torch.bfloat16) for n, h in shapes]


def ringattn_case(cp: ringattn.ContextParallel, backward: bool) -> Callable[[], object]:
    q, k, v, dout = tensors(cp.local_seqlen)
    inputs = [t.requires_grad_(backward) for t in (q, k, v)]

    def run() -> None:
        out = ringattn.attention(*inputs, cp=cp)
        if backward:
            out.backward(dout)  # type: ignore[union-attr]
            for t in inputs:
                t.grad = None

    return run


def torch_case(seqlen: int, causal: bool, backend: SDPBackend, backward: bool) -> Callable[[], object]:
    q, k, v, dout = (t.transpose(1, 2) for t in tensors(seqlen))
    inputs = [t.requires_grad_(backward) for t in (q, k, v)]

    def run() -> None:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*inputs, is_causal=causal, enable_gqa=True)
        if backward:
            out.backward(dout)
            for t in inputs:
                t.grad = None

    return run


def tera(pairs: int, flop: int, ms: float) -> float:
    return round(pairs * flop / ms / 1e9, 1)


def kernels() -> list[dict[str, Any]]:
    rows = []
    masks = {"full": ringattn.full(), "causal": ringattn.causal(), "window 1024": ringattn.sliding_window(1023)}
    for seqlen in (4096, 8192, 16384, 32768):
        for name, mask in masks.items():
            pairs = mask.area(seqlen, seqlen)
            cp = ringattn.ContextParallel(None, seqlen, mask=mask)
            row: dict[str, Any] = {"seqlen": seqlen, "mask": name}
            for key, flop, backward in (("forward", FORWARD, False), ("both", BOTH, True)):
                row[f"ringattn_{key}"] = tera(pairs, flop, milliseconds(ringattn_case(cp, backward), 0.5))
                if name.startswith("window"):
                    continue
                for label, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
                    case = torch_case(seqlen, name == "causal", backend, backward)
                    row[f"torch_{label}_{key}"] = tera(pairs, flop, milliseconds(case, 0.5))
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def virtual_ring(causal_rates: dict[int, tuple[float, float]]) -> list[dict[str, Any]]:
    rows = []
    world = 8
    for shard in (4096, 8192, 16384):
        for schedule in ("ring", "exchange", "gather"):
            for rank in (0, world - 1):
                cp = ringattn.ContextParallel(Instant(rank, world), shard * world, layout="zigzag", schedule=schedule)
                pairs = int(cp.plan.work[rank])
                forward = tera(pairs, FORWARD, milliseconds(ringattn_case(cp, False)))
                both = tera(pairs, BOTH, milliseconds(ringattn_case(cp, True)))
                best = causal_rates.get(2 * shard, (float("nan"),) * 2)
                row = {
                    "shard": shard, "world": world, "rank": rank, "schedule": schedule,
                    "calls": cp.program(cp.masks[0]).calls, "forward": forward, "both": both,
                    "forward_of_kernel": round(forward / best[0], 3), "both_of_kernel": round(both / best[1], 3),
                }  # fmt: skip
                rows.append(row)
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def local_global() -> dict[str, Any]:
    cp = ringattn.ContextParallel(None, 131072, mask=ringattn.longformer(1023, 64))
    pairs = int(cp.plan.work[0])
    torch.cuda.reset_peak_memory_stats()
    both = milliseconds(ringattn_case(cp, True))
    return {"seqlen": 131072, "both": tera(pairs, BOTH, both), "peak_bytes": torch.cuda.max_memory_allocated()}


def main(json: str = "") -> None:
    """Measure, print and write JSON."""
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure")
        return
    torch.manual_seed(0)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = round(2 * 8192**3 / milliseconds(lambda: a @ b, 0.5) / 1e9, 1)
    print(f"matmul 8192^3 bf16: {matmul} TFLOP/s (the ceiling to divide by)")
    table = kernels()
    rates = {r["seqlen"]: (r["ringattn_forward"], r["ringattn_both"]) for r in table if r["mask"] == "causal"}
    result = {
        "unit": "TFLOP/s by exact area",
        "matmul": matmul,
        "kernels": table,
        "virtual_ring": virtual_ring(rates),
        "local_global": local_global(),
    }
    print(result["local_global"])
    chip = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    write(json or f"gpu-{chip}", result)


if __name__ == "__main__":
    typer.run(main)

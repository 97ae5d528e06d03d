"""What one GPU can tell: kernels beside PyTorch's own calls, and one rank's whole schedule beside its kernel.

The virtual ring runs the complete program of one rank of a larger world, every tile, merge and
accumulation, with transfers that take no time: what is left of the kernel's rate is what the ring itself
costs. Random data, medians, bf16, 32 heads over 8, head_dim 128.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --dry  # the same code at tiny sizes on any machine: whether it runs, no figures
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ringattn
from benchmarks.common import write
from ringattn.testing import InstantRank


@dataclass(frozen=True)
class Sizes:
    """What is measured, and on which device. ``longest``: tokens of the local-global case; ``matmul``: rows and columns
    of the matrices whose product is the ceiling; ``budget``: of the seconds that a case may take, the part it gets."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    kernel: str = "auto"
    seqlens: tuple[int, ...] = (4096, 8192, 16384, 32768)
    window: int = 1024
    shards: tuple[int, ...] = (4096, 8192, 16384)
    world: int = 8
    longest: int = 131072
    matmul: int = 8192
    budget: float = 1.0
    backends: dict[str, SDPBackend] = field(
        default_factory=lambda: {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    )

    @property
    def forward_flop(self) -> int:
        """FLOP of one attending pair."""
        return 4 * self.heads * self.dim

    @property
    def both_flop(self) -> int:
        """The same, forward and backward."""
        return 14 * self.heads * self.dim

    def tensors(self, seqlen: int) -> list[Tensor]:
        """q, k, v and the gradient of out."""
        shapes = ((seqlen, self.heads), (seqlen, self.kv_heads), (seqlen, self.kv_heads), (seqlen, self.heads))
        return [torch.randn(1, n, h, self.dim, device=self.device, dtype=self.dtype) for n, h in shapes]

    def context(self, group: InstantRank | None, seqlen: int, **settings: Any) -> ringattn.ContextParallel:
        return ringattn.ContextParallel(group, seqlen, kernel=self.kernel, **settings)

    def milliseconds(self, case: Callable[[], object], seconds: float = 1.5) -> float:
        """Median over as many runs as fit the seconds, after two warm-up runs."""
        for _ in range(2):
            case()
        times: list[float] = []
        deadline = time.monotonic() + seconds * self.budget
        while len(times) < 5 or (time.monotonic() < deadline and len(times) < 50):
            times.append(self._timed(case))
        return statistics.median(times)

    def _timed(self, case: Callable[[], object]) -> float:
        """Milliseconds of one run."""
        if self.device == "cpu":
            begun = time.perf_counter()
            case()
            return 1000 * (time.perf_counter() - begun)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        case()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


DRY = Sizes(
    device="cpu", dtype=torch.float32, heads=4, kv_heads=2, dim=8, kernel="reference", seqlens=(64, 128), window=16,
    shards=(32, 64), world=4, longest=256, matmul=64, budget=0.0, backends={"math": SDPBackend.MATH},
)  # fmt: skip


def ringattn_case(sizes: Sizes, cp: ringattn.ContextParallel, backward: bool) -> Callable[[], object]:
    q, k, v, dout = sizes.tensors(cp.local_seqlen)
    inputs = [t.requires_grad_(backward) for t in (q, k, v)]

    def run() -> None:
        out = ringattn.attention(*inputs, cp=cp)
        if backward:
            out.backward(dout)  # type: ignore[union-attr]
            for t in inputs:
                t.grad = None

    return run


def torch_case(sizes: Sizes, seqlen: int, causal: bool, backend: SDPBackend, backward: bool) -> Callable[[], object]:
    q, k, v, dout = (t.transpose(1, 2) for t in sizes.tensors(seqlen))
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
    """TFLOP/s, four digits of them."""
    return float(f"{pairs * flop / ms / 1e9:.4g}")


def kernels(sizes: Sizes) -> list[dict[str, Any]]:
    rows = []
    window = ringattn.sliding_window(sizes.window - 1)
    masks = {"full": ringattn.full(), "causal": ringattn.causal(), f"window {sizes.window}": window}
    for seqlen in sizes.seqlens:
        for name, mask in masks.items():
            pairs = mask.area(seqlen, seqlen)
            cp = sizes.context(None, seqlen, mask=mask)
            row: dict[str, Any] = {"seqlen": seqlen, "mask": name}
            for key, flop, backward in (("forward", sizes.forward_flop, False), ("both", sizes.both_flop, True)):
                took = sizes.milliseconds(ringattn_case(sizes, cp, backward), 0.5)
                row[f"ringattn_{key}"] = tera(pairs, flop, took)
                if name.startswith("window"):
                    continue
                for label, backend in sizes.backends.items():
                    case = torch_case(sizes, seqlen, name == "causal", backend, backward)
                    row[f"torch_{label}_{key}"] = tera(pairs, flop, sizes.milliseconds(case, 0.5))
            rows.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def virtual_ring(sizes: Sizes, causal_rates: dict[int, tuple[float, float]]) -> list[dict[str, Any]]:
    rows = []
    world = sizes.world
    for shard in sizes.shards:
        for schedule in ("ring", "exchange", "gather"):
            for rank in (0, world - 1):
                cp = sizes.context(InstantRank(rank, world), shard * world, layout="zigzag", schedule=schedule)
                pairs = int(cp.plan.work[rank])
                forward, both = (
                    tera(pairs, flop, sizes.milliseconds(ringattn_case(sizes, cp, backward)))
                    for flop, backward in ((sizes.forward_flop, False), (sizes.both_flop, True))
                )
                best = causal_rates.get(2 * shard, (float("nan"),) * 2)
                row = {
                    "shard": shard, "world": world, "rank": rank, "schedule": schedule,
                    "calls": cp.program(cp.masks[0]).calls, "forward": forward, "both": both,
                    "forward_of_kernel": round(forward / best[0], 3), "both_of_kernel": round(both / best[1], 3),
                }  # fmt: skip
                rows.append(row)
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def local_global(sizes: Sizes) -> dict[str, Any]:
    on_gpu = sizes.device == "cuda"
    cp = sizes.context(None, sizes.longest, mask=ringattn.longformer(sizes.window - 1, sizes.window // 16))
    pairs = int(cp.plan.work[0])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    both = tera(pairs, sizes.both_flop, sizes.milliseconds(ringattn_case(sizes, cp, True)))
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return {"seqlen": sizes.longest, "both": both, "peak_bytes": peak}


def measure(sizes: Sizes) -> dict[str, Any]:
    """Everything, printed as it comes."""
    torch.manual_seed(0)
    n = sizes.matmul
    a, b = (torch.randn(n, n, device=sizes.device, dtype=sizes.dtype) for _ in range(2))
    matmul = tera(n**3, 2, sizes.milliseconds(lambda: a @ b, 0.5))
    print(f"matmul {n}^3 {str(sizes.dtype).removeprefix('torch.')}: {matmul} TFLOP/s (the ceiling to divide by)")
    table = kernels(sizes)
    rates = {r["seqlen"]: (r["ringattn_forward"], r["ringattn_both"]) for r in table if r["mask"] == "causal"}
    result = {
        "unit": "TFLOP/s by exact area",
        "matmul": matmul,
        "kernels": table,
        "virtual_ring": virtual_ring(sizes, rates),
        "local_global": local_global(sizes),
    }
    print(result["local_global"])
    return result


def main(json: str = "", dry: bool = False) -> None:
    """Measure, print and write JSON; with --dry run the same code at tiny sizes on the CPU, and write nothing."""
    if dry:
        measure(DRY)
        print("a dry run: everything has run, and none of these figures says anything")
    elif not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure; --dry shows whether the benchmark runs")
    else:
        chip = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
        write(json or f"gpu-{chip}", measure(Sizes()))


if __name__ == "__main__":
    typer.run(main)

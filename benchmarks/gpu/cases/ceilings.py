"""What the device does at most: a large matrix product, and a copy."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import Figure, Row, digits


def measure(bench: Bench) -> Iterator[Figure]:
    sizes = bench.sizes
    yield {"matmul": sizes.matmul, "dtype": str(sizes.dtype).removeprefix("torch.")}, partial(_matmul, bench)
    yield {"copy": sizes.copied}, partial(_copy, bench)


def _matmul(bench: Bench) -> Row:
    n = bench.sizes.matmul
    a, b = (bench.random(n, n) for _ in range(2))
    ms = statistics.median(bench.clock.race({"matmul": lambda: a @ b})["matmul"])
    return {"tflops": digits(2 * n**3 / ms / 1e9)}


def _copy(bench: Bench) -> Row:
    """Read and written bytes."""
    source = torch.zeros(bench.sizes.copied, dtype=torch.uint8, device=bench.sizes.device)
    target = torch.empty_like(source)
    ms = statistics.median(bench.clock.race({"copy": lambda: target.copy_(source)})["copy"])
    return {"terabytes_per_second": digits(2 * source.nbytes / ms / 1e9)}

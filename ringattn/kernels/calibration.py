"""Measuring the rates by which `auto` chooses kernels on a device: every kernel that accepts a call, on tiles of each
kind and some sizes, in both directions, with random data; what else the device does meanwhile shows in them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringattn.geometry.frames import Frame
from ringattn.geometry.tiles import Tiles
from ringattn.kernels.base import Call, Grads, Kernel, Rows, row_delta
from ringattn.kernels.calls import TileCalls, tile_calls
from ringattn.kernels.choice import choose
from ringattn.kernels.partial import Partial, accumulator_dtype
from ringattn.kernels.rates import TERA, Kind
from ringattn.kernels.scores import Scores
from ringattn.planning.launches import Launch, launches

UNIT = "TFLOP/s by exact area, forward and backward"


@dataclass(frozen=True)
class Sizes:
    """What is measured. ``window``: widths, in ``long`` tokens; ``stack``: side of the tiles of a stack."""

    squares: tuple[int, ...] = (1024, 4096, 8192, 16384, 32768)
    bands: tuple[int, ...] = (4096, 16384)
    windows: tuple[int, ...] = (1024, 4096)
    long: int = 65536
    stack: int = 128
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    seconds: float = 0.1  # of a case, at least five runs

    def boxes(self) -> Iterator[np.ndarray[Any, Any]]:
        """Tables of tiles ``(q0, nq, q step, k0, nk, k step, lo, hi)``, each a launch or a stack."""
        for n in self.squares:
            yield np.array([[0, n, 1, 0, n, 1, 1 - n, n - 1]])
            yield np.array([[0, n, 1, 0, n, 1, 1 - n, 0]])
        for n in self.bands:
            yield np.array([[0, n, 1, 0, 2 * n, 1, 1 - n, n]])
        for width in self.windows:
            yield np.array([[0, self.long, 1, 0, self.long, 1, 1 - width, 0]])
        side, count = self.stack, max(self.long // self.stack, 4)
        starts = side * np.arange(count)
        yield np.array([[s, side, 1, s, side, 1, 1 - side, side - 1] for s in starts.tolist()])


def calibrate(
    device: torch.device, kernels: Sequence[Kernel], sizes: Sizes, told: Callable[[str], None]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Rates by kernel, shape and size, as `KernelRates` reads them. ``told`` is given a line for each as it comes."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for boxes in sizes.boxes():
        tiles = Tiles(boxes.astype(np.int64))
        (launch,) = launches(tiles)
        kind = Kind.of(launch)
        windowed = launch.window not in ((None, None), (None, 0))
        dims = sizes.dim, sizes.dim, sizes.heads, sizes.kv_heads
        call = Call(device.type, sizes.dtype, *dims, windowed, capability=capability)
        for kernel in kernels:
            try:
                fitted = choose(kernel.name, call, [kernel]).kernels[0]
            except NotImplementedError as refused:
                told(str(refused))
                continue
            rates = _rates(fitted, call, tiles, launch, sizes, device)
            found.setdefault(kernel.name, {}).setdefault(kind.shape, {})[str(kind.size)] = rates
            told(f"{kernel.name:10} {kind.shape:8} {kind.size:7,} {rates[0]:8.4g} {rates[1]:8.4g}")
    return found


def _rates(kernel: Kernel, call: Call, tiles: Tiles, launch: Launch, sizes: Sizes, device: torch.device) -> list[float]:
    """TFLOP/s forward and backward, of what is written once."""
    frames = [Frame(np.array([[0, int(tiles.boxes[:, c].max() + tiles.boxes[0, c + 1]), 1]])) for c in (0, 3)]
    fresh = Launch(launch.q, launch.k, launch.window, launch.area, launch.count, True, True)
    scores, heads = Scores(sizes.dim**-0.5), slice(0, sizes.heads)
    calls = kernel.ready(tile_calls(tiles, (fresh,), (frames[0], frames[1]), scores, heads, device), call)
    forward, backward = _passes(kernel, calls, [frame.size for frame in frames], kernel.direct(call), sizes, device)
    flop = 4 * sizes.heads * sizes.dim * launch.area
    return [_rounded(flop / _seconds(forward, sizes, device)), _rounded(2.5 * flop / _seconds(backward, sizes, device))]


def _rounded(rate: float) -> float:
    return float(f"{rate / TERA:.4g}")


def _passes(
    kernel: Kernel, calls: TileCalls, lengths: list[int], direct: bool, sizes: Sizes, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None]]:
    (nq, nk), wide = lengths, accumulator_dtype(sizes.dtype)

    def random(n: int, heads: int) -> Tensor:
        return torch.randn(1, n, heads, sizes.dim, device=device, dtype=sizes.dtype)

    q, dout, k, v = random(nq, sizes.heads), random(nq, sizes.heads), *(random(nk, sizes.kv_heads) for _ in range(2))
    kept = sizes.dtype if direct else wide
    acc = Partial.unset(1, nq, sizes.heads, sizes.dim, kept, device, wide)
    dq, dk, dv = (torch.empty_like(x, dtype=kept) for x in (q, k, v))
    grads = Grads(dq, dk, dv)
    kernel.forward(q, k, v, calls, acc)
    out = acc.out.to(sizes.dtype)
    rows = Rows(q, dout, out, acc.lse, row_delta(dout.to(wide), out, None) if kernel.reads_delta else None, None)
    return lambda: kernel.forward(q, k, v, calls, acc), lambda: kernel.backward(rows, k, v, calls, grads)


def _seconds(run: Callable[[], None], sizes: Sizes, device: torch.device) -> float:
    """The median of some runs, after one that warms up."""
    run()
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < 5 or (time.monotonic() - begun < sizes.seconds and len(times) < 100):
        times.append(_cuda_seconds(run) if device.type == "cuda" else _host_seconds(run))
    return statistics.median(times)


def _host_seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000

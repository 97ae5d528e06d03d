"""The `triton` kernel and the passes compiled for a CUDA device that need not be there.

``python -m tests.support.compiled 9 0`` compiles for compute capability 9.0, and prints what shared memory each launch
takes.
"""

import sys

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from ringattn.geometry.frames import Frame
from ringattn.geometry.tiles import NO_TILES, Tile, Tiles
from ringattn.kernels import Call, Grads, Rows, passes_triton, tile_calls
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Alibi, Dropout, Scores
from ringattn.kernels.triton_tiles import Triton, kernel
from ringattn.planning.launches import Launch

LENGTH, HEADS, KV_HEADS = 256, 8, 2
TRIANGLE = Tiles(np.array([[0, LENGTH, 1, 0, LENGTH, 1, 1 - LENGTH, 0]]))
LISTS = Tiles(NO_TILES.boxes, (Tile(np.arange(99) ** 2 // 40, np.arange(50) * 3 % 50, (None, None), 99 * 50),))
PLAIN, ALL = Scores(0.3), Scores(
    0.3,
    2.0,
    torch.zeros(1, HEADS, LENGTH, LENGTH),
    torch.zeros(1, HEADS, LENGTH, LENGTH),
    Alibi(torch.ones(HEADS)),
    Dropout(0.3, 5),
)  # fmt: skip


class Device:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, major: int, minor: int) -> None:
        self.target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launch(module, name, grid, given, settings):
    """In the place of the kernel's own: compiles, and launches nothing."""
    made = getattr(kernel._compiled(module), name).warmup(*given, grid=grid, **settings)
    print(name, made.metadata.shared)


def compile_all(dtype, head_dim, scores, tiles):
    """Forward and backward of one kind of call."""
    q, k, v = (torch.zeros(1, LENGTH, heads, head_dim, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    frame, launches = Frame(np.array([[0, LENGTH, 1]])), tuple(map(Launch.of, tiles))
    calls = tile_calls(tiles, launches, (frame, frame), scores, slice(0, HEADS), q.device)
    asked = Call("cuda", dtype, head_dim, head_dim, HEADS, KV_HEADS, features=scores.features)
    calls, triton_kernel = Triton().ready(calls, asked).scored(scores), Triton()
    acc = Partial.unset(1, LENGTH, HEADS, head_dim, torch.float32, q.device)
    triton_kernel.forward(q, k, v, calls, acc)
    grads, lse = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)), acc.lse.float()
    triton_kernel.backward(Rows(q, q, q, lse, lse, None), k, v, calls, Grads(*grads))


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, of) -> None:
        self.of = of

    def __getitem__(self, grid):
        return lambda *given, **settings: print(
            self.of.__name__.strip("_"), self.of.warmup(*given, grid=grid, **settings).metadata.shared
        )


def compile_passes():
    """A fold of one and of several blocks, a sum, and a first write of two."""
    for name in ("_fold", "_accumulate"):
        setattr(passes_triton, name, Compiled(getattr(passes_triton, name)))
    out, lse = torch.zeros(1, LENGTH, HEADS, 128), torch.zeros(1, HEADS, LENGTH, dtype=torch.float64)
    for count in (1, 3):
        passes_triton.fold(out, lse, out.bfloat16().expand(count, *out.shape), lse.float().expand(count, *lse.shape))
    passes_triton.accumulate([(out, out.bfloat16())], False)
    passes_triton.accumulate([(out.bfloat16(), out), (out.bfloat16(), out)], True)


if __name__ == "__main__":
    capability = int(sys.argv[1]), int(sys.argv[2])
    triton.runtime.driver.set_active(Device(*capability))
    kernel.INTERPRETED, kernel._launch, kernel._precision = capability, launch, lambda x: "ieee"
    compile_all(torch.bfloat16, 128, PLAIN, TRIANGLE)
    compile_all(torch.float16, 64, ALL, LISTS)
    compile_all(torch.float32, 64, PLAIN, TRIANGLE)
    compile_passes()

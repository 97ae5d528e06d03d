"""FlashAttention-4 as both adapters ask for it, compiled for a CUDA device that need not be there; and what its
compiler makes of a block map's question, run on this machine.

``python -m tests.support.compiled_flash4 9``, in an environment that tells the package so, compiles for compute
capability 9.0, and prints what it has done.
"""

import sys

import cutlass
import numpy as np
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
from flash_attn.cute import utils
from torch._subclasses.fake_tensor import FakeTensorMode

from ringattn.geometry.tiles import Tiles
from ringattn.kernels import flash4, flash4_blocks
from ringattn.kernels.base import Rows
from ringattn.kernels.block_map import BlockSize, block_map
from ringattn.kernels.flash import Ask
from ringattn.kernels.flash4_blocks import Blocks, block_size, mask_mod
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Bounds, Scores

MAJOR = int(sys.argv[1])
N, M = 600, 700  # queries and keys


class Device:
    """What the package asks of a driver before it compiles."""

    def get_device_multiprocessor_count(self):
        return 132

    def get_max_active_clusters(self, size):
        return 132 // size


indexed = torch.Tensor.__getitem__


def element(x, at):
    """Indexing looks for the device, and views do not."""
    return x.select(0, at) if type(at) is int else x.unsqueeze(0) if at is None else indexed(x, at)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def tensors(dim, v_dim, heads, dtype):
    """q, k, v, out and lse."""
    queries, keys = heads
    q, k, v = (
        empty(1, N, queries, dim, dtype=dtype),
        empty(1, M, keys, dim, dtype=dtype),
        empty(1, M, keys, v_dim, dtype=dtype),
    )
    return q, k, v, Partial(empty(1, N, queries, v_dim, dtype=dtype), empty(1, queries, N, dtype=torch.float32))


def compiled(what, forward, backward, made, dlse):
    """Both directions, with shapes as they must be."""
    q, k, v, acc = made
    out, lse = forward(q, k, v)
    assert out.shape == acc.out.shape and lse.shape == acc.lse.shape and lse.dtype == torch.float32
    rows = Rows(q, empty(*out.shape, dtype=q.dtype), out, lse, None, torch.empty_like(lse) if dlse else None)
    assert [x.shape for x in backward(rows, k, v)] == [x.shape for x in (q, k, v)]
    print(f"{what} compiled", flush=True)


def tile(what, ask, dim=128, heads=(4, 2), home=False, dlse=False, dtype=torch.bfloat16):
    """A call of the adapter of single tiles. ``home``: it is given tensors to write to."""
    made, package = tensors(dim, dim, heads, dtype), flash4.load()
    homes = tuple(torch.empty_like(x) if home else None for x in made[:3])
    compiled(
        what,
        lambda q, k, v: package.forward(q, k, v, ask, made[3] if home else None),
        lambda rows, k, v: package.backward(rows, k, v, ask, homes),
        made,
        dlse,
    )


def blocks(what, dim=128, heads=(4, 2), softcap=None, dlse=False, v_dim=None, dtype=torch.bfloat16):
    """A call of the adapter of block maps."""
    size = block_size(dim, (MAJOR, 0))
    m, n = -(-N // size.rows), -(-M // size.cols)

    def lists(lines, most):
        return [empty(1, 1, *shape, dtype=torch.int32) for shape in ((lines,), (lines, min(most, 3))) * 2]

    pairs = [empty(m, n * size.cols // size.piece, dtype=torch.int32), empty(9999, dtype=torch.int32)]
    given = Blocks(size, slice(0, N), slice(0, M), (*lists(m, n),), (*lists(n, m),), pairs), Scores(0.1, softcap)
    package = flash4_blocks.load()
    compiled(
        what,
        lambda q, k, v: package.forward(q, k, v, *given),
        lambda rows, k, v: package.backward(rows, k, v, *given),
        tensors(dim, v_dim or dim, heads, dtype),
        dlse,
    )


def tiles_compiled():
    """What a tile, or a run of packed ones, is asked for with."""
    cu = [empty(3, dtype=torch.int32) for _ in range(2)]
    packed = Bounds(*cu, 400, 400)
    tile("full", Ask((None, None), 0.1))
    tile("causal", Ask((None, 0), 0.1), home=True)
    tile("window", Ask((40, 8), 0.1), dlse=True)
    tile("left bound", Ask((40, None), 0.1), dim=64, dtype=torch.float16)
    tile("softcap", Ask((None, 0), 0.1, softcap=20.0), heads=(4, 4))
    tile("packed", Ask((None, 0), 0.1, bounds=packed))
    tile("packed windows", Ask((40, 0), 0.1, bounds=packed), home=True, dlse=True)
    tile("deterministic", Ask((None, 0), 0.1, deterministic=True))


def blocks_compiled():
    """What a block map is asked for with, for each size of blocks."""
    blocks("blocks of 128")
    blocks("blocks of 64, softcap", dim=64, softcap=20.0, dlse=True)
    blocks("blocks of 128, heads alone", heads=(4, 4), dtype=torch.float16)
    if MAJOR == 9:
        blocks("blocks of 192", dim=192)
        blocks("blocks of 192 and 128", dim=192, v_dim=128, heads=(4, 4))
        blocks("blocks of 256", dim=256)


def asked_here(size):
    """The question of a pair, compiled for the processor, against the same of PyTorch's integers."""
    mask = mask_mod(size)

    @cute.jit
    def ask(places: cute.Tensor, bits: cute.Tensor, found: cute.Tensor, rows: cutlass.Int32, cols: cutlass.Int32):
        for i in cutlass.range(rows):
            for j in cutlass.range(cols):
                row, col = utils.scalar_to_ssa(i, cutlass.Int32), utils.scalar_to_ssa(j, cutlass.Int32)
                answer = utils.ssa_to_scalar(mask(row, row, row, col, None, [places, bits]))
                found[i, j] = cutlass.Int32(cutlass.Boolean(answer))

    boxes = np.array([(0, 300, 1, 0, 300, 1, -50, 3), (300, 100, 2, 40, 300, 1, -99, 250)])
    made = block_map(Tiles(boxes), size)
    rows, cols = (count * side for count, side in zip(made.full.shape, size, strict=True))
    pairs, found = (
        [torch.from_numpy(x) for x in (made.places, made.bits)],
        torch.full((rows, cols), -1, dtype=torch.int32),
    )
    ask(*(from_dlpack(x).mark_layout_dynamic() for x in (*pairs, found)), rows, cols)
    assert torch.equal(found, size.attends(*pairs, torch.arange(rows)[:, None], torch.arange(cols)).int())
    assert 0 < found.sum() < found.numel()
    print(f"{tuple(size)} asked here", flush=True)


if __name__ == "__main__":
    for sides in ((128, 128), (128, 96), (128, 64), (256, 128)):
        asked_here(BlockSize(*sides))
    cutlass.utils.HardwareInfo = Device
    torch.Tensor.__getitem__, torch.cuda.current_device = element, lambda: 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        blocks_compiled()
        tiles_compiled()

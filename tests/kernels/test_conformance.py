"""On a GPU: every kernel whose package is there, on tiles of every kind, against brute force in fp64.

What runs without one is in `test_kernels.py`, `test_triton_tiles.py`, and in `test_flash.py` over packages that only
look like FlashAttention's.
"""

import pytest
import torch

from ringattn.kernels import KERNELS, Kernel
from ringattn.kernels.calls import TileKernel
from tests.support.one_tile import TILES, assert_within_law, make_problem
from tests.support.tiles import OneTile, Window

pytestmark = pytest.mark.gpu
# PyTorch's own, and plain PyTorch, are in test_kernels.py
ADDED = [kernel for kernel in KERNELS if kernel.name in ("flash4", "flash3", "flash2", "triton")]


def tile_by_tile(kernel: Kernel) -> Kernel:
    return kernel if isinstance(kernel, TileKernel) else OneTile(kernel)  # type: ignore[return-value]


each_kernel = pytest.mark.parametrize("kernel", ADDED, ids=lambda kernel: kernel.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}-{tile[2]}")
@each_kernel
@pytest.mark.usefixtures("poison")
def test_tiles(kernel: Kernel, tile: tuple[int, int, Window], dtype: torch.dtype) -> None:
    p = make_problem(*tile, dtype=dtype, heads=(4, 2), device="cuda", head_dim=64, batch=1)
    assert_within_law(tile_by_tile(kernel), p)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (16, 2)], ids=str)
@pytest.mark.parametrize("window", [(None, None), (None, 0), (20, 5)], ids=str)
@each_kernel
def test_shared_heads_and_a_gradient_of_lse(kernel: Kernel, window: Window, heads: tuple[int, int]) -> None:
    p = make_problem(257, 257, window, torch.bfloat16, heads, device="cuda", head_dim=128, batch=2, with_dlse=True)
    assert_within_law(tile_by_tile(kernel), p)


@pytest.mark.parametrize("head_dim", [32, 96, 192, 256])
@each_kernel
def test_head_sizes(kernel: Kernel, head_dim: int) -> None:
    p = make_problem(200, 330, (None, 0), torch.bfloat16, (4, 2), device="cuda", head_dim=head_dim, batch=1)
    assert_within_law(tile_by_tile(kernel), p)

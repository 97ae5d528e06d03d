"""Block sparsity as FlashAttention-4 takes it: which pairs its forward and its backward compute, right or wrong, and
what it refuses."""

from typing import NamedTuple

import torch

FORWARD, BACKWARD = "forward", "backward"


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def mask_mod(size):
    """What the package is given in the place of a compiled function: the same of PyTorch's integers."""

    def attends(batch, head, q, k, seqlen, tensors):
        return size.attends(*tensors, q, k).bool()

    return attends


def computed_pairs(sparse, mask, aux, q, k, arch, direction, deterministic=False):
    """The pairs ``[nq, nk]`` of `[batch, n, heads, dim]` inputs; None: all of them."""
    nq, nk = q.shape[1], k.shape[1]
    if aux is not None:
        assert all(x.dtype == torch.int32 and x.is_contiguous() and (x.ndim == 1 or min(x.shape) > 1) for x in aux)
    asked = None
    if mask is not None:  # of whole blocks, so that what it reads must be there beyond the last row and column, too
        sizes = (1, 1) if sparse is None else sparse.block_size
        rows, cols = (torch.arange(-(-n // side) * side) for n, side in zip((nq, nk), sizes, strict=True))
        asked = mask(None, None, rows[:, None], cols, None, aux)[:nq, :nk]
    if sparse is None:
        return asked
    assert not deterministic, "Deterministic not implemented for block-sparse backward"
    check_sizes(sparse.block_size, q.shape[-1], arch)
    some = blocks_of(sparse.mask_block_cnt, sparse.mask_block_idx, sparse.block_size, nq, nk, direction)
    full = blocks_of(sparse.full_block_cnt, sparse.full_block_idx, sparse.block_size, nq, nk, direction)
    return full | (some if asked is None else some & asked)


def check_sizes(block_size, head_dim, arch):
    rows, cols = block_size
    if arch >= 10:
        assert rows % 256 == 0 and cols % 128 == 0
    else:
        assert rows % 128 == 0 and cols == (128 if head_dim <= 128 else 96 if head_dim <= 192 else 64)


def blocks_of(counts, listed, block_size, nq, nk, direction):
    """Pairs of the blocks that are listed, by rows forward and by columns backward."""
    m, n = -(-nq // block_size[0]), -(-nk // block_size[1])
    lines, most = (m, n) if direction == FORWARD else (n, m)
    assert counts.dtype == listed.dtype == torch.int32
    assert counts.shape == (1, 1, lines) and listed.shape[:3] == (1, 1, lines) and 0 < listed.shape[3] <= most
    flags = torch.zeros(lines, most, dtype=torch.bool)
    for line in range(lines):
        blocks = listed[0, 0, line, : counts[0, 0, line]].tolist()
        assert blocks == sorted(set(blocks)), "only the last is masked at the end of the sequence"
        flags[line, blocks] = True
    flags = flags if direction == FORWARD else flags.T
    return flags.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)[:nq, :nk]

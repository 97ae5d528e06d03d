"""Sizes of the blocks that one program computes, for each of the three kernels. Integers only.

Larger blocks read less and keep the tensor cores busy, until registers or shared memory run out.
"""

from __future__ import annotations

from typing import NamedTuple

WIDEST = 256  # head size
MOST_TOGETHER = 16  # query heads of a KV head in one block
INTERPRETED = (0, 0)  # the capability of a CPU
# Bytes of shared memory of one program, by compute capability (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
LARGE, SMALL = 227 << 10, 99 << 10  # of devices to come, by major version: 10 and 11 are servers', 12 are workstations'


class Blocks(NamedTuple):
    """Rows (of all query heads that are computed together) and key columns of a block, warps of a program, and stages
    of its pipeline."""

    rows: int
    cols: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """``keys`` is the kernel that makes the gradients of keys and values, ``queries`` that of the queries."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


# By the padded head size, of 2 bytes an element and of 4 bytes.
HALF = {
    64: Sizes(Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3)),
    128: Sizes(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(32, 128, 8, 3)),
    256: Sizes(Blocks(64, 64, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
}
SINGLE = {
    64: Sizes(Blocks(64, 32, 8, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    128: Sizes(Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 8, 1)),
    256: Sizes(Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1)),
}
CPU = Sizes(Blocks(64, 64, 1, 1), Blocks(64, 64, 1, 1), Blocks(64, 64, 1, 1))


def padded(head_dim: int) -> int:
    """The least power of two from 16 on: what matrix units take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def sizes(head_dim: int, v_head_dim: int, itemsize: int, capability: tuple[int, int]) -> Sizes:
    """Blocks for a device: those of the table, with fewer stages, then fewer rows or columns, until they fit."""
    if capability == INTERPRETED:
        return CPU
    width = max(64, padded(head_dim), padded(v_head_dim))
    chosen = (HALF if itemsize == 2 else SINGLE)[width]
    room = SHARED.get(capability, LARGE if capability[0] in (9, 10, 11) else SMALL)
    both = (padded(head_dim) + padded(v_head_dim)) * itemsize
    return Sizes(*(_fitted(blocks, both, itemsize, room, kernel) for blocks, kernel in zip(chosen, KEPT, strict=True)))


KEPT = ("q", "rows", "cols")  # what stays in shared memory while a kernel's pipeline runs through the other side


def _fitted(blocks: Blocks, both: int, itemsize: int, room: int, kept: str) -> Blocks:
    rows, cols, warps, stages = blocks
    while _shared(blocks, both, itemsize, kept) > room:
        if stages > 1:
            stages -= 1
        elif kept == "cols":
            rows, cols = (rows // 2, cols) if rows > 16 else (rows, cols // 2)
        else:
            rows, cols = (rows, cols // 2) if cols > 16 else (rows // 2, cols)
        blocks = Blocks(rows, cols, warps, stages)
    return blocks


def _shared(blocks: Blocks, both: int, itemsize: int, kept: str) -> int:
    """An upper bound of the bytes of shared memory of a program: ``both`` are those of a row of K and V, which queries
    and the gradient of the result have, too."""
    rows, cols, _, stages = blocks
    if kept == "cols":
        return (cols + stages * rows) * both + 2 * rows * cols * itemsize
    return (rows + stages * cols) * both + (rows * cols * itemsize if kept == "rows" else 0)


def together(group: int) -> int:
    """How many query heads of a KV head are rows of one block: the largest divisor of their number up to 16."""
    return max(n for n in range(1, min(group, MOST_TOGETHER) + 1) if group % n == 0)

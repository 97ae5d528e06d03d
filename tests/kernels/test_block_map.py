"""Block maps: what each block of a table holds, pair by pair, and where it is listed."""

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.geometry.tiles import NO_TILES, Tile, Tiles
from ringattn.kernels import block_map
from ringattn.kernels.block_map import BlockSize, Lists
from tests.support.tables import MASKS, SEQLEN, expected, works

SIZES = [BlockSize(8, 32), BlockSize(16, 96), BlockSize(32, 64), BlockSize(128, 128)]


def blocks_of(pairs, size):
    """Pairs ``[m, rows, n, cols]`` by block; what lies beyond the last row or column is no pair."""
    m, n = (-(-have // side) for have, side in zip(pairs.shape, size, strict=True))
    whole = np.zeros((m * size.rows, n * size.cols), bool)
    whole[: pairs.shape[0], : pairs.shape[1]] = pairs
    return whole.reshape(m, size.rows, n, size.cols)


def told(made, places, bits):
    """Pairs as a kernel finds them."""
    m, n = made.full.shape
    row, col = (torch.arange(count * side)[:, None] for count, side in zip((m, n), made.size, strict=True))
    asked = made.size.attends(places, bits, row, col.T).bool().reshape(m, made.size.rows, n, made.size.cols)
    some, full = (torch.from_numpy(x)[:, None, :, None] for x in (made.some, made.full))
    return (asked & some | full).numpy()


def check(tiles, size):
    made = block_map.block_map(tiles, size)
    shape = made.rows.stop, made.cols.stop
    want = expected(tiles, shape)
    assert want.max() == 1 and not want[: made.rows.start].any() and not want[:, : made.cols.start].any()
    blocks = blocks_of(want[made.rows, made.cols].astype(bool), size)
    assert (made.full == blocks.all((1, 3))).all()
    assert (made.some == blocks.any((1, 3)) & ~blocks.all((1, 3))).all()
    assert (told(made, torch.from_numpy(made.places), torch.from_numpy(made.bits)) == blocks).all()
    assert made.places.dtype == made.bits.dtype == np.int32
    assert min(made.places.shape) > 1 and made.bits.ndim == 1, "what has one row or column has no certain strides"
    return made, want


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_pair_of_a_table_and_no_other(mask, layout):
    for world, rank, schedule in ((1, 0, "ring"), (3, 1, "ring"), (3, 2, "gather")):
        for work in works(mask, SEQLEN, world, rank, layout=layout, schedule=schedule):
            for size in SIZES:
                made, want = check(work.tiles, size)
                for touched, side in ((want.any(1), made.rows), (want.any(0), made.cols)):
                    assert touched[side.start] and touched[-1], "tiles are trimmed, and so is the map"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scattered_rows_and_boxes_of_many_steps(size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        boxes, at = [], 0
        for _ in range(rng.integers(0, 6)):  # rows of their own, so that no pair is there twice
            nq, qs, nk, ks = rng.integers(1, [90, 5, 40, 50])
            lo = rng.integers(1 - nq, nk)
            boxes.append((at, nq, qs, rng.integers(0, 99), nk, ks, lo, rng.integers(lo, nk)))
            at += nq * qs
        lists = [np.unique(rng.integers(start, start + 200, rng.integers(1, 40))) for start in (at, 0)]
        product = Tile(*lists, (None, None), len(lists[0]) * len(lists[1]))
        check(Tiles(np.array(boxes, np.int64).reshape(-1, 8), (product,)), size)


def test_blocks_that_fill_up_by_parts_are_full():
    size = BlockSize(8, 32)
    made, _ = check(Tiles(np.array([(0, 16, 1, 0, 90, 2, -15, 89)])), size)
    assert not made.full.any() and made.some.all(), "every other column"
    stripes = Tiles(np.array([(0, 16, 1, at, 20, 3, -15, 19) for at in range(3)]))
    made = block_map.block_map(stripes, size)
    assert made.full.tolist() == [[True, False], [True, False]] and made.some.tolist() == [[False, True]] * 2
    rows = np.array([0, 1, 2, 3, 5, 6, 7, 9])
    halves = [Tile(np.array(side), slice(0, 64, 1), (None, None), 64 * len(side)) for side in (rows, [4, 8])]
    made = block_map.block_map(Tiles(NO_TILES.boxes, tuple(halves)), size)
    assert made.full.tolist() == [[True, True], [False, False]]


def test_lists_are_in_order_on_the_left():
    lists = Lists.of(np.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool))
    assert lists.counts.tolist() == [3, 0, 1] and lists.counts.dtype == lists.blocks.dtype == np.int32
    assert lists.blocks.shape == (3, 3)
    assert [row[:count].tolist() for row, count in zip(lists.blocks, lists.counts, strict=True)] == [[1, 2, 4], [], [0]]
    assert Lists.of(np.zeros((2, 2), bool)).blocks.shape == (2, 1), "a list is never without room"


def test_a_map_that_is_too_large_is_refused_before_it_is_made(monkeypatch):
    tiles = works(ra.strided(7), 250)[0].tiles
    monkeypatch.setattr(block_map, "LARGEST", 1000)
    monkeypatch.setattr(block_map, "_words_of", None)
    with pytest.raises(NotImplementedError, match="takes 8,196 bytes, at most 1,000: 1 blocks of 256 x 256 have"):
        block_map.block_map(tiles, BlockSize(256, 256))


def test_tiles_in_too_many_blocks_are_refused_before_they_are_counted_out():
    """A step of 512 lies in every block; a tile that fills blocks costs what its edge is long."""
    size = BlockSize(128, 128)
    with pytest.raises(NotImplementedError, match=r"lie in 133,824,512 blocks .* at most 2,097,152; kernel='triton'"):
        block_map.block_map(works(ra.strided(512), 1 << 17)[0].tiles, size)
    (tiles,) = (work.tiles for work in works(ra.causal(), 1 << 17))
    made = block_map.block_map(tiles, size)
    assert made.some.sum() == 1024 and made.full.sum() == 1024 * 1023 // 2

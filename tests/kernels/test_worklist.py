"""Work lists of the `triton` kernel: every pair of a table once, every row in one block of a launch, little else."""

import numpy as np
import pytest

import ringattn as ra
from ringattn.geometry.tiles import Tile, Tiles
from ringattn.kernels.triton_tiles.sizes import HALF, INTERPRETED, SHARED, SINGLE, Blocks, sizes, together
from ringattn.kernels.triton_tiles.worklist import Table, waves
from tests.support.tables import MASKS, expected, works


def positions(first, step, index, count):
    """Local rows of a run, as a kernel finds them."""
    return index[first : first + count] if step == 0 else first + step * np.arange(count)


def pairs(made, table):
    """How often the blocks of waves have each pair, by local rows and columns; every row is in one block of a wave."""
    found = np.zeros((table.rows.size, table.cols.size), int)
    for wave in made:
        owned = np.zeros(len(found), int)
        for first, step, count, begin, end, _ in wave.blocks.tolist():
            rows = positions(first, step, table.rows.index, count)
            owned[rows] += 1
            assert end > begin, "a block without work"
            for x0, x1, at, gap, n, lo, hi in wave.entries[begin:end].tolist():
                cols = positions(at, gap, table.cols.index, n)
                x, j = np.arange(count)[:, None], np.arange(n)
                found[np.ix_(rows, cols)] += (x0 <= x) & (x < x1) & (lo <= j - x) & (j - x <= hi)
        assert owned.max() == 1
    return found


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_pair_once_and_every_row_in_one_block(mask, layout):
    for work in works(mask, world=3, rank=1, layout=layout, schedule="ring"):
        table = Table.of(work.tiles)
        want = expected(work.tiles, (table.rows.size, table.cols.size))
        assert (pairs(waves(table, 7), table) == want).all()
        assert (pairs(waves(table.transposed, 16), table.transposed) == want.T).all()


def test_rows_of_different_steps_go_into_launches_of_their_own():
    def box(q0, nq, step):
        return q0, nq, step, 0, 4, 1, 1 - nq, 3

    made = waves(Table.of(Tiles(np.array([box(0, 30, 1), box(31, 5, 2), box(0, 10, 3), box(1, 9, 3)]))), 8)
    assert [sorted(set(wave.blocks[:, 1].tolist())) for wave in made] == [[1, 2], [3]]
    lists = tuple(Tile(np.array(rows), slice(0, 4, 1), (None, None), 12) for rows in ([0, 5, 6], [1, 2, 9], [0, 5, 6]))
    made = waves(Table.of(Tiles(np.empty((0, 8), np.int64), lists)), 8)
    assert len(made) == 1 and len(made[0].blocks) == 2 and len(made[0].entries) == 3, "equal lists are one"


def test_rows_are_fresh_until_a_wave_has_them():
    tiles = [(0, 20, 1, 0, 4, 1, -19, 3), (0, 20, 1, 4, 4, 1, -19, 3), (0, 10, 3, 8, 4, 1, -9, 3)]
    fresh = np.arange(40) < 13
    made = waves(Table.of(Tiles(np.array(tiles))), 8, fresh)
    for wave in made:
        for first, step, count, _, _, new in wave.blocks.tolist():
            assert (fresh[first + step * np.arange(count)] == new).all()
        for first, step, count, *_ in wave.blocks.tolist():
            fresh[first + step * np.arange(count)] = False
    assert len(made) == 2 and not fresh.any()


def test_long_blocks_come_first():
    (wave,) = waves(Table.of(works(ra.causal(), 1024)[0].tiles), 128)
    assert wave.blocks[:, 0].tolist() == list(range(896, -1, -128))


EFFICIENCY = [
    (ra.full(), 0.999),
    (ra.causal(), 0.99),
    (ra.sliding_window(1023), 0.85),
    (ra.documents(range(0, (1 << 17) + 1, 1024)) & ra.causal(), 0.8),
    (ra.chunked(1024), 0.999),
    (ra.bigbird(64, 3, 2, 3), 0.45),
]


@pytest.mark.parametrize(("mask", "least"), EFFICIENCY, ids=lambda x: str(x)[:40])
def test_little_is_computed_beyond_what_attends(mask, least):
    """131,072 tokens in blocks of 128 x 64 scores of one head; four heads in one block make it finer."""
    tiles = works(mask, 1 << 17, layout="contiguous")[0].tiles
    area = sum(tile.area for tile in tiles)
    alone, packed = (
        sum(wave.computed(128, 64) for wave in waves(Table.of(tiles), 128 // heads)) / heads for heads in (1, 4)
    )
    assert area <= packed <= alone * 1.01
    assert least <= area / alone <= 1


def test_planning_a_list_takes_no_longer_than_the_plan():
    """Thousands of tiles are numpy arrays, not a loop."""
    tiles = works(ra.bigbird(64, 3, 2, 3), 1 << 17, layout="contiguous")[0].tiles
    (wave,) = waves(Table.of(tiles), 64)
    assert len(tiles) > 5_000 and len(wave.entries) >= len(tiles)


def test_heads_that_share_a_block():
    assert [together(group) for group in (1, 2, 3, 4, 7, 8, 16, 24, 64, 71)] == [1, 2, 3, 4, 7, 8, 16, 12, 16, 1]


@pytest.mark.parametrize("capability", [*SHARED, (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_the_device(itemsize, capability):
    for head_dim, v_head_dim in ((32, 32), (64, 64), (96, 64), (128, 128), (192, 128), (256, 256)):
        chosen = sizes(head_dim, v_head_dim, itemsize, capability)
        for blocks in chosen:
            assert min(blocks.rows, blocks.cols) >= 16 and blocks.stages >= 1
        kept = chosen.forward.rows * head_dim * itemsize
        assert kept + chosen.forward.stages * chosen.forward.cols * (head_dim + v_head_dim) * itemsize < 227 << 10
    wide = HALF if itemsize == 2 else SINGLE
    assert sizes(128, 128, itemsize, (9, 0)).forward == wide[128].forward, "nothing is taken from what fits"
    assert isinstance(sizes(128, 128, itemsize, INTERPRETED).keys, Blocks)

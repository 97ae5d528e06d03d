"""Cells of a picture hold exactly the pairs of the mask, at any scale, and name exactly who holds their tokens."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn.geometry.layouts import cyclic, striped, zigzag
from ringattn.geometry.regular import regular
from ringattn.pictures.colours import of_ranks
from ringattn.pictures.owners import owners
from ringattn.pictures.raster import WIDE, affordable, counted, edges
from ringattn.pictures.scene import Field
from tests.support.cases import ALL, dense

LONG = 150
LARGE = {  # with cells enough that bands are counted over the whole grid, beside narrow ones
    "causal": ra.causal(),
    "scattered": ra.longformer(20, [3, 50, 51, 90, 140], causal=False),
    "strided": ra.strided(3) & ra.causal(),
    "without": ra.full() - ra.strided(4),
    "blocks": ra.bigbird(8, 3, 1, 2, causal=False),
}


def blocks(pairs: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    return np.add.reduceat(np.add.reduceat(pairs.astype(int), rows[:-1], 0), cols[:-1], 1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(ALL)), st.sampled_from(sorted(ALL)), st.sampled_from("&|-"), st.data())
def test_cells_of_combined_masks_equal_dense(one: str, other: str, sign: str, data: st.DataObject) -> None:
    (a, predicate), (b, second) = ALL[one], ALL[other]
    mask = {"&": a & b, "|": a | b, "-": a - b}[sign]
    x, y = dense(predicate), dense(second)
    pairs = {"&": x & y, "|": x | y, "-": x & ~y}[sign]
    rows, cols = (edges(0, len(x), data.draw(st.integers(1, 29))) for _ in range(2))
    found = counted(regular(mask.bind(*x.shape).whole), rows, cols)
    assert (found == blocks(pairs, rows, cols)).all()


@pytest.mark.parametrize("name", LARGE)
def test_wide_and_narrow_bands_are_counted_alike(name: str) -> None:
    mask, rows, cols = LARGE[name], edges(0, LONG, 97), edges(0, LONG, 101)
    assert len(rows) * len(cols) > WIDE
    found = counted(regular(mask.bind(LONG, LONG).whole), rows, cols)
    assert (found == blocks(mask.dense(LONG, LONG).numpy(), rows, cols)).all()


def test_queries_may_begin_later_and_keys_be_others() -> None:
    mask = ra.causal() & ra.sliding_window(9)
    rows, cols = edges(40, 60, 7), edges(0, 70, 9)
    found = counted(regular(mask.bind(20, 70, 40).whole), rows, cols)
    assert (found == blocks(mask.dense(20, 70, 40).numpy(), rows - 40, cols)).all()


def test_a_million_tokens_take_no_time() -> None:
    """The areas of all cells add up to the mask's, of 5,000 documents under a window with global tokens."""
    length, draw = 1 << 20, np.random.default_rng(0)
    bounds = [0, *sorted((draw.choice(length - 1, 4999, replace=False) + 1).tolist()), length]
    mask = ra.longformer(1023, 64) & ra.documents(bounds)
    begun = time.process_time()
    cells = Field(regular(mask.bind(length, length).whole), (0, length), (0, length)).drawn
    assert time.process_time() - begun < 5
    assert cells.layers[0].values.shape == (512, 512)
    assert int(cells.layers[0].values.sum()) == mask.area(length, length)


def test_what_would_take_long_is_counted_in_fewer_cells() -> None:
    length = 1 << 20
    bands = regular((ra.strided(1024) & ra.causal()).bind(length, length).whole)
    cells = affordable(bands, (0, length), (0, length), 512)
    assert cells < 512
    found = counted(bands, edges(0, length, cells), edges(0, length, cells))
    assert int(found.sum()) == (ra.strided(1024) & ra.causal()).area(length, length)


@pytest.mark.parametrize("build", [zigzag, striped, cyclic])
def test_owners_of_stretches(build) -> None:  # type: ignore[no-untyped-def]
    layout, offset = build(301, 5), 17
    holder = np.empty(301, int)
    for rank in range(5):
        holder[layout.frame(rank).positions()] = rank
    at = edges(offset, offset + 301, 23)
    found = owners(layout, at, offset)
    for stretch, (first, end) in enumerate(zip(at[:-1] - offset, at[1:] - offset, strict=True)):
        ranks, tokens = np.unique(holder[first:end], return_counts=True)
        mine = found.tokens[found.tokens[:, 0] == stretch]
        assert (mine[:, 1] == ranks).all() and (mine[:, 2] == tokens).all()
        mean = (of_ranks(5)[holder[first:end]].astype(float)).mean(0)
        assert np.abs(found.colours[stretch] - mean).max() <= 0.5
        assert ("rank " in found.words[stretch]) == (len(ranks) == 1)

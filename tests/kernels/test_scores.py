"""Scores of one tile: a bias by rule and by tensor, its gradient, and what dropout keeps."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import ringattn as ra
from ringattn.kernels.scores import Alibi, Block, Dropout, Place, Scores, TileScores

NQ, NK, HEADS = 37, 53, 6
FULL = (None, None)


def place(rows: object = slice(0, NQ), q: Tensor | None = None, k: Tensor | None = None, heads: int = 0) -> Place:
    q = torch.arange(NQ) + 5 if q is None else q
    return Place(rows, q, torch.arange(NK) if k is None else k, slice(heads, HEADS))  # type: ignore[arg-type]


def tile(where: Place, **call: object) -> TileScores:
    return TileScores(FULL, 1.0, call=Scores(1.0, **call), place=where)  # type: ignore[arg-type]


def block(batch: int = 2, heads: int = HEADS, rows: slice = slice(0, NQ), cols: slice = slice(0, NK)) -> Block:
    return Block(slice(0, batch), slice(0, heads), rows, cols)


def kept(seed: int, p: float, where: Place, batch: int = 2, heads: int = HEADS) -> Tensor:
    nq, nk = len(where.q), len(where.k)
    keep = tile(where, dropout=Dropout(p, seed)).keep(
        Block(slice(0, batch), slice(0, heads), slice(0, nq), slice(0, nk)), torch.float64
    )
    assert keep is not None
    return keep


# -- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    n = 1024
    keep = kept(3, p, Place(slice(0, n), torch.arange(n), torch.arange(n), slice(0, 2)), heads=2)
    assert keep.shape == (2, 2, n, n)
    assert keep.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]
    spread = math.sqrt(p / (1 - p))  # of one element
    for dims, count in (((0, 1, 2, 3), 4 * n * n), ((2, 3), n * n), ((3,), n), ((2,), n)):
        error = (keep.mean(dims) - 1).abs().max().item()
        assert error < 6.5 * spread / math.sqrt(count), dims


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropped_pairs_are_independent(p: float) -> None:
    """Over rows, columns, rectangles, batch rows, heads and seeds: correlations are those of chance."""
    n = 1024
    where = Place(slice(0, n), torch.arange(n) + 70_000, torch.arange(n), slice(0, 2))
    a, b = (kept(seed, p, where, heads=2) - 1 for seed in (3, 4))
    a, b = a / a.std(), b / b.std()
    one = a[0, 0]
    pairs = {
        "rows": one[1:] * one[:-1],
        "columns": one[:, 1:] * one[:, :-1],
        "rectangles": one[1:, 1:] * one[:-1, :-1] * one[1:, :-1] * one[:-1, 1:],
        "transposed": one * one.T,
        "batch": a[0] * a[1],
        "heads": a[:, 0] * a[:, 1],
        "seeds": a * b,
    }
    for name, product in pairs.items():
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel()), name
    for gram in (one @ one.T, one.T @ one):
        assert gram.fill_diagonal_(0).abs().max() < 7 * math.sqrt(n)


def test_any_block_keeps_what_the_whole_keeps() -> None:
    """Also where rows and columns are scattered, reordered in a tile of their own, or of other heads."""
    whole = kept(9, 0.4, place())
    scores = tile(place(), dropout=Dropout(0.4, 9))
    for b, h, q, k in ((0, 0, 0, 0), (1, 2, 5, 17), (1, 5, 36, 52)):
        part = Block(slice(b, 2), slice(h, HEADS), slice(q, NQ), slice(k, NK))
        assert torch.equal(scores.keep(part, torch.float64), whole[b:, h:, q:, k:])
    rows, cols = torch.randperm(NQ)[:20], torch.randperm(NK)[:30]
    there = place(rows.numpy(), torch.arange(NQ)[rows] + 5, cols, heads=2)
    assert torch.equal(kept(9, 0.4, there, heads=4), whole[:, 2:][:, :, rows][..., cols])


def test_what_is_kept_never_changes() -> None:
    """The hash, written with numpy: results of a seed are the same in every version and on every device."""
    mask = (1 << 64) - 1

    def mix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    def mix32(x: int) -> int:
        x = x * 0x7FEB352D & 0xFFFFFFFF
        return (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF

    def low(x: int) -> int:
        return mix64(x) & 0xFFFFFFFF

    seed, p, where = 2**61 + 7, 0.3, Place(slice(0, 4), torch.tensor([0, 1, 2**40, 9]), torch.arange(8), slice(1, 4))
    got = kept(seed, p, where, heads=3) > 0
    want = np.zeros(got.shape, dtype=bool)
    for b, h, i, j in np.ndindex(*got.shape):
        row = mix32(mix32(low(h + 1) ^ low(mix64(seed) + b)) ^ low(int(where.q[i])))
        signed = (mix32(row ^ low(j)) + (1 << 31)) % (1 << 32)
        want[b, h, i, j] = signed >= int(p * (1 << 32))
    assert torch.equal(got, torch.from_numpy(want))


# -- biases ----------------------------------------------------------------------------------------


def test_alibi_is_minus_slope_times_distance() -> None:
    slopes = torch.rand(HEADS)
    scores = tile(place(), rule=ra.alibi(slopes))
    got = scores.bias(block())
    q, k = torch.arange(NQ)[:, None] + 5, torch.arange(NK)
    want = torch.stack([-slope * (q - k).abs() for slope in slopes])[None]
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    part = Block(slice(1, 2), slice(2, 4), slice(3, 9), slice(20, 30))
    assert torch.equal(scores.bias(part), want[:, 2:4, 3:9, 20:30])


def test_alibi_distances_are_exact_far_out() -> None:
    far = 2**40
    there = Place(slice(0, 3), far + torch.arange(3), far + torch.arange(4), slice(0, 1))
    got = tile(there, rule=ra.alibi([1.0])).bias(Block(slice(0, 1), slice(0, 1), slice(0, 3), slice(0, 4)))
    want = [[0.0, -1.0, -2.0, -3.0], [-1.0, 0.0, -1.0, -2.0], [-2.0, -1.0, 0.0, -1.0]]
    assert torch.equal(got, torch.tensor([[want]]))


@pytest.mark.parametrize(
    ("slopes", "text"),
    [
        (torch.rand(2, 2), "one finite number for each query head"),
        (torch.rand(0), "one finite number"),
        (torch.tensor([1.0, math.nan]), "one finite number"),
        ([1.0, math.inf], "one finite number"),
        (torch.rand(3, requires_grad=True), "slopes.detach"),
    ],
)
def test_bad_slopes_are_refused(slopes: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ra.alibi(slopes)  # type: ignore[arg-type]


def test_slopes_are_at_least_fp32() -> None:
    assert ra.alibi([1, 2]).params.dtype == torch.float32
    assert ra.alibi(torch.rand(2).bfloat16()).params.dtype == torch.float32
    assert ra.alibi(torch.rand(2).double()).params.dtype == torch.float64


ROWS = {"slice": slice(4, 4 + NQ), "strided": slice(1, 1 + 2 * NQ - 1, 2), "scattered": None}
KEYS = {"run": torch.arange(NK) + 7, "even": torch.arange(NK) * 2 + 1, "scattered": None}


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(2, HEADS), (1, HEADS), (2, 1), (1, 1)], ids=str)
def test_a_bias_tensor_and_its_gradient(shape: tuple[int, int], rows: str, keys: str) -> None:
    """Blocks read their part, and their gradients add up in it, dims of size 1 summed over."""
    bias = torch.randn(*shape, 2 * NQ, 2 * NK)
    at, k = ROWS[rows], KEYS[keys]
    at = torch.randperm(2 * NQ)[:NQ].sort().values.numpy() if at is None else at
    k = torch.randperm(2 * NK)[:NK].sort().values if k is None else k
    dbias = torch.zeros_like(bias)
    scores = tile(place(at, k=k, heads=2), bias=bias, dbias=dbias)
    mine = bias if shape[1] == 1 else bias[:, 2:]
    here = mine[:, :, torch.arange(2 * NQ)[at]][..., k].expand(2, 4, NQ, NK)
    dlogits, want = torch.randn(2, 4, NQ, NK), bias.clone().double().requires_grad_()
    for b, h, i, j in np.ndindex(2, 2, 2, 3):
        part = Block(
            slice(b, b + 1),
            slice(2 * h, 2 * h + 2),
            slice(20 * i, min(20 * i + 20, NQ)),
            slice(20 * j, min(20 * j + 20, NK)),
        )
        index = part.batch, part.heads, part.rows, part.cols
        got = scores.bias(part)
        assert got is not None
        assert torch.equal(got.expand(1, 2, *part.shape), here[index])
        scores.add_dbias(part, dlogits[index])
    mine = want if shape[1] == 1 else want[:, 2:]
    (mine[:, :, torch.arange(2 * NQ)[at]][..., k] * dlogits).sum().backward()
    torch.testing.assert_close(dbias.double(), want.grad, rtol=1e-5, atol=1e-5)


def test_a_rule_and_a_tensor_add_up() -> None:
    bias, rule = torch.randn(1, 1, NQ, NK), Alibi(torch.rand(HEADS))
    both = tile(place(), bias=bias, rule=rule).bias(block())
    one, other = (tile(place(), **part).bias(block()) for part in ({"bias": bias}, {"rule": rule}))
    assert both is not None
    assert one is not None
    assert other is not None
    torch.testing.assert_close(both, one + other)


def test_a_plain_tile_has_nothing_to_add_or_keep() -> None:
    plain = TileScores(FULL, 1.0)
    assert plain.bias(block()) is None
    assert plain.keep(block(), torch.float32) is None
    assert not plain.wants_dbias
    assert plain.call is None
    assert Scores(1.0, 3.0).features == {"softcap"}
    dropping = tile(place(), dropout=Dropout(0.1, 0)).call
    assert dropping is not None
    assert dropping.features == {"dropout"}

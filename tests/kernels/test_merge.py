"""Partial results: merging is exact, associative, has an identity, and never loses a NaN."""

import math

import pytest
import torch

from ringattn.kernels.partial import Partial, fold, merge

INF = math.inf


def random_partial(seed: int, dtype: torch.dtype = torch.float64) -> Partial:
    gen = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 7, 3, 4, generator=gen, dtype=dtype)
    return Partial(out, 3 * torch.randn(2, 3, 7, generator=gen, dtype=dtype))


def empty(dtype: torch.dtype = torch.float64) -> Partial:
    return Partial.empty(2, 7, 3, 4, dtype, "cpu")


def assert_equal(a: Partial, b: Partial, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(a.out, b.out, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(a.lse, b.lse, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_merge_is_the_softmax_over_both_sets_of_keys() -> None:
    scores = torch.randn(5, 11, dtype=torch.float64)
    values = torch.randn(11, 4, dtype=torch.float64)

    def over(keys: slice) -> Partial:
        out = scores[:, keys].softmax(-1) @ values[keys]
        return Partial(out[None, :, None], scores[:, keys].logsumexp(-1)[None, None])

    assert_equal(merge(over(slice(0, 4)), over(slice(4, None))), over(slice(None)), 1e-14)


def test_merge_is_associative_and_commutative() -> None:
    a, b, c = (random_partial(seed) for seed in range(3))
    assert_equal(merge(merge(a, b), c), merge(a, merge(b, c)), 1e-14)
    assert_equal(merge(a, b), merge(b, a), 1e-14)


def test_empty_is_the_identity_exactly() -> None:
    a = random_partial(0)
    assert_equal(merge(a, empty()), a)
    assert_equal(merge(empty(), a), a)
    both = merge(empty(), empty())
    assert (both.out == 0).all()
    assert (both.lse == -INF).all()


def test_merge_leaves_its_arguments_alone() -> None:
    a, b = random_partial(0), random_partial(1)
    before = a.out.clone(), a.lse.clone(), b.out.clone(), b.lse.clone()
    merge(a, b)
    assert all(torch.equal(x, y) for x, y in zip(before, (a.out, a.lse, b.out, b.lse), strict=True))


@pytest.mark.parametrize("gap", [50.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_differences_keep_the_larger_side(gap: float, dtype: torch.dtype) -> None:
    a, b = random_partial(0, dtype), random_partial(1, dtype)
    high = Partial(b.out, a.lse + gap)
    low = Partial(b.out, a.lse - gap)
    for merged, larger in ((merge(a, high), high), (merge(a, low), a)):
        torch.testing.assert_close(merged.out, larger.out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(merged.lse, larger.lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("field", ["out", "lse"])
def test_nan_propagates(side: str, field: str) -> None:
    a, b = random_partial(0), random_partial(1)
    bad = a if side == "left" else b
    if field == "out":
        bad.out[0, 2, 1] = math.nan
    else:
        bad.lse[0, 1, 2] = math.nan
    merged = merge(a, b)
    assert merged.out[0, 2, 1].isnan().all()
    assert merged.out.isnan().sum() == 4
    assert merged.lse.isnan().sum() == (field == "lse")


def test_nan_of_a_row_that_saw_nothing_propagates() -> None:
    a = random_partial(0)
    b = empty()
    b.out[0, 2, 1] = math.nan
    assert merge(a, b).out[0, 2, 1].isnan().all()


@pytest.mark.parametrize("rows", [slice(None), slice(2, 5), slice(1, 7, 2)])
def test_fold_is_merge_in_place_on_views(rows: slice) -> None:
    acc, block = random_partial(0), random_partial(1).rows(rows)
    expected_rows = merge(acc.rows(rows), block)
    expected = Partial(acc.out.clone(), acc.lse.clone())
    expected.out[:, rows], expected.lse[:, :, rows] = expected_rows.out, expected_rows.lse
    fold(acc.rows(rows), block.out, block.lse)
    assert_equal(acc, expected)


def test_fold_on_fresh_rows_reads_nothing_of_them() -> None:
    acc, block = random_partial(0), random_partial(1)
    acc.out.fill_(math.nan)
    acc.lse.fill_(math.nan)
    fold(acc, block.out, block.lse, fresh=True)
    assert_equal(acc, block)


@pytest.mark.parametrize("fresh", [True, False])
def test_fold_takes_blocks_of_lower_precision(fresh: bool) -> None:
    block = random_partial(1, torch.float32)
    acc = empty(torch.float32)
    fold(acc, block.out.bfloat16(), block.lse, fresh=fresh)
    assert acc.out.dtype == torch.float32
    assert torch.equal(acc.out, block.out.bfloat16().float())
    assert torch.equal(acc.lse, block.lse)


def test_fold_from_the_identity_equals_the_block() -> None:
    acc, block = empty(), random_partial(2)
    fold(acc, block.out, block.lse)
    assert_equal(acc, block)


def test_a_thousand_merges_do_not_drift() -> None:
    scores = torch.randn(3, 4000, dtype=torch.float64)
    values = torch.randn(4000, 4, dtype=torch.float64)
    acc = Partial.empty(1, 3, 1, 4, torch.float32, "cpu")
    for start in range(0, 4000, 4):
        keys = slice(start, start + 4)
        out = (scores[:, keys].softmax(-1) @ values[keys]).float()
        fold(acc, out[None, :, None], scores[:, keys].logsumexp(-1).float()[None, None])
    exact = scores.softmax(-1) @ values
    assert (acc.out[0, :, 0] - exact).abs().max() < 64 * torch.finfo(torch.float32).eps * values.abs().max()
    merges, lse = 1000, scores.logsumexp(-1)
    assert (acc.lse[0, 0] - lse).abs().max() < merges * torch.finfo(torch.float32).eps

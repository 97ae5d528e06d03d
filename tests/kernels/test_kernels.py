"""Every kernel against brute force in fp64: values, natural-log lse, gradients, strides, and refusals."""

import itertools
import math
import random

import pytest
import torch

import ringattn
from ringattn.kernels import KERNELS, Call, Grads, Kernel, choose, sdpa, sdpa_cuda
from ringattn.kernels.base import Needs
from ringattn.kernels.calls import TileKernel
from ringattn.kernels.partial import Partial
from ringattn.kernels.pieces import Piece, Shape, TileBand, flash_runs
from ringattn.kernels.scores import TileScores
from tests.support.one_tile import (
    DEVICES,
    SCALE,
    TILES,
    WANTED,
    Problem,
    assert_within_law,
    autograd_result,
    check_wanted,
    empty_partial,
    kernel_result,
    make_call,
    make_problem,
    rows_of,
    some_grads,
    zero_grads,
)
from tests.support.tiles import Window, attends


def test_tiles_are_trimmed() -> None:
    for tile in TILES:
        band = attends(*tile)
        assert band.any(0).all(), tile
        assert band.any(1).all(), tile


# FlashAttention's packages: test_flash.py
BUILT_IN = [kernel for kernel in KERNELS if kernel.name in ("sdpa", "blockwise", "reference")]
each_kernel = pytest.mark.parametrize("kernel", BUILT_IN, ids=lambda kernel: kernel.name)
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile[0]}x{tile[1]}-{tile[2]}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_tile
@each_kernel
def test_values_lse_and_gradients(
    kernel: Kernel, tile: tuple[int, int, Window], dtype: torch.dtype, device: str
) -> None:
    small = tile[0] * tile[1] < 200_000
    heads, batch = ((4, 2), 2) if small else ((2, 1), 1)
    assert_within_law(kernel, make_problem(*tile, dtype=dtype, heads=heads, device=device, batch=batch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(None, None), (None, 0), (7, None), (9, 3)], ids=str)
@each_kernel
def test_gradient_of_lse(kernel: Kernel, window: Window, dtype: torch.dtype, device: str) -> None:
    assert_within_law(kernel, make_problem(150, 150, window, dtype=dtype, device=device, with_dlse=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (4, 1), (8, 2)], ids=str)
@pytest.mark.parametrize("window", [(None, 0), (20, 5)], ids=str)
@each_kernel
def test_grouped_and_multi_query_heads(kernel: Kernel, window: Window, heads: tuple[int, int], device: str) -> None:
    assert_within_law(kernel, make_problem(257, 257, window, dtype=torch.float32, heads=heads, device=device))


@pytest.mark.parametrize("window", [(None, 0), (60, 0), (60, 30), (40, None)], ids=str)
@each_kernel
def test_two_tiles_make_one_attention(kernel: Kernel, window: Window) -> None:
    """Keys arrive in two tiles: the second folds into the first, and backward adds with the global out."""
    p = make_problem(200, 200, window, with_dlse=True)
    # a cut in the keys leaves two trimmed tiles; each has its own rows and its own bottom-right alignment
    cut, band = 90, attends(200, 200, window)
    acc, grads = empty_partial(p, 0.0), zero_grads(p)
    acc.lse.fill_(-math.inf)
    tiles = []
    for cols in (slice(0, cut), slice(cut, 200)):
        seen = band[:, cols].any(1).nonzero()
        rows = slice(int(seen[0]), int(seen[-1]) + 1)
        shift = (cols.stop - 1) - (rows.stop - 1)  # bottom-right corner against the global diagonal
        left, right = window
        moved = (None if left is None else left + shift, None if right is None else right - shift)
        moved = tuple(None if b is not None and b >= 200 else b for b in moved)
        local = attends(rows.stop - rows.start, cols.stop - cols.start, moved)
        assert torch.equal(local, band[rows, cols])
        tiles.append((rows, cols, moved))
    for rows, cols, moved in tiles:
        kernel.forward_tile(
            p.q[:, rows], p.k[:, cols], p.v[:, cols], TileScores(moved, SCALE), acc.rows(rows), fresh=False
        )
    for rows, cols, moved in tiles:
        part = rows_of(p, acc).rows(rows)
        kernel.backward_tile(part, p.k[:, cols], p.v[:, cols], TileScores(moved, SCALE), grads.tile(rows, cols))
    expected = autograd_result(p, torch.float64)
    for got, want in zip([acc.out, acc.lse, grads.dq, grads.dk, grads.dv], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (30, None), (20, 9)], ids=str)
@each_kernel
def test_strided_views_of_inputs_and_accumulators(kernel: Kernel, window: Window) -> None:
    p = make_problem(150, 150, window, with_dlse=True)
    expected = kernel_result(kernel, p)
    packed = torch.cat([p.k, p.v], -1).permute(1, 0, 2, 3).contiguous()  # [n, B, H, 2D] as it travels
    k, v = packed.permute(1, 0, 2, 3).chunk(2, -1)
    wide = Problem(p.q.repeat_interleave(2, 1)[:, ::2], k, v, p.dout.repeat_interleave(2, 1)[:, ::2], p.dlse, window)
    assert not (wide.q.is_contiguous() or wide.k.is_contiguous())
    acc_home, grads_home = empty_partial(p), zero_grads(p)
    home = Partial(acc_home.out.repeat_interleave(2, 1), acc_home.lse.repeat_interleave(2, 2))
    acc = home.rows(slice(0, None, 2))
    dkv = torch.zeros_like(packed)
    dk, dv = dkv.permute(1, 0, 2, 3).chunk(2, -1)
    grads = Grads(grads_home.dq.repeat_interleave(2, 1)[:, ::2], dk, dv)
    kernel.forward_tile(wide.q, wide.k, wide.v, TileScores(window, SCALE), acc, fresh=True)
    kernel.backward_tile(rows_of(wide, acc), wide.k, wide.v, TileScores(window, SCALE), grads)
    for got, want in zip([acc.out, acc.lse, grads.dq, grads.dk, grads.dv], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert home.out[:, 1::2].isnan().all(), "rows between the strided ones were written"


@pytest.mark.parametrize("window", [(None, 0), (20, 9)], ids=str)
@each_kernel
def test_gradients_that_are_not_wanted_are_left_out(kernel: Kernel, window: Window) -> None:
    p = make_problem(50, 50, window)
    acc, whole = empty_partial(p), zero_grads(p)
    kernel.forward_tile(p.q, p.k, p.v, TileScores(window, SCALE), acc, fresh=True)
    kernel.backward_tile(rows_of(p, acc), p.k, p.v, TileScores(window, SCALE), whole)
    for wanted in WANTED:
        grads = some_grads(p, wanted)
        kernel.backward_tile(rows_of(p, acc), p.k, p.v, TileScores(window, SCALE), grads)
        check_wanted(grads, wanted, whole)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (30, None), (20, 9)], ids=str)
@each_kernel
def test_backward_adds_to_what_is_there(kernel: Kernel, window: Window) -> None:
    p = make_problem(150, 150, window)
    acc, zeros, filled = empty_partial(p), zero_grads(p), zero_grads(p)
    kernel.forward_tile(p.q, p.k, p.v, TileScores(window, SCALE), acc, fresh=True)
    for x in (filled.dq, filled.dk, filled.dv):
        x.fill_(3.0)
    for grads in (zeros, filled):
        kernel.backward_tile(rows_of(p, acc), p.k, p.v, TileScores(window, SCALE), grads)
    for zero, three in ((zeros.dq, filled.dq), (zeros.dk, filled.dk), (zeros.dv, filled.dv)):
        assert zero.abs().max() > 0
        torch.testing.assert_close(zero + 3.0, three, rtol=1e-12, atol=1e-12)


@each_tile
@each_kernel
@pytest.mark.usefixtures("poison")
def test_uninitialised_memory_is_never_read(kernel: Kernel, tile: tuple[int, int, Window]) -> None:
    p = make_problem(*tile, dtype=torch.float32, with_dlse=True, batch=1)
    assert all(x.isfinite().all() for x in kernel_result(kernel, p))


@pytest.mark.parametrize("window", [(None, 0), (20, 0)], ids=str)
@each_kernel
def test_autocast_does_not_interfere(kernel: Kernel, window: Window) -> None:
    p = make_problem(150, 150, window, dtype=torch.float32, with_dlse=True)
    plain = kernel_result(kernel, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = kernel_result(kernel, p)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


@each_kernel
def test_nan_of_an_input_reaches_the_rows_that_see_it(kernel: Kernel) -> None:
    p = make_problem(150, 150, (20, 0), batch=1)
    p.v[0, 70] = math.nan
    acc = empty_partial(p)
    kernel.forward_tile(p.q, p.k, p.v, TileScores(p.window, SCALE), acc, fresh=True)
    bad = acc.out[0].isnan().flatten(1).any(1)
    assert bad[70:91].all()


@pytest.mark.parametrize("tile", [t for t in TILES if t[0] > 100], ids=str)
def test_cut_into_pieces_gives_the_same(tile: tuple[int, int, Window], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long tiles and wide windows take several operator calls; small limits show them on small tiles."""
    p = make_problem(*tile, with_dlse=True, batch=1)
    expected = autograd_result(p, torch.float64)
    for small in (range(9999, 10000), range(30, 31), range(20, 41), range(20, 1000)):  # plain, halved, masked blocks
        monkeypatch.setattr(sdpa, "SIZES", sdpa.Sizes(limit=100, triangle=64, narrow=0, small=small))
        for got, want in zip(kernel_result(sdpa.Sdpa(), p), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_pieces_cover_the_band_exactly_and_start_new_rows_whole() -> None:
    rng, checked = random.Random(0), 0
    bounds = [None, 0, 1, 2, 3, 5, 8, 13, 30]
    while checked < 400:
        tile = rng.randint(1, 24), rng.randint(1, 24), (rng.choice(bounds), rng.choice(bounds))
        band = attends(*tile)
        if not (band.any(0).all() and band.any(1).all()):
            continue
        checked += 1
        for limit, triangle, most in ((4, 2, 9), (5, 5, 1), (100, 3, 100), (100, 100, 2), (100, 100, 7)):
            covered, reached = torch.zeros(band.shape, dtype=torch.int), 0
            pieces = [half for whole in TileBand.of(*tile).pieces(limit, triangle) for half in whole.halves(most)]
            for piece in pieces:
                ones = torch.ones_like(covered[piece.rows, piece.cols])
                assert 0 < ones.size(0) <= limit
                assert 0 < ones.size(1) <= limit
                if piece.rows.stop > reached:
                    assert piece.rows.start == reached
                    reached = piece.rows.stop
                if piece.shape is not Shape.FULL:
                    assert ones.size(0) == ones.size(1)
                    ones = ones.tril() if piece.shape is Shape.LOWER else ones.triu()
                covered[piece.rows, piece.cols] += ones
            assert reached == tile[0]
            assert torch.equal(covered, band.int()), (tile, limit, triangle, most)


@pytest.mark.parametrize("most", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_windows_reach_as_far_as_the_gpus_operator_needs(most: int) -> None:
    """It takes a bound of at least nk for none, the absent one of two for nk, and aligns at the bottom right."""
    bounds, sizes = [None, *range(most + 2), 30], range(1, most + 1)
    for nq, nk, window in itertools.product(sizes, sizes, itertools.product(bounds, bounds)):
        band = attends(nq, nk, window)
        if not (band.any(0).all() and band.any(1).all()):
            continue
        found = torch.zeros_like(band, dtype=torch.int)
        for run in flash_runs(TileBand.of(nq, nk, window)):
            part = found[run.rows, run.cols]
            assert run.band.nq == part.size(0) and run.band.nk == part.size(1)
            left, right = (b if 0 <= b < run.band.nk else None for b in sdpa_cuda._flash_window(run.band))
            if (left, right) != (None, None):
                left, right = (run.band.nk if bound is None else bound for bound in (left, right))
            seen = attends(run.band.nq, run.band.nk, (left, right))
            assert seen.any(1).all(), "no row is empty"
            part += seen
        assert torch.equal(found, band.int()), (nq, nk, window)


def test_auto_takes_the_first_that_does_not_refuse() -> None:
    assert choose("auto", make_call(), KERNELS).name == "sdpa"
    assert choose("auto", make_call(v_head_dim=32), KERNELS).name == "blockwise"
    assert choose("auto", make_call(features=frozenset({"softcap"})), KERNELS).name == "blockwise"
    assert choose("reference", make_call(), KERNELS).name == "reference"


def test_an_explicit_kernel_never_falls_back() -> None:
    with pytest.raises(NotImplementedError, match=r"'sdpa'.*v_head_dim 32 must equal head_dim 64"):
        choose("sdpa", make_call(v_head_dim=32), KERNELS)


def test_a_kernel_says_what_it_lacks_here() -> None:
    class Elsewhere(TileKernel):
        name, reads_delta = "elsewhere", False
        needs = Needs(frozenset({"cpu"}), packages={"numpy": ">=1.0", "no-such-package": ">=2.5,!=2.6"})

        def refuse(self, call: Call) -> None:
            raise AssertionError("not asked, as it cannot run")

    with pytest.raises(NotImplementedError, match=r"no-such-package>=2.5,!=2.6 is needed, found none: pip install"):
        choose("elsewhere", make_call(), [Elsewhere()])
    assert choose("auto", make_call(), [Elsewhere(), *KERNELS]).name == "sdpa"
    Elsewhere.needs = Needs(packages={"numpy": ">=999"})
    with pytest.raises(NotImplementedError, match=r"numpy>=999 is needed, found \d"):
        choose("elsewhere", make_call(), [Elsewhere()])


def test_what_backward_cannot_give_is_refused_before() -> None:
    """On CUDA the gradient of lse takes eight more head columns, of which flash has 256."""
    for head_dim, dlse, refused in ((248, True, False), (256, True, True), (256, False, False)):
        call = Call("cuda", torch.bfloat16, head_dim, head_dim, 4, 2, dlse=dlse)
        assert ("where lse has a gradient" in (sdpa.Sdpa().refuse(call) or "")) == refused


def test_auto_without_a_fit_lists_every_reason() -> None:
    call = make_call(features=frozenset({"softcap", "warp"}))
    reasons = r"sdpa: softcap, warp.*kernel='blockwise'.*blockwise: warp .*reference: warp "
    with pytest.raises(NotImplementedError, match=reasons) as error:
        choose("auto", call, KERNELS)
    assert "head_dim 64" in str(error.value)


def test_an_unknown_kernel_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'sdap'.*'sdpa'.*auto, .*sdpa, triton, blockwise, reference"):
        choose("sdap", make_call(), KERNELS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.int32}, r"int32"),
        ({"dtype": torch.complex64}, r"complex64"),
        ({"device_type": "mps"}, r"'mps'"),
        ({"features": frozenset({"dropout", "bias"})}, r"bias, dropout.*kernel='blockwise'"),
    ],
)
def test_sdpa_says_why_it_refuses(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        choose("sdpa", make_call(**changes), KERNELS)


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 40, 97, 130])
def test_halves_cover_a_triangle_exactly_and_start_new_rows_whole(shape: Shape, size: int) -> None:
    covered, reached = torch.zeros(size + 3, size + 5, dtype=torch.int), 3
    for part in Piece(slice(3, size + 3), slice(5, size + 5), shape).halves(16):
        ones = torch.ones_like(covered[part.rows, part.cols])
        if part.shape is not Shape.FULL:
            assert ones.size(0) == ones.size(1) <= 16
            ones = ones.tril() if part.shape is Shape.LOWER else ones.triu()
        covered[part.rows, part.cols] += ones
        assert part.rows.start <= reached, "no row is passed over"
        reached = max(reached, part.rows.stop)
    square = torch.ones(size, size, dtype=torch.int)
    expected = {Shape.FULL: square, Shape.LOWER: square.tril(), Shape.UPPER: square.triu()}[shape]
    assert torch.equal(covered[3:, 5:], expected) and covered.sum() == expected.sum()


@pytest.mark.parametrize("size", [200, 300, 900, 1500, 1700, pytest.param(3300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [(None, 0), (0, None)], ids=str)
def test_triangles_of_every_size(size: int, window: Window) -> None:
    """Small ones are one operator call, middle ones masked blocks, large ones halves of these."""
    assert_within_law(sdpa.Sdpa(), make_problem(size, size, window, torch.float32, heads=(2, 1), batch=1, head_dim=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("seqlen", [1, 2, 4, 8, 15, 16, 24])
@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_nan_however_few_keys_there_are(device, dtype, seqlen):
    """Forward and backward, like dense attention, in q and in every key."""
    for mask in (ringattn.causal(), ringattn.full(), ringattn.sliding_window(3)):
        for spoilt in ("q", "k"):
            generator = torch.Generator().manual_seed(seqlen)
            shapes = ((1, seqlen, h, 16) for h in (2, 1, 1, 2))
            q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
            if spoilt == "q":
                q[0, seqlen // 2, 1, 3] = torch.nan
            else:
                k[...] = torch.nan
            leaves = [x.requires_grad_() for x in (q, k, v)]
            cp = ringattn.ContextParallel(None, seqlen, mask=mask)
            out, lse = ringattn.attention(*leaves, cp=cp, return_lse=True)
            found = torch.autograd.grad(out, leaves, dout)
            exact = [x.detach().double().transpose(1, 2).requires_grad_() for x in leaves]
            scores = exact[0] @ exact[1].transpose(2, 3) / 4
            seen = scores.masked_fill(~mask.dense(seqlen, seqlen).to(device), -torch.inf)
            right = seen.softmax(-1) @ exact[2]
            assert torch.equal(out.isnan(), right.isnan().transpose(1, 2)), (mask, spoilt)
            assert torch.equal(lse.isnan(), seen.logsumexp(-1).isnan()), (mask, spoilt)
            grads = torch.autograd.grad(right, exact, dout.double().transpose(1, 2))
            assert torch.equal(found[0].isnan(), grads[0].isnan().transpose(1, 2)), (mask, spoilt)

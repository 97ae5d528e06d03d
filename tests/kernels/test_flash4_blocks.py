"""FlashAttention-4 over block maps, on a package that only looks like it: tables in many pieces, what is written where,
and every limit that must be refused or translated."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.geometry.tiles import NO_TILES, Tile, Tiles
from ringattn.kernels import Call, Grads, Rows, TileCalls, block_map, choose, flash4_blocks
from ringattn.kernels.base import _installed
from ringattn.kernels.block_map import BlockSize
from ringattn.kernels.flash4_blocks import Flash4Blocks, Package, block_size, divided
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Scores, TileScores
from ringattn.planning.launches import Launch
from ringattn.runtime import binding
from ringattn.testing import dense_results
from tests.support import flash_packages
from tests.support.block_sparse import mask_mod
from tests.support.flash_packages import call_of
from tests.support.one_tile import (
    SCALE,
    TILES,
    assert_few_roundings,
    empty_partial,
    make_problem,
    rows_of,
    zero_grads,
)
from tests.support.tiles import OneTile, rms

SEQLEN, HEADS, KV_HEADS, DIM = 600, 4, 2, 16
RNG = np.random.default_rng(0)
MASKS = {
    "full": ra.full(),
    "causal": ra.causal(),
    "documents and window": ra.documents([0, 5, 6, 140, 341, 341, 357, 600]) & ra.sliding_window(90),
    "bigbird": ra.bigbird(32, 3, 1, 2),
    "bigbird, not causal": ra.bigbird(24, 3, 2, 1, causal=False),
    "chunked": ra.chunked(50),
    "strided by 2": ra.strided(2),
    "strided by 7": ra.strided(7),
    "dilated": ra.dilated(2, 60),
    "few scattered globals": ra.longformer(40, [2, 190, 430, 431]),
    "many scattered globals": ra.sliding_window(30) | ra.global_tokens(np.unique(RNG.integers(0, SEQLEN, 99)).tolist()),
    "steps within steps": ra.strided(6) | (ra.dilated(2, 90) & ra.causal()),
}


def made(arch=9):
    """The kernel, and the package it runs on."""
    interface = flash_packages.flash4(arch)
    package = Package(interface, mask_mod)
    return Flash4Blocks(load=lambda: package), interface


# -- a tile, and tables ------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [t for t in TILES if t[0] * t[1] < 300_000], ids=str)
def test_tiles_of_every_kind(tile):
    assert_few_roundings(OneTile(made()[0]), make_problem(*tile, dtype=torch.bfloat16))


@pytest.mark.parametrize("window", [(None, None), (None, 0), (20, 5)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (8, 2)], ids=str)
def test_a_gradient_of_lse_shared_heads_and_softcap(window, heads):
    p = make_problem(190, 190, window, dtype=torch.float16, heads=heads, with_dlse=True)
    assert_few_roundings(OneTile(made()[0]), p)


@pytest.mark.parametrize("dim", [128, 192, 256])
def test_head_sizes_have_blocks_of_their_own(dim):
    """The package refuses blocks of others."""
    assert_few_roundings(
        OneTile(made()[0]), make_problem(200, 330, (150, 0), dtype=torch.bfloat16, head_dim=dim, batch=1)
    )


def test_a_softcap_is_handed_on():
    p = make_problem(190, 190, (40, 0), dtype=torch.bfloat16, batch=1)
    results = {}
    for name, kernel in (("blocks", OneTile(made()[0])), ("reference", ra.kernels.reference.Reference())):
        for softcap in (None, 0.7):
            scores, acc = TileScores(p.window, SCALE, softcap), empty_partial(p)
            kernel.forward_tile(p.q, p.k, p.v, scores, acc, fresh=True)
            grads, rows = zero_grads(p), rows_of(p, acc)
            kernel.backward_tile(rows, p.k, p.v, scores, grads)
            results[name, softcap] = torch.cat([x.flatten() for x in (acc.out, grads.dq, grads.dk, grads.dv)])
    for softcap in (None, 0.7):
        assert rms(results["blocks", softcap] - results["reference", softcap]) < 0.01
    assert rms(results["blocks", 0.7] - results["reference", None]) > 0.05, "it changes something"


def test_blocks_of_devices():
    sizes = [block_size(dim, (9, 0)) for dim in (8, 64, 128, 136, 192, 200, 256)]
    assert sizes == [(128, 128)] * 3 + [(128, 96)] * 2 + [(128, 64)] * 2
    assert block_size(64, (10, 0)) == block_size(128, (11, 0)) == (256, 128)


def pairs_of(tiles, rows, cols):
    found = torch.zeros(rows, cols, dtype=torch.bool)
    for tile in tiles:
        q, k = torch.arange(rows)[tile.q], torch.arange(cols)[tile.k]
        ahead = len(k) - len(q) + torch.arange(len(q))[:, None] - torch.arange(len(k))
        left, right = (math.inf if bound is None else bound for bound in tile.window)
        found[q[:, None], k] |= (ahead <= left) & (-ahead <= right)
    return found


@pytest.mark.parametrize("arch", [9, 10])
@pytest.mark.parametrize("apart", [False, True])
def test_a_step_adds_to_what_is_there_and_writes_what_is_not(arch, apart, monkeypatch):
    """Rows and columns that hold something, that hold nothing yet, and that a step does not touch, which it must leave
    as they are: nothing was written to them, or more than this step knows."""
    monkeypatch.setattr(flash4_blocks, "CALL", 0)
    kernel, _ = made(arch)
    nq, nk = 700, 900
    boxes = [(100, 60, 1, 200, 60, 1, -59, 0), (300, 200, 1, 250, 300, 1, 20, 99), (420, 130, 1, 640, 100, 1, -129, 99)]
    few = Tile(np.array([40, 41, 330, 690]), np.array([3, 260, 890]), (None, None), 12)
    tiles = Tiles(np.array(boxes), (few,) if apart else ())
    # the first and the last are the first to touch their rows, the second is not, nor is any of some columns
    begins = [(True, True), (False, True), (False, False), (True, True)]
    launches = [
        Launch(t.q, t.k, t.window, t.area, 1, *fresh) for t, fresh in zip(tiles, begins[: len(tiles)], strict=True)
    ]
    call = Call("cpu", torch.bfloat16, DIM, DIM, HEADS, KV_HEADS, capability=(arch, 0))
    calls = TileCalls(tiles, tuple(launches), (), Scores(0.3), None, torch.device("cpu"))
    calls = kernel.ready(calls, call)
    q, dout = (torch.randn(2, nq, HEADS, DIM).bfloat16() for _ in range(2))
    k, v = (torch.randn(2, nk, KV_HEADS, DIM).bfloat16() for _ in range(2))
    seen = pairs_of(tiles, nq, nk)
    dense = dense_results(
        *(x.double() for x in (q, k, v)), seen, dout.double(), torch.zeros(2, HEADS, nq).double(), scale=0.3
    )
    fresh_rows, fresh_cols = np.zeros(nq, bool), np.zeros(nk, bool)
    for launch in launches:
        fresh_rows[launch.q] |= launch.fresh
        fresh_cols[launch.k] |= launch.fresh_keys
    acc = Partial(torch.randn(2, nq, HEADS, DIM), torch.randn(2, HEADS, nq).double())
    before = Partial(acc.out.clone(), acc.lse.clone())
    acc.out[:, fresh_rows], acc.lse[:, :, fresh_rows] = math.nan, math.nan
    kernel.forward(q, k, v, calls, acc)
    before.out[:, fresh_rows], before.lse[:, :, fresh_rows] = 0.0, -math.inf
    want = ra.kernels.partial.merge(before, Partial(dense.out.float(), dense.lse))
    assert rms(acc.out - want.out) < 0.005 and rms(acc.lse.nan_to_num(0, 0, 0) - want.lse.nan_to_num(0, 0, 0)) < 1e-4
    assert torch.equal(acc.out[:, ~seen.any(1)], before.out[:, ~seen.any(1)]), "rows that no tile has"
    # backward
    grads = Grads(*(torch.randn(x.shape) for x in (q, k, v)))
    held = [grads.dq.clone(), grads.dk.clone(), grads.dv.clone()]
    for x, old, fresh in zip((grads.dq, grads.dk, grads.dv), held, (fresh_rows, fresh_cols, fresh_cols), strict=True):
        x[:, fresh], old[:, fresh] = math.nan, 0.0
    rows = Rows(q, dout, dense.out.bfloat16(), dense.lse.float(), None, None)
    kernel.backward(rows, k, v, calls, grads)
    for got, old, new in zip((grads.dq, grads.dk, grads.dv), held, dense[2:], strict=True):
        assert rms(got - old - new.float()) < 0.01
    assert torch.equal(grads.dk[:, ~seen.any(0)], held[1][:, ~seen.any(0)])


# -- rings ---------------------------------------------------------------------------------------------


def inputs(dim=DIM, device="cpu"):
    """q, k, v and dout of the whole sequence."""
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    return [torch.randn(1, SEQLEN, count, dim).to(device, torch.bfloat16) for count in heads]


def of_one_rank(transport, mask, q, k, v, dout, **settings):
    """Results and gradients over the whole sequence, and a description."""
    cp = ra.ContextParallel(transport, SEQLEN, mask=mask, kernel="flash4_blocks", **settings)
    local = [cp.shard(x).requires_grad_() for x in (q, k, v)]
    out, lse = ra.attention(*local, cp=cp, return_lse=True)
    out.backward(cp.shard(dout))
    whole = [cp.unshard(out.detach()), cp.unshard(lse.detach(), dim=2), *(cp.unshard(x.grad) for x in local)]
    return whole, cp.describe()


def dense_of(mask, q, k, v, dout):
    """The same of dense attention in fp64."""
    zero = torch.zeros(1, HEADS, SEQLEN, device=q.device).double()
    seen = mask.dense(SEQLEN, SEQLEN).to(q.device)
    return dense_results(q.double(), k.double(), v.double(), seen, dout.double(), zero)


def attention(kernel, monkeypatch, mask, world, **settings):
    """What the ranks of a ring have, and what they must."""
    monkeypatch.setattr(Flash4Blocks, "needs", ra.kernels.base.Needs())
    monkeypatch.setattr(binding, "KERNELS", (kernel,))
    tensors = inputs()
    found = ra.Loopback(world).run(lambda transport: of_one_rank(transport, mask, *tensors, **settings))
    return found, dense_of(mask, *tensors)


def assert_near(whole, dense):
    for a, b in zip(whole, dense, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        assert rms((a.double() - b)[finite]) < 0.01 * max(1.0, b[finite].abs().max().item())


@pytest.mark.parametrize(("world", "layout"), [(1, "contiguous"), (3, "zigzag"), (3, "striped")])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_in_many_pieces(mask, world, layout, monkeypatch):
    found, dense = attention(made()[0], monkeypatch, mask, world, layout=layout)
    for whole, told in found:
        assert "flash4_blocks" in told
        assert_near(whole, dense)


@pytest.mark.parametrize("mask", [MASKS["bigbird"], MASKS["documents and window"], MASKS["strided by 2"]], ids=str)
def test_a_step_of_many_tiles_is_one_call(mask, monkeypatch):
    kernel, interface = made()
    cp = ra.ContextParallel(None, SEQLEN, mask=mask, kernel="reference")
    assert sum(len(work.tiles) for turn in cp.program(mask).forward for work in turn.work) > 1
    attention(kernel, monkeypatch, mask, 1)
    assert [call[0] for call in interface.calls] == ["forward", "backward"] * 2, "the probe's, and one a pass"
    assert all(call[1:4] == (None, None, None) for call in interface.calls), "no window, no sequences"


@pytest.mark.parametrize(
    "name", ["strided by 7", "few scattered globals", "many scattered globals", "steps within steps"]
)
@pytest.mark.parametrize("world", [1, 3])
def test_stepped_and_scattered_tokens_apart(name, world, monkeypatch):
    """As they are where there are many blocks: gathered, in calls of their own, beside the map or without one."""
    monkeypatch.setattr(flash4_blocks, "CALL", 0)
    kernel, interface = made()
    found, dense = attention(kernel, monkeypatch, MASKS[name], world, layout="contiguous")
    assert len(interface.calls) > 2 + 2 * world
    for whole, _ in found:
        assert_near(whole, dense)


def test_tiles_are_apart_where_that_is_fewer_blocks():
    size, many = BlockSize(128, 128), 9000
    few, half = np.arange(0, many, 400), np.flatnonzero(np.arange(many) % 3)
    everyone, some = slice(0, many, 1), slice(0, 90, 1)
    products = [Tile(q, k, (None, None), 0) for q, k in ((everyone, few), (everyone, half), (few, few), (few, some))]
    boxes = np.array(
        [
            (5, many, 1, 0, many, 1, 0, 9),
            (0, 900, 9, 0, 900, 9, 0, 9),
            (0, 30, 9, 0, 30, 9, 0, 9),
            (0, many, 1, 7, 1, 9, 0, 9),
        ]
    )
    mapped, apart = divided(Tiles(boxes, tuple(products)), size)
    assert apart.boxes.tolist() == boxes[[1]].tolist() and apart.products == (products[0], products[1], products[2])
    assert mapped.boxes.tolist() == boxes[[0, 2, 3]].tolist() and mapped.products == (products[3],)
    assert len(divided(NO_TILES, size)[0]) == 0


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"deterministic": True}, "adds gradients of a query up in any order; kernel='triton' has one order"),
        ({"dtype": torch.float32}, "must be float16 or bfloat16"),
        ({"head_dim": 100, "v_head_dim": 100}, "head_dim 100 must be a multiple of 8"),
        ({"head_dim": 264, "v_head_dim": 264}, "at most 256"),
        ({"capability": (10, 0), "head_dim": 192}, "head_dim 192 must be a multiple of 8 and at most 128"),
        ({"capability": (10, 0), "head_dim": 256, "v_head_dim": 256}, "at most 128"),
        ({"v_head_dim": 64}, "where heads share KV heads"),
        ({"features": frozenset({"dropout"})}, "dropout: not computed by flash4_blocks"),
        ({"features": frozenset({"bias"})}, "bias: not computed by flash4_blocks"),
        ({"features": frozenset({"alibi", "softcap"})}, "alibi: not computed by flash4_blocks"),
    ],
)
def test_what_is_refused(changes, reason):
    with pytest.raises(AssertionError, match=reason):
        assert made()[0].refuse(call_of(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (8, 0)}, "8.0, is older than 9.0"),
        ({"capability": (12, 0)}, "12.0, is none that it computes right on"),
        ({}, "package"),
        ({"sm_margin": 4}, "cannot leave multiprocessors free"),
    ],
)
def test_devices_and_packages_are_named(changes, reason):
    """Compute capability 8 takes lists of blocks and forgets them; here the package is missing."""
    with pytest.raises(NotImplementedError, match=f"'flash4_blocks' cannot compute .*{reason}"):
        choose("flash4_blocks", call_of(**changes), ra.kernels.KERNELS)


def test_it_is_taken_by_name_only(monkeypatch):
    kernel = made()[0]
    monkeypatch.setattr(Flash4Blocks, "needs", ra.kernels.base.Needs())
    with pytest.raises(NotImplementedError, match="flash4_blocks: taken by name only on 'cuda'"):
        choose("auto", call_of(), [kernel])


def test_a_mask_whose_map_is_too_large_is_refused_by_all(monkeypatch):
    monkeypatch.setattr(block_map, "LARGEST", 1000)
    with pytest.raises(NotImplementedError, match=r"bytes, at most 1,000: .* kernel='triton' computes such a mask"):
        attention(made()[0], monkeypatch, MASKS["bigbird"], 3)


@pytest.mark.parametrize("left_out", ["mask_mod", "block_sparse_tensors", "softmax_scale"])
def test_a_package_that_computes_something_else_is_one_clear_refusal(left_out):
    """As older ones do, which drop what they do not know."""
    interface = flash_packages.flash4()
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        asked = getattr(interface, name)
        setattr(interface, name, lambda *x, asked=asked, **said: asked(*x, **(said | DROPPED[left_out])))
    kernel = Flash4Blocks(load=lambda: Package(interface, mask_mod))
    reason = kernel.refuse(call_of(device_type="cpu"))
    assert "flash4_blocks computes something else here" in reason and "flash-attn-4 4.0.0b36" in reason
    assert made()[0].refuse(call_of(device_type="cpu")) is None
    assert made(10)[0].refuse(call_of(device_type="cpu", capability=(10, 0))) is None


DROPPED = {
    "mask_mod": {"mask_mod": None}, "block_sparse_tensors": {"block_sparse_tensors": None, "mask_mod": None},
    "softmax_scale": {"softmax_scale": 1.0},
}  # fmt: skip


# -- the package itself ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dim"),
    [("bigbird", 64), ("bigbird", 128), ("bigbird", 192), ("bigbird", 256), *((name, 128) for name in MASKS)],
)
def test_on_a_gpu(name, dim):
    kernel, capability = Flash4Blocks(), torch.cuda.get_device_capability()
    call = call_of(head_dim=dim, v_head_dim=dim, num_heads=HEADS, num_kv_heads=KV_HEADS, capability=capability)
    reason = kernel.needs.lacking(call) or kernel.refuse(call)
    if reason is not None:
        pytest.skip(f"flash4_blocks refuses: {reason}")
    tensors = inputs(dim, "cuda")
    whole, _ = of_one_rank(None, MASKS[name], *tensors)
    assert_near(whole, dense_of(MASKS[name], *tensors))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("major", [9, 10])
def test_both_adapters_compile_with_the_package(major):
    """No GPU is needed for that, but the package is; and what is compiled of a pair's question answers as it must."""
    if _installed("flash-attn-4") is None:
        pytest.skip("flash-attn-4 is not installed: pip install --pre 'ringattn[flash4]'")
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.compiled_flash4", str(major)]
    target = {
        "FLASH_ATTENTION_ARCH": f"sm_{major}0",
        "CUTE_DSL_ARCH": f"sm_{major}0a",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | target).stdout
    assert told.count(" asked here\n") == 4 and told.count(" compiled\n") == (6 if major == 9 else 3) + 8

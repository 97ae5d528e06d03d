"""The `triton` kernel on one tile, against brute force in fp64, and its place among the kernels.

Without a GPU, Triton's interpreter runs it, some milliseconds for each block of scores.
"""

import math
import os
import subprocess
import sys

import pytest
import torch

from ringattn.kernels import KERNELS, Grads, Rows, base, choose
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import TileScores
from ringattn.kernels.triton_tiles import kernel as module
from ringattn.kernels.triton_tiles.sizes import SHARED
from tests.support.grids import mostly_slow
from tests.support.one_tile import (
    DEVICES,
    SCALE,
    TILES,
    WANTED,
    assert_within_law,
    check_wanted,
    empty_partial,
    kernel_result,
    make_call,
    make_problem,
    rows_of,
    some_grads,
    zero_grads,
)
from tests.support.tiles import OneTile, Window

TRITON = next(kernel for kernel in KERNELS if kernel.name == "triton")
CAUSAL, FULL = (None, 0), (None, None)

FEW: list[tuple[int, int, Window]] = [
    (1, 1, FULL),
    (1, 63, FULL),
    (63, 1, FULL),
    (127, 257, FULL),
    (127, 127, CAUSAL),
    (63, 257, (None, 20)),
    (257, 127, (None, 131)),
    (257, 127, (140, None)),
    (127, 257, (140, None)),
    (257, 127, (140, 140)),
    (200, 200, (63, 0)),
    (127, 127, (30, 17)),
    (5, 3, (None, 3)),
]


# those that are not among them and do not take the interpreter half a minute, and one long one
INTERPRETED = [tile for tile in TILES if tile not in FEW and tile[0] * tile[1] < 40_000] + [(1000, 1000, (63, 0))]


@pytest.fixture(autouse=True)
def _interpreted():
    pytest.importorskip("triton")


# -- one tile ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", mostly_slow(FEW, FEW[1:8:2]), ids=lambda tile: f"{tile[0]}x{tile[1]}-{tile[2]}")
@pytest.mark.usefixtures("poison")
def test_one_tile(tile, device):
    p = make_problem(*tile, dtype=torch.float32, heads=(2, 1), batch=1, device=device, with_dlse=True)
    assert_within_law(OneTile(TRITON), p)


@pytest.mark.slow
@pytest.mark.parametrize("tile", INTERPRETED, ids=lambda tile: f"{tile[0]}x{tile[1]}-{tile[2]}")
def test_every_tile(tile):
    """On a GPU: test_conformance.py."""
    assert_within_law(OneTile(TRITON), make_problem(*tile, dtype=torch.float32, heads=(2, 1), batch=1))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_are_fresh_are_written_and_others_added_to(device):
    p = make_problem(50, 70, (None, 9), dtype=torch.float32, heads=(2, 1), batch=1, device=device)
    acc, added = empty_partial(p), zero_grads(p)
    OneTile(TRITON).forward_tile(p.q, p.k, p.v, TileScores(p.window, SCALE), acc, fresh=True)
    OneTile(TRITON).backward_tile(rows_of(p, acc), p.k, p.v, TileScores(p.window, SCALE), added)
    for fresh in ((True, False), (False, True), (True, True)):
        dq, dk, dv = (
            torch.full_like(x, math.nan if first else 2.0)
            for x, first in zip((added.dq, added.dk, added.dv), (fresh[0], fresh[1], fresh[1]), strict=True)
        )
        grads = Grads(dq, dk, dv, *fresh)
        OneTile(TRITON).backward_tile(rows_of(p, acc), p.k, p.v, TileScores(p.window, SCALE), grads)
        for found, want, first in zip(
            (dq, dk, dv), (added.dq, added.dk, added.dv), (fresh[0], *2 * fresh[1:]), strict=True
        ):
            torch.testing.assert_close(found, want if first else want + 2.0)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_are_not_wanted_are_left_out(device):
    p = make_problem(20, 30, (None, 9), dtype=torch.float32, heads=(2, 1), batch=1, device=device)
    acc, whole = empty_partial(p), zero_grads(p)
    OneTile(TRITON).forward_tile(p.q, p.k, p.v, TileScores(p.window, SCALE), acc, fresh=True)
    OneTile(TRITON).backward_tile(rows_of(p, acc), p.k, p.v, TileScores(p.window, SCALE), whole)
    for wanted in WANTED:
        grads = some_grads(p, wanted)
        OneTile(TRITON).backward_tile(rows_of(p, acc), p.k, p.v, TileScores(p.window, SCALE), grads)
        check_wanted(grads, wanted, whole)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, device):
    p = make_problem(100, 130, (60, 10), dtype=dtype, heads=(2, 1), batch=1, device=device, with_dlse=True)
    assert_within_law(OneTile(TRITON), p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", mostly_slow([(3, 3), (3, 1), (8, 2), (8, 1)], [(3, 1)]), ids=str)
def test_heads_that_share_keys(heads, device):
    """Three of them do not divide a block's rows."""
    assert_within_law(OneTile(TRITON), make_problem(70, 90, (30, 5), torch.float32, heads, device=device, batch=1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", mostly_slow([1, 32, 64, 80, 96], [1, 80]))
def test_head_sizes(head_dim, device):
    p = make_problem(65, 70, (40, 5), torch.float32, (2, 1), head_dim=head_dim, batch=2, device=device)
    assert_within_law(OneTile(TRITON), p)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_large_heads_on_a_device(head_dim, dtype):
    assert_within_law(OneTile(TRITON), make_problem(500, 700, (300, 5), dtype, (8, 2), True, "cuda", head_dim))


def test_strided_views_and_rows_between_them():
    p = make_problem(70, 70, (30, 5), torch.float32, (2, 1), with_dlse=True, batch=2)
    want = kernel_result(OneTile(TRITON), p)
    wide = torch.cat([p.k, p.v], -1).permute(1, 0, 2, 3).contiguous()
    k, v = wide.permute(1, 0, 2, 3).chunk(2, -1)
    q, dout = (x.repeat_interleave(2, 1)[:, ::2] for x in (p.q, p.dout))
    home = Partial(torch.full((2, 140, 2, 16), math.nan), torch.full((2, 2, 140), math.nan, dtype=torch.float64))
    acc = home.rows(slice(0, None, 2))
    OneTile(TRITON).forward_tile(q, k, v, TileScores(p.window, SCALE), acc, True)
    grads = Grads(torch.ones(2, 140, 2, 16)[:, ::2], *torch.ones_like(wide).permute(1, 0, 2, 3).chunk(2, -1))
    out = acc.out.to(q.dtype)
    delta = (dout * out).sum(-1).transpose(1, 2) - p.dlse
    OneTile(TRITON).backward_tile(
        Rows(q, dout, out, acc.lse.float(), delta, p.dlse), k, v, TileScores(p.window, SCALE), grads
    )
    for got, exact in zip((acc.out, acc.lse, grads.dq - 1, grads.dk - 1, grads.dv - 1), want, strict=True):
        torch.testing.assert_close(got.float(), exact, rtol=1e-6, atol=2e-6)
    assert home.out[:, 1::2].isnan().all() and home.lse[:, :, 1::2].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_reaches_the_rows_that_see_it(name):
    p = make_problem(100, 100, CAUSAL, torch.float32, (1, 1), batch=1)
    getattr(p, name)[0, 70, 0, 3] = math.nan
    out, lse, dq, *_ = kernel_result(OneTile(TRITON), p)
    seen = slice(70, 71) if name == "q" else slice(70, 100)
    assert out[0, seen, 0].isnan().any(-1).all() and dq[0, seen, 0].isnan().any(-1).all()
    assert out[0, :64].isfinite().all(), "rows of other blocks do not see it"
    assert (name == "v") or lse[0, 0, seen].isnan().all()


def test_a_result_in_the_dtype_of_storage():
    p = make_problem(40, 50, (30, 20), torch.float16, (2, 1), batch=1)
    found = []
    for dtype in (torch.float32, torch.float16):
        acc = Partial.unset(1, 40, 2, 16, dtype, "cpu")
        OneTile(TRITON).forward_tile(p.q, p.k, p.v, TileScores(p.window, SCALE), acc, True)
        found.append(acc.out)
    assert torch.equal(found[0].half(), found[1])


# -- the choice ----------------------------------------------------------------------------------


def test_on_the_cpu_it_is_never_chosen_but_by_name():
    assert choose("triton", make_call(), KERNELS).name == "triton"
    assert choose("auto", make_call(features=frozenset({"softcap"})), KERNELS).name == "blockwise"
    with pytest.raises(NotImplementedError, match=r"triton: taken by name only on 'cpu'"):
        choose("auto", make_call(), [TRITON])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, r"float64 must be one of float16, bfloat16, float32; kernel='blockwise' takes"),
        ({"head_dim": 257}, r"head_dim 257 must be at most 256.*kernel='blockwise'"),
        ({"v_head_dim": 300}, r"v_head_dim 300 must be at most 256"),
        (
            {"features": frozenset({"softcap", "warp"})},
            r"warp is none of what it does to scores \(alibi, bias, dropout",
        ),
        ({"device_type": "mps"}, r"'mps'"),
    ],
)
def test_it_says_why_it_refuses(changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        choose("triton", make_call(**changes), KERNELS)


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(module, "_interprets", lambda: False)
    with pytest.raises(NotImplementedError, match=r"TRITON_INTERPRET=1"):
        choose("triton", make_call(), KERNELS)
    monkeypatch.setattr(base, "_installed", lambda package: None)
    with pytest.raises(
        NotImplementedError, match=r"triton>=3.6 is needed, found none: pip install 'ringattn\[triton\]'"
    ):
        choose("triton", make_call(), KERNELS)


def test_tf32_only_where_it_is_asked_for():
    asked = torch.get_float32_matmul_precision()
    assert module._precision(torch.zeros(1)) == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert module._precision(torch.zeros(1)) == "tf32"
        assert module._precision(torch.zeros(1, dtype=torch.float16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(asked)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_it_compiles_for_devices_and_fits_their_memory(capability, tmp_path):
    """What the interpreter runs is no proof that Triton compiles it. No GPU is needed for that."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compiled", *map(str, capability)]
    settings = {"env": environment | {"TRITON_CACHE_DIR": str(tmp_path)}, "text": True}
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, **settings).stdout.split()
    kernels = ["forward_tiles", "backward_queries", "backward_keys"] * 3
    assert made[::2] == [*kernels, "fold", "fold", "accumulate", "accumulate"]
    assert max(map(int, made[1::2])) <= SHARED[capability]


@pytest.mark.slow
def test_importing_the_library_imports_no_triton():
    code = "import sys, ringattn.kernels; assert not any(name.split('.')[0] == 'triton' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

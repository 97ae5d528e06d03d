"""What the `triton` kernel does to scores, against the formulas in fp64 and against `blockwise`."""

import math

import pytest
import torch

from ringattn.kernels import KERNELS
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Alibi, Dropout, Place, Scores, TileScores
from tests.support import scored_tile as features
from tests.support.grids import mostly_slow
from tests.support.tiles import OneTile, rms

TRITON, BLOCKWISE = (next(kernel for kernel in KERNELS if kernel.name == name) for name in ("triton", "blockwise"))
FULL = (None, None)


@pytest.fixture(autouse=True)
def _interpreted():
    pytest.importorskip("triton")


SCORES = {name: case for name, case in features.CASES.items() if name != "bias of all"}


@pytest.mark.parametrize("name", mostly_slow([*SCORES, "all in many blocks"], ("all", "bias with -inf")))
@pytest.mark.usefixtures("poison")
def test_every_feature(name):
    scattered = not name.endswith("blocks")
    tile, name = ((40, 70, (45, 20)), name) if scattered else ((100, 80, (70, 75)), "all")
    p = features.make_problem(tile, torch.float32, scattered=scattered, **SCORES[name])
    got = features.computed(OneTile(TRITON), p)
    exact, peer = (features.formulas(p, dtype, got[0]) for dtype in (torch.float64, torch.float32))
    size = max(x.abs().max().item() for x in exact[2:])
    alive = exact[1].isfinite()
    assert torch.equal(alive, got[1].isfinite())
    for x in (got, exact, peer):
        x[1] = x[1][alive]
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv", "dbias")[: len(got)]):
        most = exact[i].abs().max().item() if i < 2 else size
        allowed = max(2 * rms(peer[i] - exact[i]), 2 * torch.finfo(torch.float32).eps * most)
        error = rms(got[i] - exact[i])
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize("shape", mostly_slow([(1, 1), (2, 1), (1, 8)], [(2, 1)]), ids=str)
def test_gradients_of_shared_biases_are_sums(shape):
    p = features.make_problem((40, 50, FULL), torch.float32, bias=shape)
    got, want = features.computed(OneTile(TRITON), p), features.formulas(p, torch.float64)
    torch.testing.assert_close(got[5].double(), want[5], rtol=1e-5, atol=1e-5)


def test_a_row_without_a_finite_logit_gives_nothing():
    p = features.make_problem((40, 70, FULL), torch.float32, bias=(1, 1))
    p.call.bias[:, :, p.place.rows.start] = -math.inf
    p.dlse[:, :, 0] = 0.0
    out, lse, dq, dk, dv, dbias = features.computed(OneTile(TRITON), p)
    assert all(x.isfinite().all() for x in (out, dq, dk, dv, dbias))
    assert (lse[:, :, 0] == -math.inf).all() and lse[:, :, 1:].isfinite().all()
    for x in (out[:, 0], dq[:, 0], dbias[:, :, p.place.rows.start]):
        assert not x.any()


def test_dropout_keeps_the_pairs_that_blockwise_keeps():
    """Equal scores, and values that show their key; also far out, with heads in the middle and several batch rows."""
    nq, nk, far = 40, 64, 2**40
    q, k, v = torch.zeros(3, nq, 2, 16), torch.zeros(3, nk, 1, 16), torch.eye(nk)[None, :, None].expand(3, -1, 1, -1)
    for first in (0, far):
        where = Place(slice(0, nq), first + torch.arange(nq) * 3, first + torch.arange(nk), slice(3, 5))
        found = []
        for kernel in (OneTile(TRITON), BLOCKWISE):
            acc = Partial.unset(3, nq, 2, nk, torch.float32, "cpu")
            scores = TileScores(FULL, 1.0, None, Scores(1.0, dropout=Dropout(0.4, 2**61 + 7)), where)
            kernel.forward_tile(q, k, v.contiguous(), scores, acc, True)
            found.append(acc.out > 0)
        assert torch.equal(*found) and 0.55 < found[0].float().mean() < 0.65


def test_alibi_distances_are_exact_far_out():
    for far in (2**31 - 100, 2**40):
        where = Place(slice(0, 3), far + torch.arange(3) * 7, far + torch.arange(4), slice(0, 1))
        q, k = torch.zeros(1, 3, 1, 16), torch.zeros(1, 4, 1, 16)
        v, found = torch.randn(1, 4, 1, 16), []
        for kernel in (OneTile(TRITON), BLOCKWISE):
            acc = Partial.unset(1, 3, 1, 16, torch.float32, "cpu")
            scores = TileScores(FULL, 1.0, None, Scores(1.0, rule=Alibi(torch.ones(1))), where)
            kernel.forward_tile(q, k, v, scores, acc, True)
            found.append(acc.out)
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)

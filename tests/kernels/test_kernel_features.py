"""What kernels do beyond band and scale: softcap, bias, ALiBi, dropout and values of another head size.

Results and gradients are compared with plain autograd through the formulas, written out here once more.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn.kernels import KERNELS, Call, Grads, Kernel, Rows, blockwise
from ringattn.kernels.partial import Partial
from ringattn.kernels.sdpa import Sdpa
from tests.support.scored_tile import CASES, FULL, Problem, computed, formulas, make_problem, whole
from tests.support.tiles import Window, rms

CAUSAL = (None, 0)
TILES: list[tuple[int, int, Window]] = [
    (1, 70, FULL),
    (70, 1, FULL),
    (90, 130, FULL),
    (130, 130, CAUSAL),
    (90, 130, (None, 20)),
    (130, 90, (40, None)),
    (150, 150, (30, 7)),
    (150, 150, (12, 0)),
]
LACKING = {
    "softcap": lambda s: replace(s, softcap=None),
    "bias": lambda s: replace(s, bias=None, dbias=None),
    "alibi": lambda s: replace(s, rule=None),
    "dropout": lambda s: replace(s, dropout=None),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows, columns and heads on small tiles."""
    monkeypatch.setattr(blockwise, "ROWS", 64)
    monkeypatch.setattr(blockwise, "COLS", 48)
    monkeypatch.setattr(blockwise, "SCORES", {})
    monkeypatch.setattr(blockwise, "MANY_SCORES", 64 * 48)
    monkeypatch.setattr(blockwise, "FEWEST_ROWS", 16)


each_kernel = pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k.name in ("blockwise", "reference")], ids=lambda kernel: kernel.name
)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize("scattered", [False, True], ids=["slices", "scattered"])
@pytest.mark.parametrize("tile", TILES, ids=str)
@each_case
@each_kernel
@pytest.mark.usefixtures("small_blocks", "poison")
def test_every_feature_in_fp64(
    kernel: Kernel, case: dict[str, Any], tile: tuple[int, int, Window], scattered: bool
) -> None:
    p = make_problem(tile, scattered=scattered, **case)
    for got, want in zip(computed(kernel, p), formulas(p, torch.float64), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [
        ((270, 560, FULL), torch.float32),
        ((150, 150, (30, 7)), torch.float32),
        ((130, 130, CAUSAL), torch.bfloat16),
        ((150, 150, (30, 7)), torch.float16),
    ],
    ids=str,
)
@each_case
@each_kernel
def test_error_is_at_most_twice_that_of_autograd_in_fp32(
    kernel: Kernel, case: dict[str, Any], tile: tuple[int, int, Window], dtype: torch.dtype
) -> None:
    p = make_problem(tile, dtype=dtype, **case)
    got = computed(kernel, p)
    given_out = got[0].to(dtype)
    exact, peer = formulas(p, torch.float64, given_out), formulas(p, torch.float32, given_out)
    size_of_gradients = max(x.abs().max().item() for x in exact[2:])
    alive = exact[1].isfinite()
    assert torch.equal(alive, got[1].isfinite())
    for x in (got, exact, peer):
        x[1] = x[1][alive]
    for i, name in enumerate(("out", "lse", "dq", "dk", "dv", "dbias")[: len(got)]):
        size = exact[i].abs().max().item() if i < 2 else size_of_gradients
        allowed = max(2 * rms(peer[i] - exact[i]), 2 * torch.finfo(torch.float32).eps * size)
        error = rms(got[i] - exact[i])
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize("feature", LACKING)
@each_kernel
def test_no_feature_is_left_out(kernel: Kernel, feature: str) -> None:
    p = make_problem((90, 130, FULL), softcap=2.0, bias=(2, 8), alibi=True, dropout=0.3)
    call = LACKING[feature](p.call)
    with_it, without = computed(kernel, p), computed(kernel, p, replace(p.scores, softcap=call.softcap, call=call))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), with_it[:5], without[:5], strict=True):
        differs = feature != "dropout" or name != "lse"  # lse is that of the undropped softmax
        assert ((a - b).abs().mean() > 0.01 * a.abs().mean()) == differs, name
    assert with_it[5].abs().max() > 0


@each_kernel
def test_a_row_without_a_finite_logit_gives_nothing(kernel: Kernel) -> None:
    p = make_problem((90, 130, FULL), bias=(1, 1))
    assert p.call.bias is not None
    p.call.bias[:, :, p.place.rows.start] = -math.inf
    p.dlse[:, :, 0] = 0.0
    out, lse, dq, dk, dv, dbias = computed(kernel, p)
    assert all(x.isfinite().all() for x in (out, dq, dk, dv, dbias))
    assert (lse[:, :, 0] == -math.inf).all()
    assert lse[:, :, 1:].isfinite().all()
    for x in (out[:, 0], dq[:, 0], dbias[:, :, p.place.rows.start]):
        assert not x.any()


@each_case
@each_kernel
def test_nan_reaches_the_rows_that_see_it(kernel: Kernel, case: dict[str, Any]) -> None:
    for name in ("q", "k", "v"):
        p = make_problem((130, 130, CAUSAL), **case)
        getattr(p, name)[0, 100, 0] = math.nan
        out = computed(kernel, p)[0]
        dropped = p.scores.keep(whole(p), torch.float64) if name == "v" else None
        rows = slice(100, 101) if name == "q" else slice(100, 130)
        seen = torch.ones(130, dtype=torch.bool) if dropped is None else dropped[0, 0, :, 100] > 0
        if case.get("hidden"):
            seen = seen & (p.scores.bias(whole(p))[0, 0] > -math.inf)[:, 100 if name != "q" else 0]
        assert out[0, rows, 0].isnan().any(-1)[seen[rows]].all(), name


def test_an_infinite_score_outside_the_band_is_not_seen() -> None:
    p = make_problem((130, 130, CAUSAL))
    p.k[:, -1] = math.inf
    p.q.abs_()
    out = computed(blockwise.Blockwise(), p)[0]
    assert out[:, :-1].isfinite().all()


class Allocated(TorchDispatchMode):
    """Bytes of the largest storage that operators made."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in given}
        self.largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("window", [FULL, CAUSAL, (600, 0)], ids=str)
def test_scratch_grows_with_the_inputs_only(window: Window) -> None:
    kernel, length = blockwise.Blockwise(), 1500
    p = make_problem((length, length, window), torch.float32, 2.0, (1, 1), True, True, 0.3)
    assert p.call.bias is not None
    assert p.call.dbias is not None
    p = Problem(*(x[:1] for x in (p.q, p.k, p.v, p.dout, p.dlse)), p.window, p.call, p.place)
    wide = [torch.zeros_like(x) for x in (p.q, p.k, p.v)]
    acc = Partial.unset(1, length, 4, 16, torch.float32, "cpu")
    given = (p.q, p.k, p.v, p.dout, p.dlse, p.call.bias, p.call.dbias, p.place.q, p.place.k, acc.out, acc.lse, *wide)
    with Allocated(*given) as allocated:
        kernel.forward_tile(p.q, p.k, p.v, p.scores, acc, fresh=True)
        rows = Rows(p.q, p.dout, acc.out, acc.lse, acc.lse, None)
        kernel.backward_tile(rows, p.k, p.v, p.scores, Grads(*wide))
    block = 4 * blockwise.SCORES["cpu"]
    assert 0 < allocated.largest <= max(block, max(x.nbytes for x in wide))
    assert block < 4 * length * length


@pytest.mark.parametrize("feature", sorted(LACKING))
def test_which_kernels_have_it(feature: str) -> None:
    call = Call("cpu", torch.float32, 64, 64, 4, 4, features=frozenset({feature}))
    refused = {kernel.name: kernel.refuse(call) for kernel in KERNELS}
    assert refused["blockwise"] is None
    assert refused["reference"] is None
    assert feature in str(refused["sdpa"])
    assert "kernel='blockwise'" in str(refused["sdpa"])


def test_sdpa_never_leaves_a_feature_out() -> None:
    p = make_problem((20, 20, FULL), softcap=2.0)
    with pytest.raises(AssertionError, match="refused"):
        computed(Sdpa(), p)

"""The adapters of FlashAttention's packages, over packages that only look like them: tiles of every kind, what is
written where, and every limit that must be refused or translated."""

import math
from dataclasses import replace

import pytest
import torch

import ringattn as ra
from ringattn.kernels import Grads, choose, flash, flash2, flash3, flash4, hub
from ringattn.kernels.partial import Partial
from ringattn.kernels.scores import Scores, TileScores
from ringattn.runtime import binding
from ringattn.testing import dense_results
from tests.support import flash_packages
from tests.support.flash_packages import call_of
from tests.support.one_tile import SCALE, TILES, assert_few_roundings, make_problem, rows_of
from tests.support.tiles import rms

PACKAGES = {
    "flash4": (flash4.Flash4, flash4.Package, flash_packages.flash4),
    "flash3": (flash3.Flash3, flash3.Package, flash_packages.flash3),
    "flash2": (flash2.Flash2, flash2.Package, flash_packages.flash2),
}
each = pytest.mark.parametrize("name", PACKAGES)


def made(name):
    """A kernel, and the package it runs on."""
    kernel, package, fake = PACKAGES[name]
    interface = fake()
    operators = package(interface)
    return kernel(load=lambda: operators), interface


def partial_of(p, dtype=torch.float32):
    out = torch.full((*p.q.shape[:3], p.v.shape[-1]), math.nan, dtype=dtype)
    return Partial(out, torch.full((p.q.shape[0], p.q.shape[2], p.q.shape[1]), math.nan))


@each
@pytest.mark.parametrize("tile", [t for t in TILES if t[0] * t[1] < 200_000], ids=str)
def test_tiles_of_every_kind(name, tile):
    assert_few_roundings(made(name)[0], make_problem(*tile, dtype=torch.bfloat16))


@each
@pytest.mark.parametrize("window", [(None, None), (None, 0), (20, 5)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (8, 2)], ids=str)
def test_a_gradient_of_lse_and_shared_heads(name, window, heads):
    assert_few_roundings(made(name)[0], make_problem(90, 90, window, dtype=torch.float16, heads=heads, with_dlse=True))


@each
def test_what_is_written_once_is_written_by_the_operator(name):
    """In the dtype of the inputs, over whatever was there, and added in fp32 elsewhere."""
    kernel, interface = made(name)
    p, scores = make_problem(40, 40, (None, 0), dtype=torch.bfloat16), TileScores((None, 0), SCALE)
    acc, wide = partial_of(p, torch.bfloat16), partial_of(p)
    for home in (acc, wide):
        kernel.forward_tile(p.q, p.k, p.v, scores, home, fresh=True)
    assert torch.equal(acc.out, wide.out.bfloat16()) and torch.equal(acc.lse, wide.lse)
    rows = rows_of(p, wide)
    own = Grads(*(torch.full_like(x, math.nan) for x in (p.q, p.k, p.v)), fresh=True, fresh_keys=True)
    summed = Grads(*(torch.full_like(x, 1.0, dtype=torch.float32) for x in (p.q, p.k, p.v)))
    for grads in (own, summed):
        kernel.backward_tile(rows, p.k, p.v, scores, grads)
    for a, b in zip((own.dq, own.dk, own.dv), (summed.dq, summed.dk, summed.dv), strict=True):
        assert torch.equal(a.float(), b - 1.0) or rms(a.float() - (b - 1.0)) < 1e-6
    if name == "flash4":
        assert [call[4] for call in interface.calls] == [True, False, True, False]


def test_flash4_is_never_given_memory_that_it_cannot_write():
    """Strided rows of lse, and rows that do not begin at 16 bytes, are copied."""
    kernel, interface = made("flash4")
    p, scores = (
        make_problem(20, 20, (None, None), dtype=torch.bfloat16, batch=1, head_dim=8),
        TileScores((None,) * 2, SCALE),
    )
    home = Partial(torch.zeros(1, 40, 4, 8, dtype=torch.bfloat16), torch.zeros(1, 4, 40))
    kernel.forward_tile(p.q, p.k, p.v, scores, home.rows(slice(0, 40, 2)), fresh=True)
    odd = torch.zeros(1, 20, 4, 12, dtype=torch.bfloat16)[..., 4:]
    kernel.forward_tile(p.q, p.k, p.v, scores, Partial(odd, torch.zeros(1, 4, 20)), fresh=True)
    assert [call[4] for call in interface.calls] == [False, False]
    assert torch.equal(odd, home.out[:, ::2]) and home.out[:, 1::2].abs().sum() == 0


@pytest.mark.parametrize("window", [(None, None), (None, 0), (None, 7), (7, None), (0, 0), (5, 3)], ids=str)
def test_flash4_is_told_none_for_an_absent_bound(window):
    kernel, interface = made("flash4")
    p = make_problem(30, 30, window, dtype=torch.bfloat16)
    assert_few_roundings(kernel, p)
    for call in interface.calls:
        assert call[1] == window[0]
        assert call[2] == (None if window == (None, 0) else window[1]), "causal says it, else the bound itself"
        assert -1 not in call[1:3]


def test_a_softcap_is_handed_on():
    p = make_problem(50, 50, (None, 0), dtype=torch.bfloat16)
    scores = TileScores((None, 0), SCALE, softcap=0.7)
    want = partial_of(p)
    ra.kernels.reference.Reference().forward_tile(p.q, p.k, p.v, scores, want, fresh=True)
    for name in PACKAGES:
        kernel, acc = made(name)[0], partial_of(p)
        kernel.forward_tile(p.q, p.k, p.v, scores, acc, fresh=True)
        assert rms(acc.out - want.out) < 0.01 * want.out.abs().max()
        plain = partial_of(p)
        kernel.forward_tile(p.q, p.k, p.v, replace(scores, softcap=None), plain, fresh=True)
        assert rms(plain.out - want.out) > 0.02 * want.out.abs().max(), "it changes something"


@each
def test_scores_that_it_cannot_make_are_never_left_out(name):
    p = make_problem(20, 20, (None, 0), dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="refused"):
        made(name)[0].forward_tile(
            p.q, p.k, p.v, TileScores((None, 0), SCALE, None, Scores(SCALE)), partial_of(p), True
        )


# -- packed documents ---------------------------------------------------------------------------

DOCUMENTS = [0, 5, 6, 40, 41, 41, 57, 60]


def attention(kernel, monkeypatch, mask, world, batch=1, **settings):
    """A ring's results and gradients over the whole sequence, and those of dense attention in fp64."""
    monkeypatch.setattr(kernel.__class__, "needs", ra.kernels.base.Needs())
    monkeypatch.setattr(binding, "KERNELS", (kernel,))
    seqlen = 60
    shapes = ((seqlen, 4), (seqlen, 2), (seqlen, 2), (seqlen, 4))
    q, k, v, dout = (torch.randn(batch, *shape, 16).bfloat16() for shape in shapes)

    def one_rank(transport):
        cp = ra.ContextParallel(transport, seqlen, mask=mask, **settings)
        local = [cp.shard(x).requires_grad_() for x in (q, k, v)]
        out, lse = ra.attention(*local, cp=cp, return_lse=True)
        out.backward(cp.shard(dout))
        return [cp.unshard(out.detach()), cp.unshard(lse.detach(), dim=2), *(cp.unshard(x.grad) for x in local)]

    exact = [x.double() for x in (q, k, v)]
    dense = dense_results(*exact, mask.dense(seqlen, seqlen), dout.double(), torch.zeros(batch, 4, seqlen).double())
    return ra.Loopback(world).run(one_rank), dense


@each
@pytest.mark.parametrize(
    "bounds", [[0, 3, 5, 7, 9, 11, 60], [0, 20, 30, 40, 50, 60], [0, 7, 14, 21, 28, 35, 60]], ids=str
)
def test_equal_documents_beside_an_odd_one(name, bounds, monkeypatch):
    """A stack is a call of its own, and no document of a run."""
    kernel, _ = made(name)
    found, dense = attention(kernel, monkeypatch, ra.documents(bounds) & ra.causal(), 1)
    for a, b in zip(found[0], dense, strict=True):
        assert rms(a.double() - b) < 0.02 * max(1.0, b.abs().max().item())


@each
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "mask",
    [
        ra.documents(DOCUMENTS) & ra.causal(),
        ra.documents(DOCUMENTS),
        ra.documents(DOCUMENTS) & ra.sliding_window(9),
        ra.longformer(7, [2, 30]),
        ra.chunked(8) & ra.causal(),
    ],
    ids=str,
)
def test_masks_in_many_pieces(name, mask, world, batch, monkeypatch):
    kernel, _ = made(name)
    found, dense = attention(kernel, monkeypatch, mask, world, batch)
    for rank in found:
        for a, b in zip(rank, dense, strict=True):
            finite = b.isfinite()
            assert rms((a.double() - b)[finite]) < 0.02 * max(1.0, b[finite].abs().max().item())


@each
def test_what_several_tiles_add_to_the_same_rows_is_folded_at_once(name, monkeypatch):
    """Strided keys of a gather are a tile for each owner."""
    folds = []
    monkeypatch.setattr(
        flash, "fold_all", lambda *args: folds.append(len(args[2])) or ra.kernels.passes.fold_all(*args)
    )
    kernel, _ = made(name)
    found, dense = attention(kernel, monkeypatch, ra.causal(), 4, layout="striped", schedule="gather")
    assert folds and max(folds) > 1
    for rank in found:
        for a, b in zip(rank, dense, strict=True):
            assert rms(a.double() - b) < 0.02 * max(1.0, b.abs().max().item())


@each
def test_documents_are_one_call(name, monkeypatch):
    kernel, interface = made(name)
    attention(kernel, monkeypatch, ra.documents(DOCUMENTS) & ra.causal(), 1)
    assert len(interface.calls) == 2 + 2, "the probe's, and one a pass"
    wide, interface = made(name)
    attention(wide, monkeypatch, ra.documents(DOCUMENTS) & ra.causal(), 2, layout="zigzag")
    assert len(interface.calls) < 20


def test_flash2_packs_no_windows_that_it_gets_wrong(monkeypatch):
    kernel, interface = made("flash2")
    mask = ra.documents(DOCUMENTS, [0, 3, 9, 20, 30, 41, 50, 60]) & ra.sliding_window(4, 30)
    found, dense = attention(kernel, monkeypatch, mask, 1)
    assert rms(found[0][0].double() - dense.out) < 0.02
    packed = [call[1:] for call in interface.calls if call[0] == "packed forward"]
    assert all(window == (-1, -1) or window[1] == 0 for window in packed)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flash4", {"dtype": torch.float32}, "must be float16 or bfloat16"),
        ("flash4", {"head_dim": 100, "v_head_dim": 100}, "head_dim 100 must be a multiple of 8"),
        ("flash4", {"head_dim": 264, "v_head_dim": 264}, "at most 256"),
        ("flash4", {"features": frozenset({"dropout"})}, "dropout: not computed"),
        ("flash4", {"features": frozenset({"bias"})}, "bias: not computed"),
        ("flash4", {"features": frozenset({"alibi", "softcap"})}, "alibi: not computed"),
        ("flash4", {"v_head_dim": 64}, "where heads share KV heads"),
        ("flash4", {"capability": (10, 0), "head_dim": 192}, "at most 128, or both 256"),
        ("flash4", {"capability": (10, 0), "head_dim": 256, "v_head_dim": 256, "windowed": True}, "a window: not"),
        ("flash4", {"capability": (10, 0), "head_dim": 256, "v_head_dim": 256, "dlse": True}, "a gradient of lse: not"),
        (
            "flash4",
            {"capability": (10, 0), "head_dim": 256, "v_head_dim": 256, "features": frozenset({"softcap"})},
            "softcap: not",
        ),
        ("flash3", {"v_head_dim": 64}, "must equal head_dim"),
        ("flash3", {"head_dim": 256, "v_head_dim": 256, "deterministic": True}, "deterministic backward"),
        ("flash3", {"head_dim": 256, "v_head_dim": 256, "dlse": True}, "where lse has a gradient"),
        ("flash2", {"v_head_dim": 64}, "must equal head_dim"),
    ],
)
def test_what_is_refused(name, changes, reason):
    kernel = made(name)[0]
    with pytest.raises(AssertionError, match=reason):
        assert kernel.refuse(call_of(**changes)) is None


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((8, 0), "8.0, is older than 9.0"), ((12, 0), "12.0, is none that it computes right on"), ((9, 0), "package")],
)
def test_flash4_names_the_device_and_the_package(capability, reason):
    """No backward before Hopper, wrong values on compute capability 12; here the package is missing."""
    with pytest.raises(NotImplementedError, match=reason):
        choose("flash4", call_of(capability=capability), ra.kernels.KERNELS)


@pytest.mark.parametrize("version", ["4.6.0", "4.6.1", "4.5.0"])
def test_compilers_whose_backward_never_returns_are_refused(version, monkeypatch):
    installed = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": version}
    monkeypatch.setattr(ra.kernels.base, "_installed", installed.get)
    lacking = flash4.Flash4.needs.lacking(call_of())
    assert f"nvidia-cutlass-dsl>=4.6.2 is needed, found {version}" in lacking
    assert "pip install --pre 'ringattn[flash4]'" in lacking
    installed["nvidia-cutlass-dsl"] = "4.8.1"
    assert flash4.Flash4.needs.lacking(call_of()) is None


def test_a_package_is_asked_whatever_mode_the_first_call_is_in():
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        before = torch.get_rng_state()
        with mode:
            assert made("flash4")[0].refuse(call_of(device_type="cpu")) is None
        assert torch.equal(torch.get_rng_state(), before), "the user's numbers are not touched"


def test_a_changed_interface_is_one_clear_refusal():
    kernel, interface = made("flash4")
    assert kernel.refuse(call_of(device_type="cpu")) is None
    for change, text in (
        ({"_flash_attn_fwd": lambda q, k, v: None}, "does not run here .TypeError.*written for flash-attn-4 4.0.0b36"),
        ({"_flash_attn_fwd": interface._flash_attn_bwd}, "does not run here"),
        ({}, "computes something else here .lse is off"),
    ):
        fake = flash_packages.flash4()
        vars(fake).update(change)
        if not change:  # an lse to the base of 2, as other kernels have it
            forward = fake._flash_attn_fwd
            fake._flash_attn_fwd = lambda *a, f=forward, **k: (lambda o, l, *r: (o, l / math.log(2), *r))(*f(*a, **k))
        operators = flash4.Package(fake)
        broken = flash4.Flash4(load=lambda operators=operators: operators)
        with pytest.raises(AssertionError, match=text):
            assert broken.refuse(call_of(device_type="cpu")) is None


def test_a_package_that_warns_or_breaks_at_import_is_no_error(recwarn):
    def load():
        import warnings

        warnings.warn("utils.LayoutEnum is deprecated", DeprecationWarning, stacklevel=1)
        raise ImportError("cannot import name 'LayoutEnum'")

    reason = flash.probe(load, "flash4", "b36", "cpu")
    assert "ImportError: cannot import name 'LayoutEnum'" in reason
    assert not recwarn.list


@each
def test_deterministic_sums_and_multiprocessors_are_handed_on(name, monkeypatch):
    kernel, interface = made(name)
    options = ra.Options(deterministic=True, sm_margin=8 if name == "flash3" else 0)
    attention(kernel, monkeypatch, ra.causal(), 2, options=options)
    last = interface.calls[-1]
    assert True in last[1:]
    if name == "flash3":
        assert ("forward", 8) in interface.calls and last == ("backward", 8, True)


def test_a_margin_that_no_kernel_leaves_is_refused():
    cp = ra.ContextParallel(None, 8, options=ra.Options(sm_margin=4))
    q = torch.randn(1, 8, 1, 16)
    with pytest.raises(NotImplementedError, match="sm_margin=4: it cannot leave multiprocessors free"):
        ra.attention(q, q, q, cp=cp)


def test_the_hub_is_asked_by_name_only(monkeypatch):
    for kernel in (hub.HubFlash2(), hub.HubFlash3()):
        with pytest.raises(NotImplementedError, match=r"package kernels>=0.10 is needed, found none"):
            choose(kernel.name, call_of(), [kernel])
        with pytest.raises(NotImplementedError, match="taken by name only on 'cuda'"):
            choose("auto", call_of(), [kernel])


def test_what_sums_in_any_order_is_refused_where_one_order_is_asked_for():
    assert "promise no order" in ra.kernels.sdpa.Sdpa().refuse(call_of(deterministic=True))
    assert ra.kernels.sdpa.Sdpa().refuse(call_of(device_type="cpu", deterministic=True)) is None

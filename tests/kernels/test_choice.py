"""Which kernel computes what: by name, by order, and by the rates of a device."""

import json
from dataclasses import replace

import pytest
import torch

import ringattn as ra
import ringattn.testing
from ringattn.kernels import Call, TileCalls, choose, rates
from ringattn.kernels.calls import TileKernel
from ringattn.kernels.choice import Selection
from ringattn.kernels.rates import KernelRates, Kind, rates_of
from ringattn.planning.launches import Launch
from ringattn.runtime import binding

CALL = Call("cuda", torch.bfloat16, 128, 128, 32, 8, capability=(9, 0))


class Named(TileKernel):
    def __init__(self, name, lists=False, refused=None):
        self.name, self.takes_lists, self.refused = name, lists, refused

    def refuse(self, call):
        return self.refused


def launch(nq, nk, window=(None, None), count=1, area=None):
    area = nq * nk * count if area is None else area
    return Launch(slice(0, nq * count, 1), slice(0, nk * count, 1), window, area, count)


def table(**kernels):
    content = {
        name: {shape: {size: rate for size, rate in sizes.items()} for shape, sizes in shapes.items()}
        for name, shapes in kernels.items()
    }
    return KernelRates(
        {
            name: {
                shape: tuple(sorted((size, f * 1e12, b * 1e12) for size, (f, b) in sizes.items()))
                for shape, sizes in shapes.items()
            }
            for name, shapes in content.items()
        },
        "a test",
    )


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (launch(4096, 4096), Kind("full", 4096)),
        (launch(1024, 4096), Kind("full", 2048)),
        (launch(4096, 4096, (None, 0)), Kind("causal", 4096)),
        (launch(4096, 8192, (None, 0)), Kind("band", 5792)),
        (launch(4096, 4096, (17, None)), Kind("band", 4096)),
        (launch(4096, 4096, (1023, 0), area=4096 * 1000), Kind("window", 1000)),
        (launch(64, 64, (None, 0), count=8), Kind("stack", 64)),
    ],
    ids=str,
)
def test_tiles_have_a_kind(made, kind):
    assert Kind.of(made) == kind


def test_rates_between_sizes_beyond_them_and_of_shapes_that_were_not_measured():
    known = table(a={"full": {1000: (100, 50), 4000: (300, 90)}, "window": {1024: (80, 40)}})
    assert known.rate("a", Kind("full", 2000), False) == pytest.approx(200e12)
    assert known.rate("a", Kind("full", 2000), True) == pytest.approx(70e12)
    assert known.rate("a", Kind("full", 10), False) == 100e12
    assert known.rate("a", Kind("full", 10**6), True) == 90e12
    assert known.rate("a", Kind("causal", 4000), False) == 300e12, "as full"
    assert known.rate("b", Kind("full", 1000), False) == rates.UNKNOWN


def test_each_tile_goes_to_the_fastest_and_each_direction_on_its_own():
    dense, windows = Named("dense"), Named("windows")
    known = table(
        dense={"full": {4096: (600, 100)}, "window": {1024: (180, 100)}},
        windows={"full": {4096: (400, 200)}, "window": {1024: (400, 300)}},
    )
    made = choose("auto", CALL, [dense, windows], known)
    tiles = [launch(4096, 4096), launch(4096, 4096, (1023, 0), area=1 << 22), launch(4096, 4096)]
    assert made.name == "dense+windows"
    assert [kernel.name for kernel in made.taken(tiles, False)] == ["dense", "windows", "dense"]
    assert {kernel.name for kernel in made.taken(tiles, True)} == {"windows"}
    calls = TileCalls(None, (), ("a", "b", "c"), None, None, None)
    shares = [(kernel.name, some.calls) for kernel, some in made.shares(tiles, calls, False)]
    assert shares == [("dense", ("a",)), ("windows", ("b",)), ("dense", ("c",))], "in their order"


def test_a_kernel_of_lists_takes_all_or_none():
    """It saves the time between launches, and counts for what it does on each."""
    tile, lists = Named("tile"), Named("lists", lists=True)
    known = table(tile={"full": {128: (300, 300)}}, lists={"full": {128: (200, 200)}})
    made = Selection((tile, lists), CALL, known)
    small, large = [launch(64, 64)] * 500, [launch(8192, 8192)] * 3
    assert {kernel.name for kernel in made.taken(small, False)} == {"lists"}
    assert {kernel.name for kernel in made.taken(large, False)} == {"tile"}


def test_without_rates_the_first_that_fits_computes_all():
    first, second = Named("first", refused="too large"), Named("second")
    made = choose("auto", CALL, [first, second, Named("third")])
    assert made.name == "second" and made.refused == ("first: too large",)
    assert {kernel.name for kernel in made.taken([launch(9, 9)], False)} == {"second"}
    unknown = choose("auto", CALL, [second, Named("third")], table(fourth={"full": {9: (1, 1)}}))
    assert unknown.name == "second", "rates that say nothing of what fits"


def test_a_refusal_names_the_kernels_that_fit():
    with pytest.raises(NotImplementedError, match=r"'a' cannot compute .*: no such; b, c can"):
        choose("a", CALL, [Named("a", refused="no such"), Named("b"), Named("c")])
    with pytest.raises(NotImplementedError, match=r"'a' cannot compute .*: no such; no kernel can"):
        choose("a", CALL, [Named("a", refused="no such")])


def test_tables_come_with_the_library_for_devices_that_were_measured():
    hopper, ampere = rates_of("NVIDIA H200"), rates_of("NVIDIA A100-SXM4-80GB")
    assert rates_of("NVIDIA H100 80GB HBM3") == hopper
    assert "H200" in hopper.source and "A100" in ampere.source
    assert rates_of("NVIDIA GeForce RTX 4090") is None
    names = {kernel.name for kernel in ra.kernels.KERNELS}
    window = Kind("window", 1024)
    best = max(hopper.table, key=lambda name: hopper.rate(name, window, False))
    assert best == "flash4" and set(hopper.table) - names <= {"triton"}


def test_a_table_of_this_machine_comes_first(tmp_path, monkeypatch):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"source": "here", "rates": {"sdpa": {"full": {"4096": [1, 2]}}}}))
    monkeypatch.setattr(rates, "own_table", lambda device: own)
    rates_of.cache_clear()
    try:
        assert rates_of("NVIDIA H200").source == "here"
    finally:
        rates_of.cache_clear()
    monkeypatch.undo()
    assert rates_of("NVIDIA H200", str(own)).rate("sdpa", Kind("full", 4096), True) == 2e12
    assert ra.Options(kernel_rates=own).kernel_rates == str(own)


def test_a_table_that_is_named_is_heeded_on_a_cpu_too(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(full('{"64": [1, 1]}').replace('"sdpa"', '"blockwise"'))
    asked = ra.Options(kernel_rates=path)
    chosen = ra.ContextParallel(None, 64, options=asked).describe()
    assert "kernel auto: blockwise, the fastest for each tile by rates (x)" in chosen
    assert "kernel auto: sdpa\n" in ra.ContextParallel(None, 64).describe()


def full(sizes):
    """A table that is right but for these sizes and rates."""
    return f'{{"source": "x", "rates": {{"sdpa": {{"full": {sizes}}}}}}}'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", '{"source": "x", "rates": [1]}', "[" * 60_000),
        *(full('{"a": [1, 2]}'), full('{"4096": [0, 2]}'), full('{"4096": [1]}'), full('{"9": "56"}'), full("[]")),
        *(
            full('{"9": [NaN, 1]}'),
            full('{"9": [1, 1e400]}'),
            full('{"' + "9" * 400 + '": [1, 1]}'),
            full('{"0": [1, 1]}'),
        ),
    ],
    ids=lambda text: text[:60],
)
def test_a_file_that_is_no_table_is_refused(text, tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rates.json is no table of kernel rates .*ringattn calibrate. writes one"):
        ra.Options(kernel_rates=path)
    with pytest.raises(ValueError, match="must be a path"):
        ra.Options(kernel_rates=7)


def test_two_kernels_share_one_attention(monkeypatch):
    """Tiles of both, in one ring, with gradients."""
    reference, blockwise = ra.kernels.reference.Reference(), ra.kernels.blockwise.Blockwise()
    shares = []

    class Shared(Selection):
        def taken(self, launches, backward):
            made = [self.kernels[(i + backward) % 2] for i in range(len(launches))]
            shares.extend(kernel.name for kernel in made)
            return made

    monkeypatch.setattr(
        binding, "choose_kernel", lambda name, call, registry, known: Shared((reference, blockwise), call)
    )
    mask = ra.longformer(5, [0, 17]) | ra.chunked(4)
    q, k, v, dout = (torch.randn(1, 40, 2, 8, dtype=torch.float64) for _ in range(4))
    want = ringattn.testing.dense_results(q, k, v, mask.dense(40, 40), dout, torch.zeros(1, 2, 40, dtype=torch.float64))

    def one_rank(transport):
        cp = ra.ContextParallel(transport, 40, mask=mask)
        local = [cp.shard(x).requires_grad_() for x in (q, k, v)]
        out = ra.attention(*local, cp=cp)
        out.backward(cp.shard(dout))
        return [cp.unshard(x) for x in (out.detach(), *(x.grad for x in local))]

    for rank in ra.Loopback(2).run(one_rank):
        for a, b in zip(rank, (want.out, want.dq, want.dk, want.dv), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert set(shares) == {"reference", "blockwise"}


def test_describe_names_the_kernels_and_why(monkeypatch):
    """On a GPU as one would see it: here the device and its packages are only said to be there."""
    cp = ra.ContextParallel(None, 4096, mask=ra.longformer(64, [5, 9, 700]))
    assert "kernel auto: sdpa" in cp.describe()
    known = rates_of("NVIDIA H200")
    kernels = Selection((Named("flash4"), Named("sdpa")), CALL, known, ("flash3: no module", "flash2: no module"))
    monkeypatch.setattr(cp.binding, "expected_kernels", lambda mask: kernels)
    monkeypatch.setattr(cp.binding, "settings", replace(cp.binding.settings, device="NVIDIA H200"))
    text = cp.describe()
    assert f"kernel auto: flash4+sdpa, the fastest for each tile by rates ({known.source})" in text
    assert "not flash3, flash2: no module" in text
    assert "    kernels: forward sdpa 8 calls, flash4 5 calls; backward flash4 13 calls" in text
    monkeypatch.setattr(cp.binding, "expected_kernels", lambda mask: None)
    assert "kernel auto: chosen at the call, on the device" in cp.describe()


def test_describe_says_that_no_kernel_computes_the_shape_told():
    shape = ra.Shape(4, 4, 64, v_head_dim=32, dtype="float32")
    cp = ra.ContextParallel(None, 64, kernel="sdpa", shape=shape)
    assert "kernel sdpa: kernel 'sdpa' cannot compute" in cp.describe()
    assert "v_head_dim 32 must equal head_dim 64" in cp.describe()

"""Masks against their predicates by brute force, their algebra by hypothesis, and their refusals."""

import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringattn as ra
from ringattn.comm import PlanningRank
from ringattn.geometry.regular import areas, regular
from tests.support import cases

LENGTHS = [(29, 29, 0), (13, 29, 16), (20, 12, 0), (1, 29, 28), (12, 12, 0)]


def check(mask, predicate, q_len, kv_len, q_offset):
    expected = cases.dense(predicate, q_len, kv_len, q_offset)
    assert (mask.dense(q_len, kv_len, q_offset).numpy() == expected).all()
    assert mask.area(q_len, kv_len, q_offset) == expected.sum()
    # Bands are disjoint (their areas add up), and a stretch of queries gives exactly its own rows.
    bound, cut = mask.bind(q_len, kv_len, q_offset), q_offset + q_len // 3
    for rows, start, stop in ((slice(0, q_len // 3), q_offset, cut), (slice(q_len // 3, None), cut, q_offset + q_len)):
        assert areas(regular(bound.bands(start, stop))).sum() == expected[rows].sum()


@pytest.mark.parametrize("name", cases.SIMPLE | cases.COMBINED)
def test_each_mask(name):
    for lengths in LENGTHS if name in cases.SIMPLE else LENGTHS[:1]:
        check(*cases.ALL[name], *lengths)


def test_python_s_own_and_is_refused():
    """It would give the second mask, whatever the first is."""
    for combine in (lambda: ra.causal() and ra.sliding_window(3), lambda: not ra.causal()):
        with pytest.raises(TypeError, match="combine masks with &"):
            combine()


def test_documents_for_each_side():
    check(*cases.DOCUMENTS["documents"], 29, 29, 0)
    check(*cases.DOCUMENTS["documents"], 13, 29, 16)
    cross = ra.documents([0, 4, 9], [0, 7, 11])
    check(cross, lambda q, k: (q < 4) == (k < 7), 9, 11, 0)


SIGNS = {
    "&": (lambda a, b: a & b, np.logical_and),
    "|": (lambda a, b: a | b, np.logical_or),
    "-": (lambda a, b: a - b, lambda a, b: a & ~b),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_every_pair_of_masks(sign):
    on_masks, on_arrays = SIGNS[sign]
    for (mask_a, rule_a), (mask_b, rule_b) in itertools.product((cases.SIMPLE | cases.DOCUMENTS).values(), repeat=2):
        check(on_masks(mask_a, mask_b), lambda q, k, a=rule_a, b=rule_b: on_arrays(a(q, k), b(q, k)), 29, 29, 0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(cases.SIMPLE | cases.DOCUMENTS)), min_size=3, max_size=4), st.data())
def test_random_expressions(names, data):
    mask, dense = cases.ALL[names[0]][0], cases.dense(cases.ALL[names[0]][1])
    for name in names[1:]:
        on_masks, on_arrays = SIGNS[data.draw(st.sampled_from(sorted(SIGNS)))]
        other = cases.ALL[name]
        mask, dense = on_masks(mask, other[0]), on_arrays(dense, cases.dense(other[1]))
    assert (mask.dense(29, 29).numpy() == dense).all()
    assert mask.area(29, 29) == dense.sum()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 30),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 6),
)
def test_random_sizes(q_len, kv_len, q_offset, left, right, stride):
    for mask, predicate in (
        (ra.sliding_window(left, right), lambda q, k: (q - left <= k) & (k <= q + right)),
        (ra.strided(stride), lambda q, k: (q - k) % stride == 0),
        (ra.dilated(stride, left), lambda q, k: (q >= k) & (q - k <= left * stride) & ((q - k) % stride == 0)),
        (ra.prefix_lm(right), lambda q, k: (k <= q) | (k < right)),
    ):
        check(mask, predicate, q_len, kv_len, q_offset)


def test_bigbird_is_blocks_window_globals_and_random():
    block, rows = 4, 16
    dense = ra.bigbird(block, 3, 1, 2, seed=3, causal=False).dense(64, 64).numpy()
    blocks = dense.reshape(rows, block, rows, block)
    assert (blocks.all((1, 3)) == blocks.any((1, 3))).all(), "blocks are whole"
    blocks = blocks.any((1, 3))
    sure = np.abs(np.subtract.outer(np.arange(rows), np.arange(rows))) <= 1
    sure[0] = sure[:, 0] = True
    assert blocks[sure].all()
    extra = (blocks & ~sure).sum(1)
    assert extra.max() == 2 and extra[1:].sum() > rows, "random blocks, two at most, some hidden under the others"
    again = ra.bigbird(block, 3, 1, 2, seed=4, causal=False).dense(64, 64).numpy()
    assert (again != dense).any(), "the seed matters"
    # A row's random blocks depend on the seed and the row alone: a stretch from the middle has the same.
    causal = ra.bigbird(block, 1, 0, 2, seed=3)
    assert (causal.dense(64, 64).numpy()[32:48] == causal.dense(16, 64, 32).numpy()).all()
    assert (causal.dense(64, 64).numpy() == np.tril(causal.dense(64, 64).numpy())).all()


def test_masks_are_values():
    a = ra.documents(np.array([0, 5, 29])) & ra.causal()
    b = ra.documents([0, 5, 29]) & ra.causal()
    assert a == b and hash(a) == hash(b) and a != (b | ra.full())
    assert str(a) == "(documents((0, 5, 29)) & causal())"


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: ra.sliding_window(-1), "sliding_window left=-1: must be at least 0"),
        (lambda: ra.sliding_window(3, -2), "sliding_window right=-2"),
        (lambda: ra.sliding_window(1.5), "must be an integer"),
        (lambda: ra.documents([0, 7, 3, 29]), r"cu_seqlens\[2\]=3 comes after 7"),
        (lambda: ra.documents([1, 29]), "must start with 0"),
        (lambda: ra.documents([0, 28]).bind(29, 29), "ends at 28 but the sequence ends at 29"),
        (lambda: ra.documents([0, 4, 29], [0, 29]), "2 documents and cu_seqlens_k 1"),
        (lambda: ra.global_tokens([-1]), "position -1"),
        (lambda: ra.global_tokens([29]).bind(29, 29), "position 29 lies beyond"),
        (lambda: ra.chunked(0), "chunked size=0"),
        (lambda: ra.bigbird(4, 2, 1, 1), "must be odd"),
        (lambda: ra.causal() & "full", "is not a mask"),
        (lambda: ra.causal().bind(-1, 4), "q_len=-1"),
    ],
)
def test_bad_arguments(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_a_lattice_cut_by_a_window_and_scattered_tokens_stays_small():
    """Pieces whose scattered set is empty must not be cut on: they once multiplied without end."""
    mask = ra.dilated(4, 2) | (ra.full() - (ra.sliding_window(2, 2) | ra.global_tokens([20])))
    assert len(mask.bind(25, 25).bands(0, 25)) < 500

    def predicate(q, k):
        return np.isin(q - k, [0, 4, 8]) | ~((np.abs(q - k) <= 2) | (q == 20) | (k == 20))

    check(mask, predicate, 25, 25, 0)


def test_a_pickled_mask_is_the_same_in_another_process():
    """Functions lie, and strings hash, elsewhere there."""
    masks = [mask for mask, _ in cases.ALL.values()]
    assert all(hash(mask) for mask in masks)
    code = """
import pickle, sys
import ringattn as ra
from tests.support import cases
sent, here = pickle.loads(sys.stdin.buffer.read()), [mask for mask, _ in cases.ALL.values()]
assert sent == here and [hash(m) for m in sent] == [hash(m) for m in here] and len({*sent, *here}) == len(here)
assert all(a.digest == b.digest and (a.handle == b.handle).all() for a, b in zip(sent, here))
q = ra.pack([[0, 3]]).pack([__import__("torch").ones(3, 1, 4)])
ra.attention(q, q, q, cp=ra.ContextParallel(None, 3, mask=ra.causal()), mask=pickle.loads(pickle.dumps(ra.causal())))
print(pickle.dumps(here).hex())
"""
    made = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(masks), capture_output=True, check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert pickle.loads(bytes.fromhex(made.stdout.decode())) == masks


def test_a_mask_that_allows_nothing_can_be_described():
    nothing = ra.full() - ra.full()
    for layout in ("auto", "balanced", "contiguous", "striped"):
        assert "no work" in ra.ContextParallel(PlanningRank(0, 2), 10, mask=nothing, layout=layout).describe()

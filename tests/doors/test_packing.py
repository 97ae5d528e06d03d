"""Packing: rows with documents of their own in one sequence, there and back, and attention over them."""

import math

import numpy as np
import pytest
import torch

import ringattn as ra
from ringattn.testing import dense_attention, results
from tests.support.ring import check, tensors

ROWS = [[0, 5, 9], [0], torch.tensor([0, 3, 3, 12]), np.array([0, 4], np.int32)]
LENGTHS, BATCH, S = (9, 0, 12, 4), 4, 12
REAL = torch.arange(S) < torch.tensor(LENGTHS)[:, None]


def test_bounds_and_positions():
    packing = ra.pack(ROWS)
    assert packing.cu_seqlens == (0, 5, 9, 12, 12, 21, 25) and packing.lengths == LENGTHS and packing.seqlen == 25
    expected = [*range(5), *range(4), *range(3), *range(9), *range(4)]
    assert packing.position_ids.dtype == torch.int64 and packing.position_ids.tolist() == expected
    assert packing == ra.pack(tuple(ROWS)) and hash(packing) == hash(ra.pack(iter(ROWS)))
    with pytest.raises(AttributeError):
        packing.lengths = ()


@pytest.mark.parametrize("multiple", [1, 5, 8, BATCH * S])
def test_filling_up_to_a_multiple(multiple):
    packing = ra.pack(ROWS, multiple=multiple)
    added = -25 % multiple
    assert packing.cu_seqlens == ra.pack(ROWS).cu_seqlens + ((25 + added,) if added else ())
    assert packing.position_ids.tolist() == ra.pack(ROWS).position_ids.tolist() + list(range(added))
    labels = torch.arange(BATCH * S).view(BATCH, S)
    packed = packing.pack(labels, fill=-100)
    assert packed.dtype == torch.int64 and packed.shape == (1, packing.seqlen)
    assert packed[0].tolist() == labels[REAL].tolist() + [-100] * added


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("rest", [(), (3, 2)])
def test_there_and_back(dtype, rest):
    packing = ra.pack(ROWS, multiple=8)
    x = torch.randn(BATCH, S, *rest).to(dtype)
    packed = packing.pack(x)
    assert packed.dtype == dtype and packed.shape == (1, 32, *rest) and torch.equal(packed[0, :25], x[REAL])
    ragged = [row[:length] for row, length in zip(x, LENGTHS, strict=True)]
    assert torch.equal(packing.pack(ragged), packed)
    for seqlen in (S, S + 3):
        back = packing.unpack(packed, seqlen, fill=1)
        assert back.dtype == dtype and back.shape == (BATCH, seqlen, *rest)
        assert torch.equal(back[:, :S][REAL], x[REAL]) and (back[:, :S][~REAL] == 1).all() and (back[:, S:] == 1).all()


def test_gradients():
    packing = ra.pack(ROWS, multiple=8)
    x = torch.randn(BATCH, S, 2, dtype=torch.float64, requires_grad=True)
    ragged = [torch.randn(n + 1, 2, dtype=torch.float64, requires_grad=True) for n in LENGTHS]
    y = torch.randn(1, 32, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, (x,))
    assert torch.autograd.gradcheck(lambda *rows: packing.pack(rows), ragged)
    assert torch.autograd.gradcheck(lambda y: packing.unpack(y, S + 1), (y,))
    weights = torch.randn(BATCH, S, 2, dtype=torch.float64)
    (packing.unpack(packing.pack(x), S, fill=math.nan)[REAL] * weights[REAL]).sum().backward()
    assert torch.equal(x.grad, weights * REAL[..., None])


def dense_mask():
    """`[batch, 1, S, S]`, written out from the rows."""
    document = torch.full((BATCH, S), -1)
    for i, row in enumerate(ROWS):
        for n in range(len(row) - 1):
            document[i, int(row[n]) : int(row[n + 1])] = n
    same = document[:, :, None] == document[:, None, :]
    return (same & REAL[:, :, None] & torch.ones(S, S).tril().bool())[:, None]


@pytest.mark.parametrize("multiple", [1, 16])
def test_attention_over_packed_rows_is_attention_over_each(multiple, poison):
    """The padding holds NaN, so that reading any of it shows."""
    q, k, v, dout, dlse = tensors(S, S, batch=BATCH)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = results(*dense_attention(*inputs, dense_mask()), dout, dlse, inputs)
    packing = ra.pack(ROWS, multiple)
    mask = ra.documents(packing.cu_seqlens) & ra.causal()

    def one_rank(transport):
        cp = ra.ContextParallel(transport, packing.seqlen, mask=mask)
        inputs = [t.masked_fill(~REAL[..., None, None], math.nan).requires_grad_() for t in (q, k, v)]
        out, lse = ra.attention(*(cp.shard(packing.pack(t)) for t in inputs), cp=cp, return_lse=True)
        out, lse = cp.unshard(out), cp.unshard(lse, dim=2).transpose(1, 2)
        lse = packing.unpack(lse, S, fill=-math.inf).transpose(1, 2)
        return results(packing.unpack(out, S), lse, dout, dlse, inputs)

    check(ra.Loopback(2, timeout=20).run(one_rank), expected)


@pytest.mark.parametrize(
    ("rows", "multiple", "text"),
    [
        ([[0, 3], [1, 3]], 1, r"rows\[1\]=\(1, 3\): must start with 0"),
        ([[0, 3], []], 1, r"rows\[1\]=\(\): must start with 0"),
        ([[0, 5, 4]], 1, r"rows\[0\]\[2\]=4 comes after 5: cumulative lengths must not fall"),
        ([[0, 2.5]], 1, "must be a sequence of integers"),
        ([0, 5, 9], 1, r"rows\[0\]=0: must be a sequence of integers"),
        (7, 1, "rows=7: must be a sequence with the document bounds of each batch row"),
        ([[0], [0, 0]], 1, "2 rows with no tokens in all"),
        ([], 1, "0 rows with no tokens in all"),
        ([[0, 5]], 0, "multiple=0: must be at least 1"),
        ([[0, 5]], 2.0, "multiple=2.0: must be an integer"),
    ],
)
def test_bad_rows(rows, multiple, text):
    with pytest.raises(ValueError, match=text):
        ra.pack(rows, multiple=multiple)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(3, 5), "x has 3 rows but the packing 2"),
        ([torch.zeros(5)], "x has 1 rows but the packing 2"),
        (torch.zeros(2, 4), r"row 1 of x has 4 tokens but rows\[1\] ends at 5"),
        ([torch.zeros(3), torch.zeros(4)], r"row 1 of x has 4 tokens but rows\[1\] ends at 5"),
        (torch.zeros(5), r"x \(5,\): must be \[batch, row_seqlen, ...\]"),
        ([torch.zeros(3), 1.0], "row 1 of x: must be a tensor"),
        ([torch.zeros(3), torch.zeros(5).double()], "row 1 of x has trailing dims, dtype and device"),
        ([torch.zeros(3, 2), torch.zeros(5, 1)], "row 1 of x has trailing dims, dtype and device"),
    ],
)
def test_bad_tensors_to_pack(x, text):
    with pytest.raises(ValueError, match=text):
        ra.pack([[0, 3], [0, 2, 5]]).pack(x)


@pytest.mark.parametrize(
    ("y", "seqlen", "text"),
    [
        (torch.zeros(1, 7), 5, r"y \(1, 7\): must be the whole packed sequence, \[1, 8, ...\]"),
        (torch.zeros(2, 8), 5, "must be the whole packed sequence"),
        (torch.zeros(8), 5, "must be the whole packed sequence"),
        (torch.zeros(1, 8), 4, r"unpack\(\) seqlen=4: a row has 5 tokens"),
        (torch.zeros(1, 8), 5.0, r"unpack\(\) seqlen=5.0: must be an integer"),
    ],
)
def test_bad_tensors_to_unpack(y, seqlen, text):
    with pytest.raises(ValueError, match=text):
        ra.pack([[0, 3], [0, 2, 5]]).unpack(y, seqlen)

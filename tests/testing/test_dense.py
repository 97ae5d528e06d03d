"""The dense reference: the definition against PyTorch's own, rows that see nothing, and gradients against numbers."""

import pytest
import torch
import torch.nn.functional as F

import ringattn as ra
from ringattn.testing import dense_attention, dense_results, results

S = 11


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(2, S, heads, dim, dtype=dtype) for heads, dim in ((4, 8), (2, 8), (2, 5), (4, 5))]


@pytest.mark.parametrize("scale", [None, 0.0, -0.7])
@pytest.mark.parametrize("mask", [ra.full(), ra.causal(), ra.sliding_window(3)], ids=str)
def test_it_is_softmax_attention(mask: ra.Mask, scale: float | None) -> None:
    q, k, v, _ = inputs()
    seen = mask.dense(S, S)
    out, lse = dense_attention(q, k, v, seen, scale)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), seen, scale=scale, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * (8**-0.5 if scale is None else scale)
    torch.testing.assert_close(lse, scores.masked_fill(~seen, -torch.inf).logsumexp(-1))


def test_rows_that_see_nothing_are_zero_and_have_no_gradient() -> None:
    q, k, v, dout = inputs()
    found = dense_results(q, k, v, (ra.causal() - ra.sliding_window(2)).dense(S, S), dout, torch.randn(2, 4, S))
    assert (found.out[:, :3] == 0).all() and (found.lse[:, :, :3] == -torch.inf).all() and (found.dq[:, :3] == 0).all()
    assert all(x.isfinite().all() for x in (found.out, found.dq, found.dk, found.dv))
    assert q.grad is None and not found.out.requires_grad


def test_gradients_are_those_of_out_and_lse() -> None:
    q, k, v, dout = inputs()
    dlse, mask = torch.randn(2, 4, S, dtype=torch.float64), ra.causal().dense(S, S)

    def value(*x: torch.Tensor) -> torch.Tensor:
        out, lse = dense_attention(x[0], x[1], x[2], mask)
        return (out * dout).sum() + (lse * dlse).sum()

    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(value, leaves)
    found = dense_results(q, k, v, mask, dout, dlse)
    again = results(*dense_attention(q, k, v, mask), dout, dlse, leaves)
    for a, b, c in zip(found[2:], torch.autograd.grad(value(*leaves), leaves), again[2:], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_it_keeps_the_dtype_of_its_inputs() -> None:
    q, k, v, dout = inputs(torch.bfloat16)
    found = dense_results(q, k, v, ra.full().dense(S, S), dout, torch.zeros(2, 4, S))
    assert {x.dtype for x in found} == {torch.bfloat16}

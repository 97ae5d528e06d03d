"""Bytes of plans, and of the rows of splits, are those that the transport counts while layers run."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ringattn as ra
from ringattn import budget
from ringattn.budget.plans import gigabytes
from ringattn.budget.splits import Split, splits
from ringattn.integrations.checkpointing import keep_attention
from ringattn.testing import run_processes

S, ROWS, WINDOW = 200, 2, 24
HERE = {"loss_chunks": 1, "token_chunks": 1, "dtype": "float32", "code": "decoder"}
FULL = budget.AttentionShape(4, 2, 8, 8)
SHAPES = {
    "causal": budget.ModelShape("causal", 32, 64, (budget.LayerShape(FULL, budget.MLPShape(48)),) * 2),
    "windows": budget.ModelShape(
        "windows", 32, 64,
        tuple(budget.LayerShape(replace(FULL, window=w), budget.MLPShape(48)) for w in (WINDOW, WINDOW, None)),
    ),
}  # fmt: skip
# a shape, schedule, layout, ranks of the head axis, way of recomputing
Case = tuple[str, str, str, int, str]
CASES: list[Case] = [
    ("causal", "ring", "zigzag", 1, "none"), ("causal", "ring", "zigzag", 2, "full"),
    ("windows", "ring", "contiguous", 1, "attention"), ("windows", "exchange", "contiguous", 1, "full"),
    ("windows", "ring", "contiguous", 2, "full"), ("causal", "gather", "zigzag", 1, "full"),
]  # fmt: skip


def attended(case: Case, transport: Any) -> int:
    """Bytes that this rank receives in the attention calls of a step of the shape's layers."""
    name, schedule, layout, ulysses, recompute = case
    model = SHAPES[name]
    masks = {layer.attention.window: ra.causal() for layer in model.layers}
    masks = {w: mask if w is None else mask & ra.sliding_window(w - 1) for w, mask in masks.items()}
    of = model.layers[0].attention
    shape = ra.Shape(of.num_heads, of.num_kv_heads, of.head_dim, batch=ROWS, dtype="float32")
    cp = ra.ContextParallel(
        transport, S, mask=tuple(masks.values()), shape=shape, layout=layout, schedule=schedule, ulysses=ulysses
    )  # fmt: skip
    size = ROWS, cp.local_seqlen, of.num_heads + 2 * of.num_kv_heads, of.head_dim
    x = torch.randn(size, generator=torch.Generator().manual_seed(cp.rank), requires_grad=True)
    kept: dict[str, Any] = {"context_fn": keep_attention()} if recompute == "attention" else {}
    y = x
    for layer in model.layers:
        mask = masks[layer.attention.window]

        def call(y: Tensor, mask: ra.Mask = mask) -> Tensor:
            q, k, v = y.split([of.num_heads, of.num_kv_heads, of.num_kv_heads], dim=2)
            return torch.cat([ra.attention(q, k, v, cp=cp, mask=mask), k, v], dim=2)

        y = call(y) if recompute == "none" else checkpoint(call, y, use_reentrant=False, **kept)
    y.square().sum().backward()
    return sum(cp.traffic()["received"].values())


def check(world: int, found: dict[Case, Sequence[int]]) -> None:
    for case, ranks in found.items():
        name, schedule, layout, ulysses, recompute = case
        how: dict[str, Any] = {"schedule": schedule, "layout": layout, "gpus": world} | HERE
        plan = budget.plan(SHAPES[name], S, ulysses=ulysses, recompute=recompute, batch=ROWS, **how)
        assert plan.received in ranks and plan.received == max(ranks) > 0, (case, plan.received, ranks)
        (row,) = rows_of(splits(SHAPES[name], S, own_loop=True, **how), ulysses, recompute)
        assert row.received == plan.received and f"{row.row()[5]} GB" == gigabytes(plan.received)


def rows_of(found: Iterable[Split], ulysses: int, recompute: str) -> list[Split]:
    wanted = ulysses, 1, ROWS, recompute, False
    return [row for row in found if (row.ulysses, row.data, row.batch, row.recompute, row.offload) == wanted]


def of_rank(rank: int, world: int) -> list[int]:
    return [attended(case, dist.group.WORLD) for case in CASES]


def test_bytes_of_plans_and_splits_are_those_of_threads() -> None:
    check(4, {CASES[4]: ra.Loopback(4).run(lambda transport: attended(CASES[4], transport))})


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_of_plans_and_splits_are_those_of_processes(world: int) -> None:
    ranks = run_processes(of_rank, world, timeout=100)
    check(world, dict(zip(CASES, zip(*ranks, strict=True), strict=True)))

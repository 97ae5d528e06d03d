"""Who moves when one token changes: leaks past the masks of the stack, and context that does not arrive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.check.measure import size, tolerance
from ringattn.check.observe import Truth, View, layer_masks
from ringattn.check.report import Finding
from ringattn.check.settings import DTYPES, Settings

APART, FUTURE, REACH, CONTEXT = "documents stay apart", "no future tokens", "reach of the masks", "no lost context"


def reach(masks: Sequence[Tensor], each_layer: bool) -> Tensor:
    """Bool ``[seqlen, seqlen]``: whether output ``i`` may depend on token ``j``, by any chain of the layers' masks
    (bool ``[seqlen, seqlen]``) and residual connections. One mask that stands for any number of layers is
    followed to its transitive closure."""
    step = [(m | torch.eye(len(m), dtype=torch.bool)).float() for m in masks]
    if each_layer:
        chain = step[0]
        for m in step[1:]:
            chain = ((m @ chain) > 0).float()
        return chain > 0
    (closure,) = step
    while not torch.equal(wider := ((closure @ closure) > 0).float(), closure):
        closure = wider
    return closure > 0


def compare_influence(settings: Settings, truth: Truth, views: Sequence[View]) -> list[Finding]:
    """The four findings on influence."""
    dense = {m: m.dense(settings.seqlen, settings.seqlen) for m in layer_masks(truth.stack, settings)}
    may = reach([dense[m] for m in layer_masks(truth.stack, settings)], truth.stack.each_layer)
    probes = torch.tensor(settings.probes)
    moved = torch.empty(len(probes), settings.seqlen, dtype=torch.float64)
    owner = torch.empty(settings.seqlen, dtype=torch.int64)
    for rank, view in enumerate(views):
        moved[:, view.positions] = view.moved.double()
        owner[view.positions] = rank
    noise = 64 * torch.finfo(DTYPES[settings.dtype]).eps * size(truth.view.logits)
    leak = ~(moved <= noise) & ~may[:, probes].T  # NaN moves too
    alone = ~(truth.view.moved <= noise) & ~may[:, probes].T
    i, j = torch.arange(settings.seqlen)[None], probes[:, None]
    document = settings.document_of
    other = document[None] != document[probes][:, None]
    kinds = ((APART, other), (FUTURE, ~other & (i < j)), (REACH, ~other & (i > j)))
    leaks = [_leak(question, leak & kind, alone & kind, settings) for question, kind in kinds]
    if settings.documents == 1:
        leaks[0] = Finding(APART, True, "not asked: one document")
    return [*leaks, _lost(settings, truth, moved, owner)]


_REMEDIES = {
    APART: "a layer does not know of the documents: give its attention one of cp.masks (which hold them), and cut "
    "convolutions, shifts and recurrences at the bounds of documents",
    FUTURE: "a layer sees tokens to come: its attention must use a causal mask of cp.masks; or the model's masks are "
    "meant to be wider, and the factory must say so in its attribute masks",
    REACH: "a layer ignores its window: pass attention(mask=) of that layer, sliding_window(W - 1) for a window of W "
    "tokens that counts the query's own; or the factory's attribute masks states too narrow a stack",
}


def _leak(question: str, leak: Tensor, alone: Tensor, settings: Settings) -> Finding:
    if not leak.any():
        return Finding(question, True, f"{len(settings.probes)} tokens changed, one at a time")
    probe, output = (int(x) for x in leak.nonzero()[0])
    token = settings.probes[probe]
    of = settings.document_of
    places = f" (document {of[token]} to {of[output]})" if question == APART else f" ({abs(output - token)} away)"
    where = "on one process too" if (leak & alone).any() else "only where the sequence is sharded"
    return Finding(
        question, False,
        f"token {token} moves output {output}{places} and {int(leak.sum()) - 1} more such pairs, {where}",
        _REMEDIES[question],
    )  # fmt: skip


def _lost(settings: Settings, truth: Truth, moved: Tensor, owner: Tensor) -> Finding:
    """Outputs that clearly move in the single run and by less than a hundredth of that in the sharded one."""
    clear = 10 * tolerance(settings, truth) * size(truth.view.logits)
    expected = truth.view.moved
    lost = (expected > clear) & (moved < 0.01 * expected)
    foreign = owner[None] != owner[settings.probes][:, None]
    crossing = int((foreign & (expected > clear)).sum())
    if not crossing:
        return Finding(
            CONTEXT, False, "not asked: no token of one rank matters to another",
            "this layout keeps documents whole: check with fewer --documents, or --layout zigzag",
        )  # fmt: skip
    if not lost.any():
        return Finding(CONTEXT, True, f"all {crossing} influences across ranks arrive")
    probe, output = (int(x) for x in lost.nonzero()[0])
    token = settings.probes[probe]
    what = (
        f"token {token} (rank {owner[token]}) should move output {output} (rank {owner[output]}) and does not, "
        f"nor do {int(lost.sum()) - 1} more such pairs"
    )
    if not (lost & ~foreign).any():
        some = "some layers see" if int((lost & foreign).sum()) < crossing else "the model sees"
        remedy = (
            f"the ring is cut: {some} no tokens of other ranks. Call ringattn.attention(cp=cp), not a local attention, "
            "in every layer, on the cp that the factory was given"
        )
    else:
        remedy = "context is lost even inside a rank: a layer's mask is narrower than on one process"
    return Finding(CONTEXT, False, what, remedy)

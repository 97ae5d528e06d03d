"""The loss of the user's step against that of one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ringattn.check.measure import MARGIN, tolerance
from ringattn.check.observe import Truth, View
from ringattn.check.report import Finding
from ringattn.check.settings import IGNORED, Settings

LOSS = "loss"
_ALIKE = 1e-5  # relative, of a loss and what a known mistake makes of it
_SHIFT = (
    "labels are shifted after they were sharded, so each shard's last token loses its target: shift them first, then "
    "shard"
)
_COUNT = (
    "a mean over each rank's own targets, of which ranks hold unequal numbers: divide the sum by the number of "
    "targets on all ranks"
)


def compare_loss(settings: Settings, truth: Truth, views: Sequence[View], layers_agree: bool) -> Finding:
    """The finding on the loss. ``layers_agree``: the step computes the right outputs, so the loss itself is wrong."""
    right = truth.view.step.loss
    values = [v.step.loss for v in views]
    within = max(tolerance(settings, truth) * abs(right), MARGIN * abs(truth.shaken.step.loss - right))
    if all(abs(v - right) <= within for v in values):
        return Finding(LOSS, True, f"{right:.6f} on every rank")
    what = f"{', '.join(f'{v:.6f}' for v in values)} on ranks 0 to {len(values) - 1}, {right:.6f} on one process"
    if not layers_agree:
        return Finding(LOSS, False, what, "follows from the layers that differ: mend those first")
    if abs(sum(values) - right) <= within:
        return Finding(LOSS, False, what, "each rank returns its share of the loss: sum it over the ranks")
    return Finding(LOSS, False, what, _mistake(settings, truth, views) or _general(values))


def _general(values: Sequence[float]) -> str:
    ranks = "" if max(values) - min(values) <= _ALIKE * abs(max(values)) else " and reduce it over the ranks"
    return f"the outputs are right, the loss is not: shift labels before they are sharded{ranks}; {_COUNT}"


def _mistake(settings: Settings, truth: Truth, views: Sequence[View]) -> str:
    """Which known mistake gives exactly these losses, from the single run's logits."""
    logits = truth.view.logits
    labels = settings.labels(settings.tokens(truth.vocab))
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    late = [F.pad(labels[:, v.positions][:, 1:], (0, 1), value=IGNORED) for v in views]
    early = [shifted[:, v.positions] for v in views]
    whole = int((shifted != IGNORED).sum())
    for targets, remedy in ((late, _SHIFT), (early, _COUNT)):
        sums = [_sum(logits[:, v.positions], t) for v, t in zip(views, targets, strict=True)]
        counts = [int((t != IGNORED).sum()) for t in targets]
        means = [s / max(n, 1) for s, n in zip(sums, counts, strict=True)]
        candidates = [sum(sums) / max(sum(counts), 1), sum(sums) / whole, sum(means) / len(means), sum(means)]
        if _explains([v.step.loss for v in views], means, candidates):
            return remedy
    return ""


def _sum(logits: Tensor, targets: Tensor) -> float:
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return float(total)


def _explains(seen: Sequence[float], means: Sequence[float], candidates: Sequence[float]) -> bool:
    values = torch.tensor(seen, dtype=torch.float64).nan_to_num()  # the mean of no targets
    if torch.allclose(values, torch.tensor(means, dtype=torch.float64), rtol=_ALIKE, atol=0.0):
        return True
    return any(torch.allclose(values, torch.full_like(values, c), rtol=_ALIKE, atol=0.0) for c in candidates)

"""Every parameter's gradient on every rank against that of one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.check.measure import allowed, size, tolerance
from ringattn.check.observe import Truth, View
from ringattn.check.report import Finding
from ringattn.check.settings import Settings

GRADIENTS = "gradients"
Gradients = dict[str, Tensor]


def compare_gradients(settings: Settings, truth: Truth, views: Sequence[View], cause: bool) -> Finding:
    """The finding on gradients. ``cause``: the layers or the loss differ, which explains a difference."""
    relative = tolerance(settings, truth)
    right = _zeros_for_none(truth.view.step.gradients, truth.view.step.gradients)
    shaken = _zeros_for_none(truth.shaken.step.gradients, right)
    ranks = [_zeros_for_none(v.step.gradients, right) for v in views]
    largest = max((size(g) for g in right.values()), default=0.0)
    if not largest:
        return Finding(GRADIENTS, False, "none on one process", "the step must call backward() and leave the gradients")
    least = 1e-3 * relative * largest  # a gradient that is zero but for rounding has no size of its own
    room = {name: max(least, allowed(g, shaken[name], relative)) for name, g in right.items()}
    wrong = [n for n, g in right.items() if any(not size(r[n] - g) <= room[n] for r in ranks)]
    if not wrong:
        return Finding(GRADIENTS, True, f"all {len(right)} parameters on {len(views)} ranks")
    worst = max(wrong, key=lambda n: max(size(r[n] - right[n]) for r in ranks) / (size(right[n]) or 1.0))
    error = max(size(r[worst] - right[worst]) for r in ranks) / (size(right[worst]) or 1.0)
    whose = "all gradients" if len(wrong) == len(right) else f"gradients of {_names(wrong)}"
    what = f"{whose} differ; largest relative difference {error:.1e}, in {worst}"
    known = _missing(wrong, views) or _unreduced(wrong, right, ranks, room) or _scaled(wrong, right, ranks, room)
    if known:
        return Finding(GRADIENTS, False, f"{whose} {known[0]}", known[1])
    if cause:
        return Finding(GRADIENTS, False, what, "follows from the layers or the loss that differ: mend those first")
    return Finding(
        GRADIENTS, False, what,
        "forward is right, backward is not: look for detach(), a collective without a backward, or a reduction that "
        "misses some ranks",
    )  # fmt: skip


def _zeros_for_none(found: dict[str, Tensor | None], like: dict[str, Tensor | None] | Gradients) -> Gradients:
    zero = torch.zeros(())
    out = {name: found.get(name) for name in like}
    return {n: (zero if g is None else g).double() for n, g in out.items()}


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _missing(wrong: Sequence[str], views: Sequence[View]) -> tuple[str, str] | None:
    for rank, view in enumerate(views):
        if all(view.step.gradients.get(n) is None for n in wrong):
            return f"are missing on rank {rank}", "the step must call backward() on every rank and keep the gradients"
    return None


def _unreduced(
    wrong: Sequence[str], right: Gradients, ranks: Sequence[Gradients], room: dict[str, float]
) -> tuple[str, str] | None:
    n = len(ranks)
    for divisor, note in ((1, ""), (n, f", and each is {n} times its share")):
        if all(size(sum(r[p] for r in ranks) / divisor - right[p]) <= n * room[p] for p in wrong) and not _equal(
            wrong, ranks, room
        ):
            return (
                f"are not summed over the ranks: every rank holds its own part{note}",
                "sum them after backward (all_reduce of every parameter's gradient)",
            )
    return None


def _equal(wrong: Sequence[str], ranks: Sequence[Gradients], room: dict[str, float]) -> bool:
    return all(size(r[p] - ranks[0][p]) <= 2 * room[p] for p in wrong for r in ranks)


def _scaled(
    wrong: Sequence[str], right: Gradients, ranks: Sequence[Gradients], room: dict[str, float]
) -> tuple[str, str] | None:
    """One factor for all of them, by least squares."""
    true = torch.cat([right[p].flatten() for p in wrong])
    mine = torch.cat([ranks[0][p].expand_as(right[p]).flatten() for p in wrong])
    factor = float(mine @ true / (true @ true))
    off = max(1.0, abs(factor))
    if not all(size(r[p] - factor * right[p]) <= 2 * off * room[p] for p in wrong for r in ranks):
        return None
    n = len(ranks)
    if abs(factor * n - 1) < 1e-3:
        remedy = (
            f"they are averaged over the {n} ranks, and each rank's loss is its share: sum them, or multiply by {n}"
        )
    elif abs(factor / n - 1) < 1e-3:
        remedy = f"summed over {n} ranks, but each rank's loss counts as the whole, or summed twice: divide by {n}"
    else:
        remedy = "look for a factor on the loss before backward, or on the gradients after it"
    return f"are {factor:.3f}x", remedy

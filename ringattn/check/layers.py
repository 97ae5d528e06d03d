"""The first layer at which the sharded training step parts from the single one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringattn.check.measure import allowed, assemble, size, tolerance
from ringattn.check.observe import Truth, View, layer_masks
from ringattn.check.report import Finding
from ringattn.check.settings import Settings, SubjectError

NEAR = 3  # tokens that a short convolution reaches
LAYERS, OUTPUTS = "layers of the step", "outputs"
_PASS_POSITIONS = "pass position_ids=cp.position_ids[None], the global positions of this rank's tokens"
_ABOVE = "follows from the finding on influence above: mend that first"


def compare_layers(settings: Settings, truth: Truth, views: Sequence[View], cause: bool) -> list[Finding]:
    """Findings on the model's output and on every layer in the step. ``cause``: a finding on influence has failed,
    which explains a difference."""
    steps = _layers(settings, truth, views, cause)
    return [_outputs(settings, truth, views, "" if steps.ok else f"see the {LAYERS}"), steps]


def _outputs(settings: Settings, truth: Truth, views: Sequence[View], see: str) -> Finding:
    right = truth.view.logits
    found = assemble([v.logits for v in views], [v.positions for v in views], right)
    if found is None:
        shapes = [tuple(v.logits.shape) for v in views]
        raise SubjectError(f"logits {shapes} of the ranks are no shards of {tuple(right.shape)} on one process")
    error = size(found - right)
    relative = error / (size(right) or 1.0)
    if error <= allowed(right, truth.shaken.logits, tolerance(settings, truth)):
        return Finding(OUTPUTS, True, f"relative difference {relative:.1e}")
    remedy = see or _guess(settings, truth, views, found, right)
    return Finding(OUTPUTS, False, f"differ from one process by {relative:.1e}, relative", remedy)


def _layers(settings: Settings, truth: Truth, views: Sequence[View], cause: bool) -> Finding:
    right, shaken, positions = truth.view.step.layers, truth.shaken.step.layers, [v.positions for v in views]
    agreed: list[str] = []
    for name, single in right.items():
        parts = [v.step.layers[name] for v in views if name in v.step.layers]
        whole = assemble(parts, positions, single) if len(parts) == len(views) else None
        if whole is None or name not in shaken:
            continue
        error = size(whole - single)
        if not error <= allowed(single, shaken[name], tolerance(settings, truth)):
            relative = error / (size(single) or 1.0)
            after = f", the first after {agreed[-1]}, which agrees" if agreed else ", the first of all"
            told = _told([v.step.positions for v in views])
            remedy = told or (_ABOVE if cause else _guess(settings, truth, views, whole, single))
            return Finding(LAYERS, False, f"{name} differs by {relative:.1e}, relative{after}", remedy)
        agreed.append(name)
    if not agreed:
        return Finding(
            LAYERS, False, "no output of the model in the step could be compared",
            "the step must call the model that it is given, on this rank's shard of all the tokens: cp.shard(tokens)",
        )  # fmt: skip
    return Finding(LAYERS, True, f"all {len(agreed)} module outputs agree")


def _told(told: Sequence[str]) -> str:
    wrong = {kind: [r for r, t in enumerate(told) if t == kind] for kind in ("restart", "missing", "other")}
    if wrong["restart"]:
        return f"the step's position ids restart at 0 on rank {wrong['restart'][0]}: {_PASS_POSITIONS}"
    if wrong["missing"]:
        return f"the step gives the model no position ids, so they restart at 0 on each rank: {_PASS_POSITIONS}"
    if wrong["other"]:
        return f"the step's position ids are not those of the rank's tokens: {_PASS_POSITIONS}"
    return ""


def _near_borders(views: Sequence[View], seqlen: int) -> Tensor:
    """Bool ``[seqlen]``: tokens with one of another rank at most NEAR away."""
    owner = torch.empty(seqlen, dtype=torch.int64)
    for rank, view in enumerate(views):
        owner[view.positions] = rank
    near = torch.zeros(seqlen, dtype=torch.bool)
    for away in range(1, NEAR + 1):
        foreign = owner[away:] != owner[:-away]
        near[away:] |= foreign
        near[:-away] |= foreign
    return near


def _guess(settings: Settings, truth: Truth, views: Sequence[View], found: Tensor, right: Tensor) -> str:
    """What is wrong, from where the tokens lie that are right all the same."""
    dim = next(d for d in sorted(range(right.ndim), key=lambda d: d != 1) if right.shape[d] == settings.seqlen)
    error = (found - right).abs().nan_to_num(nan=torch.inf).amax(dim=[d for d in range(right.ndim) if d != dim])
    masks = layer_masks(truth.stack, settings)
    dense = [m.dense(settings.seqlen, settings.seqlen) for m in masks]
    widest = torch.stack(dense).any(0)
    for mask, pairs in zip(masks, dense, strict=True):
        free = (pairs == widest).all(1)  # tokens that see no more without this mask
        if not free.all() and size(error[free]) < 0.01 * size(error[~free]):
            return (
                f"right only where {mask} hides nothing that a wider mask shows: probably this layer ignores its own "
                f"mask; pass attention(mask=) of each layer. Transformers' window of W tokens is sliding_window(W - 1)"
            )
    near = _near_borders(views, settings.seqlen)
    if not near.all() and size(error[~near]) < 0.01 * size(error):
        return (
            "wrong only where shards meet: this layer takes something from neighbours in the sequence (a shift, "
            "a short convolution) that lie on other ranks; fetch those, or shard after it"
        )
    home = torch.zeros(settings.seqlen, dtype=torch.bool)
    for view in views:
        home[view.positions[view.positions == torch.arange(len(view.positions))]] = True
    if home.any() and size(error[home]) < 0.01 * size(error[~home]):
        return (
            "right only where a token's local index is its position: probably the model ignores position_ids and "
            f"its positions restart at 0 on each rank; {_PASS_POSITIONS}, and use them"
        )
    return (
        "this layer, or what leads to it, takes something from other tokens (a shift, a convolution, a mean over "
        "tokens, a mask) and knows those of its shard only"
    )

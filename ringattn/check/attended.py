"""Which mask each attention of the sharded model was given, beside the mask that its layer states.

Influence alone cannot tell: in a stack with one wide layer any output may depend on any token before it, whatever the
narrow layers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ringattn.check.report import Finding
from ringattn.check.settings import Settings
from ringattn.geometry.masks import Expression
from ringattn.runtime.dispatch import attended_mask

MASKS = "masks of the layers"


class Attended(TorchDispatchMode):
    """Notes the mask of every call of `ringattn.attention`, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Expression] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.ringattn.attention.default:
            self.masks.append(attended_mask(args))
        return func(*args, **(kwargs or {}))


def compare_masks(
    settings: Settings, stated: Sequence[Expression], each_layer: bool, attended: Sequence[Expression]
) -> Finding:
    """The finding on the masks of one forward. `stated`: one for each layer, or one for all."""
    if not each_layer:
        stated = [*stated] * len(attended)
    if len(stated) != len(attended):
        return Finding(MASKS, True, f"not asked: {len(stated)} are stated and attention() was called {len(attended)} x")
    for layer, (meant, given) in enumerate(zip(stated, attended, strict=True)):
        pairs = (mask.pairs(settings.seqlen, settings.seqlen) for mask in (meant, given))
        if meant != given and not np.array_equal(next(pairs), next(pairs)):
            return Finding(
                MASKS, False, f"attention {layer} was given {given}, its layer states {meant}",
                "pass attention(mask=) of that layer, one of cp.masks (which holds each mask once); or the factory's "
                "attribute masks does not list the layers in their order",
            )  # fmt: skip
    return Finding(MASKS, True, f"all {len(attended)} attentions have the mask that their layer states")

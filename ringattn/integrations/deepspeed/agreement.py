"""What all ranks must say alike before DeepSpeed starts: what one of them refuses, all raise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def agree(what: str, facts: Callable[[], Mapping[str, str]]) -> None:
    """Calls `facts` on every rank of the world. Raises its error where it has one, and on the other ranks a
    `ValueError` that names the rank and says it; a `ValueError` on all, too, where the facts differ."""
    own: Mapping[str, str] = {}
    error: Exception | None = None
    try:
        own = facts()
    except Exception as caught:
        error = caught
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, (None if error is None else str(error), own))
    if error is not None:
        raise error
    refused = [(rank, text) for rank, (text, _) in enumerate(said) if text is not None]
    if refused:
        raise ValueError(f"{what}: rank {refused[0][0]} refuses: {refused[0][1]}")
    for rank, (_, theirs) in enumerate(said):
        others = [name for name, fact in said[0][1].items() if theirs.get(name) != fact]
        if others:
            raise ValueError(
                f"{what}: ranks 0 and {rank} differ in {others[0]}; give every rank the same (weights: one seed, "
                "or one file)"
            )


def digest(value: Any) -> str:
    """Of what JSON can hold; other values by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def weights_of(model: nn.Module) -> str:
    """A digest of two sums of each parameter; those on meta, or in parts on the ranks already, are left out."""
    sums = [
        torch.stack([w.sum(dtype=torch.float64), torch.linalg.vector_norm(w, 1, dtype=torch.float64)])
        for w in (p.detach() for p in model.parameters())
        if w.device.type != "meta" and w.numel()
    ]
    return digest(torch.stack([x.cpu() for x in sums]).tolist() if sums else [])

"""Tensors that hold a shard for a while: checked, exchanged in place, and given back what they were."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ringattn.arguments.tensors import dim_of, plain
from ringattn.arguments.values import shown


def check_listed(**given: object) -> None:
    """That each is a list or the like, or None. A tensor would be taken for its rows."""
    for name, x in given.items():
        if x is not None and (isinstance(x, Tensor) or not isinstance(x, Collection)):
            raise ValueError(f"{name} is one {type(x).__name__}: must be a list; put it into one, {name}=[...]")


def checked_buffers(buffers: Sequence[Tensor], dims: Sequence[int]) -> int:
    """The one length that all of them have along their dims."""
    if not buffers:
        raise ValueError(
            "buffers is empty, so nothing tells how long the sequence is: list the tensors that lie along it (tokens, "
            "labels, positions or rotary angles)"
        )
    if len(buffers) != len(dims):
        raise ValueError(f"{len(buffers)} buffers and {len(dims)} seq_dims: name the dim of the tokens of each")
    lengths = [_length(f"buffers[{i}]", x, dim) for i, (x, dim) in enumerate(zip(buffers, dims, strict=True))]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"buffers of lengths {lengths} along their seq_dims: must be of one, that of the sequence; cut what is "
            "longer, such as a table of rotary angles, to it, and check the dims"
        )
    return lengths[0]


def _length(name: str, x: Tensor, dim: int) -> int:
    return plain(name, x).size(dim_of(x, dim))


def check_exchange(buffers: Sequence[Tensor], kept: Collection[Tensor]) -> None:
    """That they can be exchanged in place. ``kept``: those that are not to be given back."""
    for i, x in enumerate(buffers):
        if x.requires_grad:
            raise ValueError(
                f"buffers[{i}] requires grad, and what is exchanged in place has no gradient of the whole: of a "
                "parameter pass cp.shard(p, dim, grad='share') to the model instead; an input can be told to require "
                "one inside of the region"
            )
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"buffers[{i}] was made in inference mode, and cannot be changed outside: pass its clone()"
            )
        if any(x is other for other in buffers[:i]):
            raise ValueError(f"buffers[{i}] is listed twice: each tensor is sharded once")
    foreign = [x for x in kept if not any(x is other for other in buffers)]
    if foreign:
        raise ValueError(
            f"no_restore_buffers has {shown(foreign[0])}, which is not one of the buffers: list it there too"
        )


@contextmanager
def exchanged(buffers: Sequence[Tensor], shards: Sequence[Tensor], kept: Collection[Tensor]) -> Iterator[None]:
    """Each tensor is its shard inside, and afterwards, unless it is ``kept``, the very memory that it was: nothing is
    written to that, so tensors that share it (tokens and labels of one batch) are as they were all the time."""
    with torch.no_grad():
        wholes = [(x, None if any(x is other for other in kept) else x.detach()) for x in buffers]
        for x, shard in zip(buffers, shards, strict=True):
            x.set_(shard)  # type: ignore[call-overload]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, whole in wholes:
                if whole is not None:
                    x.set_(whole)  # type: ignore[call-overload]

"""What is called in the place of PyTorch's functions: their regions, shards, and what becomes of shards."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringattn.arguments.values import seed_of, shown
from ringattn.comm import together, told
from ringattn.context import ContextParallel
from ringattn.geometry.layouts import Layout, named
from ringattn.integrations.torch.buffers import check_exchange, check_listed, checked_buffers, exchanged
from ringattn.integrations.torch.region import Region, masks_of
from ringattn.masks import Mask
from ringattn.runtime.settings import Options

ROTATIONS = {"allgather": "gather", "alltoall": "ring"}  # PyTorch's names, and the schedules that do the same
DEFAULTS: dict[str, Any] = {"ulysses": 1, "shape": None, "schedule": "auto", "kernel": "auto", "options": Options()}


@dataclass
class Begun:
    """The regions that a group has begun, refused ones too: how many, the context of the last, whose transport, buffers
    and plans serve the next, and the latest itself, which PyTorch's functions mean where they name the mesh alone."""

    cp: ContextParallel
    count: int = 0
    latest: Region | None = None


_begun: WeakKeyDictionary[dist.ProcessGroup, Begun] = WeakKeyDictionary()


@contextmanager
def context_parallel(
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    buffers: Sequence[Tensor] | None = None,
    buffer_seq_dims: Sequence[int] | None = None,
    no_restore_buffers: Collection[Tensor] | None = None,
    mask: Mask | None = None,
    layout: str | Layout = "auto",
    seed: int | None = None,
    **settings: Any,
) -> Iterator[ContextParallel]:
    """`torch.distributed.tensor.experimental.context_parallel` with exact attention for every mask and length: inside,
    each of ``buffers`` is this rank's shard of itself, and `F.scaled_dot_product_attention` attends over all shards.

    Forward and backward belong inside. A backward behind the region is exact, too, where what it needs was not given
    back (PyTorch raises for a buffer that was: list it in ``no_restore_buffers``) and no layer is computed again.

    Args:
        mesh: the 1-D mesh, or the group, of the ranks that share the sequence.
        buffers: tensors of any dtype along the sequence, the same on all ranks: tokens, shifted labels, positions or
            rotary angles. They are exchanged in place, and keep no gradient.
        buffer_seq_dims: the dim of the tokens in each; all have the same length there, any.
        no_restore_buffers: those of them that stay shards.
        mask: what a query may see at most, e.g. ``ringattn.documents(cu_seqlens)``; a call with ``is_causal`` sees the
            part of it that is causal. None is everything.
        layout: of the tokens over the ranks, as of a :class:`ContextParallel`. Buffers hold their tokens in its order.
        seed: of the dropout of the calls, alike on all ranks: the step, say.
        settings: ``schedule``, ``kernel``, ``options``, ``ulysses`` and ``shape`` of a :class:`ContextParallel`.

    Yields the :class:`ContextParallel`: its ``unshard``, ``position_ids`` and the rest.

    Raises:
        ValueError: buffers or settings that do not fit, on all ranks, before any is changed.
    """
    kept = () if no_restore_buffers is None else no_restore_buffers
    region = _region(mesh, buffers, buffer_seq_dims, kept, mask, layout, seed, settings)
    buffers, dims, kept = tuple(buffers or ()), tuple(buffer_seq_dims or ()), tuple(kept)
    with torch.no_grad():
        shards = _shards(region.cp, buffers, dims)
    # a rank that leaves by an exception of its user's makes fewer calls than the others, who would meet its next region
    with told(region.cp.link.transport, "context_parallel"), exchanged(buffers, shards, kept), region:
        yield region.cp


def context_parallel_shard(
    mesh: DeviceMesh | dist.ProcessGroup,
    buffers: Sequence[Tensor],
    seq_dims: Sequence[int],
    load_balancer: None = None,
    *,
    mask: Mask | None = None,
    layout: str | Layout = "auto",
    seed: int | None = None,
    **settings: Any,
) -> list[Tensor]:
    """PyTorch's `_context_parallel_shard`: this rank's shards of ``buffers``, which stay as they are. Modules of a
    :class:`RingAttention` style on this mesh attend over them. Arguments and errors as of :func:`context_parallel`."""
    _refuse(load_balancer)
    region = _region(mesh, buffers, seq_dims, None, mask, layout, seed, settings)
    return _shards(region.cp, buffers, seq_dims)


@torch.no_grad()
def context_parallel_unshard(
    mesh: DeviceMesh | dist.ProcessGroup, buffers: Sequence[Tensor], seq_dims: Sequence[int], load_balancer: None = None
) -> list[Tensor]:
    """PyTorch's function of this name: the whole tensors in global order from every rank's shards, without gradients,
    of the latest region of the mesh. Collective. (`unshard` of the context is differentiable, and of any region.)

    Raises `ValueError` for a tensor that is no shard of that region, on all ranks.
    """
    _refuse(load_balancer)
    cp = latest_region(mesh).cp
    with told(cp.link.transport, "context_parallel_unshard"):
        if len(buffers) != len(seq_dims):
            raise ValueError(f"{len(buffers)} buffers and {len(seq_dims)} seq_dims: name the dim of the tokens of each")
    return [cp.unshard(x, dim) for x, dim in zip(buffers, seq_dims, strict=True)]


def set_rotate_method(rotate_method: str) -> str:
    """PyTorch's function of this name chooses how K/V travel, for the whole process. Here it sets nothing: a context
    takes the schedule that costs least. Warns of that, and returns the name of the schedule that does the same, for
    ``context_parallel(..., schedule=)``: gather for allgather, ring for alltoall."""
    schedule = ROTATIONS[named("rotate_method", rotate_method, list(ROTATIONS))]
    warnings.warn(
        f"set_rotate_method({rotate_method!r}) sets nothing: schedules are chosen by cost, with equal results; "
        f"context_parallel(..., schedule={schedule!r}) asks for this one",
        stacklevel=2,
    )
    return schedule


def latest_region(mesh: DeviceMesh | dist.ProcessGroup) -> Region:
    """The region that ranks of a mesh have begun last."""
    begun = _begun.get(_group(mesh))
    if begun is None or begun.latest is None:
        raise ValueError("no sequence has been sharded over this mesh: call context_parallel or context_parallel_shard")
    return begun.latest


def _group(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if isinstance(mesh, DeviceMesh) and mesh.ndim == 1:
        return mesh.get_group()
    raise ValueError(
        f"mesh={shown(mesh)}: must be a 1-D DeviceMesh, such as mesh['cp'] of a larger one, or a ProcessGroup; for "
        "others make a ringattn.ContextParallel"
    )


def _region(
    mesh: DeviceMesh | dist.ProcessGroup, buffers: Sequence[Tensor] | None, dims: Sequence[int] | None,
    kept: Collection[Tensor] | None, mask: Mask | None, layout: str | Layout, seed: int | None,
    settings: dict[str, Any],
) -> Region:  # fmt: skip
    """A region for the sequence along ``buffers``, from now on the latest. ``kept``: None where none is exchanged."""
    group, settings = _group(mesh), DEFAULTS | settings
    if group not in _begun:
        # The first of a group has no transport yet to tell a refusal by: a context of one token a rank brings it along.
        _begun[group] = Begun(ContextParallel(group, group.size(), options=settings["options"]))
    begun = _begun[group]
    begun.count += 1
    with together(begun.cp.link.transport, "context_parallel"):  # what one rank refuses, all of them refuse
        check_listed(buffers=buffers, buffer_seq_dims=dims, no_restore_buffers=kept)
        buffers, dims = tuple(buffers or ()), tuple(dims or ())
        seqlen = checked_buffers(buffers, dims)
        if kept is not None:
            check_exchange(buffers, kept)
        seed = None if seed is None else seed_of("seed", seed)
        masks = masks_of(mask, seqlen)
        order = reversed(masks) if mask is None else masks  # the first is that of plain calls of ringattn.attention
        begun.cp = begun.cp.replace(seqlen=seqlen, mask=tuple(order), layout=layout, **settings)
    begun.latest = Region(begun.cp, masks, seed, f"region {begun.count}")
    return begun.latest


def _shards(cp: ContextParallel, buffers: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    return [cp.shard(x, dim) for x, dim in zip(buffers, dims, strict=True)]


def _refuse(load_balancer: object) -> None:
    if load_balancer is not None:
        raise NotImplementedError(
            f"load_balancer={shown(load_balancer)}: tokens are dealt by the layout; pass layout='zigzag' for head and "
            "tail, or leave both out for the layout that suits the mask"
        )

"""Batches for sharded models: every rank of a context group reads the same samples, and keeps its tokens of them.

Labels are shifted before they are cut, as the next token of a shard's last one lies on another rank. Rows with padding
or documents of their own are packed into one sequence. Nothing here communicates, so it may run in a loader's worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DistributedSampler

from ringattn.comm import PlanningRank, told
from ringattn.context import ContextParallel
from ringattn.integrations.transformers.forgotten import watch
from ringattn.integrations.transformers.ring import batch_context
from ringattn.loss import IGNORED, shift_labels
from ringattn.packing import Packing, pack
from ringattn.runtime.binding import Shared
from ringattn.runtime.link import Link

TOLD = ("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids")
FILLS = {"labels": IGNORED}


def shard_batch(cp: ContextParallel, batch: Mapping[str, Any], *, multiple: int = 1) -> dict[str, Tensor]:
    """This rank's part of a batch as a collator makes it, ready for `model(**batch)` under `register(cp)`.

    Args:
        cp: the registered context. Its length need not be the batch's.
        batch: whole `input_ids` `[batch, seqlen]`, perhaps `labels` (as Transformers has them: not shifted) and others
            of that shape. Where documents begin is read from `cu_seq_lens_q`, `seq_idx` or `position_ids` that start
            again (one that is not greater than the one before); `attention_mask` tells padding, which is dropped.
            Given `position_ids`, `[1|batch, seqlen]` or `[axes, 1|batch, seqlen]`, are kept.
        multiple: fill packed sequences up to a multiple of so many tokens.

    Returns `input_ids`, `position_ids`, `labels` and `shift_labels` (both shifted, -100 without a target) of
    `[batch, local_seqlen]`, or `[1, local_seqlen]` where rows were packed, and `cu_seq_lens_q`, `cu_seq_lens_k`: the
    bounds of the whole sequence.

    Warns, once, where batches of several ranks are used up and no layer has asked for attention: what a model does
    that was never registered.

    Raises `ValueError` for tensors of other shapes; the other ranks then raise in the call they make next.
    """
    with told(cp.link.transport, "shard_batch"):
        local = _sharded(cp, batch, multiple)
        watch(cp, local["input_ids"])
        return local


def _sharded(cp: ContextParallel, batch: Mapping[str, Any], multiple: int) -> dict[str, Tensor]:
    _check(batch)
    ids = batch["input_ids"]
    packing = _packing(batch, multiple)
    whole = {name: _laid(batch, name, packing) for name in batch if name not in TOLD}
    bounds = (0, ids.shape[1]) if packing is None else packing.cu_seqlens
    if "labels" in whole:
        whole["labels"] = shift_labels(whole["labels"], cu_seqlens=bounds)
    context = batch_context(cp, bounds)
    local = {name: context.shard(x) for name, x in whole.items()}
    if "labels" in local:
        local["shift_labels"] = local["labels"]
    positions = _positions(context, batch, packing)
    cu_seq_lens = torch.tensor(bounds, dtype=torch.int32)
    return {**local, "position_ids": positions, "cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}


def _check(batch: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless all inputs have the shape of `input_ids`, or what it takes to tell their structure."""
    ids = batch.get("input_ids")
    shapes = {name: tuple(getattr(x, "shape", ())) for name, x in batch.items() if x is not None}
    odd = [name for name, shape in shapes.items() if name not in TOLD and shape[:2] != shapes.get("input_ids")]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or odd:
        raise ValueError(f"a batch of {shapes}: every input must be [batch, seqlen], as input_ids; leave others out")
    rows, seqlen = ids.shape
    for name, least, most in (("attention_mask", rows, 2), ("seq_idx", 1, 2), ("position_ids", 1, 3)):
        shape = shapes.get(name, (rows, seqlen))
        if not 2 <= len(shape) <= most or shape[-1] != seqlen or shape[-2] not in (least, rows):
            leading = rows if least == rows else f"1 or {rows}"
            axes = ", perhaps with axes in front" if most == 3 else ""
            raise ValueError(f"{name} {shape}: must be [{leading}, {seqlen}]{axes}, as input_ids; or leave them out")


def _positions(context: ContextParallel, batch: Mapping[str, Any], packing: Packing | None) -> Tensor:
    """The positions of this rank's tokens, `[..., local_seqlen]`: those given, or counted in each row."""
    given, shape = batch.get("position_ids"), batch["input_ids"].shape
    if given is None:
        counted = context.position_ids if packing is None else context.shard(packing.position_ids, dim=0)
        return counted[None]
    if packing is None:
        return context.shard(given, dim=given.ndim - 1)
    axes = given.expand(*given.shape[:-2], *shape).reshape(-1, *shape)
    rows = [torch.stack([axis[row][_real(batch, row)] for axis in axes], -1) for row in range(shape[0])]
    packed = packing.pack(rows).movedim(-1, 0)  # [axes, 1, tokens]
    return context.shard(packed if given.ndim == 3 else packed[0], dim=given.ndim - 1)


def _packing(batch: Mapping[str, Any], multiple: int) -> Packing | None:
    """How the rows are packed, or None if all of them are one document without padding."""
    seqlen = batch["input_ids"].shape[1]
    rows = [_bounds(batch, row) for row in range(batch["input_ids"].shape[0])]
    if all(row == [0, seqlen] for row in rows) and seqlen % multiple == 0:
        return None
    return pack(rows, multiple)


def _bounds(batch: Mapping[str, Any], row: int) -> list[int]:
    """Where the documents of a row begin and end, among its real tokens."""
    if batch.get("cu_seq_lens_q") is not None:
        if batch["input_ids"].shape[0] != 1:
            raise ValueError("cu_seq_lens_q belongs to one packed row, [1, seqlen]; this batch has several")
        return batch["cu_seq_lens_q"].tolist()
    real = _real(batch, row)
    count = int(real.sum())
    for name, begins in (("seq_idx", lambda d: d != 0), ("position_ids", lambda d: d <= 0)):
        if batch.get(name) is not None and batch[name].ndim <= 2:
            of_rows = batch[name].expand(batch["input_ids"].shape)
            changes = begins(of_rows[row][real].diff()).nonzero().flatten() + 1
            return [0, *changes.tolist(), count] if count else [0]
    return [0, count] if count else [0]


def _real(batch: Mapping[str, Any], row: int) -> Tensor:
    """Bool `[seqlen]`: the tokens of a row that are no padding."""
    if batch.get("attention_mask") is None:
        return torch.ones(batch["input_ids"].shape[1], dtype=torch.bool)
    return batch["attention_mask"][row].bool()


def _laid(batch: Mapping[str, Any], name: str, packing: Packing | None) -> Tensor:
    if packing is None:
        return batch[name]
    rows = [batch[name][row][_real(batch, row)] for row in range(batch["input_ids"].shape[0])]
    return packing.pack(rows, FILLS.get(name, 0))


class ShardingCollator:
    """Wraps a collate function: what it makes of the samples is cut to this rank's part by `shard_batch`.

    It needs no group, can be pickled, and so works in a `DataLoader`'s worker processes. In the process that made it,
    the other ranks are told what it refuses.

    Args:
        cp: the registered context.
        collate: from samples to a batch of whole sequences; Transformers' default without one.
        multiple: see `shard_batch`.
    """

    def __init__(
        self,
        cp: ContextParallel,
        collate: Callable[[Sequence[Any]], Mapping[str, Any]] | None = None,
        *,
        multiple: int = 1,
    ) -> None:
        self._settings, self._rank, self._world_size = cp.binding.settings, cp.rank, cp.world_size
        self._collate, self._multiple = collate, multiple
        self._context: ContextParallel | None = cp
        self._process = os.getpid()

    def __call__(self, samples: Sequence[Any]) -> dict[str, Tensor]:
        from transformers import default_data_collator

        if self._context is None or self._process != os.getpid():  # a worker must not touch the group's connections
            self._context, self._process = self._plan(), os.getpid()
        batch = (self._collate or default_data_collator)(list(samples))
        return shard_batch(self._context, batch, multiple=self._multiple)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_context": None}

    def _plan(self) -> ContextParallel:
        """A context that knows its place and talks to nobody: enough to plan and to cut."""
        s = self._settings
        place = PlanningRank(self._rank, self._world_size, s.options.timeout or 60.0)
        link = Link(place, s.options.compare_every, s.options.communicators)
        return ContextParallel(
            None, s.seqlen, mask=s.masks, layout=s.layout, schedule=s.schedule, kernel=s.kernel, options=s.options,
            kv_layout=s.kv_layout, shape=s.shape, ulysses=s.ulysses, _shared=Shared(link, s.device),
        )  # fmt: skip


def replica_sampler(
    dataset: Sized, data: DeviceMesh | None = None, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False
) -> DistributedSampler:
    """A sampler that gives all ranks of a context group the same samples, and other groups others.

    Args:
        dataset: the samples.
        data: the 1-D mesh of the data axis (`mesh["dp"]`); None where all ranks are one context group.
        shuffle, seed, drop_last: see `torch.utils.data.DistributedSampler`.
    """
    rank, size = (0, 1) if data is None else (data.get_local_rank(), data.size())
    return DistributedSampler(dataset, size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]

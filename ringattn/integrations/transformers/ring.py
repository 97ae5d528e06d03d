"""A ring: the context of a model, and from it the context of each batch with the mask of each kind of layer.

All layers of a batch share one layout, that of the context made for the batch's documents; so the shards that the data
side cut (`ShardingCollator`, or `cp.shard`) are those that every layer computes on.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.context import ContextParallel
from ringattn.geometry.masks import bounds_of, contains
from ringattn.integrations.transformers.structure import Structure, limited
from ringattn.masks import Mask, causal, documents

LARGEST_SEED = (1 << 62) - 1
KEPT = 4  # batches whose contexts are kept: a step's micro-batches


def batch_context(cp: ContextParallel, bounds: Sequence[int]) -> ContextParallel:
    """The context of a batch with documents at these bounds: `cp` itself for one document of its length."""
    seqlen = int(bounds[-1])
    if len(bounds) == 2:
        return cp if seqlen == cp.seqlen else cp.replace(seqlen=seqlen)
    apart = documents(bounds)
    return cp.replace(seqlen=seqlen, mask=tuple(mask & apart for mask in cp.masks))


class Ring:
    """The context that models registered with it compute in. `use(cp)` gives the next batches another one.

    ``seed``: what attention's dropout in each layer follows from, a number of your own for each micro-batch of a
    training (its step, say), the same on all ranks; so that a run which is resumed drops what it would have dropped,
    and a layer that is computed again (activation checkpointing) what it dropped before. None: the context's counter.
    """

    def __init__(self, cp: ContextParallel, check_positions: bool = True) -> None:
        self.check_positions = check_positions
        self.seed: int | None = None
        self._batches: OrderedDict[tuple[int, ...], Batch] = OrderedDict()
        self._before = False  # whether a layer had asked before the latest `use`
        self.use(cp)

    def use(self, cp: ContextParallel) -> None:
        """Takes `cp` for the calls that follow, such as a `replace()` with the next batch's documents.

        Raises `ValueError` unless the first mask contains the others: it is what a layer without a window sees.
        """
        if cp.kv_seqlen != cp.seqlen or cp.q_offset:
            raise ValueError(f"{cp!r}: a model's layers attend from all tokens to all tokens; give seqlen alone")
        for mask in cp.masks[1:]:
            if not contains(cp.masks[0], mask, cp.seqlen):
                raise ValueError(
                    f"the context's first mask {cp.masks[0]} does not contain {mask}: name first the mask of a layer "
                    "without a window, as masks_of(config) does"
                )
        self.cp = cp
        self.causal = contains(causal(), cp.masks[0], cp.seqlen)
        self._masks: dict[Structure, Mask] = {}
        self._before, self._batches = self.attended, OrderedDict()
        self._latest: tuple[Any, Batch] | None = None  # the cu_seq_lens tensor last seen, and its batch

    @property
    def asked(self) -> bool:
        """Whether a layer has asked for attention since `cp` was taken."""
        return bool(self._batches)

    @property
    def attended(self) -> bool:
        """Whether a layer has ever asked for attention."""
        return self._before or self.asked

    def layer_seed(self, model: str, layer: int | None, dropout: float) -> int | None:
        """The seed of a layer's dropout."""
        if not dropout or self.seed is None:
            return None
        if layer is None:
            raise NotImplementedError(
                f"{model}: its attention has no layer_idx to tell layers' dropout apart; leave Ring.seed None"
            )
        return hash((self.seed, layer)) & LARGEST_SEED

    def mask(self, structure: Structure) -> Mask:
        """The mask of layers of this structure, apart from a batch's documents: one of the context's if it has it."""
        if structure not in self._masks:
            self._masks[structure] = self._find(structure)
        return self._masks[structure]

    def _find(self, structure: Structure) -> Mask:
        cp, model = self.cp, structure.model
        if self.causal and not structure.causal:
            raise ValueError(
                f"{model}: a layer sees keys behind its own position, but the context's mask {cp.masks[0]} is causal; "
                "make the context with mask=ringattn.full()"
            )
        if structure.causal and not self.causal:
            warnings.warn(
                f"{model}: a layer is causal, but the context's mask {cp.masks[0]} lets tokens see later ones: "
                "that is computed; the model's own masks are mask=masks_of(config)",
                stacklevel=2,
            )
        mask = limited(cp.masks[0], structure.limits)
        same = (m for m in cp.masks if contains(m, mask, cp.seqlen) and contains(mask, m, cp.seqlen))
        return next(same, mask)

    def batch(
        self,
        model: str,
        local_seqlen: int,
        cu_seq_lens_q: Tensor | None,
        cu_seq_lens_k: Tensor | None,
        seq_idx: Tensor | None,
        position_ids: Tensor | None,
    ) -> Batch:
        """The batch that a layer's arguments describe."""
        batch = self._told(model, cu_seq_lens_q, cu_seq_lens_k, seq_idx, position_ids)
        if batch.cp.local_seqlen != local_seqlen:
            raise ValueError(
                f"{model}: {local_seqlen} tokens on rank {batch.cp.rank}, but {batch.cp!r} has {batch.cp.local_seqlen} "
                "here; shard every input with the context of its batch: cp.shard(x), ShardingCollator, or use(cp)"
            )
        return batch

    def _told(self, model: str, cu: Tensor | None, cu_k: Tensor | None, seq_idx: Tensor | None, ids: Any) -> Batch:
        if self._latest is not None and cu is not None and self._latest[0]() is cu:
            return self._latest[1]
        if cu is not None:
            bounds = tuple(int(x) for x in cu.tolist())
            if cu_k is not None and cu_k is not cu and tuple(cu_k.tolist()) != bounds:
                raise NotImplementedError(f"{model}: cu_seq_lens_k differs from cu_seq_lens_q: that is cross-attention")
            self._check_whole(model, bounds)
        elif seq_idx is not None:
            bounds = self._bounds_of_index(model, seq_idx)
        elif self.cp.world_size == 1 and ids is not None and bounds_of(self.cp.masks[0]) is None:
            bounds = _bounds_of_restarts(model, ids, self.cp.seqlen)
        else:
            bounds = (0, self.cp.seqlen)
        batch = self._batches.get(bounds)
        if batch is None:
            batch = self._batches[bounds] = Batch(self, bounds)
            if len(self._batches) > KEPT:
                self._batches.popitem(last=False)
        self._batches.move_to_end(bounds)
        if cu is not None:
            self._latest = (weakref.ref(cu), batch)
        return batch

    def _check_whole(self, model: str, bounds: tuple[int, ...]) -> None:
        known = bounds_of(self.cp.masks[0])
        if known is not None and len(bounds) > 2 and bounds != known:
            raise ValueError(
                f"{model}: cu_seq_lens_q has {len(bounds) - 1} documents and the context's mask {len(known) - 1} "
                "others; give the documents in one place"
            )

    def _bounds_of_index(self, model: str, seq_idx: Tensor) -> tuple[int, ...]:
        if seq_idx.shape[-1] != self.cp.seqlen:
            raise ValueError(
                f"{model}: seq_idx has {seq_idx.shape[-1]} tokens of {self.cp.seqlen}; one shard does not show where "
                "documents end on others. Pass the bounds of the whole sequence as cu_seq_lens_q and cu_seq_lens_k"
            )
        if (seq_idx != seq_idx[:1]).any():
            raise NotImplementedError(f"{model}: rows with documents of their own; pack them with ringattn.pack")
        changes = (seq_idx[0, 1:] != seq_idx[0, :-1]).nonzero().flatten() + 1
        return (0, *changes.tolist(), self.cp.seqlen)


class Batch:
    """The context of one batch, and the mask of every structure a layer of it has."""

    def __init__(self, ring: Ring, bounds: tuple[int, ...]) -> None:
        self.cp = batch_context(ring.cp, bounds)
        self.bounds = bounds_of(self.cp.masks[0])
        self._ring = ring
        self._apart = documents(bounds) if len(bounds) > 2 else None
        self._layers: dict[Structure, tuple[ContextParallel, Mask]] = {}
        self._checked: Callable[[], Tensor | None] = lambda: None  # the position_ids tensor last found right

    def layer(self, structure: Structure) -> tuple[ContextParallel, Mask]:
        """The context and the mask of a layer. The layout is the batch's, also for masks it did not name."""
        self._check_padding(structure)
        if structure not in self._layers:
            self._layers[structure] = self._find(structure)
        return self._layers[structure]

    def _find(self, structure: Structure) -> tuple[ContextParallel, Mask]:
        if self.bounds is not None and any(limit.kind == "chunked" for limit in structure.limits):
            raise NotImplementedError(f"{structure.model}: chunks of attention that start again in each document")
        cp, mask = self.cp, self._ring.mask(structure)
        if self._apart is not None:
            mask = mask & self._apart
        return (cp if mask in cp.masks else cp.replace(mask=(*cp.masks, mask), layout=cp.q_layout)), mask

    def _check_padding(self, structure: Structure) -> None:
        """Padding behind the real tokens of a causal row is exact as it is: no real token sees it."""
        padding, cp, model = structure.padding, self.cp, structure.model
        if padding is None:
            return
        whole, kind = padding.shape[-1] == cp.seqlen, structure.padding_kind
        if kind == "none" or (kind == "right" and whole and self._ring.causal):
            return
        raise NotImplementedError(
            f"{model}: attention_mask {tuple(padding.shape)} has padding ({kind}) that cannot be kept here. Only "
            f"padding behind causal rows can, told by the mask of the whole sequence, [batch, {cp.seqlen}]; otherwise "
            "pack the rows without it (ringattn.pack, or ShardingCollator, which does)"
        )

    def check_positions(self, structure: Structure, position_ids: Tensor | None) -> None:
        """Raises `ValueError` unless positions grow along each document, which they do not where a model without
        `position_ids` counts every shard from 0, or where documents start again whose bounds are not known.

        Each tensor of positions is looked at once, in the first layer that is given it (on a GPU that waits for it).
        """
        model = structure.model
        if self.cp.world_size == 1:
            if position_ids is None and structure.jumps and self.bounds is None:
                raise NotImplementedError(
                    f"{model} does not hand position_ids to its attention, and they do not count up one by one: pass "
                    "documents as cu_seq_lens_q and cu_seq_lens_k; positions of one document, check_positions=False"
                )
            return
        if position_ids is not None and self._checked() is position_ids:
            return
        if position_ids is None:
            raise NotImplementedError(
                f"{model} does not hand position_ids to its attention, so it cannot be seen whether it counts each "
                "shard from 0; pass position_ids to the model and register(cp, check_positions=False)"
            )
        found = self._positions(position_ids)
        if found != RIGHT:
            raise ValueError(f"{model}: {found}")
        self._checked = weakref.ref(position_ids)

    def _positions(self, ids: Tensor) -> str:
        cp, ids = self.cp, ids.detach().cpu()
        if ids.ndim > 2 or ids.shape[-1] != cp.local_seqlen:
            return UNKNOWN
        order = cp.position_ids.argsort()
        at, ids = cp.position_ids[order], ids.reshape(-1, cp.local_seqlen)
        bounds = torch.tensor(self.bounds or (0, cp.seqlen))
        document = torch.searchsorted(bounds, at, right=True) - 1
        ahead = ids[:, order] - (at - bounds[document])  # of the least position that a token can have
        grows = (ahead.diff() >= 0) | (document.diff() != 0)
        if bool((ahead >= 0).all() and grows.all()):
            return RIGHT
        return MISSING if bool((ids == torch.arange(cp.local_seqlen)).all()) else UNKNOWN


RIGHT = "positions that grow along each known document"
MISSING = (
    "position_ids count each shard from 0, as a model does without any: pass position_ids=cp.position_ids[None] (with "
    "documents whose positions start again, the shard of these positions, and cu_seq_lens_q)"
)
UNKNOWN = (
    "position_ids do not grow along each known document, from 0 or more: positions that start again need the bounds of "
    "the whole sequence, cu_seq_lens_q and cu_seq_lens_k; positions that mean something else, check_positions=False"
)


def _bounds_of_restarts(model: str, ids: Tensor, seqlen: int) -> tuple[int, ...]:
    """Documents begin where a position is not greater than the one before."""
    if ids.ndim > 2 or ids.shape[-1] != seqlen:
        return (0, seqlen)
    begins = ids.reshape(-1, seqlen).diff() <= 0
    if (begins != begins[:1]).any():
        raise ValueError(
            f"{model}: position_ids start again at other places in each of {len(begins)} rows; one mask serves all "
            "rows: pack them into one (ringattn.pack, or shard_batch, which does)"
        )
    return (0, *(begins[0].nonzero().flatten() + 1).tolist(), seqlen)

"""The loss over data x context ranks: the exact mean over the targets of all of them, and what to log of it.

Ranks hold unequal numbers of targets, some none, so a mean of their means is not the mean. Each rank's *share* is its
sum over the count of all: the shares of all ranks add up to the mean over all targets, and so do their gradients.

``group`` is always the group over which data is split, data x context: a ``ProcessGroup``, a ``DeviceMesh`` (its axes
are summed over one after the other, so ``mesh["dp", "cp"]`` need not be flattened), or None for this rank alone.
Gradients of shares are to be *summed* over it. Where a wrapper averages (DDP, FSDP), multiply the share by the number
of ranks before ``backward()``, or tell the wrapper to sum (FSDP2: ``set_gradient_divide_factor(1.0)``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringattn.arguments.tensors import FLOATS, plain
from ringattn.arguments.values import boundaries, integer, listed, shown
from ringattn.comm.sums import Group, Part, add_up, check_group, sum_gradients, sum_over
from ringattn.context import ContextParallel

MOST_CHUNKS = 1 << 20  # each is a call of the head, on every rank
IGNORED = -100  # a label that is no target, as in torch.nn.functional.cross_entropy

Count = int | Tensor | None
__all__ = [
    "IGNORED",
    "Reading",
    "TokenMeter",
    "count_targets",
    "linear_token_mean",
    "shift_labels",
    "sum_gradients",
    "sum_over",
    "token_mean",
]


def shift_labels(tokens: Tensor, *, cu_seqlens: Iterable[int] | None = None, by: int = 1) -> Tensor:
    """For each token the one ``by`` positions later: the labels of next-token prediction, before they are sharded.

    A shard does not know what follows it, so shift the whole sequence first: ``cp.shard(shift_labels(tokens))``.

    Args:
        tokens: integers ``[batch, seqlen]``, unsharded; labels with -100 in them are kept as they are.
        cu_seqlens: bounds of documents, from 0 to ``seqlen``: no token is told the start of the next document.
        by: how far ahead, at least 1; ``k + 1`` for the ``k``-th extra head of multi-token prediction.

    Returns:
        int64 ``[batch, seqlen]``, contiguous, -100 where the sequence or the document has no such token.

    Raises:
        ValueError: tokens that are not a whole batch of integers, bounds that do not end at ``seqlen``, ``by < 1``.
    """
    plain("tokens", tokens)
    if tokens.ndim != 2 or tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"tokens {tuple(tokens.shape)} {tokens.dtype}: must be integers [batch, seqlen], unsharded")
    seqlen, by = tokens.size(1), integer("by", by, 1)
    bounds = (0, seqlen) if cu_seqlens is None else boundaries("cu_seqlens", cu_seqlens)
    if bounds[-1] != seqlen:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]} but tokens has {seqlen} positions: append {seqlen}")
    edges = torch.tensor(bounds, device=tokens.device)
    left = edges[1:].repeat_interleave(edges.diff()) - torch.arange(seqlen, device=tokens.device)
    ahead = tokens.new_full(tokens.shape, IGNORED, dtype=torch.int64)
    ahead[:, : max(seqlen - by, 0)] = tokens[:, by:]
    return ahead.masked_fill_(left <= by, IGNORED)


def count_targets(
    labels: Tensor | Sequence[Tensor], group: Group = None, *, cp: ContextParallel | None = None
) -> Tensor:
    """How many labels are not -100, over all ranks of ``group``: what shares are divided by.

    Args:
        labels: int64 ``[batch, local_seqlen]``, this rank's shard; or several, the micro-batches of one step, which
            then have one count and take one message.
        group: data x context (see the module).
        cp: with a group, lets ``labels`` also be whole, ``[batch, seqlen]``. Every rank of the context axis holds
            these, so counting them as they are would count each target once for each of its ranks; with ``cp`` a rank
            counts its own positions only, and a length that is neither the shard's nor the sequence's is refused.

    Returns:
        int64 scalar on the device of the labels, the same on all ranks.

    Raises:
        ValueError: labels that are not int64, or with ``cp`` of another length; ``cp`` of several ranks without a
            group, which would count this rank's part alone; a group this rank is not in.
    """
    with Part(group, labels) as part:
        _check_context(cp)
        if cp is not None and group is None and cp.world_size > 1:
            raise ValueError(
                f"cp of {cp.world_size} ranks and no group: that would count the targets of this rank's part alone; "
                "pass the group of data x context too"
            )
        return _counted([labels] if isinstance(labels, Tensor) else listed("labels", labels, "tensors"), cp, part)


def _counted(labels: Sequence[Tensor], cp: ContextParallel | None, part: Part) -> Tensor:
    if not labels or any(plain("labels", x).dtype != torch.int64 or not x.ndim for x in labels):
        raise ValueError(f"labels of {[x.dtype for x in labels]}: must be int64, one tensor or several")
    own = torch.stack([(_own(x, cp) != IGNORED).sum() for x in labels]).sum()
    return part.sum("a count of targets", own, lambda total: total)


def token_mean(logits: Tensor, labels: Tensor, *, group: Group = None, count: Count = None) -> Tensor:
    """This rank's share of the mean cross-entropy over all targets of all ranks, in nats.

    A rank without targets has a share of 0 and gradients of 0; so have all if there is no target at all.

    Args:
        logits: ``[..., vocabulary]``, any float dtype; computed in fp32, or fp64 for fp64.
        labels: int64 ``[...]``, this rank's shard of labels shifted before (:func:`shift_labels`), -100 = no target.
        group: counts the targets of its ranks.
        count: or their number, from :func:`count_targets`; then nothing is sent. For gradients accumulated over
            several micro-batches it is the count of all of them: means of unequal micro-batches have another mean.

    Returns:
        Scalar, fp32 or fp64.

    Raises:
        ValueError: shapes or dtypes that do not fit, labels beyond the vocabulary (on the CPU; on other devices
            looking would wait for the device, and PyTorch's own assertion ends the process), or both ``group`` and
            ``count``.
    """
    with Part(group, labels) as part:
        _check_labels(labels, logits, "logits")
        count = _check_count(count, group)
        share = _sum(logits.flatten(0, -2), labels.flatten())
        return share / _count(labels, count, part)


def linear_token_mean(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    group: Group = None,
    count: Count = None,
    chunks: int = 8,
) -> Tensor:
    """:func:`token_mean` of ``head(hidden)``, without the logits of more than a chunk of tokens in memory at a time.

    Backward computes each chunk's logits again. Loss and gradients are those of the whole; the gradient of the
    head's weight is a sum of ``chunks`` terms in its dtype.

    Args:
        hidden: ``[..., hidden_size]``, what the head takes.
        head: from ``[tokens, hidden_size]`` to logits ``[tokens, vocabulary]``, each row by itself: a module, or any
            function (a tied embedding, a softcap). Where FSDP shards it, call this function inside the forward of the
            module whose parameters it uses, or pass the sharded module itself.
        labels: int64 ``[...]``, as in :func:`token_mean`.
        group: as in :func:`token_mean`.
        count: as in :func:`token_mean`.
        chunks: how many; a chunk takes about ``12 * tokens / chunks * vocabulary`` bytes. It is a number of chunks
            and not of tokens because the head may gather its weight from other ranks: all ranks then must call it
            equally often, and their shards may be uneven.

    Returns:
        Scalar, fp32 or fp64.

    Raises:
        ValueError: as :func:`token_mean`, or ``chunks < 1``.
    """
    with Part(group, labels) as part:
        _check_labels(labels, hidden, "hidden")
        count = _check_count(count, group)
        if not callable(head):
            raise ValueError(f"head={shown(head)}: must be a function from hidden states to logits")
        chunks = integer("chunks", chunks, 1, MOST_CHUNKS)

        def total(rows: Tensor, targets: Tensor) -> Tensor:
            return _sum(head(rows), targets)

        parts = zip(hidden.flatten(0, -2).tensor_split(chunks), labels.flatten().tensor_split(chunks), strict=True)
        share = torch.stack([checkpoint(total, rows, targets, use_reentrant=False) for rows, targets in parts]).sum()
        return share / _count(labels, count, part)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a :class:`TokenMeter` says, the same on every rank but for the clock.

    tokens: all tokens since the meter was made, over all ranks.
    tokens_per_second: those since the last reading, over all ranks, by this rank's clock.
    loss: mean loss a step since the last reading.
    """

    tokens: int
    tokens_per_second: float
    loss: float


class TokenMeter:
    """Adds up tokens and shares of the loss on each rank; sends something, and waits for the device, only when read.

    Tokens are those of the ranks' own shards, so a sequence counts once and not once for each rank that it lies on.

    Args:
        group: data x context (see the module).
    """

    def __init__(self, group: Group = None) -> None:
        check_group(group)
        self.group = group
        self._all, self._local, self._loss = 0, 0, torch.zeros(())
        self._since = time.perf_counter()

    def add(self, tokens: Tensor, share: Tensor, *, cp: ContextParallel | None = None) -> None:
        """One micro-batch: its tokens, padding included, and this rank's share of its loss.

        ``tokens`` is ``[batch, local_seqlen]``, or with ``cp`` also ``[batch, seqlen]``, as in :func:`count_targets`.
        """
        _check_context(cp)
        if plain("share", share).numel() != 1 or not plain("tokens", tokens).ndim:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and share {tuple(share.shape)}: must be [batch, seqlen] and a scalar"
            )
        self._local += _own(tokens, cp).numel()
        self._loss = self._loss.to(share.device) + share.detach()

    def read(self, steps: int = 1) -> Reading:
        """What was added since the last reading, ``steps`` optimizer steps ago; every rank must call it."""
        with Part(self.group, self._loss) as part:
            steps = integer("steps", steps, 1)
            what = f"TokenMeter.read({steps}) on {self._loss.device.type} of {self._loss.dtype}"
            local = torch.tensor(self._local, device=self._loss.device)
            return part.sum(what, local, lambda tokens: self._begin_anew(int(tokens), steps), wait=True)

    def _begin_anew(self, tokens: int, steps: int) -> Reading:
        """What was added, in so many tokens on all ranks, which counts for the next reading no more."""
        loss, now = float(add_up(self._loss.clone(), self.group)) / steps, time.perf_counter()
        reading = Reading(self._all + tokens, tokens / (now - self._since), loss)
        self._all, self._local, self._loss, self._since = reading.tokens, 0, torch.zeros_like(self._loss), now
        return reading


def _own(labels: Tensor, cp: ContextParallel | None) -> Tensor:
    """This rank's positions of labels ``[..., seqlen]`` or ``[..., local_seqlen]``."""
    length = labels.size(-1)
    if cp is None or length == cp.local_seqlen:
        return labels
    if length == cp.seqlen:
        return cp.shard(labels, dim=-1)
    raise ValueError(
        f"labels of {length} tokens: must be this rank's shard (local_seqlen={cp.local_seqlen}) or whole "
        f"(seqlen={cp.seqlen})"
    )


def _check_context(cp: object) -> None:
    if cp is not None and not isinstance(cp, ContextParallel):
        raise ValueError(f"cp={shown(cp)}: must be a ringattn.ContextParallel or None")


def _check_labels(labels: Tensor, rows: Tensor, name: str) -> None:
    shape = plain(name, rows).shape[:-1]
    if rows.dtype not in FLOATS or not rows.ndim:
        raise ValueError(f"{name} {tuple(rows.shape)} {rows.dtype}: must be floats [..., size]")
    if plain("labels", labels).device != rows.device:
        raise ValueError(f"labels on {labels.device} and {name} on {rows.device}: must be on one device")
    if labels.dtype != torch.int64 or not labels.ndim or labels.shape != shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype}: must be int64 {tuple(shape)}, the shape of {name} without "
            "its last dim; shift whole labels first, then shard them like the tokens"
        )


def _check_count(count: Any, group: Group) -> Count:
    if count is None:
        return None
    if group is not None:
        raise ValueError(f"count={shown(count)} and a group: a count is that of all ranks already; pass one of the two")
    if not isinstance(count, Tensor):
        return integer("count", count)
    if plain("count", count).ndim or count.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"count {tuple(count.shape)} {count.dtype}: must be an integer scalar, see count_targets()")
    return count


def _count(labels: Tensor, count: Count, part: Part) -> int | Tensor:
    """What to divide by; at least 1, so that no targets give 0."""
    if count is None:
        count = _counted([labels], None, part)
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _sum(logits: Tensor, targets: Tensor) -> Tensor:
    _check_targets(logits, targets)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    if plain("logits", logits).ndim != 2 or len(logits) != len(targets) or logits.dtype not in FLOATS:
        raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype}: must be floats [{len(targets)}, vocabulary]")
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return  # values of another device would have to be waited for, and are no matter of a graph
    beyond = targets[(targets != IGNORED) & ((targets < 0) | (targets >= logits.size(1)))]
    if len(beyond):
        raise ValueError(
            f"a label of {int(beyond[0])} ({len(beyond)} in all are beyond the vocabulary): must be from 0 to "
            f"{logits.size(1) - 1}, an index of the {logits.size(1)} logits, or {IGNORED} for no target"
        )
